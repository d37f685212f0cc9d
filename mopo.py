"""MOPO: fit a model of the world to one buffer and train SAC inside it, with a penalty where the model is uncertain.

Paper      MOPO: Model-based Offline Policy Optimization (Yu et al., NeurIPS 2020), arXiv 2005.13239.
           Last stage of UDG (Unsupervised Data Generation for Offline RL), arXiv 2506.19643.
           "orig" is the authors' code, "ORLKit" is OfflineRL-Kit; "codes" or "both" are these two.
Objective  max over pi of  E[ sum_t gamma^t ( r - lam u(s, a) ) ]  in the learned model. If u bounds the
           model's error, this is a lower bound of the true return (paper, section 4).

Algorithm  (1) split:     hold out min(20 %, 1000) rows in runs; standardise inputs (s, a) and targets on the others
           (2) model:     E Gaussian networks p_i(s' - s, r | s, a), each on its own bootstrap
           (3) stop:      when for 5 epochs no member gained 0.01 nats a number on the hold-out (published: 1 % of
                          its error); restore every member's best epoch; the M best members are the elites
           (4) roll out:  from b real states, h steps of the policy; a random elite per row and step
           (5) penalise:  r~ = r - lam u(s, a),  u = max_i || sigma_i(s, a) ||     (section 4.3)
           (6) store:     rows alive at the start of their step, in a ring of `retain` refreshes
           (7) learn:     `rollout_freq` SAC updates on 5 % real and 95 % model rows: critics, actor
                          with the new critics, alpha, Polyak target; then (4) again

Symbols    s observations [.., S] | a actions [.., A] | r rewards | y target: of the model
           (s' - s, r) [.., D], D = S + 1; of a critic [B] | x standardised (s, a) | q [C, B]
           mean, std [E, B, D] of the members | u penalty [B] | lam its weight (paper: lambda)
           n angles, seen as sine and cosine | E ensemble_size | M num_elites | N rows | H held-out rows | B batch
           C num_critics | h horizon | b rollout_batch | alpha entropy weight | gamma discount | S also seeds, in front

Deviations (published presets are as the codes in D11 to D16; the page says why)
  D1  Paper: the norm of the covariance; codes: the norm of the vector of stds; here: the codes'.
  D2  Paper: the model's mean reward; codes: a sampled reward; here: sampled.
  D3  Paper: spectral normalisation; released code: none; here: none.
  D4  orig stops after more than 5 epochs without a gain, ORLKit after 5, no other bound; here: 5, and bounds on steps.
  D5  Codes: an epoch visits every row of the bootstrap once; here: as many random draws, in whole batches.
  D6  orig lets a rollout leave the data and bootstraps there, ORLKit calls |s| > 100 terminal; here: a rollout
      ends outside the data's range plus a margin, where the value is min(V, 0). Rows not finite are dropped.
  D7  orig: target entropy -3 in every task, one learning rate, log std >= -20; here: ORLKit's target
      entropy -A, three rates, the actor's with a cosine, alpha <= 1, log std >= -5.
  D8  ORLKit corrects tanh by log(1 - a^2 + 1e-6); here: exactly, as orig.
  D9  orig: all gradients at the weights before the update, half the squared error; here: ORLKit's order, all of it.
  D10 Codes divide by any input std above 1e-12; here: only above 1e-6 of the mean.
  D11 Codes: plain critics, two of them; here: with LayerNorm, and as many as --num-critics says.
  D12 Codes: the model predicts raw (s' - s, r); here: in standard deviations of the data; u and errors are raw.
  D13 Codes hold out single rows; here: 20 neighbours together.
  D14 Codes stop by the hold-out's squared error and keep each member where that was least; here: by its likelihood.
  D15 Codes: actor and critics see raw observations; here: standardised.
  D16 Codes: all networks see angles as they are; here: those that can make a full turn as sine and cosine.
  D17 Codes: episodes end by known rules; here: by a classifier of the data where the world gives none.

Files      reads a buffer file with rewards (docs/buffer.md), as udg_select.py makes; writes runs/mopo/<task>/...:
           policy.npz (docs/policy.md), log.jsonl, state.npz, model/state.npz, four figures (*.png)
Run        python mopo.py --quick                         (point robot, under 2 minutes on 2 cores)
           python mopo.py --dataset runs/udg_select/ant-angle-60/top1-size50000.npz --preset cpu
           python mopo.py --dataset runs/udg_select/ant-angle-60/top1.npz --num-seeds 5    (1M updates)
Expect     --quick: ends at 94 (data: mean -0.2, best 93.9), 30 s on 2 CPU cores; --preset cpu on 50,000 rows of
           the main job's best buffer for ant-angle-60: 291 in 200 steps (mean of three seeds; data: 93)
"""

import dataclasses
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
from envs.buffers import Sight, angle_columns, turned
from envs.buffers.ring import Ring, ring_init, ring_insert, ring_sample
from runner import model_report, value_report


