"""Worlds and tasks: physics against Gymnasium's recordings, rewards against relabelling, ends."""

import concurrent.futures
import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

import envs
from envs import brax_worlds, buffers, mjx_contacts, physics, point, render, robots, tasks, warp_engine
from envs.base import MAX_MJX_ON_OLD_CPU, State

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
HOPPING = dict(ctrl_cost=1e-3, survive_bonus=1.0, survive_on_done=False)

# Gymnasium's v5 variants: file, task, engine arguments, tolerance of the reward of one step. The
# ant's velocity is taken from the torso one substep late there, so its reward is checked apart.
V5 = {
    "cheetah": ("halfcheetah", dict(ctrl_cost=0.1), {}, 1e-6),
    "hopper": ("hopper", HOPPING, dict(margin_scale=1.0), 2e-6),
    "walker2d": ("walker2d", HOPPING, dict(xml="walker2d_v5.xml"), 2e-6),
    "ant": ("ant", {**HOPPING, "ctrl_cost": 0.5}, dict(gear=150.0, contact_cost=5e-4), 0.06),
}
# One name of every family, so that each reward is run through its world.
FAMILIES = (
    "point", "point-angle-60", "point-goal-240", "tree-maze", "tree-maze-end-2", "ant", "ant-angle-60", "cheetah",
    "cheetah-jump", "humanoid",
)  # fmt: skip


def golden(name):
    with np.load(GOLDEN / f"envs_{name}.npz", allow_pickle=False) as file:
        return dict(file)


def v5_env(robot, **changes):
    name, task_options, engine, tolerance = V5[robot]
    task = tasks.forward_task(robot, **task_options)
    env = physics.MujocoEnv(task, "mujoco", **{**engine, **changes})
    return env, golden(f"{name}_v5_mj317"), tolerance


def state_at(env, qpos, qvel, memory=None):
    """A batch of states (N,) at float64 qpos, qvel."""
    lead = qpos.shape[:-1]
    if memory is None:
        memory = np.concatenate([np.zeros((*lead, 1)), qpos, qvel], axis=-1).view(np.uint32)
    single = [np.float32(x) for x in (qpos, qvel, np.zeros(lead))]
    now = physics.Physics(memory, *single)
    raw_obs, position = jax.vmap(env._read)(now)
    info = {"raw_obs": raw_obs, "root_position": position, "root_velocity": 0.0 * position}
    zero = jnp.zeros(lead)
    return State(now, env.task.observe(raw_obs), zero, zero, {}, info)


def rollout(env, num_envs=4, num_steps=60, seed=0, reset_ended=True):
    """Random play; -> first states, (transition, rewards, dones, obs, next obs): (T, N, ..)."""
    keys = jax.random.split(jax.random.key(seed), num_envs)
    first = jax.vmap(env.reset)(keys)

    def play(state, key):
        actions = jax.random.uniform(key, (num_envs, env.action_size), minval=-1.5, maxval=1.5)
        after = jax.vmap(env.step)(state, actions)
        record = (envs.transition(state, actions, after), after.reward, after.done)
        fresh = first if reset_ended else after

        def pick(old, new):
            ended = after.done.reshape(-1, *[1] * (new.ndim - 1))
            return jnp.where(ended > 0, old, new)

        return jax.tree.map(pick, fresh, after), (*record, state.obs, after.obs)

    record = jax.jit(lambda: jax.lax.scan(play, first, jax.random.split(keys[0], num_steps)))()[1]
    return first, jax.tree.map(np.asarray, record)


@pytest.fixture(scope="module")
def recorded():
    """Random play of every family, made once."""
    made = {name: envs.make(name) for name in FAMILIES}
    return {name: (env, *rollout(env)[1]) for name, env in made.items()}


# --- physics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("robot", V5)
def test_one_step_is_gymnasiums(robot):
    env, data, tolerance = v5_env(robot)
    after = jax.jit(jax.vmap(env.step))(state_at(env, data["qpos"], data["qvel"]), data["action"])
    after = jax.tree.map(np.asarray, after)
    now = after.pipeline_state
    np.testing.assert_allclose(now.qpos, data["next_qpos"], rtol=0, atol=3e-7)
    np.testing.assert_allclose(now.qvel, data["next_qvel"], rtol=0, atol=2e-5)
    hidden = 2 if robot == "ant" else 0
    width = after.obs.shape[1] - hidden
    np.testing.assert_allclose(after.obs[:, hidden:], data["next_obs"][:, :width], atol=2e-5)
    np.testing.assert_array_equal(after.done > 0, data["terminated"])
    np.testing.assert_allclose(after.reward, data["reward"], rtol=0, atol=tolerance)
    if robot == "ant":
        _, control, contact, survive = data["reward_terms"].T
        np.testing.assert_allclose(now.contact_cost, -contact, atol=1e-8)
        forward = (data["next_qpos"][:, 0] - data["qpos"][:, 0]) / env.dt
        np.testing.assert_allclose(after.reward, forward + control + contact + survive, rtol=0, atol=2e-6)


