"""Data as users bring it: plain arrays, expert data of others, and files whose flags lie. Layouts: test_convert.py."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dac
import envs
import mopo
import runner
import runner.ends
from envs import InputError, buffers
from envs.buffers import convert, raw
from envs.buffers.__main__ import main as command_line
from envs.buffers.convert import cut, reach
from envs.buffers.convert import physics as convert_physics
from runner import log
from tests.test_buffers import LABELLED, make_arrays
from tests.test_convert import about, hopper_rows, import_d4rl, ogbench_rows, refused, select, without
from tests.test_runs import assert_same_run, records_of, tiny

REAL = Path(__file__).parent / "real"
ROBOTS = ("hopper", "walker2d", "halfcheetah", "ant-maze-umaze", "ant-angle-0", "humanoid")
D4RL_FILES = {
    "hopper": "hopper_medium-v2", "walker2d": "walker2d_medium-v2", "halfcheetah": "halfcheetah_medium-v2",
    "ant-maze-umaze": "antmaze-umaze-v2",
}  # fmt: skip


# --- plain arrays --------------------------------------------------------------------------------


def plain_rows(lengths=(4, 3, 5), terminal=(1,), sizes=(3, 2), seed=0):
    """Rows as Gymnasium gives them, float64 and ints, and their true successors."""
    arrays = make_arrays(lengths, *sizes, seed=seed, terminal=terminal)
    rows = {key: arrays[key].astype(np.float64) for key in ("observations", "actions", "rewards", "next_observations")}
    return rows | {key: arrays[key].astype(np.int64) for key in ("terminals", "timeouts")}


def import_arrays(tmp_path, rows, **choices):
    out = buffers.from_arrays(rows, tmp_path / "out.npz", **{"force": True, **choices})
    return buffers.load(out, quiet=True, verify=True)


def test_a_time_limit_of_a_gymnasium_world_is_no_end(tmp_path, capsys):
    """Terminals on the step of its limit, of a world that no function tells when it ends."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(400, 3))
    ends = np.arange(400) % 200 == 199
    rows = {"observations": states, "next_observations": states + 0.1, "actions": rng.uniform(-1, 1, (400, 1))}
    rows["next_observations"][:-1][~ends[:-1]] = states[1:][~ends[:-1]]
    rows |= {"rewards": rng.normal(size=400), "terminals": ends}
    buffer = buffers.load(buffers.from_arrays(rows, tmp_path / "out.npz", task="gym:Pendulum-v1"))
    assert len(buffer) == 400 and not buffer["terminals"].any() and buffer["timeouts"].sum() == 2
    assert "shares of the range of 'gym:Pendulum-v1', -2 to 2" in capsys.readouterr().out


def test_lists_that_are_no_arrays_and_words_for_numbers_are_named(tmp_path):
    rows = {"observations": [[1.0], [2.0, 3.0]], "actions": np.zeros((2, 1))}
    with pytest.raises(envs.InputError, match=r"np\.concatenate"):
        buffers.from_arrays(rows, tmp_path / "out.npz")
    made = import_arrays(tmp_path, plain_rows() | {"discount": np.ones(12)})  # of no other layout for that
    assert "discount" not in made.arrays
    rows = plain_rows((30,)) | {"policy_ids": np.array(["a"] * 30)}
    with pytest.raises(envs.InputError, match=r"policy_ids.*give numbers"):
        buffers.from_arrays(rows, tmp_path / "out.npz")


def test_a_first_step_that_pays_nothing_is_no_reset(tmp_path):
    """In a world that is not known, without next observations: what is lost is each episode's last row alone."""
    rng, ends = np.random.default_rng(0), np.arange(400) % 50 == 49
    states = 10 * rng.normal(size=(8, 1, 3)) + np.cumsum(rng.normal(size=(8, 50, 3)), 1)
    rows = {"observations": states.reshape(400, 3), "actions": rng.uniform(-1, 1, (400, 1)), "terminals": 0 * ends}
    rows |= {"rewards": np.where(np.arange(400) % 50 == 0, 0.0, rng.normal(size=400)), "timeouts": ends}
    buffer = import_arrays(tmp_path, rows)
    assert len(buffer) == 8 * 49
    assert (buffer["rewards"] == 0).sum() == 8


def test_a_joint_that_leaps_is_no_step():
    """Further than its speeds say, by more than a step's impulses ever moved one."""
    body = reach.body_of("hopper", 11, 0.008)
    before = np.full((1, 11), 0.5)
    for speed, leaps in ((0.9 * reach.MAX_LEAP, False), (1.1 * reach.MAX_LEAP, True)):
        after = before.copy()
        after[0, body.pose[2]] += 0.008 * (0.5 + speed)  # 0.5 is the speed that it shows
        assert reach.unreachable(before, after, body) == [leaps]
    assert 10 < reach.MAX_LEAP < 50  # metres or radians a second


def test_a_dict_of_arrays_becomes_a_buffer(tmp_path, monkeypatch, capsys):
    """Whatever the dtypes and whoever's words for the flags; by the function and by the command."""
    rows = plain_rows()
    buffer = import_arrays(tmp_path, rows, name="mine")
    for key, column in rows.items():
        np.testing.assert_array_equal(buffer[key], column.astype(buffer[key].dtype))
    assert about(buffer, "dataset_name", "env", "task", "dt", "episode_length") == (
        "mine",
        "arrays/mine",
        None,
        None,
        5,
    )
    words = without(rows, "terminals", "timeouts", rewards=rows["rewards"][:, None], extra=np.zeros(12))
    words |= {"terminations": rows["terminals"] > 0, "truncations": rows["timeouts"].astype(np.float32)}
    again = import_arrays(tmp_path, words, name="mine")
    assert again.metadata["sha256"] == buffer.metadata["sha256"] and "left out: extra" in again.metadata["notes"]
    with pytest.raises(envs.InputError, match="terminations: and terminals are both in the file and mean the same"):
        import_arrays(tmp_path, words | {"terminals": rows["terminals"]})
    monkeypatch.chdir(tmp_path)
    np.savez("pendulum.npz", **rows)
    assert command_line(["from-arrays", "pendulum.npz"]) == 0
    assert buffers.read_metadata("data/pendulum.npz")["sha256"] == buffer.metadata["sha256"]
    assert command_line(["inspect", "data/pendulum.npz"]) == 0
    assert "'arrays/pendulum' is none of the MuJoCo robots" in capsys.readouterr().out


