"""D4RL's hdf5 files: flat arrays of N rows, in several dialects that differ in what is missing.

Where a file has `next_observations` (v1 and v2 of the locomotion sets) every row keeps its own.
Where it has none (v0, AntMaze) the successor is the next row, and the last row of each trajectory
has none: it is dropped and counted, for the row behind it is a reset. In AntMaze a terminal marks
the goal and the robot walks on, so that trajectories end at timeouts only.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from envs.buffers.convert import common
from envs.buffers.fields import BOMB_BYTES, BOMB_RATIO
from envs.buffers.files import check_fits, check_is_file
from envs.maze import MAPS
from envs.tasks import D4RL as LOCOMOTION
from envs.worlds import task as find_task

GOAL_RADIUS = 0.5  # AntMaze pays 1 within this distance, in metres
MAX_STEP = 2.0  # metres; the ant's torso cannot move this far in one step, a reset can
MAX_JERK = 10.0  # m/s or rad/s; no contact moves a joint so much faster than its speeds around the step say
CLIPPED_SPEED = 10.0  # a speed shown like this may be any greater one
START_NOISE = 0.006  # of every joint and speed at the start of an episode
UNMARKED_SHARE = 0.1  # more unmarked breaks than this: the rows are in no order
AGREEMENT = 0.99  # of the rewards with the velocity in infos/qpos, for root columns to be written


class Family(NamedTuple):
    """One robot of D4RL: its task here (None: there is none), sizes, and constants of its reward."""

    task: str | None
    env: str
    sizes: tuple[int, int]  # of an observation and an action; zeros: any
    dt: float
    episode_length: int
    reference: tuple[float, float] | None  # D4RL's (random, expert) returns
    num_qpos: int = 0  # planar robots: observations are qpos without x, then as many qvel
    ctrl_cost: float = 0.0
    survive_bonus: float = 0.0
    start_z: float | None = None  # episodes start within START_NOISE of this height, upright and at rest
    maze: bool = False  # observations begin with x, y; terminals mark the goal and end nothing


def _family(name: str, **fields) -> Family:
    """A family with a task in this project. Data are cut at 1000 steps, also where the task ends sooner."""
    task = find_task(name)
    sizes = task.observation_size, task.action_size
    return Family(name, task.env, sizes, task.dt, 1000, task.reference, **fields)


START_Z = {"hopper": 1.25, "walker2d": 1.25}
FAMILIES = {
    **{
        name: _family(
            name,
            num_qpos=(find_task(name).observation_size + 1) // 2,
            ctrl_cost=cost,
            survive_bonus=bonus,
            start_z=START_Z.get(name),
        )
        for name, (_, cost, bonus, _) in LOCOMOTION.items()
    },
    **{f"antmaze-{maze}": _family(f"ant-maze-{maze}", maze=True) for maze in MAPS},
    "ant": Family(None, "d4rl-ant", (111, 8), 0.05, 1000, (-325.6, 3879.7)),
}
LEVELS = "random-expert|random|medium-expert|medium-replay|full-replay|mixed|medium|expert"
FILE_MAZES = {"u": "umaze", "big": "medium", "hardest": "large"}  # what file names call them


# --- names ---------------------------------------------------------------------------------------


def dataset_name(path: Any, name: str | None = None) -> str:
    """D4RL's name of a set from a name, or from a file's name; other names are kept as they are.

    File names of v0 carry no version, call medium-replay "mixed" and walker2d "walker"; AntMaze's
    spell out how starts and goals were drawn, and end in "_fixed" from v2 on.
    """
    text = (name or Path(path).stem).lower().replace("_", "-")
    found = re.fullmatch(rf"(halfcheetah|hopper|walker2d|walker|ant)-({LEVELS})(-v\d+)?", text)
    if found:
        robot, level, version = found.groups()
        robot, level = {"walker": "walker2d"}.get(robot, robot), {"mixed": "medium-replay"}.get(level, level)
        return f"{robot}-{level}{version or '-v0'}"
    found = re.fullmatch(
        r"ant-maze-(u|big|hardest)-maze-noisy-multistart-(true|false)-multigoal-(true|false)-sparse(-fixed)?", text
    )
    if found:
        maze, starts, goals, fixed = found.groups()
        kind = "diverse" if goals == "true" else "play" if starts == "true" else ""
        return f"antmaze-{FILE_MAZES[maze]}{'-' * bool(kind)}{kind}-{'v2' if fixed else 'v0'}"
    return text


def _find_family(path: Any, name: str, dt: float | None, episode_length: int | None) -> Family:
    """The family of a set; of an unknown one what the caller says. InputError where that lacks."""
    for key in sorted(FAMILIES, key=len, reverse=True):  # antmaze before ant
        if re.match(rf"{key}-", name):
            known = FAMILIES[key]
            return known._replace(dt=dt or known.dt, episode_length=episode_length or known.episode_length)
    if dt is None or episode_length is None:
        problem = f"'{name}' is no set that is known here ({', '.join(FAMILIES)})"
        raise common.fail(
            path, "name", problem, "give D4RL's name with --name, or --dt SECONDS and --episode-length STEPS"
        )
    return Family(None, f"d4rl/{name}", (0, 0), dt, episode_length, None)


# --- reading the file ----------------------------------------------------------------------------


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


def _read_arrays(path: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
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


# --- trajectories --------------------------------------------------------------------------------


def _count_cuts(hard: np.ndarray, limit: int) -> np.ndarray:
    """Rows (N,) that are the limit-th after a hard end, twice the limit-th, and so on."""
    rows = np.arange(len(hard))
    starts = np.concatenate([[0], np.flatnonzero(hard) + 1])
    step = rows - starts[np.searchsorted(starts, rows, side="right") - 1]
    return step % limit == limit - 1


def _breaks(observations: np.ndarray, family: Family) -> np.ndarray:
    """Rows (N,) whose next row no step can reach: ends that no flag marks.

    Mazes: the torso jumps. Planar robots: the next row is a start of an episode, or a joint moved
    much faster than its speeds before and after the step. Other robots: unknown, so none.
    """
    found = np.zeros(len(observations), bool)
    if family.maze:
        found[:-1] = np.linalg.norm(np.diff(observations[:, :2], axis=0), axis=1) > MAX_STEP
    elif family.num_qpos:
        pose, speed = observations[:, : family.num_qpos - 1], observations[:, family.num_qpos :]
        jerk = np.abs(np.diff(pose, axis=0) / family.dt - 0.5 * (speed[1:] + speed[:-1]))
        jerk -= 0.5 * np.abs(np.diff(speed, axis=0)) + MAX_JERK
        shown = np.ones_like(speed, bool) if family.start_z is None else np.abs(speed) < CLIPPED_SPEED
        found[:-1] = ((jerk > 0) & shown[1:] & shown[:-1]).any(axis=1)
        if family.start_z is not None:
            rest = observations.copy()
            rest[:, 0] -= family.start_z
            found[:-1] |= (np.abs(rest[1:]) <= START_NOISE).all(axis=1)
    return found


class _Cut(NamedTuple):
    """Where trajectories end. All (N,) bool: ends; valid: rows with a true successor."""

    ends: np.ndarray
    valid: np.ndarray
    next_observations: np.ndarray
    rows_dropped: dict[str, int]


def _cut(path: Any, arrays: dict[str, np.ndarray], family: Family, notes: list[str]) -> _Cut:
    """Cut the rows into trajectories and find each row's true successor."""
    observations, terminals = arrays["observations"], arrays["terminals"]
    following = np.roll(observations, -1, axis=0)
    hard = np.zeros(len(terminals), bool) if family.maze else terminals.copy()
    given = arrays.get("next_observations")
    if given is None:
        unmarked = _breaks(observations, family)
    else:
        unmarked = ~common.same_rows(given, following)
        unmarked[-1] = False
    if "timeouts" in arrays:
        timeouts = arrays["timeouts"]
    else:
        timeouts = _count_cuts(hard | unmarked, family.episode_length) & ~hard
        notes.append(f"the file marks no timeouts: episodes are cut after {family.episode_length} steps")
    unmarked &= ~(hard | timeouts)
    if unmarked.mean() > UNMARKED_SHARE:
        problem = f"{100 * unmarked.mean():.0f} % of the rows inside episodes are not followed by their successor"
        raise common.fail(path, "observations", problem, "rows must be in the order of time: use the original file")
    if unmarked.any():
        notes.append(f"{int(unmarked.sum())} ends of episodes carry no flag in the file: cut there")
    last = np.arange(len(terminals)) == len(terminals) - 1
    ends = hard | timeouts | unmarked | last
    if given is None:
        lost = {
            "terminal, its next observation is not in the file": ends & hard,
            "timeout, its next observation is not in the file": ends & ~hard & timeouts,
            "end without a flag, its next observation is not in the file": ends & ~hard & ~timeouts,
        }
        following[last] = observations[last]
    else:
        reset = ends & ((given == following).all(axis=1) | (given == observations).all(axis=1))
        lost = {"end of an episode, next_observations holds another state": reset}
        following = given
    valid = ~np.logical_or.reduce(list(lost.values()))
    return _Cut(ends, valid, following, {why: int(rows.sum()) for why, rows in lost.items() if rows.any()})


