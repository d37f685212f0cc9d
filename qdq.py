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
      (Eq. 9 in the paper, advantage-weighted in the code); here: the code's, PUBLISHED.
  D16 Code draws a' from the target actor's Gaussian wherever gamma_ent > 0; here: so in the published presets,
      elsewhere a' is around its mean (--sample-target).

Files      reads a buffer relabelled by udg_select.py (docs/buffer.md); writes runs/qdq/<task>/...: policy.npz
           (docs/policy.md), q_model.npz, log.jsonl, state.npz of the three phases, learning_curve.png, training.png
Run        python qdq.py --quick                          (point robot, under 2 minutes on 2 cores)
           python qdq.py --dataset runs/udg_select/ant-angle-60/top1.npz --preset cpu     (2 cores)
           python qdq.py --dataset runs/udg_select/ant-angle-60/top1.npz --num-seeds 5    (1M updates)
           python benchmark/qdq_figures.py runs/qdq/ant-angle-60/seed0    (H and returns on and off the data)
Expect     --quick: return 95 (data: mean -0.2, best 93.9), 68 s; ant-angle-60, top-1, 50k rows, seed 0, --preset cpu
           with 20k steps of teacher and student: 667 in 1000 steps, mean of the last 5 (cloning 231), 52 minutes;
           both on a CPU core that others shared; docs/qdq.md
