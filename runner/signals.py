"""SIGTERM and Ctrl-C: a run saves first, and says how to go on."""

import contextlib
import functools
import os
import signal
import sys
from pathlib import Path

AGAIN = "the same command with --resume goes on from what was saved"


def end_at_once(number, frame, again=AGAIN):
    """Handler outside the training loops: says how to go on (`again`) and ends the process, with what was saved.

    It exits directly, without an exception: jax swallows exceptions that are raised in its callbacks, and an orderly
    end crashes while XLA compiles.
    """
    said = f"stopped by {signal.Signals(number).name}; {again}"
    with contextlib.suppress(RuntimeError, OSError, ValueError):  # in the middle of a print, or its reader is gone
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[?25h")  # the cursor, which the live progress line hides
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"{Path(sys.argv[0]).name}: {said}\n".encode())
    os._exit(1)


def listen(again=AGAIN):
    """Let SIGTERM and Ctrl-C end the process at once, until a training loop begins."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, functools.partial(end_at_once, again=again))


class StopSignal:
    """Turns the first SIGTERM or Ctrl-C into `name`, so that a loop can save first; a second one ends at once."""

    def __enter__(self):
        self.name = ""
        self.old = {n: signal.signal(n, self.handle) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def handle(self, number, frame):
        self.name = signal.Signals(number).name
        signal.signal(number, self.old[number])

    def __exit__(self, *exc):
        for number, handler in self.old.items():
            signal.signal(number, handler)
