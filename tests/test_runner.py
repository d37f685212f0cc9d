"""runner/ on a small learner of two phases: flags, folder, log, checkpoints, signals, progress, evaluation."""

import contextlib
import dataclasses
import errno
import fcntl
import io
import itertools
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich
from tensorboardX.proto import event_pb2

import envs
import envs.buffers
import runner
from envs import host
from envs.buffers import files, scripted
from runner import checkpoint, devices, folder, log, plots, presets, run, signals

ROOT = Path(__file__).resolve().parents[1]
KEYS = ("observations", "actions", "rewards")


# --- a learner of two phases: a fit that ends early, then a policy ---


@dataclass(frozen=True)
class Args(runner.Flags):
    # --- the fit ---
    fit_updates: runner.Count = 60
    """updates of the fit at most"""
    rate: runner.Rate = 0.5
    """how fast the state moves"""
    gamma: runner.Share = 0.9
    """a share"""
    width: runner.Size = 1.0
    """above 0"""
    sizes: tuple[runner.Count, ...] = (4, 4)
    """several"""
    shift: float | None = None
    """a number or none"""
    kind: Literal["a", "b"] = "a"
    """a choice"""
    fast: bool = True
    """a switch"""


class State(NamedTuple):
    key: jax.Array
    num_updates: jax.Array
    x: jax.Array


def make_train(args):
    def init(key):
        return State(key, jnp.int32(0), jax.random.normal(key, (2,)))

    def chunk(state, data):
        key, noise = jax.random.split(state.key)
        x = state.x + args.rate * (jax.random.normal(noise, (2,)) - state.x) + data.mean()
        return State(key, state.num_updates + args.chunk, x), {"train/q": x.mean(), "train/loss": x.std()}

    over = lambda state, data: runner.map_seeds(lambda s: chunk(s, data), state, args)
    return jax.jit(runner.over_devices(jax.vmap(init), args)), jax.jit(over, donate_argnums=0)


def learn(args):
    buffer, task = runner.open_task("toy", args, KEYS)
    data, keys = jnp.asarray(buffer["rewards"]), runner.seed_keys(args)
    init, chunk = make_train(args)
    act = lambda state, observations, key: jnp.tile(jnp.tanh(state.x), (len(observations), 1))
    evaluate = runner.each_seed(runner.returns_of(act, envs.make(task), task, buffer, args), args)
    schedules = {"gamma": 0.9, "sizes": (4, 4), "fast": True}
    with runner.Run("toy", args, task, buffer, schedules=schedules, remedy="raise gamma") as r:
        program = r.compile(chunk, jax.eval_shape(init, keys), data)
        fit = r.restore(init, keys, phase="fit")
        for step in r.chunks("fit step", args.fit_updates, fit.num_updates):
            if fit.num_updates.max() >= 40:  # enough, also where a resumed run begins
                break
            fit, metrics = program(fit, data)
            r.progress(step, metrics, ("train/loss",), last=step >= 40)
            r.log(step, {"fit/loss": metrics["train/loss"]})
            r.save(fit, last=step >= 40)
        state = r.restore(lambda keys: init(keys)._replace(x=fit.x), keys)
        for step in r.chunks("update", args.num_updates, state.num_updates):
            state, metrics = program(state, data)
            r.progress(step, metrics, ("train/q",))
            if r.due(step):
                r.log(step, metrics | evaluate(state, runner.evaluation_keys(args)))
            r.save(state, note=step)
        r.write_policy("toy", {"x": state.x})
        return r.finish(
            [("train/q", "values", "Q", "linear"), ({"train/q": "q", "train/loss": "l"}, "two", "", "linear")]
        )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return str(scripted.dataset(tmp_path_factory.mktemp("data")))


SMALL = dict(num_seeds=2, chunk=10, num_updates=40, eval_every=20, eval_episodes=2)


@pytest.fixture
def args(dataset, tmp_path):
    return Args(dataset=dataset, out=str(tmp_path / "run"), **SMALL)


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """An uninterrupted run -> its folder, its result."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, learn(Args(dataset=dataset, out=str(folder), **SMALL))


def arrays_of(path):
    return checkpoint.read_npz(path, "metadata_json" if path.name == "policy.npz" else "meta_json")[0]


def records_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines[1:]]


def assert_same_run(one, other):
    """Equal policies and states of all phases, number by number, and equal logs."""
    names = [path.relative_to(one) for path in one.rglob("*.npz") if path.name != "state.prev.npz"]
    assert names
    for name in names:
        wanted, found = arrays_of(one / name), arrays_of(other / name)
        assert wanted.keys() == found.keys()
        for key in wanted:
            np.testing.assert_array_equal(found[key], wanted[key], err_msg=f"{name}: {key}")
    assert records_of(one) == records_of(other)


def stop(args, monkeypatch, label, count, number=signal.SIGTERM):
    """Run until a signal strikes while the progress of `label` at `count` is shown."""
    show = log.Progress.show

    def strike(self, step, *rest, **more):
        show(self, step, *rest, **more)
        if (self.label, step) == (label, count):
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patched:
        patched.setattr(log.Progress, "show", strike)
        with pytest.raises(SystemExit, match=f"stopped by {number.name} at {label} {count}; go on .* --resume"):
            learn(args)


# --- a run and its resumption ---


def test_a_run_leaves_its_files(whole):
    folder, result = whole
    names = {path.name for path in folder.iterdir() if "tfevents" not in path.name}
    figures = {"learning_curve.png", "training.png"}
    assert names == {"args.json", "fit", "log.jsonl", "policy.npz", "state.npz", "state.prev.npz", *figures}
    assert all((folder / name).stat().st_size > 5_000 for name in figures)
    assert json.loads((folder / "args.json").read_text())["num_seeds"] == 2
    header = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    assert (header["script"], header["task"]) == ("toy", "point-angle-0")
    steps = [(r["step"], r["seed"], "eval/return" in r) for r in records_of(folder)]
    fit = [(step, seed, False) for step in (10, 20, 30, 40) for seed in (0, 1)]
    assert steps == [*fit, *((step, seed, True) for step in (20, 40) for seed in (0, 1))]
    returns = [r["eval/return"] for r in records_of(folder) if "eval/return" in r]
    np.testing.assert_allclose(result["score"], np.mean(returns), rtol=1e-5)
    assert checkpoint.read_npz(folder / "state.npz")[1]["note"] == 40


def test_a_run_stopped_often_equals_the_whole_one(whole, args, monkeypatch):
    """Also where the signal comes at the end of a phase: the next one waits for --resume."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    for at in (("fit step", 20), ("fit step", 40, signal.SIGINT), ("update", 10, signal.SIGINT), ("update", 40)):
        stop(args, monkeypatch, *at)
        args = dataclasses.replace(args, resume=True)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert learn(args) == whole[1]
    assert_same_run(whole[0], Path(args.out))


