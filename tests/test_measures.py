"""Measures of data: returns where episodes were cut, actions, coverage, variety, and samples of (s, a)."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

import measure_ranks
from envs.buffers import measures


def restarts(rng, rounds, length, hazard):
    """Lengths and completeness of episodes that end at a step with chance `hazard` and at `length`; the next begins at
    once, and a round of `length` steps cuts its last."""
    lengths, complete = [], []
    for _ in range(rounds):
        left = length
        while left:
            whole = min(rng.geometric(hazard), length)
            lengths.append(min(whole, left))
            complete.append(whole <= left)
            left -= lengths[-1]
    return np.array(lengths), np.array(complete)


@pytest.mark.parametrize("reward", [lambda t: 1.0 + 0.0 * t, lambda t: t / 100 - 2.0], ids=["1 a step", "rising"])
def test_cut_episodes_do_not_bias_the_mean_return(reward):
    """The truth is sum_t P(alive at t) r_t, 289 for 1 a step; the complete ones alone have 223."""
    rng, length, hazard, steps = np.random.default_rng(0), 1000, 1 / 300, np.arange(1000)
    truth = np.sum((1 - hazard) ** steps * reward(steps))
    total = np.concatenate([[0.0], np.cumsum(reward(steps))])
    found, plain = [], []
    for _ in range(40):
        lengths, complete = restarts(rng, 200, length, hazard)
        found.append(measures.return_statistics(total[lengths], lengths, complete)["mean"])
        plain.append(total[lengths[complete]].mean())
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - truth) < 3 * error
    assert abs(np.mean(plain) - truth) > 10 * error


def test_weights_against_a_redistribution_to_the_right():
    """Efron's way to the same weights: who is cut hands what it stands for, in equal parts, to all that live on."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(1, 9, 12)
        complete = rng.random(12) < 0.6
        complete[np.argmax(lengths)] = True
        weights = np.ones(12)
        for t in np.unique(lengths):  # at a step, who ends by itself ends first
            cut = (lengths == t) & ~complete
            if cut.any() and (lengths > t).any():
                weights[lengths > t] += weights[cut].sum() / (lengths > t).sum()
                weights[cut] = 0.0
            elif cut.any():  # the longest, cut beside one that is complete: both count
                assert t == lengths.max()
        np.testing.assert_allclose(measures.episode_weights(lengths, complete), weights, rtol=1e-12)
        assert weights.sum() == pytest.approx(12)


def test_weights_where_all_or_none_or_not_the_longest_are_complete():
    lengths = np.array([3, 5, 9])
    for complete in ([True] * 3, [False] * 3):
        np.testing.assert_array_equal(measures.episode_weights(lengths, np.array(complete)), 1.0)
    np.testing.assert_allclose(measures.episode_weights(lengths, np.array([True, False, False])), [1, 0, 2])


def test_statistics_with_weights_are_those_of_repeated_episodes():
    returns = np.random.default_rng(0).normal(size=40)
    lengths, complete = np.repeat([5, 10], 20), np.arange(40) >= 20  # each of the complete stands for two
    found = measures.return_statistics(returns, lengths, complete)
    repeated = np.repeat(returns[20:], 2)
    assert found["mean"] == pytest.approx(repeated.mean()) and found["std"] == pytest.approx(repeated.std())
    assert found["top_decile"] == pytest.approx(np.sort(repeated)[-4:].mean())
    assert found["per_step"] == pytest.approx(repeated.mean() / 10)
    lengths, complete = np.array([2, 3, 10, 10]), np.array([True, False, True, True])  # the last two count 3 / 2
    found = measures.return_statistics(np.array([1.0, 5.0, 4.0, 8.0]), lengths, complete)
    assert found["per_step"] == pytest.approx((1 + 1.5 * 12) / (2 + 1.5 * 20))
    found = measures.return_statistics(np.arange(15.0), np.ones(15, int), np.ones(15, bool))  # a tenth: one and a half
    assert found["top_decile"] == pytest.approx((14 + 0.5 * 13) / 1.5)


