"""MOPO's equations once more, in plain float64 numpy with loops, independent of mopo.py."""

import numpy as np


def softplus(x):
    return np.logaddexp(0.0, x)


def swish(x):
    return x / (1.0 + np.exp(-x))


def member_forward(weights, biases, max_logvar, min_logvar, x):
    """One member: weights [in, out] per layer, x [B, in] -> mean, bounded log-variance [B, D]."""
    for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
        x = x @ w + b
        if layer < len(weights) - 1:
            x = swish(x)
    size = x.shape[1] // 2
    mean, raw = x[:, :size], x[:, size:]
    upper = max_logvar - softplus(max_logvar - raw)
    return mean, min_logvar + softplus(upper - min_logvar)


def model_loss(weights, biases, max_logvar, min_logvar, x, y, decays, coef):
    """The ensemble's loss, member after member: weights per layer [E, in, out], x, y [E, B, ..]."""
    total = coef * (max_logvar.sum() - min_logvar.sum())
    for i in range(len(x)):
        own = [w[i] for w in weights]
        mean, logvar = member_forward(own, [b[i] for b in biases], max_logvar, min_logvar, x[i])
        total += np.mean((mean - y[i]) ** 2 * np.exp(-logvar)) + np.mean(logvar)
        total += sum(0.5 * c * np.sum(w**2) for c, w in zip(decays, own, strict=True))
    return total


def early_stop(losses, patience=5, min_gain=0.01, num_elites=5):
    """Hold-out errors [epochs, E] -> epochs run, best [E], epoch of every snapshot [E], elites."""
    best, snapshot, idle = np.full(losses.shape[1], 1e10), np.zeros(losses.shape[1], int), 0
    for epoch, row in enumerate(losses, 1):
        gained = False
        for i, error in enumerate(row):
            if (best[i] - error) / best[i] > min_gain:
                best[i], snapshot[i], gained = error, epoch, True
        idle = 0 if gained else idle + 1
        if idle >= patience:
            break
    return epoch, best, snapshot, sorted(range(len(best)), key=lambda i: best[i])[:num_elites]


def relu_mlp(params, x):
    """flax parameters of an MLP {Dense_i: {kernel, bias}} -> output."""
    for i in range(len(params)):
        x = x @ np.asarray(params[f"Dense_{i}"]["kernel"], float) + np.asarray(params[f"Dense_{i}"]["bias"], float)
        x = np.maximum(x, 0.0) if i < len(params) - 1 else x
    return x


def twin_q(params, observations, actions):
    """flax parameters of the critics -> q [2, B]."""
    x = np.concatenate([observations, actions], 1)
    return np.stack([relu_mlp(params["params"][f"MLP_{i}"], x)[:, 0] for i in range(2)])


def tanh_normal(mean, log_std, noise):
    """-> actions, log densities by the change of variables, log(1 - tanh^2) taken literally."""
    u = mean + np.exp(log_std) * noise
    normal = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi)
    return np.tanh(u), np.sum(normal - np.log1p(-(np.tanh(u) ** 2)), -1)


def actor(params, observations, noise, log_std_min, log_std_max):
    """flax parameters of the actor -> actions, log densities."""
    out = relu_mlp(params["params"]["MLP_0"], observations)
    mean, log_std = np.split(out, 2, axis=1)
    return tanh_normal(mean, np.clip(log_std, log_std_min, log_std_max), noise)


def ring_contents(capacity, inserts):
    """What a ring of `capacity` holds after a list of (rows, mask): the newest live rows, as a list."""
    alive = [row for rows, mask in inserts for row, keep in zip(rows, mask, strict=True) if keep]
    return alive[-capacity:]


def nearest(points, queries):
    """Index and distance of the nearest point of every query, one by one."""
    found = []
    for query in queries:
        distances = [np.sqrt(np.sum((query - point) ** 2)) for point in points]
        found.append((int(np.argmin(distances)), min(distances)))
    index, distance = zip(*found, strict=True)
    return np.array(index), np.array(distance)
