"""DAC: the policy is a diffusion model that learns the data's noise minus a multiple of grad Q: its actions climb Q.

Paper      Diffusion Actor-Critic: Formulating Constrained Policy Iteration as Diffusion Noise Regression
           for Offline Reinforcement Learning (Fang et al., ICLR 2025), arXiv 2405.20555. Equation numbers
           are the paper's. "Code" is the authors' released code, which produced the published numbers.
Objective  max over pi of  E[ Q(s, a) ] - eta KL(pi || pi_beta): pi* is proportional to pi_beta exp(Q / eta). At noise
           level t its score is about that of the data plus grad Q(s, x_t) / eta. A score is -eps / sigma_t: the noise
           to learn is eps - sigma_t grad Q / eta (Theorems 1 and 2), and no gradient runs through the sampling chain.

Algorithm  (1) draw:     rows (s, a, r, s') of the data; t ~ Unif{1..T}, eps ~ N(0, I) for each
           (2) sample:   a'_n ~ target actor at s', n = 1..N: x_T ~ N(0, I), then T reverse steps
           (3) target:   y = r + gamma (1 - terminal) [ mean_h v_h - rho std_h v_h ],
                         v_h = mean_n (or max_n) Qtar_h(s', a'_n)                               (Eq. 18)
           (4) critics:  a step on <(Q_h(s, a) - y)^2>; then Qtar <- Polyak average of Q
           (5) actor:    a step on  eta <(eps_theta - eps)^2> + <sigma_t g eps_theta>           (Eq. 16)
                         x_t = sqrt(abar_t) a + sigma_t eps,  sigma_t = sqrt(1 - abar_t),
                         g = G / <|Qtar_h(s, a)|>,  G = grad_x mean_h Qtar_h(s, x) at x = x_t    (Eq. 19; D12)
           (6) dual:     eta <- eta + eta_lr (<(eps_theta - eps)^2> - b)
           (7) target actor: every 5th update after the first 1000, Polyak average of the actor
           To act: N_a samples of the actor, and of these the one with the greatest mean_h Qtar_h(s, a)

Symbols    s observations [.., S] | a actions [.., A] | r rewards | y targets [B] | q values [H, ..]
           eps noise and eps_theta its prediction [.., A] | x noised actions [.., A], x_t at step t = 1..T
           beta, alpha, abar: alpha_bar [T + 1], index 0 for no noise | sigma sqrt(1 - abar)
           T num_steps | H num_critics | N num_q_samples | N_a num_action_samples | B batch
           eta weight of the regression | b bc_threshold | rho pessimism | gamma discount
           tau Polyak rate | E episodes | S also num_seeds, as a leading axis
           <.> mean over the batch, the action's dimensions and the critics h

Deviations (here: always; ours: not in the published presets)
  D1  Algorithm 1 draws one a' per s'; code: N = 10; here: 10, one in --preset cpu and --quick.
  D2  Eq. 15 is a square, whose minimiser is eps - sigma g / eta; Eq. 16 and code: eps - sigma g / (2 eta);
      here: Eq. 16, so pi tends to pi_beta exp(Q / (2 eta <|Qtar|>)).
  D3  Algorithm 1 averages actor and critics at the end of every update; code and here: the critics before the
      actor's step, which uses the new averages, and the actor as in line (7).
  D4  Paper: no clip on the dual step; code and here: the excess within +-1, eta in [1e-3, 100].
  D5  Algorithm 1 takes the error of the new actor for line (6); code and here: that of line (5).
  D6  Paper: ||eps_theta - eps||^2, a sum; code and here: a mean over the action's dimensions, which b refers to.
  D7  Code visits every row once an epoch; here: uniform draws with replacement, inside the jitted loop.
  D8  Code: rewards times 1000 / (max - min episode return); here: the range has a floor (`return_scale`).
  D9  Published: mostly b = 1, where the policy leaves the data before the critics are right; ours: eta = 0.5, fixed.
  D10 Code evaluates with fresh noise each time; here: always from the same starts with the same noise.
  D11 Code: raw observations; here: the same, but a constant column other than 0 reads as 0;
      ours: angles that go round as sine and cosine (--angles).
  D12 Paper, code: grad Q over <|Q|>; ours: over the std of Q, which stays where all values fall together.
  D13 Code: rho by data set, 0 on the half cheetah, else 1 or more; ours: 0, since pessimism adds up over the steps.

Files      reads a buffer with task rewards (docs/buffer.md); writes runs/dac/<task>/, with policy.npz (docs/policy.md)
Run        python dac.py --quick                          (point robot, under 2 minutes on 2 cores)
           python dac.py --dataset runs/udg_select/ant-angle-60/top1-size50000.npz --preset cpu
           python dac.py --dataset runs/udg_select/ant-angle-60/top1.npz --num-seeds 8    (2M updates)
Expect     --quick: return 94 (data: mean -0.2, best 93.9) in half a minute; --preset cpu on 50k rows of ant-angle-60,
           top 1 of an older source: 213 in 200 steps (three seeds; data 117) in 4 minutes of a core; docs/dac.md
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
    num_updates: runner.Count = 2_000_000
    """gradient steps per seed (code: 2M)"""
    chunk: runner.Count = 100
    """gradient steps in one jitted call, some 10 s of 2 cores; a divisor of eval_every and num_updates"""
    # --- diffusion policy ---
    num_steps: runner.Count = 5
    """T: steps of the diffusion (code: 5)"""
    schedule: Literal["vp", "cosine", "linear"] = "vp"
    """beta_t: variance preserving from 0.1 to 10 (code), cosine, or linear from 1e-4 to 2e-2"""
    clip_samples: bool = True
    """clip the predicted action into [-1, 1] in every reverse step (code, but for its bandit)"""
    temperature: runner.Rate = 1.0
    """scale of the noise in the reverse steps (code: 1); not the temperature 2 eta of the docs"""
    guidance: Literal["soft", "hard", "denoised", "none"] = "soft"
    """soft (DAC): sigma_t g; hard: g; denoised: Q of whole samples (Diffusion-QL); none: cloning"""
    eta: runner.Size = 1.0
    """eta: weight of the regression on the data, at the start (code: 1; antmaze 0.1; on other data 0.5, D9)"""
    eta_lr: runner.Rate = 1e-3
    """step of the dual ascent on eta, 0 for a fixed eta (code: 1e-3; antmaze 0; on other data 0, D9)"""
    bc_threshold: runner.Rate = 1.0
    """b: error of the regression, per dimension, that eta aims at; always predicting 0 gives 1 (code: 0.05 to 1, D9)"""
    eta_min: runner.Size = 1e-3
    """lower clip of eta (code: 1e-3)"""
    eta_max: runner.Size = 100.0
    """upper clip of eta (code: 100)"""
    ema_every: runner.Count = 5
    """updates between two Polyak steps of the target actor (code: 5)"""
    ema_start: runner.Natural = 1_000
    """updates before the first of these steps (code: 1,000)"""
    num_action_samples: runner.Count = 10
    """N_a: samples at a state, of which the one with the greatest Q is played (code: 10)"""
    eval_first: bool = False
    """evaluate before the first update, too (code)"""
    # --- critics ---
    num_critics: runner.Count = 10
    """H: critics (code: 10)"""
    q_target: Literal["lcb", "min", "convex", "rand_convex"] = "lcb"
    """over H: mean - rho std (DAC), min, rho min + (1 - rho) max, or random convex weights"""
    q_norm: Literal["none", "size", "spread"] = "size"
    """what grad Q is divided by: the mean of |Q| (code), or the std of mean_h Q over the batch (on other data, D12)"""
    rho: runner.Rate = 1.0
    """rho: pessimism of lcb, weight of the min in convex (code: 0 to 1.5 by dataset; on other data 0, D13)"""
    num_q_samples: runner.Count = 10
    """N: actions a' per next state in the target (code: 10, Algorithm 1: 1; D1)"""
    max_q: bool = False
    """greatest of the N values of a critic instead of their mean (code: antmaze)"""
    # --- networks and optimisation ---
    hidden_sizes: tuple[runner.Count, ...] = (256, 256, 256)
    """widths of actor and critics (code: 3 x 256)"""
    batch_size: runner.Count = 256
    """B: rows per update (code: 256)"""
    actor_lr: runner.Rate = 3e-4
    """Adam rate of the actor (code: 3e-4)"""
    critic_lr: runner.Rate = 3e-4
    """Adam rate of the critics (code: 3e-4; antmaze-large 1e-3)"""
    critic_norm: bool = False
    """LayerNorm in the critics (ours)"""
    standardise_observations: bool = False
    """show actor and critics observations of mean 0 and std 1 over the data (ours)"""
    angles: str = "task"
    """observed angles that go round, whose sine and cosine all networks see: task (its own), none, or columns such as
    1,4 (ours, D11)"""
    lr_cosine: bool = True
    """let both rates fall to 0 over the run by a cosine (code)"""
    clip_norm: runner.Size = 1.0
    """largest global norm of a gradient; all critics share one (code: 1)"""
    gamma: runner.Share = 0.99
    """discount (code: 0.99)"""
    tau: runner.Share = 0.005
    """Polyak rate of target critics and target actor (code: 0.005)"""
    return_range: runner.Size = 1_000.0
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
FIXED = {"eta": 0.5, "eta_lr": 0.0, "q_norm": "spread"}  # D9, D12
OWN = FIXED | {"rho": 0.0}  # where nothing is published, D13
CPU = FIXED | {  # tau: bootstrapped Q lags by 1 / tau / (1 - gamma) updates, 20k at the code's 0.005, 2k here
    "num_updates": 10_000, "eval_every": 1_000, "num_q_samples": 1, "num_critics": 5, "tau": 0.05, "ema_start": 0,
    "hidden_sizes": (128, 128, 128), "actor_lr": 1e-3, "critic_lr": 1e-3, "eval_first": True,
}  # fmt: skip
PUBLISHED = {
    **{k: {"eta": 1.0, "eta_lr": 1e-3, "bc_threshold": b, "rho": rho} for k, (b, rho) in LOCOMOTION.items()},
    **{k: {"eta": 0.1, "eta_lr": 0.0, "max_q": True, "rho": rho, "critic_lr": lr} for k, (rho, lr) in ANTMAZE.items()},
}
PUBLISHED = {name: values | {"eval_first": True, "angles": "none"} for name, values in PUBLISHED.items()}
QUICK = OWN | {
    "num_updates": 3_000, "chunk": 250, "eval_every": 250, "hidden_sizes": (64, 64), "num_critics": 5,
    "num_q_samples": 1, "batch_size": 128, "actor_lr": 1e-3, "critic_lr": 1e-3,
}  # fmt: skip
SHOWN = ("train/bc_loss", "train/eta", "train/q", "train/q_std", "train/critic_loss")  # in the progress line
TRAINING = (  # panels of training.png
    ("train/eta", "weight of the regression", "eta", "semilogy"),
    ("train/bc_loss", "regression on the data", "<(eps_theta - eps)^2>", "linear"),
    ("train/q", "critics on the data, scaled rewards", "mean Q", "linear"),
    ("train/q_std", "spread of the critics", "std over H", "linear"),
)


