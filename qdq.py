"""QDQ: learn how sure a value is at the next step, and bootstrap less where it is not.

Paper      Q-Distribution guided Q-learning for offline reinforcement learning: Uncertainty penalized Q-value
           via consistency model (Zhang et al., NeurIPS 2024), arXiv 2410.20312; equation numbers are the paper's.
           "Code" below: the authors' repository at the last commit that still had all its parts.
Idea       Far from the data a critic's value is a guess. H says how unsure it is: in the paper the spread of the
           returns, which a generative model learns; by default how far several critics disagree.

Algorithm  (1) data set: q = sum_m gamma^m r over a window of T steps, started at every k-th step     (Eq. 5)
           (2) teacher:  a denoiser D(x_t, t | s, a) of x = q scaled to [-1, 1]
           (3) student:  a consistency model f(x_t, t | s, a), pulled at each level t to its target at the next one,
                         which a Heun step of D leads to
           (4) H(s, a):  std of f(80 z, 80 | s, a), z ~ N(0, 1), in units of return (Eq. 6); or of the target
                         critics' Q, which needs none of (1) to (3)
           (5) target:   a' ~ target actor at s' with noise; U: rows whose H(s', a') is above the beta quantile;
                         Qm = min_i Qtar_i(s', a');  y = r + gamma (1 - terminal) V
                         product: V = Qm (alpha + (1 - alpha) w), w = 1/H in U, else beta             (Eq. 8)
                         excess:  V = Qm - kappa (H - quantile) in U, else Qm; quantile of H at the batch's (s, a)
           (6) critics:  a step on sum_i <(Q_i(s, a) - y)^2>; the first of every policy_delay steps also does (7)
           (7) Polyak average of the critics; a step of the actor on -<min_i Q_i(s, mu(s))>
               - gamma_ent <log N(a; mu(s), std)> with the new critics (Eq. 9), or an advantage-weighted regression
               (--actor-loss awr); Polyak average of the actor

Symbols    s observations [.., S] | a actions [.., A] | r rewards | c = [s, a] [.., C] | q windowed returns
           x scaled q | t noise level, t_next the next lower one | z normal noise | F raw output of a network
           D teacher | f student | H, h uncertainty [B] | w weight [B] | U flagged rows, `ood` | y targets [B]
           alpha share of the optimistic target | beta level of the quantile | mu tanh mean | B batch
           T window | k window_step | gamma discount | tau Polyak rate | S also num_seeds, as a leading axis

Deviations ("here": always; "ours": not in the published presets, those of D4RL's sets; --quick leaves out D7, D9, D18)
  D1  Eq. 5 counts m from the start of the episode, ends a window after k steps and drops the reward of a terminal
      step; code and here: m from the start of the window, T steps, all rewards.
  D2  Code: T = 200, k = 10, for episodes of 1000 steps; here: T = length / 5, k = T / 20, on AntMaze the code's.
  D3  Paper: 80k and 160k steps for teacher and student, stored models and here: 800k and 1.6M. --quick and
      --preset cpu have fewer steps, 18 levels and a target rate of 0.05.
  D4  Code never draws the level t = 80, where the samples are made; here: it is drawn.
  D5  Code starts student and target from two random networks; here: both from the teacher. Code's first layer is one
      kernel of (c, x, t); here: the sum of three, each Xavier-uniform by itself.
  D6  Eq. 6: std of n samples, divided by n - 1; code: of 50, by n (--spread mc); here: a Gauss-Hermite sum over z.
  D7  U, the rows whose H is above a level. Paper: the quantile over the policy's actions; code: over a batch's
      (s', a'); ours: over its own (s, a).
  D8  Eq. 8 is not what the code does on AntMaze; here: the code's three weights, --weight.
  D9  product (paper, code) changes y by a percent, and raises it where Qm (w - 1) > 0; ours: excess.
  D10 Paper: constant rate of the actor; code and here: a cosine for num_updates actor steps, of which half are made.
  D11 Code: raw states, rewards and Q; ours: scaled (--normalize, --scale-rewards, --q-norm), angles as sine and cosine.
  D12 Code: one student for the policies of all seeds; here: one each, --student to share one.
  D13 Code: Q from the start; ours: the actor only clones during the first tenth (--q-from).
  D14 Code: rows of a batch without replacement; here: with.
  D15 Paper and code differ in alpha, beta, gamma_ent, AntMaze's layers and actor loss; here: the code's, PUBLISHED.
  D16 Code draws a' from the target actor's Gaussian wherever gamma_ent > 0; ours: around its mean (--sample-target).
  D17 Code: teacher and student see all episodes; ours: --holdout keeps some to judge them by.
  D18 Paper, code: two critics, H of a student, hardly wider off the data; ours: four with LayerNorm, H is their std.

Files      reads a buffer relabelled by udg_select.py (docs/buffer.md); writes runs/qdq/<task>/...: policy.npz
           (docs/policy.md), log.jsonl, state.npz of the phases, learning_curve.png, training.png; with --uncertainty
           consistency q_model.npz
Run        python qdq.py --quick                          (point robot, all phases, under 2 minutes on 2 cores)
           python qdq.py --dataset runs/udg_select/ant-angle-60/top1-size50000.npz --preset cpu
           python qdq.py --dataset runs/udg_select/ant-angle-60/top1.npz --num-seeds 5    (1M updates)
Expect     --quick: return 95 (data: mean -0.2, best 93.9), 68 s; --preset cpu on 50k rows of ant-angle-60, top 1 of
           an older source: 291 in 200 steps (three seeds; data 117), 6 minutes of a core; docs/qdq.md
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import envs
import envs.buffers
import runner
from runner import probes


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
    """steps in one jitted call, in each phase; a multiple of policy_delay that divides eval_every and totals"""
    eval_every: runner.Count = 5_000
    """gradient steps between two evaluations (code: 5,000)"""
    # --- distribution of Q ---
    window: runner.Natural = 0
    """T: steps of a windowed return; 0: a fifth of an episode (code: 200; D2)"""
    window_step: runner.Natural = 0
    """k: steps between two windows; 0: T / 20 (code: 10; D2)"""
    max_windows: runner.Count = 100
    """greatest number of windows of one episode (code: 100)"""
    min_entries: runner.Natural = 5_000
    """fewer windows than these to learn from are refused (ours)"""
    model_hidden_sizes: tuple[runner.Count, ...] = (256, 256, 256)
    """widths of teacher and student (code: 3 x 256)"""
    group_size: runner.Natural = 8
    """features that their GroupNorm takes together (code: 8 of 256); a width: all of a layer; 0: no norm"""
    model_batch_size: runner.Count = 256
    """windows per step of teacher and student (code: 256)"""
    holdout: runner.Share = 0.05
    """share of the episodes that they do not see, to judge them by (ours, D17)"""
    teacher_lr: runner.Size = 5e-4
    """Adam rate of the teacher, falling to 0 by a cosine (code: 5e-4)"""
    student_lr: runner.Size = 4e-4
    """RAdam rate of the student, falling to 0 by a cosine (code: 4e-4)"""
    num_levels: runner.Count = 1_000
    """noise levels of the distillation (code: 1,000)"""
    student_tau: runner.Share = 0.005
    """Polyak rate of the student's target (code: 0.005)"""
    student: str = ""
    """q_model.npz of an earlier run on this data: its one student for all seeds, or one each; none is trained (D12)"""
    # --- uncertainty ---
    uncertainty: Literal["consistency", "critics"] = "critics"
    """H: std of the student's returns (paper, code), or of the critics' Q, which needs no student (ours, D18)"""
    spread: Literal["gh", "mc"] = "gh"
    """std of a student's returns: gh: Gauss-Hermite sum over its noise; mc: samples, as the code (D6)"""
    nodes: runner.Count = 8
    """nodes of the sum (ours: 8 are within 5 % of the exact std)"""
    num_samples: runner.Count = 50
    """samples of mc (code: 50)"""
    penalty: Literal["product", "excess"] = "excess"
    """y = r + gamma Qm (alpha + (1 - alpha) w) (paper, code), or r + gamma (Qm - kappa max(H - level, 0)) (ours, D9)"""
    kappa: runner.Rate = 1.0
    """kappa of excess, whose level is the beta quantile of H at the data's (s, a)"""
    alpha: runner.Share = 0.992
    """alpha: share of the optimistic target (code: 0.992 MuJoCo, 0.99 AntMaze; paper: 0.95 to 0.99; D15)"""
    beta: runner.Share = 0.9
    """beta: quantile above which a row is flagged, and weight of the others (code: 0.8 or 0.9 by dataset; D15)"""
    weight: Literal["mujoco", "antmaze", "antmaze-diverse"] = "mujoco"
    """w of flagged rows, of others: mujoco 1/H, beta; antmaze 1 + 0.1 (1 - 1/H), 1; antmaze-diverse 1/H, 1 (D8)"""
    # --- actor-critic ---
    actor_loss: Literal["q", "awr"] = "q"
    """q: climb Q, with the likelihood term; awr: advantage-weighted likelihood (code: AntMaze but one)"""
    gamma_ent: runner.Rate = 0.04
    """gamma_ent: weight of the likelihood of the data's actions (code: 0 to 2 by dataset, raw Q; D11)"""
    sample_target: bool = False
    """draw a' from the target actor's Gaussian, before the noise (code: wherever gamma_ent > 0; D16)"""
    q_from: runner.Share = 0.1
    """share of num_updates in which the actor of loss q clones only; with gamma_ent 0 it stands still (ours, D13)"""
    q_norm: Literal["none", "size", "spread"] = "spread"
    """what Q is divided by in the actor's loss q: mean magnitude or std over the batch (ours, D11)"""
    normalize: bool = True
    """standardise observations by the data's mean and std (ours, D11)"""
    angles: str = "task"
    """observed angles that go round, whose sine and cosine all networks see: task (its own), none, or columns such as
    1,4 (ours, D11)"""
    scale_rewards: bool = True
    """divide rewards by their root mean square: any unit will do; Q and H are logged in that unit (ours, D11)"""
    hidden_sizes: tuple[runner.Count, ...] = (256, 256, 256)
    """widths of actor and critics (code: 3 x 256, AntMaze 2 x 256)"""
    num_critics: runner.Count = 4
    """number of critics; the smallest Q counts (code: 2; D18)"""
    layer_norm: bool = True
    """LayerNorm in the critics (code: antmaze-large; D18)"""
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
    """bound of that noise (code: 0.5)"""
    reward_shift: float = 0.0
    """added to every reward (code: -1 for AntMaze)"""


