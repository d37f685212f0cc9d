"""WURL-SAC: K soft actor-critics, no task reward, each paid for being far from its nearest neighbour.

Paper      Wasserstein Unsupervised Reinforcement Learning (He et al., AAAI 2022), arXiv 2110.07940;
           as the data generator of UDG (Unsupervised Data Generation for Offline RL), arXiv 2506.19643.
Objective  max over pi_1..pi_K of  min over i != j of  W1(rho_i, rho_j)     (UDG's surrogate of the minimax regret)

Algorithm  one round, all K policies at once:
  (1) roll out:  N episodes of L steps with every policy, a ~ pi_k(. | s), from fresh resets
  (2) project:   M unit directions v_m; sort the features f(s_{t+1}) of every policy along each    (APWD, section 3)
  (3) couple:    match the points of policies k and l by their ranks along v_m (plan P); a match costs the distance
                 between its points in all d features
                 c_kl(t) = 1/M sum_m n sum_j P_ij ||f_i - g_j||,   i = rank of step t along v_m
                 (lines 2 and 3: pairwise_apwd in envs/distances.py)
  (4) nearest:   l* = argmin over l != k of sum_t c_kl(t), one l* for a whole episode
  (5) pay:       r_t = w_div * scale * c_kl*(t) * (L / episode length) + w_task * r_task(s, a, s')
                 three flags of our own (D15): l* is the nearest when each policy's own width is taken off; the pay
                 is less by w_own c_kk'(t), the cost to other episodes of the same policy; it is held at a mean size
  (6) store:     the round in policy k's replay (the newest R transitions) and in its buffer file (all transitions)
  (7) learn:     updates_per_step N L SAC updates of each policy: critics, actor with the new critics, alpha,
                 Polyak target

Symbols    s observations [.., S] | a actions [.., A] | f features [.., d], g those of policy l | v directions [M, d]
           c cost [K, K, n] | K policies | N environments a policy | L episode_length | n = N L points, fewer
           where episodes end early | M num_directions
           c_kk' between episodes of policy k | w_div, w_task, w_own weights | scale (paper: reward scale)
           y target [B] | q [2, B] | B batch | R replay_size | alpha entropy weight | gamma discount | tau Polyak rate

Deviations (why: docs/wurl_sac.md)
  D1  reference code re-sorts in place, so that for M > 1 costs land on the wrong steps; here: as the paper says.
  D2  reference code pays a_t for the state s_{t-1}, a_0 for the last one of the episode before; here: for s_{t+1}.
  D3  reference code: one policy, drawn at random, acts per episode, learns as it goes and is compared with stored
      states of the others; here: all K act for a round, are compared in it, N episodes pooled, and learn after it.
  D4  reference code stores time limits of some environments as terminal; here: always bootstrap through them.
  D5  reference code learns from all transitions so far; here: from the newest `replay_size`.
  D6  reference code gives the random warm-up steps reward 0 (here --warmup-zero-reward); here: their real reward.
  D7  reference configs scale the cost by 10 to 100, but the shipped checkpoints behave as at a scale near 1; here: 8 on
      robots, 1 in the point worlds; on the ant the pay is held at a mean size of 1, and alpha is learnt.
  D8  reference code corrects tanh by log(1 - a^2 + 1e-6); here: exactly.
  D9  reference code measures all observations on Ant; UDG asks for a low-dimensional space; here: task.feature (xy)
      or the height (cheetah), times --feature-scales.
  D10 reference code keeps the learning rate; here: it falls linearly to 0 over the last `lr_decay` of the run.
  D11 reference code updates once per real step; here: updates_per_step for each nominal step, also where episodes end
      early. Without a diversity reward a new episode follows one that ends, so that all N L steps are real.
  D12 reference code draws 5 directions anew for each comparison; here: one draw of M serves all pairs of a round.
  D13 reference DIAYN-I looks at s_t, without + log K; DADS-I normalises by running statistics, with a gain of 0.1; both
      learn after the warm-up, from all rows so far, one step for each step of any policy. Here: s_{t+1}, + log K, this
      round's rows and their standard deviation, gain 1, from the start, one step for each step of a policy.
  D14 METRA conditions one policy on a skill, computes rewards of its replay anew with the phi of the moment, and fits
      phi to its replay; here: K policies, rewards as they were paid, phi fitted to the round after it has paid.
  D15 paper: none of the three flags of line (5); here: on the ant all three (--preset paper: none).
  D16 reference code: a batch without replacement, the policies of the best record kept; here: with, the last ones.

Files      writes runs/wurl_sac/<task>/seed<seed>/: buffers/policy_XX.npz (docs/buffer.md), policy.npz (docs/policy.md),
           log.jsonl, state.npz, trajectories.png, distances.png; rows/ while it runs; policies/ with --keep-policies
Run        python wurl_sac.py --quick                    (point robot, under 2 minutes on 2 cores)
           python wurl_sac.py                            (ten ant policies, 15 to 20 minutes on 2 cores)
           python wurl_sac.py --preset paper             (200k steps and updates a policy)
Expect     --quick: minimum-W (distance to the nearest other policy, mean over policies) 6.9 in 50 s on 2 cores
           --task point, 5 seeds: minimum-W 2.99, discriminator success 0.960, 5 to 8 minutes each
           ant, 2 cores: exact W1 to the nearest other policy 2.87 m, between two samples of one policy 0.32 (one
           seed); 3 seeds on one core, older code: 3.17 m and 0.43
"""

import dataclasses
import functools
import time
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import envs
import runner
from envs.buffers.ring import Ring, ring_init, ring_insert, ring_sample
from envs.distances import neighbour_distances, pairwise_apwd, unit_directions
from envs.worlds import world_of
from runner import devices, diversity, flags
from runner.rows import PolicyRows, announce_rounds, are_finished, fresh_rows, write_buffers


