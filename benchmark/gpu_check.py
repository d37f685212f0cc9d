"""One visit to an accelerator: is everything right there, how fast is it, does it learn?

    python benchmark/gpu_check.py --json gpu.json                seven minutes (--budget-s 420) on one device
    python benchmark/gpu_check.py --json gpu.json --stages device physics
    python benchmark/gpu_check.py --check --json /tmp/check.json  all of it in small, on a CPU: does it run to its end?
    python benchmark/gpu_check.py --markdown gpu.json            numbers of a file -> the table of docs/speed.md

Stages come in the order of their worth: the device's own limits; physics, MJX against C MuJoCo and its rate; the golden
tests and runs that learn; rates of the learners; whole rounds of wurl_sac.py. Every row is printed and kept in the file
before the next one begins. What fails is a row that says so, and the next goes on; a row or stage for which no time is
left is skipped and says so. Programs of a stage are compiled side by side, then timed one by one. docs/gpu.md says what
the rows mean.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # runs beside this process need memory, too
if __name__ == "__main__":
    sys.modules["torch"] = None  # where it is installed, speed_parts would import it, with its own CUDA

import jax
import jax.numpy as jnp
import numpy as np

import cped
import dac
import envs
import mjx_parity
import mopo
import qdq
import wurl_sac
from envs.base import quiet_imports
from runner import devices
from speed_parts import learners
from speed_parts.measuring import machine, mlp_flops, sac_flops

ROOT = Path(__file__).resolve().parents[1]
HEAD = "| stage | what | value | | of the floor | compile s | memory GB | |\n|---|---|--:|---|--:|--:|--:|---|"
MARKS = "<!-- accelerator -->", "<!-- end of accelerator -->"
SEEDS = (1, 32, 8)  # the order of their worth
TRACING = threading.Lock()  # while MJX is traced, its table of contacts is another one (envs/mjx_contacts.py)
SHAPE = learners.NUM_OBS, learners.NUM_ACT
FAR = 1e-4, 2e-3, 1e-3  # qpos, qvel and reward of the robot that is farthest off after one step
ONE = {"num_devices": 1}  # a machine may have several


class Check:
    """The rows of a run, each on the screen and in the file as soon as it is known."""

    def __init__(self, path, command, budget, small):
        self.path, self.budget, self.small, self.began = Path(path), budget, small, time.monotonic()
        self.stage, self.until, self.ok = "", self.began + budget, True
        self.found = {"command": command, "machine": machine() | device_of(), "seconds": 0.0, "rows": []}
        self.limits = {}  # of the device: GF/s of a product by its digits, GB/s of a "copy"
        self.building, self.beside = [], 0  # compilations, and how many of them ran when this row's work began
        self.processes = {}  # that were started

    def left(self):
        """Seconds until this stage has to end."""
        return self.until - time.monotonic()

    def row(self, what, unit="", values=(), note="", failed=False, **more):
        """values: of repeated timings, or one number; more: floor (percent), compile_s, memory_gb."""
        values = [float(x) for x in np.atleast_1d(values)]
        value = statistics.median(values) if values else None
        if values and self.beside:
            note = f"{note}; beside {self.beside} compilations".removeprefix("; ")
        row = {"stage": self.stage, "what": what, "value": value, "unit": unit, "values": values, "note": note, **more}
        self.ok &= not failed
        self.found["rows"].append(row | {"failed": failed})
        print(table_row(self.found["rows"][-1]), flush=True)
        self.save()

    def save(self):
        self.found["seconds"] = time.monotonic() - self.began
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(self.found, indent=1) + "\n")
        part.replace(self.path)

    def failure(self, what, error):
        lines = [x for x in str(error).splitlines() if x.strip()] or [""]
        self.row(what, note=f"{type(error).__name__}: {lines[0][:300]}".replace("|", "/"), failed=True)


def table_row(row):
    """A row as a line of a markdown table."""
    number = lambda x: "" if x is None else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"
    floor = f"{row['floor']:.2g} %" if row.get("floor") is not None else ""
    cells = [row["stage"], row["what"], number(row["value"]), row["unit"], floor]
    cells += [number(row.get("compile_s")), number(row.get("memory_gb")), "**failed** " * row["failed"] + row["note"]]
    return "| " + " | ".join(cells) + " |"


def device_of():
    """What the numbers belong to, beside the machine."""
    first = jax.local_devices()[0]
    found = {"device": f"{jax.local_device_count()} x {first.device_kind}", "backend": jax.default_backend()}
    found["platform"] = first.client.platform_version.replace("\n", " ")
    stats = first.memory_stats() or {}
    return found | {"memory GB": round(stats["bytes_limit"] / 1e9, 1)} if "bytes_limit" in stats else found


# === timing ===


class Built(NamedTuple):
    """A program that is compiled, with the arguments of its first call."""

    program: Callable
    inputs: tuple
    about: dict[str, Any]  # compile_s, memory_gb, note


def build(make, calls_back=False, digits="highest"):
    """make() -> jitted function, its arguments; -> Built. calls_back: it may call the host, others must not."""
    function, inputs = make()
    with TRACING, jax.default_matmul_precision(digits):
        began = time.monotonic()
        lowered = function.lower(*inputs)
        traced = time.monotonic() - began
    if not calls_back and re.search(r"custom_call @\w*callback", lowered.as_text()):
        raise RuntimeError("it calls the host")
    began = time.monotonic()
    program = lowered.compile()
    m = program.memory_analysis()
    size = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
    return Built(program, inputs, {"compile_s": traced + time.monotonic() - began, "memory_gb": size / 1e9})


def build_all(check, makers, share=0.6, **choices):
    """Compile programs side by side until `share` of the stage's time is gone -> {name: Built} of those that are ready.

    makers: {name: make}, in the order of their worth; choices: of `build`, each as name -> value.
    """
    choose = lambda name: {key: of(name) for key, of in choices.items()}
    pool = concurrent.futures.ThreadPoolExecutor(min(8, max(2, os.cpu_count() // 2)))
    futures = {name: pool.submit(build, make, **choose(name)) for name, make in makers.items()}
    concurrent.futures.wait(futures.values(), timeout=share * check.left())
    pool.shutdown(wait=False, cancel_futures=True)
    check.building += futures.values()
    found = {}
    for name, future in futures.items():
        if not future.done() or future.cancelled():
            check.row(name, note="skipped: not compiled in time")
        elif error := future.exception():
            check.failure(name, error)
        else:
            found[name] = future.result()
    return found


def rates(call, amount, seconds, repeats=3):
    """call() does `amount` of work -> how much of it a second, of `repeats` timings."""
    jax.block_until_ready(call())
    values = []
    for _ in range(repeats):
        calls, began, elapsed = 0, time.perf_counter(), 0.0
        while not calls or elapsed < seconds:
            jax.block_until_ready(call())
            calls, elapsed = calls + 1, time.perf_counter() - began
        values.append(calls * amount / elapsed)
    return values


def stepping(built):
    """A call that goes on from the state that the one before it returned, first of its results."""
    kept = {"state": built.inputs[0]}

    def call():
        result = built.program(kept["state"], *built.inputs[1:])
        kept["state"] = result[0]
        return result

    return call


def size_of(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


# === device ===


def device(check):
    """What this device can do at most: products of matrices, copies, steps of a scan, ways to the host and back."""
    size, seconds = (128, 0.02) if check.small else (4096, 0.3)
    x, w = (jax.random.normal(key, (size, size)) for key in jax.random.split(jax.random.key(0)))
    w, exact = w / size**0.5, np.float64(x[:256]) @ np.float64(w / size**0.5)
    for name, precision in devices.PRECISIONS.items():
        with jax.default_matmul_precision(precision):
            chain = jax.jit(lambda x, w, num: jax.lax.fori_loop(0, num, lambda _, x: x @ w, x))
            error = np.abs(np.asarray(chain(x, w, 1)[:256]) - exact).max()
            found = rates(lambda: chain(x, w, 10), 20 * size**3 / 1e9, seconds)  # noqa: B023
        check.limits[name] = statistics.median(found)
        check.row(f"matmul {size}, {name}", "GF/s", found, f"largest error {error:.1g}")
    many, more = jnp.ones(2**20 if check.small else 2**28), jax.jit(lambda x: x + 1)
    found = rates(lambda: more(many), 2 * size_of(many) / 1e9, seconds)
    check.limits["copy"] = statistics.median(found)
    check.row("copy, bytes read and written", "GB/s", found)
    steps = 100 if check.small else 10_000
    tiny = jax.jit(lambda x: jax.lax.fori_loop(0, steps, lambda _, x: 0.5 * x + 1.0, x))
    check.row("a step of a scan", "us", 1e6 / np.array(rates(lambda: tiny(jnp.ones(256)), steps, seconds)))
    host = lambda x: jax.pure_callback(lambda x: np.asarray(x), jax.ShapeDtypeStruct(x.shape, x.dtype), x)
    cross = jax.jit(lambda x: jax.lax.fori_loop(0, 100, lambda _, x: host(x), x))
    found = rates(lambda: cross(jnp.ones((40, 100))), 100, seconds)
    check.row("a step of a scan that calls the host, 16 kB", "us", 1e6 / np.array(found))


# === physics ===


def random_play(env, num):
    """-> jitted (states, key, steps) -> states; `steps` is no constant: one program for one step and for many."""

    def run(states, key, steps):
        def step(i, states):
            draw = jax.random.uniform(jax.random.fold_in(key, i), (num, env.action_size), minval=-1.0)
            return jax.vmap(env.step)(states, draw)

        return (jax.lax.fori_loop(0, steps, step, states),)

    return jax.jit(run)


@functools.cache
def starts(robot, num):
    """Poses and velocities in the middle of random play on C MuJoCo."""
    return mjx_parity.starts(mjx_parity.make_env(robot, "mujoco"), num, 0)


def physics_maker(robot, backend, num):
    """The program of `num` robots, and its first states."""

    def make():
        env = mjx_parity.make_env(robot, backend)
        env.check_batch(num)
        qpos, qvel = (jnp.tile(x, (-(-num // len(x)), 1))[:num] for x in starts(robot, min(num, 256)))
        fresh = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), num))
        return random_play(env, num), (mjx_parity.at(env, fresh, qpos, qvel), jax.random.key(1), jnp.int32(1))

    return make


def parity(check, what, limits, ours, theirs):
    """One step, and ten, against C MuJoCo's from the same states with the same actions."""
    for steps in (1, 10):
        ends = []
        for built in (ours, theirs):
            states, key, _ = built.inputs
            ends.append(jax.tree.map(np.asarray, built.program(states, key, jnp.int32(steps))[0]))
        parts = [(x.pipeline_state.qpos, x.pipeline_state.qvel, x.reward) for x in ends]
        errors = [mjx_parity.spread(np.abs(a - b)) for a, b in zip(*parts, strict=True)]
        apart = int((ends[0].done != ends[1].done).sum())
        told = ", ".join(
            f"{n} {e[0]:.1g} / {e[1]:.1g}" for n, e in zip(("qpos", "qvel", "reward"), errors, strict=True)
        )
        told += f"; {apart} ends differ" if apart else ""
        told += f"; limits of the medians {limits[steps]}" if steps in limits else "; no limits are known"
        above = lambda i, most: any(not error[i] <= x for error, x in zip(errors, most, strict=True))  # noqa: B023
        # a median above its limit tells a wrong model, and so does a single robot that is far off at once
        wrong = steps in limits and (apart or above(0, limits[steps]) or (steps == 1 and above(1, FAR)))
        check.row(f"{what}: {'one step' if steps == 1 else 'ten steps'} from C MuJoCo", note=told, failed=bool(wrong))


