"""Cells: commands that each make a file, run when those before them are done; studies, suite and references use them.

A cell is done when its file is there, made by the same command, with the same flags (a preset may have changed under
the same words), from the same data. It runs in a process of its own,
at a fixed core where several run at once, with its output in <base>/logs/<cell>.log; <cell>.lock is held while the
command lives, and <cell>.json says what made the file. What is done is skipped; a run that was stopped (Ctrl-C,
SIGTERM, kill) goes on from its state; a cell that fails takes those that need it with it, and no others.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import tyro

import envs
import runner
from envs import InputError, buffers
from envs.buffers.convert.common import file_sha256
from runner import write_whole
from runner.log import data_told
from runner.run import FREE

ROOT = Path(__file__).resolve().parents[1]
HEARD_EVERY = 60.0  # seconds between what the cells at work say, where none has ended
BUSY, ASKED_EVERY = "another process is making it now", 30.0  # seconds until it is asked for again
NEUTRAL = {"track": False, "matmul_precision": "float32", "task_reward": "", "max_rows": 0}  # as before they were flags


class Cell(NamedTuple):
    """A command, the file that it writes last, and the cells that must be done before."""

    name: str
    command: list[str]
    done: Path
    needs: tuple[str, ...]
    runs: Path | None = None  # the folder of a run, which goes on from its state
    reads: tuple[Path, ...] = ()  # buffers, or folders of them: made anew with other rows, the cell is not done


def portable(command):
    """A command with paths as from the repository's root."""
    return " ".join(["python", *command])


# === records ===


def record_file(cell, base):
    """Where the command of a finished cell is kept, to see whether it is still the one that is asked for."""
    return base / "logs" / f"{cell.name.replace(' ', '_').replace('/', '-')}.json"


def read_record(cell, base):
    """The record of a finished cell; {} where there is none, or a torn one."""
    try:
        return json.loads(record_file(cell, base).read_text())
    except (OSError, ValueError):
        return {}


def write_record(cell, base, about, reads=None):
    """Note that a cell is done: its command, the rows that it read, commit and versions, and what `about` says.

    reads: their fingerprint; None: that of the rows there now.
    """
    record = record_file(cell, base)
    record.parent.mkdir(parents=True, exist_ok=True)
    about = {"command": cell.command, **about, "reads": fingerprint(cell) if reads is None else reads}
    write_whole(record, json.dumps(about | {"commit": buffers.git_commit(), "versions": buffers.versions()}))


def files_read(cell):
    """The buffer files that a cell reads."""
    return [file for path in cell.reads for file in (sorted(path.glob("*.npz")) if path.is_dir() else [path])]


def digests_of(file):
    """{column: sha256} of a buffer file, by its metadata alone."""
    with np.load(file, allow_pickle=False) as arrays:
        return json.loads(str(arrays["metadata_json"]))["sha256"]


def fingerprint(cell):
    """Digest of the arrays in the buffers that a cell reads, whatever else the files say; "" where one is gone."""
    files, digest = files_read(cell), hashlib.sha256()
    if not all(file.exists() for file in files):
        return ""
    for file in files:
        digest.update(json.dumps(digests_of(file), sort_keys=True).encode())
    return digest.hexdigest()


def is_done(cell, base):
    """Whether a cell was finished, by this very command as it is meant now, and from the data that is there now."""
    record = read_record(cell, base)
    if not cell.done.exists() or record.get("command") != cell.command:
        return False
    left = flags_left(cell)
    return fingerprint(cell) in ("", record["reads"]) and not (left and flags_differ(cell, left))


def finished_cells(cells, base):
    """Cells that are done here with all that they need: without its selection a learner's rows cannot be written."""
    finished = {}
    for name, cell in cells.items():  # each stands after what it needs
        if finished.keys() >= set(cell.needs) and is_done(cell, base):
            finished[name] = cell
    return finished


def made_by(cell):
    """Commit and versions that a run began with, from its own log; {} where a cell has none."""
    try:
        header = json.loads((cell.runs / "log.jsonl").read_text().partition("\n")[0])
        return {key: header[key] for key in ("commit", "versions")}
    except (AttributeError, TypeError, OSError, ValueError, KeyError):
        return {}


# === cells without a record ===


def args_of(script, words):
    """The flags that a command line of a script means, presets included."""
    return runner.parse(script.Args, list(words), script.preset)


def flags_of(cell):
    """The flags that a cell's command means, as its script would write them down.

    A preset asks for the name of the data. Where they are gone nothing is published for them: they are our own.
    """
    script = importlib.import_module(Path(cell.command[0]).stem)
    if script.__name__ == "udg_select":
        return script.portable_flags(tyro.cli(script.Args, args=cell.command[1:]))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as stack:
        if not fingerprint(cell):
            stack.enter_context(mock.patch.object(buffers, "read_metadata", lambda path: {"dataset_name": ""}))
        args = args_of(script, cell.command[1:])
        if script.__name__ == "wurl_sac":
            args = script.whole_rounds(args, args.episode_length or envs.task(args.task).episode_length)
        return dataclasses.asdict(args)


