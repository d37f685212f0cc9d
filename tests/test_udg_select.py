"""udg_select: relabelling, scores, exact W1, what is written, and every refusal."""

import dataclasses
import hashlib
import itertools
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import envs
import envs.buffers
import runner
import udg_select
from envs.buffers import figures as buffer_figures
from envs.buffers import scripted
from envs.buffers.raw import buffer_paths, map_buffer
from tests.test_measures import restarts
from udg_select import Args

METADATA = {
    "dataset_name": "toy", "env": "point", "task": "point", "layout": "env",
    "reward_kind": "none", "dt": 0.1, "episode_length": 10,
}  # fmt: skip


def walk(angle, episodes=6, length=10, seed=0, speed=0.5, **changes):
    """Arrays of a point robot that walks at `angle` degrees; (x, y, vx, vy) observed."""
    rng = np.random.default_rng(seed)
    heading = speed * np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
    velocity = heading + 0.1 * rng.normal(size=(episodes, length, 2))
    position = np.concatenate([np.zeros((episodes, 1, 2)), np.cumsum(0.1 * velocity, axis=1)], axis=1)
    before = np.concatenate([np.zeros((episodes, 1, 2)), velocity[:, :-1]], axis=1)
    arrays = {
        "observations": np.concatenate([position[:, :-1], before], axis=-1),
        "next_observations": np.concatenate([position[:, 1:], velocity], axis=-1),
        "actions": np.clip(velocity, -1, 1),
        "root_positions": position[:, :-1],
        "root_velocities": velocity,
    }
    arrays = {k: v.reshape(episodes * length, -1).astype(np.float32) for k, v in arrays.items()}
    rows = episodes * length
    arrays["rewards"] = np.zeros(rows, np.float32)
    arrays["terminals"] = np.zeros(rows, bool)
    arrays["timeouts"] = np.arange(rows) % length == length - 1
    return {**arrays, **changes}


def write(path, arrays, **metadata):
    return envs.buffers.save(path, arrays, {**METADATA, **metadata})


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """Six buffers, policy k walking at 60 k degrees, the first of 6 episodes a warm-up."""
    folder = tmp_path_factory.mktemp("six")
    for k in range(6):
        write(folder / f"policy_{k:02d}.npz", walk(60 * k, seed=k), policy_id=k, warmup_transitions=10)
    return folder


@pytest.fixture
def folder(six, tmp_path):
    return Path(shutil.copytree(six, tmp_path / "buffers"))


@pytest.fixture
def no_figures(monkeypatch):
    for name in ("heatmap", "returns", "coverage", "measures", "distances"):
        monkeypatch.setattr(buffer_figures, f"plot_{name}", lambda *a, **kw: None)


def run(folder, tmp_path, **changes):
    given = dict(buffers=(str(folder),), tasks=("point-angle-60",), out=str(tmp_path / "out"), w1_points=20)
    return udg_select.main(Args(**{**given, **changes}))


def saved(tmp_path, name="point-angle-60/top1.npz"):
    return envs.buffers.load(tmp_path / "out" / name, quiet=True, verify=True)


# --- relabelling and scores ---


@pytest.mark.parametrize("name", ["point-angle-60", "point-goal-120"])
def test_relabelled_rewards_are_the_environments(tmp_path, name):
    env = envs.make(name)
    state, steps, rewards = jax.jit(env.reset)(jax.random.key(0)), [], []
    step = jax.jit(env.step)
    for action in np.random.default_rng(0).uniform(-1, 1, (30, 2)).astype(np.float32):
        after = step(state, action + np.float32([-0.5, 0.8]))
        steps.append(envs.transition(state, action + np.float32([-0.5, 0.8]), after))
        rewards.append(float(after.reward))
        state = after
    arrays = {key: np.stack([getattr(s, key) for s in steps]) for key in envs.Transition._fields if key != "goals"}
    arrays |= {"rewards": np.zeros(30, np.float32), "terminals": np.zeros(30, bool)}
    path = write(tmp_path / "b.npz", {**arrays, "timeouts": np.arange(30) == 29})
    found = udg_select.relabel(map_buffer(path), envs.task(name))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, rewards, rtol=0, atol=1e-6)


def test_relabelling_in_blocks_is_the_same(folder, monkeypatch):
    buffer = map_buffer(folder / "policy_02.npz")
    task = envs.task("point-angle-60")
    whole = udg_select.relabel(buffer, task)
    monkeypatch.setattr(udg_select.raw, "BLOCK", 7)
    np.testing.assert_array_equal(udg_select.relabel(buffer, task), whole)


def score(rewards, buffer, exclude_warmup=False, by="mean"):
    return udg_select.score_buffer(udg_select.judge_episodes(rewards, buffer, exclude_warmup), by)


def test_scores_against_a_loop(tmp_path):
    # four episodes: warm-up, cut short at 4, full 10, cut short at 3, terminated after 2
    arrays = walk(0, episodes=1, length=19)
    ends = np.array([4, 14, 17, 19])
    flags = np.zeros(19, bool)
    flags[ends - 1] = True
    arrays["terminals"] = flags & (np.arange(19) == 18)
    arrays["timeouts"] = flags & ~arrays["terminals"]
    path = write(tmp_path / "b.npz", arrays, warmup_transitions=4)
    buffer = map_buffer(path)
    rewards = np.arange(19, dtype=np.float32)
    full, short = float(rewards[4:14].sum()), float(rewards[17:].sum())
    found = score(rewards, buffer)
    assert (found["episodes"], found["cut"]) == (2, 2)
    # of four that began one ended after 2 steps; the other three lived until they were cut, or to the end
    mean = 3 / 4 * full + 1 / 4 * short
    assert found["score"] == found["mean"] == found["score_all"] == pytest.approx(mean)
    assert found["top_decile"] == pytest.approx(full)
    assert found["per_step"] == pytest.approx((3 * full + short) / (3 * 10 + 2))
    assert found["std"] == pytest.approx(np.sqrt(3 / 4 * (full - mean) ** 2 + 1 / 4 * (short - mean) ** 2))
    assert found["weights"] == pytest.approx([3, 1]) and found["returns"] == [full, short]
    assert score(rewards, buffer, True)["score"] == pytest.approx(2 / 3 * full + 1 / 3 * short)


