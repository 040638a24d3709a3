"""Evaluates which of two models answers better: a judge compares their answers to the same prompts.

If the judge is a model, it sees each pair of answers in both orders. A model that always prefers the answer that it
sees first therefore finds only ties. If the two compared models are swapped, a win rate of w becomes 1 - w.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, ClassVar

from sqlalchemy.ext.asyncio import AsyncSession

from dpo_core.data.groups import Group
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.evaluations import statistics
from services.control_plane.evaluations.kinds.asking import Models
from services.control_plane.evaluations.kinds.judging import Grader, Side, agreed, grader_of, writer_of
from services.control_plane.evaluations.kinds.kind import Found
from services.control_plane.evaluations.requests import Spec
from services.control_plane.evaluations.rows import labelled, text_of
from services.control_plane.models.models import NamedModel
from services.control_plane.settings import Settings

OUTCOMES: dict[Side, float] = {"first": 1.0, "second": 0.0, "neither": 0.5}
ANSWERS = {"model": "answer", "baseline": "baseline_answer"}


@dataclass(frozen=True)
class Compare:
    """A comparison of two models. The object holds the two models, which write answers, and the judge that compares the
    answers.
    """

    spec: Spec
    model: NamedModel
    baseline: NamedModel
    grader: Grader
    num_stages: ClassVar[int] = 3

    @property
    def resolved(self) -> dict[str, Any]:
        return {"baseline": self.baseline.id}

    async def work(self, stage: int, number: int, group: Group, found: Found, models: Models) -> Found:
        if stage == 0:
            return {"answer": await models.answer(self.model, group, self.spec.sampling, number)}
        if stage == 1:
            return {"baseline_answer": await models.answer(self.baseline, group, self.spec.sampling, number)}
        texts = [found[name]["text"] for name in ANSWERS.values()]
        verdicts = await self.grader.compare(models, group, *texts)
        pair = labelled(group)
        of_pair = await self.grader.compare(models, group, *map(text_of, pair)) if pair else None
        return {"verdicts": verdicts, "verdicts_on_labelled": of_pair}

    def summarize(self, items: Sequence[Found]) -> dict[str, Any]:
        verdicts = [agreed(item["verdicts"]) for item in items]
        outcomes = [OUTCOMES[verdict] for verdict in verdicts]
        lengths = {side: [len(item[name]["text"]) for item in items] for side, name in ANSWERS.items()}
        differences = [float(one - other) for one, other in zip(lengths["model"], lengths["baseline"], strict=True)]
        both_orders = [item["verdicts"] for item in items if len(item["verdicts"]) == 2]
        on_labelled = [agreed(item["verdicts_on_labelled"]) for item in items if item["verdicts_on_labelled"]]
        agreement = statistics.wilson(on_labelled.count("first"), len(on_labelled)) if on_labelled else None
        return {
            "win_rate": asdict(statistics.mean(outcomes)),
            "length_controlled_win_rate": asdict(statistics.length_controlled_rate(outcomes, differences)),
            "num_wins": verdicts.count("first"),
            "num_losses": verdicts.count("second"),
            "num_ties": verdicts.count("neither"),
            "order_disagreement": fmean(one != other for one, other in both_orders) if both_orders else None,
            "agreement": agreement and asdict(agreement),
            "num_labelled": len(on_labelled),
            "answers": {side: answers_in_numbers([item[name] for item in items]) for side, name in ANSWERS.items()},
        }


def answers_in_numbers(answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns figures about a model's answers, of which there is at least one.

    - `mean_characters` and `mean_tokens` are the mean lengths.
    - `repetition` is the mean share of an answer's four-word sequences that occurred earlier in the same answer.
    - `unfinished` is the share of answers that were cut off at the largest number of tokens.
    """
    return {
        "mean_characters": fmean(len(answer["text"]) for answer in answers),
        "mean_tokens": fmean(answer["num_tokens"] for answer in answers),
        "repetition": fmean(statistics.repetition(answer["text"]) for answer in answers),
        "unfinished": fmean(not answer["is_finished"] for answer in answers),
    }


async def of(session: AsyncSession, settings: Settings, spec: Spec) -> Compare:
    """Returns the two models and the judge of the comparison that `spec` describes.

    Raises NotFound for a model that does not exist, and InvalidRequest for one that cannot be compared.
    """
    model = await writer_of(session, settings, spec.model, param="model")
    if spec.baseline is None and model.job_id is None:
        message = f"'{model.id}' is a base model; name the model to compare it with in 'baseline'."
        raise InvalidRequest(message, param="baseline", code="missing_required_parameter")
    baseline = await writer_of(session, settings, spec.baseline or model.root, param="baseline")
    if baseline.id == model.id:
        message = f"The fields 'model' and 'baseline' are both '{model.id}'; name two models."
        raise InvalidRequest(message, param="baseline")
    assert spec.judge is not None
    return Compare(spec, model, baseline, await grader_of(session, settings, spec.judge, of=model.id))
