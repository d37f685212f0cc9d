"""Plain arrays: a dict or an npz file of observations, actions, rewards and terminals, as a user collects them.

All that is wrong is said at once. Next observations are the next rows' where the file has none, and the last row of an
episode is then dropped, for what follows it is a reset.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from envs.buffers.convert import common
from envs.buffers.convert.actions import settle_actions
from envs.buffers.convert.cut import cut
from envs.buffers.convert.reach import body_of
from envs.buffers.convert.write import check_sizes, leave_out_forces
from envs.buffers.fields import COLUMNS, EPISODE_KEYS, METADATA
from envs.gymnasium_pool import PREFIX, spaces
from envs.robots import ROBOTS
from envs.task import Task

NAMES = {"terminations": "terminals", "truncations": "timeouts"}  # Gymnasium's words
RANKS = {"observations": 2, "actions": 2, "rewards": 1, "terminals": 1, "next_observations": 2, "timeouts": 1}
NEEDED = ("observations", "actions", "rewards", "terminals")
FLAGS = ("terminals", "timeouts")
CARRIED = {key: (dtype, row) for key, (dtype, row) in COLUMNS.items() if key not in RANKS}
ELSEWHERE = {  # keys of other layouts -> the command that reads them
    "valids": "is OGBench's compact layout: python -m envs.buffers from-ogbench FILE",
    METADATA: "makes this a buffer file already: use it as it is",
    "discount": "is a layout of ExORL: python -m envs.buffers from-exorl FOLDER",
}


def open_source(source: Any) -> tuple[str, dict[str, np.ndarray], str | None]:
    """A dict of arrays or the path of an npz file -> its name in messages, its arrays, sha256 of a file."""
    if isinstance(source, Mapping):
        try:
            return "arrays", {str(key): np.asarray(value) for key, value in source.items()}, None
        except ValueError as error:
            remedy = "join the episodes by np.concatenate, and mark the last row of each in timeouts or terminals"
            raise common.fail("arrays", "dict", f"holds lists that are no arrays ({error})", remedy) from None
    path = os.fspath(source)
    if Path(path).suffix in (".hdf5", ".h5"):
        remedy = f"python -m envs.buffers from-d4rl {path} --name NAME --episode-length STEPS"
        raise common.fail(path, "file", "is an hdf5 file, this reads npz", remedy)
    return path, common.read_npz(path), common.file_sha256(path)


def _columns(found: dict[str, np.ndarray], problems: common.Problems, notes: list[str]) -> dict[str, np.ndarray]:
    """Columns under our names and of equal length, of the right rank; what is wrong is added to the problems."""
    for key, why in ELSEWHERE.items():
        if key in found and (key != "discount" or "observations" not in found):
            problems.add(key, "is in the file, so it holds no plain arrays", why)
    for key, ours in NAMES.items():
        if {key, ours} <= found.keys():
            problems.add(key, f"and {ours} are both in the file and mean the same", f"leave {key} out")
    named = {NAMES.get(key, key): value for key, value in found.items()}
    for key in NEEDED:
        if key not in named:
            remedy = "name it so; docs/buffer.md says what it holds"
            if key == "terminals" and {"dones", "done"} & named.keys():
                remedy = "split dones: terminals where the task ended, timeouts where a time limit cut the episode"
            problems.add(key, f"is missing; there are {', '.join(list(found)[:20]) or 'no arrays'}", remedy)
    rows = len(named["observations"]) if "observations" in named and named["observations"].ndim else 0
    columns, other = {}, []
    for key, value in named.items():
        if key in RANKS:
            plain = value[..., 0] if RANKS[key] == 1 and value.ndim == 2 and value.shape[1] == 1 else value
            want = "(N, size)" if RANKS[key] == 2 else "(N,) or (N, 1)"
            fits = plain.ndim == RANKS[key]
        elif key in CARRIED:
            plain, want = value, str(("N", *CARRIED[key][1])).replace("'", "")
            fits = plain.shape[1:] == CARRIED[key][1] and plain.ndim > 0
        else:
            other += [key] * (key not in EPISODE_KEYS)
            continue
        if not fits or 0 in plain.shape:
            remedy = "there are no images here; of several environments write one after another, not row by row: "
            remedy += "a.swapaxes(0, 1).reshape(-1, size) of (steps, environments, size), each last row a timeout"
            problems.add(key, f"has the shape {value.shape}, expected {want}", remedy)
        elif rows and len(plain) != rows:
            remedy = "give every array the same rows; of T + 1 observations an episode o, o[:-1] are its observations "
            remedy += "and o[1:] its next_observations"
            problems.add(key, f"has {len(plain)} rows, observations has {rows}", remedy)
        else:
            columns[key] = plain
    if other:
        notes.append(f"left out: {', '.join(other[:20])}")
    following = columns.get("next_observations")
    if following is not None and "observations" in columns and following.shape != columns["observations"].shape:
        problem = f"has the shape {following.shape}, observations {columns['observations'].shape}"
        problems.add("next_observations", problem, "give both the same numbers")
    return columns


def _numbers(columns: dict[str, np.ndarray], problems: common.Problems) -> dict[str, np.ndarray]:
    """Columns in the types of a buffer, checked."""
    arrays, path = {}, problems.path
    for key, column in columns.items():
        with problems.gather():
            if key in FLAGS:
                arrays[key] = common.to_flags(path, key, column)
            elif CARRIED.get(key, (np.float32,))[0] is np.float32:
                arrays[key] = common.to_float32(path, key, column)
                common.check_size(path, key, arrays[key])
            else:
                if column.dtype.kind not in "biuf":
                    raise common.fail(path, key, f"holds {column.dtype}", "give numbers, or leave the column out")
                arrays[key] = column.astype(CARRIED[key][0])
    return arrays


def read(
    source: Any,
    problems: common.Problems,
    found: dict[str, np.ndarray],
    digest: str | None,
    name: str,
    task: Task | None,
    dt: float | None = None,
    episode_length: int | None = None,
    clip: bool = False,
    action_limit: float | None = None,
) -> common.Imported | None:
    """Columns as `envs.buffers.from_arrays` says -> Imported, or None where there are problems."""
    notes: list[str] = []
    columns = _columns(found, problems, notes)
    columns = columns if task is None else leave_out_forces(columns, task, notes)
    arrays = _numbers(columns, problems)
    with problems.gather():
        if "actions" in arrays:
            settle_actions(arrays["actions"], problems.path, [], clip, action_limit)
    if task is not None and task.name.startswith(PREFIX) and action_limit is None:
        low, high = spaces(task.name).low, spaces(task.name).high
        if not (np.allclose(low, -1) and np.allclose(high, 1)):
            notes.append(
                f"actions are taken as shares of the range of '{task.name}', {low.min():g} to {high.max():g}, where -1 "
                "and 1 are its ends; actions in its own units need --action-limit (action_limit)"
            )
    with problems.gather():
        if task is not None and {"observations", "actions"} <= arrays.keys():
            check_sizes(arrays, task, "task", problems.path)
    if episode_length is not None and not episode_length > 0:
        problems.add("episode_length", f"is {episode_length}", "give a positive number of steps")
    if dt is not None and not 0 < dt < np.inf:
        problems.add("dt", f"is {dt}", "give the seconds of a step")
    endless = not any(arrays[key].any() for key in FLAGS if key in arrays)
    if not problems and endless and "next_observations" not in arrays and episode_length is None and task is None:
        remedy = "add timeouts or next_observations, or say --episode-length STEPS (episode_length=STEPS)"
        problems.add("terminals", "is False in every row and nothing else says where episodes end", remedy)
    if problems:
        return None
    limit = episode_length
    if limit is None and task is not None:
        limit = task.eval_length  # of whole episodes; those of our own collections may be shorter
    maze = task is not None and task.env.startswith("ant-maze")
    terminal = task.model_terminal if task and task.knows_end and not maze else None
    if limit is None and not {"timeouts", "next_observations"} & arrays.keys():
        notes.append(
            "nothing says where episodes end but terminals: an end without one is taken for a step to the next start. "
            "Add timeouts or next_observations if there are such ends"
        )
    pieces = cut(
        source, arrays, notes, limit=limit,
        body=body_of(task.env, arrays["observations"].shape[1], dt or task.dt) if task else None,
        terminal=terminal, ends_at_terminals=not maze,
    )  # fmt: skip
    kept = np.flatnonzero(pieces.valid)
    if not len(kept):
        problems.add("observations", "no row has a true successor", "add next_observations")
        return None
    ends = pieces.ends | ~np.roll(pieces.valid, -1)
    lengths = np.diff(np.flatnonzero(ends[kept]), prepend=-1)
    alike = len(lengths) > 1 and (lengths == lengths[0]).all() and pieces.terminals[ends].all()
    if alike and terminal is None and lengths[0] != limit:
        notes.append(
            f"every episode ends in a terminal after {lengths[0]} steps: if that is a time limit, import again with "
            f"--episode-length {lengths[0]}, since learners take a terminal for the end of all rewards"
        )
    whole = arrays | {"next_observations": pieces.next_observations, "terminals": pieces.terminals}
    whole["timeouts"] = ends & ~pieces.terminals
    robot = ROBOTS.get(task.env) if task else None
    if robot and not robot.skip_qpos and whole["observations"].shape[1] == robot.observation_size:  # x, y are shown
        places = (whole[key][:, :2] for key in ("observations", "next_observations"))
        whole = common.root_columns(*places, dt or task.dt) | whole
    metadata = {
        "dataset_name": name, "env": task.env if task else f"arrays/{name}", "task": None,
        "layout": "task" if task else "env", "reward_kind": "task", "reference": None,
        "dt": dt or (task.dt if task else None), "rows_dropped": pieces.rows_dropped,
        "episode_length": episode_length or max(task.episode_length if task else 0, int(lengths.max())),
        "generator": {"script": "arrays", "flags": {}},
        "parents": [{"path": Path(source).name, "sha256": digest or "", "taken": f"{len(kept)} rows"}],
    }  # fmt: skip
    exact = {key: columns[key] for key in ("observations", "next_observations", "rewards") if key in columns}
    exact = {key: column for key, column in exact.items() if column.dtype == np.float64}
    if "observations" in exact and "next_observations" not in exact:
        exact["next_observations"] = np.roll(exact["observations"], -1, axis=0)
    kept_rows = lambda columns: {key: np.ascontiguousarray(column[kept]) for key, column in columns.items()}
    return common.Imported(kept_rows(whole), metadata, None, notes, str(source), kept_rows(exact))
