"""benchmark/gpu_check.py runs to its end in small; MJX steps the cheetah as C MuJoCo does; what is wrong is told."""

import json
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dac
import gpu_check as G
from runner import devices


def read(path):
    return json.loads(path.read_text())["rows"]


def test_all_in_small(tmp_path):
    """One step and ten of MJX's cheetah are within their limits of C MuJoCo's; otherwise a row fails."""
    path = tmp_path / "found.json"
    assert G.main(["--check", "--json", str(path)]) == 0, [row for row in read(path) if row["failed"]]
    told = {row["what"]: row for row in read(path)}
    assert [row["stage"] for row in read(path) if row["what"] == "whole stage"] == list(G.STAGES)
    assert all("limits of" in told[f"cheetah, mjx: {n} from C MuJoCo"]["note"] for n in ("one step", "ten steps"))
    rates = {what.split(":")[0]: row for what, row in told.items() if what.endswith("2 seeds")}
    assert set(rates) == {"dac", "mopo", "cped", "qdq"}
    assert all(row["floor"] > 0 and row["memory_gb"] > 0 for row in rates.values())


class Pose(NamedTuple):
    qpos: np.ndarray
    qvel: np.ndarray


class Robot(NamedTuple):
    pipeline_state: Pose
    reward: np.ndarray
    done: np.ndarray


@pytest.fixture
def check(tmp_path):
    check = G.Check(tmp_path / "found.json", "", 100.0, True)
    check.stage, check.until = "physics", check.began + 100
    return check


@pytest.mark.parametrize("moved, ended, failures", [(0.0, 0, 0), (1e-5, 0, 1), (np.nan, 0, 2), (0.0, 1, 2)])
def test_another_engine_is_told(check, moved, ended, failures):
    """A cheetah that is elsewhere after one step (ten allow for as much), and one that has ended."""

    def engine(moved, ended):
        x = np.full((4, 9), moved, np.float32)
        return G.Built(lambda *_: (Robot(Pose(x, 0 * x), 0 * x[:, 0], np.full(4, ended)),), (None, None, None), {})

    G.parity(check, "cheetah", G.mjx_parity.TOLERANCES["cheetah"], engine(moved, ended), engine(0.0, 0))
    assert sum(row["failed"] for row in read(check.path)) == failures and check.ok == (failures == 0)


def test_what_fails_is_told_and_the_rest_goes_on(tmp_path, monkeypatch):
    broken = lambda check: 1 / 0
    stages = {"broken": (broken, 0, 9), "late": (broken, 99, 99), "whole": (lambda check: check.row("here"), 0, 9)}
    monkeypatch.setattr(G, "STAGES", stages)
    path = tmp_path / "found.json"
    assert G.main(["--budget-s", "20", "--json", str(path), "--stages", *stages]) == 1
    rows = [row for row in read(path) if row["what"] != "whole stage"]
    assert [(row["stage"], row["failed"]) for row in rows] == [("broken", True), ("late", False), ("whole", False)]
    assert "ZeroDivisionError" in rows[0]["note"] and "skipped" in rows[1]["note"]


def test_a_floor_is_of_the_digits_of_its_row(check):
    """No limit, no floor: the device stage may have ended after its first product."""
    assert G.floor_of(check, 6.0, 0, "float32") is None
    check.limits |= {"float32": 3.0}
    assert G.floor_of(check, 6.0, 0, "float32") is None
    check.limits |= {"copy": 1.0, "bfloat16": 6.0}
    names = "dac, 32 seeds", "dac, 32 seeds, bfloat16", "dac, 32 seeds, tensorfloat32"
    assert [G.floor_of(check, 6.0, 0, G.digits_of(name)) for name in names] == [2.0, 1.0, None]


def test_compilations_that_go_on_are_told_in_the_rows_beside_them(check):
    release = threading.Event()
    check.until = check.began + 0.5
    assert G.build_all(check, {"slow": release.wait}) == {}
    check.until = check.began + 100
    G.guarded(check, "next", lambda: check.row("next", "s", 1.0))
    release.set()
    check.building[0].exception()
    G.guarded(check, "last", lambda: check.row("last", "s", 1.0))
    notes = [(row["what"], row["note"], row["failed"]) for row in read(check.path)]
    assert notes == [("slow", "skipped: not compiled in time", False), ("next", "beside 1 compilations", False),
                     ("last", "", False)]  # fmt: skip


def test_what_a_late_process_started_ends_with_it(tmp_path):
    """As the workers of pytest, which would hold the accelerator; here one that does not listen to SIGTERM."""
    child = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    code = f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
    process = G.start(["-c", f"{code} print(p.pid, flush=True); time.sleep(60)"], tmp_path / "run")
    said = tmp_path / "run" / "output"
    while len(said.read_text().split()) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    assert G.wait_for({"late": process}, 0) == {}
    (pid,) = set(said.read_text().split()) - {"up"}
    status = Path("/proc", pid, "status")
    end = time.time() + 5  # the system reaps it
    while status.exists() and "zombie" not in status.read_text() and time.time() < end:
        time.sleep(0.05)
    assert not status.exists() or "zombie" in status.read_text()


def test_a_program_that_calls_the_host_is_refused():
    host = lambda x: jax.pure_callback(np.sin, jax.ShapeDtypeStruct((), jnp.float32), x)
    make = lambda: (jax.jit(host), (jnp.float32(1),))
    with pytest.raises(RuntimeError, match="host"):
        G.build(make)
    assert G.build(make, calls_back=True).about["memory_gb"] >= 0


def test_the_table_goes_into_the_page(tmp_path, monkeypatch, check):
    monkeypatch.setattr(G, "ROOT", tmp_path)
    page = tmp_path / "docs" / "speed.md"
    page.parent.mkdir()
    page.write_text("\n".join(["before", G.MARKS[0], "old", G.MARKS[1], "after\n"]))
    check.row("a step", "us", [3.0, 1.0, 2.0], "a note")
    G.markdown(check.path)
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "| physics | a step | 2 | us |  |  |  | a note |" in text


def test_matrix_products_take_the_digits_of_the_flag(monkeypatch):
    """On an accelerator; a CPU has one precision. Whoever names a precision of its own keeps it."""
    said = lambda **own: jax.jit(lambda x: jnp.matmul(x, x, **own)).lower(jnp.ones((2, 2))).as_text()
    before = jax.config.jax_default_matmul_precision
    begin = lambda digits: devices.begin(dac.Args(matmul_precision=digits), 1)
    begin("bfloat16")
    assert jax.config.jax_default_matmul_precision == before
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    try:
        for name, word in (("bfloat16", "bf16"), ("tensorfloat32", "HIGH,"), ("float32", "HIGHEST")):
            begin(name)
            assert word in said() and "HIGHEST" in said(precision="highest")
    finally:
        jax.config.update("jax_default_matmul_precision", before)
