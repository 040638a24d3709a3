"""Stores which models are requested, loaded and in use, in the table `deployments`, which all control planes share.

A row stands for a model's engine, the Ray Serve application that loads the model. Requests and jobs write rows to
request models. About once a second the reconciler, the task that handles jobs, calls `place`, which decides which of
these models Ray Serve runs. A mark is a record in a row that a control plane has requests to the model in flight; a
model with a mark stays loaded.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Double, Text, and_, cast, delete, exists, extract, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from services import contract
from services.control_plane.core.errors import InvalidRequest, NotFound, Unavailable
from services.control_plane.core.tables import Attempt, Deployment, Model
from services.control_plane.models import models
from services.control_plane.models.deployments import eviction
from services.control_plane.models.deployments import settings as deployment_settings
from services.control_plane.models.deployments.engines import Engine, engine_of, engines_of, hosts_of
from services.control_plane.models.models import NamedModel
from services.control_plane.ray_api import Application
from services.control_plane.settings import Settings
from services.deployment_settings import DeploymentSettings, EngineSettings

MARK_SECONDS = 30.0  # a mark that its control plane does not renew expires after this time
DELETED_SECONDS = 3600.0  # a request that began before its adapter was deleted reaches the engine within this time
SETTLED_SECONDS = 5.0  # Ray Serve removes an application within this time


async def use(session: AsyncSession, model: NamedModel, *, app_name: str | None = None, for_job: bool = False) -> None:
    """Requests that the model is loaded: adds a row for the model to the table `deployments`. If there is such a row
    already, stores in it that the model is used now.

    `app_name` is given only to load a second engine (server) of the model, which only computes log-probabilities.
    `for_job` says that a job needs the model as its reference; a model that only jobs have requested is unloaded when
    no job uses it any more. Raises Unavailable if another model has the same application name on the cluster.
    """
    named = {"app_name": app_name or model.app_name, "model_id": model.id, "source": model.source}
    scores = named["app_name"] != model.app_name
    row = insert(Deployment).values(**named, num_outputs=model.num_outputs, scores=scores, for_jobs=for_job)
    used = {"last_used_at": func.clock_timestamp(), "for_jobs": Deployment.for_jobs if for_job else False}
    same = (Deployment.model_id == model.id) & (Deployment.source == model.source)
    row = row.on_conflict_do_update(index_elements=[Deployment.app_name], set_=used, where=same)
    if await session.scalar(row.returning(Deployment.app_name)) is None:
        name = named["app_name"]
        message = f"The model '{model.id}' cannot be loaded while another model uses its name {name} on the cluster."
        raise Unavailable(message, retry_after=60)


@dataclass(frozen=True)
class Reference:
    """The Ray Serve application that computes the log-probabilities of a job's reference model: its name, its number of
    GPUs, and the model that it loads.
    """

    app_name: str
    num_gpus: float
    loaded: NamedModel  # the model that the application loads: the reference, or the base of an adapter
    adapter: contract.Adapter | None  # the reference, if it is attached to `loaded`


async def references(
    session: AsyncSession, settings: Settings, wanted: Mapping[str, NamedModel]
) -> dict[str, Reference]:
    """Returns the Ray Serve application that computes log-probabilities with each model in `wanted`.

    `wanted` maps keys, such as job ids, to models; the result maps the same keys to the applications. If a model's own
    engine (the server of the model) cannot compute log-probabilities, because of its precision or its maximum length,
    the model has a second engine, which does nothing else.
    """
    engines = await engines_of(session, settings, {model.id: model for model in wanted.values()})
    chosen = await deployment_settings.of(session, settings, {engine.loaded.id for engine in engines.values()})
    found = {name: _reference(engine, chosen[engine.loaded.id], settings) for name, engine in engines.items()}
    return {key: found[model.id] for key, model in wanted.items()}


async def reference(session: AsyncSession, settings: Settings, model: NamedModel) -> Reference:
    return (await references(session, settings, {"": model}))[""]


def _reference(engine: Engine, own: DeploymentSettings, settings: Settings) -> Reference:
    if settings.scores_apart(own):
        return Reference(scorer_of(engine.loaded), settings.num_gpus_of(own), engine.loaded, engine.adapter)
    num_gpus = settings.num_gpus_of(own) * own.replicas.max
    return Reference(engine.app_name, num_gpus, engine.loaded, engine.adapter)


async def scorer_named(
    session: AsyncSession, settings: Settings, model: NamedModel, name: str | None
) -> tuple[NamedModel, str]:
    """Finds the application with which an attempt (run of a job) computes log-probabilities of its reference model
    `model`. Returns two values: the model that the application loads, and the application's name without the service's
    prefix.

    `name` is the full name of the application that the attempt gave. This name decides, because the settings of `model`
    may have changed since the attempt began, so that new attempts would use another application. If `name` is None, as
    for an attempt of an old release, the application is the model's own engine (model server).
    """
    hosts = await hosts_of(session, settings, model)
    for loaded in hosts:
        for app_name in (loaded.app_name, scorer_of(loaded)):
            if name is None or name.endswith(f"-{app_name}"):
                return loaded, app_name
    found = await reference(session, settings, model)
    return found.loaded, found.app_name


def scorer_of(model: NamedModel) -> str:
    """Returns the application name of the model's second engine (server), which only computes log-probabilities."""
    return f"{model.app_name}-scores"


