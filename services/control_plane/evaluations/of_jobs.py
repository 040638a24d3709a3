"""Reads and checks the field `x_raydpo.evaluations` of a request for a job: the evaluations that the job asks for, by
their names.
"""

from collections.abc import Mapping
from typing import Any, Literal

from sqlalchemy.ext.asyncio import AsyncSession

from dpo_core.options import Objective
from services.contract import JobSpec
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.core.store import ProjectStore
from services.control_plane.evaluations import api as evaluations_api
from services.control_plane.evaluations import planned, rows
from services.control_plane.evaluations.requests import CreateEvaluation
from services.control_plane.files import files
from services.control_plane.http.validation import parse, within
from services.control_plane.models import models
from services.control_plane.rewards.judges import check_implicit
from services.control_plane.settings import Settings

WHERE = "x_raydpo.evaluations"
Of: Any = Literal["policy", "checkpoints"]  # the models of a job that an evaluation is made of


def evaluations_of(given: object, model: str) -> dict[str, dict[str, Any]]:
    """Returns the evaluations that a job asks for, as they are stored, by their names. `given` is the field of the
    request, and `model` the model that the job starts from, which comparisons have as their default baseline.

    Each is the body of POST /v1/x/evaluations without `model`, and `of`: whether the job's policy is evaluated, or all
    its checkpoints. Raises InvalidRequest, which names the invalid field.
    """
    if given is None:
        return {}
    asked = {name: dict(body) for name, body in parse(planned.Named, given, WHERE).items()}
    chosen = {name: parse(Of, body.pop("of", "policy"), f"{WHERE}.{name}.of") for name, body in asked.items()}
    for name, body in asked.items():
        if "rows" in body:
            where = f"{WHERE}.{name}.rows"
            message = f"{where} cannot be given for a job; upload the prompts as a file, and name it in 'file'."
            raise InvalidRequest(message, param=where)
    found = {}
    for name, request in planned.bodies(asked, model, WHERE).items():
        baseline = {"baseline": model} if request.kind == "compare" and request.baseline is None else {}
        told = request.model_dump(mode="json", exclude={"model"}, exclude_unset=True, exclude_none=True)
        found[name] = told | baseline | {"of": chosen[name]}
    return found


def body_of(evaluation: Mapping[str, Any], model: str) -> CreateEvaluation:
    """Returns the request for the evaluation of `model` that a job asked for. `evaluation` is the stored form."""
    body = {key: value for key, value in evaluation.items() if key != "of"} | {"model": model}
    return CreateEvaluation.model_validate(body, extra="ignore")


async def rows_of(store: ProjectStore, body: CreateEvaluation) -> list[dict[str, Any]]:
    """Returns the rows (prompts with completions) of the evaluation's file, as they are stored with an evaluation.
    Raises InvalidRequest if they cannot be used.
    """
    groups = await evaluations_api.groups_of(store, body)
    evaluations_api.check(body, groups)
    return rows.to_json(groups)


async def check_rows(store: ProjectStore, spec: JobSpec, *, local_files: bool = False) -> None:
    """Reads the files of rows on which the evaluations that the job asks for are to run. Raises InvalidRequest if the
    rows of such a file do not suit its evaluation.

    If `local_files`, does not read files that are still on the user's machine.
    """
    for name, evaluation in spec.evaluations.items():
        body = body_of(evaluation, spec.model)
        if local_files and not str(body.file).startswith("file-"):
            continue
        with within(f"{WHERE}.{name}"):
            await rows_of(store, body)


async def check(session: AsyncSession, settings: Settings, spec: JobSpec, *, local_files: bool = False) -> None:
    """Raises an ApiError if an evaluation that the job asks for does not suit the models that the job trains, or names
    a model or a file that cannot be used. Locks the models and files against deletion until the transaction ends.

    If `local_files`, does not look at files that are still on the user's machine.
    """
    planned_ones = {name: body_of(each, spec.model) for name, each in spec.evaluations.items()}
    for name, body in planned_ones.items():
        with within(f"{WHERE}.{name}"):
            _check_objective(spec.config.objective, body)
            assert body.file is not None
            if not local_files or body.file.startswith("file-"):
                await files.find_checked(session, body.file, param="file")
    if not spec.config.objective.traits.num_outputs:
        await planned.check_models(session, settings, planned_ones, WHERE)
        await models.hold(session, settings, set[str]().union(*(body.models for body in planned_ones.values())))


def _check_objective(objective: Objective, body: CreateEvaluation) -> None:
    """Raises InvalidRequest if models that are trained with this objective cannot be evaluated as `body` says."""
    if objective.traits.num_outputs:
        if body.kind != "preferences":
            message = f"The method '{objective.type}' trains a reward model, which writes no answers"
            raise InvalidRequest(f"{message}; evaluate it with the kind 'preferences'.", param="kind")
        for name in ("reference", "beta"):
            if getattr(body, name) is not None:
                message = f"A reward model is evaluated without {name}; leave the field '{name}' out."
                raise InvalidRequest(message, param=name)
        return
    policy = "the policy of this job"
    if body.kind == "preferences":
        check_implicit(policy, objective, reference=body.reference, beta=body.beta)
    elif body.kind == "drift":
        beta_is_unused = 1.0
        check_implicit(policy, objective, reference=body.reference, beta=beta_is_unused)
    elif body.judge is not None and planned.is_own_judge(body):
        with within("judge"):
            check_implicit(policy, objective, reference=body.judge.reference, beta=body.judge.beta)
