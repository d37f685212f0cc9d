"""MOPO: learn a model of the world from one buffer, train SAC inside it, pay for what it does not know.

Paper      MOPO: Model-based Offline Policy Optimization (Yu et al., NeurIPS 2020), arXiv 2005.13239.
           Last stage of UDG (Unsupervised Data Generation for Offline RL), arXiv 2506.19643.
           Codes named below: orig = the authors', ORLKit = OfflineRL-Kit.
Objective  max over pi of  E[ sum_t gamma^t ( r - lam u(s, a) ) ]  in the learned model. Where u bounds
           the model's error, that is a lower bound of the true return (paper, section 4).

Algorithm  (1) split:     hold out min(20 %, 1000) rows; standardise inputs (s, a) on the others
           (2) model:     E Gaussian networks p_i(s' - s, r | s, a), each on its own bootstrap
           (3) stop:      when no member gained 1 % on the hold-out for 5 epochs; restore every
                          member's best epoch; the M best are the elites
           (4) roll out:  from b real states h steps of the policy; a random elite per row and step
           (5) penalise:  r~ = r - lam u(s, a),  u = max_i || sigma_i(s, a) ||     (section 4.3)
           (6) store:     rows alive at the start of their step, in a ring of `retain` refreshes
           (7) learn:     `rollout_freq` SAC updates on 5 % real and 95 % model rows: critics, actor
                          with the new critics, alpha, Polyak target; then (4) again

Symbols    s observations [.., S] | a actions [.., A] | r rewards | y targets: (s' - s, r) [.., D]
           of the model, D = S + 1, and of the critics [B] | x standardised (s, a) | q [C, B]
           mean, std [E, B, D] of the members | u penalty [B] | lam its weight (paper: lambda)
           E ensemble_size | M num_elites | N rows | B batch | C num_critics | h horizon
           b rollout_batch | S also num_seeds, as a leading axis | alpha entropy weight | gamma discount

Deviations
  D1  paper: norm of the covariance; all codes: norm of the std vector; here: the codes'.
  D2  paper: the model's mean reward; all codes: the sampled one; here: sampled.
  D3  paper: spectral normalisation; released code: none; here: none.
  D4  orig stops after more than 5 idle epochs, ORLKit after 5, neither has a cap; here: 5, and
      `max_epochs`.
  D5  orig, ORLKit: an epoch visits every row of the bootstrap once; here: as many random draws of
      it (--exact-epochs for theirs), N rounded down to whole batches.
  D6  orig lets a rollout leave the data and bootstraps there, ORLKit calls |s| > 100 terminal; here: it
      ends outside the data's range plus a margin, and the value there is min(V, 0): V is a guess that
      SAC inflates, and 0, a terminal's value, is a prize wherever Q < 0. Rows not finite are dropped.
  D7  orig: target entropy -3 in every task, one rate, log std >= -20; here: ORLKit's -A, rates, cosine,
      alpha <= 1, log std >= -5.
  D8  ORLKit corrects tanh by log(1 - a^2 + 1e-6); here: exactly, as orig.
  D9  orig: all gradients from the weights before the update, half the squared error; here: ORLKit's
      order, line (7), and the whole.
  D10 codes divide by any input std above 1e-12; here: above 1e-6 of the mean, what float32 leaves of a
      constant.
  D11 all: 2 critics; here: --num-critics. Next states of a rollout's last step are never trained on, and
      two critics may overrate them far and for long (docs/mopo.md, "When Q climbs").

Files      reads a buffer relabelled by udg_select.py (docs/buffer.md); writes runs/mopo/<task>/...:
           policy.npz (docs/policy.md), log.jsonl, state.npz, model/state.npz, three figures
Run        python mopo.py --quick                         (point robot, under 2 minutes on 2 cores)
           python mopo.py --dataset runs/udg_select/ant-angle-60/top1.npz --preset cpu     (2 cores)
           python mopo.py --dataset runs/udg_select/ant-angle-60/top1.npz --num-seeds 5    (1M updates)
Expect     see docs/mopo.md and results/mopo/
"""

import contextlib
import dataclasses
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

import envs
import envs.buffers
from envs import scripted
from runner import plots as curves


