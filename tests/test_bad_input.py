"""Bad input: every broken file and command line gets one clear error, soon, and nothing is written over."""

import contextlib
import hashlib
import importlib
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import hypothesis
import numpy as np
import pytest
import tyro
from hypothesis import strategies as st

import runner
from envs import InputError, buffers
from envs.buffers import convert
from envs.buffers.__main__ import describe
from envs.buffers.__main__ import main as command_line
from envs.buffers.convert.common import EXTRA

ROOT = Path(__file__).parents[1]
LEARNERS = ("mopo", "cped", "qdq", "dac")
DEFLATED = zipfile.ZIP_DEFLATED


# --- good files, and how to break them -----------------------------------------------------------


def make_arrays(lengths=(20, 13, 7), seed=0, state=4, action=2):
    """Random episodes of the sizes of the point world; the second one terminates."""
    rng, rows = np.random.default_rng(seed), sum(lengths)
    states = [rng.normal(size=(n + 1, state)).astype(np.float32) for n in lengths]
    ends = np.isin(np.arange(rows), np.cumsum(lengths) - 1)
    terminals = ends & (np.arange(rows) == sum(lengths[:2]) - 1) & (len(lengths) > 1)
    return {
        "observations": np.concatenate([s[:-1] for s in states]),
        "actions": rng.uniform(-1, 1, (rows, action)).astype(np.float32),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "next_observations": np.concatenate([s[1:] for s in states]),
        "terminals": terminals,
        "timeouts": ends & ~terminals,
        "root_positions": rng.normal(size=(rows, 2)).astype(np.float32),
        "root_velocities": rng.normal(size=(rows, 2)).astype(np.float32),
    }


LABELLED = {
    "dataset_name": "toy", "env": "point", "task": "point-angle-0", "layout": "task", "reward_kind": "task",
    "dt": 0.1, "episode_length": 20, "warmup_transitions": 0,
}  # fmt: skip
RAW = {**LABELLED, "task": "point", "layout": "env", "reward_kind": "none"}


def rewrite(path, drop=(), compressed=False, **changes):
    """Write a file again with plain numpy and other members: what a stranger might do."""
    with np.load(path, allow_pickle=False) as data:
        members = {key: data[key] for key in data.files if key not in drop}
    (np.savez_compressed if compressed else np.savez)(path, **{**members, **changes})


def rewrite_metadata(path, **changes):
    with np.load(path, allow_pickle=False) as data:
        metadata = json.loads(str(data["metadata_json"]))
    rewrite(path, metadata_json=np.array(json.dumps({**metadata, **changes})))


def change(key, function):
    """-> what breaks one column of a file."""

    def apply(path):
        with np.load(path, allow_pickle=False) as data:
            value = function({name: data[name].copy() for name in data.files})
        rewrite(path, **{key: value})

    return apply


def put(key, row, value):
    def function(arrays):
        arrays[key][row] = value
        return arrays[key]

    return change(key, function)


def add_member(path, name, data, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "a", method) as archive:
        archive.writestr(name, data)


def add_npy(path, name, shape, data=b"", method=zipfile.ZIP_STORED, version=1):
    handle = io.BytesIO()
    write = np.lib.format.write_array_header_1_0 if version == 1 else np.lib.format.write_array_header_2_0
    write(handle, {"descr": "<f4", "fortran_order": False, "shape": shape})
    add_member(path, name, handle.getvalue() + data, method)


def lie_about_size(path):
    """A deflated member whose directory entry claims fewer bytes than it unpacks to."""
    add_npy(path, "extra.npy", (10_000,), bytes(40_000), DEFLATED)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        size = archive.getinfo("extra.npy").file_size
    path.write_bytes(data.replace(size.to_bytes(4, "little"), (size - 4_000).to_bytes(4, "little")))


class Evil:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


def pickled(path):
    members = dict(np.load(path))
    np.savez(path, **{**members, "rewards": np.array([Evil()] * len(members["rewards"]), dtype=object)})


