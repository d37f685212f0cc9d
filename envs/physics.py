"""MuJoCo robots on three engines behind one environment class.

"mujoco": C MuJoCo, stepped from inside a jitted program by a host callback that hands the whole
    batch, however many `vmap`s deep, to one thread pool. Its float64 state travels through the
    program as bits, so results are those of MuJoCo itself and x64 need not be on.
"mjx": MuJoCo's JAX port, float32, for accelerators.
"warp": the same interface over MuJoCo Warp's kernels, float32, for NVIDIA GPUs (envs/warp_engine.py).

Same XML, start, observation, reward and termination. A step that makes the simulation unstable
(not finite, or MuJoCo resets itself) keeps the pose and stops the robot: velocity 0, finite
observations, not a termination.
"""

import contextlib
import copy
import importlib.util
import pathlib
import queue
import threading
import weakref
from typing import NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import rollout

from envs import host, maze
from envs.base import Env, State, quiet_imports
from envs.errors import InputError
from envs.mjx_contacts import exact_contacts
from envs.robots import ROBOTS
from envs.task import Task

BACKENDS = ("mujoco", "mjx", "warp")
# keyword arguments of MujocoEnv that envs.make accepts
OPTIONS = ("xml", "gear", "margin_scale", "contact_cost", "num_threads", "num_contacts")
_FULL = mujoco.mjtState.mjSTATE_FULLPHYSICS


class Physics(NamedTuple):
    """State of a robot.

    memory: what the engine needs besides: C MuJoCo the bits of its float64 state, (2n,) uint32;
        MJX and Warp their solver's starting point (nv,) float32.
    qpos (nq,), qvel (nv,), contact_cost (): float32.
    """

    memory: jax.Array
    qpos: jax.Array
    qvel: jax.Array
    contact_cost: jax.Array


