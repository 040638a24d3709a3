"""Erases what deleted projects own: their files, jobs, models and everything else.

Each pass removes a limited number of objects, each in the way in which a user deletes one. A pass may be interrupted
and repeated. A model that another project still needs stays until a later pass.
"""

import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import timedelta
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from services import storage
from services.control_plane.core.errors import ApiError
from services.control_plane.core.removal import remove_bytes
from services.control_plane.core.store import ProjectStore, Store
from services.control_plane.core.tables import (
    CheckpointPermission,
    Evaluation,
    Feedback,
    File,
    Job,
    Key,
    Model,
    Outbound,
    Project,
    Rounds,
    Sweep,
    Upload,
    WebhookEndpoint,
)
from services.control_plane.evaluations import evaluations
from services.control_plane.jobs.deletion import deletion as jobs_deletion
from services.control_plane.models import deletion as models_deletion
from services.control_plane.rounds import rounds
from services.control_plane.settings import Settings
from services.control_plane.sweeps import sweeps

log = logging.getLogger(__name__)

OWNED: tuple[type[Any], ...] = (Sweep, Rounds, Evaluation, Job, Model)  # sweeps and rounds go before their jobs
VOTES_AT_ONCE = 10_000
LATEST = timedelta(days=1)  # a request that began before the project was archived has ended after this long

Remove = Callable[[AsyncSession, str], Coroutine[Any, Any, Any]]


async def erase(store: Store, settings: Settings, most: int) -> None:
    """Removes at most `most` objects of each kind of each deleted project. Marks projects that own nothing any more."""
    due = select(Project.id).where(Project.deleted_at.is_not(None), Project.erased_at.is_(None)).order_by(func.random())
    async with store.begin() as session:
        project_ids = list(await session.scalars(due))
    for project_id in project_ids:
        await _erase(ProjectStore(store, project_id), settings, most)
        if not await remove_bytes(storage.join(settings.storage_url, "prepared", project_id)):
            continue
        async with store.begin() as session:
            over = update(Project).where(Project.id == project_id, Project.deleted_at < func.now() - LATEST)
            owned: tuple[type[Any], ...] = (*OWNED, File, Feedback)
            owns_nothing = [~select(kind).where(*_alive(kind, project_id)).exists() for kind in owned]
            await session.execute(over.where(*owns_nothing).values(erased_at=func.now()))


async def _erase(store: ProjectStore, settings: Settings, most: int) -> None:
    removed: list[Any] = []

    async def remove_job(session: AsyncSession, job_id: str) -> None:
        await jobs_deletion.remove(session, settings, job_id, with_models=False)

    async def remove_model(session: AsyncSession, model_id: str) -> None:
        removed.append(await models_deletion.delete(session, settings, model_id))

    removals: dict[type[Any], Remove] = {
        Sweep: sweeps.remove,
        Rounds: rounds.remove,
        Evaluation: evaluations.remove,
        Job: remove_job,
        Model: remove_model,
    }
    for kind in OWNED:
        async for object_id in _ids(store, kind, most):
            try:
                async with store.begin() as session:
                    await removals[kind](session, object_id)
            except ApiError as refusal:
                log.info(
                    "The object %s of the deleted project %s stays for now: %s", object_id, store.project_id, refusal
                )
    for model in removed:
        await models_deletion.remove_files(model, settings)
    await _remove_files(store, most)
    await _remove_rest(store)


def _alive(kind: type[Any], project_id: str) -> list[Any]:
    """Returns the SQL conditions for rows of the class `kind` that belong to the project and are not marked as
    deleted."""
    marked = [kind.deleted_at.is_(None)] if hasattr(kind, "deleted_at") else []
    return [kind.project_id == project_id, *marked]


async def _ids(store: ProjectStore, kind: type[Any], most: int) -> AsyncIterator[str]:
    """Yields the ids of at most `most` objects of the project, in a random order, so that objects that cannot be
    removed do not stop the others."""
    query = select(kind.id).where(*_alive(kind, store.project_id)).order_by(func.random()).limit(most)
    async with store.look() as session:
        found = list(await session.scalars(query))
    for object_id in found:
        yield object_id


async def _remove_files(store: ProjectStore, most: int) -> None:
    """Deletes at most `most` files, and lets the uploads that are not complete expire now."""
    alive = select(File).where(*_alive(File, store.project_id)).limit(most).with_for_update(skip_locked=True)
    async with store.begin() as session:
        files = list(await session.scalars(alive))
        for file in files:
            file.deleted_at = func.clock_timestamp()
        await session.execute(update(Upload).where(Upload.state == "pending").values(expires_at=func.now()))
    for file in files:
        await remove_bytes(file.uri)


async def _remove_rest(store: ProjectStore) -> None:
    """Deletes votes, webhook endpoints, API keys, and the permissions to use models of other projects."""
    endpoints = select(WebhookEndpoint.id).where(WebhookEndpoint.project_id == store.project_id)
    votes = select(Feedback.id).where(Feedback.project_id == store.project_id).limit(VOTES_AT_ONCE)
    async with store.begin() as session:
        await session.execute(delete(Feedback).where(Feedback.id.in_(votes)))
        await session.execute(delete(Outbound).where(Outbound.endpoint_id.in_(endpoints)))
        for part in (WebhookEndpoint, Key, CheckpointPermission):
            await session.execute(delete(part).where(part.project_id == store.project_id))
