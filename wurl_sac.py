"""WURL-SAC: K soft actor-critics, no task reward, each paid for being far from its nearest neighbour.

Paper      Wasserstein Unsupervised Reinforcement Learning (He et al., AAAI 2022), arXiv 2110.07940;
           as the data generator of UDG (Unsupervised Data Generation for Offline RL), arXiv 2506.19643.
Objective  max over pi_1..pi_K of  min over i != j of  W1(rho_i, rho_j)     (UDG's surrogate of the minimax regret)

Algorithm  one round, all K policies at once:
  (1) roll out:  N episodes of L steps with every policy, a ~ pi_k(. | s), from fresh resets
  (2) project:   M unit directions v_m; sort the features f(s_{t+1}) of every policy along each    (APWD, section 3)
  (3) couple:    rank-to-rank transport plan P between policies k and l; cost in the full space
                 c_kl(t) = 1/M sum_m D sum_j P_ij ||a_i - b_j||,   i = rank of step t along v_m
  (4) nearest:   l* = argmin_l sum_t c_kl(t), one l* for a whole episode
  (5) pay:       r_t = w_div * scale * c_kl*(t) * (L / episode length) + w_task * r_task(s, a, s')
  (6) store:     the round in policy k's replay (the newest R transitions) and in its buffer file (everything)
  (7) learn:     U SAC updates per policy: critics, actor with the new critics, alpha, Polyak target

Symbols    s observations [.., S] | a actions [.., A] | f features [.., d] | v directions [M, d] | c cost [K, K, n]
           K policies | N environments a policy | L episode_length | n = N L points | y target [B] | q [2, B]
           alpha entropy weight | gamma discount | tau Polyak rate | scale (paper: reward scale)

Deviations
  D1  paper's APWD pays each step its own transport cost; reference code re-sorts in place, so that for M > 1 the
      costs land on the wrong steps; here: as the paper says.
  D2  reference code pays a_t for s_{t-1} and the first step for the episode before; here: r_t is the cost of s_{t+1}.
  D3  reference code: one policy moves at a time against cached states; here: all K move at once against this round.
  D4  reference code stores time limits of some environments as terminal; here: always bootstrap through them.
  D5  reference code learns from all it ever saw; here: from the newest `replay_size` transitions, because
      pseudo-rewards go stale as the other policies move. The buffer file keeps everything.
  D6  reference code gives random warm-up steps reward 0; here: their real reward (--warmup-zero-reward for theirs).
  D7  reference configs scale the cost by 10 to 100; the shipped checkpoints fit a scale near 1; here: preset per world.
  D8  reference code corrects tanh by log(1 - a^2 + 1e-6); here: exactly.
  D9  reference code measures all observations on Ant; UDG asks for a low-dimensional space; here: task.feature (xy)
      or the height (cheetah), times --feature-scales.
  D10 reference keeps the learning rate; here: it falls linearly to 0 over the last `lr_decay` of the run, which
      ends the chase of policies after one another, so that what is saved is what was reached.
  D11 reference code updates once per real step; here: per nominal step, N L a round also where episodes end early
      (humanoid), so that a round is one program: updates per real step then exceed --updates-per-step. Without a
      pseudo-reward, which needs whole episodes side by side, a new episode begins where one ends: all N L happen.
  D12 reference code draws 5 directions for each pair of an episode and a cache; here: one draw of M serves all pairs
      of a round, whose N episodes are pooled into one sample a policy.
  D13 reference DIAYN-I looks at s_t, DADS-I normalises by running statistics; both draw from all that was seen; here:
      the features of s_{t+1}, this round's rows and its standard deviation.

Files      writes runs/wurl_sac/<task>/<name>/: buffers/policy_XX.npz (docs/buffer.md), policy.npz (docs/policy.md),
           log.jsonl, state.npz, trajectories.png, distances.png
Run        python wurl_sac.py --quick                    (point robot, under 2 minutes on 2 cores)
           python wurl_sac.py --num-policies 10          (ant, within 30 minutes on 2 cores)
           python wurl_sac.py --num-policies 10 --preset paper      (200k steps and updates a policy)
Expect     ant, seed 0: minimum-W 3.56 after 20 min on 2 cores; --preset paper: 4.98 after 2 h 27 min on one core
           point, 5 seeds: minimum-W 2.99, discriminator success 0.960, 5 to 8 min each (docs/wurl_sac.md)
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.experimental import multihost_utils

import envs


@dataclass(frozen=True)
class Args:
    # --- run ---
    task: str = "ant"
    """world or task to run in, e.g. ant, cheetah, point, humanoid, ant-angle-60; a task's reward is recorded, and
    learnt from with task_weight"""
    preset: str = ""
    """a name in PRESETS; empty: the one of the world (ours); 'paper': the published budget of ant and cheetah"""
    seed: int = 0
    """seed of networks, environments and noise; same seed, machine and versions: same numbers on a CPU"""
    out: str = ""
    """run folder; empty: runs/wurl_sac/<task>/seed<seed>"""
    resume: bool = False
    """go on from the folder's state.npz, exactly"""
    quick: bool = False
    """the point robot with 4 policies, under 2 minutes on 2 cores"""
    track: bool = False
    """mirror the log to Weights & Biases (needs `pip install wandb`)"""
    backend: Literal["auto", "mujoco", "mjx"] = "auto"
    """physics: C MuJoCo (auto on a CPU) or MJX (auto elsewhere); ignored by the point worlds"""
    # --- budget ---
    num_policies: int = 10
    """K: number of policies (paper: 10)"""
    num_updates: int = 36_000
    """gradient steps per policy; environment steps per policy = num_updates / updates_per_step"""
    updates_per_step: float = 0.25
    """U: gradient steps per environment step of a policy (reference code: 1; ours on a CPU: 0.25)"""
    num_envs: int = 2
    """N: episodes per policy and round (reference code: 1)"""
    episode_length: int = 0
    """L: steps of an episode; 0: the task's own (ant, cheetah 200; point 100)"""
    warmup_steps: int = 2_000
    """environment steps per policy with uniform random actions at the start (reference code: 20,000 over all)"""
    chunk: int = 100
    """gradient steps per policy in one jitted call; a multiple of a round's, a divisor of eval_every"""
    eval_every: int = 4_000
    """gradient steps per policy between two evaluations"""
    eval_episodes: int = 10
    """stochastic episodes per policy in an evaluation; the last evaluation takes 50 (authors' protocol)"""
    # --- diversity ---
    objective: Literal["apwd", "pwd", "diayn", "dads", "none"] = "apwd"
    """pseudo-reward: apwd (WURL), pwd (whole distance at the last step), diayn / dads with K networks, none"""
    diversity_weight: float = 1.0
    """w_div: weight of the pseudo-reward; 0 with a task is plain SAC (the supervised baseline)"""
    task_weight: float = 0.0
    """w_task: weight of the task reward (UDG's partial reward; WURL: 0)"""
    reward_scale: float = 8.0
    """scale: multiplies the cost per step (published 50 for ant is not what the checkpoints had; see D7)"""
    num_directions: int = 8
    """M: projections per round (reference code: 5)"""
    orthogonal_directions: bool = False
    """orthogonal directions in blocks of d (reference: OPWD), lower variance"""
    rescale_episodes: bool = True
    """multiply by L / length of the episode, so that short episodes earn the same total (Humanoid: False)"""
    div_features: str = "task"
    """space of the distance: task (its own features), full (all observations) or indices such as 0,1. Ours for the
    cheetah: 0, its height; in (v_x, z) policies are paid for the width of their own cloud (docs/udg.md)"""
    feature_scales: tuple[float, ...] = ()
    """factor of each feature in the distance; empty: 1 for all. Ours for the cheetah: 10"""
    warmup_zero_reward: bool = False
    """reward 0 for warm-up steps, as the reference code (D6)"""
    discriminator_lr: float = 2e-3
    """Adam rate of the discriminator (diayn; reference 2e-3) or predictor (dads; reference 3e-4)"""
    # --- SAC ---
    hidden_sizes: tuple[int, ...] = (256, 256)
    """widths of actor and critics (reference: 256, 256; point worlds 64, 64; Humanoid 1024, 1024)"""
    batch_size: int = 128
    """B: transitions per update (reference: 128; point worlds 200)"""
    replay_size: int = 10_000
    """R: newest transitions per policy that are learnt from (D5)"""
    learning_rate: float = 6e-4
    """Adam rate of actor, critics and alpha (reference: 3e-4; ours, for a sixth of its updates: 6e-4)"""
    lr_decay: float = 0.4
    """share of the run, at its end, over which the learning rate falls linearly to 0 (D10); 0: never"""
    gamma: float = 0.99
    """discount (reference: 0.99)"""
    tau: float = 0.005
    """Polyak rate of the target critics, every update (reference: 0.005)"""
    q_bound: float = 1e6
    """largest mean |Q| of a batch before the run stops as diverged; 0: go on, also where a loss is not finite (ours)"""
    alpha: float = 0.2
    """entropy weight, its start with auto_alpha (reference: 0.2)"""
    auto_alpha: bool = False
    """learn alpha towards entropy -A (SAC); for supervised data, where a fixed 0.2 makes no expert"""
    log_std_min: float = -20.0
    """lower clip of the actor's log standard deviation (reference: -20)"""
    log_std_max: float = 2.0
    """upper clip of the actor's log standard deviation (reference: 2)"""
    policies_at_once: int = 0
    """policies updated in one batched call; 0: all on an accelerator or for narrow nets, 1 on a CPU"""
    num_devices: int = 0
    """devices that share the policies; 0: all there are. On a CPU, 2 or more make that many out of its cores"""
    distributed: bool = False
    """one of several processes that share the policies, each with num_devices; started by Slurm, Kubernetes, a TPU
    pod or Open MPI, or by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID (docs/scale.md)"""
    # --- data ---
    collect: Literal["replay", "rollouts"] = "replay"
    """buffers hold the whole training data (replay) or fresh episodes of the final policies (rollouts)"""
    rollout_episodes: int = 250
    """episodes per policy with --collect rollouts"""
    keep_policies: bool = False
    """keep the policies of every evaluation: policies/update_<n>.npz, with their return and the rows behind them"""
    random: bool = False
    """policies stay uniform random: the random-data baseline (no updates)"""


