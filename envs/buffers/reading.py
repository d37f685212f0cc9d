"""Reading buffers: one file, a glob of shards as one, some episodes of a large one; their metadata alone."""

import dataclasses
import os
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from envs.buffers.checks import check_columns, check_metadata, check_schema, check_shapes, check_structure
from envs.buffers.fields import EPISODE_KEYS, IMPORTS, MERGE_KEYS, METADATA, STRUCTURE, Buffer, fail, missing_column
from envs.buffers.files import (
    Member,
    available_memory,
    check_dialect,
    check_fits,
    check_is_file,
    find,
    map_member,
    parse_metadata,
    read_members,
    readable,
    sha256,
    unpack_member,
)  # fmt: skip
from envs.imports import module_of
from envs.robots import shown_numbers
from envs.task import Task
from envs.tasks import never, task_names
from envs.unknown import unknown_task
from envs.worlds import task as find_task
from envs.worlds import task_of_file


def _load_file(path: Path, keys: Iterable[str] | None, unchecked: tuple[str, ...]) -> Buffer:
    check_is_file(path)
    with readable(path), zipfile.ZipFile(path) as archive:
        members = read_members(path, archive)
        check_dialect(path, members)
        text = str(unpack_member(archive, members.pop(METADATA)))
        metadata = parse_metadata(path, text)
        check_schema(metadata, path)
        check_shapes({k: (m.shape, m.dtype) for k, m in members.items()}, path)
        wanted = _choose_keys(path, members, keys, metadata)
        packed = [members[key] for key in wanted if members[key].info.compress_type]
        size = sum(member.info.file_size for member in packed)
        check_fits(path, size, "write the file uncompressed, then it is memory-mapped")
        arrays = {}
        for key in wanted:
            with readable(path, key):
                packed = members[key].info.compress_type
                arrays[key] = unpack_member(archive, members[key]) if packed else map_member(path, members[key])
    check_metadata(metadata, path)
    check_columns(arrays, path, unchecked)
    check_structure(arrays, metadata, path, unchecked)
    return Buffer(arrays, metadata, str(path))


def _choose_keys(
    path: Path, members: Mapping[str, Member], keys: Iterable[str] | None, metadata: Mapping[str, Any]
) -> list[str]:
    if keys is None:
        return list(members)
    keys = list(keys)
    for key in keys:
        if key not in members:
            problem = f"is not in the file, which holds {', '.join(members)}"
            raise fail(path, key, problem, missing_column(key, metadata))
    return [key for key in members if key in keys or key in STRUCTURE]