def physics_rate(check, name, built, num):
    states, key, _ = built.inputs
    run = lambda steps: jax.block_until_ready(built.program(states, key, jnp.int32(steps)))
    run(2)
    began = time.perf_counter()
    run(5)
    steps = int(np.clip(5 * 0.4 / (time.perf_counter() - began), 2, 5 if check.small else 2000))
    found = rates(lambda: run(steps), steps * num, 0, 1 if check.small else 3)
    note = f"{1e3 * num / statistics.median(found):.3g} ms a step of all"
    check.row(name, "steps/s", found, note, **built.about)


def physics_stage(check):
    """MJX (and Warp, where it imports) against C MuJoCo: one step of each robot, then steps a second."""
    with quiet_imports():
        from mujoco import mjx  # noqa: F401  (before threads import it)
    small = 64 if check.small else 256
    on_both = lambda *robots: [(robot, backend, small) for robot in robots for backend in ("mujoco", "mjx")]
    named = lambda robot, backend, num: f"{robot}, {backend}, {num:,} worlds"
    if check.stage == "warp":  # alone and last: its kernels may be built for minutes, inside of a first call
        if check.small or not importlib.util.find_spec("warp"):
            return check.row("all", note="not in --check" if check.small else "not installed")
        plan = [("ant", "mujoco", 256), ("ant", "warp", 256), ("ant", "warp", 8192), ("humanoid", "warp", 8192)]
    elif check.small:
        plan = on_both("cheetah")
    else:  # in the order of their worth
        plan = [*on_both("ant", "cheetah", "humanoid"), ("ant", "mjx", 8192), *on_both("hopper", "walker2d")]
        plan += [("cheetah", "mjx", 8192), ("humanoid", "mjx", 8192), ("ant", "mujoco", 40), ("ant", "mujoco", 8192)]
        plan += [(robot, "mjx", 2048) for robot in ("ant", "humanoid", "cheetah")]
    makers = {named(*x): physics_maker(*x) for x in plan}
    found = build_all(check, makers, calls_back=lambda name: ", mjx" not in name)
    for robot, backend, num in plan:
        pair = [found.get(named(robot, name, small)) for name in (backend, "mujoco")]
        if backend != "mujoco" and num == small and all(pair):
            what = f"{robot}, {backend}"
            guarded(check, what, lambda: parity(check, what, mjx_parity.TOLERANCES.get(robot, {}), *pair))  # noqa: B023
    for x in plan:
        if named(*x) in found:
            guarded(check, named(*x), lambda: physics_rate(check, named(*x), found[named(*x)], x[2]))  # noqa: B023


