"""Defines the JSON body of POST /v1/x/sweeps, which creates a sweep: many jobs that differ in chosen options."""

import secrets
from collections.abc import Mapping
from math import prod
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from dpo_core.options import LOSS, Metric
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.evaluations import planned
from services.control_plane.evaluations.requests import CreateEvaluation
from services.control_plane.http.validation import meant

MOST_TRIALS, MOST_PARAMETERS = 256, 16
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
Path = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+(\.([A-Za-z0-9_-]+|\*))*$", max_length=200)]


class Parameter(BaseModel):
    """A field of the job that a sweep varies: the values to try, or the range from which values are drawn."""

    model_config = ConfigDict(extra="forbid")
    values: Annotated[list[Any], Field(min_length=1, max_length=MOST_TRIALS)] | None = Field(
        default=None, description="The values of the field that the sweep tries. Send this, or `min` and `max`."
    )
    min: float | None = Field(
        default=None, allow_inf_nan=False, description="The lowest value that the sweep may draw for the field."
    )
    max: float | None = Field(
        default=None, allow_inf_nan=False, description="The highest value that the sweep may draw for the field."
    )
    type: Literal["float", "int"] = Field(
        default="float", description="Type of the values drawn between `min` and `max`: `int` draws whole numbers only."
    )
    scale: Literal["linear", "log"] = Field(
        default="linear",
        description="How values are drawn between `min` and `max`: `linear` spreads the values evenly, `log` their "
        "logarithms.",
    )

    @model_validator(mode="after")
    def _is_one_of_two(self) -> Self:
        if self.values is not None:
            of_ranges = (self.min, self.max, self.type, self.scale)
            if of_ranges != (None, None, "float", "linear"):
                raise ValueError("a parameter with 'values' takes no 'min', 'max', 'type' or 'scale'; leave these out.")
            return self
        if self.min is None or self.max is None:
            raise ValueError("a parameter needs 'values', or 'min' and 'max'.")
        if self.min >= self.max:
            raise ValueError(f"'min' is {self.min:g}, but it must be less than 'max', which is {self.max:g}.")
        if self.scale == "log" and self.min <= 0:
            raise ValueError(f"'min' is {self.min:g}, but on the scale 'log' it must be greater than 0.")
        if self.type == "int" and not (self.min.is_integer() and self.max.is_integer()):
            raise ValueError("'min' and 'max' of a parameter of the type 'int' must be whole numbers.")
        return self

    def extremes(self) -> list[Any]:
        """Returns all values to try. If the field has a range instead, returns the lowest and the highest value of the
        range.
        """
        if self.values is not None:
            return self.values
        assert self.min is not None
        assert self.max is not None
        return [int(end) if self.type == "int" else end for end in (self.min, self.max)]


class Search(BaseModel):
    """The field `search` of a sweep: how the sweep chooses the values for its trials (jobs): by which method, how
    often, and with which seed.
    """

    model_config = ConfigDict(extra="forbid")
    type: Literal["grid", "random", "tpe"] = Field(
        default="grid",
        description="`grid` tries every combination of values, `random` draws each value by chance, and `tpe` (a "
        "tree-structured Parzen estimator) draws values near those of good trials.",
    )
    num_trials: Annotated[int, Field(ge=1, le=MOST_TRIALS)] | None = Field(
        default=None,
        description="Number of trials (jobs with chosen values) that a search of the type `random` or `tpe` makes. A "
        "search of the type `grid` has no such number.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        default=None,
        description="Seed with which a search of the type `random` or `tpe` draws values. Default: a random seed.",
    )

    @model_validator(mode="after")
    def _fits_its_type(self) -> Self:
        if self.type != "grid" and self.num_trials is None:
            raise ValueError(f"a search of the type '{self.type}' needs the field 'num_trials'.")
        for name in ("num_trials", "seed"):
            if self.type == "grid" and getattr(self, name) is not None:
                what = f"a search of the type 'grid' tries every combination and has no field '{name}'"
                raise ValueError(f"{what}; leave '{name}' out.")
        return self


