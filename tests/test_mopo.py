"""mopo.py against goldens, plain numpy and worlds with known answers."""

import dataclasses
import functools
import json
import types
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
import mopo as M
import runner
from envs import tasks
from envs.buffers import turned
from runner import model_report, value_report
from tests.oracles import common
from tests.oracles import mopo_oracle as oracle
from tests.oracles.common import close, leaves_close, of_seed, size_of

TINY = dict(
    model_hidden_sizes=(16, 16), ensemble_size=3, num_elites=2, max_epochs=3, hidden_sizes=(16, 16), batch_size=40,
    horizon=3, retain=2, rollout_batch=64, rollout_freq=10, chunk=20, eval_every=40, num_updates=80, eval_episodes=2,
    critic_norm=False, standardise_observations=False, min_model_steps=0,
)  # fmt: skip


def tiny(**changes):
    return M.Args(**{**TINY, **changes})


def golden(name):
    return common.golden(f"mopo_{name}", np.float32)


def rows_of(obs, actions, rewards, after):
    """Steps that end nothing, in float32."""
    zeros = np.zeros(len(obs))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), M.Rows(obs, actions, rewards, after, zeros, zeros))


def random_data(num_rows=400, num_obs=3, num_actions=2, seed=0):
    """Rows of a linear world with small noise."""
    rng = np.random.default_rng(seed)
    obs, actions = rng.normal(size=(num_rows, num_obs)), rng.uniform(-1, 1, (num_rows, num_actions))
    after = obs + 0.1 * actions @ rng.normal(size=(num_actions, num_obs)) + 0.01 * rng.normal(size=obs.shape)
    return rows_of(obs, actions, obs[:, 0], after)


class AbstractTask(NamedTuple):
    """What the model needs to know of a task."""

    model_terminal: Callable = lambda next_obs: jnp.zeros(next_obs.shape[:-1], bool)
    model_reward: Callable | None = None
    observation_size: int = 3
    action_size: int = 2
    angles: tuple[int, ...] = ()


TASK = AbstractTask()
NO_ANGLES = jnp.zeros(0, jnp.int32)
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


def fitted(data, args):
    """The ensemble of one seed, fitted to its end -> Fit, Model."""
    init, chunk, model = M.make_fit(args)
    fit = init(jax.random.split(jax.random.key(0), 1), data)
    while M.fitting(fit, args).all():
        fit = chunk(fit, data)
    return of_seed((fit, model(fit, data)))


def emptied(ring):
    return ring._replace(size=0 * ring.size, position=0 * ring.position)


NO_FIT = M.Fit(*[None] * len(M.Fit._fields))


@functools.cache
def small_world():
    """args, random data, a fresh model, a fresh agent and its ring after one refresh."""
    args, data = tiny(), random_data()
    init_fit, _, model = M.make_fit(args)
    model = of_seed(model(init_fit(jax.random.split(jax.random.key(0), 1), data), data))
    state = of_seed(M.make_train(args, TASK)[0](jax.random.split(jax.random.key(1), 1)))
    ring, _ = refresh(state.agent, state.ring, model, data, jax.random.key(2), args, TASK)
    return args, data, model, state.agent, ring


# --- goldens ---


def test_nll_golden():
    g = golden("nll")
    args = M.Args(logvar_coef=float(g["logvar_loss_coef"]))
    loss = lambda mean, raw, high, low: M.gaussian_nll(M.Ensemble((), (), high, low), mean, raw, g["targets"], args)
    tolerances = {"mean": 1e-5, "raw_logvar": 1e-5, "max_logvar": 2e-3, "min_logvar": 1e-5}
    total, grads = jax.value_and_grad(loss, (0, 1, 2, 3))(*(g[name] for name in tolerances))
    close(total, g["total"], 1e-6)
    for grad, (name, tolerance) in zip(grads, tolerances.items(), strict=True):
        close(grad, g[f"grad_{name}"], tolerance)
    close(M.bound_logvar(M.Ensemble((), (), g["max_logvar"], g["min_logvar"]), g["raw_logvar"]), g["logvar"], 1e-5)


def test_forward_golden():
    g = golden("forward")
    layers = ([g[f"{kind}{i}"] for i in range(5)] for kind in "Wb")
    net = M.Ensemble(*layers, g["max_logvar"], g["min_logvar"])
    scale = M.Scale(g["mu"][0], g["std"][0], None, None, NO_ANGLES)
    x = M.model_inputs(scale, jnp.asarray(g["x"][:, :4]), g["x"][:, 4:])
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


def test_penalty_golden():
    """Of all kinds; the default is the paper's."""
    g = golden("penalty")
    net = M.Ensemble((), (), jnp.full(18, 50.0), jnp.full(18, -50.0))  # bounds far away: raw passes
    close(jnp.exp(0.5 * M.bound_logvar(net, g["logvar"])), g["std"], 1e-5)
    noise = g["eps"][g["model_idx"], np.arange(40)]
    next_obs, rewards = M.model_step(g["obs"], g["mean"], g["std"], g["model_idx"], noise)
    close(next_obs, g["next_obs"], 1e-5)
    close(rewards, g["reward_raw"], 1e-5)
    for kind, name in PENALTIES.items():
        u = M.penalty(g["mean"], g["std"], g["elites"], kind)
        close(u, g[f"pen_{name}"], 1e-5)
        close(rewards - g["lam"] * u, g[f"reward_{name}"], 1e-5)
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
    next_obs, (terminal, box, convention) = g[f"{name}_next_obs"], TERMINATIONS[name]
    size = next_obs.shape[1]
    model = M.Model(None, None, None, jnp.full(size, -box), jnp.full(size, box), *[None] * 2)
    ends = M.rollout_ends(model, AbstractTask(terminal), jnp.asarray(next_obs), jnp.zeros(len(next_obs)))
    ends, wanted = np.any(ends, 0), g[f"{name}_done_{convention}"]
    same = np.ones(len(wanted), bool)
    if name == "humanoid":  # our task is open at z = 1 and 2; the golden looks at z alone, we at all of s'
        same = ~np.isin(next_obs[:, 0], [1.0, 2.0]) & np.isfinite(next_obs).all(1)
        assert (~same).sum() == 6 and ends[~same].all()
    assert 0 < wanted[same].sum() < same.sum()
    np.testing.assert_array_equal(ends[same], wanted[same])


@pytest.mark.parametrize("case", range(4))
def test_early_stop_golden(case):
    g = {k.removeprefix(f"c{case}_"): v for k, v in golden("early_stop").items()}
    args, found = M.Args(fit_score="mse"), []
    best, idle = jnp.full(7, jnp.inf), jnp.int32(0)
    while idle < args.patience:
        best, idle, gained = M.keep_best(best, idle, jnp.asarray(g["losses"][len(found)]), args)
        found.append((int(idle), np.asarray(gained)))
    counters, gains = zip(*found, strict=True)
    assert len(found) == g["ge5_stop_epochs"]
    close(best, g["ge5_best"], 1e-6)
    np.testing.assert_array_equal(gains, g["ge5_updated"])
    np.testing.assert_array_equal(counters, g["ge5_counters"])
    fit = NO_FIT._replace(best=best)
    np.testing.assert_array_equal(M.fitted_model(fit, random_data(), args).elites, g["ge5_elites"])


def test_a_gain_by_likelihood():
    """0.01 nats, whatever the sign and size of the score; any first score is one."""
    args, best = M.Args(), jnp.array([-2.0, -2.0, 0.001, jnp.inf])
    assert args.fit_score == "nll"
    kept, idle, gained = M.keep_best(best, jnp.int32(3), jnp.array([-2.009, -2.011, -0.008, 1e6]), args)
    assert gained.tolist() == [False, True, False, True] and int(idle) == 0
    close(kept, [-2.0, -2.011, 0.001, 1e6], 1e-6)
    assert int(M.keep_best(best[:3], jnp.int32(3), best[:3] + 1, args)[1]) == 4