@pytest.mark.parametrize("robot", V5)
def test_hundred_steps_are_gymnasiums(robot):
    env, data, _ = v5_env(robot, contact_cost=0.0)
    start = state_at(env, data["ol_qpos"][:1], data["ol_qvel"][:1])

    def advance(state, action):
        state = jax.vmap(env.step)(state, action[None])
        return state, state.pipeline_state.qpos[0]

    path = jax.jit(lambda s: jax.lax.scan(advance, s, data["ol_action"])[1])(start)
    error = np.abs(np.asarray(path) - data["ol_qpos"][1:]).max(axis=1)
    assert error[:50].max() < 3e-7
    assert error.max() < (1e-4 if robot == "cheetah" else 1e-6)  # the cheetah's contacts: chaos


def test_half_margins_give_the_contacts_of_mujoco_2():
    data = golden("hopper_mj220")
    task = tasks.forward_task("hopper", ctrl_cost=1e-3)
    for scale, low, high in ((0.5, 0, 2e-5), (1.0, 0.05, np.inf)):
        env = physics.MujocoEnv(task, "mujoco", margin_scale=scale)
        start = state_at(env, data["qpos"], data["qvel"])
        now = jax.jit(jax.vmap(env.step))(start, data["action"]).pipeline_state
        assert low < np.abs(np.asarray(now.qvel) - data["next_qvel"]).max() < high


def test_models_are_those_of_the_xmls(tmp_path, monkeypatch):
    """The total mass is set after compiling; nothing else of the cheetah may change by that."""
    monkeypatch.chdir(tmp_path)
    ours = physics.load_model("half_cheetah.xml")
    assert not list(tmp_path.iterdir())
    theirs = mujoco.MjModel.from_xml_path(physics.asset_path("half_cheetah.xml"))  # leaves a log
    for field in ("body_mass", "body_inertia", "dof_invweight0", "geom_margin", "actuator_gear"):
        np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field))
    ant = envs.make("ant")
    assert set(ant.model.actuator_gear[:, 0]) == {30.0}
    assert set(envs.make("ant", gear=150).model.actuator_gear[:, 0]) == {150.0}
    assert ant.model.opt.timestep * ant.robot.frame_skip == pytest.approx(ant.dt)


def test_mjx_forward_of_the_ant_turns_contacts_as_mujoco_does():
    data = golden("ant_v5_mj317")
    model = physics.load_model("ant.xml", 150.0)
    point_data, expected, steep = mujoco.MjData(model), [], 0
    for qpos, qvel, action in zip(data["qpos"], data["qvel"], data["action"], strict=True):
        mujoco.mj_resetData(model, point_data)
        point_data.qpos, point_data.qvel, point_data.ctrl = qpos, qvel, action
        mujoco.mj_forward(model, point_data)
        expected.append(point_data.qacc.copy())
        touching = point_data.contact.geom[:, 1]
        steep += np.any(np.abs(point_data.geom_xmat[touching, 8]) > np.sqrt(0.75))
    assert steep > 10  # states where MJX itself goes another way
    engine = physics.MjxEngine(model, 5)

    def accelerate(qpos, qvel, action):
        state = engine.template.replace(qpos=qpos, qvel=qvel, ctrl=action)
        with mjx_contacts.exact_contacts():
            return engine.mjx.forward(engine.model, state).qacc

    inputs = [jnp.float32(data[key]) for key in ("qpos", "qvel", "action")]
    got = np.asarray(jax.jit(jax.vmap(accelerate))(*inputs))
    error = np.abs(got - expected).max(axis=1) / np.abs(expected).max(axis=1)
    assert np.median(error) < 1e-6 and error.max() < 1e-4


def test_mjx_has_a_solver_for_the_humanoid():
    env, newton = envs.make("humanoid", "mjx"), mujoco.mjtSolver.mjSOL_NEWTON
    assert env.engine.model.opt.solver == newton != env.model.opt.solver
    model, data = env.engine.host_model, [mujoco.MjData(m) for m in (env.model, env.engine.host_model)]
    rng = np.random.default_rng(0)
    for _ in range(20):
        action = rng.uniform(-0.4, 0.4, model.nu)
        data[1].qpos, data[1].qvel, data[1].qacc_warmstart = data[0].qpos, data[0].qvel, data[0].qacc_warmstart
        for m, d in zip((env.model, model), data, strict=True):
            d.ctrl[:] = action
            mujoco.mj_step(m, d, 5)
        np.testing.assert_allclose(data[1].qpos, data[0].qpos, rtol=0, atol=2e-5)
        np.testing.assert_allclose(data[1].qvel, data[0].qvel, rtol=0, atol=1e-3)


