"""What several policies do, and what is shown of it: measures, a warning where policies do the same, figures."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import envs
from envs.distances import direction_gap, distance_matrix, exact_measures, neighbour_distances
from runner import plots
from runner.log import say

SHOWN = (
    "w1_nearest", "w1_margin", "w1_closest", "w1_floor", "cells", "direction_gap_deg", "disc_success", "task_return",
)  # fmt: skip
CURVES = {  # of distances.png
    "w1_nearest": "nearest other, mean over policies", "w1_closest": "closest pair",
    "min_w": "upper bound of the nearest, by projections",
}  # fmt: skip


class Classifier(nn.Module):
    """K logits of a state: two ReLU layers of Xavier-uniform weights."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for width in self.widths[:-1]:
            x = nn.relu(nn.Dense(width, kernel_init=nn.initializers.xavier_uniform())(x))
        return nn.Dense(self.widths[-1], kernel_init=nn.initializers.xavier_uniform())(x)


def fit(net, net_opt, loss, data, mask, key, rate, num_steps, batch_size=200, taken=None):
    """Adam steps on loss(net, *data) over data [K, N, L, ..] with mask [K, N, L] -> net, its optimiser's state.

    taken: of num_steps only so many, a traced number; None: all.
    """
    data = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), data)
    valid = jnp.argsort(~mask.reshape(-1), stable=True)  # rows with mask first

    def step(carry, key):
        net, opt = carry
        i = valid[jax.random.randint(key, (batch_size,), 0, mask.sum())]
        grads = jax.grad(loss)(net, *jax.tree.map(lambda x: x[i], data))
        updates, opt = optax.adam(rate).update(grads, opt)
        return (optax.apply_updates(net, updates), opt), None

    def step_if_due(carry, x):
        i, key = x
        return jax.lax.cond(i < taken, step, lambda carry, _: (carry, None), carry, key)

    keys = jax.random.split(key, num_steps)
    if taken is None:
        return jax.lax.scan(step, (net, net_opt), keys)[0]
    return jax.lax.scan(step_if_due, (net, net_opt), (jnp.arange(num_steps), keys))[0]


def discriminator_success(x, train, test, key, hidden_sizes):
    """Geometric mean of p(policy | state) and accuracy of a fresh K-way MLP (WURL: 1000 Adam steps, batch 200).

    x [K, E, L, S] states; trained on the rows with train [K, E, L], judged on those with test [K, E, L].
    """
    net, cross_entropy = Classifier((*hidden_sizes, len(x))), optax.softmax_cross_entropy_with_integer_labels
    y = jnp.broadcast_to(jnp.arange(len(x))[:, None, None], train.shape)
    loss = lambda params, x, y: cross_entropy(net.apply(params, x), y).mean()
    key_init, key_steps = jax.random.split(key)
    params = net.init(key_init, x[0, 0, :1])
    params, _ = fit(params, optax.adam(2e-3).init(params), loss, (x, y), train, key_steps, 2e-3, 1_000)
    logits, y, test = net.apply(params, x.reshape(-1, x.shape[-1])), y.reshape(-1), test.reshape(-1) / test.sum()
    return jnp.exp(-cross_entropy(logits, y) @ test), (logits.argmax(-1) == y) @ test


def measures(steps, features, keys, task, hidden_sizes):
    """What K policies do in E episodes each -> metrics by name, arrays for `exact` and the figures.

    steps: transition, alive [K, E, L, ..]; features [K, E, L, d] of the states s_{t+1}; keys: two, for classifiers of
    the given widths
    """
    t, alive = steps.transition, steps.alive
    path = t.root_positions + task.dt * t.root_velocities
    last = alive.sum(-1)[..., None, None] - 1
    travel = jnp.take_along_axis(path, last, 2)[:, :, 0] - t.root_positions[:, :, 0]
    angle = jnp.arctan2(travel.mean(1)[:, 1], travel.mean(1)[:, 0])
    metrics = {
        "travel": jnp.linalg.norm(travel, axis=-1).mean(1),
        "direction_deg": jnp.degrees(angle) % 360,
        "length": alive.sum(-1).mean(1),
    }
    if len(alive) > 1:
        metrics |= neighbour_distances(distance_matrix(features, alive, 32))  # directions, the same every time
        in_full = neighbour_distances(distance_matrix(t.next_observations, alive, 8))
        metrics |= {f"{name}_full": x for name, x in in_full.items()}
        half = alive & (jnp.arange(alive.shape[1]) % 2 == 0)[:, None]
        splits = ("", alive, alive, keys[0]), ("_held_out", half, alive & ~half, keys[1])
        for name, train, test, key in splits:  # rows to train on, rows to judge
            success, accuracy = discriminator_success(t.next_observations, train, test, key, hidden_sizes)
            metrics |= {f"disc_success{name}": success, f"disc_accuracy{name}": accuracy}
    if task.has_reward:
        metrics["task_return"] = jnp.where(alive, task.reward(t), 0.0).sum(-1).mean(1)
    arrays = {"paths": path, "features": features, "alive": alive, "displacement": travel.mean(1)}
    return {f"eval/{name}": x for name, x in metrics.items()}, arrays


def exact(metrics, arrays, task, cell):
    """The results of `measures` on the host -> the same, with exact distances and coverage in cells of an edge."""
    found = exact_measures(arrays["features"], arrays["alive"], cell)
    if len(arrays["alive"]) > 1 and tuple(task.feature_names[:2]) == ("x", "y"):  # positions are of a plane
        found["direction_gap_deg"] = direction_gap(arrays["displacement"])
    return metrics | {f"eval/{name}": x for name, x in found.items()}, arrays


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


def feature_names(args, task):
    """Names [d] of the features that distances are measured in (--div-features), without their scales."""
    if args.div_features in ("", "task"):
        return task.feature_names
    index = range(task.env_observation_size) if args.div_features == "full" else args.div_features.split(",")
    return tuple(f"s'[{i}]" for i in index)


def write_figures(run, snapshot):
    """trajectories.png and, of several policies, distances.png, by the process that writes.

    snapshot: paths [K, E, L, 2], features [K, E, L, d], alive [K, E, L].
    """
    if not run.is_first:
        return
    names = feature_names(run.args, run.task)
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
