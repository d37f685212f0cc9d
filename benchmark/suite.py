"""A suite like D4RL's, of our own making: locomotion and AntMaze, from a seed, with one command (docs/data.md).

    python benchmark/suite.py --list                                 what there is, and what is made
    python benchmark/suite.py                                        all sets of the CPU budget into data/
    python benchmark/suite.py --sets hopper antmaze --rows 20000     some of them, smaller
    python benchmark/suite.py --budget d4rl --sets hopper-medium-replay halfcheetah-medium-replay --out data/d4rl
                                                                     replays of D4RL's row counts, 10 minutes a robot
    python benchmark/suite.py --budget paper --jobs 3                all of D4RL's sizes, for a large machine
    python benchmark/suite.py --sets point --rows 2000               the whole way on a point robot, in minutes
    python benchmark/suite.py --table                                results/suite/: the table of what was made
    python benchmark/suite.py --check                                are data/ and results/suite/ the same, bit for bit?

Plain SAC (wurl_sac.py --preset sac) learns a robot's task and keeps its policies. "expert" is the best of them,
"medium" the first at a third of its normalised score (--budget d4rl: at the return of D4RL's medium set); their fresh
episodes make two sets, both together medium-expert, the run's rows up to the medium policy (--budget d4rl: as many rows
as D4RL has) medium-replay, uniform actions random. AntMaze: a policy that walks ahead on the open plane, under a
breadth-first waypoint controller, actions + 0.2 N(0, 1): play from the start to the goal, diverse from any cell to any.
Names are ours/<D4RL's name without version>, in files data/<that name>.npz: presets of the learners find them, and no
number on them is one on D4RL's.

Cells (runs of wurl_sac.py, sets) and what runs them are those of benchmark/cells.py: what was made by the same
command from the same run is skipped, a kill loses the cell at work, and a run goes on from its state.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import envs
from cells import ROOT, Cell, is_done, portable, record_file, run_cells, write_whole
from envs import buffers, maze
from envs.robots import ROBOTS as ROBOTS_OF_MUJOCO
from policies import load_actor
from wurl_sac import tanh_normal_sample

RESULTS = ROOT / "results" / "suite"
LEVELS = ("random", "medium", "medium-replay", "medium-expert", "expert")
WALKER = "ant-open-angle-0"
# what is trained: task -> {budget: flags of wurl_sac.py}
SAC = "--preset sac --keep-policies"
CPU_SAC = f"{SAC} --num-updates 120000 --hidden-sizes 128 128 --batch-size 128 --learning-rate 6e-4 --eval-every 4000"
CPU_SAC += " --replay-size 130000"
# Of D4RL's size: updates a step such that a run of as many rows as D4RL's replay has ends near the mean return of
# D4RL's medium set of that robot.
D4RL_SAC = f"{SAC} --num-envs 4 --hidden-sizes 128 128 --batch-size 128 --replay-size 1000000"
D4RL_BUDGETS = {
    "halfcheetah": "--updates-per-step 0.5 --num-updates 110000 --eval-every 2000",
    "hopper": "--updates-per-step 0.25 --num-updates 104000 --eval-every 2000",
    "walker2d": "--updates-per-step 0.125 --num-updates 60000 --eval-every 1000",
}
D4RL_ROWS = {"halfcheetah": 202_000, "hopper": 402_000, "walker2d": 302_000}  # of the replays
D4RL_MEDIUM = {"halfcheetah": 4770.3, "hopper": 1422.1, "walker2d": 2852.1}
PAPER_SAC = f"{SAC} --backend mujoco --num-updates 3000000 --eval-every 10000"
CPU_WALKER = f"{SAC} --num-updates 40000 --updates-per-step 0.25 --num-envs 4 --hidden-sizes 128 128 --batch-size 128"
CPU_WALKER += " --learning-rate 6e-4 --eval-every 2000 --replay-size 170000"
POINT_SAC = f"{SAC} --num-updates 4000 --warmup-steps 1000 --hidden-sizes 64 64 --replay-size 5000 --eval-every 200"
POINT_SAC += " --chunk 100 --learning-rate 1e-3"
ROBOTS = {
    robot: {"cpu": CPU_SAC, "d4rl": f"{D4RL_SAC} {budget}", "paper": PAPER_SAC}
    for robot, budget in D4RL_BUDGETS.items()
}
RUNS = ROBOTS | {
    WALKER: dict.fromkeys(("cpu", "d4rl"), CPU_WALKER)
    | {"paper": f"{SAC} --backend mujoco --num-updates 1000000 --eval-every 10000"},
    "point-angle-0": dict.fromkeys(("cpu", "d4rl", "paper"), POINT_SAC),
}
# play: hand-picked (start, goal) cells, the first D4RL's; cells are (row, column) of envs.maze.MAPS
PLAY = {
    "umaze": (((1, 1), (3, 1)),),
    "medium": (((1, 1), (6, 6)), ((1, 1), (1, 6)), ((1, 1), (6, 1)), ((3, 4), (6, 6)), ((6, 1), (6, 6))),
    "large": (((1, 1), (7, 9)), ((1, 1), (1, 10)), ((1, 1), (7, 1)), ((3, 8), (7, 9)), ((7, 1), (7, 9))),
}
MAZES = {"antmaze-umaze": ("umaze", "play"), "antmaze-umaze-diverse": ("umaze", "diverse")}
MAZES |= {f"antmaze-{size}-{kind}": (size, kind) for size in ("medium", "large") for kind in ("play", "diverse")}
POINT = "point"  # not of the suite: a try of the whole way
SETS = {f"{robot}-{level}": (robot, level) for robot in ROBOTS for level in LEVELS}
SETS |= {name: (f"ant-maze-{size}", kind) for name, (size, kind) in MAZES.items()}
SETS |= {f"{POINT}-{level}": ("point-angle-0", level) for level in LEVELS}
ROWS = {"cpu": 100_000, "d4rl": 1_000_000, "paper": 1_000_000}
CELL_FLAGS = ("budget", "rows", "updates", "seed", "out", "runs", "results")
NOISE = 0.2  # of the maze ant's actions (D4RL)
# Normalised score of behaviour cloning on D4RL's own set of that name (-v2; AntMaze: version not told), as printed in
# CPED's tables. Of D4RL's sets, not of ours.
D4RL_CLONING = {
    "halfcheetah-medium": 42.6, "hopper-medium": 52.9, "walker2d-medium": 75.3,
    "halfcheetah-medium-replay": 36.6, "hopper-medium-replay": 18.1, "walker2d-medium-replay": 26.0,
    "halfcheetah-medium-expert": 55.2, "hopper-medium-expert": 52.5, "walker2d-medium-expert": 107.5,
    "antmaze-umaze": 49.2, "antmaze-umaze-diverse": 41.8, "antmaze-medium-play": 0.4, "antmaze-medium-diverse": 0.2,
    "antmaze-large-play": 0.0, "antmaze-large-diverse": 0.0,
}  # fmt: skip


# --- policies and levels ------------------------------------------------------------------------


def learning_curve(folder):
    """What a run kept, in order: [{"path", "update", "rows", "return"}]."""
    curve = []
    for path in sorted((Path(folder) / "policies").glob("update_*.npz")):
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(str(file["metadata_json"]))
        told = {"update": about["update"], "rows": about["rows"][0], "return": about["eval/task_return"][0]}
        curve.append({"path": path, **told})
    if not curve:
        raise envs.InputError(f"{folder}: policies: none were kept. Remedy: delete the folder and run this again")
    return curve


def choose_levels(curve, score, medium_return=None):
    """-> {"expert": the best entry of a curve, "medium": what is nearest to a third of its score, where it is reached}.

    score: return -> normalised. The policy that first reaches a third, or the one before it if that is nearer.
    medium_return: this in place of a third; where no policy reaches it, medium is the best.
    """
    scores = np.array([score(entry["return"]) for entry in curve])
    best = int(scores.argmax())
    wanted = scores[best] / 3 if medium_return is None else min(score(medium_return), scores[best])
    first = int(np.argmax(scores >= wanted))
    candidates = [max(first - 1, 0), first]
    medium = min(candidates, key=lambda i: abs(scores[i] - wanted))
    return {"expert": curve[best], "medium": curve[medium]}


# --- rollouts -----------------------------------------------------------------------------------


def play(task, act, rows, seed, start=None, num_envs=20):
    """`rows` steps of whole episodes side by side -> columns of a buffer; the last episode alone may be cut.

    Episodes that begin within the first rows / num_envs steps of an environment count: long ones are not the rarer.
    """
    num_envs = max(1, min(num_envs, rows // task.episode_length))
    share = -(-rows // num_envs)
    backend = "mujoco" if task.env in ROBOTS_OF_MUJOCO else None  # as D4RL's, on any device
    return cut(roll(task, act, share, num_envs, seed, start, backend), share, rows)


def roll(task, act, share, num_envs, seed, start=None, backend=None, chunk=None):
    """Episodes one after the other in each environment, until those that begin before step `share` are over.

    act(key, states) -> actions [E, A], log densities [E]; start(env, key) -> State of one environment. An episode ends
    where it terminates or after task.episode_length steps. chunk: steps between two looks at who is done; None: an
    episode's (the sets' noise depends on it). -> columns [T, E, ..]
    """
    env = envs.make(task.name, backend)
    start = start or (lambda env, key: env.reset(key))
    begin = jax.vmap(lambda key: start(env, key))

    def step(carry, key):
        state, age = carry
        key_act, key_start = jax.random.split(key)
        actions, log_probs = act(key_act, state)
        after = jax.vmap(env.step)(state, actions)
        terminals = after.done > 0.5
        timeouts = ~terminals & (age + 1 >= task.episode_length)
        ends = terminals | timeouts
        pick = lambda new, old: jnp.where(ends.reshape(-1, *[1] * (old.ndim - 1)), new, old)
        fresh = begin(jax.random.split(key_start, num_envs))
        out = envs.transition(state, actions, after), after.reward, terminals, timeouts, log_probs
        return (jax.tree.map(pick, fresh, after), jnp.where(ends, 0, age + 1)), out

    run = jax.jit(lambda carry, key: jax.lax.scan(step, carry, jax.random.split(key, chunk or task.episode_length)))
    key_start, key = jax.random.split(jax.random.key(seed))
    carry = begin(jax.random.split(key_start, num_envs)), jnp.zeros(num_envs, int)
    parts, last, began = [], np.zeros(num_envs, int), 0
    while last.min() < share:  # `last`: where the newest ended episode of an environment ended
        key, key_run = jax.random.split(key)
        carry, part = run(carry, key_run)
        parts.append(jax.tree.map(np.asarray, part))
        ends = parts[-1][2] | parts[-1][3]
        here = np.where(ends, np.arange(1, len(ends) + 1)[:, None], 0).max(0)
        last, began = np.where(here > 0, began + here, last), began + len(ends)
        print(f"  {min(began, share) * num_envs}/{share * num_envs} steps", flush=True)
    steps, rewards, terminals, timeouts, log_probs = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    columns = {k: v for k, v in steps._asdict().items() if v is not None}
    return columns | dict(rewards=rewards, terminals=terminals, timeouts=timeouts, action_log_probs=log_probs)


def cut(columns, share, rows):
    """Columns [T, E, ..] -> [rows, ..]: of every environment the episodes that begin before step `share`."""
    ends = columns["terminals"] | columns["timeouts"]
    stops = [share + int(np.argmax(ends[share - 1 :, e])) for e in range(ends.shape[1])]
    columns = {k: np.concatenate([v[:stop, e] for e, stop in enumerate(stops)])[:rows] for k, v in columns.items()}
    columns["timeouts"][-1] = not columns["terminals"][-1]
    return columns


def gaussian(path):
    """The stochastic policy of a file, as SAC acts."""
    actor, _ = load_actor(path)

    def act(key, states):
        mean, log_std = actor(states.obs)
        return tanh_normal_sample(mean, log_std, jax.random.normal(key, mean.shape))

    return act


def uniform(task):
    """Uniform actions in [-1, 1]."""
    size = task.action_size

    def act(key, states):
        actions = jax.random.uniform(key, (len(states.obs), size), minval=-1.0)
        return actions, jnp.full(len(actions), -size * jnp.log(2.0))

    return act


def through_maze(path, name):
    """The walker of a file on its way along waypoints to the goal, with noise; its density is not kept."""
    actor, _ = load_actor(path)

    def act(key, states):
        raw = states.info["raw_obs"]
        ahead = maze.waypoint(name, raw[:, :2], states.info["goal"]) - raw[:, :2]
        actions = jnp.tanh(actor(maze.as_ahead(raw, ahead))[0])
        noise = NOISE * jax.random.normal(key, actions.shape)
        return jnp.clip(actions + noise, -1.0, 1.0), jnp.zeros(len(actions))

    return act


def maze_start(name, kind):
    """-> start(env, key): play: one of PLAY's pairs of cells; diverse: any two cells; D4RL's noise on the goal."""
    pairs = np.array(PLAY[name])
    if kind == "diverse":
        free = np.argwhere([[c != "#" for c in row] for row in maze.MAPS[name]])
        pairs = np.array([(a, b) for a in free for b in free if (a != b).any()])
    places = jnp.asarray(maze.position(name, pairs[..., 0], pairs[..., 1]))  # [P, 2, 2]
    at_goal = jnp.asarray(maze.position(name, *maze.find(name, "G")))

    def start(env, key):
        state = env.reset(key)
        pair = places[jax.random.randint(jax.random.fold_in(key, 2), (), 0, len(places))]
        physics = state.pipeline_state
        physics = env.engine.start(physics.qpos.at[:2].add(pair[0]), physics.qvel)
        raw_obs, position = env._read(physics)
        goal = state.info["goal"] - at_goal + pair[1]  # the noise of sample_goal about another cell
        info = {**state.info, "raw_obs": raw_obs, "root_position": position, "goal": goal}
        return state.replace(pipeline_state=physics, obs=env.task.observe(raw_obs), info=info)

    return start


# --- sets ---------------------------------------------------------------------------------------


def run_folder(args, task):
    """Where the run of a task lies."""
    return base_folder(args) / task


def base_folder(args):
    """The cells of one budget and seed."""
    return args.runs / f"{budget_name(args)}-seed{args.seed}"


def budget_name(args):
    """Budget, and what cuts it."""
    return args.budget + (f"-updates{args.updates}" if args.updates else "")


def trained_on(name):
    """The task whose run a set needs."""
    task, _ = SETS[name]
    return WALKER if task.startswith("ant-maze") else task


def level_of(args, name):
    """-> task, {level: entry of the curve} for a set."""
    source = envs.task(trained_on(name))
    curve = learning_curve(run_folder(args, source.name))
    medium = D4RL_MEDIUM.get(source.name) if args.budget == "d4rl" else None
    levels = choose_levels(curve, source.normalized_score if source.reference else lambda x: x, medium)
    task = envs.task(SETS[name][0])
    return task, levels


def replay_end(args, task):
    """Where a replay of D4RL's length ends: the last policy before, with the rows themselves."""
    curve = learning_curve(run_folder(args, task.name))
    rows = min(D4RL_ROWS[task.name], curve[-1]["rows"])
    return [entry for entry in curve if entry["rows"] <= rows][-1] | {"rows": rows}


