"""The tasks and their names: what is observed, what is paid and what ends an episode, apart from any physics.

Nothing here imports an engine.

A world ("ant") is a task without reward that observes everything; a task ("ant-angle-60") is a
world with a reward and its own observation.
"""

import dataclasses
import difflib
import functools
import inspect
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

from envs import maze
from envs.errors import InputError
from envs.robots import ROBOTS
from envs.task import Task, Transition

UDG_ANGLES = (0, 60, 120, 180, 240, 300)


# --- pieces -------------------------------------------------------------------------------------


def _xp(array):
    """Return the module (numpy or jax.numpy) that an array belongs to."""
    return array.__array_namespace__()


def identity(observations):
    return observations


def _no_reward(step: Transition):
    xp = _xp(step.observations)
    return xp.zeros(step.observations.shape[:-1], dtype=xp.float32)


def never(next_observations):
    xp = _xp(next_observations)
    return xp.zeros(next_observations.shape[:-1], dtype=bool)


def _along(vectors, angle_deg: float):
    """Project the first two components on the direction at `angle_deg` from the x axis."""
    angle = math.radians(angle_deg)
    return vectors[..., 0] * math.cos(angle) + vectors[..., 1] * math.sin(angle)


def _square(actions):
    return (actions * actions).sum(-1)


def _float32(values):
    return values.astype(_xp(values).float32)


def _next_root(step: Transition, dt: float):
    """Return the root position after the step (..., 2)."""
    return step.root_positions + dt * step.root_velocities


def _on_next(function: Callable) -> Callable:
    """Turn a function of raw next observations into one of a Transition."""
    return lambda step: function(step.next_observations)


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if value == int(value) else value


# --- point robots -------------------------------------------------------------------------------

POINT_DT = 0.1
TREE_DT = 0.33
_xy_of_next = _on_next(lambda observations: observations[..., :2])


def _point_world(name: str = "point") -> Task:
    """FreeRun: raw observation (x, y, vx, vy), unbounded plane."""
    return Task(
        name=name, env="point", observation_size=4, env_observation_size=4, action_size=2,
        dt=POINT_DT, episode_length=100, eval_length=100, observe=identity, reward=_no_reward,
        terminal=_on_next(never), feature=_xy_of_next, feature_names=("x", "y"),
        has_reward=False, model_terminal=never,
    )  # fmt: skip


def _point_angle(name: str, angle_deg: float) -> Task:
    """Velocity along a direction; |v| <= 1, so a return is below 100."""
    return dataclasses.replace(
        _point_world(name),
        reward=lambda step: _float32(_along(step.root_velocities, angle_deg)),
        has_reward=True,
        model_reward=lambda obs, actions, next_obs: _float32(_along(next_obs[..., 2:], angle_deg)),
        options={"angle_deg": angle_deg},
    )


def _point_goal(name: str, angle_deg: float, *, threshold: float = 4.0) -> Task:
    """1 for every step that ends beyond the line p . direction = threshold, else 0."""

    def beyond(observations):
        return _float32(_along(observations, angle_deg) > threshold)

    return dataclasses.replace(
        _point_world(name),
        reward=_on_next(beyond),
        has_reward=True,
        model_reward=lambda obs, actions, next_obs: beyond(next_obs),
        options={"angle_deg": angle_deg, "threshold": threshold},
    )


def _tree_maze(name: str = "tree-maze") -> Task:
    """A box with a trunk that branches; raw observation (x, y, vx, vy), reward-free."""
    return dataclasses.replace(_point_world(name), env="tree-maze", dt=TREE_DT)


TREE_ENDS = ((0.1, 1.9), (0.7, 1.9), (1.3, 1.9), (1.9, 1.9))  # the four dead ends, from left to right


def _tree_end(name: str, number: float) -> Task:
    """Minus the straight distance to dead end 1 to 4: blind to the walls, it can point into the wrong branch."""
    if number not in (1, 2, 3, 4):
        raise InputError(f"no environment or task is called '{name}': the maze has dead ends 1 to 4")
    x, y = TREE_ENDS[int(number) - 1]

    def reward(observations):
        return _float32(-(((observations[..., 0] - x) ** 2 + (observations[..., 1] - y) ** 2) ** 0.5))

    return dataclasses.replace(
        _tree_maze(name),
        reward=_on_next(reward),
        has_reward=True,
        model_reward=lambda obs, actions, next_obs: reward(next_obs),
        options={"end": int(number)},
    )