@dataclass(frozen=True)
class Args(runner.RunFlags):
    # beside the flags that every script has: out, resume, track, backend, num_devices, ... (runner/flags.py)
    # --- run ---
    task: str = "ant"
    """world or task to run in, e.g. ant, point, ant-angle-60; a task's reward is recorded, and learnt by task_weight"""
    task_options: tuple[str, ...] = ()
    """options of the task as name=value, e.g. gear=150 survive_bonus=1; recorded in the buffers"""
    preset: str = ""
    """a setting by name, see the list above; empty: ours for the world; paper: the published steps and updates"""
    seed: runner.Natural = 0
    """seed of networks, environments and noise; same seed, machine and versions: same numbers on a CPU"""
    quick: bool = False
    """the point robot with 4 policies, under 2 minutes on 2 cores"""
    distributed: bool = False
    """one of several processes that share the policies, each with num_devices; how to start them: docs/scale.md"""
    # --- budget ---
    num_policies: runner.Count = 10
    """K: number of policies (paper: 10)"""
    num_updates: runner.Count = 36_000
    """gradient steps per policy; environment steps per policy = num_updates / updates_per_step"""
    updates_per_step: runner.Rate = 0.25
    """gradient steps per environment step of a policy (reference code: 1; ours on a CPU: 0.25)"""
    num_envs: runner.Count = 2
    """N: episodes per policy and round (reference code: 1)"""
    episode_length: runner.Natural = 0
    """L: steps of an episode; 0: the task's own (ant, cheetah 200; point 100)"""
    warmup_steps: runner.Count = 2_000
    """environment steps per policy with uniform random actions at the start (reference code: 20,000 over all)"""
    chunk: runner.Count = 100
    """gradient steps per policy in one jitted call; it, eval_every and num_updates are rounded to whole rounds"""
    eval_every: runner.Count = 4_000
    """gradient steps per policy between two evaluations"""
    eval_episodes: runner.Count = 10
    """stochastic episodes per policy in an evaluation; the last evaluation takes 50 (authors' protocol)"""
    # --- diversity ---
    objective: Literal["apwd", "pwd", "diayn", "dads", "metra", "none"] = "apwd"
    """pseudo-reward: apwd (WURL), pwd (whole distance at the last step), diayn / dads / metra with K policies, none;
    metra looks at all observations and needs no feature"""
    diversity_weight: float = 1.0
    """w_div: weight of the pseudo-reward; 0 with a task is plain SAC (the supervised baseline)"""
    task_weight: float = 0.0
    """w_task: weight of the task reward (UDG's partial reward; WURL: 0)"""
    reward_scale: float = 8.0
    """scale: multiplies the cost per step (published 50 for ant; its checkpoints fit a scale near 1: D7)"""
    plan: Literal["mean", "cheapest"] = "mean"
    """plan that a step is paid by: the mean of the M plans (APWD), or of each pair the cheapest"""
    nearest: Literal["total", "debiased"] = "total"
    """how l* is chosen (apwd, pwd): least cost, or least cost less half of what l's episodes cost one another"""
    own_weight: runner.Share = 0.0
    """w_own (apwd, pwd): share of a step's cost to other episodes of its own policy that is taken off its pay"""
    own_between: tuple[runner.Share, runner.Share] = (0.4, 0.8)
    """shares of the run between which w_own grows from 0"""
    reward_size: runner.Rate = 0.0
    """scale the pay so that the running mean of its size is this (reward_scale then has no effect); 0: off"""
    num_directions: runner.Count = 8
    """M: projections per round (reference code: 5)"""
    orthogonal_directions: bool = False
    """orthogonal directions in blocks of d (reference: OPWD), lower variance"""
    rescale_episodes: bool = True
    """multiply by L / length of the episode, so that short episodes earn the same total (Humanoid: False)"""
    div_features: str = ""
    """space of the distance: task (its own features), full (all observations) or indices such as 0,1; empty: task, for
    the cheetah 0, its height (APWD over (v_x, z) also pays a policy for the spread of its own states, D9)"""
    feature_scales: tuple[float, ...] = ()
    """factor of each feature in the distance; empty: 1 for all. Ours for the cheetah: 10"""
    cell: runner.Size = 1.0
    """edge of a cell in feature space, for the coverage that an evaluation reports (ours)"""
    warmup_zero_reward: bool = False
    """reward 0 for warm-up steps, as the reference code (D6)"""
    discriminator_lr: runner.Rate = 2e-3
    """Adam rate of diayn's discriminator (reference 2e-3), dads' predictor (reference, ours 3e-4) or metra's phi
    (paper 1e-4, ours 3e-4)"""
    metra_slack: runner.Size = 1e-3
    """epsilon of metra's constraint (paper: 1e-3)"""
    metra_lambda: runner.Size = 30.0
    """lambda of metra's constraint at the start (paper: 30)"""
    # --- SAC ---
    hidden_sizes: tuple[runner.Count, ...] = (256, 256)
    """widths of actor and critics (reference: 256, 256; point worlds 64, 64; Humanoid 1024, 1024)"""
    batch_size: runner.Count = 128
    """B: transitions per update (reference: 128; point worlds 200)"""
    replay_size: runner.Count = 10_000
    """R: newest transitions per policy that are learnt from (D5)"""
    learning_rate: runner.Rate = 6e-4
    """Adam rate of actor, critics and alpha (reference: 3e-4; ours, for a sixth of its updates: 6e-4)"""
    lr_decay: runner.Share = 0.4
    """share of the run, at its end, over which the learning rate falls linearly to 0 (D10); 0: never"""
    gamma: runner.Share = 0.99
    """discount (reference: 0.99)"""
    tau: runner.Share = 0.005
    """Polyak rate of the target critics, every update (reference: 0.005)"""
    alpha: runner.Rate = 0.2
    """entropy weight, its start with auto_alpha (reference: 0.2)"""
    auto_alpha: bool = False
    """learn alpha towards a stated entropy (SAC); supervised data need it, because a fixed 0.2 makes no expert"""
    target_entropy: float | None = None
    """that entropy in nats; left out: -A (SAC)"""
    log_std_min: float = -20.0
    """lower clip of the actor's log standard deviation (reference: -20)"""
    log_std_max: float = 2.0
    """upper clip of the actor's log standard deviation (reference: 2)"""
    policies_at_once: runner.Natural = 0
    """policies updated in one batched call; 0: all on an accelerator or for narrow nets, 1 on a CPU"""
    # --- data ---
    collect: Literal["replay", "rollouts"] = "replay"
    """rows of the buffers: all training data (replay), or fresh episodes of the final policies (rollouts)"""
    rollout_episodes: runner.Count = 250
    """episodes per policy with --collect rollouts"""
    keep_policies: bool = False
    """keep the policies of every evaluation: policies/update_<n>.npz, with their returns and the rows made by then"""
    random: bool = False
    """policies stay uniform random: the random-data baseline (no updates)"""


