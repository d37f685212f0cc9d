"""Data in and out: every dialect on a synthetic file in its exact layout, round trips, refusals, physics."""

import json
import subprocess
import sys
from pathlib import Path

import gymnasium
import h5py
import hypothesis
import jax
import numpy as np
import pytest
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

ROOT = Path(__file__).parents[1]
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


def refused(function, *words):
    with pytest.raises(InputError) as caught:
        function()
    message = str(caught.value)
    for word in (*words, "Remedy:"):
        assert word in message, message
    assert "\n" not in message
    return message


# --- D4RL ----------------------------------------------------------------------------------------


def test_d4rl_v2_keeps_every_row(tmp_path):
    rows = hopper_rows()
    path = write_hdf5(tmp_path / "hopper_medium-v2.hdf5", rows, algorithm=np.bytes_(b"SAC"), iteration=np.int32(3))
    out = convert.from_d4rl(path, tmp_path / "out.npz", replay=False)
    buffer = buffers.load(out, quiet=True, verify=True)
    for key in ("observations", "next_observations", "actions", "rewards", "terminals", "timeouts"):
        np.testing.assert_array_equal(buffer[key], rows[key])
    np.testing.assert_array_equal(buffer["action_log_probs"], rows["infos/action_log_probs"])
    np.testing.assert_array_equal(buffer["episode_ends"], [5, 8, 15])
    about = buffer.metadata
    assert (about["dataset_name"], about["env"], about["task"]) == ("hopper-medium-v2", "hopper", "hopper")
    assert (about["layout"], about["reward_kind"], about["dt"], about["episode_length"]) == (
        "task", "task", 0.008, 1000,
    )  # fmt: skip
    assert about["generator"] == {"script": "d4rl", "flags": {"algorithm": "SAC", "iteration": 3}}
    assert about["reference"] == [-20.272305, 3234.3]
    assert about["rows_dropped"] == {}
    assert about["parents"] == [{"path": path.name, "sha256": convert.common.file_sha256(path), "taken": "15 rows"}]


def test_root_columns_hold_at_the_ends_of_episodes_too(tmp_path):
    rows, states = hopper_rows(), hopper_states((5, 3, 7))
    buffer = import_d4rl(tmp_path, rows)
    velocities = np.concatenate([np.diff(qpos[:, :2], axis=0) / HOPPER_DT for qpos, _ in states])
    np.testing.assert_allclose(buffer["root_velocities"], velocities, rtol=0, atol=2e-4)
    np.testing.assert_array_equal(buffer["root_positions"], rows["infos/qpos"][:, :2])
    assert buffer.metadata["reward_agreement"] == 1.0


def test_infos_of_another_row_make_no_root_columns(tmp_path):
    rows = hopper_rows()
    buffer = import_d4rl(tmp_path, without(rows, **{"infos/qpos": np.roll(rows["infos/qpos"], 1, axis=0)}))
    assert "root_positions" not in buffer.arrays
    assert "v1 files" in buffer.metadata["notes"][0]
    buffer = import_d4rl(tmp_path, without(rows, rewards=np.roll(rows["rewards"], 1)))
    assert "root_positions" not in buffer.arrays
    assert buffer.metadata["reward_agreement"] < 0.5


def test_d4rl_float64_replay_sets(tmp_path):
    rows = hopper_rows(dtype=np.float64)
    buffer = import_d4rl(tmp_path, rows, "hopper_medium_replay-v2")
    for key in ("observations", "next_observations", "actions", "rewards", "root_positions", "action_log_probs"):
        assert buffer[key].dtype == np.float32
    np.testing.assert_array_equal(buffer["observations"], rows["observations"].astype(np.float32))
    assert buffer.metadata["dataset_name"] == "hopper-medium-replay-v2"
    path = tmp_path / "hopper_medium_replay-v2.hdf5"
    assert convert_d4rl.read(path).state[0].dtype == np.float64


def test_d4rl_without_next_observations_drops_the_ends(tmp_path):
    rows = hopper_rows()
    buffer = import_d4rl(tmp_path, without(rows, "next_observations"))
    kept = np.setdiff1d(np.arange(15), [4, 7, 14])
    np.testing.assert_array_equal(buffer["observations"], rows["observations"][kept])
    np.testing.assert_array_equal(buffer["next_observations"], rows["next_observations"][kept])
    np.testing.assert_array_equal(buffer["episode_lengths"], [4, 2, 6])
    assert not buffer["terminals"].any()
    assert buffer.metadata["rows_dropped"] == {
        "terminal, its next observation is not in the file": 1,
        "timeout, its next observation is not in the file": 2,
    }
    assert "1 rows dropped ('terminal," in buffer.summary()


def test_d4rl_v0_has_no_timeouts_and_rewards_of_rank_two(tmp_path):
    """Three episodes: 8 steps cut at 4 and 4, 3 steps to a fall, 6 steps cut at 4; the last is open."""
    rows = hopper_rows((4, 4, 3, 4, 2), terminal=(2,))
    keys = ("next_observations", "timeouts", "infos/qpos", "infos/qvel", "infos/action_log_probs")
    rows = without(rows, *keys, rewards=rows["rewards"][:, None])
    buffer = import_d4rl(tmp_path, rows, "hopper_mixed", episode_length=4)
    np.testing.assert_array_equal(buffer["episode_lengths"], [3, 3, 2, 3, 1])
    kept = np.setdiff1d(np.arange(17), [3, 7, 10, 14, 16])
    np.testing.assert_array_equal(buffer["next_observations"], rows["observations"][kept + 1])
    np.testing.assert_array_equal(buffer["rewards"], rows["rewards"][kept, 0])
    assert buffer.metadata["dataset_name"] == "hopper-medium-replay-v0"
    assert sum(buffer.metadata["rows_dropped"].values()) == 5
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
    np.testing.assert_array_equal(buffer["episode_lengths"], [12, 11])
    np.testing.assert_array_equal(buffer["next_observations"], rows["next_observations"])
    assert "1 ends of episodes carry no flag" in buffer.metadata["notes"][0]


def test_a_reset_state_is_never_a_successor(tmp_path):
    """Files whose next_observations are only the following rows, as some tools write them."""
    rows = hopper_rows()
    rolled = np.roll(rows["observations"], -1, axis=0)
    buffer = import_d4rl(tmp_path, without(rows, next_observations=rolled))
    np.testing.assert_array_equal(buffer["episode_lengths"], [4, 2, 6])
    repeated = np.where((rows["terminals"] | rows["timeouts"])[:, None], rows["observations"], rolled)
    assert len(import_d4rl(tmp_path, without(rows, next_observations=repeated))) == 12
    assert buffer.metadata["rows_dropped"] == {"end of an episode, next_observations holds another state": 3}


def test_both_flags_in_one_row_are_a_termination(tmp_path):
    rows = hopper_rows()
    buffer = import_d4rl(tmp_path, without(rows, timeouts=rows["timeouts"] | rows["terminals"]))
    np.testing.assert_array_equal(buffer["terminals"], rows["terminals"])
    np.testing.assert_array_equal(buffer["timeouts"], rows["timeouts"])


