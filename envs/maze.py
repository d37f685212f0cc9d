"""AntMaze as D4RL has it: maps, walls as few boxes, goals. Geometry and tasks, apart from any engine.

A cell is 4 m wide; the cell R, where the ant starts, is the origin; x runs along a row, y down the rows of a map.
"""

import functools

import numpy as np

CELL, WALL_HALF_HEIGHT = 4.0, 1.0  # metres
GOAL_RADIUS = 0.5
TIMESTEP = 0.02  # of the physics, twice Gymnasium's
SOLREF, SOLIMP = (0.02, 1.0), (0.8, 0.8, 0.01)  # of all contacts
CONTACTS = 12  # the nearest ones count, for MJX, whose cost is set by the contacts that could be

MAPS = {
    "umaze": (
        "#####",
        "#R..#",
        "###.#",
        "#G..#",
        "#####",
    ),
    "medium": (
        "########",
        "#R.##..#",
        "#..#...#",
        "##...###",
        "#..#...#",
        "#.#..#.#",
        "#...#.G#",
        "########",
    ),
    "large": (
        "############",
        "#R...#.....#",
        "#.##.#.#.#.#",
        "#......#...#",
        "#.####.###.#",
        "#..#.#.....#",
        "##.#.#.#.###",
        "#..#...#.G.#",
        "############",
    ),
}
STEPS = {"umaze": 700, "medium": 1000, "large": 1000}  # D4RL's limits


def find(name: str, letter: str) -> tuple[int, int]:
    """Row and column of the one cell with a letter."""
    return next((i, row.index(letter)) for i, row in enumerate(MAPS[name]) if letter in row)


def position(name: str, row, column) -> np.ndarray:
    """Centre (..., 2) of a cell, in metres from the start."""
    start = find(name, "R")
    return CELL * np.stack([np.asarray(column) - start[1], np.asarray(row) - start[0]], -1).astype(np.float32)


