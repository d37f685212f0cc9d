"""What studies, suite and reference scores share (benchmark/cells.py): real commands, tiny ones; then their own."""

import argparse
import collections
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tyro

import cells
import cped
import envs
import reference_scores
import runner
import suite
import udg_select
import udg_study
import wurl_sac
from cells import Cell
from envs import buffers
from envs.buffers import scripted
from envs.buffers.convert.common import file_sha256
from runner import log

ROOT = Path(__file__).resolve().parents[1]
NOTE = "import os, pathlib, sys; out = pathlib.Path(sys.argv[1]); out.parent.mkdir(parents=True, exist_ok=True)\n"
TRACE = "open(out.parent / 'trace', 'a').write(out.name + ' ')\n"


def tiny(tmp_path, name, *needs, code="out.write_text('x')", **fields):
    """A cell of a second or less: python -c, which notes that it ran and writes its file."""
    done = tmp_path / "cells" / name
    return Cell(name, ["-c", NOTE + TRACE + code, str(done)], done, needs, **fields)


def trace(tmp_path):
    return (tmp_path / "cells" / "trace").read_text().split()


def run(made, tmp_path, jobs=1):
    return cells.run_cells({cell.name: cell for cell in made}, tmp_path / "base", jobs)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def wait_for(path, seconds=120):
    end = time.time() + seconds
    while not (path.exists() and path.read_text()):
        assert time.time() < end, f"{path} never came"
        time.sleep(0.02)
    return path.read_text()


# --- running ------------------------------------------------------------------------------------


def test_runs_in_order_once(tmp_path, capsys):
    a, b, c = tiny(tmp_path, "a"), tiny(tmp_path, "b", "a"), tiny(tmp_path, "c", "a", "b")
    assert run([a, b, c], tmp_path) == (set(), "") and trace(tmp_path) == ["a", "b", "c"]
    assert "[3/3]" in capsys.readouterr().out
    record = cells.read_record(a, tmp_path / "base")
    assert record["command"] == a.command and record["resumed"] is False and record["versions"]
    changed = tiny(tmp_path, "b", "a", code="out.write_text('y')")
    assert run([a, changed, c, tiny(tmp_path, "d", "c")], tmp_path) == (set(), "")
    assert trace(tmp_path)[3:] == ["b", "d"], "what is done is skipped, another command is made again"
    assert changed.done.read_text() == "y"
    a.done.unlink()
    cells.record_file(c, tmp_path / "base").write_text('{"command": ["torn')
    assert run([a, changed, c], tmp_path) == (set(), "")
    assert trace(tmp_path)[5:] == ["a", "c"], "a lost file and a torn record are made again"


def test_a_failure_takes_what_needs_it_and_no_other(tmp_path, capsys):
    bad = tiny(tmp_path, "bad", code="sys.exit('no such reward')")
    silent = tiny(tmp_path, "silent", code="pass")  # exit 0, but its file is not there
    write(silent.done, "of another command, which must not pass for this one's")
    made = [bad, tiny(tmp_path, "child", "bad"), tiny(tmp_path, "grandchild", "child"), silent, tiny(tmp_path, "good")]
    assert run(made, tmp_path) == ({"bad", "child", "grandchild", "silent"}, "")
    assert trace(tmp_path) == ["bad", "silent", "good"] and not cells.is_done(bad, tmp_path / "base")
    out = capsys.readouterr().out
    assert "FAILED bad: exit 1: no such reward" in out and "left out child: it needs bad" in out
    assert "FAILED silent: exit 0" in out and "python -c" in out


def test_other_rows_make_what_read_them_anew(tmp_path):
    """Not the file's bytes count but its arrays: a selection for one task more does not cost every learner's run."""
    data, base = tmp_path / "data.npz", tmp_path / "base"
    write_data = lambda digest, flags: np.savez(data, metadata_json=json.dumps({"sha256": digest, "flags": flags}))
    reader = tiny(tmp_path, "reader", reads=(data,))
    write_data({"rewards": "1"}, "first")
    assert run([reader], tmp_path) == (set(), "")
    write_data({"rewards": "1"}, "second")
    assert cells.is_done(reader, base)
    write_data({"rewards": "2"}, "second")
    assert not cells.is_done(reader, base)
    assert run([reader], tmp_path) == (set(), "") and trace(tmp_path) == ["reader"] * 2
    data.unlink()
    assert cells.is_done(reader, base), "what was deleted to save space has not changed"


def test_a_run_goes_on_from_its_state(tmp_path):
    code = "(out.parent / 'run').mkdir(exist_ok=True); (out.parent / 'run' / 'state.npz').touch()\n"
    code += "out.write_text(sys.argv[-1]) if '--resume' in sys.argv else sys.exit('stopped')"
    cell = tiny(tmp_path, "learner", code=code, runs=tmp_path / "cells" / "run")
    assert run([cell], tmp_path) == ({"learner"}, "")
    assert run([cell], tmp_path) == (set(), "") and cell.done.read_text() == "--resume"
    assert cells.read_record(cell, tmp_path / "base")["resumed"] is True


