"""Data in and out: every dialect on a synthetic file in its exact layout, round trips, refusals, physics."""

import contextlib
import functools
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import h5py
import hypothesis
import jax
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete
from hypothesis import strategies as st

import dac
import envs
import runner
import udg_select
from envs import InputError, buffers, maze
from envs.buffers import convert
from envs.buffers.__main__ import main as command_line
from envs.buffers.convert import d4rl as convert_d4rl
from envs.buffers.convert import physics as convert_physics
from tests.test_buffers import make_arrays

GOLDEN = Path(__file__).parent / "golden"
HOPPER_DT = 0.008


# --- files in the layouts of others --------------------------------------------------------------


def hopper_states(lengths, seed=0):
    """Per episode qpos (T + 1, 6) and qvel (T + 1, 6), float64; positions follow the velocities, all in the air."""
    rng = np.random.default_rng(seed)
    found = []
    for length in lengths:
        qvel = rng.uniform(-3, 3, (length + 1, 6))
        start = np.concatenate([[rng.uniform(-5, 5), 3.0], rng.normal(size=4)])
        moved = HOPPER_DT * 0.5 * (qvel[1:] + qvel[:-1])
        found.append((start + np.concatenate([np.zeros((1, 6)), np.cumsum(moved, axis=0)]), qvel))
    return found


def hopper_rows(lengths=(5, 3, 7), terminal=(1,), seed=0, dtype=np.float32):
    """What D4RL's v2 hopper files hold, and the true successors."""
    rng = np.random.default_rng(seed + 1)
    states, rows = hopper_states(lengths, seed), sum(lengths)
    observe = lambda qpos, qvel: np.concatenate([qpos[:, 1:], np.clip(qvel, -10, 10)], axis=1)
    actions = rng.uniform(-1, 1, (rows, 3)).astype(dtype)
    speed = np.concatenate([np.diff(qpos[:, 0]) / HOPPER_DT for qpos, _ in states])
    ends = np.cumsum(lengths) - 1
    failed = np.isin(np.arange(len(lengths)), list(terminal))
    terminals, timeouts = np.zeros(rows, bool), np.zeros(rows, bool)
    terminals[ends[failed]], timeouts[ends[~failed]] = True, True
    return {
        "observations": np.concatenate([observe(q[:-1], v[:-1]) for q, v in states]).astype(dtype),
        "next_observations": np.concatenate([observe(q[1:], v[1:]) for q, v in states]).astype(dtype),
        "actions": actions,
        "rewards": (speed - 1e-3 * np.square(actions, dtype=np.float64).sum(1) + 1.0).astype(dtype),
        "terminals": terminals,
        "timeouts": timeouts,
        "infos/qpos": np.concatenate([q[:-1] for q, _ in states]).astype(dtype),
        "infos/qvel": np.concatenate([v[:-1] for _, v in states]).astype(dtype),
        "infos/action_log_probs": rng.normal(size=rows).astype(dtype),
    }


def without(rows, *keys, **changes):
    return {key: value for key, value in rows.items() if key not in keys} | changes


def write_hdf5(path, rows, **scalars):
    with h5py.File(path, "w") as file:
        for key, value in rows.items():
            file.create_dataset(key, data=value, compression="gzip")
        for key, value in scalars.items():
            file[f"metadata/{key}"] = value
    return path


def maze_rows(lengths=(9, 6), goal=(4.0, 0.0), near=((3, 4, 5), ()), seed=0):
    """An AntMaze file: no next observations; float terminals wherever the step ended at the goal, and on it goes."""
    rng = np.random.default_rng(seed)
    observations, paid = [], []
    for length, there in zip(lengths, near, strict=True):
        part = rng.normal(size=(length + 1, 29))
        part[:, 2:15] = [0.6, 1.0, 0.0, 0.0, 0.0, *np.tile([0.1, 0.8], 4)]  # it slides: legs as they are
        part[:, :2] = np.array(goal) - [0.8, 0.0] + rng.uniform(-0.2, 0.2, (length + 1, 2))
        for step in there:
            part[step + 1, :2] = goal + rng.uniform(-0.3, 0.3, 2)
        paid.append(np.linalg.norm(part[1:, :2] - goal, axis=1) <= 0.5)
        observations.append(part[:-1])
    timeouts = np.zeros(sum(lengths), bool)
    timeouts[np.cumsum(lengths) - 1] = True
    return {
        "observations": np.concatenate(observations).astype(np.float32),
        "actions": rng.uniform(-1, 1, (sum(lengths), 8)).astype(np.float32),
        "rewards": np.concatenate(paid).astype(np.float32),
        "terminals": np.concatenate(paid).astype(np.float32),
        "timeouts": timeouts,
        "infos/goal": np.tile(np.float32(goal), (sum(lengths), 1)),
        "infos/qpos": np.concatenate(observations)[:, :15].astype(np.float32),
        "infos/qvel": np.concatenate(observations)[:, 15:].astype(np.float32),
    }


def import_d4rl(tmp_path, rows, file="hopper_medium-v2", **choices):
    path = write_hdf5(tmp_path / f"{file}.hdf5", rows)
    choices = {"replay": False, "force": True, **choices}
    return buffers.load(convert.from_d4rl(path, tmp_path / "out.npz", **choices), quiet=True, verify=True)


def about(buffer, *keys):
    return tuple(buffer.metadata[key] for key in keys)


def assert_holds(buffer, **columns):
    for key, values in columns.items():
        np.testing.assert_array_equal(buffer[key], values, err_msg=key)


def refused(function, *words):
    """It ends in one line with these words and a remedy."""
    with pytest.raises(InputError) as caught:
        function()
    message = str(caught.value)
    assert all(word in message for word in (*words, "Remedy:")) and "\n" not in message, message


# --- D4RL ----------------------------------------------------------------------------------------


def test_d4rl_v2_keeps_every_row_and_no_policy(tmp_path):
    rows, states = hopper_rows(), hopper_states((5, 3, 7))
    scalars = {"algorithm": np.bytes_(b"SAC"), "iteration": np.int32(3), "policy/nonlinearity": np.bytes_(b"relu")}
    scalars |= {f"policy/fc0/{key}": np.ones((3, 3)) for key in ("weight", "bias")}
    path = write_hdf5(tmp_path / "hopper_medium-v2.hdf5", rows, **scalars)
    out = convert.from_d4rl(path, tmp_path / "out.npz", replay=False)
    buffer = buffers.load(out, quiet=True, verify=True)
    for key in buffers.REQUIRED:
        np.testing.assert_array_equal(buffer[key], rows[key])
    further = {"root_positions", "root_velocities", "action_log_probs"}
    assert set(buffer.arrays) == {*buffers.REQUIRED, *buffers.EPISODE_KEYS, *further}
    assert_holds(buffer, action_log_probs=rows["infos/action_log_probs"], root_positions=rows["infos/qpos"][:, :2])
    velocities = np.concatenate([np.diff(qpos[:, :2], axis=0) / HOPPER_DT for qpos, _ in states])
    np.testing.assert_allclose(buffer["root_velocities"], velocities, rtol=0, atol=2e-4)  # at the ends of episodes too
    np.testing.assert_array_equal(buffer["episode_ends"], [5, 8, 15])
    assert about(buffer, "dataset_name", "env", "task") == ("hopper-medium-v2", "hopper", "hopper")
    assert about(buffer, "layout", "reward_kind", "dt", "episode_length") == ("task", "task", 0.008, 1000)
    assert about(buffer, "reference", "rows_dropped", "reward_agreement") == ([-20.272305, 3234.3], {}, 1.0)
    parent = {"path": path.name, "sha256": convert.common.file_sha256(path), "taken": "15 rows"}
    generator = {"script": "d4rl", "flags": {"algorithm": "SAC", "iteration": 3}}
    assert about(buffer, "generator", "parents") == (generator, [parent])


