"""Curves, the headline score and figures of a run, from its log.jsonl."""

import json
from pathlib import Path

import numpy as np


def read(run, key):
    """{seed: (steps [n], values [n, ..])} of one key of a run, its folder or its log, in the order of the log.

    Records of a run without seeds stand under None.
    """
    found, path = {}, Path(run)
    for line in (path / "log.jsonl" if path.is_dir() else path).read_text().splitlines()[1:]:
        record = json.loads(line)
        if key in record:
            steps, values = found.setdefault(record.get("seed"), ([], []))
            steps.append(record["step"])
            values.append(record[key])
    return {seed: (np.array(s), np.array(v)) for seed, (s, v) in found.items()}


def std_of_seeds(values):
    """Standard deviation over seeds, the first axis, as of a sample (n - 1 in the denominator); 0 of one seed."""
    values = np.asarray(values)
    return values.std(0, ddof=1) if len(values) > 1 else 0.0 * values[0]


def summary(folder, buffer):
    """The score of a run, printed and returned as {name: number}.

    score: mean over seeds of the mean of the last 5 evaluations, score_std its standard deviation over seeds, of a
    sample; last and best evaluation beside it; none of them counts what was evaluated at step 0, before any
    learning; the same over episodes as long as the data's;
    mean and best episode return of the data; normalized_score: the score as `Task.normalized_score`
    has it, D4RL's way on D4RL's tasks, where the task has a reference, and its standard deviation over seeds.
    """
    learnt = lambda key: [values[steps > 0] for steps, values in read(folder, key).values()]
    values = learnt("eval/return")
    if not values:
        print("result: not evaluated, as the data name no task")
        returns = buffer["episode_returns"]
        return {"data_mean": float(returns.mean()), "data_best": float(returns.max())}
    values, short = np.stack(values), np.stack(learnt("eval/return_data_length"))
    score, returns = values[:, -5:].mean(1), buffer["episode_returns"]
    result = {
        "score": score.mean(), "score_std": std_of_seeds(score), "last": values[:, -1].mean(),
        "best": values.max(1).mean(), "score_data_length": short[:, -5:].mean(),
        "data_mean": returns.mean(), "data_best": returns.max(),
    }  # fmt: skip
    normalized = [v[-5:].mean() for v in learnt("eval/score")]
    if normalized:
        result |= {"normalized_score": np.mean(normalized), "normalized_score_std": std_of_seeds(normalized)}
    print("result:", *(f"{k} {v:.2f} " for k, v in result.items()), flush=True)
    return {k: float(v) for k, v in result.items()}


def number(axis):
    """Numbers on an axis with a log scale: powers of ten; where fewer than two of them are in sight, round numbers, and
    never one beside every small tick, which would overlap."""
    from matplotlib import ticker

    low, high = sorted(axis.get_view_interval())
    axis.set_minor_formatter(ticker.NullFormatter())
    if np.floor(np.log10(high)) > np.ceil(np.log10(low)):
        return
    few = ticker.MaxNLocator(4, steps=[1, 2, 5, 10]) if high < 5 * low else ticker.LogLocator(subs=(1.0, 2.0, 5.0))
    axis.set_major_locator(few)
    axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))