# --- columns -------------------------------------------------------------------------------------


def _root_planar(arrays, cut: _Cut, family: Family, notes: list[str]) -> tuple[dict[str, np.ndarray], float | None]:
    """x, z and their velocities; and the share of rewards that agree with infos/qpos.

    The velocity is solved from the reward, v = r + ctrl_cost ||a||^2 - survive_bonus: exact on
    the last row of an episode too, where the file has no position after the step, and free of
    the cancellation in float32 positions far from the start.
    """
    if "infos/qpos" not in arrays:
        return {}, None
    qpos, observations = arrays["infos/qpos"].astype(np.float64), arrays["observations"]
    joints = family.num_qpos - 1
    if (
        qpos.shape[1] != family.num_qpos
        or not common.same_rows(qpos[:, 1:], observations[:, :joints]).mean() > AGREEMENT
    ):
        notes.append("infos/qpos does not belong to the observations: no root columns (v1 files; use v2)")
        return {}, None
    cost = family.ctrl_cost * np.square(arrays["actions"], dtype=np.float64).sum(axis=1)
    speed = arrays["rewards"] + cost - family.survive_bonus
    inner = np.flatnonzero(~cut.ends)
    if not len(inner):
        return {}, None
    x, after = qpos[inner, 0], qpos[inner + 1, 0]
    rounding = 1e-3 + 2e-7 * (np.abs(x) + np.abs(after)) / family.dt
    share = float((np.abs(speed[inner] - (after - x) / family.dt) <= rounding + 1e-5 * np.abs(speed[inner])).mean())
    if share <= AGREEMENT:
        notes.append(f"rewards follow from infos/qpos in {100 * share:.0f} % of the rows only: no root columns")
        return {}, share
    rise = (cut.next_observations[:, 0].astype(np.float64) - observations[:, 0]) / family.dt
    velocities = np.stack([speed, rise], axis=1)
    return {"root_positions": qpos[:, :2].astype(np.float32), "root_velocities": velocities.astype(np.float32)}, share


