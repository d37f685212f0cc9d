"""benchmark/suite.py: levels, rollouts, the maze controller, cells, presets and table."""

import contextlib
import io
import json
import signal
import subprocess
import sys
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
    args = arguments(tmp_path_factory.mktemp("suite"), "--updates=400")
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
    x = jnp.ones((3, 4))
    with np.load(folder / "policy.npz", allow_pickle=False) as file:
        last = {key: file[key] for key in file.files if key.startswith("actor")}
    with np.load(curve[-1]["path"], allow_pickle=False) as file:
        assert all((file[key] == value).all() for key, value in last.items())
    net = wurl_sac.Actor((16, 16), 2, -20.0, 2.0)
    layer = lambda i: {k: last[f"actor/params/MLP_0/Dense_{i}/{k}"][0] for k in ("kernel", "bias")}
    expected = net.apply({"params": {"MLP_0": {f"Dense_{i}": layer(i) for i in range(3)}}}, x)
    np.testing.assert_allclose(np.stack(suite.load_actor(curve[-1]["path"])[0](x)), np.stack(expected), atol=1e-6)


@pytest.mark.parametrize(
    "returns, medium, expert",
    [
        ([0, 10, 20, 30, 40, 90, 60], 3, 5),  # exactly a third
        ([0, 28, 80, 90], 1, 3),  # the one before is nearer than the first beyond
        ([0, 2, 40, 90], 2, 3),
        ([0, 2, 40, 5, 90, 30], 2, 4),  # where it is first reached, not where it comes by again
        ([50, 60, 90], 0, 2),  # beyond it from the start
        ([7], 0, 0),
    ],
)
def test_levels(returns, medium, expert):
    curve = [{"update": i, "return": float(r)} for i, r in enumerate(returns)]
    levels = suite.choose_levels(curve, lambda r: 2.0 * r)
    assert (levels["medium"]["update"], levels["expert"]["update"]) == (medium, expert)


def test_a_third_is_of_the_normalised_score():
    """Random play is not at 0: of -280 to 720, a third of the way is 53."""
    curve = [{"update": i, "return": r} for i, r in enumerate((-280.0, 55.0, 240.0, 720.0))]
    score = lambda r: 100 * (r + 280) / 1000
    assert suite.choose_levels(curve, score)["medium"]["update"] == 1
    assert suite.choose_levels(curve, lambda r: r)["medium"]["update"] == 2


# --- rollouts -----------------------------------------------------------------------------------


def test_cut_takes_episodes_by_their_start():
    """Two environments of 8 steps, a share of 5: an episode that begins before step 5 is there to its end."""
    ends = np.array([[0, 0, 1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0, 0, 1]], bool).T
    columns = {"x": np.arange(16).reshape(2, 8).T, "terminals": ends, "timeouts": ends & False}
    found = suite.cut(columns, 5, 12)
    assert found["x"].tolist() == [*range(7), *range(8, 13)]  # the second begins anew at its step 5: not counted
    assert not found["timeouts"].any() and found["terminals"].sum() == 3
    found = suite.cut({"x": columns["x"], "terminals": ends, "timeouts": ends & False}, 5, 9)
    assert found["x"].tolist() == [*range(7), 8, 9] and found["timeouts"].tolist() == [False] * 8 + [True]


def test_hoppers_fall_and_begin_anew(tmp_path):
    """Random hoppers: whole episodes that end by falling, of the length that wurl_sac.py's random play has."""
    task = envs.task("hopper")
    columns = suite.play(task, suite.uniform(task), 900, 0)
    about = {"dataset_name": "x", "env": "hopper", "layout": "task", "reward_kind": "task", "dt": 1}
    path = buffers.save(tmp_path / "x.npz", columns, about | {"task": "hopper", "episode_length": 1})
    lengths = buffers.load(path, quiet=True)["episode_lengths"]
    assert len(columns["actions"]) == 900 and columns["timeouts"].sum() <= 1
    assert 10 < lengths[:-1].mean() < 60
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
    assert reached[-1].all()
    assert free[maze.cell(name, path)].all()
    number = np.full(free.shape, -1)
    number[free] = np.arange(len(cells))
    near = np.abs(cells[:, None] - cells).sum(-1) == 1
    count = shortest_path(near)[number[tuple(pairs[:, 0].T)], number[tuple(pairs[:, 1].T)]]
    walked = 0.1 * np.argmax(reached, 0)
    assert (walked <= 4 * count + 3).all() and (walked >= 2.5 * count - 3).all()  # corners are cut


