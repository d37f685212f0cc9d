"""Distances between samples (envs/distances.py) against goldens and exact transport."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs import distances
from envs.distances import (
    coverage,
    direction_gap,
    exact_distances,
    exact_measures,
    neighbour_distances,
    same_pairs,
    unit_directions,
)

GOLDEN = Path(__file__).parent / "golden"
TRAILS = Path(__file__).parent / "trails"
SINGLE = sorted(p.name for p in GOLDEN.glob("apwd_D*.npz"))

pairwise_apwd = jax.jit(distances.pairwise_apwd, static_argnames="plan")


def golden(name):
    return dict(np.load(GOLDEN / name, allow_pickle=False))


def cost_of(a, b, v, *sizes):
    """c(t) of one pair by `pairwise_apwd`; sizes: rows of either set, with junk that the masks hide."""
    rows = sizes or (len(a), len(b))
    padded = lambda x, n: jnp.concatenate([jnp.float32(x), jnp.full((n - len(x), x.shape[1]), 3.3)])[None]
    sets = [part for x, n in zip((a, b), rows, strict=True) for part in (padded(x, n), (jnp.arange(n) < len(x))[None])]
    return np.asarray(pairwise_apwd(*sets, jnp.float32(v))[0, 0])


@pytest.mark.parametrize("name", SINGLE)
def test_cost_golden(name):
    """Hidden rows apart; also by the plan of equal sizes. Its mean is a bound of W1, in one dimension W1 itself."""
    g = golden(name)
    num, dim = g["A"].shape
    for sizes in ((204, 207),) if num != len(g["B"]) else ((204, 207), ()):
        cost, hidden = np.split(cost_of(g["A"], g["B"], g["V"], *sizes), [num])
        assert np.all(hidden == 0.0)
        np.testing.assert_allclose(cost.mean(), g["apwd"], atol=1e-4)
        assert cost.mean() >= g["w1_exact"] - 1e-4
        if dim == 1:
            np.testing.assert_allclose(cost.mean(), g["w1_exact"], atol=1e-4)
        if g["min_proj_gap"] > 1e-6:  # else float32 may swap two points
            np.testing.assert_allclose(cost, g["cost"], atol=2e-5)
            if len(g["V"]) > 1 and not np.allclose(g["cost"], g["cost_scrambled_bug"], atol=1e-2):
                assert np.abs(cost - g["cost_scrambled_bug"]).max() > 5e-3  # the reference's wrong credit


def test_identity_and_general_plan_agree():
    key_a, key_v = jax.random.split(jax.random.key(0))
    points = jax.random.normal(key_a, (3, 40, 2))
    directions = unit_directions(key_v, 6, 2)
    all_valid = jnp.ones((3, 40), bool)
    fast = pairwise_apwd(points, all_valid, points, all_valid, directions)
    padded = jnp.pad(points, ((0, 0), (0, 5), (0, 0)), constant_values=7.0)
    mask = jnp.pad(all_valid, ((0, 0), (0, 5)))
    general = pairwise_apwd(padded, mask, padded, mask, directions)
    np.testing.assert_allclose(fast, general[:, :, :40], atol=1e-5)


def test_cost_symmetry_and_permutations():
    rng = np.random.default_rng(0)
    a, b, v = rng.normal(size=(30, 3)), rng.normal(size=(30, 3)) + 1, np.eye(3)
    cost = cost_of(a, b, v)
    np.testing.assert_allclose(cost.mean(), cost_of(b, a, v).mean(), atol=1e-5)
    order = rng.permutation(30)
    np.testing.assert_allclose(cost_of(a, b[order], v), cost, atol=1e-5)
    np.testing.assert_allclose(cost_of(a[order], b, v), cost[order], atol=1e-5)


def test_directions():
    for orthogonal in (False, True):
        v = unit_directions(jax.random.key(0), 7, 3, orthogonal)
        assert v.shape == (7, 3)
        np.testing.assert_allclose(np.linalg.norm(v, axis=-1), 1.0, atol=1e-6)
    np.testing.assert_allclose(v[:3] @ v[:3].T, np.eye(3), atol=1e-6)


def far_apart(K=6, episodes=8, steps=50, seed=0):
    """Straight runs of K policies in K directions, noisy from episode to episode [K, E, L, 2], all steps alive."""
    angle = 2 * np.pi * np.arange(K) / K
    way = np.stack([np.cos(angle), np.sin(angle)], -1)[:, None, None] * np.linspace(0.1, 5, steps)[:, None]
    noise = np.random.default_rng(seed).normal(size=(K, episodes, 1, 2))
    return (way + 0.3 * noise).astype(np.float32), np.ones((K, episodes, steps), bool)


def test_exact_distances_are_the_cheapest_permutations():
    """Four points a sample: tried one by one."""
    points, mask = far_apart(3, 4, 2)
    matrix = exact_distances(points, mask)
    for k, l in itertools.combinations_with_replacement(range(3), 2):
        a, b = points[k, 0::2].reshape(-1, 2), points[l, 1::2].reshape(-1, 2)
        cost = np.linalg.norm(a[:, None] - b, axis=-1)
        cheapest = min(cost[range(4), p].mean() for p in itertools.permutations(range(4)))
        np.testing.assert_allclose([matrix[k, l], matrix[l, k]], cheapest, rtol=1e-6)


def test_a_sample_leaves_out_what_did_not_happen():
    points, mask = far_apart()
    mask[2, :, 30:] = False
    spoilt = np.where(mask[..., None], points, 1e6)
    np.testing.assert_allclose(exact_distances(spoilt, mask), exact_distances(points, mask))
    assert exact_distances(spoilt, mask).max() < 20
    broken = np.where(mask[..., None], points, np.nan)  # a robot that blew up: left out, too
    np.testing.assert_array_equal(exact_distances(broken, np.ones_like(mask)), exact_distances(spoilt, mask))
    assert coverage(broken, np.ones_like(mask), 1.0)[0] == coverage(spoilt, mask, 1.0)[0]
    broken[0] = np.inf
    assert np.isnan(exact_distances(broken, mask)).all() and coverage(broken, mask, 1.0)[1][0] == 0
    assert exact_measures(points[:1], mask[:1], 1.0).keys() == {"w1", "cells", "cells_each"}


def test_a_planted_duplicate_is_found_and_named():
    """A copy with other noise: nothing else among policies that go their own ways. It is as near as the floor."""
    points, mask = far_apart()
    assert len(same_pairs(exact_distances(points, mask))) == 0
    points[4] = far_apart(seed=1)[0][1]
    found = exact_measures(points, mask, 1.0)
    assert found["w1_same"].tolist() == [[1, 4]]
    assert found["w1_closest"] == found["w1"][1, 4] < 1.5 * found["w1_floor"]
    np.testing.assert_allclose(found["w1_nearest"] - found["w1_floor"], found["w1_margin"])


def test_a_duplicate_among_recorded_ants_is_named():
    """Positions of ten trained ants, 20 episodes each, every fourth step (`wurl_sac.py`, seed 0): nobody is like
    another until half of the episodes of one are given to a second."""
    with np.load(TRAILS / "ant.npz") as file:
        points = file["xy"].astype(np.float32)
    mask = np.ones(points.shape[:3], bool)
    assert same_pairs(exact_distances(points, mask)).tolist() == []
    for k in (0, 4, 9):
        four = points[[k, (k + 2) % 10, (k + 5) % 10, (k + 7) % 10], ::2].copy()
        four[2] = points[k, 1::2]
        assert [0, 2] in same_pairs(exact_distances(four, mask[:4, ::2])).tolist()


def test_direction_gap():
    ways = np.array([[3.0, 0.0], [0.0, 2.0], [-4.0, 0.0], [0.1, -0.5]])  # the last has no direction
    np.testing.assert_allclose(direction_gap(ways), 180.0)
    np.testing.assert_allclose(direction_gap(np.vstack([ways, [0.0, -3.0]])), 90.0)
    assert direction_gap(ways[:1]) == 360.0
    np.testing.assert_allclose(direction_gap(np.vstack([ways, [np.nan, 1.0]])), 180.0)  # a robot that blew up
    assert np.isnan(direction_gap(np.full((2, 2), np.inf)))


def test_cheapest_plan_is_the_best_of_the_directions():
    """By plans along one direction each; hidden rows apart, and for equal sizes. It lies between W1 and their mean."""
    rng = np.random.default_rng(0)
    x, y = jnp.float32(rng.normal(size=(2, 12, 2))), jnp.float32(rng.normal(size=(3, 12, 2)) + 1)
    v = unit_directions(jax.random.key(0), 3, 2)
    for num in (12, 9):
        masks = [jnp.broadcast_to(jnp.arange(12) < n, (k, 12)) for k, n in ((2, num), (3, 12))]
        cost = lambda v, **kind: np.asarray(pairwise_apwd(x, masks[0], y, masks[1], v, **kind))  # noqa: B023
        alone = np.stack([cost(v[m : m + 1]) for m in range(3)])  # [M, K, J, n]
        best = alone.sum(-1).argmin(0)
        cheapest = cost(v, plan="cheapest")
        np.testing.assert_allclose(cheapest, np.take_along_axis(alone, best[None, ..., None], 0)[0], atol=1e-5)
        assert len(np.unique(best)) > 1 and (cheapest.sum(-1) < cost(v).sum(-1)).all()
        if num == 12:
            exact = np.array([[distances.wasserstein(a, b) for b in y] for a in x])
            assert (cheapest.mean(-1) >= exact - 1e-5).all()


def test_coverage_counts_cells_once():
    points = np.array([[[[0.1, 0.1], [0.9, 0.2], [1.1, 0.0]]], [[[0.5, 0.5], [-0.1, 0.0], [9.0, 9.0]]]])
    together, each = coverage(points, np.array([[[True] * 3], [[True, True, False]]]), 1.0)
    assert together == 3 and list(each) == [2, 2]
    assert coverage(points, np.ones((2, 1, 3), bool), 100.0)[0] == 2  # [0, 100)^2 and the one left of it


def test_neighbour_distances():
    matrix = jnp.array([[0.0, 1, 5], [1, 0, 4], [5, 4, 0]])
    m = neighbour_distances(matrix)
    assert float(m["min_w"]) == 2.0 and float(m["smallest_w"]) == 1.0
    np.testing.assert_allclose(m["pair_mean_w"], 20 / 6, rtol=1e-6)
    assert int(m["distinct_nearest"]) == 2 and neighbour_distances(matrix[:1, :1]) == {}


def grid_of_mixtures(samples, target, parts):
    """W1 to the target of every mixture in parts of 1 / `parts`, by copies of points: {weights: W1}."""
    n, found = len(samples[0]), {}
    for counts in itertools.product(range(parts + 1), repeat=len(samples)):
        if sum(counts) == parts:
            mixed = np.concatenate([np.repeat(x, count, axis=0) for x, count in zip(samples, counts, strict=True)])
            found[counts] = distances.wasserstein(mixed, np.repeat(target, parts * n // len(target), axis=0))
    return found


@pytest.mark.parametrize("num, parts", [(2, 12), (3, 6)])
def test_the_nearest_mixture_against_a_grid_of_weights(num, parts):
    rng = np.random.default_rng(num)
    for _ in range(3):
        samples, target = rng.normal(size=(num, 4, 2)) + 2 * rng.normal(size=(num, 1, 2)), rng.normal(size=(4, 2))
        weights, found = distances.mixture_weights(samples, target)
        grid = grid_of_mixtures(samples, target, parts)
        best = min(grid.values())
        assert weights.shape == (num,) and weights.sum() == pytest.approx(1) and weights.min() >= 0
        assert best - 0.15 < found <= best + 1e-9
        near = [counts for counts in grid if np.abs(weights - np.divide(counts, parts)).max() < 0.5 / parts + 1e-9]
        for counts in near:  # the weights, and not only their W1
            assert grid[counts] < found + 0.5


def test_a_mixture_is_found_again():
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(3, 12, 3)) + np.array([0, 5, 20])[:, None, None]
    target = np.concatenate([samples[0, :3], samples[1, :9]]) + [0.01, 0, 0]
    weights, found = distances.mixture_weights(samples, target)
    np.testing.assert_allclose(weights, [0.25, 0.75, 0], atol=0.02)
    assert found < 2.0
    own, nothing = distances.mixture_weights(samples, samples[2] + [0.0, 0.3, 0.4])
    np.testing.assert_allclose(own, [0, 0, 1], atol=1e-9)
    assert nothing == pytest.approx(0.5)
