"""The contract of a buffer in code (docs/buffer.md): its keys, its metadata, and the object that holds it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from envs.errors import InputError

SCHEMA = "udg-buffer"
SCHEMA_VERSION = 1

# Per-transition columns: key -> (dtype, row shape; a name stands for a size the file chooses).
COLUMNS = {
    "observations": (np.float32, ("S",)),
    "actions": (np.float32, ("A",)),
    "rewards": (np.float32, ()),
    "next_observations": (np.float32, ("S",)),
    "terminals": (np.bool_, ()),
    "timeouts": (np.bool_, ()),
    "root_positions": (np.float32, (2,)),
    "root_velocities": (np.float32, (2,)),
    "pseudo_rewards": (np.float32, ()),
    "goals": (np.float32, (2,)),
    "action_log_probs": (np.float32, ()),
    "policy_ids": (np.int32, ()),
}
REQUIRED = tuple(list(COLUMNS)[:6])
EPISODE_KEYS = {
    "episode_ends": np.int64,
    "episode_returns": np.float32,
    "episode_lengths": np.int32,
}
EXTRA_DTYPES = (np.float32, np.int32, np.int64, np.bool_)
STRUCTURE = ("terminals", "timeouts", *EPISODE_KEYS)  # always read: they define the episodes
METADATA = "metadata_json"

IMPORTS = ("arrays", "d4rl", "exorl", "minari", "ogbench")  # scripts (metadata, generator) that read others' files
LAYOUTS = ("env", "task")
REWARD_KINDS = ("none", "task", "relabelled")
METADATA_TYPES = {
    "dataset_name": str,
    "env": str,
    "task": (str, type(None)),
    "layout": str,
    "reward_kind": str,
    "task_options": dict,
    "dt": (int, float, type(None)),
    "episode_length": int,
    "generator": dict,
    "warmup_transitions": (int, type(None)),
    "parents": list,
    "num_transitions": int,
    "num_episodes": int,
    "sha256": dict,
}
METADATA_DEFAULTS = {
    "dt": None,
    "task": None,
    "task_options": {},
    "generator": {},
    "seed": None,
    "warmup_transitions": 0,
    "reference": None,
    "parents": [],
}
MERGE_KEYS = ("env", "task", "layout", "reward_kind", "task_options", "dt", "reward_function")

ACTION_LIMIT = 1.0 + 1e-5
BLOCK_BYTES = 1 << 24  # values are checked and hashed in blocks of this size
SAMPLED_ROWS = 8192  # on which next_observations is compared with the next row
LARGEST = 2.0**31  # of the numbers in the metadata that readers compute with
LARGEST_VALUE = 1e15  # of any number in a column: a batch of larger squares overflows in float32
LARGEST_RAW = 1e4  # of observations that networks see as they are
NAMED_COLUMNS = 10  # at most so many in a message
MAX_MEMBERS = 64
MAX_METADATA_BYTES = 1 << 26
MAX_HEADER_BYTES = 10_000  # numpy's own limit on the text header of an array
BOMB_BYTES, BOMB_RATIO = 1 << 26, 100  # real observations compress by less than 10
ALIGNMENT = 64  # of every array in the file, so that mapped data is as fast as memory


def fail(path: Any, key: str, problem: str, remedy: str) -> InputError:
    return InputError(f"{path}: {key}: {problem}. Remedy: {remedy}.")


def missing_column(key: str, metadata: Mapping[str, Any]) -> str:
    """What to do about a column that a buffer lacks."""
    if metadata.get("generator", {}).get("script") not in IMPORTS:
        return "record this column where the buffer is made, and name it if you load some keys only"
    if key.startswith("root_"):
        return 'use data that have it: docs/data.md, "Rewards of a task for an imported file", says which sets do'
    return "use other data: the set that was imported does not hold it"


@dataclass(frozen=True)
class Buffer:
    """A checked buffer: arrays by key (mapped read-only where the file allows), and metadata."""

    arrays: dict[str, np.ndarray]
    metadata: dict[str, Any]
    path: str

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self.arrays:
            raise fail(
                self.path,
                key,
                f"not in the buffer, which has {', '.join(self.arrays)}",
                missing_column(key, self.metadata),
            )
        return self.arrays[key]

    def get(self, key: str, default=None):
        return self.arrays.get(key, default)  # as a dict of arrays has it

    def __len__(self) -> int:
        return len(self.arrays["terminals"])

    @property
    def num_episodes(self) -> int:
        return len(self.arrays["episode_ends"])

    def summary(self) -> str:
        """One line: file, transitions, episodes, mean return, rows dropped and why."""
        returns = self.arrays["episode_returns"].astype(np.float64)
        if self.metadata["reward_kind"] == "none":
            score = "reward-free"
        else:
            score = f"mean return {returns.mean():.2f} (std {returns.std():.2f})"
        dropped = self.metadata.get("rows_dropped", {})
        lost = ", ".join(f"{n!a} rows dropped ({why!a})" for why, n in dropped.items())
        return (
            f"{self.path}: {len(self):,} transitions, {self.num_episodes:,} episodes, {score}, "
            f"{lost or 'no rows dropped'}"
        )
