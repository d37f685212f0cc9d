"""cped.py against goldens, plain numpy and worlds with known answers."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cped as C
import envs
import envs.buffers
from tests.oracles import common
from tests.oracles.common import close, leaves_close, mlp, of_seed, size_of

TINY = dict(
    flow_hidden_sizes=(16, 16), hidden_sizes=(16, 16), batch_size=32, flow_updates=60, num_updates=60, chunk=20,
    eval_every=40, eval_episodes=2, disc_ratio=5, holdout_rows=50, flow_layers=2,
)  # fmt: skip
LAYERS = range(4)


def tiny(**changes):
    return C.Args(**{**TINY, **changes})


def golden(name):
    return common.golden(f"cped_{name}", np.float32)


def cped_data(rows, held):
    """In float32, the first `held` rows held out."""
    rows = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), rows)
    return C.CpedData(jax.tree.map(lambda x: x[held:], rows), jax.tree.map(lambda x: x[:held], rows), None)


def random_data(num_rows=300, num_obs=3, num_actions=2, seed=0):
    """Actions around tanh(s_0..A) with noise, rewards s_0, every seventh row terminal."""
    rng = np.random.default_rng(seed)
    obs, after = rng.normal(size=(2, num_rows, num_obs))
    actions = np.clip(np.tanh(obs[:, :num_actions]) + 0.2 * rng.normal(size=(num_rows, num_actions)), -1, 1)
    return cped_data(C.Transitions(obs, actions, obs[:, 0], after, np.arange(num_rows) % 7 == 0), 50)


def outputs_of(disc):
    return "one" if disc["params"]["Dense_2"]["bias"].shape[-1] == 1 else "many"


# Eager JAX compiles operation by operation, which costs more than everything these tests compute.
flow_nll = jax.jit(C.flow_nll, static_argnums=3)
cond_forward = jax.jit(C.cond_forward, static_argnums=3)
cond_inverse = jax.jit(C.cond_inverse, static_argnums=3)
nice_forward = jax.jit(C.nice_forward, static_argnums=3)
nice_inverse = jax.jit(C.nice_inverse, static_argnums=3)
cond_init = jax.jit(C.cond_init, static_argnums=(2, 3))
flow_sample = jax.jit(C.flow_sample, static_argnums=(2, 4))
cped_init = jax.jit(C.cped_init, static_argnums=2)
disc_apply = jax.jit(lambda disc, x: C.Discriminator(outputs_of(disc)).apply(disc, x))
wgan_loss = jax.jit(C.wgan_loss, static_argnums=4)
alpha_at = jax.jit(C.alpha_at, static_argnums=1)
disc_loss = jax.jit(C.cped_disc_loss, static_argnums=4)
flow_loss = jax.jit(C.cped_flow_loss, static_argnums=4)
critic_loss = jax.jit(C.cped_critic_loss, static_argnums=5)
actor_loss = jax.jit(C.cped_actor_loss, static_argnums=7)
flow_update = jax.jit(C.cped_flow_update, static_argnums=3)
update = jax.jit(C.cped_update, static_argnums=5)


@functools.cache
def small_world():
    """args, data, fresh networks whose targets and discriminator differ from what they start as, a batch."""
    args, data = tiny(), random_data()
    nets = cped_init(jax.random.key(0), data, args).nets
    moved = lambda tree, by: jax.tree.map(lambda x: x + by * jnp.cos(jnp.arange(x.size)).reshape(x.shape), tree)
    nets = nets._replace(target_critic=moved(nets.critic, 0.1), target_actor=moved(nets.actor, 0.1))
    nets = nets._replace(disc=moved(nets.disc, 0.1), flow=moved(nets.flow, 0.05))
    return args, data, nets, jax.tree.map(lambda x: x[:32], data.rows)


# --- goldens ---


def cond_flow(g):
    dense = lambda j: {
        "kernel": np.stack([g[f"L{i}_W{j}"] for i in LAYERS]), "bias": np.stack([g[f"L{i}_b{j}"] for i in LAYERS])
    }  # fmt: skip
    layers = {"params": {f"Dense_{j}": dense(j) for j in range(3)}}
    return {"layers": layers, "shift": g["mu"], "log_scale": g["log_scale"]}


@pytest.mark.parametrize("prior", ["logistic", "gaussian"])
def test_conditional_flow_golden(prior):
    g = golden("cond_affine_flow")
    args = C.Args(flow_hidden_sizes=(12, 12), prior=prior, log_scale_cap=float(g["cap"]))
    z, logdet = cond_forward(cond_flow(g), g["obs"], g["act"], args)
    close(z, g["z"], 1e-5)
    close(logdet, g["logdet"], 1e-5)
    close(flow_nll(cond_flow(g), g["obs"], g["act"], args), -g[f"logp_{prior}"], 1e-5)
    obs, actions = cond_inverse(cond_flow(g), g["obs"], g["z"], args)
    np.testing.assert_array_equal(obs, g["obs"])
    close(actions, g["act"], 1e-5)


@pytest.mark.parametrize("tag", ["even", "odd"])
def test_nice_golden(tag):
    g = {k.removeprefix(f"{tag}_"): v for k, v in golden("nice_joint").items() if k.startswith(tag)}
    dense = lambda i, j: {"kernel": g[f"L{i}_W{j}"], "bias": g[f"L{i}_b{j}"]}
    layers = [{"params": {f"Dense_{j}": dense(i, j) for j in range(3)}} for i in LAYERS]
    flow, num_obs = {"layers": layers, "log_scale": g["scale"]}, g["obs"].shape[1]
    args = C.Args(flow="nice", flow_hidden_sizes=tuple(len(g[f"L0_b{j}"]) for j in range(2)))
    z, logdet = nice_forward(flow, g["obs"], g["act"], args)
    close(z, g["z"], 1e-5)
    close(logdet, g["logdet"], 1e-5)
    for prior in ("logistic", "gaussian"):
        nll = flow_nll(flow, g["obs"], g["act"], dataclasses.replace(args, prior=prior))
        close(nll, -g[f"logp_{prior}"], 1e-5)
    close(flow_nll(flow, g["obs"], g["act"], args).mean(), g["nll_mean"], 1e-5)
    grad = jax.grad(lambda a: -flow_nll(flow, g["obs"], a, args).sum())(g["act"])
    close(grad, g["grad_logp_act"], 1e-5)
    x = jnp.concatenate(nice_inverse(flow, jnp.zeros(num_obs), g["prior_z"], args), -1)
    close(x, g["inverse_of_prior_z"], 1e-5)


def test_wgan_golden():
    g = golden("wgan_gp")
    params = {f"Dense_{i}": {"kernel": g[f"W{i}"], "bias": g[f"b{i}"]} for i in range(3)}
    disc = {"params": params | {f"centre_{len(g[f'center{i}'])}": g[f"center{i}"] for i in range(2)}}
    close(disc_apply(disc, g["real"]), g["disc_real"], 1e-4)
    close(disc_apply(disc, g["fake"]), g["disc_fake"], 1e-4)
    args = C.Args(gp_weight=float(g["gp_coef"]))
    loss, metrics = wgan_loss(disc, g["real"], g["fake"], g["alpha"], args)
    close(metrics["flow/gradient_penalty"], g["gp"], 1e-5)
    close(loss, g["d_loss"], 1e-5)
    adv = -disc_apply(disc, g["fake"]).mean()
    close(adv, g["g_adv"], 1e-4)
    close(adv + g["example_nll"], g["example_hybrid_lambda1"], 1e-5)


def test_scalar_discriminator_is_the_equation():
    """One output, eq. 4 as it stands, its gradient by finite differences; d equal outputs have 1/d of its weight."""
    args, rng = tiny(disc_outputs="one"), np.random.default_rng(0)
    real, fake, mix = rng.normal(size=(8, 5)), rng.normal(size=(8, 5)), rng.uniform(size=(8, 1))
    disc = jax.jit(C.Discriminator(args.disc_outputs).init)(jax.random.key(0), jnp.zeros(5))
    disc = jax.tree.map(lambda x: x + 0.2 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), disc)
    params = jax.tree.map(lambda x: np.asarray(x, float), disc["params"])

    def value(x):
        for i, width in enumerate((10, 20)):
            x = x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"]
            x = (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True, ddof=1) + 1e-6) + params[f"centre_{width}"]
            x = np.where(x > 0, x, 0.01 * x)
        return (x @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"])[:, 0]

    x, h = mix * real + (1 - mix) * fake, 1e-6
    slope = np.stack([(value(x + h * e) - value(x - h * e)) / (2 * h) for e in np.eye(5)], -1)
    wanted = value(fake).mean() - value(real).mean() + 0.5 * np.mean((np.linalg.norm(slope, axis=-1) - 1) ** 2)
    loss, metrics = wgan_loss(disc, *map(jnp.float32, (real, fake, mix)), args)
    close(loss, wanted, 1e-4)
    many = disc["params"] | {"Dense_2": jax.tree.map(lambda x: jnp.repeat(x, 5, -1) / 5, disc["params"]["Dense_2"])}
    args = dataclasses.replace(args, disc_outputs="many")
    _, as_many = wgan_loss({"params": many}, *map(jnp.float32, (real, fake, mix)), args)
    close(as_many["flow/gradient_penalty"], metrics["flow/gradient_penalty"], 1e-5)  # of the sum: the same D
    close(5 * as_many["flow/disc_gap"], metrics["flow/disc_gap"], 1e-4)  # of the mean


def test_critic_loss_golden(monkeypatch):
    """The networks are put aside: each is its own output."""
    g, seen = golden("losses"), []
    forward = lambda q, s, a: (seen.append(a), q)[1]
    monkeypatch.setattr(C, "act", lambda actor, s, args, size: actor)
    monkeypatch.setattr(C, "Critics", lambda sizes: types.SimpleNamespace(apply=forward))
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: g["raw_noise_scaled"])
    args = C.Args(target_noise=1.0, target_noise_clip=float(g["noise_clip"]), gamma=float(g["gamma"]))
    batch = C.Transitions(None, np.zeros((1, 1)), g["rewards"], None, g["terminals"])
    q, target_q = (jnp.stack([g[f"{name}1"], g[f"{name}2"]]) for name in ("q", "target_q"))
    loss, metrics = C.cped_critic_loss(q, target_q, g["target_policy_action"], batch, None, args)
    close(loss, g["q1_loss"] + g["q2_loss"], 1e-5)
    close(metrics["train/target"], g["td_target"].mean(), 1e-5)
    close(seen[0], g["smoothed_action_clipped"], 1e-6)
    assert np.abs(seen[0] - g["smoothed_action_ref_unclipped"]).max() > 0.01  # some leave the box


def test_lagrangian_golden():
    g = golden("losses")
    args, alpha = C.Args(q_norm="none"), g["alpha"]
    q, offset = np.minimum(g["pi_q1"], g["pi_q2"]), alpha * g["nll_data"].mean()  # a constant to the gradient
    close(C.lagrangian(q, g["nll_pi"], alpha, 0.0, args) - offset, g["actor_loss_ref"], 1e-5)
    close(C.lagrangian(0.0 * q, g["nll_pi"], alpha, 0.0, args) - offset, g["actor_loss_bc_phase"], 1e-5)
    hinge = dataclasses.replace(args, constraint="hinge")
    close(C.lagrangian(q, g["nll_pi"], alpha, g["nll_data"].mean(), hinge), g["alpha_hinge_loss"], 1e-5)


def test_alpha_schedule_golden():
    g, compared = golden("alpha_schedule"), 0
    mujoco, maze, large = (
        C.Args(**C.PUBLISHED[f"{name}-v2"]) for name in ("hopper-medium", "antmaze-umaze", "antmaze-large-play")
    )
    for t, alpha, alpha_maze in zip(g["t"], g["mujoco_T0_500k"], g["antmaze"], strict=True):
        if t >= 500_000 and t not in (600_000, 1_000_000):  # at these two the released formula is off by one step
            assert float(alpha_at(t - 500_000, mujoco)) == pytest.approx(alpha), t
            compared += 1
        for args in (maze, large):
            if t > args.flow_updates and t not in (500_000, 800_000):
                assert float(alpha_at(t - args.flow_updates, args)) == pytest.approx(alpha_maze), t
                compared += 1
    assert compared > 30
    short = dataclasses.replace(mujoco, num_updates=20_000)
    found = [float(alpha_at(t, short)) for t in range(0, 20_000, 2_000)]
    assert found == [1e3, 10, 7.5, 5, 2.5, *[1.5] * 5]


# --- the flow ---


@pytest.mark.parametrize("size", [1, 2, 5])
def test_flow_is_inverted_and_its_determinant_is_the_jacobians(size):
    args, data = tiny(), random_data(num_actions=min(size, 3), num_obs=6)
    actions = jax.random.uniform(jax.random.key(1), (20, size), minval=-1.0)
    flow = jax.tree.map(lambda x: 3.0 * x, cond_init(jax.random.key(0), actions, 6, args))
    obs = data.rows.observations[:20]
    z, logdet = cond_forward(flow, obs, actions, args)
    back = cond_inverse(flow, obs, z, args)[1]
    np.testing.assert_allclose(back, actions, atol=1e-5)
    jacobian = jax.jit(jax.vmap(jax.jacfwd(lambda a, s: C.cond_forward(flow, s, a, args)[0])))(actions, obs)
    close(logdet, np.linalg.slogdet(np.asarray(jacobian, float))[1], 1e-5)
    assert logdet.std() > 1e-3 and np.all(np.abs(jacobian).sum((0, 1)) > 0)  # every coordinate is moved


def test_nice_is_inverted_and_its_determinant_is_the_jacobians():
    args, data = tiny(flow="nice"), random_data()
    flow = jax.jit(C.nice_init, static_argnums=(1, 2))(jax.random.key(0), 5, args)
    flow = jax.tree.map(lambda x: 30.0 * x, flow) | {"log_scale": 0.5 * jnp.cos(jnp.arange(5.0))}
    obs, actions = data.rows.observations[:20], data.rows.actions[:20]
    z, logdet = nice_forward(flow, obs, actions, args)
    back = nice_inverse(flow, obs, z, args)
    np.testing.assert_allclose(jnp.concatenate(back, -1), jnp.concatenate([obs, actions], -1), atol=1e-5)
    whole = jax.jit(jax.jacfwd(lambda x: C.nice_forward(flow, x[:3], x[3:], args)[0]))
    jacobian = whole(jnp.concatenate([obs[0], actions[0]]))
    close(logdet, np.linalg.slogdet(np.asarray(jacobian, float))[1], 1e-5)
    assert np.abs(z - jnp.concatenate([obs, actions], -1)).max() > 0.1


def test_flow_starts_as_a_whitening_of_the_actions():
    args, data = tiny(), random_data()
    flow = cond_init(jax.random.key(0), data.rows.actions, 3, args)
    z, _ = cond_forward(flow, data.rows.observations, data.rows.actions, args)
    np.testing.assert_allclose(z.mean(0), 0, atol=0.05)
    np.testing.assert_allclose(z.std(0), 1, atol=0.05)
    constant = cond_init(jax.random.key(0), jnp.full((9, 2), 0.3), 3, tiny(action_noise=0.0))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(constant))


def test_log_scales_are_bounded():
    args, data, nets, _ = small_world()
    flow = nets.flow | {"layers": jax.tree.map(lambda x: 1e3 * x, nets.flow["layers"]), "log_scale": jnp.zeros(2)}
    _, logdet = cond_forward(flow, data.rows.observations, data.rows.actions, args)
    assert 2.0 < np.abs(logdet).max() <= 2 * 2.0 + 1e-4  # 2 layers, each moves one coordinate


@pytest.mark.parametrize("prior", ["logistic", "gaussian"])
def test_samples_have_the_density(prior):
    """E[1 / p] over samples within a box is the box's volume."""
    args, _, nets, _ = small_world()
    args = dataclasses.replace(args, prior=prior)
    obs = jnp.broadcast_to(jnp.array([0.3, 0.2, -0.5]), (200_000, 3))
    actions = flow_sample(nets.flow, obs, 2, jax.random.key(0), args)[:, 3:]
    inside = np.abs(np.asarray(actions) - np.median(actions, 0)).max(1) < 0.4
    weight = np.exp(np.asarray(flow_nll(nets.flow, obs, actions, args), float))[inside]
    assert weight.sum() / len(obs) == pytest.approx(0.8**2, rel=0.03)


