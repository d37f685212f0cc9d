"""Reference returns of our own tasks: uniform random actions, and an expert that SAC makes of the task's own reward.

    python benchmark/reference_scores.py --list                        what is stored, and what is not
    python benchmark/reference_scores.py --run light                   point and maze tasks, a few minutes each
    python benchmark/reference_scores.py --run ant-angle-0 --updates 200000 --seeds 3      another budget, more seeds
    python benchmark/reference_scores.py --commands robots --budget gpu                    print, run nothing

Random: one run of `wurl_sac.py --random` in the task's world, relabelled with the task's reward. Expert: wurl_sac.py
with one policy and no diversity; the deterministic policy tanh(mean) is judged. Both over `eval_length` steps, which is
what is stored as the reference, and over the length of the data's episodes beside it.
The numbers go to envs/reference_scores.json, which envs.tasks reads; what stands there already, by the same commands,
is skipped. Tasks that are mirror images of one another share one measurement (MIRRORS; tests/test_reference_scores.py):
one expert, and the random return averaged over the images, which takes the luck of the one random run out.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import cells
import envs
from cells import ROOT, Cell
from envs import buffers
from policies import load_actor

STORE = ROOT / "envs" / "reference_scores.json"
RUNS = Path("runs") / "reference"
EXPERT = "--num-policies 1 --objective none --diversity-weight 0 --task-weight 1 --auto-alpha --lr-decay 0"
RANDOM = "--random --num-policies 1 --objective none"
# 110 episodes each; those of robots as long as an evaluation
RANDOM_SIZE = {
    "point": "--num-updates 10000 --eval-every 10000",
    "tree-maze": "--num-updates 10000 --eval-every 10000",
    **dict.fromkeys(
        ("ant", "cheetah"),
        "--episode-length 1000 --num-envs 10 --updates-per-step 0.05 --chunk 500 --num-updates 5000 --eval-every 5000",
    ),
}
# measured task: the tasks that are its mirror image, in world and reward
MIRRORS = {
    "point-angle-0": ("point-angle-180",),
    "point-angle-60": ("point-angle-120", "point-angle-240", "point-angle-300"),
    "point-goal-0": ("point-goal-180",),
    "point-goal-60": ("point-goal-120", "point-goal-240", "point-goal-300"),
    "tree-maze-end-1": ("tree-maze-end-4",),
    "tree-maze-end-2": ("tree-maze-end-3",),
    "ant-angle-0": ("ant-angle-180",),
    "ant-angle-60": ("ant-angle-120", "ant-angle-240", "ant-angle-300"),
    "cheetah-run": (),
    "cheetah-jump": (),
    "cheetah-crawl": (),
}
ROBOTS = tuple(name for name in MIRRORS if name.startswith(("ant", "cheetah")))
GROUPS = {"all": tuple(MIRRORS), "robots": ROBOTS, "light": tuple(n for n in MIRRORS if n not in ROBOTS)}
GPU = "--preset paper"  # of robots


def run_of(words, folder):
    """The cell of a run of wurl_sac.py, done when the buffer of its one policy is there."""
    command = ["wurl_sac.py", *words, "--out", str(folder)]
    return Cell(f"run {folder.relative_to(RUNS)}", command, folder / "buffers" / "policy_00.npz", (), folder)


def random_run(world):
    """The random policy of a world."""
    return run_of(["--task", world, *RANDOM.split(), *RANDOM_SIZE[world].split()], RUNS / world / "random")


def expert_run(name, seed, args):
    """One expert, in a folder that is named by the budget."""
    size = GPU.split() if args.budget == "gpu" and name in ROBOTS else []
    size += ["--num-updates", str(args.updates), "--eval-every", str(args.updates)] if args.updates else []
    budget = ("-paper" if "--preset" in size else "") + (f"-{args.updates}" if args.updates else "")
    words = ["--task", name, *EXPERT.split(), "--seed", str(seed), *size]
    return run_of(words, RUNS / name / f"expert{budget}-seed{seed}")


def make(names, args):
    """Run what these tasks need and is not there -> names of cells that were not made, signal or "".

    InputError where a folder holds a run of other flags.
    """
    wanted = {cell.name: cell for name in names for cell in (plan(name, args)[0], *plan(name, args)[1])}
    for cell in wanted.values():
        if cell.done.exists() and (differ := cells.flags_differ(cell, cells.flags_left(cell))):
            raise envs.InputError(f"{cell.runs}: made with another {', '.join(differ)}. Remedy: move it away")
    cells.adopt(wanted, RUNS)
    return cells.run_cells(wanted, RUNS, args.jobs)


def random_returns(task, folder):
    """Returns of the complete random episodes -> over eval_length, over the data's length; (E,) each."""
    buffer = buffers.load(folder / "buffers" / "policy_00.npz", quiet=True)
    step = envs.Transition(**{k: buffer[k] for k in envs.Transition._fields if k in buffer.arrays})
    rewards = np.asarray(task.reward(step), np.float64)
    ends, lengths = buffer["episode_ends"], buffer["episode_lengths"]
    whole = (lengths >= task.eval_length) | buffer["terminals"][ends - 1]
    episodes = [rewards[end - length : end] for end, length in zip(ends[whole], lengths[whole], strict=True)]
    return tuple(np.array([r[:n].sum() for r in episodes]) for n in (task.eval_length, task.episode_length))