def flags_left(cell):
    """The flags that whoever made a cell left beside its results; {} where there are none."""
    try:
        if cell.runs:
            left = json.loads((cell.runs / "args.json").read_text())
            old = {True: "size", False: "none"}  # --q-norm was a switch once
            return left | ({"q_norm": old.get(left["q_norm"], left["q_norm"])} if "q_norm" in left else {})
        return json.loads(cell.done.read_text())["flags"] if cell.command[0] == "udg_select.py" else {}
    except (OSError, ValueError, KeyError):
        return {}


def flags_differ(cell, left):
    """Names of the flags in which `left`, what a cell was made with, is not what its command means now.

    A flag that did not exist when a cell was made differs, unless its value now leaves all as it was (NEUTRAL).
    """
    try:
        wanted = json.loads(json.dumps(flags_of(cell)))
    except InputError:  # a preset that cannot read the data
        return ["dataset"]
    wanted = with_columns(wanted)
    left = with_columns(json.loads(json.dumps(NEUTRAL | left))) if left else {}
    free = {*FREE, *(["chunk"] if cell.command[0] == "wurl_sac.py" else [])}
    left = {k: v for k, v in left.items() if k in wanted or k not in NEUTRAL}
    return [k for k in sorted((wanted.keys() | left.keys()) - free) if left.get(k) != wanted.get(k)]


def with_columns(flags):
    """`--angles task` as a run leaves it behind: the columns that the task of its data names."""
    if flags.get("angles") != "task" or not flags.get("dataset"):
        return flags
    try:
        task = flags.get("task") or buffers.read_metadata(ROOT / flags["dataset"])["task"]
        return flags | {"angles": ",".join(map(str, envs.task(task).angles if task else ())) or "none"}
    except (InputError, OSError, KeyError):  # data that are not there
        return flags


def rows_differ(cell):
    """Whether a cell was made from other rows than its command reads now; a learner that does not say, too."""
    try:
        if cell.command[0] == "udg_select.py":
            found = json.loads(cell.done.read_text())["selections"].values()
            made_from = {parent["sha256"] for selection in found for parent in selection["parents"]}
            return not made_from <= {file_sha256(file) for file in files_read(cell)}
        if not cell.reads or not fingerprint(cell):  # what was deleted to save space has not changed
            return False
        if not (cell.runs / "state.npz").exists():  # as a run may be copied; its log says, too
            header = json.loads((cell.runs / "log.jsonl").read_text().partition("\n")[0])
            known = digests_of(cell.reads[0])
            return header["data"] != data_told([known[name] for name in runner.DIGESTED], header["data"]["rows"])
        made_from = runner.read_npz(cell.runs / "state.npz")[1]["identity"]["data"]
        return not set(made_from) <= set(digests_of(cell.reads[0]).values())
    except (OSError, ValueError, KeyError):
        return cell.command[0] != "udg_select.py"


def adopt(cells, base):
    """Record cells that were made by hand (--commands) where flags and rows that they left are the command's."""
    for cell in cells.values():
        if not cell.done.exists() or read_record(cell, base):
            continue
        differ = flags_differ(cell, flags_left(cell))
        if differ or rows_differ(cell):
            why = f"by another command ({', '.join(differ)} differ)" if differ else "from other rows"
            print(f"{cell.name}: made {why}: it does not count", flush=True)
        else:
            write_record(cell, base, {"by_hand": True})


# === running ===


class Stopping:
    """Turns the first Ctrl-C or SIGTERM into `name` and asks the cells that run to save and end; a second is obeyed."""

    def __enter__(self):
        self.name, self.running = "", set()
        self.old = {n: signal.signal(n, self.handle) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def handle(self, number, frame):
        self.name = signal.Signals(number).name
        self.__exit__()
        for process in list(self.running):
            process.terminate()

    def __exit__(self, *exc):
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def run(self, command, out, lock, cache):
        """Run a command apart from the terminal, so that a Ctrl-C reaches it once -> exit status, its seconds of the
        processor, its greatest memory in bytes.

        Cells of one shape share what they compile in the folder `cache`: half of a point cell's minute is compilation.
        """
        env = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True, pass_fds=(lock.fileno(),),
            env=env | os.environ,
        )  # fmt: skip
        self.running.add(process)
        if self.name:  # the signal came before the process was known
            process.terminate()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        self.running.discard(process)
        return process.returncode, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def run_cell(cell, base, core, stopping):
    """Run one command to its end, its output in a log beside its record -> what went wrong, or "".

    The lock is the command's, too: while it lives, even after its launcher was killed, no other makes the same cell.
    """
    record = record_file(cell, base)
    record.parent.mkdir(parents=True, exist_ok=True)
    if core is not None:
        os.sched_setaffinity(0, {core})  # of this thread, and of what it starts
    with open(record.with_suffix(".lock"), "w") as lock, open(record.with_suffix(".log"), "ab") as out:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return BUSY
        if is_done(cell, base):  # by that other process, a moment ago
            return ""
        began, resume, reads = time.time(), [], fingerprint(cell)
        if cell.runs and runner.state_files(cell.runs):
            resume = ["--resume"]
        elif not cell.runs:
            cell.done.unlink(missing_ok=True)  # of another command: it must not pass for this one's
        command, cache = [sys.executable, *cell.command, *resume], (base / "jax_cache").resolve()
        code, cpu, memory = stopping.run(command, out, lock, cache)
        if code or not cell.done.exists():
            said = record.with_suffix(".log").read_text(errors="replace").strip().splitlines()
            anew = f"; to begin it anew, move {cell.runs} away" if resume else ""
            return f"exit {code}: {said[-1] if said else 'it said nothing'}\n  see {record.with_suffix('.log')}{anew}"
        spent = {"seconds": round(time.time() - began), "cpu_seconds": round(cpu)}
        if fingerprint(cell) != reads:
            away = f"; move {cell.runs} away first" if cell.runs else ""
            return f"what it reads was replaced while it ran: make it again{away}"
        write_record(cell, base, spent | {"peak_gb": round(memory / 1e9, 2), "resumed": bool(resume)}, reads)
    return ""


