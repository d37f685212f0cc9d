"""Seconds to import and export a made-up hopper-medium-v2 of a million rows, beside plain copies of the files.

    pip install -e ".[data]"
    python benchmark/speed.py data runs/speed_data --json results/speed/data.json
    python benchmark/speed.py data runs/speed_data --rows 20000        a quick look

Wall and processor's seconds of one pass each, read and written once before so that the disk's cache is warm. The
processor's are the better measure where the machine has other work.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np

from envs import buffers
from envs.buffers import convert

LENGTH = 1000


def make_hdf5(path, num, compression):
    """A file in D4RL's v2 layout: noise in episodes of 1000 steps that follow one another as they should."""
    import h5py

    rng = np.random.default_rng(0)
    qpos, qvel = (rng.standard_normal((num, 6), np.float32) for _ in range(2))
    obs = np.concatenate([qpos[:, 1:], np.clip(qvel, -10, 10)], 1)
    actions = np.clip(rng.standard_normal((num, 3), np.float32), -1, 1)
    arrays = {"observations": obs, "next_observations": np.roll(obs, -1, 0), "actions": actions}
    arrays |= {"rewards": rng.standard_normal(num, np.float32), "terminals": np.zeros(num, bool)}
    arrays |= {"timeouts": np.arange(num) % LENGTH == LENGTH - 1, "infos/qpos": qpos, "infos/qvel": qvel}
    arrays["infos/action_log_probs"] = rng.standard_normal(num, np.float32)
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file.create_dataset(key, data=value, compression=compression)


def timed(work):
    """-> wall and processor's seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def main(argv):
    parser = argparse.ArgumentParser(prog="speed.py data", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="for the files; half a gigabyte")
    parser.add_argument("--rows", type=int, default=1_000_000, help="a multiple of 1000")
    parser.add_argument("--json", type=Path, help="where the numbers go")
    args = parser.parse_args(argv)
    if args.rows < LENGTH or args.rows % LENGTH:
        parser.error("--rows is a multiple of 1000")
    args.folder.mkdir(parents=True, exist_ok=True)
    os.environ["MINARI_DATASETS_PATH"] = str((args.folder / "minari").absolute())
    shutil.rmtree(args.folder / "minari", ignore_errors=True)
    zipped, plain = (args.folder / name / "hopper_medium-v2.hdf5" for name in ("gzip", "plain"))
    npz, ogbench = args.folder / "hopper.npz", args.folder / "hopper-ogbench.npz"
    for path, compression in ((zipped, "gzip"), (plain, None)):
        path.parent.mkdir(exist_ok=True)
        make_hdf5(path, args.rows, compression)
    copy = lambda path: shutil.copyfile(path, args.folder / "copy")
    read = lambda path, **choices: convert.from_d4rl(path, npz, force=True, **choices)
    minari = "speed/hopper-v0"
    steps = {
        "copy of the compressed hdf5 file": lambda: copy(zipped),
        "`from-d4rl`, compressed, without replay": lambda: read(zipped, replay=False),
        "`from-d4rl`, uncompressed, without replay": lambda: read(plain, replay=False),
        "`from-d4rl`, compressed, with replay": lambda: read(zipped),
        "copy of the npz file": lambda: copy(npz),
        "`to-ogbench`": lambda: convert.to_ogbench(npz, ogbench, force=True),
        "`from-ogbench`": lambda: convert.from_ogbench(ogbench, args.folder / "back.npz", force=True),
        "`to-minari`": lambda: convert.to_minari(npz, minari),
        "`from-minari`": lambda: convert.from_minari(minari, args.folder / "back.npz", force=True),
    }
    numbers = {"rows": args.rows, "load": os.getloadavg()[0], "versions": buffers.versions(), "seconds": {}}
    lines = ["| | wall s | processor's s | rows per second (wall) |", "|---|---|---|---|"]
    for name, work in steps.items():
        wall, cpu = numbers["seconds"][name] = timed(work)
        lines.append(f"| {name} | {wall:.2f} | {cpu:.2f} | {args.rows / wall:,.0f} |")
    print("\n".join(lines))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(numbers, indent=1) + "\n")