async def enter(session: AsyncSession, app_name: str, replica: str) -> bool:
    """Records in the model's row that this control plane has requests to the model in flight, so that the model stays
    loaded.

    `app_name` is the name of the model's Ray Serve application, and `replica` the name of this control plane. Returns
    True if this was recorded. Returns False, and records nothing, if the model is not loaded or is about to be
    unloaded.
    """
    # The release before this one leaves `placed_at` empty, so an older row counts as placed without it. A new row does
    # not, because Ray Serve may still be removing an earlier application of the same name.
    old = Deployment.asked_at < func.clock_timestamp() - timedelta(seconds=SETTLED_SECONDS)
    placed = or_(Deployment.placed_at.is_not(None), old) & Deployment.waits_for.is_(None)
    marked = _mark(placed & (Deployment.app_name == app_name), replica).returning(Deployment.app_name)
    return await session.scalar(marked) is not None


async def stay(session: AsyncSession, app_names: Collection[str], replica: str) -> set[str]:
    """Renews the marks (records of requests in flight) of this control plane, called `replica`, in the rows of the
    models whose Ray Serve applications are `app_names`.

    Returns the names of those applications whose models still accept new requests.
    """
    marked = _mark(Deployment.app_name.in_(app_names), replica)
    rows = await session.execute(marked.returning(Deployment.app_name, Deployment.waits_for))
    return {app_name for app_name, waits_for in rows if waits_for is None}


def _mark(which: ColumnElement[bool], replica: str) -> Any:
    until = extract("epoch", func.clock_timestamp()) + MARK_SECONDS
    mark = func.jsonb_build_object(cast(replica, Text), cast(until, Double))
    now = {"last_used_at": func.clock_timestamp(), "answered_at": func.clock_timestamp()}
    return update(Deployment).where(which).values(answering=Deployment.answering.op("||")(mark), for_jobs=False, **now)


async def leave(session: AsyncSession, app_names: Collection[str], replica: str) -> None:
    """Removes the marks (records of requests in flight) of this control plane, called `replica`, from the rows of the
    models whose Ray Serve applications are `app_names`.

    A mark outlives the last request, so that not every request writes to the database. The caller must know that the
    last of this control plane's requests to these models has ended.
    """
    rest = Deployment.answering.op("-")(cast(replica, Text))
    values = {"answering": rest, "last_used_at": func.clock_timestamp()}
    await session.execute(update(Deployment).where(Deployment.app_name.in_(app_names)).values(**values))


async def waits_for(session: AsyncSession, app_name: str) -> str | None:
    """Returns a phrase that says what requests for a model wait for, such as "has been loading for 20 seconds". Returns
    None if the model runs. `app_name` is the name of the model's Ray Serve application."""
    row = await session.get(Deployment, app_name, populate_existing=True)
    if row is None or row.waits_for or row.placed_at is None:
        return f"waits for {(row and row.waits_for) or 'its turn to be loaded'}"
    now = await session.scalar(select(func.clock_timestamp()))
    assert now is not None
    return None if row.ready_at else f"has been loading for {_seconds(now, row.placed_at):.0f} seconds"