SIGMA_DATA, T_MIN, T_MAX, RHO = 0.5, 0.002, 80.0, 7.0  # noise levels (code)
FOURIER, TIME_WIDTH = 8, 32  # frequencies of the time embedding, and its width (code)
TAU_EVERY = 5  # steps of the student per step of its target (code)
LOG_STD = -5.0, 2.0  # clip of the actor's free log std (code)
TEMPERATURE, VALUE_SAMPLES = 6.0, 30  # of awr: factor of the advantage, actions for V(s) (code)
PAPER = {"uncertainty": "consistency", "penalty": "product", "num_critics": 2, "layer_norm": False}
PUBLISHED_ALL = PAPER | {
    "holdout": 0.0, "scale_rewards": False, "normalize": False, "angles": "none", "q_norm": "none", "q_from": 0.0,
}  # fmt: skip
MUJOCO = {  # beta, gamma_ent                                                                    # D15
    "halfcheetah-medium-v2": (0.9, 0.0), "halfcheetah-medium-replay-v2": (0.9, 0.1),
    "halfcheetah-medium-expert-v2": (0.9, 2.0), "hopper-medium-v2": (0.8, 0.8), "hopper-medium-replay-v2": (0.8, 0.8),
    "hopper-medium-expert-v2": (0.8, 2.0), "walker2d-medium-v2": (0.8, 0.8), "walker2d-medium-replay-v2": (0.8, 0.8),
    "walker2d-medium-expert-v2": (0.8, 2.0),
}  # fmt: skip
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
    name: PUBLISHED_ALL | {"beta": beta, "gamma_ent": weight, "sample_target": weight > 0}
    for name, (beta, weight) in MUJOCO.items()
}
PUBLISHED["halfcheetah-medium-replay-v2"]["student_updates"] = 1_000_000
PUBLISHED["walker2d-medium-expert-v2"]["student_updates"] = 2_000_000
PUBLISHED |= {
    name: PUBLISHED_ALL | MAZE_RUN | dict(zip(ANTMAZE_FIELDS, row, strict=True)) | {"sample_target": row[1] > 0}
    for name, row in ANTMAZE.items()
}
SHORT = {"num_levels": 18, "student_tau": 0.05}  # few steps do not carry 1,000 levels (docs/qdq.md)       # D3
CPU = SHORT | {
    "teacher_updates": 80_000, "student_updates": 160_000, "num_updates": 12_000, "chunk": 500, "eval_every": 1_500,
    "tau": 0.02,  # once per actor step: at the code's 0.005 Q lags by 40k updates
}  # fmt: skip
SHOWN = ("train/q", "train/h", "train/ood", "train/penalty", "train/log_p", "train/distance")  # in the progress line
TRAINING = (  # panels of training.png
    ("teacher/loss", "teacher", "loss", "linear"),
    ("student/loss", "student", "loss", "semilogy"),
    ({"student/error": "error", "student/error_held": "error, held-out episodes", "student/spread": "spread H"},
     "student on windows, mean over seeds", "root mean square", "linear"),
    ("train/q", "critics on the data", "mean Q", "linear"),
    *probes.panels("beta"),
    ("train/log_p", "the data's actions", "log N(a; mu, std)", "linear"),
)  # fmt: skip
QUICK = SHORT | PAPER | {  # all phases
    "teacher_updates": 4_000, "student_updates": 4_000, "num_updates": 6_000, "chunk": 500, "eval_every": 1_000,
    "model_hidden_sizes": (64, 64), "hidden_sizes": (64, 64), "actor_lr": 1e-3, "critic_lr": 1e-3, "batch_size": 128,
    "teacher_lr": 1e-3, "student_lr": 1e-3, "gamma_ent": 0.1, "q_norm": "size",
}  # fmt: skip