def replay_rows(args, task, entry):
    """The rows of the run's own buffer up to a policy."""
    buffer = buffers.load(run_folder(args, task.name) / "buffers" / "policy_00.npz", quiet=True)
    keep = [k for k in buffer.arrays if k in buffers.COLUMNS and k != "pseudo_rewards"]
    columns = {k: np.array(buffer[k][: entry["rows"]]) for k in keep}
    return columns, min(buffer.metadata["warmup_transitions"], entry["rows"])


def make_columns(args, name):
    """-> task, columns, levels used, leading rows of random actions."""
    kind = SETS[name][1]
    if kind == "random":
        task = envs.task(SETS[name][0])
        return task, play(task, uniform(task), args.rows, args.seed), {}, args.rows
    task, levels = level_of(args, name)
    path = {level: entry["path"] for level, entry in levels.items()}
    if name in MAZES:
        size = MAZES[name][0]
        columns = play(task, through_maze(path["expert"], size), args.rows, args.seed, maze_start(size, kind))
        del columns["action_log_probs"]
        return task, columns, {"walker": levels["expert"]}, 0
    if kind == "medium-replay":
        level, entry = ("medium", levels["medium"]) if args.budget != "d4rl" else ("end", replay_end(args, task))
        columns, warmup = replay_rows(args, task, entry)
        return task, columns, {level: entry}, warmup
    wanted = ("medium", "expert") if kind == "medium-expert" else (kind,)
    parts = [play(task, gaussian(path[level]), args.rows, args.seed + 1 + LEVELS.index(level)) for level in wanted]
    columns = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
    return task, columns, {level: levels[level] for level in wanted}, 0


