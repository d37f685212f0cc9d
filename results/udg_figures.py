"""Figures and tables of the UDG studies, from the committed results/udg/*.jsonl alone.

    python results/udg_figures.py              draws results/udg/<study>.png and prints the tables of docs/udg.md
    python results/udg_figures.py bound        one study

Score of a run: the mean of its last five evaluations, episodes as long as the data's; the last and the best beside it.
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
LAST = 5


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
    """Mean and, where there are several seeds, their standard deviation."""
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
            axis.bar(x, np.mean(found[label]), 0.9 * width, color=f"C{i}")
            axis.plot([x] * len(found[label]), found[label], "k.", ms=3)
            data = means[task, label]
            axis.plot([x - 0.4 * width, x + 0.4 * width], [data, data], "k-", lw=1.5)
    axis.set_xticks(range(len(table)), list(table), rotation=15)
    axis.axhline(0, color="k", lw=0.5)
    axis.set(ylabel="return", title=f"{header['study']}: learner (bar, dots: seeds) and its data's mean episode (dash)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{i}") for i in range(len(labels))]
    axis.legend(
        handles, labels, frameon=False, fontsize=8, ncol=len(labels), loc="lower center", bbox_to_anchor=(0.5, -0.32)
    )
    drawn.tight_layout()
    drawn.savefig(path, dpi=110)
    plt.close(drawn)
    rows = [[task, *(spread(found[x]) if x in found else "" for x in labels)] for task, found in table.items()]
    whole = [found for found in table.values() if set(found) == set(labels)]  # tasks that every pick has
    if whole:
        means = np.array([[np.mean(found[x]) for x in labels] for found in whole])
        rows += [["mean over tasks", *(f"{x:.1f}" for x in means.mean(0))]]
        rows += [["worst task", *(f"{x:.1f}" for x in means.min(0))]]
    print_table(["task", *labels], rows)


def bound(path, header, learners, distances):
    """A learner's return on every buffer against the buffer's W1 to the expert, and against its relabelled return."""
    models = list(dict.fromkeys(row["learner"] for row in learners))
    spaces = list(next(iter(distances.values())))
    drawn, axes = plt.subplots(len(models), 3, figsize=(16, 4.2 * len(models)), squeeze=False)
    lines = []
    for model, row_of_axes in zip(models, axes, strict=True):
        found = [row for row in learners if row["learner"] == model and row["task"] in distances]
        ranks, shares, differ, misses = [], [], [], []
        for j, task in enumerate(dict.fromkeys(row["task"] for row in found)):
            rows = [row for row in found if row["task"] == task]
            names, gain = [row["chosen"][0] for row in rows], np.array([row["score"] for row in rows])
            data = np.array([row["scores"][name] for row, name in zip(rows, names, strict=True)])
            predictors = [-np.array([distances[task][space][name] for name in names]) for space in spaces] + [data]
            for axis, x in zip(row_of_axes, predictors, strict=True):
                axis.plot(np.abs(x) if x is not data else x, gain, "o", ms=4, color=f"C{j}", label=task)
            ranks.append([stats.spearmanr(x, gain)[0] for x in predictors])
            shares.append([gain[x.argmax()] / gain.max() for x in predictors])
            differ.append(predictors[0].argmax() != data.argmax())
            misses.append(data.argmax() != gain.argmax())
        labels = [f"W1 to the expert, {space}" for space in spaces] + ["mean relabelled return of the buffer"]
        for axis, label in zip(row_of_axes, labels, strict=True):
            axis.set(xlabel=label, ylabel="return of the learner", title=model)
        row_of_axes[-1].legend(frameon=False, fontsize=7)
        for label, rank, share in zip(labels, np.mean(ranks, 0), np.mean(shares, 0), strict=True):
            lines.append([model, label, f"{rank:.2f}", f"{share:.2f}"])
        of = f"of {len(misses)} tasks"
        print(f"{model}: return and W1 choose another buffer in {sum(differ)} {of}; return misses the best in "
              f"{sum(misses)} {of}\n")  # fmt: skip
    drawn.tight_layout()
    drawn.savefig(path, dpi=110)
    plt.close(drawn)
    print_table(["model", "predictor", "rank correlation, mean over tasks", "share of the best it chooses"], lines)


def sources_table(sources):
    """The diversity of every source that has one; a smallest distance under a quarter of the mean is a collapse."""
    keys = ("eval/min_w", "eval/smallest_w", "eval/pair_mean_w", "eval/distinct_nearest", "eval/disc_success",
            "eval/disc_success_held_out", "time/updates_per_s")  # fmt: skip
    rows = []
    for name, row in sources.items():
        if all(k in row["last"] for k in keys):
            last = [row["last"][k] for k in keys]
            rows.append([name, *(f"{x:.3g}" for x in last), "yes" if last[1] < 0.25 * last[0] else "no"])
    if rows:
        head = ["source", "minimum W", "smallest", "pair mean", "distinct neighbours", "success", "held out"]
        print_table([*head, "updates/s", "collapse warned of"], rows)


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
        print(f"{header['seeds']} seeds of the learner; one run of wurl_sac.py a source.\n")
        if header["missing"]:
            print(f"Not made yet: {len(header['missing'])} cells, e.g. {header['missing'][0]}\n")
        sources_table(sources)
        if distances and learners:
            bound(path.with_suffix(".png"), header, learners, distances)
        elif learners:
            bars(path.with_suffix(".png"), header, learners)
        if sum(bool(row["min_w"]) for row in sources.values()) > 1 or not learners:
            distances_over_time(path.with_name(f"{path.stem}-diversity.png"), header, sources)


if __name__ == "__main__":
    main(sys.argv[1:])
