"""Memory of a learner on a file larger than it may hold: dac.py, a short run, with --max-rows and without.

    python benchmark/large_buffer.py runs/large --rows 20000000 --max-rows 200000

Writes <folder>/large.npz (46 bytes a row, the point robot's sizes) and prints, in MB, what the process allocated beyond
what it had before (RssAnon, looked at every 10 ms; pages of the mapped file are the system's to drop): for the rows
alone, then for whole runs, where the compiler may need more than the rows.
Linux only: the figure comes from its /proc.
"""

import argparse
import re
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import dac
import runner
from envs import buffers
from runner import plots

SMALL = dict(
    hidden_sizes=(16, 16), num_critics=3, num_q_samples=2, batch_size=16, num_action_samples=4, num_steps=3,
    chunk=20, eval_every=40, num_updates=40, eval_episodes=2,
)  # fmt: skip


def make(path, num):
    """A file of `num` rows: noise, in episodes of 100 steps that follow one another as they should."""
    obs = np.random.default_rng(0).standard_normal((num, 4), np.float32)
    arrays = {"observations": obs, "next_observations": np.roll(obs, -1, 0), "rewards": obs[:, 0].copy()}
    arrays |= {"actions": np.zeros((num, 2), np.float32), "terminals": np.zeros(num, bool)}
    arrays["timeouts"] = np.arange(num) % 100 == 99
    about = {"dataset_name": "large", "env": "point", "task": "point-angle-0", "layout": "task", "dt": 1.0}
    buffers.save(path, arrays, about | {"reward_kind": "relabelled", "episode_length": 100})


def allocated():
    """MB of this process that no file stands behind."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3


def peak_of(work):
    """Call `work` -> MB that it allocated at most, beyond what was there before."""
    before, most, ended = allocated(), [0.0], threading.Event()

    def watch():
        while not ended.wait(0.01):
            most.append(allocated() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        ended.set()
        thread.join()
    return max(most)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--max-rows", type=int, default=200_000)
    args = parser.parse_args(argv)
    path = args.folder / "large.npz"
    make(path, args.rows)
    plots.figure = lambda *_, **__: None  # the memory of matplotlib is not asked for
    print(f"{path}: {args.rows} rows, {path.stat().st_size / 1e6:.0f} MB")
    for name, rows in (("first", args.max_rows), ("few", args.max_rows), ("whole", 0)):
        flags = dac.Args(**SMALL, dataset=str(path), max_rows=rows)
        held = lambda: jax.tree.map(jnp.asarray, dac.dac_data(runner.open_task("dac", flags, None)[0], flags))  # noqa: B023
        print(f"peak {name} rows: {peak_of(held):.0f} MB", flush=True)
    for name, rows in (("compiles", args.max_rows), ("few", args.max_rows), ("whole", 0)):
        out = args.folder / name
        shutil.rmtree(out, ignore_errors=True)
        peak = peak_of(lambda: dac.main(dac.Args(**SMALL, dataset=str(path), max_rows=rows, out=str(out))))  # noqa: B023
        print(f"peak {name}: {peak:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