def settings(args, name):
    """What a set is made by."""
    about = {k: getattr(args, k) for k in ("budget", "rows", "updates", "seed")}
    return {"set": name, **about, "run": "" if name.endswith("random") else sac_flags(args, trained_on(name))}


def make_set(args, name):
    """One set: data/<name>.npz, its record beside it, and in results/suite, where none of other bits by the same
    settings stands."""
    path, settled = args.out / f"{name}.npz", settings(args, name)
    task, columns, levels, warmup = make_columns(args, name)
    used = {
        level: {k: v for k, v in entry.items() if k != "path"}
        | ({"score": float(envs.task(trained_on(name)).normalized_score(entry["return"]))} if level != "walker" else {})
        for level, entry in levels.items()
    }
    metadata = {
        "dataset_name": f"ours/{name}", "env": task.env, "task": task.name, "layout": "task", "reward_kind": "task",
        "task_options": task.options, "dt": task.dt, "episode_length": task.episode_length, "seed": args.seed,
        "generator": {"script": "benchmark/suite.py", "flags": settled}, "levels": used,
        "warmup_transitions": warmup, "reference": list(task.reference),
    }  # fmt: skip
    buffers.save(path, columns, metadata)
    buffer = buffers.load(path)
    args.results.mkdir(parents=True, exist_ok=True)
    entry = {"name": f"ours/{name}", "settings": settled, "levels": used, **distribution(buffer, task)}
    entry |= {k: buffer.metadata[k] for k in ("sha256", "versions", "git_commit")}
    known = recorded_bits(args).get(name)
    write_whole(args.out / f"{name}.json", json.dumps(entry, indent=1) + "\n")
    if known in (None, entry["sha256"]):  # else --check would find what was made here to be what is recorded
        write_whole(args.results / f"{name}.json", json.dumps(entry, indent=1) + "\n")


