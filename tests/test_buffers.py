"""The buffer file: round trips, mapping, shards, atomic writing, inspecting. What is refused: test_bad_input.py."""

import json
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from envs import InputError, buffers
from envs.buffers import figures as buffer_figures
from envs.buffers import files

ROOT = Path(__file__).parents[1]


def make_arrays(lengths=(5, 3, 7), state=4, action=2, seed=0, terminal=(1,)):
    """Random episodes, by default of the point world's sizes; episode i ends by termination where i is in terminal."""
    rng, rows = np.random.default_rng(seed), sum(lengths)
    states = [rng.normal(size=(n + 1, state)).astype(np.float32) for n in lengths]
    ends = np.isin(np.arange(rows), np.cumsum(lengths) - 1)
    terminals = ends & np.repeat(np.isin(np.arange(len(lengths)), list(terminal)), lengths)
    return {
        "observations": np.concatenate([s[:-1] for s in states]),
        "actions": rng.uniform(-1, 1, (rows, action)).astype(np.float32),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "next_observations": np.concatenate([s[1:] for s in states]),
        "terminals": terminals,
        "timeouts": ends & ~terminals,
        "root_positions": rng.normal(size=(rows, 2)).astype(np.float32),
        "root_velocities": rng.normal(size=(rows, 2)).astype(np.float32),
    }


LABELLED = {
    "dataset_name": "toy", "env": "point", "task": "point-angle-0", "layout": "task", "reward_kind": "task",
    "dt": 0.1, "episode_length": 7,
}  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    arrays = make_arrays()
    return buffers.save(tmp_path / "toy.npz", arrays, LABELLED), arrays


def rewrite(path, drop=(), compressed=False, about=None, **changes):
    """Write the file again with plain numpy and other members or metadata: what a stranger might do."""
    with np.load(path, allow_pickle=False) as data:
        members = {key: data[key] for key in data.files if key not in drop} | changes
    if about is not None:
        members["metadata_json"] = np.array(json.dumps(json.loads(str(members["metadata_json"])) | about))
    (np.savez_compressed if compressed else np.savez)(path, **members)


def refused(path, *words, **kw):
    """Reading ends in one line with these words and a remedy."""
    with pytest.raises(InputError) as caught:
        buffers.load(path, quiet=True, **kw)
    message = str(caught.value)
    assert all(word in message for word in (*words, "Remedy:")) and "\n" not in message, message


# --- reading ---


def test_what_a_file_holds(saved):
    """Columns as given, episodes by their flags, returns by their rewards, and where it all came from."""
    path, arrays = saved
    buffer = buffers.load(path, quiet=True, verify=True)
    np.testing.assert_array_equal(buffer["episode_ends"], [5, 8, 15])
    np.testing.assert_array_equal(buffer["episode_lengths"], [5, 3, 7])
    sums = [arrays["rewards"][a:b].sum(dtype=np.float64) for a, b in [(0, 5), (5, 8), (8, 15)]]
    np.testing.assert_allclose(buffer["episode_returns"], sums, rtol=1e-6)
    about = buffer.metadata
    assert (len(buffer), buffer.num_episodes, about["num_transitions"], about["schema"]) == (15, 3, 15, "udg-buffer")
    assert about["mean_return"] == pytest.approx(np.mean(sums), rel=1e-6)
    assert about["versions"]["numpy"] == np.__version__ and about["git_commit"]
    assert {"jax", "mujoco", "gymnasium"} <= about["versions"].keys()  # what steps worlds
    assert about["created"].endswith("+00:00") and str(Path.home()) not in json.dumps(about)
    assert set(about["sha256"]) == {*arrays, *buffers.EPISODE_KEYS} == set(buffer.arrays)
    assert list(path.parent.iterdir()) == [path]


@hypothesis.settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    terminal=st.sets(st.integers(0, 5)),
    compressed=st.booleans(),
)
def test_any_episodes_round_trip(tmp_path, lengths, sizes, terminal, compressed):
    arrays = make_arrays(lengths, *sizes, terminal=terminal)
    buffer = buffers.load(buffers.save(tmp_path / "any.npz", arrays, LABELLED, compressed), quiet=True, verify=True)
    for key, value in arrays.items():
        assert buffer[key].dtype == value.dtype
        np.testing.assert_array_equal(buffer[key], value)
    assert list(buffer["episode_lengths"]) == lengths


def test_members_are_mapped_aligned_and_read_only(saved):
    path, _ = saved
    for key, array in buffers.load(path, quiet=True).arrays.items():
        base = array
        while base.base is not None and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap), key
        assert array.ctypes.data % 64 == 0 and not array.flags.writeable, key
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize("compressed", [False, True])
def test_files_of_plain_numpy_are_read_too(saved, compressed):
    """Also in Fortran's order."""
    path, arrays = saved
    rewrite(path, compressed=compressed, observations=np.asfortranarray(arrays["observations"]))
    buffer = buffers.load(path, quiet=True, verify=True)
    for key in ("observations", "actions"):
        np.testing.assert_array_equal(buffer[key], arrays[key])


