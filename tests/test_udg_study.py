"""The UDG studies: cells and what runs them (benchmark/udg_study.py), figures and tables (benchmark/udg_figures.py)."""

import collections
import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import tyro

import cped
import dac
import envs
import mopo
import qdq
import udg_select
import wurl_sac
from envs import buffers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmark")]

import udg_figures  # noqa: E402
import udg_study as study  # noqa: E402
from udg_study import Cell  # noqa: E402

BASE = Path("runs") / "study"
EVERY = {
    (name, budget): study.cells_of(name, BASE / budget, budget) for name in study.STUDIES for budget in ("cpu", "gpu")
}


# --- the studies as they are --------------------------------------------------------------------


@pytest.mark.parametrize("name, budget", EVERY)
def test_cells_stand_after_what_they_need(name, budget):
    cells, learning = EVERY[name, budget]
    seen = set()
    for key, cell in cells.items():
        assert key == cell.name and set(cell.needs) <= seen, key
        seen.add(key)
    for task, label, pick, learner, cell in learning:
        assert cells[cell.name] == cell and study.STUDIES[name].picks[label] == pick
        assert cell.name == f"learn {task} {pick} {learner}"
        assert cell.reads == (Path(cell.command[cell.command.index("--dataset") + 1]),)
    wanted = study.STUDIES[name]
    assert len(learning) == len(wanted.tasks) * len(wanted.picks or ()) * len(wanted.learners)
    assert all(f"source {source}" in cells for source in wanted.sources)


@pytest.mark.parametrize("budget", ["cpu", "gpu"])
def test_studies_share_cells_and_nothing_else(budget):
    """One name is one command, one folder, one record; what two studies ask for is made once."""
    by_name, users = collections.defaultdict(set), collections.Counter()
    for (_, at), (cells, _) in EVERY.items():
        for cell in cells.values() if at == budget else ():
            by_name[cell.name].add((tuple(cell.command), cell.done, cell.needs, cell.runs, cell.reads))
            users[cell.name] += 1
    assert all(len(kinds) == 1 for kinds in by_name.values())
    done = [kind[1] for (kind,) in by_name.values()]
    records = {study.record_file(Cell(name, [], Path(), ()), BASE) for name in by_name}
    assert len(set(done)) == len(done) == len(records)
    assert users["source point"] > 4 and users["learn point-angle-0 point:1 mopo"] > 2


def test_commands_name_no_place():
    for (name, budget), (cells, _) in EVERY.items():
        for cell in cells.values():
            line = study.portable(cell.command)
            assert line.startswith("python ") and str(ROOT) not in line and " /" not in line, (name, budget)
            assert f" --out runs/study/{budget}/" in line and (ROOT / cell.command[0]).exists()


def commands_of(script):
    cells = itertools.chain.from_iterable(cells.values() for cells, _ in EVERY.values())
    return {tuple(cell.command[1:]): cell for cell in cells if cell.command[0] == script}


def test_sources_are_accepted_by_wurl_sac():
    """Every flag exists, and what wurl_sac.py refuses before long work it does not refuse."""
    seen = set()
    for words, cell in commands_of("wurl_sac.py").items():
        flags = words[:-2]  # without --out
        if flags in seen:
            continue
        seen.add(flags)
        args = wurl_sac.parse_args(list(words), wurl_sac.wurl_preset)
        task = envs.task(args.task)
        wurl_sac.check_args(args, task, args.episode_length or task.episode_length)
        assert cell.done.name == f"policy_{args.num_policies - 1:02d}.npz", "done by the last policy's buffer"
        assert cell.runs == Path(args.out) and study.world(cell.name.split()[1]) in (task.env, "point")
    assert len(seen) >= len(study.SOURCES)


def test_selections_are_accepted_by_udg_select():
    for words, cell in commands_of("udg_select.py").items():
        args = tyro.cli(udg_select.Args, args=list(words))
        source = cell.needs[0].split()[1]
        picked = cell.name.removeprefix("data ") if cell.name.startswith("data") else source
        flags = study.SOURCES[source].split()
        num = int(flags[flags.index("--num-policies") + 1]) if "--num-policies" in flags else 10
        udg_select.parse_top(args.top, 1 if "/" in picked else num)
        world = envs.task(flags[flags.index("--task") + 1]).env
        for name in udg_select.flatten(args.tasks):
            assert envs.task(name).env == world and envs.task(name).has_reward
        assert cell.done == Path(args.out) / udg_select.flatten(args.tasks)[-1] / "scores.json"
        assert args.overwrite and (args.w1_points or cell.name.startswith("data"))


def write_buffer(path, task_name, rows=20, value=0.0):
    """A small file of a task -> the digests of its arrays."""
    task = envs.task(task_name)
    states = np.full((rows, task.observation_size), value, np.float32)
    arrays = {
        "observations": states, "next_observations": states, "actions": 0 * states[:, : task.action_size],
        "rewards": np.ones(rows, np.float32), "terminals": np.zeros(rows, bool),
        "timeouts": np.arange(rows) == rows - 1,
    }  # fmt: skip
    about = {"dataset_name": "toy", "env": task.env, "task": task_name, "layout": "task", "dt": task.dt}
    about |= {"reward_kind": "relabelled", "task_options": task.options, "episode_length": rows}
    buffers.save(path, arrays, about)
    return [buffers.sha256(x) for x in arrays.values()]


@pytest.mark.parametrize("learner", [mopo, cped, qdq, dac], ids=lambda module: module.__name__)
def test_learners_are_accepted_by_their_scripts(tmp_path, monkeypatch, learner):
    """Every distinct set of flags, on a small file of the task; mopo's also at the study's number of rows."""
    monkeypatch.chdir(tmp_path)
    seen, name = {}, learner.__name__
    for words, cell in commands_of(f"{name}.py").items():
        task = cell.name.split()[1]
        seen.setdefault((study.world(task), words[2:-2]), (words, task))
    assert {world for world, _ in seen} == {"point", "ant", "cheetah"}
    for (world, _), (words, task_name) in seen.items():
        write_buffer(Path(words[1]), task_name)
        args = learner.parse_args(list(words), getattr(learner, f"{name}_preset"))
        if learner is mopo:
            mopo.check_args(args, envs.task(task_name), study.SIZE["cpu"][world])
        assert args.num_updates // args.eval_every >= udg_figures.LAST, "the score needs five evaluations"


def test_a_step_reward_has_its_own_budget():
    """At the budget of the other point tasks a third of the runs still stand at 0 (results/udg/goal.jsonl)."""
    updates = lambda task, budget: study.flags_of_learner(task, "mopo", budget)
    assert "20000" in updates("point-goal-60", "cpu") and "6000" not in updates("point-goal-60", "cpu")
    assert "6000" in updates("point-angle-60", "cpu") and "6000" in updates("tree-maze-end-1", "cpu")
    assert updates("point-goal-60", "gpu") == updates("point-angle-60", "gpu")


def test_picks_name_what_their_data_cells_write():
    """The file that a learner reads is one that the selection it needs writes, for this task, at this size."""
    for (name, budget), (cells, learning) in EVERY.items():
        for task, _, pick, _, cell in learning:
            select = tyro_args(tuple(cells[cell.needs[0]].command[1:]))
            top = pick.split(":")[1]
            assert top in select.top and task in udg_select.flatten(select.tasks), (name, pick)
            label = "all" if top == "all" else f"top{top}"
            assert cell.reads[0] == Path(select.out) / task / f"{label}-size{select.size}.npz", (name, budget)