def changed(key, function):
    return lambda rows: rows | {key: function(rows[key])}


def first_infinite(column):
    return np.concatenate([[-np.inf], column[1:]])


@pytest.mark.parametrize("file, change, column, agreement, note", [
    ("hopper-medium-v2", changed("infos/qpos", lambda q: np.roll(q, 1, axis=0)), "root_positions", None, "v1 files"),
    ("hopper-medium-v2", changed("rewards", lambda r: np.roll(r, 1)), "root_positions", 0, "rewards follow from"),
    ("hopper-medium-v2", changed("infos/action_log_probs", first_infinite), "action_log_probs", 1, "is not finite"),
    ("antmaze-umaze-v0", changed("infos/goal", lambda g: np.pad(g, ((0, 0), (0, 1)))), "goals", None, "has 3 numbers"),
])  # fmt: skip
def test_columns_that_do_not_belong_are_left_out_with_a_note(tmp_path, file, change, column, agreement, note):
    rows = maze_rows() if "maze" in file else hopper_rows()
    buffer = import_d4rl(tmp_path, change(rows), file)
    assert column not in buffer.arrays and any(note in text for text in buffer.metadata["notes"])
    found = buffer.metadata["reward_agreement"]
    assert found == agreement or (agreement == 0 and found < 0.5)


def test_d4rl_v0_has_no_timeouts_and_rewards_of_rank_two(tmp_path):
    """Three episodes: 8 steps cut at 4 and 4, 3 steps to a fall, 6 steps cut at 4; the last is open."""
    rows = hopper_rows((4, 4, 3, 4, 2), terminal=(2,))
    keys = ("next_observations", "timeouts", "infos/qpos", "infos/qvel", "infos/action_log_probs")
    rows = without(rows, *keys, rewards=rows["rewards"][:, None])
    buffer = import_d4rl(tmp_path, rows, "hopper_mixed", episode_length=4)
    np.testing.assert_array_equal(buffer["episode_lengths"], [3, 3, 2, 3, 1])
    kept = np.setdiff1d(np.arange(17), [3, 7, 10, 14, 16])
    assert_holds(buffer, next_observations=rows["observations"][kept + 1], rewards=rows["rewards"][kept, 0])
    assert buffer.metadata["dataset_name"] == "hopper-medium-replay-v0"
    lost = "its next observation is not in the file"
    dropped = {f"terminal, {lost}": 1, f"timeout, {lost}": 3, f"end without a flag, {lost}": 1}
    assert buffer.metadata["rows_dropped"] == dropped and "1 rows dropped ('terminal," in buffer.summary()
    assert any("no timeouts" in note for note in buffer.metadata["notes"])


@pytest.mark.parametrize("start", [False, True])
def test_d4rl_v0_ends_that_no_flag_marks(tmp_path, start):
    """A reset in the middle: seen by a leap of the joints, or by the pose every episode starts in."""
    rows = hopper_rows((6, 6), terminal=())
    if start:  # both poses are the start's, so that only being at rest gives it away
        poses = rows["observations"][:, :5]
        poses[:6] += np.float32([1.25, 0, 0, 0, 0]) - poses[5]
        poses[6:] += np.float32([1.25, 0, 0, 0, 0]) - poses[6]
        rows["observations"][6, 5:] = 0.001
    timeouts = np.arange(12) == 11
    buffer = import_d4rl(tmp_path, without(rows, "next_observations", timeouts=timeouts))
    following = set(zip(buffer["observations"][:, 0].tolist(), buffer["next_observations"][:, 0].tolist(), strict=True))
    assert (float(rows["observations"][5, 0]), float(rows["observations"][6, 0])) not in following
    assert 5 in buffer["episode_ends"]
    assert "end without a flag, its next observation is not in the file" in buffer.metadata["rows_dropped"]


def test_d4rl_unmarked_ends_keep_their_successor_where_the_file_has_it(tmp_path):
    rows = hopper_rows((12, 11), terminal=())
    buffer = import_d4rl(tmp_path, without(rows, timeouts=np.zeros(23, bool)))
    assert len(buffer) == 23
    assert_holds(buffer, episode_lengths=[12, 11], next_observations=rows["next_observations"])
    assert any("1 ends of episodes carry no flag" in note for note in buffer.metadata["notes"])


def test_a_reset_state_is_never_a_successor(tmp_path):
    """Files whose next_observations are only the following rows, as some tools write them."""
    rows = hopper_rows()
    rolled = np.roll(rows["observations"], -1, axis=0)
    buffer = import_d4rl(tmp_path, without(rows, next_observations=rolled))
    np.testing.assert_array_equal(buffer["episode_lengths"], [4, 2, 6])
    repeated = np.where((rows["terminals"] | rows["timeouts"])[:, None], rows["observations"], rolled)
    assert buffer.metadata["rows_dropped"] == {"end of an episode, next_observations holds another state": 3}
    buffer = import_d4rl(tmp_path, without(rows, next_observations=repeated))
    np.testing.assert_array_equal(buffer["episode_lengths"], [4, 3, 6])  # what follows a terminal does not count


def test_antmaze_is_cut_at_timeouts_and_not_at_terminals(tmp_path):
    """Whether the goal pays 1 and all else 0, or 0 and -1."""
    rows, kept = maze_rows(), np.setdiff1d(np.arange(15), [8, 14])
    file = "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse"
    buffer = import_d4rl(tmp_path, without(rows, rewards=rows["rewards"] - 1), file)
    assert buffer.metadata["reward_agreement"] == 1.0
    buffer = import_d4rl(tmp_path, rows, file)
    assert_holds(buffer, observations=rows["observations"][kept], next_observations=rows["observations"][kept + 1])
    assert_holds(buffer, terminals=rows["terminals"][kept] > 0, goals=rows["infos/goal"][kept])
    assert_holds(buffer, trajectory_ids=[0] * 8 + [1] * 5)
    assert rows["terminals"].sum() == 3
    position, after = buffer["observations"][:, :2], buffer["next_observations"][:, :2]
    np.testing.assert_array_equal(buffer["root_positions"], position)
    np.testing.assert_allclose(buffer["root_velocities"], (after - position) / 0.1, atol=1e-5)
    assert about(buffer, "dataset_name", "task", "dt") == ("antmaze-umaze-v0", "ant-maze-umaze", 0.1)
    dropped = {"timeout, its next observation is not in the file": 2}
    assert about(buffer, "rows_dropped", "reward_agreement") == (dropped, 1.0) and "notes" not in buffer.metadata


def test_antmaze_leaps_end_a_trajectory(tmp_path):
    rows = maze_rows((5, 5), near=((), ()))
    rows["observations"][5:, 0] += 8.0
    buffer = import_d4rl(tmp_path, without(rows, timeouts=np.arange(10) == 9), "antmaze-large-play-v0")
    np.testing.assert_array_equal(buffer["trajectory_ids"], [0] * 4 + [1] * 4)
    assert np.abs(buffer["root_velocities"]).max() < 5.0


