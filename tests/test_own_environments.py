"""Worlds that a user brings: Gymnasium's by name, a user's in JAX by `register`, and a reward of the user's own.

The oracle is Gymnasium itself, stepped in a loop.
"""

import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
import envs.buffers
import runner
import runner.ends
import udg_select
import wurl_sac
from envs import gymnasium_pool, host, registered
from envs.gymnasium_worlds import seed_of
from envs.tasks import never
from runner import policies
from tests.test_runs import LEARNERS, tiny
from tests.test_wurl_sac import TINY as TINY_WURL

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "environments.md").read_text()

HIDDEN = '''
import gymnasium
import numpy as np

Box = gymnasium.spaces.Box


class Hidden(gymnasium.Env):
    """Shows a position in a plane, not the velocity; ends beyond 1 in the first coordinate."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float64)
    action_space = Box(np.float32([-1.0, 2.0]), np.float32([1.5, 2.5]))

    def __init__(self, fault=""):
        self.fault = fault

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        rng = np.random if self.fault == "seed" else self.np_random
        self.x, self.v, self.time, self.over = rng.normal(0, 0.2, 2), np.zeros(2), 0, False
        return self.shown(), {}

    def shown(self):
        if self.fault != "shares":
            return self.x.copy()
        self.buffer = getattr(self, "buffer", np.zeros(2, np.float32))
        self.buffer[:] = self.x  # the array that it returned before
        return self.buffer

    def step(self, action):
        assert not self.over and self.action_space.contains(action), (self.over, action)
        if self.fault == "raises":
            raise RuntimeError("the motor is on fire")
        self.time += 1
        self.v = 0.9 * self.v + 0.06 * np.float64(action)
        self.x = self.x + self.v
        self.over = bool(abs(self.x[0]) > 1)
        reward = np.nan if self.fault == "nan" else -np.abs(self.x[0]) + 0.01 * action[1]
        return self.shown(), reward, self.over, self.fault == "cuts" and self.time == 5, {}


gymnasium.register("Hidden-v0", Hidden, max_episode_steps=12)
for fault in ("seed", "raises", "nan", "cuts", "shares"):
    gymnasium.register(f"Hidden-{fault}-v0", Hidden, kwargs={"fault": fault}, max_episode_steps=12)


class Other(Hidden):
    def __init__(self, observation=None, action=None):
        self.fault = ""
        self.observation_space = observation or Hidden.observation_space
        self.action_space = action or Hidden.action_space


wide, spaces = Box(-1, 1, (2, 2)), gymnasium.spaces
for name, kwargs in {
    "Image": {"observation": wide}, "Dict": {"observation": spaces.Dict({"x": wide})},
    "Discrete": {"action": spaces.Discrete(3)}, "Unbounded": {"action": Box(-np.inf, np.inf, (2,))},
    "Whole": {"action": Box(0, 5, (2,), np.int64)},
}.items():
    gymnasium.register(f"{name}-v0", Other, kwargs=kwargs)
'''
NAME = "gym:hidden_world:Hidden-v0"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The module `hidden_world`, in a folder that is the working directory for these tests."""
    folder, before = tmp_path_factory.mktemp("own"), os.getcwd()
    (folder / "hidden_world.py").write_text(HIDDEN)
    (folder / "my_worlds.py").write_text(PAGE.split("```python\n")[1].split("```")[0])
    os.chdir(folder)
    envs.task("my_worlds:slide")
    yield folder
    os.chdir(before)
    registered._ENTRIES.pop("slide")
    sys.path[:] = [place for place in sys.path if place != str(folder)]
    for name in ("hidden_world", "my_worlds"):
        sys.modules.pop(name, None)


def played(env, keys, actions):
    """Episodes side by side: keys [E], actions [L, E, A] -> obs [L + 1, E, S], rewards and done [L, E]."""

    def step(state, action):
        after = jax.vmap(env.step)(state, action)
        return after, (after.obs, after.reward, after.done)

    def run(keys, actions):
        first = jax.vmap(env.reset)(keys)
        obs, rewards, done = jax.lax.scan(step, first, actions)[1]
        return jnp.concatenate([first.obs[None], obs]), rewards, done

    return [np.asarray(x) for x in jax.jit(run)(keys, actions)]


def gymnasium_episode(name, key, actions):
    """The same of one episode by Gymnasium alone, to its end: obs [l + 1, S], rewards [l], how it ended."""
    env = gymnasium.make(name)
    low, high = env.action_space.low, env.action_space.high
    obs, rewards = [env.reset(seed=int(seed_of(key)))[0].copy()], []
    for action in np.asarray(actions, np.float64):
        after, reward, ended, cut, _ = env.step((low + (action + 1) / 2 * (high - low)).astype(np.float32))
        obs.append(after.copy())  # some write the next one into the same array
        rewards.append(reward)
        if ended or cut:
            break
    return np.float32(obs), np.float32(rewards), (ended, cut)


# --- Gymnasium ---


@pytest.mark.parametrize("name", ["Pendulum-v1", "hidden_world:Hidden-v0", "hidden_world:Hidden-shares-v0"])
def test_a_rollout_is_gymnasiums(name, world):
    """Starts, observations, rewards and ends, number by number; past its end an episode stands still and earns 0."""
    env = envs.make(f"gym:{name}")
    length = env.task.episode_length
    assert (env.backend, length) == ("gymnasium", 200 if name == "Pendulum-v1" else 12)
    keys = jax.random.split(jax.random.key(3), 6)
    actions = jax.random.uniform(jax.random.key(4), (length, 6, env.action_size), minval=-1.0, maxval=1.0)
    obs, rewards, done = played(env, keys, actions)
    ends = 0
    for e in range(6):
        wanted, paid, (ended, cut) = gymnasium_episode(name, keys[e], actions[:, e])
        last = len(paid)
        np.testing.assert_allclose(obs[: last + 1, e], wanted, rtol=0, atol=1e-6)
        np.testing.assert_allclose(rewards[:last, e], paid, rtol=0, atol=1e-6)
        assert not rewards[last:, e].any() and (obs[last:, e] == obs[last, e]).all()
        assert done[:, e].tolist() == [0] * (last - ended) + [1] * (length - last + ended)  # a time limit is no end
        assert cut == (last == length and not ended)
        ends += ended
    assert ends == 0 if name == "Pendulum-v1" else 0 < ends < 6
    again = played(env, keys, actions)  # whatever ran before, a rollout is a function of its keys
    assert all((x == y).all() for x, y in zip(again, (obs, rewards, done), strict=True))


def test_actions_reach_both_bounds_of_the_space(world):
    scaled = envs.make(NAME).pool._scaled
    np.testing.assert_array_equal(scaled(np.float32([-1, 1])), np.float32([-1.0, 2.5]))
    np.testing.assert_array_equal(scaled(np.float32([1, -1])), np.float32([1.5, 2.0]))
    np.testing.assert_array_equal(scaled(np.float32([0, 0])), np.float32([0.25, 2.25]))


def test_episodes_that_begin_anew_where_one_ends(world, monkeypatch):
    """As wurl_sac.py does it without diversity: every episode is Gymnasium's from its own reset on.

    Nothing else is reset: once for what a start shows, and once for the environment that goes on from it.
    """
    begin, resets = gymnasium_pool._begin, []
    monkeypatch.setattr(gymnasium_pool, "_begin", lambda *args: resets.append(args) or begin(*args))
    args = wurl_sac.Args(task=NAME, hidden_sizes=(4,), random=True)
    env, observe = envs.make(NAME), lambda x: x
    actor = wurl_sac.actor_net(args, env.action_size).init(jax.random.key(0), jnp.zeros((1, 2)))
    steps = jax.jit(lambda a, k: wurl_sac.rollout(a, k, env, args, observe, 3, 40, random=True, restart=True))
    steps = jax.tree.map(np.asarray, steps(actor, jax.random.key(1)))
    t, ends = steps.transition, steps.terminals
    assert ends.sum() > 3 and steps.alive.all()
    assert len(resets) <= 2 * (3 + ends.sum())
    assert (np.abs(t.next_observations[..., 0]) > 1).tolist() == ends.tolist()
    assert (t.observations[:, 1:][~ends[:, :-1]] == t.next_observations[:, :-1][~ends[:, :-1]]).all()
    assert (np.abs(t.observations[:, 1:][ends[:, :-1]]) < 1).all()  # a start, not where the last one ended
    np.testing.assert_allclose(
        t.rewards[0], (-np.abs(t.next_observations[0, :, 0]) + 0.0225 + 0.0025 * t.actions[0, :, 1]), atol=1e-5
    )
    assert (t.terminals > 0.5).tolist() == ends.tolist()


def test_a_state_is_stepped_once_but_a_start_as_often_as_one_likes(world):
    env = envs.make(NAME)
    step, start = jax.jit(env.step), env.reset(jax.random.key(0))
    one, other = step(start, jnp.ones(2)), step(start, -jnp.ones(2))
    same = step(start, jnp.ones(2))
    assert (one.obs == same.obs).all() and not (one.obs == other.obs).all()
    step(one, jnp.ones(2))
    with pytest.raises((RuntimeError, ValueError), match="after 1 steps was stepped a second time"):
        step(one, jnp.ones(2)).obs.block_until_ready()


def test_more_episodes_than_environments(world):
    """Kept for later, an episode may lose its environment to newer ones; it never goes on with another's state."""
    env = envs.make(NAME)
    step, keys = jax.jit(env.step), jax.random.split(jax.random.key(0), gymnasium_pool.FEWEST + 4)
    old = [step(env.reset(key), jnp.zeros(2)) for key in keys]
    assert len(env.pool.made) == gymnasium_pool.FEWEST + 1  # and one for resets
    step(old[-1], jnp.zeros(2)).obs.block_until_ready()
    with pytest.raises((RuntimeError, ValueError), match="or kept while many other episodes ran"):
        step(old[0], jnp.zeros(2)).obs.block_until_ready()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gym:CartPole-v1", r"its actions are Discrete\(2\)"),
        ("gym:hidden_world:Image-v0", r"its observations are Box\(-1.0, 1.0, \(2, 2\), float32\)"),
        ("gym:hidden_world:Dict-v0", r"its observations are Dict\('x'"),
        ("gym:hidden_world:Discrete-v0", r"its actions are Discrete\(3\)"),
        ("gym:hidden_world:Unbounded-v0", r"its actions are Box\(-inf, inf, \(2,\), float32\).*finite bounds"),
        ("gym:hidden_world:Whole-v0", r"its actions are Box\(0, 5, \(2,\), int64\).*real numbers"),
        ("gym:hidden_world:Hidden-seed-v0", "two resets with one seed begin differently"),
        ("gym:Nowhere-v0", "cannot be made: NameNotFound"),
        ("gym:Pendulum", "name its version, 'gym:Pendulum-v1'"),
        ("gym:Pendulum-v0", "cannot be made"),
        ("gym:nowhere_at_all:X-v0", "no module 'nowhere_at_all', neither installed nor in"),
        ("nowhere_at_all:x", "no module 'nowhere_at_all'"),
        ("hidden_world:x", "hidden_world registers no 'x'"),
        ("broken_world:x", "importing broken_world ended with ZeroDivisionError: division by zero"),
        ("needy_world:x", "importing needy_world ended with ModuleNotFoundError: No module named 'not_there'"),
    ],
)
def test_what_is_no_world_is_named_with_its_space(name, says, world):
    (world / "broken_world.py").write_text("1 / 0")
    (world / "needy_world.py").write_text("import not_there")
    for find in (envs.task, envs.make):
        with pytest.raises(envs.InputError, match=says) as refused:
            find(name)
        assert str(refused.value).startswith(f"'{name}'") and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("raises", "its step raised RuntimeError: the motor is on fire"),
        ("nan", "step 1 returned the reward nan"),
        ("cuts", "cut an episode off .* after 5 steps, before its limit of 12: .* episode_length=5"),
    ],
)
def test_what_an_environment_does_wrong_later_is_one_line(fault, says, world, monkeypatch, capsys):
    """The script ends with it, without a traceback and without jax's own."""
    env = envs.make(f"gym:hidden_world:Hidden-{fault}-v0")

    def main(args):
        played(env, jax.random.split(jax.random.key(0), 2), jnp.zeros((9, 2, 2)))

    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.setattr("runner.flags.listen", lambda again: None)
    with pytest.raises(SystemExit):
        runner.launch(main, udg_select.Args)
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"script.py: error: 'gym:hidden_world:Hidden-{fault}-v0'") and "\n" not in said
    with pytest.raises(envs.InputError, match=says):
        raise envs.InputError(said)
    if fault == "cuts":  # the remedy works
        env = envs.make(f"gym:hidden_world:Hidden-{fault}-v0", episode_length=5)
        keys, actions = jax.random.split(jax.random.key(0), 2), -0.5 * jnp.ones((6, 2, 2))
        assert env.task.options == {"episode_length": 5} and not played(env, keys, actions[:5])[2].any()
        with pytest.raises(Exception, match=r"after 5 steps and was stepped on.*--episode-length 5"):
            jax.block_until_ready(played(env, keys, actions))  # no rows are made up behind the end


