"""How fast the scripts are here, beside plain NumPy and PyTorch and the machine's own limits.

    python benchmark/speed.py                       everything, under 8 minutes on 2 quiet cores
    python benchmark/speed.py --part sac --json F   one part, numbers to a file
    python benchmark/speed.py --check               every part in small: does it work?
    python benchmark/speed.py --markdown F          numbers of a file -> the table of docs/speed.md

Parts: pseudo_reward, sac, collection, mopo, startup. The parts run one after the other, each in a
process of its own. What is compared within a part runs in turn, again and again, so that ratios
hold also where the machine's speed drifts. Beside every number stand the cores that this process
used and the cores that others used meanwhile (and what the hypervisor took): a row with more than
0.1 of the latter is marked as disturbed, and its number is no measurement of this code.
Parts sac and mopo need PyTorch (pip install torch==2.13.0); nothing else does. See docs/speed.md.
JAX runs on the CPU unless JAX_PLATFORMS says otherwise; the targets are those of a CPU.
"""

import argparse
import dataclasses
import itertools
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import rollout as mujoco_rollout

import envs
import envs.buffers
import mopo
import wurl_sac
from benchmark import baselines

ROOT = Path(__file__).resolve().parents[1]
DISTURBED = 0.1  # cores used by others from which a number is marked
HEAD = "| part | what | median | best | | target | | own cores | other cores | load |"
RULE = "|---|---|--:|--:|---|---|---|--:|--:|--:|"


# === measuring ===


class Case(NamedTuple):
    """Something to time. A call of `function` does `amount` of the work that `unit` counts.

    unit: "steps/s" and the like (more is better), "s" or "ms" (less is better; seconds of a call
    times `amount`). calls: in one timing; 0: as many as take half a second.
    """

    name: str
    function: Callable
    unit: str
    amount: float = 1.0
    target: float | None = None
    calls: int = 0

    def value(self, seconds):
        if self.unit in ("s", "ms"):
            return seconds * self.amount * (1e3 if self.unit == "ms" else 1.0)
        return self.amount / seconds


