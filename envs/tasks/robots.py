"""UDG's tasks of MuJoCo's robots: the slow ant, the cheetah, the humanoid."""

import dataclasses

from envs.robots import ROBOTS
from envs.task import Task
from envs.tasks.parts import along, float32, identity, never, next_root, no_reward, on_next, square, xp_of, xy_of_next


def robot_world(name: str, robot: str, **fields) -> Task:
    spec = ROBOTS[robot]
    defaults = dict(
        name=name, env=robot, observation_size=spec.observation_size,
        env_observation_size=spec.observation_size, action_size=spec.action_size, dt=spec.dt,
        episode_length=200, eval_length=1000, observe=identity, reward=no_reward,
        terminal=on_next(never), feature=lambda step: next_root(step, spec.dt),
        feature_names=("x", "y"), has_reward=False, model_terminal=never,
    )  # fmt: skip
    return Task(**{**defaults, **fields})


def ant_world(name: str = "ant", *, gear: float = 30.0) -> Task:
    """Gear 30 makes the ant slow and steady; raw observation qpos (15, with x, y), qvel (14)."""
    return robot_world(name, "ant", feature=xy_of_next, options={"gear": gear})


def ant_angle(
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
        pay = along(step.root_velocities, angle_deg) - cost * square(step.actions)
        return float32(pay + survive_bonus)

    def fallen(observations):
        return ~ROBOTS["ant-v5"].healthy(observations)

    world = ant_world(name, gear=gear)
    ends = fallen if terminate else never
    return dataclasses.replace(
        world,
        observation_size=world.env_observation_size - 2,
        observe=drop_xy,
        reward=reward,
        has_reward=True,
        terminal=lambda step: ends(drop_xy(step.next_observations)),
        model_terminal=ends,
        options={
            "angle_deg": angle_deg, "gear": gear, "ctrl_cost": cost,
            "survive_bonus": survive_bonus, "terminate": terminate,
        },
    )  # fmt: skip


def drop_xy(observations):
    return observations[..., 2:]


def ant_open(name: str = "ant-open") -> Task:
    """D4RL's ant as in its mazes, on the open plane and at any heading: raw observation as of `ant`."""
    return robot_world(name, "ant-open", feature=xy_of_next)


def ant_open_angle(name: str, angle_deg: float) -> Task:
    """As ant-angle-<deg>; its policy drives the mazes (maze.as_ahead)."""
    return dataclasses.replace(ant_angle(name, angle_deg), env="ant-open", dt=ROBOTS["ant-open"].dt)


def cheetah_world(name: str = "cheetah") -> Task:
    """Raw observation qpos[1:] (8: z - nominal z, pitch, joints), qvel (9); x is not observed."""

    def feature(step):
        xp = xp_of(step.next_observations)
        return xp.stack([step.root_velocities[..., 0], step.next_observations[..., 0]], axis=-1)

    return robot_world(name, "cheetah", feature=feature, feature_names=("x velocity", "z"), angles=(1,))


def cheetah_run(name: str, c_z: float = 0.0, *, ctrl_cost: float = 0.1, max_speed: float = 3.0) -> Task:
    """min(v_x, max_speed) - ctrl_cost ||a||^2 + c_z (z - nominal z)."""

    def reward(step):
        speed = xp_of(step.root_velocities).minimum(step.root_velocities[..., 0], max_speed)
        height = step.next_observations[..., 0]
        return float32(speed - ctrl_cost * square(step.actions) + c_z * height)

    return dataclasses.replace(
        cheetah_world(name),
        reward=reward,
        has_reward=True,
        options={"c_z": c_z, "ctrl_cost": ctrl_cost, "max_speed": max_speed},
    )


def humanoid_world(name: str = "humanoid") -> Task:
    """Raw observation qpos[2:] (22), qvel (23); an episode ends unless 1 < z < 2."""

    def fallen(observations):
        return ~ROBOTS["humanoid-v5"].healthy(observations)

    return robot_world(name, "humanoid", episode_length=1000, terminal=on_next(fallen), model_terminal=fallen)
