"""Sections of the page: scores and curves of a task, settings over tasks, policies, selections, flags."""

import itertools
import re
import shlex
from pathlib import Path

import numpy as np

from runner.plots import std_of_seeds
from runner.report.charts import METRICS, chart, distinct, tick_text, titled
from runner.report.groups import same_over_tasks
from runner.report.markup import Html, folded, join, number, picture, table, tag, text_of
from runner.report.numbers import LAST, bootstrap, final_scores, iqm

CURVES = (*METRICS, "eval/smallest_w", "eval/pair_mean_w", "eval/distinct_nearest")
GALLERY = {"trajectories.png": "where each policy goes", "distances.png": "distances between the policies"}
SELECTION = {
    "score": "return", "std": "std", "top_decile": "top 10 %", "per_step": "per step",
    "score_trained": "without warm-up", "episodes": "episodes",
}  # fmt: skip


def score_cells(seeds):
    """Cells of a final table: seeds, last-5 mean, IQM, interval, last, best."""
    scores, last, best, counted = final_scores(seeds)
    several = f" \u00b1 {number(float(std_of_seeds(scores)))}" if len(scores) > 1 else ""
    few = f" (of {counted})" if counted < LAST else ""
    return [
        len(scores), f"{number(float(scores.mean()))}{several}{few}", number(float(iqm(scores))),
        interval_text([scores]), number(float(last.mean())), number(float(best.mean())),
    ]  # fmt: skip


def interval_text(strata):
    """The interval as text, or why there is none."""
    if not np.isfinite(np.concatenate(strata)).all():
        return "none: not finite"
    found = bootstrap(strata)
    fewest = min(map(len, strata))
    return f"{number(found[0])} to {number(found[1])}" if found else f"none: {fewest} seed{'s' * (fewest > 1)}"


def final_table(groups):
    """One row per metric and setting of a task."""
    rows = []
    for key, same in distinct([key for key in METRICS if any(g.series(key) for g in groups)], groups).items():
        shown = [(group, group.series(key)) for group in groups if group.series(key)]
        rows += [[titled(key, same)]]
        for group, seeds in shown:
            behind = [run for run in group.runs if not run.finished]
            state = f"{len(behind)} unfinished" if behind else "finished"
            steps = [run.last_step for run in group.runs]
            state = f"{tick_text(min(steps))} updates, {state}"
            name = join(group.label, tag("small", group.differs) if group.differs else "")
            rows.append([name, *score_cells(seeds), state])
    head = ["setting", "seeds", "last-5 mean", "IQM", "95 % interval of the IQM", "last", "best", "state"]
    return table(head, rows, "numbers final") if rows else tag("p", "No evaluation yet.", class_="notice")


def anchor(task):
    return "task-" + re.sub(r"[^a-z0-9]+", "-", task.lower())


def task_section(task, groups):
    """Final table and curves of one task."""
    keys = list(dict.fromkeys(key for group in groups for run in group.runs for key in run.series))
    main = [key for key in CURVES if key in keys]
    rest = [key for key in sorted(keys) if key not in main and not key.endswith("_deg")]
    main, rest = ([chart(key, groups, same) for key, same in distinct(keys, groups).items()] for keys in (main, rest))
    more = folded(f"more curves ({len(rest)})", tag("div", rest, class_="charts")) if rest else ""
    shown = tag("div", main, class_="charts")
    return tag("section", tag("h2", task), final_table(groups), shown, more, id=anchor(task))


def aggregate_section(groups):
    """Settings of the same name over their tasks, by normalised return; nothing where fewer than two tasks have one."""
    rows, scored = [], [group for group in groups if group.series("eval/score")]
    for (name, told), tasks in same_over_tasks(scored).items():
        if len(tasks) > 1:
            strata = [final_scores(group.series("eval/score"))[0] for group in tasks.values()]
            scores, seeds = np.concatenate(strata), sorted({len(s) for s in strata})
            means = number(float(np.mean([s.mean() for s in strata])))
            counts = "-".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))
            shown = join(name, tag("small", told) if told else "")
            behind = sum(not run.finished for group in tasks.values() for run in group.runs)
            state = f"{behind} unfinished" if behind else "finished"
            rows.append([shown, len(tasks), counts, means, number(float(iqm(scores))), interval_text(strata), state])
    if not rows:
        return Html("")
    head = ["setting", "tasks", "seeds a task", "mean", "IQM", "95 % interval of the IQM", "state"]
    about = "Normalised returns, last-5 mean of every task and seed; the interval redraws seeds within each task."
    return tag("section", tag("h2", "Over tasks"), tag("p", about), table(head, rows), id="over-tasks")


def policy_table(run):
    """What the last evaluation says of each policy."""
    lists = {k: v for k, v in run.per_policy.items() if k != "eval/length"}
    size = max(map(len, lists.values()), default=0)
    rows = [[i, *(number(v[i]) if i < len(v) else "-" for v in lists.values())] for i in range(size)]
    return table(["policy", *(k.removeprefix("eval/") for k in lists)], rows) if rows else Html("")


