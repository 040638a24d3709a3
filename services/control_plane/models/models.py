"""Finds, lists, adds and removes models by the names that clients use for them.

Base models come from the settings. Trained models come from jobs: each policy (the trained result) and each checkpoint
is a model.
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Select, String, delete, false, func, literal, or_, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from dpo_core.checkpoint_selection import best, evaluations
from dpo_core.config import Lora, Quantization
from services.contract import JobSpec, Weights
from services.control_plane.core.errors import Forbidden, InvalidRequest, NotFound
from services.control_plane.core.store import owns, page
from services.control_plane.core.tables import (
    TERMINAL,
    Checkpoint,
    CheckpointPermission,
    Deployment,
    Evaluation,
    Job,
    JobEvaluation,
    Model,
    Rounds,
    Sweep,
    SweepEvaluation,
)
from services.control_plane.settings import Settings

ATTACHED_FOR = timedelta(hours=1)  # how long an adapter counts as attached after its last use
USE_NOTED_EVERY = timedelta(minutes=10)
# The path in a job's spec of the evaluations that name the model `$named`.
NAMED_IN_EVALUATIONS = (
    "'$.evaluations.* ? (@.baseline == $named || @.reference == $named"
    " || @.judge.model == $named || @.judge.reference == $named)'"
)


@dataclass(frozen=True)
class NamedModel:
    """A base model or a trained model, with the name that clients use. Jobs can start from it, and clients can query
    it."""

    id: str
    source: str  # storage URI, local folder or hub id
    root: str  # the name of the base model from which it was trained
    created_at: datetime
    job_id: str | None = None  # None: a base model
    base_source: str | None = None  # source of an adapter's base model; None: the model holds all weights
    adapter: Lora | None = None  # the options of an adapter; None: the model is no adapter
    quantization: Quantization | None = None  # of the base model, when the adapter was trained on it
    on_experts: bool = False  # whether the adapter is on the experts of a mixture of experts
    num_outputs: int = 0  # outputs of a reward model's head; 0: the model is no reward model
    attached_at: datetime | None = None  # when the adapter was last recorded in use on the engine of its base

    @property
    def app_name(self) -> str:
        """Returns the unique name of the model's Ray Serve application: letters and digits of the model's id, and a
        digest."""
        digest = hashlib.sha256(f"{self.id}\n{self.source}".encode()).hexdigest()[:8]
        return f"{re.sub('[^A-Za-z0-9]+', '-', self.id)[:40].strip('-').lower()}-{digest}"


def reference_of(job: Job) -> NamedModel:
    """Returns the job's reference model: the model that the job starts from, unless the user named another model."""
    name = job.spec.get("reference_model") or job.spec["model"]
    return NamedModel(name, job.reference_source or job.model_source, job.model_root, job.created_at)


STARTED_AT = datetime.now(UTC)  # base models have no time of creation of their own


def bases(settings: Settings) -> list[NamedModel]:
    return [NamedModel(name, model.source, name, STARTED_AT) for name, model in settings.models.items()]


def trained(row: Model) -> NamedModel:
    options = row.adapter or {}
    return NamedModel(
        row.id,
        row.source,
        row.root,
        row.created_at,
        row.job_id,
        base_source=row.base_source,
        adapter=Weights.model_validate({"adapter": options or None}).adapter,
        quantization=options.get("quantization"),
        on_experts=row.on_experts,
        num_outputs=row.num_outputs,
        attached_at=row.attached_at,
    )


async def list_page(
    session: AsyncSession, settings: Settings, *, after: str | None, limit: int
) -> tuple[list[NamedModel], bool]:
    """Returns one page of models, and whether more models follow. Base models come first, then trained models, newest
    first.

    The page begins after the model with the id `after`. If `after` is None, it begins with the first model.
    """
    first = [] if after else bases(settings)
    if after in settings.models:
        first = bases(settings)[list(settings.models).index(after) + 1 :]
        after = None
    query, keys = select(Model).where(Model.deleted_at.is_(None)), [Model.created_at, Model.id]
    rows, more = await page(session, query, keys, after=after, limit=max(0, limit - len(first)))
    return [*first, *map(trained, rows)][:limit], more or len(first) > limit


async def find(
    session: AsyncSession, settings: Settings, model_id: str, *, param: str = "model", hold: bool = False
) -> NamedModel:
    """Returns the model with this name, if the session's project may use it.

    If `hold` is true, locks the model, so that it cannot be deleted before this transaction ends. `param` is the
    request's field that names the model. Raises NotFound if there is no such model. The message lists the base models,
    because most unknown names are misspelled names of base models.
    """
    for base in bases(settings):
        if base.id == model_id:
            return base
    row = await session.get(Model, model_id, with_for_update={"read": True} if hold else None)
    if row is None or row.deleted_at is not None:
        known = ", ".join(settings.models) or "none; the operator adds one with --model NAME=SOURCE"
        raise NotFound(
            f"The model '{model_id}' does not exist. Use the name of a base model ({known}) or of a trained model.",
            param=param,
            code="model_not_found",
        )
    return trained(row)