# === learners ===


class Phase(NamedTuple):
    """A phase of a learner: state of one seed, what else it takes, and what a step costs at least."""

    name: str
    chunk: Callable  # number of seeds -> jitted chunk(state, *own, *shared)
    state: Any
    own: tuple  # with a seed axis
    shared: tuple
    steps: int  # of a call
    gigaflops: float  # of a step of one seed
    learnt: Any  # read and written by every step


def dac_phases(rows, small):
    args = dac.Args(chunk=4, **ONE, **small) if small else dac.Args(chunk=200, **ONE)
    state = dac.make_train(args, *SHAPE)[0](learners.seed_keys(1))
    chunk = lambda num: dac.make_train(dataclasses.replace(args, num_seeds=num), *SHAPE)[1]
    data = learners.transitions(dac.Transitions, rows)
    flops = learners.dac_flops(args) / 1e9
    return [Phase("dac: update, N = 10", chunk, state, (), (data,), args.chunk, flops, state[2:])]


def cped_phases(rows, small):
    args = cped.Args(chunk=10, **ONE, **small) if small else cped.Args(chunk=500, **ONE, **cped.CODE)
    of = learners.transitions(cped.Transitions, rows)
    data = cped.CpedData(of, jax.tree.map(lambda x: x[:100], of), None)
    state = cped.make_train(args)[0](learners.seed_keys(1), data)
    chunk = lambda place: lambda num: cped.make_train(dataclasses.replace(args, num_seeds=num))[place]
    n, flops = state.nets, learners.CPED_FLOOR
    learnt = {"flow": (n.disc, n.disc_opt), "actor-critic": (n.critic, n.critic_opt)}  # in every iteration
    return [
        Phase(f"cped: {name}", chunk(place), state, (), (data,), args.chunk, flops["nice", name], learnt[name])
        for place, name in ((2, "actor-critic"), (1, "flow"))
    ]