def test_the_controller_turns_with_the_ant():
    """Everything turned by an angle, the walker sees the same; and the world is indeed the same when turned."""
    env, angle = envs.make("ant-open"), 1.1
    start = env.reset(jax.random.key(3)).pipeline_state
    c, s = np.cos(angle), np.sin(angle)
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


def test_ahead_has_no_seam():
    """Way due -x, a hair to either side of it: the ant sees nearly the same; and what it sees is as at a start."""
    obs = np.asarray(envs.make("ant-open").reset(jax.random.key(3)).info["raw_obs"])
    views = maze.as_ahead(jnp.stack([obs] * 2), jnp.array([[-1.0, 1e-4], [-1.0, -1e-4]]))
    np.testing.assert_allclose(views[0], views[1], atol=1e-3)
    angles = jnp.linspace(-3.1, 3.1, 50)
    views = maze.as_ahead(jnp.stack([jnp.asarray(obs)] * 50), jnp.stack([jnp.cos(angles), jnp.sin(angles)], -1))
    assert (views[:, 1] >= 0).all()


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


@pytest.mark.parametrize("size", maze.MAPS)
def test_picked_cells_are_free(size):
    assert all(maze.MAPS[size][row][column] != "#" for pair in suite.PLAY[size] for row, column in pair)
    assert suite.PLAY[size][0] == (maze.find(size, "R"), maze.find(size, "G"))  # D4RL's


def test_play_has_picked_cells_and_diverse_has_all(size="medium"):
    env, keys = envs.make(f"ant-maze-{size}"), jax.random.split(jax.random.key(0), 300)
    begin = lambda kind: jax.jit(jax.vmap(lambda key: suite.maze_start(size, kind)(env, key)))(keys)
    states = begin("play")
    found = cell_pairs(size, states.info["raw_obs"][:, :2], states.info["goal"])
    assert {tuple(map(tuple, pair)) for pair in found.tolist()} == set(suite.PLAY[size])
    states = begin("diverse")
    found = cell_pairs(size, states.info["raw_obs"][:, :2], states.info["goal"])
    assert len(np.unique(found.reshape(-1, 4), axis=0)) > 200
    assert (found[:, 0] != found[:, 1]).any(1).all()
    noise = np.asarray(states.info["goal"]) - maze.position(size, *found[:, 1].T)
    assert noise.min() >= 0 and noise.max() <= 1.5 and noise.max() > 1.2
    np.testing.assert_array_equal(states.pipeline_state.qpos[:, :2], states.info["root_position"])


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
    assert near.any() and not near.all()
    assert np.abs(columns["actions"]).max() <= 1


# --- sets and cells -----------------------------------------------------------------------------


