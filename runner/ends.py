"""When a world ends, learnt from data: for models of worlds that no function tells it of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

import envs
from runner.diversity import Classifier
from runner.log import say

FEWEST = 10  # terminals to learn from
HELD_OUT = 0.2  # share of the rows, of either kind, that judge
STEPS, BATCH, WIDTHS = 3_000, 256, (64, 64, 1)


def learn_end(task, buffer):
    """The task with `model_terminal` learnt from the data where no function gives it; else as it is.

    A classifier of s' learns from as many terminals as other rows. It says "terminal" as often as the data do: its
    threshold is where as many of all rows lie above. Prints what it finds of held-out rows. InputError where it
    cannot be learnt: of the held-out terminals it misses more than half.

    No checkpoint has it: a resumed run trains it anew, and is exact all the same. It follows from the rows alone, its
    random numbers do not depend on --seed, and a resume refuses other data, flags (--max-rows, --matmul-precision) and
    versions. Another rounding, as on an accelerator, may differ as in any other step there.
    """
    ends = np.asarray(buffer["terminals"])
    if task.knows_end or not ends.any():
        return task
    rng, about = np.random.default_rng(0), f"{buffer.path}: when '{task.name}' ends is learnt from its data"
    kinds = [rng.permutation(np.flatnonzero(mask)) for mask in (ends, ~ends)]
    remedy = "use cped.py, qdq.py or dac.py, which need no model"
    fewest, kind = min((len(rows), name) for rows, name in zip(kinds, ("terminals", "other rows"), strict=True))
    if fewest < FEWEST:
        raise envs.InputError(f"{about}: {fewest} {kind} among {len(ends)} rows are too few; {remedy}")
    held, seen = zip(*(np.split(rows, [max(1, round(HELD_OUT * len(rows)))]) for rows in kinds), strict=True)
    x = np.asarray(buffer["next_observations"])
    mean, std = x.mean(0, np.float64).astype(np.float32), x.std(0, np.float64).astype(np.float32) + np.float32(1e-6)
    net, x, seen = Classifier(WIDTHS), jnp.asarray(x), [jnp.asarray(rows) for rows in seen]
    logit = lambda params, x: net.apply(params, (x - mean) / std)[..., 0]

    def loss(params, key):
        keys = zip(jax.random.split(key), seen, (1.0, -1.0), strict=True)
        parts = [
            sign * logit(params, x[rows[jax.random.randint(k, (BATCH // 2,), 0, len(rows))]]) for k, rows, sign in keys
        ]
        return jax.nn.softplus(-jnp.concatenate(parts)).mean()

    def step(carry, key):
        params, state = carry
        change, state = optimiser.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, change), state), None

    optimiser, (key, key_steps) = (
        optax.adam(optax.cosine_decay_schedule(3e-3, STEPS)),
        jax.random.split(jax.random.key(0)),
    )
    params = net.init(key, x[:1])
    train = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0])
    params, _ = train((params, optimiser.init(params)), jax.random.split(key_steps, STEPS))
    logits = np.asarray(jax.lax.map(lambda x: logit(params, x), x, batch_size=4096))
    lowest = np.sort(logits)[-ends.sum() - 1 : len(ends) - ends.sum() + 1]  # the last row below, the first above
    threshold = np.float32(lowest.mean())
    found, wrong = ((logits[rows] > threshold).sum() for rows in held)
    many = f"of {len(held[0])} held-out terminals {found} are found, of {len(held[1])} other rows {wrong} taken for one"
    if 2 * found < len(held[0]):
        raise envs.InputError(f"{about}: {many}: the next observation does not tell it; {remedy}")
    say(f"{about}: {many}")
    return dataclasses.replace(task, model_terminal=lambda next_obs: logit(params, next_obs) > threshold)