def test_scores_with_and_without_the_warmup(folder):
    buffer = map_buffer(folder / "policy_00.npz")
    rewards = np.where(np.arange(60) < 10, 0.0, 1.0).astype(np.float32)
    found = score(rewards, buffer)
    assert (found["score"], found["score_trained"]) == (pytest.approx(50 / 6), 10.0)
    found = score(rewards, buffer, True)
    assert (found["score"], found["score_all"], found["episodes"]) == (10.0, pytest.approx(50 / 6), 5)


def restarted(path, seed):
    """A buffer whose episodes end at any step with chance 1/30; the next begins at once, rounds of 100 steps cut."""
    lengths, complete = restarts(np.random.default_rng(seed), 300, 100, 1 / 30)
    arrays, ends = walk(0, episodes=300, length=100, seed=seed), np.cumsum(lengths)
    arrays["terminals"][ends - 1] = complete
    arrays["timeouts"][:] = False
    arrays["timeouts"][ends - 1] = ~complete
    arrays["observations"][ends[:-1]] = 0.0  # a reset, and no walking on
    return write(path, arrays, episode_length=100, warmup_transitions=0)


def test_where_episodes_restart_the_score_is_that_of_whole_episodes(tmp_path):
    """1 a step: sum_t P(alive at t) = 29.0; the mean of the complete ones alone is 22."""
    found, plain = [], []
    for seed in range(6):
        buffer = map_buffer(restarted(tmp_path / f"{seed}.npz", seed))
        ones = np.ones(len(buffer), np.float32)
        judged = udg_select.judge_episodes(ones, buffer, False)
        found.append(score(ones, buffer)["score"])
        plain.append(judged.returns[judged.complete].mean())
        assert score(ones, buffer)["cut"] > 100
    truth = (1 - (1 - 1 / 30) ** 100) * 30
    assert abs(np.mean(found) - truth) < 0.5 and np.mean(plain) < truth - 5


def test_the_newest_tenth_is_of_rows_and_each_score_may_rank(tmp_path):
    """Early good, late good, one very good episode: which is first depends on what is asked."""
    length = 20
    for name in "abc":
        write(tmp_path / f"{name}.npz", walk(0, episodes=40, length=length), episode_length=length)
    early, late, lucky = (np.full((40, length), x, np.float32) for x in (1.0, 0.5, 0.0))
    early[20:], late[36:], lucky[7:11] = 0.5, 1.5, 5.0
    buffers = [map_buffer(tmp_path / f"{name}.npz") for name in "abc"]
    best = {"mean": 0, "recent": 1, "top-decile": 2, "per-step": 0}
    for by, expected in best.items():
        pairs = zip((early, late, lucky), buffers, strict=True)
        scores = [score(rewards.ravel(), buffer, by=by) for rewards, buffer in pairs]
        assert udg_select.rank_buffers(scores)[0] == expected, by
    assert scores[1]["recent"] == 30.0 and scores[1]["tenths"] == [10.0] * 9 + [30.0]
    assert scores[2]["top_decile"] == 100.0 and scores[0]["per_step"] == pytest.approx(0.75)


def test_the_score_that_is_asked_for_decides_what_is_written(folder, tmp_path, no_figures):
    """policy_00 walks at 60 degrees in its last episode only, and there faster."""
    arrays, fast = walk(0, seed=0), walk(60, episodes=1, speed=0.9)
    for key in fast:
        arrays[key][50:] = fast[key]
    write(folder / "policy_00.npz", arrays, policy_id=0, warmup_transitions=10)
    run(folder, tmp_path, score="recent", w1_points=0)
    assert set(saved(tmp_path)["policy_ids"]) == {0}
    run(folder, tmp_path, w1_points=0, overwrite=True)
    assert set(saved(tmp_path)["policy_ids"]) == {1}


def test_ranking_is_by_score_and_stable():
    assert udg_select.rank_buffers([{"score": s} for s in (1.0, 3.0, 2.0, 3.0)]) == [1, 3, 2, 0]


def test_every_direction_finds_its_buffer(folder, tmp_path, no_figures):
    tasks = [f"point-angle-{60 * k}" for k in range(6)]
    scores = run(folder, tmp_path, tasks=tasks, w1_points=0)
    for k, task in enumerate(tasks):
        assert np.argmax(scores[task]) == k and set(saved(tmp_path, f"{task}/top1.npz")["policy_ids"]) == {k}


# --- distances ---


def test_wasserstein_of_a_shift_is_the_shift():
    x = np.random.default_rng(0).normal(size=(50, 2))
    assert udg_select.wasserstein(x, x + [3.0, 4.0]) == pytest.approx(5.0, rel=1e-12)
    assert udg_select.wasserstein(x, x[::-1]) == 0.0


def test_long_distances_are_not_silent(monkeypatch, capsys):
    clock = itertools.count(0, 3)  # a look at it every three seconds
    monkeypatch.setattr(udg_select.time, "time", lambda: next(clock))
    assert list(runner.with_eta([7, 8, 9], "W1")) == [7, 8, 9]
    assert capsys.readouterr().out == "W1: 2/3  ETA 00:00:04\n"
    monkeypatch.setattr(udg_select.time, "time", lambda: 0.0)
    assert list(runner.with_eta([7, 8, 9], "W1")) == [7, 8, 9] and not capsys.readouterr().out


def test_pairwise_distances_and_their_floor(folder):
    sources = udg_select.open_sources([str(folder)])
    matrix = udg_select.pairwise_wasserstein(sources, envs.task("point"), Args(w1_points=30))
    np.testing.assert_array_equal(matrix, matrix.T)
    apart = matrix[~np.eye(6, dtype=bool)]
    assert 0 < np.diag(matrix).max() < apart.min()
    assert matrix[0, 3] > matrix[0, 1]  # opposite directions are further apart than neighbours
    # uniform positions along two opposite rays of length 0.5: W1 is the mean of 2 t, t in [0, 0.5]
    assert matrix[0, 3] == pytest.approx(0.55, rel=0.2)