async def deleted_among(session: AsyncSession, model_ids: Collection[str]) -> set[str]:
    """Returns those of the ids `model_ids` that belong to deleted models, of all projects."""
    rows = Model.__table__.c
    return set(await session.scalars(select(rows.id).where(rows.id.in_(model_ids), rows.deleted_at.is_not(None))))


async def hold(session: AsyncSession, settings: Settings, model_ids: Iterable[str]) -> None:
    """Locks the models with the ids `model_ids`, so that none of them can be deleted before this transaction ends. The
    names of judges at addresses, which the settings hold, may be among the ids; nobody can delete these.

    Raises NotFound if one of the models does not exist.
    """
    # In one order, so that no two transactions wait for each other.
    for model_id in sorted(set(model_ids) - settings.judges.keys()):
        await find(session, settings, model_id, hold=True)


class NameTaken(ValueError):
    """Raised if a trained model of another job already has the name of a new model."""


async def add(session: AsyncSession, model_id: str, source: str, job: Job) -> None:
    """Adds a trained model, called `model_id` and stored at `source`, to the models of the job.

    Adding a model twice is harmless, and a deleted model stays deleted. Raises NameTaken if a model of another job has
    this name.
    """
    spec = JobSpec.model_validate(job.spec)
    adapter = spec.weights.adapter
    row = insert(Model).values(
        id=model_id,
        source=source,
        root=job.model_root,
        base_source=adapter and (job.base_source or job.model_source),
        adapter=adapter and {**asdict(adapter), "quantization": spec.weights.quantization},
        on_experts=spec.weights.on_experts,
        num_outputs=spec.config.objective.traits.num_outputs,
        job_id=job.id,
        project_id=job.project_id,
    )
    await session.execute(row.on_conflict_do_nothing())
    if (owner := await session.scalar(select(Model.job_id).where(Model.id == model_id))) != job.id:
        raise NameTaken(
            f"The job {job.id} cannot name its policy '{model_id}', because the job {owner} has a policy of this name"
        )


async def find_to_download(session: AsyncSession, settings: Settings, model_id: str) -> NamedModel:
    """Returns the trained model with this name, if the session's project may download it.

    Raises InvalidRequest for a base model, and Forbidden for a model that another project shares with this one.
    """
    model = await find(session, settings, model_id)
    if model.job_id is None:
        message = (
            f"The model '{model_id}' is a base model, and only trained models can be downloaded; download it "
            "from its original source."
        )
        raise InvalidRequest(message, param="model", code="invalid_value")
    if not owns(session, await session.get_one(Model, model_id)):
        message = (
            f"The model '{model_id}' belongs to another project. Your project may use it but not download it; "
            "ask its owner for the files."
        )
        raise Forbidden(message, param="model")
    return model


async def check_merged(session: AsyncSession, model: NamedModel) -> None:
    """Raises Forbidden if the model, an adapter, may not be downloaded merged into its base.

    The download is forbidden if the base is a trained model of another project, because the merged model would contain
    the weights of that project's model.
    """
    rows = Model.__table__.c  # models of all projects
    bases = select(rows.project_id).where(rows.source == model.base_source)
    own = await session.scalar(select(Model.project_id).where(Model.id == model.id))
    if any(owner != own for owner in await session.scalars(bases)):
        message = (
            f"The base of '{model.id}' is a model of another project, and a merged download would hold its weights"
        )
        raise Forbidden(f"{message}; send format=adapter.", param="format")


async def base_of(session: AsyncSession, settings: Settings, adapter: NamedModel) -> NamedModel:
    """Returns the model that an adapter was trained on: a base model from the settings, or a trained model of any
    project.

    If this model no longer exists, the result has the name in the adapter's column `root`: the base model from which
    the training first started.
    """
    assert adapter.base_source is not None  # only adapters have a base
    for base in bases(settings):
        if base.source == adapter.base_source:
            return base
    rows = Model.__table__.c  # models of all projects
    query = select(rows.id, rows.created_at).where(rows.source == adapter.base_source)
    row = (await session.execute(query.order_by(rows.created_at).limit(1))).first()
    name, created_at = (row.id, row.created_at) if row else (adapter.root, STARTED_AT)
    return NamedModel(name, adapter.base_source, adapter.root, created_at)