def test_antmaze_is_cut_at_timeouts_and_not_at_terminals(tmp_path):
    rows = maze_rows()
    buffer = import_d4rl(tmp_path, rows, "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse")
    kept = np.setdiff1d(np.arange(15), [8, 14])
    np.testing.assert_array_equal(buffer["observations"], rows["observations"][kept])
    np.testing.assert_array_equal(buffer["next_observations"], rows["observations"][kept + 1])
    np.testing.assert_array_equal(buffer["terminals"], rows["terminals"][kept] > 0)
    np.testing.assert_array_equal(buffer["goals"], rows["infos/goal"][kept])
    np.testing.assert_array_equal(buffer["trajectory_ids"], [0] * 8 + [1] * 5)
    assert rows["terminals"].sum() == 3
    position, after = buffer["observations"][:, :2], buffer["next_observations"][:, :2]
    np.testing.assert_array_equal(buffer["root_positions"], position)
    np.testing.assert_allclose(buffer["root_velocities"], (after - position) / 0.1, atol=1e-5)
    about = buffer.metadata
    assert (about["dataset_name"], about["task"], about["dt"]) == ("antmaze-umaze-v0", "ant-maze-umaze", 0.1)
    assert about["rows_dropped"] == {"timeout, its next observation is not in the file": 2}
    assert about["reward_agreement"] == 1.0
    assert "notes" not in about


def test_antmaze_umaze_diverse_has_one_reward_a_trajectory(tmp_path):
    rows = maze_rows()
    single = np.arange(15) == 3
    rows |= {"rewards": single.astype(np.float32), "terminals": single.astype(np.float32)}
    buffer = import_d4rl(tmp_path, rows, "Ant_maze_u-maze_noisy_multistart_True_multigoal_True_sparse_fixed")
    assert buffer.metadata["dataset_name"] == "antmaze-umaze-diverse-v2"
    assert buffer["rewards"].sum() == 1
    assert buffer.metadata["reward_agreement"] < 0.95
    assert "umaze-diverse" in buffer.metadata["notes"][0]


def test_antmaze_rewards_shifted_by_one_agree_just_as_well(tmp_path):
    rows = maze_rows()
    buffer = import_d4rl(tmp_path, without(rows, rewards=rows["rewards"] - 1), "antmaze-umaze-v0")
    assert buffer.metadata["reward_agreement"] == 1.0


def test_antmaze_leaps_end_a_trajectory(tmp_path):
    rows = maze_rows((5, 5), near=((), ()))
    rows["observations"][5:, 0] += 8.0
    buffer = import_d4rl(tmp_path, without(rows, timeouts=np.arange(10) == 9), "antmaze-large-play-v0")
    np.testing.assert_array_equal(buffer["trajectory_ids"], [0] * 4 + [1] * 4)
    assert np.abs(buffer["root_velocities"]).max() < 5.0


def test_policy_weights_in_the_file_are_passed_over(tmp_path):
    layers = {f"policy/{name}/{key}": np.ones((3, 3)) for name in ("fc0", "last_fc") for key in ("weight", "bias")}
    words = {"policy/nonlinearity": np.bytes_(b"relu"), "policy/output_distribution": np.bytes_(b"tanh_gaussian")}
    path = write_hdf5(tmp_path / "hopper_expert-v2.hdf5", hopper_rows(), **layers, **words, algorithm=np.bytes_(b"SAC"))
    buffer = buffers.load(convert.from_d4rl(path, tmp_path / "out.npz", replay=False), quiet=True, verify=True)
    assert buffer.metadata["generator"]["flags"] == {"algorithm": "SAC"}
    assert set(buffer.arrays) == {
        *buffers.REQUIRED, *buffers.EPISODE_KEYS, "root_positions", "root_velocities", "action_log_probs",
    }  # fmt: skip


def test_log_probs_that_are_not_finite_are_left_out(tmp_path):
    rows = hopper_rows()
    rows["infos/action_log_probs"][3] = -np.inf
    buffer = import_d4rl(tmp_path, rows)
    assert "action_log_probs" not in buffer.arrays
    assert any("infos/action_log_probs is not finite" in note for note in buffer.metadata["notes"])
    np.testing.assert_array_equal(buffer["rewards"], rows["rewards"])


def test_goals_of_another_size_are_left_out(tmp_path):
    rows = maze_rows()
    rows["infos/goal"] = np.concatenate([rows["infos/goal"], np.zeros((15, 1), np.float32)], axis=1)
    buffer = import_d4rl(tmp_path, rows, "antmaze-umaze-v0")
    assert "goals" not in buffer.arrays
    assert any("infos/goal has 3 numbers" in note for note in buffer.metadata["notes"])
    assert buffer.metadata["reward_agreement"] is None
    flat = without(rows, **{"infos/goal": rows["infos/goal"][:, 0]})
    refused(lambda: import_d4rl(tmp_path, flat, "antmaze-umaze-v0"), "infos/goal", "(15,)")


