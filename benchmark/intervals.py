"""How sure is a table? Interquartile means and chances of being better, with bootstrap intervals.

    python benchmark/intervals.py results/suite/learners/table.json      a table, and intervals.png beside the file
    python benchmark/intervals.py runs/grid/table.json --against bc --draws 20000
    python benchmark/intervals.py runs/suite-full/table.json --algorithms mopo cped dac bc

Reads table.json of benchmark/grid.py, several at once as one. A score is (return - mean episode of the data) / (best -
mean episode), in episodes as long as the data's: 0 is as good as the data, 1 as its best episode. After Agarwal et al.
2021 (arXiv 2108.13264):

- IQM: the mean of the middle half of an algorithm's scores, all data sets and seeds together;
- interval: 95 % of the bootstrap's IQMs, seeds drawn anew within every data set;
- P(better): the mean over data sets of P(x > y) + P(x = y) / 2, x and y a random seed of either algorithm.

Only data sets that all algorithms have count, and of those no set whose best episode is hardly above its mean (by less
than 5 %, as where an easy maze is solved): small differences would be large scores. What is left out is named.
With one seed a data set the interval says nothing, which is said; three seeds make a rough one. (rliable, the authors'
library, needs a package that does not load beside today's pandas.)
"""

import argparse
import json
from pathlib import Path

import numpy as np
from scipy import stats

import grid
from envs import InputError
from runner import plots, show

LEAST = 0.05  # of the larger of |mean| and |best|, by which best is above mean


def read_tables(paths, algorithms=()):
    """-> {algorithm: {data set: scores [seeds]}} of the data sets that all algorithms (empty: all there are) have, in
    the files' order. Prints which data sets are left out."""
    found, names, flat = {}, {}, {}
    for path in paths:
        try:
            table = json.loads(Path(path).read_text())
            for row in table["scores"]:
                if algorithms and row["algorithm"] not in algorithms:
                    continue
                mean, best = table["data"][row["dataset"]]
                if best - mean <= LEAST * max(abs(best), abs(mean)):
                    flat[row["dataset"]] = f"its best episode, {best:.4g}, is hardly above its mean, {mean:.4g}"
                    continue
                returns = row.get("returns_data_length", row["returns"])
                scores = found.setdefault(row["algorithm"], {})
                if row["dataset"] in scores:
                    raise InputError(f"{path}: {row['dataset']} {row['algorithm']} is in two tables: leave one out")
                scores[row["dataset"]] = (np.array(returns) - mean) / (best - mean)
            names |= dict.fromkeys(table["algorithms"])
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path}: no table of benchmark/grid.py ({type(error).__name__}: {error})") from None
    unknown, where = [name for name in algorithms if name not in names], ", ".join(map(str, paths))
    if unknown:
        raise InputError(f"--algorithms {' '.join(unknown)}: not in {where}, which has {', '.join(names)}")
    for name in names:
        if name not in found and (not algorithms or name in algorithms):
            print(f"left out {name}: it has no score here")
    for data in {data: 0 for of in found.values() for data in of}:
        if absent := [name for name, of in found.items() if data not in of]:
            flat[data] = f"{', '.join(absent)} has no score there; --algorithms chooses others"
    for data, why in flat.items():
        print(f"left out {data}: {why}")
    common = set.intersection(*map(set, found.values())) if found else set()
    if not common:
        raise InputError(f"{where}: no data set has all of {', '.join(algorithms or names)}; name some by --algorithms")
    return {name: {data: found[name][data] for data in sorted(common)} for name in names if name in found}


def iqm(scores):
    """Mean of the middle half of scores {data set: [seeds]}."""
    return stats.trim_mean(np.concatenate(list(scores.values())), 0.25)


def redrawn(scores, rng):
    """The same with seeds drawn anew within every data set."""
    return {data: rng.choice(x, len(x)) for data, x in scores.items()}


def better(scores, others):
    """P(better): mean over data sets of P(x > y) + P(x = y) / 2."""
    chance = lambda x, y: np.mean((x[:, None] > y) + 0.5 * (x[:, None] == y))
    return np.mean([chance(scores[data], others[data]) for data in scores])


def interval(statistic, draws, rng, *scores):
    """-> statistic(*scores), and the bounds of 95 % of its bootstrap."""
    values = [statistic(*(redrawn(x, rng) for x in scores)) for _ in range(draws)]
    return statistic(*scores), *np.quantile(values, (0.025, 0.975))


def draw(path, found, against):
    """IQM and P(better) of every algorithm with their intervals, side by side."""
    panels, score, places = [], "interquartile mean of the score", grid.colours(found)
    shown, title = grid.SHOWN_AS, f"P(better than {grid.SHOWN_AS.get(against, against)})"
    titles = {score: "0: as the data, 1: as its best episode", title: "probability"}
    for column, (title, unit) in enumerate(titles.items()):
        lines = []
        for i, (name, values) in enumerate(reversed(found.items())):
            (middle, low, high), color = values[column], f"C{places[name] % 10}"
            lines.append(([low, high], [i, i], {"color": color, "lw": 5, "alpha": 0.4}))
            lines.append(([middle], [i], {"color": color, "marker": "o"}))
        if any(low == high for _, low, high in (values[column] for values in found.values())):
            unit += "; no bar: the bootstrap's draws agree"
        panels.append({"title": title, "xlabel": unit, "ylabel": "", "lines": lines})
        panels[-1]["names"] = [shown.get(name, name) for name in found][::-1]
    plots.figure(path, panels, height=1.5 + 0.4 * len(found))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", type=Path)
    parser.add_argument("--algorithms", nargs="+", default=(), help="which to compare; all that the tables have")
    parser.add_argument("--against", default="bc", help="what P(better) compares with")
    parser.add_argument("--draws", type=int, default=5_000, help="of the bootstrap")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    scores, rng = read_tables(args.tables, args.algorithms), np.random.default_rng(args.seed)
    if args.against not in scores:
        raise InputError(f"--against {args.against}: not in the table; one of {', '.join(scores)}")
    told = lambda *x: interval(x[0], args.draws, rng, *x[1:])
    found = {name: (told(iqm, x), told(better, x, scores[args.against])) for name, x in scores.items()}
    columns = {"algorithm": "<", "IQM": ".2f", "from": ".2f", "to": ".2f", "P(better)": ".2f", "from ": ".2f"}
    columns |= {"to ": ".2f", "seeds": ","}
    seeds = {name: min(map(len, x.values())) for name, x in scores.items()}
    rows = [[name, *first, *second, seeds[name]] for name, (first, second) in found.items()]
    data = ", ".join(next(iter(scores.values())))
    show(f"{data}: interquartile mean, P(better than {args.against}), 95 % intervals", columns, rows)
    if min(seeds.values()) < 3:
        print("fewer than three seeds somewhere: these intervals say nothing of the luck of a seed")
    draw(args.tables[0].parent / "intervals.png", found, args.against)
    return found


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"intervals.py: error: {error}") from None
