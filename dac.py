"""DAC: a diffusion policy that predicts noise, and the noise is shifted along the gradient of Q.

Paper      Diffusion Actor-Critic: Formulating Constrained Policy Iteration as Diffusion Noise Regression
           for Offline Reinforcement Learning (Fang et al., ICLR 2025), arXiv 2405.20555; equation
           numbers are its. "Code" below: the authors' released code, which made the published numbers.
Objective  max over pi of  E[ Q(s, a) ] - eta KL(pi || pi_beta), solved by pi* ~ pi_beta exp(Q / eta). At noise
           level t its score is about that of the data plus grad Q(s, x_t) / eta, so that pi* is learnt by
           regression on noise (Theorems 1 and 2), and no gradient runs through the sampling chain.

Algorithm  (1) draw:     rows (s, a, r, s') of the data; t ~ Unif{1..T}, eps ~ N(0, I) for each
           (2) sample:   a'_n ~ target actor at s', n = 1..N: x_T ~ N(0, I), then T reverse steps
           (3) target:   y = r + gamma (1 - terminal) [ mean_h v_h - rho std_h v_h ],
                         v_h = mean_n (or max_n) Qtar_h(s', a'_n)                               (Eq. 18)
           (4) critics:  a step on mean_h (Q_h(s, a) - y)^2; then Qtar <- Polyak average of Q
           (5) actor:    a step on  eta <(eps_theta - eps)^2> + <sigma_t g eps_theta>           (Eq. 16)
                         x_t = sqrt(abar_t) a + sigma_t eps,  sigma_t = sqrt(1 - abar_t),
                         g = grad_x mean_h Qtar_h(s, x) at x_t / mean |Qtar(s, a)|              (Eq. 19)
           (6) dual:     eta <- eta + eta_lr (<(eps_theta - eps)^2> - b)
           (7) target actor: every 5th update after the first 1000, Polyak average of the actor
           To act: N_a samples of the actor, and of these the one with the greatest mean_h Qtar_h(s, a)

Symbols    s observations [.., S] | a actions [.., A] | r rewards | y targets [B] | q values [H, ..]
           eps noise and eps_theta its prediction [.., A] | x noised actions [.., A], x_t at step t = 1..T
           beta, alpha, abar: alpha_bar [T + 1], index 0 for no noise | sigma sqrt(1 - abar)
           T num_steps | H num_critics | N num_q_samples | N_a num_action_samples | B batch
           eta weight of the regression | b bc_threshold | rho pessimism | gamma discount
           tau Polyak rate | S also num_seeds, as a leading axis

Deviations
  D1  Algorithm 1 draws one a' per s'; code: N = 10; here: 10, --num-q-samples 1 for the paper's.
  D2  Eq. 15 is a square, whose minimiser is eps - sigma g / eta; Eq. 16 and code: eps - sigma g / (2 eta);
      here: Eq. 16, so that the temperature is 2 eta.
  D3  Algorithm 1 averages actor and critics at the end of every update; code: the critics before the actor's
      step, which sees the new ones, and the actor as in line (7); here: the code's.
  D4  Paper: no clip on the dual step; code: the excess within +-1, eta in [1e-3, 100]; here: the code's.
  D5  Algorithm 1 takes the loss of the new actor for line (6); code: that of line (5); here: the code's.
  D6  Paper: ||eps_theta - eps||^2, a sum; code: a mean over the action's dimensions, which b refers to;
      here: the mean.
  D7  Code visits all rows once an epoch; here: uniform draws with replacement, inside the jitted loop.
  D8  Code: rewards times 1000 / (max - min episode return); here: the range is at least the mean absolute
      return, since the episodes of one policy hardly differ.
  D9  Published b = 1 leaves the data at once, and critics need 200k updates to repair what they then
      overestimate; here: so in the published presets, and a fixed eta = 0.2 where nothing is published.
  D10 Code, bandit: reverse steps not clipped, b = 1.3, T = 50, 20k updates; here: clipped (with denoised
      guidance they ran away), b = 0.5, T = 20, 4k updates at four times the rate.

Files      reads a buffer relabelled by udg_select.py (docs/buffer.md); writes runs/dac/<task>/...:
           policy.npz (docs/policy.md), log.jsonl, state.npz, learning_curve.png, training.png
Run        python dac.py --quick                          (point robot, under 2 minutes on 2 cores)
           python dac.py --task bandit                    (the paper's figure, soft, hard and denoised)
           python dac.py --dataset runs/udg_select/ant-angle-60/top1.npz --preset cpu     (2 cores)
           python dac.py --dataset runs/udg_select/ant-angle-60/top1.npz --num-seeds 8    (2M updates)
Expect     --quick: return 94 (data: mean -0.2, best 93.9), half a minute; --preset cpu on ant-angle-60, top-1,
           seed 0: 225 in 200 steps, mean of the last 5 (data 108, cloning 114), 28 minutes; both on 2 CPU
           cores that others shared; more in docs/dac.md
"""

import contextlib
import dataclasses
import functools
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
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import envs
import envs.buffers
from envs import curves, scripted