POINT = dict(
    num_envs=1, updates_per_step=1.0, hidden_sizes=(64, 64), batch_size=200, replay_size=2_000,
    warmup_steps=1_000, num_updates=30_000, chunk=500, eval_every=1_500, reward_scale=1.0,
    learning_rate=3e-4,
)  # fmt: skip
PRESETS = {
    "ant": dict(  # ours where policies are paid to differ: docs/wurl_sac.md, "Which pay"
        num_envs=4, nearest="debiased", own_weight=1.0, own_between=(0.4, 0.8), reward_size=1.0, auto_alpha=True,
        target_entropy=-2.0,
    ),
    "cheetah": dict(div_features="0", feature_scales=(10.0,)),  # its height: see Args
    "humanoid": dict(hidden_sizes=(1024, 1024), rescale_episodes=False, replay_size=20_000, chunk=500),
    "point": POINT,
    "tree-maze": POINT,
    "sac": dict(  # plain SAC on a task's own reward, in rounds of one episode's steps, as D4RL's data was made
        num_policies=1, objective="none", diversity_weight=0.0, task_weight=1.0, auto_alpha=True, alpha=1.0,
        num_envs=1, updates_per_step=1.0, batch_size=256, replay_size=1_000_000, learning_rate=3e-4, lr_decay=0.0,
        warmup_steps=5_000, num_updates=1_000_000, chunk=1_000, eval_every=5_000,
    ),
    "paper": dict(
        num_updates=200_000, updates_per_step=1.0, num_envs=1, chunk=1_000, eval_every=4_000, learning_rate=3e-4,
    ),
}  # fmt: skip
OBJECTIVES = {  # scale and Adam rate of an objective's own, over the world's
    "diayn": dict(reward_scale=1.0, reward_size=0.0),
    "dads": dict(reward_scale=1.0, reward_size=0.0, discriminator_lr=3e-4),
    "metra": dict(reward_scale=1.0, reward_size=0.0, discriminator_lr=3e-4),
}
QUICK = dict(task="point", num_policies=4, num_updates=6_000, chunk=500, eval_every=1_500)
SHOWN = ("train/min_w", "train/reward", "train/q", "train/entropy")  # in the progress line


# === data ===


class Transitions(NamedTuple):
    """Rows to learn from; any leading axes, features last."""

    observations: jax.Array  # [.., S]
    actions: jax.Array  # [.., A]
    rewards: jax.Array  # [..]
    next_observations: jax.Array  # [.., S]
    terminals: jax.Array  # [..] 1.0 where the episode ended by itself: no bootstrap; 0.0 at a time limit


# === networks ===


class MLP(nn.Module):
    """Fully connected layers of the given widths, ReLU between them, Xavier-uniform weights, zero biases."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for width in self.widths[:-1]:
            x = nn.relu(nn.Dense(width, kernel_init=nn.initializers.xavier_uniform())(x))
        return nn.Dense(self.widths[-1], kernel_init=nn.initializers.xavier_uniform())(x)


class Actor(nn.Module):
    """Mean and log standard deviation [.., A] of a Gaussian that tanh squashes into [-1, 1]."""

    hidden_sizes: tuple[int, ...]
    action_size: int
    log_std_min: float
    log_std_max: float

    @nn.compact
    def __call__(self, observations):
        out = MLP((*self.hidden_sizes, 2 * self.action_size))(observations)
        mean, log_std = jnp.split(out, 2, axis=-1)
        return mean, jnp.clip(log_std, self.log_std_min, self.log_std_max)


class Critics(nn.Module):
    """`num` independent Q networks on (s, a): [num, ..]."""

    hidden_sizes: tuple[int, ...]
    num: int = 2

    @nn.compact
    def __call__(self, observations, actions):
        x = jnp.concatenate([observations, actions], -1)
        return jnp.stack([MLP((*self.hidden_sizes, 1))(x)[..., 0] for _ in range(self.num)])


def tanh_normal_sample(mean, log_std, noise):
    """a = tanh(u), u = mean + std * noise, and its log density, exact also where tanh saturates.

    mean, log_std, noise [.., A] -> actions [.., A], log_probs [..]
    log pi(a) = sum_A [ log N(u; mean, std) - 2 (log 2 - u - softplus(-2u)) ]
    """
    u = mean + jnp.exp(log_std) * noise
    log_normal = -0.5 * noise**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)
    log_jacobian = 2.0 * (jnp.log(2.0) - u - nn.softplus(-2.0 * u))  # log(1 - tanh(u)^2)      # D8
    return jnp.tanh(u), jnp.sum(log_normal - log_jacobian, -1)


def actor_net(args, action_size):
    """The actor's architecture."""
    return Actor(args.hidden_sizes, action_size, args.log_std_min, args.log_std_max)


def polyak(target, online, tau):
    """target <- (1 - tau) target + tau online, leaf by leaf."""
    return jax.tree.map(lambda t, o: (1 - tau) * t + tau * o, target, online)


# === pseudo-reward ===


def own_cost(features, alive, directions, args):
    """c_kk'(t): mean cost of a step to the other episodes of its policy, features [K, N, L, d] -> [K, N, L]; 0 where
    there is one episode, or no flag asks for it."""
    N = alive.shape[1]
    if N == 1 or not (args.own_weight or args.nearest == "debiased"):
        return jnp.zeros(alive.shape)
    pairs = lambda x: pairwise_apwd(x[0], x[1], x[0], x[1], directions, args.plan)  # [N, N, L]
    at_once = None if jax.default_backend() == "cpu" else len(features)
    return jax.lax.map(pairs, (features, alive), batch_size=at_once).mean(2, where=~jnp.eye(N, dtype=bool)[..., None])


