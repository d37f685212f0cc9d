"""Does UDG hold? Its experiments, limits and open questions as runnable studies (docs/udg.md).

    python benchmark/udg_study.py --list                          every study with its question and size
    python benchmark/udg_study.py --run angle-point --jobs 2      makes one; what is there already is skipped
    python benchmark/udg_study.py --run angle-point --budget gpu  the published sizes, for an accelerator
    python benchmark/udg_study.py --run bound --keep              leaves out what results/udg/bound.jsonl has
    python benchmark/udg_study.py --run bound --keep old          ... what it has of older settings, too, and names it
    python benchmark/udg_figures.py                               figures and tables from results/udg/*.jsonl

A study is a set of sources (runs of wurl_sac.py), tasks, picks (which buffers of which source
udg_select.py takes) and learners. Its cells (cells.py) are the commands below runs/study/<budget>/: sources/<source>,
data/<source>/<task>/..., learn/<task>/<pick>-<learner>. Cells that two studies share are made once. With --keep, rows
of results/udg/<study>.jsonl stand for cells that are not here, if they are of the same command and flags and the same
rows of data; with --keep old also where a preset or default has changed since, or where the file does not tell flags.
"""

import argparse
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cells import (
    ROOT,
    Cell,
    adopt,
    fingerprint,
    finished_cells,
    flags_differ,
    flags_left,
    is_done,
    made_by,
    portable,
    read_record,
    run_cells,
    write_whole,
)
from envs import task as make_task
from runner import plots

RESULTS = ROOT / "results" / "udg"
ANGLES = (0, 60, 120, 180, 240, 300)
SUPERVISED = "--num-policies 1 --objective none --diversity-weight 0 --task-weight 1 --auto-alpha --lr-decay 0"
RANDOM = "--random --num-policies 1 --objective none"
POINT_RANDOM = f"--task point {RANDOM} --num-updates 30000 --eval-every 30000"
ROBOT_RANDOM = f"{RANDOM} --num-updates 40000 --eval-every 40000"  # 160k steps

