"""Tests the options of objectives: what is refused, and what trainer and service know of each objective."""

import dataclasses
import math
import pickle
from typing import Annotated

import pytest
from pydantic import TypeAdapter, ValidationError

from dpo_core.options import (
    OBJECTIVES,
    Bco,
    Dpo,
    FDpo,
    InvalidOption,
    Kto,
    LdDpo,
    Limit,
    Mpo,
    Orpo,
    Supervised,
    options,
)


@options
class Knob:
    turns: Annotated[int | None, Limit("from 1 to 3", lambda x: 1 <= x <= 3)] = None
    is_on: bool = True

    def __post_init__(self) -> None:
        if self.turns and not self.is_on:
            raise InvalidOption("is_on", "A knob that is off has no turns.")


def refusal(make) -> tuple[str, str]:
    with pytest.raises(InvalidOption) as refused:
        make()
    return refused.value.field, str(refused.value)


def test_a_refusal_goes_to_another_process_as_it_is():
    error = pickle.loads(pickle.dumps(InvalidOption("turns", "turns is 4.")))
    assert (error.field, str(error)) == ("turns", "turns is 4.")


def test_options_are_checked_one_by_one_then_together_and_none_is_always_allowed():
    assert Knob() == Knob(turns=None, is_on=True)
    assert refusal(lambda: Knob(turns=4)) == ("turns", "turns is 4; it must be from 1 to 3.")
    assert refusal(lambda: Knob(turns=1, is_on=False)) == ("is_on", "A knob that is off has no turns.")


def test_options_are_frozen_given_by_name_and_have_no_others():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Knob().turns = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        Knob(2)  # type: ignore[misc]
    with pytest.raises(ValidationError, match="turn"):
        TypeAdapter(Knob).validate_python({"turn": 1})


def test_every_objective_is_found_by_its_type_has_defaults_and_names_its_paper():
    for kind, objective in OBJECTIVES.items():
        assert objective().type == kind
        assert objective().traits.learns_from
        assert kind == "supervised" or "arXiv" in (objective.__doc__ or "") or ".pdf" in (objective.__doc__ or ""), kind


def test_a_sum_needs_what_one_of_its_parts_needs():
    assert not Mpo(objectives=(Orpo(), Supervised()), weights=(1, 1)).traits.needs_reference
    summed = Mpo(objectives=(Orpo(), Dpo()), weights=(1, 1)).traits
    assert (summed.needs_reference, summed.needs_whole_batch, summed.needs_reference_heads) == (True, False, False)
    assert Mpo(objectives=(Kto(), LdDpo()), weights=(1, 1)).traits.needs_reference_heads
    assert Mpo(objectives=(Dpo(), Bco()), weights=(1, 1)).traits.needs_whole_batch
    assert Mpo().traits.learns_from == ("pairs",)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Mpo(objectives=(), weights=()), "weights"),
        (lambda: Mpo(objectives=(Dpo(),), weights=(1, 1)), "weights"),
        (lambda: Mpo(objectives=(Dpo(),), weights=(0,)), "weights"),
        (lambda: Mpo(objectives=(Dpo(),), weights=(math.inf,)), "weights"),
        (lambda: Mpo(objectives=(Supervised(),), weights=(1,)), "objectives"),
        (lambda: Mpo(objectives=(Mpo(),), weights=(1,)), "objectives"),
        (lambda: FDpo(alpha=0.3), "alpha"),
        (lambda: FDpo(divergence="alpha", alpha=1), "alpha"),
    ],
)
def test_options_that_do_not_go_together_are_refused_by_name(make, field):
    assert refusal(make)[0] == field
    assert FDpo(divergence="alpha", alpha=0.3).alpha == 0.3


def test_checkpoints_are_compared_by_what_the_objective_measures():
    metrics = {kind: objective().traits.best_metrics for kind, objective in OBJECTIVES.items()}
    assert metrics["supervised"] == ("eval/loss", "eval/mean_token_accuracy")
    assert metrics["dpo"] == ("eval/loss", "eval/rewards/accuracies", "eval/rewards/margins")
    assert metrics["reward_bradley_terry"] == ("eval/loss", "eval/accuracy", "eval/margin")