def test_a_torn_state_falls_back_and_the_log_with_it(whole, args, monkeypatch):
    """The state before is whole; the log is cut back to it, though the torn one belongs to more. In both phases; and in
    the first one while the second goes on: then the log keeps what it has, and gets nothing twice."""
    monkeypatch.setattr(run, "SAVE_EVERY", -1.0)
    for place, *at in (("fit", "fit step", 30), (".", "update", 30), ("fit", "update", 40)):
        stop(args, monkeypatch, *at)
        newest = Path(args.out) / place / "state.npz"
        newest.write_bytes(newest.read_bytes()[:300])
        args = dataclasses.replace(args, resume=True)
    assert learn(args) == whole[1]
    assert_same_run(whole[0], Path(args.out))
    newest.with_name("state.npz").write_bytes(b"torn again")  # the one before is whole, not the torn one of above
    assert learn(dataclasses.replace(args, resume=True)) == whole[1]


def test_a_phase_whose_states_are_gone_is_done_again_and_logged_once(whole, args, monkeypatch):
    """Also over a stop in the midst of it."""
    shutil.copytree(whole[0], args.out)
    for path in (Path(args.out) / "fit").glob("state*.npz"):
        path.unlink()
    args = dataclasses.replace(args, resume=True)
    stop(args, monkeypatch, "fit step", 20)
    assert learn(args) == whole[1]
    assert_same_run(whole[0], Path(args.out))


def test_torn_states_are_refused_and_nothing_is_changed(whole, args):
    folder = Path(args.out)
    shutil.copytree(whole[0], folder)
    for path in folder.glob("state*.npz"):  # those of the fit are whole
        path.write_bytes(path.read_bytes()[:300])
    assert_refused_and_unchanged(args, "no state to resume from; start anew")


def assert_refused_and_unchanged(args, message):
    files = lambda: {path: path.read_bytes() for path in Path(args.out).rglob("*") if path.is_file()}
    before = files()
    with pytest.raises(envs.InputError, match=message):
        learn(dataclasses.replace(args, resume=True))
    assert files() == before


def test_a_log_that_was_cut_or_lost_is_refused_and_nothing_is_changed(whole, args):
    shutil.copytree(whole[0], args.out)
    log_file = Path(args.out) / "log.jsonl"
    log_file.write_bytes(log_file.read_bytes()[:-30])
    assert_refused_and_unchanged(args, r"log\.jsonl: is shorter than its state says, or gone; put it back")
    log_file.unlink()
    assert_refused_and_unchanged(args, r"log\.jsonl")


def test_a_run_without_its_states_is_not_written_over(whole, args):
    shutil.copytree(whole[0], args.out)
    for path in (*Path(args.out).rglob("state*.npz"), Path(args.out) / "policy.npz"):
        path.unlink()
    with pytest.raises(envs.InputError, match="already holds a run"):
        learn(args)


def test_files_of_ones_own_do_not_stop_a_resume(whole, args):
    """A folder of notes with a file states.npz, and another run inside this one."""
    shutil.copytree(whole[0], args.out)
    (Path(args.out) / "notes").mkdir()
    np.savez(Path(args.out) / "notes" / "states.npz", x=1)
    learn(dataclasses.replace(args, gamma=0.5, out=f"{args.out}/other"))
    assert learn(dataclasses.replace(args, resume=True)) == whole[1]


def test_a_folder_in_use_is_refused(args):
    buffer, task = runner.open_task("toy", args, KEYS)
    with runner.Run("toy", args, task, buffer), pytest.raises(envs.InputError, match="another process runs in it"):
        runner.Run("toy", dataclasses.replace(args, resume=True), task, buffer)
    with runner.Run("toy", args, task, buffer):  # free again
        pass
    assert not list(Path(args.out).iterdir())


def test_a_folder_is_held_as_nfs_asks_or_not_at_all(args, monkeypatch, capsys):
    """Its flock needs a file that is open for writing; a disk that locks nothing is told, and cleaned all the same."""
    torn, modes = Path(args.out) / ".policy.npz.7.tmp", []
    torn.parent.mkdir()
    torn.touch()

    def flock(file, operation):
        modes.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE)
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    buffer, task = runner.open_task("toy", args, KEYS)
    with runner.Run("toy", args, task, buffer):
        assert modes == [os.O_RDWR] and not torn.exists()
    assert "the disk locks no files (No locks available); let no other process run" in capsys.readouterr().out


def test_a_state_that_waits_for_its_name_is_the_newest(whole, args):
    """A kill came between writing state.new.npz and renaming it."""
    folder = Path(args.out)
    shutil.copytree(whole[0], folder)
    (folder / "state.npz").rename(folder / "state.new.npz")
    assert learn(dataclasses.replace(args, resume=True)) == whole[1]
    assert (folder / "state.npz").exists() and not (folder / "state.new.npz").exists()
    assert_same_run(whole[0], folder)