# The paper's pay, with which these studies were run: the ant has a preset of its own since then.
APWD = "--num-envs 2 --nearest total --own-weight 0 --reward-size 0 --no-auto-alpha"

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
    "point-dads": "--task point --objective dads",
    "point-metra": "--task point --objective metra",
    "point-none": "--task point --objective none --diversity-weight 0",
    "point-random": POINT_RANDOM,
    "point-expert-0": f"--task point-angle-0 {SUPERVISED}",
    # What the bound speaks of is the distribution of the expert, not of its learning: fresh episodes.
    **{f"point-rho-{a}": f"--task point-angle-{a} {SUPERVISED} --collect rollouts" for a in ANGLES},
    "maze": "--task tree-maze",
    "maze-k4": "--task tree-maze --num-policies 4",
    "maze-k20": "--task tree-maze --num-policies 20",
    "maze-random": POINT_RANDOM.replace("point", "tree-maze"),
    "ant": f"--task ant {APWD}",
    "ant-main": "--task ant",  # the main job
    "ant-one": "--task ant --num-devices 1",  # the same on one device: another run
    "ant-paper": "--task ant --preset paper --num-devices 2",  # as long as published
    "ant-random": f"--task ant {ROBOT_RANDOM}",
    "ant-expert-0": f"--task ant-angle-0 {SUPERVISED}",
    "ant-rho-60": f"--task ant-angle-60 {SUPERVISED} --collect rollouts",
    "cheetah": "--task cheetah",
    **{f"cheetah-k{k}": f"--task cheetah --num-policies {k}" for k in (2, 5, 10, 20)},
    # Variants of cheetah-k5 (their number is not the question). Diversity in (v_x, z); in all 17 numbers;
    "cheetah-pair": "--task cheetah --num-policies 5 --div-features task --feature-scales 1 10 --reward-scale 2",
    "cheetah-full": "--task cheetah --num-policies 5 --div-features full --reward-scale 0.5",
    # the speed paid as a task and the height left to diversity, the weights being three mixing ratios.
    **{f"cheetah-partial-{w}": f"--task cheetah-run --num-policies 5 --task-weight {w}" for w in (1, 3, 10)},
    "cheetah-random": f"--task cheetah {ROBOT_RANDOM}",
    "humanoid": "--task humanoid",
}
# world: learner: script and flags, at CPU budget. Point worlds need small nets only.
SMALL = "--hidden-sizes 64 64 --num-updates 6000 --eval-every 1000"
POINT_MOPO = (
    f"mopo.py --preset cpu {SMALL} --chunk 1000 --model-hidden-sizes 64 64 --max-epochs 10 --rollout-batch 4000"
)
# A step reward comes back through some fifty steps of bootstrapping: at 6000 updates a third still stand at 0.
GOAL_MOPO = POINT_MOPO.replace("--num-updates 6000 --eval-every 1000", "--num-updates 20000 --eval-every 2000")
FAST = "--hidden-sizes 64 64 --actor-lr 1e-3 --critic-lr 1e-3"
POINT_KNN = POINT_MOPO.replace("mopo.py", "benchmark/mopo_models.py") + " --model knn"
POINT_CPED = (
    f"cped.py --preset cpu {FAST} --flow-updates 5000 --num-updates 6000 --eval-every 1000 --chunk 500 "
    "--flow-hidden-sizes 64 64 --flow-lr 1e-3 --disc-lr 1e-3"
)
POINT_QDQ = (
    f"qdq.py --preset cpu {FAST} --teacher-updates 4000 --student-updates 4000 --num-updates 6000 --eval-every 1000 "
    "--chunk 500 --model-hidden-sizes 64 64 --teacher-lr 1e-3 --student-lr 1e-3 --batch-size 128 --gamma-ent 0.1"
)
POINT_DAC = (
    f"dac.py --preset cpu {FAST} --num-updates 3000 --eval-every 500 --chunk 250 --num-critics 5 --num-q-samples 1 "
    "--batch-size 128"
)
ROBOT = {
    "mopo": "mopo.py --preset cpu",
    "mopo-long": "mopo.py --preset cpu --max-model-steps 40000",  # mixed files gain by it (docs/mopo.md)
    **{f"mopo-lam{lam}": f"mopo.py --preset cpu --lam {lam}" for lam in (0, 0.1, 1)},  # the preset's is 0.3
    "cped": "cped.py --preset cpu",
    "qdq": "qdq.py --preset cpu --teacher-updates 20000 --student-updates 20000",
    "dac": "dac.py --preset cpu",
    "bc": "cped.py --preset cpu --bc-only",
}
LEARNERS = {
    "point": {
        "mopo": POINT_MOPO, "knn": POINT_KNN, "cped": POINT_CPED, "qdq": POINT_QDQ,
        "dac": POINT_DAC, "bc": f"{POINT_CPED} --bc-only",
    },
    "point-goal": {"mopo": GOAL_MOPO},
    "ant": ROBOT,
    "cheetah": ROBOT,
}  # fmt: skip
# --budget gpu: the published sizes (specs of the papers); same studies, other folders.
# An untrained humanoid falls within 30 steps: many short episodes a round, or it learns from next to nothing.
SHORT_EPISODES = "--episode-length 200 --num-envs 8 --updates-per-step 0.03125 --chunk 50"
GPU = {
    "ant": "--preset paper", "cheetah": "--preset paper",
    "humanoid": "--num-envs 8 --updates-per-step 0.0625 --num-updates 1000000 --eval-every 50000",
    "ant-main": "", "ant-one": "", "ant-paper": "",  # as they are
}  # fmt: skip
CPU = {"ant-main": "--num-devices 2"}  # as on two cores, also where a cell is kept to one
CPU |= {"humanoid": f"--num-policies 4 {SHORT_EPISODES} --num-updates 4000 --eval-every 1000"}
# Nine runs of the cheetah are compared with one another: a third of the default's 36,000 updates each.
CPU |= {name: "--num-updates 12000" for name in SOURCES if name.startswith("cheetah-")}
GPU_ROBOT = {
    **dict.fromkeys(("mopo", "mopo-long"), "mopo.py --num-seeds 5"),
    **{f"mopo-lam{lam}": f"mopo.py --num-seeds 5 --lam {lam}" for lam in (0, 0.1, 1)},
    "cped": "cped.py --num-seeds 5",
    "qdq": "qdq.py --num-seeds 5",
    "dac": "dac.py --num-seeds 5 --chunk 1000",
    "bc": "cped.py --num-seeds 5 --bc-only",
}
GPU_LEARNERS = {
    "point": {"mopo": "mopo.py --num-updates 50000", "knn": "benchmark/mopo_models.py --num-updates 50000 --model knn"}
    | {name: LEARNERS["point"][name] for name in ("cped", "qdq", "dac", "bc")},
    "ant": GPU_ROBOT,
    "cheetah": GPU_ROBOT,
}
GPU_LEARNERS["point-goal"] = GPU_LEARNERS["point"]
SIZE = {"cpu": {"point": 20_000, "ant": 50_000, "cheetah": 50_000}}
SIZE["gpu"] = {"point": 20_000, "ant": 150_000, "cheetah": 150_000}
WHOLE = {"cpu": 146_000, "gpu": 200_000}  # whole episodes that one buffer of the main job holds, and best in full


