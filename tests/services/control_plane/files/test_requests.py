"""Tests the bodies of requests for files: what they become, and which field is named if they are wrong."""

from typing import Any

import pytest

from services.contract import InvalidRows, Reading
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.files.requests import CheckDataset, CreateFile, reading


def test_options_for_reading_rows_are_taken_over() -> None:
    given = {"columns": {"prompt": "question", "chosen": "good"}, "invalid_rows": "drop", "max_invalid_share": 0.25}
    assert reading(given) == Reading(
        columns={"prompt": "question", "chosen": "good"}, invalid_rows=InvalidRows(how="drop", max_share=0.25)
    )
    assert reading({}) == Reading()


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"columns": {"promt": "q"}}, "x_raydpo.columns.promt"),
        ({"columns": {"prompt": ""}}, "x_raydpo.columns.prompt"),
        ({"invalid_rows": "ignore"}, "x_raydpo.invalid_rows"),
        ({"invalid_rows": "drop", "max_invalid_share": 2}, "x_raydpo.max_invalid_share"),
        ({"max_invalid_share": 0.1}, "x_raydpo.max_invalid_share"),
    ],
)
def test_a_wrong_option_for_reading_rows_is_refused_by_its_path(given: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        reading(given)
    assert raised.value.param == param


def test_a_file_has_the_purpose_of_training_and_the_life_that_was_asked_for() -> None:
    fields = {"purpose": "fine-tune", "expires_after": {"anchor": "created_at", "seconds": "7200"}}
    assert CreateFile.of(fields).life_seconds == 7200
    assert CreateFile.of({"purpose": "fine-tune"}).life_seconds is None
    for purpose in ("assistants", "fine-tune-results"):
        with pytest.raises(InvalidRequest, match="it must be 'fine-tune'") as raised:
            CreateFile.of({"purpose": purpose})
        assert (raised.value.param, raised.value.code) == ("purpose", "unsupported_value")


def test_an_unknown_option_of_a_file_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"Unknown parameter: 'x_raydpo\.colums'\. Did you mean 'columns'"):
        CreateFile.of({"purpose": "fine-tune", "x_raydpo": {"colums": {}}}).reading()


def test_a_check_counts_tokens_only_with_a_model() -> None:
    config = CheckDataset(training_file="file-1", model="tiny", max_length=99, truncation="keep_end").config()
    assert (config.max_length, config.truncation) == (99, "keep_end")
    with pytest.raises(InvalidRequest, match="send the field model as well") as raised:
        CheckDataset(training_file="file-1", max_length=99).config()
    assert raised.value.param == "max_length"
