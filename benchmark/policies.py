"""Policies of finished runs (docs/policy.md), read back as functions of observations."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from envs.buffers import turned


def load_actor(path, index=0):
    """Policy number `index` of a tanh_gaussian file -> function, the file's metadata.

    The function: observations [.., S] -> mean, log standard deviation [.., A] of arctanh(action).
    """
    with np.load(path, allow_pickle=False) as file:
        about = {"kind": str(file["kind"]), **json.loads(str(file["metadata_json"]))}
        layer = "actor/params/MLP_0/Dense_{}/{}".format
        depth = sum(key.endswith("kernel") for key in file.files)
        shift = file["observation_mean"][index] if "observation_mean" in file else 0.0
        scale = file["observation_std"][index] if "observation_std" in file else 1.0
        angles = file["observation_angles"][index].astype(int) if "observation_angles" in file else np.zeros(0, int)
        weights = [(file[layer(i, "kernel")][index], file[layer(i, "bias")][index]) for i in range(depth)]

    def actor(x):
        x = (turned(jnp.asarray(x), angles) - shift) / scale
        for i, (kernel, bias) in enumerate(weights):
            x = x @ kernel + bias
            x = jax.nn.relu(x) if i < depth - 1 else x
        mean, log_std = jnp.split(x, 2, axis=-1)
        return mean, jnp.clip(log_std, about["log_std_min"], about["log_std_max"])

    return actor, about
