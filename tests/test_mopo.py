"""mopo.py against goldens, plain numpy and worlds with known answers."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
import envs.buffers
import mopo as M
import runner
from envs import tasks
from envs.buffers import scripted
from tests.oracles import mopo_oracle as oracle

GOLDEN = Path(__file__).parent / "golden"
TINY = dict(
    model_hidden_sizes=(16, 16), ensemble_size=3, num_elites=2, max_epochs=3, hidden_sizes=(16, 16), batch_size=40,
    horizon=3, retain=2, rollout_batch=64, rollout_freq=10, chunk=20, eval_every=40, num_updates=80, eval_episodes=2,
)  # fmt: skip


def tiny(**changes):
    return M.Args(**{**TINY, **changes})


def golden(name):
    """Arrays of a golden file, in float32 where they are floats."""
    with np.load(GOLDEN / f"mopo_{name}.npz", allow_pickle=False) as file:
        return {k: file[k].astype(np.float32) if file[k].dtype == float else file[k] for k in file.files}


def close(found, wanted, tolerance):
    """Relative to the largest entry, as float32 sums are."""
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(found, wanted, atol=tolerance * np.abs(wanted).max(), rtol=tolerance)


def random_data(num_rows=400, num_obs=3, num_actions=2, seed=0, **columns):
    """Rows of a linear world with small noise."""
    rng = np.random.default_rng(seed)
    obs, actions = rng.normal(size=(num_rows, num_obs)), rng.uniform(-1, 1, (num_rows, num_actions))
    after = obs + 0.1 * actions @ rng.normal(size=(num_actions, num_obs)) + 0.01 * rng.normal(size=obs.shape)
    data = M.Rows(obs, actions, obs[:, 0], after, np.zeros(num_rows), np.zeros(num_rows))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), data._replace(**columns))


class AbstractTask(NamedTuple):
    """What the model needs to know of a task."""

    model_terminal: Callable = lambda next_obs: jnp.zeros(next_obs.shape[:-1], bool)
    model_reward: Callable | None = None
    observation_size: int = 3
    action_size: int = 2


# Eager JAX compiles operation by operation, which costs more than everything these tests compute.
refresh = jax.jit(M.refresh, static_argnums=(5, 6))
update = jax.jit(M.mopo_update, static_argnums=4)
model_rollout = jax.jit(M.model_rollout, static_argnums=(4, 5))
fit_init = jax.jit(M.fit_init, static_argnums=2)
fit_chunk = jax.jit(M.fit_chunk, static_argnums=2)
split_data = jax.jit(M.split_data, static_argnums=2)
predict = jax.jit(M.predict, static_argnums=3)
critic_loss = jax.jit(M.mopo_critic_loss, static_argnums=6)
actor_loss = jax.jit(M.mopo_actor_loss, static_argnums=5)
model_loss = jax.jit(M.mopo_model_loss, static_argnums=3)


@functools.cache
def small_world(**changes):
    """args, task, data, a fresh model and a fresh agent with its ring, on random data."""
    args = tiny(**changes)
    task, data = AbstractTask(), random_data()
    init_fit, _, model = M.make_fit(args)
    fit = init_fit(jax.random.split(jax.random.key(0), 1), data)
    state = M.make_train(args, task)[0](jax.random.split(jax.random.key(1), 1))
    first = lambda tree: jax.tree.map(lambda x: x[0], tree)
    return args, task, data, first(model(fit, data)), first(state.agent), first(state.ring)


# --- goldens ---


def test_nll_golden():
    g = golden("nll")
    args = M.Args(logvar_coef=float(g["logvar_loss_coef"]))
    loss = lambda mean, raw, high, low: M.gaussian_nll(M.Ensemble((), (), high, low), mean, raw, g["targets"], args)
    inputs = g["mean"], g["raw_logvar"], g["max_logvar"], g["min_logvar"]
    total, grads = jax.value_and_grad(loss, (0, 1, 2, 3))(*inputs)
    close(total, g["total"], 1e-6)
    for name, grad, tolerance in zip(
        ("mean", "raw_logvar", "max_logvar", "min_logvar"), grads, (1e-5, 1e-5, 2e-3, 1e-5), strict=True
    ):
        close(grad, g[f"grad_{name}"], tolerance)
    close(M.bound_logvar(M.Ensemble((), (), g["max_logvar"], g["min_logvar"]), g["raw_logvar"]), g["logvar"], 1e-5)


def golden_net(g):
    layers = range(5)
    return M.Ensemble(
        tuple(g[f"W{i}"] for i in layers), tuple(g[f"b{i}"] for i in layers), g["max_logvar"], g["min_logvar"]
    )


def test_forward_golden():
    g = golden("forward")
    net = golden_net(g)
    x = M.model_inputs((g["mu"][0], g["std"][0]), g["x"][:, :4], g["x"][:, 4:])
    mean, raw = M.ensemble_apply(net, x)
    close(mean, g["mean"], 1e-5)
    close(M.bound_logvar(net, raw), g["logvar"], 1e-5)
    np.testing.assert_allclose(M.Args().model_decays, g["weight_decays"], rtol=1e-6)
    close(M.weight_decay(net, M.Args()), g["decay_loss"], 1e-5)


PENALTIES = {
    "max_aleatoric": "max_aleatoric_all", "max_aleatoric_elites": "max_aleatoric_elites",
    "max_dist_to_mean": "max_dist_to_mean", "max_pairwise": "max_pairwise_elites",
    "ensemble_std": "ensemble_std", "total_std": "total_std_norm",
}  # fmt: skip


@pytest.mark.parametrize("kind", PENALTIES)
def test_penalty_golden(kind):
    g = golden("penalty")
    net = M.Ensemble((), (), jnp.full(18, 50.0), jnp.full(18, -50.0))  # bounds far away: raw passes
    close(jnp.exp(0.5 * M.bound_logvar(net, g["logvar"])), g["std"], 1e-5)
    u = M.penalty(g["mean"], g["std"], g["elites"], kind)
    close(u, g[f"pen_{PENALTIES[kind]}"], 1e-5)
    row = np.arange(40)
    noise = g["eps"][g["model_idx"], row]
    next_obs, rewards = M.model_step(g["obs"], g["mean"], g["std"], g["model_idx"], noise)
    close(next_obs, g["next_obs"], 1e-5)
    close(rewards, g["reward_raw"], 1e-5)
    close(rewards - g["lam"] * u, g[f"reward_{PENALTIES[kind]}"], 1e-5)


def test_penalty_default_is_the_papers():
    assert M.Args().penalty == "max_aleatoric"


BOX = np.nextafter(np.float32(100), np.float32(0))  # the golden's box is open, ours is closed
TERMINATIONS = {
    "halfcheetah": (envs.task("cheetah-run").model_terminal, BOX, "orlkit"),
    "walker2d": (tasks.forward_task("walker2d", ctrl_cost=0.0).model_terminal, BOX, "orlkit"),
    "hopper": (tasks.forward_task("hopper", ctrl_cost=0.0).model_terminal, np.inf, "gym"),
    "ant": (envs.task("ant-angle-0", terminate=True).model_terminal, np.inf, "gym"),
    "humanoid": (envs.task("humanoid").model_terminal, np.inf, "gym"),
}


@pytest.mark.parametrize("name", TERMINATIONS)
def test_termination_golden(name):
    g = golden("termination")
    next_obs = g[f"{name}_next_obs"]
    terminal, box, convention = TERMINATIONS[name]
    size = next_obs.shape[1]
    model = M.Model(None, None, None, jnp.full(size, -box), jnp.full(size, box))
    task = AbstractTask(model_terminal=terminal)
    broken, outside, terminals = M.rollout_ends(model, task, jnp.asarray(next_obs), jnp.zeros(len(next_obs)))
    ends, wanted = np.asarray(broken | outside | terminals), g[f"{name}_done_{convention}"]
    same = np.ones(len(wanted), bool)
    if name == "humanoid":  # our task is open at z = 1 and 2; the golden looks at z alone, we at all of s'
        same = ~np.isin(next_obs[:, 0], [1.0, 2.0]) & np.isfinite(next_obs).all(1)
        assert (~same).sum() == 6 and ends[~same].all()
    assert 0 < wanted[same].sum() < same.sum()
    np.testing.assert_array_equal(ends[same], wanted[same])


@pytest.mark.parametrize("case", range(4))
def test_early_stop_golden(case):
    g = golden("early_stop")
    prefix, args = f"c{case}_", M.Args()
    with np.load(GOLDEN / "mopo_early_stop.npz", allow_pickle=False) as file:
        losses = file[prefix + "losses"]
    best, idle, snapshot, epoch = jnp.full(7, 1e10), jnp.int32(0), np.zeros(7, int), 0
    counters, gains = [], []
    while idle < args.patience:
        best, idle, gained = M.keep_best(best, idle, jnp.asarray(losses[epoch], jnp.float32), args)
        epoch += 1
        counters.append(int(idle))
        gains.append(np.asarray(gained))
        snapshot[gains[-1]] = epoch
    assert epoch == g[prefix + "ge5_stop_epochs"]
    close(best, g[prefix + "ge5_best"], 1e-6)
    np.testing.assert_array_equal(np.stack(gains), g[prefix + "ge5_updated"])
    np.testing.assert_array_equal(counters, g[prefix + "ge5_counters"])
    elites = jnp.argsort(best, stable=True)[: args.num_elites]
    np.testing.assert_array_equal(elites, g[prefix + "ge5_elites"])
    stop, _, snap64, elites64 = oracle.early_stop(losses)
    assert stop == epoch and list(elites64) == list(np.asarray(elites))
    np.testing.assert_array_equal(snap64, snapshot)


def test_sac_golden():
    g = golden("sac")
    actions, log_probs = M.tanh_normal_sample(g["mean"], g["log_std"], g["eps"])
    close(actions, g["action"], 1e-5)
    close(log_probs, g["log_prob_exact"], 1e-5)
    assert np.abs(log_probs - g["log_prob_eps1e6"]).max() > 1.0  # the approximation is another number
    next_q = np.minimum(g["q1_target"], g["q2_target"])
    alpha = np.exp(g["log_alpha"])
    batch = M.Rows(None, None, g["reward"], None, g["done"], np.zeros(64))
    y = M.sac_target(batch, next_q, g["log_prob_exact"], alpha, g["gamma"])
    close(y, g["td_target"], 1e-5)
    close(np.mean((g["q_pred"] - np.asarray(y)) ** 2, 1), g["critic_loss_full"], 1e-5)
    entropy = -g["log_prob_exact"].mean()
    loss, grad = jax.value_and_grad(M.mopo_alpha_loss)(g["log_alpha"], entropy, g["target_entropy"])
    close(loss, g["alpha_loss"], 1e-5)
    close(grad, g["alpha_grad"], 1e-5)


# --- losses against numpy, and where their gradients go ---


def test_model_loss_is_the_oracles():
    args, _, data, model, _, _ = small_world()
    rows = jax.tree.map(lambda x: x[:90].reshape(3, 30, *x.shape[1:]), data)
    x = np.asarray(M.model_inputs(model.scale, rows.observations, rows.actions))
    y = np.asarray(M.model_targets(rows))
    net64 = jax.tree.map(lambda v: np.asarray(v, float), model.net)
    decays = [2.5e-5, 5e-5, 1e-4]  # three layers: the first two c and the output's
    wanted = oracle.model_loss(*net64, x.astype(float), y.astype(float), decays, args.logvar_coef)
    close(model_loss(model.net, x, y, args), wanted, 1e-5)
    np.testing.assert_allclose(y[..., :-1], rows.next_observations - rows.observations, rtol=1e-6)
    np.testing.assert_array_equal(y[..., -1], rows.rewards)


def test_model_gradient_reaches_all_and_no_other_member():
    args, _, data, model, _, _ = small_world()
    rows = jax.tree.map(lambda x: x[:90].reshape(3, 30, *x.shape[1:]), data)
    x, y = M.model_inputs(model.scale, rows.observations, rows.actions), M.model_targets(rows)
    model_grad = jax.jit(jax.grad(M.mopo_model_loss), static_argnums=3)
    grads = model_grad(model.net, x, y, args)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    other = model_grad(model.net, x, y.at[0].add(1.0), args)
    for a, b in zip(jax.tree.leaves(grads[:2]), jax.tree.leaves(other[:2]), strict=True):
        assert np.abs(a[0] - b[0]).max() > 0
        np.testing.assert_array_equal(a[1:], b[1:])
    direction = jax.tree.map(lambda v: jnp.sign(v + 1e-9), model.net)
    at = lambda t: float(model_loss(jax.tree.map(lambda v, d: v + t * d, model.net, direction), x, y, args))
    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(*map(jax.tree.leaves, (grads, direction)), strict=True))
    close((at(1e-3) - at(-1e-3)) / 2e-3, slope, 1e-2)


def sac_inputs():
    args, _, data, _, agent, _ = small_world()
    target = jax.tree.map(lambda v: v + 0.1, agent.critic)
    terminals = jnp.arange(40) % 3 == 0
    outside = jnp.arange(40) % 4 == 0
    flags = dict(terminals=terminals.astype(jnp.float32), outside=outside.astype(jnp.float32))
    batch = jax.tree.map(lambda x: x[:40], data)._replace(**flags)
    return args, agent._replace(target=target), batch, jnp.float32(0.3), jax.random.key(5)


def test_critic_loss_is_the_oracles():
    args, agent, batch, alpha, key = sac_inputs()
    loss, metrics = critic_loss(agent.critic, agent.target, agent.actor, alpha, batch, key, args)
    b = jax.tree.map(lambda x: np.asarray(x, float), batch)
    noise = np.asarray(jax.random.normal(key, b.actions.shape), float)
    next_actions, log_probs = oracle.actor(agent.actor, b.next_observations, noise, args.log_std_min, args.log_std_max)
    next_q = oracle.twin_q(agent.target, b.next_observations, next_actions).min(0)
    value = next_q - 0.3 * log_probs
    assert (value[::4] > 0).any()  # rows that end outside, where the lesser is 0
    value[::4] = np.minimum(value[::4], 0.0)
    y = b.rewards + args.gamma * (1 - b.terminals) * value
    q = oracle.twin_q(agent.critic, b.observations, b.actions)
    close(loss, ((q - y) ** 2).mean(1).sum(), 1e-4)
    close(metrics["train/target"], y.mean(), 1e-4)


def test_of_many_critics_the_least_counts_in_target_and_actor():
    """Four critics with one value each, whatever s and a: the least is not among the first two, which are the default.

    A loss that asked for two would find them among the four, and be silent.
    """
    args, _, data, _, agent, _ = small_world(num_critics=4)
    batch, key = jax.tree.map(lambda x: x[:40], data), jax.random.key(5)

    def says(values):
        params = jax.tree.map(jnp.zeros_like, agent.critic)["params"]
        for net, value in zip(params.values(), values, strict=True):  # strict: make_train made four
            net[max(net)]["bias"] = jnp.array([float(value)])
        return {"params": params}

    critic, target, alpha = says([2, 3, 1, 4]), says([7, 8, 5, 6]), jnp.float32(0.0)
    loss, metrics = critic_loss(critic, target, agent.actor, alpha, batch, key, args)
    y = np.asarray(batch.rewards + args.gamma * (1 - batch.terminals) * 5.0)
    close(loss, sum(((q - y) ** 2).mean() for q in (1, 2, 3, 4)), 1e-5)
    close(metrics["train/target"], y.mean(), 1e-5)
    close(actor_loss(agent.actor, critic, alpha, batch, key, args)[0], -1.0, 1e-6)


def test_actor_loss_is_the_oracles():
    args, agent, batch, alpha, key = sac_inputs()
    loss, metrics = actor_loss(agent.actor, agent.critic, alpha, batch, key, args)
    obs = np.asarray(batch.observations, float)
    noise = np.asarray(jax.random.normal(key, batch.actions.shape), float)
    actions, log_probs = oracle.actor(agent.actor, obs, noise, args.log_std_min, args.log_std_max)
    close(loss, np.mean(0.3 * log_probs - oracle.twin_q(agent.critic, obs, actions).min(0)), 1e-4)
    close(metrics["train/entropy"], -log_probs.mean(), 1e-4)


def test_gradients_stop_where_the_equations_say():
    args, agent, batch, alpha, key = sac_inputs()
    size = lambda tree: sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(tree))
    grads = jax.grad(lambda *x: critic_loss(*x, batch, key, args)[0], (0, 1, 2, 3))(
        agent.critic, agent.target, agent.actor, alpha
    )
    assert size(grads[0]) > 0 and size(grads[1:]) == 0
    grads = jax.grad(lambda actor: actor_loss(actor, agent.critic, alpha, batch, key, args)[0])(agent.actor)
    assert all(size(leaf) > 0 for leaf in jax.tree.leaves(grads))
    grads = jax.grad(M.mopo_alpha_loss, (0, 1))(jnp.float32(-1.0), jnp.float32(0.5), -2.0)
    assert float(grads[0]) == 2.5 and float(grads[1]) == 0  # entropy above its target: alpha falls


def test_update_is_in_the_order_of_the_header():
    """Critics, then the actor with the new critics, then alpha with the entropy before the actor's step."""
    args, task, data, model, agent, ring = small_world()
    ring, _ = refresh(agent, ring, model, data, jax.random.key(2), args, task)
    key = jax.random.key(3)
    after, metrics = update(agent, ring, data, key, args)
    key_batch, key_critic, key_actor = jax.random.split(key, 3)
    batch = M.mixed_batch(ring, data, key_batch, args)
    alpha, opts = jnp.float32(1.0), M.optimisers(args)
    step = lambda opt, grads, state, params: jax.tree.map(jnp.add, params, opt.update(grads, state)[0])
    loss = lambda p: critic_loss(p, agent.target, agent.actor, alpha, batch, key_critic, args)[0]
    critic = step(opts[1], jax.grad(loss)(agent.critic), agent.critic_opt, agent.critic)
    loss = lambda p: actor_loss(p, critic, alpha, batch, key_actor, args)[0]
    actor = step(opts[0], jax.grad(loss)(agent.actor), agent.actor_opt, agent.actor)
    for found, wanted in ((after.critic, critic), (after.actor, actor)):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-7)
    assert float(metrics["train/entropy"]) > -2.0 and float(after.log_alpha) < 0.0
    for t, old, new in zip(*map(jax.tree.leaves, (after.target, agent.target, critic)), strict=True):
        np.testing.assert_allclose(t, 0.995 * old + 0.005 * new, atol=1e-6)


