"""qdq.py against goldens, plain numpy and worlds with known answers."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
import envs.buffers
import qdq as D
import qdq_figures
import runner
from runner import probes
from tests.oracles import common
from tests.oracles.common import close, leaves_close, mish, mlp, of_seed, size_of

TINY = dict(
    teacher_updates=40, student_updates=40, num_updates=80, chunk=20, eval_every=40, eval_episodes=2,
    model_hidden_sizes=(16,), hidden_sizes=(16, 16), batch_size=32, model_batch_size=32,
    uncertainty="consistency", penalty="product", num_critics=2, layer_norm=False, gamma_ent=0.2, q_norm="size",
)  # fmt: skip


def tiny(**changes):
    return D.Args(**{**TINY, **changes})


@functools.cache
def golden(name, case=""):
    """Arrays of a golden file or of a case in it, in float64 as the functions that are compared with them."""
    arrays = common.golden(f"qdq_{name}")
    return {k.removeprefix(f"{case}."): v for k, v in arrays.items() if k.startswith(case)}


def random_batch(num_rows=300, num_obs=3, num_actions=2, seed=0):
    """Random rows; every seventh is terminal."""
    rng = np.random.default_rng(seed)
    obs, after = rng.normal(size=(2, num_rows, num_obs))
    actions = rng.uniform(-1, 1, (num_rows, num_actions))
    rows = D.Transitions(obs, actions, obs[:, 0], after, np.arange(num_rows) % 7 == 0)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), rows)


# --- D_Q ---


@pytest.mark.parametrize("case", "abc")
def test_windows_golden(case):
    g = golden("dataset")
    ends = np.flatnonzero((g["terminals"] > 0) | (g["timeouts"] > 0)) + 1
    assert len(ends) == len(g["traj_len"])
    gamma, *sizes = (g[f"{case}_{name}"] for name in ("gamma", "window", "step", "cap"))
    rows, q, widths = D.windowed_returns(g["rewards"], ends, float(gamma), *map(int, sizes))
    np.testing.assert_array_equal(rows, g[f"{case}_start_index"])
    np.testing.assert_array_equal(widths, g[f"{case}_window_len"])
    np.testing.assert_allclose(q, g[f"{case}_q"], rtol=1e-12)
    np.testing.assert_allclose(D.scaled(q, q.min(), q.max()), g[f"{case}_q_norm"], atol=1e-12)


def test_window_counts_golden():
    g = golden("dataset")
    for length, count, last in zip(g["count_lengths"], g["count_windows"], g["count_last_window_len"], strict=True):
        _, _, widths = D.windowed_returns(np.zeros(length), [length], 0.99, 200, 10, 100)
        assert (len(widths), widths[-1]) == (count, last), length
    _, q, _ = D.windowed_returns(-np.ones(700), [700], 0.99, 200, 10, 100)
    np.testing.assert_allclose(q.min(), g["antmaze_qmin"], rtol=1e-12)


def test_window_rule():
    for flags, length, sizes in (
        ({}, 1000, (200, 10)), ({}, 200, (40, 2)), ({}, 100, (20, 1)), (dict(window=7, window_step=3), 200, (7, 3)),
        (dict(window=20, window_step=20), 100, (20, 20)),
        (D.PUBLISHED["antmaze-umaze-v0"], envs.task("ant-maze-umaze").episode_length, (200, 10)),  # not of 700 / 5
    ):  # fmt: skip
        assert D.window_sizes(D.Args(**flags), length) == sizes
    with pytest.raises(envs.InputError, match="--window-step 1000000: must be at most the window, 20 steps"):
        D.window_sizes(tiny(window=0, window_step=1_000_000), 100)


def test_data_is_prepared(dataset):
    buffer = envs.buffers.load(dataset, quiet=True)
    args = D.Args(reward_shift=-1.0, scale_rewards=False)
    data, (mean, std, _) = D.qdq_data(buffer, args)
    entries, held = D.q_entries(buffer, data, args)
    np.testing.assert_allclose(data.observations.mean(0), 0.0, atol=1e-3)
    np.testing.assert_allclose(data.next_observations * std + mean, buffer["next_observations"], atol=1e-3)
    np.testing.assert_allclose(data.rewards, buffer["rewards"] - 1.0, atol=1e-6)
    assert float(jnp.abs(data.actions).max()) <= 1 - 1e-5 + 1e-7 and np.abs(buffer["actions"]).max() == 1.0
    raw, _ = D.qdq_data(buffer, D.Args(normalize=False))
    np.testing.assert_array_equal(raw.observations, buffer["observations"])

    x = np.concatenate([entries.x, held.x])
    assert (len(entries.x), len(held.x), x.min(), x.max()) == (76 * 81, 4 * 81, -1.0, 1.0)  # of 80 episodes
    gamma, rewards = 0.99 ** np.arange(20), np.asarray(data.rewards)
    s_a = np.concatenate([data.observations, data.actions], -1)
    whole = set()
    for part in (entries, held):
        q = D.unscaled(np.asarray(part.x), float(part.low), float(part.high))
        c, found = np.asarray(part.conditions), []
        for k in range(0, len(c), 81):  # an episode's windows, from its first row on
            row = np.flatnonzero((s_a == c[k]).all(1))[0]
            found += [row]
            for i, j in ((0, 0), (40, 40), (80, 80)):
                np.testing.assert_array_equal(c[k + i], s_a[row + j])
                np.testing.assert_allclose(q[k + i], gamma @ rewards[row + j : row + j + 20], rtol=1e-4)
        assert all(row % 100 == 0 for row in found) and not whole & set(found)
        whole |= set(found)
    assert len(whole) == 80
    assert not len(D.q_entries(buffer, data, D.Args(holdout=0.0))[1].x)
    assert len(D.q_entries(buffer, data, D.Args(holdout=1e-6))[1].x) == 81  # one episode at least


def tiny_buffer(factor):
    """40 episodes, rewards times a factor; the third column of observations never changes."""
    rng = np.random.default_rng(0)
    s = np.concatenate([rng.normal(size=(800, 2)), np.full((800, 1), 1234.567)], 1).astype(np.float32)
    rows = {"observations": s, "next_observations": np.roll(s, -1, 0), "actions": rng.uniform(-1, 1, (800, 2))}
    rows |= {"rewards": factor * rng.normal(1.0, 1.0, 800), "terminals": np.zeros(800)}
    rows["episode_ends"] = np.arange(20, 801, 20)
    return type("Buffer", (dict,), {"metadata": {"episode_length": 20}})(rows)


def test_any_unit_of_rewards_and_a_constant_column():
    """The same data, D_Q and losses for rewards x 1e-6, 1 and 1e6; no reward and a constant column do no harm."""
    args, nets, _, _ = small_world()
    args = dataclasses.replace(args, min_entries=10, uncertainty="critics", penalty="excess")
    seen = []
    for factor in (1e-6, 1.0, 1e6):
        buffer = tiny_buffer(factor)
        data, (_, std, _) = D.qdq_data(buffer, args)
        entries, _ = D.q_entries(buffer, data, args)
        batch = jax.tree.map(lambda x: x[:200], data)
        loss, metrics = critic_loss(
            nets.critic, nets.target_critic, nets.target_actor, None, batch, jax.random.key(0), args
        )
        seen += [np.array([loss, metrics["train/target"], *entries.x[:50], float(entries.high)])]
    np.testing.assert_allclose(seen[0], seen[1], rtol=1e-4)
    np.testing.assert_allclose(seen[2], seen[1], rtol=1e-4)
    assert std[2] == np.float32(1234.567) and np.abs(data.observations[:, 2]).max() < 1e-5
    assert abs(float(jnp.sqrt(jnp.mean(data.rewards**2))) - 1) < 1e-3
    nothing, _ = D.qdq_data(tiny_buffer(0.0), args)
    assert np.all(nothing.rewards == 0.0) and np.all(D.q_entries(tiny_buffer(0.0), nothing, args)[0].x == -1.0)


# --- consistency model ---

GROUPS_OF_2 = D.Args(group_size=2, model_hidden_sizes=(64, 64, 64))


def golden_net(name):
    g = golden("consistency")
    arrays = lambda layer, *kinds: {kind: jnp.asarray(g[f"{name}.{layer}.{kind}"]) for kind in kinds}
    first, num_conditions = arrays("dense0", "kernel", "bias"), g["net_c"].shape[-1]
    of_c, of_x, of_e = jnp.split(first["kernel"], (num_conditions, num_conditions + 1))
    dense = [arrays(f"time{i}", "kernel", "bias") for i in range(2)]
    dense += [first | {"kernel": of_c}, {"kernel": of_e}]
    dense += [arrays(f"dense{i}", "kernel", "bias") for i in range(1, 4)]
    params = {f"Dense_{i}": x for i, x in enumerate(dense)}
    params |= {"fourier": jnp.asarray(g[f"{name}.fourier_W"]), "w_x": of_x}
    return {"params": params | {f"GroupNorm_{i}": arrays(f"gn{i}", "scale", "bias") for i in range(3)}}


def fresh_net(args, num_conditions, seed=1):
    net = D.QNet(args.model_hidden_sizes, args.group_size)
    return net.init(jax.random.key(seed), jnp.zeros(num_conditions), *jnp.ones(2))


def test_network_golden():
    g = golden("consistency")
    with jax.enable_x64():
        net, inputs = golden_net("f"), (g["net_c"], g["net_x"][:, 0], g["sigma"], GROUPS_OF_2)
        close(D.QNet((64, 64, 64), 2).apply(net, *inputs[:3]), g["net_F"][:, 0], 1e-10)
        close(D.denoiser(net, *inputs), g["net_denoiser"][:, 0], 1e-10)
        f = D.consistency(net, *inputs)
        close(f, g["net_consistency"][:, 0], 1e-10)
        assert g["sigma"][0] == D.T_MIN and f[0] == g["net_x"][0, 0]  # the boundary condition, exactly
        close(D.noise_levels(1000), g["karras_1000"], 1e-12)
        close(D.noise_levels(18), g["karras_18"], 1e-12)


def test_group_size():
    """A width: LayerNorm; 0: no norm in the network."""
    x = np.random.default_rng(0).normal(3.0, 2.0, (5, 16))
    found = D.GroupNorm(16).apply(D.GroupNorm(16).init(jax.random.key(0), x), x)
    np.testing.assert_allclose(found, (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True), atol=1e-4)
    names = fresh_net(tiny(group_size=0), 5)["params"]
    assert not any("Norm" in name for name in names) and any("Norm" in x for x in fresh_net(tiny(), 5)["params"])


def test_heun_step_golden():
    g = golden("consistency")
    var, mu = g["ode_var"], g["ode_mu"]
    denoise = lambda x, t: (var * x + t**2 * mu) / (var + t**2)  # of N(mu, var)
    with jax.enable_x64():
        found = D.heun_step(denoise, g["ode_x"], g["pair_t"], g["pair_s"])
    close(found, g["ode_heun"], 1e-10)
    assert np.abs(found - g["ode_exact"]).max() < np.abs(g["ode_euler"] - g["ode_exact"]).max()


def test_distillation_golden():
    g = golden("consistency")
    with jax.enable_x64():
        nets = [golden_net(name) for name in ("f", "target", "teacher")]
        rows = g["cd_c"], g["cd_q"][:, 0], g["cd_z"][:, 0], (g["pair_t"], g["pair_s"]), GROUPS_OF_2
        loss, grads = jax.value_and_grad(D.distillation_loss, (0, 1, 2))(*nets, *rows)
        close(loss, g["cd_loss"], 1e-10)
        assert size_of(grads[1:]) == 0 and size_of(grads[0]["params"].pop("fourier")) == 0
        close(grads[0]["params"]["Dense_6"]["kernel"], g["cd_grad_last_kernel"], 1e-10)
        assert all(size_of(x) > 0 for x in jax.tree.leaves(grads[0]))


def test_denoising_golden():
    g = golden("consistency")
    with jax.enable_x64():
        x, z, t = g["cd_q"][:, 0], g["cd_z"][:, 0], g["pair_t"]
        found = D.denoising_loss(golden_net("teacher"), g["cd_c"], x, z, t, GROUPS_OF_2)
    close(found, g["edm_loss_value"], 1e-10)


def test_uncertainty_golden():
    g = golden("consistency")
    with jax.enable_x64():
        model = D.QModel(golden_net("f"), jnp.float64(-1.0), jnp.float64(1.0))
        close(D.q_samples(model, g["cd_c"], g["onestep_z"], GROUPS_OF_2), g["onestep_f"], 1e-9)
        for nodes in (8, 16):
            args = dataclasses.replace(GROUPS_OF_2, nodes=nodes)
            _, h = D.q_moments(model, jnp.asarray(g["cd_c"]), None, args)
            close(h, g[f"onestep_std_gh{nodes}"], 1e-9)
        low, high = g["denorm_qmin_qmax"]
        inverse = lambda x: (x + 1) / 2 * (high - low) + low
        close(inverse(g["denorm_in"]), g["denorm_out"], 1e-12)
        wide = model._replace(low=low, high=high)
        close(D.q_samples(wide, g["cd_c"], g["onestep_z"], GROUPS_OF_2), inverse(g["onestep_f"]), 1e-9)


def test_monte_carlo_is_the_population_std():
    args = tiny(spread="mc", num_samples=6)
    model, key = D.QModel(fresh_net(args, 5), jnp.float32(-3.0), jnp.float32(7.0)), jax.random.key(1)
    c = jax.random.normal(jax.random.key(2), (4, 5))
    mean, h = jax.jit(D.q_moments, static_argnums=3)(model, c, key, args)
    q = np.asarray(jax.jit(D.q_samples, static_argnums=3)(model, c, jax.random.normal(key, (4, 6)), args))
    np.testing.assert_allclose(mean, q.mean(-1), rtol=1e-5)
    np.testing.assert_allclose(h, q.std(-1), rtol=1e-4)


def test_all_levels_are_drawn(monkeypatch):
    """The level of the samples, t = 80, among them; the last level is a target only."""
    seen = []
    monkeypatch.setattr(D, "distillation_loss", lambda net, *x: seen.append(x[5]) or 0.0 * net["w"])
    args = tiny(num_levels=4, model_batch_size=200)
    entries = D.Entries(jnp.zeros((9, 5)), jnp.zeros(9), jnp.float32(0.0), jnp.float32(1.0))
    net = {"w": jnp.float32(0.0)}
    student = D.ModelNets(net, net, D.qdq_optimisers(args)[1].init(net))
    D.student_update(student, None, entries, 0, jax.random.key(0), args)
    t, s = map(np.asarray, seen[0])
    levels = np.asarray(D.noise_levels(4))
    np.testing.assert_array_equal(np.unique(t), np.sort(levels[:-1]))
    np.testing.assert_array_equal(np.unique(s), np.sort(levels[1:]))
    assert np.all(s < t)


def test_student_starts_as_the_teacher_and_its_target_follows_every_fifth_step():
    args = tiny(student_tau=0.5)
    teacher = jax.tree.map(lambda *x: jnp.stack(x), *(fresh_net(args, 5, seed) for seed in range(2)))
    nets = D.make_train(args, 3, 2)[1].init(jax.random.split(jax.random.key(1), 2), teacher).nets
    leaves_close((nets.net, nets.target), (teacher, teacher))
    rng = np.random.default_rng(0)
    entries = D.Entries(jnp.float32(rng.normal(size=(50, 5))), jnp.float32(rng.uniform(-1, 1, 50)), 0.0, 1.0)
    before, own, key = of_seed(nets), of_seed(teacher), jax.random.key(2)
    step = jax.jit(lambda n: D.student_update(before, own, entries, n, key, args)[0])
    for n, moves in ((0, True), (1, False), (4, False), (5, True)):
        after = step(n)
        kernels = (net["params"]["Dense_4"]["kernel"] for net in (before.target, after.target, after.net))
        old, new, online = map(np.asarray, kernels)
        assert np.abs(online - old).max() > 0
        np.testing.assert_allclose(new, 0.5 * (old + online) if moves else old, atol=1e-7)


# --- target, critics, actor ---

CRITIC_CASES = sorted({key.split(".reward")[0] for key in golden("target") if key.endswith(".reward")})


@pytest.mark.parametrize("case", CRITIC_CASES)
def test_target_golden(case):
    kind, alpha, beta, _ = case.rsplit("_", 3)
    weight = {"umaze-diverse": "antmaze-diverse"}.get(kind, kind)
    g, args = golden("target", case), D.Args(penalty="product", alpha=float(alpha), beta=float(beta), weight=weight)
    with jax.enable_x64():
        h = g["samples"].std(1)
        close(h, g["H"], 1e-10)
        level = jnp.quantile(jnp.asarray(g["H"]), args.beta)
        ood = g["H"] > level
        np.testing.assert_array_equal(ood, g["ood"])
        batch = D.Transitions(None, None, g["reward"], None, 1.0 - g["mask"])
        next_q = np.minimum(g["q1_target"], g["q2_target"])
        y, _ = D.bootstrap_target(batch, next_q, jnp.asarray(g["H"]), level, args)
        close(y, g["y_blend"], 1e-10)
        loss = lambda q: jnp.mean((q - y) ** 2, -1).sum()
        grads = jax.grad(loss)(jnp.stack([g["q1"], g["q2"]]))
    close(grads, np.stack([g["grad_q1"], g["grad_q2"]]), 1e-9)
    assert ood.any() and not ood.all()


def test_excess_lowers_what_is_above_the_level():
    h, q = jnp.arange(101.0), jnp.linspace(-3.0, 3.0, 101)
    batch = D.Transitions(None, None, jnp.ones(101), None, jnp.arange(101.0) == 100)
    args = D.Args(penalty="excess", kappa=2.0, gamma=0.5)
    y, metrics = D.bootstrap_target(batch, q, h, jnp.float32(70.0), args)
    wanted = 1.0 + 0.5 * (np.asarray(q) - 2.0 * np.maximum(np.arange(101) - 70.0, 0.0)) * (np.arange(101) < 100)
    np.testing.assert_allclose(y, wanted, rtol=1e-6)
    assert [round(float(metrics[f"train/h_p{p}"]), 3) for p in (10, 50, 90)] == [10, 50, 90]
    np.testing.assert_allclose(metrics["train/ood"], 30 / 101, rtol=1e-5)
    np.testing.assert_allclose(metrics["train/penalty"], np.arange(30).sum() / 101, rtol=1e-5)
    assert float(metrics["train/raised"]) == 0


def test_product_raises_the_target_where_h_is_small_or_q_negative():
    """w = 1 / H above 1 in the flagged rows, w = beta below it in the others: the log has the share."""
    h, q = jnp.array([0.1, 0.2, 0.3, 0.4, 0.4]), jnp.array([2.0, -2.0, 2.0, -2.0, 2.0])
    batch = D.Transitions(None, None, jnp.zeros(5), None, jnp.array([0.0, 0.0, 0.0, 0.0, 1.0]))
    args = D.Args(penalty="product", alpha=0.9, beta=0.8, gamma=0.5)
    y, metrics = D.bootstrap_target(batch, q, h, jnp.float32(0.25), args)
    w = np.array([0.8, 0.8, 1 / 0.3, 1 / 0.4])
    np.testing.assert_allclose(y, [*(0.5 * np.asarray(q[:4]) * (0.9 + 0.1 * w)), 0.0], rtol=1e-6)
    np.testing.assert_allclose(metrics["train/raised"], 0.4)  # row 1: Q < 0, row 2: H < 1; row 4 has no next value


@pytest.mark.parametrize("case", ["actor_ddpg_0.0", "actor_ddpg_0.8", "actor_ddpg_2.0", "actor_awr_0.0"])
def test_actor_golden(case):
    g = golden("target", case)
    args = D.Args(gamma_ent=float(g["gamma"]), q_norm="none")
    with jax.enable_x64():
        log_std = jnp.clip(g["log_std"], *D.LOG_STD)
        log_p = D.log_likelihood(g["action"], g["mean"], log_std)
        close(log_p, g["logp"], 1e-10)
        if "awr" in case:
            value = g["q_rep"].min(0).reshape(-1, 16).mean(0)
            other = g["q_rep"].min(0).reshape(16, -1).mean(1)
            q = g["q_data"].min(0)
            losses = [float(D.awr_loss(q, v, log_p, args)) for v in (value, other)]
            assert min(abs(np.array(losses) / g["loss"] - 1)) < 1e-9
        else:
            close(D.climbing_loss(g["q_pi"].min(0), log_p, 1.0, args), g["loss"], 1e-10)


@pytest.mark.parametrize("q_norm", ["none", "size", "spread"])
def test_what_q_is_divided_by(q_norm):
    """Loss and gradient; the spread stays as it is where all values are lower."""
    q, log_p = jnp.asarray([-103.0, -99.0, -98.0, -104.0]), jnp.asarray([1.0, 2.0, 3.0, 4.0])
    norm = {"none": 1.0, "size": 101.0, "spread": np.sqrt(6.5)}[q_norm]
    loss = lambda q: D.climbing_loss(q, log_p, 1.0, D.Args(gamma_ent=0.1, q_norm=q_norm))
    close(loss(q), 101.0 / norm - 0.25, 1e-5)
    close(jax.grad(loss)(q), -0.25 / norm, 1e-6)
    if q_norm == "spread":
        close(jax.grad(loss)(q - 200), -0.25 / norm, 1e-6)


def test_optimisers_take_the_steps_they_should():
    """Under a constant gradient of 1 Adam's step is its rate, and RAdam's the rate times its rectification."""
    args = tiny(teacher_lr=1e-2, student_lr=2e-2, actor_lr=3e-2, critic_lr=4e-2, max_grad_norm=0.5)
    n = np.arange(40)
    half = lambda total: 0.5 * (1 + np.cos(np.pi * n / total))
    limit, beta = 2 / (1 - 0.999) - 1, 0.999 ** (n + 1)
    rho = np.maximum(limit - 2 * (n + 1) * beta / (1 - beta), 5.0)
    rectified = np.sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho))
    wanted = (
        1e-2 * half(args.teacher_updates),
        2e-2 * half(args.student_updates) * np.where(rho > 5.0, rectified, 1.0),
        3e-2 * half(args.num_updates),  # counted in actor steps: the 40 of this run end half way
        np.full(40, 4e-2),
    )
    for optimiser, steps in zip(D.qdq_optimisers(args), wanted, strict=True):
        update = lambda opt, _, optimiser=optimiser: optimiser.update(jnp.ones(1), opt)[::-1]
        _, found = jax.lax.scan(update, optimiser.init(jnp.zeros(1)), length=40)
        np.testing.assert_allclose(-found[:, 0], steps, rtol=1e-2, atol=1e-7)  # float32 rho
    g, args = golden("target"), D.Args()
    rate = D.optax.cosine_decay_schedule(args.actor_lr, args.num_updates)
    np.testing.assert_allclose(rate(jnp.asarray(g["lr_step"])), g["actor_lr_cosine"], rtol=1e-4, atol=1e-9)


def numpy_actor(params, obs):
    return np.tanh(mlp({k: v for k, v in params["params"].items() if k != "log_std"}, obs))


def numpy_critics(params, obs, actions):
    layers, x = params["params"], np.concatenate([obs, actions], -1)
    num = sum(x["kernel"].shape[-1] == 1 for x in layers.values())
    depth = len(layers) // num
    each = ({f"Dense_{j}": layers[f"Dense_{i * depth + j}"] for j in range(depth)} for i in range(num))
    return np.stack([mlp(own, x, mish)[..., 0] for own in each])


def numpy_h(kind, nets, model, obs, actions, args):
    """The critics' std; the student's is compared with goldens above."""
    if kind == "critics":
        return numpy_critics(nets.target_critic, obs, actions).std(0)
    return np.asarray(D.q_moments(model, jnp.float32(np.concatenate([obs, actions], -1)), None, args)[1], float)


@functools.cache
def small_world():
    """args, nets whose targets differ, a model and a batch."""
    args = tiny()
    nets = of_seed(D.make_train(args, 3, 2)[2].init(jax.random.key(0)[None]).nets)
    moved = lambda tree: jax.tree.map(lambda x: 0.9 * x + 0.03, tree)
    nets = nets._replace(target_actor=moved(nets.actor), target_critic=moved(nets.critic))
    return args, nets, D.QModel(fresh_net(args, 5), jnp.float32(-40.0), jnp.float32(90.0)), random_batch(40)


critic_loss = jax.jit(D.qdq_critic_loss, static_argnums=6)
actor_loss = jax.jit(D.qdq_actor_loss, static_argnums=6)
update = jax.jit(D.qdq_update, static_argnums=5)


@pytest.mark.parametrize("sample_target", [False, True])
def test_critic_loss_is_the_equation(sample_target):
    args, nets, model, batch = small_world()
    args, key = dataclasses.replace(args, sample_target=sample_target), jax.random.key(7)
    targets = nets.target_critic, nets.target_actor
    loss, metrics = critic_loss(nets.critic, *targets, model, batch, key, args)
    key_sample, key_noise = jax.random.split(jax.random.split(key)[0])
    actions = numpy_actor(nets.target_actor, batch.next_observations)
    if sample_target:
        std = np.exp(np.asarray(nets.target_actor["params"]["log_std"]))
        actions = actions + std * np.asarray(jax.random.normal(key_sample, actions.shape))
    noise = np.clip(0.2 * np.asarray(jax.random.normal(key_noise, actions.shape)), -0.5, 0.5)
    actions = np.clip(actions + noise, -1, 1)
    h = numpy_h("consistency", nets, model, batch.next_observations, actions, args)
    next_q = numpy_critics(nets.target_critic, batch.next_observations, actions).min(0)
    factor = 0.992 + 0.008 * np.where(h > np.quantile(h, 0.9), 1 / h, 0.9)
    y = batch.rewards + 0.99 * (1 - np.asarray(batch.terminals)) * factor * next_q
    values = numpy_critics(nets.critic, batch.observations, np.asarray(batch.actions))
    close(loss, ((values - y) ** 2).mean(1).sum(), 1e-4)
    close(metrics["train/target"], y.mean(), 1e-4)
    assert 1 <= np.sum(h > np.quantile(h, 0.9)) <= 4 and np.std(h) > 0


@pytest.mark.parametrize("kind", ["critics", "consistency"])
def test_excess_is_that_of_opinions_over_those_on_the_data(kind):
    """H at (s', a') and, for the level, at (s, a): std over the critics, of the student's returns."""
    args, nets, model, batch = small_world()
    args = dataclasses.replace(args, uncertainty=kind, penalty="excess", kappa=3.0, target_noise=0.0, beta=0.6)
    given = None if kind == "critics" else model
    targets = nets.target_critic, nets.target_actor
    _, metrics = critic_loss(nets.critic, *targets, given, batch, jax.random.key(7), args)

    h_of = lambda s, a: numpy_h(kind, nets, model, s, a, args)
    actions = numpy_actor(nets.target_actor, batch.next_observations)
    h = h_of(batch.next_observations, actions)
    excess = np.maximum(h - np.quantile(h_of(batch.observations, batch.actions), 0.6), 0.0)
    next_q = numpy_critics(nets.target_critic, batch.next_observations, actions).min(0)
    y = batch.rewards + 0.99 * (1 - np.asarray(batch.terminals)) * (next_q - 3.0 * excess)
    close(metrics["train/target"], y.mean(), 1e-4)
    close(metrics["train/ood"], (excess > 0).mean(), 1e-6)
    assert 0.05 < (excess > 0).mean() < 0.95


