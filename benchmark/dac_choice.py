"""Is the choice by Q worth its samples? Returns of finished runs of dac.py with N_a = 1, 3, 10, 30 samples an action.

    python benchmark/dac_choice.py runs/dac/ant-angle-60/seed0 --episodes 20

The same starts for every N_a. Two returns: of whole episodes, and of as many steps as the data's episodes have.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

import dac
import runner

SAMPLES = (1, 3, 10, 30)


def returns_by_samples(folder, episodes, samples=SAMPLES):
    """-> [(N_a, return, std over episodes, return in the data's length)], means over the seeds of a run."""
    known = json.loads((Path(folder) / "args.json").read_text())
    # but for --angles, a flag that is younger than the run had the value that is the default now
    fields = {field.name: known.get(field.name, field.default) for field in dataclasses.fields(dac.Args)}
    fields |= {"hidden_sizes": tuple(fields["hidden_sizes"]), "angles": known.get("angles", "none")}
    args = dac.Args(**fields | {"eval_episodes": episodes, "resume": True})
    buffer, task = runner.open_task("dac", args, dac.Transitions._fields)
    args = runner.with_angles(args, task)
    scaled = dac.dac_data(buffer, args)
    sizes = scaled[0].observations.shape[1], task.action_size
    like = jax.eval_shape(dac.make_train(args, *sizes)[0], runner.seed_keys(args))
    state = runner.fill(like, runner.read_npz(Path(folder) / "state.npz")[0], folder)
    rows = []
    for n in samples:
        own = dataclasses.replace(args, num_action_samples=n)
        evaluate = dac.make_evaluation(own, task, buffer, *scaled)
        found = evaluate((state.actor, state.target_critics), runner.evaluation_keys(own))
        keys = "eval/return", "eval/return_std", "eval/return_data_length"
        rows += [(n, *(float(np.mean(found[key])) for key in keys))]
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--episodes", type=int, default=20, help="episodes for each N_a")
    args = parser.parse_args(argv)
    print("| run | N_a | return | std over episodes | in the data's length |\n|---|---|---|---|---|")
    for folder in args.runs:
        for n, *values in returns_by_samples(folder, args.episodes):
            print(f"| {'/'.join(folder.parts[-3:])} | {n} |", *(f"{x:.1f} |" for x in values), flush=True)


if __name__ == "__main__":
    main()