def test_sets(made):
    """The point robot's five sets, each what its name says."""
    sets = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for level in suite.LEVELS:
            suite.make_set(made, f"point-{level}")
            sets[level] = buffers.load(made.out / f"point-{level}.npz", quiet=True, verify=True)
    run = buffers.load(suite.run_folder(made, "point-angle-0") / "buffers" / "policy_00.npz", quiet=True)
    levels = suite.level_of(made, "point-medium")[1]
    assert {k: len(v) for k, v in sets.items()} == {
        "random": 600, "medium": 600, "medium-expert": 1200, "expert": 600, "medium-replay": levels["medium"]["rows"],
    }  # fmt: skip
    replay = sets["medium-replay"]
    for key in ("observations", "actions", "rewards", "root_positions"):
        np.testing.assert_array_equal(replay[key], run[key][: len(replay)])
    assert replay.metadata["warmup_transitions"] == 300
    np.testing.assert_array_equal(sets["medium-expert"]["actions"][:600], sets["medium"]["actions"])
    np.testing.assert_array_equal(sets["medium-expert"]["actions"][600:], sets["expert"]["actions"])
    assert (sets["random"]["actions"] ** 2).mean() == pytest.approx(1 / 3, abs=0.05)
    for level in ("medium", "expert"):  # the density is that of the policy in the file
        mean, log_std = suite.load_actor(levels[level]["path"])[0](sets[level]["observations"])
        u = np.arctanh(np.clip(np.float64(sets[level]["actions"]), -1 + 1e-9, 1 - 1e-9))
        normal = -0.5 * ((u - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
        density = (normal - np.log1p(-(np.tanh(u) ** 2))).sum(-1)
        np.testing.assert_allclose(sets[level]["action_log_probs"], density, atol=2e-2)
    for level, buffer in sets.items():
        about, record = buffer.metadata, json.loads((made.results / f"point-{level}.json").read_text())
        assert about["dataset_name"] == record["name"] == f"ours/point-{level}" and record["sha256"] == about["sha256"]
        assert record["returns"]["mean"] == pytest.approx(buffer["episode_returns"].mean(), rel=1e-4)
        assert set(about["levels"]) == set({"medium-replay": ("medium",), "medium-expert": ("medium", "expert"),
                                            "random": ()}.get(level, (level,)))  # fmt: skip
        assert about["generator"]["flags"]["rows"] == 600
    made.sets = ["point"]
    suite.refuse_others(made, ["point-medium"])  # its own file is no obstacle
    with pytest.raises(envs.InputError, match="made with other settings"):
        suite.refuse_others(types.SimpleNamespace(**{**vars(made), "rows": 601}), ["point-medium"])


def test_sets_of_other_sizes_and_folders_have_records_of_their_own(tmp_path):
    """Making a small set elsewhere must not make the usual one count as not made: it would be made again."""
    every = [suite.parse(words) for words in ([], ["--rows", "20000"], ["--out", str(tmp_path)], ["--seed", "1"])]
    records = {record_file(suite.set_cell(args, "hopper-random"), suite.base_folder(args)) for args in every}
    assert len(records) == 4


def say(words, end=None):
    """The suite's command -> what it says; end: the error that it must end with."""
    said = io.StringIO()
    with (
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(said),
        pytest.raises(end) if end else contextlib.nullcontext(),
    ):
        suite.main(words)
    return said.getvalue()


@pytest.fixture(scope="module")
def made_random(tmp_path_factory):
    """The random set of the point robot, by a command that was stopped at its only set and went on -> flags, cell."""
    args = arguments(tmp_path_factory.mktemp("random"))
    places = [x for key in ("out", "runs", "results") for x in (f"--{key}", str(getattr(args, key)))]
    words = ["--sets", "point-random", "--rows", "600", *places]
    (cell,), base = suite.cells_of(args, ["point-random"]).values(), suite.base_folder(args)
    lock, command = record_file(cell, base).with_suffix(".lock"), [sys.executable, "benchmark/suite.py", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not lock.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 1 and "stopped by SIGTERM; go on with the same command" in said
    assert not cell.done.exists() and not is_done(cell, base)
    args.out.mkdir(exist_ok=True)
    (args.out / f".{cell.done.name}.1.tmp").write_bytes(b"half of a file")
    said = say(words)
    assert "0 of 1 cells are made" in said and "`ours/point-random` | 600 |" in said
    return words, cell


def test_what_is_made_is_skipped_and_made_again_bit_for_bit(made_random):
    words, cell = made_random
    before = cell.done.stat().st_mtime_ns
    assert "1 of 1 cells are made" in say(words) and cell.done.stat().st_mtime_ns == before
    cell.done.unlink()
    said = say(words)
    assert "1 of 1 sets in" in said and "bit for bit" in said


def test_a_set_of_other_settings_is_replaced_when_asked(made_random):
    words, cell = made_random
    other, drawn = ["--seed", "1", *words], [buffers.load(cell.done, quiet=True)["actions"]]
    with pytest.raises(envs.InputError, match="made with other settings; choose another --out, or --overwrite"):
        suite.main(other)
    for flags in (other, words):  # there and back: each is made anew
        assert "0 of 1 cells are made" in say([*flags, "--overwrite"])
        drawn.append(buffers.load(cell.done, quiet=True)["actions"])
    assert not np.array_equal(drawn[0], drawn[1]) and np.array_equal(drawn[0], drawn[2])


def test_sets_are_compared_with_their_records(made_random):
    words, cell = made_random
    assert "1 of 1 sets in" in say([*words, "--check"])
    record = suite.parse(words).results / "point-random.json"
    record.write_text(record.read_text().replace(json.loads(record.read_text())["sha256"]["actions"], "0" * 64))
    said = say([*words, "--check"], SystemExit)
    assert "0 of 1 sets" in said and "not point-random" in said
    elsewhere = {"settings": suite.settings(suite.parse(words), "point-medium")}  # recorded, and not here
    record.with_name("point-medium.json").write_text(json.dumps(json.loads(record.read_text()) | elsewhere))
    said = say([*words, "--check"], SystemExit)
    assert "not compared (missing" in said and "0 of 1 sets" in said
    cell.done.unlink()
    with pytest.raises(envs.InputError, match="has none of the recorded sets"):
        suite.main([*words, "--check"])


def test_cells_are_in_order_and_accepted():
    """Every flag of every run exists, sets stand after their run, and each has its own file and folder."""
    for budget in ("cpu", "paper"):
        args = suite.parse(["--budget", budget])
        cells = suite.cells_of(args, list(suite.SETS))
        seen = set()
        for key, cell in cells.items():
            assert key == cell.name and set(cell.needs) <= seen
            seen.add(key)
        assert len({cell.done for cell in cells.values()}) == len(cells) == len(suite.SETS) + len(suite.RUNS)
        for cell in cells.values():
            if cell.runs:
                run = args_of(wurl_sac, cell.command[1:])
                task = envs.task(run.task)
                wurl_sac.check_args(run, task, task.episode_length)
                assert run.keep_policies and not wurl_sac.is_diverse(run) and run.auto_alpha
                assert run.replay_size >= min(1_000_000, run.num_updates / run.updates_per_step + run.warmup_steps)
            else:
                assert suite.parse(cell.command[1:]).make in suite.SETS
    assert len(suite.chosen(["all"], "paper")) == 3 * 5 + 6
    assert len(suite.chosen(["all"], "cpu")) == 3 * 5 + 2
    found = suite.chosen(["hopper-medium", "antmaze"], "cpu")
    assert found == ["hopper-medium", "antmaze-umaze", "antmaze-umaze-diverse"]
    assert suite.chosen(["antmaze-large-play"], "cpu") == ["antmaze-large-play"]
    with pytest.raises(envs.InputError, match="--sets humanoid: unknown"):
        suite.chosen(["humanoid"], "cpu")


# --- table --------------------------------------------------------------------------------------


def test_table():
    returns = {"mean": 1.5, "std": 0.5, "min": 1, "q1": 1.25, "median": 1.5, "q3": 1.75, "max": 2}
    lengths = {"length_mean": 700, "length_min": 10, "length_max": 1000}
    entry = {"num_transitions": 12345, "num_episodes": 2, "returns": returns | lengths, "score": 33.333}
    lines = suite.table({"hopper-expert": entry, "hopper-medium": entry}).splitlines()
    assert "D4RL's own set: published score of cloning" in lines[0] and len(lines) == 4
    numbers = "12,345 | 2 | 1.5 | 0.5 | 1 | 1.25 | 1.5 | 1.75 | 2 | 700, 10, 1000 | 33.3"
    assert lines[2] == f"| `ours/hopper-medium` | {numbers} | 52.9 |"
    assert lines[3] == f"| `ours/hopper-expert` | {numbers} | - |"  # nothing of D4RL's is known: no number of ours


def test_distribution():
    class Buffer(dict):
        def __len__(self):
            return 60

    buffer = Buffer(episode_returns=np.arange(5.0), episode_lengths=np.array([10, 10, 10, 10, 20]))
    told = suite.distribution(buffer, envs.task("ant-maze-umaze"))
    assert told["returns"] == {
        "min": 0, "q1": 1, "median": 2, "q3": 3, "max": 4, "mean": 2, "std": 1.41421, "length_mean": 12,
        "length_min": 10, "length_max": 20,
    }  # fmt: skip
    assert (told["num_transitions"], told["num_episodes"], told["score"]) == (60, 5, 200.0)