def test_entropy_and_saturation_of_actions():
    rng, n = np.random.default_rng(0), 100_000
    assert measures.action_entropy(rng.uniform(-1, 1, (n, 3))) == pytest.approx(1.0, abs=1e-3)
    assert measures.action_entropy(np.zeros((n, 3))) == 0.0
    ends = rng.choice([-1.0, 1.0], (n, 1))
    assert measures.action_entropy(ends) == pytest.approx(np.log(2) / np.log(32), abs=1e-3)
    assert measures.action_entropy(np.hstack([ends, 0 * ends])) == pytest.approx(0.1, abs=1e-3)
    assert measures.saturation(np.array([[0.96, 0.94], [-0.96, 0.0], [0.1, 0.2]])) == pytest.approx(2 / 6)


def test_coverage_is_a_share_of_what_all_visit_and_has_no_unit():
    rng = np.random.default_rng(0)
    left, both = rng.uniform(0, 1, (5000, 2)) * [0.5, 1], rng.uniform(0, 1, (5000, 2))
    for unit in ([1, 1], [1000, 0.001]):
        half, whole = measures.coverage_shares([left * unit, both * unit])
        assert half == pytest.approx(0.55, abs=0.05) and whole == pytest.approx(1.0, abs=0.01)


def test_the_effective_number_counts_behaviours():
    rng = np.random.default_rng(0)
    corners = 10.0 * np.array([[0, 0], [0, 1], [1, 0], [1, 1], [0, 2]])
    groups = [np.repeat(corners[:m], 60 // m, axis=0) + 0.01 * rng.normal(size=(60 // m * m, 2)) for m in (1, 2, 3, 5)]
    np.testing.assert_allclose(measures.effective_numbers(groups), [1, 2, 3, 5], rtol=0.02)
    uneven = np.concatenate([np.repeat(corners[:1], 54, axis=0), np.repeat(corners[1:2], 6, axis=0)])
    expected = np.exp(-0.9 * np.log(0.9) - 0.1 * np.log(0.1))
    assert measures.effective_numbers([*groups, uneven])[-1] == pytest.approx(expected, rel=0.01)
    assert measures.effective_numbers([np.zeros((4, 2))]) == pytest.approx([1.0])


class Toy:
    """A buffer as far as measures look at it: features are the first two observations."""

    def __init__(self, observations, actions, length=10):
        rows = len(observations)
        self.arrays = {"observations": observations, "next_observations": observations, "actions": actions}
        self.arrays |= {"episode_ends": np.arange(length, rows + 1, length)}
        self.arrays |= {"root_positions": observations, "root_velocities": observations}
        self.arrays |= {"episode_lengths": np.full(rows // length, length)}
        self.num_episodes, self.path, self.metadata = rows // length, "toy.npz", {"reward_kind": "none"}

    def __getitem__(self, key):
        return self.arrays[key]


def test_samples_are_of_the_chosen_episodes_alone_and_finite():
    numbers = np.arange(60.0)[:, None]
    first, second = Toy(numbers, numbers / 100), Toy(numbers + 1000, numbers / 100)
    first.arrays["observations"][25] = np.nan
    parts = [(first, np.array([0, 2])), (second, np.array([5]))]
    found = measures.state_actions(parts, lambda x: 2 * x, 1000, np.random.default_rng(0))
    rows = [*range(10), *range(20, 25), *range(26, 30), *range(1050, 1060)]
    assert sorted(found[:, 0]) == [2.0 * x for x in rows]
    np.testing.assert_allclose(found[:, 1], found[:, 0] / 2 % 1000 / 100)  # a row stays one row
    assert len(measures.state_actions(parts, lambda x: x, 7, np.random.default_rng(0))) <= 7


def test_distances_in_state_actions():
    rng = np.random.default_rng(0)
    make = lambda shift: Toy(rng.normal(size=(400, 2)) + shift, rng.uniform(-1, 1, (400, 1)))
    buffers, expert = [make(0.0), make(3.0)], make(3.0)
    everything = np.arange(40)
    near = measures.state_action_distances(
        [(b, everything) for b in buffers], [(expert, everything)], [(make(0.0), everything)], lambda x: x, 100, 0
    )
    far, close, floor = near.to_expert
    assert far > 3 * close and close == pytest.approx(floor, rel=0.3)
    assert near.to_random[1] > 3 * near.to_random[0]
    assert near.distance([(buffers[1], everything)], lambda x: x, 100, 1) == pytest.approx(floor, rel=0.3)
    np.testing.assert_allclose(np.concatenate([*near.samples, near.expert]).std(0), 1.0)
    none = measures.state_action_distances(
        [(b, everything) for b in buffers], [(expert, everything)], [], lambda x: x, 9, 0
    )
    assert none.to_random == [None, None]


def test_drift_and_what_is_equal_of_all_buffers():
    rng, world = np.random.default_rng(0), SimpleNamespace(feature=lambda step: step.next_observations[:, :2])
    still, actions = rng.normal(size=(1000, 2)), rng.uniform(-1, 1, (1000, 2))
    moving = still + np.linspace(0, 10, 1000)[:, None] * [1, 0]
    calm, drifting = measures.measure_buffers(
        [(Toy(x, actions), np.arange(100)) for x in (still, moving)], world, 50, 0
    )
    assert calm["drift"] < 1 and drifting["drift"] == pytest.approx(9.0, abs=1.0)  # 0.95 - 0.05 of the way
    assert drifting["coverage"] > calm["coverage"] and drifting["behaviours"] > calm["behaviours"]
    assert calm["action_entropy"] == drifting["action_entropy"] and calm["saturation"] == drifting["saturation"]


# --- benchmark/measure_ranks.py ---


def test_rank_correlations_of_measures_with_returns(tmp_path, monkeypatch):
    """The committed table; a measure that is the return, one that is against it; buffers of another run are refused."""
    rows = [
        {"learner": "mopo", "task": task, "chosen": [name], "score": score + seed, "scores": {name: score}}
        for task in ("a", "b")
        for name, score in (("p", 1.0), ("q", 5.0), ("r", 3.0))
        for seed in (0, 1)
    ]
    buffers = {name: {"good": x, "w1_expert": -x, "bad": -x} for name, x in (("p", 1), ("q", 5), ("r", 3))}
    found = measure_ranks.ranks(rows, {"a": buffers, "b": buffers | {"q": {"good": 2, "w1_expert": 0, "bad": 0}}})
    assert found["mopo"]["good"] == pytest.approx([1.0, 0.5])
    assert found["mopo"]["w1_expert"][0] == pytest.approx(1.0) and found["mopo"]["bad"][0] == pytest.approx(-1.0)
    monkeypatch.setattr(measure_ranks, "load", lambda path: ({}, {}, rows[:6], {}))
    monkeypatch.setattr(measure_ranks, "RESULTS", tmp_path)
    of = dict.fromkeys(measure_ranks.SCORES, 0.0)
    report = {"buffers": {n: {**of, "mean": x} for n, x in (("p", 1.0), ("q", 5.0), ("r", 3.0))}, "measures": buffers}
    report["flags"] = {"proxy": 0.01, "w1_points": 500, "seed": 0}
    (tmp_path / "a").mkdir()
    (tmp_path / "a/scores.json").write_text(json.dumps(report))
    measure_ranks.collect("x", tmp_path)
    assert json.loads((tmp_path / "x.jsonl").read_text())["buffers"]["q"] == {**of, "mean": 5.0, **buffers["q"]}
    report["buffers"]["r"]["mean"] = 3.001
    (tmp_path / "a/scores.json").write_text(json.dumps(report))
    with pytest.raises(measure_ranks.envs.InputError, match="r is not the buffer"):
        measure_ranks.collect("x", tmp_path)


def test_the_committed_table_has_the_studys_own_number(capsys):
    measure_ranks.main(["bound"])
    table = dict(line.strip("| ").split(" | ", 1) for line in capsys.readouterr().out.splitlines() if "|" in line)
    assert table["mean"] == "0.55; 0.35 | 0.56; 0.33"  # as docs/udg.md has it of the same rows