@dataclass(frozen=True)
class Args:
    # --- run ---
    dataset: str = ""
    """buffer file with task rewards, or a glob of shards (docs/buffer.md)"""
    task: str = ""
    """task to evaluate in; empty: the file's; another than the file's is refused"""
    max_rows: int = 0
    """rows to train on: of a larger file whole episodes drawn at random, and only these are held; 0: all"""
    preset: str = ""
    """a name in PRESETS in place of the one for the file's dataset_name; cpu: a budget for 2 cores"""
    seed: int = 0
    """first seed; a seed gives the same run alone or among others"""
    num_seeds: int = 1
    """S: independent runs (model and policy) at once, a leading axis of all arrays"""
    num_devices: int = 0
    """devices that share the seeds; 0: all there are. On a CPU, 2 or more make that many out of its cores"""
    out: str = ""
    """run folder; empty: runs/mopo/<task>/seed<seed>"""
    resume: bool = False
    """go on from the folder's state.npz, exactly"""
    quick: bool = False
    """a small run, under 2 minutes, on a scripted point-angle-0 buffer unless --dataset names one"""
    track: bool = False
    """mirror the log to Weights & Biases (needs `pip install wandb`)"""
    backend: Literal["auto", "mujoco", "mjx"] = "auto"
    """physics of the evaluation: C MuJoCo (auto on a CPU) or MJX; the point worlds have their own"""
    # --- budget ---
    num_updates: int = 1_000_000
    """SAC gradient steps per seed (orig: 1M, ORLKit: 3M)"""
    chunk: int = 1_000
    """gradient steps in one jitted call; a multiple of rollout_freq, a divisor of eval_every and num_updates"""
    eval_every: int = 10_000
    """gradient steps between two evaluations (both: 1,000)"""
    eval_episodes: int = 10
    """episodes of an evaluation, deterministic action (both: 10)"""
    # --- model ---
    model: Literal["ensemble", "knn"] = "ensemble"
    """ensemble (MOPO) or knn: what the nearest data row did, the model of UDG's theory"""
    ensemble_size: int = 7
    """E: members (paper: 7)"""
    num_elites: int = 5
    """M: members of least hold-out error that roll out (paper: 5)"""
    model_hidden_sizes: tuple[int, ...] = (200, 200, 200, 200)
    """widths of a member (paper: 4 x 200)"""
    model_decays: tuple[float, ...] = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)
    """c_l: L2 weight per layer, the last one the output's (orig)"""
    model_lr: float = 1e-3
    """Adam rate of the model (paper: 1e-3)"""
    model_batch_size: int = 256
    """rows per member and step (paper: 256)"""
    logvar_coef: float = 0.01
    """weight of the log-variance bounds in the loss (orig: 0.01)"""
    holdout_share: float = 0.2
    """largest share of the rows held out (ORLKit: 0.2)"""
    holdout_rows: int = 1_000
    """largest number of rows held out (paper: 1,000)"""
    patience: int = 5
    """epochs without any member's gain that end the fit (ORLKit: 5, D4)"""
    min_gain: float = 0.01
    """relative gain on the hold-out that counts (both: 0.01)"""
    max_epochs: int = 200
    """cap on the epochs of the fit (ours, D4)"""
    exact_epochs: bool = False
    """visit every bootstrap row once an epoch, at the price of a sort (both; D5)"""
    knn_rows: int = 20_000
    """data rows that the knn model keeps; its cost grows with them (ours)"""
    knn_scale: float = 1.0
    """L: the knn model's u = L * distance to the nearest row in x (ours)"""
    # --- rollouts ---
    horizon: int = 5
    """h: steps of a model rollout (paper: 1 or 5 by dataset)"""
    lam: float = 1.0
    """lambda: weight of the penalty (paper: 0.5 to 5 by dataset)"""
    penalty: Literal[
        "max_aleatoric", "max_aleatoric_elites", "max_dist_to_mean", "max_pairwise",
        "ensemble_std", "total_std",
    ] = "max_aleatoric"  # fmt: skip
    """u: max_aleatoric (MOPO) or a variant (docs/mopo.md); each needs its own lambda"""
    reward: Literal["learned", "known"] = "learned"
    """reward of model steps: learned (MOPO), or known: the task's, where observations tell it"""
    rollout_batch: int = 50_000
    """b: start states per refresh (both: 50,000)"""
    rollout_freq: int = 1_000
    """gradient steps between two refreshes (both: 1,000)"""
    retain: int = 5
    """refreshes that the ring of model rows holds (both: 5)"""
    real_ratio: float = 0.05
    """share of real rows in a batch (both: 0.05)"""
    range_margin: float = 0.5
    """rollouts end outside the data's range by this share of it, at least of 1 (ours, D6)"""
    range_value: Literal["worst", "bootstrap", "zero"] = "worst"
    """value of a state out of range: the critics' V, zero, or the lesser of the two (ours, D6)"""
    # --- SAC ---
    hidden_sizes: tuple[int, ...] = (256, 256)
    """widths of actor and critics (both: 256, 256)"""
    num_critics: int = 2
    """Q networks, the least of which counts (both: 2); try 10 where Q climbs (docs/mopo.md; ours, D11)"""
    batch_size: int = 256
    """B: rows per update, real and model together (both: 256)"""
    actor_lr: float = 1e-4
    """Adam rate of the actor (ORLKit: 1e-4, orig: 3e-4)"""
    critic_lr: float = 3e-4
    """Adam rate of the critics (both: 3e-4)"""
    alpha_lr: float = 1e-4
    """Adam rate of log alpha (ORLKit: 1e-4, orig: 3e-4)"""
    actor_cosine: bool = True
    """let the actor's rate fall to 0 over the run by a cosine (ORLKit; orig: constant)"""
    gamma: float = 0.99
    """discount (both: 0.99)"""
    tau: float = 0.005
    """Polyak rate of the target critics, every update (both: 0.005)"""
    q_bound: float = 1e6
    """largest mean |Q| of a batch before the run stops as diverged; 0: go on, also where a loss is not finite (ours)"""
    target_entropy: float | None = None
    """entropy that alpha aims at; None: -A (ORLKit; orig: -3)"""
    alpha_max: float = 1.0
    """alpha is clipped here where it is used (ORLKit: 1)"""
    log_std_min: float = -5.0
    """lower clip of the actor's log standard deviation (ORLKit: -5, orig: -20)"""
    log_std_max: float = 2.0
    """upper clip of the actor's log standard deviation (both: 2)"""


PUBLISHED = {  # horizon h, lam: OfflineRL-Kit for D4RL v2, the original code for v0
    "halfcheetah-medium-v2": (5, 0.5),
    "halfcheetah-medium-replay-v2": (5, 0.5),
    "halfcheetah-medium-expert-v2": (5, 2.5),
    "hopper-medium-v2": (5, 5.0),
    "hopper-medium-replay-v2": (5, 2.5),
    "hopper-medium-expert-v2": (5, 5.0),
    "walker2d-medium-v2": (5, 0.5),
    "walker2d-medium-replay-v2": (1, 2.5),
    "walker2d-medium-expert-v2": (1, 2.5),
    "halfcheetah-medium-v0": (1, 1.0),
    "halfcheetah-medium-replay-v0": (5, 1.0),
    "halfcheetah-medium-expert-v0": (5, 5.0),  # paper: lambda 1
    "hopper-medium-v0": (5, 5.0),
    "hopper-medium-replay-v0": (5, 1.0),
    "hopper-medium-expert-v0": (5, 1.0),
    "walker2d-medium-v0": (5, 5.0),
    "walker2d-medium-replay-v0": (1, 1.0),
    "walker2d-medium-expert-v0": (1, 2.0),
    "halfcheetah-random-v0": (5, 0.5),
    "hopper-random-v0": (5, 1.0),
    "walker2d-random-v0": (1, 1.0),
}
CPU = {  # ours: 50k rows of a robot, minutes on 2 cores (docs/mopo.md says what each is for)
    "max_epochs": 20, "num_updates": 20_000, "eval_every": 2_000, "rollout_batch": 10_000,
    "real_ratio": 0.5, "lam": 0.3, "actor_lr": 3e-4, "alpha_lr": 3e-3,
}  # fmt: skip
PRESETS = {"cpu": CPU} | {
    name: {"horizon": h, "lam": lam, "num_updates": 3_000_000 if name.endswith("v2") else 1_000_000}
    for name, (h, lam) in PUBLISHED.items()
}
QUICK = {
    "max_epochs": 20, "model_hidden_sizes": (64, 64), "num_updates": 3_000, "chunk": 500,
    "rollout_freq": 500, "eval_every": 500, "rollout_batch": 2_000, "hidden_sizes": (64, 64),
    "actor_lr": 1e-3, "critic_lr": 1e-3, "alpha_lr": 1e-3,
}  # fmt: skip


# === data ===


class Rows(NamedTuple):
    """Steps of the data or of the model; leading axes free, features last."""

    observations: jax.Array  # [.., S]
    actions: jax.Array  # [.., A]
    rewards: jax.Array  # [..] the data's r; of model rows r - lam u
    next_observations: jax.Array  # [.., S]
    terminals: jax.Array  # [..] 1.0 where the episode truly ended: value 0 after it
    outside: jax.Array  # [..] 1.0 where a rollout left the data's range: value at most 0 after it      # D6


DATA_KEYS = Rows._fields[:-1]


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


def polyak(target, online, tau):
    """target <- (1 - tau) target + tau online, leaf by leaf."""
    return jax.tree.map(lambda t, o: (1 - tau) * t + tau * o, target, online)


def policy_net(args, action_size):
    """The actor's architecture."""
    return Actor(args.hidden_sizes, action_size, args.log_std_min, args.log_std_max)


class Ensemble(NamedTuple):
    """E Gaussian networks side by side; they share the bounds of the log-variance."""

    weights: tuple[jax.Array, ...]  # per layer [E, in, out]
    biases: tuple[jax.Array, ...]  # per layer [E, 1, out]
    max_logvar: jax.Array  # [D]
    min_logvar: jax.Array  # [D]


