"""Figures and tables of the UDG studies, from the committed results/udg/*.jsonl alone.

    python results/udg_figures.py              draws results/udg/<study>.png and prints the tables of docs/udg.md
    python results/udg_figures.py bound        one study

Score of a run: the mean of its last three evaluations, episodes as long as the data's.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

FOLDER = Path(__file__).resolve().parent / "udg"
LAST = 3


def load(path):
    """-> header, rows of sources, of learners (with `score`), of distances."""
    header, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    sources = {row["source"]: row for row in rows if "source" in row}
    learners = [row for row in rows if "learner" in row]
    for row in learners:
        row["score"] = float(np.mean(row["returns_data_length"][-LAST:]))
    return header, sources, learners, {row["task"]: row["w1"] for row in rows if "w1" in row}


def scores(learners, key="label"):
    """{task: {label: scores of its seeds}}"""
    table = {}
    for row in learners:
        table.setdefault(row["task"], {}).setdefault(row[key], []).append(row["score"])
    return table


def spread(values):
    """Mean, and half the range over seeds where there are several."""
    return f"{np.mean(values):.1f}" + (f" +- {np.std(values):.1f}" if len(values) > 1 else "")


def print_table(head, rows):
    print("|", " | ".join(head), "|")
    print("|", " | ".join("---" for _ in head), "|")
    for row in rows:
        print("|", " | ".join(map(str, row)), "|")
    print()


def bars(path, header, learners):
    """Per task a group of bars, one per pick: mean over seeds, dots for the seeds, a dash for the data's mean."""
    table = scores(learners)
    labels = list(dict.fromkeys(row["label"] for row in learners))
    means = {(row["task"], row["label"]): row["data_mean"] for row in learners}
    drawn, axis = plt.subplots(figsize=(max(7, 1.7 * len(table)), 4.5))
    width = 0.8 / len(labels)
    for i, label in enumerate(labels):
        for j, (task, found) in enumerate(table.items()):
            if label not in found:
                continue
            x = j + (i - (len(labels) - 1) / 2) * width
            axis.bar(x, np.mean(found[label]), 0.9 * width, color=f"C{i}", label=label if j == 0 else None)
            axis.plot([x] * len(found[label]), found[label], "k.", ms=3)
            data = means[task, label]
            axis.plot([x - 0.4 * width, x + 0.4 * width], [data, data], "k-", lw=1.5)
    axis.set_xticks(range(len(table)), list(table), rotation=15)
    axis.axhline(0, color="k", lw=0.5)
    axis.set(ylabel="return", title=f"{header['study']}: learner (bar, dots: seeds) and its data's mean episode (dash)")
    axis.legend(frameon=False, fontsize=8, ncol=len(labels), loc="lower center", bbox_to_anchor=(0.5, -0.32))
    drawn.tight_layout()
    drawn.savefig(path, dpi=110)
    plt.close(drawn)
    rows = [[task, *(spread(found[x]) if x in found else "" for x in labels)] for task, found in table.items()]
    average = [np.mean([np.mean(found[x]) for found in table.values() if x in found]) for x in labels]
    worst = [min(np.mean(found[x]) for found in table.values() if x in found) for x in labels]
    rows += [["mean over tasks", *(f"{x:.1f}" for x in average)], ["worst task", *(f"{x:.1f}" for x in worst)]]
    print_table(["task", *labels], rows)


