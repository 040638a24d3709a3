"""Tests what a sweep may ask for, and what the service fills in."""

from typing import Any

import pytest
from pydantic import ValidationError

from services.control_plane.core.errors import InvalidRequest
from services.control_plane.http.validation import within
from services.control_plane.sweeps.requests import CreateSweep, Parameter

JOB = {"model": "tiny", "training_file": "file-1", "method": {"type": "dpo"}}
VALUES = {"method.dpo.hyperparameters.beta": {"values": [0.1, 0.2]}}
RANGE = {"method.dpo.hyperparameters.beta": {"min": 0.1, "max": 0.2}}
SCORE = {"kind": "score", "judge": {"type": "length"}, "file": "file-2"}


def sweep(**more: Any) -> CreateSweep:
    return CreateSweep.model_validate({"job": JOB, "parameters": VALUES, **more})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "needs 'values', or 'min' and 'max'"),
        ({"values": [1], "min": 0}, "a parameter with 'values' takes no 'min'"),
        ({"min": 2, "max": 1}, "'min' is 2, but it must be less than 'max', which is 1"),
        ({"min": 0, "max": 1, "scale": "log"}, "must be greater than 0"),
        ({"min": 0.5, "max": 2, "type": "int"}, "whole numbers"),
        ({"values": []}, "at least 1 item"),
    ],
)
def test_a_parameter_is_a_list_or_a_range(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Parameter.model_validate(given)


@pytest.mark.parametrize(
    ("given", "param", "said"),
    [
        ({"parameters": RANGE}, "parameters.method.dpo.hyperparameters.beta", "list its values"),
        ({"parameters": {f"metadata.{name}": {"values": list(range(17))} for name in "ab"}}, "parameters", "289"),
        (
            {
                "parameters": {f"metadata.{name}": {"values": list(range(150))} for name in "ab"},
                "search": {"type": "random", "num_trials": 3},
            },
            "parameters",
            "299 different values to check",
        ),
        ({"search": {"type": "tpe", "num_trials": 3}}, "metric", "needs 'metric'"),
        ({"metric": {"name": "eval/los"}}, "metric.name", "Did you mean 'eval/loss'?"),
        ({"metric": {"name": "words/score"}}, "metric.name", "must be one of"),
        ({"evaluations": {"eval": SCORE}}, "evaluations.eval", "choose another name"),
        ({"evaluations": {"a": SCORE | {"model": "m"}}}, "evaluations.a.model", "Leave it out"),
        ({"evaluations": {"a": SCORE | {"judge": None}}}, "evaluations.a.judge", "needs the field 'judge'"),
        ({"evaluations": {"a": SCORE | {"kind": "guess"}}}, "evaluations.a.kind", "'compare'"),
    ],
)
def test_fields_that_contradict_each_other_are_refused_by_name(given: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sweep(**given).settled().bodies("tiny")
    assert caught.value.param == param
    assert said in caught.value.message


def test_seeds_and_the_goal_are_chosen_once() -> None:
    settled = sweep(search={"type": "random", "num_trials": 2}, metric={"name": "eval/loss"}).settled()
    assert isinstance(settled.job["seed"], int)
    assert isinstance(settled.search.seed, int)
    assert settled.metric is not None
    assert settled.metric.goal == "minimize"
    assert settled.settled() == settled


@pytest.mark.parametrize(
    ("name", "goal"),
    [("eval/rewards/margins", "maximize"), ("a/score", "maximize"), ("b/kl_per_sequence", "minimize")],
)
def test_the_goal_is_that_of_the_metric(name: str, goal: str) -> None:
    evaluations = {"a": SCORE, "b": {"kind": "drift", "file": "file-2"}}
    settled = sweep(metric={"name": name}, evaluations=evaluations).settled()
    assert settled.metric is not None
    assert settled.metric.goal == goal


def test_a_stored_sweep_is_read_back() -> None:
    settled = sweep(evaluations={"a": SCORE}).settled()
    assert CreateSweep.model_validate(settled.model_dump(mode="json")) == settled
    assert settled.num_trials == 2


def test_errors_of_a_part_name_the_path_in_the_whole_body() -> None:
    with pytest.raises(InvalidRequest) as caught, within("job", " (A note.)"):
        raise InvalidRequest("Wrong.", param="model")
    assert (caught.value.param, caught.value.message) == ("job.model", "Wrong. (A note.)")
