"""The folder of a run, and the data that a learner opens."""

import contextlib
import dataclasses
import fcntl
import os
from pathlib import Path

import envs
import envs.buffers
from envs.buffers import scripted
from runner.files import STATES, full_disk
from runner.flags import check_run, refuse
from runner.log import say

QUICK_TASK = "point-angle-0"
FEWEST_ROWS = 20


def places(folder):
    """The folder of a run and those inside it, its phases' among them; not those that hold runs of their own."""
    return [folder, *(x for x in folder.glob("*/") if not (x / "args.json").exists())]


def state_files(folder):
    """The states of a run, of all its phases."""
    return [place / name for place in places(folder) for name in STATES if (place / name).exists()]


def folder_of(args, script, task):
    """The run's folder -> path, whether it holds a run; InputError where it does and --resume is not given."""
    folder = Path(args.out or f"runs/{script}/{task}/seed{args.seed}")
    log = folder / "log.jsonl"
    logged = log.exists() and log.read_bytes().count(b"\n") > 1  # the states may have been deleted to save space
    there = bool(state_files(folder)) or logged or (folder / "policy.npz").exists()
    if there and not args.resume:
        raise envs.InputError(f"{folder} already holds a run: go on with --resume or choose another --out")
    return folder, there


class Hold:
    """The folder, made, and this process's alone: no other may write into it until this one ends or releases it.

    What is locked is a file in it: NFS locks for all machines, but only what is open for writing.
    """

    def __init__(self, folder, is_first):
        """is_first: of several processes that share a run, the one that holds the folder for all."""
        self.folder, self.is_first, self.file = folder, is_first, None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise OSError("no permission, or a read-only disk")
            while is_first and not self.lock():
                self.file.close()
        except BlockingIOError:
            self.file.close()
            raise envs.InputError(f"{folder}: another process runs in it; wait, or choose another --out") from None
        except OSError as error:
            told = full_disk(error, folder) or f"{folder}: cannot be written ({error}); choose another --out"
            raise envs.InputError(told) from None

    def lock(self):
        """Lock the file -> whether it is still there: its last holder may have removed it in the meantime."""
        self.file = open(self.folder / ".lock", "a+")  # noqa: SIM115
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            say(f"{self.folder}: the disk locks no files ({error.strerror}); let no other process run in this folder")
        return self.is_there()

    def is_there(self):
        return os.fstat(self.file.fileno()).st_nlink > 0

    def tidy(self):
        """Remove what a kill left while a file was being written."""
        for place in places(self.folder) if self.is_first else ():
            for torn in (*place.glob(".*.npz.*.tmp"), *place.glob(".args.json.*.tmp")):
                torn.unlink(missing_ok=True)

    def release(self):
        if self.file is not None:
            with contextlib.suppress(OSError):
                if self.is_there():  # else the folder was removed, and one of its name may be another's
                    (self.folder / ".lock").unlink()
            self.file.close()
        self.file = None


def with_angles(args, task):
    """--angles checked, and `task` in it replaced by the task's own columns -> args."""
    angles = ",".join(map(str, task.angles)) or "none" if args.angles == "task" else args.angles
    named, size = angles.split(","), task.observation_size
    columns = {int(i) for i in named if i.isdecimal() and int(i) < size}
    told = f"--angles {angles}: task, none, or different columns below {size}, such as 0,1"
    refuse({told: angles == "none" or len(columns) == len(named)})
    return dataclasses.replace(args, angles=angles)


def open_task(script, args, keys):
    """Refuse bad flags, then read the data that a learner learns from -> buffer, task.

    keys: the columns to read, None for all. With --quick and no --dataset, scripted rows are made in the run's folder.
    """
    check_run(args)
    path = args.dataset
    if not path:
        path = scripted.dataset(folder_of(args, script, QUICK_TASK)[0])
    buffer, task = envs.buffers.load_task(path, keys, args.task, args.max_rows)
    task = envs.rewards.of_data(buffer.metadata, buffer.path, task, args.task_reward)
    folder_of(args, script, task.name)  # refused before any long work
    if len(buffer) < FEWEST_ROWS:
        remedy = "raise --max-rows" if args.max_rows else "record more, or name another --dataset"
        raise envs.InputError(f"{buffer.path}: {len(buffer)} rows are too few, {FEWEST_ROWS} are needed; {remedy}")
    scaled = getattr(args, "scale_rewards", hasattr(args, "return_range"))
    if not scaled and hasattr(args, "gamma"):
        remedy = "say --scale-rewards" if hasattr(args, "scale_rewards") else "divide them in the file"
        envs.buffers.check_raw_rewards(buffer["rewards"], args.gamma, args.q_bound, remedy)
    return buffer, task
