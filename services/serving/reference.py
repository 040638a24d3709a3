"""Computes the log-probabilities of given completions with a vLLM engine.

Training uses the log-probabilities of its reference, the frozen model with which the trained model is compared.
"""

import asyncio
import math
from collections.abc import Sequence
from functools import partial
from uuid import uuid4

from vllm import SamplingParams
from vllm.engine.protocol import EngineClient
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError

from services.contract import Score, Spans

CERTAIN = 1e9  # a bias that outweighs every logit


class Reference:
    """Computes the log-probabilities of completions with a vLLM engine that also answers users' requests.

    A row is a prompt with one completion. The rows that the engine scores at the same time have at most
    `max_tokens_in_flight` tokens together, so that a user's request does not wait for more tokens than these. A row
    that has more tokens by itself is scored alone.
    """

    def __init__(self, engine: EngineClient, *, max_tokens_in_flight: int) -> None:
        self._engine = engine
        self._max_tokens_in_flight = max_tokens_in_flight
        self._tokens_in_flight = 0
        self._released = asyncio.Event()

    async def score(
        self,
        prompt_ids: Sequence[list[int]],
        completion_ids: Sequence[list[int]],
        others: Sequence[Spans] = (),
        adapter: LoRARequest | None = None,
    ) -> list[Score]:
        """Returns for each completion its log-probability given its prompt, summed over the completion's tokens, and
        the number of these tokens.

        Entry i of `prompt_ids`, `completion_ids` and `others` belongs to completion i. An entry of `others` holds
        ranges [start, stop) of the completion's tokens that are neither summed nor counted. The engine computes with
        `adapter`, if one is given. Raises ValueError for a prompt and completion that cannot be scored, and
        ConnectionError if the engine has died.
        """
        rows = await self.token_logps(prompt_ids, completion_ids, others, adapter)
        return [Score(math.fsum(row), len(row)) for row in rows]

    async def token_logps(
        self,
        prompt_ids: Sequence[list[int]],
        completion_ids: Sequence[list[int]],
        others: Sequence[Spans] = (),
        adapter: LoRARequest | None = None,
    ) -> list[list[float]]:
        """Returns for each completion the log-probabilities of its tokens, in nats, given the completion's prompt.

        Entry i of `prompt_ids`, `completion_ids` and `others` belongs to completion i. A prompt and its completion
        together may have as many tokens as the model's limit. An entry of `others` holds ranges [start, stop) of the
        completion's tokens that the result leaves out. The engine computes with `adapter`, if one is given. Raises
        ValueError for a prompt and completion that cannot be scored, and ConnectionError if the engine has died.
        """
        if len(prompt_ids) != len(completion_ids):
            raise ValueError(
                f"The request has {len(prompt_ids)} prompts and {len(completion_ids)} completions; send one prompt "
                "for each completion."
            )
        rows = list(zip(prompt_ids, completion_ids, strict=True))
        for index, row in enumerate(rows):
            self._check(index, *row)
        tasks = []
        try:
            async with asyncio.TaskGroup() as group:  # if the group is cancelled or fails, its rows leave the engine
                for prompt, completion in rows:
                    num_tokens = len(prompt) + len(completion)
                    await self._reserve(num_tokens)
                    tasks.append(group.create_task(self._score_row(prompt, completion, adapter)))
                    tasks[-1].add_done_callback(partial(self._release, num_tokens))
        except ExceptionGroup as errors:
            if errors.subgroup(EngineDeadError) is None:
                raise
            # vLLM's own error is replaced, because the driver would have to import vLLM to receive it.
            raise ConnectionError(
                "The vLLM engine of the reference model died and is being replaced; send the rows again in a minute."
            ) from None
        logps = [task.result() for task in tasks]
        return [_without(spans, row) for spans, row in zip(others, logps, strict=True)] if others else logps

    def _check(self, index: int, prompt: list[int], completion: list[int]) -> None:
        config = self._engine.model_config
        num_tokens, limit, vocabulary = len(prompt) + len(completion), config.max_model_len, config.get_vocab_size()
        row = f"Row {index} of the request, counted from 0,"
        if not prompt or not completion:
            raise ValueError(
                f"{row} has {len(prompt)} prompt and {len(completion)} completion tokens; send at least one of each."
            )
        if num_tokens > limit:
            raise ValueError(
                f"{row} has {num_tokens} tokens, but the model takes at most {limit}; shorten or leave out the row."
            )
        if min(*prompt, *completion) < 0 or max(*prompt, *completion) >= vocabulary:
            raise ValueError(
                f"{row} has a token id outside the vocabulary of {vocabulary} tokens; use the model's own tokenizer."
            )

    async def _reserve(self, num_tokens: int) -> None:
        while self._tokens_in_flight and self._tokens_in_flight + num_tokens > self._max_tokens_in_flight:
            self._released.clear()
            await self._released.wait()
        self._tokens_in_flight += num_tokens

    def _release(self, num_tokens: int, _: asyncio.Task[list[float]]) -> None:
        self._tokens_in_flight -= num_tokens
        self._released.set()

    async def _score_row(self, prompt: list[int], completion: list[int], adapter: LoRARequest | None) -> list[float]:
        """Returns the log-probability of each token of one completion.

        vLLM reports the log-probabilities of a prompt's tokens, and must generate at least one token. Therefore the
        request to vLLM has all tokens but the completion's last one as its prompt, and a bias makes vLLM generate the
        last one. vLLM reports log-probabilities as they were before the bias. If all tokens were in the prompt, the
        request would have one token more.
        """
        *head, last = completion
        params = SamplingParams(
            max_tokens=1,
            temperature=0,
            logit_bias={last: CERTAIN},
            logprobs=0,
            prompt_logprobs=0 if head else None,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        tokens = tokens_input([*prompt, *head])
        (answer,) = [it async for it in self._engine.generate(tokens, params, uuid4().hex, lora_request=adapter)]
        (output,) = answer.outputs
        if output.finish_reason == "abort":
            raise ValueError("The model was deleted while it scored these rows.")
        assert list(output.token_ids) == [last]
        token_logps = answer.prompt_logprobs.logprobs[-len(head) :] if head else []
        return [*token_logps, output.cumulative_logprob]


def _without(spans: Spans, logps: list[float]) -> list[float]:
    for start, stop in reversed(spans):
        del logps[start:stop]
    return logps
