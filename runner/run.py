"""One run: its folder, log, checkpoints, progress, figures and score."""

import contextlib
import dataclasses
import json
import shutil
import sys
import time

import jax
import numpy as np

import envs
import envs.buffers
from runner import devices, plots
from runner.checkpoint import DIGESTED, FREE, fill, flat_arrays, name_state, read_state, save_state
from runner.files import amount, full_disk, write_whole
from runner.flags import announce
from runner.folder import Hold, folder_of, state_files
from runner.log import Logger, Progress, data_told, say
from runner.signals import StopSignal
from runner.value_report import diverged

SAVE_EVERY = 60.0  # seconds between two checkpoints


class Run:
    """A folder that a script writes into, and that --resume goes on from. The phases of a run, such as the fit of a
    model, have folders inside."""

    def __init__(self, script, args, task, buffer=None, gather=None, schedules=None, remedy="", **identity):
        """Make or reopen the folder.

        gather(state) -> the state on the host of every process, where several share it; schedules: {flag: its value
        where nothing follows num_updates}, with all of which a run may be resumed for more updates, None: never;
        remedy: what helps a policy that diverged, beside lower rates, or two: where Q rises, where it falls; identity:
        what else must be the same when it is resumed. Raises InputError where the folder holds another run, cannot be
        written, or where its states cannot be read or belong to other flags, data or versions; nothing is changed then.
        """
        self.began, self.args, self.task, self.buffer = time.time(), args, task, buffer
        self.script, self.gather, self.schedules = script, gather or (lambda state: state), schedules
        self.remedies = remedy if isinstance(remedy, tuple) else (remedy, remedy)  # where Q rises, where it falls
        self.folder, there = folder_of(args, script, task.name)
        self.is_first = jax.process_index() == 0  # the process that writes
        flags = {k: v for k, v in dataclasses.asdict(args).items() if k not in FREE}
        if buffer is not None:
            identity["data"] = envs.buffers.digests(buffer, DIGESTED)
        self.identity = {**flags, **identity, **envs.buffers.versions()}
        self.states, self.meta, self.phase, self.stopped = {}, {}, "", ""
        self.step, self.paced_from, self.paced_since = 0, 0, self.began  # no pace yet
        self._logger, self.shown, self.kept = None, None, 0  # kept: bytes of the states of the phases compiled so far
        self.log_end = None  # of a phase whose records are in the log, up to here at most, and that is done again
        self.hold = Hold(self.folder, self.is_first)
        try:
            if args.resume and not there:
                print(f"{self.folder}: nothing was saved here yet; starting from the beginning", flush=True)
            elif args.resume:
                self.read_states()
            self.hold.tidy()
            announce()
        except BaseException:
            self.hold.release()
            raise

    def read_states(self):
        """The states of all phases that the run has reached, and what the newest one says beside them (`meta`)."""
        for place in {path.parent for path in state_files(self.folder)} or {self.folder}:
            arrays, meta, path = read_state(place, self.identity, self.schedules)
            self.states[str(place.relative_to(self.folder))] = arrays, path, meta["log"]
            self.meta = max(self.meta, meta, key=lambda x: x.get("log", -1))
        log = self.folder / "log.jsonl"
        if self.is_first and (log.stat().st_size if log.exists() else 0) < self.meta["log"]:
            remedy = "put it back, or start anew with another --out"
            raise envs.InputError(f"{log}: is shorter than its state says, or gone; {remedy}")

    @property
    def logger(self):
        if self._logger is None:
            about = {"script": self.script, "task": self.task.name}
            about |= {} if self.buffer is None else {"data": data_told(self.identity["data"], len(self.buffer))}
            self._logger = Logger(self.folder, self.args, self.meta.get("log", 0), **about)
        return self._logger

    def compile(self, chunk, state, *inputs, placed=False, disk=0):
        """The program chunk(state, *inputs), compiled for these arrays or shapes. Prints the memory and the disk that
        it needs, and refuses a run that does not fit.

        placed: chunk itself says on which devices its arrays lie, else the first axis of the state tells; disk: bytes
        that the run writes beside its states.
        """
        sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(state)]
        size, have, local = sum(sizes), devices.memory(), jax.local_device_count()
        here = size if jax.process_count() == 1 else size // jax.process_count() + local * max(sizes)  # devices.whole
        self.kept += 2 * size + disk  # of every phase the newest state and the one before
        disk = self.kept + size + size // 4  # beside what is kept: the state being written, and policy.npz
        kinds = ("*.rows", "policy_*.npz", "update_*.npz")
        ours = state_files(self.folder) + [x for kind in kinds for x in self.folder.glob(f"*/{kind}")]  # made before
        free = shutil.disk_usage(self.folder).free + sum(x.stat().st_size for x in ours)
        print(f"{self.folder}: {amount(disk)} of {amount(free)} disk", end="", flush=True)
        if here > have * local or disk > free:
            print()
            raise self.too_large(here, have * local, disk, free)
        program = chunk.lower(state, *inputs).compile()
        m = program.memory_analysis()
        need = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
        print(f", {amount(need)} of {amount(have)} memory on each device", flush=True)
        if need > have:
            raise self.too_large(need, have, disk, free)
        one_device = placed or devices.device_mesh(len(jax.tree.leaves(state)[0]), self.args)[0].size == 1
        return program if one_device else chunk  # compiled for shapes, it does not know how arrays are spread

    def too_large(self, need, have, disk, free):
        return envs.InputError(
            f"{self.folder}: the run needs {amount(need)} of {amount(have)} memory, and {amount(disk)} on a disk where "
            f"{amount(free)} are free; lower the seeds, policies, widths or rows, or choose another --out"
        )

    def restore(self, init, *inputs, phase=""):
        """The state of a phase: exactly where a resumed run was, else init(*inputs), which is saved at once."""
        self.leave_if_stopped()
        self.phase, self.log_end = phase, None
        saved = self.states.pop(phase or ".", None)
        if self.states:  # a later phase has begun: what is torn or gone of this one is in the log
            self.log_end = saved[2] if saved else min(log for *_, log in self.states.values())
        if saved is None:
            state = init(*inputs)
            self.write(state)
            return state
        arrays, path, _ = saved
        state = fill(jax.eval_shape(init, *inputs), arrays, path)
        if jax.process_count() == 1:  # others may be reading it
            if path.name == "state.new.npz":
                name_state(path)
            if path.name == "state.prev.npz":  # the newer one is torn, and must not take the place of this one
                path.with_name("state.npz").unlink(missing_ok=True)
        return state

    def write(self, state, **meta):
        """Save the state of the present phase; meta: numbers and lists to find in `run.meta` when it is resumed."""
        self.meta = {**self.meta, **meta}
        state = self.gather(state)
        if not self.is_first:
            return
        if self.meta.get("identity", {}).get("num_updates") != self.args.num_updates:  # a new run, or one made longer
            write_whole(self.folder / "args.json", json.dumps(dataclasses.asdict(self.args), indent=1))
            self.meta["identity"] = self.identity
        log = self.logger.position() if self.log_end is None else self.log_end
        save_state(self.folder / self.phase, state, {**self.meta, "identity": self.identity, "log": log})

    def chunks(self, label, total, done, size=None):
        """Count updates after each chunk of `size` (--chunk), from `done` on to `total`; `progress` says it ran.

        A signal ends the process at the next `save`, once the state is on disk.
        """
        self.leave_if_stopped()
        self.label, self.total, self.step = label, total, int(np.max(done))
        self.paced_from, self.paced_since, self.saved = self.step, time.time(), time.time()
        start = step = self.step
        if start >= total:
            return
        self.shown = Progress(label, total, start)
        try:
            with StopSignal() as self.signal:
                while step < total and not self.stopped:
                    step += size or self.args.chunk
                    yield step
                    if self.paced_from == start:  # the first chunk compiled: the pace is that of those after it
                        self.paced_from, self.paced_since = step, time.time()
        finally:
            self.shown.close()
            self.stopped = self.stopped or self.signal.name  # the script may have left the loop before it ended
        self.leave_if_stopped()

    def leave_if_stopped(self):
        if self.stopped:
            sys.exit(f"stopped by {self.stopped} at {self.label} {self.step}; go on with the same command and --resume")

    def due(self, step):
        """Whether an evaluation is due: every --eval-every updates and at the end."""
        return step % self.args.eval_every == 0 or step == self.total

    def rate(self):
        """Updates per second, without the first chunk."""
        return (self.step - self.paced_from) / (time.time() - self.paced_since)

    def progress(self, step, metrics, names, last=False):
        """Show the count, rate, ETA and the metrics of these names; InputError where a metric diverged (--q-bound)."""
        self.step, metrics = step, jax.device_get(metrics)  # in one transfer
        for what, helps in diverged(metrics, self.args.q_bound, self.remedies):
            raise envs.InputError(
                f"{self.label} {step}: {what}; what was saved before is kept: {helps}lower the learning rates "
                "and start anew, or go on all the same with --resume --q-bound 0"
            )
        shown = {name: np.mean(metrics[name]) for name in names if name in metrics}
        self.shown.show(step, self.rate(), shown, last or step >= self.total or bool(self.signal.name))

    def record(self, step, metrics, **labels):
        """One record of the log: numbers and lists by name; labels such as seed=0."""
        if self.is_first and self.log_end is None:
            self.logger.log(int(step), metrics, **labels)

    def log(self, step, metrics, seeds=None):
        """A record for each seed (or those of these places), the leading axis of every metric; prints the returns."""
        metrics = {k: np.asarray(v) for k, v in jax.device_get(metrics).items()}
        for s in range(self.args.num_seeds) if seeds is None else seeds:
            metrics_of = {k: v[s] for k, v in metrics.items()} | {"time/updates_per_s": self.rate()}
            self.record(step, metrics_of, seed=self.args.seed + int(s))
        if "eval/return" in metrics:
            say(f"  return at {step}:", *(f"{x:.2f}" for x in metrics["eval/return"]))

    def save(self, state, last=False, **meta):
        """A checkpoint where one is due: each minute, at the end of a phase (`last`: it ends here), before a signal."""
        self.stopped, due = devices.agreed(self.signal.name, time.time() - self.saved > SAVE_EVERY)
        if last or self.step >= self.total or self.stopped or due:
            self.write(state, **meta)
            self.saved = time.time()

    def write_policy(self, kind, params, name="policy.npz", **about):
        """policy.npz (docs/policy.md): for deployment, flat slash/paths, leading seed or policy axis."""
        self.leave_if_stopped()
        named = self.task.name if self.task.eval_length else None
        about = {"task": named, "task_options": self.task.options, "observations": "task", **about}
        about["versions"] = envs.buffers.versions()
        head = {"kind": np.array(kind), "metadata_json": np.array(json.dumps(about))}
        envs.buffers.write_npz(self.folder / name, {**head, **flat_arrays(params)})

    def finish(self, panels=()):
        """learning_curve.png, training.png of the panels (plots.training), and the score -> {name: number}."""
        plots.learning_curve(self.folder / "learning_curve.png", self.folder, self.task, self.buffer)
        plots.training(self.folder / "training.png", self.folder, panels)
        result = plots.summary(self.folder, self.buffer)
        print(f"{self.folder}: policy.npz, figures; {time.time() - self.began:.0f} s", flush=True)
        return result

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            if self.shown:
                self.shown.close()
            if self._logger:
                with contextlib.suppress(OSError):  # it tries again what found no room
                    self._logger.file.close()
        finally:
            self.hold.release()
        if told := full_disk(error, self.folder):
            raise envs.InputError(told) from None