@functools.cache
def tyro_args(words):
    return tyro.cli(udg_select.Args, args=list(words))


# --- what runs them: real commands, tiny ones ---------------------------------------------------

NOTE = "import pathlib, sys; out = pathlib.Path(sys.argv[1]); out.parent.mkdir(parents=True, exist_ok=True); "
TRACE = "open(out.parent / 'trace', 'a').write(out.name + ' '); "


def tiny(tmp_path, name, *needs, code="out.write_text('x')", **fields):
    """A cell of a second or less: python -c, which notes that it ran and writes its file."""
    done = tmp_path / "cells" / name
    return Cell(name, ["-c", NOTE + TRACE + code, str(done)], done, needs, **fields)


def trace(tmp_path):
    path = tmp_path / "cells" / "trace"
    return path.read_text().split() if path.exists() else []


def run(cells, tmp_path, jobs=1):
    return study.run_cells({cell.name: cell for cell in cells}, tmp_path / "base", jobs)


def test_runs_in_order_once(tmp_path, capsys):
    cells = [tiny(tmp_path, "a"), tiny(tmp_path, "b", "a"), tiny(tmp_path, "c", "a", "b")]
    assert run(cells, tmp_path) == (set(), "") and trace(tmp_path) == ["a", "b", "c"]
    assert "[3/3]" in capsys.readouterr().out
    record = study.read_record(cells[0], tmp_path / "base")
    assert record["command"] == cells[0].command and record["resumed"] is False and record["versions"]
    assert run([*cells, tiny(tmp_path, "d", "c")], tmp_path) == (set(), "")
    assert trace(tmp_path) == ["a", "b", "c", "d"], "what is done is skipped"
    changed = tiny(tmp_path, "b", "a", code="out.write_text('y')")
    assert run([cells[0], changed, cells[2]], tmp_path) == (set(), "")
    assert trace(tmp_path)[4:] == ["b"] and changed.done.read_text() == "y", "another command is made again"
    cells[0].done.unlink()
    study.record_file(cells[2], tmp_path / "base").write_text('{"command": ["torn')
    assert run([cells[0], changed, cells[2]], tmp_path) == (set(), "")
    assert trace(tmp_path)[5:] == ["a", "c"], "a lost file and a torn record are made again"


def test_a_failure_takes_what_needs_it_and_no_other(tmp_path, capsys):
    bad = tiny(tmp_path, "bad", code="sys.exit('no such reward')")
    silent = tiny(tmp_path, "silent", code="pass")  # exit 0, but its file is not there
    cells = [bad, tiny(tmp_path, "child", "bad"), tiny(tmp_path, "grandchild", "child"), silent, tiny(tmp_path, "good")]
    assert run(cells, tmp_path) == ({"bad", "child", "grandchild", "silent"}, "")
    assert trace(tmp_path) == ["bad", "silent", "good"]
    out = capsys.readouterr().out
    assert "FAILED bad: exit 1: no such reward" in out and "left out child: it needs bad" in out
    assert "FAILED silent: exit 0" in out and "python -c" in out
    assert not study.is_done(bad, tmp_path / "base")


def test_other_rows_make_what_read_them_anew(tmp_path):
    """Not the file's bytes count but its arrays: a selection for one task more does not cost every learner's run."""
    data = tmp_path / "data.npz"
    write = lambda digest, flags: np.savez(data, metadata_json=json.dumps({"sha256": digest, "flags": flags}))
    reader = tiny(tmp_path, "reader", reads=(data,))
    write({"rewards": "1"}, "first")
    assert run([reader], tmp_path) == (set(), "")
    write({"rewards": "1"}, "second")
    assert study.is_done(reader, tmp_path / "base")
    write({"rewards": "2"}, "second")
    assert not study.is_done(reader, tmp_path / "base")
    assert run([reader], tmp_path) == (set(), "") and trace(tmp_path) == ["reader"] * 2
    data.unlink()
    assert study.is_done(reader, tmp_path / "base"), "what was deleted to save space has not changed"


def test_an_old_file_does_not_pass_for_a_new_one(tmp_path):
    cell = tiny(tmp_path, "x", code="pass")
    cell.done.parent.mkdir(parents=True)
    cell.done.write_text("of another command")
    assert run([cell], tmp_path) == ({"x"}, "")


def test_a_run_goes_on_from_its_state(tmp_path):
    folder = tmp_path / "cells" / "run"
    code = "(out.parent / 'run').mkdir(exist_ok=True); (out.parent / 'run' / 'state.npz').touch(); "
    code += "out.write_text(sys.argv[-1]) if '--resume' in sys.argv else sys.exit('stopped')"
    cell = tiny(tmp_path, "learner", code=code, runs=folder)
    assert run([cell], tmp_path) == ({"learner"}, "")
    assert run([cell], tmp_path) == (set(), "") and cell.done.read_text() == "--resume"
    assert study.read_record(cell, tmp_path / "base")["resumed"] is True
    assert trace(tmp_path) == ["learner"] * 2


def test_jobs_run_at_once(tmp_path):
    """Each of two waits until the other has begun, which one after the other never would."""
    code = "import time; end = time.time() + 60; (out.parent / ('begun-' + out.name)).touch()\n"
    code += "while len(list(out.parent.glob('begun-*'))) < 2 and time.time() < end: time.sleep(0.02)\n"
    code += "out.write_text(str(len(list(out.parent.glob('begun-*')))))"
    cells = [tiny(tmp_path, name, code=code) for name in "ab"]
    assert run(cells, tmp_path, jobs=2) == (set(), "")
    assert [cell.done.read_text() for cell in cells] == ["2", "2"]


def test_a_cell_at_work_is_heard(tmp_path, monkeypatch, capsys):
    """It waits until its own second line was told."""
    monkeypatch.setattr(study, "HEARD_EVERY", 0.05)
    told, code = tmp_path / "told", "import time; end = time.time() + 60\n"
    code += "print('update 1/2', flush=True)\nprint('update 2/2', flush=True)\n"
    code += f"while not pathlib.Path({str(told)!r}).exists() and time.time() < end: time.sleep(0.02)\n"
    code += f"out.write_text(str(pathlib.Path({str(told)!r}).exists()))"
    cell, say = tiny(tmp_path, "slow", code=code), study.tell_at_work

    def listen(cells, base):
        say(cells, base)
        if "at work: slow: update 2/2" in capsys.readouterr().out:
            told.touch()

    monkeypatch.setattr(study, "tell_at_work", listen)
    assert run([cell], tmp_path) == (set(), "") and cell.done.read_text() == "True"


def test_cells_share_what_they_compile(tmp_path, monkeypatch):
    """jax itself says where it keeps its programs: beside the cells, or where its user wants them."""
    code = "import jax; c = jax.config; "
    code += "out.write_text(f'{c.jax_compilation_cache_dir} {c.jax_persistent_cache_min_compile_time_secs}')"
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(name, raising=False)
    cell = tiny(tmp_path, "cell", code=code)
    assert run([cell], tmp_path) == (set(), "")
    assert cell.done.read_text() == f"{tmp_path / 'base' / 'jax_cache'} 0.3"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    other = tiny(tmp_path, "other", code=code)
    assert run([other], tmp_path) == (set(), "") and other.done.read_text() == "elsewhere 0.3"


