"""Callbacks of jitted programs: arguments that jax hands over in its own time, and errors that it wraps up."""

import logging
import os
import time
from pathlib import Path

import jax

from envs.errors import InputError

PATIENCE = 10.0  # seconds for jax to hand over arguments, which takes milliseconds or never ends


def affinity() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores() -> int:
    """Return how many cores this process may keep busy, by affinity, NPROC and a container's quota."""
    num, told = affinity(), os.environ.get("NPROC", "")
    num = min(num, int(told)) if told.isdecimal() else num
    for files in ("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"):  # Linux's control groups 2 and 1
        try:
            quota, period = " ".join(Path(f"/sys/fs/cgroup/{file}").read_text() for file in files).split()
            num = min(num, int(quota) // int(period)) if int(quota) > 0 else num
        except (OSError, ValueError):  # no container, or no quota: max
            pass
    return max(num, 1)


def one_thread() -> bool:
    """Return whether jax has one thread to copy arguments with, and a callback takes it."""
    return affinity() == 1 and "NPROC" not in os.environ


def wait_for(packed: jax.Array, what: str) -> None:
    """Refuse (InputError) to wait for ever: jax copies over some 100 KB in a pool, whose one thread is here."""
    until = time.monotonic() + PATIENCE
    while not packed.is_ready():
        if time.monotonic() > until:
            raise InputError(
                f"{packed.size // packed.shape[-1]} environments of {what} at once on one core: jax cannot hand "
                "them over. Set NPROC=2 in the environment (jax's threads), or let it have a second core"
            )
        time.sleep(1e-3)


def cause(error: Exception) -> str:
    """Return what an InputError said that was raised in a callback and that jax made another error of; "" for none."""
    _, found, said = str(error).rpartition("InputError: ")
    return said.strip() if found else ""


# jax logs the whole traceback of what a callback raises, and raises it; of an InputError once is enough.
logging.getLogger("jax._src.callback").addFilter(
    lambda record: not (record.exc_info and isinstance(record.exc_info[1], InputError))
)
