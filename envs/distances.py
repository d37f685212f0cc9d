"""Distances between samples: exact W1, and the amortised projected distance (APWD; arXiv 2110.07940, section 3).

For APWD two samples of points are sorted along random directions and coupled rank by rank; the plan is paid with the
distances in the full space. The mean of these costs is at least W1, and equal to it in one dimension.
"""

import jax
import jax.numpy as jnp
import numpy as np
import scipy


def wasserstein(x, y):
    """Exact W1 of two samples of n points: min over permutations of mean ||x_i - y_p(i)||."""
    cost = scipy.spatial.distance.cdist(x, y)
    # What is added to a row or a column leaves the best permutation the best; it is found up to four times as fast.
    centred = cost - cost.mean(axis=0) - cost.mean(axis=1, keepdims=True)
    return float(cost[scipy.optimize.linear_sum_assignment(centred)].mean())


def mixture_weights(samples, target):
    """Weights [K] of the mixture of samples [K, n, d] that is nearest to the target [m, d] in W1, and that W1.

    min over w, P of sum_kij P_kij ||x_ki - y_j||,  sum_j P_kij = w_k / n,  sum_ki P_kij = 1 / m,  P >= 0: a linear
    program in K n m + K numbers, which takes seconds at a million.
    """
    K, n, m = len(samples), len(samples[0]), len(target)
    cost = np.concatenate([scipy.spatial.distance.cdist(x, target) for x in samples])
    sent = scipy.sparse.kron(scipy.sparse.eye_array(K * n), np.ones((1, m)))
    received = scipy.sparse.kron(np.ones((1, K * n)), scipy.sparse.eye_array(m))
    shares = scipy.sparse.kron(scipy.sparse.eye_array(K), np.full((n, 1), 1 / n))
    equal = scipy.sparse.block_array([[sent, -shares], [received, None]], format="csr")
    found = scipy.optimize.linprog(
        np.r_[cost.ravel(), np.zeros(K)], A_eq=equal, b_eq=np.r_[np.zeros(K * n), np.full(m, 1 / m)]
    )
    weights = np.maximum(found.x[-K:], 0.0)
    return weights / weights.sum(), float(found.fun)


