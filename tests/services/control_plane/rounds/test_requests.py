"""Tests which requests for rounds contradict themselves, and what the stages are asked to do."""

from typing import Any

import pytest
from pydantic import ValidationError

from services.control_plane.core.errors import InvalidRequest
from services.control_plane.rounds.requests import CreateRounds, RoundsSpec, Selection
from tests.services.control_plane.http.test_documented_answers import DOCUMENT

BODY: dict[str, Any] = {"model": "m", "file": "file-1", "judge": {"type": "length"}}


@pytest.mark.parametrize(
    "name",
    ["CreateRounds", "Selection", "CreateHeldOut", "RoundsDocument", "RoundDocument", "Interval", "RoundsError"],
)
def test_the_openapi_document_describes_every_field(name: str) -> None:
    schemas = DOCUMENT["components"]["schemas"]
    for field, schema in schemas[name]["properties"].items():
        described = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        assert described.get("description"), field


@pytest.mark.parametrize(
    ("more", "param", "said"),
    [
        ({"file": None}, "file", "either 'file' or 'rows'"),
        ({"rows": [{"prompt": "a"}]}, "file", "either 'file' or 'rows'"),
        ({"evaluation": {"file": "a", "rows": [{"prompt": "a"}]}}, "evaluation.file", "either 'file' or 'rows'"),
        ({"selection": {"type": "rso", "num_accepted": 5}}, "selection.num_accepted", "a prompt has 4 samples"),
        ({"job": {"model": "other"}}, "job.model", "leave the field out"),
        ({"job": {"training_file": "file-2"}}, "job.training_file", "leave the field out"),
        ({"job": {"x_raydpo": {"reference": {"model": "o"}}}}, "job.x_raydpo.reference.model", "field 'reference'"),
    ],
)
def test_a_request_that_contradicts_itself_is_refused(more: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as refused:
        CreateRounds.model_validate(BODY | more).check()
    assert refused.value.param == param


def test_only_rso_has_a_temperature() -> None:
    with pytest.raises(ValidationError, match="has no field 'beta'"):
        Selection(type="ranking", beta=1)
    assert Selection(type="rso").resolved(64).num_accepted == 8
    assert Selection(type="rso").resolved(4).num_accepted == 2


def test_what_is_kept_has_no_prompts() -> None:
    rows = [{"prompt": "a"}]
    body = CreateRounds.model_validate(BODY | {"file": None, "rows": rows, "evaluation": {"rows": rows}})
    spec = body.spec()
    assert type(spec) is RoundsSpec
    assert RoundsSpec.model_validate(spec.model_dump(mode="json")) == spec


def job(**more: Any) -> Any:
    spec = RoundsSpec.model_validate(BODY | more)
    return spec.job_of("rounds-1", 2, "newest", "file-2")


@pytest.mark.parametrize(
    ("start", "reference", "model", "named"),
    [
        ("newest", "first", "newest", "m"),
        ("newest", "newest", "newest", None),
        ("first", "first", "m", None),
        ("first", "newest", "m", "newest"),
    ],
)
def test_a_job_starts_from_the_newest_or_the_first_policy_and_has_either_as_its_reference(
    start: str, reference: str, model: str, named: str | None
) -> None:
    spec = job(start=start, reference=reference).spec()
    assert (spec.model, spec.reference_model, spec.training_file) == (model, named, "file-2")


def test_a_job_keeps_its_options_and_an_objective_without_a_reference_gets_none() -> None:
    given = {"method": {"type": "simpo"}, "metadata": {"team": "a"}, "x_raydpo": {"num_workers": 2}}
    spec = job(job=given).spec()
    assert (spec.reference_model, spec.num_workers) == (None, 2)
    assert spec.metadata == {"team": "a", "rounds": "rounds-1", "round": "2"}
    assert (
        job(job={"x_raydpo": {"reference": {"source": "trainer"}}, "method": {"type": "dpo"}}).spec().reference_source
        == "trainer"
    )


@pytest.mark.parametrize(
    ("given", "param"),
    [({"suffix": 7}, "job.suffix"), ({"metadata": 7}, "job.metadata"), ({"x_raydpo": 7}, "job.x_raydpo")],
)
def test_a_wrong_field_of_a_job_is_named(given: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        job(job=given)
    assert refused.value.param == param


def test_each_round_has_seeds_of_its_own() -> None:
    spec = RoundsSpec.model_validate(BODY)
    assert len({spec.samples_of("m", number).sampling.seed for number in range(1, 21)}) == 20


def test_the_drift_is_measured_without_the_samplings_temperature() -> None:
    spec = RoundsSpec.model_validate(BODY | {"sampling": {"temperature": 0.7, "max_tokens": 9}})
    assert (spec.drift_of("n").sampling.temperature, spec.drift_of("n").sampling.max_tokens) == (1, 9)
    assert spec.drift_of("n").reference == "m"
    quality = spec.quality_of("n", "m", is_asked=False)
    assert quality is not None
    assert (quality.kind, quality.sampling.temperature) == ("score", 0.7)
    assert spec.quality_of("n", None, is_asked=True) is None
