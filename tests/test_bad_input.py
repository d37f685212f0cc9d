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
from hypothesis import strategies as st

import runner
from envs import InputError, buffers
from envs.buffers import convert
from envs.buffers.__main__ import describe
from envs.buffers.__main__ import main as command_line
from envs.buffers.convert.common import EXTRA
from tests.test_buffers import LABELLED, make_arrays, rewrite

ROOT = Path(__file__).parents[1]
LEARNERS = ("mopo", "cped", "qdq", "dac")
NEEDED = (*buffers.REQUIRED, *buffers.EPISODE_KEYS, "metadata_json")
RAW = {**LABELLED, "task": "point", "layout": "env", "reward_kind": "none"}


# --- how to break a good file --------------------------------------------------------------------


def change(key, function):
    """-> what breaks one column of a file: a new value, from those there are."""

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


def without(key):
    return lambda path: rewrite(path, drop=(key,))


def set_to(key, value):
    return lambda path: rewrite(path, **{key: np.asarray(value)})


def metadata(**changes):
    return lambda path: rewrite(path, about=changes)


def member(name, data=b"", times=1):
    def apply(path):
        with zipfile.ZipFile(path, "a") as archive:
            for i in range(times):
                archive.writestr(name.format(i), data)

    return apply


def deflated(path, shape, data=b""):
    """Add a packed array, whatever its header says."""
    handle = io.BytesIO()
    np.lib.format.write_array_header_1_0(handle, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("extra.npy", handle.getvalue() + data)


def lie_about_size(path):
    """A deflated member whose directory entry claims fewer bytes than it unpacks to."""
    deflated(path, (10_000,), bytes(40_000))
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        size = archive.getinfo("extra.npy").file_size
    path.write_bytes(data.replace(size.to_bytes(4, "little"), (size - 4_000).to_bytes(4, "little")))


class Evil:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


def pickled(path):
    with np.load(path) as data:
        np.savez(path, **{**data, "rewards": np.array([Evil()] * 15, dtype=object)})


def cut(tenth):
    def apply(path):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * tenth // 10])

    return apply


def emptied(path):
    with np.load(path, allow_pickle=False) as data:
        members = {k: data[k][:0] if data[k].ndim else data[k] for k in data.files}
    np.savez(path, **members)


def hdf5(path):
    with h5py.File(path, "w") as file:
        file["observations"] = np.zeros((3, 4), np.float32)


def fifo(path):
    path.unlink()
    os.mkfifo(path)


LONG_HEADER = b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + bytes(99)
FALSE_BOOLS = np.where(np.arange(15) == 3, 7, 0).astype(np.uint8).view(bool)
CORPUS = {  # name -> what breaks a file of 5, 3 and 7 rows, words of the error beside the file's name
    **{f"no {key}": (without(key), [key, "missing"]) for key in NEEDED},
    "wrong rank": (change("rewards", lambda a: a["rewards"][:, None]), ["rewards", "(15, 1)"]),
    "images": (change("observations", lambda a: a["observations"][:, :, None]), ["observations", "(15, 4, 1)"]),
    "states": (change("next_observations", lambda a: a["next_observations"][:, :2]), ["next_observations", "S is 4"]),
    "root": (set_to("root_positions", np.zeros((15, 3), np.float32)), ["root_positions", "(15, 3)"]),
    "float64": (change("actions", lambda a: a["actions"].astype(float)), ["actions", "array.astype(np.float32)"]),
    "big endian": (change("rewards", lambda a: a["rewards"].astype(">f4")), ["rewards", ">f4"]),
    "float flags": (change("terminals", lambda a: a["terminals"].astype(np.float32)), ["terminals", "bool"]),
    "false bools": (set_to("timeouts", FALSE_BOOLS), ["timeouts", "row 3 is 7", "!= 0"]),
    "complex": (change("rewards", lambda a: a["rewards"].astype(np.complex64)), ["rewards", "complex64"]),
    "object array": (pickled, ["rewards", "pickled"]),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"observations": [Evil()]})), ["archive"]),
    "nan": (put("observations", 3, np.nan), ["observations", "row 3"]),
    "inf": (put("actions", 5, np.inf), ["actions", "row 5"]),
    "-inf": (put("rewards", 7, -np.inf), ["rewards", "row 7"]),
    "action range": (put("actions", 9, 1.0001), ["actions", "row 9", "beyond 1"]),
    "both flags": (put("timeouts", 7, True), ["timeouts", "row 7", "both"]),
    "open end": (put("timeouts", -1, False), ["timeouts", "last row"]),
    "length": (change("actions", lambda a: a["actions"][:-1]), ["actions", "(14, 2)"]),
    "ends": (put("episode_ends", 1, 9), ["episode_ends", "flags"]),
    "lengths": (put("episode_lengths", 1, 4), ["episode_lengths", "episode_ends"]),
    "returns": (put("episode_returns", 1, 1e6), ["episode_returns", "episode 1"]),
    "shuffled": (change("observations", lambda a: a["observations"][::-1]), ["next_observations", "next row"]),
    "empty": (emptied, ["empty"]),
    "no end": (set_to("episode_ends", np.zeros(0, np.int64)), ["timeouts", "no row ends"]),
    **{f"cut at {tenth}0 %": (cut(tenth), ["archive"]) for tenth in range(10)},
    "behind an empty archive": (lambda path: path.write_bytes(b"x" + b"PK\x05\x06" + bytes(18)), ["metadata_json"]),
    **{
        f"json {text[:9]!r}": (set_to("metadata_json", text), ["metadata_json"])
        for text in ("{'env': 1}", "[1]", '"x"', "", '{"dt": NaN}', "[" * 100_000, "1" * 100_000)
    },
    "json not text": (set_to("metadata_json", np.zeros(3)), ["metadata_json", "expected one string"]),
    "schema": (metadata(schema="minari"), ["schema", "minari"]),
    "schema version": (metadata(schema_version=2), ["schema_version", "2"]),
    "terminal codes": (metadata(dataset_name="\x1b[2J\n"), ["dataset_name"]),
    "surrogate": (metadata(env="\ud800"), ["env"]),
    "world": (metadata(env="nowhere", task="nowhere"), ["nowhere"]),
    "options": (metadata(task_options={"ctrl_cost": "much"}), ["task_options", "ctrl_cost"]),
    "huge option": (metadata(task_options={"ctrl_cost": 10**400}), ["task_options", "ctrl_cost"]),
    "endless": (metadata(dt=1e999), ["metadata_json"]),
    **{
        f"{key} {str(value)[:9]}": (metadata(**{key: value}), ["metadata_json", key])
        for key, value in [
            ("dt", -1), ("dt", 10**400), ("episode_length", "7"), ("layout", "flat"), ("reward_kind", "dense"),
            ("warmup_transitions", 16), ("parents", ["x"]), ("rows_dropped", 3), ("env", None),
            ("num_transitions", 14), ("num_episodes", 4),
            ("reference", [1]), ("reference", [2, 2]), ("reference", [0, "x"]),
        ]
    },
    **{
        f"member {name!r}": (member(name), ["plain array name"])
        for name in ("../evil.npy", "/etc/evil.npy", "a/b.npy", "a\\b.npy", "x.txt", "__x__.npy", "a\nb.npy")
    },
    "twice": (member("rewards.npy"), ["rewards", "twice"]),
    "members": (member("x{}.npy", times=60), ["members"]),
    "claims": (lambda path: deflated(path, (10**12, 10**6)), ["extra", "announces"]),
    "long header": (member("x.npy", LONG_HEADER), ["archive"]),
    "bomb": (lambda path: deflated(path, (17_000_000,), bytes(68_000_000)), ["unpack"]),
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
    module = importlib.import_module(script)
    return module.main(runner.parse(module.Args, [str(flag) for flag in flags], getattr(module, "preset", None)))


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
    """One error with file, key and remedy from the inspector and a script, each in its turn; nothing is changed."""
    spoil, words = CORPUS[case]
    monkeypatch.chdir(tmp_path)
    readers = (*LEARNERS, "udg_select")
    reader = readers[list(CORPUS).index(case) % 5] if case not in ("-inf", "world") else "dac"  # nothing to a selection
    raw = reader == "udg_select"
    file = buffers.save(tmp_path / "data" / "toy.npz", make_arrays(), RAW if raw else LABELLED)
    spoil(file)
    before, out = listing(tmp_path), tmp_path / "out"
    flags = ("--buffers", file, "--task", "point-angle-0") if raw else ("--dataset", file)
    found = [message_of(run, reader, *flags, "--out", out)]
    if case != "world":  # a name means nothing to a reader of numbers
        found.append(message_of(tool, "inspect", file))
    for message in found:
        assert all(word in message for word in (str(file), *words, "Remedy:")), message
    assert listing(tmp_path) == before