def qdq_phases(rows, small):
    sizes = dict(chunk=10, **small) if small else dict(chunk=500)
    args = qdq.Args(**ONE, **qdq.PUBLISHED_ALL, **sizes)  # the floor's form
    make = lambda num: qdq.make_train(dataclasses.replace(args, num_seeds=num), *SHAPE)
    data, keys = learners.transitions(qdq.Transitions, rows), learners.seed_keys(1)
    c = jnp.concatenate([data.observations, data.actions], -1)
    entries = qdq.Entries(c, jnp.tanh(data.rewards), jnp.float32(-30.0), jnp.float32(500.0))
    teacher, student, policy = make(1)
    first, third = teacher.init(keys), policy.init(keys)
    net = first.nets.net
    model = qdq.QModel(net, jnp.full(1, entries.low), jnp.full(1, entries.high))
    parts = {"policy": (third, (model,), (data,)), "teacher": (first, (), (entries,))}
    parts["student"] = student.init(keys, net), (net,), (entries,)
    chunk = lambda name: lambda num: make(num)[list(learners.QDQ_STEPS).index(name)].chunk
    learnt = {name: part[0].nets for name, part in parts.items()}
    learnt["policy"] = third.nets.critic, third.nets.critic_opt  # the actor steps in every second
    return [
        Phase(f"qdq: {name}", chunk(name), *part, args.chunk, learners.QDQ_FLOOR[name], learnt[name])
        for name, part in parts.items()
    ]


