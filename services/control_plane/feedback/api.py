"""The routes below /v1/x/feedback, which store people's votes on completions, and make training files of the votes."""

from datetime import UTC, datetime
from tempfile import TemporaryFile
from typing import Any

from fastapi import APIRouter, Request, Response
from sqlalchemy.ext.asyncio import AsyncSession

from services.contract import Reading
from services.control_plane.core.documents import answers
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.core.responses import deleted, listing
from services.control_plane.core.store import page
from services.control_plane.core.tables import Feedback
from services.control_plane.feedback import feedback
from services.control_plane.feedback.documents import FeedbackDocument, FeedbackPage
from services.control_plane.feedback.requests import CreateFeedback, CreateFeedbackFile, Form, Kind, vote_of
from services.control_plane.feedback.responses import feedback_object
from services.control_plane.files import files, row_check
from services.control_plane.files.documents import FileDocument
from services.control_plane.files.responses import file_object
from services.control_plane.http.dependencies import IdempotentPart, Limit, SettingsPart, StorePart

router = APIRouter(prefix="/x/feedback")


@router.post("", responses=answers(FeedbackDocument))
async def create(idempotent: IdempotentPart, body: CreateFeedback) -> Response:
    """Stores a vote on completions as a row of training data."""
    vote = vote_of(body)

    async def add(session: AsyncSession) -> dict[str, Any]:
        return feedback_object(await feedback.add(session, vote))

    return await idempotent.act(add)


@router.get("", responses=answers(FeedbackPage))
async def list_feedback(
    store: StorePart, kind: Kind | None = None, form: Form | None = None, after: str | None = None, limit: Limit = 20
) -> dict[str, Any]:
    """Lists votes, newest first. Also counts all votes of the project by kind and form.

    If `kind` (such as `pairs`) or `form` (`messages` or `text`) is given, lists only votes of this kind or form.
    """
    keys, query = [Feedback.created_at, Feedback.id], feedback.of_kind(kind, form)
    async with store.look() as session:
        rows, more = await page(session, query, keys, after=after, limit=limit)
        counts = await feedback.counts(session)
    return {**listing([feedback_object(row) for row in rows], more), "counts": counts}


@router.post("/files", responses=answers(FileDocument))
async def create_file(
    request: Request, idempotent: IdempotentPart, store: StorePart, settings: SettingsPart, body: CreateFeedbackFile
) -> Response:
    """Makes a training file of all votes of one kind (such as `pairs`) and form (`messages` or `text`) that the project
    has so far. The oldest vote comes first.
    """
    with TemporaryFile() as rows:
        if not await feedback.write_rows(store, body.kind, body.form, rows):
            message = f"The project has no feedback of the kind '{body.kind}' and the form '{body.form}'; vote first."
            raise InvalidRequest(message, param="kind")
        num_bytes = rows.tell()
        async with store.begin() as session:  # refuses early; the reservation in `keep` is the one that counts
            await files.reserve(session, store.project_id, num_bytes, param="kind")
        rows.seek(0)
        async with request.app.state.storing.turn(store.project_id):
            stored = await files.store_file(rows, settings)

    async with files.removed_unless_named(stored):
        report = await row_check.report_of(stored, Reading(), param="kind", project_id=store.project_id)

        async def keep(session: AsyncSession) -> dict[str, Any]:
            await files.reserve(session, store.project_id, stored.num_bytes, param="kind")
            row = await files.add(
                session,
                stored,
                filename=f"feedback-{body.kind}-{datetime.now(UTC):%Y-%m-%d}.jsonl",
                purpose=files.TRAINING,
                project_id=store.project_id,
                report=report,
            )
            return file_object(row)

        return await idempotent.act(keep)


@router.get("/{feedback_id}", responses=answers(FeedbackDocument))
async def retrieve(store: StorePart, feedback_id: str) -> dict[str, Any]:
    async with store.look() as session:
        return feedback_object(await feedback.find(session, feedback_id))


@router.delete("/{feedback_id}")
async def delete(idempotent: IdempotentPart, feedback_id: str) -> Response:
    """Deletes a vote. Training files that were made before still contain the vote."""

    async def remove(session: AsyncSession) -> dict[str, Any]:
        await feedback.remove(session, feedback_id)
        return deleted("feedback", feedback_id)

    return await idempotent.act(remove, changes=feedback_id)