@dataclass(frozen=True)
class Args:
    # --- run ---
    dataset: str = ""
    """buffer file with task rewards, or a glob of shards (docs/buffer.md)"""
    task: str = ""
    """task to evaluate in; empty: the file's; another than the file's is refused; bandit: built in, all guidances"""
    max_rows: int = 0
    """rows to train on: of a larger file whole episodes drawn at random, and only these are held; 0: all"""
    preset: str = ""
    """a name in PUBLISHED in place of the file's dataset_name, cpu: a budget for 2 cores on top, or bandit-code"""
    seed: int = 0
    """first seed; a seed gives the same run alone or among others"""
    num_seeds: int = 1
    """S: independent runs at once, a leading axis of all arrays"""
    num_devices: int = 0
    """devices that share the seeds; 0: all there are. On a CPU, 2 or more make that many out of its cores"""
    out: str = ""
    """run folder; empty: runs/dac/<task>/seed<seed>"""
    resume: bool = False
    """go on from the folder's state.npz, exactly"""
    quick: bool = False
    """a small run on a scripted point-angle-0 buffer made on the spot, under 2 minutes"""
    track: bool = False
    """mirror the log to Weights & Biases (needs `pip install wandb`)"""
    backend: Literal["auto", "mujoco", "mjx"] = "auto"
    """physics of the evaluation: C MuJoCo (auto on a CPU) or MJX; ignored by the point worlds"""
    # --- budget ---
    num_updates: int = 2_000_000
    """gradient steps per seed (code: 2M)"""
    chunk: int = 100
    """gradient steps in one jitted call, some 10 s of 2 cores; a divisor of eval_every and num_updates"""
    eval_every: int = 10_000
    """gradient steps between two evaluations (code: 10,000)"""
    eval_episodes: int = 10
    """episodes of an evaluation (code: 10)"""
    # --- diffusion policy ---
    num_steps: int = 5
    """T: steps of the diffusion (code: 5)"""
    schedule: Literal["vp", "cosine", "linear"] = "vp"
    """beta_t: variance preserving from 0.1 to 10 (code), cosine, or linear from 1e-4 to 2e-2"""
    clip_samples: bool = True
    """clip the predicted action into [-1, 1] in every reverse step (code; not in the bandit)"""
    temperature: float = 1.0
    """scale of the noise of the reverse steps (code: 1, in the target and in the evaluation)"""
    guidance: Literal["soft", "hard", "denoised", "none"] = "soft"
    """soft (DAC): sigma_t g; hard: g; denoised: Q of whole samples (Diffusion-QL); none: cloning"""
    eta: float = 1.0
    """eta: weight of the regression on the data, at the start (code: 1; antmaze 0.1)"""
    eta_lr: float = 1e-3
    """step of the dual ascent on eta, 0 for a fixed eta (code: 1e-3; antmaze 0)"""
    bc_threshold: float = 1.0
    """b: error of regression, per dimension, that eta aims at; 1 is predicting no noise (code: 0.05 to 1, D9)"""
    eta_min: float = 1e-3
    """lower clip of eta (code: 1e-3)"""
    eta_max: float = 100.0
    """upper clip of eta (code: 100)"""
    ema_every: int = 5
    """updates between two averages of the target actor (code: 5)"""
    ema_start: int = 1_000
    """updates after which these begin (code: 1,000)"""
    num_action_samples: int = 10
    """N_a: samples of which the greatest Q acts (code: 10)"""
    # --- critics ---
    num_critics: int = 10
    """H: critics (code: 10)"""
    q_target: Literal["lcb", "min", "convex", "rand_convex"] = "lcb"
    """over H: mean - rho std (DAC), min, rho min + (1 - rho) max, or random convex weights"""
    rho: float = 1.0
    """rho: pessimism of lcb, weight of the min in convex (code: 0 to 1.5 by dataset)"""
    num_q_samples: int = 10
    """N: actions a' per next state in the target (code: 10, Algorithm 1: 1; D1)"""
    max_q: bool = False
    """greatest of the N values of a critic instead of their mean (code: antmaze)"""
    # --- networks and optimisation ---
    hidden_sizes: tuple[int, ...] = (256, 256, 256)
    """widths of actor and critics (code: 3 x 256)"""
    batch_size: int = 256
    """B: rows per update (code: 256)"""
    actor_lr: float = 3e-4
    """Adam rate of the actor (code: 3e-4)"""
    critic_lr: float = 3e-4
    """Adam rate of the critics (code: 3e-4; antmaze-large 1e-3)"""
    lr_cosine: bool = True
    """let both rates fall to 0 over the run by a cosine (code)"""
    clip_norm: float = 1.0
    """greatest norm of a gradient, of all critics together (code: 1)"""
    gamma: float = 0.99
    """discount (code: 0.99)"""
    tau: float = 0.005
    """Polyak rate of target critics and target actor (code: 0.005)"""
    q_bound: float = 1e6
    """largest mean |Q| of a batch before the run stops as diverged; 0: go on, also where a loss is not finite (ours)"""
    return_range: float = 1_000.0
    """rewards are scaled until the range of episode returns is this (code: 1,000, D8)"""


TIME_FEATURES, TIME_WIDTH = 16, 32  # sinusoids of t, and width of the network that reads them (code)
LOCOMOTION = {  # b, rho
    "walker2d-medium-v2": (1.0, 1.0),
    "walker2d-medium-replay-v2": (1.0, 1.0),
    "walker2d-medium-expert-v2": (1.0, 1.0),
    "hopper-medium-v2": (1.0, 1.5),
    "hopper-medium-replay-v2": (1.0, 1.5),
    "hopper-medium-expert-v2": (0.05, 1.5),
    "halfcheetah-medium-v2": (1.0, 0.0),
    "halfcheetah-medium-replay-v2": (1.0, 0.0),
    "halfcheetah-medium-expert-v2": (0.1, 0.0),
}
ANTMAZE = {  # rho, critic_lr
    "antmaze-umaze-v0": (1.0, 3e-4),
    "antmaze-umaze-diverse-v0": (1.0, 3e-4),
    "antmaze-medium-play-v0": (1.0, 3e-4),
    "antmaze-medium-diverse-v0": (1.0, 3e-4),
    "antmaze-large-play-v0": (1.1, 1e-3),
    "antmaze-large-diverse-v0": (1.0, 1e-3),
}
OWN = {"eta": 0.2, "eta_lr": 0.0}  # where nothing is published                                       # D9
CPU = {
    "num_updates": 20_000, "eval_every": 2_000, "num_q_samples": 1, "num_critics": 5,
    "hidden_sizes": (128, 128, 128), "actor_lr": 1e-3, "critic_lr": 1e-3, "tau": 0.01,
}  # fmt: skip
BANDIT = {  # D10
    "num_updates": 4_000, "eval_every": 4_000, "num_steps": 20, "hidden_sizes": (64, 64, 64), "num_critics": 5,
    "batch_size": 128, "actor_lr": 4e-3, "critic_lr": 1e-3, "eta_lr": 0.01, "bc_threshold": 0.5, "ema_start": 10,
    "gamma": 0.0, "num_q_samples": 1, "num_action_samples": 1,
}  # fmt: skip
BANDIT_CODE = BANDIT | {
    "num_updates": 20_000, "eval_every": 20_000, "num_steps": 50, "actor_lr": 1e-3, "bc_threshold": 1.3,
}  # fmt: skip
PUBLISHED = {
    **{k: {"eta": 1.0, "eta_lr": 1e-3, "bc_threshold": b, "rho": rho} for k, (b, rho) in LOCOMOTION.items()},
    **{k: {"eta": 0.1, "eta_lr": 0.0, "max_q": True, "rho": rho, "critic_lr": lr} for k, (rho, lr) in ANTMAZE.items()},
}
PRESETS = {"cpu": CPU, "bandit": BANDIT, "bandit-code": BANDIT_CODE, **PUBLISHED}
QUICK = OWN | {
    "num_updates": 3_000, "chunk": 250, "eval_every": 250, "hidden_sizes": (64, 64), "num_critics": 5,
    "num_q_samples": 1, "batch_size": 128, "actor_lr": 1e-3, "critic_lr": 1e-3,
}  # fmt: skip