def test_distance_to_a_reference_is_smallest_for_its_own_direction(folder, tmp_path):
    reference = map_buffer(write(tmp_path / "expert.npz", walk(120, seed=99)))
    sources, task = udg_select.open_sources([str(folder)]), envs.task("point-angle-120")
    for *distances, floor in udg_select.reference_wasserstein(sources, reference, task, Args(w1_points=40)):
        assert len(distances) == 6 and np.argmin(distances) == 2
        assert 0 < floor < 1.5 * min(distances)


def test_state_action_distance_has_no_unit(tmp_path):
    """Scaling one observation in every buffer leaves the standardised distance as it was."""
    found = []
    for factor in (1, 1000):
        paths = []
        for k, angle in enumerate((0, 90, 0)):
            arrays = walk(angle, seed=k)
            for key in ("observations", "next_observations"):
                arrays[key][:, 2] *= factor
            paths.append(str(write(tmp_path / f"s{k}.npz", arrays)))
        sources, reference = udg_select.open_sources(paths[:2]), map_buffer(paths[2])
        args = Args(w1_points=40)
        found.append(udg_select.reference_wasserstein(sources, reference, envs.task("point-angle-0"), args)[1])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


# --- what is written ---


def test_top1_holds_exactly_the_best_buffer(folder, tmp_path, no_figures):
    run(folder, tmp_path)
    source = envs.buffers.load(folder / "policy_01.npz", quiet=True)
    buffer = envs.buffers.load(
        tmp_path / "out/point-angle-60/top1.npz",
        require_rewards=True, task="point-angle-60", quiet=True,
    )  # fmt: skip
    for key in ("observations", "actions", "next_observations", "terminals", "timeouts"):
        np.testing.assert_array_equal(buffer[key], source[key])
    velocity, angle = source["root_velocities"], np.radians(60)
    expected = velocity @ np.array([np.cos(angle), np.sin(angle)])
    np.testing.assert_allclose(buffer["rewards"], expected, atol=1e-6)
    about = buffer.metadata
    assert (about["reward_kind"], about["task_options"]) == ("relabelled", {"angle_deg": 60})
    assert (about["dataset_name"], about["warmup_transitions"]) == ("point-angle-60-udg-top1", 10)
    (parent,) = about["parents"]
    digest = hashlib.sha256((folder / "policy_01.npz").read_bytes()).hexdigest()
    assert (parent["path"], parent["policy_id"], parent["sha256"]) == ("policy_01.npz", 1, digest)
    assert str(tmp_path) not in json.dumps(about)


def test_mixtures_keep_order_ids_and_provenance(folder, tmp_path, no_figures):
    run(folder, tmp_path, top=("2", "all"))
    mixed = saved(tmp_path, "point-angle-60/top2.npz")
    report = json.loads((tmp_path / "out/point-angle-60/scores.json").read_text())
    best = [int(name[-2:]) for name in report["ranking"]]
    np.testing.assert_array_equal(mixed["policy_ids"], np.repeat(best[:2], 60))
    assert mixed.metadata["warmup_transitions"] is None
    assert [p["warmup_transitions"] for p in mixed.metadata["parents"]] == [10, 10]
    whole = saved(tmp_path, "point-angle-60/all.npz")
    assert len(whole) == 360
    assert sorted(set(whole["policy_ids"])) == [0, 1, 2, 3, 4, 5]
    assert set(report["selections"]) == {"top2", "all"}
    assert report["selections"]["all"]["num_transitions"] == 360
    assert np.shape(report["w1_features"]) == (6, 6)


def test_equal_size_takes_whole_episodes_in_equal_shares(folder, tmp_path, no_figures):
    run(folder, tmp_path, top=("1", "2", "all"), size=60)
    for label in ("top1", "top2", "all"):
        chosen = saved(tmp_path, f"point-angle-60/{label}-size60.npz")
        _, counts = np.unique(chosen["policy_ids"], return_counts=True)
        assert len(chosen) == 60 and len(set(counts)) == 1 and (chosen["episode_lengths"] == 10).all()
    source = envs.buffers.load(folder / "policy_00.npz", quiet=True)["observations"]
    rows = chosen["observations"][chosen["policy_ids"] == 0]
    assert sum(np.array_equal(rows, episode) for episode in source.reshape(6, 10, 4)) == 1
    # 50 rows of 4 buffers in episodes of 10: what does not fill an episode goes to the next source
    run(folder, tmp_path, top=("4",), size=50, overwrite=True)
    ids, counts = np.unique(saved(tmp_path, "point-angle-60/top4-size50.npz")["policy_ids"], return_counts=True)
    assert len(ids) == 4 and sorted(counts) == [10, 10, 10, 20]


def test_episodes_that_fit_are_taken_whatever_their_order():
    lengths = np.array([40, 3, 50, 7, 5])
    np.testing.assert_array_equal(udg_select.fill(np.array([2, 1, 0, 4, 3]), lengths, 15, 15), [1, 3, 4])
    assert udg_select.fill(np.array([0, 2]), lengths, 15, 15).size == 0
    # of a share with others after it the nearest sum, within what is left of all
    np.testing.assert_array_equal(udg_select.fill(np.array([3, 2, 1]), lengths, 40, 60), [2, 3])
    np.testing.assert_array_equal(udg_select.fill(np.array([3, 2, 1]), lengths, 40, 50), [3])


def test_the_mean_of_a_mixture_is_weighted_buffer_by_buffer():
    """Policies that fall with 1/50 and 1/10000 a step, 1 a step, rounds of 200 that cut: the true mean is 123.6."""
    rng = np.random.default_rng(0)

    def episodes(hazard):
        lengths, complete = restarts(rng, 3_000, 200, hazard)
        yes = np.ones(len(lengths), bool)
        return udg_select.Episodes(lengths * 1.0, lengths, complete, yes, ~yes, yes * 1, yes)

    judged = [episodes(1 / 50), episodes(1 / 10_000)]
    chosen = {k: np.arange(2_900) for k in range(2)}
    assert udg_select.pooled_mean(judged, chosen) == pytest.approx(123.6, abs=3)
    assert udg_select.pooled_mean(judged, {0: np.arange(0)}) is None


