"""Chooses the values for a sweep's trials (jobs): all combinations, at random, or near the values of good trials."""

import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from services.control_plane.sweeps.requests import CreateSweep, Parameter

Values = dict[str, Any]  # the values of a trial, by the paths of the fields of the job


class Tried(NamedTuple):
    """An earlier trial (job of the sweep): the values of its parameters, and its value of the sweep's metric. This
    `value` is None if the trial has none yet.
    """

    values: Values
    value: float | None


def suggest(sweep: CreateSweep, number: int, tried: Sequence[Tried]) -> Values:
    """Returns the parameters' values for the trial (job) `number`, from 0, of the sweep.

    `tried` are the earlier trials that have not failed. Only the search type `tpe` (tree-structured Parzen estimator)
    uses them. The result depends only on the arguments, so that two control planes suggest the same values.
    """
    if sweep.search.type == "grid":
        return grid(sweep)[number]
    return _drawn(sweep, number, tried if sweep.search.type == "tpe" else ())


def grid(sweep: CreateSweep) -> list[Values]:
    """Returns the values of every trial (job) of the grid search `sweep`: all combinations of the parameters' values.
    The values of the last parameter change fastest."""
    lists = [parameter.extremes() for parameter in sweep.parameters.values()]
    return [dict(zip(sweep.parameters, values, strict=True)) for values in itertools.product(*lists)]


def probes(sweep: CreateSweep) -> list[Values]:
    """Returns the parameters' values for a few trials (jobs), in which every listed value, and both ends of every
    range, occur at least once. Before a sweep is created, the service checks these jobs.

    In each of these trials, all parameters but one have their first value.
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
    """Returns the value that Optuna stores for a parameter's `value`. For a parameter with listed values, this is the
    index in the list, because a listed value may be a JSON object.
    """
    if parameter.values is None:
        return value
    return [json.dumps(each, sort_keys=True) for each in parameter.values].index(json.dumps(value, sort_keys=True))


def _value(parameter: Parameter, place: Any) -> Any:
    return place if parameter.values is None else parameter.values[place]