# === data ===


class Transitions(NamedTuple):
    """What is learnt from; leading axes free, features last."""

    observations: jax.Array  # [.., S]
    actions: jax.Array  # [.., A]
    rewards: jax.Array  # [..]
    next_observations: jax.Array  # [.., S]
    terminals: jax.Array  # [..] 1.0 where the episode truly ended: stops bootstrapping, as no time limit does


def sample_batch(data, key, batch_size):
    """`batch_size` rows of the data, uniformly with replacement."""
    index = jax.random.randint(key, (batch_size,), 0, data.rewards.shape[0])
    return jax.tree.map(lambda x: x[index], data)


def reward_scale(returns, args):
    """return_range / (max - min return), where the range is at least the mean absolute return."""
    spread = max(np.ptp(returns), np.abs(returns).mean(), 1e-6)  # D8
    return args.return_range / float(spread)


def dac_data(buffer, args):
    """The rows to sample from: rewards scaled, actions within 1 - 1e-5 (code)."""
    data = Transitions(*(np.asarray(buffer[k], np.float32) for k in Transitions._fields))
    rewards = data.rewards * np.float32(reward_scale(buffer["episode_returns"], args))
    data = data._replace(rewards=rewards, actions=np.clip(data.actions, -1 + 1e-5, 1 - 1e-5))
    return jax.tree.map(jnp.asarray, data)


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


class NoiseNet(NamedTuple):
    """eps_theta(x_t, s, t): `time` reads sinusoids of t, `trunk` reads [s, x_t, time's output]."""

    time: Layers
    trunk: Layers


def layers_init(key, widths, *members):
    """Xavier-uniform weights and zero biases; members: an ensemble's leading axis."""
    pairs = list(itertools.pairwise(widths))
    bound = lambda pair: (6.0 / sum(pair)) ** 0.5
    weights = tuple(
        jax.random.uniform(k, (*members, *pair), minval=-bound(pair), maxval=bound(pair))
        for k, pair in zip(jax.random.split(key, len(pairs)), pairs, strict=True)
    )
    return Layers(weights, tuple(jnp.zeros((*members, pair[1])) for pair in pairs))


def noise_net_init(key, num_obs, num_act, args):
    """A fresh actor."""
    key_time, key_trunk = jax.random.split(key)
    widths = (num_obs + num_act + TIME_WIDTH, *args.hidden_sizes, num_act)
    time_net = layers_init(key_time, (TIME_FEATURES, TIME_WIDTH, TIME_WIDTH))
    return NoiseNet(time_net, layers_init(key_trunk, widths))


def after_first(net, x):
    """The layers after the first one, whose output is x: mish before each."""
    for w, b in zip(net.weights[1:], net.biases[1:], strict=True):
        x = mish(x) @ w + b
    return x


def time_features(t):
    """cos and sin of t w_j, w_j = 10000^(-j / 7), j = 0..7: [.., 16]."""
    half = TIME_FEATURES // 2
    angles = t[..., None] * jnp.exp(-jnp.log(10_000.0) * jnp.arange(half) / (half - 1))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def noise_predictor(net, observations, args):
    """-> eps_theta(x, t) at these states: x [.., A], t an integer or [..] -> [.., A].

    The first layer is split into W_s s + b, W_x x and W_t e_t: the states pass it once for all samples
    and steps, and of the T times there are T rows.
    """
    sizes = observations.shape[-1], net.trunk.weights[0].shape[0] - TIME_WIDTH
    w_s, w_x, w_t = jnp.split(net.trunk.weights[0], sizes)
    of_state = observations @ w_s + net.trunk.biases[0]
    features = time_features(jnp.arange(1, args.num_steps + 1))
    of_time = after_first(net.time, features @ net.time.weights[0] + net.time.biases[0]) @ w_t
    return lambda x, t: after_first(net.trunk, x @ w_x + of_state + of_time[t - 1])


def q_values(critics, observations, actions):
    """Q_h(s, a) [H, ..]; the leading axes of s and a need only broadcast."""

    def member(net):
        w_s, w_a = jnp.split(net.weights[0], [observations.shape[-1]])
        return after_first(net, observations @ w_s + actions @ w_a + net.biases[0])[..., 0]

    return jax.vmap(member)(critics)


def polyak(target, online, tau):
    """target <- (1 - tau) target + tau online, leaf by leaf."""
    return jax.tree.map(lambda t, o: (1 - tau) * t + tau * o, target, online)


# === losses ===


