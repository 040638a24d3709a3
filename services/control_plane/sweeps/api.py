"""The routes below /v1/x/sweeps, which create, list, show, cancel and delete sweeps, and show their trials and their
frontiers.

A sweep is a set of jobs that differ in chosen options. A trial is one of these jobs, with the values that the sweep
chose for it. A frontier compares the rewards of the trained policies with their KL divergences from the reference
model.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Response
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.documents import Page, answers
from services.control_plane.core.responses import deleted, listing
from services.control_plane.core.store import ProjectStore, page
from services.control_plane.core.tables import Job, Sweep, SweepTrial
from services.control_plane.evaluations import api as evaluations_api
from services.control_plane.evaluations import planned, rows
from services.control_plane.evaluations.requests import CreateEvaluation
from services.control_plane.http.dependencies import (
    CallerPart,
    IdempotentPart,
    Limit,
    RayApiPart,
    SettingsPart,
    StorePart,
)
from services.control_plane.http.validation import within
from services.control_plane.jobs import admission
from services.control_plane.models import models
from services.control_plane.sweeps import frontier, search, sweeps, trials
from services.control_plane.sweeps.documents import FrontierDocument, Status, SweepDocument, TrialDocument
from services.control_plane.sweeps.requests import CreateSweep
from services.control_plane.sweeps.responses import frontier_object, sweep_object, trial_object

router = APIRouter(prefix="/x/sweeps")


@router.post("", responses=answers(SweepDocument))
async def create(
    idempotent: IdempotentPart,
    store: StorePart,
    caller: CallerPart,
    settings: SettingsPart,
    ray_api: RayApiPart,
    body: CreateSweep,
) -> Response:
    """Creates a sweep: a set of jobs that differ in chosen options. The service submits the jobs in the background.

    Refuses the sweep if it is clear already that the service would refuse one of its jobs.
    """
    request = body.settled()
    probes = search.probes(request)
    every = search.grid(request) if request.search.type == "grid" else probes
    specs = await anyio.to_thread.run_sync(lambda: [trials.job_of(request, values)[0] for values in every])
    for spec in {spec.training_file: spec for spec in specs}.values():
        with within("job"):
            await admission.check_data(store, settings, spec)
    bodies = request.bodies(specs[0].model)
    kept = {name: await _rows(store, name, each) for name, each in bodies.items()}

    async def submit(session: AsyncSession) -> dict[str, Any]:
        for values in probes:
            await trials.check(session, settings, ray_api, request, values)
        await planned.check_models(session, settings, bodies, "evaluations")
        await trials.check_metric(session, settings, request, bodies)
        await models.hold(session, settings, set[str]().union(*(body.models for body in bodies.values())))
        return sweep_object(await sweeps.create(session, request, bodies, kept, caller.key_id), {}, None)

    return await idempotent.act(submit)


async def _rows(store: ProjectStore, name: str, body: CreateEvaluation) -> list[dict[str, Any]]:
    with within(f"evaluations.{name}"):
        groups = await evaluations_api.groups_of(store, body)
        evaluations_api.check(body, groups)
        return rows.to_json(groups)


@router.get("", responses=answers(Page[SweepDocument]))
async def list_sweeps(
    store: StorePart, after: str | None = None, limit: Limit = 20, status: Status | None = None
) -> dict[str, Any]:
    """Lists the project's sweeps (sets of jobs that differ in chosen options), newest first. If `status` is given,
    lists only sweeps with this status.
    """
    query = select(Sweep) if status is None else select(Sweep).where(Sweep.state == status)
    async with store.look() as session:
        found, more = await page(session, query, [Sweep.created_at, Sweep.id], after=after, limit=limit)
        return listing(await _objects(session, found), more)


async def _objects(session: AsyncSession, found: Sequence[Sweep]) -> list[dict[str, Any]]:
    of_these = SweepTrial.sweep_id.in_([sweep.id for sweep in found])
    query = select(SweepTrial.sweep_id, SweepTrial.state, func.count()).where(of_these)
    counts: dict[str, dict[str, int]] = {}
    for sweep_id, state, count in await session.execute(query.group_by(SweepTrial.sweep_id, SweepTrial.state)):
        counts.setdefault(sweep_id, {})[state] = count
    return [sweep_object(sweep, counts.get(sweep.id, {}), await _best(session, sweep)) for sweep in found]


async def _best(session: AsyncSession, sweep: Sweep) -> dict[str, Any] | None:
    if sweep.spec["metric"] is None:
        return None
    order = SweepTrial.value.asc() if sweep.spec["metric"]["goal"] == "minimize" else SweepTrial.value.desc()
    query = select(SweepTrial, Job).outerjoin(Job, Job.id == SweepTrial.job_id)
    query = query.where(SweepTrial.sweep_id == sweep.id, SweepTrial.state == "succeeded", SweepTrial.value.is_not(None))
    row = (await session.execute(query.order_by(order, SweepTrial.number).limit(1))).first()
    return trial_object(row[0], row[1]) if row else None


@router.get("/{sweep_id}", responses=answers(SweepDocument))
async def retrieve(store: StorePart, sweep_id: str) -> dict[str, Any]:
    async with store.look() as session:
        return (await _objects(session, [await sweeps.find(session, sweep_id)]))[0]


@router.post("/{sweep_id}/cancel", responses=answers(SweepDocument))
async def cancel(idempotent: IdempotentPart, caller: CallerPart, sweep_id: str) -> Response:
    """Cancels a sweep that has not ended, with its jobs and evaluations. Policies and results so far are kept."""

    async def act(session: AsyncSession) -> dict[str, Any]:
        return (await _objects(session, [await sweeps.cancel(session, sweep_id, caller.key_id)]))[0]

    return await idempotent.act(act, changes=sweep_id)


@router.delete("/{sweep_id}")
async def delete(idempotent: IdempotentPart, sweep_id: str) -> Response:
    """Deletes a sweep that has ended, with the records of its trials (jobs with chosen values). The jobs, models and
    evaluations themselves stay.
    """

    async def remove(session: AsyncSession) -> dict[str, Any]:
        await sweeps.remove(session, sweep_id)
        return deleted("sweep", sweep_id)

    return await idempotent.act(remove, changes=sweep_id)


After = Annotated[int | None, Query(ge=-1, lt=2**31)]


@router.get("/{sweep_id}/trials", responses=answers(Page[TrialDocument]))
async def list_trials(store: StorePart, sweep_id: str, after: After = None, limit: Limit = 20) -> dict[str, Any]:
    """Lists the trials (jobs with chosen values) of a sweep that have begun, in the order in which they began."""
    async with store.look() as session:
        await sweeps.find(session, sweep_id)
        query = select(SweepTrial).where(SweepTrial.sweep_id == sweep_id)
        found, more = await page(session, query, [SweepTrial.number], after=after, limit=limit, descending=False)
        jobs = {row.id: row for row in await session.scalars(_jobs_of(found))}
    return listing([trial_object(row, jobs.get(row.job_id or "")) for row in found], more)


def _jobs_of(found: Sequence[SweepTrial]) -> Any:
    return select(Job).where(Job.id.in_([row.job_id for row in found if row.job_id]))


Axis = Annotated[str | None, Query(max_length=32)]


@router.get("/{sweep_id}/frontier", responses=answers(FrontierDocument))
async def show_frontier(store: StorePart, sweep_id: str, kl: Axis = None, reward: Axis = None) -> dict[str, Any]:
    """Returns the reward-KL frontier of a sweep: for each evaluated policy, its reward and its KL divergence from the
    reference model.

    `kl` and `reward` are the names of the sweep's evaluations from which the two numbers come. Default: the first
    suitable one.
    """
    async with store.look() as session:
        sweep = await sweeps.find(session, sweep_id)
        kinds = {name: each["kind"] for name, each in sweep.spec["evaluations"].items()}
        axes = frontier.axes(kinds, kl, reward)
        query = select(SweepTrial, Job).join(Job, Job.id == SweepTrial.job_id)
        found = await session.execute(query.where(SweepTrial.sweep_id == sweep_id, Job.observed == "succeeded"))
        return frontier_object(sweep, [(row[0], row[1]) for row in found], axes)