# --- losses against numpy, and where their gradients go ---


def policy(params, obs):
    return np.tanh(mlp(params["params"], obs))


def test_critic_loss_is_the_equation():
    args, _, nets, batch = small_world()
    args, key = dataclasses.replace(args, target_noise=0.5, target_noise_clip=0.3), jax.random.key(3)
    loss, metrics = critic_loss(nets.critic, nets.target_critic, nets.target_actor, batch, key, args)
    b = jax.tree.map(lambda x: np.asarray(x, float), batch)
    noise = np.clip(0.5 * np.asarray(jax.random.normal(key, b.actions.shape), float), -0.3, 0.3)
    actions = np.clip(policy(nets.target_actor, b.next_observations) + noise, -1, 1)
    y = b.rewards + 0.99 * (1 - b.terminals) * common.twin_q(nets.target_critic, b.next_observations, actions).min(0)
    assert 0 < b.terminals.sum() < 32
    close(loss, ((common.twin_q(nets.critic, b.observations, b.actions) - y) ** 2).mean(1).sum(), 1e-5)
    close(metrics["train/target"], y.mean(), 1e-5)


@pytest.mark.parametrize(
    "q_norm, constraint", [("size", "schedule"), ("spread", "schedule"), ("none", "hinge"), ("none", "dual")]
)
def test_actor_loss_is_the_equation(q_norm, constraint):
    args, _, nets, batch = small_world()
    args = dataclasses.replace(args, q_norm=q_norm, constraint=constraint)
    actions = policy(nets.actor, batch.observations)
    nll = np.asarray(flow_nll(nets.flow, batch.observations, jnp.float32(actions), args), float)
    eps = float(np.median(nll))
    loss, metrics = actor_loss(nets.actor, nets.critic, nets.flow, 0.7, eps, 1.0, batch, args)
    q = common.twin_q(nets.critic, batch.observations, actions).min(0)
    cost = np.maximum(nll - eps, 0) if constraint == "hinge" else nll
    norm = {"size": np.abs(q).mean(), "spread": q.std(), "none": 1.0}[q_norm]
    close(loss, -q.mean() / norm + 0.7 * cost.mean(), 1e-4)
    close(metrics["train/nll_pi"], nll.mean(), 1e-5)