def bound(path, header, learners, distances):
    """A learner's return on every buffer against the buffer's W1 to the expert, and against its relabelled return."""
    models = list(dict.fromkeys(row["learner"] for row in learners))
    space = next(k for k in next(iter(distances.values())))
    drawn, axes = plt.subplots(len(models), 2, figsize=(11, 4.2 * len(models)), squeeze=False)
    lines = []
    for model, pair in zip(models, axes, strict=True):
        found = [row for row in learners if row["learner"] == model and row["task"] in distances]
        picked = {"w1": [], "score": [], "oracle": 0.0, "tasks": 0, "differ": 0, "wrong": 0}
        points = []
        for j, task in enumerate(dict.fromkeys(row["task"] for row in found)):
            rows = [row for row in found if row["task"] == task]
            names = [row["chosen"][0] for row in rows]
            w1 = np.array([distances[task][space][name] for name in names])
            data, gain = (np.array([row[k] for row in rows]) for k in ("data_mean", "score"))
            for axis, x in zip(pair, (w1, data), strict=True):
                axis.plot(x, gain, "o", ms=4, color=f"C{j}", label=task)
            points.append((stats.spearmanr(-w1, gain)[0], stats.spearmanr(data, gain)[0]))
            picked["w1"].append(gain[w1.argmin()] / gain.max())
            picked["score"].append(gain[data.argmax()] / gain.max())
            picked["differ"] += int(w1.argmin() != data.argmax())
            picked["wrong"] += int(data.argmax() != gain.argmax())
            picked["tasks"] += 1
        pair[0].set(xlabel=f"W1 to the expert's data ({space})", ylabel="return", title=f"{model}: distance")
        pair[1].set(xlabel="mean relabelled return of the buffer", ylabel="return", title=f"{model}: return")
        pair[1].legend(frameon=False, fontsize=7)
        rank = np.mean(points, 0)
        shares = (f"{np.mean(picked[key]):.2f}" for key in ("w1", "score"))
        misses = (f"{picked[key]} of {picked['tasks']}" for key in ("differ", "wrong"))
        lines.append([model, *(f"{x:.2f}" for x in rank), *shares, *misses])
    drawn.tight_layout()
    drawn.savefig(path, dpi=110)
    plt.close(drawn)
    print_table(
        ["model", "rank correlation of -W1", "of the relabelled return", "share of the best, nearest buffer",
         "share of the best, highest return", "return and distance choose otherwise", "return misses the best"], lines,
    )  # fmt: skip


def sources_table(sources):
    """The diversity of every source that has one."""
    keys = (
        "eval/min_w",
        "eval/pair_mean_w",
        "eval/distinct_nearest",
        "eval/disc_success",
        "eval/disc_success_held_out",
    )
    rows = [
        [name, *(f"{row['last'][k]:.3g}" for k in keys), f"{row['last'].get('time/updates_per_s', float('nan')):.3g}"]
        for name, row in sources.items()
        if all(k in row["last"] for k in keys)
    ]
    if rows:
        head = ["source", "minimum W", "pair mean W", "distinct neighbours", "success", "held out", "updates/s"]
        print_table(head, rows)


def distances_over_time(path, header, sources):
    """minimum-W over training for every source."""
    drawn, axis = plt.subplots(figsize=(6.5, 4.2))
    for name, row in sources.items():
        if row["min_w"]:
            axis.plot(*np.transpose(row["min_w"]), marker="o", ms=3, label=name)
    axis.set(xlabel="updates per policy", ylabel="mean distance to the nearest other policy", title=header["study"])
    axis.legend(frameon=False, fontsize=8)
    drawn.tight_layout()
    drawn.savefig(path, dpi=110)
    plt.close(drawn)


def main(names):
    for path in sorted(FOLDER.glob("*.jsonl")):
        if names and path.stem not in names:
            continue
        header, sources, learners, distances = load(path)
        print(f"## {path.stem}: {header['question']}\n")
        if header["missing"]:
            print(f"Not made yet: {len(header['missing'])} cells, e.g. {header['missing'][0]}\n")
        sources_table(sources)
        if distances:
            bound(path.with_suffix(".png"), header, learners, distances)
        elif learners:
            bars(path.with_suffix(".png"), header, learners)
        if sum(bool(row["min_w"]) for row in sources.values()) > 1 or not learners:
            distances_over_time(path.with_name(f"{path.stem}-diversity.png"), header, sources)


if __name__ == "__main__":
    main(sys.argv[1:])
