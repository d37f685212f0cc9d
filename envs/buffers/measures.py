"""What data are worth before anything is trained on them: returns where episodes were cut, actions, coverage."""

from typing import NamedTuple

import numpy as np
import scipy

from envs.buffers.raw import points_of, transitions
from envs.distances import coverage, wasserstein
from envs.errors import InputError


def episode_weights(lengths, complete):
    """Weights [E] by which the complete episodes stand for all that were begun, those that were cut included.

    lengths [E] steps, complete [E] bool: it terminated or had its full length; the others were cut from outside.
    A long episode is cut more often than a short one, so that the complete ones alone are too short. Each one counts by
    the inverse of its chance not to be cut (Robins and Rotnitzky 1992; Bang and Tsiatis 2000):
        w_i = complete_i / G(l_i),   G(l) = prod over u < l of (1 - cut_u / at_risk_u)
    with cut_u episodes cut after u steps and at_risk_u that went u steps and did not end there by themselves: Kaplan
    and Meier's estimate of the chance that l steps are let happen. Weights sum to E. The longest counts as complete
    (Efron 1967). Where none is complete, all count alike. Unbiased if a cut does not depend on what the episode would
    have done.
    """
    if not complete.any() or complete.all():
        return np.ones(len(lengths))
    complete = complete | (lengths == lengths.max())
    # an episode that ends by itself at a step can no longer be cut there: half a step before
    uncut = scipy.stats.ecdf(scipy.stats.CensoredData(uncensored=lengths[~complete], right=lengths[complete] - 0.5)).sf
    return np.where(complete, 1 / np.where(complete, uncut.evaluate(lengths - 0.5), 1.0), 0.0)


def return_statistics(returns, lengths, complete):
    """Of the returns [E] of episodes begun: mean, std, top_decile (mean of the best tenth), per_step (sum of rewards /
    sum of steps), each by episode_weights."""
    weights = episode_weights(lengths, complete)
    used = weights > 0
    returns, lengths, weights = returns[used], lengths[used], weights[used]
    mean = np.average(returns, weights=weights)
    order = np.argsort(-returns, kind="stable")
    before = np.cumsum(weights[order]) - weights[order]
    best = np.clip(weights.sum() / 10 - before, 0, weights[order])  # of the last one the part that makes it a tenth
    return {
        "mean": float(mean),
        "std": float(np.sqrt(np.average((returns - mean) ** 2, weights=weights))),
        "top_decile": float(np.average(returns[order], weights=best)),
        "per_step": float(weights @ returns / (weights @ lengths)),
    }


def action_entropy(actions, bins=32):
    """Entropy of actions [n, A] in [-1, 1], as a share of that of uniform ones, mean over the A numbers: 0 to 1."""
    counts = [np.histogram(column, bins, (-1, 1))[0] for column in actions.T]
    return float(np.mean([scipy.stats.entropy(count) for count in counts]) / np.log(bins))


def saturation(actions, limit=0.95):
    """Share of the numbers of actions [n, A] that lie beyond `limit` on either side."""
    return float(np.mean(np.abs(actions) > limit))


def coverage_shares(points, cell=0.2):
    """Of the cells that all samples [K, n, d] visit together, each one's share [K]; edge `cell` standard deviations.

    SACo (arXiv 2111.04714, unique state-actions / those of a reference) for numbers that never repeat, with all
    buffers together as the reference.
    """
    points = np.asarray(points)
    spread = points.std((0, 1))
    points = points / np.where(spread > 1e-6, spread, 1.0)
    together, each = coverage(points[:, None], np.ones((len(points), 1, points.shape[1]), bool), cell)
    return (each / together).tolist()


def effective_numbers(samples):
    """How many different behaviours each sample [E, d] of episodes holds, 1 to E: the Vendi score (arXiv 2210.02410).

    exp of the entropy of the eigenvalues of k(x_i, x_j) / E with k = exp(-|x_i - x_j|^2 / 2 h^2); h is half the median
    distance between episodes of all samples, so that samples compare.
    """
    pooled = np.concatenate(samples)
    width = 0.5 * np.median(scipy.spatial.distance.pdist(pooled)) if len(pooled) > 1 else 0.0
    kernels = [np.exp(-0.5 * (scipy.spatial.distance.cdist(x, x) / (width or 1.0)) ** 2) / len(x) for x in samples]
    return [float(np.exp(scipy.stats.entropy(np.maximum(np.linalg.eigvalsh(kernel), 0)))) for kernel in kernels]


# --- of buffers ---

SAMPLED = 10_000  # rows of each buffer that are looked at, at most
GROUPED = 100  # episodes of each among which behaviours are counted, at most


