"""Tests which values a sweep tries."""

from typing import Any

import pytest

from services.control_plane.sweeps.requests import CreateSweep
from services.control_plane.sweeps.search import Tried, grid, probes, suggest

LISTS = {"a": {"values": [1, 2]}, "b": {"values": ["x", {"y": 1}, None]}}


def sweep(parameters: dict[str, Any], kind: str = "grid", **search: Any) -> CreateSweep:
    body = {"job": {}, "parameters": parameters, "search": {"type": kind, **search}}
    return CreateSweep.model_validate(body | {"metric": {"name": "eval/loss", "goal": "minimize"}})


def test_a_grid_has_every_combination_and_the_last_parameter_changes_fastest() -> None:
    found = grid(sweep(LISTS))
    assert [list(values.values()) for values in found] == [[a, b] for a in (1, 2) for b in ("x", {"y": 1}, None)]
    assert suggest(sweep(LISTS), 4, ()) == {"a": 2, "b": {"y": 1}}


def test_probes_hold_every_value_and_both_ends_of_ranges() -> None:
    found = probes(sweep(LISTS | {"c": {"min": 1, "max": 9, "type": "int"}}, "random", num_trials=3))
    assert found[0] == {"a": 1, "b": "x", "c": 1}
    assert [next(iter(set(map(str, each.items())) - set(map(str, found[0].items())))) for each in found[1:]] == [
        "('a', 2)",
        "('b', {'y': 1})",
        "('b', None)",
        "('c', 9)",
    ]


@pytest.mark.parametrize("kind", ["random", "tpe"])
def test_draws_are_within_their_ranges_and_the_same_each_time(kind: str) -> None:
    parameters = LISTS | {"c": {"min": 1, "max": 4, "type": "int"}, "d": {"min": 1e-4, "max": 1, "scale": "log"}}
    search = sweep(parameters, kind, num_trials=50, seed=7)
    tried: list[Tried] = []
    for number in range(30):
        values = suggest(search, number, tried)
        assert values == suggest(search, number, tried)
        assert values["a"] in (1, 2)
        assert values["b"] in ("x", {"y": 1}, None)
        assert values["c"] in (1, 2, 3, 4)
        assert isinstance(values["c"], int)
        assert 1e-4 <= values["d"] <= 1
        tried.append(Tried(values, None if number % 7 == 0 else values["d"]))
    assert sum(each.values["d"] < 0.01 for each in tried) > 9  # half of the range on its scale; on the linear one, 1%


def test_tpe_draws_near_good_trials_and_random_does_not() -> None:
    parameters = {"d": {"min": 0.0, "max": 1.0}}
    tried = [Tried({"d": place / 40}, abs(place / 40 - 0.25)) for place in range(40)]
    far = {
        kind: [
            abs(suggest(sweep(parameters, kind, num_trials=100, seed=seed), 40, tried)["d"] - 0.25)
            for seed in range(20)
        ]
        for kind in ("tpe", "random")
    }
    assert sum(far["tpe"]) < sum(far["random"]) / 2
