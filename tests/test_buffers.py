"""The buffer file: round trips, mapping, atomic writing, and every refusal by name."""

import io
import json
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from envs import InputError, buffers
from envs.buffers import figures as buffer_figures
from envs.buffers import files

ROOT = Path(__file__).parents[1]


def make_arrays(lengths=(5, 3, 7), state=3, action=2, seed=0, terminal=(1,)):
    """A small world with known structure: episode i ends by termination where i is in terminal."""
    rng = np.random.default_rng(seed)
    rows = sum(lengths)
    states = [rng.normal(size=(n + 1, state)).astype(np.float32) for n in lengths]
    ends = np.cumsum(lengths) - 1
    terminals, timeouts = np.zeros(rows, bool), np.zeros(rows, bool)
    for i, end in enumerate(ends):
        (terminals if i in terminal else timeouts)[end] = True
    return {
        "observations": np.concatenate([s[:-1] for s in states]),
        "actions": rng.uniform(-1, 1, (rows, action)).astype(np.float32),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "next_observations": np.concatenate([s[1:] for s in states]),
        "terminals": terminals,
        "timeouts": timeouts,
        "root_positions": rng.normal(size=(rows, 2)).astype(np.float32),
        "root_velocities": rng.normal(size=(rows, 2)).astype(np.float32),
    }


def make_metadata(**changes):
    metadata = {
        "dataset_name": "toy",
        "env": "point",
        "task": "point-angle-0",
        "layout": "task",
        "reward_kind": "task",
        "dt": 0.1,
        "episode_length": 7,
        "generator": {"script": "test", "flags": {"seed": 0}},
        "seed": 0,
        "warmup_transitions": 5,
    }
    return {**metadata, **changes}


@pytest.fixture
def saved(tmp_path):
    arrays = make_arrays()
    return buffers.save(tmp_path / "toy.npz", arrays, make_metadata()), arrays


def rewrite(path, drop=(), compressed=False, **changes):
    """Write the file again with plain numpy and some members changed: what a stranger might do."""
    with np.load(path, allow_pickle=False) as data:
        arrays = {key: data[key] for key in data.files if key not in drop}
    arrays.update(changes)
    (np.savez_compressed if compressed else np.savez)(path, **arrays)


def rewrite_metadata(path, **changes):
    with np.load(path, allow_pickle=False) as data:
        metadata = json.loads(str(data["metadata_json"]))
    rewrite(path, metadata_json=np.array(json.dumps({**metadata, **changes})))


def refused(path, *words, **kw):
    with pytest.raises(InputError) as caught:
        buffers.load(path, quiet=True, **kw)
    message = str(caught.value)
    for word in (*words, "Remedy:"):
        assert word in message, message
    assert "\n" not in message
    return message


# --- what must work ---


@pytest.mark.parametrize("compressed", [False, True])
def test_round_trip_is_exact(tmp_path, compressed):
    arrays = make_arrays()
    path = buffers.save(tmp_path / "toy.npz", arrays, make_metadata(), compressed=compressed)
    buffer = buffers.load(path, quiet=True, verify=True)
    for key, value in arrays.items():
        assert buffer[key].dtype == value.dtype
        np.testing.assert_array_equal(buffer[key], value)
    np.testing.assert_array_equal(buffer["episode_ends"], [5, 8, 15])
    np.testing.assert_array_equal(buffer["episode_lengths"], [5, 3, 7])
    sums = [arrays["rewards"][a:b].sum(dtype=np.float64) for a, b in [(0, 5), (5, 8), (8, 15)]]
    np.testing.assert_allclose(buffer["episode_returns"], sums, rtol=1e-6)
    assert (len(buffer), buffer.num_episodes) == (15, 3)
    assert buffer.metadata["mean_return"] == pytest.approx(np.mean(sums), rel=1e-6)
    assert buffer.metadata["schema"] == "udg-buffer"
    assert list(tmp_path.iterdir()) == [path]


def test_numpy_alone_reads_the_file(saved):
    path, arrays = saved
    with np.load(path, allow_pickle=False) as data:
        np.testing.assert_array_equal(data["observations"], arrays["observations"])
        assert json.loads(str(data["metadata_json"]))["num_transitions"] == 15


