"""Buffer files: read, check, write, inspect. The file's contract is docs/buffer.md.

A buffer is one flat `.npz`: per-transition columns of N rows, per-episode arrays of E rows and
`metadata_json`. Columns of an uncompressed file are memory-mapped, so that a file may be larger
than the memory and reading one key costs only that key. Nothing is ever unpickled, nothing in a
file is evaluated or used as a path, and whatever is wrong with a file ends in one `InputError`
that names file, key and remedy.

    buffer = buffers.load("runs/wurl_sac/ant/seed0/buffers/policy_00.npz")
    buffer["observations"], buffer.metadata["env"], len(buffer), buffer.num_episodes
    buffers.save("mine.npz", arrays, metadata)

    python -m envs.buffers inspect FILE [--figure out.png]
"""

import argparse
import contextlib
import datetime
import functools
import glob
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from envs.errors import InputError
from envs.tasks import task as find_task
from envs.tasks import task_names

SCHEMA = "udg-buffer"
SCHEMA_VERSION = 1

# Per-transition columns: key -> (dtype, row shape; a name stands for a size the file chooses).
COLUMNS = {
    "observations": (np.float32, ("S",)),
    "actions": (np.float32, ("A",)),
    "rewards": (np.float32, ()),
    "next_observations": (np.float32, ("S",)),
    "terminals": (np.bool_, ()),
    "timeouts": (np.bool_, ()),
    "root_positions": (np.float32, (2,)),
    "root_velocities": (np.float32, (2,)),
    "pseudo_rewards": (np.float32, ()),
    "goals": (np.float32, (2,)),
    "action_log_probs": (np.float32, ()),
    "policy_ids": (np.int32, ()),
}
REQUIRED = tuple(list(COLUMNS)[:6])
EPISODE_KEYS = {
    "episode_ends": np.int64,
    "episode_returns": np.float32,
    "episode_lengths": np.int32,
}
EXTRA_DTYPES = (np.float32, np.int32, np.int64, np.bool_)
STRUCTURE = ("terminals", "timeouts", *EPISODE_KEYS)  # always read: they define the episodes
METADATA = "metadata_json"

LAYOUTS = ("env", "task")
REWARD_KINDS = ("none", "task", "relabelled")
METADATA_TYPES = {
    "dataset_name": str,
    "env": str,
    "task": (str, type(None)),
    "layout": str,
    "reward_kind": str,
    "task_options": dict,
    "dt": (int, float),
    "episode_length": int,
    "generator": dict,
    "warmup_transitions": (int, type(None)),
    "parents": list,
    "num_transitions": int,
    "num_episodes": int,
    "sha256": dict,
}
METADATA_DEFAULTS = {
    "task": None,
    "task_options": {},
    "generator": {},
    "seed": None,
    "warmup_transitions": 0,
    "reference": None,
    "parents": [],
}
MERGE_KEYS = ("env", "task", "layout", "reward_kind", "task_options", "dt")

ACTION_LIMIT = 1.0 + 1e-5
BLOCK_BYTES = 1 << 24  # values are checked and hashed in blocks of this size
SAMPLED_ROWS = 4096  # half the rows on which next_observations is compared with the next row
LARGEST = 2.0**31  # of the numbers in the metadata that readers compute with
MAX_MEMBERS = 64
MAX_METADATA_BYTES = 1 << 26
MAX_HEADER_BYTES = 10_000  # numpy's own limit on the text header of an array
BOMB_BYTES, BOMB_RATIO = 1 << 26, 100  # real observations compress by less than 10
ALIGNMENT = 64  # of every array in the file, so that mapped data is as fast as memory


def _fail(path: Any, key: str, problem: str, remedy: str) -> InputError:
    return InputError(f"{path}: {key}: {problem}. Remedy: {remedy}.")


# --- the buffer ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Buffer:
    """A checked buffer: arrays by key (mapped read-only where the file allows), and metadata."""

    arrays: dict[str, np.ndarray]
    metadata: dict[str, Any]
    path: str

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self.arrays:
            raise _fail(
                self.path,
                key,
                f"not in the buffer, which has {', '.join(self.arrays)}",
                "record this column where the buffer is made, or load it by naming it in keys",
            )
        return self.arrays[key]

    def __len__(self) -> int:
        return len(self.arrays["terminals"])

    @property
    def num_episodes(self) -> int:
        return len(self.arrays["episode_ends"])

    def summary(self) -> str:
        """One line: file, transitions, episodes, mean return, rows dropped and why."""
        returns = self.arrays["episode_returns"].astype(np.float64)
        if self.metadata["reward_kind"] == "none":
            score = "reward-free"
        else:
            score = f"mean return {returns.mean():.2f} (std {returns.std():.2f})"
        dropped = self.metadata.get("rows_dropped", {})
        lost = ", ".join(f"{n!a} rows dropped ({why!a})" for why, n in dropped.items())
        return (
            f"{self.path}: {len(self):,} transitions, {self.num_episodes:,} episodes, {score}, "
            f"{lost or 'no rows dropped'}"
        )


