"""Whether a file and the simulator belong together: recorded steps replayed through C MuJoCo."""

import contextlib
import math
import operator
from pathlib import Path
from typing import Any

import numpy as np

from envs.buffers.convert import d4rl
from envs.buffers.fields import Buffer, fail
from envs.buffers.reading import load
from envs.errors import InputError
from envs.robots import ROBOTS
from envs.task import Task
from envs.worlds import make, task_of_file

REPLAY_ROWS, INSPECT_ROWS = 4096, 512  # of an import; of `inspect`, which is to be quick
BLOCK = 128  # rows at a time: on one core a callback waits for ever for 100 kB or more
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
    """`replay_agreement` of columns. state: (qpos, qvel) or None; layout: of the observations, "env" or "task"."""
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
    raw = _step(env, qpos, qvel, np.asarray(arrays["actions"][usable]))
    after = raw if layout == "env" else np.asarray(env.task.observe(raw))
    recorded = arrays["next_observations"][usable]
    if after.shape != recorded.shape:
        problem = f"have {recorded.shape[1]} numbers, '{env.name}' has {after.shape[1]}"
        raise fail(source, "next_observations", problem, ELSEWHERE)
    error = np.abs(after.astype(np.float64) - recorded)
    agree = (error <= TOLERANCE[0] + TOLERANCE[1] * np.abs(recorded)).all(axis=1)
    median = float(np.median(error.max(axis=1)))
    return {"share": float(agree.mean()), "rows": len(usable), "median_error": median, "env": env.name}


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


def _step(env, qpos: np.ndarray, qvel: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """One control step from each state -> raw next observations (R, S_world) float32, `BLOCK` rows at a time."""
    import jax

    from envs.physics import Physics

    clock = np.zeros((len(qpos), 1))
    memory = np.concatenate([clock, qpos, qvel], axis=1).astype(np.float64).view(np.uint32)
    now = Physics(memory, *(np.float32(part) for part in (qpos, qvel, clock[:, 0])))

    def step(now, action):
        start = env.reset(jax.random.key(0))  # for whatever else a state carries
        return env.step(start.replace(pipeline_state=now), action).info["raw_obs"]

    step_block = jax.jit(jax.vmap(step))
    blocks = np.arange(-(-len(qpos) // BLOCK) * BLOCK) % len(qpos)  # the last is filled up from the first rows
    blocks = blocks.reshape(-1, BLOCK)
    columns = jax.tree.map(lambda x: x[blocks], (now, actions))
    parts = [np.asarray(step_block(*jax.tree.map(operator.itemgetter(i), columns))) for i in range(len(blocks))]
    return np.concatenate(parts)[: len(qpos)]


def find_env(task: Task):
    """The task's environment on C MuJoCo, or None where it has no such engine."""
    try:
        env = make(task, backend="mujoco")
    except InputError:
        return None
    return env if hasattr(env, "robot") else None


def say(found: dict[str, Any]) -> list[str]:
    """The result of a replay as lines; where few rows agree, with what is likely to be behind it."""
    name = f"{found['env']!a}"
    if not found["rows"]:
        return [f"physics: not checked: no row shows its whole state in {name}"]
    line = (
        f"physics: {100 * found['share']:.1f} % of {found['rows']:,} replayed steps agree with the file in "
        f"{name} (median error {found['median_error']:.1e})"
    )
    if found["share"] >= LOW_SHARE:
        return [line]
    if found["share"] > NO_SHARE:
        why = f"{name} is not quite the simulator of this file. Likely another version or other constants there "
        why += "(contacts, gear, seconds a step, walls)"
    else:
        why = f"these are hardly observations of {name}, though there are as many numbers. Likely another robot, maze "
        why += "or task (--task), the numbers in another order (Minari: --keys), or successors of other rows"
    return [line, f"warning: {why}. A policy learnt from it is judged in {name}: do not trust that score"]


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
        return [] if env is None else say(measure(buffer.arrays, None, env, about["layout"], buffer.path, INSPECT_ROWS))
    except (TypeError, ValueError, ArithmeticError) as error:  # the metadata may be a stranger's
        return [f"physics: not checked: {' '.join(str(error).split())[:160]!a}"]


def describe_checks(metadata: dict[str, Any], buffer: Buffer | None = None) -> list[str]:
    """What an import found out about its file, as lines; of a buffer without a stored replay one is done now."""
    lines = []
    found = metadata.get("replay_agreement")
    if isinstance(found, dict) and isinstance(found.get("share"), (float, type(None))):
        with contextlib.suppress(KeyError, TypeError, ValueError):  # the metadata may be a stranger's
            lines += say(found)
    if buffer is not None and not lines:
        lines += check_now(buffer)
    share = metadata.get("reward_agreement")
    if isinstance(share, float) and math.isfinite(share):
        lines.append(f"rewards: {100 * share:.1f} % of the checkable rows agree with the task's formula")
    return lines
