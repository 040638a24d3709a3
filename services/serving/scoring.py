"""Defines the HTTP routes through which the control plane asks a model to score completions.

Clients cannot reach these routes. One route takes texts, because the control plane has no tokenizer, and returns token
ids with the scores. The other route takes token ids. The control plane sends texts to a policy, and then the returned
ids to the policy's reference model, so that both models score the same ids, as in training.
"""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from dpo_core.data.groups import Group
from dpo_core.data.jsonl import InvalidRow
from dpo_core.data.scored_formats import in_request
from dpo_core.encoding.encode import EncodedGroup, encode_groups
from dpo_core.encoding.templates import UnusableTemplate
from dpo_core.models.model import load_tokenizer
from services import storage
from services.contract import SCORE_TEXTS, SCORE_TOKENS, Scored, TextsToScore, TokenGroup, TokensToScore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_TOKENS = 2**18  # of a request, each prompt counted for each of its completions

Score = Callable[[Sequence[EncodedGroup]], Awaitable[list[list[list[float]]]]]
"""A function that returns the outputs of a model for each completion of each group (a prompt with its completions)."""


class Refusal(Exception):
    """Raised if the rows of a request cannot be scored. The message is for the user, `param` names the invalid field of
    the request, and `status` is the HTTP status of the answer."""

    def __init__(self, message: str, *, param: str = "rows", status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status


class Scoring:
    """Answers the HTTP routes for texts and for token ids: scores the completions of a request with the function
    `score`.

    `source` is the URI, the local folder or the hub id of the model. The first request loads its tokenizer. A prompt
    and a completion together may have at most `max_length` tokens.
    """

    def __init__(self, source: str, max_length: int, score: Score) -> None:
        self._source, self._max_length, self._score = source, max_length, score
        self._reading = asyncio.Lock()  # tokenizers cannot be used by two threads at once

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route(f"/v1/{SCORE_TEXTS}", self._texts, methods=["POST"], response_model=None)
        app.add_api_route(f"/v1/{SCORE_TOKENS}", self._tokens, methods=["POST"], response_model=None)

    async def _texts(self, asked: TextsToScore) -> Response:
        return await self._answer(self._encoded, asked)

    async def _tokens(self, asked: TokensToScore) -> Response:
        return await self._answer(self._of_same_vocabulary, asked)

    async def _answer(self, read: Callable[[Any], list[EncodedGroup]], asked: TextsToScore | TokensToScore) -> Response:
        try:
            async with self._reading:
                groups, vocabulary = await asyncio.to_thread(self._read, read, asked)
            outputs = await self._score(groups)
        except Refusal as refusal:
            error = {"message": str(refusal), "param": refusal.param}
            return JSONResponse({"error": error}, refusal.status)
        except ConnectionError as error:  # the engine has died
            return JSONResponse({"error": {"message": str(error)}}, 503)
        except OSError as error:
            if not storage.is_away(error):
                raise
            message = "The storage of the model's tokenizer does not answer. Send the request again."
            return JSONResponse({"error": {"message": message}}, 503)
        on_wire, num_tokens = list(map(_on_wire, groups)), [group.num_learned for group in groups]
        usage = {"prompt_tokens": _count(groups)}
        scored = Scored(groups=on_wire, vocabulary=vocabulary, outputs=outputs, num_tokens=num_tokens, usage=usage)
        return Response(scored.model_dump_json(), media_type="application/json")

    def _read(
        self, read: Callable[[Any], list[EncodedGroup]], asked: TextsToScore | TokensToScore
    ) -> tuple[list[EncodedGroup], str]:
        groups = read(asked)
        self._check_lengths(groups, "the model" if isinstance(asked, TextsToScore) else "the reference")
        return groups, self._vocabulary

    def _encoded(self, asked: TextsToScore) -> list[EncodedGroup]:
        texts = [
            Group(text.prompt, text.completions, line, tools=text.tools, template_arguments=text.template_arguments)
            for line, text in enumerate(asked.groups, 1)
        ]
        try:
            encoded = list(encode_groups(texts, self._tokenizer, today=asked.today))
        except UnusableTemplate as error:
            raise Refusal(str(error)) from None
        for group in encoded:
            if isinstance(group, InvalidRow):
                path, message = in_request(group)
                raise Refusal(message, param=path)
        return [group for group in encoded if isinstance(group, EncodedGroup)]

    def _of_same_vocabulary(self, asked: TokensToScore) -> list[EncodedGroup]:
        if asked.vocabulary != self._vocabulary:
            raise Refusal(
                "The reference model has another tokenizer than the policy; choose a reference model of the same "
                "family.",
                param="reference",
            )
        return [
            EncodedGroup(group.prompt_ids, group.completion_ids, None, line, others=group.others)
            for line, group in enumerate(asked.groups, 1)
        ]

    def _check_lengths(self, groups: Sequence[EncodedGroup], model: str) -> None:
        for number, group in enumerate(groups):
            for place, ids in enumerate(group.completion_ids):
                if (length := len(group.prompt_ids) + len(ids)) > self._max_length:
                    path, limit = f"rows.{number}.completions.{place}", self._max_length
                    message = (
                        f"{path} and its prompt have {length} tokens, but {model} takes at most {limit}; shorten them."
                    )
                    raise Refusal(message, param=path)
        if (total := _count(groups)) > MOST_TOKENS:
            raise Refusal(
                f"The rows have {total} tokens, but a request can have at most {MOST_TOKENS}; send fewer rows.",
                status=413,
            )

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        return load_tokenizer(storage.fetch(self._source, only=storage.WORDS))

    @cached_property
    def _vocabulary(self) -> str:
        """Returns a digest of the tokenizer's tokens and their ids. Two models whose digests are equal have the same
        vocabulary."""
        words = json.dumps(sorted(self._tokenizer.get_vocab().items()))
        return hashlib.sha256(words.encode()).hexdigest()


def _on_wire(group: EncodedGroup) -> TokenGroup:
    return TokenGroup(
        prompt_ids=list(group.prompt_ids),
        completion_ids=tuple(map(list, group.completion_ids)),
        others=group.others,
    )


def _count(groups: Sequence[EncodedGroup]) -> int:
    """Returns the number of tokens in the groups (prompts with their completions). The tokens of a prompt count once
    for each of its completions."""
    return sum(len(group.prompt_ids) + len(ids) for group in groups for ids in group.completion_ids)