def cpu_clock():
    """-> CPU seconds of the machine (with those stolen from it), of this process and children."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return busy, sum(u.ru_utime + u.ru_stime for u in usage)


def timing(function, calls):
    """-> seconds of a call, cores used by this process, cores used by others."""
    (busy, own), began = cpu_clock(), time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(function())
    wall = time.perf_counter() - began
    busy_after, own_after = cpu_clock()
    own, busy = own_after - own, busy_after - busy
    return wall / calls, own / wall, max(busy - own, 0.0) / wall


class Bench:
    """Times the cases of a part and prints them row by row."""

    def __init__(self, part, repeats, small):
        self.part, self.repeats, self.small = part, repeats, small
        self.rows = []

    def calls(self, case):
        """Compile and warm up -> calls of one timing."""
        jax.block_until_ready(case.function())
        if case.calls or self.small:
            return case.calls or 1
        return max(1, round(0.5 / max(timing(case.function, 1)[0], 1e-6)))

    def measure(self, *cases):
        """Time the cases in turn, `repeats` times -> the values of each, [repeats]."""
        calls = [self.calls(case) for case in cases]
        taken = [[] for _ in cases]
        for _ in range(self.repeats):
            for case, n, into in zip(cases, calls, taken, strict=True):
                into.append(timing(case.function, n))
        values = []
        for case, of_case in zip(cases, taken, strict=True):
            seconds, own, others = np.array(of_case).T
            values.append([case.value(s) for s in seconds])
            self.row(case.name, case.unit, values[-1], case.target, (own.mean(), others.max()))
            self.rows[-1]["cpu_seconds_of_a_call"] = (own * seconds).tolist()
        return values

    def row(self, name, unit, values, target=None, cores=None):
        """Note and print a row; without `cores` it is derived from the rows before it."""
        less = unit in ("s", "ms")
        target = None if self.small else target
        median, best = statistics.median(values), (min if less else max)(values)
        if cores is None:
            cores = [None, max(r["other_cores"] for r in self.rows)]
        row = {"part": self.part, "name": name, "unit": unit, "values": values, "median": median}
        row |= {"best": best, "target": target, "target_is_most": less, "own_cores": cores[0]}
        row |= {"other_cores": cores[1], "load": os.getloadavg()[0]}
        self.rows.append(row)
        print(table_row(row), flush=True)

    def ratio(self, name, over, under, target=None, unit="x", scale=1.0):
        """A row of `over` / `under`, timing by timing."""
        values = [scale * a / b for a, b in zip(over, under, strict=True)]
        self.row(name, unit, values, target)
        return values


def table_row(row):
    """A row as a line of a markdown table."""
    number = lambda x: f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"
    target, verdict, most = "", "", row["target_is_most"]
    if row["target"] is not None:
        met = row["median"] <= row["target"] if most else row["median"] >= row["target"]
        target = f"{'<=' if most else '>='} {row['target']:g}"
        verdict = "met" if met else "**missed**"
    if row["other_cores"] > DISTURBED:
        verdict = f"{verdict} (disturbed)".strip()
    own = "" if row["own_cores"] is None else f"{row['own_cores']:.2f}"
    cells = [row["part"], row["name"], number(row["median"]), number(row["best"]), row["unit"]]
    cells += [target, verdict, own, f"{row['other_cores']:.2f}", f"{row['load']:.1f}"]
    return "| " + " | ".join(cells) + " |"


def machine():
    """What the numbers belong to."""
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*:\s*(.+)", info)
    about = {"cpu": model.group(1) if model else platform.machine(), "cores": os.cpu_count()}
    about |= {"date": time.strftime("%Y-%m-%d"), "commit": envs.buffers.git_commit()[:12]}
    torch = baselines.torch
    about |= envs.buffers.versions() | {"torch": torch.__version__ if torch else "none"}
    return about


# === the machine's limit ===


def matmul_chain(members, batch, width, seconds=0.1):
    """-> function, FLOPs of a call: x [members, batch, width] times square matrices, one by one.

    The matrices are orthogonal, so that x keeps its size; a member axis of 1 is a plain matmul.
    """
    rng = np.random.default_rng(0)
    draw = lambda: np.linalg.qr(rng.normal(size=(width, width)))[0]
    shape = (members, batch, width) if members > 1 else (batch, width)
    stack = [np.stack([draw() for _ in range(members)]) for _ in range(8)]
    weights = jnp.asarray(np.stack(stack).reshape(8, *shape[:-2], width, width), jnp.float32)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    flops = 2.0 * members * batch * width * width
    rounds = max(1, round(seconds * 1e11 / (8 * flops)))

    def body(_, x):
        for w in weights:
            x = x @ w
        return x

    chain = jax.jit(lambda x: jax.lax.fori_loop(0, rounds, body, x))
    return lambda: chain(x), 8 * rounds * flops


def mlp_flops(widths, batch):
    """Matmul FLOPs of: forward, gradients of weights, of hidden layers, of the inputs."""
    layers = [2.0 * batch * a * b for a, b in itertools.pairwise(widths)]
    return sum(layers), sum(layers), sum(layers[1:]), layers[0]


def sac_flops(num_obs, num_act, hidden, batch):
    """Least matmul FLOPs of a SAC update: nothing that no gradient needs is counted."""
    actor, actor_w, actor_h, _ = mlp_flops((num_obs, *hidden, 2 * num_act), batch)
    critic, critic_w, critic_h, into = mlp_flops((num_obs + num_act, *hidden, 1), batch)
    critic_step = actor + 2 * critic + 2 * (critic + critic_w + critic_h)
    to_actions = into * num_act / (num_obs + num_act)
    actor_step = (actor + actor_w + actor_h) + 2 * (critic + critic_h + to_actions)
    return critic_step + actor_step


def torch_with(threads, function):
    """`function` of no arguments, run with this many PyTorch threads."""

    def run():
        baselines.torch.set_num_threads(threads)
        function()

    return run


def both_threads(name, function, unit, amount):
    """PyTorch on one thread and on all cores: two cases."""
    threads = (("1 thread", 1), ("all cores", os.cpu_count()))
    return [Case(f"PyTorch, {label}: {name}", torch_with(n, function), unit, amount, calls=1) for label, n in threads]


def chain_case(members, batch, width):
    """The machine's matmul rate at these sizes."""
    chain, flops = matmul_chain(members, batch, width)
    shape = f"{members} x " * (members > 1) + f"{batch} x {width} x {width}"
    return Case(f"jax matmul {shape}, chained", chain, "GF/s", flops / 1e9)