# === data ===


class Transitions(NamedTuple):
    """Rows to learn from; any leading axes, features last."""

    observations: jax.Array  # [.., S]
    actions: jax.Array  # [.., A]
    rewards: jax.Array  # [..]
    next_observations: jax.Array  # [.., S]
    terminals: jax.Array  # [..] 1.0 where the episode ended by itself: no bootstrap; 0.0 at a time limit


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
    window = args.window or max(episode_length // 5, 1)  # D2
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
    rewards, powers = np.asarray(rewards, float), gamma ** np.arange(window)
    rows, widths = [], []
    for begin, end in zip((0, *ends[:-1]), ends, strict=True):
        first_cut = max(begin, end - window)  # a window from here on reaches the end
        rows.append(np.arange(begin, first_cut + step, step)[:cap])
        widths.append(np.minimum(window, end - rows[-1]))
    rows, widths = np.concatenate(rows), np.concatenate(widths)
    q = np.array([powers[:w] @ rewards[j : j + w] for j, w in zip(rows, widths, strict=True)])  # D1
    return rows, q, widths


def scaled(q, low, high):
    """[Qmin, Qmax] -> [-1, 1]; a constant q becomes -1."""
    return 2.0 * (q - low) / np.maximum(high - low, 1e-6) - 1.0


def unscaled(x, low, high):
    """[-1, 1] -> [Qmin, Qmax], and what lies outside accordingly."""
    return (x + 1.0) / 2.0 * (high - low) + low


def qdq_data(buffer, args):
    """Buffer -> Transitions [N], and what networks see of observations."""
    rows = Transitions(*(np.asarray(buffer[name], np.float32) for name in Transitions._fields))
    angles = envs.buffers.angle_columns(args.angles)
    scale = envs.buffers.standard_scale(envs.buffers.turned(rows.observations, angles))
    see = envs.buffers.Sight(*(scale if args.normalize else (0 * scale[0], 0 * scale[1] + 1)), angles)  # D11
    actions, rewards = np.clip(rows.actions, -1 + 1e-5, 1 - 1e-5), rows.rewards + np.float32(args.reward_shift)
    if args.scale_rewards:  # D11
        size = np.sqrt(np.mean(np.square(rewards, dtype=np.float64)))
        rewards = rewards * np.float32(1 / max(size, np.finfo(np.float32).tiny))
    rows = Transitions(see(rows.observations), actions, rewards, see(rows.next_observations), rows.terminals)
    return jax.tree.map(jnp.asarray, rows), see


def q_entries(buffer, data, args):
    """D_Q of --holdout's share of the episodes and of the others -> Entries [M] to learn from, Entries held out."""
    (window, step), ends = window_sizes(args, buffer.metadata["episode_length"]), buffer["episode_ends"]
    starts, q, _ = windowed_returns(data.rewards, ends, args.gamma, window, step, args.max_windows)
    num_held = min(max(round(args.holdout * len(ends)), args.holdout > 0), len(ends) - 1)
    episodes = np.random.default_rng(0).permutation(len(ends))[:num_held]
    held = np.isin(np.searchsorted(ends, starts, side="right"), episodes)  # D17
    num, low, high = np.sum(~held), q.min(), q.max()
    remedy = "give more rows, lower --window, --window-step or --holdout, or raise --max-windows"
    few = f"--dataset: D_Q has {num} entries, fewer than the {args.min_entries} of --min-entries; {remedy}"
    runner.refuse({few: num >= max(args.min_entries, 1)})
    print(f"D_Q: {num} entries, windows of {window} steps every {step}, scaled Q from {low:.2f} to {high:.2f}")
    c = jnp.concatenate([data.observations, data.actions], -1)[starts]
    x = scaled(q, low, high)
    return [Entries(*map(jnp.float32, (c[part], x[part], low, high))) for part in (~held, held)]


# === networks ===


def mish(x):
    """x tanh(softplus(x)) with one exponential: with u = e^x and n = u (u + 2) it is x n / (n + 2)."""
    u = jnp.exp(jnp.minimum(x, 20.0))
    n = u * (u + 2.0)
    return x * n / (n + 2.0)


class GroupNorm(nn.Module):
    """Every `size` features to mean 0, variance 1, then scale and bias. By hand: nn.GroupNorm takes 10 times longer."""

    size: int

    @nn.compact
    def __call__(self, x):
        groups = x.reshape(*x.shape[:-1], -1, self.size)
        groups = groups - groups.mean(-1, keepdims=True)
        groups = groups * jax.lax.rsqrt(jnp.square(groups).mean(-1, keepdims=True) + 1e-6)
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        return groups.reshape(x.shape) * scale + self.param("bias", nn.initializers.zeros, x.shape[-1:])


class QNet(nn.Module):
    """F(x, t | c), the network inside teacher and student: c [.., C]; x, t [..] -> [..]; the axes need only broadcast.

    The first layer is a sum, over c, c_in x and e(t): c passes it once for all x of a row, a scalar t for all rows.
    """  # D5

    hidden_sizes: tuple[int, ...]
    group_size: int

    @nn.compact
    def __call__(self, c, x, t):
        dense = functools.partial(nn.Dense, kernel_init=nn.initializers.xavier_uniform())
        fourier = jax.lax.stop_gradient(self.param("fourier", nn.initializers.normal(16.0), (FOURIER,)))
        angles = 2 * jnp.pi * (0.25 * jnp.log(t))[..., None] * fourier
        e = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        for _ in range(2):
            e = nn.silu(dense(TIME_WIDTH)(e))

        c_in, width = jax.lax.rsqrt(jnp.square(t) + SIGMA_DATA**2), self.hidden_sizes[0]
        w_x = self.param("w_x", nn.initializers.xavier_uniform(), (1, width))
        hidden = dense(width)(c) + (c_in * x)[..., None] * w_x[0] + dense(width, use_bias=False)(e)
        for width in (*self.hidden_sizes[1:], 1):
            hidden = dense(width)(nn.silu(GroupNorm(self.group_size)(hidden) if self.group_size else hidden))
        return hidden[..., 0]


class QModel(NamedTuple):
    """The student, and the range of returns that its x stands for."""

    net: Any  # parameters of a QNet
    low: jax.Array
    high: jax.Array


def q_models(net, entries, args):
    """The students [S] of all seeds, with the range of D_Q."""
    return QModel(net, jnp.full(args.num_seeds, entries.low), jnp.full(args.num_seeds, entries.high))


def consistency(net, c, x, t, args, end=T_MIN):
    """f(x, t | c) = c_skip x + c_out F: the end of the path through x at level t; f(x, end) = x."""
    c_skip = SIGMA_DATA**2 / ((t - end) ** 2 + SIGMA_DATA**2)
    c_out = (t - end) * SIGMA_DATA / jnp.sqrt(t**2 + SIGMA_DATA**2)
    return c_skip * x + c_out * QNet(args.model_hidden_sizes, args.group_size).apply(net, c, x, jnp.asarray(t))


def denoiser(net, c, x, t, args):
    """D(x, t | c): the mean of x_0 given x at level t."""
    return consistency(net, c, x, t, args, end=0.0)


def noise_levels(num):
    """t_0 = 80 > ... > t_{num-1} = 0.002 [num], evenly spaced in t^(1/7)."""
    high, low = T_MAX ** (1 / RHO), T_MIN ** (1 / RHO)
    return (high + jnp.arange(num) / (num - 1) * (low - high)) ** RHO


def heun_step(denoise, x, t, t_next):
    """One step of dx/dt = (x - D(x, t)) / t from level t down to t_next, second order."""
    slope = (x - denoise(x, t)) / t
    guess = x + (t_next - t) * slope
    return x + (t_next - t) * 0.5 * (slope + (guess - denoise(guess, t_next)) / t_next)


def q_samples(model, c, z, args):
    """Samples of the return, f(80 z, 80 | c) unscaled: c [.., C], z [K] or [.., K] -> [.., K], not clipped."""
    x = consistency(model.net, c[..., None, :], T_MAX * z, T_MAX, args)
    return unscaled(x, model.low, model.high)


def q_moments(model, c, key, args):
    """Line (4): mean and H = std of the return given c [.., C] -> two [..]; z is scalar, so H is a 1-D integral."""
    if args.spread == "gh":  # D6
        nodes, weights = np.polynomial.hermite_e.hermegauss(args.nodes)
        z, weights = jnp.asarray(nodes), jnp.asarray(weights / weights.sum())
    else:
        z = jax.random.normal(key, (*c.shape[:-1], args.num_samples))
        weights = jnp.full(args.num_samples, 1.0 / args.num_samples)
    q = q_samples(model, c, z, args)
    mean = q @ weights
    return mean, jnp.sqrt(jnp.square(q - mean[..., None]) @ weights)


class QdqCritics(nn.Module):
    """Independent Q networks, `num` of them, on (s, a), mish between their layers: [C, ..]."""

    hidden_sizes: tuple[int, ...]
    num: int
    layer_norm: bool

    @nn.compact
    def __call__(self, observations, actions):
        dense = lambda width: nn.Dense(width, kernel_init=nn.initializers.xavier_uniform())
        values = []
        for _ in range(self.num):
            x = jnp.concatenate([observations, actions], -1)
            for width in self.hidden_sizes:
                x = dense(width)(x)
                x = mish(nn.LayerNorm()(x) if self.layer_norm else x)
            values.append(dense(1)(x)[..., 0])
        return jnp.stack(values)


def critic_values(critic, observations, actions, args):
    """Q of every critic [C, ..]."""
    return QdqCritics(args.hidden_sizes, args.num_critics, args.layer_norm).apply(critic, observations, actions)


def uncertainty(model, critic, observations, actions, key, args):
    """Line (4): H(s, a) [..], of the student's returns (model: QModel) or of the critics' Q (model: None)."""
    with jax.default_matmul_precision("highest"):  # the order of H decides who is flagged
        if args.uncertainty == "critics":  # D18
            return critic_values(critic, observations, actions, args).std(0)
        return q_moments(model, jnp.concatenate([observations, actions], -1), key, args)[1]


class QdqActor(nn.Module):
    """mu(s) = tanh(MLP(s)) [.., A], and one free log std [A]. Weights Xavier-uniform, those of the last orthogonal."""

    hidden_sizes: tuple[int, ...]
    action_size: int

    @nn.compact
    def __call__(self, x):
        for width in self.hidden_sizes:
            x = nn.relu(nn.Dense(width, kernel_init=nn.initializers.xavier_uniform())(x))
        x = nn.Dense(self.action_size, kernel_init=nn.initializers.orthogonal(2**0.5))(x)
        return jnp.tanh(x), self.param("log_std", nn.initializers.zeros, (self.action_size,))


def policy(actor, observations, args):
    """The actor's Gaussian: mu(s) [.., A], and its log std [A] within the clip."""
    net = QdqActor(args.hidden_sizes, actor["params"]["log_std"].shape[-1])
    mean, log_std = net.apply(actor, observations)
    return mean, jnp.clip(log_std, *LOG_STD)


def polyak(target, online, tau):
    """target <- (1 - tau) target + tau online, leaf by leaf."""
    return jax.tree.map(lambda t, o: (1 - tau) * t + tau * o, target, online)


# === losses ===


def denoising_loss(teacher, c, x, z, t, args):
    """Line (2): mean_B (t^2 + sd^2) / (t sd)^2 (D(x + t z, t | c) - x)^2; x, z, t [B] -> scalar."""
    weight = (t**2 + SIGMA_DATA**2) / (t * SIGMA_DATA) ** 2
    return jnp.mean(weight * (denoiser(teacher, c, x + t * z, t, args) - x) ** 2)


def distillation_loss(student, target, teacher, c, x, z, levels, args):
    """Line (3): mean_B (f(x_t, t | c) - f_target(x_next, t_next | c))^2; x_next: a Heun step of the teacher.

    x, z [B]; levels t > t_next, both [B] -> scalar; no gradient through target and teacher.
    """
    t, t_next = levels
    x_t = x + t * z
    x_next = heun_step(lambda x, t: denoiser(teacher, c, x, t, args), x_t, t, t_next)
    goal = jax.lax.stop_gradient(consistency(target, c, x_next, t_next, args))
    return jnp.mean((consistency(student, c, x_t, t, args) - goal) ** 2)


def bootstrap_target(batch, next_q, h, threshold, args):
    """Line (5): y = r + gamma (1 - terminal) V [B], without gradient, and metrics. V by --penalty:

    product: Qm (alpha + (1 - alpha) w); one squared loss to this y has the gradient of Eq. 8's
    alpha (Q - y_H)^2 + (1 - alpha) (Q - y_L)^2, where V is Qm and w Qm. excess: Qm - kappa max(H - threshold, 0).
    next_q [B]: Qm; h [B]: H at (s', a'); threshold []: rows with a larger H are flagged
    """
    ood = h > threshold
    if args.penalty == "product":
        inverse = 1.0 / jnp.maximum(h, 1e-6)
        w_flagged, w_other = {  # D8
            "mujoco": (inverse, args.beta),
            "antmaze": (1.0 + 0.1 * (1.0 - inverse), 1.0),
            "antmaze-diverse": (inverse, 1.0),
        }[args.weight]
        value = next_q * (args.alpha + (1.0 - args.alpha) * jnp.where(ood, w_flagged, w_other))
    else:
        value = next_q - args.kappa * jnp.maximum(h - threshold, 0.0)  # D9
    go_on = args.gamma * (1.0 - batch.terminals)
    p10, p50, p90 = jnp.quantile(h, jnp.array([0.1, 0.5, 0.9]))
    return jax.lax.stop_gradient(batch.rewards + go_on * value), {
        "train/h": h.mean(), "train/h_p10": p10, "train/h_p50": p50, "train/h_p90": p90, "train/ood": ood.mean(),
        "train/penalty": jnp.mean(go_on * (next_q - value)), "train/raised": jnp.mean(go_on * (value - next_q) > 0),
    }  # fmt: skip


def qdq_critic_loss(critic, target_critic, target_actor, model, batch, key, args):
    """Lines (4) to (6): sum_i mean_B (Q_i(s, a) - y)^2 -> scalar, metrics."""
    key_action, key_h = jax.random.split(key)
    (key_sample, key_noise), (key_h, key_around) = jax.random.split(key_action), jax.random.split(key_h)
    s, next_s = batch.observations, batch.next_observations
    next_a, log_std = policy(target_actor, next_s, args)
    if args.sample_target:  # D16
        next_a += jnp.exp(log_std) * jax.random.normal(key_sample, next_a.shape)
    noise = args.target_noise * jax.random.normal(key_noise, next_a.shape)
    next_a = jnp.clip(next_a + jnp.clip(noise, -args.target_noise_clip, args.target_noise_clip), -1.0, 1.0)

    h = uncertainty(model, target_critic, next_s, next_a, key_h, args)
    own = uncertainty(model, target_critic, s, batch.actions, key_around, args) if args.penalty == "excess" else h
    threshold = jnp.quantile(own, args.beta)  # D7
    with jax.default_matmul_precision("highest"):  # as H: of critics these are the same values, computed once
        next_q = critic_values(target_critic, next_s, next_a, args).min(0)
    y, metrics = bootstrap_target(batch, next_q, h, threshold, args)
    q = critic_values(critic, s, batch.actions, args)
    loss = jnp.sum(jnp.mean((q - y) ** 2, -1))
    return loss, metrics | {"train/critic_loss": loss, "train/q": q.mean(), "train/target": y.mean()}


def log_likelihood(actions, mean, log_std):
    """log N(a; mu, std) [B], the Gaussian in action space, not squashed."""
    noise = (actions - mean) * jnp.exp(-log_std)
    return jnp.sum(-0.5 * noise**2 - log_std - 0.5 * jnp.log(2 * jnp.pi), -1)


def climbing_loss(q, log_p, with_q, args):
    """Line (7): -with_q mean_B Q(s, mu(s)) - gamma_ent mean_B log N(a; mu(s), std); q [B] the least critic's.

    with_q in {0, 1} is 0 while the actor only clones; --q-norm divides Q by mean_B |Q| or std_B Q, without gradient.
    """
    norm = {"none": 1.0, "size": jnp.abs(q).mean() + 1e-6, "spread": q.std() + 1e-6}[args.q_norm]  # D11
    q = q / jax.lax.stop_gradient(norm)
    return -with_q * q.mean() - args.gamma_ent * log_p.mean()  # D13


def awr_loss(q, value, log_p, args):
    """-mean_B min(exp(temperature (Q(s, a) - V(s))), 100) log N(a; mu(s), std); no gradient through the weight."""
    weight = jnp.minimum(jnp.exp(TEMPERATURE * (q - value)), 100.0)
    return -jnp.mean(jax.lax.stop_gradient(weight) * log_p)


def qdq_actor_loss(actor, target_actor, critic, with_q, batch, key, args):
    """Line (7), with Q(s, mu(s)) or by advantages (--actor-loss) -> scalar, metrics."""
    q_of = lambda s, a: critic_values(critic, s, a, args).min(0)
    mean, log_std = policy(actor, batch.observations, args)
    log_p = log_likelihood(batch.actions, mean, log_std)
    if args.actor_loss == "awr":
        old_mean, old_log_std = policy(target_actor, batch.observations, args)
        samples = old_mean + jnp.exp(old_log_std) * jax.random.normal(key, (VALUE_SAMPLES, *old_mean.shape))
        observations = jnp.broadcast_to(batch.observations, (VALUE_SAMPLES, *batch.observations.shape))
        value = q_of(observations, samples).mean(0)
        loss = awr_loss(q_of(batch.observations, batch.actions), value, log_p, args)
    else:
        loss = climbing_loss(q_of(batch.observations, mean), log_p, with_q, args)
    return loss, {
        "train/actor_loss": loss, "train/log_p": log_p.mean(), "train/log_std": log_std.mean(),
        "train/distance": jnp.abs(mean - batch.actions).mean(),
    }  # fmt: skip


# === update ===


class ModelNets(NamedTuple):
    """Parameters of D or f, those of f's target, and their optimiser's state."""

    net: Any
    target: Any
    opt: Any


class QdqNets(NamedTuple):
    """Parameters and optimiser states of actor and critics."""

    actor: Any
    critic: Any
    target_actor: Any
    target_critic: Any
    actor_opt: Any
    critic_opt: Any


class Optimisers(NamedTuple):
    """optax transformations of the four networks."""

    teacher: Any
    student: Any
    actor: Any
    critic: Any


def qdq_optimisers(args):
    """Teacher: Adam; student: RAdam; both to 0 by a cosine. Actor: Adam, cosine. Critics: clipped Adam."""
    decay = optax.cosine_decay_schedule
    teacher = optax.adam(decay(args.teacher_lr, args.teacher_updates))
    student = optax.radam(decay(args.student_lr, args.student_updates))
    actor = optax.adam(decay(args.actor_lr, args.num_updates))  # D10
    critic = optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.adam(args.critic_lr))
    return Optimisers(teacher, student, actor, critic)


