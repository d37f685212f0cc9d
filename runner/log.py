"""The log of a run: log.jsonl, TensorBoard, Weights & Biases, and the progress line."""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import time

import jax
import numpy as np

import envs
import envs.buffers

LINE_EVERY = 60.0  # seconds between two progress lines in a file


def say(*words):
    """Print at once. A reader that is gone, as `| tee` is after the same Ctrl-C, must not keep a run from saving."""
    with contextlib.suppress(BrokenPipeError):
        print(*words, flush=True)


def with_eta(items, what):
    """Yield the items, and say every five seconds how many are done."""
    began = last = time.time()
    for done, item in enumerate(items):
        if done and time.time() - last > 5:
            last = time.time()
            left = time.gmtime((last - began) / done * (len(items) - done))
            print(f"{what}: {done}/{len(items)}  ETA {time.strftime('%H:%M:%S', left)}", flush=True)
        yield item


def data_told(digests, rows):
    """Which rows a run learns from, for its log's first line: files of one name differ from machine to machine.

    digests: sha256 of each column of runner.DIGESTED.
    """
    return {"rows": rows, "sha256": hashlib.sha256("".join(digests).encode()).hexdigest()[:16]}


def start_wandb(folder, config):
    """A new run of Weights & Biases; InputError where the package or the account is missing."""
    try:
        import wandb

        run = wandb.init(project="udg-jax", dir=str(folder), config=config)
    except ImportError:
        raise envs.InputError("--track: wandb is not installed; pip install wandb") from None
    except wandb.Error as error:
        raise envs.InputError(f"--track: {error} (WANDB_MODE=offline needs no account)") from None
    run.define_metric("*", step_metric="step")  # wandb's own steps may not go back, as those of a second phase do
    return run


class Logger:
    """log.jsonl (first line: the run, then one object per evaluation), TensorBoard, and W&B if asked for.

    `position`: bytes of log.jsonl to keep. A resumed run cuts the file back and shows what is left anew, to TensorBoard
    and as a new run of W&B, so that nothing stands twice and nothing is missing, whichever phase the steps belong to.
    """

    def __init__(self, folder, args, position=0, **about):
        """about: script and task, for the first line."""
        from tensorboardX.event_file_writer import EventsWriter

        header = {**about, "args": dataclasses.asdict(args), "versions": envs.buffers.versions()}
        header |= {"commit": envs.buffers.git_commit(), "device": jax.devices()[0].device_kind}
        header["num_devices"] = jax.device_count()
        self.wandb = start_wandb(folder, header["args"]) if args.track else None
        for events in folder.glob("events.out.tfevents.*") if (folder / "log.jsonl").exists() else ():
            events.unlink()
        self.board = EventsWriter(str(folder / "events"))  # in this thread, so that a full disk is an error here
        self.file = open(folder / "log.jsonl", "r+b" if position else "wb")  # noqa: SIM115
        first, *lines = self.file.read(position).splitlines() if position else [b""]
        for line in lines:
            self.show(json.loads(line))
        self.file.truncate(position)
        if not position:
            self.write(header)
        elif json.loads(first)["args"]["num_updates"] != args.num_updates:
            self.change(first, args.num_updates)

    def change(self, first, num_updates):
        """A run that goes on for longer says so in its first line; as long as before, for states know places behind."""
        header = json.loads(first)
        header["args"]["num_updates"] = num_updates
        line = json.dumps(header, separators=(",", ":")).encode().ljust(len(first))
        if len(line) == len(first):  # the spaces that the first line was written with are more than any number
            self.file.seek(0)
            self.file.write(line)
            self.file.seek(0, os.SEEK_END)

    def write(self, record):
        self.file.write(json.dumps(record).encode() + b"\n")
        self.file.flush()

    def position(self):
        """Bytes of the log by now, all of them on the disk."""
        os.fsync(self.file.fileno())
        return self.file.tell()

    def show(self, record):
        """A record's numbers, named with its labels, to TensorBoard and W&B."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        labels = "".join(f"/{k}{v}" for k, v in record.items() if "/" not in k and k != "step")
        scalars = {k + labels: v for k, v in record.items() if "/" in k and np.ndim(v) == 0}
        for name, value in scalars.items():
            event = Event(wall_time=time.time(), step=record["step"], summary=scalar(name, value))
            self.board.write_event(event)
        self.board.flush()
        if self.wandb:
            self.wandb.log({**scalars, "step": record["step"]})

    def log(self, step, metrics, **labels):
        """One record at `step` updates; metrics: name -> number or list of numbers; labels such as seed=0."""
        six_digits = np.vectorize(lambda x: float(f"{x:.6g}"), otypes=[float])
        metrics = {k: six_digits(np.asarray(v, np.float64)).tolist() for k, v in metrics.items()}
        record = {"step": step, **labels, **metrics}
        self.write(record)
        self.show(record)


class Progress:
    """How far a loop is: one live line in a terminal; in a file a line a minute, and one at the end."""

    def __init__(self, label, total, start):
        self.label, self.total, self.bar, self.told = label, total, None, 0.0
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn

            columns = TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[numbers]}")
            self.bar = Progress(*columns, auto_refresh=False)
            self.task = self.bar.add_task(label, total=total, completed=start, numbers="")
            self.bar.start()

    def show(self, count, rate, metrics, last=False):
        """`label count/total (p%)  rate  ETA  metrics`, rate in counts per second; last: the loop ends here."""
        left = int((self.total - count) / max(rate, 1e-9))
        eta = f"{left // 3600:02d}:{left // 60 % 60:02d}:{left % 60:02d}"
        numbers = "  ".join(f"{k.split('/')[-1]} {float(v):.4g}" for k, v in metrics.items())
        line = f"{count}/{self.total} ({count / self.total:.0%})  {rate:.4g}/s  ETA {eta}  {numbers}"
        if self.bar:
            self.bar.update(self.task, completed=count, numbers=line, refresh=True)
        elif last or time.time() - self.told >= LINE_EVERY:
            say(f"{self.label} {line}")
            self.told = time.time()

    def close(self):
        if self.bar:
            self.bar.stop()