def test_only_what_is_asked_for_is_read_or_looked_at(saved):
    path, arrays = saved
    rewrite(path, observations=np.full_like(arrays["observations"], np.nan))
    refused(path, "observations", "nan")
    assert np.isnan(buffers.load(path, quiet=True, unchecked=("observations",))["observations"]).all()
    buffer = buffers.load(path, keys=["rewards"], quiet=True)
    assert set(buffer.arrays) == {"rewards", *buffers.STRUCTURE}
    with pytest.raises(InputError, match="actions"):
        buffer["actions"]


def test_summary_line(saved, capsys):
    path, _ = saved
    buffers.load(path)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    for word in (str(path), "15 transitions", "3 episodes", "mean return", "no rows dropped"):
        assert word in out
    rewrite(path, about={"rows_dropped": {"open episode": 4}, "reward_kind": "none"})
    buffers.load(path)
    out = capsys.readouterr().out
    assert "4 rows dropped ('open episode')" in out and "reward-free" in out


def test_shards_are_read_as_one(tmp_path):
    parts = [make_arrays((5, 3), seed=1), make_arrays((2, 7, 4), seed=2)]
    for i, part in enumerate(parts):
        buffers.save(
            tmp_path / f"toy-{i}.npz", part, LABELLED | {"warmup_transitions": 5 * (i == 0), "episode_length": 7 + i}
        )
    buffer = buffers.load(str(tmp_path / "toy-*.npz"), quiet=True)
    for key in parts[0]:
        np.testing.assert_array_equal(buffer[key], np.concatenate([part[key] for part in parts]))
    np.testing.assert_array_equal(buffer["episode_ends"], [5, 8, 10, 17, 21])
    about = buffer.metadata
    assert (about["num_episodes"], about["warmup_transitions"], about["episode_length"]) == (5, 5, 8)
    assert [p["path"] for p in about["parents"]] == ["toy-0.npz", "toy-1.npz"]
    buffers.save(tmp_path / "toy-1.npz", parts[1], LABELLED | {"env": "ant"})
    refused(str(tmp_path / "toy-*.npz"), "toy-1.npz", "'ant'", "'point'")
    buffers.save(tmp_path / "toy-1.npz", make_arrays(state=3), LABELLED)
    refused(str(tmp_path / "toy-*.npz"), "toy-1.npz", "observations")
    refused(str(tmp_path / "b-*.npz"), "matches no file")


def test_extra_columns_are_carried(tmp_path):
    arrays = make_arrays() | {"qpos": np.ones((15, 4), np.float32)}
    path = buffers.save(tmp_path / "toy.npz", arrays, LABELLED)
    assert buffers.load(path, quiet=True)["qpos"].shape == (15, 4)
    with np.load(path) as file:  # all that numpy finds in it can be saved anew
        again = buffers.save(tmp_path / "again.npz", dict(file), json.loads(str(file["metadata_json"])))
    assert buffers.load(again, quiet=True).metadata["sha256"] == buffers.load(path, quiet=True).metadata["sha256"]
    rewrite(path, qpos=np.ones((14, 4), np.float32))
    refused(path, "qpos", "(14, 4)")


def test_sha256_finds_a_flipped_value(saved):
    path, arrays = saved
    rewrite(path, root_velocities=arrays["root_velocities"] + 1)
    buffers.load(path, quiet=True)
    refused(path, "root_velocities", "sha256", verify=True)


def test_memory_that_does_not_suffice_is_refused_with_the_number(saved, monkeypatch):
    path, _ = saved
    rewrite(path, compressed=True)
    monkeypatch.setattr(files, "available_memory", lambda: 100.0)
    refused(path, "GB of memory", "uncompressed")


def test_what_learners_ask_for(tmp_path, capsys):
    """Rewards, with a warning where they are all the same; their own task, else the command that makes it."""
    path = buffers.save(tmp_path / "r.npz", make_arrays() | {"rewards": np.ones(15, np.float32)}, LABELLED)
    buffers.load(path, keys=["actions"], quiet=True, require_rewards=True, task="point-angle-0")
    assert "every row" in capsys.readouterr().err
    refused(path, f"python udg_select.py --buffers {path} --task point-angle-60", task="point-angle-60")
    rewrite(path, about={"parents": [{"path": "policy_03.npz", "sha256": ""}]})
    refused(path, "<folder of policy_03.npz>", task="point-angle-60")


# --- writing ---