DRIVER = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {root!r} + "/benchmark"]
import udg_study as study
done, name = Path({done!r}), sys.argv[1]
code = '''
import pathlib, signal, sys, time
out = pathlib.Path(sys.argv[1]); out.parent.mkdir(parents=True, exist_ok=True)
def save(*_): out.with_suffix(".saved").write_text("whole"); sys.exit("stopped by SIGTERM")
signal.signal(signal.SIGTERM, save)
out.with_suffix(".pid").write_text(str(__import__("os").getpid()))
time.sleep(120)
'''
cells = {{"slow": study.Cell("slow", ["-c", code, str(done)], done, ()),
         "next": study.Cell("next", ["-c", "raise SystemExit('never')"], done.with_suffix(".next"), ())}}
if name == "slow":
    del cells["next"]
print(study.run_cells(cells, Path({base!r}), 1), flush=True)
"""


def driver(tmp_path, name):
    places = {"root": str(ROOT), "done": str(tmp_path / "cells" / "slow"), "base": str(tmp_path / "base")}
    return [sys.executable, "-c", DRIVER.format(**places), name]


def wait_for(path, seconds=120):
    end = time.time() + seconds
    while not (path.exists() and path.read_text()):
        assert time.time() < end, f"{path} never came"
        time.sleep(0.05)
    return path.read_text()


def test_a_stopped_study_stops_its_cells_and_a_killed_one_keeps_their_lock(tmp_path):
    pid = tmp_path / "cells" / "slow.pid"
    first = subprocess.Popen(driver(tmp_path, "both"), stdout=subprocess.PIPE, text=True)
    wait_for(pid)
    first.send_signal(signal.SIGINT)
    out, _ = first.communicate(timeout=60)
    assert (tmp_path / "cells" / "slow.saved").read_text() == "whole"
    assert "stopped slow: exit 1: stopped by SIGTERM" in out and "never" not in out and "left out" not in out
    assert "'SIGINT'" in out and "'slow'" in out and "'next'" in out, "what was not made, and why"

    pid.unlink()
    second = subprocess.Popen(driver(tmp_path, "slow"), stdout=subprocess.DEVNULL)
    child = int(wait_for(pid))
    second.kill()
    second.wait()
    try:
        cell = Cell("slow", ["-c", "raise SystemExit('twice')"], tmp_path / "cells" / "slow", ())
        wrong = study.run_cell(cell, tmp_path / "base", None, study.Stopping())
        assert wrong == "another process is making it now"
    finally:
        os.kill(child, signal.SIGKILL)


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


@pytest.mark.parametrize("words", [["--run", "angels"], ["--commands", "angels"], ["--run", "goal", "--jobs", "0"], []])
def test_command_line_errors(words, capsys):
    with pytest.raises(SystemExit) as stop:
        study.main(words)
    assert stop.value.code == 2
    if "angels" in words:
        assert "no study is called angels; studies are angle-point" in capsys.readouterr().err


def test_commands_are_printed(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    study.main(["--commands", "collapse"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "python wurl_sac.py --task tree-maze --num-policies 4 --out runs/study/cpu/sources/maze-k4"
    assert len(lines) == 3


# --- gathering ----------------------------------------------------------------------------------


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A small study by hand, its cells finished but for one learner -> base, results."""
    monkeypatch.setattr(study, "STUDIES", {
        "toy": study.Study("Why?", ("point-angle-0",), {"best": "point:1", "mixed": "point:all"}, seeds=2),
    })  # fmt: skip
    base = tmp_path / "runs"
    cells, _ = study.cells_of("toy", base, "cpu")
    source, data = cells["source point"], cells["data point"]
    source.done.parent.mkdir(parents=True)
    source.done.touch()
    records = [
        {
            "step": step,
            "eval/min_w": step / 10,
            "eval/smallest_w": step / 20,
            "eval/min_w_full": 3.0,
            "eval/disc_accuracy_held_out": 0.9,
            "eval/travel": [1, 2],
        }
        for step in (10, 20)
    ]
    write(source.runs / "log.jsonl", {"args": {}}, *records)
    one = lambda name, mean: {"parents": [{"name": name}], "mean_return": mean, "num_transitions": 700}
    scores = {
        "buffers": {"policy_00": {"score": 5.0}, "policy_01": {"score": 7.0}},
        "selections": {"top1": one("policy_01", 6.5), "all": one("policy_00", 6.0)},
    }
    write(data.done, scores)
    learner = cells["learn point-angle-0 point:1 mopo"]
    learner.runs.mkdir(parents=True)
    learner.done.touch()
    evaluations = [
        {"step": step, "seed": seed, "eval/return": 10.0 * step + seed, "eval/return_data_length": 1.0 * step + seed}
        for step in (100, 200)
        for seed in (0, 1)
    ]
    evaluations += [{"step": step, "seed": 1, "train/q": 0.1 * step} for step in (50, 100, 200)]  # seed 0 has none
    write(learner.runs / "log.jsonl", {"args": {}}, {"step": 1, "seed": 0, "model/idle": 0}, *evaluations)
    for cell in (source, data, learner):
        write(study.record_file(cell, base), {"command": cell.command, "seconds": 5})
    return base, tmp_path / "results"


def test_gathered_rows_are_exact(made):
    base, results = made
    assert study.gather("toy", base, "cpu", results)
    header, *rows = [json.loads(line) for line in (results / "toy.jsonl").read_text().splitlines()]
    assert header["missing"] == ["learn point-angle-0 point:all mopo"]
    assert set(header["cells"]) == {"source point", "data point", "learn point-angle-0 point:1 mopo"}
    assert header["cells"]["source point"]["command"] == f"python wurl_sac.py --task point --out {base}/sources/point"
    assert header["picks"] == {"best": "point:1", "mixed": "point:all"} and header["seeds"] == 2
    last = {"step": 20, "eval/min_w": 2.0, "eval/smallest_w": 1.0, "eval/min_w_full": 3.0}
    last["eval/disc_accuracy_held_out"] = 0.9
    curves = {"min_w": [[10, 1.0], [20, 2.0]], "smallest_w": [[10, 0.5], [20, 1.0]], "smallest_w_full": []}
    about = {
        "task": "point-angle-0", "label": "best", "pick": "point:1", "learner": "mopo", "data_mean": 6.5,
        "data_rows": 700, "chosen": ["policy_01"], "scores": {"policy_00": 5.0, "policy_01": 7.0}, "steps": [100, 200],
    }  # fmt: skip
    assert rows == [
        {
            "source": "point",
            "last": last,
            "each": {"eval/travel": [1, 2]},
            **curves,
            "min_w_full": [[10, 3.0], [20, 3.0]],
            "disc_accuracy_held_out": [[10, 0.9], [20, 0.9]],
        },
        {**about, "seed": 0, "returns": [1000.0, 2000.0], "returns_data_length": [100.0, 200.0]},
        {**about, "seed": 1, "returns": [1001.0, 2001.0], "returns_data_length": [101.0, 201.0], "q": [10.0, 20.0]},
    ]


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


def test_pictures_of_wanted_sources_are_kept(made, monkeypatch):
    base, results = made
    monkeypatch.setitem(study.STUDIES, "toy", study.Study("Why?", sources=("point",)))
    picture = study.cells_of("toy", base, "cpu")[0]["source point"].runs / "trajectories.png"
    picture.write_bytes(b"a picture")
    assert study.gather("toy", base, "cpu", results)
    assert (results / "toy-point.png").read_bytes() == b"a picture"