async def find_own(session: AsyncSession, settings: Settings, model_id: str) -> Model:
    """Returns the row of the trained model with this name, locked until the transaction ends.

    Raises Forbidden for a base model and for a model that does not belong to the session's project.
    """
    if (await find(session, settings, model_id)).job_id is None:
        raise Forbidden(
            f"The model '{model_id}' is a base model, which only the operator can change, in the service's settings.",
            param="model",
        )
    row = await session.get_one(Model, model_id, with_for_update={"key_share": True}, populate_existing=True)
    if not owns(session, row):
        message = (
            f"The model '{model_id}' belongs to another project. Only that project may delete or share the "
            "model; ask its owner."
        )
        raise Forbidden(message, param="model")
    return row


async def remove(session: AsyncSession, settings: Settings, model_id: str) -> NamedModel:
    """Marks a trained model as deleted, also for the projects with which it is shared. Returns the model.

    Raises InvalidRequest if the model is needed by an adapter, or by one of these that has not ended: a job, an
    evaluation, a sweep, or a set of rounds (repeated training of a policy). The caller must delete the model's files
    after the commit.
    """
    row = await find_own(session, settings, model_id)
    jobs = Job.__table__.c
    using = select(jobs.id, jobs.project_id).where(jobs.observed.not_in(TERMINAL), _names(literal(model_id)))
    if (job := (await session.execute(using.limit(1))).first()) is not None:
        name = f"the job {job.id}" if job.project_id == row.project_id else "a job of a project that shares the model"
        raise InvalidRequest(
            f"The model '{model_id}' is used by {name}, which has not ended; delete the model when the job has ended."
        )
    for noun, query in _needing(literal(model_id, String)).items():
        if (user := (await session.execute(query.limit(1))).first()) is not None:
            is_own = user.project_id == row.project_id
            name = f"the {noun} {user.id}" if is_own else f"the {noun} of a project that shares the model"
            message = f"The model '{model_id}' is used by {name}, still under way; delete the model afterwards."
            raise InvalidRequest(message)
    models = Model.__table__.c  # models of all projects
    standing = select(models.id, models.project_id).where(models.base_source == row.source, models.deleted_at.is_(None))
    if (other := (await session.execute(standing.limit(1))).first()) is not None:
        name = f"'{other.id}'" if other.project_id == row.project_id else "of a project that shares the model"
        raise InvalidRequest(f"The model '{model_id}' is the base of the adapter {name}; delete the adapter first.")
    if why := await _needed_by_its_job(session, row):
        raise InvalidRequest(f"The job {row.job_id} has not ended and {why}; cancel the job first.")
    await session.execute(delete(CheckpointPermission).where(CheckpointPermission.model_id == model_id))
    row.deleted_at = datetime.now(UTC)
    return trained(row)


def _names(model_id: ColumnElement[str]) -> ColumnElement[bool]:
    """Returns the SQL condition that a job starts from the model `model_id`, has it as its reference model, or names it
    in one of the evaluations that the job asks for.

    The condition holds for jobs of all projects, because a model may be shared with other projects.
    """
    return or_(*(field.astext == model_id for field in _trained_from()), _evaluates_with(model_id))


def _trained_from() -> list[Any]:
    """Returns SQL expressions for the two models that a job is trained from: its first weights, and its reference."""
    jobs = Job.__table__.c
    return [jobs.spec["model"], jobs.spec["reference_model"]]


def _evaluates_with(model_id: ColumnElement[str]) -> ColumnElement[bool]:
    """Returns the SQL condition that a job names the model `model_id` in one of the evaluations that it asks for."""
    named = func.jsonb_build_object("named", model_id)
    return func.jsonb_path_exists(Job.__table__.c.spec, text(NAMED_IN_EVALUATIONS), named)


def _needing(model_id: ColumnElement[str]) -> dict[str, Select[Any]]:
    """Returns SQL queries for the evaluations, sweeps and sets of rounds (repeated training of a policy) that have not
    ended and name the model `model_id` in any of their fields, and for jobs that wait for an evaluation of the model,
    or with it. The keys of the result say in words what they are. Each row of a query has an `id` and a `project_id`.

    The queries look at all projects, because a model may be shared with other projects.
    """
    evaluations, sweeps, rounds = Evaluation.__table__.c, Sweep.__table__.c, Rounds.__table__.c
    own = SweepEvaluation.__table__.c
    of_evaluation = [evaluations.spec[name] for name in ("model", "baseline", "reference")]
    of_own = [own.spec[name] for name in ("baseline", "reference")]
    of_job = [sweeps.spec["job"][path] for path in (("model",), ("x_raydpo", "reference", "model"))]
    outer = (Sweep.__table__, JobEvaluation.__table__, Model.__table__)  # to which queries within queries refer
    sweeps_own = select(own.sweep_id).where(own.sweep_id == sweeps.id, _named(model_id, *of_own, *_of(own.spec)))
    sweeps_own = sweeps_own.correlate(*outer)
    varied = sweeps.spec["parameters"][("model", "values")].contains(func.jsonb_build_array(model_id))
    made = rounds.history.contains(func.jsonb_build_array(func.jsonb_build_object("model", model_id)))
    of_rounds = [rounds.spec["model"], *_of(rounds.spec), *_of(rounds.spec["evaluation"])]
    conditions = {
        "evaluation": (evaluations, _named(model_id, *of_evaluation, *_of(evaluations.spec))),
        "sweep": (sweeps, or_(_named(model_id, *of_job), varied, sweeps_own.exists())),
        "rounds": (rounds, or_(_named(model_id, *of_rounds), made)),
    }
    waiting, jobs = JobEvaluation.__table__.c, Job.__table__.c
    waits = select(waiting.job_id.label("id"), waiting.project_id).where(waiting.state == "waiting")
    with_it = select(jobs.id).where(jobs.id == waiting.job_id, _evaluates_with(model_id)).correlate(*outer)
    return {
        noun: select(table.id, table.project_id).where(table.finished_at.is_(None), condition)
        for noun, (table, condition) in conditions.items()
    } | {"waiting evaluation of the job": waits.where(or_(waiting.model_id == model_id, with_it.exists()))}