def test_a_size_is_filled_or_refused_whatever_the_draw(tmp_path):
    """Two buffers of 60 rows in episodes of 20: what one takes too few the other makes up for, and never too much."""
    for k in range(2):
        write(tmp_path / f"even/policy_{k:02d}.npz", walk(0, episodes=3, length=20), policy_id=k, episode_length=20)
    sources = udg_select.open_sources([str(tmp_path / "even")])
    assert [len(keep) for keep in udg_select.choose_episodes(sources, Args(size=101))] == [2, 3]
    for seed in range(20):
        for size, shares in ((45, None), (119, None), (50, np.array([995, 5]))):
            chosen = udg_select.choose_episodes(sources, Args(size=size, seed=seed), shares)
            assert size - 20 < 20 * sum(map(len, chosen)) <= size, (size, shares)


def test_a_share_holds_short_episodes_as_often_as_its_buffer(tmp_path):
    """Ten shares of 300 rows, of episodes of 1 to 100: filled to the last row, short ones would be too many."""
    sources = udg_select.open_sources([str(restarted(tmp_path / f"{k}.npz", k)) for k in range(10)])
    whole = np.mean([source.buffer["episode_lengths"].mean() for source in sources])
    found = []
    for seed in range(60):
        chosen = udg_select.choose_episodes(sources, Args(size=3000, seed=seed))
        lengths = [s.buffer["episode_lengths"][keep] for s, keep in zip(sources, chosen, strict=True)]
        assert 2950 < sum(map(np.sum, lengths)) <= 3000
        found.append(np.concatenate(lengths[:-1]).mean())
    assert np.mean(found) == pytest.approx(whole, rel=0.04)


# --- the best episodes, and shares by optimal transport ---


def judge_all(folder, task="point-angle-60", exclude_warmup=False):
    sources = udg_select.open_sources([str(folder)])
    judge = lambda buffer: udg_select.judge_episodes(
        udg_select.relabel(buffer, envs.task(task)), buffer, exclude_warmup
    )
    return [judge(source.buffer) for source in sources]


def three_of_unequal_episodes(folder, seed):
    """Three buffers of five episodes each, the last of them cut."""
    rng = np.random.default_rng(seed)
    for k in range(3):
        lengths = rng.integers(3, 9, 5)
        arrays, ends = walk(60 * k, episodes=1, length=lengths.sum(), seed=seed + k), np.cumsum(lengths)
        arrays["terminals"][ends[:4] - 1] = True
        arrays["observations"][ends[:4]] = 0.0  # a reset
        write(folder / f"policy_{k:02d}.npz", arrays, policy_id=k, warmup_transitions=int(lengths[0]))


def test_the_best_episodes_against_all_choices(tmp_path):
    for seed in range(4):
        three_of_unequal_episodes(tmp_path, 10 * seed)
        for exclude in (False, True):
            judged = judge_all(tmp_path, exclude_warmup=exclude)
            pool = [(k, i) for k in range(3) for i in range(1 if exclude else 0, 4)]  # the fifth is cut
            worth = lambda choice, column, judged=judged: sum(getattr(judged[k], column)[i] for k, i in choice)
            for num in (1, 3, 5):
                found = udg_select.best_episodes(judged, "episodes", num)
                best = max(itertools.combinations(pool, num), key=lambda choice: worth(choice, "returns"))
                assert sorted((k, i) for k, keep in found.items() for i in keep) == sorted(best)
            for rows in (9, 20, 31):  # as many of the best as fit: those in front of whatever does not
                found = udg_select.best_episodes(judged, "rows", rows)
                found = [(k, i) for k, keep in found.items() for i in keep]
                best = max(itertools.combinations(pool, len(found)), key=lambda choice: worth(choice, "returns"))
                more = max(itertools.combinations(pool, len(found) + 1), key=lambda choice: worth(choice, "returns"))
                assert sorted(found) == sorted(best) and worth(best, "lengths") <= rows < worth(more, "lengths")


def test_the_best_episodes_are_written_with_their_origin(folder, tmp_path, no_figures):
    run(folder, tmp_path, top_episodes=8, top_rows=85, size=30, w1_points=0)
    judged = judge_all(folder)
    returns = np.sort(np.concatenate([episodes.returns for episodes in judged]))[::-1]
    buffer = saved(tmp_path, "point-angle-60/episodes8.npz")
    np.testing.assert_allclose(np.sort(buffer["episode_returns"])[::-1], returns[:8], rtol=1e-5)
    assert buffer.metadata["dataset_name"] == "point-angle-60-udg-episodes8"
    for parent in buffer.metadata["parents"]:
        mine = buffer["episode_returns"][buffer["policy_ids"][buffer["episode_ends"] - 1] == parent["policy_id"]]
        assert parent["num_episodes"] == len(mine) and parent["path"] == f"policy_{parent['policy_id']:02d}.npz"
        source = judged[parent["policy_id"]].returns
        assert all(np.isclose(source, x, rtol=1e-5).any() for x in mine)
    assert sum(parent["num_episodes"] for parent in buffer.metadata["parents"]) == 8
    np.testing.assert_array_equal(saved(tmp_path, "point-angle-60/rows85.npz")["rewards"], buffer["rewards"])
    report = json.loads((tmp_path / "out/point-angle-60/scores.json").read_text())["selections"]
    assert report["episodes8"]["score"] == pytest.approx(returns[:8].mean(), rel=1e-5)
    assert set(report) == {"top1", "episodes8", "rows85"} and saved(tmp_path, "point-angle-60/top1-size30.npz")


