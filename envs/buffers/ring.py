"""A ring of rows on the device: the newest of a stream, to draw batches from inside a jitted program."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Ring(NamedTuple):
    """The newest rows of a stream: `rows` is a pytree of [capacity, ..], the oldest row is overwritten first."""

    rows: Any
    position: jax.Array  # next row to write
    size: jax.Array  # rows that hold data; sampling looks at these only


def ring_init(row, capacity):
    """An empty ring for rows shaped like the pytree `row` (without a leading axis)."""
    rows = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), row)
    return Ring(rows, jnp.int32(0), jnp.int32(0))


def ring_insert(ring, rows, mask):
    """Write the rows [n, ..] whose mask [n] is True, in order; the others leave no trace. n <= capacity."""
    capacity = jax.tree.leaves(ring.rows)[0].shape[0]
    slots = (ring.position + jnp.cumsum(mask) - 1) % capacity
    slots = jnp.where(mask, slots, capacity)  # out of range: dropped by the scatter
    new = jax.tree.map(lambda old, x: old.at[slots].set(x, mode="drop"), ring.rows, rows)
    count = jnp.sum(mask, dtype=jnp.int32)
    return Ring(new, (ring.position + count) % capacity, jnp.minimum(ring.size + count, capacity))


def ring_sample(ring, key, batch_size):
    """`batch_size` rows, uniformly with replacement, of those that hold data."""
    index = jax.random.randint(key, (batch_size,), 0, ring.size)
    return jax.tree.map(lambda x: x[index], ring.rows)