def distribution(buffer, task):
    """How returns and lengths of a set are spread."""
    returns, lengths = (buffer[k].astype(np.float64) for k in ("episode_returns", "episode_lengths"))
    quantiles = np.quantile(returns, (0, 0.25, 0.5, 0.75, 1))
    number = lambda x: float(f"{x:.6g}")
    told = dict(zip(("min", "q1", "median", "q3", "max"), map(number, quantiles), strict=True))
    told |= {"mean": number(returns.mean()), "std": number(returns.std())}
    told |= {"length_mean": number(lengths.mean()), "length_min": int(lengths.min()), "length_max": int(lengths.max())}
    return {
        "num_transitions": len(buffer), "num_episodes": len(returns), "returns": told,
        "score": number(task.normalized_score(returns.mean())),
    }  # fmt: skip


# --- cells --------------------------------------------------------------------------------------


def sac_flags(args, task):
    """Flags of wurl_sac.py for a task."""
    updates = f" --num-updates {args.updates}" if args.updates else ""
    return f"--task {task} {RUNS[task][args.budget]}{updates} --seed {args.seed}"


def run_cell_of(args, task):
    folder = run_folder(args, task)
    command = ["wurl_sac.py", *sac_flags(args, task).split(), "--out", str(folder)]
    return Cell(f"run {task}", command, folder / "buffers" / "policy_00.npz", (), folder)