POINT = dict(
    num_envs=1, updates_per_step=1.0, hidden_sizes=(64, 64), batch_size=200, replay_size=2_000,
    warmup_steps=1_000, num_updates=30_000, chunk=500, eval_every=1_500, reward_scale=1.0,
    learning_rate=3e-4,
)  # fmt: skip
PRESETS = {
    "ant": {},
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
QUICK = dict(task="point", num_policies=4, num_updates=6_000, chunk=500, eval_every=1_500)


# === data ===


class Transitions(NamedTuple):
    """What is learnt from; leading axes free, features last."""

    observations: jax.Array  # [.., S]
    actions: jax.Array  # [.., A]
    rewards: jax.Array  # [..]
    next_observations: jax.Array  # [.., S]
    terminals: jax.Array  # [..] 1.0 where the episode truly ended: stops bootstrapping, as no time limit does


class Ring(NamedTuple):
    """The newest rows of a stream: `rows` is a pytree of [capacity, ..], the oldest row is overwritten first."""

    rows: Any
    position: jax.Array  # next row to write
    size: jax.Array  # rows that hold data; sampling looks at these only


def ring_init(row, capacity):
    """An empty ring for rows shaped like the pytree `row` (without a leading axis)."""
    rows = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), row)
    return Ring(rows, jnp.int32(0), jnp.int32(0))


def ring_insert(ring, rows, mask):
    """Write the rows [n, ..] whose mask [n] is True, in order; the others leave no trace. n <= capacity."""
    capacity = jax.tree.leaves(ring.rows)[0].shape[0]
    slots = (ring.position + jnp.cumsum(mask) - 1) % capacity
    slots = jnp.where(mask, slots, capacity)  # out of range: dropped by the scatter
    new = jax.tree.map(lambda old, x: old.at[slots].set(x, mode="drop"), ring.rows, rows)
    count = jnp.sum(mask, dtype=jnp.int32)
    return Ring(new, (ring.position + count) % capacity, jnp.minimum(ring.size + count, capacity))


def ring_sample(ring, key, batch_size):
    """`batch_size` rows, uniformly with replacement, of those that hold data."""
    index = jax.random.randint(key, (batch_size,), 0, ring.size)
    return jax.tree.map(lambda x: x[index], ring.rows)


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


