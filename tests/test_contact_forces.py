"""Ant-v5, Humanoid-v5 and AntMaze v5: what Gymnasium observes besides pose and speeds is left out, the reward stays.

The oracle is Gymnasium itself, stepped by hand.
"""

import functools
import sys
import types

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
import udg_select
from envs import buffers
from envs.buffers.__main__ import main as command_line
from envs.task import Transition
from tests.test_convert import (  # noqa: F401 (minari: a fixture)
    about,
    edit_about,
    import_d4rl,
    import_minari,
    make_minari,
    minari,
    refused,
)
from tests.test_envs import state_at
from tests.test_imports import import_arrays
from tests.test_runs import module, tiny

NAMES = {"ant-v5": ("Ant-v5", 105, 27), "humanoid-v5": ("Humanoid-v5", 348, 45)}


def stepped(name, steps):
    """Random play as a user records it, in Gymnasium's units; the states; what it charged for contacts."""
    sys.modules.setdefault("imageio", types.ModuleType("imageio"))  # Gymnasium draws with it, where it draws
    env, rng = gymnasium.make(name), np.random.default_rng(0)
    obs, info = env.reset(seed=0)
    rows, states, charged = [], [], []
    for _ in range(steps):
        action = rng.uniform(env.action_space.low, env.action_space.high).astype(np.float32)
        place = info["x_position"], info["y_position"]
        before = [env.unwrapped.data.qpos.copy(), env.unwrapped.data.qvel.copy()]
        after, reward, ended, cut, info = env.step(action)
        states.append([*before, env.unwrapped.data.qpos.copy()])
        charged.append(info["reward_contact"])
        rows.append({
            "observations": obs, "actions": action, "rewards": reward, "next_observations": after,
            "terminals": ended, "timeouts": cut, "root_positions": place,
            "root_velocities": (info["x_velocity"], info["y_velocity"]),
        })  # fmt: skip
        obs = after
        if ended or cut:
            obs, info = env.reset()
    columns = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    columns["timeouts"][-1] = not columns["terminals"][-1]
    return columns, [np.array(x) for x in zip(*states, strict=True)], np.array(charged)


@pytest.fixture(scope="module")
def play():
    return functools.cache(lambda task: stepped(NAMES[task][0], 300))


