"""How far MJX drifts from C MuJoCo, and how fast both are on this machine.

    python benchmark/mjx_parity.py                       parity of four robots and of D4RL's ant at its mazes' walls
    python benchmark/mjx_parity.py --robots ant --speed  and steps per second of both back ends
    python benchmark/mjx_parity.py --no-parity --recorded            both against transitions recorded with MuJoCo 2.2
    python benchmark/mjx_parity.py --no-parity --returns runs/suite/cpu-seed0/hopper/policy.npz --episodes 100
    python benchmark/mjx_parity.py --speed --batches 256 4096 16384      on a GPU
    python benchmark/mjx_parity.py --backend warp --robots cheetah --num-starts 4 --num-steps 10     MuJoCo Warp instead

Parity: both engines start from the same float32 states (of random play) and take the same random actions.
Prints one table per question and writes the numbers to --out. Exits with 1 where a median after one
or ten steps is above its limit or an end differs there (those tell a wrong model from rounding, which
the contacts of a long run amplify on any machine), and where returns differ beyond chance.
"""

import argparse
import json
import pathlib
import platform
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import envs
import suite
from envs import physics, tasks
from envs.worlds import task_of_file

ROOT = pathlib.Path(__file__).resolve().parents[1]

HORIZONS = (1, 10, 50, 100)
MAZES = ("ant-maze-umaze", "ant-maze-medium", "ant-maze-large")
CORNER, SETTLE = -1.1, 20  # metres, x and y of a torso whose legs reach the walls; steps that push them out of these
WARM_UP = {"hopper": 5, "walker2d": 5}  # steps before the comparison; after fifty these two have long fallen
# median over starts of the largest entry's error: {steps: (qpos, qvel, reward)}; float32, about ten times
# what was measured (docs/envs.md)
TOLERANCES = {
    "cheetah": {1: (1e-6, 3e-5, 1e-5), 10: (6e-5, 1.5e-3, 2e-4)},
    "hopper": {1: (1e-6, 1e-5, 1e-5), 10: (2e-6, 2e-5, 1e-5)},
    "walker2d": {1: (1e-6, 6e-5, 1e-5), 10: (1e-5, 2e-4, 1e-5)},
    "ant": {1: (1e-6, 2e-5, 2e-6), 10: (5e-6, 6e-5, 1e-5)},
    **{maze: {1: (1e-6, 2e-5, 1e-6), 10: (5e-6, 6e-5, 1e-6)} for maze in MAZES},
}
# of 200 single steps recorded with MuJoCo 2.2, medians on either back end; no end may differ
OF_RECORDED = {1: (1e-6, 2e-4, 1e-5)}
CTRL_COST = {"cheetah": 0.1, "hopper": 1e-3, "walker2d": 1e-3, "ant": 0.5}
ENGINES = ("mujoco", "mjx")
RECORDED = ("halfcheetah", "hopper", "walker2d", "ant")  # tests/golden: MuJoCo 2.2, as D4RL's files


def make_env(name, backend):
    """A robot with Gymnasium's reward (halfcheetah, hopper, walker2d are these), or a registered task."""
    task = tasks.forward_task(name, ctrl_cost=CTRL_COST[name]) if name in CTRL_COST else envs.task(name)
    return physics.MujocoEnv(task, backend)


def play(env, states, actions):
    """Step a batch along actions (T, N, A), on beyond an end. -> qpos, qvel, rewards, ends, each (T, N, ..)."""

    def advance(states, action):
        states = jax.vmap(env.step)(states, action)
        now = states.pipeline_state
        return states, (now.qpos, now.qvel, states.reward, states.done)

    run = jax.jit(lambda states, actions: jax.lax.scan(advance, states, actions)[1])
    return jax.tree.map(np.asarray, run(states, actions))


def starts(env, num_starts, seed):
    """Poses and velocities after some steps of random play; in a maze some more in a corner, where legs touch walls."""
    keys = jax.random.split(jax.random.key(seed), num_starts)

    def advance(states, key):
        actions = jax.random.uniform(key, (num_starts, env.action_size), minval=-1)
        return jax.vmap(env.step)(states, actions), None

    states = jax.vmap(env.reset)(keys)
    play_on = jax.jit(lambda states, keys: jax.lax.scan(advance, states, keys)[0])
    states = play_on(states, jax.random.split(keys[0], WARM_UP.get(env.task.name, 50)))
    qpos, qvel = states.pipeline_state.qpos, states.pipeline_state.qvel
    if env.task.name in MAZES:
        states = play_on(at(env, states, qpos.at[:, :2].set(CORNER), qvel), jax.random.split(keys[1], SETTLE))
    return states.pipeline_state.qpos, states.pipeline_state.qvel


