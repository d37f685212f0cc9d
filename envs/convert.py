"""Data of other projects in and out: D4RL, Minari and OGBench files <-> buffer files.

    from envs import convert

    convert.from_d4rl("hopper_medium-v2.hdf5")            -> data/hopper-medium-v2.npz
    convert.from_minari("mujoco/hopper/medium-v0", task="hopper")
    convert.from_ogbench("antmaze-large-navigate-v0.npz")
    convert.to_minari("data/hopper-medium-v2.npz", "udg/hopper-v0")
    convert.to_ogbench("data/hopper-medium-v2.npz", "hopper-ogbench.npz")
    convert.replay_agreement("hopper_medium-v2.hdf5", env)

Each dialect is one file, envs/convert_<name>.py, that knows its traps; docs/data.md lists them.
What all have in common is here: labels, actions, the check against the physics, writing. A row
whose true successor is unknown is dropped and counted, never given a made-up one.
"""

import argparse
import contextlib
import hashlib
import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from envs import buffers, convert_physics
from envs.buffers import _fail as fail
from envs.convert_physics import describe_checks, replay_agreement
from envs.errors import InputError
from envs.tasks import Task
from envs.tasks import task as find_task

PACKAGES = {"h5py": "h5py", "minari": "minari[hdf5]", "pyarrow": "pyarrow"}  # import name -> what pip calls it
EXTRA = "udg_metadata_json"  # where files of other formats keep the metadata of a buffer
CLIPPED_SHARE = 0.01  # more rows than this beyond [-1, 1] are another scale, not rounding


__all__ = [
    "describe_checks", "from_d4rl", "from_minari", "from_ogbench", "replay_agreement", "to_minari", "to_ogbench",
]  # fmt: skip


class Imported(NamedTuple):
    """What a dialect makes of a file.

    arrays: columns of docs/buffer.md; metadata: what the dialect knows of it;
    state: (qpos (N, nq), qvel (N, nv)) before each step, float64, or None;
    notes: what a user should know, one sentence each; source: the file, for messages.
    """

    arrays: dict[str, np.ndarray]
    metadata: dict[str, Any]
    state: tuple[np.ndarray, np.ndarray] | None
    notes: list[str]
    source: str


# --- what the dialects share ---------------------------------------------------------------------


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


