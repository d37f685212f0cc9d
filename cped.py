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
  D1  paper, codes: one density of (s, a), NICE; here: of a given s, affine couplings with bounded log scales. Only
      d/da log p matters to the actor, and p(s) wastes capacity (--flow nice for theirs).
  D2  codes' NICE samples by an inverse that is none (scale applied last, not first); here: exact.
  D3  codes mix the penalty's x~ by N(0, 1), and reseed in every call, so that x~'s weights and the target noise repeat;
      here: U(0, 1), fresh keys.
  D4  codes: raw observations; here: standardised for all networks (--no-normalize),
      and angles that go round as sine and cosine (--angles).
  D5  codes: the likelihood of the data's actions; here: of actions + N(0, 0.05^2), so that mass on the boundary
      cannot drive it, and the actor's gradient, to infinity.
  D6  codes: the flow's Adam with b2 = 0.01, eps = 1e-4, no clip; here: 0.999, 1e-8, gradient norm <= 10.
  D7  codes: a~ may leave [-1, 1], targets start as other networks than those they follow; here: clipped, copies.
  D8  paper: alpha by dual ascent, eps a threshold; codes: a table of alpha, and eps a constant to the gradient; here:
      the table, by shares of num_updates, as C24's formula is right for T0 = 500k alone (--constraint for the paper's).
  D9  paper: the flow learns in both loops; C24: frozen after the first; here: frozen (--flow-in-rl).
  D10 codes: raw rewards and Q, the first 5 to 8 % of the run only clone; here: rewards / rms, Q / mean |Q|, no cloning.
  D11 codes skip steps at a nan or a loss above 1e7; here: at a gradient not finite; after 100 in a row the run stops.
  D12 codes: PyTorch's default weights; here: Xavier-uniform for actor, critics and conditional flow.
  D13 paper: D has one output; codes and here: d = S + A outputs, losses take their mean and the penalty their sum, so
      that the adversarial term has 1/d of eq. 4's weight; the densities are no worse (--disc-outputs one for eq. 4).
  D14 codes: learn from all rows; here: 1000 are kept to judge the density on.
      Presets of D4RL's sets are the codes' in D1, D4, D5, D6, D10 and D14.

Files      reads a buffer with task rewards (docs/buffer.md); writes runs/cped/<task>/, with policy.npz (docs/policy.md)
Run        python cped.py --quick                         (point robot, under 2 minutes on 2 cores)
           python cped.py --dataset runs/udg_select/ant-angle-60/top1-size50000.npz --preset cpu
           python cped.py --dataset runs/udg_select/ant-angle-60/top1.npz --num-seeds 5    (1M updates)
Expect     --quick: return 94 (data: mean -0.2, best 93.9), 40 s of one core; --preset cpu on 50k rows of ant-angle-60,
           top 1 of an older source: 206, 215 and 198 in 200 steps (data 117, clone 170); more in docs/cped.md
