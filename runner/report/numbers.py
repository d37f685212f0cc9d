"""Scores over seeds: last-5 mean, interquartile mean, its bootstrap interval, spread of curves."""

import numpy as np
from scipy import stats

from runner.plots import std_of_seeds

LAST, RESAMPLES, MIN_SEEDS = 5, 2000, 3


def iqm(scores, axis=None):
    """Interquartile mean: the mean without the floor(n / 4) lowest and as many highest of n scores."""
    return stats.trim_mean(scores, 0.25, axis)


def bootstrap(strata, level=0.95):
    """Percentile interval of the IQM -> (low, high), or None where a stratum has fewer than 3 seeds.

    strata: one array of scores over seeds per task. Each of 2000 resamples draws, within every task, as many
    seeds as it has, with replacement. The draws are fixed, so that the same runs give the same page.
    """
    if min(map(len, strata)) < MIN_SEEDS:
        return None
    rng = np.random.default_rng(0)
    drawn = [np.asarray(s)[rng.integers(len(s), size=(RESAMPLES, len(s)))] for s in strata]
    values = iqm(np.concatenate(drawn, axis=1), axis=1)
    return tuple(np.quantile(values, [(1 - level) / 2, (1 + level) / 2]))


def final_scores(seeds):
    """{seed: {step: value}} -> per seed: mean of the last 5 evaluations, the last, the best; and the fewest counted.

    Step 0, before any learning, does not count beside others.
    """
    rows = [np.array([steps[s] for s in sorted(steps) if s or len(steps) == 1]) for steps in seeds.values()]
    last_five = np.array([row[-LAST:].mean() for row in rows])
    return last_five, np.array([row[-1] for row in rows]), np.array([row.max() for row in rows]), min(map(len, rows))


def spread(seeds):
    """-> steps that all seeds have (n,), mean (n,) and standard deviation (n,) over seeds, of a sample."""
    steps = np.array(sorted(set.intersection(*(set(found) for found in seeds.values()))))
    values = np.array([[found[s] for s in steps.tolist()] for found in seeds.values()])
    return steps, values.mean(0), std_of_seeds(values)