def test_mjx_is_left_as_it_was():
    from mujoco.mjx._src import collision_convex, collision_driver, collision_primitive

    shapes = (getattr(mujoco.mjtGeom, f"mjGEOM_{name}") for name in ("PLANE", "SPHERE", "CAPSULE", "BOX"))
    plane, sphere, capsule, box = shapes
    now = lambda: [collision_driver._COLLISION_FUNC[pair] for pair in ((plane, capsule), (sphere, box), (capsule, box))]
    with mjx_contacts.exact_contacts():
        assert now() == [mjx_contacts._plane_capsule, mjx_contacts._sphere_box, mjx_contacts._capsule_box]
    assert now() == [
        collision_primitive.plane_capsule, collision_convex.sphere_convex, collision_convex.capsule_convex,
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:overflow")
def test_an_unstable_step_rests_in_its_pose(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log file about it
    env = envs.make("ant-angle-60")
    first, _ = rollout(env, num_envs=3, num_steps=1)
    exact = np.array(first.pipeline_state.memory).view(np.float64)
    healthy = exact.copy()
    exact[1, 1 + 15] = 1e12
    exact[2, 1 + 15 + 3] = np.nan
    now = first.pipeline_state._replace(memory=exact.view(np.uint32))
    actions = np.zeros((3, 8), np.float32)
    after = jax.jit(jax.vmap(env.step))(first.replace(pipeline_state=now), actions)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((after.obs, after.info)))
    np.testing.assert_array_equal(after.pipeline_state.qpos[1:], np.float32(healthy[1:, 1:16]))
    np.testing.assert_array_equal(after.pipeline_state.qvel[1:], 0.0)
    np.testing.assert_array_equal(after.info["root_velocity"][1:], 0.0)
    np.testing.assert_array_equal(after.done, 0.0)
    assert np.abs(after.pipeline_state.qvel[0]).max() > 0.0
    again = jax.jit(jax.vmap(env.step))(after, actions)
    assert np.abs(again.pipeline_state.qvel).max(axis=1).min() > 0.0  # it goes on from there


def test_double_bits_widen_exactly():
    values = jnp.array([0.0, 1.0, -1.5, 3.4e38, -1.2e-38, 1 / 3, -2e-30, 123456.79], jnp.float32)
    wide = np.asarray(jax.jit(physics.double_bits)(values)).view(np.float64)
    np.testing.assert_array_equal(wide, np.asarray(values).astype(np.float64))
    assert np.asarray(physics.double_bits(jnp.float32([1e-45]))).view(np.float64)[0] == 0.0


# --- tasks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_relabelling_gives_the_environments_rewards(recorded, name):
    env, step, rewards, dones, obs, next_obs = recorded[name]
    task = envs.task(name)
    relabelled = task.reward(step)
    assert isinstance(relabelled, np.ndarray) and relabelled.dtype == np.float32
    np.testing.assert_allclose(relabelled, rewards, rtol=0, atol=2e-5)
    assert task.has_reward == bool(np.any(rewards != 0.0)) or name == "point-goal-240"
    np.testing.assert_array_equal(task.observe(step.observations), obs)
    np.testing.assert_array_equal(task.observe(step.next_observations), next_obs)
    np.testing.assert_array_equal(task.terminal(step), dones > 0)
    np.testing.assert_array_equal(task.model_terminal(next_obs), dones > 0)
    assert task.feature(step).shape == (*rewards.shape, len(task.feature_names))
    assert obs.shape[-1] == env.observation_size == task.observation_size
    assert step.observations.shape[-1] == task.env_observation_size
    assert np.abs(step.actions).max() == 1.0  # recorded as the world received them
    if task.model_reward:
        np.testing.assert_allclose(task.model_reward(obs, step.actions, next_obs), rewards)


@pytest.mark.parametrize("name", ["point-goal-60", "ant-angle-120", "cheetah-jump", "humanoid"])
def test_jax_and_numpy_agree_at_any_shape(recorded, name):
    world = envs.task(name).env
    step = recorded[world][1]
    task = envs.task(name)
    traced = jax.tree.map(jnp.asarray, step)
    one = jax.tree.map(lambda x: x[7, 2], step)
    for function in (task.reward, task.terminal, task.feature):
        expected = function(step)
        np.testing.assert_allclose(jax.jit(function)(traced), expected, rtol=1e-5, atol=2e-5)
        assert function(one).shape == expected[7, 2].shape
        np.testing.assert_allclose(function(one), expected[7, 2], rtol=1e-5, atol=2e-5)


def test_rewards_are_the_formulas(recorded):
    """Each reward worked out from positions alone, in float64."""

    def displaced(name):
        step = recorded[name][1]
        return step, step.root_velocities.astype(np.float64), np.sum(step.actions**2.0, -1)

    step, velocity, square = displaced("ant")
    angle = np.radians(60)
    along = velocity @ [np.cos(angle), np.sin(angle)]
    default = envs.task("ant-angle-60")
    np.testing.assert_allclose(default.reward(step), along - 0.02 * square, atol=1e-5)
    plain = envs.task("ant-angle-60", ctrl_cost=0.5, survive_bonus=1.0)
    np.testing.assert_allclose(plain.reward(step), along - 0.5 * square + 1.0, atol=1e-5)
    strong = envs.task("ant-angle-60", gear=150)
    np.testing.assert_allclose(strong.reward(step), along - 0.5 * square, atol=1e-5)
    step, velocity, square = displaced("cheetah")
    for name, c_z in (("cheetah-run", 0), ("cheetah-jump", 15), ("cheetah-crawl", -15)):
        height = step.next_observations[..., 0].astype(np.float64)
        expected = np.minimum(velocity[..., 0], 3) - 0.1 * square + c_z * height
        np.testing.assert_allclose(envs.task(name).reward(step), expected, atol=2e-5)
    fast = step._replace(root_velocities=np.full_like(step.root_velocities, 9.0))
    assert envs.task("cheetah-run", ctrl_cost=0.0).reward(fast).max() == 3.0


def test_point_goal_pays_beyond_the_line():
    task = envs.task("point-goal-90", threshold=2.0)
    where = np.array([[0, 2.1, 0, 0], [5, 1.9, 0, 0], [-3, 7, 1, 1]], np.float32)
    step = envs.Transition(where * 0, where[:, :2], where, where[:, :2] * 0, where[:, :2])
    np.testing.assert_array_equal(task.reward(step), [1, 0, 1])
    np.testing.assert_array_equal(task.model_reward(where, None, where), [1, 0, 1])


@pytest.mark.parametrize("name", ["point", "tree-maze", "ant", "cheetah", "humanoid"])
def test_root_velocity_is_the_displacement(recorded, name):
    env, step = recorded[name][:2]
    goes_on = ~(recorded[name][3] > 0)[:-1]
    moved = (step.root_positions[1:] - step.root_positions[:-1]) / env.dt
    np.testing.assert_allclose(step.root_velocities[:-1][goes_on], moved[goes_on], atol=2e-4)
    if name == "humanoid":
        return
    nexts = step.next_observations[:-1][goes_on]
    np.testing.assert_array_equal(nexts, step.observations[1:][goes_on])
    if name in ("point", "ant"):
        feature = envs.task(name).feature(step)
        np.testing.assert_array_equal(feature, step.next_observations[..., :2])


def test_ends_are_true_ends_and_keep_the_last_observation(recorded):
    _, step, _, dones, _, next_obs = recorded["humanoid"]
    z = next_obs[..., 0]
    assert dones.any() and not dones.all()
    np.testing.assert_array_equal(dones > 0, (z <= 1.0) | (z >= 2.0))
    ended = np.argwhere(dones[:-1] > 0)
    t, n = ended[0]
    assert not 1.0 < step.next_observations[t, n, 0] < 2.0  # the fallen pose itself ...
    assert 1.3 < step.observations[t + 1, n, 0] < 1.5  # ... and the next episode's start after it


def test_no_time_limit_inside():
    env = envs.make("point-angle-0")
    _, record = rollout(env, num_envs=2, num_steps=env.episode_length + 5, reset_ended=False)
    assert not record[2].any()


def test_ants_termination_is_an_option():
    env = envs.make("ant-angle-0", terminate=True, survive_bonus=1.0)
    assert env.task.options["terminate"] is True
    z = np.array([0.1, 0.2, 0.6, 1.0, 1.1, np.nan], np.float32)
    raw = np.zeros((6, 29), np.float32)
    raw[:, 2] = z
    step = envs.Transition(raw, raw[:, :8], raw, raw[:, :2], raw[:, :2])
    expected = [True, False, False, False, True, True]
    np.testing.assert_array_equal(env.task.terminal(step), expected)
    np.testing.assert_array_equal(env.task.model_terminal(raw[:, 2:]), expected)
    assert not envs.task("ant-angle-0").terminal(step).any()
    high = state_at(env, np.eye(15)[2:3] * 3.0 + np.eye(15)[3:4], np.zeros((1, 14)))
    assert jax.vmap(env.step)(high, jnp.zeros((1, 8))).done == 1.0


def test_healthy_rules():
    heights = np.zeros((6, 45), np.float32)
    heights[:, 0] = [0.9, 1.0, 1.5, 2.0, 2.1, np.nan]
    down = envs.task("humanoid").model_terminal(heights)
    np.testing.assert_array_equal(down, [True, True, False, True, True, True])
    healthy = robots.ROBOTS["hopper"].healthy
    obs = np.tile(np.float32([1.2, 0.0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), (5, 1))
    obs[1, 0], obs[2, 1], obs[3, 5], obs[4, 4] = 0.7, -0.2, 100.0, np.nan
    np.testing.assert_array_equal(healthy(obs), [True, False, False, False, False])
    paid = tasks.forward_task("hopper", ctrl_cost=0.0, survive_bonus=1.0)
    unpaid = tasks.forward_task("hopper", ctrl_cost=0.0, survive_bonus=1.0, survive_on_done=False)
    zero = obs[:, :3] * 0
    step = envs.Transition(obs, zero, obs, zero[:, :2], zero[:, :2])
    np.testing.assert_array_equal(paid.reward(step), [1, 1, 1, 1, 1])
    np.testing.assert_array_equal(unpaid.reward(step), [1, 0, 0, 0, 0])


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("names, message, options", [
    (("ant-angel-60",), "'ant-angel-60'.*near names: ant-angle-60", {}),
    (("hoper", "ant-angle-", "ant-angle-x", "cheetah-jump-", "", "point angle 60"), "no environment or task", {}),
    (("tree-maze-end-5", "tree-maze-end-0", "tree-maze-end-1.5"), "dead ends 1 to 4", {}),
    (("brax/hoper",), "near names: brax/hopper", {}),
    (("point-goal-60",), "no option tresh; its options: threshold", dict(tresh=1)),
    (("point", "brax/ant"), "no option gear", dict(gear=3)),
    (("ant",), r"no option margins; its options: gear, .*xml", dict(margins=3)),
    (("ant",), "no back end 'c'", dict(backend="c")),
    (("brax/ant",), "no back end", dict(backend="mujoco")),
    (("point",), "one back end", dict(backend="mjx")),
    (("cheetah",), r"hopper.xml has 11 observed", dict(xml="hopper.xml")),
    (("ant",), r"no XML file 'ant2.xml'", dict(xml="ant2.xml")),
    (("ant",), "mujoco", dict(backend="mjx", contact_cost=1.0)),
    (("ant",), "num_contacts needs backend='warp'", dict(num_contacts=4)),
])  # fmt: skip
def test_names_and_options_are_checked(names, message, options):
    for name in names:
        with pytest.raises(envs.InputError, match=message):
            envs.make(name, **options)
        if not options:
            with pytest.raises(envs.InputError, match=message):
                envs.task(name)


@pytest.mark.parametrize("name", envs.task_names())
def test_a_task_is_rebuilt_from_its_options(name):
    task = envs.task(name)
    assert task.name == name
    assert envs.task(name, **task.options).options == task.options
    assert task.env in envs.task_names() and envs.task(task.env).env == task.env
    assert task.dt == envs.task(task.env).dt
    wrong = {key: -7.25 for key in ("angle_deg", "c_z") if key in task.options}
    if wrong:
        with pytest.raises(envs.InputError):
            envs.task(name, **wrong)


def test_any_angle_and_height():
    assert envs.task("ant-angle--22.5").options["angle_deg"] == -22.5
    assert envs.task("cheetah-jump-7.5").options["c_z"] == 7.5
    assert envs.task("cheetah-crawl").options["c_z"] == -15.0


def test_a_score_needs_references():
    with pytest.raises(envs.InputError, match="no reference returns"):
        envs.task("ant").normalized_score(1.0)
    known = dataclasses.replace(envs.task("ant-angle-0"), reference=(-10.0, 30.0))
    np.testing.assert_allclose(known.normalized_score(np.array([-10.0, 10.0, 30.0])), [0, 50, 100])
    np.testing.assert_allclose(known.normalized_spread(np.array([0.0, 4.0])), [0, 10])  # a spread has no origin


def test_making_a_point_robot_needs_no_engine():
    code = (
        "import sys, envs; envs.make('point'); envs.task('ant-angle-60'); "
        "assert not {'mujoco', 'brax'} & set(sys.modules); "
        "import warnings; warnings.warn('mine'); envs.make('brax/fast'); envs.make('ant', 'mjx')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "mine" in done.stderr and "warp" not in done.stderr and "jaxopt" not in done.stderr


# --- MuJoCo Warp, without it: its step is benchmark/mjx_parity.py --backend warp --------------


def test_warp_is_refused_where_it_cannot_run(monkeypatch):
    from mujoco.mjx import warp

    monkeypatch.setattr(warp, "WARP_INSTALLED", False)
    with pytest.raises(envs.InputError, match=r"pip install 'mujoco-mjx\[warp\]'"):
        envs.make("cheetah", "warp")
    monkeypatch.setattr(warp, "WARP_INSTALLED", True)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(envs.InputError, match="runs on NVIDIA GPUs"):
        envs.make("cheetah", "warp")


def test_places_for_contacts_are_enough_for_a_robot_on_its_side():
    model = physics.load_model("ant.xml")
    floor, body = np.flatnonzero(model.geom_bodyid == 0), np.flatnonzero(model.geom_bodyid)
    pairs = np.stack([np.repeat(floor, len(body)), body], axis=1)
    assert warp_engine.possible_contacts(model, pairs) == 2 * 12 + 1  # twelve capsules, one ball
    assert warp_engine.possible_contacts(model, pairs[:, ::-1]) == 25
    data = mujoco.MjData(model)
    data.qpos[2] = 0.0  # half of it in the floor
    mujoco.mj_forward(model, data)
    assert 10 < data.ncon <= 25


def test_worlds_of_many_vmaps_are_one_call_of_warp():
    seen = []

    def double(x, y):
        seen.append(x.shape)
        return x + y, 2 * y

    batch = warp_engine.one_batch(double)
    x, y = np.arange(24.0).reshape(2, 3, 4), np.arange(4.0)
    once = lambda x, y: tuple(z[0] for z in batch(x[None], y[None]))
    total, twice = jax.jit(jax.vmap(jax.vmap(once, (0, None)), (0, None)))(x, y)
    assert seen[-1] == (6, 4)
    np.testing.assert_array_equal(total, x + y)
    np.testing.assert_array_equal(twice, np.broadcast_to(2 * y, x.shape))


@pytest.mark.parametrize(("listed", "rows", "asked"), [(12, 24, None), (13, 24, 5), (12, 25, 5), (24, 8, 8)])
def test_contacts_without_a_place_end_the_program(listed, rows, asked):
    values = jnp.ones((3, 2))
    check = jax.jit(lambda listed, rows: warp_engine.check_room(values, listed, rows, num_contacts=4, num_rows=24))
    if asked is None:
        np.testing.assert_array_equal(check(listed, rows), values)
    else:
        with pytest.raises(Exception, match="3 worlds on 'warp'") as error:
            jax.block_until_ready(check(listed, rows))
        assert envs.host.cause(error.value).endswith(f"num_contacts={asked})")


# --- as a program -------------------------------------------------------------------------------


def assert_same_structure(before, after):
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)


@pytest.mark.parametrize("name", [*FAMILIES, "brax/inverted_pendulum"])
def test_states_keep_their_structure(name):
    env = envs.make(name)
    state = jax.eval_shape(env.reset, jax.random.key(0))
    after = jax.eval_shape(env.step, state, jax.ShapeDtypeStruct((env.action_size,), jnp.float32))
    assert_same_structure(state, after)
    own = {"reward", "terminal"} if name.startswith("brax/") else set()
    assert set(state.info) == {"raw_obs", "root_position", "root_velocity"} | own
    assert state.metrics == {}
    assert state.obs.shape == (env.observation_size,) and state.obs.dtype == jnp.float32
    assert state.reward.dtype == state.done.dtype == jnp.float32
    assert env.task.name == env.name == name


@pytest.mark.parametrize("name", ["point", "ant"])
def test_policies_by_environments(name):
    """vmap of vmap is one batch, and nothing depends on how a batch is cut or threaded."""
    env = envs.make(name)
    keys = jax.random.split(jax.random.key(3), 6)
    actions = jax.random.uniform(jax.random.key(4), (6, env.action_size), minval=-1)

    def one(key, action):
        after = env.step(env.reset(key), action)
        return after.obs, after.reward, after.done, after.info

    flat = jax.jit(jax.vmap(one))(keys, actions)
    nested = jax.jit(jax.vmap(jax.vmap(one)))(keys.reshape(2, 3), actions.reshape(2, 3, -1))
    mapped = jax.lax.map(lambda x: one(*x), (keys, actions))
    for other in (nested, mapped):
        for a, b in zip(jax.tree.leaves(flat), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, np.asarray(b).reshape(a.shape), rtol=0, atol=1e-5)


def test_the_same_key_gives_the_same_run():
    one, other = (rollout(envs.make("ant", num_threads=threads))[1] for threads in (1, 3))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("threads, devices, share", [(4, 2, 2), (5, 2, 3), (1, 2, 1), (4, 8, 2)])
@pytest.mark.parametrize("task, cost", [("cheetah", 0.0), ("ant", 5e-4), ("humanoid", 0.0)])
def test_devices_that_call_back_at_once_share_the_threads(task, cost, threads, devices, share, monkeypatch):
    """Two callbacks meet, and then again and again: each has threads of its own, and the states of a call alone."""
    monkeypatch.setattr(jax, "local_device_count", lambda: devices)
    env, alone = (envs.make(task, "mujoco", num_threads=threads, contact_cost=cost) for _ in range(2))
    keys = jax.random.split(jax.random.key(0), 2 * 3)
    starts = np.asarray(jax.vmap(env.reset)(keys).pipeline_state.memory).view(np.float64).reshape(2, 3, -1)
    actions = np.random.default_rng(1).uniform(-1, 1, (2, 10, 3, env.action_size)).astype(np.float32)
    met, busy, meet = threading.Barrier(2, timeout=20), set(), True
    free_pool = physics._CEngine._free_pool

    @contextlib.contextmanager
    def watched(self):
        with free_pool(self) as pool:
            assert id(pool) not in busy
            busy.add(id(pool))
            if meet:
                met.wait()  # both hold a pool
            yield pool
            busy.remove(id(pool))

    def play(engine, i):
        state = starts[i]
        for action in actions[i]:
            before, (state, charged) = state, engine.advance(state, action)
            moved = engine.moved(before, state)
        return state, charged, moved

    monkeypatch.setattr(physics._CEngine, "_free_pool", watched)
    with concurrent.futures.ThreadPoolExecutor(2) as both:
        found = list(both.map(play, [env.engine] * 2, range(2)))
    meet = False
    for i in range(2):
        jax.tree.map(np.testing.assert_array_equal, found[i], play(alone.engine, i))
    sizes = lambda engine: [len(engine.pools.get().datas) for _ in range(engine.pools.qsize())]
    assert sizes(alone.engine) == [threads] and sizes(env.engine) == [share] * 2


@pytest.mark.parametrize("name, qpos_width, qvel_std", [
    ("cheetah", 0.1, 0.1), ("hopper", 0.005, 0.005 / np.sqrt(3)), ("walker2d", 0.005, 0.005 / np.sqrt(3)),
    ("ant", 0.1, 0.1), ("ant-maze-umaze", 0.1, 0.1),
])  # fmt: skip
def test_starts_are_spread_as_stated(name, qpos_width, qvel_std):
    """U(-w, w) on qpos; on qvel the same for hopper and walker, 0.1 N(0, 1) for cheetah and ant."""
    env = envs.make(name)
    start = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), 1000)).pipeline_state
    joints = slice(7, None) if name.startswith("ant") else slice(None)
    noise = np.asarray(start.qpos - env.model.qpos0)[:, joints]
    assert 0.99 * qpos_width < np.abs(noise).max() <= qpos_width * (1 + 1e-4)
    assert noise.std() == pytest.approx(qpos_width / np.sqrt(3), rel=0.03)
    assert np.asarray(start.qvel).std() == pytest.approx(qvel_std, rel=0.03)
    normal = (np.asarray(start.qvel) > 1.8 * qvel_std).mean()  # 3.6 % of a normal, none of a uniform distribution
    assert normal == (pytest.approx(0.036, abs=0.008) if qvel_std == 0.1 else 0)


