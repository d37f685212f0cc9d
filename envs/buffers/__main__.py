"""Command line of buffer files: inspect them, convert them from and to other projects' formats."""

import argparse
import sys

from envs.buffers.convert import commands as convert
from envs.buffers.convert.physics import describe_checks
from envs.buffers.fields import Buffer
from envs.buffers.reading import load
from envs.errors import InputError


def describe(buffer: Buffer) -> str:
    """A table of the arrays and the metadata that matter to a reader."""
    lines = [buffer.summary(), "", f"{'key':<18} {'shape':>16} {'dtype':>8} {'MB':>8}  range"]
    for key, array in buffer.arrays.items():
        low, high = array.min(), array.max()
        span = f"{low} .. {high}" if array.dtype == bool else f"{low:.5g} .. {high:.5g}"
        shape = "x".join(str(n) for n in array.shape)
        lines.append(f"{key:<18} {shape:>16} {array.dtype!s:>8} {array.nbytes / 1e6:>8.2f}  {span}")
    lines.append("")
    skip = ("sha256", "schema", "schema_version")
    for key, value in buffer.metadata.items():
        if key not in skip:
            text = ascii(value)
            lines.append(f"{key:<18} {text if len(text) <= 300 else text[:297] + '...'}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Command line: `python -m envs.buffers inspect FILE [--figure out.png]`, and the converters."""
    parser = argparse.ArgumentParser(prog="python -m envs.buffers", description="Buffer files.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="check a file fully and show what it holds")
    inspect.add_argument("file", help="a buffer file, or a quoted glob of shards")
    inspect.add_argument("--figure", help="write a figure of returns, lengths and coverage here")
    convert.add_commands(commands)
    args = parser.parse_args(argv)
    try:
        if args.command != "inspect":
            convert.run_command(args)
            return 0
        buffer = load(args.file, quiet=True, verify=True)
        print("\n".join([describe(buffer), *describe_checks(buffer.metadata, buffer)]))
        if args.figure:
            from envs.buffers.figures import plot_buffer  # the reader itself needs no matplotlib

            plot_buffer(args.figure, buffer)
            print(f"\nfigure: {args.figure}")
    except (InputError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\nverdict: follows docs/buffer.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
