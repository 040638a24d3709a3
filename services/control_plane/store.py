"""The database, and the queries that more than one noun asks. They take an open session and never commit."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import psycopg
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Select,
    Text,
    TextClause,
    and_,
    bindparam,
    column,
    delete,
    event,
    func,
    literal,
    or_,
    select,
    text,
    true,
    tuple_,
    values,
)
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import (
    InstrumentedAttribute,
    LoaderCriteriaOption,
    ORMExecuteState,
    Session,
    UOWTransaction,
    with_loader_criteria,
)
from sqlalchemy.pool import QueuePool

from services.control_plane.errors import InvalidRequest
from services.control_plane.tables import (
    JOB_STATES,
    Attempt,
    Base,
    CheckpointPermission,
    Event,
    Job,
    Lease,
    Model,
    Outbound,
    Owned,
)

MIGRATIONS = Path(__file__).parent / "migrations"
QUEUE_HEAD = 50  # queued jobs of a project that are looked at; those behind them wait their turn unseen
MAX_CONNECTIONS = 30  # of one process, beside one for each channel that it listens on

Row = TypeVar("Row", bound=Base)


def _sqlalchemy_url(database_url: str) -> str:
    return make_url(database_url).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)


def migrate(database_url: str) -> None:
    """Bring the database to the newest schema. Safe to run from several replicas at once."""
    if _is_newest(database_url):
        return
    from alembic import command  # as large as the rest of a start, which seldom needs it
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["database_url"] = _sqlalchemy_url(database_url)
    command.upgrade(config, "head")


def _is_newest(database_url: str) -> bool:
    newest = max(file.name for file in (MIGRATIONS / "versions").glob("[0-9]*.py")).partition("_")[0]
    with psycopg.connect(database_url) as connection:
        if connection.execute("SELECT to_regclass('alembic_version')").fetchone() == (None,):
            return False
        return connection.execute("SELECT version_num FROM alembic_version").fetchone() == (newest,)


class Store:
    """The database: a pool of connections, one transaction per `begin`."""

    def __init__(self, database_url: str) -> None:
        # The first error of a connection that died with the database drops all of them from the pool.
        self._engine = create_async_engine(
            _sqlalchemy_url(database_url),
            pool_size=MAX_CONNECTIONS,
            max_overflow=0,  # what it opens it keeps: to connect takes longer than a request
            connect_args={"connect_timeout": 10},
        )
        self._sessions = async_sessionmaker(self._engine, expire_on_commit=False)
        self._looks = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        self._database_url = database_url

    @property
    def pool(self) -> QueuePool:
        return cast(QueuePool, self._engine.pool)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncSession]:
        """A transaction of the service's own, which sees every project."""
        async with self._sessions.begin() as session:
            yield session
            await _append(session)

    @asynccontextmanager
    async def begin_for(self, project_id: str) -> AsyncIterator[AsyncSession]:
        """A transaction that sees and writes what belongs to the project, and nothing else that is owned."""
        async with self._sessions(info={"project_id": project_id}) as session, session.begin():
            yield session
            await _append(session)

    @asynccontextmanager
    async def look_for(self, project_id: str) -> AsyncIterator[AsyncSession]:
        """As `begin_for`, to read: each statement is a transaction of its own, which saves two trips of three."""
        async with self._sessions(bind=self._looks, info={"project_id": project_id}) as session:
            yield session

    async def listen(self, channel: str, *, quiet_seconds: float) -> AsyncGenerator[str | None]:
        """What is notified, on a connection of its own. None, at first and after so long a silence: look for yourself.

        Raises psycopg.OperationalError when the connection is lost.
        """
        options: dict[str, Any] = {"application_name": f"raydpo {channel}", "connect_timeout": 10}
        options["tcp_user_timeout"] = 10_000  # a database that vanished is noticed
        connect = psycopg.AsyncConnection.connect(self._database_url, autocommit=True, **options)
        async with await connect as connection:
            await connection.execute(f"LISTEN {channel}")
            while True:
                yield None
                async for notice in connection.notifies(timeout=quiet_seconds):
                    yield notice.payload
                await connection.execute("SELECT 1")

    async def close(self) -> None:
        await self._engine.dispose()


@dataclass(frozen=True)
class ProjectStore:
    """The database as a caller may see it."""

    store: Store
    project_id: str

    def begin(self) -> AbstractAsyncContextManager[AsyncSession]:
        return self.store.begin_for(self.project_id)

    def look(self) -> AbstractAsyncContextManager[AsyncSession]:
        return self.store.look_for(self.project_id)