def teacher_update(teacher, entries, step, key, args):
    """Line (2): one Adam step on random windows, ln t ~ N(-1.2, 1.2^2) -> teacher, metrics."""
    key_batch, key_z, key_t = jax.random.split(key, 3)
    index = jax.random.randint(key_batch, (args.model_batch_size,), 0, len(entries.x))  # D14
    z = jax.random.normal(key_z, index.shape)
    t = jnp.exp(-1.2 + 1.2 * jax.random.normal(key_t, index.shape))
    batch = entries.conditions[index], entries.x[index], z, t
    loss, grads = jax.value_and_grad(denoising_loss)(teacher.net, *batch, args)
    change, opt = qdq_optimisers(args).teacher.update(grads, teacher.opt)
    return ModelNets(optax.apply_updates(teacher.net, change), None, opt), {"teacher/loss": loss}


def student_update(student, teacher, entries, step, key, args):
    """Line (3): one RAdam step on random windows and pairs of levels; the target follows in every TAU_EVERY-th."""
    key_batch, key_z, key_level = jax.random.split(key, 3)
    index = jax.random.randint(key_batch, (args.model_batch_size,), 0, len(entries.x))  # D14
    z = jax.random.normal(key_z, index.shape)
    i = jax.random.randint(key_level, index.shape, 0, args.num_levels - 1)  # D4
    levels = noise_levels(args.num_levels)
    batch = entries.conditions[index], entries.x[index], z, (levels[i], levels[i + 1])
    loss, grads = jax.value_and_grad(distillation_loss)(student.net, student.target, teacher, *batch, args)
    change, opt = qdq_optimisers(args).student.update(grads, student.opt)
    net = optax.apply_updates(student.net, change)
    tau = jnp.where(step % TAU_EVERY == 0, args.student_tau, 0.0)
    return ModelNets(net, polyak(student.target, net, tau), opt), {"student/loss": loss}


