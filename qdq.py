"""QDQ: learn the distribution of returns Q | s, a of the data, and shrink the bootstrap where it is wide.

Paper      Q-Distribution guided Q-learning for offline reinforcement learning: Uncertainty penalized Q-value
           via consistency model (Zhang et al., NeurIPS 2024), arXiv 2410.20312; equation numbers are its.
           "Code" below: the authors' repository at the last commit that still had all its parts.
Idea       Far from the data a critic's value is a guess, and the spread H of the return distribution is wide
           there too. The rows of a batch with the widest H at (s', a') bootstrap a little less than the others.

Algorithm  (1) data set: q = sum_m gamma^m r over a window of T steps, started at every k-th step     (Eq. 5)
           (2) teacher:  a denoiser D(x_t, t | s, a) of x = q scaled to [-1, 1]
           (3) student:  a consistency model f(x_t, t | s, a), distilled from one Heun step of D
           (4) spread:   H(s, a) = std of f(80 z, 80 | s, a), z ~ N(0, 1), in units of return         (Eq. 6)
           (5) target:   a' ~ target actor at s' with noise; U: the rows of the batch with H(s', a') above
                         its beta quantile; w = 1/H in U, else beta                                (Eq. 8)
                         y = r + gamma (1 - terminal) Qm (alpha + (1 - alpha) w),  Qm = min_i Qtar_i(s', a')
           (6) critics:  a step on sum_i <(Q_i(s, a) - y)^2>; of two, the first also does (7)
           (7) Polyak average of the critics; a step of the actor on -<min_i Q_i(s, mu(s))>
               - gamma_ent <log N(a; mu(s), std)> with the new critics (Eq. 9); Polyak average of the actor

Symbols    s observations [.., S] | a actions [.., A] | r rewards | c = [s, a] [.., C] | q windowed returns
           x scaled q | t noise level, s_ the next lower one | z normal noise | F raw output of a network
           D teacher | f student | H, h spread [B] | w weight [B] | U flagged rows, `ood` | y targets [B]
           alpha share of the optimistic target | beta level of the quantile | mu tanh mean | B batch
           T window | k window_step | gamma discount | tau Polyak rate | S also num_seeds, as a leading axis

Deviations
  D1  Eq. 5 counts m from the episode's start, ends a window k steps on and drops the reward of a terminal step;
      code: m from the window's start, T steps, all rewards; here: the code's.
  D2  Code: T = 200, k = 10; here: so for episodes of 1000 steps and on AntMaze, else T = length / 5, k = T / 20.
  D3  Paper: 80k and 160k steps for teacher and student, stored models: 800k and 1.6M; here: the latter.
  D4  Code never draws the level t = 80, where the samples are made; here: it is drawn.
  D5  Code starts student and target from two random networks; here: both from the teacher.
  D6  Eq. 6: std of n samples with n - 1; code: 50 samples with n; here: a Gauss-Hermite sum over the scalar z,
      --uncertainty mc for the code's.
  D7  Paper: U by the policy's actions; code: by the quantile of each batch of (s', a'); here: the code's.
  D8  Eq. 8 is not what the code does on AntMaze; here: the code's three weights, --weight.
  D9  1/H > beta, and any w < 1 where Qm < 0, turn the penalty into a bonus; code: so; here: so in the published
      presets, elsewhere w <= beta (--w-max) and the value falls by its magnitude (--sign-aware).
  D10 Paper: constant rate of the actor; code: cosine over num_updates counted in actor steps, which ends half
      way; here: the code's.
  D11 Code: raw states, raw Q beside the likelihood; here: so in the published presets, elsewhere standardised
      states (--normalize) and Q over its mean magnitude (--q-norm), so that gamma_ent has no unit.
  D12 Code: one student for the policies of all seeds; here: one each, --student to share one.
  D13 Paper, code: Q and likelihood from the start; here: so in the published presets, elsewhere the actor clones
      for the first tenth of the updates (--q-from), since the likelihood holds nothing while its std is wide.
  D14 Code: rows of a batch without replacement; here: with.
  D15 Paper and code differ in alpha, in beta and gamma_ent of some sets, and in layers and loss of AntMaze's actor
      (Eq. 9 in the paper, advantage-weighted in the code); here: the code's, PRESETS.
  D16 Code draws a' from the target actor's Gaussian wherever gamma_ent > 0; here: so in the published presets,
      elsewhere a' is around its mean (--sample-target).

Files      reads a buffer relabelled by udg_select.py (docs/buffer.md); writes runs/qdq/<task>/...: policy.npz
           (docs/policy.md), q_model.npz, log.jsonl, state.npz of the three phases, four figures
Run        python qdq.py --quick                          (point robot, under 2 minutes on 2 cores)
           python qdq.py --dataset runs/udg_select/ant-angle-60/top1.npz --preset cpu     (2 cores)
           python qdq.py --dataset runs/udg_select/ant-angle-60/top1.npz --num-seeds 5    (1M updates)
Expect     --quick: return 95 (data: mean -0.2, best 93.9), 68 s; ant-angle-60, top-1, 50k rows, seed 0, --preset cpu
           with 20k steps of teacher and student: 667 in 1000 steps, mean of the last 5 (cloning 231), 52 minutes;
           both on a CPU core that others shared; docs/qdq.md
"""