async def forget(session: AsyncSession, app_name: str) -> None:
    """Deletes a model's row in `deployments`, so that Ray Serve unloads the model. The next request for the model loads
    it again. `app_name` is the name of the model's Ray Serve application.

    The row stays while the model is the reference of an attempt (one run of a job) that has not ended.
    """
    await session.execute(delete(Deployment).where(Deployment.app_name == app_name, ~_is_reference()))


def _is_reference() -> ColumnElement[bool]:
    return exists().where(Attempt.state != "ended", Attempt.reference == Deployment.app_name)


@dataclass(frozen=True)
class Status:
    """The state of a model's deployment: its settings, whether it is loaded, and what it waits for."""

    model_id: str
    application: contract.Deployment  # the application of the model's engine, as Ray Serve is to run it
    own: DeploymentSettings
    chosen: dict[str, Any]  # the settings that a client chose through the API
    state: str  # waiting, loading, running, failed or unloaded
    waits_for: str | None = None
    error: str | None = None
    num_ready: int = 0  # replicas
    attached_to: str | None = None  # the base model whose engine an adapter is attached to
    last_used_at: datetime | None = None  # of the engine; None: it is not requested
    unloads_at: datetime | None = None  # when it is unloaded if nobody uses it; None: no such time is set


async def status(
    session: AsyncSession, settings: Settings, applications: Mapping[str, Application], model: NamedModel
) -> Status:
    """Returns the settings and the state of the engine (model server on Ray Serve) that answers requests for the model.

    `applications` are the applications of Ray Serve, by name.
    """
    engine = await engine_of(session, settings, model)
    loaded, attached_to = engine.loaded, engine.loaded.id if engine.adapter else None
    found = await deployment_settings.of(session, settings, {model.id, loaded.id})
    own = found[loaded.id].model_copy(update={"mode": found[model.id].mode})
    query = select(Deployment, _is_reference(), func.clock_timestamp()).where(Deployment.app_name == loaded.app_name)
    row, is_reference, now = (await session.execute(query)).one_or_none() or (None, False, None)
    app = applications.get(loaded.app_name)
    named = {"app_name": loaded.app_name, "model_id": loaded.id, "source": loaded.source}
    asked = row or Deployment(**named, num_outputs=loaded.num_outputs)
    application = _application(asked, own, settings, is_reference=False)
    chosen = await deployment_settings.chosen(session, model.id)
    status = Status(model.id, application, own, chosen, "unloaded", attached_to=attached_to)
    if row and now:
        left = _model(row, application, own, settings, now, app, is_reference=is_reference).seconds_left
        unloads_at = None if left is None else now + timedelta(seconds=left)
        status = replace(status, last_used_at=row.last_used_at, unloads_at=unloads_at)
    if app is None or app.state == "stopping":
        return replace(status, state="waiting", waits_for=row.waits_for or "its turn to be loaded") if row else status
    error = app.message if app.state == "failed" else None
    lack = row.waits_for if row else None
    return replace(status, state=app.state, waits_for=lack, error=error, num_ready=app.num_ready)


async def unload(
    session: AsyncSession, settings: Settings, applications: Mapping[str, Application], model: NamedModel
) -> None:
    """Unloads the model's engine (its server on Ray Serve), if it is loaded. `applications` are the applications of Ray
    Serve, by name.

    Raises InvalidRequest if the model is pinned (always loaded), is the reference of a running job, or is answering
    requests. Also raises InvalidRequest for an adapter for which the engine of its base model answers.
    """
    engine = await engine_of(session, settings, model)
    if engine.adapter:
        message = (
            f"'{model.id}' is an adapter on the engine of '{engine.loaded.id}'; unload '{engine.loaded.id}' instead."
        )
        raise InvalidRequest(message, param="model")
    found = {wish.row.app_name: wish for wish in await wished(session, settings, applications)}
    if (wish := found.get(model.app_name)) is None:
        return
    if wish.model.pinned:
        raise InvalidRequest(
            f"The model '{model.id}' is pinned (always loaded), so it cannot be unloaded; set 'pinned' of its "
            "deployment to false, then unload it.",
            param="model",
        )
    if wish.model.is_reference:
        raise InvalidRequest(
            f"The model '{model.id}' is the reference model of a running job; unload the model when the job has ended.",
            param="model",
        )
    if wish.model.answers or not await _is_forgotten(session, wish.row):
        raise InvalidRequest(
            f"The model '{model.id}' is answering requests; unload the model when these requests have ended.",
            param="model",
        )