@dataclass(frozen=True)
class Study:
    """A question and the cells that answer it; picks: label -> "source:top" or "source/policy:top".

    top: what --top takes, or best (the best episodes of all buffers); cut to SIZE, with @146000 to so many rows, with
    @full not at all. After a comma stands an option of the task: "ant:1@146000,survive_bonus=1".
    """

    question: str
    tasks: tuple[str, ...] = ()
    picks: dict[str, str] | None = None
    learners: tuple[str, ...] = ("mopo",)
    seeds: int = 1
    sources: tuple[str, ...] = ()  # wanted for their own sake
    reference: str = ""  # a world: W1 of each of its buffers to the expert's of each task


POINT_TASKS = tuple(f"point-angle-{a}" for a in ANGLES)
TOPS = {"top1": "{0}:1", "top2": "{0}:2", "all": "{0}:all"}
SELECTIONS = {"top1": "1", "best": "best", "top2": "2", "all": "all"}  # shares by transport: all of top 1 there
ALL_LEARNERS = ("mopo", "cped", "qdq", "dac", "bc")
ANT_TASKS = ("ant-angle-0", "ant-angle-60", "ant-angle-180")
# As many rows as one buffer of the main job holds, in whole episodes, whatever the file is made of.
LARGE = {
    "top1": "ant-main:1@146000", "top2": "ant-main:2@146000", "all": "ant-main:all@146000",
    "best": "ant-main:best@146000", "supervised": "ant-expert-0:1@146000", "random": "ant-random:1@146000",
}  # fmt: skip
CHEETAH_LEARNERS = ("cped", "dac")  # made before mopo.py saw the pitch as sine and cosine
MAZE_TASKS = tuple(f"tree-maze-end-{n}" for n in (1, 2, 3, 4))


def tops(source, **more):
    return {label: pick.format(source) for label, pick in TOPS.items()} | more


def large(*labels, option=""):
    return {label: LARGE[label] + option for label in labels}


