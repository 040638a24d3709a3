"""The route /v1/x/plans, which estimates whether a job would fit into the memory of its workers."""

from typing import Any

from fastapi import APIRouter

from services.control_plane import side_jobs
from services.control_plane.core.documents import answers
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.files import files, model_check
from services.control_plane.http.dependencies import RayApiPart, SettingsPart, StorePart
from services.control_plane.jobs import admission
from services.control_plane.jobs.documents import PlanDocument
from services.control_plane.jobs.plans import plans
from services.control_plane.jobs.requests import ValidateJob, is_local
from services.control_plane.models.shapes import NoShapes, model_shapes

router = APIRouter(prefix="/x/plans")


@router.post("", responses=answers(PlanDocument))
async def create(store: StorePart, settings: SettingsPart, ray_api: RayApiPart, body: ValidateJob) -> dict[str, Any]:
    """Returns the plan of a job with this body: whether it fits, the memory it needs, and changes that make it fit.

    The body may name files on the client's machine. The plan then assumes rows as long as `max_length`.
    """
    spec, asked = body.spec(), body.asked()
    await admission.check_data(store, settings, spec, local_files=True)
    async with store.begin() as session:
        spec, model, *_ = await admission.admit(session, settings, spec, asked, local_files=True)
        is_elsewhere = spec.is_at_uri or is_local(spec.training_file)
        file = None if is_elsewhere else await files.find(session, spec.training_file, param="training_file")
    try:
        shapes = await model_shapes(model)
        counted = None
        if file is not None:
            check = model_check.check_of(file, model, spec.config, settings, await store.store.instance())
            counted = await side_jobs.known(check)
        return plans.plan_object(spec, model, shapes, file, counted, await ray_api.nodes(), settings)
    except NoShapes as error:
        raise InvalidRequest(
            f"The plan needs the model's files, which cannot be read: {error}", param="model", code="model_unreadable"
        ) from None
    except ValueError as error:
        raise InvalidRequest(
            f"The memory that the model '{spec.model}' needs cannot be planned: {error}",
            param="model",
            code="model_unplannable",
        ) from None