def ensemble_init(key, args, num_inputs, num_targets):
    """Weights normal with std 1 / (2 sqrt(fan in)), cut at 2 std; biases 0; bounds 0.5, -10 (orig)."""
    widths = (num_inputs, *args.model_hidden_sizes, 2 * num_targets)
    keys = jax.random.split(key, len(widths) - 1)

    def weight(key, fan_in, fan_out):
        shape = (args.ensemble_size, fan_in, fan_out)
        return jax.random.truncated_normal(key, -2.0, 2.0, shape) / (2.0 * fan_in**0.5)

    weights = tuple(map(weight, keys, widths[:-1], widths[1:]))
    biases = tuple(jnp.zeros((args.ensemble_size, 1, width)) for width in widths[1:])
    return Ensemble(weights, biases, jnp.full(num_targets, 0.5), jnp.full(num_targets, -10.0))


def ensemble_apply(net, x, precision=None):
    """x [B, S + A] for all or [E, B, S + A] -> mean, raw log-variance [E, B, D]; swish between layers."""
    for layer, (w, b) in enumerate(zip(net.weights, net.biases, strict=True)):  # D3
        x = jnp.matmul(x, w, precision=precision) + b
        x = nn.silu(x) if layer < len(net.weights) - 1 else x
    return jnp.split(x, 2, axis=-1)


def bound_logvar(net, raw):
    """Soft clamp, upper bound first: l1 = max - softplus(max - raw), l = min + softplus(l1 - min)."""
    upper = net.max_logvar - nn.softplus(net.max_logvar - raw)
    return net.min_logvar + nn.softplus(upper - net.min_logvar)


# === losses ===


def gaussian_nll(net, mean, raw, targets, args):
    """Line (2): sum_E mean_BD [ (mean - y)^2 exp(-l) + l ] + c (sum_D max - sum_D min) -> scalar.

    mean, raw, targets [E, B, D]; l: raw within the bounds; the last term draws the bounds together.
    """
    logvar = bound_logvar(net, raw)
    chex.assert_equal_shape([mean, logvar, targets])
    nll = (mean - targets) ** 2 * jnp.exp(-logvar) + logvar
    bounds = jnp.sum(net.max_logvar) - jnp.sum(net.min_logvar)
    return nll.mean((1, 2)).sum() + args.logvar_coef * bounds


def weight_decay(net, args):
    """sum_l c_l / 2 sum_E ||W_l||^2; biases are free; deeper nets repeat the last hidden layer's c."""
    *hidden, last = args.model_decays
    decays = [hidden[min(i, len(hidden) - 1)] for i in range(len(net.weights) - 1)] + [last]
    return sum(0.5 * c * jnp.sum(w**2) for c, w in zip(decays, net.weights, strict=True))


def mopo_model_loss(net, x, targets, args):
    """Likelihood and weight decay of the members, each on its own rows x [E, B, S + A] -> scalar."""
    mean, raw = ensemble_apply(net, x, "highest")  # TF32 is too coarse for a variance
    return gaussian_nll(net, mean, raw, targets, args) + weight_decay(net, args)


def sac_target(batch, next_q, next_log_probs, alpha, gamma):
    """y = r~ + gamma (1 - terminal) V(s') [B],  V = min_e Qbar_e(s', a') - alpha log pi(a'|s'); no gradient.

    Outside the data's range V is not known and min(V, 0) stands for it.
    """
    value = next_q - alpha * next_log_probs
    value = jnp.where(batch.outside > 0.5, jnp.minimum(value, 0.0), value)  # D6
    return jax.lax.stop_gradient(batch.rewards + gamma * (1 - batch.terminals) * value)


def mopo_critic_loss(critic, target, actor, alpha, batch, key, args):
    """sum_e mean_B (Q_e(s, a) - y)^2,  a' ~ pi(. | s') with the actor before its step -> scalar, metrics."""
    mean, log_std = policy_net(args, batch.actions.shape[-1]).apply(actor, batch.next_observations)
    next_actions, log_probs = tanh_normal_sample(mean, log_std, jax.random.normal(key, mean.shape))
    critics = Critics(args.hidden_sizes, args.num_critics)
    next_q = critics.apply(target, batch.next_observations, next_actions).min(0)
    y = sac_target(batch, next_q, log_probs, alpha, args.gamma)
    q = critics.apply(critic, batch.observations, batch.actions)
    chex.assert_equal_shape([q[0], y])
    loss = jnp.sum(jnp.mean((q - y) ** 2, -1))
    return loss, {"train/critic_loss": loss, "train/q": q.mean(), "train/target": y.mean()}


def mopo_actor_loss(actor, critic, alpha, batch, key, args):
    """mean_B (alpha log pi(a|s) - min_e Q_e(s, a)),  a ~ pi(. | s), critics after their step."""
    mean, log_std = policy_net(args, batch.actions.shape[-1]).apply(actor, batch.observations)
    actions, log_probs = tanh_normal_sample(mean, log_std, jax.random.normal(key, mean.shape))
    q = Critics(args.hidden_sizes, args.num_critics).apply(critic, batch.observations, actions).min(0)
    loss = jnp.mean(alpha * log_probs - q)
    return loss, {"train/actor_loss": loss, "train/entropy": -log_probs.mean()}


def mopo_alpha_loss(log_alpha, entropy, target_entropy):
    """log alpha (entropy - target): alpha grows while the entropy is below its target."""
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


def optimisers(args):
    """Adam of actor, critics and alpha."""
    rate = args.actor_lr
    if args.actor_cosine:  # D7
        rate = optax.cosine_decay_schedule(args.actor_lr, args.num_updates)
    return optax.adam(rate), optax.adam(args.critic_lr), optax.adam(args.alpha_lr)


def mixed_batch(ring, data, key, args):
    """`real_ratio` of B rows from the data, the others from the filled part of the ring."""
    key_real, key_model = jax.random.split(key)
    num_real = int(args.real_ratio * args.batch_size)
    index = jax.random.randint(key_real, (num_real,), 0, len(data.rewards))
    model = ring_sample(ring, key_model, args.batch_size - num_real)
    return jax.tree.map(lambda real, model: jnp.concatenate([real[index], model]), data, model)


def mopo_update(agent, ring, data, key, args):
    """Line (7): one SAC step, every network after the one before it -> agent, metrics."""  # D9
    key_batch, key_critic, key_actor = jax.random.split(key, 3)
    batch = mixed_batch(ring, data, key_batch, args)
    alpha = jnp.minimum(jnp.exp(agent.log_alpha), args.alpha_max)
    actor_adam, critic_adam, alpha_adam = optimisers(args)

    grads, critic_metrics = jax.grad(mopo_critic_loss, has_aux=True)(
        agent.critic, agent.target, agent.actor, alpha, batch, key_critic, args
    )
    step, critic_opt = critic_adam.update(grads, agent.critic_opt)
    critic = optax.apply_updates(agent.critic, step)

    grads, actor_metrics = jax.grad(mopo_actor_loss, has_aux=True)(agent.actor, critic, alpha, batch, key_actor, args)
    step, actor_opt = actor_adam.update(grads, agent.actor_opt)
    actor = optax.apply_updates(agent.actor, step)

    target_entropy = args.target_entropy
    if target_entropy is None:
        target_entropy = -float(batch.actions.shape[-1])
    entropy = actor_metrics["train/entropy"]  # of the actor before its step
    grad = jax.grad(mopo_alpha_loss)(agent.log_alpha, entropy, target_entropy)
    step, alpha_opt = alpha_adam.update(grad, agent.alpha_opt)
    log_alpha = optax.apply_updates(agent.log_alpha, step)

    target = polyak(agent.target, critic, args.tau)
    agent = Agent(actor, critic, target, log_alpha, actor_opt, critic_opt, alpha_opt)
    return agent, {**critic_metrics, **actor_metrics, "train/alpha": alpha}