@event.listens_for(Session, "do_orm_execute")
def _see_own_only(state: ORMExecuteState) -> None:
    project_id = state.session.info.get("project_id")
    if project_id is not None and state.is_orm_statement:  # no other names what is owned
        state.statement = state.statement.options(*_own(project_id, state.is_select))


@lru_cache(maxsize=4096)  # to make them takes longer than the rest of a statement
def _own(project_id: str, reading: bool) -> tuple[LoaderCriteriaOption, ...]:
    """A model is read by those it is shared with, too; changed by its owner alone."""
    criteria: dict[type[Owned], ColumnElement[bool]] = {
        kind: kind.project_id == project_id for kind in Owned.__subclasses__()
    }
    if reading:
        shared = select(CheckpointPermission.model_id).where(CheckpointPermission.project_id == project_id)
        criteria[Model] = or_(criteria[Model], Model.id.in_(shared))
    return tuple(with_loader_criteria(kind, seen, include_aliases=True) for kind, seen in criteria.items())


@event.listens_for(Session, "before_flush")
def _write_own_only(session: Session, context: UOWTransaction, instances: object) -> None:
    project_id = session.info.get("project_id")
    if project_id is None:
        return
    for row in session.new:
        _claim(row, project_id)
    for row in (*session.dirty, *session.deleted):
        assert not isinstance(row, Owned) or row.project_id == project_id


def _claim(row: object, project_id: str) -> None:
    if isinstance(row, Owned):
        assert row.project_id in (None, project_id)
        row.project_id = project_id


async def now(session: AsyncSession) -> datetime:
    """When the transaction began, which is `created_at` of all that it writes."""
    if "now" not in session.info:
        session.info["now"] = await session.scalar(select(func.now()))
    return cast(datetime, session.info["now"])


def append(session: AsyncSession, row: Base) -> None:
    """Add a row that no query of this transaction reads: such rows are written at its end, by one statement.

    What keeps the books of a change (its events, its line in a log) is more rows than the change itself, and a trip
    to the database for each would be most of a request. What the database fills in stays unknown here.
    """
    if (project_id := session.info.get("project_id")) is not None:
        _claim(row, project_id)
    for name, default in _columns(type(row)).items():
        if getattr(row, name) is None:
            setattr(row, name, default)
    session.info.setdefault("appended", {}).setdefault(type(row), []).append(row)


@cache
def _columns(kind: type[Base]) -> dict[str, Any]:
    """What the database does not fill in, with its default here."""
    own = (column for column in kind.__table__.c if column.server_default is None)
    return {column.name: getattr(column.default, "arg", None) for column in own}


async def _append(session: AsyncSession) -> None:
    appended: dict[type[Base], list[Base]] = session.info.pop("appended", {})
    if not appended:
        return
    await session.flush()  # what they refer to
    given = {
        kind.__tablename__: [{name: getattr(row, name) for name in _columns(kind)} for row in rows]
        for kind, rows in appended.items()
    }
    await session.execute(_insertion(tuple(appended)), given)


@cache
def _insertion(kinds: tuple[type[Base], ...]) -> TextClause:
    """Its parameters are named as their tables. Rows of one kind get their ids in the order in which they are given."""
    parts = []
    for kind in kinds:
        table, columns = kind.__tablename__, ", ".join(_columns(kind))
        source = f"jsonb_populate_recordset(NULL::{table}, :{table})"
        parts.append(f"new_{table} AS (INSERT INTO {table} ({columns}) SELECT {columns} FROM {source})")
    given = [bindparam(kind.__tablename__, type_=JSONB) for kind in kinds]
    return text(f"WITH {', '.join(parts)} SELECT 1").bindparams(*given)


def owns(session: AsyncSession, row: Owned) -> bool:
    """Whether the session may change what it sees."""
    return session.info.get("project_id") in (None, row.project_id)


def project_of(session: AsyncSession) -> str:
    """Whose session it is; one of the service's own has no project."""
    return str(session.info["project_id"])


async def ping(session: AsyncSession) -> None:
    await session.execute(text("SELECT 1"))


async def page(
    session: AsyncSession,
    query: Select[Row],
    keys: Sequence[InstrumentedAttribute[Any]],
    *,
    after: str | int | None,
    limit: int,
    cursor: InstrumentedAttribute[Any] | None = None,
    descending: bool = True,
) -> tuple[list[Row], bool]:
    """One page of `query` in the order of `keys` (together unique), and whether more rows follow.

    `after` is the `cursor`, or else the last key, of a row of the same query; any other is refused.
    """
    if after is not None:
        last = await session.scalar(query.where((keys[-1] if cursor is None else cursor) == after))
        if last is None:
            raise InvalidRequest(f"No such item to list after: {after}", param="after")
        bounds = tuple_(*(literal(getattr(last, key.key), key.type) for key in keys))
        beyond: ColumnElement[bool] = tuple_(*keys) < bounds if descending else tuple_(*keys) > bounds
        query = query.where(beyond)
    query = query.order_by(*(key.desc() if descending else key.asc() for key in keys))
    rows = list(await session.scalars(query.limit(limit + 1)))
    return rows[:limit], len(rows) > limit


