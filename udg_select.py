"""UDG's selection: relabel reward-free buffers with a task's reward, pick those that suit it.

Paper      Unsupervised Data Generation for Offline Reinforcement Learning: A Perspective from Model (He et al., 2025),
           arXiv 2506.19643. No reference code is public.
Idea       The gap between what a model-based offline learner reaches and the optimum is bounded by W1(rho_beta, rho*),
           the distance between the state-action distributions of the data and of the optimal policy. Nobody knows rho*;
           the return under the task's reward stands in for the distance: the buffer of the highest return is the one
           to learn from.

Algorithm  for K buffers of one world and every task:
  (1) relabel:  r = task.reward(s, a, s') for all transitions, s -> task.observe(s)
  (2) score:    J_k = 1/E sum_e w_e sum_t r_t over the complete episodes e of buffer k; E: all that began; w_e = 1, but
                where episodes were cut the inverse of the chance not to be (D7)
  (3) rank:     k_1 .. k_K by J_k, or by --score, highest first
  (4) choose:   top-n = buffers k_1 .. k_n, in full or cut to --size by whole episodes; or the best episodes of all
                buffers; or all buffers in the shares w that bring the mixture nearest to the expert's data:
                min over w of W1(sum_k w_k rho_k, rho*)   (bound for mixtures)
  (5) measure:  W1(i, j) between features of buffers i and j, and W1(k, reference) if given, on n points each:
                min over permutations p of  1/n sum_i ||x_i - y_p(i)||   (exact);
                entropy of actions, coverage, behaviours, drift, W1 to random and to the best episodes

Symbols    K buffers | N transitions of a buffer | E its episodes | J_k score | n points of W1 | rewards r [N]
           returns sum_t r_t [E] | features f(s') [n, d], task.feature | w_e weights of episodes | w shares
           rho_k distribution of (s, a) in buffer k, rho* in the expert's data

Deviations (why: docs/udg_select.md)
  D1  paper: does not say whether a buffer is the whole replay or what its first random steps count; here: the whole
      file counts, the score without the warm-up stands beside it, and --exclude-warmup leaves it out of score and data.
  D2  paper: top 1, top 2 and all mixed differ in size by their number of buffers; here: also at equal size (--size), an
      equal share of every buffer.
  D3  paper: W1 appears in the bound and is never measured; here: by exact assignment on subsamples; on the diagonal
      between two samples of one buffer, which is what a distance of zero looks like at n points.
  D4  paper: W1 is over (s, a) in raw units; here: features of s' between buffers, in their units, and (s, a) in units
      of the pooled standard deviation against a reference, so that no unit decides.
  D5  terminals stay as they were recorded, and where the task ends at a recorded cut, the cut becomes a terminal; a
      task that would have ended an episode where the data goes on is refused.
      Not so in mazes: there they are the task's, and a robot that walks on at the goal begins a new episode, which
      counts as data and not in (2).
  D6  a maze's reward needs goals: data that knows none (OGBench) gets one for each trajectory, as at a reset.
  D7  where an episode that ends is followed by another one, and a round's end cuts the last (wurl_sac.py without
      diversity), long episodes are the ones that are cut: the plain mean of the complete ones is too low. Each complete
      one stands for those cut before it (envs/buffers/measures.py).
  D8  paper: rho* of the bound for mixtures is unknown; here: the best --proxy of all episodes stands in for it, or
      --reference, and the shares that minimise W1 to it are a linear program on samples.

Files      reads buffers (docs/buffer.md, layout "env", or "task" where the task hides nothing); writes <out>/<task>/:
           top1.npz, ... (layout "task"), scores.json, returns.png, coverage.png, measures.png, distances.png;
           <out>/heatmap.png
Run        python udg_select.py --quick                                (scripted buffers, seconds)
           python udg_select.py --buffers runs/wurl_sac/ant/seed0/buffers --task ant-angle-60
           python udg_select.py --buffers 'a/*.npz' --task ant-angle-0 ant-angle-60 --top 1 2 all
           python udg_select.py --buffers runs/wurl_sac/ant/seed0 --task ant-angle-60 --size 50000
               --top 1 2 all transport --top-rows 50000                   (all selections, at equal size)
Expect     --quick: seconds; the buffer that runs at 0 degrees is ranked first (docs/udg_select.md has the main job's)
"""

