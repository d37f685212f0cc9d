"""Grids of data sets, learners and seeds (benchmark/grid.py), and what is kept of them (benchmark/collect.py)."""

import contextlib
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest

import collect
import dac
import envs
import grid
import grid_figures
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
    folder = write_list(tmp_path)
    command = [sys.executable, "benchmark/grid.py", str(tmp_path / "grid.json"), "--poll", "0.2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 600
    while not (folder / "state.npz").exists():
        assert process.poll() is None and time.time() < deadline, process.communicate()[0]
        time.sleep(0.05)
    os.kill(json.loads((folder / "worker.json").read_text())["pid"], 9)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0 and "started point dac 0 (try 2)" in said and "ended point dac 0" in said, said
    assert "| point |" in said and (folder / "policy.npz").exists()
    assert is_drawn(tmp_path / "grid" / "point.png")
    table = json.loads((tmp_path / "grid" / "table.json").read_text())
    assert [(x["dataset"], x["algorithm"], len(x["returns"])) for x in table["scores"]] == [("point", "dac", 1)]

    monkeypatch.chdir(ROOT)  # both are put back, whatever main does to them
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    grid.main([str(tmp_path / "grid.json")])
    said = capsys.readouterr().out
    assert "1 done, 0 to make" in said and "| point | " in said
    with monkeypatch.context() as patch:
        patch.setitem(dac.OWN, "eta", 0.7)
        with pytest.raises(SystemExit, match=f"made with another eta: move {folder} away"):
            grid.main([str(tmp_path / "grid.json")])
    other = write_list(tmp_path, algorithms={"dac": "dac.py --num-updates 20"})
    with pytest.raises(SystemExit, match=f"move {other} away"):
        grid.main([str(tmp_path / "grid.json")])


def test_a_worker_multiplies_in_the_digits_of_the_flag(tmp_path, monkeypatch):
    """On an accelerator, where a product that is told nothing has fewer than float32's."""
    before, seen = jax.config.jax_default_matmul_precision, []
    monkeypatch.setattr(dac, "main", lambda args: seen.append(jax.config.jax_default_matmul_precision))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    command = ("dac.py", "--dataset", str(scripted.dataset(tmp_path)))
    try:
        for digits in ((), ("--matmul-precision", "bfloat16")):
            assert grid.Run("a dac 0", (*command, *digits), "", str(tmp_path / "run"))() == ""
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    assert seen == ["highest", "BF16_BF16_F32"]


def test_a_seed_counts_once(tmp_path, monkeypatch, capsys):
    """Two runs of two seeds each, one seed in both: three values. The data's episodes are its own column."""
    data = scripted.dataset(tmp_path)
    returns = envs.buffers.load(data, ("rewards",), quiet=True)["episode_returns"]
    about = {"command": ("dac.py", "--dataset", str(data)), "found": lambda: "done"}
    run = lambda seed: types.SimpleNamespace(name=f"point dac {seed}", folder=str(seed), **about)
    curve = lambda seed: (np.arange(5) * 100, np.array([-1e6, *4 * [10.0 * seed]]))  # step 0: not learnt
    read = lambda folder, key: {seed: curve(seed) for seed in (int(folder.name), int(folder.name) + 1)}
    monkeypatch.setattr(grid.plots, "read", read)
    grid.gather([run(0), run(1)], tmp_path)
    line = f"| point | {returns.mean():.1f}; {returns.max():.1f} | 10.0 +- 10.0 (3) |"
    assert line in capsys.readouterr().out and line in (tmp_path / "table.md").read_text()
    assert is_drawn(tmp_path / "point.png")


def test_a_grid_in_parts_is_collected_as_a_whole(tmp_path):
    """Partial grids, one after the other, into one folder: the table and the figures have all."""
    into = tmp_path / "into"
    for part, (name, algorithm, value) in enumerate((("a", "mopo", 1.0), ("a", "dac", 2.0), ("b", "dac", 3.0))):
        lines = [{"args": {}}, *({"step": step, "seed": 0, "eval/return": value} for step in (100, 200))]
        (into / name / algorithm).mkdir(parents=True)
        (into / name / algorithm / "seed0.jsonl").write_text("\n".join(map(json.dumps, lines)))
        found = {name: {algorithm: {0: (np.array([100]), np.array([value]))}}}
        grid.write_results(tmp_path / f"part{part}", found, [algorithm], {name: (0.5, 9.0)})
        collect.collect_grid(tmp_path / f"part{part}", into)
    head, _, *rows = (into / "table.md").read_text().splitlines()
    assert head.endswith("| mopo | dac |")
    assert rows == ["| a | 0.5; 9.0 | 1.0 (1) | 2.0 (1) |", "| b | 0.5; 9.0 | - | 3.0 (1) |"]
    assert all(is_drawn(into / name) for name in ("a.png", "b.png"))


def test_scores_of_episodes_as_long_as_the_datas_have_a_row_where_they_differ(tmp_path):
    of = lambda value: {0: (np.array([100]), np.array([value]))}
    found, short = {"a": {"dac": of(5.0)}, "b": {"dac": of(3.0)}}, {"a": {"dac": of(1.0)}, "b": {"dac": of(3.0)}}
    grid.write_results(tmp_path, found, ["dac"], {"a": (0.5, 9.0), "b": (0.5, 9.0)}, short)
    _, _, *rows = (tmp_path / "table.md").read_text().splitlines()
    first = ["| a | 0.5; 9.0 | 5.0 (1) |", "| a, as long as the data's episodes | 0.5; 9.0 | 1.0 (1) |"]
    assert rows == [*first, "| b | 0.5; 9.0 | 3.0 (1) |"]


def test_settings_are_shown_of_all_their_seeds(tmp_path, monkeypatch, capsys):
    """Seeds in one log or in several; a colour a setting in all panels; what the axis means; only what is asked for."""
    values = {("a", "fast"): (1.0, 3.0), ("a", "slow"): (5.0,), ("b", "slow"): (7.0,)}
    for (data, cell), returns in values.items():
        records = [
            {"seed": k, "step": 10, "eval/return": 2 * x, "eval/return_data_length": x} for k, x in enumerate(returns)
        ]
        path = tmp_path / data / (f"{cell}.jsonl" if data == "a" else f"{cell}/seed0.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(json.dumps, [{"args": {}}, *records])))
    drawn = []
    monkeypatch.setattr(grid_figures.plots, "figure", lambda path, panels, sharey: drawn.append((path.name, panels)))
    grid_figures.main([str(tmp_path)])
    grid_figures.main([str(tmp_path), "--name", "both", "--cells", "slow", "fast"])
    lines = capsys.readouterr().out.splitlines()[2:5]
    assert lines == [
        "| a | fast | 2 | 2 +- 1 | 2 | 4 |",
        "| a | slow | 1 | 5 | 5 | 10 |",
        "| b | slow | 1 | 7 | 7 | 14 |",
    ]
    (name, (a, b)), (other, (both,)) = drawn
    looks = lambda panel: {x["label"]: x["color"] for *_, x in panel["lines"] if "label" in x}
    assert looks(a) == {"fast (2 seeds)": "C0", "slow (one seed)": "C1"} and looks(b) == {"slow (one seed)": "C1"}
    assert looks(both) == {"slow (one seed)": "C0", "fast (2 seeds)": "C1"} and (name, other) == (
        "grid.png",
        "both.png",
    )
    assert a["ylabel"] == "return, in as many steps as the data's episodes"
    grid_figures.main([str(tmp_path), "--cells", "slow", "fast", "--labels", "old", "new", "--leave-out", "b"])
    (only,) = drawn.pop()[1]
    assert only["title"] == "a" and looks(only) == {"old (one seed)": "C0", "new (2 seeds)": "C1"}
    with pytest.raises(envs.InputError, match="--labels: 1 for 2 --cells"):
        grid_figures.main([str(tmp_path), "--cells", "slow", "fast", "--labels", "old"])
    with pytest.raises(envs.InputError, match="no data set has quick"):
        grid_figures.main([str(tmp_path), "--cells", "quick"])


def test_logs_of_different_rows_are_named(tmp_path):
    """Seeds and settings of one data set, also one that does not say beside one that does; other sets are no matter."""
    for path, rows in (("a/x/seed0", 9), ("a/x/seed1", 8), ("a/y", 9), ("a/old", None), ("b/x", 8), ("c/old", None)):
        file = tmp_path / f"{path}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"args": {}} | ({"data": {"rows": rows, "sha256": "00ff"}} if rows else {})) + "\n")
    (told,) = collect.several_files(tmp_path)
    assert told.startswith("warning: a: the logs are not all of the same rows: ")
    assert told.endswith("old.jsonl does not say, x/seed0.jsonl 9 (00ff), x/seed1.jsonl 8 (00ff)")


@pytest.mark.parametrize(
    "changes, told",
    [
        ({}, ""), ({"rows": 8}, r"\(rows of the data\)"), ({"tau": 0.1}, r"\(tau\)"), ({"q_bound": 0.0}, ""),
        ({"records": ["1", "2"], "num_updates": 9}, ""), ({"records": ["3"], "num_updates": 9}, r"\(num_updates\)"),
    ],
)  # fmt: skip
def test_a_log_of_another_run_is_not_replaced(tmp_path, changes, told):
    """Nor is anything copied beside it; a run made longer is the same one, and so is one with another bound of Q."""

    def log(path, rows=9, records=("1",), **args):
        path.parent.mkdir(parents=True, exist_ok=True)
        args = {"tau": 0.2, "num_updates": 5, "q_bound": 1e6} | args
        header = {"args": args, "data": {"rows": rows}, "commit": str(args)}
        path.write_text("\n".join([json.dumps(header), *records]) + "\n")
        return path

    kept, new = log(tmp_path / "kept" / "seed0.jsonl"), tmp_path / "kept" / "seed1.jsonl"
    before, runs = kept.read_text(), [tmp_path / "other", tmp_path / "run"]
    log(runs[0] / "log.jsonl"), log(runs[1] / "log.jsonl", **changes)
    with pytest.raises(envs.InputError, match=told) if told else contextlib.nullcontext():
        collect.keep_logs({new: runs[0], kept: runs[1]})
    after = collect.portable_log(runs[1])
    assert new.exists() != bool(told) and kept.read_text() == (before if told else after)
    collect.keep_logs({kept: runs[1]}, force=True)
    assert kept.read_text() == after
    kept.write_text("")
    assert collect.other_run(runs[1], kept) == "what stands there is no log"


def test_data_of_one_name_are_not_mixed(tmp_path):
    """The table's return of the data, by which scores are scaled, is that of all its logs: else nothing is copied."""
    for folder, mean in (("one", 1.0), ("two", 2.0)):
        grid.write_results(tmp_path / folder, {}, ["dac"], {"a": (mean, 3.0)}, {})
    run = tmp_path / "two" / "a" / "dac" / "seed0"
    run.mkdir(parents=True)
    (run / "policy.npz").touch(), (run / "log.jsonl").write_text('{"args": {}}\n')
    with pytest.raises(envs.InputError, match="a has other rows than in"):
        collect.collect([run], tmp_path / "one")
    assert not (tmp_path / "one" / "a").exists()
    collect.collect([run], tmp_path / "two")


def test_a_part_of_a_list_leaves_a_whole_table(tmp_path, monkeypatch):
    """Of all runs of the list that are done, whichever are asked for; data that are gone are no matter."""
    data = str(scripted.dataset(tmp_path))
    write_list(tmp_path, datasets={"a": data, "b": data, "gone": "gone.npz"}, algorithms={"dac": "dac.py"})
    told = []
    monkeypatch.setattr(grid, "run_all", lambda runs, args, out: told.append([run.name for run in runs]))
    monkeypatch.setattr(grid, "gather", lambda runs, out: told.append([run.name for run in runs]))
    monkeypatch.chdir(tmp_path)
    grid.main(["grid.json", "--only", "b *"])
    assert told == [["b dac 0"], ["a dac 0", "b dac 0"]]


def test_what_is_not_wanted_is_left_out(tmp_path):
    data = str(scripted.dataset(tmp_path))
    datasets, algorithms = {"maze-a": data, "maze-b": data, "flat": data}, {"mopo": "mopo.py", "dac": "dac.py"}
    write_list(tmp_path, datasets=datasets, algorithms=algorithms, leave_out=["maze-* mopo"])
    runs, _ = grid.read_grid(tmp_path / "grid.json")
    assert [run.name for run in runs] == ["maze-a dac 0", "maze-b dac 0", "flat mopo 0", "flat dac 0"]
    write_list(tmp_path, datasets=datasets | {"gone": "gone.npz"}, algorithms=algorithms, leave_out=["maze-* mopo"])
    with pytest.raises(envs.InputError, match="gone"):
        grid.read_grid(tmp_path / "grid.json")
    runs, _ = grid.read_grid(tmp_path / "grid.json", ["flat mopo", "maze-a *"])
    assert [run.name for run in runs] == ["maze-a dac 0", "flat mopo 0"], "what they are not of need not be there"
    with pytest.raises(envs.InputError, match="--only x: no such pair"):
        grid.read_grid(tmp_path / "grid.json", ["x"])


@pytest.mark.parametrize("path", sorted((ROOT / "benchmark").glob("*.json")), ids=lambda path: path.stem)
def test_our_own_lists_are_accepted(path, monkeypatch):
    """But for their data, which are not here."""
    monkeypatch.setattr(grid, "digest", lambda file: "")
    runs, _ = grid.read_grid(path)
    assert runs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(datasets={"point": "no/such.npz"}), "no/such.npz"),
        (dict(algorithms={"rm": "rm -r"}), "begin with one of mopo.py"),
        (dict(datasets={"../up": "x.npz"}), "names are letters"),
        (dict(seeds=[-1]), "seeds whole numbers"),
        (dict(seeds=[0, 0]), "each once"),
        (dict(seeds=None), "TypeError"),
        (dict(leave_out=["hopper mopo"]), "no such pair"),
    ],
)
def test_a_broken_list_is_refused(tmp_path, changes, message):
    write_list(tmp_path, **changes)
    with pytest.raises(envs.InputError, match=message):
        grid.read_grid(tmp_path / "grid.json")
