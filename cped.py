"""CPED: learn how dense the data's actions are, then climb Q where they are dense enough.

Paper      Constrained Policy optimization with Explicit behavior Density (Zhang et al., NeurIPS 2023),
           arXiv 2301.12130. Codes named below: C24 = the authors' code of 2024, C23 = their earlier one.
Objective  max over pi of  E_s[ Q(s, pi(s)) ]   subject to   -log p(pi(s) | s) < eps            (eq. 7)
           as a Lagrangian with multiplier alpha; p is a normalising flow trained on the data.

Algorithm  Flow-GAN (repeat flow_updates times; one pass of (1), (2) counts disc_ratio)
           (1) disc_ratio times: a batch (s, a), fake actions a^ = f^-1(z; s), z ~ prior;
               one step of D on  mean D(s, a^) - mean D(s, a) + 0.5 E[ (||grad D(x~)|| - 1)^2 ]  (eq. 4)
           (2) one step of f on  nll_weight * -mean log p(a | s) - adv_weight * mean D(s, a^)    (eq. 4)
           Actor-critic with f frozen (repeat num_updates times; one pass of (3) to (5) counts policy_delay)
           (3) policy_delay times: a~ = pi'(s') + clipped noise, one step of both critics to
               y = r + gamma (1 - terminal) min_i Q_i'(s', a~)
           (4) one step of the actor on  -mean min_i Q_i(s, pi(s)) + alpha * mean -log p(pi(s) | s)  (eq. 7)
               alpha falls step by step; or a hinge on eps; or alpha by dual ascent
           (5) Q' and pi' follow by Polyak; then (1), (2) once more with --flow-in-rl

Symbols    s observations [B, S] | a actions [B, A] | r rewards [B] | y target [B] | q [2, B]
           f flow: (s, a) -> z | z [B, A], or [B, S + A] for nice | p density: prior(z) |det df/da|
           D discriminator | x = (s, a) [B, S + A] | x~ between a real and a fake x | nll = -log p [B]
           pi deterministic actor | alpha weight of the constraint | eps its threshold
           pi', Q' targets | B batch | S also num_seeds, as a leading axis | L flow_layers

Deviations
  D1  paper, codes: one density of (s, a), NICE; here: of a given s, affine couplings with bounded log
      scales. Only d/da log p matters to the actor, and p(s) wastes capacity (--flow nice for theirs).
  D2  codes' NICE samples by an inverse that is none (scale applied last, not first); here: exact.
  D3  codes mix the penalty's x~ by N(0, 1) and reseed the generator in every call, so that weights
      and target noise never change; here: U(0, 1), fresh keys.
  D4  codes: raw observations; here: standardised for all networks (--no-normalize).
  D5  codes: the likelihood of the data's actions; here: of actions + N(0, 0.05^2), so that mass on the
      boundary cannot drive it, and the actor's gradient, to infinity.
  D6  codes: the flow's Adam with b2 = 0.01, eps = 1e-4, no clip; here: 0.999, 1e-8, gradient norm <= 10.
  D7  codes: a~ may leave [-1, 1], targets start as other networks than those they follow; here: clipped, copies.
  D8  paper: alpha by dual ascent, eps a threshold; codes: a table of alpha, and eps a constant to the
      gradient. Here: the table, by shares of num_updates (C24's formula turns negative where
      T0 < 500k); --constraint hinge | dual for the paper's.
  D9  paper: the flow learns in both loops; C24: frozen after the first; here: frozen (--flow-in-rl).
  D10 codes: raw Q, 5 % of the run clones at alpha = 1000; here: Q / mean |Q| and no cloning, but for
      D4RL's presets, which are the codes'.
  D11 codes skip steps at a nan or a loss above 1e7; here: a gradient not finite counts as 0.
  D12 codes: PyTorch's default weights; here: Xavier-uniform for actor, critics and flow layers.

Files      reads a buffer relabelled by udg_select.py (docs/buffer.md); writes runs/cped/<task>/...:
           policy.npz (docs/policy.md), log.jsonl, state.npz, learning_curve.png, density.png
Run        python cped.py --quick                         (point robot, under 2 minutes on 2 cores)
           python cped.py --dataset runs/udg_select/ant-angle-60/top1.npz --preset cpu     (2 cores)
           python cped.py --dataset runs/udg_select/ant-angle-60/top1.npz --num-seeds 5    (1M updates)
Expect     --quick: return 95 (data: mean -0.2, best 93.9), 55 s; --preset cpu on ant-angle-60, top-1, seed 0: 192 in
           200 steps, mean of the last 5 (data 108, cloning 117), 21 minutes; both on 2 CPU cores that others
           shared; more in docs/cped.md
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
    """a name in PRESETS on top of the one for the file's dataset_name; cpu: a budget for 2 cores"""
    seed: int = 0
    """first seed; a seed gives the same run alone or among others"""
    num_seeds: int = 1
    """S: independent runs (flow and policy) at once, a leading axis of all arrays"""
    num_devices: int = 0
    """devices that share the seeds; 0: all there are. On a CPU, 2 or more make that many out of its cores"""
    out: str = ""
    """run folder; empty: runs/cped/<task>/seed<seed>"""
    resume: bool = False
    """go on from the folder's state.npz, exactly"""
    quick: bool = False
    """a small run on a scripted point-angle-0 buffer made on the spot, under 2 minutes"""
    track: bool = False
    """mirror the log to Weights & Biases (needs `pip install wandb`)"""
    backend: Literal["auto", "mujoco", "mjx"] = "auto"
    """physics of the evaluation: C MuJoCo (auto on a CPU) or MJX; ignored by the point worlds"""
    # --- budget ---
    flow_updates: int = 500_000
    """T0: iterations of the flow's training; the flow itself steps in every disc_ratio-th (C24: 500k)"""
    num_updates: int = 1_000_000
    """critic steps per seed; the actor steps in every policy_delay-th (C24: 1M)"""
    chunk: int = 1_000
    """iterations in one jitted call; a multiple of disc_ratio and policy_delay, a divisor of eval_every"""
    eval_every: int = 10_000
    """iterations between two evaluations (C24: 1,000)"""
    eval_episodes: int = 10
    """episodes of an evaluation (C24: 5,000 steps)"""
    # --- flow ---
    flow: Literal["cond", "nice"] = "cond"
    """cond: density of a given s, affine couplings; nice: of (s, a), additive couplings (codes; D1)"""
    flow_layers: int = 4
    """L: coupling layers (C24: 4, C23: 2)"""
    flow_hidden_sizes: tuple[int, ...] = (256, 256)
    """widths inside a coupling layer (codes: 750, 750 for nice)"""
    prior: Literal["logistic", "gaussian"] = "logistic"
    """density of z, per coordinate (codes: logistic)"""
    log_scale_cap: float = 2.0
    """bound of a coupling's log scales (ours, D1); the whitening's own are bounded by action_noise alone"""
    action_noise: float = 0.05
    """std of the noise on the actions whose likelihood is raised (ours, D5; codes: 0)"""
    nll_weight: float = 1.0
    """weight of the likelihood in the flow's loss; 0: adversarial only (codes: 1)"""
    adv_weight: float = 1.0
    """weight of the discriminator in it; 0: maximum likelihood only, no discriminator (codes: 1)"""
    gp_weight: float = 0.5
    """weight of the gradient penalty (codes: 0.5, usual: 10)"""
    disc_ratio: int = 5
    """discriminator steps per flow step (C24: 5)"""
    flow_lr: float = 1e-4
    """Adam rate of the flow (codes: 1e-4)"""
    disc_lr: float = 1e-4
    """Adam rate of the discriminator (C24: 1e-4, C23: 1e-5)"""
    max_grad_norm: float = 10.0
    """the flow's gradient is scaled down to this norm (ours, D6)"""
    flow_in_rl: bool = False
    """let the flow learn on, one pass of (1), (2) after each actor step (paper, D9)"""
    # --- constraint ---
    constraint: Literal["schedule", "hinge", "dual"] = "schedule"
    """schedule: alpha * nll; hinge: alpha * max(nll - eps, 0); dual: alpha grows while nll > eps (D8)"""
    alphas: tuple[float, ...] = (0.1, 0.03, 0.01)
    """alpha from each share of the run in alpha_from on; dual starts at the first (ours; D4RL: C24's)"""
    alpha_from: tuple[float, ...] = (0.0, 0.1, 0.3)
    """shares of num_updates at which the alphas begin, the first 0"""
    eps_quantile: float = 0.9
    """eps: this quantile of the data's nll, for hinge and dual (ours)"""
    alpha_lr: float = 1e-3
    """Adam rate of log alpha in the dual form, which stays within +-7 (ours)"""
    q_norm: bool = True
    """divide Q by its mean magnitude in the actor's loss (ours, D10; codes: raw)"""
    critic_from: float = 0.0
    """share of num_updates during which the critics stay as they are (C24: 0.03)"""
    q_from: float = 0.0
    """share of num_updates during which the actor only clones, without Q (C24: 0.05)"""
    bc_only: bool = False
    """the baseline: the actor climbs the density alone for the whole run, no critics"""
    # --- actor-critic ---
    normalize: bool = True
    """standardise observations by the data's mean and std (ours, D4)"""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """widths of actor and critics (codes: 256, 256)"""
    batch_size: int = 256
    """B: rows per update, of flow, discriminator, actor and critics (codes: 256)"""
    actor_lr: float = 1e-4
    """Adam rate of the actor (codes: 1e-4, AntMaze 3e-4)"""
    critic_lr: float = 3e-4
    """Adam rate of the critics (codes: 3e-4)"""
    gamma: float = 0.99
    """discount (codes: 0.99)"""
    tau: float = 0.005
    """Polyak rate of actor and critics, once per actor step (codes: 0.005)"""
    q_bound: float = 1e6
    """largest mean |Q| of a batch before the run stops as diverged; 0: go on, also where a loss is not finite (ours)"""
    policy_delay: int = 2
    """critic steps per actor step (codes: 2)"""
    target_noise: float = 0.2
    """std of the noise on the target's action (codes: 0.2)"""
    target_noise_clip: float = 0.5
    """its bound (codes: 0.5)"""
    reward_shift: float = 0.0
    """added to every reward (C24: -1 for AntMaze)"""
    holdout_rows: int = 1_000
    """rows, at most a tenth, kept from all training to judge the density on (ours)"""


