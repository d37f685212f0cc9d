"""Faults on purpose: kill the scripts at random moments, go on with --resume, compare with a run that nobody touched.

    python benchmark/fault_harness.py --kills 102 --work runs/faults          half an hour or more on one core; resumes
    python benchmark/fault_harness.py --work runs/faults --page               docs/faults.md and counts from the records

Every run is a real process on the point task. `kill -9` strikes at a moment drawn uniformly over the processor time
of the untouched run, start-up included, again and again in the same run. Then the run is finished and compared:
policy, states and buffers bit for bit, log.jsonl but for time/, TensorBoard's scalars as TensorBoard shows them.
What else is tried is in FAULTS. Linux only (/proc, mount namespaces).

The scripts save once a minute; runs of seconds would never save. So the clock that a script sees (time.time) runs
`CLOCK` times as fast: states are written every 2 seconds. Nothing else in a script is touched.
"""

import argparse
import collections
import hashlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
CLOCK = 30.0
MAX_KILLS = 5  # of one run, before it is let go to its end
PATIENCE = 300.0  # seconds without any use of the processor are a hang
DATA = "data/point-angle-0.npz"
QUICK = "--dataset {work}/data/point-angle-0.npz --quick --chunk 250 --eval-every 250"
RUNS = {  # script -> flags; {work} is the harness's folder
    "wurl_sac": "--task point --num-policies 3 --num-updates 2000 --chunk 200 --eval-every 400 --warmup-steps 300 "
    "--replay-size 1000 --eval-episodes 4",
    "udg_select": "--buffers {work}/reference/wurl_sac/buffers --task point-angle-0 point-angle-90 --top 1 2 all "
    "--w1-points 200",
    "mopo": f"{QUICK} --num-updates 1500 --rollout-freq 250 --max-epochs 8 --rollout-batch 512",
    "cped": f"{QUICK} --flow-updates 1000 --num-updates 1500",
    "qdq": f"{QUICK} --teacher-updates 1000 --student-updates 1000 --num-updates 1000",
    "dac": f"{QUICK} --num-updates 1250",
}
LEARNERS = [name for name in RUNS if name != "udg_select"]
FAULTS = ("SIGTERM", "SIGINT", "truncated", "both torn", "read-only", "disk full")
SHARES = (None, 0.3, 0.9)  # disk full: too small from the start; share of a state that is left when others fill it


# --- one process ---------------------------------------------------------------------------------


def child(epoch, script, flags):
    """Become the script, with a fast clock that all processes of a harness share."""
    real = time.time
    time.time = lambda: epoch + CLOCK * (real() - epoch)
    sys.argv, sys.path[0] = [f"{script}.py", *flags], str(ROOT)
    runpy.run_path(f"{script}.py", run_name="__main__")


def environment(work):
    """One processor's worth of CPU programs, compiled once: restarts take seconds."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(work / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    cache["NPROC"] = "1"  # XLA threads: as many for every life, whatever the machine does beside
    return {**os.environ, **cache}


def command(work, script, folder, resume=False):
    flags = RUNS[script].replace("{work}", str(work)).split() + ["--out", str(folder)]
    again = {"udg_select": "--overwrite"}.get(script, "--resume")
    epoch = (work / "epoch").read_text()
    return [sys.executable, str(Path(__file__).resolve()), "--child", epoch, script, *flags, *[again] * resume]


def cpu_seconds(pid):
    """Processor time of a process and its threads so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def phase_of(text):
    """What a script was at, by what it has printed."""
    lines = [line for line in text.splitlines() if "  ETA " in line]
    if lines:  # "model step 120/512 (23%)  ..." -> "model step"
        label = " ".join(lines[-1].split("/")[0].split()[:-1])
        return f"after the last {label}" if "(100%)" in lines[-1] else label
    steps = {"wrote ": "writing", "buffers of ": "measuring"}  # udg_select.py
    return next((name for word, name in steps.items() if word in text), "start-up")


