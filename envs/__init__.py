"""Worlds, tasks and data files. Nothing here learns.

env = envs.make("ant-angle-60")        an environment to `vmap`, `jit` and `scan`
task = envs.task("ant-angle-60")       its observation, reward and termination, for buffers
buffer = envs.buffers.load(path)       a file of transitions
envs.register("cart", Cart)            an environment of your own (docs/environments.md)
"""

import importlib

from envs.base import Env, State, check_batch, transition
from envs.errors import InputError
from envs.neighbours import check_runner
from envs.registered import register
from envs.task import Task, Transition
from envs.tasks import task_names
from envs.worlds import make, task, task_options

__all__ = [
    "Env", "InputError", "State", "Task", "Transition", "buffers", "check_batch", "make",
    "register", "task", "task_names", "task_options", "transition",
]  # fmt: skip

check_runner()


def __getattr__(attribute: str):
    if attribute in ("buffers", "figures"):
        return importlib.import_module(f"envs.{attribute}")
    raise AttributeError(f"module 'envs' has no attribute '{attribute}'")