def test_another_run_is_refused(whole, args, tmp_path, monkeypatch):
    """Without --resume; with other flags, other data (here: one reward, one next observation) or another version."""

    def refused(message, **changes):
        with pytest.raises(envs.InputError, match=message):
            learn(dataclasses.replace(args, **{"out": str(whole[0]), "resume": True, **changes}))

    refused("already holds a run: go on with --resume or choose another --out", resume=False)
    refused(r"state.npz: rate was 0\.5 and is now 0\.25; resume with the old one, or start anew", rate=0.25)
    buffer = envs.buffers.load(args.dataset, quiet=True)
    rewards = np.append(buffer["rewards"][:-1], np.float32(0.5))
    swapped = {"terminals": buffer["timeouts"], "timeouts": buffer["terminals"]}
    elsewhere = buffer["next_observations"].copy()
    elsewhere[-1] += 0.5
    for changes in ({"rewards": rewards}, {"next_observations": elsewhere}, swapped):
        other = envs.buffers.save(tmp_path / "other.npz", {**buffer.arrays, **changes}, buffer.metadata)
        refused(f"the data have other {', '.join(changes)} now; resume with the old one", dataset=str(other))
    refused("already holds a run", dataset="", quick=True, resume=False)
    assert not (whole[0] / "point-angle-0.npz").exists(), "--quick asks before it writes its data"
    old = {**envs.buffers.versions(), "udg-jax": "0.1.0"}
    monkeypatch.setattr(envs.buffers, "versions", lambda: old)
    refused("udg-jax was .* and is now '0.1.0'", rate=0.25)  # before any flag
    flags = {"gamma": 0.9}
    with pytest.raises(envs.InputError, match=r"x\.npz: shift is new in this version; resume with the old one"):
        checkpoint.check_identity("x.npz", flags, {**flags, "shift": 1})
    with pytest.raises(envs.InputError, match="x does not fit: another version"):
        runner.fill({"x": jnp.zeros(3)}, {"x": np.zeros(4, np.float32)}, "state.npz")


def test_data_may_be_moved_before_a_resume(whole, args, tmp_path):
    shutil.copytree(whole[0], args.out)
    moved = shutil.copy(args.dataset, f"{tmp_path}/moved.npz")
    assert learn(dataclasses.replace(args, resume=True, dataset=moved)) == whole[1]


def test_a_finished_run_goes_on_for_more_updates(whole, args, monkeypatch):
    """And equals one of as many from the start, number by number, its log, too; twice, and over a stop."""
    long = dataclasses.replace(args, num_updates=80, out=args.out + "-long")
    result = learn(long)
    learn(args)
    positions = {path: checkpoint.read_npz(path)[1]["log"] for path in Path(args.out).rglob("state.npz")}
    learn(dataclasses.replace(args, resume=True, num_updates=60))
    assert json.loads((Path(args.out) / "args.json").read_text())["num_updates"] == 60
    more = dataclasses.replace(args, resume=True, num_updates=80)
    stop(more, monkeypatch, "update", 70)
    assert learn(more) == result and learn(more) == result
    assert_same_run(Path(long.out), Path(args.out))
    assert json.loads((Path(args.out) / "args.json").read_text())["num_updates"] == 80
    log = (Path(args.out) / "log.jsonl").read_bytes()
    assert json.loads(log.splitlines()[0])["args"]["num_updates"] == 80
    for place in positions.values():  # in bytes, as they were
        assert log[:place].endswith(b"}\n")
    before = log, (Path(args.out) / "state.npz").read_bytes()
    with pytest.raises(envs.InputError, match="num_updates was 80 and is now 60; resume with the old one"):
        learn(dataclasses.replace(more, num_updates=60))
    assert before == ((Path(args.out) / "log.jsonl").read_bytes(), (Path(args.out) / "state.npz").read_bytes())


@pytest.mark.parametrize(
    "changes, why",
    [
        (dict(gamma=0.5), "--gamma stretches over the whole run, and only one with --gamma 0.9 can go on"),
        (
            dict(gamma=0.5, sizes=(4,)),
            "--gamma stretches .*, and --sizes stretches over the whole run, and only one with --sizes 4 4 can go on",
        ),
    ],
)
def test_a_run_whose_schedule_has_ended_is_not_made_longer(args, changes, why):
    learn(dataclasses.replace(args, **changes))
    with pytest.raises(envs.InputError, match=f"a run of 40 updates cannot become one of 80: {why}; start anew"):
        learn(dataclasses.replace(args, **changes, resume=True, num_updates=80))


def test_schedules_that_a_script_does_not_name_or_that_a_flag_turns_off():
    with pytest.raises(envs.InputError, match=r"x: .* what this script does depends on how many there are"):
        checkpoint.check_growth("x", 40, {"num_updates": 80}, None)
    with pytest.raises(envs.InputError, match=r"--lr-cosine stretches .* only one with --no-lr-cosine can"):
        checkpoint.check_growth("x", 40, {"num_updates": 80, "lr_cosine": True}, {"lr_cosine": False})
    checkpoint.check_growth("x", 40, {"num_updates": 80, "lr_cosine": False}, {"lr_cosine": False})
    with pytest.raises(envs.InputError, match="40 is no multiple of --eval-every 30"):
        checkpoint.check_growth("x", 40, {"num_updates": 80, "eval_every": 30}, {})


def test_resuming_nothing_begins_anew(whole, args, capsys):
    """What a kill left behind in the folder is removed."""
    torn = Path(args.out) / "fit" / ".state.new.npz.7.tmp"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"")
    assert learn(dataclasses.replace(args, resume=True)) == whole[1]
    assert "nothing was saved here yet; starting from the beginning" in capsys.readouterr().out
    assert not torn.exists()