def test_the_ant_with_contact_forces_is_data_without_a_task(tmp_path, capsys):
    """Gymnasium's 111 numbers: it can be imported and looked at, and a learner says at once that none fits."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(3, 6, 111)).astype(np.float32)
    before, after = states[:, :-1].reshape(15, 111), states[:, 1:].reshape(15, 111)
    rows = without(hopper_rows((5, 5, 5)), "infos/action_log_probs", observations=before, next_observations=after)
    rows |= {"actions": rng.uniform(-1, 1, (15, 8)).astype(np.float32)}
    rows |= {"infos/qpos": np.zeros((15, 15), np.float32), "infos/qvel": np.zeros((15, 14), np.float32)}
    buffer = import_d4rl(tmp_path, rows, "ant_medium-v2", replay=True)
    about = buffer.metadata
    assert (about["dataset_name"], about["env"], about["task"]) == ("ant-medium-v2", "d4rl-ant", None)
    assert (about["reference"], "notes" in about, len(buffer)) == ([-325.6, 3879.7], False, 15)
    assert command_line(["inspect", buffer.path]) == 0
    assert "physics: not checked: 'd4rl-ant' is none of the MuJoCo robots here" in capsys.readouterr().out
    refused(lambda: buffers.load_task(buffer.path, None), "names no task", "no task here has 111 observed and 8 action")
    refused(lambda: buffers.load_task(buffer.path, None, "ant-angle-0"), "'ant-angle-0'", "no task here has 111")
    refused(lambda: import_d4rl(tmp_path, rows, "ant_medium-v2", task="ant-angle-0"), "111 observed", "--task")


@pytest.mark.parametrize(
    "file, name",
    [
        ("halfcheetah_medium_expert-v2", "halfcheetah-medium-expert-v2"),
        ("walker_mixed", "walker2d-medium-replay-v0"),
        ("ant_random_expert", "ant-random-expert-v0"),
        ("hopper-full-replay-v1", "hopper-full-replay-v1"),
        ("Ant_maze_big-maze_noisy_multistart_True_multigoal_False_sparse", "antmaze-medium-play-v0"),
        ("Ant_maze_hardest-maze_noisy_multistart_True_multigoal_True_sparse_fixed", "antmaze-large-diverse-v2"),
    ],
)
def test_names_of_d4rl_files(file, name):
    assert convert_d4rl.dataset_name(f"folder/{file}.hdf5") == name


def test_a_set_that_is_not_known_needs_its_constants(tmp_path):
    rows = hopper_rows()
    refused(lambda: import_d4rl(tmp_path, rows, "mine"), "mine.hdf5", "'mine'", "--dt", "--name")
    buffer = import_d4rl(tmp_path, rows, "mine", dt=0.5, episode_length=9)
    assert (buffer.metadata["env"], buffer.metadata["task"]) == ("d4rl/mine", None)
    assert (buffer.metadata["dt"], buffer.metadata["episode_length"]) == (0.5, 9)
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


def _with_nan(column):
    return np.where(np.arange(len(column))[:, None] == 4, np.nan, column)


HOSTILE = {
    "missing": (lambda r: without(r, "rewards"), "rewards", "missing"),
    "rank": (lambda r: without(r, observations=r["observations"][:, :, None]), "observations", "(15, 11, 1)"),
    "length": (lambda r: without(r, actions=r["actions"][:-1]), "actions", "14 rows"),
    "infos length": (lambda r: without(r, **{"infos/qvel": r["infos/qvel"][:3]}), "infos/qvel", "3 rows"),
    "sizes": (lambda r: without(r, next_observations=r["actions"]), "next_observations", "(15, 3)"),
    "nan": (lambda r: without(r, observations=_with_nan(r["observations"])), "row 4"),
    "nan state": (lambda r: without(r, **{"infos/qvel": np.full((15, 6), np.nan)}), "infos/qvel", "row 0"),
    "overflow": (lambda r: without(r, rewards=np.full(15, 1e300)), "rewards", "row 0", "float32"),
    "flags": (lambda r: without(r, terminals=np.full(15, 0.5)), "terminals", "0.5"),
    "text": (lambda r: without(r, rewards=np.full(15, b"x")), "rewards", "not numbers"),
    "empty": (lambda r: {key: value[:0] for key, value in r.items()}, "expected"),
    "order": (lambda r: without(r, observations=r["observations"][::-1]), "order of time"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_hdf5(tmp_path, case):
    change, *words = HOSTILE[case]
    rows = change(hopper_rows())
    path = tmp_path / "hopper_medium-v2.hdf5"
    with h5py.File(path, "w") as file:
        for key, value in rows.items():
            file[key] = value
    (tmp_path / "out.npz").write_bytes(b"old")
    refused(lambda: convert.from_d4rl(path, tmp_path / "out.npz", force=True), path.name, *words)
    assert (tmp_path / "out.npz").read_bytes() == b"old"


def test_hdf5_that_leads_elsewhere(tmp_path):
    other = write_hdf5(tmp_path / "other.hdf5", hopper_rows())
    path = tmp_path / "hopper_medium-v2.hdf5"
    rows = hopper_rows()
    links = {"external": h5py.ExternalLink(str(other), "rewards"), "soft": h5py.SoftLink("/actions")}
    for link in links.values():
        with h5py.File(write_hdf5(path, without(rows, "rewards")), "a") as file:
            file["rewards"] = link
        refused(lambda: convert_d4rl.read(path), "rewards", "link")
    with h5py.File(write_hdf5(path, without(rows, "rewards")), "a") as file:
        file.create_dataset("rewards", (15,), np.float32, external=[(str(other), 0, 60)])
    refused(lambda: convert_d4rl.read(path), "rewards", "another file")
    with h5py.File(write_hdf5(path, without(rows, "rewards")), "a") as file:
        file.create_group("rewards")
    refused(lambda: convert_d4rl.read(path), "rewards", "group")


def test_hdf5_that_claims_more_than_it_holds(tmp_path):
    path = tmp_path / "hopper_medium-v2.hdf5"
    with h5py.File(path, "w") as file:
        for key, shape in {"observations": (10**9, 11), "actions": (10**9, 3)}.items():
            file.create_dataset(key, shape, np.float32, chunks=(1024, shape[1]))
        for key in ("rewards", "terminals"):
            file.create_dataset(key, (10**9,), np.float32, chunks=(1024,))
    refused(lambda: convert_d4rl.read(path), "unpack")


def test_files_that_are_no_hdf5(tmp_path):
    path = tmp_path / "hopper_medium-v2.hdf5"
    refused(lambda: convert_d4rl.read(path), "does not exist")
    path.write_bytes(b"PK\x05\x06" + bytes(100))
    refused(lambda: convert_d4rl.read(path), "cannot be read as an hdf5 file")
    whole = write_hdf5(path, hopper_rows()).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(lambda: convert_d4rl.read(path), path.name)


def test_an_existing_file_is_kept(tmp_path):
    path = write_hdf5(tmp_path / "hopper_medium-v2.hdf5", hopper_rows())
    (tmp_path / "out.npz").write_bytes(b"old")
    refused(lambda: convert.from_d4rl(path, tmp_path / "out.npz"), "exists already", "--force")
    assert (tmp_path / "out.npz").read_bytes() == b"old"


@pytest.mark.parametrize("package", ["h5py", "minari"])
def test_a_missing_package_is_named_with_its_command(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf'not installed. Remedy: pip install "{package}'):
        convert.common.require(package)


def test_a_d4rl_file_becomes_a_scored_policy(tmp_path, capsys):
    """What docs/data.md begins with, import and learner, on a small file and with small networks."""
    path = write_hdf5(tmp_path / "hopper_medium_replay-v2.hdf5", hopper_rows(lengths=(60,) * 6, terminal=(1,)))
    made = convert.from_d4rl(path, tmp_path / "hopper.npz", replay=False)
    small = "--hidden-sizes 16 16 --num-critics 3 --num-q-samples 2 --batch-size 16 --num-steps 3 --eval-episodes 2"
    flags = f"--dataset {made} --out {tmp_path / 'run'} --chunk 20 --num-updates 40 --eval-every 20 {small}"
    result = dac.main(runner.parse(dac.Args, flags.split(), dac.preset))
    said = capsys.readouterr().out
    assert "as published for hopper-medium-replay-v2" in said
    task = envs.task("hopper")
    assert result["normalized_score"] == pytest.approx(task.normalized_score(result["score"]), rel=1e-4)
    assert f"normalized_score {result['normalized_score']:.2f}" in said


# --- Minari --------------------------------------------------------------------------------------


@pytest.fixture
def minari(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    import minari

    return minari


def make_minari(minari, name, episodes, observation_space, action_space, **more):
    """A set by Minari's own tools; episodes: dictionaries of EpisodeBuffer's fields."""
    made = [minari.data_collector.EpisodeBuffer(**episode) for episode in episodes]
    with pytest.warns(UserWarning):
        minari.create_dataset_from_buffers(
            name, buffer=made, observation_space=observation_space, action_space=action_space, **more
        )
    return name


def box(size, low=-np.inf, high=np.inf):
    from gymnasium.spaces import Box

    return Box(low, high, (size,), np.float64)


def plain_episodes(lengths=(4, 3), ended=("truncations", "terminations"), actions=2, high=1.0):
    rng = np.random.default_rng(0)
    flags = lambda n, on: (np.arange(n) == n - 1) & on
    return [
        {
            "observations": rng.normal(size=(n + 1, 3)),
            "actions": rng.uniform(-high, high, (n, actions)),
            "rewards": rng.normal(size=n),
            "terminations": flags(n, end == "terminations"),
            "truncations": flags(n, end == "truncations"),
        }
        for n, end in zip(lengths, ended, strict=True)
    ]


def test_minari_rows_of_t_plus_one_and_float64(tmp_path, minari):
    episodes = plain_episodes((4, 3, 2), ("truncations", "terminations", None))
    name = make_minari(minari, "mujoco/toy/medium-v0", episodes, box(3), box(2, -1, 1))
    refused(lambda: convert.from_minari(name, tmp_path / "out.npz"), name, "--dt")
    buffer = buffers.load(convert.from_minari(name, tmp_path / "out.npz", dt=0.05), quiet=True, verify=True)
    states = [episode["observations"].astype(np.float32) for episode in episodes]
    np.testing.assert_array_equal(buffer["observations"], np.concatenate([s[:-1] for s in states]))
    np.testing.assert_array_equal(buffer["next_observations"], np.concatenate([s[1:] for s in states]))
    np.testing.assert_array_equal(np.flatnonzero(buffer["terminals"]), [6])
    np.testing.assert_array_equal(np.flatnonzero(buffer["timeouts"]), [3, 8])
    assert buffer.metadata["dataset_name"] == "minari/mujoco/toy/medium-v0"
    assert buffer.metadata["generator"]["script"] == "minari"
    assert len(buffer.metadata["parents"][0]["sha256"]) == 64
    assert "1 episodes end without a flag" in buffer.metadata["notes"][0]


def test_minari_knows_the_world_of_its_environment(tmp_path, minari):
    rng = np.random.default_rng(0)
    episode = plain_episodes((4,), ("truncations",), actions=3)[0] | {"observations": rng.normal(size=(5, 11))}
    name = make_minari(minari, "mujoco/hopper/medium-v0", [episode], box(11), box(3, -1, 1))
    about = tmp_path / "minari" / name / "data" / "metadata.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"env_spec": gymnasium.spec("Hopper-v5").to_json()}))
    buffer = buffers.load(convert.from_minari(name, tmp_path / "out.npz", replay=False), quiet=True)
    about = buffer.metadata
    assert (about["env"], about["dt"], about["episode_length"]) == ("minari/Hopper-v5", 0.008, 1000)
    assert (about["task"], about["reference"]) == (None, None)


def test_minari_actions_are_scaled_from_their_space(tmp_path, minari):
    episodes = plain_episodes(high=0.4)
    name = make_minari(minari, "toy-v0", episodes, box(3), box(2, -0.4, 0.4))
    buffer = buffers.load(convert.from_minari(name, tmp_path / "out.npz", dt=0.05), quiet=True)
    whole = np.concatenate([episode["actions"] for episode in episodes])
    np.testing.assert_allclose(buffer["actions"], whole / 0.4, rtol=1e-6)


def goal_set(minari):
    from gymnasium.spaces import Dict

    rng = np.random.default_rng(1)
    parts = {"observation": 4, "achieved_goal": 2, "desired_goal": 2}
    space = Dict({key: box(size) for key, size in parts.items()})
    episodes = plain_episodes()
    for episode in episodes:
        rows = len(episode["rewards"]) + 1
        episode["observations"] = {key: rng.normal(size=(rows, size)) for key, size in parts.items()}
        episode["infos"] = {"success": np.zeros(rows, bool)}
    return make_minari(minari, "D4RL/antmaze/toy-v1", episodes, space, box(2, -1, 1)), episodes


def test_minari_dict_observations_and_goals(tmp_path, minari):
    name, episodes = goal_set(minari)
    buffer = buffers.load(convert.from_minari(name, tmp_path / "out.npz", dt=0.05), quiet=True)
    whole = lambda key, rows: np.concatenate([e["observations"][key][rows] for e in episodes])
    here, after = slice(None, -1), slice(1, None)
    expected = np.concatenate([whole("observation", here), whole("desired_goal", here)], axis=1)
    np.testing.assert_array_equal(buffer["observations"], expected.astype(np.float32))
    np.testing.assert_array_equal(buffer["next_observations"][:, :4], whole("observation", after).astype(np.float32))
    np.testing.assert_array_equal(buffer["goals"], whole("desired_goal", here).astype(np.float32))
    place, moved = whole("achieved_goal", here), whole("achieved_goal", after) - whole("achieved_goal", here)
    np.testing.assert_array_equal(buffer["root_positions"], place.astype(np.float32))
    np.testing.assert_allclose(buffer["root_velocities"], moved / 0.05, rtol=1e-6)


def test_minari_parts_are_chosen_by_name(tmp_path, minari):
    name, episodes = goal_set(minari)
    keys = ["achieved_goal", "observation"]
    buffer = buffers.load(convert.from_minari(name, tmp_path / "out.npz", dt=0.05, keys=keys), quiet=True)
    first = [episodes[0]["observations"][key][0] for key in keys]
    np.testing.assert_array_equal(buffer["observations"][0], np.concatenate(first).astype(np.float32))
    refused(lambda: convert.from_minari(name, dt=0.05, keys=["image"]), "observations", "image", "--keys")


def test_minari_goals_in_dicts_of_dicts_are_left_alone(tmp_path, minari):
    """The kitchen's goals are a dictionary of things and places, beside a vector of observations."""
    from gymnasium.spaces import Dict

    goals = Dict({"kettle": box(7), "microwave": box(1)})
    space = Dict({"observation": box(4), "achieved_goal": goals, "desired_goal": goals})
    episodes = plain_episodes()
    for episode in episodes:
        rows = len(episode["rewards"]) + 1
        things = {"kettle": np.zeros((rows, 7)), "microwave": np.zeros((rows, 1))}
        here = np.random.default_rng(rows).normal(size=(rows, 4))
        episode["observations"] = {"observation": here, "achieved_goal": things, "desired_goal": things}
    name = make_minari(minari, "D4RL/kitchen/toy-v1", episodes, space, box(2, -1, 1))
    buffer = buffers.load(convert.from_minari(name, tmp_path / "out.npz", dt=0.05), quiet=True)
    whole = np.concatenate([episode["observations"]["observation"][:-1] for episode in episodes])
    np.testing.assert_array_equal(buffer["observations"], whole.astype(np.float32))
    assert not {"goals", "root_positions"} & set(buffer.arrays)
    refused(lambda: convert.from_minari(name, dt=0.05, keys=["desired_goal"]), "observations", "desired_goal", "--keys")