async def live_jobs(session: AsyncSession) -> list[Job]:
    """Every job that runs, or is paused and shall not be, and of the queue each project's head."""
    stirs = or_(Job.observed == "running", and_(Job.observed == "paused", Job.desired != "pause"))
    others = select(Job).where(stirs).order_by(Job.created_at, Job.id)
    place = func.row_number().over(partition_by=Job.project_id, order_by=(Job.priority.desc(), Job.created_at, Job.id))
    queued = select(Job.id, place.label("place")).where(Job.observed == "queued", Job.desired == "run").subquery()
    head = select(Job).join(queued, Job.id == queued.c.id).where(queued.c.place <= QUEUE_HEAD)
    return [*await session.scalars(others), *await session.scalars(head)]


async def open_attempts(session: AsyncSession) -> dict[str, Attempt]:
    """The attempt in progress of each job that has one, by job id."""
    return {row.job_id: row for row in await session.scalars(select(Attempt).where(Attempt.state != "ended"))}


async def past_attempts(session: AsyncSession, job_id: str) -> tuple[int, int]:
    """How many attempts the job has had, and how many of them died by themselves."""
    counts = select(func.count(), func.count().filter(Attempt.failed)).where(Attempt.job_id == job_id)
    total, failed = (await session.execute(counts)).one()
    return total, failed


EVENT = (Event.id, Event.job_id, Event.public_id, Event.created_at, Event.level, Event.type, Event.message, Event.data)


@dataclass(frozen=True)
class Census:
    """What there is, for all projects."""

    jobs: Mapping[str, int]  # by state
    lease_seconds: float  # until the reconciler's ends; NaN: nobody ever held it
    outbox: int  # messages that wait
    outbox_seconds: float  # since the oldest of them was written


async def census(session: AsyncSession) -> Census:
    by_state = (await session.execute(select(Job.observed, func.count().label("number")).group_by(Job.observed))).all()
    left = func.extract("epoch", Lease.expires_at - func.clock_timestamp())
    lease = await session.scalar(select(left).where(Lease.name == "reconciler"))
    age = func.extract("epoch", func.now() - func.min(Outbound.created_at))
    waiting, oldest = (await session.execute(select(func.count(), age).where(Outbound.due_at.is_not(None)))).one()
    jobs = dict.fromkeys(JOB_STATES, 0) | {row.observed: row.number for row in by_state}
    return Census(jobs, float("nan") if lease is None else float(lease), waiting, float(oldest or 0))


async def newest_events(session: AsyncSession, after: Mapping[str, int], *, limit: int) -> Sequence[Any]:
    """Of each job the last `limit` events above the id that is given for it, in order."""
    asked = values(column("job_id", Text), column("after", BigInteger), name="asked").data(list(after.items()))
    newest = (
        select(*EVENT)
        .where(Event.job_id == asked.c.job_id, Event.id > asked.c.after)
        .order_by(Event.id.desc())
        .limit(limit)
        .lateral("newest")
    )
    query = select(newest).select_from(asked).join(newest, true()).order_by(newest.c.id)
    return (await session.execute(query)).all()


async def next_events(session: AsyncSession, job_id: str, after: int, *, limit: int) -> Sequence[Any]:
    """The job's events that follow the one with the id `after`, in order."""
    query = select(*EVENT).where(Event.job_id == job_id, Event.id > after).order_by(Event.id).limit(limit)
    return (await session.execute(query)).all()


async def hold_lease(session: AsyncSession, name: str, holder: str, *, seconds: float) -> bool:
    """Take or renew a lease by the database's clock; False while another holds it."""
    until = func.clock_timestamp() + timedelta(seconds=seconds)
    statement = insert(Lease).values(name=name, holder=holder, expires_at=until)
    free = or_(Lease.holder == holder, Lease.expires_at < func.clock_timestamp())
    statement = statement.on_conflict_do_update(
        index_elements=[Lease.name], set_={"holder": holder, "expires_at": until}, where=free
    )
    return (await session.execute(statement.returning(Lease.name))).first() is not None


async def release_lease(session: AsyncSession, name: str, holder: str) -> None:
    await session.execute(delete(Lease).where(Lease.name == name, Lease.holder == holder))