def test_a_folder_that_cannot_be_written_is_named(args, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(envs.InputError, match=r"file/run: cannot be written .*; choose another --out"):
        learn(dataclasses.replace(args, out=str(tmp_path / "file" / "run")))


@pytest.mark.parametrize("max_rows, remedy", [(0, "record more, or name another --dataset"), (100, "raise --max-rows")])
def test_too_few_rows_are_refused(args, monkeypatch, max_rows, remedy):
    monkeypatch.setattr(folder, "FEWEST_ROWS", 10_000)
    with pytest.raises(envs.InputError, match=rf"npz: \d+ rows are too few, 10000 are needed; {remedy}"):
        runner.open_task("toy", dataclasses.replace(args, max_rows=max_rows), KEYS)


def test_a_seed_alone_is_the_seed_among_others(whole, args):
    learn(dataclasses.replace(args, seed=1, num_seeds=1))
    assert records_of(Path(args.out)) == [r for r in records_of(whole[0]) if r["seed"] == 1]


# --- memory and disk ---


def test_what_does_not_fit_is_refused(args, monkeypatch, capsys):
    for bytes_there in (39, 32_000):  # less than the state; less than the program, whose rows are 32 kB
        with monkeypatch.context() as patched, pytest.raises(envs.InputError, match=r"needs .* memory, .* lower the"):
            patched.setattr(devices, "memory", lambda size=bytes_there: size)
            learn(args)
    state = 2 * (8 + 4 + 8)  # two seeds: a key, a count, two numbers
    free = lambda size: lambda path: shutil._ntuple_diskusage(10**12, 0, size)
    monkeypatch.setattr(shutil, "disk_usage", free(3 * state + state // 4 - 1))
    with pytest.raises(envs.InputError, match="choose another --out"):
        learn(args)
    monkeypatch.setattr(shutil, "disk_usage", free(3 * state + state // 4))
    learn(args)
    monkeypatch.setattr(shutil, "disk_usage", free(0))  # states that are written over count as free
    capsys.readouterr()
    learn(dataclasses.replace(args, resume=True))
    rows = 4 * len(np.load(args.dataset)["rewards"])
    (need,) = re.findall(r", ([\d.]+) MB of .* memory on each device", capsys.readouterr().out)
    np.testing.assert_allclose(float(need), (rows + 2 * state) / 1e6, atol=0.06)


def test_a_process_needs_its_share_and_the_largest_array_to_save_all(args, monkeypatch):
    class Chunk:
        def lower(*_):
            raise RuntimeError("it fits")

    (buffer, task), state = runner.open_task("toy", args, KEYS), {name: np.zeros(25, np.float32) for name in "abcd"}
    with runner.Run("toy", args, task, buffer) as r:
        monkeypatch.setattr(jax, "process_count", lambda: 4)
        for have, error in ((199, envs.InputError), (200, RuntimeError)):
            monkeypatch.setattr(devices, "memory", lambda have=have: have)
            monkeypatch.setattr(jax, "local_device_count", lambda: 1)
            with pytest.raises(error):
                r.compile(Chunk(), state)


def test_buffers_that_are_written_count_as_free(args, monkeypatch):
    """A disk that filled while the last files of a run were written, and has room for the missing ones now."""
    (buffer, task), (init, chunk) = runner.open_task("toy", args, KEYS), make_train(args)
    with runner.Run("toy", args, task, buffer) as r:
        (r.folder / "buffers").mkdir()
        (r.folder / "buffers" / "policy_00.npz").write_bytes(bytes(1000))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, 600))
        r.compile(chunk, jax.eval_shape(init, runner.seed_keys(args)), jnp.asarray(buffer["rewards"]), disk=1000)


@pytest.mark.parametrize("where", ["log.jsonl", "board", "args.json", "state.npz", "policy.npz"])
def test_a_full_disk_is_one_line_and_the_run_can_go_on(args, monkeypatch, where):
    def full(*paths, replace=os.replace):
        if not paths or paths[1].name == where:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(*paths)

    (buffer, task), said = runner.open_task("toy", args, KEYS), r"cannot be written \(No space left on device.*\)"
    with (
        pytest.raises(envs.InputError, match=f"{args.out}.*: {said}; free space, then go on with --resume$"),
        runner.Run("toy", args, task, buffer) as r,
    ):
        monkeypatch.setattr(os, "replace", full)
        r.write({"x": jnp.zeros(2)})
        if where == "log.jsonl":
            r.logger.file.close()
            r.logger.file = open("/dev/full", "wb")  # noqa: SIM115
        if where == "board":
            monkeypatch.setattr(r.logger.board, "flush", full)
        r.record(10, {"train/q": 1.0})
        r.write_policy("toy", {"x": jnp.zeros(2)})
    monkeypatch.undo()
    assert not list(Path(args.out).glob(".*"))
    with runner.Run("toy", dataclasses.replace(args, resume=True), task, buffer):  # no longer held
        pass


# --- progress and divergence ---


def test_an_eta_of_days(capsys):
    log.Progress("update", 10**6, 0).show(0, 10.0, {})
    assert "ETA 27:46:40" in capsys.readouterr().out


def test_a_file_gets_a_line_a_minute_and_the_last(args, dataset, monkeypatch, capsys):
    """The pace leaves out the first chunk, which compiles: 100 s for it, then 25 s for each."""
    now = [1e9]
    clock = types.SimpleNamespace(time=lambda: now[0], strftime=time.strftime, gmtime=time.gmtime)
    for module in (run, log):
        monkeypatch.setattr(module, "time", clock)
    buffer, task = runner.open_task("toy", args, KEYS)
    args = dataclasses.replace(args, num_updates=80)
    with runner.Run("toy", args, task, buffer) as r:
        capsys.readouterr()
        for step in r.chunks("update", 80, 0):
            now[0] += 25.0 if step > 10 else 100.0
            r.progress(step, {"train/q": np.array([1.0, 2.0])}, ("train/q",))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "update 10/80 (12%)  0.1/s  ETA 00:11:40  q 1.5",
        "update 40/80 (50%)  0.4/s  ETA 00:01:40  q 1.5",
        "update 70/80 (88%)  0.4/s  ETA 00:00:25  q 1.5",
        "update 80/80 (100%)  0.4/s  ETA 00:00:00  q 1.5",
    ]


def test_the_pace_counts_no_chunk_that_never_ran(args, monkeypatch):
    """As after a fit that ends early."""
    now = [1e9]
    monkeypatch.setattr(run, "time", types.SimpleNamespace(time=lambda: now[0]))
    buffer, task = runner.open_task("toy", args, KEYS)
    with runner.Run("toy", args, task, buffer) as r:
        for step in r.chunks("fit step", 1000, 0):
            if step > 30:
                break
            now[0] += 1.0
            r.progress(step, {}, ())
        assert (r.step, r.rate()) == (30, 10.0)


class Terminal(io.StringIO):
    isatty = lambda self: True


def test_a_terminal_gets_one_live_line(monkeypatch):
    """Escape codes that rewrite the line, prints above it, a cursor again."""
    for name, value in {"TERM": "xterm", "COLUMNS": "120", "FORCE_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rich, "_console", None)  # one of this environment
    monkeypatch.setattr(sys, "stdout", Terminal())
    shown = log.Progress("update", 20, 0)
    shown.show(10, 5.0, {"train/q": 1.5})
    print("  return at 10: 3.00")
    shown.show(20, 5.0, {"train/q": 2.5}, last=True)
    shown.close()
    said = sys.stdout.getvalue()
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", said)
    assert "10/20 (50%)  5/s  ETA 00:00:02  q 1.5" in plain and "20/20 (100%)" in plain
    assert "return at 10: 3.00" in plain and said.rstrip().endswith("\x1b[?25h") and "\x1b[2K" in said


def test_a_metric_that_diverges_is_named(args):
    """Of any seed; with --q-bound 0 nothing is refused."""
    buffer, task = runner.open_task("toy", args, KEYS)
    falls, rises = (
        "what was saved before is kept: lower this, or lower",
        "what was saved before is kept: raise that, or",
    )
    broken = [(f"train/q is -1.01e\\+06; {falls}", {"train/q": np.array([0.0, -1.01e6])})]
    broken += [(f"train/q is 1.01e\\+06; {rises}", {"train/q": np.array([-1.0, 1.01e6])})]
    either = "what was saved before is kept: raise that where Q rose, lower this where it fell, or lower"
    broken += [(f"train/q is nan; {either}", {"train/q": np.array([-1.0, np.nan])})]
    broken += [(f"train/q is -inf; {falls}", {"train/loss": np.array([np.inf]), "train/q": np.array([-np.inf])})]
    for value in (np.nan, np.inf, -np.inf):
        metrics = {"train/q": np.zeros(2), "train/nll": np.array([1e9, value])}
        broken += [(f"train/nll is {value}", metrics)]
    broken += [("a hundred gradients in a row were not finite", {"fit/skipped": np.array([3.0, np.nan])})]
    for bound in (1e6, 0.0):
        given = dataclasses.replace(args, q_bound=bound, out=f"{args.out}{bound}")
        with runner.Run("toy", given, task, buffer, remedy=("raise that", "lower this")) as r:
            for step in r.chunks("update", 10, 0):
                r.progress(step, {"train/q": np.array([1e6, -1e6])}, ())
                for said, metrics in broken:
                    refused = pytest.raises(envs.InputError, match=f"update 10: {said}.*--resume --q-bound 0")
                    with refused if bound else contextlib.nullcontext():
                        r.progress(step, metrics, ())


def test_divergence_keeps_the_state_and_can_go_on(whole, args, monkeypatch):
    """A bound that any Q is beyond stands for a Q that diverges; with --q-bound 0 the run is as if never stopped."""
    monkeypatch.setattr(envs.buffers, "check_raw_rewards", lambda *_: None)  # which would name the rewards before
    with pytest.raises(
        envs.InputError,
        match=r"fit step \d+: train/q is .*: raise gamma, or lower the learning rates and .*--resume --q-bound 0",
    ):
        learn(dataclasses.replace(args, q_bound=1e-9))
    assert learn(dataclasses.replace(args, resume=True, q_bound=0.0)) == whole[1]
    assert_same_run(whole[0], Path(args.out))


def test_ctrl_c_that_ends_the_reader_too_still_saves(args, monkeypatch):
    """As in `python dac.py | tee run.txt`: every print fails after it."""

    def gone(*words, **more):
        os.kill(os.getpid(), signal.SIGINT)
        raise BrokenPipeError

    monkeypatch.setattr(log, "LINE_EVERY", -1.0)
    monkeypatch.setattr(log, "print", gone, raising=False)
    with pytest.raises(SystemExit, match="stopped by SIGINT at fit step 10"):
        learn(args)
    assert arrays_of(Path(args.out) / "fit" / "state.npz")["num_updates"].max() == 10


def test_a_signal_ends_a_process_whose_output_is_gone():
    code = """
        import os
        from runner import signals
        read, write = os.pipe()
        os.dup2(write, 2), os.close(read), os.close(write)
        signals.listen()
        try:
            os.kill(os.getpid(), 15)
        except OSError:
            os._exit(7)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT).returncode == 1


def test_a_second_signal_ends_at_once():
    said = []
    old = signal.signal(signal.SIGTERM, lambda *_: said.append("ended"))
    try:
        with signals.StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.name == "SIGTERM" and not said
            os.kill(os.getpid(), signal.SIGTERM)
            assert said == ["ended"]
    finally:
        signal.signal(signal.SIGTERM, old)


# --- the log ---


def events_of(folder):
    """[(name, step)] of all scalars in the folder's event files, in order."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            found += [(value.tag, event.step) for value in event.summary.value]
            at += 16 + size
    return found


def test_tensorboard_after_a_kill_in_the_second_phase(tmp_path):
    """Steps begin anew in a second phase: what the first one showed stays, what was cut off is shown once."""
    logger = log.Logger(tmp_path, Args())
    for step in (100, 200):
        logger.log(step, {"flow/nll": 1.0}, seed=3)
    logger.log(10, {"train/q": 1.23456789, "train/each": [1.0, 2.0]})
    position = logger.file.tell()
    logger.log(20, {"train/q": 2.0, "train/each": [1.0, 2.0, 3.0]})
    logger.file.close()
    again = log.Logger(tmp_path, Args(), position)
    again.log(20, {"train/q": 2.5})
    again.file.close()
    again.board.close()
    assert events_of(tmp_path) == [("flow/nll/seed3", 100), ("flow/nll/seed3", 200), ("train/q", 10), ("train/q", 20)]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"args", "versions", "commit", "device"} <= lines[0].keys()
    assert [x["step"] for x in lines[1:]] == [100, 200, 10, 20]
    assert (lines[-2]["train/q"], lines[-1]["train/q"]) == (1.23457, 2.5)


class TrackedRun:
    """Stands where wandb.init's run stands and keeps what it is told."""

    def __init__(self, **about):
        self.about, self.rows, self.axis = about, [], {}

    def define_metric(self, name, step_metric):
        self.axis[name] = step_metric

    def log(self, row):
        self.rows.append(row)


def test_a_resumed_run_is_a_whole_one_for_wandb(tmp_path, monkeypatch):
    """Each process is a run there; the one that goes on shows what the log kept, then what is new, each once."""
    runs = []
    fake = types.SimpleNamespace(init=lambda **about: runs.append(TrackedRun(**about)) or runs[-1], Error=KeyError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    logger = log.Logger(tmp_path, Args(track=True))
    logger.log(100, {"flow/nll": 1.0, "flow/each": [1.0, 2.0]}, seed=3)
    position = logger.file.tell()
    logger.log(10, {"train/q": 2.0})
    logger.file.close()
    again = log.Logger(tmp_path, Args(track=True), position)
    again.log(10, {"train/q": 2.5})
    again.file.close()
    rows = [{"flow/nll/seed3": 1.0, "step": 100}, {"train/q": 2.0, "step": 10}]
    assert [tracked.rows for tracked in runs] == [rows, [rows[0], {"train/q": 2.5, "step": 10}]]
    assert all(tracked.axis == {"*": "step"} and tracked.about["dir"] == str(tmp_path) for tracked in runs)


def test_wandb_without_an_account_is_one_line(tmp_path, monkeypatch):
    def refuse(**about):
        raise KeyError("No API key configured.")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse, Error=KeyError))
    with pytest.raises(envs.InputError, match=r"--track: .*No API key.*WANDB_MODE=offline needs no account"):
        log.Logger(tmp_path, Args(track=True))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(envs.InputError, match="wandb is not installed"):
        log.Logger(tmp_path, Args(track=True))
    assert not list(tmp_path.iterdir())


# --- flags and presets ---


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_seeds=0), "--num-seeds 0: must be at least 1"),
        (dict(num_seeds=10_000_000), "--num-seeds 10000000: must be at most 100000"),
        (dict(seed=-1), "--seed -1: must be at least 0"),
        (dict(seed=2**31), "--seed 2147483648: must be at most 2147483647"),
        (dict(rate=-0.1), "--rate -0.1: must be at least 0"),
        (dict(rate=np.nan), "--rate nan: must be finite"),
        (dict(shift=np.inf), "--shift inf: must be finite"),
        (dict(gamma=1.5), "--gamma 1.5: must be at most 1"),
        (dict(width=0.0), "--width 0.0: must be above 0"),
        (dict(sizes=()), "--sizes needs at least one number"),
        (dict(sizes=(4, 0)), "--sizes 0: must be at least 1"),
        (dict(eval_every=25), "--chunk must divide --eval-every and --num-updates"),
        (dict(num_devices=99), "--num-devices 99: 0 to "),
    ],
)
def test_limits_stand_in_the_types(args, changes, message):
    with pytest.raises(envs.InputError, match=re.escape(message)):
        runner.open_task("toy", dataclasses.replace(args, **changes), KEYS)
    runner.check(dataclasses.replace(args, shift=None, rate=0.0, gamma=1.0))


