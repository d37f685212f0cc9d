"""The UDG studies (benchmark/udg_study.py): their commands, what they gather, and what they need not make again."""

import functools
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tyro

import cped
import dac
import envs
import mopo
import qdq
import udg_figures
import udg_select
import udg_study as study
from cells import Cell, args_of, flags_of, portable, record_file, write_record
from envs.buffers import scripted

EVERY = {
    (name, budget): study.cells_of(name, Path("runs", "study", budget), budget)
    for name in study.STUDIES
    for budget in ("cpu", "gpu")
}


# --- the studies as they are; what holds for the cells of all benchmarks is in test_cells.py -----


def commands_of(script):
    cells = itertools.chain.from_iterable(cells.values() for cells, _ in EVERY.values())
    return {tuple(cell.command[1:]): cell for cell in cells if cell.command[0] == script}


@functools.cache
def selection_args(words):
    return tyro.cli(udg_select.Args, args=list(words))


def test_selections_are_accepted_by_udg_select():
    for words, cell in commands_of("udg_select.py").items():
        args = selection_args(words)
        source = cell.needs[0].split()[1]
        picked = cell.name.removeprefix("data ") if cell.name.startswith("data") else source
        flags = study.SOURCES[source].split()
        num = int(flags[flags.index("--num-policies") + 1]) if "--num-policies" in flags else 10
        udg_select.parse_selections(args, 1 if "/" in picked else num)
        world, tasks = envs.task(flags[flags.index("--task") + 1]).env, udg_select.flatten(args.tasks)
        assert all(envs.task(name).env == world and envs.task(name).has_reward for name in tasks)
        assert study.world(source) in (world, "point"), "whose budget and size it has"
        assert cell.done == Path(args.out) / tasks[-1] / "scores.json"
        assert args.overwrite and (args.w1_points or cell.name.startswith("data"))