# === parts ===


def pseudo_reward(bench):
    """All K (K - 1) pairs of K = 10 policies, 200 points each, 5 directions."""
    for dim in (2, 17):
        pseudo_reward_at(bench, dim)


def pseudo_reward_at(bench, dim):
    """Random walks in `dim` dimensions: check that all agree, then time them."""
    points = np.random.default_rng(0).normal(size=(10, 200, dim)).cumsum(1).astype(np.float32)
    directions = np.asarray(wurl_sac.unit_directions(jax.random.key(0), 5, dim))
    args = wurl_sac.Args(num_policies=10, num_directions=5, reward_scale=1.0)
    p, alive = jnp.asarray(points[:, None]), jnp.ones((10, 1, 200), bool)
    shorter = alive.at[0, 0, -1].set(False)
    program = jax.jit(lambda alive: wurl_sac.apwd_reward(p, alive, p, alive, directions, args)[0])
    exact = points.astype(np.float64), directions.astype(np.float64), 1.0
    by_ranks = baselines.transport_cost_equal
    loop, ranks = baselines.nearest_reward(*exact), baselines.nearest_reward(*exact, by_ranks)
    for name, reward in (("wurl_sac", np.asarray(program(alive))[:, 0]), ("ranks", ranks)):
        error = np.abs(reward - loop).mean() / loop.mean()
        if not error < 1e-4:
            raise SystemExit(f"d = {dim}: {name} and the NumPy loop differ by {error:.2g}")
    case = lambda name, function: Case(f"d = {dim}: {name}", function, "ms")
    ours, loop, ranks, _ = bench.measure(
        case("wurl_sac.apwd_reward", lambda: program(alive)),
        case("NumPy, pairs, directions, points", lambda: baselines.nearest_reward(*exact)),
        case("NumPy, pairs, directions", lambda: baselines.nearest_reward(*exact, by_ranks)),
        case("wurl_sac.apwd_reward, unequal lengths", lambda: program(shorter)),
    )
    bench.ratio(f"d = {dim}: against the loop over points", loop, ours, 100)
    bench.ratio(f"d = {dim}: against NumPy without that loop", ranks, ours)


def random_rows(key, shape, num_obs, num_act):
    """Transitions [.., S], [.., A], .. of a stable linear system with noise 0.03."""
    keys = jax.random.split(key, 4)
    observations = jax.random.normal(keys[0], (*shape, num_obs))
    actions = jax.random.uniform(keys[1], (*shape, num_act), minval=-1.0)
    push = jax.random.normal(keys[2], (num_act, num_obs)) * 0.1
    noise = 0.03 * jax.random.normal(keys[3], observations.shape)
    next_observations = 0.95 * observations + actions @ push + noise
    rewards = next_observations[..., 0] - 0.1 * (actions**2).sum(-1)
    zeros = jnp.zeros(shape)
    return wurl_sac.Transitions(observations, actions, rewards, next_observations, zeros)


