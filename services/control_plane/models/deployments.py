"""Which models are loaded: those that jobs need, then the most recently used, up to a limit. The others are evicted."""

from datetime import timedelta

from sqlalchemy import delete, func, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from services import contract
from services.control_plane.core.errors import Unavailable
from services.control_plane.core.tables import Attempt, Deployment
from services.control_plane.models.models import NamedModel
from services.control_plane.settings import Settings


async def use(session: AsyncSession, model: NamedModel) -> None:
    """Asks for the model to be served, and notes its use. Raises Unavailable if another one has its name in Serve."""
    row = insert(Deployment).values(app_name=model.app_name, model_id=model.id, source=model.source)
    used = {"last_used_at": func.clock_timestamp()}
    same = (Deployment.model_id == model.id) & (Deployment.source == model.source)
    row = row.on_conflict_do_update(index_elements=[Deployment.app_name], set_=used, where=same)
    if await session.scalar(row.returning(Deployment.app_name)) is None:
        message = f"'{model.id}' cannot be served while another model has the name {model.app_name} on the cluster."
        raise Unavailable(message, retry_after=60)


async def forget(session: AsyncSession, app_name: str) -> None:
    await session.execute(delete(Deployment).where(Deployment.app_name == app_name))


async def wanted(session: AsyncSession, settings: Settings, running: set[str]) -> list[contract.Deployment]:
    """Returns the deployments to serve now, and forgets the others.

    References of jobs come first, and stay as long as the jobs need them. A model that is neither running nor was asked
    for lately, such as after a restart of the cluster, is not loaded again until somebody asks for it.
    """
    needed = select(Attempt.reference).where(Attempt.state != "ended", Attempt.reference.is_not(None))
    pinned = Deployment.app_name.in_(needed)
    lately = Deployment.last_used_at > func.clock_timestamp() - timedelta(seconds=settings.model_wait_seconds)
    candidates = select(Deployment).where(or_(pinned, lately, Deployment.app_name.in_(running)))
    best = candidates.order_by(pinned.desc(), Deployment.last_used_at.desc()).limit(settings.max_loaded_models)
    keep = list(await session.scalars(best))
    await session.execute(delete(Deployment).where(Deployment.app_name.not_in([row.app_name for row in keep])))
    return [
        contract.Deployment(
            app_name=row.app_name,
            model_id=row.model_id,
            source=row.source,
            dtype=settings.dtype,
            num_gpus=settings.num_gpus_per_model,
        )
        for row in sorted(keep, key=lambda row: row.app_name)
    ]
