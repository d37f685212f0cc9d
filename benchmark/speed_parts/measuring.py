"""Timing: cases in turn, with the cores that were used meanwhile, beside the rate of plain matrix multiplications."""

import functools
import itertools
import os
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import baselines
import envs.buffers

DISTURBED = 0.1  # cores used by others from which a number is marked
HEAD = "| part | what | median | best | | target | | own cores | other cores | load |"
RULE = "|---|---|--:|--:|---|---|---|--:|--:|--:|"


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
        less = unit in ("min", "s", "ms")
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


# === the limit of the machine ===


def matmul_chain(members, batch, width, seconds=0.1, layout="ebh,ehk->ebk"):
    """-> function, FLOPs of a call: x [members, batch, width] times square matrices, one by one.

    The matrices are orthogonal, so that x keeps its size; a member axis of 1 is a plain matmul. layout: another order
    of the axes of x, as an einsum, or "apart": a product for each member.
    """
    rng = np.random.default_rng(0)
    draw = lambda: np.linalg.qr(rng.normal(size=(width, width)))[0]
    shape = (members, batch, width) if members > 1 else (batch, width)
    stack = [np.stack([draw() for _ in range(members)]) for _ in range(8)]
    weights = jnp.asarray(np.stack(stack).reshape(8, *shape[:-2], width, width), jnp.float32)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    flops = 2.0 * members * batch * width * width
    rounds = max(1, round(seconds * 1e11 / (8 * flops)))

    product = jnp.matmul if members == 1 else functools.partial(jnp.einsum, layout)
    if layout == "apart":
        x, weights = list(x), [list(w) for w in weights]
        product = lambda x, w: [one @ each for one, each in zip(x, w, strict=True)]
    elif members > 1:
        x = jnp.einsum(f"ebh->{layout.partition(',')[0]}", x)

    def body(_, x):
        for w in weights:
            x = product(x, w)
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


def chain_case(members, batch, width, layout="ebh,ehk->ebk", named=""):
    """The machine's matmul rate at these sizes; named: what the layout is called."""
    chain, flops = matmul_chain(members, batch, width, layout=layout)
    shape = f"{members} x " * (members > 1) + f"{batch} x {width} x {width}"
    return Case(f"jax matmul {shape}, chained{named}", chain, "GF/s", flops / 1e9)