def test_a_backend_and_options_it_has_not(world):
    for name in (NAME, "my_worlds:slide"):
        with pytest.raises(envs.InputError, match=r"has one back end.*leave --backend out"):
            envs.make(name, "mjx")
        with pytest.raises(envs.InputError, match="no option gear"):
            envs.make(name, gear=3)
        with pytest.raises(envs.InputError, match="do not show the whole state of its world"):
            envs.make(name).from_observation(jnp.zeros(2))


# --- a registered environment ---


class Counter:
    """Gymnax's interface: counts its steps, whose noise its key draws; ends at its limit, and beyond 1."""

    @dataclasses.dataclass(frozen=True)
    class Params:
        max_steps_in_episode: int = 7

    default_params = Params()
    Space = type("Space", (), {})

    def action_space(self, params):
        space = self.Space()
        space.low, space.high, space.shape = -2.0, 4.0, ()
        return space

    def observation_space(self, params):
        space = self.Space()
        space.low, space.high, space.shape = -1.0, 1.0, (2,)
        return space

    def reset_env(self, key, params):
        return jnp.zeros(2), (jnp.int32(0), jnp.float32(0))

    def step_env(self, key, state, action, params):
        time, x = state[0] + 1, state[1] + 0.1 * action
        obs = jnp.stack([x, jax.random.uniform(key)])
        return obs, (time, x), x, (time >= params.max_steps_in_episode) | (x > 1), {}


