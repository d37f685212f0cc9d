"""Logs and selections of any folders -> Run, Selection; what cannot be read becomes a notice with a remedy."""

import hashlib
import itertools
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from envs.errors import InputError

SCRIPTS = ("wurl_sac", "udg_select", "mopo", "cped", "qdq", "dac")


@dataclass
class Run:
    """One log: series is {key: {seed: {step: value}}}, per_policy the lists of its last evaluation."""

    path: Path
    script: str
    task: str
    name: str
    header: dict
    series: dict
    per_policy: dict
    digest: str
    pictures: dict = field(default_factory=dict)
    finished: bool = False

    @property
    def args(self):
        return self.header.get("args", {})

    @property
    def seeds(self):
        return {seed for found in self.series.values() for seed in found}

    @property
    def last_step(self):
        """Updates at the last evaluation, or where data that name no task allow none, at the last record of training;
        other lines may count epochs of a model."""
        of = lambda kind: [max(x) for key, seeds in self.series.items() if key.startswith(kind) for x in seeds.values()]
        return max(of("eval/") or of("train/"), default=0)


@dataclass
class Selection:
    """What udg_select.py left for one task."""

    path: Path
    scores: dict


def parse_lines(path, notices):
    """The JSON objects of a file, one a line -> [(line number, object)]; what cannot be read goes to notices."""
    text = path.read_bytes().decode("utf-8", errors="replace")
    lines, found, bad = text.split("\n"), [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            found.append((number, record))
        else:
            bad.append(number)
    if bad and bad[-1] == len(lines):  # no newline behind it: the writer was cut off
        notices.append((path, f"line {bad.pop()}, the last one, is torn and left out. Remedy: go on with --resume"))
    if bad:
        which = ", ".join(map(str, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        notices.append((path, f"line {which}: no JSON object, left out. Remedy: restore the log"))
    return found


def is_list_of_numbers(value):
    """A list, of any depth, of numbers, which may be empty: logged for a figure of the script, and no curve."""
    number = lambda x: isinstance(x, int | float) and not isinstance(x, bool)
    return isinstance(value, list) and all(number(x) or is_list_of_numbers(x) for x in value)


def as_number(value):
    """A number, or the mean of a list of numbers -> float; None where it is neither."""
    values = value if isinstance(value, list) and value else [value]
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in values):
        return None
    try:
        return float(np.mean([float(x) for x in values]))
    except OverflowError:
        return None


def collect_series(path, records, first_seed, notices):
    """-> {key: {seed: {step: value}}}, {key: list of the last evaluation}."""
    series, per_policy, odd, infinite = {}, {}, {}, {}
    for number, record in records:
        step, seed = record.get("step"), record.get("seed", first_seed)
        if type(step) is not int or type(seed) is not int or not 0 <= step < 2**53:
            odd.setdefault("step" if type(seed) is int else "seed", number)
            continue
        for key, value in record.items():
            found = as_number(value) if "/" in key else None
            if found is not None:
                series.setdefault(key, {}).setdefault(seed, {})[step] = found
                if not math.isfinite(found):
                    infinite.setdefault(key, step)
            elif "/" in key and not is_list_of_numbers(value):
                odd.setdefault(key, number)
        lists = {k: v for k, v in record.items() if isinstance(v, list) and k.startswith("eval/")}
        per_policy = {k: v for k, v in lists.items() if k in series} or per_policy
    for key, number in odd.items():
        notices.append((path, f"line {number}: key '{key}' is not a number, left out. Remedy: restore the log"))
    for key, step in infinite.items():
        notices.append((path, f"key '{key}' is not finite at step {step}: the run diverged. Remedy: lower its rates"))
    return series, per_policy


def place(path):
    """.../<script>/<task>/<name> -> script, task, name; a task may have a slash; unknown parts are ''."""
    parts = path.with_suffix("").parts if path.suffix == ".jsonl" else path.parts
    for i in range(len(parts) - 3, -1, -1):
        if parts[i] in SCRIPTS:
            return parts[i], "/".join(parts[i + 1 : -1]), parts[-1]
    return "", "", "/".join(parts[-2:] if re.fullmatch(r"seed\d+", parts[-1]) else parts[-1:])


def guess(args):
    """-> script, task from the flags, for a folder of any name."""
    own = dict(num_policies="wurl_sac", rollout_freq="mopo", flow_updates="cped", student="qdq", q_target="dac")
    script = next((name for flag, name in own.items() if flag in args), "unknown script")
    dataset = Path(str(args.get("dataset", "")))
    selected = re.match(
        r"(all|transport|(top|episodes|rows)\d+)(-|$)", dataset.stem
    )  # a file of udg_select.py lies in its task's folder
    return script, str(args.get("task") or (dataset.parent.name if selected else dataset.stem) or "unknown task")


def read_run(log, notices):
    """One log.jsonl or committed <name>.jsonl -> Run, or None where it is no run's log."""
    records = parse_lines(log, notices)
    if not records:
        notices.append((log, "holds no line of a run. Remedy: start it again"))
        return None
    header = records[0][1] if "step" not in records[0][1] else {}
    if "study" in header:
        notices.append((log, "is a study, left out. Remedy: python benchmark/udg_figures.py draws it"))
        return None
    if "args" not in header and not any("step" in record for _, record in records):
        notices.append((log, "is no log of a run, left out. Remedy: name the folders of runs alone"))
        return None
    if not isinstance(header.get("args"), dict):
        notices.append((log, "line 1: key 'args' is missing: flags and versions unknown. Remedy: restore the log"))
        header = {k: v for k, v in header.items() if k != "args"}
    args, home = header.get("args", {}), log.parent if log.name == "log.jsonl" else log
    seed = args.get("seed", 0) if type(args.get("seed", 0)) is int else 0
    series, per_policy = collect_series(log, records[1:] if header else records, seed, notices)
    script, task, name = place(home.resolve())
    guessed = guess(args)
    told = lambda key: header[key] if isinstance(header.get(key), str) else ""  # logs of 0.1 do not say
    digest = hashlib.sha256(json.dumps([r for _, r in records[1:]]).encode()).hexdigest()
    script, task = told("script") or script or guessed[0], told("task") or task or guessed[1]
    run = Run(home, script, task, name, header, series, per_policy, digest)
    total = args.get("num_updates")
    run.finished = run.last_step >= total if isinstance(total, int) else (log.parent / "policy.npz").is_file()
    kinds = {key.split("/")[0] for key in series}
    if not kinds & {"eval", "train"}:
        notices.append((log, "has no evaluation yet: in no table. Remedy: wait, or lower --eval-every"))
    elif not run.finished:
        goal = f" of {total}" if isinstance(total, int) else ""
        notices.append((log, f"is unfinished: {run.last_step}{goal} updates. Remedy: go on with --resume"))
    elif "eval" not in kinds:
        notices.append(
            (log, "was not evaluated, as its data name no task: in no table. Remedy: train on data that name one")
        )
    run.pictures = find_pictures(log)
    return run


def find_pictures(log):
    """{name: path} of a run's pngs and gifs; beside a committed log <name>-*.png of no longer name."""
    if log.name == "log.jsonl":
        found = sorted(log.parent.glob("*.png")) + sorted(log.parent.glob("render/*.gif"))
        return {path.name: path for path in found}
    stems = [other.stem for other in log.parent.glob("*.jsonl")]
    owner = lambda path: max((s for s in stems if path.name.startswith(f"{s}-")), key=len, default="")
    found = sorted(p for p in log.parent.iterdir() if p.suffix in (".png", ".gif") and owner(p) == log.stem)
    return {path.name[len(log.stem) + 1 :]: path for path in found}


def read_selection(path, notices):
    """One scores.json -> Selection, or None."""
    try:
        scores = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError):
        scores = None
    scores = scores if isinstance(scores, dict) else {}
    kinds = {"buffers": dict, "ranking": list, "selections": dict, "flags": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(scores.get(key), kind)]
    if wrong:
        notices.append((path, f"key '{wrong[0]}' is not as udg_select.py writes it. Remedy: run it again"))
        return None
    return Selection(path, scores)


def find_files(path, notices):
    """Logs and scores.json below a path, in order; folders that were begun and have no log go to notices."""
    if path.is_file():
        if path.suffix != ".jsonl" and path.name != "scores.json":
            raise InputError(f"{path}: neither a folder nor a .jsonl or scores.json. Remedy: name the run's folder")
        return [path]
    if not path.is_dir():
        raise InputError(f"{path}: not there. Remedy: name folders of runs, such as runs/mopo/ant-angle-60/seed0")
    found = []
    for folder, folders, files in os.walk(path):
        folders.sort()
        found += [Path(folder) / f for f in sorted(files) if f.endswith(".jsonl") or f == "scores.json"]
        if "args.json" in files and "log.jsonl" not in files:
            notices.append((Path(folder), "has no log.jsonl: the run has not begun. Remedy: start it again"))
    if not found:
        notices.append((path, "holds no log.jsonl, *.jsonl or scores.json. Remedy: name a folder of runs"))
    return found


def read_all(paths, notices):
    """-> runs, selections."""
    files = list(itertools.chain.from_iterable(find_files(Path(path), notices) for path in paths))
    runs, selections = [], []
    for path in {file.resolve(): file for file in files}.values():
        reader, kept = (read_selection, selections) if path.name == "scores.json" else (read_run, runs)
        try:
            found = reader(path, notices)
        except OSError as error:
            notices.append((path, f"cannot be read ({error.strerror}). Remedy: check its permissions"))
            continue
        if found:
            kept.append(found)
    if not runs and not selections:
        told = "".join(f"\n  {path}: {text}" for path, text in notices)
        raise InputError(f"{' '.join(map(str, paths))}: no run to show. Remedy: name a folder of runs{told}")
    return runs, selections
