"""A run's files: its states' names, texts written whole or not at all, a full disk. No JAX: the report has none."""

import contextlib
import errno
import os

from envs.errors import InputError

STATES = ("state.new.npz", "state.npz", "state.prev.npz")  # newest first; a kill came before the first had its name


def write_whole(path, text):
    """Write a text file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def full_disk(error, folder):
    """What to say of an error that ends the run of `folder`, where a full disk is behind it; else ""."""
    cause = error if isinstance(error, OSError) else getattr(error, "__context__", None)
    if getattr(cause, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) or "--resume" in str(error):
        return ""
    said = f"{cause.filename or folder}: cannot be written ({cause.strerror})"
    said = str(error).partition(". Remedy: ")[0] if isinstance(error, InputError) else said  # it names the file
    return f"{said}; free space, then go on with --resume"


def amount(size):
    """Bytes in words: 1.2 MB, 84.3 GB."""
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"
