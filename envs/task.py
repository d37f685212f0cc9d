"""A task and a recorded step: the types that worlds, tasks and buffers share.

A task is pure arithmetic on recorded transitions, so one and the same function gives the reward while data is
collected, when a buffer is relabelled, and when a policy is evaluated. Functions take NumPy or JAX arrays with any
leading shape.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from envs.errors import InputError


class Transition(NamedTuple):
    """Recorded steps in a world's raw layout, any leading shape.

    observations, next_observations (..., S); actions (..., A) in [-1, 1];
    root_positions (..., 2): x, y (planar robots: x, z) before the step, in metres;
    root_velocities (..., 2): displacement over the step / dt, in m/s;
    goals (..., 2): mazes with a goal only;
    rewards, terminals (...): what a world with a reward and an end of its own said of the step (envs/own.py).
    """

    observations: Any
    actions: Any
    next_observations: Any
    root_positions: Any
    root_velocities: Any
    goals: Any = None
    rewards: Any = None
    terminals: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A task on a world. `reward`, `terminal`, `feature` take a raw Transition."""

    name: str
    env: str  # the world whose raw observations the functions take
    observation_size: int  # after `observe`
    env_observation_size: int  # raw
    action_size: int
    dt: float  # seconds per step
    episode_length: int  # steps of an episode when data is collected
    eval_length: int  # steps of an episode when a policy is evaluated; 0: it cannot be (envs.unknown)
    observe: Callable  # raw observations (..., S_world) -> (..., S)
    reward: Callable  # Transition -> (...,) float32
    terminal: Callable  # Transition -> (...,) bool: true termination after the step
    feature: Callable  # Transition -> (..., d) float32: where diversity is measured (next state)
    feature_names: tuple[str, ...]
    has_reward: bool = True
    model_reward: Callable | None = None  # (obs, actions, next obs), observed layout -> (...,)
    model_terminal: Callable = None  # observed next observations -> (...,) bool
    angles: tuple[int, ...] = ()  # columns of what `observe` gives: angles that can go round
    knows_end: bool = True  # False: the world's own end, which no function of the observations gives
    options: dict = dataclasses.field(default_factory=dict)
    reference: tuple[float, float] | None = None  # (random, expert) returns over eval_length
    paid_by: Any = None  # the user's own reward function (envs/rewards.py), where one pays

    def normalized_score(self, returns):
        """Return 100 (R - random) / (expert - random); InputError where no reference is known."""
        if self.reference is None:
            raise InputError(
                f"task '{self.name}' has no reference returns, so a score cannot be normalised: use the raw return"
            )
        random, expert = self.reference
        return 100.0 * (returns - random) / (expert - random)

    def normalized_spread(self, spread):
        """Return 100 spread / (expert - random), of a standard deviation or a difference: scaled, never shifted."""
        return self.normalized_score(spread) - self.normalized_score(0.0)
