"""docs/settings.md: every number of every script, side by side for the ways to start it.

    python benchmark/settings_page.py            writes the page
    python benchmark/settings_page.py --check    ends with 1 where the page is not what the scripts say

A cell is empty where the value is the default. What only says where a run lies or how it runs is left out.
"""

import argparse
import contextlib
import dataclasses
import importlib
import io
import sys
import tempfile
from pathlib import Path

import numpy as np

from cells import ROOT
from envs import buffers
from runner.flags import RunFlags

PAGE = ROOT / "docs" / "settings.md"
KEPT = ("num_updates", "chunk", "eval_every", "eval_episodes")  # of the flags that all scripts have
PUBLISHED = ("hopper-medium-replay-v2", "halfcheetah-medium-replay-v2", "antmaze-medium-play-v2")
COLUMNS = {
    "wurl_sac": {
        "ant": (), "cheetah": ("--task", "cheetah"), "humanoid": ("--task", "humanoid"), "point": ("--task", "point"),
        "`--preset paper`": ("--preset", "paper"),
        "`--preset sac`": ("--preset", "sac", "--task", "ant-angle-0"), "`--quick`": ("--quick",),
    },
    **{
        name: {"your data": ("mine",), "`--preset cpu`": ("mine", "--preset", "cpu"), "`--quick`": ("--quick",)}
        | {known: (known,) for known in PUBLISHED if not (name == "mopo" and known.startswith("antmaze"))}
        for name in ("mopo", "cped", "qdq", "dac")
    },
}  # fmt: skip
HEAD = """# Settings

What each script runs with, by the way it is started. The first column of numbers is the default of the flag; a cell is
empty where nothing else stands. `--help` says the same of one script, with what the papers and their codes have; what a
symbol means stands in the script's header. A flag on the command line comes before any preset.

This page is written by `python benchmark/settings_page.py`; a test compares it with the scripts.
"""


def named_file(folder, name):
    """A tiny buffer that is called so."""
    states = np.zeros((20, 4), np.float32)
    rows = {"observations": states, "next_observations": states, "actions": states[:, :2], "rewards": states[:, 0]}
    rows |= {"terminals": states[:, 0] > 0, "timeouts": np.arange(20) == 19}
    about = {"env": "x", "task": "x", "layout": "task", "dt": 1.0, "reward_kind": "task", "episode_length": 20}
    path = Path(folder) / f"{name.replace('/', '_')}.npz"
    buffers.save(path, rows, about | {"dataset_name": name})
    return path


def values_of(script, words, folder):
    """{field: value} that a script runs with."""
    if words and not words[0].startswith("--"):
        words = ("--dataset", str(named_file(folder, words[0])), *words[1:])
    flags = dict(zip(words[::2], words[1::2], strict=False))
    given = {key.removeprefix("--"): flags.get(key, "") for key in ("--dataset", "--preset")}
    given |= {"task": flags["--task"]} if "--task" in flags else {}
    args = script.Args(**{k: v for k, v in given.items() if v}, quick="--quick" in words)
    with contextlib.redirect_stdout(io.StringIO()):
        _, values = script.preset(args)
    return dataclasses.asdict(args) | values


def shown(value):
    """A value as on the command line."""
    if isinstance(value, (tuple, list)):
        return " ".join(map(shown, value)) or "-"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value or "-"


def table(name, folder):
    """Markdown of one script."""
    script = importlib.import_module(name)
    defaults = dataclasses.asdict(script.Args())
    columns = {title: values_of(script, words, folder) for title, words in COLUMNS[name].items()}
    hidden = {field.name for field in dataclasses.fields(RunFlags)} - set(KEPT)
    hidden |= {"dataset", "max_rows", "task_reward", "num_seeds"}
    lines = [f"| {' | '.join(['flag', 'default', *columns])} |", "|" + "---|" * (2 + len(columns))]
    for field in defaults:
        if field in hidden:
            continue
        cells = [shown(v[field]) if shown(v[field]) != shown(defaults[field]) else "" for v in columns.values()]
        lines.append(f"| `--{field.replace('_', '-')}` | {shown(defaults[field])} | {' | '.join(cells)} |")
    return lines


def page():
    """The whole page."""
    with tempfile.TemporaryDirectory() as folder:
        parts = [[f"\n## {name}.py\n", *table(name, folder)] for name in COLUMNS]
    return HEAD + "\n".join(line for part in parts for line in part) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        sys.exit(0 if PAGE.read_text() == page() else "docs/settings.md: not what the scripts say; write it anew")
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