@pytest.mark.parametrize("kind", ["q", "awr"])
def test_actor_loss_is_the_equation(kind):
    args, nets, _, batch = small_world()
    args, key = dataclasses.replace(args, actor_loss=kind), jax.random.key(8)
    loss, _ = actor_loss(nets.actor, nets.target_actor, nets.critic, 1.0, batch, key, args)
    obs, a = np.asarray(batch.observations, float), np.asarray(batch.actions, float)
    mean = numpy_actor(nets.actor, obs)
    log_p = (-0.5 * (a - mean) ** 2 - 0.5 * np.log(2 * np.pi)).sum(-1)  # log std is 0 at first
    if kind == "q":
        q = numpy_critics(nets.critic, obs, mean).min(0)
        wanted = -q.mean() / np.abs(q).mean() - args.gamma_ent * log_p.mean()
    else:
        old, std = numpy_actor(nets.target_actor, obs), np.exp(np.asarray(nets.target_actor["params"]["log_std"]))
        samples = old + std * np.asarray(jax.random.normal(key, (30, *old.shape)), float)
        tiled = np.broadcast_to(obs, (30, *obs.shape))
        value = numpy_critics(nets.critic, tiled, samples).min(0).mean(0)
        weight = np.minimum(np.exp(6 * (numpy_critics(nets.critic, obs, a).min(0) - value)), 100)
        wanted = -np.mean(weight * log_p)
    close(loss, wanted, 1e-4)


