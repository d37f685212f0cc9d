"""cped.py, qdq.py and dac.py: rates of their phases, beside the references' published ones and the matmul floor.

17 observations, 6 actions (halfcheetah), batch 256, 100k rows. The references' rates were measured once elsewhere, on
a machine of 2 cores (PyTorch, 2 threads; qdq: the released code, JAX 0.4.20): ratios to them hold for a machine of
that kind only. Shares of the matmul floor are of this run: the least FLOPs of a step over the rate of a chained matmul
that is timed in turn with it.
"""

import dataclasses

import jax
import jax.numpy as jnp

import cped
import dac
import qdq
from speed_parts.measuring import Case, chain_case, mlp_flops

NUM_OBS, NUM_ACT = 17, 6


def transitions(kind, num_rows):
    """Random rows of a script's Transitions: the times do not depend on their values."""
    keys = jax.random.split(jax.random.key(0), 4)
    return kind(
        observations=jax.random.normal(keys[0], (num_rows, NUM_OBS)),
        actions=jax.random.uniform(keys[1], (num_rows, NUM_ACT), minval=-1.0),
        rewards=jax.random.normal(keys[2], (num_rows,)),
        next_observations=jax.random.normal(keys[3], (num_rows, NUM_OBS)),
        terminals=jnp.zeros(num_rows),
    )


def seed_keys(num_seeds):
    return jax.random.split(jax.random.key(0), num_seeds)


def chunk_case(name, args, state, chunk, target=None):
    """Updates a second of all seeds; a call is one chunk, on from where the last one ended."""
    kept = {"state": state}

    def call():
        kept["state"], metrics = chunk(kept["state"])
        return metrics

    return Case(name, call, "/s", args.chunk * args.num_seeds, target, 1)


def against(bench, name, found, rate, reference, gigaflops, target=None):
    """Two rows: a rate over the reference's, and its share of the matmul floor."""
    if reference:
        bench.ratio(f"{name}: against the reference", found, [reference] * len(found), target)
    share = f"{name}: share of the matmul floor ({gigaflops:.3g} GF)"
    bench.ratio(share, found, rate, None, "%", 100 * gigaflops)


# === CPED ===

CPED_REFERENCE = {"flow": 12.1, "actor-critic": 23.8}  # iterations/s
CPED_FLOOR = {  # GFLOP an iteration
    ("cond", "flow"): 0.34, ("cond", "actor-critic"): 0.61, ("nice", "flow"): 2.6, ("nice", "actor-critic"): 1.65,
}  # fmt: skip


def cped_phases(args, data, name):
    """Cases of both phases. An iteration is one of the released code: a discriminator step and a fifth of a flow step,
    or a critic step and half an actor step."""
    init, *chunks = cped.make_train(args)
    states = [init(seed_keys(args.num_seeds), data) for _ in chunks]
    run = lambda chunk: lambda state: chunk(state, data)
    parts = zip(CPED_REFERENCE, states, chunks, strict=True)
    return [chunk_case(f"{name}: {phase}", args, state, run(chunk)) for phase, state, chunk in parts]


def cped_flow(bench, flow, data, chunk):
    """Both phases with one kind of flow, one seed and four."""
    hidden, target = ((256, 256), None) if flow == "cond" else ((750, 750), 3)
    args = cped.Args(flow=flow, flow_hidden_sizes=hidden, chunk=chunk)
    one = cped_phases(args, data, f"{flow}, 1 seed")
    many = dataclasses.replace(args, num_seeds=4)
    four = cped_phases(many, data, f"{flow}, 4 seeds in all") if flow == "cond" else []
    *values, rate = bench.measure(*one, *four, chain_case(1, 256, 256))
    for phase, found in zip(CPED_REFERENCE, values[:2], strict=True):
        against(bench, f"{flow}: {phase}", found, rate, CPED_REFERENCE[phase], CPED_FLOOR[flow, phase], target)
    ours = [0.5 / a + 1.0 / b for a, b in zip(*values[:2], strict=True)]
    theirs = 0.5 / CPED_REFERENCE["flow"] + 1.0 / CPED_REFERENCE["actor-critic"]
    name = f"{flow}: 0.5M + 1M iterations, against the reference"
    bench.ratio(name, [theirs] * len(ours), ours, 6 if flow == "cond" else 3)
    for phase, alone, all_four in zip(CPED_REFERENCE, values[:2], values[2:], strict=False):
        bench.ratio(f"{flow}: {phase}, 4 seeds against one after the other", all_four, alone, 1)


def cped_part(bench):
    """The flow of the defaults, and the released code's."""
    rows = transitions(cped.Transitions, 2_000 if bench.small else 100_000)
    data = cped.CpedData(rows, jax.tree.map(lambda x: x[:100], rows), None)
    cped_flow(bench, "cond", data, 10 if bench.small else 200)
    cped_flow(bench, "nice", data, 10 if bench.small else 50)


# === QDQ ===

QDQ_REFERENCE = {"teacher": 176.7, "student": 91.0, "policy": 17.6}  # steps/s
QDQ_FLOOR = {"teacher": 0.226, "student": 0.452, "policy": 1.42, "policy, 50 samples": 4.24}  # GFLOP a step
QDQ_TARGET = {"teacher": 1.5, "student": 1.7, "policy": 3.8}
QDQ_STEPS = {"teacher": 0.8e6, "student": 1.6e6, "policy": 1.0e6}  # of a published run