# --- reading -------------------------------------------------------------------------------------


class _Member(NamedTuple):
    """One array inside the zip, known from its headers alone."""

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    header_size: int  # bytes of npy header before the data


def _read_npy_header(handle: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(handle)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"npy format {version} is not supported")
    return readers[version](handle, max_header_size=MAX_HEADER_BYTES)


def _check_directory(path: Path, infos: list[zipfile.ZipInfo]) -> None:
    """Refuse what no writer of ours makes: odd names, encryption, decompression bombs."""
    names = [info.filename for info in infos]
    remake = "write the file again with envs.buffers.save or numpy.savez"
    if len(names) > MAX_MEMBERS:
        raise _fail(path, "archive", f"holds {len(names)} members (limit {MAX_MEMBERS})", remake)
    for name in names:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}\.npy", name):
            raise _fail(path, ascii(name[:80]), "is not a plain array name", remake)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise _fail(path, twice[:-4], "is in the archive twice", remake)
    for info in infos:
        if info.flag_bits & 1 or info.compress_type not in (0, zipfile.ZIP_DEFLATED):
            raise _fail(path, info.filename[:-4], "is encrypted or oddly compressed", remake)
    total, on_disk = sum(info.file_size for info in infos), path.stat().st_size
    if total > BOMB_BYTES and total > BOMB_RATIO * on_disk:
        raise _fail(
            path,
            "archive",
            f"{on_disk:,} bytes claim to unpack to {total:,}",
            "do not trust this file; if it is yours, write it uncompressed",
        )


def _read_members(path: Path, archive: zipfile.ZipFile) -> dict[str, _Member]:
    infos = archive.infolist()
    _check_directory(path, infos)
    members = {}
    for info in infos:
        key = info.filename[:-4]
        with archive.open(info) as handle:
            start = io.BytesIO(handle.read(MAX_HEADER_BYTES + 16))  # whatever length a header claims
        shape, fortran, dtype = _read_npy_header(start)
        header_size = start.tell()
        if dtype.hasobject:
            raise _fail(path, key, "holds pickled objects", "save plain arrays of numbers")
        if any(n < 0 for n in shape):
            raise _fail(path, key, f"has the shape {shape}", "write the file again")
        needed = header_size + dtype.itemsize * math.prod(shape)
        if needed != info.file_size:
            problem = f"header announces {needed} bytes, the archive holds {info.file_size}"
            raise _fail(path, key, problem, "write the file again")
        members[key] = _Member(info, shape, dtype, fortran, header_size)
    return members


def _map_member(path: Path, member: _Member) -> np.ndarray:
    """A stored (uncompressed) array as a read-only memory map: the zip holds it as it is."""
    with open(path, "rb") as handle:
        handle.seek(member.info.header_offset)
        local = handle.read(30)
        if len(local) < 30 or local[:4] != b"PK\x03\x04":
            raise ValueError("the zip's local header is damaged")
        skip = 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    offset = member.info.header_offset + skip + member.header_size
    if offset + member.info.file_size - member.header_size > path.stat().st_size:
        raise ValueError("the array reaches beyond the end of the file")
    order = "F" if member.fortran else "C"
    mapped = np.memmap(path, member.dtype, "r", offset, member.shape, order)
    return mapped.view(np.ndarray)  # the plain type: the map stays alive as its base


def _unpack_member(archive: zipfile.ZipFile, member: _Member) -> np.ndarray:
    with archive.open(member.info) as handle:
        handle.read(member.header_size)
        data = handle.read()
    order = "F" if member.fortran else "C"
    return np.frombuffer(data, member.dtype).reshape(member.shape, order=order)


@contextlib.contextmanager
def _readable(path: Path, key: str = "archive") -> Iterator[None]:
    """Turn whatever a damaged file makes zipfile, zlib and numpy raise into one InputError."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise _fail(path, "file", "does not exist", "check the path") from None
    except Exception as error:  # a hostile archive can make the parsers raise almost anything
        problem = f"cannot be read as an .npz file ({type(error).__name__}: {str(error)[:120]})"
        remedy = "make the file again; a file cut short by a crash or a copy looks like this"
        raise _fail(path, key, problem, remedy) from None


def _parse_metadata(path: Any, text: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"the number {constant} is not JSON")

    try:
        metadata = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise _fail(path, METADATA, f"is not JSON ({str(error)[:120]})", "rewrite it") from None
    if not isinstance(metadata, dict):
        problem = f"is a JSON {type(metadata).__name__}, not an object"
        raise _fail(path, METADATA, problem, "write an object: docs/buffer.md lists its keys")
    return metadata


def _check_dialect(path: Path, members: Mapping[str, _Member]) -> None:
    if METADATA in members:
        text = members[METADATA]
        if text.dtype.kind != "U" or text.shape or text.info.file_size > MAX_METADATA_BYTES:
            problem = f"is {text.dtype} of shape {text.shape}, expected one string"
            raise _fail(path, METADATA, problem, "store np.array(json.dumps(metadata))")
        return
    problem = "is missing, so nothing says what `terminals` and `rewards` mean here"
    raise _fail(path, METADATA, problem, "write the arrays with envs.buffers.save")


def available_memory() -> float:
    """Bytes that can be allocated now, or infinity where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return math.inf


