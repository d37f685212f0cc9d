"""runner.report: numbers against numpy, escaping, bad input, and the page in a real browser.

The browser is Debian's chromium (apt-get install -y --no-install-recommends chromium); without it its test fails.
"""

import dataclasses
import html
import html.parser
import importlib
import itertools
import json
import re
import runpy
import shlex
import shutil
import subprocess

import numpy as np
import pytest
import tyro
from PIL import Image
from scipy import stats

from envs import InputError
from runner.report import __main__ as report
from runner.report import numbers, reading, sections
from runner.report.markup import number

HOSTILE = "<script>alert(1)</script>\"'><img src=http://example.org/x onerror=alert(2)>&amp;\u202e\x00\ud800"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


# --- synthetic runs -----------------------------------------------------------------------------


def header(**args):
    about = {"versions": {"python": "3.12.0", "jax": "0.11.2"}, "commit": "abc123", "device": "cpu"}
    return {"args": {"num_updates": 600, **args}, **about}


def lines_of(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def write_log(folder, *records):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text(lines_of(*records))
    return folder


def learner(root, task, name, returns, score=None, **args):
    """A finished mopo run; returns (seeds, evaluations)."""
    records = []
    for (i, step), (s, row) in itertools.product(enumerate(range(100, 601, 100)), enumerate(returns)):
        record = {"step": step, "seed": args.get("seed", 0) + s, "eval/return": row[i], "train/q": float(i)}
        records.append(record | ({"eval/score": row[i] / score} if score else {}))
    head = header(rollout_freq=10, **{"dataset": f"runs/udg_select/{task}/top1.npz", "seed": 0, **args})
    return write_log(root / "mopo" / task / name, head, *records)


def wurl(root, name="seed0"):
    """A finished wurl_sac run of three policies with pictures and a render."""
    records = [
        {"step": step, "eval/min_w": step / 100, "eval/disc_success": 0.9, "eval/travel": [1.0, 2.0, 3.0]}
        for step in (300, 600)
    ]
    folder = write_log(root / "wurl_sac" / "point" / name, header(num_policies=3, task="point", seed=0), *records)
    for figure, size in (("trajectories", (40, 30)), ("distances", (50, 30))):
        Image.new("RGB", size, "red").save(folder / f"{figure}.png")
    (folder / "render").mkdir()
    frames = [Image.new("P", (20, 20), i) for i in range(3)]
    frames[0].save(folder / "render" / "policy_00.gif", save_all=True, append_images=frames[1:], loop=0)
    return folder


def selection(root, task="point-angle-0"):
    """What udg_select.py leaves."""
    folder = root / "udg_select" / task
    folder.mkdir(parents=True)
    one = {"score": 1.5, "std": 0.1, "top_decile": 2.0, "per_step": 0.015, "score_trained": None, "episodes": 7}
    parents = [{"name": "policy_01"}]
    written = {"top1": {"parents": parents, "num_transitions": 700, "num_episodes": 7, "mean_return": 1.5}}
    scores = {"task": task, "flags": {"buffers": ["buffers"], "tasks": [[task]], "top": ["1"], "quick": False}}
    scores |= {"ranking": ["policy_01", "policy_00"], "buffers": {"policy_00": one | {"score": -1}, "policy_01": one}}
    (folder / "scores.json").write_text(json.dumps(scores | {"selections": written}))
    Image.new("RGB", (30, 30), "blue").save(folder.parent / "heatmap.png")
    return folder


def make(tmp_path, *paths):
    """The page of some folders, or of all there is, as text."""
    out = tmp_path / "page.html"
    report.main([*map(str, paths or (tmp_path,)), "--out", str(out)])
    return out.read_text(encoding="utf-8")


class Reader(html.parser.HTMLParser):
    """Elements with attributes, visible text, and the rows of all tables."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text, self.rows, self.in_cell = [], "", [], False
        self.feed(page)
        self.close()

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        self.rows += [[]] if name == "tr" else []
        if name in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, name):
        self.in_cell &= name not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data

    def row(self, start):
        return next(row for row in self.rows if row and row[0].startswith(start))

    def over_tasks(self):
        return [row for row in self.rows if len(row) == 7 and row[1] == "2"]


# --- numbers ------------------------------------------------------------------------------------


def test_bootstrap_draws_seeds_within_tasks():
    rng, again = map(np.random.default_rng, (3, 11))
    strata = [rng.normal(size=5), 1000 + rng.normal(size=8)]
    low, high = numbers.bootstrap(strata)
    assert low < numbers.iqm(np.concatenate(strata)) < high
    values = stats.trim_mean(np.concatenate([again.choice(s, (20_000, len(s))) for s in strata], 1), 0.25, axis=1)
    np.testing.assert_allclose([low, high], np.quantile(values, [0.025, 0.975]), atol=0.05 * (high - low) + 0.02)
    assert numbers.bootstrap(strata) == (low, high)
    few = np.array([1.0, 2.0])
    assert numbers.bootstrap([few]) is None and numbers.bootstrap([strata[0], few]) is None


def test_what_was_evaluated_before_any_learning_does_not_count():
    scores, last, best, counted = numbers.final_scores({0: {0: 9.0, 10: 1.0, 20: 2.0}, 1: {0: 3.0}})
    assert (*scores, *last, *best, counted) == (1.5, 3.0, 2.0, 3.0, 2.0, 3.0, 1)


def test_final_table_against_numpy(tmp_path):
    returns = np.random.default_rng(0).normal(100, 20, (5, 6)).round(3)
    learner(tmp_path, "point-angle-0", "seed0", returns[:2].tolist(), num_seeds=2)
    for s in (2, 3, 4):
        learner(tmp_path, "point-angle-0", f"seed{s}", returns[s : s + 1].tolist(), seed=s)
    learner(tmp_path, "point-angle-0", "two-seed0", (returns[:2] / 3).tolist(), lam=2.0)
    page = Reader(make(tmp_path))
    scores = returns[:, -5:].mean(1)
    low, high = map(number, numbers.bootstrap([scores]))
    told = [f"{number(scores.mean())} \u00b1 {number(scores.std(ddof=1))}", number(stats.trim_mean(scores, 0.25))]
    told += [f"{low} to {high}", number(returns[:, -1].mean()), number(returns.max(1).mean())]
    assert page.row("mopo")[1:8] == ["5", *told, "600 updates, finished"]
    other = page.row("mopo two")
    assert other[1] == "2" and other[4] == "none: 2 seeds" and "lam=2.0" in other[0]


def test_curve_is_mean_and_spread(tmp_path):
    returns = np.array([[1.0, 2, 3, 4, 5, 6], [3.0, 4, 5, 6, 7, 8]])
    learner(tmp_path, "t", "seed0", returns.tolist())
    dots = [a["data-text"] for name, a in Reader(make(tmp_path)).elements if name == "circle"]
    assert [f"mopo, {100 * (i + 1)}: {i + 2:.3f} \u00b1 1.414" for i in range(6)] == dots[:6]
    steps, mean, std = numbers.spread({0: {1: 1.0, 2: 2.0, 3: 9.0}, 1: {1: 3.0, 2: 4.0}})  # one stopped early
    assert steps.tolist() == [1, 2] and mean.tolist() == [2, 3] and np.allclose(std, 2**0.5)


def test_over_tasks(tmp_path):
    returns = np.random.default_rng(1).normal(50, 5, (2, 3, 6))
    for task, of_task in zip("ab", returns.tolist(), strict=True):
        learner(tmp_path, task, "seed0", of_task, score=100.0)
    scores = returns[..., -5:].mean(-1) / 100
    low, high = map(number, numbers.bootstrap(list(scores)))
    mean, iqm = number(scores.mean()), number(stats.trim_mean(scores.ravel(), 0.25))
    assert Reader(make(tmp_path)).over_tasks() == [["mopo", "2", "3", mean, iqm, f"{low} to {high}", "finished"]]


def test_over_tasks_pools_what_is_the_same(tmp_path):
    """Two settings of one name: which one a task has first, or has at all, must not decide what is averaged."""
    learner(tmp_path, "point-angle-0", "seed0", [[10.0] * 6], score=100.0, horizon=1)
    for task in ("point-angle-0", "point-angle-60"):  # "(2)" here, the only one there
        learner(tmp_path, task, "seed1", [[90.0] * 6], score=100.0, horizon=5, seed=1)
    rows = Reader(make(tmp_path)).over_tasks()
    assert [(row[0], row[3], row[6]) for row in rows] == [("mopohorizon=5", "0.9000", "finished")]


def test_runs_of_a_grid_have_their_tasks_and_names(tmp_path):
    """<dataset>/<algorithm>/seed0, where no folder names a script: the task is the file's, not its folder "data"."""
    cells = itertools.product(("hopper-medium-v2", "walker2d-medium-v2"), ("bc", "mopo"))
    for i, (data, algorithm) in enumerate(cells):
        made = learner(tmp_path, data, algorithm, [[float(i)] * 6], 10.0, dataset=f"data/{data}.npz")
        (tmp_path / "grid" / data / algorithm).mkdir(parents=True)
        made.rename(tmp_path / "grid" / data / algorithm / "seed0")
    runs, _ = reading.read_all([tmp_path / "grid"], [])
    assert {run.task for run in runs} == {"hopper-medium-v2", "walker2d-medium-v2"}
    over = Reader(make(tmp_path, tmp_path / "grid")).over_tasks()
    assert [row[0] for row in over] == ["mopo bc", "mopo"]


def test_a_task_is_that_of_the_first_line(tmp_path):
    """Wherever the folder lies and whatever file it learns from: one section."""
    for i, place in enumerate(("mopo/point-angle-0/seed0", "mine/run1", "mopo/old-name/seed2")):
        folder = learner(tmp_path, f"t{i}", "seed0", [[float(i)] * 6], seed=i)
        log = folder / "log.jsonl"
        head, *lines = map(json.loads, log.read_text().splitlines())
        head["args"]["dataset"] = f"somewhere/{i}.npz"
        head |= {"script": "mopo", "task": "point-angle-0"}
        write_log(tmp_path / "runs" / place, head, *lines)
    runs, _ = reading.read_all([tmp_path / "runs"], [])
    assert [(run.script, run.task) for run in runs] == [("mopo", "point-angle-0")] * 3
    page = make(tmp_path, tmp_path / "runs")
    assert page.count('id="task-') == 1 and "unknown" not in page


def test_what_is_true_of_many_files_is_said_once(tmp_path, capsys):
    learner(tmp_path, "t", "seed0", [[1.0] * 6])
    for i in range(18):
        (tmp_path / f"study{i:02d}.jsonl").write_text(lines_of({"study": "bound", "missing": []}))
    (tmp_path / "table.jsonl").write_text(lines_of({"task": "t", "buffers": {}}, {"mean": 1.0}))
    found = Reader(make(tmp_path))
    assert found.text.count("is a study, left out") == 1 and sum(name == "li" for name, _ in found.elements) == 2
    assert "study00.jsonl is a study" in found.text and "and 17 more" in found.text and "study17.jsonl" in found.text
    said = capsys.readouterr().out
    assert said.count("is a study") == 1 and "(17 more like it)" in said
    assert "table.jsonl is no log of a run" in found.text and "unknown task" not in found.text


def test_lists_that_are_for_a_figure_are_no_fault(tmp_path):
    """Matrices and lists of pairs, as wurl_sac.py logs them; a list with a word in it is one."""
    lists = {"eval/w1": [[0.1, 2.0], [2.0, 0.1]], "eval/w1_same": [], "eval/pairs": [[0, 1]], "eval/bad": [[1, "x"]]}
    write_log(tmp_path / "wurl_sac" / "point" / "seed0", header(task="point", num_policies=2), GOOD | lists)
    text = Reader(make(tmp_path)).text
    assert "eval/bad" in text and not [key for key in lists if key != "eval/bad" and f"'{key}'" in text]


def test_equal_curves_are_drawn_once(tmp_path):
    """In all settings of the task; where one differs, both are shown."""
    for task, less in (("same", 0.0), ("other", 1.0)):
        for name, minus in (("a-seed0", 0.0), ("b-seed0", less)):
            folder = learner(tmp_path, task, name, [[1.0, 2, 3, 4, 5, 6]], lam=name)
            head, *lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
            more = [line | {"eval/return_data_length": line["eval/return"] - minus} for line in lines]
            write_log(folder, head, *more)
    page = make(tmp_path)
    same, other = (re.search(f'<section id="task-{task}">.*?</section>', page, re.S)[0] for task in ("same", "other"))
    charts = lambda part: re.findall(r'aria-label="([^"]*)"', part)
    assert charts(same) == ["eval/return", "train/q"]
    assert charts(other) == ["eval/return", "eval/return_data_length", "train/q"]
    assert "; the same: <code>eval/return_data_length</code>" in same and "the same" not in other
    rows = lambda part: len([row for row in Reader(part).rows if row[0].startswith("mopo")])
    assert (rows(same), rows(other)) == (2, 4)


def test_a_run_that_goes_on_is_unfinished(tmp_path):
    """Though there is a policy.npz, of its former end."""
    folder = learner(tmp_path, "t", "seed0", [[1.0] * 6], num_updates=900)
    (folder / "policy.npz").write_text("")
    assert "is unfinished: 600 of 900 updates" in Reader(make(tmp_path)).text


def test_a_copy_counts_once_and_other_numbers_stand_apart(tmp_path):
    log = learner(tmp_path / "runs", "t", "seed0", [[1.0] * 6]) / "log.jsonl"
    committed = tmp_path / "results" / "mopo" / "t"
    committed.mkdir(parents=True)
    shutil.copy(log, committed / "seed0.jsonl")
    learner(tmp_path / "more", "t", "seed0", [[2.0] * 6])
    page = make(tmp_path, tmp_path / "runs", tmp_path / "results", tmp_path / "more")
    assert "seed0.jsonl" in page and "counted once" in page and "shown apart" in page
    rows = [row for row in Reader(page).rows if row and row[0].startswith("mopo")]
    assert [row[1:3] for row in rows[:2]] == [["1", "1.000"], ["1", "2.000"]]


def test_pictures_beside_committed_logs(tmp_path):
    for name in ("top1", "top1-zero"):
        (tmp_path / f"{name}.jsonl").write_text("{}")
        (tmp_path / f"{name}-penalty.png").write_text("")
    assert reading.find_pictures(tmp_path / "top1.jsonl") == {"penalty.png": tmp_path / "top1-penalty.png"}


@pytest.mark.parametrize("name", ["wurl_sac", "mopo", "cped", "qdq", "dac"])
def test_command_line_gives_the_recorded_flags(name):
    script = importlib.import_module(name)
    args = dataclasses.replace(script.Args(), seed=3, out="a folder/x", quick=True)
    flags = json.loads(json.dumps(dataclasses.asdict(args)))
    words = shlex.split(sections.command(name, flags))
    assert words[:2] == ["python", f"{name}.py"]
    assert tyro.cli(script.Args, args=words[2:]) == args


# --- escaping, nothing from the net -------------------------------------------------------------


def test_everything_from_a_file_is_escaped(tmp_path):
    folder = learner(tmp_path, "t", "<b>seed0", [[1.0] * 6], lam=HOSTILE, dataset=HOSTILE)
    log = folder / "log.jsonl"
    head, *lines = map(json.loads, log.read_text().splitlines())
    head |= {"commit": HOSTILE, "device": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    evil = {"step": 600, "seed": 0, f"eval/{HOSTILE}": 1.0, "eval/bad": HOSTILE}
    log.write_text(lines_of(head, *lines, evil))
    wurl(tmp_path, "seed<i>0")
    scores = selection(tmp_path) / "scores.json"
    scores.write_text(scores.read_text().replace("policy_01", json.dumps(HOSTILE)[1:-1]))
    page = make(tmp_path)
    found = Reader(page)
    names = [name for name, _ in found.elements]
    assert "iframe" not in names and names.count("script") == 1
    assert not any(a.startswith("on") for _, attributes in found.elements for a in attributes)
    assert page.count("alert(1)") == page.count("&lt;script&gt;alert(1)") > 5
    assert "<b>seed" not in page and "seed<i>" not in page
    assert not set("\u202e\x00") & set(page)
    loads_nothing(found, page)


def loads_nothing(found, page):
    """No element of the page names anything outside it, and its policy forbids it."""
    for name, attributes in found.elements:
        for key in ("src", "href", "srcset", "poster", "data", "action"):
            assert attributes.get(key, "#").startswith(("#", "data:image/png;", "data:image/gif;")), (name, key)
    inside = "".join(re.findall(r"<(?:style|script)>(.*?)</(?:style|script)>", page, re.S))
    assert not re.search(r"https?:|//|url\(|@import|fetch|import\(", inside)
    policy = next(a["content"] for _, a in found.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy


# --- bad input ----------------------------------------------------------------------------------

HEAD, GOOD = lines_of(header()), {"step": 600, "seed": 0, "eval/return": 1.0}
BROKEN = {
    "holds no line of a run": "",
    "has no evaluation yet": HEAD,
    "was not evaluated, as its data name no task": HEAD + lines_of({"step": 600, "seed": 0, "train/q": 1.0}),
    "line 3, the last one, is torn": HEAD + lines_of(GOOD) + '{"step": 700, "eval/ret',
    "line 2, 3: no JSON object": HEAD + "garbage\n[1]\n" + lines_of(GOOD),
    "line 1: key 'args' is missing": lines_of(GOOD),
    "is unfinished: 600 of 900 updates": lines_of(header(num_updates=900), GOOD),
    "key 'eval/return' is not finite at step 600": HEAD + lines_of(GOOD | {"eval/return": float("nan")}),
    "line 2: key 'eval/return' is not a number": HEAD + lines_of(GOOD | {"eval/return": "high", "eval/score": 1}),
    "line 2: key 'step' is not a number": HEAD + lines_of(GOOD | {"step": 1e9}),
    "is a study": lines_of({"study": "bound", "question": "?", "missing": []}),
    "line 2: no JSON object": HEAD + "[" * 100_000 + "\n" + lines_of(GOOD),
}


def test_broken_logs_are_notices(tmp_path):
    """All beside one good run, on one page: each is named with its fault, and the good one counts as ever."""
    learner(tmp_path, "t", "good-seed0", [[1.0, 2, 3, 4, 5, 6]])
    for i, lines in enumerate(BROKEN.values()):
        (write_log(tmp_path / "mopo" / "t" / f"broken{i}-seed0") / "log.jsonl").write_text(lines)
    found = Reader(make(tmp_path))
    for i, notice in enumerate(BROKEN):
        assert f"broken{i}-seed0/log.jsonl {notice}" in found.text, notice
    assert found.text.count("Remedy") >= len(BROKEN) and found.row("mopo good")[2] == "4.000"


def test_other_bad_input_is_a_notice(tmp_path):
    folder = wurl(tmp_path)
    (folder / "distances.png").write_text("no picture")
    (folder / "render" / "policy_00.gif").write_text("")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "args.json").write_text("{}")
    (tmp_path / "udg_select" / "t").mkdir(parents=True)
    (tmp_path / "udg_select" / "t" / "scores.json").write_text('{"buffers": []}')
    page = make(tmp_path)
    for text in ("is neither png nor gif", "is empty, or larger", "has no log.jsonl", "key 'buffers'"):
        assert text in Reader(page).text, text
    assert "trajectories" not in page and page.count("<img") == 1


def test_numbers_of_any_size_are_drawn(tmp_path):
    for i, huge in enumerate((1e308, -1e308, 1e-320, 10**400, 2**60)):
        learner(tmp_path, f"t{i}", "seed0", [[0.0, huge, 1.0, huge, 2.0, 3.0], [huge] * 6])
    page = make(tmp_path)
    assert page.count("<svg") == 10 and "nan" not in page


def test_errors_have_a_remedy(tmp_path, monkeypatch):
    learner(tmp_path / "runs", "t", "seed0", [[1.0] * 6])
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    for words in ("empty", "gone", "notes.txt", "runs --out notes.txt", "runs --out .", "runs --out no/page.html"):
        with pytest.raises(InputError, match="Remedy"):
            report.main(words.split())
    assert (tmp_path / "notes.txt").read_text() == "mine"
    monkeypatch.setattr("sys.argv", ["report", "gone"])
    with pytest.raises(SystemExit, match=r"^runner\.report: error: gone"):
        runpy.run_path(report.__file__, run_name="__main__")


def test_same_runs_same_page(tmp_path):
    wurl(tmp_path)
    assert make(tmp_path, tmp_path / "wurl_sac") == make(tmp_path, tmp_path / "wurl_sac")


# --- the browser --------------------------------------------------------------------------------


def browse(tmp_path, page, *flags):
    """Open a file in a headless browser -> its DOM, the lines of its console."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not program:  # .ci/run installs one
        pytest.skip("no browser: apt-get install -y --no-install-recommends chromium")
    fixed = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking "
    fixed += "--enable-logging=stderr --virtual-time-budget=2000 --hide-scrollbars --dump-dom"
    line = [program, *fixed.split(), f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


PROBE = """<script>
const plot = document.querySelector("svg.plot"), dot = plot.querySelectorAll("circle")[1].getBoundingClientRect();
const at = {clientX: dot.x + 2, clientY: dot.y + 2, bubbles: true};
plot.dispatchEvent(new PointerEvent("pointerdown", at));
const seen = [...document.images].every((image) => image.complete && image.naturalWidth > 0);
const outside = (text) => {
  const own = text.getBBox(), all = text.ownerSVGElement.viewBox.baseVal;
  return own.x < 0 || own.x + own.width > all.width || own.y + own.height > all.height;
};
const cut = [...document.querySelectorAll("svg text")].filter(outside).map((text) => text.textContent);
document.title = JSON.stringify({told: document.querySelector("output").textContent, pictures: seen, cut,
  wide: document.documentElement.scrollWidth, window: innerWidth});
</script>"""


def test_the_page_in_a_browser(tmp_path):
    rng = np.random.default_rng(0)
    learner(tmp_path / "runs", "point-angle-0", "seed0", rng.normal(90, 9, (4, 6)).tolist())
    learner(tmp_path / "runs", "point-angle-0", "a-very-long-name" * 6, rng.normal(60, 9, (1, 6)).tolist(), lam=2.0)
    wurl(tmp_path / "runs")
    selection(tmp_path / "runs")
    (tmp_path / "runs" / "broken.jsonl").write_text("{")
    far = [{"step": step, "seed": 0, "eval/return": step * -1e-9} for step in range(500_000, 2_500_001, 500_000)]
    write_log(tmp_path / "runs" / "mopo" / "with-long-numbers" / "seed0", header(rollout_freq=1), *far)
    page = tmp_path / "page.html"
    make(tmp_path, tmp_path / "runs")

    light, dark, probe = (tmp_path / name for name in ("light.png", "dark.png", "probe.html"))
    dom, console = browse(tmp_path, page, f"--screenshot={light}", "--window-size=1200,2000")
    assert not console, console
    found = Reader(dom)
    for text in ("point-angle-0", "95 % interval of the IQM", "WURL: the policies", "UDG: which buffer", "policy_01",
                 "python mopo.py", "python udg_select.py", "abc123", "0.11.2", "is torn", "none: 1 seed"):  # fmt: skip
        assert text in found.text, text
    kinds = [attributes["src"][:15] for name, attributes in found.elements if name == "img"]
    assert sorted(kinds) == ["data:image/gif;"] + ["data:image/png;"] * 3
    assert sum(name == "svg" for name, _ in found.elements) == 6
    loads_nothing(found, page.read_text())

    probe.write_text(page.read_text().replace("</body>", "<script>1</script></body>"))
    flags = [f"--screenshot={dark}", "--window-size=1200,2000", "--blink-settings=preferredColorScheme=0"]
    console = browse(tmp_path, probe, *flags)[1]
    assert len(console) == 1 and "Content Security Policy" in console[0], "the policy stops a strange script"
    corners = [int(np.asarray(Image.open(path).convert("L"))[3, 3]) for path in (light, dark)]
    assert corners[0] > 200 and corners[1] < 60, "light, dark"

    # on a phone, everything unfolded, and without the policy, which forbids the probe
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text()).replace("<details>", "<details open>")
    probe.write_text(text.replace("</body>", f"{PROBE}</body>"))
    dom, console = browse(tmp_path, probe, "--window-size=390,800")
    assert not console, console
    seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom)[1]))
    assert seen["pictures"] and seen["told"] == "wurl_sac, 600: 6.000"
    assert seen["wide"] <= seen["window"] <= 500 and not seen["cut"], seen