def load_policy(path):
    """The deterministic policy of a wurl_sac.py run: observations [.., S] -> actions [.., A]."""
    actor, about = load_actor(path)
    if about["kind"] != "tanh_gaussian" or about["observations"] != "task":
        raise envs.InputError(f"{path}: a {about['kind']} of {about['observations']} observations is no expert's")
    return lambda x: jnp.tanh(actor(x)[0])


def policy_returns(task, policy, episodes, seed):
    """Returns of fresh episodes in the task's world -> over eval_length, over the data's length; (E,) each."""
    env = envs.make(task.name)
    env.check_batch(episodes)

    def step(carry, _):
        state, alive = carry
        after = jax.vmap(env.step)(state, policy(state.obs))
        return (after, alive * (1.0 - after.done)), after.reward * alive

    @jax.jit
    def play(keys):
        start = jax.vmap(env.reset)(keys)
        return jax.lax.scan(step, (start, jnp.ones(episodes)), length=task.eval_length)[1]

    rewards = np.asarray(play(jax.random.split(jax.random.key(seed), episodes)), np.float64)  # [L, E]
    return rewards.sum(0), rewards[: task.episode_length].sum(0)


def plan(name, args):
    """-> the cells of the random run and of the experts."""
    return random_run(envs.task(name).env), [expert_run(name, seed, args) for seed in range(args.seeds)]


def commands_of(name, args):
    """The commands behind a measurement, as they are stored and printed."""
    random, experts = plan(name, args)
    return [cells.portable(cell.command) for cell in (random, *experts)]


def measure(name, args):
    """Evaluate the runs -> {task name: entry} of a task, {image: task name} of its mirror images."""
    task = envs.task(name)
    random, experts = plan(name, args)
    images = [random_returns(envs.task(same), random.runs) for same in (name, *MIRRORS[name])]
    at_random, at_random_short = np.array(images).swapaxes(0, 1)  # [images, E]
    totals = [
        policy_returns(task, load_policy(expert.runs / "policy.npz"), args.episodes, 1_000 + seed)
        for seed, expert in enumerate(experts)
    ]
    expert, expert_short = np.array(totals)[:, 0], np.array(totals)[:, 1]  # [seeds, E]
    if expert.mean() <= at_random.mean():
        found = f"the expert's {expert.mean():.2f} is not above random {at_random.mean():.2f}"
        raise envs.InputError(f"{name}: {found}, nothing is stored. Remedy: raise --updates")
    number = lambda x: float(f"{x:.6g}")
    entry = {
        "random": number(at_random.mean()), "expert": number(expert.mean()),
        "random_data_length": number(at_random_short.mean()), "expert_data_length": number(expert_short.mean()),
        "random_std": number(at_random.std()), "random_episodes": at_random.shape[1],
        "expert_of_seeds": [number(x) for x in expert.mean(1)], "expert_episodes": args.episodes,
        "eval_length": task.eval_length, "data_length": task.episode_length,
        "commands": commands_of(name, args), "commit": buffers.git_commit(), "versions": buffers.versions(),
    }  # fmt: skip
    print(f"{name}: random {entry['random']}, expert {entry['expert']} ({args.seeds} seeds)", flush=True)
    return {name: entry, **dict.fromkeys(MIRRORS[name], name)}


