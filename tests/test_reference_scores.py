"""benchmark/reference_scores.py: mirror images are images, returns are sums, what is stored is what tasks know."""

import argparse
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

import envs
import reference_scores
import wurl_sac
from cells import args_of
from envs import buffers, physics

ARGS = argparse.Namespace(budget="cpu", updates=0, seeds=1, episodes=20, jobs=1)
# sign of x and y of an action in the mirror image, from the measured task
FLIPS = {
    "point-angle-180": (-1, 1), "point-angle-120": (-1, 1), "point-angle-240": (-1, -1), "point-angle-300": (1, -1),
    "point-goal-180": (-1, 1), "point-goal-120": (-1, 1), "point-goal-240": (-1, -1), "point-goal-300": (1, -1),
    "tree-maze-end-4": (-1, 1), "tree-maze-end-3": (-1, 1),
}  # fmt: skip


@functools.cache
def player(world):
    """actions [E, L, A] -> Transition [E, L, ..] in a world, compiled once."""
    env = envs.make(world)

    def one(actions):
        def step(state, action):
            after = env.step(state, action)
            return after, envs.transition(state, action, after)

        return jax.lax.scan(step, env.reset(jax.random.key(0)), actions)[1]

    return jax.jit(jax.vmap(one))


PAIRS = [(name, image) for name in reference_scores.GROUPS["light"] for image in reference_scores.MIRRORS[name]]


@pytest.mark.parametrize("name, image", PAIRS)
def test_images_of_point_worlds(name, image):
    """Steady headings with noise, which reach walls and goals: the mirrored actions earn the same."""
    rng = np.random.default_rng(0)
    headings = rng.normal(size=(64, 1, 2))
    actions = np.clip(headings + 0.3 * rng.normal(size=(64, 100, 2)), -1, 1).astype(np.float32)
    earned = []
    for task, sign in ((envs.task(name), (1, 1)), (envs.task(image), FLIPS[image])):
        steps = player(task.env)(actions * np.array(sign, np.float32))
        earned.append(np.asarray(task.reward(steps)).sum(1))
    assert np.std(earned[0]) > 1
    np.testing.assert_allclose(*earned, atol=0.05)  # walls round the two sides differently


# legs 1 to 4 stand at (+, +), (-, +), (-, -), (+, -); an image permutes them and turns some joints the other way round
ANT_IMAGES = {  # order of the legs, sign of hips and ankles, sign of x, y and z
    "x": ((1, 0, 3, 2), (-1, 1), (-1, 1, 1)),  # x -> -x: hips turn the other way
    "y": ((3, 2, 1, 0), (-1, 1), (1, -1, 1)),
    "xy": ((2, 3, 0, 1), (1, 1), (-1, -1, 1)),  # half a turn
}
OUTWARDS = np.stack([np.ones(4), [1, -1, -1, 1]], 1)  # sign that opens each ankle


@pytest.mark.parametrize("image", ANT_IMAGES)
def test_images_of_the_ant(image):
    """Half a turn and both reflections of start and actions give the image of the path, contacts included.

    So 0 and 180 degrees are one task, and 60, 120, 240 and 300.
    """
    model, paths = physics.load_model("ant.xml", gear=30.0), []
    joint_of = [model.jnt_qposadr[model.actuator_trnid[i, 0]] - 7 for i in range(8)]
    assert len(set(joint_of)) == 8
    start, controls = np.tile([0.0, 1.0], (4, 1)), np.random.default_rng(1).uniform(-1, 1, (20, 4, 2))
    legs, joints, axes = ANT_IMAGES[image]
    for of in (lambda x: x * OUTWARDS, lambda x: (x * joints)[list(legs)] * OUTWARDS):
        data, path = mujoco.MjData(model), []
        data.qpos[7:] = of(start).ravel()
        for control in controls:
            data.ctrl[:] = of(control).ravel()[joint_of]
            mujoco.mj_step(model, data, 5)
            path.append(data.qpos[:3].copy())
        paths.append(np.array(path))
    assert np.abs(paths[0][:, :2]).max() > 1e-3
    np.testing.assert_allclose(paths[0], paths[1] * axes, atol=1e-6)