@dataclass(frozen=True)
class Wish:
    """A requested model: its row in the table `deployments`, its state, and the Ray Serve application that is to serve
    it.
    """

    row: Deployment
    model: eviction.Model
    application: contract.Deployment
    is_outdated: bool = False  # whether the application that Ray Serve runs has other settings than `application`


async def wishes(
    session: AsyncSession, settings: Settings, applications: Mapping[str, Application]
) -> dict[str, eviction.Model]:
    """Returns the state of each requested model, by the name of its Ray Serve application.

    The state comes from the model's row in `deployments` and from Ray Serve, whose applications are `applications`.
    """
    return {wish.model.app_name: wish.model for wish in await wished(session, settings, applications)}


async def wished(session: AsyncSession, settings: Settings, applications: Mapping[str, Application]) -> list[Wish]:
    """Returns all requested models, sorted by application name: their rows, their states, and how they are to be
    served.

    `applications` are those that Ray Serve runs now, by name.
    """
    query = select(Deployment, _is_reference(), func.clock_timestamp()).order_by(Deployment.app_name)
    rows = (await session.execute(query.execution_options(populate_existing=True))).all()
    chosen = await deployment_settings.of(session, settings, {row.model_id for row, _, _ in rows})
    found = []
    for row, is_reference, now in rows:
        own, app = chosen[row.model_id], applications.get(row.app_name)
        application = _application(row, own, settings, is_reference=is_reference)
        if is_reference and app and app.deployment and app.state in ("loading", "running"):
            application = app.deployment  # new settings wait until the log-probabilities are computed
        model = _model(row, application, own, settings, now, app, is_reference=is_reference)
        outdated = app is not None and app.deployment not in (None, application) and app.state != "stopping"
        found.append(Wish(row, model, application, outdated))
    return found


def _model(
    row: Deployment,
    application: contract.Deployment,
    own: DeploymentSettings,
    settings: Settings,
    now: datetime,
    app: Application | None,
    *,
    is_reference: bool,
) -> eviction.Model:
    state = "waiting" if app is None or app.state == "stopping" else app.state
    return eviction.Model(
        app_name=row.app_name,
        state=state,
        held=_seconds(now, (row.ready_at or now) if state == "running" else (row.placed_at or now)),
        asked=_seconds(now, row.asked_at),
        used=_seconds(now, row.last_used_at),
        gpus=application.most_gpus,
        is_reference=is_reference,
        pinned=own.pinned and not row.scores,
        for_jobs=row.for_jobs or row.scores,
        idle_seconds=own.idle_seconds or settings.model_idle_seconds,
        answers=any(until > now.timestamp() for until in row.answering.values()),
        answered=row.answered_at is not None,
    )


def _seconds(now: datetime, since: datetime) -> float:
    return (now - since).total_seconds()


async def place(
    session: AsyncSession, settings: Settings, applications: Mapping[str, Application], room: eviction.Room
) -> list[contract.Deployment]:
    """Decides which requested models are loaded, and records the decision in their rows. Returns the applications that
    Ray Serve is to run.

    `applications` are those that Ray Serve runs now, by name. `room` holds the numbers of models and GPUs that models
    may use.
    """
    await _ask_for_pinned(session, settings)
    while True:
        found = await wished(session, settings, applications)
        plan = eviction.decide([wish.model for wish in found], room)
        gone = [await _is_forgotten(session, wish.row) for wish in found if wish.row.app_name in plan.forget]
        if all(gone):
            break  # otherwise a request has just used one of them, so decide again
    kept = [wish for wish in found if wish.row.app_name not in plan.forget]
    for wish in kept:
        serves = wish.row.app_name in plan.serve
        await _write_down(session, wish, serves=serves, waits_for=plan.waits.get(wish.row.app_name))
    return [wish.application for wish in kept if wish.row.app_name in plan.serve]