# === dynamics ===


class Fit(NamedTuple):
    """The ensemble of one seed while it is fitted."""

    key: jax.Array
    step: jax.Array  # Adam steps so far
    net: Ensemble
    opt: Any
    best_net: Ensemble  # every member at its best epoch
    best: jax.Array  # [E] hold-out error there
    holdout_mse: jax.Array  # [E] at the last epoch
    idle: jax.Array  # epochs since any member gained
    bootstrap: jax.Array  # [E, N] data rows of a member
    holdout: jax.Array  # [H] data rows of none
    scale: tuple[jax.Array, jax.Array]  # mean and std [S + A] of the inputs


class Neighbours(NamedTuple):
    """The nearest-neighbour model: data rows, standardised inputs [K, S + A], targets [K, D]."""

    inputs: jax.Array
    targets: jax.Array


class Model(NamedTuple):
    """What the rollouts of one seed need."""

    net: Ensemble | Neighbours
    elites: jax.Array  # [M]
    scale: tuple[jax.Array, jax.Array]
    low: jax.Array  # [S] rollouts end outside of low, high
    high: jax.Array


def model_inputs(scale, observations, actions):
    """x = ((s, a) - mean) / std."""
    return (jnp.concatenate([observations, actions], -1) - scale[0]) / scale[1]


def model_targets(rows):
    """y = (s' - s, r) [.., D], in raw units."""
    change = rows.next_observations - rows.observations
    return jnp.concatenate([change, rows.rewards[..., None]], -1)


def split_data(key, data, args):
    """Line (1): -> training rows [N], hold-out rows [H], scale of the training rows' inputs."""
    num_rows = len(data.rewards)
    num_holdout = min(int(args.holdout_share * num_rows), args.holdout_rows)
    order = jax.random.permutation(key, num_rows)
    holdout, train = order[:num_holdout], order[num_holdout:]
    x = jnp.concatenate([data.observations, data.actions], -1)[train]
    mean, std = x.mean(0), x.std(0)
    constant = std < 1e-6 * jnp.maximum(1.0, jnp.abs(mean))  # D10
    return train, holdout, (mean, jnp.where(constant, 1.0, std))


def fit_init(key, data, args):
    """A fresh ensemble with its split and bootstrap -> Fit."""
    key, key_split, key_boot, key_net = jax.random.split(key, 4)
    train, holdout, scale = split_data(key_split, data, args)
    draws = jax.random.randint(key_boot, (args.ensemble_size, len(train)), 0, len(train))
    num_targets = data.observations.shape[1] + 1
    net = ensemble_init(key_net, args, num_targets - 1 + data.actions.shape[1], num_targets)
    return Fit(
        key, jnp.int32(0), net, optax.adam(args.model_lr).init(net), jax.tree.map(jnp.copy, net),
        jnp.full(args.ensemble_size, 1e10), jnp.full(args.ensemble_size, 1e10), jnp.int32(0),
        train[draws], holdout, scale,
    )  # fmt: skip


