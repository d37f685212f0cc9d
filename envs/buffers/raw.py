"""Raw buffers of one world, opened to be relabelled: found by folder, file or glob, their large columns unread."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from envs import maze
from envs.buffers.convert.common import runs
from envs.buffers.fields import COLUMNS, STRUCTURE
from envs.buffers.files import find
from envs.buffers.reading import load, no_task
from envs.errors import InputError
from envs.task import Transition
from envs.worlds import is_own, task_of_file

ROOT = ("root_positions", "root_velocities")
CHECKED = ("actions", *ROOT)  # columns whose values are checked when a buffer is opened
BLOCK = 1 << 18  # rows that a task looks at at a time


def buffer_paths(words):
    """Expand folders (or their `buffers` folder), files and globs -> list of files."""
    paths = []
    for word in words:
        folder = Path(word)
        if folder.is_dir():
            folder = folder / "buffers" if (folder / "buffers").is_dir() else folder
            found = sorted(folder.glob("*.npz"))
            if not found:
                raise InputError(f"{word}: no buffers (*.npz) here; has the run finished?")
            paths += found
        else:
            paths += find(word)
    unique = list({path.resolve(): path for path in paths}.values())
    if not unique:
        raise InputError("--buffers: no buffers given; name the folder of a wurl_sac.py run")
    return unique


def short_names(paths):
    """Return file names, with as many parent folders as it takes to tell them apart."""
    parts = [path.resolve().with_suffix("").parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError(f"--buffers: {paths[0]} is named twice")


def map_buffer(path):
    """Open a raw buffer; only the columns that are scored are read and checked."""
    read = {*CHECKED, *STRUCTURE}
    lazy = tuple(key for key in COLUMNS if key not in read)
    buffer = load(path, quiet=True, unchecked=lazy)
    if is_own(buffer.metadata["env"]):  # such a world has no root, and its buffers need not say so
        nothing = np.broadcast_to(np.float32(0), (len(buffer), 2))
        rooted = dict.fromkeys(ROOT, nothing) | buffer.arrays
        buffer = dataclasses.replace(buffer, arrays=rooted)
    for key in CHECKED:
        if key not in buffer.arrays and (remedy := no_task(buffer)):
            raise InputError(f"{path}: env: no task pays '{buffer.metadata['env']}'. Remedy: {remedy}")
        buffer[key]
    if buffer.metadata["layout"] != "env" and not shows_world(buffer):
        raise InputError(
            f"{path}: layout: observations are those of task '{buffer.metadata['task']}', not of "
            "the world. Remedy: use the original buffers, which this file was made from"
        )
    return buffer


def shows_world(buffer):
    """Whether a buffer in a task's layout, as an import is, holds all that the world shows."""
    about = buffer.metadata
    if about["reward_kind"] == "relabelled":  # its goals, terminals and ids are of another selection
        return False
    try:
        observe = task_of_file(str(about["task"]), **about["task_options"]).observe
    except (TypeError, ValueError, ArithmeticError):  # the metadata may be a stranger's
        return False
    numbers = np.arange(1, 1 + buffer["observations"].shape[1], dtype=np.float32)
    return np.array_equal(observe(numbers), numbers)


def with_goals(buffer, seed):
    """The buffer of a maze with a goal for every trajectory, where it has none."""
    name = buffer.metadata["env"].partition("ant-maze-")[2]
    if "goals" in buffer.arrays or name not in maze.MAPS:
        return buffer
    ids = trajectories(buffer)
    keys = jax.random.split(jax.random.key(seed), 1 + ids[-1])
    goals = np.asarray(jax.vmap(lambda key: maze.sample_goal(name, key))(keys))
    print(f"{buffer.path}: no goals in the data: drawn for {len(goals)} trajectories, as at a reset", flush=True)
    return dataclasses.replace(
        buffer, arrays={**buffer.arrays, "goals": goals[np.repeat(ids, buffer["episode_lengths"])]}
    )


def trajectories(buffer):
    """(E,) number of the trajectory of each episode: what goes on beyond a terminal is one."""
    return np.searchsorted(runs(buffer.arrays), buffer["episode_ends"])


def in_blocks(function, buffer, dtype):
    """A function of a Transition over all rows, BLOCK at a time -> (N,)."""
    found = np.empty(len(buffer), dtype)
    for start in range(0, len(buffer), BLOCK):
        rows = slice(start, start + BLOCK)
        found[rows] = function(transitions(buffer, rows))
    return found


def end_by_task(buffer, task):
    """The buffer with episodes that end where the task ends: as recorded, but in mazes."""
    reached, recorded = in_blocks(task.terminal, buffer, bool), buffer["terminals"]
    if not (reached != recorded).any():
        return buffer
    broken = np.zeros(len(buffer), bool)
    broken[runs(buffer.arrays) - 1] = True  # the data does not go on: cut, or reset
    terminals = recorded | reached
    if "goals" in buffer.arrays:  # udg_select.py, D5
        terminals = reached | recorded & broken
    elif (missed := terminals & ~recorded & ~broken).any():
        raise InputError(
            f"{buffer.path}: terminals: '{task.name}' ends an episode in {missed.sum()} rows where "
            "the data goes on. Remedy: collect in the task's world, or without termination"
        )
    ends = np.flatnonzero(terminals | broken) + 1
    changed = {
        "terminals": terminals,
        "timeouts": broken & ~terminals,
        "episode_ends": ends,
        "episode_lengths": np.diff(ends, prepend=0).astype(np.int32),
    }
    return dataclasses.replace(buffer, arrays={**buffer.arrays, **changed})


def transitions(buffer, rows):
    """Raw Transition of some rows (a slice or indices)."""
    unpaid = buffer.metadata["reward_kind"] == "none"  # its rewards are zeros that nobody paid
    names = (x for x in Transition._fields if x in buffer.arrays and not (unpaid and x == "rewards"))
    return Transition(**{name: buffer.arrays[name][rows] for name in names})


def points_of(buffer, values):
    """Values (n, d) as float64; InputError where one is not finite."""
    if not np.isfinite(values).all():
        raise InputError(
            f"{buffer.path}: observations: what distances are measured on is not finite. Remedy: record it again, or "
            "--w1-points 0"
        )
    return np.asarray(values, np.float64)


def gear(buffer):
    """{"gear": 30.0} as recorded, or {}: the options of a task that change its world: motors, or the time limit."""
    return {k: v for k, v in buffer.metadata["task_options"].items() if k in ("gear", "episode_length")}
