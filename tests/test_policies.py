"""runner/policies.py: every kind of policy.npz acts in NumPy as its script does in JAX, and nothing else is read."""

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cped
import dac
import envs
import mopo
import qdq
import runner
import wurl_sac
from envs import buffers
from runner import policies

ROOT = Path(__file__).resolve().parents[1]
S, A, P = 5, 2, 3  # observations, actions, policies or seeds
RNG = np.random.default_rng(0)
EYES = RNG.normal(size=(P, S)).astype(np.float32), RNG.uniform(0.1, 2, (P, S)).astype(np.float32)
SEEN = {"observation_mean": EYES[0], "observation_std": EYES[1]}
ANGLES = np.tile([3, 0], (P, 1)).astype(np.int32)
WIDER = [np.concatenate([x, x[:, :2]], 1) for x in EYES]  # two angles are two more columns
TURNED = {"observation_mean": WIDER[0], "observation_std": WIDER[1], "observation_angles": ANGLES}


def write(path, kind, params, **about):
    """As a run writes it."""
    task = types.SimpleNamespace(name="some", options={}, eval_length=10)
    run = types.SimpleNamespace(folder=path.parent, task=task, leave_if_stopped=lambda: None)
    runner.Run.write_policy(run, kind, params, path.name, **about)


def nets(net, *inputs):
    """P networks of random weights and biases, the same in every test."""
    rng = np.random.default_rng(0)
    made = jax.jit(jax.vmap(lambda key: net.init(key, *inputs)))(jax.random.split(jax.random.key(1), P))
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), made)


def of(tree, index):
    return jax.tree.map(lambda x: x[index], tree)


def gaussian(path, script, layers=2, eyes=None):
    """wurl_sac.py's and mopo.py's file -> act(index, observations, noise)."""
    args, eyes = script.Args(hidden_sizes=(8,) * layers, log_std_min=-0.5, log_std_max=0.3), eyes or {}
    net = (script.actor_net if script is wurl_sac else script.policy_net)(args, A)
    actor = nets(net, jnp.zeros(S + 2 * (len(eyes) == 3)))
    about = {"log_std_min": args.log_std_min, "log_std_max": args.log_std_max}
    write(path, "tanh_gaussian", {"actor": actor, **eyes}, **about)
    scale = *list(eyes.values())[:2], eyes.get("observation_angles", np.zeros((P, 0), int))

    def act(index, observations, noise=None):
        seen = mopo.Sight(*of(scale, index))(observations) if eyes else observations
        mean, log_std = net.apply(of(actor, index), seen)
        sample = wurl_sac.tanh_normal_sample
        return jnp.tanh(mean) if noise is None else sample(mean, log_std, noise)[0]

    return act


def of_cped(path):
    args = cped.Args(hidden_sizes=(8, 8))
    actor = nets(cped.MLP((8, 8, A)), jnp.zeros(S))
    write(path, "tanh_deterministic", {"actor": actor, **SEEN})
    return lambda i, s: cped.act(of(actor, i), (s - EYES[0][i]) / EYES[1][i], args, A)


def of_qdq(path):
    args = qdq.Args(hidden_sizes=(8, 8))
    actor = nets(qdq.QdqActor((8, 8), A), jnp.zeros(S))
    params = {k: x for k, x in actor["params"].items() if k != "log_std"}
    write(path, "tanh_deterministic", {"actor": {"params": params}, **SEEN})
    return lambda i, s: qdq.policy(of(actor, i), (s - EYES[0][i]) / EYES[1][i], args)[0]


def of_dac(path, **flags):
    """-> act(index, observations [B, S], key of the noise)."""
    small = dict(hidden_sizes=(8, 8), num_critics=3, num_seeds=P, num_action_samples=4, num_steps=3)
    args = dac.Args(**{**small, **flags})
    s, a = jnp.zeros(S), jnp.zeros(A)
    actor, critics = nets(dac.NoiseNet((8, 8)), s, a, 1), nets(dac.dac_critics(args), s, a)
    task = types.SimpleNamespace(action_size=A)
    run = types.SimpleNamespace(task=task, write_policy=lambda kind, params, **more: write(path, kind, params, **more))
    see = buffers.Sight(EYES[0][0], EYES[1][0], np.zeros(0, int))
    dac.write_policy(run, types.SimpleNamespace(actor=actor, target_critics=critics), see, args)
    choose = jax.jit(lambda nets, s, key: dac.choose_actions(nets, s, key, args, A)[0])
    return lambda i, s, key: choose((of(actor, i), of(critics, i)), see(s), key)