def sac(bench):
    """SAC updates of K = 10 policies: batch 128, hidden 256, observations 29, actions 8."""
    args = wurl_sac.Args()
    task, env = envs.task("ant"), envs.make("ant", "mujoco")
    init = wurl_sac.make_train(args, env, task, lambda x: x, task.episode_length)[0]
    agent = init(jax.random.key(0)).agent
    sizes = env.observation_size, env.action_size
    num, steps = args.num_policies, 10 if bench.small else 100
    rows = random_rows(jax.random.key(1), (num, args.replay_size), *sizes)
    full = jnp.full(num, args.replay_size, jnp.int32)
    replay = wurl_sac.Ring(rows, jnp.zeros_like(full), full)

    def train_policy(agent, replay, key):
        step = lambda agent, key: wurl_sac.wurl_update(agent, replay, key, args, lambda x: x)
        return jax.lax.scan(step, agent, jax.random.split(key, steps))

    def updates(at_once, num_devices=1):
        train = lambda *xs: jax.lax.map(lambda x: train_policy(*x), xs, batch_size=at_once)
        devices = dataclasses.replace(args, num_devices=num_devices)
        place = wurl_sac.state_sharding(devices).agent
        inputs = jax.device_put((agent, replay, jax.random.split(jax.random.key(2), num)), place)
        program = jax.jit(wurl_sac.over_devices(train, devices))
        return lambda: program(*inputs)

    rates = [args.learning_rate] * 3
    plain = baselines.SAC(sizes, args.hidden_sizes, rates, args.alpha, False, args.log_std_min)
    plain_rows = baselines.Rows([np.array(x[0]) for x in rows])
    plain_steps = lambda: [plain.update(plain_rows.sample(args.batch_size)) for _ in range(steps)]
    flops = sac_flops(*sizes, args.hidden_sizes, args.batch_size)
    once = lambda name, function, amount: Case(name, function, "/s", amount, calls=1)
    ours, spread, torch_1, _, _, rate, _ = bench.measure(
        once("wurl_update, K = 10 in turn (policy updates)", updates(1), num * steps),
        once("wurl_update, K = 10 shared by the cores (policy updates)", updates(1, os.cpu_count()), num * steps),
        once("PyTorch SAC, 1 thread", torch_with(1, plain_steps), steps),
        once("PyTorch SAC, all cores", torch_with(os.cpu_count(), plain_steps), steps),
        once("wurl_update, K = 10 as one batch (policy updates)", updates(num), num * steps),
        chain_case(1, args.batch_size, max(args.hidden_sizes)),
        chain_case(1, 1024, 1024),
    )
    for name, rates in (("in turn", ours), ("shared by the cores", spread)):
        bench.ratio(f"{name}, against PyTorch on 1 thread", rates, torch_1, 3)
        share = f"{name}, share of the matmul floor ({flops / 1e9:.3f} GF an update)"
        bench.ratio(share, rates, rate, 60, "%", flops / 1e9 * 100)


def open_loop(env, start, actions):
    """Raw MuJoCo on our starts [B, ..] and actions [B, L, A] -> (whole episodes, step by step)."""
    model, threads = env.model, os.cpu_count()
    pool = mujoco_rollout.Rollout(nthread=threads)
    datas = [mujoco.MjData(model) for _ in range(threads)]
    skip, (batch, length, _) = env.robot.frame_skip, actions.shape
    low, high = model.actuator_ctrlrange.T
    control = (low + high) / 2 + (high - low) / 2 * actions.astype(np.float64)
    control = np.repeat(control, skip, axis=1)
    physics = jax.tree.map(np.asarray, start.pipeline_state)
    state = np.concatenate([np.zeros((batch, 1)), physics.qpos, physics.qvel], -1)
    out = np.empty((batch, length * skip, state.shape[1]))
    out_step = np.empty((batch, skip, state.shape[1]))
    per_step = [control[:, t * skip : (t + 1) * skip].copy() for t in range(length)]

    def whole():
        return pool.rollout(model, datas, state, control, state=out)[0]

    def stepwise():
        now = state
        for part in per_step:
            now = pool.rollout(model, datas, now, part, state=out_step)[0][:, -1].copy()
        return now

    return whole, stepwise