def measure_buffers(parts, world, num_points, seed):
    """What buffers are, whatever the task; parts: pairs of a buffer and the indices of its episodes -> a dict for each.

    action_entropy, saturation, coverage (coverage_shares), behaviours (effective_numbers of the mean features), drift
    (W1 between features of the first and of the last tenth of the rows, num_points each).
    """
    rng, found = np.random.default_rng(seed), []
    rows = [rows_of(*part) for part in parts]
    num = min(SAMPLED, *map(len, rows))
    steps = [transitions(b, np.sort(rng.choice(r, num, replace=False))) for (b, _), r in zip(parts, rows, strict=True)]
    points = [points_of(b, world.feature(step)) for (b, _), step in zip(parts, steps, strict=True)]
    numbers = effective_numbers([episode_means(b, rng.permutation(keep)[:GROUPED], world.feature) for b, keep in parts])
    tenth = max(1, num // 10)
    for step, p, share, number in zip(steps, points, coverage_shares(points), numbers, strict=True):
        early, late = (rng.permutation(part)[:num_points] for part in (p[:tenth], p[-tenth:]))
        of_actions = {"action_entropy": action_entropy(step.actions), "saturation": saturation(step.actions)}
        found.append(of_actions | {"coverage": share, "behaviours": number, "drift": wasserstein(early, late)})
    return found


def episode_means(buffer, episodes, feature):
    """Mean features (E, d) of episodes."""
    ends, lengths = buffer["episode_ends"][episodes], buffer["episode_lengths"][episodes]
    rows = [slice(*pair) for pair in zip(ends - lengths, ends, strict=True)]
    return np.stack([points_of(buffer, feature(transitions(buffer, row))).mean(0) for row in rows])


def rows_of(buffer, episodes):
    """Row numbers of some episodes, in order."""
    return np.flatnonzero(np.repeat(np.isin(np.arange(buffer.num_episodes), episodes), buffer["episode_lengths"]))


def state_actions(parts, observe, num, rng):
    """(s, a) (n, d) of `num` rows, fewer where there are fewer, of `parts`: pairs of a buffer and its episodes.

    In random order, and without what is not finite: nobody has looked at the values of a buffer that is not chosen.
    """
    rows = [rows_of(*part) for part in parts]
    borders, found = np.cumsum([0, *map(len, rows)]), []
    drawn = np.sort(rng.choice(borders[-1], min(num, borders[-1]), replace=False))
    for (buffer, _), own, low, high in zip(parts, rows, borders[:-1], borders[1:], strict=True):
        own = own[drawn[(drawn >= low) & (drawn < high)] - low]
        found.append(np.concatenate([observe(buffer.arrays["observations"][own]), buffer["actions"][own]], axis=1))
    found = np.concatenate(found).astype(np.float64)
    found = found[np.isfinite(found).all(1)]
    if not len(found):
        problem = "observations: no row that is finite to measure a distance with"
        raise InputError(f"{parts[0][0].path}: {problem}. Remedy: record it again, or --w1-points 0")
    return rng.permutation(found)


class Near(NamedTuple):
    """Samples of (s, a), in units of their pooled standard deviation so that no unit decides, and their W1."""

    samples: list  # K of (2n, d), one of each buffer
    expert: np.ndarray  # (2n, d), of the data that the others are compared with
    unit: np.ndarray  # (d,)
    to_expert: list  # (K + 1,) W1; the last is that of two samples of the expert's data, the least to expect
    to_random: list  # (K,) W1 to random actions' data; None where there are none

    def distance(self, parts, observe, num_points, seed):
        """W1 of other data to the expert's; parts: pairs of a buffer and its episodes."""
        sample = state_actions(parts, observe, 2 * num_points, np.random.default_rng(seed)) / self.unit
        return halves_apart(sample, self.expert)


def state_action_distances(parts, expert, random, observe, num_points, seed):
    """W1 in (s, a) of K buffers to an expert's data and to random actions' -> Near.

    parts: K pairs of a buffer and its episodes; expert, random: lists of such pairs, each one sample.
    """
    rng = np.random.default_rng(seed)
    draw = lambda pairs: state_actions(pairs, observe, 2 * num_points, rng)
    samples, expert = [draw([pair]) for pair in parts], draw(expert)
    spread = np.concatenate([*samples, expert]).std(axis=0)
    unit = np.where(spread > 1e-6, spread, 1.0)
    samples, expert = [x / unit for x in samples], expert / unit
    to_random = [None] * len(samples)
    if random:
        other = draw(random) / unit
        to_random = [halves_apart(x, other) for x in samples]
    return Near(samples, expert, unit, [halves_apart(x, expert) for x in [*samples, expert]], to_random)


def halves_apart(x, y):
    """W1 between the first half of a sample and the last half of another, as many points of each."""
    n = max(1, min(len(x), len(y)) // 2)
    return wasserstein(x[:n], y[-n:])
