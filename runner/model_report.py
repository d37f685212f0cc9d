"""What a learnt model of the world knows and what is said of it: measures, warnings, figures.

Models are functions predict(observations [B, S], actions [B, A]) -> mean and std [E, B, D] of (s' - s, r), u [B];
`elites` [M] are the members that count. Rows have observations, actions, next_observations [.., S].
"""

import jax
import jax.numpy as jnp
import numpy as np

from runner import plots
from runner.log import say


def check_fit(predict, elites, data, targets, units, holdout, run):
    """`held_out` and `several_steps` of the rows `holdout` [H], which lie in runs of `run` rows -> metrics, arrays.

    targets [N, D] of all data; units: std of the targets [D] and of the observations [S].
    """
    rows, stride = jax.tree.map(lambda x: x[holdout], data), max(min(run, len(holdout)) // 5, 1)
    metrics, arrays = held_out(predict, elites, rows, targets[holdout], units[0])
    return metrics, arrays | several_steps(predict, elites, data, holdout, stride, units[1])


def held_out(predict, elites, rows, targets, unit):
    """What a model knows of rows that it has not seen -> metrics, arrays.

    targets [H, D] of std `unit` [D], 0 where one never varies. error [H] = sqrt( mean over elites of ||mean - (s' - s,
    r)||^2 ) beside u [H]; of each target its root mean square error, the std that the elites claim, and the share of
    its variance that is unexplained.
    """
    mean, std, u = predict(rows.observations, rows.actions)
    square, claimed = ((mean - targets) ** 2)[elites], (std[elites] ** 2).mean((0, 1))
    variance = jnp.where(unit > 0, unit**2, jnp.inf)
    error = jnp.sqrt(square.sum(-1).mean(0))
    low, half, high = jnp.quantile(u, jnp.array([0.05, 0.5, 0.95]))
    metrics = {
        "fit/u_p05": low, "fit/u_p50": half, "fit/u_p95": high, "fit/correlation": jnp.corrcoef(u, error)[0, 1],
        "fit/rmse": jnp.sqrt(square.mean((0, 1))), "fit/sigma": jnp.sqrt(claimed),
        "fit/unexplained": square.mean((0, 1)) / variance,
    }  # fmt: skip
    return metrics, {"u": u, "error": error}


def several_steps(predict, elites, data, holdout, stride, unit, steps=20):
    """Each elite's mean, step after step from every stride-th held-out row, with the actions that were taken.

    -> steps_error [steps]: root mean square over rows, elites and numbers, in `unit` [S]; steps_u [steps]: mean u on
    the way. nan where no run of held-out rows within an episode is long enough.
    """
    index = jnp.minimum(holdout[::stride, None] + jnp.arange(steps), len(data.rewards) - 1)  # [n, steps]
    rows = jax.tree.map(lambda x: x[index], data)
    goes_on = (rows.next_observations[:, :-1] == rows.observations[:, 1:]).all(-1)
    whole = goes_on.all(-1) & jnp.isin(index, holdout).all(-1)
    average = lambda x: jnp.where(whole, x, 0.0).sum() / whole.sum()

    def step(states, t):  # states [M, n, S]
        def one(member, state):
            mean, _, u = predict(state, rows.actions[:, t])
            return state + mean[member, :, :-1], u

        states, u = jax.vmap(one)(elites, states)
        square = (((states - rows.next_observations[:, t]) / unit) ** 2).mean((0, 2))
        return states, (jnp.sqrt(average(square)), average(u.mean(0)))

    starts = jnp.broadcast_to(rows.observations[:, 0], (len(elites), *rows.observations[:, 0].shape))
    error, u = jax.lax.scan(step, starts, jnp.arange(steps))[1]
    return {"steps_error": error, "steps_u": u}


def calibration(predict, elites, rows, targets, alive):
    """The elites' one-step error on real rows beside the std they claim and beside u.

    rows, targets, alive [L, N, ..] -> metrics, points (u, error) [2, L N], nan where not alive; error as in `held_out`
    """
    rows, targets, alive = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (rows, targets, alive))
    mean, std, u = predict(rows.observations, rows.actions)
    square = ((mean - targets) ** 2)[elites]  # [M, B, D]
    error = jnp.sqrt(square.sum(-1).mean(0))
    average = lambda x: jnp.where(alive, x, 0.0).sum() / alive.sum()
    du, de = u - average(u), error - average(error)
    spread = jnp.sqrt(average(du**2) * average(de**2))
    metrics = {
        "model/world_rmse": jnp.sqrt(average(square.mean((0, 2)))),
        "model/world_sigma": jnp.sqrt(average((std[elites] ** 2).mean((0, 2)))),
        "model/world_error": average(error),
        "model/world_u": average(u),
        "model/world_bounded": average(error <= u),
        "model/world_correlation": average(du * de) / jnp.maximum(spread, 1e-30),
    }
    return metrics, jnp.where(alive, jnp.stack([u, error]), jnp.nan)


