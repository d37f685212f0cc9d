"""What all tests share: compiled programs, kept for the length of one test run."""

import os
import subprocess
import sys

import jax
import pytest

# The files that take longest, first: each worker takes whole files, and none should begin a long one at the end.
LONGEST = ["cped", "scale", "wurl_sac", "qdq", "dac", "mopo", "faults", "envs", "chain", "suite", "grid"]

# LLVM's lower level makes the same numbers as fast and compiles in half the time. The older emitter of fused loops does
# as much again for what is not optimised at all; its last digits are others than the default's.
QUICK_TO_COMPILE = ("--xla_backend_optimization_level=1", "--xla_cpu_use_fusion_emitters=false")
ON_CPU = os.environ.get("JAX_PLATFORMS", "cpu").startswith("cpu")  # elsewhere programs are compiled as users' are


def pytest_configure(config):
    """Before any program is compiled, for this process and those that it starts. A flag that this XLA does not know
    (jaxlib 0.11 has no choice of emitters) would end them all: each is tried by a process of its own."""
    first_use = [sys.executable, "-c", "import jax; jax.devices()"]
    for flag in () if hasattr(config, "workerinput") or not ON_CPU else QUICK_TO_COMPILE:
        environment = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()}
        if subprocess.run(first_use, env=environment, capture_output=True).returncode == 0:
            os.environ.update(environment)


def pytest_collection_modifyitems(items):
    rank = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session", autouse=True)
def compiled_quickly(tmp_path_factory):
    """Nearly all time of the tests is the compiler's: it optimises little, and the same program, jitted anew by another
    test or in a process that a test starts, is compiled once."""
    options = {
        "jax_disable_most_optimizations": ON_CPU,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def optimise():
    """For programs that run for longer than they compile: `optimised` in one test, `all_optimised` in a file."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", ON_CPU)


optimised = pytest.fixture(optimise)
all_optimised = pytest.fixture(optimise, scope="module")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """The scripted data of --quick, which no test changes -> their path."""
    from envs.buffers import scripted

    return str(scripted.dataset(tmp_path_factory.mktemp("data")))
