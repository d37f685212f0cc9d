"""Whether a file and the simulator belong together: recorded steps replayed through C MuJoCo."""

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np

from envs.buffers.convert import d4rl, reach
from envs.buffers.convert.reach import NAMED_ROWS
from envs.buffers.fields import Buffer, fail
from envs.buffers.reading import load
from envs.maze import MAPS
from envs.robots import ROBOTS
from envs.task import Task, Transition
from envs.worlds import make, task_of_file

REPLAY_ROWS, INSPECT_ROWS = 4096, 512  # of an import; of `inspect`, which is to be quick
BLOCK = 256  # rows at a time
TOLERANCE = (1e-3, 1e-4)  # absolute; relative to the file's own value
ELSEWHERE = "replay in the environment the file was made in, or import without the check: --no-replay"
LOW_SHARE, NO_SHARE = 0.9, 0.02  # of the rows: below it another physics; hardly a row, as with states of other rows


def replay_agreement(source, env, rows: int = REPLAY_ROWS) -> dict[str, Any]:
    """Replay recorded steps through C MuJoCo and compare with the recorded next observations.

    Args:
        source: a `Buffer`, a buffer file, or a D4RL file (whose infos/qpos and infos/qvel are the
            states). A buffer's states are read off its observations; rows whose velocities were
            clipped there are left out. x does not matter to a robot on a plane.
        env: `envs.make(task, backend="mujoco")`, or an `envs.physics.MujocoEnv`.
        rows: at most so many, drawn evenly from a fixed seed.

    Returns: {"share": rows that agree / rows replayed, "rows": replayed, "median_error": of the
        largest difference of a row, "env": name}. A row agrees where every number is within
        1e-3 + 1e-4 |value|: float32 states move a step by less, other physics by more.
    Raises: InputError where the observations do not hold the state.
    """
    if isinstance(source, Buffer):
        return measure(source.arrays, None, env, source.metadata["layout"], source.path, rows)
    if Path(source).suffix == ".npz":
        return replay_agreement(load(source, quiet=True), env, rows)
    found = d4rl.read(source, None, env.task.dt, env.task.episode_length)
    return measure(found.arrays, found.state, env, "task", found.source, rows)


def measure(arrays, state, env, layout: str, source: str, rows: int = REPLAY_ROWS) -> dict[str, Any]:
    """`replay_agreement` of columns. state: (qpos, qvel) or None; layout: of the observations, "env" or "task".

    Columns in float64 are compared as exactly as they are. Where the task pays, `rewards` of the same rows are
    compared, too: "reward_share" with the actions as they are, "unclipped_share" with `unclipped` ones.
    """
    observations = arrays["observations"]
    usable = np.arange(len(observations))
    if state is None:
        usable = np.flatnonzero(_unclipped(observations, env))
    if len(usable) > rows:
        usable = np.sort(np.random.default_rng(0).choice(usable, rows, replace=False))
    if not len(usable):
        return {"share": None, "rows": 0, "median_error": None, "env": env.name}
    if state is None:
        qpos, qvel = _state_from_observations(arrays, usable, env, source)
    else:
        qpos, qvel = state[0][usable], state[1][usable]
    sizes = (env.model.nq, env.model.nv)
    if (qpos.shape[1], qvel.shape[1]) != sizes:
        problem = f"have {qpos.shape[1]} and {qvel.shape[1]} numbers, '{env.name}' has {sizes[0]} and {sizes[1]}"
        raise fail(source, "qpos, qvel", problem, ELSEWHERE)
    actions = np.asarray(arrays["actions"][usable], np.float64)
    after_qpos, after_qvel = _step(env, qpos, qvel, actions)
    after = _raw(env, after_qpos, after_qvel)
    shown = after if layout == "env" else env.task.observe(after)
    recorded = arrays["next_observations"][usable]
    if shown.shape != recorded.shape:
        problem = f"have {recorded.shape[1]} numbers, '{env.name}' has {shown.shape[1]}"
        raise fail(source, "next_observations", problem, ELSEWHERE)
    error = np.abs(shown - recorded)
    agree = _close(shown, recorded).all(axis=1)
    found = {
        "share": float(agree.mean()), "rows": len(usable), "median_error": float(np.median(error.max(axis=1))),
        "largest_error": float(error.max()), "env": env.name, **_where(arrays, usable[~agree]),
    }  # fmt: skip
    if not env.task.has_reward or "rewards" not in arrays or (env.robot.maze in MAPS and "goals" not in arrays):
        return found
    if env.robot.contact_numbers:  # Gymnasium's rewards charge contacts, for a speed measured a substep late
        return found
    goals = arrays["goals"][usable] if "goals" in arrays else None
    paid = arrays["rewards"][usable]
    velocity = (after_qpos[:, :2] - qpos[:, :2]) / env.dt
    for name, key in {"reward_share": "actions", "unclipped_share": "unclipped"}.items():
        if key in arrays:
            acted = np.asarray(arrays[key][usable], np.float64)
            step = Transition(_raw(env, qpos, qvel), acted, after, qpos[:, :2], velocity, goals)
            found[name] = float(_close(np.asarray(env.task.reward(step)), paid)[agree].mean()) if agree.any() else 0.0
    return found


