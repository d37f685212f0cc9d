"""What is shown of several policies: the numbers of an evaluation, a warning where policies do the same, figures."""

import dataclasses

import numpy as np

import envs
from runner import plots
from runner.log import say

SHOWN = (
    "w1_nearest", "w1_margin", "w1_closest", "w1_floor", "cells", "direction_gap_deg", "disc_success", "task_return",
)  # fmt: skip
CURVES = {  # of distances.png
    "w1_nearest": "nearest other, mean over policies", "w1_closest": "closest pair",
    "min_w": "upper bound of the nearest, by projections",
}  # fmt: skip


def collapse(metrics, step, args):
    """A warning if policies do the same after the first quarter of a run, in which they have hardly moved; else ""."""
    if args.num_policies == 1 or 4 * step < args.num_updates:
        return ""
    w1, pairs = metrics["eval/w1"], metrics["eval/w1_same"]
    modes = args.num_policies * float(metrics["eval/disc_accuracy_held_out"])  # m modes shared evenly: accuracy m / K
    if len(pairs):
        near = ", ".join(f"{k} and {l} ({w1[k, l]:.2f})" for k, l in pairs)
        alike = f"policies {near} are as near as two samples of one policy ({np.diag(w1).mean():.2f})"
        return f"{alike}: mode collapse; see --div-features, --objective"
    if modes < (args.num_policies + 1) / 2:
        found = f"a classifier tells {modes:.1f} of {args.num_policies} policies apart"
        return f"{found} (mode collapse, or fewer modes); see --num-policies, --div-features, --objective"
    return ""


def show_evaluation(step, metrics, args, warn):
    """Print the main numbers, and, with `warn`, a warning if policies do the same."""
    shown = {n: float(np.mean(metrics[f"eval/{n}"])) for n in SHOWN if f"eval/{n}" in metrics}
    if args.num_policies > 1:
        shown["told_apart"] = args.num_policies * float(metrics["eval/disc_accuracy_held_out"])
    say(f"  evaluation at {step}:", *(f"{n} {v:.3f} " for n, v in shown.items()))
    say("  travel", *(f"{x:.1f}" for x in metrics["eval/travel"]))
    warning = collapse(metrics, step, args) if warn else ""
    if warning:
        say(f"  warning: {warning}")


def write_figures(run, names, snapshot):
    """trajectories.png and, of several policies, distances.png.

    names [d] of the features, to which --feature-scales are added; snapshot: paths [K, E, L, 2], features [K, E, L, d],
    alive [K, E, L].
    """
    scales = run.args.feature_scales or ("",) * len(names)
    names = tuple(f"{scale:g} x {name}" if scale else name for scale, name in zip(scales, names, strict=True))
    task = dataclasses.replace(run.task, feature_names=names)
    paths = [snapshot[k] for k in ("paths", "features", "alive")]
    envs.figures.plot_paths(run.folder / "trajectories.png", task, *paths)
    if len(paths[0]) > 1:
        log = {name: plots.read(run.folder, f"eval/{name}")[None] for name in (*CURVES, "w1_floor", "w1")}
        curves = {CURVES[name]: log[name][1] for name in CURVES}
        steps, floor = log["w1_floor"]
        envs.figures.plot_distances(run.folder / "distances.png", task, steps, curves, floor, log["w1"][1][-1])
