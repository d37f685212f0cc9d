"""The last step of an import: labels of the task, actions, the check against the physics, the file."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from envs.buffers.convert import physics
from envs.buffers.convert.actions import OWN_SCALE, fit_scale, settle_actions
from envs.buffers.convert.common import Imported
from envs.buffers.fields import Buffer, fail
from envs.buffers.files import check_suffix
from envs.buffers.reading import load
from envs.buffers.writing import save
from envs.robots import shown_numbers
from envs.task import Task
from envs.worlds import task as find_task
from envs.worlds import task_of_file


def write(
    found: Imported,
    out=None,
    *,
    task: str | None = None,
    force: bool = False,
    replay: bool = True,
    clip: bool = False,
    action_limit: float | None = None,
    env=None,
):
    """Label, check and save what a dialect has read.

    Args:
        out: file to write, by default data/<dataset name>.npz.
        task: name of the task the rewards belong to, where the file does not say it.
        force: overwrite an existing file.
        replay: replay rows through the physics of the task, where there is one.
        clip, action_limit: of `settle_actions`.
        env: the environment to replay in, instead of the task's own.

    Returns: the path. Raises: InputError.
    """
    metadata = dict(found.metadata)
    out = check_out(out, metadata["dataset_name"], force)
    known, notes = _label(metadata, task), list(found.notes)
    if known is not None:
        found = found._replace(
            arrays=leave_out_forces(found.arrays, known, notes), exact=leave_out_forces(found.exact, known, [])
        )
        check_sizes(found.arrays, known, metadata["layout"], found.source)
    if env is None and known is not None:
        env = physics.find_env(known) if replay or known.env in OWN_SCALE else None
    actions = settle_actions(found.arrays["actions"], found.source, notes, clip, action_limit)
    columns = {**found.arrays, **found.exact, "actions": actions}
    actions = fit_scale(columns, found.state, env, metadata["layout"], found.source, notes)
    arrays = {**found.arrays, "actions": actions.astype(np.float32)}
    if notes:
        metadata["notes"] = [*metadata.get("notes", []), *notes]
    if replay and env is not None:
        columns["actions"] = actions
        if clip:
            columns["unclipped"] = found.arrays["actions"].astype(np.float64) / (action_limit or 1.0)
        if metadata["reward_kind"] == "none":
            del columns["rewards"]
        metadata["replay_agreement"] = physics.measure(columns, found.state, env, metadata["layout"], found.source)
    save(out, arrays, metadata)
    buffer = Buffer(arrays, metadata, str(out))
    for line in [*(f"note: {note}" for note in notes), *physics.describe_checks(metadata, buffer, replay=False)]:
        print(line)
    load(out)
    return out


def check_out(out, name: str, force: bool) -> Path:
    """The file to write, by default data/<name>.npz. InputError where it exists, or is none."""
    if out is None:
        out = Path("data", re.sub(r"[^A-Za-z0-9._-]+", "-", name) + ".npz")
    out = Path(out)
    check_suffix(out)
    if out.exists() and not force:
        raise fail(out, "file", "exists already", "name another file with --out, or allow it with --force")
    return out


def _label(metadata: dict[str, Any], task: str | None) -> Task | None:
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
        metadata.update(task=known.name, layout="task", task_options=known.options)
        metadata["reference"] = known.reference or metadata["reference"]
    metadata.setdefault("task_options", known.options)
    metadata["env"] = known.env
    return known


def leave_out_forces(arrays: dict[str, Any], known: Task, notes: list[str]) -> dict[str, Any]:
    """The columns without the contact forces that Gymnasium observes behind pose and speeds, and the task does not."""
    kept = dict(arrays)
    for key in ("observations", "next_observations"):
        size = arrays[key].shape[1] if key in arrays else 0
        shown = shown_numbers(known.env, size, known.observation_size)
        if shown < size:
            kept[key] = arrays[key][:, :shown]
            notes += [
                f"of {size} observed numbers the first {shown}, pose and speeds, are kept: '{known.name}' observes no "
                "contact forces, and its reward does not charge them"
            ] * (key == "observations")
    return kept


def check_sizes(arrays, known: Task, layout: str, source: str) -> None:
    """InputError where observations and actions are not as many numbers as the task has."""
    size = known.observation_size if layout == "task" else known.env_observation_size
    have = arrays["observations"].shape[1], arrays["actions"].shape[1]
    if have != (size, known.action_size):
        problem = f"{have[0]} observed and {have[1]} action numbers, '{known.name}' has {size} and {known.action_size}"
        raise fail(source, "observations", problem, "name another task with --task, or none")
