"""Minari data sets: episodes of T steps with T + 1 observations, in Minari's local folder.

The folder is the environment variable MINARI_DATASETS_PATH or Minari's default. Nothing is
downloaded here. A set that `write` made carries the buffer's metadata beside Minari's own and its
further columns in the episodes' infos, so that it comes back as it was.
"""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np

from envs.buffers.convert import common
from envs.buffers.fields import LARGEST, Buffer

# Gymnasium's name of a world, without version -> seconds per step.
STEP_SECONDS = {
    "HalfCheetah": 0.05, "Hopper": 0.008, "Walker2d": 0.008, "Ant": 0.05, "Humanoid": 0.015, "AntMaze": 0.05,
}  # fmt: skip


def _open(dataset_id: str):
    """Minari's storage of a local set, its raw metadata, and the name of its world or ''."""
    common.require("minari")
    common.require("h5py")
    from minari.dataset.minari_storage import MinariStorage
    from minari.storage.datasets_root_dir import get_dataset_path

    folder = get_dataset_path(dataset_id) / "data"
    if (folder / "main_data.hdf5").is_file() and not (folder / "metadata.json").is_file():
        problem = "is in the layout of an older Minari: data/main_data.hdf5 without data/metadata.json"
        remedy = f"minari download {dataset_id} --force, or make the set again with Minari 0.5 or newer"
        raise common.fail(dataset_id, "data set", problem, remedy)
    if not (folder / "metadata.json").is_file():
        problem = "is not on this machine"
        raise common.fail(dataset_id, "data set", problem, f"minari download {dataset_id}, or set MINARI_DATASETS_PATH")
    with common.readable(dataset_id, "a Minari data set"):
        raw = MinariStorage.read_raw_metadata(folder)
        for key in ("observation_space", "action_space", "data_format"):
            # Minari would import and build the environment that the file names to find a space.
            if not isinstance(raw.get(key), str):
                raise common.fail(dataset_id, key, "is missing in metadata.json", f"minari download {dataset_id}")
        if raw["data_format"] in ("arrow", "parquet"):
            common.require("pyarrow")
        storage = MinariStorage.read(folder)
        spec = json.loads(raw["env_spec"]) if "env_spec" in raw else {}
    return storage, raw, spec if isinstance(spec, dict) else {}


# --- in ------------------------------------------------------------------------------------------


def _choose_keys(dataset_id: str, space, keys: list[str] | None) -> list[str] | None:
    """Parts of the observation to put together; None where it is one vector."""
    from gymnasium import spaces

    if isinstance(space, spaces.Box):
        if keys is not None:
            raise common.fail(dataset_id, "observations", "have no parts to choose from", "leave out --keys")
        if len(space.shape) != 1:
            raise common.fail(
                dataset_id, "observations", f"have the shape {space.shape}", "only vectors can be converted"
            )
        return None
    if not isinstance(space, spaces.Dict):
        problem = f"are of the kind {type(space).__name__}"
        raise common.fail(
            dataset_id, "observations", problem, "only vectors and dictionaries of vectors can be converted"
        )
    parts = {key: part for key, part in space.spaces.items() if isinstance(part, spaces.Box) and len(part.shape) == 1}
    if keys is None:
        keys = [key for key in ("observation", "desired_goal") if key in parts]
    unknown = [key for key in keys if key not in parts]
    if unknown or not keys:
        problem = f"{', '.join(unknown) or 'observation'} is not among its vectors ({', '.join(parts)})"
        raise common.fail(dataset_id, "observations", problem, "choose with --keys, in the order they are to stand")
    return keys


def _scale_actions(dataset_id: str, space, actions: np.ndarray) -> np.ndarray:
    """Actions from the bounds of their space to [-1, 1]; left alone where these are the bounds."""
    low, high = np.float64(space.low), np.float64(space.high)
    if (low == -1).all() and (high == 1).all():
        return actions
    if not (np.isfinite(low) & np.isfinite(high) & (low < high)).all():
        return actions
    return ((2.0 * actions - (high + low)) / (high - low)).astype(np.float32)


def _join(dataset_id: str, key: str, parts: list[np.ndarray], rank: int) -> np.ndarray:
    shapes = {part.shape[1:] for part in parts}
    if any(part.ndim != rank for part in parts) or len(shapes) != 1:
        problem = f"has rows of the shapes {sorted(shapes)} in its episodes"
        raise common.fail(dataset_id, key, problem, "only vectors of one size can be converted")
    return np.concatenate(parts)


