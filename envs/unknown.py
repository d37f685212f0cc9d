"""A world that is known by its data alone: a learner can train on them, and nothing can be evaluated."""

import re

from envs.base import Env
from envs.errors import InputError
from envs.task import Task
from envs.tasks import identity


def unknown_task(metadata: dict, observation_size: int, action_size: int) -> Task:
    """The task of data that name none: sizes, and refusals (InputError) in the place of its functions."""
    data = re.sub(r"[^A-Za-z0-9._-]+", "-", metadata["dataset_name"]).strip(".-") or "unnamed"

    def unknown(*_):
        raise InputError(
            f"the data '{data}' name no task, so no world can be stepped in, and no reward or end computed. Remedy: "
            "name a task that is known here in the import; a learner needs none (mopo.py with --reward learned)"
        )

    return Task(
        name=f"data-{data}", env=metadata["env"], observation_size=observation_size,
        env_observation_size=observation_size, action_size=action_size, dt=metadata["dt"] or 1.0,
        episode_length=metadata["episode_length"], eval_length=0, observe=identity, reward=unknown, terminal=unknown,
        feature=unknown, feature_names=(), model_terminal=unknown, knows_end=False,
    )  # fmt: skip


class UnknownEnv(Env):
    """Takes the place of an environment that nobody has: it has the sizes, and refuses to be started."""

    def __init__(self, task: Task):
        super().__init__(task, backend="none")

    def _start(self, *_):
        return self.task.reward()

    _advance = _read = _start
