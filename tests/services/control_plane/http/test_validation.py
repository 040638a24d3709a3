"""Tests the errors about values in a body: the path of the field, the code, and the reason."""

from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, ConfigDict, Field

from dpo_core.options import InvalidOption
from services.control_plane.core.errors import InvalidRequest, NotFound
from services.control_plane.http.validation import meant, parse, refuse_unknown, within


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    beta: Annotated[float, Field(gt=0)] = 0.1


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    inner: Inner = Inner()
    rows: list[Inner] = []


@dataclass(frozen=True)
class Options:
    rate: float = 1.0

    def __post_init__(self) -> None:
        if self.rate > 1:
            raise InvalidOption("rate", f"rate is {self.rate:g}; send at most 1.")


def refusal(kind: Any, value: Any, where: str = "", paths: Any = None) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as raised:
        parse(kind, value, where, paths)
    return raised.value


def test_a_valid_value_is_returned_as_the_type() -> None:
    assert parse(Outer, {"name": "n", "inner": {"beta": 2}}, "") == Outer(name="n", inner=Inner(beta=2.0))
    assert parse(int, 3, "x") == 3


@pytest.mark.parametrize(
    ("value", "where", "param"),
    [
        ({"name": "n", "inner": {"beta": 0}}, "", "inner.beta"),
        ({"name": "n", "inner": {"beta": 0}}, "body.part", "body.part.inner.beta"),
        ({"name": "n", "rows": [{}, {"beta": -1}]}, "", "rows.1.beta"),
        ({"name": 5}, "", "name"),
    ],
)
def test_a_wrong_value_is_named_by_its_path_and_quoted(value: Any, where: str, param: str) -> None:
    error = refusal(Outer, value, where)
    assert (error.param, error.code) == (param, "invalid_value")
    assert error.message.startswith(f"Invalid value for '{param}': ")
    assert f"but it is {value['name'] if param == 'name' else ''}" in error.message


def test_a_missing_field_has_a_code_of_its_own() -> None:
    error = refusal(Outer, {}, "body")
    assert (error.message, error.param) == ("Missing required parameter: 'body.name'.", "body.name")
    assert error.code == "missing_required_parameter"


def test_an_unknown_field_is_refused_with_the_nearest_name_and_all_names() -> None:
    error = refusal(Outer, {"name": "n", "iner": {}}, "")
    assert (error.param, error.code) == ("iner", "unknown_parameter")
    assert error.message == "Unknown parameter: 'iner'. Did you mean 'inner'? The request can have: inner, name, rows."


def test_the_names_of_the_outer_type_are_not_told_for_a_field_inside() -> None:
    error = refusal(Outer, {"name": "n", "inner": {"name": 1}}, "")
    assert error.message == "Unknown parameter: 'inner.name'."


def test_a_path_that_came_from_elsewhere_replaces_the_place_of_the_value() -> None:
    error = refusal(Options, {"rate": "many"}, "method.dpo", {"rate": "x_raydpo.rate"})
    assert error.param == "x_raydpo.rate"


def test_an_option_that_excludes_itself_is_told_in_its_own_words() -> None:
    error = refusal(Options, {"rate": 2}, "x")
    assert (error.message, error.param) == ("Invalid value for 'x.rate': rate is 2; send at most 1.", "x.rate")


def test_keys_are_compared_with_the_known_ones() -> None:
    refuse_unknown({"a": 1}, {"a", "b"}, "x")
    with pytest.raises(InvalidRequest) as raised:
        refuse_unknown({"a": 1, "betta": 2}, {"a", "beta"}, "x")
    assert raised.value.message == "Unknown parameter: 'x.betta'. Did you mean 'beta'? x can have: a, beta."
    assert raised.value.param == "x.betta"


def test_a_name_that_resembles_none_is_not_guessed() -> None:
    assert meant("learning_rat", ["learning_rate", "beta"]) == " Did you mean 'learning_rate'?"
    assert meant("zzz", ["learning_rate", "beta"]) == ""


@pytest.mark.parametrize(
    ("error", "param"),
    [
        (InvalidRequest("a", param="judge.model"), "evaluation.judge.model"),
        (InvalidRequest("a", param="evaluation.file"), "evaluation.file"),
        (NotFound("a", code="model_not_found"), "evaluation"),
    ],
)
def test_an_error_in_a_part_of_the_request_names_the_whole_path(error: Any, param: str) -> None:
    with pytest.raises(type(error)) as told, within("evaluation"):
        raise error
    assert told.value.param == param