def test_members_are_mapped_aligned_and_read_only(saved):
    path, _ = saved
    buffer = buffers.load(path, quiet=True)
    for key, array in buffer.arrays.items():
        base = array
        while base.base is not None and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap), key
        assert array.ctypes.data % 64 == 0, key
        assert not array.flags.writeable
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_files_of_plain_numpy_are_mapped_too(saved):
    path, arrays = saved
    rewrite(path)
    buffer = buffers.load(path, quiet=True, verify=True)
    np.testing.assert_array_equal(buffer["actions"], arrays["actions"])


def test_reading_one_key_reads_no_other_column(saved):
    path, _ = saved
    buffer = buffers.load(path, keys=["rewards"], quiet=True)
    assert set(buffer.arrays) == {"rewards", *buffers.STRUCTURE}
    with pytest.raises(InputError, match="actions"):
        buffer["actions"]


def test_unchecked_columns_are_mapped_without_a_look(saved):
    path, arrays = saved
    rewrite(path, observations=np.full_like(arrays["observations"], np.nan))
    refused(path, "observations", "nan")
    buffer = buffers.load(path, quiet=True, unchecked=("observations",))
    assert np.isnan(buffer["observations"]).all()


def test_fortran_order_is_read_right(saved):
    path, arrays = saved
    rewrite(path, observations=np.asfortranarray(arrays["observations"]))
    buffer = buffers.load(path, quiet=True, verify=True)
    np.testing.assert_array_equal(buffer["observations"], arrays["observations"])


def test_summary_line(saved, capsys):
    path, _ = saved
    buffers.load(path)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    for word in (str(path), "15 transitions", "3 episodes", "mean return", "no rows dropped"):
        assert word in out
    rewrite_metadata(path, rows_dropped={"open episode": 4}, reward_kind="none")
    buffers.load(path)
    out = capsys.readouterr().out
    assert "4 rows dropped ('open episode')" in out
    assert "reward-free" in out


def test_one_row_and_one_episode(tmp_path):
    for lengths in ((1,), (4,), (1, 1, 1)):
        arrays = make_arrays(lengths, state=1, action=1)
        path = buffers.save(tmp_path / "one.npz", arrays, make_metadata(warmup_transitions=0))
        buffer = buffers.load(path, quiet=True)
        assert buffer["observations"].shape == (sum(lengths), 1)
        assert buffer.num_episodes == len(lengths)


def test_shards_are_read_as_one(tmp_path):
    parts = [make_arrays((5, 3), seed=1), make_arrays((2, 7, 4), seed=2)]
    for i, part in enumerate(parts):
        metadata = make_metadata(warmup_transitions=5 if i == 0 else 0)
        buffers.save(tmp_path / f"toy-{i}.npz", part, metadata)
    buffer = buffers.load(str(tmp_path / "toy-*.npz"), quiet=True)
    for key in parts[0]:
        whole = np.concatenate([part[key] for part in parts])
        np.testing.assert_array_equal(buffer[key], whole)
    np.testing.assert_array_equal(buffer["episode_ends"], [5, 8, 10, 17, 21])
    assert buffer.metadata["num_episodes"] == 5
    assert buffer.metadata["warmup_transitions"] == 5
    assert [p["path"] for p in buffer.metadata["parents"]] == ["toy-0.npz", "toy-1.npz"]


def test_shards_of_two_worlds_are_refused(tmp_path):
    buffers.save(tmp_path / "a-0.npz", make_arrays(), make_metadata())
    buffers.save(tmp_path / "a-1.npz", make_arrays(), make_metadata(env="ant"))
    refused(str(tmp_path / "a-*.npz"), "a-1.npz", "'ant'", "'point'")
    buffers.save(tmp_path / "a-1.npz", make_arrays(state=4), make_metadata())
    refused(str(tmp_path / "a-*.npz"), "a-1.npz", "observations")
    refused(str(tmp_path / "b-*.npz"), "matches no file")


def test_extra_columns_are_carried(tmp_path):
    arrays = {**make_arrays(), "qpos": np.ones((15, 4), np.float32)}
    path = buffers.save(tmp_path / "toy.npz", arrays, make_metadata())
    assert buffers.load(path, quiet=True)["qpos"].shape == (15, 4)
    rewrite(path, qpos=np.ones((14, 4), np.float32))
    refused(path, "qpos", "(14, 4)")


