"""Tests how answers of models are read, with a stand-in for the gateway."""

import asyncio
import json
from typing import Any

import pytest

from dpo_core.data.groups import Group
from services.control_plane.core.errors import ApiError
from services.control_plane.evaluations.kinds.asking import Models, chosen, completion_of
from services.control_plane.evaluations.requests import Sampling
from services.control_plane.models.models import STARTED_AT, NamedModel

MODEL = NamedModel("m", "/m", "m", STARTED_AT)
CHAT = Group([{"role": "user", "content": "Where?"}], (), 1, template_arguments={"style": "short"})
USAGE = {"prompt_tokens": 3, "completion_tokens": 2}


class Gateway:
    def __init__(self, answer: object) -> None:
        self.answer, self.asked = answer, list[tuple[str, dict[str, Any]]]()

    async def ask(self, model: NamedModel, path: str, body: bytes, meter: object) -> bytes:
        self.asked.append((path, json.loads(body)))
        return json.dumps(self.answer).encode()


def models_of(gateway: Any) -> Models:
    scoring: Any = None
    http: Any = None
    return Models(gateway, scoring, http, lambda model_id: None)  # type: ignore[arg-type, return-value]


def answered(message: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"choices": [{"message": message, "finish_reason": "stop", **more}], "usage": USAGE}


def test_messages_are_answered_with_their_tools_and_the_items_own_seed() -> None:
    gateway = Gateway(answered({"content": "Here.\0"}, finish_reason="length"))
    found = asyncio.run(models_of(gateway).answer(MODEL, CHAT, Sampling(seed=2**31 - 1), 3))
    assert found == {"text": "Here.\ufffd", "num_tokens": 2, "is_finished": False}
    path, body = gateway.asked[0]
    assert (path, body["messages"], body["seed"]) == ("chat/completions", CHAT.prompt, 2)
    assert (body["chat_template_kwargs"], "tools" in body) == ({"style": "short"}, False)


def test_a_call_of_a_tool_is_an_answer() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": "{}"}}
    gateway = Gateway(answered({"content": None, "tool_calls": [call]}))
    found = asyncio.run(models_of(gateway).answer(MODEL, CHAT, Sampling(), 0))
    assert json.loads(found["text"]) == [{"name": "find", "arguments": "{}"}]


def test_a_text_is_completed_as_it_is() -> None:
    gateway = Gateway({"choices": [{"text": " fox", "finish_reason": "stop"}], "usage": USAGE})
    found = asyncio.run(models_of(gateway).answer(MODEL, Group("the quick", (), 1), Sampling(), 0))
    assert (found["text"], gateway.asked[0][0], gateway.asked[0][1]["prompt"]) == (" fox", "completions", "the quick")


@pytest.mark.parametrize("answer", [[], {}, {"choices": []}, {"choices": [{"message": {}}], "usage": None}])
def test_an_answer_that_cannot_be_read_is_an_error_of_the_model(answer: object) -> None:
    with pytest.raises(ApiError, match="The model 'm' returned no answer that can be read"):
        asyncio.run(models_of(Gateway(answer)).answer(MODEL, CHAT, Sampling(), 0))


def test_a_message_that_is_a_text_is_an_error_of_the_model_that_says_so() -> None:
    models = models_of(Gateway({"choices": [{"message": "A", "finish_reason": "stop"}], "usage": USAGE}))
    with pytest.raises(ApiError, match="no answer that can be read: its 'message' is not an object") as failed:
        asyncio.run(models.choose(MODEL, "?", ("A", "B")))
    assert failed.value.code == "model_error"


@pytest.mark.parametrize("text", ["", "D", "A or B"])
def test_a_judge_that_gives_no_choice_is_an_error_of_the_model(text: str) -> None:
    with pytest.raises(ApiError, match="but it had to answer"):
        asyncio.run(models_of(Gateway(answered({"content": text}))).choose(MODEL, "?", ("A", "B")))


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("B", "B"),
        ("**B**.", "B"),
        ("Answer B is better; B is kind.", "B"),
        ("<think>A? No.</think>\n\nB", "B"),
        ("A", "A"),
        ("(A) is better.", "A"),
        ("**Verdict: A** because it is kind", "A"),
        ("Verdict: A\n\nIt is kind.", "A"),
        ("My answer is A because it is kind", "A"),
        ("`A`", "A"),
        ("\\boxed{A}", "A"),
        ("A: it is kind", "A"),
        ("A more direct answer comes from the second assistant.", None),
        ("A clear tie.", None),
        ("Verdict: A clear tie.", None),
        ('"A clear tie"', None),
        ("A look at A's words", None),
        ("A is as good as B", None),
        ("BA", None),
        ("b", None),
        ("8", "8"),
        ("Score: 8/10.", "8"),
        ("10 / 10", "10"),
        ("8.5", None),
        ("8 or 10", None),
        ("11", None),
    ],
)
def test_a_choice_is_found_in_an_answer_in_words(text: str, choice: str | None) -> None:
    assert chosen(text, ("A", "B", "8", "10")) == choice


def test_a_judge_does_not_think_before_its_verdict() -> None:
    gateway = Gateway(answered({"content": "A"}))
    assert asyncio.run(models_of(gateway).choose(MODEL, "Which?", ("A", "B"))) == "A"
    assert gateway.asked[0][1]["chat_template_kwargs"] == {"enable_thinking": False}


def test_an_answer_becomes_a_completion_in_the_form_of_its_prompt() -> None:
    assert completion_of("the quick", "fox") == "fox"
    assert completion_of(CHAT.prompt, "fox") == [{"role": "assistant", "content": "fox"}]