@pytest.mark.parametrize("learner", [mopo, cped, qdq, dac], ids=lambda module: module.__name__)
def test_learners_are_accepted_by_their_scripts(tmp_path, monkeypatch, learner):
    """Every distinct set of flags, on a small file; mopo's also with the task."""
    monkeypatch.chdir(tmp_path)
    seen, data = {}, scripted.dataset(tmp_path)
    for words, cell in commands_of(f"{learner.__name__}.py").items():
        task = cell.name.split()[1]
        seen.setdefault((study.world(task), words[2:-2]), (words, task))
    assert {world for world, _ in seen} == {"point", "ant", "cheetah"}
    for words, task in seen.values():
        Path(words[1]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(data, words[1])
        args = args_of(learner, words)
        if learner is mopo:
            mopo.check_args(args)
            mopo.check_task(args, envs.task(task))
        assert args.num_updates // args.eval_every >= udg_figures.LAST, "the score needs five evaluations"


def test_a_step_reward_has_its_own_budget():
    """At the budget of the other point tasks a third of the runs still stand at 0 (results/udg/goal.jsonl)."""
    updates = {task: study.flags_of_learner(f"{task}-60", "mopo", "cpu") for task in ("point-goal", "point-angle")}
    assert "20000" in updates["point-goal"] and "6000" in updates["point-angle"]


def test_picks_name_what_their_data_cells_write(tmp_path, monkeypatch):
    """The file that a learner reads is one that the selection it needs writes, for this task, at this size."""
    monkeypatch.chdir(tmp_path)  # planned_files clears up
    for (name, budget), (cells, learning) in EVERY.items():
        wanted = study.STUDIES[name]
        assert len(learning) == len(wanted.tasks) * len(wanted.picks or ()) * len(wanted.learners)
        assert all(f"source {source}" in cells for source in wanted.sources)
        for task, label, pick, learner, cell in learning:
            assert cells[f"learn {task} {pick} {learner}"] == cell and wanted.picks[label] == pick
            select, tasks = (
                selection_args(tuple(cells[cell.needs[0]].command[1:])),
                [envs.task(t) for t in wanted.tasks],
            )
            selections = udg_select.parse_selections(select, 1 if "/" in pick else 20)
            files = udg_select.planned_files(Path(select.out), tasks, selections, select)
            data = Path(cell.command[cell.command.index("--dataset") + 1])
            (label,) = (label for label, file in files.items() if file == data)
            top = pick.partition(":")[2].partition("@")[0]
            assert label[0] == task and label[1] in (f"top{top}", top, f"rows{select.top_rows}"), (name, pick, budget)
            assert cell.reads == (data,) and (top == "best") == label[1].startswith("rows"), (name, pick, budget)
            assert task in udg_select.flatten(select.tasks), (name, pick)


def test_a_pick_tells_its_rows_and_its_option():
    """ant-large: 146,000 rows whatever a file is made of; with the option they lie apart from those without."""
    assert study.parts_of("point/policy_03:1") == ("point", "policy_03", "1", "", "")
    assert study.parts_of("ant:all@full") == ("ant", "", "all", "full", "")
    word = lambda command, flag: command[command.index(flag) + 1]
    for name in ("ant-large", "ant-large-files", "ant-large-learners", "ant-large-bonus"):
        cells, learning = EVERY[name, "cpu"]
        made = [cell.command for key, cell in cells.items() if key.startswith("data")]
        assert made and all(word(command, "--size") == "146000" for command in made)
        assert all(word(x, "--top-rows") == "146000" for x in made if "transport" in x)
        options = [word(command, "--task-options") if "--task-options" in command else "" for command in made]
        assert options == ["survive_bonus=1" if name == "ant-large-bonus" else ""] * len(made)
        seeds = 3 if name == "ant-large" else 1
        assert all(("--num-seeds" in cell.command) == (seeds > 1) for *_, cell in learning)


# --- the command line ---------------------------------------------------------------------------


def test_main_tells_what_failed(tmp_path, monkeypatch, capsys):
    """A real wurl_sac.py that refuses its task: exit status, message, and the rows of what there is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(study.SOURCES, "lost", "--task nowhere")
    monkeypatch.setattr(study, "STUDIES", {"lost": study.Study("Where?", sources=("lost",))})
    where = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    with pytest.raises(SystemExit, match="failed or left out: source lost"):
        study.main(["--run", "lost", *where])
    out = capsys.readouterr().out
    assert "FAILED source lost: exit 1: wurl_sac.py: error: no environment or task is called 'nowhere'" in out
    (line,) = (tmp_path / "results" / "lost.jsonl").read_text().splitlines()
    assert json.loads(line)["missing"] == ["source lost"]
    study.main(["--list", *where])
    assert re.search(r"lost +0 of +1 cells made here, +0 in results  Where\?", capsys.readouterr().out)
    study.main(["--commands", "lost"])
    assert capsys.readouterr().out == "python wurl_sac.py --task nowhere --out runs/study/cpu/sources/lost\n"


@pytest.mark.parametrize("words, said", [
    (["--run", "angels"], "no study is called angels; studies are angle-point"), (["--commands", "angels"], "angels"),
    (["--run", "goal", "--jobs", "0"], "--jobs is 1 or more"), ([], "nothing to do"),
])  # fmt: skip
def test_command_line_errors(words, said, capsys):
    with pytest.raises(SystemExit):
        study.main(words)
    assert said in capsys.readouterr().err


# --- gathering ----------------------------------------------------------------------------------


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read(folder):
    """Header and rows of the study `toy`."""
    header, *rows = map(json.loads, (folder / "toy.jsonl").read_text().splitlines())
    return header, rows


LEARNER = "learn point-angle-0 point:1 mopo"
BEGUN = {"commit": "then", "versions": {"jax": "1"}}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A small study by hand, its cells finished but for one learner -> its cells, a function that gathers them."""
    picks, base, results = {"best": "point:1", "mixed": "point:all"}, tmp_path / "runs", tmp_path / "results"
    monkeypatch.setattr(study, "STUDIES", {"toy": study.Study("Why?", ("point-angle-0",), picks, seeds=2)})
    cells, _ = study.cells_of("toy", base, "cpu")
    source, data, learner = cells["source point"], cells["data point"], cells[LEARNER]
    records = [
        {"step": step, "eval/min_w": step / 10, "eval/smallest_w": step / 20, "eval/min_w_full": 3.0,
         "eval/disc_accuracy_held_out": 0.9, "eval/travel": [1, 2]}
        for step in (10, 20)
    ]  # fmt: skip
    write(source.runs / "log.jsonl", {"args": {}}, *records)
    one = lambda name, mean: {"parents": [{"name": name}], "mean_return": mean, "num_transitions": 700}
    scores = {"buffers": {"policy_00": {"score": 5.0}, "policy_01": {"score": 7.0}}}
    write(data.done, scores | {"selections": {"top1": one("policy_01", 6.5), "all": one("policy_00", 6.0)}})
    evaluations = [
        {"step": step, "seed": seed, "eval/return": 10.0 * step + seed, "eval/return_data_length": 1.0 * step + seed}
        for step, seed in itertools.product((100, 200), (0, 1))
    ]
    evaluations += [{"step": step, "seed": 1, "train/q": 0.1 * step} for step in (50, 100, 200)]  # seed 0 has none
    write(learner.runs / "log.jsonl", {"args": {}} | BEGUN, {"step": 1, "seed": 0, "model/idle": 0}, *evaluations)
    write(learner.done)
    write(source.done)
    np.savez(source.done, metadata_json=json.dumps({"sha256": {}}))
    for cell in (source, data, learner):
        write_record(cell, base, {"seconds": 5})

    def gather(forget=None, **flags):
        """-> whether the file was written, its header, its rows; forget: a cell that counts as not made."""
        if forget:
            record_file(cells[forget], base).unlink()
        return study.gather("toy", base, "cpu", results, **flags), *read(results)

    return cells, gather


def test_gathered_rows_are_exact(made):
    cells, gather = made
    written, header, rows = gather()
    assert written and header["missing"] == ["learn point-angle-0 point:all mopo"]
    assert set(header["cells"]) == {"source point", "data point", LEARNER}
    out = cells["source point"].runs
    assert header["cells"]["source point"]["command"] == f"python wurl_sac.py --task point --out {out}"
    assert header["cells"][LEARNER].items() >= BEGUN.items(), "commit and versions that the run began with"
    assert header["picks"] == {"best": "point:1", "mixed": "point:all"} and header["seeds"] == 2
    last = {"step": 20, "eval/min_w": 2.0, "eval/smallest_w": 1.0, "eval/min_w_full": 3.0}
    last["eval/disc_accuracy_held_out"] = 0.9
    curves = {"min_w": [[10, 1.0], [20, 2.0]], "smallest_w": [[10, 0.5], [20, 1.0]], "smallest_w_full": []}
    about = {
        "task": "point-angle-0", "label": "best", "pick": "point:1", "learner": "mopo", "data_mean": 6.5,
        "data_rows": 700, "chosen": ["policy_01"], "scores": {"policy_00": 5.0, "policy_01": 7.0}, "steps": [100, 200],
    }  # fmt: skip
    assert rows == [
        {"source": "point", "last": last, "each": {"eval/travel": [1, 2]}, **curves,
         "min_w_full": [[10, 3.0], [20, 3.0]], "disc_accuracy_held_out": [[10, 0.9], [20, 0.9]]},
        {**about, "seed": 0, "returns": [1000.0, 2000.0], "returns_data_length": [100.0, 200.0]},
        {**about, "seed": 1, "returns": [1001.0, 2001.0], "returns_data_length": [101.0, 201.0], "q": [10.0, 20.0]},
    ]  # fmt: skip


def test_w1_rows_are_exact(tmp_path):
    found = {"task": "point-angle-0", "buffers": {"policy_00": {}, "policy_01": {}}}
    write(tmp_path / "scores.json", found | {"w1_to_reference": [[1.0, 2.0, 0.5], [0.1, 0.2, 0.05]]})
    assert study.w1_row(Cell("w1 point-angle-0", [], tmp_path / "scores.json", ())) == {
        "task": "point-angle-0",
        "w1": {"(s, a), standardised": {"policy_00": 0.1, "policy_01": 0.2},
               "features": {"policy_00": 1.0, "policy_01": 2.0}},
        "floor": {"(s, a), standardised": 0.05, "features": 0.5},
        "expert": envs.task("point-angle-0").reference[1],
    }  # fmt: skip


def test_what_is_gathered_is_drawn_with_the_pictures_of_wanted_sources(made, monkeypatch, capsys, tmp_path):
    cells, gather = made
    gather()
    udg_figures.main(["--folder", str(tmp_path / "results")])
    out = capsys.readouterr().out
    assert "| point-angle-0 | 150.5 +- 0.7 | missing |" in out and "Not made yet: 1 cells" in out
    assert (tmp_path / "results" / "toy.png").stat().st_size > 10_000
    monkeypatch.setitem(study.STUDIES, "toy", study.Study("Why?", sources=("point",)))
    (cells["source point"].runs / "trajectories.png").write_bytes(b"a picture")
    assert gather()[0] and (tmp_path / "results" / "toy-point.png").read_bytes() == b"a picture"


def test_a_learner_without_its_selection_is_left_out(made):
    written, _, rows = made[1](forget="data point")
    assert written and not any("learner" in row for row in rows)


def test_results_of_cells_that_are_not_here_are_kept(made, capsys):
    """A fresh clone has committed results and no cells: gathering must not empty them."""
    _, gather = made
    before = gather()[1:]
    assert gather(forget="source point") == (False, *before)
    assert (
        "3 of its cells are not made here, or with other flags, e.g. source point; --force" in capsys.readouterr().out
    )
    assert gather(force=True)[1]["missing"][0] == "source point"


# --- results of another machine -----------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A study of two sources, two selections of the first, a W1 of both; a results file of another machine with all of
    it but for one learner -> a function that makes it here, and what it made.
    """
    made, machine, content = [], [1.0], {"a": "rows of a", "b": "rows of b"}
    base, results = tmp_path / "runs", tmp_path / "results"
    needs = {
        "source a": (), "source b": (), "data 0": ("source a",), "data 1": ("source a",),
        "w1 t": ("source a", "source b"), "learn t 0 mopo": ("data 0",), "learn t 1 mopo": ("data 1",),
    }  # fmt: skip
    file = lambda name: base / f"{name}.npz"
    cells = {name: Cell(name, [name], file(name), of, None, tuple(map(file, of))) for name, of in needs.items()}
    learning = [("t", f"label {pick}", pick, "mopo", cells[f"learn t {pick} mopo"]) for pick in "01"]

    def run_cells(todo, base, jobs):
        """Each has as rows what it read, or its own letter's content; a missing file is an error."""
        for name, cell in todo.items():
            if study.is_done(cell, base):
                continue
            rows = "".join(json.loads(str(np.load(path)["metadata_json"]))["sha256"]["x"] for path in cell.reads)
            cell.done.parent.mkdir(parents=True, exist_ok=True)
            np.savez(cell.done, metadata_json=json.dumps({"sha256": {"x": rows or content[name[-1]]}}))
            write_record(cell, base, {"seconds": 1})
            made.append(name)
        return set(), ""

    row = lambda seed, value: {"seed": seed, "steps": [1], "returns": [value], "returns_data_length": [value]}
    stand_in = {
        "STUDIES": {"toy": study.Study("Why?", ("t",), {"label 0": "0", "label 1": "1"})}, "run_cells": run_cells,
        "cells_of": lambda *_: (cells, learning), "source_row": lambda cell: {"source": cell.name.split()[1]},
        "w1_row": lambda cell: {"task": "t", "w1": {}}, "data_row": lambda path: {}, "data_file": lambda *_: Path(),
        "learner_rows": lambda folder: [row(seed, machine[-1]) for seed in (0, 1)],
    }  # fmt: skip
    for name, value in stand_in.items():
        monkeypatch.setattr(study, name, value)
    assert study.make("toy", base, "cpu", 1, results, "") == (set(), "") and len(made) == len(cells)
    record_file(cells["learn t 1 mopo"], base).unlink()
    assert study.gather("toy", base, "cpu", results)
    shutil.rmtree(base)
    made.clear()
    machine.append(2.0)

    def again(**other):
        content.update(other)
        made.clear()
        assert study.make("toy", base, "cpu", 1, results, "old") == (set(), "")
        kept = study.gather("toy", base, "cpu", results, keep="old")
        header, rows = read(results)
        return kept, header["missing"], rows

    again.cells, again.base = cells, base
    return again, made


def test_what_is_known_is_not_made_again(elsewhere):
    again, made = elsewhere
    kept, missing, rows = again()
    # With source a made anew, W1 to source b is of unknown rows until b is there, too.
    assert made == ["source a", "data 1", "learn t 1 mopo", "source b", "w1 t"] and kept and not missing
    about = [(row.get("source"), row.get("label"), row.get("returns")) for row in rows]
    learners = [(None, f"label {k}", [value]) for k, value in ((0, 1.0), (1, 2.0)) for _ in range(2)]
    assert about == [("a", None, None), ("b", None, None), (None, None, None), *learners]
    assert again() == (kept, missing, rows) and not made
    again.cells["data 1"].done.unlink()
    assert again() == (kept, missing, rows) and not made, "a learner whose data are gone keeps its rows"


@pytest.mark.parametrize("before, differ", [({}, ""), ({"tau": 0.9}, "tau"), (None, "flags are not known")])
def test_results_of_a_preset_that_changed_are_kept_only_where_that_is_asked(tmp_path, capsys, before, differ):
    """The same words, whose preset gave another tau when the results were made; or results that tell no flags."""
    command = ["dac.py", "--dataset", str(tmp_path / "gone.npz"), "--preset", "cpu", "--out", str(tmp_path / "run")]
    cell = Cell("learn", command, tmp_path / "run" / "done", ("data",), tmp_path / "run", (tmp_path / "gone.npz",))
    record = {"command": portable(command), "reads": "1"}
    record |= {} if before is None else {"flags": flags_of(cell) | before}
    kept = [study.kept_cells({"learn": cell._replace(needs=())}, {}, {"learn": record}, {"learn": []}, keep)
            for keep in ("same", "old")]  # fmt: skip
    assert kept == [{} if differ else {"learn": ""}, {"learn": differ}]
    study.tell_old(kept[1])
    assert capsys.readouterr().out == (f"of older settings ({differ}): 1 cells: learn\n" if differ else "")


def test_other_rows_are_no_substitute(elsewhere):
    """A source that was made anew with other rows takes everything with it that the results have from the old ones."""
    again, made = elsewhere
    kept, missing, rows = again(a="other rows")
    assert kept and not missing and sorted(made) == sorted(again.cells)
    assert [row["returns"] for row in rows if "label" in row] == [[2.0]] * 4


def test_another_command_is_no_substitute(elsewhere, capsys, tmp_path):
    """Results of another command are not overwritten; the command is run."""
    again, made = elsewhere
    again.cells["w1 t"].command.append("--more")
    before = read(tmp_path / "results")
    assert not study.gather("toy", again.base, "cpu", tmp_path / "results", keep="old")
    assert "another command, other flags or other rows than those here, e.g. w1 t" in capsys.readouterr().out
    assert read(tmp_path / "results") == before
    assert again()[0] and made == ["source a", "source b", "data 1", "w1 t", "learn t 1 mopo"]
