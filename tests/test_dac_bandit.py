"""benchmark/dac_bandit.py: narrow support and two modes, where the kinds of guidance differ."""

import dataclasses
import functools
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

import dac
import envs
import runner
from benchmark import dac_bandit as B
from tests.oracles.common import of_seed


@functools.cache
def bandit(guidance, b=0.4):
    """2,000 updates on the two blobs (300 where it leaves them) -> metrics of 1,000 samples, the samples."""
    num = 300 if guidance == "denoised" else 2_000
    args = dac.Args(**{**B.BANDIT, "num_updates": num, "chunk": num, "guidance": guidance, "bc_threshold": b})
    init, chunk = dac.make_train(args, 1, 2)
    state, _ = chunk(init(jax.random.split(jax.random.key(0), 1)), B.bandit_data())
    samples = B.bandit_samples(of_seed(state.actor), jax.random.key(1), args)
    return {k: float(v) for k, v in B.bandit_metrics(samples).items()}, np.asarray(samples)


@pytest.mark.learning
def test_cloning_covers_both_modes(optimised):
    """An exact predictor puts 0.97 of the samples within 0.3 of a blob with these 20 steps."""
    found, samples = bandit("none")
    near = np.linalg.norm(samples[:, None] - B.CENTRES, axis=-1) < 0.35
    assert found["eval/on_data"] > 0.85
    assert 0.3 < near[:, 0].mean() < 0.6 and 0.3 < near[:, 1].mean() < 0.6


@pytest.mark.learning
def test_soft_guidance_alone_improves_within_the_support(optimised):
    """Probe: at most 0.2 of the samples off the data, and the true reward above the data's mean by 0.2.

    At the same b hard guidance leaves the data first, and denoised guidance altogether, and for less: it runs to where
    only the critic is good.
    """
    data, (soft, hard, denoised) = B.bandit_metrics(B.bandit_data().actions), (bandit(g)[0] for g in B.GUIDANCES)
    assert soft["eval/on_data"] > 0.8, soft
    assert soft["eval/reward"] > data["eval/reward"] + 0.2, (soft, data)
    assert hard["eval/on_data"] < soft["eval/on_data"] - 0.08, (soft, hard)
    assert denoised["eval/on_data"] < 0.2 and denoised["eval/reward"] < soft["eval/reward"], (soft, denoised)


def test_figure_and_resume_in_the_second_of_three_runs(tmp_path, monkeypatch):
    flags = ["--num-updates", "40", "--eval-every", "40", "--chunk", "20", "--num-steps", "2", "--hidden-sizes", "16",
             "16", "--num-critics", "2", "--out", str(tmp_path / "b")]  # fmt: skip
    args = runner.parse(dac.Args, flags, B.preset)
    assert (args.bc_threshold, args.gamma, args.batch_size) == (0.5, 0.0, 128)
    results = B.main(args)
    assert set(results) == {"data", "soft", "hard", "denoised"}
    assert (tmp_path / "b" / "bandit.png").stat().st_size > 20_000
    assert -1.1 < results["data"]["eval/reward"] < -0.9
    again = dataclasses.replace(args, out=str(tmp_path / "again"))
    progress = runner.Run.progress

    def interrupted(run, step, *rest, **options):
        progress(run, step, *rest, **options)
        if (run.label, step) == ("hard", 20):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(runner.Run, "progress", interrupted)
        with pytest.raises(SystemExit, match="stopped by SIGTERM at hard 20"):
            B.main(again)
    assert B.main(dataclasses.replace(again, resume=True)) == results  # denoised has no state to go on from
    assert [x.name for x in sorted(Path(again.out).iterdir())] == ["bandit.png", "denoised", "hard", "soft"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--quick", "makes its own rows"),
        ("--dataset a.npz", "makes its own rows"),
        ("--preset cpu", "one of bandit, bandit-code"),
    ],
)
def test_the_bandit_is_a_world_of_its_own(flags, message):
    with pytest.raises(envs.InputError, match=message):
        runner.parse(dac.Args, flags.split(), B.preset)