PLAIN = {  # what has no noise in it
    "wurl_sac": lambda path: gaussian(path, wurl_sac),
    "mopo": lambda path: gaussian(path, mopo),
    "mopo, standardised": lambda path: gaussian(path, mopo, eyes=SEEN),
    "mopo, with angles": lambda path: gaussian(path, mopo, eyes=TURNED),
    "12 layers": lambda path: gaussian(path, wurl_sac, layers=12),  # Dense_10 stands behind Dense_9, not Dense_1
    "cped": of_cped,
    "qdq": of_qdq,
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "policy.npz"


@pytest.fixture
def observations():
    return np.random.default_rng(1).normal(0, 2, (7, S)).astype(np.float32)


def test_all_kinds_are_tested():
    assert set(policies.KINDS) == {"tanh_gaussian", "tanh_deterministic", "diffusion"}


@pytest.mark.parametrize("name", PLAIN)
def test_a_policy_acts_as_its_script_does(name, path, observations):
    """One observation, a batch, and a batch of batches; the second policy is another than the first."""
    act = PLAIN[name](path)
    for index in range(P):
        policy, wanted = policies.load(path, index), act(index, observations)
        assert (policy.observation_size, policy.action_size) == (S, A) and policy.metadata["task"] == "some"
        np.testing.assert_allclose(policy(observations), wanted, atol=2e-6)
        np.testing.assert_allclose(policy(observations[0].tolist()), wanted[0], atol=2e-6)
        np.testing.assert_allclose(policy(observations[None])[0], wanted, atol=2e-6)
        assert policy(observations).dtype == np.float32 and np.abs(wanted).max() > 0.1
    assert np.abs(policy(observations) - policies.load(path)(observations)).max() > 0.1


def test_a_sample_is_that_of_the_noise(path, observations):
    """Within the bounds of the log standard deviation, both of which are reached here."""
    act, noise = gaussian(path, wurl_sac), np.random.default_rng(2).normal(size=(7, A)).astype(np.float32)
    policy = policies.load(path, 1)
    np.testing.assert_allclose(policy(observations, noise), act(1, observations, noise), atol=2e-6)
    assert np.abs(policy(observations, noise) - policy(observations)).max() > 0.1
    log_std = policies.forward(policy.layers, observations)[:, A:]
    assert log_std.min() < policy.limits[0] and log_std.max() > policy.limits[1]


CASES = {
    "best of four": {}, "one, cloned": {"guidance": "none"}, "critics with LayerNorm": {"critic_norm": True},
    "another chain": {"clip_samples": False, "temperature": 0.3, "schedule": "cosine", "num_steps": 4},
}  # fmt: skip


@pytest.mark.parametrize("flags", CASES.values(), ids=CASES)
def test_a_diffusion_policy_acts_as_dac_does(flags, path, observations):
    act, key = of_dac(path, **flags), jax.random.key(3)
    for index in (0, 2):
        policy = policies.load(path, index)
        steps, samples = len(policy.schedule[0]) - 1, policy.samples
        assert samples == (1 if "guidance" in flags else 4)
        noise = jax.random.normal(key, (steps, len(observations), samples, A))
        found = policy(observations, noise)
        np.testing.assert_allclose(found, act(index, observations, key), atol=2e-5)
        assert found.shape == (7, A) and found.dtype == np.float32
        np.testing.assert_allclose(policy(observations[0], noise[:, 0]), found[0], atol=2e-5)


def test_noise_that_is_not_given_is_drawn(path, observations):
    """Anew in each call, and the same of one seed."""
    of_dac(path)
    one, same, other = (policies.load(path, seed=seed) for seed in (0, 0, 1))
    first = one(observations)
    np.testing.assert_array_equal(first, same(observations))
    assert (first != one(observations)).any() and (first != other(observations)).any()
    assert np.abs(first).max() <= 1


def refused(file, text, index=0):
    with pytest.raises(envs.InputError, match=text):
        policies.load(file, index)


def test_what_is_no_policy_is_refused(path, tmp_path):
    refused(path, r"policy\.npz: cannot be read .*name a policy\.npz")
    path.write_bytes(b"PK\x03\x04 torn")
    refused(path, r"policy\.npz: cannot be read")
    np.savez(path, observations=np.zeros((3, 2)))
    refused(path, "has no 'kind'; name a policy.npz that a script wrote")
    write(path, "q_consistency", {"net": {"w": np.zeros(3)}})
    refused(path, "holds 'q_consistency'; the kinds of policies are tanh_gaussian, tanh_deterministic, diffusion")
    write(path, "tanh_deterministic", {"actor": {"w0": np.zeros((2, 3))}})
    refused(path, "has no 'actor/params/Dense_0/kernel'; another version of the script wrote it")
    of_dac(path)
    with np.load(path) as file:
        arrays = {k: v for k, v in file.items() if not k.startswith("critics")}
    np.savez(path, **arrays)
    refused(path, "has no 'critics/params/members/Dense_0/kernel'")


def test_a_policy_that_is_not_there_and_observations_of_another_size(path, observations):
    of_cped(path)
    for index in (-1, P):
        refused(path, f"has no policy {index}; choose an index from 0 to 2", index)
    with pytest.raises(envs.InputError, match=r"observations \[7, 4\]: the policy reads \[\.\., 5\] numbers"):
        policies.load(path)(observations[:, :4])


def test_jax_is_not_imported(path):
    """Nor flax, nor MuJoCo, by loading and acting."""
    of_dac(path)
    code = (
        "import sys, numpy as np; from runner import policies; policies.load(sys.argv[1])(np.zeros((4, 5)));"
        "print(sorted({'jax', 'flax', 'mujoco', 'envs'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_names_of_the_runner_are_found_when_they_are_used():
    for name in runner.__all__:
        assert getattr(runner, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        runner.nothing  # noqa: B018


# --- the pages ---


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


def test_the_pages_forward_is_that_of_the_package(path, observations):
    scope = {}
    exec(next(block for block in blocks("docs/policy.md") if "def load_policy" in block), scope)
    for make in PLAIN.values():
        make(path)
        wanted = policies.load(path, 1)(observations)
        np.testing.assert_allclose(scope["load_policy"](path, 1)(observations), wanted, atol=2e-6)
    of_dac(path)
    with pytest.raises(ValueError, match="diffusion"):
        scope["load_policy"](path, 1)


def test_the_readmes_call(path, observations, monkeypatch):
    """Its path is a run's; what it does with it is done here."""
    block = next(block for block in blocks("README.md") if "policies.load(" in block)
    named = re.search(r'policies\.load\("(.+?)"', block)[1]
    of_cped(path)
    scope = {"observations": observations}
    exec(block.replace(named, str(path)), scope)
    np.testing.assert_array_equal(scope["actions"], policies.load(path)(observations))
    assert json.dumps(named) and named.endswith("policy.npz")
