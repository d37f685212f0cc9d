"""The buffers that a selection is made of: opened together, with the task that is to pay them, or refused."""

import math
import shutil
from pathlib import Path
from typing import NamedTuple

from envs.buffers.convert.common import file_sha256
from envs.buffers.fields import Buffer
from envs.buffers.files import available_memory
from envs.buffers.raw import buffer_paths, gear, map_buffer, short_names, with_goals
from envs.buffers.reading import import_command
from envs.errors import InputError
from envs.rewards import paid_by
from envs.tasks import task_names
from envs.worlds import task as find_task
from envs.worlds import task_options


class Source(NamedTuple):
    """One of the K buffers."""

    name: str  # shortest part of the path that tells it from the others
    buffer: Buffer  # memory-mapped: a column is read where it is used
    policy_id: int


def open_sources(words, seed=0):
    """Open K buffers of one world -> list of Source. seed: of goals that are drawn."""
    paths = buffer_paths(words)
    opened = [map_buffer(path) for path in paths]
    worlds = [(b.metadata["env"], b.metadata["dt"], b.metadata["episode_length"], gear(b)) for b in opened]
    for path, world in zip(paths, worlds, strict=True):
        if world != worlds[0]:
            raise InputError(
                f"{path}: env, dt, episode_length and gear are {world}, but {paths[0]} has {worlds[0]}. "
                "Remedy: select among buffers of one world and length, whose returns compare"
            )
    ids = [buffer.metadata.get("policy_id") for buffer in opened]
    if len(set(ids)) < len(ids) or not all(type(i) is int and i >= 0 for i in ids):
        ids = range(len(opened))  # buffers of several runs: number them as they come
    opened = [with_goals(buffer, seed + k) for k, buffer in enumerate(opened)]
    return [Source(*item) for item in zip(short_names(paths), opened, ids, strict=True)]


def open_reference(word, sources):
    """Open the one buffer of an expert, of the world of the sources."""
    found = open_sources([word])
    if len(found) > 1:
        raise InputError(f"--reference {word}: {len(found)} buffers. Remedy: name one file")
    buffer, first = found[0].buffer, sources[0].buffer
    sizes = [[b["observations"].shape[1], b["actions"].shape[1]] for b in (buffer, first)]
    if buffer.metadata["env"] != first.metadata["env"] or sizes[0] != sizes[1]:
        raise InputError(
            f"--reference {word}: is of world '{buffer.metadata['env']}' with {sizes[0]} numbers, the buffers are of "
            f"'{first.metadata['env']}' with {sizes[1]}"
        )
    return buffer


def open_task(name, options, sources, task_reward=""):
    """Return the task, with the physical options (gear) that the buffers were recorded with, paid by --task-reward."""
    metadata = sources[0].buffer.metadata
    known = task_options(name)
    recorded = {k: v for k, v in gear(sources[0].buffer).items() if k in known}
    for key, value in recorded.items():
        if options.get(key, value) != value:
            raise InputError(
                f"--task-options {key}={options[key]:g}: the buffers were recorded with {key} {value:g}, and a learner "
                f"would be judged in another world. Remedy: leave {key} out"
            )
    task = paid_by(find_task(name, **{**recorded, **options}), task_reward)
    ended = any(source.buffer.metadata["task_options"].get("terminate") for source in sources)
    if ended and task.options.get("terminate") is False:
        problem = "episodes of the buffers end where the task would go on"
        raise InputError(f"--task {name}: {problem}. Remedy: --task-options terminate=true")
    if task.env != metadata["env"]:
        again = metadata["task"] is None and import_command(sources[0].buffer, task.env)
        raise InputError(
            f"--task {name} is a task of '{task.env}', the buffers are of '{metadata['env']}'. "
            f"Remedy: {again or 'name a task of ' + repr(metadata['env'])}"
        )
    if not task.has_reward:
        near = [n for n in task_names() if find_task(n).env == task.env and find_task(n).has_reward]
        raise InputError(f"--task {name} has no reward; tasks here: {', '.join(near) or 'none'}")
    for source in sources:
        sizes = [source.buffer[key].shape[1] for key in ("observations", "actions")]
        if sizes != [task.env_observation_size, task.action_size]:
            raise InputError(
                f"{source.buffer.path}: observations and actions have {sizes} numbers, '{name}' "
                f"needs {[task.env_observation_size, task.action_size]}. Remedy: record it again"
            )
    return task


def warmup_episodes(buffer):
    """(E,) bool: episodes that begin among the random warm-up rows."""
    starts = buffer["episode_ends"] - buffer["episode_lengths"]
    return starts < (buffer.metadata["warmup_transitions"] or 0)


def warmup_rows(buffer, keep):
    """Number of warm-up rows among the episodes `keep`."""
    return int(buffer["episode_lengths"][keep][warmup_episodes(buffer)[keep]].sum())


def provenance(source, keep, score):
    """Where rows of a written file come from: file name, digest, what was taken, its score."""
    return {
        "path": Path(source.buffer.path).name,
        "name": source.name,
        "sha256": file_sha256(source.buffer.path),
        "policy_id": source.policy_id,
        "score": score["score"],
        "num_transitions": int(source.buffer["episode_lengths"][keep].sum()),
        "num_episodes": len(keep),
        "warmup_transitions": warmup_rows(source.buffer, keep),
    }


def check_room(folder, rows, copies, columns):
    """Refuse, before any work, files that neither memory nor disk can hold; print what is needed.

    rows: of each file, of which there are `copies`; columns: arrays of what a file holds beside rewards and policy_ids.
    """
    bytes_per_row = 8 + sum(x.dtype.itemsize * math.prod(x.shape[1:]) for x in columns)
    memory, disk = max(rows) * bytes_per_row, copies * sum(rows) * bytes_per_row
    free = shutil.disk_usage(folder).free
    print(f"{folder}: up to {disk / 1e6:,.1f} MB on disk ({free / 1e9:.1f} GB free), {memory / 1e6:,.1f} MB of memory")
    if disk > free:
        raise InputError(f"{folder}: needs {disk / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free. "
                         "Remedy: --size, fewer --top, or another --out")  # fmt: skip
    if memory > available_memory():
        raise InputError(f"--top: {max(rows):,} rows in one file need {memory / 1e9:.1f} GB of memory. "
                         "Remedy: --size, or a smaller --top")  # fmt: skip
