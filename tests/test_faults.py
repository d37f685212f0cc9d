"""A real kill -9 of a real process, and --resume: the short form of benchmark/fault_harness.py."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("fault_harness", ROOT / "benchmark" / "fault_harness.py")
F = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(F)
FLAGS = (
    "--task point --num-policies 2 --num-updates 800 --chunk 100 --eval-every 400 --warmup-steps 200 --replay-size 500 "
    "--eval-episodes 2 --hidden-sizes 32 32 --num-directions 2"
)


def test_a_killed_run_ends_the_same(tmp_path, monkeypatch):
    """Killed once in the middle of its way: policy, states, buffers, log and TensorBoard are equal."""
    monkeypatch.setattr(F, "RUNS", {"wurl_sac": FLAGS})
    (tmp_path / "epoch").write_text(f"{time.time():.0f}")
    # Moments are shares of the untouched run's processor time, which a loaded machine makes longer or shorter.
    record = F.kill_trial(tmp_path, "wurl_sac", number=0, most=1, moments=(0.4, 0.6))
    assert len(record["kills"]) == 1 and not record["problems"], record


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_while_programs_compile(tmp_path, name):
    """One line and exit code 1, at once: no exception, which jax may swallow, and no crash of the compiler's."""
    command, told = [sys.executable, str(ROOT / "dac.py"), "--quick", "--out", str(tmp_path / "run")], ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1) as process:
        while process.poll() is None and not told.endswith("disk"):  # the last word before the first program
            told += process.stdout.read(1)
        process.send_signal(getattr(signal, name))
        assert process.wait(timeout=60) == 1
        said = process.stdout.read()
    assert said == f"dac.py: stopped by {name}; the same command with --resume goes on from what was saved\n"


def test_a_signal_to_a_script_that_saves_no_state(tmp_path):
    """udg_select.py cannot go on: it begins anew."""
    run, told = [sys.executable, str(ROOT / "udg_select.py"), "--quick", "--out", str(tmp_path / "run")], ""
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and "on disk" not in told:
            told = process.stdout.readline()
        process.terminate()
        said = process.stderr.read()
    assert said == "udg_select.py: stopped by SIGTERM; the same command with --overwrite begins anew\n"


def make_folder(path, value=1.0, log=(1, 2), board=((1, 2),), extra=()):
    """A run's folder in small; board: steps in each events file."""
    path.mkdir()
    np.savez(path / "policy.npz", x=np.full(3, value, np.float32))
    lines = [{"args": {"out": str(path)}}, *({"step": s, "train/x": s, "time/x": id(path)} for s in log)]
    (path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for i, steps in enumerate(board):
        writer = EventsWriter(str(path / "events"), f".{i}")
        for step in steps:
            writer.write_event(Event(step=step, summary=scalar("train/x", step)))
        writer.close()
    for name in extra:
        (path / name).write_text("")
    return path


DIFFERENT = [
    ("value", {"value": 1.0000001}, "policy.npz: x differs"),
    ("log twice", {"log": (1, 2, 2)}, "log.jsonl: 4 records for 3"),
    ("log gap", {"log": (2,)}, "log.jsonl: 2 records for 3"),
    ("board twice", {"board": ((1, 2), (2,))}, "TensorBoard: train/x twice at [2]"),
    ("board gap", {"board": ((2,),)}, "TensorBoard: train/x twice at [], missing at [1]"),
    ("left behind", {"extra": [".policy.npz.7.tmp"]}, ".policy.npz.7.tmp: left behind"),
]


def test_the_comparison_sees_a_difference(tmp_path):
    whole = make_folder(tmp_path / "whole")
    assert F.compare(make_folder(tmp_path / "same", board=((1,), (2,))), whole) == []
    for name, changes, told in DIFFERENT:
        (problem,) = F.compare(make_folder(tmp_path / name, **changes), whole)
        assert problem.startswith(told), name