# === data ===


class Transitions(NamedTuple):
    """Rows to learn from; any leading axes, features last."""

    observations: jax.Array  # [.., S]
    actions: jax.Array  # [.., A]
    rewards: jax.Array  # [..]
    next_observations: jax.Array  # [.., S]
    terminals: jax.Array  # [..] 1.0 where the episode ended by itself: no bootstrap; 0.0 at a time limit


def sample_batch(data, key, batch_size):
    """`batch_size` rows of the data, uniformly with replacement."""
    index = jax.random.randint(key, (batch_size,), 0, data.rewards.shape[0])
    return jax.tree.map(lambda x: x[index], data)


def return_scale(rewards, returns, args):
    """return_range / (max - min return), 1 where all rewards are 0.

    The range counts as the mean |return| at least, and as a hundredth of the mean sum of |r| in an episode.
    """
    returns, total = np.asarray(returns, np.float64), np.abs(rewards).sum(dtype=np.float64)
    spread = max(np.ptp(returns), np.abs(returns).mean(), 0.01 * total / len(returns))  # D8
    return args.return_range / spread if spread else 1.0


def dac_data(buffer, args):
    """Buffer, or dict of its columns -> rows to sample from, on the host, and what networks see of observations."""
    rows = Transitions(*(np.asarray(buffer[k], np.float32) for k in Transitions._fields))
    rewards = rows.rewards * np.float32(return_scale(rows.rewards, buffer["episode_returns"], args))
    rows = rows._replace(rewards=rewards, actions=np.clip(rows.actions, -1 + 1e-5, 1 - 1e-5))  # as the code
    angles = envs.buffers.angle_columns(args.angles)
    before = envs.buffers.turned(rows.observations, angles)
    see = envs.buffers.Sight(*envs.buffers.column_scale(before, args.standardise_observations), angles)  # D11
    if len(angles) or see.mean.any() or (see.std != 1).any():
        rows = rows._replace(observations=see(rows.observations), next_observations=see(rows.next_observations))
    return rows, see


