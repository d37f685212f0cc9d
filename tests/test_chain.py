"""The chain from end to end on the point robot: policies, selection, offline learner."""

import numpy as np

import envs
import mopo
import udg_select
import wurl_sac

TASK = "point-angle-60"


def test_the_chain_learns_more_than_its_data_show(tmp_path, optimised):
    """Of four policies that went four ways, the one that moved most along 60 degrees is chosen, and MOPO earns clearly
    more on its buffer than the buffer's own episodes did, of at most 100."""
    wurl_sac.main(wurl_sac.Args(
        out=str(tmp_path / "wurl"), task="point", num_policies=4, num_envs=1, updates_per_step=1.0, num_updates=2_000,
        chunk=500, eval_every=2_000, warmup_steps=500, hidden_sizes=(64, 64), batch_size=128, replay_size=2_000,
        eval_episodes=4, reward_scale=1.0, learning_rate=1e-3,
    ))  # fmt: skip
    raw = [envs.buffers.load(path) for path in sorted((tmp_path / "wurl" / "buffers").glob("*.npz"))]
    means = [(b["root_velocities"] @ [np.cos(np.pi / 3), np.sin(np.pi / 3)]).mean() for b in raw]
    assert max(means) - min(means) > 0.3  # they differ
    udg_select.main(udg_select.Args(
        buffers=(str(tmp_path / "wurl"),), tasks=(TASK,), size=1_600, w1_points=0, out=str(tmp_path / "udg"),
    ))  # fmt: skip
    path = tmp_path / "udg" / TASK / "top1-size1600.npz"
    chosen = envs.buffers.load(path)
    assert set(np.unique(chosen["policy_ids"])) == {int(np.argmax(means))} and len(chosen) == 1_600
    assert chosen.metadata["task"] == TASK and chosen.metadata["reward_kind"] == "relabelled"
    result = mopo.main(mopo.Args(
        dataset=str(path), out=str(tmp_path / "mopo"), num_updates=2_000, chunk=500, rollout_freq=500,
        eval_every=500, max_epochs=15, model_hidden_sizes=(64, 64), rollout_batch=2_000, hidden_sizes=(64, 64),
        actor_lr=1e-3, alpha_lr=1e-3, lam=0.1,
    ))  # fmt: skip
    assert result["last"] > chosen["episode_returns"].mean() + 10, result
