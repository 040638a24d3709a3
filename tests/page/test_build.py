"""What the built page weighs, and that it holds nothing that its own content security policy would refuse."""

import gzip
import re

import pytest

from services.control_plane.page.api import BUILT

MOST_BYTES = 150_000  # of compressed scripts

pytestmark = pytest.mark.skipif(not (BUILT / "index.html").exists(), reason="the page is not built: make page")


def test_all_scripts_together_are_small() -> None:
    scripts = list((BUILT / "assets").glob("*.js"))
    assert scripts
    assert sum(len(gzip.compress(script.read_bytes())) for script in scripts) <= MOST_BYTES


def test_the_page_holds_no_inline_code_and_names_no_other_host() -> None:
    page = (BUILT / "index.html").read_text()
    assert "<script" in page
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bon\w+=|\bstyle=|https?://", page)
    for sheet in (BUILT / "assets").glob("*.css"):
        assert not re.search(r"@import|url\(", sheet.read_text())