def test_the_ant_with_contact_forces_is_data_without_a_task(tmp_path, capsys):
    """Gymnasium's 111 numbers: it can be imported and looked at, and a learner says with which task it can evaluate."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(3, 6, 111)).astype(np.float32)
    before, after = states[:, :-1].reshape(15, 111), states[:, 1:].reshape(15, 111)
    rows = without(hopper_rows((5, 5, 5)), "infos/action_log_probs", observations=before, next_observations=after)
    rows |= {"actions": rng.uniform(-1, 1, (15, 8)).astype(np.float32)}
    rows |= {"infos/qpos": np.zeros((15, 15), np.float32), "infos/qvel": np.zeros((15, 14), np.float32)}
    buffer = import_d4rl(tmp_path, rows, "ant_medium-v2", replay=True)
    assert about(buffer, "dataset_name", "env", "task") == ("ant-medium-v2", "d4rl-ant", None)
    assert (buffer.metadata["reference"], "notes" in buffer.metadata, len(buffer)) == ([-325.6, 3879.7], False, 15)
    assert command_line(["inspect", buffer.path]) == 0
    assert "physics: not checked: 'd4rl-ant' is none of the MuJoCo robots here" in capsys.readouterr().out
    _, task = buffers.load_task(buffer.path, None)  # it can be trained on
    said = capsys.readouterr().out
    assert (task.observation_size, task.eval_length) == (111, 0) and "names no task" in said
    assert said.strip().endswith("--task ant-v2)")  # which leaves the forces out
    refused(lambda: buffers.load_task(buffer.path, None, "ant-angle-0"), "'ant-angle-0'", "--task ant-angle-0")
    refused(lambda: import_d4rl(tmp_path, rows, "ant_medium-v2", task="ant-angle-0"), "111 observed", "--task")


@pytest.mark.parametrize("file, name", [
    ("halfcheetah_medium_expert-v2", "halfcheetah-medium-expert-v2"),
    ("walker_mixed", "walker2d-medium-replay-v0"),
    ("ant_random_expert", "ant-random-expert-v0"),
    ("hopper-full-replay-v1", "hopper-full-replay-v1"),
    ("Ant_maze_big-maze_noisy_multistart_True_multigoal_False_sparse", "antmaze-medium-play-v0"),
    ("Ant_maze_hardest-maze_noisy_multistart_True_multigoal_True_sparse_fixed", "antmaze-large-diverse-v2"),
])  # fmt: skip
def test_names_of_d4rl_files(file, name):
    assert convert_d4rl.dataset_name(f"folder/{file}.hdf5") == name


def test_a_set_that_is_not_known_needs_its_constants(tmp_path):
    rows = hopper_rows()
    refused(lambda: import_d4rl(tmp_path, rows, "mine"), "mine.hdf5", "'mine'", "--episode-length", "--name")
    buffer = import_d4rl(tmp_path, rows, "mine", episode_length=9)
    assert about(buffer, "env", "task", "dt", "episode_length") == ("d4rl/mine", None, None, 9)
    assert import_d4rl(tmp_path, rows, "mine", name="hopper-expert-v2").metadata["task"] == "hopper"
    refused(lambda: import_d4rl(tmp_path, rows, "mine", name="walker2d-expert-v2"), "observations", "--name")


def test_stray_actions_are_clipped_and_another_scale_is_refused(tmp_path):
    rows = hopper_rows((120, 80), terminal=())
    rows["actions"][7] = 1.5
    rows = without(rows, "infos/qpos")
    buffer = import_d4rl(tmp_path, rows)
    np.testing.assert_array_equal(buffer["actions"][7], [1, 1, 1])
    assert "1 rows were outside" in buffer.metadata["notes"][0]
    refused(lambda: import_d4rl(tmp_path, without(rows, actions=30 * rows["actions"])), "actions", "[-1, 1]", "divide")


def rows_with(change):
    return lambda path: write_hdf5(path, change(hopper_rows()))


def rewards_by(put):
    """The good file with something else in the place of its rewards: put(open file, another file)."""

    def write(path):
        other = write_hdf5(path.with_name("other.hdf5"), hopper_rows())
        with h5py.File(write_hdf5(path, without(hopper_rows(), "rewards")), "a") as file:
            put(file, str(other))

    return write


def with_nan(column):
    return np.where(np.arange(len(column))[:, None] == 4, np.nan, column)


def elsewhere(file, other):
    file.create_dataset("rewards", (15,), np.float32, external=[(other, 0, 60)])


def claims(path):
    with h5py.File(path, "w") as file:
        for key, width in {"observations": (11,), "actions": (3,), "rewards": (), "terminals": ()}.items():
            file.create_dataset(key, (10**9, *width), np.float32, chunks=(1024, *width))


def halved(path):
    whole = write_hdf5(path, hopper_rows()).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


HOSTILE = {  # name -> what writes the file, words of the error beside the file's name
    "missing": (rows_with(lambda r: without(r, "rewards")), "rewards", "missing"),
    "rank": (rows_with(changed("observations", lambda x: x[:, :, None])), "observations", "(15, 11, 1)"),
    "length": (rows_with(changed("actions", lambda x: x[:-1])), "actions", "14 rows"),
    "infos length": (rows_with(changed("infos/qvel", lambda x: x[:3])), "infos/qvel", "3 rows"),
    "flat goals": (rows_with(lambda r: r | {"infos/goal": r["rewards"]}), "infos/goal", "(15,)"),
    "sizes": (rows_with(changed("next_observations", lambda x: x[:, :3])), "next_observations", "(15, 3)"),
    "nan": (rows_with(changed("observations", with_nan)), "row 4"),
    "nan state": (rows_with(changed("infos/qvel", lambda x: x * np.nan)), "infos/qvel", "row 0"),
    "overflow": (rows_with(changed("rewards", lambda x: np.full(15, 1e300))), "rewards", "row 0", "float32"),
    "flags": (rows_with(changed("terminals", lambda x: np.full(15, 0.5))), "terminals", "0.5"),
    "text": (rows_with(changed("rewards", lambda x: np.full(15, b"x"))), "rewards", "not numbers"),
    "empty": (rows_with(lambda r: {key: value[:0] for key, value in r.items()}), "expected"),
    "order": (rows_with(changed("observations", lambda x: x[::-1])), "order of time"),
    "link out": (rewards_by(lambda f, other: f.update(rewards=h5py.ExternalLink(other, "rewards"))), "rewards", "link"),
    "link": (rewards_by(lambda file, _: file.update(rewards=h5py.SoftLink("/actions"))), "rewards", "link"),
    "elsewhere": (rewards_by(elsewhere), "rewards", "another file"),
    "group": (rewards_by(lambda file, _: file.create_group("rewards")), "rewards", "group"),
    "claims": (claims, "unpack"),
    "nothing": (lambda path: None, "does not exist"),
    "no hdf5": (lambda path: path.write_bytes(b"PK\x05\x06" + bytes(100)), "cannot be read as an hdf5 file"),
    "half": (halved,),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_hdf5(tmp_path, case):
    write, *words = HOSTILE[case]
    path, out = tmp_path / "hopper_medium-v2.hdf5", tmp_path / "out.npz"
    write(path)
    out.write_bytes(b"old")
    refused(lambda: convert.from_d4rl(path, out, force=True), path.name, *words)
    assert out.read_bytes() == b"old"


def test_a_d4rl_file_becomes_a_scored_policy(tmp_path, capsys):
    """What docs/data.md begins with, import and learner, on a small file and with small networks."""
    path = write_hdf5(tmp_path / "hopper_medium_replay-v2.hdf5", hopper_rows(lengths=(60,) * 6, terminal=(1,)))
    made = convert.from_d4rl(path, tmp_path / "hopper.npz", replay=False)
    small = "--hidden-sizes 16 16 --num-critics 2 --num-q-samples 2 --batch-size 16 --num-steps 2 --eval-episodes 2"
    flags = f"--dataset {made} --out {tmp_path / 'run'} --chunk 20 --num-updates 20 --eval-every 20 {small}"
    result = dac.main(runner.parse(dac.Args, flags.split(), dac.preset))
    said = capsys.readouterr().out
    assert "as published for hopper-medium-replay-v2" in said
    expected = envs.task("hopper").normalized_score(result["score"])
    assert result["normalized_score"] == pytest.approx(expected, rel=1e-4)
    assert f"normalized_score {result['normalized_score']:.2f}" in said


# --- Minari --------------------------------------------------------------------------------------


@pytest.fixture
def minari(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return pytest.importorskip("minari")


def box(size, low=-np.inf, high=np.inf):
    return Box(low, high, (size,), np.float64)


def make_minari(minari, name, episodes, observations=None, actions=None, **more):
    """A set by Minari's own tools; episodes: dictionaries of EpisodeBuffer's fields."""
    made = [minari.data_collector.EpisodeBuffer(**episode) for episode in episodes]
    spaces = {"observation_space": observations or box(3), "action_space": actions or box(2, -1, 1)}
    with pytest.warns(UserWarning):
        minari.create_dataset_from_buffers(name, buffer=made, **spaces, **more)
    return name


def edit_about(tmp_path, name, *without_keys, **changes):
    path = tmp_path / "minari" / name / "data" / "metadata.json"
    path.write_text(json.dumps(without(json.loads(path.read_text()), *without_keys, **changes)))
    return path


def plain_episodes(lengths=(4, 3), ended=("truncations", "terminations"), sizes=(3, 2), high=1.0):
    rng = np.random.default_rng(0)
    flags = lambda n, on: (np.arange(n) == n - 1) & on
    return [
        {
            "observations": rng.normal(size=(n + 1, sizes[0])),
            "actions": rng.uniform(-high, high, (n, sizes[1])),
            "rewards": rng.normal(size=n),
            "terminations": flags(n, end == "terminations"),
            "truncations": flags(n, end == "truncations"),
        }
        for n, end in zip(lengths, ended, strict=True)
    ]


def import_minari(tmp_path, name, **choices):
    out = convert.from_minari(name, tmp_path / "out.npz", force=True, **choices)
    return buffers.load(out, quiet=True, verify=True)


def test_minari_rows_of_t_plus_one_in_float64(tmp_path, minari):
    """The same rows also from formats of one folder an episode, which have no sha256, as there is no one file."""
    episodes = plain_episodes((4, 3, 2), ("truncations", "terminations", None), high=0.4)
    make = lambda name, **more: make_minari(minari, name, episodes, box(3), box(2, -0.4, 0.4), **more)
    name = make("mujoco/toy/medium-v0")
    assert import_minari(tmp_path, name).metadata["dt"] is None  # no root velocity needs it
    buffer = import_minari(tmp_path, name, dt=0.05)
    states = [episode["observations"].astype(np.float32) for episode in episodes]
    assert_holds(buffer, observations=np.concatenate([s[:-1] for s in states]))
    assert_holds(buffer, next_observations=np.concatenate([s[1:] for s in states]))
    np.testing.assert_array_equal(np.flatnonzero(buffer["terminals"]), [6])
    np.testing.assert_array_equal(np.flatnonzero(buffer["timeouts"]), [3, 8])
    actions = np.concatenate([episode["actions"] for episode in episodes])
    np.testing.assert_allclose(buffer["actions"], actions / 0.4, rtol=1e-6)  # scaled from their space
    assert buffer.metadata["dataset_name"] == "minari/mujoco/toy/medium-v0"
    assert buffer.metadata["generator"]["script"] == "minari"
    assert len(buffer.metadata["parents"][0]["sha256"]) == 64
    assert "1 episodes end without a flag" in buffer.metadata["notes"][0]
    for kind in ("arrow", "parquet"):
        found = import_minari(tmp_path, make(f"{kind}-v0", data_format=kind), dt=0.05)
        assert found.metadata["sha256"] == buffer.metadata["sha256"]
        assert found.metadata["parents"][0]["sha256"] == ""


def test_minari_knows_the_world_of_its_environment_and_is_told_the_task(tmp_path, minari, capsys):
    episodes = plain_episodes((4,), ("truncations",), sizes=(11, 3))
    name = make_minari(minari, "mujoco/hopper/medium-v0", episodes, box(11), box(3, -1, 1))
    edit_about(tmp_path, name, env_spec=gymnasium.spec("Hopper-v5").to_json())
    buffer = import_minari(tmp_path, name)
    assert about(buffer, "env", "dt", "episode_length") == ("minari/Hopper-v5", 0.008, 1000)
    assert about(buffer, "task", "reference") == (None, None)
    again = "python -m envs.buffers from-minari mujoco/hopper/medium-v0 --force --task hopper"
    assert buffers.load_task(buffer.path, None)[1].eval_length == 0
    assert f"cannot be evaluated (to evaluate, import it again: {again}" in capsys.readouterr().out
    refused(lambda: buffers.load_task(buffer.path, None, "hopper"), "task", again)
    import_minari(tmp_path, name, task="hopper", replay=False)
    assert buffers.load_task(buffer.path, None, "hopper")[1].name == "hopper"


def dict_episodes(space):
    """Two episodes of observations in such a space."""
    rng, episodes = np.random.default_rng(1), plain_episodes()

    def draw(space, rows):
        if isinstance(space, Dict):
            return {key: draw(part, rows) for key, part in space.items()}
        return rng.normal(size=(rows, *space.shape))

    return [e | {"observations": draw(space, len(e["rewards"]) + 1)} for e in episodes]


def test_minari_dicts_of_observations_and_goals(tmp_path, minari):
    space = Dict({"observation": box(4), "achieved_goal": box(2), "desired_goal": box(2)})
    episodes = [e | {"infos": {"success": np.zeros(len(e["rewards"]) + 1, bool)}} for e in dict_episodes(space)]
    name = make_minari(minari, "D4RL/antmaze/toy-v1", episodes, space)
    refused(lambda: convert.from_minari(name, tmp_path / "out.npz"), name, "achieved_goal is a place", "--dt")
    buffer = import_minari(tmp_path, name, dt=0.05)
    whole = lambda key, rows: np.concatenate([e["observations"][key][rows] for e in episodes])
    here, after = slice(None, -1), slice(1, None)
    expected = np.concatenate([whole("observation", here), whole("desired_goal", here)], axis=1)
    np.testing.assert_array_equal(buffer["observations"], expected.astype(np.float32))
    np.testing.assert_array_equal(buffer["next_observations"][:, :4], whole("observation", after).astype(np.float32))
    np.testing.assert_array_equal(buffer["goals"], whole("desired_goal", here).astype(np.float32))
    place, moved = whole("achieved_goal", here), whole("achieved_goal", after) - whole("achieved_goal", here)
    np.testing.assert_array_equal(buffer["root_positions"], place.astype(np.float32))
    np.testing.assert_allclose(buffer["root_velocities"], moved / 0.05, rtol=1e-6)
    buffer = import_minari(tmp_path, name, dt=0.05, keys=["achieved_goal", "observation"])
    expected = np.concatenate([place, whole("observation", here)], axis=1)
    np.testing.assert_array_equal(buffer["observations"], expected.astype(np.float32))
    refused(lambda: convert.from_minari(name, dt=0.05, keys=["image"]), "observations", "image", "--keys")


def test_minari_goals_in_dicts_of_dicts_are_left_alone(tmp_path, minari):
    """The kitchen's goals are a dictionary of things and places, beside a vector of observations."""
    goals = Dict({"kettle": box(7), "microwave": box(1)})
    space = Dict({"observation": box(4), "achieved_goal": goals, "desired_goal": goals})
    episodes = dict_episodes(space)
    name = make_minari(minari, "D4RL/kitchen/toy-v1", episodes, space)
    buffer = import_minari(tmp_path, name, dt=0.05)
    whole = np.concatenate([episode["observations"]["observation"][:-1] for episode in episodes])
    np.testing.assert_array_equal(buffer["observations"], whole.astype(np.float32))
    assert not {"goals", "root_positions"} & set(buffer.arrays)
    refused(lambda: convert.from_minari(name, dt=0.05, keys=["desired_goal"]), "observations", "desired_goal", "--keys")


