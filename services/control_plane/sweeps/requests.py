"""Defines the JSON body of POST /v1/x/sweeps, which creates a sweep: many jobs that differ in chosen options."""

import secrets
from collections.abc import Mapping
from math import prod
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from dpo_core.options import LOSS, Metric
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.evaluations.requests import CreateEvaluation
from services.control_plane.http.validation import meant, parse, within

MOST_TRIALS, MOST_PARAMETERS, MOST_EVALUATIONS = 256, 16, 8
TRAINING_METRICS: tuple[str, ...] = get_args(Metric)
RESULTS = {  # the results of each kind of evaluation by which trials can be compared
    "compare": ("win_rate", "length_controlled_win_rate"),
    "score": ("score",),
    "samples": ("score", "best", "worst"),
    "preferences": ("accuracy", "margin"),
    "drift": ("kl_per_sequence", "kl_per_token"),
}
LOWER_IS_BETTER = (LOSS, *RESULTS["drift"])

Goal = Literal["minimize", "maximize"]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,32}$")]
Path = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+(\.([A-Za-z0-9_-]+|\*))*$", max_length=200)]


class Parameter(BaseModel):
    """A field of the job that a sweep varies: the values to try, or the range from which values are drawn."""

    model_config = ConfigDict(extra="forbid")
    values: Annotated[list[Any], Field(min_length=1, max_length=MOST_TRIALS)] | None = Field(
        default=None, description="The values to try."
    )
    min: float | None = Field(default=None, allow_inf_nan=False, description="The lowest value of a range.")
    max: float | None = Field(default=None, allow_inf_nan=False, description="The highest value of a range.")
    type: Literal["float", "int"] = Field(default="float", description="Whether a range holds whole numbers only.")
    scale: Literal["linear", "log"] = Field(
        default="linear", description="Whether values, or their logarithms, are spread evenly over a range."
    )

    @model_validator(mode="after")
    def _is_one_of_two(self) -> Self:
        if self.values is not None:
            of_ranges = (self.min, self.max, self.type, self.scale)
            if of_ranges != (None, None, "float", "linear"):
                raise ValueError("a parameter has either 'values' or a range from 'min' to 'max'; send one of the two.")
            return self
        if self.min is None or self.max is None:
            raise ValueError("a parameter needs 'values', or 'min' and 'max'.")
        if self.min >= self.max:
            raise ValueError(f"min is {self.min:g}, but it must be less than max, which is {self.max:g}.")
        if self.scale == "log" and self.min <= 0:
            raise ValueError(f"min is {self.min:g}, but on the scale 'log' it must be greater than 0.")
        if self.type == "int" and not (self.min.is_integer() and self.max.is_integer()):
            raise ValueError("min and max of the type 'int' must be whole numbers.")
        return self

    def extremes(self) -> list[Any]:
        """Returns all values to try, or the ends of the range."""
        if self.values is not None:
            return self.values
        assert self.min is not None
        assert self.max is not None
        return [int(end) if self.type == "int" else end for end in (self.min, self.max)]


class Search(BaseModel):
    """The field `search` of a sweep: how the values of its trials are chosen."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["grid", "random", "tpe"] = Field(
        default="grid",
        description="`grid` tries every combination of values, `random` draws each value by chance, and `tpe` (a "
        "tree-structured Parzen estimator) draws values near those of good trials.",
    )
    num_trials: Annotated[int, Field(ge=1, le=MOST_TRIALS)] | None = Field(
        default=None, description="How many trials `random` and `tpe` make."
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        default=None, description="Seed of the draws. Without it: one that the service draws."
    )

    @model_validator(mode="after")
    def _fits_its_type(self) -> Self:
        if self.type != "grid" and self.num_trials is None:
            raise ValueError(f"a search of the type '{self.type}' needs the field 'num_trials'.")
        for name in ("num_trials", "seed"):
            if self.type == "grid" and getattr(self, name) is not None:
                raise ValueError(f"a search of the type 'grid' tries every combination and has no '{name}'.")
        return self


class SweepMetric(BaseModel):
    """The field `metric` of a sweep: the number by which trials are compared."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(
        description="A metric of validation, such as `eval/loss`; or the name of an evaluation of the sweep and one of "
        "its results, such as `reward/score`."
    )
    goal: Goal | None = Field(
        default=None,
        description="Whether lower or higher values are better. Without it: lower ones for a loss or a drift, else "
        "higher ones.",
    )


class EarlyStop(BaseModel):
    """The field `early_stop` of a sweep: when a trial is hopeless, so that its job is cancelled."""

    model_config = ConfigDict(extra="forbid")
    metric: Metric = Field(default=LOSS, description="The metric of validation that is compared.")
    min_trials: int = Field(
        default=3, ge=1, le=MOST_TRIALS, description="How many trained trials there must be to compare with."
    )
    min_progress: float = Field(
        default=0.0, ge=0, lt=1, description="The share of its steps that a trial trains in any case."
    )


