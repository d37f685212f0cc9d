"""wurl_sac.py against goldens, plain numpy and worlds with known answers."""

import dataclasses
import functools
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import envs
import runner
import wurl_sac as W
from envs.distances import pairwise_apwd, same_pairs, unit_directions
from runner import devices, diversity
from tests.oracles import common
from tests.oracles.common import leaves_close, mlp, of_seed, size_of

ROOT = Path(__file__).resolve().parents[1]
PAIRS = sorted(path.stem for path in common.GOLDEN.glob("apwd_pairwise_*.npz"))
TINY = dict(
    task="point", num_policies=3, num_envs=1, updates_per_step=0.1, num_updates=40, chunk=10, eval_every=20,
    warmup_steps=200, hidden_sizes=(16, 16), batch_size=32, replay_size=500, eval_episodes=4, reward_scale=1.0,
)  # fmt: skip


def tiny(**changes):
    return W.Args(**{**TINY, **changes})


def same(observations):
    """A task that observes all of its world."""
    return observations


@functools.partial(jax.jit, static_argnames="args")
def apwd_reward(source, alive, target, target_alive, directions, args):
    """Lines (2) to (5): features [K, N, L, d] of source and target -> pseudo-reward, distances [K, K]."""
    points = lambda x: x.reshape(len(x), -1, *x.shape[3:])
    cost = pairwise_apwd(*map(points, (source, alive, target, target_alive)), directions)
    return W.apwd_reward(cost, jnp.zeros(alive.shape), alive, 0.0, args), cost.sum(-1) / alive.sum((1, 2))[:, None]


critic_loss = jax.jit(W.wurl_critic_loss, static_argnames="args")
actor_loss = jax.jit(W.wurl_actor_loss, static_argnames="args")


# --- the pseudo-reward ---


@pytest.mark.parametrize("name", PAIRS)
def test_reward_golden(name):
    g = common.golden(name)
    K, D, _ = g["S"].shape
    f = lambda x: jnp.asarray(x, jnp.float32)
    ones = lambda x: jnp.ones(x.shape[:2], bool)
    scale, bc = float(g["scale"]), int(g["bc"])
    for rescale, expected in ((True, g["reward_rescaled"]), (False, g["reward_unscaled"])):
        args = tiny(num_policies=K, reward_scale=scale, rescale_episodes=rescale)
        # an episode of D steps in a round of bc columns: the nominal length is bc
        columns = max(bc, D)
        source = jnp.zeros((K, 1, columns, g["S"].shape[-1])).at[:, 0, :D].set(f(g["S"]))
        alive = jnp.broadcast_to(jnp.arange(columns) < D, (K, 1, columns))
        target, there = f(g["Tg"])[:, None], ones(g["Tg"])[:, None]
        reward, distances = apwd_reward(source, alive, target, there, f(g["V"]), args=args)
        np.testing.assert_allclose(distances, g["pair_w"], atol=1e-4)
        factor = columns / bc if rescale else 1.0  # golden: bc / D also where D > bc
        np.testing.assert_allclose(reward[:, 0, :D], expected * factor, rtol=2e-4, atol=2e-4 * scale)
        assert np.all(np.asarray(reward)[:, 0, D:] == 0.0)


def test_reward_pays_the_state_an_action_leads_to():
    """Two straight runs apart from their first step on: the last step, the farthest, earns most; r_t is s_{t+1}'s."""
    t = jnp.arange(1, 11, dtype=jnp.float32)
    features = jnp.stack([jnp.stack([t, 0 * t], -1), jnp.stack([-t, 0 * t], -1)])[:, None]
    alive = jnp.ones((2, 1, 10), bool)
    args = tiny(num_policies=2)
    reward, distances = apwd_reward(features, alive, features, alive, jnp.eye(2)[:1], args=args)
    # along x the monotone plan pairs rank with rank: 1..10 with -10..-1, each 11 away
    np.testing.assert_allclose(reward, 11.0, atol=1e-5)
    np.testing.assert_allclose(distances, [[0, 11], [11, 0]], atol=1e-5)


@pytest.mark.parametrize("lengths", [(8, 5), (8, 8)])
def test_rescaling_gives_short_episodes_the_same_total_and_pwd_pays_it_at_the_last_step(lengths):
    features, lengths = jax.random.normal(jax.random.key(1), (3, 2, 8, 2)), np.array(lengths)
    alive = jnp.broadcast_to((jnp.arange(8) < lengths[:, None])[None], (3, 2, 8))
    inputs = features, alive, features, alive, unit_directions(jax.random.key(2), 4, 2)
    dense, _ = apwd_reward(*inputs, args=tiny(rescale_episodes=False))
    rescaled, _ = apwd_reward(*inputs, args=tiny())
    np.testing.assert_allclose(rescaled, dense * (8 / lengths)[:, None], rtol=1e-5)
    sparse, _ = apwd_reward(*inputs, args=tiny(objective="pwd"))
    np.testing.assert_allclose(sparse.sum(-1), dense.sum(-1) / lengths, rtol=1e-5)
    assert np.count_nonzero(sparse) == 6 and np.all(sparse[:, [0, 1], lengths - 1] > 0)


