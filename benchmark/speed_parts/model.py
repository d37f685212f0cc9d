"""mopo.py: the model's fit, its rollouts, and SAC on both, beside PyTorch."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import baselines
import envs
import mopo
import runner
from speed_parts.measuring import Case, both_threads, chain_case, mlp_flops, sac_flops
from speed_parts.wurl import random_rows


class Mopo(NamedTuple):
    """What the mopo part times: mopo.py's functions, and PyTorch's with the size of a call."""

    epoch: Callable
    refresh: Callable
    updates: Callable
    chunk: Callable
    plain: dict[str, tuple[Callable, int]]


def mopo_parts(args, task, data, num_updates, plain):
    """mopo.py's own functions at these flags; its `updates` need a `refresh` before them."""
    key = jax.random.split(jax.random.key(0), 1)
    fit_init, fit_chunk, fitted = mopo.make_fit(args)
    init, train_chunk = mopo.make_train(args, task)
    _, steps, in_epoch = mopo.epoch_sizes(len(data.rewards) - args.holdout_rows, args)
    state = {"fit": fit_init(key, data), "train": init(key)}
    model = fitted(state["fit"], data)
    first = lambda tree: jax.tree.map(lambda x: jnp.copy(x[0]), tree)
    one_model, agent = first(model), first(state["train"].agent)
    state["ring"] = first(state["train"].ring)
    refill = lambda ring, key: mopo.refresh(agent, ring, one_model, data, key, args, task)
    refill = jax.jit(refill, donate_argnums=0)

    seen = mopo.seen_rows(mopo.sight(data, args), data)

    @jax.jit
    def scan(agent, ring, key):
        step = lambda agent, key: mopo.mopo_update(agent, ring, seen, key, args)
        return jax.lax.scan(step, agent, jax.random.split(key, num_updates))

    def epoch():
        for _ in range(in_epoch // steps):
            state["fit"] = fit_chunk(state["fit"], data)
        return state["fit"].step

    def refresh():
        state["ring"], metrics = refill(state["ring"], key[0])
        return metrics

    def chunk():
        state["train"], metrics = train_chunk(state["train"], model, data)
        return metrics

    return Mopo(epoch, refresh, lambda: scan(agent, state["ring"], key[0]), chunk, plain)


def mopo_plain(args, data, sizes):
    """The same work in PyTorch; sizes: model steps, rollout rows, SAC updates of a call."""
    rows = baselines.Rows([np.array(x) for x in data[:5]])  # PyTorch's SAC knows transitions only
    hidden, members = args.model_hidden_sizes, args.ensemble_size
    world = baselines.Dynamics(rows, hidden, members, args.model_decays)
    rates = args.actor_lr, args.critic_lr, args.alpha_lr
    shape = data.observations.shape[1], data.actions.shape[1]
    agent = baselines.SAC(shape, args.hidden_sizes, rates, 1.0, True, args.log_std_min)
    num_steps, num_rows, num_updates = sizes
    num_real = int(args.real_ratio * args.batch_size)
    made = baselines.Rows(world.rollout(agent, num_rows, args.horizon, args.lam))

    def update():
        parts = rows.sample(num_real), made.sample(args.batch_size - num_real)
        agent.update([baselines.torch.cat(pair) for pair in zip(*parts, strict=True)])

    return {
        "train": (lambda: world.train(num_steps, args.model_batch_size), num_steps),
        "rollout": (lambda: world.rollout(agent, num_rows, args.horizon, args.lam), num_rows),
        "updates": (lambda: [update() for _ in range(num_updates)], num_updates),
    }


def mopo_model(bench, args, parts, num_rows, widths):
    """An epoch of the model's fit."""
    (train, done), name = parts.plain["train"], f"model, an epoch of {num_rows // 1000}k rows"
    steps, batch = num_rows // args.model_batch_size, args.model_batch_size
    size = args.ensemble_size, batch, max(widths)
    epoch, _, plain, rate, *_ = bench.measure(
        Case(f"fit_chunk: {name}", parts.epoch, "s", 1, 6.5, 1),
        *both_threads(f"{name}, from {done} steps", train, "s", steps / done),
        chain_case(*size),
        chain_case(*size, "beh,ehk->bek", ", rows before members"),
        chain_case(*size, "ehb,ehk->ekb", ", rows last"),
        chain_case(*size, "apart", ", a product for each member"),
    )
    bench.ratio(f"{name}: against PyTorch on all cores", plain, epoch)
    flops = steps * sum(mlp_flops(widths, args.ensemble_size * batch)[:3]) / 1e9
    floor = [flops / r for r in rate]
    bench.ratio(f"{name}: share of the matmul floor", floor, epoch, None, "%", 100)


def mopo_rollouts(bench, args, parts, widths):
    """A refresh of the ring -> PyTorch's seconds for it."""
    (roll, done), name = parts.plain["rollout"], f"rollout {args.rollout_batch} x {args.horizon}"
    rolled, _, plain, rate = bench.measure(
        Case(f"refresh: {name}", parts.refresh, "s", 1, 5, 1),
        *both_threads(f"{name}, from {done}", roll, "s", args.rollout_batch / done),
        chain_case(args.ensemble_size, mopo.rows_at_once(args), max(widths)),
    )
    bench.ratio(f"{name}: against PyTorch on all cores", plain, rolled)
    rows = args.ensemble_size * args.rollout_batch * args.horizon
    floor = [mlp_flops(widths, rows)[0] / 1e9 / r for r in rate]
    bench.ratio(f"{name}: share of the matmul floor", floor, rolled, None, "%", 100)
    return plain


def mopo_sac(bench, args, parts, num_updates, shape, plain_refresh):
    """SAC on a filled ring, alone and with its refreshes."""
    (learn, done), every, name = parts.plain["updates"], args.rollout_freq, "SAC, no refreshes"
    alone, _, plain, rate, whole = bench.measure(
        Case(f"mopo_update: {name}", parts.updates, "/s", num_updates, 200, 1),
        *both_threads(name, learn, "/s", done),
        chain_case(1, args.batch_size, max(args.hidden_sizes)),
        Case(f"train_chunk: SAC, a refresh every {every}", parts.chunk, "/s", every, 105, 1),
    )
    bench.ratio(f"{name}: against PyTorch on all cores", alone, plain)
    flops = sac_flops(*shape, args.hidden_sizes, args.batch_size) / 1e9
    bench.ratio(f"{name}: share of the matmul floor", alone, rate, None, "%", 100 * flops)
    both = [every / (every / x + y) for x, y in zip(plain, plain_refresh, strict=True)]
    bench.ratio("SAC with refreshes: against PyTorch on all cores, computed", whole, both)


def mopo_ours(bench, published, ours, every, num_updates):
    """What our defaults (D11 to D16) cost beside the published form, part by part, in turns."""
    for name, unit, amount in (
        ("epoch", "s", 1), ("refresh", "s", 1), ("updates", "/s", num_updates), ("chunk", "/s", every),
    ):  # fmt: skip
        case = lambda form, parts: Case(f"{form}, {name}", getattr(parts, name), unit, amount, calls=1)  # noqa: B023
        theirs, own = bench.measure(case("as published", published), case("our defaults", ours))
        seconds = (own, theirs) if unit == "s" else (theirs, own)
        bench.ratio(f"our defaults, {name}: seconds over those as published", *seconds)


def mopo_part(bench):
    """halfcheetah size (17 observations, 6 actions), 100k rows, horizon 5, one seed."""
    args = dataclasses.replace(mopo.Args(), **mopo.PUBLISHED["halfcheetah-medium-v2"])
    num_rows, num_updates, plain_sizes = 100_000, 500, (60, 5_000, 150)
    if bench.small:
        num_rows, num_updates, plain_sizes = 4_000, 50, (4, 500, 10)
        args = dataclasses.replace(args, rollout_batch=1_000, rollout_freq=50, chunk=50)
    task = envs.task("cheetah-run")
    shape = task.observation_size, task.action_size
    rows = random_rows(jax.random.key(0), (num_rows + args.holdout_rows,), *shape)
    data = mopo.Rows(*rows, jnp.zeros_like(rows.terminals))
    parts = mopo_parts(args, task, data, num_updates, mopo_plain(args, data, plain_sizes))
    widths = (sum(shape), *args.model_hidden_sizes, 2 * (shape[0] + 1))
    mopo_model(bench, args, parts, num_rows, widths)
    plain_refresh = mopo_rollouts(bench, args, parts, widths)
    mopo_sac(bench, args, parts, num_updates, shape, plain_refresh)
    own = dataclasses.replace(args, **{name: getattr(mopo.Args(), name) for name in mopo.AS_CODES})
    own = runner.with_angles(own, task)
    ours = mopo_parts(own, task, data, num_updates, {})
    mopo_ours(bench, parts, ours, args.rollout_freq, num_updates)