# --- what must be refused, each by name ---


@pytest.mark.parametrize("key", [*buffers.REQUIRED, *buffers.EPISODE_KEYS, "metadata_json"])
def test_missing_key(saved, key):
    path, _ = saved
    rewrite(path, drop=(key,))
    refused(path, key, "missing")


@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "root_velocities"])
def test_float64_is_refused_with_the_remedy(saved, key):
    path, arrays = saved
    rewrite(path, **{key: arrays[key].astype(np.float64)})
    refused(path, key, "float64", "float32", "array.astype(np.float32)")


BROKEN = {
    "rank": ("rewards", lambda a: a["rewards"][:, None], "(15, 1)"),
    "length": ("actions", lambda a: a["actions"][:-1], "(14, 2)"),
    "states": ("next_observations", lambda a: a["next_observations"][:, :2], "S is 3"),
    "root": ("root_positions", lambda a: np.zeros((15, 3), np.float32), "(15, 3)"),
    "flags": ("terminals", lambda a: a["terminals"].astype(np.float32), "float32"),
    "big endian": ("rewards", lambda a: a["rewards"].astype(">f4"), ">f4"),
    "object": ("rewards", lambda a: a["rewards"].astype(object), "pickled"),
    "inf": ("rewards", lambda a: np.where(np.arange(15) == 4, np.inf, a["rewards"]), "row 4"),
    "range": ("actions", lambda a: a["actions"] * 0 + np.float32(1.0001), "beyond 1"),
    "both": ("timeouts", lambda a: a["timeouts"] | a["terminals"], "row 7 has both"),
    "open": ("timeouts", lambda a: a["timeouts"] & (np.arange(15) < 14), "last row"),
    "ends": ("episode_ends", lambda a: np.array([5, 9, 15]), "flags"),
    "lengths": ("episode_lengths", lambda a: np.array([5, 4, 6], np.int32), "episode_ends"),
    "returns": ("episode_returns", lambda a: np.array([0, 0, 9], np.float32), "sum"),
    "order": ("next_observations", lambda a: a["next_observations"][::-1], "next row"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_arrays(saved, case):
    path, arrays = saved
    key, change, word = BROKEN[case]
    value = change(arrays)
    if case == "object":
        members = {**np.load(path), "rewards": value}
        np.savez(path, **members)
    elif case == "inf":
        rewrite(path, **{key: value.astype(np.float32)})
    else:
        rewrite(path, **{key: value})
    refused(path, key, word)


def test_the_writer_refuses_the_same_and_writes_nothing(tmp_path):
    good = make_arrays()
    for key, value in {
        "rewards": good["rewards"].astype(np.float64),
        "actions": good["actions"] + 3,
        "observations": good["observations"] * np.float32(np.nan),
        "timeouts": np.zeros(15, bool),
    }.items():
        with pytest.raises(InputError, match=key):
            buffers.save(tmp_path / "toy.npz", {**good, key: value}, make_metadata())
    with pytest.raises(InputError, match="observations"):
        missing = {k: v for k, v in good.items() if k != "observations"}
        buffers.save(tmp_path / "toy.npz", missing, make_metadata())
    with pytest.raises(InputError, match="empty"):
        empty = {key: value[:0] for key, value in good.items()}
        buffers.save(tmp_path / "toy.npz", empty, make_metadata())
    assert not list(tmp_path.iterdir())


def test_zero_size_files(tmp_path):
    path = tmp_path / "empty.npz"
    path.write_bytes(b"")
    refused(path, "empty.npz")
    refused(tmp_path / "none.npz", "does not exist")
    refused(tmp_path, "is a folder")


def test_bools_that_are_not_bools(saved):
    path, _ = saved
    flags = np.zeros(15, np.uint8)
    flags[3] = 7
    rewrite(path, timeouts=flags.view(bool))
    refused(path, "timeouts", "row 3")


@pytest.mark.parametrize("tenth", range(1, 10))
def test_files_cut_short(saved, tenth):
    path, _ = saved
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * tenth // 10])
    refused(path, "toy.npz")


def test_flipped_bytes_never_escape(tmp_path):
    """Any damage ends in InputError or in a readable buffer, never in another exception."""
    path = buffers.save(tmp_path / "toy.npz", make_arrays(), make_metadata())
    whole, rng, caught = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(300):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), rng.integers(1, 20)):
            data[place] = rng.integers(0, 256)
        path.write_bytes(data)
        try:
            buffers.load(path, quiet=True, verify=True)
        except InputError:
            caught += 1
    assert caught > 200