def stored():
    return json.loads(STORE.read_text())["tasks"] if STORE.exists() else {}


def store(entries):
    """Write the file anew with these entries, whole or not at all."""
    about = "Returns over eval_length steps, or the name of the mirror image; made by benchmark/reference_scores.py"
    tasks = dict(sorted({**stored(), **entries}.items()))
    cells.write_whole(STORE, json.dumps({"about": about, "tasks": tasks}, indent=1) + "\n")


def is_stored(name, args):
    """Whether a task and its mirror images were measured by these very commands and episodes."""
    known = stored()
    entry, images = known.get(name, {}), [known.get(same) == name for same in MIRRORS[name]]
    found = entry.get("commands"), entry.get("expert_episodes")
    return found == (commands_of(name, args), args.episodes) and all(images)


def measure_all(names, args):
    """Run, measure and store what is not stored yet -> names of the tasks that could not be measured, signal or ""."""
    missing = [name for name in names if not is_stored(name, args)]
    for name in set(names) - set(missing):
        print(f"{name}: stored already, skipped")
    lost, stopped = make(missing, args) if missing else (set(), "")
    failed = []
    for name in missing:
        random, experts = plan(name, args)
        if lost & {cell.name for cell in (random, *experts)}:
            failed.append(name)
            continue
        try:
            store(measure(name, args))
        except envs.InputError as error:
            print(f"reference_scores.py: error: {error}", file=sys.stderr, flush=True)
            failed.append(name)
    return failed, stopped


def show():
    """What is stored, task by task."""
    known = stored()
    for name, images in MIRRORS.items():
        e = known.get(name)
        told = "random {random:>9}  expert {expert:>9}".format(**e) if e else "not measured"
        print(f"{name:16}  {told}{'  and ' if images else ''}{', '.join(images)}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="show what is stored")
    parser.add_argument("--run", nargs="+", default=[], metavar="TASK", help=f"tasks, or {', '.join(GROUPS)}")
    parser.add_argument("--commands", nargs="+", default=[], metavar="TASK", help="print the commands, run nothing")
    parser.add_argument("--budget", choices=("cpu", "gpu"), default="cpu", help="gpu: the published size for robots")
    parser.add_argument("--updates", type=int, default=0, help="gradient steps of an expert; 0: wurl_sac.py's own")
    parser.add_argument("--seeds", type=int, default=1, help="experts per task; their mean is stored")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each pinned to a core")
    parser.add_argument("--episodes", type=int, default=20, help="episodes that each expert is judged on")
    args = parser.parse_args(argv)
    names = [n for word in args.run + args.commands for n in GROUPS.get(word, (word,))]
    unknown = sorted(set(names) - set(MIRRORS))
    if unknown:
        parser.error(f"{', '.join(unknown)}: measured are {', '.join(MIRRORS)} (their mirror images with them)")
    if min(args.seeds, args.episodes, args.jobs) < 1 or args.updates < 0:
        parser.error("--seeds, --episodes and --jobs are 1 or more, --updates 0 or more")
    if not (args.list or names):
        parser.error("nothing to do: --list, --run or --commands")
    os.chdir(ROOT)
    if args.commands:
        print(*dict.fromkeys(c for name in names for c in commands_of(name, args)), sep="\n")
        return
    try:
        failed, stopped = measure_all(list(dict.fromkeys(names)), args)
    except envs.InputError as error:
        sys.exit(f"reference_scores.py: error: {error}")
    if args.list:
        show()
    if stopped:
        sys.exit(f"stopped by {stopped}; go on with the same command")
    if failed:
        sys.exit(f"reference_scores.py: error: not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
