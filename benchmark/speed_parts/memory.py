"""Memory of every learner on a million transitions of halfcheetah's size, four seeds, published networks: under 4 GiB?

    python benchmark/speed.py memory runs/memory --json results/speed/memory.json

Writes <folder>/million.npz (noise: nothing is learnt here), runs each script on it for a few updates of every phase,
and prints the most that the process was resident with (ru_maxrss: Python, programs and the mapped file included).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from envs import buffers

ROOT = Path(__file__).resolve().parents[2]

LIMIT = 4.0  # GiB
SHORT = "--eval-episodes 1"
CPED = "--flow-updates 50 --num-updates 50 --eval-every 50 --chunk 50"
QDQ = "--uncertainty consistency --teacher-updates 20 --student-updates 20 --num-updates 20 --eval-every 20 --chunk 10"
# name: script and flags; a few updates of each phase at the sizes of the papers
RUNS = {
    "mopo": f"mopo.py {SHORT} --max-epochs 1 --num-updates 1000 --eval-every 1000 --chunk 1000",
    "cped": f"cped.py {SHORT} {CPED}",
    "cped, NICE": f"cped.py {SHORT} --preset published {CPED}",
    "qdq": f"qdq.py {SHORT} {QDQ}",
    "qdq, 50 samples": f"qdq.py {SHORT} --spread mc {QDQ}",
    "dac": f"dac.py {SHORT} --num-updates 8 --eval-every 8 --chunk 4",
}


def make(path, num, length=1000):
    """A file of `num` rows of halfcheetah's shapes: noise, in episodes whose rows follow one another."""
    rng = np.random.default_rng(0)
    obs = rng.standard_normal((num, 17), np.float32)
    arrays = {"observations": obs, "next_observations": np.roll(obs, -1, 0), "rewards": obs[:, 8].copy()}
    arrays |= {"actions": rng.uniform(-1, 1, (num, 6)).astype(np.float32), "terminals": np.zeros(num, bool)}
    arrays["timeouts"] = np.arange(num) % length == length - 1
    about = {"dataset_name": "million", "env": "halfcheetah", "task": "halfcheetah", "layout": "task", "dt": 0.05}
    buffers.save(path, arrays, about | {"reward_kind": "task", "episode_length": length})


def peak(command, log):
    """Run a script -> GiB it was resident with at most; its output goes to `log`."""
    with open(log, "w") as out:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=out, stderr=out)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}: see {log}")
    return used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30  # Linux counts in KiB


def main(argv):
    parser = argparse.ArgumentParser(prog="speed.py memory", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--num-seeds", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    args = parser.parse_args(argv)
    if args.rows < 100_000 or args.num_seeds < 1:
        parser.error("--rows: 100,000 or more (qdq.py needs its 5000 windows); --num-seeds: 1 or more")
    for folder in (args.folder, *([args.json.parent] if args.json else [])):
        folder.mkdir(parents=True, exist_ok=True)  # before the long work
    path = (args.folder / "million.npz").resolve()
    make(path, args.rows)
    print(
        f"{args.rows:,} rows of 17 observations and 6 actions: {path.stat().st_size / 2**30:.2f} GiB of file",
        flush=True,
    )
    print(f"| script, {args.num_seeds} seeds | GiB resident at most | limit |\n|---|--:|--:|", flush=True)
    found = {}
    for name in args.only:
        out = (args.folder / name.replace(", ", "-").replace(" ", "-")).resolve()
        shutil.rmtree(out, ignore_errors=True)
        more = ["--dataset", str(path), "--num-seeds", str(args.num_seeds), "--out", str(out)]
        found[name] = round(peak([*RUNS[name].split(), *more], out.with_suffix(".log")), 2)
        print(f"| {name} | {found[name]:.2f} | {LIMIT:.0f} |", flush=True)
    if args.json:
        about = {"rows": args.rows, "num_seeds": args.num_seeds, "limit_gib": LIMIT, "commit": buffers.git_commit()}
        args.json.write_text(json.dumps(about | {"gib": found, "versions": buffers.versions()}, indent=1) + "\n")
    if max(found.values()) > LIMIT:
        sys.exit(f"over {LIMIT:.0f} GiB: {', '.join(name for name, gib in found.items() if gib > LIMIT)}")