@dataclass(frozen=True)
class Args(runner.Flags):
    # beside the flags that every learner has: dataset, task, seed, num_seeds, ... (runner/flags.py)
    # --- budget ---
    num_updates: runner.Count = 1_000_000
    """SAC gradient steps per seed (orig: 1M, ORLKit: 3M)"""
    chunk: runner.Count = 1_000
    """gradient steps in one jitted call; a multiple of rollout_freq, a divisor of eval_every and num_updates"""
    # --- model ---
    ensemble_size: runner.Count = 7
    """E: members (paper: 7)"""
    num_elites: runner.Count = 5
    """M: members with the best hold-out score, which roll out (paper: 5)"""
    model_hidden_sizes: tuple[runner.Count, ...] = (200, 200, 200, 200)
    """widths of a member (paper: 4 x 200)"""
    model_decays: tuple[runner.Rate, ...] = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)
    """c_l: L2 weight per layer, the last one the output's (orig)"""
    model_lr: runner.Rate = 1e-3
    """Adam rate of the model (paper: 1e-3)"""
    model_batch_size: runner.Count = 256
    """rows per member and step (paper: 256)"""
    logvar_coef: runner.Rate = 0.01
    """weight of the log-variance bounds in the loss (orig: 0.01)"""
    holdout_share: runner.Share = 0.2
    """largest share of the rows held out (ORLKit: 0.2)"""
    holdout_rows: runner.Natural = 1_000
    """largest number of rows held out (paper: 1,000)"""
    holdout_run: runner.Count = 20
    """rows in a row that are held out together: steps of one episode resemble one another (ours, D13; both: 1)"""
    patience: runner.Count = 5
    """epochs without any member's gain that end the fit (ORLKit: 5, D4)"""
    fit_score: Literal["nll", "mse"] = "nll"
    """what a member is judged by on the hold-out: nll fits its std, and so u, as well (ours, D14; both: mse)"""
    min_gain: runner.Rate = 0.01
    """gain on the hold-out that counts: a share of the mse (both: 0.01), or nats for each number of a target"""
    max_epochs: runner.Count = 1_000
    """cap on the epochs of the fit (ours, D4; D4RL's sets: 200)"""
    standardise_targets: bool = True
    """divide the model's targets by their standard deviation inside the model (ours, D12; both: raw)"""
    min_model_steps: runner.Natural = 5_000
    """Adam steps before which the fit does not end, unless it comes to a cap (ours, D4)"""
    max_model_steps: runner.Natural = 0
    """cap on the Adam steps of the fit, rounded up to whole epochs, beside max_epochs; 0: none (ours, D4)"""
    # --- rollouts ---
    horizon: runner.Count = 5
    """h: steps of a model rollout (paper: 1 or 5 by dataset)"""
    lam: runner.Rate = 1.0
    """lambda: weight of the penalty (paper: 0.5 to 5 by dataset)"""
    penalty: Literal[
        "max_aleatoric", "max_aleatoric_elites", "max_dist_to_mean", "max_pairwise",
        "ensemble_std", "total_std",
    ] = "max_aleatoric"  # fmt: skip
    """u: max_aleatoric (MOPO) or a variant (docs/mopo.md); each needs its own lambda"""
    reward: Literal["learned", "known"] = "learned"
    """reward of model steps: learned (MOPO), or known: the task's, where observations tell it"""
    rollout_batch: runner.Count = 50_000
    """b: start states per refresh (both: 50,000)"""
    rollout_freq: runner.Count = 1_000
    """gradient steps between two refreshes (both: 1,000)"""
    retain: runner.Count = 5
    """refreshes that the ring of model rows holds (both: 5)"""
    real_ratio: runner.Share = 0.05
    """share of real rows in a batch (both: 0.05)"""
    range_margin: runner.Rate = 0.5
    """a rollout ends beyond the data's range and this share of it on either side (ours, D6; orig: never, as 1e9)"""
    # --- SAC ---
    hidden_sizes: tuple[runner.Count, ...] = (256, 256)
    """widths of actor and critics (both: 256, 256)"""
    num_critics: runner.Count = 2
    """Q networks, the least of which counts (both: 2); try 10 if Q keeps rising (docs/mopo.md; ours, D11)"""
    standardise_observations: bool = True
    """actor and critics see observations in standard deviations of the data (ours, D15; both: raw)"""
    angles: str = "task"
    """observed angles that go round, whose sine and cosine all networks see: task (its own), none, or columns such as
    1,4 (ours, D16; both: none)"""
    critic_norm: bool = True
    """LayerNorm before each ReLU of the critics, which bounds what they say far from the data (ours, D11)"""
    batch_size: runner.Count = 256
    """B: rows per update, real and model together (both: 256)"""
    actor_lr: runner.Rate = 1e-4
    """Adam rate of the actor (ORLKit: 1e-4, orig: 3e-4)"""
    critic_lr: runner.Rate = 3e-4
    """Adam rate of the critics (both: 3e-4)"""
    alpha_lr: runner.Rate = 1e-4
    """Adam rate of log alpha (ORLKit: 1e-4, orig: 3e-4)"""
    actor_cosine: bool = True
    """let the actor's rate fall to 0 over the run by a cosine (ORLKit; orig: constant)"""
    gamma: runner.Share = 0.99
    """discount (both: 0.99)"""
    tau: runner.Share = 0.005
    """Polyak rate of the target critics, every update (both: 0.005)"""
    target_entropy: float | None = None
    """entropy that alpha aims at; None: -A (ORLKit; orig: -3)"""
    alpha_max: runner.Rate = 1.0
    """alpha is clipped here where it is used (ORLKit: 1)"""
    log_std_min: float = -5.0
    """lower clip of the actor's log standard deviation (ORLKit: -5, orig: -20)"""
    log_std_max: float = 2.0
    """upper clip of the actor's log standard deviation (both: 2)"""