def test_gradients_stop_where_the_equations_say():
    args, nets, model, batch = small_world()
    key, sampled = jax.random.key(5), dataclasses.replace(args, sample_target=True)
    loss = lambda *x: critic_loss(*x, model, batch, key, sampled)[0]
    grads = jax.grad(loss, (0, 1, 2))(nets.critic, nets.target_critic, nets.target_actor)
    assert size_of(grads[0]) > 0 and size_of(grads[1:]) == 0
    loss = lambda actor, args: actor_loss(actor, nets.target_actor, nets.critic, 1.0, batch, key, args)[0]
    grads = jax.grad(loss)(nets.actor, args)
    assert all(size_of(x) > 0 for x in jax.tree.leaves(grads))
    grads = jax.grad(loss)(nets.actor, dataclasses.replace(args, gamma_ent=0.0))
    assert size_of(grads["params"].pop("log_std")) == 0 and size_of(grads) > 0  # Q sees the mean only


def test_update_is_in_the_order_of_the_header():
    """Critic step with old targets, target critics, actor with the new critics, target actor; then critics only."""
    args, nets, model, batch = small_world()
    key = jax.random.key(3)
    after, _ = update(nets, model, batch, 8, key, args)
    key_first, key_actor, key_second = jax.random.split(key, 3)
    pick = lambda key: D.sample_batch(batch, key, args.batch_size)
    opts = D.qdq_optimisers(args)[2:]

    def critic_step(critic, opt, target, actor, key):
        key_batch, key_loss = jax.random.split(key)
        loss = lambda p: D.qdq_critic_loss(p, target, actor, model, pick(key_batch), key_loss, args)[0]
        step, opt = opts[1].update(jax.grad(loss)(critic), opt)
        return jax.tree.map(jnp.add, critic, step), opt

    def wanted(nets):
        critic, opt = critic_step(nets.critic, nets.critic_opt, nets.target_critic, nets.target_actor, key_first)
        target = D.polyak(nets.target_critic, critic, args.tau)
        rows = pick(jax.random.split(key_first)[0])
        loss = lambda p: D.qdq_actor_loss(p, nets.target_actor, critic, 1.0, rows, key_actor, args)[0]
        step, actor_opt = opts[0].update(jax.grad(loss)(nets.actor), nets.actor_opt)
        actor = jax.tree.map(jnp.add, nets.actor, step)
        target_actor = D.polyak(nets.target_actor, actor, args.tau)
        return actor, actor_opt, target, target_actor, critic_step(critic, opt, target, target_actor, key_second)[0]

    found = after.actor, after.actor_opt, after.target_critic, after.target_actor, after.critic
    leaves_close(found, jax.jit(wanted)(nets), atol=2e-6)