def test_a_learner_without_its_selection_is_left_out(made):
    base, results = made
    study.record_file(study.cells_of("toy", base, "cpu")[0]["data point"], base).unlink()
    assert study.gather("toy", base, "cpu", results)
    assert not any("learner" in json.loads(line) for line in (results / "toy.jsonl").read_text().splitlines())


def test_commit_and_versions_are_those_a_run_began_with(made, capsys):
    base, results = made
    cells = study.cells_of("toy", base, "cpu")[0]
    log = cells["learn point-angle-0 point:1 mopo"].runs / "log.jsonl"
    log.write_text(log.read_text().replace('{"args": {}}', '{"args": {}, "commit": "then", "versions": {"jax": "1"}}'))
    write(study.record_file(cells["learn point-angle-0 point:1 mopo"], base),
          {"command": cells["learn point-angle-0 point:1 mopo"].command, "commit": "now"})  # fmt: skip
    study.gather("toy", base, "cpu", results)
    known = json.loads((results / "toy.jsonl").read_text().splitlines()[0])["cells"]["learn point-angle-0 point:1 mopo"]
    assert known["commit"] == "then" and known["versions"] == {"jax": "1"}
    one = {"commit": "a"}
    for cells, told in (({"learn x": one, "learn y": {"commit": "b"}}, True), ({"learn x": one, "source": {}}, False)):
        text = figures(results / "..", capsys, [row("t1", "a", 1.0)], name="two", cells=cells)[1]
        assert ("ran at 2 commits" in text) == told


def test_results_of_cells_that_are_not_here_are_kept(made, capsys):
    """A fresh clone has committed results and no cells: gathering must not empty them."""
    base, results = made
    study.gather("toy", base, "cpu", results)
    before = (results / "toy.jsonl").read_text()
    study.record_file(study.cells_of("toy", base, "cpu")[0]["source point"], base).unlink()
    assert not study.gather("toy", base, "cpu", results)
    assert (results / "toy.jsonl").read_text() == before
    assert "3 of its cells are not made here, e.g. source point; --force" in capsys.readouterr().out
    assert study.gather("toy", base, "cpu", results, force=True)
    assert json.loads((results / "toy.jsonl").read_text().splitlines()[0])["missing"][0] == "source point"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A study of two sources, two selections of the first, a W1 of both; a results file of another machine with all of
    it but for one learner -> a function that makes it here, and what it made.
    """
    made, machine, content = [], [1.0], {"a": "rows of a", "b": "rows of b"}
    base, results = tmp_path / "runs", tmp_path / "results"
    file = lambda name: base / f"{name}.npz"
    needs = {
        "source a": [], "source b": [], "data 0": ["source a"], "data 1": ["source a"],
        "w1 t": ["source a", "source b"], "learn t 0 mopo": ["data 0"], "learn t 1 mopo": ["data 1"],
    }  # fmt: skip

    def cell(name):
        reads = tuple(map(file, needs[name]))
        return Cell(name, [name], file(name), tuple(needs[name]), None, reads)

    cells = {name: cell(name) for name in needs}
    learning = [("t", f"label {pick}", pick, "mopo", cells[f"learn t {pick} mopo"]) for pick in "01"]

    def run_cells(todo, base, jobs):
        """Each has as rows what it read, or its own letter's content; a missing file is an error."""
        for name, cell in todo.items():
            if study.is_done(cell, base):
                continue
            rows = "".join(json.loads(str(np.load(path)["metadata_json"]))["sha256"]["x"] for path in cell.reads)
            cell.done.parent.mkdir(parents=True, exist_ok=True)
            digest = {"sha256": {"x": rows or content[name[-1]]}}
            np.savez(cell.done, metadata_json=json.dumps(digest))
            study.write_record(cell, base, {"seconds": 1})
            made.append(name)
        return set(), ""

    row = lambda seed, value: {"seed": seed, "steps": [1], "returns": [value], "returns_data_length": [value]}
    monkeypatch.setattr(study, "STUDIES", {"toy": study.Study("Why?", ("t",), {"label 0": "0", "label 1": "1"})})
    monkeypatch.setattr(study, "cells_of", lambda *_: (cells, learning))
    monkeypatch.setattr(study, "run_cells", run_cells)
    monkeypatch.setattr(study, "source_row", lambda cell: {"source": cell.name.split()[1]})
    monkeypatch.setattr(study, "w1_row", lambda cell: {"task": "t", "w1": {}})
    monkeypatch.setattr(study, "data_row", lambda path: {})
    monkeypatch.setattr(study, "data_file", lambda *_: Path())
    monkeypatch.setattr(study, "learner_rows", lambda folder: [row(seed, machine[-1]) for seed in (0, 1)])
    assert study.make("toy", base, "cpu", 1, results, False) == (set(), "") and len(made) == len(cells)
    study.record_file(cells["learn t 1 mopo"], base).unlink()
    assert study.gather("toy", base, "cpu", results)
    shutil.rmtree(base)
    made.clear()
    machine.append(2.0)

    def again(**other):
        content.update(other)
        assert study.make("toy", base, "cpu", 1, results, True) == (set(), "")
        kept = study.gather("toy", base, "cpu", results, keep=True)
        header, *rows = [json.loads(line) for line in (results / "toy.jsonl").read_text().splitlines()]
        return kept, header["missing"], rows

    again.cells, again.base = cells, base
    return again, made


def test_what_is_known_is_not_made_again(elsewhere):
    again, made = elsewhere
    kept, missing, rows = again()
    # With source a made anew, W1 to source b is of unknown rows until b is there, too.
    assert made == ["source a", "data 1", "learn t 1 mopo", "source b", "w1 t"] and kept and not missing
    about = [(row.get("source"), row.get("label"), row.get("returns")) for row in rows]
    first, second = ("label 0", [1.0]), ("label 1", [2.0])
    assert about == [("a", None, None), ("b", None, None), (None, None, None)] + [
        (None, *learner) for learner in (first, first, second, second)
    ]
    made.clear()
    assert again() == (kept, missing, rows) and not made


def test_other_rows_are_no_substitute(elsewhere):
    """A source that was made anew with other rows takes everything with it that the results have from the old ones."""
    again, made = elsewhere
    kept, missing, rows = again(a="other rows")
    assert kept and not missing and sorted(made) == sorted(again.cells)
    assert [row["returns"] for row in rows if "label" in row] == [[2.0]] * 4


def test_a_learner_whose_data_are_gone_keeps_its_rows(elsewhere):
    again, made = elsewhere
    _, _, rows = again()
    again.cells["data 1"].done.unlink()
    made.clear()
    assert again() == (True, [], rows) and not made


def test_another_command_is_no_substitute(elsewhere):
    again, made = elsewhere
    again.cells["w1 t"].command.append("--more")
    assert again()[0] and made == ["source a", "source b", "data 1", "w1 t", "learn t 1 mopo"]


def test_results_of_another_command_are_not_overwritten(elsewhere, capsys, tmp_path):
    again, _ = elsewhere
    again.cells["w1 t"].command.append("--more")
    before = (tmp_path / "results" / "toy.jsonl").read_text()
    assert not study.gather("toy", again.base, "cpu", tmp_path / "results", keep=True)
    assert "another command or other rows than those here, e.g. w1 t" in capsys.readouterr().out
    assert (tmp_path / "results" / "toy.jsonl").read_text() == before


