"""Episodes on their way to a buffer: row files that grow while a run goes on, cut back when it is resumed.

A run appends every step of every policy here, one file of fixed-width rows per policy, because an npz cannot grow.
`finish` makes the buffers (docs/buffer.md) of them.
"""

import contextlib
import os
from pathlib import Path

import numpy as np

from envs import buffers
from envs.errors import InputError


class EpisodeFiles:
    """`folder`/policy_XX.rows for each of `policies`; `counts` (rows in each) belongs into a run's saved state."""

    def __init__(self, folder, policies, observation_size, action_size, counts=None, goals=False):
        """Open, and cut every file to its of the `counts` of all policies (None: empty); InputError where too short.

        goals: the world's episodes have one, which is kept.
        """
        wide, float32 = lambda n: (np.float32, (n,)), np.float32
        self.dtype = np.dtype(
            [
                ("observations", *wide(observation_size)),
                ("actions", *wide(action_size)),
                ("rewards", float32),
                ("next_observations", *wide(observation_size)),
                ("terminals", bool),
                ("timeouts", bool),
                ("root_positions", *wide(2)),
                ("root_velocities", *wide(2)),
                ("pseudo_rewards", float32),
                ("action_log_probs", float32),
                *([("goals", *wide(2))] if goals else []),
            ]
        )
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.policies = list(policies)
        self.paths = [self.folder / f"policy_{k:02d}.rows" for k in self.policies]
        self.counts = [counts[k] if counts else 0 for k in self.policies]
        for path, count in zip(self.paths, self.counts, strict=True):
            size = path.stat().st_size if path.exists() else 0
            if size < count * self.dtype.itemsize:
                raise InputError(
                    f"{path}: holds fewer than {count} rows: the file was cut; start a new run with another --out"
                )
            with open(path, "ab") as file:
                file.truncate(count * self.dtype.itemsize)

    def append(self, transition, terminals, alive, **columns):
        """Add the steps that happened, episode after episode.

        transition: envs.Transition of [R, K, N, L, ..]; terminals, alive [R, K, N, L] bool; columns: rewards,
        pseudo_rewards, action_log_probs [R, K, N, L]. R rounds of N episodes of at most L steps, K policies;
        an episode that is still alive in its last column is cut there (timeout).
        """
        last = np.arange(alive.shape[-1]) == alive.shape[-1] - 1
        columns |= dict(
            observations=transition.observations,
            actions=transition.actions,
            next_observations=transition.next_observations,
            root_positions=transition.root_positions,
            root_velocities=transition.root_velocities,
            terminals=terminals,
            timeouts=alive & ~terminals & last,
            goals=transition.goals,
        )
        for k, path in enumerate(self.paths):
            rows = np.empty(alive[:, k].sum(), self.dtype)
            for name in self.dtype.names:
                rows[name] = np.asarray(columns[name])[:, k][alive[:, k]]
            try:
                with open(path, "ab") as file:
                    file.write(rows.tobytes())
                    file.flush()
                    os.fsync(file.fileno())  # before the state that counts them
            except OSError as error:
                remedy = "free space, then go on with --resume"
                raise InputError(f"{path}: cannot be written ({error.strerror}); {remedy}") from None
            self.counts[k] += len(rows)

    def finish(self, folder, metadata, warmup, drop=()):
        """Write `folder`/policy_XX.npz of every file, without the columns `drop`.

        metadata: of all; warmup: of all policies, how many of its first rows were made by random actions.
        """
        for k, path in zip(self.policies, self.paths, strict=True):
            rows = np.memmap(path, self.dtype, "r")  # never empty: a run begins with its warm-up
            names = [name for name in self.dtype.names if name not in drop]
            arrays = {name: np.ascontiguousarray(rows[name]) for name in names}
            own = {"policy_id": k, "warmup_transitions": warmup[k]}
            buffers.save(Path(folder) / f"{path.stem}.npz", arrays, {**metadata, **own})

    def remove(self):
        """Delete the row files and, after the last of them, their folder, once the buffers are whole."""
        for path in self.paths:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another process has files here
            self.folder.rmdir()