def test_flow_loss_is_the_equation():
    args, _, nets, batch = small_world()
    args, key = dataclasses.replace(args, nll_weight=2.0, adv_weight=3.0, action_noise=0.3), jax.random.key(4)
    loss, _ = flow_loss(nets.flow, nets.disc, batch, key, args)
    key_fake, _, key_noise = jax.random.split(key, 3)
    noisy = batch.actions + 0.3 * jax.random.normal(key_noise, batch.actions.shape)
    nll = flow_nll(nets.flow, batch.observations, noisy, args).mean()
    fake = flow_sample(nets.flow, batch.observations, 2, key_fake, args)
    close(loss, 2.0 * nll - 3.0 * disc_apply(nets.disc, fake).mean(), 1e-5)
    np.testing.assert_array_equal(fake[:, :3], batch.observations)
    for changes, parts in ((dict(nll_weight=0.0), {"flow/adversarial"}), (dict(adv_weight=0.0), {"flow/nll"})):
        loss = functools.partial(C.cped_flow_loss, args=tiny(**changes))
        assert set(jax.eval_shape(loss, nets.flow, nets.disc, batch, key)[1]) == parts


def test_rewards_of_any_unit_give_the_same_losses():
    """1e-6, 1 and 1e6 times the same rewards; raw where the released code's form is asked for."""
    args, _, nets, _ = small_world()
    rng = np.random.default_rng(0)
    rows = {k: rng.normal(size=(200, n)) for k, n in (("observations", 3), ("actions", 2), ("next_observations", 3))}
    rows |= {"rewards": rng.normal(size=200) + 2, "terminals": np.zeros(200)}
    losses = []
    for unit in (1e-6, 1.0, 1e6):
        data = C.cped_data(rows | {"rewards": unit * rows["rewards"]}, args)[0].rows
        assert np.mean(np.square(data.rewards)) == pytest.approx(1, rel=0.1)  # 50 of the 200 rows are held out
        parts = critic_loss(nets.critic, nets.target_critic, nets.target_actor, data, jax.random.key(0), args)[1]
        losses.append([float(x) for x in parts.values()])
        raw = C.cped_data(rows | {"rewards": unit * rows["rewards"]}, dataclasses.replace(args, scale_rewards=False))
        assert np.asarray(raw[0].rows.rewards).std() == pytest.approx(unit, rel=0.2)
    np.testing.assert_allclose(losses, losses[:1] * 3, rtol=1e-5)
    still = C.cped_data(rows | {"rewards": np.zeros(200)}, args)[0].rows
    assert not still.rewards.any()


