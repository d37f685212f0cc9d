"""What the networks of a learner see of observations: columns in units of the data, angles as sine and cosine."""

from typing import Any, NamedTuple

import numpy as np

from envs.buffers.checks import check_raw_columns

FLAT = 1e-6  # a column that spreads by less than this share of its size is constant but for rounding


class Sight(NamedTuple):
    """A function of observations [.., S]: angles as sine and cosine, then each column less its mean, over its std.

    mean, std [S + n]; angles [n]: columns, in whose place their sines stand; their cosines come behind the others.
    """

    mean: Any
    std: Any
    angles: Any

    def __call__(self, observations):
        return (turned(observations, self.angles) - self.mean) / self.std

    def stored(self, num_seeds):
        """Its arrays as policy.npz has them, for each seed (docs/policy.md)."""
        return {f"observation_{name}": np.tile(x, (num_seeds, 1)) for name, x in self._asdict().items()}


def turned(x, angles):
    """Sines in the place of n angles, and their cosines behind: [.., S] -> [.., S + n]; NumPy or JAX."""
    if not len(angles):
        return x
    xp = x.__array_namespace__()
    is_angle = xp.isin(xp.arange(x.shape[-1]), angles)
    return xp.concatenate([xp.where(is_angle, xp.sin(x), x), xp.cos(x[..., angles])], -1)


def angle_columns(angles):
    """--angles as columns [n]: "1,4" -> 1, 4; "none" and "task" (not known here) -> no column."""
    return np.array([int(i) for i in angles.split(",") if i.isdecimal()], np.int32)


def standard_scale(x):
    """Mean and std [S] of the columns of x [N, S]; a constant column has its size, or 1, for a std.

    So the rounding errors of a constant column stay small, and a later change of it is still seen.
    """
    mean, std = x.mean(0, np.float64).astype(np.float32), x.std(0, np.float64).astype(np.float32)
    size = np.abs(x).max(0)
    return mean, np.where(std > FLAT * size, std, np.maximum(size, 1))


def column_scale(x, standardise):
    """Mean and std [S] of the columns of x [N, S], or 0 and 1 if not standardise.

    A constant column reads as 0, later too: its std is inf (a column of zeros only if standardise). InputError where
    columns pass 1e4 and are not standardised.
    """
    low, high = x.min(0), x.max(0)
    most = np.maximum(-low, high)
    constant = (high - low <= FLAT * most) & (high != 0)
    mean, std = np.where(constant, high, 0), np.ones_like(high)
    if standardise:
        mean, std = x.mean(0, np.float64), x.std(0, np.float64)
        constant |= std == 0
    check_raw_columns(x, standardise | constant, "--standardise-observations")
    return np.float32(mean), np.where(constant, np.inf, std).astype(np.float32)
