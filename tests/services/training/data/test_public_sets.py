"""Tests that rows of public preference datasets, as published, can be checked, encoded and scored."""

import math
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.model import load_policy, load_tokenizer
from dpo_core.policy.scorer import score_reference
from services.contract import Recipe
from services.training.check_program import check, in_turn
from services.training.data import dataset
from services.training.data.dataset import Dataset
from services.training.data.encoding import encode_piece, split
from tests.public_sets import ASKED, PUBLIC_SETS

pytestmark = pytest.mark.slow

BETTER = {question: good for question, good, _ in ASKED}


@pytest.fixture(scope="module")
def reference(byte_level_model: str) -> PreTrainedModel:
    return load_policy(byte_level_model)


def encoded(recipe: Recipe, folder: Path) -> list[EncodedGroup]:
    parts = [
        encode_piece(recipe, folder.as_uri(), piece).training for piece in split(recipe.training_uri, recipe.columns)
    ]
    return list(dataset.read_groups(Dataset(uri=folder.as_uri(), parts=tuple(filter(None, parts)))))


@pytest.mark.parametrize("name", PUBLIC_SETS)
def test_a_public_set_is_checked_encoded_and_scored(
    name: str, reference: PreTrainedModel, byte_level_model: str, tmp_path: Path
) -> None:
    public = PUBLIC_SETS[name]
    (tmp_path / "rows.jsonl").write_bytes(public.lines)
    recipe = Recipe(
        training_uri=(tmp_path / "rows.jsonl").as_uri(),
        model_source=byte_level_model,
        max_length=2048,
        truncation="drop",
        columns=(public.extension or {}).get("columns", {}),
    )
    found = check(recipe, str(tmp_path), in_turn)
    assert (found.tokens.num_kept, found.tokens.dropped) == (public.num_groups, {})
    groups = score_reference(reference, encoded(recipe, tmp_path / "encoded"), max_tokens_per_pack=8192)
    assert len(groups) == public.num_groups
    tokenizer = load_tokenizer(byte_level_model)
    for group, (question, good, bad) in zip(groups, ASKED, strict=True):
        prompt, *completions = map(tokenizer.decode, (group.prompt_ids, *group.completion_ids))
        assert question.split()[-1] in prompt
        assert any(answer in completions[0] for answer in (good, bad) if public.kind == "unpaired" or answer == good)
        assert group.ref_logps is not None
        assert all(math.isfinite(logp) and logp < 0 for logp in group.ref_logps)
