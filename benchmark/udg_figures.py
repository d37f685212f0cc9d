"""Figures and tables of the UDG studies, from the committed results/udg/*.jsonl alone.

    python benchmark/udg_figures.py            draws results/udg/<study>.png and prints the tables of docs/udg.md
    python benchmark/udg_figures.py bound        one study

Score of a run: the mean of its last five evaluations, episodes as long as the data's; the last and the best stand
beside it. +- is the standard deviation over the learner's seeds (of a sample, n - 1). An interval in brackets holds
95 % of 2000 bootstrap resamples of the seeds within each task; where a cell has under three seeds there is none. It
says nothing of the luck of the run of wurl_sac.py that made the buffers: the study `seeds` does.
"""

import argparse
import itertools
import json
import re
import sys
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "results" / "udg"
REFERENCES = ROOT / "envs" / "reference_scores.json"
LAST = 5
RESAMPLES, MIN_SEEDS = 2000, 3
SPACE_FLAGS = ("--div-features", "--feature-scales")  # of wurl_sac.py: what its distances are measured in
COLLAPSE = 0.25  # smallest distance under this share of the mean nearest: wurl_sac.py's warning
# Okabe and Ito's colours, told apart by the colour-blind; a marker of its own for each, and another the second time
COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
STYLES = tuple(zip(2 * COLORS, "osD^vPX<>ph*d8", strict=True))

# A selection looks the same in every study; what is not here (K, objectives, weights) takes its place in the list.
LOOKS = {"top1": 0, "top2": 1, "all": 2, "supervised": 4, "random": 3, "best": 5}
NAMES = {
    "top1": "top 1", "top2": "top 2 mixed", "all": "all mixed", "supervised": "supervised for 0 degrees",
    "best": "best episodes",
    "mopo": "MOPO", "mopo-long": "MOPO", "knn": "nearest neighbour", "cped": "CPED", "qdq": "QDQ",
    "dac": "DAC", "bc": "cloning", "apwd": "APWD", "pwd": "PWD", "diayn": "DIAYN-I", "dads": "DADS-I", "metra": "METRA",
    "mopo-lam0": "MOPO, lambda 0", "mopo-lam0.1": "MOPO, lambda 0.1", "mopo-lam1": "MOPO, lambda 1",
}  # fmt: skip


def style(i, label=None):
    return STYLES[LOOKS.get(label, i) % len(STYLES)]


def called(label):
    return NAMES.get(label, label)


def expert_return(task):
    """A SAC expert's return in an episode as long as the data's (envs/reference_scores.json); None if not known."""
    known = json.loads(REFERENCES.read_text())["tasks"]
    found = known.get(task)
    found = known[found] if isinstance(found, str) else found  # a mirror image has the same
    return found and found["expert_data_length"]


def load(path):
    """-> header, rows of sources, of learners (with `score`, `last`, `best`, `whole`), of distances."""
    header, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    sources = {row["source"]: row for row in rows if "source" in row}
    learners = [row for row in rows if "learner" in row and max(row["steps"], default=0) > 0]
    for row in learners:
        learnt = np.array(row["steps"]) > 0  # some learners evaluate the untrained policy, too
        short, whole = (np.array(row[key])[learnt] for key in ("returns_data_length", "returns"))
        row |= {"score": float(short[-LAST:].mean()), "last": float(short[-1]), "best": float(short.max())}
        row["whole"] = float(whole[-LAST:].mean())
    return header, sources, learners, {row["task"]: row for row in rows if "w1" in row}


def by_learner(header, learners):
    """{learner: its rows}, in the study's order; one of which nothing is made has none."""
    names = [*header.get("learners", ()), *(row["learner"] for row in learners)]
    return {name: [row for row in learners if row["learner"] == name] for name in dict.fromkeys(names)}


def scores(learners, what="score"):
    """{task: {label: scores of its seeds}}"""
    table = {}
    for row in learners:
        table.setdefault(row["task"], {}).setdefault(row["label"], []).append(row[what])
    return table


def planned(header, learners):
    """Tasks and labels of the study, the missing ones too, in its order."""
    tasks = header.get("tasks") or dict.fromkeys(row["task"] for row in learners)
    return list(tasks), list(header.get("picks") or dict.fromkeys(row["label"] for row in learners))


# === numbers ===


