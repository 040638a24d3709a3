"""Checks a new job before the service accepts it: its model, its files, and the limits of its project."""

from dataclasses import replace
from typing import Any, NamedTuple

from sqlalchemy.ext.asyncio import AsyncSession

from dpo_core.options import InvalidOption, Objective
from dpo_core.plan.positions import check_max_length, positions_of
from dpo_core.plan.quantization import check_quantization
from services.contract import MIN_EXAMPLES, JobSpec
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.core.store import ProjectStore
from services.control_plane.core.tables import File, reading_of
from services.control_plane.evaluations import of_jobs
from services.control_plane.files import files
from services.control_plane.jobs import combinations, weights
from services.control_plane.jobs.combinations import Asked, Combination
from services.control_plane.jobs.requests import is_local
from services.control_plane.models import models
from services.control_plane.models.models import NamedModel
from services.control_plane.models.shapes import NoShapes, model_shapes
from services.control_plane.settings import Settings
from services.control_plane.tenants import quotas


class Admitted(NamedTuple):
    """A new job that passed all checks: its complete spec (description), the model that it starts from and its
    reference model, and whether the rows of its files were checked.
    """

    spec: JobSpec  # what the job is to do, with the choices that the request left to the service
    model: NamedModel  # from which the job starts
    reference: NamedModel | None  # None if the objective has none
    are_checked: bool  # whether the rows of its uploaded files have been checked


async def check_data(store: ProjectStore, settings: Settings, spec: JobSpec, *, local_files: bool = False) -> None:
    """Raises InvalidRequest if the job's training data are at a URI that jobs may not read, or if the rows of a file do
    not suit the evaluation of the job that names the file. The check may take seconds.

    If `local_files`, the request may name files that are not uploaded yet; these are not checked.
    """
    if spec.is_at_uri:
        await files.check_uri(spec.training_file, settings)
    await of_jobs.check_rows(store, spec, local_files=local_files)


async def admit(
    session: AsyncSession, settings: Settings, spec: JobSpec, asked: Asked, *, local_files: bool = False
) -> Admitted:
    """Checks a new job, and returns the job with the service's choices filled in.

    `spec` is the job's description, and `asked` holds the request's options for which the service can choose a value,
    such as the adapter. If `local_files` is true, the request may name files that are not uploaded yet; these are not
    checked. Raises InvalidRequest, NotFound, Forbidden or OverQuota if the job is refused.
    """
    model = await models.find(session, settings, spec.model, hold=True)
    reference = await _reference(session, spec, model, settings)
    decided = weights.decide(asked, model, settings)
    spec = spec.model_copy(update={"weights": await weights.placed(decided, model)})
    combinations.check(Combination(spec, asked, model, reference))
    await _check_quantization(spec, model)
    spec = await _within_positions(spec, asked, model, reference)
    reports = list[Any]()
    if not spec.is_at_uri and not (local_files and is_local(spec.training_file)):
        file = await files.find_training(session, spec.training_file, param="training_file")
        _check_file(file, spec.config.objective, "training_file")
        spec = spec.model_copy(update=dict(reading_of(file)))
        reports.append(file.report)
    if spec.validation_file and not (local_files and is_local(spec.validation_file)):
        held_out = await files.find_training(session, spec.validation_file, param="validation_file")
        _check_file(held_out, spec.config.objective, "validation_file")
        reports.append(held_out.report)
    await of_jobs.check(session, settings, spec, local_files=local_files)
    await quotas.admit_job(session)
    return Admitted(spec, model, reference, are_checked=None not in reports)


async def check_files(session: AsyncSession, spec: JobSpec) -> None:
    """Checks the job's files again when the job starts. Raises InvalidRequest if the job cannot use one of them.

    This second check is needed because the rows of a large file may be checked only after the job was submitted.
    """
    for param in files.NEEDED:
        if (file_id := getattr(spec, param)) and not (param == "training_file" and spec.is_at_uri):
            file = await session.get_one(File, file_id)
            files.refuse_unusable(file, param)
            _check_file(file, spec.config.objective, param)


async def _check_quantization(spec: JobSpec, model: NamedModel) -> None:
    """Raises InvalidRequest if the job quantizes its base model, but most weights of this model cannot be quantized.
    For example, a weight that holds all experts of a layer cannot be quantized.

    If the shapes of the weights cannot be read on this machine, does nothing; the job makes the same check when it
    runs.
    """
    if spec.weights.quantization is None:
        return
    try:
        shapes = await model_shapes(model)
    except NoShapes:
        return
    try:
        if "text_config" not in shapes.config:  # of such a model, training loads only a part
            check_quantization(shapes)
    except InvalidOption as error:
        raise InvalidRequest(str(error), param=f"x_raydpo.{error.field}", code="invalid_value") from None


async def _within_positions(spec: JobSpec, asked: Asked, model: NamedModel, reference: NamedModel | None) -> JobSpec:
    """Checks `max_length` against the numbers of tokens that the model and its reference model take, and returns the
    spec (the job's description).

    `asked` holds the options that the user chose. Raises InvalidRequest if the user chose a `max_length` that is larger
    than these numbers. A default that is larger is lowered. If the config of one of the models cannot be read on this
    machine, the job itself makes this check.
    """
    max_length = lowest = spec.config.max_length
    read = {"the model": model} | ({"the reference model": reference} if reference else {})
    for what, read_model in read.items():
        try:
            positions = positions_of((await model_shapes(read_model)).config)
            check_max_length(max_length, positions, what, is_chosen=asked.max_length != "auto")
        except InvalidOption as error:
            raise InvalidRequest(str(error), param=f"x_raydpo.{error.field}", code="invalid_value") from None
        except ValueError:
            continue
        lowest = min(lowest, positions or lowest)
    return spec.model_copy(update={"config": replace(spec.config, max_length=lowest)})


async def _reference(session: AsyncSession, spec: JobSpec, start: NamedModel, settings: Settings) -> NamedModel | None:
    """Returns the job's reference model: the one that the user named, or else `start`, the model that the job starts
    from. Returns None if the job's objective (training method) uses no reference model."""
    if not spec.config.objective.traits.needs_reference:
        return None
    if spec.reference_model is None:
        return start
    param = "x_raydpo.reference.model"
    return await models.find(session, settings, spec.reference_model, param=param, hold=True)


def _check_file(file: File, objective: Objective, param: str) -> None:
    """Raises InvalidRequest if the objective (training method) cannot learn from the rows of the uploaded file, or the
    rows are too few.

    `param` is the request's field that names the file. A file whose rows are not checked yet passes; `check_files`
    looks at the file again when the job starts. For a file at a URI, the job itself makes these checks.
    """
    code, report = f"invalid_{param}", file.report
    if report is None:
        return
    learns_from = objective.traits.learns_from
    if report["kind"] not in learns_from:
        kinds = " or ".join(learns_from)
        what = f"The file {file.id} holds {report['kind']}, but the method '{objective.type}' learns from {kinds}"
        message = f"{what}. Choose another method or another file."
        raise InvalidRequest(message, param=param, code=code)
    if report.get("num_margins") and not objective.traits.takes_margins:
        message = (
            f"The file {file.id} has margins, which the method '{objective.type}' cannot use; remove them, or use dpo."
        )
        raise InvalidRequest(message, param=param, code=code)
    if param == "training_file" and report["num_rows"] < MIN_EXAMPLES:
        message = f"Training file has {report['num_rows']} example(s), but must have at least {MIN_EXAMPLES} examples"
        raise InvalidRequest(message, param=param, code="invalid_n_examples")