def mopo_phases(rows, small):
    args = mopo.Args(**ONE, **mopo.PUBLISHED["halfcheetah-medium-v2"])
    if small:
        sizes = dict(model_hidden_sizes=(16, 16), rollout_batch=256, rollout_freq=10, chunk=10)
        args = dataclasses.replace(args, hidden_sizes=small["hidden_sizes"], **sizes)
    task, keys = envs.task("halfcheetah"), learners.seed_keys(1)
    data = mopo.Rows(*learners.transitions(dac.Transitions, rows), jnp.zeros(rows))
    fit_init, _, fitted = mopo.make_fit(args)
    fit, state = fit_init(keys, data), mopo.make_train(args, task)[0](keys)
    make = lambda num: dataclasses.replace(args, num_seeds=num)
    _, steps, _ = mopo.epoch_sizes(fit.bootstrap.shape[-1], args)
    widths = (sum(SHAPE), *args.model_hidden_sizes, 2 * (SHAPE[0] + 1))
    model_flops = sum(mlp_flops(widths, args.ensemble_size * args.model_batch_size)[:3]) / 1e9
    flops, model = sac_flops(*SHAPE, args.hidden_sizes, args.batch_size) / 1e9, fitted(fit, data)
    train = lambda num: mopo.make_train(make(num), task)[1]
    return [
        Phase("mopo: update and refreshes", train, state, (model,), (data,), args.chunk, flops, state.agent),
        Phase("mopo: step of the model", lambda num: mopo.make_fit(make(num))[1], fit, (), (data,), steps, model_flops,
              (fit.net, fit.opt)),
    ]  # fmt: skip


def for_seeds(tree, num):
    """The tree [1, ..] of one seed -> [num, ..], copies: the calls take their arrays away. Each has its own key."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    several = lambda x: jax.random.split(x[0], num) if is_key(x) else jnp.copy(jnp.repeat(x, num, 0))
    return jax.tree.map(several, tree)


def learner_maker(phase, num):
    return lambda: (phase.chunk(num), (*for_seeds((phase.state, *phase.own), num), *phase.shared))


def learners_stage(check):
    """Updates a second of every learner, published sizes, a million rows; S seeds at once."""
    small = dict(hidden_sizes=(32, 32), batch_size=32) if check.small else {}
    rows, seeds = (2_000, (2,)) if check.small else (1_000_000, SEEDS)
    phases = []
    makers = {"dac": dac_phases, "mopo": mopo_phases, "cped": cped_phases, "qdq": qdq_phases}
    with concurrent.futures.ThreadPoolExecutor(len(makers)) as pool:
        parts = {name: pool.submit(of, rows, small) for name, of in makers.items()}
    for name, part in parts.items():
        guarded(check, name, lambda: phases.extend(part.result()[: 1 if check.small else None]))  # noqa: B023
    plan = {f"{phase.name}, {num} seeds": (phase, num) for num in seeds for phase in phases}
    if phases and not check.small:  # the one with the largest products
        plan |= {f"{phases[0].name}, 32 seeds, {digits}": (phases[0], 32) for digits in list(devices.PRECISIONS)[1:]}
    digits = lambda name: devices.PRECISIONS[digits_of(name)]
    found = build_all(check, {name: learner_maker(*x) for name, x in plan.items()}, digits=digits)
    for name, built in found.items():
        guarded(check, name, lambda: learner_rate(check, name, built, *plan[name]))  # noqa: B023


def digits_of(name):
    """The precision that ends a row's name; float32 where none does."""
    last = name.rpartition(", ")[2]
    return last if last in devices.PRECISIONS else "float32"