def test_nearest_is_chosen_for_each_episode():
    """Policy 0's two episodes lie beside different neighbours: each is paid the distance to its own."""
    near = lambda x: jnp.full((4, 1), x) + jnp.linspace(0, 0.01, 4)[:, None]
    features = jnp.stack([jnp.stack([near(0.0), near(10.0)]), jnp.stack([near(1.0)] * 2), jnp.stack([near(12.0)] * 2)])
    alive = jnp.ones((3, 2, 4), bool)
    # each policy's points are pooled as targets; policy 0's episodes as sources meet half of a target's points each
    reward, _ = apwd_reward(features, alive, features, alive, jnp.ones((1, 1)), args=tiny(num_policies=3))
    np.testing.assert_allclose(reward[0, 0], 1.0, atol=0.02)
    np.testing.assert_allclose(reward[0, 1], 2.0, atol=0.02)


def test_own_cost_is_that_of_the_other_episodes_of_a_policy():
    """Against plans of one episode and another, one pair after the other; an episode that ended early among them."""
    features, v = jax.random.normal(jax.random.key(0), (2, 3, 6, 2)), unit_directions(jax.random.key(1), 4, 2)
    alive = jnp.ones((2, 3, 6), bool).at[1, 2, 4:].set(False)
    for plan in ("mean", "cheapest"):
        found = W.own_cost(features, alive, v, tiny(own_weight=1.0, plan=plan))
        for k, e in itertools.product(range(2), range(3)):
            one = lambda e: (features[k, e][None], alive[k, e][None])  # noqa: B023
            others = [pairwise_apwd(*one(e), *one(o), v, plan)[0, 0] for o in range(3) if o != e]
            np.testing.assert_allclose(found[k, e], np.mean(others, 0), atol=1e-5)
    assert not W.own_cost(features, alive, v, tiny()).any()
    assert not W.own_cost(features[:, :1], alive[:, :1], v, tiny(own_weight=1.0)).any()


def test_what_a_policy_costs_itself_is_taken_off_its_pay_and_off_the_distance_to_it():
    cost, alive = jnp.array([[0.0, 5, 6], [5, 0, 9], [6, 9, 0]]), jnp.ones((3, 1, 1), bool)
    own = jnp.array([1.0, 2, 8])[:, None, None]
    pay = lambda weight, **flags: W.apwd_reward(cost[..., None], own, alive, weight, tiny(**flags))[:, 0, 0].tolist()
    assert pay(0.0) == [5, 5, 6]
    assert pay(0.5) == [4.5, 4, 2]
    assert pay(0.0, nearest="debiased") == [6, 5, 6]  # from 0 it is 5 - 2 / 2 to the narrow 1, 6 - 8 / 2 to the wide 2


def test_own_weight_grows_over_the_run_and_pay_is_held_at_a_size():
    features = jax.random.normal(jax.random.key(0), (3, 2, 8, 2))
    alive, key = jnp.ones((3, 2, 8), bool), jax.random.key(1)
    args = tiny(own_weight=0.8)
    reward = jax.jit(lambda share: W.pseudo_reward({}, (), None, features, alive, key, share, args)[0])
    own = W.own_cost(features, alive, unit_directions(jax.random.split(key)[0], 8, 2), args)
    for share, weight in ((0.3, 0.0), (0.6, 0.4), (0.9, 0.8)):
        np.testing.assert_allclose(reward(share), reward(0.0) - weight * own, atol=1e-5)

    size, args, begun = jnp.float32(0), tiny(reward_size=2.0), reward(0.0)
    for _ in range(200):
        paid, size = W.held(begun, alive, size, args)
    np.testing.assert_allclose(jnp.abs(paid).mean(), 2.0, rtol=1e-5)
    assert np.abs(W.held(10 * begun, alive, size, args)[0]).mean() > 15  # a leap is not hidden from the policies
    assert W.held(paid, alive, size, tiny())[0] is paid


# --- other objectives ---


def test_diayn_and_dads_rewards_against_numpy():
    args = tiny(objective="diayn", reward_scale=2.0)
    K, (features, change) = 3, jax.random.normal(jax.random.key(0), (2, 3, 2, 5, 2))
    net = W.init_net(jax.random.key(1), 2, 4, args)
    logits = mlp(net["params"], features)
    log_q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    own = np.moveaxis(np.diagonal(log_q, axis1=0, axis2=-1), -1, 0)
    expected = 2 * (np.log(K) + np.maximum(own, -10 * np.log(K)))  # above 0 for better than chance: living is no loss
    np.testing.assert_allclose(W.diayn_reward(net, features, args), expected, atol=1e-5)

    net = W.init_net(jax.random.key(1), 2, 4, tiny(objective="dads"))
    reward = np.asarray(W.dads_reward(net, features, change, args))
    for k in range(K):
        means = [mlp(net["params"], np.concatenate([features[k, 1, 3], row])) for row in np.eye(K)]
        log_p = [-0.5 * np.sum((np.asarray(change[k, 1, 3]) - mean) ** 2) for mean in means]
        ratio = sum(np.exp(np.clip(log_p[other] - log_p[k], -20, 1)) for other in range(K) if other != k)
        np.testing.assert_allclose(reward[k, 1, 3], 2 * (np.log(K) - np.log(1 + ratio)), atol=1e-4)


