"""The scripts' functions without their runs: docs/library.md as it stands, and dicts of arrays in place of buffers."""

import re
from pathlib import Path

import jax
import numpy as np

import cped
import dac
import envs.buffers

ROOT = Path(__file__).resolve().parents[1]


def replaced(text, words):
    """text with each of the words {old: new}, which stand in it once."""
    for old, new in words.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def test_the_page_runs(capsys):
    """Its own words, with fewer episodes and updates; it prints an episode's return, the data's and the policy's."""
    code, mopo_code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.S)
    fewer = {"range(100)": "range(3)", "3_000": "20", "10_000": "20", "chunk=500": "chunk=10", "range(10)": "range(1)"}
    code = replaced(code, fewer)
    assert code.count("\n") < 50
    scope = {}
    exec(code, scope)
    of_data, of_policy = map(float, capsys.readouterr().out.split())
    assert -2_000 < of_data < 0 and -2_000 < of_policy < 0
    state, actor = scope["state"], scope["actor"]
    assert state.num_updates.tolist() == [20]
    fresh = scope["init"](jax.random.split(jax.random.key(0), 1), scope["data"]).nets.actor
    assert any((x[0] != y).any() for x, y in zip(jax.tree.leaves(fresh), jax.tree.leaves(actor), strict=True))

    fewer = {"=2_000, max": "=4, max", "=4_000": "=4", "5_000": "20", "rollout_batch=2_000": "rollout_batch=256"}
    exec(replaced(mopo_code, fewer | {"chunk=500, rollout_freq=500": "chunk=10, rollout_freq=10"}), scope)
    assert scope["state"].num_updates.tolist() == [20] and scope["fit"].step.tolist() == [4]
    assert np.isfinite(scope["metrics"]["train/q"]).all() and scope["metrics"]["model/ring"].tolist() == [2 * 256 * 5]
    assert scope["act"](np.zeros(3)).shape == (1,) and abs(scope["act"](np.ones(3))) < 1


def test_a_dict_of_arrays_is_as_good_as_a_buffer(dataset):
    """Of any number types, as Gymnasium gives them: the same data."""
    buffer = envs.buffers.load(dataset, quiet=True)
    plain = {key: np.array(buffer[key]) for key in (*cped.Transitions._fields, "episode_returns")}
    plain |= {"observations": plain["observations"].astype(float), "terminals": plain["terminals"].astype(bool)}
    for one, other in (
        (dac.dac_data(buffer, dac.Args())[0], dac.dac_data(plain, dac.Args())[0]),
        (cped.cped_data(buffer, cped.Args())[0].rows, cped.cped_data(plain, cped.Args())[0].rows),
    ):
        assert len(one.rewards) > 7_000
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), one, other)
    known = plain | {"action_log_probs": np.arange(len(buffer))}
    assert cped.cped_data(known, cped.Args())[0].log_probs.shape == (800,)
