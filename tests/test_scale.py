"""Seeds over devices, policies over processes, rows beyond the memory: the same numbers."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import envs
import runner
import wurl_sac as W
from envs.buffers import files, reading, scripted
from runner import devices

ROOT = Path(__file__).resolve().parents[1]


def start(code, *argv, **env):
    """A python process of its own that runs `code`."""
    command = [sys.executable, "-c", code, *map(str, argv)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **env}, **pipes)


def arrays_of(path):
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files if "json" not in key and key != "kind"}


def compare(folder, other, names, **tolerance):
    """The arrays of two folders' files; without a tolerance, bit for bit."""
    same = np.testing.assert_allclose if tolerance else np.testing.assert_array_equal
    for name in names:
        one, two = arrays_of(folder / name), arrays_of(other / name)
        assert one.keys() == two.keys()
        for key in one:
            same(two[key], one[key], err_msg=f"{name}: {key}", **tolerance)


# --- seeds over devices ---

WHOLE = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
sys.path[:0] = ["tests", "benchmark"]
import dac
from runner import devices
from test_dac import tiny
from envs.buffers import scripted
folder = sys.argv[1]
data = str(scripted.dataset(folder))
for num in (1, 4):
    dac.main(tiny(dataset=data, num_seeds=6, num_devices=num, num_updates=40, out=f"{folder}/{num}"))
args = tiny(num_seeds=6, num_devices=4)
keys = jax.random.split(jax.random.key(0), 6)
assert [len(devices.device_mesh(count, args)[0].devices) for count in (8, 6, 3)] == [4, 4, 3]
busy = lambda x: {shard.device.id for shard in x.addressable_shards}
spread = jax.jit(devices.over_devices(lambda x: x, args))
assert busy(spread(keys)) == set(range(4)) and len(busy(spread(keys[:4]))) == 4
"""


def test_seeds_shared_by_devices_make_the_same_run(tmp_path):
    """Six seeds of dac.py on 1 and 4 virtual devices, where they do not divide: same states, bit for bit."""
    process = start(WHOLE, tmp_path, XLA_FLAGS="--xla_backend_optimization_level=0")  # with the emitter that users have
    _, said = process.communicate(timeout=900)
    assert process.returncode == 0, said[-3000:]
    compare(tmp_path / "1", tmp_path / "4", ("state.npz", "policy.npz"))
    logs = [(tmp_path / num / "log.jsonl").read_text().splitlines()[1:] for num in "14"]
    for one, many in zip(*(map(json.loads, lines) for lines in logs), strict=True):
        assert one.keys() == many.keys() and (one["step"], one["seed"]) == (many["step"], many["seed"])
        for key in one.keys() - {"time/updates_per_s"}:
            np.testing.assert_allclose(one[key], many[key], rtol=1e-4, atol=1e-5, err_msg=key)


OTHERS = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
import numpy as np
sys.path[:0] = ["tests", "benchmark"]
import cped, mopo, qdq, runner, test_cped, test_mopo, test_qdq

def mopo_run(args):
    data, task = test_mopo.random_data(), test_mopo.AbstractTask()
    fit, chunk, model = mopo.make_fit(args)
    init, train = mopo.make_train(args, task)
    return lambda keys: train(init(keys), model(chunk(fit(keys, data), data), data), data)

def cped_run(args):
    init, flow, train = cped.make_train(args)
    data = test_cped.random_data()
    return lambda keys: train(flow(init(keys, data), data)[0], data)

def qdq_run(args):
    rows = np.random.default_rng(0).uniform(-1, 1, (50, 5)).astype(np.float32)
    entries = qdq.Entries(jax.numpy.asarray(rows), jax.numpy.asarray(rows[:, 0]), 0.0, 1.0)
    teacher, student, policy = qdq.make_train(args, 3, 2)
    ends = jax.numpy.zeros(3), jax.numpy.ones(3)

    def run(keys):
        first, _ = teacher.chunk(teacher.init(keys), entries)
        second, _ = student.chunk(student.init(keys, first.nets.net), first.nets.net, entries)
        return policy.chunk(policy.init(keys), qdq.QModel(second.nets.net, *ends), test_qdq.random_batch(40))

    return run

# jax 0.11's compiler crashes on an array without elements that is handed on as it came; others show what is compiled.
hand_on = runner.over_devices(lambda x, empty: (x, empty), test_mopo.tiny(num_seeds=2, num_devices=2))
inner, = jax.make_jaxpr(hand_on)(np.ones((2, 3)), np.ones((2, 0))).eqns
body = inner.params["jaxpr"]
assert body.outvars[0] is body.invars[0] and body.outvars[1] is not body.invars[1], body

# Every seed on the other device, or beside another: the same programs, which take half a minute to compile.
keys, order = jax.random.split(jax.random.key(0), 3), np.array([2, 0, 1])
for run, test in ((mopo_run, test_mopo), (cped_run, test_cped), (qdq_run, test_qdq)):
    train = run(test.tiny(num_seeds=3, num_devices=2))
    trained = train(keys)
    one, other = map(runner.flat_arrays, (jax.tree.map(lambda x: x[order], trained), train(keys[order])))
    assert one.keys() == other.keys()
    for name, x in one.items():
        np.testing.assert_allclose(x, other[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert len({shard.device for x in jax.tree.leaves(trained) for shard in x.addressable_shards}) == 2
    print(len(one), "arrays")
"""


