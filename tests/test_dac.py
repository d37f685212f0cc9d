"""dac.py against goldens, plain numpy and worlds with known answers."""

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dac as D
import dac_choice
import envs
import envs.buffers
import grid_figures
import runner
from runner import policies
from tests.oracles import common
from tests.oracles.common import close, mish, mlp, of_seed

TINY = dict(
    hidden_sizes=(16, 16), num_critics=3, num_q_samples=2, batch_size=16, num_action_samples=4, num_steps=3,
    chunk=20, eval_every=40, num_updates=80, eval_episodes=2, ema_start=10,
)  # fmt: skip


def tiny(**changes):
    return D.Args(**{**TINY, **changes})


@pytest.fixture
def golden():
    """name -> arrays of a golden file in float64, in which the test then runs."""
    with jax.enable_x64(True):
        yield lambda name: common.golden(f"dac_{name}")


def leaves_differ(a, b):
    return [bool((np.asarray(x) != np.asarray(y)).any()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)]


def random_rows(num_rows=60, num_obs=3, num_act=2, seed=0):
    rng = np.random.default_rng(seed)
    shape = lambda size: rng.normal(size=(num_rows, size))
    s, a, r, after = shape(num_obs), rng.uniform(-1, 1, (num_rows, num_act)), shape(1)[:, 0], shape(num_obs)
    return jax.tree.map(jnp.float32, D.Transitions(s, a, r, after, np.zeros(num_rows)))


@functools.cache
def one_state(args, num_obs=3, num_act=2):
    """A fresh state without a seed axis."""
    init, _ = D.make_train(args, num_obs, num_act)
    return of_seed(init(jax.random.split(jax.random.key(0), 1)))


# Eager JAX compiles operation by operation, which costs more than everything these tests compute.
update = jax.jit(D.dac_update, static_argnums=3)
actor_grad = jax.jit(jax.value_and_grad(D.dac_actor_loss, (0, 1), has_aux=True), static_argnums=5)
draw_noise = jax.jit(D.draw_noise, static_argnums=2)
sample_actions = jax.jit(D.sample_actions, static_argnums=4)
q_values = jax.jit(D.q_values, static_argnums=3)
q_gradient = jax.jit(D.q_gradient, static_argnums=4)
predict_noise = jax.jit(D.predict_noise, static_argnums=4)


# --- goldens: float64, tolerance 1e-10 unless stated ---


@pytest.mark.parametrize("name", ["vp", "cosine", "linear"])
def test_schedule_golden(name, golden):
    g = golden("schedules")
    for T in (3, 5, 10, 20, 50, 100):
        args, own = D.Args(schedule=name, num_steps=T), D.noise_schedule(name, T)
        close(own["beta"][1:], g[f"{name}_T{T}_beta"])
        close(own["alpha"], g[f"{name}_T{T}_alpha"])
        close(own["alpha_bar"], g[f"{name}_T{T}_alpha_bar"])
        unclipped = dataclasses.replace(args, clip_samples=False)
        t, abar = np.arange(1, T + 1), own["alpha_bar"][1:]  # the mean is c0 x0 + c1 x: either at 0 leaves the other
        only_x0 = D.reverse_step(0.0, -np.sqrt(abar / (1 - abar)), t, unclipped)
        only_x = D.reverse_step(1.0, 1 / np.sqrt(1 - abar), t, unclipped)
        wanted = [g[f"{name}_T{T}_{key}"] for key in ("post_c0", "post_c1", "sigma")]
        np.testing.assert_allclose([only_x0[0], only_x[0], only_x[1]], wanted, atol=1e-9)


def test_embedding_golden(golden):
    g = golden("embed")
    close(D.time_features(jnp.asarray(g["t"])), g["fourier16"])
    close(D.mish(jnp.asarray(g["mish_x"])), g["mish_y"])
    close(jax.vmap(jax.grad(D.mish))(jnp.asarray(g["mish_x"])), g["mish_dy"])
    single = D.mish(jnp.asarray(g["mish_x"], jnp.float32))
    assert single.dtype == jnp.float32
    close(single, g["mish_y"], 2e-6)


def test_noised_actions_golden(golden):
    g = golden("qsample")
    x, sigma = D.noised_actions(g["action"], g["eps"], g["t"], D.Args())
    close(x, g["x_t"])
    close(sigma, g["noise_level"])


