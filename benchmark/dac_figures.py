"""Which settings suit DAC's short budget? Logs, table and figure of the runs of benchmark/dac_grid.json.

    python benchmark/grid.py benchmark/dac_grid.json        makes them: runs/dac_grid/<data>/<cell>/seed<k>
    python benchmark/dac_figures.py --runs runs/dac_grid    copies their logs to results/dac/grid, then
    python benchmark/dac_figures.py                         prints the table and draws grid.png of the logs there

Score: mean of the last three evaluations, in as many steps as the data's episodes have at most.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from cells import ROOT
from runner import plots

FOLDER = ROOT / "results" / "dac" / "grid"
RETURN = "eval/return_data_length"
BESIDE = ("eval/return", "train/q", "train/q_std", "train/bc_loss", "train/eta", "choice/action_std", "choice/gain")
LAST = 3


def copy_logs(runs, folder):
    """The logs of runs that ended, without the paths of this machine."""
    for path in sorted(runs.glob("*/*/seed*/policy.npz")):
        log = path.with_name("log.jsonl")
        head, *records = log.read_text().splitlines()
        head = json.loads(head)
        head["args"] = {k: v for k, v in head["args"].items() if k != "out"}
        head["args"]["dataset"] = "/".join(Path(head["args"]["dataset"]).parts[-3:])
        into = folder / path.relative_to(runs).parent.with_suffix(".jsonl")
        into.parent.mkdir(parents=True, exist_ok=True)
        into.write_text("\n".join([json.dumps(head), *records]) + "\n")


def seeds_of(cell, key):
    """Steps [n] and the values [seeds, n] of one key in the logs of a cell, seed<k>.jsonl."""
    found = [curve for log in sorted(cell.glob("seed*.jsonl")) for curve in plots.read(log, key).values()]
    return found[0][0], np.stack([values for _, values in found])


def table(folder):
    """Rows of text, a cell each: score and its spread over seeds, and what the log says at the end."""
    yield "| data | cell | seeds | score | best | " + " | ".join(BESIDE) + " |"
    yield "|---|---|" + "---|" * (len(BESIDE) + 3)
    for cell in sorted(path for path in folder.glob("*/*") if path.is_dir()):
        values = seeds_of(cell, RETURN)[1]
        scores = values[:, -LAST:].mean(1)
        spread = f" +- {scores.std():.0f}" if len(scores) > 1 else ""
        beside = [seeds_of(cell, key)[1][:, -1].mean() for key in BESIDE]
        row = [cell.parent.name, cell.name, len(scores), f"{scores.mean():.0f}{spread}", f"{values.max(1).mean():.0f}"]
        yield "| " + " | ".join(map(str, [*row, *(f"{x:.3g}" for x in beside)])) + " |"


def draw(folder):
    """A panel for each data set, a curve for each cell: mean over seeds."""
    panels = []
    for data in sorted(path for path in folder.iterdir() if path.is_dir()):
        lines = []
        for i, cell in enumerate(sorted(path for path in data.iterdir() if path.is_dir())):
            steps, values = seeds_of(cell, RETURN)
            lines += [(steps, values.mean(0), {"label": cell.name, "color": f"C{i % 10}", "marker": ".", "lw": 1.2})]
        panels += [{"title": data.name, "xlabel": "updates", "ylabel": "return", "lines": lines}]
    plots.figure(folder / "grid.png", panels, width=6.5)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="copy the logs of these runs first")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the logs are")
    args = parser.parse_args(argv)
    if args.runs:
        copy_logs(args.runs, args.folder)
    print(*table(args.folder), sep="\n")
    draw(args.folder)


if __name__ == "__main__":
    main()