class Schedule(NamedTuple):
    """alpha_t = 1 - beta_t and alpha_bar_t = alpha_1 .. alpha_t, all [T + 1]; index 0: no noise."""

    beta: np.ndarray
    alpha: np.ndarray
    alpha_bar: np.ndarray


@functools.cache
def noise_schedule(name, num_steps):
    """vp: beta_t = 1 - exp(-0.1 / T - (10 - 0.1) (2t - 1) / (2 T^2)); cosine, linear: as in DDPM and after."""
    t = np.arange(1, num_steps + 1)
    if name == "vp":
        beta = 1 - np.exp(-0.1 / num_steps - 0.5 * 9.9 * (2 * t - 1) / num_steps**2)
    elif name == "cosine":
        f = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = np.clip(1 - f[1:] / f[:-1], 0, 0.999)
    else:
        beta = np.linspace(1e-4, 2e-2, num_steps)
    beta = np.concatenate([[0.0], beta])
    return Schedule(beta, 1 - beta, np.cumprod(1 - beta))


def noised_actions(actions, eps, t, args):
    """x_t = sqrt(abar_t) a + sigma_t eps [B, A] and sigma_t = sqrt(1 - abar_t) [B, 1], of a, eps [B, A], t [B]."""
    alpha_bar = jnp.asarray(noise_schedule(args.schedule, args.num_steps).alpha_bar)[t][:, None]
    sigma = jnp.sqrt(1 - alpha_bar)
    return jnp.sqrt(alpha_bar) * actions + sigma * eps, sigma


def reverse_step(x, eps, t, args):
    """Mean and std of x_{t-1} given x_t = x and the predicted noise, for one t.

    x0 = clip((x - sigma_t eps) / sqrt(abar_t), -1, 1)
    mean = (sqrt(abar_{t-1}) beta_t x0 + sqrt(alpha_t) (1 - abar_{t-1}) x) / (1 - abar_t),  std = sqrt(beta_t)
    """
    beta, alpha, alpha_bar = map(jnp.asarray, noise_schedule(args.schedule, args.num_steps))
    x0 = (x - jnp.sqrt(1 - alpha_bar[t]) * eps) / jnp.sqrt(alpha_bar[t])
    x0 = jnp.clip(x0, -1.0, 1.0) if args.clip_samples else x0
    mean = jnp.sqrt(alpha_bar[t - 1]) * beta[t] * x0 + jnp.sqrt(alpha[t]) * (1 - alpha_bar[t - 1]) * x
    return mean / (1 - alpha_bar[t]), args.temperature * jnp.sqrt(beta[t])


def sample_actions(net, observations, prior, z, args):
    """Line (2): from x_T = prior [.., A] with the noise z [T - 1, .., A] of the steps T..2 -> actions [.., A].

    Step 1 has no noise. The leading axes of the observations need only broadcast with the prior's.
    """
    eps_theta = noise_predictor(net, observations, args)

    def step(x, inputs):
        t, noise = inputs
        mean, std = reverse_step(x, eps_theta(x, t), t, args)
        return mean + std * noise, None

    steps = jnp.arange(args.num_steps, 1, -1)
    x, _ = jax.lax.scan(step, prior, (steps, z), unroll=min(args.num_steps, 5))
    return reverse_step(x, eps_theta(x, 1), 1, args)[0]


def dac_target(next_q, rewards, terminals, mix, args):
    """Line (3), Eq. 18: y [B] of the target critics' values next_q [H, B, N]; mix [H, B] for rand_convex."""
    v = next_q.max(-1) if args.max_q else next_q.mean(-1)  # D1
    if args.q_target == "lcb":
        v = v.mean(0) - args.rho * v.std(0)
    elif args.q_target == "min":
        v = v.min(0)
    elif args.q_target == "convex":
        v = args.rho * v.min(0) + (1 - args.rho) * v.max(0)
    else:
        v = jnp.sum(v * mix / (mix.sum(0) + 1e-6), 0)
    return rewards + args.gamma * (1 - terminals) * v


def dac_critic_loss(critics, batch, y):
    """Line (4): mean_HB (Q_h(s, a) - y)^2 -> scalar, metrics."""
    q = q_values(critics, batch.observations, batch.actions)
    chex.assert_equal_shape([q[0], y])
    loss = jnp.mean((q - y) ** 2)
    return loss, {"train/critic_loss": loss, "train/q": q.mean(), "train/q_std": q.std(0).mean()}


def q_gradient(critics, observations, actions, x):
    """Eq. 19: g = grad_x mean_h Q_h(s, x) / mean_HB |Q_h(s, a)| [B, A], and that mean."""
    norm = jnp.abs(q_values(critics, observations, actions)).mean() + 1e-6
    total = lambda x: q_values(critics, observations, x).mean(0).sum()
    return jax.grad(total)(x) / norm, norm


def dac_actor_loss(actor, target_critics, eta, batch, noise, args):
    """Line (5), Eq. 16: eta <(eps_theta - eps)^2> + <w g eps_theta>, means over B and A -> scalar, metrics.

    w = sigma_t (soft) or 1 (hard); denoised: -mean_HB Qtar(s, a_theta) / mean |Qtar| in its place, a_theta
    sampled through the whole chain; none: the regression alone.
    """
    s, a = batch.observations, batch.actions
    x, sigma = noised_actions(a, noise.eps, noise.t, args)
    eps_theta = noise_predictor(actor, s, args)(x, noise.t)
    bc_loss = jnp.mean((eps_theta - noise.eps) ** 2)  # D6
    if args.guidance == "none":
        return bc_loss, {"train/bc_loss": bc_loss}
    g, norm = jax.lax.stop_gradient(q_gradient(target_critics, s, a, x))
    if args.guidance == "denoised":
        samples = sample_actions(actor, s, noise.chain[0], noise.chain[1:], args)
        guidance = -q_values(target_critics, s, samples).mean() / norm
    else:
        guidance = jnp.mean((sigma if args.guidance == "soft" else 1.0) * g * eps_theta)  # D2
    loss = eta * bc_loss + guidance
    metrics = {"train/actor_loss": loss, "train/bc_loss": bc_loss, "train/guidance": guidance}
    return loss, {**metrics, "train/q_gradient": jnp.abs(g).mean(), "train/eta": eta}


