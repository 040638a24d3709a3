"""/v1/x/jobs/validate and /v1/x/methods: what a job would be, and what it may ask for."""

from typing import Any

from fastapi import APIRouter

from dpo_core.methods import METHODS, described
from services.control_plane.core.responses import listing
from services.control_plane.http.dependencies import SettingsPart, StorePart
from services.control_plane.jobs import admission, jobs
from services.control_plane.jobs.requests import ValidateJob
from services.control_plane.jobs.responses import job_object

router = APIRouter(prefix="/x")


@router.post("/jobs/validate")
async def validate(store: StorePart, settings: SettingsPart, body: ValidateJob) -> dict[str, Any]:
    """The job that the body asks for, without an id: nothing is written. What depends on its rows stays open."""
    spec, weights = body.spec(), body.weights()
    await admission.check_uri(spec, settings)
    async with store.begin() as session:
        spec, model, reference = await admission.admit(session, settings, spec, weights, local_files=True)
    job = jobs.draft(spec, model, reference)
    config = spec.config.settled(with_adapter=spec.weights.adapter is not None)
    job.training = {"config": spec.model_copy(update={"config": config}).model_dump(mode="json")["config"]}
    return job_object(job, settings)


@router.get("/methods")
async def methods() -> dict[str, Any]:
    """Every method with its hyperparameters."""
    return listing([described(kind) for kind in METHODS], has_more=False)
