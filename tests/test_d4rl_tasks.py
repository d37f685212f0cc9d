"""The tasks that D4RL's files came from: physics of MuJoCo 2.2, terminations, scores, mazes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

import envs
from envs import maze, mjx_contacts, physics, robots, tasks
from envs.base import quiet_imports
from tests.test_envs import state_at

GOLDEN = Path(__file__).parent / "golden"


def recorded(name):
    with np.load(GOLDEN / f"envs_{name}_mj220.npz", allow_pickle=False) as file:
        return dict(file)


def d4rl_env(name):
    """The registered task; for the ant, which D4RL has only in mazes and with contact costs, its bare physics."""
    if name == "ant":
        task = tasks.forward_task("ant", ctrl_cost=0.5)
        return physics.MujocoEnv(task, "mujoco", gear=150.0, margin_scale=robots.ROBOTS["ant-maze-umaze"].margin_scale)
    return envs.make(name)


@pytest.mark.parametrize("name, steps, tolerance", [("halfcheetah", 100, 1e-4), ("hopper", 100, 1e-6),
                                                    ("walker2d", 100, 1e-6), ("ant", 10, 1e-6)])  # fmt: skip
def test_open_loop_is_that_of_mujoco_2(name, steps, tolerance):
    env, data = d4rl_env(name), recorded(name)
    start = state_at(env, data["ol_qpos"][:1], data["ol_qvel"][:1])

    def advance(state, action):
        state = jax.vmap(env.step)(state, action[None])
        return state, state.pipeline_state.qpos[0]

    path = jax.jit(lambda s, a: jax.lax.scan(advance, s, a)[1])(start, data["ol_action"][:steps])
    np.testing.assert_allclose(path, data["ol_qpos"][1 : steps + 1], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["halfcheetah", "hopper", "walker2d", "ant"])
def test_one_step_is_that_of_mujoco_2(name):
    """And rewards and ends follow from the states."""
    env, data = d4rl_env(name), recorded(name)
    after = jax.jit(jax.vmap(env.step))(state_at(env, data["qpos"], data["qvel"]), data["action"])
    now = jax.tree.map(np.asarray, after.pipeline_state)
    np.testing.assert_allclose(now.qpos, data["next_qpos"], rtol=0, atol=1.5e-7)
    np.testing.assert_allclose(now.qvel, data["next_qvel"], rtol=0, atol=4e-6)
    if name == "ant":  # no task of D4RL's
        return
    z, angle = data["next_qpos"][:, 1], data["next_qpos"][:, 2]
    rest = np.concatenate([data["next_qpos"][:, 2:], data["next_qvel"]], 1)
    healthy = {
        "halfcheetah": np.ones(len(z), bool),
        "hopper": (np.abs(rest) < 100).all(1) & (z > 0.7) & (np.abs(angle) < 0.2),
        "walker2d": (z > 0.8) & (z < 2.0) & (np.abs(angle) < 1.0),
    }[name]
    np.testing.assert_array_equal(after.done > 0, ~healthy)
    speed = (data["next_qpos"][:, 0] - data["qpos"][:, 0]) / env.dt
    cost = (0.1 if name == "halfcheetah" else 1e-3) * (data["action"] ** 2).sum(1)
    bonus = 0.0 if name == "halfcheetah" else 1.0  # also on the step that ends an episode
    np.testing.assert_allclose(after.reward, speed - cost + bonus, rtol=0, atol=5e-6)
    assert after.obs.shape[1] == env.observation_size == len(data["qpos"][0]) - 1 + len(data["qvel"][0])


def test_scores_are_d4rls():
    """100 (R - random) / (expert - random) with the constants of d4rl/infos.py."""
    for name, random, expert in (
        ("halfcheetah", -280.178953, 12135.0), ("hopper", -20.272305, 3234.3), ("walker2d", 1.629008, 4592.3),
        ("ant-maze-umaze", 0.0, 1.0),
    ):  # fmt: skip
        score = envs.task(name).normalized_score
        assert score(random) == pytest.approx(0.0) and score(expert) == pytest.approx(100.0)
    cheetah = envs.task("halfcheetah")
    assert cheetah.normalized_score(4659.0) == pytest.approx(39.78, abs=0.01)
    assert (cheetah.env, cheetah.episode_length) == (envs.task("cheetah").env, 1000)  # a buffer of one serves both


# --- mazes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, goal, num_walls, most", [
    ("umaze", (0, 8), 18, 5), ("medium", (20, 20), 38, 13), ("large", (32, 24), 62, 17),
])  # fmt: skip
def test_walls_cover_the_map_and_nothing_else(name, goal, num_walls, most):
    grid = np.array([list(row) for row in maze.MAPS[name]])
    rows, columns = np.indices(grid.shape)
    centres = maze.position(name, rows, columns)
    boxes = np.array(maze.walls(name))
    inside = (np.abs(centres[..., None, :] - boxes[:, :2]) < boxes[:, 2:]).all(-1).sum(-1)
    np.testing.assert_array_equal(inside, grid == "#")  # once each, so that no two overlap
    assert (grid == "#").sum() == num_walls and len(boxes) <= most
    np.testing.assert_array_equal(maze.position(name, *maze.find(name, "G")), goal)
    np.testing.assert_array_equal(maze.cell(name, centres), (rows, columns))


@pytest.mark.parametrize("name", maze.MAPS)
def test_the_mazes_have_d4rls_ant(name):
    """Its own timestep, motors, solref and solimp (not Gymnasium's), in walls 2 m high."""
    env = envs.make(f"ant-maze-{name}")
    model = env.model
    assert model.opt.timestep == 0.02 and env.robot.frame_skip == 5 and env.task.dt == 0.1
    force = model.actuator_gear[:, 0] * model.actuator_ctrlrange[:, 1]
    np.testing.assert_array_equal(force, 30.0)
    np.testing.assert_allclose(model.geom_solref, np.tile([0.02, 1.0], (model.ngeom, 1)))
    np.testing.assert_allclose(model.geom_solimp[:, :3], np.tile([0.8, 0.8, 0.01], (model.ngeom, 1)))
    boxes = model.geom_type == mujoco.mjtGeom.mjGEOM_BOX
    assert boxes.sum() == len(maze.walls(name))
    assert (model.geom_pos[boxes, 2] == 1).all() and (model.geom_size[boxes, 2] == 1).all()
    np.testing.assert_allclose(model.geom_margin, 0.5 * 0.01)  # MuJoCo adds up the two of a contact


@pytest.fixture(scope="module")
def umaze():
    """The world, 16 starts in it, and its step of as many."""
    env = envs.make("ant-maze-umaze")
    starts = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), 16))
    return env, starts, jax.jit(jax.vmap(env.step))


