"""MOPO in a model that nobody fits: the data's nearest row, or the simulator (docs/mopo.md).

    python benchmark/mopo_models.py --model knn --dataset FILE.npz --out runs/knn         the model of UDG's theory
    python benchmark/mopo_models.py --model world --dataset FILE.npz --out runs/world     what is a perfect model worth?

knn: change and reward of the nearest data row, u = knn_scale * distance. world: the simulator, u = 0, from the data's
states, where observations show the whole state. All else is mopo.py's: rollouts, SAC, log, policy and the folder, if
--out names no other. Flags of the fit have no effect.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

import envs
import mopo
import runner
from envs.distances import nearest


@dataclass(frozen=True)
class Args(mopo.Args):
    model: Literal["knn", "world"] = "knn"
    """the data's nearest row, or the simulator"""
    knn_rows: runner.Count = 20_000
    """data rows that knn keeps; its cost grows with them"""
    knn_scale: runner.Rate = 1.0
    """L: u = L * distance to the nearest row, inputs standardised"""


preset = mopo.preset


def as_model(net, scale, data, args):
    """A function (s, a) -> mean, std [1, B, D], u [B] as one member -> mopo.Model."""
    return mopo.model_of(jax.tree_util.Partial(net[0], *net[1:]), jnp.zeros(1, jnp.int32), scale, data, args)


def sure(targets, u):
    """Targets [B, D] as the mean of one member of std 0."""
    return targets[None], jnp.zeros_like(targets)[None], u


def from_neighbours(knn_scale, scale, inputs, targets, observations, actions):
    """knn: of each (s, a) the targets of the nearest input, and L times its distance."""
    distance, index = nearest(inputs, mopo.model_inputs(scale, observations, actions))
    return sure(targets[index], knn_scale * distance)


def knn_model(key, data, args):
    """`knn_rows` training rows -> mopo.Model."""
    train, _, scale = mopo.split_data(key, data, args)
    kept = jax.random.permutation(jax.random.fold_in(key, 1), train)[: args.knn_rows]
    rows = jax.tree.map(lambda x: x[kept], data)
    inputs = mopo.model_inputs(scale, rows.observations, rows.actions)
    return as_model((from_neighbours, args.knn_scale, scale, inputs, mopo.model_targets(rows)), scale, data, args)


def world_model(key, data, args, env):
    """The simulator -> mopo.Model."""

    def step(obs, action):
        after = env.step(env.from_observation(obs), action)
        return jnp.append(after.obs - obs, after.reward)

    def know(observations, actions):
        targets = jax.vmap(step)(observations, actions)
        return sure(targets, jnp.zeros(len(targets)))

    return as_model((know,), mopo.split_data(key, data, args)[2], data, args)


def check_world(args, env):
    """Refuse a world that cannot be the model, before any work."""
    try:
        jax.eval_shape(env.from_observation, jax.ShapeDtypeStruct((env.observation_size,), jnp.float32))
        env.check_batch(args.num_seeds * mopo.rows_at_once(args))
    except envs.InputError as error:
        raise envs.InputError(f"--model world: {error}; use mopo.py") from None


def own_model(keys, data, args, env):
    """The model of every seed [S]."""
    if args.model == "world":
        check_world(args, env)
    one = {"knn": knn_model, "world": lambda *x: world_model(*x, env)}[args.model]
    return jax.jit(lambda keys: runner.map_seeds(lambda key: one(key, data, args), keys, args))(keys)


FIT = (
    "ensemble_size", "num_elites", "model_hidden_sizes", "model_decays", "model_lr", "model_batch_size", "logvar_coef",
    "patience", "fit_score", "min_gain", "max_epochs", "min_model_steps", "max_model_steps", "standardise_targets",
    "penalty",
)  # fmt: skip


def idle_flags(args):
    """Flags without effect, and why."""
    of_world = ("lam", "knn_rows", "knn_scale") if args.model == "world" else ()
    return dict.fromkeys(FIT, "nothing is fitted here") | dict.fromkeys(of_world, "the world has u = 0")


def main(args):
    """As mopo.main, in the model that the flags name -> scores."""
    return mopo.main(args, own_model)


if __name__ == "__main__":
    runner.launch(main, Args, preset, ("cpu", "ours", "published", *mopo.PUBLISHED), __doc__, idle=idle_flags)
