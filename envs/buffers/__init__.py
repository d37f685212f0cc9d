"""Buffer files: read, check, write. The contract is docs/buffer.md.

A buffer is one flat `.npz`: per-transition columns of N rows, per-episode arrays of E rows and `metadata_json`. Columns
of an uncompressed file are memory-mapped, so that a file may be larger than the memory and reading one key costs only
that key. Nothing is ever unpickled, nothing in a file is evaluated or used as a path.

    buffer = envs.buffers.load("runs/wurl_sac/ant/seed0/buffers/policy_00.npz")
    buffer["observations"], buffer.metadata["env"], len(buffer), buffer.num_episodes
    envs.buffers.save("mine.npz", arrays, metadata)
    envs.buffers.from_arrays({"observations": .., "actions": .., "rewards": .., "terminals": ..}, "mine.npz")

    python -m envs.buffers inspect FILE [--figure out.png]
"""

from envs.buffers.checks import check_raw_columns, check_raw_rewards, validate
from envs.buffers.fields import (
    ACTION_LIMIT,
    COLUMNS,
    EPISODE_KEYS,
    METADATA,
    METADATA_DEFAULTS,
    METADATA_TYPES,
    REQUIRED,
    SCHEMA,
    SCHEMA_VERSION,
    STRUCTURE,
    Buffer,
    fail,
)  # fmt: skip
from envs.buffers.files import available_memory, check_is_file, find, sha256, write_npz
from envs.buffers.reading import digests, import_command, load, load_task, read_metadata
from envs.buffers.scale import Sight, angle_columns, column_scale, standard_scale, turned
from envs.buffers.writing import git_commit, save, versions

from envs.buffers.convert import from_arrays  # isort: skip  (it uses all of the above)

__all__ = [
    "ACTION_LIMIT", "COLUMNS", "EPISODE_KEYS", "METADATA", "METADATA_DEFAULTS", "METADATA_TYPES", "REQUIRED", "SCHEMA",
    "SCHEMA_VERSION", "STRUCTURE", "Buffer", "Sight", "angle_columns", "available_memory", "check_is_file",
    "check_raw_columns", "check_raw_rewards", "column_scale", "digests", "fail", "find", "from_arrays", "git_commit",
    "import_command", "load", "load_task", "read_metadata", "save", "sha256", "standard_scale", "turned", "validate",
    "versions", "write_npz",
]  # fmt: skip