@pytest.mark.parametrize("target, grows", [(None, True), (-3.0, False)])
def test_alpha_aims_at_minus_the_number_of_actions(target, grows):
    """An entropy near -2.5 with A = 2 is below the default target -2 and above orig's -3."""
    args, task, data, model, agent, ring = small_world()
    args = dataclasses.replace(args, target_entropy=target)
    ring, _ = refresh(agent, ring, model, data, jax.random.key(2), args, task)
    layers = {k: jax.tree.map(jnp.zeros_like, v) for k, v in agent.actor["params"]["MLP_0"].items()}
    layers["Dense_2"]["bias"] = jnp.array([0.0, 0.0, -2.8, -2.8])
    actor = {"params": {"MLP_0": layers}}
    after, metrics = update(agent._replace(actor=actor), ring, data, jax.random.key(3), args)
    assert -3.0 < float(metrics["train/entropy"]) < -2.0
    assert (float(after.log_alpha) > 0) == grows


def test_the_actors_rate_falls_to_zero_by_a_cosine():
    for cosine, last in ((True, 0.0), (False, 1e-4)):
        actor_adam = M.optimisers(tiny(actor_cosine=cosine, num_updates=80, actor_lr=1e-4))[0]
        for count, wanted in ((0, 1e-4), (40, 0.5 * (1e-4 + last)), (80, last)):
            state = M.optax.tree_utils.tree_set(actor_adam.init(jnp.zeros(())), count=jnp.int32(count))
            step, _ = actor_adam.update(jnp.float32(1.0), state)
            adam = state[0]._replace(count=jnp.int32(count))
            unit, _ = M.optax.scale_by_adam().update(jnp.float32(1.0), adam)
            np.testing.assert_allclose(-step, wanted * unit, rtol=1e-4, atol=1e-12)