STUDIES = {
    "angle-point": Study(
        "Top 1, top 2 mixed, all mixed, supervised for 0 degrees, random: which buffer serves which direction?",
        POINT_TASKS, tops("point", supervised="point-expert-0:1", random="point-random:1"), seeds=3,
    ),
    "angle-ant": Study(
        "The ant at 0, 60 and 180 degrees: which buffer serves which direction?",
        ANT_TASKS, tops("ant", supervised="ant-expert-0:1", random="ant-random:1"),
    ),
    "ant-large": Study(
        "The main job's ant, 146,000 rows: top 1, all mixed, random, three seeds.",
        ANT_TASKS, large("top1", "all", "random"), ("mopo-long",), seeds=3,
    ),
    "ant-large-files": Study(
        "The main job's ant, 146,000 rows: two mixed, the best episodes, supervised for 0 degrees.",
        ANT_TASKS, large("top2", "best", "supervised"), ("mopo-long",),
    ),
    "ant-large-learners": Study(
        "The main job's ant, 146,000 rows: a learner without a model, and cloning.",
        ANT_TASKS, large(*LARGE), ("dac", "bc"),
    ),
    "ant-large-bonus": Study(
        "The main job's ant, 146,000 rows, 1 more for every step: does the published order hold?",
        ("ant-angle-60",), large("top1", "top2", "all", option=",survive_bonus=1"), ("mopo-long",),
    ),
    "ant-paper": Study(
        "The ant from a source of the published length, 146,000 rows: is it worth more than more updates?",
        ("ant-angle-60",), {"top1": "ant-paper:1@146000", "all": "ant-paper:all@146000"}, ("mopo-long", "dac"),
    ),
    "learners-point": Study(
        "Does UDG carry over to model-free offline RL? Five learners on the same buffers.",
        ("point-angle-60", "point-angle-180"), tops("point", random="point-random:1"), ALL_LEARNERS, seeds=3,
    ),
    "learners-ant": Study(
        "Four learners on the same buffers of the ant.",
        ("ant-angle-60",), {"top1": "ant:1", "all": "ant:all", "random": "ant-random:1"}, ALL_LEARNERS,
    ),
    "learners-cheetah": Study(
        "Four learners on the same buffers of the cheetah.",
        ("cheetah-jump",), {"top1": "cheetah:1", "all": "cheetah:all", "random": "cheetah-random:1"}, ALL_LEARNERS,
    ),
    "cheetah": Study(
        "Diverse against random data; diversity on z, on (v_x, z), on all 17 numbers.",
        ("cheetah-jump", "cheetah-crawl"),
        {"z": "cheetah-k5:1", "(v_x, z)": "cheetah-pair:1", "all 17": "cheetah-full:1", "random": "cheetah-random:1"},
        CHEETAH_LEARNERS,
    ),
    "cheetah-partial": Study(
        "A part of the reward is known, the speed: pay it as a task, leave the height to diversity, in three ratios.",
        ("cheetah-jump",),
        {"weight 0": "cheetah-k5:1", **{f"weight {w}": f"cheetah-partial-{w}:1" for w in (1, 3, 10)}},
        CHEETAH_LEARNERS,
    ),
    "how-many": Study(
        "How many policies? The worst direction and the mean over directions against K.",
        POINT_TASKS, {"K=2": "point-k2:1", "K=5": "point-k5:1", "K=10": "point:1", "K=20": "point-k20:1"}, seeds=3,
    ),
    "how-many-cheetah": Study(
        "How many policies, on cheetah-jump.",
        ("cheetah-jump",),
        {"K=2": "cheetah-k2:1", "K=5": "cheetah-k5:1", "K=10": "cheetah-k10:1", "K=20": "cheetah-k20:1"},
        CHEETAH_LEARNERS,
    ),
    "bound": Study(
        "Does the distance to an expert's data, or the relabelled return, predict what a learner gets?",
        POINT_TASKS, {f"policy {k}": f"point/policy_{k:02d}:1" for k in range(10)}, ("mopo", "knn"), seeds=3,
        reference="point",
    ),
    "bound-ant": Study(
        "On the ant, at 60 degrees: does distance, or the relabelled return, predict what MOPO gets?",
        ("ant-angle-60",), {f"policy {k}": f"ant/policy_{k:02d}:1" for k in range(10)}, reference="ant",
    ),
    "objectives": Study(
        "Which diversity? APWD, PWD, DIAYN-I, DADS-I, METRA, none: metrics, and the return of MOPO on the top 1.",
        POINT_TASKS,
        {"apwd": "point:1", "pwd": "point-pwd:1", "diayn": "point-diayn:1", "dads": "point-dads:1",
         "metra": "point-metra:1", "none": "point-none:1"}, seeds=3,
    ),
    "goal": Study(
        "A step reward, which breaks the Lipschitz assumption: does selection by return still help?",
        tuple(f"point-goal-{a}" for a in ANGLES), tops("point", random="point-random:1"), seeds=3,
    ),
    "maze": Study(
        "Walls: nearer to a dead end as the crow flies is better, which is the wrong way in places.",
        MAZE_TASKS, tops("maze", random="maze-random:1"), seeds=3,
    ),
    "collapse": Study(
        "As many policies as the maze has dead ends, and more: is the collapse seen?",
        sources=("maze-k4", "maze", "maze-k20"),
    ),
    "selections": Study(
        "50,000 rows out of ten buffers: of the best one, the best episodes, two mixed, or all?",
        ("ant-angle-60",), {label: f"ant-main:{top}" for label, top in SELECTIONS.items()}, ("bc", "cped", "mopo"),
    ),
    "selections-full": Study(
        "The same in full: a mixture then has more rows; the best episodes as many as a buffer.",
        ("ant-angle-60",), {label: f"ant-one:{top}@full" for label, top in SELECTIONS.items()}, ("bc", "cped"),
    ),
    "ranks-ant": Study(
        "Which measure of a buffer tells what a learner makes of it? (after `selections`; benchmark/measure_ranks.py)",
        ("ant-angle-60",), {f"policy {k}": f"ant-main/policy_{k:02d}:1" for k in range(10)}, ("bc", "mopo"),
    ),
    "seeds": Study(
        "How much of all this is the luck of one run of wurl_sac.py?",
        POINT_TASKS, {"seed 0": "point:1", "seed 1": "point-s1:1", "seed 2": "point-s2:1"}, seeds=3,
    ),
    "penalty": Study(
        "What if MOPO's lambda is not tuned for the task? On the ant, good data and random.",
        ("ant-angle-60",), {"top1": "ant:1", "random": "ant-random:1"},
        ("mopo-lam0", "mopo-lam0.1", "mopo", "mopo-lam1"),
    ),
    "humanoid": Study("wurl_sac.py on the humanoid: does it run, how fast, how diverse?", sources=("humanoid",)),
}  # fmt: skip


