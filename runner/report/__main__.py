"""The command line of runner.report."""

import argparse
import shlex
import sys
from pathlib import Path

import numpy as np

import runner.report
from envs.errors import InputError
from runner.report.markup import alike, printable
from runner.report.page import build_page, write_page
from runner.report.reading import read_all


def main(argv):
    """Command line -> the page's path."""
    parser = argparse.ArgumentParser(prog="python -m runner.report", description=runner.report.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("paths", nargs="+", help="folders of runs, of udg_select.py, or .jsonl files; any depth")
    parser.add_argument("--out", default="report.html", help="the page (default: report.html here)")
    args = parser.parse_args(argv)
    notices, out = [], Path(args.out)
    runs, selections = read_all(args.paths, notices)
    with np.errstate(all="ignore"):  # a diverged run has numbers that overflow; the page says so
        page = build_page(runs, selections, notices, shlex.join(["python", "-m", "runner.report", *argv]))
    write_page(out, page)
    for text, (first, *others) in alike(notices).items():
        print(printable(f"notice: {first} {text}" + (f" ({len(others)} more like it)" if others else "")))
    print(f"{printable(out)}: {len(runs)} logs, {len(selections)} selections, {len(page) / 1e6:.1f} MB")
    return out


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"runner.report: error: {error}")
