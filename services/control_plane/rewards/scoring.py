"""Scores groups (prompts with their completions) with models, and computes the rewards of the completions from the
scores.

A policy and its reference model score a completion with its log-probability, a reward model with its outputs.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date

from cachetools import TTLCache
from pydantic import ValidationError

from dpo_core.data.groups import Group
from services.contract import SCORE_TEXTS, SCORE_TOKENS, Scored, TextGroup, TextsToScore, TokenGroup, TokensToScore
from services.control_plane.core.errors import ApiError
from services.control_plane.inference.inference import Inference
from services.control_plane.inference.metering import Meter
from services.control_plane.models.models import NamedModel
from services.control_plane.rewards.judges import Judge
from services.control_plane.rewards.preferences import Judged, explicit, implicit

MOST_KEPT_BYTES, KEPT_SECONDS = 2**26, 1800.0  # of policies' scores


@dataclass(frozen=True)
class Judgement:
    """The rewards of the completions of each group, and the number of tokens that the models read. A group is a prompt
    with its completions.
    """

    groups: list[list[Judged]]
    num_tokens: int


class Scoring:
    """Computes the rewards of groups (prompts with their completions) with the models that score them.

    If the reference model still loads when a request comes, the client must repeat the request. Until then, the
    log-probabilities that the policy has computed are kept. So the policy need not be loaded again if it was unloaded
    to make room.
    """

    def __init__(self, inference: Inference) -> None:
        self._inference = inference
        self._kept: TTLCache[tuple[str, bytes], bytes] = TTLCache(MOST_KEPT_BYTES, KEPT_SECONDS, getsizeof=len)

    async def judge(self, judge: Judge, groups: Sequence[Group], meter_of: Callable[[str], Meter]) -> Judgement:
        """Returns the rewards that the models of `judge` give to the completions of the groups (prompts with
        completions).

        The engine (model server) of a policy encodes the texts, as in training, and computes their log-probabilities.
        The reference model then gets the same token ids. The reference model is requested at the start, so that both
        models load at the same time if there is room for both. `meter_of` returns, for a model's id, the meter that
        counts the model's tokens.
        """
        if judge.reference is None or judge.beta is None:
            scored = await self.score_texts(judge.model, groups, meter_of, today=judge.today)
            return Judgement(explicit_rewards(scored), _count(scored))
        await self._inference.want(judge.reference)
        texts = _texts(groups, judge.today)
        key = judge.model.app_name, hashlib.sha256(texts).digest()
        answer = self._kept.get(key) or await self._ask(judge.model, SCORE_TEXTS, texts, meter_of)
        if len(answer) < MOST_KEPT_BYTES:
            self._kept[key] = answer
        scored = _read(judge.model, answer)
        reference = await self.score_tokens(judge.reference, scored.groups, scored.vocabulary, meter_of)
        self._kept.pop(key, None)
        return Judgement(implicit_rewards(judge.beta, scored, reference), _count(scored) + _count(reference))

    async def score_texts(
        self, model: NamedModel, groups: Sequence[Group], meter_of: Callable[[str], Meter], *, today: date | None
    ) -> Scored:
        """Sends the groups (prompts with their completions) as texts to the model, and returns the log-probabilities of
        the completions or, for a reward model, its outputs.

        `today` is the date that some chat templates write into the prompt; None means the current date. `meter_of`
        returns, for the model's id, the meter that counts its tokens.
        """
        return _read(model, await self._ask(model, SCORE_TEXTS, _texts(groups, today), meter_of))

    async def score_tokens(
        self, model: NamedModel, groups: Sequence[TokenGroup], vocabulary: str, meter_of: Callable[[str], Meter]
    ) -> Scored:
        """Sends the groups (prompts with their completions), as token ids, to the model. Returns the log-probabilities
        of the completions.

        `vocabulary` is the digest of the vocabulary to which the token ids belong. Raises InvalidRequest if the model
        has another vocabulary. `meter_of` returns, for the model's id, the meter that counts its tokens.
        """
        tokens = TokensToScore(groups=list(groups), vocabulary=vocabulary).model_dump_json().encode()
        return _read(model, await self._ask(model, SCORE_TOKENS, tokens, meter_of))

    async def _ask(self, model: NamedModel, path: str, body: bytes, meter_of: Callable[[str], Meter]) -> bytes:
        return await self._inference.ask(model, path, body, meter_of(model.id))


def _count(scored: Scored) -> int:
    return scored.usage["prompt_tokens"]


def explicit_rewards(scored: Scored) -> list[list[Judged]]:
    """Returns the reward of each completion of each group (prompt with its completions), from the outputs of a reward
    model, which are in `scored`.
    """
    return [
        [explicit(outputs, length) for outputs, length in zip(*row, strict=True)]
        for row in zip(scored.outputs, scored.num_tokens, strict=True)
    ]


def implicit_rewards(beta: float, policy: Scored, reference: Scored) -> list[list[Judged]]:
    """Returns the reward of each completion of each group (prompt with its completions), from `beta` and the
    log-probabilities of a policy and its reference model.
    """
    return [
        [implicit(beta, logp, reference_logp, length) for (logp,), (reference_logp,), length in zip(*row, strict=True)]
        for row in zip(policy.outputs, reference.outputs, policy.num_tokens, strict=True)
    ]


def _texts(groups: Sequence[Group], today: date | None) -> bytes:
    return TextsToScore(groups=list(map(_on_wire, groups)), today=today).model_dump_json().encode()


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
