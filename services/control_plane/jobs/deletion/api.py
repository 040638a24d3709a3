"""The route DELETE /v1/x/jobs/{id}, which deletes a job that has ended."""

from typing import Any

from fastapi import APIRouter, Response
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.documents import answers
from services.control_plane.core.responses import deleted
from services.control_plane.http.dependencies import IdempotentPart, SettingsPart, WakePart
from services.control_plane.jobs.deletion import deletion
from services.control_plane.jobs.documents import DeletedJobDocument
from services.control_plane.models.deletion import remove_files
from services.control_plane.models.deployments.recent import RecentPart
from services.control_plane.models.models import NamedModel

router = APIRouter(prefix="/x/jobs")


@router.delete("/{job_id}", responses=answers(DeletedJobDocument))
async def delete(
    idempotent: IdempotentPart,
    settings: SettingsPart,
    recent: RecentPart,
    wake: WakePart,
    job_id: str,
    models: bool = False,
) -> Response:
    """Deletes a job that has ended, with its events, metrics, logs and result file. If `models` is true, also deletes
    the job's policy and the models of its checkpoints. Otherwise these models stay.
    """
    removed: list[NamedModel] = []

    async def remove(session: AsyncSession) -> dict[str, Any]:
        gone, stay = await deletion.remove(session, settings, job_id, with_models=models)
        removed.extend(gone)
        return {**deleted("fine_tuning.job", job_id), "models": stay}

    response = await idempotent.act(remove, changes=job_id)
    recent.forget()
    wake()  # the reconciler tells the engines
    for model in removed:
        await remove_files(model, settings)
    return response