def at_walls(env, qpos):
    """How many of the poses (N, nq) touch a wall, by C MuJoCo."""
    model = env.model
    data, count = physics.mujoco.MjData(model), 0
    for pose in np.asarray(qpos):
        data.qpos[:] = pose
        physics.mujoco.mj_forward(model, data)
        count += (model.geom_type[data.contact.geom] == physics.mujoco.mjtGeom.mjGEOM_BOX).any()
    return int(count)


def at(env, states, qpos, qvel):
    """Put float32 poses (N, nq), (N, nv) into a batch of states."""
    now = jax.vmap(env.engine.start)(qpos, qvel)
    raw_obs, position = jax.vmap(env._read)(now)
    info = {**states.info, "raw_obs": raw_obs, "root_position": position}
    return states.replace(pipeline_state=now, info=info)


def spread(error):
    """Of entries (N, ..) -> median and max over N of the largest."""
    largest = error.reshape(len(error), -1).max(1)
    return float(np.median(largest)), float(largest.max())


def parity(robot, backend, num_starts, num_steps, seed):
    """-> {steps: {quantity: (median, max)}} of |back end - C| over starts; ends: starts that have ended at other steps.

    ended: of how many starts an episode has ended until there, on C. In a maze also at_walls: starts that touch a wall.
    """
    engines = [make_env(robot, backend) for backend in ("mujoco", backend)]
    qpos, qvel = starts(engines[0], num_starts, seed)
    shape = (num_steps, num_starts, engines[0].action_size)
    actions = jax.random.uniform(jax.random.key(seed + 1), shape, minval=-1)
    runs = []
    for env in engines:
        fresh = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), num_starts))
        if robot in MAZES:  # goals all around at the distance that counts as there: some ants arrive, some leave
            angle = 2 * jnp.pi * jnp.arange(num_starts) / num_starts
            near = qpos[:, :2] + 0.5 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
            fresh = fresh.replace(info={**fresh.info, "goal": near})
        runs.append(play(env, at(env, fresh, qpos, qvel), actions))
    table = {}
    ends = [run[3] > 0 for run in runs]
    for steps in [h for h in HORIZONS if h <= num_steps]:
        row = {
            name: spread(np.abs(runs[0][i] - runs[1][i])[steps - 1])
            for i, name in enumerate(("qpos", "qvel", "reward"))
        }
        differ = int((ends[0] != ends[1])[:steps].any(0).sum())
        table[steps] = row | {"ends": differ, "ended": int(ends[0][:steps].any(0).sum())}
    returns = [run[2].sum(axis=0) for run in runs]
    if robot in MAZES:
        table["at_walls"] = at_walls(engines[0], qpos)
    table["return"] = {"median difference": float(np.median(np.abs(returns[0] - returns[1])))}
    return table


def recorded_env(name, backend):
    if name == "ant":  # Gymnasium's, with contact margins as of then; there is no recording of the mazes' ant
        task = tasks.forward_task("ant", ctrl_cost=CTRL_COST["ant"])
        return physics.MujocoEnv(task, backend, gear=150.0, margin_scale=0.5)
    return physics.MujocoEnv(envs.task(name), backend)


def rewards_of(env, before, actions, after):
    """The task's rewards and ends of steps from states to states, as if the engine had made them."""
    position = after.info["root_position"]
    moved = (position - before.info["root_position"]) / env.task.dt
    after = after.replace(info={**after.info, "root_velocity": moved})
    step = envs.transition(before, actions, after)
    return np.asarray(env.task.reward(step)), np.asarray(env.task.terminal(step))


def recorded(name, backend):
    """Against MuJoCo 2.2 -> {steps: {quantity: errors}}: median and max of 200 single steps, max of one path.

    The files have states only: rewards and ends are what the task makes of these. On the path, ends: steps until there
    whose end differs.
    """
    with np.load(ROOT / "tests" / "golden" / f"envs_{name}_mj220.npz", allow_pickle=False) as file:
        data = {k: np.float32(v) if v.ndim > 1 else v for k, v in file.items()}
    env = recorded_env(name, backend)

    def states(qpos, qvel):
        fresh = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), len(qpos)))
        return at(env, fresh, jnp.asarray(qpos), jnp.asarray(qvel))

    here, there = states(data["qpos"], data["qvel"]), states(data["next_qpos"], data["next_qvel"])
    *found, ends = (x[0] for x in play(env, here, jnp.asarray(data["action"][None])))
    reward, end = rewards_of(env, here, jnp.asarray(data["action"]), there)
    errors = [np.abs(a - b) for a, b in zip(found, (data["next_qpos"], data["next_qvel"], reward), strict=True)]
    rows = {
        1: dict(zip(("qpos", "qvel", "reward"), map(spread, errors), strict=True)) | {"ends": int((ends != end).sum())}
    }
    last = max(HORIZONS)
    actions = jnp.asarray(data["ol_action"][:last])
    *found, ends = (x[:, 0] for x in play(env, states(data["ol_qpos"][:1], data["ol_qvel"][:1]), actions[:, None]))
    path = states(data["ol_qpos"][: last + 1], data["ol_qvel"][: last + 1])
    reward, end = rewards_of(env, *(jax.tree.map(lambda x: x[:-1], path), actions, jax.tree.map(lambda x: x[1:], path)))
    truth = data["ol_qpos"][1:], data["ol_qvel"][1:], reward
    for steps in HORIZONS[1:]:
        row = {
            k: (float(np.abs(a - b)[steps - 1].max()),)
            for k, a, b in zip(("qpos", "qvel", "reward"), found, truth, strict=True)
        }
        rows[steps] = row | {"ends": int((ends != end)[:steps].sum())}
    return rows


