"""Figures and tables of the UDG studies (benchmark/udg_figures.py)."""

import functools
import itertools
import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest

import udg_figures
import wurl_sac
from runner import diversity


def row(task, label, score, seed=0, **fields):
    """A learner's row whose last five evaluations have the mean `score`; the first one must not count."""
    short = [1000.0, score - 2, score + 2, score, score - 1, score + 1]
    about = {"task": task, "label": label, "pick": f"{label}:1", "learner": "mopo", "seed": seed, "data_mean": 1.0}
    about |= {"chosen": ["policy_00"], "scores": {"policy_00": 0.0}, "steps": list(range(1, 7))}
    return about | {"returns": [10 * x for x in short], "returns_data_length": short} | fields


def lines_of(text):
    """The lines of all tables, each a list of cells."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


@pytest.fixture
def drawn(tmp_path, monkeypatch, capsys):
    """A function that draws one study -> its tables as {first cell of a line: the others}, the whole text, its
    figures by name of file, which are kept from being written."""
    kept = {}
    monkeypatch.setattr(udg_figures, "save", lambda figure, path: kept.update({path.name: figure}))

    def draw(rows, name="toy", **header):
        about = {"study": name, "question": "Why?", "budget": "cpu", "seeds": 1, "missing": [], "cells": {}}
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, [about | header, *rows])))
        kept.clear()
        udg_figures.main([name, "--folder", str(tmp_path)])
        text = capsys.readouterr().out
        return {first: rest for first, *rest in reversed(lines_of(text))}, text, dict(kept)

    yield draw
    plt.close("all")


def marks(figure):
    """How many lines, bars and ranges there are on a figure."""
    return sum(len(axis.lines) + len(axis.collections) for axis in figure.axes)


def timed(seconds):
    """What a study's header knows of its sources: {K: seconds, or fields}."""
    return {f"source K={k}": x if isinstance(x, dict) else {"seconds": x} for k, x in seconds.items()}


def test_the_untrained_policy_does_not_count(drawn):
    """Some learners evaluate it, at step 0. A learner of which nothing is made is missing, and is shown to be."""
    returns = [1000.0, 4.0, 6.0, 5.0]
    curve = {"steps": [0, 10, 20, 30], "returns": returns, "returns_data_length": returns}
    rows = [row("t", "a", 0.0, learner=name, **curve) for name in ("mopo", "dac")]
    table, text, pictures = drawn(rows, tasks=["t"], picks={"a": "a:1"}, learners=["mopo", "dac", "qdq"])
    assert table["mopo"] == ["5.0"] == table["dac"] and table["qdq"] == ["missing"]
    assert "| a | 5.0 | 5.0 | 6.0 | 5.0 | 1.0 |" in text  # score, last, best, whole
    (picture,) = pictures.values()
    assert [text.get_text() for text in picture.axes[0].texts] == ["missing"]


def test_scores_and_spread(drawn):
    means = {("t1", "a"): (10.0, 12.0, 14.0), ("t1", "b"): (5.0, 6.0, 7.0), ("t2", "a"): (20.0,) * 3}
    means["t2", "b"] = (30.0,) * 3
    rows = [row(*key, score, seed) for key, values in means.items() for seed, score in enumerate(values)]
    table, text, pictures = drawn(rows, seeds=3)
    assert table["t1"] == ["12.0 +- 2.0", "6.0 +- 1.0"]  # sqrt(8 / 2), sqrt(2 / 2)
    assert table["t2"] == ["20.0 +- 0.0", "30.0 +- 0.0"]
    assert [cell.split(" [")[0] for cell in table["mean over tasks"]] == ["16.0", "18.0"]
    assert [cell.split(" [")[0] for cell in table["worst task"]] == ["12.0", "6.0"]
    assert table["b over a"][:2] == ["1 of 2", "0.50"] and table["b over a"][2].startswith("2.0 [")
    assert table["b over a"][3] == "-6.0 to 10.0"
    assert table["a"] == ["16.0", "17.0", "1000.0", "160.0", "1.0"], "score, last, best, whole evaluation, data"
    assert "3 seeds of the learner; 6 evaluations a run, the score is of the last 5" in text
    assert set(pictures) == {"toy.png"} and marks(pictures["toy.png"])


