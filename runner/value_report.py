"""What Q, the model and the world say that a policy is worth: measures, and warnings where they disagree."""

import jax.numpy as jnp
import numpy as np

from runner.log import say


def diverged(metrics, q_bound, remedies):
    """What is not finite, and a mean Q beyond +-q_bound (0: nothing is) -> (what is wrong, "remedy, or ") pairs.

    remedies: of training where a number rises, where it falls. Q comes first: losses may have the other sign.
    """
    for name, values in sorted(metrics.items(), key=lambda item: item[0] != "train/q") if q_bound else ():
        worst = np.ravel(values)[np.abs(values).argmax()]  # nan where there is one
        if not abs(worst) <= (q_bound if name == "train/q" else np.finfo(np.float32).max):  # nan: False
            either = " where Q rose, ".join(remedies) + " where it fell" if len(set(remedies)) > 1 else remedies[0]
            remedy = either if np.isnan(worst) else remedies[bool(worst < 0)]
            remedy = remedy if name.startswith("train/") else ""
            stuck = "a hundred gradients in a row were not finite"  # of steps left out: nan after a hundred
            yield stuck if name.endswith("/skipped") else f"{name} is {worst:.3g}", remedy and f"{remedy}, or "


def q_by_step(act, value, rows, keep):
    """Mean Q at each step of rollouts and after their last one -> {"model/q_steps": [h + 1]}.

    act(observations) -> actions, value(observations, actions) -> Q; rows, keep [h, b, ..].
    """
    average = lambda x, where: jnp.where(where, x, 0.0).sum(-1) / jnp.maximum(where.sum(-1), 1)
    last, alive = rows.next_observations[-1], keep[-1] & (rows.terminals[-1] < 0.5)
    inside, after = value(rows.observations, rows.actions), value(last, act(last))
    return {"model/q_steps": jnp.append(average(inside, keep), average(after, alive))}


def start_values(q, gamma, world, model):
    """What Q says of the starts of episodes [E], beside what is paid from there, discounted, without Q's entropy term.

    world: rewards and whether they are paid [L, E]; model: rows, whose rewards are r - lam u, and which of them count.
    A rollout that leaves the data's range is cut off, and what the model would pay later is not known: the world's
    rewards count up to there. value/steps: how many steps are known; after its end an episode pays nothing.
    """
    (world_rewards, alive), (rows, keep) = world, model
    known = keep | (jnp.cumsum(keep & (rows.terminals > 0.5), 0) > 0)
    discount = gamma ** jnp.arange(len(known))[:, None]
    total = lambda rewards, where: (discount * jnp.where(where, rewards, 0.0)).sum(0).mean()
    values = {"value/world": total(world_rewards, alive & known), "value/model": total(rows.rewards, keep)}
    return {"value/q_start": q.mean(), **values, "value/steps": known.sum(0).mean()}


def warn_of_climbing(metrics, rewards, gamma):
    """Warn where Q at the start of episodes exceeds the data's best reward, paid for ever -> whether it does.

    Q counts the entropy bonus, and so does the bound; a hundredth of the rewards' range is tolerated. Where there is
    no world to start in, Q counts at the data's states, where rollouts begin.
    """
    if gamma == 1:
        return False
    if "value/q_start" in metrics:
        where, q = "where episodes begin", np.max(metrics["value/q_start"])
    else:
        where, q = "at the data's states", np.max(np.asarray(metrics["model/q_steps"])[..., 0])
    low, high = float(rewards.min()), float(rewards.max())
    bonus = float(np.max(metrics["train/alpha"] * np.maximum(metrics["train/entropy"], 0.0)))
    most = (max(high, 0.0) + bonus + 0.01 * (high - low)) / (1 - gamma)
    if q > most:
        remedy = "a larger --lam or --num-critics 10, and --critic-norm where it is off, as in published presets"
        worth = f"the data's best reward, paid for ever, is worth {most:.3g}"
        say(f"warning: Q is {q:.3g} {where}; {worth}; try {remedy} (docs/mopo.md)")
    return bool(q > most)


def warn_of_promises(metrics, rewards, gamma):
    """Warn where the model promises the policy far more than the world pays it -> whether it does.

    Far: more than 0.6 of the larger of the two, and 3 % of what the rewards' range is worth for ever.
    """
    if gamma == 1 or "value/world" not in metrics:
        return False
    model, world = np.asarray(metrics["value/model"]), np.asarray(metrics["value/world"])
    least = 0.03 * float(rewards.max() - rewards.min()) / (1 - gamma)
    gap = model - world - np.maximum(0.6 * np.maximum(np.abs(model), np.abs(world)), least)
    i = int(np.argmax(gap))
    if gap.flat[i] > 0:
        promise = f"from where episodes begin the model promises {model.flat[i]:.3g}, discounted"
        remedy = "raise --lam, or record data where this policy goes (docs/mopo.md)"
        say(f"warning: {promise}; the world pays {world.flat[i]:.3g}; {remedy}")
    return bool(gap.flat[i] > 0)


def warn_of_values(metrics, rewards, gamma, warned):
    """Both warnings, each once: `warned` has the names of those that were given -> names of new ones."""
    known = {"climbing": warn_of_climbing, "promises": warn_of_promises}
    return {name for name, warn in known.items() if name not in warned and warn(metrics, rewards, gamma)}
