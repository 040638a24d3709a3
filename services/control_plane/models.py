"""Models by the names clients use: bases from the settings, trained policies and checkpoints from jobs."""

import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.errors import Forbidden, InvalidRequest, NotFound
from services.control_plane.settings import Settings
from services.control_plane.tables import TERMINAL, Job, Model


@dataclass(frozen=True)
class NamedModel:
    """A model that jobs start from and clients query."""

    id: str
    source: str  # storage URI, local folder or hub id
    root: str  # name of the base model it descends from
    created_at: datetime
    job_id: str | None = None  # None: a base model

    @property
    def app_name(self) -> str:
        """Its Serve application: the name in plain letters, told apart by a digest of name and source."""
        digest = hashlib.sha256(f"{self.id}\n{self.source}".encode()).hexdigest()[:8]
        return f"{re.sub('[^A-Za-z0-9]+', '-', self.id)[:40].strip('-').lower()}-{digest}"


STARTED_AT = datetime.now(UTC)  # base models have no birthday of their own


def bases(settings: Settings) -> list[NamedModel]:
    return [NamedModel(name, source, name, STARTED_AT) for name, source in settings.models.items()]


def _trained(row: Model) -> NamedModel:
    return NamedModel(row.id, row.source, row.root, row.created_at, row.job_id)


async def list_all(session: AsyncSession, settings: Settings) -> list[NamedModel]:
    """Bases first, then trained policies and checkpoints, newest first."""
    query = select(Model).where(Model.deleted_at.is_(None)).order_by(Model.created_at.desc(), Model.id)
    return bases(settings) + [_trained(row) for row in await session.scalars(query)]


async def find(session: AsyncSession, settings: Settings, model_id: str) -> NamedModel:
    """The model by its name; NotFound lists the base models, since most misses are misspelled bases."""
    for base in bases(settings):
        if base.id == model_id:
            return base
    row = await session.get(Model, model_id)
    if row is None or row.deleted_at is not None:
        known = ", ".join(settings.models) or "none; start with --model NAME=SOURCE"
        raise NotFound(
            f"The model '{model_id}' does not exist. Base models: {known}.", param="model", code="model_not_found"
        )
    return _trained(row)


async def add(session: AsyncSession, model_id: str, source: str, job: Job) -> None:
    """Offer a trained policy. Doing it twice is harmless, and what a user deleted stays deleted."""
    row = insert(Model).values(
        id=model_id, source=source, root=job.model_root, job_id=job.id, project_id=job.project_id
    )
    await session.execute(row.on_conflict_do_nothing())


async def remove(session: AsyncSession, settings: Settings, model_id: str) -> NamedModel:
    """Stop offering a trained policy, unless a job still trains from it."""
    model = await find(session, settings, model_id)
    if model.job_id is None:
        raise Forbidden(f"'{model_id}' is a base model; take it out of the settings to remove it.", param="model")
    using = select(Job.id).where(Job.observed.not_in(TERMINAL), Job.spec["model"].astext == model_id)
    if (job_id := await session.scalar(using.limit(1))) is not None:
        raise InvalidRequest(f"'{model_id}' is the start of {job_id}, which has not ended; cancel the job first.")
    (await session.get_one(Model, model_id)).deleted_at = datetime.now(UTC)
    return model