def learner_rate(check, name, built, phase, num):
    each = 0.02 if check.small else 0.4
    found = rates(stepping(built), phase.steps * num, each, 1 if check.small else 3)
    floor = floor_of(check, phase.gigaflops, size_of(phase.learnt), digits_of(name))
    share = 100 * floor * statistics.median(found) if floor else None
    check.row(name, "/s", found, floor=share, **built.about)


def floor_of(check, gigaflops, size, digits):
    """Seconds that a step takes at least: its products at the device's rate, or parameters and moments in and out."""
    if not {digits, "copy"} <= check.limits.keys():
        return None
    return max(gigaflops / check.limits[digits], 2 * size / 1e9 / check.limits["copy"])


# === rounds ===


def round_sizes(check, num, backend):
    """The main job's flags with `num` policies, its world and task; in small two point robots."""
    name = "point" if check.small else "ant"
    changes = wurl_sac.PRESETS["ant"] | dict(num_policies=num) | ONE
    changes |= dict(hidden_sizes=(16, 16), num_envs=2, batch_size=16, updates_per_step=0.1) if check.small else {}
    task = envs.task(name)
    args = dataclasses.replace(wurl_sac.Args(), **changes)
    return dataclasses.replace(args, chunk=wurl_sac.round_sizes(args, task.episode_length)[1]), task, backend


def round_maker(args, task, backend):
    """Whole rounds: rollouts, pseudo-reward and updates."""

    def make():
        env = envs.make(task, backend)
        init, _, chunk, _ = wurl_sac.make_train(args, env, task, lambda x: x, task.episode_length)
        return chunk, (init(jax.random.key(0)),)

    return make


def updates_maker(args, task, backend):
    """The updates of a round alone."""

    def make():
        env = envs.make(task, backend)
        init = wurl_sac.make_train(args, env, task, lambda x: x, task.episode_length)[0]
        state = init(jax.random.key(0))
        step = lambda replay: lambda agent, key: wurl_sac.wurl_update(agent, replay, key, args, lambda x: x)
        one = lambda agent, replay, keys: jax.lax.scan(step(replay), agent, keys)
        keys = jax.random.split(jax.random.key(1), (args.num_policies, args.chunk))
        full = state.replay._replace(size=jnp.full(args.num_policies, args.replay_size, jnp.int32))
        return jax.jit(jax.vmap(one)), (state.agent, full, keys)

    return make


def rounds_stage(check):
    """Rounds of the main job with 10 and 100 policies on both engines, and their updates alone."""
    engines = ("auto",) if check.small else ("mujoco", "mjx")
    sizes = {(num, engine): round_sizes(check, num, engine) for num in ((2,) if check.small else (10, 100))
             for engine in engines}  # fmt: skip
    plan = {f"K = {num}: a round on {engine}": (round_maker, x) for (num, engine), x in sizes.items()}
    plan |= {f"K = {num}: updates alone": (updates_maker, x) for (num, _), x in sizes.items()}
    makers = {name: make(*x) for name, (make, x) in plan.items()}
    found = build_all(check, makers, calls_back=lambda name: name.endswith("mujoco"))
    for name, built in found.items():
        guarded(check, name, lambda: round_rate(check, name, built, plan[name][1][0], plan[name][1][1]))  # noqa: B023


def round_rate(check, name, built, args, task):
    seconds = 1 / np.array(rates(stepping(built), 1, 0, 1 if check.small else 3))
    per_s = lambda amount: f"{args.num_policies * amount / np.median(seconds):,.0f}"
    note = f"{per_s(args.chunk)} policy updates/s"
    if "round" in name:
        whole = args.num_updates / args.chunk * np.median(seconds)
        note += (
            f", {per_s(args.num_envs * task.episode_length)} steps/s; {whole:,.0f} s for {args.num_updates:,} updates"
        )
    check.row(name, "s", seconds, note, **built.about)


