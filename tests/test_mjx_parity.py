"""benchmark/mjx_parity.py's committed numbers: within its limits, and those that docs/envs.md shows.

What MJX makes of single steps is in test_gpu_check.py (the cheetah), test_envs.py (the ant's accelerations) and
test_d4rl_tasks.py (walls); the other robots' programs take a minute each to compile, and are compared by the command.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import mjx_parity as P

ROOT = Path(__file__).parents[1]


def committed(name, part):
    """{robot: {steps: row}} of a file of results/parity."""
    found = json.loads((ROOT / "results" / "parity" / f"{name}.json").read_text())[part]
    return {robot: {int(s): row for s, row in table.items() if s.isdigit()} for robot, table in found.items()}


def test_committed_numbers_are_within_the_limits():
    engines, recorded = committed("mjx", "parity"), committed("recorded", "recorded")
    assert set(engines) == set(P.TOLERANCES)
    assert set(recorded) == {f"{robot} {backend}" for robot in P.RECORDED for backend in P.ENGINES}
    for tables, limits_of in ((engines, P.TOLERANCES), (recorded, dict.fromkeys(recorded, P.OF_RECORDED))):
        for robot, table in tables.items():
            assert set(table) == set(P.HORIZONS)
            assert P.check(robot, table, limits_of[robot]) == []


@pytest.mark.parametrize("change, told", [({"qpos": (1e-3, 1e-3)}, "median qpos"), ({"ends": 1}, "1 ends differ")])
def test_a_wrong_model_is_told(change, told):
    table = committed("mjx", "parity")["hopper"]
    (message,) = P.check("hopper", {**table, 10: table[10] | change}, P.TOLERANCES["hopper"])
    assert told in message and "after 10 steps" in message


def test_the_page_shows_the_committed_numbers():
    """Each number of the table of MJX against C MuJoCo, up to the rounding to one digit."""
    rows = re.findall(r"^\| ([\w-]+) \| (\d+) \| (.*) \|$", (ROOT / "docs" / "envs.md").read_text(), re.MULTILINE)
    shown = {(robot, int(steps)): re.split(r" \| | / | of ", cells) for robot, steps, cells in rows}
    known = {(robot, s): row for robot, table in committed("mjx", "parity").items() for s, row in table.items()}
    assert set(shown) == set(known)
    for place, row in known.items():
        errors = [*row["qpos"], *row["qvel"], *row["reward"]]
        *told, ends, ended = map(float, shown[place])
        np.testing.assert_allclose(told, errors, rtol=0.35, atol=1e-9, err_msg=str(place))
        assert (ends, ended) == (row["ends"], row["ended"]), place