# === networks ===


def mish(x):
    """x tanh(softplus(x)) with one exponential: with u = e^x and n = u (u + 2) it is x n / (n + 2)."""
    u = jnp.exp(jnp.minimum(x, 20.0))
    n = u * (u + 2.0)
    return x * n / (n + 2.0)


class MishMLP(nn.Module):
    """Fully connected layers, mish or LayerNorm and mish between them, Xavier-uniform weights, zero biases."""

    widths: tuple[int, ...]
    norm: bool = False

    @nn.compact
    def __call__(self, x):
        for width in self.widths[:-1]:
            x = nn.Dense(width, kernel_init=nn.initializers.xavier_uniform())(x)
            x = mish(nn.LayerNorm()(x) if self.norm else x)
        return nn.Dense(self.widths[-1], kernel_init=nn.initializers.xavier_uniform())(x)


def joined(*parts):
    """Features [.., n] side by side; their leading axes need only broadcast."""
    lead = jnp.broadcast_shapes(*(x.shape[:-1] for x in parts))
    return jnp.concatenate([jnp.broadcast_to(x, (*lead, x.shape[-1])) for x in parts], -1)


def time_features(t):
    """cos and sin of t w_j, w_j = 10000^(-j / 7), j = 0..7: [.., 16]."""
    half = TIME_FEATURES // 2
    angles = jnp.asarray(t)[..., None] * jnp.exp(-jnp.log(10_000.0) * jnp.arange(half) / (half - 1))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


