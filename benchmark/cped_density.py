"""Is the learnt density right? Hybrid loss, likelihood only and adversarial only on data of known density.

    python benchmark/cped_density.py --out runs/cped/density                      point robot, two modes
    python benchmark/cped_density.py --out runs/cped/density --task ant-angle-60 --policy POLICY.npz     tanh-normal

Without --policy the behaviour is scripted: a = tanh(u), u from two normals of weights 0.6 and 0.4 around +-m(s),
m turning with x and y. With --policy it is a tanh-normal policy of wurl_sac.py (number --index), rolled out afresh.
Trains cped.py's flow with each loss on the same file and prints KL(true || learnt) and correlation of the log
densities on held-out rows.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import cped
import envs
import envs.buffers
import wurl_sac
from policies import load_actor
from runner import plots

LOSSES = {"hybrid": {}, "likelihood": {"adv_weight": 0.0}, "adversarial": {"nll_weight": 0.0}}


def two_modes(obs, key):
    """The scripted behaviour -> actions [N, 2], log density [N]."""
    turn = 2.0 * obs[:, 0] + obs[:, 1]
    m = 0.8 * jnp.stack([jnp.cos(turn), jnp.sin(turn)], -1)
    key_mode, key_noise = jax.random.split(key)
    sign = jnp.where(jax.random.uniform(key_mode, (len(obs), 1)) < 0.6, 1.0, -1.0)
    u = sign * m + 0.3 * jax.random.normal(key_noise, m.shape)
    normal = lambda mean: jnp.sum(-0.5 * ((u - mean) / 0.3) ** 2 - jnp.log(0.3 * jnp.sqrt(2 * jnp.pi)), -1)
    log_p = jnp.logaddexp(jnp.log(0.6) + normal(m), jnp.log(0.4) + normal(-m))
    return jnp.tanh(u), log_p - jnp.sum(2.0 * (jnp.log(2.0) - u - jax.nn.softplus(-2.0 * u)), -1)


def tanh_normal(path, index):
    """Policy number `index` of a policy.npz of wurl_sac.py, in raw observations."""
    actor, _ = load_actor(path, index)

    def behave(obs, key):
        mean, log_std = actor(obs)
        return wurl_sac.tanh_normal_sample(mean, log_std, jax.random.normal(key, mean.shape))

    return behave


def make_buffer(path, task_name, behave, episodes, seed=0):
    """Roll `behave` out in the task's world -> a relabelled buffer with action_log_probs at `path`."""
    task, world = envs.task(task_name), envs.make(envs.task(task_name).env)
    length = task.episode_length
    key_reset, key_steps = jax.random.split(jax.random.key(seed))

    def step(state, key):
        actions, log_p = behave(state.obs, key)
        after = jax.vmap(world.step)(state, actions)
        return after, (jax.vmap(envs.transition)(state, actions, after), log_p)

    roll = lambda start: jax.lax.scan(step, start, jax.random.split(key_steps, length))[1]
    start = jax.vmap(world.reset)(jax.random.split(key_reset, episodes))
    steps, log_p = jax.tree.map(lambda x: np.asarray(jnp.swapaxes(x, 0, 1)), jax.jit(roll)(start))
    flat = lambda x: None if x is None else x.reshape(episodes * length, *x.shape[2:])
    steps = envs.Transition(*map(flat, steps))
    arrays = {k: v for k, v in steps._asdict().items() if v is not None} | {"rewards": task.reward(steps)}
    arrays |= {"observations": task.observe(steps.observations), "action_log_probs": flat(log_p)}
    arrays |= {"next_observations": task.observe(steps.next_observations)}
    arrays["timeouts"] = np.tile(np.arange(length) == length - 1, episodes)
    arrays["terminals"] = np.zeros(episodes * length, bool)
    about = {
        "dataset_name": f"{task_name}-known-density", "env": task.env, "task": task_name, "layout": "task",
        "reward_kind": "relabelled", "task_options": task.options, "dt": task.dt, "episode_length": length,
    }  # fmt: skip
    return envs.buffers.save(path, arrays, about)


def main(options):
    """Make the data, fit the three flows, print the table."""
    folder = Path(options.out)
    behave = tanh_normal(options.policy, options.index) if options.policy else two_modes
    path = make_buffer(folder / f"{options.task}.npz", options.task, behave, options.episodes)
    args = cped.Args(
        dataset=str(path), flow_updates=options.flow_updates, num_updates=1_000, eval_every=5_000, bc_only=True,
        flow_lr=1e-3, disc_lr=options.disc_lr, flow_hidden_sizes=(options.hidden,) * 2, num_seeds=options.num_seeds,
    )  # fmt: skip
    lines = ["| loss | KL(true, learnt), nats | correlation | held-out -log p | true |", "|---|--:|--:|--:|--:|"]
    for name, loss in LOSSES.items():
        out = folder / f"{options.task}-{name}"
        cped.main(dataclasses.replace(args, out=str(out), **loss))
        last = lambda key, out=out: np.array([values[-1] for _, values in plots.read(out, key).values()])
        kl, correlation, nll = (last(f"flow/{key}") for key in ("kl", "correlation", "nll_holdout"))
        spread = f"{kl.mean():.3f} +- {kl.std():.3f}"
        lines += [f"| {name} | {spread} | {correlation.mean():.3f} | {nll.mean():.3f} | {(nll - kl).mean():.3f} |"]
    print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--task", default="point-angle-0")
    parser.add_argument("--policy", help="policy.npz of wurl_sac.py; its world must be the task's")
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--flow-updates", type=int, default=20_000)
    parser.add_argument("--disc-lr", type=float, default=1e-3)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--num-seeds", type=int, default=1)
    main(parser.parse_args())
