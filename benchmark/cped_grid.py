"""Which settings of CPED are right for short runs? One flow for all cells that share its flags, then a policy a cell.

    python benchmark/cped_grid.py --dataset FILE --cells "default; --tau 0.005; --alphas 0.1 0.03 0.003"
    python benchmark/cped_grid.py --table runs/cped/grid/*.jsonl

A cell is what is added to `cped.py --preset cpu`. Each evaluation is a line of <out>/<task>-<cell>-seed<seed>.jsonl;
the table has the mean of the last 3 evaluations of each seed, in whole episodes and in ones as long as the data's.
"""

import argparse
import json
import re
import shlex
import time
from pathlib import Path

import jax
import numpy as np

import cped
import envs
import runner

FLOW = (  # the flags of the first phase
    "flow", "flow_layers", "flow_hidden_sizes", "prior", "action_noise", "nll_weight", "adv_weight", "gp_weight",
    "disc_outputs", "disc_ratio", "flow_lr", "disc_lr", "normalize", "flow_adam", "max_grad_norm", "log_scale_cap",
    "batch_size", "holdout_rows",
)  # fmt: skip
SHOWN = ("eval/return", "eval/return_data_length", "train/nll_pi", "train/nll_data", "train/q_pi", "train/alpha")


def arguments_of(cell, options):
    """The Args of `cped.py --preset cpu <cell>` on the dataset."""
    words = "" if cell == "default" else cell
    budget = f"--flow-updates {options.flow_updates} --num-updates {options.num_updates} --seed {options.seed}"
    words = f"--dataset {options.dataset} --preset cpu {budget} {options.all} {words}"
    return runner.parse(cped.Args, shlex.split(words), cped.preset, (*cped.BUDGETS, *cped.PUBLISHED))


def trained_flow(args, data, key):
    """The state after the first phase."""
    init, flow_chunk, _ = cped.make_train(args)
    state = init(key, data)
    for _ in range(args.flow_updates // args.chunk):
        state, metrics = flow_chunk(state, data)
    print({k: round(float(v[0]), 3) for k, v in metrics.items()}, flush=True)
    return state._replace(num_updates=0 * state.num_updates)


def train(args, start, data, evaluate, path, **about):
    """The second phase from a trained flow: fresh actor and critics -> a line for each evaluation."""
    init, _, train_chunk = cped.make_train(args)
    state, began = init(runner.seed_keys(args), data), time.time()
    flow = jax.tree.map(lambda x: x.copy(), start.nets.flow)  # chunks donate their state
    state = state._replace(nets=state.nets._replace(flow=flow))
    with path.open("w") as file:
        for step in range(args.chunk, args.num_updates + 1, args.chunk):
            state, metrics = train_chunk(state, data)
            if step % args.eval_every == 0:
                metrics |= evaluate(state.nets.actor, runner.evaluation_keys(args))
                line = about | {"step": step} | {k: float(v[0]) for k, v in metrics.items()}
                file.write(json.dumps(line) + "\n")
                file.flush()
                print(
                    step, {k: round(line[k], 2) for k in SHOWN if k in line}, f"{time.time() - began:.0f} s", flush=True
                )


def run_cell(cell, flows, options):
    """Train one cell, from the flow of an earlier one where that has the same."""
    args = arguments_of(cell, options)
    buffer, task = runner.open_task("cped", args, None)
    data, mean, std = cped.cped_data(buffer, args)
    of_flow = tuple(getattr(args, name) for name in FLOW)
    if of_flow not in flows:
        flows[of_flow] = trained_flow(args, data, runner.seed_keys(args))
    policy = lambda actor, obs, key: cped.act(actor, (obs - mean) / std, args, task.action_size)
    env = envs.make(task, args.backend)
    evaluate = runner.each_seed(runner.returns_of(policy, env, task, buffer, args), args)
    name = re.sub(r"[^\w.]+", "-", f"{options.all} {cell}").strip("-")
    about = {"dataset": buffer.metadata["dataset_name"], "cell": cell, "all": options.all, "seed": args.seed}
    about |= {"flow_updates": args.flow_updates, "num_updates": args.num_updates}
    print(f"--- {cell}", flush=True)
    path = Path(options.out) / f"{re.sub('[^a-z0-9-]+', '-', task.name)}-{name}-seed{args.seed}.jsonl"
    train(args, flows[of_flow], data, evaluate, path, **about)


def main(options):
    """Run the cells on one dataset."""
    Path(options.out).mkdir(parents=True, exist_ok=True)
    flows = {}
    for cell in options.cells.split(";"):
        run_cell(cell.strip(), flows, options)


def table(paths):
    """A row for each data set and cell, with the spread over seeds."""
    cells = {}
    for path in sorted(paths):
        lines = [json.loads(line) for line in Path(path).read_text().splitlines()][-3:]
        mean = [np.mean([line[key] for line in lines]) for key in ("eval/return", "eval/return_data_length")]
        above = np.mean([line["train/nll_pi"] - line["train/nll_data"] for line in lines])
        cells.setdefault((lines[-1]["dataset"], f"{lines[-1]['all']} {lines[-1]['cell']}"), []).append((*mean, above))
    rows = [
        "| data | cell | seeds | return | in the data's length | nll(pi) - nll(data) |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for (data, cell), values in cells.items():
        x = np.array(values)
        told = [f"{m:.1f} +- {s:.1f}" if len(x) > 1 else f"{m:.1f}" for m, s in zip(x.mean(0), x.std(0), strict=True)]
        rows.append(f"| {data} | `{cell.strip()}` | {len(x)} | {' | '.join(told)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset")
    parser.add_argument("--out", default="runs/cped/grid")
    parser.add_argument("--cells", default="default")
    parser.add_argument("--all", default="", help="flags of every cell")
    parser.add_argument("--flow-updates", type=int, default=20_000)
    parser.add_argument("--num-updates", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", nargs="+", help="print the table of these files")
    options = parser.parse_args()
    print(table(options.table)) if options.table else main(options)
