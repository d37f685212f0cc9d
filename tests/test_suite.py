"""benchmark/suite.py: levels, rollouts, the maze controller, sets and table; what runs them is in test_cells.py."""

import contextlib
import io
import json
import os
import signal
import threading
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse.csgraph import shortest_path

import envs
import suite
import wurl_sac
from cells import args_of, is_done, record_file
from envs import buffers, maze
from tests.test_envs import state_at

ROOT = Path(__file__).resolve().parents[1]


def arguments(tmp_path, *more):
    places = [f"--{key}={tmp_path / key}" for key in ("out", "runs", "results")]
    return suite.parse([*places, "--rows=600", *more])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of the point robot, kept policies and all, where the suite looks for it -> the suite's arguments."""
    args = arguments(tmp_path_factory.mktemp("suite"), "--updates=400", "--sets", "point")
    cell = suite.run_cell_of(args, "point-angle-0")
    short = ["--warmup-steps", "300", "--eval-every", "100", "--hidden-sizes", "16", "16", "--eval-episodes", "50"]
    with contextlib.redirect_stdout(io.StringIO()):
        wurl_sac.main(args_of(wurl_sac, [*cell.command[1:], *short]))
    return args


# --- policies and levels ------------------------------------------------------------------------


def test_kept_policies(made):
    """One for each evaluation, with the rows behind it; the last is the run's own policy."""
    folder = suite.run_folder(made, "point-angle-0")
    curve = suite.learning_curve(folder)
    assert [entry["update"] for entry in curve] == [100, 200, 300, 400]
    assert [entry["rows"] for entry in curve] == [400, 500, 600, 700]  # 300 of warm-up, and one a gradient step
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[1:]]
    assert [e["return"] for e in curve] == pytest.approx([r["eval/task_return"][0] for r in records], rel=1e-5)
    last, kept = (np.load(path, allow_pickle=False) for path in (folder / "policy.npz", curve[-1]["path"]))
    assert all((kept[key] == last[key]).all() for key in last.files if key.startswith("actor"))


@pytest.mark.parametrize("returns, medium, expert, at_random", [
    ([0, 10, 20, 30, 40, 90, 60], 3, 5, 0),  # exactly a third
    ([0, 28, 80, 90], 1, 3, 0),  # the one before is nearer than the first beyond
    ([0, 2, 40, 90], 2, 3, 0),
    ([0, 2, 40, 5, 90, 30], 2, 4, 0),  # where it is first reached, not where it comes by again
    ([50, 60, 90], 0, 2, 0),  # beyond it from the start
    ([7], 0, 0, 0),
    ([-280, 55, 240, 720], 1, 3, -280),  # of the normalised score: a third of the way from random play is 53
])  # fmt: skip
def test_levels(returns, medium, expert, at_random):
    curve = [{"update": i, "return": float(r)} for i, r in enumerate(returns)]
    levels = suite.choose_levels(curve, lambda r: 2.0 * (r - at_random))
    assert (levels["medium"]["update"], levels["expert"]["update"]) == (medium, expert)


@pytest.mark.parametrize("wanted, update", [(4.5, 2), (5.6, 3), (100.0, 4)])
def test_medium_of_a_stated_return(wanted, update):
    """As D4RL's medium set has; the best where none reaches it."""
    curve = [{"update": i, "return": float(r)} for i, r in enumerate((0, 2, 5, 6, 9, 8))]
    levels = suite.choose_levels(curve, lambda r: 3.0 * r + 1, wanted)
    assert (levels["medium"]["update"], levels["expert"]["update"]) == (update, 4)


def test_a_replay_of_d4rls_length_ends_there(monkeypatch):
    """After 402k rows of a hopper; where a run is shorter, with it."""
    for last, rows, update in ((600_000, 402_000, 2), (300_000, 300_000, 2)):
        curve = [{"update": i, "rows": n, "return": 1.0} for i, n in enumerate((0, 200_000, 300_000, last))]
        curve = curve if last > 402_000 else curve[:3]
        monkeypatch.setattr(suite, "learning_curve", lambda folder, curve=curve: curve)
        monkeypatch.setattr(suite, "run_folder", lambda *_: None)
        found = suite.replay_end(None, envs.task("hopper"))
        assert (found["rows"], found["update"]) == (rows, update)


# --- rollouts -----------------------------------------------------------------------------------