def test_next_observations_are_derived_where_episodes_allow(tmp_path):
    rows = plain_rows()
    buffer = import_arrays(tmp_path, without(rows, "next_observations"))
    kept = [0, 1, 2, 4, 5, 7, 8, 9, 10]
    for key in ("observations", "next_observations", "actions", "rewards"):
        np.testing.assert_array_equal(buffer[key], rows[key][kept].astype(np.float32))
    lost = {
        "terminal, its next observation is not in the file": 1,
        "timeout, its next observation is not in the file": 2,
    }
    assert buffer.metadata["rows_dropped"] == lost
    flat = without(rows, "next_observations", "timeouts", terminals=0 * rows["terminals"])
    refused(
        lambda: import_arrays(tmp_path, flat), "terminals", "nothing else says where episodes end", "episode_length"
    )
    assert list(import_arrays(tmp_path, flat, episode_length=4)["episode_lengths"]) == [3, 3, 3]


def test_all_problems_are_named_at_once(tmp_path):
    """Nothing is written, and what can be known of the good columns is said beside what is wrong with the others."""
    rows = plain_rows()
    wrong = without(rows, "rewards", observations=rows["observations"][:, :, None], actions=3 * rows["actions"])
    wrong |= {
        "terminals": 0.5 * rows["timeouts"],
        "timeouts": rows["timeouts"][:5],
        "next_observations": rows["rewards"],
    }
    (tmp_path / "out.npz").write_bytes(b"old")
    with pytest.raises(InputError, match=r"x\.dat: file: does not end in \.npz"):
        buffers.from_arrays(wrong, tmp_path / "x.dat")
    with pytest.raises(InputError) as caught:
        import_arrays(tmp_path, wrong, force=False, task="moon", dt=-1.0, episode_length=0)
    message = str(caught.value)
    words = ("out.npz: file: exists already", "'moon'", "rewards: is missing", "observations: has the shape (12, 3, 1)")
    words += ("actions: reach", "row 3 is 0.5", "next_observations: has the shape (12,)", "dt: is -1.0")
    words += ("episode_length: is 0", "timeouts: has 5 rows")
    assert all(word in message for word in words), message
    assert message.startswith("arrays: 10 problems. (1) ") and "\n" not in message
    assert (tmp_path / "out.npz").read_bytes() == b"old"
    for change, words in (
        ({"actions": rows["actions"][:-1]}, ("actions", "11 rows", "o[1:] its next_observations")),
        ({"rewards": np.full(12, np.nan)}, ("rewards", "row 0 is not finite")),
        ({"observations": rows["observations"] * [1, 1e30, 1]}, ("observations", "in column 1", "scale")),
        ({"rewards": np.array(["x"] * 12)}, ("rewards", "not numbers")),
        ({"next_observations": rows["observations"][:, :2]}, ("next_observations", "(12, 2)")),
        ({"valids": np.ones(12)}, ("valids", "from-ogbench")),
    ):
        refused(lambda change=change: import_arrays(tmp_path, rows | change), *words)
    dones = without(rows, "terminals", "timeouts", dones=rows["timeouts"])
    refused(lambda: import_arrays(tmp_path, dones), "terminals: is missing", "split dones")
    refused(lambda: import_arrays(tmp_path, rows, task="hopper"), "3 observed and 2 action", "or none")
    refused(lambda: buffers.from_arrays(tmp_path / "x.hdf5"), "hdf5 file", "from-d4rl")


def test_actions_on_another_scale_and_samples(tmp_path):
    rows = plain_rows()
    rows["actions"][3] = [2.0, -0.5]
    refused(lambda: import_arrays(tmp_path, rows), "reach 2, 8 % of the rows", "--clip", "--action-limit")
    buffer = import_arrays(tmp_path, rows, clip=True)
    np.testing.assert_array_equal(buffer["actions"], np.clip(rows["actions"], -1, 1).astype(np.float32))
    assert "actions of 1 rows (8 %) were outside" in buffer.metadata["notes"][0]
    buffer = import_arrays(tmp_path, rows, action_limit=2.0)
    np.testing.assert_array_equal(buffer["actions"], (rows["actions"] / 2).astype(np.float32))
    refused(lambda: import_arrays(tmp_path, rows, action_limit=0.0), "cannot be divided by 0")


def test_a_terminal_at_the_time_limit_is_one(tmp_path):
    """Where the limit is told; else it is asked about, where all episodes end alike."""
    rows = plain_rows((4, 2, 4), terminal=(0, 1, 2))
    buffer = import_arrays(tmp_path, rows, episode_length=4)
    assert list(np.flatnonzero(buffer["terminals"])) == [5] and list(np.flatnonzero(buffer["timeouts"])) == [3, 9]
    assert "2 terminals are the time limit of 4 steps: taken as timeouts" in buffer.metadata["notes"]
    apart = import_arrays(tmp_path, plain_rows((4, 4, 4), terminal=(0, 2)), episode_length=4)
    assert list(np.flatnonzero(apart["terminals"])) == [3, 11]  # the file knows a time limit from an end
    alike = import_arrays(tmp_path, plain_rows((4, 4), terminal=(0, 1)))
    assert alike["terminals"].sum() == 2 and "--episode-length 4" in alike.metadata["notes"][0]
    assert "notes" not in import_arrays(tmp_path, plain_rows((4, 5), terminal=(0, 1))).metadata


