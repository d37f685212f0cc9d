"""benchmark/mopo_models.py: the nearest row and the simulator as MOPO's model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
import mopo as M
import mopo_models
from tests.oracles import mopo_oracle as oracle
from tests.oracles.common import close
from tests.test_mopo import TINY, predict, random_data


def tiny(**changes):
    return mopo_models.Args(**{**TINY, **changes})


@pytest.mark.parametrize("rows", [1, 100, 150])  # fewer than a block of the search, one, one and a half
def test_knn_is_the_oracles(rows):
    args, data = tiny(model="knn", knn_rows=rows, knn_scale=2.0), random_data()
    model = mopo_models.knn_model(jax.random.key(0), data, args)
    obs, actions = data.observations[:30] + 0.1, data.actions[:30]
    mean, std, u = predict(model, obs, actions, args)
    x = np.asarray(M.model_inputs(model.scale, obs, actions), float)
    index, distance = oracle.nearest(np.asarray(model.net.args[2], float), x)
    assert len(model.net.args[2]) == rows
    kept = np.isin(np.asarray(data.rewards), np.asarray(model.net.args[3])[:, -1])
    assert rows < 100 or np.ptp(np.flatnonzero(kept)) > 300  # from all of the file
    close(u, 2.0 * distance, 1e-4)
    np.testing.assert_array_equal(mean[0], np.asarray(model.net.args[3])[index])
    assert not std.any() and list(model.elites) == [0]


@pytest.mark.parametrize("name", ["point-angle-60", "ant-angle-60", "cheetah-jump"])
def test_the_world_as_the_model_is_the_world(name):
    """A step of the model from what an episode observed is the episode's own step, reward and all."""
    task = envs.task(name)
    env, args = envs.make(task), tiny(model="world")

    @jax.jit
    def episode(key):
        def step(state, key):
            action = jax.random.uniform(key, (task.action_size,), minval=-1, maxval=1)
            after = env.step(state, action)
            return after, (state.obs, action, after.reward, after.obs)

        return jax.lax.scan(step, env.reset(key), jax.random.split(key, 30))[1]

    obs, actions, rewards, after = episode(jax.random.key(0))
    zeros = jnp.zeros(30)
    data = M.Rows(obs, actions, rewards, after, zeros, zeros)
    model = mopo_models.world_model(jax.random.key(1), data, args, env)
    mean, std, u = predict(model, obs, actions, args)
    close(mean[0, :, :-1], after - obs, 2e-3)
    close(mean[0, :, -1], rewards, 2e-3)
    assert not std.any() and not u.any() and mean.shape == (1, 30, task.observation_size + 1)


def test_a_world_that_observations_do_not_show_is_refused():
    env = envs.make("ant-maze-umaze")
    with pytest.raises(envs.InputError, match=r"--model world: .*a maze's goal is not observed; use mopo.py"):
        mopo_models.check_world(tiny(), env)


def test_knn_runs_without_a_fit(dataset, tmp_path):
    args = tiny(dataset=dataset, out=str(tmp_path / "run"), model="knn", knn_rows=300, num_updates=40, reward="known")
    result = mopo_models.main(args)
    assert np.isfinite(result["score"]) and not (tmp_path / "run" / "model" / "state.npz").exists()


def test_the_world_as_the_model_runs_and_resumes(dataset, tmp_path):
    """With scaled observations, which policy.npz has to know."""
    args = tiny(
        dataset=dataset, out=str(tmp_path / "run"), model="world", num_updates=40, standardise_observations=True
    )
    result = mopo_models.main(args)
    assert np.isfinite(result["score"]) and mopo_models.main(dataclasses.replace(args, resume=True)) == result
    header = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert header["num_devices"] == jax.device_count()
    policy, buffer = np.load(tmp_path / "run" / "policy.npz"), envs.buffers.load(dataset)
    close(policy["observation_mean"][0], buffer["observations"].mean(0), 1e-3)
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()[1:]]
    assert all(r["model/world_error"] < 1e-3 and r["model/u_model"] == 0 for r in records)


def test_flags_of_the_fit_are_said_to_be_idle():
    fields = {field.name for field in dataclasses.fields(mopo_models.Args)}
    knn, world = (mopo_models.idle_flags(tiny(model=model)) for model in ("knn", "world"))
    assert knn.keys() < world.keys() <= fields and world.keys() - knn.keys() == {"lam", "knn_rows", "knn_scale"}
