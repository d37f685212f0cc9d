"""Datasets x algorithms x seeds: makes what is not there, here or on Slurm, and gathers one table (docs/scale.md).

    python benchmark/grid.py benchmark/grid.json --jobs 2                   two runs at once on this machine
    python benchmark/grid.py benchmark/grid.json --list                     every run and whether it is done
    python benchmark/grid.py benchmark/grid.json --only "hopper* mopo"      a part of them
    python benchmark/grid.py benchmark/suite_short.json --jobs 2            the suite of docs/data.md, on a CPU
    python benchmark/grid.py benchmark/grid.json --cluster slurm --jobs 50 --slurm partition=gpu gres=gpu:1

The list is a JSON object: "datasets" {name: buffer file or glob}, "algorithms" {name: "mopo.py --preset cpu"}, "seeds"
[0, 1, 2], "out", the folder of the runs, <out>/<dataset>/<algorithm>/seed<k>, of table.md, table.json and a figure
<dataset>.png each, and, if some pairs are not wanted, "leave_out" ["antmaze-* mopo"]; paths as from the repository. A
run is done when its folder says so, made by the same command with the same flags from the same data. One that died goes
on from its state, at most --retries times. Ctrl-C leaves the runs that were started alone; the same command waits for
them again.
"""

import argparse
import contextlib
import fcntl
import fnmatch
import functools
import hashlib
import importlib
import itertools
import json
import os
import re
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cells import ROOT, Cell, args_of, flags_differ, flags_left, write_whole
from envs import InputError, buffers
from runner import devices, plots, state_files

ALGORITHMS = ("mopo.py", "benchmark/mopo_models.py", "cped.py", "qdq.py", "dac.py")
BUSY, BUSY_FOR = "another worker is making it now", 60.0  # seconds until it is asked for again
SHOWN_AS = {"bc": "cloning", "dac-bc": "cloning, sampled", "cped": "CPED", "qdq": "QDQ", "dac": "DAC", "mopo": "MOPO"}
CUT = "return, in as many steps as the data's episodes"


