"""Tests how many tokens a model takes by its config.json, and that a longer limit is refused."""

import pytest

from dpo_core.config import MAX_LENGTH, TrainConfig
from dpo_core.options import InvalidOption
from dpo_core.plan.positions import check_max_length, positions_of
from dpo_core.training import trainer
from dpo_core.training.trainer import train

LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
LONG = {"type": "longrope", "factor": 32.0, "original_max_position_embeddings": 4096}
LINEAR = {"type": "linear", "factor": 8.0}
LAYERED = {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {"rope_type": "default"}}
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
        ({"max_position_embeddings": 131072, "rope_scaling": LLAMA_3 | {"factor": 32.0}}, 131072),
        ({"max_position_embeddings": 131072, "rope_scaling": LONG}, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": LINEAR}, 32768),
        ({"max_position_embeddings": 4096, "rope_scaling": LINEAR | {"factor": None}}, 4096),
        (
            {"max_position_embeddings": 32768, "rope_scaling": LINEAR | {"original_max_position_embeddings": 4096}},
            32768,
        ),
        ({"max_position_embeddings": 131072, "model_type": "gemma3_text", "rope_parameters": LAYERED}, 131072),
        ({"max_position_embeddings": 8192, "model_type": "laguna", "rope_parameters": LAYERED}, 65536),
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
    with pytest.raises(
        InvalidOption, match=r"max_length is 600, but the model has only 512 positions; set max_length to 512"
    ):
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


def test_a_run_that_began_before_the_rule_goes_on(make_policy, tokenizer, pairs, tmp_path, monkeypatch):
    def run(**more):
        config = TrainConfig(batch_size=8, n_epochs=1, max_length=256, checkpoint_steps=1).resolved(8)
        policy = make_policy(max_position_embeddings=128)
        return train(config, policy, tokenizer, [pairs] * 2, total_steps=2, checkpoint_dir=tmp_path, **more)

    with monkeypatch.context() as earlier:
        earlier.setattr(trainer, "check_max_length", lambda *_: None)
        assert [result.step for result in run()] == [1, 2]
    with pytest.raises(InvalidOption, match="max_length is 256"):
        next(run())
    assert [result.step for result in run(resume=tmp_path / "step-000001")] == [2]