def _maze_columns(arrays, cut: _Cut, family: Family, notes: list[str]) -> tuple[dict[str, np.ndarray], float | None]:
    """x, y, goals, and which trajectory a row belongs to; and the share of rewards that agree with the goals."""
    before, after = arrays["observations"][:, :2], cut.next_observations[:, :2]
    ids = np.cumsum(cut.ends) - cut.ends
    columns = {
        "root_positions": before,
        "root_velocities": ((after.astype(np.float64) - before) / family.dt).astype(np.float32),
        "trajectory_ids": ids.astype(np.int32),
    }
    paid = arrays["rewards"] > (0.5 if arrays["rewards"].min() >= 0 else -0.5)  # 0 and 1, or -1 and 0
    if np.bincount(ids, weights=paid).max() == 1:
        notes.append(
            "one row of a trajectory at most is rewarded, where other AntMaze sets reward every row at the goal "
            f"(umaze-diverse): kept as it is; udg_select.py --task {family.task} labels every row from the goals"
        )
    if "infos/goal" not in arrays:
        return columns, None
    if arrays["infos/goal"].shape[1] != 2:
        notes.append(f"infos/goal has {arrays['infos/goal'].shape[1]} numbers instead of x, y: not kept")
        return columns, None
    columns["goals"] = arrays["infos/goal"]
    there = np.linalg.norm(after - arrays["infos/goal"], axis=1) <= GOAL_RADIUS
    return columns, float((there == paid)[cut.valid].mean())


