"""Which of MOPO's settings works? Table and figures of the runs in results/mopo/screen/<file>/<setting>.jsonl.

    python benchmark/mopo_figures.py     prints the table; draws screen.png, returns, and world.png, the model's share

The runs are those of benchmark/mopo_grid.json (docs/mopo.md, "Which settings"). Score: mean of the last five
evaluations, in as many steps as the data's episodes have.
"""

import argparse
from pathlib import Path

import numpy as np

from cells import ROOT
from runner import plots

FOLDER = ROOT / "results" / "mopo" / "screen"
RETURN, WHOLE = "eval/return_data_length", "eval/return"
SHOWN = (RETURN, WHOLE, "train/q", "value/q_start", "value/world", "value/model", "train/entropy", "model/u_model")
WORLDS = {
    "plain": ("model, plain", "C0", "--"), "default": ("model, the default", "C0", "-"),
    "world": ("simulator, plain", "C1", "--"), "default-world": ("simulator, the default", "C1", "-"),
}  # fmt: skip


def curves(path, key):
    """Steps [n] and the mean over seeds [n] of one key of a log."""
    seeds = list(plots.read(path, key).values())
    return seeds[0][0], np.mean([values for _, values in seeds], 0)


def print_table(folder):
    """A row a setting: score in the data's length, its spread, score in whole evaluations, Q beside returns."""
    print("| file | setting | score | spread | 1000 steps | Q at start | return there, discounted: world | model |")
    print("|---|---|---|---|---|---|---|---|")
    for path in sorted(folder.glob("*/*.jsonl")):
        last = {key: curves(path, key)[1][-5:] for key in SHOWN}
        cells = [last[RETURN].mean(), last[RETURN].std(), last[WHOLE].mean()]
        cells += [last[key][-1] for key in ("value/q_start", "value/world", "value/model")]
        print(f"| {path.parent.name} | {path.stem} |", *(f"{x:.0f} |" for x in cells))


def draw(folder, name, settings, wanted="default"):
    """One panel a file that has a run of the setting `wanted`, a curve a setting: {setting: (label, colour, line)}."""
    panels = []
    for file in sorted(path for path in folder.iterdir() if path.is_dir()):
        found = {s: file / f"{s}.jsonl" for s in settings if (file / f"{s}.jsonl").exists()}
        style = lambda setting: dict(zip(("label", "color", "ls"), settings[setting], strict=True))
        if wanted not in found:
            continue
        lines = [(*curves(path, RETURN), {"marker": ".", "lw": 1.2, **style(s)}) for s, path in found.items()]
        ylabel = "return, as many steps as the data's episodes"
        panels.append({"title": file.name, "xlabel": "updates", "ylabel": ylabel, "lines": lines})
    plots.figure(folder / f"{name}.png", panels, width=5.5)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    print_table(folder)
    names = sorted({path.stem for path in folder.glob("*/*.jsonl")})
    plain = [name for name in names if "world" not in name]
    draw(folder, "screen", {name: (name, f"C{i % 10}", "-" if i < 10 else "--") for i, name in enumerate(plain)})
    draw(folder, "world", WORLDS, wanted="world")


if __name__ == "__main__":
    main()
