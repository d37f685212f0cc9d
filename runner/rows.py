"""Rows of policies: files that grow while a run goes on, and the buffers that they become at its end.

Where several processes share the policies, each one keeps the files of its own.
"""

import dataclasses
import functools
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np

from envs.buffers.episodes import EpisodeFiles
from runner import devices


class PolicyRows(EpisodeFiles):
    """The row files (envs.buffers.episodes) of `count` policies in one folder."""

    def __init__(self, folder, count, env, rows=None):
        """Open them; rows: of all policies, how many to keep (`rows()` of an earlier process), None for none."""
        self.count = count
        goals = "goal" in jax.eval_shape(env.reset, jax.random.key(0)).info
        own = devices.own_policies(count)
        super().__init__(folder, own, env.observation_size, env.action_size, rows, goals)

    def own(self, tree):
        """Of arrays [R, K, ..] on the devices of all processes this process's policies, on the host."""
        return jax.tree.map(lambda x: devices.own_part(x, self.count), tree)

    def add(self, steps, pseudo_rewards, task):
        """Append the episodes of some rounds with the task's reward (zeros if it has none).

        steps: transition, terminals, alive, log_probs [R, K, N, L, ..], as pseudo_rewards
        """
        steps, pseudo_rewards = self.own((steps, pseudo_rewards))
        rewards = np.asarray(task.reward(steps.transition), np.float32)
        columns = dict(rewards=rewards, pseudo_rewards=pseudo_rewards, action_log_probs=steps.log_probs)
        self.append(steps.transition, steps.terminals, steps.alive, **columns)

    def rows(self):
        """Rows of every policy by now [K], whichever process keeps them."""
        counts = np.zeros(self.count, np.int32)
        counts[self.policies] = self.counts
        return devices.added_up(counts).tolist()


def announce_rounds(args, task, env, actor, episode_length, num_warmup, updates, num_rounds):
    """Print the size of a run, in rounds of warm-up and of so many updates each -> bytes of disk that its rows take, as
    row files and as buffers, and the policies of every evaluation where they are kept; actor: of all policies."""
    steps = (num_warmup + num_rounds) * args.num_envs * episode_length
    print(
        f"{task.name} on {env.backend}: {args.num_policies} policies x {steps} steps in {num_warmup} + {num_rounds} "
        f"rounds of {args.num_envs} x {episode_length} steps and {updates} updates each", flush=True,
    )  # fmt: skip
    row = 4 * (2 * env.observation_size + env.action_size + 9) + 2  # all columns of envs.buffers.episodes
    fresh = args.rollout_episodes * episode_length if args.collect == "rollouts" else 0
    kept = args.num_updates // args.eval_every if args.keep_policies else 0
    rows = steps + (2 * fresh or steps)  # buffers are made of all rows, or of fresh ones, which have files of their own
    return args.num_policies * rows * row + kept * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(actor))


def fresh_rows(run, env, rollouts, actor, key):
    """--rollout-episodes new episodes of the final policies -> their row files.

    rollouts(actor [K], keys [K], episodes) -> steps [K, N, L, ..] as `PolicyRows.add` takes them
    """
    args = run.args
    files = PolicyRows(run.folder / "rollouts", args.num_policies, env)

    @functools.partial(jax.jit, out_shardings=devices.placed(args.num_policies, args, None, "share"))
    def collect(actor, keys):
        return jax.tree.map(lambda x: x[None], rollouts(actor, keys, args.rollout_episodes))

    steps = collect(actor, jax.random.split(key, args.num_policies))
    files.add(steps, jnp.zeros_like(steps.log_probs), run.task)
    return files


def are_finished(run, count):
    """Whether a resumed run has all its buffers and has begun to remove row files, its last act; removes the rest."""
    there = lambda folder, kind: [(run.folder / folder / f"policy_{k:02d}.{kind}").exists() for k in range(count)]
    if not (run.states and all(there("buffers", "npz"))) or all(there("rows", "rows")):
        return False
    for left in ("rows", "rollouts"):
        shutil.rmtree(run.folder / left, ignore_errors=True)
    print(f"{run.folder}: this run is finished: its buffers are whole")
    return True


def write_buffers(run, name, env, episode_length, files, fresh=None):
    """The last act of a run: buffers/policy_XX.npz, whole, of the rows of training or of fresh ones; then the row files
    go. A density is worth keeping of fresh rows only: during training the policies move on."""
    task, args = run.task, run.args
    metadata = {
        "dataset_name": name, "env": task.env, "layout": "env", "task": task.name,
        "reward_kind": "task" if task.has_reward else "none", "task_options": task.options, "dt": task.dt,
        "episode_length": episode_length, "backend": env.backend, "seed": args.seed,
        "generator": {"script": f"{run.script}.py", "flags": dataclasses.asdict(args)}, "parents": [],
    }  # fmt: skip
    if fresh:
        fresh.finish(run.folder / "buffers", metadata, [0] * fresh.count, drop=("pseudo_rewards",))
    else:
        files.finish(run.folder / "buffers", metadata, run.meta["warmup"], drop=("action_log_probs",))
    devices.wait_for_all("all buffers are written")
    for each in (files, fresh) if fresh else (files,):
        each.remove()
    print(f"{run.folder}: buffers, policies, figures; {time.time() - run.began:.0f} s")
    options = " ".join(["", "--task-options", *args.task_options] if args.task_options else [])
    print(f"next: python udg_select.py --buffers {run.folder}/buffers --task ...{options}", flush=True)