def test_jobs_run_at_once_on_cores_of_their_own(tmp_path):
    """Each of two waits until the other has begun, which one after the other never would."""
    code = "import time; end = time.time() + 60; (out.parent / ('begun-' + out.name)).touch()\n"
    code += "while len(list(out.parent.glob('begun-*'))) < 2 and time.time() < end: time.sleep(0.02)\n"
    code += "out.write_text(f\"{len(list(out.parent.glob('begun-*')))} {os.sched_getaffinity(0)}\")"
    made = [tiny(tmp_path, name, code=code) for name in "ab"]
    assert run(made, tmp_path, jobs=2) == (set(), "")
    cores = sorted(os.sched_getaffinity(0))
    assert {cell.done.read_text() for cell in made} == {f"2 { {core} }" for core in (cores * 2)[:2]}


def test_a_cell_at_work_is_heard(tmp_path, monkeypatch, capsys):
    """It waits until its own second line was told."""
    monkeypatch.setattr(cells, "HEARD_EVERY", 0.05)
    told, say = tmp_path / "told", cells.tell_at_work
    code = "import time; end = time.time() + 60; print('update 1/2\\nupdate 2/2', flush=True)\n"
    code += f"told = pathlib.Path({str(told)!r})\nwhile not told.exists() and time.time() < end: time.sleep(0.02)\n"
    cell = tiny(tmp_path, "slow", code=code + "out.write_text(str(told.exists()))")

    def listen(at_work, base):
        say(at_work, base)
        if "at work: slow: update 2/2" in capsys.readouterr().out:
            told.touch()

    monkeypatch.setattr(cells, "tell_at_work", listen)
    assert run([cell], tmp_path) == (set(), "") and cell.done.read_text() == "True"


def test_cells_share_what_they_compile(tmp_path, monkeypatch):
    """jax itself says where it keeps its programs: beside the cells; or where its user wants them."""
    least, place = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "JAX_COMPILATION_CACHE_DIR"
    monkeypatch.delenv(least, raising=False)
    monkeypatch.delenv(place, raising=False)
    names = f"{place.lower()} {least.lower()}".split()
    ours = tiny(tmp_path, "ours", code=f"import jax; out.write_text(str([getattr(jax.config, x) for x in {names}]))")
    theirs = tiny(tmp_path, "theirs", code=f"out.write_text(os.environ[{place!r}])")
    assert run([ours], tmp_path) == (set(), "")
    assert ours.done.read_text() == str([str(tmp_path / "base" / "jax_cache"), 0.3])
    monkeypatch.setenv(place, "elsewhere")
    assert run([theirs], tmp_path) == (set(), "") and theirs.done.read_text() == "elsewhere"


SLOW = """
import signal, time
def save(*_): out.with_suffix(".saved").write_text("whole"); sys.exit("stopped by SIGTERM")
signal.signal(signal.SIGTERM, save)
out.with_suffix(".pid").write_text(str(os.getpid()))
time.sleep(120)
"""


def test_a_stopped_launcher_stops_its_cells(tmp_path, capsys):
    slow, later = tiny(tmp_path, "slow", code=SLOW), tiny(tmp_path, "later")
    pid = slow.done.with_suffix(".pid")
    ctrl_c = threading.Thread(target=lambda: (wait_for(pid), os.kill(os.getpid(), signal.SIGINT)))
    ctrl_c.start()
    assert run([slow, later], tmp_path) == ({"slow", "later"}, "SIGINT") and trace(tmp_path) == ["slow"]
    ctrl_c.join()
    out = capsys.readouterr().out
    assert slow.done.with_suffix(".saved").read_text() == "whole"
    assert "stopped slow: exit 1: stopped by SIGTERM" in out and "left out" not in out and "later" not in out