def epoch_sizes(num_rows, args):
    """-> batch, Adam steps of one jitted call (at most 500), calls in an epoch of N / batch steps."""
    batch = min(args.model_batch_size, num_rows)
    calls = -(-(num_rows // batch) // 500)
    return batch, num_rows // batch // calls, calls


def fitting(fit, args):
    """Line (3): whether the fit goes on."""
    _, steps, calls = epoch_sizes(fit.bootstrap.shape[-1], args)
    return (fit.idle < args.patience) & (fit.step < args.max_epochs * steps * calls)  # D4


def fit_chunk(fit, data, args):
    """Line (2): some hundred Adam steps, and what is due at the end of an epoch -> Fit."""
    num_rows = fit.bootstrap.shape[1]
    batch, steps, calls = epoch_sizes(num_rows, args)
    key, key_steps, key_shuffle = jax.random.split(fit.key, 3)

    def step(carry, xs):
        (net, opt), (index, key) = carry, xs
        columns = jax.random.randint(key, (args.ensemble_size, batch), 0, num_rows)  # D5
        if args.exact_epochs:
            start = batch * (index % (steps * calls))
            columns = jnp.broadcast_to(start + jnp.arange(batch), columns.shape)
        index = jnp.take_along_axis(fit.bootstrap, columns, 1)
        rows = jax.tree.map(lambda x: x[index], data)  # [E, B, ..]
        x = model_inputs(fit.scale, rows.observations, rows.actions)
        grads = jax.grad(mopo_model_loss)(net, x, model_targets(rows), args)
        change, opt = optax.adam(args.model_lr).update(grads, opt)
        return (optax.apply_updates(net, change), opt), None

    xs = (fit.step + jnp.arange(steps), jax.random.split(key_steps, steps))
    (net, opt), _ = jax.lax.scan(step, (fit.net, fit.opt), xs)
    fit = fit._replace(key=key, step=fit.step + steps, net=net, opt=opt)
    at_end = fit.step % (steps * calls) == 0
    end = lambda fit: end_epoch(fit, data, key_shuffle, args)
    return jax.lax.cond(at_end, end, lambda fit: fit, fit)


def keep_best(best, idle, mse, args):
    """A member gains where its error fell by more than `min_gain` -> best [E], idle, gained [E]."""
    gained = (best - mse) / best > args.min_gain
    return jnp.where(gained, mse, best), jnp.where(gained.any(), 0, idle + 1), gained


def end_epoch(fit, data, key, args):
    """Line (3): hold-out error of every member's mean, snapshots, idle epochs -> Fit."""
    rows = jax.tree.map(lambda x: x[fit.holdout], data)
    mean, _ = ensemble_apply(fit.net, model_inputs(fit.scale, rows.observations, rows.actions))
    mse = jnp.mean((mean - model_targets(rows)) ** 2, (1, 2))  # [E]
    best, idle, gained = keep_best(fit.best, fit.idle, mse, args)
    keep = lambda new, old: jnp.where(gained[:, None, None], new, old)
    layers = jax.tree.map(keep, fit.net[:2], fit.best_net[:2])
    best_net = Ensemble(*layers, *fit.net[2:])  # the shared bounds are always the newest
    if args.exact_epochs:
        shuffled = jax.random.permutation(key, fit.bootstrap, 1, independent=True)
        fit = fit._replace(bootstrap=shuffled)
    return fit._replace(best_net=best_net, best=best, holdout_mse=mse, idle=idle)


def data_range(data, args):
    """The box low, high [S] that rollouts must not leave."""  # D6
    both = jnp.concatenate([data.observations, data.next_observations])
    low, high = both.min(0), both.max(0)
    margin = args.range_margin * jnp.maximum(high - low, 1.0)
    return low - margin, high + margin


def fitted_model(fit, data, args):
    """Every member at its best epoch, the M of least hold-out error as elites -> Model."""
    elites = jnp.argsort(fit.best, stable=True)[: args.num_elites]
    return Model(fit.best_net, elites, fit.scale, *data_range(data, args))


def knn_model(key, data, args):
    """UDG's model: nothing is learnt, `knn_rows` training rows are kept -> Model."""
    train, _, scale = split_data(key, data, args)
    rows = jax.tree.map(lambda x: x[train[: args.knn_rows]], data)
    net = Neighbours(model_inputs(scale, rows.observations, rows.actions), model_targets(rows))
    return Model(net, jnp.zeros(1, jnp.int32), scale, *data_range(data, args))


def nearest(net, x, block=100):
    """The nearest row of every x [B, S + A], exactly -> distance [B], targets [B, D].

    The least distance over blocks of rows, then the place in the best block: XLA's argmin over all rows would take
    several times as long as the distances themselves (CPU).
    """
    num_blocks = -(-len(net.inputs) // block)
    fill = num_blocks * block - len(net.inputs)
    rows = jnp.pad(net.inputs, ((0, fill), (0, 0))).reshape(num_blocks, block, -1)
    squares = jnp.pad(jnp.sum(net.inputs**2, -1), (0, fill), constant_values=jnp.inf).reshape(num_blocks, block)
    # |row - x|^2 of a block, less |x|^2: [block, B]
    distances = lambda i, x: squares[i][:, None] - 2 * jnp.dot(rows[i], x.T, precision="highest")

    def compare(best, i):
        least = distances(i, x).min(0)
        return (jnp.minimum(best[0], least), jnp.where(least < best[0], i, best[1])), None

    nothing = jnp.full(len(x), jnp.inf), jnp.zeros(len(x), jnp.int32)
    (_, best), _ = jax.lax.scan(compare, nothing, jnp.arange(num_blocks))
    place = jax.lax.map(lambda row: distances(row[0], row[1][None])[:, 0].argmin(), (best, x), batch_size=512)
    index = best * block + place
    return jnp.linalg.norm(x - net.inputs[index], axis=-1), net.targets[index]


def penalty(mean, std, elites, kind):
    """Line (5): u [B] from mean, std [E, B, D] of all members; the last of D is the reward."""
    norm = lambda x: jnp.linalg.norm(x, axis=-1)
    states = mean[..., :-1]
    if kind == "max_aleatoric":  # D1
        return norm(std).max(0)
    if kind == "max_aleatoric_elites":
        return norm(std[elites]).max(0)
    if kind == "max_dist_to_mean":
        return norm(states - states.mean(0)).max(0)
    if kind == "max_pairwise":
        return norm(mean[elites][:, None] - mean[elites][None]).max((0, 1))
    if kind == "ensemble_std":
        return jnp.sqrt(states.var(0).mean(-1))
    return norm(jnp.sqrt((std**2).mean(0) + mean.var(0)))  # total_std


def predict(model, observations, actions, args):
    """Mean and std [E, B, D] of (s' - s, r), and u [B]; the knn model is one member of std 0."""
    x = model_inputs(model.scale, observations, actions)
    if args.model == "knn":
        distance, targets = nearest(model.net, x)
        return targets[None], jnp.zeros_like(targets)[None], args.knn_scale * distance
    mean, raw = ensemble_apply(model.net, x)
    std = jnp.exp(0.5 * bound_logvar(model.net, raw))
    return mean, std, penalty(mean, std, model.elites, args.penalty)


def model_step(observations, mean, std, member, noise):
    """Line (4): sample member [B] of each row with noise [B, D] -> next observations, rewards [B]."""
    row = jnp.arange(len(member))
    sample = mean[member, row] + std[member, row] * noise  # D2
    return observations + sample[:, :-1], sample[:, -1]


def rollout_ends(model, task, next_obs, rewards):
    """What ends a rollout, all [B]: not finite, outside the data's range, terminal in the task."""
    finite = jnp.isfinite(next_obs).all(-1) & jnp.isfinite(rewards)
    inside = ((next_obs >= model.low) & (next_obs <= model.high)).all(-1)
    return ~finite, ~inside, task.model_terminal(next_obs)


def model_rollout(model, actor, starts, key, args, task):
    """Lines (4), (5) from states [b, S] -> Rows [h, b], whether to keep them [h, b], info."""

    def step(carry, key):
        obs, alive = carry
        key_act, key_member, key_noise = jax.random.split(key, 3)
        pi, log_std = policy_net(args, task.action_size).apply(actor, obs)
        actions, _ = tanh_normal_sample(pi, log_std, jax.random.normal(key_act, pi.shape))
        mean, std, u = predict(model, obs, actions, args)
        member = model.elites[jax.random.randint(key_member, u.shape, 0, len(model.elites))]
        noise = jax.random.normal(key_noise, mean.shape[1:])
        next_obs, rewards = model_step(obs, mean, std, member, noise)
        if args.reward == "known":
            rewards = task.model_reward(obs, actions, next_obs)
        penalised = rewards - args.lam * u
        broken, outside, terminals = rollout_ends(model, task, next_obs, penalised)
        keep = alive & ~broken
        ends = (terminals, outside)
        if args.range_value != "worst":  # D6
            ends = (terminals | (outside & (args.range_value == "zero")), jnp.zeros_like(outside))
        rows = Rows(obs, actions, penalised, next_obs, *(x.astype(jnp.float32) for x in ends))
        info = {"u": u, "reward": rewards, "terminal": keep & terminals, "outside": keep & outside}
        alive = keep & ~outside & ~terminals
        return (jnp.where(alive[:, None], next_obs, obs), alive), (rows, keep, info)

    carry = (starts, jnp.ones(len(starts), bool))
    return jax.lax.scan(step, carry, jax.random.split(key, args.horizon))[1]


def rows_at_once(args):
    """Rows of one batched rollout: the largest divisor of `rollout_batch` up to 8192 (cache, memory)."""
    return max(n for n in range(1, 8193) if args.rollout_batch % n == 0)


def refresh(agent, ring, model, data, key, args, task):
    """Lines (4) to (6): `rollout_batch` rollouts into the ring -> ring, metrics."""
    key_start, key_rollout, key_real = jax.random.split(key, 3)
    shape = (args.rollout_batch // rows_at_once(args), rows_at_once(args))
    starts = jax.random.randint(key_start, shape, 0, len(data.rewards))
    index = jax.random.randint(key_real, (4096,), 0, len(data.rewards))
    roll = lambda x: model_rollout(model, agent.actor, data.observations[x[0]], x[1], args, task)
    rows, keep, info = jax.lax.map(roll, (starts, jax.random.split(key_rollout, shape[0])))
    rows, keep, info = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), (rows, keep, info))
    ring = ring_insert(ring, rows, keep)

    average = lambda x: jnp.where(keep, x, 0.0).sum() / jnp.maximum(keep.sum(), 1)
    _, _, u_real = predict(model, data.observations[index], data.actions[index], args)
    u_share = args.lam * average(info["u"]) / jnp.maximum(average(jnp.abs(info["reward"])), 1e-6)
    metrics = {
        "model/penalty_share": u_share,
        "model/reward": average(info["reward"]),
        "model/rollout_length": keep.sum() / args.rollout_batch,
        "model/terminal": info["terminal"].sum() / args.rollout_batch,
        "model/outside": info["outside"].sum() / args.rollout_batch,
        "model/ring": ring.size.astype(jnp.float32),
    }
    for name, u in (("model", jnp.where(keep, info["u"], jnp.nan)), ("real", u_real)):
        half, most = jnp.nanquantile(u, jnp.array([0.5, 0.95]))
        metrics |= {f"model/u_{name}": jnp.nanmean(u), f"model/u_{name}_p50": half}
        metrics |= {f"model/u_{name}_p95": most}
    return ring, metrics


# === evaluation ===


def evaluate(env, act, params, key, num_episodes, length):
    """Undiscounted return of the episodes after every step: [num_episodes, length]; constant once ended.

    act(params, observations [.., S]) -> actions [.., A], deterministic. `key` alone sets the starts.
    """

    def step(carry, _):
        state, alive, total = carry
        after = jax.vmap(env.step)(state, act(params, state.obs))
        total = total + jnp.where(alive, after.reward, 0.0)
        return (after, alive & (after.done < 0.5), total), total

    start = jax.vmap(env.reset)(jax.random.split(key, num_episodes))
    carry = (start, jnp.ones(num_episodes, bool), jnp.zeros(num_episodes))
    _, totals = jax.lax.scan(step, carry, length=length)
    return totals.T


def real_rows(env, actor, key, args, length):
    """Steps of the current, stochastic policy in the world -> Rows [L, E], alive [L, E]."""
    key_reset, key_steps = jax.random.split(key)

    def step(carry, key):
        state, alive = carry
        mean, log_std = policy_net(args, env.action_size).apply(actor, state.obs)
        actions, _ = tanh_normal_sample(mean, log_std, jax.random.normal(key, mean.shape))
        after = jax.vmap(env.step)(state, actions)
        rows = Rows(state.obs, actions, after.reward, after.obs, after.done, jnp.zeros_like(after.done))
        return (after, alive & (after.done < 0.5)), (rows, alive)

    start = jax.vmap(env.reset)(jax.random.split(key_reset, args.eval_episodes))
    carry = (start, jnp.ones(args.eval_episodes, bool))
    return jax.lax.scan(step, carry, jax.random.split(key_steps, length))[1]


def calibration(model, rows, alive, args):
    """The elites' one-step error on real rows beside the std they claim and beside u.

    rows, alive [L, E, ..] -> metrics, points (u, error) [2, L E], nan where not alive;
    error = sqrt( mean over elites of ||mean - (s' - s, r)||^2 )
    """
    rows, alive = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (rows, alive))
    mean, std, u = predict(model, rows.observations, rows.actions, args)
    square = ((mean - model_targets(rows)) ** 2)[model.elites]  # [M, B, D]
    error = jnp.sqrt(square.sum(-1).mean(0))
    average = lambda x: jnp.where(alive, x, 0.0).sum() / alive.sum()
    du, de = u - average(u), error - average(error)
    spread = jnp.sqrt(average(du**2) * average(de**2))
    metrics = {
        "model/world_rmse": jnp.sqrt(average(square.mean((0, 2)))),
        "model/world_sigma": jnp.sqrt(average((std[model.elites] ** 2).mean((0, 2)))),
        "model/world_error": average(error),
        "model/world_u": average(u),
        "model/world_bounded": average(error <= u),
        "model/world_correlation": average(du * de) / jnp.maximum(spread, 1e-12),
    }
    return metrics, jnp.where(alive, jnp.stack([u, error]), jnp.nan)


def evaluation_keys(args):
    """A key for each seed [S] that no split of the seed's key ever gives: the same starts at every evaluation."""
    seeds = args.seed + jnp.arange(args.num_seeds)
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 2**31))(seeds)