def _check_fits(path: Any, size: int, remedy: str) -> None:
    free = available_memory()
    if size > free:
        problem = f"needs {size / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
        raise _fail(path, "archive", problem, remedy)


def check_is_file(path: Path) -> None:
    """Refuse a folder, and what would never end: a pipe or a device."""
    with _readable(path, "file"):
        if path.is_dir():
            raise _fail(path, "file", "is a folder", f"name the files: {path / '*.npz'}")
        if path.exists() and not path.is_file():
            raise _fail(path, "file", "is not a file but a pipe or a device", "write it to a file first")


def _load_file(path: Path, keys: Iterable[str] | None, unchecked: tuple[str, ...]) -> Buffer:
    check_is_file(path)
    with _readable(path), zipfile.ZipFile(path) as archive:
        members = _read_members(path, archive)
        _check_dialect(path, members)
        text = str(_unpack_member(archive, members.pop(METADATA)))
        metadata = _parse_metadata(path, text)
        _check_schema(metadata, path)
        _check_shapes({k: (m.shape, m.dtype) for k, m in members.items()}, path)
        wanted = _choose_keys(path, members, keys)
        packed = [members[key] for key in wanted if members[key].info.compress_type]
        size = sum(member.info.file_size for member in packed)
        _check_fits(path, size, "write the file uncompressed, then it is memory-mapped")
        arrays = {}
        for key in wanted:
            with _readable(path, key):
                packed = members[key].info.compress_type
                arrays[key] = _unpack_member(archive, members[key]) if packed else _map_member(path, members[key])
    _check_metadata(metadata, path)
    _check_values(arrays, metadata, path, unchecked)
    return Buffer(arrays, metadata, str(path))


def _choose_keys(path: Path, members: Mapping[str, _Member], keys: Iterable[str] | None):
    if keys is None:
        return list(members)
    keys = list(keys)
    for key in keys:
        if key not in members:
            problem = f"is not in the file, which holds {', '.join(members)}"
            remedy = "record this column where the buffer is made, or use another buffer"
            raise _fail(path, key, problem, remedy)
    return [key for key in members if key in keys or key in STRUCTURE]


def find(path: str | os.PathLike) -> list[Path]:
    """The files that a path or glob names, sorted. InputError where there is none."""
    text = os.fspath(path)
    if os.path.exists(text) or not glob.has_magic(text):
        return [Path(text)]
    found = sorted(Path(name) for name in glob.glob(text))
    if not found:
        raise _fail(text, "glob", "matches no file", "check the pattern and quote it in a shell")
    return found


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
        max_rows: of more rows take whole episodes at random, the same ones always, up to so many; 0: all.

    Returns: a `Buffer`; arrays of an uncompressed file are read-only memory maps.
    Raises: InputError naming file, key and remedy.
    """
    if require_rewards and keys is not None:
        keys = {*keys, "rewards"}
    parts = [_load_file(file, keys, unchecked) for file in find(path)]
    for part in parts:
        if verify:
            _check_sha256(part)
        if task is not None:
            _check_task(part, task)
        if require_rewards:
            _check_rewards(part)
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
    `load`. Raises InputError as `load` does, where the file's observations are not those of its task, and where two
    copies of the rows, which every learner holds, do not fit into memory.
    """
    buffer = load(path, keys, require_rewards=True, task=task or None, max_rows=max_rows)
    size, free = 2 * sum(array.nbytes for array in buffer.arrays.values()), available_memory()
    most = int(0.8 * min(free / size, 1.0) * len(buffer))
    _check_fits(path, size, f"train on whole episodes drawn from it, for example --max-rows {most}")
    about = buffer.metadata
    if about["task"] is None:
        remedy = import_command(buffer) or "write its name there as `task`, or relabel by udg_select.py"
        raise _fail(path, "metadata_json", "names no task", remedy)
    try:
        found = find_task(about["task"], **about["task_options"])
    except (TypeError, ValueError, ArithmeticError) as error:  # the metadata may be a stranger's
        remedy = import_command(buffer) or "name a task that is known here, and the options it has"
        raise _fail(path, f"{METADATA}['task']", str(error), remedy) from None
    sizes = buffer["observations"].shape[1], buffer["actions"].shape[1]
    if about["layout"] != "task" or sizes != (found.observation_size, found.action_size):
        remedy = "write the task there that these numbers belong to, or make the file again"
        if about["layout"] == "env":
            remedy = f"convert: {_select_command(buffer, found.name)}"
        problem = f"{sizes[0]} numbers in layout '{about['layout']}', {found.name} observes {found.observation_size}"
        raise _fail(path, "observations", problem, remedy)
    return buffer, found


