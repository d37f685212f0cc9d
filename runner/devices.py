"""Seeds and policies over devices and processes: a leading axis, shared out."""

import contextlib
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

import envs
from envs.host import cores

# --matmul-precision -> what jax calls it; "highest" is float32 also where a device's default is less
PRECISIONS = {"float32": "highest", "tensorfloat32": "high", "bfloat16": "BF16_BF16_F32"}


def seed_keys(args, num=1):
    """A key for each seed [S], or `num` tuples of such keys; a seed has the same ones alone or among others."""
    keys = jax.vmap(jax.random.key)(args.seed + jnp.arange(args.num_seeds))
    return keys if num == 1 else jax.vmap(lambda key: jax.random.split(key, num), out_axes=1)(keys)


def device_mesh(count, args):
    """The devices that share `count` policies or seeds, as many of every process, and whether each has as many."""
    num = min(args.num_devices or jax.local_device_count(), -(-count // jax.process_count()))
    devices = [device for p in range(jax.process_count()) for device in jax.local_devices(p)[:num]]
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((len(devices),), ("share",), auto, devices=devices), count % len(devices) == 0


def over_devices(f, args):
    """f of trees with a leading axis of policies or seeds -> the same, each device with its share of them.

    If the count is not a multiple of the devices, the spare places repeat the first seeds, and their results are
    discarded.
    """

    def shared(*trees):
        count = len(jax.tree.leaves(trees)[0])
        mesh, even = device_mesh(count, args)
        # jax 0.11's compiler crashes on an array without elements that is handed on as it came
        empty = lambda x: x if x.size else jnp.zeros(x.shape, x.dtype)
        whole = lambda *trees: jax.tree.map(empty, f(*trees))
        split = jax.shard_map(whole, mesh=mesh, in_specs=jax.P("share"), out_specs=jax.P("share"), check_vma=False)
        if mesh.size == 1 or even:
            return (f if mesh.size == 1 else split)(*trees)
        padded = np.arange(-(-count // mesh.size) * mesh.size) % count
        return jax.tree.map(lambda x: x[:count], split(*jax.tree.map(lambda x: x[padded], trees)))

    return shared


def map_seeds(function, xs, args):
    """function over the seeds [S] of a device: one after another on a CPU, which one seed fills; else at once."""
    on_cpu = jax.default_backend() == "cpu"
    each = lambda xs: jax.lax.map(function, xs) if on_cpu else jax.vmap(function)(xs)
    return over_devices(each, args)(xs)


def placed(count, args, *axes):
    """Where an array lies whose axis "share" has `count` policies; on all devices if the count does not divide."""
    mesh, even = device_mesh(count, args)
    return jax.NamedSharding(mesh, jax.P(*axes) if even else jax.P())


def policies_at_once(args, backend):
    """Policies that one batched call updates: on a CPU wide ones one by one, which is faster; --policies-at-once."""
    one = backend == "cpu" and max(args.hidden_sizes) > 128
    return args.policies_at_once or (1 if one else args.num_policies)


def cpu_devices_for_policies(args):
    """Devices to make of a CPU's cores, each with the same number of policies: faster than one device of all cores."""
    if args.distributed or policies_at_once(args, "cpu") > 1:
        return 1
    return max(n for n in range(1, 1 + min(cores(), args.num_policies)) if args.num_policies % n == 0)


def begin(args, own):
    """What jax is told before a script begins; own: the devices to make of a CPU where --num-devices does not say."""
    split_cpu(getattr(args, "num_devices", 0), own)
    if getattr(args, "distributed", False):
        join_processes()
    if hasattr(args, "matmul_precision"):  # udg_select.py computes on the host
        multiply_in(args.matmul_precision)


def split_cpu(asked, own):
    """Make devices out of the CPU before jax begins; accelerators are what they are.

    asked: --num-devices; where that is 0, `own`, which gives way to the environment's number and to a jax that runs.
    """
    told = "JAX_NUM_CPU_DEVICES" in os.environ or "device_count" in os.environ.get("XLA_FLAGS", "")
    if asked > 1 or (asked == 0 and own > 1 and not told):
        try:
            jax.config.update("jax_num_cpu_devices", asked or own)
        except RuntimeError:  # brax's worlds compute when they are named
            if asked:
                raise envs.InputError(f"--num-devices {asked}: jax has begun already, with one; leave it out") from None


def multiply_in(precision):
    """Digits of all matrix products that do not say their own, on an accelerator: a CPU takes float32 always."""
    if jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", PRECISIONS[precision])


def memory():
    """Bytes that a device has; where the CPU is several, its share of the machine's or its container's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # "max": all
        machine = min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return stats.get("bytes_limit") or machine // jax.local_device_count()


# --- several processes ---------------------------------------------------------------------------


def whole(tree, count, args):
    """The tree with all `count` policies on the host of every process, so that the first one can write it. One array
    after another: each device holds the whole of it for a moment."""
    if jax.process_count() == 1:
        return tree
    gather = jax.jit(lambda x: x, out_shardings=placed(count, args))
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    on_host = lambda x: x if is_key(x) else np.array(x)  # a copy: what is on the device goes
    return jax.tree.map(lambda x: on_host(gather(x).addressable_data(0)), tree)


def own_policies(count):
    """The policies out of `count` that lie on this process's devices, whose rows it keeps."""
    num = jax.process_count()
    return [k for k in range(count) if k * num // count == jax.process_index()]


def own_part(x, count):
    """Of an array [R, K, ..] the policies of this process, on the host."""
    shards = {shard.index[1].start or 0: np.asarray(shard.data) for shard in x.addressable_shards}
    x = np.concatenate([shards[k] for k in sorted(shards)], 1)
    return x if x.shape[1] < count else x[:, own_policies(count)]


def added_up(numbers):
    """An array of numbers of every process -> their sum over the processes, on all of them."""
    return multihost_utils.process_allgather(np.asarray(numbers)).sum(0)


def wait_for_all(point):
    """Go on once every process has come to this point."""
    multihost_utils.sync_global_devices(point)


def agreed(stop, due):
    """Decisions that all processes must share: the signal to stop by, and whether any of them finds it time to save."""
    if jax.process_count() == 1:
        return stop, due
    told, due = multihost_utils.process_allgather(np.array([bool(stop), due])).any(0)
    return stop or ("a signal to another process" if told else ""), due


def join_processes():
    """Become one of several processes, which jax.distributed finds; only the first one prints."""
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    number = lambda name: int(os.environ[name]) if name in os.environ else None
    try:
        jax.distributed.initialize(
            num_processes=number("JAX_NUM_PROCESSES"), process_id=number("JAX_PROCESS_ID"),
            heartbeat_timeout_seconds=60, shutdown_timeout_seconds=60,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        remedy = "start it by srun, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        raise envs.InputError(f"--distributed: {error}; {remedy}") from None
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def leave(message):
    """End with a message; at once where other processes are, which see that connection close and end as well."""
    print(message, file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        os._exit(1)  # an orderly end would wait for the others
    sys.exit(1)
