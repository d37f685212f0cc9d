"""Actions of other projects on the scale of a buffer, [-1, 1]: clipped as the environment clipped them, or scaled."""

import numpy as np

from envs.buffers.convert import physics
from envs.buffers.convert.common import CLIPPED_SHARE
from envs.buffers.fields import ACTION_LIMIT, fail

OWN_SCALE = ("humanoid", "humanoid-v5")  # robots whose motors, and Gymnasium's actions, have another range than [-1, 1]
SCALE_ROWS = 256  # replayed on both scales


def settle_actions(
    actions: np.ndarray, source: str, notes: list[str], clip: bool = False, limit: float | None = None
) -> np.ndarray:
    """Actions (N, A) within [-1, 1], float64; what was done to them is added to the notes.

    clip: values beyond are samples that the environment clipped, as it does to those of a Gaussian policy. Without
    it a few stray ones are clipped and many are refused. limit: the environment's own, by which they are divided.
    Raises: InputError.
    """
    actions = actions.astype(np.float64)
    if limit is not None:
        if not 0 < limit < np.inf:
            raise fail(source, "actions", f"cannot be divided by {limit}", "give --action-limit a positive number")
        actions = actions / limit
        notes.append(f"actions were divided by their limit {limit:g}")
    beyond = (np.abs(actions) > ACTION_LIMIT).any(axis=1)
    if beyond.mean() > CLIPPED_SHARE and not clip:
        problem = f"reach {np.abs(actions).max():.3g}, {100 * beyond.mean():.0f} % of the rows are outside [-1, 1]"
        remedy = "where the environment clipped them, say --clip (clip=True); on another scale divide them by the "
        raise fail(source, "actions", problem, remedy + "environment's limit, --action-limit L (action_limit=L)")
    if beyond.any():
        share = f" ({100 * beyond.mean():.0f} %)" if clip else ""
        notes.append(f"actions of {int(beyond.sum())} rows{share} were outside [-1, 1] and are clipped")
    return np.clip(actions, -1.0, 1.0)


def fit_scale(columns: dict, state, env, layout: str, source: str, notes: list[str]) -> np.ndarray:
    """Actions of a robot whose motors have another range: from Gymnasium's scale, where the physics says so.

    columns: of the buffer, its actions among them; env: of the robot, or None. A file in our scale whose actions all
    lie within the motors' range is told apart by a replay on both scales.
    """
    actions = columns["actions"]
    half = None if env is None else np.asarray(env.engine.half)
    if half is None or np.allclose(half, 1.0) or (np.abs(actions) > half * ACTION_LIMIT).any():
        return actions
    limit, shares = f"{half.max():g}", []
    for candidate in (actions, actions / half):
        trial = {key: column for key, column in columns.items() if key != "rewards"} | {"actions": candidate}
        result = physics.measure(trial, state, env, layout, source, SCALE_ROWS)
        shares.append(result["share"] or 0.0)
    if shares[1] > shares[0]:
        notes.append(f"actions are within {limit}, the range of the motors of '{env.name}': divided by it")
        return np.clip(actions / half, -1.0, 1.0)
    if shares[0] == shares[1]:
        notes.append(
            f"actions are within {limit}, the range of the motors of '{env.name}', and no replay tells whether they "
            f"are on that scale: left as they are (else import with --action-limit {limit})"
        )
    return actions