def _read_episodes(dataset_id: str, storage, keys: list[str] | None, carried: list[str]):
    """Columns over all episodes, those of observations with T + 1 rows an episode; and all T (E,).

    carried: infos to read too. Those of other sets may have any form and are left alone.
    """
    found: dict[str, list] = {}
    lengths = []
    with common.readable(dataset_id, "a Minari data set"):
        for number, episode in enumerate(storage.get_episodes(range(storage.total_episodes))):
            steps = len(episode["rewards"])
            parts = {key: episode[key] for key in ("actions", "rewards", "terminations", "truncations")}
            whole = episode["observations"] if keys is not None else {"observations": episode["observations"]}
            vectors = {key: value for key, value in whole.items() if not isinstance(value, dict)}
            parts |= {f"observations/{key}": value for key, value in vectors.items()}
            parts |= {key: episode["infos"][key][:steps] for key in carried}
            for key, value in parts.items():
                rows = steps + key.startswith("observations/")
                if len(value) != rows:
                    problem = f"has {len(value)} rows in episode {number}, expected {rows} for {steps} rewards"
                    raise common.fail(dataset_id, key, problem, "the set was cut short: get it again")
                found.setdefault(key, []).append(np.asarray(value))
            lengths.append(steps)
        if not sum(lengths):
            raise common.fail(dataset_id, "episodes", "hold no step", "record some steps first")
        ranks = {"actions": 2, "rewards": 1, "terminations": 1, "truncations": 1}
        columns = {key: _join(dataset_id, key, parts, ranks.get(key, parts[0].ndim)) for key, parts in found.items()}
    return columns, np.array(lengths)


def _root_columns(columns: dict[str, np.ndarray], rows: np.ndarray, dt: float) -> dict[str, np.ndarray]:
    """Positions, velocities and goals of a set with 2-d goals; rows: place of each step's observation."""
    here, goals = columns.get("observations/achieved_goal"), columns.get("observations/desired_goal")
    found = {}
    if here is not None and here.shape[1] == 2:
        found |= common.root_columns(here[rows], here[rows + 1], dt)
    if goals is not None and goals.shape[1] == 2:
        found["goals"] = goals[rows].astype(np.float32)
    return found


def read(
    dataset_id: str,
    keys: list[str] | None = None,
    dt: float | None = None,
    episode_length: int | None = None,
    spare_dt: float | None = None,
) -> common.Imported:
    """Read a local set as `envs.buffers.convert.from_minari` says -> Imported. Raises InputError.

    spare_dt: seconds of a step, where neither dt nor the set says them.
    """
    from gymnasium import spaces

    storage, raw, spec = _open(dataset_id)
    if not isinstance(storage.action_space, spaces.Box) or len(storage.action_space.shape) != 1:
        problem = f"are of the kind {storage.action_space}"
        raise common.fail(dataset_id, "actions", problem, "only vectors of numbers can be converted")
    keys = _choose_keys(dataset_id, storage.observation_space, keys)
    text = raw.get(common.EXTRA)
    own, carried = common.own_metadata(dataset_id, text) if isinstance(text, str) else ({}, [])
    columns, lengths = _read_episodes(dataset_id, storage, keys, carried)
    world = str(spec.get("id", "")).rpartition("/")[2].rpartition("-v")[0]
    known_dt = next((STEP_SECONDS[key] for key in (world, world.partition("_")[0]) if key in STEP_SECONDS), None)
    dt = dt or own.get("dt") or known_dt or spare_dt
    place = columns.get("observations/achieved_goal")
    if dt is None and not own and place is not None and place.shape[1:] == (2,):
        problem = f"'{world}' is no world known here, and achieved_goal is a place that moves"
        raise common.fail(dataset_id, "dt", problem, "give the seconds per step with --dt")
    rows = np.arange(lengths.sum()) + np.repeat(np.arange(len(lengths)), lengths)
    names = ["observations/observations"] if keys is None else [f"observations/{key}" for key in keys]
    whole = np.concatenate([common.to_float32(dataset_id, key, columns[key]) for key in names], axis=1)
    actions = common.to_float32(dataset_id, "actions", columns["actions"])
    terminals = common.to_flags(dataset_id, "terminations", columns["terminations"])
    timeouts = common.to_flags(dataset_id, "truncations", columns["truncations"]) & ~terminals
    last = np.cumsum(lengths)[lengths > 0] - 1
    open_ends = int((~(terminals | timeouts)[last]).sum())
    timeouts[last] = ~terminals[last]
    arrays = {
        "observations": whole[rows], "next_observations": whole[rows + 1],
        "actions": _scale_actions(dataset_id, storage.action_space, actions),
        "rewards": common.to_float32(dataset_id, "rewards", columns["rewards"]),
        "terminals": terminals, "timeouts": timeouts,
    }  # fmt: skip
    if own:
        arrays |= {key: columns[key] for key in carried}
    else:
        arrays |= _root_columns(columns, rows, dt)
    reference = [raw.get(key) for key in ("ref_min_score", "ref_max_score")]
    told = all(isinstance(score, (int, float)) and abs(score) < LARGEST for score in reference)
    told = told and reference[0] != reference[1]
    metadata = {
        "dataset_name": f"minari/{dataset_id}", "env": f"minari/{spec.get('id', dataset_id)}", "task": None,
        "layout": "env", "reward_kind": "task", "reference": reference if told else None,
        "generator": {"script": "minari", "flags": {"keys": keys}}, "rows_dropped": {},
        "episode_length": spec.get("max_episode_steps") or int(lengths.max()), **own, "dt": dt,
        "parents": [_parent(dataset_id, storage.data_path, len(rows))],
    }  # fmt: skip
    metadata["episode_length"] = episode_length or metadata["episode_length"]
    notes = [f"{open_ends} episodes end without a flag: taken as timeouts"] * bool(open_ends)
    notes += common.step_notes(world, dt, known_dt)
    return common.Imported(arrays, metadata, None, notes, dataset_id)