def test_flags_win_over_presets(capsys):
    values = dict(rate=0.1, fast=False, num_updates=5, sizes=(9,))
    parse = lambda words: runner.parse(Args, words.split(), lambda args: ("named", values))
    args = parse("--rate=0.7 --fast --num-updates 40")
    assert (args.rate, args.fast, args.num_updates, args.sizes) == (0.7, True, 40, (9,))
    assert not capsys.readouterr().out  # an error may follow, and stands alone
    runner.announce()
    said = capsys.readouterr().out
    runner.announce()
    assert not capsys.readouterr().out
    assert "preset named\n" in said and "not the defaults: num_updates=40 rate=0.7 sizes=(9,)\n" in said
    assert parse("--no-fast --num_updates 6").num_updates == 6
    assert parse("--rate 0.5").rate == 0.5  # given, though it is the default
    with pytest.raises(envs.InputError, match=r"--rate -1.0: must be at least 0"):
        parse("--rate -1")


@pytest.mark.parametrize(
    "words, num_updates, sizes",
    [
        ("--num-updates 1e6 --sizes 1e1 8", 1_000_000, (10, 8)),
        ("--num_updates=2.5e3", 2_500, (4, 4)),
        ("--num-updates 1_000_000 --sizes 7.0", 1_000_000, (7,)),
    ],
)
def test_counts_may_be_written_as_people_write_them(words, num_updates, sizes):
    args = runner.parse(Args, [*words.split(), "--rate", "1e-1"])
    assert (args.num_updates, args.sizes, args.rate) == (num_updates, sizes, 0.1)
    assert type(args.num_updates) is type(args.sizes[0]) is int