def test_alpha_is_clipped_where_it_is_used():
    args, task, data, model, agent, ring = small_world()
    ring, _ = refresh(agent, ring, model, data, jax.random.key(2), args, task)
    _, metrics = update(agent._replace(log_alpha=jnp.float32(3.0)), ring, data, jax.random.key(3), args)
    assert float(metrics["train/alpha"]) == 1.0


# --- data, scale, bootstrap ---


def test_scale_comes_from_the_training_rows_only():
    data = random_data()
    args = tiny()
    train, holdout, _ = split_data(jax.random.key(0), data, args)
    assert len(holdout) == 80 and sorted([*np.asarray(train), *np.asarray(holdout)]) == list(range(400))
    assert len(split_data(jax.random.key(0), data, tiny(holdout_rows=30))[1]) == 30
    spoilt = data._replace(observations=data.observations.at[holdout].set(1e3))
    _, _, (mean, std) = split_data(jax.random.key(0), spoilt, args)
    x = np.concatenate([data.observations, data.actions], 1)[np.asarray(train)]
    close(mean, x.mean(0), 1e-5)
    close(std, x.std(0), 1e-5)
    fit = fit_init(jax.random.key(0), data, args)
    assert fit.bootstrap.shape == (3, 320) and not np.isin(fit.bootstrap, fit.holdout).any()
    shares = [len(np.unique(row)) / 320 for row in np.asarray(fit.bootstrap)]
    assert min(shares) > 0.55 and max(shares) < 0.72  # 1 - 1/e of the rows: with replacement
    assert not np.array_equal(fit.bootstrap[0], fit.bootstrap[1])


