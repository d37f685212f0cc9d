"""Is the learnt density right? The weight and the form of CPED's adversarial term, on data of known density.

    python benchmark/cped_density.py --out runs/cped/density                      point robot, two modes
    python benchmark/cped_density.py --out runs/cped/density --task ant-angle-60 --policy POLICY.npz     tanh-normal

Without --policy the behaviour is scripted: a = tanh(u), u from two normals of weights 0.6 and 0.4 around +-m(s),
m turning with x and y. With --policy it is a tanh-normal policy of mopo.py or wurl_sac.py (--index), played anew.
Trains cped.py's flow with each loss on the same file, and judges it on held-out rows: KL(true || learnt), correlation
of the log densities, and sliced W1 between true (s, a) and (s, a^), a^ a sample of the flow at the same s. The row
`true` is the behaviour's own W1, its actions drawn again. Writes density.json and prints a table.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import cped
import envs
import envs.buffers
import runner
import wurl_sac
from policies import load_actor

EQ4 = {"disc_outputs": "one"}  # the default, as released, has S + A
LOSSES = {  # cell: changed flags
    "likelihood": {"adv_weight": 0.0},
    "released": {},
    "eq4": EQ4,
    "eq4-weight0.3": EQ4 | {"adv_weight": 0.3},
    "eq4-weight3": EQ4 | {"adv_weight": 3.0},
    "adversarial": EQ4 | {"nll_weight": 0.0},
}
KEYS = ("kl", "correlation", "nll_holdout", "sliced_w1")


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


def tanh_normal(path, index, task):
    """Policy number `index` of a policy.npz of wurl_sac.py or mopo.py, in raw observations.

    Only the latter sees what the flow sees. The former's law also depends on what the task hides, such as x and y, so
    that no flow can reach a KL of 0.
    """
    actor, about = load_actor(path, index)
    observe = task.observe if about["observations"] == "task" else lambda obs: obs

    def behave(obs, key):
        mean, log_std = actor(observe(obs))
        return wurl_sac.tanh_normal_sample(mean, log_std, jax.random.normal(key, mean.shape))

    return behave


def make_buffer(path, task_name, behave, episodes, seed=0):
    """Roll `behave` out in the task's world -> a relabelled buffer with action_log_probs at `path`, actions drawn anew.

    The latter [N, A] are a second draw in the states of the first.
    """
    task, world = envs.task(task_name), envs.make(envs.task(task_name).env)
    length = task.episode_length
    key_reset, key_steps = jax.random.split(jax.random.key(seed))

    def step(state, key):
        actions, log_p = behave(state.obs, key)
        after = jax.vmap(world.step)(state, actions)
        again = behave(state.obs, jax.random.fold_in(key, 1))[0]
        return after, (jax.vmap(envs.transition)(state, actions, after), log_p, again)

    roll = lambda start: jax.lax.scan(step, start, jax.random.split(key_steps, length))[1]
    start = jax.vmap(world.reset)(jax.random.split(key_reset, episodes))
    flat = lambda x: np.asarray(jnp.swapaxes(x, 0, 1)).reshape(episodes * length, *x.shape[2:])
    steps, log_p, again = jax.tree.map(flat, jax.jit(roll)(start))
    arrays = {k: v for k, v in steps._asdict().items() if v is not None} | {"rewards": task.reward(steps)}
    arrays |= {"observations": task.observe(steps.observations), "action_log_probs": log_p}
    arrays |= {"next_observations": task.observe(steps.next_observations)}
    arrays["timeouts"] = np.tile(np.arange(length) == length - 1, episodes)
    arrays["terminals"] = np.zeros(episodes * length, bool)
    about = {
        "dataset_name": f"{task_name}-known-density", "env": task.env, "task": task_name, "layout": "task",
        "reward_kind": "relabelled", "task_options": task.options, "dt": task.dt, "episode_length": length,
    }  # fmt: skip
    return envs.buffers.save(path, arrays, about), again


def sliced_w1(x, y, num=256):
    """Mean over random directions of W1 between the projections of two samples [n, d]."""
    directions = np.random.default_rng(0).normal(size=(x.shape[1], num))
    directions /= np.linalg.norm(directions, axis=0)
    return float(np.abs(np.sort(x @ directions, 0) - np.sort(y @ directions, 0)).mean())


def judge(flow, data, key, args):
    """Measures of one seed's flow on the held-out rows -> dict."""
    found = cped.density_metrics(flow, data, args)
    held = data.holdout
    fake = cped.flow_sample(flow, held.observations, held.actions.shape[-1], key, args)
    true = np.concatenate([held.observations, held.actions], -1)
    return {k.removeprefix("flow/"): float(v) for k, v in found.items()} | {
        "sliced_w1": sliced_w1(true, np.asarray(fake))
    }