@pytest.mark.parametrize("threads", [{}, {"NPROC": "2"}])
def test_a_large_batch_of_c_mujoco_on_one_core(threads):
    """It waits for ever in jax's only thread, more often than not: a step or one error, with a remedy that works."""
    code = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax, numpy as np, envs
env, envs.host.PATIENCE = envs.make("ant"), 1.0
qpos, rest = np.tile(env.model.qpos0, (700, 1)), np.zeros((700, 1 + env.model.nv))
memory = np.concatenate([rest[:, :1], qpos, rest[:, 1:]], 1).view(np.uint32)
state = envs.physics.Physics(memory, np.float32(qpos), np.float32(rest[:, 1:]), np.zeros(700, np.float32))
step = lambda s, a: env.step(env.reset(jax.random.key(0)).replace(pipeline_state=s), a).reward
print(jax.jit(jax.vmap(step))(state, np.zeros((700, 8), np.float32)).shape)
"""
    about = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120, "env": {**os.environ, **threads}}
    done = subprocess.run([sys.executable, "-c", code], **about)
    refused = "700 environments of C MuJoCo at once on one core" in done.stderr and "Set NPROC=2" in done.stderr
    assert "(700,)" in done.stdout or (refused and not threads), done.stderr[-2000:]


def test_a_large_mjx_batch_is_refused_on_an_old_cpu(monkeypatch):
    assert jax.default_backend() == "cpu"
    monkeypatch.setattr(jax, "__version__", "0.10.2")
    envs.check_batch("mjx", MAX_MJX_ON_OLD_CPU)
    envs.check_batch("mujoco", 10**6)
    with pytest.raises(envs.InputError, match="backend='mujoco'"):
        envs.check_batch("mjx", MAX_MJX_ON_OLD_CPU + 1)
    monkeypatch.setattr(jax, "__version__", "0.11.2")
    envs.check_batch("mjx", MAX_MJX_ON_OLD_CPU + 1)
    envs.make("point").check_batch(10**6)


def test_braxs_wrappers_take_our_environments():
    import brax.envs

    env = envs.make("ant-angle-60")
    assert isinstance(env, brax.envs.Env)
    wrapped = brax.envs.training.wrap(env, episode_length=5)
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    state = jax.jit(wrapped.reset)(keys)

    def play(state, _):
        state = wrapped.step(state, jnp.ones((4, 8)))
        return state, (state.done, state.info["truncation"], state.obs)

    _, (done, truncated, obs) = jax.jit(lambda s: jax.lax.scan(play, s, None, length=7))(state)
    assert done[:, 0].tolist() == truncated[:, 0].tolist() == [0, 0, 0, 0, 1, 0, 0]
    np.testing.assert_array_equal(obs[4], state.obs)


def test_brax_worlds():
    env = envs.make("brax/fast")
    assert env.backend == "jax" and env.observation_size == 2
    state = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), 3))
    after = jax.jit(jax.vmap(env.step))(state, jnp.zeros((3, env.action_size)))
    step = envs.transition(state, jnp.zeros((3, 1)), after)
    assert not np.any(step.root_velocities)
    np.testing.assert_array_equal(env.task.feature(step), after.obs)
    assert after.reward.shape == (3,)
    np.testing.assert_array_equal(env.task.reward(step), after.reward)
    with pytest.raises(envs.InputError, match="cannot be computed from a buffer"):
        env.task.reward(step._replace(rewards=None))
    with pytest.raises(envs.InputError, match="learner without a model"):
        brax_worlds.brax_task("brax/inverted_pendulum").model_terminal(None)


# --- the tree maze ------------------------------------------------------------------------------


def test_no_wall_of_the_tree_maze_is_entered():
    _, record = rollout(envs.make("tree-maze"), num_envs=64, num_steps=200)
    positions = record[0].next_observations[..., :2]
    assert not np.any(point.inside_wall(jnp.asarray(positions)))
    assert positions[..., 1].max() > 0.5


def test_every_branch_of_the_tree_maze_can_be_reached():
    """Follow the corridors to each of the four dead ends, in fewer than the 100 steps there are."""
    env = envs.make("tree-maze")
    start, step = env.reset(jax.random.key(0)), jax.jit(env.step)
    rewards = [envs.task(f"tree-maze-end-{number}").model_reward for number in (1, 2, 3, 4)]
    for end, side, reach in ((0, -1, 0.9), (1, -1, 0.3), (2, 1, 0.3), (3, 1, 0.9)):  # of the end, from the middle
        state, used = start, 0
        for x, y in ((0.0, 0.6), (0.6, 0.6), (0.6, 1.4), (reach, 1.4), (reach, 1.9)):
            corner = 1.0 + side * x, y
            while np.abs(np.subtract(corner, state.obs[:2])).max() > 0.05 and used < 100:
                state, used = step(state, np.subtract(corner, state.obs[:2]) / tasks.TREE_DT**2), used + 1
        assert used < 100
        found = [float(reward(None, None, state.obs)) for reward in rewards]
        assert np.argmax(found) == end and found[end] > -0.15


def test_the_point_is_the_published_one():
    env = envs.make("point")
    state = env.reset(jax.random.key(0))
    np.testing.assert_array_equal(state.obs, 0.0)
    position, velocity = np.zeros(2), np.zeros(2)
    for action in np.random.default_rng(0).uniform(-1, 1, (30, 2)) + [0.6, 0.0]:
        state = env.step(state, action)
        velocity = 0.98 * velocity + 0.1 * np.clip(action, -1, 1)
        velocity /= max(1.0, np.linalg.norm(velocity))
        position = position + 0.1 * velocity
    np.testing.assert_allclose(state.obs, [*position, *velocity], atol=1e-5)
    assert np.linalg.norm(velocity) > 0.9


# --- pictures -----------------------------------------------------------------------------------


def save_play(path, env, record, layout):
    """A buffer file of random play, one episode per environment."""
    step, rewards, _, obs, next_obs = record
    if layout == "env":
        obs, next_obs = step.observations, step.next_observations
    length, num_envs = rewards.shape
    rows = lambda x: np.ascontiguousarray(np.swapaxes(x, 0, 1)).reshape(-1, *x.shape[2:])
    ends = np.tile(np.arange(length) == length - 1, num_envs)
    arrays = dict(
        observations=rows(obs), actions=rows(step.actions), rewards=rows(rewards),
        next_observations=rows(next_obs), terminals=ends & False, timeouts=ends,
        root_positions=rows(step.root_positions), root_velocities=rows(step.root_velocities),
    )  # fmt: skip
    metadata = dict(
        dataset_name=env.name, env=env.task.env, task=env.name, layout=layout,
        reward_kind="task" if env.task.has_reward else "none", task_options=env.task.options,
        dt=env.dt, episode_length=length, generator={"script": "test", "flags": {}}, seed=0,
        warmup_transitions=0,
    )  # fmt: skip
    return Path(buffers.save(path, arrays, metadata))


@pytest.fixture(scope="module")
def run_folder(recorded, tmp_path_factory):
    """A run with a point, an ant in both layouts and a cheetah."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "buffers").mkdir()
    ant = "ant-angle-60"
    for k, (name, layout) in enumerate([("point-angle-60", "task"), (ant, "env"), (ant, "task"), ("cheetah", "env")]):
        env, *record = recorded[name]
        save_play(folder / "buffers" / f"policy_{k:02d}.npz", env, record, layout)
    return folder