def set_cell(args, name):
    flags = [x for key in CELL_FLAGS for x in (f"--{key}", str(getattr(args, key)))]
    need, reads = (), ()
    if not name.endswith("random"):
        need, reads = (f"run {trained_on(name)}",), (run_folder(args, trained_on(name)) / "buffers",)
    command = ["benchmark/suite.py", "--make", name, *flags]
    usual = args.rows == ROWS[args.budget] and str(args.out) == "data"  # others have records of their own
    cell = f"set {name}" if usual else f"set {name} {args.rows} {args.out}"
    return Cell(cell, command, args.out / f"{name}.npz", need, None, reads)


def cells_of(args, names):
    """Every cell by name, each after what it needs."""
    sets = [set_cell(args, name) for name in names]
    runs = dict.fromkeys(need for cell in sets for need in cell.needs)
    return {cell.name: cell for cell in [*(run_cell_of(args, run.split()[1]) for run in runs), *sets]}


def chosen(words, budget):
    """Names of --sets: sets, or the beginnings of their names; all: the suite, on a CPU without the larger mazes."""
    heavy = () if budget == "paper" else ("antmaze-medium", "antmaze-large")
    found = []
    for word in words:
        every = [n for n in SETS if not n.startswith((POINT, *heavy))] if word == "all" else []
        part = [n for n in SETS if n.startswith(f"{word}-") and not n.startswith(heavy or "-")]
        names = every or ([word] if word in SETS else part)
        if not names:
            raise envs.InputError(f"--sets {word}: unknown; all, {', '.join(SETS)}, or how they begin (hopper)")
        found += names
    return list(dict.fromkeys(found))


