"""Does UDG hold? Its experiments, limits and open questions as runnable studies (docs/udg.md).

    python benchmark/udg_study.py --list                          every study with its question and size
    python benchmark/udg_study.py --run angle-point --jobs 2      makes one; what is there already is skipped
    python benchmark/udg_study.py --run angle-point --budget gpu  the published sizes, for an accelerator
    python results/udg_figures.py                                 figures and tables from results/udg/*.jsonl

A study is a set of sources (runs of wurl_sac.py), tasks, picks (which buffers of which source
udg_select.py takes) and learners. Its cells are the commands below runs/study/<budget>/: sources/<source>,
data/<source>/<task>/..., learn/<task>/<pick>-<learner>. Cells that two studies share are made once. A cell is
done when its last file was written by the same command; a run that was stopped goes on from its state.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "udg"
sys.path.insert(0, str(ROOT))

from envs import buffers, curves  # noqa: E402  (the line above makes it importable from a plain clone)

ANGLES = (0, 60, 120, 180, 240, 300)
SUPERVISED = "--num-policies 1 --objective none --diversity-weight 0 --task-weight 1 --auto-alpha --lr-decay 0"
RANDOM = "--random --num-policies 1 --objective none"
POINT_RANDOM = f"--task point {RANDOM} --num-updates 30000 --eval-every 30000"
ROBOT_RANDOM = f"{RANDOM} --num-updates 40000 --eval-every 40000"  # 160k steps

# name of a source: flags of wurl_sac.py
SOURCES = {
    "point": "--task point",
    "point-s1": "--task point --seed 1",
    "point-s2": "--task point --seed 2",
    "point-k2": "--task point --num-policies 2",
    "point-k5": "--task point --num-policies 5",
    "point-k20": "--task point --num-policies 20",
    "point-pwd": "--task point --objective pwd --reward-scale 100",
    "point-diayn": "--task point --objective diayn",
    "point-dads": "--task point --objective dads --discriminator-lr 3e-4",
    "point-none": "--task point --objective none --diversity-weight 0",
    "point-random": POINT_RANDOM,
    "point-expert-0": f"--task point-angle-0 {SUPERVISED}",
    # What the bound speaks of is the distribution of the expert, not of its learning: fresh episodes.
    **{f"point-rho-{a}": f"--task point-angle-{a} {SUPERVISED} --collect rollouts" for a in ANGLES},
    "maze": "--task tree-maze",
    "maze-k4": "--task tree-maze --num-policies 4",
    "maze-k20": "--task tree-maze --num-policies 20",
    "maze-random": POINT_RANDOM.replace("point", "tree-maze"),
    "ant": "--task ant",
    "ant-random": f"--task ant {ROBOT_RANDOM}",
    "ant-expert-0": f"--task ant-angle-0 {SUPERVISED}",
    "cheetah": "--task cheetah",
    "cheetah-full": "--task cheetah --div-features full",
    "cheetah-k2": "--task cheetah --num-policies 2",
    "cheetah-k5": "--task cheetah --num-policies 5",
    # The speed is paid as a task, the height is left to diversity; the weights are three mixing ratios.
    **{f"cheetah-partial-{w}": f"--task cheetah-run --task-weight {w} --div-features 0" for w in (1, 3, 10)},
    "cheetah-random": f"--task cheetah {ROBOT_RANDOM}",
    "humanoid": "--task humanoid --num-policies 4",
}
# world: learner: script and flags, at CPU budget. Point worlds need small nets only.
SMALL = "--hidden-sizes 64 64 --num-updates 6000 --eval-every 1000"
POINT_MOPO = (
    f"mopo.py --preset cpu {SMALL} --chunk 1000 --model-hidden-sizes 64 64 --max-epochs 10 --rollout-batch 4000"
)
LEARNERS = {
    "point": {"mopo": POINT_MOPO, "knn": f"{POINT_MOPO} --model knn"},
    "ant": {"mopo": "mopo.py --preset cpu"},
    "cheetah": {"mopo": "mopo.py --preset cpu"},
}
# --budget gpu: the published sizes (specs of the papers); same studies, other folders.
GPU = {"ant": "--preset paper", "cheetah": "--preset paper", "humanoid": "--num-updates 1000000 --eval-every 50000"}
CPU = {"humanoid": "--num-updates 2000 --eval-every 1000"}
GPU_LEARNERS = {
    "point": {"mopo": "mopo.py --num-updates 50000", "knn": "mopo.py --num-updates 50000 --model knn"},
    "ant": {"mopo": "mopo.py --num-seeds 5"},
    "cheetah": {"mopo": "mopo.py --num-seeds 5"},
}
SIZE = {"cpu": {"point": 20_000, "ant": 50_000, "cheetah": 50_000}}
SIZE["gpu"] = {"point": 20_000, "ant": 150_000, "cheetah": 150_000}


@dataclass(frozen=True)
class Study:
    """A question and the cells that answer it; picks: label -> "source:top" or "source/policy:top"."""

    question: str
    tasks: tuple[str, ...] = ()
    picks: dict[str, str] | None = None
    learners: tuple[str, ...] = ("mopo",)
    seeds: int = 1
    sources: tuple[str, ...] = ()  # wanted for their own sake
    reference: bool = False  # W1 of every buffer to an expert's


POINT_TASKS = tuple(f"point-angle-{a}" for a in ANGLES)
TOPS = {"top1": "{0}:1", "top2": "{0}:2", "all": "{0}:all"}
MAZE_TASKS = tuple(f"tree-maze-end-{n}" for n in (1, 2, 3, 4))


def tops(source, **more):
    return {label: pick.format(source) for label, pick in TOPS.items()} | more


STUDIES = {
    "angle-point": Study(
        "Top 1, top 2 mixed, all mixed, supervised for 0 degrees, random: which buffer serves which direction?",
        POINT_TASKS, tops("point", supervised="point-expert-0:1", random="point-random:1"), seeds=3,
    ),
    "angle-ant": Study(
        "The same on the ant, at 0, 60 and 180 degrees.",
        ("ant-angle-0", "ant-angle-60", "ant-angle-180"),
        tops("ant", supervised="ant-expert-0:1", random="ant-random:1"),
    ),
    "cheetah": Study(
        "Diverse against random data; diversity on (v_x, z), on all 17 numbers, with a known part of the reward.",
        ("cheetah-jump", "cheetah-crawl"),
        {"top1": "cheetah:1", "full": "cheetah-full:1", "random": "cheetah-random:1",
         **{f"partial {w}": f"cheetah-partial-{w}:1" for w in (1, 3, 10)}},
    ),
    "how-many": Study(
        "How many policies? The worst direction and the mean over directions against K.",
        POINT_TASKS, {"K=2": "point-k2:1", "K=5": "point-k5:1", "K=10": "point:1", "K=20": "point-k20:1"}, seeds=3,
    ),
    "how-many-cheetah": Study(
        "How many policies, on cheetah-jump.",
        ("cheetah-jump",), {"K=2": "cheetah-k2:1", "K=5": "cheetah-k5:1", "K=10": "cheetah:1"},
    ),
    "bound": Study(
        "Does the distance to an expert's data, or the relabelled return, predict what a learner gets?",
        POINT_TASKS, {f"policy {k}": f"point/policy_{k:02d}:1" for k in range(10)}, ("mopo", "knn"), reference=True,
    ),
    "objectives": Study(
        "Which diversity? APWD, PWD, DIAYN-I, DADS-I, none: metrics, and the return of MOPO on the top 1.",
        POINT_TASKS,
        {"apwd": "point:1", "pwd": "point-pwd:1", "diayn": "point-diayn:1", "dads": "point-dads:1",
         "none": "point-none:1"}, seeds=3,
    ),
    "goal": Study(
        "A step reward, which breaks the Lipschitz assumption: does selection by return still help?",
        tuple(f"point-goal-{a}" for a in ANGLES), tops("point", random="point-random:1"), seeds=3,
    ),
    "maze": Study(
        "Walls: the reward is the distance to a dead end as the crow flies, which points the wrong way in places.",
        MAZE_TASKS, tops("maze", random="maze-random:1"), seeds=3,
    ),
    "collapse": Study(
        "As many policies as the maze has dead ends, and more: is the collapse seen?",
        sources=("maze-k4", "maze", "maze-k20"),
    ),
    "seeds": Study(
        "How much of all this is the luck of one run of wurl_sac.py?",
        POINT_TASKS, {"seed 0": "point:1", "seed 1": "point-s1:1", "seed 2": "point-s2:1"}, seeds=3,
    ),
    "humanoid": Study("wurl_sac.py on the humanoid: does it run, how fast, how diverse?", sources=("humanoid",)),
}  # fmt: skip


class Cell(NamedTuple):
    """A command, the file that it writes last, and the cells that must be done before."""

    name: str
    command: list[str]
    done: Path
    needs: tuple[str, ...]
    runs: Path | None = None  # the folder of a run, which goes on from its state


def world(name):
    """The world whose budget holds: point for the light ones."""
    return next((w for w in ("ant", "cheetah", "humanoid") if name.startswith(w)), "point")


def source_cell(base, source, budget):
    flags = SOURCES[source].split()
    if "--random" not in flags:
        flags += {"cpu": CPU, "gpu": GPU}[budget].get(world(source), "").split()
    num = int(flags[flags.index("--num-policies") + 1]) if "--num-policies" in flags else 10
    folder = base / "sources" / source
    command = ["wurl_sac.py", *flags, "--out", str(folder)]
    return Cell(f"source {source}", command, folder / "buffers" / f"policy_{num - 1:02d}.npz", (), folder)


def tasks_of(picked):
    """The tasks that any study selects for among these buffers: one command makes all their files."""
    users = [s for s in STUDIES.values() if s.picks and any(p.split(":")[0] == picked for p in s.picks.values())]
    return list(dict.fromkeys(task for study in users for task in study.tasks))


def data_cells(base, study, budget):
    """Cells of udg_select.py: one for each set of buffers; one for W1 to the expert and task where it is asked for."""
    cells = {}
    for picked in dict.fromkeys(pick.split(":")[0] for pick in study.picks.values()):
        source, _, policy = picked.partition("/")
        files = base / "sources" / source / "buffers" / (f"{policy}.npz" if policy else "")
        tops = ["1"] if policy or "--num-policies 1 " in f"{SOURCES[source]} " else ["1", "2", "all"]
        tasks, size, folder = tasks_of(picked), str(SIZE[budget][world(source)]), base / "data" / picked
        command = ["udg_select.py", "--buffers", str(files), "--task", *tasks, "--top", *tops, "--size", size]
        command += ["--w1-points", "0", "--overwrite", "--out", str(folder)]
        name, done = f"data {picked}", folder / tasks[-1] / "scores.json"
        cells[name] = Cell(name, command, done, (f"source {source}",))
    for task in study.tasks if study.reference else ():
        expert, folder = f"point-rho-{task.split('-')[-1]}", base / "data" / "reference"
        command = ["udg_select.py", "--buffers", str(base / "sources" / "point" / "buffers"), "--task", task]
        command += ["--reference", str(base / "sources" / expert / "buffers" / "policy_00.npz"), "--overwrite"]
        needs = ("source point", f"source {expert}")
        done = folder / task / "scores.json"
        cells[f"w1 {task}"] = Cell(f"w1 {task}", [*command, "--out", str(folder)], done, needs)
    return cells


def data_file(base, task, pick, budget):
    """The file that udg_select.py writes for a pick and task."""
    picked, top = pick.split(":")
    stem = "all" if top == "all" else f"top{top}"
    return base / "data" / picked / task / f"{stem}-size{SIZE[budget][world(task)]}.npz"


def learner_cell(base, study, task, pick, learner, budget):
    folder = base / "learn" / task / f"{pick.replace('/', '-').replace(':', '-')}-{learner}-seeds{study.seeds}"
    script, *flags = {"cpu": LEARNERS, "gpu": GPU_LEARNERS}[budget][world(task)][learner].split()
    if study.seeds > 1 and "--num-seeds" not in flags:
        flags += ["--num-seeds", str(study.seeds)]
    command = [script, "--dataset", str(data_file(base, task, pick, budget)), *flags, "--out", str(folder)]
    need = f"data {pick.split(':')[0]}"
    return Cell(f"learn {task} {pick} {learner}", command, folder / "learning_curve.png", (need,), folder)


def cells_of(name, base, budget):
    """Every cell of a study by name, each after what it needs, and its learners (task, label, pick, learner, cell)."""
    study = STUDIES[name]
    later = data_cells(base, study, budget) if study.picks else {}
    sources = [*study.sources, *(need.split()[1] for cell in later.values() for need in cell.needs)]
    cells = {f"source {s}": source_cell(base, s, budget) for s in dict.fromkeys(sources)} | later
    learning = [
        (task, label, pick, learner, learner_cell(base, study, task, pick, learner, budget))
        for label, pick in (study.picks or {}).items()
        for task in study.tasks
        for learner in study.learners
    ]
    return cells | {cell.name: cell for *_, cell in learning}, learning


def record_file(cell, base):
    """Where the command of a finished cell is kept, to see whether it is still the one that is asked for."""
    return base / "logs" / f"{cell.name.replace(' ', '_').replace('/', '-')}.json"


def is_done(cell, base):
    """Whether a cell was finished, by this very command."""
    record = record_file(cell, base)
    return cell.done.exists() and record.exists() and json.loads(record.read_text())["command"] == cell.command


def run_cell(cell, base, core):
    """Run one command to its end, its output in a log beside its record -> whether it worked."""
    record = record_file(cell, base)
    record.parent.mkdir(parents=True, exist_ok=True)
    resume = ["--resume"] if cell.runs and any(cell.runs.glob("**/state*.npz")) else []
    pin = (lambda: os.sched_setaffinity(0, {core})) if core is not None else None
    began = time.time()
    with open(record.with_suffix(".log"), "ab") as out:
        command = [sys.executable, *cell.command, *resume]
        code = subprocess.run(command, cwd=ROOT, stdout=out, stderr=out, preexec_fn=pin).returncode
    if code or not cell.done.exists():
        print(
            f"FAILED {cell.name}: exit {code}, see {record.with_suffix('.log')}\n  {portable(cell.command)}", flush=True
        )
        return False
    about = {"command": cell.command, "seconds": round(time.time() - began), "resumed": bool(resume)}
    record.write_text(json.dumps(about | {"commit": buffers.git_commit(), "versions": buffers.versions()}))
    return True


def run_cells(cells, base, jobs):
    """Run what is not done, `jobs` at once, each on a core of its own -> names of what failed."""
    done = {name for name, cell in cells.items() if is_done(cell, base)}
    waiting = {name: cell for name, cell in cells.items() if name not in done}
    failed, running, began, count = set(), {}, time.time(), len(waiting)
    cores = sorted(os.sched_getaffinity(0)) if jobs > 1 and hasattr(os, "sched_getaffinity") else None
    free, lock = list(range(jobs)), threading.Lock()

    def work(cell):
        with lock:
            slot = free.pop()
        worked = run_cell(cell, base, cores[slot % len(cores)] if cores else None)
        with lock:
            free.append(slot)
        return worked

    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            lost = [n for n, c in waiting.items() if failed & set(c.needs)]
            failed.update(lost)
            ready = [n for n, c in waiting.items() if n not in lost and done >= set(c.needs)]
            waiting = {n: c for n, c in waiting.items() if n not in lost and n not in ready[: jobs - len(running)]}
            running |= {pool.submit(work, cells[n]): n for n in ready[: jobs - len(running)]}
            ended, _ = wait(running, return_when=FIRST_COMPLETED) if running else ((), ())
            for future in ended:
                name = running.pop(future)
                (done if future.result() else failed).add(name)
                left, spent = len(waiting) + len(running), time.time() - began
                eta = spent / (count - left) * left
                print(f"[{count - left}/{count}]  {spent / 60:.1f} min, ETA {eta / 60:.1f} min  {name}", flush=True)
    return failed


def gather(name, base, budget):
    """results/udg/<study>.jsonl from finished cells: a header, a line per source, per learner and seed, per W1."""
    study, rows = STUDIES[name], []
    cells, learning = cells_of(name, base, budget)
    finished = [cell for cell in cells.values() if is_done(cell, base)]
    rows += [source_row(cell) for cell in finished if cell.name.startswith("source")]
    for cell in finished:
        if cell.name.startswith("w1"):
            found = json.loads(cell.done.read_text())
            features, pairs = (dict(zip(found["buffers"], values, strict=False)) for values in found["w1_to_reference"])
            rows.append({"task": found["task"], "w1": {"(s, a), standardised": pairs, "features": features}})
    for task, label, pick, learner, cell in learning:
        if cell in finished:
            about = {"task": task, "label": label, "pick": pick, "learner": learner}
            about |= data_row(data_file(base, task, pick, budget))
            rows += [{**about, **row} for row in learner_rows(cell.done.parent)]
    records = {cell.name: json.loads(record_file(cell, base).read_text()) for cell in finished}
    header = {"study": name, "question": study.question, "budget": budget, "seeds": study.seeds}
    header["missing"] = [name for name in cells if name not in records]
    header["cells"] = {name: {**record, "command": portable(record["command"])} for name, record in records.items()}
    path = RESULTS / (f"{name}.jsonl" if budget == "cpu" else f"{name}-{budget}.jsonl")
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(map(json.dumps, [header, *rows])) + "\n")
    print(f"{path.relative_to(ROOT)}: {len(rows)} rows; missing: {len(header['missing'])}", flush=True)


def source_row(cell):
    """The last numbers of a source and its smallest distances over time."""
    records = [json.loads(line) for line in (cell.runs / "log.jsonl").read_text().splitlines()[1:]]
    last = {k: v for k, v in (records[-1] if records else {}).items() if np.ndim(v) == 0}
    curve = lambda key: [[r["step"], r[key]] for r in records if key in r]
    curves_of = {"min_w": curve("eval/min_w"), "smallest_w": curve("eval/smallest_w")}
    return {"source": cell.name.split()[1], "last": last, **curves_of}


def data_row(data):
    """A selection: its mean return, the buffers chosen, the score of every buffer it could choose."""
    found = json.loads((data.parent / "scores.json").read_text())
    chosen = found["selections"][data.stem.split("-size")[0]]
    row = {"data_mean": chosen["mean_return"], "data_rows": chosen["num_transitions"]}
    row["chosen"] = [parent["name"] for parent in chosen["parents"]]
    return row | {"scores": {k: v["score"] for k, v in found["buffers"].items()}}


def learner_rows(folder):
    """The curves of a learner's run, one row for each seed."""
    short = curves.read(folder, "eval/return_data_length")
    for seed, (steps, values) in curves.read(folder, "eval/return").items():
        curve = {"returns": values.tolist(), "returns_data_length": short[seed][1].tolist()}
        yield {"seed": seed, "steps": steps.tolist(), **curve}


