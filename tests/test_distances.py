"""Distances between samples (envs/distances.py) against goldens and exact transport."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs import distances
from envs.distances import neighbour_distances, unit_directions

GOLDEN = Path(__file__).parent / "golden"
SINGLE = sorted(p.name for p in GOLDEN.glob("apwd_D*.npz"))

pairwise_apwd = jax.jit(distances.pairwise_apwd)


def golden(name):
    with np.load(GOLDEN / name, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def cost_of(a, b, v, pad=0):
    """c(t) of one pair by `pairwise_apwd`, with `pad` rows of junk that the masks hide."""
    f = jnp.float32
    padded = lambda x: jnp.concatenate([jnp.asarray(x, f), jnp.full((pad, x.shape[1]), 3.3, f)])[None]
    mask = lambda x: (jnp.arange(len(x) + pad) < len(x))[None]
    cost = pairwise_apwd(padded(a), mask(a), padded(b), mask(b), jnp.asarray(v, f))
    return np.asarray(cost[0, 0])


@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("name", SINGLE)
def test_cost_golden(name, pad):
    g = golden(name)
    cost = cost_of(g["A"], g["B"], g["V"], pad)
    assert np.all(cost[len(g["A"]) :] == 0.0)
    cost = cost[: len(g["A"])]
    np.testing.assert_allclose(cost.mean(), g["apwd"], atol=1e-4)
    if g["min_proj_gap"] > 1e-6:  # else float32 may swap two points
        np.testing.assert_allclose(cost, g["cost"], atol=2e-5)
        if len(g["V"]) > 1 and not np.allclose(g["cost"], g["cost_scrambled_bug"], atol=1e-2):
            assert np.abs(cost - g["cost_scrambled_bug"]).max() > 5e-3  # the reference's wrong credit


@pytest.mark.parametrize("name", SINGLE)
def test_cost_bounds_w1(name):
    g = golden(name)
    mean = cost_of(g["A"], g["B"], g["V"]).mean()
    assert mean >= g["w1_exact"] - 1e-4
    if g["A"].shape[1] == 1:
        np.testing.assert_allclose(mean, g["w1_exact"], atol=1e-4)


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


@pytest.mark.parametrize("orthogonal", [False, True])
def test_directions(orthogonal):
    v = unit_directions(jax.random.key(0), 7, 3, orthogonal)
    assert v.shape == (7, 3)
    np.testing.assert_allclose(np.linalg.norm(v, axis=-1), 1.0, atol=1e-6)
    if orthogonal:
        np.testing.assert_allclose(v[:3] @ v[:3].T, np.eye(3), atol=1e-6)


def test_neighbour_distances():
    matrix = jnp.array([[0.0, 1, 5], [1, 0, 4], [5, 4, 0]])
    m = neighbour_distances(matrix)
    assert float(m["min_w"]) == 2.0 and float(m["smallest_w"]) == 1.0
    np.testing.assert_allclose(m["pair_mean_w"], 20 / 6, rtol=1e-6)
    assert int(m["distinct_nearest"]) == 2 and neighbour_distances(matrix[:1, :1]) == {}
