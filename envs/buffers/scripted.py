"""Scripted data of the point world: what `--quick` runs on where there is no file yet."""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import envs
import envs.buffers


def point_buffers(folder, seed, num=10, episodes=20, warmup=2):
    """Write `num` raw buffers of the point world and return their paths.

    Policy k heads for k / num of a turn with noise on its actions; its first `warmup` of `episodes`
    episodes are random. The same seed gives the same files but for their date.
    """
    env = envs.make("point")
    length = env.episode_length
    angles = 2 * jnp.pi * jnp.arange(num) / num
    headings = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)

    def episode(heading, key):
        def step(state, noise):
            action = jnp.clip(heading + 0.5 * noise, -1.0, 1.0)
            after = env.step(state, action)
            return after, envs.transition(state, action, after)

        reset_key, noise_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, (length, env.action_size))
        return jax.lax.scan(step, env.reset(reset_key), noise)[1]

    aims = jnp.repeat(headings[:, None], episodes, axis=1).at[:, :warmup].set(0.0)
    keys = jax.random.split(jax.random.key(seed), (num, episodes))
    steps = jax.tree.map(np.asarray, jax.jit(jax.vmap(jax.vmap(episode)))(aims, keys))
    ends = np.tile(np.arange(length) == length - 1, episodes)
    paths = [Path(folder) / f"policy_{k:02d}.npz" for k in range(num)]
    for k in range(num):
        arrays = {
            name: value[k].reshape(episodes * length, -1)
            for name, value in steps._asdict().items()
            if value is not None
        }
        arrays |= {"rewards": np.zeros(len(ends), np.float32), "timeouts": ends}
        arrays["terminals"] = np.zeros(len(ends), bool)
        metadata = {
            "dataset_name": "point-scripted", "env": "point", "task": "point", "layout": "env",
            "reward_kind": "none", "dt": env.dt, "episode_length": length, "seed": seed,
            "policy_id": k, "warmup_transitions": warmup * length,
            "generator": {"script": "envs.scripted", "flags": {"seed": seed}},
        }  # fmt: skip
        envs.buffers.save(paths[k], arrays, metadata)
    return paths


def dataset(folder):
    """point-angle-0.npz in `folder`: noisy walks in ten directions mixed and relabelled -> its path.

    An existing file is kept: a resumed run must find the data it began with.
    """
    path, task = Path(folder) / "point-angle-0.npz", envs.task("point-angle-0")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as raw:
        parts = [envs.buffers.load(file, quiet=True) for file in point_buffers(raw, seed=0, episodes=8)]
        arrays = {k: np.concatenate([part[k] for part in parts]) for k in parts[0].arrays}
    arrays["rewards"] = task.reward(envs.Transition(*(arrays[k] for k in envs.Transition._fields[:5])))
    about = {"dataset_name": "point-angle-0-scripted", "task": task.name, "layout": "task", "reward_kind": "relabelled"}
    about |= {"task_options": task.options, "warmup_transitions": None, "policy_id": None}
    return envs.buffers.save(path, arrays, {**parts[0].metadata, **about})