def test_texts_of_a_file_do_not_reach_the_terminal_as_they_are(tmp_path):
    """Names of parents and reasons for dropped rows may be anything; what is printed stays printable."""
    path = buffers.save(tmp_path / "toy.npz", make_arrays(), LABELLED)
    rewrite(path, about={"parents": [{"path": "\x1b[2J\n"}, {"path": "\ud800"}], "rows_dropped": {"\x1b[2J": "\n"}})
    assert str(path) in message_of(lambda: buffers.load(path, task="point-angle-60"))
    assert buffers.load(path, quiet=True).summary().isprintable()


@pytest.mark.parametrize("script", LEARNERS)
def test_data_that_cannot_be_learnt_from(tmp_path, script):
    """All zero, one row, one episode of it, another layout, no task: refused before anything is written."""
    path, out = tmp_path / "toy.npz", tmp_path / "out"
    for lengths, factor, labels, words in (
        ((30, 10), 0, {"reward_kind": "none"}, ("reward-free", f"udg_select.py --buffers {path}")),
        ((30, 10), 0, {"reward_kind": "relabelled"}, ("zero in every row", "udg_select.py")),
        ((1,), 1, {}, ("rows",)),
        ((5,), 1, {}, ("rows",)),
        ((30, 10), 1, {"layout": "env"}, ("observes",)),
        ((30, 10), 1, {"task": None}, ("names no task",)),
    ):
        arrays = make_arrays(lengths)
        buffers.save(path, arrays | {"rewards": factor * arrays["rewards"]}, LABELLED | labels)
        message = message_of(run, script, "--dataset", path, "--out", out)
        assert all(word in message for word in words), message
        assert not listing(out)