def of_other_settings(args, name):
    """Whether there is a file of that name which anything else made."""
    path = args.out / f"{name}.npz"
    if not path.exists():
        return False
    return buffers.load(path, (), quiet=True).metadata["generator"].get("flags") != settings(args, name)


def refuse_others(args, names):
    """InputError where a file of that name was made by anything else; with --overwrite it counts as not made."""
    for name in filter(lambda name: of_other_settings(args, name), names):
        cell = set_cell(args, name)
        if not args.overwrite:
            raise envs.InputError(f"{cell.done}: was made with other settings; choose another --out, or --overwrite")
        record_file(cell, base_folder(args)).unlink(missing_ok=True)


def show(args):
    """--list."""
    for name in SETS:
        cell = set_cell(args, name)
        made = is_done(cell, base_folder(args)) and not of_other_settings(args, name)
        made = "made" if made else "not made"
        print(f"ours/{name:28} {made:9} {cell.done}")


def recorded_bits(args):
    """{set: {column: sha256}} of what results/suite has of these settings."""
    entries = {path.stem: json.loads(path.read_text()) for path in sorted(args.results.glob("*.json"))}
    return {name: e["sha256"] for name, e in entries.items() if e["settings"] == settings(args, name)}


def check_there(args, known):
    """Say which sets of `known` --out does not have; InputError where it has none of them."""
    absent = [n for n in known if not (args.out / f"{n}.npz").exists() or of_other_settings(args, n)]
    if len(absent) == len(known):
        raise envs.InputError(f"{args.out}: has none of the recorded sets, by these settings; make them first")
    if absent:
        print(f"not compared (missing, or made with other settings): {', '.join(absent)}", flush=True)


def check_bits(args, known):
    """Say which sets in --out are, bit for bit, those of `known` -> names of those that are not."""
    there = [name for name in known if (args.out / f"{name}.npz").exists() and not of_other_settings(args, name)]
    columns = lambda name: buffers.load(args.out / f"{name}.npz", quiet=True, verify=True).metadata["sha256"]
    other = [name for name in there if columns(name) != known[name]]
    if there:
        told = f"; not {', '.join(other)}: another machine, or other versions" if other else ""
        print(
            f"{len(there) - len(other)} of {len(there)} sets in {args.out} are the recorded ones bit for bit{told}",
            flush=True,
        )
    if other:
        print(f"numbers of {args.results} and of the pages are not of them: other rows, other scores", flush=True)
    return other


# --- table --------------------------------------------------------------------------------------


def table(entries):
    """Markdown: our sets, and in a column of its own what is published of D4RL's sets of the same names."""
    told = ("length: mean, min, max", "score of the mean", "D4RL's own set: published score of cloning")
    names = ("mean", "std", "min", "q1", "median", "q3", "max")
    head = ["our set", "rows", "episodes", *(f"return: {n}" for n in names), *told]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name in [n for n in SETS if n in entries]:
        e, r = entries[name], entries[name]["returns"]
        row = [f"`ours/{name}`", f"{e['num_transitions']:,}", f"{e['num_episodes']:,}", *(f"{r[n]:.5g}" for n in names)]
        row += [f"{r['length_mean']:.4g}, {r['length_min']}, {r['length_max']}", f"{e['score']:.1f}"]
        lines.append(f"| {' | '.join([*row, str(D4RL_CLONING.get(name, '-'))])} |")
    return "\n".join(lines) + "\n"


