"""What benchmark/speed.py compares with: the same work, written plainly in NumPy and PyTorch.

Written for the benchmark from the papers' equations, the way one would without a compiler: a loop
over pairs and matched points, a module and an optimiser per network, a function per step. Sizes are
those of the code measured beside them (for MOPO those of OfflineRL-Kit). No training is done with
them; PyTorch is needed by nothing else here and is not a dependency of the project.
"""

import itertools
import math

import numpy as np

try:
    import torch
    from torch import nn
    from torch.nn import functional
except ImportError:
    torch = None


def require_torch():
    """Leave with a message where PyTorch is missing."""
    if torch is None:
        raise SystemExit(
            "benchmark: the parts sac and mopo compare with PyTorch, which is not installed: "
            "pip install torch==2.13.0 (a CPU build will do), or run the other parts alone: "
            "--part pseudo_reward, --part collection, --part startup"
        )


# === pseudo-reward ===


def transport_cost(source, target, directions):
    """Amortised projected Wasserstein cost [D] of the source points [D, d] against [T, d].

    Along every direction both sets are sorted and their uniform masses matched front to front; a
    point pays the mean distance, in the full space, to what it is matched with.
    """
    num_source, num_target = len(source), len(target)
    cost = np.zeros(num_source)
    for v in directions:
        source_order = np.argsort(source @ v, kind="stable")
        target_order = np.argsort(target @ v, kind="stable")
        i = j = 0
        left_i, left_j = num_target, num_source  # mass left at both fronts, unit 1 / (D T)
        while i < num_source and j < num_target:
            mass = min(left_i, left_j)
            a, b = source_order[i], target_order[j]
            cost[a] += np.linalg.norm(source[a] - target[b]) * mass / num_target
            left_i, left_j = left_i - mass, left_j - mass
            if left_i == 0:
                i, left_i = i + 1, num_target
            if left_j == 0:
                j, left_j = j + 1, num_source
    return cost / len(directions)


def transport_cost_equal(source, target, directions):
    """transport_cost for sets of one size, without the loop over points: rank meets rank."""
    cost = np.zeros(len(source))
    for v in directions:
        source_order = np.argsort(source @ v, kind="stable")
        target_order = np.argsort(target @ v, kind="stable")
        matched = source[source_order] - target[target_order]
        cost[source_order] += np.linalg.norm(matched, axis=-1)
    return cost / len(directions)


def nearest_reward(points, directions, scale, cost_function=transport_cost):
    """Pseudo-reward [K, D] of the points [K, D, d]: the cost to the nearest other policy."""
    rewards = np.zeros(points.shape[:2])
    for k in range(len(points)):
        others = [l for l in range(len(points)) if l != k]
        costs = [cost_function(points[k], points[l], directions) for l in others]
        rewards[k] = scale * costs[int(np.argmin([cost.sum() for cost in costs]))]
    return rewards


# === SAC ===


def mlp(widths):
    """Linear layers of the given widths, ReLU between them."""
    layers = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Rows:
    """Transitions as tensors: observations, actions, rewards, next_observations, terminals."""

    def __init__(self, arrays):
        """arrays: five float32 arrays or tensors, rows first."""
        self.arrays = [torch.as_tensor(x) for x in arrays]

    def sample(self, batch_size):
        """`batch_size` rows, uniformly with replacement."""
        index = torch.randint(len(self.arrays[0]), (batch_size,))
        return [x[index] for x in self.arrays]


class SAC:
    """Soft actor-critic with two critics; alpha fixed, or learnt towards entropy -A."""

    def __init__(self, sizes, hidden, rates, alpha, learn_alpha, log_std_min):
        """sizes: (S, A); hidden: widths; rates: Adam's of actor, critics, alpha."""
        num_obs, num_act = sizes
        self.log_std_min, self.learn_alpha, self.num_act = log_std_min, learn_alpha, num_act
        self.actor = mlp((num_obs, *hidden, 2 * num_act))
        self.critics = [mlp((num_obs + num_act, *hidden, 1)) for _ in range(2)]
        self.targets = [mlp((num_obs + num_act, *hidden, 1)) for _ in range(2)]
        for target, critic in zip(self.targets, self.critics, strict=True):
            target.load_state_dict(critic.state_dict())
        self.log_alpha = torch.tensor(math.log(alpha), requires_grad=True)
        critic_params = [p for critic in self.critics for p in critic.parameters()]
        params = (self.actor.parameters(), critic_params, [self.log_alpha])
        adams = [torch.optim.Adam(p, lr=rate) for p, rate in zip(params, rates, strict=True)]
        self.actor_adam, self.critic_adam, self.alpha_adam = adams

    def act(self, observations):
        """Sample -> actions [B, A], log density [B]."""
        mean, log_std = self.actor(observations).chunk(2, -1)
        log_std = log_std.clamp(self.log_std_min, 2.0)
        noise = torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        log_jacobian = 2.0 * (math.log(2.0) - u - functional.softplus(-2.0 * u))
        return torch.tanh(u), (log_normal - log_jacobian).sum(-1)

    def values(self, critics, observations, actions):
        x = torch.cat([observations, actions], -1)
        return [critic(x).squeeze(-1) for critic in critics]

    def update(self, batch, gamma=0.99, tau=0.005):
        """One gradient step of critics, actor and alpha, and the Polyak step."""
        observations, actions, rewards, next_observations, terminals = batch
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            next_actions, log_probs = self.act(next_observations)
            next_q = torch.minimum(*self.values(self.targets, next_observations, next_actions))
            y = rewards + gamma * (1 - terminals) * (next_q - alpha * log_probs)
        values = self.values(self.critics, observations, actions)
        critic_loss = sum(functional.mse_loss(q, y) for q in values)
        self.critic_adam.zero_grad()
        critic_loss.backward()
        self.critic_adam.step()

        new_actions, log_probs = self.act(observations)
        q = torch.minimum(*self.values(self.critics, observations, new_actions))
        actor_loss = (alpha * log_probs - q).mean()
        self.actor_adam.zero_grad()
        actor_loss.backward()
        self.actor_adam.step()

        if self.learn_alpha:
            alpha_loss = -self.log_alpha * (log_probs.detach().mean() - self.num_act)
            self.alpha_adam.zero_grad()
            alpha_loss.backward()
            self.alpha_adam.step()
        with torch.no_grad():
            for target, critic in zip(self.targets, self.critics, strict=True):
                for old, new in zip(target.parameters(), critic.parameters(), strict=True):
                    old.lerp_(new, tau)