def make_evaluation(args, env, task, data_length):
    """-> evaluation(actor [S], model [S], keys [S]) -> metrics, each [S], and calibration's points [S]."""
    act = lambda actor, obs: jnp.tanh(policy_net(args, task.action_size).apply(actor, obs)[0])
    length = max(task.eval_length, data_length)

    def one(actor, model, key):
        key_eval, key_model = jax.random.split(key)
        totals = evaluate(env, act, actor, key_eval, args.eval_episodes, length)
        rows, alive = real_rows(env, actor, key_model, args, min(data_length, 200))
        metrics, points = calibration(model, rows, alive, args)
        returns = totals[:, task.eval_length - 1]
        metrics |= {"eval/return": returns.mean(), "eval/return_std": returns.std()}
        metrics |= {"eval/return_data_length": totals[:, data_length - 1].mean()}
        if task.reference:
            metrics["eval/score"] = task.normalized_score(returns.mean())
        return metrics, points

    return jax.jit(over_devices(jax.vmap(one), args))


# === training ===


class MopoState(NamedTuple):
    """What a run needs to go on, beside its model; all leaves have a leading seed axis."""

    key: jax.Array
    num_updates: jax.Array
    agent: Agent
    ring: Ring  # of Rows of the model


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


def map_seeds(function, xs, args):
    """function over the seeds [S] of a device: in turn on a CPU, which one seed fills; else at once."""
    on_cpu = jax.default_backend() == "cpu"
    each = lambda xs: jax.lax.map(function, xs) if on_cpu else jax.vmap(function)(xs)
    return over_devices(each, args)(xs)


def make_fit(args):
    """-> init(keys [S], data), chunk(fit, data), model(fit, data) of all seeds."""

    def chunk(fit, data):
        go_on = lambda fit: fit_chunk(fit, data, args)
        one = lambda fit: jax.lax.cond(fitting(fit, args), go_on, lambda fit: fit, fit)
        return map_seeds(one, fit, args)

    init = lambda keys, data: map_seeds(lambda key: fit_init(key, data, args), keys, args)
    model = lambda fit, data: map_seeds(lambda fit: fitted_model(fit, data, args), fit, args)
    return jax.jit(init), jax.jit(chunk, donate_argnums=0), jax.jit(model)