def test_actor_clones_first():
    args, nets, model, batch = small_world()
    others = nets._replace(critic=jax.tree.map(lambda x: -x, nets.critic))
    for step, same in ((6, True), (8, False)):  # a tenth of 80
        actors = [update(x, model, batch, step, jax.random.key(0), args)[0].actor for x in (nets, others)]
        assert np.array_equal(*(actor["params"]["Dense_0"]["kernel"] for actor in actors)) == same


def test_critic_gradient_is_clipped():
    args, nets, model, batch = small_world()
    scale = lambda factor: batch._replace(rewards=factor * batch.rewards)
    step = jax.jit(lambda b: D.critic_update(nets, model, b, jax.random.key(0), args)[0].critic_opt)
    (_, (moments, *_)), (_, (big, *_)) = step(scale(1.0)), step(scale(1e4))
    norm = lambda tree: float(D.optax.global_norm(tree.mu)) / 0.1
    assert norm(moments) < args.max_grad_norm and norm(big) == pytest.approx(args.max_grad_norm, rel=1e-3)


def test_probes_ask_h_on_the_data_and_off_them():
    """H = own |a| + s_0: what each probe changes, and which rows two seeds flag."""
    data, args = random_batch(), tiny(num_seeds=2)
    ask = lambda *own: probes.metrics(
        lambda own, s, a, key: own[0] * jnp.abs(a).sum(-1) + own[1] * s[..., 0], lambda own, s: 0.9 + 0 * s[:, :2],
        jnp.array(own), data, 0.9, args,
    )  # fmt: skip
    by_action, by_state = ask([1.0, 0.0], [2.0, 0.0]), ask([0.0, 1.0], [0.0, -1.0])
    assert np.all(ask([0.0, 0.0], [0.0, 0.0])["h/overlap"] == 0.0)  # no row is flagged
    near, far = by_action["h/near"], by_action["h/far_action"]
    assert np.all(by_action["h/data"] == by_action["h/far_state"]) and np.all(near != by_action["h/data"])
    np.testing.assert_allclose(far, [1.0, 2.0], rtol=0.1)  # the median of |a_0| + |a_1|, both uniform
    np.testing.assert_allclose(by_action["h/policy"], [1.8, 3.6], rtol=1e-5)
    assert np.all(by_state["h/data"] == by_state["h/near"]) and np.all(by_state["h/data"] == by_state["h/policy"])
    np.testing.assert_allclose(by_action["h/flagged_data"], 0.1, atol=0.01)
    assert np.all(by_action["h/flagged_policy"] == 1.0) and np.all(by_state["h/flagged_far_state"] > 0.25)
    assert np.all(by_action["h/overlap"] == 1.0) and np.all(by_state["h/overlap"] == 0.0)


