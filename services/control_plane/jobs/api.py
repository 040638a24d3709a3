"""The routes below /v1/fine_tuning/jobs, which create, list, show, pause, resume and cancel jobs."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from services import tracing
from services.control_plane.auth.keys import Caller
from services.control_plane.core.documents import Page, answers
from services.control_plane.core.responses import listing
from services.control_plane.core.store import page, unknown_cursor
from services.control_plane.core.tables import Checkpoint, Job
from services.control_plane.http.dependencies import (
    CallerPart,
    IdempotentPart,
    Limit,
    RayApiPart,
    SettingsPart,
    StorePart,
)
from services.control_plane.http.idempotency import IdempotentRequest
from services.control_plane.jobs import admission, checkpoints, jobs
from services.control_plane.jobs.checkpoint_evaluations import checkpoint_evaluations
from services.control_plane.jobs.documents import CheckpointDocument, EventDocument, JobDocument, Status
from services.control_plane.jobs.events import events as job_events
from services.control_plane.jobs.lookups import JobReader
from services.control_plane.jobs.plans import plans
from services.control_plane.jobs.requests import CreateJob
from services.control_plane.jobs.responses import checkpoint_object, event_object, job_object
from services.control_plane.settings import Settings

router = APIRouter(prefix="/fine_tuning/jobs")


async def _job_reader(request: Request) -> JobReader:
    return cast(JobReader, request.app.state.job_reader)


JobReaderPart = Annotated[JobReader, Depends(_job_reader)]


@router.post("", responses=answers(JobDocument))
async def create(
    idempotent: IdempotentPart,
    store: StorePart,
    caller: CallerPart,
    settings: SettingsPart,
    ray_api: RayApiPart,
    body: CreateJob,
) -> Response:
    spec, asked = body.spec(), body.asked()
    await admission.check_data(store, settings, spec)

    async def submit(session: AsyncSession) -> dict[str, Any]:
        admitted = await admission.admit(session, settings, spec, asked)
        await plans.refuse_hopeless(admitted.spec, admitted.model, settings, ray_api)
        job = await jobs.submit(session, *admitted[:3], caller.key_id, settings, are_checked=admitted.are_checked)
        return job_object(job, settings)

    with tracing.span("submit job"):
        return await idempotent.act(submit)


@router.get("", responses=answers(Page[JobDocument]))
async def list_jobs(
    request: Request,
    store: StorePart,
    settings: SettingsPart,
    after: str | None = None,
    limit: Limit = 20,
    status: Status | None = None,
    metadata: Literal["null"] | None = None,
) -> dict[str, Any]:
    """Lists the project's jobs, newest first. If `status` is given, lists only jobs with this status.

    With the parameter `metadata[k]=v`, lists only jobs whose metadata have the value `v` for the key `k`. With
    `metadata=null`, lists only jobs without metadata.
    """
    query = select(Job) if status is None else select(Job).where(Job.observed == status)
    if metadata:
        query = query.where(Job.spec["metadata"].astext.is_(None))
    for name, value in request.query_params.multi_items():
        if name.startswith("metadata["):
            query = query.where(Job.spec["metadata"][name[9:].removesuffix("]")].astext == value)
    async with store.look() as session:
        keys = [Job.created_at, Job.id]
        rows, more = await page(session, query, keys, after=after, limit=limit)
        found = await checkpoint_evaluations.of_jobs(session, rows)
    return listing([job_object(row, settings, found.get(row.id, ())) for row in rows], more)


@router.get("/{job_id}", responses=answers(JobDocument))
async def retrieve(reader: JobReaderPart, caller: CallerPart, settings: SettingsPart, job_id: str) -> dict[str, Any]:
    job, found = await reader.job(caller.project_id, job_id)
    return job_object(job, settings, found)


async def _wish(
    wish: Callable[[AsyncSession, str, str], Awaitable[Job]],
    idempotent: IdempotentRequest,
    caller: Caller,
    settings: Settings,
    job_id: str,
) -> Response:
    async def act(session: AsyncSession) -> dict[str, Any]:
        job = await wish(session, job_id, caller.key_id)
        found = await checkpoint_evaluations.of_jobs(session, [job])
        return job_object(job, settings, found.get(job.id, ()))

    return await idempotent.act(act, changes=job_id)


@router.post("/{job_id}/cancel", responses=answers(JobDocument))
async def cancel(idempotent: IdempotentPart, caller: CallerPart, settings: SettingsPart, job_id: str) -> Response:
    return await _wish(jobs.cancel, idempotent, caller, settings, job_id)


@router.post("/{job_id}/pause", responses=answers(JobDocument))
async def pause(idempotent: IdempotentPart, caller: CallerPart, settings: SettingsPart, job_id: str) -> Response:
    return await _wish(jobs.pause, idempotent, caller, settings, job_id)


@router.post("/{job_id}/resume", responses=answers(JobDocument))
async def resume(idempotent: IdempotentPart, caller: CallerPart, settings: SettingsPart, job_id: str) -> Response:
    return await _wish(jobs.resume, idempotent, caller, settings, job_id)


@router.get("/{job_id}/events", responses=answers(Page[EventDocument]))
async def events(
    store: StorePart,
    job_id: str,
    after: str | None = None,
    limit: Limit = 20,
    type: Literal["message", "metrics"] | None = None,
) -> dict[str, Any]:
    """Lists a job's events, newest first. If `type` is given, lists only events of this type."""
    async with store.snapshot() as session:
        await jobs.find(session, job_id)
        before = None if after is None else await job_events.place_of(session, job_id, after)
        if after is not None and before is None:
            raise unknown_cursor(after)
        rows = await job_events.page(session, job_id, before=before, type=type, limit=limit + 1)
    return listing([event_object(row) for row in rows[:limit]], len(rows) > limit)


@router.get("/{job_id}/checkpoints", responses=answers(Page[CheckpointDocument]))
async def list_checkpoints(
    store: StorePart, job_id: str, after: str | None = None, limit: Limit = 10
) -> dict[str, Any]:
    """Lists a job's checkpoints, newest first."""
    async with store.look() as session:
        await jobs.find(session, job_id)
        query = checkpoints.offered(job_id)
        rows, more = await page(session, query, [Checkpoint.step], cursor=Checkpoint.id, after=after, limit=limit)
    return listing([checkpoint_object(row) for row in rows], more)