def _draw_episodes(buffer: Buffer, rows: int) -> Buffer:
    """Whole episodes, drawn without replacement, of at most `rows` rows together (one at least), in memory."""
    lengths, ends = buffer["episode_lengths"], buffer["episode_ends"]
    order = np.random.default_rng(0).permutation(len(ends))
    count = max(1, int(np.searchsorted(np.cumsum(lengths[order], dtype=np.int64), rows, side="right")))
    chosen = np.sort(order[:count])
    spans = [slice(int(ends[i] - lengths[i]), int(ends[i])) for i in chosen]
    take = lambda key, x: x[chosen] if key in EPISODE_KEYS else np.concatenate([x[span] for span in spans])
    arrays = {key: take(key, x) for key, x in buffer.arrays.items()}
    arrays["episode_ends"] = np.cumsum(arrays["episode_lengths"], dtype=np.int64)
    returns, kept = arrays["episode_returns"].astype(np.float64), len(arrays["terminals"])
    metadata = {
        **buffer.metadata, "num_transitions": kept, "num_episodes": count, "mean_return": float(returns.mean()),
        "std_return": float(returns.std()), "sha256": {}, "warmup_transitions": None,
        "rows_dropped": {**buffer.metadata.get("rows_dropped", {}), "max_rows": len(buffer) - kept},
    }  # fmt: skip
    return Buffer(arrays, metadata, buffer.path)


def _merge(parts: list[Buffer], path: str) -> Buffer:
    first = parts[0]
    for part in parts[1:]:
        for key in MERGE_KEYS:
            if part.metadata[key] != first.metadata[key]:
                problem = f"{part.metadata[key]!r}, but {first.path} has {first.metadata[key]!r}"
                raise _fail(part.path, key, problem, "name only files of one kind in the glob")
        for key in ("observations", "actions"):
            if key in part.arrays and part[key].shape[1:] != first[key].shape[1:]:
                problem = f"rows have the shape {part[key].shape[1:]}, not {first[key].shape[1:]}"
                raise _fail(part.path, key, problem, "name only files of one kind in the glob")
    shared = [key for key in first.arrays if all(key in part.arrays for part in parts)]
    size = sum(part.arrays[key].nbytes for part in parts for key in shared)
    _check_fits(path, size, "join the shards into one uncompressed file, which is memory-mapped")
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
        "warmup_transitions": None if later_warmup else first.metadata["warmup_transitions"],
        "sha256": {},
        "parents": [{"path": Path(part.path).name} for part in parts],
    }
    return Buffer(arrays, metadata, path)


# --- checks --------------------------------------------------------------------------------------


def _check_schema(metadata: Mapping[str, Any], path: Any) -> None:
    if metadata.get("schema") != SCHEMA:
        problem = f"schema is {metadata.get('schema')!r}, expected {SCHEMA!r}"
        raise _fail(path, METADATA, problem, "write the arrays with envs.buffers.save")
    version = metadata.get("schema_version")
    if isinstance(version, bool) or version != SCHEMA_VERSION:
        problem = f"schema_version is {version!r}, this code reads {SCHEMA_VERSION}"
        raise _fail(path, METADATA, problem, "use the udg-jax release that wrote the file")


