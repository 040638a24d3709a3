"""Tests the counting of tokens in answers while they are passed on."""

import json

import pytest

from services.control_plane.inference.metering import Meter, asking_for_usage, asks_for_usage

DELTA = b'data: {"choices":[{"index":0,"delta":{"content":"a \\"choices\\":[] b"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"total_tokens":10,"completion_tokens":3}}\n\n'
DONE = b"data: [DONE]\n\n"


def metered(*pieces: bytes, shows_usage: bool = False) -> tuple[bytes, list[tuple[int, int]]]:
    noted: list[tuple[int, int]] = []
    meter = Meter(lambda prompt, completion, _: noted.append((prompt, completion)), shows_usage=shows_usage)
    shown = b"".join(meter.lines(piece) for piece in pieces)
    meter.end(1.0)
    return shown, noted


@pytest.mark.parametrize(
    "pieces", [(DELTA, DELTA, USAGE, DONE), (DELTA + DELTA + USAGE + DONE,), (DELTA, DELTA + USAGE, DONE)]
)
def test_the_count_is_noted_once_and_shown_only_to_who_asked(pieces: tuple[bytes, ...]) -> None:
    assert metered(*pieces) == (DELTA + DELTA + DONE, [(7, 3)])
    assert metered(*pieces, shows_usage=True) == (DELTA + DELTA + USAGE + DONE, [(7, 3)])


def test_spaces_in_the_events_change_nothing() -> None:
    spaced = USAGE.replace(b'"choices":[]', b'"choices": []')
    assert metered(DELTA, spaced + DONE) == (DELTA + DONE, [(7, 3)])


def test_of_a_stream_that_was_left_each_event_counts_as_a_token() -> None:
    assert metered(DELTA, DELTA + DELTA) == (DELTA * 3, [(0, 3)])
    assert metered(DELTA[:-1], b"\n" + DELTA) == (DELTA * 2, [(0, 2)])
    assert metered(DELTA.replace(b"\n", b"\r\n") * 2)[1] == [(0, 2)]
    assert metered() == (b"", [])


def test_an_event_without_choices_that_is_no_count_is_passed_on() -> None:
    odd = b'data: {"choices":[],"prompt_filter_results":[]}\n\n'
    assert metered(odd, DELTA, USAGE) == (odd + DELTA, [(7, 3)])


def test_a_whole_answer_is_counted() -> None:
    noted: list[tuple[int, int, float]] = []
    for body in (b'{"usage": {"prompt_tokens": 5, "completion_tokens": 2}}', b'{"usage": null}', b"[1]", b"nonsense"):
        meter = Meter(lambda *used: noted.append(used), shows_usage=True)
        meter.num_gpus = 4
        meter.whole(body)
        meter.end(0.5)
    assert noted == [(5, 2, 2.0)]


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        (b'{"model": "a", "n": 1.10}', False),
        (b'{"model": "a", "stream_options": {"include_usage": false, "x": 1}} \n', False),
        (b'{"model": "a", "stream_options": {"include_usage": true}}', True),
        (b'{"model": "a", "stream_options": null}', False),
    ],
)
def test_a_stream_is_asked_for_its_count_and_the_rest_of_the_body_stays(body: bytes, asked: bool) -> None:
    assert asks_for_usage(json.loads(body).get("stream_options")) is asked
    changed = asking_for_usage(body)
    assert changed.startswith(body.rstrip()[:-1])
    assert json.loads(changed) == json.loads(body) | {"stream_options": {"include_usage": True}}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32-le"])
def test_a_body_in_another_encoding_stays_as_it_came(encoding: str) -> None:
    body = '{"model": "a"}'.encode(encoding)
    assert asking_for_usage(body) == body
