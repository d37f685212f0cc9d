"""Copy what is worth keeping of finished runs into results/: the log without local paths, and figures.

python benchmark/collect.py runs/wurl_sac/point/seed*      ->  results/wurl_sac/point/seed0.jsonl, seed0-*.png
python benchmark/collect.py --into results/suite/learners runs/suite-learners/*/*/seed0   (and a grid's table)
python benchmark/collect.py --into results/learners                                       (no run: the table anew)
"""

import argparse
import json
import shutil
from pathlib import Path

import grid
from runner import plots

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


def collect(run, into):
    """runs/<script>/<task>/<name> -> <into>/<script>/<task>/<name>.jsonl and <name>-<figure>.png"""
    if not (run / "policy.npz").exists():
        print(f"{run}: not finished, left out")
        return
    script, task, name = run.resolve().parts[-3:]
    folder = into / script / task
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text(portable_log(run))
    for figure in FIGURES:
        if (run / figure).exists():
            shutil.copy(run / figure, folder / f"{name}-{figure}")
    print(f"{run} -> {folder}/{name}.*")


def several_files(folder):
    """A warning for each data set whose logs are of different rows, as where one was made again on another machine."""
    known = {}
    for path in sorted([*folder.glob("*/*.jsonl"), *folder.glob("*/*/*.jsonl")]):
        with open(path) as lines:
            data = json.loads(next(lines, "{}")).get("data")  # old logs do not say
        if data:
            name, *log = path.relative_to(folder).parts
            known.setdefault(name, {}).setdefault((data["rows"], data["sha256"]), "/".join(log))
    for name, files in known.items():
        if len(files) > 1:
            told = ", ".join(f"{log} {rows:,} ({digest})" for (rows, digest), log in files.items())
            yield f"warning: {name}: the logs are of different rows, and do not compare: {told}"


def collect_grid(folder, into):
    """Table and figures as benchmark/grid.py has them, of every log under `into`: of this grid and of those before."""
    if (folder / "table.json").exists():
        tables = [json.loads(p.read_text()) for p in (into / "table.json", folder / "table.json") if p.exists()]
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
    arguments = parser.parse_args()
    for path in arguments.runs:
        collect(path, arguments.into)
    for above in {path.resolve().parents[2] for path in arguments.runs} or {arguments.into}:
        collect_grid(above, arguments.into)
