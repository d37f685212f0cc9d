"""Which measure of a buffer tells beforehand what a learner will make of it? Rank correlations with the study `bound`.

    python wurl_sac.py --task point --out runs/point                           the buffers of the study, the same again
    python udg_select.py --buffers runs/point --out runs/measures --task point-angle-0 ... point-angle-300
    python benchmark/measure_ranks.py bound --selections runs/measures         keeps what they are: results/udg_select/
    python benchmark/measure_ranks.py bound                                    the table, from committed results alone

A number is Spearman's rank correlation, over the buffers, with the mean return of a learner's seeds: the mean over
tasks and, behind it, the lowest.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import envs
from udg_figures import FOLDER, load, print_table, rank_correlation

RESULTS = FOLDER.parent / "udg_select"
SCORES = ("mean", "recent", "top_decile", "per_step", "std")
FAR = ("w1_expert",)  # less is better


def collect(study, selections):
    """scores.json of every task -> results/udg_select/<study>.jsonl; InputError where the buffers are others."""
    learners, lines = load(FOLDER / f"{study}.jsonl")[2], []
    for task in dict.fromkeys(row["task"] for row in learners):
        found = json.loads((Path(selections) / task / "scores.json").read_text())
        for row in (row for row in learners if row["task"] == task):
            for name, score in row["scores"].items():
                if not np.isclose(found["buffers"][name]["mean"], score, rtol=1e-9):
                    raise envs.InputError(f"{selections}: {name} is not the buffer that {study} learnt from")
        buffers = {
            name: {key: found["buffers"][name][key] for key in SCORES} | measures
            for name, measures in found["measures"].items()
        }
        about = {key: found["flags"][key] for key in ("proxy", "w1_points", "seed")}
        lines.append(json.dumps({"task": task, **about, "buffers": buffers}))
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{study}.jsonl").write_text("\n".join(lines) + "\n")


def ranks(learners, measured):
    """Rows of learners, {task: {buffer: {measure: value}}} -> {learner: {measure: rank correlations [tasks]}}."""
    found = {}
    for learner in dict.fromkeys(row["learner"] for row in learners):
        for task, buffers in measured.items():
            returns = {name: [] for name in buffers}
            for row in (row for row in learners if (row["learner"], row["task"]) == (learner, task)):
                returns[row["chosen"][0]].append(row["score"])
            gain = np.array([np.mean(returns[name]) for name in buffers])
            for key in next(iter(buffers.values())):
                values = np.array([buffer[key] for buffer in buffers.values()]) * (-1 if key in FAR else 1)
                found.setdefault(learner, {}).setdefault(key, []).append(rank_correlation(values, gain))
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="one whose cells are single buffers: bound")
    parser.add_argument("--selections", default="", help="folder of udg_select.py with all tasks of the study")
    args = parser.parse_args(argv)
    try:
        if args.selections:
            collect(args.study, args.selections)
        rows = [json.loads(line) for line in (RESULTS / f"{args.study}.jsonl").read_text().splitlines()]
        found = ranks(load(FOLDER / f"{args.study}.jsonl")[2], {row["task"]: row["buffers"] for row in rows})
    except (envs.InputError, OSError) as error:
        sys.exit(f"measure_ranks.py: error: {error}")
    keys = next(iter(found.values()))
    text = lambda values: f"{np.mean(values):.2f}; {np.min(values):.2f}"
    print_table(["measure", *found], [[key, *(text(found[learner][key]) for learner in found)] for key in keys])


if __name__ == "__main__":
    main()