class NoiseNet(nn.Module):
    """eps_theta(s, x_t, t) [.., A]: `time` reads sinusoids of t, `trunk` reads [s, x_t, output of `time`]."""

    hidden_sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, observations, x, t):
        time = MishMLP((TIME_WIDTH, TIME_WIDTH), name="time")(time_features(t))
        return MishMLP((*self.hidden_sizes, x.shape[-1]), name="trunk")(joined(observations, x, time))


class DacCritics(nn.Module):
    """H = `num` independent critics, Q_h(s, a) [H, ..]; the parameters have the same leading axis."""

    hidden_sizes: tuple[int, ...]
    num: int
    norm: bool = False

    @nn.compact
    def __call__(self, observations, actions):
        ensemble = nn.vmap(
            MishMLP, in_axes=None, axis_size=self.num, variable_axes={"params": 0}, split_rngs={"params": True}
        )
        return ensemble((*self.hidden_sizes, 1), self.norm, name="members")(joined(observations, actions))[..., 0]


def dac_critics(args):
    """The critics' architecture."""
    return DacCritics(args.hidden_sizes, args.num_critics, args.critic_norm)


def predict_noise(actor, observations, x, t, args):
    """eps_theta(s, x, t): x [.., A], t an integer or [..] -> [.., A]."""
    return NoiseNet(args.hidden_sizes).apply(actor, observations, x, t)


def q_values(critics, observations, actions, args):
    """Q_h(s, a) [H, ..]."""
    return dac_critics(args).apply(critics, observations, actions)


def polyak(target, online, tau):
    """target <- (1 - tau) target + tau online, leaf by leaf."""
    return jax.tree.map(lambda t, o: (1 - tau) * t + tau * o, target, online)


# === diffusion ===


