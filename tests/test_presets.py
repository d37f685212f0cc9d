"""Published settings of the learners: found by the name of a set, ours or D4RL's, and with the published numbers."""

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest

import cped
import dac
import envs
import mopo
import qdq
import runner
import suite
from envs import buffers
from runner import flags

ROOT = Path(__file__).resolve().parents[1]
LEARNERS = {"mopo": mopo, "cped": cped, "qdq": qdq, "dac": dac}
ROBOTS = ("halfcheetah", "hopper", "walker2d")
KINDS = ("medium", "medium-replay", "medium-expert")
MAZES = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A function: name of a data set -> a small file that is called so."""
    folder = tmp_path_factory.mktemp("presets")
    states = np.zeros((20, 4), np.float32)
    rows = {"observations": states, "next_observations": states, "actions": states[:, :2], "rewards": states[:, 0]}
    rows |= {"terminals": states[:, 0] > 0, "timeouts": np.arange(20) == 19}
    about = {"env": "x", "task": "x", "layout": "task", "dt": 1.0, "reward_kind": "task", "episode_length": 20}

    def make(name):
        path = folder / f"{name.replace('/', '_')}.npz"
        if not path.exists():
            buffers.save(path, rows, about | {"dataset_name": name})
        return path

    return make


def choose(script, path, **flags):
    """-> what is said of the preset, the set that it is published for or "", its {field: value}."""
    with contextlib.redirect_stdout(io.StringIO()):
        said, values = script.preset(script.Args(dataset=str(path), **flags))
    found = re.search(r"as published for ([\w-]+)", said)
    assert bool(found) != ("nothing is published" in said), said
    return said, found[1] if found else "", values


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("learner", LEARNERS)
def test_sets_of_ours_have_our_defaults_and_find_what_is_published_by_a_flag(learner, named):
    """--preset published on ours/x is what D4RL's x has; what has nothing published is refused, but by CPED."""
    script = LEARNERS[learner]
    for name in suite.SETS:
        said, known, _ = choose(script, named(f"ours/{name}"))
        assert not known and f"nothing is published for ours/{name}" in said
        expected = name.startswith(ROBOTS) and "medium" in name
        expected |= learner != "mopo" and name.startswith("antmaze")
        expected |= learner == "mopo" and name.startswith(ROBOTS) and name.endswith("random")
        if expected:
            said, known, values = choose(script, named(f"ours/{name}"), preset="published")
            assert known.rpartition("-v")[0] == name and f"ours/{name}" in said
            assert choose(script, named(known))[2].items() <= values.items()
        elif learner != "cped":  # whose form is published for any data
            with pytest.raises(envs.InputError, match=r"nothing is published for ours/.*; name a set, as --preset "):
                choose(script, named(f"ours/{name}"), preset="published")
    assert not choose(script, named("hopper-easy"))[1]  # no set of ours
    assert choose(script, named("hopper-easy"), preset="cpu")[2]["num_updates"] in (10_000, 12_000, 20_000)


@pytest.mark.parametrize(
    ("grid", "folder"), [("suite_short", "data"), ("d4rl_grid", "data/d4rl"), ("suite_full", "data/paper")]
)
def test_grids_of_the_suite_are_of_its_sets(grid, folder, named):
    """Every set lies where docs/data.md makes it, and has a preset in every learner that is to run on it."""
    lists = json.loads((ROOT / "benchmark" / f"{grid}.json").read_text())
    for data, file in lists["datasets"].items():
        data = data.removeprefix("d4rl-")  # told apart from the smaller sets of these names
        assert file == f"{folder}/{data}.npz" and data in suite.SETS
        for algorithm, command in lists["algorithms"].items():
            assert "--preset published" in command or algorithm == "bc"
            wanted = {"preset": "published"} if f"{algorithm} {data[:7]}" != "mopo antmaze" else {}
            known = choose(LEARNERS[command.split()[0].removesuffix(".py")], named(f"ours/{data}"), **wanted)[1]
            assert bool(known) == (f"{algorithm} {data[:7]}" != "mopo antmaze")