import dataclasses
import json
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np
import tyro

import envs
import envs.buffers
import runner
from envs.buffers import figures, measures, raw, scripted
from envs.buffers.measures import episode_weights, return_statistics
from envs.buffers.raw import CHECKED, end_by_task, trajectories
from envs.buffers.sources import check_room, open_reference, open_sources, open_task, provenance, warmup_episodes
from envs.distances import mixture_weights, wasserstein
from runner import tables

Words = tuple[tuple[str, ...], ...]  # `--flag a b --flag c` on the command line


@dataclass(frozen=True)
class Args:
    # --- input ---
    buffers: tyro.conf.UseAppendAction[Words] = ()
    """the K buffers: folders, files or quoted globs; several, of one world"""
    tasks: Annotated[tyro.conf.UseAppendAction[Words], tyro.conf.arg(name="task")] = ()
    """tasks to select for, e.g. ant-angle-60; several allowed"""
    task_options: tuple[str, ...] = ()
    """options of the tasks as name=value, e.g. ctrl_cost=0.5; recorded in the files"""
    task_reward: str = ""
    """file.py:function of arrays (s [N, S], a [N, A], s' [N, S]) -> [N] that pays instead of the task's own reward"""
    reference: str = ""
    """a buffer of the same world, made by an expert of the task: its W1 to every buffer is shown"""
    # --- selection ---
    score: Literal["mean", "recent", "top-decile", "per-step"] = "mean"
    """what ranks the buffers: mean return (paper), that of the newest tenth of the rows, that of the best tenth of the
    episodes, or reward per step"""
    top: tuple[str, ...] = ("1",)
    """what to write: numbers n (the n best, mixed), 'all' (paper: 1, 2 and all), and 'transport' (all, in the shares
    that bring the mixture nearest to the expert's data, D8)"""
    top_episodes: runner.Natural = 0
    """N: also write the N best complete episodes of all buffers; 0: no"""
    top_rows: runner.Natural = 0
    """N: also write the best complete episodes of all buffers, as many as fit into N transitions; 0: no"""
    size: runner.Natural = 0
    """transitions in each file of --top, by whole episodes in equal shares; 0: all (D2)"""
    proxy: runner.Share = 0.01
    """share of all episodes, the best, that stands in for the expert's data; ten episodes at least (ours, D8)"""
    exclude_warmup: bool = False
    """leave the random warm-up episodes out of score and data (D1)"""
    seed: runner.Natural = 0
    """seed of the subsamples"""
    # --- distances and output ---
    w1_points: runner.Natural = 500
    """n: points per buffer in a W1; 0: no distances and no measures. Cost grows as K^2 n^3"""
    out: str = ""
    """folder to write below; empty: runs/udg_select"""
    overwrite: bool = False
    """replace files of the same name"""
    quick: bool = False
    """make ten scripted point buffers in a temporary folder and select for point-angle-0"""


# === data ===

# The K buffers are the `sources`: each a name, a memory-mapped buffer and a policy_id (envs/buffers/sources.py).
WRITTEN = (*CHECKED, "observations", "next_observations", "terminals", "timeouts")
CARRIED = ("goals", "action_log_probs")  # optional columns that are written on where all have them


# === relabel ===


def relabel(buffer, task):
    """(1) r = task.reward(s, a, s') -> (N,) float32, in blocks of rows."""
    rewards = raw.in_blocks(task.reward, buffer, np.float32)
    if not np.isfinite(rewards).all():
        row = int(np.argmin(np.isfinite(rewards)))
        raise envs.InputError(
            f"{buffer.path}: the reward of '{task.name}' is not finite in row {row}. "
            "Remedy: find where its observations were recorded"
        )
    return rewards


# === score ===


def kept_parts(buffers, args):
    """Each buffer with the indices of its episodes, without the warm-up where that is left out (D1)."""
    parts = [(buffer, np.flatnonzero(~(warmup_episodes(buffer) & args.exclude_warmup))) for buffer in buffers]
    for buffer, keep in parts:
        if not len(keep):
            raise envs.InputError(f"{buffer.path}: holds nothing but warm-up episodes. Remedy: omit --exclude-warmup")
    return parts