def critic_update(nets, model, batch, key, args):
    """Lines (4) to (6) -> nets, metrics."""
    grads, metrics = jax.grad(qdq_critic_loss, has_aux=True)(
        nets.critic, nets.target_critic, nets.target_actor, model, batch, key, args
    )
    change, critic_opt = qdq_optimisers(args).critic.update(grads, nets.critic_opt)
    return nets._replace(critic=optax.apply_updates(nets.critic, change), critic_opt=critic_opt), metrics


def actor_update(nets, with_q, batch, key, args):
    """Line (7), with the critics after their step, on the same batch -> nets, metrics."""
    nets = nets._replace(target_critic=polyak(nets.target_critic, nets.critic, args.tau))
    grads, metrics = jax.grad(qdq_actor_loss, has_aux=True)(
        nets.actor, nets.target_actor, nets.critic, with_q, batch, key, args
    )
    change, actor_opt = qdq_optimisers(args).actor.update(grads, nets.actor_opt)
    actor = optax.apply_updates(nets.actor, change)
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
    for key_batch, key_loss in map(jax.random.split, keys):  # the other policy_delay - 1 steps: critics alone
        batch = sample_batch(data, key_batch, args.batch_size)
        nets, _ = critic_update(nets, model, batch, key_loss, args)
    return nets, metrics | actor_metrics


