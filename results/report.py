"""One html page for any set of runs: curves, final tables, WURL's policies, UDG's choices, flags and versions.

    python results/report.py runs                                            everything below a folder
    python results/report.py runs/mopo/ant-angle-60/* results/wurl_sac/point --out ant.html

Reads folders of runs and of udg_select.py, and the committed results/**/*.jsonl; docs/report.md has the rest. The
page is one file that loads nothing, and its own policy forbids it to. Nothing is trained, drawn anew or changed here.
"""

import argparse
import base64
import hashlib
import html
import itertools
import json
import math
import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from envs.errors import InputError

SCRIPTS = ("wurl_sac", "udg_select", "mopo", "cped", "qdq", "dac")
FREE = ("seed", "num_seeds", "out", "resume", "track")  # flags in which the seeds of one setting may differ
PATHS = ("dataset", "reference", "student")  # flags that name files: the same file may be named from elsewhere
METRICS = {
    "eval/score": "normalised return",
    "eval/return": "return, whole evaluation episodes",
    "eval/return_data_length": "return, as long as the data's episodes",
    "eval/task_return": "return under the task's reward, mean over policies",
    "eval/min_w": "Wasserstein distance to the nearest other policy",
    "eval/disc_success": "success of a discriminator of the policies",
}
CURVES = (*METRICS, "eval/smallest_w", "eval/pair_mean_w", "eval/distinct_nearest")
GALLERY = {"trajectories.png": "where each policy goes", "distances.png": "distances between the policies"}
SELECTION = {
    "score": "return", "std": "std", "top_decile": "top 10 %", "per_step": "per step",
    "score_trained": "without warm-up", "episodes": "episodes",
}  # fmt: skip
LAST, RESAMPLES, MIN_SEEDS = 5, 2000, 3
MAX_PICTURE, MAX_POINTS = 12_000_000, 300  # bytes of an embedded file; points of a drawn line
MARK = "<!doctype html><!-- udg-jax report -->"


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
        """Updates at the last evaluation; other lines may count epochs of a model."""
        found = [max(steps) for key in self.series if key.startswith("eval/") for steps in self.series[key].values()]
        return max(found, default=0)


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


@dataclass
class Selection:
    """What udg_select.py left for one task."""

    path: Path
    scores: dict


# --- numbers ------------------------------------------------------------------------------------


