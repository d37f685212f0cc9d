"""Writing buffers: checked, with counts, digests, versions and commit, in one atomic step."""

import contextlib
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from envs.buffers.checks import check_columns, check_metadata, check_shapes, check_structure
from envs.buffers.fields import EPISODE_KEYS, METADATA, METADATA_DEFAULTS, SCHEMA, SCHEMA_VERSION, fail
from envs.buffers.files import check_names, check_suffix, sha256, write_npz


@functools.lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions of what makes the numbers, without importing any of it."""
    found = {"python": platform.python_version()}
    for name in ("udg-jax", "numpy", "jax", "flax", "mujoco", "mujoco-mjx", "brax", "gymnasium"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@functools.lru_cache(maxsize=1)
def git_commit() -> str:
    """Commit of the checkout that this file is in, '+dirty' where changed, or 'unknown'."""
    root = Path(__file__).resolve().parents[2]

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
        metadata: at least dataset_name, env, layout, reward_kind, episode_length. Schema,
            counts, sha256, versions, commit and date are added here.
        compressed: deflate; saves little, reads slower and cannot be memory-mapped.

    Returns: the path. The old file stays whole until the new one is complete on disk.
    Raises: InputError where the data breaks the contract or the disk refuses.
    """
    path = Path(path)
    check_suffix(path)
    made = (*EPISODE_KEYS, METADATA)  # those of a file that was read, to be made anew
    arrays = {key: np.asarray(value) for key, value in arrays.items() if value is not None and key not in made}
    check_names(path, [*arrays, *made])
    arrays.update(_episode_arrays(arrays, path))
    check_shapes({key: (array.shape, array.dtype) for key, array in arrays.items()}, path)
    check_columns(arrays, path)  # before anything is computed of them
    full = {**METADATA_DEFAULTS, **metadata}
    returns = arrays["episode_returns"].astype(np.float64)
    full.update(
        schema=SCHEMA,
        schema_version=SCHEMA_VERSION,
        num_transitions=len(arrays["terminals"]),
        num_episodes=len(returns),
        mean_return=float(returns.mean()),
        std_return=float(returns.std()),
        versions=versions(),
        git_commit=git_commit(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        sha256={},
    )
    full = json.loads(_to_json(full, path))  # as a reader will see it
    check_metadata(full, path)
    check_structure(arrays, full, path)
    full["sha256"] = {key: sha256(array) for key, array in arrays.items()}
    write_npz(path, {**arrays, METADATA: np.array(_to_json(full, path))}, compressed)
    return path


def _episode_arrays(arrays: Mapping[str, np.ndarray], path: Any) -> dict[str, np.ndarray]:
    for key in ("terminals", "timeouts", "rewards"):
        if key not in arrays or arrays[key].ndim != 1:
            remedy = "give one value per transition: docs/buffer.md"
            raise fail(path, key, "is missing or not of shape (N,)", remedy)
    terminals, timeouts, rewards = (arrays[k] for k in ("terminals", "timeouts", "rewards"))
    if len({len(terminals), len(timeouts), len(rewards)}) > 1:
        problem = f"lengths {len(terminals)}, {len(timeouts)}, {len(rewards)} disagree"
        raise fail(path, "terminals, timeouts, rewards", problem, "give one value per transition")
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
        raise fail(path, METADATA, f"cannot be written ({error})", remedy) from None
