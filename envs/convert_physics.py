"""Whether a file and the simulator belong together: recorded steps replayed through C MuJoCo."""

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np

from envs import buffers
from envs.errors import InputError
from envs.tasks import Task, task_options

REPLAY_ROWS = 4096
TOLERANCE = (1e-3, 1e-4)  # absolute; relative to the file's own value


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
    if isinstance(source, buffers.Buffer):
        return measure(source.arrays, None, env, source.metadata["layout"], source.path, rows)
    if Path(source).suffix == ".npz":
        return replay_agreement(buffers.load(source, quiet=True), env, rows)
    from envs import convert_d4rl

    found = convert_d4rl.read(source, None, env.task.dt, env.task.episode_length)
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
        raise buffers._fail(source, "qpos, qvel", problem, "replay in the environment the file was made in")
    raw = _step(env, qpos, qvel, np.asarray(arrays["actions"][usable]))
    after = raw if layout == "env" else np.asarray(env.task.observe(raw))
    recorded = arrays["next_observations"][usable]
    if after.shape != recorded.shape:
        problem = f"have {recorded.shape[1]} numbers, '{env.name}' has {after.shape[1]}"
        raise buffers._fail(source, "next_observations", problem, "replay in the environment the file was made in")
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
        raise buffers._fail(source, "observations", problem, "replay in the environment the file was made in")
    root = np.zeros((len(rows), 2))
    if "root_positions" in arrays:
        root = np.asarray(arrays["root_positions"][rows], np.float64)
    qpos = np.concatenate([root[:, :hidden], observations[:, : env.model.nq - hidden]], axis=1)
    return qpos, observations[:, env.model.nq - hidden :]


def _step(env, qpos: np.ndarray, qvel: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """One control step from each state -> raw next observations (R, S_world) float32."""
    import jax

    from envs.physics import Physics

    clock = np.zeros((len(qpos), 1))
    memory = np.concatenate([clock, qpos, qvel], axis=1).astype(np.float64).view(np.uint32)
    now = Physics(memory, *(np.float32(part) for part in (qpos, qvel, clock[:, 0])))

    def step(now, action):
        start = env.reset(jax.random.key(0))  # for whatever else a state carries
        return env.step(start.replace(pipeline_state=now), action).info["raw_obs"]

    return np.asarray(jax.jit(jax.vmap(step))(now, actions))


def find_env(task: Task):
    """The task's environment on C MuJoCo, or None where it has no such engine."""
    import envs

    options = {key: value for key, value in task.options.items() if key in task_options(task.name)}
    try:
        env = envs.make(task.name, backend="mujoco", **options)
    except InputError:
        return None
    return env if hasattr(env, "robot") else None


def say(found: dict[str, Any]) -> str:
    if not found["rows"]:
        return f"physics not checked: no row shows its whole state in {found['env']!a}"
    return (
        f"physics: {100 * found['share']:.1f} % of {found['rows']:,} replayed steps agree with the file in "
        f"{found['env']!a} (median error {found['median_error']:.1e})"
    )


def describe_checks(metadata: dict[str, Any]) -> list[str]:
    """What an import found out about its file, as lines for `inspect`; none for other buffers."""
    lines = []
    found = metadata.get("replay_agreement")
    if isinstance(found, dict) and isinstance(found.get("share"), (float, type(None))):
        with contextlib.suppress(KeyError, TypeError, ValueError):  # the metadata may be a stranger's
            lines.append(say(found))
    share = metadata.get("reward_agreement")
    if isinstance(share, float) and math.isfinite(share):
        lines.append(f"rewards: {100 * share:.1f} % of the checkable rows agree with the task's formula")
    return lines