KINDS = ("medium", "medium-replay", "medium-expert", "random")
HORIZON_AND_LAM = {  # horizon h, lam for each of KINDS
    "halfcheetah-{}-v2": ((5, 0.5), (5, 0.5), (5, 2.5)),  # v2: OfflineRL-Kit
    "hopper-{}-v2": ((5, 5.0), (5, 2.5), (5, 5.0)),
    "walker2d-{}-v2": ((5, 0.5), (1, 2.5), (1, 2.5)),
    "halfcheetah-{}-v0": ((1, 1.0), (5, 1.0), (5, 5.0), (5, 0.5)),  # v0: the original code; paper: medium-expert 5, 1
    "hopper-{}-v0": ((5, 5.0), (5, 1.0), (5, 1.0), (5, 1.0)),
    "walker2d-{}-v0": ((5, 5.0), (1, 1.0), (1, 2.0), (1, 1.0)),
}
CPU = {  # ours: 50k rows of a robot, minutes on 2 cores (docs/mopo.md says what each is for)
    "max_epochs": 1_000, "min_model_steps": 5_000, "max_model_steps": 15_000, "num_updates": 20_000,
    "eval_every": 2_000, "rollout_batch": 10_000, "real_ratio": 0.5, "actor_lr": 3e-4, "alpha_lr": 3e-3,
}  # fmt: skip
AS_CODES = {  # D11 to D16 undone, and no least number of steps; the cap of 200 epochs is ours (D4)
    "standardise_targets": False, "holdout_run": 1, "fit_score": "mse", "critic_norm": False,
    "standardise_observations": False, "angles": "none", "min_model_steps": 0, "max_epochs": 200,
}  # fmt: skip
PUBLISHED = {
    name.format(kind): {"horizon": h, "lam": lam, "num_updates": 3_000_000 if "v2" in name else 1_000_000} | AS_CODES
    for name, cells in HORIZON_AND_LAM.items()
    for kind, (h, lam) in zip(KINDS, cells, strict=False)  # v2 has no random
}
QUICK = {
    "max_epochs": 60, "min_model_steps": 0, "model_hidden_sizes": (64, 64), "num_updates": 3_000, "chunk": 500,
    "rollout_freq": 500, "eval_every": 500, "rollout_batch": 2_000, "hidden_sizes": (64, 64),
    "actor_lr": 1e-3, "critic_lr": 1e-3, "alpha_lr": 1e-3,
}  # fmt: skip
SHOWN = ("train/q", "train/entropy", "model/reward", "model/penalty_share")  # in the progress line
CALL_STEPS = 500  # Adam steps of the model in one jitted call, at most: signals and checkpoints wait for its end


# === data ===


class Rows(NamedTuple):
    """Steps of the data or of the model; leading axes free, features last."""

    observations: jax.Array  # [.., S]
    actions: jax.Array  # [.., A]
    rewards: jax.Array  # [..] the data's r; of model rows r - lam u
    next_observations: jax.Array  # [.., S]
    terminals: jax.Array  # [..] 1.0 where the episode truly ended: value 0 after it
    outside: jax.Array  # [..] 1.0 where a rollout left the data's range: value at most 0 after it      # D6


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


class MopoCritics(nn.Module):
    """`num` independent Q networks on (s, a): [num, ..]; with `norm` a LayerNorm before each ReLU."""

    hidden_sizes: tuple[int, ...]
    num: int
    norm: bool

    @nn.compact
    def __call__(self, observations, actions):
        dense = lambda width: nn.Dense(width, kernel_init=nn.initializers.xavier_uniform())

        def q(x):
            if not self.norm:
                return MLP((*self.hidden_sizes, 1))(x)[..., 0]
            for width in self.hidden_sizes:
                x = nn.relu(nn.LayerNorm()(dense(width)(x)))  # D11
            return dense(1)(x)[..., 0]

        return jnp.stack([q(jnp.concatenate([observations, actions], -1)) for _ in range(self.num)])


def policy_net(args, action_size):
    """The actor's architecture."""
    return Actor(args.hidden_sizes, action_size, args.log_std_min, args.log_std_max)


def critic_net(args):
    """The critics' architecture."""
    return MopoCritics(args.hidden_sizes, args.num_critics, args.critic_norm)


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


class Ensemble(NamedTuple):
    """E Gaussian networks side by side; they share the bounds of the log-variance.

    Plain arrays, because each layer has a weight decay of its own; a vmapped flax module fits 4 % more slowly.
    """

    weights: tuple[jax.Array, ...]  # per layer [E, in, out]
    biases: tuple[jax.Array, ...]  # per layer [E, 1, out]
    max_logvar: jax.Array  # [D]; of members at their best, [E, 1, D]
    min_logvar: jax.Array


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
    """x [B, S + n + A] for all or [E, B, S + n + A] -> mean, raw log-variance [E, B, D]; swish between layers."""
    for layer, (w, b) in enumerate(zip(net.weights, net.biases, strict=True)):  # D3
        x = jnp.matmul(x, w, precision=precision) + b
        x = nn.silu(x) if layer < len(net.weights) - 1 else x
    return jnp.split(x, 2, axis=-1)


def bound_logvar(net, raw):
    """Soft clamp, upper bound first: l1 = max - softplus(max - raw), l = min + softplus(l1 - min)."""
    upper = net.max_logvar - nn.softplus(net.max_logvar - raw)
    return net.min_logvar + nn.softplus(upper - net.min_logvar)


# === losses ===