# --- MuJoCo robots ------------------------------------------------------------------------------


def _robot_world(name: str, robot: str, **fields) -> Task:
    spec = ROBOTS[robot]
    defaults = dict(
        name=name, env=robot, observation_size=spec.observation_size,
        env_observation_size=spec.observation_size, action_size=spec.action_size, dt=spec.dt,
        episode_length=200, eval_length=1000, observe=identity, reward=_no_reward,
        terminal=_on_next(never), feature=lambda step: _next_root(step, spec.dt),
        feature_names=("x", "y"), has_reward=False, model_terminal=never,
    )  # fmt: skip
    return Task(**{**defaults, **fields})


def _ant_world(name: str = "ant", *, gear: float = 30.0) -> Task:
    """Gear 30 makes the ant slow and steady; raw observation qpos (15, with x, y), qvel (14)."""
    return _robot_world(name, "ant", feature=_xy_of_next, options={"gear": gear})


def _ant_angle(
    name: str,
    angle_deg: float,
    *,
    gear: float = 30.0,
    ctrl_cost: float | None = None,
    survive_bonus: float = 0.0,
    terminate: bool = False,
) -> Task:
    """velocity . (cos, sin) - ctrl_cost ||a||^2 + survive_bonus, observed without x, y.

    ctrl_cost: by default 0.5 (gear / 150)^2, the published cost of a torque at gear 150.
    terminate: end an episode where the torso leaves 0.2 <= z <= 1.
    """
    cost = 0.5 * (gear / 150.0) ** 2 if ctrl_cost is None else ctrl_cost

    def reward(step):
        pay = _along(step.root_velocities, angle_deg) - cost * _square(step.actions)
        return _float32(pay + survive_bonus)

    def fallen(observations):
        z = observations[..., 0]
        return ~((z >= 0.2) & (z <= 1.0))

    world = _ant_world(name, gear=gear)
    ends = fallen if terminate else never
    return dataclasses.replace(
        world,
        observation_size=world.env_observation_size - 2,
        observe=_drop_xy,
        reward=reward,
        has_reward=True,
        terminal=lambda step: ends(_drop_xy(step.next_observations)),
        model_terminal=ends,
        options={
            "angle_deg": angle_deg, "gear": gear, "ctrl_cost": cost,
            "survive_bonus": survive_bonus, "terminate": terminate,
        },
    )  # fmt: skip


def _drop_xy(observations):
    return observations[..., 2:]


def _ant_open(name: str = "ant-open") -> Task:
    """D4RL's ant as in its mazes, on the open plane and at any heading: raw observation as of `ant`."""
    return _robot_world(name, "ant-open", feature=_xy_of_next)


def _ant_open_angle(name: str, angle_deg: float) -> Task:
    """As ant-angle-<deg>; its policy drives the mazes (maze.as_ahead)."""
    return dataclasses.replace(_ant_angle(name, angle_deg), env="ant-open", dt=ROBOTS["ant-open"].dt)


def _cheetah_world(name: str = "cheetah") -> Task:
    """Raw observation qpos[1:] (8: z - nominal z, pitch, joints), qvel (9); x is not observed."""

    def feature(step):
        xp = _xp(step.next_observations)
        return xp.stack([step.root_velocities[..., 0], step.next_observations[..., 0]], axis=-1)

    return _robot_world(name, "cheetah", feature=feature, feature_names=("x velocity", "z"))


def _cheetah_run(name: str, c_z: float = 0.0, *, ctrl_cost: float = 0.1, max_speed: float = 3.0) -> Task:
    """min(v_x, max_speed) - ctrl_cost ||a||^2 + c_z (z - nominal z)."""

    def reward(step):
        speed = _xp(step.root_velocities).minimum(step.root_velocities[..., 0], max_speed)
        height = step.next_observations[..., 0]
        return _float32(speed - ctrl_cost * _square(step.actions) + c_z * height)

    return dataclasses.replace(
        _cheetah_world(name),
        reward=reward,
        has_reward=True,
        options={"c_z": c_z, "ctrl_cost": ctrl_cost, "max_speed": max_speed},
    )


def _humanoid_world(name: str = "humanoid") -> Task:
    """Raw observation qpos[2:] (22), qvel (23); an episode ends unless 1 < z < 2."""

    def fallen(observations):
        z = observations[..., 0]
        return ~((z > 1.0) & (z < 2.0))

    return _robot_world(name, "humanoid", episode_length=1000, terminal=_on_next(fallen), model_terminal=fallen)


