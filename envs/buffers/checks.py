"""Checks of a buffer against docs/buffer.md: keys, shapes, values, episodes, metadata."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from envs.buffers.fields import (
    ACTION_LIMIT,
    COLUMNS,
    EPISODE_KEYS,
    EXTRA_DTYPES,
    LARGEST,
    LARGEST_RAW,
    LARGEST_VALUE,
    LAYOUTS,
    METADATA,
    METADATA_TYPES,
    NAMED_COLUMNS,
    REQUIRED,
    REWARD_KINDS,
    SAMPLED_ROWS,
    SCHEMA,
    SCHEMA_VERSION,
    fail,
)  # fmt: skip
from envs.buffers.files import row_blocks
from envs.errors import InputError


def check_schema(metadata: Mapping[str, Any], path: Any) -> None:
    if metadata.get("schema") != SCHEMA:
        problem = f"schema is {metadata.get('schema')!r}, expected {SCHEMA!r}"
        raise fail(path, METADATA, problem, "write the arrays with envs.buffers.save")
    version = metadata.get("schema_version")
    if isinstance(version, bool) or version != SCHEMA_VERSION:
        problem = f"schema_version is {version!r}, this code reads {SCHEMA_VERSION}"
        raise fail(path, METADATA, problem, "use the udg-jax release that wrote the file")


def check_metadata(metadata: Mapping[str, Any], path: Any) -> None:
    """Presence, types and ranges of the metadata that readers rely on."""
    for key, kind in METADATA_TYPES.items():
        if key not in metadata:
            raise fail(path, f"{METADATA}[{key!r}]", "is missing", "add it: docs/buffer.md")
        value = metadata[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            problem = f"is {str(value)[:60]!r} ({type(value).__name__})"
            raise fail(path, f"{METADATA}[{key!r}]", problem, "see docs/buffer.md for its type")
        if isinstance(value, str) and not value.isprintable():  # it ends up in messages, titles and file names
            remedy = "write it without control characters"
            raise fail(path, f"{METADATA}[{key!r}]", f"is {value[:60]!a}", remedy)
    for name, value in metadata["task_options"].items():
        if not isinstance(value, (int, float)) or not -LARGEST < value < LARGEST:
            problem, remedy = f"{name!a} is {str(value)[:60]!a}", "options are numbers, true or false"
            raise fail(path, f"{METADATA}['task_options']", problem, remedy)
    if not all(isinstance(parent, dict) for parent in metadata["parents"]):
        remedy = "write a list of objects with path and sha256"
        raise fail(path, f"{METADATA}['parents']", "is not a list of objects", remedy)
    if not isinstance(metadata.get("rows_dropped", {}), dict):
        remedy = "write an object: reason -> number of rows"
        raise fail(path, f"{METADATA}['rows_dropped']", "is not an object", remedy)
    allowed = {"layout": LAYOUTS, "reward_kind": REWARD_KINDS}
    for key, values in allowed.items():
        if metadata[key] not in values:
            problem = f"is {metadata[key]!r}"
            raise fail(path, f"{METADATA}[{key!r}]", problem, f"use one of {', '.join(values)}")
    for key in ("dt", "episode_length"):
        if metadata[key] is not None and not 0 < metadata[key] < LARGEST:
            problem = f"is {str(metadata[key])[:60]}"
            raise fail(path, f"{METADATA}[{key!r}]", problem, "give a positive number")
    if (told := metadata.get("reference")) is not None:
        numbers = isinstance(told, list) and all(type(x) in (int, float) and abs(x) < LARGEST for x in told)
        if not numbers or len(told) != 2 or told[0] == told[1]:
            remedy = "write [random, expert], two different returns, or null"
            raise fail(path, f"{METADATA}['reference']", f"is {str(told)[:60]!a}", remedy)
    warmup = metadata["warmup_transitions"]
    if warmup is not None and not 0 <= warmup <= metadata["num_transitions"]:
        problem = f"is {warmup} of {metadata['num_transitions']} transitions"
        raise fail(path, f"{METADATA}['warmup_transitions']", problem, "count the first rows")


def check_shapes(shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]], path: Any) -> None:
    """Keys, dtypes, ranks and equal lengths, from (shape, dtype) alone."""
    for key in (*REQUIRED, *EPISODE_KEYS):
        if key not in shapes:
            remedy = "add it: docs/buffer.md says what it holds"
            raise fail(path, key, f"is missing; the file holds {', '.join(shapes)}", remedy)
    sizes: dict[Any, Any] = {}
    for key, (shape, dtype) in shapes.items():
        expected, row = _expected(key, shape)
        if dtype not in expected:
            names = " or ".join(np.dtype(kind).name for kind in expected)
            remedy = f"convert it before saving: array.astype(np.{names.split()[0]})"
            raise fail(path, key, f"is {dtype}, expected {names}", remedy)
        rows = "E" if key in EPISODE_KEYS else "N"
        if len(shape) != 1 + len(row):
            want = ", ".join(str(n) for n in (rows, *row))
            problem = f"has the shape {shape}, expected ({want})"
            raise fail(path, key, problem, "squeeze or reshape it before saving")
        if key in EPISODE_KEYS and 0 in shape:
            raise fail(path, "timeouts", "no row ends an episode", "set timeouts[-1] = True")
        if 0 in shape:
            raise fail(path, key, f"is empty: shape {shape}", "give at least one transition")
        for name, size in zip((rows, *row), shape, strict=True):
            known, source = sizes.setdefault(name, (name if isinstance(name, int) else size, key))
            if size != known:
                problem = f"has the shape {shape}, but {name} is {known} (from {source})"
                raise fail(path, key, problem, "all arrays must describe the same transitions")


def _expected(key: str, shape: tuple[int, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Allowed dtypes and row shape of a key; unknown columns may have any row shape."""
    if key in COLUMNS:
        dtype, row = COLUMNS[key]
        return (dtype,), row
    if key in EPISODE_KEYS:
        return (EPISODE_KEYS[key],), ()
    return EXTRA_DTYPES, tuple(f"{key}:{i}" for i in range(1, len(shape)))