class Life:
    """One process from its start to its end, its own or the one that was given to it."""

    def __init__(self, work, words, at=None, number=signal.SIGKILL):
        """Run the command; send signal `number` when it has used `at` seconds of processor time."""
        log = work / "life.txt"
        moved, self.struck, self.hung, self.cpu = time.monotonic(), False, False, 0.0
        self.began = time.time()
        with open(log, "wb") as out:
            process = subprocess.Popen(
                words, cwd=ROOT, env=environment(work), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
            while process.poll() is None:
                try:
                    used = cpu_seconds(process.pid)
                except (FileNotFoundError, ProcessLookupError):
                    continue
                moved, self.cpu = time.monotonic() if used > self.cpu else moved, used
                if at is not None and self.cpu >= at and not self.struck:
                    process.send_signal(number)
                    self.struck = True
                if time.monotonic() - moved > PATIENCE:
                    os.killpg(process.pid, signal.SIGKILL)
                    self.hung = True
                time.sleep(0.01)
        self.ended = time.time()
        self.code, self.text = process.returncode, log.read_text(errors="replace")
        self.where = phase_of(self.text)

    @property
    def killed(self):
        return self.code == -signal.SIGKILL and not self.hung

    def unsaved(self, folder):
        """Seconds between the last state that this process wrote and its end; None where it wrote none."""
        newest = max((path.stat().st_mtime for path in folder.rglob("state.npz")), default=0.0)
        return self.ended - newest if newest > self.began else None

    def last_line(self):
        return (self.text.strip().splitlines() or [""])[-1][:300]


# --- comparing -----------------------------------------------------------------------------------


def same_arrays(a, b):
    """Names of the members of two npz files that differ; metadata but for what must differ."""
    with np.load(a, allow_pickle=False) as x, np.load(b, allow_pickle=False) as y:
        if sorted(x.files) != sorted(y.files):
            return ["members"]
        different = [k for k in x.files if not k.endswith("json") and x[k].tobytes() != y[k].tobytes()]
        different += [k for k in x.files if (x[k].shape, x[k].dtype) != (y[k].shape, y[k].dtype) and "json" not in k]
        if "metadata_json" in x.files and plain_metadata(x) != plain_metadata(y):
            different.append("metadata_json")
    return different


def plain_metadata(file):
    """Metadata without the date and the flags that say where and how the run was started."""
    metadata = json.loads(str(file["metadata_json"]))
    metadata.pop("created", None)
    for flag in ("out", "resume", "overwrite"):
        metadata.get("generator", {}).get("flags", {}).pop(flag, None)
    for parent in metadata.get("parents", []):
        parent.pop("sha256", None)  # of a file, whose metadata has a date
    return metadata


def log_records(folder):
    """log.jsonl without what must differ: the time, and in the first line the folder and --resume."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    head = {k: v for k, v in lines[0]["args"].items() if k not in ("out", "resume")}
    return [head] + [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines[1:]]


def board_scalars(folder):
    """{tag: [(step, value)]} as TensorBoard shows them: a session's start drops all from its step on, of every tag."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = collections.defaultdict(list)
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, place = path.read_bytes(), 0
        while place + 12 <= len(data):
            size = int.from_bytes(data[place : place + 8], "little")
            if place + 16 + size > len(data):
                break  # a record that was cut: readers stop there too
            event = Event.FromString(data[place + 12 : place + 12 + size])
            place += 16 + size
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                found.update({tag: [x for x in values if x[0] < event.step] for tag, values in found.items()})
            for value in event.summary.value:
                if not value.tag.startswith("time/"):
                    found[value.tag].append((event.step, value.simple_value))
    return {tag: values for tag, values in found.items() if values}


def files_of(folder):
    """{relative name: sha256} of every file."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def compare(folder, wanted, unread=frozenset()):
    """What differs between a run's folder and the untouched one's, names `unread` apart -> list of sentences."""
    problems = []
    names, expected = (
        {n for n in files_of(x) if "tfevents" not in n and "state.prev" not in n} for x in (folder, wanted)
    )
    problems += [f"{name}: missing" for name in sorted(expected - names)]
    problems += [f"{name}: left behind" for name in sorted(names - expected)]
    for name in sorted(n for n in (names & expected) - unread if n.endswith(".npz")):
        problems += [f"{name}: {key} differs" for key in same_arrays(folder / name, wanted / name)[:3]]
    if (wanted / "log.jsonl").exists():
        a, b = log_records(folder), log_records(wanted)
        if a != b:
            problems.append(f"log.jsonl: {len(a)} records for {len(b)}, or other numbers")
        a, b = board_scalars(folder), board_scalars(wanted)
        for tag in sorted(a.keys() | b.keys()):
            if a.get(tag) != b.get(tag):
                problems.append(f"TensorBoard: {tag} {describe_steps(a.get(tag, []), b.get(tag, []))}")
    return problems


def describe_steps(found, wanted):
    counts = collections.Counter(step for step, _ in found)
    twice = [step for step, n in counts.items() if n > 1]
    gone = sorted({step for step, _ in wanted} - counts.keys())
    return f"twice at {twice}, missing at {gone}" if twice or gone else "other values"


# --- kills ---------------------------------------------------------------------------------------


def reference(work, script):
    """The untouched run, once; twice the first time, as programs from the cache differ in the last digit from new ones
    (docs/faults.md) -> its processor seconds."""
    folder, note = work / "reference" / script, work / "reference" / f"{script}.json"
    if not note.exists():
        for _ in range(2):
            subprocess.run(["rm", "-rf", str(folder)], check=True)
            life = Life(work, command(work, script, folder))
            if life.code:
                sys.exit(f"{script}: the untouched run fails\n{life.text[-3000:]}")
        note.write_text(json.dumps({"cpu": life.cpu}))
    return json.loads(note.read_text())["cpu"]


def finish(work, script, folder, record, resume):
    """Let a run go to its end and compare it; what is wrong goes into record["problems"]."""
    life = Life(work, command(work, script, folder, resume))
    judge(work, script, folder, record, life)
    return life


def judge(work, script, folder, record, life):
    """What is wrong with a process that was let go to its end, and with its folder."""
    record["from nothing"] += "nothing was saved here yet" in life.text
    if life.hung:
        record["problems"].append(f"hangs: {life.last_line()}")
    elif life.code:
        record["problems"].append(f"exit {life.code}: {life.last_line()}")
    else:
        # A finished run has all that it should leave, and no use for a state that was cut.
        unread = {"state.npz"} if "this run is finished" in life.text else set()
        record["problems"] += compare(folder, work / "reference" / script, unread)


def whole_files(folder):
    """Files under their own names that cannot be read -> list of names."""
    torn = []
    for path in folder.rglob("*"):
        if path.name.startswith(".") or not path.is_file():
            continue
        try:
            if path.suffix == ".npz":
                np.load(path, allow_pickle=False).close()
            elif path.name == "scores.json":
                json.loads(path.read_text())
            elif path.suffix == ".png" and not path.read_bytes().endswith(b"IEND\xaeB`\x82"):
                torn.append(path.name)
        except Exception:  # whatever numpy, zipfile or json raise
            torn.append(path.name)
    return torn


def kill_trial(work, script, number, most, moments=(0.0, 1.0)):
    """One run, up to `most` kills between two shares of the untouched run's time, and its end -> record."""
    cpu, folder = reference(work, script), work / "trials" / f"{script}-{number}"
    rng = np.random.default_rng([number, list(RUNS).index(script)])
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    record = {"kind": "kill", "script": script, "trial": number, "kills": [], "from nothing": 0, "problems": []}
    resume = False
    while len(record["kills"]) < most:
        life = Life(work, command(work, script, folder, resume), cpu * rng.uniform(*moments))
        if life.killed:
            torn = whole_files(folder) if folder.exists() else []
            kill = {"where": life.where, "cpu": life.cpu, "torn": torn, "unsaved": life.unsaved(folder)}
            record["kills"].append(kill)
            record["problems"] += [f"{name}: torn" for name in torn if not name.endswith(".png")]
            record["from nothing"] += "nothing was saved here yet" in life.text
            resume = True
        else:  # it came to its end before the moment that was drawn
            judge(work, script, folder, record, life)
            break
    else:
        finish(work, script, folder, record, resume)
    if not record["problems"]:
        subprocess.run(["rm", "-rf", str(folder)], check=True)
    return record


# --- other faults --------------------------------------------------------------------------------


def run_until(work, script, folder, at, number):
    """A run that a signal ends after `at` seconds of processor time."""
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    return Life(work, command(work, script, folder), at, number)


def state_folder(folder):
    """Where the newest state is: the run's folder, or that of an earlier phase."""
    states = sorted(folder.rglob("state.npz"), key=lambda path: path.stat().st_mtime)
    return states[-1].parent if states else None


def clear_refusal(life, *words):
    """What is wrong with the way a process gave up -> list of sentences."""
    problems = [] if life.code not in (0, None) else ["exit code 0"]
    problems += ["hangs"] * life.hung
    problems += ["traceback"] * ("Traceback" in life.text)
    problems += [f"does not say {word!r}" for word in words if not any(x in life.text for x in word.split("|"))]
    return [f"{problem}: {life.last_line()}" for problem in problems]


def try_signal(work, script, folder, record, rng, name):
    """SIGTERM or Ctrl-C: saves, says so in a line, exits with a code, and --resume ends the same."""
    cpu = reference(work, script)
    life = run_until(work, script, folder, rng.uniform(0.3 * cpu, 0.9 * cpu), getattr(signal, name))
    record["where"] = life.where
    ended = life.code == -getattr(signal, name) and "policy.npz, " in life.text  # while the interpreter goes
    if not life.struck or life.code == 0 or ended:
        record["where"] = "after its end"
        if ended:
            finish(work, script, folder, record, True)
        return
    saved = any(folder.rglob("state*.npz"))
    record["problems"] += clear_refusal(life, "--resume") if saved else []
    record["where"] += "" if saved else ", nothing to save"
    finish(work, script, folder, record, True)


def try_torn(work, script, folder, record, rng, name):
    """The newest state cut short: the one before is taken, and that is said. Both: refused, and nothing is changed."""
    cpu = reference(work, script)
    for share in (0.9, 0.8, 0.7, 0.6, 0.95):
        record["where"] = run_until(work, script, folder, share * cpu, signal.SIGKILL).where
        here = state_folder(folder) if folder.exists() else None
        if here and (here / "state.prev.npz").exists():
            break
    else:
        record["problems"].append("the harness found no moment with two states")
        return
    for waiting in here.glob("state.new.npz"):
        waiting.unlink()
    cut = [here / "state.npz"] + [here / "state.prev.npz"] * (name == "both torn")
    for path in cut:
        path.write_bytes(path.read_bytes()[: int(rng.uniform(0.0, 1.0) * path.stat().st_size)])
    if name == "truncated":
        life = finish(work, script, folder, record, True)
        if "cannot read" not in life.text:
            record["problems"].append("does not say that the newest state cannot be read")
        return
    before = files_of(folder)
    life = Life(work, command(work, script, folder, True))
    record["problems"] += clear_refusal(life, "no state to resume from")
    if files_of(folder) != before:
        record["problems"].append("a refused resume changed files")


def namespace(script_text):
    """A command in a mount namespace of its own: as root, or as root of a user namespace."""
    return ["unshare", "-m" if os.getuid() == 0 else "-rm", "bash", "-c", f"set -e; {script_text}"]


def quoted(words):
    return " ".join("'" + str(word).replace("'", "'\\''") + "'" for word in words)


def try_read_only(work, script, folder, record, rng, name):
    """A folder that cannot be written: refused by name; and a saved run in one: refused, and unharmed."""
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    (folder / "new").mkdir(parents=True)
    lock = f"mount --bind {folder} {folder}; mount -o remount,ro,bind {folder}"
    life = Life(work, namespace(f"{lock}; exec {quoted(command(work, script, folder / 'new'))}"))
    record["problems"] += clear_refusal(life, str(folder / "new"))
    if script == "udg_select":
        return
    at = 0.8 * reference(work, script)
    life = run_until(work, script, folder, at, signal.SIGKILL)
    before = files_of(folder)
    life = Life(work, namespace(f"{lock}; exec {quoted(command(work, script, folder, True))}"))
    record["problems"] += clear_refusal(life, str(folder))
    if files_of(folder) != before:
        record["problems"].append("the harness's lock did not hold")
    finish(work, script, folder, record, True)


def try_disk_full(work, script, folder, record, rng, name):
    """A disk that is too small from the start, or that others fill once something is saved: one clear line; then the
    run goes on, from what was saved, on a larger one."""
    reference(work, script)
    need = sum(path.stat().st_size for path in (work / "reference" / script).rglob("*") if path.is_file())
    share = SHARES[record["trial"] % len(SHARES)]
    disk = folder.with_name(folder.name + "-disk")
    subprocess.run(["rm", "-rf", str(folder), str(disk)], check=True)
    disk.mkdir(parents=True)
    size, words = int(need / 2 if share is None else 5 * need + 50e6), quoted(command(work, script, disk / "run"))
    fill = f"""
        until f=$(find {disk}/run -name '{"*.npz" if script == "udg_select" else "state.npz"}' 2>/dev/null | head -1)
              [ -n "$f" ] || ! kill -0 $pid 2>/dev/null; do sleep 0.01; done
        left=$(($(stat -c %s "$f") * {round(100 * (share or 0))} / 100))
        fallocate -l $(($(df --output=avail -B1 {disk} | tail -1) - left)) {disk}/filler"""
    life = Life(work, namespace(f"""
        mount -t tmpfs -o size={size} none {disk}
        {words} & pid=$!
        {"" if share is None else f"({fill}) &"}
        wait $pid || code=$?
        cp -a {disk}/run {folder} || true
        exit ${{code:-0}}"""))  # fmt: skip
    kind = f"half of {need / 1e6:.1f} MB" if share is None else f"filled, {share:.0%} of a state left"
    record["where"] = f"{kind}, {life.where}"
    if life.code:
        remedy = "are free|" + ("No space left" if script == "udg_select" else "free space, then go on with --resume")
        record["problems"] += clear_refusal(life, f"{disk}/run", remedy)
        record["problems"] += [f"{n}: torn" for n in whole_files(folder) if not n.endswith(".png")]
    elif share is None:
        record["problems"].append("half a disk was enough")
    else:
        record["where"] = "after the last file"
    finish(work, script, folder, record, folder.exists())


TRIES = {
    "SIGTERM": try_signal, "SIGINT": try_signal, "truncated": try_torn, "both torn": try_torn,
    "read-only": try_read_only, "disk full": try_disk_full,
}  # fmt: skip


def fault_trial(work, script, name, number):
    """One fault of FAULTS -> record."""
    folder = work / "trials" / f"{script}-{name.replace(' ', '-')}-{number}"
    record = {"kind": name, "script": script, "trial": number, "from nothing": 0, "problems": [], "where": ""}
    rng = np.random.default_rng([number, list(RUNS).index(script), FAULTS.index(name)])
    TRIES[name](work, script, folder, record, rng, name)
    if not record["problems"]:
        subprocess.run(["rm", "-rf", str(folder)], check=True)
    return record


# --- the whole -----------------------------------------------------------------------------------


def read_records(work):
    path = work / "records.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def keep(work, record):
    with open(work / "records.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def planned_faults(repeats):
    """(script, fault, number) of every other fault."""
    plan = []
    for name in FAULTS:
        scripts = list(RUNS) if name in ("read-only", "disk full") else LEARNERS
        times = {"SIGTERM": repeats, "SIGINT": repeats, "disk full": len(SHARES)}.get(name, 1)
        plan += [(script, name, number) for number in range(times) for script in scripts]
    return plan


def prepare(work):
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "epoch").exists():
        (work / "epoch").write_text(f"{time.time():.0f}")
    if not (work / DATA).exists():
        code = f"from envs.buffers import scripted; scripted.dataset({str(work / 'data')!r})"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(work), check=True)