def noise_schedule(name, num_steps):
    """beta_t, alpha_t = 1 - beta_t and alpha_bar_t = alpha_1 .. alpha_t, each [T + 1]; index 0: no noise.

    vp: beta_t = 1 - exp(-0.1 / T - (10 - 0.1) (2t - 1) / (2 T^2)); linear: DDPM's; cosine: the improved one.
    """
    t = np.arange(1, num_steps + 1)
    if name == "vp":
        beta = 1 - np.exp(-0.1 / num_steps - 0.5 * 9.9 * (2 * t - 1) / num_steps**2)
    elif name == "cosine":
        f = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = np.clip(1 - f[1:] / f[:-1], 0, 0.999)
    else:
        beta = np.linspace(1e-4, 2e-2, num_steps)
    beta = np.concatenate([[0.0], beta])
    return {"beta": beta, "alpha": 1 - beta, "alpha_bar": np.cumprod(1 - beta)}


def noised_actions(actions, eps, t, args):
    """x_t = sqrt(abar_t) a + sigma_t eps [B, A] and sigma_t = sqrt(1 - abar_t) [B, 1], of a, eps [B, A], t [B]."""
    alpha_bar = jnp.asarray(noise_schedule(args.schedule, args.num_steps)["alpha_bar"])[t][:, None]
    sigma = jnp.sqrt(1 - alpha_bar)
    return jnp.sqrt(alpha_bar) * actions + sigma * eps, sigma


def reverse_step(x, eps, t, args):
    """Mean and std of x_{t-1} given x_t = x and the predicted noise, for one t.

    x0 = clip((x - sigma_t eps) / sqrt(abar_t), -1, 1)
    mean = (sqrt(abar_{t-1}) beta_t x0 + sqrt(alpha_t) (1 - abar_{t-1}) x) / (1 - abar_t)
    std = temperature sqrt(beta_t), not the smaller one of the posterior (code)
    """
    beta, alpha, alpha_bar = map(jnp.asarray, noise_schedule(args.schedule, args.num_steps).values())
    x0 = (x - jnp.sqrt(1 - alpha_bar[t]) * eps) / jnp.sqrt(alpha_bar[t])
    x0 = jnp.clip(x0, -1.0, 1.0) if args.clip_samples else x0
    mean = jnp.sqrt(alpha_bar[t - 1]) * beta[t] * x0 + jnp.sqrt(alpha[t]) * (1 - alpha_bar[t - 1]) * x
    return mean / (1 - alpha_bar[t]), args.temperature * jnp.sqrt(beta[t])


def sample_actions(actor, observations, x_T, z, args):
    """Line (2): from x_T [.., A] through the steps T..1 -> actions [.., A]; z [T - 1, .., A]: noise of T..2."""

    def step(x, inputs):
        t, noise = inputs
        mean, std = reverse_step(x, predict_noise(actor, observations, x, t, args), t, args)
        return mean + std * noise, None

    steps = jnp.arange(args.num_steps, 1, -1)
    x, _ = jax.lax.scan(step, x_T, (steps, z), unroll=min(args.num_steps, 5))
    return reverse_step(x, predict_noise(actor, observations, x, 1, args), 1, args)[0]


# === losses ===


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


def dac_critic_loss(critics, batch, y, args):
    """Line (4): mean_HB (Q_h(s, a) - y)^2 -> scalar, metrics."""
    q = q_values(critics, batch.observations, batch.actions, args)
    chex.assert_equal_shape([q[0], y])
    loss = jnp.mean((q - y) ** 2)
    return loss, {"train/critic_loss": loss, "train/q": q.mean(), "train/q_std": q.std(0).mean()}


def q_gradient(critics, observations, actions, x, args):
    """Eq. 19: g = grad_x mean_h Q_h(s, x) / norm [B, A], and norm = mean_HB |Q_h(s, a)|, std_B mean_h Q_h or 1."""
    q = q_values(critics, observations, actions, args)
    norm = {"none": 1.0, "size": jnp.abs(q).mean() + 1e-6, "spread": q.mean(0).std() + 1e-6}[args.q_norm]
    total = lambda x: q_values(critics, observations, x, args).mean(0).sum()
    return jax.grad(total)(x) / norm, norm