def test_sac_golden():
    g = golden("sac")
    actions, log_probs = M.tanh_normal_sample(g["mean"], g["log_std"], g["eps"])
    close(actions, g["action"], 1e-5)
    close(log_probs, g["log_prob_exact"], 1e-5)
    assert np.abs(log_probs - g["log_prob_eps1e6"]).max() > 1.0  # the approximation is another number
    batch = M.Rows(None, None, g["reward"], None, g["done"], np.zeros(64))
    next_q, alpha = np.minimum(g["q1_target"], g["q2_target"]), np.exp(g["log_alpha"])
    y = M.sac_target(batch, next_q, g["log_prob_exact"], alpha, g["gamma"])
    close(y, g["td_target"], 1e-5)
    close(np.mean((g["q_pred"] - np.asarray(y)) ** 2, 1), g["critic_loss_full"], 1e-5)
    entropy = -g["log_prob_exact"].mean()
    loss, grad = jax.value_and_grad(M.mopo_alpha_loss)(g["log_alpha"], entropy, g["target_entropy"])
    close(loss, g["alpha_loss"], 1e-5)
    close(grad, g["alpha_grad"], 1e-5)


# --- losses against numpy, and where their gradients go ---


def test_model_loss_is_the_oracles_and_its_gradient_reaches_all_of_a_member_alone():
    args, data, model, *_ = small_world()
    rows = jax.tree.map(lambda x: x[:90].reshape(3, 30, *x.shape[1:]), data)
    x, y = M.model_inputs(model.scale, rows.observations, rows.actions), M.model_targets(rows)
    np.testing.assert_allclose(y[..., :-1], rows.next_observations - rows.observations, rtol=1e-6)
    np.testing.assert_array_equal(y[..., -1], rows.rewards)
    net, x64, y64 = jax.tree.map(lambda v: np.asarray(v, float), (model.net, x, y))
    decays = [2.5e-5, 5e-5, 1e-4]  # three layers: the first two c and the output's
    close(model_loss(model.net, x, y, args), oracle.model_loss(*net, x64, y64, decays, args.logvar_coef), 1e-5)

    model_grad = jax.jit(jax.grad(M.mopo_model_loss), static_argnums=3)
    grads, other = model_grad(model.net, x, y, args), model_grad(model.net, x, y.at[0].add(1.0), args)
    assert all(size_of(g) > 0 for g in jax.tree.leaves(grads))
    for a, b in zip(jax.tree.leaves(grads[:2]), jax.tree.leaves(other[:2]), strict=True):
        assert np.abs(a[0] - b[0]).max() > 0
        np.testing.assert_array_equal(a[1:], b[1:])
    direction = jax.tree.map(lambda v: jnp.sign(v + 1e-9), model.net)
    at = lambda t: float(model_loss(jax.tree.map(lambda v, d: v + t * d, model.net, direction), x, y, args))
    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(*map(jax.tree.leaves, (grads, direction)), strict=True))
    close((at(1e-3) - at(-1e-3)) / 2e-3, slope, 1e-2)


@functools.cache
def sac_inputs():
    """args, an agent whose target differs, a batch with terminal rows and rows out of range, alpha, a key."""
    args, data, _, agent, _ = small_world()
    flags = (jnp.float32(jnp.arange(40) % n == 0) for n in (3, 4))
    batch = jax.tree.map(lambda x: x[:40], data)._replace(**dict(zip(("terminals", "outside"), flags, strict=True)))
    target = jax.tree.map(lambda v: v + 0.1, agent.critic)
    return args, agent._replace(target=target), batch, jnp.float32(0.3), jax.random.key(5)


def test_critic_loss_is_the_oracles():
    args, agent, batch, alpha, key = sac_inputs()
    loss, metrics = critic_loss(agent.critic, agent.target, agent.actor, alpha, batch, key, args)
    b = jax.tree.map(lambda x: np.asarray(x, float), batch)
    noise = jax.random.normal(key, b.actions.shape)
    next_actions, log_probs = common.gaussian_actor(agent.actor, b.next_observations, noise, args)
    value = common.twin_q(agent.target, b.next_observations, next_actions).min(0) - 0.3 * log_probs
    assert (value[::4] > 0).any()  # rows that end outside, where the lesser is 0
    value[::4] = np.minimum(value[::4], 0.0)
    y = b.rewards + args.gamma * (1 - b.terminals) * value
    q = common.twin_q(agent.critic, b.observations, b.actions)
    close(loss, ((q - y) ** 2).mean(1).sum(), 1e-4)
    close(metrics["train/target"], y.mean(), 1e-4)


def test_of_many_critics_the_least_counts_in_target_and_actor():
    """Four critics with one value each, whatever s and a: the least is not among the first two, which are the default.

    A loss that asked for two would find them among the four, and be silent.
    """
    args, (_, agent, batch, _, key) = tiny(num_critics=4), sac_inputs()
    batch = batch._replace(outside=0.0 * batch.outside)
    made = jax.eval_shape(M.make_train(args, TASK)[0], jax.random.split(key, 1)).agent.critic

    def says(values):
        params = jax.tree.map(lambda x: jnp.zeros(x.shape[1:]), made)["params"]
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
    noise = jax.random.normal(key, batch.actions.shape)
    actions, log_probs = common.gaussian_actor(agent.actor, batch.observations, noise, args)
    close(loss, np.mean(0.3 * log_probs - common.twin_q(agent.critic, batch.observations, actions).min(0)), 1e-4)
    close(metrics["train/entropy"], -log_probs.mean(), 1e-4)


def test_gradients_stop_where_the_equations_say():
    args, agent, batch, alpha, key = sac_inputs()
    loss = lambda *x: critic_loss(*x, batch, key, args)[0]
    grads = jax.grad(loss, (0, 1, 2, 3))(agent.critic, agent.target, agent.actor, alpha)
    assert size_of(grads[0]) > 0 and size_of(grads[1:]) == 0
    grads = jax.grad(lambda actor: actor_loss(actor, agent.critic, alpha, batch, key, args)[0])(agent.actor)
    assert all(size_of(leaf) > 0 for leaf in jax.tree.leaves(grads))
    grads = jax.grad(M.mopo_alpha_loss, (0, 1))(jnp.float32(-1.0), jnp.float32(0.5), -2.0)
    assert float(grads[0]) == 2.5 and float(grads[1]) == 0  # entropy above its target: alpha falls


def test_a_batch_has_its_share_of_real_rows():
    args, data, _, _, ring = small_world()
    data = data._replace(rewards=jnp.arange(400) + 1e6)
    for share, wanted in ((0.0, 0), (0.05, 2), (0.5, 20), (0.97, 38)):
        args = dataclasses.replace(args, real_ratio=share)
        rewards = np.asarray(M.mixed_batch(ring, data, jax.random.key(0), args).rewards)
        assert len(rewards) == 40 and (rewards >= 1e6).sum() == wanted
        assert len(np.unique(rewards[rewards >= 1e6])) > 0.8 * wanted - 1  # from everywhere in the data


def test_update_is_in_the_order_of_the_header():
    """Critics, then the actor with the new critics, then alpha with the entropy before the actor's step."""
    args, data, _, agent, ring = small_world()
    key = jax.random.key(3)
    after, metrics = update(agent, ring, data, key, args)
    key_batch, key_critic, key_actor = jax.random.split(key, 3)
    batch = M.mixed_batch(ring, data, key_batch, args)
    alpha, (actor_adam, critic_adam, _) = jnp.float32(1.0), M.optimisers(args)

    @jax.jit
    def wanted(agent):
        loss = lambda p: M.mopo_critic_loss(p, agent.target, agent.actor, alpha, batch, key_critic, args)[0]
        step, _ = critic_adam.update(jax.grad(loss)(agent.critic), agent.critic_opt)
        critic = jax.tree.map(jnp.add, agent.critic, step)
        loss = lambda p: M.mopo_actor_loss(p, critic, alpha, batch, key_actor, args)[0]
        step, opt = actor_adam.update(jax.grad(loss)(agent.actor), agent.actor_opt)
        return critic, jax.tree.map(jnp.add, agent.actor, step), opt

    leaves_close((after.critic, after.actor, after.actor_opt), wanted(agent), atol=1e-7)
    wanted = jax.tree.map(lambda t, q: 0.995 * t + 0.005 * q, agent.target, after.critic)
    leaves_close(after.target, wanted, atol=1e-6)
    assert float(metrics["train/entropy"]) > -2.0 and float(after.log_alpha) < 0.0


