"""DAC's demonstration: actions in a plane, the best of them off the data, and three ways to climb Q.

    python benchmark/dac_bandit.py                          minutes on 2 cores: runs/dac/bandit/seed0/bandit.png
    python benchmark/dac_bandit.py --preset bandit-code     the sizes of the released code

Two blobs of actions, r = -|a - best| plus noise, one state, every row terminal. Soft guidance (DAC) improves within
the support of the data; hard guidance (g without sigma_t) and denoised guidance (Q of whole samples) leave it.

The code clips reverse steps in the chain of denoised guidance only, has b = 1.3, T = 50, 20k updates at a nearly
constant rate, and draws the rewards' noise anew in every batch. Here all steps are clipped, b = 0.5, which shows soft
guidance best, T = 20, 4k updates, the actor's at four times the rate, cosine to 0, and one draw of noise for each row.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import dac
import runner

BANDIT = {
    "num_updates": 4_000, "eval_every": 4_000, "num_steps": 20, "hidden_sizes": (64, 64, 64), "num_critics": 5,
    "batch_size": 128, "actor_lr": 4e-3, "critic_lr": 1e-3, "eta_lr": 0.01, "bc_threshold": 0.5, "ema_start": 10,
    "gamma": 0.0, "num_q_samples": 1, "num_action_samples": 1,
}  # fmt: skip
BANDIT_CODE = BANDIT | {
    "num_updates": 20_000, "eval_every": 20_000, "num_steps": 50, "actor_lr": 1e-3, "bc_threshold": 1.3,
}  # fmt: skip
PRESETS = {"bandit": BANDIT, "bandit-code": BANDIT_CODE}
GUIDANCES = ("soft", "hard", "denoised")
CENTRES = np.array([(-0.6, 0.6), (0.4, 0.2)])  # of the data's two blobs
BEST = np.array([0.4, -0.4])  # r = -|a - best|: off the data


class Bandit(NamedTuple):
    """Stands where a learner has its task."""

    name: str = "bandit"


def bandit_data(seed=0):
    """400 actions around each centre, std 0.1, and rewards with noise 0.5; one state, every row terminal."""
    rng = np.random.default_rng(seed)
    actions = np.repeat(CENTRES, 400, 0) + 0.1 * rng.normal(size=(800, 2))
    actions = np.clip(actions, -1, 1)
    rewards = -np.linalg.norm(actions - BEST, axis=1) + 0.5 * rng.normal(size=800)
    zeros = np.zeros((800, 1))
    rows = dac.Transitions(zeros, actions, rewards, zeros, np.ones(800))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), rows)


def bandit_samples(actor, key, args, num=1_000):
    """Actions of one actor [num, 2], not clipped."""
    noise = jax.random.normal(key, (args.num_steps, num, 2))
    return dac.sample_actions(actor, jnp.zeros((num, 1)), noise[0], noise[1:], args)


def bandit_metrics(samples):
    """True reward of actions [.., 2] without its noise, distance to the nearest centre, share within 0.3."""
    distance = jnp.linalg.norm(samples[..., None, :] - CENTRES, axis=-1).min(-1)
    reward = -jnp.linalg.norm(samples - BEST, axis=-1)
    return {
        "eval/reward": reward.mean(-1), "eval/distance": distance.mean(-1),
        "eval/on_data": jnp.mean(distance < 0.3, -1),
    }  # fmt: skip


def plot_bandit(path, critics, samples, args):
    """Samples [n, 2] of each guidance over the contours of mean_h Q_h; the data's over those of the soft one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grid = np.stack(np.meshgrid(*[np.linspace(-1.5, 1.5, 61)] * 2), -1).astype(np.float32)
    drawn, axes = plt.subplots(1, len(samples), figsize=(4 * len(samples), 4.2), sharey=True)
    for axis, (name, points) in zip(axes, samples.items(), strict=True):
        q = np.asarray(dac.q_values(critics[name], jnp.zeros((1, 1)), grid, args).mean(0))
        axis.contourf(grid[..., 0], grid[..., 1], q, 20, cmap="viridis", alpha=0.8)
        axis.plot(*np.asarray(points).T, "o", ms=3, mfc="w", mec="0.3", mew=0.3, ls="")
        for centre in CENTRES:
            axis.add_patch(plt.Circle(centre, 0.2, fill=False, zorder=3))
        axis.plot([], [], "o", ms=8, mfc="none", mec="k", ls="", label="data (2 std)")
        axis.plot(*BEST, "*", ms=12, color="r", ls="", label="greatest reward")
        about = {k: float(v) for k, v in bandit_metrics(points).items()}
        axis.set_title(f"{name}: reward {about['eval/reward']:.2f}, {about['eval/on_data']:.0%} on data", fontsize=10)
        axis.set(xlabel="$a_0$", aspect="equal", xlim=(-1.5, 1.5), ylim=(-1.5, 1.5))
    axes[0].set_ylabel("$a_1$")
    axes[0].legend(loc="lower left", fontsize=8)
    drawn.tight_layout()
    drawn.savefig(path, dpi=110)
    plt.close(drawn)


def train(args, data):
    """One guidance on the bandit's rows -> samples [n, 2] and critics of the first seed."""
    init, train_chunk = dac.make_train(args, 1, 2)
    keys, eval_keys = runner.seed_keys(args), runner.evaluation_keys(args)
    sample = jax.jit(jax.vmap(lambda actor, key: bandit_samples(actor, key, args)))
    with runner.Run("dac", args, Bandit(), data="bandit") as run:
        print(f"bandit, {args.guidance} guidance: {args.num_seeds} seeds x {args.num_updates} updates")
        train_chunk = run.compile(train_chunk, jax.eval_shape(init, keys), data)
        state = run.restore(init, keys)
        for step in run.chunks(args.guidance, args.num_updates, state.num_updates):
            state, metrics = train_chunk(state, data)
            run.progress(step, metrics, dac.SHOWN)
            if run.due(step):
                run.log(step, metrics | bandit_metrics(sample(state.actor, eval_keys)))
            run.save(state)
    return np.asarray(sample(state.actor, eval_keys)[0]), jax.tree.map(lambda x: x[0], state.critics)


def preset(args):
    """The values of --preset -> name, {field: value}."""
    name = args.preset or "bandit"
    runner.refuse({
        f"--preset {name}: unknown; one of {', '.join(PRESETS)}": name in PRESETS,
        "the bandit makes its own rows: leave --dataset, --task and --quick out":
            not (args.dataset or args.task or args.quick),
    })  # fmt: skip
    return name, PRESETS[name]


def main(args):
    """One data set, three kinds of guidance, bandit.png -> metrics of each."""
    runner.check_run(args)
    data, top = bandit_data(), Path(args.out or f"runs/dac/bandit/seed{args.seed}")
    samples, critics = {"data": np.asarray(data.actions)}, {}
    for guidance in GUIDANCES:
        own = dataclasses.replace(args, guidance=guidance, out=str(top / guidance))
        samples[guidance], critics[guidance] = train(own, data)
    plot_bandit(top / "bandit.png", {"data": critics["soft"], **critics}, samples, args)
    results = {k: {m: float(v) for m, v in bandit_metrics(x).items()} for k, x in samples.items()}
    for name, metrics in results.items():
        print(f"{name:9s}", *(f"{k} {v:.3f} " for k, v in metrics.items()))
    print(top / "bandit.png")
    return results


if __name__ == "__main__":
    runner.launch(main, dac.Args, preset, PRESETS, __doc__)
