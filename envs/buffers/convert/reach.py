"""Whether a recorded step can have happened, from its numbers alone: poses follow speeds, and no step ends at a start.

What a file calls a transition may be a reset: the last state of one episode, then the first of the next. No flag says
so in many files. It shows in a robot's joints, which leap, and in its speeds, which read zero.
"""

from typing import NamedTuple

import numpy as np

from envs.robots import ROBOTS, Robot

MAX_LEAP = 20.0  # m/s or rad/s; no contact moves a joint so much faster than its speeds around the step say
START_LEAP = 2.0  # the same, where the step ends in a start's pose at rest
TIGHT = 0.05  # starts of less noise than this are not met by chance: there a leap of the speeds tells, too
START_SLACK, START_SIGMAS = 1e-3, 6.0  # beyond a start's noise: rounding; of normal noise so many standard deviations
QUATERNION_SLACK = 1e-3  # a simulator's step leaves a torso's quaternion at length 1, a reset's noise does not
UNFIT_SHARE = 0.1  # more unreachable rows than this: the numbers are not what they are taken for
CONTACT_SIZES = {"ant": (27, 105, 111), "humanoid": (45, 348, 376)}  # observations that go on with contact forces
NAMED_ROWS = 5  # at most so many rows are named in a message


class Body(NamedTuple):
    """Where an observation of a robot shows pose and speeds. All index arrays are of the same length J."""

    robot: Robot
    dt: float
    pose: np.ndarray  # columns of positions that have a speed of their own
    speed: np.ndarray  # the columns of these speeds
    start: np.ndarray  # positions (J,) at the start of an episode; nan: any
    turn: int | None  # the first of the four columns of a free torso's quaternion


def body_of(world: str | None, size: int, dt: float | None) -> Body | None:
    """The body of `size` observed numbers of a world; None where it has none, or where they are others."""
    world = {"d4rl-ant": "ant"}.get(world or "", world)
    if world not in ROBOTS or not dt:
        return None
    robot = ROBOTS[world]
    whole = robot.observation_size + robot.skip_qpos  # nq + nv
    free = whole % 2 == 1  # nq = nv + 1, the quaternion's
    num_qpos = (whole + free) // 2
    hidden = 2 if size in CONTACT_SIZES.get(world, ()) else whole - size
    if not 0 <= hidden <= 2:
        return None
    joints = np.concatenate([np.arange(3), np.arange(7, num_qpos)]) if free else np.arange(num_qpos)
    speeds = np.concatenate([np.arange(3), np.arange(6, num_qpos - 1)]) if free else np.arange(num_qpos)
    start = np.zeros(len(joints))
    start[: 2 if free else 1] = np.nan  # x, y: of no meaning on a plane, drawn in a maze
    start[2 if free else 1] = robot.start_z
    shown = joints >= hidden
    columns = joints[shown] - hidden, num_qpos - hidden + speeds[shown]
    return Body(robot, dt, *columns, start[shown], 3 - hidden if free else None)


def _starts(observations: np.ndarray, body: Body) -> np.ndarray:
    """Rows (N,) in a pose and at speeds that the start of an episode has."""
    robot = body.robot
    near = np.abs(observations[:, body.pose] - body.start) <= robot.start_qpos + START_SLACK
    slow = (START_SIGMAS if robot.start_normal else 1.0) * robot.start_qvel + START_SLACK
    return (near | np.isnan(body.start)).all(1) & (np.abs(observations[:, body.speed]) <= slow).all(1)


def unreachable(observations: np.ndarray, following: np.ndarray, body: Body) -> np.ndarray:
    """Rows (N,) of observations (N, S) from which no step leads to the row of `following` (N, S)."""
    before, after = observations[:, body.speed].astype(np.float64), following[:, body.speed].astype(np.float64)
    moved = (following[:, body.pose].astype(np.float64) - observations[:, body.pose]) / body.dt
    leap = np.abs(moved - 0.5 * (before + after)) - 0.5 * np.abs(after - before)
    if body.robot.clip_qvel is not None:  # a speed that is shown at its limit may be any greater one
        leap[(np.abs(before) >= body.robot.clip_qvel) | (np.abs(after) >= body.robot.clip_qvel)] = 0.0
    leaps = (leap > START_LEAP).any(1)
    if body.robot.start_qpos < TIGHT:
        leaps |= (np.abs(after - before) > START_LEAP).any(1)
    found = (leap > MAX_LEAP).any(1) | (_starts(following, body) & leaps)
    if body.turn is not None:
        length = np.linalg.norm(following[:, body.turn : body.turn + 4].astype(np.float64), axis=1)
        found |= np.abs(length - 1.0) > QUATERNION_SLACK
    return found


def step_seconds(observations: np.ndarray, following: np.ndarray, body: Body) -> float | None:
    """Seconds per step by which poses follow speeds in these rows; None where they do not."""
    speed = 0.5 * (observations[:, body.speed].astype(np.float64) + following[:, body.speed])
    moved = following[:, body.pose].astype(np.float64) - observations[:, body.pose]
    ratios = (moved / np.where(np.abs(speed) > 0.5, speed, np.nan)).ravel()
    ratios = ratios[np.isfinite(ratios)]
    if len(ratios) < 20:
        return None
    middle = float(np.median(ratios))
    fit = np.abs(ratios - middle) < 0.3 * abs(middle)
    return middle if middle > 0 and fit.mean() > 0.5 else None


def describe(arrays: dict, world: str | None, dt: float | None, source: str) -> list[str]:
    """What is wrong with a buffer's steps, as lines: rows that no step leads from, or another step than `dt`."""
    observations, following = (np.asarray(arrays[key]) for key in ("observations", "next_observations"))
    body = body_of(world, observations.shape[1], dt)
    if body is None:
        return []
    found = unreachable(observations, following, body)
    if not found.any():
        return []
    seconds = step_seconds(observations, following, body)
    if found.mean() > UNFIT_SHARE:
        why = "another robot, or the numbers in another order"
        if seconds is not None and abs(seconds / dt - 1) > 0.1:
            why = f"poses follow speeds by {seconds:.3g} s a step here, not {dt:g} s: another dt"
        return [f"warning: {source}: {100 * found.mean():.0f} % of the rows are no steps of '{world}': {why}"]
    rows = np.flatnonzero(found)
    starts = int(_starts(following[rows], body).sum())
    names = ", ".join(map(str, rows[:NAMED_ROWS])) + ", ..." * (len(rows) > NAMED_ROWS)
    line = f"warning: {source}: {len(rows)} of {len(found)} rows are no steps of '{world}' (rows {names})"
    if 2 * starts >= len(rows):
        line += ": they lead to the start of an episode. A reset was recorded as a step: drop these rows"
    return [line]