def test_alpha_aims_at_minus_the_number_of_actions_and_is_clipped_where_it_is_used():
    """An entropy near -2.5 with A = 2 is below the default target -2 and above orig's -3."""
    args, data, _, agent, ring = small_world()
    layers = jax.tree.map(jnp.zeros_like, agent.actor["params"]["MLP_0"])
    layers["Dense_2"]["bias"] = jnp.array([0.0, 0.0, -2.8, -2.8])
    agent = agent._replace(actor={"params": {"MLP_0": layers}}, log_alpha=jnp.float32(3.0))
    for target, grows in ((None, True), (-3.0, False)):
        own = dataclasses.replace(args, target_entropy=target)
        after, metrics = update(agent, ring, data, jax.random.key(3), own)
        assert -3.0 < float(metrics["train/entropy"]) < -2.0 and float(metrics["train/alpha"]) == 1.0
        assert (after.log_alpha > agent.log_alpha) == grows and after.log_alpha != agent.log_alpha


@pytest.mark.parametrize("cosine, last", [(True, 0.0), (False, 1e-4)])
def test_the_actors_rate_falls_to_zero_by_a_cosine(cosine, last):
    """Under a constant gradient of 1 Adam's step is its rate."""
    adam = M.optimisers(tiny(actor_cosine=cosine, num_updates=80, actor_lr=1e-4))[0]
    rates, unit = (
        jax.lax.scan(lambda opt, _, a=a: a.update(jnp.ones(()), opt)[::-1], a.init(jnp.zeros(())), length=81)[1]
        for a in (adam, M.optax.adam(1.0))
    )
    wanted = {0: 1e-4, 40: 0.5 * (1e-4 + last), 80: last}
    np.testing.assert_allclose([rates[n] / unit[n] for n in wanted], list(wanted.values()), rtol=1e-4, atol=1e-12)


# --- data, scale, bootstrap ---


def test_scale_comes_from_the_training_rows_only():
    args, data = tiny(), random_data()
    train, holdout, _ = split_data(jax.random.key(0), data, args)
    assert len(holdout) == 80 and sorted([*np.asarray(train), *np.asarray(holdout)]) == list(range(400))
    few = jax.eval_shape(lambda key: M.split_data(key, data, tiny(holdout_rows=30, holdout_run=10)), jax.random.key(0))[
        1
    ]
    assert few.shape == (30,)
    spoilt = data._replace(observations=data.observations.at[holdout].set(1e3))
    scale, rows = split_data(jax.random.key(0), spoilt, args)[2], np.asarray(train)
    x, y = np.concatenate([data.observations, data.actions], 1)[rows], np.asarray(M.model_targets(data))[rows]
    for found, wanted in zip(scale[:4], (x.mean(0), x.std(0), y.mean(0), y.std(0)), strict=True):
        close(found, wanted, 1e-5)
    assert not scale.angles.size
    raw = split_data(jax.random.key(0), data, tiny(standardise_targets=False))[2]
    assert not raw.target_mean.any() and (raw.target_std == 1).all()


def test_rows_are_held_out_in_runs():
    """Whole runs of 10, no row of them trained on; single rows where a preset asks for them."""
    train, holdout, _ = split_data(jax.random.key(1), random_data(), tiny(holdout_run=10))
    runs = np.asarray(holdout).reshape(-1, 10)
    assert len(runs) == 8 and (np.diff(runs, axis=1) == 1).all() and (runs[:, 0] % 10 == 0).all()
    assert not np.isin(train, holdout).any() and len(train) == 320
    single = np.sort(split_data(jax.random.key(1), random_data(), tiny(holdout_run=1))[1])
    assert (np.diff(single) > 1).sum() > 40 and M.PUBLISHED["hopper-medium-v2"]["holdout_run"] == 1


@pytest.mark.parametrize("constant", [0.0, 0.7, 9.81, 123.456, 1000.3])
def test_a_constant_column_is_not_divided_by_its_rounding(constant):
    data = random_data()
    observations, actions = data.observations.at[:, 1].set(constant), data.actions.at[:, 0].set(0.0)
    std = split_data(jax.random.key(0), data._replace(observations=observations, actions=actions), tiny())[2].input_std
    assert std[1] == std[3] == 1.0 and std[0] != 1.0


def test_members_learn_from_bootstraps_of_their_own():
    """Rows drawn with replacement, none held out, as many Adam steps an epoch as whole batches fit."""
    args, data = tiny(model_batch_size=32), random_data()
    fit = fit_init(jax.random.key(0), data, args)
    assert fit.bootstrap.shape == (3, 320) and not np.isin(fit.bootstrap, fit.holdout).any()
    shares = [len(np.unique(row)) / 320 for row in np.asarray(fit.bootstrap)]
    assert min(shares) > 0.55 and max(shares) < 0.72  # 1 - 1/e of the rows
    assert not np.array_equal(fit.bootstrap[0], fit.bootstrap[1])
    assert M.epoch_sizes(320, args) == (32, 10, 10)
    same = fit._replace(bootstrap=jnp.zeros_like(fit.bootstrap))  # one row: what is drawn does not count
    after = fit_chunk(same, data, args)
    rows = jax.tree.map(lambda x: x[fit.holdout], data)
    mean, _ = M.ensemble_apply(after.net, M.model_inputs(fit.scale, rows.observations, rows.actions), "highest")
    raw = np.asarray(mean) * np.asarray(fit.scale.target_std) + np.asarray(fit.scale.target_mean)
    assert int(after.step) == 10 and np.abs(np.asarray(fit.scale.target_std) - 1).max() > 0.1
    close(after.holdout_mse, ((raw - np.asarray(M.model_targets(rows))) ** 2).mean((1, 2)), 1e-4)

    def step(carry, _):
        rows = jax.tree.map(lambda x: jnp.broadcast_to(x[0], (3, 32, *x.shape[1:])), data)
        x = M.model_inputs(fit.scale, rows.observations, rows.actions)
        y = M.scaled_targets(fit.scale, rows)
        grads = jax.grad(M.mopo_model_loss)(carry[0], x, y, args)
        change, opt = M.optax.adam(args.model_lr).update(grads, carry[1])
        return (jax.tree.map(jnp.add, carry[0], change), opt), None

    leaves_close(after.net, jax.lax.scan(step, (fit.net, fit.opt), length=10)[0][0], atol=1e-5)


# --- ring and rollouts ---


def test_no_empty_row_inside_the_ring_after_two_refreshes():
    args, data, model, agent, ring = small_world()
    assert len(ring.rows.rewards) == 64 * 3 * 2 and int(ring.size) == 64 * 3
    ring, metrics = refresh(agent, ring, model, data, jax.random.key(1), args, TASK)
    assert int(ring.size) == 384 and float(metrics["model/rollout_length"]) == 3.0
    assert np.all(np.abs(ring.rows.observations).sum(1) > 0)
    sample = M.ring_sample(ring, jax.random.key(9), 5000)
    assert len(np.unique(sample.rewards)) > 370  # from everywhere in it


def roll(task=TASK, starts=None, model=None, **changes):
    """50 rollouts with lambda 2 -> rows, keep, info."""
    args, data, own, agent, _ = small_world()
    starts, args = data.observations[:50] if starts is None else starts, dataclasses.replace(args, lam=2.0, **changes)
    return model_rollout(model or own, agent, starts, jax.random.key(0), args, task)


def test_rollout_goes_on_from_where_it_was_and_pays_for_the_penalty():
    rows, keep, info = roll()
    assert keep.all() and rows.rewards.shape == (3, 50) and np.all(np.abs(rows.actions) <= 1.0)
    np.testing.assert_array_equal(rows.observations[1:], rows.next_observations[:-1])
    np.testing.assert_allclose(rows.rewards, info["reward"] - 2.0 * info["u"], rtol=1e-6, atol=1e-6)
    assert np.all(info["u"] > 0)


def test_a_task_ends_a_rollout_and_pays_a_known_reward():
    reward = lambda obs, actions, next_obs: next_obs[..., 1] - actions[..., 0]
    task = AbstractTask(lambda next_obs: jnp.ones(next_obs.shape[:-1], bool), reward)
    rows, keep, info = roll(task, reward="known")
    assert keep[0].all() and not keep[1:].any()
    assert rows.terminals[0].min() == 1.0 and info["terminal"].sum() == 50
    wanted = rows.next_observations[..., 1] - rows.actions[..., 0]
    np.testing.assert_allclose(info["reward"], wanted, rtol=1e-6)
    np.testing.assert_allclose(rows.rewards, wanted - 2.0 * info["u"], rtol=1e-6, atol=1e-6)