def test_minari_reference_scores(tmp_path, minari):
    scores = {"ref_min_score": -20.0, "ref_max_score": 3234.5, "eval_env": "CartPole-v1"}
    name = make_minari(minari, "toy-v0", plain_episodes(), box(3), box(2, -1, 1), **scores)
    buffer = buffers.load(convert.from_minari(name, tmp_path / "out.npz", dt=0.05), quiet=True)
    assert buffer.metadata["reference"] == [-20.0, 3234.5]
    episode = plain_episodes((4,), ("truncations",))[0] | {"observations": np.zeros((5, 4))}
    name = make_minari(minari, "point-v0", [episode], box(4), box(2, -1, 1), **scores)
    convert.from_minari(name, tmp_path / "task.npz", task="point-angle-0")  # judged in that task, by its scores
    expected = envs.task("point-angle-0").reference
    assert buffers.load(tmp_path / "task.npz", quiet=True).metadata["reference"] == (expected and list(expected))
    about = tmp_path / "minari" / name / "data" / "metadata.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"ref_max_score": float("nan")}))
    convert.from_minari(name, tmp_path / "out.npz", dt=0.1, force=True)
    assert buffers.load(tmp_path / "out.npz", quiet=True).metadata["reference"] is None


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_minari_in_a_folder_of_files(tmp_path, minari, kind):
    """Formats of one folder an episode, which need pyarrow: the same rows, and no sha256, as there is no one file."""
    episodes = plain_episodes((4, 3, 2), ("truncations", "terminations", None))
    plain = make_minari(minari, "plain-v0", episodes, box(3), box(2, -1, 1))
    name = make_minari(minari, f"{kind}-v0", episodes, box(3), box(2, -1, 1), data_format=kind)
    found = [
        buffers.load(convert.from_minari(each, tmp_path / "out.npz", dt=0.05, force=True), quiet=True, verify=True)
        for each in (plain, name)
    ]
    assert found[0].metadata["sha256"] == found[1].metadata["sha256"]
    assert [len(each.metadata["parents"][0]["sha256"]) for each in found] == [64, 0]