# === evaluation ===


def h_metrics(model, nets, data, args):
    """H on the data and off them -> metrics [S] (runner/probes.py)."""
    h_of = lambda own, s, a, key: uncertainty(own[0], own[1].target_critic, s, a, key, args)
    act = lambda own, s: policy(own[1].actor, s, args)[0]
    return probes.metrics(h_of, act, (model, nets), data, args.beta, args)


def fit_metrics(model, entries, held, keys, args):
    """How the students fit the windows that they learn from, and those of the held-out episodes -> metrics [S]."""

    def of_seed(own):
        model, key = own
        metrics = {"student/q_std": unscaled(entries.x, entries.low, entries.high).std()}
        for name, part in (("", entries), ("_held", held)) if len(held.x) else (("", entries),):
            index = jax.random.randint(jax.random.fold_in(key, 1), (1024,), 0, len(part.x))
            mean, spread = q_moments(model, part.conditions[index], key, args)
            error = unscaled(part.x[index], part.low, part.high) - mean
            metrics[f"student/error{name}"] = jnp.sqrt(jnp.mean(error**2))
            metrics[f"student/spread{name}"] = jnp.sqrt(jnp.mean(spread**2))
        return metrics

    return runner.map_seeds(of_seed, (model, keys), args)


# === training ===