def test_cut_takes_episodes_by_their_start():
    """Two environments of 8 steps, a share of 5: an episode that begins before step 5 is there to its end."""
    ends = np.array([[0, 0, 1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0, 0, 1]], bool).T
    columns = lambda: {"x": np.arange(16).reshape(2, 8).T, "terminals": ends, "timeouts": ends & False}
    found = suite.cut(columns(), 5, 12)
    assert found["x"].tolist() == [*range(7), *range(8, 13)]  # the second begins anew at its step 5: not counted
    assert not found["timeouts"].any() and found["terminals"].sum() == 3
    found = suite.cut(columns(), 5, 9)
    assert found["x"].tolist() == [*range(7), 8, 9] and found["timeouts"].tolist() == [False] * 8 + [True]


def test_hoppers_fall_and_begin_anew():
    """Random hoppers: whole episodes that end by falling, of the length that wurl_sac.py's random play has."""
    task = envs.task("hopper")
    columns = suite.play(task, suite.uniform(task), 300, 0)
    ends = np.flatnonzero(columns["terminals"] | columns["timeouts"])
    assert len(columns["actions"]) == 300 == ends[-1] + 1 and columns["timeouts"][:-1].sum() == 0
    assert 10 < np.diff(ends[:-1], prepend=-1).mean() < 60
    step = envs.Transition(**{k: columns.get(k) for k in envs.Transition._fields})
    np.testing.assert_allclose(task.reward(step), columns["rewards"], atol=1e-5)
    assert (task.terminal(step) == columns["terminals"]).all()
    np.testing.assert_allclose(columns["action_log_probs"], -3 * np.log(2), rtol=1e-6)


# --- mazes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", maze.MAPS)
def test_waypoints_lead_from_everywhere_to_everywhere(name):
    """A body that heads for its waypoint at 1 m/s, dt 0.1, reaches every goal and never enters a wall."""
    free = np.array([[c != "#" for c in row] for row in maze.MAPS[name]])
    cells = np.argwhere(free)
    pairs = np.array([(a, b) for a in cells for b in cells if (a != b).any()])
    rng = np.random.default_rng(0)
    pairs = pairs[rng.permutation(len(pairs))[:300]]
    places = maze.position(name, pairs[..., 0], pairs[..., 1])
    positions = places[:, 0] + rng.uniform(-0.1, 0.1, (len(pairs), 2))
    goals = jnp.asarray(places[:, 1] + rng.uniform(0, 1.5, (len(pairs), 2)))

    def advance(p, _):
        ahead = maze.waypoint(name, p, goals) - p
        p = p + 0.1 * ahead / jnp.maximum(jnp.linalg.norm(ahead, axis=-1, keepdims=True), 0.1)
        return p, (p, maze.reached(p, goals))

    _, (path, reached) = jax.jit(lambda p: jax.lax.scan(advance, p, length=1500))(jnp.asarray(positions))
    path, reached = np.asarray(path), np.asarray(reached)
    assert reached[-1].all() and free[maze.cell(name, path)].all()
    number = np.full(free.shape, -1)
    number[free] = np.arange(len(cells))
    near = np.abs(cells[:, None] - cells).sum(-1) == 1
    count = shortest_path(near)[number[tuple(pairs[:, 0].T)], number[tuple(pairs[:, 1].T)]]
    walked = 0.1 * np.argmax(reached, 0)
    assert (walked <= 4 * count + 3).all() and (walked >= 2.5 * count - 3).all()  # corners are cut