def test_every_learner_has_its_tables(drawn):
    """Learners are never averaged with one another: what one gains must not decide for the others."""
    of_bc = {("t1", "a"): 10.0, ("t1", "b"): 0.0, ("t2", "a"): 14.0, ("t2", "b"): 4.0}
    rows = [row(*key, score, learner="bc") for key, score in of_bc.items()]
    rows += [row("t1", "a", 20.0), row("t2", "a", 22.0), row("t1", "b", 23.0), row("t1", "b", 25.0, 1)]
    about = {"tasks": ["t1", "t2"], "picks": {"a": "x:1", "b": "y:1"}, "learners": ["mopo", "bc"]}
    table, text, pictures = drawn(rows, **about)
    assert table["mopo"] == ["21.0 (20.0)", "missing"] and table["bc"] == ["12.0 (10.0)", "2.0 (0.0)"]
    assert table["mean episode of the data"] == ["1.0 (1.0)"] * 2
    of_mopo, of_bc = text.split("### mopo")[1].split("### bc")
    assert "| b over a | 1 of 1 |" in of_mopo and "| a over b | 2 of 2 | 1.00 | 10.0 |" in of_bc
    assert "| t1 | 20.0 | 24.0 +- 1.4 |" in of_mopo and "| t1 | 10.0 | 0.0 |" in of_bc
    axes = pictures["toy.png"].axes  # learners have groups, tasks have panels
    assert [axis.get_xlabel() for axis in axes if axis.get_xlabel()] == ["t1", "t2"]
    groups = [[text.get_text() for text in axis.get_xticklabels()] for axis in axes if axis.get_xlabel()]
    assert groups == [["MOPO", "cloning"]] * 2


def test_missing_cells_are_called_missing(drawn):
    rows = [row("t1", "a", 10.0), row("t2", "a", 20.0), row("t2", "b", 7.0)]
    plan = {"tasks": ["t1", "t2"], "picks": {"a": "a:1", "b": "b:1", "c": "c:1"}}
    plan |= {"missing": ["learn t1 b:1 mopo", "..."]}
    table, text, pictures = drawn(rows, **plan)
    assert table["t1"] == ["10.0", "missing", "missing"] and table["t2"] == ["20.0", "7.0", "missing"]
    assert table["mean over tasks"] == ["15.0", "missing", "missing"], "no mean over half the tasks"
    assert table["a over b"] == ["1 of 1", "1.00", "13.0", "13.0 to 13.0"], "no interval from one seed"
    assert "Not made yet: 2 cells, e.g. learn t1 b:1 mopo" in text
    assert table["b"] == ["missing"] * 5, "nor one beside a mean over all"
    whole = drawn([*rows, row("t1", "b", 8.0), row("t1", "c", 8.0), row("t2", "c", 8.0)], **plan)[2]
    assert 0 < marks(pictures["toy.png"]) < marks(whole["toy.png"])


def test_luck_of_the_source_beside_that_of_the_learner(drawn):
    """Sources 10 and 20 on one task, 30 and 30 on the other; their learners' seeds 1 to both sides."""
    means = {("t1", 0): 10.0, ("t1", 1): 20.0, ("t2", 0): 30.0, ("t2", 1): 30.0}
    rows = [row(t, f"seed {i}", mean + 2 * seed - 1, seed) for (t, i), mean in means.items() for seed in (0, 1)]
    text = drawn(rows, seeds=2)[1]
    assert "over 2 tasks: of a learner's seeds 1.4, of the sources' means 5.0;" in text  # sqrt(2), sqrt((50 + 0) / 2)
    assert "without the seeds' share of that: 4.9." in text  # sqrt(25 - 2 / 2)


def test_notices_above_the_tables(drawn):
    _, text, pictures = drawn([], missing=["source humanoid"])
    assert "Nothing to draw yet" in text and not pictures
    learner = {"learn x": {"commit": "a"}}
    for other, told in (({"learn y": {"commit": "b"}}, True), ({"source": {}}, False)):
        assert ("ran at 2 commits" in drawn([row("t1", "a", 1.0)], cells=learner | other)[1]) == told


def test_chance_above_counts_ties_half():
    for a, b, chance in (([1, 2, 3], [2, 2, 2], 0.5), ([3, 4], [1, 3], 0.875), ([1.0], [1.0], 0.5)):
        assert udg_figures.chance_above(a, b) == pytest.approx(chance)