def tell_at_work(cells, base):
    """The newest line of each cell that is running: its own steps, rate and ETA."""
    for cell in cells:
        log = record_file(cell, base).with_suffix(".log")
        said = log.read_text(errors="replace").split("\n") if log.exists() else []
        newest = next((line.strip() for line in reversed(said) if line.strip()), "nothing yet")
        print(f"  at work: {cell.name}: {newest[:120]}", flush=True)


def start_ready(waiting, done, failed, base, room, submit, busy=()):
    """One pass over what waits: skip what is done, drop what lost a need, submit what can run in `room` places; `busy`
    are made by another process."""
    for name, cell in list(waiting.items()):  # each stands after what it needs
        lost = sorted(failed & set(cell.needs))
        if lost:
            print(f"left out {name}: it needs {lost[0]}", flush=True)
            failed.add(name)
        elif not done >= set(cell.needs):
            continue
        elif is_done(cell, base):
            done.add(name)
        elif room > 0 and name not in busy:
            room -= 1
            submit(name, cell)
        else:
            continue
        del waiting[name]


def run_cells(cells, base, jobs):
    """Run what is not done, `jobs` at once, each on a core of its own -> names of what was not made, signal or ""."""
    waiting, done, failed, running, began = dict(cells), set(), set(), {}, time.time()
    count, made = sum(not is_done(cell, base) for cell in cells.values()), 0
    cores = sorted(os.sched_getaffinity(0)) if jobs > 1 and hasattr(os, "sched_getaffinity") else None
    free, lock, busy = list(range(jobs)), threading.Lock(), {}  # busy: when they were found so
    theirs = set()

    def work(cell):
        with lock:
            slot = free.pop()
        try:
            return run_cell(cell, base, cores[slot % len(cores)] if cores else None, stopping)
        except Exception as error:  # a full disk, a lost folder: this cell's failure, not that of all
            return f"{type(error).__name__}: {error}"
        finally:
            with lock:
                free.append(slot)

    with Stopping() as stopping, ThreadPoolExecutor(jobs) as pool:
        submit = lambda name, cell: running.update({pool.submit(work, cell): name})
        while True:
            busy = {name: since for name, since in busy.items() if time.time() - since < ASKED_EVERY}
            start_ready(waiting, done, failed, base, 0 if stopping.name else jobs - len(running), submit, busy)
            count, theirs = count - len(theirs & done), theirs - done  # what the other process has made
            if not running and busy and not stopping.name:
                time.sleep(min(ASKED_EVERY, 5.0))
                continue
            if not running:
                break
            ended = wait(running, timeout=HEARD_EVERY, return_when=FIRST_COMPLETED)[0]
            if not ended:
                tell_at_work([cells[name] for name in running.values()], base)
            for future in ended:
                name, wrong = running.pop(future), future.result()
                if wrong == BUSY:
                    print(f"waiting for {name}: {BUSY}", flush=True)
                    waiting[name], busy[name], theirs = cells[name], time.time(), theirs | {name}
                    waiting = {name: waiting[name] for name in cells if name in waiting}  # each after what it needs
                    continue
                made += 1
                (failed if wrong else done).add(name)
                if wrong:
                    told = "stopped" if stopping.name else "FAILED"
                    print(f"{told} {name}: {wrong}\n  {portable(cells[name].command)}", flush=True)
                spent, left = (time.time() - began) / 60, max(count - made, 0)
                print(f"[{made}/{count}]  {spent:.1f} min, ETA {spent / made * left:.1f} min  {name}", flush=True)
    return failed | set(waiting), stopping.name