def _check_column(key: str, array: np.ndarray, path: Any) -> None:
    """Values of one array: finite, actions in [-1, 1], flags 0 or 1, ids not negative."""
    for start, block in row_blocks(array):
        if array.dtype == np.bool_:
            block = block.view(np.uint8)
            bad, remedy = block > 1, "a bool is the byte 0 or 1: write array != 0"
        elif array.dtype == np.float32:
            bad, remedy = ~np.isfinite(block), "values must be finite: find where it was recorded"
        else:
            bad = block < 0 if key == "policy_ids" else np.zeros(1, bool)
            remedy = "number the policies from 0, or leave the column out"
        if bad.any():
            row = int(np.argmax(bad.reshape(len(block), -1).any(axis=1)))
            raise fail(path, key, f"row {start + row} is {np.array2string(block[row], threshold=8)}", remedy)
        if array.dtype == np.float32 and np.abs(block).max() > LARGEST_VALUE:
            row, column = divmod(int(np.argmax(np.abs(block))), max(1, block[0].size))
            problem = f"row {start + row} has {block.ravel()[np.argmax(np.abs(block))]:.3g}"
            problem += f" in column {column}" if block[0].size > 1 else ""
            remedy = "no network learns from such numbers, whose squares overflow: scale that column, or leave it out"
            raise fail(path, key, problem, remedy)
        if key == "actions" and (np.abs(block) > ACTION_LIMIT).any():
            row = start + int(np.argmax((np.abs(block) > ACTION_LIMIT).any(axis=1)))
            problem = f"row {row} has |a| = {np.abs(array[row]).max():.6g}, beyond 1"
            raise fail(path, key, problem, "store what the environment received, in [-1, 1]")


def _check_episodes(arrays: Mapping[str, np.ndarray], path: Any) -> None:
    """Flags exclusive, last row ends an episode, the episode arrays agree with the flags."""
    terminals, timeouts = arrays["terminals"], arrays["timeouts"]
    both = np.flatnonzero(terminals & timeouts)
    if len(both):
        problem = f"row {both[0]} has both flags"
        remedy = "a timeout is a cut without termination: clear it where terminals is true"
        raise fail(path, "terminals and timeouts", problem, remedy)
    ends = np.flatnonzero(terminals | timeouts) + 1
    if not len(ends) or ends[-1] != len(terminals):
        problem = "the last row does not end an episode"
        raise fail(path, "timeouts", problem, "set timeouts[-1] = True or drop the open episode")
    if not np.array_equal(arrays["episode_ends"], ends):
        problem = f"disagrees with the flags, which end {len(ends)} episodes"
        raise fail(path, "episode_ends", problem, "np.flatnonzero(terminals | timeouts) + 1")
    if not np.array_equal(arrays["episode_lengths"], np.diff(ends, prepend=0)):
        problem = "disagrees with episode_ends"
        raise fail(path, "episode_lengths", problem, "np.diff(episode_ends, prepend=0)")
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
            raise fail(path, "episode_returns", problem, "save the file with envs.buffers.save")