@pytest.mark.parametrize("t", range(1, 6))
def test_reverse_step_golden(t, golden):
    g = golden("reverse_step")
    mean, std = D.reverse_step(g["x_t"], g["eps_pred"], t, D.Args())
    close(mean, g[f"t{t}_mean"])
    close(mean + (std * g["z"] if t > 1 else 0), g[f"t{t}_x_prev"])
    mean, _ = D.reverse_step(g["x_t"], g["eps_pred"], t, D.Args(clip_samples=False))
    close(mean, g[f"t{t}_mean_noclip"])
    assert D.reverse_step(g["x_t"], g["eps_pred"], t, D.Args(temperature=0.5))[1] == 0.5 * std


@pytest.mark.parametrize("temperature, clip", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_chain_golden(temperature, clip, golden, monkeypatch):
    """The golden's predictor is linear; ours is put aside."""
    g = golden("chain")
    linear = lambda actor, s, x, t, args: x @ g["W"] + s @ g["V"] + t * g["c"]
    monkeypatch.setattr(D, "predict_noise", linear)
    args = D.Args(temperature=float(temperature), clip_samples=bool(clip))
    actions = D.sample_actions(None, g["obs"], g["prior"], g["z"][:-1], args)
    close(actions, g[f"chain_temp{temperature}_clip{clip}"][-1])
    assert (np.abs(actions).max() <= 1) == bool(clip)


TARGETS = "lcb_rho0.0", "lcb_rho1.1", "lcb_rho1.5", "convex_rho1.1", "convex_rho0.0", "min", "rand_convex"


@pytest.mark.parametrize("kind", TARGETS)
def test_target_golden(kind, golden):
    g = golden("lcb_target")
    assert (g["mask"] == 0).any()
    name, _, rho = kind.partition("_rho")
    for max_q in (0, 1):
        args = D.Args(q_target=name, rho=float(rho or 1), max_q=bool(max_q), gamma=float(g["discount"]))
        y = D.dac_target(g["Q"], g["reward"], 1 - g["mask"], g["rand_alpha"], args)
        close(y, g[f"maxQ{max_q}_{kind}"])
        np.testing.assert_array_equal(y[g["mask"] == 0], g["reward"][g["mask"] == 0])  # terminal: y = r


def test_actor_loss_golden(golden, monkeypatch):
    """The networks are put aside: the actor is its own output, Q is linear with the golden's gradient."""
    g = golden("actor_target")
    monkeypatch.setattr(D, "predict_noise", lambda actor, s, x, t, args: actor)
    data_action = np.zeros_like(g["eps"])
    linear = lambda a: (g["q_grad_raw"] * a).sum(-1)[None]
    monkeypatch.setattr(D, "q_values", lambda _, s, a, args: g["q_data_actions"] if a is data_action else linear(a))
    batch = D.Transitions(np.zeros((12, 1)), data_action, None, None, None)
    noise = D.Noise(None, None, g["t"], g["eps"], None, None)
    for guidance in ("soft", "hard"):
        args = D.Args(guidance=guidance)
        loss = functools.partial(lambda args, pred: D.dac_actor_loss(pred, None, g["eta"], batch, noise, args), args)
        (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(g["pred_eps"]))
        close(value, g[f"actor_loss_{guidance}"], 2e-8)  # the golden has no 1e-6 beside the mean of |Q|
        close(metrics["train/bc_loss"], g["bc_loss"])
        close(metrics["train/guidance"], g[f"guidance_loss_{guidance}"], 1e-7)
        if guidance == "soft":
            close(grad, g["dloss_dpred_soft"], 1e-7)
            at_minimum = jax.grad(loss, has_aux=True)(jnp.asarray(g["minimiser_code_eq16"]))[0]
            assert np.abs(at_minimum).max() < 1e-8 < np.abs(grad).max()
    gradient, norm = D.q_gradient(None, None, data_action, jnp.asarray(g["eps"]), D.Args())
    close(gradient, g["q_grad_normalised"], 1e-7)
    close(norm, g["Q_norm"], 1e-7)


def test_dual_step_golden(golden):
    g = golden("actor_target")
    args = D.Args(eta_lr=float(g["eta_lr"]), bc_threshold=float(g["bc_threshold"]))
    close(D.dual_step(g["eta_in"], g["bc_loss_for_eta"], args), g["eta_out"])
    assert D.dual_step(0.3, 5.0, D.Args(eta_lr=0.0)) == 0.3
    assert D.dual_step(1e-4, 5.0, D.Args(eta_lr=0.0)) == 1e-4  # the clip is the dual step's


def test_select_golden(golden, monkeypatch):
    """The best of the samples, what the critics promise for it, and one sample where there is nothing to choose."""
    g = golden("select")
    monkeypatch.setattr(D, "sample_actions", lambda *_: jnp.asarray(g["candidates"]))
    monkeypatch.setattr(D, "q_values", lambda *_: jnp.asarray(g["q"]))
    choose = lambda **flags: D.choose_actions((None, None), np.zeros((4, 3)), jax.random.key(0), D.Args(**flags), 6)
    actions, found = choose()
    close(actions, np.clip(g["action"], -1, 1))
    q = g["q"]
    chosen = q[:, np.arange(4), q.mean(0).argmax(-1)]  # [H, states]
    gain = (chosen - q.mean(-1)) / np.abs(q).mean()
    wanted = [np.clip(g["candidates"], -1, 1).std(1).mean(), gain.mean(), gain.std(0).mean()]
    np.testing.assert_allclose([found[f"choice/{k}"] for k in ("action_std", "gain", "gain_std")], wanted, rtol=1e-6)
    for flags in (dict(num_action_samples=1), dict(guidance="none")):
        actions, found = choose(**flags)
        close(actions, np.clip(g["candidates"][:, 0], -1, 1))
        assert found == {}


def test_optimiser_golden(golden):
    g = golden("optim")
    adam = D.dac_adam(float(g["lr0"]), D.Args(num_updates=int(g["decay_steps"]), clip_norm=float(g["clip_norm"])))
    p, opt = jnp.asarray(g["p0"]), adam.init(jnp.asarray(g["p0"]))
    assert np.linalg.norm(g["grads"], axis=1).max() > 1
    for grad, wanted in zip(g["grads"], g["p_after"], strict=True):
        step, opt = adam.update(jnp.asarray(grad), opt)
        p = p + step
        close(p, wanted)


def test_learning_rate_golden(golden):
    """With a gradient of constant 1 and its moments, the step of Adam is the rate."""
    g = golden("lr")
    adam = D.dac_adam(3e-4, D.Args(num_updates=2_000_000))
    for count, rate in zip(g["count"], g["lr"], strict=True):
        moments = {"mu": np.array([1 - 0.9**count]), "nu": np.array([1 - 0.999**count]), "count": jnp.int32(count)}
        step, _ = adam.update(jnp.ones(1), optax.tree_utils.tree_set(adam.init(jnp.ones(1)), **moments))
        np.testing.assert_allclose(-step[0], rate, rtol=1e-6, atol=1e-15)
    constant = D.dac_adam(3e-4, D.Args(lr_cosine=False, num_updates=1))
    opt = constant.init(jnp.ones(1))
    for _ in range(3):
        step, opt = constant.update(jnp.ones(1), opt)
        np.testing.assert_allclose(step, -3e-4, rtol=1e-6)


def layers_of(g, prefix):
    """The golden's W0, b0, W1, .. as parameters of a MishMLP."""
    count = sum(re.fullmatch(prefix + r"W\d+", key) is not None for key in g)
    layer = lambda i: {"kernel": jnp.asarray(g[f"{prefix}W{i}"]), "bias": jnp.asarray(g[f"{prefix}b{i}"])}
    return {f"Dense_{i}": layer(i) for i in range(count)}


def nets_of(g, when):
    """Actor, target actor, critics and target critics before ("in") or after ("out") the golden's update."""
    actor = lambda name: {"params": {"time": layers_of(g, f"{name}_time_"), "trunk": layers_of(g, f"{name}_")}}
    critics = lambda name: {"params": {"members": layers_of(g, f"{name}_")}}
    names = f"actor_{when}", f"actor_tar_{when}", f"critic_{when}", f"critic_tar_{when}"
    return *map(actor, names[:2]), *map(critics, names[2:])


def test_full_update_golden(golden):
    """One whole update with the noise given: every number between, every parameter before and after."""
    g = golden("full_update")
    args = D.Args(
        num_critics=3, num_q_samples=4, hidden_sizes=(16, 16, 16), rho=float(g["rho"]), eta_lr=float(g["eta_lr"]),
        bc_threshold=float(g["bc_threshold"]), gamma=float(g["discount"]), tau=float(g["tau"]),
        critic_lr=float(g["lr"]), actor_lr=float(g["lr"]), num_updates=int(g["lr_decay_steps"]),
        clip_norm=float(g["clip_norm"]),
    )  # fmt: skip
    nets = nets_of(g, "in")
    opts = D.dac_adam(args.actor_lr, args).init(nets[0]), D.dac_adam(args.critic_lr, args).init(nets[2])
    state = D.DacState(jax.random.key(0), jnp.int32(1005), *nets, *opts, jnp.asarray(g["eta_in"]))
    batch = D.Transitions(*(jnp.asarray(g[k]) for k in ("obs", "action", "reward", "next_obs")), 1 - g["mask"])
    shape = lambda x: jnp.asarray(x).reshape(*x.shape[:-2], 8, 4, 3)
    noise = D.Noise(shape(g["prior"]), shape(g["z"][:-1]), jnp.asarray(g["t"]), jnp.asarray(g["eps"]), None, None)

    s = batch.next_observations[:, None]
    next_actions = sample_actions(state.target_actor, s, noise.x_T, noise.z, args)
    close(next_actions, shape(g["next_actions"]))
    next_q = q_values(state.target_critics, s, next_actions, args)
    close(next_q, g["next_q"])
    close(D.dac_target(next_q, batch.rewards, batch.terminals, None, args), g["target_q"])

    after, metrics = update(state, batch, noise, args)
    close(metrics["train/critic_loss"], g["critic_loss"])
    x, _ = D.noised_actions(batch.actions, noise.eps, noise.t, args)
    close(x, g["x_t"])
    gradient, norm = q_gradient(after.target_critics, batch.observations, batch.actions, x, args)
    close(gradient, g["q_grad_normalised"])
    close(norm, g["Q_norm"], 1e-5)  # the golden's is without its 1e-6
    close(predict_noise(state.actor, batch.observations, x, noise.t, args), g["pred_eps"])
    for name in ("bc_loss", "actor_loss"):
        close(metrics[f"train/{name}"], g[name])
    close(metrics["train/guidance"], g["guidance_loss"])
    assert float(g["bc_loss_used_for_eta"]) != float(g["bc_loss_after_step_NOT_used"])
    close(after.eta, g["eta_out"])
    names = "actor", "target_actor", "critics", "target_critics"
    for name, tree in zip(names, nets_of(g, "out"), strict=True):
        jax.tree.map(functools.partial(close, tolerance=1e-9), getattr(after, name), tree)
        assert any(leaves_differ(getattr(after, name), getattr(state, name))), name
    assert int(after.num_updates) == 1006


# --- networks against numpy ---


def test_networks_are_plain_concatenations():
    args, rng = tiny(), np.random.default_rng(0)
    state = one_state(args)
    s, x, nets = rng.normal(size=(7, 1, 3)), rng.normal(size=(7, 5, 2)), state.actor["params"]
    joined = np.concatenate([np.repeat(s, 5, 1), x], -1)
    for t in (rng.integers(1, 4, (7, 1)), 1, 3):  # a step for each row, one for all
        time = mlp(nets["time"], D.time_features(t), mish)
        inputs = np.concatenate([joined, np.broadcast_to(time, (7, 5, 32))], -1)
        close(predict_noise(state.actor, s, x, t, args), mlp(nets["trunk"], inputs, mish), 1e-5)
    q = q_values(state.critics, s, x, args)
    for h in range(3):
        close(q[h], mlp(of_seed(state.critics["params"]["members"], h), joined, mish)[..., 0], 1e-5)
    assert q.shape == (3, 7, 5) and np.abs(q[0] - q[1]).max() > 0


def test_critics_with_layer_norm():
    args, rng = tiny(critic_norm=True), np.random.default_rng(0)
    s, a, drawn = rng.normal(size=(7, 3)), rng.normal(size=(7, 2)), lambda *size: rng.normal(size=size) / 2
    layer = lambda n, m: {"kernel": drawn(3, n, m), "bias": drawn(3, m)}
    own = {f"Dense_{i}": layer(n, m) for i, (n, m) in enumerate([(5, 16), (16, 16), (16, 1)])}
    own |= {f"LayerNorm_{i}": {"scale": drawn(3, 16), "bias": drawn(3, 16)} for i in range(2)}
    for h, q in enumerate(q_values({"params": {"members": own}}, s, a, args)):
        x = np.concatenate([s, a], -1)
        for i in range(2):
            x = x @ own[f"Dense_{i}"]["kernel"][h] + own[f"Dense_{i}"]["bias"][h]
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
            x = mish(x * own[f"LayerNorm_{i}"]["scale"][h] + own[f"LayerNorm_{i}"]["bias"][h])
        close(q, (x @ own["Dense_2"]["kernel"][h] + own["Dense_2"]["bias"][h])[..., 0], 1e-5)


def test_published_sizes():
    init, _ = D.make_train(D.Args(), 17, 6)
    state = jax.eval_shape(init, jax.random.split(jax.random.key(0), 1))
    counts = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.actor, state.critics)]
    assert counts == [149_062, 1_379_850]
    fresh = one_state(D.Args())
    for layers in (fresh.actor["params"]["trunk"], fresh.critics["params"]["members"]):  # Xavier, uniform
        np.testing.assert_allclose(np.abs(layers["Dense_1"]["kernel"]).max(), (6 / 512) ** 0.5, rtol=1e-3)
        assert not layers["Dense_1"]["bias"].any()
    assert not any(leaves_differ(fresh.actor, fresh.target_actor) + leaves_differ(fresh.critics, fresh.target_critics))