@dataclass(frozen=True)
class Run:
    """One cell: called in a worker, it trains in that very process, so that nothing of it outlives a kill."""

    name: str
    command: tuple[str, ...]  # script and flags but for --out and --resume
    data: str  # digest of the arrays in its data
    folder: str

    def record(self):
        return {"command": list(self.command), "data": self.data}

    def found(self):
        """ "done"; "" where nothing has ended in the folder; or what tells that which has from this run."""
        cell = Cell(
            self.name, [*self.command, "--out", self.folder], Path(self.folder, "done.json"), (), Path(self.folder)
        )
        try:
            made = json.loads(cell.done.read_text())
        except (OSError, ValueError):
            return ""
        if made != self.record():
            return "made by another command or from other data"
        left = flags_left(cell)  # a preset may have changed under the same words
        differ = flags_differ(cell, left) if left else []
        return f"made with another {', '.join(differ)}" if differ else "done"

    def __call__(self):
        """Train to the end -> "", or what no second try would mend."""
        folder, (script, *flags) = Path(self.folder), self.command
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "worker.json", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it goes with this process
            except BlockingIOError:
                return BUSY
            if self.found() == "done":  # by that other worker, meanwhile
                return ""
            file.truncate(0)
            file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
            file.flush()
            learner = importlib.import_module(Path(script).stem)
            resume = ["--resume"] if state_files(folder) else []
            try:
                args = args_of(learner, [*flags, "--out", str(folder), *resume])
                devices.begin(args, 1)
                learner.main(args)
            except InputError as error:
                return str(error)
            except SystemExit as end:  # flags that are refused, or a signal: then the state is saved
                if end.code == 2:
                    return "its flags are refused; the log says why"
                raise RuntimeError(end.code) from None
            write_whole(folder / "done.json", json.dumps(self.record()))
        return ""

    def checkpoint(self):
        """What submitit calls before a time limit or a preemption: the same again, which goes on from the state."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def digest(pattern):
    """What tells the arrays of a dataset from others: their sha256, from the metadata."""
    found = [buffers.load(file, (), quiet=True).metadata["sha256"] for file in buffers.find(pattern)]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def read_grid(path, only=(), there=False):
    """The list -> runs, folder of the table; InputError names what is wrong. only: patterns of "<dataset> <algorithm>",
    of which one must fit; data that no such pair has need not be there. there: only of data that are there."""
    try:
        found = json.loads(Path(path).read_text())
        datasets, algorithms, out = (found[key] for key in ("datasets", "algorithms", "out"))
        seeds, not_wanted = list(found["seeds"]), [str(pair) for pair in found.get("leave_out", [])]
        pairs = [(d, a) for d in datasets.items() for a in algorithms.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = 'an object of "datasets", "algorithms", "seeds" and "out", as benchmark/grid.json'
        raise InputError(f"{path}: {type(error).__name__}: {error}; write {remedy}") from None
    for name, command in algorithms.items():
        if not command.split() or command.split()[0] not in ALGORITHMS:
            raise InputError(f"{path}: algorithms: {name}: {command!r}; begin with one of {', '.join(ALGORITHMS)}")
    bad = [name for name in [*datasets, *algorithms] if not re.fullmatch(r"\w[\w.-]*", name)]
    if bad or not all(isinstance(seed, int) and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        told = "names are letters, digits, -, _ and ., begun by none of - and .; seeds whole numbers from 0, each once"
        raise InputError(f"{path}: {bad or seeds}: {told}")
    left_out = lambda pair: any(fnmatch.fnmatch(f"{pair[0][0]} {pair[1][0]}", x) for x in not_wanted)
    useless = [x for x in not_wanted if not any(fnmatch.fnmatch(f"{d} {a}", x) for d in datasets for a in algorithms)]
    if useless:
        raise InputError(f'{path}: leave_out: {useless}: no such pair; write "<dataset> <algorithm>", * for any')
    wanted = lambda pair: not only or any(fnmatch.fnmatch(f"{pair[0][0]} {pair[1][0]}", x) for x in only)
    pairs = [pair for pair in itertools.filterfalse(left_out, pairs) if wanted(pair)]
    if only and not pairs:
        raise InputError(f'--only {" ".join(only)}: no such pair in {path}; write "<dataset> <algorithm>", * for any')
    digests, runs = {}, []
    for name, file in dict(data for data, _ in pairs).items():
        with contextlib.suppress(*[InputError] * there):
            digests[name] = digest(file)
    for (data, file), (algorithm, command) in pairs if not there else (x for x in pairs if x[0][0] in digests):
        for seed in seeds:
            flags = (*command.split(), "--dataset", file, "--seed", str(seed))
            folder = Path(out).absolute() / data / algorithm / f"seed{seed}"
            runs.append(Run(f"{data} {algorithm} {seed}", flags, digests[data], str(folder)))
    return runs, Path(out)


def make_executor(args, out):
    """submitit: worker processes of this machine, or jobs of Slurm."""
    try:
        import submitit
    except ImportError:
        raise InputError("submitit is not installed; pip install submitit") from None
    executor = submitit.AutoExecutor(folder=out / "jobs" / "%j", cluster=args.cluster)
    executor.update_parameters(timeout_min=args.timeout_min, cpus_per_task=args.cpus)
    executor.update_parameters(**{f"slurm_{k}": v for k, v in (pair.split("=", 1) for pair in args.slurm)})
    return executor


def outcome(job):
    """A finished job -> "", what no second try would mend, or None where its process died."""
    try:
        return job.result()
    except Exception as error:  # killed, out of memory, a lost node, a bug: whatever ended it
        print(f"  job {job.job_id}: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}", flush=True)
        return None


def run_all(runs, args, out):
    """Keep `jobs` runs going until all are done or given up -> {name: why}."""
    waiting, running, tries, failed, busy = [], {}, {}, {}, {}
    for run in runs:
        found = run.found()
        if not found:
            waiting.append(run)
        elif found != "done":
            failed[run.name] = f"{found}: move {run.folder} away"
    print(f"{len(runs)} runs: {len(runs) - len(waiting) - len(failed)} done, {len(waiting)} to make", flush=True)
    executor = make_executor(args, out) if waiting else None
    while waiting or running:
        ready = [run for run in waiting if time.time() - busy.get(run, 0) > BUSY_FOR]
        while ready and len(running) < args.jobs:
            run = ready.pop(0)
            waiting.remove(run)
            tries[run.name] = tries.get(run.name, 0) + 1
            running[run] = executor.submit(run)
            print(f"started {run.name} (try {tries[run.name]}): {running[run].paths.stdout}", flush=True)
        time.sleep(args.poll)
        for run in [run for run, job in running.items() if job.done()]:
            wrong = outcome(running.pop(run))
            if wrong == BUSY:  # of another launcher, or of one that is gone
                tries[run.name] -= 1
                busy[run] = time.time()
            if wrong == BUSY or (wrong is None and tries[run.name] <= args.retries):
                waiting.append(run)
            elif wrong != "":
                failed[run.name] = wrong or f"died {tries[run.name]} times, see {out / 'jobs'}"
            told = "ended" if wrong == "" else "waiting for" if wrong == BUSY else "FAILED"
            print(f"{told} {run.name} {wrong or ''}", flush=True)
    return failed


def data_returns(runs):
    """{dataset: return of an episode of the data, mean and best}"""
    files = {run.name.split()[0]: run.command[run.command.index("--dataset") + 1] for run in runs}
    returns = {data: buffers.load(file, ("rewards",), quiet=True)["episode_returns"] for data, file in files.items()}
    return {data: (float(np.mean(x)), float(np.max(x))) for data, x in returns.items()}


def write_table(path, names, scores, data, short):
    """scores {(dataset, algorithm): [of a seed]} -> Markdown, in units of the return; short: where they differ, of
    episodes as long as the data's, a row of their own. The std is that of a sample (n - 1)."""
    spread = lambda x: f" +- {np.std(x, ddof=1):.1f}" if len(x) > 1 else ""
    cell = lambda x: f"{np.mean(x):.1f}{spread(x)} ({len(x)})" if x else "-"
    lines = [
        f"| return, mean +- std (seeds) | data: mean; best | {' | '.join(names)} |",
        "|---" * (2 + len(names)) + "|",
    ]
    for name, about in data.items():
        about = "{:.1f}; {:.1f}".format(*about)
        lines.append(f"| {name} | {about} | {' | '.join(cell(scores.get((name, a))) for a in names)} |")
        if any(short.get((name, a), x) != x for a in names if (x := scores.get((name, a)))):
            cells = " | ".join(cell(short.get((name, a))) for a in names)
            lines.append(f"| {name}, as long as the data's episodes | {about} | {cells} |")
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