def gallery(run, notices):
    """WURL's policies: paths, distances, renders, and the last evaluation of each."""
    found = [picture(run.pictures[n], f"{run.name}: {t}", notices) for n, t in GALLERY.items() if n in run.pictures]
    gifs = [picture(p, Path(n).stem, notices) for n, p in run.pictures.items() if n.endswith(".gif")]
    if not gifs and (run.path / "buffers").is_dir():
        hint = f"No renders here. They are made by: python -m envs.render {shlex.quote(str(run.path))}"
        found.append(tag("p", hint, class_="hint"))
    parts = [tag("div", found, class_="pictures"), tag("div", gifs, class_="renders")]
    return join(tag("h3", f"{run.task}, {run.name}"), parts, folded("each policy", policy_table(run)))


def selection_section(selections, notices):
    """UDG: the heat map of each folder, the ranking and the files of each task."""
    parts = []
    for folder in dict.fromkeys(s.path.parent.parent for s in selections):
        found = [s for s in selections if s.path.parent.parent == folder]
        parts.append(tag("h3", "/".join(folder.resolve().parts[-2:])))
        if (folder / "heatmap.png").is_file():
            about = "return of every buffer under every task of the last call"
            parts.append(tag("div", picture(folder / "heatmap.png", about, notices), class_="pictures"))
        else:
            notices.append((folder, "has no heatmap.png. Remedy: run udg_select.py again"))
        parts += [selection_part(selection, notices) for selection in found]
    return tag("section", tag("h2", "UDG: which buffer suits which task"), *parts, id="selection")


def selection_part(selection, notices):
    """Ranking, written files and figures of one task."""
    scores, task = selection.scores, str(selection.scores.get("task", selection.path.parent.name))
    buffers = scores["buffers"]
    ranked = [name for name in map(str, scores["ranking"]) if isinstance(buffers.get(name), dict)]
    rows = [[i, n, *(number(buffers[n].get(key)) for key in SELECTION)] for i, n in enumerate(ranked, start=1)]
    keys = ("num_transitions", "num_episodes", "mean_return", "std_return")
    files = []
    for name, found in scores["selections"].items():
        found = found if isinstance(found, dict) else {}
        parents = found.get("parents") if isinstance(found.get("parents"), list) else []
        names = ", ".join(str(parent.get("name")) for parent in parents if isinstance(parent, dict))
        files.append([join(name, tag("small", names)), *(number(found.get(key)) for key in keys)])
    drawn = [picture(p, f"{task}: {p.stem}", notices) for p in sorted(selection.path.parent.glob("*.png"))]
    return join(
        tag("h4", task), table(["rank", "buffer", *SELECTION.values()], rows),
        table(["written", "transitions", "episodes", "mean return", "std"], files, "numbers final") if files else "",
        folded("figures", tag("div", drawn, class_="pictures")) if drawn else "",
        folded("command (files without their folders)", tag("pre", command("udg_select", scores["flags"]))),
    )  # fmt: skip


def command(script, args):
    """The command line with every flag of a run, as recorded (the defaults of that day included)."""
    names, words = {"tasks": "task"}, ["python", f"{script}.py"]
    for key, value in args.items():
        flag = names.get(key, key).replace("_", "-")
        if key in ("resume", "track") or (key in ("buffers", "tasks", "quick") and not value):
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flat = value if isinstance(value, list) else [value]
            flat = itertools.chain.from_iterable(v if isinstance(v, list) else [v] for v in flat)
            words += [f"--{flag}", *(str(v) for v in flat)]
    return shlex.join(words)


def run_part(run):
    """Command, versions and flags of one run, folded."""
    versions = run.header.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    about = {"log": run.path, "commit": run.header.get("commit"), "device": run.header.get("device"), **versions}
    rows = [[k, text_of(v) if isinstance(v, str | int | list) else str(v)] for k, v in about.items()]
    flags = [[k, text_of(v)] for k, v in run.args.items()]
    state = "finished" if run.finished else "unfinished"
    line = tag("pre", command(run.script, run.args)) if run.args else tag("p", "flags unknown")
    title = f"{run.script}, {run.task}, {run.name}: {run.last_step} updates, {state}"
    return folded(title, line, table(["", "value"], rows, "flags"), table(["flag", "value"], flags, "flags"))


def figures_part(run, notices):
    """The figures that a learner drew itself; its learning curve stands above already."""
    skipped = (*GALLERY, "learning_curve.png") if run.script == "wurl_sac" else ("learning_curve.png",)
    shown = {n: p for n, p in run.pictures.items() if n not in skipped and n.endswith(".png")}
    drawn = [picture(p, f"{run.name}: {Path(n).stem}", notices) for n, p in shown.items()]
    return folded(f"{run.script}, {run.task}, {run.name}", tag("div", drawn, class_="pictures")) if drawn else Html("")
