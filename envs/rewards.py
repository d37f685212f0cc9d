"""A reward function of the user's own: `file.py:function`, of NumPy arrays (s, a, s'), for data and for evaluation.

    def reward(s, a, s2):      # float32 arrays [N, S], [N, A], [N, S] of a world's raw observations
        return -abs(s2[:, 0])  # -> [N]

A file of data never names what runs: whoever reads it says --task-reward, and its sha256 must be the recorded one.
"""

import dataclasses
import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from envs import host
from envs.errors import InputError, said
from envs.task import Task

COMPARED = 8  # rows that are also given one by one: what a row earns must not depend on the others


@dataclasses.dataclass(frozen=True)
class RewardFunction:
    """name: "file.py:function", without folders; sha256: of the file; function(s, a, s') -> [N]."""

    name: str
    sha256: str
    function: Callable

    @property
    def called(self) -> str:
        return self.name.rpartition(":")[2]

    @property
    def about(self) -> dict[str, str]:
        """What a buffer's metadata keep of it."""
        return {"name": self.name, "sha256": self.sha256}

    def __call__(self, observations, actions, next_observations) -> np.ndarray:
        """Return rewards (...,) float32 of arrays (..., S), (..., A), (..., S); InputError where it cannot."""
        lead = observations.shape[:-1]
        rows = [np.asarray(x, np.float32).reshape(-1, x.shape[-1]) for x in (observations, actions, next_observations)]
        found = self._of(rows)
        for i in range(min(COMPARED, len(found)) if len(found) > 1 else 0):
            alone = self._of([x[i : i + 1] for x in rows])[0]
            if not np.isclose(alone, found[i], rtol=1e-4, atol=1e-5):
                raise InputError(
                    f"--task-reward {self.name}: row {i} earns {found[i]:.6g} among others and {alone:.6g} alone. "
                    "Remedy: sum over the last axis only (axis=-1), and draw no random numbers"
                )
        return found.reshape(lead)

    def _of(self, rows) -> np.ndarray:
        for x in rows:
            x.flags.writeable = False
        try:
            found = np.asarray(self.function(*rows))
        except Exception as error:  # whatever the user's code raises
            shapes = ", ".join(str(list(x.shape)) for x in rows)
            problem = f"raised {said(error)}, given arrays {shapes}"
            raise InputError(f"--task-reward {self.name}: {problem}") from error
        wanted = (len(rows[0]),)
        if found.shape != wanted or found.dtype.kind not in "fiub":
            raise InputError(
                f"--task-reward {self.name}: returned {found.dtype} of shape {list(found.shape)} for {wanted[0]} rows. "
                f"Remedy: one number a row, shape {list(wanted)}, for example by .sum(-1)"
            )
        found = found.astype(np.float32)
        if not np.isfinite(found).all():
            row = int(np.argmin(np.isfinite(found)))
            raise InputError(f"--task-reward {self.name}: returned {found[row]} in row {row} of {len(found)}")
        return found


def read(word: str) -> RewardFunction:
    """Read "path/to/file.py:function"; the file is run. InputError where there is no such function."""
    path, _, name = word.rpartition(":")
    file = Path(path)
    if not path.endswith(".py") or not name.isidentifier():
        raise InputError(f"--task-reward {word}: is not file.py:function")
    if not file.is_file():
        raise InputError(f"--task-reward {word}: there is no file {file}")
    here = str(file.resolve().parent)
    if here not in sys.path:
        sys.path.append(here)  # it may import its neighbours
    spec = importlib.util.spec_from_file_location(f"task_reward_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        raise InputError(f"--task-reward {word}: {file} ended with {said(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise InputError(f"--task-reward {word}: {file} has no function '{name}', only {', '.join(names) or 'none'}")
    return RewardFunction(f"{file.name}:{name}", hashlib.sha256(file.read_bytes()).hexdigest(), function)


def paid_by(task: Task, function: RewardFunction | str) -> Task:
    """Return the task with another reward, of a function or of "file.py:function"; "": the task as it is.

    No reference returns are left: they were measured with its own reward.
    """
    if not function:
        return task
    function = read(function) if isinstance(function, str) else function

    def reward(step):
        arrays = step.observations, step.actions, step.next_observations
        if any(isinstance(x, jax.core.Tracer) for x in arrays):
            shape = jax.ShapeDtypeStruct(arrays[0].shape[:-1], jnp.float32)
            return jax.pure_callback(on_host, shape, *arrays, vmap_method="broadcast_all")
        return function(*arrays)

    def on_host(*arrays):
        for x in arrays if host.one_thread() else ():
            host.wait_for(x, f"--task-reward {function.name}")
        return function(*arrays)

    return dataclasses.replace(
        task, reward=reward, has_reward=True, model_reward=None, reference=None, paid_by=function
    )


def of_data(metadata: dict[str, Any], path: str, task: Task, word: str) -> Task:
    """Return the task that data are judged by: with the reward function that made their rewards, if one did.

    word: --task-reward. InputError where it is not the function of the metadata, or where either is missing.
    """
    about = metadata.get("reward_function")
    if not about and not word:
        return task
    named = str(about.get("name") if isinstance(about, dict) else about)
    if not word:
        raise InputError(
            f"{path}: its rewards are of the function {named!a}, and an evaluation must pay the same: add "
            "--task-reward with the path of that file, such as --task-reward file.py:function"
        )
    function = read(word)
    known = about.get("sha256") if isinstance(about, dict) else None
    if (known, named.rpartition(":")[2]) != (function.sha256, function.called):
        made = f"of {named!a}, or its file has changed since" if about else "of no function"
        raise InputError(
            f"{path}: --task-reward {word}: the file's rewards are {made}. Remedy: relabel it, udg_select.py "
            f"--task {task.name} --task-reward {word}" + ("" if about else ", or leave --task-reward out")
        )
    return paid_by(task, function)