@pytest.mark.parametrize("words", ["--num-updates 1.5", "--sizes 4 0.5", "--seed=1e-3", "--chunk inf", "--chunk nan"])
def test_a_count_that_is_not_whole_is_refused(words):
    flag, text = re.fullmatch(r"(--[\w-]+)[ =](?:4 )?(\S+)", words).groups()
    with pytest.raises(envs.InputError, match=f"^{flag} {text}: must be a whole number$"):
        runner.parse(Args, words.split())


def test_errors_stand_alone(args, capsys):
    """What the command line changed is printed once nothing can refuse the run, and before its own lines."""
    words = [f"--dataset={args.dataset}", f"--out={args.out}", "--eval-episodes=2", "--num-updates=40", "--chunk=10"]
    with pytest.raises(envs.InputError, match="--chunk must divide"):
        learn(runner.parse(Args, [*words, "--eval-every=15"]))
    assert not capsys.readouterr().out
    learn(runner.parse(Args, [*words, "--eval-every=40"]))
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not the defaults: ")]
    assert len(told) == 1 and "eval_every=40" in told[0] and "eval_every=15" not in told[0] and "gamma" not in told[0]


def test_help_is_in_the_groups_of_the_source(capsys):
    run = "Run     python toy.py --quick     (seconds)\n           --more\n"
    doc = f"toy: learns\nnothing.\n\nPaper   none\n{run}Expect  1"
    with pytest.raises(SystemExit) as ended:
        runner.parse(Args, ["--help"], None, ("cpu", "hopper"), doc)
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "toy: learns nothing." in said and "Paper" not in said
    assert "those on the line win): cpu, hopper" in said and "Expect" not in said
    assert "examples:\n  python toy.py --quick     (seconds)\n     --more\n" in said
    assert re.findall(r"^(\S.*):$", said, re.M) == ["examples", "data", "run", "budget", "the fit"]
    found = " ".join(said[said.index("the fit:") :].split())
    for words in (
        "--fit-updates N [60] updates of the fit at most", "--rate X [0.5]", "--sizes N ... [4 4]",
        "--shift X a number", "--kind {a,b} [a] a choice", "--fast, --no-fast a switch",
    ):  # fmt: skip
        assert words in found, words