def forward_task(
    robot: str,
    name: str = "",
    *,
    ctrl_cost: float,
    survive_bonus: float = 0.0,
    survive_on_done: bool = True,
    speed_weight: float = 1.0,
    angle_deg: float = 0.0,
) -> Task:
    """Gymnasium's task for a robot: speed_weight * forward velocity - ctrl_cost ||a||^2 + survive_bonus.

    survive_on_done: pay the bonus on the step that ends an episode too (v2 to v4, D4RL's data);
    False: only on healthy steps (v5). The robot's own rule ends an episode. angle_deg: another way than forward.
    """
    healthy = ROBOTS[robot].healthy

    def terminal(observations):
        return never(observations) if healthy is None else ~healthy(observations)

    def reward(step):
        speed = _along(step.root_velocities, angle_deg) if angle_deg else step.root_velocities[..., 0]
        pay = speed_weight * speed - ctrl_cost * _square(step.actions)
        alive = 1.0 if survive_on_done else ~terminal(step.next_observations)
        return _float32(pay + survive_bonus * alive)

    return _robot_world(
        name or robot, robot, reward=reward, has_reward=True, episode_length=1000,
        terminal=_on_next(terminal), model_terminal=terminal,
        feature_names=("x", "z" if robot in PLANAR else "y"),
        options={
            "ctrl_cost": ctrl_cost, "survive_bonus": survive_bonus,
            "survive_on_done": survive_on_done,
        },
    )  # fmt: skip


PLANAR = ("cheetah", "hopper", "walker2d")

# D4RL's locomotion, `-v2`: control cost, survive bonus, (random, expert) returns of d4rl/infos.py.
D4RL = {
    "halfcheetah": ("cheetah", 0.1, 0.0, (-280.178953, 12135.0)),
    "hopper": ("hopper", 1e-3, 1.0, (-20.272305, 3234.3)),
    "walker2d": ("walker2d", 1e-3, 1.0, (1.629008, 4592.3)),
}


def _d4rl(name: str) -> Task:
    """Forward velocity - cost + bonus, the bonus also on the step that ends an episode."""
    robot, ctrl_cost, bonus, reference = D4RL[name]
    task = forward_task(robot, name, ctrl_cost=ctrl_cost, survive_bonus=bonus)
    if robot == "cheetah":  # diversity is measured as in the other tasks of this world
        world = _cheetah_world()
        task = dataclasses.replace(task, feature=world.feature, feature_names=world.feature_names)
    return dataclasses.replace(task, options={}, reference=reference)


# Gymnasium's tasks that observe contact forces, here without them and without their cost: a weight of the speed, a
# cost of the control (the humanoid's motors reach 0.4), a bonus. "ant-v2" is D4RL's.
GYMNASIUM = {
    "ant-v5": dict(ctrl_cost=0.5, survive_bonus=1.0, survive_on_done=False),
    "ant-v2": dict(ctrl_cost=0.5, survive_bonus=1.0),
    "humanoid-v5": dict(speed_weight=1.25, ctrl_cost=0.1 * 0.4**2, survive_bonus=5.0, survive_on_done=False),
}


def _gymnasium(name: str) -> Task:
    """Raw observation qpos[2:], qvel: what Gymnasium's begins with."""
    reference = (-325.6, 3879.7) if name == "ant-v2" else None  # of d4rl/infos.py
    return dataclasses.replace(forward_task(name, **GYMNASIUM[name]), options={}, reference=reference)


def _ant_v5_angle(name: str, angle_deg: float) -> Task:
    """Ant-v5 that is paid for going at an angle."""
    task = forward_task("ant-v5", name, **GYMNASIUM["ant-v5"], angle_deg=angle_deg)
    return dataclasses.replace(task, options={"angle_deg": angle_deg})


def _ant_maze(name: str) -> Task:
    """1 on the step that ends within 0.5 m of the goal, which ends the episode; the goal is not observed."""

    def at_goal(step):
        if step.goals is None:
            raise InputError(f"'{name}' pays for reaching a goal, and the data has no goals")
        return maze.reached(step.next_observations[..., :2], step.goals)

    def unknown(observations):
        raise InputError(f"'{name}' ends at a goal that its observations do not tell: no model can learn where")

    steps = maze.STEPS[name.removeprefix("ant-maze-")]
    return _robot_world(
        name, name, reward=lambda step: _float32(at_goal(step)), has_reward=True, terminal=at_goal,
        feature=_xy_of_next, episode_length=steps, eval_length=steps, reference=(0.0, 1.0), model_terminal=unknown,
    )  # fmt: skip