def test_out_of_range_ends_a_rollout():
    args, data, model, agent, ring = small_world()
    tight = model._replace(low=jnp.full(3, -1e-3), high=jnp.full(3, 1e-3))
    rows, keep, info = roll(model=tight)
    assert keep[0].all() and not keep[1:].any() and info["outside"][0].all()
    assert not rows.terminals[0].any() and np.all(rows.outside[0] == 1)
    ring, metrics = refresh(agent, emptied(ring), tight, data, jax.random.key(0), args, TASK)
    assert int(ring.size) == 64 and float(metrics["model/rollout_length"]) == 1.0  # one step each
    made = M.model_of(None, None, None, data, tiny(range_margin=0.5))
    close(made.high_reward, np.quantile(data.rewards, 0.99), 1e-5)
    both = np.concatenate([data.observations, data.next_observations])
    np.testing.assert_allclose(made.high - made.low, 2 * (both.max(0) - both.min(0)), rtol=1e-5)


def test_broken_predictions_are_never_stored():
    bad = np.arange(50) % 5 == 0
    rows, keep, _ = roll(starts=jnp.where(bad[:, None], jnp.nan, random_data().observations[:50]))
    assert not keep[:, bad].any() and keep[:, ~bad].all()
    assert all(np.isfinite(np.asarray(x)[np.asarray(keep)]).all() for x in rows)


def test_rollouts_draw_from_the_elites():
    """Members that predict s' - s = 0, 10, 20 whatever comes in: with elites 2 and 0 nobody moves by 10."""
    model = small_world()[2]
    mean_part = jnp.arange(8) < 4  # of the last layer: D means, D raw log-variances
    last = jnp.where(mean_part, 10.0 * jnp.arange(3)[:, None, None], -30.0)
    zero = jax.tree.map(jnp.zeros_like, model.net)
    net = zero._replace(biases=(*zero.biases[:-1], last), max_logvar=jnp.full(4, 0.5), min_logvar=jnp.full(4, -20.0))
    far = jnp.full(3, 1e3)
    raw = model.scale._replace(target_mean=jnp.zeros(4), target_std=jnp.ones(4))
    model = model._replace(net=net, elites=jnp.array([2, 0]), low=-far, high=far, scale=raw)
    rows, keep, _ = roll(model=model, starts=jnp.zeros((50, 3)))
    change = np.asarray(rows.next_observations - rows.observations)[np.asarray(keep)]
    assert set(np.unique(change.round())) == {0.0, 20.0}


# --- what is said of Q ---


def test_q_is_measured_along_rollouts():
    """Against plain numpy: by networks that see scaled observations, which the ring holds; of rows that count alone."""
    args, data, model, agent, ring = small_world()
    model = model._replace(see=M.Sight(jnp.full(3, 0.5), jnp.full(3, 2.0), NO_ANGLES))
    ring, metrics = refresh(agent, emptied(ring), model, data, jax.random.key(0), args, TASK)
    seen = jax.tree.map(lambda x: np.asarray(x[:192], float).reshape(3, 64, *x.shape[1:]), ring.rows)
    q = common.twin_q(agent.critic, seen.observations, seen.actions).min(0)
    last = seen.next_observations[-1]
    actions, _ = common.gaussian_actor(agent.actor, last, np.zeros((64, 2)), args)
    wanted = [*q.mean(1), common.twin_q(agent.critic, last, actions).min(0).mean()]
    close(metrics["model/q_steps"], wanted, 1e-4)

    rows = seen._replace(terminals=jnp.zeros((3, 64)).at[-1, 1].set(1.0))
    keep = np.arange(192).reshape(3, 64) % 5 > 0
    found = value_report.q_by_step(lambda s: -s, lambda s, a: s[..., 0] + 3 * a[..., 1], rows, jnp.asarray(keep))
    q = seen.observations[..., 0] + 3 * seen.actions[..., 1]
    after = last[keep[-1] & (np.arange(64) != 1)]
    wanted = [q[t, keep[t]].mean() for t in range(3)] + [(after[:, 0] - 3 * after[:, 1]).mean()]
    close(found["model/q_steps"], wanted, 1e-4)


def test_values_at_starts():
    """Episodes of five steps that the model ends, or cuts off, or neither; against a loop."""
    rng, lived = np.random.default_rng(0), np.array([5, 5, 2, 5, 5, 3])  # steps in the world
    kept, ended = np.array([5, 2, 5, 3, 0, 1]), np.array([0, 1, 0, 0, 0, 1])  # steps of the model; whether it ended
    t, (world, model) = np.arange(5)[:, None], rng.normal(size=(2, 5, 6))
    keep, terminals = t < kept, ((t == kept - 1) & (ended > 0)).astype(np.float32)
    paid = lambda rewards, terminals: M.Rows(None, None, rewards, None, terminals, None)
    found = value_report.start_values(np.arange(6.0), 0.9, (world, t < lived), (paid(model, terminals), keep))
    wanted = {"value/q_start": 2.5, "value/world": 0.0, "value/model": 0.0, "value/steps": 0.0}
    for e in range(6):
        known = 5 if ended[e] else kept[e]
        wanted["value/steps"] += known / 6
        wanted["value/world"] += sum(0.9**i * world[i, e] for i in range(min(known, lived[e]))) / 6
        wanted["value/model"] += sum(0.9**i * model[i, e] for i in range(kept[e])) / 6
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        close(found[name], value, 1e-5)


def test_a_rollout_that_leaves_the_data_promises_nothing(capsys):
    """Where each step costs 1 and the model is cut off after 20 of 200, it does not say that the rest is free."""
    t, alive = np.arange(200)[:, None], np.ones((200, 3), bool)
    model = lambda terminals: (M.Rows(None, None, -1.0 * alive, None, terminals, None), t < [[20] * 3])
    values = lambda terminals: value_report.start_values(np.zeros(3), 0.99, (-1.0 * alive, alive), model(terminals))
    cut, ends = values(0 * alive), values(t == [[19] * 3])
    rewards = np.array([-2.0, 0.0])
    assert not value_report.warn_of_promises(cut, rewards, 0.99) and not capsys.readouterr().out
    assert value_report.warn_of_promises(ends, rewards, 0.99)  # an end that the world does not know is a promise
    assert "the model promises -18.2, discounted; the world pays -86.6" in capsys.readouterr().out


def test_actor_and_critics_see_scaled_observations():
    """Of the ring, of the data and in rollouts: with the model's units taken off, all is as without the flag."""
    args, data, model, agent, ring = small_world()
    own = dataclasses.replace(args, standardise_observations=True)
    eyes = M.sight(data, own)
    close(eyes[0], np.mean(data.observations, 0), 1e-4), close(eyes[1], np.std(data.observations, 0), 1e-4)
    assert not M.sight(data, args)[0].any()
    other, _ = refresh(agent, ring, model._replace(see=eyes), data, jax.random.key(1), own, TASK)
    plain, _ = refresh(agent, ring, model, data, jax.random.key(1), args, TASK)
    new = np.flatnonzero(np.any(np.asarray(other.rows.observations != plain.rows.observations), 1))
    starts = np.asarray(other.rows.observations)[new[:64]] * eyes[1] + eyes[0]
    near = np.abs(starts[:, None] - np.asarray(data.observations)).sum(-1).min(1)
    assert len(new) >= 64 and near.max() < 1e-4  # the first steps of rollouts begin at rows of the data, scaled once


