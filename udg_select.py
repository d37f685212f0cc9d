"""UDG's selection: relabel reward-free buffers with a task's reward, pick those that suit it.

Paper      Unsupervised Data Generation for Offline Reinforcement Learning: A Perspective from
           Model (He et al., 2025), arXiv 2506.19643. No reference code is public.
Idea       The gap between what a model-based offline learner reaches and the optimum is bounded
           by W1(rho_beta, rho*), the distance between the state-action distributions of the data
           and of the optimal policy. Nobody knows rho*; the return under the task's reward stands
           in for the distance: the buffer of the highest return is the one to learn from.

Algorithm  for K buffers of one world and every task:
  (1) relabel:  r = task.reward(s, a, s') for all transitions, s -> task.observe(s)
  (2) score:    J_k = mean over the complete episodes of buffer k of  sum_t r_t
  (3) rank:     k_1 .. k_K by J_k, highest first
  (4) mix:      top-n = buffers k_1 .. k_n, in full or cut to --size by whole episodes
  (5) measure:  W1(i, j) between features of buffers i and j, and W1(k, reference) if given, on n
                points each: min over permutations p of  1/n sum_i ||x_i - y_p(i)||   (exact)

Symbols    K buffers | N transitions of a buffer | E its episodes | J_k score | n points of W1
           rewards r [N] | returns sum_t r_t [E] | features f(s') [n, d], task.feature

Deviations
  D1  paper: does not say whether a buffer is the whole replay or what its first random steps
      count; here: the whole file counts, the score without the warm-up part stands beside it, and
      --exclude-warmup leaves that part out of score and data.
  D2  paper: top 1, top 2 and all mixed differ in size by their number of buffers; here: also at
      equal size (--size), an equal share of every buffer.
  D3  paper: W1 appears in the bound and is never measured; here: by exact assignment on
      subsamples, with the distance between two samples of one buffer on the diagonal, which is
      what a distance of zero looks like at n points.
  D4  paper: W1 is over (s, a) in raw units; here: features of s' between buffers, in their units, and (s, a) in
      units of the pooled standard deviation against a reference, so that no unit decides.
  D5  terminals stay as they were recorded; a task that would have ended an episode where the data
      goes on is refused. Not so in mazes: there they are the task's, and a robot that walks on at the
      goal begins a new episode, which counts as data and not in (2).
  D6  a maze's reward needs goals: data that knows none (OGBench) gets one for each trajectory, drawn
      as the environment draws it at a reset.

Files      reads buffers (docs/buffer.md, layout "env", or "task" where the task hides nothing);
           writes <out>/<task>/: top1.npz, ... (layout "task"), scores.json, returns.png,
           coverage.png, distances.png; <out>/heatmap.png
Run        python udg_select.py --quick                                (scripted buffers, seconds)
           python udg_select.py --buffers runs/wurl_sac/ant/seed0/buffers --task ant-angle-60
           python udg_select.py --buffers 'a/*.npz' --task ant-angle-0 ant-angle-60 --top 1 2 all
Expect     see docs/udg_select.md
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

import envs
import envs.buffers
import runner
from envs.buffers import convert, figures, scripted
from envs.buffers.raw import CHECKED, buffer_paths, gear, map_buffer, short_names, trajectories, with_goals
from envs.distances import wasserstein

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
    reference: str = ""
    """a buffer of the same world, made by an expert of the task: its W1 to every buffer is shown"""
    # --- selection ---
    top: tuple[str, ...] = ("1",)
    """what to write: numbers n (the n best, mixed) and 'all' (paper: 1, 2 and all)"""
    size: runner.Natural = 0
    """transitions in each written file, by whole episodes in equal shares; 0: all (D2)"""
    exclude_warmup: bool = False
    """leave the random warm-up episodes out of score and data (D1)"""
    seed: runner.Natural = 0
    """seed of the subsamples"""
    # --- distances and output ---
    w1_points: runner.Natural = 500
    """n: points per buffer in a W1; 0: no distances. Cost grows as K^2 n^3"""
    out: str = ""
    """folder to write below; empty: runs/udg_select"""
    overwrite: bool = False
    """replace files of the same name"""
    quick: bool = False
    """make ten scripted point buffers in a temporary folder and select for point-angle-0"""


# === data ===

BLOCK = 1 << 18  # rows that are relabelled at a time
WRITTEN = (*CHECKED, "observations", "next_observations", "terminals", "timeouts")
CARRIED = ("goals", "action_log_probs")  # optional columns that are written on where all have them


class Source(NamedTuple):
    """One of the K buffers."""

    name: str  # shortest part of the path that tells it from the others
    buffer: envs.buffers.Buffer  # memory-mapped: a column is read where it is used
    policy_id: int


def open_sources(words, seed=0):
    """Open K buffers of one world -> list of Source. seed: of goals that are drawn."""
    paths = buffer_paths(words)
    opened = [map_buffer(path) for path in paths]
    worlds = [(b.metadata["env"], b.metadata["dt"], b.metadata["episode_length"], gear(b)) for b in opened]
    for path, world in zip(paths, worlds, strict=True):
        if world != worlds[0]:
            raise envs.InputError(
                f"{path}: env, dt, episode_length and gear are {world}, but {paths[0]} has {worlds[0]}. "
                "Remedy: select among buffers of one world and length, whose returns compare"
            )
    ids = [buffer.metadata.get("policy_id") for buffer in opened]
    if len(set(ids)) < len(ids) or not all(type(i) is int and i >= 0 for i in ids):
        ids = range(len(opened))  # buffers of several runs: number them as they come
    opened = [with_goals(buffer, seed + k) for k, buffer in enumerate(opened)]  # D6
    return [Source(*item) for item in zip(short_names(paths), opened, ids, strict=True)]


def open_reference(word, sources):
    """Open the one buffer of an expert, of the world of the sources."""
    found = open_sources([word])
    if len(found) > 1:
        raise envs.InputError(f"--reference {word}: {len(found)} buffers. Remedy: name one file")
    buffer, first = found[0].buffer, sources[0].buffer
    sizes = [[b["observations"].shape[1], b["actions"].shape[1]] for b in (buffer, first)]
    if buffer.metadata["env"] != first.metadata["env"] or sizes[0] != sizes[1]:
        raise envs.InputError(
            f"--reference {word}: is of world '{buffer.metadata['env']}' with {sizes[0]} numbers, the buffers are of "
            f"'{first.metadata['env']}' with {sizes[1]}"
        )
    return buffer


def parse_options(words):
    """('ctrl_cost=0.5', 'terminate=true') -> {'ctrl_cost': 0.5, 'terminate': True}."""
    options = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            value = {"true": True, "false": False}.get(text.lower())
            options[name] = float(text) if value is None else value
        except ValueError:
            raise envs.InputError(f"--task-options: '{word}' is not name=number") from None
    return options


def open_task(name, options, sources):
    """Return the task, with the physical options (gear) that the buffers were recorded with."""
    metadata = sources[0].buffer.metadata
    known = envs.tasks.task_options(name)
    recorded = {k: v for k, v in gear(sources[0].buffer).items() if k in known}
    for key, value in recorded.items():
        if options.get(key, value) != value:
            raise envs.InputError(
                f"--task-options {key}={options[key]:g}: the buffers were recorded with {key} {value:g}, and a learner "
                f"would be judged in another world. Remedy: leave {key} out"
            )
    task = envs.task(name, **{**recorded, **options})
    if task.env != metadata["env"]:
        again = metadata["task"] is None and envs.buffers.import_command(sources[0].buffer, task.env)
        raise envs.InputError(
            f"--task {name} is a task of '{task.env}', the buffers are of '{metadata['env']}'. "
            f"Remedy: {again or 'name a task of ' + repr(metadata['env'])}"
        )
    if not task.has_reward:
        near = [n for n in envs.task_names() if envs.task(n).env == task.env and envs.task(n).has_reward]
        raise envs.InputError(f"--task {name} has no reward; tasks here: {', '.join(near) or 'none'}")
    for source in sources:
        sizes = [source.buffer[key].shape[1] for key in ("observations", "actions")]
        if sizes != [task.env_observation_size, task.action_size]:
            raise envs.InputError(
                f"{source.buffer.path}: observations and actions have {sizes} numbers, '{name}' "
                f"needs {[task.env_observation_size, task.action_size]}. Remedy: record it again"
            )
    return task


# === relabel ===


def transitions(buffer, rows):
    """Raw Transition of some rows (a slice or indices)."""
    names = (name for name in envs.Transition._fields if name in buffer.arrays)
    return envs.Transition(**{name: buffer.arrays[name][rows] for name in names})


def relabel(buffer, task):
    """(1) r = task.reward(s, a, s') -> (N,) float32, in blocks of rows."""
    rewards = in_blocks(task.reward, buffer, np.float32)
    if not np.isfinite(rewards).all():
        row = int(np.argmin(np.isfinite(rewards)))
        raise envs.InputError(
            f"{buffer.path}: the reward of '{task.name}' is not finite in row {row}. "
            "Remedy: find where its observations were recorded"
        )
    return rewards


def in_blocks(function, buffer, dtype):
    """A function of a Transition over all rows, BLOCK at a time -> (N,)."""
    found = np.empty(len(buffer), dtype)
    for start in range(0, len(buffer), BLOCK):
        rows = slice(start, start + BLOCK)
        found[rows] = function(transitions(buffer, rows))
    return found


def end_by_task(buffer, task):
    """The buffer with episodes that end where the task ends: as recorded, but in mazes."""
    reached, recorded = in_blocks(task.terminal, buffer, bool), buffer["terminals"]
    if not (reached != recorded).any():
        return buffer
    broken = np.zeros(len(buffer), bool)
    broken[convert.runs(buffer.arrays) - 1] = True  # the data does not go on: cut, or reset
    terminals = recorded | reached
    if "goals" in buffer.arrays:  # D5
        terminals = reached | recorded & broken
    elif (missed := terminals & ~recorded & ~broken).any():
        raise envs.InputError(
            f"{buffer.path}: terminals: '{task.name}' ends an episode in {missed.sum()} rows where "
            "the data goes on. Remedy: collect in the task's world, or without termination"
        )
    ends = np.flatnonzero(terminals | broken) + 1
    changed = {
        "terminals": terminals,
        "timeouts": broken & ~terminals,
        "episode_ends": ends,
        "episode_lengths": np.diff(ends, prepend=0).astype(np.int32),
    }
    return dataclasses.replace(buffer, arrays={**buffer.arrays, **changed})


# === score ===


def warmup_episodes(buffer):
    """(E,) bool: episodes that begin among the random warm-up rows."""
    starts = buffer["episode_ends"] - buffer["episode_lengths"]
    return starts < (buffer.metadata["warmup_transitions"] or 0)


def warmup_rows(buffer, keep):
    """Number of warm-up rows among the episodes `keep`."""
    return int(buffer["episode_lengths"][keep][warmup_episodes(buffer)[keep]].sum())


def score_buffer(rewards, buffer, exclude_warmup):
    """(2) J = mean return of the complete episodes, and what helps to judge it.

    rewards (N,) -> dict: score (what is ranked), score_all, score_trained (without the warm-up
    episodes; None where nothing else is left), std, top_decile (mean of the best tenth of the
    episodes), per_step, episodes, returns (list of those episodes).
    An episode is complete when it terminated or reached the full length; where none did, all count.
    All of an import count too, which may lack last rows and has no piece that a run's end cut off.
    """
    ends, lengths = buffer["episode_ends"], buffer["episode_lengths"]
    returns = np.add.reduceat(rewards.astype(np.float64), ends - lengths)
    complete = buffer["terminals"][ends - 1] | (lengths >= buffer.metadata["episode_length"])
    if not complete.any() or buffer.metadata["layout"] == "task":
        complete = np.ones(len(ends), bool)
    complete &= np.diff(trajectories(buffer), prepend=-1) > 0  # D5: not what follows on a terminal
    trained = complete & ~warmup_episodes(buffer)
    if exclude_warmup and not trained.any():
        raise envs.InputError(f"{buffer.path}: holds nothing but warm-up episodes. Remedy: omit --exclude-warmup")
    used = trained if exclude_warmup else complete  # D1
    best = np.sort(returns[used])[::-1][: max(1, int(used.sum()) // 10)]
    score_all = float(returns[complete].mean())
    score_trained = float(returns[trained].mean()) if trained.any() else None
    return {
        "score": score_trained if exclude_warmup else score_all,
        "score_all": score_all,
        "score_trained": score_trained,
        "std": float(returns[used].std()),
        "top_decile": float(best.mean()),
        "per_step": float(returns[used].sum() / lengths[used].sum()),
        "episodes": int(used.sum()),
        "returns": returns[used].tolist(),
    }


def rank_buffers(scores):
    """(3) Indices of the buffers, best first; equal scores keep their order."""
    return sorted(range(len(scores)), key=lambda k: -scores[k]["score"])


# === distance ===


def told(items, what):
    """Yield the items, and say every five seconds how many are done."""
    began = last = time.time()
    for done, item in enumerate(items):
        if done and time.time() - last > 5:
            last = time.time()
            left = time.gmtime((last - began) / done * (len(items) - done))
            print(f"{what}: {done}/{len(items)}  ETA {time.strftime('%H:%M:%S', left)}", flush=True)
        yield item


def sample(buffer, num, rng, args):
    """Return the Transition of `num` rows (fewer where the buffer is small) in random order."""
    warmup = warmup_rows(buffer, slice(None)) if args.exclude_warmup else 0
    usable = len(buffer) - warmup
    if usable < 2:
        raise envs.InputError(f"{buffer.path}: {usable} rows to measure a distance with. Remedy: --w1-points 0")
    return transitions(buffer, warmup + rng.choice(usable, min(num, usable), replace=False))


def points_of(buffer, values):
    """Values (n, d) as float64; InputError where one is not finite."""
    if not np.isfinite(values).all():
        raise envs.InputError(
            f"{buffer.path}: observations: what distances are measured on is not finite. Remedy: record it again, or "
            "--w1-points 0"
        )
    return np.asarray(values, np.float64)


def pairwise_wasserstein(sources, world, args):
    """(5) W1 between features of all buffers (K, K); two samples of one on the diagonal."""
    rng, points = np.random.default_rng(args.seed), []
    for source in sources:
        step = sample(source.buffer, 2 * args.w1_points, rng, args)
        points.append(points_of(source.buffer, world.feature(step)))
    n = max(1, min(map(len, points)) // 2)
    matrix = np.zeros((len(points), len(points)))
    for i, j in told(np.transpose(np.triu_indices(len(points))), "W1 between buffers"):
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
        points.append((points_of(buffer, task.feature(step)), points_of(buffer, pairs)))
    spread = np.concatenate([pairs for _, pairs in points]).std(axis=0)
    unit = np.where(spread > 1e-6, spread, 1.0)  # D4
    n = max(1, min(len(pairs) for _, pairs in points) // 2)
    f, sa = points[-1]
    pairs = [(x[:n], f[-n:]) for x, _ in points] + [(z[:n] / unit, sa[-n:] / unit) for _, z in points]
    distances = [wasserstein(*pair) for pair in told(pairs, "W1 to the reference")]
    return distances[: len(points)], distances[len(points) :]


# === selection ===


def parse_top(words, num_buffers):
    """('1', '2', 'all') -> {'top1': 1, 'top2': 2, 'all': K}."""
    chosen = {}
    for word in words:
        num = num_buffers if word == "all" else int(word) if word.isdecimal() else 0
        if not 1 <= num <= num_buffers:
            raise envs.InputError(
                f"--top {word}: there are {num_buffers} buffers. Remedy: 'all' or numbers from 1 to {num_buffers}"
            )
        chosen["all" if word == "all" else f"top{num}"] = num
    return chosen


def choose_episodes(sources, args):
    """(4) Episodes to write of each source -> list of sorted indices; --size in equal shares of whole episodes.

    What does not fill an episode of one source is handed on to the next, so that the sum comes as near as it can.
    """
    taken, chosen = 0, []
    rng = np.random.default_rng(args.seed)
    for i, source in enumerate(sources):
        keep, lengths = np.arange(source.buffer.num_episodes), source.buffer["episode_lengths"]
        if args.exclude_warmup:
            keep = keep[~warmup_episodes(source.buffer)]
        if args.size:  # D2
            share = args.size * (i + 1) // len(sources) - taken
            if lengths[keep].sum() < share or lengths[keep].min() > share:
                raise envs.InputError(
                    f"{source.buffer.path}: --size {args.size} needs {share:,} transitions of it, "
                    f"of {lengths[keep].sum():,} in whole episodes. Remedy: another --size"
                )
            keep = fill(rng.permutation(keep), lengths, share)
            taken += int(lengths[keep].sum())
        chosen.append(keep)
    return chosen


def fill(order, lengths, room):
    """Go through the episodes `order` and take each that still fits into `room` -> sorted indices."""
    taken = []
    for episode in order:
        if lengths[episode] <= room:
            taken.append(episode)
            room -= lengths[episode]
    return np.sort(np.array(taken, np.int64))


def file_sha256(path):
    """Return what `sha256sum` prints for the file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def gather(sources, rewards, task, episodes):
    """(4) Arrays of a written file: the chosen episodes of the sources, one after the other."""
    masks = []
    for source, keep in zip(sources, episodes, strict=True):
        chosen = np.isin(np.arange(source.buffer.num_episodes), keep)
        masks.append(np.repeat(chosen, source.buffer["episode_lengths"]))

    def join(columns, view=np.asarray):
        parts = zip(columns, masks, strict=True)
        return np.concatenate([view(c if mask.all() else c[mask]) for c, mask in parts])

    shared = [key for key in CARRIED if all(key in s.buffer.arrays for s in sources)]
    columns = {key: [s.buffer[key] for s in sources] for key in (*WRITTEN, *shared)}
    views = {"observations": task.observe, "next_observations": task.observe}
    arrays = {key: join(columns[key], views.get(key, np.asarray)) for key in columns}
    ids = [np.full(len(s.buffer), s.policy_id, np.int32) for s in sources]
    return {**arrays, "rewards": join(rewards), "policy_ids": join(ids)}


def provenance(source, keep, score):
    """Where rows of a written file come from: file name, digest, what was taken, its score."""
    return {
        "path": Path(source.buffer.path).name,
        "name": source.name,
        "sha256": file_sha256(source.buffer.path),
        "policy_id": source.policy_id,
        "score": score["score"],
        "num_transitions": int(source.buffer["episode_lengths"][keep].sum()),
        "num_episodes": len(keep),
        "warmup_transitions": warmup_rows(source.buffer, keep),
    }


def write_selection(path, label, chosen, rewards, scores, task, args):
    """Write one selection -> its entry in scores.json."""
    for source in chosen:  # values that scoring did not look at
        envs.buffers.load(source.buffer.path, ("observations", "next_observations"), quiet=True)
    episodes = choose_episodes(chosen, args)  # it was seen to work before the first file was written
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
        "episode_length": max(source.buffer.metadata["episode_length"] for source in chosen),
        "generator": {"script": "udg_select.py", "flags": portable_flags(args)},
        "seed": args.seed,
        "warmup_transitions": None if any(warmup[1:]) else warmup[0],
        "reference": task.reference,
        "backend": chosen[0].buffer.metadata.get("backend"),
        "parents": parents,
    }
    envs.buffers.save(path, arrays, metadata)
    saved = envs.buffers.load(path, ("rewards",), quiet=True)
    print(f"wrote {saved.summary()} ({path.stat().st_size / 1e6:.1f} MB)", flush=True)
    keys = ("num_transitions", "num_episodes", "mean_return", "std_return")
    return {"file": path.name, "parents": parents, **{key: saved.metadata[key] for key in keys}}


def portable_flags(args):
    """Flags for the metadata: file names without their folders, which mean nothing elsewhere."""
    flags = dataclasses.asdict(args)
    flags["buffers"] = [Path(word).name for word in flatten(args.buffers)]
    return {**flags, "reference": Path(args.reference).name, "out": Path(args.out).name}


# === run ===


def flatten(words):
    """(("a", "b"), ("c",)) or ("a", "b", "c") -> ["a", "b", "c"]."""
    return [w for word in words for w in ((word,) if isinstance(word, str) else word)]


def show_table(task, sources, scores, order, to_reference):
    """Print the ranking, aligned."""
    width = max(6, *(len(source.name) for source in sources))
    head = f"{'rank':>4}  {'buffer':<{width}} {'return':>10} {'std':>9} {'top 10%':>9} "
    head += f"{'per step':>9} {'trained':>9} {'episodes':>8}"
    head += "" if to_reference is None else f" {'W1 ref f':>9} {'W1 ref sa':>9}"
    print(f"\n{task.name}: mean return of complete episodes\n{head}")
    for rank, k in enumerate(order, start=1):
        s = scores[k]
        trained = "-" if s["score_trained"] is None else f"{s['score_trained']:.2f}"
        line = f"{rank:>4}  {sources[k].name:<{width}} {s['score']:>10.2f} {s['std']:>9.2f} "
        line += f"{s['top_decile']:>9.2f} {s['per_step']:>9.4f} {trained:>9} {s['episodes']:>8}"
        if to_reference is not None:
            line += "".join(f" {values[k]:>9.3f}" for values in to_reference)
        print(line)
    if to_reference is not None:
        floor = "".join(f" {values[-1]:>9.3f}" for values in to_reference)
        print(f"{'two samples of the reference itself':<{len(head) - 20}}{floor}")
    print(flush=True)


def planned_files(out, tasks, selections, args):
    """{(task name, selection): path}, refused where one is there already."""
    tail = (f"-size{args.size}" if args.size else "") + ("-trained" if args.exclude_warmup else "")
    files = {(task.name, label): out / task.name / f"{label}{tail}.npz" for task in tasks for label in selections}
    reports = [out / task.name / "scores.json" for task in tasks]
    for path in [*files.values(), *reports]:
        if path.exists() and not args.overwrite:
            raise envs.InputError(f"{path}: exists. Remedy: --overwrite, or another --out")
    for path in {file.parent for file in files.values()}:
        for torn in path.glob(".*.tmp"):  # what a kill left of a file that was being written
            torn.unlink(missing_ok=True)
    return files


def check_room(out, tasks, sources, selections, args):
    """Refuse, before any work, what neither memory nor disk can hold; print what is needed."""
    lengths = sorted((len(source.buffer) for source in sources), reverse=True)
    rows = {label: min(sum(lengths[:num]), args.size or math.inf) for label, num in selections.items()}
    keys = (*WRITTEN, *CARRIED)
    held = {key: x for key, x in sources[0].buffer.arrays.items() if key in keys}
    bytes_per_row = 4 + sum(x.dtype.itemsize * math.prod(x.shape[1:]) for x in held.values())  # 4: policy_ids
    memory, disk = max(rows.values()) * bytes_per_row, len(tasks) * sum(rows.values()) * bytes_per_row
    free = shutil.disk_usage(out).free
    print(f"{out}: up to {disk / 1e6:,.1f} MB on disk ({free / 1e9:.1f} GB free), {memory / 1e6:,.1f} MB of memory")
    if disk > free:
        raise envs.InputError(f"{out}: needs {disk / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free. "
                              "Remedy: --size, fewer --top, or another --out")  # fmt: skip
    if memory > envs.buffers.available_memory():
        raise envs.InputError(f"--top: {max(rows.values()):,} rows in one file need {memory / 1e9:.1f} GB of memory. "
                              "Remedy: --size, or a smaller --top")  # fmt: skip


def select(task, sources, reference, matrix, selections, files, args):
    """Everything for one task: relabel, score, rank, write, show -> entry of the heat map (K,)."""
    sources = [source._replace(buffer=end_by_task(source.buffer, task)) for source in sources]
    rewards = [relabel(source.buffer, task) for source in sources]
    scores = [score_buffer(r, source.buffer, args.exclude_warmup) for r, source in zip(rewards, sources, strict=True)]
    order = rank_buffers(scores)
    to_reference = None
    if reference is not None and args.w1_points:
        to_reference = reference_wasserstein(sources, reference, task, args)
    show_table(task, sources, scores, order, to_reference)
    for num in selections.values():
        choose_episodes([sources[k] for k in order[:num]], args)  # refuses before anything is written
    written = {}
    for label, num in selections.items():
        chosen = order[:num]
        parts = ([items[k] for k in chosen] for items in (sources, rewards, scores))
        path = files[task.name, label]
        written[label] = write_selection(path, path.stem, *parts, task, args)
    names, folder = [source.name for source in sources], path.parent
    figures.plot_returns(folder / "returns.png", task, names, scores, order)
    figures.plot_coverage(folder / "coverage.png", task, sources, scores, order)
    if matrix is not None:
        drawn = (task, names, scores, order, matrix, to_reference)
        figures.plot_distances(folder / "distances.png", *drawn)
    plain = [{key: value for key, value in s.items() if key != "returns"} for s in scores]
    report = {
        "task": task.name,
        "task_options": task.options,
        "flags": portable_flags(args),
        "ranking": [names[k] for k in order],
        "buffers": dict(zip(names, plain, strict=True)),
        "selections": written,
        "w1_points": args.w1_points,
        "w1_features": None if matrix is None else matrix.tolist(),
        "w1_to_reference": to_reference,
    }
    write_json(folder / "scores.json", report)
    return [s["score"] for s in scores]


def write_json(path, value):
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=False))
    os.replace(temporary, path)


def main(args) -> dict[str, Any]:
    """Select for every task -> {task name: scores of the K buffers}."""
    if args.quick:
        given = dict(tasks=args.tasks or ("point-angle-0",), out=args.out or "runs/udg_select/quick")
        given["overwrite"] = args.overwrite or not args.out  # the default folder holds nothing else
        with tempfile.TemporaryDirectory() as folder:
            scripted.point_buffers(folder, args.seed)
            given |= dict(buffers=(folder,), quick=False)
            return main(dataclasses.replace(args, **given))
    started = time.time()
    if not args.tasks:
        raise envs.InputError("--task: name at least one, e.g. --task ant-angle-60")
    runner.check(args)
    options = parse_options(args.task_options)
    names = dict.fromkeys(flatten(args.tasks))
    for name in names:
        envs.task(name)  # a wrong name is refused before anything is read
    sources = open_sources(flatten(args.buffers), args.seed)
    selections = parse_top(args.top, len(sources))
    tasks = [open_task(name, options, sources) for name in names]
    out = Path(args.out or "runs/udg_select")
    files = planned_files(out, tasks, selections, args)
    reference = open_reference(args.reference, sources) if args.reference else None
    rows = sum(len(source.buffer) for source in sources)
    print(f"{len(sources)} buffers of '{tasks[0].env}', {rows:,} transitions", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    check_room(out, tasks, sources, selections, args)

    world = envs.task(tasks[0].env)
    matrix = pairwise_wasserstein(sources, world, args) if args.w1_points else None
    table = {}
    for task in tasks:
        (out / task.name).mkdir(parents=True, exist_ok=True)
        table[task.name] = select(task, sources, reference, matrix, selections, files, args)
    labels = [source.name for source in sources]
    values = np.array(list(table.values())).T
    figures.plot_heatmap(out / "heatmap.png", labels, list(table), values)
    first = next(iter(files.values()))
    learner = "cped" if "goals" in sources[0].buffer.arrays else "mopo"  # MOPO refuses mazes
    print(f"{out}: figures, scores.json; {time.time() - started:.1f} s\n"
          f"next: python {learner}.py --dataset {first}", flush=True)  # fmt: skip
    return table


if __name__ == "__main__":
    runner.launch(main, Args, doc=__doc__, again="--overwrite")