def test_a_killed_launcher_leaves_its_cell_the_lock(tmp_path):
    slow, base = tiny(tmp_path, "slow", code=SLOW), tmp_path / "base"
    program = "import pathlib, sys; from cells import *; name, code, done, base = sys.argv[1:]; done = Path(done)\n"
    program += "run_cells({name: Cell(name, ['-c', code, str(done)], done, ())}, Path(base), 1)"
    words = [sys.executable, "-c", program, slow.name, slow.command[1], slow.done, base]
    launcher = subprocess.Popen(words, cwd=ROOT / "benchmark")
    child = int(wait_for(slow.done.with_suffix(".pid")))
    launcher.kill()
    launcher.wait()
    try:
        assert cells.run_cell(slow, base, None, cells.Stopping()) == cells.BUSY
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_cell_that_another_process_makes_is_waited_for(tmp_path, monkeypatch, capsys):
    """What does not need it is made meanwhile; what needs it, after it; itself once."""
    monkeypatch.setattr(cells, "ASKED_EVERY", 1.0)
    made = [tiny(tmp_path, "source"), tiny(tmp_path, "other"), tiny(tmp_path, "needs", "source")]
    record = cells.record_file(made[0], tmp_path / "base")
    record.parent.mkdir(parents=True)
    with open(record.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def make():
            try:
                wait_for(made[1].done)
                made[0].done.write_text("theirs")
                cells.write_record(made[0], tmp_path / "base", {})
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)

        other = threading.Thread(target=make)
        other.start()
        assert run(made, tmp_path) == (set(), "")
        other.join()
    assert trace(tmp_path) == ["other", "needs"] and made[0].done.read_text() == "theirs"
    said = capsys.readouterr().out
    assert "waiting for source: another process is making it now" in said and "[2/2]" in said


def test_rows_that_are_replaced_meanwhile_are_no_rows_of_the_record(tmp_path):
    file = tmp_path / "data.npz"
    shutil.copy(scripted.dataset(tmp_path), file)
    code = f"import numpy as np; x = dict(np.load({str(file)!r})); about = json.loads(str(x['metadata_json']))\n"
    code += "about['sha256']['rewards'] = '0'; x['metadata_json'] = np.array(json.dumps(about))\n"
    code += f"np.savez({str(file)!r}, **x); out.write_text('made')"
    cell = tiny(tmp_path, "learn", code=f"import json; {code}")._replace(reads=(file,))
    assert run([cell], tmp_path) == ({"learn"}, "") and not cells.is_done(cell, tmp_path / "base")


# --- cells that were made by hand ---------------------------------------------------------------


def rows_told(file):
    known = cells.digests_of(file)
    return [known[name] for name in runner.DIGESTED]


OTHER = "made by another command (seed differ): it does not count"


@pytest.mark.parametrize("seed, same_rows, told", [(0, True, ""), (3, True, OTHER), (0, False, "made from other rows")])
def test_a_cell_made_by_hand_counts_where_flags_and_rows_are_the_commands(
    tmp_path, monkeypatch, capsys, seed, same_rows, told
):
    """A selection, perhaps of another source's buffers; a learner, perhaps with another seed or from another file."""
    base, out, folder = tmp_path / "base", tmp_path / "data", tmp_path / "learn"
    source, file = tmp_path / "source", out / "point-angle-60" / "top1.npz"
    command = ["udg_select.py", "--buffers", str(source), "--task", "point-angle-60", "--out", str(out)]
    data = Cell("data", command, file.with_name("scores.json"), (), None, (source,))
    command = ["cped.py", "--dataset", str(file), "--preset", "cpu", "--out", str(folder)]
    learner = Cell("learn", command, folder / "learning_curve.png", ("data",), folder, (file,))
    for path in (source / "policy_00.npz", file):
        path.parent.mkdir(parents=True)
        shutil.copy(scripted.dataset(tmp_path), path)
    sha = file_sha256(source / "policy_00.npz")
    parent = {"name": "policy_00", "sha256": sha if same_rows else "0" * 64}
    flags = udg_select.portable_flags(tyro.cli(udg_select.Args, args=data.command[1:]))
    write(data.done, {"flags": flags, "selections": {"top1": {"parents": [parent]}}})
    write(learner.done, "")
    left = cells.flags_of(learner) | {"seed": seed, "q_norm": True}  # a switch before it had three values
    del left["track"]  # a flag that is younger than the cell
    write(folder / "args.json", left)
    rows = list(cells.digests_of(file).values()) if same_rows else ["1"]
    np.savez(folder / "state.npz", meta_json=json.dumps({"identity": {"data": rows}}))
    made = {"data": data, "learn": learner}
    cells.adopt(made, base)
    assert [cells.is_done(cell, base) for cell in made.values()] == [same_rows, not told]
    assert capsys.readouterr().out.count(told or "does not count") == (0 if not told else 1 if same_rows else 2)
    if not told:
        other = buffers.load(file, quiet=True)
        buffers.save(file, dict(other.arrays) | {"rewards": other["rewards"] + 1}, other.metadata)
        assert not cells.is_done(learner, base)
        buffers.save(file, dict(other.arrays), other.metadata)
        assert cells.is_done(learner, base)
        with monkeypatch.context() as patch:
            patch.setitem(cped.CPU, "tau", 0.9)
            assert not cells.is_done(learner, base), "the words are the same, their preset is another"
        write(folder / "args.json", {k: v for k, v in left.items() if k != "tau"})
        assert cells.flags_differ(learner, cells.flags_left(learner)) == ["tau"], "which was no flag when it was made"
        write(folder / "args.json", left)
        for digest, counts in (("0" * 16, False), (log.data_told(rows_told(file), 1)["sha256"], True)):
            (folder / "state.npz").unlink(missing_ok=True)  # a copy of the run without its states
            cells.record_file(learner, base).unlink(missing_ok=True)
            write(folder / "log.jsonl", {"data": {"rows": 1, "sha256": digest}})
            cells.adopt(made, base)
            assert cells.is_done(learner, base) == counts
        (folder / "log.jsonl").unlink()
        cells.record_file(learner, base).unlink()
        cells.adopt(made, base)
        assert not cells.is_done(learner, base), "which says nothing of its rows"
        (folder / "args.json").unlink()
        cells.adopt(made, base)
        assert not cells.is_done(learner, base), "which says nothing of its flags"


