"""What Q, the model and the world say that a policy is worth: measures, and warnings where they disagree."""

import jax.numpy as jnp
import numpy as np

from runner.log import say


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

    world, model: rewards and whether they are paid [L, E]; of the model r - lam u.
    """
    discount = gamma ** jnp.arange(len(world[0]))[:, None]
    total = lambda rewards, where: (discount * jnp.where(where, rewards, 0.0)).sum(0).mean()
    return {"value/q_start": q.mean(), "value/world": total(*world), "value/model": total(*model)}


def warn_of_climbing(metrics, rewards, gamma):
    """Warn where Q at the start of episodes exceeds the data's best reward, paid for ever -> whether it does.

    Q counts the entropy bonus, and so does the bound; a hundredth of the rewards' range is tolerated. Without a world
    Q at the start is not known: False.
    """
    if gamma == 1 or "value/q_start" not in metrics:
        return False
    q, low, high = float(np.max(metrics["value/q_start"])), float(rewards.min()), float(rewards.max())
    bonus = float(np.max(metrics["train/alpha"] * np.maximum(metrics["train/entropy"], 0.0)))
    most = (max(high, 0.0) + bonus + 0.01 * (high - low)) / (1 - gamma)
    if q > most:
        remedy = "--critic-norm (not in published presets), --num-critics 10 or a larger --lam (docs/mopo.md)"
        worth = f"the data's best reward, paid for ever, is worth {most:.3g}"
        say(f"warning: Q is {q:.3g} where episodes begin; {worth}; {remedy}")
    return q > most


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