def _parent(dataset_id: str, folder: Path, rows: int) -> dict[str, str]:
    """sha256: of the data file; of a set in many files none, as they have no order."""
    files = [path for path in Path(folder).iterdir() if path.is_file() and path.name != "metadata.json"]
    digest = common.file_sha256(files[0]) if len(files) == 1 else ""
    return {"path": dataset_id, "sha256": digest, "taken": f"{rows} rows"}


# --- out -----------------------------------------------------------------------------------------


def write(buffer: Buffer, dataset_id: str) -> None:
    """Make a local Minari set of a buffer. InputError where the id is taken or Minari refuses it."""
    minari = common.require("minari")
    common.require("h5py")
    from gymnasium import spaces
    from minari.data_collector import EpisodeBuffer
    from minari.storage.datasets_root_dir import get_dataset_path

    folder = get_dataset_path(dataset_id)
    if folder.exists():
        raise common.fail(dataset_id, "data set", "exists already", "choose another id or version")
    extra = common.extra_columns(buffer)
    ends = common.runs(buffer.arrays)
    episodes = []
    for start, end in zip(np.append(0, ends[:-1]), ends, strict=True):
        part = slice(start, end)
        last = buffer["next_observations"][end - 1 : end]
        infos = {key: np.concatenate([value[part], value[end - 1 : end]]) for key, value in extra.items()}
        episodes.append(
            EpisodeBuffer(
                observations=np.concatenate([buffer["observations"][part], last]),
                actions=buffer["actions"][part],
                rewards=buffer["rewards"][part],
                terminations=buffer["terminals"][part],
                truncations=buffer["timeouts"][part],
                infos=infos or None,
            )
        )
    sizes = buffer["observations"].shape[1], buffer["actions"].shape[1]
    made = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Minari asks for an author, an address, an environment
            made = minari.create_dataset_from_buffers(
                dataset_id,
                buffer=episodes,
                observation_space=spaces.Box(-np.inf, np.inf, (sizes[0],), np.float32),
                action_space=spaces.Box(-1.0, 1.0, (sizes[1],), np.float32),
                description=f"{buffer.metadata['dataset_name']}, written by udg-jax",
            )
        made.storage.update_metadata({common.EXTRA: json.dumps(common.portable_metadata(buffer))})
    except (OSError, ValueError) as error:
        problem = f"cannot be written ({' '.join(str(error).split())[:160]})"
        remedy = "use an id like namespace/name-v0, and check the space on the disk"
        raise common.fail(dataset_id, "data set", problem, remedy) from None
    finally:
        if made is None:  # Minari makes the folder before it looks at the id
            shutil.rmtree(folder, ignore_errors=True)