def rollouts(info, keep, lam, u_real, high_reward, number):
    """Of `number` rollouts in a model -> metrics; u_real [n]: u on some rows of the data.

    info: u, reward before the penalty, terminal and outside (it ended so) of the rows; keep: which of them count.
    """
    average = lambda x: jnp.where(keep, x, 0.0).sum() / jnp.maximum(keep.sum(), 1)
    metrics = {
        "model/penalty_share": lam * average(info["u"]) / jnp.maximum(average(jnp.abs(info["reward"])), 1e-30),
        "model/reward": average(info["reward"]),
        "model/invented": average(info["reward"] > high_reward),
        "model/rollout_length": keep.sum() / number,
        "model/terminal": info["terminal"].sum() / number,
        "model/outside": info["outside"].sum() / number,
    }
    for name, u in (("model", jnp.where(keep, info["u"], jnp.nan)), ("real", u_real)):
        half, most = jnp.nanquantile(u, jnp.array([0.5, 0.95]))
        metrics |= {f"model/u_{name}": jnp.nanmean(u), f"model/u_{name}_p50": half, f"model/u_{name}_p95": most}
    return metrics


def report_fit(run, epoch, found, arrays, capped):
    """Log what models know of held-out rows, warn where their u cannot serve as a penalty, and draw the first seed's.

    found, arrays: of `check_fit`, the seeds [S] as their first axis; capped [S]: the fit was cut off.
    """
    run.log(epoch, found)
    for i, cut_off in enumerate(np.asarray(capped)):
        x, seed = {name: np.asarray(values[i]) for name, values in found.items()}, f"seed {run.args.seed + i}"
        u = " / ".join(f"{x[f'fit/u_p{q}']:.3g}" for q in ("05", "50", "95"))
        say(f"{seed}, held-out rows: u {u} (5, 50, 95 %), correlation with the error {x['fit/correlation']:.2f}")
        share = f"share of unexplained variance {unexplained(x):.3f}"
        say(f"{seed}, held-out rows: {share} (median of the targets that vary)")
        for problem, remedy in fit_problems(x, cut_off, run.args):
            say(f"warning: {seed}: {problem}; {remedy}")
    plot_fit(run, jax.tree.map(lambda x: np.asarray(x[0]), found | arrays))


def unexplained(found):
    """Median of the shares [D] of unexplained variance, of the targets that vary; 0 if none does."""
    shares = np.asarray(found["fit/unexplained"])
    return np.median(shares[shares > 0]) if (shares > 0).any() else 0.0


def fit_problems(found, capped, args):
    """What is wrong with a fit -> (problem, remedy) pairs."""
    flat, blind = found["fit/u_p95"] < 1.1 * found["fit/u_p50"], not found["fit/correlation"] > 0.2
    errs = unexplained(found) > 0.01  # else there is next to nothing to be uncertain of
    other = "try --penalty ensemble_std, and tune --lam anew" if args.penalty != "ensemble_std" else "raise --lam"
    other = other if args.standardise_targets else "try --standardise-targets"
    known = (
        ("the fit was cut off while members still gained", "raise its cap, --max-epochs or --max-model-steps", capped),
        ("u is nearly constant: it says nowhere that the model is worse", other, flat and errs),
        ("u does not rank the model's error", f"more steps or data may help, or {other}", blind and errs and not flat),
    )
    return [(problem, remedy) for problem, remedy, holds in known if holds]