def test_a_long_log_does_not_make_long_episodes(tmp_path):
    """Evaluations are as long as the data's episodes: with a task as its own at most, unless told."""
    rows = without(make_arrays((300,), terminal=()), "root_positions")
    for choices, length in (({}, 100), ({"episode_length": 300}, 300), ({"task": None}, 300)):
        buffer = import_arrays(tmp_path, rows, **{"task": "point-angle-0", **choices})
        assert (buffer.metadata["episode_length"], len(buffer)) == (length, 300)


def test_what_flags_leave_open_or_get_wrong_is_noted(tmp_path):
    """Terminals that the task does not end at, ends that nothing marks, terminals that are all lost."""
    rows = make_arrays((50,) * 4, terminal=range(4))
    rows |= {"rewards": np.zeros(200)}  # point-angle-0 never ends
    notes = import_arrays(tmp_path, without(rows, "timeouts", "root_positions"), task="point-angle-0").metadata["notes"]
    assert "4 of 4 terminals are no end of this task" in notes[0] and "--episode-length" in notes[0], notes
    assert not any("episodes are cut" in note for note in notes)
    notes = import_arrays(tmp_path, without(plain_rows(), "timeouts", "next_observations")).metadata["notes"]
    assert "nothing says where episodes end but terminals" in notes[0] and "no terminal is left" in notes[1], notes


# --- a learner on data without a task ------------------------------------------------------------


def test_a_learner_trains_without_a_task(tmp_path, capsys):
    """It writes its policy and says that it cannot evaluate; ends that nobody knows are refused before any work."""
    made = buffers.from_arrays(plain_rows((30,) * 4), tmp_path / "mine.npz", name="m/y set")
    small = "--hidden-sizes 16 16 --num-critics 2 --num-q-samples 2 --batch-size 16 --num-steps 2 --eval-episodes 2"
    flags = f"--dataset {made} --out {tmp_path / 'run'} --chunk 20 --num-updates 20 --eval-every 20 {small}"
    result = dac.main(runner.parse(dac.Args, flags.split(), dac.preset))
    said = capsys.readouterr().out
    assert f"{made}: names no task: the policy is trained and written, but cannot be evaluated" in said
    assert "result: not evaluated" in said and set(result) == {"data_mean", "data_best"}
    with np.load(tmp_path / "run/policy.npz", allow_pickle=False) as policy:
        assert json.loads(str(policy["metadata_json"]))["task"] is None
    logged = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert "train/critic_loss" in logged[-1] and not any(key.startswith("eval/") for key in logged[-1])
    flags = f"--dataset {made} --out {tmp_path / 'no'}"
    with pytest.raises(InputError, match=r"1 terminals among 120 rows are too few; use cped\.py"):
        mopo.main(runner.parse(mopo.Args, flags.split(), mopo.preset))
    assert not (tmp_path / "no").exists()
    env = envs.make(buffers.load_task(made, None)[1])
    assert (env.observation_size, env.action_size) == (3, 2)
    refused(lambda: env.reset(None), "no world can be stepped in")