"""

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
    flow_updates: runner.Count = 500_000
    """T0: iterations of the flow's training; the flow itself steps in every disc_ratio-th (C24: 500k)"""
    num_updates: runner.Count = 1_000_000
    """critic steps per seed; the actor steps in every policy_delay-th (C24: 1M)"""
    chunk: runner.Count = 1_000
    """iterations in one jitted call; a multiple of disc_ratio and policy_delay, a divisor of eval_every"""
    # --- flow ---
    flow: Literal["cond", "nice"] = "cond"
    """cond: density of a given s, affine couplings; nice: of (s, a), additive couplings (codes; D1)"""
    flow_layers: runner.Count = 4
    """L: coupling layers (C24: 4, C23: 2)"""
    flow_hidden_sizes: tuple[runner.Count, ...] = (256, 256)
    """widths inside a coupling layer (codes: 750, 750 for nice)"""
    prior: Literal["logistic", "gaussian"] = "logistic"
    """density of z, per coordinate (codes: logistic)"""
    log_scale_cap: runner.Size = 2.0
    """bound of a coupling's log scales (ours, D1); the whitening's own are bounded by action_noise alone"""
    action_noise: runner.Rate = 0.05
    """std of the noise on the actions whose likelihood is raised (ours, D5; codes: 0)"""
    nll_weight: runner.Rate = 1.0
    """weight of the likelihood in the flow's loss; 0: adversarial only (codes: 1)"""
    adv_weight: runner.Rate = 1.0
    """weight of the discriminator in it; 0: maximum likelihood only, no discriminator (codes: 1)"""
    gp_weight: runner.Rate = 0.5
    """weight of the gradient penalty (codes: 0.5, usual: 10)"""
    disc_outputs: Literal["one", "many"] = "many"
    """many: S + A outputs, whose mean counts at 1 / (S + A) of eq. 4's weight (codes; D13); one: a scalar D (eq. 4)"""
    disc_ratio: runner.Count = 5
    """discriminator steps per flow step (C24: 5)"""
    flow_lr: runner.Rate = 1e-4
    """Adam rate of the flow (codes: 1e-4)"""
    disc_lr: runner.Rate = 1e-4
    """Adam rate of the discriminator (C24: 1e-4, C23: 1e-5)"""
    flow_adam: tuple[runner.Rate, runner.Rate] = (0.999, 1e-8)
    """b2 and eps of the flow's Adam (ours, D6; codes: 0.01, 1e-4)"""
    max_grad_norm: runner.Size = 10.0
    """the flow's gradient is scaled down to this norm (ours, D6; codes: not at all)"""
    flow_in_rl: bool = False
    """let the flow learn on, one pass of (1), (2) after each actor step (paper, D9)"""
    # --- constraint ---
    constraint: Literal["schedule", "hinge", "dual"] = "schedule"
    """schedule: alpha * nll; hinge: alpha * max(nll - eps, 0); dual: alpha grows while nll > eps (D8)"""
    alphas: tuple[runner.Rate, ...] = (0.1, 0.03, 0.01)
    """alpha from each share of the run in alpha_from on; dual starts at the first (ours; D4RL: C24's)"""
    alpha_from: tuple[runner.Share, ...] = (0.0, 0.1, 0.3)
    """shares of num_updates at which the alphas begin, the first 0"""
    eps_quantile: runner.Share = 0.9
    """eps: this quantile of the data's nll, for hinge and dual (ours)"""
    alpha_lr: runner.Rate = 1e-3
    """Adam rate of log alpha in the dual form, which stays within +-7 (ours)"""
    q_norm: Literal["none", "size", "spread"] = "size"
    """what Q is divided by in the actor's loss: mean magnitude or std over the batch (ours, D10; codes: none)"""
    critic_from: runner.Share = 0.0
    """share of num_updates during which the critics stay as they are (C24: 0.03, AntMaze to 0.05)"""
    q_from: runner.Share = 0.0
    """share of num_updates during which the actor only clones, without Q (C24: 0.05, AntMaze to 0.08)"""
    bc_only: bool = False
    """the baseline: the actor climbs the density alone for the whole run, no critics"""
    # --- actor-critic ---
    normalize: bool = True
    """standardise observations by the data's mean and std (ours, D4)"""
    angles: str = "task"
    """observed angles that go round, whose sine and cosine all networks see: task (its own), none, or columns such as
    1,4 (ours, D4)"""
    hidden_sizes: tuple[runner.Count, ...] = (256, 256)
    """widths of actor and critics (codes: 256, 256)"""
    scale_rewards: bool = True
    """divide rewards by their root mean square, so that any unit gives the same run (ours, D10)"""
    batch_size: runner.Count = 256
    """B: rows per update, of flow, discriminator, actor and critics (codes: 256)"""
    actor_lr: runner.Rate = 1e-4
    """Adam rate of the actor (codes: 1e-4, AntMaze 3e-4)"""
    critic_lr: runner.Rate = 3e-4
    """Adam rate of the critics (codes: 3e-4)"""
    gamma: runner.Share = 0.99
    """discount (codes: 0.99)"""
    tau: runner.Share = 0.005
    """Polyak rate of actor and critics, once per actor step (codes: 0.005)"""
    policy_delay: runner.Count = 2
    """critic steps per actor step (codes: 2)"""
    target_noise: runner.Rate = 0.2
    """std of the noise on the target's action (codes: 0.2)"""
    target_noise_clip: runner.Rate = 0.5
    """its bound (codes: 0.5)"""
    reward_shift: float = 0.0
    """added to every reward (C24: -1 for AntMaze)"""
    holdout_rows: runner.Natural = 1_000
    """rows, at most a tenth, kept from all training to judge the density on (ours, D14; codes: 0)"""


