"""OGBench's npz files: T + 1 rows per episode of T steps.

The row that closes an episode holds its last observation and an action that was never taken, and
`terminals` marks that row: the end of a trajectory, not a termination. Rewards belong to a task
that is chosen later, so files have none. What `write` adds under further keys (rewards, masks =
1 - termination, root columns, metadata) OGBench's own loader passes over.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from envs.buffers.convert import common
from envs.buffers.convert.cut import LOST
from envs.buffers.fields import METADATA, Buffer
from envs.buffers.files import write_npz

# First word of a set's name -> seconds per step, and whether qpos begins with x, y of a root.
WORLDS = {
    "pointmaze": (0.1, True), "antmaze": (0.1, True), "antsoccer": (0.1, True), "humanoidmaze": (0.025, True),
    "cube": (0.05, False), "scene": (0.05, False), "puzzle": (0.05, False),
}  # fmt: skip
ROUND = 50  # OGBench's episodes have 200, 400, 500, 1000 or 2000 steps


def _check(path: Path, arrays: dict[str, np.ndarray]) -> None:
    if METADATA in arrays:
        remedy = "use the file as it is: a buffer needs no conversion"
        raise common.fail(path, METADATA, "is in the file, so it is no OGBench file", remedy)
    flat = [key for key in ("timeouts", "rewards") if key in arrays]
    if flat and common.EXTRA not in arrays and ("timeouts" in flat or "masks" not in arrays):
        problem = "is in the file, so it is no OGBench file: those mark no timeouts, and have masks beside rewards"
        raise common.fail(path, flat[0], problem, f"python -m envs.buffers from-arrays {path}")
    for key, rank in {"observations": 2, "actions": 2, "terminals": 1}.items():
        if key not in arrays:
            problem = f"is missing; the file holds {', '.join(list(arrays)[:20]) or 'nothing'}"
            raise common.fail(path, key, problem, "check that this is an OGBench file: docs/data.md lists its keys")
        shape = arrays[key].shape
        if len(shape) != rank or 0 in shape:
            problem = f"has the shape {shape}, expected {rank} axes"
            raise common.fail(path, key, problem, "only states and continuous actions can be converted, no images")
    rows = len(arrays["terminals"])
    for key, array in arrays.items():
        if key != common.EXTRA and (not array.ndim or len(array) != rows):
            problem = f"has the shape {array.shape}, terminals has {rows} rows"
            raise common.fail(path, key, problem, "the file was cut short or put together from two: get it again")


def _read_own(path: Path, arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], list[str]]:
    """Metadata and names of the further columns that `write` put into a file, none in OGBench's own."""
    text = arrays.pop(common.EXTRA, None)
    if text is None:
        return {}, []
    if text.dtype.kind != "U" or text.shape:
        problem = f"is {text.dtype} of shape {text.shape}, expected one string"
        raise common.fail(path, common.EXTRA, problem, "get the file again")
    return common.own_metadata(path, str(text))


class Steps(NamedTuple):
    """Rows that are steps: kept (N,) indices, ends (N,) of their episodes, their successors where they are given."""

    kept: np.ndarray
    ends: np.ndarray
    following: np.ndarray | None
    dropped: dict[str, int]


def _steps(path: Path, arrays: dict[str, np.ndarray], notes: list[str]) -> Steps:
    """The steps of a file in any of OGBench's three layouts.

    As downloaded: T + 1 rows an episode, `terminals` on the last. Compact, as OGBench's loader makes it on request:
    the same rows, `valids` 0 on the last, `terminals` on the last two. Regular, as the loader makes it else: T rows
    with `next_observations`; without them the last step of each episode has no successor.
    """
    marked = common.to_flags(path, "terminals", arrays["terminals"])
    last = np.arange(len(marked)) == len(marked) - 1
    if "next_observations" in arrays:
        following = common.to_float32(path, "next_observations", arrays["next_observations"])
        if following.shape != arrays["observations"].shape:
            problem = f"has the shape {following.shape}, observations {arrays['observations'].shape}"
            raise common.fail(path, "next_observations", problem, "get the file again")
        known = common.to_float32(path, "observations", arrays["observations"])
        apart = ~common.same_rows(following[:-1], known[1:]) & ~marked[:-1]
        if apart.any():
            problem = f"row {np.argmax(apart)} is not the observation of the next row, and no end is marked there"
            remedy = f"python -m envs.buffers from-arrays {path}, if this is no file of OGBench's"
            raise common.fail(path, "next_observations", problem, remedy)
        return Steps(np.arange(len(marked)), marked | last, following, {})
    closing = marked | last
    if "valids" in arrays:
        closing = ~common.to_flags(path, "valids", arrays["valids"]) | last
    kept = np.flatnonzero(~closing)
    steps, dropped = Steps(kept, closing[np.minimum(kept + 1, len(marked) - 1)], None, {}), {}
    if "valids" in arrays or common.EXTRA in arrays:
        return steps
    rows, episodes = np.diff(np.flatnonzero(closing), prepend=-1), int(closing.sum())
    if not marked[-1]:
        notes.append("the last episode is open in the file: its last row is taken as the last observation")
        rows = rows[:-1]
    if len(rows) and (rows % ROUND == 0).all():
        dropped = {f"last row of an episode, {LOST}": episodes}
        notes.append(
            f"episodes of {rows[0]} rows, where OGBench's files have one more: next_observations were left out, so the "
            "last step of each episode is lost; save them, too"
        )
    elif not (rows % ROUND == 1).all():
        notes.append(
            f"the last row of each of {episodes} episodes is taken for the observation after its last step, as in "
            "OGBench's files; if every row is a step in this one, save next_observations, too"
        )
    return steps._replace(dropped=dropped)


