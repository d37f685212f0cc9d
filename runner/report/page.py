"""The whole page: one file that loads nothing, and whose own policy forbids it to."""

import base64
import hashlib
from pathlib import Path

from envs.errors import InputError
from runner.files import write_whole
from runner.report.groups import group_runs
from runner.report.markup import Html, alike, folded, tag
from runner.report.sections import (
    aggregate_section,
    anchor,
    figures_part,
    gallery,
    run_part,
    selection_section,
    task_section,
)

MARK = "<!doctype html><!-- udg-jax report -->"
SCRIPT, STYLE = (Path(__file__).with_name(name).read_text() for name in ("script.js", "style.css"))
METHOD = """A row pools the runs of one script and task whose flags differ in the seed only. Score of a seed: the
mean of its last 5 evaluations; the last-5 mean is its mean over seeds, \u00b1 the standard deviation over seeds (n - 1
in the denominator). IQM: the mean over seeds without the floor(n / 4) lowest and as many highest. Interval: 2000
bootstrap resamples of the seeds, within each task, 2.5 % and 97.5 % quantile of their IQM; none is given for fewer
than 3 seeds, and for fewer than about 10 it is too narrow. last, best: mean over seeds of the last and of the highest
evaluation. None counts the evaluation before any learning. Curves: a thin line per seed, the mean over seeds where
all have been evaluated, shaded \u00b1 one standard deviation. A metric that is a list (one number per policy or
member) is drawn as its mean."""


def head():
    """The page's policy: no source but data in the page, and this script and style alone."""
    digest = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest(STYLE)}'; "
    policy += f"script-src 'sha256-{digest(SCRIPT)}'"
    return tag(
        "head", tag("meta", charset="utf-8"), tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"), tag("title", "udg-jax report"),
        tag("style", Html(STYLE)),
    )  # fmt: skip


def notice_list(notices):
    """What could not be shown, and what to do; said once of all the files that it is true of."""
    items = []
    for text, (first, *others) in alike(notices).items():
        more = folded(f"and {len(others)} more", [tag("div", tag("code", path)) for path in others]) if others else ""
        items.append(tag("li", tag("code", first), f" {text}", more))
    return tag("section", tag("ul", items), class_="notice", id="notices") if items else Html("")


def build_page(runs, selections, notices, line):
    """The whole page as text; adds to notices what turns up on the way."""
    groups = group_runs(runs, notices)
    tasks = sorted({group.task for group in groups})
    sections = [aggregate_section(groups)]
    sections += [task_section(task, [g for g in groups if g.task == task]) for task in tasks]
    shown = [run for group in groups for run in group.runs]
    galleries = [gallery(run, notices) for run in shown if run.script == "wurl_sac"]
    links = [tag("a", task, href=f"#{anchor(task)}") for task in tasks]
    if galleries:
        sections.append(tag("section", tag("h2", "WURL: the policies"), *galleries, id="policies"))
        links.append(tag("a", "policies", href="#policies"))
    if selections:
        sections.append(selection_section(selections, notices))
        links.append(tag("a", "selection", href="#selection"))
    drawn = [part for part in (figures_part(run, notices) for run in shown) if part]
    if drawn:
        sections.append(tag("section", tag("h2", "Figures of the learners"), *drawn, id="figures"))
        links.append(tag("a", "figures", href="#figures"))
    if shown:
        title = tag("h2", "Runs: commands, versions, flags")
        sections.append(tag("section", title, [run_part(run) for run in shown], id="runs"))
        links.append(tag("a", "runs", href="#runs"))
    counts = f"{len(shown)} runs, {len(groups)} settings, {len(tasks)} tasks, {len(selections)} selections"
    body = tag(
        "body", tag("h1", "udg-jax report"), tag("p", counts), tag("pre", line), tag("nav", *links),
        notice_list(notices), folded("How the numbers are made", tag("p", METHOD, class_="method")),
        *sections, tag("script", Html(SCRIPT)),
    )  # fmt: skip
    return f"{MARK}\n" + tag("html", head(), body, lang="en") + "\n"


def write_page(path, page):
    """Write the page whole or not at all; only a page of this script is written over."""
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"--out {path}: not a file in a folder that is there. Remedy: name one, such as report.html")
    try:
        if path.exists() and not path.read_bytes().startswith(MARK.encode()):
            raise InputError(f"--out {path}: is there and no page of this script. Remedy: choose another name")
        write_whole(path, page)
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({error.strerror}). Remedy: choose another place") from None
