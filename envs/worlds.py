"""What a name stands for: its task, and its environment on a physics back end.

An engine is imported only when a world that needs it is made.
"""

import contextlib
import dataclasses
import os
import sys

from envs import point, tasks
from envs.base import Env
from envs.errors import InputError
from envs.imports import check_imported
from envs.own import OPTIONS as OWN_OPTIONS
from envs.registered import is_registered, make_registered, registered_task
from envs.rewards import paid_by
from envs.task import Task
from envs.tasks import check_options


@contextlib.contextmanager
def with_mujoco():
    """Turn what MuJoCo raises when it is imported under a MUJOCO_GL that does not work into one InputError.

    It loads the library for pictures at once, though only rendering needs it.
    """
    try:
        yield
    except InputError:
        raise
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        chosen = os.environ.get("MUJOCO_GL")
        if not chosen or "envs.physics" in sys.modules:
            raise
        if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith(("OpenGL", "glfw")):
            raise  # MuJoCo itself, or something else that it needs
        raise InputError(
            f"MUJOCO_GL={chosen}: MuJoCo cannot load that OpenGL ({type(error).__name__}). Remedy: unset MUJOCO_GL or "
            "set MUJOCO_GL=disable (only pictures need it), or install its library (Debian: libosmesa6 for osmesa, "
            "libegl1 for egl)"
        ) from None


def task(name: str, **options) -> Task:
    """Return the task of a name. options: fields of the task, as in `Task.options`.

    The numbers in a name (an angle) may be repeated as options, so `task(name, **task(name).options)` works. Reference
    returns are known for measured tasks under their own options only. An unknown name raises InputError with the near
    names, an unknown option with the known ones. A name with a module, "my_worlds:cart" or "gym:my_worlds:Cart-v0",
    imports it.
    """
    if name.startswith("brax/"):
        with with_mujoco():
            from envs.brax_worlds import brax_task

        return brax_task(name, **options)
    if name.startswith("gym:"):
        from envs.gymnasium_worlds import gym_task

        return gym_task(name, **options)
    if is_registered(name):
        return registered_task(name, **options)
    return tasks.task(name, **options)


def task_of_file(name: str, **options) -> Task:
    """Return the task that a file names: as `task`, but no module is imported for it (InputError)."""
    check_imported(name)
    return task(name, **options)


def task_options(name: str) -> tuple[str, ...]:
    """Return the names of the options a task takes; none for an unknown name."""
    if name.startswith("gym:") or is_registered(name):
        return OWN_OPTIONS
    return tasks.task_options(name)


def is_own(name: str) -> bool:
    """Return whether a name is of a world with a reward and an end of its own, and no root (envs/own.py)."""
    return name.startswith(("gym:", "brax/")) or is_registered(name)


def make(name: str | Task, backend: str | None = None, **options) -> Env:
    """Make the environment of a world or task name, or of a Task with the options that it has.

    backend: "mujoco" (C MuJoCo, the default on a CPU), "mjx" (the default elsewhere) or "warp" for the
        MuJoCo robots, one of brax's for brax/<name>, None or "jax" for the point robots and registered
        environments, None or "gymnasium" for gym:<name>.
    options: fields of the task (`Task.options`), and for the MuJoCo robots the arguments of
        `envs.physics.MujocoEnv`: xml, gear, margin_scale, contact_cost, num_threads, num_contacts.
    Unknown names, back ends and options raise InputError.
    """
    if isinstance(name, Task) and not name.eval_length:
        from envs.unknown import UnknownEnv

        return UnknownEnv(name)
    if isinstance(name, Task):
        env = make(
            name.name, backend, **{k: v for k, v in name.options.items() if k in task_options(name.name)} | options
        )
        if name.paid_by:
            env.task = paid_by(env.task, name.paid_by)
        return env
    backend = None if backend == "auto" else backend
    if name.startswith("brax/"):
        with with_mujoco():
            from envs.brax_worlds import BraxEnv

        return BraxEnv(name, backend, **options)
    if name.startswith("gym:"):
        from envs.gymnasium_worlds import GymEnv

        return GymEnv(name, backend, **options)
    if is_registered(name):
        return make_registered(name, backend, **options)
    chosen = task(name, **{k: v for k, v in options.items() if k in task_options(name)})
    if chosen.env in point.WORLDS:
        check_options(name, options, task_options(name))
        if backend not in (None, "jax"):
            raise InputError(f"'{name}' has one back end, 'jax'; asked for '{backend}'")
        return point.WORLDS[chosen.env](chosen)
    with with_mujoco():
        from envs import physics

    check_options(name, options, task_options(name) + physics.OPTIONS)
    own = {key: value for key, value in options.items() if key in physics.OPTIONS}
    return physics.MujocoEnv(chosen, backend, **own)


def world_of(chosen: Task, backend: str | None = None) -> Env:
    """Make the world of a task: raw observations, from which all its tasks can be paid, and the task's gear.

    Episodes end where the task ends them, also where the world alone would go on.
    """
    physical = {k: v for k, v in chosen.options.items() if k in task_options(chosen.env)}
    env = make(task(chosen.env, **physical), backend)
    if chosen.name != chosen.env:
        env.task = dataclasses.replace(env.task, terminal=chosen.terminal)
    return env
