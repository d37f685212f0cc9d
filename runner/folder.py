"""The folder of a run, and the data that a learner opens."""

from pathlib import Path

import envs
import envs.buffers
from envs.buffers import scripted
from runner.flags import check_run

QUICK_TASK = "point-angle-0"


def folder_of(args, script, task):
    """The run's folder -> path; InputError where it holds another run.

    With --resume it must hold one.
    """
    folder = Path(args.out or f"runs/{script}/{task}/seed{args.seed}")
    there = any(folder.glob("**/state*.npz")) or (folder / "policy.npz").exists()
    if there and not args.resume:
        raise envs.InputError(f"{folder} already holds a run: go on with --resume or choose another --out")
    return folder, there


def open_task(script, args, keys):
    """Refuse bad flags, then read the data that a learner learns from -> buffer, task.

    keys: the columns to read, None for all. With --quick and no --dataset, scripted rows are made in the run's folder.
    """
    check_run(args)
    path = args.dataset
    if not path:
        path = scripted.dataset(folder_of(args, script, QUICK_TASK)[0])
    buffer, task = envs.buffers.load_task(path, keys, args.task, args.max_rows)
    folder_of(args, script, task.name)
    if len(buffer) < 20:
        raise envs.InputError(f"--dataset: {len(buffer)} rows are too few")
    return buffer, task
