"""Point robots in pure JAX: a free plane and a small tree-shaped maze (worlds of WURL)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from envs.base import Env
from envs.task import Task
from envs.tasks import POINT_DT, TREE_DT

# Solid rectangles x0, y0, x1, y1 inside the box [0, 2]^2; what they leave free is a trunk from
# (1, 0) that forks left and right, each fork again into two dead ends.
TREE_BLOCKS = np.array(
    [
        (0.0, 0.0, 0.9, 0.5), (1.1, 0.0, 2.0, 0.5), (0.0, 0.5, 0.3, 1.3), (1.7, 0.5, 2.0, 1.3),
        (0.5, 0.7, 1.5, 1.3), (0.8, 1.3, 1.2, 2.0), (0.2, 1.5, 0.6, 2.0), (1.4, 1.5, 1.8, 2.0),
    ],
    dtype=np.float32,
)  # fmt: skip
TREE_SIDE = 2.0
TREE_START = (1.0, 0.1)
TREE_SUBSTEPS = 8  # a substep moves at most 0.33 * 0.33 / 8 = 0.014, the thinnest wall is 0.2


class PointState(NamedTuple):
    """position (2,), velocity (2,): float32."""

    position: jax.Array
    velocity: jax.Array


class _PointEnv(Env):
    start = (0.0, 0.0)

    def __init__(self, task: Task):
        super().__init__(task, backend="jax")

    def _start(self, key: jax.Array) -> PointState:
        return PointState(jnp.array(self.start, jnp.float32), jnp.zeros((2,), jnp.float32))

    def _show(self, raw_obs: jax.Array) -> PointState:
        return PointState(raw_obs[:2], raw_obs[2:])

    def _read(self, physics: PointState) -> tuple[jax.Array, jax.Array]:
        return jnp.concatenate(physics), physics.position


class Point(_PointEnv):
    """A damped point mass: v <- 0.98 v + 0.1 a, |v| <= 1; p <- p + 0.1 v."""

    def _advance(self, physics: PointState, action: jax.Array) -> tuple[PointState, jax.Array]:
        velocity = 0.98 * physics.velocity + 0.1 * action
        velocity = velocity / jnp.maximum(1.0, jnp.sqrt(jnp.sum(velocity**2)))
        return PointState(physics.position + POINT_DT * velocity, velocity), velocity


class TreeMaze(_PointEnv):
    """A massless point in the maze: p <- p + 0.33 (0.33 a), sliding along walls.

    The velocity, observed and recorded, is what the walls let through.
    """

    start = TREE_START

    def _advance(self, physics: PointState, action: jax.Array) -> tuple[PointState, jax.Array]:
        move = TREE_DT * (TREE_DT * action) / TREE_SUBSTEPS

        def substep(_, position):
            for axis in (0, 1):
                tried = position.at[axis].add(move[axis])
                position = jnp.where(inside_wall(tried), position, tried)
            return position

        position = jax.lax.fori_loop(0, TREE_SUBSTEPS, substep, physics.position)
        velocity = (position - physics.position) / TREE_DT
        return PointState(position, velocity), velocity


def inside_wall(position: jax.Array) -> jax.Array:
    """Return whether a point (..., 2) of the tree maze lies in a block or outside the box."""
    p = position[..., None, :]
    blocked = jnp.all((p > TREE_BLOCKS[:, :2]) & (p < TREE_BLOCKS[:, 2:]), axis=-1)
    outside = jnp.any((position < 0.0) | (position > TREE_SIDE), axis=-1)
    return jnp.any(blocked, axis=-1) | outside


WORLDS = {"point": Point, "tree-maze": TreeMaze}