def qdq_phases(args, data, entries, name):
    """Cases of the three phases; a policy update is a critic step and half an actor step."""
    teacher, student, policy = qdq.make_train(args, NUM_OBS, NUM_ACT)
    keys = seed_keys(args.num_seeds)
    net = teacher.init(keys).nets.net
    full = lambda x: jnp.full(args.num_seeds, x)
    model = qdq.QModel(jax.tree.map(jnp.copy, net), full(entries.low), full(entries.high))
    case = lambda phase, state, chunk: chunk_case(f"{name}: {phase}", args, state, chunk)
    return [
        case("teacher", teacher.init(keys), lambda state: teacher.chunk(state, entries)),
        case("student", student.init(keys, net), lambda state: student.chunk(state, net, entries)),
        case("policy", policy.init(keys), lambda state: policy.chunk(state, model, data)),
    ]


def qdq_part(bench):
    """One seed by quadrature and by 50 samples, and two seeds in one process; networks of 3 x 256."""
    data = transitions(qdq.Transitions, 4_000 if bench.small else 100_000)
    c = jnp.concatenate([data.observations, data.actions], -1)
    entries = qdq.Entries(c, jnp.tanh(data.rewards), jnp.float32(-30.0), jnp.float32(500.0))
    args = qdq.Args(**qdq.PUBLISHED_ALL, chunk=10 if bench.small else 500)
    sampled = dataclasses.replace(args, spread="mc", chunk=10 if bench.small else 100)
    one = qdq_phases(args, data, entries, "1 seed, 8 nodes")
    mc = qdq_phases(sampled, data, entries, "50 samples")[2]
    two = qdq_phases(dataclasses.replace(args, num_seeds=2), data, entries, "2 seeds in all, 8 nodes")
    *values, rate = bench.measure(*one, mc, *two, chain_case(1, 256, 256))
    for phase, found in zip(QDQ_REFERENCE, values[:3], strict=True):
        against(bench, phase, found, rate, QDQ_REFERENCE[phase], QDQ_FLOOR[phase], QDQ_TARGET[phase])
    name = "policy, 50 samples"
    against(bench, name, values[3], rate, QDQ_REFERENCE["policy"], QDQ_FLOOR[name])
    for phase, alone, both in zip(QDQ_REFERENCE, values[:3], values[4:], strict=True):
        bench.ratio(f"{phase}: 2 seeds against one after the other", both, alone, 1)
    hours = lambda rates: sum(QDQ_STEPS[p] / rate / 3600 for p, rate in rates.items())
    ours = [hours(dict(zip(QDQ_STEPS, row, strict=True))) for row in zip(*values[:3], strict=True)]
    bench.ratio("published run of one seed: against the reference", [hours(QDQ_REFERENCE)] * len(ours), ours)


# === DAC ===

DAC_REFERENCE = 5.15  # updates/s at N = 10


def dac_flops(args):
    """Least matmul FLOPs of an update, next states and times counted once."""
    batch, width = args.batch_size, args.hidden_sizes
    rows = batch * args.num_q_samples
    actor = (NUM_OBS + NUM_ACT + dac.TIME_WIDTH, *width, NUM_ACT)
    critic = (NUM_OBS + NUM_ACT, *width, 1)
    policy = sum(mlp_flops(actor, batch)[:3])
    if args.guidance == "none":
        return policy
    sampling = args.num_steps * mlp_flops((NUM_ACT, *width, NUM_ACT), rows)[0]
    target = args.num_critics * mlp_flops((NUM_ACT, *width, 1), rows)[0]
    forward, weights, inputs, into = mlp_flops(critic, batch)
    learn = args.num_critics * (forward + weights + inputs)
    norm = args.num_critics * forward
    gradient = args.num_critics * (forward + inputs + into * NUM_ACT / (NUM_OBS + NUM_ACT))
    return sampling + target + learn + norm + gradient + policy


def dac_case(name, args, data, target=None):
    init, chunk = dac.make_train(args, NUM_OBS, NUM_ACT)
    keys = jax.vmap(jax.random.key)(jnp.arange(args.num_seeds))
    return chunk_case(name, args, init(keys), lambda state: chunk(state, data), target)


def dac_part(bench):
    """10 critics of 3 x 256, T = 5, N = 10 and N = 1; cloning; two seeds against one after the other."""
    small = dict(hidden_sizes=(32, 32), num_critics=2, batch_size=32) if bench.small else {}
    data = transitions(dac.Transitions, 2_000 if bench.small else 100_000)
    make = lambda chunk, **changes: dac.Args(chunk=chunk, **{**small, **changes})
    published, one, clone = make(20), make(40, num_q_samples=1), make(400, guidance="none")
    sizes = published.num_critics, published.batch_size * published.num_q_samples, published.hidden_sizes[0]
    fast, single, _, both, rate = bench.measure(
        dac_case("dac_update, N = 10 (published)", published, data, 8),
        dac_case("dac_update, N = 1", one, data),
        dac_case("dac_update, cloning", clone, data),
        dac_case("dac_update, N = 1, two seeds (seed updates)", dataclasses.replace(one, num_seeds=2), data),
        chain_case(*sizes),
    )
    against(bench, "N = 10", fast, rate, DAC_REFERENCE, dac_flops(published) / 1e9)
    against(bench, "N = 1", single, rate, None, dac_flops(one) / 1e9)
    bench.ratio("two seeds against one after the other", both, single, 0.97)