@pytest.mark.parametrize("script", ["mopo", "cped", "qdq", "dac"])
def test_a_raw_column_that_no_network_learns_from_is_named(tmp_path, script):
    """As published, networks see observations as they are: a column beyond 1e4 is named before anything is written."""
    arrays, out = make_arrays((300, 300)), tmp_path / "out"
    for size in (2e4, 1e8, 1e14):
        arrays["observations"][:, 1] = size * np.linspace(-1, 0.5, 600)
        arrays["next_observations"] = np.roll(arrays["observations"], -1, axis=0)
        path = buffers.save(tmp_path / "toy.npz", arrays, {**LABELLED, "dataset_name": "hopper-medium-v2"})
        message = message_of(run, script, "--dataset", path, "--out", out, "--preset", "published")
        flag = "--standardise-observations" if script in ("dac", "mopo") else "--normalize"
        wanted = f"columns [1] of the observations pass 10000, up to {size:.3g}; try {flag}, or scale these columns"
        assert wanted in message and not listing(out), message


@pytest.mark.parametrize("script", ["mopo", "cped", "qdq"])
def test_rewards_that_carry_q_beyond_its_bound_are_named(tmp_path, script):
    """As published, rewards are as they are: too large ones are named before anything is written, with a way out."""
    arrays, out = make_arrays((300, 300)), tmp_path / "out"
    arrays["rewards"] = np.full(600, -3e4, np.float32)
    path = buffers.save(tmp_path / "toy.npz", arrays, {**LABELLED, "dataset_name": "hopper-medium-v2"})
    message = message_of(run, script, "--dataset", path, "--out", out, "--preset", "published")
    remedy = "divide them in the file" if script == "mopo" else "say --scale-rewards"
    wanted = f"rewards: their mean size 3e+04, paid for ever, is worth 3e+06, beyond --q-bound 1e+06; {remedy}"
    assert wanted in message and not listing(out), message


