"""Finds the models that score the completions of a request: a policy and its reference model, or a reward model."""

from dataclasses import dataclass
from datetime import date
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from dpo_core.options import Mpo, Objective, Supervised
from services.contract import JobSpec
from services.control_plane.core.errors import InvalidRequest, NotFound
from services.control_plane.core.tables import Job
from services.control_plane.models import models
from services.control_plane.models.models import NamedModel
from services.control_plane.settings import Settings


@dataclass(frozen=True)
class Judge:
    """The models that score completions (compute their rewards): a policy with its reference model and beta, or a
    reward model alone."""

    model: NamedModel
    reference: NamedModel | None = None
    beta: float | None = None
    today: date | None = None  # the day that chat templates write, as in training; None: the current day


async def judge_of(
    session: AsyncSession, settings: Settings, name: str, *, reference: str | None, beta: float | None
) -> Judge:
    """Returns the models that score completions for a request that names the model `name`.

    For a policy, `reference` and `beta` are the request's choices. If they are None, the reference model and beta of
    the job that trained the policy are used. Raises InvalidRequest if the reference model or beta remains unknown, if
    the request gives one of them for a reward model, or if the reference model is a reward model.
    """
    model = await models.find(session, settings, name)
    job = await _job_of(session, model)
    today = job.created_at.date() if job else None
    if model.num_outputs:
        for param, given in (("reference", reference), ("beta", beta)):
            if given is not None:
                message = (
                    f"The model '{name}' is a reward model, which takes no {param}; leave the field '{param}' out."
                )
                raise InvalidRequest(message, param=param)
        return Judge(model, today=today)
    objective = job and JobSpec.model_validate(job.spec).config.objective
    if beta is None:
        beta = _beta(name, objective)
    if reference is None:
        found = await _reference_of_job(session, settings, name, objective, job)
    else:
        found = await models.find(session, settings, reference, param="reference")
    if found.num_outputs:
        raise InvalidRequest(
            f"The model '{found.id}' is a reward model; set the field 'reference' to a policy or a base model.",
            param="reference",
        )
    return Judge(model, found, beta, today)


async def _job_of(session: AsyncSession, model: NamedModel) -> Any:
    """Returns the row of the job that trained the model, even if the job belongs to another project that shares the
    model.

    Returns None for a base model.
    """
    jobs = Job.__table__
    return (await session.execute(select(jobs).where(jobs.c.id == model.job_id))).first()


def _beta(name: str, objective: Objective | None) -> float:
    if isinstance(objective, Mpo):  # the first objective that learns preferences counts, as in the trainer's metrics
        objective = next(part for part in objective.objectives if not isinstance(part, Supervised))
    if objective is None or not _compares(objective):
        why = _why_unknown(name, objective, "beta")
        raise InvalidRequest(f"{why}; give 'beta'.", param="beta", code="missing_required_parameter")
    return float(vars(objective)["beta"])


def _compares(objective: Objective) -> bool:
    """Whether the reward of the objective (training method) is beta times the log-ratio of policy and reference
    model."""
    return objective.traits.needs_reference and objective.traits.reward == "logratios"


def _why_unknown(name: str, objective: Objective | None, what: str) -> str:
    if objective is None:
        return f"'{name}' is a base model, which has no {what}"
    return f"'{name}' was trained by {objective.type}, whose rewards are no log-ratios, so its {what} is not known"


def check_implicit(name: str, objective: Objective, *, reference: str | None, beta: float | None) -> None:
    """Checks that a policy will have an implicit reward if it is trained with this objective (training method). An
    implicit reward needs a reference model and a beta. `name` is the name of the policy, for error messages.

    `reference` and `beta` are the request's choices. If one of them is None, the training provides it; raises
    InvalidRequest if training with this objective uses no reference model or no suitable beta.
    """
    if reference is None:
        _check_reference(name, objective)
    if beta is None:
        _beta(name, objective)


def _check_reference(name: str, objective: Objective | None) -> None:
    if objective is None or not objective.traits.needs_reference:
        why = _why_unknown(name, objective, "reference")
        raise InvalidRequest(
            f"{why}; name a model in 'reference'.", param="reference", code="missing_required_parameter"
        )


async def _reference_of_job(
    session: AsyncSession, settings: Settings, name: str, objective: Objective | None, job: Any
) -> NamedModel:
    _check_reference(name, objective)
    reference = models.reference_of(job)
    if not reference.id.startswith("ft:"):
        return reference
    try:
        return await models.find(session, settings, reference.id)
    except NotFound:
        message = f"The reference of '{name}' was deleted, or is not shared with this project"
        remedy = "name another model in 'reference'."
        raise NotFound(f"{message}; {remedy}", param="reference", code="model_not_found") from None
