"""How fast qdq.py is here, beside the machine's own matmul rate and the reference's rates.

    python benchmark/speed_qdq.py                      about 5 minutes on 2 quiet cores
    python benchmark/speed_qdq.py --json F             the numbers to a file
    python benchmark/speed_qdq.py --check              everything in small: does it work?

Sizes of halfcheetah (17 observations, 6 actions), batch 256, networks of 3 x 256, 100k rows. A policy update is a
critic step and half an actor step. The reference's rates (released code, JAX 0.4.20, 2 cores) were measured once
elsewhere; ratios to them hold for a machine of that kind only. Shares of the matmul floor are of this run: least
FLOPs of a step over the rate of a chained matmul, timed in turn with it. See benchmark/speed.py for the columns.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

import qdq
from benchmark.speed import HEAD, RULE, Bench, Case, chain_case, machine

REFERENCE = {"teacher": 176.7, "student": 91.0, "policy": 17.6}  # steps/s
FLOOR = {"teacher": 0.226, "student": 0.452, "policy": 1.42, "policy, mc": 4.24}  # GFLOP a step
TARGET = {"teacher": 1.5, "student": 1.7, "policy": 3.8}
NUM_OBS, NUM_ACT = 17, 6


def random_data(num_rows):
    """Normal observations, uniform actions: the times do not depend on the values -> rows, D_Q."""
    keys = jax.random.split(jax.random.key(0), 4)
    rows = qdq.Transitions(
        jax.random.normal(keys[0], (num_rows, NUM_OBS)),
        jax.random.uniform(keys[1], (num_rows, NUM_ACT), minval=-1.0),
        jax.random.normal(keys[2], (num_rows,)), jax.random.normal(keys[3], (num_rows, NUM_OBS)), jnp.zeros(num_rows),
    )  # fmt: skip
    c = jnp.concatenate([rows.observations, rows.actions], -1)
    return rows, qdq.Entries(c, jnp.tanh(rows.rewards), jnp.float32(-30.0), jnp.float32(500.0))


def cases(args, data, entries, name):
    """A Case for a chunk of all seeds of each phase."""
    teacher, student, policy = qdq.make_train(args, NUM_OBS, NUM_ACT)
    keys = jax.random.split(jax.random.key(0), args.num_seeds)
    net = teacher.init(keys).net
    full = lambda x: jnp.full(args.num_seeds, x)
    model = qdq.QModel(jax.tree.map(jnp.copy, net), full(entries.low), full(entries.high))

    def case(phase, state, chunk):
        kept = {"state": state}

        def call():
            kept["state"], metrics = chunk(kept["state"])
            return metrics

        return Case(f"{name}: {phase}", call, "/s", args.chunk * args.num_seeds, None, 1)

    return [
        case("teacher", teacher.init(keys), lambda state: teacher.chunk(state, entries)),
        case("student", student.init(keys, net), lambda state: student.chunk(state, net, entries)),
        case("policy", policy.init(keys), lambda state: policy.chunk(state, model, data)),
    ]


def run(bench):
    """One seed by quadrature and by 50 samples, and two seeds in one process."""
    data, entries = random_data(4_000 if bench.small else 100_000)
    args = qdq.Args(chunk=10 if bench.small else 500)
    one = cases(args, data, entries, "1 seed, 8 nodes")
    mc = cases(
        dataclasses.replace(args, uncertainty="mc", chunk=10 if bench.small else 100), data, entries, "50 samples"
    )
    two = cases(dataclasses.replace(args, num_seeds=2), data, entries, "2 seeds in all, 8 nodes")
    *values, rate = bench.measure(*one, mc[2], *two, chain_case(1, 256, 256))
    for phase, found in zip(REFERENCE, values[:3], strict=True):
        reference = [REFERENCE[phase]] * len(found)
        bench.ratio(f"{phase}: against the reference", found, reference, TARGET[phase])
        share = f"{phase}: share of the matmul floor ({FLOOR[phase]} GF)"
        bench.ratio(share, found, rate, None, "%", 100 * FLOOR[phase])
    bench.ratio("policy, 50 samples: against the reference", values[3], [REFERENCE["policy"]] * len(rate))
    share = f"policy, 50 samples: share of the matmul floor ({FLOOR['policy, mc']} GF)"
    bench.ratio(share, values[3], rate, None, "%", 100 * FLOOR["policy, mc"])
    for phase, alone, both in zip(REFERENCE, values[:3], values[4:], strict=True):
        bench.ratio(f"{phase}: 2 seeds against one after the other", both, alone, 1)
    steps = {"teacher": 0.8e6, "student": 1.6e6, "policy": 1.0e6}
    hours = [sum(steps[p] / v / 3600 for p, v in zip(steps, row, strict=True)) for row in zip(*values[:3], strict=True)]
    theirs = [sum(steps[p] / REFERENCE[p] / 3600 for p in steps)] * len(hours)
    bench.ratio("published run of one seed: against the reference", theirs, hours)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--repeats", type=int, default=3, help="timings of every row")
    parser.add_argument("--check", action="store_true", help="small sizes, one timing: no numbers")
    args = parser.parse_args()
    print(*(f"{k} {v}" for k, v in machine().items()), sep=", ")
    print(f"\n{HEAD}\n{RULE}", flush=True)
    began = time.perf_counter()
    bench = Bench("qdq", 1 if args.check else args.repeats, args.check)
    run(bench)
    seconds = time.perf_counter() - began
    print(f"\n{len(bench.rows)} rows in {seconds:.0f} s", flush=True)
    if args.json:
        command = " ".join(["python benchmark/speed_qdq.py", *sys.argv[1:]])
        result = {"command": command, "seconds": seconds, "machine": machine(), "rows": bench.rows}
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