# --- registry -----------------------------------------------------------------------------------

# name, with <x> for a number handed to the builder; listed before the more general.
_BUILDERS: dict[str, Callable[..., Task]] = {
    "point": _point_world,
    "point-angle-<deg>": _point_angle,
    "point-goal-<deg>": _point_goal,
    "tree-maze": _tree_maze,
    "tree-maze-end-<n>": _tree_end,
    "ant": _ant_world,
    "ant-angle-<deg>": _ant_angle,
    "ant-open": _ant_open,
    "ant-open-angle-<deg>": _ant_open_angle,
    **dict.fromkeys(GYMNASIUM, _gymnasium),
    "ant-v5-angle-<deg>": _ant_v5_angle,
    "cheetah": _cheetah_world,
    "cheetah-run": _cheetah_run,
    "cheetah-jump": functools.partial(_cheetah_run, c_z=15.0),
    "cheetah-crawl": functools.partial(_cheetah_run, c_z=-15.0),
    "cheetah-jump-<c_z>": _cheetah_run,
    "humanoid": _humanoid_world,
    **dict.fromkeys(D4RL, _d4rl),
    **{f"ant-maze-{name}": _ant_maze for name in maze.MAPS},
}
_NUMBER = r"(-?\d+(?:\.\d+)?)"


def task_names() -> tuple[str, ...]:
    """Return the names of all tasks; angle tasks at UDG's six angles, though any angle works."""
    names = []
    for template in _BUILDERS:
        if "<deg>" in template:
            names += [template.replace("<deg>", str(angle)) for angle in UDG_ANGLES]
        elif "<n>" in template:
            names += [template.replace("<n>", str(number)) for number in (1, 2, 3, 4)]
        elif "<" not in template:
            names.append(template)
    return tuple(names)


@functools.cache
def reference_scores() -> dict[str, dict]:
    """What benchmark/reference_scores.py measured: task name -> random and expert returns, and how; or a name."""
    return json.loads(Path(__file__).with_name("reference_scores.json").read_text())["tasks"]


def _with_reference(found: Task, plain: Task) -> Task:
    """Add the measured reference returns to a task whose options are those they were measured with."""
    entry = reference_scores().get(found.name)
    if isinstance(entry, str):  # the name of its mirror image
        entry = reference_scores()[entry]
    if entry is None or found.reference is not None or found.options != plain.options:
        return found
    return dataclasses.replace(found, reference=(entry["random"], entry["expert"]))


def task(name: str, **options) -> Task:
    """Return the task of a name. options: fields of the task, as in `Task.options`.

    What the name fixes (an angle) may be repeated, so `task(name, **task(name).options)` works. Reference returns
    are known for what was measured, under the task's own options: with others there are none.
    An unknown name raises InputError with the near names, an unknown option with the known ones.
    """
    for template, builder in _BUILDERS.items():
        pattern = re.sub(r"<\w+>", lambda _: _NUMBER, template)
        match = re.fullmatch(pattern, name)
        if match:
            known = task_options(name)
            chosen = {key: options[key] for key in options if key in known}
            found = builder(name, *map(_number, match.groups()), **chosen)
            told = [k for k in options if k not in found.options or found.options[k] != options[k]]
            check_options(name, {k: options[k] for k in told}, known)
            return _with_reference(found, builder(name, *map(_number, match.groups())))
    raise InputError(_unknown(name))


def task_options(name: str) -> tuple[str, ...]:
    """Return the names of the options a task takes; none for an unknown name."""
    for template, builder in _BUILDERS.items():
        if re.fullmatch(re.sub(r"<\w+>", lambda _: _NUMBER, template), name):
            parameters = inspect.signature(builder).parameters.values()
            bound = getattr(builder, "keywords", {})
            return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in bound)
    return ()


def check_options(name: str, options: dict, known: tuple[str, ...]) -> None:
    """Raise InputError for an option that is not among the known ones."""
    unknown = sorted(set(options) - set(known))
    if unknown:
        offer = ", ".join(known) if known else "none"
        raise InputError(f"'{name}' has no option {', '.join(unknown)}; its options: {offer}")


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, task_names(), n=5, cutoff=0.5)
    hint = f"; near names: {', '.join(near)}" if near else ""
    known = ", ".join((*_BUILDERS, "brax/<name>"))
    return f"no environment or task is called '{name}'{hint}; all: {known}"