def test_constant_column_gives_no_nan():
    data = random_data()
    data = data._replace(observations=data.observations.at[:, 1].set(0.7), actions=data.actions.at[:, 0].set(0.0))
    args = tiny()
    _, _, (_, std) = split_data(jax.random.key(0), data, args)
    assert std[1] == 1.0 and std[3] == 1.0
    fit = fit_chunk(fit_init(jax.random.key(0), data, args), data, args)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(fit.net))


@pytest.mark.parametrize("constant", [9.81, 123.456, 1000.3])
def test_a_constant_column_is_not_divided_by_its_rounding(constant):
    data = random_data()
    data = data._replace(observations=data.observations.at[:, 1].set(constant))
    _, _, (_, std) = split_data(jax.random.key(0), data, tiny())
    assert std[1] == 1.0 and std[0] != 1.0


def test_exact_epochs_visit_every_row_once():
    """Rows of one member, one at a time: after an epoch its Adam has seen each bootstrap row once."""
    args = tiny(exact_epochs=True, model_batch_size=32)
    data = random_data(num_rows=400)
    fit = fit_init(jax.random.key(0), data, args)
    batch, steps, calls = M.epoch_sizes(320, args)
    assert (batch, steps, calls) == (32, 10, 1)
    after = fit_chunk(fit, data, args)
    np.testing.assert_array_equal(np.sort(after.bootstrap, 1), np.sort(fit.bootstrap, 1))
    assert not np.array_equal(after.bootstrap, fit.bootstrap)  # shuffled for the next epoch
    assert int(after.step) == 10 and np.all(after.holdout_mse < 1e9)
    adam, net, opt = M.optax.adam(args.model_lr), fit.net, fit.opt

    @jax.jit
    def step(net, opt, index):
        rows = jax.tree.map(lambda x: x[index], data)
        x = M.model_inputs(fit.scale, rows.observations, rows.actions)
        change, opt = adam.update(jax.grad(M.mopo_model_loss)(net, x, M.model_targets(rows), args), opt)
        return jax.tree.map(jnp.add, net, change), opt

    for k in range(10):  # batch k is the k-th stretch of the bootstrap
        net, opt = step(net, opt, fit.bootstrap[:, 32 * k : 32 * (k + 1)])
    for a, b in zip(jax.tree.leaves(after.net), jax.tree.leaves(net), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_terminals_are_terminals_and_not_timeouts(tmp_path):
    """A buffer of timeouts only bootstraps everywhere; a terminal row does not."""
    path = scripted.dataset(tmp_path)
    buffer = envs.buffers.load(path, quiet=True)
    assert buffer["timeouts"].any() and not buffer["terminals"].any()
    assert "terminals" in M.DATA_KEYS and "timeouts" not in M.DATA_KEYS
    batch = M.Rows(None, None, jnp.ones(2), None, jnp.array([0.0, 1.0]), jnp.zeros(2))
    np.testing.assert_allclose(M.sac_target(batch, jnp.full(2, 10.0), jnp.zeros(2), 0.1, 0.9), [10.0, 1.0])


@pytest.mark.parametrize("value, known", [(10.0, 0.0), (-10.0, -10.0)])
def test_value_outside_the_range_is_never_a_prize(value, known):
    batch = M.Rows(None, None, jnp.ones(2), None, jnp.zeros(2), jnp.array([0.0, 1.0]))
    y = M.sac_target(batch, jnp.full(2, value), jnp.zeros(2), 0.1, 0.9)
    np.testing.assert_allclose(y, [1.0 + 0.9 * value, 1.0 + 0.9 * known], rtol=1e-6)


# --- ring and rollouts ---


def test_ring_wraps_and_drops_dead_rows():
    rng = np.random.default_rng(0)
    ring, inserts = M.ring_init({"x": jnp.zeros(2)}, 10), []
    for i in range(5):
        rows = 100.0 * i + rng.uniform(1, 50, (7, 2)).astype(np.float32)
        mask = rng.uniform(size=7) < 0.7
        inserts.append((rows, mask))
        ring = M.ring_insert(ring, {"x": jnp.asarray(rows)}, jnp.asarray(mask))
        wanted = oracle.ring_contents(10, inserts)
        assert int(ring.size) == len(wanted)
        found = {tuple(row) for row in np.asarray(ring.rows["x"])[: int(ring.size)]}
        assert found == {tuple(row) for row in wanted}
    total = sum(mask.sum() for _, mask in inserts)
    assert total > 10 and int(ring.position) == total % 10


def test_no_empty_row_inside_the_ring_after_two_refreshes():
    args, task, data, model, agent, ring = small_world()
    assert len(ring.rows.rewards) == 64 * 3 * 2
    for i in range(2):
        ring, metrics = refresh(agent, ring, model, data, jax.random.key(i), args, task)
    size = int(ring.size)
    assert size == 384 and float(metrics["model/rollout_length"]) == 3.0
    assert np.all(np.abs(ring.rows.observations[:size]).sum(1) > 0)
    sample = M.ring_sample(ring, jax.random.key(9), 5000)
    assert len(np.unique(sample.rewards)) > 370  # from everywhere in it


def roll(task=None, starts=None, model=None, key=0, **changes):
    args, plain, data, own, agent, _ = small_world()
    args = dataclasses.replace(args, **changes)
    starts = data.observations[:50] if starts is None else starts
    return model_rollout(model or own, agent.actor, starts, jax.random.key(key), args, task or plain)


def test_lambda_weighs_the_penalty():
    rows, _, info = roll(lam=0.0)
    np.testing.assert_allclose(rows.rewards, info["reward"], rtol=1e-6, atol=1e-6)
    penalised, _, info = roll(lam=2.0)
    np.testing.assert_allclose(penalised.rewards, info["reward"] - 2.0 * info["u"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(rows.observations[0], penalised.observations[0])
    assert np.all(info["u"] > 0)


def test_rollout_goes_on_from_where_it_was():
    rows, keep, _ = roll()
    assert keep.all() and rows.rewards.shape == (3, 50)
    np.testing.assert_array_equal(rows.observations[1:], rows.next_observations[:-1])
    assert np.all(np.abs(rows.actions) <= 1.0)


def test_all_terminal_rollouts_store_one_step():
    task = AbstractTask(model_terminal=lambda next_obs: jnp.ones(next_obs.shape[:-1], bool))
    rows, keep, info = roll(task)
    assert keep[0].all() and not keep[1:].any()
    assert rows.terminals[0].min() == 1.0 and info["terminal"].sum() == 50
    args, _, data, model, agent, ring = small_world()
    ring, metrics = refresh(agent, ring, model, data, jax.random.key(0), args, task)
    assert int(ring.size) == 64 and float(metrics["model/rollout_length"]) == 1.0


@pytest.mark.parametrize("value, terminal, outside", [("worst", 0, 1), ("bootstrap", 0, 0), ("zero", 1, 0)])
def test_out_of_range_ends_a_rollout(value, terminal, outside):
    _, _, data, model, _, _ = small_world()
    tight = model._replace(low=jnp.full(3, -1e-3), high=jnp.full(3, 1e-3))
    rows, keep, info = roll(model=tight, range_value=value)
    assert keep[0].all() and not keep[1:].any() and info["outside"][0].all()
    np.testing.assert_array_equal(rows.terminals[0], terminal)
    np.testing.assert_array_equal(rows.outside[0], outside)
    low, high = M.data_range(data, tiny(range_margin=0.5))
    span = np.asarray(high - low)
    both = np.concatenate([data.observations, data.next_observations])
    np.testing.assert_allclose(span, 2 * (both.max(0) - both.min(0)), rtol=1e-5)


def test_broken_predictions_are_never_stored():
    starts = random_data().observations[:50].at[::5].set(jnp.nan)
    rows, keep, _ = roll(starts=starts)
    bad = np.arange(50) % 5 == 0
    assert not keep[:, bad].any() and keep[:, ~bad].all()
    kept = jax.tree.map(lambda x: np.asarray(x)[np.asarray(keep)], rows)
    assert all(np.isfinite(x).all() for x in kept)


def test_known_reward_is_the_tasks():
    reward = lambda obs, actions, next_obs: next_obs[..., 1] - actions[..., 0]
    rows, _, _ = roll(AbstractTask(model_reward=reward), reward="known", lam=0.0)
    np.testing.assert_allclose(rows.rewards, rows.next_observations[..., 1] - rows.actions[..., 0], rtol=1e-6)


def test_elites_roll_out_and_all_members_warn():
    """Members apart by construction: samples come from the elites alone, u from the widest of all."""
    mean = jnp.stack([jnp.full((500, 4), 10.0 * i) for i in range(3)])
    std = jnp.stack([jnp.full((500, 4), s) for s in (0.1, 0.2, 5.0)])
    draw = jnp.array([0, 1])[jax.random.randint(jax.random.key(0), (500,), 0, 2)]
    next_obs, _ = M.model_step(jnp.zeros((500, 3)), mean, std, draw, jnp.zeros((500, 4)))
    assert set(np.unique(next_obs)) == {0.0, 10.0}
    np.testing.assert_allclose(M.penalty(mean, std, draw[:1], "max_aleatoric"), 10.0, rtol=1e-6)  # ||5 * 1_4||


def test_rollouts_draw_from_the_elites():
    """Members that predict s' - s = 0, 10, 20 whatever comes in: with elites 2 and 0 nobody moves by 10."""
    args, task, _, model, agent, _ = small_world()
    zero = jax.tree.map(jnp.zeros_like, model.net)
    mean_part = jnp.arange(8) < 4  # of the last layer: D means, D raw log-variances
    last = jnp.where(mean_part, 10.0 * jnp.arange(3)[:, None, None], -30.0)
    net = zero._replace(biases=(*zero.biases[:-1], last), max_logvar=jnp.full(4, 0.5), min_logvar=jnp.full(4, -20.0))
    far = jnp.full(3, 1e3)
    model = model._replace(net=net, elites=jnp.array([2, 0]), low=-far, high=far)
    rows, keep, _ = model_rollout(model, agent.actor, jnp.zeros((64, 3)), jax.random.key(0), args, task)
    change = np.asarray(rows.next_observations - rows.observations)[np.asarray(keep)]
    assert set(np.unique(change.round())) == {0.0, 20.0}


# --- the nearest-neighbour model ---


@pytest.mark.parametrize("rows", [1, 100, 150])  # fewer than a block of the search, one, one and a half
def test_knn_is_the_oracles(rows):
    args, data = tiny(model="knn", knn_rows=rows, knn_scale=2.0), random_data()
    model = M.knn_model(jax.random.key(0), data, args)
    obs, actions = data.observations[:30] + 0.1, data.actions[:30]
    mean, std, u = predict(model, obs, actions, args)
    x = np.asarray(M.model_inputs(model.scale, obs, actions), float)
    index, distance = oracle.nearest(np.asarray(model.net.inputs, float), x)
    assert len(model.net.inputs) == rows
    close(u, 2.0 * distance, 1e-4)
    np.testing.assert_array_equal(mean[0], np.asarray(model.net.targets)[index])
    assert not std.any() and list(model.elites) == [0]


def test_knn_is_exact_on_its_own_rows():
    args, data = tiny(model="knn", holdout_share=0.0), random_data()
    model = M.knn_model(jax.random.key(0), data, args)
    mean, _, u = predict(model, data.observations, data.actions, args)
    close(mean[0], M.model_targets(data), 1e-6)
    assert np.abs(u).max() < 1e-3


# --- calibration against the world ---


def test_calibration_measures_the_error():
    args, _, data, model, _, _ = small_world()
    rows = jax.tree.map(lambda x: x[:60].reshape(20, 3, *x.shape[1:]), data)
    alive = jnp.arange(60).reshape(20, 3) % 4 > 0
    metrics, points = M.calibration(model, rows, alive, args)
    live = np.asarray(alive).ravel()
    mean, std, u = predict(model, data.observations[:60], data.actions[:60], args)
    y = np.asarray(M.model_targets(data))[:60]
    elites = np.asarray(model.elites)
    square = (np.asarray(mean)[elites] - y)[:, live] ** 2
    close(metrics["model/world_rmse"], np.sqrt(square.mean()), 1e-5)
    close(metrics["model/world_sigma"], np.sqrt((np.asarray(std)[elites][:, live] ** 2).mean()), 1e-5)
    error = np.sqrt(square.sum(-1).mean(0))
    close(metrics["model/world_error"], error.mean(), 1e-5)
    close(metrics["model/world_correlation"], np.corrcoef(np.asarray(u)[live], error)[0, 1], 1e-3)
    assert np.isnan(points[:, ~live]).all() and not np.isnan(points[:, live]).any()


# --- probe: a linear world with known noise ---


@functools.cache
def linear_world(num_rows=20_000, noise=0.03):
    """s' = A s + B a + noise, r = s_0 + noise; a narrow buffer; the fitted ensemble of one seed."""
    rng = np.random.default_rng(1)
    obs, actions = 0.5 * rng.normal(size=(num_rows, 3)), rng.uniform(-0.3, 0.3, (num_rows, 1))
    a, b = rng.normal(size=(3, 3)) / 3, rng.normal(size=(1, 3))
    after = obs @ a + actions @ b + noise * rng.normal(size=obs.shape)
    rewards, zeros = obs[:, 0] + noise * rng.normal(size=num_rows), np.zeros(num_rows)
    data = M.Rows(obs, actions, rewards, after, zeros, zeros)
    data = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), data)
    args = M.Args(ensemble_size=3, num_elites=2, model_hidden_sizes=(64, 64), max_epochs=30, holdout_rows=4_000)
    init, chunk, model = M.make_fit(args)
    fit = init(jax.random.split(jax.random.key(0), 1), data)
    while M.fitting(fit, args).all():
        fit = chunk(fit, data)
    return args, data, jax.tree.map(lambda x: x[0], (fit, model(fit, data)))


def test_linear_world_is_recovered():
    args, data, (fit, model) = linear_world()
    floor = 0.03**2
    mse = np.asarray(fit.best)[np.asarray(model.elites)]
    assert np.all(mse < 1.2 * floor) and np.all(mse > 0.8 * floor), mse / floor
    rows = jax.tree.map(lambda x: x[fit.holdout], data)
    _, std, _ = predict(model, rows.observations, rows.actions, args)
    sigma = np.sqrt(np.mean(np.asarray(std) ** 2, (0, 1)))
    assert np.all(np.abs(sigma / 0.03 - 1) < 0.2), sigma


def test_disagreement_grows_away_from_the_data():
    """Not so max_aleatoric: far from the data a member's sigma is whatever the net extrapolates (docs/mopo.md)."""
    args, data, (_, model) = linear_world()
    rng = np.random.default_rng(0)
    obs, actions = rng.uniform(-20, 20, (2_000, 3)), rng.uniform(-1, 1, (2_000, 1))
    for kind in ("ensemble_std", "max_pairwise", "total_std"):
        kind_args = dataclasses.replace(args, penalty=kind)
        _, _, near = predict(model, data.observations[:2_000], data.actions[:2_000], kind_args)
        _, _, far = predict(model, jnp.float32(obs), jnp.float32(actions), kind_args)
        assert far.mean() > 2 * near.mean(), (kind, float(far.mean() / near.mean()))


def test_elites_are_the_best_and_snapshots_come_back():
    _, data, (fit, model) = linear_world()
    np.testing.assert_array_equal(np.sort(model.elites), np.sort(np.argsort(fit.best)[:2]))
    rows = jax.tree.map(lambda x: x[fit.holdout], data)
    mean, _ = M.ensemble_apply(model.net, M.model_inputs(model.scale, rows.observations, rows.actions))
    mse = np.mean((np.asarray(mean) - np.asarray(M.model_targets(rows))) ** 2, (1, 2))
    close(mse, fit.best, 1e-3)


# --- seeds and determinism ---


def test_a_seed_alone_is_the_seed_among_others():
    args, task, data = tiny(num_updates=50), AbstractTask(), random_data()
    keys = jax.random.split(jax.random.key(3), 2)

    def one(key):
        fit = M.fit_chunk(M.fit_init(key, data, args), data, args)
        state = jax.tree.map(lambda x: x[0], M.make_train(args, task)[0](key[None]))
        model = M.fitted_model(fit, data, args)
        ring, _ = M.refresh(state.agent, state.ring, model, data, key, args, task)
        step = lambda agent, key: M.mopo_update(agent, ring, data, key, args)
        return jax.lax.scan(step, state.agent, jax.random.split(key, 50))[0]

    both, alone = jax.jit(jax.vmap(one))(keys), jax.jit(one)(keys[1])
    for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a[1], b, atol=1e-4)
    assert not np.allclose(jax.tree.leaves(both.actor)[1][0], jax.tree.leaves(both.actor)[1][1])


