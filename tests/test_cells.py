"""What studies, suite and reference scores share (benchmark/cells.py): real commands, tiny ones."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tyro

import cells
import udg_select
import wurl_sac
from cells import Cell
from envs import buffers
from envs.buffers import scripted

ROOT = Path(__file__).resolve().parents[1]
NOTE = "import os, pathlib, sys; out = pathlib.Path(sys.argv[1]); out.parent.mkdir(parents=True, exist_ok=True); "
TRACE = "open(out.parent / 'trace', 'a').write(out.name + ' '); "


def tiny(tmp_path, name, *needs, code="out.write_text('x')", **fields):
    """A cell of a second or less: python -c, which notes that it ran and writes its file."""
    done = tmp_path / "cells" / name
    return Cell(name, ["-c", NOTE + TRACE + code, str(done)], done, needs, **fields)


def trace(tmp_path):
    path = tmp_path / "cells" / "trace"
    return path.read_text().split() if path.exists() else []


def run(made, tmp_path, jobs=1):
    return cells.run_cells({cell.name: cell for cell in made}, tmp_path / "base", jobs)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


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
    folder = tmp_path / "cells" / "run"
    code = "(out.parent / 'run').mkdir(exist_ok=True); (out.parent / 'run' / 'state.npz').touch(); "
    code += "out.write_text(sys.argv[-1]) if '--resume' in sys.argv else sys.exit('stopped')"
    cell = tiny(tmp_path, "learner", code=code, runs=folder)
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
    told, code = tmp_path / "told", "import time; end = time.time() + 60\n"
    code += "print('update 1/2', flush=True)\nprint('update 2/2', flush=True)\n"
    code += f"while not pathlib.Path({str(told)!r}).exists() and time.time() < end: time.sleep(0.02)\n"
    code += f"out.write_text(str(pathlib.Path({str(told)!r}).exists()))"
    cell, say = tiny(tmp_path, "slow", code=code), cells.tell_at_work

    def listen(at_work, base):
        say(at_work, base)
        if "at work: slow: update 2/2" in capsys.readouterr().out:
            told.touch()

    monkeypatch.setattr(cells, "tell_at_work", listen)
    assert run([cell], tmp_path) == (set(), "") and cell.done.read_text() == "True"


def test_cells_share_what_they_compile(tmp_path, monkeypatch):
    """jax itself says where it keeps its programs: beside the cells, or where its user wants them."""
    code = "import jax; c = jax.config; "
    code += "out.write_text(f'{c.jax_compilation_cache_dir} {c.jax_persistent_cache_min_compile_time_secs}')"
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    for name, chosen in (("cell", ""), ("other", "elsewhere")):
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        if chosen:
            monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", chosen)
        cell = tiny(tmp_path, name, code=code)
        assert run([cell], tmp_path) == (set(), "")
        assert cell.done.read_text() == f"{chosen or tmp_path / 'base' / 'jax_cache'} 0.3"


DRIVER = """
import sys
from pathlib import Path
import cells
done, base = Path(sys.argv[2]), Path(sys.argv[3])
code = '''
import os, pathlib, signal, sys, time
out = pathlib.Path(sys.argv[1]); out.parent.mkdir(parents=True, exist_ok=True)
def save(*_): out.with_suffix(".saved").write_text("whole"); sys.exit("stopped by SIGTERM")
signal.signal(signal.SIGTERM, save)
out.with_suffix(".pid").write_text(str(os.getpid()))
time.sleep(120)
'''
made = {"slow": cells.Cell("slow", ["-c", code, str(done)], done, ())}
if sys.argv[1] == "both":
    made["next"] = cells.Cell("next", ["-c", "raise SystemExit('never')"], done.with_suffix(".next"), ())