def test_cells_made_by_hand_count_where_their_flags_are_the_commands(tmp_path, capsys):
    base = tmp_path / "base"
    cells = {name: study.source_cell(base, name, "cpu") for name in ("point-random", "point-k2", "point")}
    for cell, changes in zip(cells.values(), ({}, {"seed": 3}, None), strict=True):
        cell.done.parent.mkdir(parents=True)
        cell.done.touch()
        args = dataclasses.asdict(wurl_sac.parse_args(cell.command[1:], wurl_sac.wurl_preset))
        del args["keep_policies"]  # a flag that is younger than the cell
        if changes is not None:
            write(cell.runs / "args.json", args | changes)
    study.adopt(cells, base)
    assert [study.is_done(cell, base) for cell in cells.values()] == [True, False, False]
    out = capsys.readouterr().out
    assert "source point-k2: made by another command (seed differ)" in out and "source point:" in out


def test_cells_from_other_rows_do_not_count(tmp_path, capsys):
    """Same flags, but the selection was made of another source's buffers, or the learner learnt from another file."""
    base, wanted = tmp_path / "base", study.STUDIES["learners-point"]
    data = study.data_cells(base, wanted, "cpu")["data point"]
    learner = study.learner_cell(base, wanted, "point-angle-60", "point:1", "dac", "cpu")
    digests = write_buffer(learner.reads[0], "point-angle-60")
    buffer = data.reads[0] / "policy_00.npz"
    write_buffer(buffer, "point-angle-60")
    sha = study.udg_select.file_sha256(buffer)
    flags = udg_select.portable_flags(tyro.cli(udg_select.Args, args=data.command[1:]))
    learner.done.parent.mkdir(parents=True)
    learner.done.touch()
    write(learner.runs / "args.json", study.flags_of(learner))
    for parent, rows, counts in (("0" * 64, ["1"], False), (sha, digests, True)):
        write(
            data.done, {"flags": flags, "selections": {"top1": {"parents": [{"name": "policy_00", "sha256": parent}]}}}
        )
        np.savez(learner.runs / "state.npz", meta_json=json.dumps({"identity": {"data": rows}}))
        study.adopt({"data": data, "learner": learner}, base)
        assert [study.is_done(cell, base) for cell in (data, learner)] == [counts, counts]
        assert capsys.readouterr().out.count("made from other rows: it does not count") == 2 * (not counts)
    record = study.record_file(learner, base)
    write(record, {"command": learner.command})  # as records were before they had rows
    study.adopt({"learner": learner}, base)
    assert study.read_record(learner, base)["reads"] == study.fingerprint(learner)
    learner.reads[0].unlink()
    write_buffer(learner.reads[0], "point-angle-60", value=1.0)
    assert not study.is_done(learner, base)


# --- figures and tables -------------------------------------------------------------------------


def row(task, label, score, seed=0, **fields):
    """A learner's row whose last five evaluations have the mean `score`; the first one must not count."""
    short = [1000.0, score - 2, score + 2, score, score - 1, score + 1]
    about = {"task": task, "label": label, "pick": f"{label}:1", "learner": "mopo", "seed": seed, "data_mean": 1.0}
    about |= {"chosen": ["policy_00"], "scores": {"policy_00": 0.0}, "steps": list(range(6))}
    return {**about, "returns": [10 * x for x in short], "returns_data_length": short, **fields}


def figures(tmp_path, capsys, rows, name="toy", **header):
    """Draw one study -> its tables as {first words of a line: cells}, the whole text, {name: picture}."""
    about = {"study": name, "question": "Why?", "budget": "cpu", "seeds": 1, "missing": [], "cells": {}}
    write(tmp_path / f"{name}.jsonl", about | header, *rows)
    udg_figures.main([name, "--folder", str(tmp_path)])
    text = capsys.readouterr().out
    table = {}
    for line in text.splitlines():
        if line.startswith("|"):
            first, *rest = [cell.strip() for cell in line.strip("|").split("|")]
            table.setdefault(first, rest)
    return table, text, {path.name: plt.imread(path) for path in tmp_path.glob("*.png")}


def is_drawn(picture):
    """Whether a picture has more on it than a white sheet with axes: colours, in more than a speck."""
    color = np.ptp(picture[..., :3], axis=-1) > 0.2
    return picture.shape[0] > 300 and picture.shape[1] > 500 and color.sum() > 50


def test_scores_and_spread(tmp_path, capsys):
    rows = [row("t1", "a", 10.0 + 2 * s, s) for s in range(3)] + [row("t1", "b", 5.0 + s, s) for s in range(3)]
    rows += [row("t2", "a", 20.0, s) for s in range(3)] + [row("t2", "b", 30.0, s) for s in range(3)]
    table, text, pictures = figures(tmp_path, capsys, rows, seeds=3)
    assert table["t1"] == ["12.0 +- 1.6", "6.0 +- 0.8"]  # sqrt(8 / 3), sqrt(2 / 3)
    assert table["t2"] == ["20.0 +- 0.0", "30.0 +- 0.0"]
    means = [cell.split(" [")[0] for cell in table["mean over tasks"]]
    assert means == ["16.0", "18.0"]
    assert [cell.split(" [")[0] for cell in table["worst task"]] == ["12.0", "6.0"]
    assert table["b over a"][:2] == ["1 of 2", "0.50"] and table["b over a"][2].startswith("2.0 [")
    assert table["b over a"][3] == "-6.0 to 10.0"
    assert table["a"] == ["16.0", "17.0", "1000.0", "160.0", "1.0"], "score, last, best, whole evaluation, data"
    assert "3 seeds of the learner; 6 evaluations a run, the score is of the last 5" in text
    assert set(pictures) == {"toy.png"} and is_drawn(pictures["toy.png"])


def test_every_learner_has_its_tables(tmp_path, capsys):
    """Learners are never averaged with one another: what one gains must not decide for the others."""
    rows = [
        row(task, label, base + 10 * (label == "a"), learner="bc")
        for task, base in (("t1", 0), ("t2", 4))
        for label in "ab"
    ]
    rows += [row("t1", "a", 20.0), row("t2", "a", 22.0), row("t1", "b", 23.0), row("t1", "b", 25.0, 1)]
    about = {"tasks": ["t1", "t2"], "picks": {"a": "x:1", "b": "y:1"}, "learners": ["mopo", "bc"]}
    table, text, pictures = figures(tmp_path, capsys, rows, **about)
    assert table["mopo"] == ["21.0 (20.0)", "missing"] and table["bc"] == ["12.0 (10.0)", "2.0 (0.0)"]
    assert table["mean episode of the data"] == ["1.0 (1.0)"] * 2
    of_mopo, of_bc = text.split("### mopo")[1].split("### bc")
    assert "| b over a | 1 of 1 |" in of_mopo and "| a over b | 2 of 2 | 1.00 | 10.0 |" in of_bc
    assert "| t1 | 20.0 | 24.0 +- 1.0 |" in of_mopo and "| t1 | 10.0 | 0.0 |" in of_bc
    assert is_drawn(pictures["toy.png"])


