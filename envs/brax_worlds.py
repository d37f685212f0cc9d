"""Any environment registered with brax, as `brax/<name>`: brax's own physics, reward and ends.

These are not the D4RL tasks of the same names (docs/envs.md).
"""

import difflib
import functools

import jax

from envs.base import Env, quiet_imports
from envs.errors import InputError
from envs.own import own_task
from envs.registered import RegisteredEnv
from envs.task import Task
from envs.tasks import check_options, never

with quiet_imports():
    import brax.envs

brax.envs.Env.register(Env)

BACKENDS = ("generalized", "spring", "positional", "mjx")
# brax's environments that end by time only, so that a learned model need not know when to stop
ENDLESS = ("fast", "halfcheetah", "humanoidstandup", "pusher", "reacher", "swimmer")


class BraxEnv(RegisteredEnv):
    """A brax environment by its name. backend: one of brax's, None: its default."""

    def __init__(self, name: str, backend: str | None = None, **options):
        super().__init__(brax_task(name, **options), _inner(name, backend))
        self._backend = getattr(self.inner, "backend", "jax")

    def _start(self, key):
        with quiet_imports():
            return super()._start(key)

    def _advance(self, physics, action):
        with quiet_imports():
            return super()._advance(physics, action)


def brax_task(name: str, **options) -> Task:
    """Return the task of brax/<name>; its reward is recorded, and cannot be computed."""
    check_options(name, options, ())
    size, actions, dt = _sizes(name)
    endless = name.removeprefix("brax/") in ENDLESS
    return own_task(name, (size, actions), dt, 1000, terminal=never if endless else None)


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
