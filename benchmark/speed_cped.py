"""How fast cped.py is here, beside the machine's own matmul rate and the reference's published structure.

    python benchmark/speed_cped.py                      about 4 minutes on 2 quiet cores
    python benchmark/speed_cped.py --json F             the numbers to a file
    python benchmark/speed_cped.py --check              everything in small: does it work?

Sizes of halfcheetah (17 observations, 6 actions), batch 256, 100k rows. One iteration is one of the released code:
a discriminator step and a fifth of a flow step, or a critic step and half an actor step. The reference's rates
(12.1 and 23.8 iterations/s, PyTorch, its own networks, 2 threads of a 2-core machine) were measured once elsewhere;
ratios to them hold for a machine of that kind only. Shares of the matmul floor are of this run: least FLOPs of an
iteration over the rate of a chained 256 x 256 x 256 matmul, timed in turn with it. See benchmark/speed.py for the
columns.
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

import cped
from benchmark.speed import HEAD, RULE, Bench, Case, chain_case, machine

REFERENCE = {"flow": 12.1, "actor-critic": 23.8}  # iterations/s
FLOOR = {  # GFLOP an iteration
    ("cond", "flow"): 0.34, ("cond", "actor-critic"): 0.61, ("nice", "flow"): 2.6, ("nice", "actor-critic"): 1.65,
}  # fmt: skip


def random_data(num_rows, num_obs=17, num_act=6):
    """Normal observations, uniform actions: the times do not depend on the values."""
    keys = jax.random.split(jax.random.key(0), 3)
    rows = cped.Transitions(
        jax.random.normal(keys[0], (num_rows, num_obs)), jax.random.uniform(keys[1], (num_rows, num_act), minval=-1.0),
        jnp.zeros(num_rows), jax.random.normal(keys[2], (num_rows, num_obs)), jnp.zeros(num_rows),
    )  # fmt: skip
    return cped.CpedData(rows, jax.tree.map(lambda x: x[:100], rows), None)


def phases(args, data, name):
    """Cases of both phases; a call is one chunk of all seeds."""
    init, *chunks = cped.make_train(args)

    def case(phase, chunk):
        kept = {"state": init(jax.random.split(jax.random.key(0), args.num_seeds), data)}

        def call():
            kept["state"], metrics = chunk(kept["state"], data)
            return metrics

        return Case(f"{name}: {phase}", call, "it/s", args.chunk * args.num_seeds, None, 1)

    return [case(phase, chunk) for phase, chunk in zip(REFERENCE, chunks, strict=True)]


def flow_part(bench, flow, data, chunk):
    """Both phases with one kind of flow, one seed and four."""
    hidden, target = ((256, 256), None) if flow == "cond" else ((750, 750), 3)
    args = cped.Args(flow=flow, flow_hidden_sizes=hidden, chunk=chunk)
    one = phases(args, data, f"{flow}, 1 seed")
    four = phases(dataclasses.replace(args, num_seeds=4), data, f"{flow}, 4 seeds in all") if flow == "cond" else []
    *values, rate = bench.measure(*one, *four, chain_case(1, 256, 256))
    for phase, found in zip(REFERENCE, values[:2], strict=True):
        bench.ratio(f"{flow}: {phase}, against the reference", found, [REFERENCE[phase]] * len(found), target)
        share = f"{flow}: {phase}, share of the matmul floor ({FLOOR[flow, phase]} GF)"
        bench.ratio(share, found, rate, None, "%", 100 * FLOOR[flow, phase])
    run = [0.5 / a + 1.0 / b for a, b in zip(*values[:2], strict=True)]
    reference = 0.5 / REFERENCE["flow"] + 1.0 / REFERENCE["actor-critic"]
    whole = f"{flow}: 0.5M + 1M iterations, against the reference"
    bench.ratio(whole, [reference] * len(run), run, 6 if flow == "cond" else 3)
    for phase, alone, all_four in zip(REFERENCE, values[:2], values[2:], strict=False):
        bench.ratio(f"{flow}: {phase}, 4 seeds against one after the other", all_four, alone, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--repeats", type=int, default=5, help="timings of every row")
    parser.add_argument("--check", action="store_true", help="small sizes, one timing: no numbers")
    options = parser.parse_args()
    began, bench = time.perf_counter(), Bench("cped", 1 if options.check else options.repeats, options.check)
    print(*(f"{k} {v}" for k, v in machine().items()), sep=", ")
    print(f"\n{HEAD}\n{RULE}", flush=True)
    data = random_data(2_000 if options.check else 100_000)
    flow_part(bench, "cond", data, 10 if options.check else 200)
    flow_part(bench, "nice", data, 10 if options.check else 50)
    seconds = time.perf_counter() - began
    print(f"\n{len(bench.rows)} rows in {seconds:.0f} s", flush=True)
    if options.json:
        command = " ".join(["python benchmark/speed_cped.py", *sys.argv[1:]])
        result = {"command": command, "seconds": seconds, "machine": machine(), "rows": bench.rows}
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
