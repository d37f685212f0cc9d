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
from envs.buffers.convert.cut import Cut, cut
from envs.buffers.convert.hdf5 import read_columns
from envs.buffers.convert.reach import body_of
from envs.maze import MAPS
from envs.tasks import D4RL as LOCOMOTION
from envs.worlds import task as find_task

GOAL_RADIUS = 0.5  # AntMaze pays 1 within this distance, in metres
CLIPPED_SPEED = 10.0  # a speed shown like this may be any greater one
AGREEMENT = 0.99  # of the rewards with the velocity in infos/qpos, for root columns to be written


class Family(NamedTuple):
    """One robot of D4RL: its task here (None: there is none), sizes, and constants of its reward."""

    task: str | None
    env: str
    sizes: tuple[int, int]  # of an observation and an action
    dt: float | None
    episode_length: int
    reference: tuple[float, float] | None  # D4RL's (random, expert) returns
    num_qpos: int = 0  # planar robots: observations are qpos without x, then as many qvel
    ctrl_cost: float = 0.0
    survive_bonus: float = 0.0
    maze: bool = False  # observations begin with x, y; terminals mark the goal and end nothing


def _family(name: str, **fields) -> Family:
    """A family with a task in this project. Data are cut at 1000 steps, also where the task ends sooner."""
    task = find_task(name)
    sizes = task.observation_size, task.action_size
    return Family(name, task.env, sizes, task.dt, 1000, task.reference, **fields)


FAMILIES = {
    **{
        name: _family(
            name,
            num_qpos=(find_task(name).observation_size + 1) // 2,
            ctrl_cost=cost,
            survive_bonus=bonus,
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


def _find_family(path: Any, name: str, sizes: tuple[int, int], dt: float | None, episode_length: int | None) -> Family:
    """The family of a set; of an unknown one what the caller says. InputError where that lacks or does not fit."""
    key = next((key for key in sorted(FAMILIES, key=len, reverse=True) if name.startswith(f"{key}-")), None)
    if key is not None and sizes == FAMILIES[key].sizes:
        known = FAMILIES[key]
        return known._replace(dt=dt or known.dt, episode_length=episode_length or known.episode_length)
    if episode_length is not None:
        return Family(None, f"d4rl/{name}", sizes, dt, episode_length, None)
    own = "or, for a set of your own, --episode-length STEPS"
    if key is not None:
        problem = f"{sizes[0]} numbers and {sizes[1]} actions, {key} has {FAMILIES[key].sizes} of them"
        raise common.fail(path, "observations", problem, f"give the right name with --name, {own}")
    problem = f"'{name}' is no set that is known here ({', '.join(FAMILIES)})"
    raise common.fail(path, "name", problem, f"give D4RL's name with --name, {own}")


def _terminal(family: Family):
    """Observed next observations -> where the family's task ends; None where they do not tell."""
    return None if family.task is None or family.maze else find_task(family.task).model_terminal


# --- columns -------------------------------------------------------------------------------------


def _root_planar(arrays, cut: Cut, family: Family, notes: list[str]) -> tuple[dict[str, np.ndarray], float | None]:
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


def _maze_columns(arrays, cut: Cut, family: Family, notes: list[str]) -> tuple[dict[str, np.ndarray], float | None]:
    """x, y, goals, and which trajectory a row belongs to; and the share of rewards that agree with the goals."""
    before, after = arrays["observations"][:, :2], cut.next_observations[:, :2]
    ids = np.cumsum(cut.ends) - cut.ends
    columns = common.root_columns(before, after, family.dt) | {"trajectory_ids": ids.astype(np.int32)}
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
    raw, maker = read_columns(path)
    sizes = raw["observations"].shape[1], raw["actions"].shape[1]
    family = _find_family(path, name, sizes, dt, episode_length)
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
    found = cut(
        path, arrays, notes, body=body_of(family.env, sizes[0], family.dt), limit=family.episode_length,
        terminal=_terminal(family), ends_at_terminals=not family.maze,
    )  # fmt: skip
    arrays["terminals"] = found.terminals
    kept = np.flatnonzero(found.valid)
    if not len(kept):
        raise common.fail(path, "observations", "no row has a true successor", "use a file with next_observations")
    columns, agreement = {}, None
    if family.maze:
        columns, agreement = _maze_columns(arrays, found, family, notes)
    elif family.num_qpos:
        columns, agreement = _root_planar(arrays, found, family, notes)
    if log_probs is not None and np.isfinite(log_probs).all():
        columns["action_log_probs"] = log_probs.astype(np.float32)
    elif log_probs is not None:
        notes.append("infos/action_log_probs is not finite everywhere: not kept")
    broken = found.ends | ~np.roll(found.valid, -1)  # the last row is an end, so that rolling is harmless
    columns |= {key: arrays[key] for key in ("observations", "actions", "rewards", "terminals")}
    columns |= {"next_observations": found.next_observations, "timeouts": broken & ~arrays["terminals"]}
    metadata = {
        "dataset_name": name, "env": family.env, "task": family.task, "reward_kind": "task",
        "layout": "task" if family.task else "env", "dt": family.dt, "episode_length": family.episode_length,
        "generator": {"script": "d4rl", "flags": maker}, "reference": family.reference,
        "rows_dropped": found.rows_dropped, "reward_agreement": agreement,
        "parents": [{"path": Path(path).name, "sha256": common.file_sha256(path), "taken": f"{len(kept)} rows"}],
    }  # fmt: skip
    if state is not None and not _states_fit(arrays["observations"], arrays["infos/qpos"], speeds):
        state = None
        if family.task:
            notes.append("infos/qpos and infos/qvel are not the states of their rows: the observations are replayed")
    if state is not None:
        state = tuple(np.asarray(part, np.float64)[kept] for part in state)
    return common.Imported({key: column[kept] for key, column in columns.items()}, metadata, state, notes, str(path))