def test_gradients_stop_where_the_equations_say():
    args, _, nets, batch = small_world()
    key = jax.random.key(5)
    grads = jax.grad(lambda *x: critic_loss(*x, batch, key, args)[0], (0, 1, 2))(
        nets.critic, nets.target_critic, nets.target_actor
    )
    assert size_of(grads[0]) > 0 and size_of(grads[1:]) == 0
    grads = jax.grad(lambda *x: disc_loss(*x, batch, key, args)[0], (0, 1))(nets.disc, nets.flow)
    assert size_of(grads[0]) > 0 and size_of(grads[1]) == 0

    q, nll = jnp.array([1.0, -3.0]), jnp.array([0.5, 2.0])
    grads = jax.grad(lambda q, nll: C.lagrangian(q, nll, 0.2, 0.0, C.Args()), (0, 1))(q, nll)
    np.testing.assert_allclose(grads[0], [-0.25, -0.25], rtol=1e-5)  # -1/2 over mean |q| = 2, itself a constant
    np.testing.assert_allclose(grads[1], [0.1, 0.1], rtol=1e-6)
    hinge = C.Args(constraint="hinge")
    grads = jax.grad(lambda nll: C.lagrangian(q, nll, 0.2, 1.0, hinge))(nll)
    np.testing.assert_allclose(grads, [0.0, 0.1], rtol=1e-6)  # nothing pulls where nll < eps