# --- losses, gradients, order ---


def loss_inputs(**changes):
    args = tiny(**changes)
    state, batch = one_state(tiny()), jax.tree.map(lambda x: x[:16], random_rows())
    return args, state, batch, draw_noise(jax.random.key(5), batch.actions, args)


def test_noise_has_its_shapes():
    args, _, _, noise = loss_inputs(num_steps=4)
    assert noise.x_T.shape == (16, 2, 2) and noise.z.shape == (3, 16, 2, 2) and noise.chain.shape == (4, 16, 2)
    many = jax.tree.map(np.asarray, draw_noise(jax.random.key(0), jnp.zeros((4_000, 2)), args))
    np.testing.assert_allclose(np.bincount(many.t), [0, 1_000, 1_000, 1_000, 1_000], atol=120)
    assert many.t.min() == 1
    for x in (many.x_T, many.z, many.eps, many.chain):
        np.testing.assert_allclose([x.mean(), x.std()], [0, 1], atol=0.05)
    assert np.abs(np.corrcoef(many.eps[:, 0], many.x_T[:, 0, 0])[0, 1]) < 0.06


@pytest.mark.parametrize("guidance", ["soft", "hard", "denoised", "none"])
def test_gradients_go_where_the_equation_says(guidance):
    args, state, batch, noise = loss_inputs(guidance=guidance)
    inputs = state.target_critics, state.eta, batch, noise, args
    _, (own, critics) = actor_grad(state.actor, *inputs)
    assert all(x.any() for x in jax.tree.leaves(own))
    if guidance == "denoised":  # which goes through Q on purpose; the clip of its chain has corners
        return
    assert not any(x.any() for x in jax.tree.leaves(critics))  # g is a constant
    direction = jax.tree.map(lambda x: np.sign(x + 1e-9), state.actor)
    moved = lambda h: jax.tree.map(lambda p, d: p + np.float32(h) * d, state.actor, direction)
    at = lambda h: float(actor_grad(moved(h), *inputs)[0][0])
    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(*map(jax.tree.leaves, (own, direction)), strict=True))
    np.testing.assert_allclose((at(1e-3) - at(-1e-3)) / 2e-3, slope, rtol=2e-2)