def apwd_reward(cost, own, alive, weight, args):
    """Lines (4) and (5): costs of all pairs [K, K, n], c_kk' and alive [K, N, L] -> pseudo-reward [K, N, L].

    r_t = scale * (c_kl*(t) - w_own c_kk'(t)) * (L / length),   l* = argmin over l != k of the episode's sum of c_kl
    """
    K, N, L = alive.shape
    cost, lengths = cost.reshape(K, K, N, L), jnp.maximum(alive.sum(-1, keepdims=True), 1)
    totals = cost.sum(-1)
    if args.nearest == "debiased":  # D15: what a copy of l would cost is no distance: half of it is l's, half k's own
        width = own.sum((1, 2)) / lengths.sum((1, 2))
        totals = totals - width[None, :, None] / 2 * lengths[:, None, :, 0]
    totals = jnp.where(jnp.eye(K, dtype=bool)[:, :, None], jnp.inf, totals)
    nearest = jnp.argmin(totals, 1)  # [K, N]: l*, one for each episode
    reward = jnp.take_along_axis(cost, nearest[:, None, :, None], 1)[:, 0] - weight * own
    if args.objective == "pwd":  # the whole distance at the last step, nothing before
        reward = jnp.where(jnp.arange(L) == lengths - 1, reward.sum(-1, keepdims=True) / lengths, 0.0)
    elif args.rescale_episodes:
        reward = reward * (L / lengths)
    return args.reward_scale * reward


def diayn_reward(net, features, args):
    """DIAYN-I: r_t = scale [ log K + max(log q(k | f(s_{t+1})), 10 log(1/K)) ]; features [K, N, L, d] -> [K, N, L]."""
    logits = MLP((*args.hidden_sizes, args.num_policies)).apply(net, features)
    log_q = jnp.moveaxis(nn.log_softmax(logits), -1, 1)  # [K, K, N, L]
    own, log_k = jnp.arange(args.num_policies), jnp.log(args.num_policies)
    return args.reward_scale * (log_k + jnp.maximum(log_q[own, own], -10 * log_k))


def diayn_loss(net, features, index, args):
    """Cross entropy of the discriminator q(k | f): features [B, d], index [B] -> scalar."""
    logits = MLP((*args.hidden_sizes, args.num_policies)).apply(net, features)
    return optax.softmax_cross_entropy_with_integer_labels(logits, index).mean()


def dads_log_prob(net, features, change, index, args):
    """log N(change; net(f(s_t), k), 1) up to a constant: features, change [.., d], index [..] -> [..]."""
    x = jnp.concatenate([features, jax.nn.one_hot(index, args.num_policies)], -1)
    return -0.5 * jnp.sum((change - MLP((256, 256, change.shape[-1])).apply(net, x)) ** 2, -1)


def dads_reward(net, features, change, args):
    """DADS-I: r = scale [ log K - log(1 + sum over l != k of exp(clip(log p_l - log p_k, -20, 1))) ]."""
    own = jnp.arange(args.num_policies)
    asked = lambda l: dads_log_prob(net, features, change, jnp.full(features.shape[:-1], l), args)
    log_p = jax.vmap(asked, out_axes=1)(own)  # [K, K, N, L]: first axis who acted, second who is asked
    ratio = jnp.exp(jnp.clip(log_p - log_p[own, own][:, None], -20.0, 1.0)).sum(1)  # the own term is 1
    return args.reward_scale * (jnp.log(args.num_policies) - jnp.log(ratio))


def metra_change(net, before, after, index, args):  # D14
    """phi(s') - phi(s) [.., K] and its product with z_k [..], z_k = (K e_k - 1) / (K - 1): 1 for k, 0 in sum."""
    phi = MLP((*args.hidden_sizes, args.num_policies))
    change = phi.apply(net["phi"], after) - phi.apply(net["phi"], before)
    z = (args.num_policies * jax.nn.one_hot(index, args.num_policies) - 1) / (args.num_policies - 1)
    return change, jnp.sum(change * z, -1)


def metra_loss(net, before, after, index, args):
    """METRA: phi up, lambda down on  E[ (phi(s') - phi(s)) . z + lambda min(epsilon, 1 - ||phi(s') - phi(s)||^2) ].

    phi learns a direction for each policy, in which a step is at most 1 long: a distance in time. before, after
    [B, S], index [B] -> scalar
    """
    change, along = metra_change(net, before, after, index, args)
    slack = jnp.minimum(args.metra_slack, 1 - jnp.sum(change**2, -1))
    weight, stop = jnp.exp(net["log_lambda"]), jax.lax.stop_gradient
    return -jnp.mean(along + stop(weight) * slack) + weight * stop(slack.mean())


def pseudo_reward(net, net_opt, steps, features, alive, key, share, args):
    """Lines (2) to (5) of a round -> reward [K, N, L], distances [K, K], and the objective's net, learnt from it.

    steps: Transition [K, N, L, ..]; features [K, N, L, d] of the states s_{t+1}; alive [K, N, L]: the step happened;
    share: of the run, done so far. The net takes Adam steps on batches of 200 (diversity.fit).
    """
    K, d = args.num_policies, features.shape[-1]
    if K == 1:  # there is no other
        return jnp.zeros(alive.shape), jnp.zeros((1, 1)), net, net_opt
    key_directions, key_net = jax.random.split(key)
    directions = unit_directions(key_directions, args.num_directions, d, args.orthogonal_directions)  # D12
    points, valid = features.reshape(K, -1, d), alive.reshape(K, -1)
    cost = pairwise_apwd(points, valid, points, valid, directions, args.plan)  # D1
    distances = cost.sum(-1) / jnp.maximum(valid.sum(-1, keepdims=True), 1)  # logged whatever the objective

    index = jnp.broadcast_to(jnp.arange(K)[:, None, None], alive.shape)
    how = dict(key=key_net, rate=args.discriminator_lr, num_steps=alive[0].size, taken=alive.sum() / K)  # D13
    if args.objective == "diayn":
        reward, loss = diayn_reward(net, features, args), functools.partial(diayn_loss, args=args)
        net, net_opt = diversity.fit(net, net_opt, loss, (features, index), alive, **how)
    elif args.objective == "dads":
        before = jnp.concatenate([features[:, :, :1], features[:, :, :-1]], 2)
        known = alive & (jnp.arange(alive.shape[-1]) > 0)  # f(s_0) is not among the features
        change = features - before
        change = change / jnp.maximum(change.std((0, 1, 2), where=known[..., None]), 1e-6)
        reward = jnp.where(known, dads_reward(net, before, change, args), 0.0)
        loss = lambda net, *rows: -dads_log_prob(net, *rows, args).mean()
        net, net_opt = diversity.fit(net, net_opt, loss, (before, change, index), known, **how)
    elif args.objective == "metra":
        rows = steps.observations, steps.next_observations, index
        reward = args.reward_scale * metra_change(net, *rows, args)[1]
        how |= dict(num_steps=round_sizes(args, alive.shape[-1])[1], taken=None)  # one an update of a policy, as METRA
        net, net_opt = diversity.fit(net, net_opt, functools.partial(metra_loss, args=args), rows, alive, **how)
    elif args.objective == "none":
        reward = jnp.zeros(alive.shape)
    else:
        own = own_cost(features, alive, directions, args)
        begin, end = args.own_between
        weight = args.own_weight * jnp.clip((share - begin) / (end - begin), 0.0, 1.0)
        reward = apwd_reward(cost, own, alive, weight, args)
    return reward, distances, net, net_opt


