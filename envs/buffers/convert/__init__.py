"""Data of other projects in and out: D4RL, Minari and OGBench files <-> buffer files.

    from envs.buffers import convert

    convert.from_arrays("mine.npz", task="hopper")        -> data/mine.npz
    convert.from_d4rl("hopper_medium-v2.hdf5")            -> data/hopper-medium-v2.npz
    convert.from_minari("mujoco/hopper/medium-v0", task="hopper")
    convert.from_ogbench("antmaze-large-navigate-v0.npz")
    convert.from_exorl("datasets/walker/proto/buffer")
    convert.to_minari("data/hopper-medium-v2.npz", "udg/hopper-v0")
    convert.to_ogbench("data/hopper-medium-v2.npz", "hopper-ogbench.npz")
    convert.replay_agreement("hopper_medium-v2.hdf5", env)

Each dialect is one module that knows its traps; docs/data.md lists them. A row whose true successor is unknown is
dropped and counted, never given a made-up one.
"""

from pathlib import Path

from envs.buffers.convert import arrays, d4rl, exorl, minari, ogbench
from envs.buffers.convert.common import Imported, Problems, runs
from envs.buffers.convert.physics import describe_checks, replay_agreement
from envs.buffers.convert.write import check_out, write
from envs.buffers.fields import fail
from envs.buffers.reading import load
from envs.worlds import is_own
from envs.worlds import task as find_task

__all__ = [
    "describe_checks", "from_arrays", "from_d4rl", "from_exorl", "from_minari", "from_ogbench", "replay_agreement",
    "runs", "to_minari", "to_ogbench", "write",
]  # fmt: skip


def _seconds(task: str | None, dt: float | None) -> float | None:
    """Seconds per step: as given, else of a task that is named, else left to the file."""
    return find_task(task).dt if dt is None and task is not None else dt


def _as_long(found: Imported, task: str | None, episode_length: int | None) -> Imported:
    """What was read, its episodes no longer than the task's unless told so: a log may be a single one."""
    if task is None or episode_length is not None:
        return found
    known = find_task(task)
    length = min(found.metadata["episode_length"], max(known.episode_length, known.eval_length))
    return found._replace(metadata=found.metadata | {"episode_length": length})


def from_arrays(
    source, out=None, *, name=None, task=None, dt=None, episode_length=None, force=False, **choices
) -> Path:
    """Make a buffer file of plain arrays.

    Args:
        source: a dict of arrays, or the path of an npz file, with observations (N, S), actions (N, A) in [-1, 1],
            rewards (N,) and terminals (N,) of rows in the order of time, in any dtype; and, where there are some,
            timeouts (N,), next_observations (N, S) and the optional columns of docs/buffer.md. Gymnasium's words
            `terminations` and `truncations` do, too.
        out: buffer file to write, by default data/<name>.npz. name: of the data; by default the file's.
        task: name of the task the rewards belong to, if this project has one. Without it the buffer is valid, and
            learners train on it, but cannot evaluate.
        dt, episode_length: seconds per step, which may stay unknown; steps after which an episode is cut: a terminal
            on that step is the time limit, unless the task says that it ends there.
        force: overwrite `out`. choices: clip, action_limit, replay of `write`.

    Returns: the path written. Raises: InputError, one for all problems.
    """
    path, found, digest = arrays.open_source(source)
    name = name or (Path(path).stem if digest else "arrays")
    problems, known = Problems(path), None
    with problems.gather():
        check_out(out, name, force)
    with problems.gather():
        known = None if task is None else find_task(task)
    scale = {key: choices[key] for key in ("clip", "action_limit") if key in choices}
    imported = arrays.read(path, problems, found, digest, name, known, dt, episode_length, **scale)
    problems.raise_all()
    return write(_as_long(imported, task, episode_length), out, task=task, force=force, **choices)


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
    return write(d4rl.read(path, name, _seconds(task, dt), episode_length), out, task=task, **choices)


def from_minari(dataset_id, out=None, *, keys=None, task=None, dt=None, episode_length=None, **choices) -> Path:
    """Convert a Minari data set that is on this machine.

    Args:
        dataset_id: Minari's id, e.g. "mujoco/hopper/medium-v0".
        keys: parts of a Dict observation to put together, in this order.
        out, task, dt, episode_length, choices: as in `from_d4rl`.
    """
    own = task is not None and is_own(task)  # a world whose steps may have no known length: the set's come first
    seconds = dt if own else _seconds(task, dt)
    found = minari.read(dataset_id, keys, seconds, episode_length, _seconds(task, dt))
    return write(_as_long(found, task, episode_length), out, task=task, **choices)


def from_ogbench(path, out=None, *, task=None, dt=None, episode_length=None, **choices) -> Path:
    """Convert an OGBench npz file, or one that `to_ogbench` wrote. Arguments as in `from_d4rl`."""
    found = ogbench.read(path, _seconds(task, dt), episode_length)
    return write(_as_long(found, task, episode_length), out, task=task, **choices)


def from_exorl(folder, out=None, *, name=None, task=None, dt=None, episode_length=None, **choices) -> Path:
    """Convert a folder of ExORL's or URLB's episodes.

    name: of the set, by default the last two folders' without `buffer`, e.g. walker-proto. Others as in `from_d4rl`.
    """
    found = exorl.read(folder, name, _seconds(task, dt), episode_length)
    return write(_as_long(found, task, episode_length), out, task=task, **choices)


def to_minari(path, dataset_id: str) -> str:
    """Make a local Minari data set of a buffer file; -> its id. InputError where the id is taken."""
    minari.write(load(path, quiet=True), dataset_id)
    print(f"wrote {dataset_id}: minari.load_dataset({dataset_id!r})")
    return dataset_id


def to_ogbench(path, out, *, force: bool = False) -> Path:
    """Write a buffer file in OGBench's layout; -> the path. InputError where `out` exists."""
    out = Path(out)
    if out.exists() and not force:
        raise fail(out, "file", "exists already", "name another file, or allow it with --force")
    ogbench.write(load(path, quiet=True), out)
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return out