def read(path: Any, dt: float | None = None, episode_length: int | None = None) -> common.Imported:
    """Read an OGBench file as `envs.buffers.convert.from_ogbench` says -> Imported. Raises InputError."""
    path = Path(path)
    arrays = common.read_npz(path)
    _check(path, arrays)
    own, carried = _read_own(path, arrays)
    notes: list[str] = []
    rows = _steps(path, arrays, notes)
    kept = rows.kept
    if not len(kept):
        raise common.fail(path, "terminals", "is true in every row, so no row has a successor", "get the file again")
    observations = common.to_float32(path, "observations", arrays["observations"])
    columns = {
        "observations": observations[kept],
        "next_observations": observations[kept + 1] if rows.following is None else rows.following,
        "actions": common.to_float32(path, "actions", arrays["actions"][kept]),
        "rewards": np.zeros(len(kept), np.float32),
        "terminals": np.zeros(len(kept), bool),
    }
    if "rewards" in arrays:
        columns["rewards"] = common.to_float32(path, "rewards", arrays["rewards"][kept])
    if "masks" in arrays:
        columns["terminals"] = ~common.to_flags(path, "masks", arrays["masks"][kept])
    columns["timeouts"] = rows.ends & ~columns["terminals"]
    lengths = np.diff(np.flatnonzero(rows.ends), prepend=-1)
    name = path.stem.removesuffix("-val")
    known_dt, rooted = WORLDS.get(name.split("-")[0], (None, False))
    dt = dt or own.get("dt") or known_dt
    if own:
        columns |= {key: arrays[key][kept] for key in carried if key in arrays}
    elif (
        rooted
        and rows.following is None
        and "qpos" in arrays
        and arrays["qpos"].ndim == 2
        and arrays["qpos"].shape[1] >= 2
    ):
        root = common.to_float32(path, "qpos", arrays["qpos"])[:, :2]
        columns |= common.root_columns(root[kept], root[kept + 1], dt)
    metadata = {
        "dataset_name": f"ogbench/{path.stem}", "env": f"ogbench/{name}", "task": None, "layout": "env",
        "reward_kind": "task" if "rewards" in arrays else "none", "reference": None,
        "generator": {"script": "ogbench", "flags": {}}, "rows_dropped": rows.dropped, **own, "dt": dt,
        "parents": [{"path": path.name, "sha256": common.file_sha256(path), "taken": f"{len(kept)} rows"}],
    }  # fmt: skip
    metadata["episode_length"] = episode_length or own.get("episode_length") or int(lengths.max())
    notes += common.step_notes(name, dt, None if own else known_dt)
    return common.Imported(columns, metadata, None, notes, str(path))


def write(buffer: Buffer, out: Path) -> None:
    """Write a buffer in OGBench's layout, compressed as OGBench's files are. Raises InputError."""
    rows, ends = len(buffer), common.runs(buffer.arrays)
    # Row i of the buffer becomes row place[i]; behind each stretch comes its last observation.
    place = np.arange(rows) + np.searchsorted(ends, np.arange(rows), side="right")
    closing = ends + np.arange(len(ends))

    def spread(column: np.ndarray, last: np.ndarray | float = 0) -> np.ndarray:
        whole = np.zeros((rows + len(ends), *column.shape[1:]), column.dtype)
        whole[place], whole[closing] = column, last
        return whole

    flags = np.zeros(rows, bool)
    arrays = {
        "observations": spread(buffer["observations"], buffer["next_observations"][ends - 1]),
        "actions": spread(buffer["actions"]),
        "terminals": spread(flags, True),
        "rewards": spread(buffer["rewards"]),
        "masks": spread(~buffer["terminals"], True),
        **{key: spread(value) for key, value in common.extra_columns(buffer).items()},
    }
    arrays[common.EXTRA] = np.array(json.dumps(common.portable_metadata(buffer)))
    write_npz(out, arrays, compressed=True)