def collection_at(bench, robot, num_policies, num_envs, length, target):
    """Steps of wurl_sac's rollouts against raw MuJoCo on the same starts and actions."""
    env, task = envs.make(robot, "mujoco"), envs.task(robot)
    length = 10 if bench.small else length
    args = wurl_sac.Args(num_policies=num_policies, num_envs=num_envs)
    init, _, _, rollouts = wurl_sac.make_train(args, env, task, lambda x: x, length)
    actor = init(jax.random.key(0)).agent.actor
    keys = jax.random.split(jax.random.key(1), num_policies)
    program = jax.jit(rollouts, static_argnums=2)
    ours = lambda: program(actor, keys, num_envs)

    reset_keys = jax.vmap(lambda k: jax.random.split(jax.random.split(k)[0], num_envs))(keys)
    start = jax.jit(jax.vmap(env.reset))(reset_keys.reshape(-1))
    steps = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), ours().transition)
    whole, stepwise = open_loop(env, start, steps.actions)
    apart = np.abs(whole()[:, env.robot.frame_skip - 1, 1:3] - steps.root_positions[:, 1]).max()
    if not apart < 1e-4:
        raise SystemExit(f"{robot}: raw MuJoCo lands {apart:.2g} m from the rollout")
    size, amount = f"{robot}, {num_policies} x {num_envs} environments", steps.actions[..., 0].size
    case = lambda name, f: Case(f"{size}: {name}", f, "steps/s", amount, calls=amount > 10_000)
    fast, raw, raw_steps = bench.measure(
        case("wurl_sac.rollout", ours),
        case("mujoco.rollout, whole episodes in a call", whole),
        case("mujoco.rollout, a call for each step", stepwise),
    )
    bench.ratio(f"{size}: of whole episodes", fast, raw, target, "%", 100)
    bench.ratio(f"{size}: of a call for each step", fast, raw_steps, None, "%", 100)


def collection(bench):
    """Both robots at 256 environments, and at the batch that wurl_sac uses by default."""
    num, each = wurl_sac.Args().num_policies, wurl_sac.Args().num_envs
    for robot, length in (("ant", 60), ("cheetah", 200)):
        collection_at(bench, robot, 8, 32, length, 90)
        collection_at(bench, robot, num, each, 200, 70)


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
    _, _, calls = mopo.epoch_sizes(len(data.rewards) - args.holdout_rows, args)
    state = {"fit": fit_init(key, data), "train": init(key)}
    model = fitted(state["fit"], data)
    first = lambda tree: jax.tree.map(lambda x: jnp.copy(x[0]), tree)
    one_model, agent = first(model), first(state["train"].agent)
    state["ring"] = first(state["train"].ring)
    refill = lambda ring, key: mopo.refresh(agent, ring, one_model, data, key, args, task)
    refill = jax.jit(refill, donate_argnums=0)

    @jax.jit
    def scan(agent, ring, key):
        step = lambda agent, key: mopo.mopo_update(agent, ring, data, key, args)
        return jax.lax.scan(step, agent, jax.random.split(key, num_updates))

    def epoch():
        for _ in range(calls):
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
    epoch, _, plain, rate = bench.measure(
        Case(f"fit_chunk: {name}", parts.epoch, "s", 1, 6.5, 1),
        *both_threads(f"{name}, from {done} steps", train, "s", steps / done),
        chain_case(args.ensemble_size, batch, max(widths)),
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


def mopo_part(bench):
    """halfcheetah size (17 observations, 6 actions), 100k rows, horizon 5, one seed."""
    args = dataclasses.replace(mopo.Args(), **mopo.PRESETS["halfcheetah-medium-v2"])
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


def first_lines(folder):
    """Start the main job afresh -> seconds to its warm-up line and to its first progress line."""
    command = [sys.executable, "-u", "wurl_sac.py", "--out", str(folder)]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    began, seen = time.perf_counter(), {}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipe)
    limit = threading.Timer(300, process.kill)
    limit.start()
    lines = []
    try:
        while "update" not in seen and (line := process.stdout.readline()):
            lines.append(line)
            seen.setdefault(line.split(" ")[0], time.perf_counter() - began)
    finally:
        limit.cancel()
        process.kill()
        process.wait()
    if "update" not in seen:
        raise SystemExit("wurl_sac.py showed no progress in 300 s:\n" + "".join(lines[-5:]))
    return seen["warm-up:"], seen["update"]


