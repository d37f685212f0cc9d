"""The last step of an import: labels of the task, actions, the check against the physics, the file."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from envs.buffers.convert import physics
from envs.buffers.convert.common import CLIPPED_SHARE, Imported
from envs.buffers.fields import ACTION_LIMIT, fail
from envs.buffers.reading import load
from envs.buffers.writing import save
from envs.task import Task
from envs.worlds import task as find_task
from envs.worlds import task_of_file


def write(found: Imported, out=None, *, task: str | None = None, force: bool = False, replay: bool = True, env=None):
    """Label, check and save what a dialect has read.

    Args:
        out: file to write, by default data/<dataset name>.npz.
        task: name of the task the rewards belong to, where the file does not say it.
        force: overwrite an existing file.
        replay: replay rows through the physics of the task, where there is one.
        env: the environment to replay in, instead of the task's own.

    Returns: the path. Raises: InputError.
    """
    metadata = dict(found.metadata)
    if out is None:
        out = Path("data", re.sub(r"[^A-Za-z0-9._-]+", "-", metadata["dataset_name"]) + ".npz")
    out = Path(out)
    if out.exists() and not force:
        raise fail(out, "file", "exists already", "name another file with --out, or allow it with --force")
    known = _label(found, metadata, task)
    notes = list(found.notes)
    arrays = {**found.arrays, "actions": _clip_actions(found, notes)}
    if notes:
        metadata["notes"] = [*metadata.get("notes", []), *notes]
    if replay and env is None and known is not None:
        env = physics.find_env(known)
    if replay and env is not None:
        metadata["replay_agreement"] = physics.measure(arrays, found.state, env, metadata["layout"], found.source)
    save(out, arrays, metadata)
    for line in [*(f"note: {note}" for note in notes), *physics.describe_checks(metadata)]:
        print(line)
    load(out)
    return out


def _label(found: Imported, metadata: dict[str, Any], task: str | None) -> Task | None:
    """Write the task's labels into the metadata; -> the task, None where the project has none."""
    name = task or metadata["task"]
    if name is None:
        return None
    try:
        known = (find_task if task else task_of_file)(name, **({} if task else metadata.get("task_options", {})))
    except (TypeError, ValueError):  # the metadata may be a stranger's
        if task is not None:
            raise
        return None  # a set of D4RL's, or of another release, that is known by its name alone
    if task is not None:
        metadata.update(task=known.name, layout="task", task_options=known.options, reference=known.reference)
    metadata.setdefault("task_options", known.options)
    metadata["env"] = known.env
    size = known.observation_size if metadata["layout"] == "task" else known.env_observation_size
    have = found.arrays["observations"].shape[1], found.arrays["actions"].shape[1]
    if have != (size, known.action_size):
        problem = f"{have[0]} observed and {have[1]} action numbers, '{known.name}' has {size} and {known.action_size}"
        raise fail(found.source, "observations", problem, "name another task with --task")
    return known


def _clip_actions(found: Imported, notes: list[str]) -> np.ndarray:
    """Actions within [-1, 1]: an environment clips, so a stray value beyond is what it received."""
    actions = found.arrays["actions"]
    beyond = (np.abs(actions) > ACTION_LIMIT).any(axis=1)
    if beyond.mean() > CLIPPED_SHARE:
        problem = f"reach {np.abs(actions).max():.3g}, {100 * beyond.mean():.0f} % of the rows are outside [-1, 1]"
        raise fail(found.source, "actions", problem, "divide them by the environment's action limit first")
    if beyond.any():
        notes.append(f"actions of {int(beyond.sum())} rows were outside [-1, 1] and are clipped")
    return np.clip(actions, -1.0, 1.0)