def world(name):
    """The world whose budget holds: point for the light ones."""
    return next((w for w in ("ant", "cheetah", "humanoid") if name.startswith(w)), "point")


def flags_of_learner(task, learner, budget):
    """Script and flags of a learner on a task: its family's where there are such, else its world's."""
    table = {"cpu": LEARNERS, "gpu": GPU_LEARNERS}[budget]
    return table.get(task.rpartition("-")[0], table[world(task)])[learner].split()


def source_cell(base, source, budget):
    flags = SOURCES[source].split()
    if "--random" not in flags:
        table = {"cpu": CPU, "gpu": GPU}[budget]
        flags += table.get(source, table.get(world(source), "")).split()
    num = int(flags[flags.index("--num-policies") + 1]) if "--num-policies" in flags else 10
    folder = base / "sources" / source
    command = ["wurl_sac.py", *flags, "--out", str(folder)]
    return Cell(f"source {source}", command, folder / "buffers" / f"policy_{num - 1:02d}.npz", (), folder)


class Pick(NamedTuple):
    """ "source/policy:top@rows,option" in its parts; rows: "" (SIZE), a number, or full."""

    source: str
    policy: str
    top: str
    rows: str
    option: str

    @property
    def data(self):
        """Name of the selection that makes its file."""
        return "-".join(filter(None, ["/".join(filter(None, self[:2])), self.rows, self.option.replace("=", "")]))


def parts_of(pick):
    picked, _, top = pick.partition(":")
    top, _, option = top.partition(",")
    top, _, rows = top.partition("@")
    source, _, policy = picked.partition("/")
    return Pick(source, policy, top, rows, option)


def tasks_of(data):
    """The tasks that any study selects for among these buffers: one command makes all their files."""
    users = [s for s in STUDIES.values() if data in {parts_of(pick).data for pick in (s.picks or {}).values()}]
    return list(dict.fromkeys(task for study in users for task in study.tasks))


def tops_of(data, source):
    """Flags of udg_select.py: what it selects of a source."""
    picks = [parts_of(pick) for s in STUDIES.values() for pick in (s.picks or {}).values()]
    tops = {pick.top for pick in picks if pick.data == data}
    if "/" in data or "--num-policies 1 " in f"{SOURCES[source]} ":
        return ["--top", "1"]
    return ["--top", "1", "2", "all", *(["transport"] if "best" in tops else [])]


def data_cells(base, study, budget):
    """Cells of udg_select.py: one for each set of buffers; one for W1 to the expert and task where it is asked for."""
    cells = {}
    for data, pick in {pick.data: pick for pick in map(parts_of, study.picks.values())}.items():
        files = base / "sources" / pick.source / "buffers" / (f"{pick.policy}.npz" if pick.policy else "")
        tasks, folder, tops = tasks_of(data), base / "data" / data, tops_of(data, pick.source)
        command = ["udg_select.py", "--buffers", str(files), "--task", *tasks, *tops]
        command += ["--task-options", pick.option] if pick.option else []
        command += [] if pick.rows == "full" else ["--size", str(rows_of(pick, budget))]
        most = ["--top-rows", str(best_rows(pick, budget))]
        command += most if "transport" in tops else ["--w1-points", "0"]  # of the others no distance is asked for
        command += ["--overwrite", "--out", str(folder)]
        name, done = f"data {data}", folder / tasks[-1] / "scores.json"
        cells[name] = Cell(name, command, done, (f"source {pick.source}",), None, (files,))
    for task in study.tasks if study.reference else ():
        expert, folder = f"{study.reference}-rho-{task.split('-')[-1]}", base / "data" / "reference"
        reads = tuple(base / "sources" / x for x in (f"{study.reference}/buffers", f"{expert}/buffers/policy_00.npz"))
        command = ["udg_select.py", "--buffers", str(reads[0]), "--task", task, "--reference", str(reads[1])]
        needs = (f"source {study.reference}", f"source {expert}")
        done = folder / task / "scores.json"
        command += (
            ["--w1-points", "1500"] if world(task) != "point" else []
        )  # in 35 dimensions fewer see little but noise
        command += ["--overwrite", "--out", str(folder)]
        cells[f"w1 {task}"] = Cell(f"w1 {task}", command, done, needs, None, reads)
    return cells