def spread(values):
    """Mean and, where there are several seeds, their standard deviation."""
    return f"{np.mean(values):.1f}" + (f" +- {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def resampled_means(cells, stream=0):
    """Means [cells, RESAMPLES] of bootstrap resamples of each cell's seeds; None where one has too few.

    The draws are fixed, so that the same runs give the same page; what is compared takes two streams.
    """
    if not cells or min(map(len, cells)) < MIN_SEEDS:
        return None
    rng = np.random.default_rng(stream)
    return np.array([np.asarray(c)[rng.integers(len(c), size=(RESAMPLES, len(c)))].mean(1) for c in cells])


def bracket(resamples, digits=1):
    """The middle 95 % of resamples as text; nothing where there are none."""
    if resamples is None:
        return ""
    low, high = np.quantile(resamples, [0.025, 0.975])
    return f" [{low:.{digits}f}, {high:.{digits}f}]"


def over_tasks(cells):
    """Cells of a label, one per task -> mean over tasks and worst task (of the means over seeds), with intervals."""
    means, drawn = np.array([np.mean(c) for c in cells]), resampled_means(cells)
    pick = lambda f: None if drawn is None else f(drawn, axis=0)
    return f"{means.mean():.1f}{bracket(pick(np.mean))}", f"{means.min():.1f}{bracket(pick(np.min))}"


def chance_above(a, b):
    """Share of the pairs of a seed of a and a seed of b in which a scores higher; a tie counts half."""
    difference = np.subtract.outer(np.asarray(a), np.asarray(b))
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def orderings(table, labels):
    """Rows of every pair of labels, the better one first: tasks, chance that a seed is above, difference, interval."""
    rows = []
    for a, b in itertools.combinations(labels, 2):
        both = [(found[a], found[b]) for found in table.values() if a in found and b in found]
        if not both:
            continue
        gain = np.array([np.mean(x) - np.mean(y) for x, y in both])
        if gain.mean() < 0:
            (a, b), both, gain = (b, a), [(y, x) for x, y in both], -gain
        first, second = (resampled_means(cells, i) for i, cells in enumerate(zip(*both, strict=True)))
        drawn = None if first is None or second is None else (first - second).mean(0)
        chance = np.mean([chance_above(x, y) for x, y in both])
        row = [f"{a} over {b}", f"{int((gain > 0).sum())} of {len(gain)}", f"{chance:.2f}"]
        rows.append([*row, f"{gain.mean():.1f}{bracket(drawn)}", f"{gain.min():.1f} to {gain.max():.1f}"])
    return rows


def predictions(rows, distances):
    """What predicts a learner's return on one task -> {predictor: [buffers]}, returns [buffers, seeds].

    Higher must mean better, so distances are negative. A buffer lacks where a seed or its distance does.
    """
    by_label = {}
    for row in rows:
        by_label.setdefault(row["label"], {})[row["seed"]] = row
    seeds = sorted(set().union(*by_label.values()))
    known = lambda found: (
        seeds == sorted(found) and all(found[seeds[0]]["chosen"][0] in of for of in distances.values())
    )
    whole = [found for found in by_label.values() if known(found)]
    names = [found[seeds[0]]["chosen"][0] for found in whole]
    gain = np.array([[found[seed]["score"] for seed in seeds] for found in whole])
    found = {f"W1 to the expert, {space}": -np.array([values[name] for name in names])
             for space, values in distances.items()}  # fmt: skip
    found["mean relabelled return"] = np.array([x[seeds[0]]["scores"][n] for x, n in zip(whole, names, strict=True)])
    return found, gain


def rank_correlation(x, y):
    """Spearman's; nan where one is constant."""
    return np.nan if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0 else stats.spearmanr(x, y)[0]


def judge(x, gain):
    """A predictor [buffers] on one task, returns [buffers, seeds] -> rank correlation with the means over seeds, return
    lost by following it, share of the seeds in which it picks another buffer than the best.

    The best is chosen by the other seeds and judged on the one left out: chosen and judged by the same numbers it
    would look better than it is, and every predictor worse. With one seed there is no other.
    """
    seeds = gain.shape[1]
    others = [np.delete(gain, s, 1).mean(1) if seeds > 1 else gain[:, 0] for s in range(seeds)]
    pick, best = int(np.argmax(x)), [int(other.argmax()) for other in others]
    lost = np.mean([gain[b, s] - gain[pick, s] for s, b in enumerate(best)])
    return rank_correlation(x, gain.mean(1)), float(lost), float(np.mean([b != pick for b in best]))


def judge_seeds(gain):
    """The same of what one seed says of the mean of the others: how well the learner predicts itself (no ceiling: a
    predictor without noise can do better)."""
    seeds = gain.shape[1]
    others = [np.delete(gain, s, 1).mean(1) for s in range(seeds)]
    rank = np.mean([rank_correlation(gain[:, s], other) for s, other in enumerate(others)])
    picks = [(int(gain[:, s].argmax()), int(other.argmax()), other) for s, other in enumerate(others)]
    return (
        rank,
        float(np.mean([o[best] - o[pick] for pick, best, o in picks])),
        float(np.mean([p != b for p, b, _ in picks])),
    )


# === tables ===


def print_table(head, rows):
    print("|", " | ".join(head), "|")
    print("|", " | ".join("---" for _ in head), "|")
    for row in rows:
        print("|", " | ".join(map(str, row)), "|")
    print()


def learners_table(header, learners):
    """Each learner's score over tasks by label, the worst task in brackets; above, what the data have."""
    tasks, labels = planned(header, learners)

    def row_of(name, rows, what):
        table, cells = scores(rows, what), []
        for label in labels:
            means = [np.mean(table[task][label]) for task in tasks if label in table.get(task, {})]
            worst = f" ({min(means):.1f})" if len(tasks) > 1 and means else ""
            cells.append(f"{np.mean(means):.1f}{worst}" if len(means) == len(tasks) else "missing")
        return [name, *cells]

    rows = [row_of("mean episode of the data", learners, "data_mean")]
    rows += [row_of(name, mine, "score") for name, mine in by_learner(header, learners).items()]
    over = "mean over tasks (worst task)" if len(tasks) > 1 else tasks[0]
    print_table([f"score, {over}", *labels], rows)


def score_tables(header, learners):
    """Scores by task and label, over tasks, orderings; the last, the best and whole evaluation episodes beside."""
    table, (tasks, labels) = scores(learners), planned(header, learners)
    cell = lambda task, label: spread(table[task][label]) if label in table.get(task, {}) else "missing"
    rows = [[task, *(cell(task, label) for label in labels)] for task in tasks]
    full = {label: [table[t][label] for t in tasks if label in table.get(t, {})] for label in labels}
    for name, i in (("mean over tasks", 0), ("worst task", 1)) if len(tasks) > 1 else ():
        rows += [[name, *(over_tasks(c)[i] if len(c) == len(tasks) else "missing" for c in full.values())]]
    print_table(["task", *labels], rows)
    print_table(["ordering", "tasks where it holds", "chance that a seed is above", "mean difference", "over tasks"],
                orderings(table, labels))  # fmt: skip
    if all(label.startswith("seed ") for label in labels):
        print_luck(table, labels)
    kinds = ["score", "last", "best", "whole", "data_mean"]
    found = {kind: scores(learners, kind) for kind in kinds}
    mean = lambda kind, label: f"{np.mean([np.mean(found[kind][task][label]) for task in tasks]):.1f}"
    head = ["mean over all tasks", "score", "last evaluation", "best (never a score)", "score, whole evaluation"]
    rows = [[x, *(mean(kind, x) if len(full[x]) == len(tasks) else "missing" for kind in kinds)] for x in labels]
    print_table([*head, "mean episode of the data"], rows)


def print_luck(table, labels):
    """Labels that are runs of one thing: how far they lie apart, beside the seeds of the learner."""
    whole = [[found[label] for label in labels] for found in table.values() if set(labels) <= set(found)]
    if whole and len(labels) > 1 and min(len(cell) for cells in whole for cell in cells) > 1:
        of_means = np.mean([np.var([np.mean(cell) for cell in cells], ddof=1) for cells in whole])
        of_seeds = np.mean([np.var(cell, ddof=1) for cells in whole for cell in cells])
        share = np.mean([np.var(cell, ddof=1) / len(cell) for cells in whole for cell in cells])
        seeds, sources, alone = np.sqrt([of_seeds, of_means, max(0.0, of_means - share)])
        print(
            f"Sample standard deviation, pooled over {len(whole)} tasks: of a learner's seeds {seeds:.1f}, of "
            f"the sources' means {sources:.1f}; of the sources, without the seeds' share of that: {alone:.1f}."
        )
        print()


def told_apart(row):
    """Of how many policies a classifier tells apart, by evaluation: [] steps, [] numbers, K."""
    steps, accuracy = np.transpose(row["disc_accuracy_held_out"])
    return steps, len(row["each"]["eval/travel"]) * accuracy, len(row["each"]["eval/travel"])


def collapsed(row):
    """By evaluation: two policies coincide, by projected distances; a classifier tells too few apart, which wurl_sac.py
    warns of."""
    mean, smallest = (np.array(row[key])[:, 1] for key in ("min_w", "smallest_w"))
    steps, number, K = told_apart(row)
    return smallest < COLLAPSE * mean, (number < (K + 1) / 2) & (steps >= steps[-1] / 4)


def sources_table(sources):
    """The diversity of every source that has one, and where two policies coincide or too few are told apart."""
    keys = ("eval/min_w", "eval/smallest_w", "eval/pair_mean_w", "eval/min_w_full", "eval/distinct_nearest",
            "eval/disc_success", "eval/disc_success_held_out", "time/updates_per_s")  # fmt: skip
    rows = []
    for name, row in sources.items():
        if "eval/min_w" in row["last"]:
            last, (coincide, few) = [row["last"].get(k, np.nan) for k in keys], collapsed(row)
            _, number, K = told_apart(row)
            now = " and ".join(what for what, is_so in (("coincide", coincide[-1]), ("few", few[-1])) if is_so)
            counts = [f"{x.sum()} of {len(x)}" for x in (coincide, few)]
            rows.append([name, *(f"{x:.3g}" for x in last), f"{number[-1]:.1f} of {K}", now or "no", *counts])
    if rows:
        head = ["source", "minimum W, own space", "smallest", "pair mean", "minimum W, all observations"]
        head += ["distinct neighbours", "success", "success held out", "updates/s", "told apart, held out"]
        print_table([*head, "collapsed at the end", "evaluations: two coincide", "few told apart"], rows)
    if any("eval/length" in row.get("each", {}) for row in sources.values()):
        each_table(sources)


def each_table(sources):
    """What the policies of a source do at its last evaluation: least, median and most over policies."""
    kinds = {
        "eval/length": "steps of an episode",
        "eval/travel": "travel (m)",
        "eval/task_return": "return of its task",
    }
    of = lambda values: ", ".join(f"{x:.3g}" for x in np.quantile(values, (0, 0.5, 1)))
    rows = [[name, *(of(row["each"][k]) if k in row["each"] else "-" for k in kinds)] for name, row in sources.items()]
    print_table(["source, over its policies: least, median, most", *kinds.values()], rows)


# === figures ===


def titled(axis, text, letters=90):
    axis.set_title("\n".join(textwrap.wrap(text, int(letters))), loc="left", fontsize=10)


def save(drawn, path):
    drawn.savefig(path, dpi=110)
    plt.close(drawn)


def panels(header, learners):
    """What `dots` draws: title -> {group: rows}; several learners: a panel per task, a group per learner."""
    tasks, groups = planned(header, learners)[0], by_learner(header, learners)
    if len(groups) < 2:
        return {"": {task: [row for row in learners if row["task"] == task] for task in tasks}}
    of = lambda rows, task: [row for row in rows if row["task"] == task]
    return {task: {called(name): of(rows, task) for name, rows in groups.items()} for task in tasks}


def dots(path, header, learners):
    """Per task (or learner) a group of columns, one per pick: mean over seeds, dots for seeds, a dash for the data.

    Where the data's means lie so far apart that the learners' differences could not be seen, they have their own axis.
    """
    plan, labels = panels(header, learners), planned(header, learners)[1]
    span = lambda key: np.ptp([row[key] for row in learners])
    apart = span("score") < span("data_mean") / 3
    width = max(7.5, 1.8 * max(map(len, plan.values())))
    heights = [height for _ in plan for height in ((3.4, 1.6) if apart else (4.2,))]
    drawn, axes = plt.subplots(len(heights), 1, figsize=(width, sum(heights) + 0.9), squeeze=False,
                               layout="constrained", height_ratios=heights)  # fmt: skip
    axes, expert = list(axes[:, 0]), False
    own = not any("," in pick for pick in header.get("picks", {}).values())  # the experts' reward has no options
    for title, groups in plan.items():
        axis = axes.pop(0)
        below = axes.pop(0) if apart else axis
        expert |= draw_groups(axis, below, title, groups, labels, own)
        axis.set_ylabel("return of the learner" if apart else "return of an episode\nas long as the data's")
        below.set_xticks(range(len(groups)), groups)
        if apart:
            axis.set_xticks([])
            below.set_ylabel("mean episode\nof the data")
        below.set_xlabel(title)
    one = "" if header["seeds"] > 1 else " (one seed of the learner)"
    titled(drawn.axes[0], f"{header['study']}: {header['question']}{one}", 11 * width)
    mark = lambda i, label: Line2D([], [], ls="", marker=style(i, label)[1], color=style(i, label)[0], ms=8)
    handles = {called(label): mark(i, label) for i, label in enumerate(labels)}
    if header["seeds"] > 1:
        handles["one seed of the learner"] = Line2D([], [], ls="", marker=".", color="k")
    handles["mean episode of its data"] = Line2D([], [], color="0.35", lw=1.8)
    if expert:
        handles["SAC expert"] = Line2D([], [], color="0.5", ls=":", lw=1.2)
    rows = -(-len(handles) // 6)
    drawn.legend(handles.values(), handles, frameon=False, fontsize=8, ncols=-(-len(handles) // rows),
                 loc="outside lower center")  # fmt: skip
    save(drawn, path)


def draw_groups(axis, below, title, groups, labels, experts=True):
    """One panel of `dots`, the data's means on `below` -> whether an expert's return is in it."""
    width, expert = 0.8 / len(labels), False
    for (j, rows), (i, label) in itertools.product(enumerate(groups.values()), enumerate(labels)):
        x, (color, marker) = j + (i - (len(labels) - 1) / 2) * width, style(i, label)
        values = [row["score"] for row in rows if row["label"] == label]
        if not values:
            where = axis.get_xaxis_transform()
            axis.text(x, 0.02, "missing", rotation=90, color="0.5", size=7, ha="center", transform=where)
            continue
        data = next(row["data_mean"] for row in rows if row["label"] == label)
        below.plot(
            [x - 0.42 * width, x + 0.42 * width], [data] * 2, "-", color="0.35" if axis is below else color, lw=1.8
        )
        if len(values) > 1:
            axis.plot([x, x], [min(values), max(values)], "-", color=color, lw=1.2)
            axis.plot(x + width * np.linspace(-0.18, 0.18, len(values)), values, ".", color="k", ms=3.5, zorder=3)
        axis.plot([x], [np.mean(values)], marker, color=color, ms=8, mec="white", mew=0.6)
    low, high = axis.get_ylim()
    for j, group in enumerate(groups):
        known = expert_return(title or group) if experts else None
        if known is not None and known < high + (high - low):  # farther than that, it would flatten all else
            axis.plot([j - 0.45, j + 0.45], [known] * 2, ":", color="0.5", lw=1.2, zorder=0)
            expert = True
    for one in dict.fromkeys((axis, below)):
        one.set_xlim(-0.5, len(groups) - 0.5)
        for j in range(1, len(groups)):
            one.axvline(j - 0.5, color="0.9", lw=1)
        if np.prod(one.get_ylim()) < 0:
            one.axhline(0, color="0.7", lw=0.8, zorder=0)
    return expert


def against_number(path, header, learners):
    """Returns against K; beside it what K policies cost.

    One learner: the mean over tasks, the worst task, and a dot for every task. Several: the mean over tasks of each
    learner, and of the data.
    """
    groups, (tasks, labels) = by_learner(header, learners), planned(header, learners)
    drawn, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    numbers = {label: int(label.removeprefix("K=")) for label in labels}
    kinds = [("mean over tasks", np.mean, learners), ("worst task", np.min, learners)]
    if len(groups) > 1:
        kinds = [(called(name), np.mean, rows) for name, rows in groups.items()]
    elif len(tasks) == 1:
        kinds = [(tasks[0], np.mean, learners)]
    gaps = ""
    for i, (name, function, rows) in enumerate(kinds):
        table, color, marker = scores(rows), *style(i)
        made = [label for label in labels if all(label in table.get(task, {}) for task in tasks)]  # on every task
        gaps = gaps if len(made) == len(labels) else "; some cells are missing"
        cells = {label: [table[task][label] for task in tasks] for label in made}
        values = np.array([function([np.mean(c) for c in cells[label]]) for label in made])
        samples = [resampled_means(cells[label]) for label in made]
        ends = [
            (v, v) if s is None else np.quantile(function(s, axis=0), [0.025, 0.975])
            for v, s in zip(values, samples, strict=True)
        ]
        low, high = np.reshape(ends, (-1, 2)).T
        reach = np.clip([values - low, high - values], 0, None)
        left.errorbar([numbers[x] for x in made], values, reach, color=color, marker=marker, capsize=3, label=name)
    if len(groups) > 1:
        data = scores(learners, "data_mean")
        whole = [label for label in labels if all(label in data.get(task, {}) for task in tasks)]
        means = [np.mean([np.mean(data[task][label]) for task in tasks]) for label in whole]
        left.plot([numbers[x] for x in whole], means, "--", color="0.35", label="mean episode of its data")
    elif len(tasks) > 1:
        for label, values in itertools.chain.from_iterable(found.items() for found in scores(learners).values()):
            left.plot(numbers[label], np.mean(values), ".", color="0.6", ms=5, zorder=3)
        left.plot([], [], ".", color="0.6", ms=5, label="one task")
    picks = {row["label"]: row["pick"] for row in learners} | header.get("picks", {})
    cells = {label: header["cells"].get(f"source {picks[label].split(':')[0]}", {}) for label in labels}
    timed = [x for x in labels if cells[x].get("seconds") is not None and not cells[x].get("resumed")]
    known = any("cpu_seconds" in cells[x] for x in timed)
    clock = "cpu_seconds" if known else "seconds"  # the latter of a machine that was shared
    timed = [x for x in timed if clock in cells[x]]
    right.plot([numbers[x] for x in timed], [cells[x][clock] / 60 for x in timed], "s-", color="0.3")
    for label in set(labels) - set(timed):
        where = right.get_xaxis_transform()
        right.text(numbers[label], 0.02, "not timed", rotation=90, color="0.5", size=8, ha="center", transform=where)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(numbers.values()), map(str, numbers.values()))
        axis.set_xlabel("K, policies of the source")
    left.set_ylabel("return of the learner on the top 1")
    left.legend(frameon=False, fontsize=8)
    bars = "bars: 95 % over seeds" if header["seeds"] >= MIN_SEEDS else f"seeds of the learner: {header['seeds']}"
    titled(left, f"{header['study']}: what K buys ({bars}{gaps})", 66)
    of = "processor's minutes" if clock == "cpu_seconds" else "minutes on a machine in use,"
    right.set(ylabel=f"{of} of wurl_sac.py", ylim=(0, None))
    titled(right, "what K costs", 66)
    save(drawn, path)


def bound(path, header, learners, distances):
    """A learner's return on every buffer against the buffer's W1 to the expert, and against its relabelled return."""
    models, tasks = list(dict.fromkeys(row["learner"] for row in learners)), list(distances)
    drawn, axes = plt.subplots(len(models), 3, figsize=(14, 3.9 * len(models)), squeeze=False, layout="constrained",
                               sharey=True, sharex="col")  # fmt: skip
    lines, handles = [], {}
    for model, row_of_axes in zip(models, axes, strict=True):
        of_tasks = {}  # {task: (predictors, returns)}
        for j, task in enumerate(tasks):
            rows = [row for row in learners if row["learner"] == model and row["task"] == task]
            found, gain = predictions(rows, distances[task]["w1"]) if rows else ({}, np.empty((0, 1)))
            if not len(gain):
                continue
            of_tasks[task] = found, gain
            for axis, (name, x) in zip(row_of_axes, found.items(), strict=True):
                color, marker = style(j)
                shown = -x if name.startswith("W1") else x
                look = {"color": color, "alpha": 0.85, "mec": "white", "mew": 0.4}
                if gain.shape[1] > 1:
                    axis.vlines(shown, gain.min(1), gain.max(1), color=color, lw=0.7, alpha=0.5)
                handles[task] = axis.plot(shown, gain.mean(1), marker, ms=5, **look)[0]
                if "expert" in distances[task]:
                    axis.axhline(distances[task]["expert"], color="0.5", lw=0.8, alpha=0.6, zorder=0)
        lines += bound_rows(model, of_tasks)
        label_bound(row_of_axes, model, of_tasks, distances)
    of = "seeds' mean and range" if header["seeds"] > 1 else "one seed"
    drawn.suptitle(
        f"{header['study']}: a point is a buffer; what a learner makes of it ({of}), against what could predict it"
    )
    handles["two samples of the expert's own"] = Line2D([], [], color="0.5", ls=":")
    if any("expert" in row for row in distances.values()):
        handles["the expert's return"] = Line2D([], [], color="0.5", lw=0.8)
    drawn.legend(handles.values(), handles, frameon=False, ncols=-(-len(handles) // 2), loc="outside lower center")
    save(drawn, path)
    head = ["model", "predictor", "rank correlation, mean over tasks", "lowest", "picks another than the best"]
    print_table([*head, "return lost, mean", "return lost, worst task"], lines)


def bound_rows(model, of_tasks):
    """The table's rows of one model; how often the return disagrees with a distance is printed above."""
    if not of_tasks:
        return []
    names, rows = list(next(iter(of_tasks.values()))[0]), []
    for name in names[:-1]:
        pairs = [(found[names[-1]], found[name]) for found, _ in of_tasks.values()]
        differ = sum(bool(by_return[by_distance.argmax()] < by_return.max()) for by_return, by_distance in pairs)
        print(f"{model}: the relabelled return and {name} choose different buffers in {differ} of {len(pairs)} tasks.")
    print()
    judged = {name: [judge(found[name], gain) for found, gain in of_tasks.values()] for name in names}
    if all(gain.shape[1] > 1 for _, gain in of_tasks.values()):
        judged["a seed of the learner itself"] = [judge_seeds(gain) for _, gain in of_tasks.values()]
    for name, column in judged.items():
        rank, lost, differ = np.array(column).T
        known = rank[~np.isnan(rank)]
        between = bracket(resampled_means([known])[0] if len(known) >= MIN_SEEDS else None, 2)
        ranks = [f"{known.mean():.2f}{between}", f"{known.min():.2f}"] if len(known) else ["undefined", "undefined"]
        rows.append([model, name, *ranks, f"{differ.mean():.0%}", f"{lost.mean():.1f}", f"{lost.max():.1f}"])
    return rows


def label_bound(row_of_axes, model, of_tasks, distances):
    """Axis labels, what no distance looks like as a dotted line, the mean rank correlation as title."""
    names = list(next(iter(of_tasks.values()))[0]) if of_tasks else []
    for i, (axis, name) in enumerate(zip(row_of_axes, names, strict=False)):
        ranks = [rank_correlation(found[name], gain.mean(1)) for found, gain in of_tasks.values()]
        known = [rank for rank in ranks if not np.isnan(rank)]
        what = "return" if i == len(names) - 1 else "nearness"
        told = f": rank correlation of {what} {np.mean(known):.2f}" if known else ""
        axis.set_title(called(model) + told, loc="left", fontsize=10)
        space = name.removeprefix("W1 to the expert, ")
        units = {"features": "xy of the next state (m)", "(s, a), standardised": f"{space} (no unit)"}
        axis.set_xlabel(
            f"{name} of the buffer" if i == len(names) - 1 else f"W1 to the expert, {units.get(space, space)}"
        )
        floors = [row["floor"][space] for row in distances.values() if space in row.get("floor", {})]
        if floors:
            axis.axvline(np.mean(floors), color="0.5", ls=":", lw=1)
    row_of_axes[0].set_ylabel("return of the learner")


def measured_in(header, sources):
    """The flags of each source that say what its diversity is measured in; () where its command is not known."""
    known = {}
    for name in sources:
        words = header["cells"].get(f"source {name}", {}).get("command", "").split()
        known[name] = [word for flag in SPACE_FLAGS if flag in words for word in value_of(flag, words)]
    return known


def value_of(flag, words):
    """A flag and the words up to the next one."""
    rest = words[words.index(flag) + 1 :]
    return [flag, *itertools.takewhile(lambda word: not word.startswith("--"), rest)]


def distances_over_time(path, header, sources):
    """Of every source over training: distance to the nearest other policy, mean and smallest; share told apart.

    In the space of their own diversity where it is the same, else in that of all observations.
    """
    spaces = list(measured_in(header, sources).values())
    common = any(space != spaces[0] for space in spaces) and all(row.get("min_w_full") for row in sources.values())
    keys = ("min_w_full", "smallest_w_full") if common else ("min_w", "smallest_w")
    space = "all observations (raw units)" if common else "what diversity is measured in"
    picked = {pick.split(":")[0]: label for label, pick in header.get("picks", {}).items()}
    many = len({len(row["each"]["eval/travel"]) for row in sources.values()}) > 1
    drawn, axes = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    axes[1].sharey(axes[0])
    for i, (name, row) in enumerate(sources.items()):
        steps, number, K = told_apart(row)
        label = f"K={K}" if many else picked.get(name, name) if len(picked) == len(header.get("picks", {})) else name
        color, marker = style(i)
        line = {"color": color, "marker": marker, "ms": 4, "ls": "-" if i < len(COLORS) else "--"}
        for axis, key in zip(axes, keys, strict=False):
            axis.plot(*np.transpose(row[key]), **line, label=called(label) if axis is axes[0] else None)
        axes[2].plot(steps, number / K, **line)
        axes[2].axhline((K + 1) / 2 / K, color=color, ls=":", lw=0.8)
    axes[0].set_ylabel(f"distance to the nearest other policy,\n{space}")
    axes[2].set(ylabel="accuracy of a classifier on held-out episodes", ylim=(0, 1.02))
    titles = (
        "mean over policies",
        "smallest: near 0, two policies coincide",
        "share told apart (wurl_sac.py warns below the dots)",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xlabel="updates per policy", ylim=(0, None))
        titled(axis, f"{header['study']}: {title}", 60)
    if len(sources) > 1:
        drawn.legend(frameon=False, fontsize=8, ncols=min(len(sources), 5), loc="outside lower center")
    save(drawn, path)


def draw(path):
    """All tables and figures of one study."""
    header, sources, learners, distances = load(path)
    print(f"## {path.stem}: {header['question']}\n")
    counts = sorted({len(row["returns"]) for row in learners})
    told = f"; {' or '.join(map(str, counts))} evaluations a run, the score is of the last {LAST}" if counts else ""
    print(f"{header['seeds']} seeds of the learner{told}; one run of wurl_sac.py a source.\n")
    commits = {cell.get("commit") for name, cell in header["cells"].items() if name.startswith("learn ")}
    if len(commits) > 1:
        print(f"The learners ran at {len(commits)} commits; each cell's stands in {path.name}.\n")
    if header["missing"]:
        print(f"Not made yet: {len(header['missing'])} cells, e.g. {header['missing'][0]}\n")
    sources_table(sources)
    picture = path.with_suffix(".png")
    if learners and distances:
        bound(picture, header, learners, distances)
    elif learners:
        groups = by_learner(header, learners)
        if len(groups) > 1:
            learners_table(header, learners)
        for name, rows in ((name, rows) for name, rows in groups.items() if rows):
            print(f"### {name}\n\n" * (len(groups) > 1), end="")
            score_tables(header, rows)
        counted = all(re.fullmatch(r"K=\d+", label) for label in planned(header, learners)[1])
        (against_number if counted else dots)(picture, header, learners)
    diverse = {name: row for name, row in sources.items() if row["min_w"]}
    if len(diverse) > 1 or (diverse and not learners):
        distances_over_time(path.with_name(f"{path.stem}-diversity.png"), header, diverse)
    if not (learners or diverse):
        print("Nothing to draw yet.\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="studies to draw; none: all that results/udg holds")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the jsonl lie and the figures go")
    args = parser.parse_args(argv)
    paths = {path.stem: path for path in sorted(args.folder.glob("*.jsonl"))}
    unknown = [name for name in args.names if name not in paths]
    if unknown or not paths:
        there = ", ".join(paths) or "nothing: run benchmark/udg_study.py first"
        sys.exit(f"udg_figures.py: error: no {', '.join(unknown) or 'study'} in {args.folder}; there is {there}")
    for name in args.names or paths:
        draw(paths[name])


if __name__ == "__main__":
    main()
