"""Units of observations: the mean and std by which a learner scales the columns of a buffer."""

import numpy as np

from envs.buffers.checks import check_raw_columns

FLAT = 1e-6  # a column that spreads by less than this share of its size is constant but for rounding


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