def portable(command):
    """A command with paths as from the repository's root."""
    return " ".join(["python", *command])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the studies")
    parser.add_argument("--run", nargs="+", default=[], metavar="NAME", help="studies to make, or all")
    parser.add_argument("--gather", nargs="+", default=[], metavar="NAME", help="only write results/udg")
    parser.add_argument("--commands", metavar="NAME", help="print a study's commands and run nothing")
    parser.add_argument("--budget", choices=("cpu", "gpu"), default="cpu", help="gpu: the published sizes")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, each pinned to a core")
    args = parser.parse_args()
    base = Path("runs") / "study" / args.budget
    names = list(STUDIES) if "all" in args.run + args.gather else args.run + args.gather + [args.commands or []][:1]
    names = [name for name in names if name]
    unknown = [name for name in names if name not in STUDIES]
    if unknown or args.jobs < 1:
        sys.exit(f"udg_study.py: error: {unknown or args.jobs}: studies are {', '.join(STUDIES)}; --jobs is 1 or more")
    os.chdir(ROOT)
    for name, study in STUDIES.items():
        cells, _ = cells_of(name, base, args.budget)
        if args.list:
            made = sum(is_done(cell, base) for cell in cells.values())
            print(f"{name:17} {made:3} of {len(cells):3} cells made  {study.question}")
        if args.commands == name:
            print(*(portable(cell.command) for cell in cells.values()), sep="\n")
    failed = set()
    for name in names:
        if name == args.commands:
            continue
        if name in args.run or "all" in args.run:
            failed |= run_cells(cells_of(name, base, args.budget)[0], base, args.jobs)
        gather(name, base, args.budget)
    if failed:
        sys.exit(f"failed or left out: {', '.join(sorted(failed))}")


if __name__ == "__main__":
    main()