def test_the_ant_does_not_pass_a_wall(umaze):
    """Thrown at the wall 2 m to its left it stops there; along the corridor it flies on."""
    env, starts, step = umaze
    qvel = np.zeros((16, env.model.nv))
    qvel[:, 0] = np.where(np.arange(16) % 2, 8.0, -8.0)
    state = state_at(env, np.tile(env.model.qpos0, (16, 1)), qvel)
    state, path = state.replace(info={**state.info, "goal": starts.info["goal"]}), []
    for _ in range(20):
        state = step(state, np.zeros((16, 8), np.float32))
        path.append(np.asarray(state.info["root_position"][:, 0]))
    lowest, last = np.min(path, axis=0), path[-1]
    assert ((lowest[::2] > -2.0) & (lowest[::2] < -0.5)).all()  # the torso's sphere is 0.25 m wide
    assert (last[1::2] > 2.5).all()


def test_goals_are_drawn_anew_and_as_in_d4rl(umaze):
    env, starts, _ = umaze
    keys = jax.random.split(jax.random.key(0), 2000)
    goals = np.asarray(jax.vmap(lambda k: maze.sample_goal("umaze", k))(keys)) - [0, 8]
    assert goals.min() >= 0 and goals.max() <= 1.5
    np.testing.assert_allclose(goals.mean(0), 0.75, atol=0.03)
    np.testing.assert_allclose(goals.var(0), (1 + 0.25) / 12, atol=0.01)
    assert len(np.unique(starts.info["goal"][:, 0])) == 16
    assert starts.obs.shape == (16, 29) and env.dt == pytest.approx(0.1)


def test_the_environment_pays_what_relabelling_pays(umaze):
    env, starts, step = umaze
    near = starts.info["root_position"] + jnp.array([0.5, 0.0])  # its edge is here: some move out of it
    state = starts.replace(info={**starts.info, "goal": near})
    action = jax.random.uniform(jax.random.key(2), (16, 8), minval=-1.0)
    after = step(state, action)
    row = envs.transition(state, action, after)
    np.testing.assert_array_equal(env.task.reward(row), after.reward)
    np.testing.assert_array_equal(env.task.terminal(row), after.done > 0)
    assert 0 < float(after.reward.sum()) < 16


def test_reaching_the_goal_pays_once_and_ends():
    task = envs.task("ant-maze-umaze")
    where = np.zeros((3, 29), np.float32)
    where[:, :2] = [[0.0, 7.6], [0.0, 7.4], [0.3, 8.3]]
    two, goals = where[:, :2], np.tile(np.float32([0.0, 8.0]), (3, 1))
    step = envs.Transition(where, np.zeros((3, 8)), where, two, two, goals)
    np.testing.assert_array_equal(task.reward(step), [1, 0, 1])
    np.testing.assert_array_equal(task.terminal(step), [True, False, True])
    with pytest.raises(envs.InputError, match="no goals"):
        task.reward(step._replace(goals=None))
    assert [envs.task(f"ant-maze-{m}").eval_length for m in maze.MAPS] == [700, 1000, 1000]