def same_rows(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Where two columns (N, S) hold the same row up to what a buffer allows: (N,) bool."""
    return (np.abs(left - right) <= 1e-4 * (1.0 + np.abs(right))).all(axis=1)


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
    if known is None or abs(dt - known) < 1e-9:
        return []
    return [f"a step of '{world}' takes {known} s, not {dt} s as asked for: its physics are others"]


def extra_columns(buffer: buffers.Buffer) -> dict[str, np.ndarray]:
    """The columns of a buffer beyond the required ones, as other formats have no place for them."""
    known = (*buffers.REQUIRED, *buffers.EPISODE_KEYS)
    return {key: np.asarray(value) for key, value in buffer.arrays.items() if key not in known}


def portable_metadata(buffer: buffers.Buffer) -> dict[str, Any]:
    """A buffer's metadata without what `save` computes again, and the names of its further columns."""
    made = ("schema", "schema_version", "num_transitions", "num_episodes", "mean_return", "std_return")
    made += ("versions", "git_commit", "created", "sha256")
    metadata = {key: value for key, value in buffer.metadata.items() if key not in made}
    return {**metadata, "carried": sorted(extra_columns(buffer))}


def own_metadata(source: Any, text: str) -> tuple[dict[str, Any], list[str]]:
    """What `portable_metadata` and `extra_columns` left in a file of another format: -> metadata, column names."""
    metadata = buffers._parse_metadata(source, text)
    carried = metadata.pop("carried", None)
    for key, kind in buffers.METADATA_TYPES.items():
        if not isinstance(metadata.get(key, kind() if isinstance(kind, type) else kind[0]()), kind):
            raise fail(source, f"{EXTRA}[{key!r}]", "has a wrong type", "write the file again with envs.convert")
    for key, value in {"carried": carried, "notes": metadata.get("notes", [])}.items():
        if not isinstance(value, list):
            raise fail(source, f"{EXTRA}[{key!r}]", "is not a list", "write the file again with envs.convert")
    metadata.pop("parents", None)
    return metadata, [str(key) for key in carried if str(key) not in buffers.REQUIRED]


# --- in ------------------------------------------------------------------------------------------


def _seconds(task: str | None, dt: float | None) -> float | None:
    """Seconds per step: as given, else of a task that is named, else left to the file."""
    return find_task(task).dt if dt is None and task is not None else dt


def from_d4rl(path, out=None, *, name=None, task=None, dt=None, episode_length=None, **choices) -> Path:
    """Convert a D4RL hdf5 file.

    Args:
        path: the file. out: buffer file to write, by default data/<name>.npz.
        name: D4RL's name of the set, e.g. "hopper-medium-v2"; by default from the file's name.
        task: name of the task the rewards belong to, where the file does not say it.
        dt, episode_length: seconds per step, steps of an episode: for sets this project does not
            know, and to override.
        choices: of `write`.

    Returns: the path written. Raises: InputError naming file, key and remedy.
    """
    from envs import convert_d4rl

    return write(convert_d4rl.read(path, name, _seconds(task, dt), episode_length), out, task=task, **choices)


def from_minari(dataset_id, out=None, *, keys=None, task=None, dt=None, episode_length=None, **choices) -> Path:
    """Convert a Minari data set that is on this machine.

    Args:
        dataset_id: Minari's id, e.g. "mujoco/hopper/medium-v0".
        keys: parts of a Dict observation to put together, in this order.
        out, task, dt, episode_length, choices: as in `from_d4rl`.
    """
    from envs import convert_minari

    return write(convert_minari.read(dataset_id, keys, _seconds(task, dt), episode_length), out, task=task, **choices)


def from_ogbench(path, out=None, *, task=None, dt=None, episode_length=None, **choices) -> Path:
    """Convert an OGBench npz file, or one that `to_ogbench` wrote. Arguments as in `from_d4rl`."""
    from envs import convert_ogbench

    return write(convert_ogbench.read(path, _seconds(task, dt), episode_length), out, task=task, **choices)


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
        env = convert_physics.find_env(known)
    if replay and env is not None:
        metadata["replay_agreement"] = convert_physics.measure(
            arrays, found.state, env, metadata["layout"], found.source
        )
    buffers.save(out, arrays, metadata)
    for line in [*(f"note: {note}" for note in notes), *describe_checks(metadata)]:
        print(line)
    buffers.load(out)
    return out


def _label(found: Imported, metadata: dict[str, Any], task: str | None) -> Task | None:
    """Write the task's labels into the metadata; -> the task, None where the project has none."""
    name = task or metadata["task"]
    if name is None:
        return None
    try:
        known = find_task(name, **({} if task else metadata.get("task_options", {})))
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
    beyond = (np.abs(actions) > buffers.ACTION_LIMIT).any(axis=1)
    if beyond.mean() > CLIPPED_SHARE:
        problem = f"reach {np.abs(actions).max():.3g}, {100 * beyond.mean():.0f} % of the rows are outside [-1, 1]"
        raise fail(found.source, "actions", problem, "divide them by the environment's action limit first")
    if beyond.any():
        notes.append(f"actions of {int(beyond.sum())} rows were outside [-1, 1] and are clipped")
    return np.clip(actions, -1.0, 1.0)


# --- out -----------------------------------------------------------------------------------------


def to_minari(path, dataset_id: str) -> str:
    """Make a local Minari data set of a buffer file; -> its id. InputError where the id is taken."""
    from envs import convert_minari

    convert_minari.write(buffers.load(path, quiet=True), dataset_id)
    print(f"wrote {dataset_id}: minari.load_dataset({dataset_id!r})")
    return dataset_id


def to_ogbench(path, out, *, force: bool = False) -> Path:
    """Write a buffer file in OGBench's layout; -> the path. InputError where `out` exists."""
    from envs import convert_ogbench

    out = Path(out)
    if out.exists() and not force:
        raise fail(out, "file", "exists already", "name another file, or allow it with --force")
    convert_ogbench.write(buffers.load(path, quiet=True), out)
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return out


# --- command line --------------------------------------------------------------------------------


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add from-d4rl, from-minari, from-ogbench, to-minari, to-ogbench to the command line of buffers."""
    readers = {
        "from-d4rl": ("file", "a D4RL .hdf5 file", from_d4rl),
        "from-minari": ("id", "id of a local Minari data set, e.g. mujoco/hopper/medium-v0", from_minari),
        "from-ogbench": ("file", "an OGBench .npz file", from_ogbench),
    }
    for command, (what, text, function) in readers.items():
        parser = commands.add_parser(command, help=f"convert {text.split(',')[0]} to a buffer file")
        parser.add_argument("source", metavar=what.upper(), help=text)
        parser.add_argument("--out", help="file to write; default data/<name>.npz")
        parser.add_argument("--task", help="task the rewards belong to, where the file does not say it")
        parser.add_argument("--dt", type=float, help="seconds per step, where the set is not known")
        parser.add_argument("--episode-length", type=int, help="steps after which an episode is cut")
        parser.add_argument("--force", action="store_true", help="overwrite an existing file")
        parser.add_argument(
            "--no-replay", dest="replay", action="store_false", help="skip the check against the physics"
        )
        parser.set_defaults(function=function)
    commands.choices["from-d4rl"].add_argument("--name", help="D4RL's name of the set, e.g. hopper-medium-v2")
    commands.choices["from-minari"].add_argument(
        "--keys", type=lambda text: text.split(","), help="parts of a Dict observation, joined by commas, in order"
    )
    parser = commands.add_parser("to-minari", help="make a local Minari data set of a buffer file")
    parser.add_argument("path", metavar="FILE", help="a buffer file")
    parser.add_argument("dataset_id", metavar="ID", help="id of the new data set, e.g. udg/ant-v0")
    parser.set_defaults(function=to_minari)
    parser = commands.add_parser("to-ogbench", help="write a buffer file in OGBench's layout")
    parser.add_argument("path", metavar="FILE", help="a buffer file")
    parser.add_argument("out", metavar="OUT", help="the .npz file to write")
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")
    parser.set_defaults(function=to_ogbench)


def run_command(args: argparse.Namespace) -> None:
    """Run one of the commands of `add_commands`. Raises InputError."""
    flags = {key: value for key, value in vars(args).items() if key not in ("command", "function", "source")}
    positional = [args.source] if "source" in args else []
    out = args.function(*positional, **flags)
    if positional:
        print(f"wrote {os.fspath(out)}; look at it: python -m envs.buffers inspect {os.fspath(out)}")
