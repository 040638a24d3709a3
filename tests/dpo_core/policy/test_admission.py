"""Tests that groups that a model cannot take are refused by line, before training and before scoring."""

import math
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM, GPT2Config

from dpo_core.config import Optim, TrainConfig
from dpo_core.encoding.encode import EncodedGroup, Outline
from dpo_core.policy.adapter_effect import measure_effect
from dpo_core.policy.admission import admit
from dpo_core.policy.scorer import Scorer, reference_token_logps, score_reference
from dpo_core.training.trainer import train

CONFIG = TrainConfig(optim=Optim(learning_rate=1e-3), batch_size=8, n_epochs=1, checkpoint_steps=1)
PAIR = EncodedGroup([5, 6], ([7, 8], [9]), (-1.0, -2.0), 7, ref_head_logps=(-1.0, -2.0))

REFUSED = {
    "an id beyond the vocabulary in the prompt": (replace(PAIR, prompt_ids=[5, 320]), "has the token id 320, but"),
    "one at the end, which is never read": (replace(PAIR, completion_ids=([7, 8], [9, 400])), "has the token id 400"),
    "an id below 0": (
        replace(PAIR, completion_ids=([7, -1], [9])),
        "has the token id -1, but .* vocabulary has only 320",
    ),
    "more tokens than positions": (
        replace(PAIR, prompt_ids=[5] * 63),
        "has 65 tokens, but the model's number of positions",
    ),
}
NOT_FINITE = {
    "infinite scores": (
        replace(PAIR, ref_logps=(math.inf, -2.0)),
        r"has ref_logps \(inf, -2.0\), which must be finite",
    ),
    "scores of a head that are nan": (replace(PAIR, ref_head_logps=(-1.0, math.nan)), "has ref_head_logps"),
    "a weight of nan": (replace(PAIR, weight=math.nan), "has the weight nan; a weight must be greater than 0"),
    "a weight of 0": (replace(PAIR, weight=0.0), "has the weight 0.0"),
    "an infinite margin": (replace(PAIR, margin=math.inf), "has the margin inf; a margin must be a finite number"),
}


@pytest.fixture
def small(make_policy):
    return make_policy(max_position_embeddings=64)


@pytest.mark.parametrize("name", REFUSED | NOT_FINITE)
def test_training_refuses_such_a_group_by_line_before_any_step(name, small, tokenizer, tmp_path):
    group, problem = (REFUSED | NOT_FINITE)[name]
    with pytest.raises(ValueError, match=f"Line 7 {problem}"):
        next(train(CONFIG, small, tokenizer, [[PAIR, group]], total_steps=1, checkpoint_dir=tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("score", [score_reference, reference_token_logps])
def test_scoring_refuses_such_a_group_by_line(name, score, small):
    group, problem = REFUSED[name]
    with pytest.raises(ValueError, match=f"Line 7 {problem}"):
        score(small, [PAIR, group], max_tokens_per_pack=128)


def test_a_group_beyond_the_last_position_is_refused():
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=320, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    admit([replace(PAIR, prompt_ids=[5] * 6)], model)
    with pytest.raises(
        ValueError, match=r"Line 7 has 9 tokens, but the model's number of positions .* is 8; shorten the row"
    ):
        admit([replace(PAIR, prompt_ids=[5] * 7)], model)


def test_a_group_that_just_fits_is_admitted(small):
    admit([replace(PAIR, prompt_ids=[0, 319] * 31, weight=2.0, margin=0.5)], small, max_length=64)


def effect_of(policy, groups, **options):
    return measure_effect(Scorer(policy), groups, **options)


@pytest.mark.parametrize("compute", [score_reference, reference_token_logps, effect_of])
def test_nothing_is_computed_with_the_ranges_of_an_outline(compute, policy):
    with pytest.raises(ValueError, match="Line 7 has no token ids; pass 'load_ids'"):
        compute(policy, [Outline.of(PAIR)], max_tokens_per_pack=64)


@pytest.mark.parametrize("place", ["batches", "validation"])
def test_outlines_are_refused_in_training_without_a_function_that_loads_them(place, policy, tokenizer, tmp_path):
    outlines = [Outline.of(PAIR)]
    batches, held_out = ([outlines], None) if place == "batches" else ([[PAIR]], lambda: [outlines])
    steps = train(CONFIG, policy, tokenizer, batches, total_steps=1, checkpoint_dir=tmp_path, validation=held_out)
    with pytest.raises(ValueError, match="Line 7 has no token ids; pass 'load_ids'"):
        list(steps)
