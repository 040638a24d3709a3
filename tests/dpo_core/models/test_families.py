"""Tests that every family of models does what docs/use/models.md says."""

from pathlib import Path

import pytest
import transformers

from tests.dpo_core.models.families import FAMILIES, HEAD, examine, row

TABLE = Path(__file__).parents[3] / "docs" / "use" / "models.md"
ANEW = "If this is meant: python -m tests.dpo_core.models.families > docs/use/models.md"
# The most used, and one of each manner; the others are long.
OFTEN = {
    "bert",
    "bloom",
    "cohere2",
    "deepseek_v3",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_oss",
    "granite",
    "llama",
    "llama4_text",
    "mamba",
    "ministral3",
    "mistral",
    "mixtral",
    "modernbert-decoder",
    "olmo2",
    "phi3",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
}


def rows() -> dict[str, str]:
    lines = TABLE.read_text().removeprefix(HEAD.format(version=transformers.__version__)).splitlines(keepends=True)
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


def test_the_table_has_every_family_once():
    assert list(rows()) == list(FAMILIES), ANEW


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of architectures that transformers no longer tends
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.long) for name in FAMILIES]
)
def test_a_family_loads_scores_trains_and_resumes_as_the_table_says(family):
    assert row(family, examine(family)) == rows()[family], ANEW