def dac_actor_loss(actor, target_critics, eta, batch, noise, args):
    """Line (5), Eq. 16: eta <(eps_theta - eps)^2> + <w g eps_theta>, means over B and A -> scalar, metrics.

    w = sigma_t (soft) or 1 (hard). Other second terms: denoised -<Qtar_h(s, a_theta)> over the same norm as g, with
    a_theta sampled through the whole chain; none.
    """
    s, a = batch.observations, batch.actions
    x, sigma = noised_actions(a, noise.eps, noise.t, args)
    eps_theta = predict_noise(actor, s, x, noise.t, args)
    bc_loss = jnp.mean((eps_theta - noise.eps) ** 2)  # D6
    if args.guidance == "none":
        return bc_loss, {"train/bc_loss": bc_loss}
    g, norm = jax.lax.stop_gradient(q_gradient(target_critics, s, a, x, args))
    if args.guidance == "denoised":
        samples = sample_actions(actor, s, noise.chain[0], noise.chain[1:], args)
        guidance = -q_values(target_critics, s, samples, args).mean() / norm
    else:
        guidance = jnp.mean((sigma if args.guidance == "soft" else 1.0) * g * eps_theta)  # D2
    loss = eta * bc_loss + guidance
    return loss, {
        "train/actor_loss": loss, "train/bc_loss": bc_loss, "train/guidance": guidance, "train/eta": eta,
        "train/q_gradient": jnp.abs(g).mean(),
    }  # fmt: skip


def dual_step(eta, bc_loss, args):
    """Line (6): eta + eta_lr clip(<(eps_theta - eps)^2> - b, -1, 1), within [eta_min, eta_max]; or a fixed eta."""
    excess = jnp.clip(bc_loss - args.bc_threshold, -1.0, 1.0)
    return jnp.clip(eta + args.eta_lr * excess, args.eta_min, args.eta_max) if args.eta_lr else eta  # D4


# === update ===


class Noise(NamedTuple):
    """All randomness of an update except the choice of rows."""

    x_T: jax.Array  # [B, N, A] of the next actions
    z: jax.Array  # [T - 1, B, N, A] of their reverse steps
    t: jax.Array  # [B] 1..T
    eps: jax.Array  # [B, A]
    mix: jax.Array  # [H, B] weights of rand_convex
    chain: jax.Array  # [T, B, A] x_T and z of denoised guidance


class DacState(NamedTuple):
    """What a run needs to go on; all leaves have a leading seed axis outside the update."""

    key: jax.Array
    num_updates: jax.Array
    actor: Any
    target_actor: Any
    critics: Any  # leading axis H
    target_critics: Any
    actor_opt: Any
    critic_opt: Any
    eta: jax.Array


def draw_noise(key, actions, args):
    """Noise for a batch with actions [B, A]; what a setting does not use, the compiler drops."""
    key_next, key_t, key_eps, key_mix, key_chain = jax.random.split(key, 5)
    T, (B, A) = args.num_steps, actions.shape
    next_noise = jax.random.normal(key_next, (T, B, args.num_q_samples, A))
    return Noise(
        x_T=next_noise[0],
        z=next_noise[1:],
        t=jax.random.randint(key_t, (B,), 1, T + 1),
        eps=jax.random.normal(key_eps, (B, A)),
        mix=jax.random.uniform(key_mix, (args.num_critics, B)),
        chain=jax.random.normal(key_chain, (T, B, A)),
    )


def dac_adam(rate, args):
    """Gradients clipped to clip_norm, then Adam; lr_cosine: at a rate that falls to 0."""
    rate = optax.cosine_decay_schedule(rate, args.num_updates) if args.lr_cosine else rate
    return optax.chain(optax.clip_by_global_norm(args.clip_norm), optax.adam(rate))


def critic_update(state, batch, noise, args):
    """Lines (2) to (4) -> state, metrics. With gamma = 0 (the bandit) y is r, and no actions are sampled."""
    if args.gamma == 0:
        y = batch.rewards
    else:
        next_s = batch.next_observations[:, None]  # [B, 1, S], for all N actions
        next_actions = sample_actions(state.target_actor, next_s, noise.x_T, noise.z, args)
        next_q = q_values(state.target_critics, next_s, next_actions, args)
        y = dac_target(next_q, batch.rewards, batch.terminals, noise.mix, args)
    grads, metrics = jax.grad(dac_critic_loss, has_aux=True)(state.critics, batch, y, args)
    step, critic_opt = dac_adam(args.critic_lr, args).update(grads, state.critic_opt)
    critics = optax.apply_updates(state.critics, step)
    target_critics = polyak(state.target_critics, critics, args.tau)  # D3
    state = state._replace(critics=critics, target_critics=target_critics, critic_opt=critic_opt)
    return state, {**metrics, "train/target": y.mean()}