def make_train(args, task):
    """-> init(keys [S]), train_chunk(state, model, data) -> state, metrics [S], means of the chunk."""

    def init(key):
        key, key_actor, key_critic = jax.random.split(key, 3)
        obs, actions, zero = jnp.zeros(task.observation_size), jnp.zeros(task.action_size), jnp.zeros(())
        actor = policy_net(args, task.action_size).init(key_actor, obs)
        critic = Critics(args.hidden_sizes, args.num_critics).init(key_critic, obs, actions)
        opts = [opt.init(p) for opt, p in zip(optimisers(args), (actor, critic, zero), strict=True)]
        agent = Agent(actor, critic, jax.tree.map(jnp.copy, critic), zero, *opts)
        row = Rows(obs, actions, zero, obs, zero, zero)
        ring = ring_init(row, args.rollout_batch * args.horizon * args.retain)
        return MopoState(key, jnp.int32(0), agent, ring)

    def one_refresh(state, model, data):
        key, key_refresh, key_updates = jax.random.split(state.key, 3)
        agent, ring = state.agent, state.ring
        ring, rolled = refresh(agent, ring, model, data, key_refresh, args, task)
        step = lambda agent, key: mopo_update(agent, ring, data, key, args)
        agent, learnt = jax.lax.scan(step, agent, jax.random.split(key_updates, args.rollout_freq))
        state = MopoState(key, state.num_updates + args.rollout_freq, agent, ring)
        return state, {**jax.tree.map(jnp.mean, learnt), **rolled}

    def one_chunk(state, model, data):
        step = lambda state, _: one_refresh(state, model, data)
        state, metrics = jax.lax.scan(step, state, length=args.chunk // args.rollout_freq)
        return state, jax.tree.map(jnp.mean, metrics)

    def chunk(state, model, data):
        return map_seeds(lambda x: one_chunk(*x, data), (state, model), args)

    return jax.jit(over_devices(jax.vmap(init), args)), jax.jit(chunk, donate_argnums=0)


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


def preset_name(data, known):
    """The name of `known` for a dataset: its own, else that of the same set in another version.

    `ours/x` (benchmark/suite.py) is D4RL's x without a version.
    """
    same = lambda name: name.removeprefix("ours/").rstrip("0123456789").removesuffix("-v")
    return data if data in known else next((name for name in known if same(name) == same(data)), data)


def mopo_preset(args):
    """--quick, or the published values of the file's dataset and --preset -> name, {field: value}."""
    given = preset_name(args.preset, PRESETS)
    if args.preset and given not in PRESETS:
        raise envs.InputError(f"--preset {args.preset}: unknown; one of {', '.join(PRESETS)}")
    if args.quick and args.preset:
        raise envs.InputError("--quick is a preset of its own; leave --preset out")
    if args.quick:
        return "quick", QUICK
    if not args.dataset:
        raise envs.InputError("--dataset: name a file that udg_select.py wrote, or try --quick")
    data = envs.buffers.load(args.dataset, ("rewards",), quiet=True).metadata["dataset_name"]
    named = given if given in PUBLISHED else preset_name(data, PUBLISHED)
    published = PRESETS.get(named, {})
    if args.preset == "cpu":  # the budget is ours, the published horizon and lambda stay
        published = {**published, **CPU, **{k: published[k] for k in ("horizon", "lam") if k in published}}
    if named in PUBLISHED:
        return f"{args.preset or 'by the file'} (as published for {named}; the data is {data})", published
    return f"{args.preset or 'none'} (nothing is published for {data})", published


def check_args(args, task, num_rows):
    """Refuse what cannot work, before any long work starts."""
    chunk, real = max(args.chunk, 1), int(args.real_ratio * args.batch_size)
    positive = ("horizon", "retain", "num_seeds", "eval_episodes", "max_epochs", "rollout_freq", "chunk", "knn_rows",
                "num_updates", "eval_every", "model_batch_size", "patience", "batch_size", "num_critics")  # fmt: skip
    rules = {
        **{f"--{name.replace('_', '-')} must be positive": getattr(args, name) > 0 for name in positive},
        f"--reward known: what {task.name} observes does not tell its reward; use learned":
            args.reward == "learned" or task.model_reward is not None,
        "--chunk must be a multiple of --rollout-freq": chunk % max(args.rollout_freq, 1) == 0,
        "--chunk must divide --eval-every and --num-updates":
            args.eval_every % chunk == args.num_updates % chunk == 0,
        "--num-elites must be 1 to --ensemble-size": 1 <= args.num_elites <= args.ensemble_size,
        "--model-decays needs two values or more": len(args.model_decays) >= 2,
        "--holdout-rows must be positive and --holdout-share between 0 and 1":
            args.model == "knn" or (args.holdout_rows > 0 and 0 < args.holdout_share < 1),
        "--real-ratio: a batch needs a model row": 0 <= real < args.batch_size,
        "--rollout-batch needs a divisor from 256 to 8192, as 10000 has":
            args.rollout_batch > 0 and rows_at_once(args) >= min(args.rollout_batch, 256),
        f"--dataset: {num_rows} rows are too few to hold any out": num_rows >= 20,
        f"--num-devices: 0 to {jax.local_device_count()}, the devices there are":
            0 <= args.num_devices <= jax.local_device_count(),
    }  # fmt: skip
    for message, holds in rules.items():
        if not holds:
            raise envs.InputError(message)
    # A task whose end its observations do not tell says so here, and not after the fit.
    jax.eval_shape(task.model_terminal, jax.ShapeDtypeStruct((1, task.observation_size), jnp.float32))


def announce(folder, args, task, env, num_rows):
    """Print what will run and what it needs; refuse where memory or disk cannot hold it."""
    row = 4 * (2 * task.observation_size + task.action_size + 3)
    ring = args.num_seeds * args.rollout_batch * args.horizon * args.retain * row
    need = 2 * ring + num_rows * row  # a copy while it is fed
    disk = shutil.disk_usage(folder).free + sum(x.stat().st_size for x in folder.glob("**/state*.npz"))
    stats = jax.local_devices()[0].memory_stats() or {}
    have = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    print(
        f"{task.name} on {env.backend}: {args.num_seeds} seeds x {args.num_updates} updates, model "
        f"rollouts {args.rollout_batch} x {args.horizon} every {args.rollout_freq}\n{folder}: "
        f"memory {need / 1e9:.2f} of {have / 1e9:.1f} GB, disk {3 * ring / 1e9:.2f} of "
        f"{disk / 1e9:.1f} GB free", flush=True,
    )  # fmt: skip
    if need > have or 3 * ring > disk:  # state.npz, the one before, and the one being written
        remedy = "lower --rollout-batch, --retain or --num-seeds"
        raise envs.InputError(f"{folder}: memory or disk cannot hold the model rows; {remedy}")


def log_seeds(logger, step, metrics, seeds, first_seed, rate=None):
    """One record for each of `seeds`, positions on the leading axis of every metric; prints the returns."""
    for s in seeds:
        record = {k: v[s] for k, v in metrics.items()} | ({"time/updates_per_s": rate} if rate else {})
        logger.log(int(step), record, seed=first_seed + int(s))
    if "eval/return" in metrics:
        print(f"  return at {step}:", *(f"{x:.2f}" for x in metrics["eval/return"]), flush=True)


def train_model(args, data, fit, folder, logger, save):
    """Lines (1) to (3): fit the ensembles of all seeds -> Model [S]."""
    _, fit_some, model = make_fit(args)
    _, steps, calls = epoch_sizes(fit.bootstrap.shape[-1], args)
    start = first = int(fit.step.max())
    began = saved = time.time()
    with StopSignal() as stop:
        while fitting(fit, args).any() and not stop.name:
            before = np.asarray(fit.step)
            fit = fit_some(fit, data)
            after, now = np.asarray(fit.step), fit.holdout_mse.mean()
            ended = np.flatnonzero((after > before) & (after % (steps * calls) == 0))
            record = {"holdout_mse": fit.holdout_mse, "holdout_best": fit.best, "idle": fit.idle}
            record = {f"model/{k}": v for k, v in record.items()}
            log_seeds(logger, after.max() // (steps * calls), record, ended, args.seed)
            rate = (after.max() - first) / (time.time() - began)
            shown = {"epoch": after.max() / (steps * calls), "holdout_mse": now, "idle": fit.idle.min()}
            progress_line("model step", after.max(), args.max_epochs * steps * calls, rate, shown)
            if stop.name or time.time() - saved > 60:
                save(folder / "model", fit)
                saved = time.time()
            if first == start:  # the first call compiled: the pace is that of those after it
                first, began = after.max(), time.time()
    save(folder / "model", fit)
    if stop.name:
        sys.exit(f"stopped by {stop.name} while fitting; go on with the same command and --resume")
    if not (fit.best < 1e9).all():
        raise envs.InputError("the model's hold-out error is not finite; lower --model-lr")
    return model(fit, data)


def check_finite(where, metrics, args):
    """Raise InputError where a metric is not finite or |Q| beyond --q-bound: no later update would mend it."""
    for name, values in metrics.items() if args.q_bound else ():
        largest = np.abs(values).max()
        if not largest <= (args.q_bound if name == "train/q" else np.finfo(np.float32).max):  # nan compares False
            raise envs.InputError(
                f"{where}: {name} is {largest:.3g}; what was saved before is kept: lower the learning rates and start "
                "anew, or go on all the same with --resume --q-bound 0"
            )


def train_phase(label, total, state, train_chunk, evaluation, shown, args, logger, save):
    """Run train_chunk: state -> state, metrics [S] until state.num_updates is `total` -> state.

    Every eval_every updates and at the end the metrics and those of evaluation(state) are logged; the
    names in `shown` stand in the progress line. save(state): each minute, at the end, and on a
    signal, which then ends the process. Raises InputError where a metric diverges.
    """
    step = start = first = int(state.num_updates[0])
    began = saved = time.time()
    with StopSignal() as stop:
        while step < total and not stop.name:
            state, train = train_chunk(state)
            step = int(state.num_updates[0])
            train = {k: np.asarray(v) for k, v in train.items()}
            check_finite(f"{label} {step}", train, args)
            rate = (step - first) / (time.time() - began)
            progress_line(label, step, total, rate, {k: train[k].mean() for k in shown})
            if step % args.eval_every == 0 or step == total:
                metrics = {**train, **{k: np.asarray(v) for k, v in evaluation(state).items()}}
                log_seeds(logger, step, metrics, range(args.num_seeds), args.seed, rate)
            if step == total or stop.name or time.time() - saved > 60:
                save(state)
                saved = time.time()
            if first == start:  # the first call compiled: the pace is that of those after it
                first, began = step, time.time()
    if stop.name:  # at the end of a phase, too: the next one comes with --resume
        sys.exit(f"stopped by {stop.name} at {label} {step}; go on with the same command and --resume")
    return state


def plot_run(folder, task, buffer, points):
    """learning_curve.png, dynamics.png and penalty.png, from the log and calibration's points."""
    curves.learning_curve(folder / "learning_curve.png", folder, task, buffer)

    errors, (u, error) = [], points[0]
    for i, (seed, (epochs, mse)) in enumerate(curves.read(folder, "model/holdout_mse").items()):
        errors += [(epochs, mse, {"color": f"C{i}", "lw": 0.8, "label": f"seed {seed}, each member"})]
    equal = np.array([np.nanmin(error), np.nanmax(error)])
    scatter = [(u, error, {"marker": ".", "ls": "", "ms": 2, "alpha": 0.5, "label": "one step of the policy"})]
    scatter += [(equal, equal, {"color": "k", "ls": "--", "lw": 1, "label": "error = u"})]
    curves.figure(folder / "dynamics.png", [
        {"title": "hold-out error of the model", "xlabel": "epoch", "ylabel": "MSE of (s' - s, r)",
         "scale": "semilogy", "lines": errors},
        {"title": "final policy in the world, first seed", "xlabel": "penalty u",
         "ylabel": "one-step error of the elites", "scale": "loglog", "lines": scatter},
    ])  # fmt: skip

    lines = []
    for rows, color in (("real", "C0"), ("model", "C1")):
        for part, style, label in (("", "-", "mean"), ("_p50", "--", "median"), ("_p95", ":", "95 %")):
            seeds = list(curves.read(folder, f"model/u_{rows}{part}").values())
            mean = np.mean([values for _, values in seeds], 0)
            lines += [(seeds[0][0], mean, {"color": color, "ls": style, "label": f"{rows} rows, {label}"})]
    title = f"{task.name}: penalty, mean over seeds"
    panel = {"title": title, "xlabel": "updates", "ylabel": "u, before lambda", "lines": lines}
    curves.figure(folder / "penalty.png", [panel])


def main(args):
    """Fit the model, train the policy in it, write policy and figures -> envs.curves.summary."""
    started = time.time()
    path = args.dataset or scripted.dataset(Path(args.out or f"runs/mopo/point-angle-0/seed{args.seed}"))
    buffer, task = envs.buffers.load_task(path, DATA_KEYS, args.task, args.max_rows)
    options = {k: v for k, v in task.options.items() if k in envs.task_options(task.name)}
    env = envs.make(task.name, None if args.backend == "auto" else args.backend, **options)
    check_args(args, task, len(buffer))
    env.check_batch(args.num_seeds * args.eval_episodes)
    args, folder = run_folder(args, "mopo", task.name)
    (folder / "model").mkdir(exist_ok=True)
    announce(folder, args, task, env, len(buffer))

    data = Rows(*(jnp.asarray(buffer[k], jnp.float32) for k in DATA_KEYS), jnp.zeros(len(buffer)))
    keys = jax.vmap(jax.random.key)(args.seed + jnp.arange(args.num_seeds))
    key_model, key_policy = jax.vmap(jax.random.split, out_axes=1)(keys)
    fit_init_all, init = make_fit(args)[0], make_train(args, task)[0]
    evaluator = make_evaluation(args, env, task, buffer.metadata["episode_length"])
    eval_keys = evaluation_keys(args)
    evaluation = lambda actor, model: evaluator(actor, model, eval_keys)
    digests = [envs.buffers.sha256(buffer[k]) for k in ("observations", "actions", "rewards")]
    meta = {"identity": run_identity(args, data=digests), "log": 0}
    fit = state = None
    if args.resume and args.model == "ensemble":
        like = jax.eval_shape(fit_init_all, key_model, data)
        fit, meta = load_state(folder / "model", like, meta["identity"])
    if args.resume and (args.model == "knn" or any(folder.glob("state*.npz"))):
        state, meta = load_state(folder, jax.eval_shape(init, key_policy), meta["identity"])
    logger = Logger(folder, args, meta["log"])
    save = lambda where, tree: save_state(where, tree, {**meta, "log": logger.file.tell()})
    if args.model == "knn":
        model = jax.jit(lambda k, d: map_seeds(lambda k: knn_model(k, d, args), k, args))(key_model, data)
    else:
        if fit is None:
            fit = fit_init_all(key_model, data)
            save(folder / "model", fit)
        model = train_model(args, data, fit, folder, logger, save)
    if state is None:
        state = init(key_policy)
        save(folder, state)
    train_chunk = make_train(args, task)[1]
    state = train_phase(
        "update", args.num_updates, state, lambda state: train_chunk(state, model, data),
        lambda state: evaluation(state.agent.actor, model)[0],
        ("train/q", "train/entropy", "model/reward", "model/penalty_share"), args, logger,
        lambda state: save(folder, state),
    )  # fmt: skip
    about = {"task": task.name, "observations": "task", "versions": envs.buffers.versions()}
    about |= {"log_std_min": args.log_std_min, "log_std_max": args.log_std_max}
    write_policy(folder / "policy.npz", "tanh_gaussian", {"actor": state.agent.actor}, about)
    plot_run(folder, task, buffer, np.asarray(evaluation(state.agent.actor, model)[1]))
    result = curves.summary(folder, buffer)
    names = "policy.npz, learning_curve.png, dynamics.png, penalty.png"
    print(f"{folder}: {names}; {time.time() - started:.0f} s")
    return result


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end_at_once)
    try:
        arguments = parse_args(sys.argv[1:], mopo_preset)
        if arguments.num_devices > 1:  # of the CPU; accelerators are what they are
            jax.config.update("jax_num_cpu_devices", arguments.num_devices)
        main(arguments)
    except (envs.InputError, OSError) as error:
        sys.exit(f"mopo.py: error: {error}")
