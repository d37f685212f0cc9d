"""The chain from end to end on the point robot: policies, selection, offline learner, deployed policy."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import envs
import mopo
import udg_select
import wurl_sac

TASK = "point-angle-60"


@pytest.fixture(scope="module")
def chain(tmp_path_factory, all_optimised):
    """-> folders of the three runs and the scores of the buffers."""
    root = tmp_path_factory.mktemp("chain")
    wurl_sac.main(wurl_sac.Args(
        out=str(root / "wurl"), task="point", num_policies=4, num_envs=1, updates_per_step=1.0, num_updates=2_000,
        chunk=500, eval_every=2_000, warmup_steps=500, hidden_sizes=(64, 64), batch_size=128, replay_size=2_000,
        eval_episodes=4, reward_scale=1.0, learning_rate=1e-3,
    ))  # fmt: skip
    udg_select.main(udg_select.Args(
        buffers=(str(root / "wurl"),), tasks=(TASK,), top=("1", "2", "all"), size=1_600, out=str(root / "udg"),
    ))  # fmt: skip
    (dataset,) = (root / "udg" / TASK).glob("top1*.npz")
    result = mopo.main(mopo.Args(
        dataset=str(dataset), out=str(root / "mopo"), num_updates=1_000, chunk=500, rollout_freq=500,
        eval_every=500, max_epochs=15, model_hidden_sizes=(64, 64), rollout_batch=2_000, hidden_sizes=(64, 64),
        actor_lr=1e-3, alpha_lr=1e-3, lam=0.1,
    ))  # fmt: skip
    return root, dataset, result


def test_selection_takes_the_buffer_that_goes_there(chain):
    """Of four policies that went four ways, the chosen one is the one that moved most along 60 degrees."""
    root, dataset, _ = chain
    along = []
    for path in sorted((root / "wurl" / "buffers").glob("*.npz")):
        v = envs.buffers.load(path)["root_velocities"]
        along.append(v @ [np.cos(np.pi / 3), np.sin(np.pi / 3)])
    means = [x.mean() for x in along]
    assert max(means) - min(means) > 0.3  # they differ
    chosen = envs.buffers.load(dataset)
    assert set(np.unique(chosen["policy_ids"])) == {int(np.argmax(means))}
    assert chosen.metadata["task"] == TASK and chosen.metadata["reward_kind"] == "relabelled"


def test_mixtures_have_equal_size(chain):
    root, _, _ = chain
    sizes = {len(envs.buffers.load(p)) for p in (root / "udg" / TASK).glob("*.npz")}
    assert sizes == {1_600}


def test_deployed_policy_is_the_evaluated_one(chain):
    """The README's numpy forward, run in the world, earns what the log says."""
    root, _, _ = chain
    code = (Path(__file__).parents[1] / "README.md").read_text().split("```python")[1].split("```")[0]
    scope = {}
    exec(code, scope)  # the page's own code is what a user copies
    policy = scope["load_policy"](root / "mopo" / "policy.npz")
    env, key = envs.make(TASK), jax.random.key(0)
    state, total, step = env.reset(key), 0.0, jax.jit(env.step)
    for _ in range(env.task.eval_length):
        state = step(state, policy(np.asarray(state.obs)))
        total += float(state.reward)
    last = json.loads((root / "mopo" / "log.jsonl").read_text().splitlines()[-1])
    np.testing.assert_allclose(total, last["eval/return"], atol=0.1)  # the point's start does not vary


def test_learner_beats_the_data(chain):
    """MOPO on the chosen buffer earns clearly more than the buffer's own episodes did, of at most 100."""
    root, dataset, _ = chain
    records = [json.loads(x) for x in (root / "mopo" / "log.jsonl").read_text().splitlines()]
    returns = [r["eval/return"] for r in records if "eval/return" in r]
    data = envs.buffers.load(dataset)["episode_returns"].mean()
    assert returns[-1] > data + 10, (returns, data)