RELAXED = hypothesis.settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


@RELAXED
@hypothesis.given(data=st.binary(max_size=300), ending=st.booleans())
def test_any_bytes_are_refused(tmp_path, data, ending):
    """Also behind a valid, empty zip directory."""
    path = tmp_path / "any.npz"
    path.write_bytes(data + (b"PK\x05\x06" + bytes(18) if ending else b""))
    refused(path, "any.npz")


@RELAXED
@hypothesis.given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    state=st.integers(1, 4),
    action=st.integers(1, 3),
    terminal=st.sets(st.integers(0, 5)),
    compressed=st.booleans(),
)
def test_any_episodes_round_trip(tmp_path, lengths, state, action, terminal, compressed):
    arrays = make_arrays(lengths, state, action, terminal=terminal)
    metadata = make_metadata(warmup_transitions=0)
    path = buffers.save(tmp_path / "any.npz", arrays, metadata, compressed=compressed)
    buffer = buffers.load(path, quiet=True, verify=True)
    for key, value in arrays.items():
        np.testing.assert_array_equal(buffer[key], value)
    assert list(buffer["episode_lengths"]) == lengths


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"schema": "minari"}, "schema"),
        ({"schema_version": 99}, "99"),
        ({"num_transitions": 14}, "num_transitions"),
        ({"num_episodes": 4}, "num_episodes"),
        ({"dt": -1}, "dt"),
        ({"episode_length": "7"}, "episode_length"),
        ({"layout": "flat"}, "layout"),
        ({"reward_kind": "dense"}, "reward_kind"),
        ({"warmup_transitions": 16}, "warmup_transitions"),
        ({"parents": ["x"]}, "parents"),
        ({"rows_dropped": 3}, "rows_dropped"),
        ({"env": None}, "env"),
    ],
)
def test_wrong_metadata(saved, changes, word):
    path, _ = saved
    rewrite_metadata(path, **changes)
    refused(path, "metadata_json", word)


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"dt": NaN}', "[" * 100_000, '"x"', ""])
def test_wrong_json(saved, text):
    path, _ = saved
    rewrite(path, metadata_json=np.array(text))
    refused(path, "metadata_json")


def test_metadata_of_another_kind(saved):
    path, _ = saved
    rewrite(path, metadata_json=np.zeros(3, np.float32))
    refused(path, "metadata_json", "expected one string")


def add_member(path, name, data, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "a", method) as archive:
        archive.writestr(name, data)


HOSTILE = ("../evil.npy", "/etc/evil.npy", "a/b.npy", "a\\b.npy", "x.txt", "__x__.npy", "\n.npy")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names(saved, name):
    path, _ = saved
    add_member(path, name, b"x")
    refused(path, "not a plain array name")


def test_the_same_name_twice(saved):
    path, _ = saved
    with pytest.warns(UserWarning, match="Duplicate"):
        add_member(path, "rewards.npy", b"x")
    refused(path, "rewards", "twice")


def test_too_many_members(saved):
    path, _ = saved
    for i in range(60):
        add_member(path, f"x{i}.npy", b"x")
    refused(path, "members")


def npy(shape, dtype="<f4", data=b""):
    handle = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(handle, header)
    return handle.getvalue() + data


def test_header_that_announces_more_than_it_holds(saved):
    path, _ = saved
    add_member(path, "extra.npy", npy((10**12, 10**6)))
    refused(path, "extra", "announces")