def test_angles_that_go_round():
    """Columns 2 and 0 as sine and cosine: a whole turn more changes nothing that a network says, nor what it drew."""
    args, data = tiny(angles="2,0", standardise_observations=True), random_data()
    obs, turn = np.asarray(data.observations, float), np.array([2 * np.pi, 0, -4 * np.pi])
    seen = np.c_[np.sin(obs[:, 0]), obs[:, 1], np.sin(obs[:, 2]), np.cos(obs[:, 2]), np.cos(obs[:, 0])]
    close(turned(data.observations, jnp.array([2, 0])), seen, 1e-6)
    assert turned(data.observations, NO_ANGLES).shape == (400, 3)
    eyes = M.sight(data, args)
    close(eyes(data.observations), (seen - seen.mean(0)) / seen.std(0), 1e-4)
    close(M.sight(data, tiny(angles="2,0"))[1], np.ones(5))

    data = data._replace(observations=data.observations + np.where(np.arange(400) % 2, 1, 0)[:, None] * turn)
    data = data._replace(next_observations=data.observations + 0.1)  # half of the rows have gone round
    fit, model = fitted(data, args)
    assert fit.net.weights[0].shape == (3, 5 + 2, 16) and model.scale.target_mean.shape == (4,)
    agent = of_seed(M.make_train(args, TASK)[0](jax.random.split(jax.random.key(1), 1))).agent
    starts = jnp.asarray(obs[:50], jnp.float32)
    roll = lambda s: model_rollout(model, agent, s, jax.random.key(0), args, TASK)
    (rows, keep, info), (round_rows, round_keep, round_info) = roll(starts), roll(starts + turn)
    both = np.asarray(keep & round_keep)  # where rollouts end is a matter of the raw columns
    assert both.sum() > 20
    for name, shift in (("actions", 0.0), ("rewards", 0.0), ("observations", turn)):
        change = np.asarray(getattr(round_rows, name), float) - np.asarray(getattr(rows, name), float)
        np.testing.assert_allclose(change[both], np.broadcast_to(shift, change[both].shape), atol=1e-4)
    close(info["u"][both], round_info["u"][both], 1e-4)
    raw = tiny()
    model = fitted(data, raw)[1]
    mean = [predict(model, s, jnp.zeros((50, 2)), raw)[0] for s in (starts, starts + turn)]
    assert np.abs(mean[0] - mean[1]).max() > 1e-2, "without the flag the turn is seen"


@pytest.mark.parametrize("angles", ["3", "1,1", "-1", "x", "1,"])
def test_angles_that_are_no_columns_are_refused(angles):
    with pytest.raises(envs.InputError, match=f"--angles {angles}: task, none, or different columns below 3, such"):
        runner.with_angles(tiny(angles=angles), TASK)


def test_which_tasks_have_angles():
    """The cheetah's pitch goes round: a robot put on its back has it in that column."""
    assert [envs.task(name).angles for name in ("ant-angle-60", "hopper", "point")] == [()] * 3
    assert envs.task("halfcheetah").angles == envs.task("cheetah").angles == (1,)
    task = envs.task("cheetah-jump")
    env = envs.make(task)
    state = env.from_observation(jnp.zeros(17).at[task.angles[0]].set(jnp.pi))
    back = env.step(state, jnp.zeros(6)).obs
    assert task.angles == (1,) and abs(float(back[1]) - np.pi) < 0.5


@pytest.mark.parametrize("standardise", [True, False])
def test_updates_see_the_data_as_they_see_the_models_rows(standardise, monkeypatch):
    args, data, model, *_ = small_world()
    args, seen = dataclasses.replace(args, standardise_observations=standardise, chunk=10), []
    model = model._replace(see=M.sight(data, args))

    def remember(agent, ring, data, key, args):
        jax.debug.callback(lambda *x: seen.append(x), data.observations, data.next_observations, data.rewards)
        return update(agent, ring, data, key, args)

    monkeypatch.setattr(M, "mopo_update", remember)
    init, chunk = M.make_train(args, TASK)
    one = lambda x: jax.tree.map(lambda leaf: leaf[None], x)
    jax.block_until_ready(chunk(init(jax.random.split(jax.random.key(0), 1)), one(model), data))
    scale = lambda x: (x - np.mean(data.observations, 0)) / np.std(data.observations, 0) if standardise else x
    for found, wanted in zip(seen[0], (data.observations, data.next_observations), strict=False):
        close(found, scale(np.asarray(wanted)), 1e-4)
    close(seen[0][2], data.rewards, 1e-6)


def folded(params, mean, std):
    """Networks on raw observations that say what these say on (observations - mean) / std."""

    def fold(mlp):
        first = mlp["Dense_0"]
        rest = (0, len(first["kernel"]) - len(mean))  # actions
        kernel = first["kernel"] / jnp.pad(std, rest, constant_values=1)[:, None]
        return {**mlp, "Dense_0": {"kernel": kernel, "bias": first["bias"] - jnp.pad(mean, rest) @ kernel}}

    return {"params": {name: fold(mlp) for name, mlp in params["params"].items()}}


def test_networks_that_see_scaled_observations_are_those_with_scaled_weights():
    """In the model, in the world and in evaluations: the first layer takes the scale, and nothing else changes."""
    args, data, model, agent, _ = small_world()
    eyes = M.Sight(jnp.array([0.5, -1.0, 2.0]), jnp.array([2.0, 0.5, 3.0]), NO_ANGLES)
    other = agent._replace(actor=folded(agent.actor, *eyes[:2]))
    plain = model._replace(see=M.Sight(jnp.zeros(3), jnp.ones(3), NO_ANGLES))
    pairs = (model._replace(see=eyes), agent), (plain, other)
    rolled = [model_rollout(*pair, data.observations[:50], jax.random.key(0), args, TASK)[0] for pair in pairs]
    leaves_close(*rolled, atol=1e-3)

    task, buffer = envs.task("point-angle-0"), types.SimpleNamespace(metadata={"episode_length": 10})
    eyes = M.Sight(jnp.array([0.5, -1.0, 2.0, 0.0]), jnp.array([2.0, 0.5, 3.0, 1.0]), NO_ANGLES)
    data = rows_of(np.zeros((9, 4)), np.zeros((9, 2)), np.zeros(9), np.ones((9, 4)))
    model = M.fitted_model(fit_init(jax.random.key(1), data, args), data, args)
    actor = M.policy_net(args, 2).init(jax.random.key(3), jnp.zeros(4))
    critic = M.critic_net(args).init(jax.random.key(4), jnp.zeros(4), jnp.zeros(2))
    evaluate, one = (
        M.make_evaluation(args, envs.make(task), task, buffer),
        lambda tree: jax.tree.map(lambda x: x[None], tree),
    )
    found = [
        evaluate(one(agent._replace(actor=actor, critic=critic)), one(model._replace(see=eyes)),
                 jax.random.split(jax.random.key(2), 1))[0]
        for actor, critic, eyes in (
            (actor, critic, eyes),
            (folded(actor, *eyes[:2]), folded(critic, *eyes[:2]), M.Sight(jnp.zeros(4), jnp.ones(4), NO_ANGLES)),
        )
    ]  # fmt: skip
    assert {"eval/return", "value/q_start", "value/world", "value/model", "model/world_u"} <= found[0].keys()
    for name, value in found[0].items():
        close(found[1][name], value, 1e-3)


def test_a_member_at_its_best_keeps_the_bounds_it_was_judged_with():
    """By its likelihood; by its error, as the codes, the newest bounds are everybody's."""
    args, data = tiny(), random_data()
    fit = fit_init(jax.random.key(0), data, args)
    moved = fit._replace(net=fit.net._replace(max_logvar=fit.net.max_logvar + 1))
    for score, gains, wanted in (("nll", False, 0.5), ("nll", True, 1.5), ("mse", False, 1.5)):
        flags = dataclasses.replace(args, fit_score=score)
        best = jnp.full(3, jnp.inf if gains else -1e3)
        after = M.end_epoch(moved._replace(best=best), data, flags)
        assert (after.best_net.max_logvar == wanted).all() and after.best_net.max_logvar.shape == (3, 1, 4)


@pytest.mark.parametrize("q, reward, alpha, entropy, told", [
    (99.0, 1.0, 0.0, 5.0, False), (103.0, 1.0, 0.0, 5.0, True), (103.0, 1.0, 0.1, 5.0, False),
    (5.0, -1.0, 0.0, -3.0, True), (0.5, -1.0, 0.0, -3.0, False),
])  # fmt: skip
def test_a_climbing_q_is_told(q, reward, alpha, entropy, told, capsys):
    metrics = {
        "value/q_start": np.array([0.0, q]),
        "train/alpha": np.full(2, alpha),
        "train/entropy": np.full(2, entropy),
    }
    assert value_report.warn_of_climbing(metrics, np.array([reward - 1, reward]), 0.99) == told
    assert ("warning: Q is" in capsys.readouterr().out) == told
    assert not value_report.warn_of_climbing(metrics, np.array([0.0, 1.0]), 1.0)
    no_world = {"model/q_steps": np.stack([metrics.pop("value/q_start"), np.full(2, 1e6)], 1)} | metrics
    assert value_report.warn_of_climbing(no_world, np.array([reward - 1, reward]), 0.99) == told
    assert ("at the data's states" in capsys.readouterr().out) == told