class Plain:
    """A gymnax environment whose reset has no other name."""

    def __init__(self, inner):
        for name in ("default_params", "action_space", "observation_space", "step_env"):
            setattr(self, name, getattr(inner, name))
        self.reset = inner.reset_env


@pytest.fixture
def entries(monkeypatch, world):
    monkeypatch.setattr(registered, "_ENTRIES", dict(registered._ENTRIES))


def test_gymnaxs_interface(entries):
    """Actions meet the space's bounds, the limit is the task's and no end, every step has its own random numbers."""
    envs.register("counter", Counter)
    env = envs.make("counter")
    assert (env.task.episode_length, env.observation_size, env.action_size) == (7, 2, 1)
    keys = jax.random.split(jax.random.key(0), 2)
    obs, rewards, done = played(env, keys, jnp.tile(jnp.array([[[-1.0], [1.0]]]), (9, 1, 1)))
    np.testing.assert_allclose(obs[1:, :, 0], np.outer(np.arange(1, 10), [-0.2, 0.4]), atol=1e-6)
    np.testing.assert_allclose(rewards, obs[1:, :, 0])
    assert not done[:, 0].any() and done[:, 1].tolist() == [0, 0] + [1] * 7
    assert len(np.unique(obs[1:, :, 1])) == 18
    envs.register("counter", lambda: Plain(Counter()))  # without reset_env
    np.testing.assert_array_equal(played(envs.make("counter"), keys, jnp.zeros((1, 2, 1)))[0][0], obs[0])