def test_denoised_guidance_is_q_of_whole_samples():
    args, state, batch, noise = loss_inputs(guidance="denoised", clip_samples=False)
    with jax.enable_x64(True):
        wide = lambda x: np.asarray(x, np.float64) if x.dtype == jnp.float32 else np.asarray(x)
        actor, target, rows, eps = jax.tree.map(wide, (state.actor, state.target_critics, batch, noise))
        (_, metrics), (grads, _) = actor_grad(actor, target, 0.0, rows, eps, args)
        samples = sample_actions(actor, rows.observations, eps.chain[0], eps.chain[1:], args)
        norm = jnp.abs(q_values(target, rows.observations, rows.actions, args)).mean()
        close(metrics["train/guidance"], -q_values(target, rows.observations, samples, args).mean() / norm, 1e-4)
        slope = sum(float(g.sum()) for g in jax.tree.leaves(grads))
        at = lambda h: float(actor_grad(jax.tree.map(lambda p: p + h, actor), target, 0.0, rows, eps, args)[0][0])
        np.testing.assert_allclose((at(1e-5) - at(-1e-5)) / 2e-5, slope, rtol=1e-5)


def test_target_actor_follows_the_codes_rule():
    args, state, batch, noise = loss_inputs(ema_start=1_000, ema_every=5)
    moved = []
    for count in (0, 5, 1_000, 1_004, 1_005, 1_006, 1_010):
        after, _ = update(state._replace(num_updates=jnp.int32(count)), batch, noise, args)
        moved.append(any(leaves_differ(after.target_actor, state.target_actor)))
        weights = [jax.tree.leaves(tree)[-1] for tree in (after.target_actor, state.target_actor, after.actor)]
        np.testing.assert_allclose(weights[0], weights[1] + 0.005 * moved[-1] * (weights[2] - weights[1]), atol=1e-7)
    assert moved == [False, False, False, False, True, False, True]


