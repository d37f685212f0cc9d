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
import re
from collections.abc import Callable
from pathlib import Path

from envs import maze
from envs.errors import InputError
from envs.task import Task
from envs.tasks import gymnasium, points, robots
from envs.tasks.gymnasium import D4RL, forward_task
from envs.tasks.parts import identity, never
from envs.tasks.points import POINT_DT, TREE_DT

__all__ = [
    "D4RL", "POINT_DT", "TREE_DT", "UDG_ANGLES", "check_options", "forward_task", "identity", "never",
    "reference_scores", "task", "task_names", "task_options",
]  # fmt: skip

UDG_ANGLES = (0, 60, 120, 180, 240, 300)

# name, with <x> for a number handed to the builder; listed before the more general.
_BUILDERS: dict[str, Callable[..., Task]] = {
    "point": points.point_world,
    "point-angle-<deg>": points.point_angle,
    "point-goal-<deg>": points.point_goal,
    "tree-maze": points.tree_maze,
    "tree-maze-end-<n>": points.tree_end,
    "ant": robots.ant_world,
    "ant-angle-<deg>": robots.ant_angle,
    "ant-open": robots.ant_open,
    "ant-open-angle-<deg>": robots.ant_open_angle,
    **dict.fromkeys(gymnasium.GYMNASIUM, gymnasium.plain),
    "ant-v5-angle-<deg>": gymnasium.ant_v5_angle,
    "cheetah": robots.cheetah_world,
    "cheetah-run": robots.cheetah_run,
    "cheetah-jump": functools.partial(robots.cheetah_run, c_z=15.0),
    "cheetah-crawl": functools.partial(robots.cheetah_run, c_z=-15.0),
    "cheetah-jump-<c_z>": robots.cheetah_run,
    "humanoid": robots.humanoid_world,
    **dict.fromkeys(D4RL, gymnasium.d4rl),
    **{f"ant-maze-{name}": gymnasium.ant_maze for name in maze.MAPS},
}
_NUMBER = r"(-?\d+(?:\.\d+)?)"


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if value == int(value) else value


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
    return json.loads((Path(__file__).parents[1] / "reference_scores.json").read_text())["tasks"]


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
