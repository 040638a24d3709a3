"""Tests which completions are refused before a model sees them, and that others reach it as they were sent."""

import httpx
import pytest

from tests.services.control_plane.inference import test_inference as inference_tests
from tests.services.control_plane.inference.test_inference import Serve, refusal

settings, serve = inference_tests.settings, inference_tests.serve  # fixtures


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('"temperature": NaN', "'temperature' is nan; send a finite number"),
        ('"seed": -1e400', "'seed' is -inf; send a finite number"),
        ('"a": [{"b": "x\\ud800"}]', r"'a.0.b' has \ud800, which is half of a character"),
        ('"a": {"\\udc00": 1}', r"'a' has \udc00, which is half of a character"),
        (f'"tools": {"[" * 300}{"]" * 300}', "'tools' nests lists or objects more than 100 levels deep"),
        (f'"tools": {"[" * 200_000}{"]" * 200_000}', "nests lists or objects too deeply"),
        (f'"seed": {"9" * 5000}', "The body of the request cannot be read as JSON: Exceeds the limit"),
    ],
)
def test_what_no_other_reader_of_json_would_take_is_refused_by_name(
    api: httpx.Client, serve: Serve, more: str, said: str
) -> None:
    before = len(serve.bodies)
    raw = f'{{"model": "tiny", {more}}}'
    answer = api.post("/chat/completions", content=raw, headers={"content-type": "application/json"})
    assert said in refusal(answer, 400)
    assert len(serve.bodies) == before


def test_a_body_that_is_no_utf8_is_refused(api: httpx.Client) -> None:
    raw = b'{"model": "tiny", "user": "\xff"}'
    answer = api.post("/chat/completions", content=raw, headers={"content-type": "application/json"})
    assert "cannot be read as JSON: 'utf-8' codec can't decode byte 0xff" in refusal(answer, 400)


def test_the_model_gets_the_bytes_that_were_sent(api: httpx.Client, serve: Serve) -> None:
    serve.reply(b'{"id": "one"}')
    raw = '{ "model":"tiny", "seed": 123456789012345678901234567890, "n": 1.10, "user": "\\ud83d\\ude00 é" }'.encode()
    answer = api.post("/chat/completions", content=raw, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()) == (200, {"id": "one"})
    assert serve.bodies[-1] == raw