def test_shares_by_transport_make_what_the_reference_is_made_of(folder, tmp_path, no_figures):
    """An expert whose data are three quarters of policy 1's kind and one of policy 4's."""
    both = [walk(60, episodes=30, seed=50), walk(240, episodes=10, seed=51)]
    expert = write(tmp_path / "expert.npz", {key: np.concatenate([x[key] for x in both]) for key in both[0]})
    for size, other in ((0, "all"), (40, "top4")):
        top = "transport", other.removeprefix("top")
        run(folder, tmp_path, top=top, reference=str(expert), size=size, w1_points=50, overwrite=True)
        tail = f"-size{size}" if size else ""
        buffer = saved(tmp_path, f"point-angle-60/transport{tail}.npz")
        parents = {p["policy_id"]: p["num_transitions"] / len(buffer) for p in buffer.metadata["parents"]}
        assert parents[1] == pytest.approx(0.75, abs=0.1) and parents[4] == pytest.approx(0.25, abs=0.1)
        assert len(buffer) == (size or 80)  # all 60 rows of policy 1, the scarcest, with a third as many of policy 4
        report = json.loads((tmp_path / "out/point-angle-60/scores.json").read_text())
        near, mixed = (report["selections"][label]["w1_expert"] for label in ("transport", other))
        assert report["w1_floor"] < 1.3 * near < mixed


def test_the_best_episodes_stand_in_for_an_expert(folder, tmp_path, no_figures):
    run(folder, tmp_path, top=("transport",), proxy=0.1)
    buffer = saved(tmp_path, "point-angle-60/transport.npz")
    shares = {p["policy_id"]: p["num_transitions"] / len(buffer) for p in buffer.metadata["parents"]}
    assert max(shares, key=shares.get) == 1 and sum(shares.get(k, 0) for k in (3, 4, 5)) == 0
    report = json.loads((tmp_path / "out/point-angle-60/scores.json").read_text())
    found = report["measures"]
    assert set(found) == set(report["buffers"])
    assert max(found, key=lambda name: found[name]["quality"]) == "policy_01"
    assert min(found, key=lambda name: found[name]["w1_expert"]) == "policy_01"
    assert all(0 < entry["action_entropy"] < 1 and entry["w1_random"] > 0 for entry in found.values())