def test_missing_cells_are_called_missing(tmp_path, capsys):
    rows = [row("t1", "a", 10.0), row("t2", "a", 20.0), row("t2", "b", 7.0)]
    plan = {
        "tasks": ["t1", "t2"],
        "picks": {"a": "a:1", "b": "b:1", "c": "c:1"},
        "missing": ["learn t1 b:1 mopo", "..."],
    }
    table, text, pictures = figures(tmp_path, capsys, rows, **plan)
    assert table["t1"] == ["10.0", "missing", "missing"] and table["t2"] == ["20.0", "7.0", "missing"]
    assert table["mean over tasks"] == ["15.0", "missing", "missing"], "no mean over half the tasks"
    assert table["a over b"] == ["1 of 1", "1.00", "13.0", "13.0 to 13.0"], "no interval from one seed"
    assert "Not made yet: 2 cells, e.g. learn t1 b:1 mopo" in text
    assert table["b"] == ["missing"] * 5, "nor one beside a mean over all"
    whole = figures(tmp_path, capsys, [*rows, row("t1", "b", 8.0), row("t1", "c", 8.0), row("t2", "c", 8.0)], **plan)[2]
    assert is_drawn(pictures["toy.png"]) and not np.array_equal(pictures["toy.png"], whole["toy.png"])


def test_luck_of_the_source_beside_that_of_the_learner(tmp_path, capsys):
    """Sources 10 and 20 on one task, 30 and 30 on the other; their learners' seeds 1 to both sides."""
    means = {"t1": (10.0, 20.0), "t2": (30.0, 30.0)}
    rows = [
        row(task, f"seed {i}", value + move, (move + 1) // 2)
        for task, values in means.items()
        for i, value in enumerate(values)
        for move in (-1, 1)
    ]
    text = figures(tmp_path, capsys, rows, seeds=2)[1]
    assert "over 2 tasks: of a learner's seeds 1.4, of the sources' means 5.0;" in text  # sqrt(2), sqrt((50 + 0) / 2)
    assert "without the seeds' share of that: 4.9." in text  # sqrt(25 - 2 / 2)


def test_nothing_made_draws_nothing(tmp_path, capsys):
    _, text, pictures = figures(tmp_path, capsys, [], missing=["source humanoid"])
    assert "Nothing to draw yet" in text and not pictures


def test_chance_above_counts_ties_half():
    assert udg_figures.chance_above([1, 2, 3], [2, 2, 2]) == pytest.approx(0.5)
    assert udg_figures.chance_above([3, 4], [1, 3]) == pytest.approx(0.875)
    assert udg_figures.chance_above([1.0], [1.0]) == 0.5


def test_intervals_are_those_of_all_resamples():
    """Three seeds have 27 resamples, two labels 729 pairs of them: the exact quantiles are known."""
    a, b = [3.0, 5.0, 10.0], [0.0, 1.0, 4.0]
    exact = functools.partial(np.quantile, q=[0.025, 0.975], method="inverted_cdf")
    means = lambda x: np.array([np.mean(draw) for draw in itertools.product(x, repeat=3)])
    text = udg_figures.over_tasks([a])[0]
    assert [float(x) for x in re.findall(r"-?\d+\.\d", text)] == [6.0, *exact(means(a))] == [6.0, 3.0, 10.0]
    ((_, _, chance, difference, _),) = udg_figures.orderings({"t": {"a": a, "b": b}}, ["b", "a"])
    assert chance == "0.89"  # 8 of the 9 pairs
    found = [float(x) for x in re.findall(r"-?\d+\.\d", difference)]
    assert found[0] == 4.3
    np.testing.assert_allclose(found[1:], exact(np.subtract.outer(means(a), means(b))), atol=0.4)
    same = udg_figures.orderings({"t": {"a": a, "b": a}}, ["a", "b"])[0][3]
    assert same != "0.0 [0.0, 0.0]", "two labels are drawn apart, not as pairs"


@pytest.mark.parametrize("x, gain, rank, lost, differ", [
    ([1.0, 2, 3, 4], [10.0, 20, 30, 40], 1.0, 0.0, 0.0),
    ([4.0, 3, 2, 1], [10.0, 20, 30, 40], -1.0, 30.0, 1.0),
    ([1.0, 1, 2], [1.0, 2, 3], 0.866, 0.0, 0.0),  # ties share the mean rank: 1.5, 1.5, 3
    ([1.0, 3, 2], [5.0, 4, 7], -0.5, 3.0, 1.0),
    ([2.0, 2, 2], [1.0, 2, 3], np.nan, 2.0, 1.0),
])  # fmt: skip
def test_rank_correlation_and_what_is_lost(x, gain, rank, lost, differ):
    found = udg_figures.judge(np.array(x), np.array(gain)[:, None])
    np.testing.assert_allclose(found, (rank, lost, differ), atol=1e-3)


def test_the_best_buffer_is_judged_by_other_seeds():
    """Ten buffers that are all the same: whoever is followed loses nothing on average, and the best is luck."""
    rng, lost, naive = np.random.default_rng(0), [], []
    for _ in range(300):
        gain = rng.normal(size=(10, 3))
        _, loss, differ = udg_figures.judge(np.arange(10.0), gain)
        lost, naive = [*lost, loss], [*naive, gain.mean(1).max() - gain[9].mean()]
        assert differ in (0, 1 / 3, 2 / 3, 1)
    assert abs(np.mean(lost)) < 0.15 < 0.7 < np.mean(naive)
    gain = np.array([[1.0, 1, 9], [2, 2, 2], [0, 0, 0]])
    # left out: the third seed, and buffer 1 is the best; the first or second, and it is buffer 0
    np.testing.assert_allclose(udg_figures.judge(np.array([0.0, 1, 0]), gain)[1:], ((1 - 2 + 1 - 2 + 0) / 3, 2 / 3))
    rank, lost, differ = udg_figures.judge_seeds(gain)
    np.testing.assert_allclose((lost, differ), ((3 + 3 + 1) / 3, 1.0))
    assert rank == pytest.approx((0.5 + 0.5 + 0.5) / 3)


def bound_rows():
    """Two tasks, three buffers. Return picks the best on t1 and misses it on t2, where it differs from W1."""
    gains = {"t1": (90.0, 50.0, 10.0), "t2": (80.0, 70.0, 20.0)}
    returns = {"t1": (60.0, 30.0, 0.0), "t2": (10.0, 40.0, 5.0)}
    near = {"t1": (0.1, 0.2, 0.3), "t2": (0.1, 0.2, 0.3)}
    far = {"t1": (1.0, 2.0, 3.0), "t2": (3.0, 2.0, 1.0)}
    for task in gains:
        spaces = {"(s, a), standardised": near[task], "features": far[task]}
        w1 = {space: {f"policy_{k:02d}": v for k, v in enumerate(values)} for space, values in spaces.items()}
        yield {"task": task, "w1": w1, "floor": {"(s, a), standardised": 0.05, "features": 0.5}}
        for k, seed in itertools.product(range(3), (0, 1)):
            name = f"policy_{k:02d}"
            chosen = {"chosen": [name], "scores": {name: returns[task][k]}}
            yield row(task, f"policy {k}", gains[task][k] + (2 * seed - 1), seed, **chosen)  # seeds: mean unchanged


def test_bound_counts_misaligned_returns(tmp_path, capsys):
    _, text, pictures = figures(tmp_path, capsys, bound_rows(), seeds=2)
    assert "the relabelled return and W1 to the expert, (s, a), standardised choose different buffers in 1 of 2" in text
    assert "the relabelled return and W1 to the expert, features choose different buffers in 1 of 2" in text
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "| mopo" in line]
    assert lines == [
        ["mopo", "W1 to the expert, (s, a), standardised", "1.00", "1.00", "0%", "0.0", "0.0"],
        ["mopo", "W1 to the expert, features", "0.00", "-1.00", "50%", "30.0", "60.0"],
        ["mopo", "mean relabelled return", "0.75", "0.50", "50%", "5.0", "10.0"],
        ["mopo", "a seed of the learner itself", "1.00", "1.00", "0%", "0.0", "0.0"],
    ]
    assert is_drawn(pictures["toy.png"])


