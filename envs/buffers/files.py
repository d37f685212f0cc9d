"""Npz files on disk: read by their headers, memory-mapped, nothing unpickled; written whole or not at all.

Whatever is wrong with a file ends in one InputError that names file, key and remedy.
"""

import contextlib
import glob
import hashlib
import io
import json
import math
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from envs.buffers.fields import (
    ALIGNMENT,
    BLOCK_BYTES,
    BOMB_BYTES,
    BOMB_RATIO,
    MAX_HEADER_BYTES,
    MAX_MEMBERS,
    MAX_METADATA_BYTES,
    METADATA,
    fail,
)  # fmt: skip
from envs.errors import InputError

LFS_POINTER = b"version https://git-lfs."  # what Git leaves in the place of a large file that was not fetched


class Member(NamedTuple):
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


def check_suffix(path: Path) -> None:
    if path.suffix != ".npz":
        raise fail(path, "file", "does not end in .npz", f"write {path.with_suffix('.npz')}")


def check_names(path: Path, names: Iterable[str]) -> None:
    """Refuse more arrays than a file may hold, and names that no file has."""
    names = list(names)
    if len(names) > MAX_MEMBERS:
        remedy = "leave some out, or join columns to one of more numbers a row"
        raise fail(path, "archive", f"holds {len(names)} members (limit {MAX_MEMBERS})", remedy)
    for name in names:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", name):
            remedy = "name it by a letter, then at most 63 letters, digits and _"
            raise fail(path, ascii(name[:80]), "is not a plain array name", remedy)


def _check_directory(path: Path, infos: list[zipfile.ZipInfo]) -> None:
    """Refuse what no writer of ours makes: odd names, encryption, decompression bombs."""
    names = [info.filename for info in infos]
    remake = "write the file again with envs.buffers.save or numpy.savez"
    for name in names:
        if not name.endswith(".npy"):
            raise fail(path, ascii(name[:80]), "is not a plain array name", remake)
    check_names(path, [name[:-4] for name in names])
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise fail(path, twice[:-4], "is in the archive twice", remake)
    for info in infos:
        if info.flag_bits & 1 or info.compress_type not in (0, zipfile.ZIP_DEFLATED):
            raise fail(path, info.filename[:-4], "is encrypted or oddly compressed", remake)
    total, on_disk = sum(info.file_size for info in infos), path.stat().st_size
    if total > BOMB_BYTES and total > BOMB_RATIO * on_disk:
        raise fail(
            path,
            "archive",
            f"{on_disk:,} bytes claim to unpack to {total:,}",
            "do not trust this file; if it is yours, write it uncompressed",
        )


def read_members(path: Path, archive: zipfile.ZipFile) -> dict[str, Member]:
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
            raise fail(path, key, "holds pickled objects", "save plain arrays of numbers")
        if any(n < 0 for n in shape):
            raise fail(path, key, f"has the shape {shape}", "write the file again")
        needed = header_size + dtype.itemsize * math.prod(shape)
        if needed != info.file_size:
            problem = f"header announces {needed} bytes, the archive holds {info.file_size}"
            raise fail(path, key, problem, "write the file again")
        members[key] = Member(info, shape, dtype, fortran, header_size)
    return members


def map_member(path: Path, member: Member) -> np.ndarray:
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


def unpack_member(archive: zipfile.ZipFile, member: Member) -> np.ndarray:
    with archive.open(member.info) as handle:
        handle.read(member.header_size)
        data = handle.read()
    order = "F" if member.fortran else "C"
    return np.frombuffer(data, member.dtype).reshape(member.shape, order=order)


