"""The routes /v1/x/jobs/validate, which checks a job without creating it, and /v1/x/methods and /v1/x/options, which
list what a job may ask for."""

from typing import Any

from fastapi import APIRouter

from dpo_core.methods import METHODS, described
from services.control_plane.core.documents import Page, answers
from services.control_plane.core.responses import listing
from services.control_plane.http.dependencies import RayApiPart, SettingsPart, StorePart
from services.control_plane.jobs import admission, jobs, options
from services.control_plane.jobs.documents import DraftDocument, ExtensionOptionDocument, MethodDocument
from services.control_plane.jobs.plans import plans
from services.control_plane.jobs.requests import ValidateJob
from services.control_plane.jobs.responses import job_object

router = APIRouter(prefix="/x")


@router.post("/jobs/validate", responses=answers(DraftDocument))
async def validate(store: StorePart, settings: SettingsPart, ray_api: RayApiPart, body: ValidateJob) -> dict[str, Any]:
    """Checks the body, and returns the job that the body asks for, without an id. Stores nothing and reads no rows of
    files."""
    spec, asked = body.spec(), body.asked()
    await admission.check_data(store, settings, spec, local_files=True)
    async with store.begin() as session:
        spec, model, reference, _ = await admission.admit(session, settings, spec, asked, local_files=True)
    await plans.refuse_hopeless(spec, model, settings, ray_api)
    job = jobs.draft(spec, model, reference)
    config = spec.config.settled(with_adapter=spec.weights.adapter is not None)
    job.training = {"config": spec.model_copy(update={"config": config}).model_dump(mode="json")["config"]}
    return job_object(job, settings)


@router.get("/methods", responses=answers(Page[MethodDocument]))
async def methods() -> dict[str, Any]:
    """Lists the training methods with their hyperparameters."""
    return listing([described(kind) for kind in METHODS], has_more=False)


@router.get("/options", responses=answers(Page[ExtensionOptionDocument]))
async def list_options() -> dict[str, Any]:
    """Lists the options that a job can have in the field `x_raydpo`."""
    return listing(options.described(), has_more=False)
