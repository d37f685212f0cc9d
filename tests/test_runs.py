"""The contract of all learners, on runs of seconds: files, resumption, seeds, policies, refusals, presets.

runner's own promises are in test_runner.py; here every learner goes through its own phases.
"""

import dataclasses
import functools
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
import envs.buffers
import runner
from envs.buffers import scripted
from runner import checkpoint, log, policies

ROOT = Path(__file__).resolve().parents[1]
LEARNERS = ("mopo", "cped", "qdq", "dac")
PHASES = {  # label of the progress line -> the folder of its states
    "mopo": {"model step": "model", "update": "."},
    "cped": {"flow iteration": "flow", "update": "."},
    "qdq": {"teacher step": "teacher", "student step": "student", "update": "."},
    "dac": {"update": "."},
}


def module(name):
    return importlib.import_module(name)


def tiny(name, **changes):
    """A run of seconds through all phases: the `TINY` of the script's own tests."""
    defaults = {"critic_norm": True, "standardise_observations": True} if name == "mopo" else {}  # not in its TINY
    return module(name).Args(**{**module(f"tests.test_{name}").TINY, **defaults, **changes})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return str(scripted.dataset(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """name -> args, result of an uninterrupted run of two seeds that see column 2 as an angle, made once."""

    @functools.cache
    def run(name):
        args = tiny(name, dataset=dataset, num_seeds=2, angles="2", out=str(tmp_path_factory.mktemp(name) / "run"))
        return args, module(name).main(args)

    return run


def states_of(folder):
    """Every array of the newest states and of policy.npz: {file: {key: array}}."""
    files = [folder / "policy.npz", *folder.rglob("state.npz")]
    about = lambda path: "metadata_json" if path.name == "policy.npz" else "meta_json"
    return {str(path.relative_to(folder)): checkpoint.read_npz(path, about(path))[0] for path in files}


def records_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines[1:]]


def assert_same_run(one, other):
    wanted, found = states_of(one), states_of(other)
    assert wanted.keys() == found.keys()
    for file, arrays in wanted.items():
        assert arrays.keys() == found[file].keys()
        for key, array in arrays.items():
            np.testing.assert_array_equal(found[file][key], array, err_msg=f"{file}: {key}")
    assert records_of(one) == records_of(other)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_run_leaves_its_files(name, whole):
    """Policy, states of every phase, log and figures; all metrics finite; the score is that of the log."""
    args, result = whole(name)
    folder = Path(args.out)
    assert {"args.json", "log.jsonl", "policy.npz", "learning_curve.png"} <= {path.name for path in folder.iterdir()}
    assert all((folder / place / "state.npz").exists() for place in PHASES[name].values())
    assert all(path.stat().st_size > 5_000 for path in folder.glob("*.png")) and len(list(folder.glob("*.png"))) >= 2
    records = records_of(folder)
    assert all(np.isfinite(v).all() for r in records for k, v in r.items() if k != "seed")
    evaluations = [r for r in records if "eval/return" in r]
    steps = [step for step in range(1, args.num_updates + 1) if step % args.eval_every == 0 or step == args.num_updates]
    assert [(r["step"], r["seed"]) for r in evaluations] == [(step, seed) for step in steps for seed in (0, 1)]
    assert {"train/q", "eval/return_data_length", "eval/return_std", "eval/score"} <= evaluations[0].keys()
    last = [[r["eval/return"] for r in evaluations if r["seed"] == seed][-5:] for seed in (0, 1)]
    np.testing.assert_allclose(result["score"], np.mean(last), rtol=1e-4)
    digests = envs.buffers.digests(envs.buffers.load(args.dataset, quiet=True), checkpoint.DIGESTED)
    digest = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]  # the same whichever learner read the file
    first = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    assert first["data"] == {"rows": 8_000, "sha256": digest}
    about = json.loads(str(np.load(folder / "policy.npz")["metadata_json"]))
    assert about["task"] == "point-angle-0" and about["versions"]["jax"] == jax.__version__
    sight = [np.load(folder / "policy.npz")[f"observation_{key}"] for key in ("mean", "std", "angles")]
    assert [x.shape for x in sight] == [(2, 5), (2, 5), (2, 1)] and (sight[2] == 2).all()


@pytest.mark.parametrize("name", LEARNERS)
def test_a_run_stopped_in_every_phase_equals_the_whole_one(name, whole, tmp_path, monkeypatch):
    """SIGTERM in the middle of each phase, then --resume: states, policy and log are equal, number by number.

    The same folder is refused to other flags.
    """
    args, result = whole(name)
    other, show, left = dataclasses.replace(args, out=str(tmp_path / "run")), log.Progress.show, list(PHASES[name])

    def strike(self, step, *rest, **more):
        show(self, step, *rest, **more)
        if left and self.label == left[0]:
            left.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(log.Progress, "show", strike)
    for label in PHASES[name]:
        with pytest.raises(SystemExit, match=f"stopped by SIGTERM at {label} .*--resume"):
            module(name).main(other)
        other = dataclasses.replace(other, resume=True)
        with pytest.raises(envs.InputError, match=r"gamma was 0\.99 and is now 0\.9; resume with the old one"):
            module(name).main(dataclasses.replace(other, gamma=0.9))
    assert module(name).main(other) == result
    assert_same_run(Path(args.out), tmp_path / "run")