def test_minari_reference_scores_and_seconds(tmp_path, minari):
    """The set's scores, if they are numbers; with --task that task's own, if it has some; another step noted."""
    scores = {"ref_min_score": -20.0, "ref_max_score": 3234.5, "eval_env": "CartPole-v1"}
    name = make_minari(minari, "toy-v0", plain_episodes(sizes=(4, 2)), box(4), **scores)
    reference = lambda **choices: import_minari(tmp_path, name, **choices).metadata["reference"]
    assert reference(dt=0.05) == [-20.0, 3234.5]
    known = envs.task("point-angle-0").reference
    assert reference(task="point-angle-0") == list(known)
    assert reference(task="point-angle-45") == [-20.0, 3234.5]
    assert buffers.load_task(tmp_path / "out.npz", None)[1].normalized_score(3234.5) == 100
    edit_about(tmp_path, name, ref_max_score=float("nan"), env_spec=gymnasium.spec("Hopper-v5").to_json())
    buffer = import_minari(tmp_path, name, dt=0.1)
    assert buffer.metadata["reference"] is None
    assert "a step of 'Hopper' takes 0.008 s, not 0.1 s" in buffer.metadata["notes"][0]


def test_minari_refusals(tmp_path, minari, monkeypatch):
    refused(lambda: convert.from_minari("none-v0"), "none-v0", "minari download none-v0")
    steps = plain_episodes()
    no_numbers = [episode | {"actions": np.zeros(len(episode["rewards"]), int)} for episode in steps]
    images = [episode | {"observations": np.zeros((len(episode["rewards"]) + 1, 2, 2))} for episode in steps]
    short = [steps[0] | {"observations": steps[0]["observations"][:-1]}]
    broken = [steps[0] | {"observations": steps[0]["observations"] * np.nan}]
    for name, episodes, spaces, *words in (
        ("discrete-v0", no_numbers, (box(3), Discrete(2)), "actions", "Discrete"),
        ("images-v0", images, (Box(0, 1, (2, 2)),), "observations", "(2, 2)"),
        ("short-v0", short, (), "4 rows in episode 0", "expected 5"),
        ("broken-v0", broken, (), "observations", "row 0 is not finite"),
    ):
        make_minari(minari, name, episodes, *spaces)
        refused(lambda name=name: convert.from_minari(name, dt=1.0), *words)
    edit_about(tmp_path, name, data_format="arrow")
    for package in ("pyarrow", "h5py", "minari"):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, package, None)
            refused(lambda: convert.from_minari(name, dt=1.0), f'not installed. Remedy: pip install "{package}')
    about = edit_about(tmp_path, name, "observation_space")
    refused(lambda: convert.from_minari(name, dt=1.0), "observation_space", "missing")
    about.write_text("{")
    refused(lambda: convert.from_minari(name, dt=1.0), "cannot be read as a Minari data set")