# --- worlds with known answers ---


def fit_student(entries, args, num_obs, num_actions, seed=0):
    """Teacher and student of one seed on these entries -> QModel."""
    teacher, student, _ = D.make_train(args, num_obs, num_actions)
    state = teacher.init(jax.random.key(seed)[None])
    while int(state.num_updates[0]) < args.teacher_updates:
        state, _ = teacher.chunk(state, entries)
    net = state.nets.net
    state = student.init(jax.random.key(seed + 1)[None], net)
    while int(state.num_updates[0]) < args.student_updates:
        state, _ = student.chunk(state, net, entries)
    return D.QModel(jax.tree.map(lambda x: x[0], state.nets.net), entries.low, entries.high)


FIT = dict(
    teacher_updates=1_500, student_updates=1_500, chunk=500, model_hidden_sizes=(64, 64), teacher_lr=2e-3,
    student_lr=1e-3, model_batch_size=128, num_levels=10, student_tau=0.2, eval_every=2_000, num_updates=2_000,
)  # fmt: skip


@pytest.mark.learning
def test_student_learns_a_known_distribution(optimised):
    """q | c ~ N(10 c_0, (1 + 2 c_1)^2), c_1 in [0, 1]; few levels and steps make it too wide, in the right places."""
    rng = np.random.default_rng(0)
    c = rng.uniform([-1, 0, -1], [1, 1, 1], (20_000, 3))
    q = 10 * c[:, 0] + (1 + 2 * c[:, 1]) * rng.normal(size=len(c))
    low, high = q.min(), q.max()
    entries = D.Entries(*map(jnp.float32, (c, D.scaled(q, low, high), low, high)))
    args = tiny(**FIT)
    model = fit_student(entries, args, 2, 1)
    test = rng.uniform([-0.9, 0, -0.9], [0.9, 1, 0.9], (500, 3))
    mean, h = map(np.asarray, D.q_moments(model, jnp.float32(test), None, args))
    assert np.abs(mean - 10 * test[:, 0]).mean() < 0.8, np.abs(mean - 10 * test[:, 0]).mean()
    true = 1 + 2 * test[:, 1]
    assert 0.7 < np.mean(h / true) < 2.2 and np.corrcoef(h, true)[0, 1] > 0.75, (
        np.mean(h / true),
        np.corrcoef(h, true),
    )
    z = np.random.default_rng(1).normal(size=2_000)
    samples = D.q_samples(model, jnp.float32(test[:50]), jnp.float32(z), args)
    assert np.abs(h[:50] / np.std(samples, -1) - 1).mean() < 0.1  # 8 nodes against 2000 samples