def test_decompression_bomb(saved):
    path, _ = saved
    rewrite(path, compressed=True)
    add_member(path, "bomb.npy", npy((1 << 26,), data=bytes(1 << 28)), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    refused(path, "unpack")


def test_pickle_is_never_loaded(saved, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    path, _ = saved
    members = {**np.load(path), "rewards": np.array([Evil()] * 15, dtype=object)}
    np.savez(path, **members)
    refused(path, "rewards", "pickled")
    assert not (tmp_path / "owned").exists()


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


# --- what learners ask for ---


def test_reward_free_data_is_refused(tmp_path):
    arrays = {**make_arrays(), "rewards": np.zeros(15, np.float32)}
    path = buffers.save(tmp_path / "r.npz", arrays, make_metadata(reward_kind="none"))
    buffers.load(path, quiet=True)
    refused(path, "reward-free", "udg_select.py", require_rewards=True)
    buffers.save(path, arrays, make_metadata(reward_kind="task"))
    refused(path, "zero in every row", "udg_select.py", require_rewards=True)


def test_constant_rewards_warn(tmp_path, capsys):
    arrays = {**make_arrays(), "rewards": np.ones(15, np.float32)}
    path = buffers.save(tmp_path / "r.npz", arrays, make_metadata())
    buffers.load(path, keys=["actions"], quiet=True, require_rewards=True)
    assert "every row" in capsys.readouterr().err


def test_another_task_is_refused_with_the_command(saved):
    path, _ = saved
    assert len(buffers.load(path, task="point-angle-0", quiet=True)) == 15
    message = refused(path, "task", task="point-angle-60")
    assert f"python udg_select.py --buffers {path} --task point-angle-60" in message
    rewrite_metadata(path, parents=[{"path": "policy_03.npz", "sha256": ""}])
    assert "<folder of policy_03.npz>" in refused(path, task="point-angle-60")


# --- writing ---


def test_an_old_file_survives_a_full_disk(saved):
    path, _ = saved
    before = path.read_bytes()
    big = make_arrays((4000, 4000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, hard))
    try:
        with pytest.raises(InputError, match=r"cannot be written.*MB.*unchanged"):
            buffers.save(path, big, make_metadata())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_crash_between_writing_and_renaming_leaves_the_old_file(saved, monkeypatch):
    path, _ = saved
    before = path.read_bytes()

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        buffers.save(path, make_arrays((9,)), make_metadata())
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_the_folder_is_made_and_a_bad_one_is_named(tmp_path):
    path = buffers.save(tmp_path / "a" / "b" / "toy.npz", make_arrays(), make_metadata())
    assert path.exists()
    with pytest.raises(InputError, match="cannot be written"):
        buffers.save(path / "toy.npz", make_arrays(), make_metadata())
    with pytest.raises(InputError, match=r"\.npz"):
        buffers.save(tmp_path / "toy.dat", make_arrays(), make_metadata())


def test_metadata_that_is_not_json_is_refused(tmp_path):
    for bad in ({"seed": object()}, {"seed": float("nan")}):
        with pytest.raises(InputError, match="metadata_json"):
            buffers.save(tmp_path / "toy.npz", make_arrays(), make_metadata(**bad))
    metadata = make_metadata(seed=np.int64(3), generator={"flags": {"x": np.arange(2)}})
    path = buffers.save(tmp_path / "toy.npz", make_arrays(), metadata)
    found = buffers.load(path, quiet=True).metadata
    assert found["seed"] == 3
    assert found["generator"] == {"flags": {"x": [0, 1]}}


def test_provenance_is_recorded(saved):
    metadata = buffers.load(saved[0], quiet=True).metadata
    assert metadata["versions"]["numpy"] == np.__version__
    assert metadata["git_commit"]
    assert metadata["created"].endswith("+00:00")
    assert set(metadata["sha256"]) == set(saved[1]) | set(buffers.EPISODE_KEYS)
    assert str(Path.home()) not in json.dumps(metadata)


# --- inspecting ---


def test_reward_by_step_against_a_loop():
    rewards = np.array([1.0, 2.0, 3.0, 5.0, 7.0], np.float32)
    mean, std, counts = buffer_figures.reward_by_step(rewards, np.array([3, 5]))
    np.testing.assert_allclose(mean, [3.0, 4.5, 3.0])
    np.testing.assert_allclose(std, [2.0, 2.5, 0.0])
    np.testing.assert_array_equal(counts, [2, 2, 1])


def test_inspect_command(saved, tmp_path):
    path, _ = saved
    figure = tmp_path / "figure.png"
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "envs.buffers", "inspect"]
    done = subprocess.run([*command, str(path), "--figure", str(figure)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("15 transitions", "root_velocities", "15x3", "dataset_name", "verdict"):
        assert word in done.stdout
    assert figure.read_bytes()[:4] == b"\x89PNG"
    path.write_bytes(path.read_bytes()[:500])
    done = subprocess.run([*command, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