def dac_update(state, batch, noise, args):
    """Lines (2) to (7), their noise given -> state, metrics. Cloning has no critics and no eta to learn."""
    metrics = {}
    if args.guidance != "none":
        state, metrics = critic_update(state, batch, noise, args)

    inputs = state.target_critics, state.eta, batch, noise, args
    grads, actor_metrics = jax.grad(dac_actor_loss, has_aux=True)(state.actor, *inputs)
    step, actor_opt = dac_adam(args.actor_lr, args).update(grads, state.actor_opt)
    actor = optax.apply_updates(state.actor, step)
    eta = state.eta if args.guidance == "none" else dual_step(state.eta, actor_metrics["train/bc_loss"], args)  # D5
    due = (state.num_updates % args.ema_every == 0) & (state.num_updates > args.ema_start)  # first at 1005, as the code
    target_actor = polyak(state.target_actor, actor, jnp.where(due, args.tau, 0.0))  # D3
    state = state._replace(actor=actor, target_actor=target_actor, actor_opt=actor_opt, eta=eta)
    return state._replace(num_updates=state.num_updates + 1), metrics | actor_metrics


# === evaluation ===


def candidates(args):
    """N_a; cloning has no critic to choose by."""
    return 1 if args.guidance == "none" else args.num_action_samples


def choose_actions(nets, observations, key, args, num_act):
    """Of N_a samples of the actor at each state [E, S] the one of greatest mean_h Qtar_h(s, a) -> [E, A], metrics.

    Metrics: std of a state's samples; gain: Q of the chosen sample minus the mean Q of all, divided by mean |Qtar|;
    gain_std: its std over the critics. Where only the actions are used, the compiler drops them.
    """
    actor, target_critics = nets
    s = observations[:, None]  # [E, 1, S]
    noise = jax.random.normal(key, (args.num_steps, len(s), candidates(args), num_act))
    actions = jnp.clip(sample_actions(actor, s, noise[0], noise[1:], args), -1.0, 1.0)
    if candidates(args) == 1:
        return actions[:, 0], {}
    q = q_values(target_critics, s, actions, args)  # [H, E, N_a]
    best = jnp.argmax(q.mean(0), -1)[:, None]  # [E, 1]
    gain = (jnp.take_along_axis(q, best[None], -1)[..., 0] - q.mean(-1)) / jnp.abs(q).mean()  # [H, E]
    metrics = {"action_std": actions.std(1).mean(), "gain": gain.mean(), "gain_std": gain.std(0).mean()}
    return jnp.take_along_axis(actions, best[..., None], 1)[:, 0], {f"choice/{k}": x for k, x in metrics.items()}


def make_evaluation(args, task, buffer, data, see):
    """-> evaluate((actors, target critics), keys [S]) -> returns of episodes, choices at 256 states of the data [S]."""
    act = lambda nets, s, key: choose_actions(nets, see(s), key, args, task.action_size)[0]
    returns = runner.returns_of(act, envs.make(task, args.backend), task, buffer, args, sampled=True)
    some = data.observations[np.random.default_rng(0).integers(len(data.rewards), size=256)]
    choice = lambda nets, key: choose_actions(nets, some, key, args, task.action_size)[1]
    return runner.each_seed(lambda nets, key: returns(nets, key) | choice(nets, jax.random.fold_in(key, 1)), args)


# === training ===