def test_which_columns_are_named():
    x = np.zeros((3, 30), np.float32)
    x[1] = 9e3
    buffers.check_raw_columns(x, False, "--flag")
    x[2, 5] = -2e4
    buffers.check_raw_columns(x, np.arange(30) == 5, "--flag")
    x[2] = -2e4
    with pytest.raises(InputError, match=r"columns \[0, 1, 2, 3, 4, 5, 6, 7, 8, 9\] and others of the .*; try --flag"):
        buffers.check_raw_columns(x, False, "--flag")
    buffers.check_raw_columns(x, True, "--flag")


def test_which_rewards_are_refused():
    rewards = np.array([-2.0, 0.0], np.float32)
    buffers.check_raw_rewards(rewards, 0.99, 100.0, "so")
    buffers.check_raw_rewards(rewards, 0.99, 0.0, "so"), buffers.check_raw_rewards(rewards, 1.0, 1.0, "so")
    with pytest.raises(
        InputError, match=r"rewards: their mean size 1, .*is worth 100, beyond --q-bound 99; so, or raise"
    ):
        buffers.check_raw_rewards(rewards, 0.99, 99.0, "so")


# --- command lines -------------------------------------------------------------------------------

POINT, SELECT, LEARN = "--task point", "--task point-angle-0 --buffers {data}", "--dataset {labelled}"
LEARNER = {
    "": "--dataset", "--dataset {raw}": "reward-free", f"{LEARN} --chunk 7": "--chunk", f"{LEARN} --preset x": "x",
    f"{LEARN} --batch-size 0": "batch", f"{LEARN} --batch-size 1000000000000": "--batch-size",
}  # fmt: skip
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
    "mopo": LEARNER | {
        "--quick --preset cpu": "--quick", "--dataset {empty}": "is a folder", f"{LEARN} --horizon 0": "horizon",
        f"{LEARN} --task moon": "moon", f"{LEARN} --num-elites 9": "num-elites",
        f"--quick --seed {10**20}": "--seed", "--quick --hidden-sizes": "--hidden-sizes",
    },
    "cped": LEARNER | {f"{LEARN} --alphas -1": "alphas"},
    "qdq": LEARNER | {f"{LEARN} --beta 2": "beta"},
    "dac": LEARNER | {f"{LEARN} --eta -1": "eta"},
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


@pytest.mark.parametrize("words", ["--sede 1", "--seed one", "--seed", "surplus"])
def test_flags_that_do_not_exist_or_are_no_numbers(words, capsys):
    """The parser's own errors: code 2, the flag named."""
    with pytest.raises(SystemExit) as caught:
        run("dac", *words.split())
    error = capsys.readouterr().err
    assert caught.value.code == 2 and words.split()[0] in error and "Traceback" not in error


