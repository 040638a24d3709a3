"""Evaluates how good a model's answers are: a reward model, the implicit reward of a policy, or a rule gives each
answer a score, or a model that is asked gives each a grade from 1 to 10.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from sqlalchemy.ext.asyncio import AsyncSession

from dpo_core.data.groups import Group
from services.control_plane.evaluations import statistics
from services.control_plane.evaluations.kinds.asking import Models
from services.control_plane.evaluations.kinds.compare import answers_in_numbers
from services.control_plane.evaluations.kinds.judging import Grader, grader_of, writer_of
from services.control_plane.evaluations.kinds.kind import Found
from services.control_plane.evaluations.requests import Spec
from services.control_plane.models.models import NamedModel
from services.control_plane.settings import Settings


@dataclass(frozen=True)
class Score:
    """An evaluation of how good a model's answers are. The object holds the model that writes the answers, and the
    judge that scores them.
    """

    spec: Spec
    model: NamedModel
    grader: Grader
    num_stages: ClassVar[int] = 2

    @property
    def resolved(self) -> dict[str, Any]:
        return {}

    async def work(self, stage: int, number: int, group: Group, found: Found, models: Models) -> Found:
        if stage == 0:
            return {"answer": await models.answer(self.model, group, self.spec.sampling, number)}
        return {"score": await self.grader.score(models, group, found["answer"]["text"])}

    def summarize(self, items: Sequence[Found]) -> dict[str, Any]:
        return {
            "score": asdict(statistics.mean([item["score"] for item in items])),
            "answers": {"model": answers_in_numbers([item["answer"] for item in items])},
        }


async def of(session: AsyncSession, settings: Settings, spec: Spec) -> Score:
    """Returns the model and the judge of its answers that `spec` describes.

    Raises NotFound for a model that does not exist, and InvalidRequest for one that cannot write answers or judge.
    """
    model = await writer_of(session, settings, spec.model, param="model")
    assert spec.judge is not None
    return Score(spec, model, await grader_of(session, settings, spec.judge, of=model.id))