@pytest.mark.parametrize("objective", ["diayn", "dads"])
@pytest.mark.parametrize("lengths, steps", [((5, 3), 8), ((20, 20), 40)])
def test_the_net_takes_a_step_for_each_step_that_happened(objective, lengths, steps):
    """Where episodes end early their few rows are not learnt by heart: a policy's two episodes of 20 may be 5 and 3."""
    args, opt = tiny(objective=objective, num_policies=3), optax.adam(1e-3)
    net = W.init_net(jax.random.key(1), 2, 4, args)
    features = jax.random.normal(jax.random.key(0), (3, 2, 20, 2))
    alive = jnp.broadcast_to(jnp.arange(20) < jnp.array(lengths)[:, None], (3, 2, 20))
    learn = jax.jit(lambda net, opt: W.pseudo_reward(net, opt, None, features, alive, jax.random.key(2), 0.0, args)[2:])
    learnt, state = learn(net, opt.init(net))
    assert int(state[0].count) == steps
    assert any(np.any(x != y) for x, y in zip(jax.tree.leaves(net), jax.tree.leaves(learnt), strict=True))


def test_metra_reward_and_loss_against_numpy():
    args, K = tiny(objective="metra", num_policies=3, metra_lambda=5.0), 3
    net = W.init_net(jax.random.key(1), 2, 4, args)
    before, after = jax.random.normal(jax.random.key(0), (2, 7, 4))
    index = np.arange(7) % K
    phi = lambda x: mlp(net["phi"]["params"], x)
    change = phi(after) - phi(before)
    z = np.array([[1, -0.5, -0.5], [-0.5, 1, -0.5], [-0.5, -0.5, 1]])[index]
    found, along = W.metra_change(net, before, after, index, args)
    np.testing.assert_allclose(found, change, atol=1e-5)
    np.testing.assert_allclose(along, (change * z).sum(-1), atol=1e-5)
    slack = np.minimum(1e-3, 1 - (change**2).sum(-1))
    assert (slack < 0).any()
    np.testing.assert_allclose(W.metra_loss(net, before, after, index, args), -along.mean(), atol=1e-5)
    # gradients: of phi against -(along + lambda slack), of log lambda lambda slack: it grows while steps are too long
    grads = jax.grad(W.metra_loss)(net, before, after, index, args)
    np.testing.assert_allclose(grads["log_lambda"], 5.0 * slack.mean(), rtol=1e-4)

    def objective(params):
        change, along = W.metra_change({"phi": params}, before, after, index, args)
        return -jnp.mean(along + 5.0 * jnp.minimum(1e-3, 1 - (change**2).sum(-1)))

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4), grads["phi"], jax.grad(objective)(net["phi"])
    )


@pytest.mark.learning
def test_metra_spreads_on_the_point_robot(tmp_path, optimised):
    """It is told of no feature, and leaves its start in ways that are apart: untrained policies are 0.2 m apart."""
    flags = W.POINT | W.QUICK | W.OBJECTIVES["metra"] | dict(num_policies=3, num_updates=1_000)
    found = W.main(W.Args(**flags, objective="metra", out=str(tmp_path)))
    assert found["eval/w1_margin"] > 1.0 and found["eval/w1_same"].tolist() == [], found


@pytest.mark.parametrize("objective", ["diayn", "dads", "metra"])
def test_other_objectives_learn_their_network(objective):
    args, env, task = tiny(objective=objective), envs.make("point"), envs.task("point")
    init, warmup, train_chunk, _ = W.make_train(args, env, task, same, 100)
    begun = jax.eval_shape(init, jax.random.key(0))
    state, (_, _, steps, _) = jax.eval_shape(warmup, begun)  # both programs fit together
    jax.eval_shape(train_chunk, state)

    rng = np.random.default_rng(0)
    features = jnp.cumsum(jnp.float32(rng.normal(size=(3, 1, 100, 2))), 2)
    net = W.init_net(jax.random.key(0), 2, 4, args)
    like = jax.tree.map(lambda x: x.shape, net)
    assert jax.tree.map(lambda x: x.shape, begun.net) == like and steps.alive.shape[-3:] == features.shape[:3]
    learn = jax.jit(functools.partial(W.pseudo_reward, args=args))
    opt = W.optax.adam(args.discriminator_lr).init(net)
    walked = jnp.concatenate([features, features], -1)  # the observations of the point robot are 4 numbers
    rows = envs.Transition(walked, None, walked + 0.1 * jnp.arange(3.0)[:, None, None, None], None, None)
    inputs = rows, features, jnp.ones((3, 1, 100), bool), jax.random.key(1), 0.0
    reward, _, after, _ = learn(net, opt, *inputs)
    again, *_ = learn(after, opt, *inputs)
    still = [size_of(x) == 0 for x in jax.tree.leaves(jax.tree.map(jnp.subtract, after, net))]
    assert sum(still) == (objective == "metra")  # the last bias of phi falls out of phi(s') - phi(s)
    assert np.isfinite(reward).all() and again.mean() > reward.mean()  # it tells the policies apart better than before


# --- SAC ---