def test_cloning_leaves_the_critics_alone():
    args, state, batch, noise = loss_inputs(guidance="none")
    after, metrics = update(state, batch, noise, args)
    for name in ("critics", "target_critics", "critic_opt", "eta"):
        assert not any(leaves_differ(getattr(after, name), getattr(state, name))), name
    assert any(leaves_differ(after.actor, state.actor)) and set(metrics) == {"train/bc_loss"}


def test_without_a_discount_nothing_is_sampled():
    args, state, batch, noise = loss_inputs(gamma=0.0)
    _, metrics = update(state, batch, noise._replace(x_T=None, z=None), args)
    np.testing.assert_allclose(metrics["train/target"], batch.rewards.mean(), rtol=1e-6)


def test_spread_is_blind_to_what_all_values_share():
    """Q + c pulls at the actor as Q does by --q-norm spread, and |c| times less by size."""
    args = D.Args(hidden_sizes=(8, 8), num_critics=3, q_norm="spread")
    rows, critics = random_rows(), one_state(args).target_critics
    q = np.asarray(q_values(critics, rows.observations, rows.actions, args), float)
    last = critics["params"]["members"]["Dense_2"]
    lower = {**critics["params"]["members"], "Dense_2": {**last, "bias": last["bias"] - 300.0}}
    for name, norm, factor in (("spread", q.mean(0).std(), 1.0), ("size", np.abs(q).mean(), np.abs(q - 300).mean())):
        args = dataclasses.replace(args, q_norm=name)
        pull = [
            q_gradient(nets, rows.observations, rows.actions, 0.5 * rows.actions, args)
            for nets in (critics, {"params": {"members": lower}})
        ]
        close(pull[0][1], norm, 1e-5)
        np.testing.assert_allclose(pull[1][0] * (factor / norm if name == "size" else 1), pull[0][0], rtol=2e-3)