def rows_of(pick, budget):
    """Rows that files are cut to; the best episodes are as many as a buffer's where the others are whole."""
    return int(pick.rows) if pick.rows.isdigit() else SIZE[budget][world(pick.source)]


def best_rows(pick, budget):
    """Rows of a file of the best episodes."""
    return WHOLE[budget] if pick.rows == "full" else rows_of(pick, budget)


def data_file(base, task, pick, budget):
    """The file that udg_select.py writes for a pick and task."""
    pick = parts_of(pick)
    stem = pick.top if pick.top in ("all", "transport") else f"top{pick.top}"
    stem += "" if pick.rows == "full" else f"-size{rows_of(pick, budget)}"
    if pick.top == "best":
        stem = f"rows{best_rows(pick, budget)}"
    return base / "data" / pick.data / task / f"{stem}.npz"


def learner_cell(base, study, task, pick, learner, budget):
    script, *flags = flags_of_learner(task, learner, budget)
    if study.seeds > 1 and "--num-seeds" not in flags:
        flags += ["--num-seeds", str(study.seeds)]
    folder = base / "learn" / task / f"{re.sub('[/:,]', '-', pick)}-{learner}-seeds{study.seeds}"
    data = data_file(base, task, pick, budget)
    command = [script, "--dataset", str(data), *flags, "--out", str(folder)]
    need = f"data {parts_of(pick).data}"
    return Cell(f"learn {task} {pick} {learner}", command, folder / "learning_curve.png", (need,), folder, (data,))


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


def results_file(name, budget, results):
    return results / (f"{name}.jsonl" if budget == "cpu" else f"{name}-{budget}.jsonl")


def read_results(path):
    """What a results file knows -> records by name of cell, rows by name of cell."""
    header, *lines = map(json.loads, path.read_text().splitlines()) if path.exists() else [{"cells": {}}]
    rows = {}
    for row in lines:
        kind = "source" if "source" in row else "w1" if "w1" in row else "learn"
        keys = {"source": ("source",), "w1": ("task",), "learn": ("task", "pick", "learner")}[kind]
        rows.setdefault(" ".join([kind, *(row[key] for key in keys)]), []).append(row)
    return header["cells"], rows


def kept_cells(cells, finished, records, rows, keep):
    """Cells that are not finished here, and for which a results file may stand: same command, and the same rows of data
    as far as there are any here -> {name: what tells their flags from those of now}; keep: "old": where anything does.
    """
    kept = {}
    for name, cell in cells.items():
        if name in finished or name not in records or records[name]["command"] != portable(cell.command):
            continue
        reads, told = fingerprint(cell), name in rows or name.startswith("data")
        same = reads == records[name].get("reads") or (reads == "" and not finished.keys() & set(cell.needs))
        if same and told and {*finished, *kept} >= set(cell.needs):
            flags = records[name].get("flags")
            differ = ", ".join(flags_differ(cell, flags)) if flags else "flags are not known"
            if keep == "old" or not differ:
                kept[name] = differ
    return kept


def tell_old(kept):
    """Name the cells that were kept though their flags are others, or unknown."""
    for differ in sorted(set(kept.values()) - {""}):
        names = [name for name, of in kept.items() if of == differ]
        print(f"of older settings ({differ}): {len(names)} cells: {'; '.join(names)}", flush=True)


def unmade(cells, kept):
    """Cells that are not kept, and all that they need."""
    wanted = set()
    for name in reversed(cells):  # each stands after what it needs
        if name not in kept or name in wanted:
            wanted |= {name, *cells[name].needs}
    return {name: cell for name, cell in cells.items() if name in wanted}


def make(name, base, budget, jobs, results, keep):
    """Run a study's cells, but for those that the results stand for (`keep`) -> what was not made, signal or ""."""
    cells, _ = cells_of(name, base, budget)
    known, rows = read_results(results_file(name, budget, results)) if keep else ({}, {})
    todo = unmade(cells, kept_cells(cells, finished_cells(cells, base), known, rows, keep))
    while todo:
        lost, stopped = run_cells(todo, base, jobs)
        if lost or stopped:
            return lost, stopped
        # What was made may have other rows than the results are of: then more has to be made.
        finished = finished_cells(cells, base)
        todo = unmade(cells, kept_cells(cells, finished, known, rows, keep))
        todo = {} if todo.keys() <= finished.keys() else todo
    return set(), ""