def _close(found: np.ndarray, recorded: np.ndarray) -> np.ndarray:
    return np.abs(found - recorded) <= TOLERANCE[0] + TOLERANCE[1] * np.abs(recorded)


def _where(arrays, wrong: np.ndarray) -> dict[str, Any]:
    """Rows that do not agree, named where half of them or more are an episode's first or its last."""
    if not len(wrong) or "terminals" not in arrays or "timeouts" not in arrays:
        return {}
    ends = np.asarray(arrays["terminals"]) | np.asarray(arrays["timeouts"])
    first = np.append(True, ends[:-1])
    for place, rows in {"first": wrong[first[wrong]], "last": wrong[ends[wrong]]}.items():
        if 2 * len(rows) >= len(wrong) and len(rows) > 1:
            return {"place": place, "place_count": len(rows), "place_rows": rows[:NAMED_ROWS].tolist()}
    return {}


def _unclipped(observations: np.ndarray, env) -> np.ndarray:
    """Rows whose velocities are shown as they are: (N,) bool."""
    limit = env.robot.clip_qvel
    if limit is None:
        return np.ones(len(observations), bool)
    return (np.abs(observations[:, -env.model.nv :]) < limit).all(axis=1)


def _state_from_observations(arrays, rows: np.ndarray, env, source: str) -> tuple[np.ndarray, np.ndarray]:
    """qpos (R, nq), qvel (R, nv): observations are qpos without its first 0 to 2 entries, then qvel."""
    observations = np.asarray(arrays["observations"][rows], np.float64)
    hidden = env.model.nq + env.model.nv - observations.shape[1]
    if not 0 <= hidden <= 2:
        problem = f"have {observations.shape[1]} numbers, the state of '{env.name}' has {env.model.nq + env.model.nv}"
        raise fail(source, "observations", problem, ELSEWHERE)
    root = np.zeros((len(rows), 2))
    if "root_positions" in arrays:
        root = np.asarray(arrays["root_positions"][rows], np.float64)
    qpos = np.concatenate([root[:, :hidden], observations[:, : env.model.nq - hidden]], axis=1)
    return qpos, observations[:, env.model.nq - hidden :]