def cut(tenth):
    def apply(path):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * tenth // 10])

    return apply


def emptied(path):
    with np.load(path, allow_pickle=False) as data:
        members = {k: data[k][:0] if data[k].ndim else data[k] for k in data.files}
    np.savez(path, **members)


def json_text(text):
    return lambda path: rewrite(path, metadata_json=np.array(text))


def metadata(**changes):
    return lambda path: rewrite_metadata(path, **changes)


def hdf5(path):
    with h5py.File(path, "w") as file:
        file["observations"] = np.zeros((3, 4), np.float32)


def fifo(path):
    path.unlink()
    os.mkfifo(path)


LONG_HEADER = b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + bytes(99)
CORPUS = {  # name -> what breaks a file, words of the error beside the file's name
    "no observations": (lambda path: rewrite(path, drop=("observations",)), ["observations", "missing"]),
    "no timeouts": (lambda path: rewrite(path, drop=("timeouts",)), ["timeouts", "missing"]),
    "no metadata": (lambda path: rewrite(path, drop=("metadata_json",)), ["metadata_json", "missing"]),
    "no episode_ends": (lambda path: rewrite(path, drop=("episode_ends",)), ["episode_ends", "missing"]),
    "wrong rank": (change("rewards", lambda a: a["rewards"][:, None]), ["rewards", "(40, 1)"]),
    "images": (change("observations", lambda a: a["observations"][:, :, None]), ["observations", "(40, 4, 1)"]),
    "float64": (change("actions", lambda a: a["actions"].astype(float)), ["actions", "astype(np.float32)"]),
    "float flags": (change("terminals", lambda a: a["terminals"].astype(np.float32)), ["terminals", "bool"]),
    "complex": (change("rewards", lambda a: a["rewards"].astype(np.complex64)), ["rewards", "complex64"]),
    "object array": (pickled, ["rewards", "pickled"]),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"observations": [Evil()]})), ["archive"]),
    "nan": (put("observations", 3, np.nan), ["observations", "row 3"]),
    "inf": (put("actions", 5, np.inf), ["actions", "row 5"]),
    "-inf": (put("rewards", 7, -np.inf), ["rewards", "row 7"]),
    "action range": (put("actions", 9, 1.5), ["actions", "row 9", "beyond 1"]),
    "both flags": (put("timeouts", 32, True), ["timeouts", "row 32", "both"]),
    "open end": (put("timeouts", -1, False), ["timeouts", "last row"]),
    "lengths": (change("actions", lambda a: a["actions"][:-1]), ["actions", "39"]),
    "ends": (put("episode_ends", 0, 19), ["episode_ends"]),
    "returns": (put("episode_returns", 1, 1e6), ["episode_returns", "episode 1"]),
    "shuffled": (change("observations", lambda a: a["observations"][::-1]), ["next_observations", "next row"]),
    "empty": (emptied, ["empty"]),
    **{f"cut at {tenth}0 %": (cut(tenth), ["archive"]) for tenth in range(10)},
    "no json": (json_text("{'env': 1}"), ["metadata_json", "JSON"]),
    "json list": (json_text("[1]"), ["metadata_json", "list"]),
    "json depth": (json_text("[" * 100_000), ["metadata_json"]),
    "json digits": (json_text("1" * 100_000), ["metadata_json"]),
    "json not text": (lambda path: rewrite(path, metadata_json=np.zeros(3)), ["metadata_json", "string"]),
    "schema": (metadata(schema="minari"), ["schema", "minari"]),
    "schema version": (metadata(schema_version=2), ["schema_version", "2"]),
    "terminal codes": (metadata(dataset_name="\x1b[2J\n"), ["dataset_name"]),
    "surrogate": (metadata(env="\ud800"), ["env"]),
    "world": (metadata(env="nowhere", task="nowhere"), ["nowhere"]),
    "endless": (metadata(dt=1e999), ["metadata_json"]),
    "options": (metadata(task_options={"ctrl_cost": "much"}), ["task_options", "ctrl_cost"]),
    "huge option": (metadata(task_options={"ctrl_cost": 10**400}), ["task_options", "ctrl_cost"]),
    "huge dt": (metadata(dt=10**400), ["dt"]),
    "counts": (metadata(num_transitions=41), ["num_transitions", "41"]),
    "path": (lambda path: add_member(path, "../evil.npy", b""), ["plain array name"]),
    "root": (lambda path: add_member(path, "/etc/evil.npy", b""), ["plain array name"]),
    "newline": (lambda path: add_member(path, "a\nb.npy", b""), ["plain array name"]),
    "twice": (lambda path: add_member(path, "rewards.npy", b""), ["rewards", "twice"]),
    "claims": (lambda path: add_npy(path, "extra.npy", (10**12, 10**6)), ["extra", "announces"]),
    "long header": (lambda path: add_member(path, "x.npy", LONG_HEADER), ["archive"]),
    "bomb": (lambda path: add_npy(path, "extra.npy", (17_000_000,), bytes(68_000_000), DEFLATED), ["unpack"]),
    "false size": (lie_about_size, ["extra"]),
    "text": (lambda path: path.write_text("<!doctype html><title>404</title>"), ["archive"]),
    "hdf5": (hdf5, ["archive"]),
    "nothing": (lambda path: path.unlink(), ["does not exist"]),
    "pipe": (fifo, ["not a file"]),
}  # fmt: skip