MUJOCO = {  # C24: phases and alpha in shares of 1M updates after T0 = 500k
    "alphas": (1000.0, 10.0, 7.5, 5.0, 2.5, 1.5), "alpha_from": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    "critic_from": 0.03, "q_from": 0.05, "q_norm": False, "actor_lr": 1e-4,
}  # fmt: skip
ANTMAZE = {  # C24: T0 = 300k, 700k updates after it
    "alphas": (0.25, 0.1, 0.08), "alpha_from": (0.0, 2 / 7, 5 / 7), "critic_from": 3 / 70, "q_from": 5 / 70,
    "q_norm": False, "actor_lr": 3e-4, "reward_shift": -1.0, "flow_updates": 300_000, "num_updates": 700_000,
}  # fmt: skip
PUBLISHED = {  # what else the released code does, for any data
    "flow": "nice", "flow_hidden_sizes": (750, 750), "action_noise": 0.0, "normalize": False,
}  # fmt: skip
CPU = {
    "flow_updates": 20_000, "num_updates": 20_000, "eval_every": 2_000, "flow_lr": 3e-4, "disc_lr": 3e-4,
    "actor_lr": 3e-4,
}  # fmt: skip
ANTMAZE_LARGE = ANTMAZE | {  # C24 for the large mazes: T0 = 400k (or 500k), 600k updates after it
    "alpha_from": (0.0, 1 / 6, 4 / 6), "critic_from": 3 / 60, "q_from": 5 / 60,
    "flow_updates": 400_000, "num_updates": 600_000,
}  # fmt: skip
KINDS = ("medium", "medium-replay", "medium-expert")
MAZES = ("umaze", "umaze-diverse", "medium-play", "medium-diverse")
PRESETS = {"cpu": CPU, "published": PUBLISHED}
PRESETS |= {f"{robot}-{kind}-v2": MUJOCO for robot in ("halfcheetah", "hopper", "walker2d") for kind in KINDS}
PRESETS |= {f"antmaze-{maze}-v2": ANTMAZE for maze in MAZES}
PRESETS |= {f"antmaze-large-{kind}-v2": ANTMAZE_LARGE for kind in ("play", "diverse")}
QUICK = {
    "flow_updates": 5_000, "num_updates": 6_000, "chunk": 500, "eval_every": 1_000, "flow_hidden_sizes": (64, 64),
    "hidden_sizes": (64, 64), "flow_lr": 1e-3, "disc_lr": 1e-3, "actor_lr": 1e-3, "critic_lr": 1e-3,
}  # fmt: skip