def held(reward, alive, size, args):
    """Line (5): the pay at a mean size of --reward-size, by a running mean of its own -> reward, that mean."""
    if not args.reward_size:
        return reward, size
    now = jnp.mean(jnp.abs(reward), where=alive)
    size = jnp.where(size == 0, now, size + 0.02 * (now - size))  # over some 50 rounds
    return reward * (args.reward_size / jnp.maximum(size, 1e-6)), size


# === losses ===


def wurl_critic_loss(critic, target, actor, alpha, batch, key, args):
    """SAC:  sum_e mean_B (Q_e(s, a) - y)^2,   y = r + gamma (1 - terminal) (min_e Qbar_e(s', a') - alpha log pi(a'|s'))

    a' ~ pi(. | s') with the actor before its step; no gradient into y -> scalar, metrics
    """
    mean, log_std = actor_net(args, batch.actions.shape[-1]).apply(actor, batch.next_observations)
    noise = jax.random.normal(key, mean.shape)
    next_actions, log_probs = tanh_normal_sample(mean, log_std, noise)
    critics = Critics(args.hidden_sizes)
    next_q = critics.apply(target, batch.next_observations, next_actions).min(0)
    y = batch.rewards + args.gamma * (1 - batch.terminals) * (next_q - alpha * log_probs)  # D4
    y = jax.lax.stop_gradient(y)
    q = critics.apply(critic, batch.observations, batch.actions)
    chex.assert_equal_shape([q[0], y])
    loss = jnp.sum(jnp.mean((q - y) ** 2, -1))
    return loss, {"train/critic_loss": loss, "train/q": q.mean(), "train/reward": batch.rewards.mean()}


def wurl_actor_loss(actor, critic, alpha, batch, key, args):
    """SAC:  mean_B ( alpha log pi(a|s) - min_e Q_e(s, a) ),   a ~ pi(. | s), with the critics after their step."""
    mean, log_std = actor_net(args, batch.actions.shape[-1]).apply(actor, batch.observations)
    noise = jax.random.normal(key, mean.shape)
    actions, log_probs = tanh_normal_sample(mean, log_std, noise)
    q = Critics(args.hidden_sizes).apply(critic, batch.observations, actions).min(0)
    loss = jnp.mean(alpha * log_probs - q)
    saturated = jnp.mean(jnp.abs(actions) > 0.95)
    return loss, {"train/actor_loss": loss, "train/entropy": -log_probs.mean(), "train/saturated": saturated}


def wurl_alpha_loss(log_alpha, entropy, target_entropy):
    """-log alpha (mean log pi + target entropy): alpha grows while the entropy is below its target."""
    return log_alpha * jax.lax.stop_gradient(entropy - target_entropy)


# === update ===


class Agent(NamedTuple):
    """Parameters and Adam states of one policy, or of several with a leading axis."""

    actor: Any
    critic: Any
    target: Any
    log_alpha: jax.Array
    actor_opt: Any
    critic_opt: Any
    alpha_opt: Any


def adam(args):
    """Adam whose rate falls linearly to 0 over the last `lr_decay` of the run."""  # D10
    start = int((1 - args.lr_decay) * args.num_updates)
    falling = optax.linear_schedule(args.learning_rate, 0.0, max(args.num_updates - start, 1), start)
    return optax.adam(falling if args.lr_decay else args.learning_rate)


def wurl_update(agent, replay, key, args, observe):
    """Line (7): one SAC step of one policy on a batch of its replay -> agent, metrics."""
    key_batch, key_critic, key_actor = jax.random.split(key, 3)
    batch = ring_sample(replay, key_batch, args.batch_size)  # D16
    batch = batch._replace(observations=observe(batch.observations), next_observations=observe(batch.next_observations))
    alpha = jnp.exp(agent.log_alpha)
    optimiser = adam(args)

    critic_grad = jax.grad(wurl_critic_loss, has_aux=True)
    grads, critic_metrics = critic_grad(agent.critic, agent.target, agent.actor, alpha, batch, key_critic, args)
    step, critic_opt = optimiser.update(grads, agent.critic_opt)
    critic = optax.apply_updates(agent.critic, step)

    actor_grad = jax.grad(wurl_actor_loss, has_aux=True)
    grads, actor_metrics = actor_grad(agent.actor, critic, alpha, batch, key_actor, args)
    step, actor_opt = optimiser.update(grads, agent.actor_opt)
    actor = optax.apply_updates(agent.actor, step)

    log_alpha, alpha_opt = agent.log_alpha, agent.alpha_opt
    if args.auto_alpha:
        target_entropy = -float(batch.actions.shape[-1]) if args.target_entropy is None else args.target_entropy
        grad = jax.grad(wurl_alpha_loss)(log_alpha, actor_metrics["train/entropy"], target_entropy)
        step, alpha_opt = optimiser.update(grad, alpha_opt)
        log_alpha = optax.apply_updates(log_alpha, step)

    target = polyak(agent.target, critic, args.tau)
    agent = Agent(actor, critic, target, log_alpha, actor_opt, critic_opt, alpha_opt)
    return agent, {**critic_metrics, **actor_metrics, "train/alpha": alpha}


# === rollout ===


class Rollout(NamedTuple):
    """Episodes side by side: [.., N, L, ..]; `alive` marks the steps that happened (before or at the termination)."""

    transition: envs.Transition  # raw observations of the world
    terminals: jax.Array
    log_probs: jax.Array  # log density of the action under the policy that took it
    alive: jax.Array