def test_minari_formats_that_need_another_package_name_it(tmp_path, minari, monkeypatch):
    name = make_minari(minari, "toy-v0", plain_episodes(), box(3), box(2, -1, 1))
    about = tmp_path / "minari" / name / "data" / "metadata.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"data_format": "arrow"}))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(lambda: convert.from_minari(name, tmp_path / "out.npz", dt=0.05), 'pip install "pyarrow"')


def test_minari_without_a_task_is_told_the_flag(tmp_path, minari):
    rng = np.random.default_rng(0)
    episode = plain_episodes((4,), ("truncations",), actions=3)[0] | {"observations": rng.normal(size=(5, 11))}
    name = make_minari(minari, "mujoco/hopper/medium-v0", [episode], box(11), box(3, -1, 1))
    out = convert.from_minari(name, tmp_path / "out.npz", dt=0.008)
    again = "python -m envs.buffers from-minari mujoco/hopper/medium-v0 --task hopper."
    refused(lambda: buffers.load_task(out, None), "names no task", again)
    refused(lambda: buffers.load_task(out, None, "hopper"), "task", again)
    convert.from_minari(name, out, task="hopper", replay=False, force=True)
    assert buffers.load_task(out, None, "hopper")[1].name == "hopper"


def test_a_set_of_another_step_is_noted(tmp_path, minari):
    episode = plain_episodes((4,), ("truncations",))[0] | {"observations": np.zeros((5, 4))}
    name = make_minari(minari, "toy-v0", [episode], box(4), box(2, -1, 1))
    about = tmp_path / "minari" / name / "data" / "metadata.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"env_spec": gymnasium.spec("Hopper-v5").to_json()}))
    buffer = buffers.load(convert.from_minari(name, tmp_path / "out.npz", task="point-angle-0"), quiet=True)
    assert "a step of 'Hopper' takes 0.008 s, not 0.1 s" in buffer.metadata["notes"][0]


def test_minari_refusals(tmp_path, minari):
    from gymnasium.spaces import Box, Discrete

    refused(lambda: convert.from_minari("none-v0"), "none-v0", "minari download none-v0")
    steps = plain_episodes()
    discrete = [episode | {"actions": np.zeros(len(episode["rewards"]), int)} for episode in steps]
    name = make_minari(minari, "discrete-v0", discrete, box(3), Discrete(2))
    refused(lambda: convert.from_minari(name, dt=1.0), "actions", "Discrete")
    images = [episode | {"observations": np.zeros((len(episode["rewards"]) + 1, 2, 2))} for episode in steps]
    name = make_minari(minari, "images-v0", images, Box(0, 1, (2, 2)), box(2, -1, 1))
    refused(lambda: convert.from_minari(name, dt=1.0), "observations", "(2, 2)")
    short = [steps[0] | {"observations": steps[0]["observations"][:-1]}]
    name = make_minari(minari, "short-v0", short, box(3), box(2, -1, 1))
    refused(lambda: convert.from_minari(name, dt=1.0), "4 rows in episode 0", "expected 5")
    broken = [steps[0] | {"observations": steps[0]["observations"] * np.nan}]
    name = make_minari(minari, "broken-v0", broken, box(3), box(2, -1, 1))
    refused(lambda: convert.from_minari(name, dt=1.0), "observations", "row 0 is not finite")
    about = tmp_path / "minari" / name / "data" / "metadata.json"
    about.write_text(json.dumps(without(json.loads(about.read_text()), "observation_space")))
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
    rows = ogbench_rows()
    path = tmp_path / "antmaze-medium-navigate-v0-val.npz"
    np.savez_compressed(path, **rows)
    buffer = buffers.load(convert.from_ogbench(path, tmp_path / "out.npz"), quiet=True, verify=True)
    observations, actions, following, last = ogbench_reader(path)
    np.testing.assert_array_equal(buffer["observations"], observations)
    np.testing.assert_array_equal(buffer["actions"], actions)
    np.testing.assert_array_equal(buffer["next_observations"], following)
    np.testing.assert_array_equal(buffer["timeouts"], last)
    assert not buffer["terminals"].any()  # the end of a trajectory is no termination
    kept = [0, 1, 2, 3, 5, 6, 7]
    np.testing.assert_array_equal(buffer["root_positions"], rows["qpos"][kept, :2])
    moved = rows["qpos"][np.array(kept) + 1, :2] - rows["qpos"][kept, :2]
    np.testing.assert_allclose(buffer["root_velocities"], moved / 0.1, rtol=1e-5)
    about = buffer.metadata
    assert (about["reward_kind"], about["task"], about["dt"], about["episode_length"]) == ("none", None, 0.1, 4)
    assert about["dataset_name"] == "ogbench/antmaze-medium-navigate-v0-val"
    with pytest.raises(InputError, match="reward-free"):
        buffers.load(tmp_path / "out.npz", quiet=True, require_rewards=True)


def test_ogbench_refuses_flat_files_and_other_damage(tmp_path):
    path, rows = tmp_path / "antmaze-x.npz", ogbench_rows()
    cases = {
        ("timeouts", "no OGBench file"): rows | {"timeouts": rows["terminals"]},
        ("next_observations", "no OGBench file"): rows | {"next_observations": rows["observations"]},
        ("rewards", "no OGBench file"): rows | {"rewards": np.zeros(len(rows["terminals"]), np.float32)},  # D4RL v0
        ("terminals", "missing"): without(rows, "terminals"),
        ("observations", "no images"): rows | {"observations": rows["observations"][:, :, None]},
        ("actions", "cut short"): rows | {"actions": rows["actions"][:-1]},
        ("observations", "row 0"): rows | {"observations": rows["observations"] * np.nan},
        ("terminals", "0.5"): rows | {"terminals": rows["terminals"] * 0.5},
        ("terminals", "no row has a successor"): rows | {"terminals": rows["terminals"] | True},
    }
    for words, arrays in cases.items():
        np.savez(path, **arrays)
        refused(lambda: convert.from_ogbench(path, tmp_path / "out.npz"), "antmaze-x.npz", *words)
    np.savez(path, **rows, extra=np.array([{}], dtype=object))
    refused(lambda: convert.from_ogbench(path), "pickled")
    np.savez(tmp_path / "mine.npz", **rows)
    refused(lambda: convert.from_ogbench(tmp_path / "mine.npz"), "'mine'", "--dt")
    assert not (tmp_path / "out.npz").exists()


def test_ogbench_further_arrays_are_left_out(tmp_path):
    rows = ogbench_rows()
    np.savez(tmp_path / "puzzle-3x3-play-v0.npz", **rows, button_states=np.ones((9, 9), np.int64))
    out = convert.from_ogbench(tmp_path / "puzzle-3x3-play-v0.npz", tmp_path / "out.npz")
    assert set(buffers.load(out, quiet=True).arrays) == {*buffers.REQUIRED, *buffers.EPISODE_KEYS}
    np.savez(tmp_path / "puzzle-3x3-play-v0.npz", **rows, button_states=np.ones((8, 9), np.int64))
    again = lambda: convert.from_ogbench(tmp_path / "puzzle-3x3-play-v0.npz", out, force=True)
    refused(again, "button_states", "(8, 9)", "9 rows")