# --- OGBench -------------------------------------------------------------------------------------


def ogbench_rows(lengths=(4, 3), size=5, seed=0):
    rng = np.random.default_rng(seed)
    rows = sum(lengths) + len(lengths)
    ends = np.cumsum(np.array(lengths) + 1) - 1
    return {
        "observations": rng.normal(size=(rows, size)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (rows, 2)).astype(np.float32),
        "terminals": np.isin(np.arange(rows), ends),
        "qpos": rng.normal(size=(rows, 7)).astype(np.float32),
        "qvel": rng.normal(size=(rows, 6)).astype(np.float32),
    }


def ogbench_reader(path):
    """What OGBench's loader makes of a file, as its documentation says it, row by row."""
    with np.load(path, allow_pickle=False) as file:
        data = {key: file[key] for key in ("observations", "actions", "terminals")}
    found = []
    for i in range(len(data["terminals"]) - 1):
        if not data["terminals"][i]:
            last = bool(data["terminals"][i + 1])
            found.append((data["observations"][i], data["actions"][i], data["observations"][i + 1], last))
    return [np.array(column) for column in zip(*found, strict=True)]


def test_ogbench_rows_of_t_plus_one(tmp_path):
    rows, path = ogbench_rows(), tmp_path / "antmaze-medium-navigate-v0-val.npz"
    np.savez_compressed(path, **rows)
    buffer = buffers.load(convert.from_ogbench(path, tmp_path / "out.npz"), quiet=True, verify=True)
    keys = ("observations", "actions", "next_observations", "timeouts")
    for key, column in zip(keys, ogbench_reader(path), strict=True):
        np.testing.assert_array_equal(buffer[key], column)
    assert not buffer["terminals"].any()  # the end of a trajectory is no termination
    kept = np.array([0, 1, 2, 3, 5, 6, 7])
    np.testing.assert_array_equal(buffer["root_positions"], rows["qpos"][kept, :2])
    moved = rows["qpos"][kept + 1, :2] - rows["qpos"][kept, :2]
    np.testing.assert_allclose(buffer["root_velocities"], moved / 0.1, rtol=1e-5)
    assert about(buffer, "reward_kind", "task", "dt", "episode_length") == ("none", None, 0.1, 4)
    assert buffer.metadata["dataset_name"] == "ogbench/antmaze-medium-navigate-v0-val"


def test_ogbench_of_a_hand_whose_last_episode_is_open(tmp_path):
    """It has no root, and further arrays are left out."""
    rows, path = ogbench_rows() | {"button_states": np.ones((9, 9), np.int64)}, tmp_path / "cube-x.npz"
    rows["terminals"][-1] = False
    np.savez(path, **rows)
    buffer = buffers.load(convert.from_ogbench(path, tmp_path / "out.npz"), quiet=True)
    np.testing.assert_array_equal(buffer["episode_lengths"], [4, 3])
    assert "open" in buffer.metadata["notes"][0]
    assert set(buffer.arrays) == {*buffers.REQUIRED, *buffers.EPISODE_KEYS}


def test_ogbench_refuses_flat_files_and_other_damage(tmp_path):
    rows = ogbench_rows()
    for words, arrays in {
        ("timeouts", "no OGBench file"): rows | {"timeouts": rows["terminals"]},
        ("next_observations", "row 0", "from-arrays"): rows | {"next_observations": rows["observations"]},
        ("rewards", "no OGBench file"): rows | {"rewards": np.zeros(len(rows["terminals"]), np.float32)},  # D4RL v0
        ("terminals", "missing"): without(rows, "terminals"),
        ("observations", "no images"): rows | {"observations": rows["observations"][:, :, None]},
        ("actions", "cut short"): rows | {"actions": rows["actions"][:-1]},
        ("button_states", "(8, 9)", "9 rows"): rows | {"button_states": np.ones((8, 9), np.int64)},
        ("observations", "row 0"): rows | {"observations": rows["observations"] * np.nan},
        ("terminals", "0.5"): rows | {"terminals": rows["terminals"] * 0.5},
        ("terminals", "no row has a successor"): rows | {"terminals": rows["terminals"] | True},
        ("pickled",): rows | {"extra": np.array([{}], dtype=object)},
    }.items():
        path = tmp_path / "antmaze-x.npz"
        np.savez(path, **arrays)
        refused(lambda path=path: convert.from_ogbench(path, tmp_path / "out.npz"), path.name, *words)
    assert not (tmp_path / "out.npz").exists()


# --- there and back ------------------------------------------------------------------------------


def own_buffer(path, lengths, terminal=(), walk_on=()):
    """A buffer of ours; after the ends named in walk_on the next episode goes on where the last one stopped."""
    arrays, ends = make_arrays(lengths, state=3, terminal=terminal), np.cumsum(lengths)
    for i in set(walk_on) & set(range(len(lengths) - 1)):
        arrays["next_observations"][ends[i] - 1] = arrays["observations"][ends[i]]
    arrays["policy_ids"] = np.arange(ends[-1], dtype=np.int32)
    metadata = {
        "dataset_name": "toy", "env": "toy", "task": None, "layout": "env", "reward_kind": "task", "dt": 0.25,
        "episode_length": 7, "seed": 3, "rows_dropped": {"open episode": 2}, "warmup_transitions": 1,
    }  # fmt: skip
    buffers.save(path, arrays, metadata)
    return arrays


