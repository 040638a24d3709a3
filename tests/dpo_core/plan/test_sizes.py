"""Tests the sizes of models in the table of what fits."""

import pytest

from dpo_core.plan.sizes import NAMES, SIZES, llama, table
from tests.dpo_core.plan.test_plan import ROOT


def test_the_sizes_are_those_of_their_names():
    numbers = [llama(dict(zip(NAMES, size, strict=True))).numbers / 1e9 for size in SIZES.values()]
    assert numbers == pytest.approx([1.236, 8.030, 32.76, 70.55], rel=1e-3)


def test_the_docs_have_the_printed_table():
    assert table() in (ROOT / "docs" / "use" / "plan.md").read_text()