import contextlib
import dataclasses
import itertools
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
    """S: independent runs (student and policy) at once, a leading axis of all arrays"""
    num_devices: int = 0
    """devices that share the seeds; 0: all there are. On a CPU, 2 or more make that many out of its cores"""
    out: str = ""
    """run folder; empty: runs/qdq/<task>/seed<seed>"""
    resume: bool = False
    """go on from the folder's state.npz, exactly"""
    quick: bool = False
    """a small run on a scripted point-angle-0 buffer made on the spot, under 2 minutes"""
    track: bool = False
    """mirror the log to Weights & Biases (needs `pip install wandb`)"""
    backend: Literal["auto", "mujoco", "mjx"] = "auto"
    """physics of the evaluation: C MuJoCo (auto on a CPU) or MJX; ignored by the point worlds"""
    # --- budget ---
    teacher_updates: int = 800_000
    """gradient steps of the teacher (stored models: 800k, D3)"""
    student_updates: int = 1_600_000
    """gradient steps of the student (stored models: 1.6M, two sets 1M and 2M, D3)"""
    num_updates: int = 1_000_000
    """critic steps per seed; the actor steps in every policy_delay-th (code: 1M)"""
    chunk: int = 1_000
    """gradient steps in one jitted call, in each phase; a multiple of policy_delay; divides eval_every and totals"""
    eval_every: int = 5_000
    """gradient steps between two evaluations (code: 5,000)"""
    eval_episodes: int = 10
    """episodes of an evaluation (code: 10, AntMaze 100)"""
    # --- distribution of Q ---
    window: int = 0
    """T: steps of a windowed return; 0: 200 for episodes of 1000 steps, else a fifth of their length (code: 200; D2)"""
    window_step: int = 0
    """k: steps between two windows; 0: T / 20 (code: 10; D2)"""
    max_windows: int = 100
    """greatest number of windows of one episode (code: 100)"""
    min_entries: int = 5_000
    """fewer windows than these in all are refused: nothing can be learnt from them (ours)"""
    model_hidden_sizes: tuple[int, ...] = (256, 256, 256)
    """widths of teacher and student (code: 3 x 256)"""
    group_size: int = 8
    """features that a GroupNorm normalises together (code: 32 groups of 8)"""
    model_batch_size: int = 256
    """windows per step of teacher and student (code: 256)"""
    teacher_lr: float = 5e-4
    """Adam rate of the teacher, falling to 0 by a cosine (code: 5e-4)"""
    student_lr: float = 4e-4
    """RAdam rate of the student, falling to 0 by a cosine (code: 4e-4)"""
    num_levels: int = 1_000
    """noise levels of the distillation (code: 1,000)"""
    student_tau: float = 0.005
    """Polyak rate of the student's target (code: 0.005)"""
    student_tau_every: int = 5
    """steps of the student per step of its target (code: 5)"""
    student: str = ""
    """q_model.npz of an earlier run on this data: its one student for all seeds, or one each; none is trained (D12)"""
    # --- uncertainty ---
    uncertainty: Literal["gh", "mc"] = "gh"
    """gh: Gauss-Hermite sum over the student's noise; mc: samples, as the code (D6)"""
    nodes: int = 8
    """nodes of the sum (ours: 8 are within 5 % of the exact std)"""
    num_samples: int = 50
    """samples of mc (code: 50)"""
    alpha: float = 0.992
    """alpha: share of the optimistic target (code: 0.992 MuJoCo, 0.99 AntMaze; paper: 0.95 to 0.99; D15)"""
    beta: float = 0.9
    """beta: quantile above which a row is flagged, and weight of the others (code: 0.8 or 0.9 by dataset; D15)"""
    weight: Literal["mujoco", "antmaze", "antmaze-diverse"] = "mujoco"
    """w: 1/H if flagged, else beta; 1 + 0.1 (1 - 1/H), else 1; 1/H, else 1 (code; D8)"""
    w_max: bool = True
    """bound w by beta, so that a flagged row never bootstraps more than another (ours, D9)"""
    sign_aware: bool = True
    """where Qm < 0 lower the value by as much of its magnitude, instead of raising it (ours, D9)"""
    # --- actor-critic ---
    actor_loss: Literal["q", "awr"] = "q"
    """q: climb Q, with the likelihood term; awr: advantage-weighted likelihood (code: AntMaze but one)"""
    gamma_ent: float = 0.2
    """gamma_ent: weight of the likelihood of the data's actions (code: 0 to 2 by dataset, raw Q; D11)"""
    sample_target: bool = False
    """draw a' from the target actor's Gaussian, before the noise (code: wherever gamma_ent > 0; D16)"""
    q_from: float = 0.1
    """share of num_updates during which the actor of loss q only clones; with gamma_ent 0 it rests (ours, D13)"""
    q_norm: bool = True
    """divide Q by its mean magnitude in the actor's loss q (ours, D11)"""
    awr_temperature: float = 6.0
    """factor of the advantage in awr (code: 6)"""
    awr_samples: int = 30
    """samples of the target actor for V(s) in awr (code: 30)"""
    normalize: bool = True
    """standardise observations by the data's mean and std (ours, D11)"""
    hidden_sizes: tuple[int, ...] = (256, 256, 256)
    """widths of actor and critics (code: 3 x 256, AntMaze 2 x 256)"""
    layer_norm: bool = False
    """LayerNorm in the critics (code: antmaze-large)"""
    batch_size: int = 256
    """B: rows per update (code: 256)"""
    actor_lr: float = 3e-4
    """Adam rate of the actor at the start (code: 3e-4; D10)"""
    critic_lr: float = 3e-4
    """Adam rate of the critics (code: 3e-4)"""
    max_grad_norm: float = 10.0
    """the critics' gradient is scaled down to this norm (code: 10, AntMaze 7 and 3)"""
    gamma: float = 0.99
    """discount (code: 0.99)"""
    tau: float = 0.005
    """Polyak rate of critics and actor, once per actor step (code: 0.005)"""
    q_bound: float = 1e6
    """largest mean |Q| of a batch before the run stops as diverged; 0: go on, also where a loss is not finite (ours)"""
    policy_delay: int = 2
    """critic steps per actor step (code: 2)"""
    target_noise: float = 0.2
    """std of the noise on a' (code: 0.2)"""
    target_noise_clip: float = 0.5
    """its bound (code: 0.5)"""
    log_std_min: float = -5.0
    """lower clip of the actor's free log standard deviation (code: -5)"""
    log_std_max: float = 2.0
    """upper clip of the actor's free log standard deviation (code: 2)"""
    reward_shift: float = 0.0
    """added to every reward (code: -1 for AntMaze)"""


SIGMA_DATA, T_MIN, T_MAX, RHO = 0.5, 0.002, 80.0, 7.0  # noise levels (code)
FOURIER, TIME_WIDTH = 8, 32  # frequencies of the time embedding, and its width (code)
GENERAL = {"w_max": False, "sign_aware": False, "q_norm": False, "normalize": False, "q_from": 0.0}  # published
MUJOCO = {  # beta, gamma_ent                                                                    # D15
    "halfcheetah-medium-v2": (0.9, 0.0),
    "halfcheetah-medium-replay-v2": (0.9, 0.1),
    "halfcheetah-medium-expert-v2": (0.9, 2.0),
    "hopper-medium-v2": (0.8, 0.8),
    "hopper-medium-replay-v2": (0.8, 0.8),
    "hopper-medium-expert-v2": (0.8, 2.0),
    "walker2d-medium-v2": (0.8, 0.8),
    "walker2d-medium-replay-v2": (0.8, 0.8),
    "walker2d-medium-expert-v2": (0.8, 2.0),
}
ANTMAZE = {  # alpha, gamma_ent, weight, actor_loss, max_grad_norm, layer_norm                    # D15
    "antmaze-umaze-v0": (0.99, 0.0, "antmaze", "awr", 7.0, False),
    "antmaze-umaze-diverse-v0": (0.01, 1.5, "antmaze-diverse", "q", 7.0, False),
    "antmaze-medium-play-v0": (0.99, 0.0, "antmaze", "awr", 7.0, False),
    "antmaze-medium-diverse-v0": (0.99, 1.0, "antmaze", "awr", 7.0, False),
    "antmaze-large-play-v0": (0.99, 0.0, "antmaze", "awr", 7.0, True),
    "antmaze-large-diverse-v0": (0.99, 0.0, "antmaze", "awr", 3.0, True),
}
ANTMAZE_FIELDS = ("alpha", "gamma_ent", "weight", "actor_loss", "max_grad_norm", "layer_norm")
MAZE_RUN = {  # umaze's episodes have 700 steps, and the same windows                             # D2
    "hidden_sizes": (256, 256), "reward_shift": -1.0, "eval_every": 100_000, "eval_episodes": 100,
    "window": 200, "window_step": 10,
}  # fmt: skip
PRESETS = {
    name: GENERAL | {"beta": beta, "gamma_ent": weight, "sample_target": weight > 0}
    for name, (beta, weight) in MUJOCO.items()
}
PRESETS["halfcheetah-medium-replay-v2"]["student_updates"] = 1_000_000
PRESETS["walker2d-medium-expert-v2"]["student_updates"] = 2_000_000
PRESETS |= {
    name: GENERAL | MAZE_RUN | dict(zip(ANTMAZE_FIELDS, row, strict=True)) | {"sample_target": row[1] > 0}
    for name, row in ANTMAZE.items()
}
SHORT = {"num_levels": 18, "student_tau": 0.05}  # few steps do not carry 1,000 levels (docs/qdq.md)       # D3
PRESETS["cpu"] = SHORT | {
    "teacher_updates": 80_000, "student_updates": 160_000, "num_updates": 20_000, "chunk": 500, "eval_every": 2_000,
}  # fmt: skip
POSITIVE = (
    "num_seeds", "teacher_updates", "student_updates", "num_updates", "chunk", "eval_every", "eval_episodes",
    "max_windows", "group_size", "model_batch_size", "teacher_lr", "student_lr", "student_tau_every", "num_samples",
    "awr_samples", "batch_size", "actor_lr", "critic_lr", "max_grad_norm", "policy_delay",
)  # fmt: skip
SHOWN = ("train/q", "train/h", "train/penalty", "train/log_p", "train/distance")
QUICK = SHORT | {
    "teacher_updates": 4_000, "student_updates": 4_000, "num_updates": 6_000, "chunk": 500, "eval_every": 1_000,
    "model_hidden_sizes": (64, 64), "hidden_sizes": (64, 64), "actor_lr": 1e-3, "critic_lr": 1e-3, "batch_size": 128,
    "teacher_lr": 1e-3, "student_lr": 1e-3, "gamma_ent": 0.1,
}  # fmt: skip


# === data ===


class Transitions(NamedTuple):
    """What is learnt from; leading axes free, features last."""

    observations: jax.Array  # [.., S]
    actions: jax.Array  # [.., A]
    rewards: jax.Array  # [..]
    next_observations: jax.Array  # [.., S]
    terminals: jax.Array  # [..] 1.0 where the episode truly ended: stops bootstrapping, as no time limit does


