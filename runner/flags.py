"""Flags: those that every script has, what a flag's type allows, presets, and the command line."""

import contextlib
import dataclasses
import math
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import jax
import tyro

import envs
import envs.buffers
import envs.host
from runner import devices
from runner.help import help_text
from runner.signals import AGAIN, listen


class Within(NamedTuple):
    """The limits of a number: low <= x <= high, or low < x where it is `open`."""

    low: float
    high: float = math.inf
    open: bool = False

    def refusal(self, x):
        """What x must be where it is outside, or ""."""
        if not (self.low < x if self.open else self.low <= x):
            return f"{'above' if self.open else 'at least'} {self.low:g}"
        return "" if x <= self.high else f"at most {self.high:.10g}"


MOST = 2**31 - 1
Natural = Annotated[int, Within(0, MOST)]  # 0 is allowed: a seed, or "all"
Count = Annotated[int, Within(1, MOST)]  # how many, at least one
Share = Annotated[float, Within(0, 1)]
Rate = Annotated[float, Within(0)]  # not negative
Size = Annotated[float, Within(0, open=True)]
ABOUT = []  # of the last command line: what `announce` will print


@dataclass(frozen=True)
class Data:
    """Flags of a script that learns from one buffer, some seeds at once."""

    # --- data ---
    dataset: str = ""
    """buffer file with task rewards, or a quoted glob of shards (docs/buffer.md)"""
    max_rows: Natural = 0
    """rows to train on; of a larger file whole episodes are drawn at random, and only these are held; 0: all"""
    task_reward: str = ""
    """file.py:function that made the file's rewards (udg_select.py --task-reward), to evaluate by it"""
    num_seeds: Annotated[int, Within(1, 100_000)] = 1
    """S: independent runs at once, a leading axis of all arrays; a seed gives the same run alone or among others"""


@dataclass(frozen=True)
class RunFlags:
    """Flags of every script that trains."""

    # --- run ---
    task: str = ""
    """task to evaluate in; empty: the file's, and no other is accepted"""
    preset: str = ""
    """a setting by name, see the list above: cpu takes minutes on two cores, the name of a data set is what was
    published for it, published: for the file's, ours: as for your own; empty: by the file's dataset_name"""
    seed: Natural = 0
    """first seed"""
    out: str = ""
    """run folder; empty: runs/<script>/<task>/seed<seed>"""
    resume: bool = False
    """go on from the folder's state.npz, exactly; a finished run for more num_updates, where no schedule forbids it"""
    quick: bool = False
    """a small run on the point robot, under 2 minutes; its data are made on the spot"""
    track: bool = False
    """mirror the log to Weights & Biases (needs `pip install wandb`)"""
    backend: Literal["auto", "mujoco", "mjx", "warp"] = "auto"
    """physics: C MuJoCo (auto on a CPU), MJX (auto elsewhere) or MuJoCo Warp; the point worlds have their own"""
    num_devices: Natural = 0
    """devices that share the seeds or policies; 0: all there are. A CPU is one device, or as many as are asked for; for
    wide policies of wurl_sac.py 0 makes one of each core"""
    matmul_precision: Literal["float32", "tensorfloat32", "bfloat16"] = "float32"
    """digits of matrix products on an accelerator (docs/gpu.md); physics and ranks keep float32, as all on a CPU"""
    # --- budget ---
    num_updates: Count = 1_000_000
    """gradient steps per seed"""
    chunk: Count = 1_000
    """gradient steps in one jitted call, seconds of work; a divisor of eval_every and num_updates"""
    eval_every: Count = 10_000
    """gradient steps between two evaluations"""
    eval_episodes: Count = 10
    """episodes of an evaluation"""
    q_bound: Rate = 1e6
    """largest |Q| before the run stops as diverged, of means over a chunk; 0: go on, also where a loss is not finite"""


@dataclass(frozen=True)
class Flags(RunFlags, Data):
    """Flags that every learner has; its own `Args` adds those of the algorithm."""


def refuse(rules):
    """InputError with the first message of {message: whether it holds} that does not hold."""
    for message, holds in rules.items():
        if not holds:
            raise envs.InputError(message)