def return_distribution(path, backend, episodes, seed):
    """Returns (E,) and lengths of a kept policy's stochastic episodes in its own task.

    The suite's walker goes through umaze: there nearly every return is 1, and the length, with a minus, stands for it.
    """
    with np.load(path, allow_pickle=False) as file:
        task = task_of_file(json.loads(str(file["metadata_json"]))["task"])
    act, chunk = suite.gaussian(path), None
    if task.name == suite.WALKER:
        task, act, chunk = envs.task("ant-maze-umaze"), suite.through_maze(path, "umaze"), 50
    columns = suite.cut(suite.roll(task, act, 1, episodes, seed, None, backend, chunk), 1, sys.maxsize)
    lengths = np.diff(np.flatnonzero(columns["terminals"] | columns["timeouts"]) + 1, prepend=0)
    returns = np.add.reduceat(np.float64(columns["rewards"]), np.cumsum(lengths) - lengths)
    return (-np.float64(lengths) if chunk else returns), lengths


def speed(robot, backend, batch, seconds):
    """-> (steps per second of a batch of random play, seconds to compile)."""
    env = make_env(robot, backend)
    env.check_batch(batch)

    @jax.jit
    def run(states, key, length):
        def body(_, carry):
            states, key = carry
            key, draw = jax.random.split(key)
            actions = jax.random.uniform(draw, (batch, env.action_size), minval=-1)
            return jax.vmap(env.step)(states, actions), key

        return jax.lax.fori_loop(0, length, body, (states, key))

    began = time.perf_counter()
    states = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), batch))
    run_now = run.lower(states, jax.random.key(1), jnp.int32(1)).compile()
    compiled = time.perf_counter() - began
    length = repeats = 1  # at most 200 steps from the start, as often as it takes
    while True:
        began = time.perf_counter()
        for _ in range(repeats):
            jax.block_until_ready(run_now(states, jax.random.key(1), jnp.int32(length)))
        elapsed = time.perf_counter() - began
        if elapsed > 0.9 * seconds:
            return repeats * length * batch / elapsed, compiled
        steps = max(2 * repeats * length, int(repeats * length * seconds / max(elapsed, 1e-6)))
        length, repeats = min(200, steps), -(-steps // 200)


def check(robot, table, limits_of):
    """-> messages of medians above their limits, at the horizons that were played, and of ends that differ there."""
    failures = []
    for steps, limits in limits_of.items():
        if steps not in table:
            continue
        for name, limit in zip(("qpos", "qvel", "reward"), limits, strict=True):
            median = table[steps][name][0]
            if not median <= limit:
                failures.append(f"{robot}: median {name} error after {steps} steps: {median:.2g} > {limit:g}")
        if table[steps]["ends"]:
            failures.append(f"{robot}: {table[steps]['ends']} ends differ after {steps} steps")
    return failures


def cells_of(row):
    """Errors as text, and the count of ends that differ, with that of ends where it is known."""
    told = [" / ".join(f"{e:.1e}" for e in errors) for errors in row.values() if not isinstance(errors, int)]
    return [*told, f"{row['ends']} of {row['ended']}" if "ended" in row else str(row["ends"])]


def print_parity(robot, table):
    for steps, row in table.items():
        if steps in HORIZONS:
            print(f"| {robot} | {steps} | {' | '.join(cells_of(row))} |", flush=True)
    if "at_walls" in table:
        print(f"{robot}: {table['at_walls']} starts touch a wall", flush=True)


def print_recorded(results, keep):
    """The table; -> messages of what is above its limit."""
    head = (
        "| recorded with MuJoCo 2.2 | back end | steps | qpos median / max, or max | qvel | reward | ends that differ |"
    )
    print(f"\n{head}\n|---|---|---|---|---|---|---|")
    failures = []
    for name in RECORDED:
        for backend in ENGINES:
            table = results[f"{name} {backend}"] = recorded(name, backend)
            for steps, row in table.items():
                print(f"| {name} | {backend} | {steps} | {' | '.join(cells_of(row))} |", flush=True)
            failures += check(f"{name} on {backend}", table, OF_RECORDED)
            keep()
    return failures


def print_returns(results, paths, episodes, seed):
    """The same policy's returns on both back ends from the same starts and noise, and on C MuJoCo from others.

    The last p shows what luck alone does. -> messages where the Kolmogorov-Smirnov test tells the back ends apart.
    """
    from scipy.stats import ks_2samp

    print(
        "\n| policy | back end, seed | episodes | return: mean, std | quartiles | length |\n|---|---|---|---|---|---|"
    )
    failures = []
    for path in paths:
        found = []
        for backend, s in (("mujoco", seed + 1), ("mjx", seed + 1), ("mujoco", seed)):
            returns, lengths = return_distribution(path, backend, episodes, s)
            quartiles = ", ".join(f"{q:.4g}" for q in np.quantile(returns, (0.25, 0.5, 0.75)))
            told = f"{returns.mean():.5g}, {returns.std():.4g} | {quartiles} | {lengths.mean():.4g}"
            print(f"| {path} | {backend}, {s} | {episodes} | {told} |", flush=True)
            found.append(returns)
            results[f"{path} {backend} {s}"] = returns.tolist()
        c, mjx, other_seed = found
        p = [ks_2samp(*pair).pvalue for pair in ((c, mjx), (mjx, other_seed), (c, other_seed))]
        told = "back ends {:.2g}, back ends with other seeds {:.2g}, seeds alone {:.2g}".format(*p)
        print(f"{path}: Kolmogorov-Smirnov p: {told}", flush=True)
        failures += [f"{path}: returns differ, p = {min(p[:2]):.2g}"] if min(p[:2]) < 0.001 else []
    return failures


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--robots", nargs="+", default=list(TOLERANCES), choices=list(TOLERANCES))
    parser.add_argument(
        "--backend", default="mjx", choices=("mjx", "warp"), help="beside C MuJoCo, for parity and --speed"
    )
    parser.add_argument("--num-starts", type=int, default=32)
    parser.add_argument("--num-steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-parity", action="store_true")
    parser.add_argument("--recorded", action="store_true", help="both back ends against recorded transitions")
    parser.add_argument(
        "--returns", nargs="+", default=[], metavar="POLICY", help="both back ends, policies of a suite"
    )
    parser.add_argument("--episodes", type=int, default=100, help="of --returns")
    parser.add_argument("--speed", action="store_true", help="time both back ends")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--seconds", type=float, default=5.0, help="length of one timing")
    parser.add_argument("--out", help="json file for the numbers")
    args = parser.parse_args(argv)
    device = jax.devices()[0]
    results = {
        "device": f"{device.platform} {device.device_kind}", "machine": platform.machine(),
        "jax": jax.__version__, "mujoco": physics.mujoco.__version__, "parity": {}, "speed": {},
        "recorded": {}, "returns": {},
    }  # fmt: skip
    print(f"{results['device']}, jax {jax.__version__}, MuJoCo {physics.mujoco.__version__}\n")
    failures = []

    def keep():
        if args.out:  # after every piece: a long run may be cut short
            pathlib.Path(args.out).write_text(json.dumps(results, indent=1))

    keep()
    if not args.no_parity:
        print("| robot | steps | qpos median / max | qvel | reward | ends that differ |\n|---|---|---|---|---|---|")
        for robot in args.robots:
            table = parity(robot, args.backend, args.num_starts, args.num_steps, args.seed)
            print_parity(robot, table)
            failures += check(robot, table, TOLERANCES[robot])
            results["parity"][robot] = table
            keep()
    if args.recorded:
        failures += print_recorded(results["recorded"], keep)
    if args.returns:
        failures += print_returns(results["returns"], args.returns, args.episodes, args.seed)
        keep()
    if args.speed:
        print("\n| robot | back end | environments | steps per second | compile s |")
        print("|---|---|---|---|---|")
        for robot, backend, batch in [
            (r, b, n) for r in args.robots for b in ("mujoco", args.backend) for n in args.batches
        ]:
            try:
                rate, compiled = speed(robot, backend, batch, args.seconds)
            except (envs.InputError, RuntimeError) as error:  # no such batch here, or no memory for it
                print(f"| {robot} | {backend} | {batch} | {str(error).splitlines()[0][:80]} | |", flush=True)
                continue
            print(f"| {robot} | {backend} | {batch} | {rate:,.0f} | {compiled:.1f} |", flush=True)
            results["speed"][f"{robot} {backend} {batch}"] = (rate, compiled)
            keep()
    if failures or not args.no_parity or args.recorded or args.returns:
        print("\n".join(failures) if failures else "\nwithin tolerances")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