async def _ask_for_pinned(session: AsyncSession, settings: Settings) -> None:
    """Requests that pinned models (models whose settings keep them loaded) are loaded, unless they are requested
    already."""
    asked = set(await session.scalars(select(Deployment.app_name)))
    for model_id in await deployment_settings.pinned(session, settings):
        with suppress(NotFound):  # it was deleted
            model = await models.find(session, settings, model_id)
            loaded = (await engine_of(session, settings, model)).loaded
            if loaded.app_name not in asked:
                await use(session, loaded)


async def _is_forgotten(session: AsyncSession, row: Deployment) -> bool:
    """Deletes a model's row from `deployments`, unless a request has used the model since the row was read.

    Returns whether the row was deleted.
    """
    unused = and_(Deployment.answering == row.answering, Deployment.last_used_at == row.last_used_at)
    gone = delete(Deployment).where(Deployment.app_name == row.app_name, unused).returning(Deployment.app_name)
    return await session.scalar(gone.execution_options(synchronize_session=False)) is not None


async def _write_down(session: AsyncSession, wish: Wish, *, serves: bool, waits_for: str | None) -> None:
    """Records the decision about the requested model `wish` in the model's row: whether Ray Serve runs the model
    (`serves`), and what the model waits for.

    Updates only the columns that changed, because requests update other columns at the same time.
    """
    row, model = wish.row, wish.model
    values: dict[str, Any] = {} if row.waits_for == waits_for else {"waits_for": waits_for}
    if serves and (model.state == "waiting" or row.placed_at is None or wish.is_outdated):
        is_ready = model.state == "running" and not wish.is_outdated
        ready_at = func.clock_timestamp() if is_ready else None
        values |= {"placed_at": func.clock_timestamp(), "ready_at": ready_at, "answered_at": None}
    elif not serves and row.placed_at is not None:
        values |= {"placed_at": None, "ready_at": None, "answered_at": None}
    elif model.state == "running" and row.ready_at is None:
        values["ready_at"] = func.clock_timestamp()
    if serves and model.is_reference and row.answered_at is None and "placed_at" not in values:
        values["answered_at"] = func.clock_timestamp()  # so the model may be unloaded once its attempt ends
    if values:
        statement = update(Deployment).where(Deployment.app_name == row.app_name).values(**values)
        await session.execute(statement.execution_options(synchronize_session=False))


def _application(
    row: Deployment, own: DeploymentSettings, settings: Settings, *, is_reference: bool
) -> contract.Deployment:
    num_gpus, num_outputs = settings.num_gpus_of(own), row.num_outputs or 0
    served = contract.Deployment(
        app_name=row.app_name,
        model_id=row.model_id,
        source=row.source,
        dtype=(own.dtype or settings.reference_dtype) if num_outputs else settings.dtype_of(own),
        max_model_len=own.max_model_len,
        num_gpus=min(num_gpus, 1) if num_outputs else num_gpus,  # a reward model is not divided
        engine=own.engine(),
        num_outputs=num_outputs,
        purpose="answers" if settings.scores_apart(own) else "both",
    )
    # Settings may have changed since an attempt was told to score with the model's own engine.
    if not row.scores and not (is_reference and settings.scores_apart(own)):
        return served
    kept = ("gpu_memory_utilization", "max_lora_rank", "max_loras", "max_cpu_loras")
    engine = EngineSettings(**{name: getattr(own, name) for name in kept})
    changed = {"dtype": settings.reference_dtype, "max_model_len": None, "engine": engine, "purpose": "scores"}
    return served.model_copy(update=changed)


async def deleted_adapters(
    session: AsyncSession, deployments: Collection[contract.Deployment]
) -> dict[str, frozenset[str]]:
    """Returns the ids of deleted adapters that each application in `deployments` may still hold, by application name.

    Only adapters that were deleted within the last DELETED_SECONDS are included.
    """
    sources = {deployment.source for deployment in deployments}
    recently = Model.deleted_at > func.clock_timestamp() - timedelta(seconds=DELETED_SECONDS)
    query = select(Model.id, Model.base_source).where(recently, Model.base_source.in_(sources))
    ids: defaultdict[str | None, set[str]] = defaultdict(set)
    for adapter_id, source in await session.execute(query):
        ids[source].add(adapter_id)
    return {deployment.app_name: frozenset(ids[deployment.source]) for deployment in deployments}
