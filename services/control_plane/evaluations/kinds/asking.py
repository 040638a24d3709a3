"""Asks models for answers, verdicts, log-probabilities and rewards, on behalf of an evaluation."""

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import httpx

from dpo_core.data.groups import Group
from dpo_core.data.messages import Text
from services.contract import Scored, TokenGroup, storable
from services.control_plane.core.errors import ApiError
from services.control_plane.evaluations.kinds import addresses
from services.control_plane.evaluations.kinds.addresses import Address
from services.control_plane.evaluations.requests import Sampling
from services.control_plane.evaluations.rows import said
from services.control_plane.inference.inference import Inference
from services.control_plane.inference.metering import Meter
from services.control_plane.models.models import NamedModel
from services.control_plane.rewards.judges import Judge
from services.control_plane.rewards.preferences import Judged
from services.control_plane.rewards.scoring import Scoring

WITHOUT_THOUGHTS: dict[str, object] = {"enable_thinking": False}  # templates of models that do not think ignore it
# Where a request has no value, vLLM takes the one of the model's own config, which may exclude tokens.
WHOLE_DISTRIBUTION = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
AS_VERDICT = r"""\b(?i:answer|verdict|choice)(?: is)? LETTER\b|\bLETTER(?=[.:,;)\]}*"'`”’](?!\w)|\s*$)"""


@dataclass(frozen=True)
class Models:
    """Sends an evaluation's requests to models, through the same code that sends clients' requests.

    `http` sends requests to judges at addresses outside of the service. `meter_of` returns, for a model's id, the meter
    that counts the model's tokens.
    """

    inference: Inference
    scoring: Scoring
    http: httpx.AsyncClient
    meter_of: Callable[[str], Meter]
    vocabularies: dict[str, str] = field(default_factory=dict)  # digests, by the names of applications

    async def answer(self, model: NamedModel, group: Group, sampling: Sampling, number: int) -> dict[str, Any]:
        """Returns the model's answer to the prompt of `group` (a prompt with completions), as a JSON object with
        `text`, `num_tokens` and `is_finished`.

        `is_finished` is false if the answer was cut off at the largest number of tokens. `number` is the number of the
        evaluation's item (prompt), which is added to the seed of `sampling`.
        """
        return _answer(await self._complete(model, group, _options(sampling, number)))

    async def answers(
        self, model: NamedModel, group: Group, sampling: Sampling, number: int, count: int
    ) -> list[dict[str, Any]]:
        """Returns `count` answers to the prompt of `group` (a prompt with completions), as JSON objects like the one
        that the method `answer` returns.

        All answers come from one request, so vLLM reads the prompt once. `number` is the number of the evaluation's
        item (prompt), which is added to the seed of `sampling`.
        """
        options = {**_options(sampling, number), "n": count, "return_token_ids": True}
        found = await self._complete(model, group, options)
        choices = sorted(found["choices"], key=lambda choice: choice["index"])
        if len(choices) != count or not all(choice.get("token_ids") for choice in choices):
            message = f"The model '{model.id}' returned {len(choices)} answers that can be read, not {count}."
            raise ApiError(message, code="model_error")
        return [_of_choice(choice, len(choice["token_ids"])) for choice in choices]

    async def sample(
        self, model: NamedModel, group: Group, sampling: Sampling, number: int
    ) -> tuple[dict[str, Any], Scored]:
        """Returns an answer to the prompt of `group` (a prompt with completions), and the model's log-probability of
        this answer.

        The answer is a JSON object like the one that the method `answer` returns. It is sampled from the model's whole
        distribution, even if the model's own config excludes some tokens, for example with top_k. `number` is the
        number of the evaluation's item, which is added to the seed of `sampling`.
        """
        vocabulary = await self._vocabulary(model)
        options = {**_options(sampling, number), **WHOLE_DISTRIBUTION, "return_token_ids": True}
        answer = await self._complete(model, group, options)
        prompt_ids = answer["choices"][0].get("prompt_token_ids") or answer["prompt_token_ids"]
        tokens = TokenGroup(prompt_ids=prompt_ids, completion_ids=(answer["choices"][0]["token_ids"],))
        return _answer(answer), await self.scoring.score_tokens(model, [tokens], vocabulary, self.meter_of)

    async def _vocabulary(self, model: NamedModel) -> str:
        """Returns the digest of the model's vocabulary.

        The first call for a model asks it for the log-probabilities of a short text, because the response holds the
        digest.
        """
        if model.app_name not in self.vocabularies:
            any_text = Group("a", ("a",), 1)
            scored = await self.scoring.score_texts(model, [any_text], self.meter_of, today=None)
            self.vocabularies[model.app_name] = scored.vocabulary
        return self.vocabularies[model.app_name]

    async def choose(self, judge: NamedModel | Address, question: str, choices: tuple[str, ...]) -> str:
        """Returns the one of `choices` with which the judge answers the question, at temperature 0.

        vLLM is told to allow only these choices as the answer. A judge at an address answers freely, so the choice is
        looked for in its answer. Raises ApiError if the answer names no choice, or several.
        """
        if isinstance(judge, Address):
            answer = await self._complete_at(judge, question)
        else:
            group = Group([{"role": "user", "content": question}], (), 1, template_arguments=WITHOUT_THOUGHTS)
            options = {"max_tokens": 16, "temperature": 0, "structured_outputs": {"choice": choices}}
            answer = await self._complete(judge, group, options)
        text = str((answer["choices"][0].get("message") or {}).get("content") or "").strip()
        choice = chosen(text, choices)
        if choice is None:
            allowed = " or ".join(map(repr, choices))
            message = f"The judge '{judge.id}' answered {text!r:.80}, but it had to answer {allowed}"
            raise ApiError(f"{message}; name another model in 'judge'.", code="model_error")
        return choice

    async def rewards(self, judge: Judge, group: Group) -> list[Judged]:
        """Returns the reward that the models of `judge` give to each completion of the group (a prompt with
        completions).
        """
        return (await self.scoring.judge(judge, [group], self.meter_of)).groups[0]

    async def _complete(self, model: NamedModel, group: Group, options: dict[str, Any]) -> Any:
        """Sends the prompt of `group` to the model, and returns the JSON of the response, which has the form of
        OpenAI's API.

        A prompt that is a text is sent to /completions, messages to /chat/completions. `options` are further fields of
        the request.
        """
        asked = {"model": model.id, **options}
        if isinstance(group.prompt, str):
            path, asked["prompt"] = "completions", group.prompt
        else:
            path, asked["messages"] = "chat/completions", group.prompt
            more = {"tools": group.tools, "chat_template_kwargs": group.template_arguments}
            asked |= {name: value for name, value in more.items() if value}
        return _read(model, await self.inference.ask(model, path, json.dumps(asked).encode(), self.meter_of(model.id)))

    async def _complete_at(self, judge: Address, question: str) -> Any:
        """Sends the question to the judge at an address, and returns the JSON of the response."""
        answer, meter = await addresses.ask(self.http, judge, question), self.meter_of(judge.id)
        meter.whole(answer)
        meter.end(0)  # seconds: the answer took no accelerator of the service
        return _read(judge, answer)


