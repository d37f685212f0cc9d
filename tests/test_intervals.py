"""benchmark/intervals.py: IQM, P(better) and their bootstrap, against plain sums."""

import json

import numpy as np
import pytest

import envs
import intervals


def table(path, scores, algorithms=("ours", "bc")):
    """A table of benchmark/grid.py: data sets a (mean 100, best 300) and b (mean 0, best 10)."""
    data = {"a": [100.0, 300.0], "b": [0.0, 10.0]}
    rows = [
        {"dataset": d, "algorithm": name, "returns": [data[d][0] + x * np.subtract(*data[d][::-1]) for x in of[d]]}
        for name, of in zip(algorithms, scores, strict=True)
        for d in of
    ]
    path.write_text(json.dumps({"algorithms": algorithms, "data": data, "scores": rows}))
    return path


def test_scores_are_in_units_of_the_data_and_the_middle_half_counts(tmp_path, capsys):
    ours, bc = {"a": [0.0, 1.0, 1.0, 9.0], "b": [0.5, 1.5, 1.0, -7.0]}, {"a": [1.0, 2.0], "b": [0.0, 1.5]}
    path = table(tmp_path / "table.json", (ours, bc))
    found = intervals.main([str(path), "--draws", "50"])
    middle = sorted(ours["a"] + ours["b"])[2:-2]
    assert found["ours"][0][0] == pytest.approx(np.mean(middle))
    pairs = {d: [(x > y) + 0.5 * (x == y) for x in ours[d] for y in bc[d]] for d in ours}
    assert found["ours"][1][0] == pytest.approx(np.mean([np.mean(pairs["a"]), np.mean(pairs["b"])]))
    assert found["bc"][1][0] == pytest.approx(0.5)
    assert (tmp_path / "intervals.png").stat().st_size > 5_000
    assert "fewer than three seeds somewhere" in capsys.readouterr().out


def test_the_interval_is_that_of_the_mean_of_many_seeds():
    """Of one data set with many seeds; seeds of two sets are never mixed."""
    rng = np.random.default_rng(0)
    scores = {"a": rng.normal(size=200)}
    middle, low, high = intervals.interval(lambda x: x["a"].mean(), 2_000, rng, scores)
    error = scores["a"].std() / np.sqrt(200)
    np.testing.assert_allclose([low - middle, high - middle], [-1.96 * error, 1.96 * error], rtol=0.1)
    apart = {"a": np.zeros(5), "b": np.ones(5)}
    assert all(intervals.redrawn(apart, rng)[d].std() == 0 for d in apart)


def test_what_cannot_be_compared_is_refused(tmp_path):
    path = table(tmp_path / "table.json", ({"a": [1.0]}, {"b": [1.0]}))
    with pytest.raises(envs.InputError, match="no data set has all of ours, bc"):
        intervals.main([str(path)])
    path = table(tmp_path / "table.json", ({"a": [1.0]}, {"a": [1.0]}))
    with pytest.raises(envs.InputError, match="--against dac: not in the table; one of ours, bc"):
        intervals.main([str(path), "--against", "dac"])
    with pytest.raises(envs.InputError, match="a ours is in two tables: leave one out"):
        intervals.main([str(path), str(path)])
    found = json.loads(path.read_text())
    found["scores"][0]["returns_data_length"] = [300.0]  # of whole evaluations, which are longer, the data know nothing
    path.write_text(json.dumps(found))
    assert intervals.read_tables([path])["ours"]["a"] == 1.0
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(envs.InputError, match=r"torn.json: no table of benchmark/grid.py"):
        intervals.main([str(tmp_path / "torn.json")])


def test_data_sets_that_do_not_count_are_named(tmp_path, capsys):
    """What an algorithm lacks, unless it is not asked for; a best episode that is hardly above the mean."""
    path = table(tmp_path / "table.json", ({"a": [0.5]}, {"a": [0.0], "b": [1.0]}, {"a": [0.7], "b": [2.0]}), "xyz")
    assert set(intervals.read_tables([path])["x"]) == {"a"}
    assert "left out b: x has no score there" in capsys.readouterr().out
    found = intervals.read_tables([path], ["z", "y"])
    assert list(found) == ["y", "z"] and all(set(of) == {"a", "b"} for of in found.values())
    assert capsys.readouterr().out == ""
    found = json.loads(path.read_text())
    found["data"]["a"] = [0.991, 1.0]
    path.write_text(json.dumps(found))
    assert set(intervals.read_tables([path], ["y", "z"])["y"]) == {"b"}
    assert "left out a: its best episode, 1, is hardly above its mean, 0.991" in capsys.readouterr().out
    found["data"]["b"] = [1.0, 1.0]
    path.write_text(json.dumps(found))
    with pytest.raises(envs.InputError, match="no data set has all of x, y, z"):
        intervals.read_tables([path])
    with pytest.raises(envs.InputError, match=r"--algorithms w: not in .*, which has x, y, z"):
        intervals.read_tables([path], ["w"])
