"""Gymnasium's environments on the host: made, looked at, and stepped for a jitted program (gymnasium_worlds.py)."""

import collections
import functools
import itertools
import math
import threading
import weakref
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from envs import host
from envs.errors import InputError, said
from envs.imports import import_for, module_of

PREFIX = "gym:"
RUNNING, ENDED, CUT = (
    0,
    1,
    2,
)  # an episode goes on; it terminated; the environment itself cut it off at the task's limit
FEWEST = 16  # environments that a pool may always make
HEAD = 4  # numbers of a GymState that come before its observation


class GymState(NamedTuple):
    """An episode: how it began and how far it is. The rest of it is on the host.

    seed, episode, time, over (): int32, the seed of its reset, its number on the host (0 after a reset), its steps and
    whether it is RUNNING; obs (S,), reward, terminal (): float32, of the step that led here.
    """

    seed: jax.Array
    episode: jax.Array
    time: jax.Array
    over: jax.Array
    obs: jax.Array
    reward: jax.Array
    terminal: jax.Array


class Spaces(NamedTuple):
    """What a world's task and pool need of an environment."""

    observation_size: int
    low: np.ndarray  # (A,) bounds of the actions, in the space's own type
    high: np.ndarray
    limit: int | None  # steps of an episode
    dt: float


def make(name: str):
    """Make one environment, without its time limit; InputError where it cannot be made."""
    import_for(name)
    import gymnasium

    short = name.removeprefix(PREFIX)
    short = short.removeprefix(f"{module_of(name)}:")
    try:
        env = gymnasium.make(short, max_episode_steps=-1, disable_env_checker=True)
    except Exception as error:  # an unknown name, a missing package, or what the environment's own code raises
        raise InputError(f"'{name}' cannot be made: {said(error)}") from None
    if env.spec.id != short:  # Gymnasium takes the newest version where none is named
        raise InputError(f"'{name}': name its version, '{name.removesuffix(short)}{env.spec.id}'")
    return env, gymnasium.spec(short).max_episode_steps


@functools.cache
def spaces(name: str) -> Spaces:
    """Read an environment's spaces; InputError where it is no world, or does not repeat itself for a seed."""
    from gymnasium.spaces import Box

    env, limit = make(name)
    try:
        for kind, space in (("observations", env.observation_space), ("actions", env.action_space)):
            if not isinstance(space, Box) or len(space.shape) != 1 or not space.shape[0]:
                raise InputError(
                    f"'{name}': its {kind} are {space}; a world here needs a Box with one row of numbers, such as "
                    "Box(-1.0, 1.0, (3,), float32): wrap the environment, and register the wrapped one"
                )
        space = env.action_space
        if not np.issubdtype(space.dtype, np.floating) or not space.is_bounded():
            raise InputError(
                f"'{name}': its actions are {space}; a world here needs real numbers with finite bounds: wrap it in "
                "gymnasium.wrappers.RescaleAction or ClipAction, and register the wrapped one"
            )
        size = env.observation_space.shape[0]
        starts = [_begin(name, env, 0, size) for _ in range(2)]
        if not np.array_equal(*starts):
            raise InputError(
                f"'{name}': two resets with one seed begin differently: draw them from self.np_random after "
                "super().reset(seed=seed)"
            )
        dt = getattr(env.unwrapped, "dt", 1.0)
        dt = float(dt) if isinstance(dt, int | float | np.number) and 0 < dt < math.inf else 1.0
        return Spaces(size, space.low, space.high, limit, dt)
    finally:
        env.close()


def _begin(name: str, env, seed: int, size: int) -> np.ndarray:
    """Reset -> observation (S,) float32."""
    try:
        obs, _ = env.reset(seed=int(seed))
    except Exception as error:
        raise InputError(f"'{name}': its reset raised {said(error)}") from error
    return _observed(name, obs, size, "reset")


def _observed(name: str, obs, size: int, when: str) -> np.ndarray:
    obs = np.array(obs, np.float32)  # a copy: an environment may write its next one into the same array
    if obs.shape != (size,) or not np.isfinite(obs).all():
        raise InputError(f"'{name}': {when} returned the observation {obs}, not {size} finite numbers")
    return obs