def _check_metadata(metadata: Mapping[str, Any], path: Any) -> None:
    """Presence, types and ranges of the metadata that readers rely on."""
    for key, kind in METADATA_TYPES.items():
        if key not in metadata:
            raise _fail(path, f"{METADATA}[{key!r}]", "is missing", "add it: docs/buffer.md")
        value = metadata[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            problem = f"is {str(value)[:60]!r} ({type(value).__name__})"
            raise _fail(path, f"{METADATA}[{key!r}]", problem, "see docs/buffer.md for its type")
        if isinstance(value, str) and not value.isprintable():  # it ends up in messages, titles and file names
            remedy = "write it without control characters"
            raise _fail(path, f"{METADATA}[{key!r}]", f"is {value[:60]!a}", remedy)
    for name, value in metadata["task_options"].items():
        if not isinstance(value, (int, float)) or not -LARGEST < value < LARGEST:
            problem, remedy = f"{name!a} is {str(value)[:60]!a}", "options are numbers, true or false"
            raise _fail(path, f"{METADATA}['task_options']", problem, remedy)
    if not all(isinstance(parent, dict) for parent in metadata["parents"]):
        remedy = "write a list of objects with path and sha256"
        raise _fail(path, f"{METADATA}['parents']", "is not a list of objects", remedy)
    if not isinstance(metadata.get("rows_dropped", {}), dict):
        remedy = "write an object: reason -> number of rows"
        raise _fail(path, f"{METADATA}['rows_dropped']", "is not an object", remedy)
    allowed = {"layout": LAYOUTS, "reward_kind": REWARD_KINDS}
    for key, values in allowed.items():
        if metadata[key] not in values:
            problem = f"is {metadata[key]!r}"
            raise _fail(path, f"{METADATA}[{key!r}]", problem, f"use one of {', '.join(values)}")
    for key in ("dt", "episode_length"):
        if not 0 < metadata[key] < LARGEST:
            problem = f"is {str(metadata[key])[:60]}"
            raise _fail(path, f"{METADATA}[{key!r}]", problem, "give a positive number")
    warmup = metadata["warmup_transitions"]
    if warmup is not None and not 0 <= warmup <= metadata["num_transitions"]:
        problem = f"is {warmup} of {metadata['num_transitions']} transitions"
        raise _fail(path, f"{METADATA}['warmup_transitions']", problem, "count the first rows")


def _check_shapes(shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]], path: Any) -> None:
    """Keys, dtypes, ranks and equal lengths, from (shape, dtype) alone."""
    for key in (*REQUIRED, *EPISODE_KEYS):
        if key not in shapes:
            remedy = "add it: docs/buffer.md says what it holds"
            raise _fail(path, key, f"is missing; the file holds {', '.join(shapes)}", remedy)
    sizes: dict[Any, Any] = {}
    for key, (shape, dtype) in shapes.items():
        expected, row = _expected(key, shape)
        if dtype not in expected:
            names = " or ".join(np.dtype(kind).name for kind in expected)
            remedy = f"convert it before saving: array.astype(np.{names.split()[0]})"
            raise _fail(path, key, f"is {dtype}, expected {names}", remedy)
        rows = "E" if key in EPISODE_KEYS else "N"
        if len(shape) != 1 + len(row):
            want = ", ".join(str(n) for n in (rows, *row))
            problem = f"has the shape {shape}, expected ({want})"
            raise _fail(path, key, problem, "squeeze or reshape it before saving")
        if 0 in shape:
            raise _fail(path, key, f"is empty: shape {shape}", "give at least one transition")
        for name, size in zip((rows, *row), shape, strict=True):
            known, source = sizes.setdefault(name, (name if isinstance(name, int) else size, key))
            if size != known:
                problem = f"has the shape {shape}, but {name} is {known} (from {source})"
                raise _fail(path, key, problem, "all arrays must describe the same transitions")


