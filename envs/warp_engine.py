"""MuJoCo Warp through MJX: kernels for NVIDIA GPUs, whose contacts cost only where there are some.

MJX computes every pair of shapes that could ever touch. Warp lists those that do, of all worlds together, in a fixed
number of places; what finds none is left out of the physics. Here the places are counted from the model, and a list
that is full ends the run with the number to ask for.
"""

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jax.extend.backend import backends

from envs.base import quiet_imports
from envs.errors import InputError
from envs.physics import MjxEngine

MOST_CONTACTS = 64  # places of a world in which more could touch than ever do: a humanoid's limbs, a maze's walls
_KINDS = mujoco.mjtGeom
_PLANE, _SPHERE, _CAPSULE, _BOX = map(
    int, (_KINDS.mjGEOM_PLANE, _KINDS.mjGEOM_SPHERE, _KINDS.mjGEOM_CAPSULE, _KINDS.mjGEOM_BOX)
)
_CONTACTS = {(_PLANE, _CAPSULE): 2, (_CAPSULE, _CAPSULE): 2, (_CAPSULE, _BOX): 2}  # of a pair; a sphere has 1, others 8


def check_warp() -> None:
    """Refuse (InputError) where Warp cannot run."""
    with quiet_imports():
        from mujoco.mjx import warp
    if not warp.WARP_INSTALLED:
        raise InputError("backend='warp' needs warp-lang, in the version of mujoco-mjx: pip install 'mujoco-mjx[warp]'")
    if jax.default_backend() != "cpu" and "cuda" not in backends():
        kind = jax.devices()[0].device_kind
        raise InputError(f"backend='warp' runs on NVIDIA GPUs, and on a CPU to look at, not on {kind}: use 'mjx'")
    warp.warp.config.log_level = max(warp.warp.config.log_level, warp.warp.LOG_WARNING)  # else a line for every kernel


def possible_contacts(model: mujoco.MjModel, pairs: np.ndarray) -> int:
    """Return how many contacts a world could have at once. pairs (n, 2): the shapes that may meet."""
    kinds = np.sort(model.geom_type[pairs], axis=1).tolist()
    return sum(1 if _SPHERE in pair else _CONTACTS.get(tuple(pair), 8) for pair in kinds)


def one_batch(function):
    """function of arrays (B, n) -> the same, which however many vmaps turn into one call with all rows."""
    batch = jax.custom_batching.custom_vmap(function)

    @batch.def_vmap
    def more_rows(size, batched, *arrays):
        arrays = [
            x if there else jnp.broadcast_to(x, (size, *x.shape)) for x, there in zip(arrays, batched, strict=True)
        ]
        after = batch(*(x.reshape(-1, x.shape[-1]) for x in arrays))
        return tuple(x.reshape(size, -1, x.shape[-1]) for x in after), (True,) * len(after)

    return batch


def check_room(values, listed, rows, num_contacts, num_rows):
    """Return `values` (B, n), of B worlds; what finds no place there ends the program with an InputError.

    listed: contacts, or pairs that may touch, of all worlds; rows: constraints of the world that has most.
    num_contacts, num_rows: places of one world.
    """
    worlds = len(values)

    def refuse(values, listed, rows):
        a_world = max(-(-int(listed) // worlds), -(-int(rows) * num_contacts // num_rows))
        raise InputError(
            f"{worlds} worlds on 'warp' had {int(listed)} contacts and up to {int(rows)} constraints each, with room "
            f"for {worlds * num_contacts} and {num_rows}: --backend mjx, or envs.make(.., num_contacts={a_world})"
        )

    stop = lambda values: jax.pure_callback(refuse, values, values, listed, rows)
    return jax.lax.cond((listed > worlds * num_contacts) | (rows > num_rows), stop, lambda values: values, values)


class WarpEngine(MjxEngine):
    """MuJoCo Warp, float32; start and step are functions of one environment, and a batch is one call of Warp."""

    impl = "warp"

    def __init__(self, model: mujoco.MjModel, frame_skip: int, num_contacts: int | None, whole_body: bool = False):
        check_warp()
        super().__init__(model, frame_skip, whole_body)
        self.model = self.model.tree_replace({"opt._impl.warn_overflow": 0})  # it is not printed, but checked below
        pairs = np.asarray(self.model._impl.nxn_geom_pair_filtered)
        self.num_contacts = num_contacts or min(max(possible_contacts(model, pairs), 1), MOST_CONTACTS)
        edges = 2 * (int(model.geom_condim.max()) - 1)  # of the pyramid of a contact's friction
        self.num_rows = max(edges, 1) * self.num_contacts + int(model.jnt_limited.sum())
        self.of_batch = one_batch(self.substeps_of_batch)

    def substeps(self, *arrays):
        """As MjxEngine's: a batch of one world, for now."""
        return tuple(x[0] for x in self.of_batch(*(x[None] for x in arrays)))

    def substeps_of_batch(self, qpos, qvel, memory, control):
        """qpos (B, nq), qvel (B, nv), memory (B, nv), control (B, A) -> qpos, qvel, memory after a control step."""
        empty = self.make_data(len(qpos) * self.num_contacts)

        def of_world(qpos, qvel, memory, control):
            data = empty.replace(qpos=qpos, qvel=qvel, qacc_warmstart=memory, ctrl=control)

            def substep(data, _):
                data = self.mjx.step(self.model, data)
                listed = jnp.maximum(data._impl.nacon[0], data._impl.ncollision[0])  # of all worlds
                return data, (listed, jnp.max(data._impl.nefc))

            data, most = jax.lax.scan(substep, data, None, length=self.frame_skip)
            return data.qpos, data.qvel, data.qacc_warmstart, most

        qpos, qvel, memory, (listed, rows) = jax.vmap(of_world)(qpos, qvel, memory, control)
        return check_room(qpos, jnp.max(listed), jnp.max(rows), self.num_contacts, self.num_rows), qvel, memory

    def make_data(self, places):
        """MJX's Data of one world, in a list for all. Nothing of it but zeros is large, and zeros need no storing."""
        with jax.ensure_compile_time_eval():
            data = self.mjx.make_data(self.host_model, impl="warp", naconmax=places, njmax=self.num_rows)
            data = jax.tree.map(lambda x: np.asarray(x) if hasattr(x, "shape") else x, data)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if np.ndim(x) and not x.any() else x, data)