def colours(algorithms):
    """Numbers of colours: the learners' are the same in all figures."""
    known = SHOWN_AS if set(algorithms) <= set(SHOWN_AS) else algorithms
    return {name: i for i, name in enumerate(known)}


def panel(title, seeds_of, data=(), ylabel="return", order=()):
    """Curves of one dataset: {algorithm: {seed: (steps, returns)}}, a thin line a seed, and their mean.

    order: of the algorithms of all panels, each with its colour.
    """
    lines, places = [], colours(order or seeds_of)
    for algorithm, seeds in seeds_of.items():
        i = places[algorithm]
        count = f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed"
        color = {"color": f"C{i % 10}", "ls": "-" if i < 10 else "--"}
        shown = color | {"marker": "o", "ms": 3, "label": f"{SHOWN_AS.get(algorithm, algorithm)} ({count})"}
        steps = functools.reduce(np.intersect1d, [steps for steps, _ in seeds.values()])
        values = np.stack([of_seed[np.isin(x, steps)] for x, of_seed in seeds.values()], 1)
        lines += [(steps, values, color | {"lw": 0.8, "alpha": 0.4})] * (len(seeds) > 1)
        lines += [(steps, values.mean(1), shown)]
    for value, style, name in zip(data, ("--", ":"), ("mean", "best"), strict=bool(data)):
        lines += [(None, value, {"color": "k", "ls": style, "lw": 1, "label": f"data: {name} episode"})]
    return {"title": title, "xlabel": "updates of the policy", "ylabel": ylabel, "lines": lines}