# --- data ---


def test_reward_scale():
    scale = lambda rewards, *returns: D.return_scale(np.float32(rewards), np.float32(returns), D.Args())
    assert scale([-10, 40], -10, 40) == 20.0
    assert scale([100, 101], 100, 101) == 1_000 / 100.5  # the floor
    assert scale([0, 1, 0, 1], 0, 1, 1) == 1_000.0  # a maze
    assert scale([50, -50], 0) == 1_000.0  # what cancels in the return, a hundredth of it
    assert scale([0, 0], 0) == 1.0


def test_data_as_the_update_sees_it(dataset):
    buffer = envs.buffers.load(dataset, quiet=True)
    assert buffer["timeouts"].any() and np.abs(buffer["actions"]).max() == 1.0
    data, *_ = D.dac_data(buffer, D.Args())
    assert float(jnp.abs(data.actions).max()) < 1.0 and not data.terminals.any()  # a timeout bootstraps
    scale = 1_000 / np.ptp(buffer["episode_returns"])
    np.testing.assert_allclose(data.rewards, scale * buffer["rewards"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(data.next_observations, buffer["next_observations"])


def columns(num=40):
    """Columns of a buffer of two episodes."""
    rows = random_rows(num)._asdict()
    return {k: np.array(x) for k, x in rows.items()} | {"episode_returns": np.float32([0.3, 0.8])}


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_the_unit_of_rewards_does_not_matter(unit):
    plain, other = columns(), columns()
    for key in ("rewards", "episode_returns"):
        other[key] = other[key] * np.float32(unit)
    rewards = [D.dac_data(x, D.Args())[0].rewards for x in (plain, other)]
    np.testing.assert_allclose(*rewards, rtol=1e-5)
    assert 1_000 < np.abs(rewards[0]).max() < 10_000


def test_observations_are_standardised():
    """A column that is constant but for float32's rounding reads as 0, in the data and where it moves later."""
    rows = columns() | {"observations": np.float32([[1, 5, 1e30], [3, 5, 1e30]] * 20)}
    rows["observations"][0, 2] = np.nextafter(np.float32(1e30), np.float32(0))
    rows["next_observations"] = np.float32([[5, 6, -1e30]] * 40)
    data, (mean, std, _) = D.dac_data(rows, D.Args(standardise_observations=True))
    np.testing.assert_array_equal(data.observations, [[-1, 0, 0], [1, 0, 0]] * 20)
    np.testing.assert_array_equal(data.next_observations, [[3, 0, 0]] * 40)
    np.testing.assert_array_equal([mean[:2], std[:2]], [[2, 5], [1, np.inf]])
    raw = D.Args(standardise_observations=False)
    np.testing.assert_array_equal(D.dac_data(rows, raw)[0].observations, [[1, 0, 0], [3, 0, 0]] * 20)
    rows["observations"][0, 2] = 2e4
    with pytest.raises(envs.InputError, match=r"columns \[2\] of the observations.*--standardise"):
        D.dac_data(rows, raw)


# --- the whole script ---


@pytest.fixture(scope="module")
def whole_run(dataset, tmp_path_factory):
    """A run of two seeds -> args, folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    ours = dict(critic_norm=True, standardise_observations=True, eval_first=True, angles="2")
    args = tiny(dataset=dataset, out=str(folder), num_seeds=2, **ours)
    D.main(args)
    return args, folder


def test_log_and_figures(whole_run):
    _, folder = whole_run
    assert (folder / "training.png").stat().st_size > 5_000
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[1:]]
    keys = ("actor_loss", "bc_loss", "critic_loss", "eta", "guidance", "q", "q_gradient", "q_std", "target")
    assert [r["step"] for r in records] == [0, 0, 40, 40, 80, 80]
    assert all({"eval/return", "choice/action_std", "choice/gain", "choice/gain_std"} <= set(r) for r in records)
    assert {f"train/{k}" for k in keys} == {k for k in records[2] if k.startswith("train/")}
    assert all(np.isfinite(r[f"train/{k}"]) for r in records[2:] for k in keys)


def test_benchmarks_read_a_run(whole_run, tmp_path):
    """Its own number of samples gives the returns that it logged; the grid's table has the mean of its evaluations."""
    args, folder = whole_run
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[1:]]
    returns = np.array([r["eval/return"] for r in records]).reshape(3, 2)  # [steps, seeds]
    run = Path(shutil.copytree(folder, tmp_path / "runs" / "point" / "cell" / "seed0"))
    known = json.loads((run / "args.json").read_text())
    del known["q_norm"]  # a flag that is younger than the run
    (run / "args.json").write_text(json.dumps(known)), (run / "done.json").touch()
    (row,) = dac_choice.returns_by_samples(run, args.eval_episodes, (args.num_action_samples,))
    np.testing.assert_allclose(row[1], returns[-1].mean(), rtol=1e-4)
    grid_figures.main([str(tmp_path / "logs"), "--runs", str(tmp_path / "runs"), "--last", "3"])
    row = list(grid_figures.table(tmp_path / "logs", 3))[-1]
    assert records[0]["step"] == 0
    returns = returns[1:]  # what the untrained policy has does not count
    score, spread = returns.mean(0).mean(), returns.mean(0).std(ddof=1)
    assert row.startswith(f"| point | cell | 2 | {score:.0f} +- {spread:.0f} | {returns.max(0).mean():.0f} |")
    assert (tmp_path / "logs" / "grid.png").stat().st_size > 5_000
    assert str(tmp_path) not in (tmp_path / "logs" / "point" / "cell" / "seed0.jsonl").read_text()


def test_policy_file_acts_as_the_state_that_was_saved(whole_run):
    """In NumPy as `choose_actions` does, with the same noise."""
    args, folder = whole_run
    arrays, about = runner.read_npz(folder / "policy.npz", "metadata_json")
    assert str(arrays["kind"]) == "diffusion" and arrays["actor/params/trunk/Dense_0/kernel"].shape == (2, 39, 16)
    assert about["num_action_samples"] == 4
    like = jax.eval_shape(D.make_train(args, 5, 2)[0], runner.seed_keys(args))  # one angle of four numbers
    state = runner.fill(like, runner.read_npz(folder / "state.npz")[0], folder)
    key = jax.random.key(3)
    noise = jax.random.normal(key, (3, 1, 4, 2))
    choose = jax.jit(D.choose_actions, static_argnums=(3, 4))
    for index in (0, 1):
        obs = jnp.asarray(np.random.default_rng(index).normal(size=4), jnp.float32)
        _, see = D.dac_data(envs.buffers.load(args.dataset, quiet=True), args)
        wanted, _ = choose(of_seed((state.actor, state.target_critics), index), see(obs[None]), key, args, 2)
        policy = policies.load(folder / "policy.npz", index)
        np.testing.assert_allclose(policy(obs[None], noise), wanted, atol=1e-5)


def test_quick_beats_its_data(dataset, tmp_path, optimised):
    """Probe: the data's mean return is about 0, its best episode 94; stated margin over the mean: 60."""
    flags = {**D.QUICK, "num_updates": 750, "eval_every": 750, "eval_episodes": 5}
    result = D.main(D.Args(dataset=dataset, out=str(tmp_path / "run"), **flags))
    assert result["last"] > result["data_mean"] + 60, result


def test_a_cloned_policy_has_no_critics(dataset, tmp_path):
    D.main(tiny(dataset=dataset, guidance="none", out=str(tmp_path / "run")))
    arrays, about = runner.read_npz(tmp_path / "run" / "policy.npz", "metadata_json")
    assert not any(key.startswith("critics") for key in arrays) and about["num_action_samples"] == 1
    action = policies.load(tmp_path / "run" / "policy.npz")(np.zeros(4))
    assert action.shape == (2,) and np.abs(action).max() <= 1


# --- flags ---


@pytest.mark.parametrize("changes", [dict(eta=1e-4), dict(eta=200.0), dict(eta_min=2.0, eta_max=1.0)])
def test_eta_must_lie_within_its_clip(changes):
    with pytest.raises(envs.InputError, match="--eta-min, --eta and --eta-max"):
        D.main(tiny(**changes))


def test_eta_is_fixed_where_nothing_is_published(dataset):
    parsed = lambda *flags: runner.parse(D.Args, ["--dataset", dataset, *flags], D.preset)
    fields = lambda args, *names: tuple(getattr(args, name) for name in names)
    own = parsed("--preset", "cpu", "--rho", "0.3")
    assert fields(own, "num_updates", "num_q_samples", "rho", "eta", "eta_lr") == (10_000, 1, 0.3, 0.5, 0.0)
    assert fields(parsed(), "num_updates", "rho", "q_norm") == (2_000_000, 0.0, "spread")
    published = fields(parsed("--preset", "hopper-medium-expert-v2"), "eta", "eta_lr", "rho", "q_norm")
    assert published == (1.0, 1e-3, 1.5, "size")


def test_cloning_has_no_target_networks():
    """What moves them is told to be without effect."""
    targets = {"tau", "ema_every", "ema_start"}
    assert targets <= D.idle_flags(tiny(guidance="none")).keys() and not targets & D.idle_flags(tiny()).keys()