# === probabilistic ensemble ===


class Ensemble:
    """E Gaussian networks side by side: weights [E, in, out], swish, soft log-variance bounds."""

    def __init__(self, num_inputs, num_targets, hidden, size, decays):
        widths = (num_inputs, *hidden, 2 * num_targets)
        shapes = list(itertools.pairwise(widths))
        self.weights = [torch.empty(size, *shape) for shape in shapes]
        for weight, (fan_in, _) in zip(self.weights, shapes, strict=True):
            nn.init.trunc_normal_(weight, std=1.0 / (2.0 * fan_in**0.5))
        self.biases = [torch.zeros(size, 1, fan_out) for _, fan_out in shapes]
        self.max_logvar = torch.full((num_targets,), 0.5)
        self.min_logvar = torch.full((num_targets,), -10.0)
        self.parameters = [*self.weights, *self.biases, self.max_logvar, self.min_logvar]
        for parameter in self.parameters:
            parameter.requires_grad_()
        self.decays = decays

    def predict(self, x):
        """x [E, B, in] -> mean, bounded log-variance [E, B, D]."""
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            x = functional.silu(x) if layer < len(self.weights) - 1 else x
        mean, raw = x.chunk(2, -1)
        logvar = self.max_logvar - functional.softplus(self.max_logvar - raw)
        return mean, self.min_logvar + functional.softplus(logvar - self.min_logvar)

    def loss(self, x, targets):
        """Gaussian likelihood of every member on its own rows, bounds, weight decay -> scalar."""
        mean, logvar = self.predict(x)
        likelihood = ((mean - targets) ** 2 * torch.exp(-logvar) + logvar).mean((1, 2)).sum()
        bounds = self.max_logvar.sum() - self.min_logvar.sum()
        pairs = zip(self.decays, self.weights, strict=True)
        decay = sum(0.5 * c * (weight**2).sum() for c, weight in pairs)
        return likelihood + 0.01 * bounds + decay


class Dynamics:
    """An ensemble in training, and rollouts in it."""

    def __init__(self, rows, hidden, size, decays):
        """rows: Rows of real data; every member draws its batches from its own bootstrap."""
        observations, actions, rewards, next_observations, _ = rows.arrays
        self.x = torch.cat([observations, actions], -1)
        self.mean, self.std = self.x.mean(0), self.x.std(0)
        self.x = (self.x - self.mean) / self.std
        self.y = torch.cat([next_observations - observations, rewards[:, None]], -1)
        self.net = Ensemble(self.x.shape[1], self.y.shape[1], hidden, size, decays)
        self.adam = torch.optim.Adam(self.net.parameters, lr=1e-3)
        self.bootstrap = torch.randint(len(self.x), (size, len(self.x)))
        self.starts, self.elites = observations, torch.arange(size)[: size - 2]
        low, high = observations.min(0).values, observations.max(0).values
        self.low, self.high = low - 0.5 * (high - low), high + 0.5 * (high - low)

    def train(self, num_steps, batch_size=256):
        """Adam steps over the bootstraps in order, as an epoch does."""
        for step in range(num_steps):
            start = step * batch_size % (len(self.x) - batch_size)
            index = self.bootstrap[:, start : start + batch_size]
            loss = self.net.loss(self.x[index], self.y[index])
            self.adam.zero_grad()
            loss.backward()
            self.adam.step()

    def rollout(self, sac, num_rows, horizon, lam):
        """Rollouts of the policy from random real states -> transitions [n, ..] of all steps."""
        observations, steps = self.starts[torch.randint(len(self.starts), (num_rows,))], []
        with torch.no_grad():
            for _ in range(horizon):
                step, inside = self.rollout_step(sac, observations, lam)
                steps.append(step)
                observations = step[3][inside]
        return [torch.cat(column) for column in zip(*steps, strict=True)]

    def rollout_step(self, sac, observations, lam):
        """One step of every row -> transition, which rows [B] stay near the data."""
        actions, _ = sac.act(observations)
        x = (torch.cat([observations, actions], -1) - self.mean) / self.std
        mean, logvar = self.net.predict(x.expand(len(self.bootstrap), -1, -1))
        std = torch.exp(0.5 * logvar)
        row = torch.arange(len(x))
        member = self.elites[torch.randint(len(self.elites), row.shape)]
        sample = mean[member, row] + std[member, row] * torch.randn(mean.shape[1:])
        penalty = std.norm(dim=-1).max(0).values
        next_observations, rewards = observations + sample[:, :-1], sample[:, -1] - lam * penalty
        inside = ((next_observations > self.low) & (next_observations < self.high)).all(-1)
        step = (observations, actions, rewards, next_observations, torch.zeros(len(x)))
        return step, inside