def test_ogbench_open_last_episode(tmp_path):
    rows = ogbench_rows()
    rows["terminals"][-1] = False
    np.savez(tmp_path / "cube-x.npz", **rows)
    buffer = buffers.load(convert.from_ogbench(tmp_path / "cube-x.npz", tmp_path / "out.npz"), quiet=True)
    np.testing.assert_array_equal(buffer["episode_lengths"], [4, 3])
    assert "open" in buffer.metadata["notes"][0]
    assert "root_positions" not in buffer.arrays  # a hand has no root


# --- there and back ------------------------------------------------------------------------------


def own_buffer(path, lengths, terminal=(), walk_on=(), seed=0):
    """A buffer of ours; after the ends named in walk_on the next episode goes on where the last one stopped."""
    rng = np.random.default_rng(seed)
    states = [rng.normal(size=(n + 1, 3)).astype(np.float32) for n in lengths]
    for i in range(len(lengths) - 1):
        if i in walk_on:
            states[i][-1] = states[i + 1][0]
    rows, ends = sum(lengths), np.cumsum(lengths) - 1
    failed = np.isin(np.arange(len(lengths)), list(terminal))
    terminals, timeouts = np.zeros(rows, bool), np.zeros(rows, bool)
    terminals[ends[failed]], timeouts[ends[~failed]] = True, True
    arrays = {
        "observations": np.concatenate([s[:-1] for s in states]),
        "next_observations": np.concatenate([s[1:] for s in states]),
        "actions": rng.uniform(-1, 1, (rows, 2)).astype(np.float32),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "terminals": terminals,
        "timeouts": timeouts,
        "root_velocities": rng.normal(size=(rows, 2)).astype(np.float32),
        "policy_ids": rng.integers(0, 9, rows).astype(np.int32),
    }
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
    about = buffer.metadata
    assert (about["dataset_name"], about["dt"], about["episode_length"], about["seed"]) == ("toy", 0.25, 7, 3)
    assert about["rows_dropped"] == {"open episode": 2}
    assert len(about["parents"]) == 1
    assert about["warmup_transitions"] == 1


def through_ogbench(folder):
    convert.to_ogbench(folder / "toy.npz", folder / "og.npz", force=True)
    return convert.from_ogbench(folder / "og.npz", folder / "back.npz", force=True)


def through_minari(folder, name):
    convert.to_minari(folder / "toy.npz", name)
    return convert.from_minari(name, folder / "back.npz", force=True)


EPISODES = dict(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=7),
    terminal=st.sets(st.integers(0, 6)),
    walk_on=st.sets(st.integers(0, 6)),
)
RELAXED = hypothesis.settings(
    max_examples=25,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)


@RELAXED
@hypothesis.given(**EPISODES)
def test_any_episodes_survive_ogbench(tmp_path, lengths, terminal, walk_on):
    arrays = own_buffer(tmp_path / "toy.npz", lengths, terminal, walk_on)
    assert_same(through_ogbench(tmp_path), arrays)
    observations, actions, following, _ = ogbench_reader(tmp_path / "og.npz")
    np.testing.assert_array_equal(observations, arrays["observations"])
    np.testing.assert_array_equal(actions, arrays["actions"])
    np.testing.assert_array_equal(following, arrays["next_observations"])


@hypothesis.settings(RELAXED, max_examples=12)
@hypothesis.given(**EPISODES)
def test_any_episodes_survive_minari(tmp_path, minari, lengths, terminal, walk_on):
    arrays = own_buffer(tmp_path / "toy.npz", lengths, terminal, walk_on)
    number = len(list((tmp_path / "minari").glob("toy*"))) if (tmp_path / "minari").exists() else 0
    assert_same(through_minari(tmp_path, f"toy{number}-v0"), arrays)
    found = list(minari.load_dataset(f"toy{number}-v0").iterate_episodes())
    assert sum(len(episode.rewards) for episode in found) == sum(lengths)
    assert all(len(episode.observations) == len(episode.rewards) + 1 for episode in found)


@RELAXED
@hypothesis.given(
    lengths=EPISODES["lengths"],
    terminal=EPISODES["terminal"],
    keep_next=st.booleans(),
    double=st.booleans(),
)
def test_any_episodes_come_from_d4rl(tmp_path, lengths, terminal, keep_next, double):
    """Against a loop over the rows: each row that is kept has its own successor, in episodes as flagged."""
    rows = hopper_rows(lengths, terminal, dtype=np.float64 if double else np.float32)
    truth = rows["next_observations"].astype(np.float32)
    expected, ends = [], np.cumsum(lengths) - 1
    for row in range(sum(lengths)):
        if keep_next or row not in ends:
            expected.append(row)
    file = rows if keep_next else without(rows, "next_observations")
    if not expected:
        refused(lambda: import_d4rl(tmp_path, file), "no row has a true successor")
        return
    buffer = import_d4rl(tmp_path, file)
    np.testing.assert_array_equal(buffer["observations"], rows["observations"].astype(np.float32)[expected])
    np.testing.assert_array_equal(buffer["next_observations"], truth[expected])
    shorter = np.array(lengths) - (not keep_next)
    np.testing.assert_array_equal(buffer["episode_lengths"], shorter[shorter > 0])
    np.testing.assert_array_equal(buffer["terminals"], rows["terminals"][expected])