"""

import itertools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import envs
import envs.buffers
import runner


@dataclass(frozen=True)
class Args(runner.Flags):
    # beside the flags that every learner has: dataset, task, seed, num_seeds, ... (runner/flags.py)
    # --- budget ---
    teacher_updates: runner.Count = 800_000
    """gradient steps of the teacher (stored models: 800k, D3)"""
    student_updates: runner.Count = 1_600_000
    """gradient steps of the student (stored models: 1.6M, two sets 1M and 2M, D3)"""
    num_updates: runner.Count = 1_000_000
    """critic steps per seed; the actor steps in every policy_delay-th (code: 1M)"""
    chunk: runner.Count = 1_000
    """gradient steps in one jitted call, in each phase; a multiple of policy_delay; divides eval_every and totals"""
    eval_every: runner.Count = 5_000
    """gradient steps between two evaluations (code: 5,000)"""
    # --- distribution of Q ---
    window: runner.Natural = 0
    """T: steps of a windowed return; 0: 200 for episodes of 1000 steps, else a fifth of their length (code: 200; D2)"""
    window_step: runner.Natural = 0
    """k: steps between two windows; 0: T / 20 (code: 10; D2)"""
    max_windows: runner.Count = 100
    """greatest number of windows of one episode (code: 100)"""
    min_entries: runner.Natural = 5_000
    """fewer windows than these in all are refused: nothing can be learnt from them (ours)"""
    model_hidden_sizes: tuple[runner.Count, ...] = (256, 256, 256)
    """widths of teacher and student (code: 3 x 256)"""
    group_size: runner.Count = 8
    """features that a GroupNorm normalises together (code: 32 groups of 8)"""
    model_batch_size: runner.Count = 256
    """windows per step of teacher and student (code: 256)"""
    teacher_lr: runner.Size = 5e-4
    """Adam rate of the teacher, falling to 0 by a cosine (code: 5e-4)"""
    student_lr: runner.Size = 4e-4
    """RAdam rate of the student, falling to 0 by a cosine (code: 4e-4)"""
    num_levels: runner.Count = 1_000
    """noise levels of the distillation (code: 1,000)"""
    student_tau: runner.Share = 0.005
    """Polyak rate of the student's target (code: 0.005)"""
    student_tau_every: runner.Count = 5
    """steps of the student per step of its target (code: 5)"""
    student: str = ""
    """q_model.npz of an earlier run on this data: its one student for all seeds, or one each; none is trained (D12)"""
    # --- uncertainty ---
    uncertainty: Literal["gh", "mc"] = "gh"
    """gh: Gauss-Hermite sum over the student's noise; mc: samples, as the code (D6)"""
    nodes: runner.Count = 8
    """nodes of the sum (ours: 8 are within 5 % of the exact std)"""
    num_samples: runner.Count = 50
    """samples of mc (code: 50)"""
    alpha: runner.Share = 0.992
    """alpha: share of the optimistic target (code: 0.992 MuJoCo, 0.99 AntMaze; paper: 0.95 to 0.99; D15)"""
    beta: runner.Share = 0.9
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
    gamma_ent: runner.Rate = 0.2
    """gamma_ent: weight of the likelihood of the data's actions (code: 0 to 2 by dataset, raw Q; D11)"""
    sample_target: bool = False
    """draw a' from the target actor's Gaussian, before the noise (code: wherever gamma_ent > 0; D16)"""
    q_from: runner.Share = 0.1
    """share of num_updates during which the actor of loss q only clones; with gamma_ent 0 it rests (ours, D13)"""
    q_norm: bool = True
    """divide Q by its mean magnitude in the actor's loss q (ours, D11)"""
    awr_temperature: runner.Rate = 6.0
    """factor of the advantage in awr (code: 6)"""
    awr_samples: runner.Count = 30
    """samples of the target actor for V(s) in awr (code: 30)"""
    normalize: bool = True
    """standardise observations by the data's mean and std (ours, D11)"""
    hidden_sizes: tuple[runner.Count, ...] = (256, 256, 256)
    """widths of actor and critics (code: 3 x 256, AntMaze 2 x 256)"""
    layer_norm: bool = False
    """LayerNorm in the critics (code: antmaze-large)"""
    batch_size: runner.Count = 256
    """B: rows per update (code: 256)"""
    actor_lr: runner.Rate = 3e-4
    """Adam rate of the actor at the start (code: 3e-4; D10)"""
    critic_lr: runner.Rate = 3e-4
    """Adam rate of the critics (code: 3e-4)"""
    max_grad_norm: runner.Size = 10.0
    """the critics' gradient is scaled down to this norm (code: 10, AntMaze 7 and 3)"""
    gamma: runner.Share = 0.99
    """discount (code: 0.99)"""
    tau: runner.Share = 0.005
    """Polyak rate of critics and actor, once per actor step (code: 0.005)"""
    policy_delay: runner.Count = 2
    """critic steps per actor step (code: 2)"""
    target_noise: runner.Rate = 0.2
    """std of the noise on a' (code: 0.2)"""
    target_noise_clip: runner.Rate = 0.5
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
PUBLISHED = {
    name: GENERAL | {"beta": beta, "gamma_ent": weight, "sample_target": weight > 0}
    for name, (beta, weight) in MUJOCO.items()
}
PUBLISHED["halfcheetah-medium-replay-v2"]["student_updates"] = 1_000_000
PUBLISHED["walker2d-medium-expert-v2"]["student_updates"] = 2_000_000
PUBLISHED |= {
    name: GENERAL | MAZE_RUN | dict(zip(ANTMAZE_FIELDS, row, strict=True)) | {"sample_target": row[1] > 0}
    for name, row in ANTMAZE.items()
}
SHORT = {"num_levels": 18, "student_tau": 0.05}  # few steps do not carry 1,000 levels (docs/qdq.md)       # D3
CPU = SHORT | {
    "teacher_updates": 80_000, "student_updates": 160_000, "num_updates": 20_000, "chunk": 500, "eval_every": 2_000,
}  # fmt: skip
SHOWN = ("train/q", "train/h", "train/penalty", "train/log_p", "train/distance")  # in the progress line
TRAINING = (  # panels of training.png
    ("teacher/loss", "teacher", "loss", "linear"),
    ("student/loss", "student", "loss", "semilogy"),
    ({f"student/h_{name}": f"{name} actions" for name in ("data", "near", "far")},
     "spread on and off the data, mean over seeds", "median H, in return", "linear"),
    ("train/q", "critics on the data", "mean Q", "linear"),
    ("train/h", "spread at (s', a')", "mean H, in return", "linear"),
    ("train/log_p", "the data's actions", "log N(a; mu, std)", "linear"),
)  # fmt: skip
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

    def over_seeds(init, one, num_states):
        """one(states of a seed.., shared) -> Phase of all seeds; the first num_states inputs have a seed axis."""
        each = lambda *xs: runner.map_seeds(lambda seeds: one(*seeds, *xs[num_states:]), xs[:num_states], args)
        return Phase(jax.jit(runner.over_devices(jax.vmap(init), args)), jax.jit(each, donate_argnums=0))

    return (
        over_seeds(teacher_init, teacher_chunk, 1),
        over_seeds(student_init, student_chunk, 2),
        over_seeds(policy_init, policy_chunk, 2),
    )


# === run ===


def preset(args):
    """--quick, or the published values of the file's dataset or of --preset, and --preset cpu on top."""
    return runner.preset(args, PUBLISHED, {"cpu": CPU}, QUICK)


def check_args(args):
    """Refuse flags that do not fit one another."""
    runner.check_run(args)
    totals = args.eval_every, args.teacher_updates, args.student_updates, args.num_updates
    runner.refuse({
        "--chunk must be a multiple of --policy-delay": args.chunk % args.policy_delay == 0,
        "--chunk must divide --eval-every, --teacher-updates, --student-updates and --num-updates":
            all(total % args.chunk == 0 for total in totals),
        "--model-hidden-sizes must be multiples of --group-size":
            all(width % args.group_size == 0 for width in args.model_hidden_sizes),
        "--beta must be above 0 and below 1": 0 < args.beta < 1,
        "--gamma, --tau and --student-tau must be above 0": min(args.gamma, args.tau, args.student_tau) > 0,
        "--log-std-min must be below --log-std-max": args.log_std_min < args.log_std_max,
        "--nodes must be 2 or more": args.nodes >= 2,
        "--num-levels must be 3 or more": args.num_levels >= 3,
        "--w-max would undo --weight antmaze, whose w above 1 is the penalty; use --no-w-max --no-sign-aware":
            args.weight != "antmaze" or not (args.w_max or args.sign_aware),
    })  # fmt: skip