def test_poses_are_rebuilt_from_either_layout(recorded, run_folder):
    files = render.find_buffers(str(run_folder))
    assert len(files) == 4
    raw = recorded["ant-angle-60"][1].observations
    for path in files[1:3]:
        np.testing.assert_array_equal(render.read_episode(path, "2").qpos, raw[:, 2, :15])
    cheetah = render.read_episode(files[3])
    step = recorded["cheetah"][1]
    np.testing.assert_array_equal(cheetah.qpos[:, 0], step.root_positions[:, -1, 0])
    np.testing.assert_array_equal(cheetah.qpos[:, 1:], step.observations[:, -1, :8])
    best = int(np.argmax(recorded["point-angle-60"][2].sum(0)))
    assert f"episode {best + 1} of 4" in render.read_episode(files[0]).title
    with pytest.raises(envs.InputError, match="--episode 4"):
        render.read_episode(files[0], "4")
    with pytest.raises(envs.InputError, match="neither a buffer file nor"):
        render.find_buffers(str(run_folder / "nothing"))


def test_sticks_need_no_open_gl(run_folder):
    for path in render.find_buffers(str(run_folder))[1:]:
        frames = render.draw_sticks(render.read_episode(path), np.array([0, 50]), (160, 120))
        assert frames.shape == (2, 120, 160, 3)
        assert np.any(frames[0] != frames[1]) and frames.std() > 10