CODE = {  # what the released code does on any data, but for the deviations that have no flag
    "flow": "nice", "flow_hidden_sizes": (750, 750), "action_noise": 0.0, "normalize": False, "angles": "none",
    "scale_rewards": False, "disc_outputs": "many", "flow_adam": (0.01, 1e-4), "max_grad_norm": 1e9, "q_norm": "none",
    "holdout_rows": 0,
}  # fmt: skip
MUJOCO = CODE | {  # C24: phases and alpha in shares of 1M updates after T0 = 500k
    "alphas": (1000.0, 10.0, 7.5, 5.0, 2.5, 1.5), "alpha_from": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    "critic_from": 0.03, "q_from": 0.05, "actor_lr": 1e-4,
}  # fmt: skip
ANTMAZE = CODE | {  # C24: T0 = 300k, 700k updates after it
    "alphas": (0.25, 0.1, 0.08), "alpha_from": (0.0, 2 / 7, 5 / 7), "critic_from": 3 / 70, "q_from": 5 / 70,
    "actor_lr": 3e-4, "reward_shift": -1.0, "flow_updates": 300_000, "num_updates": 700_000,
}  # fmt: skip
ANTMAZE_LARGE = ANTMAZE | {  # C24 for the large mazes: T0 = 400k (or 500k), 600k updates after it
    "alpha_from": (0.0, 1 / 6, 4 / 6), "critic_from": 3 / 60, "q_from": 5 / 60,
    "flow_updates": 400_000, "num_updates": 600_000,
}  # fmt: skip
KINDS = ("medium-v2", "medium-replay-v2", "medium-expert-v2")
ROBOTS = [f"{robot}-{kind}" for robot in ("halfcheetah", "hopper", "walker2d") for kind in KINDS]
MAZES = [f"antmaze-{maze}-v2" for maze in ("umaze", "umaze-diverse", "medium-play", "medium-diverse")]
LARGE = ("antmaze-large-play-v2", "antmaze-large-diverse-v2")
PUBLISHED = dict.fromkeys(ROBOTS, MUJOCO) | dict.fromkeys(MAZES, ANTMAZE) | dict.fromkeys(LARGE, ANTMAZE_LARGE)
CPU = {
    "flow_updates": 20_000, "num_updates": 20_000, "eval_every": 2_000, "flow_lr": 3e-4, "disc_lr": 3e-4,
    "actor_lr": 3e-4, "tau": 0.02,
}  # fmt: skip
BUDGETS = {"cpu": CPU, "published": {}}
QUICK = {
    "flow_updates": 5_000, "num_updates": 6_000, "chunk": 500, "eval_every": 1_000, "flow_hidden_sizes": (64, 64),
    "hidden_sizes": (64, 64), "flow_lr": 1e-3, "disc_lr": 1e-3, "actor_lr": 1e-3, "critic_lr": 1e-3,
}  # fmt: skip
SHOWN = ("train/actor_loss", "train/nll_pi", "train/nll_data")  # in the progress line
TRAINING = (  # panels of training.png
    ({"flow/nll_data": "training rows", "flow/nll_holdout": "held-out rows"}, "fit of the flow", "-log p", "linear"),
    ({"train/nll_pi": "policy", "train/nll_data": "data, mean", "train/nll_data_p95": "data, 95 %"},
     "policy against data, mean over seeds", "-log p", "linear"),
    ("train/alpha", "weight of the constraint", "alpha", "semilogy"),
    ("train/q", "critics on the data", "mean Q", "linear"),
)  # fmt: skip


# === data ===


class Transitions(NamedTuple):
    """Rows to learn from; any leading axes, features last."""

    observations: jax.Array  # [.., S]
    actions: jax.Array  # [.., A]
    rewards: jax.Array  # [..]
    next_observations: jax.Array  # [.., S]
    terminals: jax.Array  # [..] 1.0 where the episode ended by itself: no bootstrap; 0.0 at a time limit


class CpedData(NamedTuple):
    """The buffer in random order, observations standardised, some rows held out."""

    rows: Transitions  # [N]
    holdout: Transitions  # [H] rows that nothing learns from
    log_probs: jax.Array | None  # [H] log p(a | s) of the behaviour there, where the buffer has it and f is of it


def sample_batches(data, key, num, batch_size):
    """`num` batches of rows of the data, uniformly with replacement: leaves [num, B, ..]."""
    index = jax.random.randint(key, (num, batch_size), 0, data.rewards.shape[0])
    return jax.tree.map(lambda x: x[index], data)


