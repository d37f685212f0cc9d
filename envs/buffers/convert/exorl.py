"""Episodes of ExORL and URLB: a folder of npz files, each an episode of T + 1 rows as dm_control's time steps came.

Row 0 is the reset: its observation counts, its action, reward and discount do not. Row t has the action that led to
its own observation, the reward for it, and discount 0 where the task ended there. `physics`, the simulator's state of
every row, is kept as a column of the state before the step, since ExORL computes the rewards of other tasks from it.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from envs.buffers.convert import common
from envs.buffers.files import check_fits

NEEDED = ("observation", "action", "reward", "discount")


def find_episodes(folder: Any) -> list[Path]:
    """The episodes in a folder, or in its `buffer`, in the order of their names. InputError where there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise common.fail(folder, "folder", "is no folder", "name the folder that holds the episodes, one npz each")
    inner = folder / "buffer" if (folder / "buffer").is_dir() else folder
    found = sorted(inner.glob("*.npz"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.stem)] or [0])
    if not found:
        raise common.fail(folder, "folder", "holds no episodes (*.npz)", "name ExORL's folder `buffer`")
    return found


def _episode(path: Path) -> dict[str, np.ndarray]:
    """The rows of one file, checked for keys and lengths."""
    arrays = common.read_npz(path)
    for key in NEEDED:
        if key not in arrays:
            problem = f"is missing; the file holds {', '.join(list(arrays)[:20]) or 'nothing'}"
            raise common.fail(path, key, problem, "check that this is an episode of ExORL; docs/data.md lists its keys")
    rows = len(arrays["observation"]) if arrays["observation"].ndim else 0
    for key in (*NEEDED, *("physics",) * ("physics" in arrays)):
        rank = 1 if key in ("reward", "discount") else 2
        plain = arrays[key][:, 0] if rank == 1 and arrays[key].ndim == 2 else arrays[key]
        if plain.ndim != rank or not rows or len(plain) != rows:
            problem = f"has the shape {arrays[key].shape}, observation has {rows} rows"
            raise common.fail(path, key, problem, "only whole episodes of vectors can be converted, no images")
        arrays[key] = common.to_float32(path, key, plain)
    return arrays


def read(
    folder: Any, name: str | None = None, dt: float | None = None, episode_length: int | None = None
) -> common.Imported:
    """Read a folder of episodes as `envs.buffers.convert.from_exorl` says -> Imported. Raises InputError."""
    paths = find_episodes(folder)
    size = sum(path.stat().st_size for path in paths)
    check_fits(folder, 3 * size, "convert a part of the folder, or on a machine with more memory")
    parts: dict[str, list[np.ndarray]] = {}
    sizes, lengths, empty = None, [], 0
    for path in paths:
        episode = _episode(path)
        shape = {key: episode[key].shape[1:] for key in ("observation", "action", "physics") if key in episode}
        sizes = sizes or shape
        if shape != sizes:
            raise common.fail(
                path, "observation", f"rows are {shape}, in {paths[0].name} {sizes}", "name one set's folder"
            )
        steps = len(episode["observation"]) - 1
        if not steps:
            empty += 1
            continue
        last = np.arange(steps) == steps - 1
        terminal = episode["discount"][1:] == 0
        columns = {
            "observations": episode["observation"][:-1], "next_observations": episode["observation"][1:],
            "actions": episode["action"][1:], "rewards": episode["reward"][1:], "terminals": terminal & last,
            "timeouts": last & ~terminal,
        }  # fmt: skip
        if (terminal & ~last).any():
            problem = f"is 0 on row {1 + np.argmax(terminal)} of {steps}, and the episode goes on"
            raise common.fail(path, "discount", problem, "cut the file into episodes there")
        columns |= {"physics": episode["physics"][:-1]} if "physics" in episode else {}
        for key, column in columns.items():
            parts.setdefault(key, []).append(column)
        lengths.append(steps)
    if not lengths:
        raise common.fail(folder, "folder", "holds no episode with a step", "record some steps first")
    arrays = {key: np.concatenate(columns) for key, columns in parts.items()}
    source = Path(folder).resolve()
    words = [part for part in source.parts[1:] if part != "buffer"][-2:]
    name = name or "-".join(words) or "set"
    metadata = {
        "dataset_name": f"exorl/{name}", "env": f"exorl/{name}", "task": None, "layout": "env", "dt": dt,
        "reward_kind": "task" if arrays["rewards"].any() else "none", "reference": None,
        "episode_length": episode_length or max(lengths), "rows_dropped": {},
        "generator": {"script": "exorl", "flags": {}},
        "parents": [{"path": source.name, "sha256": "", "taken": f"{sum(lengths)} rows of {len(lengths)} episodes"}],
    }  # fmt: skip
    notes = [f"{empty} episodes have no step: left out"] * bool(empty)
    return common.Imported(arrays, metadata, None, notes, str(folder))