def _expected(key: str, shape: tuple[int, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Allowed dtypes and row shape of a key; unknown columns may have any row shape."""
    if key in COLUMNS:
        dtype, row = COLUMNS[key]
        return (dtype,), row
    if key in EPISODE_KEYS:
        return (EPISODE_KEYS[key],), ()
    return EXTRA_DTYPES, tuple(f"{key}:{i}" for i in range(1, len(shape)))


def _row_blocks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    rows = max(1, BLOCK_BYTES // max(1, array.nbytes // len(array)))
    for start in range(0, len(array), rows):
        yield start, array[start : start + rows]


def _check_column(key: str, array: np.ndarray, path: Any) -> None:
    """Values of one array: finite, actions in [-1, 1], flags 0 or 1, ids not negative."""
    for start, block in _row_blocks(array):
        if array.dtype == np.bool_:
            bad = block.view(np.uint8) > 1
        elif array.dtype == np.float32:
            bad = ~np.isfinite(block)
        else:
            bad = block < 0 if key == "policy_ids" else np.zeros(1, bool)
        if bad.any():
            row = start + int(np.argmax(bad.reshape(len(block), -1).any(axis=1)))
            problem = f"row {row} is {np.array2string(array[row], threshold=8)}"
            raise _fail(path, key, problem, "values must be finite: find where it was recorded")
        if key == "actions" and (np.abs(block) > ACTION_LIMIT).any():
            row = start + int(np.argmax((np.abs(block) > ACTION_LIMIT).any(axis=1)))
            problem = f"row {row} has |a| = {np.abs(array[row]).max():.6g}, beyond 1"
            raise _fail(path, key, problem, "store what the environment received, in [-1, 1]")


def _check_episodes(arrays: Mapping[str, np.ndarray], path: Any) -> None:
    """Flags exclusive, last row ends an episode, the episode arrays agree with the flags."""
    terminals, timeouts = arrays["terminals"], arrays["timeouts"]
    both = np.flatnonzero(terminals & timeouts)
    if len(both):
        problem = f"row {both[0]} has both flags"
        remedy = "a timeout is a cut without termination: clear it where terminals is true"
        raise _fail(path, "terminals and timeouts", problem, remedy)
    ends = np.flatnonzero(terminals | timeouts) + 1
    if not len(ends) or ends[-1] != len(terminals):
        problem = "the last row does not end an episode"
        raise _fail(path, "timeouts", problem, "set timeouts[-1] = True or drop the open episode")
    if not np.array_equal(arrays["episode_ends"], ends):
        problem = f"disagrees with the flags, which end {len(ends)} episodes"
        raise _fail(path, "episode_ends", problem, "np.flatnonzero(terminals | timeouts) + 1")
    if not np.array_equal(arrays["episode_lengths"], np.diff(ends, prepend=0)):
        problem = "disagrees with episode_ends"
        raise _fail(path, "episode_lengths", problem, "np.diff(episode_ends, prepend=0)")
    if "rewards" not in arrays:
        return
    starts = ends - np.diff(ends, prepend=0)
    for first in range(0, len(ends), 4096):  # of many episodes not all at once: they may be larger than the memory
        part = slice(first, first + 4096)
        rewards = arrays["rewards"][starts[first] : ends[part][-1]].astype(np.float64)
        within = starts[part] - starts[first]
        error = np.abs(np.add.reduceat(rewards, within) - arrays["episode_returns"][part])
        wrong = error > 1e-4 * (1.0 + np.add.reduceat(np.abs(rewards), within))
        if wrong.any():
            problem = f"episode {first + np.argmax(wrong)} differs from the sum of its rewards"
            raise _fail(path, "episode_returns", problem, "save the file with envs.buffers.save")


def _check_successors(arrays: Mapping[str, np.ndarray], path: Any) -> None:
    """next_observations[i] = observations[i + 1] inside an episode, on a sample of the rows."""
    count = len(arrays["terminals"])
    if count <= 2 * SAMPLED_ROWS:
        rows = np.arange(count)
    else:
        rows = np.sort(np.random.default_rng(0).integers(0, count, 2 * SAMPLED_ROWS))
    inside = rows[~(arrays["terminals"][rows] | arrays["timeouts"][rows])]
    following = arrays["observations"][inside + 1]
    error = np.abs(arrays["next_observations"][inside] - following)
    wrong = (error > 1e-4 * (1.0 + np.abs(following))).any(axis=1)
    if wrong.any():
        problem = f"row {inside[np.argmax(wrong)]} is not the observation of the next row"
        remedy = "keep the rows of an episode in order and flag every end in terminals or timeouts"
        raise _fail(path, "next_observations", problem, remedy)


def _check_values(
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, Any],
    path: Any,
    unchecked: tuple[str, ...] = (),
) -> None:
    for key, array in arrays.items():
        if key not in unchecked:
            _check_column(key, array, path)
    _check_episodes(arrays, path)
    if {"observations", "next_observations"} <= arrays.keys() - set(unchecked):
        _check_successors(arrays, path)
    counts = {"num_transitions": "terminals", "num_episodes": "episode_ends"}
    for name, key in counts.items():
        if metadata[name] != len(arrays[key]):
            problem = f"is {metadata[name]}, but {key} has {len(arrays[key])} rows"
            remedy = "the file was put together from two: make it again"
            raise _fail(path, f"{METADATA}[{name!r}]", problem, remedy)


def validate(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any], path: Any) -> None:
    """Check a complete buffer in memory against docs/buffer.md; `path` names it in errors."""
    _check_schema(metadata, path)
    _check_shapes({key: (a.shape, a.dtype) for key, a in arrays.items()}, path)
    _check_metadata(metadata, path)
    _check_values(arrays, metadata, path)


def sha256(array: np.ndarray) -> str:
    """Hex digest of the array's bytes in C order, read in blocks."""
    digest = hashlib.sha256()
    for _, block in _row_blocks(array):
        digest.update(np.ascontiguousarray(block).view(np.uint8))
    return digest.hexdigest()


def digests(buffer: Buffer, keys: Iterable[str]) -> list[str]:
    """sha256 of these columns, from the metadata where it is known: not where rows were drawn or shards joined."""
    return [buffer.metadata["sha256"].get(key) or sha256(buffer[key]) for key in keys]


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The metadata of a file, or of the first one of a glob; no array is read."""
    path = find(path)[0]
    check_is_file(path)
    with _readable(path), zipfile.ZipFile(path) as archive:
        members = _read_members(path, archive)
        _check_dialect(path, members)
        metadata = _parse_metadata(path, str(_unpack_member(archive, members.pop(METADATA))))
        _check_schema(metadata, path)
        _check_shapes({k: (m.shape, m.dtype) for k, m in members.items()}, path)
    _check_metadata(metadata, path)
    return metadata


def _check_sha256(buffer: Buffer) -> None:
    for key, array in buffer.arrays.items():
        known = buffer.metadata["sha256"].get(key)
        if known != sha256(array):
            problem = "does not match its sha256" if known else "has no sha256 in the metadata"
            raise _fail(buffer.path, key, problem, "copy or make the file again")


def import_command(buffer: Buffer, task: str = "") -> str:
    """How to import a file of another project once more, for a task; empty for a buffer that is no import.

    task: by default what the sizes of observations and actions allow.
    """
    about = buffer.metadata
    kind = about["generator"].get("script")
    if kind not in ("d4rl", "minari", "ogbench"):
        return ""
    fit = ["NAME"]
    if {"observations", "actions"} <= buffer.arrays.keys():
        sizes = buffer["observations"].shape[1], buffer["actions"].shape[1]
        known = [find_task(name) for name in task_names()]
        fit = [t.name for t in known if t.has_reward and (t.observation_size, t.action_size) == sizes]
        if not fit:
            return f"use other data: no task here has {sizes[0]} observed and {sizes[1]} action numbers"
    source = str(about["parents"][0].get("path", "")) if about["parents"] else ""  # it may be a stranger's
    source = source if source and source.isprintable() else "FILE"
    command = f"import it again: python -m envs.buffers from-{kind} {source} --task {task or fit[0]}"
    return command if task or not fit[1:] else f"{command} (or {', '.join(fit[1:6])})"


def _select_command(buffer: Buffer, task: str) -> str:
    """How to get a file with a task's rewards: relabel the buffer, or what it was made from."""
    about = buffer.metadata
    imported = import_command(buffer, "" if task == "TASK" else task)
    if imported and about["task"] is None:
        return imported
    names = [str(parent.get("path")) for parent in about["parents"]]
    names = [name for name in names if name.isprintable()]  # they may be a stranger's
    made = about["layout"] == "task" and names and not imported
    source = f"<folder of {', '.join(names[:3])}>" if made else buffer.path
    return f"python udg_select.py --buffers {source} --task {task}"


def _check_task(buffer: Buffer, task: str) -> None:
    have = buffer.metadata["task"]
    if have == task and buffer.metadata["layout"] == "task":
        return
    raise _fail(buffer.path, "task", f"is {have!r}, not {task!r}", f"make that file: {_select_command(buffer, task)}")


def _check_rewards(buffer: Buffer) -> None:
    command = f"relabel first: {_select_command(buffer, 'TASK')}"
    if buffer.metadata["reward_kind"] == "none":
        raise _fail(buffer.path, "rewards", "the data is reward-free", command)
    rewards = buffer["rewards"]
    if rewards.min() != rewards.max():
        return
    if not rewards[0]:
        raise _fail(buffer.path, "rewards", "are zero in every row", command)
    print(f"warning: {buffer.path}: rewards are {rewards[0]} in every row", file=sys.stderr)


# --- writing -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions of what makes the numbers, without importing any of it."""
    found = {"python": platform.python_version()}
    for name in ("udg-jax", "numpy", "jax", "flax", "mujoco", "mujoco-mjx", "brax"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@functools.lru_cache(maxsize=1)
def git_commit() -> str:
    """Commit of the checkout that this file is in, '+dirty' where changed, or 'unknown'."""
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return "unknown"
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def save(
    path: str | os.PathLike,
    arrays: Mapping[str, Any],
    metadata: Mapping[str, Any],
    compressed: bool = False,
) -> Path:
    """Check a buffer and write it in one atomic step.

    Args:
        path: file to write, ending in .npz; its folder is made where missing.
        arrays: at least observations (N, S), actions (N, A), rewards (N,), next_observations
            (N, S) in float32 and terminals, timeouts (N,) in bool; optional columns as in
            docs/buffer.md. The episode arrays are computed here.
        metadata: at least dataset_name, env, layout, reward_kind, dt, episode_length. Schema,
            counts, sha256, versions, commit and date are added here.
        compressed: deflate; saves little, reads slower and cannot be memory-mapped.

    Returns: the path. The old file stays whole until the new one is complete on disk.
    Raises: InputError where the data breaks the contract or the disk refuses.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise _fail(path, "file", "does not end in .npz", f"write {path.with_suffix('.npz')}")
    arrays = {key: np.asarray(value) for key, value in arrays.items() if value is not None}
    arrays = {key: value for key, value in arrays.items() if key not in EPISODE_KEYS}
    arrays.update(_episode_arrays(arrays, path))
    full = {**METADATA_DEFAULTS, **metadata}
    returns = arrays["episode_returns"].astype(np.float64)
    full.update(
        schema=SCHEMA,
        schema_version=SCHEMA_VERSION,
        num_transitions=len(arrays["terminals"]),
        num_episodes=len(returns),
        mean_return=float(returns.mean()) if len(returns) else 0.0,
        std_return=float(returns.std()) if len(returns) else 0.0,
        versions=versions(),
        git_commit=git_commit(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        sha256={},
    )
    full = json.loads(_to_json(full, path))  # as a reader will see it
    validate(arrays, full, path)
    full["sha256"] = {key: sha256(array) for key, array in arrays.items()}
    write_npz(path, {**arrays, METADATA: np.array(_to_json(full, path))}, compressed)
    return path


def _episode_arrays(arrays: Mapping[str, np.ndarray], path: Any) -> dict[str, np.ndarray]:
    for key in ("terminals", "timeouts", "rewards"):
        if key not in arrays or arrays[key].ndim != 1:
            remedy = "give one value per transition: docs/buffer.md"
            raise _fail(path, key, "is missing or not of shape (N,)", remedy)
    terminals, timeouts, rewards = (arrays[k] for k in ("terminals", "timeouts", "rewards"))
    if len({len(terminals), len(timeouts), len(rewards)}) > 1:
        problem = f"lengths {len(terminals)}, {len(timeouts)}, {len(rewards)} disagree"
        raise _fail(path, "terminals, timeouts, rewards", problem, "give one value per transition")
    ends = np.flatnonzero(terminals.astype(bool) | timeouts.astype(bool)).astype(np.int64) + 1
    lengths = np.diff(ends, prepend=0)
    if len(ends):
        returns = np.add.reduceat(rewards[: ends[-1]].astype(np.float64), ends - lengths)
    else:
        returns = np.zeros(0)
    return {
        "episode_ends": ends,
        "episode_returns": returns.astype(np.float32),
        "episode_lengths": lengths.astype(np.int32),
    }


def _to_json(metadata: Mapping[str, Any], path: Any) -> str:
    def plain(value: Any) -> Any:
        if isinstance(value, (np.ndarray, np.generic)) or hasattr(value, "tolist"):
            return value.tolist()
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        raise TypeError(f"{type(value).__name__} is not JSON")

    try:
        return json.dumps(metadata, default=plain, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        remedy = "use strings, finite numbers, lists and dicts"
        raise _fail(path, METADATA, f"cannot be written ({error})", remedy) from None


def write_npz(path: Path, arrays: Mapping[str, np.ndarray], compressed: bool = False) -> None:
    """Write beside the target, flush to disk, then rename over it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    size = sum(array.nbytes for array in arrays.values())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as handle:
            _write_zip(handle, arrays, compressed)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error}; it needs {size / 1e6:.1f} MB)"
        remedy = "free some space or choose another folder; an older file there is unchanged"
        raise _fail(path, "file", problem, remedy) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    with contextlib.suppress(OSError):  # not every file system can flush a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _write_zip(handle: Any, arrays: Mapping[str, np.ndarray], compressed: bool) -> None:
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(handle, "w", method) as archive:
        for key, array in arrays.items():
            info = zipfile.ZipInfo(f"{key}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type = method
            # An extra field pads the local header (30 bytes, name, 20 bytes of zip64 sizes), so
            # that the array starts aligned: the npy header is a multiple of 64 bytes anyway.
            start = handle.tell() + 30 + len(info.filename) + 20
            padding = -(start + 4) % ALIGNMENT
            info.extra = b"\x55\xd9" + padding.to_bytes(2, "little") + bytes(padding)
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


# --- inspecting ----------------------------------------------------------------------------------


def describe(buffer: Buffer) -> str:
    """A table of the arrays and the metadata that matter to a reader."""
    lines = [buffer.summary(), "", f"{'key':<18} {'shape':>16} {'dtype':>8} {'MB':>8}  range"]
    for key, array in buffer.arrays.items():
        low, high = array.min(), array.max()
        span = f"{low} .. {high}" if array.dtype == bool else f"{low:.5g} .. {high:.5g}"
        shape = "x".join(str(n) for n in array.shape)
        lines.append(f"{key:<18} {shape:>16} {array.dtype!s:>8} {array.nbytes / 1e6:>8.2f}  {span}")
    lines.append("")
    skip = ("sha256", "schema", "schema_version")
    for key, value in buffer.metadata.items():
        if key not in skip:
            text = ascii(value)
            lines.append(f"{key:<18} {text if len(text) <= 300 else text[:297] + '...'}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Command line: `python -m envs.buffers inspect FILE [--figure out.png]`, and the converters of envs.convert."""
    from envs import convert  # it reads and writes buffers, so it cannot be imported above

    parser = argparse.ArgumentParser(prog="python -m envs.buffers", description="Buffer files.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="check a file fully and show what it holds")
    inspect.add_argument("file", help="a buffer file, or a quoted glob of shards")
    inspect.add_argument("--figure", help="write a figure of returns, lengths and coverage here")
    convert.add_commands(commands)
    args = parser.parse_args(argv)
    try:
        if args.command != "inspect":
            convert.run_command(args)
            return 0
        buffer = load(args.file, quiet=True, verify=True)
        print("\n".join([describe(buffer), *convert.describe_checks(buffer.metadata, buffer)]))
        if args.figure:
            from envs.buffer_figures import plot_buffer  # the reader itself needs no matplotlib

            plot_buffer(args.figure, buffer)
            print(f"\nfigure: {args.figure}")
    except (InputError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\nverdict: follows docs/buffer.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
