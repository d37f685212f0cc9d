"""wurl_sac.py: pseudo-reward, SAC, collection, and how long it takes to start."""

import dataclasses
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import gymnasium
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import rollout as mujoco_rollout

import baselines
import envs
import runner
import wurl_sac
from runner import devices
from speed_parts.measuring import Case, chain_case, sac_flops, timing, torch_with

ROOT = Path(__file__).resolve().parents[2]


def pseudo_reward(bench):
    """All K (K - 1) pairs of K = 10 policies, 200 points each, 5 directions."""
    for dim in (2, 17):
        pseudo_reward_at(bench, dim)


def pseudo_reward_at(bench, dim):
    """Random walks in `dim` dimensions: check that all agree, then time them."""
    points = np.random.default_rng(0).normal(size=(10, 200, dim)).cumsum(1).astype(np.float32)
    directions = np.asarray(wurl_sac.unit_directions(jax.random.key(0), 5, dim))
    args = wurl_sac.Args(num_policies=10, num_directions=5, reward_scale=1.0)
    p, alive = jnp.asarray(points), jnp.ones((10, 200), bool)
    shorter = alive.at[0, -1].set(False)
    no_own_cost = jnp.zeros((10, 1, 200))
    cost = lambda alive: wurl_sac.pairwise_apwd(p, alive, p, alive, directions)
    program = jax.jit(lambda alive: wurl_sac.apwd_reward(cost(alive), no_own_cost, alive[:, None], 0.0, args))
    exact = points.astype(np.float64), directions.astype(np.float64), 1.0
    by_ranks = baselines.transport_cost_equal
    loop, ranks = baselines.nearest_reward(*exact), baselines.nearest_reward(*exact, by_ranks)
    for name, reward in (("wurl_sac", np.asarray(program(alive))[:, 0]), ("ranks", ranks)):
        error = np.abs(reward - loop).mean() / loop.mean()
        if not error < 1e-4:
            raise SystemExit(f"d = {dim}: {name} and the NumPy loop differ by {error:.2g}")
    case = lambda name, function: Case(f"d = {dim}: {name}", function, "ms")
    ours, loop, ranks, _ = bench.measure(
        case("wurl_sac.apwd_reward", lambda: program(alive)),
        case("NumPy, pairs, directions, points", lambda: baselines.nearest_reward(*exact)),
        case("NumPy, pairs, directions", lambda: baselines.nearest_reward(*exact, by_ranks)),
        case("wurl_sac.apwd_reward, unequal lengths", lambda: program(shorter)),
    )
    bench.ratio(f"d = {dim}: against the loop over points", loop, ours, 100)
    bench.ratio(f"d = {dim}: against NumPy without that loop", ranks, ours)


def random_rows(key, shape, num_obs, num_act):
    """Transitions [.., S], [.., A], .. of a stable linear system with noise 0.03."""
    keys = jax.random.split(key, 4)
    observations = jax.random.normal(keys[0], (*shape, num_obs))
    actions = jax.random.uniform(keys[1], (*shape, num_act), minval=-1.0)
    push = jax.random.normal(keys[2], (num_act, num_obs)) * 0.1
    noise = 0.03 * jax.random.normal(keys[3], observations.shape)
    next_observations = 0.95 * observations + actions @ push + noise
    rewards = next_observations[..., 0] - 0.1 * (actions**2).sum(-1)
    zeros = jnp.zeros(shape)
    return wurl_sac.Transitions(observations, actions, rewards, next_observations, zeros)