class CreateSweep(BaseModel):
    """The JSON body of POST /v1/x/sweeps, which creates a sweep."""

    model_config = ConfigDict(extra="forbid")
    job: dict[str, Any] = Field(description="The body of a job, as for POST /v1/fine_tuning/jobs.")
    parameters: Annotated[dict[Path, Parameter], Field(min_length=1, max_length=MOST_PARAMETERS)] = Field(
        description="The fields of the job that differ between trials, by their paths, such as "
        "`method.dpo.hyperparameters.beta`. A `*` after `method` stands for the trial's method."
    )
    search: Search = Field(default_factory=Search, description="How the values of trials are chosen.")
    max_running_jobs: int = Field(default=2, ge=1, le=64, description="How many jobs of the sweep run at a time.")
    metric: SweepMetric | None = Field(
        default=None, description="What makes a trial better than another one. `tpe` needs it."
    )
    early_stop: EarlyStop | None = Field(default=None, description="When hopeless trials are stopped.")
    evaluations: Annotated[dict[Name, dict[str, Any]], Field(max_length=MOST_EVALUATIONS)] = Field(
        default_factory=dict,
        description="Evaluations of each trial's policy, by names of your choice: bodies of POST /v1/x/evaluations "
        "without `model`.",
    )

    def settled(self) -> "CreateSweep":
        """Returns the request with its seeds drawn and the goal of its metric chosen.

        All jobs of a sweep have the same seed, unless the seed is a parameter. So all jobs hold out the same rows for
        validation, and can share prepared data. Raises InvalidRequest, which names the field, if fields contradict each
        other.
        """
        self._check()
        search = self.search
        if search.type != "grid" and search.seed is None:
            search = search.model_copy(update={"seed": secrets.randbelow(2**31)})
        job = {**self.job, "seed": secrets.randbelow(2**31)} if self.job.get("seed") is None else self.job
        metric = self.metric
        if metric is not None and metric.goal is None:
            is_low = metric.name.removeprefix(f"{self._evaluation_of(metric.name)}/") in LOWER_IS_BETTER
            metric = metric.model_copy(update={"goal": "minimize" if is_low else "maximize"})
        return self.model_copy(update={"job": job, "search": search, "metric": metric})

    def _check(self) -> None:
        ranges = [path for path, parameter in self.parameters.items() if parameter.values is None]
        if self.search.type == "grid" and ranges:
            message = f"A grid needs 'values' of each parameter, but '{ranges[0]}' has a range; list values."
            raise InvalidRequest(message, param=f"parameters.{ranges[0]}")
        if self.num_trials > MOST_TRIALS:
            message = f"The grid has {self.num_trials} combinations, but a sweep has at most {MOST_TRIALS} trials."
            raise InvalidRequest(f"{message} List fewer values, or search at random.", param="parameters")
        if (num_probes := 1 + sum(len(each.extremes()) - 1 for each in self.parameters.values())) > MOST_TRIALS:
            message = (
                f"The parameters have {num_probes} different values to check, but at most {MOST_TRIALS} are taken."
            )
            raise InvalidRequest(f"{message} List fewer values, or give ranges.", param="parameters")
        if "eval" in self.evaluations:
            message = "No evaluation can have the name 'eval', with which metrics of validation begin; rename it."
            raise InvalidRequest(message, param="evaluations.eval")
        if self.search.type == "tpe" and self.metric is None:
            message = "A search of the type 'tpe' needs 'metric', which says what a good trial is."
            raise InvalidRequest(message, param="metric", code="missing_required_parameter")
        if self.metric is not None and self.metric.name not in (known := self._known_metrics()):
            what = f"metric.name is '{self.metric.name:.80}'.{meant(self.metric.name, known)}"
            raise InvalidRequest(f"{what} It must be one of {', '.join(known)}.", param="metric.name")

    def _known_metrics(self) -> list[str]:
        results = [f"{name}/{result}" for name, body in self.bodies("").items() for result in RESULTS[body.kind]]
        return [*TRAINING_METRICS, *results]

    def _evaluation_of(self, metric: str) -> str | None:
        """Returns the name of the sweep's evaluation to which the metric belongs, such as `reward` for `reward/score`.
        Returns None for a metric of validation, such as `eval/loss`.
        """
        name = metric.partition("/")[0]
        return name if name in self.evaluations else None

    @property
    def num_trials(self) -> int:
        """Returns how many trials (jobs with chosen values) the sweep makes."""
        if self.search.num_trials is not None:
            return self.search.num_trials
        return prod(len(parameter.extremes()) for parameter in self.parameters.values())

    def bodies(self, model: str) -> Mapping[str, CreateEvaluation]:
        """Returns the sweep's evaluations as requests for evaluations of `model`, by their names.

        Raises InvalidRequest, which names the field, if one of them is not a valid request.
        """
        found = {}
        for name, given in self.evaluations.items():
            where = f"evaluations.{name}"
            if "model" in given:
                message = f"{where}.model cannot be given: a sweep evaluates each trial's policy. Leave it out."
                raise InvalidRequest(message, param=f"{where}.model", code="unknown_parameter")
            found[name] = parse(CreateEvaluation, {**given, "model": model or "policy"}, where)
            with within(where):
                found[name].check()
        return found