def drifting_rows(ends, episodes=40, steps=12):
    """Episodes of a point that is pushed; where `ends`, one ends beyond 1 in its first coordinate."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(episodes):
        x = rng.normal(0, 0.2, 2)
        for step in range(steps):
            action = rng.uniform(-1, 1, 2)
            after = x + 0.2 * action + [0.1, 0.0]
            over = bool(ends and after[0] > 1)
            rows.append((x, action, -abs(after[1]), after, over, step == steps - 1 and not over))
            x = after
            if over:
                break
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize("ends", [True, False])
def test_mopo_trains_without_a_task(ends, tmp_path, monkeypatch, capsys):
    """Rewards and ends are learnt. The classifier of ends is trained anew at a resume, and the run is the same."""
    monkeypatch.setattr(runner.ends, "STEPS", 300)
    made = buffers.from_arrays(drifting_rows(ends), tmp_path / "mine.npz", name="mine")
    args = tiny("mopo", dataset=str(made), out=str(tmp_path / "whole"), max_epochs=2)
    result = mopo.main(args)
    said = capsys.readouterr().out
    assert "cannot be evaluated" in said and "result: not evaluated" in said
    assert set(result) == {"data_mean", "data_best"}
    assert ("when 'data-mine' ends is learnt from its data" in said) == ends
    found = records_of(tmp_path / "whole")
    assert "train/q" in found[-1] and not any(key.startswith(("eval/", "value/")) for key in found[-1])
    with np.load(tmp_path / "whole/policy.npz", allow_pickle=False) as policy:
        assert json.loads(str(policy["metadata_json"]))["task"] is None
    if not ends:
        with pytest.raises(InputError, match="--reward known: the observations of data-mine do not tell its reward"):
            mopo.main(dataclasses.replace(args, reward="known", out=str(tmp_path / "no")))
        return
    assert sum(record.get("model/terminal", 0) for record in found) > 0
    show = log.Progress.show

    def strike(self, *rest, **more):
        show(self, *rest, **more)
        if self.label == "update":
            os.kill(os.getpid(), signal.SIGTERM)

    cut = dataclasses.replace(args, out=str(tmp_path / "cut"))
    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="stopped by SIGTERM at update 20"):
        patched.setattr(log.Progress, "show", strike)
        mopo.main(cut)
    mopo.main(dataclasses.replace(cut, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


# --- expert data of a university course ----------------------------------------------------------


def real_rows(robot):
    """The file as its owners have it."""
    with np.load(REAL / f"{robot}_expert_v4.npz", allow_pickle=False) as file:
        rows = dict(file)
    ends, last = np.flatnonzero(rows["terminals"]), rows.pop("last_observations")
    following = np.roll(rows["observations"], -1, axis=0)
    following[ends] = last
    return rows | {"next_observations": following}


@pytest.mark.parametrize(
    "robot, clipped, returns, cost, bonus",
    [("hopper", 1389, (3717, 3718), 1e-3, 1.0), ("halfcheetah", 1269, (4068, 4002), 0.1, 0.0)],
)
def test_expert_data_of_others(tmp_path, capsys, robot, clipped, returns, cost, bonus):
    """Samples that were not clipped, and a time limit called terminal; after the import the physics is theirs."""
    rows = real_rows(robot)
    refused(lambda: import_arrays(tmp_path, rows, task=robot), "actions", "outside [-1, 1]", "--clip")
    buffer = import_arrays(tmp_path, rows, task=robot, clip=True)
    said, share = capsys.readouterr().out, round(clipped / 20)
    assert f"actions of {clipped} rows ({share} %) were outside [-1, 1] and are clipped" in said
    assert "2 terminals are the time limit of 1000 steps" in said and not buffer["terminals"].any()
    np.testing.assert_array_equal(np.flatnonzero(buffer["timeouts"]), [999, 1999])
    np.testing.assert_allclose(buffer["episode_returns"], returns, atol=0.5)
    assert about(buffer, "rows_dropped", "env", "task") == ({}, envs.task(robot).env, robot)
    found = buffer.metadata["replay_agreement"]
    assert (found["share"], found["unclipped_share"]) == (1.0, 1.0) and found["largest_error"] < 1e-10
    assert found["reward_share"] < 0.5  # the file charges what the policy sampled, not what the robot received
    assert "100.0 % if the actions before clipping are charged" in said
    env, positions = envs.make(robot, "mujoco"), envs.task(robot).observation_size // 2
    obs = rows["observations"]
    qpos = np.concatenate([np.zeros((len(obs), 1)), obs[:, :positions]], axis=1)
    after, _ = convert_physics._step(env, qpos, obs[:, positions:], np.clip(rows["actions"], -1, 1).astype(float))
    paid = after[:, 0] / env.dt - cost * np.square(rows["actions"]).sum(1).astype(float) + bonus
    shown = (np.abs(obs[:, positions:]) < 10).all(1) | (robot == "halfcheetah")  # the hopper's speeds are clipped
    np.testing.assert_allclose(paid[shown], rows["rewards"][shown], rtol=0, atol=1e-6)  # their x is far from 0


# --- resets that were recorded as steps ----------------------------------------------------------


@functools.cache
def played(robot, count=5, steps=30):
    """Episodes of random actions in C MuJoCo: observations [(T + 1, S)], actions, rewards, whether it ended."""
    env, rng = envs.make(robot, "mujoco"), np.random.default_rng(0)
    noise = rng.normal if env.robot.start_normal else lambda size: rng.uniform(-1, 1, size)
    qpos = env.model.qpos0 + rng.uniform(-1, 1, (count, env.model.nq)) * env.robot.start_qpos
    qvel = env.robot.start_qvel * noise(size=(count, env.model.nv))
    task, raws, actions = (
        env.task,
        [convert_physics._raw(env, qpos, qvel)],
        rng.uniform(-1, 1, (steps, count, env.model.nu)),
    )
    for action in actions:
        qpos, qvel = convert_physics._step(env, qpos, qvel, action)
        raws.append(convert_physics._raw(env, qpos, qvel))
    raws, found = np.stack(raws, 1), []
    for i in range(count):
        ended = np.zeros(steps, bool)
        if not env.robot.maze:
            ended = np.asarray(task.terminal(envs.Transition(raws[i, :-1], None, raws[i, 1:], None, None)))
        length = int(np.argmax(ended)) + 1 if ended.any() else steps
        rewards = rng.normal(size=length) * task.has_reward * (not env.robot.maze)
        shown = np.asarray(task.observe(raws[i, : length + 1]))
        found.append((shown, actions[:length, i], rewards, bool(ended.any())))
    return found


def recorded(robot, style, given):
    """(rows as a vector environment records them, true steps that can be found in them).

    style "next-step": behind each end a row that leads to the next start, its action ignored and its reward 0;
    "same-step": none, and next_observations hold that start at each end. given: with next_observations.
    """
    rows, true, episodes = [], [], played(robot)
    for i, (obs, actions, rewards, ended) in enumerate(episodes):
        last, start = i == len(episodes) - 1, episodes[(i + 1) % len(episodes)][0][0]
        for t in range(len(actions)):
            end = t == len(actions) - 1
            seen = start if end and style == "same-step" else obs[t + 1]
            rows.append((obs[t], actions[t], rewards[t], seen, end and ended, end and not ended))
            if not end or (style == "next-step" and (given or not last)):
                true.append((obs[t], actions[t], rewards[t], obs[t + 1], end and ended))
        if style == "next-step" and not last:
            rows.append((obs[-1], -actions[0], 0.0, start, False, False))
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    columns = dict(zip(names, map(np.array, zip(*rows, strict=True)), strict=True))
    found = dict(zip(names, map(np.array, zip(*true, strict=True)), strict=False))
    return columns if given else without(columns, "next_observations"), found


def import_recorded(tmp_path, robot, columns):
    if robot in D4RL_FILES:
        return import_d4rl(tmp_path, columns, D4RL_FILES[robot])
    return import_arrays(tmp_path, columns, task=robot, replay=False)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("robot", ROBOTS)
def test_resets_are_no_steps_in_either_style_of_autoreset(tmp_path, robot, given):
    """True terminals and successors are kept, nothing else is."""
    for style in ("next-step", "same-step"):
        columns, true = recorded(robot, style, given)
        buffer = import_recorded(tmp_path, robot, columns)
        for key, values in true.items():
            np.testing.assert_array_equal(buffer[key], values.astype(buffer[key].dtype), err_msg=f"{style} {key}")
        dropped = buffer.metadata["rows_dropped"]
        if style == "next-step":
            assert dropped.pop(cut.RESET_ROW) == len(played(robot)) - 1
            assert sum(dropped.values()) == (not given)
        else:
            assert cut.RESET_ROW not in dropped and sum(dropped.values()) == len(played(robot))
        assert not reach.describe(buffer.arrays, buffer.metadata["env"], buffer.metadata["dt"], "x")


def test_no_step_leaves_a_torso_at_a_quaternion_of_another_length():
    """A reset's noise does: that tells it whatever the pose."""
    obs = np.concatenate([episode[0] for episode in played("ant")])
    body = reach.body_of("ant", obs.shape[1], 0.05)
    after = obs[1:2].copy()
    assert body.turn == 3 and not reach.unreachable(obs[1:2], after, body).any()
    after[:, 3:7] *= 1.01
    assert reach.unreachable(obs[1:2], after, body).all()
    assert reach.body_of("ant", 27, 0.05).turn == 1 and reach.body_of("d4rl-ant", 111, 0.05).turn == 1
    assert reach.body_of("ant", 20, 0.05) is None and reach.body_of("ant", 29, None) is None