def plot_fit(run, found):
    """model.png: calibration of every target, u beside the error, predictions over several steps; of one seed."""
    sigma, rmse, share = (found[f"fit/{name}"] for name in ("sigma", "rmse", "unexplained"))
    number, error = np.arange(len(rmse)), np.sqrt(share)  # in std of the target
    claimed = error * np.divide(sigma, rmse, out=np.zeros_like(rmse), where=rmse > 0)
    order = np.array_split(np.argsort(found["u"]), min(10, len(found["u"])))
    tenths = [np.array([found[name][i].mean() for i in order]) for name in ("u", "error")]
    equal = lambda x: (x, x, {"color": "k", "ls": "--", "lw": 1, "label": "equal"})
    rows = (found["u"], found["error"], {"marker": ".", "ls": "", "ms": 2, "alpha": 0.4, "label": "a held-out row"})
    panels = [
        {"title": f"error and its claimed std; {number[-1]} is the reward", "xlabel": "number of the target",
         "scale": "semilogy", "ylabel": "in std of the target", "lines": [
             (number, error, {"marker": "o", "ls": "", "ms": 5, "label": "error"}),
             (number, claimed, {"marker": "_", "ls": "", "ms": 12, "mew": 2, "label": "claimed std"})]},
        {"title": f"u beside the error, correlation {found['fit/correlation']:.2f}", "xlabel": "u", "scale": "loglog",
         "ylabel": "error of the elites", "lines": [
             rows, (*tenths, {"color": "C1", "marker": "o", "label": "tenths of u"}), equal(tenths[0])]},
    ]  # fmt: skip
    error, u = found["steps_error"], found["steps_u"]
    if np.isfinite(error).all():  # single rows that are held out make no runs
        steps, as_error = np.arange(1, 1 + len(error)), u / u[0] * error[0]
        lines = [(steps, error, {"marker": ".", "label": "error"})]
        lines += [(steps, as_error, {"ls": ":", "label": "u, scaled to the error of one step"})]
        panels.append({"title": "prediction over several steps", "xlabel": "steps", "scale": "semilogy",
                       "ylabel": "error, in std of the states", "lines": lines})  # fmt: skip
    plots.figure(run.folder / "model.png", panels)


def plot_run(run, points):
    """dynamics.png and penalty.png, from the log and calibration's points, of which there are none without a world."""
    fits = plots.read(run.folder, "model/holdout_mse").items()
    errors = [(*fit, {"lw": 0.8, "color": f"C{i}", "label": f"seed {seed}"}) for i, (seed, fit) in enumerate(fits)]
    panels = [
        {"title": "hold-out error of the model, each member", "xlabel": "epoch", "ylabel": "MSE of (s' - s, r)",
         "scale": "semilogy", "lines": errors},
    ]  # fmt: skip
    if points.size:
        u, error = points[0]
        ends = np.array([np.nanmin(error), np.nanmax(error)])
        line = (ends, ends, {"color": "k", "ls": "--", "lw": 1, "label": "error = u"})
        dots = (u, error, {"marker": ".", "ls": "", "ms": 2, "alpha": 0.5, "label": "one step of the policy"})
        panels.append({
            "title": "final policy in the world, first seed", "xlabel": "penalty u",
            "ylabel": "one-step error of the elites", "scale": "loglog", "lines": [dots, line],
        })  # fmt: skip
    plots.figure(run.folder / "dynamics.png", panels)
    keys = {}
    for rows, color in (("real", "C0"), ("model", "C1")):
        for part, style, label in (("", "-", "mean"), ("_p50", "--", "median"), ("_p95", ":", "95 %")):
            keys[f"model/u_{rows}{part}"] = f"{rows} rows, {label}", {"color": color, "ls": style, "marker": ""}
    plots.training(run.folder / "penalty.png", run.folder, [
        (keys, f"{run.task.name}: penalty, mean over seeds", "u, before lambda", "linear"),
    ])  # fmt: skip
