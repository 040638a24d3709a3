"""Tests what the names of columns tell about their roles, in any spelling."""

import pytest

from dpo_core.data.formats.column_hints import (
    holds_answer,
    is_media,
    likely_columns,
    role_of,
    says_something,
    side_rated,
)


@pytest.mark.parametrize(
    ("key", "role"),
    [
        ("question", "prompt"),
        ("User Prompt", "prompt"),
        ("systemInstruction", "system"),
        ("better_response", "chosen"),
        ("Rejected", "rejected"),
        ("kto-tag", "label"),
        ("thumbs_up", "label"),
        ("ratings", "scores"),
        ("source", None),
        ("prompt" * 10, None),
    ],
)
def test_the_name_of_a_column_tells_its_role_in_any_spelling(key, role):
    assert role_of(key) == role


def test_a_role_is_suggested_only_if_no_column_has_its_name():
    assert likely_columns({"question", "good", "bad", "id"}) == {
        "prompt": "question",
        "chosen": "good",
        "rejected": "bad",
    }
    assert likely_columns({"prompt", "question"}) == {}
    assert likely_columns({f"question{number}" for number in range(101)} | {"question"}) == {}


def test_answers_scores_and_media_are_told_by_their_names():
    assert holds_answer("response_a", "A")
    assert holds_answer("answers", "1")
    assert not holds_answer("response_b", "A")
    assert (side_rated("score_chosen"), side_rated("rejected_rating"), side_rated("score")) == (
        "chosen",
        "rejected",
        None,
    )
    assert [is_media(key) for key in ("chosen_image_url", "imagination")] == [True, False]
    assert [says_something(key) for key in ("loss mask", "source")] == [True, False]