def iqm(scores, axis=None):
    """Interquartile mean: the mean without the floor(n / 4) lowest and as many highest of n scores."""
    scores = np.sort(np.ravel(scores) if axis is None else scores, axis=axis)
    n = scores.shape[axis or 0]
    return np.take(scores, np.arange(n // 4, n - n // 4), axis=axis or 0).mean(axis or 0)


def bootstrap(strata, level=0.95):
    """Percentile interval of the IQM -> (low, high), or None where a stratum has fewer than 3 seeds.

    strata: one array of scores over seeds per task. Each of 2000 resamples draws, within every task, as many
    seeds as it has, with replacement. The draws are fixed, so that the same runs give the same page.
    """
    if min(map(len, strata)) < MIN_SEEDS:
        return None
    rng = np.random.default_rng(0)
    drawn = [np.asarray(s)[rng.integers(len(s), size=(RESAMPLES, len(s)))] for s in strata]
    values = iqm(np.concatenate(drawn, axis=1), axis=1)
    return tuple(np.quantile(values, [(1 - level) / 2, (1 + level) / 2]))


def final_scores(seeds):
    """{seed: {step: value}} -> per seed: mean of the last 5 evaluations, the last, the best; and the fewest counted."""
    rows = [np.array([steps[s] for s in sorted(steps)]) for steps in seeds.values()]
    last_five = np.array([row[-LAST:].mean() for row in rows])
    return last_five, np.array([row[-1] for row in rows]), np.array([row.max() for row in rows]), min(map(len, rows))


def spread(seeds):
    """-> steps that all seeds have (n,), mean (n,) and standard deviation (n,) over seeds."""
    steps = np.array(sorted(set.intersection(*(set(found) for found in seeds.values()))))
    values = np.array([[found[s] for s in steps.tolist()] for found in seeds.values()])
    return steps, values.mean(0), values.std(0)


# --- reading ------------------------------------------------------------------------------------


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
            elif "/" in key:
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
    selected = re.match(r"(all|top\d+)(-|$)", dataset.stem)  # a file of udg_select.py lies in its task's folder
    return script, str(args.get("task") or (dataset.parent.name if selected else dataset.stem) or "unknown task")


def read_run(log, notices):
    """One log.jsonl or committed <name>.jsonl -> Run, or None where it is no run's log."""
    records = parse_lines(log, notices)
    if not records:
        notices.append((log, "holds no line of a run. Remedy: start it again"))
        return None
    header = records[0][1] if "step" not in records[0][1] else {}
    if "study" in header:
        notices.append((log, "is a study, left out. Remedy: python results/udg_figures.py draws it"))
        return None
    if not isinstance(header.get("args"), dict):
        notices.append((log, "line 1: key 'args' is missing: flags and versions unknown. Remedy: restore the log"))
        header = {k: v for k, v in header.items() if k != "args"}
    args, home = header.get("args", {}), log.parent if log.name == "log.jsonl" else log
    seed = args.get("seed", 0) if type(args.get("seed", 0)) is int else 0
    series, per_policy = collect_series(log, records[1:] if header else records, seed, notices)
    script, task, name = place(home.resolve())
    guessed = guess(args)
    digest = hashlib.sha256(json.dumps([r for _, r in records[1:]]).encode()).hexdigest()
    run = Run(home, script or guessed[0], task or guessed[1], name, header, series, per_policy, digest)
    total = args.get("num_updates")
    run.finished = (log.parent / "policy.npz").is_file() or (isinstance(total, int) and run.last_step >= total)
    if not any(key.startswith("eval/") for key in series):
        notices.append((log, "has no evaluation yet: in no table. Remedy: wait, or lower --eval-every"))
    elif not run.finished:
        goal = f" of {total}" if isinstance(total, int) else ""
        notices.append((log, f"is unfinished: {run.last_step}{goal} updates. Remedy: go on with --resume"))
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


# --- grouping -----------------------------------------------------------------------------------


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


# --- html ---------------------------------------------------------------------------------------


class Html(str):
    """Text that is html already. Everything else is escaped by `tag`."""


def printable(text):
    """Control, direction and surrogate characters become a replacement character."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(text))


def tag(name, /, *parts, **attributes):
    """<name attributes>parts</name>; strings are escaped, Html is not; `class_` is the attribute class."""
    pairs = "".join(f' {k.rstrip("_").replace("_", "-")}="{html.escape(printable(v))}"' for k, v in attributes.items())
    if name in ("img", "meta"):
        return Html(f"<{name}{pairs}>")
    return Html(f"<{name}{pairs}>{join(*parts)}</{name}>")


def join(*parts):
    """Parts one after the other; lists are joined too."""
    flat = itertools.chain.from_iterable(p if isinstance(p, list | tuple) else [p] for p in parts)
    return Html("".join(p if isinstance(p, Html) else html.escape(printable(p)) for p in flat))


def text_of(value):
    """A flag's value as short text."""
    return value if isinstance(value, str) else json.dumps(value)


def number(value):
    """Four digits, and no exponent where none is needed."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "-" if value is None else text_of(value)
    if isinstance(value, int):
        return f"{value:,}"
    if 1e4 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:#.4g}".rstrip(".") if math.isfinite(value) else "not finite"


def table(head, rows, class_="numbers"):
    """A table that scrolls sideways where the page is narrow; a row of one cell is a heading over all columns."""
    cells = lambda name, row: tag("tr", [tag(name, cell) for cell in row])
    title = lambda row: tag("tr", tag("th", *row, colspan=len(head)))
    body = [cells("td", row) if len(row) > 1 else title(row) for row in rows]
    inner = tag("table", tag("thead", cells("th", head)), tag("tbody", body))
    return tag("div", inner, class_=f"wide {class_}", tabindex=0)


def folded(title, *parts):
    return tag("details", tag("summary", title), *parts)


def picture(path, caption, notices):
    """A png or gif as part of the page, or nothing and a notice."""
    kinds = {b"\x89PNG\r\n\x1a\n": "png", b"GIF87a": "gif", b"GIF89a": "gif"}
    try:
        data = path.read_bytes() if path.stat().st_size <= MAX_PICTURE else b""
        reason = "is empty, or larger than 12 MB. Remedy: draw it smaller"
    except OSError as error:
        data, reason = b"", f"cannot be read ({error.strerror}). Remedy: check its permissions"
    kind = next((name for magic, name in kinds.items() if data.startswith(magic)), "")
    if not kind:
        reason = "is neither png nor gif. Remedy: make it again" if data else reason
        notices.append((path, f"{reason}; left out"))
        return Html("")
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return tag("figure", tag("img", src=source, alt=caption), tag("figcaption", caption))


# --- curves -------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 290, 54, 12, 12, 34


def ticks(low, high, count=5):
    """About `count` round numbers (1, 2 or 5 times a power of ten) from low to high."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def tick_text(value):
    """20000 -> 20k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def limits(values, margin=0.0):
    """Lowest and highest finite value with a margin; never equal."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values) & (np.abs(values) < 1e300)]
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    pad = (high - low) * margin if high - low > 1e-9 * max(abs(low), abs(high), 1e-290) else max(abs(high), 1.0) * 0.5
    return float(low - pad), float(high + pad)


class Frame:
    """Data to places in a drawing."""

    def __init__(self, x, y):
        (self.x0, self.x1), (self.y0, self.y1) = limits(x), limits(y, 0.05)

    def point(self, x, y):
        across = LEFT + (x - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)

    def path(self, x, y, **attributes):
        """A line with gaps where y is not finite."""
        d, pen = [], "M"
        for a, b in zip(x, y, strict=True):
            if not (math.isfinite(b) and abs(b) < 1e300):
                pen = "M"
                continue
            across, down = self.point(a, b)
            d.append(f"{pen}{across:.1f} {down:.1f}")
            pen = "L"
        return tag("path", d=" ".join(d), **attributes) if d else Html("")

    def grid(self):
        """Lines and numbers of both axes."""
        lines, marks = [], []
        for value in ticks(self.y0, self.y1):
            down = self.point(self.x0, value)[1]
            lines.append(f"M{LEFT} {down:.1f}H{WIDTH - RIGHT}")
            marks.append(tag("text", tick_text(value), x=LEFT - 6, y=f"{down + 4:.1f}", text_anchor="end"))
        for value in ticks(self.x0, self.x1, 4):
            across = self.point(value, self.y0)[0]
            lines.append(f"M{across:.1f} {TOP}V{HEIGHT - BOTTOM}")
            place = dict(x=f"{across:.1f}", y=HEIGHT - BOTTOM + 18, text_anchor="middle")
            marks.append(tag("text", tick_text(value), **place))
        return tag("path", d=" ".join(lines), class_="grid"), *marks


def thin(count):
    """Indices of at most 300 points of a line, the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).round().astype(int))


def draw_curve(frame, style, label, seeds):
    """One setting: a thin line per seed, the mean, +- std shaded, and dots that tell their numbers."""
    parts = []
    for steps in seeds.values() if len(seeds) > 1 else ():
        x = np.array(sorted(steps))[thin(len(steps))]
        parts.append(frame.path(x, [steps[s] for s in x.tolist()], class_=f"{style} seed"))
    steps, mean, std = (values[thin(len(values))] if len(values) else values for values in spread(seeds))
    if len(seeds) > 1 and len(steps) and np.isfinite([mean - std, mean + std]).all():
        x, y = np.concatenate([steps, steps[::-1]]), np.concatenate([mean - std, (mean + std)[::-1]])
        parts.append(frame.path(x, y, class_=f"{style} band"))
    parts.append(frame.path(steps, mean, class_=f"{style} mean"))
    for s, m, d in zip(steps, mean, std, strict=True):
        if math.isfinite(m) and abs(m) < 1e300:
            across, down = frame.point(s, m)
            told = f"{label}, {s}: {number(float(m))}" + (f" \u00b1 {number(float(d))}" if len(seeds) > 1 else "")
            at = dict(cx=f"{across:.1f}", cy=f"{down:.1f}", r=2.5)
            parts.append(tag("circle", class_=f"{style} dot", data_text=told, **at))
    return parts


def chart(key, groups):
    """Curves of one key, all settings of a task."""
    found = [(f"c{i % 8} d{i // 8 % 3}", group, group.series(key)) for i, group in enumerate(groups)]
    found = [(style, group, seeds) for style, group, seeds in found if seeds]
    everything = [(s, v) for _, _, seeds in found for steps in seeds.values() for s, v in steps.items()]
    edges = [(s, e) for _, _, seeds in found for s, m, d in zip(*spread(seeds), strict=True) for e in (m - d, m + d)]
    frame = Frame([s for s, _ in everything], [v for _, v in everything + edges])
    drawn = [draw_curve(frame, style, group.label, seeds) for style, group, seeds in found]
    unit = "updates" if key.startswith(("eval/", "train/", "time/")) else "step as logged"
    name = tag("text", unit, x=WIDTH - RIGHT, y=HEIGHT - 2, text_anchor="end")
    view = dict(viewBox=f"0 0 {WIDTH} {HEIGHT}", class_="plot", role="img", aria_label=key)
    svg = tag("svg", *frame.grid(), name, *drawn, **view)
    counts = ((style, group, len(seeds)) for style, group, seeds in found)
    legend = [
        tag("span", tag("i", class_=f"{style} key"), f"{group.label} ({n} seed{'s' * (n > 1)})")
        for style, group, n in counts
    ]
    title = tag("b", key) if key not in METRICS else join(tag("b", METRICS[key]), " ", tag("code", key))
    return tag("figure", title, svg, tag("output", " "), tag("figcaption", legend), class_="curve")


# --- parts of the page --------------------------------------------------------------------------


def score_cells(seeds):
    """Cells of a final table: seeds, last-5 mean, IQM, interval, last, best."""
    scores, last, best, counted = final_scores(seeds)
    several = f" \u00b1 {number(float(scores.std()))}" if len(scores) > 1 else ""
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
    for key, title in METRICS.items():
        shown = [(group, group.series(key)) for group in groups if group.series(key)]
        rows += [[join(title, " ", tag("code", key))]] if shown else []
        for group, seeds in shown:
            behind = [run for run in group.runs if not run.finished]
            state = f"{len(behind)} unfinished" if behind else "finished"
            steps = [run.last_step for run in group.runs]
            state = f"{tick_text(min(steps))} updates, {state}"
            name = join(group.label, tag("small", group.differs) if group.differs else "")
            rows.append([name, *score_cells(seeds), state])
    head = ["setting", "seeds", "last-5 mean", "IQM", "95 % interval of the IQM", "last", "best", "state"]
    return table(head, rows, "numbers final") if rows else tag("p", "No evaluation yet.", class_="notice")


def task_section(task, groups):
    """Final table and curves of one task."""
    keys = list(dict.fromkeys(key for group in groups for run in group.runs for key in run.series))
    main = [key for key in CURVES if key in keys]
    rest = [key for key in sorted(keys) if key not in main and not key.endswith("_deg")]
    more = tag("div", [chart(key, groups) for key in rest], class_="charts")
    more = folded(f"more curves ({len(rest)})", more) if rest else ""
    shown = tag("div", [chart(key, groups) for key in main], class_="charts")
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


METHOD = """A row pools the runs of one script and task whose flags differ in the seed only. Score of a seed: the
mean of its last 5 evaluations; the last-5 mean is its mean over seeds, \u00b1 the standard deviation over seeds (n in
the denominator). IQM: the mean over seeds without the floor(n / 4) lowest and as many highest. Interval: 2000
bootstrap resamples of the seeds, within each task, 2.5 % and 97.5 % quantile of their IQM; none is given for fewer
than 3 seeds, and for fewer than about 10 it is too narrow. last, best: mean over seeds of the last and of the highest
evaluation. Curves: a thin line per seed, the mean over seeds where all have been evaluated, shaded \u00b1 one
standard deviation. A metric that is a list (one number per policy or member) is drawn as its mean."""

SCRIPT = """
for (const plot of document.querySelectorAll("svg.plot")) {
  const dots = [...plot.querySelectorAll("circle")], told = plot.parentNode.querySelector("output");
  const show = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(plot.getScreenCTM().inverse());
    const away = (dot) => Math.hypot(dot.cx.baseVal.value - at.x, dot.cy.baseVal.value - at.y);
    const near = dots.reduce((a, b) => (a && away(a) <= away(b) ? a : b), null);
    dots.forEach((dot) => dot.classList.toggle("near", dot === near));
    told.textContent = near ? near.dataset.text : "";
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
}
"""

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1b1f24; --soft: #59626d; --line: #d5dae0; --panel: #f5f7f9;
  --warn: #fff4d6; --c0: #1f6fb4; --c1: #c8501e; --c2: #23803f; --c3: #8a4fbf; --c4: #b0306a; --c5: #806500;
  --c6: #007680; --c7: #5a5a5a; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --text: #e4e7ea; --soft: #9aa4af; --line: #353b42;
  --panel: #1d2125; --warn: #3a3115; --c0: #6db3f2; --c1: #ff9d6b; --c2: #6fcf8b; --c3: #c49bf0; --c4: #f27fb2;
  --c5: #d9bb4a; --c6: #4fd0d9; --c7: #bbb; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 82rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1, h2, h3, h4, p, li, pre, small, summary, figcaption, figure b { overflow-wrap: anywhere; }
h1 { margin: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); } a { color: var(--c0); }
nav a { margin-right: 1em; display: inline-block; } code, pre { font: 13px/1.4 ui-monospace, monospace; }
pre { white-space: pre-wrap; background: var(--panel); padding: .7em; border-radius: 4px; margin: .5em 0; }
small { display: block; color: var(--soft); } .hint, .method, figcaption { color: var(--soft); font-size: 13px; }
.notice { background: var(--warn); padding: .6em 1em; border-radius: 4px; }
.notice ul { padding-left: 1.2em; margin: 0; }
.wide { overflow-x: auto; margin: .7em 0; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .7em; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; white-space: nowrap; } th[colspan] { color: var(--text); padding-top: 1em; }
.numbers td { white-space: nowrap; } td:first-child, th:first-child, .flags td, .flags th { text-align: left; }
.numbers.final td:first-child { white-space: normal; min-width: 11em; } .flags td { overflow-wrap: anywhere; }
.flags td:first-child { min-width: 9em; }
summary { cursor: pointer; padding: .3em 0; } figure { margin: 0; min-width: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1.2rem; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.pictures figure { flex: 0 1 36rem; }
.renders { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .7rem; margin: .7rem 0; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; display: block; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
output { display: block; min-height: 1.5em; font-size: 13px; }
figcaption span { margin-right: 1em; display: inline-block; }
.grid { stroke: var(--line); fill: none; } .mean { stroke-width: 2; fill: none; stroke: var(--c); }
.seed { stroke: var(--c); stroke-width: 1; fill: none; opacity: .45; } .band { fill: var(--c); opacity: .15; }
.dot { fill: var(--c); } .dot.near { stroke: var(--text); stroke-width: 2; } .d1 { stroke-dasharray: 7 3; }
.d2 { stroke-dasharray: 2 3; } .dot { stroke-dasharray: none; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 50%; background: var(--c); margin-right: .4em; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); } .c4 { --c: var(--c4); }
.c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
"""


def anchor(task):
    return "task-" + re.sub(r"[^a-z0-9]+", "-", task.lower())


def head():
    """The page's policy: no source but data in the page, and this script and style alone."""
    digest = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest(STYLE)}'; "
    policy += f"script-src 'sha256-{digest(SCRIPT)}'"
    return tag(
        "head", tag("meta", charset="utf-8"), tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"), tag("title", "udg-jax report"),
        tag("style", Html(STYLE)),
    )  # fmt: skip


def notice_list(notices):
    """What could not be shown, and what to do; each once."""
    items = [tag("li", tag("code", path), f" {text}") for path, text in dict.fromkeys(notices)]
    return tag("section", tag("ul", items), class_="notice", id="notices") if items else Html("")


def build_page(runs, selections, notices, line):
    """The whole page as text; adds to notices what turns up on the way."""
    groups = group_runs(runs, notices)
    tasks = sorted({group.task for group in groups})
    sections = [aggregate_section(groups)]
    sections += [task_section(task, [g for g in groups if g.task == task]) for task in tasks]
    shown = [run for group in groups for run in group.runs]
    galleries = [gallery(run, notices) for run in shown if run.script == "wurl_sac"]
    links = [tag("a", task, href=f"#{anchor(task)}") for task in tasks]
    if galleries:
        sections.append(tag("section", tag("h2", "WURL: the policies"), *galleries, id="policies"))
        links.append(tag("a", "policies", href="#policies"))
    if selections:
        sections.append(selection_section(selections, notices))
        links.append(tag("a", "selection", href="#selection"))
    drawn = [part for part in (figures_part(run, notices) for run in shown) if part]
    if drawn:
        sections.append(tag("section", tag("h2", "Figures of the learners"), *drawn, id="figures"))
        links.append(tag("a", "figures", href="#figures"))
    if shown:
        title = tag("h2", "Runs: commands, versions, flags")
        sections.append(tag("section", title, [run_part(run) for run in shown], id="runs"))
        links.append(tag("a", "runs", href="#runs"))
    counts = f"{len(shown)} runs, {len(groups)} settings, {len(tasks)} tasks, {len(selections)} selections"
    body = tag(
        "body", tag("h1", "udg-jax report"), tag("p", counts), tag("pre", line), tag("nav", *links),
        notice_list(notices), folded("How the numbers are made", tag("p", METHOD, class_="method")),
        *sections, tag("script", Html(SCRIPT)),
    )  # fmt: skip
    return f"{MARK}\n" + tag("html", head(), body, lang="en") + "\n"


def write_page(path, page):
    """Write the page whole or not at all; only a page of this script is written over."""
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"--out {path}: not a file in a folder that is there. Remedy: name one, such as report.html")
    try:
        if path.exists() and not path.read_bytes().startswith(MARK.encode()):
            raise InputError(f"--out {path}: is there and no page of this script. Remedy: choose another name")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({error.strerror}). Remedy: choose another place") from None


def main(argv):
    """Command line -> the page's path."""
    parser = argparse.ArgumentParser(prog="results/report.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("paths", nargs="+", help="folders of runs, of udg_select.py, or .jsonl files; any depth")
    parser.add_argument("--out", default="report.html", help="the page (default: report.html here)")
    args = parser.parse_args(argv)
    notices, out = [], Path(args.out)
    runs, selections = read_all(args.paths, notices)
    with np.errstate(all="ignore"):  # a diverged run has numbers that overflow; the page says so
        page = build_page(runs, selections, notices, shlex.join(["python", "results/report.py", *argv]))
    write_page(out, page)
    for path, text in dict.fromkeys(notices):
        print(printable(f"notice: {path} {text}"))
    print(f"{printable(out)}: {len(runs)} logs, {len(selections)} selections, {len(page) / 1e6:.1f} MB")
    return out


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"report.py: error: {error}")