def assert_same(path, arrays):
    buffer = buffers.load(path, quiet=True, verify=True)
    assert set(buffer.arrays) == {*arrays, *buffers.EPISODE_KEYS}
    for key, value in arrays.items():
        assert buffer[key].dtype == value.dtype
        np.testing.assert_array_equal(buffer[key], value, err_msg=key)
    assert about(buffer, "dataset_name", "dt", "episode_length", "seed") == ("toy", 0.25, 7, 3)
    assert about(buffer, "rows_dropped", "warmup_transitions") == ({"open episode": 2}, 1)
    assert len(buffer.metadata["parents"]) == 1


EPISODES = dict(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=7), terminal=st.sets(st.integers(0, 6)))
RELAXED = hypothesis.settings(
    max_examples=15,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)


@RELAXED
@hypothesis.given(**EPISODES, walk_on=st.sets(st.integers(0, 6)))
def test_any_episodes_survive_ogbench_and_minari(tmp_path, minari, lengths, terminal, walk_on):
    """And are there what others read: OGBench's rows and Minari's episodes."""
    toy, og = tmp_path / "toy.npz", tmp_path / "og.npz"
    arrays = own_buffer(toy, lengths, terminal, walk_on)
    convert.to_ogbench(toy, og, force=True)
    assert_same(convert.from_ogbench(og, tmp_path / "back.npz", force=True), arrays)
    for key, column in zip(("observations", "actions", "next_observations"), ogbench_reader(og), strict=False):
        np.testing.assert_array_equal(column, arrays[key])
    name = f"toy{len(list(tmp_path.glob('minari/*')))}-v0"
    convert.to_minari(toy, name)
    assert_same(convert.from_minari(name, tmp_path / "back.npz", force=True), arrays)
    found = list(minari.load_dataset(name).iterate_episodes())
    assert sum(len(episode.rewards) for episode in found) == sum(lengths)
    assert all(len(episode.observations) == len(episode.rewards) + 1 for episode in found)


@hypothesis.settings(RELAXED, max_examples=25)
@hypothesis.given(**EPISODES, keep_next=st.booleans(), double=st.booleans(), both=st.booleans())
def test_any_episodes_come_from_d4rl(tmp_path, lengths, terminal, keep_next, double, both):
    """Each row that is kept has its own successor, in episodes as flagged; doubles are rounded, but not the states.

    Both flags in one row are a termination.
    """
    rows, ends = hopper_rows(lengths, terminal, dtype=np.float64 if double else np.float32), np.cumsum(lengths) - 1
    kept = [row for row in range(sum(lengths)) if keep_next or row not in ends]
    file = rows if keep_next else without(rows, "next_observations")
    file = file | {"timeouts": rows["timeouts"] | (rows["terminals"] & both)}
    if not kept:
        refused(lambda: import_d4rl(tmp_path, file), "no row has a true successor")
        return
    buffer = import_d4rl(tmp_path, file)
    for key in ("observations", "next_observations", "actions", "rewards", "terminals"):
        np.testing.assert_array_equal(buffer[key], rows[key].astype(buffer[key].dtype)[kept])
    shorter = np.array(lengths) - (not keep_next)
    np.testing.assert_array_equal(buffer["episode_lengths"], shorter[shorter > 0])
    for part, key in zip(convert_d4rl.read(tmp_path / "hopper_medium-v2.hdf5").state, ("qpos", "qvel"), strict=True):
        np.testing.assert_array_equal(part, rows[f"infos/{key}"][kept])


