"""The environment interface: brax's `Env` and `State`, field for field, without importing brax.

Importing brax pulls in two physics engines and prints to the screen; a point robot needs neither.
What brax's own wrappers, training code and renderers use of an environment is here under the same
names, so they take these environments as they are (tests/test_envs.py wraps one).

A world implements three functions on its own physics state; everything a task decides (what is
observed, the reward, what ends an episode) is applied here, once, for every world.
"""

import abc
import contextlib
import dataclasses
import io
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from envs.errors import InputError
from envs.task import Task, Transition

# Largest batch of MJX environments allowed on a CPU with jax before 0.11: its thread pool can
# lock up for good when one program factorises several large batches of matrices at once.
MAX_MJX_ON_OLD_CPU = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """State of one environment (any leading shape after `vmap`).

    pipeline_state: the world's physics; obs (S,) float32: what the task observes;
    reward, done (): float32, done is 1 for a true termination and never for a time limit;
    metrics: {}; info: raw_obs (S_world,), root_position (2,) of THIS state, root_velocity (2,):
    the displacement over the step that led here / dt (zeros after a reset); goal (2,) in mazes with one; reward,
    terminal () float32 in worlds with a reward and an end of their own.
    """

    pipeline_state: Any
    obs: jax.Array
    reward: jax.Array
    done: jax.Array
    metrics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    info: dict[str, Any] = dataclasses.field(default_factory=dict)

    def replace(self, **changes) -> "State":
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


class Env(abc.ABC):
    """One environment, unbatched and pure: `jit`, `vmap` and `scan` it. It never resets itself."""

    def __init__(self, task: Task, backend: str):
        self.task = task
        self.name = task.name
        self._backend = backend

    @abc.abstractmethod
    def _start(self, key: jax.Array) -> Any:
        """Draw a physics state from the start distribution."""

    @abc.abstractmethod
    def _advance(self, physics: Any, action: jax.Array) -> tuple[Any, jax.Array]:
        """One control step: -> (physics, displacement of the root / dt (2,) float32)."""

    @abc.abstractmethod
    def _read(self, physics: Any) -> tuple[jax.Array, jax.Array]:
        """-> (raw observation (S_world,), root position (2,)), float32."""

    def _charge(self, physics: Any) -> jax.Array:
        """Return a cost that only the physics knows, taken off the reward; none by default."""
        return jnp.zeros((), jnp.float32)

    def _own(self, physics: Any) -> dict[str, jax.Array]:
        """Return reward and terminal (), float32, of the step that led here, where the world has its own."""
        return {}

    def reset(self, key: jax.Array) -> State:
        """Start an episode. key: one JAX key, typed or raw."""
        return self._first(self._start(key))

    def restart(self, state: State, key: jax.Array) -> State:
        """Return the state as it is, or where its episode has terminated `reset(key)`."""
        return self._unless_ended(state, self.reset(key))

    def _unless_ended(self, state: State, fresh: State) -> State:
        return jax.tree.map(lambda new, old: jnp.where(state.done > 0.5, new, old), fresh, state)

    def _first(self, physics: Any) -> State:
        raw_obs, position = self._read(physics)
        info = {
            "raw_obs": raw_obs,
            "root_position": position,
            "root_velocity": jnp.zeros((2,), jnp.float32),
            **self._own(physics),
        }
        zero = jnp.zeros((), jnp.float32)
        return State(physics, self.task.observe(raw_obs), zero, zero, {}, info)

    def _show(self, raw_obs: jax.Array) -> Any:
        """Return the physics that a raw observation (S_world,) shows; InputError where it does not show all."""
        raise InputError(f"the observations of '{self.name}' do not show the whole state of its world")

    def from_observation(self, obs: jax.Array) -> State:
        """Return the state that an observation (S,) of the task shows, at the origin if the task hides where it is.

        Not shown, and not missed here: the solver's memory, and how far velocities are beyond their clip. InputError
        where observations hide more than that.
        """
        hidden = self.task.env_observation_size - self.task.observation_size
        numbers = np.arange(self.task.env_observation_size)
        if not np.array_equal(self.task.observe(numbers), numbers[hidden:]) or hidden > 2:
            raise InputError(f"the observations of '{self.name}' do not show the whole state of its world")
        physics = self._show(jnp.concatenate([jnp.zeros(hidden, jnp.float32), jnp.asarray(obs, jnp.float32)]))
        raw_obs, position = self._read(physics)
        zero, still = jnp.zeros((), jnp.float32), jnp.zeros((2,), jnp.float32)
        info = {"raw_obs": raw_obs, "root_position": position, "root_velocity": still}
        return State(physics, self.task.observe(raw_obs), zero, zero, {}, info)

    def step(self, state: State, action: jax.Array) -> State:
        """Advance by one control step of `dt` seconds. action (A,), clipped to [-1, 1]."""
        action = jnp.clip(jnp.asarray(action, jnp.float32), -1.0, 1.0)
        physics, velocity = self._advance(state.pipeline_state, action)
        raw_obs, position = self._read(physics)
        own = self._own(physics)
        now = {"raw_obs": raw_obs, "root_position": position, "root_velocity": velocity, **own}
        before = state.info
        step = Transition(
            before["raw_obs"], action, raw_obs, before["root_position"], velocity, before.get("goal"),
            own.get("reward"), own.get("terminal"),
        )  # fmt: skip
        return State(
            pipeline_state=physics,
            obs=self.task.observe(raw_obs),
            reward=self.task.reward(step).astype(jnp.float32) - self._charge(physics),
            done=self.task.terminal(step).astype(jnp.float32),
            metrics=state.metrics,
            info={**before, **now},
        )

    def check_batch(self, num_envs: int) -> None:
        """Refuse (InputError) a batch of environments that this machine cannot step."""
        check_batch(self._backend, num_envs)

    @property
    def observation_size(self) -> int:
        return self.task.observation_size

    @property
    def action_size(self) -> int:
        return self.task.action_size

    @property
    def dt(self) -> float:
        return self.task.dt

    @property
    def episode_length(self) -> int:
        return self.task.episode_length

    @property
    def backend(self) -> str:
        return self._backend

    @property
    def unwrapped(self) -> "Env":
        return self


def transition(state: State, action: jax.Array, next_state: State) -> Transition:
    """Return what a buffer records of `next_state = step(state, action)`, raw, at any shape."""
    return Transition(
        observations=state.info["raw_obs"],
        actions=jnp.clip(action, -1.0, 1.0),
        next_observations=next_state.info["raw_obs"],
        root_positions=state.info["root_position"],
        root_velocities=next_state.info["root_velocity"],
        goals=state.info.get("goal"),
        rewards=next_state.info.get("reward"),
        terminals=next_state.info.get("terminal"),
    )


def check_batch(backend: str, num_envs: int) -> None:
    """Refuse (InputError) more MJX environments than an old jax can step on a CPU."""
    if backend != "mjx" or num_envs <= MAX_MJX_ON_OLD_CPU or jax.default_backend() != "cpu":
        return
    version = tuple(int(part) for part in jax.__version__.split(".")[:2])
    if version < (0, 11):
        raise InputError(
            f"{num_envs} environments with backend='mjx' on a CPU can hang for good under jax "
            f"{jax.__version__} (its batched matrix factorisations wait for one another above "
            f"{MAX_MJX_ON_OLD_CPU}): use backend='mujoco' (the CPU default, and 30 times "
            "faster there), fewer environments, or Python 3.12 with jax 0.11 or newer"
        )


@contextlib.contextmanager
def quiet_imports():
    """Silence what brax and MJX print and warn while they are imported, and nothing else."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
