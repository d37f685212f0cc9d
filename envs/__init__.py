"""Worlds, tasks and data files. Nothing here learns.

    env = envs.make("ant-angle-60")        an environment to `vmap`, `jit` and `scan`
    task = envs.task("ant-angle-60")       its observation, reward and termination, for buffers
    buffer = envs.buffers.load(path)       a file of transitions

An engine is imported only when a world that needs it is made.
"""

import importlib

from envs.base import Env, State, check_batch, transition
from envs.errors import InputError
from envs.neighbours import check_runner
from envs.tasks import Task, Transition, check_options, task, task_names, task_options

__all__ = [
    "Env", "InputError", "State", "Task", "Transition", "buffers", "check_batch", "make", "task",
    "task_names", "transition",
]  # fmt: skip

check_runner()


def make(name: str | Task, backend: str | None = None, **options) -> Env:
    """Make the environment of a world or task name, or of a Task with the options that it has.

    backend: "mujoco" (C MuJoCo, the default on a CPU) or "mjx" (the default elsewhere) for the
        MuJoCo robots, one of brax's for brax/<name>, None or "jax" for the point robots.
    options: fields of the task (`Task.options`), and for the MuJoCo robots the arguments of
        `envs.physics.MujocoEnv`: xml, gear, margin_scale, contact_cost, num_threads.
    Unknown names, back ends and options raise InputError.
    """
    if isinstance(name, Task):
        options = {k: v for k, v in name.options.items() if k in task_options(name.name)} | options
        name = name.name
    backend = None if backend == "auto" else backend
    if name.startswith("brax/"):
        from envs.brax_worlds import BraxEnv

        return BraxEnv(name, backend, **options)
    chosen = task(name, **{k: v for k, v in options.items() if k in task_options(name)})
    from envs import point

    if chosen.env in point.WORLDS:
        check_options(name, options, task_options(name))
        if backend not in (None, "jax"):
            raise InputError(f"'{name}' has one back end, 'jax'; asked for '{backend}'")
        return point.WORLDS[chosen.env](chosen)
    from envs import physics

    check_options(name, options, task_options(name) + physics.OPTIONS)
    own = {key: value for key, value in options.items() if key in physics.OPTIONS}
    return physics.MujocoEnv(chosen, backend, **own)


def __getattr__(attribute: str):
    if attribute in ("buffers", "episodes", "figures"):
        return importlib.import_module(f"envs.{attribute}")
    raise AttributeError(f"module 'envs' has no attribute '{attribute}'")