WHY = {
    "cped": "--alpha-from stretches", "dac": "--lr-cosine stretches", "mopo": "--actor-cosine stretches",
    "qdq": "what this script does",
}  # fmt: skip


@pytest.mark.parametrize("name", WHY)
def test_a_schedule_over_the_run_forbids_more_updates(name, whole):
    args, _ = whole(name)
    with pytest.raises(envs.InputError, match=f"cannot become one of {2 * args.num_updates}: {WHY[name]}"):
        module(name).main(dataclasses.replace(args, resume=True, num_updates=2 * args.num_updates))


CONSTANT = {
    "cped": dict(alphas=(0.1,), alpha_from=(0.0,)), "dac": dict(lr_cosine=False), "mopo": dict(actor_cosine=False),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTANT)
def test_a_finished_run_that_is_made_longer_equals_a_long_one(name, dataset, tmp_path):
    args = tiny(name, dataset=dataset, out=str(tmp_path / "long"), **CONSTANT[name])
    half = dataclasses.replace(args, out=str(tmp_path / "grown"), num_updates=args.eval_every)
    assert half.num_updates < args.num_updates
    module(name).main(half)
    result = module(name).main(dataclasses.replace(args, out=half.out, resume=True))
    assert module(name).main(args) == result
    assert_same_run(tmp_path / "long", tmp_path / "grown")


@pytest.mark.parametrize("name", LEARNERS)
def test_a_seed_alone_is_the_seed_among_others(name, whole, tmp_path):
    args, _ = whole(name)
    module(name).main(dataclasses.replace(args, seed=1, num_seeds=1, out=str(tmp_path / "run")))
    among = [r for r in records_of(Path(args.out)) if r["seed"] == 1]
    for wanted, found in zip(among, records_of(tmp_path / "run"), strict=True):
        assert wanted.keys() - {"h/overlap"} == found.keys()  # which compares seeds
        for key in found:  # another program, whose sums may differ in the last digits
            np.testing.assert_allclose(found[key], wanted[key], rtol=2e-3, atol=2e-3, err_msg=key)


@pytest.mark.parametrize("name", [name for name in LEARNERS if name != "dac"])  # dac samples: tests/test_dac.py
def test_the_policy_file_is_the_policy_that_was_evaluated(name, whole):
    """Played from the evaluation's starts by runner.policies, it earns what the log says of the last evaluation."""
    args, _ = whole(name)
    env, keys = envs.make("point-angle-0"), runner.evaluation_keys(args)
    for seed in (0, 1):
        policy = policies.load(Path(args.out) / "policy.npz", seed)
        key = jax.random.split(keys[seed])[0] if name == "mopo" else keys[seed]  # mopo's other half measures its model
        state = jax.vmap(env.reset)(jax.random.split(key, args.eval_episodes))
        step, total = jax.jit(jax.vmap(env.step)), 0.0
        for _ in range(env.episode_length):
            state = step(state, jnp.asarray(policy(np.asarray(state.obs)), jnp.float32))
            total = total + state.reward
        logged = [r["eval/return"] for r in records_of(Path(args.out)) if r["seed"] == seed and "eval/return" in r]
        np.testing.assert_allclose(np.mean(total), logged[-1], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("name", LEARNERS)
def test_every_preset_runs(name, dataset):
    """--quick, the budget and every published set give flags that pass all checks of their types."""
    script = module(name)
    for words in (["--quick"], ["--dataset", dataset], ["--dataset", dataset, "--preset", "cpu"]):
        args = runner.parse(script.Args, words, script.preset)
        runner.check_run(args)
    assert args.num_updates in (10_000, 12_000, 20_000)
    assert len(script.PUBLISHED) >= 15
    for published in script.PUBLISHED:
        args = runner.parse(script.Args, ["--dataset", dataset, "--preset", published], script.preset)
        runner.check_run(args)
        assert {k: getattr(args, k) for k in script.PUBLISHED[published]} == script.PUBLISHED[published]
        assert args.angles == "none"
    assert script.Args().angles == "task"  # ours: sine and cosine of the task's own angles


def command_line(args):
    """The flags that say all of `args` but what is empty."""
    for flag, value in ((f"--{name.replace('_', '-')}", value) for name, value in dataclasses.asdict(args).items()):
        if isinstance(value, bool):
            yield flag if value else f"--no-{flag[2:]}"
        elif value not in ("", None, ()):
            yield from (flag, *np.ravel(value).astype(str))


@pytest.mark.parametrize("name", ["wurl_sac", "udg_select", *LEARNERS])
def test_a_script_copied_out_runs(name, tmp_path):
    """--quick in an empty folder, with the package installed and the repository not on the path."""
    shutil.copy(ROOT / f"{name}.py", tmp_path / "mine.py")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    flags = ["--w1-points", "50"]
    if name != "udg_select":  # a learner's programs are those of `whole`, which are compiled already
        flags = command_line(tiny(name, **{"num_seeds": 2} if name in LEARNERS else {}))
    command = [sys.executable, "mine.py", *flags, "--quick", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    made = {path.suffix for path in (tmp_path / "out").rglob("*")}
    assert {".npz", ".png"} <= made, made
