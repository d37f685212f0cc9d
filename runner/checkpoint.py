"""Checkpoints: any pytree as one flat .npz, written whole or not at all, read back exactly.

Our own and not a library's (orbax): one file that numpy reads without pickle, the state before it kept as
state.prev.npz, and a resumed run that equals an uninterrupted one bit for bit.
"""

import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

import envs
import envs.buffers
from runner.files import STATES

# flags that may change at a resume: data are told by their digests, and --task-reward must fit them
FREE = ("out", "resume", "track", "num_devices", "distributed", "q_bound", "dataset", "task_reward")
DIGESTED = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")  # tell data apart


def flat_arrays(tree):
    """Pytree -> {slash/path: numpy array}; typed keys as their bits."""

    def array(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/"): array(x) for p, x in leaves}


def fill(like, arrays, path):
    """{slash/path: array} -> pytree in the structure of `like` (arrays or shapes); InputError where it does not fit."""

    def leaf(place, x):
        name = jax.tree_util.keystr(place, simple=True, separator="/")
        if name in arrays and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.asarray(arrays[name]))  # the bits of a typed key
        if name not in arrays or arrays[name].shape != x.shape or arrays[name].dtype != x.dtype:
            raise envs.InputError(
                f"{path}: {name} does not fit: another version of this script wrote the file; start anew with "
                "another --out"
            )
        return jnp.asarray(arrays[name])

    return jax.tree_util.tree_map_with_path(leaf, like)


def save_state(folder, tree, meta):
    """state.npz (newest) and state.prev.npz (the one before): the pytree as flat arrays, `meta` as JSON."""
    new = folder / "state.new.npz"
    envs.buffers.write_npz(new, {**flat_arrays(tree), "meta_json": np.array(json.dumps(meta))})
    name_state(new)


def name_state(new):
    """state.new.npz becomes state.npz, and the state before it state.prev.npz."""
    newest = new.with_name("state.npz")
    if newest.exists():
        os.replace(newest, new.with_name("state.prev.npz"))
    os.replace(new, newest)


def read_npz(path, about="meta_json"):
    """A file of arrays -> {key: array}, what its JSON member `about` says; raises whatever is wrong with the file."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(str(arrays.pop(about)))


def changes(old, new):
    """What differs between two identities, in words: versions first, which may have brought new flags."""
    differ, packages = [key for key in old.keys() | new.keys() if old.get(key) != new.get(key)], envs.buffers.versions()
    for key in sorted(differ, key=lambda key: (key not in packages, key)):
        was, now = old.get(key), new.get(key)
        if key not in packages and (key not in old or key not in new):
            yield f"{key} is {'new in' if key in new else 'no longer in'} this version"
        elif key == "data":
            columns = [name for name, one, other in zip(DIGESTED, was, now, strict=False) if one != other]
            yield f"the data have other {', '.join(columns)} now"
        else:
            yield f"{key} was {was!r} and is now {now!r}"


def read_learnt(flag, path, like, identity):
    """What an earlier run learnt -> pytree as `like` [S], of a file with one for all seeds or one for each.

    InputError, which names the flag, where the file cannot be read, is not of this `identity` or has other sizes.
    """
    try:
        arrays, about = read_npz(path, "metadata_json")
    except Exception as error:  # missing, torn or of another kind
        raise envs.InputError(f"{flag} {path}: cannot be read ({error}); name what this script wrote") from None
    for change in changes({key: about[key] for key in identity if key in about}, identity):
        raise envs.InputError(f"{flag} {path}: {change}; name one of this data and flags")

    def leaf(place, x):
        found = arrays.get(jax.tree_util.keystr(place, simple=True, separator="/"))
        if found is None or found.shape[1:] != x.shape[1:] or len(found) not in (1, len(x)):
            raise envs.InputError(f"{flag} {path}: another size or number of seeds; name one of this data and flags")
        return jnp.broadcast_to(jnp.asarray(found), x.shape)

    return jax.tree_util.tree_map_with_path(leaf, like)


def read_state(folder, identity, schedules=None):
    """The newest readable state of the folder -> arrays, meta, path.

    Raises InputError where none can be read, or where its `identity` (flags, data, versions) is another; a larger
    num_updates is none, where the `schedules` are off.
    """
    for path in (folder / name for name in STATES if (folder / name).exists()):
        try:
            arrays, meta = read_npz(path)
            break
        except Exception as error:  # torn or corrupt: the one before may be whole
            print(f"cannot read {path}: {error}", file=sys.stderr)
    else:
        raise envs.InputError(f"{folder}: no state to resume from; start anew with another --out")
    old, new, schedules = json.loads(json.dumps((meta["identity"], identity, schedules)))
    old = {key: value for key, value in old.items() if key not in FREE}
    if 0 < old.get("num_updates", 0) < new.get("num_updates", 0):
        check_growth(path, old["num_updates"], new, schedules)
        old = {**old, "num_updates": new["num_updates"]}
    check_identity(path, old, new)
    return arrays, meta, path


def check_growth(path, old, new, schedules):
    """InputError where a run of `old` updates would have been another one, had it been one of new["num_updates"].

    schedules: {flag that makes something follow the share of the run that is done: its value where nothing does}; None:
    something always does.
    """
    text = lambda x: " ".join(map(str, x)) if isinstance(x, list) else x
    reasons = ["what this script does depends on how many there are"] if schedules is None else []
    for name, off in (schedules or {}).items():
        flag = name.replace("_", "-")
        without = f"--no-{flag}" if off is False else f"--{flag} {text(off)}"
        if new[name] != off:
            reasons += [f"--{flag} stretches over the whole run, and only one with {without} can go on"]
    if old % new.get("eval_every", 1):  # a longer run has no such record in its log
        reasons += [f"it was evaluated at its end, and {old} is no multiple of --eval-every {new['eval_every']}"]
    if reasons:
        grown = f"a run of {old} updates cannot become one of {new['num_updates']}"
        raise envs.InputError(f"{path}: {grown}: {', and '.join(reasons)}; start anew with another --out")


def check_identity(path, old, new):
    """InputError where flags, data or versions are not those that the file was written with."""
    for change in changes(old, new):
        raise envs.InputError(f"{path}: {change}; resume with the old one, or start anew with another --out")