# --- updates ---


def test_update_is_in_the_order_of_the_header():
    """Both critic steps, then the actor with the new critics, then targets with the new actor and critics."""
    args, data, nets, _ = small_world()
    key, eps = jax.random.key(6), jnp.float32(0.0)
    after, _ = update(nets, data.rows, eps, 0, key, args)
    key_batch, key_noise, _ = jax.random.split(key, 3)
    critic, opt = nets.critic, nets.critic_opt
    batches = C.sample_batches(data.rows, key_batch, 2, args.batch_size)
    for i, key_step in enumerate(jax.random.split(key_noise, 2)):
        batch = jax.tree.map(lambda x, i=i: x[i], batches)
        loss = lambda p, b=batch, k=key_step: critic_loss(p, nets.target_critic, nets.target_actor, b, k, args)[0]
        change, opt = C.cped_optimisers(args)[3].update(jax.grad(loss)(critic), opt)
        critic = jax.tree.map(jnp.add, critic, change)
    leaves_close(after.critic, critic, atol=1e-6)
    loss = lambda p: actor_loss(p, critic, nets.flow, args.alphas[0], eps, 1.0, batch, args)[0]
    wanted = C.cped_step(C.cped_optimisers(args)[2], jax.grad(loss)(nets.actor), nets.actor_opt, nets.actor)
    leaves_close((after.actor, after.actor_opt), wanted, atol=2e-6)
    leaves_close(after.target_critic, C.polyak(nets.target_critic, critic, 0.005), atol=1e-6)
    leaves_close(after.target_actor, C.polyak(nets.target_actor, after.actor, 0.005), atol=1e-6)
    leaves_close((after.flow, after.disc), (nets.flow, nets.disc))  # frozen


def test_flow_update_steps_the_discriminator_first():
    args, data, nets, _ = small_world()
    key = jax.random.key(7)
    after, metrics = flow_update(nets, data.rows, key, args)
    key_batch, key_loss = jax.random.split(key)
    batches = C.sample_batches(data.rows, key_batch, args.disc_ratio, args.batch_size)
    disc, opt = nets.disc, nets.disc_opt
    for i, key_step in enumerate(jax.random.split(key_loss, args.disc_ratio)):
        batch = jax.tree.map(lambda x, i=i: x[i], batches)
        grads = jax.grad(lambda p, b=batch, k=key_step: disc_loss(p, nets.flow, b, k, args)[0])(disc)
        disc, opt = C.cped_step(C.cped_optimisers(args)[1], grads, opt, disc)
    leaves_close(after.disc, disc, atol=1e-6)
    grads = jax.grad(lambda p: flow_loss(p, after.disc, batch, key_step, args)[0])(nets.flow)  # D's last batch and key
    wanted = C.cped_step(C.cped_optimisers(args)[0], grads, nets.flow_opt, nets.flow)
    leaves_close((after.flow, after.flow_opt), wanted, atol=2e-6)
    counts = [int(x) for x in jax.tree.leaves((after.disc_opt, after.flow_opt)) if x.dtype == jnp.int32]
    assert sorted(counts) == [0, 0, 0, 0, 1, args.disc_ratio]  # of each the steps, and none that was skipped
    leaves_close((after.actor, after.critic), (nets.actor, nets.critic))
    assert {"flow/nll", "flow/adversarial", "flow/gradient_penalty", "flow/disc_gap"} == set(metrics)


def test_phases_of_the_released_code():
    """Critics rest until critic_from, the actor only clones until q_from."""
    args, data, nets, batch = small_world()
    args = dataclasses.replace(args, critic_from=0.5, q_from=0.75, num_updates=80)
    key, eps = jax.random.key(8), jnp.float32(0.0)
    first, _ = update(nets, data.rows, eps, 0, key, args)
    leaves_close((first.critic, first.critic_opt), (nets.critic, nets.critic_opt))  # nor do Adam's moments move
    clone = dataclasses.replace(args, bc_only=True)
    same, _ = update(nets, data.rows, eps, 0, key, clone)
    leaves_close(first.actor, same.actor, atol=args.actor_lr / 2)  # Adam's first step: the nll's weight cancels
    first, _ = update(first, data.rows, eps, 40, key, args)
    assert size_of(jax.tree.map(jnp.subtract, first.critic, nets.critic)) > 0
    grad = jax.grad(lambda p, q, a, args: actor_loss(p, nets.critic, nets.flow, a, eps, q, batch, args)[0])
    without_q, bc = grad(nets.actor, 0.0, 0.5, args), grad(nets.actor, 1.0, 1.0, clone)
    leaves_close(without_q, jax.tree.map(lambda g: 0.5 * g, bc), atol=1e-6)
    assert size_of(jax.tree.map(jnp.subtract, without_q, grad(nets.actor, 1.0, 0.5, args))) > 1e-3
    early, late = (update(nets, data.rows, eps, step, key, args)[1] for step in (59, 60))
    assert float(early["train/actor_loss"]) != float(late["train/actor_loss"])


