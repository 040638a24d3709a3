"""Checks evaluations of policies that do not exist yet. A job or a sweep names such evaluations when it is created."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, StringConstraints
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.errors import InvalidRequest
from services.control_plane.evaluations.kinds.judging import grader_of, writer_of
from services.control_plane.evaluations.requests import CreateEvaluation
from services.control_plane.evaluations.work import kind_of
from services.control_plane.http.validation import parse, within
from services.control_plane.settings import Settings

MOST_EVALUATIONS = 8  # the most evaluations that a job or a sweep can name
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,32}$")]
Named = Annotated[dict[Name, dict[str, Any]], Field(max_length=MOST_EVALUATIONS)]


def bodies(given: Mapping[str, Mapping[str, Any]], model: str, where: str) -> dict[str, CreateEvaluation]:
    """Returns planned evaluations as requests for evaluations of `model`, by their names.

    `given` holds the bodies of POST /v1/x/evaluations without `model`, and `where` is the path of `given` in the
    request. Raises InvalidRequest, which names the field, if one of them is not a valid request.
    """
    found = {}
    for name, body in given.items():
        path = f"{where}.{name}"
        if "model" in body:
            message = f"{path}.model cannot be given: the policy that will be trained is evaluated. Leave it out."
            raise InvalidRequest(message, param=f"{path}.model", code="unknown_parameter")
        found[name] = parse(CreateEvaluation, {**body, "model": model or "policy"}, path)
        with within(path):
            found[name].check()
    return found


async def check_models(
    session: AsyncSession, settings: Settings, planned: Mapping[str, CreateEvaluation], where: str
) -> None:
    """Raises an ApiError if a model that a planned evaluation needs does not exist or cannot be used in it.

    The policies do not exist yet, so the model that the job starts from takes their place; the bodies in `planned` name
    this model. If a policy's own implicit reward judges its answers, this judge is not checked. `where` is the path of
    the evaluations in the request.
    """
    for name, body in planned.items():
        with within(f"{where}.{name}"):
            if body.kind == "compare":
                if body.baseline is not None:
                    await writer_of(session, settings, body.baseline, param="baseline")
                if not is_own_judge(body):
                    assert body.judge is not None
                    await grader_of(session, settings, body.judge, of=body.model)
            elif not is_own_judge(body):
                given: dict[str, Any] = {"reference": body.reference or body.model} if body.judge is None else {}
                given |= {"beta": body.beta or 1.0} if body.kind == "preferences" else {}
                await kind_of(session, settings, body.model_copy(update=given))


def is_own_judge(body: CreateEvaluation) -> bool:
    """Whether the evaluation judges the policy's answers by the policy's own implicit reward.

    Such a judge cannot be checked before the policy exists, because its reference model and beta are those of the
    policy's job.
    """
    return body.judge is not None and body.judge.type == "implicit" and body.judge.model is None
