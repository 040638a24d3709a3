"""Tests the parts that JSON responses share."""

from datetime import UTC, datetime

from services.control_plane.core.responses import deleted, listing, seconds


def test_times_are_whole_unix_seconds_and_none_stays_none() -> None:
    assert seconds(datetime(2001, 9, 9, 1, 46, 40, 999_999, tzinfo=UTC)) == 1_000_000_000
    assert seconds(None) is None


def test_a_page_names_its_first_and_last_id_and_an_empty_page_none() -> None:
    assert listing([{"id": "a"}, {"id": "b"}], has_more=True) == {
        "object": "list",
        "data": [{"id": "a"}, {"id": "b"}],
        "has_more": True,
        "first_id": "a",
        "last_id": "b",
    }
    assert listing([], has_more=False) == {
        "object": "list",
        "data": [],
        "has_more": False,
        "first_id": None,
        "last_id": None,
    }


def test_a_deletion_names_the_object() -> None:
    assert deleted("file", "file-1") == {"id": "file-1", "object": "file", "deleted": True}