def test_bound_with_half_its_cells(tmp_path, capsys):
    """A buffer without a learner is left out of the ranks; a task without any is not counted."""
    rows = [r for r in bound_rows() if not (r.get("task") == "t2" and "learner" in r)]
    rows = [r for r in rows if r.get("label") != "policy 0"]
    _, text, pictures = figures(tmp_path, capsys, rows)
    assert "in 0 of 1 tasks" in text and is_drawn(pictures["toy.png"])


def test_against_the_number_of_policies(tmp_path, capsys):
    every = itertools.product((2, 5), enumerate(("t1", "t2")), range(3))
    rows = [row(task, f"K={k}", 10.0 * k - i, seed) for k, (i, task), seed in every]
    cells = {f"source K={k}": {"seconds": 60 * k, "resumed": False} for k in (2, 5)}
    table, _, pictures = figures(tmp_path, capsys, rows, seeds=3, cells=cells)
    assert table["worst task"] == ["19.0 [19.0, 19.0]", "49.0 [49.0, 49.0]"]
    assert table["K=5 over K=2"][:3] == ["2 of 2", "1.00", "30.0 [30.0, 30.0]"]
    assert is_drawn(pictures["toy.png"])


@pytest.mark.parametrize("cells, drawn", [
    ({2: {"seconds": 60}, 5: {"seconds": 600, "cpu_seconds": 90}}, ([5], [1.5])),  # a shared machine's minutes left out
    ({2: {"seconds": 60}, 5: {"seconds": 600}}, ([2, 5], [1.0, 10.0])),
    ({2: {"seconds": 60, "cpu_seconds": 30}, 5: {"seconds": 9, "cpu_seconds": 9, "resumed": True}}, ([2], [0.5])),
])  # fmt: skip
def test_cost_is_processor_time_where_it_is_known(tmp_path, monkeypatch, cells, drawn):
    """The right panel's line, K and minutes."""
    lines = []
    monkeypatch.setattr(udg_figures, "save", lambda drawn, path: lines.extend(drawn.axes[1].lines))
    rows = [row("t1", f"K={k}", 1.0, seed) | {"score": 1.0} for k in cells for seed in range(3)]
    cells = {f"source K={k}": {"resumed": False, **v} for k, v in cells.items()}
    header = {"study": "toy", "seeds": 3, "tasks": ("t1",), "picks": {}, "cells": cells}
    udg_figures.against_number(tmp_path / "x.png", header, rows)
    assert (list(lines[0].get_xdata()), list(lines[0].get_ydata())) == drawn


@pytest.fixture
def kept_figures(monkeypatch):
    """Figures that would have been written, by name of file."""
    kept = {}
    monkeypatch.setattr(udg_figures, "save", lambda drawn, path: kept.update({path.name: drawn}))
    yield kept
    plt.close("all")


def test_a_selection_has_one_look_in_every_study(tmp_path, kept_figures):
    """The colour of `random` is the same beside two other picks and beside four."""
    looks = []
    for labels in (("top1", "random"), ("top1", "top2", "all", "supervised", "random")):
        rows = [row("t1", label, float(i)) for i, label in enumerate(labels)]
        udg_figures.dots(tmp_path / "x.png", {"study": "toy", "question": "Why?", "seeds": 1}, scored(rows))
        legend = kept_figures["x.png"].legends[0]
        marks = [(handle.get_color(), handle.get_marker()) for handle in legend.legend_handles]
        looks.append(dict(zip((text.get_text() for text in legend.get_texts()), marks, strict=True)))
    assert looks[0]["random"] == looks[1]["random"] and looks[0]["top 1"] == looks[1]["top 1"]
    assert len(set(looks[1].values())) == len(looks[1]) == 6, "five picks and the mean episode of the data"


def test_several_learners_have_a_line_each_against_the_number(tmp_path, kept_figures):
    """Means over two tasks that lie 2 apart; the data's is the broken line; cloning, without K=5, is drawn at K=2."""

    def of(learner, k, value):
        tasks = (("t1", -1.0), ("t2", 1.0))
        return [row(t, f"K={k}", value + d, learner=learner, data_mean=k + 3 * d) for t, d in tasks]

    rows = [("mopo", 2, 10.0), ("mopo", 5, 20.0), ("cped", 2, 9.0), ("cped", 5, 8.0), ("bc", 2, 1.0)]
    rows = scored(itertools.chain.from_iterable(of(*x) for x in rows))
    cells = {f"source K={k}": {"seconds": 60 * k, "resumed": False} for k in (2, 5)}
    header = {"study": "toy", "seeds": 1, "tasks": ("t1", "t2"), "picks": {}, "cells": cells}
    udg_figures.against_number(tmp_path / "x.png", header, rows)
    axis = kept_figures["x.png"].axes[0]
    drawn = {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in axis.containers}
    assert drawn == {"MOPO": [[2, 10], [5, 20]], "CPED": [[2, 9], [5, 8]], "cloning": [[2, 1]]}
    broken = [line.get_xydata().tolist() for line in axis.lines if line.get_linestyle() == "--"]
    assert broken == [[[2, 2], [5, 5]]] and "missing" in axis.get_title(loc="left")
    # A task that has no rows yet: there is no mean over tasks to draw.
    udg_figures.against_number(tmp_path / "x.png", header | {"tasks": ("t1", "t2", "t3")}, rows)
    axis = kept_figures["x.png"].axes[0]
    assert not any(len(bars.lines[0].get_xdata()) for bars in axis.containers)


@pytest.mark.parametrize("learners, columns", [
    (("mopo-fast", "mopo-critics", "cped"), 2), (("mopo-fast", "cped"), 1), (("cped",), 0),
])  # fmt: skip
def test_values_over_time_stand_over_the_returns(tmp_path, kept_figures, capsys, learners, columns):
    """Of the study cheetah, MOPO's learners only, on the jump, and only those that were gathered with their Q."""
    q = {"mopo-fast": [1.0, 50.0], "mopo-critics": [1.0, -3.0], "cped": [7.0, 8.0]}
    curve = {"steps": [1, 2], "returns_data_length": [5.0, 6.0]}
    rows = [row(task, "z", 0.0, learner=name) | curve | {"q": q[name]}
            for task in ("cheetah-jump", "cheetah-crawl") for name in learners]  # fmt: skip
    rows.append(row("cheetah-jump", "random", 0.0, learner=learners[0]) | curve)  # from before Q was kept
    header = {"study": "cheetah", "question": "Why?", "seeds": 1, "missing": [], "cells": {}, "learners": learners}
    (tmp_path / "cheetah.jsonl").write_text("\n".join(map(json.dumps, [header, *rows])))
    udg_figures.draw(tmp_path / "cheetah.jsonl")
    assert ("cheetah-q.png" in kept_figures) == (columns > 0) and "cheetah.png" in kept_figures
    if columns:
        found = [list(axis.lines[0].get_ydata()) for axis in kept_figures["cheetah-q.png"].axes]
        assert found == [[1.0, 50.0], [1.0, -3.0]][:columns] + [[5.0, 6.0]] * columns
        (legend,) = kept_figures["cheetah-q.png"].legends
        assert [text.get_text() for text in legend.get_texts()] == ["z"]