def test_functions_that_are_given_pay_and_end(entries, world):
    """The same ones step, relabel and tell a model; feature and reference are the task's."""
    slide = registered._entry("my_worlds:slide")
    envs.register(
        "other", slide.make, episode_length=30, reward=lambda s, a, s2: s2[..., 0] - s[..., 0] + 0 * a[..., 0],
        terminal=lambda s2: s2[..., 0] > 0.2, feature=lambda s2: s2[..., :1], feature_names=("x",), reference=(0, 2),
        angles=(1,),
    )  # fmt: skip
    env = envs.make("other")
    obs, rewards, done = played(env, jax.random.split(jax.random.key(0), 3), jnp.ones((30, 3, 1)))
    np.testing.assert_allclose(rewards, np.diff(obs[..., 0], axis=0), atol=1e-6)
    assert (done > 0.5).tolist() == (obs[1:, :, 0] > 0.2).tolist() and done.any()
    flat = [x.reshape(-1, x.shape[-1]) for x in (obs[:-1], np.ones((30, 3, 1), np.float32), obs[1:])]
    assert env.task.model_reward(*flat).tolist() == rewards.reshape(-1).tolist()
    assert env.task.model_terminal(flat[2]).tolist() == (done.reshape(-1) > 0.5).tolist()
    assert env.task.feature_names == ("x",) and env.task.normalized_score(1) == 50 and env.task.angles == (1,)
    with pytest.raises(envs.InputError, match="cannot be registered: this package has a world or task of that name"):
        envs.register("ant-angle-7", slide.make)
    with pytest.raises(envs.InputError, match="'a:b' cannot be registered: use letters"):
        envs.register("a:b", slide.make)


