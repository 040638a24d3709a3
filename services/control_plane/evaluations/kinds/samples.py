"""Samples several answers of a model to each prompt, and scores each answer.

The results show how good the best answers are, and how much the answers to a prompt differ. The service uses such
samples as training data when a user asks it to improve a policy in rounds (repeated training on the policy's own
answers).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from dpo_core.data.groups import Group
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.evaluations import statistics
from services.control_plane.evaluations.kinds import rewarding
from services.control_plane.evaluations.kinds.asking import Models
from services.control_plane.evaluations.kinds.compare import OUTCOMES, answers_in_numbers
from services.control_plane.evaluations.kinds.judging import Grader, agreed, answered, grader_of, together, writer_of
from services.control_plane.evaluations.kinds.kind import Found
from services.control_plane.evaluations.requests import MOST_SAMPLES_TO_COMPARE, Spec
from services.control_plane.models.models import NamedModel
from services.control_plane.settings import Settings

NUM_SAMPLES = 4


@dataclass(frozen=True)
class Samples:
    """An evaluation of several answers to each prompt. The object holds the model that writes the answers, and the
    judge that scores them.
    """

    spec: Spec
    model: NamedModel
    grader: Grader

    @property
    def num_stages(self) -> int:
        judge = self.grader.rewarding
        return 1 + (1 if judge is None else rewarding.num_stages(judge))

    @property
    def num_samples(self) -> int:
        return self.spec.num_samples or NUM_SAMPLES

    @property
    def resolved(self) -> dict[str, Any]:
        return {"num_samples": self.num_samples}

    async def work(self, stage: int, number: int, group: Group, found: Found, models: Models) -> Found:
        if stage == 0:
            return {"answers": await models.answers(self.model, group, self.spec.sampling, number, self.num_samples)}
        texts = [answer["text"] for answer in found["answers"]]
        if self.grader.is_asked:
            return {"scores": await self._compare(models, group, texts)}
        if self.grader.rewarding is None:
            return {"scores": [self.grader.score_by_rule(group, text) for text in texts]}
        kept, rewards = await rewarding.reward(self.grader.rewarding, stage - 1, answered(group, texts), found, models)
        return kept if rewards is None else kept | {"scores": [each.reward for each in rewards]}

    async def _compare(self, models: Models, group: Group, texts: Sequence[str]) -> list[float]:
        """Returns the score of each text in `texts`, which are answers to the prompt of `group` (a prompt with
        completions). The score is the share of comparisons with the other texts that the text wins. A tie counts as
        half a win.

        The judge compares every pair of different texts, in both orders. Equal texts count as a tie.
        """
        pairs = list(combinations(range(len(texts)), 2))
        different = [(i, j) for i, j in pairs if texts[i] != texts[j]]
        verdicts = await together(self.grader.compare(models, group, texts[i], texts[j]) for i, j in different)
        won = dict(zip(different, (OUTCOMES[agreed(each)] for each in verdicts), strict=True))
        wins = [0.0] * len(texts)
        for i, j in pairs:
            outcome = won.get((i, j), 0.5)
            wins[i] += outcome
            wins[j] += 1 - outcome
        return [each / (len(texts) - 1) for each in wins]

    def summarize(self, items: Sequence[Found]) -> dict[str, Any]:
        scores = [item["scores"] for item in items]
        answers = [answer for item in items for answer in item["answers"]]
        told: dict[str, Any] = {
            "ties": fmean(len(set(each)) == 1 for each in scores),
            "distinct": fmean(len({answer["text"] for answer in item["answers"]}) for item in items),
            "answers": {"model": answers_in_numbers(answers)},
        }
        if self.grader.is_asked:  # shares of wins, whose mean is always one half
            return told
        of_each = {"score": list(map(fmean, scores)), "best": list(map(max, scores)), "worst": list(map(min, scores))}
        return {name: asdict(statistics.mean(values)) for name, values in of_each.items()} | told


async def of(session: AsyncSession, settings: Settings, spec: Spec) -> Samples:
    """Returns the model and the judge of its answers that `spec` describes.

    Raises NotFound for a model that does not exist, and InvalidRequest for more samples than can be compared.
    """
    model = await writer_of(session, settings, spec.model, param="model")
    assert spec.judge is not None
    samples = Samples(spec, model, await grader_of(session, settings, spec.judge, of=model.id))
    if samples.grader.is_asked and samples.num_samples > MOST_SAMPLES_TO_COMPARE:
        message = (
            f"num_samples is {samples.num_samples}, but the judge '{spec.judge.model}' compares each two answers; take "
            f"at most {MOST_SAMPLES_TO_COMPARE} samples, or name a reward model in 'judge'."
        )
        raise InvalidRequest(message, param="num_samples")
    return samples