def bandit(num_rows=4_000, seed=0):
    """One step, reward 1 + a: the data's actions lie within 0.3 of 0.3 s, but the best is a = 1."""
    rng = np.random.default_rng(seed)
    s = rng.uniform(-1, 1, (num_rows, 1))
    a = 0.3 * s + rng.uniform(-0.3, 0.3, (num_rows, 1))
    rows = D.Transitions(s, a, 1.0 + a[:, 0], s, np.ones(num_rows))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), rows)


def bandit_policy(**changes):
    """How far above the behaviour's mean 0.3 s the policy acts at 200 states, after num_updates."""
    rates = dict(actor_lr=3e-3, critic_lr=3e-3)
    nets = dict(hidden_sizes=(32, 32), model_hidden_sizes=(8,), nodes=2, batch_size=128)
    args = tiny(**{**FIT, **nets, **rates, **changes})
    model = D.QModel(fresh_net(args, 2), jnp.float32(0.0), jnp.float32(2.0))  # no bootstrap
    policy = D.make_train(args, 1, 1)[2]
    state = policy.init(jax.random.key(2)[None])
    while int(state.num_updates[0]) < args.num_updates:
        state, _ = policy.chunk(state, jax.tree.map(lambda x: jnp.asarray(x)[None], model), bandit())
    s = np.linspace(-1, 1, 200)[:, None]
    return numpy_actor(jax.tree.map(lambda x: x[0], state.nets.actor), s)[:, 0] - 0.3 * s[:, 0]