@functools.cache
def sac_case():
    """args, an agent whose target is another critic, six rows, two of them terminal, a key."""
    args, keys = tiny(alpha=0.3, batch_size=6, lr_decay=0.0), jax.random.split(jax.random.key(0), 5)
    agents = jax.jit(jax.vmap(lambda key: W.init_agent(key, args, envs.make("point"), same)))(keys[:2])
    obs, actions = jax.random.normal(keys[2], (6, 4)), jnp.tanh(jax.random.normal(keys[3], (6, 2)))
    batch = W.Transitions(obs, actions, obs[:, 0], obs + 0.1, jnp.array([0.0, 1.0, 0, 0, 1, 0]))
    return args, of_seed(agents)._replace(target=of_seed(agents.critic, 1)), batch, keys[4]


def test_critic_loss_oracle_and_gradients():
    args, agent, batch, key = sac_case()
    loss = lambda *params: critic_loss(*params, 0.3, batch, key, args=args)[0]
    noise = jax.random.normal(key, batch.actions.shape)
    actions, log_prob = common.gaussian_actor(agent.actor, batch.next_observations, noise, args)
    next_q = common.twin_q(agent.target, batch.next_observations, actions).min(0)
    live = 1 - np.asarray(batch.terminals)  # a terminal stops bootstrapping, nothing else does
    y = np.asarray(batch.rewards) + args.gamma * live * (next_q - 0.3 * log_prob)
    q = common.twin_q(agent.critic, batch.observations, batch.actions)
    params = agent.critic, agent.target, agent.actor
    np.testing.assert_allclose(loss(*params), ((q - y) ** 2).mean(-1).sum(), rtol=1e-5)
    grads = jax.grad(loss, (0, 1, 2))(*params)
    assert size_of(grads[0]) > 0 and size_of(grads[1:]) == 0


def test_actor_loss_oracle_and_gradients():
    args, agent, batch, key = sac_case()
    loss = lambda actor: actor_loss(actor, agent.critic, 0.3, batch, key, args=args)
    noise = jax.random.normal(key, batch.actions.shape)
    actions, log_prob = common.gaussian_actor(agent.actor, batch.observations, noise, args)
    q = common.twin_q(agent.critic, batch.observations, actions).min(0)
    found, metrics = loss(agent.actor)
    np.testing.assert_allclose(found, (0.3 * log_prob - q).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["train/entropy"], -log_prob.mean(), rtol=1e-5)
    grads = jax.grad(lambda actor: loss(actor)[0])(agent.actor)
    direction = jax.tree.map(lambda x: jax.random.normal(jax.random.key(7), x.shape), agent.actor)
    at = lambda h: float(loss(jax.tree.map(lambda p, d: p + h * d, agent.actor, direction))[0])
    slope = sum(float((g * d).sum()) for g, d in zip(*map(jax.tree.leaves, (grads, direction)), strict=True))
    np.testing.assert_allclose((at(2e-4) - at(-2e-4)) / 4e-4, slope, rtol=3e-2)


def test_alpha_moves_towards_the_target_entropy():
    rises = jax.grad(W.wurl_alpha_loss)(0.0, 1.0, 2.0)  # entropy below target: alpha must grow
    assert rises < 0 < jax.grad(W.wurl_alpha_loss)(0.0, 3.0, 2.0)


def test_update_order():
    """The actor steps against the critics after their step, and the target follows the new critics."""
    args, agent, batch, key = sac_case()
    ring = W.ring_init(of_seed(batch), 6)
    ring = W.ring_insert(ring, batch, jnp.ones(6, bool))
    new, _ = jax.jit(W.wurl_update, static_argnums=(3, 4))(agent, ring, key, args, same)
    key_batch, _, key_actor = jax.random.split(key, 3)
    rows = W.ring_sample(ring, key_batch, 6)
    alpha = jnp.exp(agent.log_alpha)
    grads = jax.grad(lambda p: actor_loss(p, new.critic, alpha, rows, key_actor, args=args)[0])(agent.actor)
    step, opt = W.adam(args).update(grads, agent.actor_opt)
    leaves_close((new.actor, new.actor_opt), (W.optax.apply_updates(agent.actor, step), opt), atol=1e-6)
    wanted = jax.tree.map(lambda old, online: 0.995 * old + 0.005 * online, agent.target, new.critic)
    leaves_close(new.target, wanted, atol=1e-6)


# --- ring ---


def test_ring_wraps_and_drops_masked_rows():
    ring = W.ring_init({"x": jnp.float32(0)}, 5)
    insert = lambda ring, values, mask: W.ring_insert(ring, {"x": jnp.array(values, jnp.float32)}, jnp.array(mask))
    ring = insert(ring, [1.0, 99.0, 2.0], [True, False, True])
    assert (int(ring.size), int(ring.position)) == (2, 2)
    drawn = W.ring_sample(ring, jax.random.key(0), 200)["x"]
    assert set(np.unique(drawn)) == {1.0, 2.0}  # never a row that was not written
    ring = insert(ring, [3.0, 4.0, 5.0, 6.0], [True] * 4)
    assert (int(ring.size), int(ring.position)) == (5, 1)
    np.testing.assert_array_equal(ring.rows["x"], [6, 2, 3, 4, 5])


