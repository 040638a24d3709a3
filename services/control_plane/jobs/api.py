"""/v1/fine_tuning/jobs"""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from dpo_core.options import Objective
from services import tracing
from services.contract import MIN_EXAMPLES, JobSpec
from services.control_plane.auth.keys import Caller
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.core.responses import listing
from services.control_plane.core.store import page
from services.control_plane.core.tables import Checkpoint, Event, File, Job, reading_of
from services.control_plane.files import files
from services.control_plane.http.dependencies import (
    CallerPart,
    IdempotentPart,
    Limit,
    SettingsPart,
    StorePart,
)
from services.control_plane.http.idempotency import IdempotentRequest
from services.control_plane.jobs import jobs, weights
from services.control_plane.jobs.lookups import JobReader
from services.control_plane.jobs.requests import CreateJob
from services.control_plane.jobs.responses import checkpoint_object, event_object, job_object
from services.control_plane.models import models
from services.control_plane.models.models import NamedModel
from services.control_plane.settings import Settings
from services.control_plane.tenants import quotas

router = APIRouter(prefix="/fine_tuning/jobs")


async def _job_reader(request: Request) -> JobReader:
    return cast(JobReader, request.app.state.job_reader)


JobReaderPart = Annotated[JobReader, Depends(_job_reader)]


@router.post("")
async def create(idempotent: IdempotentPart, caller: CallerPart, settings: SettingsPart, body: CreateJob) -> Response:
    spec, asked = body.spec(), body.weights()
    if spec.is_at_uri:
        await files.check_uri(spec.training_file, settings)

    async def submit(session: AsyncSession) -> dict[str, Any]:
        model = await models.find(session, settings, spec.model)
        weights.check_start(spec, model)
        reference = await _reference(session, spec, model, settings)
        decided = spec.model_copy(update={"weights": weights.decide(asked, model, settings)})
        checked = await _check_files(session, decided)
        await quotas.admit_job(session)
        return job_object(await jobs.submit(session, checked, model, reference, caller.key_id), settings)

    with tracing.span("submit job"):
        return await idempotent.act(submit)


async def _reference(session: AsyncSession, spec: JobSpec, start: NamedModel, settings: Settings) -> NamedModel | None:
    if spec.reference_model is None:
        return start if spec.config.objective.traits.needs_reference else None
    reference = await models.find(session, settings, spec.reference_model, param="x_raydpo.reference.model")
    weights.check_reference(spec, reference)
    return reference


async def _check_files(session: AsyncSession, spec: JobSpec) -> JobSpec:
    """The spec, with how an uploaded training file is read."""
    if not spec.is_at_uri:
        file = await files.find_checked(session, spec.training_file, param="training_file")
        _check_file(file, spec.config.objective, "training_file")
        _check_size(file)
        spec = spec.model_copy(update=dict(reading_of(file)))
    if spec.validation_file:
        held_out = await files.find_checked(session, spec.validation_file, param="validation_file")
        _check_file(held_out, spec.config.objective, "validation_file")
    return spec


def _check_file(file: File, objective: Objective, param: str) -> None:
    """An upload's rows must be of the kind that the objective learns from; a job checks a URI's."""
    code, report = f"invalid_{param}", file.report
    assert report is not None
    learns_from = objective.traits.learns_from
    if report["kind"] not in learns_from:
        kinds = " or ".join(learns_from)
        message = f"{file.id} holds {report['kind']}; method '{objective.type}' learns from {kinds}."
        raise InvalidRequest(message, param=param, code=code)
    if report.get("num_margins") and not objective.traits.takes_margins:
        message = f"{file.id} has margins; method '{objective.type}' takes none. Remove them, or use dpo."
        raise InvalidRequest(message, param=param, code=code)


def _check_size(file: File) -> None:
    if file.report and file.report["num_rows"] < MIN_EXAMPLES:
        rows = file.report["num_rows"]
        message = f"Training file has {rows} example(s), but must have at least {MIN_EXAMPLES} examples"
        raise InvalidRequest(message, param="training_file", code="invalid_n_examples")


@router.get("")
async def list_jobs(
    request: Request,
    store: StorePart,
    settings: SettingsPart,
    after: str | None = None,
    limit: Limit = 20,
    metadata: Literal["null"] | None = None,
) -> dict[str, Any]:
    """Newest first; `metadata[k]=v` keeps the jobs that carry it, `metadata=null` those that carry none."""
    query = select(Job)
    if metadata:
        query = query.where(Job.spec["metadata"].astext.is_(None))
    for name, value in request.query_params.multi_items():
        if name.startswith("metadata["):
            query = query.where(Job.spec["metadata"][name[9:].removesuffix("]")].astext == value)
    async with store.look() as session:
        keys = [Job.created_at, Job.id]
        rows, more = await page(session, query, keys, after=after, limit=limit)
    return listing([job_object(row, settings) for row in rows], more)


@router.get("/{job_id}")
async def retrieve(reader: JobReaderPart, caller: CallerPart, settings: SettingsPart, job_id: str) -> dict[str, Any]:
    return job_object(await reader.job(caller.project_id, job_id), settings)


async def _wish(
    wish: Callable[[AsyncSession, str, str], Awaitable[Job]],
    idempotent: IdempotentRequest,
    caller: Caller,
    settings: Settings,
    job_id: str,
) -> Response:
    async def act(session: AsyncSession) -> dict[str, Any]:
        return job_object(await wish(session, job_id, caller.key_id), settings)

    return await idempotent.act(act, changes=job_id)


@router.post("/{job_id}/cancel")
async def cancel(idempotent: IdempotentPart, caller: CallerPart, settings: SettingsPart, job_id: str) -> Response:
    return await _wish(jobs.cancel, idempotent, caller, settings, job_id)


@router.post("/{job_id}/pause")
async def pause(idempotent: IdempotentPart, caller: CallerPart, settings: SettingsPart, job_id: str) -> Response:
    return await _wish(jobs.pause, idempotent, caller, settings, job_id)


@router.post("/{job_id}/resume")
async def resume(idempotent: IdempotentPart, caller: CallerPart, settings: SettingsPart, job_id: str) -> Response:
    return await _wish(jobs.resume, idempotent, caller, settings, job_id)


@router.get("/{job_id}/events")
async def events(store: StorePart, job_id: str, after: str | None = None, limit: Limit = 20) -> dict[str, Any]:
    """Newest first."""
    async with store.look() as session:
        await jobs.find(session, job_id)
        query = select(Event).where(Event.job_id == job_id)
        rows, more = await page(session, query, [Event.id], cursor=Event.public_id, after=after, limit=limit)
    return listing([event_object(row) for row in rows], more)


@router.get("/{job_id}/checkpoints")
async def checkpoints(store: StorePart, job_id: str, after: str | None = None, limit: Limit = 10) -> dict[str, Any]:
    """Newest first."""
    async with store.look() as session:
        await jobs.find(session, job_id)
        query = select(Checkpoint).where(Checkpoint.job_id == job_id)
        rows, more = await page(session, query, [Checkpoint.step], cursor=Checkpoint.id, after=after, limit=limit)
    return listing([checkpoint_object(row) for row in rows], more)