def fit(data, args):
    """Train the flow, --num-seeds times -> measures of each seed."""
    init, flow_chunk, _ = cped.make_train(args)
    state = init(runner.seed_keys(args), data)
    for _ in range(args.flow_updates // args.chunk):
        state, _ = flow_chunk(state, data)
    seeds = [jax.tree.map(lambda x, s=s: x[s], state.nets.flow) for s in range(args.num_seeds)]
    return [judge(flow, data, jax.random.key(s), args) for s, flow in enumerate(seeds)]


def table(found):
    """Mean and spread over seeds of every cell."""
    lines = ["| loss | KL(true, learnt), nats | correlation | held-out -log p | sliced W1 |", "|---|--:|--:|--:|--:|"]
    for name, seeds in found.items():
        values = {key: np.array([seed.get(key, np.nan) for seed in seeds]) for key in KEYS}
        told = [f"{x.mean():.3f} +- {x.std(ddof=1):.3f}" if len(x) > 1 else f"{x.mean():.3f}" for x in values.values()]
        lines += ["| ".join([f"| {name} ", *(f"{x} " for x in told)]) + "|"]
    return "\n".join(lines)


def main(options):
    """Make the data, fit the flows, print the table."""
    if options.table:
        return print(table(json.loads(Path(options.table).read_text())))
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    behave = two_modes
    if options.policy:
        behave = tanh_normal(options.policy, options.index, envs.task(options.task))
    path, again = make_buffer(folder / f"{options.task}.npz", options.task, behave, options.episodes)
    base = dict(
        flow_updates=options.flow_updates, flow_lr=1e-3, disc_lr=options.disc_lr, num_seeds=options.num_seeds,
        flow_hidden_sizes=(options.hidden,) * 2, holdout_rows=4_000, chunk=500,
    )  # fmt: skip
    buffer = envs.buffers.load(path, quiet=True)
    args = cped.Args(**base)
    data, *_ = cped.cped_data(buffer, args)
    held = np.random.default_rng(0).permutation(len(again))[: len(data.holdout.rewards)]  # as cped_data holds out
    side = lambda actions: np.concatenate([data.holdout.observations, actions], -1)
    truth = {"kl": 0.0, "correlation": 1.0, "nll_holdout": -float(data.log_probs.mean())}
    found = {"true": [truth | {"sliced_w1": sliced_w1(side(data.holdout.actions), side(again[held]))}]}
    for name in options.losses:
        loss = LOSSES[name]
        found[name] = fit(data, cped.Args(**base | loss))
        print(name, *(f"{key} {[round(seed[key], 4) for seed in found[name]]}" for key in KEYS), flush=True)
        (folder / "density.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/cped/density")
    parser.add_argument("--task", default="point-angle-0")
    parser.add_argument("--policy", help="policy.npz of mopo.py or wurl_sac.py; its world must be the task's")
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--flow-updates", type=int, default=20_000)
    parser.add_argument("--disc-lr", type=float, default=1e-3)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--num-seeds", type=int, default=1)
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=LOSSES)
    parser.add_argument("--table", metavar="FILE", help="only print the table of a density.json")
    main(parser.parse_args())
