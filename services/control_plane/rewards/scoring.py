"""Sends groups (prompts with their completions) to the models that score them, and computes rewards from the scores."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cachetools import TTLCache
from pydantic import ValidationError

from dpo_core.data.groups import Group
from services.contract import SCORE_TEXTS, SCORE_TOKENS, Scored, TextGroup, TextsToScore, TokensToScore
from services.control_plane.core.errors import ApiError
from services.control_plane.inference.inference import Inference
from services.control_plane.inference.metering import Meter
from services.control_plane.models.models import NamedModel
from services.control_plane.rewards.judges import Judge
from services.control_plane.rewards.preferences import Judged, explicit, implicit

MOST_KEPT_BYTES, KEPT_SECONDS = 2**26, 1800.0  # of policies' scores


@dataclass(frozen=True)
class Judgement:
    """The rewards of the completions of each group, and the number of tokens that the models read."""

    groups: list[list[Judged]]
    num_tokens: int


class Scoring:
    """Computes the rewards of groups (prompts with their completions) with the models that score them.

    Keeps a policy's scores until its reference model has scored as well. A request is repeated while the reference
    model loads. Thanks to the scores, the repeated request does not need the policy again, which may have been unloaded
    to make room.
    """

    def __init__(self, inference: Inference) -> None:
        self._inference = inference
        self._kept: TTLCache[tuple[str, bytes], bytes] = TTLCache(MOST_KEPT_BYTES, KEPT_SECONDS, getsizeof=len)

    async def judge(self, judge: Judge, groups: Sequence[Group], meter_of: Callable[[str], Meter]) -> Judgement:
        """Returns the rewards of the groups by the models of `judge`. `meter_of` returns, for a model's id, the meter
        that counts its tokens.

        The policy's engine encodes the texts, as in training, and scores them. The reference model scores the same
        token ids. It is requested at the start, so that both models load at the same time if there is room for both.
        """
        texts = TextsToScore(groups=list(map(_on_wire, groups)), today=judge.today).model_dump_json().encode()
        if judge.reference is None or judge.beta is None:
            scored = _read(judge.model, await self._ask(judge.model, SCORE_TEXTS, texts, meter_of))
            return Judgement(_explicit(scored), _count(scored))
        await self._inference.want(judge.reference)
        key = judge.model.app_name, hashlib.sha256(texts).digest()
        answer = self._kept.get(key) or await self._ask(judge.model, SCORE_TEXTS, texts, meter_of)
        if len(answer) < MOST_KEPT_BYTES:
            self._kept[key] = answer
        scored = _read(judge.model, answer)
        tokens = TokensToScore(groups=scored.groups, vocabulary=scored.vocabulary).model_dump_json().encode()
        reference = _read(judge.reference, await self._ask(judge.reference, SCORE_TOKENS, tokens, meter_of))
        self._kept.pop(key, None)
        return Judgement(_implicit(judge.beta, scored, reference), _count(scored) + _count(reference))

    async def _ask(self, model: NamedModel, path: str, body: bytes, meter_of: Callable[[str], Meter]) -> bytes:
        return await self._inference.ask(model, path, body, meter_of(model.id))


def _count(scored: Scored) -> int:
    return scored.usage["prompt_tokens"]


def _explicit(scored: Scored) -> list[list[Judged]]:
    return [
        [explicit(outputs, length) for outputs, length in zip(*row, strict=True)]
        for row in zip(scored.outputs, scored.num_tokens, strict=True)
    ]


def _implicit(beta: float, policy: Scored, reference: Scored) -> list[list[Judged]]:
    return [
        [implicit(beta, logp, reference_logp, length) for (logp,), (reference_logp,), length in zip(*row, strict=True)]
        for row in zip(policy.outputs, reference.outputs, policy.num_tokens, strict=True)
    ]


def _on_wire(group: Group) -> TextGroup:
    return TextGroup(
        prompt=group.prompt,
        completions=group.completions,
        tools=group.tools,
        template_arguments=group.template_arguments,
    )


def _read(model: NamedModel, answer: bytes) -> Scored:
    try:
        return Scored.model_validate_json(answer)
    except ValidationError:  # JSON has no NaN
        message = (
            f"The model '{model.id}' returned scores that are not finite numbers. Its weights may be damaged; "
            "use another checkpoint."
        )
        raise ApiError(message, code="model_error") from None