def listing(folder):
    """{name: digest} of all files below a folder."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


# --- the readers ---------------------------------------------------------------------------------


def run(script, *flags):
    """What a script does with a command line, in this process."""
    module, flags = importlib.import_module(script), [str(flag) for flag in flags]
    if script == "udg_select":
        return module.main(tyro.cli(module.Args, args=flags))
    return module.main(runner.parse(module.Args, flags, module.preset))


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch):
    """What should be refused and is not ends here, and not after a training run."""

    def accepted(*_):
        raise AssertionError("accepted")

    monkeypatch.setattr(runner.Run, "chunks", accepted)


def tool(*words):
    """`python -m envs.buffers`, in this process: raises what it prints."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command_line([str(word) for word in words])
    if code:
        assert code == 2 and err.getvalue().startswith("error: ")
        raise InputError(err.getvalue().removeprefix("error: ").strip())
    return out.getvalue()


def message_of(function, *args):
    """The one line with which a function refuses."""
    with pytest.raises(InputError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable() and len(message) < 1200, message
    return message


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", CORPUS)
def test_broken_files(tmp_path, monkeypatch, case):
    """One error with file, key and remedy from the inspector, a learner and the selection; nothing is changed."""
    spoil, words = CORPUS[case]
    monkeypatch.chdir(tmp_path)
    files = {}
    for name, labels in {"labelled": LABELLED, "raw": RAW}.items():
        files[name] = buffers.save(tmp_path / "data" / f"{name}.npz", make_arrays(), labels)
        spoil(files[name])
    learner = LEARNERS[list(CORPUS).index(case) % len(LEARNERS)]
    before, out = listing(tmp_path), tmp_path / "out"
    found = {"labelled": message_of(run, learner, "--dataset", files["labelled"], "--out", out)}
    if case not in ("-inf", "world"):  # the selection makes rewards anew, and names the folder's world
        select = ("--buffers", files["raw"], "--task", "point-angle-0", "--out", out)
        found["raw"] = message_of(run, "udg_select", *select)
    if case != "world":  # a name means nothing to a reader of numbers
        found["inspected"] = message_of(tool, "inspect", files["labelled"])
    for name, message in found.items():
        file = files.get(name, files["labelled"])
        for word in (str(file), *words):
            assert word in message, f"{name}: {message}"
        assert "Remedy:" in message, message
    assert listing(tmp_path) == before


def test_texts_of_a_file_do_not_reach_the_terminal_as_they_are(tmp_path):
    """Names of parents and reasons for dropped rows may be anything; what is printed stays printable."""
    path = buffers.save(tmp_path / "toy.npz", make_arrays(), LABELLED)
    rewrite_metadata(path, parents=[{"path": "\x1b[2J\n"}, {"path": "\ud800"}], rows_dropped={"\x1b[2J": "\n"})
    assert str(path) in message_of(lambda: buffers.load(path, task="point-angle-60"))
    assert buffers.load(path, quiet=True).summary().isprintable()


@pytest.mark.parametrize("script", LEARNERS)
def test_data_that_cannot_be_learnt_from(tmp_path, script):
    """Reward-free, all zero, one row, one episode of it, another task's: refused before anything is written."""
    path, out = tmp_path / "toy.npz", tmp_path / "out"

    def refused(lengths, *flags, zero=False, **labels):
        arrays = make_arrays(lengths)
        if zero:
            arrays["rewards"][:] = 0.0
        buffers.save(path, arrays, {**LABELLED, **labels})
        message = message_of(run, script, "--dataset", path, "--out", out, *flags)
        assert not listing(out)
        return message

    free = refused((30, 10), zero=True, reward_kind="none")
    assert "reward-free" in free and f"udg_select.py --buffers {path}" in free
    zero = refused((30, 10), zero=True, reward_kind="relabelled")
    assert "zero in every row" in zero and "udg_select.py" in zero
    for lengths in ((1,), (5,)):
        assert "--dataset" in refused(lengths) or "rows" in refused(lengths)
    other = refused((30, 10), "--task", "point-angle-60")
    assert "point-angle-60" in other and "udg_select.py" in other
    assert "observes" in refused((30, 10), layout="env")
    assert "names no task" in refused((30, 10), task=None)


# --- command lines -------------------------------------------------------------------------------

POINT, SELECT, LEARN = "--task point", "--task point-angle-0 --buffers {data}", "--dataset {labelled}"
FLAGS = {  # script -> command line: a word of the error
    "wurl_sac": {
        "--task moon": "moon", f"{POINT} --preset x": "x", f"{POINT} --num-policies 0": "num-policies",
        f"{POINT} --chunk 0": "chunk", f"{POINT} --num-updates -5": "num-updates",
        f"{POINT} --num-policies 1": "neighbour", f"{POINT} --task-weight 1": "reward",
        f"{POINT} --replay-size 10": "replay-size", f"{POINT} --replay-size 2000000000": "GB memory",
        f"{POINT} --lr-decay 2": "lr-decay",
        f"{POINT} --div-features 9": "div-features", f"{POINT} --eval-episodes 1": "eval-episodes",
        f"{POINT} --warmup-steps 0": "warmup", f"{POINT} --num-envs -1": "num-envs",
    },
    "udg_select": {
        "": "--task", "--task point-angle-0": "--buffers", "--task moon --buffers {data}": "moon",
        "--task ant-angle-0 --buffers {data}": "ant", "--task point --buffers {data}": "reward",
        f"{SELECT} --top 7": "--top", f"{SELECT} --top best": "--top", f"{SELECT} --size 999999": "--size",
        f"{SELECT} --size -1": "--size", f"{SELECT} --task-options gear": "gear",
        f"{SELECT} none-*.npz": "matches no file",
        f"{SELECT} --reference {{chosen}}": "layout", "--task point-angle-0 --buffers {empty}": "no buffers",
    },
    "mopo": {
        "": "--dataset", "--quick --preset cpu": "--quick", "--dataset {raw}": "reward-free",
        "--dataset {empty}": "is a folder", f"{LEARN} --horizon 0": "horizon", f"{LEARN} --task moon": "moon",
        f"{LEARN} --num-elites 9": "num-elites", f"{LEARN} --chunk 7": "--chunk", f"{LEARN} --preset x": "x",
        f"{LEARN} --batch-size 0": "batch",
    },
    "cped": {
        "": "--dataset", "--dataset {raw}": "reward-free", f"{LEARN} --alphas -1": "alphas",
        f"{LEARN} --chunk 7": "--chunk", f"{LEARN} --preset x": "x", f"{LEARN} --batch-size 0": "batch",
    },
    "qdq": {
        "": "--dataset", "--dataset {raw}": "reward-free", f"{LEARN} --beta 2": "beta",
        f"{LEARN} --chunk 7": "--chunk", f"{LEARN} --preset x": "x", f"{LEARN} --batch-size 0": "batch",
    },
    "dac": {
        "": "--dataset", "--dataset {raw}": "reward-free", f"{LEARN} --eta -1": "eta",
        f"{LEARN} --chunk 7": "--chunk", f"{LEARN} --preset x": "x", f"{LEARN} --batch-size 0": "batch",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Good files and an empty folder -> {name in a command line: path}."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "empty").mkdir()
    raw = buffers.save(folder / "data" / "raw.npz", make_arrays(), RAW)
    labelled = buffers.save(folder / "labelled.npz", make_arrays((30, 25, 45)), LABELLED)
    chosen = buffers.save(folder / "chosen.npz", make_arrays(), {**LABELLED, "reward_kind": "relabelled"})
    files = {"data": folder / "data", "raw": raw, "labelled": labelled, "chosen": chosen, "empty": folder / "empty"}
    return {f"{{{name}}}": path for name, path in files.items()}


@pytest.mark.parametrize("script", FLAGS)
def test_broken_command_lines(tmp_path, data, script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, out = listing(data["{data}"].parent), tmp_path / "out"
    for flags, word in FLAGS[script].items():
        words = [data.get(flag, flag) for flag in flags.split()]
        message = message_of(run, script, *words, "--out", out)
        assert word in message, message
        assert not listing(tmp_path), (flags, listing(tmp_path))
    assert listing(data["{data}"].parent) == before


NUMBERS = {
    "--seed -1": "--seed", "--seed 3000000000": "--seed", f"--seed {10**20}": "--seed", "--gamma nan": "--gamma",
    "--tau 2": "--tau", "--hidden-sizes 0": "--hidden-sizes", "--hidden-sizes": "--hidden-sizes",
    "--batch-size 1000000000000": "--batch-size",
}  # fmt: skip


@pytest.mark.parametrize("script", ["wurl_sac", *LEARNERS])
def test_numbers_that_no_flag_can_mean(tmp_path, script):
    for flags, word in NUMBERS.items():
        assert word in message_of(run, script, "--quick", *flags.split(), "--out", tmp_path / "out")
    assert not listing(tmp_path)


@pytest.mark.parametrize("script", FLAGS)
def test_flags_that_do_not_exist_or_are_no_numbers(tmp_path, script, capsys, monkeypatch):
    """The parser's own errors: code 2, the flag named."""
    monkeypatch.chdir(tmp_path)
    for flags in (("--sede", "1"), ("--seed", "one"), ("--seed",), ("surplus",)):
        with pytest.raises(SystemExit) as caught:
            run(script, *flags)
        error = capsys.readouterr().err
        assert caught.value.code == 2 and flags[0] in error and "Traceback" not in error
    assert not listing(tmp_path)


@pytest.mark.parametrize("script", FLAGS)
def test_a_run_is_not_written_over(tmp_path, data, script):
    """A folder that holds a run, a file in the folder's place: refused, and as before."""
    start = {"wurl_sac": ["--task", "point"], "udg_select": ["--task", "point-angle-0", "--buffers", data["{data}"]]}
    start = start.get(script, ["--dataset", data["{labelled}"]])
    start += ["--min-entries", "0"] if script == "qdq" else []
    run_folder = tmp_path / ("point-angle-0" if script == "udg_select" else "")
    run_folder.mkdir(exist_ok=True)
    names = ("top1.npz", "scores.json") if script == "udg_select" else ("state.npz", "policy.npz")
    for name in names:
        path = run_folder / name
        path.write_bytes(b"mine")
        before = listing(tmp_path)
        assert "--out" in message_of(run, script, *start, "--out", tmp_path)
        assert listing(tmp_path) == before
        path.unlink()
    (tmp_path / "file").write_text("mine")
    with pytest.raises((InputError, OSError)) as caught:  # __main__ makes one line of both
        run(script, *start, "--out", tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value) and (tmp_path / "file").read_text() == "mine"


PROGRAMS = {
    "wurl_sac": (["wurl_sac.py", "--task", "moon"], "moon"),
    "udg_select": (["udg_select.py", "--buffers", "none.npz", "--task", "point-angle-0"], "none.npz"),
    "mopo": (["mopo.py", "--dataset", "{broken}"], "{broken}"),
    "dac": (["dac.py", "--sede", "1"], "--sede"),
    "inspect": (["-m", "envs.buffers", "inspect", "{broken}"], "{broken}"),
    "convert": (["-m", "envs.buffers", "from-ogbench", "{broken}"], "{broken}"),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_as_programs(tmp_path, program):
    """Exit code and no traceback, in a process of its own."""
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK\x03\x04")
    words, told = PROGRAMS[program]
    words = [str(broken) if word == "{broken}" else word for word in words]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode not in (0, None) and done.returncode > 0
    assert "Traceback" not in done.stderr and told.replace("{broken}", str(broken)) in done.stderr
    assert listing(tmp_path).keys() == {"broken.npz"}


COMMANDS = [
    ((), "command"), (("inspect",), "file"), (("explode", "x"), "explode"), (("from-d4rl", "x", "--dt", "slow"), "dt"),
]  # fmt: skip


@pytest.mark.parametrize("words, told", COMMANDS)
def test_broken_commands_of_the_tool(words, told, capsys):
    with pytest.raises(SystemExit) as caught:
        command_line(list(words))
    assert caught.value.code == 2 and told in capsys.readouterr().err


# --- fuzzing -------------------------------------------------------------------------------------

FLIPS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=12)
FUZZ = hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,  # the same examples in every run
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
DTYPES = ("<f4", "<f8", ">f4", "<f2", "?", "<i4", "<i8", "u1", "<c8", "<U3", "S2", "<M8[s]")
VALUES = (0.0, -1.0, 1.0001, np.nan, np.inf, 3e38, 1e-42, 7.0)
KEYS = (*buffers.COLUMNS, *buffers.EPISODE_KEYS, "extra")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["point", "ant"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)
LABELS = (*buffers.METADATA_TYPES, "schema", "schema_version", "rows_dropped", "reference", "seed", "notes", "carried")


def changes():
    """Strategy of what is done to the columns of a file: lists of (key, what, how)."""
    kinds = {
        "drop": st.none(), "cast": st.sampled_from(DTYPES), "rows": st.integers(-3, 3),
        "reshape": st.sampled_from([(-1,), (-1, 1), (1, -1), (-1, 2, 1)]), "order": st.just("F"),
        "value": st.tuples(st.integers(0, 11), st.sampled_from(VALUES)),
    }  # fmt: skip
    one = st.sampled_from(sorted(kinds)).flatmap(lambda kind: st.tuples(st.just(kind), kinds[kind]))
    return st.lists(st.tuples(st.sampled_from(KEYS), one), max_size=3)


def changed(arrays, done):
    """Arrays after `changes`; what numpy cannot do is left out."""
    arrays = {key: np.array(value) for key, value in arrays.items()}
    for key, (what, how) in done:
        array = arrays.get(key, np.zeros(12, np.float32))
        with contextlib.suppress(ValueError, TypeError, IndexError, OverflowError), np.errstate(all="ignore"):
            if what == "drop":
                arrays.pop(key, None)
                continue
            if what == "cast":
                array = array.astype(how)
            elif what == "rows":
                array = array[:how] if how < 1 else np.concatenate([array, array[:how]])
            elif what == "reshape":
                array = array.reshape(how)
            elif what == "order":
                array = np.asfortranarray(array)
            else:
                array.reshape(-1)[how[0]] = how[1]
            arrays[key] = array
    return arrays


def holds_the_contract(buffer):
    """What every reader may rely on, said again without the checks of the reader."""
    arrays, about, rows = buffer.arrays, buffer.metadata, len(buffer)
    assert set(buffers.REQUIRED) <= set(arrays) and rows > 0
    for key, array in arrays.items():
        assert len(array) == (buffer.num_episodes if key in buffers.EPISODE_KEYS else rows), key
        assert array.dtype.kind != "f" or np.isfinite(array).all(), key
        if key in buffers.COLUMNS:
            assert array.dtype == buffers.COLUMNS[key][0] and array.ndim == 1 + len(buffers.COLUMNS[key][1]), key
    assert arrays["observations"].shape == arrays["next_observations"].shape
    assert np.abs(arrays["actions"]).max() <= 1.001
    ends = arrays["terminals"] | arrays["timeouts"]
    assert ends[-1] and not (arrays["terminals"] & arrays["timeouts"]).any()
    assert (np.flatnonzero(ends) + 1 == arrays["episode_ends"]).all() and arrays["episode_lengths"].sum() == rows
    assert (about["num_transitions"], about["num_episodes"]) == (rows, buffer.num_episodes)
    assert np.isfinite(about["dt"]) and about["dt"] > 0 and about["episode_length"] > 0


def reads_or_refuses(path):
    """The invariant of a file: it follows the contract, or one printable line says why not -> whether it was read."""
    try:
        buffer = buffers.load(path, quiet=True)
    except InputError as error:
        assert "\n" not in str(error) and "Remedy:" in str(error) and str(path) in str(error)
        str(error).encode()
        return False
    holds_the_contract(buffer)
    (buffer.summary() + describe(buffer)).encode()
    with contextlib.suppress(InputError):
        buffers.load_task(path, None)
    return True


SMALL = make_arrays((5, 4, 3))


@FUZZ
@hypothesis.given(done=changes())
def test_any_columns(tmp_path, done):
    path = buffers.save(tmp_path / "any.npz", SMALL, LABELLED)
    with np.load(path, allow_pickle=False) as data:
        members = changed({key: data[key] for key in data.files if key != "metadata_json"}, done)
        np.savez(path, metadata_json=data["metadata_json"], **members)
    read = reads_or_refuses(path)
    assert read or done


@FUZZ
@hypothesis.given(done=changes())
def test_the_writer_takes_what_the_reader_reads(tmp_path, done):
    """`save` refuses, and leaves the old file, or writes what `load` takes back unchanged."""
    path = buffers.save(tmp_path / "any.npz", SMALL, LABELLED)
    before, arrays = path.read_bytes(), changed(SMALL, done)
    try:
        buffers.save(path, arrays, LABELLED)
    except InputError:
        assert path.read_bytes() == before
    else:
        found = buffers.load(path, quiet=True, verify=True)
        holds_the_contract(found)
        for key in arrays.keys() - buffers.EPISODE_KEYS.keys():
            np.testing.assert_array_equal(found[key], arrays[key])
    assert [p.name for p in tmp_path.iterdir()] == ["any.npz"]


@FUZZ
@hypothesis.given(
    labels=st.dictionaries(st.sampled_from(LABELS), JSON, max_size=3), drop=st.sets(st.sampled_from(LABELS), max_size=1)
)
def test_any_metadata(tmp_path, labels, drop):
    path = buffers.save(tmp_path / "any.npz", SMALL, LABELLED)
    with np.load(path, allow_pickle=False) as data:
        about = json.loads(str(data["metadata_json"])) | labels
    text = json.dumps({key: value for key, value in about.items() if key not in drop})
    rewrite(path, metadata_json=np.array(text))
    reads_or_refuses(path)


@FUZZ
@hypothesis.given(
    flips=FLIPS,
    compressed=st.booleans(),
    cut=st.floats(0, 1),
)
def test_any_damage_to_the_bytes(tmp_path, flips, compressed, cut):
    path = buffers.save(tmp_path / "any.npz", SMALL, LABELLED, compressed=compressed)
    data = bytearray(path.read_bytes())
    for place, value in flips:
        data[int(place * len(data))] = value
    path.write_bytes(data if cut > 0.2 else data[: int(5 * cut * len(data))])
    reads_or_refuses(path)


# --- fuzzing the converters ----------------------------------------------------------------------


def converts_or_refuses(function, out):
    """The invariant of a converter: a buffer that follows the contract, or InputError and no file."""
    out.unlink(missing_ok=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            function(out)
    except InputError as error:
        assert "\n" not in str(error)
        str(error).encode()
        assert not out.exists()
        return False
    assert reads_or_refuses(out)
    return True


D4RL = {key: SMALL[key] for key in ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")}
OGBENCH = {key: D4RL[key] for key in ("observations", "actions", "terminals")}


@FUZZ
@hypothesis.given(done=changes(), name=st.sampled_from(["toy", "hopper-medium-v2", "antmaze-umaze-v2"]))
def test_any_d4rl_file(tmp_path, done, name):
    path = tmp_path / "any.hdf5"
    with h5py.File(path, "w") as file:
        for key, value in changed(D4RL, done).items():
            with contextlib.suppress(TypeError):  # what hdf5 has no type for
                file[key] = value
    convert_it = lambda out: convert.from_d4rl(path, out, name=name, dt=0.1, episode_length=5, replay=False)
    read = converts_or_refuses(convert_it, tmp_path / "out.npz")
    assert read or done or name != "toy"


@FUZZ
@hypothesis.given(done=changes(), own=st.none() | st.dictionaries(st.sampled_from(LABELS), JSON, max_size=3))
def test_any_ogbench_file(tmp_path, done, own):
    path, arrays = tmp_path / "pointmaze-any.npz", changed(OGBENCH, done)
    if own is not None:
        arrays |= {EXTRA: np.array(json.dumps({"carried": [], **own})), "rewards": D4RL["rewards"]}
    np.savez(path, **arrays)
    convert_it = lambda out: convert.from_ogbench(path, out, replay=False)
    read = converts_or_refuses(convert_it, tmp_path / "out.npz")
    assert read or done or own is not None


@FUZZ
@hypothesis.given(flips=FLIPS)
def test_any_damage_to_an_ogbench_file(tmp_path, flips):
    path = tmp_path / "pointmaze-any.npz"
    np.savez_compressed(path, **OGBENCH)
    data = bytearray(path.read_bytes())
    for place, value in flips:
        data[int(place * len(data))] = value
    path.write_bytes(data)
    converts_or_refuses(lambda out: convert.from_ogbench(path, out, replay=False), tmp_path / "out.npz")


MINARI_KEYS = (
    "observation_space", "action_space", "data_format", "env_spec", "total_episodes", "total_steps", "ref_min_score",
    "ref_max_score", "author", "dataset_id", "minari_version", EXTRA,
)  # fmt: skip


@pytest.fixture(scope="module")
def minari_set(tmp_path_factory):
    """A buffer as a local Minari set -> its metadata file."""
    pytest.importorskip("minari")
    folder = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        with contextlib.redirect_stdout(io.StringIO()):
            convert.to_minari(buffers.save(folder / "any.npz", SMALL, LABELLED), "any/thing-v0")
    (found,) = folder.rglob("metadata.json")
    return found, found.read_text(), folder


@hypothesis.settings(FUZZ, max_examples=30)
@hypothesis.given(
    labels=st.dictionaries(st.sampled_from(MINARI_KEYS), JSON | JSON.map(json.dumps), max_size=2),
    own=st.dictionaries(st.sampled_from(LABELS), JSON, max_size=2),
)
def test_any_metadata_of_a_minari_set(minari_set, monkeypatch, labels, own):
    path, text, folder = minari_set
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    about = json.loads(text)
    about[EXTRA] = json.dumps(json.loads(about[EXTRA]) | own)
    path.write_text(json.dumps(about | labels))
    convert_it = lambda out: convert.from_minari("any/thing-v0", out, replay=False)
    read = converts_or_refuses(convert_it, folder / "out.npz")
    assert read or labels or own