def cell(name: str, positions) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the cells that positions (..., 2) lie in."""
    start = find(name, "R")
    column, row = np.moveaxis(np.floor(np.asarray(positions) / CELL + 0.5).astype(int), -1, 0)
    return row + start[0], column + start[1]


@functools.cache
def walls(name: str) -> tuple[tuple[float, float, float, float], ...]:
    """The walls as few rectangles: x, y of the centre and half widths, in metres.

    Greedy: the first wall cell not yet covered grows right as far as it can, then down.
    """
    left = np.array([[c == "#" for c in row] for row in MAPS[name]])
    boxes = []
    while left.any():
        top, first = np.argwhere(left)[0]
        width = int(np.argmin(np.append(left[top, first:], False)))
        full = left[top:, first : first + width].all(1)
        height = int(np.argmin(np.append(full, False)))
        left[top : top + height, first : first + width] = False
        x, y = position(name, top + (height - 1) / 2, first + (width - 1) / 2)
        boxes.append((float(x), float(y), CELL * width / 2, CELL * height / 2))
    return tuple(boxes)


def edit_spec(spec, name: str) -> None:
    """Turn Gymnasium's ant (a mujoco.MjSpec) into D4RL's in its maze, in place."""
    import mujoco

    spec.option.timestep = TIMESTEP
    for x, y, half_x, half_y in walls(name) if name in MAPS else ():
        spec.worldbody.add_geom(
            type=mujoco.mjtGeom.mjGEOM_BOX, pos=[x, y, WALL_HALF_HEIGHT], size=[half_x, half_y, WALL_HALF_HEIGHT],
            contype=1, conaffinity=1, rgba=[0.7, 0.5, 0.3, 1.0],
        )  # fmt: skip
    for geom in spec.geoms:
        geom.solref[:2] = SOLREF
        geom.solimp[:3] = SOLIMP
    # MJX takes this cap by its index among the numbers of the XML, not by name: no other may come before.
    for number in list(spec.numerics):
        spec.delete(number)
    spec.add_numeric(name="max_contact_points", size=1, data=[CONTACTS])


@functools.cache
def next_cells(name: str) -> np.ndarray:
    """[H, W, H, W, 2]: from a cell, for a goal in a free cell, the next on a shortest way; at the goal itself.

    Breadth first, from the goal outwards; walls have a way out as well, and goals in walls none (-1).
    """
    free = np.pad([[c != "#" for c in row] for row in MAPS[name]], 1)  # a frame, so that all cells have neighbours
    ways = np.full((*free.shape, *free.shape, 2), -1)
    for goal in np.argwhere(free):
        row, column = goal
        ways[row, column, row, column] = goal
        queue = [(row, column)]
        for i, j in queue:  # it grows while it is walked
            for near in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
                if ways[(*near, row, column, 0)] < 0:
                    ways[(*near, row, column)] = i, j
                    queue += [near] if free[near] else []
    return np.where(ways < 0, -1, ways - 1)[1:-1, 1:-1, 1:-1, 1:-1]


def waypoint(name: str, positions, goals):
    """Where to head for (..., 2): the centre of the next cell on the way to the goal, in its cell the goal. JAX."""
    import jax.numpy as jnp

    start, size = jnp.array(find(name, "R")), jnp.array(np.shape([list(row) for row in MAPS[name]]))
    cell_of = lambda p: jnp.clip(jnp.floor(p[..., ::-1] / CELL + 0.5).astype(int) + start, 0, size - 1)
    here, there = cell_of(positions), cell_of(goals)
    onward = jnp.asarray(next_cells(name))[here[..., 0], here[..., 1], there[..., 0], there[..., 1]]
    arrived = (here == there).all(-1, keepdims=True)
    return jnp.where(arrived, goals, CELL * (onward - start)[..., ::-1].astype(jnp.float32))


def turn_quaternion(quaternion, angle):
    """An orientation (w, x, y, z) [..., 4] turned by angles [...] about the vertical. JAX."""
    import jax.numpy as jnp

    c, s = jnp.cos(angle / 2), jnp.sin(angle / 2)
    w, x, y, z = jnp.moveaxis(quaternion, -1, 0)
    return jnp.stack([c * w - s * z, c * x - s * y, c * y + s * x, c * z + s * w], -1)


def as_ahead(observations, directions):
    """What the ant [..., 29] would observe, without x and y, if `directions` [..., 2] were the x axis: [..., 27]. JAX.

    On the plane nothing changes when everything turns, so that a policy which walks along x walks anywhere. Of the two
    quaternions of an orientation it is the one with w >= 0, as where it learnt (`ant-open`) at the start.
    """
    import jax.numpy as jnp

    angle = jnp.arctan2(directions[..., 1], directions[..., 0])
    c, s = jnp.cos(angle), jnp.sin(angle)
    vx, vy = observations[..., 15], observations[..., 16]
    velocity = jnp.stack([c * vx + s * vy, c * vy - s * vx], -1)
    facing = turn_quaternion(observations[..., 3:7], -angle)
    facing = jnp.where(facing[..., :1] < 0, -facing, facing)
    parts = (observations[..., 2:3], facing, observations[..., 7:15])
    return jnp.concatenate([*parts, velocity, observations[..., 17:]], -1)


def reached(positions, goals):
    """Whether positions (..., 2) are within 0.5 m of goals (..., 2)."""
    return ((positions - goals) ** 2).sum(-1) <= GOAL_RADIUS**2


def sample_goal(name: str, key):
    """D4RL's goal (2,): the cell G + U(0, 1)^2 + U(0, 0.5)^2, a new one for every episode."""
    import jax
    import jax.numpy as jnp

    key_cell, key_noise = jax.random.split(key)
    offset = jax.random.uniform(key_cell, (2,)) + 0.5 * jax.random.uniform(key_noise, (2,))
    return jnp.maximum(position(name, *find(name, "G")) + offset, 0.0)