@contextlib.contextmanager
def readable(path: Path, key: str = "archive") -> Iterator[None]:
    """Turn whatever a damaged file makes zipfile, zlib and numpy raise into one InputError."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise fail(path, "file", "does not exist", "check the path") from None
    except Exception as error:  # a hostile archive can make the parsers raise almost anything
        problem = f"cannot be read as an .npz file ({type(error).__name__}: {str(error)[:120]})"
        remedy = "make the file again; a file cut short by a crash or a copy looks like this"
        raise fail(path, key, problem, remedy) from None


def parse_metadata(path: Any, text: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"the number {constant} is not JSON")

    try:
        metadata = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise fail(path, METADATA, f"is not JSON ({str(error)[:120]})", "rewrite it") from None
    if not isinstance(metadata, dict):
        problem = f"is a JSON {type(metadata).__name__}, not an object"
        raise fail(path, METADATA, problem, "write an object: docs/buffer.md lists its keys")
    return metadata


def check_dialect(path: Path, members: Mapping[str, Member]) -> None:
    if METADATA in members:
        text = members[METADATA]
        if text.dtype.kind != "U" or text.shape or text.info.file_size > MAX_METADATA_BYTES:
            problem = f"is {text.dtype} of shape {text.shape}, expected one string"
            raise fail(path, METADATA, problem, "store np.array(json.dumps(metadata))")
        return
    problem = "is missing, so nothing says what `terminals` and `rewards` mean here"
    raise fail(path, METADATA, problem, "write the arrays with envs.buffers.save")


def available_memory() -> float:
    """Bytes that can be allocated now, also in a container, or infinity where the system does not say."""
    free, group = math.inf, "/sys/fs/cgroup/memory"
    words = lambda path: dict(line.split()[:2] for line in Path(path).read_text().splitlines())
    with contextlib.suppress(OSError, ValueError, KeyError):
        free = 1024.0 * int(words("/proc/meminfo")["MemAvailable:"])
    with contextlib.suppress(OSError, ValueError, KeyError):  # "max": no limit; what files fill is given back
        cached = words(f"{group}.stat")
        used = int(Path(f"{group}.current").read_text()) - int(cached["active_file"]) - int(cached["inactive_file"])
        free = min(free, float(int(Path(f"{group}.max").read_text()) - used))
    return free


def check_fits(path: Any, size: int, remedy: str) -> None:
    free = available_memory()
    if size > free:
        problem = f"needs {size / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
        raise fail(path, "archive", problem, remedy)


def check_is_file(path: Path) -> None:
    """Refuse a folder, and what would never end: a pipe or a device."""
    with readable(path, "file"):
        if path.is_dir():
            raise fail(path, "file", "is a folder", f"name the files: {path / '*.npz'}")
        if path.exists() and not path.is_file():
            raise fail(path, "file", "is not a file but a pipe or a device", "write it to a file first")
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as handle:
            pointer = handle.read(len(LFS_POINTER)) == LFS_POINTER
        if path.exists() and pointer:
            problem = "is a Git LFS pointer of a few lines, not the data it stands for"
            remedy = f"run git lfs pull --include {path.name} in its clone, or download the file"
            raise fail(path, "file", problem, remedy)


def find(path: str | os.PathLike) -> list[Path]:
    """The files that a path or glob names, sorted. InputError where there is none."""
    text = os.fspath(path)
    if os.path.exists(text) or not glob.has_magic(text):
        return [Path(text)]
    found = sorted(Path(name) for name in glob.glob(text))
    if not found:
        raise fail(text, "glob", "matches no file", "check the pattern and quote it in a shell")
    return found


def row_blocks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    rows = max(1, BLOCK_BYTES // max(1, array.nbytes // len(array)))
    for start in range(0, len(array), rows):
        yield start, array[start : start + rows]


def sha256(array: np.ndarray) -> str:
    """Hex digest of the array's bytes in C order, read in blocks."""
    digest = hashlib.sha256()
    for _, block in row_blocks(array):
        digest.update(np.ascontiguousarray(block).view(np.uint8))
    return digest.hexdigest()


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
        raise fail(path, "file", problem, remedy) from None
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