def test_the_writer_refuses_what_the_reader_would_and_writes_nothing(tmp_path):
    good = make_arrays()
    for key, value in {
        "rewards": good["rewards"].astype(np.float64),
        "actions": good["actions"] + 3,
        "observations": None,
        "next_observations": good["observations"] * np.float32(np.nan),
        "timeouts": np.zeros(15, bool),
    }.items():
        with pytest.raises(InputError, match=key):
            buffers.save(tmp_path / "toy.npz", {**good, key: value}, LABELLED)
    for more, words in (
        ({"infos/qpos": good["rewards"]}, "'infos/qpos': is not a plain array name.*letters"),
        ({f"x{i}": good["rewards"] for i in range(60)}, "limit 64.*leave some out"),
        ({"terminals": np.zeros(15, bool), "timeouts": np.zeros(15, bool)}, "timeouts: no row ends"),
        ({"policy_ids": np.full(15, -1, np.int32)}, "policy_ids: row 0 is -1.*from 0"),
    ):
        with pytest.raises(InputError, match=words):
            buffers.save(tmp_path / "toy.npz", good | more, LABELLED)
    with pytest.raises(InputError, match="empty"):
        buffers.save(tmp_path / "toy.npz", {key: value[:0] for key, value in good.items()}, LABELLED)
    for bad in ({"seed": object()}, {"seed": float("nan")}):
        with pytest.raises(InputError, match="metadata_json"):
            buffers.save(tmp_path / "toy.npz", good, LABELLED | bad)
    with pytest.raises(InputError, match=r"\.npz"):
        buffers.save(tmp_path / "toy.dat", good, LABELLED)
    assert not list(tmp_path.iterdir())


def test_an_old_file_survives_a_full_disk(saved):
    path, _ = saved
    before, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, hard))
    try:
        with pytest.raises(InputError, match=r"cannot be written.*MB.*unchanged"):
            buffers.save(path, make_arrays((4000, 4000)), LABELLED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_crash_between_writing_and_renaming_leaves_the_old_file(saved, monkeypatch):
    path, _ = saved
    before = path.read_bytes()

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        buffers.save(path, make_arrays((9,)), LABELLED)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_folders_are_made_and_metadata_become_plain(tmp_path):
    numpys = {"seed": np.int64(3), "generator": {"flags": {"x": np.arange(2)}}}
    path = buffers.save(tmp_path / "a" / "b" / "toy.npz", make_arrays(), LABELLED | numpys)
    about = buffers.load(path, quiet=True).metadata
    assert (about["seed"], about["generator"]) == (3, {"flags": {"x": [0, 1]}})
    with pytest.raises(InputError, match="cannot be written"):
        buffers.save(path / "toy.npz", make_arrays(), LABELLED)


# --- inspecting ---


def test_reward_by_step_against_a_loop():
    rewards = np.array([1.0, 2.0, 3.0, 5.0, 7.0], np.float32)
    mean, std, counts = buffer_figures.reward_by_step(rewards, np.array([3, 5]))
    np.testing.assert_allclose(mean, [3.0, 4.5, 3.0])
    np.testing.assert_allclose(std, [2.0, 2.5, 0.0])
    np.testing.assert_array_equal(counts, [2, 2, 1])


def test_inspect_as_a_program(saved, tmp_path):
    """In another folder, without a warning of Python's."""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "envs.buffers", "inspect"]
    done = subprocess.run(
        [*command, str(saved[0]), "--figure", "figure.png"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for word in ("15 transitions", "root_velocities", "15x4", "dataset_name", "verdict"):
        assert word in done.stdout
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("module", [np, jnp])
def test_what_networks_see(module):
    """Column 1 by its sine, its cosine last; then less the mean, over the std. A whole turn changes nothing."""
    x = np.array([[0.5, 2.0, -1.0], [1.5, 2.0 - 2 * np.pi, 3.0]], np.float32)
    see = buffers.Sight(np.float32([1, 0, 0, 0]), np.float32([2, 1, 1, 0.5]), buffers.angle_columns("1"))
    sin, cos = np.sin(2.0), np.cos(2.0)
    seen = see(module.asarray(x))
    np.testing.assert_allclose(seen, [[-0.25, sin, -1, 2 * cos], [0.25, sin, 3, 2 * cos]], atol=1e-6)
    assert isinstance(seen, module.ndarray) and seen.dtype == np.float32
    plain = buffers.Sight(np.float32([1, 0, 0]), np.float32([2, 1, 1]), buffers.angle_columns("none"))
    np.testing.assert_array_equal(plain(module.asarray(x)), (x - plain.mean) / plain.std)
    assert {k: v.shape for k, v in see.stored(3).items()} == {
        "observation_mean": (3, 4), "observation_std": (3, 4), "observation_angles": (3, 1),
    }  # fmt: skip