class State(NamedTuple):
    """What a phase needs to go on; all leaves have a leading seed axis."""

    key: jax.Array
    num_updates: jax.Array  # of this phase
    nets: Any  # ModelNets or QdqNets


class Phase(NamedTuple):
    """init(keys [S], ..) -> state [S]; chunk(state, ..) -> state, metrics [S], means of the chunk."""

    init: Any
    chunk: Any


def make_train(args, num_obs, num_actions):
    """-> Phases: teacher (chunk: entries), student (init: teacher's net; chunk: it, entries), policy (model, data)."""
    optimisers = qdq_optimisers(args)

    def teacher_init(key):
        key, key_net = jax.random.split(key)
        c, net = jnp.zeros(num_obs + num_actions), QNet(args.model_hidden_sizes, args.group_size)
        net = net.init(key_net, c, *jnp.ones(2))
        return State(key, jnp.int32(0), ModelNets(net, None, optimisers.teacher.init(net)))

    def student_init(key, teacher):
        copies = jax.tree.map(jnp.copy, (teacher, teacher))  # the chunk overwrites them, not the teacher  # D5
        return State(key, jnp.int32(0), ModelNets(*copies, optimisers.student.init(teacher)))

    def policy_init(key):
        key, key_actor, key_critic = jax.random.split(key, 3)
        s, a = jnp.zeros(num_obs), jnp.zeros(num_actions)
        actor = QdqActor(args.hidden_sizes, num_actions).init(key_actor, s)
        critic = QdqCritics(args.hidden_sizes, args.num_critics, args.layer_norm).init(key_critic, s, a)
        nets = QdqNets(actor, critic, actor, critic, optimisers.actor.init(actor), optimisers.critic.init(critic))
        return State(key, jnp.int32(0), nets)

    def phase(init, update, num_own, stride=1):
        """update(nets, *inputs, step, key, args) takes `stride` steps; the first num_own inputs have a seed axis."""

        def one_chunk(state, *inputs):
            key, key_updates = jax.random.split(state.key)
            keys = jax.random.split(key_updates, args.chunk // stride)
            steps = state.num_updates + stride * jnp.arange(len(keys))
            step = lambda nets, xs: update(nets, *inputs, *xs, args)
            nets, metrics = jax.lax.scan(step, state.nets, (steps, keys))
            return State(key, state.num_updates + args.chunk, nets), jax.tree.map(jnp.mean, metrics)

        def chunk(state, *inputs):
            own, shared = (state, *inputs[:num_own]), inputs[num_own:]
            return runner.map_seeds(lambda own: one_chunk(*own, *shared), own, args)

        return Phase(jax.jit(runner.over_devices(jax.vmap(init), args)), jax.jit(chunk, donate_argnums=0))

    return (
        phase(teacher_init, teacher_update, 0),
        phase(student_init, student_update, 1),
        phase(policy_init, qdq_update, 1, args.policy_delay),
    )


# === run ===


def preset(args):
    """--quick, or the published values of the file's dataset or of --preset, and --preset cpu on top."""
    return runner.preset(args, PUBLISHED, {"cpu": CPU}, QUICK)


def check_args(args):
    """Refuse flags that do not fit one another."""
    runner.check_run(args)
    by_critics, phases = args.uncertainty == "critics", (args.teacher_updates, args.student_updates)
    learns = not (by_critics or args.student)
    runner.refuse({
        "--chunk must be a multiple of --policy-delay": args.chunk % args.policy_delay == 0,
        "--chunk must divide --teacher-updates and --student-updates":
            not learns or all(total % args.chunk == 0 for total in phases),
        "--model-hidden-sizes must be multiples of --group-size":
            by_critics or all(width % (args.group_size or 1) == 0 for width in args.model_hidden_sizes),
        "--group-size must not be 1: a feature alone is always 0": by_critics or args.group_size != 1,
        "--beta must be above 0 and below 1": 0 < args.beta < 1,
        "--gamma, --tau and --student-tau must be above 0": min(args.gamma, args.tau, args.student_tau) > 0,
        "--nodes and --num-samples must be 2 or more": min(args.nodes, args.num_samples) >= 2,
        "--num-levels must be 3 or more": not learns or args.num_levels >= 3,
        "--uncertainty critics needs --num-critics 2 or more": not by_critics or args.num_critics > 1,
        "--student goes with --uncertainty consistency alone": not (by_critics and args.student),
        "--penalty product goes with --uncertainty consistency: 1 / H of critics has no size":
            not (by_critics and args.penalty == "product"),
    })  # fmt: skip


def idle_flags(args):
    """Flags without effect beside the others, and why."""
    other = ("alpha", "weight") if args.penalty == "excess" else ("kappa",)
    idle = dict.fromkeys(other, f"it is not for --penalty {args.penalty}")
    if args.uncertainty == "critics":
        names = "window window_step max_windows min_entries model_hidden_sizes group_size model_batch_size teacher_lr "
        names += "student_lr num_levels student_tau teacher_updates student_updates holdout spread nodes num_samples"
        idle |= dict.fromkeys(names.split(), "H is the critics'; add --uncertainty consistency")
    else:
        idle["num_samples" if args.spread == "gh" else "nodes"] = f"it is not for --spread {args.spread}"
    if args.student:
        names = "model_batch_size teacher_lr student_lr num_levels student_tau teacher_updates student_updates"
        idle |= dict.fromkeys(names.split(), "--student is learnt already")
    if args.actor_loss == "awr":
        idle |= dict.fromkeys(("gamma_ent", "q_from", "q_norm"), "only --actor-loss q uses it")
    return idle


def student_identity(args, buffer):
    """What a student belongs to: the data, and the flags behind D_Q and its network that shapes do not show."""
    names = ("gamma", "max_windows", "reward_shift", "scale_rewards", "normalize", "angles", "group_size", "holdout")
    windows = list(window_sizes(args, buffer.metadata["episode_length"]))
    data = envs.buffers.digests(buffer, runner.DIGESTED)
    return {name: getattr(args, name) for name in names} | {"windows": windows, "data": data}


def learn_model(run, teacher, student, keys, entries, held):
    """Lines (2), (3): the teachers, then the students of all seeds -> QModel [S]."""
    args = run.args
    state = jax.eval_shape(teacher.init, keys[0])
    teach = run.compile(teacher.chunk, state, entries)
    distil = run.compile(student.chunk, jax.eval_shape(student.init, keys[1], state.nets.net), state.nets.net, entries)
    judge = jax.jit(functools.partial(fit_metrics, args=args))

    state = run.restore(teacher.init, keys[0], phase="teacher")
    for step in run.chunks("teacher step", args.teacher_updates, state.num_updates):
        state, metrics = teach(state, entries)
        run.progress(step, metrics, metrics)
        if run.due(step):
            run.log(step, metrics)
        run.save(state)

    net = state.nets.net
    state = run.restore(student.init, keys[1], net, phase="student")
    for step in run.chunks("student step", args.student_updates, state.num_updates):
        state, metrics = distil(state, net, entries)
        run.progress(step, metrics, metrics)
        if run.due(step):
            run.log(step, metrics | judge(q_models(state.nets.net, entries, args), entries, held, keys[2]))
        run.save(state)
    return q_models(state.nets.net, entries, args)


def main(args):
    """Build D_Q, learn its distribution, train the policy, write both and figures -> scores."""
    check_args(args)
    buffer, task = runner.open_task("qdq", args, Transitions._fields)
    envs.buffers.check_raw_columns(buffer["observations"], args.normalize, "--normalize")
    args = runner.with_angles(args, task)
    data, see = qdq_data(buffer, args)
    teacher, student, agent = make_train(args, data.observations.shape[1], task.action_size)
    keys, eval_keys = runner.seed_keys(args, 3), runner.evaluation_keys(args)
    act = lambda actor, s, key: policy(actor, see(s), args)[0]
    evaluate = runner.each_seed(runner.returns_of(act, envs.make(task, args.backend), task, buffer, args), args)

    model, belongs, given = None, {}, {}
    if args.uncertainty != "critics":
        entries, held = q_entries(buffer, data, args)
        belongs = student_identity(args, buffer)
        model = q_models(jax.eval_shape(teacher.init, keys[0]).nets.net, entries, args)  # shapes, until it is learnt
        if args.student:
            model = runner.read_learnt("--student", args.student, model, belongs)
            weights = np.concatenate([np.ravel(x) for x in jax.tree.leaves(model)])
            given = {"student": envs.buffers.sha256(weights)}  # what a resumed run must find, wherever its file lies
    judge = jax.jit(functools.partial(h_metrics, args=args))

    remedy = "raise --gamma-ent" + (", say --penalty excess" if args.penalty == "product" else "")
    with runner.Run("qdq", args, task, buffer, remedy=remedy, **given) as run:
        train_chunk = run.compile(agent.chunk, jax.eval_shape(agent.init, keys[2]), model, data)
        if args.uncertainty != "critics":
            if not args.student:
                model = learn_model(run, teacher, student, (*keys[:2], eval_keys), entries, held)  # lines (2), (3)
            run.write_policy("q_consistency", model, "q_model.npz", **belongs)
        state = run.restore(agent.init, keys[2])
        for step in run.chunks("update", args.num_updates, state.num_updates):
            state, metrics = train_chunk(state, model, data)  # lines (4) to (7)
            run.progress(step, metrics, SHOWN)
            if run.due(step):
                run.log(step, metrics | judge(model, state.nets, data) | evaluate(state.nets.actor, eval_keys))
            run.save(state)

        params = {k: x for k, x in state.nets.actor["params"].items() if k != "log_std"}
        run.write_policy("tanh_deterministic", {"actor": {"params": params}, **see.stored(args.num_seeds)})
        return run.finish(TRAINING)


if __name__ == "__main__":
    runner.launch(main, Args, preset, ("cpu", "ours", "published", *PUBLISHED), __doc__, idle=idle_flags)