# --- the whole script ---


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return str(scripted.dataset(tmp_path_factory.mktemp("data")))


def test_knn_runs_and_resumes(dataset, tmp_path):
    args = tiny(dataset=dataset, out=str(tmp_path / "run"), model="knn", knn_rows=300, num_updates=40, reward="known")
    result = M.main(args)
    assert np.isfinite(result["score"]) and not (tmp_path / "run" / "model" / "state.npz").exists()
    assert M.main(dataclasses.replace(args, resume=True)) == result


# --- what a user can do wrong ---


def test_run_leaves_what_it_promises(dataset, tmp_path):
    folder = tmp_path / "run"
    M.main(tiny(dataset=dataset, out=str(folder), num_seeds=2))
    for name in ("dynamics", "penalty"):
        assert (folder / f"{name}.png").stat().st_size > 5_000
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[1:]]
    epochs = [r for r in records if "model/holdout_mse" in r]
    assert [(r["step"], r["seed"]) for r in epochs] == [(step, seed) for step in (1, 2, 3) for seed in (0, 1)]
    assert len(epochs[0]["model/holdout_mse"]) == 3
    wanted = {"model/u_real", "model/u_model_p95", "model/penalty_share", "model/world_rmse", "model/world_sigma"}
    assert all(wanted <= r.keys() for r in records if "eval/return" in r)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(rollout_freq=15), "multiple of --rollout-freq"),
        (dict(num_elites=4), "--num-elites"),
        (dict(real_ratio=1.0), "--real-ratio"),
        (dict(rollout_batch=10_007), "--rollout-batch"),
        (dict(num_critics=0), r"^--num-critics 0: must be at least 1$"),
        (dict(holdout_share=1.0), "--holdout-share"),
        (dict(rollout_batch=8_000_000, retain=50), "lower the seeds"),
    ],
)
def test_refusals(changes, message, dataset, tmp_path):
    with pytest.raises(envs.InputError, match=message):
        M.main(tiny(dataset=dataset, out=str(tmp_path / "run"), **changes))