@pytest.mark.parametrize("name", ["state.npz", "policy.npz"])
def test_a_run_is_not_written_over(tmp_path, name):
    """Nor a file in the folder's place: refused, and as before. udg_select.py: its own tests."""
    (tmp_path / name).write_bytes(b"mine")
    assert "--out" in message_of(run, "wurl_sac", "--task", "point", "--out", tmp_path)
    with pytest.raises((InputError, OSError), match=name):  # runner.launch makes one line of both
        run("wurl_sac", "--task", "point", "--out", tmp_path / name)
    assert [path.read_bytes() for path in tmp_path.rglob("*")] == [b"mine"]


@pytest.mark.parametrize("command", [("mopo.py", "--dataset"), ("-m", "envs.buffers", "inspect")])
def test_as_programs(tmp_path, command):
    """Exit code and no traceback, in a process of its own."""
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK\x03\x04")
    done = subprocess.run([sys.executable, *command, broken], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode > 0
    assert "Traceback" not in done.stderr and f"error: {broken}" in done.stderr
    assert listing(tmp_path).keys() == {"broken.npz"}


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

    def value(array, place, number):
        array.reshape(-1)[place] = number
        return array

    how_to = {
        "cast": lambda array, dtype: array.astype(dtype),
        "rows": lambda array, n: array[:n] if n < 1 else np.concatenate([array, array[:n]]),
        "reshape": lambda array, shape: array.reshape(shape),
        "order": lambda array, _: np.asfortranarray(array),
        "value": lambda array, how: value(array, *how),
    }
    for key, (what, how) in done:
        if what == "drop":
            arrays.pop(key, None)
            continue
        with contextlib.suppress(ValueError, TypeError, IndexError, OverflowError), np.errstate(all="ignore"):
            arrays[key] = how_to[what](arrays.get(key, np.zeros(12, np.float32)), how)
    return arrays


def flipped(data, flips):
    data = bytearray(data)
    for place, value in flips:
        data[int(place * len(data))] = value
    return data


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
    assert about["dt"] is None or (np.isfinite(about["dt"]) and about["dt"] > 0)
    assert about["episode_length"] > 0


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


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A good file of 12 rows, packed or not: its bytes."""
    folder = tmp_path_factory.mktemp("small")
    save = lambda packed: buffers.save(folder / "small.npz", SMALL, LABELLED, compressed=packed).read_bytes()
    return {packed: save(packed) for packed in (False, True)}


@pytest.fixture
def path(small, tmp_path):
    """That file, to be spoilt."""
    path = tmp_path / "any.npz"
    path.write_bytes(small[False])
    return path


@FUZZ
@hypothesis.given(done=changes())
def test_any_columns(small, path, done):
    path.write_bytes(small[False])
    with np.load(path, allow_pickle=False) as data:
        members = changed({key: data[key] for key in data.files if key != "metadata_json"}, done)
        np.savez(path, metadata_json=data["metadata_json"], **members)
    read = reads_or_refuses(path)
    assert read or done


@FUZZ
@hypothesis.given(done=changes())
def test_the_writer_takes_what_the_reader_reads(path, done):
    """`save` refuses, and leaves the old file, or writes what `load` takes back unchanged."""
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
    assert [p.name for p in path.parent.iterdir()] == ["any.npz"]


@FUZZ
@hypothesis.given(
    labels=st.dictionaries(st.sampled_from(LABELS), JSON, max_size=3), drop=st.sets(st.sampled_from(LABELS), max_size=1)
)
def test_any_metadata(small, path, labels, drop):
    path.write_bytes(small[False])
    with np.load(path, allow_pickle=False) as data:
        about = json.loads(str(data["metadata_json"])) | labels
    set_to("metadata_json", json.dumps({key: value for key, value in about.items() if key not in drop}))(path)
    reads_or_refuses(path)


@FUZZ
@hypothesis.given(flips=FLIPS, packed=st.booleans(), cut=st.floats(0, 1))
def test_any_damage_to_the_bytes(small, path, flips, packed, cut):
    data = flipped(small[packed], flips)
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
    path.write_bytes(flipped(path.read_bytes(), flips))
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
