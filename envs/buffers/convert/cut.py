"""Rows in the order of time, cut into trajectories, each row with its true successor or dropped and counted.

Every row is judged by its own numbers (reach.py), since flags lie: what stands behind an end is a new episode's first
row, or, from a vector environment of Gymnasium 1, a reset that was recorded as a step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from envs.buffers.convert import common
from envs.buffers.convert.reach import UNFIT_SHARE, Body, unreachable

SHARE = 0.9  # of the rows behind ends that must look like resets, for all of them to be taken for resets
RARE = 0.05  # rewards of exactly 0 are rarer than this, or say nothing
FAR, FURTHER = 0.99, 2.0  # resets move some number on by more than so many times this quantile of what steps do

LOST = "its next observation is not in the file"
RESET_ROW = "a reset recorded as a step (Gymnasium's next-step autoreset)"
OTHER_STATE = "end of an episode, next_observations holds another state"
TELEPORT = "next_observations holds a state that no step reaches"


class Cut(NamedTuple):
    """Where trajectories end. All (N,): ends, valid (rows with a true successor), terminals, next_observations."""

    ends: np.ndarray
    valid: np.ndarray
    terminals: np.ndarray
    next_observations: np.ndarray
    rows_dropped: dict[str, int]


def count_steps(ends: np.ndarray) -> np.ndarray:
    """Which step of its trajectory a row is, from 0: (N,)."""
    rows = np.arange(len(ends))
    starts = np.concatenate([[0], np.flatnonzero(ends) + 1])
    return rows - starts[np.searchsorted(starts, rows, side="right") - 1]


def _ways(observations: np.ndarray, following: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """How far each row moves, its number that goes furthest: (N,), in FAR quantiles of what the steps (N,) do."""
    way = np.abs(following.astype(np.float64) - observations)
    return (way / (np.quantile(way[steps], FAR, axis=0) + 1e-9) if steps.any() else way).max(axis=1)


def _reset_rows(arrays, flagged: np.ndarray, bad: np.ndarray | None) -> np.ndarray:
    """Rows (N,) behind an end that lead from its last state to a new start: no steps, though recorded as steps.

    bad: rows that no step leads from, None where that is not known: then a reset is told by its reward of 0, or by
    moving further than steps do.
    """
    observations, rewards = arrays["observations"], arrays["rewards"]
    given = arrays.get("next_observations")
    behind = np.zeros(len(flagged), bool)
    behind[1:] = flagged[:-1] & ~flagged[1:]
    if given is not None:
        behind[1:] &= common.same_rows(given[:-1], observations[1:])
    rows = np.flatnonzero(behind)
    if given is None:
        rows = rows[rows < len(behind) - 1]  # where the last row leads to is not in the file
    if not len(rows):
        return np.zeros_like(behind)
    unpaid = rewards[rows] == 0
    if bad is not None:
        confirmed = bad[rows] & ~bad[rows - 1]
        return behind & (bad | (rewards == 0)) if confirmed.mean() >= SHARE else np.zeros_like(behind)
    told = unpaid.mean() >= SHARE and (rewards[~behind] == 0).mean() < RARE
    following = np.roll(observations, -1, axis=0) if given is None else given
    inner = ~(behind | flagged) & (np.arange(len(behind)) < len(behind) - 1)
    way = _ways(observations, following, inner)
    follows = inner.any() and np.median(way[rows - 1]) <= FURTHER  # the row behind an end is where that end led to
    if given is None:
        told = told and follows  # else it may be a first step, which some worlds pay nothing for
    told = told or (len(rows) > 1 and follows and np.median(way[rows]) > FURTHER)
    return behind if told else np.zeros_like(behind)


def _held(arrays, ends: np.ndarray, hard: np.ndarray, steps: np.ndarray, bad: np.ndarray | None) -> np.ndarray:
    """Those of the ends (N,) whose next_observations hold another state: the next episode's first, or their own.

    The data may also go on behind an end, as behind a goal. Then the next row is where its step led, known for the
    body or, where that is not known, by going no further than steps do: terminals and cuts apart, each kind together.
    An own state is a stopgap where nearly all cuts have it and no step does. At a terminal it does no harm.
    """
    observations, given = arrays["observations"], arrays["next_observations"]
    last = np.arange(len(ends)) == len(ends) - 1
    held = ends & (given == np.roll(observations, -1, axis=0)).all(axis=1)
    if bad is not None:
        held &= bad | last
    else:
        way = _ways(observations, given, steps)
        for kind in (held & hard, held & ~hard):
            if kind.any() and np.median(way[kind]) <= FURTHER:
                held &= ~kind | (last & (way > FURTHER))
    own, cuts = (given == observations).all(axis=1), ends & ~hard
    if cuts.any() and own[cuts].mean() >= SHARE and not own[steps].any():
        held |= own & cuts
    return held


def _time_limits(hard: np.ndarray, ends: np.ndarray, limit: int | None, after, terminal) -> np.ndarray:
    """Terminals (N,) on the last step that a time limit allows, where the task (if known) sees no end."""
    if limit is None:
        return np.zeros_like(hard)
    found = hard & (count_steps(ends) == limit - 1)
    if terminal is not None and found.any():
        found[found] = ~np.asarray(terminal(after[found]), bool)
    return found


def cut(
    path: Any,
    arrays: dict[str, np.ndarray],
    notes: list[str],
    *,
    body: Body | None = None,
    limit: int | None = None,
    terminal: Callable | None = None,
    ends_at_terminals: bool = True,
) -> Cut:
    """Cut rows into trajectories and find each row's true successor.

    Args:
        arrays: observations, rewards, terminals, and where the file has them timeouts and next_observations.
        notes: what a user should know is added here.
        body: of the robot, where it is known. limit: steps after which episodes are cut, where it is known.
        terminal: observed next observations -> where the task ends, None where it is not known.
        ends_at_terminals: False in mazes, where terminals mark the goal and the robot walks on.

    Raises: InputError where the rows are in no order of time.
    """
    observations, terminals = arrays["observations"], arrays["terminals"]
    given, following = arrays.get("next_observations"), np.roll(observations, -1, axis=0)
    successor = following if given is None else given
    count, last = len(terminals), np.arange(len(terminals)) == len(terminals) - 1
    none = np.zeros(count, bool)
    hard = terminals.copy() if ends_at_terminals else none.copy()
    timeouts = arrays.get("timeouts", none)

    bad = None
    if body is not None:
        bad = unreachable(observations, successor, body) & ~(last & (given is None))
        if (bad & ~hard & ~timeouts).mean() > UNFIT_SHARE:
            bad = None if given is not None else bad  # not what it is taken for: said by the check of the whole
    apart = none
    if given is not None:
        apart = ~common.same_rows(given, following) & ~last
    known = hard | timeouts
    resets = _reset_rows(arrays, known, bad)
    odd = (none if bad is None else bad) & ~known & ~resets
    if limit is not None and not timeouts.any():
        steps = count_steps(hard | apart | odd | resets)
        timeouts = (steps % limit == limit - 1) & ~hard
        why = "timeouts is False in every row" if "timeouts" in arrays else "the file marks no timeouts"
        notes += [f"{why}: episodes are cut after {limit} steps"] * bool(timeouts.any())
        resets |= _reset_rows(arrays, hard | timeouts, bad)
    unmarked = (apart | odd) & ~(hard | timeouts | resets)
    if unmarked.mean() > UNFIT_SHARE:
        problem = f"{100 * unmarked.mean():.0f} % of the rows inside episodes are not followed by their successor"
        raise common.fail(path, "observations", problem, "rows must be in the order of time: use the original file")
    late = _time_limits(hard, hard | timeouts | unmarked | resets, limit, successor, terminal)
    apart_flags = (arrays.get("timeouts", none) & ~arrays["terminals"])[:-1].any()  # so that the others are meant
    late &= terminal is not None or not apart_flags
    if late.any():
        notes.append(f"{int(late.sum())} terminals are the time limit of {limit} steps: taken as timeouts")
        terminals, hard, timeouts = terminals & ~late, hard & ~late, timeouts | late
    unflagged = unmarked & ~(odd & (given is not None))
    if unflagged.any():
        notes.append(f"{int(unflagged.sum())} ends of episodes carry no flag in the file: cut there")
    ends = hard | timeouts | unmarked | resets | last
    before_reset = np.append(resets[1:], False)
    if given is None:
        gone = ends & ~before_reset & ~resets
        lost = {
            f"terminal, {LOST}": gone & hard,
            f"timeout, {LOST}": gone & ~hard & timeouts,
            f"end without a flag, {LOST}": gone & ~hard & ~timeouts,
            RESET_ROW: resets,
        }
        following[last] = observations[last]
    else:
        held = _held(arrays, ends & ~resets & ~before_reset & ~odd, hard, ~(ends | resets), bad)
        jump = (none if bad is None else bad) & ~resets & ~held
        lost = {OTHER_STATE: held | (jump & (hard | timeouts)), TELEPORT: jump & ~(hard | timeouts), RESET_ROW: resets}
    valid = ~np.logical_or.reduce(list(lost.values()))
    if limit is not None:
        lengths = count_steps(ends)[ends & ~resets] + 1
        if (lengths > limit).any():
            notes.append(
                f"{int((lengths > limit).sum())} episodes are longer than the {limit} steps of this set, the longest "
                f"{lengths.max()}: is a flag missing, or another --episode-length right?"
            )
    over = np.flatnonzero(hard & valid)
    if terminal is not None and len(over) and (wrong := int((~np.asarray(terminal(successor[over]), bool)).sum())):
        notes.append(
            f"{wrong} of {len(over)} terminals are no end of this task, which goes on from there, and learners take a "
            "terminal for the end of all rewards: if they are time limits, make them timeouts, or import again with "
            "--episode-length"
        )
    if terminals.any() and not (terminals & valid).any():
        notes.append(
            "no terminal is left, since their rows are dropped, and no value function can learn where the task ends: "
            "give true next_observations, unless these were time limits"
        )
    dropped = {why: int(rows.sum()) for why, rows in lost.items() if rows.any()}
    return Cut(ends, valid, terminals, successor if given is not None else following, dropped)