def rollout(actor, key, env, args, observe, num_envs, length, random=False, restart=False):
    """Line (1): `num_envs` episodes of `length` steps of one policy from fresh resets; uniform actions if `random`.

    restart: begin a new episode where one terminates, so that all N L steps happen.                        # D11
    """
    net = actor_net(args, env.action_size)
    key_reset, key_steps = jax.random.split(key)

    def step(carry, key):
        state, alive = carry
        key_normal, key_uniform, key_reset = jax.random.split(key, 3)
        mean, log_std = net.apply(actor, observe(state.obs))
        actions, log_probs = tanh_normal_sample(mean, log_std, jax.random.normal(key_normal, mean.shape))
        if random:
            actions = jax.random.uniform(key_uniform, mean.shape, minval=-1.0, maxval=1.0)
            log_probs = jnp.full(log_probs.shape, -mean.shape[-1] * jnp.log(2.0))
        after = jax.vmap(env.step)(state, actions)
        terminals = after.done > 0.5
        steps = Rollout(envs.transition(state, actions, after), terminals, log_probs, alive)
        if restart:
            return (jax.vmap(env.restart)(after, jax.random.split(key_reset, num_envs)), alive), steps
        return (after, alive & ~terminals), steps

    start = jax.vmap(env.reset)(jax.random.split(key_reset, num_envs))
    alive = jnp.ones(num_envs, bool)
    _, steps = jax.lax.scan(step, (start, alive), jax.random.split(key_steps, length))
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), steps)  # [N, L, ..]


# === evaluation ===


def feature_function(args, task):
    """Transition [..] -> features [.., d] of the next state, by `--div-features` and `--feature-scales`."""  # D9, D2
    scales = jnp.array(args.feature_scales or 1.0)
    if args.div_features in ("", "task"):
        return lambda transition: scales * task.feature(transition)
    if args.div_features == "full":
        return lambda transition: scales * transition.next_observations
    index = jnp.array([int(i) for i in args.div_features.split(",")])
    return lambda transition: scales * transition.next_observations[..., index]


def make_evaluation(args, task, rollouts):
    """-> evaluation(actor [K], key, E) -> metrics (numbers and arrays [K]), arrays for the figures, on the host."""
    features_of = feature_function(args, task)

    @functools.partial(jax.jit, static_argnums=2, out_shardings=devices.placed(args.num_policies, args))
    def evaluation(actor, key, num_episodes):
        key_rollout, *keys = jax.random.split(key, 3)
        steps = rollouts(actor, jax.random.split(key_rollout, args.num_policies), num_episodes)
        return diversity.measures(steps, features_of(steps.transition), keys, task, args.hidden_sizes[:2])

    return lambda *inputs: diversity.exact(*jax.tree.map(np.asarray, evaluation(*inputs)), task, args.cell)


# === training ===


class WurlState(NamedTuple):
    """All that a run needs to go on; agent and replay have a leading policy axis."""

    key: jax.Array
    num_updates: jax.Array
    size: jax.Array  # running mean of |pseudo-reward|, for --reward-size
    agent: Agent
    replay: Ring  # of Transitions, one ring per policy
    net: Any  # of diayn, dads or metra; empty otherwise
    net_opt: Any


def is_diverse(args):
    """Whether policies are paid for diversity."""
    return args.diversity_weight != 0 and args.objective != "none"


def init_agent(key, args, env, observe):
    """Networks, target and optimisers of one policy."""
    key_actor, key_critic = jax.random.split(key)
    obs, actions = observe(jnp.zeros((1, env.observation_size))), jnp.zeros((1, env.action_size))
    actor = actor_net(args, env.action_size).init(key_actor, obs)
    critic = Critics(args.hidden_sizes).init(key_critic, obs, actions)
    log_alpha, opt = jnp.log(jnp.float32(args.alpha)), adam(args).init
    target = jax.tree.map(jnp.copy, critic)
    return Agent(actor, critic, target, log_alpha, opt(actor), opt(critic), opt(log_alpha))


def init_net(key, num_features, num_observations, args):
    """DIAYN-I's discriminator, DADS-I's predictor, METRA's phi and lambda; nothing for the others."""
    if args.objective == "metra":
        phi = MLP((*args.hidden_sizes, args.num_policies)).init(key, jnp.zeros(num_observations))
        return {"phi": phi, "log_lambda": jnp.log(jnp.float32(args.metra_lambda))}
    if args.objective == "diayn":
        return MLP((*args.hidden_sizes, args.num_policies)).init(key, jnp.zeros(num_features))
    if args.objective == "dads":
        return MLP((256, 256, num_features)).init(key, jnp.zeros(num_features + args.num_policies))
    return {}