def test_a_walk_beyond_the_goal_stays_one_episode_elsewhere(tmp_path, minari):
    own_buffer(tmp_path / "toy.npz", (3, 2, 4), terminal={0, 1}, walk_on={0})
    convert.to_minari(tmp_path / "toy.npz", "toy-v0")
    found = list(minari.load_dataset("toy-v0").iterate_episodes())
    assert [len(episode.rewards) for episode in found] == [5, 4]
    np.testing.assert_array_equal(np.flatnonzero(found[0].terminations), [2, 4])
    convert.to_ogbench(tmp_path / "toy.npz", tmp_path / "og.npz")
    with np.load(tmp_path / "og.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(np.flatnonzero(file["terminals"]), [5, 10])
        np.testing.assert_array_equal(np.flatnonzero(file["masks"] == 0), [2, 4])
    refused(lambda: convert.to_minari(tmp_path / "toy.npz", "toy-v0"), "toy-v0", "exists already")
    refused(lambda: convert.to_ogbench(tmp_path / "toy.npz", tmp_path / "toy.npz"), "exists already")
    refused(lambda: convert.to_minari(tmp_path / "toy.npz", "no name-v0"), "no name-v0", "an id like")
    assert not (tmp_path / "minari" / "no name-v0").exists()
    buffers.load(tmp_path / "toy.npz", quiet=True, verify=True)


def test_metadata_of_strangers_is_checked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own_buffer("toy.npz", (3,))
    convert.to_ogbench("toy.npz", "og.npz")
    with np.load("og.npz", allow_pickle=False) as file:
        arrays = dict(file)

    def import_with(**changes):
        text = json.dumps(json.loads(str(arrays["udg_metadata_json"])) | changes)
        np.savez("og.npz", **arrays | {"udg_metadata_json": np.array(text)})
        return convert.from_ogbench("og.npz")

    for key, value in {"dataset_name": 3, "carried": 3, "notes": 3, "dt": "x"}.items():
        refused(lambda key=key, value=value: import_with(**{key: value}), key)
    named = import_with(dataset_name="../../x y", replay_agreement={"share": "x"}, task="nothing")
    assert named == Path("data", "..-..-x-y.npz")  # a name is no path
    assert command_line(["inspect", str(named)]) == 0


# --- against the physics -------------------------------------------------------------------------

SIMULATED = {
    "hopper": "hopper_random-v2", "halfcheetah": "halfcheetah_random-v2", "walker2d": "walker2d_random-v2",
    "ant-maze-umaze": "antmaze-umaze-v2",
}  # fmt: skip


def simulate(env, num_envs=12, num_steps=40):
    """A D4RL v2 file's columns, recorded in our own simulator under random actions."""

    def play(state, key):
        actions = jax.random.uniform(key, (num_envs, env.action_size), minval=-1.0)
        after = jax.vmap(env.step)(state, actions)
        now = state.pipeline_state
        return after, (state.obs, after.obs, actions, after.reward, after.done > 0, now.qpos, now.qvel)

    def record():
        first = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), num_envs))
        return jax.lax.scan(play, first, jax.random.split(jax.random.key(1), num_steps))[1]

    columns = [np.swapaxes(np.asarray(part), 0, 1) for part in jax.jit(record)()]
    alive = np.cumsum(columns[4], axis=1) - columns[4] == 0  # (envs, steps): up to the first fall
    keys = ("observations", "next_observations", "actions", "rewards", "terminals", "infos/qpos", "infos/qvel")
    rows = dict(zip(keys, (part[alive] for part in columns), strict=True))
    lengths = alive.sum(1)
    rows["timeouts"] = np.isin(np.arange(len(rows["rewards"])), np.cumsum(lengths) - 1) & ~rows["terminals"]
    return without(rows, "next_observations") if env.robot.maze else rows


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A function: robot -> its world, rows and file recorded there, and what their import wrote and said."""

    @functools.cache
    def make(robot):
        env, folder = envs.make(robot, backend="mujoco"), tmp_path_factory.mktemp(robot)
        rows = simulate(env)
        file = write_hdf5(folder / f"{SIMULATED[robot]}.hdf5", rows)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            out = convert.from_d4rl(file, folder / "out.npz")
        return SimpleNamespace(env=env, rows=rows, file=file, out=out, said=said.getvalue())

    return make


@pytest.mark.parametrize("robot", SIMULATED)
def test_our_own_steps_replay(imported, robot):
    """From the states in a file, by the import; and from those that the observations show."""
    found = imported(robot)
    buffer, read_off = buffers.load(found.out, quiet=True), convert.replay_agreement(found.out, found.env, rows=50)
    agreement = buffer.metadata["replay_agreement"]
    assert (agreement["share"], agreement["rows"], agreement["env"]) == (1.0, len(buffer), found.env.name)
    assert len(buffer) > convert_physics.BLOCK and "physics: 100.0 %" in found.said
    assert (read_off["share"], read_off["rows"]) == (1.0, 50)
    if robot != "ant-maze-umaze":  # in a maze it needs infos/goal
        assert buffer.metadata["reward_agreement"] == 1.0


def test_what_is_not_of_its_rows_does_not_replay(tmp_path, imported, capsys):
    """Shuffled states; those of v1 files and of another size, where the observations are the states instead."""
    hopper, path = imported("hopper"), tmp_path / "hopper_random-v1.hdf5"
    given, arrays = hopper.rows, buffers.load(hopper.out, quiet=True).arrays
    states, order = (given["infos/qpos"], given["infos/qvel"]), np.arange(len(arrays["actions"]))[::-1]
    measure = lambda states: convert_physics.measure(arrays, states, hopper.env, "task", "x.hdf5", 200)
    assert measure((states[0], states[1][order]))["share"] < convert_physics.NO_SHARE
    wide = np.concatenate([states[0], states[0][:, :1]], axis=1)
    refused(lambda: measure((wide, states[1])), "x.hdf5", "7 and 6", "--no-replay")
    for change in (
        {"infos/qpos": wide},
        {"infos/qvel": np.roll(states[1], 3, axis=0)},
        {"infos/qpos": np.roll(states[0], 3, axis=0)},
    ):
        assert convert_d4rl.read(write_hdf5(path, given | change)).state is None
    convert.from_d4rl(path, tmp_path / "out.npz")
    said = capsys.readouterr().out
    assert "physics: 100.0 %" in said and "warning" not in said
    assert "infos/qpos and infos/qvel are not the states of their rows" in said
    other = imported("halfcheetah").file
    refused(lambda: convert.replay_agreement(other, hopper.env), other.name, "qpos", "'hopper'")
    clipped = arrays | {"observations": arrays["observations"].copy()}
    clipped["observations"][:, 7] = 10.0
    found = convert.replay_agreement(buffers.Buffer(clipped, {"layout": "task"}, "x"), hopper.env)
    assert (found["share"], found["rows"]) == (None, 0)  # the velocities may be any greater ones


def test_few_steps_that_agree_are_warned_about():
    found = {"share": 0.97, "rows": 10, "median_error": 1e-6, "env": "hopper"}
    assert len(convert_physics.say(found)) == 1
    for share, word in ((0.25, "contacts"), (0.0, "hardly observations of 'hopper'")):
        line, warning = convert_physics.say(found | {"share": share})
        assert f"{100 * share:.1f} %" in line and warning.startswith("warning: ") and word in warning
    assert convert_physics.say(found | {"share": None, "rows": 0})[0].startswith("physics: not checked")


def test_a_dict_in_another_order_is_told_by_the_physics(tmp_path, imported, minari, capsys):
    """Minari's AntMaze has as many numbers as ours, but the goal where we have the position."""
    rows, sizes = imported("ant-maze-umaze").rows, {"observation": 27, "achieved_goal": 2, "desired_goal": 2}
    episodes, start = [], 0
    for end in np.flatnonzero(rows["timeouts"] | rows["terminals"]):
        whole = rows["observations"][start : end + 1].astype(np.float64)
        parts = {"observation": whole[:, 2:], "achieved_goal": whole[:, :2], "desired_goal": 0 * whole[:, :2] + 8}
        flags = np.arange(len(whole) - 1) == len(whole) - 2
        episodes.append({
            "observations": parts, "actions": rows["actions"][start:end], "rewards": rows["rewards"][start:end],
            "terminations": 0 * flags, "truncations": flags,
        })  # fmt: skip
        start = end + 1
    space = Dict({key: box(size) for key, size in sizes.items()})
    name = make_minari(minari, "D4RL/antmaze/umaze-v1", episodes, space, box(8, -1, 1))
    out = convert.from_minari(name, tmp_path / "out.npz", task="ant-maze-umaze")
    said = capsys.readouterr().out
    assert "warning: these are hardly observations of 'ant-maze-umaze'" in said and "--keys" in said
    assert command_line(["inspect", str(out)]) == 0
    assert "hardly observations" in capsys.readouterr().out
    convert.from_minari(name, out, task="ant-maze-umaze", keys=["achieved_goal", "observation"], force=True)
    said = capsys.readouterr().out
    assert "physics: 100.0 %" in said and "warning" not in said


def test_inspect_says_what_the_import_found_or_looks_itself(tmp_path, imported, capsys):
    found = buffers.load(imported("hopper").out, quiet=True)

    def inspect(**changes):
        metadata = without(found.metadata, "replay_agreement") | changes
        assert command_line(["inspect", str(buffers.save(tmp_path / "x.npz", found.arrays, metadata))]) == 0
        return capsys.readouterr().out

    stored = inspect(replay_agreement=found.metadata["replay_agreement"] | {"share": 0.5})
    assert "physics: 50.0 %" in stored and "rewards: 100.0 %" in stored and "verdict" in stored
    assert f"physics: 100.0 % of {min(512, len(found))} replayed steps" in inspect()
    for changes, words in (
        ({"env": "point", "task": "point-angle-0"}, "'point' is none of the MuJoCo robots"),
        ({"backend": "mjx"}, "recorded on 'mjx'"),
        ({"task": "nothing"}, "no environment or task is called"),
        ({"env": "walker2d", "task": "walker2d"}, "[11, 3] observed and action numbers"),
    ):
        assert f"physics: not checked: {words}" in inspect(**changes).replace('"', "")


def test_steps_of_mujoco_2_need_its_contact_margins():
    """D4RL's physics: MuJoCo 2.2.0 recordings agree where the margins are halved, and not all of them else."""
    with np.load(GOLDEN / "envs_hopper_mj220.npz", allow_pickle=False) as file:
        data = dict(file)
    observe = lambda qpos, qvel: np.concatenate([qpos[:, 1:], np.clip(qvel, -10, 10)], axis=1).astype(np.float32)
    arrays = {
        "observations": observe(data["qpos"], data["qvel"]),
        "next_observations": observe(data["next_qpos"], data["next_qvel"]),
        "actions": data["action"],
        "terminals": np.zeros(len(data["action"]), bool),
    }
    buffer = buffers.Buffer(arrays, {"layout": "task"}, "mujoco 2.2.0")
    assert convert.replay_agreement(buffer, envs.make("hopper", "mujoco", margin_scale=0.5))["share"] == 1.0
    assert convert.replay_agreement(buffer, envs.make("hopper", "mujoco", margin_scale=1.0))["share"] < 0.9


# --- from a file of others to a learner ----------------------------------------------------------


def select(path, task, folder, **flags):
    """udg_select.py on one file -> the file it writes, as a learner opens it."""
    args = udg_select.Args(buffers=(str(path),), tasks=(task,), out=str(folder), w1_points=0, **flags)
    udg_select.main(args)
    name = "all" if "all" in args.top else "top1"
    return buffers.load_task(folder / task / f"{name}.npz", None, task)