def run(work, kills, repeats, scripts):
    """All that is not done yet: a run with kills of the script that had fewest, another fault, and so on."""
    prepare(work)
    for script in dict.fromkeys(["wurl_sac", *scripts]):  # udg_select reads what wurl_sac wrote
        print(f"reference {script}: {reference(work, script):.1f} s of processor time", flush=True)
    records = read_records(work)
    done = {(r["script"], r["kind"], r["trial"]) for r in records}
    plan = [x for x in planned_faults(repeats) if x[0] in scripts and x not in done]
    struck = {s: sum(len(r.get("kills", [])) for r in records if r["script"] == s) for s in scripts}
    trials = {s: sum(r["script"] == s and r["kind"] == "kill" for r in records) for s in scripts}
    began, first, total = time.time(), sum(struck.values()), kills * len(scripts)
    while plan or min(struck.values()) < kills:
        script = min(scripts, key=struck.get)
        if struck[script] < kills:
            record = kill_trial(work, script, trials[script], min(MAX_KILLS, kills - struck[script]))
            struck[script] += len(record["kills"])
            trials[script] += 1
            keep(work, record)
            count = sum(struck.values())
            eta = (total - count) * (time.time() - began) / max(count - first, 1) / 60
            print(
                f"kills {count}/{total}  ETA {eta:.0f} min  {script}: {'; '.join(record['problems']) or 'equal'}",
                flush=True,
            )
        if plan:
            script, name, number = plan.pop(0)
            record = fault_trial(work, script, name, number)
            keep(work, record)
            told = "; ".join(record["problems"]) or "as promised"
            print(f"{name}, {script} ({record['where']}): {told}; {len(plan)} faults to come", flush=True)