def load(
    path: str | os.PathLike,
    keys: Iterable[str] | None = None,
    require_rewards: bool = False,
    task: str | None = None,
    quiet: bool = False,
    verify: bool = False,
    unchecked: tuple[str, ...] = (),
    max_rows: int = 0,
) -> Buffer:
    """Read and check a buffer file, or a glob of shards as one buffer.

    Args:
        path: a file, or a glob whose sorted files are joined row-wise (in memory).
        keys: read only these columns (and the flags and episode arrays); None reads all.
        require_rewards: refuse reward-free data, as learners must.
        task: refuse data that was not labelled for this task.
        quiet: do not print the summary line.
        verify: compare every array that is read with its sha256 in the metadata.
        unchecked: columns whose values are not looked at (finiteness, range), only their shapes;
            for readers that touch a small part of a large column.
        max_rows: of more rows take whole episodes at random, the same ones always, up to so many (of one that is
            longer by itself its beginning); 0: all.

    Returns: a `Buffer`; arrays of an uncompressed file are read-only memory maps.
    Raises: InputError naming file, key and remedy.
    """
    if require_rewards and keys is not None:
        keys = {*keys, "rewards"}
    parts = [_load_file(file, keys, unchecked) for file in find(path)]
    for part in parts:
        if verify:
            check_sha256(part)
        if task is not None:
            check_task(part, task)
        if require_rewards:
            check_rewards(part)
    total = sum(map(len, parts))
    if 0 < max_rows < total:
        parts = [_draw_episodes(part, max_rows * len(part) // total) for part in parts]
    buffer = parts[0] if len(parts) == 1 else _merge(parts, os.fspath(path))
    if not quiet:
        print(buffer.summary(), flush=True)
    return buffer


def load_task(
    path: str | os.PathLike, keys: Iterable[str] | None, task: str = "", max_rows: int = 0
) -> tuple[Buffer, Any]:
    """What an offline learner opens: a buffer with task rewards, and its task -> Buffer, Task.

    keys: the arrays to read; task: a name that the file's must equal, empty for the file's own; max_rows: as in
    `load`. Data that name no task, of a world that is not known here, get one that cannot be evaluated. Raises
    InputError as `load` does, where the file's observations are not those of its task, and where two copies of the
    rows, which every learner holds, do not fit into memory.
    """
    buffer = load(path, keys, require_rewards=True, task=task or None, max_rows=max_rows)
    size, free = 2 * sum(array.nbytes for array in buffer.arrays.values()), available_memory()
    most = int(0.8 * min(free / size, 1.0) * len(buffer))
    check_fits(path, size, f"train on episodes drawn from it, for example --max-rows {most}")
    about = buffer.metadata
    if about["task"] is None and about["env"] not in task_names():
        command = import_command(buffer)
        told = f" (to evaluate, {command})" if command else ""
        print(f"{path}: names no task: the policy is trained and written, but cannot be evaluated{told}", flush=True)
        sizes = buffer["observations"].shape[1], buffer["actions"].shape[1]
        return buffer, _endless(unknown_task(about, *sizes), buffer)
    if about["task"] is None:
        remedy = import_command(buffer) or "write its name there as `task`, or relabel by udg_select.py"
        raise fail(path, "metadata_json", "names no task", remedy)
    try:
        found = (find_task if task else task_of_file)(about["task"], **about["task_options"])
    except (TypeError, ValueError, ArithmeticError) as error:  # the metadata may be a stranger's
        remedy = import_command(buffer) or "name a task that is known here, and the options it has"
        if module_of(about["task"]) and not task:
            remedy = f"add --task {about['task']} (in a program: import {module_of(about['task'])} before)"
        raise fail(path, f"{METADATA}['task']", str(error), remedy) from None
    if found.reference is None and about.get("reference"):
        found = dataclasses.replace(found, reference=tuple(about["reference"]))
    sizes = buffer["observations"].shape[1], buffer["actions"].shape[1]
    if about["layout"] != "task" or sizes != (found.observation_size, found.action_size):
        remedy = "write the task there that these numbers belong to, or make the file again"
        if about["layout"] == "env":
            remedy = select_command(buffer, found.name)
        problem = f"{sizes[0]} numbers in layout '{about['layout']}', {found.name} observes {found.observation_size}"
        raise fail(path, "observations", problem, remedy)
    return buffer, _endless(found, buffer)


def _endless(task: Task, buffer: Buffer) -> Task:
    """The task, whose model never ends an episode where no function tells it and the data have no end."""
    if task.knows_end or buffer["terminals"].any():
        return task
    return dataclasses.replace(task, model_terminal=never)


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The metadata of a file, or of the first one of a glob; no array is read."""
    path = find(path)[0]
    check_is_file(path)
    with readable(path), zipfile.ZipFile(path) as archive:
        members = read_members(path, archive)
        check_dialect(path, members)
        metadata = parse_metadata(path, str(unpack_member(archive, members.pop(METADATA))))
        check_schema(metadata, path)
        check_shapes({k: (m.shape, m.dtype) for k, m in members.items()}, path)
    check_metadata(metadata, path)
    return metadata


def _draw_episodes(buffer: Buffer, rows: int) -> Buffer:
    """Whole episodes, drawn without replacement, of at most `rows` rows together, in memory.

    Where the first one is longer by itself, it is cut by a timeout.
    """
    lengths, rows = buffer["episode_lengths"], max(rows, 1)
    starts, order = buffer["episode_ends"] - lengths, np.random.default_rng(0).permutation(len(lengths))
    count = max(1, int(np.searchsorted(np.cumsum(lengths[order], dtype=np.int64), rows, side="right")))
    chosen = np.sort(order[:count])
    taken = np.minimum(lengths[chosen], rows)
    spans = [slice(start, start + steps) for start, steps in zip(starts[chosen].tolist(), taken.tolist(), strict=True)]
    take = lambda key, x: x[chosen] if key in EPISODE_KEYS else np.concatenate([x[span] for span in spans])
    arrays = {key: take(key, x) for key, x in buffer.arrays.items()}
    why = "max_rows"
    if taken[0] < lengths[chosen[0]]:
        why = "max_rows, which cuts an episode"
        arrays["terminals"][-1], arrays["timeouts"][-1], arrays["episode_lengths"] = False, True, taken
        if "rewards" in arrays:
            arrays["episode_returns"] = arrays["rewards"].sum(dtype=np.float64, keepdims=True).astype(np.float32)
    arrays["episode_ends"] = np.cumsum(arrays["episode_lengths"], dtype=np.int64)
    returns, kept = arrays["episode_returns"].astype(np.float64), len(arrays["terminals"])
    metadata = {
        **buffer.metadata, "num_transitions": kept, "num_episodes": count, "mean_return": float(returns.mean()),
        "std_return": float(returns.std()), "sha256": {}, "warmup_transitions": None,
        "rows_dropped": {**buffer.metadata.get("rows_dropped", {}), why: len(buffer) - kept},
    }  # fmt: skip
    return Buffer(arrays, metadata, buffer.path)


def _merge(parts: list[Buffer], path: str) -> Buffer:
    first = parts[0]
    for part in parts[1:]:
        for key in MERGE_KEYS:
            here, there = part.metadata.get(key), first.metadata.get(key)
            if here != there:
                problem = f"{here!r}, but {first.path} has {there!r}"
                raise fail(part.path, key, problem, "name only files of one kind in the glob")
        for key in ("observations", "actions"):
            if key in part.arrays and part[key].shape[1:] != first[key].shape[1:]:
                problem = f"rows have the shape {part[key].shape[1:]}, not {first[key].shape[1:]}"
                raise fail(part.path, key, problem, "name only files of one kind in the glob")
    shared = [key for key in first.arrays if all(key in part.arrays for part in parts)]
    size = sum(part.arrays[key].nbytes for part in parts for key in shared)
    check_fits(path, size, "join the shards into one uncompressed file, which is memory-mapped")
    arrays = {key: np.concatenate([part.arrays[key] for part in parts]) for key in shared}
    arrays["episode_ends"] = np.cumsum(arrays["episode_lengths"], dtype=np.int64)
    returns = arrays["episode_returns"].astype(np.float64)
    later_warmup = any(part.metadata["warmup_transitions"] != 0 for part in parts[1:])
    metadata = {
        **first.metadata,
        "num_transitions": len(arrays["terminals"]),
        "num_episodes": len(returns),
        "mean_return": float(returns.mean()),
        "std_return": float(returns.std()),
        "episode_length": max(part.metadata["episode_length"] for part in parts),
        "warmup_transitions": None if later_warmup else first.metadata["warmup_transitions"],
        "sha256": {},
        "parents": [{"path": Path(part.path).name} for part in parts],
    }
    return Buffer(arrays, metadata, path)


def digests(buffer: Buffer, keys: Iterable[str]) -> list[str]:
    """sha256 of these columns, from the metadata where it is known: not where rows were drawn or shards joined."""
    return [buffer.metadata["sha256"].get(key) or sha256(buffer[key]) for key in keys]


def check_sha256(buffer: Buffer) -> None:
    for key, array in buffer.arrays.items():
        known = buffer.metadata["sha256"].get(key)
        if known != sha256(array):
            problem = "does not match its sha256" if known else "has no sha256 in the metadata"
            raise fail(buffer.path, key, problem, "copy or make the file again")


def _fitting_tasks(buffer: Buffer) -> list[str]:
    """Names of the tasks with a reward that have as many numbers as an import; NAME where its numbers were not read."""
    if not {"observations", "actions"} <= buffer.arrays.keys():
        return ["NAME"]
    size, actions = buffer["observations"].shape[1], buffer["actions"].shape[1]
    known = [find_task(name) for name in task_names()]
    shown = lambda t: shown_numbers(t.env, size, t.observation_size)
    return [t.name for t in known if t.has_reward and (t.observation_size, t.action_size) == (shown(t), actions)]


def no_task(buffer: Buffer) -> str:
    """The remedy where no task has the numbers of an import, else empty."""
    if buffer.metadata["generator"].get("script") not in IMPORTS or _fitting_tasks(buffer):
        return ""
    sizes = buffer["observations"].shape[1], buffer["actions"].shape[1]
    return f"use other data: no task here has {sizes[0]} observed and {sizes[1]} action numbers"


def import_command(buffer: Buffer, task: str = "") -> str:
    """How to import data of another project once more, for a task; empty where no task fits, and for no import.

    task: by default what the sizes of observations and actions allow.
    """
    about = buffer.metadata
    kind = about["generator"].get("script")
    if kind not in IMPORTS or not (fit := _fitting_tasks(buffer)):
        return ""
    parent = about["parents"][0] if about["parents"] else {}  # it may be a stranger's
    source = str(parent.get("path", ""))
    source = source if source and source.isprintable() else "FILE"
    command = f"import it again: python -m envs.buffers from-{kind} {source} --force --task {task or fit[0]}"
    if kind == "arrays" and not parent.get("sha256"):  # a dict, in no file
        command = f"import it again: envs.buffers.from_arrays(arrays, force=True, task={task or fit[0]!r})"
    return command if task or not fit[1:] else f"{command} (or {', '.join(fit[1:6])})"


def select_command(buffer: Buffer, task: str) -> str:
    """The remedy for a file without a task's rewards: relabel the buffer, or what it was made from."""
    about = buffer.metadata
    if none := no_task(buffer):
        return none
    imported = import_command(buffer, "" if task == "TASK" else task)
    if imported and about["task"] is None:
        return imported
    names = [str(parent.get("path")) for parent in about["parents"]]
    names = [name for name in names if name.isprintable()]  # they may be a stranger's
    made = about["layout"] == "task" and names and not imported
    source = f"<folder of {', '.join(names[:3])}>" if made else buffer.path
    return f"relabel: python udg_select.py --buffers {source} --task {task}"


def check_task(buffer: Buffer, task: str) -> None:
    have = buffer.metadata["task"]
    if have == task and buffer.metadata["layout"] == "task":
        return
    raise fail(buffer.path, "task", f"is {have!r}, not {task!r}", select_command(buffer, task))


def check_rewards(buffer: Buffer) -> None:
    if buffer.metadata["reward_kind"] == "none":
        raise fail(buffer.path, "rewards", "the data is reward-free", select_command(buffer, "TASK"))
    rewards = buffer["rewards"]
    if rewards.min() != rewards.max():
        return
    if not rewards[0]:
        remedy = no_task(buffer) or f"use data that earned some, or {select_command(buffer, 'TASK')}"
        raise fail(buffer.path, "rewards", "are zero in every row", remedy)
    print(f"warning: {buffer.path}: rewards are {rewards[0]} in every row", file=sys.stderr)