def unit_directions(key, num, dim, orthogonal=False):
    """[M, d] directions of length 1, uniform on the sphere; `orthogonal`: mutually so in blocks of d."""
    if orthogonal:
        blocks = jax.random.normal(key, (-(-num // dim), dim, dim))
        v = jnp.linalg.qr(blocks)[0].mT.reshape(-1, dim)[:num]
    else:
        v = jax.random.normal(key, (num, dim))
    return v / jnp.linalg.norm(v, axis=-1, keepdims=True)


def sort_along(points, mask, v):
    """Sort points [n, d] by their projection on v [d], those with mask [n] False last -> points, order [n].

    The product-sum is written out: a float32 matmul may run in TF32 on a GPU and change the order.
    """
    order = jnp.argsort(jnp.where(mask, jnp.sum(points * v, -1), jnp.inf), stable=True)
    return points[order], order


def coupled_cost(a, b, num_a, num_b):
    """Cost per source RANK [D] of the rank-to-rank plan between sorted a [D, d] and b [T, d].

    The first num_a and num_b rows are points, the rest padding. In units of 1 / (num_a num_b) the plan is the
    overlap of [i num_b, (i+1) num_b] with [j num_a, (j+1) num_a]: sort all borders, each gap between two
    neighbours belongs to one (i, j). The costs of a row are averaged with its row weights (they sum to 1).
    """
    ends_a = jnp.minimum(jnp.arange(1, len(a) + 1), num_a) * num_b
    ends_b = jnp.minimum(jnp.arange(1, len(b) + 1), num_b) * num_a
    ends = jnp.sort(jnp.concatenate([ends_a, ends_b]))
    lengths = jnp.diff(ends, prepend=0)
    i = jnp.clip((ends - 1) // jnp.maximum(num_b, 1), 0, jnp.maximum(num_a - 1, 0))
    j = jnp.clip((ends - 1) // jnp.maximum(num_a, 1), 0, jnp.maximum(num_b - 1, 0))
    distance = jnp.linalg.norm(a[i] - b[j], axis=-1) * lengths / jnp.maximum(num_b, 1)
    return jax.ops.segment_sum(distance, i, len(a), indices_are_sorted=True)


def pairwise_apwd(source, source_mask, target, target_mask, directions):
    """c_kl(t) [K, J, n] of every source step against every target set, directions [M, d] shared by all.    # D1

    source [K, n, d], target [J, m, d], masks [K, n], [J, m] (True: a point). The mean of c_kl over the points
    of k is an upper bound of W1(k, l), equal to it for d = 1. Every set is sorted once per direction. Where all
    points are valid and n = m (episodes of fixed length) the plan is the identity: a subtraction.
    """
    num_source, num_target = source_mask.sum(-1), target_mask.sum(-1)

    def identity_plan(a, b):  # the sum over features written out, so that it runs over whole rows of numbers
        b = b.transpose(1, 2, 0)
        return jnp.sqrt(sum((a[:, :, i, None] - b[:, i]) ** 2 for i in range(a.shape[-1])))

    def general_plan(a, b):
        to_all = jax.vmap(coupled_cost, (None, 0, None, 0), out_axes=1)
        return jax.lax.map(lambda x: to_all(x[0], b, x[1], num_target), (a, num_source))

    def along(total, v):
        a, order = jax.vmap(sort_along, (0, 0, None))(source, source_mask, v)
        b, _ = jax.vmap(sort_along, (0, 0, None))(target, target_mask, v)
        if source.shape[1] == target.shape[1]:
            equal = jnp.all(source_mask) & jnp.all(target_mask)
            cost = jax.lax.cond(equal, identity_plan, general_plan, a, b)
        else:
            cost = general_plan(a, b)  # [K, n, J], by rank of the source point; the order gives it back its time
        return total.at[jnp.arange(len(source))[:, None], order].add(cost, unique_indices=True), None

    total = jnp.zeros((*source.shape[:2], len(target)))
    total, _ = jax.lax.scan(along, total, directions)
    return jnp.where(source_mask[:, None], total.mT / len(directions), 0.0)


def apwd_reward(source, alive, target, target_alive, directions, args):
    """Pseudo-reward [K, N, L] and pair distances [K, K] (header, lines 2 to 5).

    source, target [K, N, L, d] features of the round's states s_{t+1}, alive [K, N, L]; in training source = target.
    r_t = scale * c_kl*(t) * (L / length),   l* = argmin over l != k of the episode's sum of c_kl
    """
    K, N, L, _ = source.shape
    flat = lambda x: x.reshape(K, -1, *x.shape[3:])
    own = flat(source), flat(alive)
    shared = target is source and target_alive is alive  # then sorted once: half of the time
    others = own if shared else (flat(target), flat(target_alive))
    cost = pairwise_apwd(*own, *others, directions)
    distances = cost.sum(-1) / jnp.maximum(alive.sum((1, 2)), 1)[:, None]
    cost = cost.reshape(K, K, N, L)
    sums = jnp.where(jnp.eye(K, dtype=bool)[:, :, None], jnp.inf, cost.sum(-1))
    nearest = jnp.argmin(sums, 1)  # [K, N]: l*, one for each episode
    reward = jnp.take_along_axis(cost, nearest[:, None, :, None], 1)[:, 0]
    lengths = jnp.maximum(alive.sum(-1, keepdims=True), 1)
    if args.objective == "pwd":  # the whole distance at the last step, nothing before
        reward = jnp.where(jnp.arange(L) == lengths - 1, reward.sum(-1, keepdims=True) / lengths, 0.0)
    elif args.rescale_episodes:
        reward = reward * (L / lengths)
    return args.reward_scale * reward, distances


def diayn_reward(net, features, args):
    """DIAYN-I: r_t = scale * max(log q(k | f_t), 10 log(1/K)); features [K, N, L, d] -> [K, N, L]."""
    logits = MLP((*args.hidden_sizes, args.num_policies)).apply(net, features)
    log_q = jnp.moveaxis(nn.log_softmax(logits), -1, 1)  # [K, K, N, L]
    own = jnp.arange(args.num_policies)
    return args.reward_scale * jnp.maximum(log_q[own, own], -10 * jnp.log(args.num_policies))


def diayn_loss(net, features, index, args):
    """Cross entropy of the discriminator q(k | f): features [B, d], index [B] -> scalar."""
    logits = MLP((*args.hidden_sizes, args.num_policies)).apply(net, features)
    return optax.softmax_cross_entropy_with_integer_labels(logits, index).mean()


def dads_log_prob(net, features, change, index, args):
    """log N(change; g(f, k), 1) up to a constant: features, change [.., d], index [..] -> [..]."""
    x = jnp.concatenate([features, jax.nn.one_hot(index, args.num_policies)], -1)
    return -0.5 * jnp.sum((change - MLP((256, 256, change.shape[-1])).apply(net, x)) ** 2, -1)


def dads_reward(net, features, change, args):
    """DADS-I: r = scale [ log K - log(1 + sum over l != k of exp(clip(log p_l - log p_k, -20, 1))) ]."""
    log_p = [dads_log_prob(net, features, change, jnp.full(features.shape[:-1], l), args)
             for l in range(args.num_policies)]  # fmt: skip
    log_p = jnp.stack(log_p, 1)  # [K, K, N, L]: first axis who acted, second who is asked
    own = jnp.arange(args.num_policies)
    ratio = jnp.exp(jnp.clip(log_p - log_p[own, own][:, None], -20.0, 1.0)).sum(1)  # the own term is 1
    return args.reward_scale * (jnp.log(args.num_policies) - jnp.log(ratio))


def dads_loss(net, features, change, index, args):
    """-mean log N(change; g(f, k), 1)."""
    return -dads_log_prob(net, features, change, index, args).mean()


def fit_net(net, net_opt, loss, rows, alive, key, args, batch_size=200):
    """N L Adam steps of the discriminator or predictor on this round: rows [K, N, L, ..], alive [K, N, L]."""  # D13
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), rows)
    valid = jnp.argsort(~alive.reshape(-1), stable=True)  # steps that happened first

    def step(carry, key):
        net, opt = carry
        i = valid[jax.random.randint(key, (batch_size,), 0, alive.sum())]
        grads = jax.grad(loss)(net, *jax.tree.map(lambda x: x[i], rows), args)
        updates, opt = optax.adam(args.discriminator_lr).update(grads, opt)
        return (optax.apply_updates(net, updates), opt), None

    keys = jax.random.split(key, alive[0].size)
    (net, net_opt), _ = jax.lax.scan(step, (net, net_opt), keys)
    return net, net_opt


def pseudo_reward(net, net_opt, features, alive, key, args):
    """Lines (2) to (5) of a round -> reward [K, N, L], distances [K, K], and the net of DIAYN or DADS, learnt from it.

    features [K, N, L, d] of the states s_{t+1}, alive [K, N, L]: the step happened.
    """
    K, d = args.num_policies, features.shape[-1]
    if K == 1:  # there is no other
        return jnp.zeros(alive.shape), jnp.zeros((1, 1)), net, net_opt
    key_directions, key_net = jax.random.split(key)  # D12
    directions = unit_directions(key_directions, args.num_directions, d, args.orthogonal_directions)
    reward, distances = apwd_reward(features, alive, features, alive, directions, args)
    index = jnp.broadcast_to(jnp.arange(K)[:, None, None], alive.shape)
    if args.objective == "diayn":
        reward = diayn_reward(net, features, args)
        net, net_opt = fit_net(net, net_opt, diayn_loss, (features, index), alive, key_net, args)
    if args.objective == "dads":
        before = jnp.concatenate([features[:, :, :1], features[:, :, :-1]], 2)
        change = (features - before) / jnp.maximum((features - before).std((0, 1, 2)), 1e-6)
        known = alive & (jnp.arange(alive.shape[-1]) > 0)  # the feature before the first step is not
        reward = jnp.where(known, dads_reward(net, before, change, args), 0.0)
        net, net_opt = fit_net(net, net_opt, dads_loss, (before, change, index), known, key_net, args)
    if args.objective == "none":
        reward = jnp.zeros_like(reward)
    return reward, distances, net, net_opt


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
    """-log alpha (mean log pi + target entropy): alpha grows while the entropy is below its target (-A)."""
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
    length = max(args.num_updates - start, 1)
    rate = args.learning_rate
    if args.lr_decay:
        rate = optax.linear_schedule(args.learning_rate, 0.0, length, start)
    return optax.adam(rate)


def wurl_update(agent, replay, key, args, observe):
    """Line (7): one SAC step of one policy on a batch of its replay -> agent, metrics."""
    key_batch, key_critic, key_actor = jax.random.split(key, 3)
    batch = ring_sample(replay, key_batch, args.batch_size)
    batch = batch._replace(observations=observe(batch.observations), next_observations=observe(batch.next_observations))
    alpha = jnp.exp(agent.log_alpha)
    optimiser = adam(args)

    grad_fn = jax.value_and_grad(wurl_critic_loss, has_aux=True)
    (_, critic_metrics), grads = grad_fn(agent.critic, agent.target, agent.actor, alpha, batch, key_critic, args)
    step, critic_opt = optimiser.update(grads, agent.critic_opt)
    critic = optax.apply_updates(agent.critic, step)

    grad_fn = jax.value_and_grad(wurl_actor_loss, has_aux=True)
    (_, actor_metrics), grads = grad_fn(agent.actor, critic, alpha, batch, key_actor, args)
    step, actor_opt = optimiser.update(grads, agent.actor_opt)
    actor = optax.apply_updates(agent.actor, step)

    log_alpha, alpha_opt = agent.log_alpha, agent.alpha_opt
    if args.auto_alpha:
        target_entropy = -float(batch.actions.shape[-1])
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
        key_normal, key_uniform = jax.random.split(key)
        mean, log_std = net.apply(actor, observe(state.obs))
        actions, log_probs = tanh_normal_sample(mean, log_std, jax.random.normal(key_normal, mean.shape))
        if random:
            actions = jax.random.uniform(key_uniform, mean.shape, minval=-1.0, maxval=1.0)
            log_probs = jnp.full(log_probs.shape, -mean.shape[-1] * jnp.log(2.0))
        after = jax.vmap(env.step)(state, actions)
        transition = envs.Transition(
            state.obs, actions, after.obs, state.info["root_position"], after.info["root_velocity"],
            state.info.get("goal"),
        )  # fmt: skip
        terminals = after.done > 0.5
        steps = Rollout(transition, terminals, log_probs, alive)
        if restart:
            fresh = jax.vmap(env.reset)(jax.random.split(jax.random.fold_in(key, 2), num_envs))
            pick = lambda new, old: jnp.where(terminals.reshape(-1, *[1] * (old.ndim - 1)), new, old)
            return (jax.tree.map(pick, fresh, after), alive), steps
        return (after, alive & ~terminals), steps

    start = jax.vmap(env.reset)(jax.random.split(key_reset, num_envs))
    alive = jnp.ones(num_envs, bool)
    _, steps = jax.lax.scan(step, (start, alive), jax.random.split(key_steps, length))
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), steps)  # [N, L, ..]


# === evaluation ===


def feature_function(args, task):
    """Transition [..] -> features [.., d] of the next state, by `--div-features` and `--feature-scales`."""  # D9, D2
    scales = jnp.array(args.feature_scales or 1.0)
    if args.div_features == "task":
        return lambda transition: scales * task.feature(transition)
    if args.div_features == "full":
        return lambda transition: scales * transition.next_observations
    index = jnp.array([int(i) for i in args.div_features.split(",")])
    return lambda transition: scales * transition.next_observations[..., index]


def distance_metrics(distances, prefix, suffix=""):
    """Of a [K, K] matrix: distance to the nearest other policy (mean: the authors' WD), mean over pairs."""
    K = len(distances)
    others = jnp.where(jnp.eye(K, dtype=bool), jnp.inf, distances)
    nearest = others.min(1)
    is_nearest = jnp.zeros(K, bool).at[others.argmin(1)].set(True)
    return {
        f"{prefix}/min_w{suffix}": nearest.mean(),
        f"{prefix}/smallest_w{suffix}": nearest.min(),
        f"{prefix}/pair_mean_w{suffix}": (distances.sum() - jnp.trace(distances)) / (K * (K - 1)),
        f"{prefix}/distinct_nearest{suffix}": is_nearest.sum(),
    }


def discriminator_success(x, train, test, key, args, num_steps=1_000, batch_size=200):
    """Geometric mean of p(policy | state) and accuracy of a fresh K-way MLP (Adam 2e-3, authors' protocol).

    x [K, E, L, S] states; trained on the rows with train [K, E, L], judged on those with test [K, E, L].
    """
    net, optimiser = MLP((*args.hidden_sizes[:2], len(x))), optax.adam(2e-3)
    y = jnp.broadcast_to(jnp.arange(len(x))[:, None, None], train.shape).reshape(-1)
    x, rows = x.reshape(-1, x.shape[-1]), jnp.argsort(~train.reshape(-1), stable=True)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels

    def step(carry, key):
        params, opt = carry
        i = rows[jax.random.randint(key, (batch_size,), 0, train.sum())]
        grads = jax.grad(lambda p: cross_entropy(net.apply(p, x[i]), y[i]).mean())(params)
        updates, opt = optimiser.update(grads, opt)
        return (optax.apply_updates(params, updates), opt), None

    key_init, key_steps = jax.random.split(key)
    params = net.init(key_init, x[:1])
    keys = jax.random.split(key_steps, num_steps)
    (params, _), _ = jax.lax.scan(step, (params, optimiser.init(params)), keys)
    logits, weight = net.apply(params, x), test.reshape(-1) / test.sum()
    return jnp.exp(-cross_entropy(logits, y) @ weight), (logits.argmax(-1) == y) @ weight


def make_evaluation(args, task, rollouts):
    """-> evaluation(actor [K], key, E) -> metrics (numbers and [K] lists), arrays for the figures."""
    features_of = feature_function(args, task)

    def pair_distances(points, mask, num_directions):
        """[K, K] over at most 10,000 points a policy (K > 100: fewer), along the same directions every time."""
        K, _, L, d = points.shape
        if K == 1:
            return jnp.zeros((1, 1))
        keep = max(1, min(10_000, 10**8 // K**2) // L)  # of the [K, K, points] there are three at a time
        points, mask = points[:, :keep].reshape(K, -1, d), mask[:, :keep].reshape(K, -1)
        cost = pairwise_apwd(points, mask, points, mask, unit_directions(jax.random.key(0), num_directions, d))
        return cost.sum(-1) / jnp.maximum(mask.sum(-1, keepdims=True), 1)

    @functools.partial(jax.jit, static_argnums=2, out_shardings=placed(args))
    def evaluation(actor, key, num_episodes):
        key_rollout, key_all, key_half = jax.random.split(key, 3)
        keys = jax.random.split(key_rollout, args.num_policies)
        steps = rollouts(actor, keys, num_episodes)
        t, alive = steps.transition, steps.alive
        features, full = features_of(t), t.next_observations
        path = t.root_positions + task.dt * t.root_velocities
        last = alive.sum(-1)[..., None, None] - 1
        travel = jnp.take_along_axis(path, last, 2)[:, :, 0] - t.root_positions[:, :, 0]
        angle = jnp.arctan2(travel.mean(1)[:, 1], travel.mean(1)[:, 0])
        metrics = {
            "eval/travel": jnp.linalg.norm(travel, axis=-1).mean(1),
            "eval/direction_deg": jnp.degrees(angle) % 360,
            "eval/length": alive.sum(-1).mean(1),
        }
        distances = pair_distances(features, alive, 32)
        if args.num_policies > 1:
            metrics |= distance_metrics(distances, "eval")
            metrics |= distance_metrics(pair_distances(full, alive, 8), "eval", "_full")
            even = alive & (jnp.arange(num_episodes) % 2 == 0)[:, None]
            for name, train, test, k in (
                ("", alive, alive, key_all),
                ("_held_out", even, alive & ~even, key_half),
            ):
                success, accuracy = discriminator_success(full, train, test, k, args)
                metrics |= {f"eval/disc_success{name}": success, f"eval/disc_accuracy{name}": accuracy}
        if task.has_reward:
            metrics["eval/task_return"] = jnp.where(alive, task.reward(t), 0.0).sum(-1).mean(1)
        return metrics, {"paths": path, "features": features, "alive": alive, "matrix": distances}

    return evaluation


# === training ===


class WurlState(NamedTuple):
    """Everything a run needs to go on; all leaves but key, num_updates and net have a leading policy axis."""

    key: jax.Array
    num_updates: jax.Array
    agent: Agent
    replay: Ring  # of Transitions, one ring per policy
    net: Any  # discriminator or predictor (diayn, dads); empty otherwise
    net_opt: Any


def is_diverse(args):
    """Whether policies are paid for diversity."""
    return args.diversity_weight != 0 and args.objective != "none"


def empty_transition(env):
    """A Transition of zeros: the shapes of one step of the world."""
    obs, two = jnp.zeros(env.observation_size), jnp.zeros(2)
    return envs.Transition(obs, jnp.zeros(env.action_size), obs, two, two)


def init_agent(key, args, env, observe):
    """Networks, target and optimisers of one policy."""
    key_actor, key_critic = jax.random.split(key)
    obs, actions = observe(jnp.zeros((1, env.observation_size))), jnp.zeros((1, env.action_size))
    actor = actor_net(args, env.action_size).init(key_actor, obs)
    critic = Critics(args.hidden_sizes).init(key_critic, obs, actions)
    log_alpha, opt = jnp.log(jnp.float32(args.alpha)), adam(args).init
    target = jax.tree.map(jnp.copy, critic)
    return Agent(actor, critic, target, log_alpha, opt(actor), opt(critic), opt(log_alpha))


def init_net(key, num_features, args):
    """DIAYN-I's discriminator or DADS-I's predictor; nothing for the others."""
    if args.objective == "diayn":
        return MLP((*args.hidden_sizes, args.num_policies)).init(key, jnp.zeros(num_features))
    if args.objective == "dads":
        return MLP((256, 256, num_features)).init(key, jnp.zeros(num_features + args.num_policies))
    return {}


def init_state(key, args, env, task, observe):
    """All that a run begins with: K agents and empty replays."""
    key, key_agents, key_net = jax.random.split(key, 3)
    t = empty_transition(env)
    row = Transitions(t.observations, t.actions, jnp.float32(0), t.next_observations, jnp.float32(0))
    agent = jax.vmap(lambda key: init_agent(key, args, env, observe))(jax.random.split(key_agents, args.num_policies))
    replay = jax.vmap(lambda _: ring_init(row, args.replay_size))(jnp.arange(args.num_policies))
    net = init_net(key_net, jax.eval_shape(feature_function(args, task), t).shape[-1], args)
    return WurlState(key, jnp.int32(0), agent, replay, net, optax.adam(args.discriminator_lr).init(net))


def round_sizes(args, episode_length):
    """Rounds of warm-up, updates per round, rounds of training."""
    steps = args.num_envs * episode_length
    updates = max(round(args.updates_per_step * steps), 1)  # D11
    return -(-args.warmup_steps // steps), updates, -(-args.num_updates // updates)


def device_mesh(count, args):
    """The devices that share `count` policies or seeds, as many of every process, and whether each has as many."""
    num = min(args.num_devices or jax.local_device_count(), -(-count // jax.process_count()))
    devices = [device for p in range(jax.process_count()) for device in jax.local_devices(p)[:num]]
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((len(devices),), ("share",), auto, devices=devices), count % len(devices) == 0


def over_devices(f, args):
    """f of trees with a leading axis of policies or seeds -> the same, each device with its share of them.

    Where they do not divide, the last places do the first ones once more, and that is dropped.
    """

    def shared(*trees):
        count = len(jax.tree.leaves(trees)[0])
        mesh, even = device_mesh(count, args)
        split = jax.shard_map(f, mesh=mesh, in_specs=jax.P("share"), out_specs=jax.P("share"), check_vma=False)
        if mesh.size == 1 or even:
            return (f if mesh.size == 1 else split)(*trees)
        padded = np.arange(-(-count // mesh.size) * mesh.size) % count
        return jax.tree.map(lambda x: x[:count], split(*jax.tree.map(lambda x: x[padded], trees)))

    return shared


def placed(args, *axes):
    """Where an array lies whose axis "share" is the policies'; on all devices where they do not divide."""
    mesh, even = device_mesh(args.num_policies, args)
    return jax.NamedSharding(mesh, jax.P(*axes) if even else jax.P())


def state_sharding(args):
    """Where a WurlState lies: agents and replays on the device of their policy, the rest on all."""
    split = placed(args, "share")
    return WurlState(placed(args), placed(args), split, split, placed(args), placed(args))


def own_policies(args):
    """The policies whose buffers this process writes, those of its devices."""
    num = jax.process_count()
    return [k for k in range(args.num_policies) if k * num // args.num_policies == jax.process_index()]


def own_part(x, args):
    """Of an array [R, K, ..] the policies of this process, on the host."""
    shards = {shard.index[1].start or 0: np.asarray(shard.data) for shard in x.addressable_shards}
    x = np.concatenate([shards[k] for k in sorted(shards)], 1)
    return x if x.shape[1] < args.num_policies else x[:, own_policies(args)]


def make_train(args, env, task, observe, episode_length):
    """-> init(key), warmup(state), train_chunk(state), rollouts(actor, keys, num_envs).

    warmup and train_chunk return state, (metrics [R, K], distances [R, K, K], Rollout and reward [R, K, N, L, ..]).
    """
    num_warmup, updates_per_round, _ = round_sizes(args, episode_length)
    features_of, sharding = feature_function(args, task), state_sharding(args)
    at_once = args.policies_at_once or (
        1 if jax.default_backend() == "cpu" and max(args.hidden_sizes) > 128 else args.num_policies
    )

    def rollouts(actor, keys, num_envs, random=False, restart=False):
        """Line (1) for all policies: actor [K], keys [K] -> Rollout [K, N, L, ..]."""
        one = lambda actor, key: rollout(
            actor, key, env, args, observe, num_envs, episode_length, random or args.random, restart
        )
        return over_devices(jax.vmap(one), args)(actor, keys)

    def train_policy(agent, replay, key):
        """Line (7): `updates_per_round` updates of one policy."""
        step = lambda agent, key: wurl_update(agent, replay, key, args, observe)
        agent, metrics = jax.lax.scan(step, agent, jax.random.split(key, updates_per_round))
        return agent, jax.tree.map(jnp.mean, metrics)

    def train_round(state, warmup):
        key, key_rollout, key_reward, key_update = jax.random.split(state.key, 4)
        K = args.num_policies
        keys = jax.random.split(key_rollout, K)
        steps = rollouts(state.agent.actor, keys, args.num_envs, warmup, not is_diverse(args))  # D3
        t = steps.transition
        reward, distances, net, net_opt = pseudo_reward(
            state.net, state.net_opt, features_of(t), steps.alive, key_reward, args
        )
        mixed = args.diversity_weight * reward + args.task_weight * task.reward(t)
        if warmup and args.warmup_zero_reward:  # D6
            mixed = jnp.zeros_like(mixed)
        rows = Transitions(t.observations, t.actions, mixed, t.next_observations, steps.terminals * 1.0)
        flat = jax.tree.map(lambda x: x.reshape(K, -1, *x.shape[3:]), (rows, steps.alive))
        replay = jax.vmap(ring_insert)(state.replay, *flat)
        agent, metrics, count = state.agent, {}, state.num_updates
        if not (warmup or args.random):
            keys = jax.random.split(key_update, K)
            train = lambda *x: jax.lax.map(lambda x: train_policy(*x), x, batch_size=at_once)
            agent, metrics = over_devices(train, args)(agent, replay, keys)
        if not warmup:
            count = count + updates_per_round
        metrics["train/pseudo_reward"] = reward.mean((1, 2))
        state = WurlState(key, count, agent, replay, net, net_opt)
        return state, (metrics, distances, steps, reward)

    def rounds(num, warmup):
        scan = lambda state: jax.lax.scan(lambda s, _: train_round(s, warmup), state, length=num)
        split = placed(args, None, "share")
        out = sharding, (placed(args), placed(args), split, split)
        return jax.jit(scan, donate_argnums=0, in_shardings=(sharding,), out_shardings=out)

    init = jax.jit(lambda key: init_state(key, args, env, task, observe), out_shardings=sharding)
    chunk = rounds(args.chunk // updates_per_round, False)
    return init, rounds(num_warmup, True), chunk, rollouts


# === run ===


def start_wandb(folder, config):
    """A new run of Weights & Biases; InputError where the package or the account is missing."""
    try:
        import wandb

        run = wandb.init(project="udg-jax", dir=str(folder), config=config)
    except ImportError:
        raise envs.InputError("--track: wandb is not installed; pip install wandb") from None
    except wandb.Error as error:
        raise envs.InputError(f"--track: {error} (WANDB_MODE=offline needs no account)") from None
    run.define_metric("*", step_metric="step")  # its own steps may not go back, as a second phase's do
    return run


class Logger:
    """log.jsonl (first line: the run, then one object per evaluation), TensorBoard, and W&B if asked for.

    `position`: bytes of log.jsonl to keep. A resumed run cuts the file back and shows what is left anew, to TensorBoard
    and as a new run of W&B, so that nothing stands twice and nothing is missing, whichever phase the steps belong to.
    """

    def __init__(self, folder, args, position=0):
        from tensorboardX.event_file_writer import EventsWriter

        header = {"args": dataclasses.asdict(args), "versions": envs.buffers.versions()}
        header |= {"commit": envs.buffers.git_commit(), "device": jax.devices()[0].device_kind}
        self.wandb = start_wandb(folder, header["args"]) if args.track else None
        for events in folder.glob("events.out.tfevents.*"):
            events.unlink()
        self.board = EventsWriter(str(folder / "events"))  # in this thread, so that a full disk is an error here
        self.file = open(folder / "log.jsonl", "r+b" if position else "wb")  # noqa: SIM115
        for line in self.file.read(position).splitlines()[1:] if position else ():
            self.show(json.loads(line))
        self.file.truncate(position)
        if not position:
            self.write(header)

    def write(self, record):
        self.file.write(json.dumps(record).encode() + b"\n")
        self.file.flush()

    def show(self, record):
        """A record's numbers, named with its labels, to TensorBoard and W&B."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        labels = "".join(f"/{k}{v}" for k, v in record.items() if "/" not in k and k != "step")
        scalars = {k + labels: v for k, v in record.items() if "/" in k and np.ndim(v) == 0}
        for name, value in scalars.items():
            event = Event(wall_time=time.time(), step=record["step"], summary=scalar(name, value))
            self.board.write_event(event)
        self.board.flush()
        if self.wandb:
            self.wandb.log({**scalars, "step": record["step"]})

    def log(self, step, metrics, **labels):
        """One record at `step` updates; metrics: name -> number or list of numbers; labels such as seed=0."""
        six_digits = np.vectorize(lambda x: float(f"{x:.6g}"), otypes=[float])
        metrics = {k: six_digits(np.asarray(v, np.float64)).tolist() for k, v in metrics.items()}
        record = {"step": step, **labels, **metrics}
        self.write(record)
        self.show(record)


def end_at_once(number, frame):
    """Handler of SIGTERM and Ctrl-C outside the loops: says so and ends, with what was saved.

    No exception: one that is raised in a callback of jax's is lost, and an orderly end crashes while XLA compiles.
    """
    said = f"stopped by {signal.Signals(number).name}; the same command with --resume goes on from what was saved"
    with contextlib.suppress(RuntimeError):  # in the middle of a print
        sys.stdout.flush()
    os.write(2, f"{Path(sys.argv[0]).name}: {said}\n".encode())
    os._exit(1)


class StopSignal:
    """Turns the first SIGTERM or Ctrl-C into `name`, so that the loop can save first; a second one is obeyed."""

    def __enter__(self):
        self.name = ""
        self.old = {n: signal.signal(n, self.handle) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def handle(self, number, frame):
        self.name = signal.Signals(number).name
        signal.signal(number, self.old[number])

    def __exit__(self, *exc):
        for number, handler in self.old.items():
            signal.signal(number, handler)


def flat_arrays(tree):
    """Pytree -> {slash/path: numpy array}; typed keys as their bits."""

    def array(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/"): array(x) for p, x in leaves}


def save_state(folder, tree, meta):
    """state.npz (newest) and state.prev.npz (the one before): the pytree as flat arrays, `meta` as JSON."""
    new = folder / "state.new.npz"
    envs.buffers.write_npz(new, {**flat_arrays(tree), "meta_json": np.array(json.dumps(meta))})
    name_state(new)


def name_state(new):
    """state.new.npz becomes state.npz, and what was that state.prev.npz."""
    newest = new.with_name("state.npz")
    if newest.exists():
        os.replace(newest, new.with_name("state.prev.npz"))
    os.replace(new, newest)


def load_state(folder, like, identity):
    """The newest readable state of the folder, in the structure of `like` (arrays or shapes) -> tree, meta.

    Raises InputError where none can be read, or where its `identity` (flags, data, versions) is another.
    """
    for path in (folder / "state.new.npz", folder / "state.npz", folder / "state.prev.npz"):
        if path.name == "state.new.npz" and not path.exists():  # it is whole, and waits for its name, after a kill
            continue
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
            meta = json.loads(str(arrays["meta_json"]))
            break
        except Exception as error:  # missing, torn or corrupt: the one before may be whole
            print(f"cannot read {path}: {error}", file=sys.stderr)
    else:
        raise envs.InputError(f"{folder}: no state to resume from; start anew with another --out")
    old, new = meta["identity"], json.loads(json.dumps(identity))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            change = f"{key} was {old.get(key)!r} and is now {new.get(key)!r}"
            raise envs.InputError(f"{path}: {change}; resume with the old one, or start anew with another --out")

    def restore(place, x):
        name = jax.tree_util.keystr(place, simple=True, separator="/")
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.asarray(arrays[name]))
        if name not in arrays or arrays[name].shape != x.shape or arrays[name].dtype != x.dtype:
            raise envs.InputError(f"{path}: {name} does not fit this version; start anew with another --out")
        return jnp.asarray(arrays[name])

    tree = jax.tree_util.tree_map_with_path(restore, like)
    if path.name == "state.new.npz" and jax.process_count() == 1:  # others may be reading it
        name_state(path)
    return tree, meta


def run_identity(args, **data):
    """What must not change when a run is resumed: flags, data, versions."""
    free = ("out", "resume", "track", "num_devices", "distributed", "q_bound")
    flags = {k: v for k, v in dataclasses.asdict(args).items() if k not in free}
    return {**flags, **data, **envs.buffers.versions()}


def run_folder(args, script, task):
    """The run's folder, made if need be -> args, folder; refuses to write over another run.

    --resume where nothing was saved yet begins anew: args.resume is False then.
    """
    folder = Path(args.out or f"runs/{script}/{task}/seed{args.seed}")
    if args.resume and not any(folder.glob("**/state*.npz")) and not (folder / "policy.npz").exists():
        print(f"{folder}: nothing was saved here yet; starting from the beginning", flush=True)
        args = dataclasses.replace(args, resume=False)
    if not args.resume and (any(folder.glob("**/state*.npz")) or (folder / "policy.npz").exists()):
        raise envs.InputError(f"{folder} already holds a run: go on with --resume or choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for torn in folder.glob("**/.*.npz.*.tmp"):  # what a kill left of a file that was being written
            torn.unlink(missing_ok=True)
        if not args.resume:
            (folder / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=1))
    except OSError as error:
        raise envs.InputError(f"{folder}: cannot be written ({error}); choose another --out") from None
    return args, folder


def progress_line(label, count, total, rate, metrics):
    """`label count/total  rate  ETA  metrics`, rate in counts per second."""
    eta = time.strftime("%H:%M:%S", time.gmtime((total - count) / max(rate, 1e-9)))
    numbers = "  ".join(f"{k.split('/')[-1]} {float(v):.4g}" for k, v in metrics.items())
    print(f"{label} {count}/{total} ({count / total:.0%})  {rate:.4g}/s  ETA {eta}  {numbers}", flush=True)


def check_numbers(args):
    """Refuse what no flag can mean: numbers that are not finite, below 0 or beyond 31 bits where whole, no widths."""
    for name, value in dataclasses.asdict(args).items():
        numbers = value if isinstance(value, tuple) else (value,)
        flag = f"--{name.replace('_', '-')} {' '.join(map(str, numbers))}"
        if any(isinstance(x, float) and not np.isfinite(x) for x in numbers):
            raise envs.InputError(f"{flag}: must be finite")
        if any(isinstance(x, int) and not 0 <= x < 2**31 for x in numbers):
            raise envs.InputError(f"{flag}: must be at least 0 and below {2**31}")
        if name.endswith("hidden_sizes") and (not value or min(value) < 1):
            raise envs.InputError(f"{flag}: give one width or more, each at least 1")
        if name in ("gamma", "tau") and not 0 <= value <= 1:
            raise envs.InputError(f"{flag}: must lie between 0 and 1")


def parse_args(argv, preset_of):
    """Command line -> Args: defaults, then what `preset_of(args)` gives, then the flags; printed in full."""
    name, preset = preset_of(tyro.cli(Args, args=argv, description=__doc__))
    args = tyro.cli(Args, args=argv, default=dataclasses.replace(Args(), **preset))
    check_numbers(args)
    print(f"preset {name}:", *(f"{k}={v}" for k, v in preset.items()))
    print("arguments:", *(f"{k}={v}" for k, v in dataclasses.asdict(args).items()))
    return args


def write_policy(path, kind, params, metadata):
    """policy.npz (docs/policy.md): what a user deploys, flat slash/paths, leading policy or seed axis."""
    head = {"kind": np.array(kind), "metadata_json": np.array(json.dumps(metadata))}
    envs.buffers.write_npz(path, {**head, **flat_arrays(params)})


def whole_rounds(preset, args, episode_length):
    """The preset with chunk, eval_every and num_updates in whole rounds, whose size is the task's and the flags'."""
    own = {name: getattr(args, name) for name in ("num_envs", "updates_per_step")}
    own = {name: value for name, value in own.items() if value != getattr(Args, name) and not args.preset}
    fields = dataclasses.replace(Args(), **preset | own)
    updates = round_sizes(fields, episode_length)[1]
    if fields.chunk % updates == 0:
        return preset
    chunk = max(round(fields.chunk / updates), 1) * updates
    eval_every = max(round(fields.eval_every / chunk), 1) * chunk
    num_updates = max(round(fields.num_updates / eval_every), 1) * eval_every
    return preset | dict(chunk=chunk, eval_every=eval_every, num_updates=num_updates)


def wurl_preset(args):
    """The published budget, --quick, or what suits the world -> name, {field: value}."""
    quick = QUICK if args.quick else {}
    task = envs.task(quick.get("task", args.task))
    world = task.env
    if args.preset and args.preset not in PRESETS:
        raise envs.InputError(f"--preset {args.preset}: unknown; one of {', '.join(PRESETS)}")
    preset = PRESETS.get(world, {}) | PRESETS.get(args.preset, {}) | quick
    preset = whole_rounds(preset, args, args.episode_length or task.episode_length)
    if args.div_features not in ("task", preset.get("div_features")):  # the scales are those of other features
        preset = {k: v for k, v in preset.items() if k != "feature_scales"}
    return args.preset or ("quick" if args.quick else world), preset


def replay_bytes(args, task):
    """What the replays take, and what the device has."""
    stats = jax.local_devices()[0].memory_stats() or {}
    memory = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 4 * args.num_policies * args.replay_size * (2 * task.env_observation_size + task.action_size + 2), memory


def check_args(args, task, episode_length):
    """Refuse what cannot work, before any long work starts."""
    positive = ("num_envs", "num_directions", "rollout_episodes", "chunk", "eval_every", "num_updates", "batch_size")
    for name in positive:
        if getattr(args, name) < 1:
            raise envs.InputError(f"--{name.replace('_', '-')} must be at least 1")
    _, updates, _ = round_sizes(args, episode_length)
    steps = args.num_envs * episode_length
    replays, memory = replay_bytes(args, task)
    index = args.div_features.split(",")
    num_features = {"task": len(task.feature_names), "full": task.env_observation_size}.get(
        args.div_features, len(index)
    )
    rules = {
        f"--div-features: task, full or indices below {task.env_observation_size}, such as 0,1":
            args.div_features in ("task", "full")
            or all(i.isdigit() and int(i) < task.env_observation_size for i in index),
        f"--feature-scales: none, or {num_features} positive numbers, one for each feature":
            len(args.feature_scales) in (0, num_features) and min(args.feature_scales, default=1) > 0,
        "--eval-episodes must be at least 2: half of them are held out": args.eval_episodes >= 2,
        "--num-policies must be at least 1": args.num_policies >= 1,
        "one policy has no neighbour: add --diversity-weight 0 --task-weight 1":
            args.num_policies > 1 or args.objective == "none" or args.diversity_weight == 0,
        f"--task-weight: {task.name} has no reward; name a task, for example --task {task.env}-angle-0":
            args.task_weight == 0 or task.has_reward,
        f"--replay-size must hold a round ({steps} steps) and a batch":
            args.replay_size >= max(steps, args.batch_size),
        f"--replay-size: the replays need {replays / 1e9:.1f} GB of {memory / 1e9:.1f} GB memory": replays < memory,
        "--warmup-steps must be positive: the first batch needs data": args.warmup_steps > 0,
        f"--chunk must be a multiple of a round's updates ({updates})":
            args.chunk % updates == 0,
        "--chunk must divide --eval-every and --num-updates":
            args.eval_every % args.chunk == args.num_updates % args.chunk == 0,
        "--lr-decay is a share: 0 to 1": 0 <= args.lr_decay <= 1,
        f"--num-devices: 0 to {jax.local_device_count()}, the devices there are":
            0 <= args.num_devices <= jax.local_device_count(),
        f"--num-policies must be at least {jax.process_count()}: one for each process":
            args.num_policies >= jax.process_count(),
        "--num-envs times the episode length must stay under 46341": steps < 46341,
    }  # fmt: skip
    for message, holds in rules.items():
        if not holds:
            raise envs.InputError(message)


def announce(folder, args, task, env, episode_length, files):
    """Print what will run and what it needs; refuse where the disk cannot hold it."""
    num_warmup, updates, num_rounds = round_sizes(args, episode_length)
    steps = (num_warmup + num_rounds) * args.num_envs * episode_length
    need, free = 2 * steps * args.num_policies * files.dtype.itemsize, shutil.disk_usage(folder).free
    replays, memory = replay_bytes(args, task)
    print(
        f"{task.name} on {env.backend}: {args.num_policies} policies x {steps} steps in {num_warmup} + {num_rounds} "
        f"rounds of {args.num_envs} x {episode_length} steps and {updates} updates each\n"
        f"{folder}: needs {need / 1e6:.0f} MB (rows, then npz) of {free / 1e9:.1f} GB free; "
        f"replays take {replays / 1e9:.2f} of {memory / 1e9:.1f} GB memory", flush=True,
    )  # fmt: skip
    if need > free:
        raise envs.InputError(f"{folder}: the disk is too small for {need / 1e9:.1f} GB; choose another --out")


def collapse(metrics, step, args):
    """What a user must know where policies that are paid to differ do the same, or ""."""
    if args.num_policies == 1 or not is_diverse(args):
        return ""
    smallest, mean, accuracy = (metrics[f"eval/{k}"] for k in ("smallest_w", "min_w", "disc_accuracy_held_out"))
    told_apart = args.num_policies * float(accuracy)  # of m modes shared evenly: accuracy m / K, so m
    if smallest < 0.25 * mean:
        return "two policies nearly coincide (mode collapse); see --div-features, --reward-scale"
    if told_apart < (args.num_policies + 1) / 2 and 4 * step >= args.num_updates:  # earlier none has gone its way yet
        told = f"{told_apart:.1f} of {args.num_policies} policies apart (mode collapse, or fewer modes)"
        return f"a classifier tells {told}; see --num-policies, --div-features, --reward-scale"
    return ""


def show_evaluation(step, metrics, args):
    """One line of what matters, and a warning where policies do the same."""
    names = ("min_w", "smallest_w", "pair_mean_w", "distinct_nearest", "disc_success", "task_return")
    shown = {n: float(np.mean(metrics[f"eval/{n}"])) for n in names if f"eval/{n}" in metrics}
    if args.num_policies > 1:
        shown["told_apart"] = args.num_policies * float(metrics["eval/disc_accuracy_held_out"])
    print(f"  evaluation at {step}:", *(f"{n} {v:.3f} " for n, v in shown.items()))
    print("  travel", *(f"{x:.1f}" for x in metrics["eval/travel"]), flush=True)
    warning = collapse(metrics, step, args)
    if warning:
        print(f"  warning: {warning}", flush=True)


def record(files, args, task, steps, pseudo_rewards):
    """Append rollouts [R, K, N, L] to the buffer files, with the task's reward (zeros where there is none)."""
    steps, pseudo_rewards = jax.tree.map(lambda x: own_part(x, args), (steps, pseudo_rewards))
    rewards = np.asarray(task.reward(steps.transition), np.float32)
    columns = dict(rewards=rewards, pseudo_rewards=pseudo_rewards, action_log_probs=steps.log_probs)
    files.append(steps.transition, steps.terminals, steps.alive, **columns)


def check_finite(where, metrics, args):
    """Raise InputError where a metric is not finite or |Q| beyond --q-bound: no later update would mend it."""
    for name, values in metrics.items() if args.q_bound else ():
        largest = np.abs(values).max()
        if not largest <= (args.q_bound if name == "train/q" else np.finfo(np.float32).max):  # nan compares False
            raise envs.InputError(
                f"{where}: {name} is {largest:.3g}; what was saved before is kept: lower the learning rates and start "
                "anew, or go on all the same with --resume --q-bound 0"
            )


def agreed(stop, due):
    """What all processes must decide alike: by which signal to stop, and whether any finds that it is time to save."""
    told, due = multihost_utils.process_allgather(np.array([bool(stop), due])).any(0)
    return stop or "a signal to another process" * bool(told), due


def train_policies(state, train, train_chunk, evaluation, eval_key, args, task, files, logger, save, keep):
    """Chunk after chunk, with evaluations and saved states -> final state, metrics and figures' arrays.

    train: metrics of the last chunk before a resume; save(state, train) writes them with the state; keep(actor,
    step, metrics): after every evaluation.
    """
    step = start = first = int(state.num_updates)
    began = saved = time.time()

    def evaluate_now(num_episodes):
        metrics, snapshot = jax.tree.map(np.asarray, evaluation(state.agent.actor, eval_key, num_episodes))
        if logger:
            logger.log(step, {**train, **metrics})
        show_evaluation(step, metrics, args)
        keep(state.agent.actor, step, metrics)
        return metrics, snapshot

    with StopSignal() as stop:
        stopped = ""
        while step < args.num_updates and not stopped:
            state, (train, distances, steps, pseudo_rewards) = train_chunk(state)
            step = int(state.num_updates)
            train, distances = jax.tree.map(np.asarray, (train, distances))
            check_finite(f"update {step}", train, args)
            record(files, args, task, steps, pseudo_rewards)
            rate = (step - first) / (time.time() - began)
            train |= distance_metrics(distances[-1], "train") if args.num_policies > 1 else {}
            train = {k: float(np.mean(v)) for k, v in train.items()} | {"time/updates_per_s": rate}
            names = ("train/min_w", "train/reward", "train/q", "train/entropy")
            progress_line("update", step, args.num_updates, rate, {k: train[k] for k in names if k in train})
            if step % args.eval_every == 0 and step < args.num_updates:
                evaluate_now(args.eval_episodes)
            stopped, due = agreed(stop.name, time.time() - saved > 60)
            if step >= args.num_updates or stopped or due:
                save(state, train)
                saved = time.time()
            if first == start:  # the first call compiled: the pace is that of those after it
                first, began = step, time.time()
    if stopped:
        sys.exit(f"stopped by {stopped} at update {step}; go on with the same command and --resume")
    return state, *evaluate_now(50)  # the authors' protocol


def whole(tree, args):
    """The tree with all policies on every process, so that one of them can write it."""
    if jax.process_count() == 1:
        return tree
    gathered = jax.jit(lambda x: x, out_shardings=placed(args))(tree)
    return jax.tree.map(lambda x: x.addressable_data(0), gathered)


def all_counts(files, args):
    """Rows of every policy [K], whichever process writes them."""
    counts = np.zeros(args.num_policies, np.int32)
    counts[files.policies] = files.counts
    return multihost_utils.process_allgather(counts).sum(0).tolist()


def make_save(folder, args, meta, files, logger):
    """-> save(state, train), called by all processes: the first one writes the state of all policies."""

    def save(state, train):
        state, rows = whole(state, args), all_counts(files, args)
        if logger:
            save_state(folder, state, {**meta, "log": logger.file.tell(), "rows": rows, "train": train})

    return save


def write_actor(path, args, task, observe, actor, **more):
    """The policies in the layout of docs/policy.md."""
    about = {"task": task.name, "observations": "task" if observe is task.observe else "env"}
    about |= {"log_std_min": args.log_std_min, "log_std_max": args.log_std_max}
    about |= {"versions": envs.buffers.versions(), **more}
    write_policy(path, "tanh_gaussian", {"actor": actor}, about)


def keep_policies(folder, args, task, observe, files, actor, step, metrics):
    """--keep-policies: what an evaluation judged, with its returns and the rows in each buffer by then."""
    if args.keep_policies:
        actor, told = whole(actor, args), {"update": step, "rows": all_counts(files, args)}
        told |= {k: np.asarray(v).tolist() for k, v in metrics.items() if k in ("eval/task_return", "eval/length")}
        if jax.process_index() == 0:
            write_actor(folder / "policies" / f"update_{step:07d}.npz", args, task, observe, actor, **told)


def write_outputs(folder, args, task, actor, snapshot, observe):
    """policy.npz and the figures."""
    write_actor(folder / "policy.npz", args, task, observe, actor)
    names = task.feature_names
    if args.div_features != "task":
        every = ",".join(map(str, range(task.env_observation_size)))
        names = [f"s'[{i}]" for i in (every if args.div_features == "full" else args.div_features).split(",")]
    if args.feature_scales:
        names = [f"{scale:g} x {name}" for scale, name in zip(args.feature_scales, names, strict=True)]
    task = dataclasses.replace(task, feature_names=tuple(names))
    paths = [snapshot[k] for k in ("paths", "features", "alive")]
    envs.figures.plot_paths(folder / "trajectories.png", task, *paths)
    if args.num_policies > 1:
        records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[1:]]
        names = ("pair_mean_w", "min_w", "smallest_w")
        labels = ("mean over pairs", "nearest other, mean over policies", "nearest other, smallest")
        curves = {label: [r[f"eval/{n}"] for r in records] for label, n in zip(labels, names, strict=True)}
        steps = [r["step"] for r in records]
        envs.figures.plot_distances(folder / "distances.png", task, steps, curves, snapshot["matrix"])


def fresh_rollouts(args, task, env, rollouts, actor, key, goals, folder):
    """--collect rollouts: new episodes of the final policies -> their row files in `folder`."""
    files = envs.episodes.EpisodeFiles(folder, own_policies(args), env.observation_size, env.action_size, None, goals)

    @functools.partial(jax.jit, out_shardings=placed(args, None, "share"))
    def collect(actor, keys):
        steps = jax.tree.map(lambda x: x[None], rollouts(actor, keys, args.rollout_episodes))
        return steps, jnp.zeros_like(steps.log_probs)

    record(files, args, task, *collect(actor, jax.random.split(key, args.num_policies)))
    return files


def write_buffers(folder, args, task, env, files, warmup, fresh, episode_length):
    """The last act of a run: buffers/policy_XX.npz, whole, then the row files go."""
    metadata = {
        "dataset_name": f"{task.name}-wurl-seed{args.seed}", "env": task.env, "layout": "env",
        "task": task.name, "reward_kind": "task" if task.has_reward else "none", "task_options": task.options,
        "dt": task.dt, "episode_length": episode_length, "backend": env.backend, "seed": args.seed,
        "generator": {"script": "wurl_sac.py", "flags": dataclasses.asdict(args)}, "parents": [],
    }  # fmt: skip
    rows = [files]
    if args.collect == "replay":  # the policies moved on: a density is worth keeping of fresh rollouts only
        files.finish(folder / "buffers", metadata, warmup, drop=("action_log_probs",))
    else:
        rows += [fresh(folder / "rollouts")]
        rows[1].finish(folder / "buffers", metadata, [0] * args.num_policies, drop=("pseudo_rewards",))
    multihost_utils.sync_global_devices("all buffers are written")
    for each in rows:
        each.remove()


def is_finished(folder, args):
    """Whether all buffers are whole and the row files have begun to go, which is the last thing that happens."""
    names = [f"policy_{k:02d}" for k in range(args.num_policies)]
    whole = all((folder / "buffers" / f"{name}.npz").exists() for name in names)
    return whole and not all((folder / "rows" / f"{name}.rows").exists() for name in names)


def main(args):
    """Train K policies and write their buffers -> metrics of the last evaluation; {} if a resumed run is finished."""
    started = time.time()
    task = envs.task(args.task)
    if task.env.startswith("brax/"):  # brax's rewards are not functions of a recorded transition
        task = dataclasses.replace(task, has_reward=False, reward=lambda t: np.zeros_like(t.root_positions[..., 0]))
    env = envs.make(task.env, None if args.backend == "auto" else args.backend)
    episode_length = args.episode_length or task.episode_length
    check_args(args, task, episode_length)
    env.check_batch(args.num_policies * max(args.num_envs, args.eval_episodes, 50))
    observe = (lambda x: x) if is_diverse(args) else task.observe  # a diverse policy must see where it is
    args, folder = run_folder(args, "wurl_sac", task.name)

    init, warmup, train_chunk, rollouts = make_train(args, env, task, observe, episode_length)
    evaluation = make_evaluation(args, task, rollouts)
    key_train, key_eval, key_collect = jax.random.split(jax.random.key(args.seed), 3)
    meta = {"identity": run_identity(args), "log": 0, "rows": None, "train": {}}
    if args.resume:
        state, meta = load_state(folder, jax.eval_shape(init, key_train), meta["identity"])
        if is_finished(folder, args):
            for left in ("rows", "rollouts"):
                shutil.rmtree(folder / left, ignore_errors=True)
            print(f"{folder}: this run is finished: its buffers are whole")
            return {}
        state = jax.jit(lambda state: state, out_shardings=state_sharding(args))(state)
    else:
        state = init(key_train)
    sizes = (own_policies(args), env.observation_size, env.action_size)
    goals = "goal" in jax.eval_shape(env.reset, key_eval).info
    files = envs.episodes.EpisodeFiles(folder / "rows", *sizes, meta["rows"], goals)
    logger = Logger(folder, args, meta["log"]) if jax.process_index() == 0 else None
    save = make_save(folder, args, meta, files, logger)
    keep = functools.partial(keep_policies, folder, args, task, observe, files)
    announce(folder, args, task, env, episode_length, files)
    if not args.resume:
        state, (_, _, steps, pseudo_rewards) = warmup(state)
        record(files, args, task, steps, pseudo_rewards)
        meta["warmup"] = all_counts(files, args)
        save(state, {})
        print(f"warm-up: {files.counts[0]} steps per policy, {time.time() - started:.0f} s after start", flush=True)

    state, metrics, snapshot = train_policies(
        state, meta["train"], train_chunk, evaluation, key_eval, args, task, files, logger, save, keep
    )
    actor = state.agent.actor
    shown = whole(actor, args)
    if logger:
        write_outputs(folder, args, task, shown, snapshot, observe)
    fresh = functools.partial(fresh_rollouts, args, task, env, rollouts, actor, key_collect, goals)
    write_buffers(folder, args, task, env, files, meta["warmup"], fresh, episode_length)
    print(f"{folder}: buffers/policy_*.npz, policy.npz, figures; {time.time() - started:.0f} s")
    print(f"next: python udg_select.py --buffers {folder}/buffers --task ...", flush=True)
    return {k: np.asarray(v) for k, v in metrics.items()}


def join_processes():
    """Become one of several processes, which jax.distributed finds; only the first one prints."""
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    number = lambda name: int(os.environ[name]) if name in os.environ else None
    try:
        jax.distributed.initialize(
            num_processes=number("JAX_NUM_PROCESSES"), process_id=number("JAX_PROCESS_ID"),
            heartbeat_timeout_seconds=60, shutdown_timeout_seconds=60,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        remedy = "start it by srun, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        raise envs.InputError(f"--distributed: {error}; {remedy}") from None
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def leave(message):
    """End with a message; at once where other processes are, which see that connection close and end as well."""
    print(f"wurl_sac.py: {message}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        os._exit(1)  # an orderly end would wait for the others
    sys.exit(1)


def command_line(argv):
    """The whole run; whatever a user can mend, and the loss of another process, ends in one line."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end_at_once)
    try:
        args = parse_args(argv, wurl_preset)
        if args.num_devices > 1:  # of the CPU; accelerators are what they are
            jax.config.update("jax_num_cpu_devices", args.num_devices)
        if args.distributed:
            join_processes()
        main(args)
    except (envs.InputError, OSError) as error:
        leave(f"error: {error}")
    except (ValueError, RuntimeError) as error:  # of a collective operation: another process may be gone
        if not jax.distributed.is_initialized():
            raise
        leave(f"error: another process ended, or this one failed ({error}); go on with the same command and --resume")


if __name__ == "__main__":
    command_line(sys.argv[1:])
