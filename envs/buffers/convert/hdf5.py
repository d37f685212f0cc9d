"""Columns of N rows in an hdf5 file, as D4RL keeps them; nothing outside the file is read."""

from pathlib import Path
from typing import Any

import numpy as np

from envs.buffers.convert import common
from envs.buffers.fields import BOMB_BYTES, BOMB_RATIO
from envs.buffers.files import check_fits, check_is_file


def _find(h5py, file, path: Any, key: str):
    """A data set inside the file, or None. Links, which may lead to other files, are refused."""
    node = file
    for part in key.split("/"):
        if not isinstance(node, h5py.Group) or part not in node:
            return None
        if not isinstance(node.get(part, getlink=True), h5py.HardLink):
            raise common.fail(path, key, "is a link, not data", "copy the data into the file")
        node = node[part]
    if not isinstance(node, h5py.Dataset):
        raise common.fail(path, key, "is a group, not an array", "get the file again")
    if node.is_virtual or node.external:
        raise common.fail(path, key, "keeps its data in another file", "copy the data into the file")
    if node.dtype.kind not in "fiub" and not key.startswith("metadata/"):
        raise common.fail(path, key, f"holds {node.dtype}, not numbers", "give plain arrays of real numbers")
    return node


KEYS = {
    "observations": 2, "actions": 2, "rewards": 1, "terminals": 1, "timeouts": 1, "next_observations": 2,
    "infos/qpos": 2, "infos/qvel": 2, "infos/goal": 2, "infos/action_log_probs": 1,
}  # fmt: skip
NEEDED = ("observations", "actions", "rewards", "terminals")


def read_columns(path: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The columns a file has, with N rows each, as they are; and who made it."""
    h5py = common.require("h5py")
    check_is_file(Path(path))
    with common.readable(path, "an hdf5 file"), h5py.File(path, "r") as file:
        nodes = {key: _find(h5py, file, path, key) for key in KEYS}
        nodes = {key: node for key, node in nodes.items() if node is not None}
        for key in NEEDED:
            if key not in nodes:
                problem = f"is missing; the file holds {', '.join(list(file)[:20]) or 'nothing'}"
                raise common.fail(path, key, problem, "check that this is a D4RL file: docs/data.md lists its keys")
        size = sum(node.dtype.itemsize * node.size for node in nodes.values())
        stored = sum(node.id.get_storage_size() for node in nodes.values())
        if size > BOMB_BYTES and size > BOMB_RATIO * stored:
            problem = f"{stored:,} bytes claim to unpack to {size:,}"
            raise common.fail(path, "file", problem, "do not trust this file; if it is yours, write it uncompressed")
        _check_shapes(path, {key: node.shape for key, node in nodes.items()})
        check_fits(path, 2 * size, "convert the file on a machine with more memory")
        arrays = {key: node[()].reshape(len(node), *node.shape[1 : KEYS[key]]) for key, node in nodes.items()}
        maker = {key: _read_scalar(h5py, file, path, f"metadata/{key}") for key in ("algorithm", "iteration")}
    return arrays, {key: value for key, value in maker.items() if value is not None}


def _check_shapes(path: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Ranks, equal numbers of rows, equal sizes of observations. (N, 1) passes for (N,)."""
    rows = shapes["observations"][0] if shapes["observations"] else 0
    for key, shape in shapes.items():
        plain = shape[:-1] if KEYS[key] == 1 and len(shape) == 2 and shape[1] == 1 else shape
        if len(plain) != KEYS[key] or 0 in shape:
            want = "(N, size)" if KEYS[key] == 2 else "(N,) or (N, 1)"
            raise common.fail(path, key, f"has the shape {shape}, expected {want}", "get the file again")
        if shape[0] != rows:
            problem = f"has {shape[0]} rows, observations has {rows}"
            raise common.fail(path, key, problem, "the file was cut short or put together from two: get it again")
    following = shapes.get("next_observations", shapes["observations"])
    if following != shapes["observations"]:
        problem = f"has the shape {following}, observations {shapes['observations']}"
        raise common.fail(path, "next_observations", problem, "get the file again")


def _read_scalar(h5py, file, path: Any, key: str) -> str | int | None:
    """A short text or a whole number under metadata/, or None."""
    node = _find(h5py, file, path, key)
    if node is None or node.shape != ():
        return None
    value = node[()]
    if isinstance(value, bytes):
        return value.decode("ascii", "replace")[:200]
    return int(value) if node.dtype.kind in "iu" else None