def sac(bench):
    """SAC updates of K = 10 policies: batch 128, hidden 256, observations 29, actions 8."""
    args = wurl_sac.Args()
    task, env = envs.task("ant"), envs.make("ant", "mujoco")
    init = wurl_sac.make_train(args, env, task, lambda x: x, task.episode_length)[0]
    agent = init(jax.random.key(0)).agent
    sizes = env.observation_size, env.action_size
    num, steps = args.num_policies, 10 if bench.small else 100
    rows = random_rows(jax.random.key(1), (num, args.replay_size), *sizes)
    full = jnp.full(num, args.replay_size, jnp.int32)
    replay = wurl_sac.Ring(rows, jnp.zeros_like(full), full)

    def train_policy(agent, replay, key):
        step = lambda agent, key: wurl_sac.wurl_update(agent, replay, key, args, lambda x: x)
        return jax.lax.scan(step, agent, jax.random.split(key, steps))

    def updates(at_once, num_devices=1):
        train = lambda *xs: jax.lax.map(lambda x: train_policy(*x), xs, batch_size=at_once)
        sharing = dataclasses.replace(args, num_devices=num_devices)
        place = jax.jit(runner.over_devices(lambda *xs: xs, sharing))  # each device's share stays there
        inputs = place(agent, replay, jax.random.split(jax.random.key(2), num))
        program = jax.jit(runner.over_devices(train, sharing))
        return lambda: program(*inputs)

    rates = [args.learning_rate] * 3
    plain = baselines.SAC(sizes, args.hidden_sizes, rates, args.alpha, False, args.log_std_min)
    plain_rows = baselines.Rows([np.array(x[0]) for x in rows])
    plain_steps = lambda: [plain.update(plain_rows.sample(args.batch_size)) for _ in range(steps)]
    flops = sac_flops(*sizes, args.hidden_sizes, args.batch_size)
    once = lambda name, function, amount: Case(name, function, "/s", amount, calls=1)
    ours, spread, torch_1, _, _, rate, _ = bench.measure(
        once("wurl_update, K = 10 in turn (policy updates)", updates(None), num * steps),
        once("wurl_update, K = 10 shared by the cores (policy updates)", updates(None, os.cpu_count()), num * steps),
        once("PyTorch SAC, 1 thread", torch_with(1, plain_steps), steps),
        once("PyTorch SAC, all cores", torch_with(os.cpu_count(), plain_steps), steps),
        once("wurl_update, K = 10 as one batch (policy updates)", updates(num), num * steps),
        chain_case(1, args.batch_size, max(args.hidden_sizes)),
        chain_case(1, 1024, 1024),
    )
    for name, rates in (("in turn", ours), ("shared by the cores", spread)):
        bench.ratio(f"{name}, against PyTorch on 1 thread", rates, torch_1, 3)
        share = f"{name}, share of the matmul floor ({flops / 1e9:.3f} GF an update)"
        bench.ratio(share, rates, rate, 60, "%", flops / 1e9 * 100)


def open_loop(env, start, actions):
    """Raw MuJoCo on our starts [B, ..] and actions [B, L, A] -> (whole episodes, step by step)."""
    model, threads = env.model, os.cpu_count()
    pool = mujoco_rollout.Rollout(nthread=threads)
    datas = [mujoco.MjData(model) for _ in range(threads)]
    skip, (batch, length, _) = env.robot.frame_skip, actions.shape
    low, high = model.actuator_ctrlrange.T
    control = (low + high) / 2 + (high - low) / 2 * actions.astype(np.float64)
    control = np.repeat(control, skip, axis=1)
    physics = jax.tree.map(np.asarray, start.pipeline_state)
    state = np.concatenate([np.zeros((batch, 1)), physics.qpos, physics.qvel], -1)
    out = np.empty((batch, length * skip, state.shape[1]))
    out_step = np.empty((batch, skip, state.shape[1]))
    per_step = [control[:, t * skip : (t + 1) * skip].copy() for t in range(length)]

    def whole():
        return pool.rollout(model, datas, state, control, state=out)[0]

    def stepwise():
        now = state
        for part in per_step:
            now = pool.rollout(model, datas, now, part, state=out_step)[0][:, -1].copy()
        return now

    return whole, stepwise


