"""Chooses the values of a sweep's trials: every combination, at random, or near those of good trials."""

import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from services.control_plane.sweeps.requests import CreateSweep, Parameter

Values = dict[str, Any]  # the values of a trial, by the paths of the fields of the job


class Tried(NamedTuple):
    """The values of an earlier trial, and its value of the sweep's metric; None if the trial has none yet."""

    values: Values
    value: float | None


def suggest(sweep: CreateSweep, number: int, tried: Sequence[Tried]) -> Values:
    """Returns the values of the trial `number` (from 0) of the sweep.

    `tried` are the earlier trials that have not failed; only `tpe` looks at them. The result depends on nothing else,
    so that two control planes suggest the same.
    """
    if sweep.search.type == "grid":
        return grid(sweep)[number]
    return _drawn(sweep, number, tried if sweep.search.type == "tpe" else ())


def grid(sweep: CreateSweep) -> list[Values]:
    """Returns every combination of values. The last parameter changes fastest."""
    lists = [parameter.extremes() for parameter in sweep.parameters.values()]
    return [dict(zip(sweep.parameters, values, strict=True)) for values in itertools.product(*lists)]


def probes(sweep: CreateSweep) -> list[Values]:
    """Returns trials in which every listed value, and both ends of every range, occur at least once.

    In each of them, all parameters but one have their first value.
    """
    first = {path: parameter.extremes()[0] for path, parameter in sweep.parameters.items()}
    others = [
        {**first, path: value} for path, parameter in sweep.parameters.items() for value in parameter.extremes()[1:]
    ]
    return [first, *others]


def _drawn(sweep: CreateSweep, number: int, tried: Sequence[Tried]) -> Values:
    import optuna  # takes half a second
    from optuna.samplers import RandomSampler, TPESampler
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    assert sweep.search.seed is not None
    seed = sweep.search.seed + number
    sampler = RandomSampler(seed) if sweep.search.type == "random" else TPESampler(seed=seed, constant_liar=True)
    goal = sweep.metric.goal if sweep.metric else None
    study = optuna.create_study(sampler=sampler, direction=goal or "minimize")
    distributions = {path: _distribution(parameter) for path, parameter in sweep.parameters.items()}
    for each in tried:
        params = {path: _place(sweep.parameters[path], value) for path, value in each.values.items()}
        state = TrialState.RUNNING if each.value is None else TrialState.COMPLETE
        study.add_trial(create_trial(state=state, value=each.value, params=params, distributions=distributions))
    asked = study.ask(distributions).params
    return {path: _value(sweep.parameters[path], place) for path, place in asked.items()}


def _distribution(parameter: Parameter) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.values is not None:
        return CategoricalDistribution(range(len(parameter.values)))
    low, high = parameter.extremes()
    kind = IntDistribution if parameter.type == "int" else FloatDistribution
    return kind(low, high, log=parameter.scale == "log")


def _place(parameter: Parameter, value: Any) -> Any:
    """Returns what Optuna knows a parameter's value by: its place in the list, because it may be a JSON object."""
    if parameter.values is None:
        return value
    return [json.dumps(each, sort_keys=True) for each in parameter.values].index(json.dumps(value, sort_keys=True))


def _value(parameter: Parameter, place: Any) -> Any:
    return place if parameter.values is None else parameter.values[place]