def unit_directions(key, num, dim, orthogonal=False):
    """[M, d] directions of length 1, uniform on the sphere; `orthogonal`: mutually so in blocks of d."""
    if orthogonal:
        blocks = jax.random.normal(key, (-(-num // dim), dim, dim))
        v = jnp.linalg.qr(blocks)[0].mT.reshape(-1, dim)[:num]
    else:
        v = jax.random.normal(key, (num, dim))
    return v / jnp.linalg.norm(v, axis=-1, keepdims=True)


def sort_along(points, mask, v):
    """Sort points [n, d] by their projection on v [d], those with mask [n] False last -> points, order [n].

    The product-sum is written out: a float32 matmul may run in TF32 on a GPU and change the order.
    """
    order = jnp.argsort(jnp.where(mask, jnp.sum(points * v, -1), jnp.inf), stable=True)
    return points[order], order


def coupled_cost(a, b, num_a, num_b):
    """Cost per source RANK [D] of the rank-to-rank plan between sorted a [D, d] and b [T, d].

    The first num_a and num_b rows are points, the rest padding. In units of 1 / (num_a num_b) the plan is the
    overlap of [i num_b, (i+1) num_b] with [j num_a, (j+1) num_a]: sort all borders, each gap between two
    neighbours belongs to one (i, j). The costs of a row are averaged with its row weights (they sum to 1).
    """
    ends_a = jnp.minimum(jnp.arange(1, len(a) + 1), num_a) * num_b
    ends_b = jnp.minimum(jnp.arange(1, len(b) + 1), num_b) * num_a
    ends = jnp.sort(jnp.concatenate([ends_a, ends_b]))
    lengths = jnp.diff(ends, prepend=0)
    i = jnp.clip((ends - 1) // jnp.maximum(num_b, 1), 0, jnp.maximum(num_a - 1, 0))
    j = jnp.clip((ends - 1) // jnp.maximum(num_a, 1), 0, jnp.maximum(num_b - 1, 0))
    distance = jnp.linalg.norm(a[i] - b[j], axis=-1) * lengths / jnp.maximum(num_b, 1)
    return jax.ops.segment_sum(distance, i, len(a), indices_are_sorted=True)


def pairwise_apwd(source, source_mask, target, target_mask, directions, plan="mean"):
    """c_kl(t) [K, J, n] of every source step against every target set, directions [M, d] shared by all.

    plan: "mean" of the M plans (APWD), or of each pair the "cheapest" of them, the tightest bound.

    source [K, n, d], target [J, m, d], masks [K, n], [J, m] (True: a point). The mean of c_kl over the points
    of k is an upper bound of W1(k, l), equal to it for d = 1. Every set is sorted once per direction. Where all
    points are valid and n = m (episodes of fixed length) the plan is the identity: a subtraction.
    """
    num_source, num_target = source_mask.sum(-1), target_mask.sum(-1)

    def identity_plan(a, b):  # the sum over features written out, so that it runs over whole rows of numbers
        b = b.transpose(1, 2, 0)
        return jnp.sqrt(sum((a[:, :, i, None] - b[:, i]) ** 2 for i in range(a.shape[-1])))

    def general_plan(a, b):
        to_all = jax.vmap(coupled_cost, (None, 0, None, 0), out_axes=1)
        return jax.lax.map(lambda x: to_all(x[0], b, x[1], num_target), (a, num_source))

    def along(best, v):
        a, order = jax.vmap(sort_along, (0, 0, None))(source, source_mask, v)
        b, _ = jax.vmap(sort_along, (0, 0, None))(target, target_mask, v)
        if source.shape[1] == target.shape[1]:
            equal = jnp.all(source_mask) & jnp.all(target_mask)
            cost = jax.lax.cond(equal, identity_plan, general_plan, a, b)
        else:
            cost = general_plan(a, b)  # [K, n, J], by rank of the source point; the order gives it back its time
        index = jnp.arange(len(source))[:, None], order
        if plan == "mean":
            return best.at[index].add(cost / len(directions), unique_indices=True), None
        known = jnp.where(source_mask[..., None], best, 0.0).sum(1, keepdims=True)
        cost = jnp.zeros_like(best).at[index].set(cost, unique_indices=True)
        less = jnp.where(source_mask[..., None], cost, 0.0).sum(1, keepdims=True) < known
        return jnp.where(less, cost, best), None

    start = jnp.full((*source.shape[:2], len(target)), 0.0 if plan == "mean" else jnp.inf)
    best, _ = jax.lax.scan(along, start, directions)
    return jnp.where(source_mask[:, None], best.mT, 0.0)


def distance_matrix(points, mask, num_directions):
    """Distances [K, K] between samples, points [K, E, L, d] with mask [K, E, L], along directions that never change.

    At most 10,000 points a sample are looked at, fewer of more than 100 samples.
    """
    K, _, L, d = points.shape
    if K == 1:
        return jnp.zeros((1, 1))
    keep = max(1, min(10_000, 10**8 // K**2) // L)  # of the [K, K, points] there are three at a time
    points, mask = points[:, :keep].reshape(K, -1, d), mask[:, :keep].reshape(K, -1)
    cost = pairwise_apwd(points, mask, points, mask, unit_directions(jax.random.key(0), num_directions, d))
    return cost.sum(-1) / jnp.maximum(mask.sum(-1, keepdims=True), 1)


def neighbour_distances(distances):
    """Of a matrix [K, K]: the distance to the nearest other sample, its mean (the authors' WD) and its smallest; the
    mean over pairs; how many samples are somebody's nearest. {} of one sample."""
    K = len(distances)
    if K == 1:
        return {}
    others = jnp.where(jnp.eye(K, dtype=bool), jnp.inf, distances)
    nearest = others.min(1)
    is_nearest = jnp.zeros(K, bool).at[others.argmin(1)].set(True)
    return {
        "min_w": nearest.mean(),
        "smallest_w": nearest.min(),
        "pair_mean_w": (distances.sum() - jnp.trace(distances)) / (K * (K - 1)),
        "distinct_nearest": is_nearest.sum(),
    }


def exact_distances(points, mask, num=500, seed=0):
    """Exact W1 between the samples of K policies [K, K]; the diagonal is the floor: two samples of the same policy.

    points [K, E, L, d] with mask [K, E, L], two episodes or more. Each policy gives two samples, from its even and from
    its odd episodes; entry k, l lies between the first of k and the second of l, so that a perfect copy of a policy is
    as far from it as the floor. A sample has `num` points, fewer of more than 10 policies or where a policy has fewer
    (the time grows with their cube: 3 s of ten policies). Points that are not finite are left out; nan if none is left.
    """
    mask = mask & np.isfinite(points).all(-1)
    K, rng = len(points), np.random.default_rng(seed)
    halves = [[points[k, half::2][mask[k, half::2]] for half in (0, 1)] for k in range(K)]
    n = min(num * 10 // max(K, 10), *(len(x) for pair in halves for x in pair))
    if n == 0:
        return np.full((K, K), np.nan)
    first, second = zip(*([rng.permutation(x)[:n] for x in pair] for pair in halves), strict=True)
    matrix = np.zeros((K, K))
    for k, l in zip(*np.triu_indices(K), strict=True):
        matrix[k, l] = matrix[l, k] = wasserstein(first[k], second[l])
    return matrix


def exact_measures(points, mask, cell):
    """How far apart policies are, and where they go: points [K, E, L, d] with mask [K, E, L].

    w1 [K, K]: exact_distances; w1_nearest, w1_closest: of the distances to the nearest other policy the mean and the
    smallest; w1_floor: the mean floor; w1_margin: nearest less own floor, on average; w1_same [P, 2]: same_pairs (w1_*
    of several policies only); cells, cells_each [K]: coverage.
    """
    cells, each = coverage(points, mask, cell)
    matrix, found = exact_distances(points, mask), {"cells": cells, "cells_each": each}
    if len(matrix) > 1:
        floor, nearest = np.diag(matrix), (matrix + np.diag(np.full(len(matrix), np.inf))).min(1)
        found |= {"w1_nearest": nearest.mean(), "w1_closest": nearest.min(), "w1_same": same_pairs(matrix)}
        found |= {"w1_floor": floor.mean(), "w1_margin": (nearest - floor).mean()}
    return found | {"w1": matrix}


def same_pairs(matrix, factor=1.5):
    """The pairs k < l of exact_distances as near as two samples of one policy, within `factor` floors: [P, 2]."""
    floor = np.diag(matrix)
    return np.argwhere(np.triu(matrix < factor * (floor[:, None] + floor) / 2, 1))


def coverage(points, mask, size):
    """Cells of edge `size` that the points [K, E, L, d] with mask [K, E, L] visit -> by all together, by each [K]."""
    mask = mask & np.isfinite(points).all(-1)
    cells = np.floor(np.where(mask[..., None], points, 0.0) / size).astype(np.int64)
    each = [np.unique(cells[k][mask[k]], axis=0) for k in range(len(points))]
    return len(np.unique(np.concatenate(each), axis=0)), np.array([len(x) for x in each])


def direction_gap(displacements):
    """The largest angle (degrees) between neighbouring mean directions of the policies, displacements [K, 2].

    Those that get less than half as far as the farthest have no direction; 360 if only one is left.
    """
    displacements = displacements[np.isfinite(displacements).all(1)]
    if not len(displacements):
        return float("nan")
    far = np.linalg.norm(displacements, axis=1)
    x, y = displacements[far >= far.max() / 2].T
    angles = np.sort(np.degrees(np.arctan2(y, x)))
    return float(np.diff(angles, append=angles[0] + 360).max())


def nearest(points, x, block=100):
    """The nearest of the points [n, d] to every x [B, d], exactly -> its distance [B], its index [B].

    The least distance over blocks of rows, then the place in the best block: XLA's argmin over all rows would take
    several times as long as the distances themselves (CPU).
    """
    num_blocks = -(-len(points) // block)
    fill = num_blocks * block - len(points)
    rows = jnp.pad(points, ((0, fill), (0, 0))).reshape(num_blocks, block, -1)
    squares = jnp.pad(jnp.sum(points**2, -1), (0, fill), constant_values=jnp.inf).reshape(num_blocks, block)
    # |row - x|^2 of a block, less |x|^2: [block, B]
    distances = lambda i, x: squares[i][:, None] - 2 * jnp.dot(rows[i], x.T, precision="highest")

    def compare(best, i):
        least = distances(i, x).min(0)
        return (jnp.minimum(best[0], least), jnp.where(least < best[0], i, best[1])), None

    nothing = jnp.full(len(x), jnp.inf), jnp.zeros(len(x), jnp.int32)
    (_, best), _ = jax.lax.scan(compare, nothing, jnp.arange(num_blocks))
    place = jax.lax.map(lambda row: distances(row[0], row[1][None])[:, 0].argmin(), (best, x), batch_size=512)
    index = best * block + place
    return jnp.linalg.norm(x - points[index], axis=-1), index