@pytest.mark.parametrize("model, world, told", [
    (162.0, -66.0, True), (40.0, -33.0, True), (233.0, 152.0, False), (32.0, 106.0, False),  # runs of docs/mopo.md
    (-13.0, -69.0, True), (-20.0, -24.0, False), (2.0, -6.0, False),  # the last is too little to tell
])  # fmt: skip
def test_a_model_that_promises_too_much_is_told(model, world, told, capsys):
    """By its worst seed, in any unit, once."""
    for unit in (1e-3, 1.0, 1e3):
        metrics = {"value/model": unit * np.array([0.0, model]), "value/world": unit * np.array([0.0, world])}
        metrics |= {"value/q_start": np.zeros(2), "train/alpha": np.zeros(2), "train/entropy": np.zeros(2)}
        rewards = unit * np.array([-2.0, 8.0])
        found = value_report.warn_of_values(metrics, rewards, 0.99, set())
        assert found == ({"promises"} if told else set())
        assert ("the model promises" in capsys.readouterr().out) == told
        assert not value_report.warn_of_values(metrics, rewards, 0.99, {"promises"}) and not capsys.readouterr().out
    assert not value_report.warn_of_promises({}, rewards, 0.99)  # no world to compare with


# --- calibration against the world ---


def test_calibration_measures_the_error():
    args, data, model, *_ = small_world()
    rows = jax.tree.map(lambda x: x[:60].reshape(20, 3, *x.shape[1:]), data)
    live = np.arange(60) % 4 > 0
    know = lambda *x: predict(model, *x, args)
    alive = jnp.asarray(live).reshape(20, 3)
    metrics, points = model_report.calibration(know, model.elites, rows, M.model_targets(rows), alive)
    mean, std, u = map(np.asarray, predict(model, data.observations[:60], data.actions[:60], args))
    elites = np.asarray(model.elites)
    square = (mean[elites] - np.asarray(M.model_targets(data))[:60])[:, live] ** 2
    close(metrics["model/world_rmse"], np.sqrt(square.mean()), 1e-5)
    close(metrics["model/world_sigma"], np.sqrt((std[elites][:, live] ** 2).mean()), 1e-5)
    error = np.sqrt(square.sum(-1).mean(0))
    close(metrics["model/world_error"], error.mean(), 1e-5)
    close(metrics["model/world_u"], u[live].mean(), 1e-5)
    close(metrics["model/world_bounded"], (error <= u[live]).mean(), 1e-6)
    close(metrics["model/world_correlation"], np.corrcoef(u[live], error)[0, 1], 1e-3)
    assert np.isnan(points[:, ~live]).all() and not np.isnan(points[:, live]).any()


def test_measures_of_rollouts():
    """Of the rows that count alone, against numpy."""
    rng, keep = np.random.default_rng(0), np.arange(60) % 4 > 0
    u, reward, u_real = rng.exponential(size=60), rng.normal(size=60), rng.exponential(size=9)
    terminal, outside = keep & (np.arange(60) % 9 == 0), keep & (np.arange(60) % 10 == 1)
    info = {"u": u, "reward": reward, "terminal": terminal, "outside": outside}
    found = model_report.rollouts(jax.tree.map(jnp.asarray, info), jnp.asarray(keep), 0.3, u_real, 0.5, 12)
    u, reward = u[keep], reward[keep]
    wanted = {
        "model/penalty_share": 0.3 * u.mean() / np.abs(reward).mean(), "model/reward": reward.mean(),
        "model/invented": (reward > 0.5).mean(), "model/rollout_length": 45 / 12,
        "model/terminal": terminal.sum() / 12, "model/outside": outside.sum() / 12,
    }  # fmt: skip
    for name, x in (("real", u_real), ("model", u)):
        half, most = np.quantile(x, [0.5, 0.95])
        wanted |= {f"model/u_{name}": x.mean(), f"model/u_{name}_p50": half, f"model/u_{name}_p95": most}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        close(found[name], value, 1e-5)


# --- probe: a linear world with known noise ---


@functools.cache
def linear_world(num_rows=20_000, noise=0.03):
    """s' = A s + B a + noise, r = s_0 + noise; a narrow buffer; the fitted ensemble of one seed, its hold-out rows."""
    rng = np.random.default_rng(1)
    obs, actions = 0.5 * rng.normal(size=(num_rows, 3)), rng.uniform(-0.3, 0.3, (num_rows, 1))
    a, b = rng.normal(size=(3, 3)) / 3, rng.normal(size=(1, 3))
    after = obs @ a + actions @ b + noise * rng.normal(size=obs.shape)
    data = rows_of(obs, actions, obs[:, 0] + noise * rng.normal(size=num_rows), after)
    args = M.Args(ensemble_size=3, num_elites=2, model_hidden_sizes=(64, 64), max_epochs=30, holdout_rows=4_000)
    fit, model = fitted(data, args)
    rows = jax.tree.map(lambda x: x[fit.holdout], data)
    return fit, model, rows, predict(model, rows.observations, rows.actions, args)


def test_linear_world_is_recovered_by_the_best_members_at_their_best():
    fit, model, rows, (mean, std, _) = linear_world()
    error = np.asarray(mean) - np.asarray(M.model_targets(rows))
    unit, sigma = np.asarray(fit.scale.target_std), np.asarray(std)
    nll = 0.5 * np.mean((error / sigma) ** 2 + 2 * np.log(sigma / unit), (1, 2))
    np.testing.assert_allclose(nll, fit.best, atol=2e-3)  # snapshots came back, with the bounds that they had
    mse = np.mean(error**2, (1, 2))
    np.testing.assert_array_equal(np.sort(model.elites), np.sort(np.argsort(fit.best)[:2]))
    floor = 0.03**2
    mse = mse[np.asarray(model.elites)]
    assert np.all(mse < 1.2 * floor) and np.all(mse > 0.8 * floor), mse / floor
    sigma = np.sqrt(np.mean(np.asarray(std) ** 2, (0, 1)))
    assert np.all(np.abs(sigma / 0.03 - 1) < 0.2), sigma


def test_disagreement_grows_away_from_the_data():
    """Not so max_aleatoric: far from the data a member's sigma is whatever the net extrapolates (docs/mopo.md)."""
    _, model, rows, (mean, std, _) = linear_world()
    rng = np.random.default_rng(0)
    obs, actions = (jnp.float32(rng.uniform(-high, high, (len(rows.rewards), n))) for high, n in ((20, 3), (1, 1)))
    far_mean, far_std, _ = predict(model, obs, actions, M.Args(ensemble_size=3))
    for kind in ("ensemble_std", "max_pairwise", "total_std"):
        near, far = (M.penalty(*x, model.elites, kind).mean() for x in ((mean, std), (far_mean, far_std)))
        assert far > 2 * near, (kind, float(far / near))


