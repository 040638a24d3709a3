"""What runs in Ray for an attempt that has ended: launched late, or deaf to its stop."""

import re
from datetime import timedelta

from sqlalchemy import func, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.store import Store
from services.control_plane.core.tables import Attempt
from services.control_plane.ray_api import Launcher

GRACE = timedelta(seconds=60)  # an attempt that told its outcome is about to exit


async def stop_orphans(store: Store, launcher: Launcher) -> list[str]:
    """The submissions that were stopped. What this database does not know belongs to another service."""
    running = [found for found in map(_attempt_of, await launcher.live_submissions()) if found]
    async with store.begin() as session:
        orphans = await _ended(session, running)
    for submission_id in orphans:
        await launcher.stop(submission_id)
    return orphans


def _attempt_of(submission_id: str) -> tuple[str, int] | None:
    match = re.fullmatch(r"(ftjob-[0-9a-f]+)-([0-9]+)", submission_id)
    return (match[1], int(match[2])) if match else None


async def _ended(session: AsyncSession, running: list[tuple[str, int]]) -> list[str]:
    query = select(Attempt).where(tuple_(Attempt.job_id, Attempt.number).in_(running))
    attempts = await session.scalars(query.where(Attempt.ended_at < func.now() - GRACE))
    return [attempt.submission_id for attempt in attempts]
