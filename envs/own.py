"""The task of a world that brings its own reward and its own end: Gymnasium's, brax's, a user's in JAX.

Its functions return what the world said and a buffer recorded. Such a world has no planar root: root positions and
velocities are zero, and diversity is measured on the whole observation.
"""

from collections.abc import Callable

from envs.errors import InputError
from envs.task import Task
from envs.tasks import identity

OPTIONS = ("episode_length",)  # of a user's and of Gymnasium's


def own_task(
    name: str, sizes: tuple[int, int], dt: float, episode_length: int,
    reward: Callable | None = None, terminal: Callable | None = None, **fields,
) -> Task:  # fmt: skip
    """Return the task of a world called `name`.

    sizes: of observations and actions; reward(s, a, s') -> (...,) and terminal(s') -> (...,) bool: the same in NumPy
    and JAX arrays, where a function gives them; None: the world's own, as recorded. fields: others of Task.
    """

    def recorded_reward(step):
        if step.rewards is None:
            raise InputError(
                f"the reward of '{name}' is its own and cannot be computed from a buffer: use data in which it was "
                "recorded, or a reward function of your own (udg_select.py --task-reward)"
            )
        return step.rewards

    def recorded_terminal(step):
        if step.terminals is None:
            raise InputError(f"when '{name}' ends is its own and cannot be computed from a buffer")
        return step.terminals > 0.5

    def unknown(_):
        raise InputError(
            f"when '{name}' ends is its own and cannot be computed from observations: learn it from data "
            "(runner.learn_end), or use a learner without a model"
        )

    defaults = dict(
        name=name, env=name, observation_size=sizes[0], env_observation_size=sizes[0], action_size=sizes[1],
        dt=dt, episode_length=episode_length, eval_length=episode_length, observe=identity,
        reward=recorded_reward, terminal=recorded_terminal, feature=lambda step: step.next_observations,
        feature_names=tuple(f"observation {i}" for i in range(sizes[0])),
        model_terminal=unknown, knows_end=False,
    )  # fmt: skip
    if reward is not None:
        defaults |= dict(
            reward=lambda step: reward(step.observations, step.actions, step.next_observations), model_reward=reward
        )
    if terminal is not None:
        defaults |= dict(
            terminal=lambda step: terminal(step.next_observations), model_terminal=terminal, knows_end=True
        )
    return Task(**defaults | fields)