@pytest.mark.learning
def test_policy_stays_in_the_support_and_climbs(optimised):
    """Where slope of Q / |Q| = 1 and the likelihood's pull, gamma_ent d / (0.03 + d^2), balance: d = 0.055."""
    above = bandit_policy(gamma_ent=0.6)
    assert np.abs(above).max() < 0.3 and 0.02 < above.mean() < 0.15, (np.abs(above).max(), above.mean())


@pytest.mark.learning
def test_without_the_likelihood_it_leaves_the_support():
    assert np.mean(bandit_policy(gamma_ent=0.0, num_updates=1_000) > 0.3) > 0.9


# --- seeds ---


def test_vmapped_seeds_are_mapped_seeds(monkeypatch):
    """One chunk of each phase for two seeds: one after the other, and at once as on an accelerator."""
    args, keys = tiny(model_hidden_sizes=(8,), hidden_sizes=(8,)), jax.random.split(jax.random.key(3), 2)
    data, rng = random_batch(), np.random.default_rng(0)
    c = jnp.concatenate([data.observations, data.actions], 1)
    entries = D.Entries(c, jnp.float32(rng.uniform(-1, 1, len(c))), jnp.float32(-5.0), jnp.float32(9.0))

    def train():
        teacher, student, policy = D.make_train(args, 3, 2)
        first, _ = teacher.chunk(teacher.init(keys), entries)
        second, _ = student.chunk(student.init(keys, first.nets.net), first.nets.net, entries)
        model = D.QModel(second.nets.net, jnp.full(2, entries.low), jnp.full(2, entries.high))
        return first.nets.net, second, policy.chunk(policy.init(keys), model, data)[0].nets

    mapped = train()
    monkeypatch.setattr(runner, "map_seeds", lambda function, xs, args: jax.vmap(function)(xs))
    leaves_close(train(), mapped, atol=5e-3)
    assert not np.allclose(*mapped[2].actor["params"]["Dense_0"]["kernel"])


# --- the whole script ---


