"""What the learners' tests share: goldens, comparisons, and flax networks in plain float64 numpy."""

from pathlib import Path

import jax
import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name, floats=np.float64):
    """Arrays of a golden file, those in float64 as `floats`."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {k: file[k].astype(floats) if file[k].dtype == float else file[k] for k in file.files}


def close(found, wanted, tolerance=1e-10):
    """Relative to the largest entry, as sums are."""
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(found, wanted, atol=tolerance * np.abs(wanted).max(), rtol=tolerance)


def leaves_close(found, wanted, **tolerance):
    """Leaf by leaf but for keys; without a tolerance they must be equal."""
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        if not jax.numpy.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, **(tolerance or {"rtol": 0, "atol": 0}))


def size_of(tree):
    return sum(float(np.abs(x).sum()) for x in jax.tree.leaves(tree))


def of_seed(tree, seed=0):
    return jax.tree.map(lambda x: x[seed], tree)


def relu(x):
    return np.maximum(x, 0.0)


def mish(x):
    return x * np.tanh(np.logaddexp(0.0, x))


def mlp(layers, x, activation=relu):
    """{Dense_i: {kernel, bias}} of the layers, the activation between them -> output."""
    for i in range(len(layers)):
        kernel, bias = (np.asarray(layers[f"Dense_{i}"][k], float) for k in ("kernel", "bias"))
        x = (activation(x) if i else np.asarray(x, float)) @ kernel + bias
    return x


def twin_q(params, observations, actions):
    """The critics' parameters -> q [2, B]."""
    x = np.concatenate([observations, actions], -1)
    return np.stack([mlp(params["params"][f"MLP_{i}"], x)[..., 0] for i in range(2)])


def tanh_normal(mean, log_std, noise):
    """-> actions, log densities by the change of variables, log(1 - tanh^2) taken literally."""
    mean, log_std, noise = (np.asarray(x, float) for x in (mean, log_std, noise))
    actions = np.tanh(mean + np.exp(log_std) * noise)
    normal = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi)
    return actions, np.sum(normal - np.log1p(-(actions**2)), -1)


def gaussian_actor(params, observations, noise, args):
    """The tanh Gaussian's parameters -> actions, log densities."""
    mean, log_std = np.split(mlp(params["params"]["MLP_0"], observations), 2, axis=-1)
    return tanh_normal(mean, np.clip(log_std, args.log_std_min, args.log_std_max), noise)