def test_known_reward_is_refused_where_unknown():
    with pytest.raises(envs.InputError, match="--reward known"):
        M.check_task(tiny(reward="known"), envs.task("ant-angle-60"))


def test_the_budget_is_ours_and_the_published_horizon_and_lambda_stay(dataset):
    """Where nothing is published --preset cpu has a lambda of its own."""
    parse = lambda *words: runner.parse(M.Args, ["--dataset", dataset, *words], M.preset)
    assert (parse().lam, parse("--preset", "cpu").lam, parse("--preset", "cpu").max_epochs) == (1.0, 0.3, 20)
    found = M.preset(tiny(dataset=dataset, preset="walker2d-medium-expert-v2"))[1]
    assert found == {"horizon": 1, "lam": 2.5, "num_updates": 3_000_000}
    M.PUBLISHED["point-angle-0-scripted"] = found
    try:
        args = parse("--preset", "cpu")
    finally:
        del M.PUBLISHED["point-angle-0-scripted"]
    assert (args.horizon, args.lam, args.num_updates, args.rollout_batch) == (1, 2.5, 20_000, 10_000)


def test_a_goal_that_cannot_be_seen_is_refused_before_the_fit():
    with pytest.raises(envs.InputError, match="ends at a goal that its observations do not tell"):
        M.check_task(tiny(), envs.task("ant-maze-umaze"))


def test_scripted_dataset_is_relabelled(dataset):
    buffer = envs.buffers.load(dataset, quiet=True, task="point-angle-0", require_rewards=True)
    np.testing.assert_allclose(buffer["rewards"], buffer["next_observations"][:, 2], atol=1e-5)
    assert buffer["episode_returns"].max() > 60 and abs(buffer["episode_returns"].mean()) < 30