print(cells.run_cells(made, base, 1), flush=True)
"""


def wait_for(path, seconds=120):
    end = time.time() + seconds
    while not (path.exists() and path.read_text()):
        assert time.time() < end, f"{path} never came"
        time.sleep(0.05)
    return path.read_text()


def test_a_stopped_launcher_stops_its_cells_and_a_killed_one_keeps_their_lock(tmp_path):
    slow, base = tmp_path / "cells" / "slow", tmp_path / "base"
    command = lambda which: [sys.executable, "-c", DRIVER, which, str(slow), str(base)]
    first = subprocess.Popen(command("both"), stdout=subprocess.PIPE, text=True, cwd=ROOT / "benchmark")
    wait_for(slow.with_suffix(".pid"))
    first.send_signal(signal.SIGINT)
    out, _ = first.communicate(timeout=60)
    assert slow.with_suffix(".saved").read_text() == "whole"
    assert "stopped slow: exit 1: stopped by SIGTERM" in out and "never" not in out and "left out" not in out
    assert "'SIGINT'" in out and "'slow'" in out and "'next'" in out, "what was not made, and why"

    slow.with_suffix(".pid").unlink()
    second = subprocess.Popen(command("slow"), stdout=subprocess.DEVNULL, cwd=ROOT / "benchmark")
    child = int(wait_for(slow.with_suffix(".pid")))
    second.kill()
    second.wait()
    try:
        cell = Cell("slow", ["-c", "raise SystemExit('twice')"], slow, ())
        assert cells.run_cell(cell, base, None, cells.Stopping()) == "another process is making it now"
    finally:
        os.kill(child, signal.SIGKILL)


# --- cells that were made by hand ---------------------------------------------------------------


@pytest.mark.parametrize("changes, counts", [({}, True), ({"seed": 3}, False), (None, False)])
def test_a_run_counts_where_its_flags_are_the_commands(tmp_path, capsys, changes, counts):
    folder, base = tmp_path / "run", tmp_path / "base"
    words = ["--task", "point", "--num-policies", "2", "--out", str(folder)]
    cell = Cell("source", ["wurl_sac.py", *words], folder / "buffers" / "policy_01.npz", (), folder)
    cell.done.parent.mkdir(parents=True)
    cell.done.touch()
    left = dataclasses.asdict(cells.args_of(wurl_sac, words))
    del left["keep_policies"]  # a flag that is younger than the cell
    if changes is not None:
        write(folder / "args.json", left | changes)
    cells.adopt({"source": cell}, base)
    assert cells.is_done(cell, base) == counts
    out = capsys.readouterr().out
    assert ("made by another command" in out) == (not counts) and ("(seed differ)" in out) == bool(changes)


@pytest.mark.parametrize("same_rows", [False, True])
def test_cells_from_other_rows_do_not_count(tmp_path, capsys, same_rows):
    """Same flags, but the selection was made of another source's buffers, or the learner learnt from another file."""
    base, out, folder = tmp_path / "base", tmp_path / "data", tmp_path / "learn"
    source, file = tmp_path / "source", out / "point-angle-60" / "top1.npz"
    command = ["udg_select.py", "--buffers", str(source), "--task", "point-angle-60", "--out", str(out)]
    data = Cell("data", command, file.with_name("scores.json"), (), None, (source,))
    command = ["dac.py", "--dataset", str(file), "--preset", "cpu", "--out", str(folder)]
    learner = Cell("learn", command, folder / "learning_curve.png", ("data",), folder, (file,))
    for path in (source / "policy_00.npz", file):
        path.parent.mkdir(parents=True)
        shutil.copy(scripted.dataset(tmp_path), path)
    rows = list(cells.digests_of(file).values())
    sha = udg_select.file_sha256(source / "policy_00.npz")
    parent = {"name": "policy_00", "sha256": sha if same_rows else "0" * 64}
    flags = udg_select.portable_flags(tyro.cli(udg_select.Args, args=data.command[1:]))
    write(data.done, {"flags": flags, "selections": {"top1": {"parents": [parent]}}})
    write(learner.done, "")
    write(folder / "args.json", cells.flags_of(learner))
    meta = {"identity": {"data": rows if same_rows else ["1"]}}
    np.savez(folder / "state.npz", meta_json=json.dumps(meta))
    made = {"data": data, "learn": learner}
    cells.adopt(made, base)
    assert [cells.is_done(cell, base) for cell in made.values()] == [same_rows] * 2
    assert capsys.readouterr().out.count("made from other rows: it does not count") == 2 * (not same_rows)
    if same_rows:
        other = buffers.load(file, quiet=True)
        buffers.save(file, dict(other.arrays) | {"rewards": other["rewards"] + 1}, other.metadata)
        assert not cells.is_done(learner, base)