@pytest.fixture(scope="module")
def contacts_by_mjx():
    """A function: model, poses (N, nq) -> geoms, distances, points and frames of all contacts there could be."""
    with quiet_imports():
        from mujoco import mjx
        from mujoco.mjx._src import collision_driver

    def contacts(model, poses):
        on_mjx = mjx.put_model(model, impl="jax")
        template = mjx.make_data(on_mjx, impl="jax")

        def at(pose):
            data = mjx.kinematics(on_mjx, template.replace(qpos=pose))
            with mjx_contacts.exact_contacts():
                found = collision_driver.collision(on_mjx, data)._impl.contact
            return found.geom, found.dist, found.pos, found.frame.reshape(-1, 9)

        return map(np.asarray, jax.jit(jax.vmap(at))(jnp.float32(poses)))

    return contacts


def test_mjx_meets_walls_as_mujoco_does(contacts_by_mjx):
    """Every contact of a leg or torso with a wall, within the margin as well as inside, and no other one.

    In the corner where the ant starts and around an edge that juts out, poses at random, none with a leg's axis inside.
    MJX has room for few contacts: one box per wall cell would need 475.
    """
    name = "large"
    model = physics.load_model("ant.xml", 30.0, 0.5, name)
    rng, num, c_data = np.random.default_rng(0), 1000, mujoco.MjData(model)
    grid = np.pad([[c == "#" for c in row] for row in maze.MAPS[name]], 1)
    row, column = next(  # a wall's cell whose right side and one end are free: its corner juts out
        (i, j) for i, j in np.argwhere(grid[1:-1, 1:-1])
        if 0 < i < len(grid) - 3 and not grid[i + 1, j + 2] and not grid[i + 2, j + 1] and not grid[i + 2, j + 2]
    )  # fmt: skip
    edge = maze.position(name, row, column) + maze.CELL / 2
    poses = np.tile(model.qpos0, (num, 1))
    poses[:, :2] = np.where(np.arange(num)[:, None] < num // 2, [-1.1, -1.1], edge + [0.5, 0.5])
    poses[:, :2] += rng.uniform(-0.3, 0.3, (num, 2))
    yaw = rng.uniform(-np.pi, np.pi, num)
    poses[:, 3:7] = np.stack([np.cos(yaw / 2), 0 * yaw, 0 * yaw, np.sin(yaw / 2)], -1)
    joints = model.jnt_range[1:]
    poses[:, 7:] = rng.uniform(joints[:, 0], joints[:, 1], (num, 8))
    expected = []
    for pose in poses:
        c_data.qpos[:] = pose
        mujoco.mj_forward(model, c_data)
        at_walls = [c for c in c_data.contact if model.geom_type[c.geom].max() == mujoco.mjtGeom.mjGEOM_BOX]
        expected.append([(*c.geom, c.dist, *c.pos, *c.frame) for c in at_walls])
    keep = [i for i, rows in enumerate(expected) if rows and min(row[2] for row in rows) > -0.08]
    assert len(keep) > 100 and any(len(expected[i]) > 2 for i in keep)

    geom, dist, pos, frame = contacts_by_mjx(model, poses[keep])
    assert dist.shape == (len(keep), maze.CONTACTS)
    margin = 0.01  # of two geoms, halved: MuJoCo 2's
    active = (dist < margin) & (model.geom_type[geom].max(-1) == mujoco.mjtGeom.mjGEOM_BOX)
    for i, k in enumerate(keep):
        found = np.column_stack([geom[i], dist[i], pos[i], frame[i]])[active[i]]
        found, rows = (np.array(sorted(x, key=lambda row: tuple(row[:3]))) for x in (found.tolist(), expected[k]))
        np.testing.assert_allclose(found, rows, atol=3e-5, err_msg=f"pose {k}")


def test_mjx_meets_a_ball_and_a_box_as_mujoco_does(contacts_by_mjx):
    """A turned box; centres outside and in, beside faces, edges and corners."""
    box = '<geom type="box" size=".5 .3 1" pos=".1 -.2 .3" euler="20 -30 50" margin=".05"/>'
    ball = '<body><freejoint/><geom type="sphere" size=".25" margin=".05"/></body>'
    model = mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{box}{ball}</worldbody></mujoco>")
    data, poses = mujoco.MjData(model), np.tile(model.qpos0, (400, 1))
    poses[:, :3] = np.random.default_rng(0).uniform(-1.2, 1.2, (400, 3))
    _, dist, pos, frame = contacts_by_mjx(model, poses)
    found, touching = np.column_stack([dist, pos[:, 0], frame[:, 0]]), 0
    for pose, row in zip(poses, found, strict=True):
        data.qpos[:] = pose
        mujoco.mj_forward(model, data)
        assert (row[0] < 0.1) == data.ncon
        for c in data.contact:
            touching += 1
            np.testing.assert_allclose(row, [c.dist, *c.pos, *c.frame], atol=2e-6)
    assert 100 < touching < 300
