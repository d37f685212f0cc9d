"""What tasks are put together from: functions of a step that work on numpy and on jax arrays."""

import math
from collections.abc import Callable

from envs.task import Transition


def xp_of(array):
    """Return the module (numpy or jax.numpy) that an array belongs to."""
    return array.__array_namespace__()


def identity(observations):
    return observations


def no_reward(step: Transition):
    xp = xp_of(step.observations)
    return xp.zeros(step.observations.shape[:-1], dtype=xp.float32)


def never(next_observations):
    xp = xp_of(next_observations)
    return xp.zeros(next_observations.shape[:-1], dtype=bool)


def along(vectors, angle_deg: float):
    """Project the first two components on the direction at `angle_deg` from the x axis."""
    angle = math.radians(angle_deg)
    return vectors[..., 0] * math.cos(angle) + vectors[..., 1] * math.sin(angle)


def square(actions):
    return (actions * actions).sum(-1)


def float32(values):
    return values.astype(xp_of(values).float32)


def next_root(step: Transition, dt: float):
    """Return the root position after the step (..., 2)."""
    return step.root_positions + dt * step.root_velocities


def on_next(function: Callable) -> Callable:
    """Turn a function of raw next observations into one of a Transition."""
    return lambda step: function(step.next_observations)


xy_of_next = on_next(lambda observations: observations[..., :2])
