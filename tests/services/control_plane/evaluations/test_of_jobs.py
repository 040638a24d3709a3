"""Tests which evaluations a job may ask for."""

from typing import Any

import pytest

from services.control_plane.core.errors import InvalidRequest
from services.control_plane.evaluations.of_jobs import body_of, evaluations_of

WORDS: dict[str, Any] = {"kind": "score", "judge": {"type": "length"}}
COMPARE = {"kind": "compare", "judge": {"type": "length"}, "file": "file-1"}


def test_each_is_stored_as_it_was_sent_with_its_models_and_its_baseline() -> None:
    asked = {"words": WORDS | {"file": "file-1", "max_items": 5, "of": "checkpoints"}, "better": COMPARE}
    found = evaluations_of(asked, "tiny")
    assert found == {"words": asked["words"], "better": COMPARE | {"baseline": "tiny", "of": "policy"}}
    assert evaluations_of(found, "tiny") == found
    assert evaluations_of(None, "tiny") == {}
    made = body_of(found["better"], "ft:one")
    made.check()
    assert (made.model, made.baseline, made.max_items) == ("ft:one", "tiny", 200)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ([], ""),
        ({"a b": WORDS}, ".a b.[key]"),
        ({str(number): WORDS for number in range(9)}, ""),
        ({"a": WORDS | {"file": "file-1", "of": "all"}}, ".a.of"),
        ({"a": WORDS | {"file": "file-1", "model": "tiny"}}, ".a.model"),
        ({"a": WORDS | {"rows": [{"prompt": "One"}]}}, ".a.rows"),
        ({"a": WORDS}, ".a.file"),
        ({"a": {"kind": "score", "file": "file-1"}}, ".a.judge"),
        ({"a": COMPARE | {"beta": 0.1}}, ".a.beta"),
    ],
)
def test_a_wrong_field_is_refused_by_its_path(given: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        evaluations_of(given, "tiny")
    assert caught.value.param == f"x_raydpo.evaluations{param}"