def test_resets_of_a_robot_whose_timeouts_were_not_recorded(tmp_path):
    """The limit cuts, and the row behind it is still known for a reset."""
    columns, true = recorded("halfcheetah", "next-step", True)
    buffer = import_d4rl(tmp_path, without(columns, "timeouts"), D4RL_FILES["halfcheetah"], episode_length=30)
    np.testing.assert_array_equal(buffer["next_observations"], true["next_observations"].astype(np.float32))
    assert list(buffer["episode_lengths"]) == [30] * 5
    buffer = import_d4rl(
        tmp_path, without(columns, "timeouts"), D4RL_FILES["halfcheetah"]
    )  # not even the limit is known
    np.testing.assert_array_equal(buffer["next_observations"], true["next_observations"].astype(np.float32))
    assert buffer.metadata["rows_dropped"] == {cut.TELEPORT: 4}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("sparse", [False, True])
def test_resets_of_a_world_that_is_not_known(tmp_path, given, sparse):
    """They are told by rewards of 0, near as they may be; where these are common, by going further than steps do."""
    rng, rows, true, start = np.random.default_rng(0), [], [], np.zeros(2)
    for episode in range(6):
        states = start + np.cumsum(rng.normal(scale=0.1, size=(21, 2)) * (np.arange(21) > 0)[:, None], axis=0)
        start = states[-1] + [5.0 if sparse else 0.05, 0.0]
        for t in range(20):
            end = t == 19
            rows.append((states[t], 0.0 if sparse else rng.normal(), states[t + 1], end))
            true += [states[t + 1]] * (not end or given or episode < 5)
        if episode < 5:
            rows.append((states[-1], 0.0, start, False))
    names = ("observations", "rewards", "next_observations", "terminals")
    columns = dict(zip(names, map(np.array, zip(*rows, strict=True)), strict=True))
    columns["actions"] = rng.uniform(-1, 1, (len(rows), 1))
    buffer = import_arrays(tmp_path, columns if given else without(columns, "next_observations"))
    assert buffer.metadata["rows_dropped"][cut.RESET_ROW] == 5
    np.testing.assert_array_equal(buffer["next_observations"], np.float32(true))


def walked(starts, steps=20, terminal=False):
    """Episodes in the plane of an unknown world, one after the other, whose next observations are the next rows."""
    rng = np.random.default_rng(0)
    states = np.concatenate([start + np.cumsum(rng.normal(scale=0.1, size=(steps, 2)), axis=0) for start in starts])
    ends = np.arange(len(states)) % steps == steps - 1
    rows = {
        "observations": states,
        "next_observations": np.roll(states, -1, axis=0),
        "rewards": rng.normal(size=len(states)),
    }
    rows |= {
        "actions": rng.uniform(-1, 1, (len(states), 1)),
        "terminals": ends & terminal,
        "timeouts": ends & ~terminal,
    }
    return rows


@pytest.mark.parametrize("terminal", [True, False])
def test_ends_behind_which_the_data_go_on_are_kept(tmp_path, terminal):
    """A goal on the way, or a log cut into pieces: told from resets by how far they go, where no body is known."""
    log = walked([0.0], steps=200)
    log["terminals"] = np.isin(np.arange(200), [9, 10, 11, 40, 90]) & terminal
    log["timeouts"] = (np.arange(200) % 50 == 49) & ~log["terminals"]
    log["next_observations"][-1] = log["observations"][-1] + 0.1
    buffer = import_arrays(tmp_path, log)
    assert len(buffer) == 200 and buffer["terminals"].sum() == 5 * terminal and buffer.metadata["rows_dropped"] == {}
    resets = walked([0.0, 5.0, 0.0, 5.0], terminal=terminal)
    assert import_arrays(tmp_path, resets).metadata["rows_dropped"] == {cut.OTHER_STATE: 4}
    if not terminal:
        resets["terminals"][[5, 6, 7, 50]] = True  # goals on the way, beside resets
        assert import_arrays(tmp_path, resets)["terminals"].sum() == 4


def test_a_state_that_follows_itself_is_no_reset(tmp_path):
    """Absorbing states and walls. Where each cut has it and no step, it stands for a state that was not recorded."""
    for key, kept in (("terminals", 40), ("timeouts", 36)):
        rows = plain_rows((10,) * 4, range(4) if key == "terminals" else ())
        ends = rows[key] > 0
        rows["next_observations"][ends] = rows["observations"][ends]
        buffer = import_arrays(tmp_path, rows)
        assert len(buffer) == kept and buffer["terminals"].sum() == rows["terminals"].sum()
    rows["next_observations"][3] = rows["observations"][4] = rows["observations"][3]  # a wall
    assert len(import_arrays(tmp_path, rows)) == 40