def test_intervals_are_those_of_all_resamples():
    """Three seeds have 27 resamples, two labels 729 pairs of them: the exact quantiles are known."""
    a, b = [3.0, 5.0, 10.0], [0.0, 1.0, 4.0]
    exact = functools.partial(np.quantile, q=[0.025, 0.975], method="inverted_cdf")
    means = lambda x: np.array([np.mean(draw) for draw in itertools.product(x, repeat=3)])
    numbers = lambda text: [float(x) for x in re.findall(r"-?\d+\.\d", text)]
    assert numbers(udg_figures.over_tasks([a])[0]) == [6.0, *exact(means(a))] == [6.0, 3.0, 10.0]
    ((_, _, chance, difference, _),) = udg_figures.orderings({"t": {"a": a, "b": b}}, ["b", "a"])
    assert chance == "0.89"  # 8 of the 9 pairs
    mean, *interval = numbers(difference)
    assert mean == 4.3
    np.testing.assert_allclose(interval, exact(np.subtract.outer(means(a), means(b))), atol=0.4)
    same = udg_figures.orderings({"t": {"a": a, "b": a}}, ["a", "b"])[0][3]
    assert same != "0.0 [0.0, 0.0]", "two labels are drawn apart, not as pairs"


@pytest.mark.parametrize("x, gain, rank, lost, differ", [
    ([4.0, 3, 2, 1], [10.0, 20, 30, 40], -1.0, 30.0, 1.0),
    ([1.0, 1, 2], [1.0, 2, 3], 0.866, 0.0, 0.0),  # ties share the mean rank: 1.5, 1.5, 3
    ([1.0, 3, 2], [5.0, 4, 7], -0.5, 3.0, 1.0),
    ([2.0, 2, 2], [1.0, 2, 3], np.nan, 2.0, 1.0),
])  # fmt: skip
def test_rank_correlation_and_what_is_lost(x, gain, rank, lost, differ):
    found = udg_figures.judge(np.array(x), np.array(gain)[:, None])
    np.testing.assert_allclose(found, (rank, lost, differ), atol=1e-3)


def test_the_best_buffer_is_judged_by_other_seeds():
    """Ten buffers that are all the same: whoever is followed loses nothing on average, and the best is luck."""
    gains = np.random.default_rng(0).normal(size=(300, 10, 3))
    lost = [udg_figures.judge(np.arange(10.0), gain)[1] for gain in gains]
    naive = gains.mean(2).max(1) - gains[:, 9].mean(1)
    assert abs(np.mean(lost)) < 0.15 < 0.7 < np.mean(naive)
    gain = np.array([[1.0, 1, 9], [2, 2, 2], [0, 0, 0]])
    # left out: the third seed, and buffer 1 is the best; the first or second, and it is buffer 0
    np.testing.assert_allclose(udg_figures.judge(np.array([0.0, 1, 0]), gain)[1:], ((1 - 2 + 1 - 2 + 0) / 3, 2 / 3))
    np.testing.assert_allclose(udg_figures.judge_seeds(gain), (0.5, (3 + 3 + 1) / 3, 1.0))


def bound_rows():
    """Two tasks, three buffers. Return picks the best on t1 and misses it on t2, where it differs from W1."""
    gains = {"t1": (90.0, 50.0, 10.0), "t2": (80.0, 70.0, 20.0)}
    returns = {"t1": (60.0, 30.0, 0.0), "t2": (10.0, 40.0, 5.0)}
    far = {"t1": (1.0, 2.0, 3.0), "t2": (3.0, 2.0, 1.0)}
    names = [f"policy_{k:02d}" for k in range(3)]
    for task in gains:
        spaces = {"(s, a), standardised": (0.1, 0.2, 0.3), "features": far[task]}
        w1 = {space: dict(zip(names, values, strict=True)) for space, values in spaces.items()}
        yield {"task": task, "w1": w1, "floor": {"(s, a), standardised": 0.05, "features": 0.5}}
        for (k, name), seed in itertools.product(enumerate(names), (0, 1)):  # whose mean is the gain
            chosen = {"chosen": [name], "scores": {name: returns[task][k]}}
            yield row(task, f"policy {k}", gains[task][k] + (2 * seed - 1), seed, **chosen)


def test_bound_counts_misaligned_returns(drawn):
    _, text, pictures = drawn(bound_rows(), seeds=2)
    for space in ("(s, a), standardised", "features"):
        assert f"relabelled return and W1 to the expert, {space} choose different buffers in 1 of 2 tasks" in text
    assert [line[1:] for line in lines_of(text) if line[0] == "mopo"] == [
        ["W1 to the expert, (s, a), standardised", "1.00", "1.00", "0%", "0.0", "0.0"],
        ["W1 to the expert, features", "0.00", "-1.00", "50%", "30.0", "60.0"],
        ["mean relabelled return", "0.75", "0.50", "50%", "5.0", "10.0"],
        ["a seed of the learner itself", "1.00", "1.00", "0%", "0.0", "0.0"],
    ]
    assert marks(pictures["toy.png"])


