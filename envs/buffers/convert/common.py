"""What the dialects of other projects' files share: columns, flags, metadata, errors."""

import contextlib
import hashlib
import importlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from envs.buffers.fields import EPISODE_KEYS, LARGEST_VALUE, METADATA_TYPES, REQUIRED, Buffer, fail
from envs.buffers.files import check_fits, check_is_file, parse_metadata, read_members, unpack_member
from envs.errors import InputError

PACKAGES = {"h5py": "h5py", "minari": "minari[hdf5]", "pyarrow": "pyarrow"}  # import name -> what pip calls it
EXTRA = "udg_metadata_json"  # where files of other formats keep the metadata of a buffer
CLIPPED_SHARE = 0.01  # more rows than this beyond [-1, 1] are another scale, not rounding


class Imported(NamedTuple):
    """What a dialect makes of a file.

    arrays: columns of docs/buffer.md; metadata: what the dialect knows of it;
    state: (qpos (N, nq), qvel (N, nv)) before each step, float64, or None;
    notes: what a user should know, one sentence each; source: the file, for messages;
    exact: observations, next_observations and rewards in float64, where the file has them so, for the replay.
    """

    arrays: dict[str, np.ndarray]
    metadata: dict[str, Any]
    state: tuple[np.ndarray, np.ndarray] | None
    notes: list[str]
    source: str
    exact: dict[str, np.ndarray] = {}  # noqa: RUF012 (read only)


def require(name: str) -> Any:
    """Import an optional package, or raise InputError with the pip command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        command = f'pip install "{PACKAGES[name]}"'
        every = "" if name == "pyarrow" else ', or all optional readers at once with pip install -e ".[data]"'
        problem = f"this file format needs the package {name}, which is not installed"
        raise InputError(f"{problem}. Remedy: {command}{every}.") from None


@contextlib.contextmanager
def readable(path: Any, kind: str) -> Iterator[None]:
    """Turn whatever a damaged file makes its library raise into one InputError."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise fail(path, "file", "does not exist", "check the path") from None
    except Exception as error:  # a hostile file can make the parsers raise almost anything
        problem = f"cannot be read as {kind} ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        raise fail(path, "file", problem, "check that the download is complete and of this format") from None


def file_sha256(path: Any) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def to_float32(path: Any, key: str, array: np.ndarray) -> np.ndarray:
    """A column as float32. InputError where it holds no real numbers, or one that is not finite."""
    if array.dtype.kind not in "fiub":
        raise fail(path, key, f"holds {array.dtype}, not numbers", "give plain arrays of real numbers")
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, np.float32)
    wrong = ~np.isfinite(array.reshape(len(array), -1)).all(axis=1)
    if wrong.any():
        problem = f"row {np.argmax(wrong)} is not finite in float32 ({int(wrong.sum())} such rows)"
        raise fail(path, key, problem, "leave out the episodes with such rows, or get the file again")
    return array


def check_size(path: Any, key: str, array: np.ndarray) -> None:
    """InputError where a number is larger than anything can be learnt from, as a buffer refuses it."""
    row, column = np.unravel_index(int(np.argmax(np.abs(array))), array.shape + (1,) * (2 - array.ndim))
    if np.abs(array).max() > LARGEST_VALUE:
        where = f" in column {column}" if array.ndim > 1 else ""
        problem = f"row {row} has {np.abs(array).max():.3g}{where}"
        raise fail(path, key, problem, "scale that column, or leave it out: squares of such numbers overflow")


def to_flags(path: Any, key: str, array: np.ndarray) -> np.ndarray:
    """A column of bool from bools or from numbers that are 0 or 1; InputError for any other."""
    if array.dtype == bool:
        return array
    if array.dtype.kind not in "fiu":
        raise fail(path, key, f"holds {array.dtype}, not flags", "give bools, or the numbers 0 and 1")
    wrong = (array != 0) & (array != 1)
    if wrong.any():
        problem = f"row {np.argmax(wrong)} is {array[np.argmax(wrong)]}, neither 0 nor 1"
        raise fail(path, key, problem, "give bools, or the numbers 0 and 1")
    return array != 0