def write_results(out, found, algorithms, data, short=None):
    """table.md, table.json (a score is the mean of the last 5 evaluations) and <dataset>.png.

    found {dataset: {algorithm: {seed: (steps, returns)}}}; data {dataset: return of an episode, mean and best}; short:
    as found, of episodes as long as the data's.
    """
    score = lambda seeds: [float(np.mean(values[steps > 0][-5:])) for steps, values in seeds.values()]
    scores = {(d, a): score(seeds) for d, of_data in found.items() for a, seeds in of_data.items()}
    in_short = {pair: score(short[pair[0]][pair[1]]) for pair in scores} if short else {}
    as_data = lambda pair: {"returns_data_length": in_short[pair]} if short else {}
    rows = [{"dataset": p[0], "algorithm": p[1], "returns": x, **as_data(p)} for p, x in scores.items()]
    out.mkdir(parents=True, exist_ok=True)
    table = {"algorithms": algorithms, "data": data, "scores": rows}
    (out / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    write_table(out / "table.md", algorithms, scores, data, in_short)
    for name, seeds_of in found.items():
        cut = short and any(in_short[pair] != scores[pair] for pair in scores if pair[0] == name)
        shown = short[name] if cut else seeds_of  # as the data's episodes, whose mean and best are in the figure
        ylabel = CUT if cut else "return"
        curves = {a: shown[a] for a in algorithms if a in shown}
        plots.figure(out / f"{name}.png", [panel(name, curves, data[name], ylabel)], width=7.5)


def gather(runs, out):
    """Table and figures of what is done."""
    found, short = {}, {}  # a seed of two runs counts once
    for run in runs:
        if run.found() == "done":
            data, algorithm, _ = run.name.split()
            for kept, key in ((found, "eval/return"), (short, "eval/return_data_length")):
                seeds = kept.setdefault(data, {}).setdefault(algorithm, {})
                seeds |= plots.read(Path(run.folder), key)
    write_results(out, found, list(dict.fromkeys(run.name.split()[1] for run in runs)), data_returns(runs), short)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", help="the list, a JSON file")
    parser.add_argument("--list", action="store_true", help="show the runs and make nothing")
    parser.add_argument("--only", nargs="+", default=(), metavar="PATTERN", help='of "<dataset> <algorithm>"')
    parser.add_argument("--gather", action="store_true", help="only table and figures, of what is done")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--retries", type=int, default=2, help="how often a run that died is started again")
    parser.add_argument("--cluster", choices=("local", "slurm"), default="local", help="where the workers are")
    parser.add_argument("--timeout-min", type=int, default=7 * 24 * 60, help="minutes that one try may take")
    parser.add_argument("--cpus", type=int, default=2, help="cores of a Slurm job")
    parser.add_argument("--slurm", nargs="*", default=[], metavar="KEY=VALUE", help="of sbatch: partition=gpu ...")
    parser.add_argument("--poll", type=float, default=2.0, help="seconds between two looks at the workers")
    args = parser.parse_args(argv)
    if args.jobs < 1 or args.retries < 0 or not all("=" in pair for pair in args.slurm):
        parser.error("--jobs is 1 or more, --retries 0 or more, --slurm takes key=value")
    grid = Path(args.grid).absolute()
    os.chdir(ROOT)  # the list's paths are from here
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmark"), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        runs, out = read_grid(grid, args.only)
        if args.list:
            for run in runs:
                print(f"{run.found() or 'missing':7}", run.name, " ".join(run.command))
            return
        failed = {} if args.gather else run_all(runs, args, out)
        gather(read_grid(grid, there=True)[0] if args.only else runs, out)  # the table is of the whole list
    except InputError as error:
        sys.exit(f"grid.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("grid.py: stopped; runs that were started go on; the same command takes up the rest")
    if failed:
        sys.exit("\n".join(f"grid.py: {name}: {why}" for name, why in failed.items()))


if __name__ == "__main__":
    main()