def test_random_returns_are_sums_of_the_task(tmp_path):
    """Of whole episodes; the one that the end of a run cut off does not count."""
    rng, rows = np.random.default_rng(0), 350
    velocity = rng.uniform(-1, 1, (rows, 2)).astype(np.float32)
    zeros, timeouts = np.zeros((rows, 4), np.float32), np.arange(rows) % 100 == 99
    timeouts[-1] = True
    arrays = {
        "observations": zeros, "next_observations": zeros, "actions": zeros[:, :2], "rewards": zeros[:, 0],
        "terminals": np.zeros(rows, bool), "timeouts": timeouts,
        "root_positions": zeros[:, :2], "root_velocities": velocity,
    }  # fmt: skip
    about = {"dataset_name": "toy", "env": "point", "task": "point", "layout": "env", "reward_kind": "none"}
    about |= {"dt": 0.1, "episode_length": 100}
    buffers.save(tmp_path / "buffers" / "policy_00.npz", arrays, about)
    along, task = velocity[:300] @ [np.cos(np.pi / 3), np.sin(np.pi / 3)], envs.task("point-angle-60")
    for length in (100, 50):
        task = dataclasses.replace(task, episode_length=length)
        for found, steps in zip(reference_scores.random_returns(task, tmp_path), (100, length), strict=True):
            np.testing.assert_allclose(found, along.reshape(3, 100)[:, :steps].sum(1), rtol=1e-4, atol=1e-4)


def test_policy_returns_of_full_throttle():
    """v <- 0.98 v + 0.1, at most 1, along x: the return is known."""
    speed, total = 0.0, 0.0
    for _ in range(100):
        speed = min(0.98 * speed + 0.1, 1.0)
        total += speed
    policy = lambda observations: jnp.broadcast_to(jnp.array([1.0, 0.0]), (*observations.shape[:-1], 2))
    whole, short = reference_scores.policy_returns(envs.task("point-angle-0"), policy, 3, 0)
    np.testing.assert_allclose(whole, np.full(3, total), rtol=1e-5)
    np.testing.assert_allclose(short, whole)


def test_the_expert_is_the_mean_of_its_policy(tmp_path):
    """One ReLU unit on the first of two observations, its mean 2 and its log standard deviation 5."""
    layer = "actor/params/MLP_0/Dense_{}/{}".format
    arrays = {
        layer(0, "kernel"): np.array([[[1.0], [0.0]]]), layer(0, "bias"): np.zeros((1, 1)),
        layer(1, "kernel"): np.array([[[2.0, 5.0]]]), layer(1, "bias"): np.array([[0.5, 0.0]]),
    }  # fmt: skip

    def load(observations):
        about = np.array(json.dumps({"observations": observations, "log_std_min": -20.0, "log_std_max": 2.0}))
        np.savez(tmp_path / "policy.npz", kind=np.array("tanh_gaussian"), metadata_json=about, **arrays)
        return reference_scores.load_policy(tmp_path / "policy.npz")

    actions = load("task")(jnp.array([[0.25, 9.0], [-3.0, 9.0]]))
    np.testing.assert_allclose(actions, np.tanh([[1.0], [0.5]]), rtol=1e-6)
    with pytest.raises(envs.InputError, match="no expert's"):
        load("env")


def test_what_is_stored_is_whole():
    known = reference_scores.stored()
    assert set(reference_scores.GROUPS["all"]) <= set(known)
    for name, entry in known.items():
        task = envs.task(name)
        if isinstance(entry, str):
            assert name in reference_scores.MIRRORS[entry] and task.reference == envs.task(entry).reference
            continue
        assert task.reference == (entry["random"], entry["expert"]) and entry["eval_length"] == task.eval_length
        assert entry["random"] < entry["expert"]
        assert entry["random_episodes"] >= 100 and len(entry["expert_of_seeds"]) == len(entry["commands"]) - 1
        assert all(word.startswith("python wurl_sac.py --task") for word in entry["commands"])
        np.testing.assert_allclose(entry["expert"], np.mean(entry["expert_of_seeds"]), rtol=1e-4)
    # whoever goes straight at full speed after ten steps earns 95.2; an expert must come near
    assert 90 < known["point-angle-0"]["expert"] < 100
    assert not any(envs.task(unknown).reference for unknown in ("point", "point-angle-45", "humanoid"))