PUBLISHED = {"hopper-medium-v2": {"rate": 2.0}, "walker2d-medium-v0": {"rate": 3.0, "kind": "b"}}


@pytest.mark.parametrize(
    "flags, named, values",
    [
        (dict(quick=True), "quick", {"rate": 9.0}),
        (dict(), "by the file (nothing is published for point-angle-0-scripted)", {"rate": 1.0}),
        (dict(preset="cpu"), "cpu (nothing is published for", {"rate": 1.0, "chunk": 7}),
        (
            dict(preset="hopper-medium-v2"),
            "hopper-medium-v2 (as published for hopper-medium-v2; the data",
            {"rate": 2.0},
        ),
        (dict(preset="walker2d-medium-v9"), "walker2d-medium-v9 (as published", {"rate": 3.0, "kind": "b"}),
    ],
)
def test_presets(dataset, flags, named, values):
    """By the file, by name (also of another version), with a budget on top; nothing of two sets is mixed."""
    args = Args(dataset=dataset, **flags)
    name, found = runner.preset(args, PUBLISHED, {"cpu": {"chunk": 7}}, {"rate": 9.0}, own={"rate": 1.0})
    assert name.startswith(named) and found == values


def test_a_files_own_preset_is_chosen_without_reading_its_arrays(dataset, monkeypatch):
    monkeypatch.setattr(envs.buffers, "load", None)
    known = {"point-angle-0-scripted": {"rate": 4.0}}
    name, found = runner.preset(Args(dataset=dataset, preset="cpu"), known, {"cpu": {"chunk": 7}}, {})
    assert "as published for point-angle-0-scripted" in name and found == {"rate": 4.0, "chunk": 7}
    assert presets.preset_name("ours/hopper-medium", PUBLISHED) == "ours/hopper-medium"
    for name in ("hopper", "hopper-medium2", "hopper-medium-v"):  # other sets
        assert presets.preset_name(name, PUBLISHED) == name


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(preset="gpu", quick=True), "--preset gpu: unknown; one of cpu, ours, published, hopper-medium-v2"),
        (dict(preset="cpu", quick=True), "leave --preset out"),
        (dict(), "--dataset: name a file that udg_select.py wrote, or try --quick"),
        (dict(dataset="none.npz"), "none.npz: .* does not exist"),
    ],
)
def test_presets_refuse(flags, message):
    with pytest.raises(envs.InputError, match=message):
        runner.preset(Args(**flags), PUBLISHED, {"cpu": {}}, {})


# --- evaluation ---


def test_returns_are_the_worlds(dataset):
    """One action for ever on the point robot: rewards by numpy; the first half of an episode beside the whole."""
    buffer, task = envs.buffers.load_task(dataset, KEYS)
    buffer.metadata["episode_length"] = 50
    args = Args(num_seeds=2, eval_episodes=3)
    act = lambda x, observations, key: jnp.tile(x, (len(observations), 1))
    evaluate = runner.each_seed(runner.returns_of(act, envs.make(task), task, buffer, args), args)
    found = evaluate(jnp.array([[1.0, 0.0], [-0.5, 0.0]]), runner.evaluation_keys(args))
    velocity, total = np.zeros(2), []
    for _ in range(100):
        velocity = np.clip(0.98 * velocity + 0.1 * np.array([1.0, -0.5]), -1, 1)
        total.append(velocity)
    np.testing.assert_allclose(found["eval/return"], np.sum(total, 0), rtol=1e-4)
    np.testing.assert_allclose(found["eval/return_data_length"], np.sum(total[:50], 0), rtol=1e-4)
    np.testing.assert_allclose(found["eval/return_std"], 0, atol=1e-5)
    np.testing.assert_allclose(found["eval/score"], task.normalized_score(np.sum(total, 0)), rtol=1e-4)


def test_a_return_is_constant_once_an_episode_ended():
    class World:
        """Pays 1 a step and ends after three."""

        reset = staticmethod(lambda key: envs.State(None, jnp.zeros(1), jnp.float32(0), jnp.float32(0), {}, {}))

        @staticmethod
        def step(state, action):
            obs = state.obs + 1
            return state.replace(obs=obs, reward=jnp.float32(1), done=jnp.float32(obs[0] >= 3))

    act = lambda params, observations, key: observations
    totals = runner.play(
        World, act, None, jax.random.split(jax.random.key(0), 2), jax.random.split(jax.random.key(1), 5)
    )
    np.testing.assert_array_equal(totals, [[1, 2, 3, 3, 3]] * 2)


def test_evaluation_keys_are_a_seeds_own():
    """Seed 1 has the same key alone and among others, and no split of its training key ever gives it."""
    bits = jax.random.key_data(runner.evaluation_keys(Args(seed=1)))
    np.testing.assert_array_equal(bits[0], jax.random.key_data(runner.evaluation_keys(Args(num_seeds=3)))[1])
    for num in range(2, 9):
        assert not (jax.random.key_data(jax.random.split(jax.random.key(1), num)) == bits).all(-1).any()


def test_seed_keys_are_split_within_a_seed():
    first, second = runner.seed_keys(Args(seed=4, num_seeds=2), 2)
    wanted = jax.random.split(jax.random.key(5), 2)
    np.testing.assert_array_equal(jax.random.key_data(first[1]), jax.random.key_data(wanted[0]))
    np.testing.assert_array_equal(jax.random.key_data(second[1]), jax.random.key_data(wanted[1]))


# --- figures and neighbours ---


