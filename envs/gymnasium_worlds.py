"""Any Gymnasium environment with a Box of observations and a Box of actions, as `gym:Name-v0` or `gym:module:Name-v0`.

The environments live on the host: a jitted program calls back with a whole batch, and each is stepped by Gymnasium's
own code, one after another, without its time limit and without an autoreset. Every episode begins with
`reset(seed=seed_of(key))`, so that a rollout is a function of its keys. What an environment keeps to itself (Pendulum's
angle, a simulator) stays on the host and goes forward only: a State can be stepped once, unless it is a reset's.
"""

import jax
import jax.numpy as jnp

from envs.base import Env
from envs.errors import InputError
from envs.gymnasium_pool import Pool, spaces
from envs.own import OPTIONS, own_task
from envs.task import Task
from envs.tasks import check_options

DEFAULT_LENGTH = 1000  # steps, of an environment that has no limit


def seed_of(key: jax.Array) -> jax.Array:
    """Return the seed () int32, at least 0, that an environment is reset with for a JAX key."""
    return (jax.random.bits(key, (), jnp.uint32) >> 1).astype(jnp.int32)


class GymEnv(Env):
    """A Gymnasium environment, by its name. options: episode_length."""

    def __init__(self, name: str, backend: str | None = None, **options):
        if backend not in (None, "gymnasium"):
            raise InputError(f"'{name}' has one back end, 'gymnasium'; asked for '{backend}': leave --backend out")
        super().__init__(gym_task(name, **options), "gymnasium")
        self.pool = Pool(name, self.task.episode_length)

    def _start(self, key):
        return self.pool.reset(seed_of(key))

    def restart(self, state, key):
        fresh = self._first(
            self.pool.reset(seed_of(key), state.done > 0.5)
        )  # a reset of each would cost as a step does
        return self._unless_ended(state, fresh)

    def _advance(self, physics, action):
        return self.pool.step(physics, action), jnp.zeros((2,), jnp.float32)

    def _read(self, physics):
        return physics.obs, jnp.zeros((2,), jnp.float32)

    def _own(self, physics):
        return {"reward": physics.reward, "terminal": physics.terminal}


def gym_task(name: str, **options) -> Task:
    """Return the task of gym:<name>. episode_length: steps; by default the environment's limit, or 1000."""
    check_options(name, options, OPTIONS)
    space = spaces(name)
    length = int(options.get("episode_length", space.limit or DEFAULT_LENGTH))
    if length < 1:
        raise InputError(f"'{name}': episode_length {length}: must be at least 1")
    own = {"options": {"episode_length": length}} if options else {}
    return own_task(name, (space.observation_size, len(space.low)), space.dt, length, **own)
