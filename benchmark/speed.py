"""How fast the scripts are here, beside plain NumPy and PyTorch, published rates and the machine's own limits.

    python benchmark/speed.py                             the table of docs/speed.md, 10 minutes on 2 quiet cores
    python benchmark/speed.py --part sac --json F         one part, numbers to a file
    python benchmark/speed.py --part cped qdq dac         the learners with generative models, 3 to 5 minutes each
    python benchmark/speed.py --check                     every part in small: does it work?
    python benchmark/speed.py --markdown F [F ..]         numbers of files -> the tables of docs/speed.md
    python benchmark/speed.py data FOLDER                 seconds to import and export files; --help says more
    python benchmark/speed.py memory FOLDER               memory of every learner with a million rows

Several parts run one after the other, each in a process of its own. What is compared within a part runs in turn,
again and again, so that ratios hold also where the machine's speed drifts. Beside every number stand the cores that
this process used and the cores that others used meanwhile (and what the hypervisor took): a row with more than
0.1 of the latter is marked as disturbed, and its number is no measurement of this code.
Parts sac and mopo need PyTorch (pip install torch==2.13.0); nothing else does. See docs/speed.md.
JAX runs on the CPU unless JAX_PLATFORMS says otherwise; the targets are those of a CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported

import jax

import baselines
from speed_parts import data, learners, memory, model, wurl
from speed_parts.measuring import HEAD, RULE, Bench, machine, table_row

ROOT = Path(__file__).resolve().parents[1]
TABLE = {  # of docs/speed.md
    "pseudo_reward": wurl.pseudo_reward, "sac": wurl.sac, "collection": wurl.collection, "round": wurl.whole_round,
    "mopo": model.mopo_part, "startup": wurl.startup,
}  # fmt: skip
LEARNERS = {"cped": learners.cped_part, "qdq": learners.qdq_part, "dac": learners.dac_part}
PARTS = TABLE | LEARNERS
COMMANDS = {"data": data.main, "memory": memory.main}


def run_part(part, args):
    """One part in this process -> its rows."""
    if part in ("sac", "collection", "round"):
        jax.config.update("jax_num_cpu_devices", os.cpu_count())
    bench = Bench(part, 1 if args.check else args.repeats, args.check)
    PARTS[part](bench)
    return bench.rows


def run_parts(parts, args):
    """Every part in a process of its own -> the rows of all."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            path = Path(folder, f"{part}.json")
            command = [sys.executable, "-u", __file__, "--part", part, "--json", str(path)]
            command += ["--repeats", str(args.repeats), "--no-head"] + ["--check"] * args.check
            code = subprocess.run(command).returncode
            if code:
                raise SystemExit(code)
            rows += json.loads(path.read_text())["rows"]
    return rows


def numbers(path):
    """What a run wrote with --json."""
    if not Path(path).is_file():
        raise SystemExit(f"{path}: no such file; make it: python benchmark/speed.py --json {path}")
    result = json.loads(Path(path).read_text())
    if "--check" in result["command"]:
        raise SystemExit(f"{path} is of a --check: its numbers mean nothing; run without")
    return result


def tables(results, parts):
    """A table for each run, of these parts (None: all), but for those that a later run has as well."""
    for i, result in enumerate(results):
        newer = {row["part"] for other in results[i + 1 :] for row in other["rows"]}
        rows = [row for row in result["rows"] if row["part"] in (parts or PARTS) and row["part"] not in newer]
        about = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
        yield textwrap.fill(f"`{result['command']}`: {result['seconds']:.0f} s. {about}", 120)
        yield "\n".join([HEAD, RULE, *map(table_row, rows)])


def markdown(paths, parts=None):
    """Put the numbers of files into docs/speed.md, between its two marks."""
    text = "\n\n".join(tables([numbers(path) for path in paths], parts))
    page = ROOT / "docs" / "speed.md"
    start, end = "<!-- table -->", "<!-- end of table -->"
    before, rest = page.read_text().split(start)
    page.write_text(f"{before}{start}\n\n{text}\n\n{end}{rest.split(end)[1]}")


def main(argv):
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=list(PARTS), help=f"these; without: {', '.join(TABLE)}")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--repeats", type=int, default=3, help="timings of every row")
    parser.add_argument("--check", action="store_true", help="every part in small, one timing: no numbers")
    told = "only write the tables of docs/speed.md; of a part that several files have, the last one's"
    parser.add_argument("--markdown", nargs="+", metavar="JSON", help=told)
    parser.add_argument("--no-head", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.markdown:
        return markdown(args.markdown, args.part)
    parts = args.part or list(PARTS if args.check else TABLE)
    if {"sac", "mopo"} & set(parts):
        baselines.require_torch()
    if not args.no_head:
        print(*(f"{k} {v}" for k, v in machine().items()), sep=", ")
        print(f"\n{HEAD}\n{RULE}", flush=True)
    began = time.perf_counter()
    rows = run_part(parts[0], args) if len(parts) == 1 else run_parts(parts, args)
    seconds = time.perf_counter() - began
    print(f"\n{len(rows)} rows in {seconds:.0f} s", flush=True)
    if args.json:
        command = " ".join(["python benchmark/speed.py", *argv])
        result = {"command": command, "seconds": seconds, "machine": machine(), "rows": rows}
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
