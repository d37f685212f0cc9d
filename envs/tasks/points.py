"""Tasks of the point robots: the open plane and the maze."""

import dataclasses

from envs.errors import InputError
from envs.task import Task
from envs.tasks.parts import along, float32, identity, never, no_reward, on_next, xy_of_next

POINT_DT = 0.1
TREE_DT = 0.33


def point_world(name: str = "point") -> Task:
    """FreeRun: raw observation (x, y, vx, vy), unbounded plane."""
    return Task(
        name=name, env="point", observation_size=4, env_observation_size=4, action_size=2,
        dt=POINT_DT, episode_length=100, eval_length=100, observe=identity, reward=no_reward,
        terminal=on_next(never), feature=xy_of_next, feature_names=("x", "y"),
        has_reward=False, model_terminal=never,
    )  # fmt: skip


def point_angle(name: str, angle_deg: float) -> Task:
    """Velocity along a direction; |v| <= 1, so a return is below 100."""
    return dataclasses.replace(
        point_world(name),
        reward=lambda step: float32(along(step.root_velocities, angle_deg)),
        has_reward=True,
        model_reward=lambda obs, actions, next_obs: float32(along(next_obs[..., 2:], angle_deg)),
        options={"angle_deg": angle_deg},
    )


def point_goal(name: str, angle_deg: float, *, threshold: float = 4.0) -> Task:
    """1 for every step that ends beyond the line p . direction = threshold, else 0."""

    def beyond(observations):
        return float32(along(observations, angle_deg) > threshold)

    return dataclasses.replace(
        point_world(name),
        reward=on_next(beyond),
        has_reward=True,
        model_reward=lambda obs, actions, next_obs: beyond(next_obs),
        options={"angle_deg": angle_deg, "threshold": threshold},
    )


def tree_maze(name: str = "tree-maze") -> Task:
    """A box with a trunk that branches; raw observation (x, y, vx, vy), reward-free."""
    return dataclasses.replace(point_world(name), env="tree-maze", dt=TREE_DT)


TREE_ENDS = ((0.1, 1.9), (0.7, 1.9), (1.3, 1.9), (1.9, 1.9))  # the four dead ends, from left to right


def tree_end(name: str, number: float) -> Task:
    """Minus the straight distance to dead end 1 to 4: blind to the walls, it can point into the wrong branch."""
    if number not in (1, 2, 3, 4):
        raise InputError(f"no environment or task is called '{name}': the maze has dead ends 1 to 4")
    x, y = TREE_ENDS[int(number) - 1]

    def reward(observations):
        return float32(-(((observations[..., 0] - x) ** 2 + (observations[..., 1] - y) ** 2) ** 0.5))

    return dataclasses.replace(
        tree_maze(name),
        reward=on_next(reward),
        has_reward=True,
        model_reward=lambda obs, actions, next_obs: reward(next_obs),
        options={"end": int(number)},
    )
