"""Units of observations: the mean and std by which a learner scales the columns of a buffer."""

import numpy as np

FLAT = 1e-6  # a column whose numbers differ by less than this share of their size is constant but for rounding


def standard_scale(x):
    """Mean and std [S] of the columns of x [N, S]; a constant column has its size, or 1, for a std.

    So its rounding errors stay small, and it shows where it moves later.
    """
    mean, std = x.mean(0, np.float64).astype(np.float32), x.std(0, np.float64).astype(np.float32)
    size = np.abs(x).max(0)
    return mean, np.where(std > FLAT * size, std, np.maximum(size, 1))