def round_sizes(args, episode_length):
    """Rounds of warm-up, updates per round, rounds of training."""
    steps = args.num_envs * episode_length
    updates = max(round(args.updates_per_step * steps), 1)  # D11
    return -(-args.warmup_steps // steps), updates, args.num_updates // updates


def state_sharding(args):
    """Where a WurlState lies: agents and replays on the device of their policy, the rest on all."""
    split = devices.placed(args.num_policies, args, "share")
    all_devices = devices.placed(args.num_policies, args)
    return WurlState(all_devices, all_devices, all_devices, split, split, all_devices, all_devices)


def make_train(args, env, task, observe, episode_length):
    """-> init(key), warm_up(state), train_chunk(state), rollouts(actor, keys, num_envs).

    warm_up and train_chunk return state, (metrics [.., K], distances [.., K, K], Rollout and pseudo-reward
    [.., K, N, L, ..]) with the rounds on the first axis.
    """
    num_warmup, updates_per_round, _ = round_sizes(args, episode_length)
    features_of, sharding = feature_function(args, task), state_sharding(args)
    at_once = devices.policies_at_once(args, jax.default_backend())
    at_once = None if at_once == 1 else at_once  # a batch of one is a sixth slower than none

    def init(key):
        """Agents [K], empty replays [K], and the network of the objective."""
        key, key_agents, key_net = jax.random.split(key, 3)
        keys = jax.random.split(key_agents, args.num_policies)
        obs, root = jnp.zeros(env.observation_size), jnp.zeros(2)
        step = envs.Transition(obs, jnp.zeros(env.action_size), obs, root, root)
        row = Transitions(obs, step.actions, jnp.float32(0), obs, jnp.float32(0))
        agent = jax.vmap(lambda key: init_agent(key, args, env, observe))(keys)
        replay = jax.vmap(lambda _: ring_init(row, args.replay_size))(keys)
        net = init_net(key_net, jax.eval_shape(features_of, step).shape[-1], env.observation_size, args)
        net_opt = optax.adam(args.discriminator_lr).init(net)
        return WurlState(key, jnp.int32(0), jnp.float32(0), agent, replay, net, net_opt)

    def rollouts(actor, keys, num_envs, random=False, restart=False):
        """Line (1) for all policies: actor [K], keys [K] -> Rollout [K, N, L, ..]."""
        one = lambda actor, key: rollout(
            actor, key, env, args, observe, num_envs, episode_length, random or args.random, restart
        )
        return runner.over_devices(jax.vmap(one), args)(actor, keys)

    def train_policy(agent, replay, key):
        """Line (7): `updates_per_round` updates of one policy."""
        step = lambda agent, key: wurl_update(agent, replay, key, args, observe)
        agent, metrics = jax.lax.scan(step, agent, jax.random.split(key, updates_per_round))
        return agent, jax.tree.map(jnp.mean, metrics)

    def train_round(state, warmup):
        """Lines (1) to (7); warmup: random actions, no updates -> state, what is logged and stored of the round."""
        key, key_rollout, key_reward, key_update = jax.random.split(state.key, 4)
        K = args.num_policies
        keys = jax.random.split(key_rollout, K)
        steps = rollouts(state.agent.actor, keys, args.num_envs, random=warmup, restart=not is_diverse(args))  # (1), D3
        t = steps.transition
        share = state.num_updates / args.num_updates
        reward, distances, net, net_opt = pseudo_reward(
            state.net, state.net_opt, t, features_of(t), steps.alive, key_reward, share, args
        )  # (2) to (5)
        reward, size = held(reward, steps.alive, state.size, args)
        mixed = args.diversity_weight * reward + args.task_weight * task.reward(t)  # (5)
        if warmup and args.warmup_zero_reward:  # D6
            mixed = jnp.zeros_like(mixed)
        seen = Transitions(t.observations, t.actions, mixed, t.next_observations, steps.terminals * 1.0)
        flat = jax.tree.map(lambda x: x.reshape(K, -1, *x.shape[3:]), (seen, steps.alive))
        replay = jax.vmap(ring_insert)(state.replay, *flat)  # (6)
        agent, metrics, count = state.agent, {}, state.num_updates
        if not (warmup or args.random):
            keys = jax.random.split(key_update, K)
            train = lambda *x: jax.lax.map(lambda x: train_policy(*x), x, batch_size=at_once)
            agent, metrics = runner.over_devices(train, args)(agent, replay, keys)  # (7)
        if not warmup:
            count = count + updates_per_round
        metrics["train/pseudo_reward"] = reward.mean((1, 2), where=steps.alive)
        state = WurlState(key, count, size, agent, replay, net, net_opt)
        return state, (metrics, distances, steps, reward)

    def rounds(num, warmup):
        scan = lambda state: jax.lax.scan(lambda s, _: train_round(s, warmup), state, length=num)
        split = devices.placed(args.num_policies, args, None, "share")
        everywhere = sharding.key
        out = sharding, (everywhere, everywhere, split, split)
        return jax.jit(scan, donate_argnums=0, in_shardings=(sharding,), out_shardings=out)

    warm_up, chunk = rounds(num_warmup, True), rounds(args.chunk // updates_per_round, False)
    return jax.jit(init, out_shardings=sharding), warm_up, chunk, rollouts


# === run ===


def preset(args):
    """A named setting, --quick, or ours for the world -> name, {field: value}."""
    runner.refuse({
        f"--preset {args.preset}: unknown; one of {', '.join(PRESETS)}": args.preset in ("", *PRESETS),
        "--quick is a preset of its own; leave --preset out": not (args.quick and args.preset),
    })  # fmt: skip
    own = OBJECTIVES.get(args.objective, {})
    if args.quick:
        return "quick", POINT | QUICK | own
    world = envs.task(args.task).env
    ours, named = PRESETS.get(world, {}), PRESETS.get(args.preset, {})
    if world == "ant" and (named or not is_diverse(args)):
        ours = {}  # our pay is neither the paper's nor of use to plain SAC
    values = ours | named | own
    if args.div_features not in ("", values.get("div_features")):  # the scales are those of other features
        values = {k: v for k, v in values.items() if k != "feature_scales"}
    return args.preset or world, values


def whole_rounds(args, episode_length):
    """The flags with chunk, eval_every and num_updates in whole rounds and multiples of one another."""
    updates = round_sizes(args, episode_length)[1]
    chunk = max(round(args.chunk / updates), 1) * updates
    eval_every = max(round(args.eval_every / chunk), 1) * chunk
    num_updates = max(round(args.num_updates / chunk), 1) * chunk
    rounded = dict(chunk=chunk, eval_every=eval_every, num_updates=num_updates)
    changed = [f"{k}={v}" for k, v in rounded.items() if v != getattr(args, k)]
    if changed:
        flags.ABOUT.append(f"in whole rounds of {updates} updates: {' '.join(changed)}")
    return dataclasses.replace(args, **rounded)


def check_args(args, task, episode_length):
    """Refuse flags that cannot work together, before any long work starts."""
    runner.check_run(args)
    steps, num_obs = args.num_envs * episode_length, task.env_observation_size
    index, num_features = args.div_features.split(","), len(diversity.feature_names(args, task))
    runner.refuse({
        f"--div-features: task, full or indices below {num_obs}, such as 0,1":
            args.div_features in ("", "task", "full") or all(i.isdigit() and int(i) < num_obs for i in index),
        f"--feature-scales: none, or {num_features} positive numbers, one for each feature":
            len(args.feature_scales) in (0, num_features) and min(args.feature_scales, default=1) > 0,
        "--eval-episodes must be at least 2: half of them are held out": args.eval_episodes >= 2,
        "--log-std-min must be below --log-std-max": args.log_std_min < args.log_std_max,
        "--own-between: two shares of the run, the first below the second": args.own_between[0] < args.own_between[1],
        "--num-envs 1: no other episode to compare one with; add --own-weight 0 --nearest total, or --num-envs 2":
            args.num_envs > 1 or args.random or args.objective not in ("apwd", "pwd")
            or (args.own_weight == 0 and args.nearest == "total"),
        "--num-policies 1: one policy has no neighbour; add --diversity-weight 0 --task-weight 1":
            args.num_policies > 1 or args.random or args.objective == "none" or args.diversity_weight == 0,
        f"--task-weight: {task.name} has no reward; name a task, for example --task {task.env}-angle-0":
            args.task_weight == 0 or task.has_reward,
        f"--replay-size must hold a round ({steps} steps) and a batch":
            args.replay_size >= max(steps, args.batch_size),
        f"--num-policies must be at least {jax.process_count()}: one for each process":
            args.num_policies >= jax.process_count(),
        "--num-envs times the episode length must stay under 46341": steps < 46341,  # its square fits int32
    })  # fmt: skip


def idle_flags(args):
    """Flags without effect beside the others, and why."""
    idle = {} if args.auto_alpha else {"target_entropy": "alpha is not learnt; add --auto-alpha"}
    if args.reward_size:
        idle["reward_scale"] = "the pay is held at --reward-size; add --reward-size 0"
    only = {  # flag: the objectives that use it
        "plan nearest own_weight own_between rescale_episodes": ("apwd", "pwd"),
        "discriminator_lr": ("diayn", "dads", "metra"), "metra_slack metra_lambda": ("metra",),
        "reward_scale": ("apwd", "pwd", "diayn", "dads", "metra"),
    }  # fmt: skip
    for names, objectives in only.items():
        if args.objective not in objectives:
            idle |= dict.fromkeys(names.split(), f"--objective {args.objective} does not use it")
    return idle


def open_world(args):
    """Refuse bad flags -> args in whole rounds, task, env, steps of an episode."""
    runner.check(args)
    task = envs.task(args.task, **runner.task_options(args.task_options))
    env, episode_length = world_of(task, args.backend), args.episode_length or task.episode_length
    args = whole_rounds(args, episode_length)
    check_args(args, task, episode_length)
    fresh = args.rollout_episodes if args.collect == "rollouts" else 0
    env.check_batch(args.num_policies * max(args.num_envs, args.eval_episodes, 50, fresh))
    return args, task, env, episode_length


def log_evaluation(run, step, train, metrics, actor, files):
    """Log and print an evaluation; with --keep-policies, keep the policies that it judged."""
    run.record(step, train | metrics)
    diversity.show_evaluation(step, metrics, run.args, is_diverse(run.args) and not run.args.random)
    if run.args.keep_policies:
        about = {k: v.tolist() for k, v in metrics.items() if k in ("eval/task_return", "eval/length")}
        write_policy(run, actor, f"policies/update_{step:07d}.npz", update=step, rows=files.rows(), **about)


def write_policy(run, actor, name="policy.npz", **about):
    """The policies in the layout of docs/policy.md; called by all processes."""
    about |= {"observations": "env" if is_diverse(run.args) else "task"}
    about |= {"log_std_min": run.args.log_std_min, "log_std_max": run.args.log_std_max}
    actor = run.gather(actor)
    if run.is_first:
        run.write_policy("tanh_gaussian", {"actor": actor}, name, **about)


def main(args):
    """Train K policies and write their buffers -> metrics of the last evaluation; {} if a resumed run is finished."""
    args, task, env, episode_length = open_world(args)
    observe = (lambda x: x) if is_diverse(args) else task.observe  # a diverse policy must see where it is
    init, warm_up, train_chunk, rollouts = make_train(args, env, task, observe, episode_length)
    evaluation = make_evaluation(args, task, rollouts)
    key_train, key_eval, key_collect = jax.random.split(jax.random.key(args.seed), 3)
    on_devices = jax.jit(lambda state: state, out_shardings=state_sharding(args))

    with runner.Run("wurl_sac", args, task, gather=lambda x: devices.whole(x, args.num_policies, args)) as run:
        if are_finished(run, args.num_policies):
            return {}
        like, sizes = jax.eval_shape(init, key_train), round_sizes(args, episode_length)
        disk = announce_rounds(args, task, env, like.agent.actor, episode_length, *sizes)
        train_chunk = run.compile(train_chunk, like, placed=True, disk=disk)
        files = PolicyRows(run.folder / "rows", args.num_policies, env, run.meta.get("rows"))  # cut to the saved state
        state = on_devices(run.restore(init, key_train))
        if "warmup" not in run.meta:
            state, (_, _, *data) = warm_up(state)
            files.add(*data, task)
            run.write(state, rows=files.rows(), warmup=files.rows(), train={})
            print(f"warm-up: {files.counts[0]} steps per policy, {time.time() - run.began:.0f} s", flush=True)

        logged = run.meta["train"]  # for the last evaluation, where a resumed run has no chunk left
        for step in run.chunks("update", args.num_updates, state.num_updates):
            state, (metrics, distances, *data) = train_chunk(state)  # lines (1) to (7), round after round
            metrics, distances = jax.tree.map(np.asarray, (metrics, distances))
            metrics |= {f"train/{name}": x for name, x in neighbour_distances(distances[-1]).items()}
            run.progress(step, metrics, SHOWN)
            files.add(*data, task)
            logged = {k: float(np.mean(v)) for k, v in metrics.items()} | {"time/updates_per_s": run.rate()}
            if run.due(step) and step < args.num_updates:
                scores, _ = evaluation(state.agent.actor, key_eval, args.eval_episodes)
                log_evaluation(run, step, logged, scores, state.agent.actor, files)
            run.save(state, rows=files.rows(), train=logged)

        actor = state.agent.actor
        scores, snapshot = evaluation(actor, key_eval, 50)  # the authors' protocol
        log_evaluation(run, args.num_updates, logged, scores, actor, files)
        if not args.random:  # the networks of random policies never act
            write_policy(run, actor)
        diversity.write_figures(run, snapshot)
        fresh = fresh_rows(run, env, rollouts, actor, key_collect) if args.collect == "rollouts" else None
        write_buffers(run, f"{task.name}-wurl-seed{args.seed}", env, episode_length, files, fresh)
        return scores


if __name__ == "__main__":
    runner.launch(main, Args, preset, PRESETS, __doc__, cpu_devices=devices.cpu_devices_for_policies, idle=idle_flags)