class MujocoEnv(Env):
    """A task on a MuJoCo robot.

    task: what is observed and paid. backend: "mujoco", "mjx", "warp", or None: one of the first two, by device.
    xml: another XML than the robot's: a name in Gymnasium's assets, or a path.
    gear: of every motor; None: the task's, else the robot's.
    margin_scale: factor on all contact margins (0.5 gives MuJoCo 2's contacts from a MuJoCo 3.5
        or later, which adds up the margins of a pair where it used to take the larger);
        None: the robot's.
    contact_cost: weight of the contact forces clipped to +-1 and squared, taken off the reward
        (Gymnasium's Ant-v5: 5e-4). C MuJoCo only, slow, and not in relabelled rewards.
    num_threads: that step the worlds; devices that call at once share them, at least one each. None: one for each core
        that this process may run on.
    num_contacts: places for contacts of one world on "warp"; None: all that the robot can have, 64 at most.
    """

    def __init__(
        self,
        task: Task,
        backend: str | None = None,
        *,
        xml: str | None = None,
        gear: float | None = None,
        margin_scale: float | None = None,
        contact_cost: float = 0.0,
        num_threads: int | None = None,
        num_contacts: int | None = None,
    ):
        if backend is None:
            backend = "mujoco" if jax.default_backend() == "cpu" else "mjx"
        if backend not in BACKENDS:
            raise InputError(f"'{task.name}' has no back end '{backend}': use one of {BACKENDS}")
        if contact_cost and backend != "mujoco":
            raise InputError("contact_cost needs backend='mujoco'")
        if num_contacts is not None and backend != "warp":
            raise InputError("num_contacts needs backend='warp': C MuJoCo and MJX have a place for every contact")
        super().__init__(task, backend)
        self.robot = ROBOTS[task.env]
        if gear is None:
            gear = task.options.get("gear", self.robot.gear)
        scale = self.robot.margin_scale if margin_scale is None else margin_scale
        self.model = load_model(xml or self.robot.xml, gear, scale, self.robot.maze)
        self._check_model(xml or self.robot.xml)
        if backend == "mujoco":
            threads = num_threads or host.cores()
            self.engine = _CEngine(self.model, self.robot.frame_skip, threads, contact_cost, self.robot.whole_body)
        elif backend == "warp":
            from envs.warp_engine import WarpEngine  # it needs packages that are not always there

            self.engine = WarpEngine(self.model, self.robot.frame_skip, num_contacts, self.robot.whole_body)
        else:
            self.engine = MjxEngine(self.model, self.robot.frame_skip, self.robot.whole_body)

    def _check_model(self, xml: str) -> None:
        size = self.model.nq + self.model.nv - self.robot.skip_qpos
        dt = self.model.opt.timestep * self.robot.frame_skip
        expected = (self.task.env_observation_size, self.task.action_size)
        if (size, self.model.nu) != expected or abs(dt - self.task.dt) > 1e-9:
            raise InputError(
                f"{xml} has {size} observed entries, {self.model.nu} motors and a control step "
                f"of {dt:g} s; '{self.task.name}' needs {expected[0]}, {expected[1]} and "
                f"{self.task.dt:g} s"
            )

    def _start(self, key: jax.Array) -> Physics:
        robot, model = self.robot, self.model
        key_qpos, key_qvel = jax.random.split(key)
        start = jnp.asarray(model.qpos0, jnp.float32)
        shape, width = (model.nq,), robot.start_qpos
        qpos = start + jax.random.uniform(key_qpos, shape, jnp.float32, -width, width)
        shape, width = (model.nv,), robot.start_qvel
        if robot.start_normal:
            qvel = width * jax.random.normal(key_qvel, shape, jnp.float32)
        else:
            qvel = jax.random.uniform(key_qvel, shape, jnp.float32, -width, width)
        if robot.start_anywhere:
            angle = jax.random.uniform(jax.random.fold_in(key_qpos, 1), minval=-jnp.pi, maxval=jnp.pi)
            qpos = qpos.at[3:7].set(maze.turn_quaternion(qpos[3:7], angle))
        return self.engine.start(qpos, qvel)

    def reset(self, key: jax.Array) -> State:
        state = super().reset(key)
        if self.robot.maze in maze.MAPS:
            goal = maze.sample_goal(self.robot.maze, jax.random.fold_in(key, 1))
            state = state.replace(info={**state.info, "goal": goal})
        return state

    def _show(self, raw_obs: jax.Array) -> Physics:
        if self.robot.maze in maze.MAPS:
            raise InputError(f"'{self.name}': a maze's goal is not observed")
        split = self.model.nq - self.robot.skip_qpos
        qpos = jnp.concatenate([jnp.zeros(self.robot.skip_qpos, jnp.float32), raw_obs[:split]])
        return self.engine.start(qpos, raw_obs[split:])

    def _advance(self, physics: Physics, action: jax.Array) -> tuple[Physics, jax.Array]:
        return self.engine.step(physics, action)

    def _read(self, physics: Physics) -> tuple[jax.Array, jax.Array]:
        qvel = physics.qvel
        if self.robot.clip_qvel is not None:
            qvel = jnp.clip(qvel, -self.robot.clip_qvel, self.robot.clip_qvel)
        raw_obs = jnp.concatenate([physics.qpos[self.robot.skip_qpos :], qvel])
        return raw_obs, physics.qpos[:2]

    def _charge(self, physics: Physics) -> jax.Array:
        return physics.contact_cost


def asset_path(xml: str) -> str:
    """Return the path of an XML: a path, or a name in the installed Gymnasium's assets."""
    if pathlib.Path(xml).exists():
        return xml
    package = importlib.util.find_spec("gymnasium")
    if package is None:
        raise InputError("the robots' XMLs come with gymnasium: pip install gymnasium")
    path = pathlib.Path(package.submodule_search_locations[0], "envs/mujoco/assets", xml)
    if not path.exists():
        raise InputError(f"no XML file '{xml}', neither as a path nor in gymnasium's assets")
    return str(path)


