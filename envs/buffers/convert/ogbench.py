"""OGBench's npz files: T + 1 rows per episode of T steps.

The row that closes an episode holds its last observation and an action that was never taken, and
`terminals` marks that row: the end of a trajectory, not a termination. Rewards belong to a task
that is chosen later, so files have none. What `write` adds under further keys (rewards, masks =
1 - termination, root columns, metadata) OGBench's own loader passes over.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from envs.buffers.convert import common
from envs.buffers.fields import METADATA, Buffer
from envs.buffers.files import check_fits, check_is_file, read_members, unpack_member, write_npz

# First word of a set's name -> seconds per step, and whether qpos begins with x, y of a root.
WORLDS = {
    "pointmaze": (0.1, True), "antmaze": (0.1, True), "antsoccer": (0.1, True), "humanoidmaze": (0.025, True),
    "cube": (0.05, False), "scene": (0.05, False), "puzzle": (0.05, False),
}  # fmt: skip


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a plain npz file, with the checks of a buffer file against hostile archives."""
    check_is_file(path)
    with common.readable(path, "an .npz file"), zipfile.ZipFile(path) as archive:
        members = read_members(path, archive)
        size = sum(member.info.file_size for member in members.values())
        check_fits(path, 2 * size, "convert the file on a machine with more memory")
        return {key: unpack_member(archive, member) for key, member in members.items()}


def _check(path: Path, arrays: dict[str, np.ndarray]) -> None:
    flat = () if common.EXTRA in arrays else ("rewards", "masks")
    for key in ("timeouts", "next_observations", METADATA, *flat):
        if key in arrays:
            why = "have no rewards" if key in flat else "have T + 1 rows an episode"
            problem = f"is in the file, so it is no OGBench file: those {why}"
            remedy = "a file of envs.buffers needs no conversion; give flat arrays to envs.buffers.save"
            raise common.fail(path, key, problem, remedy)
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


def read(path: Any, dt: float | None = None, episode_length: int | None = None) -> common.Imported:
    """Read an OGBench file as `envs.buffers.convert.from_ogbench` says -> Imported. Raises InputError."""
    path = Path(path)
    arrays = _read_arrays(path)
    _check(path, arrays)
    own, carried = _read_own(path, arrays)
    marked = common.to_flags(path, "terminals", arrays["terminals"])
    open_end = not marked[-1]
    closing = marked.copy()
    closing[-1] = True
    kept = np.flatnonzero(~closing)
    if not len(kept):
        raise common.fail(path, "terminals", "is true in every row, so no row has a successor", "get the file again")
    observations = common.to_float32(path, "observations", arrays["observations"])
    columns = {
        "observations": observations[kept],
        "next_observations": observations[kept + 1],
        "actions": common.to_float32(path, "actions", arrays["actions"][kept]),
        "rewards": np.zeros(len(kept), np.float32),
        "terminals": np.zeros(len(kept), bool),
    }
    if "rewards" in arrays:
        columns["rewards"] = common.to_float32(path, "rewards", arrays["rewards"][kept])
    if "masks" in arrays:
        columns["terminals"] = ~common.to_flags(path, "masks", arrays["masks"][kept])
    columns["timeouts"] = closing[kept + 1] & ~columns["terminals"]
    lengths = np.diff(np.flatnonzero(closing), prepend=-1) - 1
    name = path.stem.removesuffix("-val")
    known_dt, rooted = WORLDS.get(name.split("-")[0], (None, False))
    dt = dt or own.get("dt") or known_dt
    if dt is None:
        raise common.fail(path, "dt", f"'{name}' is no set that is known here", "give the seconds per step with --dt")
    if own:
        columns |= {key: arrays[key][kept] for key in carried if key in arrays}
    elif rooted and "qpos" in arrays and arrays["qpos"].ndim == 2 and arrays["qpos"].shape[1] >= 2:
        root = common.to_float32(path, "qpos", arrays["qpos"])[:, :2]
        columns["root_positions"] = root[kept]
        columns["root_velocities"] = ((root[kept + 1].astype(np.float64) - root[kept]) / dt).astype(np.float32)
    metadata = {
        "dataset_name": f"ogbench/{path.stem}", "env": f"ogbench/{name}", "task": None, "layout": "env",
        "reward_kind": "task" if "rewards" in arrays else "none", "reference": None,
        "generator": {"script": "ogbench", "flags": {}}, "rows_dropped": {}, **own, "dt": dt,
        "parents": [{"path": path.name, "sha256": common.file_sha256(path), "taken": f"{len(kept)} rows"}],
    }  # fmt: skip
    metadata["episode_length"] = episode_length or own.get("episode_length") or int(lengths.max())
    notes = ["the last episode is open in the file: its last row is taken as the last observation"] * open_end
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