def bounds_of(kind):
    """A flag's type -> (limits of its numbers, whether it takes several, the type of one)."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):  # None may stand in its place
        kind = next(x for x in typing.get_args(kind) if x is not types.NoneType)
    many = typing.get_origin(kind) is tuple
    kind = typing.get_args(kind)[0] if many else kind
    limits = [x for x in getattr(kind, "__metadata__", ()) if isinstance(x, Within)]
    return limits, many, typing.get_args(kind)[0] if hasattr(kind, "__metadata__") else kind


def check(args):
    """InputError where a flag is outside of the limits of its type, or no script could do anything with it."""
    for name, kind in typing.get_type_hints(type(args), include_extras=True).items():
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        bounds, many, _ = bounds_of(kind)
        numbers = value if isinstance(value, tuple) else (value,)
        refuse({f"{flag} needs at least one number": bool(numbers) or not (many and bounds)})
        for x in (x for x in numbers if x is not None):
            refuse({f"{flag} {x}: must be finite": not isinstance(x, float) or math.isfinite(x)})
            for wanted in filter(None, (b.refusal(x) for b in bounds)):
                raise envs.InputError(f"{flag} {x}: must be {wanted}")


def task_options(words):
    """Words of --task-options -> options: ("ctrl_cost=0.5", "terminate=true") -> {"ctrl_cost": 0.5, "terminate": True}.

    InputError where a word is not name=number, name=true or name=false.
    """
    options = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            value = {"true": True, "false": False}.get(text.lower())
            options[name] = float(text) if value is None else value
        except ValueError:
            raise envs.InputError(f"--task-options: '{word}' is not name=number") from None
    return options


def check_run(args):
    """`check`, and what a training loop asks of its flags."""
    check(args)
    there = jax.local_device_count()
    refuse({
        "--chunk must divide --eval-every and --num-updates":
            args.eval_every % args.chunk == args.num_updates % args.chunk == 0,
        f"--num-devices {args.num_devices}: 0 to {there}, the devices there are": args.num_devices <= there,
    })  # fmt: skip


def given_flags(argv, fields):
    """The fields that a command line names, as --flag value, --flag=value, --flag or --no-flag."""
    words = [word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")]
    return {word if word in fields else word.removeprefix("no_") for word in words} & set(fields)


def whole_number(flag, text):
    """1e6 -> 1000000; other words as they are; InputError at a number that is not whole."""
    with contextlib.suppress(ValueError):
        int(text)
        return text
    try:
        x = float(text)
    except ValueError:  # no number: the parser says so
        return text
    refuse({f"{flag} {text}: must be a whole number": x.is_integer()})
    return str(int(x))


def whole_numbers(Args, argv):
    """The command line, its counts in digits."""
    kinds = typing.get_type_hints(Args, include_extras=True)
    counts = {f"--{name.replace('_', '-')}" for name, kind in kinds.items() if bounds_of(kind)[2] is int}
    flag, words = "", []
    for word in argv:
        name, equals, text = word.partition("=")
        if word.startswith("--"):
            flag = name.replace("_", "-")
            word = f"{name}={whole_number(flag, text)}" if equals and flag in counts else word
        elif flag in counts:
            word = whole_number(flag, word)
        words.append(word)
    return words


def announce(*more):
    """Print what the command line changed, and more: once all is checked, so that an error stands alone."""
    print(*ABOUT, *more, sep="\n", end="\n" if ABOUT or more else "", flush=True)
    ABOUT.clear()


def parse(Args, argv, preset_of=None, names=(), doc="", idle=lambda args: {}):
    """Command line -> Args: defaults, then the values that `preset_of(args)` gives, then the flags.

    preset_of(args) -> (name, {field: value}); names: of the presets, for --help; doc: the script's header. `announce`
    prints what differs from the defaults, and which flags on the line have no effect: idle(args) -> {field: why}.
    """
    if {"-h", "--help"} & set(argv):
        print(help_text(Args, names, doc))
        sys.exit(0)
    args = tyro.cli(Args, args=whole_numbers(Args, argv), prog=Path(sys.argv[0]).name)
    check(args)
    ABOUT.clear()
    given = given_flags(argv, [field.name for field in dataclasses.fields(Args)])
    if preset_of is not None:
        name, values = preset_of(args)
        args = dataclasses.replace(args, **{k: v for k, v in values.items() if k not in given})
        ABOUT.append(f"preset {name}")
    check(args)
    plain = Args()
    changed = {k: v for k, v in dataclasses.asdict(args).items() if v != getattr(plain, k)}
    ABOUT.append(" ".join(["not the defaults:", *(f"{k}={v}" for k, v in changed.items())]))
    for field in sorted(given & idle(args).keys()):
        ABOUT.append(f"without effect: --{field.replace('_', '-')}, because {idle(args)[field]}")
    return args


def launch(main, Args, preset_of=None, names=(), doc="", again=AGAIN, cpu_devices=None, **more):
    """The whole command: whatever a user can mend ends in one line, a signal in one more (`again`: how to go on).

    cpu_devices(args): devices that a CPU is where --num-devices does not say; more: of `parse`.
    """
    script = Path(sys.argv[0]).name
    listen(again)
    try:
        args = parse(Args, sys.argv[1:], preset_of, names, doc, **more)
        devices.begin(args, cpu_devices(args) if cpu_devices else 1)
        main(args)
    except (envs.InputError, OSError) as error:
        devices.leave(f"{script}: error: {error}")
    except (ValueError, RuntimeError) as error:
        if told := envs.host.cause(error):  # of a world that is stepped on the host
            devices.leave(f"{script}: error: {told}")
        if not jax.distributed.is_initialized():  # of a collective operation: another process may be gone
            raise
        lost = f"another process ended, or this one failed ({error})"
        devices.leave(f"{script}: error: {lost}; go on with the same command and --resume")