@pytest.mark.parametrize("backend, words", [("cpu", "top1.npz --preset cpu"), ("gpu", "top1.npz")])
def test_the_last_line_is_a_command_that_ends_in_minutes(
    folder, tmp_path, no_figures, monkeypatch, capsys, backend, words
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    run(folder, tmp_path, w1_points=0)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"next: python mopo.py --dataset {tmp_path}/out/point-angle-60/{words}"


def test_the_subsample_depends_on_the_seed_alone(folder):
    sources = udg_select.open_sources([str(folder)])
    chosen = [udg_select.choose_episodes(sources, Args(size=180, seed=s)) for s in (0, 0, 1)]
    assert all(np.array_equal(a, b) for a, b in zip(chosen[0], chosen[1], strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(chosen[0], chosen[2], strict=True))
    assert [len(keep) for keep in chosen[0]] == [3] * 6


def test_excluding_the_warmup_leaves_it_out_of_the_data(folder, tmp_path, no_figures):
    run(folder, tmp_path, exclude_warmup=True)
    buffer = saved(tmp_path, "point-angle-60/top1-trained.npz")
    source = envs.buffers.load(folder / "policy_01.npz", quiet=True)
    np.testing.assert_array_equal(buffer["observations"], source["observations"][10:])
    assert buffer.metadata["warmup_transitions"] == 0


def make_ant(path, **metadata):
    rng = np.random.default_rng(0)
    states = rng.normal(size=(21, 29)).astype(np.float32)
    arrays = walk(0, episodes=2)
    arrays |= {
        "observations": states[:-1],
        "next_observations": states[1:],
        "actions": rng.uniform(-1, 1, (20, 8)).astype(np.float32),
    }
    return write(path, arrays, **{"env": "ant", "task": "ant", "dt": 0.05, **metadata})


def test_the_ant_is_observed_and_paid_as_its_task_says(tmp_path, no_figures):
    make_ant(tmp_path / "a.npz", task_options={"gear": 30.0})
    run(tmp_path / "a.npz", tmp_path, tasks=("ant-angle-90",))
    raw = envs.buffers.load(tmp_path / "a.npz", quiet=True)
    buffer = saved(tmp_path, "ant-angle-90/top1.npz")
    np.testing.assert_array_equal(buffer["observations"], raw["observations"][:, 2:])
    np.testing.assert_array_equal(buffer["next_observations"], raw["next_observations"][:, 2:])
    cost = 0.02 * (raw["actions"].astype(np.float64) ** 2).sum(1)
    np.testing.assert_allclose(buffer["rewards"], raw["root_velocities"][:, 1] - cost, atol=1e-6)
    options = ("ctrl_cost=0.5", "survive_bonus=1")
    run(tmp_path / "a.npz", tmp_path, tasks=("ant-angle-90",), task_options=options, overwrite=True)
    other = saved(tmp_path, "ant-angle-90/top1.npz")
    np.testing.assert_allclose(other["rewards"], raw["root_velocities"][:, 1] - 25 * cost + 1, atol=1e-5)
    assert other.metadata["task_options"]["ctrl_cost"] == 0.5


def test_the_recorded_gear_decides_the_cost_of_a_torque(tmp_path):
    path = make_ant(tmp_path / "a.npz", task_options={"gear": 150.0})
    task = udg_select.open_task("ant-angle-0", {}, udg_select.open_sources([str(path)]))
    assert task.options["ctrl_cost"] == 0.5
    more = dict(tasks=("ant-angle-90",), w1_points=0)
    refused(path, tmp_path, "gear=30", "gear 150", task_options=("gear=30",), **more)
    refused(path, tmp_path, "a.npz", "ends an episode", task_options=("terminate=true",), **more)


def spoil(path, key, rows):
    """Numbers that are not finite, written over the file's own."""
    with np.load(path) as data:
        arrays = {name: data[name] for name in data.files}
    arrays[key][rows] = np.nan
    np.savez(path, **arrays)


def test_values_of_a_buffer_that_is_not_chosen_are_not_read(folder, tmp_path, no_figures):
    spoil(folder / "policy_04.npz", "observations", 3)
    run(folder, tmp_path)
    spoil(folder / "policy_01.npz", "observations", 3)
    with pytest.raises(envs.InputError, match=r"policy_01.npz: observations: row 3"):
        run(folder, tmp_path, overwrite=True)


def test_a_run_folder_and_globs_and_lists_are_the_same(folder, monkeypatch):
    """A file that is named twice, or by two paths, counts once."""
    expected = sorted(folder.glob("*.npz"))
    names = [str(path) for path in expected]
    for words in ([str(folder)], [str(folder.parent)], [str(folder / "*.npz")], names, [*names, names[0]]):
        assert buffer_paths(words) == expected
    monkeypatch.chdir(folder)
    assert len(buffer_paths(["policy_00.npz", names[0]])) == 1


def test_names_tell_runs_apart(tmp_path):
    for seed in (0, 1):
        for k in (0, 1):
            path = tmp_path / f"seed{seed}/buffers/policy_{k:02d}.npz"
            write(path, walk(90 * k), policy_id=k)
    sources = udg_select.open_sources([str(tmp_path / "seed0"), str(tmp_path / "seed1")])
    assert [source.name for source in sources][1:3] == ["seed0/buffers/policy_01", "seed1/buffers/policy_00"]
    assert [source.policy_id for source in sources] == [0, 1, 2, 3]


def test_scripted_buffers_are_what_they_say(tmp_path):
    paths = scripted.point_buffers(tmp_path, seed=0, num=4, episodes=3, warmup=1)
    assert [path.name for path in paths] == [f"policy_{k:02d}.npz" for k in range(4)]
    for k, path in enumerate(paths):
        buffer = envs.buffers.load(path, quiet=True, verify=True)
        assert buffer["observations"].shape == (300, 4)
        assert buffer.metadata["policy_id"] == k
        heading = buffer["root_velocities"][100:].mean(0)
        angle = np.degrees(np.arctan2(heading[1], heading[0])) % 360
        assert abs((angle - 90 * k + 180) % 360 - 180) < 10


# --- figures and command line ---


def test_all_figures_are_drawn(folder, tmp_path):
    expert = write(tmp_path / "expert.npz", walk(60, seed=99))
    run(folder, tmp_path, reference=str(expert), tasks=("point-angle-60", "point-angle-0"))
    out = tmp_path / "out"
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    each = ("top1.npz", "scores.json", "returns.png", "coverage.png", "measures.png", "distances.png")
    tasks = ("point-angle-60", "point-angle-0")
    assert files == {"heatmap.png"} | {f"{task}/{name}" for task in tasks for name in each}
    report = json.loads((out / "point-angle-60/scores.json").read_text())
    assert [len(values) for values in report["w1_to_reference"]] == [7, 7]
    for path in out.rglob("*.png"):
        assert path.stat().st_size > 5_000


def test_a_single_buffer_and_equal_returns_can_be_drawn(tmp_path):
    arrays = walk(0, episodes=1)
    arrays["root_velocities"] *= 0
    arrays["next_observations"][:] = arrays["observations"][:] = 0
    arrays["root_positions"] *= 0
    run(write(tmp_path / "b.npz", arrays), tmp_path)
    assert (tmp_path / "out/point-angle-60/distances.png").exists()


def test_quick_selects_and_keeps_what_is_there(tmp_path, no_figures):
    args = Args(quick=True, out=str(tmp_path), top=("1", "all"), w1_points=0)
    udg_select.main(args)
    top = envs.buffers.load(tmp_path / "point-angle-0/top1.npz", task="point-angle-0")
    assert set(top["policy_ids"]) == {0} and top.metadata["mean_return"] > 50
    (tmp_path / "point-angle-0/top1.npz").write_text("mine")
    with pytest.raises(envs.InputError, match="--overwrite"):
        udg_select.main(args)
    assert (tmp_path / "point-angle-0/top1.npz").read_text() == "mine"
    with pytest.raises(envs.InputError, match="--quick makes its own buffers; leave --buffers out"):
        udg_select.main(dataclasses.replace(args, buffers=("mine",)))


@pytest.mark.parametrize("words, told", [
    (("--task", "point-angel-60", "--task", "point-angle-0"), "near names: point-angle-60"),
    (("--task", "point-angle-60", "--out", "{file}/x"), "{file}"),
])  # fmt: skip
def test_an_error_is_one_line(folder, tmp_path, monkeypatch, capsys, words, told):
    (tmp_path / "file").write_text("")
    fill = lambda word: word.replace("{file}", str(tmp_path / "file"))
    monkeypatch.setattr(sys, "argv", ["udg_select.py", "--buffers", str(folder), *map(fill, words)])
    monkeypatch.setattr("runner.flags.listen", lambda again: None)  # the tests keep their handlers of signals
    with pytest.raises(SystemExit) as ended:
        runner.launch(udg_select.main, Args)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1 and line.startswith("udg_select.py: error: ") and fill(told) in line


# --- refusals ---


def refused(folder, tmp_path, *words, **changes):
    with pytest.raises(envs.InputError) as caught:
        run(folder, tmp_path, **changes)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert not list(tmp_path.glob("out/*/*.npz"))


def test_bad_flags(folder, tmp_path):
    for changes, words in [
        ({"tasks": ("point-angel-60",)}, ("point-angel-60", "near names", "point-angle-60")),
        ({"tasks": ()}, ("--task",)),
        ({"tasks": ("point",)}, ("no reward", "point-angle-0")),
        ({"tasks": ("ant-angle-60",)}, ("ant-angle-60", "'ant'", "'point'")),
        ({"buffers": ()}, ("--buffers",)),
        ({"top": ("7",)}, ("--top 7", "6 buffers", "from 1 to 6")),
        ({"top": ("0",)}, ("--top 0",)),
        ({"top": ("-1",)}, ("--top -1",)),
        ({"top": ("best",)}, ("--top best", "'all'")),
        ({"top": ("transport",), "w1_points": 0}, ("--top transport", "--w1-points")),
        ({"top": ()}, ("--top", "nothing to write")),
        ({"top": ("transport",), "size": 5}, ("--size 5", "less than one episode")),
        ({"reference": "r.npz", "w1_points": 0}, ("--reference", "--w1-points 500")),
        ({"top_episodes": 37}, ("--top-episodes 37", "36 complete episodes", "another number")),
        ({"top_rows": 9}, ("--top-rows 9", "10 in the best")),
        ({"top_rows": 361}, ("--top-rows 361", "360 rows")),
        ({"proxy": 1.5}, ("--proxy 1.5",)),
        ({"size": 100}, ("--size 100", "policy_01.npz", "60")),
        ({"size": 5}, ("--size 5",)),
        ({"size": -1}, ("--size",)),
        ({"seed": -1}, ("--seed",)),
        ({"size": 120, "top": ("2", "1")}, ("--size 120", "policy_01.npz", "60")),
        ({"task_options": ("ctrl_cost",)}, ("--task-options", "ctrl_cost")),
        ({"task_options": ("ctrl_cost=0.5",)}, ("ctrl_cost", "no option")),
        ({"reference": "nowhere.npz"}, ("nowhere.npz", "does not exist")),
        ({"reference": str(folder)}, ("6 buffers", "name one file")),
    ]:
        refused(folder, tmp_path, *words, **changes)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "no buffers")
    refused(tmp_path / "none", tmp_path, "does not exist")
    refused(tmp_path / "*.npz", tmp_path, "matches no file")


def test_a_buffer_that_is_not_finite_has_no_distance(folder, tmp_path):
    spoil(folder / "policy_04.npz", "next_observations", slice(None))
    refused(folder, tmp_path, "policy_04.npz", "not finite", "--w1-points 0")


def test_a_policy_without_finite_observations_has_no_distance(folder, tmp_path):
    spoil(folder / "policy_02.npz", "observations", slice(None))
    for top in ("1", "transport"):
        refused(folder, tmp_path, "policy_02.npz", "no row that is finite", top=(top,))
    assert not list((tmp_path / "out").rglob("*.npz"))


def test_a_second_task_is_refused_before_the_first_is_written(tmp_path):
    """Top 1 is another buffer for each task, and one of them is too short."""
    for k, episodes in enumerate((12, 3)):
        write(tmp_path / f"in/policy_{k:02d}.npz", walk(180 * k, episodes=episodes), policy_id=k)
    tasks = ("point-angle-0", "point-angle-180")
    refused(tmp_path / "in", tmp_path, "policy_01.npz", "needs 60", tasks=tasks, size=60)
    assert not list((tmp_path / "out").rglob("*.*"))


def test_data_made_with_terminations_ask_for_a_task_that_ends(tmp_path):
    make_ant(tmp_path / "in/a.npz", task="ant-angle-0", task_options={"gear": 30.0, "terminate": True})
    words = dict(tasks=("ant-angle-90",), w1_points=0)
    refused(tmp_path / "in", tmp_path, "would go on", "--task-options terminate=true", **words)
    task = udg_select.open_task("ant-angle-90", {"terminate": True}, udg_select.open_sources([str(tmp_path / "in")]))
    assert task.options["terminate"] is True


def test_nothing_but_warmup(folder, tmp_path):
    path = write(tmp_path / "r.npz", walk(60), warmup_transitions=60)
    refused(folder, tmp_path, "r.npz", "omit --exclude-warmup", reference=str(path), exclude_warmup=True)
    refused(path, tmp_path, "r.npz", "--exclude-warmup", exclude_warmup=True, w1_points=0)


def test_buffers_of_two_worlds_or_lengths_do_not_compare(folder, tmp_path):
    make_ant(folder / "policy_09.npz")
    refused(folder, tmp_path, "policy_09.npz", "'ant'", "'point'")
    write(folder / "policy_09.npz", walk(60, length=30), episode_length=30)
    refused(folder, tmp_path, "policy_09.npz", "episode_length", "30")


def test_missing_root_columns(folder, tmp_path):
    for key in ("root_positions", "root_velocities"):
        write(folder / "policy_03.npz", {k: v for k, v in walk(0).items() if k != key})
        refused(folder, tmp_path, "policy_03.npz", key, "Remedy")


def test_a_file_that_is_not_of_the_world_is_refused(folder, tmp_path):
    for about in (
        {"task": "point-angle-0", "reward_kind": "relabelled"},
        {"task": "ant-angle-0", "env": "ant"},  # which hides x and y
        {"task": "nothing"},
        {"task": None},
    ):
        write(folder / "policy_03.npz", walk(0), layout="task", **about)
        refused(folder, tmp_path, "policy_03.npz", "original buffers")


def test_what_a_task_that_hides_nothing_observes_is_raw(folder, tmp_path, no_figures):
    """As an import is labelled: layout "task", with the rewards of its own task."""
    write(folder / "policy_03.npz", walk(60, speed=0.9), layout="task", task="point-angle-0", reward_kind="task")
    assert np.argmax(run(folder, tmp_path)["point-angle-60"]) == 3
    assert len(saved(tmp_path)) == 60


# --- mazes ---


def wander(episodes=4, length=12, near=(), goal=(0.0, 8.0)):
    """An ant in the umaze, 3 m from the goal but in the rows `near`; episodes are cut, the last also at the goal."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(episodes, length + 1, 29)).astype(np.float32)
    states[..., :2] = np.float32(goal) + [3.0, 0.0] + rng.uniform(-0.2, 0.2, (episodes, length + 1, 2))
    for episode, step in near:
        states[episode, step + 1, :2] = goal
    flat = lambda x: x.reshape(-1, 29)
    before, after = flat(states[:, :-1]), flat(states[:, 1:])
    rows = len(before)
    return {
        "observations": before, "next_observations": after,
        "actions": rng.uniform(-1, 1, (rows, 8)).astype(np.float32), "rewards": np.zeros(rows, np.float32),
        "root_positions": before[:, :2], "root_velocities": (after - before)[:, :2] / np.float32(0.1),
        "terminals": np.zeros(rows, bool), "timeouts": np.arange(rows) % length == length - 1,
        "goals": np.tile(np.float32(goal), (rows, 1)),
    }  # fmt: skip


MAZE = {"env": "ant-maze-umaze", "task": "ant-maze-umaze", "layout": "task", "dt": 0.1, "episode_length": 700}


def test_terminals_of_a_maze_are_the_tasks(tmp_path, no_figures):
    """What was marked and is not at the goal goes on; at the goal it ends, and what follows counts as data only."""
    arrays = wander(near=[(0, 3), (0, 4), (0, 7), (1, 11), (3, 0)])
    arrays["terminals"][[20, 30]] = True  # a mark in the middle of episode 1 and of episode 2
    path = write(tmp_path / "m.npz", arrays, **MAZE, reward_kind="task")
    run(path, tmp_path, tasks=("ant-maze-umaze",))
    buffer = saved(tmp_path, "ant-maze-umaze/top1.npz")
    paid = np.isin(np.arange(48), [3, 4, 7, 23, 36])
    np.testing.assert_array_equal(buffer["rewards"], paid)
    np.testing.assert_array_equal(buffer["terminals"], paid)
    np.testing.assert_array_equal(np.flatnonzero(buffer["timeouts"]), [11, 35, 47])
    np.testing.assert_array_equal(buffer["episode_lengths"], [4, 1, 3, 4, 12, 12, 1, 11])
    np.testing.assert_array_equal(buffer["next_observations"], arrays["next_observations"])
    (entry,) = json.loads((tmp_path / "out/ant-maze-umaze/scores.json").read_text())["buffers"].values()
    assert (entry["episodes"], entry["score"]) == (4, 0.75)  # three of four trajectories arrive


def test_a_reset_at_a_terminal_stays_one(tmp_path):
    """Data that is reset at its goal, as ours is: terminals as recorded, also where rounding denies them."""
    arrays = wander(near=[(0, 11), (2, 11)])
    arrays["terminals"][[11, 35, 47]], arrays["timeouts"][[11, 35, 47]] = True, False
    path = write(tmp_path / "m.npz", arrays, **MAZE)
    buffer = udg_select.end_by_task(map_buffer(path), envs.task("ant-maze-umaze"))
    for key in ("terminals", "timeouts"):
        np.testing.assert_array_equal(buffer[key], arrays[key])
    np.testing.assert_array_equal(udg_select.trajectories(buffer), range(4))


def test_a_task_may_end_what_was_cut_there_anyway(tmp_path):
    path = make_ant(tmp_path / "a.npz")
    raw = map_buffer(path)
    task = dataclasses.replace(
        envs.task("ant-angle-0"), terminal=lambda step: step.actions[:, 0] == raw["actions"][9, 0]
    )
    buffer = udg_select.end_by_task(raw, task)
    np.testing.assert_array_equal(np.flatnonzero(buffer["terminals"]), [9])
    np.testing.assert_array_equal(np.flatnonzero(buffer["timeouts"]), [19])


def test_goals_are_drawn_where_the_data_has_none(tmp_path, capsys):
    arrays = wander()
    del arrays["goals"]
    arrays["terminals"][5] = True  # on it goes: the same trajectory, the same goal
    path = write(tmp_path / "m.npz", arrays, **MAZE)
    (source,) = udg_select.open_sources([str(path)], seed=3)
    assert "no goals in the data: drawn for 4 trajectories" in capsys.readouterr().out
    goals = source.buffer["goals"].reshape(4, 12, 2)
    assert (goals == goals[:, :1]).all() and len(np.unique(goals[:, 0, 0])) == 4
    assert (goals[..., 0] >= 0).all() and (goals[..., 0] <= 1.5).all()
    assert (goals[..., 1] >= 8).all() and (goals[..., 1] <= 9.5).all()
    (again,) = udg_select.open_sources([str(path)], seed=3)
    np.testing.assert_array_equal(again.buffer["goals"], source.buffer["goals"])
    (other,) = udg_select.open_sources([str(path)], seed=4)
    assert not np.array_equal(other.buffer["goals"], source.buffer["goals"])


# --- refusals of files ---


def test_observations_of_another_size(tmp_path):
    arrays = {key: x[:, :3] if "observations" in key else x for key, x in walk(0).items()}
    refused(write(tmp_path / "b.npz", arrays), tmp_path, "b.npz", "[3, 2]", "[4, 2]")


def test_existing_files_are_kept(folder, tmp_path, no_figures):
    run(folder, tmp_path)
    path = tmp_path / "out/point-angle-60/top1.npz"
    before = path.read_bytes()
    with pytest.raises(envs.InputError, match="--overwrite"):
        run(folder, tmp_path)
    assert path.read_bytes() == before
    report = tmp_path / "out/point-angle-60/scores.json"
    with pytest.raises(envs.InputError, match=r"scores.json: exists"):  # it would no longer tell of top1.npz
        run(folder, tmp_path, top=("2",))
    assert set(json.loads(report.read_text())["selections"]) == {"top1"}
    run(folder, tmp_path, top=("2",), overwrite=True)
    assert set(json.loads(report.read_text())["selections"]) == {"top2"}


def test_a_reward_that_is_not_finite_names_the_row(tmp_path):
    path = write(tmp_path / "b.npz", walk(0))
    task = dataclasses.replace(envs.task("point-angle-0"), reward=lambda step: step.actions[:, 0] * np.float32(np.nan))
    with pytest.raises(envs.InputError, match="not finite in row 0"):
        udg_select.relabel(map_buffer(path), task)


@pytest.mark.parametrize("what", ["disk", "memory"])
def test_no_room_is_seen_before_any_work(folder, tmp_path, monkeypatch, no_figures, what):
    """360 rows of (4 + 4 + 4) observations and actions, and the rest: between 10 kB and 30 kB in all."""
    free = {"disk": 20e9, "memory": 20e9} | {what: 10e3}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": free["disk"]}))
    monkeypatch.setattr(envs.buffers.sources, "available_memory", lambda: free["memory"])
    with pytest.raises(envs.InputError, match=f"of {what}"):
        run(folder, tmp_path, top=("all",))
    assert not list((tmp_path / "out").rglob("*.npz"))
    free[what] = 30e3
    run(folder, tmp_path, top=("all",))
