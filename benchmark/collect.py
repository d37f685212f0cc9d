"""Copy what is worth keeping of finished runs into results/: the log without local paths, and figures.

python benchmark/collect.py runs/wurl_sac/point/seed*      ->  results/wurl_sac/point/seed0.jsonl, seed0-*.png
python benchmark/collect.py --into results/suite/learners runs/suite-learners/*/*/seed0   (and a grid's table)
python benchmark/collect.py --into results/learners                                       (no run: the table anew)
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

import grid
from envs import InputError
from runner import plots
from runner.run import FREE

RESULTS = Path(__file__).resolve().parents[1] / "results"
FIGURES = (
    "trajectories.png", "distances.png", "learning_curve.png", "dynamics.png", "model.png", "penalty.png",
    "training.png",
    "bandit.png", "uncertainty.png", "distributions.png",
)  # fmt: skip


def portable_log(run):
    """The log of a run without the paths of this machine."""
    header, *records = (run / "log.jsonl").read_text().splitlines()
    header = json.loads(header)
    for field in ("out", "resume", "track"):
        header["args"].pop(field, None)
    for field in ("dataset", "reference"):
        if field in header["args"]:
            header["args"][field] = "/".join(Path(header["args"][field]).parts[-3:])
    return "\n".join([json.dumps(header), *records]) + "\n"


def other_run(run, path):
    """What tells the run whose log stands at `path` from this one: flags, rows; "" where it is the same, or nothing is
    there. A run that was made longer is the same."""
    if not path.exists():
        return ""
    (first, *records), (old_first, *old_records) = portable_log(run).splitlines(), path.read_text().splitlines() or "{"
    longer = old_records and records[: len(old_records)] == old_records
    try:
        new, old = json.loads(first), json.loads(old_first)
        flags = (new["args"].keys() & old["args"].keys()) - set(FREE) | {"dataset"} & new["args"].keys()
    except (ValueError, KeyError):
        return "what stands there is no log"
    differ = [name for name in sorted(flags) if new["args"][name] != old["args"].get(name)]
    differ = [name for name in differ if not (longer and name == "num_updates")]
    if new.get("data") != old.get("data"):
        differ += ["rows of the data" if old.get("data") else "the old one does not say its rows"]
    return ", ".join(differ)


def keep_logs(logs, force=False):
    """Copy the logs of runs {path: run}; InputError, and nothing copied, where one of another run stands at a path."""
    for path, run in () if force else logs.items():
        if differ := other_run(run, path):
            raise InputError(
                f"{path}: is of another run than {run} ({differ}); choose another folder, or remove it first"
            )
    for path, run in logs.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(portable_log(run))


def collect(runs, into, force=False):
    """runs/<script>/<task>/<name> -> <into>/<script>/<task>/<name>.jsonl and <name>-<figure>.png"""
    logs = {}
    for run in runs:
        if (run / "policy.npz").exists():
            logs[into.joinpath(*run.resolve().parts[-3:-1], f"{run.resolve().name}.jsonl")] = run
        else:
            print(f"{run}: not finished, left out")
    for folder in {run.resolve().parents[2] for run in logs.values()}:
        read_tables(folder, into)
    keep_logs(logs, force)
    for path, run in logs.items():
        for figure in FIGURES:
            if (run / figure).exists():
                shutil.copy(run / figure, path.with_name(f"{path.stem}-{figure}"))
        print(f"{run} -> {path.with_suffix('')}.*")


def several_files(folder):
    """A warning for each data set whose logs are of different rows, as where one was made again on another machine."""
    known = {}
    for path in sorted([*folder.glob("*/*.jsonl"), *folder.glob("*/*/*.jsonl")]):
        with open(path) as lines:
            data = json.loads(next(lines, "{}")).get("data")  # old logs do not say
        name, *log = path.relative_to(folder).parts
        rows = f"{data['rows']:,} ({data['sha256']})" if data else "does not say"
        known.setdefault(name, {}).setdefault(rows, "/".join(log))
    for name, files in known.items():
        if len(files) > 1:
            told = ", ".join(f"{log} {rows}" for rows, log in files.items())
            yield f"warning: {name}: the logs are not all of the same rows: {told}"


def read_tables(folder, into):
    """table.json of what was collected before and of a grid; InputError where they call different data by one name."""
    tables = [json.loads(p.read_text()) for p in (into / "table.json", folder / "table.json") if p.exists()]
    data = {name: returns for table in tables for name, returns in table["data"].items()}
    of_tables = [pair for table in tables for pair in table["data"].items()]
    other = [name for name, returns in of_tables if not np.allclose(returns, data[name])]
    if other:
        raise InputError(f"{folder}: {', '.join(other)} has other rows than in {into}; choose another --into")
    return tables


def collect_grid(folder, into):
    """Table and figures as benchmark/grid.py has them, of every log under `into`: of this grid and of those before."""
    if (folder / "table.json").exists():
        tables = read_tables(folder, into)
        algorithms = list(dict.fromkeys(name for table in tables for name in table["algorithms"]))
        data = {name: returns for table in tables for name, returns in table["data"].items()}
        found, short = {}, {}
        for path in sorted(into.glob("*/*/*.jsonl")):
            name, algorithm = path.parts[-3:-1]
            if name in data and algorithm in algorithms:
                for kept, key in ((found, "eval/return"), (short, "eval/return_data_length")):
                    if seeds := plots.read(path, key):
                        kept.setdefault(name, {}).setdefault(algorithm, {}).update(seeds)
        for warning in several_files(into):
            print(warning)
        grid.write_results(into, found, algorithms, data, short)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs")
    parser.add_argument("--into", type=Path, default=RESULTS, help="where they go")
    parser.add_argument("--force", action="store_true", help="replace logs of other runs")
    arguments = parser.parse_args()
    try:
        collect(arguments.runs, arguments.into, arguments.force)
        for above in {path.resolve().parents[2] for path in arguments.runs} or {arguments.into}:
            collect_grid(above, arguments.into)
    except InputError as error:
        raise SystemExit(f"collect.py: error: {error}") from None