def test_references_hold_for_the_options_they_were_measured_with(monkeypatch):
    known = {"ant-angle-0": {"random": -5.0, "expert": 300.0}, "ant-angle-180": "ant-angle-0"}
    monkeypatch.setattr(envs.tasks, "reference_scores", lambda: known)
    assert envs.task("ant-angle-180").reference == (-5.0, 300.0)
    assert envs.task("ant-angle-0", **envs.task("ant-angle-0").options).reference == (-5.0, 300.0)
    assert envs.task("ant-angle-0", ctrl_cost=0.5).reference is None


def test_a_run_of_another_command_is_refused(tmp_path, monkeypatch):
    """What lies in a run's folder is taken for that run only if its flags are the command's."""
    monkeypatch.setattr(reference_scores, "RUNS", tmp_path)
    for cell in (reference_scores.random_run("point"), reference_scores.expert_run("point-angle-0", 0, ARGS)):
        cell.done.parent.mkdir(parents=True)
        cell.done.touch()
        left = dataclasses.asdict(args_of(wurl_sac, cell.command[1:]))
        (cell.runs / "args.json").write_text(json.dumps(left))
    assert reference_scores.make(["point-angle-0"], ARGS) == (set(), ""), "what is there is not made again"
    (cell.runs / "args.json").write_text(json.dumps(left | {"num_updates": 500}))
    with pytest.raises(envs.InputError, match=r"made with another num_updates\. Remedy"):
        reference_scores.make(["point-angle-0"], ARGS)


def stand_in(folder, monkeypatch, returns, lost=()):
    """Runs that are there but for `lost`; the expert earns `returns` -> the names of the cells that were asked for."""
    asked, put = [], monkeypatch.setattr
    put("reference_scores.cells.run_cells", lambda cells, base, jobs: (asked.extend(cells), (set(lost), ""))[1])
    put("reference_scores.STORE", folder / "scores.json")
    put("reference_scores.RUNS", folder)
    put("reference_scores.random_returns", lambda task, folder: (np.array([1.0, 3.0]),) * 2)
    put("reference_scores.load_policy", lambda path: None)
    put("reference_scores.policy_returns", lambda *_: (np.full(4, returns),) * 2)
    return asked


def test_stored_once(tmp_path, monkeypatch, capsys):
    asked, words = stand_in(tmp_path, monkeypatch, 8.0), ["--run", "point-angle-0", "--seeds", "2"]
    reference_scores.main(words)
    assert asked == ["run point/random", *(f"run point-angle-0/expert-seed{seed}" for seed in (0, 1))]
    tasks = json.loads((tmp_path / "scores.json").read_text())["tasks"]
    assert tasks["point-angle-180"] == "point-angle-0"
    assert (tasks["point-angle-0"]["random"], tasks["point-angle-0"]["expert"]) == (2.0, 8.0)
    capsys.readouterr()
    reference_scores.main(words)
    assert capsys.readouterr().out == "point-angle-0: stored already, skipped\n" and len(asked) == 3
    assert not reference_scores.is_stored("point-angle-0", ARGS), "with one seed it is another measurement"


@pytest.mark.parametrize("returns, lost", [(1.5, ()), (8.0, ("run point-angle-0/expert-seed0",))])
def test_nothing_is_stored_of_a_poor_or_a_lost_expert(tmp_path, monkeypatch, capsys, returns, lost):
    stand_in(tmp_path, monkeypatch, returns, lost)
    with pytest.raises(SystemExit, match="not measured: point-angle-0"):
        reference_scores.main(["--run", "point-angle-0"])
    assert ("Remedy: raise --updates" in capsys.readouterr().err) == (not lost)
    assert not (tmp_path / "scores.json").exists()


@pytest.mark.parametrize("words, said", [
    (["--run", "point-angle-180"], "point-angle-180: measured are"), ([], "nothing to do"),
    (["--seeds", "0", "--run", "light"], "--seeds, --episodes and --jobs are 1 or more"),
])  # fmt: skip
def test_command_line_errors(words, said, capsys):
    with pytest.raises(SystemExit):
        reference_scores.main(words)
    assert said in capsys.readouterr().err
