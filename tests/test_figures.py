"""Figures of what policies do (envs/figures.py)."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

import envs
from envs import figures, maze, point


@pytest.mark.parametrize("world", ["tree-maze", "ant-maze-umaze", "ant-maze-large"])
def test_walls_of_a_figure_are_those_of_the_world(world):
    """Random places are in a drawn rectangle where the world has a wall, and nowhere else."""
    rng = np.random.default_rng(0)
    high = 2.0 if world == "tree-maze" else 30.0
    places = rng.uniform(0, high, (500, 2)).astype(np.float32)
    drawn = figures.walls(world)
    inside = ((places[:, None] > drawn[:, :2]) & (places[:, None] < drawn[:, 2:])).all(-1).any(-1)
    if world == "tree-maze":
        wall = np.asarray(point.inside_wall(places))
    else:
        name = world.removeprefix("ant-maze-")
        grid = np.array([list(row) for row in maze.MAPS[name]])
        rows, columns = maze.cell(name, places)
        within = (rows < grid.shape[0]) & (columns < grid.shape[1])
        wall = within & (grid[np.where(within, rows, 0), np.where(within, columns, 0)] == "#")
    assert wall.any() and not wall.all()
    np.testing.assert_array_equal(inside, wall)
    assert not len(figures.walls("ant"))


def test_a_policy_that_stays_at_home_is_seen(tmp_path):
    """Drawn first of eight, the others run over the place where it is; and of two that stay both are seen."""
    angles = np.linspace(0, 2 * np.pi, 6, endpoint=False)
    away = np.stack([np.cos(angles), np.sin(angles)], 1)
    reach = np.concatenate([0.01 * np.ones((2, 2)), 8 * away])[:, None, None]  # policies 0 and 1 move by a centimetre
    noise = np.random.default_rng(0).normal(0, 0.2, (8, 10, 50, 2)) * np.linspace(0, 1, 50)[:, None]
    paths = np.linspace(0, 1, 50)[:, None] * reach + np.where(np.arange(8)[:, None, None, None] < 2, 0.3, 1) * noise
    figures.plot_paths(tmp_path / "x.png", envs.task("ant"), paths, paths, np.ones(paths.shape[:3], bool))
    picture = (plt.imread(tmp_path / "x.png")[..., :3] * 255).round().astype(int)
    picture = picture[:, : int(0.8 * picture.shape[1])]  # without the legend
    for colour in ("#1f77b4", "#ff7f0e"):  # C0, C1
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(picture - wanted).max(-1) < 3).sum() > 60, colour


def test_paths_are_drawn_over_the_walls(tmp_path):
    """Grey where a wall is, the policy's colour where it went, white elsewhere."""
    steps = np.linspace([1.0, 0.1], [1.0, 0.6], 20)
    paths, alive = steps[None, None], np.ones((1, 1, 20), bool)
    figures.plot_paths(tmp_path / "x.png", envs.task("tree-maze"), paths, paths, alive)
    figures.plot_paths(tmp_path / "y.png", envs.task("point"), paths, paths, alive)
    with_walls, without = (
        (plt.imread(tmp_path / name)[..., :3] * 255).round().astype(int) for name in ("x.png", "y.png")
    )
    grey = lambda picture: (picture == 224).all(-1).sum()
    assert grey(with_walls) > 10000 and grey(without) < 100
    assert all((np.ptp(picture, axis=-1) > 80).sum() > 200 for picture in (with_walls, without)), "a blue line"