@pytest.mark.parametrize("task", NAMES)
def test_the_reward_is_gymnasiums_but_for_contacts(task, play):
    """Of its own states and speeds to rounding, in NumPy and JAX; ends are its own."""
    rows, _, charged = play(task)
    known, shown = envs.task(task), NAMES[task][2]
    half = gymnasium.make(NAMES[task][0]).action_space.high
    step = Transition(
        rows["observations"][:, :shown], rows["actions"] / half, rows["next_observations"][:, :shown],
        rows["root_positions"], rows["root_velocities"],
    )  # fmt: skip
    assert rows["terminals"].sum() > 2 and charged.min() < -1e-3
    np.testing.assert_allclose(known.reward(step), rows["rewards"] - charged, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(known.terminal(step), rows["terminals"])
    step = jax.tree.map(jnp.float32, step)
    np.testing.assert_allclose(known.reward(step), rows["rewards"] - charged, rtol=0, atol=1e-5)


@pytest.mark.parametrize("task", NAMES)
def test_a_step_of_the_world_is_gymnasiums(task, play):
    """From the same states: observations, ends, and the reward but for contacts and for the substep by which
    Gymnasium's speeds are late."""
    rows, (qpos, qvel, next_qpos), charged = play(task)
    env, shown = envs.make(task, "mujoco"), NAMES[task][2]
    actions = np.float32(rows["actions"] / env.engine.half)
    after = jax.tree.map(np.asarray, jax.jit(jax.vmap(env.step))(state_at(env, qpos, qvel), actions))
    np.testing.assert_allclose(after.obs, rows["next_observations"][:, :shown], rtol=1e-6, atol=2e-5)
    np.testing.assert_array_equal(after.done > 0, rows["terminals"])
    weight = {"ant-v5": 1.0, "humanoid-v5": 1.25}[task]
    late = weight * (after.info["root_velocity"][:, 0] - rows["root_velocities"][:, 0])
    np.testing.assert_allclose(after.reward, rows["rewards"] - charged + late, rtol=0, atol=2e-5)
    acceleration = np.abs(after.info["root_velocity"] - rows["root_velocities"]).mean()
    assert acceleration < 0.01  # metres a second, of speeds of about one
    torso = (next_qpos[:, 0] - qpos[:, 0]) / env.dt
    assert (np.abs(torso - after.info["root_velocity"][:, 0]).max() > 0.1) == (task == "humanoid-v5")


@pytest.mark.parametrize("task", NAMES)
def test_a_recorded_file_is_trained_on_and_relabelled(task, play, tmp_path, capsys):
    rows, _, charged = play(task)
    _, size, shown = NAMES[task]
    np.savez(tmp_path / "mine.npz", **rows)
    out, chosen = tmp_path / "out.npz", tmp_path / "udg"
    assert command_line(["from-arrays", str(tmp_path / "mine.npz"), "--task", task, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"of {size} observed numbers the first {shown}, pose and speeds, are kept" in said
    assert "physics: 100.0 % of 300 replayed steps agree" in said and "rewards: " not in said
    buffer = buffers.load(out, quiet=True)
    assert about(buffer, "env", "task", "layout") == (task, task, "task")
    assert any(note.startswith(f"of {size} observed numbers") for note in buffer.metadata["notes"])
    np.testing.assert_array_equal(buffer["observations"], np.float32(rows["observations"][:, :shown]))
    np.testing.assert_array_equal(buffer["rewards"], np.float32(rows["rewards"]))
    assert np.abs(buffer["actions"]).max() > 0.9  # the humanoid's motors reach 0.4
    udg_select.main(udg_select.Args(buffers=(str(out),), tasks=(task,), w1_points=0, out=str(chosen)))
    paid = buffers.load(chosen / task / "top1.npz", quiet=True)
    np.testing.assert_allclose(paid["rewards"], rows["rewards"] - charged, rtol=0, atol=1e-5)
    assert buffers.load_task(chosen / task / "top1.npz", None)[1].name == task
    if task == "ant-v5":
        result = module("cped").main(tiny("cped", dataset=str(out), eval_episodes=1, out=str(tmp_path / "run")))
        assert np.isfinite(result["last"])
        select = udg_select.Args(buffers=(str(out),), tasks=("ant-v5-angle-90",), w1_points=0, out=str(chosen))
        udg_select.main(select)
        paid = buffers.load(chosen / "ant-v5-angle-90" / "top1.npz", quiet=True)
        turned = rows["rewards"] - charged + rows["root_velocities"] @ [-1, 1]
        np.testing.assert_allclose(paid["rewards"], turned, rtol=0, atol=1e-5)


def test_without_a_task_all_numbers_stay(play, tmp_path, capsys):
    """And whoever wants to evaluate is told which tasks there are."""
    buffer = import_arrays(tmp_path, play("ant-v5")[0], name="mine")
    assert buffer["observations"].shape[1] == 105 and "notes" not in buffer.metadata
    capsys.readouterr()
    buffers.load_task(buffer.path, None)
    assert "task='ant-v5') (or ant-v2" in capsys.readouterr().out
    refused(lambda: import_arrays(tmp_path, play("ant-v5")[0], task="humanoid-v5"), "105 observed", "has 45")


def test_d4rls_ant(play, tmp_path):
    """111 numbers, which MuJoCo 2 observed: the world body's forces too; contacts as they were."""
    rows, (qpos, qvel, _), _ = play("ant-v5")
    wide = {key: rows[key].copy() for key in ("actions", "rewards", "terminals", "timeouts")}
    wide |= {key: np.pad(rows[key], ((0, 0), (0, 6))) for key in ("observations", "next_observations")}
    wide |= {"infos/qpos": qpos, "infos/qvel": qvel}
    assert import_d4rl(tmp_path, wide, "ant_medium-v2")["observations"].shape[1] == 111
    buffer = import_d4rl(tmp_path, wide, "ant_medium-v2", task="ant-v2", replay=True)
    assert buffer["observations"].shape[1] == 27 and about(buffer, "env", "task") == ("ant-v2", "ant-v2")
    assert 0.2 < buffer.metadata["replay_agreement"]["share"] < 0.9  # recorded with MuJoCo's contacts of today
    assert buffers.load_task(buffer.path, None)[1].normalized_score(3879.7) == pytest.approx(100)


class Flat(gymnasium.Env):
    """As many numbers as an AntMaze of version 5 with all its parts, and no word of the seconds of a step."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (109,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (8,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(109), {}


def test_antmaze_of_version_5(play, minari, tmp_path):  # noqa: F811
    """Its observation is Ant-v5's, its places become root columns: trained on, and paid for a direction.

    With all its parts it is of a world of the user's own.
    """
    rows, spaces = play("ant-v5")[0], gymnasium.spaces
    box = lambda size: spaces.Box(-np.inf, np.inf, (size,), np.float64)
    whole = lambda key: np.concatenate([rows[key][:20], rows[f"next_{key}"][19:20]])
    places = np.cumsum(np.vstack([rows["root_positions"][:1], 0.05 * rows["root_velocities"][:20]]), axis=0)
    flags = np.arange(20) == 19
    episode = {
        "observations": {
            "observation": whole("observations"), "achieved_goal": places, "desired_goal": np.zeros((21, 2)),
        },
        "actions": rows["actions"][:20], "rewards": np.arange(20.0) % 2, "terminations": flags & False,
        "truncations": flags,
    }  # fmt: skip
    space = spaces.Dict({"observation": box(105), "achieved_goal": box(2), "desired_goal": box(2)})
    name = make_minari(minari, "own/antmaze-v5", [episode], space, spaces.Box(-1, 1, (8,), np.float32))
    spec = gymnasium.spec("Ant-v5").to_json().replace("Ant-v5", "AntMaze_UMaze-v5")
    edit_about(tmp_path, name, env_spec=spec)
    gymnasium.register("Flat-v0", Flat, max_episode_steps=20)
    keys = ["achieved_goal", "desired_goal", "observation"]
    buffer = import_minari(tmp_path, name, keys=keys, task="gym:Flat-v0")
    assert about(buffer, "task", "dt") == ("gym:Flat-v0", 0.05) and buffer["observations"].shape[1] == 109
    np.testing.assert_allclose(buffer["root_velocities"], rows["root_velocities"][:20], atol=1e-4)
    buffer = import_minari(tmp_path, name, keys=["observation"], task="ant-v5")
    assert about(buffer, "env", "layout") == ("ant-v5", "task") and buffer["observations"].shape[1] == 27
    assert buffer.metadata["replay_agreement"]["share"] == 1 and buffer["goals"].shape == (20, 2)
    args = udg_select.Args(buffers=(buffer.path,), tasks=("ant-v5-angle-0",), w1_points=0, out=str(tmp_path / "udg"))
    udg_select.main(args)
    paid = buffers.load(tmp_path / "udg/ant-v5-angle-0/top1.npz", quiet=True)["rewards"]
    wanted = rows["root_velocities"][:20, 0] - 0.5 * (rows["actions"][:20] ** 2).sum(-1) + 1
    np.testing.assert_allclose(paid, wanted, rtol=0, atol=1e-3)