@pytest.mark.parametrize(
    ("data", "known"),
    [
        ("hopper-medium-v2", dict.fromkeys(LEARNERS, "hopper-medium-v2")),
        ("hopper-medium-v0", dict.fromkeys(LEARNERS, "hopper-medium-v2") | {"mopo": "hopper-medium-v0"}),
        ("hopper-random-v2", {"mopo": "hopper-random-v0"}),
        ("antmaze-umaze-v0", {"cped": "antmaze-umaze-v2", "qdq": "antmaze-umaze-v0", "dac": "antmaze-umaze-v0"}),
        ("antmaze-umaze-v2", {"cped": "antmaze-umaze-v2", "qdq": "antmaze-umaze-v0", "dac": "antmaze-umaze-v0"}),
        ("minari/D4RL/hopper/medium-v2", {}),  # other data under a like name
        ("hopper-medium-replay-v2-half", {}),
    ],
)
def test_presets_are_of_d4rls_names(data, known, named):
    """The version that is published for, where the file's own is not; and which it is, is said."""
    for learner, script in LEARNERS.items():
        said, found, values = choose(script, named(data))
        assert found == known.get(learner, "") and data in said
        if found:
            assert values == choose(script, named(found))[2]


@pytest.mark.parametrize("learner", LEARNERS)
def test_preset_of_another_version_by_name(learner, named):
    """--preset with D4RL's name of a set, in whatever version or none; the file, relabelled, is called otherwise."""
    script, file = LEARNERS[learner], named("hopper-udg-top1")
    for given in ("hopper-medium-expert-v2", "hopper-medium-expert-v1", "hopper-medium-expert"):
        said, found, values = choose(script, file, preset=given)
        assert found == "hopper-medium-expert-v2" and "hopper-udg-top1" in said
        assert values == choose(script, named(found))[2]
    if learner != "mopo":
        found = choose(script, file, preset="antmaze-umaze-diverse-v2")[1]
        assert found == f"antmaze-umaze-diverse-{'v2' if learner == 'cped' else 'v0'}"
    with pytest.raises(envs.InputError, match="--preset hopper-easy: unknown"):
        choose(script, file, preset="hopper-easy")


# --- numbers ------------------------------------------------------------------------------------


def every_set(robots, mazes=(), version=""):
    """A row of values for each robot and kind, and for each maze -> {D4RL's name: values}."""
    names = [f"{robot}-{kind}-v2" for robot in ROBOTS for kind in KINDS]
    names += [f"antmaze-{m}-{version}" for m in MAZES] if mazes else []
    return dict(zip(names, [*robots, *mazes], strict=True))


def of_preset(script, named, name, *fields):
    """Values of a preset, which must be that of this very name."""
    _, found, values = choose(script, named(name))
    assert found == name
    args = script.Args(**values)
    return tuple(getattr(args, field) for field in fields)


def test_mopo_has_the_published_numbers(named):
    """Horizon and lambda of every set: OfflineRL-Kit's for v2, the authors' code for v0; and their updates."""
    v2 = [(5, 0.5), (5, 0.5), (5, 2.5), (5, 5), (5, 2.5), (5, 5), (5, 0.5), (1, 2.5), (1, 2.5)]
    v0 = [(1, 1), (5, 1), (5, 5), (5, 5), (5, 1), (5, 1), (5, 5), (1, 1), (1, 2)]
    published = every_set(v2) | {k.replace("v2", "v0"): v for k, v in every_set(v0).items()}
    published |= {f"{robot}-random-v0": row for robot, row in zip(ROBOTS, [(5, 0.5), (5, 1), (1, 1)], strict=True)}
    for name, row in published.items():
        updates = 3_000_000 if name.endswith("v2") else 1_000_000
        assert of_preset(mopo, named, name, "horizon", "lam", "num_updates") == (*row, updates), name


