"""Tests how methods are described."""

import json
from dataclasses import fields
from typing import Annotated, Literal

from dpo_core.methods import COMMON, METHODS, described, described_options
from dpo_core.options import OBJECTIVES, Doc, Limit, options


@options
class Knob:
    """A knob."""

    turns: Annotated[int, Limit("from 1 to 3", lambda x: 1 <= x <= 3), Doc("How often it is turned.")] = 2
    side: Literal["left", "right"] = "left"
    is_on: bool = True


def test_an_option_tells_its_default_its_range_and_what_it_is():
    assert described_options({"turns": 2, "side": "left", "is_on": True}, Knob) == {
        "turns": {"default": 2, "range": "from 1 to 3", "description": "How often it is turned."},
        "side": {"default": "left", "range": "left, right", "description": "", "choices": ["left", "right"]},
        "is_on": {"default": True, "range": "true or false", "description": "", "choices": [True, False]},
    }


def test_a_method_tells_its_papers_its_data_and_its_hyperparameters():
    dpo = described("dpo")
    assert (dpo["id"], dpo["object"]) == ("dpo", "method")
    assert "https://arxiv.org/abs/2305.18290" in dpo["papers"]
    assert (dpo["learns_from"][0], dpo["needs_reference"], dpo["takes_margins"]) == ("pairs", True, True)
    assert dpo["hyperparameters"]["beta"]["default"] == 0.1
    assert tuple(dpo["common_hyperparameters"]) == COMMON
    rate = dpo["common_hyperparameters"]["learning_rate"]
    assert (rate["default"], rate["default_of_adapters"]) == (1e-6, 1e-5)


def test_every_method_is_described_in_json_without_its_type():
    assert list(OBJECTIVES) == METHODS
    for kind in METHODS:
        told = json.loads(json.dumps(described(kind)))
        assert told["description"].endswith("."), kind
        assert "type" not in told["hyperparameters"]
        assert set(told["hyperparameters"]) == {option.name for option in fields(OBJECTIVES[kind])} - {"type"}
