"""The pages (README.md, docs/): links lead somewhere, figures are there, commands name files and studies that exist."""

import re
from pathlib import Path

import pytest

import settings_page
import udg_study

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page):
    """What a heading is called in a link: lower case, no punctuation, hyphens for spaces."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page):
    """Relative links of a page that lead nowhere."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http", "mailto:")):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists() or (anchor and anchor not in anchors(file)):
                found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_commands_lead_somewhere(page):
    assert not dead_links(page)
    commands = re.findall(r"\bpython (?!-)([\w/]+\.py)", page.read_text())
    assert not [name for name in commands if not (ROOT / name).exists()]


def test_a_dead_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One (`two`), three\n[a](#one-two-three) [b](#four) [c](none.md) [d](page.md#one-two-three) ![e](no.png)\n"
    )
    assert dead_links(page) == ["#four", "none.md", "no.png"]


def test_every_study_has_its_section():
    """Each study of --list is named on docs/udg.md, and each that has a results file has its figures there."""
    text = (ROOT / "docs" / "udg.md").read_text()
    assert not [name for name in udg_study.STUDIES if f"`{name}`" not in text]
    drawn = {path.name for path in (ROOT / "results" / "udg").glob("*.png")}
    shown = set(re.findall(r"results/udg/([\w-]+\.png)", text))
    assert shown <= drawn
    assert {name for name in drawn if not name.endswith("-diversity.png")} <= shown


def test_the_settings_are_the_scripts():
    """docs/settings.md; another preset or default is told there at once."""
    assert settings_page.PAGE.read_text() == settings_page.page()
    shown = settings_page.shown
    assert [shown(x) for x in (True, None, 1e-4, 20_000, (256, 256), "")] == [
        "yes",
        "-",
        "0.0001",
        "20,000",
        "256 256",
        "-",
    ]


@pytest.mark.parametrize("name", ("wurl_sac", "udg_select", "mopo", "cped", "qdq", "dac"))
def test_the_readme_tells_how_long_a_script_is(name):
    told = re.search(rf"`{name}.py`\]\(docs/{name}.md\) \| (\d+) \|", (ROOT / "README.md").read_text())
    assert int(told[1]) == (ROOT / f"{name}.py").read_text().count("\n")