def test_two_modules_that_use_one_name(entries, world):
    """Each has its own under `module:name`, whichever came last; the name alone is refused."""
    source = (world / "my_worlds.py").read_text()
    twin = lambda length: source.replace(
        '"slide", Slide, episode_length=100', f'"twin", Slide, episode_length={length}'
    )
    (world / "right").mkdir()
    for file, text in {
        "left.py": twin(5),
        "right/__init__.py": "import right.worlds",  # a package registers in one of its modules
        "right/worlds.py": twin(6),
        "through.py": "import far",  # and a module in another that it imports
        "far.py": twin(7),
    }.items():
        (world / file).write_text(text)
    lengths = {"left": 5, "right": 6, "right.worlds": 6, "through": 7, "far": 7}
    for _ in range(2):
        assert {name: envs.task(f"{name}:twin").episode_length for name in lengths} == lengths
    assert envs.make("left:twin").task.episode_length == 5
    for find in (envs.task, envs.make):
        with pytest.raises(envs.InputError, match=r"^'twin' is registered by 3 modules: say which, .*left:twin"):
            find("twin")
    with pytest.raises(envs.InputError, match=r"my_worlds registers no 'twin'.*my_worlds:slide, left:twin"):
        envs.task("my_worlds:twin")
    assert envs.task("slide").episode_length == 100  # of one module alone
    envs.register("own", Counter)
    envs.register("own", Counter, episode_length=3)  # of the same module: it takes the first one's place
    assert envs.task("own").episode_length == 3
    for name in lengths:
        sys.modules.pop(name)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: 1 / 0, "cannot be made: ZeroDivisionError"),
        (lambda: type("W", (), {"step_env": 1})(), "cannot be made: AttributeError.*default_params"),
        (object, "has no reset, step, observation_size, action_size: it needs brax's interface"),
        (lambda: type("W", (), {"observation_size": 3, "action_size": 1})(), "has no reset, step"),
    ],
)
def test_an_environment_that_is_none(make, says, entries):
    envs.register("none", make)
    with pytest.raises(envs.InputError, match=says):
        envs.task("none")