@pytest.mark.parametrize("unit, reward_unit", [(1e-6, 1.0), (1e6, 1.0), (1.0, 1e-6), (1.0, 1e6), (1e6, 1e-6)])
def test_the_fit_knows_no_units(unit, reward_unit):
    """Observations and rewards in other units: the same fit, and predictions, errors and the box in those units."""
    data, args = random_data(), tiny()
    plain = fit_chunk(fit_init(jax.random.key(0), data, args), data, args)
    other = data._replace(
        observations=unit * data.observations, next_observations=unit * data.next_observations,
        rewards=reward_unit * data.rewards,
    )  # fmt: skip
    fit = fit_chunk(fit_init(jax.random.key(0), other, args), other, args)
    np.testing.assert_allclose(fit.best, plain.best, rtol=5e-3)
    units = np.array([unit] * 3 + [reward_unit])
    found, wanted = (M.fitted_model(*x, args) for x in ((fit, other), (plain, data)))
    (mean, std, _), (mean_0, std_0, _) = (
        predict(model, rows.observations, rows.actions, args) for model, rows in ((found, other), (wanted, data))
    )
    spread = units * np.asarray(plain.scale.target_std)
    np.testing.assert_allclose(mean / spread, units * mean_0 / spread, atol=5e-3)
    np.testing.assert_allclose(std / spread, units * std_0 / spread, atol=5e-3)
    close(found.high, unit * wanted.high, 1e-5)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_columns_that_never_vary_do_not_count(unit):
    """A goal that stays and a number of rounding errors: u is that of the rest, and no rollout ends there."""
    args, plain = tiny(), random_data()
    ulp = np.float32(0.7) + np.spacing(np.float32(0.7)) * np.arange(len(plain.rewards)).clip(0, 1)
    still = lambda ulp: np.stack([np.full(len(ulp), 0.3), ulp], -1).astype(np.float32)
    wider = lambda x, ulp: jnp.concatenate([unit * x, unit * still(ulp)], -1)
    data = plain._replace(
        observations=wider(plain.observations, ulp), next_observations=wider(plain.next_observations, ulp[::-1]),
        rewards=unit * plain.rewards,
    )  # fmt: skip
    model = fitted(data, args)[1]
    mean, std, u = predict(model, data.observations, data.actions, args)
    assert (model.scale.target_std == 0).tolist() == [False] * 3 + [True] * 2 + [False]
    assert not mean[..., 3].any() and not std[..., 3:5].any()
    np.testing.assert_allclose(u, jnp.linalg.norm(std[..., jnp.array([0, 1, 2, 5])], axis=-1).max(0), rtol=1e-4)
    far = jnp.concatenate([unit * jnp.zeros(3), unit * jnp.array([5.0, -5.0])])
    assert not M.rollout_ends(model, TASK, far[None], jnp.zeros(1))[1].any()
    assert M.rollout_ends(model, TASK, far.at[0].set(1e4 * unit)[None], jnp.zeros(1))[1].all()


def test_targets_that_never_vary_do_not_count_in_the_fit():
    """Neither in the loss nor in a member's score: both are those of the other targets."""
    args, data, rng = tiny(), random_data(), np.random.default_rng(0)
    data = data._replace(rewards=jnp.full(len(data.rewards), 0.1))
    fit = fit_init(jax.random.key(0), data, args)
    varies = np.asarray(fit.scale.target_std) > 0
    assert varies.tolist() == [True, True, True, False]
    mean, raw, y = (jnp.asarray(rng.normal(size=(3, 8, 4)), jnp.float32) for _ in range(3))
    loss = lambda mean, raw: M.gaussian_nll(fit.net, mean, raw, y, args, varies)
    logvar = np.asarray(M.bound_logvar(fit.net, raw), float)
    nll = lambda error: (error**2 * np.exp(-logvar) + logvar)[..., :3].mean((1, 2))
    close(loss(mean, raw), nll(np.asarray(mean - y, float)).sum() + args.logvar_coef * 3 * 10.5, 1e-5)
    assert all(np.any(g[..., :3]) and not np.any(g[..., 3]) for g in jax.grad(loss, (0, 1))(mean, raw))
    bounds = jax.grad(lambda net: M.gaussian_nll(net, mean, raw, y, args, varies))(fit.net)[2:]
    assert all(np.all(g[:3]) and g[3] == 0 for g in bounds)  # else they drift apart without end

    rows = jax.tree.map(lambda x: x[fit.holdout], data)
    x = M.model_inputs(fit.scale, rows.observations, rows.actions)
    mean, raw = M.ensemble_apply(fit.net, x, "highest")
    logvar = np.asarray(M.bound_logvar(fit.net, raw), float)
    error = np.asarray(mean - M.scaled_targets(fit.scale, rows), float)
    close(M.end_epoch(fit, data, args).best, 0.5 * nll(error), 1e-5)
    by_error = dataclasses.replace(args, fit_score="mse")
    close(M.end_epoch(fit, data, by_error).best, (error[..., :3] ** 2).mean((1, 2)), 1e-5)


def test_the_warnings_look_at_targets_that_vary():
    """Ten columns that never vary do not hide that the others are unexplained."""
    shares = {"fit/unexplained": np.array([0.5, 0.4, 0.6] + 10 * [0.0]), "fit/u_p95": 1.0, "fit/u_p50": 1.0}
    problems = model_report.fit_problems(shares | {"fit/correlation": 0.9}, False, M.Args())
    assert [problem for problem, _ in problems] == ["u is nearly constant: it says nowhere that the model is worse"]
    data, args = random_data(), tiny()
    data = data._replace(rewards=jnp.full(len(data.rewards), 0.1))
    (fit, model), targets = fitted(data, args), M.model_targets(data)
    know, units = lambda *x: predict(model, *x, args), (M.target_moments(data)[1], data.observations.std(0))
    found, _ = model_report.check_fit(know, model.elites, data, targets, units, fit.holdout, args.holdout_run)
    assert (found["fit/unexplained"][:3] > 0).all() and found["fit/unexplained"][3] == 0


@functools.cache
def uneven_world(standardise, fit_score="nll"):
    """Speeds of variance 10^4 whose noise is 5 where s_0 < 0 and 50 elsewhere -> metrics on held-out rows, u, s_0."""
    rng, num_rows = np.random.default_rng(2), 6_000
    obs, actions = rng.normal(size=(num_rows, 3)), rng.uniform(-1, 1, (num_rows, 1))
    noise = np.where(obs[:, :1] < 0, 5.0, 50.0) * rng.normal(size=obs.shape)
    after = obs + 100 * np.roll(obs, 1, 1) + noise
    data = rows_of(obs, actions, obs[:, 1], after)
    args = tiny(model_hidden_sizes=(64, 64), max_epochs=100, standardise_targets=standardise, fit_score=fit_score)
    (fit, model), targets = fitted(data, args), M.model_targets(data)
    know, units = lambda *x: predict(model, *x, args), (targets.std(0), data.observations.std(0))
    metrics, arrays = model_report.check_fit(know, model.elites, data, targets, units, fit.holdout, args.holdout_run)
    return metrics, arrays["u"], obs[np.asarray(fit.holdout), 0]


def test_u_finds_where_large_targets_are_noisy():
    """Raw targets leave u at the bound of the log-variance, and a warning says so."""
    metrics, u, where = uneven_world(True)
    quiet, loud = np.median(u[where < -0.3]), np.median(u[where > 0.3])
    assert 4 < quiet / np.sqrt(3) < 12 and 40 < loud / np.sqrt(3) < 65, (quiet, loud)
    assert metrics["fit/correlation"] > 0.4 and not model_report.fit_problems(metrics, False, tiny())
    sigma, rmse = (np.asarray(metrics[f"fit/{name}"])[:3] for name in ("sigma", "rmse"))
    assert np.all(np.abs(np.log(sigma / rmse)) < 0.3)  # what is claimed is what is missed
    _, u, where = uneven_world(True, "mse")
    assert np.median(u[where < -0.3]) > 1.3 * quiet, np.median(
        u[where < -0.3]
    )  # D14: kept where sigma is not right yet
    metrics, *_ = uneven_world(False)
    ((problem, remedy),) = model_report.fit_problems(metrics, False, tiny(standardise_targets=False))
    assert "nearly constant" in problem and "--standardise-targets" in remedy


@pytest.mark.parametrize(
    "low, half, high, rank, capped, told",
    [
        (1, 2, 3, 0.5, False, []),
        (1, 2, 3, 0.5, True, ["cut off"]),
        (2, 2, 2.1, 0.1, False, ["nearly constant"]),
        (1, 2, 3, 0.1, True, ["cut off", "rank"]),
        (1, 2, 3, np.nan, False, ["rank"]),
    ],
)
def test_warnings_of_a_fit(low, half, high, rank, capped, told):
    found = {"fit/u_p05": low, "fit/u_p50": half, "fit/u_p95": high, "fit/correlation": rank}
    assert not model_report.fit_problems(found | {"fit/unexplained": [1e-3]}, False, tiny())  # no errors
    found["fit/unexplained"] = np.array([0.1, 0.2, 0.0])
    problems = [problem for problem, _ in model_report.fit_problems(found, capped, tiny())]
    assert len(problems) == len(told) and all(word in x for word, x in zip(told, problems, strict=True))


