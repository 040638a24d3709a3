"""Tests that every kind of evaluation that a request may name has the interface that the work on it calls."""

import inspect
from typing import get_args, get_type_hints

import pytest

from services.control_plane.evaluations import requests
from services.control_plane.evaluations.kinds.compare import Compare
from services.control_plane.evaluations.kinds.drift import Drift
from services.control_plane.evaluations.kinds.kind import Kind
from services.control_plane.evaluations.kinds.preferences import Preferences
from services.control_plane.evaluations.kinds.samples import Samples
from services.control_plane.evaluations.kinds.score import Score
from services.control_plane.evaluations.work import OF_KIND


def test_there_is_a_kind_for_each_name_that_a_request_may_have() -> None:
    assert set(OF_KIND) == set(get_args(requests.Kind)) == set(requests.OF_KIND)


@pytest.mark.parametrize("kind", [Compare, Drift, Preferences, Samples, Score])
@pytest.mark.parametrize("name", ["work", "summarize"])
def test_a_kind_takes_the_calls_of_the_interface(kind: type, name: str) -> None:
    call, wanted = getattr(kind, name), getattr(Kind, name)
    assert list(inspect.signature(call).parameters) == list(inspect.signature(wanted).parameters)
    assert get_type_hints(call) == get_type_hints(wanted)
    assert inspect.iscoroutinefunction(call) == inspect.iscoroutinefunction(wanted)