# === runs ===

GOLDEN, MAIN_JOB = "golden tests", "wurl_sac.py --num-updates 4000 --eval-every 4000 --backend"
RUNS = {name: f"{name}.py --quick" for name in ("wurl_sac", "mopo", "cped", "qdq", "dac", "udg_select")}
RUNS |= {f"main job, a ninth, {engine}": f"{MAIN_JOB} {engine}" for engine in ("mujoco", "mjx")}
WITH_GOLDENS = "distances", "cped", "dac", "mopo", "qdq", "wurl_sac"
SHOWN = ("eval/return", "eval/w1_nearest", "eval/w1_floor", "eval/disc_success")


def platforms():
    """JAX_PLATFORMS of a process beside this one: the accelerator, and the CPU that callbacks need."""
    name = jax.default_backend()
    return name if name == "cpu" else f"{'cuda' if name == 'gpu' else name},cpu"


def start(command, folder, **environment):
    """A Python process whose output goes to folder/output, and the head of a group of its own: it may start others."""
    folder.mkdir(parents=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment}
    with open(folder / "output", "w") as out:
        words = [sys.executable, *command]
        return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True)


def signal_groups(processes, number):
    """Send a signal to processes and all that they started."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def wait_for(processes, seconds):
    """Wait for {name: process}, then ask those that still run to stop -> {name: seconds until its end}."""
    began, took = time.monotonic(), {}
    while len(took) < len(processes) and time.monotonic() - began < seconds:
        for name, process in processes.items():
            if name not in took and process.poll() is not None:
                took[name] = time.monotonic() - began
        time.sleep(0.2)
    late = [process for name, process in processes.items() if name not in took]
    signal_groups(late, signal.SIGTERM)
    end = time.monotonic() + 5
    while time.monotonic() < end and any(process.poll() is None for process in late):
        time.sleep(0.1)
    signal_groups(late, signal.SIGKILL)
    for process in late:
        process.wait()
    return took


def golden_tests(small):
    """The command of the golden tests of all scripts."""
    which = ["-n", "4", *(f"tests/test_{name}.py" for name in WITH_GOLDENS), "-k", "golden"]
    which = ["-n", "0", "tests/test_distances.py", "-k", "D3_T5_d1"] if small else which
    return ["-m", "pytest", "-q", "-p", "no:cacheprovider", *which]


def last_scores(folder):
    """{name: number} of the last evaluation in a run's log, means over policies."""
    found = {}
    for path in folder.rglob("log.jsonl"):
        for line in path.read_text().splitlines()[1:]:
            with contextlib.suppress(ValueError):  # of a process that was killed the last line may be torn
                record = json.loads(line)
                found |= {k: float(np.mean(record[k])) for k in SHOWN if record.get(k) is not None}
    return found


def runs_stage(check):
    """The golden tests, all scripts' --quick and a ninth of the main job, at once, as processes of their own."""
    runs = {"udg_select": RUNS["udg_select"]} if check.small else RUNS
    with tempfile.TemporaryDirectory() as folder:
        places = {name: Path(folder, str(i)) for i, name in enumerate(runs)} | {GOLDEN: Path(folder, "golden")}
        commands = {name: [*runs[name].split(), "--out", str(places[name] / "run")] for name in runs}
        commands[GOLDEN] = golden_tests(check.small)
        # what the scripts tell themselves, the tests must be told
        digits = {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "JAX_PLATFORMS": platforms()}
        processes = check.processes = {
            name: start(command, places[name], **digits) for name, command in commands.items()
        }
        try:
            took = wait_for(processes, check.left() - 8)
        except BaseException:  # Ctrl-C
            signal_groups(processes.values(), signal.SIGKILL)
            raise
        for name, process in processes.items():
            lines = (places[name] / "output").read_text().replace("\r", "\n").strip().splitlines() or [""]
            note = ", ".join(f"{k} {v:.3g}" for k, v in last_scores(places[name]).items())
            if name not in took:
                note = f"skipped: not done in time; {note}; {lines[-1]}"
            elif name == GOLDEN:
                note = "; ".join([lines[-1].strip("= "), *(x for x in lines if x.startswith(("FAILED", "ERROR")))])
            elif process.returncode:
                note = f"{note}; ended with an error: {lines[-1]}"
            what, failed = f"{name}: {runs[name]}" if name in runs else name, name in took and process.returncode != 0
            check.row(what, "s", took.get(name, ()), note[:1500].replace("|", "/"), failed)