def test_root_columns_of_a_robot_that_shows_its_place(tmp_path):
    """So that its data can be relabelled; columns of the user's own stay."""
    columns, _ = recorded("ant", "next-step", True)
    buffer = import_arrays(tmp_path, columns, task="ant", replay=False)
    np.testing.assert_array_equal(buffer["root_positions"], buffer["observations"][:, :2])
    moved = buffer["root_positions"] + 0.05 * buffer["root_velocities"]
    np.testing.assert_allclose(moved, buffer["next_observations"][:, :2], atol=1e-5)
    assert raw.map_buffer(buffer.path)
    own = columns | {"root_velocities": np.ones((len(columns["rewards"]), 2))}
    assert (import_arrays(tmp_path, own, task="ant", replay=False)["root_velocities"] == 1).all()


def test_inspect_names_the_rows_that_are_no_steps(tmp_path, capsys):
    """As they stand in a buffer that somebody made without a look at them."""
    columns, _ = recorded("hopper", "next-step", True)
    rows = without(columns, terminals=np.zeros(len(columns["rewards"]), bool))
    rows["timeouts"] = np.arange(len(rows["rewards"])) == len(rows["rewards"]) - 1
    rows = {key: value if value.dtype == bool else value.astype(np.float32) for key, value in rows.items()}
    metadata = LABELLED | {"env": "hopper", "task": "hopper", "dt": 0.008}
    resets = np.flatnonzero(columns["rewards"] == 0)
    assert command_line(["inspect", str(buffers.save(tmp_path / "x.npz", rows, metadata))]) == 0
    said = capsys.readouterr().out
    assert f"4 of {len(rows['rewards'])} rows are no steps of 'hopper' (rows {', '.join(map(str, resets))})" in said
    assert "lead to the start of an episode" in said
    wrong = {"share": 0.5, "rows": 10, "median_error": 1.0, "env": "hopper"}
    first = {"terminals": rows["timeouts"], "timeouts": rows["timeouts"] | (rows["rewards"] == 0)}
    found = convert_physics._where(first, np.append(resets + 1, 2))
    assert (found["place"], found["place_count"]) == ("first", 4)
    assert any("the first of their episodes" in line for line in convert_physics.say(wrong | found))


def test_antmaze_resets_next_to_where_the_last_episode_ended(tmp_path):
    """Nearer than a step goes, so that only the legs and speeds tell it; and no flag says so."""
    columns, true = recorded("ant-maze-umaze", "same-step", False)
    ends = np.flatnonzero(columns["timeouts"])[:-1]
    gap = columns["observations"][ends + 1, :2] - columns["observations"][ends, :2]
    assert np.linalg.norm(gap, axis=1).max() < 2.0
    last = np.arange(len(columns["rewards"])) == len(columns["rewards"]) - 1
    buffer = import_d4rl(tmp_path, columns | {"timeouts": last}, D4RL_FILES["ant-maze-umaze"])
    np.testing.assert_array_equal(buffer["next_observations"], true["next_observations"].astype(np.float32))


# --- OGBench's three layouts ---------------------------------------------------------------------


def test_ogbench_layouts_give_the_same_steps(tmp_path, capsys):
    """As downloaded, compact, regular; and regular without next observations, whose last steps are lost and counted."""
    raw, lengths = without(ogbench_rows((100, 50)), "qpos", "qvel"), (100, 50)
    extra = raw["terminals"]
    kept = ~extra
    compact = without(raw, terminals=extra | np.append(extra[1:], True), valids=1.0 - extra)
    regular = {key: raw[key][kept] for key in ("observations", "actions")}
    regular |= {
        "next_observations": np.roll(raw["observations"], -1, axis=0)[kept],
        "terminals": np.roll(extra, -1)[kept],
    }
    load = lambda rows: buffers.load(import_ogbench(tmp_path, rows), quiet=True)
    first = load(raw)
    assert list(first["episode_lengths"]) == list(lengths) and "notes" not in first.metadata
    for rows in (compact, regular):
        buffer = load(rows)
        assert buffer.metadata["sha256"] == first.metadata["sha256"]
        assert buffer.metadata["rows_dropped"] == {} and "notes" not in buffer.metadata
    capsys.readouterr()
    short = load(without(regular, "next_observations"))
    assert list(short["episode_lengths"]) == [99, 49]
    assert short.metadata["rows_dropped"] == {"last row of an episode, its next observation is not in the file": 2}
    assert "2 rows dropped" in capsys.readouterr().out
    assert "if every row is a step" in load(ogbench_rows((7, 9))).metadata["notes"][0]


def import_ogbench(tmp_path, rows):
    np.savez(tmp_path / "mine.npz", **rows)
    return convert.from_ogbench(tmp_path / "mine.npz", tmp_path / "out.npz", force=True)


def test_ogbench_single_tasks_have_rewards_and_masks(tmp_path):
    raw = without(ogbench_rows((100, 50)), "qpos", "qvel")
    kept, rng = ~raw["terminals"], np.random.default_rng(1)
    regular = {key: raw[key][kept] for key in ("observations", "actions")}
    regular |= {"next_observations": np.roll(raw["observations"], -1, axis=0)[kept]}
    regular |= {"terminals": np.roll(raw["terminals"], -1)[kept], "masks": (rng.uniform(size=150) > 0.1).astype(float)}
    regular["rewards"] = regular["masks"] - 1.0
    buffer = buffers.load(import_ogbench(tmp_path, regular), quiet=True)
    assert buffer.metadata["reward_kind"] == "task" and len(buffer) == 150
    np.testing.assert_array_equal(buffer["terminals"], regular["masks"] == 0)
    np.testing.assert_array_equal(buffer["rewards"], regular["rewards"].astype(np.float32))
    refused(
        lambda: import_ogbench(tmp_path, without(regular, "masks")), "rewards", "masks beside rewards", "from-arrays"
    )


