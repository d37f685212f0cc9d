"""Runs of one script, task and setting, whatever their seeds: one row of a table, one curve."""

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

from runner.report.markup import text_of

FREE = ("seed", "num_seeds", "out", "resume", "track")  # flags in which the seeds of one setting may differ
PATHS = ("dataset", "reference", "student")  # flags that name files: the same file may be named from elsewhere


@dataclass
class Group:
    """Runs that differ in their seeds only."""

    script: str
    task: str
    runs: list
    name: str = ""  # script and run name without its seed
    label: str = ""  # the same with a number where a task has several
    differs: str = ""

    def series(self, key):
        """{seed: {step: value}} over the runs."""
        return {seed: steps for run in self.runs for seed, steps in run.series.get(key, {}).items()}


def setting(run):
    """The flags that tell settings apart; files by their last three parts."""
    flags = {k: v for k, v in run.args.items() if k not in FREE}
    for key in PATHS:
        if key in flags:
            flags[key] = "/".join(Path(str(flags[key])).parts[-3:])
    return flags if run.args else {"path": str(run.path)}


def group_runs(runs, notices):
    """Runs of one script, task and setting -> one Group, every seed once."""
    groups, copies = {}, []
    for run in sorted(runs, key=lambda run: not run.finished):  # of two runs of a seed the finished one is pooled
        key = (run.script, run.task, json.dumps(setting(run), sort_keys=True))
        for copy in itertools.count():
            group = groups.setdefault((*key, copy), Group(run.script, run.task, []))
            same = any(other.digest == run.digest for other in group.runs) and bool(run.series)
            if same:
                copies.append(run.path)
                break
            if not any(run.seeds & other.seeds for other in group.runs):
                group.runs.append(run)
                break
        if copy and not same:
            notices.append((run.path, "has flags and seed of another run and other numbers: shown apart"))
    if copies:
        more = f" and {len(copies) - 1} more" if copies[1:] else ""
        notices.append((copies[0], f"{more} are copies of runs that are shown: counted once".strip()))
    found = list(groups.values())
    for group in found:
        commits = {str(run.header.get("commit")) for run in group.runs}
        if len(commits) > 1:
            notices.append((group.runs[0].path, f"and its other seeds come from {len(commits)} commits; see the runs"))
    name_groups(found)
    return found


def name_groups(groups):
    """Label: script and run name without its seed; beside it the flags in which groups of a task differ."""
    for home in dict.fromkeys((group.task, group.script) for group in groups):
        found, seen = [group for group in groups if (group.task, group.script) == home], {}
        flags = [setting(group.runs[0]) for group in found]
        keys = [k for k in dict.fromkeys(k for f in flags for k in f) if len({repr(f.get(k)) for f in flags}) > 1]
        for group, own in zip(found, flags, strict=True):
            shown = [f"{k}={text_of(own[k])}" for k in keys if k in own and k != "path"]
            group.differs = ", ".join(shown[:6]) + (", ..." if len(shown) > 6 else "")
            name = re.sub(r"[-_.]?seed\d+", "", group.runs[0].name).strip("-_./ ")
            group.name = f"{group.script} {name}".strip() if name != group.script else name
            seen[group.name] = seen.get(group.name, 0) + 1
            group.label = group.name if seen[group.name] == 1 else f"{group.name} ({seen[group.name]})"


def same_over_tasks(groups):
    """Settings over tasks: {(name, flags): {task: Group}}, flags those in which any task tells groups of a name apart.

    Other flags may differ from task to task, as presets do. The number in a label says nothing here: which group of a
    task is the second depends on what is there.
    """
    apart, found = {}, {}
    for key in dict.fromkeys((group.task, group.name) for group in groups):
        flags = [setting(group.runs[0]) for group in groups if (group.task, group.name) == key]
        told = (k for f in flags for k in f if len({repr(f.get(k)) for f in flags}) > 1)
        apart.setdefault(key[1], {}).update(dict.fromkeys(told))
    for group in groups:
        flags = {k: Path(v).stem if k in PATHS else v for k, v in setting(group.runs[0]).items()}
        told = ", ".join(f"{k}={text_of(flags[k])}" for k in apart[group.name] if k in flags and k != "path")
        found.setdefault((group.name, told), {}).setdefault(group.task, group)
    return found