def _check_successors(arrays: Mapping[str, np.ndarray], path: Any) -> None:
    """next_observations[i] = observations[i + 1] inside an episode, on a sample of the rows."""
    count = len(arrays["terminals"])
    if count <= SAMPLED_ROWS:
        rows = np.arange(count)
    else:
        rows = np.sort(np.random.default_rng(0).integers(0, count, SAMPLED_ROWS))
    inside = rows[~(arrays["terminals"][rows] | arrays["timeouts"][rows])]
    following = arrays["observations"][inside + 1]
    error = np.abs(arrays["next_observations"][inside] - following)
    wrong = (error > 1e-4 * (1.0 + np.abs(following))).any(axis=1)
    if wrong.any():
        problem = f"row {inside[np.argmax(wrong)]} is not the observation of the next row"
        remedy = "keep the rows of an episode in order and flag every end in terminals or timeouts"
        raise fail(path, "next_observations", problem, remedy)


def check_columns(arrays: Mapping[str, np.ndarray], path: Any, unchecked: tuple[str, ...] = ()) -> None:
    """The values of every column by itself."""
    for key, array in arrays.items():
        if key not in unchecked:
            _check_column(key, array, path)


def check_structure(
    arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any], path: Any, unchecked: tuple[str, ...] = ()
) -> None:
    """Episodes, successors and counts, which tie the columns together."""
    _check_episodes(arrays, path)
    if {"observations", "next_observations"} <= arrays.keys() - set(unchecked):
        _check_successors(arrays, path)
    counts = {"num_transitions": "terminals", "num_episodes": "episode_ends"}
    for name, key in counts.items():
        if metadata[name] != len(arrays[key]):
            problem = f"is {metadata[name]}, but {key} has {len(arrays[key])} rows"
            remedy = "the file was put together from two: make it again"
            raise fail(path, f"{METADATA}[{name!r}]", problem, remedy)


def check_raw_columns(observations: np.ndarray, scaled: Any, flag: str) -> None:
    """InputError where columns of observations (N, S) pass 1e4 and are not scaled: no network learns from them then.

    scaled: all of them, or which (S,) bool; flag: of a learner, that scales all.
    """
    most = np.maximum(-observations.min(0), observations.max(0))
    far = np.flatnonzero((most > LARGEST_RAW) & ~np.asarray(scaled))
    if len(far):
        numbers = f"{far[:NAMED_COLUMNS].tolist()}{' and others' * (len(far) > NAMED_COLUMNS)}"
        problem = f"columns {numbers} of the observations pass {LARGEST_RAW:g}, up to {most[far].max():.3g}"
        raise InputError(f"--dataset: {problem}; try {flag}, or scale these columns or leave them out of the data")


def check_raw_rewards(rewards: np.ndarray, gamma: float, bound: float, remedy: str) -> None:
    """InputError where rewards (N,) as they are would carry Q beyond `bound` (0: none), discounted by gamma < 1."""
    size = float(np.abs(rewards, dtype=np.float64).mean())
    if bound and gamma < 1 and size / (1 - gamma) > bound:
        worth = f"their mean size {size:.3g}, paid for ever, is worth {size / (1 - gamma):.3g}"
        raise InputError(f"--dataset: rewards: {worth}, beyond --q-bound {bound:g}; {remedy}, or raise --q-bound")


def validate(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any], path: Any) -> None:
    """Check a complete buffer in memory against docs/buffer.md; `path` names it in errors."""
    check_schema(metadata, path)
    check_shapes({key: (a.shape, a.dtype) for key, a in arrays.items()}, path)
    check_metadata(metadata, path)
    check_columns(arrays, path)
    check_structure(arrays, metadata, path)