def test_a_score_leaves_out_what_was_evaluated_before_any_learning(tmp_path):
    lines = [
        {},
        *({"step": s, "eval/return": r, "eval/return_data_length": r} for s, r in ((0, 9.0), (1, 1.0), (2, 2.0))),
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = plots.summary(tmp_path, {"episode_returns": np.ones(2)})
    assert (found["score"], found["best"], found["score_data_length"]) == (1.5, 2.0, 1.5)


@pytest.mark.parametrize("length, titles", [(100, ["point-angle-0, 100 steps"]), (50, [
    "point-angle-0, 100 steps", "point-angle-0, first 50 steps, as long as the data's",
])])  # fmt: skip
def test_learning_curve_has_one_panel_for_each_length(tmp_path, monkeypatch, length, titles):
    """The data's mean and best are in the last one, whose episodes are as long as the data's."""
    lines = [{}, {"step": 10, "seed": 0, "eval/return": 1.0, "eval/return_data_length": 0.5}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    drawn, data = [], {"episode_returns": np.array([1.0, 3.0])}
    monkeypatch.setattr(plots, "figure", lambda path, panels: drawn.extend(panels))
    buffer = type("", (), {"metadata": {"episode_length": length}, "__getitem__": lambda self, key: data[key]})()
    plots.learning_curve("x.png", tmp_path, envs.task("point-angle-0"), buffer)
    assert [panel["title"] for panel in drawn] == titles
    assert [y for x, y, _ in drawn[-1]["lines"] if x is None] == [2.0, 3.0]


@pytest.mark.parametrize("scale", ["loglog", "semilogy"])
@pytest.mark.parametrize(
    "low, high", [(1.0, 1.02), (81_000, 83_000), (2.0, 9.0), (1.3e-5, 9e-5), (0.13, 1.6), (0.9, 11.0), (1e-3, 2e7)]
)
def test_numbers_of_an_axis_do_not_overlap(tmp_path, monkeypatch, scale, low, high):
    """On log scales of any range, two numbers at least on each axis, and each at its place."""
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", lambda drawn: None)
    x = np.geomspace(low, high, 20)
    line = (x if scale == "loglog" else np.arange(20), x, {"label": "a"})
    plots.figure(tmp_path / "x.png", [{"title": "t", "xlabel": "x", "ylabel": "y", "scale": scale, "lines": [line]}], 5)
    axes = plt.gcf().axes[0]
    monkeypatch.undo()
    for axis, along in ((axes.xaxis, 0), (axes.yaxis, 1)):
        near, far = sorted(axis.get_view_interval())
        places = [*axis.get_majorticklocs(), *axis.get_minorticklocs()]
        labels = [*axis.get_majorticklabels(), *axis.get_minorticklabels()]
        seen = [label for at, label in zip(places, labels, strict=True) if near <= at <= far and label.get_text()]
        boxes = sorted([label.get_window_extent().get_points()[:, along] for label in seen], key=lambda box: box[0])
        assert len(seen) >= 2 and all(one[1] < two[0] for one, two in itertools.pairwise(boxes)), seen
    plt.close("all")


def test_training_draws_what_the_log_has(whole, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plots, "figure", lambda path, panels, width: drawn.extend(panels))
    panels = [
        ("train/q", "a", "Q", "linear"),
        ("none", "b", "", "linear"),
        ({"train/q": "q", "none": "n"}, "c", "", "semilogy"),
    ]
    plots.training(tmp_path / "x.png", whole[0], panels)
    assert [(panel["title"], len(panel["lines"])) for panel in drawn] == [("a", 2), ("c", 1)]
    q = plots.read(whole[0], "train/q")
    np.testing.assert_allclose(drawn[1]["lines"][0][1], (q[0][1] + q[1][1]) / 2)


@pytest.mark.parametrize("name", ["envs", "runner"])
@pytest.mark.parametrize("package", [True, False])
def test_a_folder_that_hides_a_package_is_named(tmp_path, name, package):
    """By what a copied script imports of ours, in its order."""
    (tmp_path / name).mkdir()
    if package:
        (tmp_path / name / "__init__.py").write_text("")
    imports = re.findall(r"^(?:import|from) (?:envs|runner).*\n", (ROOT / "dac.py").read_text(), re.M)
    (tmp_path / "mine.py").write_text("".join(imports) + "runner.launch()\n")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # as after `pip install -e .`
    done = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and f"`{name}` is hidden by {tmp_path / name}" in line and "rename that folder" in line


# --- devices of a CPU ---


def test_cores_are_those_that_a_container_allows(monkeypatch, tmp_path):
    """Of 8: by the quota of control groups 2 and 1, by NPROC."""
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(host, "Path", lambda path: tmp_path / Path(path).name)
    monkeypatch.delenv("NPROC", raising=False)
    allowed = ("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8)
    for text, wanted in allowed:
        (tmp_path / "cpu.max").write_text(text)
        assert host.cores() == wanted
    (tmp_path / "cpu.max").unlink()
    assert host.cores() == 8
    for text, wanted in (("-1", 8), *allowed[1:]):
        for name, number in zip(("cpu.cfs_quota_us", "cpu.cfs_period_us"), (*text.split(), "100000"), strict=False):
            (tmp_path / name).write_text(f"{number}\n")
        assert host.cores() == wanted
    for text, wanted in (("3", 3), ("0", 1), ("many", 8)):
        monkeypatch.setenv("NPROC", text)
        assert host.cores() == wanted


def test_memory_is_what_a_container_allows(monkeypatch, tmp_path):
    """Of a container that may use 1000 bytes and uses 700, 200 of them for the files that it read."""
    texts = {"memory.max": "1000\n", "memory.current": "700", "meminfo": "MemTotal: 9 kB\nMemAvailable: 2 kB"}
    texts["memory.stat"] = "anon 500\nactive_file 50\ninactive_file 150"
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    for module in (devices, files):
        monkeypatch.setattr(module, "Path", lambda path: tmp_path / os.path.basename(path))
    assert (devices.memory() * jax.local_device_count(), files.available_memory()) == (1000, 500)
    (tmp_path / "memory.max").write_text("max\n")
    assert devices.memory() * jax.local_device_count() > 1e6 and files.available_memory() == 2048


def test_a_cpu_is_split_unless_somebody_has_said_otherwise(monkeypatch):
    made = []
    monkeypatch.setattr(devices.jax.config, "update", lambda name, num: made.append(num))
    for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    for asked, own in ((0, 1), (0, 2), (3, 2), (1, 2)):
        devices.split_cpu(asked, own)
    assert made == [2, 3]
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    devices.split_cpu(0, 2)
    assert made == [2, 3]

    def begun(name, num):
        raise RuntimeError("jax has begun")

    monkeypatch.setattr(devices.jax.config, "update", begun)
    monkeypatch.delenv("XLA_FLAGS")
    devices.split_cpu(0, 2)  # stays one
    with pytest.raises(envs.InputError, match="--num-devices 2: jax has begun"):
        devices.split_cpu(2, 1)