def scored(rows):
    return [{**row, "score": float(np.mean(row["returns_data_length"][-5:]))} for row in rows]


def test_learners_have_groups_and_tasks_have_panels(tmp_path, kept_figures):
    rows = [row(task, "top1", 1.0, learner=name) for task in ("t1", "t2") for name in ("mopo", "bc")]
    header = {"study": "toy", "question": "Why?", "seeds": 1, "learners": ("mopo", "bc")}
    udg_figures.dots(tmp_path / "x.png", header, scored(rows))
    axes = kept_figures["x.png"].axes
    assert [axis.get_xlabel() for axis in axes] == ["t1", "t2"]
    assert [[text.get_text() for text in axis.get_xticklabels()] for axis in axes] == [["MOPO", "cloning"]] * 2


def test_far_means_of_the_data_have_their_own_axis(tmp_path, kept_figures):
    """Learners one apart and data a hundred apart on one axis would be a flat line."""
    for far, panels in ((1.0, 1), (100.0, 2)):
        rows = [row("t1", "top1", 10.0), row("t1", "all", 11.0, data_mean=1.0 + far)]
        udg_figures.dots(tmp_path / "x.png", {"study": "toy", "question": "Why?", "seeds": 1}, scored(rows))
        axes = kept_figures["x.png"].axes
        assert len(axes) == panels
        heights = [float(line.get_ydata()[0]) for line in axes[-1].lines if len(line.get_xdata()) == 2]
        assert {1.0, 1.0 + far} <= set(heights)
        low, high = axes[0].get_ylim()
        assert high - low < 15


def test_an_expert_is_drawn_where_it_is_known(tmp_path, kept_figures):
    reference = json.loads((ROOT / "envs" / "reference_scores.json").read_text())["tasks"]
    for task, near in (("point-angle-300", 90.0), ("ant-angle-60", 200.0), ("t1", 5.0)):
        rows = [row(task, "top1", near), row(task, "random", near / 2)]
        udg_figures.dots(tmp_path / "x.png", {"study": "toy", "question": "Why?", "seeds": 1}, scored(rows))
        lines = [line for line in kept_figures["x.png"].axes[0].lines if line.get_linestyle() == ":"]
        mirrored = reference.get(task)
        found = reference[mirrored] if isinstance(mirrored, str) else mirrored
        assert [line.get_ydata()[0] for line in lines] == ([found["expert_data_length"]] if found else [])
    assert udg_figures.expert_return("t1") is None


@pytest.mark.parametrize("scales, drawn", [(("1 1", "1 1"), 3.0), (("1 1", "1 10"), 7.0)])
def test_distances_are_drawn_in_a_space_that_sources_share(tmp_path, kept_figures, scales, drawn):
    rows = {name: source(name, (3.0,) * 3, (3.0,) * 3) for name in "ab"}
    rows = {k: row | {"min_w_full": [[1, 7.0]], "smallest_w_full": [[1, 7.0]]} for k, row in rows.items()}
    cells = {f"source {name}": {"command": f"python wurl_sac.py --feature-scales {scale} --task point"}
             for name, scale in zip("ab", scales, strict=True)}  # fmt: skip
    udg_figures.distances_over_time(tmp_path / "x.png", {"study": "toy", "cells": cells}, rows)
    lines = kept_figures["x.png"].axes[0].lines
    assert [line.get_ydata()[0] for line in lines] == [drawn] * 2


def source(name, mean, smallest, accuracy=(0.9, 0.9, 0.9), K=10):
    """A source's row; numbers per evaluation."""
    curve = lambda values: [[100 * (i + 1), value] for i, value in enumerate(values)]
    last = {"eval/min_w": mean[-1], "eval/smallest_w": smallest[-1], "eval/distinct_nearest": 4.0}
    curves = {"min_w": mean, "smallest_w": smallest, "disc_accuracy_held_out": accuracy}
    each = {"eval/travel": list(range(K)), "eval/length": [20.0 + k for k in range(K)]}
    row = {"source": name, "last": last, "each": each, "min_w_full": []}
    return row | {key: curve(values) for key, values in curves.items()}


def test_collapse_is_seen_where_it_was(tmp_path, capsys):
    four, three = (4.0, 4.0, 4.0), (3.0, 3.0, 3.0)
    late, merging = (3.0, 3.0, 0.9), (0.9, 0.54, 0.3)
    rows = [source("apart", four, three), source("late", four, late), source("mended", four, (0.9, 1.0, 3.0)),
            source("shared", four, three, merging), source("both", four, late, merging)]  # fmt: skip
    _, text, pictures = figures(tmp_path, capsys, rows)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    table = {line[0]: line[1:] for line in lines if len(line) == 13}
    assert table["apart"][:2] == ["4", "3"] and table["apart"][-4:] == ["9.0 of 10", "no", "0 of 3", "0 of 3"]
    assert table["late"][-3:] == ["coincide", "1 of 3", "0 of 3"] and table["mended"][-3:] == ["no", "1 of 3", "0 of 3"]
    assert table["shared"][-4:] == ["3.0 of 10", "few", "0 of 3", "2 of 3"]
    assert table["both"][-3:] == ["coincide and few", "1 of 3", "2 of 3"]
    assert ["apart", "20, 24.5, 29", "0, 4.5, 9", "-"] in lines
    assert set(pictures) == {"toy-diversity.png"} and is_drawn(pictures["toy-diversity.png"])


def test_figures_find_a_collapse_where_wurl_sac_warns():
    for K, smallest, accuracy in itertools.product((2, 10, 20), (0.2, 0.3), np.linspace(0.05, 1, 20)):
        row = source("x", (1.0,) * 4, (smallest,) * 4, (accuracy,) * 4, K)
        args = wurl_sac.Args(task="point", num_policies=K, num_updates=400)
        metrics = {"eval/smallest_w": smallest, "eval/min_w": 1.0, "eval/disc_accuracy_held_out": accuracy}
        texts = [wurl_sac.collapse(metrics, step, args) for step in (100, 200, 300, 400)]
        coincide, few = udg_figures.collapsed(row)
        assert [bool(x) for x in texts] == list(coincide | few), (K, smallest, accuracy)
        assert ["coincide" in x for x in texts] == list(coincide)


def test_figures_name_what_there_is(tmp_path):
    with pytest.raises(SystemExit, match=r"no study in .*run benchmark/udg_study.py first"):
        udg_figures.main(["--folder", str(tmp_path)])
    write(tmp_path / "toy.jsonl", {})
    with pytest.raises(SystemExit, match=r"no bond in .*; there is toy"):
        udg_figures.main(["bond", "--folder", str(tmp_path)])


def test_what_the_studies_gather_can_be_drawn(made, capsys):
    base, results = made
    study.gather("toy", base, "cpu", results)
    udg_figures.main(["--folder", str(results)])
    out = capsys.readouterr().out
    assert "| point-angle-0 | 150.5 +- 0.5 | missing |" in out and "Not made yet: 1 cells" in out
    assert is_drawn(plt.imread(results / "toy.png"))