def test_a_walk_beyond_the_goal_stays_one_episode_elsewhere(tmp_path, minari):
    own_buffer(tmp_path / "toy.npz", (3, 2, 4), terminal=(0, 1), walk_on=(0,))
    convert.to_minari(tmp_path / "toy.npz", "toy-v0")
    found = list(minari.load_dataset("toy-v0").iterate_episodes())
    assert [len(episode.rewards) for episode in found] == [5, 4]
    np.testing.assert_array_equal(np.flatnonzero(found[0].terminations), [2, 4])
    convert.to_ogbench(tmp_path / "toy.npz", tmp_path / "og.npz")
    with np.load(tmp_path / "og.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(np.flatnonzero(file["terminals"]), [5, 10])
        np.testing.assert_array_equal(np.flatnonzero(file["masks"] == 0), [2, 4])


def test_nothing_is_written_over(tmp_path, minari):
    own_buffer(tmp_path / "toy.npz", (3,))
    convert.to_minari(tmp_path / "toy.npz", "toy-v0")
    refused(lambda: convert.to_minari(tmp_path / "toy.npz", "toy-v0"), "toy-v0", "exists already")
    refused(lambda: convert.to_ogbench(tmp_path / "toy.npz", tmp_path / "toy.npz"), "exists already")
    refused(lambda: convert.to_minari(tmp_path / "toy.npz", "no name-v0"), "no name-v0", "an id like")
    assert not (tmp_path / "minari" / "no name-v0").exists()
    buffers.load(tmp_path / "toy.npz", quiet=True, verify=True)


def test_metadata_of_strangers_is_checked(tmp_path, monkeypatch):
    own_buffer(tmp_path / "toy.npz", (3,))
    through_ogbench(tmp_path)
    with np.load(tmp_path / "og.npz", allow_pickle=False) as file:
        arrays = dict(file)
    good = json.loads(str(arrays["udg_metadata_json"]))
    for change, word in (
        ({"dataset_name": 3}, "dataset_name"),
        ({"carried": 3}, "carried"),
        ({"notes": 3}, "notes"),
        ({"dt": "x"}, "dt"),
    ):
        np.savez(tmp_path / "og.npz", **arrays | {"udg_metadata_json": np.array(json.dumps(good | change))})
        refused(lambda: convert.from_ogbench(tmp_path / "og.npz", tmp_path / "no.npz"), word)
    named = good | {"dataset_name": "../../x y", "replay_agreement": {"share": "x"}, "task": "nothing"}
    np.savez(tmp_path / "og.npz", **arrays | {"udg_metadata_json": np.array(json.dumps(named))})
    monkeypatch.chdir(tmp_path)
    assert convert.from_ogbench("og.npz") == Path("data", "..-..-x-y.npz")  # a name is no path
    assert command_line(["inspect", "data/..-..-x-y.npz"]) == 0


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
def recordings():
    found = {}
    for robot in SIMULATED:
        env = envs.make(robot, backend="mujoco")
        found[robot] = env, simulate(env)
    return found


@pytest.mark.parametrize("robot", SIMULATED)
def test_our_own_steps_replay_and_shuffled_ones_do_not(tmp_path, recordings, robot):
    env, rows = recordings[robot]
    path = write_hdf5(tmp_path / f"{SIMULATED[robot]}.hdf5", rows)
    buffer = buffers.load(convert.from_d4rl(path, tmp_path / "out.npz", env=env), quiet=True)
    agreement = buffer.metadata["replay_agreement"]
    assert (agreement["share"], agreement["rows"]) == (1.0, len(buffer))
    assert convert.replay_agreement(buffer, env)["share"] == 1.0  # states read off the observations
    state = convert_d4rl.read(path).state
    order = np.random.default_rng(0).permutation(len(buffer))
    layout = buffer.metadata["layout"]
    other = convert_physics.measure(buffer.arrays, (state[0], state[1][order]), env, layout, "other", 200)
    assert other["share"] < convert_physics.NO_SHARE
    assert convert.replay_agreement(tmp_path / "out.npz", env, rows=50)["rows"] == 50
    if robot != "ant-maze-umaze":  # in a maze it needs infos/goal
        assert buffer.metadata["reward_agreement"] == 1.0


@pytest.mark.parametrize("key", ["infos/qpos", "infos/qvel"])
def test_states_of_other_rows_are_not_replayed(tmp_path, recordings, capsys, key):
    """As v1 files have them: the observations are the states then, and the physics is not blamed."""
    rows = recordings["hopper"][1]
    path = write_hdf5(tmp_path / "hopper_random-v1.hdf5", without(rows, **{key: np.roll(rows[key], 3, axis=0)}))
    convert.from_d4rl(path, tmp_path / "out.npz")
    out = capsys.readouterr().out
    assert "physics: 100.0 %" in out and "warning" not in out
    assert "infos/qpos and infos/qvel are not the states of their rows" in out


def test_states_of_another_size(tmp_path, recordings, capsys):
    rows = recordings["hopper"][1]
    wide = np.concatenate([rows["infos/qpos"], rows["infos/qpos"][:, :1]], axis=1)
    path = write_hdf5(tmp_path / "hopper_random-v2.hdf5", without(rows, **{"infos/qpos": wide}))
    convert.from_d4rl(path, tmp_path / "out.npz")
    assert "physics: 100.0 %" in capsys.readouterr().out
    env, arrays = recordings["hopper"][0], buffers.load(tmp_path / "out.npz", quiet=True).arrays
    state = wide[: len(arrays["rewards"])], rows["infos/qvel"]
    refused(lambda: convert_physics.measure(arrays, state, env, "task", "x.hdf5"), "x.hdf5", "7 and 6", "--no-replay")


def test_a_replay_in_blocks_is_the_same(recordings, monkeypatch):
    env, rows = recordings["hopper"]
    given = rows["infos/qpos"][:50], rows["infos/qvel"][:50], rows["actions"][:50]
    whole = convert_physics._step(env, *given)
    monkeypatch.setattr(convert_physics, "BLOCK", 7)
    np.testing.assert_array_equal(convert_physics._step(env, *given), whole)


def test_few_steps_that_agree_are_warned_about(recordings):
    found = {"share": 0.97, "rows": 10, "median_error": 1e-6, "env": "hopper"}
    assert len(convert_physics.say(found)) == 1
    for share, word in ((0.25, "contacts"), (0.0, "hardly observations of 'hopper'")):
        line, warning = convert_physics.say(found | {"share": share})
        assert f"{100 * share:.1f} %" in line and warning.startswith("warning: ") and word in warning
    assert convert_physics.say(found | {"share": None, "rows": 0})[0].startswith("physics: not checked")


def test_a_dict_in_another_order_is_told_by_the_physics(tmp_path, recordings, minari, capsys):
    """Minari's AntMaze has as many numbers as ours, but the goal where we have the position."""
    from gymnasium.spaces import Dict

    rows = recordings["ant-maze-umaze"][1]
    last = np.flatnonzero(rows["timeouts"] | rows["terminals"])
    episodes, start = [], 0
    for end in last:
        whole = rows["observations"][start : end + 1]
        parts = {"observation": whole[:, 2:], "achieved_goal": whole[:, :2], "desired_goal": 0 * whole[:, :2] + 8}
        flags = np.arange(len(whole) - 1) == len(whole) - 2
        episodes.append({
            "observations": {key: part.astype(np.float64) for key, part in parts.items()},
            "actions": rows["actions"][start:end], "rewards": rows["rewards"][start:end],
            "terminations": 0 * flags, "truncations": flags,
        })  # fmt: skip
        start = end + 1
    space = Dict({"observation": box(27), "achieved_goal": box(2), "desired_goal": box(2)})
    name = make_minari(minari, "D4RL/antmaze/umaze-v1", episodes, space, box(8, -1, 1))
    out = tmp_path / "out.npz"
    convert.from_minari(name, out, task="ant-maze-umaze")
    said = capsys.readouterr().out
    assert "warning: these are hardly observations of 'ant-maze-umaze'" in said and "--keys" in said
    assert command_line(["inspect", str(out)]) == 0
    assert "hardly observations" in capsys.readouterr().out
    convert.from_minari(name, out, task="ant-maze-umaze", keys=["achieved_goal", "observation"], force=True)
    said = capsys.readouterr().out
    assert "physics: 100.0 %" in said and "warning" not in said


def test_inspect_checks_what_no_import_has(tmp_path, recordings, capsys):
    path = write_hdf5(tmp_path / "hopper_random-v2.hdf5", recordings["hopper"][1])
    out = str(convert.from_d4rl(path, tmp_path / "out.npz", replay=False))

    def inspect(**about):
        if about:
            buffer = buffers.load(out, quiet=True)
            buffers.save(tmp_path / "other.npz", buffer.arrays, buffer.metadata | about)
        capsys.readouterr()
        assert command_line(["inspect", str(tmp_path / "other.npz") if about else out]) == 0
        return capsys.readouterr().out

    assert f"physics: 100.0 % of {min(512, len(buffers.load(out)))} replayed steps" in inspect()
    for about, words in (
        ({"env": "point", "task": "point-angle-0"}, "'point' is none of the MuJoCo robots"),
        ({"backend": "mjx"}, "recorded on 'mjx'"),
        ({"task": "nothing"}, "no environment or task is called"),
        ({"env": "walker2d", "task": "walker2d"}, "[11, 3] observed and action numbers"),
    ):
        assert f"physics: not checked: {words}" in inspect(**about).replace('"', "")


def test_velocities_that_are_clipped_are_not_replayed(recordings):
    env, rows = recordings["hopper"]
    arrays = {key: rows[key] for key in ("observations", "next_observations", "actions", "terminals", "timeouts")}
    arrays["observations"] = arrays["observations"].copy()
    arrays["observations"][:, 7] = 10.0
    metadata = {"layout": "task", "reward_kind": "task"}
    found = convert.replay_agreement(buffers.Buffer(arrays, metadata, "x"), env)
    assert (found["share"], found["rows"]) == (None, 0)


def test_steps_of_mujoco_2_need_its_contact_margins():
    """D4RL's physics: MuJoCo 2.2.0 recordings agree where the margins are halved, and not all of them else."""
    with np.load(ROOT / "tests" / "golden" / "envs_hopper_mj220.npz", allow_pickle=False) as file:
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


def test_another_robot_is_refused(tmp_path, recordings):
    path = write_hdf5(tmp_path / "halfcheetah_random-v2.hdf5", recordings["halfcheetah"][1])
    refused(lambda: convert.replay_agreement(path, recordings["hopper"][0]), path.name, "qpos", "'hopper'")


def test_an_import_replays_by_itself_and_inspect_says_so(tmp_path, recordings, capsys):
    path = write_hdf5(tmp_path / "hopper_random-v2.hdf5", recordings["hopper"][1])
    convert.from_d4rl(path, tmp_path / "out.npz")
    assert "physics: 100.0 %" in capsys.readouterr().out
    assert command_line(["inspect", str(tmp_path / "out.npz")]) == 0
    out = capsys.readouterr().out
    for words in ("physics: 100.0 %", "rewards: 100.0 %", "verdict"):
        assert words in out


# --- from a file of others to a learner ----------------------------------------------------------


def select(path, task, folder, **flags):
    """udg_select.py on one file -> the file it writes, as a learner opens it."""
    args = udg_select.Args(buffers=(str(path),), tasks=(task,), out=str(folder), w1_points=0, **flags)
    udg_select.main(args)
    name = "all" if "all" in args.top else "top1"
    return buffers.load_task(folder / task / f"{name}.npz", None, task)


def test_from_umaze_diverse_to_a_learner(tmp_path):
    """One 1 a trajectory in the file; relabelled from the goals every row there is paid and terminal."""
    rows = maze_rows()
    single = (np.arange(15) == 3).astype(np.float32)
    file = "Ant_maze_u-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5"
    path = write_hdf5(tmp_path / file, rows | {"rewards": single, "terminals": single})
    out = convert.from_d4rl(path, tmp_path / "out.npz", replay=False)
    notes = buffers.load(out, quiet=True).metadata["notes"]
    assert "udg_select.py --task ant-maze-umaze labels every row" in notes[0]
    for top in ("1", "all"):
        buffer, task = select(out, "ant-maze-umaze", tmp_path / top, top=(top,))
        kept = np.setdiff1d(np.arange(15), [8, 14])
        np.testing.assert_array_equal(buffer["rewards"], rows["rewards"][kept])
        np.testing.assert_array_equal(buffer["terminals"], rows["rewards"][kept] > 0)
        np.testing.assert_array_equal(np.flatnonzero(buffer["timeouts"]), [7, 12])
        np.testing.assert_array_equal(buffer["observations"], rows["observations"][kept])
        np.testing.assert_array_equal(buffer["goals"], rows["infos/goal"][kept])
        assert (task.name, buffer.metadata["reward_kind"]) == ("ant-maze-umaze", "relabelled")
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
    again = f"python -m envs.buffers from-ogbench {path.name} --task ant-maze-"
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
    np.testing.assert_array_equal(buffer["rewards"], there)
    np.testing.assert_array_equal(buffer["terminals"], there)
    assert all(there[ids == i].any() for i in range(3)) and not there.all()
    assert (task.name, buffer.metadata["seed"]) == ("ant-maze-medium", 0)
    convert.from_ogbench(path, out, task="ant-open", replay=False, force=True)  # the same ant, walls or not
    buffer, task = select(out, "ant-open-angle-60", tmp_path)
    assert buffer["observations"].shape[1] == 27 and not buffer["terminals"].any()
    heading = np.array([0.5, np.sqrt(0.75)])
    paid = buffer["root_velocities"] @ heading - 0.02 * np.square(buffer["actions"]).sum(1)
    np.testing.assert_allclose(buffer["rewards"], paid, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("robot", ["hopper", "walker2d", "halfcheetah"])
def test_relabelling_an_import_gives_its_own_rewards(tmp_path, recordings, robot):
    path = write_hdf5(tmp_path / f"{SIMULATED[robot]}.hdf5", recordings[robot][1])
    out = convert.from_d4rl(path, tmp_path / "out.npz", replay=False)
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
    rows = ogbench_rows(size=4)
    np.savez(tmp_path / "cube-x.npz", **rows)
    out = tmp_path / "out.npz"
    convert.from_ogbench(tmp_path / "cube-x.npz", out, task="point-angle-60")
    about = buffers.load(out, quiet=True).metadata
    assert (about["env"], about["task"], about["layout"], about["dt"]) == ("point", "point-angle-60", "task", 0.1)
    assert about["task_options"] == {"angle_deg": 60}
    again = lambda task: lambda: convert.from_ogbench(tmp_path / "cube-x.npz", out, task=task, force=True)
    refused(again("humanoid"), "observations", "--task")
    np.savez(tmp_path / "mine.npz", **rows)  # whose seconds per step are those of the task
    convert.from_ogbench(tmp_path / "mine.npz", out, task="point-angle-60", force=True)
    assert buffers.load(out, quiet=True).metadata["dt"] == 0.1
    with pytest.raises(InputError, match="no-task"):
        again("no-task")()


def run(*words, cwd):
    command = [sys.executable, "-m", "envs.buffers", *map(str, words)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_commands(tmp_path, minari, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_hdf5(tmp_path / "hopper_medium-v2.hdf5", hopper_rows())
    assert command_line(["from-d4rl", "hopper_medium-v2.hdf5", "--no-replay"]) == 0
    assert "python -m envs.buffers inspect data/hopper-medium-v2.npz" in capsys.readouterr().out
    made = "data/hopper-medium-v2.npz"
    assert command_line(["to-ogbench", made, "og.npz"]) == 0
    assert command_line(["from-ogbench", "og.npz", "--out", "back.npz", "--no-replay"]) == 0
    assert command_line(["to-minari", made, "udg/hopper-v0"]) == 0
    assert command_line(["from-minari", "udg/hopper-v0", "--out", "back2.npz", "--no-replay"]) == 0
    first = buffers.load(made, quiet=True)
    for name in ("back.npz", "back2.npz"):
        second = buffers.load(name, quiet=True)
        assert {key: second.metadata["sha256"][key] for key in first.arrays} == first.metadata["sha256"]
        assert second.metadata["generator"] == first.metadata["generator"]
    capsys.readouterr()
    assert command_line(["from-d4rl", "hopper_medium-v2.hdf5", "--no-replay"]) == 2
    assert capsys.readouterr().err.startswith("error: data/hopper-medium-v2.npz: file: exists already")


def test_the_command_line_as_a_program(tmp_path):
    path = write_hdf5(tmp_path / "hopper_medium-v2.hdf5", hopper_rows())
    done = run("from-d4rl", path, "--out", "out.npz", "--no-replay", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "15 transitions, 3 episodes" in done.stdout
    done = run("inspect", "out.npz", cwd=tmp_path)
    assert done.returncode == 0
    assert "rewards: 100.0 % of the checkable rows" in done.stdout
    assert "physics: 0.0 % of 15 replayed steps" in done.stdout  # made up, and no import has looked
    done = run("from-d4rl", "none.hdf5", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "does not exist" in done.stderr