class Episodes(NamedTuple):
    """The E episodes of a buffer under a task."""

    returns: np.ndarray  # (E,) float64: sum of the rewards, as far as the episode goes
    lengths: np.ndarray  # (E,) steps
    complete: np.ndarray  # (E,) bool: it terminated or reached the full length; the others were cut
    begun: np.ndarray  # (E,) bool: it began at a reset
    warmup: np.ndarray  # (E,) bool: it belongs to the warm-up
    tenth: np.ndarray  # (E,) 0 to 9: the tenth of the rows in which it began
    counts: np.ndarray  # (E,) bool: begun, and no warm-up where that is left out

    def statistics(self, mask):
        """measures.return_statistics of the episodes of a mask (E,); None if there are none."""
        return return_statistics(self.returns[mask], self.lengths[mask], self.complete[mask]) if mask.any() else None


def judge_episodes(rewards, buffer, exclude_warmup):
    """(2) rewards (N,) -> Episodes.

    If no episode that counts is complete, all are taken for complete; so are all of an imported file, where no run's
    end cut anything off.
    """
    ends, lengths, warmup = buffer["episode_ends"], buffer["episode_lengths"], warmup_episodes(buffer)
    begun = np.diff(trajectories(buffer), prepend=-1) > 0  # D5: not what follows on a terminal
    counts = begun & ~(warmup & exclude_warmup)  # D1
    if not counts.any():
        raise envs.InputError(f"{buffer.path}: holds nothing but warm-up episodes. Remedy: omit --exclude-warmup")
    complete = buffer["terminals"][ends - 1] | (lengths >= buffer.metadata["episode_length"])
    if not complete[counts].any() or buffer.metadata["layout"] == "task":
        complete = np.ones(len(ends), bool)
    returns = np.add.reduceat(rewards.astype(np.float64), ends - lengths)
    return Episodes(returns, lengths, complete, begun, warmup, (ends - lengths) * 10 // len(buffer), counts)


def score_buffer(episodes, by="mean"):
    """(2) J = mean return of the episodes, and what helps to judge it.

    Episodes -> dict: score (what is ranked), mean, std, top_decile, per_step (measures.return_statistics), tenths (mean
    of the episodes that began in each tenth of the rows, or None), recent (the last of these), score_all, score_trained
    (mean with and without the warm-up; None where nothing else is left), episodes (complete ones), cut (the others),
    returns and weights (lists, of the complete ones).
    """
    of = lambda mask: (episodes.statistics(mask) or {"mean": None})["mean"]
    tenths = [of(episodes.counts & (episodes.tenth == i)) for i in range(10)]
    found = episodes.statistics(episodes.counts) | {"recent": [mean for mean in tenths if mean is not None][-1]}
    lengths, complete = episodes.lengths[episodes.counts], episodes.complete[episodes.counts]
    weights = episode_weights(lengths, complete)  # D7
    return {
        "score": found[by.replace("-", "_")],
        **found,
        "tenths": tenths,
        "score_all": of(episodes.begun),
        "score_trained": of(episodes.begun & ~episodes.warmup),
        "episodes": int(complete.sum()),
        "cut": int((~complete).sum()),
        "returns": episodes.returns[episodes.counts][weights > 0].tolist(),
        "weights": weights[weights > 0].tolist(),
    }


def rank_buffers(scores):
    """(3) Indices of the buffers, best first; equal scores keep their order."""
    return sorted(range(len(scores)), key=lambda k: -scores[k]["score"])


# === distance ===


def sample(buffer, num, rng, args):
    """Return the Transition of `num` rows (fewer where the buffer is small) in random order."""
    rows = measures.rows_of(*kept_parts([buffer], args)[0])
    if len(rows) < 2:
        raise envs.InputError(f"{buffer.path}: {len(rows)} rows to measure a distance with. Remedy: --w1-points 0")
    return raw.transitions(buffer, rng.choice(rows, min(num, len(rows)), replace=False))


def pairwise_wasserstein(sources, world, args):
    """(5) W1 between features of all buffers (K, K); two samples of one on the diagonal."""
    rng, points = np.random.default_rng(args.seed), []
    for source in sources:
        step = sample(source.buffer, 2 * args.w1_points, rng, args)
        points.append(raw.points_of(source.buffer, world.feature(step)))
    n = max(1, min(map(len, points)) // 2)
    matrix = np.zeros((len(points), len(points)))
    for i, j in runner.with_eta(np.transpose(np.triu_indices(len(points))), "W1 between buffers"):
        matrix[i, j] = matrix[j, i] = wasserstein(points[i][:n], points[j][-n:])  # D3
    return matrix


def reference_wasserstein(sources, reference, task, args):
    """(5) W1 to the reference by features (K + 1,) and by state-actions (K + 1,).

    The last entry is the reference against itself, on two samples: the floor (D3).
    """
    rng, points = np.random.default_rng(args.seed), []
    for buffer in [*(source.buffer for source in sources), reference]:
        step = sample(buffer, 2 * args.w1_points, rng, args)
        pairs = np.concatenate([task.observe(step.observations), step.actions], axis=1)
        points.append((raw.points_of(buffer, task.feature(step)), raw.points_of(buffer, pairs)))
    spread = np.concatenate([pairs for _, pairs in points]).std(axis=0)
    unit = np.where(spread > 1e-6, spread, 1.0)  # D4
    n = max(1, min(len(pairs) for _, pairs in points) // 2)
    f, sa = points[-1]
    pairs = [(x[:n], f[-n:]) for x, _ in points] + [(z[:n] / unit, sa[-n:] / unit) for _, z in points]
    distances = [wasserstein(*pair) for pair in runner.with_eta(pairs, "W1 to the reference")]
    return distances[: len(points)], distances[len(points) :]


# === selection ===


class Selection(NamedTuple):
    """What one file holds: the `num` best buffers or episodes, the best that fit into `num` rows, or all in shares."""

    kind: Literal["buffers", "transport", "episodes", "rows"]
    num: int


def parse_selections(args, num_buffers):
    """--top 1 2 all transport --top-episodes 250 -> {'top1': Selection, ..., 'episodes250': Selection}."""
    chosen = {}
    for word in args.top:
        named = word in ("all", "transport")
        num = num_buffers if named else 0
        if word.isdecimal():
            num = int(word)
        if not 1 <= num <= num_buffers:
            remedy = f"'all', 'transport' or numbers from 1 to {num_buffers}"
            raise envs.InputError(f"--top {word}: there are {num_buffers} buffers. Remedy: {remedy}")
        chosen[word if named else f"top{num}"] = Selection("transport" if word == "transport" else "buffers", num)
    for kind, num in (("episodes", args.top_episodes), ("rows", args.top_rows)):
        chosen |= {f"{kind}{num}": Selection(kind, num)} if num else {}
    if not chosen:
        raise envs.InputError("--top: nothing to write. Remedy: --top 1, or --top-episodes")
    if "transport" in chosen and not args.w1_points:
        raise envs.InputError("--top transport: needs distances. Remedy: --w1-points 500")
    return chosen


def best_episodes(judged, kind, num):
    """(4) The best complete episodes of all buffers -> {buffer: sorted indices}; num: how many episodes
    (kind episodes), or how many rows they may have (kind rows)."""
    owner = np.repeat(np.arange(len(judged)), [len(episodes.returns) for episodes in judged])
    index = np.concatenate([np.arange(len(episodes.returns)) for episodes in judged])
    of = lambda name: np.concatenate([getattr(episodes, name) for episodes in judged])
    returns, lengths, complete, counts = map(of, ("returns", "lengths", "complete", "counts"))
    usable = np.flatnonzero(counts & complete)
    ranked = usable[np.argsort(-returns[usable], kind="stable")]
    size = np.ones(len(ranked), int) if kind == "episodes" else lengths[ranked]
    fit = int(np.searchsorted(np.cumsum(size), num, side="right"))
    if size.sum() < num or not fit:
        there = f"{len(ranked):,} complete episodes, {lengths[ranked].sum():,} rows, {lengths[ranked[0]]:,} in the best"
        raise envs.InputError(f"--top-{kind} {num}: there are {there}. Remedy: another number")
    best = ranked[:fit]
    return {int(k): np.sort(index[best[owner[best] == k]]) for k in np.unique(owner[best])}


def transport_shares(near, args):
    """(4) Shares of the buffers, in thousandths (K,), of the mixture that is nearest to the expert's data."""
    n = min(args.w1_points, max(20, 1000 // len(near.samples)), *map(len, near.samples))  # the program takes seconds
    weights, _ = mixture_weights([x[:n] for x in near.samples], near.expert[: 2 * n])
    return np.round(1000 * weights).astype(int)


def choose(selection, order, sources, judged, near, args):
    """(4) Episodes of a selection -> {buffer: sorted indices}, the best buffer first."""
    if selection.kind in ("episodes", "rows"):
        found = best_episodes(judged, *selection)
        return {k: found[k] for k in order if k in found}
    shares = transport_shares(near, args) if selection.kind == "transport" else None
    used = [k for k in order[: selection.num] if shares is None or shares[k]]
    episodes = choose_episodes([sources[k] for k in used], args, None if shares is None else shares[used])
    chosen = {k: keep for k, keep in zip(used, episodes, strict=True) if len(keep)}
    if not chosen:  # of shares by transport, none may hold an episode
        raise envs.InputError(f"--size {args.size}: less than one episode. Remedy: a larger --size")
    return chosen


def choose_episodes(sources, args, shares=None):
    """(4) Episodes to write of each source -> list of sorted indices; --size in equal shares of whole episodes.

    shares: other integer shares; without --size then as much as the scarcest source allows. What one source's last
    episode is over or under its share, the next one makes up for; never more than --size in all.
    """
    parts = kept_parts([source.buffer for source in sources], args)
    if shares is None and not args.size:
        return [keep for _, keep in parts]
    equal, shares = shares is None, np.ones(len(sources), int) if shares is None else shares
    rows = np.array([buffer["episode_lengths"][keep].sum() for buffer, keep in parts])
    size = args.size or int((rows * shares.sum() // shares).min())
    ends = size * np.cumsum(shares) // shares.sum()  # D2: rows taken by the end of each share
    for (buffer, keep), there, share in zip(parts, rows, np.diff(ends, prepend=0), strict=True):
        if there < share or (equal and buffer["episode_lengths"][keep].min() > share):
            raise envs.InputError(
                f"{buffer.path}: --size {args.size} needs {share:,} transitions of it, "
                f"of {there:,} in whole episodes. Remedy: another --size"
            )
    rng, chosen, taken = np.random.default_rng(args.seed), [], 0
    for (buffer, keep), end in zip(parts, ends, strict=True):
        lengths = buffer["episode_lengths"]
        keep = fill(rng.permutation(keep), lengths, end - taken, size - taken)
        taken += int(lengths[keep].sum())
        chosen.append(keep)
    return chosen


def fill(order, lengths, room, most):
    """The first episodes of `order` that come nearest to `room` rows, never more than `most` -> sorted indices.

    Where `room` equals `most` (the last source), later ones that still fit are taken, too. Elsewhere that would favour
    short episodes, which fit more often (D7).
    """
    taken = []
    for episode in order:
        length = lengths[episode]
        if length <= room or (length - room < room < most and length <= most):
            taken.append(episode)
            room, most = room - length, most - length
        elif room < most:
            break
        if room <= 0:
            break
    return np.sort(np.array(taken, np.int64))


def gather(sources, rewards, task, episodes):
    """(4) Arrays of a written file: the chosen episodes of the sources, one after the other."""
    rows = [measures.rows_of(source.buffer, keep) for source, keep in zip(sources, episodes, strict=True)]
    join = lambda columns, view=np.asarray: np.concatenate([view(c[r]) for c, r in zip(columns, rows, strict=True)])
    shared = [key for key in CARRIED if all(key in s.buffer.arrays for s in sources)]
    columns = {key: [s.buffer[key] for s in sources] for key in (*WRITTEN, *shared)}
    views = {"observations": task.observe, "next_observations": task.observe}
    arrays = {key: join(columns[key], views.get(key, np.asarray)) for key in columns}
    ids = [np.full(len(s.buffer), s.policy_id, np.int32) for s in sources]
    return {**arrays, "rewards": join(rewards), "policy_ids": join(ids)}


def write_selection(path, label, chosen, rewards, scores, episodes, task, args):
    """Write one selection, the `episodes` of the `chosen` sources -> its entry in scores.json."""
    for source in chosen:  # values that scoring did not look at
        envs.buffers.load(source.buffer.path, ("observations", "next_observations"), quiet=True)
    arrays = gather(chosen, rewards, task, episodes)
    parents = [provenance(*item) for item in zip(chosen, episodes, scores, strict=True)]
    warmup = [parent["warmup_transitions"] for parent in parents]
    metadata = {
        "dataset_name": f"{task.name}-udg-{label}",
        "env": task.env,
        "task": task.name,
        "layout": "task",
        "reward_kind": "relabelled",
        "task_options": task.options,
        "dt": task.dt,
        "episode_length": chosen[0].buffer.metadata["episode_length"],
        "generator": {"script": "udg_select.py", "flags": portable_flags(args)},
        "seed": args.seed,
        "warmup_transitions": None if any(warmup[1:]) else warmup[0],
        "reference": task.reference,
        "backend": chosen[0].buffer.metadata.get("backend"),
        "parents": parents,
    }
    envs.buffers.save(path, arrays, metadata | ({"reward_function": task.paid_by.about} if task.paid_by else {}))
    saved = envs.buffers.load(path, ("rewards",), quiet=True)
    print(f"wrote {saved.summary()} ({path.stat().st_size / 1e6:.1f} MB)", flush=True)
    keys = ("num_transitions", "num_episodes", "mean_return", "std_return")
    return {"file": path.name, "parents": parents, **{key: saved.metadata[key] for key in keys}}


def portable_flags(args):
    """Flags for the metadata: file names without their folders, which mean nothing elsewhere."""
    flags = dataclasses.asdict(args) | {"buffers": [Path(word).name for word in flatten(args.buffers)]}
    return flags | {name: Path(flags[name]).name for name in ("reference", "out", "task_reward")}


# === run ===


def flatten(words):
    """(("a", "b"), ("c",)) or ("a", "b", "c") -> ["a", "b", "c"]."""
    return [w for word in words for w in ((word,) if isinstance(word, str) else word)]


def planned_files(out, tasks, selections, args):
    """{(task name, selection): path}, refused where one is there already."""

    def stem(label):
        sized = args.size and selections[label].kind in ("buffers", "transport")
        return label + (f"-size{args.size}" if sized else "") + ("-trained" if args.exclude_warmup else "")

    files = {(task.name, label): out / task.name / f"{stem(label)}.npz" for task in tasks for label in selections}
    reports = [out / task.name / "scores.json" for task in tasks]
    for path in [*files.values(), *reports]:
        if path.exists() and not args.overwrite:
            raise envs.InputError(f"{path}: exists. Remedy: --overwrite, or another --out")
    for path in {file.parent for file in files.values()}:
        for torn in path.glob(".*.tmp"):  # what a kill left of a file that was being written
            torn.unlink(missing_ok=True)
    return files


def file_sizes(selections, sources, args):
    """Rows that the file of each selection may hold at most."""
    lengths = sorted((len(source.buffer) for source in sources), reverse=True)
    longest = max(int(source.buffer["episode_lengths"].max()) for source in sources)
    most = {"episodes": longest * args.top_episodes, "rows": args.top_rows}
    of_buffers = lambda kind, num: sum(lengths[: num if kind == "buffers" else None])
    return [min(of_buffers(*each), most.get(each.kind, args.size or math.inf)) for each in selections.values()]


class Prepared(NamedTuple):
    """A task, and what is known before anything is measured or written."""

    task: Any
    sources: list  # K of Source, episodes ended by the task
    rewards: list  # K of (N,)
    judged: list  # K of Episodes
    scores: list  # K of score_buffer's
    order: list  # rank -> buffer
    chosen: dict  # label -> {buffer: episodes}; transport's are chosen when distances are known


def prepare(task, sources, selections, args):
    """Relabel, score, rank and choose for one task, or refuse what cannot be written -> Prepared."""
    sources = [source._replace(buffer=end_by_task(source.buffer, task)) for source in sources]
    rewards = [relabel(source.buffer, task) for source in sources]
    judged = [judge_episodes(r, s.buffer, args.exclude_warmup) for r, s in zip(rewards, sources, strict=True)]
    scores = [score_buffer(episodes, args.score) for episodes in judged]
    order = rank_buffers(scores)
    now = {label: selection for label, selection in selections.items() if selection.kind != "transport"}
    chosen = {label: choose(selection, order, sources, judged, None, args) for label, selection in now.items()}
    return Prepared(task, sources, rewards, judged, scores, order, chosen)


def select(prepared, reference, matrix, measured, selections, files, args):
    """Measure, write and show everything for one task -> entry of the heat map (K,)."""
    task, sources, rewards, judged, scores, order, chosen = prepared
    near = to_reference = found = None
    if args.w1_points:
        near, found = measure_for_task(task, sources, reference, judged, measured, args)
        to_reference = reference_wasserstein(sources, reference, task, args) if reference is not None else None
    choose_now = lambda label: chosen.get(label) or choose(selections[label], order, sources, judged, near, args)
    chosen = {label: choose_now(label) for label in selections}
    tables.show_scores(task, sources, scores, order, to_reference, args.score)
    tables.show_measures(task, sources, found, order, near)
    written, folder = {}, Path(files[task.name, next(iter(chosen))]).parent
    for label, parts in chosen.items():
        path = files[task.name, label]
        of_parts = [[x[k] for k in parts] for x in (sources, rewards, scores)]
        written[label] = write_selection(path, path.stem, *of_parts, list(parts.values()), task, args)
        begun = {k: keep[judged[k].begun[keep]] for k, keep in parts.items()}
        pairs = [(sources[k].buffer, keep) for k, keep in parts.items()]
        distance = None if near is None else near.distance(pairs, task.observe, args.w1_points, args.seed)
        written[label] |= {"score": pooled_mean(judged, begun), "w1_expert": distance}
    tables.show_selections(task, written)
    names = [source.name for source in sources]
    figures.plot_returns(folder / "returns.png", task, names, scores, order)
    figures.plot_coverage(folder / "coverage.png", task, sources, scores, order)
    if found:
        figures.plot_measures(folder / "measures.png", task, names, scores, order, found)
        figures.plot_distances(folder / "distances.png", task, names, scores, order, matrix, to_reference)
    plain = [{key: value for key, value in s.items() if key not in ("returns", "weights")} for s in scores]
    report = {
        "task": task.name,
        "task_options": task.options,
        "flags": portable_flags(args),
        "ranking": [names[k] for k in order],
        "buffers": dict(zip(names, plain, strict=True)),
        "measures": dict(zip(names, found, strict=True)) if found else None,
        "selections": written,
        "w1_points": args.w1_points,
        "w1_features": None if matrix is None else matrix.tolist(),
        "w1_to_reference": to_reference,
        "w1_floor": None if near is None else near.to_expert[-1],
    }
    runner.write_whole(folder / "scores.json", json.dumps(report, indent=1, allow_nan=False))
    return [s["score"] for s in scores]


def measure_for_task(task, sources, reference, judged, measured, args):
    """(5) -> distances in (s, a) (measures.Near), and the measures of each buffer, those of the task included."""
    total = sum(int((episodes.counts & episodes.complete).sum()) for episodes in judged)
    best = best_episodes(judged, "episodes", min(total, max(10, math.ceil(args.proxy * total))))  # D8
    expert = [(sources[k].buffer, keep) for k, keep in best.items()]
    expert = expert if reference is None else kept_parts([reference], args)
    warmup = [np.flatnonzero(episodes.warmup & episodes.begun) for episodes in judged]
    random = [(source.buffer, keep) for source, keep in zip(sources, warmup, strict=True) if len(keep)]
    parts = kept_parts([source.buffer for source in sources], args)
    near = measures.state_action_distances(parts, expert, random, task.observe, args.w1_points, args.seed)
    low, high = pooled_mean(judged, dict(enumerate(warmup))), pooled_mean(judged, best)
    means = [episodes.statistics(episodes.counts)["mean"] for episodes in judged]
    quality = [None if low is None or high <= low else (mean - low) / (high - low) for mean in means]
    each = zip(quality, measured, near.to_random, near.to_expert[:-1], strict=True)
    return near, [{"quality": q, **own, "w1_random": random, "w1_expert": expert} for q, own, random, expert in each]


def pooled_mean(judged, chosen):
    """Mean return of episodes of several buffers, {buffer: indices}, weighted (D7) buffer by buffer; None of none."""
    parts = [(judged[k], keep) for k, keep in chosen.items()]
    returns = np.concatenate([episodes.returns[keep] for episodes, keep in parts])
    weights = np.concatenate([episode_weights(e.lengths[keep], e.complete[keep]) for e, keep in parts])
    return float(np.average(returns, weights=weights)) if len(returns) else None


def main(args) -> dict[str, Any]:
    """Select for every task -> {task name: scores of the K buffers}."""
    if args.quick:
        runner.refuse({"--quick makes its own buffers; leave --buffers out": not args.buffers})
        given = dict(tasks=args.tasks or ("point-angle-0",), out=args.out or "runs/udg_select/quick")
        given["overwrite"] = args.overwrite or not args.out  # the default folder holds nothing else
        with tempfile.TemporaryDirectory() as folder:
            scripted.point_buffers(folder, args.seed)
            given |= dict(buffers=(folder,), quick=False)
            return main(dataclasses.replace(args, **given))
    started = time.time()
    if not args.tasks:
        raise envs.InputError("--task: name at least one, e.g. --task ant-angle-60")
    if args.reference and not args.w1_points:
        raise envs.InputError("--reference: needs distances. Remedy: --w1-points 500")
    runner.check(args)
    options = runner.task_options(args.task_options)
    names = dict.fromkeys(flatten(args.tasks))
    for name in names:
        envs.task(name)  # a wrong name is refused before anything is read
    sources = open_sources(flatten(args.buffers), args.seed)  # D6
    selections = parse_selections(args, len(sources))
    tasks = [open_task(name, options, sources, args.task_reward) for name in names]
    out = Path(args.out or "runs/udg_select")
    files = planned_files(out, tasks, selections, args)
    reference = open_reference(args.reference, sources) if args.reference else None
    runner.announce(f"{len(sources)} buffers of '{tasks[0].env}', {sum(len(x.buffer) for x in sources):,} rows")
    out.mkdir(parents=True, exist_ok=True)
    columns = [x for key, x in sources[0].buffer.arrays.items() if key in (*WRITTEN, *CARRIED)]
    check_room(out, file_sizes(selections, sources, args), len(tasks), columns)

    world = envs.task(tasks[0].env)
    prepared = [prepare(task, sources, selections, args) for task in tasks]
    matrix, measured, table = None, None, {}
    if args.w1_points:
        matrix = pairwise_wasserstein(sources, world, args)
        measured = measures.measure_buffers(
            kept_parts([source.buffer for source in sources], args), world, args.w1_points, args.seed
        )
    for task, ready in zip(tasks, prepared, strict=True):
        (out / task.name).mkdir(parents=True, exist_ok=True)
        table[task.name] = select(ready, reference, matrix, measured, selections, files, args)
    values = np.array(list(table.values())).T
    figures.plot_heatmap(out / "heatmap.png", [source.name for source in sources], list(table), values, args.score)
    learner = "cped" if "goals" in sources[0].buffer.arrays else "mopo"  # MOPO refuses mazes
    budget = " --preset cpu" if jax.default_backend() == "cpu" else ""  # minutes, where the published size takes days
    budget += f" --task-reward {args.task_reward}" if args.task_reward else ""
    budget += f" --task {tasks[0].name}" if envs.imports.module_of(tasks[0].name) else ""  # no file may import it
    print(f"{out}: figures, scores.json; {time.time() - started:.1f} s\n"
          f"next: python {learner}.py --dataset {next(iter(files.values()))}{budget}", flush=True)  # fmt: skip
    return table


if __name__ == "__main__":
    runner.launch(main, Args, doc=__doc__, again="the same command with --overwrite begins anew")