def test_from_umaze_diverse_to_a_learner(tmp_path):
    """One 1 a trajectory in the file; relabelled from the goals every row there is paid and terminal."""
    rows, kept = maze_rows(), np.setdiff1d(np.arange(15), [8, 14])
    single = (np.arange(15) == 3).astype(np.float32)
    file = "Ant_maze_u-maze_noisy_multistart_True_multigoal_True_sparse_fixed"
    buffer = import_d4rl(tmp_path, rows | {"rewards": single, "terminals": single}, file)
    assert buffer.metadata["dataset_name"] == "antmaze-umaze-diverse-v2"
    assert buffer["rewards"].sum() == 1 and buffer.metadata["reward_agreement"] < 0.95
    assert "udg_select.py --task ant-maze-umaze labels every row" in buffer.metadata["notes"][0]
    for top in ("1", "all"):
        found, task = select(buffer.path, "ant-maze-umaze", tmp_path / top, top=(top,))
        assert_holds(found, rewards=rows["rewards"][kept], terminals=rows["rewards"][kept] > 0)
        np.testing.assert_array_equal(np.flatnonzero(found["timeouts"]), [7, 12])
        assert_holds(found, observations=rows["observations"][kept], goals=rows["infos/goal"][kept])
        assert (task.name, found.metadata["reward_kind"]) == ("ant-maze-umaze", "relabelled")
    (entry,) = json.loads((tmp_path / "1/ant-maze-umaze/scores.json").read_text())["buffers"].values()
    assert (entry["episodes"], entry["score"]) == (2, 0.5)  # one of two trajectories arrives


def maze_grid(name, episodes=3):
    """An OGBench AntMaze file whose episodes pass all places around the goal, 0.5 m apart, and some elsewhere."""
    rng = np.random.default_rng(0)
    around = np.stack(np.meshgrid(*[np.arange(-0.5, 2.1, 0.5)] * 2), -1).reshape(-1, 2)
    places = np.concatenate([np.full((5, 2), -8.0), around]) + maze.position(name, *maze.find(name, "G"))
    rows = episodes * len(places)
    states = rng.normal(size=(rows, 29)).astype(np.float32)
    states[:, :2] = np.tile(places, (episodes, 1))
    actions = rng.uniform(-1, 1, (rows, 8)).astype(np.float32)
    ends = np.arange(rows) % len(places) == len(places) - 1
    return {
        "observations": states, "actions": actions, "terminals": ends, "qpos": states[:, :15], "qvel": states[:, 15:]
    }  # fmt: skip


def test_from_ogbench_to_a_learner(tmp_path, capsys):
    """Each refusal names the next command, and the last file is one to learn from."""
    path, out = tmp_path / "antmaze-medium-navigate-v0.npz", tmp_path / "out.npz"
    np.savez_compressed(path, **maze_grid("medium"))
    convert.from_ogbench(path, out)
    again = f"python -m envs.buffers from-ogbench {path.name} --force --task ant-maze-"
    refused(lambda: buffers.load_task(out, None), "reward-free", again)
    refused(lambda: select(out, "ant-maze-medium", tmp_path), "'ogbench/antmaze-medium", again + "medium")
    convert.from_ogbench(path, out, task="ant-maze-medium", replay=False, force=True)
    refused(lambda: buffers.load_task(out, None), "reward-free", f"python udg_select.py --buffers {out} --task")
    buffer, task = select(out, "ant-maze-medium", tmp_path)
    assert "no goals in the data: drawn for 3 trajectories" in capsys.readouterr().out
    ids = np.repeat(np.arange(3), len(buffer) // 3)
    goals = buffer["goals"]
    assert all(len(np.unique(goals[ids == i], axis=0)) == 1 for i in range(3))
    offset = goals - maze.position("medium", *maze.find("medium", "G"))
    assert (offset >= 0).all() and (offset <= 1.5).all()
    there = np.linalg.norm(buffer["next_observations"][:, :2] - goals, axis=1) <= 0.5
    assert_holds(buffer, rewards=there, terminals=there)
    assert all(there[ids == i].any() for i in range(3)) and not there.all()
    assert (task.name, buffer.metadata["seed"]) == ("ant-maze-medium", 0)
    convert.from_ogbench(path, out, task="ant-open", replay=False, force=True)  # the same ant, walls or not
    buffer, task = select(out, "ant-open-angle-60", tmp_path)
    assert buffer["observations"].shape[1] == 27 and not buffer["terminals"].any()
    heading = np.array([0.5, np.sqrt(0.75)])
    paid = buffer["root_velocities"] @ heading - 0.02 * np.square(buffer["actions"]).sum(1)
    np.testing.assert_allclose(buffer["rewards"], paid, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("robot", ["hopper", "walker2d", "halfcheetah"])
def test_relabelling_an_import_gives_its_own_rewards(tmp_path, imported, robot):
    out = imported(robot).out
    first, (second, _) = buffers.load(out, quiet=True), select(out, robot, tmp_path)
    np.testing.assert_allclose(second["rewards"], first["rewards"], atol=2e-5)
    for key in ("observations", "actions", "next_observations", "terminals", "timeouts"):
        np.testing.assert_array_equal(second[key], first[key])
    if robot == "halfcheetah":  # another task of its world
        third, _ = select(out, "cheetah-run", tmp_path)
        speed = np.minimum(first["root_velocities"][:, 0], 3.0) - 0.1 * np.square(first["actions"]).sum(1)
        np.testing.assert_allclose(third["rewards"], speed, atol=1e-5)
    refused(lambda: buffers.load_task(out, None, "ant-angle-0"), f"udg_select.py --buffers {out}")


# --- labels and commands -------------------------------------------------------------------------


def test_a_task_can_be_named(tmp_path):
    """Whose seconds per step are those of a set that is not known."""
    for name in ("cube-x", "mine"):
        np.savez(tmp_path / f"{name}.npz", **ogbench_rows(size=4))
        label = lambda task, name=name: convert.from_ogbench(
            tmp_path / f"{name}.npz", tmp_path / "out.npz", task=task, force=True
        )
        buffer = buffers.load(label("point-angle-60"), quiet=True)
        assert about(buffer, "env", "task", "layout", "dt") == ("point", "point-angle-60", "task", 0.1)
        assert buffer.metadata["task_options"] == {"angle_deg": 60}
    refused(lambda: label("humanoid"), "observations", "--task")
    with pytest.raises(InputError, match="no-task"):
        label("no-task")


def test_commands(tmp_path, minari, monkeypatch, capsys):
    """From each dialect and to each; nothing is written over, and a file of made-up steps is looked through."""
    monkeypatch.chdir(tmp_path)
    write_hdf5(tmp_path / "hopper_medium-v2.hdf5", hopper_rows())
    made = "data/hopper-medium-v2.npz"
    assert command_line(["from-d4rl", "hopper_medium-v2.hdf5", "--no-replay"]) == 0
    said = capsys.readouterr().out
    assert "15 transitions, 3 episodes" in said and f"python -m envs.buffers inspect {made}" in said
    assert command_line(["to-ogbench", made, "og.npz"]) == 0
    assert command_line(["from-ogbench", "og.npz", "--out", "back.npz", "--no-replay"]) == 0
    assert command_line(["to-minari", made, "udg/hopper-v0"]) == 0
    assert command_line(["from-minari", "udg/hopper-v0", "--out", "back2.npz", "--no-replay"]) == 0
    first = buffers.load(made, quiet=True)
    for name in ("back.npz", "back2.npz"):
        second = buffers.load(name, quiet=True)
        assert {key: second.metadata["sha256"][key] for key in first.arrays} == first.metadata["sha256"]
        assert second.metadata["generator"] == first.metadata["generator"]
    before = Path(made).read_bytes()
    capsys.readouterr()
    assert command_line(["from-d4rl", "hopper_medium-v2.hdf5", "--no-replay"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {made}: file: exists already")
    assert Path(made).read_bytes() == before
    assert command_line(["inspect", made]) == 0
    said = capsys.readouterr().out
    assert "rewards: 100.0 % of the checkable rows" in said and "physics: 0.0 % of 15 replayed steps" in said