@pytest.fixture(scope="module")
def whole_run(dataset, tmp_path_factory):
    """A run of two seeds through all phases -> args, folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    args = tiny(dataset=dataset, out=str(folder), num_seeds=2, angles="2")
    D.main(args)
    return args, folder


def arrays_of(path):
    with np.load(path, allow_pickle=False) as file:
        return {k: file[k] for k in file.files}


@pytest.fixture(scope="module")
def one_student(whole_run, tmp_path_factory):
    """The student of the first seed alone, which serves any number of them."""
    path, arrays = tmp_path_factory.mktemp("student") / "q_model.npz", arrays_of(whole_run[1] / "q_model.npz")
    envs.buffers.write_npz(path, {k: x[:1] if x.ndim else x for k, x in arrays.items()})
    return str(path)


def test_run_leaves_what_it_promises(whole_run):
    records = [json.loads(line) for line in (whole_run[1] / "log.jsonl").read_text().splitlines()[1:]]
    for key, steps in (
        ("teacher/loss", [40, 40]), ("student/error_held", [40, 40]), ("h/overlap", [40, 40, 80, 80]),
        ("eval/return", [40, 40, 80, 80]),
    ):  # fmt: skip
        assert [r["step"] for r in records if key in r] == steps, key
    keys = ("target", "h", "h_p10", "h_p50", "h_p90", "ood", "penalty", "log_p", "log_std", "distance")
    assert all(f"train/{key}" in r for r in records if "eval/return" in r for key in keys)


def test_the_studys_figures_are_drawn_from_a_finished_run(whole_run, tmp_path):
    folder = shutil.copytree(whole_run[1], tmp_path / "run")
    qdq_figures.main([str(folder)])
    assert all((folder / f"{name}.png").stat().st_size > 5_000 for name in ("uncertainty", "distributions"))
    with pytest.raises(SystemExit, match=r"holds no run of qdq\.py"):
        qdq_figures.main([str(tmp_path)])


def test_student_of_another_run(whole_run, tmp_path):
    """The same policy; and a resumed run is held to the H it began with, not to what the file holds now."""
    args, folder = whole_run
    arrays, student = arrays_of(folder / "q_model.npz"), tmp_path / "q_model.npz"
    envs.buffers.write_npz(student, arrays)
    args = dataclasses.replace(args, out=str(tmp_path / "run"), student=str(student))
    D.main(args)
    assert not (tmp_path / "run" / "student").exists()
    whole, again = (arrays_of(path / "state.npz") for path in (folder, tmp_path / "run"))
    for key in whole.keys() - {"meta_json"}:
        np.testing.assert_array_equal(whole[key], again[key], err_msg=key)
    last = max(k for k in arrays if k.endswith("kernel"))
    envs.buffers.write_npz(student, arrays | {last: arrays[last] + 1.0})
    with pytest.raises(envs.InputError, match="student was"):
        D.main(dataclasses.replace(args, resume=True))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(gamma=0.9), r"gamma was 0\.99 and is now 0\.9"),
        (dict(window=10), r"windows was \[20, 1\] and is now \[10, 1\]"),
        (dict(normalize=False), "normalize was True"),
        (dict(group_size=4), "group_size was 8 and is now 4"),  # the same shapes, another network
        (dict(reward_shift=-1.0), r"reward_shift was 0\.0"),
        (dict(max_rows=7_900), "the data have other observations, actions, rewards"),
        (dict(num_seeds=3), "another size or number of seeds"),
        (dict(student="nowhere.npz"), "nowhere.npz: cannot be read .*; name what this script wrote"),
    ],
)  # fmt: skip
def test_student_of_other_data_or_flags_is_refused(changes, message, whole_run, tmp_path):
    args = dataclasses.replace(whole_run[0], out=str(tmp_path / "run"), student=str(whole_run[1] / "q_model.npz"))
    with pytest.raises(envs.InputError, match=message):
        D.main(dataclasses.replace(args, **changes))


OTHERS = {
    "awr": dict(actor_loss="awr", weight="antmaze", layer_norm=True),
    "diverse": dict(weight="antmaze-diverse", spread="mc", num_samples=4, sample_target=True, policy_delay=1),
    "critics": dict(student="", uncertainty="critics", num_critics=3, penalty="excess", layer_norm=True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_flags_run(name, one_student, dataset, tmp_path):
    rest = dict(num_seeds=2, num_updates=20, eval_every=20, teacher_updates=20, student_updates=20)
    rest |= dict(student=one_student, angles="2")
    result = D.main(tiny(dataset=dataset, out=str(tmp_path / "run"), **{**rest, **OTHERS[name]}))
    assert np.isfinite(result["score"]) and (tmp_path / "run" / "q_model.npz").exists() == (name != "critics")


def test_learns_on_the_point_robot(one_student, dataset, tmp_path, optimised):
    """Behaviour: about 0 (ten headings). The margin of 50 is half of the best episode's return."""
    budget = dict(student=one_student, angles="2", num_updates=1_500, chunk=100, eval_every=1_500, eval_episodes=2)
    nets = dict(model_hidden_sizes=TINY["model_hidden_sizes"], hidden_sizes=(32, 32))
    flags = {**D.QUICK, "teacher_updates": 100, "student_updates": 100, **budget, **nets}
    result = D.main(D.Args(dataset=dataset, out=str(tmp_path / "run"), **flags))
    assert abs(result["data_mean"]) < 5 and result["last"] > 50, result


# --- flags ---


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(policy_delay=3), "multiple of --policy-delay"),
        (dict(teacher_updates=30), "--chunk must divide"),
        (dict(group_size=5), "multiples of --group-size"),
        (dict(group_size=1), "--group-size must not be 1"),
        (dict(beta=1.0), "--beta must be above 0 and below 1"),
        (dict(nodes=1), "--nodes"),
        (dict(spread="mc", num_samples=1), "--num-samples must be 2"),
        (dict(num_levels=2), "--num-levels"),
        (dict(student_tau=0.0), "--student-tau must"),
        (dict(uncertainty="critics", num_critics=1), "--num-critics 2"),
        (dict(uncertainty="critics", student="x"), "--student goes with"),
        (dict(window=90), r"D_Q has \d+ entries, fewer than the 5000"),
    ],
)
def test_refusals(changes, message, dataset, tmp_path):
    with pytest.raises(envs.InputError, match=message):
        D.main(tiny(dataset=dataset, out=str(tmp_path / "run"), **changes))


def test_flags_of_the_published_sets_fit_one_another():
    """Our own forms are off in them, and a' is drawn wherever gamma_ent > 0."""
    for preset in D.PUBLISHED.values():
        args = D.Args(**preset)
        D.check_args(args)
        assert (args.uncertainty, args.penalty, args.num_critics) == ("consistency", "product", 2)
        assert not (args.scale_rewards or args.holdout) and args.sample_target == (args.gamma_ent > 0)