def test_seeds_of_the_other_learners_on_two_devices():
    process = start(OTHERS)
    found, said = process.communicate(timeout=900)
    assert process.returncode == 0 and len(found.splitlines()) == 3, said[-3000:]


# --- policies over processes ---

TINY = dict(
    task="point", num_policies=6, num_envs=1, updates_per_step=0.1, num_updates=60, chunk=10, eval_every=20,
    warmup_steps=200, hidden_sizes=(16, 16), batch_size=32, replay_size=500, eval_episodes=50, reward_scale=1.0,
)  # fmt: skip
# A signal strikes one process at an update; the discriminators of an evaluation, slow to compile, are left out.
STRIKE = """
import os, sys
import jax
import runner
import wurl_sac as W
victim, step, number, *argv = sys.argv[1:]
runner.diversity.discriminator_success = lambda x, *rest: (x.mean(), x.max())
shown = runner.Run.progress

def strike(run, count, *rest):
    shown(run, count, *rest)
    global step
    if jax.process_index() == int(victim) and count >= int(step):
        step = 10**9  # once
        os.kill(os.getpid(), int(number))

runner.Run.progress = strike
sys.argv = ["wurl_sac.py", *argv]
runner.launch(W.main, W.Args, W.preset, W.PRESETS, W.__doc__)
"""


def flags(out):
    words = [word for k, v in TINY.items() for word in (f"--{k.replace('_', '-')}", *np.ravel(v).astype(str))]
    return [*words, "--out", out]


def start_processes(num, victim, step, number, out, *more):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = dict(JAX_COORDINATOR_ADDRESS=f"localhost:{port}", JAX_NUM_PROCESSES=str(num))
    argv = (victim, step, number, *flags(out), "--distributed", *more)
    return [start(STRIKE, *argv, JAX_PROCESS_ID=str(i), **place) for i in range(num)]