# --- ExORL's folders -----------------------------------------------------------------------------


def exorl_episode(steps, ended=False, seed=0, **changes):
    """A file as URLB's replay writes it: row 0 is the reset, with an action, a reward and a discount of no meaning."""
    rng = np.random.default_rng(seed)
    rows = {
        "observation": rng.normal(size=(steps + 1, 4)).astype(np.float32),
        "action": rng.uniform(-1, 1, (steps + 1, 2)).astype(np.float32),
        "reward": rng.uniform(size=(steps + 1, 1)).astype(np.float32),
        "discount": np.ones((steps + 1, 1), np.float32),
        "physics": rng.normal(size=(steps + 1, 6)),
    }
    rows["action"][0], rows["reward"][0] = 0, 0
    rows["discount"][-1] = 0.0 if ended else 1.0
    return rows | changes


def test_exorl_folders(tmp_path, monkeypatch):
    folder = tmp_path / "walker/proto/buffer"
    folder.mkdir(parents=True)
    episodes = [exorl_episode(5, seed=0), exorl_episode(3, ended=True, seed=1), exorl_episode(4, seed=2)]
    for number, episode in zip((2, 9, 10), episodes, strict=True):  # 10 comes after 9, not after 1
        np.savez(folder / f"episode_{number}_{len(episode['reward']) - 1}.npz", **episode)
    monkeypatch.chdir(tmp_path)
    assert command_line(["from-exorl", "walker/proto", "--out", "out.npz"]) == 0
    buffer = buffers.load("out.npz", quiet=True, verify=True)
    whole = lambda key, rows: np.concatenate([episode[key][rows] for episode in episodes]).astype(np.float32)
    before, after = slice(None, -1), slice(1, None)
    np.testing.assert_array_equal(buffer["observations"], whole("observation", before))
    np.testing.assert_array_equal(buffer["next_observations"], whole("observation", after))
    np.testing.assert_array_equal(buffer["physics"], whole("physics", before))
    np.testing.assert_array_equal(buffer["actions"], whole("action", after))
    np.testing.assert_array_equal(buffer["rewards"], whole("reward", after)[:, 0])
    assert (list(np.flatnonzero(buffer["terminals"])), list(np.flatnonzero(buffer["timeouts"]))) == ([7], [4, 11])
    assert about(buffer, "dataset_name", "task", "reward_kind", "dt") == ("exorl/walker-proto", None, "task", None)
    assert buffers.load_task("out.npz", None)[1].eval_length == 0
    read = lambda **changes: (np.savez(folder / "episode_11_2.npz", **exorl_episode(2, **changes)), folder)[1]
    for changes, words in (
        ({"reward": np.zeros((2, 1))}, ("reward", "(2, 1)", "3 rows")),
        ({"observation": np.zeros((3, 9, 9, 3))}, ("observation", "no images")),
        ({"observation": np.zeros((3, 5))}, ("observation", "episode_2_5.npz")),
        ({"discount": np.array([1.0, 0.0, 1.0])}, ("discount", "row 1 of 2")),
        ({"action": np.full((3, 2), np.nan)}, ("action", "row 0 is not finite")),
    ):
        refused(lambda changes=changes: convert.from_exorl(read(**changes), "x.npz"), "episode_11_2.npz", *words)
    np.savez(folder / "episode_11_2.npz", observation=np.zeros((3, 4)))
    refused(lambda: convert.from_exorl(folder, "x.npz"), "action", "missing")
    refused(lambda: convert.from_exorl("walker", "x.npz"), "walker", "holds no episodes")
    refused(lambda: convert.from_exorl("out.npz", "x.npz"), "is no folder")
    assert not Path("x.npz").exists()


# --- limits, scales, engines ---------------------------------------------------------------------


def test_timeouts_that_are_all_false_do_not_switch_off_the_limit(tmp_path):
    rows = hopper_rows((6, 6), terminal=(1,))
    rows = without(rows, "infos/qpos", "infos/qvel", timeouts=np.zeros(12, bool))
    states = rows["observations"]
    states[6:] += (
        states[5] - states[6] + 0.008 * 0.5 * np.concatenate([states[5, 5:] + states[6, 5:], np.zeros(5)])[:11]
    )
    buffer = import_d4rl(
        tmp_path, without(hopper_rows((6, 6), terminal=(1,)), timeouts=rows["timeouts"]), episode_length=3
    )
    assert list(buffer["episode_lengths"]) == [3, 3, 3, 3]
    assert "timeouts is False in every row: episodes are cut after 3 steps" in buffer.metadata["notes"][0]
    buffer = import_d4rl(tmp_path, hopper_rows((6, 4), terminal=(1,)), episode_length=4)
    assert list(buffer["episode_lengths"]) == [6, 4]
    assert "1 episodes are longer than the 4 steps of this set, the longest 6" in buffer.metadata["notes"][0]


def test_actions_in_the_range_of_a_humanoids_motors(tmp_path, capsys):
    """Gymnasium's humanoid takes 0.4 at most, ours 1: the replay tells which scale a file has."""
    env, episodes = envs.make("humanoid", "mujoco"), played("humanoid")
    columns, true = recorded("humanoid", "next-step", True)
    assert np.isclose(env.engine.half, 0.4).all() and len(episodes) == 5
    choices = {"task": "humanoid", "replay": True}
    buffer = import_arrays(tmp_path, columns | {"actions": 0.4 * columns["actions"]}, **choices)
    np.testing.assert_allclose(buffer["actions"], true["actions"], rtol=1e-6)
    assert "actions are within 0.4, the range of the motors of 'humanoid': divided by it" in capsys.readouterr().out
    assert buffer.metadata["replay_agreement"]["share"] == 1.0
    small = columns | {"actions": np.zeros_like(columns["actions"])}
    assert "no replay tells" in " ".join(import_arrays(tmp_path, small, **choices).metadata["notes"])
    buffer = import_arrays(tmp_path, columns, **choices)
    np.testing.assert_array_equal(buffer["actions"], true["actions"].astype(np.float32))
    wrong = {"share": 0.0, "rows": 9, "median_error": 1.0, "env": "humanoid"}
    assert "--action-limit" in convert_physics.say(wrong)[-1]


