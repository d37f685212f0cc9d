"""Environments of a user's own in JAX: `register` one, then name it like any other.

A name on a command line may say which module registers it: `--task my_worlds:cart` imports `my_worlds`, installed or in
the working directory, and takes what it registered as "cart" (docs/environments.md has a whole example).
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from envs.base import Env
from envs.errors import InputError, said
from envs.imports import import_for, module_of
from envs.own import OPTIONS, own_task
from envs.task import Task
from envs.tasks import check_options, task_options


@dataclasses.dataclass(frozen=True)
class Entry:
    """What `register` was told."""

    make: Callable[[], Any]
    episode_length: int | None
    dt: float
    reward: Callable | None
    terminal: Callable | None
    fields: dict[str, Any]


_ENTRIES: dict[str, dict[str, Entry]] = {}  # name -> the module that registered it -> what it said


def register(
    name: str,
    make: Callable[[], Any],
    *,
    episode_length: int | None = None,
    dt: float = 1.0,
    reward: Callable | None = None,
    terminal: Callable | None = None,
    feature: Callable | None = None,
    feature_names: tuple[str, ...] = (),
    reference: tuple[float, float] | None = None,
    angles: tuple[int, ...] = (),
) -> None:
    """Make a JAX environment known by a name; a second call of the same module with the same name replaces it.

    name: letters, digits, ".", "_" and "-"; none that this package has. Where two modules use one name, it is known as
        `module:name` alone.
    make() -> the environment, in one of two interfaces:
        brax's: reset(key) and step(state, action) return a state with obs (S,), reward (), done (); observation_size
            and action_size; actions are in [-1, 1], `done` is no time limit;
        gymnax's: default_params, a dataclass; reset_env (or reset)(key, params) -> obs, state; step_env(key, state,
            action, params) -> obs, state, reward, done, info; observation_space(params), action_space(params), whose
            `low` and `high` actions in [-1, 1] are mapped to. A limit `max_steps_in_episode` among the parameters is
            the episode's length, and is taken out of `done`.
    episode_length: steps; None: gymnax's limit, or 1000. dt: seconds of a step.
    reward(s, a, s') -> (...,) and terminal(s') -> (...,) bool, of arrays (..., S) and (..., A), in NumPy and JAX: where
        they are given they are what `step` pays and ends by, data can be relabelled, and mopo.py's model knows
        both; without them a step pays and ends as the environment says.
    feature(s') -> (..., d): where wurl_sac.py measures diversity; None: the observation. feature_names: of the d.
    reference: returns of a random policy and of an expert, for normalised scores.
    angles: columns of the observation that are angles and can go round (`--angles task` of the learners).
    Raises InputError for a name that cannot be used.
    """
    plain = name.replace(".", "").replace("_", "").replace("-", "")
    if not (plain.isascii() and plain.isalnum()):
        raise InputError(f"'{name}' cannot be registered: use letters, digits, '.', '_' and '-'")
    if task_options(name) or _is_built_in(name):
        raise InputError(f"'{name}' cannot be registered: this package has a world or task of that name")
    fields: dict[str, Any] = {"reference": reference, "angles": tuple(angles)}
    if feature is not None:
        fields["feature"] = lambda step: feature(step.next_observations)
        fields["feature_names"] = tuple(feature_names)
    module = sys._getframe(1).f_globals.get("__name__", "")  # of whoever calls
    _add(name, module, Entry(make, episode_length, dt, reward, terminal, fields))


def _add(name: str, module: str, entry: Entry) -> None:
    _ENTRIES[name] = {**_ENTRIES.get(name, {}), module: entry}


def _is_built_in(name: str) -> bool:
    from envs.tasks import task

    try:
        return bool(task(name))
    except InputError:
        return False


def is_registered(name: str) -> bool:
    """Return whether a name is one of `register`, or asks for a module that should register it."""
    return name in _ENTRIES or bool(module_of(name))


def registered_names() -> tuple[str, ...]:
    return tuple(_ENTRIES)


def _entry(name: str) -> Entry:
    """What a name stands for: of `module:name` what that module registered, or one below it, or one that it imports."""
    module, short, before = module_of(name), name.rpartition(":")[2], _ENTRIES.get(name.rpartition(":")[2], {})
    import_for(name)
    modules = _ENTRIES.get(short, {})
    if module and module not in modules:
        below = [entry for place, entry in modules.items() if place.startswith(f"{module}.") or place not in before]
        if len(below) == 1:  # kept, because a module is imported once
            _add(short, module, below[0])
            return below[0]
        known = ", ".join(f"{place}:{key}" for key, places in _ENTRIES.items() for place in places) or "nothing"
        raise InputError(f"'{name}': {module} registers no '{short}' (envs.register); registered: {known}")
    if module:
        return modules[module]
    places = {id(entry): f"{place}:{short}" for place, entry in reversed(modules.items())}  # each where it came from
    if len(places) > 1:
        raise InputError(f"'{name}' is registered by {len(places)} modules: say which, {' or '.join(places.values())}")
    return next(iter(modules.values()))


def _inner(name: str, entry: Entry):
    """Make the environment -> it, with brax's interface."""
    try:
        inner = entry.make()
        if hasattr(inner, "step_env"):
            return GymnaxEnv(name, inner)
    except InputError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise InputError(f"'{name}' cannot be made: {said(error)}") from error
    missing = [x for x in ("reset", "step", "observation_size", "action_size") if not hasattr(inner, x)]
    if missing:
        raise InputError(
            f"'{name}': its environment {type(inner).__name__} has no {', '.join(missing)}: it needs brax's interface "
            "or gymnax's (envs.register)"
        )
    return inner


def registered_task(name: str, **options) -> Task:
    """Return the task of a registered environment."""
    check_options(name, options, OPTIONS)
    entry = _entry(name)
    inner = _inner(name, entry)
    try:
        first = jax.eval_shape(inner.reset, jax.random.key(0))
        after = jax.eval_shape(inner.step, first, jax.ShapeDtypeStruct((inner.action_size,), jnp.float32))
        shapes = [tuple(x.shape) for x in (first.obs, after.obs, after.reward, after.done)]
    except InputError:
        raise
    except Exception as error:
        found = f"its reset(key) or step(state, action) failed: {said(error)}"
        raise InputError(f"'{name}': {found}") from error
    size = int(inner.observation_size)
    wanted = [(size,), (size,), (), ()]
    if shapes != wanted:
        found = f"obs after reset and step, reward and done have the shapes {shapes}, not {wanted}"
        raise InputError(f"'{name}': {found}")
    limit = entry.episode_length or getattr(inner, "limit", None) or 1000
    length = int(options.get("episode_length", limit))
    own = {"options": {"episode_length": length}} if options else {}
    sizes = size, int(inner.action_size)
    return own_task(name, sizes, entry.dt, length, entry.reward, entry.terminal, **entry.fields, **own)


def make_registered(name: str, backend: str | None = None, **options) -> Env:
    """Make a registered environment, in this package's interface."""
    if backend not in (None, "jax"):
        raise InputError(f"'{name}' has one back end, 'jax'; asked for '{backend}': leave --backend out")
    return RegisteredEnv(registered_task(name, **options), _inner(name, _entry(name)))


class RegisteredEnv(Env):
    """An environment with brax's interface, `inner`, in this package's."""

    def __init__(self, task: Task, inner):
        self.inner = inner
        super().__init__(task, "jax")

    def _start(self, key):
        return self.inner.reset(key)

    def _advance(self, physics, action):
        return self.inner.step(physics, action), jnp.zeros((2,), jnp.float32)

    def _read(self, physics):
        return physics.obs.astype(jnp.float32), jnp.zeros((2,), jnp.float32)

    def _own(self, physics):
        return {"reward": jnp.asarray(physics.reward, jnp.float32), "terminal": jnp.asarray(physics.done, jnp.float32)}


class GymnaxState(NamedTuple):
    """key: of the steps to come; state: the environment's own; obs, reward, done of the step that led here."""

    key: jax.Array
    state: Any
    obs: jax.Array
    reward: jax.Array
    done: jax.Array


class GymnaxEnv:
    """An environment with gymnax's interface, in brax's: no autoreset, no time limit, actions in [-1, 1]."""

    def __init__(self, name: str, inner):
        self.inner, self.params, self.limit = inner, inner.default_params, None
        if hasattr(self.params, "max_steps_in_episode"):
            self.limit = int(self.params.max_steps_in_episode)
            self.params = dataclasses.replace(self.params, max_steps_in_episode=2**30)
        space, seen = inner.action_space(self.params), inner.observation_space(self.params)
        if not (hasattr(space, "low") and hasattr(seen, "low") and len(space.shape) <= 1 and len(seen.shape) == 1):
            found = f"observations {type(seen).__name__}, actions {type(space).__name__}"
            raise InputError(f"'{name}': {found}; a world here needs a Box with one row of numbers of both")
        self.observation_size, self.action_size = seen.shape[0], space.shape[0] if space.shape else 1
        self.shape = space.shape
        self.low, self.high = (jnp.broadcast_to(x, (self.action_size,)) for x in (space.low, space.high))
        if not bool(jnp.isfinite(self.low).all() & jnp.isfinite(self.high).all()):
            raise InputError(f"'{name}': its actions have no finite bounds")

    def reset(self, key):
        key, now = jax.random.split(key)
        reset = self.inner.reset_env if hasattr(self.inner, "reset_env") else self.inner.reset
        obs, state = reset(now, self.params)
        return GymnaxState(key, state, obs, jnp.float32(0), jnp.float32(0))

    def step(self, physics, action):
        key, now = jax.random.split(physics.key)
        action = (self.low + (action + 1) / 2 * (self.high - self.low)).reshape(self.shape)
        obs, state, reward, done, _ = self.inner.step_env(now, physics.state, action, self.params)
        return GymnaxState(key, state, obs, *(jnp.asarray(x, jnp.float32).reshape(()) for x in (reward, done)))