def ends_of(processes):
    """Exit codes and what each said; none may hang."""
    try:
        said = [process.communicate(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


def test_policies_shared_by_processes_through_a_kill_and_a_signal(tmp_path, monkeypatch):
    """Two processes, one of them killed; two go on and one gets SIGTERM; one ends it: the run of one process."""
    out = tmp_path / "shared"
    codes, said = ends_of(start_processes(2, 1, 30, 9, out))
    assert codes == [1, -9], said
    assert "another process ended" in said[0][1] and "--resume" in said[0][1]
    assert "evaluation at 20" in said[0][0] and "evaluation" not in said[1][0]
    codes, said = ends_of(start_processes(2, 1, 10, 15, out, "--resume"))  # before its first evaluation
    assert codes == [1] * 2, said
    with np.load(out / "state.npz", allow_pickle=False) as file:
        where = f"at update {int(file['num_updates'])}; go on with the same command and --resume"
    assert f"stopped by SIGTERM {where}" in said[1][1]
    assert f"stopped by a signal to another process {where}" in said[0][1]
    assert len(list((out / "rows").glob("*.rows"))) == 6

    monkeypatch.setattr(runner.diversity, "discriminator_success", lambda x, *rest: (x.mean(), x.max()))
    for folder, more in ((tmp_path / "alone", []), (out, ["--resume"])):
        W.main(runner.parse(W.Args, [*map(str, flags(folder)), *more], W.preset))
    names = ("state.npz", "policy.npz", *(f"buffers/policy_{k:02d}.npz" for k in range(6)))
    compare(tmp_path / "alone", out, names, atol=1e-4)
    assert not (out / "rows").exists()
    steps = [json.loads(x)["step"] for x in (out / "log.jsonl").read_text().splitlines()[1:]]
    assert steps == [20, 40, 60]


def test_several_processes_need_an_address():
    program = "import runpy; runpy.run_path('wurl_sac.py', run_name='__main__')"
    process = start(program, "--task", "point", "--distributed")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1 and "--distributed: " in said and "JAX_COORDINATOR_ADDRESS" in said, said


def test_each_process_needs_a_policy(monkeypatch):
    monkeypatch.setattr(W.jax, "process_count", lambda: 4)
    with pytest.raises(envs.InputError, match="--num-policies must be at least 4"):
        W.check_args(W.Args(**{**TINY, "num_policies": 3}), envs.task("point"), 100)
    owners = {}
    for index in range(4):
        monkeypatch.setattr(W.jax, "process_index", lambda index=index: index)
        owners |= dict.fromkeys(devices.own_policies(10), index)
    assert list(owners) == list(range(10)) and sorted(set(owners.values())) == [0, 1, 2, 3]


# --- rows beyond the memory ---


def test_a_learner_holds_no_more_rows_than_it_is_told(tmp_path):
    """Three million rows, of which 20,000 are asked for: the learner's own copies (36 MB of the whole) stay small."""
    command = [sys.executable, "benchmark/large_buffer.py", str(tmp_path), "--rows", "3000000", "--max-rows", "20000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = done.stdout
    few, whole = (float(found.split(f"peak {name} rows: ")[1].split()[0]) for name in ("few", "whole"))
    assert few + 8 < whole, (few, whole)  # MB
    assert "20,000 transitions, 200 episodes" in found and "2980000 rows dropped ('max_rows')" in found


def test_drawn_episodes_are_whole_and_of_every_shard(tmp_path):
    whole = envs.buffers.load(scripted.dataset(tmp_path), quiet=True)
    load = lambda rows, files="shard*": envs.buffers.load(str(tmp_path / f"{files}.npz"), max_rows=rows, quiet=True)
    for i in range(3):
        ids = {"policy_ids": np.full(len(whole), i, np.int32)}
        envs.buffers.save(tmp_path / f"shard{i}.npz", dict(whole.arrays) | ids, whole.metadata)
    few = load(1_250)
    assert len(few) == 1_200 and few.num_episodes == 12 and set(few["policy_ids"]) == {0, 1, 2}
    envs.buffers.validate(few.arrays, few.metadata, "few")
    np.testing.assert_array_equal(few["observations"], load(1_250)["observations"])
    assert len(load(len(whole), "shard0")) == len(whole)
    cut = load(20, "shard0")  # of an episode of 100
    envs.buffers.validate(cut.arrays, cut.metadata, "cut")
    assert (len(cut), list(np.flatnonzero(cut["timeouts"]))) == (20, [19]) and "which cuts" in cut.summary()


def test_rows_that_do_not_fit_are_refused_with_the_remedy(tmp_path, monkeypatch):
    path = scripted.dataset(tmp_path)
    for module in (files, reading):
        monkeypatch.setattr(module, "available_memory", lambda: 200_000.0)
    with pytest.raises(envs.InputError, match=r"needs 0.0 GB of memory.*--max-rows \d+"):
        envs.buffers.load_task(path, None)
    few, _ = envs.buffers.load_task(path, None, max_rows=1_000)
    assert len(few) == 1_000