class Pool:
    """Environments of one name; reset and step are functions of one of them, batched by jax.

    As many are kept as twice the largest batch of each device takes, 16 at least; of more episodes the one that was
    stepped longest ago gives up its environment.
    """

    def __init__(self, name: str, limit: int):
        self.name, self.limit, self.space = name, limit, spaces(name)
        self.size, self.actions = self.space.observation_size, len(self.space.low)
        self.running = collections.OrderedDict()  # episode -> [environment, steps], the last stepped at the end
        self.idle = []  # environments of episodes that ended
        self.numbers, self.most = itertools.count(1), FEWEST
        self.scratch = None  # of resets, which begin no episode
        self.devices = jax.local_device_count()
        self.one_thread, self.lock = host.one_thread(), threading.Lock()  # several devices call back at once
        self.made = []
        weakref.finalize(self, _close, self.made)
        self.obs_shape = jax.ShapeDtypeStruct((self.size,), jnp.float32)
        self.step_shapes = jax.ShapeDtypeStruct((3,), jnp.int32), jax.ShapeDtypeStruct((self.size + 2,), jnp.float32)

    def reset(self, seed: jax.Array, wanted: jax.Array | bool = True) -> GymState:
        """A start; where it is not wanted, of zeros."""
        asked = seed, jnp.asarray(wanted)
        obs = jax.pure_callback(self.host_reset, self.obs_shape, *asked, vmap_method="broadcast_all")
        zero, none = jnp.int32(0), jnp.float32(0)
        return GymState(seed, zero, zero, zero, obs, none, none)

    def step(self, state: GymState, action: jax.Array) -> GymState:
        bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.int32)
        head = jnp.stack([state.seed, state.episode, state.time, state.over])
        packed = jnp.concatenate([head, bits(state.obs), bits(action)])
        counts, floats = jax.pure_callback(self.host_step, self.step_shapes, packed, vmap_method="broadcast_all")
        return GymState(state.seed, *counts, floats[:-2], floats[-2], floats[-1])

    def host_reset(self, seeds, wanted):
        """Starts of episodes. seeds (...) int32, wanted (...) bool -> observations (..., S), zeros where not wanted."""
        seeds, wanted = np.asarray(seeds), np.asarray(wanted)
        starts = np.zeros((*seeds.shape, self.size), np.float32)
        with self.lock:
            self.scratch = self.scratch or self._new()
            for place in np.argwhere(wanted):
                starts[tuple(place)] = _begin(self.name, self.scratch, seeds[tuple(place)], self.size)
        return starts

    def host_step(self, packed):
        """Step a batch. packed (..., 4 + S + A) int32 -> episode, time, over (..., 3), obs, reward, terminal."""
        if self.one_thread:
            host.wait_for(packed, f"'{self.name}'")
        packed = np.asarray(packed)
        rows = np.ascontiguousarray(packed.reshape(-1, packed.shape[-1]))
        floats = rows[:, HEAD:].copy().view(np.float32)
        obs, actions = floats[:, : self.size], self._scaled(floats[:, self.size :])
        out = np.empty((len(rows), 3), np.int32), np.zeros((len(rows), self.size + 2), np.float32)
        with self.lock:
            self.most = max(self.most, 2 * len(rows) * self.devices)
            for i, head in enumerate(rows[:, :HEAD].tolist()):
                out[0][i], out[1][i] = self._step_one(*head, obs[i], actions[i])
        return tuple(part.reshape(*packed.shape[:-1], -1) for part in out)

    def _step_one(self, seed, episode, time, over, obs, action):
        """One step of one episode -> (episode, time, over), (obs, reward, terminal)."""
        if over == CUT:
            raise InputError(
                f"'{self.name}' cut its episode off after {time} steps and was stepped on: its own time limit is in "
                f"the way; use no longer episodes (--episode-length {time}), or register it without that limit"
            )
        if over == ENDED:  # nothing happens any more
            return (episode, time, over), (*obs, 0.0, True)
        episode, env = self._go_on(episode, time) if time else self._new_episode(seed, obs)
        try:
            obs, reward, ended, cut, _ = env.step(action)
        except Exception as error:
            raise InputError(f"'{self.name}': its step raised {said(error)}") from error
        obs, time = _observed(self.name, obs, self.size, f"step {time + 1}"), time + 1
        if np.size(reward) != 1 or not np.isfinite(np.asarray(reward, float)).all():
            raise InputError(f"'{self.name}': step {time} returned the reward {reward}, not one finite number")
        reward = float(np.asarray(reward).item())
        if cut and not ended and time < self.limit:
            raise InputError(
                f"'{self.name}' cut an episode off (truncated) after {time} steps, before its limit of {self.limit}: "
                f"if that is its time limit, set the task's option episode_length={time}; episodes cut off by another "
                "rule cannot be used"
            )
        over = ENDED if ended else CUT if cut else RUNNING
        if over == RUNNING:
            self.running[episode] = [env, time]
        else:
            self.idle.append(env)
        return (episode, time, over), (*obs, reward, bool(ended))

    def _new_episode(self, seed, obs):
        env = self.idle.pop() if self.idle else None
        if env is None and len(self.running) >= self.most:
            env = self.running.popitem(last=False)[1][0]
        env = env or self._new()
        if not np.array_equal(_begin(self.name, env, seed, self.size), obs):
            raise InputError(f"'{self.name}': two resets with one seed begin differently; rollouts would not repeat")
        return next(self.numbers) & 0x7FFFFFFF, env

    def _go_on(self, episode, time):
        env, steps = self.running.pop(episode, (None, None))
        if steps != time:
            raise InputError(
                f"'{self.name}': a State after {time} steps was stepped a second time, or kept while many other "
                "episodes ran: a Gymnasium environment goes forward only, from a reset on"
            )
        return episode, env

    def _scaled(self, action: np.ndarray) -> np.ndarray:
        """Actions (..., A) from [-1, 1] to the bounds of the space, both ends exactly."""
        low, high, action = (x.astype(np.float64) for x in (self.space.low, self.space.high, action))
        scaled = np.where(action > 0, high - (1 - action) * (high - low) / 2, low + (action + 1) * (high - low) / 2)
        return np.clip(scaled.astype(self.space.low.dtype), self.space.low, self.space.high)

    def _new(self):
        env, _ = make(self.name)
        self.made.append(env)
        return env


def _close(made: list) -> None:
    for env in made:
        env.close()