def peers(robot, worlds, length):
    """What others step as many worlds with, as many threads, random actions and no policy -> [(name, function)], steps.

    Who is not installed is left out. Their ants are without contact forces and without ends, as ours. Gymnasium's has
    no threads; its other way is a process for each world.
    """
    name, endless = {"ant": "Ant-v5", "cheetah": "HalfCheetah-v5"}[robot], {"terminate_when_unhealthy": False}
    pool = {"num_threads": os.cpu_count(), "post_constraint": False}  # without the contact forces of MuJoCo's last pass
    vector = {"vectorization_mode": "sync"}
    if robot == "ant":
        pool |= {"use_contact_force": False, **endless}
        vector |= {"include_cfrc_ext_in_observation": False, **endless}
    made = {}
    mujoco.set_mju_user_warning(lambda _: None)  # of an attribute in Gymnasium's XML, for every world
    try:
        import envpool

        made["EnvPool"] = envpool.make(name, env_type="gymnasium", num_envs=worlds, **pool)
    except ImportError as error:
        print(f"EnvPool is left out: {error} (pip install envpool)", flush=True)
    try:
        made["Gymnasium, one process"] = gymnasium.make_vec(name, worlds, **vector)
    except ImportError as error:
        print(f"Gymnasium is left out: {error} (pip install imageio)", flush=True)
    mujoco.set_mju_user_warning(None)
    size = envs.task(robot).action_size
    actions = np.random.default_rng(0).uniform(-1, 1, (min(length, 5000 // worlds), worlds, size))

    def play(env):
        for step in actions:
            env.step(step)

    for env in made.values():
        env.reset()
    return [(name, lambda env=env: play(env)) for name, env in made.items()], actions[..., 0].size


def prices(env, args, actor, num_envs, length):
    """What a control step costs beside the physics -> programs of `length` steps of it alone.

    The callback: as many worlds' arrays go to the host and back, and nothing is done there. The policies: networks and
    noise, of constant observations.
    """
    batch, engine = (args.num_policies, num_envs), env.engine
    there = np.zeros((*batch, 2 * engine.size + env.action_size), np.uint32)
    back = [np.zeros((*batch, *shape.shape), shape.dtype) for shape in engine.shapes]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in back]
    net = wurl_sac.actor_net(args, env.action_size)

    def cross(packed, _):
        bits, floats = jax.pure_callback(lambda _: back, shapes, packed)
        return packed.at[..., : 2 * engine.size].set(bits), floats

    def act(observations, key):
        mean, log_std = jax.vmap(net.apply)(actor, observations)
        noise = jax.vmap(lambda k: jax.random.normal(k, mean.shape[1:]))(jax.random.split(key, batch[0]))
        actions, log_probs = wurl_sac.tanh_normal_sample(mean, log_std, noise)
        return observations.at[..., : env.action_size].set(actions), log_probs

    keys, seen = jax.random.split(jax.random.key(0), length), jnp.zeros((*batch, env.observation_size))
    callback, policies = jax.jit(lambda x: jax.lax.scan(cross, x, keys)), jax.jit(lambda x: jax.lax.scan(act, x, keys))
    return lambda: callback(there), lambda: policies(seen)


def collection_at(bench, robot, num_policies, num_envs, length, target):
    """Steps of wurl_sac's rollouts against raw MuJoCo on the same starts and actions."""
    env, task = envs.make(robot, "mujoco"), envs.task(robot)
    length = 10 if bench.small else length
    args = wurl_sac.Args(num_policies=num_policies, num_envs=num_envs, num_devices=1)
    init, _, _, rollouts = wurl_sac.make_train(args, env, task, lambda x: x, length)
    actor = init(jax.random.key(0)).agent.actor
    keys = jax.random.split(jax.random.key(1), num_policies)
    program = jax.jit(rollouts, static_argnums=2)
    ours = lambda: program(actor, keys, num_envs)
    spread = dataclasses.replace(args, num_devices=devices.cpu_devices_for_policies(args))  # as a run has by default
    other_env = envs.make(robot, "mujoco")  # with threads of its own: devices share them
    init_spread, _, _, rollouts_spread = wurl_sac.make_train(spread, other_env, task, lambda x: x, length)
    placed, on_devices = init_spread(jax.random.key(0)).agent.actor, jax.jit(rollouts_spread, static_argnums=2)
    shared = lambda: on_devices(placed, keys, num_envs)

    reset_keys = jax.vmap(lambda k: jax.random.split(jax.random.split(k)[0], num_envs))(keys)
    start = jax.jit(jax.vmap(env.reset))(reset_keys.reshape(-1))
    steps = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), ours().transition)
    whole, stepwise = open_loop(env, start, steps.actions)
    apart = np.abs(whole()[:, env.robot.frame_skip - 1, 1:3] - steps.root_positions[:, 1]).max()
    if not apart < 1e-4:
        raise SystemExit(f"{robot}: raw MuJoCo lands {apart:.2g} m from the rollout")
    size, amount = f"{robot}, {num_policies} x {num_envs} environments", steps.actions[..., 0].size
    case = lambda name, f, n=amount: Case(f"{size}: {name}", f, "steps/s", n, calls=n > 10_000)
    others, of_call = peers(robot, num_policies * num_envs, length)
    callback, policies = prices(env, args, actor, num_envs, length)
    fast, fast_shared, raw, raw_steps, _, _, *of_others = bench.measure(
        case("wurl_sac.rollout", ours),
        case("wurl_sac.rollout, shared by the devices", shared),
        case("mujoco.rollout, whole episodes in a call", whole),
        case("mujoco.rollout, a call for each step", stepwise),
        Case(f"{size}: a step's callback alone, no physics", callback, "ms", 1 / length),
        Case(f"{size}: a step's policies alone", policies, "ms", 1 / length),
        *(case(f"{name}, no policy", function, of_call) for name, function in others),
    )
    bench.ratio(f"{size}: of whole episodes", fast, raw, target, "%", 100)
    bench.ratio(f"{size}: of a call for each step", fast, raw_steps, None, "%", 100)
    bench.ratio(f"{size}: shared by the devices, of a call for each step", fast_shared, raw_steps, 85, "%", 100)
    for (name, _), theirs in zip(others, of_others, strict=True):
        bench.ratio(f"{size}: of {name}", fast, theirs, None, "%", 100)
        bench.ratio(f"{size}: shared by the devices, of {name}", fast_shared, theirs, None, "%", 100)