# === all ===

STAGES = {  # name: what it does, seconds without which it is not begun (the stages before it leave them), at most
    "device": (device, 10, 30), "physics": (physics_stage, 60, 130), "runs": (runs_stage, 70, 110),
    "learners": (learners_stage, 60, 120), "rounds": (rounds_stage, 50, 120),
    "warp": (physics_stage, 30, 120),
}  # fmt: skip


def guarded(check, what, work):
    """work(), unless the stage's time is up; an error becomes a row."""
    if check.left() < 0:
        return check.row(what, note="skipped: no time left")
    check.beside = sum(future.running() for future in check.building)
    try:
        work()
    except Exception as error:
        check.failure(what, error)


def run_stages(check, names):
    """Every stage within what the later ones leave to it."""
    end, room, fit = check.began + check.budget, check.budget, set()
    for name in names:  # the later ones are the first to go
        if STAGES[name][1] <= room:
            room, fit = room - STAGES[name][1], fit | {name}
    for place, name in enumerate(names):
        work, least, most = STAGES[name]
        later = sum(STAGES[name][1] for name in names[place + 1 :] if name in fit)
        check.stage, check.until = name, min(end - later, time.monotonic() + most)
        if check.small:  # it says whether all works, however slow the machine is
            check.until = time.monotonic() + 3600
        if check.left() < least:
            check.row("all", note=f"skipped: {check.left():.0f} s left, {least} wanted")
            continue
        began = time.monotonic()
        guarded(check, "all", functools.partial(work, check))
        peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        check.row("whole stage", "s", time.monotonic() - began, **({"memory_gb": peak / 1e9} if peak else {}))


def stop_hanging(check):
    """End the process, its rows kept, where it is not done a minute after the budget."""

    def end():
        print(f"stopped: {check.stage} is not done a minute after the budget", flush=True)
        signal_groups(check.processes.values(), signal.SIGKILL)
        os._exit(1)

    timer = threading.Timer(7200 if check.small else check.budget + 60, end)
    timer.daemon = True
    timer.start()
    return timer


def markdown(path):
    """Put the numbers of a file into docs/speed.md, between its marks."""
    found = json.loads(Path(path).read_text())
    if "--check" in found["command"]:
        raise SystemExit(f"{path} is of a --check: its numbers mean nothing; run without")
    about = ", ".join(f"{k} {v}" for k, v in found["machine"].items())
    text = f"`{found['command']}`: {found['seconds']:.0f} s. {about}\n\n{HEAD}\n"
    text += "\n".join(map(table_row, found["rows"]))
    page = ROOT / "docs" / "speed.md"
    before, rest = page.read_text().split(MARKS[0])
    page.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default="gpu_check.json", help="file for the numbers")
    parser.add_argument("--budget-s", type=float, default=420.0, help="seconds in which all must be done")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--check", action="store_true", help="all in small, also on a CPU: no numbers")
    parser.add_argument("--markdown", metavar="JSON", help="only write the table of docs/speed.md")
    args = parser.parse_args(argv)
    if args.markdown:
        return markdown(args.markdown)
    command = " ".join(["python benchmark/gpu_check.py", *argv])
    check = Check(args.json, command, args.budget_s, args.check)
    print(*(f"{k} {v}" for k, v in check.found["machine"].items()), sep=", ")
    print(f"\n{HEAD}", flush=True)
    watch = stop_hanging(check)
    run_stages(check, args.stages)
    watch.cancel()
    print(f"\n{time.monotonic() - check.began:.0f} s; {args.json}", flush=True)
    return 0 if check.ok else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # then the runs that it started end, too
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code or 0)  # a program that is still being compiled would hold the process back