# --- the cells of all benchmarks ----------------------------------------------------------------


def plans():
    """Folder and {name: cell} of every study, of the reference scores and of the suite, at every budget."""
    for budget in ("cpu", "gpu"):
        base = Path("runs", "study", budget)
        yield from ((base, udg_study.cells_of(name, base, budget)[0]) for name in udg_study.STUDIES)
        args = argparse.Namespace(budget=budget, updates=200_000 * (budget == "gpu"), seeds=2)
        for random, experts in (reference_scores.plan(name, args) for name in reference_scores.MIRRORS):
            yield reference_scores.RUNS, {cell.name: cell for cell in (random, *experts)}
    for budget in ("cpu", "paper"):
        args = suite.parse(["--budget", budget])
        yield suite.base_folder(args), suite.cells_of(args, list(suite.SETS))


PLANS = list(plans())


def test_cells_stand_after_what_they_need_and_name_no_place():
    for base, made in PLANS:
        for i, (key, cell) in enumerate(made.items()):
            assert key == cell.name and set(cell.needs) <= set(list(made)[:i]), key
            line, out = cells.portable(cell.command), Path(cell.command[cell.command.index("--out") + 1])
            assert (ROOT / cell.command[0]).exists() and str(ROOT) not in line and " /" not in line
            assert cell.done.is_relative_to(out) and (out.is_relative_to(base) or str(out) == "data")


def test_one_name_is_one_command_one_file_one_record():
    """What two studies ask for is made once; what differs lies apart."""
    kinds, users = collections.defaultdict(set), collections.Counter()
    for base, made in PLANS:
        for cell in made.values():
            kinds[base, cell.name].add((tuple(cell.command), cell.done, cell.needs, cell.runs, cell.reads))
            users[cell.name] += 1
    assert all(len(found) == 1 for found in kinds.values())
    assert len({(base, done) for (base, _), ((_, done, *_),) in kinds.items()}) == len(kinds)
    assert len({cells.record_file(Cell(name, [], Path(), ()), base) for base, name in kinds}) == len(kinds)
    assert users["learn point-angle-0 point:1 mopo"] > 4


def test_runs_are_accepted_by_wurl_sac():
    """Every flag exists, and what wurl_sac.py refuses before long work it does not refuse."""
    every = [cell for _, made in PLANS for cell in made.values() if cell.command[0] == "wurl_sac.py"]
    different = {tuple(cell.command[:-2]): cell for cell in every}.values()  # but for --out
    assert len(different) > len(udg_study.SOURCES) + len(reference_scores.MIRRORS) + len(suite.RUNS)
    for cell in different:
        args = cells.args_of(wurl_sac, cell.command[1:])
        args = dataclasses.replace(args, num_devices=0)  # they are made of the CPU when the script begins
        task = envs.task(args.task)
        wurl_sac.check_args(args, task, args.episode_length or task.episode_length)
        assert cell.done.name == f"policy_{args.num_policies - 1:02d}.npz", "done by the last policy's buffer"
        assert cell.runs == Path(args.out)


def test_angles_are_those_of_the_datas_task(tmp_path):
    """A run leaves the columns behind, its command says `task`: both mean the same."""
    flags = {"angles": "task", "dataset": str(tmp_path / "none.npz"), "task": ""}
    assert cells.with_columns(flags) == flags  # no data to ask
    rows = {"observations": np.zeros((20, 2)), "actions": np.zeros((20, 1)), "rewards": np.zeros(20)}
    rows |= {"terminals": np.zeros(20, bool), "timeouts": np.arange(20) == 19}
    envs.buffers.from_arrays(rows, flags["dataset"])
    assert cells.with_columns(flags)["angles"] == "none"  # data that name no task
    assert cells.with_columns(flags | {"task": "cheetah-jump"})["angles"] == "1"
    assert cells.with_columns(flags | {"task": "point-angle-0"})["angles"] == "none"
    assert cells.with_columns(flags | {"task": "cheetah-jump", "angles": "none"})["angles"] == "none"