def test_an_opengl_that_does_not_load_is_one_error():
    """MuJoCo's own traceback never reaches the user; without the variable all goes on."""
    program = """import os, envs
for _ in range(2):
    try:
        envs.make('hopper')
    except envs.InputError as error:
        print(error)
os.environ.pop('MUJOCO_GL')
envs.make('hopper')
print('made')"""
    clean = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=clean | {"MUJOCO_GL": "none-such"},
        timeout=120,
    )
    first, second, last = done.stdout.splitlines()
    assert first == second and first.startswith("MUJOCO_GL=none-such: MuJoCo cannot load") and "Remedy: unset" in first
    assert last == "made" and done.returncode == 0


# --- remedies ------------------------------------------------------------------------------------


def test_a_git_lfs_pointer_is_named(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    for name, read in {
        "hopper_medium-v2.hdf5": convert.from_d4rl, "x.npz": buffers.load, "y.npz": convert.from_ogbench,
        "z.npz": buffers.from_arrays,
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(pointer)
        refused(lambda read=read, name=name: read(tmp_path / name), name, "Git LFS pointer", "git lfs pull")


def test_a_name_that_begins_like_d4rls_does_not_forbid_its_own_constants(tmp_path):
    rows = without(hopper_rows(), "infos/qpos", "infos/qvel", "infos/action_log_probs")
    refused(lambda: import_d4rl(tmp_path, rows, "ant-mine"), "ant has (111, 8)", "--name", "--episode-length")
    buffer = import_d4rl(tmp_path, rows, "ant-mine", dt=0.02, episode_length=9)
    assert about(buffer, "env", "task", "dt") == ("d4rl/ant-mine", None, 0.02)


def test_an_older_minari_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    (tmp_path / "old-v0/data").mkdir(parents=True)
    (tmp_path / "old-v0/data/main_data.hdf5").write_bytes(b"x")
    refused(lambda: convert.from_minari("old-v0"), "older Minari", "minari download old-v0 --force")


def test_a_column_that_an_import_lacks_has_a_remedy_that_helps(tmp_path):
    """No file of others can be recorded again; and no root column makes a task of 99 numbers."""
    rows = without(hopper_rows(), "infos/qpos", "infos/qvel")
    buffer = import_d4rl(tmp_path, rows)
    for key, words in (("root_positions", "Rewards of a task"), ("goals", "use other data")):
        refused(lambda key=key: buffer[key], key, words)
        refused(lambda key=key: buffers.load(buffer.path, keys=[key]), key, words)
    own = buffers.save(tmp_path / "own.npz", without(make_arrays(), "root_positions"), LABELLED)
    refused(lambda: buffers.load(own, quiet=True)["root_positions"], "record this column where the buffer is made")
    rng = np.random.default_rng(0)
    wide = without(rows, observations=rng.normal(size=(15, 99)), actions=rng.uniform(-1, 1, (15, 8)))
    wide = without(wide, "next_observations", "infos/action_log_probs")
    with np.errstate(all="ignore"):
        path = import_arrays(tmp_path, wide, name="ant-own").path
    refused(lambda: select(path, "ant-angle-0", tmp_path), "no task pays 'arrays/ant-own'", "no task here has 99")
    for sizes, remedy in (((3, 2), "Remedy: use other data: no task"), ((11, 3), "arrays, force=True, task='hopper'")):
        unpaid = plain_rows(sizes=sizes) | {"rewards": np.zeros(12)}  # a dict, so that there is no file
        refused(lambda unpaid=unpaid: buffers.load_task(import_arrays(tmp_path, unpaid).path, None), "are zero", remedy)


def test_another_dt_is_named_as_the_cause(tmp_path, capsys):
    """A step takes 0.1 s in the task that is named, and took 0.05 s where the file was recorded."""
    columns, _ = recorded("ant", "next-step", True)  # as many numbers as the maze's ant has
    columns["rewards"] = np.ones(len(columns["rewards"]))
    buffer = import_arrays(tmp_path, columns, task="ant-open", replay=True)
    said = capsys.readouterr().out
    assert "poses follow speeds by 0.05" in said and "another dt" in said and "another order" not in said
    assert command_line(["inspect", buffer.path]) == 0
    assert "another dt" in capsys.readouterr().out


def test_rewards_without_walls_need_no_goal(tmp_path):
    """They are compared on the maze's ant in the open, too."""
    columns, _ = recorded("ant-open-angle-0", "next-step", True)
    found = import_arrays(tmp_path, columns, task="ant-open-angle-0", replay=True).metadata["replay_agreement"]
    assert found["share"] == 1.0 and found["reward_share"] < 0.1  # they are random there


# --- the writer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["rewards", "observations", "root_positions"])
def test_the_writer_names_the_column_that_is_not_finite_or_too_large(tmp_path, key):
    for value, words in ((np.nan, "nan"), (np.inf, "inf"), (1e30, "1e+30")):
        arrays = make_arrays()
        arrays[key][(3, 1)[: arrays[key].ndim] if arrays[key].ndim > 1 else 3] = value
        refused(lambda arrays=arrays: buffers.save(tmp_path / "x.npz", arrays, LABELLED), f"{key}: row 3", words)
    arrays = make_arrays()
    arrays["observations"][3, 1] = -1e30
    refused(lambda: buffers.save(tmp_path / "x.npz", arrays, LABELLED), "observations: row 3 has -1e+30 in column 1")
    assert not list(tmp_path.iterdir())
