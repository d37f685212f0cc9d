"""The converters on the command line: from-arrays, -d4rl, -exorl, -minari, -ogbench; to-minari, to-ogbench."""

import argparse
import os

from envs.buffers.convert import from_arrays, from_d4rl, from_exorl, from_minari, from_ogbench, to_minari, to_ogbench


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the converters to the command line of buffers."""
    readers = {
        "from-arrays": ("file", "an .npz of observations, actions, rewards and terminals", from_arrays),
        "from-d4rl": ("file", "a D4RL .hdf5 file", from_d4rl),
        "from-exorl": ("folder", "a folder of ExORL's or URLB's episodes, one .npz each", from_exorl),
        "from-minari": ("id", "id of a local Minari data set, e.g. mujoco/hopper/medium-v0", from_minari),
        "from-ogbench": ("file", "an OGBench .npz file", from_ogbench),
    }
    for command, (what, text, function) in readers.items():
        parser = commands.add_parser(command, help=f"convert {text.split(',')[0]} to a buffer file")
        parser.add_argument("source", metavar=what.upper(), help=text)
        parser.add_argument("--out", help="file to write; default data/<name>.npz")
        parser.add_argument("--task", help="task the rewards belong to, where the file does not say it")
        parser.add_argument("--dt", type=float, help="seconds per step, where the set is not known")
        parser.add_argument("--episode-length", type=int, help="steps after which an episode is cut")
        parser.add_argument("--force", action="store_true", help="overwrite an existing file")
        parser.add_argument(
            "--no-replay", dest="replay", action="store_false", help="skip the check against the physics"
        )
        parser.add_argument(
            "--clip", action="store_true", help="clip actions to [-1, 1] as the environment did, however many"
        )
        parser.add_argument("--action-limit", type=float, help="divide actions by the environment's limit")
        parser.set_defaults(function=function)
    commands.choices["from-d4rl"].add_argument("--name", help="D4RL's name of the set, e.g. hopper-medium-v2")
    for command in ("from-arrays", "from-exorl"):
        commands.choices[command].add_argument("--name", help="what to call the data; default: as the source")
    commands.choices["from-minari"].add_argument(
        "--keys", type=lambda text: text.split(","), help="parts of a Dict observation, joined by commas, in order"
    )
    parser = commands.add_parser("to-minari", help="make a local Minari data set of a buffer file")
    parser.add_argument("path", metavar="FILE", help="a buffer file")
    parser.add_argument("dataset_id", metavar="ID", help="id of the new data set, e.g. udg/ant-v0")
    parser.set_defaults(function=to_minari)
    parser = commands.add_parser("to-ogbench", help="write a buffer file in OGBench's layout")
    parser.add_argument("path", metavar="FILE", help="a buffer file")
    parser.add_argument("out", metavar="OUT", help="the .npz file to write")
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")
    parser.set_defaults(function=to_ogbench)


def run_command(args: argparse.Namespace) -> None:
    """Run one of the commands of `add_commands`. Raises InputError."""
    flags = {key: value for key, value in vars(args).items() if key not in ("command", "function", "source")}
    positional = [args.source] if "source" in args else []
    out = args.function(*positional, **flags)
    if positional:
        print(f"wrote {os.fspath(out)}; look at it: python -m envs.buffers inspect {os.fspath(out)}")