def test_the_pages_example_runs_from_another_folder(world):
    """In a process of its own, as its reader would: the script finds the module in the working directory."""
    source = (world / "my_worlds.py").read_text()
    assert source.count("\n") <= 30
    flags = "--task my_worlds:slide --num-policies 2 --num-updates 40 --updates-per-step 0.1 --chunk 20 --num-envs 1"
    flags += " --warmup-steps 100 --hidden-sizes 8 --eval-every 40 --eval-episodes 2 --objective none --out chained"
    script = [sys.executable, str(ROOT / "wurl_sac.py"), *flags.split()]
    about = {"cwd": world, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(script, env={**os.environ, "PYTHONPATH": str(ROOT)}, **about)
    assert done.returncode == 0, done.stderr[-2000:]
    buffer = envs.buffers.load(world / "chained/buffers/policy_00.npz")
    assert buffer.metadata["task"] == "my_worlds:slide" and buffer.metadata["reward_kind"] == "task"
    np.testing.assert_allclose(buffer["rewards"], -np.abs(buffer["next_observations"][:, 0] - 1), atol=1e-6)
    assert (buffer["terminals"] == (np.abs(buffer["next_observations"][:, 0]) > 2)).all()


# --- data, selection, learners ---


@pytest.fixture(scope="module")
def collected(world):
    """name -> the folder of a wurl_sac.py run of some seconds in that world."""

    @functools.cache
    def run(name):
        args = wurl_sac.Args(**{
            **TINY_WURL, "task": name, "num_envs": 3, "out": str(world / "runs" / name.replace(":", "-")),
            "own_weight": 0.0, "episode_length": 12, "num_updates": 20,
        })  # fmt: skip
        wurl_sac.main(args)
        return args

    return run


@pytest.fixture(scope="module")
def selected(collected, world):
    """name -> a file for learners, of all rows."""

    @functools.cache
    def run(name):
        args = collected(name)
        out = world / "udg" / name.replace(":", "-")
        udg_select.main(udg_select.Args(buffers=(args.out,), tasks=(name,), top=("all",), w1_points=0, out=str(out)))
        return out / name / "all.npz"

    return run


def test_wurl_sac_collects_what_gymnasium_would(collected):
    """Every row of Pendulum: set to what it shows, Gymnasium's own step comes to the same observation and reward."""
    buffer = envs.buffers.load(Path(collected("gym:Pendulum-v1").out) / "buffers/policy_01.npz")
    env = gymnasium.make("Pendulum-v1").unwrapped
    env.reset()
    columns = [buffer[key] for key in ("observations", "actions", "next_observations", "rewards")]
    for obs, action, after, reward in list(zip(*columns, strict=True))[::7]:
        env.state = np.array([np.arctan2(obs[1], obs[0]), obs[2]])
        found, paid, *_ = env.step(2 * action)
        np.testing.assert_allclose(found, after, atol=2e-4)
        np.testing.assert_allclose(paid, reward, atol=2e-3)
    assert not buffer["terminals"].any() and (buffer["episode_lengths"] == 12).all()
    assert buffer.metadata["reward_kind"] == "task" and len(np.unique(buffer["observations"][::12], axis=0)) > 10


def test_a_resumed_run_is_the_whole_one(collected, world, monkeypatch):
    """Killed in the middle; its environments are gone, its keys are not."""
    args = collected(NAME)
    cut = dataclasses.replace(args, out=str(world / "cut"))

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(wurl_sac.diversity, "show_evaluation", stop)
        wurl_sac.main(cut)
    gymnasium_pool.spaces.cache_clear()
    wurl_sac.main(dataclasses.replace(cut, resume=True))
    for k in range(args.num_policies):
        one, other = (envs.buffers.load(Path(x.out) / f"buffers/policy_{k:02d}.npz") for x in (args, cut))
        assert one.metadata["sha256"] == other.metadata["sha256"]
        assert one["terminals"].any() and one["timeouts"].any()


def learnt(name, world_name, selected, world):
    """The shortest run of a learner -> its folder, its result and its evaluations."""
    args = tiny(name, dataset=str(selected(world_name)), task=world_name, out=str(world / f"{name}-{len(world_name)}"))
    args = dataclasses.replace(args, min_entries=10) if name == "qdq" else args
    result = importlib.import_module(name).main(args)
    log = [json.loads(line) for line in (Path(args.out) / "log.jsonl").read_text().splitlines()]
    return args, result, [line["eval/return"] for line in log if "eval/return" in line]


@pytest.mark.parametrize(
    ("name", "world_name"), [*((name, NAME) for name in LEARNERS if name != "cped"), ("mopo", "my_worlds:slide")]
)
def test_every_learner_evaluates_in_it(name, world_name, selected, world, monkeypatch):
    monkeypatch.setattr(runner.ends, "STEPS", 300)
    _, result, returns = learnt(name, world_name, selected, world)
    assert np.isfinite(returns).all() and result["last"] == pytest.approx(returns[-1], rel=1e-4)
    assert max(returns) < 0  # both worlds pay less than nothing


def test_a_policys_evaluation_is_what_it_earns_in_gymnasium(selected, world):
    """CPED's policy.npz, played by NumPy and Gymnasium alone, from the same starts."""
    args, _, returns = learnt("cped", NAME, selected, world)
    policy = policies.load(Path(args.out) / "policy.npz")
    starts, total = jax.random.split(runner.evaluation_keys(args)[0], args.eval_episodes), 0.0
    for key in starts:
        env, over = gymnasium.make(NAME.removeprefix("gym:")), False
        obs, _ = env.reset(seed=int(seed_of(key)))
        while not over:
            action = policy(np.float32(obs))
            obs, reward, ended, cut, _ = env.step(np.float32([0.25 + 1.25 * action[0], 2.25 + 0.25 * action[1]]))
            total, over = total + reward, ended or cut
    assert returns[-1] == pytest.approx(total / len(starts), abs=1e-3)


def test_an_evaluation_earns_what_gymnasium_pays(world):
    env, keys = envs.make(NAME), jax.random.split(jax.random.key(7), 5)
    act = lambda params, obs, key: jnp.tanh(obs * params)
    play = jax.jit(lambda params, starts, steps: runner.play(env, act, params, starts, steps))
    totals = play(jnp.float32([2.0, -1.0]), keys, jax.random.split(jax.random.key(0), 12))
    for e in range(5):
        raw, total, over = gymnasium.make(NAME.removeprefix("gym:")), 0.0, False
        obs, _ = raw.reset(seed=int(seed_of(keys[e])))
        while not over:
            action = np.tanh(np.float32(obs) * np.float32([2, -1]))
            obs, reward, ended, cut, _ = raw.step(np.float32([0.25 + 1.25 * action[0], 2.25 + 0.25 * action[1]]))
            total, over = total + reward, ended or cut
        assert totals[e, -1] == pytest.approx(total, abs=1e-4)


def test_no_file_imports_a_module(selected, world, tmp_path, monkeypatch):
    """Whoever sends a file would choose what runs: it must be named, or imported already."""
    (world / "stranger.py").write_text("raise SystemExit('it ran')")
    buffer = envs.buffers.load(selected("my_worlds:slide"))
    for name in ("stranger:x", "gym:stranger:X-v0"):
        path = tmp_path / "file.npz"
        envs.buffers.save(path, buffer.arrays, {**buffer.metadata, "env": name, "task": name})
        with pytest.raises(envs.InputError, match=rf"no file may import.*Remedy: add --task {name}"):
            envs.buffers.load_task(path, None)
        with pytest.raises(envs.InputError, match="layout"):
            udg_select.open_sources([str(path)])
        envs.buffers.save(path, buffer.arrays, {**buffer.metadata, "env": "ant", "task": name})
        done = subprocess.run(
            [sys.executable, "-m", "envs.buffers", "inspect", str(path)], cwd=world, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0 and "it ran" not in done.stdout + done.stderr


# --- MOPO's ends ---


def test_mopos_ends_are_learnt(world, capsys):
    """Of a world that no function tells about: the classifier agrees with the rule on rows that it never saw."""
    rng, task = np.random.default_rng(0), envs.task(NAME)
    x = rng.uniform(-1.3, 1.3, (4_000, 2)).astype(np.float32)
    arrays = {"next_observations": x, "terminals": np.abs(x[:, 0]) > 1}
    data = envs.buffers.Buffer(arrays, {}, "file.npz")
    found = runner.learn_end(task, data).model_terminal
    assert abs(int(found(jnp.asarray(x)).sum()) - arrays["terminals"].sum()) <= 1  # as often as in the data
    fresh = jnp.asarray(rng.uniform(-1.3, 1.3, (4_000, 2)).astype(np.float32))
    assert (found(fresh) == (jnp.abs(fresh[:, 0]) > 1)).mean() > 0.98
    assert "held-out terminals" in capsys.readouterr().out
    again = runner.learn_end(task, data).model_terminal
    assert (found(fresh) == again(fresh)).all()
    for least, kind in ((9, "9 terminals"), (4_000, "0 other rows")):
        few = dataclasses.replace(data, arrays={**arrays, "terminals": np.arange(4_000) < least})
        with pytest.raises(envs.InputError, match=f"{kind} among 4000 rows are too few"):
            runner.learn_end(task, few)
    noise = dataclasses.replace(data, arrays={**arrays, "terminals": rng.uniform(size=4_000) < 0.02})
    with pytest.raises(envs.InputError, match="the next observation does not tell it"):
        runner.learn_end(task, noise)
    known = envs.task("hopper")
    assert runner.learn_end(known, data) is known


def test_data_without_ends_have_a_model_without(selected):
    buffer, task = envs.buffers.load_task(selected("gym:Pendulum-v1"), None)
    assert not buffer["terminals"].any() and task.model_terminal is never
    with pytest.raises(envs.InputError, match="when 'gym:Pendulum-v1' ends is its own"):
        envs.task("gym:Pendulum-v1").model_terminal(jnp.zeros((1, 3)))


# --- a reward of one's own ---

REWARDS = """
import numpy as np

def upright(s, a, s2):
    return s2[:, 0] - 0.1 * (a**2).sum(-1)

def couples(s, a, s2):
    return s2[:, 0] - (a**2).sum()

def shape(s, a, s2):
    return s2

def raises(s, a, s2):
    return s2[:, 99]

def writes(s, a, s2):
    s2[:] = 0
    return s2[:, 0]

def nan(s, a, s2):
    return np.where(s2[:, 0] > -0.5, s2[:, 0], np.nan)

def words(s, a, s2):
    return np.full(len(s), "x")
"""


@pytest.fixture(scope="module")
def rewards(world):
    (world / "mine.py").write_text(REWARDS)
    (world / "torn.py").write_text("def f(:")
    return world / "mine.py"


@pytest.fixture(scope="module")
def relabelled(rewards, collected, world):
    """A file for learners in Pendulum, paid by mine.py:upright."""
    out, name = world / "udg-own", "gym:Pendulum-v1"
    udg_select.main(udg_select.Args(
        buffers=(collected(name).out,), tasks=(name,), task_reward=f"{rewards}:upright", w1_points=0, out=str(out),
    ))  # fmt: skip
    return out / name / "top1.npz"


def test_a_reward_of_ones_own(relabelled, rewards):
    buffer = envs.buffers.load(relabelled)
    wanted = buffer["next_observations"][:, 0] - 0.1 * (buffer["actions"] ** 2).sum(-1)
    np.testing.assert_allclose(buffer["rewards"], wanted, atol=1e-6)
    about = buffer.metadata["reward_function"]
    assert about == {"name": "mine.py:upright", "sha256": envs.rewards.read(f"{rewards}:upright").sha256}


def test_an_evaluation_pays_the_datas_own_reward(relabelled, rewards, world):
    """In Gymnasium's world, and in one of ours inside the jitted program."""
    args = tiny("cped", dataset=str(relabelled), task_reward=f"{rewards}:upright", out=str(world / "paid"))
    _, task = runner.open_task("cped", args, None)
    for env in (envs.make(task), envs.make(envs.rewards.paid_by(envs.task("ant"), f"{rewards}:upright"))):
        actions = jax.random.uniform(jax.random.key(0), (5, 3, env.action_size), minval=-1.0, maxval=1.0)
        obs, paid, _ = played(env, jax.random.split(jax.random.key(1), 3), actions)
        np.testing.assert_allclose(paid, obs[1:, :, 0] - 0.1 * (actions**2).sum(-1), atol=1e-5)
    assert runner.open_task("cped", args, None)[1].has_reward


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("", "its rewards are of the function 'mine.py:upright'.*add --task-reward"),
        ("mine.py:nan", "rewards are of 'mine.py:upright', or its file has changed.*Remedy: relabel it"),
        ("changed/mine.py:upright", "or its file has changed since"),
        ("mine.py", "is not file.py:function"),
    ],
)
def test_a_learner_without_that_function_is_refused(word, says, relabelled, world):
    (world / "changed").mkdir(exist_ok=True)
    (world / "changed" / "mine.py").write_text(REWARDS.replace("0.1", "0.2"))
    args = tiny("cped", dataset=str(relabelled), task_reward=word, out=str(world / "never"))
    with pytest.raises(envs.InputError, match=says):
        runner.open_task("cped", args, None)