def test_the_controller_turns_with_the_ant():
    """Everything turned by an angle, the walker sees the same; and the world is indeed the same when turned."""
    env, angle = envs.make("ant-open"), 1.1
    first = env.reset(jax.random.key(3))
    start, c, s = first.pipeline_state, np.cos(angle), np.sin(angle)
    turned = start.qpos.at[3:7].set(maze.turn_quaternion(start.qpos[3:7], angle))
    velocity = start.qvel.at[:2].set(jnp.array([[c, -s], [s, c]]) @ start.qvel[:2])
    both = state_at(env, jnp.stack([start.qpos, turned]), jnp.stack([start.qvel, velocity]))
    actions = jax.random.uniform(jax.random.key(1), (10, 8), minval=-1)
    advance = lambda state, action: (jax.vmap(env.step)(state, jnp.stack([action] * 2)),) * 2
    seen = jax.jit(lambda state: jax.lax.scan(advance, state, actions)[1].info["raw_obs"])(both)
    ahead = jnp.array([[1.0, 0.0], [c, s]])
    views = maze.as_ahead(seen, jnp.broadcast_to(ahead, (10, 2, 2)))
    np.testing.assert_allclose(views[:, 0], np.asarray(seen)[:, 0, 2:], atol=1e-6)  # as the ant's task observes
    np.testing.assert_allclose(views[:, 0], views[:, 1], atol=1e-5)

    # No seam: way due -x, a hair to either side of it, it sees nearly the same; and what it sees is as at a start.
    views = lambda ahead: maze.as_ahead(jnp.stack([first.info["raw_obs"]] * len(ahead)), ahead)
    np.testing.assert_allclose(*views(jnp.array([[-1.0, 1e-4], [-1.0, -1e-4]])), atol=1e-3)
    angles = jnp.linspace(-3.1, 3.1, 50)
    assert (views(jnp.stack([jnp.cos(angles), jnp.sin(angles)], -1))[:, 1] >= 0).all()


def test_the_open_plane_starts_at_any_heading():
    env = envs.make("ant-open-angle-0")
    obs = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), 200)).info["raw_obs"]
    heading = 2 * np.arctan2(obs[:, 6], obs[:, 3])
    assert np.histogram(heading % (2 * np.pi), 4, (0, 2 * np.pi))[0].min() > 30
    assert env.dt == pytest.approx(0.1) and env.model.ngeom == envs.make("ant").model.ngeom  # no walls


def cell_pairs(size, positions, goals):
    """Cells of positions and of goals -> [N, 2, 2]; all free."""
    pairs = np.stack([np.stack(maze.cell(size, np.asarray(x)), -1) for x in (positions, goals)], 1)
    assert all(maze.MAPS[size][row][column] != "#" for row, column in pairs.reshape(-1, 2))
    return pairs


def test_play_has_picked_cells_and_diverse_has_all(size="medium"):
    assert all(pairs[0] == (maze.find(name, "R"), maze.find(name, "G")) for name, pairs in suite.PLAY.items())  # D4RL's
    assert all(maze.MAPS[name][i][j] != "#" for name, pairs in suite.PLAY.items() for pair in pairs for i, j in pair)
    env, keys = envs.make(f"ant-maze-{size}"), jax.random.split(jax.random.key(0), 300)
    kinds = [suite.maze_start(size, kind) for kind in ("play", "diverse")]
    picked, any_two = jax.jit(jax.vmap(lambda key: [start(env, key) for start in kinds]))(keys)
    cells_of = lambda states: cell_pairs(size, states.info["raw_obs"][:, :2], states.info["goal"])
    assert {tuple(map(tuple, pair)) for pair in cells_of(picked).tolist()} == set(suite.PLAY[size])
    found = cells_of(any_two)
    assert len(np.unique(found.reshape(-1, 4), axis=0)) > 200 and (found[:, 0] != found[:, 1]).any(1).all()
    noise = np.asarray(any_two.info["goal"]) - maze.position(size, *found[:, 1].T)
    assert noise.min() >= 0 and 1.2 < noise.max() <= 1.5
    np.testing.assert_array_equal(any_two.pipeline_state.qpos[:, :2], any_two.info["root_position"])


def test_maze_set(made, monkeypatch):
    """Starts, goals and rewards of a set whose walker knows nothing; goals are so wide that some are reached."""
    monkeypatch.setattr(maze, "GOAL_RADIUS", 6.0)
    path, rng = suite.run_folder(made, suite.WALKER) / "policies" / "update_0000001.npz", np.random.default_rng(0)
    layer = {"kernel": (1, 27, 16), "bias": (1, 16)}
    about = {"update": 1, "rows": [0], "eval/task_return": [1.0], "log_std_min": -20.0, "log_std_max": 2.0}
    path.parent.mkdir(parents=True)
    arrays = {f"actor/params/MLP_0/Dense_0/{k}": np.float32(rng.normal(size=size) / 5) for k, size in layer.items()}
    np.savez(path, kind=np.array("tanh_gaussian"), metadata_json=np.array(json.dumps(about)), **arrays)
    args = types.SimpleNamespace(**{**vars(made), "rows": 1400})
    task, columns, levels, warmup = suite.make_columns(args, "antmaze-umaze-diverse")
    assert task.name == "ant-maze-umaze" and levels["walker"]["update"] == 1 and warmup == 0
    starts = np.flatnonzero(np.append(True, (columns["terminals"] | columns["timeouts"])[:-1]))
    cell_pairs("umaze", columns["observations"][starts, :2], columns["goals"][starts])
    assert columns["goals"].shape == (1400, 2) and "action_log_probs" not in columns
    near = np.linalg.norm(columns["next_observations"][:, :2] - columns["goals"], axis=1) <= 6.0
    assert (columns["rewards"] == near).all() and (columns["terminals"] == near).all()
    assert near.any() and not near.all() and np.abs(columns["actions"]).max() <= 1