class SweepMetric(BaseModel):
    """The field `metric` of a sweep: the number by which the sweep compares its trials (jobs with chosen values)."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(
        description="Name of the metric by which trials are compared: a metric that jobs measure on validation data, "
        "such as `eval/loss`; or an evaluation of the sweep and one of its results, such as `quality/score`."
    )
    goal: Goal | None = Field(
        default=None,
        description="Whether lower values of the metric are better (`minimize`) or higher ones (`maximize`). Default: "
        "`minimize` for `eval/loss` and for the results of evaluations of the kind `drift`, `maximize` for all other "
        "metrics.",
    )


class EarlyStop(BaseModel):
    """The field `early_stop` of a sweep: the rules by which a trial (job) that does worse than the others is cancelled
    early.
    """

    model_config = ConfigDict(extra="forbid")
    metric: Metric = Field(
        default=LOSS,
        description="The metric, measured on validation data, by which a trial (job) is compared with others to decide "
        "whether it stops early.",
    )
    min_trials: int = Field(
        default=3,
        ge=1,
        le=MOST_TRIALS,
        description="No trial (job) stops early before this many other trials have been trained to the end, so that it "
        "can be compared with them.",
    )
    min_progress: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="No trial (job) stops early before it has trained this share of its steps, from 0 to 1.",
    )


class CreateSweep(BaseModel):
    """The JSON body of POST /v1/x/sweeps, which creates a sweep: the job to copy, the options that vary, how their
    values are chosen, and how the jobs are compared.
    """

    model_config = ConfigDict(extra="forbid")
    job: dict[str, Any] = Field(
        description="A request for a job: a body of POST /v1/fine_tuning/jobs. Each trial (job of the sweep) is a "
        "copy of this job, with the trial's own values of the fields in `parameters`."
    )
    parameters: Annotated[dict[Path, Parameter], Field(min_length=1, max_length=MOST_PARAMETERS)] = Field(
        description="The fields of the job that differ between trials (jobs of the sweep), with the values to try. A "
        "key is the path of a field, such as `method.dpo.hyperparameters.beta`. In `method.*.hyperparameters.beta`, "
        "the `*` stands for the method of each trial."
    )
    search: Search = Field(
        default_factory=Search,
        description="How the sweep chooses the values of its trials (jobs): all combinations, values at random, or "
        "values near those of good trials.",
    )
    max_running_jobs: int = Field(
        default=2, ge=1, le=64, description="Maximum number of the sweep's jobs that run at the same time."
    )
    metric: SweepMetric | None = Field(
        default=None,
        description="The metric by which trials (jobs of the sweep) are compared. A search of the type `tpe` needs a "
        "metric.",
    )
    early_stop: EarlyStop | None = Field(
        default=None,
        description="Rules by which a trial (job) that does worse than the others stops early. `{}` takes the default "
        "rules. Default: no trial stops early.",
    )
    evaluations: planned.Named = Field(
        default_factory=dict,
        description="Evaluations that the sweep makes of each trained policy. A key is a name of your choice; its "
        "value is a body of POST /v1/x/evaluations without `model`.",
    )

    def settled(self) -> "CreateSweep":
        """Returns the request with random seeds in place of those that it leaves out, and with the goal of its metric
        (`minimize` or `maximize`).

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
            message = f"A grid needs 'values' of each parameter, but '{ranges[0]}' has a range; list its values."
            raise InvalidRequest(message, param=f"parameters.{ranges[0]}")
        if self.num_trials > MOST_TRIALS:
            message = f"The grid has {self.num_trials} combinations, but a sweep has at most {MOST_TRIALS} trials."
            raise InvalidRequest(f"{message} List fewer values, or search at random.", param="parameters")
        if (num_probes := 1 + sum(len(each.extremes()) - 1 for each in self.parameters.values())) > MOST_TRIALS:
            message = f"The parameters have {num_probes} different values to check, but may have at most {MOST_TRIALS}."
            raise InvalidRequest(f"{message} List fewer values, or give ranges.", param="parameters")
        if "eval" in self.evaluations:
            message = "An evaluation has the name 'eval', which means validation data; choose another name."
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
        return planned.bodies(self.evaluations, model, "evaluations")