def test_dual_ascent_moves_alpha_towards_the_constraint():
    args, data, nets, _ = small_world()
    args = dataclasses.replace(args, constraint="dual")
    for eps, direction in ((-100.0, 1), (100.0, -1)):
        after, metrics = update(nets, data.rows, jnp.float32(eps), 0, jax.random.key(0), args)
        assert np.sign(float(after.log_alpha - nets.log_alpha)) == direction
        assert float(metrics["train/alpha"]) == pytest.approx(args.alphas[0])


def test_a_gradient_that_is_not_finite_is_no_step():
    """Of each of the five, whose Adam stays as it is, however many there are."""
    args, _, nets, _ = small_world()
    params = nets.flow, nets.disc, nets.actor, nets.critic, nets.log_alpha
    opts = nets.flow_opt, nets.disc_opt, nets.actor_opt, nets.critic_opt, nets.alpha_opt
    for adam, opt, net in zip(C.cped_optimisers(args), opts, params, strict=True):
        step = jax.jit(functools.partial(C.cped_step, adam))
        good = jax.tree.map(jnp.ones_like, net)
        leaves, tree = jax.tree.flatten(good)
        bad = tree.unflatten([leaves[0] * jnp.nan, *leaves[1:]])
        after, opt_after = step(bad, opt, net)
        leaves_close(after, net)
        leaves_close(opt_after.inner_state, opt.inner_state)
        moved, _ = step(good, opt_after, after)
        leaves_close(moved, step(good, opt, net)[0])
        assert size_of(jax.tree.map(jnp.subtract, moved, net)) > 0
        for _ in range(100):
            after, opt = step(bad, opt, net)
        leaves_close(after, net)
        assert int(opt.total_notfinite) == int(opt.notfinite_count) == 100


def test_the_log_says_how_many_steps_were_skipped():
    """Means leave them out, so their number must stand beside; more than a hundred in a row stop the run, as nan."""
    nets = small_world()[2]
    skipped = lambda opt, n, row=0: opt._replace(total_notfinite=jnp.int32(n), notfinite_count=jnp.int32(row))
    nets = nets._replace(flow_opt=skipped(nets.flow_opt, 2), critic_opt=skipped(nets.critic_opt, 5, 100))
    losses = {"train/q": jnp.array([1.0, jnp.nan, 3.0, 5.0]), "train/nll_pi": jnp.array([1.0, 2.0, 3.0, jnp.inf])}
    means = C.chunk_means(losses, nets, "train")
    assert {name: float(x) for name, x in means.items()} == {"train/q": 3, "train/nll_pi": 2, "train/skipped": 7}
    assert np.isnan(C.chunk_means({"flow/nll": jnp.full(4, jnp.inf)}, nets, "flow")["flow/nll"])  # no mean of nothing
    stuck = nets._replace(actor_opt=skipped(nets.actor_opt, 101, 101))
    assert np.isnan(jax.jit(lambda nets: C.chunk_means(losses, nets, "train"))(stuck)["train/skipped"])


def test_nothing_need_be_held_out():
    """As published: all rows are learnt from, and the density is judged on them alone."""
    rows = random_data()
    buffer = {name: np.asarray(x) for name, x in rows.rows._asdict().items()}
    args = tiny(holdout_rows=0)
    data, _ = C.cped_data(buffer, args)
    assert len(data.rows.rewards) == len(rows.rows.rewards) and not len(data.holdout.rewards)
    found = C.density_metrics(cped_init(jax.random.key(0), data, args).nets.flow, data, args)
    assert found.keys() == {"flow/nll_data", "flow/round_trip"} and all(np.isfinite(x) for x in found.values())
    assert all(values["holdout_rows"] == 0 for values in C.PUBLISHED.values())


def test_noise_bounds_the_density_of_a_point_mass():
    """Constant actions: without noise the likelihood grows without end, with it the entropy of the noise is its end."""
    rows = random_data()
    rows = rows._replace(rows=rows.rows._replace(actions=jnp.ones_like(rows.rows.actions)))
    nll = {}
    for noise in (0.0, 0.05):
        args = tiny(action_noise=noise, adv_weight=0.0, flow_lr=1e-2, flow_hidden_sizes=(16,))
        nets = cped_init(jax.random.key(0), rows, args).nets
        step = lambda nets, key, args=args: C.cped_flow_update(nets, rows.rows, key, args)
        nets, metrics = jax.jit(lambda n, s=step: jax.lax.scan(s, n, jax.random.split(jax.random.key(1), 400)))(nets)
        nll[noise] = float(metrics["flow/nll"][-100:].mean())
    floor = 2 * (np.log(0.05) + 0.5 * np.log(2 * np.pi * np.e))
    assert floor - 0.05 < nll[0.05] < floor + 0.5
    assert nll[0.0] < floor - 4


# --- data ---