def check_entries(entries, window, step, args):
    """Say what D_Q holds; InputError where it holds too little to learn from."""
    low, high = float(entries.low), float(entries.high)
    print(f"D_Q: {len(entries.x)} entries, windows of {window} steps every {step}, Q from {low:.2f} to {high:.2f}")
    remedy = "give more rows, lower --window and --window-step, or raise --max-windows"
    runner.refuse({
        f"--dataset: D_Q has {len(entries.x)} entries of {args.min_entries} that --min-entries asks for; {remedy}":
            len(entries.x) >= args.min_entries,
    })  # fmt: skip


def student_identity(args, buffer):
    """What a student belongs to: the data, and the flags behind D_Q and its network that shapes do not show."""
    flags = {k: getattr(args, k) for k in ("gamma", "max_windows", "reward_shift", "normalize", "group_size")}
    windows = list(window_sizes(args, buffer.metadata["episode_length"]))
    return flags | {"windows": windows, "data": envs.buffers.digests(buffer, ("observations", "actions", "rewards"))}


def load_q_model(path, like, identity):
    """The q_model.npz of an earlier run, its only student for all seeds or one for each -> QModel [S], as `like`."""
    try:
        arrays, about = runner.read_npz(path, "metadata_json")
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


def learn_distribution(run, phases, programs, keys, entries, judge):
    """Lines (2), (3): the teachers, then the students of all seeds -> their networks [S]; judge(net) -> metrics [S]."""
    args, (teacher, student) = run.args, phases
    state = run.restore(teacher.init, keys[0], phase="teacher")
    for step in run.chunks("teacher step", args.teacher_updates, state.num_updates):
        state, metrics = programs[0](state, entries)
        run.progress(step, metrics, ("teacher/loss",))
        if run.due(step):
            run.log(step, metrics)
        run.save(state)

    net = state.net
    state = run.restore(student.init, keys[1], net, phase="student")
    for step in run.chunks("student step", args.student_updates, state.num_updates):
        state, metrics = programs[1](state, net, entries)
        run.progress(step, metrics, ("student/loss",))
        if run.due(step):
            run.log(step, metrics | judge(state.net))
        run.save(state)
    return state.net


def main(args):
    """Build D_Q, learn its distribution, train the policy, write both and figures -> scores."""
    check_args(args)
    buffer, task = runner.open_task("qdq", args, Transitions._fields)
    data, entries, (mean, std) = qdq_data(buffer, args)
    teacher, student, policy = make_train(args, task.observation_size, task.action_size)
    keys, eval_keys = runner.seed_keys(args, 3), runner.evaluation_keys(args)
    act = lambda actor, s, key: policy_mean(actor.mean, (s - mean) / std, args, task.action_size)
    evaluate = runner.each_seed(runner.returns_of(act, envs.make(task, args.backend), task, buffer, args), args)
    measure = lambda seed: model_metrics(seed[0], data, entries, seed[1], args)
    judge_all = jax.jit(lambda model: runner.map_seeds(measure, (model, eval_keys), args))

    first = jax.eval_shape(teacher.init, keys[0])
    second = jax.eval_shape(student.init, keys[1], first.net)
    limits = jnp.full(args.num_seeds, entries.low), jnp.full(args.num_seeds, entries.high)
    like, belongs = QModel(second.net, *limits), student_identity(args, buffer)
    model = load_q_model(args.student, like, belongs) if args.student else None
    given = {"student": envs.buffers.sha256(np.asarray(model.net.trunk.weights[-1]))} if args.student else {}

    with runner.Run("qdq", args, task, buffer, **given) as run:
        check_entries(entries, *window_sizes(args, buffer.metadata["episode_length"]), args)
        if model is None:
            programs = (
                run.compile(teacher.chunk, first, entries),
                run.compile(student.chunk, second, first.net, entries),
            )
        train_chunk = run.compile(policy.chunk, jax.eval_shape(policy.init, keys[2]), like, data)
        if model is None:
            judge = lambda net: judge_all(QModel(net, *limits))
            model = QModel(learn_distribution(run, (teacher, student), programs, keys, entries, judge), *limits)
        run.write_policy("q_consistency", model, "q_model.npz", **belongs)
        state = run.restore(policy.init, keys[2])
        for step in run.chunks("update", args.num_updates, state.num_updates):
            state, metrics = train_chunk(state, model, data)
            run.progress(step, metrics, SHOWN)
            if run.due(step):
                run.log(step, metrics | evaluate(state.nets.actor, eval_keys))
            run.save(state)

        scale = {"observation_mean": mean, "observation_std": std}
        scale = {name: jnp.tile(row, (args.num_seeds, 1)) for name, row in scale.items()}
        run.write_policy("tanh_deterministic", {"actor": state.nets.actor.mean, **scale})
        return run.finish(TRAINING)


if __name__ == "__main__":
    runner.launch(main, Args, preset, ("cpu", *PUBLISHED), __doc__)
