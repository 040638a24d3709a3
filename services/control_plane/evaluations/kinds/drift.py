"""Measures how far a policy has moved from its reference model: the KL divergence, estimated on answers that are
sampled from the policy.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from sqlalchemy.ext.asyncio import AsyncSession

from dpo_core.data.groups import Group
from services.contract import Scored
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.evaluations import statistics
from services.control_plane.evaluations.kinds.asking import Models
from services.control_plane.evaluations.kinds.compare import answers_in_numbers
from services.control_plane.evaluations.kinds.judging import writer_of
from services.control_plane.evaluations.kinds.kind import Found
from services.control_plane.evaluations.requests import Spec
from services.control_plane.models.models import NamedModel
from services.control_plane.rewards.judges import judge_of
from services.control_plane.settings import Settings

ESTIMATOR = "k1: the mean of log pi(y|x) - log pi_ref(y|x) over samples y of pi, up to max_tokens"


@dataclass(frozen=True)
class Drift:
    """An evaluation of how far a policy has moved from its reference model. The object holds these two models."""

    spec: Spec
    model: NamedModel
    reference: NamedModel
    num_stages: ClassVar[int] = 2

    @property
    def resolved(self) -> dict[str, Any]:
        return {"reference": self.reference.id}

    async def work(self, stage: int, number: int, group: Group, found: Found, models: Models) -> Found:
        if stage == 0:
            answer, scored = await models.sample(self.model, group, self.spec.sampling, number)
            return {"answer": answer, "scored": scored.model_dump(mode="json")}
        policy = Scored.model_validate(found["scored"])
        reference = await models.scoring.score_tokens(self.reference, policy.groups, policy.vocabulary, models.meter_of)
        logp, reference_logp = policy.outputs[0][0][0], reference.outputs[0][0][0]
        num_tokens = len(policy.groups[0].completion_ids[0])
        figures = {"logp": logp, "reference_logp": reference_logp, "log_ratio": logp - reference_logp}
        return {"scored": None, "num_tokens": num_tokens, **figures}

    def summarize(self, items: Sequence[Found]) -> dict[str, Any]:
        log_ratios, lengths = ([float(item[name]) for item in items] for name in ("log_ratio", "num_tokens"))
        return {
            "kl_per_sequence": asdict(statistics.mean(log_ratios)),
            "kl_per_token": asdict(statistics.ratio(log_ratios, lengths)),
            "kl_estimator": ESTIMATOR,
            "answers": {"model": answers_in_numbers([item["answer"] for item in items])},
        }


async def of(session: AsyncSession, settings: Settings, spec: Spec) -> Drift:
    """Returns the policy and the reference model for the evaluation that `spec` describes. If `spec` names no reference
    model, takes the reference model of the job that trained the policy.

    Raises NotFound for a model that does not exist. Raises InvalidRequest if no reference model is known, or if the
    options in `spec.sampling` would change the policy's distribution.
    """
    model = await writer_of(session, settings, spec.model, param="model")
    if (spec.sampling.temperature, spec.sampling.top_p) != (1, 1):
        message = "Drift is measured on answers of the unchanged policy; leave 'temperature' and 'top_p' at 1."
        raise InvalidRequest(message, param="sampling")
    beta_is_unused = 1.0
    judge = await judge_of(session, settings, spec.model, reference=spec.reference, beta=beta_is_unused)
    assert judge.reference is not None  # the model is no reward model
    return Drift(spec, model, judge.reference)
