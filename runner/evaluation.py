"""Episodes of a policy in its world: one protocol for all learners."""

import jax
import jax.numpy as jnp

from runner.devices import over_devices


def play(env, act, params, starts, steps):
    """Undiscounted return of the episodes after every step: [E, L]; constant once ended.

    act(params, observations [E, S], key) -> actions [E, A]; starts: keys [E] of the first states; steps: keys [L] of
    the actions.
    """

    def step(carry, key):
        state, alive, total = carry
        after = jax.vmap(env.step)(state, act(params, state.obs, key))
        total = total + jnp.where(alive, after.reward, 0.0)
        return (after, alive & (after.done < 0.5), total), total

    first = jax.vmap(env.reset)(starts)
    carry = (first, jnp.ones(len(starts), bool), jnp.zeros(len(starts)))
    return jax.lax.scan(step, carry, steps)[1].T


def steps_of(env, act, params, key, episodes, length):
    """Steps of some episodes -> (observations, actions, rewards, next observations, done), alive, all [L, E, ..].

    act as in `play`; alive: the episode had not ended before the step.
    """
    key_starts, key_steps = jax.random.split(key)

    def step(carry, key):
        state, alive = carry
        actions = act(params, state.obs, key)
        after = jax.vmap(env.step)(state, actions)
        rows = state.obs, actions, after.reward, after.obs, after.done
        return (after, alive & (after.done < 0.5)), (rows, alive)

    first = jax.vmap(env.reset)(jax.random.split(key_starts, episodes))
    carry = (first, jnp.ones(episodes, bool))
    return jax.lax.scan(step, carry, jax.random.split(key_steps, length))[1]


def evaluation_keys(args):
    """A key for each seed [S] that no split of the seed's key ever gives: the same starts at every evaluation."""
    seeds = args.seed + jnp.arange(args.num_seeds)
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 2**31))(seeds)


def returns_of(act, env, task, buffer, args, sampled=False):
    """-> one(params, key) -> metrics of --eval-episodes episodes: whole ones, and as long as the data's.

    act(params, observations [E, S], key) -> actions [E, A]; sampled: it draws random numbers. InputError where this
    machine cannot step so many environments. Where the world is not known, there are no metrics.
    """
    if not task.eval_length:
        return lambda params, key: {}
    env.check_batch(args.num_seeds * args.eval_episodes)
    data_length = buffer.metadata["episode_length"]
    length = max(task.eval_length, data_length)

    def one(params, key):
        key_start, key_steps = jax.random.split(key) if sampled else (key, key)
        starts, steps = jax.random.split(key_start, args.eval_episodes), jax.random.split(key_steps, length)
        with jax.default_matmul_precision("highest"):  # the policy that is deployed, whatever it learns with
            totals = play(env, act, params, starts, steps)
        returns = totals[:, task.eval_length - 1]
        metrics = {"eval/return": returns.mean(), "eval/return_std": returns.std()}
        metrics |= {"eval/return_data_length": totals[:, data_length - 1].mean()}
        if task.reference:
            metrics["eval/score"] = task.normalized_score(returns.mean())
        return metrics

    return one


def each_seed(one, args):
    """one(params, .., key) of a seed -> the same of all seeds [S], jitted, each device with its share of them."""
    return jax.jit(over_devices(jax.vmap(one), args))
