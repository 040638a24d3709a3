"""Tests what a plan reads from a model, its rows and the options of a run."""

import pytest

from dpo_core.plan.inputs import Rows, Run, Shapes, in_layer

WEIGHTS = {
    "model.embed.weight": (10, 4),
    "model.layers.0.q.weight": (4, 4),
    "model.layers.11.norm": (4,),
    "head": (10, 4),
}


def test_numbers_are_counted_in_layers_and_outside_of_them():
    shapes = Shapes({}, WEIGHTS)
    assert (shapes.numbers, shapes.outside) == (40 + 16 + 4 + 40, 80)
    assert [in_layer(name) for name in WEIGHTS] == [False, True, True, False]


def test_the_config_of_a_models_text_part_comes_before_the_whole_one():
    shapes = Shapes({"hidden_size": 8, "n_layer": 2, "text_config": {"hidden_size": 4}}, {})
    assert shapes.number("hidden_size") == 4
    assert shapes.number("num_hidden_layers", "n_layer") == 2
    with pytest.raises(ValueError, match=r"config.json has no num_attention_heads; memory can be planned only"):
        shapes.number("num_attention_heads", "n_head")
    assert not shapes.caps_attention
    assert Shapes({"text_config": {"attn_logit_softcapping": 50.0}}, {}).caps_attention


def test_a_prompt_counts_once_unless_each_completion_has_a_copy_of_it():
    rows = Rows(groups=1, prompt=10, completion=5, completions=3)
    assert (rows.tokens, rows.computed) == (25, 22)  # the last token of a completion predicts nothing
    copied = Rows(groups=1, prompt=10, completion=5, completions=3, copies=True)
    assert (copied.tokens, copied.computed) == (25, 42)
    assert Rows(groups=1, prompt=0, completion=1, completions=1).computed == 1


def test_the_size_of_a_number_is_that_of_the_precision():
    assert (Run().itemsize, Run(precision="bfloat16").itemsize) == (4, 2)