def test_all_policies_in_one_gif(run_folder, tmp_path, capsys):
    from PIL import Image

    files = render.find_buffers(str(run_folder))
    assert render.main([str(run_folder), "--together"]) == 2 and "of ant, cheetah, point" in capsys.readouterr().err
    for name, paths in {"ant": files[1:3], "cheetah": files[3:], "point": files[:1]}.items():
        (tmp_path / name).mkdir()
        for path in paths:
            shutil.copy(path, tmp_path / name)
        assert render.main([str(tmp_path / name), "--together", "--max-frames", "3"]) == 0
        with Image.open(tmp_path / name / "render" / "together.gif") as image:
            frames = [np.array(image.convert("RGB"), float) for _ in range(3) if image.seek(_) is None]
        assert len(frames) == 3 and np.abs(frames[0] - frames[2]).max() > 50 and frames[2].std() > 10


def test_render_writes_a_gif_per_policy(run_folder, tmp_path):
    from PIL import Image

    for name in ("policy_00", "policy_03"):
        shutil.copy(run_folder / "buffers" / f"{name}.npz", tmp_path)
    command = [sys.executable, "-m", "envs.render", str(tmp_path), "--html", "--max-frames", "3"]
    command += ["--width", "96", "--height", "64"]
    clean = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=clean, timeout=600)
    assert done.returncode == 0, done.stderr
    for number, name in ((1, "policy_00"), (2, "policy_03")):
        with Image.open(tmp_path / "render" / f"{name}.gif") as image:
            assert image.n_frames == 3 and image.size == (96, 64)
        assert f"[{number}/2] {name}.npz" in done.stdout
    page = (tmp_path / "render" / "policy_03.html").read_text()
    assert "<p " in page and "needs the internet" in page and "needs the internet" in done.stdout