def cped_data(buffer, args):
    """Buffer, or dict of its columns -> CpedData, and what networks see of observations, in units of all rows."""
    rows = Transitions(*(np.asarray(buffer[name], np.float32) for name in Transitions._fields))
    num_rows, angles = len(rows.rewards), envs.buffers.angle_columns(args.angles)
    scale = envs.buffers.standard_scale(envs.buffers.turned(rows.observations, angles))
    see = envs.buffers.Sight(*(scale if args.normalize else (0 * scale[0], 0 * scale[1] + 1)), angles)  # D4
    rewards = rows.rewards + np.float32(args.reward_shift)
    if args.scale_rewards:  # D10
        size = np.sqrt(np.mean(np.square(rewards, dtype=np.float64)))
        rewards = rewards * np.float32(1 / max(size, np.finfo(np.float32).tiny))
    rows = Transitions(see(rows.observations), rows.actions, rewards, see(rows.next_observations), rows.terminals)
    order = np.random.default_rng(0).permutation(num_rows)  # one split for all seeds
    held, kept = np.split(order, [min(args.holdout_rows, num_rows // 10)])  # D14
    take = lambda index: jax.tree.map(lambda x: jnp.asarray(x[index]), rows)
    known = buffer.get("action_log_probs") if args.flow == "cond" else None
    return CpedData(take(kept), take(held), None if known is None else jnp.asarray(known[held])), see


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


def within(bound):
    """Initialiser: uniform between -bound and bound."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


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


class NiceShift(nn.Module):
    """Fully connected, leaky ReLU after every layer, the last one too (codes); close to 0 at the start."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.leaky_relu(nn.Dense(width, kernel_init=within(0.01))(x))
        return x


def nice_init(key, num_inputs, args):
    """NICE on x = (s, a), which starts close to the identity."""
    halves, layers = (num_inputs // 2, num_inputs - num_inputs // 2), []
    for i, key_layer in enumerate(jax.random.split(key, args.flow_layers)):
        reads, moves = halves if i % 2 == 0 else halves[::-1]
        layers.append(NiceShift((*args.flow_hidden_sizes, moves)).init(key_layer, jnp.zeros(reads)))
    return {"layers": layers, "log_scale": jnp.zeros(num_inputs)}


def nice_halves(flow, x, args, sign=1):
    """The halves of x shift each other in turn, a layer each; sign -1: backwards."""
    a, b = jnp.split(x, [x.shape[-1] // 2], -1)
    shift = lambda layer, reads, moves: NiceShift((*args.flow_hidden_sizes, moves.shape[-1])).apply(layer, reads)
    for i, layer in list(enumerate(flow["layers"]))[::sign]:
        a, b = (a, b + sign * shift(layer, a, b)) if i % 2 == 0 else (a + sign * shift(layer, b, a), b)
    return jnp.concatenate([a, b], -1)


def nice_forward(flow, observations, actions, args):
    """z = f(s, a) and log |det df/dx|, one number for all x."""
    x = nice_halves(flow, jnp.concatenate([observations, actions], -1), args)
    return x * jnp.exp(flow["log_scale"]), jnp.sum(flow["log_scale"])


def nice_inverse(flow, observations, z, args):
    """(s, a) = f^-1(z): first the scale, then the halves backwards; only the observations' size counts -> s, a."""
    x = nice_halves(flow, z * jnp.exp(-flow["log_scale"]), args, -1)  # D2
    return jnp.split(x, [observations.shape[-1]], -1)


def flow_forward(flow, observations, actions, args):
    """z = f(a; s), or f(s, a) for nice, and log |det df|."""  # D1
    return (cond_forward if args.flow == "cond" else nice_forward)(flow, observations, actions, args)


def flow_inverse(flow, observations, z, args):
    """f^-1: s as given and a = f^-1(z; s), or both from z for nice -> s, a."""
    return (cond_inverse if args.flow == "cond" else nice_inverse)(flow, observations, z, args)


def flow_nll(flow, observations, actions, args):
    """-log p(a | s) [..], or -log p(s, a) for nice: -(log prior(z) + log |det df|); logistic: z - 2 softplus(z)."""
    z, logdet = flow_forward(flow, observations, actions, args)
    normal = -0.5 * z**2 - 0.5 * jnp.log(2 * jnp.pi)
    log_prior = z - 2.0 * nn.softplus(z) if args.prior == "logistic" else normal
    return -(log_prior.sum(-1) + logdet)


def flow_sample(flow, observations, action_size, key, args):
    """The generator: fake x = (s, f^-1(z; s)), or f^-1(z) for nice, z ~ prior -> [B, S + A]."""
    draw = jax.random.logistic if args.prior == "logistic" else jax.random.normal
    size = action_size + (observations.shape[-1] if args.flow == "nice" else 0)
    z = draw(key, (*observations.shape[:-1], size))
    return jnp.concatenate(flow_inverse(flow, observations, z, args), -1)


class Discriminator(nn.Module):
    """D(x) [.., 1], or [.., d] of which the mean counts: d -> 2 d -> 4 d -> 1 or d, layer norms without gain (C24)."""

    outputs: Literal["one", "many"]

    @nn.compact
    def __call__(self, x):
        size = x.shape[-1]
        for width in (2 * size, 4 * size):
            x = nn.Dense(width, kernel_init=within(width**-0.5), bias_init=nn.initializers.constant(0.1))(x)
            x = (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True, ddof=1) + 1e-6)
            x = nn.leaky_relu(x + self.param(f"centre_{width}", nn.initializers.zeros, (width,)))
        outputs = size if self.outputs == "many" else 1  # D13
        return nn.Dense(outputs, kernel_init=within(3e-3), bias_init=within(3e-3))(x)


# === losses ===


def wgan_loss(disc, real, fake, mix, args):
    """Line (1): mean D(fake) - mean D(real) + gp_weight * mean_B (||grad_x sum_o D_o(x~)||_2 - 1)^2.

    x~ = mix real + (1 - mix) fake; real, fake [B, S + A], mix [B, 1] -> scalar, metrics.
    """
    net = Discriminator(args.disc_outputs)
    values = net.apply(disc, jnp.concatenate([fake, real])).reshape(2, -1).mean(-1)
    gap = values[1] - values[0]
    x = mix * real + (1 - mix) * fake
    grads = jax.grad(lambda x: net.apply(disc, x).sum())(x)  # rows do not meet in D: one gradient each
    penalty = jnp.mean((jnp.linalg.norm(grads, axis=-1) - 1.0) ** 2)
    return args.gp_weight * penalty - gap, {"flow/disc_gap": gap, "flow/gradient_penalty": penalty}


def cped_disc_loss(disc, flow, batch, key, args):
    """Line (1) on a batch, with fresh fakes -> scalar, metrics."""
    key_fake, key_mix, _ = jax.random.split(key, 3)
    real = jnp.concatenate([batch.observations, batch.actions], -1)
    fake = flow_sample(flow, batch.observations, batch.actions.shape[-1], key_fake, args)
    mix = jax.random.uniform(key_mix, (len(real), 1))  # D3
    return wgan_loss(disc, real, jax.lax.stop_gradient(fake), mix, args)


def cped_flow_loss(flow, disc, batch, key, args):
    """Line (2): nll_weight * mean -log p(a + noise | s) - adv_weight * mean D(s, a^) -> scalar, metrics."""
    key_fake, _, key_noise = jax.random.split(key, 3)  # as in D's loss: with its key, its fakes
    noise = args.action_noise * jax.random.normal(key_noise, batch.actions.shape)  # D5
    loss, metrics = 0.0, {}
    if args.nll_weight:
        nll = flow_nll(flow, batch.observations, batch.actions + noise, args).mean()
        loss, metrics = args.nll_weight * nll, {"flow/nll": nll}
    if args.adv_weight:
        fake = flow_sample(flow, batch.observations, batch.actions.shape[-1], key_fake, args)
        adv = -Discriminator(args.disc_outputs).apply(disc, fake).mean()
        loss, metrics = loss + args.adv_weight * adv, metrics | {"flow/adversarial": adv}
    return loss, metrics


def cped_critic_loss(critic, target_critic, target_actor, batch, key, args):
    """Line (3): sum_i mean_B (Q_i(s, a) - y)^2, y = r + gamma (1 - terminal) min_i Q_i'(s', a~) -> scalar, metrics."""
    next_actions = act(target_actor, batch.next_observations, args, batch.actions.shape[-1])
    noise = args.target_noise * jax.random.normal(key, next_actions.shape)
    noise = jnp.clip(noise, -args.target_noise_clip, args.target_noise_clip)
    next_actions = jnp.clip(next_actions + noise, -1.0, 1.0)  # D7
    critics = Critics(args.hidden_sizes)
    next_q = critics.apply(target_critic, batch.next_observations, next_actions).min(0)
    y = jax.lax.stop_gradient(batch.rewards + args.gamma * (1 - batch.terminals) * next_q)
    q = critics.apply(critic, batch.observations, batch.actions)
    chex.assert_equal_shape([q[0], y])
    loss = jnp.sum(jnp.mean((q - y) ** 2, -1))
    return loss, {"train/critic_loss": loss, "train/q": q.mean(), "train/target": y.mean()}


def lagrangian(q, nll, alpha, eps, args):
    """Line (4): -mean q + alpha mean nll, with hinge -mean q + alpha mean max(nll - eps, 0); q, nll [B]."""
    norm = {"none": 1.0, "size": jnp.abs(q).mean() + 1e-6, "spread": q.std() + 1e-6}[args.q_norm]  # D10
    q = q / jax.lax.stop_gradient(norm)
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
    return loss, {"train/actor_loss": loss, "train/nll_pi": nll.mean(), "train/q_pi": q.mean(), "train/alpha": alpha}


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
    """Adam of flow, D, actor, critics and log alpha."""
    b2, eps = args.flow_adam
    flow = optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.adam(args.flow_lr, b2=b2, eps=eps))  # D6
    all_five = flow, *map(optax.adam, (args.disc_lr, args.actor_lr, args.critic_lr, args.alpha_lr))
    return tuple(optax.apply_if_finite(one, np.iinfo(np.int32).max) for one in all_five)  # D11


def alpha_at(step, args):
    """The table's alpha at an update: the last of those that have begun."""  # D8
    starts = jnp.array([round(share * args.num_updates) for share in args.alpha_from])
    return jnp.array(args.alphas)[jnp.sum(step >= starts) - 1]


def cped_step(optimiser, grads, opt, params):
    """One step down the gradient, none where any of it is not finite -> params, optimiser state."""
    change, opt = optimiser.update(grads, opt)
    return optax.apply_updates(params, change), opt


def cped_flow_update(nets, rows, key, args):
    """Lines (1), (2); the flow has the batch and the fakes of D's last step -> nets, metrics."""
    key_batch, key_loss = jax.random.split(key)
    flow_adam, disc_adam, *_ = cped_optimisers(args)
    num = args.disc_ratio if args.adv_weight else 1
    batches, keys = sample_batches(rows, key_batch, num, args.batch_size), jax.random.split(key_loss, num)

    def disc_step(carry, xs):
        grads, metrics = jax.grad(cped_disc_loss, has_aux=True)(carry[0], nets.flow, *xs, args)
        return cped_step(disc_adam, grads, carry[1], carry[0]), metrics

    metrics = {}
    if args.adv_weight:
        (disc, disc_opt), metrics = jax.lax.scan(disc_step, (nets.disc, nets.disc_opt), (batches, keys))
        nets = nets._replace(disc=disc, disc_opt=disc_opt)

    last = jax.tree.map(lambda x: x[-1], (batches, keys))
    grads, flow_metrics = jax.grad(cped_flow_loss, has_aux=True)(nets.flow, nets.disc, *last, args)
    flow, flow_opt = cped_step(flow_adam, grads, nets.flow_opt, nets.flow)
    return nets._replace(flow=flow, flow_opt=flow_opt), jax.tree.map(jnp.mean, metrics) | flow_metrics


def cped_update(nets, rows, eps, step, key, args):
    """Lines (3) to (5), the actor on the critics' last batch; `step`: critic steps before these -> nets, metrics."""
    key_batch, key_noise, key_flow = jax.random.split(key, 3)
    _, _, actor_adam, critic_adam, alpha_adam = cped_optimisers(args)
    batches = sample_batches(rows, key_batch, args.policy_delay, args.batch_size)
    keys = jax.random.split(key_noise, args.policy_delay)

    def critic_step(carry, xs):
        inputs = nets.target_critic, nets.target_actor, *xs, args
        grads, metrics = jax.grad(cped_critic_loss, has_aux=True)(carry[0], *inputs)
        return cped_step(critic_adam, grads, carry[1], carry[0]), metrics

    metrics = {}
    if not args.bc_only:
        critics = nets.critic, nets.critic_opt
        after, metrics = jax.lax.scan(critic_step, critics, (batches, keys))
        if args.critic_from:  # until then neither the critics nor their Adam's moments move
            started = step >= round(args.critic_from * args.num_updates)
            after = jax.tree.map(lambda new, old: jnp.where(started, new, old), after, critics)
        nets = nets._replace(critic=after[0], critic_opt=after[1])

    batch = jax.tree.map(lambda x: x[-1], batches)
    alpha = jnp.exp(nets.log_alpha) if args.constraint == "dual" else alpha_at(step, args)
    with_q = jnp.float32(step >= round(args.q_from * args.num_updates))
    inputs = nets.critic, nets.flow, alpha, eps, with_q, batch, args
    grads, actor_metrics = jax.grad(cped_actor_loss, has_aux=True)(nets.actor, *inputs)
    actor, actor_opt = cped_step(actor_adam, grads, nets.actor_opt, nets.actor)
    nets = nets._replace(actor=actor, actor_opt=actor_opt)
    if args.constraint == "dual":
        grad = eps - actor_metrics["train/nll_pi"]  # D8: ascent in log alpha, which grows while nll is above eps
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


def density_metrics(flow, data, args):
    """How well the flow fits: nll of 4096 training rows and of those held out, without noise; its round trip.

    Where the behaviour's density is known: kl = mean log p_true - log p, in nats, and the correlation of the two.
    """
    seen, held = jax.tree.map(lambda x: x[:4096], data.rows), data.holdout
    nll = flow_nll(flow, seen.observations, seen.actions, args)
    back = flow_inverse(flow, seen.observations, flow_forward(flow, seen.observations, seen.actions, args)[0], args)[1]
    metrics = {"flow/nll_data": nll.mean(), "flow/round_trip": jnp.abs(back - seen.actions).max()}
    if not len(held.rewards):
        return metrics
    log_p = -flow_nll(flow, held.observations, held.actions, args)
    metrics["flow/nll_holdout"] = -log_p.mean()
    if data.log_probs is not None:
        metrics["flow/kl"] = jnp.mean(data.log_probs - log_p)
        metrics["flow/correlation"] = jnp.corrcoef(data.log_probs, log_p)[0, 1]
    return metrics


# === training ===


class CpedState(NamedTuple):
    """What a run needs to go on, in both phases; all leaves have a leading seed axis."""

    key: jax.Array
    num_updates: jax.Array  # iterations of the present phase
    nets: CpedNets


def cped_init(key, data, args):
    """Fresh networks of one seed; targets are copies -> CpedState."""  # D7, D12
    key, key_flow, key_disc, key_actor, key_critic = jax.random.split(key, 5)
    num_obs, size = data.rows.observations.shape[-1], data.rows.actions.shape[-1]
    obs, actions, log_alpha = jnp.zeros(num_obs), jnp.zeros(size), jnp.log(jnp.float32(args.alphas[0]))
    if args.flow == "cond":
        flow = cond_init(key_flow, data.rows.actions, num_obs, args)
    else:
        flow = nice_init(key_flow, num_obs + size, args)
    disc = Discriminator(args.disc_outputs).init(key_disc, jnp.zeros(num_obs + size))
    actor = MLP((*args.hidden_sizes, size)).init(key_actor, obs)
    critic = Critics(args.hidden_sizes).init(key_critic, obs, actions)
    params = flow, disc, actor, critic, log_alpha
    opts = [opt.init(p) for opt, p in zip(cped_optimisers(args), params, strict=True)]
    nets = CpedNets(*params[:4], *jax.tree.map(jnp.copy, (actor, critic)), log_alpha, *opts)
    return CpedState(key, jnp.int32(0), nets)


def chunk_means(metrics, nets, phase):
    """Means of {name: [steps]} over the finite steps of a chunk; steps skipped so far, nan after 100 in a row (D11)."""
    opts = [opt for opt in nets if isinstance(opt, optax.ApplyIfFiniteState)]
    now, ever = jnp.array([(opt.notfinite_count, opt.total_notfinite) for opt in opts]).T
    skipped = jnp.where(now.max() > 100, jnp.nan, ever.sum())
    return {k: x.mean(where=jnp.isfinite(x)) for k, x in metrics.items()} | {f"{phase}/skipped": skipped}


def make_train(args):
    """-> init(keys [S], data), flow_chunk(state, data), train_chunk(state, data) -> state, metrics [S]."""

    def one_flow_chunk(state, data):
        key, key_updates = jax.random.split(state.key)
        keys = jax.random.split(key_updates, args.chunk // args.disc_ratio)
        step = lambda nets, key: cped_flow_update(nets, data.rows, key, args)
        nets, metrics = jax.lax.scan(step, state.nets, keys)
        return CpedState(key, state.num_updates + args.chunk, nets), chunk_means(metrics, nets, "flow")

    def one_train_chunk(state, data):
        key, key_updates = jax.random.split(state.key)
        keys = jax.random.split(key_updates, args.chunk // args.policy_delay)
        steps = state.num_updates + args.policy_delay * jnp.arange(len(keys))
        rows = jax.tree.map(lambda x: x[:4096], data.rows)
        nll = flow_nll(state.nets.flow, rows.observations, rows.actions, args)
        eps = jnp.quantile(nll, args.eps_quantile)
        step = lambda nets, xs: cped_update(nets, data.rows, eps, *xs, args)
        nets, metrics = jax.lax.scan(step, state.nets, (steps, keys))
        metrics = chunk_means(metrics, nets, "train") | {"train/nll_data": nll.mean(), "train/eps": eps}
        metrics["train/nll_data_p95"] = jnp.quantile(nll, 0.95)
        return CpedState(key, state.num_updates + args.chunk, nets), metrics

    over_seeds = lambda one: lambda state, data: runner.map_seeds(lambda state: one(state, data), state, args)
    init = jax.jit(over_seeds(lambda key, data: cped_init(key, data, args)))
    flow_chunk, train_chunk = (jax.jit(over_seeds(one), donate_argnums=0) for one in (one_flow_chunk, one_train_chunk))
    return init, flow_chunk, train_chunk


# === run ===


def preset(args):
    """--quick, or what is published for D4RL's sets, ours for others, with --preset on top -> name, {field: value}."""
    return runner.preset(args, PUBLISHED, BUDGETS, QUICK, MUJOCO if args.preset == "published" else {})


def check_args(args):
    """Refuse flags that do not fit one another."""
    runner.check_run(args)
    starts, totals = args.alpha_from, (args.eval_every, args.flow_updates, args.num_updates)
    runner.refuse({
        "--chunk must be a multiple of --disc-ratio and of --policy-delay":
            args.chunk % args.disc_ratio == args.chunk % args.policy_delay == 0,
        "--chunk must divide --eval-every, --flow-updates and --num-updates":
            all(total % args.chunk == 0 for total in totals),
        "--alphas and --alpha-from must be as many, the shares rising from 0 to less than 1":
            args.constraint == "dual" or (len(args.alphas) == len(starts)
            and starts[0] == 0 and sorted(starts) == list(starts) and starts[-1] < 1),
        "--alphas: the first must be positive with --constraint dual": args.constraint != "dual" or args.alphas[0] > 0,
        "--nll-weight, --adv-weight: one of them must be positive": max(args.nll_weight, args.adv_weight) > 0,
        "--eps-quantile must be above 0 and below 1": 0 < args.eps_quantile < 1,
        "--flow-layers must be 2 or more, so that every coordinate is moved": args.flow_layers >= 2,
        "--flow-adam: b2 must be below 1, eps above 0": args.flow_adam[0] < 1 and args.flow_adam[1] > 0,
    })  # fmt: skip


def idle_flags(args):
    """Flags without effect beside the others, and why."""
    idle = {} if args.adv_weight else dict.fromkeys(("gp_weight", "disc_outputs", "disc_lr"), "--adv-weight is 0")
    idle |= {"eps_quantile": "only --constraint hinge and dual use it"} if args.constraint == "schedule" else {}
    idle["alpha_from" if args.constraint == "dual" else "alpha_lr"] = f"--constraint is {args.constraint}"
    idle |= {"log_scale_cap": "only --flow cond uses it"} if args.flow == "nice" else {}
    if args.bc_only:
        names = "alphas alpha_from alpha_lr constraint eps_quantile q_norm q_from critic_from critic_lr gamma tau "
        names += "target_noise target_noise_clip scale_rewards reward_shift"
        idle |= dict.fromkeys(names.split(), "--bc-only has no critics")
    return idle


def main(args):
    """Train the flow, then the policy, write policy and figures -> scores."""
    check_args(args)
    buffer, task = runner.open_task("cped", args, None)
    envs.buffers.check_raw_columns(buffer["observations"], args.normalize, "--normalize")
    args = runner.with_angles(args, task)
    data, see = cped_data(buffer, args)
    init, flow_chunk, train_chunk = make_train(args)
    keys, eval_keys = runner.seed_keys(args), runner.evaluation_keys(args)
    densities = jax.jit(lambda flow, data: runner.map_seeds(lambda f: density_metrics(f, data, args), flow, args))
    policy = lambda actor, observations, key: act(actor, see(observations), args, task.action_size)
    evaluate = runner.each_seed(runner.returns_of(policy, envs.make(task, args.backend), task, buffer, args), args)

    stretched = {"critic_from": 0.0, "q_from": 0.0, "alpha_from": (0.0,)}  # over the run
    schedules = {k: v for k, v in stretched.items() if k not in idle_flags(args)}
    remedy = {"dual": "lower --eps-quantile"}.get(args.constraint, "" if args.bc_only else "raise the last of --alphas")
    with runner.Run("cped", args, task, buffer, schedules=schedules, remedy=remedy) as run:
        like = jax.eval_shape(init, keys, data)
        flow_chunk, train_chunk = run.compile(flow_chunk, like, data), run.compile(train_chunk, like, data)
        state = run.restore(init, keys, data, phase="flow")
        for step in run.chunks("flow iteration", args.flow_updates, state.num_updates):
            state, metrics = flow_chunk(state, data)
            run.progress(step, metrics, ("flow/nll" if args.nll_weight else "flow/adversarial",))
            if run.due(step):
                run.log(step, metrics | densities(state.nets.flow, data))
            run.save(state)

        state = run.restore(lambda state: state._replace(num_updates=0 * state.num_updates), state)  # counts anew
        for step in run.chunks("update", args.num_updates, state.num_updates):
            state, metrics = train_chunk(state, data)
            run.progress(step, metrics, SHOWN)
            if run.due(step):
                run.log(step, metrics | evaluate(state.nets.actor, eval_keys))
            run.save(state)

        run.write_policy("tanh_deterministic", {"actor": state.nets.actor, **see.stored(args.num_seeds)})
        return run.finish(TRAINING)


if __name__ == "__main__":
    runner.launch(main, Args, preset, ("cpu", "ours", "published", *PUBLISHED), __doc__, idle=idle_flags)
