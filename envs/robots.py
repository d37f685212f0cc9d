"""The MuJoCo robots: which XML, how long a control step is, what is observed, where it starts.

A table and its rules, apart from any engine. XMLs are Gymnasium's, read where it is installed.
"""

import dataclasses
import functools
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Robot:
    """One robot. Observations are qpos[skip_qpos:], qvel (clipped to +-clip_qvel)."""

    xml: str  # file in gymnasium/envs/mujoco/assets
    frame_skip: int  # physics substeps in a control step
    dt: float  # seconds in a control step
    observation_size: int
    action_size: int
    skip_qpos: int  # leading entries of qpos that are not observed
    clip_qvel: float | None  # qvel is observed within +- this
    start_qpos: float  # U(-w, w) on every entry of qpos
    start_qvel: float  # scale of the noise on qvel ...
    start_normal: bool  # ... normal, or uniform
    start_z: float  # of the torso's entry in qpos; every joint starts at 0, a free torso upright
    gear: float | None = None  # of all motors; None: as in the XML
    margin_scale: float = 1.0  # of contact margins; 0.5: MuJoCo 2's contacts, which D4RL's data has
    maze: str = ""  # D4RL's ant: a name in envs.maze.MAPS, or "open" without walls
    start_anywhere: bool = False  # any heading at the start: turned about the vertical
    # raw observations (..., S) -> (...,) bool, for tasks that end where it fails; None: never
    healthy: Callable | None = None
    whole_body: bool = False  # root velocities are of the centre of mass, which Gymnasium pays; else of qpos[:2]
    # how many contact forces and the like Gymnasium observes behind pose and speeds, by its versions
    contact_numbers: tuple[int, ...] = ()


def _hopper_healthy(observations):
    z, angle, rest = observations[..., 0], observations[..., 1], observations[..., 1:]
    return (abs(rest) < 100.0).all(-1) & (z > 0.7) & (abs(angle) < 0.2)


def _walker_healthy(observations):
    z, angle = observations[..., 0], observations[..., 1]
    return (z > 0.8) & (z < 2.0) & (abs(angle) < 1.0)


def _ant_healthy(observations, z_at=2):
    z = observations[..., z_at]
    return (z >= 0.2) & (z <= 1.0)


def _humanoid_healthy(observations):
    z = observations[..., 0]
    return (z > 1.0) & (z < 2.0)


ROBOTS = {
    "ant": Robot(
        "ant.xml", 5, 0.05, 29, 8, skip_qpos=0, clip_qvel=None,
        start_qpos=0.1, start_qvel=0.1, start_normal=True, start_z=0.75, gear=30.0, healthy=_ant_healthy,
    ),
    "cheetah": Robot(
        "half_cheetah.xml", 5, 0.05, 17, 6, skip_qpos=1, clip_qvel=None,
        start_qpos=0.1, start_qvel=0.1, start_normal=True, start_z=0.0,
    ),
    "hopper": Robot(
        "hopper.xml", 4, 0.008, 11, 3, skip_qpos=1, clip_qvel=10.0,
        start_qpos=0.005, start_qvel=0.005, start_normal=False, start_z=1.25,
        healthy=_hopper_healthy, margin_scale=0.5,
    ),
    "humanoid": Robot(
        "humanoid.xml", 5, 0.015, 45, 17, skip_qpos=2, clip_qvel=None,
        start_qpos=0.01, start_qvel=0.01, start_normal=False, start_z=1.4,
    ),
    "walker2d": Robot(
        "walker2d.xml", 4, 0.008, 17, 6, skip_qpos=1, clip_qvel=10.0,
        start_qpos=0.005, start_qvel=0.005, start_normal=False, start_z=1.25, healthy=_walker_healthy,
    ),
}  # fmt: skip
for _maze in ("umaze", "medium", "large"):
    # D4RL's ant: motors of gear 1 with controls up to 30, which is gear 30; twice the timestep (envs.maze).
    ROBOTS[f"ant-maze-{_maze}"] = dataclasses.replace(ROBOTS["ant"], dt=0.1, margin_scale=0.5, maze=_maze)
ROBOTS["ant-open"] = dataclasses.replace(ROBOTS["ant-maze-umaze"], maze="open", start_anywhere=True)
# Gymnasium's Ant-v5 and Humanoid-v5 without contact forces; "ant-v2" has the contacts of MuJoCo before 3.5.
ROBOTS["ant-v5"] = dataclasses.replace(
    ROBOTS["ant"], skip_qpos=2, observation_size=27, gear=None, contact_numbers=(78,),
    healthy=functools.partial(_ant_healthy, z_at=0),
)  # fmt: skip
ROBOTS["ant-v2"] = dataclasses.replace(ROBOTS["ant-v5"], margin_scale=0.5, contact_numbers=(84, 78))
ROBOTS["humanoid-v5"] = dataclasses.replace(
    ROBOTS["humanoid"], whole_body=True, contact_numbers=(303, 331), healthy=_humanoid_healthy
)


def shown_numbers(world: str, size: int, shown: int) -> int:
    """How many of `size` recorded numbers a task takes that observes `shown`: contact forces are left out."""
    forces = ROBOTS[world].contact_numbers if world in ROBOTS else ()
    return shown if size - shown in forces else size
