"""Has the models of a judge score groups, and turns their scores into rewards."""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError

from dpo_core.data.groups import Group
from services.contract import SCORE_TEXTS, SCORE_TOKENS, Scored, TextGroup, TextsToScore, TokensToScore
from services.control_plane.core.errors import ApiError
from services.control_plane.models.inference import Inference
from services.control_plane.models.models import NamedModel
from services.control_plane.rewards.judges import Judge
from services.control_plane.rewards.preferences import Judged, explicit, implicit


@dataclass(frozen=True)
class Judgement:
    """The completions of each group with their rewards, and the number of tokens that the models read."""

    groups: list[list[Judged]]
    num_tokens: int


async def judge_groups(inference: Inference, judge: Judge, groups: Sequence[Group]) -> Judgement:
    """Returns the rewards of the groups.

    The policy's application encodes the texts, as in training, and scores them. The reference scores the same token
    ids. It is asked for at once, so that both models load at the same time if there is room for both.
    """
    if judge.reference:
        await inference.want(judge.reference)
    texts = TextsToScore(groups=list(map(_on_wire, groups)), today=judge.today)
    scored = await _ask(inference, judge.model, SCORE_TEXTS, texts)
    num_tokens = _count(scored)
    if judge.reference is None or judge.beta is None:
        return Judgement(
            [
                [explicit(outputs, length) for outputs, length in zip(*rows, strict=True)]
                for rows in zip(scored.outputs, scored.num_tokens, strict=True)
            ],
            num_tokens,
        )
    tokens = TokensToScore(groups=scored.groups, vocabulary=scored.vocabulary)
    reference = await _ask(inference, judge.reference, SCORE_TOKENS, tokens)
    return Judgement(
        [
            [
                implicit(judge.beta, logp, reference_logp, length)
                for (logp,), (reference_logp,), length in zip(*rows, strict=True)
            ]
            for rows in zip(scored.outputs, reference.outputs, scored.num_tokens, strict=True)
        ],
        2 * num_tokens,
    )


def _on_wire(group: Group) -> TextGroup:
    return TextGroup(
        prompt=group.prompt,
        completions=group.completions,
        tools=group.tools,
        template_arguments=group.template_arguments,
    )


async def _ask(inference: Inference, model: NamedModel, path: str, body: BaseModel) -> Scored:
    answer = await inference.ask(model, path, body.model_dump_json().encode())
    try:
        return Scored.model_validate_json(answer)
    except ValidationError:  # JSON has no NaN
        message = f"The model '{model.id}' failed: its scores are no finite numbers. Its weights may be damaged."
        raise ApiError(message, code="model_error") from None


def _count(scored: Scored) -> int:
    """Returns the number of tokens that a model read. A policy reads a prompt once for each of its completions."""
    return sum(len(group.prompt_ids) + len(ids) for group in scored.groups for ids in group.completion_ids)
