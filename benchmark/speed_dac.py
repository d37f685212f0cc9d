"""How fast dac.py is here, beside the matmul rate of the same machine in the same turns.

    python benchmark/speed_dac.py                    about 3 minutes on 2 quiet cores
    python benchmark/speed_dac.py --json F           numbers to a file
    python benchmark/speed_dac.py --check            small sizes: does it work?

Whole updates (rows drawn, noise drawn, all networks) at the published sizes: 17 observations, 6
actions, batch 256, 10 critics of 3 x 256, T = 5, N = 10 and N = 1; cloning; two seeds in one
process against one after the other. The floor is the least matmul work of an update over the
machine's rate. How rows are read: docs/speed.md.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark import speed  # sets JAX_PLATFORMS  # isort: skip

import jax
import jax.numpy as jnp

import dac

NUM_OBS, NUM_ACT = 17, 6


def dac_flops(args):
    """Least matmul FLOPs of an update, next states and times counted once."""
    batch, width = args.batch_size, args.hidden_sizes
    rows = batch * args.num_q_samples
    actor = (NUM_OBS + NUM_ACT + dac.TIME_WIDTH, *width, NUM_ACT)
    critic = (NUM_OBS + NUM_ACT, *width, 1)
    sampling = args.num_steps * speed.mlp_flops((NUM_ACT, *width, NUM_ACT), rows)[0]
    target = args.num_critics * speed.mlp_flops((NUM_ACT, *width, 1), rows)[0]
    forward, weights, inputs, into = speed.mlp_flops(critic, batch)
    learn = args.num_critics * (forward + weights + inputs)
    norm = args.num_critics * forward
    gradient = args.num_critics * (forward + inputs + into * NUM_ACT / (NUM_OBS + NUM_ACT))
    policy = sum(speed.mlp_flops(actor, batch)[:3])
    if args.guidance == "none":
        return policy
    return sampling + target + learn + norm + gradient + policy


def rows(key, num):
    """Random transitions: the work does not depend on their values."""
    keys = jax.random.split(key, 4)
    normal = lambda k, *shape: jax.random.normal(k, (num, *shape))
    actions = jax.random.uniform(keys[1], (num, NUM_ACT), minval=-1.0)
    return dac.Transitions(normal(keys[0], NUM_OBS), actions, normal(keys[2]), normal(keys[3], NUM_OBS), jnp.zeros(num))


def updates(args, data, num_seeds):
    """A function that runs a chunk of all seeds on from the last call."""
    init, chunk = dac.make_train(args, NUM_OBS, NUM_ACT)
    state = [init(jax.vmap(jax.random.key)(jnp.arange(num_seeds)))]

    def run():
        state[0], metrics = chunk(state[0], data)
        return metrics

    return run


def measure(bench):
    """All rows of the table."""
    small = dict(hidden_sizes=(32, 32), num_critics=2, batch_size=32) if bench.small else {}
    data = rows(jax.random.key(0), 2_000 if bench.small else 100_000)
    make = lambda chunk, **changes: dac.Args(chunk=chunk, **{**small, **changes})
    published, one, clone = make(20), make(40, num_q_samples=1), make(400, guidance="none")
    case = lambda name, args, seeds=1: speed.Case(name, updates(args, data, seeds), "/s", seeds * args.chunk, calls=1)
    sizes = published.num_critics, published.batch_size * published.num_q_samples, published.hidden_sizes[0]
    fast, single, _, both, rate = bench.measure(
        case("dac_update, N = 10 (published)", published)._replace(target=8),
        case("dac_update, N = 1", one),
        case("dac_update, cloning", clone),
        case("dac_update, N = 1, two seeds (seed updates)", one, 2),
        speed.chain_case(*sizes),
    )
    for name, args, found in (("N = 10", published, fast), ("N = 1", one, single)):
        flops = dac_flops(args) / 1e9
        bench.ratio(f"{name}: share of the matmul floor ({flops:.1f} GF)", found, rate, None, "%", 100 * flops)
    bench.ratio("N = 10: against the reference's 5.15/s on its machine", fast, [5.15] * len(fast))
    bench.ratio("two seeds against one after the other", both, single, 0.97)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--repeats", type=int, default=3, help="timings of every row")
    parser.add_argument("--check", action="store_true", help="small sizes, one timing: no numbers")
    args = parser.parse_args()
    print(*(f"{k} {v}" for k, v in speed.machine().items()), sep=", ")
    print(f"\n{speed.HEAD}\n{speed.RULE}", flush=True)
    began = time.perf_counter()
    bench = speed.Bench("dac", 1 if args.check else args.repeats, args.check)
    measure(bench)
    seconds = time.perf_counter() - began
    print(f"\n{len(bench.rows)} rows in {seconds:.0f} s", flush=True)
    if args.json:
        command = " ".join(["python benchmark/speed_dac.py", *sys.argv[1:]])
        result = {"command": command, "seconds": seconds, "machine": speed.machine(), "rows": bench.rows}
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