def gather(name, base, budget, results, force=False, keep=""):
    """results/udg/<study>.jsonl from finished cells: a header, a line per source, per W1, per learner and seed.

    A file that knows cells which are not finished here stays as it is (a fresh clone has none). force: it is replaced.
    keep: its rows stay beside those of here, if they are of the same commands, flags ("old": or not) and rows of data.
    """
    study = STUDIES[name]
    cells, learning = cells_of(name, base, budget)
    finished, path = finished_cells(cells, base), results_file(name, budget, results)
    known, known_rows = read_results(path)
    kept = kept_cells(cells, finished, known, known_rows, keep) if keep else {}
    lost = [key for key in known if key in cells and key not in finished and key not in kept]
    if lost and not force:
        other = "are of another command, other flags or other rows than those here"
        why = other if keep else "are not made here, or with other flags"
        more = ", --keep old keeps what differs in flags alone" if keep == "same" else ""
        print(f"{path.name} is kept: {len(lost)} of its cells {why}, e.g. {lost[0]}; --force replaces it{more}")
        return False
    rows = {key: known_rows.get(key, []) for key in kept if not key.startswith("learn")}
    rows |= {key: [source_row(cell)] for key, cell in finished.items() if key.startswith("source")}
    rows |= {key: [w1_row(cell)] for key, cell in finished.items() if key.startswith("w1")}
    for task, label, pick, learner, cell in learning:
        about = {"task": task, "label": label, "pick": pick, "learner": learner}
        if cell.name in finished:
            found = [data_row(data_file(base, task, pick, budget)) | row for row in learner_rows(cell.done.parent)]
        else:  # of one label, where there were two for one pick
            found = [row for row in known_rows.get(cell.name, ()) if row["label"] == known_rows[cell.name][0]["label"]]
            found = found if cell.name in kept else []
        rows.setdefault(cell.name, []).extend({**row, **about} for row in found)
    rows = [row for key in cells for row in rows.get(key, ())]
    about = lambda cell: {"command": portable(cell.command), "flags": flags_left(cell)}
    records = {key: read_record(cell, base) | made_by(cell) | about(cell) for key, cell in finished.items()}
    records = {key: records.get(key) or known[key] for key in cells if key in records or key in kept}
    seeds = 1 + max((row["seed"] for row in rows if "seed" in row), default=study.seeds - 1)
    header = {"study": name, "question": study.question, "budget": budget, "seeds": seeds}
    header |= {"tasks": study.tasks, "picks": study.picks or {}, "learners": study.learners if study.picks else ()}
    header |= {"missing": [key for key in cells if key not in records], "cells": records}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "\n".join(map(json.dumps, [header, *rows])) + "\n")
    if study.sources:  # what the policies do is their figure
        for cell in (cells[f"source {name}"] for name in study.sources if f"source {name}" in finished):
            shutil.copy(cell.runs / "trajectories.png", path.with_name(f"{path.stem}-{cell.runs.name}.png"))
    told = f"; {len(kept)} cells as they stood" if kept else ""
    print(f"{path.parent.name}/{path.name}: {len(rows)} rows; missing: {len(header['missing'])}{told}", flush=True)
    tell_old(kept)
    return True


def w1_row(cell):
    """W1 of every buffer to the expert's, and of two samples of the expert's own (what no distance looks like)."""
    found, spaces = json.loads(cell.done.read_text()), ("features", "(s, a), standardised")
    to_expert = dict(zip(spaces, found["w1_to_reference"], strict=True))
    w1 = {space: dict(zip(found["buffers"], to_expert[space][:-1], strict=True)) for space in reversed(spaces)}
    known = make_task(found["task"]).reference  # of whole evaluations, which in point worlds are as long as the data
    expert = {"expert": known[1]} if known and world(found["task"]) == "point" else {}
    return {"task": found["task"], "w1": w1, "floor": {space: to_expert[space][-1] for space in w1}} | expert