def test_bound_with_half_its_cells(drawn):
    """A buffer without a learner is left out of the ranks; a task without any is not counted."""
    rows = [r for r in bound_rows() if "w1" in r or (r["task"], r["label"] == "policy 0") == ("t1", False)]
    _, text, pictures = drawn(rows)
    assert "in 0 of 1 tasks" in text and marks(pictures["toy.png"])


@pytest.mark.parametrize("seconds, line", [
    ({2: 60, 5: {"seconds": 600, "cpu_seconds": 90}}, ([5], [1.5])),  # a shared machine's minutes left out
    ({2: 60, 5: 600}, ([2, 5], [1.0, 10.0])),
    ({2: {"seconds": 60, "cpu_seconds": 30}, 5: {"seconds": 9, "cpu_seconds": 9, "resumed": True}}, ([2], [0.5])),
])  # fmt: skip
def test_cost_is_processor_time_where_it_is_known(drawn, seconds, line):
    """The right panel's line, K and minutes; the left one's are the mean over tasks and the worst."""
    every = itertools.product(seconds, enumerate(("t1", "t2")), range(3))
    rows = [row(task, f"K={k}", 10.0 * k - 2 * i, seed) for k, (i, task), seed in every]
    left, right = drawn(rows, seeds=3, cells=timed(seconds))[2]["toy.png"].axes
    assert [list(bars.lines[0].get_ydata()) for bars in left.containers] == [[19.0, 49.0], [18.0, 48.0]]
    assert (list(right.lines[0].get_xdata()), list(right.lines[0].get_ydata())) == line


def test_several_learners_have_a_line_each_against_the_number(drawn):
    """Means over two tasks that lie 2 apart; the data's is the broken line; cloning, without K=5, is drawn at K=2."""
    found = [("mopo", 2, 10.0), ("mopo", 5, 20.0), ("cped", 2, 9.0), ("cped", 5, 8.0), ("bc", 2, 1.0)]
    rows = [row(task, f"K={k}", value + d, learner=learner, data_mean=k + 3 * d)
            for learner, k, value in found for task, d in (("t1", -1.0), ("t2", 1.0))]  # fmt: skip
    left = lambda *tasks: drawn(rows, tasks=tasks, cells=timed({2: 120, 5: 300}))[2]["toy.png"].axes[0]
    axis = left("t1", "t2")
    lines = {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in axis.containers}
    assert lines == {"MOPO": [[2, 10], [5, 20]], "CPED": [[2, 9], [5, 8]], "cloning": [[2, 1]]}
    broken = [line.get_xydata().tolist() for line in axis.lines if line.get_linestyle() == "--"]
    assert broken == [[[2, 2], [5, 5]]] and "missing" in axis.get_title(loc="left")
    # A task that has no rows yet: there is no mean over tasks to draw.
    assert not any(len(bars.lines[0].get_xdata()) for bars in left("t1", "t2", "t3").containers)


def test_a_selection_has_one_look_in_every_study(drawn):
    """The colour of `random` is the same beside two other picks and beside four."""
    looks = []
    for labels in (
        ("top1", "random"),
        ("top1", "top2", "all", "supervised", "random"),
        [f"policy {k}" for k in range(10)],
    ):
        (legend,) = drawn([row("t1", label, float(i)) for i, label in enumerate(labels)])[2]["toy.png"].legends
        found = [(handle.get_color(), handle.get_marker()) for handle in legend.legend_handles]
        looks.append(dict(zip((text.get_text() for text in legend.get_texts()), found, strict=True)))
    assert looks[0]["random"] == looks[1]["random"] and looks[0]["top 1"] == looks[1]["top 1"]
    assert len(set(looks[1].values())) == len(looks[1]) == 6, "five picks and the mean episode of the data"
    assert len(set(looks[2].values())) == len(looks[2]) == 11, "the ten buffers of ranks-ant"


@pytest.mark.parametrize("far, panels", [(1.0, 1), (100.0, 2)])
def test_far_means_of_the_data_have_their_own_axis(drawn, far, panels):
    """Learners one apart and data a hundred apart on one axis would be a flat line."""
    axes = drawn([row("t1", "top1", 10.0), row("t1", "all", 11.0, data_mean=1.0 + far)])[2]["toy.png"].axes
    heights = [float(line.get_ydata()[0]) for line in axes[-1].lines if len(line.get_xdata()) == 2]
    assert len(axes) == panels and {1.0, 1.0 + far} <= set(heights) and np.ptp(axes[0].get_ylim()) < 15


