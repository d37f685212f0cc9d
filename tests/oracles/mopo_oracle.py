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


def nearest(points, queries):
    """Index and distance of the nearest point of every query, one by one."""
    found = []
    for query in queries:
        distances = [np.sqrt(np.sum((query - point) ** 2)) for point in points]
        found.append((int(np.argmin(distances)), min(distances)))
    index, distance = zip(*found, strict=True)
    return np.array(index), np.array(distance)
