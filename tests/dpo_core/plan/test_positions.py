"""Tests how many tokens a model takes by its config.json, and that a longer limit is refused."""

import pytest

from dpo_core.config import MAX_LENGTH, TrainConfig
from dpo_core.options import InvalidOption
from dpo_core.plan.positions import check_max_length, positions_of
from dpo_core.training.trainer import train

LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
YARN = {"type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({}, None),
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024}, 1024),
        ({"max_position_embeddings": 131072, "rope_scaling": LLAMA_3}, 131072),  # counted in already
        ({"max_position_embeddings": 32768, "rope_scaling": YARN}, 131072),
        ({"max_position_embeddings": 32768, "rope_scaling": YARN | {"original_max_position_embeddings": 16384}}, 65536),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 8192),
        ({"max_position_embeddings": 131072, "rope_parameters": {"rope_type": "linear", "factor": 8.0}}, 131072),
        (
            {"max_position_embeddings": 4096, "rope_parameters": {"full_attention": YARN, "sliding_attention": {}}},
            16384,
        ),
        ({"text_config": {"max_position_embeddings": 512}, "max_position_embeddings": 77}, 512),
    ],
)
def test_positions_are_those_that_rotary_positions_reach(config, positions):
    assert positions_of(config) == positions


def test_a_longer_max_length_is_refused_with_field_value_and_limit():
    with pytest.raises(InvalidOption, match=r"max_length is 600, but the model has only 512 positions; set it to 512"):
        check_max_length(600, 512)
    check_max_length(512, 512)
    check_max_length(600, None)
    check_max_length(MAX_LENGTH, 512)  # the default


def test_training_refuses_it_before_the_first_step(make_policy, tokenizer, pairs, tmp_path):
    policy = make_policy(max_position_embeddings=128)
    for length, refused in ((256, True), (128, False), (MAX_LENGTH, False)):
        config = TrainConfig(batch_size=8, n_epochs=1, max_length=length).resolved(8)
        steps = train(config, policy, tokenizer, [pairs], total_steps=1, checkpoint_dir=tmp_path)
        if refused:
            with pytest.raises(InvalidOption, match="max_length is 256, but the model has only 128 positions"):
                next(steps)
        else:
            assert next(steps).step == 1
