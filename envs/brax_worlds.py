"""Any environment registered with brax, as `brax/<name>`: brax's own physics, reward and ends.

Such a world has no planar root that every one shares: root positions and velocities are zero, the
diversity feature is the whole observation, and nothing can be relabelled. Its reward is the one in
`state.reward`. These are not the D4RL tasks of the same names (docs/envs.md).
"""

import difflib
import functools

import jax
import jax.numpy as jnp

from envs.base import Env, State, quiet_imports
from envs.errors import InputError
from envs.task import Task
from envs.tasks import check_options, identity, never

with quiet_imports():
    import brax.envs

brax.envs.Env.register(Env)

BACKENDS = ("generalized", "spring", "positional", "mjx")
# brax's environments that end by time only, so that a learned model need not know when to stop
ENDLESS = ("fast", "halfcheetah", "humanoidstandup", "pusher", "reacher", "swimmer")


class BraxEnv(Env):
    """A brax environment in this package's interface. backend: one of brax's, None: its default."""

    def __init__(self, name: str, backend: str | None = None, **options):
        self.inner = _inner(name, backend)
        super().__init__(brax_task(name, **options), getattr(self.inner, "backend", "jax"))

    def _observe(self, inner) -> tuple[jax.Array, dict]:
        obs = inner.obs.astype(jnp.float32)
        nothing = jnp.zeros((2,), jnp.float32)
        return obs, {"raw_obs": obs, "root_position": nothing, "root_velocity": nothing}

    def reset(self, key: jax.Array) -> State:
        with quiet_imports():
            inner = self.inner.reset(key)
        obs, info = self._observe(inner)
        zero = jnp.zeros((), jnp.float32)
        return State(inner, obs, zero, zero, {}, info)

    def step(self, state: State, action: jax.Array) -> State:
        action = jnp.clip(jnp.asarray(action, jnp.float32), -1.0, 1.0)
        with quiet_imports():
            inner = self.inner.step(state.pipeline_state, action)
        obs, info = self._observe(inner)
        reward, done = (jnp.asarray(x, jnp.float32) for x in (inner.reward, inner.done))
        return State(inner, obs, reward, done, state.metrics, {**state.info, **info})

    def _start(self, key):
        raise NotImplementedError("brax resets its own state")

    _advance = _read = _start


def brax_task(name: str, **options) -> Task:
    """Return the task of brax/<name>; its reward and termination cannot be relabelled."""
    check_options(name, options, ())
    size, actions, dt = _sizes(name)

    def reward(step):
        raise InputError(
            f"the reward of '{name}' is brax's own and cannot be computed from a buffer: use the "
            "rewards recorded in the file, or a task of a world such as 'ant' or 'cheetah'"
        )

    def terminal(_):
        raise InputError(
            f"when '{name}' ends is brax's own and cannot be computed from observations: use a "
            f"learner without a model, or one of brax/{', brax/'.join(ENDLESS)}"
        )

    endless = name.removeprefix("brax/") in ENDLESS
    return Task(
        name=name, env=name, observation_size=size, env_observation_size=size,
        action_size=actions, dt=dt, episode_length=1000, eval_length=1000, observe=identity,
        reward=reward,
        terminal=(lambda step: never(step.next_observations)) if endless else terminal,
        feature=lambda step: step.next_observations,
        feature_names=tuple(f"observation {i}" for i in range(size)),
        model_terminal=never if endless else terminal,
    )  # fmt: skip


def _inner(name: str, backend: str | None):
    short = name.removeprefix("brax/")
    names = list(brax.envs._envs)
    if short not in names:
        near = difflib.get_close_matches(short, names, n=3, cutoff=0.5)
        hint = f"near names: {', '.join(f'brax/{n}' for n in near)}; " if near else ""
        raise InputError(f"brax has no environment '{short}'; {hint}all: {', '.join(names)}")
    if backend is not None and backend not in BACKENDS:
        raise InputError(f"'{name}' has no back end '{backend}': use one of {BACKENDS}")
    chosen = {} if backend is None else {"backend": backend}
    with quiet_imports():
        return brax.envs.get_environment(short, **chosen)


@functools.cache
def _sizes(name: str) -> tuple[int, int, float]:
    """Return observation size, action size, dt, without running a reset."""
    inner = _inner(name, None)
    with quiet_imports():
        obs = jax.eval_shape(inner.reset, jax.random.key(0)).obs
    if not hasattr(obs, "shape"):
        raise InputError(f"'{name}' observes a dictionary; only flat observations can be used")
    return obs.shape[-1], inner.action_size, round(float(getattr(inner, "dt", 1.0)), 6)