def dual_step(eta, bc_loss, args):
    """Line (6): eta + eta_lr clip(<(eps_theta - eps)^2> - b, -1, 1), within [eta_min, eta_max]."""
    excess = jnp.clip(bc_loss - args.bc_threshold, -1.0, 1.0)
    return jnp.clip(eta + args.eta_lr * excess, args.eta_min, args.eta_max)  # D4


# === update ===


class Noise(NamedTuple):
    """All randomness of an update but the choice of its rows."""

    prior: jax.Array  # [B, N, A] x_T of the next actions
    z: jax.Array  # [T - 1, B, N, A] of their reverse steps
    t: jax.Array  # [B] 1..T
    eps: jax.Array  # [B, A]
    mix: jax.Array  # [H, B] weights of rand_convex
    chain: jax.Array  # [T, B, A] the whole chain of denoised guidance


class DacState(NamedTuple):
    """What a run needs to go on; all leaves have a leading seed axis outside the update."""

    key: jax.Array
    num_updates: jax.Array
    actor: NoiseNet
    target_actor: NoiseNet
    critics: Layers  # leading axis H
    target_critics: Layers
    actor_opt: Any
    critic_opt: Any
    eta: jax.Array


def draw_noise(key, actions, args):
    """Noise for a batch whose actions are [B, A]."""
    keys = jax.random.split(key, 5)
    (batch, size), T = actions.shape, args.num_steps
    normal = jax.random.normal(keys[0], (T, batch, args.num_q_samples, size))
    t = jax.random.randint(keys[1], (batch,), 1, T + 1)
    eps = jax.random.normal(keys[2], actions.shape)
    mix = jax.random.uniform(keys[3], (args.num_critics, batch))
    return Noise(normal[0], normal[1:], t, eps, mix, jax.random.normal(keys[4], (T, *actions.shape)))


def dac_adam(rate, args):
    """Gradients within clip_norm, then Adam with its cosine."""
    rate = optax.cosine_decay_schedule(rate, args.num_updates) if args.lr_cosine else rate
    return optax.chain(optax.clip_by_global_norm(args.clip_norm), optax.adam(rate))


def critic_update(state, batch, noise, args):
    """Lines (2) to (4) -> state, metrics. Without a discount y = r, and nothing is sampled."""
    y = batch.rewards
    if args.gamma > 0:
        s = batch.next_observations[:, None]
        next_actions = sample_actions(state.target_actor, s, noise.prior, noise.z, args)
        next_q = q_values(state.target_critics, s, next_actions)
        y = dac_target(next_q, batch.rewards, batch.terminals, noise.mix, args)
    grads, metrics = jax.grad(dac_critic_loss, has_aux=True)(state.critics, batch, y)
    step, critic_opt = dac_adam(args.critic_lr, args).update(grads, state.critic_opt)
    critics = optax.apply_updates(state.critics, step)
    target_critics = polyak(state.target_critics, critics, args.tau)  # D3
    state = state._replace(critics=critics, target_critics=target_critics, critic_opt=critic_opt)
    return state, {**metrics, "train/target": y.mean()}


def actor_update(state, batch, noise, args):
    """Lines (5) to (7) -> state, metrics."""
    grads, metrics = jax.grad(dac_actor_loss, has_aux=True)(
        state.actor, state.target_critics, state.eta, batch, noise, args
    )
    step, actor_opt = dac_adam(args.actor_lr, args).update(grads, state.actor_opt)
    actor = optax.apply_updates(state.actor, step)
    eta = state.eta if args.guidance == "none" else dual_step(state.eta, metrics["train/bc_loss"], args)  # D5
    due = (state.num_updates % args.ema_every == 0) & (state.num_updates > args.ema_start)
    target_actor = polyak(state.target_actor, actor, jnp.where(due, args.tau, 0.0))  # D3
    state = state._replace(actor=actor, target_actor=target_actor, actor_opt=actor_opt, eta=eta)
    return state, metrics


def dac_update(state, batch, noise, args):
    """One update of all networks, in the order of the Algorithm, its noise given -> state, metrics."""
    metrics = {}
    if args.guidance != "none":
        state, metrics = critic_update(state, batch, noise, args)
    state, actor_metrics = actor_update(state, batch, noise, args)
    return state._replace(num_updates=state.num_updates + 1), {**metrics, **actor_metrics}


# === evaluation ===


def candidates(args):
    """N_a; cloning has no critic to choose by."""
    return 1 if args.guidance == "none" else args.num_action_samples


def choose_actions(actor, critics, observations, key, args):
    """N_a samples of the actor at each state [E, S], the one of greatest mean_h Q_h(s, a) -> [E, A]."""
    s, size = observations[:, None], actor.trunk.biases[-1].shape[0]
    shape = (args.num_steps, len(observations), candidates(args), size)
    noise = jax.random.normal(key, shape)
    actions = jnp.clip(sample_actions(actor, s, noise[0], noise[1:], args), -1.0, 1.0)  # [E, N_a, A]
    if candidates(args) == 1:
        return actions[:, 0]
    best = jnp.argmax(q_values(critics, s, actions).mean(0), -1)
    return jnp.take_along_axis(actions, best[:, None, None], 1)[:, 0]


def evaluate_sampled(env, act, params, key, num_episodes, length):
    """Undiscounted return of the episodes after every step: [num_episodes, length]; constant once ended.

    act(params, observations [E, S], key) -> actions [E, A] is random; `key` sets starts and samples.
    """
    key_start, key_steps = jax.random.split(key)

    def step(carry, key):
        state, alive, total = carry
        after = jax.vmap(env.step)(state, act(params, state.obs, key))
        total = total + jnp.where(alive, after.reward, 0.0)
        return (after, alive & (after.done < 0.5), total), total

    start = jax.vmap(env.reset)(jax.random.split(key_start, num_episodes))
    carry = (start, jnp.ones(num_episodes, bool), jnp.zeros(num_episodes))
    _, totals = jax.lax.scan(step, carry, jax.random.split(key_steps, length))
    return totals.T