def collection(bench):
    """Both robots at 256 environments, and at the batch that wurl_sac uses by default."""
    num, each = wurl_sac.Args().num_policies, wurl_sac.Args().num_envs
    for robot, length in (("ant", 60), ("cheetah", 200)):
        collection_at(bench, robot, 8, 32, length, 90)
        collection_at(bench, robot, num, each, 200, 70)


def whole_round(bench):
    """A round of `python wurl_sac.py` on its default devices: ten ants, 4 episodes of 200 steps, 200 updates each."""
    args = runner.parse(wurl_sac.Args, [], wurl_sac.preset)
    args, task, env, length = wurl_sac.open_world(args)
    args = dataclasses.replace(args, num_devices=devices.cpu_devices_for_policies(args))
    init, warm_up, chunk, rollouts = wurl_sac.make_train(args, env, task, lambda x: x, length)
    place = jax.jit(lambda state: state, out_shardings=wurl_sac.state_sharding(args))
    state = {"now": warm_up(place(init(jax.random.key(0))))[0]}
    actor = jax.tree.map(jnp.copy, state["now"].agent.actor)
    keys = jax.random.split(jax.random.key(1), args.num_policies)
    roll = jax.jit(rollouts, static_argnums=2)

    def train():
        state["now"], seen = chunk(state["now"])
        return seen

    _, updates, rounds = wurl_sac.round_sizes(args, length)
    steps = args.num_policies * args.num_envs * length
    of_call = args.chunk // updates
    name = f"main job, {args.num_devices} devices"
    spent, collected = bench.measure(
        Case(f"{name}: a round", train, "s", 1 / of_call, calls=1),
        Case(f"{name}: its {steps:,} steps", lambda: roll(actor, keys, args.num_envs), "s", calls=1),
    )
    learnt = [args.num_policies * updates / (a - b) for a, b in zip(spent, collected, strict=True)]
    bench.row(f"{name}: updates of a policy, from the two", "/s", learnt)
    minutes = [rounds * s / 60 for s in spent]
    bench.row(f"{name}: {rounds} rounds, from one; no evaluations", "min", minutes)


def first_lines(folder):
    """Start the main job afresh -> seconds to its warm-up line and to its first progress line."""
    command = [sys.executable, "-u", "wurl_sac.py", "--out", str(folder)]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    began, seen = time.perf_counter(), {}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipe)
    limit = threading.Timer(300, process.kill)
    limit.start()
    lines = []
    try:
        while "update" not in seen and (line := process.stdout.readline()):
            lines.append(line)
            seen.setdefault(line.split(" ")[0], time.perf_counter() - began)
    finally:
        limit.cancel()
        process.kill()
        process.wait()
    if "update" not in seen:
        raise SystemExit("wurl_sac.py showed no progress in 300 s:\n" + "".join(lines[-5:]))
    return seen["warm-up:"], seen["update"]


def startup(bench):
    """`python wurl_sac.py` (ant): from the start of the process to the first `update` line."""
    seen, cores = [], []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(bench.repeats):
            run = lambda i=i: seen.append(first_lines(Path(folder, str(i))))
            cores.append(timing(run, 1)[1:])
    own, others = np.array(cores).T
    warm, first = zip(*seen, strict=True)
    cores = own.mean(), others.max()
    bench.row("wurl_sac.py: warm-up collected", "s", warm, None, cores)
    bench.row("wurl_sac.py: first progress line", "s", first, 30, cores)