def _step(env, qpos: np.ndarray, qvel: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One control step from each state -> qpos (R, nq), qvel (R, nv), float64, `BLOCK` rows at a time."""
    before = np.concatenate([np.zeros((len(qpos), 1)), qpos, qvel], axis=1)
    blocks = [slice(start, start + BLOCK) for start in range(0, len(before), BLOCK)]
    after = np.concatenate([env.engine.advance(before[block], actions[block])[0] for block in blocks])
    return after[:, 1 : 1 + env.model.nq], after[:, 1 + env.model.nq :]


def _raw(env, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
    """Raw observations (R, S_world) of states, float64."""
    limit = np.inf if env.robot.clip_qvel is None else env.robot.clip_qvel
    return np.concatenate([qpos[:, env.robot.skip_qpos :], np.clip(qvel, -limit, limit)], axis=1)


def find_env(task: Task):
    """The task's environment on C MuJoCo, None where it has no such engine. InputError where MuJoCo does not load."""
    return make(task, backend="mujoco") if task.env in ROBOTS else None


def say(found: dict[str, Any], seconds: float | None = None) -> list[str]:
    """The result of a replay as lines; where few rows agree, with what is likely to be behind it.

    seconds: per step, by which poses follow speeds in the file, where that is another step than the simulator's.
    """
    name = f"{found['env']!a}"
    if not found["rows"]:
        return [f"physics: not checked: no row shows its whole state in {name}"]
    lines = [
        f"physics: {100 * found['share']:.1f} % of {found['rows']:,} replayed steps agree with the file in "
        f"{name} (median error {found['median_error']:.1e})"
    ]
    share, unclipped = found.get("reward_share"), found.get("unclipped_share", 0.0)
    if share is not None and found["share"] >= LOW_SHARE:
        lines.append(f"rewards: {100 * share:.1f} % of the steps that agree are paid as in {name}")
        if share < LOW_SHARE < unclipped:
            lines[-1] += f", {100 * unclipped:.1f} % if the actions before clipping are charged, as the file does"
    if "place" in found:
        rows = f"rows {', '.join(map(str, found['place_rows']))}, ..."
        where = f"{found['place_count']} of the steps that disagree are the {found['place']} of their episodes ({rows})"
        lines.append(f"warning: {where}: is a reset recorded as a step there?")
    if found["share"] >= LOW_SHARE:
        return lines
    if seconds is not None:
        why = f"poses follow speeds by {seconds:.3g} s a step in this file, {name} steps otherwise: another dt"
    elif found["share"] > NO_SHARE:
        why = f"{name} is not quite the simulator of this file. Likely another version or other constants there "
        why += "(contacts, gear, seconds a step, walls)"
    else:
        why = f"these are hardly observations of {name}, though there are as many numbers. Likely another robot, maze "
        why += "or task (--task), the numbers in another order (Minari: --keys), actions on another scale "
        why += "(--action-limit), or successors of other rows"
    return [*lines, f"warning: {why}. A policy learnt from it is judged in {name}: do not trust that score"]


def other_step(arrays, world: str, dt: float) -> float | None:
    """Seconds per step by which poses follow speeds in a buffer, where these are others than dt."""
    body = reach.body_of(world, arrays["observations"].shape[1], dt)
    if body is None:
        return None
    rows = slice(0, REPLAY_ROWS)
    found = reach.step_seconds(*(np.asarray(arrays[k][rows]) for k in ("observations", "next_observations")), body)
    return found if found is not None and abs(found / dt - 1) > 0.2 else None


def check_now(buffer: Buffer) -> list[str]:
    """A short replay of a buffer that was not checked when it was made, as lines; or why there is none."""
    about = buffer.metadata
    name, sizes = about["task"] or about["env"], [buffer[key].shape[1] for key in ("observations", "actions")]
    if about["env"] not in ROBOTS:
        return [f"physics: not checked: {about['env']!a} is none of the MuJoCo robots here ({', '.join(ROBOTS)})"]
    if about.get("backend") not in (None, "mujoco"):
        return [f"physics: not checked: recorded on {about['backend']!a}, and the check is against C MuJoCo"]
    try:
        task = task_of_file(name, **about["task_options"])
        size = task.observation_size if about["layout"] == "task" else task.env_observation_size
        if (task.env, [size, task.action_size]) != (about["env"], sizes):
            return [f"physics: not checked: {sizes} observed and action numbers are not those of {name!a}"]
        env = find_env(task)
        if env is None:
            return []
        columns = buffer.arrays if about["reward_kind"] != "none" else {**buffer.arrays, "rewards": None}
        columns = {key: column for key, column in columns.items() if column is not None}
        found = measure(columns, None, env, about["layout"], buffer.path, INSPECT_ROWS)
        return say(found, other_step(buffer.arrays, about["env"], task.dt))
    except (TypeError, ValueError, ArithmeticError) as error:  # the metadata may be a stranger's
        return [f"physics: not checked: {' '.join(str(error).split())[:160]!a}"]


def describe_checks(metadata: dict[str, Any], buffer: Buffer, replay: bool = True) -> list[str]:
    """What an import found out about its file, as lines; `replay`: of a buffer without a stored one it is done now."""
    lines = []
    found, world, dt = (metadata.get(key) for key in ("replay_agreement", "env", "dt"))
    if isinstance(found, dict) and isinstance(found.get("share"), (float, type(None))):
        with contextlib.suppress(KeyError, TypeError, ValueError):  # the metadata may be a stranger's
            lines += say(found, other_step(buffer.arrays, world, dt))
    lines += reach.describe(buffer.arrays, world, dt, buffer.path)
    if replay and not any(line.startswith("physics:") for line in lines):
        lines = check_now(buffer) + lines
    share = metadata.get("reward_agreement")
    if isinstance(share, float) and math.isfinite(share):
        lines.append(f"rewards: {100 * share:.1f} % of the checkable rows agree with the task's formula")
    return lines