def source_row(cell):
    """A source: last numbers, lists over its policies at the last evaluation, and curves of what tells them apart.

    Distances are in its own space and (_full) in that of all observations.
    """
    records = [json.loads(line) for line in (cell.runs / "log.jsonl").read_text().splitlines()[1:]]
    last = records[-1] if records else {}
    curve = lambda key: [[r["step"], r[f"eval/{key}"]] for r in records if f"eval/{key}" in r]
    keys = ("min_w", "smallest_w", "min_w_full", "smallest_w_full", "disc_accuracy_held_out")
    row = {"source": cell.name.split()[1], "last": {k: v for k, v in last.items() if np.ndim(v) == 0}}
    return row | {"each": {k: v for k, v in last.items() if np.ndim(v) == 1}, **{key: curve(key) for key in keys}}


def data_row(data):
    """A selection: its mean return, the buffers chosen, the score of every buffer it could choose."""
    found = json.loads((data.parent / "scores.json").read_text())
    chosen = found["selections"][data.stem.split("-size")[0]]
    row = {"data_mean": chosen["mean_return"], "data_rows": chosen["num_transitions"]}
    row["chosen"] = [parent["name"] for parent in chosen["parents"]]
    return row | {"scores": {k: v["score"] for k, v in found["buffers"].items()}}


def learner_rows(folder):
    """The curves of a learner's run, one row for each seed; q: the mean Q of a batch, where the learner logs it."""
    short, q = (plots.read(folder, key) for key in ("eval/return_data_length", "train/q"))
    for seed, (steps, values) in plots.read(folder, "eval/return").items():
        curve = {"returns": values.tolist(), "returns_data_length": short[seed][1].tolist()}
        at = dict(zip(*q.get(seed, ((), ())), strict=True))
        if at.keys() >= set(steps):
            curve["q"] = [float(at[step]) for step in steps]
        yield {"seed": seed, "steps": steps.tolist(), **curve}


def show(name, base, budget):
    """A line of --list: cells made on this machine, and cells that results/udg knows, whichever machine made them."""
    cells, _ = cells_of(name, base, budget)
    made = sum(is_done(cell, base) for cell in cells.values())
    known, _ = read_results(results_file(name, budget, RESULTS))
    told = len(set(known) & set(cells))
    print(f"{name:17} {made:3} of {len(cells):3} cells made here, {told:3} in results  {STUDIES[name].question}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the studies")
    parser.add_argument("--run", nargs="+", default=[], metavar="NAME", help="studies to make, or all")
    parser.add_argument("--gather", nargs="+", default=[], metavar="NAME", help="only write results/udg")
    parser.add_argument("--commands", metavar="NAME", help="print a study's commands and run nothing")
    parser.add_argument("--budget", choices=("cpu", "gpu"), default="cpu", help="gpu: the published sizes")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, each pinned to a core")
    parser.add_argument("--force", action="store_true", help="replace results that know cells not finished here")
    told = "count what results/udg has from the same flags and rows as made; old: whatever the flags, and name those"
    parser.add_argument("--keep", nargs="?", const="same", default="", choices=("same", "old"), help=told)
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder of the cells")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the gathered rows")
    args = parser.parse_args(argv)
    base = args.runs / args.budget
    every = lambda names: dict.fromkeys(STUDIES if "all" in names else names)
    to_run, to_gather = every(args.run), every(args.run + args.gather)
    unknown = [name for name in [*to_gather, *filter(None, [args.commands])] if name not in STUDIES]
    if unknown:
        parser.error(f"no study is called {', '.join(unknown)}; studies are {', '.join(STUDIES)}, or all")
    if args.jobs < 1:
        parser.error("--jobs is 1 or more")
    if not (args.list or to_gather or args.commands):
        parser.error("nothing to do: --list, --run, --gather or --commands")
    os.chdir(ROOT)
    if args.commands:
        cells, _ = cells_of(args.commands, base, args.budget)
        print(*(portable(cell.command) for cell in cells.values()), sep="\n")
        return
    failed, stopped = set(), ""
    for name in to_gather:
        cells, _ = cells_of(name, base, args.budget)
        adopt(cells, base)
        if name in to_run and not stopped:
            lost, stopped = make(name, base, args.budget, args.jobs, args.results, args.keep)
            failed |= lost
        gather(name, base, args.budget, args.results, args.force, args.keep)
    for name in STUDIES if args.list else ():
        show(name, base, args.budget)
    if stopped:
        sys.exit(f"stopped by {stopped}; go on with the same command")
    if failed:
        sys.exit(f"failed or left out: {', '.join(sorted(failed))}")


if __name__ == "__main__":
    main()