def load_model(xml: str, gear: float | None = None, margin_scale: float = 1.0, in_maze: str = "") -> mujoco.MjModel:
    """Load an XML (as in asset_path), put it in a maze if named, set all gears, scale all contact margins."""
    spec = mujoco.MjSpec.from_file(asset_path(xml))
    if in_maze:
        maze.edit_spec(spec, in_maze)
    # MuJoCo warns, on the screen and in a log file, when it sets a total mass while compiling.
    total_mass, spec.compiler.settotalmass = spec.compiler.settotalmass, -1
    model = spec.compile()
    if total_mass > 0:
        mujoco.mj_setTotalmass(model, total_mass)
        mujoco.mj_setConst(model, mujoco.MjData(model))
    if gear is not None:
        model.actuator_gear[:, 0] = gear
    model.geom_margin[:] *= margin_scale
    return model


def _control_range(model: mujoco.MjModel) -> tuple[np.ndarray, np.ndarray]:
    """Return centre and half width (nu,) of the motors' range: control = centre + half action."""
    low, high = model.actuator_ctrlrange.T
    return (low + high) / 2, (high - low) / 2


class _Pool:
    """Threads of C MuJoCo for one callback at a time; of one thread the caller's own, which need not be woken."""

    def __init__(self, model: mujoco.MjModel, num_threads: int):
        self.model = model
        self.datas = [mujoco.MjData(model) for _ in range(num_threads)]
        self.rollout = rollout.Rollout(nthread=num_threads if num_threads > 1 else 0)
        weakref.finalize(self, self.rollout.close)  # ends its threads with the pool, or at exit
        self.rooms = {}  # batch size -> arrays of a rollout, kept because allocating them costs as much as a step

    def roll(self, before: np.ndarray, control: np.ndarray, steps: int) -> np.ndarray:
        """Step states (B, n) under one control (B, A) `steps` times -> states (B, n)."""
        batch = len(before)
        if batch not in self.rooms:
            room = lambda width: np.empty((batch, steps, width))
            widths = self.model.nu, before.shape[1], self.model.nsensordata
            self.rooms[batch] = [self.model] * batch, *map(room, widths)
        models, repeated, states, sensors = self.rooms[batch]
        repeated[:] = control[:, None]
        self.rollout.rollout(
            models, self.datas, before, repeated, nstep=steps, state=states, sensordata=sensors, skip_checks=True
        )
        return states[:, -1].copy()