def startup(bench):
    """`python wurl_sac.py` (ant): from the start of the process to the first `update` line."""
    seen, cores = [], []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(bench.repeats):
            run = lambda i=i: seen.append(first_lines(Path(folder, str(i))))
            cores.append(timing(run, 1)[1:])
    own, others = np.array(cores).T
    warm, first = zip(*seen, strict=True)
    cores = own.mean(), others.max()
    bench.row("wurl_sac.py: warm-up collected", "s", warm, None, cores)
    bench.row("wurl_sac.py: first progress line", "s", first, 30, cores)


PARTS = {
    "pseudo_reward": pseudo_reward, "sac": sac, "collection": collection, "mopo": mopo_part,
    "startup": startup,
}  # fmt: skip


# === command line ===


def run_part(args):
    """One part in this process -> its rows."""
    if args.part == "sac":
        jax.config.update("jax_num_cpu_devices", os.cpu_count())
    bench = Bench(args.part, 1 if args.check else args.repeats, args.check)
    PARTS[args.part](bench)
    return bench.rows


def run_all(args):
    """Every part in a process of its own -> the rows of all."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            path = Path(folder, f"{part}.json")
            command = [sys.executable, "-u", __file__, "--part", part, "--json", str(path)]
            command += ["--repeats", str(args.repeats), "--no-head"] + ["--check"] * args.check
            code = subprocess.run(command).returncode
            if code:
                raise SystemExit(code)
            rows += json.loads(path.read_text())["rows"]
    return rows


def markdown(path):
    """Put the numbers of a file into docs/speed.md, between its two marks."""
    if not Path(path).is_file():
        raise SystemExit(f"{path}: no such file; make it: python benchmark/speed.py --json {path}")
    result = json.loads(Path(path).read_text())
    if "--check" in result["command"]:
        raise SystemExit(f"{path} is of a --check: its numbers mean nothing; run without")
    about = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    text = f"`{result['command']}`: {result['seconds']:.0f} s. {about}\n\n"
    text += "\n".join([HEAD, RULE, *map(table_row, result["rows"])])
    page = ROOT / "docs" / "speed.md"
    start, end = "<!-- table -->", "<!-- end of table -->"
    before, rest = page.read_text().split(start)
    page.write_text(f"{before}{start}\n\n{text}\n\n{end}{rest.split(end)[1]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--part", choices=list(PARTS), help="only this part; without: all")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--repeats", type=int, default=3, help="timings of every row")
    parser.add_argument("--check", action="store_true", help="small sizes, one timing: no numbers")
    parser.add_argument("--markdown", metavar="JSON", help="only write the table of docs/speed.md")
    parser.add_argument("--no-head", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.markdown:
        return markdown(args.markdown)
    if args.part in (None, "sac", "mopo"):
        baselines.require_torch()
    if not args.no_head:
        print(*(f"{k} {v}" for k, v in machine().items()), sep=", ")
        print(f"\n{HEAD}\n{RULE}", flush=True)
    began = time.perf_counter()
    rows = run_part(args) if args.part else run_all(args)
    seconds = time.perf_counter() - began
    print(f"\n{len(rows)} rows in {seconds:.0f} s", flush=True)
    if args.json:
        command = " ".join(["python benchmark/speed.py", *sys.argv[1:]])
        result = {"command": command, "seconds": seconds, "machine": machine(), "rows": rows}
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
