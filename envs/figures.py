"""Figures of what policies do in a world."""

from pathlib import Path

import numpy as np

from envs import maze
from envs.point import TREE_BLOCKS


def _axes(num, width=6.4, height=5.6):
    """A figure with `num` panels that needs no display, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * num, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, num, squeeze=False)[0]


def plot_paths(path, task, paths, features, alive, episodes=10):
    """Root paths of every policy, and their features where those are not the root's x and y (one feature: its density).

    The number of a policy stands where its episodes end on average, above all paths, which would hide one that stays
    where all begin.

    path: the png to write; paths [K, E, L, 2] in metres; features [K, E, L, d]; alive [K, E, L] bool.
    """
    on_plane = tuple(task.feature_names[:2]) == ("x", "y")
    figure, axes = _axes(1 if on_plane else 2)
    shades = colours(len(paths))
    for x0, y0, x1, y1 in walls(task.env):
        axes[0].fill([x0, x1, x1, x0], [y0, y0, y1, y1], color="0.88", lw=0, zorder=0)
    for k in range(len(paths)):
        for e in range(min(episodes, paths.shape[1])):
            label = f"policy {k}" if e == 0 else None
            live = alive[k, e]
            axes[0].plot(*paths[k, e][live].T, lw=1, color=shades[k], label=label)
            if not on_plane and features.shape[-1] > 1:
                x, y = features[k, e][live][:, 0], features[k, e][live][:, -1]
                axes[1].plot(x, y, ".", ms=2, color=shades[k], label=label)
        if features.shape[-1] == 1:
            values = features[k, ..., 0][alive[k]]
            axes[1].hist(values, 80, density=True, histtype="step", color=shades[k], label=f"policy {k}")
    _number_ends(axes[0], paths, alive, shades)
    axes[0].set(xlabel="x (m)", ylabel="y (m)" if on_plane else "z (m)")
    if on_plane:
        axes[0].set_aspect("equal", "datalim")
    elif features.shape[-1] == 1:
        axes[1].set(xlabel=task.feature_names[0], ylabel="density", title="the feature, all steps")
    else:
        axes[1].set(xlabel=task.feature_names[0], ylabel=task.feature_names[-1], title="features")
    axes[0].set_title(f"{task.name}: {len(paths)} policies, up to {episodes} episodes each, numbered where they end")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, markerscale=4)
    figure.savefig(Path(path), dpi=110)


def _number_ends(axes, paths, alive, shades):
    """Numbers of the policies where their episodes end on average; side by side where several end at one place."""
    last = alive.sum(-1)[..., None, None] - 1
    ends = np.take_along_axis(paths, last, 2)[:, :, 0].mean(1)  # [K, 2]
    near = 0.04 * max(np.ptp(paths[alive], 0).max(), 1e-9)
    for k, end in enumerate(ends):
        aside = 15 * (np.linalg.norm(ends[:k] - end, axis=-1) < near).sum()
        disc = {"boxstyle": "circle,pad=0.25", "fc": shades[k], "ec": "white", "lw": 0.8}
        at = {"xytext": (aside, 0), "textcoords": "offset points", "ha": "center", "va": "center", "zorder": 4}
        axes.annotate(str(k), end, color="white", fontsize=7, bbox=disc, **at)


def walls(env):
    """Rectangles [N, 4] that stand in the way in a world, as x0, y0, x1, y1 in metres; most worlds have none."""
    if env == "tree-maze":
        return TREE_BLOCKS
    if not env.startswith("ant-maze-"):
        return np.empty((0, 4))
    centre, half = np.split(np.array(maze.walls(env.removeprefix("ant-maze-"))), 2, axis=1)
    return np.concatenate([centre - half, centre + half], 1)


def colours(num):
    """A colour for each of `num` policies, the same in all pictures."""
    from matplotlib import colormaps

    if num <= 10:
        return [f"C{k}" for k in range(num)]
    return colormaps["turbo"](np.linspace(0.05, 0.95, num))


def plot_distances(path, task, steps, curves, floor, matrix):
    """Distances between policies over training (`curves`: label -> values at `steps`) and the last [K, K] matrix.

    floor: the distance of two samples of one policy at `steps`, below which nothing can be told apart.
    """
    figure, (left, right) = _axes(2, 6, 4.6)
    left.fill_between(steps, 0, floor, color="0.85", label="two samples of one policy")
    for label, values in curves.items():
        left.plot(steps, values, label=label, marker="." if len(steps) < 40 else None)
    left.set(xlabel="updates per policy", ylabel="W1", title=f"{task.name}: distance between policies")
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    image = right.imshow(matrix, cmap="viridis")
    names = task.feature_names
    space = f"({', '.join(names)})" if len(names) < 5 else f"{len(names)} features"
    right.set(xlabel="policy l", ylabel="policy k", title=f"between policies, last, in {space}")
    ticks = range(0, len(matrix), max(1, len(matrix) // 10))
    right.set(xticks=ticks, yticks=ticks)
    figure.colorbar(image, ax=right, label="exact W1; diagonal: two samples of one policy")
    figure.savefig(Path(path), dpi=110)
