"""Tests that two releases can work together: each reads what the other writes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services import contract
from services.contract import (
    LONGEST_TEXT,
    WIRE,
    AttemptAddress,
    AttemptSpec,
    Contract,
    EventBatch,
    Failed,
    Message,
    Succeeded,
    Wandb,
    Wish,
)

FIRST: dict[str, Any] = json.loads((Path(__file__).parent / "releases" / "first.json").read_text())
"""One message of each kind, every field set, as the first release wrote it. Never edited."""


RENAMED = {"CheckResult": "SideJobResult"}  # classes that have another name since then


def kind(name: str) -> type[Contract]:
    found: type[Contract] = getattr(contract, RENAMED.get(name, name))
    return found


def lacks(written: Any, wanted: Any, where: str) -> Iterator[str]:
    """Yields the places at which `written` lacks something that `wanted` has."""
    if isinstance(wanted, dict) and isinstance(written, dict):
        for key, value in wanted.items():
            yield from lacks(written.get(key, "nothing"), value, f"{where}.{key}")
    elif isinstance(wanted, list) and isinstance(written, list) and len(wanted) == len(written):
        for place, value in enumerate(wanted):
            yield from lacks(written[place], value, f"{where}.{place}")
    elif written != wanted:
        yield f"{where}: {written!r}, not {wanted!r}"


def with_news(value: Any) -> Any:
    """Returns the value as a later release might write it: with a new key in every object whose keys are fixed."""
    if isinstance(value, dict):
        free = value.keys() <= {"k", "loss", "eval/loss", "prompt", "num_rows"}
        return {key: with_news(each) for key, each in value.items()} | ({} if free else {"news": {"a": [1]}})
    return [with_news(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", FIRST)
def test_a_message_of_the_first_release_is_read_and_written_so_that_the_first_release_reads_it(name: str) -> None:
    read = kind(name).model_validate_json(json.dumps(FIRST[name]))
    assert list(lacks(json.loads(read.model_dump_json()), FIRST[name], name)) == []


@pytest.mark.parametrize("name", FIRST)
def test_what_a_later_release_adds_is_ignored_in_all_depths(name: str) -> None:
    known = kind(name).model_validate(FIRST[name])
    assert kind(name).model_validate_json(json.dumps(with_news(FIRST[name]))) == known
    assert kind(name).model_validate(with_news(FIRST[name])) == known


def test_unknown_keys_are_refused_where_a_user_writes_them() -> None:
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        Wandb.model_validate({"project": "p", "news": 1})


@pytest.mark.parametrize(
    ("report", "why"),
    [
        ({"kind": "tea is ready", "cups": 2}, "tea is ready"),
        ({"kind": "checkpoint", "step": "many"}, "step"),
        ({"kind": "succeeded", "model_uri": "s3://b/export", "trained_tokens": 2**63}, "trained_tokens"),
    ],
)
def test_a_report_that_cannot_be_read_becomes_a_message_and_those_behind_it_are_read(
    report: dict[str, Any], why: str
) -> None:
    last = {"kind": "succeeded", "model_uri": "s3://b/export", "trained_tokens": 1}
    events = [{"seq": seq, "created_at": 1.0, "report": each} for seq, each in enumerate([report, last])]
    first, second = EventBatch.model_validate_json(json.dumps({"events": events})).events
    assert isinstance(first.report, Message)
    assert (first.seq, first.report.level, why in first.report.message) == (0, "warn", True)
    assert second.report == Succeeded.model_validate(last)


def test_a_stage_and_a_wish_of_another_release_do_no_harm() -> None:
    progress = {"kind": "progress", "stage": "merging", "done": 1, "total": 2}
    event = {"seq": 0, "created_at": 1.0, "report": progress}
    assert EventBatch.model_validate({"events": [event]}).events[0].report.model_dump() == progress
    assert Wish.model_validate({"desired": "dance"}).desired == "run"


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("list_view<a\0b: int32>", "list_view<a\ufffdb: int32>"),
        ("half \ud83d a face", "half ? a face"),
        ("x" * (LONGEST_TEXT + 1), "x" * (LONGEST_TEXT - 1) + "…"),
    ],
    ids=["NUL", "surrogate", "long"],
)
def test_a_text_that_no_database_keeps_is_made_one_that_it_does(said: str, kept: str) -> None:
    assert (Message(message=said).message, Failed(code="c", message="m", param=said).param) == (kept, kept)
    assert Message.model_validate_json(Message(message=said).model_dump_json()).message == kept


def test_the_wire_has_a_version_that_a_driver_of_any_release_finds() -> None:
    later = FIRST["AttemptSpec"] | {"wire": WIRE + 1, "config": {"unlike": "any"}}
    assert AttemptAddress.model_validate(later).wire == WIRE + 1
    assert AttemptSpec.model_validate(FIRST["AttemptSpec"]).wire == 1
    assert "wire" not in AttemptSpec.model_validate(FIRST["AttemptSpec"]).model_dump(), "the first release refuses it"
