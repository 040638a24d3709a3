"""Tests which fields each kind of evaluation takes, and what is kept of a request."""

from typing import Any

import pytest
from pydantic import ValidationError

from services.control_plane.core.errors import InvalidRequest
from services.control_plane.evaluations.requests import OF_KIND, CreateEvaluation, Judge, Spec
from tests.services.control_plane.http.test_documented_answers import DOCUMENT

LENGTH = {"type": "length"}
DOCUMENTED = (
    "CreateEvaluation",
    "Judge",
    "Sampling",
    "EvaluationRow",
    "EvaluationDocument",
    "EvaluationError",
    "EvaluationItemDocument",
    "ItemError",
)
FIELDS: dict[str, Any] = {
    "baseline": "b",
    "judge": LENGTH,
    "sampling": {"seed": 1},
    "reference": "r",
    "beta": 1.0,
    "num_samples": 3,
}
ROWS = [{"prompt": "Why?"}]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_openapi_document_describes_every_field(name: str) -> None:
    schemas = DOCUMENT["components"]["schemas"]
    for field, schema in schemas[name]["properties"].items():
        described = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        assert described.get("description"), field


@pytest.mark.parametrize("kind", OF_KIND)
@pytest.mark.parametrize("field", FIELDS)
def test_a_kind_takes_its_own_fields_and_no_others(kind: str, field: str) -> None:
    needed = {"judge": LENGTH} if "judge" in OF_KIND[kind] else {}
    body = CreateEvaluation.model_validate({"kind": kind, "model": "m", "rows": ROWS, **needed, field: FIELDS[field]})
    if field in OF_KIND[kind]:
        body.check()
    else:
        with pytest.raises(InvalidRequest, match=f"kind '{kind}' has no field '{field}'"):
            body.check()


def test_a_null_is_as_if_the_field_were_left_out() -> None:
    CreateEvaluation(kind="score", model="m", judge=Judge(type="length"), baseline=None, file="file-1").check()


def test_what_is_kept_has_what_the_service_chose_and_no_rows() -> None:
    body = CreateEvaluation.model_validate({"kind": "compare", "model": "m", "judge": LENGTH, "rows": ROWS})
    spec = body.spec(baseline="b")
    assert type(spec) is Spec
    assert (spec.baseline, spec.sampling.max_tokens, "rows" in spec.model_dump()) == ("b", 512, False)
    assert Spec.model_validate(spec.model_dump(mode="json") | {"of another release": 1}, extra="ignore") == spec


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ({"type": "model"}, "needs the field 'model'"),
        ({"type": "regex"}, "needs the field 'pattern'"),
        ({"type": "regex", "pattern": "("}, "that RE2 can read"),
        ({"type": "exact", "pattern": "a"}, "has no field 'pattern'"),
        ({"type": "length", "criteria": "a"}, "has no field 'criteria'"),
        ({"type": "regex", "pattern": "a", "model": "m"}, "has no field 'model'"),
        ({"type": "model", "model": "m", "beta": 0.1}, "has no field 'beta'"),
        ({"type": "implicit", "criteria": "a"}, "has no field 'criteria'"),
    ],
)
def test_a_judge_has_the_fields_of_its_type(judge: dict[str, str], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Judge.model_validate(judge)