class _CEngine:
    """C MuJoCo and its threads; start and step are functions of one environment."""

    def __init__(
        self, model: mujoco.MjModel, frame_skip: int, num_threads: int, contact_cost: float, whole_body: bool = False
    ):
        self.model = model
        self.frame_skip = frame_skip
        self.whole_body = whole_body
        self.dt = model.opt.timestep * frame_skip
        self.contact_cost = contact_cost
        self.size = mujoco.mj_stateSize(model, _FULL)  # time, qpos, qvel
        if self.size != 1 + model.nq + model.nv:
            raise InputError("an XML with actuator states or plugins cannot be used here")
        self.centre, self.half = _control_range(model)
        self.one_thread = host.one_thread()
        self.pools, self.sharing = queue.SimpleQueue(), threading.Lock()
        self.num_threads, self.num_pools = num_threads, 1
        self.pools.put(_Pool(model, num_threads))
        self.shapes = (
            jax.ShapeDtypeStruct((2 * self.size,), jnp.uint32),
            jax.ShapeDtypeStruct((self.size - 1 + 3,), jnp.float32),  # qpos, qvel, contact cost, velocity
        )

    def start(self, qpos: jax.Array, qvel: jax.Array) -> Physics:
        state = jnp.concatenate([jnp.zeros((1,), jnp.float32), qpos, qvel])
        return Physics(double_bits(state), qpos, qvel, jnp.zeros((), jnp.float32))

    def step(self, physics: Physics, action: jax.Array) -> tuple[Physics, jax.Array]:
        # One array in and two out: each array that crosses to the host and back has its price.
        packed = jnp.concatenate([physics.memory, jax.lax.bitcast_convert_type(action, jnp.uint32)], -1)
        bits, floats = jax.pure_callback(self.host_step, self.shapes, packed, vmap_method="broadcast_all")
        qpos, qvel, cost, velocity = jnp.split(floats, [self.model.nq, self.size - 1, self.size], -1)
        return Physics(bits, qpos, qvel, cost[0]), velocity

    def host_step(self, packed):
        """Step a batch. packed (..., 2n + A) uint32, bits of states and actions -> arrays of self.shapes."""
        if self.one_thread:
            host.wait_for(packed, "C MuJoCo")
        packed = np.asarray(packed)
        lead, flat = packed.shape[:-1], packed.reshape(-1, packed.shape[-1])
        before = flat[:, : 2 * self.size].copy().view(np.float64)
        after, cost = self.advance(before, flat[:, 2 * self.size :].view(np.float32))
        floats = np.empty((len(flat), self.size + 2), np.float32)
        floats[:, : self.size - 1] = after[:, 1:]
        floats[:, self.size - 1] = cost
        floats[:, self.size :] = self.moved(before, after) / self.dt
        arrays = after.view(np.uint32), floats
        return tuple(part.reshape(lead + part.shape[1:]) for part in arrays)

    def moved(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """How far the root came (B, 2) from states to states (B, n)."""
        if not self.whole_body:
            return after[:, 1:3] - before[:, 1:3]
        return self._centres_of_mass(after) - self._centres_of_mass(before)

    @contextlib.contextmanager
    def _free_pool(self):
        """A pool that no other callback has. All threads are in one, until devices of this process call at once: then
        there are as many pools as ever called together, and each has its share of the threads."""
        try:
            pool = self.pools.get_nowait()
        except queue.Empty:
            with self.sharing:
                one_more = self.num_pools < jax.local_device_count()
                self.num_pools += one_more
            pool = _Pool(self.model, self._share()) if one_more else self.pools.get()
        try:
            yield pool
        finally:
            try:
                pool = pool if len(pool.datas) == self._share() else _Pool(self.model, self._share())
            finally:
                self.pools.put(pool)

    def _share(self):
        """Threads of a pool."""
        return -(-self.num_threads // self.num_pools)

    def _centres_of_mass(self, states: np.ndarray) -> np.ndarray:
        found = np.empty((len(states), 2))
        with self._free_pool() as pool:
            data = pool.datas[0]
            for i, state in enumerate(states):
                data.qpos[:] = state[1 : 1 + self.model.nq]
                mujoco.mj_kinematics(self.model, data)
                mujoco.mj_comPos(self.model, data)
                found[i] = data.subtree_com[0, :2]
        return found

    def advance(self, before: np.ndarray, actions: np.ndarray):
        """One control step. before (B, n): time, qpos, qvel in float64; actions (B, A) -> states (B, n), costs."""
        control = self.centre + self.half * actions
        with self._free_pool() as pool:
            if self.contact_cost:
                after, cost = self._step_with_contacts(pool.datas[0], before, control)
            else:
                after, cost = pool.roll(before, control, self.frame_skip), 0.0
        self._hold_unstable(before, after)
        return after, cost

    def _step_with_contacts(self, data: mujoco.MjData, before: np.ndarray, control: np.ndarray):
        """Step one by one, since only MjData holds the contact forces. -> states, costs."""
        after, cost = np.empty_like(before), np.zeros(len(before))
        for i in range(len(before)):
            mujoco.mj_resetData(self.model, data)
            mujoco.mj_setState(self.model, data, before[i], _FULL)
            data.ctrl[:] = control[i]
            mujoco.mj_step(self.model, data, self.frame_skip)
            mujoco.mj_rnePostConstraint(self.model, data)
            mujoco.mj_getState(self.model, data, after[i], _FULL)
            cost[i] = self.contact_cost * np.sum(np.clip(data.cfrc_ext, -1.0, 1.0) ** 2)
        return after, cost

    def _hold_unstable(self, before: np.ndarray, after: np.ndarray) -> None:
        """Put unstable rows back to their pose at rest, in place.

        MuJoCo resets an unstable simulation to its default pose and time 0, and a rollout stops
        there, so a clock that is not dt ahead gives it away.
        """
        elapsed = after[:, 0] - before[:, 0]
        on_time = np.abs(elapsed - self.dt) < 0.5 * self.model.opt.timestep
        unstable = ~(on_time & np.isfinite(after).all(axis=1))
        if unstable.any():
            after[unstable] = before[unstable]
            after[unstable, 0] += self.dt
            after[unstable, 1 + self.model.nq :] = 0.0


class MjxEngine:
    """MJX, float32; start and step are functions of one environment."""

    impl = "jax"

    def __init__(self, model: mujoco.MjModel, frame_skip: int, whole_body: bool = False):
        with quiet_imports():
            from mujoco import mjx
        self.mjx = mjx
        self.frame_skip = frame_skip
        self.dt = model.opt.timestep * frame_skip
        if model.opt.solver == mujoco.mjtSolver.mjSOL_PGS:  # the humanoid's, which is in C MuJoCo only
            model = copy.copy(model)
            model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON  # ends where PGS would, given more iterations
        self.host_model = model
        self.model = mjx.put_model(model, impl=self.impl)
        self.template = mjx.make_data(model, impl=self.impl)
        self.poses = (mjx.put_model(model, impl="jax"), mjx.make_data(model, impl="jax")) if whole_body else None
        centre, half = _control_range(model)
        self.centre, self.half = jnp.asarray(centre, jnp.float32), jnp.asarray(half, jnp.float32)

    def start(self, qpos: jax.Array, qvel: jax.Array) -> Physics:
        return Physics(jnp.zeros_like(qvel), qpos, qvel, jnp.zeros((), jnp.float32))

    def step(self, physics: Physics, action: jax.Array) -> tuple[Physics, jax.Array]:
        control = self.centre + self.half * action
        qpos, qvel, memory = self.substeps(physics.qpos, physics.qvel, physics.memory, control)
        now = Physics(memory, qpos, qvel, physics.contact_cost)
        at_rest = Physics(
            jnp.zeros_like(physics.memory),
            physics.qpos,
            jnp.zeros_like(physics.qvel),
            physics.contact_cost,
        )
        stable = jnp.all(jnp.isfinite(qpos)) & jnp.all(jnp.isfinite(qvel))
        now = jax.tree.map(lambda new, old: jnp.where(stable, new, old), now, at_rest)
        return now, (self.root(now.qpos) - self.root(physics.qpos)) / self.dt

    def root(self, qpos):
        """Where the robot is (2,)."""
        if self.poses is None:
            return qpos[:2]
        model, data = self.poses
        data = self.mjx.kinematics(model, data.replace(qpos=qpos))
        return self.mjx.com_pos(model, data).subtree_com[0, :2]

    def substeps(self, qpos, qvel, memory, control):
        """The substeps of a control step -> qpos, qvel, memory."""
        data = self.template.replace(qpos=qpos, qvel=qvel, qacc_warmstart=memory, ctrl=control)

        def substep(data, _):
            # GPUs since Ampere would multiply matrices with 10 bits of mantissa, which is too few for contacts.
            with exact_contacts(), jax.default_matmul_precision("highest"):
                return self.mjx.step(self.model, data), None

        data, _ = jax.lax.scan(substep, data, None, length=self.frame_skip)
        return data.qpos, data.qvel, data.qacc_warmstart


def double_bits(values: jax.Array) -> jax.Array:
    """Return the float64 of each float32 (n,) as bits: (2n,) uint32, low word first.

    Exact; subnormal numbers become 0. Done on integers, so that x64 need not be on.
    """
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    sign, exponent, mantissa = (bits >> 31) << 31, (bits >> 23) & 0xFF, bits & 0x7FFFFF
    high = sign | ((exponent + (1023 - 127)) << 20) | (mantissa >> 3)
    low = mantissa << 29
    words = jnp.stack([low, high], axis=-1)
    return jnp.where((exponent == 0)[..., None], 0, words).reshape(*values.shape[:-1], -1)