# === data ===


class Transitions(NamedTuple):
    """What is learnt from; leading axes free, features last."""

    observations: jax.Array  # [.., S]
    actions: jax.Array  # [.., A]
    rewards: jax.Array  # [..]
    next_observations: jax.Array  # [.., S]
    terminals: jax.Array  # [..] 1.0 where the episode truly ended: stops bootstrapping, as no time limit does


class CpedData(NamedTuple):
    """The buffer in random order, observations standardised, some rows held out."""

    rows: Transitions  # [N]
    holdout: Transitions  # [H] rows that nothing learns from
    log_probs: jax.Array | None  # [H] log p(a | s) of the behaviour there, where the buffer has it and f is of it


def sample_batch(data, key, batch_size):
    """`batch_size` rows of the data, uniformly with replacement."""
    index = jax.random.randint(key, (batch_size,), 0, data.rewards.shape[0])
    return jax.tree.map(lambda x: x[index], data)


def cped_data(buffer, args):
    """Buffer -> CpedData, and mean, std [S] of all rows, which observations were standardised with."""
    observations = np.asarray(buffer["observations"])
    mean, std = np.zeros(observations.shape[1], np.float32), np.ones(observations.shape[1], np.float32)
    if args.normalize:  # D4
        mean = observations.mean(0, np.float64).astype(np.float32)
        std = observations.std(0, np.float64).astype(np.float32) + np.float32(1e-3)
    columns = [np.asarray(buffer[name], np.float32) for name in Transitions._fields]
    rows = Transitions(*columns)
    rows = rows._replace(
        observations=(rows.observations - mean) / std,
        next_observations=(rows.next_observations - mean) / std,
        rewards=rows.rewards + np.float32(args.reward_shift),
    )
    known = buffer.arrays.get("action_log_probs") if args.flow == "cond" else None
    order = np.random.default_rng(0).permutation(len(buffer))  # one split for all seeds
    held, kept = np.split(order, [min(args.holdout_rows, len(buffer) // 10)])
    take = lambda index: jax.tree.map(lambda x: jnp.asarray(x[index]), rows)
    return CpedData(take(kept), take(held), None if known is None else jnp.asarray(known[held])), mean, std


# === networks ===


class MLP(nn.Module):
    """Fully connected layers of the given widths, ReLU between them, Xavier-uniform weights, zero biases."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for width in self.widths[:-1]:
            x = nn.relu(nn.Dense(width, kernel_init=nn.initializers.xavier_uniform())(x))
        return nn.Dense(self.widths[-1], kernel_init=nn.initializers.xavier_uniform())(x)


class Critics(nn.Module):
    """`num` independent Q networks on (s, a): [num, ..]."""

    hidden_sizes: tuple[int, ...]
    num: int = 2

    @nn.compact
    def __call__(self, observations, actions):
        x = jnp.concatenate([observations, actions], -1)
        return jnp.stack([MLP((*self.hidden_sizes, 1))(x)[..., 0] for _ in range(self.num)])


def polyak(target, online, tau):
    """target <- (1 - tau) target + tau online, leaf by leaf."""
    return jax.tree.map(lambda t, o: (1 - tau) * t + tau * o, target, online)


def act(actor, observations, args, action_size):
    """pi(s) = tanh(MLP(s)): [.., S] -> [.., A]."""
    return jnp.tanh(MLP((*args.hidden_sizes, action_size)).apply(actor, observations))


def uniform_dense(key, fan_in, fan_out, bound, bias):
    """A layer's weights, uniform within the bound, and its constant bias."""
    return {
        "w": jax.random.uniform(key, (fan_in, fan_out), minval=-bound, maxval=bound),
        "b": jnp.full(fan_out, bias, jnp.float32),
    }


def cond_init(key, actions, num_obs, args):
    """Conditional affine flow, which starts as a whitening of the data's actions [N, A]."""
    size = actions.shape[-1]
    net, x = MLP((*args.flow_hidden_sizes, 2 * size)), jnp.zeros(size + num_obs)
    layers = jax.vmap(lambda key: net.init(key, x))(jax.random.split(key, args.flow_layers))
    last = layers["params"][f"Dense_{len(args.flow_hidden_sizes)}"]
    last["kernel"] = 0.01 * last["kernel"]
    std = jnp.sqrt(actions.std(0) ** 2 + args.action_noise**2 + 1e-6)
    return {"layers": layers, "shift": actions.mean(0), "log_scale": -jnp.log(std)}


def coupling(flow, i, x, observations, args):
    """Layer i's log scale and shift [.., A] for the coordinates that it moves; 0 for those it reads.

    log scale = cap tanh(raw / cap); layer i reads the coordinates j of even i + j, and all of s.
    """
    size = x.shape[-1]
    reads = (jnp.arange(size) + i) % 2 == 0
    layer = jax.tree.map(lambda p: p[i], flow["layers"])
    inputs = jnp.concatenate([jnp.where(reads, x, 0.0), observations], -1)
    raw, shift = jnp.split(MLP((*args.flow_hidden_sizes, 2 * size)).apply(layer, inputs), 2, -1)
    log_scale = args.log_scale_cap * jnp.tanh(raw / args.log_scale_cap)
    return jnp.where(reads, 0.0, log_scale), jnp.where(reads, 0.0, shift)


def cond_forward(flow, observations, actions, args):
    """z = f(a; s) and log |det df/da|: x <- x exp(log scale) + shift, layer by layer -> [.., A], [..]."""
    x = (actions - flow["shift"]) * jnp.exp(flow["log_scale"])
    logdet = jnp.sum(flow["log_scale"])
    for i in range(args.flow_layers):
        log_scale, shift = coupling(flow, i, x, observations, args)
        x, logdet = x * jnp.exp(log_scale) + shift, logdet + log_scale.sum(-1)
    return x, logdet


def cond_inverse(flow, observations, z, args):
    """a = f^-1(z; s), the same steps backwards -> s, a."""
    x = z
    for i in reversed(range(args.flow_layers)):
        log_scale, shift = coupling(flow, i, x, observations, args)
        x = (x - shift) * jnp.exp(-log_scale)
    return observations, x * jnp.exp(-flow["log_scale"]) + flow["shift"]


def nice_init(key, num_inputs, args):
    """NICE on x = (s, a), which starts close to the identity."""
    low, layers = num_inputs // 2, []
    for i, key_layer in enumerate(jax.random.split(key, args.flow_layers)):
        ends = (low, num_inputs - low) if i % 2 == 0 else (num_inputs - low, low)
        widths = (ends[0], *args.flow_hidden_sizes, ends[1])
        keys = jax.random.split(key_layer, len(widths) - 1)
        layers.append([uniform_dense(k, *sizes, 0.01, 0.0) for k, *sizes in zip(keys, widths, widths[1:])])  # noqa: B905
    return {"layers": layers, "log_scale": jnp.zeros(num_inputs)}


def nice_shift(layer, x):
    """Fully connected, leaky ReLU after every layer, the last one too (codes)."""
    for dense in layer:
        x = nn.leaky_relu(x @ dense["w"] + dense["b"])
    return x


def nice_forward(flow, observations, actions):
    """z = f(s, a) and log |det df/dx|, one number for all x: the halves move each other in turn."""
    x = jnp.concatenate([observations, actions], -1)
    a, b = jnp.split(x, [x.shape[-1] // 2], -1)
    for i, layer in enumerate(flow["layers"]):
        a, b = (a, b + nice_shift(layer, a)) if i % 2 == 0 else (a + nice_shift(layer, b), b)
    return jnp.concatenate([a, b], -1) * jnp.exp(flow["log_scale"]), jnp.sum(flow["log_scale"])


def nice_inverse(flow, z, num_obs):
    """(s, a) = f^-1(z): first the scale, then the halves backwards -> s, a."""
    x = z * jnp.exp(-flow["log_scale"])  # D2
    a, b = jnp.split(x, [x.shape[-1] // 2], -1)
    for i, layer in reversed(list(enumerate(flow["layers"]))):
        a, b = (a, b - nice_shift(layer, a)) if i % 2 == 0 else (a - nice_shift(layer, b), b)
    return jnp.split(jnp.concatenate([a, b], -1), [num_obs], -1)


def prior_log_prob(z, prior):
    """Sum over coordinates of log p(z): logistic z - 2 softplus(z), or standard normal."""
    if prior == "logistic":
        return jnp.sum(z - 2.0 * nn.softplus(z), -1)
    return jnp.sum(-0.5 * z**2 - 0.5 * jnp.log(2 * jnp.pi), -1)


def flow_forward(flow, observations, actions, args):
    """z = f(a; s), or f(s, a) for nice, and log |det df|."""  # D1
    if args.flow == "cond":
        return cond_forward(flow, observations, actions, args)
    return nice_forward(flow, observations, actions)


def flow_inverse(flow, observations, z, args):
    """f^-1: s as given and a = f^-1(z; s), or both from z for nice -> s, a."""
    if args.flow == "cond":
        return cond_inverse(flow, observations, z, args)
    return nice_inverse(flow, z, observations.shape[-1])


def flow_nll(flow, observations, actions, args):
    """-log p(a | s) [..], or -log p(s, a) for nice: -(log prior(z) + log |det df|)."""
    z, logdet = flow_forward(flow, observations, actions, args)
    return -(prior_log_prob(z, args.prior) + logdet)


def flow_sample(flow, observations, action_size, key, args):
    """The generator: fake x = (s, f^-1(z; s)), or f^-1(z) for nice, z ~ prior -> [B, S + A]."""
    draw = jax.random.logistic if args.prior == "logistic" else jax.random.normal
    size = action_size + (observations.shape[-1] if args.flow == "nice" else 0)
    z = draw(key, (*observations.shape[:-1], size))
    return jnp.concatenate(flow_inverse(flow, observations, z, args), -1)


def disc_init(key, num_inputs):
    """Discriminator d -> 2 d -> 4 d -> d outputs, of which the mean counts (C24)."""
    widths = (num_inputs, 2 * num_inputs, 4 * num_inputs)
    keys = jax.random.split(key, 4)
    layers = [uniform_dense(keys[i], widths[i], widths[i + 1], widths[i + 1] ** -0.5, 0.1) for i in range(2)]
    layers = [layer | {"centre": jnp.zeros_like(layer["b"])} for layer in layers]
    last = uniform_dense(keys[2], widths[2], num_inputs, 3e-3, 0.0)
    last["b"] = jax.random.uniform(keys[3], (num_inputs,), minval=-3e-3, maxval=3e-3)
    return [*layers, last]


def disc_apply(disc, x):
    """D(x) [.., d]: layer norm without gain, then leaky ReLU, after each hidden layer."""
    for layer in disc[:-1]:
        x = x @ layer["w"] + layer["b"]
        x = (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True, ddof=1) + 1e-6) + layer["centre"]
        x = nn.leaky_relu(x)
    return x @ disc[-1]["w"] + disc[-1]["b"]


# === losses ===


def gradient_penalty(disc, real, fake, mix):
    """mean_B (||grad_x sum_d D(x~)||_2 - 1)^2,  x~ = mix real + (1 - mix) fake; mix [B, 1] -> scalar."""
    x = mix * real + (1 - mix) * fake
    grads = jax.grad(lambda x: disc_apply(disc, x).sum())(x)  # rows do not meet in D: one gradient each
    return jnp.mean((jnp.linalg.norm(grads, axis=-1) - 1.0) ** 2)


def wgan_loss(disc, real, fake, mix, gp_weight):
    """Line (1): mean D(fake) - mean D(real) + gp_weight * penalty; real, fake [B, S + A] -> scalar, metrics."""
    values = disc_apply(disc, jnp.concatenate([fake, real])).reshape(2, *fake.shape)
    gap, penalty = values[1].mean() - values[0].mean(), gradient_penalty(disc, real, fake, mix)
    return gp_weight * penalty - gap, {"flow/disc_gap": gap, "flow/gradient_penalty": penalty}


def cped_disc_loss(disc, flow, batch, key, args):
    """Line (1) on a batch, with fresh fakes -> scalar, metrics."""
    key_fake, key_mix = jax.random.split(key)
    real = jnp.concatenate([batch.observations, batch.actions], -1)
    fake = flow_sample(flow, batch.observations, batch.actions.shape[-1], key_fake, args)
    mix = jax.random.uniform(key_mix, (len(real), 1))  # D3
    return wgan_loss(disc, real, jax.lax.stop_gradient(fake), mix, args.gp_weight)


def cped_flow_loss(flow, disc, batch, key, args):
    """Line (2): nll_weight * mean -log p(a + noise | s) - adv_weight * mean D(s, a^) -> scalar, metrics."""
    key_noise, key_fake = jax.random.split(key)
    noise = args.action_noise * jax.random.normal(key_noise, batch.actions.shape)  # D5
    loss, metrics = 0.0, {}
    if args.nll_weight:
        nll = flow_nll(flow, batch.observations, batch.actions + noise, args).mean()
        loss, metrics = args.nll_weight * nll, {"flow/nll": nll}
    if args.adv_weight:
        fake = flow_sample(flow, batch.observations, batch.actions.shape[-1], key_fake, args)
        adv = -disc_apply(disc, fake).mean()
        loss, metrics = loss + args.adv_weight * adv, metrics | {"flow/adversarial": adv}
    return loss, metrics


def smoothed_action(actions, noise, clip):
    """a~ = pi'(s') + clipped noise, within [-1, 1]; [B, A]."""
    return jnp.clip(actions + jnp.clip(noise, -clip, clip), -1.0, 1.0)  # D7


def td_target(batch, next_q, gamma):
    """y = r + gamma (1 - terminal) min_i Q_i'(s', a~) [B]; next_q [2, B]; no gradient."""
    return jax.lax.stop_gradient(batch.rewards + gamma * (1 - batch.terminals) * next_q.min(0))


def cped_critic_loss(critic, target_critic, target_actor, batch, key, args):
    """Line (3): sum_i mean_B (Q_i(s, a) - y)^2 -> scalar, metrics."""
    next_actions = act(target_actor, batch.next_observations, args, batch.actions.shape[-1])
    noise = args.target_noise * jax.random.normal(key, next_actions.shape)
    next_actions = smoothed_action(next_actions, noise, args.target_noise_clip)
    critics = Critics(args.hidden_sizes)
    y = td_target(batch, critics.apply(target_critic, batch.next_observations, next_actions), args.gamma)
    q = critics.apply(critic, batch.observations, batch.actions)
    chex.assert_equal_shape([q[0], y])
    loss = jnp.sum(jnp.mean((q - y) ** 2, -1))
    return loss, {"train/critic_loss": loss, "train/q": q.mean(), "train/target": y.mean()}


def lagrangian(q, nll, alpha, eps, args):
    """Line (4): -mean q + alpha mean nll, with hinge -mean q + alpha mean max(nll - eps, 0); q, nll [B]."""
    if args.q_norm:
        q = q / jax.lax.stop_gradient(jnp.abs(q).mean() + 1e-6)  # D10
    cost = jnp.maximum(nll - eps, 0.0) if args.constraint == "hinge" else nll  # D8
    return alpha * cost.mean() - q.mean()


def cped_actor_loss(actor, critic, flow, alpha, eps, with_q, batch, args):
    """Line (4): with_q in {0, 1} is 0 while the actor only clones -> scalar, metrics."""
    actions = act(actor, batch.observations, args, batch.actions.shape[-1])
    nll = flow_nll(flow, batch.observations, actions, args)
    if args.bc_only:
        return nll.mean(), {"train/nll_pi": nll.mean(), "train/actor_loss": nll.mean()}
    q = Critics(args.hidden_sizes).apply(critic, batch.observations, actions).min(0)
    loss = lagrangian(with_q * q, nll, alpha, eps, args)
    metrics = {"train/actor_loss": loss, "train/nll_pi": nll.mean(), "train/q_pi": q.mean(), "train/alpha": alpha}
    return loss, metrics


def cped_alpha_loss(log_alpha, nll, eps):
    """-log alpha (nll - eps): dual ascent, alpha grows while the policy's mean nll is above eps."""  # D8
    return -log_alpha * jax.lax.stop_gradient(nll - eps)


# === update ===


class CpedNets(NamedTuple):
    """Parameters and optimiser states of one seed, or of several with a leading axis."""

    flow: Any
    disc: Any
    actor: Any
    critic: Any
    target_actor: Any
    target_critic: Any
    log_alpha: jax.Array  # of the dual form
    flow_opt: Any
    disc_opt: Any
    actor_opt: Any
    critic_opt: Any
    alpha_opt: Any


def cped_optimisers(args):
    """Adam of flow, D, actor, critics and log alpha; the critics' rate is 0 until critic_from."""
    start = round(args.critic_from * args.num_updates)
    critic_lr = lambda count: jnp.where(count < start, 0.0, args.critic_lr)
    flow = optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.adam(args.flow_lr))  # D6
    return flow, *map(optax.adam, (args.disc_lr, args.actor_lr, critic_lr, args.alpha_lr))


def alpha_at(step, args):
    """The table's alpha at an update: the last of those that have begun."""  # D8
    starts = jnp.array([round(share * args.num_updates) for share in args.alpha_from])
    return jnp.array(args.alphas)[jnp.sum(step >= starts) - 1]


def cped_step(optimiser, grads, opt, params):
    """One step down the gradient, which counts as 0 where any of it is not finite -> params, optimiser state."""
    finite = jnp.isfinite(optax.tree.norm(grads))  # D11
    change, opt = optimiser.update(jax.tree.map(lambda g: jnp.where(finite, g, 0.0), grads), opt)
    return optax.apply_updates(params, change), opt


def cped_flow_update(nets, rows, key, args):
    """Lines (1), (2) -> nets, metrics."""
    key_disc, key_batch, key_loss = jax.random.split(key, 3)
    flow_adam, disc_adam, *_ = cped_optimisers(args)

    def disc_step(carry, key):
        key_batch, key_loss = jax.random.split(key)
        batch = sample_batch(rows, key_batch, args.batch_size)
        grads, metrics = jax.grad(cped_disc_loss, has_aux=True)(carry[0], nets.flow, batch, key_loss, args)
        return cped_step(disc_adam, grads, carry[1], carry[0]), metrics

    metrics = {}
    if args.adv_weight:
        keys = jax.random.split(key_disc, args.disc_ratio)
        (disc, disc_opt), metrics = jax.lax.scan(disc_step, (nets.disc, nets.disc_opt), keys)
        nets = nets._replace(disc=disc, disc_opt=disc_opt)

    batch = sample_batch(rows, key_batch, args.batch_size)
    grads, flow_metrics = jax.grad(cped_flow_loss, has_aux=True)(nets.flow, nets.disc, batch, key_loss, args)
    flow, flow_opt = cped_step(flow_adam, grads, nets.flow_opt, nets.flow)
    return nets._replace(flow=flow, flow_opt=flow_opt), jax.tree.map(jnp.mean, metrics) | flow_metrics


def cped_update(nets, rows, eps, step, key, args):
    """Lines (3) to (5); `step` counts critic steps before these -> nets, metrics."""
    key_critic, key_actor, key_flow = jax.random.split(key, 3)
    _, _, actor_adam, critic_adam, alpha_adam = cped_optimisers(args)

    def critic_step(carry, key):
        key_batch, key_noise = jax.random.split(key)
        batch = sample_batch(rows, key_batch, args.batch_size)
        grads, metrics = jax.grad(cped_critic_loss, has_aux=True)(
            carry[0], nets.target_critic, nets.target_actor, batch, key_noise, args
        )
        return cped_step(critic_adam, grads, carry[1], carry[0]), metrics

    metrics = {}
    if not args.bc_only:
        keys = jax.random.split(key_critic, args.policy_delay)
        (critic, critic_opt), metrics = jax.lax.scan(critic_step, (nets.critic, nets.critic_opt), keys)
        nets = nets._replace(critic=critic, critic_opt=critic_opt)

    batch = sample_batch(rows, key_actor, args.batch_size)
    alpha = jnp.exp(nets.log_alpha) if args.constraint == "dual" else alpha_at(step, args)
    with_q = jnp.float32(step >= round(args.q_from * args.num_updates))
    grads, actor_metrics = jax.grad(cped_actor_loss, has_aux=True)(
        nets.actor, nets.critic, nets.flow, alpha, eps, with_q, batch, args
    )
    actor, actor_opt = cped_step(actor_adam, grads, nets.actor_opt, nets.actor)
    nets = nets._replace(actor=actor, actor_opt=actor_opt)
    if args.constraint == "dual":
        grad = jax.grad(cped_alpha_loss)(nets.log_alpha, actor_metrics["train/nll_pi"], eps)
        log_alpha, alpha_opt = cped_step(alpha_adam, grad, nets.alpha_opt, nets.log_alpha)
        nets = nets._replace(log_alpha=jnp.clip(log_alpha, -7.0, 7.0), alpha_opt=alpha_opt)

    target_actor = polyak(nets.target_actor, nets.actor, args.tau)
    target_critic = polyak(nets.target_critic, nets.critic, args.tau)
    nets = nets._replace(target_actor=target_actor, target_critic=target_critic)
    metrics = jax.tree.map(jnp.mean, metrics) | actor_metrics
    if args.flow_in_rl:  # D9
        nets, flow_metrics = cped_flow_update(nets, rows, key_flow, args)
        metrics = metrics | flow_metrics
    return nets, metrics


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


def density_metrics(flow, data, args):
    """How well the flow fits: nll on 4096 training rows and on the held-out ones, without noise, and its round trip.

    Where the behaviour's density is known: kl = mean log p_true - log p, in nats, and the correlation of the
    two -> metrics, held-out log p [H].
    """
    seen, held = jax.tree.map(lambda x: x[:4096], data.rows), data.holdout
    log_p = -flow_nll(flow, held.observations, held.actions, args)
    nll = flow_nll(flow, seen.observations, seen.actions, args)
    back = flow_inverse(flow, held.observations, flow_forward(flow, held.observations, held.actions, args)[0], args)[1]
    metrics = {"flow/nll_data": nll.mean(), "flow/nll_holdout": -log_p.mean()}
    metrics["flow/round_trip"] = jnp.abs(back - held.actions).max()
    if data.log_probs is not None:
        metrics["flow/kl"] = jnp.mean(data.log_probs - log_p)
        metrics["flow/correlation"] = jnp.corrcoef(data.log_probs, log_p)[0, 1]
    return metrics, log_p


def evaluation_keys(args):
    """A key for each seed [S] that no split of the seed's key ever gives: the same starts at every evaluation."""
    seeds = args.seed + jnp.arange(args.num_seeds)
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 2**31))(seeds)


def make_evaluation(args, env, task, data_length, scale):
    """-> densities(state, data) -> metrics [S], held-out log p [S, H]; evaluation(state, key) -> metrics [S].

    scale: mean and std that the networks' observations were standardised with.
    """
    length = max(task.eval_length, data_length)

    def one(actor, key):
        policy = lambda actor, obs: act(actor, (obs - scale[0]) / scale[1], args, task.action_size)
        totals = evaluate(env, policy, actor, key, args.eval_episodes, length)
        returns = totals[:, task.eval_length - 1]
        metrics = {"eval/return": returns.mean(), "eval/return_std": returns.std()}
        metrics |= {"eval/return_data_length": totals[:, data_length - 1].mean()}
        if task.reference:
            metrics["eval/score"] = task.normalized_score(returns.mean())
        return metrics

    densities = lambda state, data: map_seeds(lambda flow: density_metrics(flow, data, args), state.nets.flow, args)
    evaluation = lambda state, keys: over_devices(jax.vmap(one), args)(state.nets.actor, keys)
    return jax.jit(densities), jax.jit(evaluation)


# === training ===


class CpedState(NamedTuple):
    """What a run needs to go on, in both phases; all leaves have a leading seed axis."""

    key: jax.Array
    num_updates: jax.Array  # iterations of the present phase
    nets: CpedNets


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


def cped_init(key, data, args):
    """Fresh networks of one seed; targets are copies -> CpedState."""  # D7, D12
    key, key_flow, key_disc, key_actor, key_critic = jax.random.split(key, 5)
    num_obs, size = data.rows.observations.shape[-1], data.rows.actions.shape[-1]
    obs, actions, log_alpha = jnp.zeros(num_obs), jnp.zeros(size), jnp.log(jnp.float32(args.alphas[0]))
    if args.flow == "cond":
        flow = cond_init(key_flow, data.rows.actions, num_obs, args)
    else:
        flow = nice_init(key_flow, num_obs + size, args)
    disc = disc_init(key_disc, num_obs + size)
    actor = MLP((*args.hidden_sizes, size)).init(key_actor, obs)
    critic = Critics(args.hidden_sizes).init(key_critic, obs, actions)
    params = flow, disc, actor, critic, log_alpha
    opts = [opt.init(p) for opt, p in zip(cped_optimisers(args), params, strict=True)]
    nets = CpedNets(*params[:4], *jax.tree.map(jnp.copy, (actor, critic)), log_alpha, *opts)
    return CpedState(key, jnp.int32(0), nets)


def finite_mean(x):
    """Mean over the chunk of what is finite."""
    return jnp.nanmean(jnp.where(jnp.isfinite(x), x, jnp.nan))


def make_train(args):
    """-> init(keys [S], data), flow_chunk(state, data), train_chunk(state, data) -> state, metrics [S]."""

    def one_flow_chunk(state, data):
        key, key_updates = jax.random.split(state.key)
        keys = jax.random.split(key_updates, args.chunk // args.disc_ratio)
        step = lambda nets, key: cped_flow_update(nets, data.rows, key, args)
        nets, metrics = jax.lax.scan(step, state.nets, keys)
        return CpedState(key, state.num_updates + args.chunk, nets), jax.tree.map(finite_mean, metrics)

    def one_train_chunk(state, data):
        key, key_updates = jax.random.split(state.key)
        keys = jax.random.split(key_updates, args.chunk // args.policy_delay)
        steps = state.num_updates + args.policy_delay * jnp.arange(len(keys))
        rows = jax.tree.map(lambda x: x[:4096], data.rows)
        nll = flow_nll(state.nets.flow, rows.observations, rows.actions, args)
        eps = jnp.quantile(nll, args.eps_quantile)
        step = lambda nets, xs: cped_update(nets, data.rows, eps, *xs, args)
        nets, metrics = jax.lax.scan(step, state.nets, (steps, keys))
        metrics = jax.tree.map(finite_mean, metrics) | {"train/nll_data": nll.mean(), "train/eps": eps}
        metrics["train/nll_data_p95"] = jnp.quantile(nll, 0.95)
        return CpedState(key, state.num_updates + args.chunk, nets), metrics

    init = lambda keys, data: map_seeds(lambda key: cped_init(key, data, args), keys, args)
    flow_chunk = lambda state, data: map_seeds(lambda state: one_flow_chunk(state, data), state, args)
    train_chunk = lambda state, data: map_seeds(lambda state: one_train_chunk(state, data), state, args)
    return jax.jit(init), jax.jit(flow_chunk, donate_argnums=0), jax.jit(train_chunk, donate_argnums=0)


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


def cped_preset(args):
    """--quick, or the values for the file's dataset with those of --preset on top -> name, {field: value}."""
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
    name = preset_name(data, PRESETS) if given in ("", "cpu", "published") else given
    known = PRESETS.get(name, MUJOCO if args.preset == "published" else {})
    about = f"as published for {name}" if name in PRESETS else "nothing is published for it"
    origin = f"{args.preset or 'by the file'} ({data}: {about})"
    return origin, known | PRESETS.get(given, {})


def check_args(args, num_rows):
    """Refuse what cannot work, before any long work starts."""
    positive = ("num_seeds", "chunk", "flow_updates", "num_updates", "eval_every", "eval_episodes", "batch_size")
    positive += ("disc_ratio", "policy_delay")
    chunk, starts = max(args.chunk, 1), args.alpha_from
    ordered = starts[:1] == (0.0,) and sorted(starts) == list(starts) and starts[-1] < 1
    rules = {
        **{f"--{name.replace('_', '-')} must be positive": getattr(args, name) > 0 for name in positive},
        "--chunk must be a multiple of --disc-ratio and of --policy-delay":
            chunk % max(args.disc_ratio, 1) == chunk % max(args.policy_delay, 1) == 0,
        "--chunk must divide --eval-every, --flow-updates and --num-updates":
            args.eval_every % chunk == args.flow_updates % chunk == args.num_updates % chunk == 0,
        "--alphas and --alpha-from must be as many, the shares rising from 0 to less than 1":
            len(args.alphas) == len(starts) and ordered,
        "--alphas must not be negative, and the first is positive with --constraint dual":
            min(args.alphas, default=0) >= 0 and (args.constraint != "dual" or args.alphas[0] > 0),
        "--nll-weight, --adv-weight: none may be negative, one must be positive":
            min(args.nll_weight, args.adv_weight) >= 0 and max(args.nll_weight, args.adv_weight) > 0,
        "--eps-quantile must lie between 0 and 1": 0 < args.eps_quantile < 1,
        "--critic-from, --q-from, --gamma and --tau must be within 0 and 1":
            all(0 <= x <= 1 for x in (args.critic_from, args.q_from, args.gamma, args.tau)),
        "--log-scale-cap and --max-grad-norm must be positive": min(args.log_scale_cap, args.max_grad_norm) > 0,
        "--flow-layers must be 2 or more, so that every coordinate is moved": args.flow_layers >= 2,
        "--holdout-rows must be positive": args.holdout_rows > 0,
        f"--dataset: {num_rows} rows are too few to hold any out": num_rows >= 20,
        f"--num-devices: 0 to {jax.local_device_count()}, the devices there are":
            0 <= args.num_devices <= jax.local_device_count(),
    }  # fmt: skip
    for message, holds in rules.items():
        if not holds:
            raise envs.InputError(message)


def announce(folder, args, task, env, num_rows, init, keys):
    """Print what will run and what it needs, before the rows are read; refuse where it does not fit."""
    sizes = (task.observation_size,), (task.action_size,), (), (task.observation_size,), ()
    rows = Transitions(*(jax.ShapeDtypeStruct((num_rows, *size), jnp.float32) for size in sizes))
    num_bytes = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    state = num_bytes(jax.eval_shape(init, keys, CpedData(rows, rows, None)).nets)
    need = 1e9 + 3 * state + 2 * num_bytes(rows)  # the process; old, new, gradient; rows and their copy
    files = 5 * state  # two of the first phase; state.npz, the one before, and the one being written
    disk = shutil.disk_usage(folder).free + sum(x.stat().st_size for x in folder.glob("**/state*.npz"))
    stats = jax.local_devices()[0].memory_stats() or {}
    have = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    print(
        f"{task.name} on {env.backend}: {args.num_seeds} seeds x ({args.flow_updates} iterations of the {args.flow} "
        f"flow, {args.num_updates} updates)\n{folder}: memory {need / 1e9:.2f} of {have / 1e9:.1f} GB, disk "
        f"{files / 1e9:.2f} of {disk / 1e9:.1f} GB free", flush=True,
    )  # fmt: skip
    if need > have or files > disk:
        raise envs.InputError(f"{folder}: memory or disk cannot hold the run; lower --num-seeds or the rows")


def log_seeds(logger, step, metrics, seeds, first_seed, rate=None):
    """One record for each of `seeds`, positions on the leading axis of every metric; prints the returns."""
    for s in seeds:
        record = {k: v[s] for k, v in metrics.items()} | ({"time/updates_per_s": rate} if rate else {})
        logger.log(int(step), record, seed=first_seed + int(s))
    if "eval/return" in metrics:
        print(f"  return at {step}:", *(f"{x:.2f}" for x in metrics["eval/return"]), flush=True)


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


def plot_density(path, folder, data, log_p):
    """density.png: the flow's fit, its density beside the true one where known, the policy's nll over the run."""
    lines, fits = [], curves.read(folder, "flow/nll_holdout")
    for i, (seed, (steps, values)) in enumerate(fits.items()):
        lines += [(steps, values, {"color": f"C{i}", "marker": "o", "ms": 3, "label": f"held-out rows, seed {seed}"})]
    if data.log_probs is not None:
        style = {"color": "k", "ls": "--", "lw": 1, "label": "true density"}
        lines += [(None, -float(data.log_probs.mean()), style)]
    panels = [{"title": "fit of the flow", "xlabel": "iterations", "ylabel": "mean -log p", "lines": lines}]
    if data.log_probs is not None:
        true, log_p = np.asarray(data.log_probs), np.asarray(log_p[0])
        ends = np.array([true.min(), true.max()])
        kl, correlation = np.mean(true - log_p), np.corrcoef(true, log_p)[0, 1]
        title = f"held-out (s, a), seed {min(fits)}: KL {kl:.2f} nats, correlation {correlation:.2f}"
        dots = (true, log_p, {"marker": ".", "ls": "", "ms": 3, "alpha": 0.4, "label": "a held-out row"})
        equal = (ends, ends, {"color": "k", "ls": "--", "lw": 1, "label": "equal"})
        panels += [{"title": title, "xlabel": "true log p", "ylabel": "learnt log p", "lines": [dots, equal]}]
    lines = []
    for name, color, label in (
        ("nll_pi", "C0", "policy"), ("nll_data", "k", "data, mean"), ("nll_data_p95", "C7", "data, 95 %"),
    ):  # fmt: skip
        seeds = list(curves.read(folder, f"train/{name}").values())
        values = np.stack([values for _, values in seeds], 1)
        lines += [(seeds[0][0], values, {"color": color, "label": label, "marker": "o", "ms": 3})]
    panels += [{"title": "policy against data", "xlabel": "updates", "ylabel": "-log p", "lines": lines}]
    curves.figure(path, panels)


def main(args):
    """Train the flow, then the policy, write policy and figures -> envs.curves.summary."""
    started = time.time()
    path = args.dataset or scripted.dataset(Path(args.out or f"runs/cped/point-angle-0/seed{args.seed}"))
    buffer, task = envs.buffers.load_task(path, None, args.task, args.max_rows)
    options = {k: v for k, v in task.options.items() if k in envs.task_options(task.name)}
    env = envs.make(task.name, None if args.backend == "auto" else args.backend, **options)
    check_args(args, len(buffer))
    env.check_batch(args.num_seeds * args.eval_episodes)
    args, folder = run_folder(args, "cped", task.name)
    init, flow_chunk, train_chunk = make_train(args)
    keys = jax.vmap(jax.random.key)(args.seed + jnp.arange(args.num_seeds))
    announce(folder, args, task, env, len(buffer), init, keys)
    data, *scale = cped_data(buffer, args)
    densities, evaluation = make_evaluation(args, env, task, buffer.metadata["episode_length"], scale)
    eval_keys = evaluation_keys(args)

    digests = [envs.buffers.sha256(buffer[k]) for k in ("observations", "actions", "rewards")]
    meta = {"identity": run_identity(args, data=digests), "log": 0}
    state, in_flow = None, not (args.resume and any(folder.glob("state*.npz")))
    if args.resume:
        like = jax.eval_shape(init, keys, data)
        state, meta = load_state(folder / "flow" if in_flow else folder, like, meta["identity"])
    logger = Logger(folder, args, meta["log"])
    save = lambda where, tree: save_state(where, tree, {**meta, "log": logger.file.tell()})
    if state is None:
        state = init(keys, data)
        save(folder / "flow", state)
    if in_flow:
        state = train_phase(
            "flow iteration", args.flow_updates, state, lambda state: flow_chunk(state, data),
            lambda state: densities(state, data)[0], ("flow/nll" if args.nll_weight else "flow/adversarial",),
            args, logger, lambda state: save(folder / "flow", state),
        )  # fmt: skip
        state = state._replace(num_updates=jnp.zeros_like(state.num_updates))
        save(folder, state)
    state = train_phase(
        "update", args.num_updates, state, lambda state: train_chunk(state, data),
        lambda state: evaluation(state, eval_keys), ("train/actor_loss", "train/nll_pi", "train/nll_data"),
        args, logger, lambda state: save(folder, state),
    )  # fmt: skip

    about = {"task": task.name, "observations": "task", "versions": envs.buffers.versions()}
    rows = {"mean": scale[0], "std": scale[1]}
    rows = {f"observation_{k}": jnp.tile(v, (args.num_seeds, 1)) for k, v in rows.items()}
    write_policy(folder / "policy.npz", "tanh_deterministic", {"actor": state.nets.actor, **rows}, about)
    curves.learning_curve(folder / "learning_curve.png", folder, task, buffer)
    plot_density(folder / "density.png", folder, data, densities(state, data)[1])
    result = curves.summary(folder, buffer)
    print(f"{folder}: policy.npz, learning_curve.png, density.png; {time.time() - started:.0f} s")
    return result


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end_at_once)
    try:
        arguments = parse_args(sys.argv[1:], cped_preset)
        if arguments.num_devices > 1:  # of the CPU; accelerators are what they are
            jax.config.update("jax_num_cpu_devices", arguments.num_devices)
        main(arguments)
    except (envs.InputError, OSError) as error:
        sys.exit(f"cped.py: error: {error}")