def _read(model: NamedModel | Address, answer: bytes) -> Any:
    try:
        parsed = json.loads(answer)
        choice = parsed["choices"][0]
        _ = choice["finish_reason"], parsed["usage"]["completion_tokens"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ApiError(f"The model '{model.id}' returned no answer that can be read.", code="model_error") from None
    if not isinstance(choice.get("message") or {}, dict):
        unreadable = f"The model '{model.id}' returned no answer that can be read: its 'message' is not an object."
        raise ApiError(unreadable, code="model_error")
    return parsed


def chosen(text: str, choices: Collection[str]) -> str | None:
    """Returns the one of `choices`, which are capital letters or whole numbers, that `text` names. Returns None if it
    names none, or several.

    Thoughts before the answer do not count, and `8/10` names 8. A letter may be a word, as in "A tie". So it counts
    only at the end of a line, before a mark such as `.` or `**`, or after the word answer, verdict or choice.
    """
    answer = re.sub(r"(?<=\d) ?/ ?10\b", "", text.rpartition("</think>")[2])
    named = set(re.findall(r"\w+(?:[.,'’]\w+)*", answer)) & set(choices)
    if len(named) != 1:
        return None
    choice = named.pop()
    is_meant = choice.isdigit() or re.search(AS_VERDICT.replace("LETTER", choice), answer, re.MULTILINE)
    return choice if is_meant else None


def _options(sampling: Sampling, number: int) -> dict[str, Any]:
    return {**sampling.model_dump(), "seed": (sampling.seed + number) % 2**31}


def _answer(answer: Any) -> dict[str, Any]:
    return _of_choice(answer["choices"][0], answer["usage"]["completion_tokens"])


def _of_choice(choice: Any, num_tokens: int) -> dict[str, Any]:
    return {
        "text": storable(choice["text"] if "text" in choice else said(choice["message"])),
        "num_tokens": num_tokens,
        "is_finished": choice["finish_reason"] != "length",
    }


def completion_of(prompt: Text, text: str) -> Text:
    """Returns the answer `text` in the form of its prompt: as a text if the prompt is a text, else as a list with one
    message.
    """
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