# --- what came of it -----------------------------------------------------------------------------


def counts_of(records):
    """Records -> {"kills": {script: counts}, "faults": {fault: {script: counts}}}."""
    found = {"kills": {}, "faults": {}}
    for record in records:
        kind, script = record["kind"], record["script"]
        home = found["kills"] if kind == "kill" else found["faults"].setdefault(kind, {})
        entry = home.setdefault(script, {"runs": 0, "as promised": 0, "began anew": 0, "problems": []})
        entry["runs"] += 1
        entry["as promised"] += not record["problems"]
        entry["began anew"] += record["from nothing"]
        entry["problems"] += record["problems"]
        for kill in record.get("kills", []):
            where = entry.setdefault("kills", {})
            where[kill["where"]] = where.get(kill["where"], 0) + 1
            entry["torn"] = entry.get("torn", 0) + len(kill["torn"])
            if kill.get("unsaved") is not None and not kill["where"].startswith("after"):
                entry["unsaved"] = max(entry.get("unsaved", 0.0), kill["unsaved"])
    return found


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(x) for x in line) + " |" for line in lines)


def write_page(work):
    """Tables of docs/faults.md, between its marks, and results/faults/counts.json."""
    counts = counts_of(read_records(work))
    rows, whole = [], 0
    for script in RUNS:
        entry = counts["kills"].get(script, {"kills": {}, "runs": 0, "as promised": 0, "began anew": 0})
        kills = entry.get("kills", {})
        whole += sum(kills.values())
        moments = ", ".join(f"{where} {n}" for where, n in sorted(kills.items(), key=lambda x: -x[1]))
        unsaved = f"{entry['unsaved']:.1f} s" if "unsaved" in entry else ""
        sums = entry["runs"], entry["began anew"], entry["as promised"]
        rows.append([script, sum(kills.values()), moments, *sums, unsaved])
    rows.append(["all", whole, "", *(sum(row[i] for row in rows) for i in (3, 4, 5)), ""])
    head = ["script", "kills", "when", "runs", "nothing saved yet", "equal to the untouched run", "longest unsaved"]
    kills = table(head, rows)
    rows = []
    for name in FAULTS:
        cells = counts["faults"].get(name, {})
        told = [f"{cells[s]['as promised']} of {cells[s]['runs']}" if s in cells else "" for s in RUNS]
        rows.append([name, *told])
    faults = table(["fault", *RUNS], rows)
    problems = [
        f"- {kind}, {script}: {text}"
        for kind, entries in {"kill": counts["kills"], **counts["faults"]}.items()
        for script, entry in entries.items()
        for text in sorted(set(entry["problems"]))
    ]
    page, (start, end) = ROOT / "docs" / "faults.md", ("<!-- counts -->", "<!-- end of counts -->")
    before, rest = page.read_text().split(start)
    body = "\n\n".join(
        [kills, faults, "Not as promised:\n\n" + "\n".join(problems) if problems else "All as promised."]
    )
    page.write_text(f"{before}{start}\n\n{body}\n\n{end}{rest.split(end)[1]}")
    folder = ROOT / "results" / "faults"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")
    print(body)


def main(argv):
    if argv[:1] == ["--child"]:
        return child(float(argv[1]), argv[2], argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=102, help="kills over the scripts named, in equal parts")
    parser.add_argument("--repeats", type=int, default=2, help="SIGTERM and SIGINT per script")
    parser.add_argument("--scripts", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--work", type=Path, default=Path("runs/faults"))
    parser.add_argument("--page", action="store_true", help="write docs/faults.md's tables, run nothing")
    args = parser.parse_args(argv)
    if args.page:
        return write_page(args.work.resolve())
    run(args.work.resolve(), -(-args.kills // len(args.scripts)), args.repeats, args.scripts)


if __name__ == "__main__":
    main(sys.argv[1:])