def evaluation_keys(args):
    """A key for each seed [S] that no split of the seed's key ever gives: the same starts at every evaluation."""
    seeds = args.seed + jnp.arange(args.num_seeds)
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 2**31))(seeds)


def make_evaluation(args, env, task, data_length):
    """-> evaluation(state [S], keys [S]) -> metrics, each [S]."""
    act = lambda nets, obs, key: choose_actions(*nets, obs, key, args)
    length = max(task.eval_length, data_length)

    def one(actor, critics, key):
        totals = evaluate_sampled(env, act, (actor, critics), key, args.eval_episodes, length)
        returns = totals[:, task.eval_length - 1]
        metrics = {"eval/return": returns.mean(), "eval/return_std": returns.std()}
        metrics |= {"eval/return_data_length": totals[:, data_length - 1].mean()}
        if task.reference:
            metrics["eval/score"] = task.normalized_score(returns.mean())
        return metrics

    evaluation = jax.jit(over_devices(jax.vmap(one), args))
    return lambda state, keys: evaluation(state.actor, state.target_critics, keys)


# === training ===


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


def make_train(args, num_obs, num_act):
    """-> init(keys [S]), train_chunk(state, data) -> state, metrics [S], means of the chunk."""

    def init(key):
        key, key_actor, key_critics = jax.random.split(key, 3)
        actor = noise_net_init(key_actor, num_obs, num_act, args)
        critics = layers_init(key_critics, (num_obs + num_act, *args.hidden_sizes, 1), args.num_critics)
        actor_opt = dac_adam(args.actor_lr, args).init(actor)
        critic_opt = dac_adam(args.critic_lr, args).init(critics)
        eta = jnp.float32(args.eta)
        return DacState(key, jnp.int32(0), actor, actor, critics, critics, actor_opt, critic_opt, eta)

    def one_update(state, data):
        key, key_batch, key_noise = jax.random.split(state.key, 3)
        batch = sample_batch(data, key_batch, args.batch_size)  # D7
        return dac_update(state._replace(key=key), batch, draw_noise(key_noise, batch.actions, args), args)

    def one_chunk(state, data):
        state, metrics = jax.lax.scan(lambda s, _: one_update(s, data), state, length=args.chunk)
        return state, jax.tree.map(jnp.mean, metrics)

    chunk = lambda state, data: map_seeds(lambda s: one_chunk(s, data), state, args)
    return jax.jit(over_devices(jax.vmap(init), args)), jax.jit(chunk, donate_argnums=0)


# === bandit ===


BANDIT_CENTRES = np.array([(-0.6, 0.6), (0.4, 0.2)])  # of the data's two blobs
BANDIT_BEST = np.array([0.4, -0.4])  # r = -|a - best|: off the data


def bandit_data(seed=0):
    """400 actions around each centre, std 0.1, and rewards with noise 0.5; one state, every row terminal."""
    rng = np.random.default_rng(seed)
    actions = np.repeat(BANDIT_CENTRES, 400, 0) + 0.1 * rng.normal(size=(800, 2))
    actions = np.clip(actions, -1, 1)
    rewards = -np.linalg.norm(actions - BANDIT_BEST, axis=1) + 0.5 * rng.normal(size=800)
    zeros = np.zeros((800, 1))
    rows = Transitions(zeros, actions, rewards, zeros, np.ones(800))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), rows)


def bandit_samples(actor, key, args, num=1_000):
    """Actions of one actor [num, 2], not clipped."""
    noise = jax.random.normal(key, (args.num_steps, num, 2))
    return sample_actions(actor, jnp.zeros((num, 1)), noise[0], noise[1:], args)


def bandit_metrics(samples):
    """True reward of actions [.., 2] without its noise, distance to the nearest centre, share within 0.3."""
    distance = jnp.linalg.norm(samples[..., None, :] - BANDIT_CENTRES, axis=-1).min(-1)
    reward = -jnp.linalg.norm(samples - BANDIT_BEST, axis=-1)
    return {
        "eval/reward": reward.mean(-1), "eval/distance": distance.mean(-1),
        "eval/on_data": jnp.mean(distance < 0.3, -1),
    }  # fmt: skip


