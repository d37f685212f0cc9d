"""Contacts of MJX made those of C MuJoCo where they differ (3.17): capsules on planes, balls and capsules at boxes."""

import contextlib

import jax
import jax.numpy as jnp
import mujoco

from envs.base import quiet_imports


@contextlib.contextmanager
def exact_contacts():
    """Trace MJX with the ant's contacts as C MuJoCo has them.

    Capsule and plane: MJX (3.17) drops the capsule's direction for the world's y axis where a capsule
    is steeper than 60 degrees; C MuJoCo never does. For the ant this changes 13 % of accelerations, by
    up to 37 %. Boxes: MJX sees no contact before they overlap, C MuJoCo has one within the margin.
    """
    with quiet_imports():
        from mujoco.mjx._src import collision_driver
    table = collision_driver._COLLISION_FUNC
    shape = {name: getattr(mujoco.mjtGeom, f"mjGEOM_{name}") for name in ("PLANE", "SPHERE", "CAPSULE", "BOX")}
    original = dict(table)
    table[shape["PLANE"], shape["CAPSULE"]] = _plane_capsule
    table[shape["SPHERE"], shape["BOX"]] = _sphere_box
    table[shape["CAPSULE"], shape["BOX"]] = _capsule_box
    try:
        yield
    finally:
        table.update(original)


def _plane_capsule(model, data, _, geom):
    """Contacts of both ends of capsules with planes. geom (n, 2) -> (2n,), (2n, 3), (2n, 3, 3)."""
    plane, capsule = geom.T
    normal, axis = data.geom_xmat[plane][:, :, 2], data.geom_xmat[capsule][:, :, 2]
    radius, half_length = model.geom_size[capsule][:, :2].T
    flat = axis - normal * jnp.sum(axis * normal, -1, keepdims=True)
    length = jnp.linalg.norm(flat, axis=-1, keepdims=True)
    # A capsule that stands upright has no direction on the plane: any will do.
    across = jnp.where(jnp.abs(normal[:, 1:2]) < 0.5, jnp.eye(3)[1], jnp.eye(3)[2])
    tangent = jnp.where(length > 1e-6, flat / jnp.maximum(length, 1e-6), across)
    frame = jnp.stack([normal, tangent, jnp.cross(normal, tangent)], axis=1)
    reach = jnp.array([1.0, -1.0])[:, None] * (axis * half_length[:, None])[:, None]
    ends = data.geom_xpos[capsule][:, None] + reach
    normals = normal[:, None]
    distance = jnp.sum((ends - data.geom_xpos[plane][:, None]) * normals, -1) - radius[:, None]
    position = ends - normals * (radius[:, None] + 0.5 * distance)[..., None]
    return distance.reshape(-1), position.reshape(-1, 3), jnp.repeat(frame, 2, axis=0)


_plane_capsule.ncon = 2


def _ball_box(centre, radius, half):
    """A ball and a box (3,) around the origin -> distance, normal (3,) into the box, point (3,) between them."""
    gap = centre - jnp.clip(centre, -half, half)
    length = jnp.linalg.norm(gap)
    depth = half - jnp.abs(centre)  # of a centre inside the box, to each pair of faces
    face = jnp.where(jnp.arange(3) == jnp.argmin(depth), jnp.where(centre < 0, -1.0, 1.0), 0.0)
    outward = jnp.where(length > 1e-9, gap / jnp.maximum(length, 1e-9), face)
    distance = jnp.where(length > 1e-9, length, -jnp.min(depth)) - radius
    return distance, -outward, centre - outward * (radius + 0.5 * distance)


def _sphere_box(model, data, _, geom):
    """Contacts of spheres with boxes. geom (n, 2) -> (n,), (n, 3), (n, 3, 3)."""
    from mujoco.mjx._src.math import make_frame

    sphere, box = geom.T

    def pair(offset, turn, radius, half):
        distance, normal, point = _ball_box(turn.T @ offset, radius, half)
        return distance, turn @ point, make_frame(turn @ normal)

    offset, turn = data.geom_xpos[sphere] - data.geom_xpos[box], data.geom_xmat[box]
    distance, point, frame = jax.vmap(pair)(offset, turn, model.geom_size[sphere][:, 0], model.geom_size[box])
    return distance, point + data.geom_xpos[box], frame


_sphere_box.ncon = 1


def _nearest_to_box(centre, axis, half):
    """Where in [-1, 1] centre + t axis is nearest to a box (3,) around the origin; in the middle where it crosses it.

    Half the slope of the squared distance is piecewise linear in t and never falls: its zero lies between two breaks.
    """
    steep = jnp.where(jnp.abs(axis) > 1e-9, axis, 1e-9)
    breaks = jnp.concatenate([jnp.array([-1.0, 1.0]), (half - centre) / steep, (-half - centre) / steep])
    breaks = jnp.sort(jnp.clip(breaks, -1.0, 1.0))
    points = centre + breaks[:, None] * axis
    slope = jnp.sum(axis * (points - jnp.clip(points, -half, half)), axis=-1)
    return 0.5 * (jnp.interp(-1e-9, slope, breaks) + jnp.interp(1e-9, slope, breaks))


def _capsule_box(model, data, _, geom):
    """Contacts of capsules with boxes. geom (n, 2) -> (2n,), (2n, 3), (2n, 3, 3).

    As C MuJoCo: the end that is nearer, and the other one, or where the capsule leaves the face that the first one
    meets; where its middle is nearer than both (an edge of the box), there alone.
    """
    from mujoco.mjx._src.math import make_frame

    capsule, box = geom.T

    def pair(offset, axis, turn, radius, half):
        offset, axis = turn.T @ offset, turn.T @ axis
        touch = lambda t: _ball_box(offset + t * axis, radius, half)
        distance, normal, _ = jax.vmap(touch)(jnp.array([-1.0, 1.0]))
        end = jnp.where(distance[0] <= distance[1], -1.0, 1.0)
        across = jnp.arange(3) == jnp.argmax(jnp.abs(jnp.where(end < 0, normal[0], normal[1])))
        steep = jnp.where(jnp.abs(axis) > 1e-9, axis, 1e-9)
        leaves = jnp.stack([(half - offset) / steep, (-half - offset) / steep])
        low, high = (jnp.where(across, f * jnp.inf, x) for f, x in ((-1, leaves.min(0)), (1, leaves.max(0))))
        low, high = low.max(), high.min()
        middle = _nearest_to_box(offset, axis, half)
        at_edge = (touch(middle)[0] < distance.min() - 1e-4) & (distance.min() > -radius)
        one = at_edge | (end < low) | (end > high) | (distance.min() < -radius)
        first, second = jnp.where(at_edge, middle, end), jnp.clip(-end, low, high)
        distance, normal, point = jax.vmap(touch)(jnp.stack([first, second]))
        distance = jnp.where(jnp.array([False, True]) & one, 1.0, distance)
        return distance, point @ turn.T, jax.vmap(make_frame)(normal @ turn.T)

    offset = data.geom_xpos[capsule] - data.geom_xpos[box]
    radius, half_length = model.geom_size[capsule][:, :2].T
    axis = data.geom_xmat[capsule][:, :, 2] * half_length[:, None]
    distance, point, frame = jax.vmap(pair)(offset, axis, data.geom_xmat[box], radius, model.geom_size[box])
    point = point + data.geom_xpos[box][:, None]
    return distance.reshape(-1), point.reshape(-1, 3), frame.reshape(-1, 3, 3)


_capsule_box.ncon = 2