def test_dac_has_the_published_numbers(named):
    """eta, its rate, b, rho, max_q, the critics' rate of the authors' final commands."""
    row = lambda rho, b=1.0: (1.0, 1e-3, b, rho, False, 3e-4)
    robots = [row(0), row(0), row(0, 0.1), row(1.5), row(1.5), row(1.5, 0.05), row(1.0), row(1.0), row(1.0)]
    mazes = [(0.1, 0.0, None, 1.0, True, 3e-4)] * 4 + [(0.1, 0.0, None, rho, True, 1e-3) for rho in (1.1, 1.0)]
    for name, row in every_set(robots, mazes, "v0").items():
        found = of_preset(dac, named, name, "eta", "eta_lr", "bc_threshold", "rho", "max_q", "critic_lr")
        assert found[:2] + found[3:] == row[:2] + row[3:] and row[2] in (None, found[2]), name
        common = ("num_steps", "num_critics", "num_q_samples", "num_action_samples", "batch_size", "gamma", "tau")
        common = of_preset(dac, named, name, *common, "actor_lr", "num_updates")
        assert common == (5, 10, 10, 10, 256, 0.99, 0.005, 3e-4, 2_000_000)
    # returns are 0 or 1: rewards of 1,000, as the released code has them
    args = dac.Args(**choose(dac, named("antmaze-umaze-v0"))[2])
    assert dac.return_scale(np.ones(2), np.array([0.0, 1.0, 0.0]), args) == 1_000.0


def test_qdq_has_the_published_numbers(named):
    """alpha, beta, gamma_ent, the bound of gradients, LayerNorm, the actor's loss of the authors' files."""
    weights = (0.0, 0.1, 2.0, 0.8, 0.8, 2.0, 0.8, 0.8, 2.0)
    robots = [(0.992, 0.9 if i < 3 else 0.8, weight, 10, False, "q") for i, weight in enumerate(weights)]
    mazes = [
        (0.99, 0.9, 0.0, 7, False, "awr"), (0.01, 0.9, 1.5, 7, False, "q"), (0.99, 0.9, 0.0, 7, False, "awr"),
        (0.99, 0.9, 1.0, 7, False, "awr"), (0.99, 0.9, 0.0, 7, True, "awr"), (0.99, 0.9, 0.0, 3, True, "awr"),
    ]  # fmt: skip
    common = "hidden_sizes", "reward_shift", "batch_size", "gamma", "tau", "policy_delay", "num_samples", "num_updates"
    for name, row in every_set(robots, mazes, "v0").items():
        fields = ("alpha", "beta", "gamma_ent", "max_grad_norm", "layer_norm", "actor_loss")
        assert of_preset(qdq, named, name, *fields) == row, name
        width, shift = ((256,) * 3, 0.0) if name.endswith("v2") else ((256,) * 2, -1.0)
        assert of_preset(qdq, named, name, *common) == (width, shift, 256, 0.99, 0.005, 2, 50, 1_000_000), name


