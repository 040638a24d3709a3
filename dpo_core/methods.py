"""Describes the objectives that a job may name as its method, by reading their classes. Uses only the standard
library."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import Field, asdict, fields
from typing import Any, Literal, get_args, get_origin

from dpo_core.config import Optim, TrainConfig, default_learning_rate
from dpo_core.options import OBJECTIVES

METHODS = list(OBJECTIVES)
COMMON = ("n_epochs", "batch_size", "learning_rate", "learning_rate_multiplier")  # hyperparameters of every method


def described(kind: str) -> dict[str, Any]:
    """Returns the method `kind` as JSON: its description, its kinds of data, and its hyperparameters with defaults and
    ranges."""
    cls = OBJECTIVES[kind]
    objective = cls()
    words = " ".join(inspect.cleandoc(cls.__doc__ or "").split())
    papers = re.findall(r"arXiv (\d{4}\.\d{5})|(\S+\.pdf)", words)
    defaults = {name: default for name, default in asdict(objective).items() if name != "type"}
    rate = objective.traits.default_learning_rate
    common = _with_ranges(
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
        "hyperparameters": _with_ranges(defaults, cls),
        "common_hyperparameters": common,
    }


def _with_ranges(defaults: Mapping[str, Any], *options: Any) -> dict[str, dict[str, Any]]:
    """Returns each option in `defaults` with its default and its range. A range comes from the class in `options` that
    defines the option."""
    ranges = {option.name: _range(option) for cls in options for option in fields(cls)}
    return {name: {"default": default, "range": ranges[name]} for name, default in defaults.items()}


def _range(option: "Field[Any]") -> str:
    """Returns the allowed values of an option in words. The result is empty for options without a range, such as the
    objectives and weights of `mpo`."""
    if option.type is bool:
        return "true or false"
    if get_origin(option.type) is Literal:
        return ", ".join(map(str, get_args(option.type)))
    return "".join(limit.words for limit in getattr(option.type, "__metadata__", ()))