def figure(path, panels, width=6.0, height=4.5, sharey=False):
    """Draw panels side by side into a png, four in a row at most; sharey: all on one scale.

    panels: dicts with title, xlabel, ylabel, scale ("linear", "semilogy" or "loglog") and `lines`:
    (x, y, style) with style the keywords of matplotlib's plot; y [n] or [n, k], k lines of one label;
    x None: a horizontal line at y. names: what stands at y = 0, 1, .. in place of numbers.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = -(-len(panels) // 4)
    columns = -(-len(panels) // rows)
    drawn, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, sharey=sharey)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, panel in zip(axes.flat, panels):  # noqa: B905  (what is over is empty)
        scale = panel.get("scale", "linear")
        axis.set(title=panel["title"], xlabel=panel["xlabel"], ylabel=panel["ylabel"])
        axis.set_xscale("log" if scale == "loglog" else "linear")
        axis.set_yscale("linear" if scale == "linear" else "log")
        counted = all(np.issubdtype(np.asarray(x).dtype, np.integer) for x, _, _ in panel["lines"] if x is not None)
        if counted and scale != "loglog":
            axis.xaxis.get_major_locator().set_params(integer=True, nbins=5)  # no halves; long numbers need room
        for x, y, style in panel["lines"]:
            if x is None:
                axis.axhline(y, **style)
                continue
            label = {k: v for k, v in style.items() if k == "label"}
            lines = axis.plot(x, y, **{k: v for k, v in style.items() if k != "label"})
            lines[0].set(**label)
        if "names" in panel:
            axis.set_yticks(range(len(panel["names"])), panel["names"])
        for of in filter(lambda of: of.get_scale() == "log", (axis.xaxis, axis.yaxis)):
            number(of)
        labels = sum("label" in style for _, _, style in panel["lines"])
        if labels:
            beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if labels > 6 else {}
            axis.legend(frameon=False, fontsize=8, **beside)
    drawn.tight_layout()
    drawn.savefig(path, dpi=110)
    plt.close(drawn)


def learning_curve(path, folder, task, buffer):
    """Returns over updates, per seed, mean and spread: whole evaluation episodes, and their first part.

    The first part is as long as the data's episodes, whose mean and best return are drawn beside it. Where those are as
    long as an evaluation, there is one panel.
    """
    returns, length = buffer["episode_returns"], buffer.metadata["episode_length"]
    titles = {"eval/return": f"{task.name}, {task.eval_length} steps"}
    if length != task.eval_length:
        titles["eval/return_data_length"] = f"{task.name}, first {length} steps, as long as the data's"
    panels = []
    for key, title in titles.items():
        seeds = read(folder, key)
        if not seeds:  # the data name no task
            return
        steps = next(iter(seeds.values()))[0]
        values = np.stack([v for _, v in seeds.values()])
        mean, std = values.mean(0), std_of_seeds(values)
        lines = [(steps, values.T, {"color": "C0", "lw": 0.8, "alpha": 0.4})]
        label = f"mean ({len(seeds)} seeds)" if len(seeds) > 1 else "one seed"
        lines += [(steps, mean, {"color": "C0", "marker": "o", "ms": 3, "label": label})]
        if len(seeds) > 1:
            edges = np.stack([mean - std, mean + std], 1)
            lines += [(steps, edges, {"color": "C0", "ls": ":", "lw": 1, "label": "+- std over seeds"})]
        panels.append({"title": title, "xlabel": "updates", "ylabel": "return", "lines": lines})
    panels[-1]["lines"] += [
        (None, returns.mean(), {"color": "k", "ls": "--", "lw": 1, "label": "data: mean episode"}),
        (None, returns.max(), {"color": "k", "ls": ":", "lw": 1, "label": "data: best episode"}),
    ]
    figure(path, panels)


def training(path, folder, panels):
    """Curves of the log side by side, one a seed.

    panels: (key or {key: label}, title, unit, scale), scale as in `figure`. Several keys in one panel: each the mean
    over seeds, with its label, or (label, keywords of matplotlib's plot). A panel whose keys the log lacks is left out.
    """
    drawn = []
    for keys, title, unit, scale in panels:
        lines = []
        if isinstance(keys, str):
            seeds = read(folder, keys).items()
            lines = [(x, y, {"lw": 1, "marker": ".", "label": f"seed {seed}"}) for seed, (x, y) in seeds]
        for key, label in keys.items() if isinstance(keys, dict) else ():
            seeds = list(read(folder, key).values())
            label, style = label if isinstance(label, tuple) else (label, {})
            if seeds:
                mean = np.mean([values for _, values in seeds], 0)
                lines += [(seeds[0][0], mean, {"lw": 1, "marker": ".", "label": label, **style})]
        if lines:
            drawn += [{"title": title, "xlabel": "updates", "ylabel": unit, "scale": scale, "lines": lines}]
    if drawn:
        figure(path, drawn, width=5.0)