def gaussian_nll(net, mean, raw, targets, args, varies=True):
    """Line (2): sum_E mean_BD [ (mean - y)^2 exp(-l) + l ] + c (sum_D max - sum_D min) -> scalar.

    mean, raw, targets [E, B, D]; varies [D]: which targets count; l: raw within the bounds; the last term draws the
    bounds together.
    """
    logvar = bound_logvar(net, raw)
    chex.assert_equal_shape([mean, logvar, targets])
    nll = (mean - targets) ** 2 * jnp.exp(-logvar) + logvar
    bounds = jnp.sum(net.max_logvar - net.min_logvar, where=varies)
    return nll.mean((1, 2), where=varies).sum() + args.logvar_coef * bounds


def weight_decay(net, args):
    """sum_l c_l / 2 sum_E ||W_l||^2; biases are free; deeper nets repeat the last hidden layer's c."""
    *hidden, last = args.model_decays
    decays = [hidden[min(i, len(hidden) - 1)] for i in range(len(net.weights) - 1)] + [last]
    return sum(0.5 * c * jnp.sum(w**2) for c, w in zip(decays, net.weights, strict=True))


def mopo_model_loss(net, x, targets, args, varies=True):
    """Likelihood and weight decay of the members, each on its own rows x [E, B, S + n + A] -> scalar."""
    mean, raw = ensemble_apply(net, x, "highest")  # TF32 is too coarse for a variance
    return gaussian_nll(net, mean, raw, targets, args, varies) + weight_decay(net, args)


def sac_target(batch, next_q, next_log_probs, alpha, gamma):
    """y = r~ + gamma (1 - terminal) V(s') [B],  V = min_c Qbar_c(s', a') - alpha log pi(a'|s'); no gradient.

    Outside the data's range V is not known and min(V, 0) stands for it.
    """
    value = next_q - alpha * next_log_probs
    value = jnp.where(batch.outside > 0.5, jnp.minimum(value, 0.0), value)  # D6
    return jax.lax.stop_gradient(batch.rewards + gamma * (1 - batch.terminals) * value)


def mopo_critic_loss(critic, target, actor, alpha, batch, key, args):
    """sum_c mean_B (Q_c(s, a) - y)^2,  a' ~ pi(. | s') with the actor before its step -> scalar, metrics."""
    mean, log_std = policy_net(args, batch.actions.shape[-1]).apply(actor, batch.next_observations)
    next_actions, log_probs = tanh_normal_sample(mean, log_std, jax.random.normal(key, mean.shape))
    critics = critic_net(args)
    next_q = critics.apply(target, batch.next_observations, next_actions).min(0)
    y = sac_target(batch, next_q, log_probs, alpha, args.gamma)
    q = critics.apply(critic, batch.observations, batch.actions)
    chex.assert_equal_shape([q[0], y])
    loss = jnp.sum(jnp.mean((q - y) ** 2, -1))
    return loss, {"train/critic_loss": loss, "train/q": q.mean(), "train/target": y.mean()}


def mopo_actor_loss(actor, critic, alpha, batch, key, args):
    """mean_B (alpha log pi(a|s) - min_c Q_c(s, a)),  a ~ pi(. | s), critics after their step."""
    mean, log_std = policy_net(args, batch.actions.shape[-1]).apply(actor, batch.observations)
    actions, log_probs = tanh_normal_sample(mean, log_std, jax.random.normal(key, mean.shape))
    q = critic_net(args).apply(critic, batch.observations, actions).min(0)
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
    rate = optax.cosine_decay_schedule(args.actor_lr, args.num_updates) if args.actor_cosine else args.actor_lr  # D7
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

    own = -float(batch.actions.shape[-1])
    target_entropy = own if args.target_entropy is None else args.target_entropy
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
    best: jax.Array  # [E] fit_score there, in the model's units
    holdout_mse: jax.Array  # [E] at the last epoch, in the task's units
    idle: jax.Array  # epochs since any member gained
    bootstrap: jax.Array  # [E, N] data rows of a member
    holdout: jax.Array  # [H] data rows of none
    scale: "Scale"


class Scale(NamedTuple):
    """Units of the model, from its training rows: x = ((s, a) - input_mean) / input_std, targets alike."""

    input_mean: jax.Array  # [S + n + A]
    input_std: jax.Array
    target_mean: jax.Array  # [D] 0 and 1 without standardise_targets
    target_std: jax.Array  # 0: this target never varies; it is predicted so, and the fit does not count it
    angles: jax.Array  # [n] columns of the observations


class Model(NamedTuple):
    """What the rollouts of one seed need."""

    net: Any  # Ensemble; or another model (benchmark/mopo_models.py): a function (s, a) -> what `predict` gives
    elites: jax.Array  # [M]
    scale: Scale
    low: jax.Array  # [S] rollouts end outside of low, high
    high: jax.Array
    high_reward: jax.Array  # the 99th percentile of the data's
    see: Sight  # what actor and critics see of observations


def model_inputs(scale, observations, actions):
    """x = ((s, a) - mean) / std."""
    seen = turned(observations, scale.angles)  # D16
    return (jnp.concatenate([seen, actions], -1) - scale.input_mean) / scale.input_std


def model_targets(rows):
    """y = (s' - s, r) [.., D], in raw units."""
    return jnp.concatenate([rows.next_observations - rows.observations, rows.rewards[..., None]], -1)


def scaled_targets(scale, rows):
    """(y - mean) / std, as the networks learn them."""  # D12
    return (model_targets(rows) - scale.target_mean) / jnp.where(scale.target_std > 0, scale.target_std, 1.0)


