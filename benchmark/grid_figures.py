"""Which settings work? Table and figure of the logs in a folder, <data>/<cell>/seed<k>.jsonl.

    python benchmark/grid.py benchmark/dac_grid.json                           makes the runs, and then
    python benchmark/grid_figures.py results/dac/grid --runs runs/dac_grid     copies their logs; table, grid.png
    python benchmark/grid_figures.py results/cped/grid --last 3                table and grid.png of what is there
    python benchmark/grid_figures.py results/mopo/screen --name screen --leave-out "*world*"
    python benchmark/grid_figures.py results/mopo/final --leave-out "hopper*" "ant-angle-60-*" --one-scale
    python benchmark/grid_figures.py results/mopo/screen --name world --cells plain world --labels "a model" "the world"

A log <data>/<cell>.jsonl may hold several seeds. Score: mean of the last evaluations, in as many steps as the data's
episodes have at most; its spread is the std over seeds, of a sample.
"""

import argparse
import fnmatch
from pathlib import Path

import numpy as np

import collect
import grid
from envs import InputError
from runner import plots

RETURN, WHOLE = "eval/return_data_length", "eval/return"
BESIDE = (
    "train/q", "train/q_std", "train/bc_loss", "train/eta", "choice/action_std", "choice/gain", "train/alpha",
    "train/nll_pi", "train/nll_data", "value/q_start", "value/world", "value/model", "train/entropy", "model/u_model",
)  # fmt: skip


def copy_logs(runs, folder):
    """The logs of runs that ended."""
    found = [path.parent for path in sorted(runs.glob("*/*/seed*/done.json"))]
    collect.keep_logs({folder.joinpath(*run.parts[-3:-1], f"{run.name}.jsonl"): run for run in found})


def read(folder, key):
    """{data: {cell: {seed: (steps, values)}}} of one key; cells whose logs lack it are left out."""
    found = {}
    cell_of = lambda path: path.relative_to(folder).with_suffix("").parts
    for path in sorted([*folder.glob("*/*.jsonl"), *folder.glob("*/*/*.jsonl")], key=cell_of):
        data, cell, *_ = cell_of(path)
        if seeds := plots.read(path, key):
            found.setdefault(data, {}).setdefault(cell, {}).update(seeds)
    return found


def table(folder, last):
    """Rows of text, a cell each: score and its spread over seeds, and what the log says at the end."""
    short, whole = read(folder, RETURN), read(folder, WHOLE)
    beside = {key: found for key in BESIDE if (found := read(folder, key))}
    learnt = lambda found: [values[steps > 0] for steps, values in found.values() if steps.max() > 0]
    end = lambda found, num: [values[-num:].mean() for values in learnt(found)]
    yield f"| data | cell | seeds | score | best | whole episodes | {' | '.join(beside)} |"
    yield "|---|---|" + "--:|" * (4 + len(beside))
    for data, cells in short.items():
        for cell, seeds in cells.items():
            scores, best = end(seeds, last), [values.max() for values in learnt(seeds)]
            spread = f" +- {np.std(scores, ddof=1):.0f}" if len(scores) > 1 else ""
            row = [data, cell, len(seeds), f"{np.mean(scores):.0f}{spread}", f"{np.mean(best):.0f}"]
            row += [f"{np.mean(end(whole[data][cell], last)):.0f}"]
            there = [of.get(data, {}).get(cell) for of in beside.values()]
            row += [f"{np.mean(end(seeds, 1)):.3g}" if seeds else "" for seeds in there]
            yield f"| {' | '.join(map(str, row))} |"


def draw(path, folder, names, leave_out=(), labels=(), one_scale=False):
    """A panel for each data set that has all of these cells, a curve for each cell, and its seeds."""
    called = dict(zip(names, labels or names, strict=True))
    short, whole, panels = read(folder, RETURN), read(folder, WHOLE), []
    there = sorted({cell for cells in short.values() for cell in cells})
    drawn = lambda name: not any(fnmatch.fnmatch(name, pattern) for pattern in leave_out)
    order = names or [cell for cell in there if drawn(cell)]
    for data, cells in short.items():
        shown = {cell: cells[cell] for cell in order if cell in cells and drawn(data)}
        if shown and shown.keys() >= set(names):
            of_whole = {(cell, seed): x for cell, seeds in whole[data].items() for seed, (_, x) in seeds.items()}
            cut = any(
                not np.array_equal(x, of_whole[c, s]) for c, seeds in shown.items() for s, (_, x) in seeds.items()
            )
            shown = {called.get(cell, cell): seeds for cell, seeds in shown.items()}
            places = [called.get(cell, cell) for cell in order]
            panels.append(grid.panel(data, shown, ylabel=grid.CUT if cut else "return", order=places))
    if not panels:
        raise InputError(f"{folder}: no data set has {', '.join(names) or 'a cell to draw'}; there are {there}")
    plots.figure(path, panels, sharey=one_scale)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the logs are")
    parser.add_argument("--runs", type=Path, help="copy the logs of these runs of benchmark/grid.py first")
    parser.add_argument("--last", type=int, default=5, help="evaluations of a score")
    parser.add_argument("--name", default="grid", help="of the figure")
    parser.add_argument("--cells", nargs="+", default=(), help="draw only these, of the data sets that have them all")
    parser.add_argument("--labels", nargs="+", default=(), help="what the figure calls the --cells, in their order")
    parser.add_argument("--leave-out", nargs="+", default=(), metavar="PATTERN", help="cells, data sets: not drawn")
    parser.add_argument("--one-scale", action="store_true", help="all panels on one scale")
    args = parser.parse_args(argv)
    if args.runs:
        copy_logs(args.runs, args.folder)
    print(*collect.several_files(args.folder), *table(args.folder, args.last), sep="\n")
    if args.labels and len(args.labels) != len(args.cells):
        raise InputError(f"--labels: {len(args.labels)} for {len(args.cells)} --cells; name one for each")
    draw(args.folder / f"{args.name}.png", args.folder, args.cells, args.leave_out, args.labels, args.one_scale)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"grid_figures.py: error: {error}") from None