def test_a_fit_ends_between_its_least_and_most_steps():
    """10 steps an epoch: patience alone, a minimum that outlasts it, a cap in whole epochs."""
    fit = NO_FIT._replace(bootstrap=np.zeros((3, 320)))
    goes_on = lambda step, idle, **flags: bool(
        M.fitting(fit._replace(step=step, idle=idle), tiny(model_batch_size=32, max_epochs=10, **flags))
    )
    assert goes_on(50, 0) and not goes_on(50, 5) and goes_on(50, 5, min_model_steps=51) and not goes_on(100, 0)
    assert goes_on(30, 0, max_model_steps=35) and not goes_on(40, 0, max_model_steps=35)
    assert not goes_on(100, 0, min_model_steps=500)
    most = 2**31 - 1  # a cap beyond all counting is one at which counting ends
    assert M.max_steps(320, tiny(model_batch_size=32, max_epochs=most)) == most // 10 * 10
    endless = tiny(model_batch_size=32, max_epochs=most)
    assert jax.jit(lambda fit: M.fitting(fit, endless))(fit._replace(step=jnp.int32(100), idle=jnp.int32(0)))


def test_predictions_over_several_steps():
    """Against a loop in numpy, member by member; runs that an episode's end cuts do not count."""
    args, data, model, *_ = small_world()
    order = jnp.arange(400)
    chained = data._replace(observations=jnp.roll(data.next_observations, 1, 0))  # each row goes on from the last
    cut = chained._replace(observations=chained.observations.at[110].add(1.0))  # an episode begins here
    unit = np.asarray(chained.observations).std(0)

    @jax.jit
    def steps(model, holdout, data):
        know = lambda *x: M.predict(model, *x, args)
        return model_report.several_steps(know, model.elites, data, holdout, 10, unit)

    holdout = jnp.concatenate([order[100:150], order[200:250]])
    whole = [100, 110, 120, 130, 200, 210, 220, 230]  # what goes on for 20 steps within the held-out rows
    for rows, first in ((chained, whole), (cut, whole[1:])):
        states, square = np.stack([np.asarray(rows.observations)[first]] * 2), []
        for t in range(20):
            now = np.array(first) + t
            for i, member in enumerate(np.asarray(model.elites)):
                mean, *_ = predict(model, jnp.asarray(states[i]), rows.actions[now], args)
                states[i] += np.asarray(mean)[member, :, :-1]
            square.append(np.mean(((states - np.asarray(rows.next_observations)[now]) / unit) ** 2))
        close(steps(model, holdout, rows)["steps_error"], np.sqrt(square), 1e-4)
    assert np.isnan(steps(model, order[:10], chained)["steps_error"]).all()


# --- what keeps critics from climbing ---


def test_normalised_critics_are_the_oracles():
    """Dense layer, LayerNorm, ReLU, for each critic apart; published presets have plain critics."""
    args, rng = tiny(critic_norm=True, num_critics=3), np.random.default_rng(0)
    obs, actions = random_data().observations[:8], random_data().actions[:8]
    params = M.critic_net(args).init(jax.random.key(0), obs, actions)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    of = lambda kind, i: {k: np.asarray(v, float) for k, v in params["params"][f"{kind}_{i}"].items()}
    layers, q = 0, []
    for critic in range(3):
        x = np.concatenate([obs, actions], -1).astype(float)
        for hidden in range(2):
            dense, norm = of("Dense", layers), of("LayerNorm", 2 * critic + hidden)
            x = x @ dense["kernel"] + dense["bias"]
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
            x, layers = np.maximum(x * norm["scale"] + norm["bias"], 0), layers + 1
        dense, layers = of("Dense", layers), layers + 1
        q += [(x @ dense["kernel"] + dense["bias"])[:, 0]]
    close(M.critic_net(args).apply(params, obs, actions), np.stack(q), 1e-4)
    published = M.PUBLISHED.values()
    assert M.Args().critic_norm and not any(x["critic_norm"] or x["standardise_observations"] for x in published)


def test_normalised_critics_are_bounded_far_away():
    """Where LayerNorm divides the size away, Q does not grow with the observations."""
    args = tiny(critic_norm=True)
    obs, actions = random_data().observations[:8], random_data().actions[:8]
    for flags, grows in ((args, False), (tiny(), True)):
        net = M.critic_net(flags)
        params = net.init(jax.random.key(0), obs, actions)
        near, far = (float(np.abs(net.apply(params, k * obs, actions)).mean()) for k in (1e2, 1e6))
        assert (far > 100 * near) == grows


# --- seeds ---


def test_vmapped_seeds_are_mapped_seeds(monkeypatch):
    """On an accelerator all seeds go at once, also where the fit of one has ended; compared after 20 updates."""
    args = tiny(model_hidden_sizes=(16,), hidden_sizes=(16,))
    data, keys = random_data(), jax.random.split(jax.random.key(3), 2)

    def train():
        (init_fit, fit_some, model), (init, chunk) = M.make_fit(args), M.make_train(args, TASK)
        fit = init_fit(keys, data)
        fit = fit_some(fit._replace(idle=jnp.array([0, args.patience])), data)
        return fit, chunk(init(keys), model(fit, data), data)[0].agent

    fit, agent = mapped = train()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    leaves_close(train(), mapped, atol=1e-4)
    assert fit.step[0] > 0 == fit.step[1]
    assert not np.allclose(*jax.tree.leaves(agent.actor)[1])


# --- the whole script ---


def test_too_few_rows_to_hold_any_out(dataset, tmp_path):
    with pytest.raises(envs.InputError, match="none can be held out; raise --holdout-share"):
        M.main(tiny(dataset=dataset, out=str(tmp_path / "run"), holdout_share=1e-5))


def test_run_leaves_what_it_promises(dataset, tmp_path, monkeypatch):
    """An epoch is several calls here, before the first of which ends no member has a score."""
    monkeypatch.setattr(M, "CALL_STEPS", 2)
    folder = tmp_path / "run"
    M.main(tiny(dataset=dataset, out=str(folder), num_seeds=2, num_updates=40))
    assert all((folder / f"{name}.png").stat().st_size > 5_000 for name in ("dynamics", "penalty", "model"))
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[1:]]
    epochs = [r for r in records if "model/holdout_mse" in r]
    assert [(r["step"], r["seed"]) for r in epochs] == [(step, seed) for step in (1, 2, 3) for seed in (0, 1)]
    assert len(epochs[0]["model/holdout_mse"]) == 3
    wanted = {"model/u_real", "model/u_model_p95", "model/penalty_share", "model/world_rmse", "model/world_sigma"}
    assert all(wanted <= r.keys() for r in records if "eval/return" in r)


# --- what a user can do wrong, and presets ---


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(rollout_freq=15), "multiple of --rollout-freq"),
        (dict(num_elites=4), "--num-elites must be at most"),
        (dict(min_model_steps=50, max_model_steps=49), "--max-model-steps 49: --min-model-steps is 50; lower it as"),
        (dict(model_decays=(1.0,)), "--model-decays needs two"),
        (dict(real_ratio=1.0), "--real-ratio: a batch needs a model row"),
        (dict(rollout_batch=10_007), "--rollout-batch needs a divisor"),
        (dict(holdout_share=1.0), r"--holdout-share must be in \(0, 1\)"),
        (dict(holdout_rows=0), "--holdout-rows above 0"),
    ],
)
def test_flags_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(envs.InputError, match=message):
        M.main(tiny(**changes))


def test_a_task_that_observations_do_not_tell_is_refused_before_the_fit():
    with pytest.raises(envs.InputError, match="--reward known: the observations of ant-angle-60 do not tell"):
        M.check_task(tiny(reward="known"), envs.task("ant-angle-60"))
    with pytest.raises(envs.InputError, match="ends at a goal that its observations do not tell"):
        M.check_task(tiny(), envs.task("ant-maze-umaze"))


def test_the_budget_is_ours_and_the_published_horizon_and_lambda_stay(dataset, monkeypatch):
    """Where nothing is published --preset cpu has a lambda of its own."""
    parse = lambda *words: runner.parse(M.Args, ["--dataset", dataset, *words], M.preset)
    assert (parse().lam, parse("--preset", "cpu").lam) == (1.0, 0.3)
    monkeypatch.setitem(M.PUBLISHED, "point-angle-0-scripted", {"horizon": 1, "lam": 2.5, "num_updates": 3_000_000})
    args = parse("--preset", "cpu")
    assert (args.horizon, args.lam, args.num_updates, args.rollout_batch) == (1, 2.5, 20_000, 10_000)