def split_data(key, data, args):
    """Line (1): -> training rows [N], hold-out rows [H], Scale of the training rows."""
    num_rows = len(data.rewards)
    num_holdout = min(int(args.holdout_share * num_rows), args.holdout_rows)
    run = max(min(args.holdout_run, num_holdout), 1)
    first = run * jax.random.permutation(key, num_rows // run)[: num_holdout // run]
    holdout = (first[:, None] + jnp.arange(run)).reshape(-1)  # D13
    taken = jnp.zeros(num_rows, bool).at[holdout].set(True)
    train = jnp.flatnonzero(~taken, size=num_rows - len(holdout))
    angles = jnp.asarray(angle_columns(args.angles))
    inputs = moments(jnp.concatenate([turned(data.observations, angles), data.actions], -1)[train])
    targets = target_moments(jax.tree.map(lambda x: x[train], data))
    if not args.standardise_targets:
        targets = jnp.zeros_like(targets[0]), jnp.ones_like(targets[1])
    return train, holdout, Scale(*inputs, *targets, angles)


def moments(x):
    """Mean and std of the columns of x [N, d]; std 1 where a column is constant but for rounding."""
    mean, std = x.mean(0), x.std(0)
    return mean, jnp.where(std <= 1e-6 * jnp.abs(mean), 1.0, std)  # D10


def target_moments(rows):
    """Mean and std [D] of the targets; std 0 where one is constant, but for the rounding of s' - s."""
    y, size = model_targets(rows), jnp.abs(rows.observations).mean(0)
    mean, std = y.mean(0), y.std(0)
    rounding = jnp.maximum(1e-6 * jnp.abs(mean), jnp.append(2e-7 * size, 0.0))
    return mean, jnp.where(std <= rounding, 0.0, std)


def fit_init(key, data, args):
    """A fresh ensemble with its split and bootstrap -> Fit."""
    key, key_split, key_boot, key_net = jax.random.split(key, 4)
    train, holdout, scale = split_data(key_split, data, args)
    draws = jax.random.randint(key_boot, (args.ensemble_size, len(train)), 0, len(train))
    net = ensemble_init(key_net, args, len(scale.input_mean), data.observations.shape[1] + 1)
    own = lambda bound: jnp.tile(bound, (args.ensemble_size, 1, 1))
    best_net = Ensemble(*jax.tree.map(jnp.copy, net[:2]), *map(own, net[2:]))
    return Fit(
        key, jnp.int32(0), net, optax.adam(args.model_lr).init(net), best_net,
        jnp.full(args.ensemble_size, jnp.inf), jnp.full(args.ensemble_size, jnp.inf), jnp.int32(0),
        train[draws], holdout, scale,
    )  # fmt: skip


def epoch_sizes(num_rows, args):
    """-> batch, Adam steps of one jitted call, and of an epoch: N / batch, or a few less, in equal calls."""
    batch = min(args.model_batch_size, num_rows)
    calls = -(-(num_rows // batch) // CALL_STEPS)
    return batch, num_rows // batch // calls, num_rows // batch // calls * calls


def max_steps(num_rows, args):
    """Adam steps of a fit at most, in whole epochs."""
    epoch = epoch_sizes(num_rows, args)[2]
    epochs = -(-args.max_model_steps // epoch) if args.max_model_steps else args.max_epochs
    return min(epochs, args.max_epochs, (2**31 - 1) // epoch) * epoch  # steps are counted in 32 bits


def fitting(fit, args):
    """Line (3): whether the fit goes on."""
    improving = (fit.idle < args.patience) | (fit.step < args.min_model_steps)
    return improving & (fit.step < max_steps(fit.bootstrap.shape[-1], args))  # D4


def fit_chunk(fit, data, args):
    """Line (2): some hundred Adam steps, and what is due at the end of an epoch -> Fit."""
    num_rows = fit.bootstrap.shape[1]
    batch, steps, epoch = epoch_sizes(num_rows, args)
    key, key_steps = jax.random.split(fit.key)

    def step(carry, key):
        net, opt = carry
        columns = jax.random.randint(key, (args.ensemble_size, batch), 0, num_rows)  # D5
        index = jnp.take_along_axis(fit.bootstrap, columns, 1)
        rows = jax.tree.map(lambda x: x[index], data)  # [E, B, ..]
        x = model_inputs(fit.scale, rows.observations, rows.actions)
        targets = scaled_targets(fit.scale, rows)
        grads = jax.grad(mopo_model_loss)(net, x, targets, args, fit.scale.target_std > 0)
        change, opt = optax.adam(args.model_lr).update(grads, opt)
        return (optax.apply_updates(net, change), opt), None

    (net, opt), _ = jax.lax.scan(step, (fit.net, fit.opt), jax.random.split(key_steps, steps))
    fit = fit._replace(key=key, step=fit.step + steps, net=net, opt=opt)
    return jax.lax.cond(fit.step % epoch == 0, lambda fit: end_epoch(fit, data, args), lambda fit: fit, fit)


def keep_best(best, idle, score, args):
    """A member gains where its score fell by more than `min_gain` -> best [E], idle, gained [E]."""
    enough = args.min_gain if args.fit_score == "nll" else args.min_gain * best
    gained = jnp.where(jnp.isinf(best), score < best, best - score > enough)
    return jnp.where(gained, score, best), jnp.where(gained.any(), 0, idle + 1), gained


def end_epoch(fit, data, args):
    """Line (3): hold-out error of every member's mean, snapshots, idle epochs -> Fit."""
    rows = jax.tree.map(lambda x: x[fit.holdout], data)
    mean, raw = ensemble_apply(fit.net, model_inputs(fit.scale, rows.observations, rows.actions), "highest")
    error = mean - scaled_targets(fit.scale, rows)
    mse = jnp.mean((error * fit.scale.target_std) ** 2, (1, 2))  # [E]
    logvar = bound_logvar(fit.net, raw)
    nll = 0.5 * (error**2 * jnp.exp(-logvar) + logvar)
    score = jnp.mean(nll if args.fit_score == "nll" else error**2, (1, 2), where=fit.scale.target_std > 0)  # D14
    best, idle, gained = keep_best(fit.best, fit.idle, score, args)
    keep = lambda new, old: jnp.where(gained[:, None, None], new, old)
    layers = jax.tree.map(keep, fit.net[:2], fit.best_net[:2])
    judged = gained[:, None, None] | (args.fit_score == "mse")  # the codes store layers alone: bounds are the newest
    bounds = jax.tree.map(lambda new, old: jnp.where(judged, new, old), fit.net[2:], fit.best_net[2:])
    best_net = Ensemble(*layers, *bounds)
    return fit._replace(best_net=best_net, best=best, holdout_mse=mse, idle=idle)


def fitted_model(fit, data, args):
    """Every member at its best epoch, the M of best hold-out score as elites -> Model."""
    elites = jnp.argsort(fit.best, stable=True)[: args.num_elites]
    return model_of(fit.best_net, elites, fit.scale, data, args)


def model_of(net, elites, scale, data, args):
    """Beside the networks what the data say: where rollouts end, and what actor and critics see -> Model."""
    both = jnp.concatenate([data.observations, data.next_observations])
    low, high = both.min(0), both.max(0)
    varies = high - low > 1e-6 * jnp.maximum(jnp.abs(low), jnp.abs(high))
    margin = jnp.where(varies, args.range_margin * (high - low), jnp.inf)  # D6
    high_reward = jnp.quantile(data.rewards, 0.99)
    return Model(net, elites, scale, low - margin, high + margin, high_reward, sight(data, args))


def sight(data, args):
    """What actor and critics see of observations: [.., S] -> [.., S + n]."""  # D15, D16
    angles = jnp.asarray(angle_columns(args.angles))
    mean, std = moments(turned(data.observations, angles))
    return Sight(mean, std, angles) if args.standardise_observations else Sight(0 * mean, jnp.ones_like(std), angles)


def seen_rows(see, rows):
    """Rows as actor and critics see them."""
    return rows._replace(observations=see(rows.observations), next_observations=see(rows.next_observations))


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
    """Mean and std [E, B, D] of (s' - s, r), and u [B]."""
    if not isinstance(model.net, Ensemble):
        return model.net(observations, actions)
    mean, raw = ensemble_apply(model.net, model_inputs(model.scale, observations, actions))
    mean = model.scale.target_mean + model.scale.target_std * mean
    std = model.scale.target_std * jnp.exp(0.5 * bound_logvar(model.net, raw))
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


def model_rollout(model, agent, starts, key, args, task):
    """Lines (4), (5) from states [b, S] -> Rows [h, b], whether to keep them [h, b], info."""

    def step(carry, key):
        obs, alive = carry
        key_act, key_member, key_noise = jax.random.split(key, 3)
        action_mean, log_std = policy_net(args, task.action_size).apply(agent.actor, model.see(obs))
        actions, _ = tanh_normal_sample(action_mean, log_std, jax.random.normal(key_act, action_mean.shape))
        mean, std, u = predict(model, obs, actions, args)
        member = model.elites[jax.random.randint(key_member, u.shape, 0, len(model.elites))]
        noise = jax.random.normal(key_noise, mean.shape[1:])
        next_obs, rewards = model_step(obs, mean, std, member, noise)
        if args.reward == "known":
            rewards = task.model_reward(obs, actions, next_obs)
        penalised = rewards - args.lam * u
        broken, outside, terminals = rollout_ends(model, task, next_obs, penalised)
        keep = alive & ~broken
        flags = (x.astype(jnp.float32) for x in (terminals, outside))
        rows = Rows(obs, actions, penalised, next_obs, *flags)
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
    roll = lambda x: model_rollout(model, agent, data.observations[x[0]], x[1], args, task)
    rows, keep, info = jax.lax.map(roll, (starts, jax.random.split(key_rollout, shape[0])))
    seen = seen_rows(model.see, rows)  # [chunks, h, b, ..]
    flat = lambda tree: jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), tree)
    ring = ring_insert(ring, flat(seen), flat(keep))

    some = jax.random.randint(key_real, (4096,), 0, len(data.rewards))
    u_real = predict(model, data.observations[some], data.actions[some], args)[2]
    metrics = model_report.rollouts(flat(info), flat(keep), args.lam, u_real, model.high_reward, args.rollout_batch)
    act = lambda s: jnp.tanh(policy_net(args, task.action_size).apply(agent.actor, s)[0])
    value = lambda s, a: critic_net(args).apply(agent.critic, s, a).min(0)
    metrics |= value_report.q_by_step(act, value, *jax.tree.map(lambda x: x[0], (seen, keep)))  # of a chunk
    return ring, metrics | {"model/ring": ring.size.astype(jnp.float32)}


# === evaluation ===


def make_evaluation(args, env, task, buffer):
    """-> evaluation(agent [S], model [S], keys [S]) -> metrics, each [S], and calibration's points [S]."""
    length = min(buffer.metadata["episode_length"], 200)
    longer = dataclasses.replace(args, horizon=length)

    def policy(params, observations):
        actor, see = params
        return policy_net(args, task.action_size).apply(actor, see(observations))

    def sample(params, observations, key):
        mean, log_std = policy(params, observations)
        return tanh_normal_sample(mean, log_std, jax.random.normal(key, mean.shape))[0]

    act = lambda params, observations, key: jnp.tanh(policy(params, observations)[0])
    returns = runner.returns_of(act, env, task, buffer, args)

    def one(agent, model, key):
        key_eval, key_world, key_model = jax.random.split(key, 3)
        params = agent.actor, model.see
        rows, alive = runner.steps_of(env, sample, params, key_world, args.eval_episodes, length)
        rows = Rows(*rows, jnp.zeros_like(alive, jnp.float32))
        know = lambda *x: predict(model, *x, args)
        metrics, points = model_report.calibration(know, model.elites, rows, model_targets(rows), alive)

        rolled, keep, _ = model_rollout(model, agent, rows.observations[0], key_model, longer, task)
        q = critic_net(args).apply(agent.critic, model.see(rows.observations[0]), rows.actions[0]).min(0)
        metrics |= value_report.start_values(q, args.gamma, (rows.rewards, alive), (rolled, keep))
        return metrics | returns(params, key_eval), points

    return runner.each_seed(one, args)


# === training ===


class MopoState(NamedTuple):
    """What a run needs to go on, beside its model; all leaves have a leading seed axis."""

    key: jax.Array
    num_updates: jax.Array
    agent: Agent
    ring: Ring  # of Rows of the model, as actor and critics see them


def make_fit(args):
    """-> init(keys [S], data), chunk(fit, data), model(fit, data) of all seeds."""

    def chunk(fit, data):
        go_on = lambda fit: fit_chunk(fit, data, args)  # seeds that have ended stay as they are
        one = lambda fit: jax.lax.cond(fitting(fit, args), go_on, lambda fit: fit, fit)
        return runner.map_seeds(one, fit, args)

    init = lambda keys, data: runner.map_seeds(lambda key: fit_init(key, data, args), keys, args)
    model = lambda fit, data: runner.map_seeds(lambda fit: fitted_model(fit, data, args), fit, args)
    return jax.jit(init), jax.jit(chunk, donate_argnums=0), jax.jit(model)


def make_train(args, task):
    """-> init(keys [S]), train_chunk(state, model, data) -> state, metrics [S], means of the chunk."""

    def init(key):
        key, key_actor, key_critic = jax.random.split(key, 3)
        size = task.observation_size + len(angle_columns(args.angles))
        obs, actions, zero = jnp.zeros(size), jnp.zeros(task.action_size), jnp.zeros(())
        actor = policy_net(args, task.action_size).init(key_actor, obs)
        critic = critic_net(args).init(key_critic, obs, actions)
        opts = [opt.init(p) for opt, p in zip(optimisers(args), (actor, critic, zero), strict=True)]
        agent = Agent(actor, critic, jax.tree.map(jnp.copy, critic), zero, *opts)
        row = Rows(obs, actions, zero, obs, zero, zero)
        ring = ring_init(row, args.rollout_batch * args.horizon * args.retain)
        return MopoState(key, jnp.int32(0), agent, ring)

    def one_refresh(state, model, data, seen):
        key, key_refresh, key_updates = jax.random.split(state.key, 3)
        agent, ring = state.agent, state.ring
        ring, rolled = refresh(agent, ring, model, data, key_refresh, args, task)
        step = lambda agent, key: mopo_update(agent, ring, seen, key, args)
        agent, learnt = jax.lax.scan(step, agent, jax.random.split(key_updates, args.rollout_freq))
        state = MopoState(key, state.num_updates + args.rollout_freq, agent, ring)
        return state, {**jax.tree.map(jnp.mean, learnt), **rolled}

    def one_chunk(state, model, data, seen):
        step = lambda state, _: one_refresh(state, model, data, seen)
        state, metrics = jax.lax.scan(step, state, length=args.chunk // args.rollout_freq)
        return state, jax.tree.map(lambda x: x.mean(0), metrics)

    def chunk(state, model, data):
        seen = seen_rows(sight(data, args), data)  # of all seeds
        return runner.map_seeds(lambda x: one_chunk(*x, data, seen), (state, model), args)

    return jax.jit(runner.over_devices(jax.vmap(init), args)), jax.jit(chunk, donate_argnums=0)


# === run ===


def preset(args):
    """--quick, or the published values of the file's dataset or of --preset, and --preset cpu on top, bar lambda."""
    return runner.preset(args, PUBLISHED, {"cpu": CPU}, QUICK, {"lam": 0.3} if args.preset == "cpu" else {})


def check_args(args):
    """Refuse flags that do not fit one another."""
    runner.check_run(args)
    runner.refuse({
        "--chunk must be a multiple of --rollout-freq": args.chunk % args.rollout_freq == 0,
        f"--max-model-steps {args.max_model_steps}: --min-model-steps is {args.min_model_steps}; lower it as well":
            args.max_model_steps == 0 or args.min_model_steps <= args.max_model_steps,
        "--num-elites must be at most --ensemble-size": args.num_elites <= args.ensemble_size,
        "--model-decays needs two values or more": len(args.model_decays) >= 2,
        "--log-std-min must be below --log-std-max": args.log_std_min < args.log_std_max,
        "--holdout-share must be in (0, 1), --holdout-rows above 0": 0 < args.holdout_share < 1 <= args.holdout_rows,
        "--real-ratio: a batch needs a model row": int(args.real_ratio * args.batch_size) < args.batch_size,
        "--rollout-batch needs a divisor from 256 to 8192, as 10000 has":
            rows_at_once(args) >= min(args.rollout_batch, 256),
    })  # fmt: skip


def check_task(args, task):
    """Refuse a task whose reward or end the observations do not tell, before the fit and not after it."""
    told = args.reward == "learned" or task.model_reward is not None
    runner.refuse({f"--reward known: the observations of {task.name} do not tell its reward; use learned": told})
    jax.eval_shape(task.model_terminal, jax.ShapeDtypeStruct((1, task.observation_size), jnp.float32))  # its end


def train_model(run, fit_some, fit, data):
    """Lines (1) to (3): fit the ensembles of all seeds -> Fit [S]. The log's steps are epochs."""
    args, num_rows = run.args, fit.bootstrap.shape[-1]
    _, steps, epoch = epoch_sizes(num_rows, args)
    for step in run.chunks("model step", max_steps(num_rows, args), fit.step, steps):
        if not fitting(fit, args).any():
            break
        before = np.asarray(fit.step)
        fit = fit_some(fit, data)
        after, last = np.asarray(fit.step), not fitting(fit, args).any()
        ended = np.flatnonzero((after > before) & (after % epoch == 0))
        record = {"model/holdout_mse": fit.holdout_mse, "model/holdout_best": fit.best, "model/idle": fit.idle}
        shown = {"epoch": step / epoch, "idle": fit.idle.min()}
        shown |= {"holdout_best": fit.best.mean()} if jnp.isfinite(fit.best).all() else {}  # none before an epoch ends
        run.progress(step, shown, shown, last)
        run.log(step // epoch, record, ended)
        run.save(fit, last)
    if not jnp.isfinite(jnp.stack([fit.best, fit.holdout_mse])).all():
        raise envs.InputError(f"{run.buffer.path}: the model's error is not finite; lower --model-lr, in another --out")
    return fit


def judge_model(run, model, fit, data):
    """What the elites know of held-out rows: in the log and model.png; warnings of a fit that is not to be trusted."""
    args = run.args

    def one(data, model, fit):
        know, targets = lambda *rows: predict(model, *rows, args), model_targets(data)
        units = target_moments(data)[1], moments(data.observations)[1]
        return model_report.check_fit(know, model.elites, data, targets, units, fit.holdout, args.holdout_run)

    found, arrays = jax.jit(lambda data, *x: runner.map_seeds(lambda x: one(data, *x), x, args))(data, model, fit)
    epoch = epoch_sizes(fit.bootstrap.shape[-1], args)[2]
    model_report.report_fit(run, int(fit.step.max()) // epoch, found, arrays, fit.idle < args.patience)


def main(args, own_model=None):
    """Fit the model, train the policy in it, write policy and figures -> scores.

    own_model(keys, data, args, env) -> Model [S] takes the place of the fit (benchmark/mopo_models.py).
    """
    check_args(args)
    names = Rows._fields[:-1]  # a file has no `outside`
    buffer, task = runner.open_task("mopo", args, names)
    task = runner.learn_end(task, buffer)  # D17, where no function tells it
    args = runner.with_angles(args, task)
    check_task(args, task)
    envs.buffers.check_raw_columns(buffer["observations"], args.standardise_observations, "--standardise-observations")
    few = f"{buffer.path}: of {len(buffer)} rows none can be held out; raise --holdout-share, or record more"
    runner.refuse({few: int(args.holdout_share * len(buffer)) > 0})
    data = Rows(*(jnp.asarray(buffer[k], jnp.float32) for k in names), jnp.zeros(len(buffer)))
    (key_model, key_policy), eval_keys = runner.seed_keys(args, 2), runner.evaluation_keys(args)
    env = envs.make(task, args.backend)
    evaluate = make_evaluation(args, env, task, buffer) if task.eval_length else lambda *_: ({}, ())  # no world
    fit_init, fit_some, make_model = make_fit(args)
    init, train_chunk = make_train(args, task)
    like = jax.eval_shape(fit_init, key_model, data)
    model = own_model(key_model, data, args, env) if own_model else jax.eval_shape(make_model, like, data)

    remedy = ("raise --lam" if args.critic_norm else "say --critic-norm, raise --lam"), "lower --lam"
    with runner.Run("mopo", args, task, buffer, schedules={"actor_cosine": False}, remedy=remedy) as run:
        train_chunk = run.compile(train_chunk, jax.eval_shape(init, key_policy), model, data)
        if not own_model:
            fit_some = run.compile(fit_some, like, data)
            fit = train_model(run, fit_some, run.restore(fit_init, key_model, data, phase="model"), data)
            model = make_model(fit, data)
            judge_model(run, model, fit, data)
        state, warned = run.restore(init, key_policy), set()
        for step in run.chunks("update", args.num_updates, state.num_updates):
            state, metrics = train_chunk(state, model, data)
            run.progress(step, metrics, SHOWN)
            if run.due(step):
                found = metrics | evaluate(state.agent, model, eval_keys)[0]
                run.log(step, found)
                warned |= value_report.warn_of_values(found, data.rewards, args.gamma, warned)
            run.save(state)

        params = {"actor": state.agent.actor, **{f"observation_{k}": x for k, x in model.see._asdict().items()}}
        run.write_policy("tanh_gaussian", params, log_std_min=args.log_std_min, log_std_max=args.log_std_max)
        model_report.plot_run(run, np.asarray(evaluate(state.agent, model, eval_keys)[1]))
        return run.finish()


if __name__ == "__main__":
    runner.launch(main, Args, preset, ("cpu", "ours", "published", *PUBLISHED), __doc__)
