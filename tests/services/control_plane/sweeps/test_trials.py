"""Tests how chosen values become the bodies of jobs."""

from typing import Any

import pytest

from services.control_plane.core.errors import InvalidRequest
from services.control_plane.sweeps.requests import CreateSweep
from services.control_plane.sweeps.trials import body_of, job_of

BETA = "method.*.hyperparameters.beta"
METHOD = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1, "n_epochs": 2}}}
JOB = {"model": "tiny", "training_file": "file-1", "method": METHOD, "seed": 1, "x_raydpo": None}


def sweep(job: dict[str, Any] = JOB, **more: Any) -> CreateSweep:
    return CreateSweep.model_validate({"job": job, "parameters": {"seed": {"values": [1]}}, **more})


def test_values_are_put_at_their_paths_and_the_sweep_stays_as_it_was() -> None:
    asked = sweep()
    body = body_of(asked, {BETA: 0.5, "x_raydpo.max_length": 64, "suffix": "a"})
    assert body["method"]["dpo"]["hyperparameters"] == {"beta": 0.5, "n_epochs": 2}
    assert (body["x_raydpo"], body["suffix"]) == ({"max_length": 64}, "a")
    assert asked.job == JOB


def test_a_method_that_varies_keeps_its_own_options_only() -> None:
    both = {**METHOD, "ipo": {"hyperparameters": {"n_epochs": 2}}}
    asked = sweep({**JOB, "method": both})
    ipo, kto = (body_of(asked, {BETA: 0.5, "method.type": kind})["method"] for kind in ("ipo", "kto"))
    assert ipo == {"type": "ipo", "ipo": {"hyperparameters": {"n_epochs": 2, "beta": 0.5}}}
    assert kto == {"type": "kto", "kto": {"hyperparameters": {"beta": 0.5}}}


def test_a_path_through_a_value_without_fields_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"lies within model, which is 'tiny'") as caught:
        job_of(sweep(), {"model.name": 1})
    assert caught.value.param == "job.model"


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"method.dpo.hyperparameters.beta": -1}, "job.method.dpo.hyperparameters.beta"),
        ({"colour": "red"}, "job.colour"),
        ({"method.dpo.hyperparameters.betta": 1}, "job.method.dpo.hyperparameters.betta"),
        ({"method.type": "guess"}, "job.method.type"),
    ],
)
def test_a_value_that_no_job_can_have_is_refused_with_its_trial(values: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest, match="This is the trial with") as caught:
        job_of(sweep(), values)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("more", "job", "param"),
    [
        ({"metric": {"name": "eval/loss"}}, {}, "job.validation_file"),
        ({"early_stop": {}}, {}, "job.validation_file"),
        ({"metric": {"name": "eval/accuracy"}}, {"x_raydpo": {"validation_share": 0.1}}, "job.method.type"),
    ],
)
def test_a_metric_that_the_job_does_not_measure_is_refused(
    more: dict[str, Any], job: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        job_of(sweep({**JOB, **job}, **more), {})
    assert caught.value.param == param