@pytest.mark.parametrize("task, measured, near", [
    ("point-angle-300", "point-angle-60", 90.0), ("ant-angle-60", "ant-angle-60", 200.0), ("t1", None, 5.0),
])  # fmt: skip
def test_an_expert_is_drawn_where_it_is_known(drawn, task, measured, near):
    (axis, *_) = drawn([row(task, "top1", near), row(task, "random", near / 2)])[2]["toy.png"].axes
    heights = [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == ":"]
    known = json.loads(udg_figures.REFERENCES.read_text())["tasks"]
    assert heights == ([known[measured]["expert_data_length"]] if measured else [])


def source(name, mean, smallest, accuracy=(0.9, 0.9, 0.9), K=10):
    """A source's row; numbers per evaluation."""
    curve = lambda values: [[100 * (i + 1), value] for i, value in enumerate(values)]
    last = {"eval/min_w": mean[-1], "eval/smallest_w": smallest[-1], "eval/distinct_nearest": 4.0}
    curves = {"min_w": mean, "smallest_w": smallest, "disc_accuracy_held_out": accuracy}
    each = {"eval/travel": list(range(K)), "eval/length": [20.0 + k for k in range(K)]}
    row = {"source": name, "last": last, "each": each, "min_w_full": []}
    return row | {key: curve(values) for key, values in curves.items()}


@pytest.mark.parametrize("scales, distance", [(("1 1", "1 1"), 3.0), (("1 1", "1 10"), 7.0)])
def test_distances_are_drawn_in_a_space_that_sources_share(drawn, scales, distance):
    full = {"min_w_full": [[1, 7.0]], "smallest_w_full": [[1, 7.0]]}
    rows = [source(name, (3.0,) * 3, (3.0,) * 3) | full for name in "ab"]
    cells = {f"source {name}": {"command": f"python wurl_sac.py --feature-scales {scale} --task point"}
             for name, scale in zip("ab", scales, strict=True)}  # fmt: skip
    lines = drawn(rows, cells=cells)[2]["toy-diversity.png"].axes[0].lines
    assert [line.get_ydata()[0] for line in lines] == [distance] * 2


def test_collapse_is_seen_where_it_was(drawn):
    four, three, late, merging = (4.0, 4.0, 4.0), (3.0, 3.0, 3.0), (3.0, 3.0, 0.9), (0.9, 0.54, 0.3)
    rows = [source("apart", four, three), source("late", four, late), source("mended", four, (0.9, 1.0, 3.0)),
            source("shared", four, three, merging), source("both", four, late, merging)]  # fmt: skip
    _, text, pictures = drawn(rows)
    table = {line[0]: line[1:] for line in lines_of(text) if len(line) == 13}
    assert table["apart"][:2] == ["4", "3"] and table["apart"][-4:] == ["9.0 of 10", "no", "0 of 3", "0 of 3"]
    assert table["late"][-3:] == ["coincide", "1 of 3", "0 of 3"] and table["mended"][-3:] == ["no", "1 of 3", "0 of 3"]
    assert table["shared"][-4:] == ["3.0 of 10", "few", "0 of 3", "2 of 3"]
    assert table["both"][-3:] == ["coincide and few", "1 of 3", "2 of 3"]
    assert ["apart", "20, 24.5, 29", "0, 4.5, 9", "-"] in lines_of(text)
    assert set(pictures) == {"toy-diversity.png"} and marks(pictures["toy-diversity.png"])


def test_figures_find_few_policies_where_wurl_sac_warns():
    """Coinciding ones it finds by exact W1, which the curves of these studies do not have."""
    for K, accuracy in itertools.product((2, 10, 20), np.linspace(0.05, 1, 20)):
        args = wurl_sac.Args(task="point", num_policies=K, num_updates=400)
        metrics = {"eval/w1": 9.0 - 8.0 * np.eye(K), "eval/w1_same": [], "eval/disc_accuracy_held_out": accuracy}
        texts = [diversity.collapse(metrics, step, args) for step in (100, 200, 300, 400)]
        _, few = udg_figures.collapsed(source("x", (1.0,) * 4, (1.0,) * 4, (accuracy,) * 4, K))
        assert [bool(x) for x in texts] == list(few), (K, accuracy)


def test_figures_name_what_there_is(tmp_path):
    with pytest.raises(SystemExit, match=r"no study in .*run benchmark/udg_study.py first"):
        udg_figures.main(["--folder", str(tmp_path)])
    (tmp_path / "toy.jsonl").write_text("{}")
    with pytest.raises(SystemExit, match=r"no bond in .*; there is toy"):
        udg_figures.main(["bond", "--folder", str(tmp_path)])