def plot_bandit(path, critics, samples):
    """Samples [n, 2] of each guidance over the contours of mean_h Q_h; the data's over those of the soft one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grid = np.stack(np.meshgrid(*[np.linspace(-1.5, 1.5, 61)] * 2), -1).astype(np.float32)
    drawn, axes = plt.subplots(1, len(samples), figsize=(4 * len(samples), 4.2), sharey=True)
    for axis, (name, points) in zip(axes, samples.items(), strict=True):
        q = np.asarray(q_values(critics[name], jnp.zeros((*grid.shape[:-1], 1)), grid).mean(0))
        axis.contourf(grid[..., 0], grid[..., 1], q, 20, cmap="viridis", alpha=0.8)
        axis.plot(*np.asarray(points).T, "o", ms=3, mfc="w", mec="0.3", mew=0.3, ls="")
        for centre in BANDIT_CENTRES:
            axis.add_patch(plt.Circle(centre, 0.2, fill=False, zorder=3))
        axis.plot([], [], "o", ms=8, mfc="none", mec="k", ls="", label="data (2 std)")
        axis.plot(*BANDIT_BEST, "*", ms=12, color="r", ls="", label="greatest reward")
        about = {k: float(v) for k, v in bandit_metrics(points).items()}
        axis.set_title(f"{name}: reward {about['eval/reward']:.2f}, {about['eval/on_data']:.0%} on data", fontsize=10)
        axis.set(xlabel="$a_0$", aspect="equal", xlim=(-1.5, 1.5), ylim=(-1.5, 1.5))
    axes[0].set_ylabel("$a_1$")
    axes[0].legend(loc="lower left", fontsize=8)
    drawn.tight_layout()
    drawn.savefig(path, dpi=110)
    plt.close(drawn)


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


def preset_name(data, known):
    """The name of `known` for a dataset: its own, else that of the same set in another version.

    `ours/x` (benchmark/suite.py) is D4RL's x without a version.
    """
    same = lambda name: name.removeprefix("ours/").rstrip("0123456789").removesuffix("-v")
    return data if data in known else next((name for name in known if same(name) == same(data)), data)


def dac_preset(args):
    """--quick, the bandit, or the published values of --preset or of the file's dataset -> name, {field: value}."""
    bandit = args.task == "bandit"
    given = preset_name(args.preset, PRESETS)
    if args.preset and given not in PRESETS:
        raise envs.InputError(f"--preset {args.preset}: unknown; one of {', '.join(PRESETS)}")
    if args.quick and args.preset:
        raise envs.InputError("--quick is a preset of its own; leave --preset out")
    if bandit and (args.quick or args.dataset):
        raise envs.InputError("--task bandit makes its own rows; leave --quick and --dataset out")
    if args.preset and bandit != args.preset.startswith("bandit"):
        raise envs.InputError(f"--preset {args.preset}: --task bandit takes bandit and bandit-code, no other task does")
    if args.quick:
        return "quick", QUICK
    if bandit:
        return args.preset or "bandit", PRESETS[args.preset or "bandit"]
    if not args.dataset:
        raise envs.InputError("--dataset: name a file that udg_select.py wrote, or try --quick")
    data = envs.buffers.load(args.dataset, ("rewards",), quiet=True).metadata["dataset_name"]
    named = given if given in PUBLISHED else preset_name(data, PUBLISHED)
    preset = PUBLISHED.get(named, OWN) | (CPU if args.preset == "cpu" else {})
    about = f"as published for {named}; the data is {data}"
    about = about if named in PUBLISHED else f"nothing is published for {data}"
    return f"{args.preset or 'by the file'} ({about})", preset


def check_args(args, num_rows):
    """Refuse what cannot work, before any long work starts."""
    chunk = max(args.chunk, 1)
    positive = ("num_seeds", "num_updates", "eval_every", "chunk", "eval_episodes", "num_steps", "ema_every")
    positive += ("num_action_samples", "num_critics", "num_q_samples", "batch_size", "return_range", "clip_norm")
    rules = {
        **{f"--{name.replace('_', '-')} must be positive": getattr(args, name) > 0 for name in positive},
        "--chunk must divide --eval-every and --num-updates":
            args.eval_every % chunk == args.num_updates % chunk == 0,
        "--eta-min, --eta and --eta-max must be positive and in this order":
            0 < args.eta_min <= args.eta <= args.eta_max,
        "--gamma and --tau must be within 0 and 1": 0 <= args.gamma <= 1 and 0 <= args.tau <= 1,
        "--actor-lr, --critic-lr, --eta-lr and --temperature must not be negative":
            min(args.actor_lr, args.critic_lr, args.eta_lr, args.temperature) >= 0,
        "--hidden-sizes needs widths, all positive": min(args.hidden_sizes, default=0) > 0,
        f"--dataset: {num_rows} rows are too few": num_rows >= 20,
        f"--num-devices: 0 to {jax.local_device_count()}, the devices there are":
            0 <= args.num_devices <= jax.local_device_count(),
    }  # fmt: skip
    for message, holds in rules.items():
        if not holds:
            raise envs.InputError(message.replace("_", "-"))


def announce(folder, args, name, sizes, num_rows):
    """Print what will run and what it needs; refuse where memory or disk cannot hold it."""
    one = jax.eval_shape(make_train(args, *sizes)[0], jax.vmap(jax.random.key)(jnp.arange(1)))
    state = 4 * args.num_seeds * sum(x.size for x in jax.tree.leaves(one))
    at_once = 1 if jax.default_backend() == "cpu" else args.num_seeds
    samples = at_once * args.batch_size * args.num_q_samples
    samples = max(samples, args.num_seeds * args.eval_episodes * args.num_action_samples)
    layers = 6 * samples * args.num_critics * max(args.hidden_sizes)  # five were seen, at the published sizes
    need = 4 * (num_rows * (2 * sizes[0] + sizes[1] + 2) + layers) + 2 * state  # a copy while a chunk runs
    stats = jax.local_devices()[0].memory_stats() or {}
    have = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    disk = 3 * state + state // 4  # state.npz, the one before, the one being written; policy.npz
    free = shutil.disk_usage(folder).free + sum(x.stat().st_size for x in folder.glob("state*.npz"))
    print(
        f"{name}: {args.num_seeds} seeds x {args.num_updates} updates on {num_rows} rows, {args.num_critics} critics\n"
        f"{folder}: arrays {need / 1e9:.2f} of {have / 1e9:.1f} GB memory, disk {disk / 1e9:.2f} of {free / 1e9:.1f} "
        "GB free",
        flush=True,
    )
    if need > have or disk > free:
        raise envs.InputError(f"{folder}: memory or disk cannot hold the run; lower --num-seeds or the rows")


def shown_metrics(args):
    """What stands in the progress line."""
    names = ("bc_loss",) if args.guidance == "none" else ("bc_loss", "eta", "q", "q_std", "critic_loss")
    return [f"train/{name}" for name in names]


