"""Tasks of Gymnasium and D4RL: forward as far as possible, and mazes."""

import dataclasses

from envs import maze
from envs.errors import InputError
from envs.robots import ROBOTS
from envs.task import Task
from envs.tasks.parts import along, float32, never, on_next, square, xy_of_next
from envs.tasks.robots import cheetah_world, robot_world


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
        speed = along(step.root_velocities, angle_deg) if angle_deg else step.root_velocities[..., 0]
        pay = speed_weight * speed - ctrl_cost * square(step.actions)
        alive = 1.0 if survive_on_done else ~terminal(step.next_observations)
        return float32(pay + survive_bonus * alive)

    return robot_world(
        name or robot, robot, reward=reward, has_reward=True, episode_length=1000,
        terminal=on_next(terminal), model_terminal=terminal,
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


def d4rl(name: str) -> Task:
    """Forward velocity - cost + bonus, the bonus also on the step that ends an episode."""
    robot, ctrl_cost, bonus, reference = D4RL[name]
    task = forward_task(robot, name, ctrl_cost=ctrl_cost, survive_bonus=bonus)
    if robot == "cheetah":  # diversity is measured as in the other tasks of this world
        world = cheetah_world()
        same = {name: getattr(world, name) for name in ("feature", "feature_names", "angles")}
        task = dataclasses.replace(task, **same)
    return dataclasses.replace(task, options={}, reference=reference)


# Gymnasium's tasks that observe contact forces, here without them and without their cost: a weight of the speed, a
# cost of the control (the humanoid's motors reach 0.4), a bonus. "ant-v2" is D4RL's.
GYMNASIUM = {
    "ant-v5": dict(ctrl_cost=0.5, survive_bonus=1.0, survive_on_done=False),
    "ant-v2": dict(ctrl_cost=0.5, survive_bonus=1.0),
    "humanoid-v5": dict(speed_weight=1.25, ctrl_cost=0.1 * 0.4**2, survive_bonus=5.0, survive_on_done=False),
}


def plain(name: str) -> Task:
    """Raw observation qpos[2:], qvel: what Gymnasium's begins with."""
    reference = (-325.6, 3879.7) if name == "ant-v2" else None  # of d4rl/infos.py
    return dataclasses.replace(forward_task(name, **GYMNASIUM[name]), options={}, reference=reference)


def ant_v5_angle(name: str, angle_deg: float) -> Task:
    """Ant-v5 that is paid for going at an angle."""
    task = forward_task("ant-v5", name, **GYMNASIUM["ant-v5"], angle_deg=angle_deg)
    return dataclasses.replace(task, options={"angle_deg": angle_deg})


def ant_maze(name: str) -> Task:
    """1 on the step that ends within 0.5 m of the goal, which ends the episode; the goal is not observed."""

    def at_goal(step):
        if step.goals is None:
            raise InputError(f"'{name}' pays for reaching a goal, and the data has no goals")
        return maze.reached(step.next_observations[..., :2], step.goals)

    def unknown(observations):
        raise InputError(f"'{name}' ends at a goal that its observations do not tell: no model can learn where")

    steps = maze.STEPS[name.removeprefix("ant-maze-")]
    return robot_world(
        name, name, reward=lambda step: float32(at_goal(step)), has_reward=True, terminal=at_goal,
        feature=xy_of_next, episode_length=steps, eval_length=steps, reference=(0.0, 1.0), model_terminal=unknown,
    )  # fmt: skip