def test_cped_has_the_published_numbers(named):
    """Updates of the flow and after it, alpha's steps by update, first updates of critic and Q term, -1 in mazes."""
    robot = (500_000, 1_000_000, (1000, 10, 7.5, 5, 2.5, 1.5), (0, 1e5, 2e5, 3e5, 4e5, 5e5), 3e4, 5e4, 0.0)
    maze = (300_000, 700_000, (0.25, 0.1, 0.08), (0, 2e5, 5e5), 3e4, 5e4, -1.0)
    large = (400_000, 600_000, (0.25, 0.1, 0.08), (0, 1e5, 4e5), 3e4, 5e4, -1.0)
    fields = "flow_updates", "num_updates", "alphas", "alpha_from", "critic_from", "q_from", "reward_shift"
    for name, row in every_set([robot] * 9, [maze] * 4 + [large] * 2, "v2").items():
        flow, updates, alphas, starts, critic, q, shift = of_preset(cped, named, name, *fields)
        at = np.round(updates * np.array([*starts, critic, q]), 6)
        assert (flow, updates, alphas, (*at[:-2],), *at[-2:], shift) == row, name
        code = (
            "flow",
            "flow_hidden_sizes",
            "flow_layers",
            "prior",
            "action_noise",
            "normalize",
            "q_norm",
            "scale_rewards",
        )
        assert of_preset(cped, named, name, *code) == ("nice", (750, 750), 4, "logistic", 0.0, False, "none", False)
        code = "disc_outputs", "nll_weight", "adv_weight", "gp_weight", "disc_ratio", "flow_lr", "disc_lr", "flow_adam"
        assert of_preset(cped, named, name, *code) == ("many", 1.0, 1.0, 0.5, 5, 1e-4, 1e-4, (0.01, 1e-4))
        code = "hidden_sizes", "batch_size", "actor_lr", "critic_lr", "gamma", "tau", "policy_delay"
        actor_lr = 1e-4 if shift == 0 else 3e-4
        assert of_preset(cped, named, name, *code) == ((256, 256), 256, actor_lr, 3e-4, 0.99, 0.005, 2)


def test_cped_has_settings_of_our_own_and_published_ones_by_name(named):
    """--preset published on a set of ours: as for D4RL's of that name; --preset ours on D4RL's: the defaults."""
    for data in ("antmaze-umaze", "hopper-medium"):
        assert choose(cped, named(f"ours/{data}"), preset="cpu")[1:] == ("", cped.CPU)
        assert choose(cped, named(f"ours/{data}"), preset="published")[1:] == (
            f"{data}-v2",
            cped.PUBLISHED[f"{data}-v2"],
        )
    assert cped.preset(cped.Args(dataset=str(named("hopper-medium-v2")), preset="ours")) == ("ours", {})
    assert choose(cped, named("hopper-udg-top1"), preset="published")[2] == cped.MUJOCO


# --- flags without effect -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "words", "why"),
    [
        (cped, "--bc-only --gamma 0.9", "--gamma, because --bc-only has no critics"),
        (cped, "--flow nice --log-scale-cap 1", "--log-scale-cap, because only --flow cond uses it"),
        (dac, "--preset cpu --bc-threshold 0.1", "--bc-threshold, because eta is fixed; add --eta-lr 1e-3"),
        (dac, "--guidance none --rho 2", "--rho, because --guidance none only clones"),
        (dac, "--guidance none --q-norm size", "--q-norm, because --guidance none only clones"),
        (dac, "--q-target min --rho 2", "--rho, because --q-target min does not use it"),
        (
            qdq,
            "--uncertainty consistency --penalty product --spread mc --nodes 9",
            "--nodes, because it is not for --spread mc",
        ),
        (cped, "--eps-quantile 0.8", "--eps-quantile, because only --constraint hinge and dual use it"),
        (cped, "--constraint dual --alpha-from 0 0.1 0.2", "--alpha-from, because --constraint is dual"),
        (cped, "--adv-weight 0 --disc-lr 1e-3", "--disc-lr, because --adv-weight is 0"),
        (qdq, "--window 50", "--window, because H is the critics'"),
        (qdq, "--alpha 0.9", "--alpha, because it is not for --penalty excess"),
        (qdq, "--preset published --kappa 2", "--kappa, because it is not for --penalty product"),
    ],
)
def test_flags_without_effect_are_told(script, words, why, named):
    data = str(named("ours/hopper-medium"))
    args = runner.parse(script.Args, ["--dataset", data, *words.split()], script.preset, idle=script.idle_flags)
    assert why in "\n".join(flags.ABOUT)
    assert script.idle_flags(args).keys() <= vars(args).keys()
