"""An uncertainty H(s, a) on the data and off them: does it grow where nothing was seen?"""

import jax
import jax.numpy as jnp

from runner.devices import map_seeds

NAMES = ("data", "near", "far_action", "far_state", "policy")
ROWS = 1024


def panels(level):
    """What `metrics` says, as panels of training.png; level: what the quantile is called."""
    return (
        ({f"h/{name}": name for name in NAMES}, "H, mean over seeds", "median", "linear"),
        ({f"h/flagged_{name}": name for name in NAMES}, f"H above the data's {level} quantile", "share", "linear"),
    )


def metrics(h_of, act, own, data, level, args):
    """H at rows of the data, the same for all seeds (data); with noise of std 0.2 on their actions (near); with uniform
    actions (far_action); with noise of 3 stds on the states (far_state); with the policy's actions (policy).

    own: trees [S]; of one seed h_of(own, observations [.., S], actions [.., A], key) -> H [..] and act(own,
    observations) -> actions. -> metrics [S]: the median h/<name>; h/flagged_<name>, the share above the data's `level`
    quantile; with two seeds or more h/overlap, the share of the data's flagged rows that the next seed flags as well.
    """
    key_rows, key_near, key_far, key_state, key_h = jax.random.split(jax.random.key(0), 5)
    index = jax.random.randint(key_rows, (ROWS,), 0, len(data.actions))
    s, a = data.observations[index], data.actions[index]
    near = jnp.clip(a + 0.2 * jax.random.normal(key_near, a.shape), -1.0, 1.0)
    far = jax.random.uniform(key_far, a.shape, minval=-1.0)
    moved = s + 3.0 * s.std(0) * jax.random.normal(key_state, s.shape)

    def of_seed(own):
        h = h_of(own, jnp.stack([s, s, s, moved, s]), jnp.stack([a, near, far, a, act(own, s)]), key_h)
        return jnp.median(h, -1), h > jnp.quantile(h[0], level)

    h, flagged = map_seeds(of_seed, own, args)
    found = {f"h/{name}": h[:, i] for i, name in enumerate(NAMES)}
    found |= {f"h/flagged_{name}": flagged[:, i].mean(-1) for i, name in enumerate(NAMES)}
    both = flagged[:, 0] & jnp.roll(flagged[:, 0], -1, 0)
    return found | ({"h/overlap": both.sum(1) / jnp.maximum(flagged[:, 0].sum(1), 1)} if args.num_seeds > 1 else {})