class Problems(list):
    """What is wrong with an input, all of it: errors are gathered, then raised as one."""

    def __init__(self, path: Any):
        super().__init__()
        self.path = path

    @contextlib.contextmanager
    def gather(self) -> Iterator[None]:
        """Keep an InputError for later; what follows it in the block is left out."""
        try:
            yield
        except InputError as error:
            self.append(str(error).removeprefix(f"{self.path}: "))

    def add(self, key: str, problem: str, remedy: str) -> None:
        self.append(str(fail(self.path, key, problem, remedy)).removeprefix(f"{self.path}: "))

    def raise_all(self) -> None:
        """One InputError that names them all, where there are any."""
        if len(self) == 1:
            raise InputError(f"{self.path}: {self[0]}")
        if self:
            listed = " ".join(f"({i}) {problem}" for i, problem in enumerate(self, start=1))
            raise InputError(f"{self.path}: {len(self)} problems. {listed}")


def read_npz(path: Any) -> dict[str, np.ndarray]:
    """All arrays of a plain npz file, with the checks of a buffer file against hostile archives."""
    path = Path(path)
    check_is_file(path)
    with readable(path, "an .npz file"), zipfile.ZipFile(path) as archive:
        members = read_members(path, archive)
        size = sum(member.info.file_size for member in members.values())
        check_fits(path, 2 * size, "convert the file on a machine with more memory")
        return {key: unpack_member(archive, member) for key, member in members.items()}


def same_rows(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Where two columns (N, S) hold the same row up to what a buffer allows: (N,) bool."""
    return (np.abs(left - right) <= 1e-4 * (1.0 + np.abs(right))).all(axis=1)


def root_columns(before: np.ndarray, after: np.ndarray, dt: float) -> dict[str, np.ndarray]:
    """Root columns of the places (N, 2) before and after each step."""
    velocities = (after.astype(np.float64) - before) / dt
    return {"root_positions": before.astype(np.float32), "root_velocities": velocities.astype(np.float32)}


def runs(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Exclusive ends (R,) of the unbroken stretches of a buffer's rows.

    An episode that ends in a terminal goes on where its next observation is exactly the next
    row's: a maze marks its goal and lets the robot walk on. A timeout always ends a stretch.
    """
    terminals = np.asarray(arrays["terminals"])
    ends = np.flatnonzero(terminals | np.asarray(arrays["timeouts"]))
    inner = ends[:-1][terminals[ends[:-1]]]
    on = (arrays["next_observations"][inner] == arrays["observations"][inner + 1]).all(axis=1)
    return np.setdiff1d(ends, inner[on]) + 1


def step_notes(world: str, dt: float, known: float | None) -> list[str]:
    """A note where a set's world has another step than the one that is asked for, by --task or --dt."""
    if known is None or dt is None or abs(dt - known) < 1e-9:
        return []
    return [f"a step of '{world}' takes {known} s, not {dt} s as asked for: its physics are others"]


def extra_columns(buffer: Buffer) -> dict[str, np.ndarray]:
    """The columns of a buffer beyond the required ones, as other formats have no place for them."""
    known = (*REQUIRED, *EPISODE_KEYS)
    return {key: np.asarray(value) for key, value in buffer.arrays.items() if key not in known}


def portable_metadata(buffer: Buffer) -> dict[str, Any]:
    """A buffer's metadata without what `save` computes again, and the names of its further columns."""
    made = ("schema", "schema_version", "num_transitions", "num_episodes", "mean_return", "std_return")
    made += ("versions", "git_commit", "created", "sha256")
    metadata = {key: value for key, value in buffer.metadata.items() if key not in made}
    return {**metadata, "carried": sorted(extra_columns(buffer))}


def own_metadata(source: Any, text: str) -> tuple[dict[str, Any], list[str]]:
    """What `portable_metadata` and `extra_columns` left in a file of another format: -> metadata, column names."""
    metadata = parse_metadata(source, text)
    carried = metadata.pop("carried", None)
    for key, kind in METADATA_TYPES.items():
        if not isinstance(metadata.get(key, kind() if isinstance(kind, type) else kind[0]()), kind):
            raise fail(source, f"{EXTRA}[{key!r}]", "has a wrong type", "write the file again")
    for key, value in {"carried": carried, "notes": metadata.get("notes", [])}.items():
        if not isinstance(value, list):
            raise fail(source, f"{EXTRA}[{key!r}]", "is not a list", "write the file again")
    metadata.pop("parents", None)
    return metadata, [str(key) for key in carried if str(key) not in REQUIRED]
