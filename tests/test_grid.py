"""Grids of data sets, learners and seeds (benchmark/grid.py), and what is kept of them (benchmark/collect.py)."""

import json
import os
import threading
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

import collect
import envs
import grid
from envs.buffers import scripted

ROOT = Path(__file__).resolve().parents[1]


def is_drawn(path):
    """Whether a picture has more on it than a white sheet with axes: colours, in more than a speck."""
    picture = plt.imread(path)
    color = np.ptp(picture[..., :3], axis=-1) > 0.2
    return picture.shape[0] > 300 and picture.shape[1] > 500 and color.sum() > 50


def write_list(path, **changes):
    """The list of one run of dac.py on the scripted data -> the folder of that run."""
    small = "--hidden-sizes 16 16 --num-critics 3 --num-q-samples 2 --batch-size 16 --num-steps 3 --eval-episodes 2"
    dac = f"dac.py {small} --chunk 20 --eval-every 200 --num-updates 400"
    lists = {"datasets": {"point": str(path / "point-angle-0.npz")}, "algorithms": {"dac": dac}, "seeds": [0]}
    (path / "grid.json").write_text(json.dumps(lists | {"out": str(path / "grid")} | changes))
    return path / "grid" / "point" / "dac" / "seed0"


def test_a_grid_goes_on_with_a_killed_worker_and_skips_what_is_done(tmp_path, monkeypatch, capsys):
    scripted.dataset(tmp_path)
    folder, words = write_list(tmp_path), [str(tmp_path / "grid.json"), "--poll", "0.2"]
    monkeypatch.chdir(ROOT)  # both are put back, whatever main does to them
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 1)  # of a dead worker nothing comes later

    def kill():
        while not (folder / "state.npz").exists():
            time.sleep(0.02)
        os.kill(json.loads((folder / "worker.json").read_text())["pid"], 9)

    threading.Thread(target=kill, daemon=True).start()
    grid.main(words)
    said = capsys.readouterr().out
    assert "started point dac 0 (try 2)" in said and "ended point dac 0" in said and "| point |" in said
    assert (folder / "policy.npz").exists() and is_drawn(tmp_path / "grid" / "point.png")
    table = json.loads((tmp_path / "grid" / "table.json").read_text())
    assert [(x["dataset"], x["algorithm"], len(x["returns"])) for x in table["scores"]] == [("point", "dac", 1)]

    grid.main(words)
    said = capsys.readouterr().out
    assert "1 done, 0 to make" in said and "| point | " in said
    other = write_list(tmp_path, algorithms={"dac": "dac.py --num-updates 20"})
    with pytest.raises(SystemExit, match=f"move {other} away"):
        grid.main(words)


def write_log(path, returns):
    """A log of two evaluations of every seed."""
    lines = [{"step": step, "seed": s, "eval/return": x} for step in (100, 200) for s, x in returns.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, [{"args": {}}, *lines])))


def test_a_seed_counts_once(tmp_path, capsys):
    """Two runs of two seeds each, one seed in both: three values. The data's episodes are its own column."""
    write_list(tmp_path, seeds=[0, 1])
    returns = envs.buffers.load(scripted.dataset(tmp_path), ("rewards",), quiet=True)["episode_returns"]
    runs, out = grid.read_grid(tmp_path / "grid.json")
    for i, run in enumerate(runs):
        write_log(Path(run.folder) / "log.jsonl", {seed: 10.0 * seed for seed in (i, i + 1)})
        (Path(run.folder) / "done.json").write_text(json.dumps(run.record()))
    grid.gather(runs, out)
    line = f"| point | {returns.mean():.1f}; {returns.max():.1f} | 10.0 +- 8.2 (3) |"
    assert line in capsys.readouterr().out and line in (out / "table.md").read_text()


def test_a_grid_in_parts_is_collected_as_a_whole(tmp_path):
    """Partial grids, one after the other, into one folder: the table and the figures have all."""
    into = tmp_path / "into"
    for part, (name, algorithm, value) in enumerate((("a", "mopo", 1.0), ("a", "dac", 2.0), ("b", "dac", 3.0))):
        write_log(into / name / algorithm / "seed0.jsonl", {0: value})
        found = {name: {algorithm: {0: (np.array([100]), np.array([value]))}}}
        grid.write_results(tmp_path / f"part{part}", found, [algorithm], {name: (0.5, 9.0)})
        collect.collect_grid(tmp_path / f"part{part}", into)
    head, _, *rows = (into / "table.md").read_text().splitlines()
    assert head.endswith("| mopo | dac |")
    assert rows == ["| a | 0.5; 9.0 | 1.0 (1) | 2.0 (1) |", "| b | 0.5; 9.0 | - | 3.0 (1) |"]
    assert all(is_drawn(into / name) for name in ("a.png", "b.png"))


def test_what_is_not_wanted_is_left_out(tmp_path):
    data = str(scripted.dataset(tmp_path))
    datasets, algorithms = {"maze-a": data, "maze-b": data, "flat": data}, {"mopo": "mopo.py", "dac": "dac.py"}
    write_list(tmp_path, datasets=datasets, algorithms=algorithms, leave_out=["maze-* mopo"])
    runs, _ = grid.read_grid(tmp_path / "grid.json")
    assert [run.name for run in runs] == ["maze-a dac 0", "maze-b dac 0", "flat mopo 0", "flat dac 0"]


@pytest.mark.parametrize("changes, message", [
    (dict(datasets={"point": "no/such.npz"}), "no/such.npz"), (dict(datasets={"../up": "x.npz"}), "names are letters"),
    (dict(algorithms={"rm": "rm -r"}), "begin with one of mopo.py"), (dict(leave_out=["hopper mopo"]), "no such pair"),
    (dict(seeds=[-1]), "seeds whole numbers"), (dict(seeds=[0, 0]), "each once"), (dict(seeds=None), "TypeError"),
])  # fmt: skip
def test_a_broken_list_is_refused(tmp_path, changes, message):
    write_list(tmp_path, **changes)
    with pytest.raises(envs.InputError, match=message):
        grid.read_grid(tmp_path / "grid.json")
