"""Tests that what the documents refer to exists: links, anchors, tests and error codes."""

import re
import subprocess
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from services.control_plane.jobs.requests import EXTENSIONS, HYPERPARAMETERS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LISTED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"], cwd=ROOT, capture_output=True, text=True
)
PAGES = [ROOT / name for name in LISTED.stdout.splitlines() if (ROOT / name).exists()]


@cache
def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def links(page: Path) -> Iterator[str]:
    for token in tokens(page):
        for child in token.children or ():
            if child.type == "link_open":
                yield str(child.attrs["href"])


@cache
def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub makes of the page's headings."""
    found: dict[str, int] = {}
    names = set()
    for opening, inline in zip(tokens(page), tokens(page)[1:], strict=False):
        if opening.type == "heading_open":
            text = "".join(child.content for child in inline.children or ()).lower().replace(" ", "-")
            kept = "".join(c for c in text if c in "-_" or unicodedata.category(c)[0] in "LNM")
            number = found[kept] = found.get(kept, -1) + 1
            names.add(f"{kept}-{number}" if number else kept)
    return names


@pytest.mark.skipif(LISTED.returncode != 0, reason="this is no checkout of git's")
def test_every_link_to_a_file_leads_to_one_and_every_anchor_to_a_heading() -> None:
    broken = []
    for page in PAGES:
        for link in links(page):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if re.match("[a-z]+:", link):
                continue
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert broken == []


def test_the_map_names_every_page() -> None:
    named = {(DOCS / link.partition("#")[0]).resolve() for link in links(DOCS / "README.md")}
    pages = {page for page in DOCS.rglob("*.md") if page.parent.name != "decisions"} - {DOCS / "README.md"}
    assert pages - named == set()


def test_every_test_that_the_documents_name_is_there() -> None:
    there = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    named = {name for page in DOCS.rglob("*.md") for name in re.findall(r"\btest_\w+\.py\b", page.read_text())}
    assert named - there == set()


def test_every_page_that_the_code_names_is_there() -> None:
    code = [path for folder in ("services", "dpo_core", "deploy", "demo") for path in (ROOT / folder).rglob("*")]
    texts = [path.read_text() for path in code if path.suffix in (".py", ".yaml", ".tpl", ".txt", ".md")]
    named = {name for text in texts for name in re.findall(r"\bdocs/[\w/-]+\.md\b", text)}
    assert named
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_every_code_of_an_error_is_explained() -> None:
    sources = [path.read_text() for path in (ROOT / "services").rglob("*.py")]
    codes = {code for text in sources for code in re.findall(r"""\bcode(?:": |=| = )"([a-z_]+)\"""", text)}
    assert {"model_unavailable", "internal_error", "release_mismatch"} <= codes
    explained = set(re.findall("`([a-z_]+)`", (DOCS / "wire" / "errors.md").read_text()))
    assert codes - explained == set()


def test_every_option_of_a_job_is_explained() -> None:
    explained = re.findall("^\\| (`.*?) \\| ", (DOCS / "use" / "jobs.md").read_text(), re.MULTILINE)
    assert (EXTENSIONS | HYPERPARAMETERS) - set(re.findall(r"\w+", " ".join(explained))) == set()


def test_the_runbook_quotes_texts_that_the_service_writes() -> None:
    source = "".join(file.read_text() for file in (ROOT / "services").rglob("*.py"))
    quoted = re.findall(r"`([A-Z]\w*(?: [a-zA-Z,]+){3,})`", (DOCS / "operate" / "runbook.md").read_text())
    assert len(quoted) >= 4
    for text in quoted:
        assert text.replace("background task Reconciler", "background task %s") in source, text