class Entries(NamedTuple):
    """D_Q: what the distribution of Q is learnt from."""

    conditions: jax.Array  # [M, C] c = [s, a] at a window's start
    x: jax.Array  # [M] its return, scaled to [-1, 1]
    low: jax.Array  # [] Qmin
    high: jax.Array  # [] Qmax


def sample_batch(data, key, batch_size):
    """`batch_size` rows of the data, uniformly with replacement."""
    index = jax.random.randint(key, (batch_size,), 0, data.rewards.shape[0])
    return jax.tree.map(lambda x: x[index], data)


def window_sizes(args, episode_length):
    """-> T, k of the flags, or of the rule for this length of episodes."""
    window = args.window or (200 if episode_length == 1000 else max(episode_length // 5, 1))  # D2
    step = args.window_step or max(window // 20, 1)
    if step > window:
        raise envs.InputError(f"--window-step {step}: must be at most the window, {window} steps here; 0: a twentieth")
    return window, step


def windowed_returns(rewards, ends, gamma, window, step, cap):
    """Line (1), in float64: q_j = sum_{m < w} gamma^m r_{j+m}, w = T or what is left of the episode (Eq. 5).

    rewards [N]; ends [E] exclusive ends of the episodes. An episode of up to T steps has one window, at its
    start; a longer one starts windows every k steps until the first that its end cuts, `cap` at most.
    -> rows j [M], q [M], lengths w [M]
    """
    ends = np.asarray(ends, int)
    to_go, total = np.zeros(len(rewards) + 1), 0.0  # discounted return until the episode's end
    last = np.isin(np.arange(1, len(rewards) + 1), ends)
    for i in range(len(rewards) - 1, -1, -1):
        total = float(rewards[i]) + (0.0 if last[i] else gamma * total)  # D1
        to_go[i] = total
    rows, widths = [], []
    for begin, end in zip(np.append(0, ends[:-1]), ends, strict=True):
        num = 1 + min(cap - 1, max(0, -(-(end - begin - window) // step)))
        starts = begin + step * np.arange(num)
        rows.append(starts)
        widths.append(np.minimum(window, end - starts))
    rows, widths = np.concatenate(rows), np.concatenate(widths)
    after = rows + widths
    rest = np.where(np.isin(after, ends), 0.0, to_go[after])
    return rows, to_go[rows] - gamma**widths * rest, widths


def scaled(q, low, high):
    """[Qmin, Qmax] -> [-1, 1]; a constant q becomes -1."""
    return 2.0 * (q - low) / np.maximum(high - low, 1e-6) - 1.0


def unscaled(x, low, high):
    """[-1, 1] -> [Qmin, Qmax], and what lies outside accordingly."""
    return (x + 1.0) / 2.0 * (high - low) + low


def qdq_data(buffer, args):
    """Buffer -> Transitions [N], Entries [M], and mean, std [S] that observations are standardised with."""
    rows = Transitions(*(np.asarray(buffer[name], np.float32) for name in Transitions._fields))
    mean, std = np.zeros(rows.observations.shape[1], np.float32), np.ones(rows.observations.shape[1], np.float32)
    if args.normalize:  # D11
        mean, std = rows.observations.mean(0), rows.observations.std(0) + np.float32(1e-3)
    rows = rows._replace(
        observations=(rows.observations - mean) / std,
        actions=np.clip(rows.actions, -1 + 1e-5, 1 - 1e-5),
        next_observations=(rows.next_observations - mean) / std,
        rewards=rows.rewards + np.float32(args.reward_shift),
    )
    sizes = window_sizes(args, buffer.metadata["episode_length"])
    starts, q, _ = windowed_returns(rows.rewards, buffer["episode_ends"], args.gamma, *sizes, args.max_windows)
    conditions = np.concatenate([rows.observations, rows.actions], -1)[starts]
    limits = np.float32(q.min()), np.float32(q.max())
    entries = Entries(conditions, scaled(q, q.min(), q.max()).astype(np.float32), *limits)
    return jax.tree.map(jnp.asarray, rows), jax.tree.map(jnp.asarray, entries), (mean, std)


# === networks ===


def mish(x):
    """x tanh(softplus(x)) with one exponential: with u = e^x and n = u (u + 2) it is x n / (n + 2)."""
    u = jnp.exp(jnp.minimum(x, 20.0))
    n = u * (u + 2.0)
    return x * n / (n + 2.0)


class Layers(NamedTuple):
    """Fully connected layers, or those of an ensemble on a leading axis."""

    weights: tuple[jax.Array, ...]  # [.., in, out]
    biases: tuple[jax.Array, ...]  # [.., out]


def layers_init(key, widths, *members):
    """Xavier-uniform weights and zero biases; members: an ensemble's leading axis."""
    pairs = list(itertools.pairwise(widths))
    bound = lambda pair: (6.0 / sum(pair)) ** 0.5
    weights = tuple(
        jax.random.uniform(k, (*members, *pair), minval=-bound(pair), maxval=bound(pair))
        for k, pair in zip(jax.random.split(key, len(pairs)), pairs, strict=True)
    )
    return Layers(weights, tuple(jnp.zeros((*members, pair[1])) for pair in pairs))


class QNet(NamedTuple):
    """F(x, t | c): the network inside teacher and student."""

    fourier: jax.Array  # [8] frequencies, never trained
    time: Layers  # 16 sinusoids of t -> 32
    trunk: Layers  # [c, c_in x, time's output] -> hidden -> 1
    scales: tuple[jax.Array, ...]  # of the GroupNorms
    shifts: tuple[jax.Array, ...]


class QModel(NamedTuple):
    """The student, and the range of returns that its x stands for."""

    net: QNet
    low: jax.Array
    high: jax.Array


def q_net_init(key, num_conditions, args):
    """A fresh network; frequencies ~ N(0, 16^2)."""
    key_fourier, key_time, key_trunk = jax.random.split(key, 3)
    widths = (num_conditions + 1 + TIME_WIDTH, *args.model_hidden_sizes, 1)
    return QNet(
        16.0 * jax.random.normal(key_fourier, (FOURIER,)),
        layers_init(key_time, (2 * FOURIER, TIME_WIDTH, TIME_WIDTH)),
        layers_init(key_trunk, widths),
        tuple(jnp.ones(width) for width in args.model_hidden_sizes),
        tuple(jnp.zeros(width) for width in args.model_hidden_sizes),
    )


def group_norm(x, scale, shift, group_size):
    """Every `group_size` features of x [.., W] to mean 0 and variance 1, then times scale, plus shift."""
    groups = x.reshape(*x.shape[:-1], -1, group_size)
    groups = groups - groups.mean(-1, keepdims=True)
    groups = groups * jax.lax.rsqrt(jnp.square(groups).mean(-1, keepdims=True) + 1e-6)
    return groups.reshape(x.shape) * scale + shift


def time_embedding(net, t):
    """e(t) [.., 32] of noise levels t [..]: two layers on sin and cos of 2 pi W (ln t) / 4."""
    angles = 2 * jnp.pi * (0.25 * jnp.log(t))[..., None] * jax.lax.stop_gradient(net.fourier)
    e = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    for w, b in zip(*net.time, strict=True):
        e = nn.silu(e @ w + b)
    return e


def raw_output(net, c, x, t, args):
    """F(x, t | c) [..]: c [.., C], x and t [..], whose axes need only broadcast.

    The first layer is split into c W_c + c_in x w_x + e(t) W_e: c passes it once for all x, a scalar t once
    for all rows.
    """
    w_c, w_x, w_e = jnp.split(net.trunk.weights[0], (c.shape[-1], c.shape[-1] + 1))
    c_in = jax.lax.rsqrt(jnp.square(t) + SIGMA_DATA**2)
    hidden = c @ w_c + (c_in * x)[..., None] * w_x[0] + time_embedding(net, jnp.asarray(t)) @ w_e + net.trunk.biases[0]
    for i, (w, b) in enumerate(zip(net.trunk.weights[1:], net.trunk.biases[1:], strict=True)):
        hidden = nn.silu(group_norm(hidden, net.scales[i], net.shifts[i], args.group_size)) @ w + b
    return hidden[..., 0]


def denoiser(net, c, x, t, args):
    """D(x, t | c) = c_skip x + c_out F: the mean of x_0 given x at level t."""
    c_skip = SIGMA_DATA**2 / (t**2 + SIGMA_DATA**2)
    c_out = t * SIGMA_DATA / jnp.sqrt(t**2 + SIGMA_DATA**2)
    return c_skip * x + c_out * raw_output(net, c, x, t, args)


def consistency(net, c, x, t, args):
    """f(x, t | c) = c_skip x + c_out F: the end of the path through x at level t; f(x, T_MIN) = x."""
    c_skip = SIGMA_DATA**2 / ((t - T_MIN) ** 2 + SIGMA_DATA**2)
    c_out = (t - T_MIN) * SIGMA_DATA / jnp.sqrt(t**2 + SIGMA_DATA**2)
    return c_skip * x + c_out * raw_output(net, c, x, t, args)


def noise_levels(num):
    """t_0 = 80 > ... > t_{num-1} = 0.002 [num], evenly spaced in t^(1/7)."""
    high, low = T_MAX ** (1 / RHO), T_MIN ** (1 / RHO)
    return (high + jnp.arange(num) / (num - 1) * (low - high)) ** RHO


def heun_step(denoise, x, t, s):
    """One step of dx/dt = (x - D(x, t)) / t from level t down to s, second order."""
    slope = (x - denoise(x, t)) / t
    guess = x + (s - t) * slope
    return x + (s - t) * 0.5 * (slope + (guess - denoise(guess, s)) / s)


def q_samples(model, c, z, args):
    """Returns f(80 z, 80 | c): c [.., C], noise z [.., K] -> [.., K], not clipped to the data's range."""
    x = consistency(model.net, c[..., None, :], T_MAX * z, T_MAX, args)
    return unscaled(x, model.low, model.high)


def q_moments(model, c, key, args):
    """Line (4): mean and H = std of the return given c [.., C] -> two [..]; z is scalar, so H is a 1-D integral."""
    if args.uncertainty == "gh":  # D6
        nodes, weights = np.polynomial.hermite_e.hermegauss(args.nodes)
        z, weights = jnp.asarray(nodes), jnp.asarray(weights / weights.sum())
    else:
        z = jax.random.normal(key, (*c.shape[:-1], args.num_samples))
        weights = jnp.full(args.num_samples, 1.0 / args.num_samples)
    q = q_samples(model, c, z, args)
    mean = q @ weights
    return mean, jnp.sqrt(jnp.square(q - mean[..., None]) @ weights)


class MLP(nn.Module):
    """Fully connected layers of the given widths, ReLU between them, Xavier-uniform weights, zero biases."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for width in self.widths[:-1]:
            x = nn.relu(nn.Dense(width, kernel_init=nn.initializers.xavier_uniform())(x))
        return nn.Dense(self.widths[-1], kernel_init=nn.initializers.xavier_uniform())(x)


class QdqCritics(nn.Module):
    """Two independent Q networks on (s, a), mish between their layers: [2, ..]."""

    hidden_sizes: tuple[int, ...]
    layer_norm: bool

    @nn.compact
    def __call__(self, observations, actions):
        dense = lambda width: nn.Dense(width, kernel_init=nn.initializers.xavier_uniform())
        values = []
        for _ in range(2):
            x = jnp.concatenate([observations, actions], -1)
            for width in self.hidden_sizes:
                x = dense(width)(x)
                x = mish(nn.LayerNorm()(x) if self.layer_norm else x)
            values.append(dense(1)(x)[..., 0])
        return jnp.stack(values)


class QdqActor(NamedTuple):
    """A Gaussian around tanh(MLP(s)); its std is one free vector for all states."""

    mean: Any  # parameters of the MLP
    log_std: jax.Array  # [A], before the clip


def actor_init(key, num_obs, num_actions, args):
    """Xavier-uniform layers, the last one orthogonal with gain sqrt 2; log std 0."""
    key_net, key_head = jax.random.split(key)
    params = MLP((*args.hidden_sizes, num_actions)).init(key_net, jnp.zeros(num_obs))
    head = params["params"][f"Dense_{len(args.hidden_sizes)}"]
    head["kernel"] = nn.initializers.orthogonal(2**0.5)(key_head, head["kernel"].shape)
    return QdqActor(params, jnp.zeros(num_actions))


def policy_mean(params, observations, args, num_actions):
    """mu(s) = tanh(MLP(s)) [.., A]."""
    return jnp.tanh(MLP((*args.hidden_sizes, num_actions)).apply(params, observations))


def clipped_log_std(actor, args):
    """log std [A] as it is used."""
    return jnp.clip(actor.log_std, args.log_std_min, args.log_std_max)


def polyak(target, online, tau):
    """target <- (1 - tau) target + tau online, leaf by leaf."""
    return jax.tree.map(lambda t, o: (1 - tau) * t + tau * o, target, online)


# === losses ===


def denoising_loss(teacher, c, x, z, t, args):
    """Line (2): mean_B (t^2 + sd^2) / (t sd)^2 (D(x + t z, t | c) - x)^2; x, z, t [B] -> scalar."""
    weight = (t**2 + SIGMA_DATA**2) / (t * SIGMA_DATA) ** 2
    return jnp.mean(weight * (denoiser(teacher, c, x + t * z, t, args) - x) ** 2)


def distillation_loss(student, target, teacher, c, x, z, levels, args):
    """Line (3): mean_B (f(x_t, t | c) - f_target(x_s, s | c))^2, levels t > s; x_s: a Heun step of the teacher.

    x, z [B], levels two [B] -> scalar; no gradient through target and teacher.
    """
    t, s = levels
    x_t = x + t * z
    x_s = heun_step(lambda x, t: denoiser(teacher, c, x, t, args), x_t, t, s)
    goal = jax.lax.stop_gradient(consistency(target, c, x_s, s, args))
    return jnp.mean((consistency(student, c, x_t, t, args) - goal) ** 2)


def teacher_loss(teacher, entries, key, args):
    """Line (2) on random windows, ln t ~ N(-1.2, 1.2^2) -> scalar."""
    key_batch, key_z, key_t = jax.random.split(key, 3)
    index = jax.random.randint(key_batch, (args.model_batch_size,), 0, len(entries.x))  # D14
    z = jax.random.normal(key_z, index.shape)
    t = jnp.exp(-1.2 + 1.2 * jax.random.normal(key_t, index.shape))
    return denoising_loss(teacher, entries.conditions[index], entries.x[index], z, t, args)


def student_loss(student, target, teacher, entries, key, args):
    """Line (3) on random windows and pairs of levels -> scalar."""
    key_batch, key_z, key_level = jax.random.split(key, 3)
    index = jax.random.randint(key_batch, (args.model_batch_size,), 0, len(entries.x))  # D14
    z = jax.random.normal(key_z, index.shape)
    i = jax.random.randint(key_level, index.shape, 0, args.num_levels - 1)  # D4
    levels = noise_levels(args.num_levels)
    pair = (levels[i], levels[i + 1])
    return distillation_loss(student, target, teacher, entries.conditions[index], entries.x[index], z, pair, args)


def bootstrap_weight(h, args):
    """Line (5): w [B] from H [B], and the flagged rows `ood` [B] (Eq. 8)."""
    ood = h > jnp.quantile(h, args.beta)  # D7
    inverse = 1.0 / jnp.maximum(h, 1e-6)
    flagged, other = {  # D8
        "mujoco": (inverse, args.beta),
        "antmaze": (1.0 + 0.1 * (1.0 - inverse), 1.0),
        "antmaze-diverse": (inverse, 1.0),
    }[args.weight]
    w = jnp.where(ood, flagged, other)
    return (jnp.minimum(w, args.beta) if args.w_max else w), ood  # D9


def mixed_target(batch, next_q, h, args):
    """Line (5): y = alpha y_H + (1 - alpha) y_L [B], y_H = r + gamma (1 - terminal) Qm, y_L the same with w Qm.

    One squared loss to y has the gradient of alpha (Q - y_H)^2 + (1 - alpha) (Q - y_L)^2.
    next_q [B]: Qm; h [B]: H at (s', a') -> y without gradient, metrics
    """
    w, ood = bootstrap_weight(h, args)
    factor = args.alpha + (1.0 - args.alpha) * w
    if args.sign_aware:
        factor = jnp.where(next_q < 0, 2.0 - factor, factor)  # D9
    go_on = args.gamma * (1.0 - batch.terminals)
    quantiles = jnp.quantile(h, jnp.array([0.1, 0.5, 0.9]))
    metrics = {
        "train/h": h.mean(), "train/h_p10": quantiles[0], "train/h_p50": quantiles[1], "train/h_p90": quantiles[2],
        "train/ood": ood.mean(), "train/w_above_1": jnp.mean(w > 1.0), "train/factor": factor.mean(),
        "train/penalty": jnp.mean(go_on * (1.0 - factor) * next_q), "train/q_negative": jnp.mean(next_q < 0),
    }  # fmt: skip
    return jax.lax.stop_gradient(batch.rewards + go_on * factor * next_q), metrics


def next_actions(actor, observations, key, args):
    """a' [B, A]: mu(s'), or a sample of the Gaussian around it; then clipped noise, within [-1, 1]."""
    key_sample, key_noise = jax.random.split(key)
    actions = policy_mean(actor.mean, observations, args, actor.log_std.shape[-1])
    if args.sample_target:  # D16
        actions += jnp.exp(clipped_log_std(actor, args)) * jax.random.normal(key_sample, actions.shape)
    noise = args.target_noise * jax.random.normal(key_noise, actions.shape)
    return jnp.clip(actions + jnp.clip(noise, -args.target_noise_clip, args.target_noise_clip), -1.0, 1.0)


def qdq_critic_loss(critic, target_critic, target_actor, model, batch, key, args):
    """Lines (4) to (6): sum_i mean_B (Q_i(s, a) - y)^2 -> scalar, metrics."""
    key_action, key_h = jax.random.split(key)
    actions = next_actions(target_actor, batch.next_observations, key_action, args)
    _, h = q_moments(model, jnp.concatenate([batch.next_observations, actions], -1), key_h, args)
    critics = QdqCritics(args.hidden_sizes, args.layer_norm)
    next_q = critics.apply(target_critic, batch.next_observations, actions).min(0)
    y, metrics = mixed_target(batch, next_q, h, args)
    q = critics.apply(critic, batch.observations, batch.actions)
    chex.assert_equal_shape([q[0], y])
    loss = jnp.sum(jnp.mean((q - y) ** 2, -1))
    return loss, metrics | {"train/critic_loss": loss, "train/q": q.mean(), "train/target": y.mean()}


def log_likelihood(actions, mean, log_std):
    """log N(a; mu, std) [B], the Gaussian in action space, not squashed."""
    noise = (actions - mean) * jnp.exp(-log_std)
    return jnp.sum(-0.5 * noise**2 - log_std - 0.5 * jnp.log(2 * jnp.pi), -1)


def climbing_loss(q, log_p, with_q, args):
    """Line (7): -with_q mean_B Q(s, mu(s)) - gamma_ent mean_B log N(a; mu(s), std); q [B] the lesser critic's.

    with_q in {0, 1} is 0 while the actor only clones; --q-norm divides Q by mean_B |Q|, without gradient.
    """
    if args.q_norm:
        q = q / jax.lax.stop_gradient(jnp.abs(q).mean() + 1e-6)  # D11
    return -with_q * q.mean() - args.gamma_ent * log_p.mean()  # D13


def awr_loss(q, value, log_p, args):
    """-mean_B min(exp(6 (Q(s, a) - V(s))), 100) log N(a; mu(s), std); no gradient through the weight."""
    weight = jnp.minimum(jnp.exp(args.awr_temperature * (q - value)), 100.0)
    return -jnp.mean(jax.lax.stop_gradient(weight) * log_p)


def qdq_actor_loss(actor, target_actor, critic, with_q, batch, key, args):
    """Line (7), with Q(s, mu(s)) or by advantages (--actor-loss) -> scalar, metrics."""
    critics = QdqCritics(args.hidden_sizes, args.layer_norm)
    mean = policy_mean(actor.mean, batch.observations, args, batch.actions.shape[-1])
    log_std = clipped_log_std(actor, args)
    log_p = log_likelihood(batch.actions, mean, log_std)
    if args.actor_loss == "awr":
        old = policy_mean(target_actor.mean, batch.observations, args, batch.actions.shape[-1])
        noise = jax.random.normal(key, (args.awr_samples, *old.shape))
        samples = old + jnp.exp(clipped_log_std(target_actor, args)) * noise
        observations = jnp.broadcast_to(batch.observations, (args.awr_samples, *batch.observations.shape))
        value = critics.apply(critic, observations, samples).min(0).mean(0)
        loss = awr_loss(critics.apply(critic, batch.observations, batch.actions).min(0), value, log_p, args)
    else:
        loss = climbing_loss(critics.apply(critic, batch.observations, mean).min(0), log_p, with_q, args)
    distance = jnp.abs(mean - batch.actions).mean()
    metrics = {"train/actor_loss": loss, "train/log_p": log_p.mean(), "train/log_std": log_std.mean()}
    return loss, metrics | {"train/distance": distance}


# === update ===


class QdqNets(NamedTuple):
    """Parameters and optimiser states of one seed's actor and critics, or of several with a leading axis."""

    actor: QdqActor
    critic: Any
    target_actor: QdqActor
    target_critic: Any
    actor_opt: Any
    critic_opt: Any


def qdq_optimisers(args):
    """Teacher: Adam; student: RAdam; both to 0 by a cosine. Actor: Adam, cosine. Critics: clipped Adam."""
    decay = optax.cosine_decay_schedule
    teacher = optax.adam(decay(args.teacher_lr, args.teacher_updates))
    student = optax.radam(decay(args.student_lr, args.student_updates))
    actor = optax.adam(decay(args.actor_lr, args.num_updates))  # D10
    critic = optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.adam(args.critic_lr))
    return teacher, student, actor, critic


def critic_update(nets, model, batch, key, args):
    """Lines (4) to (6) -> nets, metrics."""
    *_, clipped_adam = qdq_optimisers(args)
    grads, metrics = jax.grad(qdq_critic_loss, has_aux=True)(
        nets.critic, nets.target_critic, nets.target_actor, model, batch, key, args
    )
    step, critic_opt = clipped_adam.update(grads, nets.critic_opt)
    return nets._replace(critic=optax.apply_updates(nets.critic, step), critic_opt=critic_opt), metrics


def actor_update(nets, with_q, batch, key, args):
    """Line (7), with the critics after their step, on the same batch -> nets, metrics."""
    _, _, actor_adam, _ = qdq_optimisers(args)
    nets = nets._replace(target_critic=polyak(nets.target_critic, nets.critic, args.tau))
    grads, metrics = jax.grad(qdq_actor_loss, has_aux=True)(
        nets.actor, nets.target_actor, nets.critic, with_q, batch, key, args
    )
    step, actor_opt = actor_adam.update(grads, nets.actor_opt)
    actor = optax.apply_updates(nets.actor, step)
    target_actor = polyak(nets.target_actor, actor, args.tau)
    return nets._replace(actor=actor, actor_opt=actor_opt, target_actor=target_actor), metrics


def qdq_update(nets, model, data, step, key, args):
    """policy_delay critic steps, the first, number `step`, followed by an actor step -> nets, metrics."""
    key_first, key_actor, *keys = jax.random.split(key, args.policy_delay + 1)
    key_batch, key_loss = jax.random.split(key_first)
    batch = sample_batch(data, key_batch, args.batch_size)  # D14
    nets, metrics = critic_update(nets, model, batch, key_loss, args)
    with_q = jnp.float32(step >= round(args.q_from * args.num_updates))
    nets, actor_metrics = actor_update(nets, with_q, batch, key_actor, args)
    for key_batch, key_loss in map(jax.random.split, keys):
        batch = sample_batch(data, key_batch, args.batch_size)
        nets, _ = critic_update(nets, model, batch, key_loss, args)
    return nets, metrics | actor_metrics


def teacher_update(net, opt, entries, key, args):
    """Line (2): one Adam step -> net, optimiser state, loss."""
    loss, grads = jax.value_and_grad(teacher_loss)(net, entries, key, args)
    step, opt = qdq_optimisers(args)[0].update(grads, opt)
    return optax.apply_updates(net, step), opt, loss


def student_update(net, target, opt, step, teacher, entries, key, args):
    """Line (3): one RAdam step, and of every few one of the target -> net, target, optimiser state, loss."""
    loss, grads = jax.value_and_grad(student_loss)(net, target, teacher, entries, key, args)
    change, opt = qdq_optimisers(args)[1].update(grads, opt)
    net = optax.apply_updates(net, change)
    tau = jnp.where(step % args.student_tau_every == 0, args.student_tau, 0.0)
    return net, polyak(target, net, tau), opt, loss


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


def probe_actions(actions, key):
    """The data's actions [n, A], near ones (noise of 0.2) and far ones (uniform) -> [3, n, A]."""
    key_near, key_far = jax.random.split(key)
    near = jnp.clip(actions + 0.2 * jax.random.normal(key_near, actions.shape), -1.0, 1.0)
    return jnp.stack([actions, near, jax.random.uniform(key_far, actions.shape, minval=-1.0, maxval=1.0)])


def model_metrics(model, data, entries, key, args):
    """How the student fits D_Q, and H on the data's, near and far actions -> metrics."""
    key_rows, key_entries, key_probe, key_h = jax.random.split(key, 4)
    rows = sample_batch(data, key_rows, 1024)
    actions = probe_actions(rows.actions, key_probe)
    c = jnp.concatenate([jnp.broadcast_to(rows.observations, (3, *rows.observations.shape)), actions], -1)
    _, h = q_moments(model, c, key_h, args)
    index = jax.random.randint(key_entries, (1024,), 0, len(entries.x))
    mean, spread = q_moments(model, entries.conditions[index], key_h, args)
    q = unscaled(entries.x[index], model.low, model.high)
    medians = jnp.median(h, -1)
    metrics = {f"student/h_{name}": medians[i] for i, name in enumerate(("data", "near", "far"))}
    metrics["student/h_far_above_data"] = jnp.mean(h[2] > h[0])
    error = jnp.sqrt(jnp.mean((q - mean) ** 2))
    metrics |= {"student/error": error, "student/spread": jnp.sqrt(jnp.mean(spread**2)), "student/q_std": q.std()}
    return metrics


def evaluation_keys(args):
    """A key for each seed [S] that no split of the seed's key ever gives: the same starts at every evaluation."""
    seeds = args.seed + jnp.arange(args.num_seeds)
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 2**31))(seeds)


def make_evaluation(args, env, task, data_length, scale):
    """-> evaluation(actor [S], key), model_evaluation(model [S], data, entries, key) -> metrics, each [S].

    scale: mean and std that the networks' observations were standardised with.
    """
    length = max(task.eval_length, data_length)

    def one(actor, key):
        policy = lambda actor, obs: policy_mean(actor.mean, (obs - scale[0]) / scale[1], args, task.action_size)
        totals = evaluate(env, policy, actor, key, args.eval_episodes, length)
        returns = totals[:, task.eval_length - 1]
        metrics = {"eval/return": returns.mean(), "eval/return_std": returns.std()}
        metrics |= {"eval/return_data_length": totals[:, data_length - 1].mean()}
        if task.reference:
            metrics["eval/score"] = task.normalized_score(returns.mean())
        return metrics

    def of_model(model, data, entries, key):
        return map_seeds(lambda model: model_metrics(model, data, entries, key, args), model, args)

    return jax.jit(over_devices(jax.vmap(one), args)), jax.jit(of_model)


# === training ===


class TeacherState(NamedTuple):
    """What the fit of the teacher needs to go on; all leaves have a leading seed axis."""

    key: jax.Array
    num_updates: jax.Array
    net: QNet
    opt: Any


class StudentState(NamedTuple):
    """What the distillation needs to go on, beside its teacher; all leaves have a leading seed axis."""

    key: jax.Array
    num_updates: jax.Array
    net: QNet
    target: QNet
    opt: Any


class QdqState(NamedTuple):
    """What the policy's training needs to go on, beside its student; all leaves have a leading seed axis."""

    key: jax.Array
    num_updates: jax.Array
    nets: QdqNets


class Phase(NamedTuple):
    """init(keys [S], ..) -> state [S]; chunk(state, ..) -> state, metrics [S], means of the chunk."""

    init: Any
    chunk: Any


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


def make_train(args, num_obs, num_actions):
    """-> Phases: teacher (chunk: entries), student (init: teacher's net; chunk: it, entries), policy (model, data)."""

    def teacher_init(key):
        key, key_net = jax.random.split(key)
        net = q_net_init(key_net, num_obs + num_actions, args)
        return TeacherState(key, jnp.int32(0), net, qdq_optimisers(args)[0].init(net))

    def teacher_chunk(state, entries):
        key, key_updates = jax.random.split(state.key)

        def step(carry, key):
            net, opt, loss = teacher_update(*carry, entries, key, args)
            return (net, opt), loss

        (net, opt), loss = jax.lax.scan(step, (state.net, state.opt), jax.random.split(key_updates, args.chunk))
        return TeacherState(key, state.num_updates + args.chunk, net, opt), {"teacher/loss": loss.mean()}

    def student_init(key, teacher):
        copies = jax.tree.map(jnp.copy, (teacher, teacher))  # D5
        return StudentState(key, jnp.int32(0), *copies, qdq_optimisers(args)[1].init(teacher))

    def student_chunk(state, teacher, entries):
        key, key_updates = jax.random.split(state.key)

        def step(carry, xs):
            *carry, loss = student_update(*carry, xs[0], teacher, entries, xs[1], args)
            return tuple(carry), loss

        xs = state.num_updates + jnp.arange(args.chunk), jax.random.split(key_updates, args.chunk)
        carry, loss = jax.lax.scan(step, (state.net, state.target, state.opt), xs)
        return StudentState(key, state.num_updates + args.chunk, *carry), {"student/loss": loss.mean()}

    def policy_init(key):
        key, key_actor, key_critic = jax.random.split(key, 3)
        actor = actor_init(key_actor, num_obs, num_actions, args)
        critics = QdqCritics(args.hidden_sizes, args.layer_norm)
        critic = critics.init(key_critic, jnp.zeros(num_obs), jnp.zeros(num_actions))
        _, _, actor_adam, critic_adam = qdq_optimisers(args)
        copies = jax.tree.map(jnp.copy, (actor, critic))
        nets = QdqNets(actor, critic, *copies, actor_adam.init(actor), critic_adam.init(critic))
        return QdqState(key, jnp.int32(0), nets)

    def policy_chunk(state, model, data):
        key, key_updates = jax.random.split(state.key)
        keys = jax.random.split(key_updates, args.chunk // args.policy_delay)
        steps = state.num_updates + args.policy_delay * jnp.arange(len(keys))
        step = lambda nets, xs: qdq_update(nets, model, data, *xs, args)
        nets, metrics = jax.lax.scan(step, state.nets, (steps, keys))
        return QdqState(key, state.num_updates + args.chunk, nets), jax.tree.map(jnp.mean, metrics)

    teacher_chunks = lambda state, entries: map_seeds(lambda state: teacher_chunk(state, entries), state, args)
    student_chunks = lambda state, net, entries: map_seeds(lambda xs: student_chunk(*xs, entries), (state, net), args)
    policy_chunks = lambda state, model, data: map_seeds(lambda xs: policy_chunk(*xs, data), (state, model), args)
    phase = lambda init, chunk: Phase(jax.jit(over_devices(jax.vmap(init), args)), jax.jit(chunk, donate_argnums=0))
    return (
        phase(teacher_init, teacher_chunks), phase(student_init, student_chunks), phase(policy_init, policy_chunks),
    )  # fmt: skip


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


def qdq_preset(args):
    """--quick, or the published values of the file's dataset with those of --preset on top -> name, {field: value}."""
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
    name = preset_name(data, PRESETS) if given in ("", "cpu") else given
    about = f"as published for {name}" if name in PRESETS else "nothing is published for it"
    origin = f"{args.preset or 'by the file'} ({data}: {about})"
    return origin, PRESETS.get(name, {}) | PRESETS.get(given, {})


def check_args(args):
    """Refuse what cannot work, before any long work starts."""
    chunk = max(args.chunk, 1)
    totals = args.eval_every, args.teacher_updates, args.student_updates, args.num_updates
    not_negative = args.window, args.window_step, args.gamma_ent, args.target_noise, args.target_noise_clip
    rules = {f"--{name.replace('_', '-')} must be positive": getattr(args, name) > 0 for name in POSITIVE}
    rules |= {
        "--chunk must be a multiple of --policy-delay": chunk % max(args.policy_delay, 1) == 0,
        "--chunk must divide --eval-every, --teacher-updates, --student-updates and --num-updates":
            all(total % chunk == 0 for total in totals),
        "--hidden-sizes must be positive": min(args.hidden_sizes, default=1) > 0,
        "--model-hidden-sizes must be positive multiples of --group-size":
            all(width > 0 and width % max(args.group_size, 1) == 0 for width in args.model_hidden_sizes),
        "--alpha must lie between 0 and 1, --beta inside": 0 <= args.alpha <= 1 and 0 < args.beta < 1,
        "--gamma, --tau and --student-tau must be above 0 and at most 1":
            all(0 < x <= 1 for x in (args.gamma, args.tau, args.student_tau)),
        "--window, --window-step, --gamma-ent, --target-noise and --target-noise-clip must not be negative":
            min(not_negative) >= 0,
        "--log-std-min must be below --log-std-max": args.log_std_min < args.log_std_max,
        "--q-from must lie between 0 and 1": 0 <= args.q_from <= 1,
        "--nodes must be 2 or more": args.nodes >= 2,
        "--num-levels must be 3 or more": args.num_levels >= 3,
        "--w-max would undo --weight antmaze, whose w above 1 is the penalty; use --no-w-max --no-sign-aware":
            args.weight != "antmaze" or not (args.w_max or args.sign_aware),
        f"--num-devices: 0 to {jax.local_device_count()}, the devices there are":
            0 <= args.num_devices <= jax.local_device_count(),
    }  # fmt: skip
    for message, holds in rules.items():
        if not holds:
            raise envs.InputError(message)


def announce(folder, args, task, env, buffer, data, entries, states):
    """Print what will run, D_Q and what it needs; refuse too few entries, too little memory or disk.

    states: the phases' states [S], or their shapes.
    """
    size = lambda tree: 4 * sum(x.size for x in jax.tree.leaves(tree))
    window, step = window_sizes(args, buffer.metadata["episode_length"])
    samples = args.nodes if args.uncertainty == "gh" else args.num_samples
    passed = max(args.batch_size, 0 if args.student else 3 * 1024) * samples  # rows through a network at once
    if args.actor_loss == "awr":
        passed = max(passed, 2 * args.batch_size * args.awr_samples)
    passed *= 1 if jax.default_backend() == "cpu" else args.num_seeds
    widest = max(*args.hidden_sizes, *args.model_hidden_sizes, 1)
    need = 2 * (size(data) + size(entries)) + 3 * size(states) + 12 * passed * widest  # with copies and gradients
    written = 4 * size(states)  # newest, the one before, the one being written; policy.npz and q_model.npz
    disk = shutil.disk_usage(folder).free + sum(x.stat().st_size for x in folder.glob("**/state*.npz"))
    stats = jax.local_devices()[0].memory_stats() or {}
    have = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    print(
        f"{task.name} on {env.backend}: {args.num_seeds} seeds x ({args.teacher_updates} teacher, "
        f"{args.student_updates} student, {args.num_updates} policy updates)\nD_Q: {len(entries.x)} entries, windows "
        f"of {window} steps every {step}, Q from {float(entries.low):.2f} to {float(entries.high):.2f}\n{folder}: "
        f"memory {need / 1e9:.2f} of {have / 1e9:.1f} GB, disk {written / 1e9:.2f} of {disk / 1e9:.1f} GB free",
        flush=True,
    )  # fmt: skip
    if len(entries.x) < args.min_entries:
        raise envs.InputError(
            f"--dataset: D_Q has {len(entries.x)} entries of {args.min_entries} that --min-entries asks for; give "
            "more rows, lower --window and --window-step, or raise --max-windows"
        )
    if need > have or written > disk:
        raise envs.InputError(f"{folder}: memory or disk cannot hold the run; lower --num-seeds or give fewer rows")


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


def student_identity(args, buffer):
    """What a student belongs to: the data, and the flags behind D_Q and its network that shapes do not show."""
    flags = {k: getattr(args, k) for k in ("gamma", "max_windows", "reward_shift", "normalize", "group_size")}
    windows = list(window_sizes(args, buffer.metadata["episode_length"]))
    data = [envs.buffers.sha256(buffer[k]) for k in ("observations", "actions", "rewards")]
    return flags | {"windows": windows, "data": data}


def load_q_model(path, like, identity):
    """The q_model.npz of an earlier run, its only student for all seeds or one for each -> QModel [S], as `like`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        about = json.loads(str(arrays["metadata_json"]))
    except Exception as error:  # missing, torn or of another kind
        raise envs.InputError(f"--student {path}: cannot be read ({error})") from None
    for key, value in identity.items():
        if about.get(key) != value:
            change = f"{key} was {about.get(key)!r} and is now {value!r}"
            raise envs.InputError(f"--student {path}: {change}; name one of this data and flags")

    def restore(place, x):
        found = arrays.get(jax.tree_util.keystr(place, simple=True, separator="/"))
        if found is None or found.shape[1:] != x.shape[1:] or len(found) not in (1, len(x)):
            raise envs.InputError(f"--student {path}: another size or number of seeds; name one of this data and flags")
        return jnp.broadcast_to(jnp.asarray(found), x.shape)

    return jax.tree_util.tree_map_with_path(restore, like)


def resume_point(where, likes, identity):
    """The states of the phases that a run has reached, and the newest one's meta -> {phase: state}, meta."""
    reached = [name for name in likes if any(where[name].glob("state*.npz"))] or list(likes)[:1]
    found = {}
    for name in reached:
        found[name], meta = load_state(where[name], likes[name], identity)
    return found, meta


def fit_q_model(args, phases, keys, found, entries, evaluation, logger, save):
    """Lines (2), (3): the teachers, then the students of all seeds -> their networks [S].

    found: states to go on from; evaluation(net) -> metrics [S]; save(phase, state).
    """
    (teacher_init, teacher_chunk), (student_init, student_chunk) = phases
    if (teacher := found.get("teacher")) is None:
        teacher = teacher_init(keys[0])
        save("teacher", teacher)
    teacher = train_phase(
        "teacher step", args.teacher_updates, teacher, lambda state: teacher_chunk(state, entries),
        lambda state: {}, ("teacher/loss",), args, logger, lambda state: save("teacher", state),
    )  # fmt: skip
    if (student := found.get("student")) is None:
        student = student_init(keys[1], teacher.net)
        save("student", student)
    student = train_phase(
        "student step", args.student_updates, student, lambda state: student_chunk(state, teacher.net, entries),
        lambda state: evaluation(state.net), ("student/loss",), args, logger, lambda state: save("student", state),
    )  # fmt: skip
    return student.net


def row_distances(c, rows):
    """Distances of every c [n, C] to every row [N, C] -> [n, N]."""
    squares = (c**2).sum(1)[:, None] + (rows**2).sum(1) - 2 * c @ rows.T
    return np.sqrt(np.maximum(squares, 0.0))


def plot_uncertainty(path, model, data, key, args):
    """H of the first seed's student against the distance of (s, a) to the data, and along steps off its actions."""
    moments = jax.jit(lambda c: q_moments(model, c, key, args)[1])
    rows = np.concatenate([data.observations, data.actions], -1)
    rows = rows[np.random.default_rng(0).permutation(len(rows))[:20_000]]
    scale, num_obs = rows.std(0) + 1e-6, data.observations.shape[1]
    chosen, key_probe = rows[:300], jax.random.split(key)[0]
    lines, probes = [], probe_actions(chosen[:, num_obs:], key_probe)
    for i, (name, actions) in enumerate(zip(("data", "near", "far"), probes, strict=True)):
        c = np.concatenate([chosen[:, :num_obs], actions], -1)
        h = np.asarray(moments(c))
        away = np.zeros(len(c)) if name == "data" else row_distances(c / scale, rows / scale).min(1)
        label = f"{name}: median H {np.median(h):.3g}"
        lines += [(away, h, {"marker": ".", "ls": "", "ms": 4, "alpha": 0.6, "color": f"C{i}", "label": label})]
    panels = [{
        "title": f"seed {args.seed}: actions of the data, near (noise 0.2), far (uniform)", "ylabel": "H, in return",
        "xlabel": f"distance of (s, a) to the nearest of {len(rows):,} rows, in stds", "lines": lines,
    }]  # fmt: skip
    steps = np.linspace(0.0, 2.0, 21)
    turn = np.random.default_rng(1).normal(size=(len(chosen), rows.shape[1] - num_obs))
    turn /= np.linalg.norm(turn, axis=1, keepdims=True)
    moved = [np.concatenate([chosen[:, :num_obs], chosen[:, num_obs:] + d * turn], -1) for d in steps]
    h = np.stack([np.asarray(moments(c)) for c in moved])
    bands = np.quantile(h, [0.1, 0.9], axis=1).T
    lines = [(steps, np.median(h, 1), {"color": "C0", "marker": "o", "ms": 3, "label": "median over states"})]
    lines += [(steps, bands, {"color": "C0", "ls": ":", "lw": 1, "label": "10 % and 90 %"})]
    panels += [{
        "title": "from the data's action in a random direction", "ylabel": "H, in return",
        "xlabel": "length of the step, not clipped to [-1, 1]", "lines": lines,
    }]  # fmt: skip
    curves.figure(path, panels)


def plot_distributions(path, model, entries, key, args, num=4, neighbours=100):
    """The first student's returns at a few (s, a) of D_Q beside those of the nearest windows in the data."""
    c, x = np.asarray(entries.conditions), np.asarray(entries.x)
    q = unscaled(x, float(model.low), float(model.high))
    chosen = np.argsort(q)[(np.linspace(0.05, 0.95, num) * (len(q) - 1)).astype(int)]
    z = jax.random.normal(key, (num, 4_000))
    samples = np.asarray(q_samples(model, jnp.asarray(c[chosen]), z, args))
    scale = c.std(0) + 1e-6
    order = np.argsort(row_distances(c[chosen] / scale, c / scale), 1)[:, :neighbours]
    panels = []
    for i, row in enumerate(chosen):
        both = np.concatenate([samples[i], q[order[i]]])
        edges = np.linspace(*np.quantile(both, [0.002, 0.998]) + np.array([-1e-3, 1e-3]), 41)
        middle, lines = (edges[1:] + edges[:-1]) / 2, []
        for values, label in ((samples[i], "student"), (q[order[i]], f"{neighbours} nearest windows")):
            density = np.histogram(values, edges, density=True)[0]
            lines += [(middle, density, {"drawstyle": "steps-mid", "label": label})]
        top = np.array([0.0, lines[0][1].max()])
        lines += [(np.full(2, q[row]), top, {"color": "k", "ls": "--", "label": "its own return"})]
        panels += [{"title": f"window {row}", "xlabel": "return over the window", "ylabel": "density", "lines": lines}]
    curves.figure(path, panels, width=4.0, height=3.6)


def plot_training(path, folder):
    """Losses of teacher and student; Q, H and the data's likelihood while the policy is trained."""
    parts = {
        "teacher/loss": ("teacher", "loss", "linear"),
        "student/loss": ("student", "loss", "semilogy"),
        "train/q": ("critics on the data", "mean Q", "linear"),
        "train/h": ("spread at (s', a')", "mean H, in return", "linear"),
        "train/log_p": ("the data's actions", "log N(a; mu, std)", "linear"),
    }
    panels = []
    for key, (title, ylabel, scale) in parts.items():
        seeds = curves.read(folder, key).items()
        lines = [(x, y, {"lw": 1, "marker": ".", "label": f"seed {seed}"}) for seed, (x, y) in seeds]
        if lines:
            panels.append({"title": title, "xlabel": "updates", "ylabel": ylabel, "scale": scale, "lines": lines})
    curves.figure(path, panels, width=4.2)


def plot_run(folder, task, buffer, model, data, entries, key, args):
    """The four figures of a finished run; those of the distribution show the first seed's student."""
    first = jax.tree.map(lambda x: x[0], model)
    curves.learning_curve(folder / "learning_curve.png", folder, task, buffer)
    plot_uncertainty(folder / "uncertainty.png", first, data, key, args)
    plot_distributions(folder / "distributions.png", first, entries, key, args)
    plot_training(folder / "training.png", folder)


def main(args):
    """Build D_Q, learn its distribution, train the policy, write it and figures -> envs.curves.summary."""
    started = time.time()
    check_args(args)
    path = args.dataset or scripted.dataset(Path(args.out or f"runs/qdq/point-angle-0/seed{args.seed}"))
    buffer, task = envs.buffers.load_task(path, Transitions._fields, args.task, args.max_rows)
    options = {k: v for k, v in task.options.items() if k in envs.task_options(task.name)}
    env = envs.make(task.name, None if args.backend == "auto" else args.backend, **options)
    env.check_batch(args.num_seeds * args.eval_episodes)
    args, folder = run_folder(args, "qdq", task.name)
    data, entries, scale = qdq_data(buffer, args)
    *fits, policy = make_train(args, task.observation_size, task.action_size)
    seeds = args.seed + jnp.arange(args.num_seeds)
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 3), out_axes=1)(seeds)
    likes = {"teacher": jax.eval_shape(fits[0].init, keys[0])}
    likes["student"] = jax.eval_shape(fits[1].init, keys[1], likes["teacher"].net)
    limits = jnp.full(args.num_seeds, entries.low), jnp.full(args.num_seeds, entries.high)
    like = QModel(likes["student"].net, *limits)
    likes = ({} if args.student else likes) | {"policy": jax.eval_shape(policy.init, keys[2])}
    announce(folder, args, task, env, buffer, data, entries, likes)

    belongs = student_identity(args, buffer)
    about = {"task": task.name, "observations": "task", "versions": envs.buffers.versions()}
    identity = {"data": belongs["data"]}
    if args.student:
        model = load_q_model(args.student, like, belongs)
        identity["student"] = envs.buffers.sha256(np.asarray(model.net.trunk.weights[-1]))
    found, meta = {}, {"identity": run_identity(args, **identity), "log": 0}
    where = {"teacher": folder / "teacher", "student": folder / "student", "policy": folder}
    if args.resume:
        found, meta = resume_point(where, likes, meta["identity"])
    logger = Logger(folder, args, meta["log"])
    save = lambda phase, state: save_state(where[phase], state, {**meta, "log": logger.file.tell()})
    evaluation, model_evaluation = make_evaluation(args, env, task, buffer.metadata["episode_length"], scale)
    eval_keys = evaluation_keys(args)
    if not args.student:
        judge = lambda net: model_evaluation(QModel(net, *limits), data, entries, eval_keys[0])
        model = QModel(fit_q_model(args, fits, keys, found, entries, judge, logger, save), *limits)
    write_policy(folder / "q_model.npz", "q_consistency", model, about | belongs)
    if (state := found.get("policy")) is None:
        state = policy.init(keys[2])
        save("policy", state)
    state = train_phase(
        "update", args.num_updates, state, lambda state: policy.chunk(state, model, data),
        lambda state: evaluation(state.nets.actor, eval_keys), SHOWN, args, logger, lambda state: save("policy", state),
    )  # fmt: skip

    rows = {f"observation_{k}": jnp.tile(v, (args.num_seeds, 1)) for k, v in zip(("mean", "std"), scale, strict=True)}
    write_policy(folder / "policy.npz", "tanh_deterministic", {"actor": state.nets.actor.mean, **rows}, about)
    plot_run(folder, task, buffer, model, data, entries, eval_keys[0], args)
    result = curves.summary(folder, buffer)
    print(f"{folder}: policy.npz, q_model.npz, four figures; {time.time() - started:.0f} s")
    return result


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end_at_once)
    try:
        arguments = parse_args(sys.argv[1:], qdq_preset)
        if arguments.num_devices > 1:  # of the CPU; accelerators are what they are
            jax.config.update("jax_num_cpu_devices", arguments.num_devices)
        main(arguments)
    except (envs.InputError, OSError) as error:
        sys.exit(f"qdq.py: error: {error}")