def test_a_function_for_data_that_none_made(selected, rewards, world):
    args = tiny(
        "cped", dataset=str(selected("gym:Pendulum-v1")), task_reward=f"{rewards}:upright", out=str(world / "x")
    )
    with pytest.raises(envs.InputError, match=r"the file's rewards are of no function.*or leave --task-reward out"):
        runner.open_task("cped", args, None)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("mine.py:couples", "row 0 earns .* among others and .* alone. Remedy: sum over the last axis only"),
        ("mine.py:shape", r"returned float32 of shape \[\d+, 3\] for \d+ rows. Remedy: one number a row"),
        ("mine.py:raises", "raised IndexError: index 99 is out of bounds"),
        ("mine.py:writes", "raised ValueError: assignment destination is read-only"),
        ("mine.py:nan", r"returned nan in row \d+ of \d+"),
        ("mine.py:words", "returned <U1 of shape"),
        ("mine.py:absent", "has no function 'absent', only upright, couples"),
        ("nowhere.py:f", "there is no file nowhere.py"),
        ("torn.py:f", "torn.py ended with SyntaxError"),
        ("mine", "is not file.py:function"),
    ],
)
def test_a_reward_that_cannot_pay_is_refused_before_anything_is_written(word, says, rewards, collected, tmp_path):
    out, source = tmp_path / "out", collected("gym:Pendulum-v1").out
    with pytest.raises(envs.InputError, match=f"--task-reward {word}.*{says}"):
        udg_select.main(udg_select.Args(
            buffers=(source,), tasks=("gym:Pendulum-v1",), task_reward=word, w1_points=0, out=str(out),
        ))  # fmt: skip
    assert not [path for path in out.rglob("*") if path.is_file()]


def test_the_cause_of_an_error_in_a_callback():
    assert host.cause(RuntimeError("INTERNAL: ...\nenvs.errors.InputError: 'x': it broke\n")) == "'x': it broke"
    assert host.cause(RuntimeError("INTERNAL: out of memory")) == ""
