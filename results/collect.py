"""Copy what is worth keeping of finished runs into results/: the log without local paths, and figures.

python results/collect.py runs/wurl_sac/point/seed*      ->  results/wurl_sac/point/seed0.jsonl, seed0-*.png
"""

import json
import shutil
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
FIGURES = (
    "trajectories.png", "distances.png", "learning_curve.png", "dynamics.png", "penalty.png", "training.png",
    "bandit.png", "density.png", "uncertainty.png", "distributions.png",
)  # fmt: skip


def collect(run):
    """runs/<script>/<task>/<name> -> results/<script>/<task>/<name>.jsonl and <name>-<figure>.png"""
    run = Path(run)
    if not (run / "policy.npz").exists():
        print(f"{run}: not finished, left out")
        return
    lines = (run / "log.jsonl").read_text().splitlines()
    header = json.loads(lines[0])
    for field in ("out", "resume", "track"):
        header["args"].pop(field, None)
    for field in ("dataset", "reference"):
        if field in header["args"]:
            header["args"][field] = "/".join(Path(header["args"][field]).parts[-3:])
    script, task, name = run.resolve().parts[-3:]
    folder = RESULTS / script / task
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("\n".join([json.dumps(header), *lines[1:]]) + "\n")
    for figure in FIGURES:
        if (run / figure).exists():
            shutil.copy(run / figure, folder / f"{name}-{figure}")
    print(f"{run} -> {folder.relative_to(RESULTS.parent)}/{name}.*")


if __name__ == "__main__":
    for path in sys.argv[1:]:
        collect(path)
