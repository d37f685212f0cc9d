"""Figures of buffers: of one file (`python -m envs.buffers inspect`) and of K beside each other."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

SHOWN = 20  # buffers in one figure, best first
POINTS = 100_000  # positions drawn of each


def plot_buffer(path, buffer):
    """Write a figure: episode returns, lengths, coverage of the plane, reward over the step."""
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    ends, lengths = buffer["episode_ends"], buffer["episode_lengths"]
    free = buffer.metadata["reward_kind"] == "none"
    paid = "pseudo_rewards" if free and "pseudo_rewards" in buffer.arrays else "rewards"
    word = paid[:-1].replace("_", " ")
    returns = np.add.reduceat(buffer[paid].astype(np.float64), ends - lengths)
    bins = min(50, max(10, len(returns) // 5))
    axes[0, 0].hist(returns, bins=bins, color="tab:blue")
    axes[0, 0].axvline(returns.mean(), color="black", lw=1, label=f"mean {returns.mean():.4g}")
    axes[0, 0].set(title="Episode returns", xlabel=f"sum of {word}", ylabel="episodes")
    axes[0, 0].legend()
    axes[0, 1].hist(lengths, bins=bins, color="tab:green")
    axes[0, 1].set(title="Episode lengths", xlabel="steps", ylabel="episodes")
    _draw_coverage(axes[1, 0], buffer)
    mean, spread, counts = reward_by_step(buffer[paid], ends)
    steps = np.arange(len(mean))
    axes[1, 1].fill_between(steps, mean - spread, mean + spread, color="tab:orange", alpha=0.25)
    axes[1, 1].plot(steps, mean, color="tab:orange")
    title = f"{word.capitalize()} over the step (mean, std)"
    axes[1, 1].set(title=title, xlabel="step", ylabel=word)
    if counts[-1] < counts[0]:
        share = axes[1, 1].twinx()
        share.plot(steps, counts, color="tab:gray", lw=1)
        share.set(ylabel="episodes still running", ylim=(0, None))
    world = buffer.metadata["task"] or buffer.metadata["env"]
    counts = f"{len(buffer):,} transitions, {buffer.num_episodes:,} episodes"
    figure.suptitle(f"{Path(buffer.path).name} ({world}): {counts}")
    figure.savefig(path, dpi=110)


def _draw_coverage(axis, buffer):
    axis.set(title="Coverage of the plane", xlabel="x", ylabel="y (planar robots: z)")
    if "root_positions" not in buffer.arrays:
        axis.text(0.5, 0.5, "no root_positions", ha="center", transform=axis.transAxes)
        return
    x, y = buffer["root_positions"].T
    drawn = axis.hist2d(x, y, bins=80, cmin=1, cmap="viridis", norm="log")
    axis.figure.colorbar(drawn[3], ax=axis, label="transitions")
    axis.set_aspect("equal", adjustable="datalim")


def reward_by_step(rewards, ends):
    """Mean, std and number of episodes at each step since the start; three (max length,)."""
    lengths = np.diff(ends, prepend=0)
    step = np.arange(len(rewards)) - np.repeat(ends - lengths, lengths)
    counts = np.bincount(step)
    mean = np.bincount(step, weights=rewards) / counts
    square = np.bincount(step, weights=(rewards - mean[step]) ** 2) / counts
    return mean, np.sqrt(square), counts


def plot_heatmap(path, names, tasks, table, by="mean"):
    """Buffers x tasks: score (K, T), `by` which they are ranked, as number, rank within the task as colour."""
    table = np.asarray(table)
    shade = (table - table.min(0)) / np.maximum(np.ptp(table, axis=0), 1e-12)
    size = (3.0 + 1.25 * len(tasks), 1.6 + 0.36 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shade, cmap="viridis", aspect="auto", vmin=0, vmax=1)
    digits = 3 if by == "per-step" else 1
    for (k, t), value in np.ndenumerate(table):
        best = value == table[:, t].max()
        colour = "black" if shade[k, t] > 0.6 else "white"
        weight = "bold" if best else "normal"
        axis.text(t, k, f"{value:.{digits}f}", ha="center", va="center", color=colour, weight=weight)
    axis.set_xticks(range(len(tasks)), tasks, rotation=30 if len(tasks) > 2 else 0, ha="center")
    axis.set_yticks(range(len(names)), names)
    what = {"mean": "Mean return", "per-step": "Reward per step"}.get(by, f"Return ({by})")
    axis.set_title(f"{what} of each buffer\n(bold: the best for a task)")
    bar = figure.colorbar(image, ax=axis, ticks=[0, 1])
    bar.ax.set_yticklabels(["worst", "best"])
    figure.savefig(path, dpi=110)


def plot_returns(path, task, names, scores, order):
    """Histogram of episode returns of every buffer, best on top; the line is the score."""
    shown = order[:SHOWN]
    low = min(min(scores[k]["returns"]) for k in shown)
    high = max(max(scores[k]["returns"]) for k in shown)
    bins = np.linspace(low, high if high > low else low + 1.0, 60)
    figure = Figure(figsize=(8, 1.2 + 0.62 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for rank, (axis, k) in enumerate(zip(axes, shown, strict=True)):
        colour = "tab:blue" if rank else "tab:orange"
        axis.hist(scores[k]["returns"], bins=bins, weights=scores[k]["weights"], color=colour)
        axis.axvline(scores[k]["mean"], color="black", lw=1.2)
        axis.set(yticks=[])
        label = f"{names[k]}\n{scores[k]['mean']:.1f}"
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[-1].set_xlabel("episode return (line: mean)")
    more = "" if len(shown) == len(order) else f", best {len(shown)} of {len(order)}"
    figure.suptitle(f"Episode returns of each buffer under {task.name}{more}")
    figure.savefig(path, dpi=110)


def plot_coverage(path, task, sources, scores, order):
    """Where each buffer has been, in the plane of the root; best first."""
    shown, rng = order[:SHOWN], np.random.default_rng(0)
    columns = min(5, len(shown))
    rows = -(-len(shown) // columns)
    size = (2.3 * columns + 1.1, 2.75 * rows + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    points = []
    for k in shown:
        position = sources[k].buffer["root_positions"]
        index = np.sort(rng.choice(len(position), min(len(position), POINTS), replace=False))
        points.append(position[index])
    low = np.min([p.min(0) for p in points], axis=0)
    high = np.max([p.max(0) for p in points], axis=0)
    margin = 0.04 * (high - low) + 1e-3
    box = np.stack([low - margin, high + margin], axis=1)
    counts = [np.histogram2d(*p.T, bins=70, range=box)[0].T / len(p) for p in points]
    low, top = min(c[c > 0].min() for c in counts), max(c.max() for c in counts)
    for rank, axis in enumerate(axes.flat):
        if rank >= len(shown):
            axis.set_axis_off()
            continue
        share = np.ma.masked_equal(counts[rank], 0)
        extent = box.ravel()
        image = axis.imshow(
            share, origin="lower", extent=extent, norm="log", vmin=low, vmax=top,
            cmap="viridis", aspect="equal" if task.feature_names == ("x", "y") else "auto",
        )  # fmt: skip
        k = shown[rank]
        axis.set_title(f"{sources[k].name}\nreturn {scores[k]['mean']:.1f}", fontsize=9)
    figure.colorbar(image, ax=axes, label="share of the transitions", shrink=0.8)
    figure.supxlabel("x (m)", fontsize=10)
    figure.supylabel("y (m)" if task.feature_names == ("x", "y") else "z (m)", fontsize=10)
    figure.suptitle(f"Coverage, best buffer for {task.name} first")
    figure.savefig(path, dpi=110)


PANELS = {  # key -> title of a panel of plot_measures
    "quality": "Trajectory quality\n(0: random, 1: best episodes)",
    "action_entropy": "Entropy of actions\n(1: uniform)",
    "saturation": "Saturated actions\n(share)",
    "coverage": "Coverage\n(share of what all visit)",
    "behaviours": "Effective number\nof behaviours",
    "drift": "Drift: W1 of the first\nto the last tenth",
    "w1_random": "W1 in (s, a)\nto random actions' data",
    "w1_expert": "W1 in (s, a) to the\nbest episodes or reference",
}


def plot_measures(path, task, names, scores, order, measures):
    """What the buffers are worth: their return over the file, and a panel for each measure; best first."""
    shown, rows = order[:SHOWN], np.arange(len(order[:SHOWN]))
    figure = Figure(figsize=(15, 2 * (1.7 + 0.24 * len(shown))), layout="constrained")
    axes = figure.subplots(2, 5).ravel()
    colours = [f"C{rank % 10}" for rank in rows]
    for colour, k in zip(colours, shown, strict=True):
        tenths = np.array(scores[k]["tenths"], float)  # None: nan
        axes[0].plot(np.arange(5, 100, 10), tenths, ".-", color=colour)
    axes[0].set(xlabel="rows, % (old to new)")
    axes[0].set_title("Mean return of each tenth", fontsize=10)
    for k, row, colour in zip(shown, rows, colours, strict=True):
        axes[1].plot([scores[k]["mean"], scores[k]["top_decile"]], [row] * 2, color=colour, lw=1)
        axes[1].plot(scores[k]["mean"], row, "o", scores[k]["recent"], row, "D", color=colour)
        axes[1].plot(scores[k]["top_decile"], row, "|", color=colour, ms=10, mew=2)
    axes[1].set_title("Return: mean o, newest 10% \u25c6,\nbest 10% |", fontsize=10)
    for axis, (key, title) in zip(axes[2:], PANELS.items(), strict=True):
        values = [measures[k][key] for k in shown]
        axis.barh(rows, [np.nan if value is None else value for value in values], color=colours)
        axis.set_title(title, fontsize=10)
        if all(value is None for value in values):
            axis.text(0.5, 0.5, "no random warm-up", ha="center", transform=axis.transAxes)
    for axis in axes[1:]:
        axis.locator_params(axis="x", nbins=4)
        axis.set_yticks(rows, [names[k] for k in shown] if axis in (axes[1], axes[5]) else [], fontsize=8)
        axis.set_ylim(len(shown) - 0.5, -0.5)
    figure.suptitle(f"What each buffer is worth for {task.name}, best first")
    figure.savefig(path, dpi=110)


def plot_distances(path, task, names, scores, order, matrix, to_reference):
    """Pairwise W1 in the order of the scores; with a reference, score against W1 to it."""
    panels = 1 if to_reference is None else 3
    size = 2.4 + 0.42 * len(names)
    figure = Figure(figsize=(size + 4.2 * (panels - 1), size), layout="constrained")
    widths = [size] + [4.0] * (panels - 1)
    axes = figure.subplots(1, panels, squeeze=False, width_ratios=widths)[0]
    ranked = matrix[np.ix_(order, order)]
    image = axes[0].imshow(ranked, cmap="magma")
    if len(names) <= 16:
        for (i, j), value in np.ndenumerate(ranked):
            colour = "black" if value > 0.6 * ranked.max() else "white"
            axes[0].text(j, i, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=8)
    labels = [names[k] for k in order]
    axes[0].set_xticks(range(len(names)), labels, rotation=90)
    axes[0].set_yticks(range(len(names)), labels)
    space = ", ".join(task.feature_names)
    title = f"W1 between buffers in ({space}), best for {task.name} first"
    axes[0].set_title(f"{title}\n(diagonal: two samples of one buffer)", fontsize=10)
    figure.colorbar(image, ax=axes[0], shrink=0.8)
    if to_reference is not None:
        values = [scores[k]["mean"] for k in range(len(names))]
        spaces = (f"({space})", "(s, a), standardised")
        for axis, distance, where in zip(axes[1:], to_reference, spaces, strict=True):
            axis.scatter(distance[:-1], values, color="tab:blue")
            axis.scatter(distance[order[0]], values[order[0]], color="tab:orange", label="top 1")
            axis.axvline(distance[-1], color="gray", ls=":", label="reference to itself")
            for k, name in enumerate(names):
                spot = (distance[k], values[k])
                axis.annotate(name, spot, xytext=(4, 3), textcoords="offset points", fontsize=7)
            axis.set(xlabel=f"W1 to the reference in {where}", ylabel="mean return")
            axis.margins(x=0.25)
            axis.legend(frameon=False, loc="upper right")
    figure.savefig(path, dpi=110)