def _of(spec: Any) -> list[Any]:
    """Returns SQL expressions for the two models that the field `judge` of `spec`, a JSON column, may name:
    `judge.model` and `judge.reference`.
    """
    return [spec[("judge", name)] for name in ("model", "reference")]


def _named(model_id: ColumnElement[str], *fields: Any) -> ColumnElement[bool]:
    return or_(*(field.astext == model_id for field in fields))


async def _needed_by_its_job(session: AsyncSession, model: Model) -> str | None:
    """Returns the reason why the job that trained the model still needs the model. Returns None if the job does not
    need it."""
    job = await session.get(Job, model.job_id)
    if job is None or job.observed in TERMINAL:  # None: the job was deleted
        return None
    rows = {row.model_id: row for row in await session.scalars(select(Checkpoint).where(Checkpoint.job_id == job.id))}
    if rows and model.id == max(rows.values(), key=lambda row: row.step).model_id:
        return f"would resume from '{model.id}', which is its newest checkpoint"
    if job.spec.get("policy") == "best":
        metric = JobSpec.model_validate(job.spec).config.best_metric
        top = best(evaluations(((row.step, row.metrics) for row in rows.values()), metric), metric)
        if top and model.id in rows and rows[model.id].step == top.step:
            return f"may choose '{model.id}', its best checkpoint so far, as its policy"
    return None


async def note_use(session: AsyncSession, model: NamedModel) -> None:
    """Records that the model, an adapter, is used now on the engine (model server) of its base model.

    Raises NotFound if the adapter was deleted after `model` was read.
    """
    used = update(Model).where(Model.id == model.id, Model.deleted_at.is_(None)).values(attached_at=func.now())
    if await session.scalar(used.returning(Model.id)) is None:
        raise NotFound(f"The model '{model.id}' was deleted.", param="model", code="model_not_found")


def must_note_use(model: NamedModel) -> bool:
    """Whether the use of the adapter `model` must be recorded now, by `note_use`, because the last recorded use is
    missing or older than ten minutes."""
    return model.attached_at is None or datetime.now(UTC) - model.attached_at > USE_NOTED_EVERY


async def withdraw_unused(session: AsyncSession, model_ids: Sequence[str]) -> set[str]:
    """Marks models as deleted if they are not used: not shared, not loaded, no job's first weights or reference, and
    not named by a job, an evaluation, a sweep or a set of rounds (repeated training of a policy) that has not ended.
    Returns the ids of the models that were marked.

    First locks all models in `model_ids`. So the function waits until other requests have finished sharing one of these
    models, or starting a job or an evaluation with it.
    """
    held = select(Model.id).where(Model.id.in_(model_ids)).order_by(Model.id).with_for_update(key_share=True)
    await session.execute(held)
    jobs, model_id = Job.__table__.c, Model.__table__.c.id
    uses = (
        select(CheckpointPermission.id).where(CheckpointPermission.model_id == Model.id),
        select(Deployment.app_name).where(Deployment.model_id == Model.id),
        # Of all jobs, also deleted ones, whose models may need it. A query for each field: one pass over the jobs then
        # serves all models, which an `or` of both fields would prevent.
        *(select(jobs.id).where(field.astext == model_id) for field in _trained_from()),
        select(jobs.id).where(jobs.observed.not_in(TERMINAL), _evaluates_with(model_id)),
        *_needing(model_id).values(),
    )
    is_attached = func.coalesce(Model.attached_at > func.now() - ATTACHED_FOR, false())
    unused = update(Model).where(Model.id.in_(model_ids), ~is_attached, *(~use.exists() for use in uses))
    withdrawn = await session.scalars(unused.values(deleted_at=func.now()).returning(Model.id))
    return set(withdrawn)