# --- sets ---------------------------------------------------------------------------------------


def test_sets(made):
    """The point robot's five sets, each what its name says."""
    sets = {}
    for level in suite.LEVELS:
        suite.make_set(made, f"point-{level}")
        sets[level] = buffers.load(made.out / f"point-{level}.npz", quiet=True, verify=True)
    run = buffers.load(suite.run_folder(made, "point-angle-0") / "buffers" / "policy_00.npz", quiet=True)
    levels = suite.level_of(made, "point-medium")[1]
    rows = {"random": 600, "medium": 600, "medium-expert": 1200, "expert": 600}
    assert {k: len(v) for k, v in sets.items()} == rows | {"medium-replay": levels["medium"]["rows"]}
    replay = sets["medium-replay"]
    for key in ("observations", "actions", "rewards", "root_positions"):
        np.testing.assert_array_equal(replay[key], run[key][: len(replay)])
    assert replay.metadata["warmup_transitions"] == 300
    both = np.concatenate([sets["medium"]["actions"], sets["expert"]["actions"]])
    np.testing.assert_array_equal(sets["medium-expert"]["actions"], both)
    assert (sets["random"]["actions"] ** 2).mean() == pytest.approx(1 / 3, abs=0.05)
    for level in ("medium", "expert"):  # the density is that of the policy in the file
        mean, log_std = suite.load_actor(levels[level]["path"])[0](sets[level]["observations"])
        u = np.arctanh(np.clip(np.float64(sets[level]["actions"]), -1 + 1e-9, 1 - 1e-9))
        normal = -0.5 * ((u - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
        density = (normal - np.log1p(-(np.tanh(u) ** 2))).sum(-1)
        np.testing.assert_allclose(sets[level]["action_log_probs"], density, atol=2e-2)
    used = {"random": (), "medium-replay": ("medium",), "medium-expert": ("medium", "expert")}
    for level, buffer in sets.items():
        about, record = buffer.metadata, json.loads((made.results / f"point-{level}.json").read_text())
        assert about["dataset_name"] == record["name"] == f"ours/point-{level}" and record["sha256"] == about["sha256"]
        assert record["returns"]["mean"] == pytest.approx(buffer["episode_returns"].mean(), rel=1e-4)
        assert set(about["levels"]) == set(used.get(level, (level,)))
        assert about["generator"]["flags"]["rows"] == 600
    suite.refuse_others(made, ["point-medium"])  # its own file is no obstacle
    with pytest.raises(envs.InputError, match="made with other settings"):
        suite.refuse_others(types.SimpleNamespace(**{**vars(made), "rows": 601}), ["point-medium"])


def test_sets_of_other_sizes_and_folders_have_records_of_their_own(tmp_path):
    """Making a small set elsewhere must not make the usual one count as not made: it would be made again."""
    every = [suite.parse(words) for words in ([], ["--rows", "20000"], ["--out", str(tmp_path)], ["--seed", "1"])]
    records = {record_file(suite.set_cell(args, "hopper-random"), suite.base_folder(args)) for args in every}
    assert len(records) == 4


def say(words, end=None, match=None):
    """The suite's command -> what it says; end, match: the error that it must end with."""
    ends = pytest.raises(end, match=match) if end else contextlib.nullcontext()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(io.StringIO()) as said, ends:
        suite.main(words)
    return said.getvalue()


def test_a_set_is_made_once_and_again_bit_for_bit(tmp_path):
    """The random set of the point robot by its command: stopped, gone on with, skipped, replaced, compared."""
    args = arguments(tmp_path)
    words = ["--sets", "point-random", "--rows", "600"]
    words += [x for key in ("out", "runs", "results") for x in (f"--{key}", str(getattr(args, key)))]
    (cell,), base = suite.cells_of(args, ["point-random"]).values(), suite.base_folder(args)
    lock, record = record_file(cell, base).with_suffix(".lock"), args.results / "point-random.json"

    def stop():
        while not lock.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    say(words, SystemExit, "stopped by SIGTERM; go on with the same command")
    assert not cell.done.exists() and not is_done(cell, base)
    said = say(words)
    assert "0 of 1 cells are made" in said and "`ours/point-random` | 600 |" in said
    before, drawn = cell.done.stat().st_mtime_ns, buffers.load(cell.done, quiet=True)["actions"]
    assert "1 of 1 cells are made" in say(words) and cell.done.stat().st_mtime_ns == before

    other = [*words, "--seed", "1", "--results", str(tmp_path / "other")]
    say(other, envs.InputError, "made with other settings; choose another --out, or --overwrite")
    assert "0 of 1 cells are made" in say([*other, "--overwrite"])
    assert not np.array_equal(buffers.load(cell.done, quiet=True)["actions"], drawn)
    said = say([*words, "--overwrite"])  # and back: it is made anew
    assert "0 of 1 cells are made" in said and "1 of 1 sets in" in said and "bit for bit" in said

    assert "1 of 1 sets in" in say([*words, "--check"])
    known = json.loads(record.read_text())
    record.write_text(json.dumps(known | {"sha256": known["sha256"] | {"actions": "0" * 64}}))
    elsewhere = {"settings": suite.settings(suite.parse(words), "point-medium")}  # recorded, and not here
    record.with_name("point-medium.json").write_text(json.dumps(known | elsewhere))
    kept = record.read_text()
    cell.done.unlink()
    said = say(words)
    assert "0 of 1 sets in" in said and "other rows, other scores" in said and "`ours/point-random` | 600 |" in said
    assert record.read_text() == kept  # or --check would compare it with itself
    assert json.loads(cell.done.with_suffix(".json").read_text()) == known  # what was made, beside it
    said = say([*words, "--check"], SystemExit)
    assert "not compared (missing" in said and "0 of 1 sets" in said and "not point-random" in said
    cell.done.unlink()
    say([*words, "--check"], envs.InputError, "has none of the recorded sets")


def test_names_of_sets():
    for word, budget, count in (("all", "paper", 3 * 5 + 6), ("all", "cpu", 3 * 5 + 2)):
        assert len(suite.chosen([word], budget)) == count
    found = suite.chosen(["hopper-medium", "antmaze"], "cpu")
    assert found == ["hopper-medium", "antmaze-umaze", "antmaze-umaze-diverse"]
    assert suite.chosen(["antmaze-large-play"], "cpu") == ["antmaze-large-play"]
    with pytest.raises(envs.InputError, match="--sets humanoid: unknown"):
        suite.chosen(["humanoid"], "cpu")


@pytest.mark.parametrize("budget", suite.ROWS)
def test_runs_keep_what_sets_are_made_of(budget):
    for task in suite.RUNS:
        run = args_of(wurl_sac, suite.sac_flags(suite.parse(["--budget", budget]), task).split())
        assert run.keep_policies and not wurl_sac.is_diverse(run) and run.auto_alpha
        assert run.replay_size >= min(1_000_000, run.num_updates / run.updates_per_step + run.warmup_steps)


# --- table --------------------------------------------------------------------------------------


def test_table():
    class Buffer(dict):
        __len__ = lambda self: 12345

    buffer = Buffer(episode_returns=np.arange(5.0), episode_lengths=np.array([10, 10, 10, 10, 20]))
    entry = suite.distribution(buffer, envs.task("ant-maze-umaze"))
    head, _, *lines = suite.table({"hopper-expert": entry, "hopper-medium": entry}).splitlines()
    assert "D4RL's own set: published score of cloning" in head
    told = "12,345 | 5 | 2 | 1.4142 | 0 | 1 | 2 | 3 | 4 | 12, 10, 20 | 200.0"
    # nothing of D4RL's expert set is known, and its column has no number of ours
    assert lines == [f"| `ours/hopper-medium` | {told} | 52.9 |", f"| `ours/hopper-expert` | {told} | - |"]
