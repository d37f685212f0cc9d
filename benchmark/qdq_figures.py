"""QDQ's model of the returns on and off the data: two figures of a finished run of qdq.py.

    python benchmark/qdq_figures.py runs/qdq/ant-angle-60/seed0

uncertainty.png: H against the distance of (s, a) to the data, and along steps off its actions. distributions.png: the
student's returns at a few (s, a) beside those of the nearest windows. Both show the first seed's student (q_model.npz).
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import envs
import envs.buffers
import qdq
import runner
from runner import plots


def load_run(folder):
    """A run's folder -> args, data, entries and the first seed's student; InputError where it is none of qdq.py's."""
    try:
        args = json.loads((folder / "args.json").read_text())
        args = qdq.Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in args.items()})
    except (OSError, ValueError, TypeError) as error:
        raise envs.InputError(f"{folder}: holds no run of qdq.py ({error})") from None
    path = args.dataset or folder / "point-angle-0.npz"
    buffer, task = envs.buffers.load_task(path, qdq.Transitions._fields, args.task, args.max_rows)
    if not (folder / "q_model.npz").exists():
        raise envs.InputError(f"{folder}: has no student (q_model.npz), as runs with --uncertainty critics")
    data, _ = qdq.qdq_data(buffer, args)
    entries, _ = qdq.q_entries(buffer, data, args)
    teacher = qdq.make_train(args, data.observations.shape[1], task.action_size)[0]
    net = jax.eval_shape(teacher.init, runner.seed_keys(args)).nets.net
    number = jax.ShapeDtypeStruct((args.num_seeds,), jnp.float32)
    arrays, _ = runner.read_npz(folder / "q_model.npz", "metadata_json")
    model = runner.fill(qdq.QModel(net, number, number), arrays, folder / "q_model.npz")
    return args, data, entries, jax.tree.map(lambda x: x[0], model)


def row_distances(c, rows):
    """Distances of every c [n, C] to every row [N, C] -> [n, N]."""
    squares = (c**2).sum(1)[:, None] + (rows**2).sum(1) - 2 * c @ rows.T
    return np.sqrt(np.maximum(squares, 0.0))


def plot_uncertainty(path, model, data, key, args):
    """H of the first seed's student against the distance of (s, a) to the data, and along steps off its actions."""
    moments = jax.jit(lambda c: qdq.q_moments(model, c, key, args)[1])
    rows = np.concatenate([data.observations, data.actions], -1)
    rows = rows[np.random.default_rng(0).permutation(len(rows))[:20_000]]
    scale, num_obs = rows.std(0) + 1e-6, data.observations.shape[1]
    chosen, rng, lines = rows[:300], np.random.default_rng(2), []
    s, a = np.split(chosen, [num_obs], -1)
    near, uniform = np.clip(a + 0.2 * rng.normal(size=a.shape), -1, 1), rng.uniform(-1, 1, a.shape)
    moved = s + 3 * s.std(0) * rng.normal(size=s.shape)
    probes = {"data": (s, a), "near": (s, near), "far action": (s, uniform), "far state": (moved, a)}
    for i, (name, both) in enumerate(probes.items()):
        c = np.concatenate(both, -1)
        h = np.asarray(moments(c))
        away = np.zeros(len(c)) if name == "data" else row_distances(c / scale, rows / scale).min(1)
        label = f"{name}: median H {np.median(h):.3g}"
        lines += [(away, h, {"marker": ".", "ls": "", "ms": 4, "alpha": 0.6, "color": f"C{i}", "label": label})]
    panels = [{
        "title": "near: noise 0.2; far: uniform action, state + 3 stds", "ylabel": "H, in scaled return",
        "xlabel": f"distance of (s, a) to the nearest of {len(rows):,} rows, in stds", "lines": lines,
    }]  # fmt: skip
    steps = np.linspace(0.0, 2.0, 21)
    turn = np.random.default_rng(1).normal(size=(len(chosen), rows.shape[1] - num_obs))
    turn /= np.linalg.norm(turn, axis=1, keepdims=True)
    moved = [np.concatenate([chosen[:, :num_obs], chosen[:, num_obs:] + d * turn], -1) for d in steps]
    h = np.stack([np.asarray(moments(c)) for c in moved])
    bands = np.quantile(h, [0.1, 0.9], axis=1).T
    lines = [(steps, np.median(h, 1), {"color": "C0", "marker": "o", "ms": 3, "label": "median over states"})]
    lines += [(steps, bands, {"color": "C0", "ls": ":", "lw": 1, "label": "10 % and 90 %"})]
    panels += [{
        "title": "from the data's action in a random direction", "ylabel": "H, in scaled return",
        "xlabel": "length of the step, not clipped to [-1, 1]", "lines": lines,
    }]  # fmt: skip
    plots.figure(path, panels)


def plot_distributions(path, model, entries, key, args, num=4, neighbours=100):
    """The first student's returns at a few (s, a) of D_Q beside those of the nearest windows in the data."""
    c, x = np.asarray(entries.conditions), np.asarray(entries.x)
    q = qdq.unscaled(x, float(model.low), float(model.high))
    chosen = np.argsort(q)[(np.linspace(0.05, 0.95, num) * (len(q) - 1)).astype(int)]
    z = jax.random.normal(key, (num, 4_000))
    samples = np.asarray(qdq.q_samples(model, jnp.asarray(c[chosen]), z, args))
    scale = c.std(0) + 1e-6
    order = np.argsort(row_distances(c[chosen] / scale, c / scale), 1)[:, :neighbours]
    panels = []
    for i, row in enumerate(chosen):
        both = np.concatenate([samples[i], q[order[i]]])
        edges = np.linspace(*np.quantile(both, [0.002, 0.998]) + np.array([-1e-3, 1e-3]), 41)
        middle, lines = (edges[1:] + edges[:-1]) / 2, []
        for values, label in ((samples[i], "student"), (q[order[i]], f"{neighbours} nearest windows")):
            density = np.histogram(values, edges, density=True)[0]
            lines += [(middle, density, {"drawstyle": "steps-mid", "label": label})]
        top = np.array([0.0, lines[0][1].max()])
        lines += [(np.full(2, q[row]), top, {"color": "k", "ls": "--", "label": "its own return"})]
        panels += [{"title": f"window {row}", "xlabel": "return over the window", "ylabel": "density", "lines": lines}]
    plots.figure(path, panels, width=4.0, height=3.6)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run of qdq.py")
    folder = parser.parse_args(argv).run
    try:
        args, data, entries, model = load_run(folder)
    except (envs.InputError, OSError) as error:
        sys.exit(f"qdq_figures.py: error: {error}")
    key = runner.evaluation_keys(args)[0]
    plot_uncertainty(folder / "uncertainty.png", model, data, key, args)
    plot_distributions(folder / "distributions.png", model, entries, key, args)
    print(f"{folder}: uncertainty.png, distributions.png")


if __name__ == "__main__":
    main()