def make_train(args, num_obs, num_act):
    """-> init(keys [S]), train_chunk(state, data) -> state, metrics [S], means of the chunk."""

    def init(key):
        key, key_actor, key_critics = jax.random.split(key, 3)
        s, a = jnp.zeros(num_obs), jnp.zeros(num_act)
        actor = NoiseNet(args.hidden_sizes).init(key_actor, s, a, 1)
        critics = dac_critics(args).init(key_critics, s, a)
        actor_opt = dac_adam(args.actor_lr, args).init(actor)
        critic_opt = dac_adam(args.critic_lr, args).init(critics)
        nets = actor, actor, critics, critics  # targets start as copies
        return DacState(key, jnp.int32(0), *nets, actor_opt, critic_opt, jnp.float32(args.eta))

    def one_update(state, data):
        key, key_batch, key_noise = jax.random.split(state.key, 3)
        batch = sample_batch(data, key_batch, args.batch_size)  # D7
        return dac_update(state._replace(key=key), batch, draw_noise(key_noise, batch.actions, args), args)

    def one_chunk(state, data):
        state, metrics = jax.lax.scan(lambda state, _: one_update(state, data), state, length=args.chunk)
        return state, jax.tree.map(jnp.mean, metrics)

    chunk = lambda state, data: runner.map_seeds(lambda state: one_chunk(state, data), state, args)
    return jax.jit(runner.over_devices(jax.vmap(init), args)), jax.jit(chunk, donate_argnums=0)


# === run ===


def preset(args):
    """--quick, or the published values of the file's dataset or of --preset, and --preset cpu on top."""
    return runner.preset(args, PUBLISHED, {"cpu": CPU}, QUICK, own=OWN)


def idle_flags(args):
    """Flags without effect beside the others, and why."""
    idle = {}
    if args.eta_lr == 0:
        idle |= dict.fromkeys(("bc_threshold", "eta_min", "eta_max"), "eta is fixed; add --eta-lr 1e-3")
    if args.q_target not in ("lcb", "convex"):
        idle["rho"] = f"--q-target {args.q_target} does not use it"
    if args.guidance == "none":
        names = "eta eta_lr bc_threshold eta_min eta_max num_action_samples num_critics q_target rho critic_lr gamma "
        names += "num_q_samples max_q critic_norm return_range q_norm tau ema_every ema_start"
        idle |= dict.fromkeys(names.split(), "--guidance none only clones")
    return idle


def write_policy(run, state, see, args):
    """policy.npz: actor, target critics to choose by (none where an action is one sample), schedule, observation_.."""
    params = {"actor": state.actor, "schedule": noise_schedule(args.schedule, args.num_steps)}
    params |= see.stored(args.num_seeds)
    if candidates(args) > 1:
        params["critics"] = state.target_critics
    run.write_policy(
        "diffusion", params, num_action_samples=candidates(args), temperature=args.temperature,
        clip_samples=args.clip_samples, action_size=run.task.action_size,
    )  # fmt: skip


def main(args):
    """Train the seeds, write policy and figures -> scores."""
    in_order = args.eta_min <= args.eta <= args.eta_max or args.eta_lr == 0
    runner.refuse({"--eta-min, --eta and --eta-max must be in ascending order": in_order})
    buffer, task = runner.open_task("dac", args, Transitions._fields)
    args = runner.with_angles(args, task)
    data, see = dac_data(buffer, args)
    keys, eval_keys = runner.seed_keys(args), runner.evaluation_keys(args)
    init, train_chunk = make_train(args, data.observations.shape[1], task.action_size)
    evaluate = make_evaluation(args, task, buffer, data, see)

    remedy = "raise --eta (with --eta-lr above 0: lower --bc-threshold) or --rho"
    with runner.Run("dac", args, task, buffer, schedules={"lr_cosine": False}, remedy=remedy) as run:
        train_chunk = run.compile(train_chunk, jax.eval_shape(init, keys), data)
        state = run.restore(init, keys)
        data = jax.device_put(data)  # all rows stay on the device
        if args.eval_first and not state.num_updates.any():
            run.log(0, evaluate((state.actor, state.target_critics), eval_keys))
        for step in run.chunks("update", args.num_updates, state.num_updates):
            state, metrics = train_chunk(state, data)
            run.progress(step, metrics, SHOWN)
            if run.due(step):  # D10
                run.log(step, metrics | evaluate((state.actor, state.target_critics), eval_keys))
            run.save(state)
        write_policy(run, state, see, args)
        return run.finish(TRAINING)


if __name__ == "__main__":
    runner.launch(main, Args, preset, ("cpu", "ours", "published", *PUBLISHED), __doc__, idle=idle_flags)