def _states_fit(observations: np.ndarray, qpos: np.ndarray, qvel: np.ndarray) -> bool:
    """Whether the states are those of their own rows: observations are qpos from x, y or z on, then clipped qvel."""
    hidden, joints = qpos.shape[1] + qvel.shape[1] - observations.shape[1], observations.shape[1] - qvel.shape[1]
    if not 0 <= hidden <= 2 or joints < 1:
        return False
    poses = common.same_rows(qpos[:, hidden:], observations[:, :joints])
    speeds = [np.clip(part, -CLIPPED_SPEED, CLIPPED_SPEED) for part in (qvel, observations[:, joints:])]
    return bool((poses & common.same_rows(*speeds)).mean() > AGREEMENT)


# --- all together --------------------------------------------------------------------------------


def read(
    path: Any, name: str | None = None, dt: float | None = None, episode_length: int | None = None
) -> common.Imported:
    """Read a D4RL file as `envs.buffers.convert.from_d4rl` says -> Imported. Raises InputError."""
    name = dataset_name(path, name)
    raw, maker = _read_arrays(path)
    family = _find_family(path, name, dt, episode_length)
    sizes = raw["observations"].shape[1], raw["actions"].shape[1]
    if family.sizes != (0, 0) and sizes != family.sizes:
        problem = f"{sizes[0]} numbers and {sizes[1]} actions, {name} has {family.sizes[0]} and {family.sizes[1]}"
        raise common.fail(path, "observations", problem, "give the right name with --name")
    notes: list[str] = []
    log_probs = raw.pop("infos/action_log_probs", None)
    state = raw.pop("infos/qvel", None)
    state = None if state is None or "infos/qpos" not in raw else (raw["infos/qpos"], state)
    speeds = None  # a checked copy; the state itself stays as exact as the file
    if state is not None:
        speeds = common.to_float32(path, "infos/qvel", state[1])
    arrays = {}
    for key, column in raw.items():
        check = common.to_flags if key in ("terminals", "timeouts") else common.to_float32
        arrays[key] = check(path, key, column)
    cut = _cut(path, arrays, family, notes)
    kept = np.flatnonzero(cut.valid)
    if not len(kept):
        raise common.fail(path, "observations", "no row has a true successor", "use a file with next_observations")
    columns, agreement = {}, None
    if family.maze:
        columns, agreement = _maze_columns(arrays, cut, family, notes)
    elif family.num_qpos:
        columns, agreement = _root_planar(arrays, cut, family, notes)
    if log_probs is not None and np.isfinite(log_probs).all():
        columns["action_log_probs"] = log_probs.astype(np.float32)
    elif log_probs is not None:
        notes.append("infos/action_log_probs is not finite everywhere: not kept")
    broken = cut.ends | ~np.roll(cut.valid, -1)  # the last row is an end, so that rolling is harmless
    columns |= {key: arrays[key] for key in ("observations", "actions", "rewards", "terminals")}
    columns |= {"next_observations": cut.next_observations, "timeouts": broken & ~arrays["terminals"]}
    metadata = {
        "dataset_name": name, "env": family.env, "task": family.task, "reward_kind": "task",
        "layout": "task" if family.task else "env", "dt": family.dt, "episode_length": family.episode_length,
        "generator": {"script": "d4rl", "flags": maker}, "reference": family.reference,
        "rows_dropped": cut.rows_dropped, "reward_agreement": agreement,
        "parents": [{"path": Path(path).name, "sha256": common.file_sha256(path), "taken": f"{len(kept)} rows"}],
    }  # fmt: skip
    if state is not None and not _states_fit(arrays["observations"], arrays["infos/qpos"], speeds):
        state = None
        if family.task:
            notes.append("infos/qpos and infos/qvel are not the states of their rows: the observations are replayed")
    if state is not None:
        state = tuple(np.asarray(part, np.float64)[kept] for part in state)
    return common.Imported({key: column[kept] for key, column in columns.items()}, metadata, state, notes, str(path))