# --- rollouts and buffers ---


class Cliff(envs.Env):
    """Counts steps; ends, truly, at the third one. Everything that a rollout must keep apart is visible in it."""

    def __init__(self):
        base = envs.task("point")
        task = dataclasses.replace(base, terminal=lambda t: t.next_observations[..., 0] >= 3)
        super().__init__(task, "jax")

    def _start(self, key):
        return jnp.float32(0)

    def _advance(self, physics, action):
        return physics + 1, jnp.zeros(2)

    def _read(self, physics):
        return jnp.full(4, physics), jnp.full(2, physics)


def test_rollout_keeps_true_successors_and_ends():
    actor = W.actor_net(tiny(), 2).init(jax.random.key(0), jnp.zeros((1, 4)))
    steps = W.rollout(actor, jax.random.key(1), Cliff(), tiny(), same, 2, 6)
    np.testing.assert_array_equal(steps.transition.observations[0, :, 0], [0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(steps.transition.next_observations[0, :, 0], [1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(steps.alive[0], [1, 1, 1, 0, 0, 0])
    assert bool(steps.terminals[0, 2]) and not bool(steps.terminals[0, 1])


def test_rollout_log_probs_are_the_density_of_the_actions():
    args, env = tiny(), envs.make("point")
    net = W.actor_net(args, 2)
    actor = net.init(jax.random.key(0), jnp.zeros((1, 4)))
    steps = W.rollout(actor, jax.random.key(1), env, args, same, 3, 5)
    mean, log_std = map(np.asarray, net.apply(actor, steps.transition.observations))
    u = np.arctanh(np.asarray(steps.transition.actions, np.float64))
    _, expected = common.tanh_normal(mean, log_std, (u - mean) / np.exp(log_std))
    np.testing.assert_allclose(steps.log_probs, expected, atol=1e-3)
    steps = W.rollout(actor, jax.random.key(1), env, args, same, 3, 5, random=True)
    np.testing.assert_allclose(steps.log_probs, -2 * np.log(2), atol=1e-6)


def test_restart_begins_anew_where_an_episode_ends():
    """Random hoppers fall within 50 steps: without restart nothing happens after it, with it all steps do."""
    args, env, length = tiny(), envs.make("hopper"), 120
    actor = W.actor_net(args, 3).init(jax.random.key(0), jnp.zeros(11))
    one = jax.jit(lambda key, restart: W.rollout(actor, key, env, args, same, 4, length, True, restart),
                  static_argnums=1)  # fmt: skip
    whole, cut = (jax.tree.map(np.asarray, one(jax.random.key(1), restart)) for restart in (True, False))
    assert whole.alive.all() and not cut.alive[:, -1].any() and cut.alive.sum() < 0.6 * whole.alive.sum()
    assert (whole.terminals.sum(1) >= 2).all()
    nexts, obs = whole.transition.next_observations[:, :-1], whole.transition.observations[:, 1:]
    goes_on = (nexts == obs).all(-1)
    np.testing.assert_array_equal(goes_on, ~whole.terminals[:, :-1])
    after = obs[whole.terminals[:, :-1]]
    assert np.abs(after[:, 0] - 1.25).max() < 0.006 and len(np.unique(after[:, 0])) == len(after)  # fresh starts


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole tiny run -> folder, metrics."""
    folder = tmp_path_factory.mktemp("wurl") / "run"
    return folder, W.main(tiny(out=str(folder)))


def test_run_leaves_everything(run):
    folder, metrics = run
    for name in ("args.json", "log.jsonl", "state.npz", "policy.npz", "trajectories.png", "distances.png"):
        assert (folder / name).stat().st_size > 0, name
    assert metrics["eval/min_w"] > 0 and 0 <= metrics["eval/disc_success"] <= 1
    assert metrics["eval/w1"].shape == (3, 3) and metrics["eval/w1_closest"] <= metrics["eval/w1_nearest"]
    assert 1 <= max(metrics["eval/cells_each"]) <= metrics["eval/cells"] <= sum(metrics["eval/cells_each"])
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert records[0]["args"]["task"] == "point"
    assert [r["step"] for r in records[1:]] == [20, 40]
    assert not (folder / "rows").exists()


def test_buffers_hold_all_that_happened(run):
    folder, _ = run
    args = tiny()
    num_warmup, _, num_rounds = W.round_sizes(args, 100)
    for k in range(3):
        buffer = envs.buffers.load(folder / f"buffers/policy_{k:02d}.npz")
        assert len(buffer) == (num_warmup + num_rounds) * 100
        assert buffer.metadata["reward_kind"] == "none" and buffer.metadata["warmup_transitions"] == num_warmup * 100
        assert buffer["timeouts"].sum() == num_warmup + num_rounds and not buffer["terminals"].any()
        task = envs.task("point-angle-0")
        t = envs.Transition(*(buffer[key] for key in envs.Transition._fields[:5]))
        np.testing.assert_allclose(task.reward(t), t.next_observations[:, 2], atol=1e-5)
        assert buffer["pseudo_rewards"].std() > 0


@pytest.mark.parametrize("torn", [False, True])
def test_a_finished_run_has_nothing_to_resume(run, tmp_path, capsys, torn):
    """Killed while its row files went, its newest state torn or not: the rest goes, and all else stays as it is."""
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    (folder / "rows").mkdir()
    (folder / "rows" / "policy_01.rows").write_bytes(b"1")
    if torn:
        (folder / "state.npz").write_bytes(b"PK")
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file() and path.suffix != ".rows"}
    assert W.main(tiny(out=str(folder), resume=True)) == {}
    assert "this run is finished" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()} == before


def test_rows_and_records_of_a_run_killed_in_two_evaluations(run, tmp_path, monkeypatch):
    """At 20 no saved state counts the newest rows, at 40 the last record is missing: it ends as the whole run."""
    args = tiny(out=str(tmp_path / "cut"))
    for at in (20, 40):

        def cut(step, metrics, args, warn, at=at):
            if step == at:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(W.diversity, "show_evaluation", cut)
            W.main(dataclasses.replace(args, resume=at > 20))
    W.main(dataclasses.replace(args, resume=True))
    for k in range(args.num_policies):
        a, b = (envs.buffers.load(p / f"buffers/policy_{k:02d}.npz") for p in (run[0], tmp_path / "cut"))
        assert a.metadata["sha256"] == b.metadata["sha256"]
        assert a.metadata["warmup_transitions"] == b.metadata["warmup_transitions"] == 200
    last = [json.loads((p / "log.jsonl").read_text().splitlines()[-1]) for p in (run[0], tmp_path / "cut")]
    a, b = ({k: v for k, v in record.items() if not k.startswith("time/")} for record in last)
    assert a == b and "train/q" in a and "train/min_w" in a


def test_features_are_of_the_state_an_action_leads_to():
    task = envs.task("point")
    before, after = np.zeros((5, 4), np.float32), np.arange(20, dtype=np.float32).reshape(5, 4)
    t = envs.Transition(before, before[:, :2], after, before[:, :2], before[:, :2])
    for features, index in (("task", [0, 1]), ("full", [0, 1, 2, 3]), ("3,0", [3, 0])):
        args = tiny(div_features=features)
        np.testing.assert_array_equal(W.feature_function(args, task)(t), after[:, index])
        names = task.feature_names if features == "task" else tuple(f"s'[{i}]" for i in index)
        assert diversity.feature_names(args, task) == names


def test_feature_scales():
    task = envs.task("cheetah")
    t = envs.Transition(*(np.ones((3, n), np.float32) for n in (17, 6, 17, 2, 2)))
    scaled = W.feature_function(W.Args(feature_scales=(1.0, 10.0)), task)(t)
    np.testing.assert_allclose(scaled, [[1.0, 10.0]] * 3)
    parse = lambda *flags: runner.parse(W.Args, ["--task", "cheetah", *flags], W.preset)
    args = parse()
    assert (args.div_features, args.feature_scales) == ("0", (10.0,))
    assert parse("--div-features", "0").feature_scales == (10.0,)
    assert parse("--div-features", "full").feature_scales == parse("--div-features", "task").feature_scales == ()
    both = parse("--div-features", "task", "--feature-scales", "1", "10")
    assert both.feature_scales == (1.0, 10.0)
    W.check_args(both, task, 200)
    with pytest.raises(envs.InputError, match="--feature-scales: none, or 2"):
        W.check_args(dataclasses.replace(both, feature_scales=(1.0,)), task, 200)


@pytest.mark.parametrize(
    "flags, wanted",
    [  # rounds of 4 x 200 x 0.25 = 200, 3 x 100 and 200 updates
        ("--task ant", (200, 4_000, 36_000)),
        ("--task point --num-envs 3", (600, 1_200, 30_000)),
        ("--task point --num-envs 2", (400, 1_600, 30_000)),  # 2 is also the default
        ("--quick --num-envs 2 --chunk 50", (200, 1_600, 6_000)),
        ("--task ant --num-updates 130 --eval-every 1", (200, 200, 200)),
    ],
)
def test_budgets_are_rounded_to_whole_rounds(flags, wanted, capsys):
    args = W.open_world(runner.parse(W.Args, flags.split(), W.preset))[0]
    assert (args.chunk, args.eval_every, args.num_updates) == wanted
    assert not capsys.readouterr().out  # an error may follow, and stands alone
    runner.announce()
    assert "in whole rounds of " in capsys.readouterr().out.splitlines()[-1]


def test_quick_refuses_a_preset():
    with pytest.raises(envs.InputError, match="leave --preset out"):
        W.preset(W.Args(quick=True, preset="paper"))


@pytest.mark.parametrize(
    "world",
    ["ant", "cheetah", "point", "tree-maze", "humanoid", "brax/ant", "halfcheetah", "hopper", "ant-maze-umaze"],
)
def test_presets_fit_every_world(world):
    task = envs.task(world)
    for flags in ([], ["--preset", "paper"], ["--episode-length", "130"], ["--num-envs", "4"]):
        args = runner.parse(W.Args, ["--task", world, *flags], W.preset)
        W.check_args(args, task, args.episode_length or task.episode_length)


def test_ours_for_the_ant_leaves_the_paper_and_supervised_data_alone():
    parse = lambda flags: runner.parse(W.Args, ["--task", "ant-angle-0", *flags.split()], W.preset)
    ours, plain = parse(""), W.Args()
    assert ours.auto_alpha and ours.reward_size == 1 and parse("--no-auto-alpha").auto_alpha is False
    pay = set(W.PRESETS["ant"]) - {"num_envs", "auto_alpha"}
    alone = "--num-policies 1 --task-weight 1"
    for flags in ("--preset paper", f"--objective none {alone}", f"--diversity-weight 0 {alone}", "--preset sac"):
        args = W.open_world(parse(flags))[0]
        assert all(getattr(args, key) == getattr(plain, key) for key in pay), flags
        assert args.auto_alpha == (flags == "--preset sac")
    W.open_world(parse("--objective metra --num-envs 1"))
    found = {name: parse(f"--objective {name}").reward_scale for name in ("apwd", "diayn", "dads", "metra")}
    assert found == {"apwd": 8.0, "diayn": 1.0, "dads": 1.0, "metra": 1.0}
    assert parse("--objective diayn").reward_size == 0  # near 0 at first, its running mean would be no measure
    assert parse("--objective diayn --reward-scale 3").reward_scale == 3.0
    for flags, told in (("--num-envs 1", "--own-weight 0"), ("--own-between 0.5 0.5", "the first below the second")):
        with pytest.raises(envs.InputError, match=told):
            W.open_world(parse(flags))


def test_discriminator_success():
    """Near 1 where policies are apart; where they are not, rows learnt by heart tell nobody apart (chance: 1/4)."""
    K, E, L, d = 4, 2, 20, 45
    same, mask = jax.random.normal(jax.random.key(0), (K, E, L, d)), jnp.ones((K, E, L), bool)
    even = mask & (jnp.arange(E) % 2 == 0)[:, None]
    judge = jax.jit(lambda x, train, test: diversity.discriminator_success(x, train, test, jax.random.key(1), (64, 64)))
    success, accuracy = judge(same + 5 * jnp.arange(K)[:, None, None, None], mask, mask)
    assert success > 0.9 and accuracy > 0.95
    by_heart, _ = judge(same, mask, mask)
    success, accuracy = judge(same, even, mask & ~even)
    assert by_heart > 0.9 and success < 0.4 and K * accuracy < (K + 1) / 2


@pytest.mark.parametrize(
    ("K", "closest", "accuracy", "step", "told"),
    [
        (10, 3.0, 0.95, 3000, ""),
        (10, 1.6, 0.95, 3000, ""),
        (10, 1.4, 0.95, 3000, r"policies 0 and 1 (1.40) are as near as two samples of one policy (1.00)"),
        (10, 0.9, 0.2, 100, ""),  # the first quarter: they have hardly moved
        (10, 0.9, 0.2, 800, "0 and 1 (0.90) are as near"),
        (20, 3.0, 0.39, 3000, "tells 7.8 of 20 policies apart"),  # as in the maze of docs/udg.md
        (20, 3.0, 0.39, 700, ""),
        (20, 3.0, 0.39, 750, "tells 7.8 of 20"),
        (2, 3.0, 0.52, 3000, "tells 1.0 of 2"),  # chance
        (2, 3.0, 0.8, 3000, ""),
    ],
)
def test_warning_of_a_collapse(K, closest, accuracy, step, told, capsys):
    w1 = 4.0 - 3.0 * np.eye(K)
    w1[0, 1] = w1[1, 0] = closest
    names = {"w1": w1, "w1_same": same_pairs(w1), "disc_accuracy_held_out": accuracy, "travel": [1.0]}
    metrics, args = {f"eval/{k}": v for k, v in names.items()}, tiny(num_policies=K, num_updates=3000)
    text = diversity.collapse(metrics, step, args)
    assert told in text and bool(told) == bool(text)
    for warn in (True, False):  # False: they are not asked to differ
        diversity.show_evaluation(step, metrics, args, warn)
        said = capsys.readouterr().out
        assert ("warning: " in said) == bool(told and warn) and f"told_apart {K * accuracy:.3f}" in said
    assert diversity.collapse(metrics, step, tiny(num_policies=1)) == ""


def test_supervised_data(tmp_path):
    """Plain SAC on a task's reward: recorded rewards, and the policies of every evaluation with the rows by then."""
    own = dict(task="point-angle-0", num_policies=1, objective="none", task_weight=1.0, auto_alpha=True)
    W.main(tiny(out=str(tmp_path), num_updates=20, keep_policies=True, **own))
    buffer = envs.buffers.load(tmp_path / "buffers/policy_00.npz")
    assert buffer.metadata["reward_kind"] == "task" and buffer["rewards"].std() > 0
    _, about = runner.read_npz(tmp_path / "policies/update_0000020.npz", "metadata_json")
    assert about["task_options"] == envs.task("point-angle-0").options == buffer.metadata["task_options"]
    assert about["rows"] == [len(buffer)] and about["observations"] == "task" and about["update"] == 20
    assert not (tmp_path / "rows").exists()


def test_the_disk_counts_fresh_rows_and_kept_policies():
    args, task, env, length = W.open_world(tiny(out="", rollout_episodes=5))
    actor, steps = {"w": np.zeros(100, np.float32)}, (1 + 3) * args.num_envs * length
    disk = lambda **changes: W.announce_rounds(dataclasses.replace(args, **changes), task, env, actor, length, 1, 20, 3)
    assert disk(keep_policies=True) - disk() == 400 * (args.num_updates // args.eval_every)
    assert disk(collect="rollouts") / disk() == pytest.approx((steps + 2 * 5 * length) / (2 * steps))


def test_fresh_rollouts_of_random_policies(tmp_path):
    W.main(tiny(out=str(tmp_path), num_updates=20, random=True, collect="rollouts", rollout_episodes=3))
    assert not (tmp_path / "policy.npz").exists()  # of untrained networks, which made none of the data
    buffers = [envs.buffers.load(p) for p in sorted((tmp_path / "buffers").glob("*.npz"))]
    assert len(buffers) == 3 and not (tmp_path / "rollouts").exists() and not (tmp_path / "rows").exists()
    for buffer in buffers:
        assert len(buffer) == 300 and buffer.metadata["warmup_transitions"] == 0
        assert np.abs(np.mean(buffer["actions"])) < 0.1 and np.std(buffer["actions"]) > 0.5
        np.testing.assert_allclose(buffer["action_log_probs"], -2 * np.log(2), atol=1e-6)


# --- devices ---


@pytest.mark.parametrize("cores, K, wanted", [(1, 10, 1), (2, 10, 2), (3, 10, 2), (4, 10, 2), (8, 10, 5), (2, 1, 1)])
def test_cores_become_devices_that_share_the_policies_evenly(cores, K, wanted, monkeypatch):
    monkeypatch.setattr(devices, "cores", lambda: cores)
    wide = tiny(num_policies=K, hidden_sizes=(256, 256))
    assert devices.cpu_devices_for_policies(wide) == wanted
    for other in (tiny(num_policies=K), dataclasses.replace(wide, distributed=True)):
        assert devices.cpu_devices_for_policies(other) == 1


@pytest.mark.parametrize("words, told", [
    ("--target-entropy -1 --no-auto-alpha", ["target-entropy"]), ("--no-auto-alpha", []),
    ("--reward-scale 8", ["reward-scale"]),
    ("--reward-scale 8 --reward-size 0", []), ("--target-entropy -1", []),
])  # fmt: skip
def test_flags_without_effect_are_named(words, told, capsys):
    """On the ant, whose preset learns alpha and holds the pay; what the preset sets is nobody's mistake."""
    runner.parse(W.Args, words.split(), W.preset, W.PRESETS, idle=W.idle_flags)
    runner.announce()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("without effect")]
    assert [line.split()[2].strip("-,") for line in said] == told


SHARDED = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import sys
import types
import numpy as np
import envs, runner, wurl_sac as W
sys.path.insert(0, "tests")
from test_wurl_sac import tiny
task, env = envs.task("point"), envs.make("point")
states = {}
for num in (4, 8):
    args = tiny(num_policies=12, num_devices=num)
    init, warmup, train_chunk, _ = W.make_train(args, env, task, lambda x: x, 100)
    state, _ = train_chunk(warmup(init(jax.random.key(0)))[0])
    states[num] = runner.flat_arrays((state.agent, state.replay))
    assert len(state.key.sharding.device_set) == num
for name, x in states[4].items():
    np.testing.assert_allclose(x, states[8][name], atol=1e-5, err_msg=name)
print("equal")
"""


def test_policies_shared_by_devices_learn_the_same():
    """12 policies: 3 on each of 4 devices; on 8 devices they do not divide, and each device has all."""
    command = [sys.executable, "-c", SHARDED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stdout.endswith("equal\n"), done.stderr


def test_options_of_a_task_change_the_world_are_recorded_and_known_to_the_selection(tmp_path):
    words = ("gear=150", "survive_bonus=1", "terminate=true")
    _, task, env, _ = W.open_world(tiny(task="ant-angle-0", task_options=words, hidden_sizes=(16, 16)))
    assert (task.options["gear"], task.options["survive_bonus"], task.options["ctrl_cost"]) == (150, 1, 0.5)
    np.testing.assert_array_equal(env.model.actuator_gear[:, 0], 150)
    assert env.observation_size == 29  # the world's
    fallen = envs.Transition(*(jnp.zeros((1, n)) for n in (29, 8, 29, 2, 2)))
    assert bool(env.task.terminal(fallen)[0]) and not bool(envs.make("ant").task.terminal(fallen).any())
    for wrong, told in ((("mass=2",), "has no option mass"), (("gear",), "'gear' is not name=number")):
        with pytest.raises(envs.InputError, match=told):
            W.open_world(tiny(task="ant-angle-0", task_options=wrong))

    W.main(tiny(task="point-goal-0", task_options=("threshold=2",), task_weight=1.0, out=str(tmp_path / "run")))
    buffer = envs.buffers.load(tmp_path / "run" / "buffers" / "policy_00.npz", quiet=True)
    assert buffer.metadata["task_options"] == {"angle_deg": 0, "threshold": 2.0}
    x = buffer["next_observations"][:, 0]
    np.testing.assert_array_equal(buffer["rewards"], (x > 2).astype(np.float32))