def made_here(args, names):
    """The records beside the sets of these names that are there, by these settings."""
    there = [name for name in names if all((args.out / f"{name}.{kind}").exists() for kind in ("json", "npz"))]
    found = {name: json.loads((args.out / f"{name}.json").read_text()) for name in there}
    made = lambda name: buffers.load(args.out / f"{name}.npz", (), quiet=True).metadata["sha256"]
    return {name: record for name, record in found.items() if record["sha256"] == made(name)}


def write_table(args):
    """results/suite/<...>/table.md of the records there."""
    entries = {p.stem: json.loads(p.read_text()) for p in sorted(args.results.glob("*.json"))}
    if not entries:
        raise envs.InputError(f"{args.results}: no set was made yet; run this without --table")
    write_whole(args.results / "table.md", table(entries))
    return table(entries)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=["all"], metavar="NAME", help="sets, or how their names begin")
    parser.add_argument("--rows", type=int, default=0, help="rows of a set; 0: 100,000 (cpu), 1,000,000")
    parser.add_argument("--budget", choices=tuple(ROWS), default="cpu", help="how long SAC learns")
    parser.add_argument("--updates", type=int, default=0, help="gradient steps of SAC; 0: the budget's")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder of the sets")
    parser.add_argument("--seed", type=int, default=0, help="of networks, starts and noise")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, each pinned to a core")
    parser.add_argument("--overwrite", action="store_true", help="replace files of other settings")
    parser.add_argument("--list", action="store_true", help="name the sets and run nothing")
    parser.add_argument("--commands", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--check", action="store_true", help="compare what is there with the records, bit for bit")
    parser.add_argument("--table", action="store_true", help="only write the table of what was made")
    parser.add_argument("--runs", type=Path, default=Path("runs/suite"), help="folder of the training runs")
    parser.add_argument("--results", type=Path, default=None, help="folder of records and table")
    parser.add_argument("--make", metavar="NAME", help="one set, here and now: what the cells call")
    args = parser.parse_args(argv)
    args.rows = args.rows or ROWS[args.budget]
    if min(args.rows, args.jobs) < 1 or args.updates < 0:
        parser.error("--rows and --jobs are 1 or more, --updates 0 or more")
    made = RESULTS.relative_to(ROOT) / f"{budget_name(args)}-rows{args.rows}-seed{args.seed}"
    args.results = args.results or made
    return args


def main(argv=None):
    args = parse(argv)
    os.chdir(ROOT)
    if args.make:
        return make_set(args, args.make)
    if args.list:
        return show(args)
    if args.table:
        return print(write_table(args) + f"{args.results / 'table.md'}", flush=True)
    if args.check:
        known = recorded_bits(args)
        if not known:
            raise envs.InputError(f"{args.results}: no set was made yet")
        check_there(args, known)
        return check_bits(args, known) and sys.exit(1)
    names = chosen(args.sets, args.budget)
    cells, base = cells_of(args, names), base_folder(args)
    if args.commands:
        return print(*(portable(cell.command) for cell in cells.values()), sep="\n")
    refuse_others(args, names)
    left = [name for name, cell in cells.items() if not is_done(cell, base)]
    made = len(cells) - len(left)
    print(f"{made} of {len(cells)} cells are made; all that they say stands in {base / 'logs'}", flush=True)
    known = {name: bits for name, bits in recorded_bits(args).items() if set_cell(args, name).name in left}
    failed, stopped = run_cells(cells, base, args.jobs)
    check_bits(args, known)
    if any(args.results.glob("*.json")):
        write_table(args)
    if here := made_here(args, names):
        print(table(here), flush=True)
    if stopped:
        sys.exit(f"stopped by {stopped}; go on with the same command")
    if failed:
        sys.exit(f"suite.py: error: not made: {', '.join(sorted(failed))}")


if __name__ == "__main__":
    try:
        main()
    except (envs.InputError, OSError) as error:
        sys.exit(f"suite.py: error: {error}")