def plot_run(folder, task, buffer, args):
    """learning_curve.png, and training.png: the dual variable, the regression and the values over updates."""
    curves.learning_curve(folder / "learning_curve.png", folder, task, buffer)
    parts = {
        "train/eta": ("weight of the regression", "eta", "semilogy"),
        "train/bc_loss": ("regression on the data", "<(eps_theta - eps)^2>", "linear"),
        "train/q": ("critics on the data, scaled rewards", "mean Q", "linear"),
        "train/q_std": ("spread of the critics", "std over H", "linear"),
    }
    panels = []
    for key, (title, ylabel, scale) in parts.items():
        seeds = curves.read(folder, key).items()
        lines = [(x, y, {"lw": 1, "marker": ".", "label": f"seed {seed}"}) for seed, (x, y) in seeds]
        if key == "train/bc_loss" and args.guidance != "none" and args.eta_lr > 0:
            lines += [(None, args.bc_threshold, {"color": "k", "ls": ":", "label": "b"})]
        if lines:
            panels.append({"title": title, "xlabel": "updates", "ylabel": ylabel, "scale": scale, "lines": lines})
    curves.figure(folder / "training.png", panels, width=5.5)


def write_dac_policy(folder, task, state, args):
    """policy.npz: actor, target critics to choose by (none for cloning), and the schedule."""
    params = {"actor": state.actor, "schedule": noise_schedule(args.schedule, args.num_steps)}
    if candidates(args) > 1:
        params["critics"] = state.target_critics
    about = {"task": task.name, "observations": "task", "versions": envs.buffers.versions()}
    about |= {"num_action_samples": candidates(args), "temperature": args.temperature}
    about |= {"clip_samples": args.clip_samples, "action_size": task.action_size}
    write_policy(folder / "policy.npz", "diffusion", params, about)


def start(folder, args, sizes, data):
    """Seeds' initial state, or the one to go on from -> state, train_chunk, logger, save; data: what tells the rows."""
    init, train_chunk = make_train(args, *sizes)
    keys = jax.vmap(jax.random.key)(args.seed + jnp.arange(args.num_seeds))
    state, meta = None, {"identity": run_identity(args, data=data), "log": 0}
    if args.resume:
        state, meta = load_state(folder, jax.eval_shape(init, keys), meta["identity"])
    logger = Logger(folder, args, meta["log"])
    save = lambda state: save_state(folder, state, {**meta, "log": logger.file.tell()})
    if state is None:
        state = init(keys)
        save(state)
    return state, train_chunk, logger, save


def train_bandit(args, data):
    """One guidance on the bandit's rows -> samples [n, 2] and critics of the first seed."""
    (args, folder), sizes = run_folder(args, "dac", "bandit"), (1, 2)
    announce(folder, args, f"bandit, {args.guidance} guidance", sizes, len(data.rewards))
    state, train_chunk, logger, save = start(folder, args, sizes, "bandit")
    sample = jax.jit(jax.vmap(lambda actor, key: bandit_samples(actor, key, args)))
    draw = lambda state: sample(state.actor, evaluation_keys(args))
    state = train_phase(
        args.guidance, args.num_updates, state, lambda state: train_chunk(state, data),
        lambda state: bandit_metrics(draw(state)), shown_metrics(args), args, logger, save,
    )  # fmt: skip
    return np.asarray(draw(state)[0]), jax.tree.map(lambda x: x[0], state.critics)


def run_bandit(args):
    """The paper's demonstration: one data set, three kinds of guidance, bandit.png -> metrics of each."""
    data, top = bandit_data(), Path(args.out or f"runs/dac/bandit/seed{args.seed}")
    check_args(args, len(data.rewards))
    samples, critics = {"data": np.asarray(data.actions)}, {}
    for guidance in ("soft", "hard", "denoised"):
        folder = top / guidance  # a kill leaves those after it without a state
        resume = args.resume and (guidance == "soft" or any(folder.glob("state*.npz")))
        own = dataclasses.replace(args, guidance=guidance, out=str(folder), resume=resume)
        samples[guidance], critics[guidance] = train_bandit(own, data)
    plot_bandit(top / "bandit.png", {"data": critics["soft"], **critics}, samples)
    results = {k: {m: float(v) for m, v in bandit_metrics(x).items()} for k, x in samples.items()}
    for name, metrics in results.items():
        print(f"{name:9s}", *(f"{k} {v:.3f} " for k, v in metrics.items()))
    print(top / "bandit.png")
    return results


def main(args):
    """Train the seeds, write policy and figures -> envs.curves.summary; of the bandit: its metrics."""
    started = time.time()
    if args.task == "bandit":
        return run_bandit(args)
    path = args.dataset or scripted.dataset(Path(args.out or f"runs/dac/point-angle-0/seed{args.seed}"))
    buffer, task = envs.buffers.load_task(path, Transitions._fields, args.task, args.max_rows)
    options = {k: v for k, v in task.options.items() if k in envs.task_options(task.name)}
    env = envs.make(task.name, None if args.backend == "auto" else args.backend, **options)
    check_args(args, len(buffer))
    env.check_batch(args.num_seeds * args.eval_episodes)
    (args, folder), sizes = run_folder(args, "dac", task.name), (task.observation_size, task.action_size)
    announce(folder, args, f"{task.name} on {env.backend}", sizes, len(buffer))

    digests = [envs.buffers.sha256(buffer[k]) for k in ("observations", "actions", "rewards")]
    data = dac_data(buffer, args)
    state, train_chunk, logger, save = start(folder, args, sizes, digests)
    evaluation = make_evaluation(args, env, task, buffer.metadata["episode_length"])
    eval_keys = evaluation_keys(args)
    state = train_phase(
        "update", args.num_updates, state, lambda state: train_chunk(state, data),
        lambda state: evaluation(state, eval_keys), shown_metrics(args), args, logger, save,
    )  # fmt: skip
    write_dac_policy(folder, task, state, args)
    plot_run(folder, task, buffer, args)
    result = curves.summary(folder, buffer)
    print(f"{folder}: policy.npz, learning_curve.png, training.png; {time.time() - started:.0f} s")
    return result


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end_at_once)
    try:
        arguments = parse_args(sys.argv[1:], dac_preset)
        if arguments.num_devices > 1:  # of the CPU; accelerators are what they are
            jax.config.update("jax_num_cpu_devices", arguments.num_devices)
        main(arguments)
    except (envs.InputError, OSError) as error:
        sys.exit(f"dac.py: error: {error}")