def test_data_is_standardised_split_and_shifted(dataset):
    buffer = envs.buffers.load(dataset, quiet=True)
    data, (mean, std, _) = C.cped_data(buffer, tiny(reward_shift=-1.0, scale_rewards=False))
    assert len(data.holdout.rewards) == 50 and len(data.rows.rewards) == len(buffer) - 50
    both = jax.tree.map(lambda *x: np.concatenate(x), data.rows, data.holdout)
    np.testing.assert_allclose(both.observations.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(both.observations.std(0), 1, atol=1e-2)
    raw, after = both.observations * std + mean, both.next_observations * std + mean
    order = lambda obs, actions: np.lexsort(np.round(np.concatenate([obs, actions], 1), 3).T)
    found = np.concatenate([raw, both.actions, after], 1)[order(raw, both.actions)]
    columns = [buffer[name] for name in ("observations", "actions", "next_observations")]
    np.testing.assert_allclose(found, np.concatenate(columns, 1)[order(*columns[:2])], atol=2e-3)
    np.testing.assert_allclose(np.sort(both.rewards), np.sort(buffer["rewards"] - 1), atol=1e-6)
    data, (mean, std, _) = C.cped_data(buffer, tiny(normalize=False))
    assert not mean.any() and (std == 1).all() and data.log_probs is None
    for constant in (0.0, 0.7, -1e30, 1e-30):  # a constant column is not divided by 0, nor its rounding error blown up
        flat = {**buffer.arrays, "observations": np.full((len(buffer), 4), constant, np.float32)}
        data, *_ = C.cped_data(dataclasses.replace(buffer, arrays=flat), tiny())
        assert np.abs(data.rows.observations).max() < 1e-5
    small = {**buffer.arrays, "observations": np.float32(1e-6) * buffer["observations"]}
    data, *_ = C.cped_data(dataclasses.replace(buffer, arrays=small), tiny())
    np.testing.assert_allclose(np.std(data.rows.observations, 0), 1, atol=0.2)  # whatever the unit


# --- probe: a bandit with two modes and narrow support ---

MODES = np.array([[-0.5, -0.5], [0.5, 0.5]])


def bandit_data(num_rows=4_000, seed=0):
    """70 % of the actions around a bad mode, 30 % around a good one; r tempts the critic to the corner (1, 1)."""
    rng = np.random.default_rng(seed)
    good = rng.uniform(size=num_rows) < 0.3
    actions = np.clip(MODES[good.astype(int)] + 0.1 * rng.normal(size=(num_rows, 2)), -1, 1)
    obs = rng.normal(size=(num_rows, 2))
    return cped_data(C.Transitions(obs, actions, good + 0.5 * actions.sum(1), obs, np.ones(num_rows)), 500)


BANDIT = dict(
    flow_hidden_sizes=(64, 64), hidden_sizes=(64, 64), flow_lr=1e-3, disc_lr=1e-3, actor_lr=1e-3, critic_lr=1e-3,
    flow_updates=15_000, num_updates=2_500, chunk=2_500, eval_every=2_500, gamma=0.0,
    alphas=(0.5, 0.2, 0.1),
)  # fmt: skip


@functools.cache
def bandit_flow():
    """The bandit's data, the state after the flow's phase, its metrics, the nll of the held-out rows."""
    data, args = bandit_data(), C.Args(**BANDIT)
    init, flow_chunk, _ = C.make_train(args)
    state = init(jax.random.split(jax.random.key(0), 1), data)
    for _ in range(args.flow_updates // args.chunk):
        state, metrics = flow_chunk(state, data)
    nll = flow_nll(of_seed(state.nets.flow), data.holdout.observations, data.holdout.actions, args)
    return data, state._replace(num_updates=jnp.zeros(1, jnp.int32)), metrics, np.asarray(nll)


def bandit_policy(**changes):
    """Actions [B, 2] of the policy learnt on the bandit's held-out states, and which are in the data's support."""
    data, state, _, data_nll = bandit_flow()
    args = C.Args(**{**BANDIT, **changes})
    state, _ = C.make_train(args)[2](jax.tree.map(jnp.copy, state), data)
    nets = of_seed(state.nets)
    actions = C.act(nets.actor, data.holdout.observations, args, 2)
    nll = flow_nll(nets.flow, data.holdout.observations, actions, args)
    return np.asarray(actions), np.asarray(nll) < np.quantile(data_nll, 0.99)


def near_modes(actions):
    return np.linalg.norm(actions[:, None] - MODES, axis=-1) < 0.35


@pytest.mark.learning
def test_flow_covers_both_modes(optimised):
    data, state, metrics, nll = bandit_flow()
    truth = 2 * (np.log(0.1) + 0.5 * np.log(2 * np.pi * np.e)) - 0.7 * np.log(0.7) - 0.3 * np.log(0.3)
    assert truth - 0.05 < nll.mean() < truth + 0.35
    obs = jnp.tile(data.holdout.observations, (8, 1))
    samples = flow_sample(of_seed(state.nets.flow), obs, 2, jax.random.key(0), C.Args(**BANDIT))
    near = near_modes(np.asarray(samples)[:, 2:])
    assert 0.6 < near[:, 0].mean() < 0.8 and 0.2 < near[:, 1].mean() < 0.4 and near.any(1).mean() > 0.93
    assert metrics["flow/gradient_penalty"][0] < 1.0


@pytest.mark.learning
@pytest.mark.parametrize("constraint", ["schedule", "hinge", "dual"])
def test_policy_takes_the_good_mode_and_stays_in_the_support(constraint, optimised):
    actions, inside = bandit_policy(constraint=constraint)
    good = near_modes(actions)[:, 1]
    assert good.mean() > 0.95, (good.mean(), actions.mean(0))
    assert inside.mean() > 0.95
    reward = good + 0.5 * actions.sum(1)
    assert reward.mean() > float(bandit_data().holdout.rewards.mean()) + 1.0  # 1.5 against 0.1


@pytest.mark.learning
def test_without_the_constraint_it_leaves_the_support(optimised):
    _, inside = bandit_policy(alphas=(0.0,), alpha_from=(0.0,))
    assert inside.mean() < 0.1


@pytest.mark.learning
def test_cloning_takes_a_mode_and_not_the_mean_between_them(optimised):
    """Most states; some stay on a ridge between the modes, where the density has no slope (docs/cped.md)."""
    actions, _ = bandit_policy(bc_only=True, actor_lr=3e-3)
    assert near_modes(actions).any(1).mean() > 0.6
    mean = np.asarray(bandit_data().rows.actions.mean(0))
    assert np.mean(np.linalg.norm(actions - mean, axis=1) > 0.2) > 0.95


# --- seeds ---


def test_vmapped_seeds_are_mapped_seeds(monkeypatch):
    """Two seeds one after the other, and at once as on an accelerator."""
    args = tiny(chunk=10, hidden_sizes=(16,), flow_hidden_sizes=(16,))
    data, keys = random_data(), jax.random.split(jax.random.key(3), 2)

    def train():
        init, _, chunk = C.make_train(args)
        return chunk(init(keys, data), data)[0].nets

    mapped = train()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    leaves_close(train(), mapped, atol=1e-3)
    assert size_of(jax.tree.map(lambda x: x[0] - x[1], mapped.actor)) > 0.1


# --- the whole script ---


def records_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[1:]]


@pytest.mark.parametrize(
    "changes",
    [
        dict(flow="nice", flow_in_rl=True, normalize=False, constraint="hinge"),
        dict(nll_weight=0.0, bc_only=True, prior="gaussian"),
    ],
)  # fmt: skip
def test_flags_run_on_data_with_a_known_density(changes, dataset, tmp_path):
    buffer = envs.buffers.load(dataset, quiet=True)
    arrays = {**buffer.arrays, "action_log_probs": -np.sum(np.asarray(buffer["actions"]) ** 2, 1)}
    path = envs.buffers.save(tmp_path / "known.npz", arrays, buffer.metadata)
    result = C.main(tiny(dataset=str(path), out=str(tmp_path / "run"), flow_updates=40, num_updates=40, **changes))
    assert np.isfinite(result["score"]) and (tmp_path / "run" / "training.png").exists()
    records = records_of(tmp_path / "run")
    fits = [r for r in records if "flow/nll_holdout" in r]
    assert ("flow/nll" in records[-1]) == changes.get("flow_in_rl", False)
    assert ("flow/kl" in fits[0]) == (changes.get("flow", "cond") == "cond")
    if "flow/kl" in fits[0]:
        data, *_ = C.cped_data(envs.buffers.load(path, quiet=True), tiny())
        np.testing.assert_allclose(data.log_probs, -np.sum(data.holdout.actions**2, 1), atol=1e-5)
        wanted = float(data.log_probs.mean()) + fits[-1]["flow/nll_holdout"]
        assert fits[-1]["flow/kl"] == pytest.approx(wanted, abs=1e-4)


def test_learns_on_the_point_robot_and_leaves_what_it_promises(dataset, tmp_path, optimised):
    """Scripted walks in ten directions, mean return near 0, best about 90: the policy must beat the mean by 50."""
    quick = {**C.QUICK, "flow_updates": 2_500, "num_updates": 2_000, "eval_every": 1_000}
    result = C.main(C.Args(dataset=dataset, out=str(tmp_path / "run"), **quick))
    assert result["last"] > result["data_mean"] + 50, result
    records = records_of(tmp_path / "run")
    fits = [r for r in records if "flow/nll_holdout" in r]
    assert [r["step"] for r in fits] == [1_000, 2_000, 2_500]
    assert all(r["flow/round_trip"] < 1e-5 for r in fits)
    assert "flow/kl" not in fits[0]  # this buffer does not know its density
    wanted = {"train/alpha", "train/nll_pi", "train/nll_data", "train/nll_data_p95", "train/eps"}
    assert all(wanted <= r.keys() for r in records if "eval/return" in r)


# --- what a user can do wrong ---


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(chunk=4), "--chunk must be a multiple of --disc-ratio and of --policy-delay"),
        (dict(flow_updates=50), "--chunk must divide --eval-every, --flow-updates and --num-updates"),
        (dict(alpha_from=(0.0, 0.1)), "--alphas and --alpha-from must be as many"),
        (dict(alpha_from=(0.0, 0.3, 0.1)), "the shares rising from 0 to less than 1"),
        (dict(alphas=(0.0,) * 3, constraint="dual"), "--alphas: the first must be positive with --constraint dual"),
        (dict(nll_weight=0.0, adv_weight=0.0), "--nll-weight, --adv-weight: one of them must be positive"),
        (dict(eps_quantile=1.0), "--eps-quantile must be above 0 and below 1"),
        (dict(flow_layers=1), "--flow-layers must be 2 or more"),
    ],
)
def test_flags_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(envs.InputError, match=message):
        C.main(tiny(**changes))


def test_a_dual_weight_needs_no_table():
    """One alpha to start from, and --alpha-from has no effect; a schedule wants as many of both."""
    C.check_args(tiny(constraint="dual", alphas=(0.03,)))
    assert "alpha_from" in C.idle_flags(tiny(constraint="dual"))
    with pytest.raises(envs.InputError, match="--alphas and --alpha-from must be as many"):
        C.check_args(tiny(constraint="schedule", alphas=(0.03,)))
    assert "tau" in C.idle_flags(tiny(bc_only=True)) and "tau" not in C.idle_flags(tiny())
