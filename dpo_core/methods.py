"""Describes the objectives that a job may name as its method, such as dpo. Reads their names, options and defaults from
their classes. Uses only the standard library."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import Field, asdict, fields
from typing import Annotated, Any, Literal, get_args, get_origin

from dpo_core.config import Optim, TrainConfig, default_learning_rate
from dpo_core.options import OBJECTIVES, Doc, Limit

METHODS = list(OBJECTIVES)
COMMON = ("n_epochs", "batch_size", "learning_rate", "learning_rate_multiplier")  # hyperparameters of every method


def described(kind: str) -> dict[str, Any]:
    """Returns a description of the method `kind` (the name of an objective, such as dpo) as a JSON object: what the
    method is, from which kinds of data it learns, and its hyperparameters."""
    cls = OBJECTIVES[kind]
    objective = cls()
    words = " ".join(inspect.cleandoc(cls.__doc__ or "").split())
    papers = re.findall(r"arXiv (\d{4}\.\d{5})|(\S+\.pdf)", words)
    defaults = {name: default for name, default in asdict(objective).items() if name != "type"}
    rate = objective.traits.default_learning_rate
    common = described_options(
        dict(zip(COMMON, (objective.traits.default_epochs, "auto", rate, 1), strict=True)), TrainConfig, Optim
    )
    common["learning_rate"]["default_of_adapters"] = default_learning_rate(objective, with_adapter=True)
    return {
        "id": kind,
        "object": "method",
        "description": words,
        "papers": [f"https://arxiv.org/abs/{number}" if number else f"https://{page}" for number, page in papers],
        "learns_from": list(objective.traits.learns_from),
        "needs_reference": objective.traits.needs_reference,
        "takes_margins": objective.traits.takes_margins,
        "hyperparameters": described_options(defaults, cls),
        "common_hyperparameters": common,
    }


def described_options(defaults: Mapping[str, Any], *options: Any) -> dict[str, dict[str, Any]]:
    """Returns a description of each option in `defaults`, by the option's name: its default, its allowed values, and
    what it does. `defaults` has the default of each option by name; `options` are the classes that define these
    options."""
    defined = {option.name: option for cls in options for option in fields(cls)}
    return {name: {"default": default, **_described_option(defined[name])} for name, default in defaults.items()}


def _described_option(option: "Field[Any]") -> dict[str, Any]:
    """Returns a description of an option, a dictionary with these keys:

    - `range`: the allowed values in words; empty for an option without a range, such as the weights of `mpo`
    - `description`: what the option does
    - `choices`: the list of allowed values; only for an option that has a few fixed values
    """
    kind, *metadata = get_args(option.type) if get_origin(option.type) is Annotated else [option.type]
    if kind is bool:
        choices, words = [True, False], "true or false"
    elif get_origin(kind) is Literal:
        choices = list(get_args(kind))
        words = ", ".join(map(str, choices))
    else:
        choices, words = None, "".join(each.words for each in metadata if isinstance(each, Limit))
    description = " ".join(each.words for each in metadata if isinstance(each, Doc))
    return {"range": words, "description": description} | ({"choices": choices} if choices else {})
