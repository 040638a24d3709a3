"""Connects to the database, limits sessions to the rows of one project, and holds queries that several packages use.

The query functions take an open session and never commit.
"""

import asyncio
import logging
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import psycopg
from psycopg.conninfo import make_conninfo
from sqlalchemy import (
    URL,
    ColumnElement,
    Select,
    TextClause,
    and_,
    bindparam,
    delete,
    event,
    func,
    literal,
    or_,
    select,
    text,
    tuple_,
)
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.engine import ExceptionContext, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError
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

from services.control_plane.core.errors import InvalidRequest
from services.control_plane.core.tables import (
    JOB_STATES,
    Attempt,
    Base,
    Checkpoint,
    CheckpointPermission,
    Instance,
    Job,
    Lease,
    Model,
    Outbound,
    Owned,
)
from services.control_plane.core.turns import Turns

log = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).parents[1] / "migrations"
QUEUE_HEAD = 50  # the most queued jobs of a project that may start next; the jobs behind these wait
STATEMENT_SECONDS = 30  # the server cancels a statement after this long, even if it only waits for a lock
IDLE_SECONDS = 60  # the server ends a transaction that is idle for this long
ANSWER_SECONDS = STATEMENT_SECONDS + 10.0  # a connection whose server does not answer for this long counts as lost
RECYCLE_SECONDS = 1800  # a connection is replaced at this age, because the server's name may have a new address

# Each end of a connection notices within seconds that the other end has vanished. Connections are made to a server that
# takes writes only, so that after a failover no connection leads to the standby.
CONNECTING = {
    "connect_timeout": "5",
    "tcp_user_timeout": "10000",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "target_session_attrs": "read-write",
}
SERVER_LIMITS = {
    "statement_timeout": f"{STATEMENT_SECONDS}s",
    "idle_in_transaction_session_timeout": f"{IDLE_SECONDS}s",
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}

Row = TypeVar("Row", bound=Base)


def _url(database_url: str, *, limits: bool = False) -> URL:
    """Returns the database's URL for SQLAlchemy. Adds default options for connecting (CONNECTING), unless the URL sets
    them itself.

    If `limits` is true, also adds limits that the server enforces, such as the longest time of a statement
    (SERVER_LIMITS). Connection poolers refuse such limits. Raises NoDatabase if the URL is not one of PostgreSQL.
    """
    example = "set DATABASE_URL to the database, such as postgresql://user:password@host/name."
    try:
        url = make_url(database_url)
    except (ArgumentError, ValueError) as error:
        raise NoDatabase(f"the address of the database is not a URL; {example}") from error
    if url.get_backend_name() not in ("postgresql", "postgres"):
        raise NoDatabase(f"the database's URL begins with {url.drivername}://, which is not PostgreSQL; {example}")
    url = url.set(drivername="postgresql+psycopg")
    query = {**CONNECTING, **url.query}
    if limits:
        options = [f"-c {name}={value}" for name, value in SERVER_LIMITS.items()]
        query["options"] = " ".join(
            [*options, str(query.get("options", ""))]
        )  # if an option is set twice, the last value counts
    return url.set(query=query)


def _conninfo(url: URL) -> str:
    """Returns the database's URL as a connection string of libpq.

    psycopg cannot use the URL itself: SQLAlchemy writes a space in it as a plus sign, and psycopg would keep the plus
    sign.
    """
    _, arguments = url.get_dialect()().create_connect_args(url)
    return make_conninfo(**arguments)


class NoDatabase(ValueError):
    """Raised if the database's URL does not lead to a PostgreSQL server that the service can use.

    For example, the URL leads to a connection pooler: poolers support neither LISTEN nor the limits on statements that
    the service sets. The message gives the reason, but not the URL, because the URL has a password.
    """


def migrate(database_url: str) -> None:
    """Migrates the database to this release's schema. Several control planes may call this function at the same time.

    Leaves the schema of a newer release as it is. During an upgrade, control planes of the older release may restart
    after the migration, and each schema also serves the release before it. Raises NoDatabase if the URL leads to no
    PostgreSQL server, or to a connection pooler.
    """
    newest = max(file.name for file in (MIGRATIONS / "versions").glob("[0-9]*.py")).partition("_")[0]
    found = _version(database_url)
    if found > newest:
        log.warning(
            "The database has schema %s of a newer release; upgrade this release, which has schema %s.", found, newest
        )
    if found >= newest:
        return
    from alembic import command  # importing alembic takes as long as the rest of a start; few starts need it
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["database_url"] = _url(database_url).render_as_string(hide_password=False)
    command.upgrade(config, "head")


def _version(database_url: str) -> str:
    """Returns the version of the database's schema. Returns '' if the database is empty."""
    try:
        connected = psycopg.connect(_conninfo(_url(database_url, limits=True)))
    except psycopg.OperationalError as error:
        if "startup parameter" not in str(error):
            raise NoDatabase(f"the database at DATABASE_URL takes no connection: {error}") from error
        message = (
            "DATABASE_URL leads to a PgBouncer; "
            "set DATABASE_DIRECT_URL to the URL of the PostgreSQL server itself as well."
        )
        raise NoDatabase(message) from error
    with connected as connection:
        if connection.execute("SELECT to_regclass('alembic_version')").fetchone() == (None,):
            return ""
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        return str(row[0]) if row else ""


class _Connection(psycopg.AsyncConnection[Any]):
    """A connection to PostgreSQL that is closed if the server does not answer within ANSWER_SECONDS.

    The limit also holds if a proxy in between still accepts data although the server does not answer.
    """

    async def wait(self, *args: Any, **kwargs: Any) -> Any:
        late = asyncio.get_running_loop().call_later(ANSWER_SECONDS, self._hang_up)
        try:
            return await super().wait(*args, **kwargs)
        finally:
            late.cancel()

    def _hang_up(self) -> None:
        with socket.socket(fileno=os.dup(self.pgconn.socket)) as connection:
            connection.shutdown(socket.SHUT_RDWR)


class Store:
    """The database, with a pool of connections. `begin` and `begin_for` open transactions.

    `direct_url` is the URL of the database server itself. It is needed if `database_url` leads to a pooler, such as
    PgBouncer, that gives a connection to another client after each transaction.
    """

    def __init__(self, database_url: str, *, direct_url: str | None = None, connections: int = 30) -> None:
        pooled: dict[str, Any] = {} if direct_url is None else {"prepare_threshold": None}
        # If the database dies, the first error on a connection drops all connections from the pool.
        self._engine = create_async_engine(
            _url(database_url, limits=direct_url is None),
            pool_size=connections,
            max_overflow=0,  # connections stay open, because connecting takes longer than a request
            pool_recycle=RECYCLE_SECONDS,
            connect_args={"async_creator_fn": _Connection.connect, **pooled},
        )
        event.listen(self._engine.sync_engine, "handle_error", _drop_a_standby)
        self._sessions = async_sessionmaker(self._engine, expire_on_commit=False)
        self._looks = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        self._snapshots = self._engine.execution_options(isolation_level="REPEATABLE READ")
        # A tenth of the connections is kept for the service itself, so that requests of projects never stop its jobs.
        self._turns = Turns(connections - connections // 10, leaves_free=True)
        self._instance: str | None = None
        self._listen_url = _url(direct_url or database_url)

    @property
    def pool(self) -> QueuePool:
        return cast(QueuePool, self._engine.pool)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncSession]:
        """Opens a transaction of the service itself, which sees and writes the rows of all projects. It commits at the
        end of the `with` block."""
        async with self._sessions.begin() as session:
            yield session
            await _append(session)

    @asynccontextmanager
    async def begin_for(self, project_id: str) -> AsyncIterator[AsyncSession]:
        """Opens a transaction that sees and writes the rows of one project only. It commits at the end of the `with`
        block.

        Only tables whose rows belong to projects (class Owned) are limited in this way. The transaction can also read
        the models that other projects share with the project. Jobs that were deleted are hidden from the transaction.
        """
        async with (
            self._turns.turn(project_id),
            self._sessions(info={"project_id": project_id}) as session,
            session.begin(),
        ):
            yield session
            await _append(session)

    @asynccontextmanager
    async def look_for(self, project_id: str) -> AsyncIterator[AsyncSession]:
        """Opens a session that reads the rows of one project, and writes nothing.

        Each statement is a transaction of its own, which saves two of three round trips to the database.
        """
        async with (
            self._turns.turn(project_id),
            self._sessions(bind=self._looks, info={"project_id": project_id}) as session,
        ):
            yield session

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[AsyncSession]:
        """Opens a session that reads the rows of all projects, and writes nothing. All its statements see the database
        at the moment of the first one."""
        async with self._sessions(bind=self._snapshots) as session:
            yield session

    @asynccontextmanager
    async def snapshot_for(self, project_id: str) -> AsyncIterator[AsyncSession]:
        """Opens a session that reads the rows of one project, and writes nothing. All its statements see the database
        at the moment of the first one."""
        async with (
            self._turns.turn(project_id),
            self._sessions(bind=self._snapshots, info={"project_id": project_id}) as session,
        ):
            yield session

    async def listen(self, channel: str, *, quiet_seconds: float) -> AsyncGenerator[str | None]:
        """Yields the payload of each PostgreSQL notification on the channel. Uses a connection of its own.

        Yields None when it begins to listen, and whenever `quiet_seconds` have passed without a notification. At each
        None, the caller should read the tables, in case it has missed a notification. Raises psycopg.OperationalError
        when the connection is lost.
        """
        url = _conninfo(self._listen_url)
        connect = _Connection.connect(url, autocommit=True, application_name=f"raydpo {channel}")
        async with await connect as connection:
            await connection.execute(f"LISTEN {channel}")
            while True:
                yield None
                async for notice in connection.notifies(timeout=quiet_seconds):
                    yield notice.payload
                await connection.execute("SELECT 1")

    async def instance(self) -> str:
        """Returns the id of this service, which the database holds. The id never changes."""
        if self._instance is None:
            async with self.begin() as session:
                self._instance = (await session.scalars(select(Instance.id))).one()
        return self._instance

    async def close(self) -> None:
        await self._engine.dispose()


def _drop_a_standby(context: ExceptionContext) -> None:
    """Makes SQLAlchemy drop all connections of the pool if an error says that the server is read-only. `context`
    describes the error.

    After a failover, such a server is a standby, and another server has replaced it.
    """
    if isinstance(context.original_exception, psycopg.errors.ReadOnlySqlTransaction):
        context.is_disconnect = True


@dataclass(frozen=True)
class ProjectStore:
    """The database for the requests of one project (`project_id`): its transactions see and write only the rows that
    this project may see and write.
    """

    store: Store
    project_id: str

    def begin(self) -> AbstractAsyncContextManager[AsyncSession]:
        return self.store.begin_for(self.project_id)

    def look(self) -> AbstractAsyncContextManager[AsyncSession]:
        return self.store.look_for(self.project_id)

    def snapshot(self) -> AbstractAsyncContextManager[AsyncSession]:
        return self.store.snapshot_for(self.project_id)


@event.listens_for(Session, "do_orm_execute")
def _see_own_rows_only(state: ORMExecuteState) -> None:
    """Limits each statement of a session for one project to the rows of this project."""
    project_id = state.session.info.get("project_id")
    if project_id is not None and state.is_orm_statement:  # statements without the ORM name no rows of projects
        state.statement = state.statement.options(*_criteria(project_id, state.is_select))


@lru_cache(maxsize=4096)  # building the options takes longer than the rest of a statement
def _criteria(project_id: str, reading: bool) -> tuple[LoaderCriteriaOption, ...]:
    """Returns the ORM options that limit a statement to the rows of one project, and hide jobs that were deleted.

    If `reading` is true, the statement also sees the models that other projects share with the project.
    """
    criteria: dict[type[Owned], ColumnElement[bool]] = {
        kind: kind.project_id == project_id for kind in Owned.__subclasses__()
    }
    criteria[Job] &= Job.deleted_at.is_(None)
    if reading:
        shared = select(CheckpointPermission.model_id).where(CheckpointPermission.project_id == project_id)
        criteria[Model] = or_(criteria[Model], Model.id.in_(shared))
    return tuple(with_loader_criteria(kind, seen, include_aliases=True) for kind, seen in criteria.items())


@event.listens_for(Session, "before_flush")
def _write_own_rows_only(session: Session, context: UOWTransaction, instances: object) -> None:
    """Gives new rows of a session for one project the id of this project. Fails if a changed row belongs to another
    project."""
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
    """Returns the time at which the session's transaction began, by the database's clock.

    This time is the default of `created_at` in all rows that the transaction writes.
    """
    if "now" not in session.info:
        session.info["now"] = await session.scalar(select(func.now()))
    return cast(datetime, session.info["now"])


def append(session: AsyncSession, row: Base) -> None:
    """Adds a row that is inserted at the end of the transaction, in one statement with all other rows that this
    function added.

    Use this function for rows that no query of the transaction reads, such as a job's events. One round trip to the
    database for each of them would take most of a request's time. The row object does not get the values that the
    database fills in.
    """
    if (project_id := session.info.get("project_id")) is not None:
        _claim(row, project_id)
    for name, default in _columns(type(row)).items():
        if getattr(row, name) is None:
            setattr(row, name, default)
    session.info.setdefault("appended", {}).setdefault(type(row), []).append(row)


@cache
def _columns(kind: type[Base]) -> dict[str, Any]:
    """Returns the columns of the table of `kind` that an INSERT must fill, because the database does not fill them in.

    Maps the name of each column to its default value in Python, None if it has none.
    """
    given = (column for column in kind.__table__.c if column.server_default is None)
    return {column.name: getattr(column.default, "arg", None) for column in given}


async def _append(session: AsyncSession) -> None:
    appended: dict[type[Base], list[Base]] = session.info.pop("appended", {})
    if not appended:
        return
    await session.flush()  # the rows that the appended rows refer to
    given = {
        kind.__tablename__: [{name: getattr(row, name) for name in _columns(kind)} for row in rows]
        for kind, rows in appended.items()
    }
    await session.execute(_insertion(tuple(appended)), given)


@cache
def _insertion(kinds: tuple[type[Base], ...]) -> TextClause:
    """Returns the SQL statement that inserts rows into the tables of the classes `kinds`.

    For each table, the statement has a parameter with the table's name. Its value is a JSON list of the rows to insert.
    """
    parts = []
    for kind in kinds:
        table, columns = kind.__tablename__, ", ".join(_columns(kind))
        source = f"jsonb_populate_recordset(NULL::{table}, :{table})"
        parts.append(f"new_{table} AS (INSERT INTO {table} ({columns}) SELECT {columns} FROM {source})")
    given = [bindparam(kind.__tablename__, type_=JSONB) for kind in kinds]
    return text(f"WITH {', '.join(parts)} SELECT 1").bindparams(*given)


def owns(session: AsyncSession, row: Owned) -> bool:
    """Whether the session may change the row. Returns False if another project owns the row and only shares it."""
    return session.info.get("project_id") in (None, row.project_id)


def project_of(session: AsyncSession) -> str:
    """Returns the id of the project that the session is limited to. The session must be limited to a project."""
    return str(session.info["project_id"])


def refuses_value(error: DBAPIError) -> bool:
    """Whether the error means that the database or its driver refused a value, and would refuse it again.

    SQLSTATE's class 22 means bad data, 23 a broken constraint, 54 a limit of the server such as an index row's size.
    """
    state = getattr(error.orig, "sqlstate", None) or ""
    return isinstance(error, DataError) or state[:2] in ("22", "23", "54")


async def wait_long(session: AsyncSession) -> None:
    """Removes the server's limit on idle time for the session's current transaction, which may then wait for
    storage."""
    await session.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))


async def check(session: AsyncSession) -> None:
    """Tests whether the database takes writes, by writing a row. Raises SQLAlchemyError if it does not."""
    await hold_lease(session, "readyz", "readyz", seconds=60)


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
    """Returns one page of the query's rows, and whether more rows follow.

    - `keys` are the columns by which the rows are sorted, in descending order if `descending` is true. No two rows may
      have the same values in all of `keys`.
    - `after` is a value of the column `cursor`. The page begins after the row with this value. If `after` is None, the
      page begins with the first row.
    - If `cursor` is None, the last of `keys` is used.
    - `limit` is the largest number of rows on the page.

    Raises InvalidRequest if no row of `query` has the value `after`.
    """
    if after is not None:
        last = await session.scalar(query.where((keys[-1] if cursor is None else cursor) == after))
        if last is None:
            raise unknown_cursor(after)
        bounds = tuple_(*(literal(getattr(last, key.key), key.type) for key in keys))
        beyond: ColumnElement[bool] = tuple_(*keys) < bounds if descending else tuple_(*keys) > bounds
        query = query.where(beyond)
    query = query.order_by(*(key.desc() if descending else key.asc() for key in keys))
    rows = list(await session.scalars(query.limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def unknown_cursor(after: str | int) -> InvalidRequest:
    return InvalidRequest(
        f"after is '{after}', but the list has no item with this id; send the id of an item that you have listed.",
        param="after",
    )


async def live_jobs(session: AsyncSession) -> list[Job]:
    """Returns the jobs that the reconciler, the background task that handles jobs, must look at.

    These are the running jobs, the paused jobs that their users want to run or cancel, and the first queued jobs of
    each project.
    """
    wanted = and_(Job.observed == "paused", Job.desired != "pause")
    others = select(Job).where(or_(Job.observed == "running", wanted)).order_by(Job.created_at, Job.id)
    place = func.row_number().over(partition_by=Job.project_id, order_by=(Job.priority.desc(), Job.created_at, Job.id))
    queued = select(Job.id, place.label("place")).where(Job.observed == "queued", Job.desired == "run").subquery()
    head = select(Job).join(queued, Job.id == queued.c.id).where(queued.c.place <= QUEUE_HEAD)
    return [*await session.scalars(others), *await session.scalars(head)]


async def open_attempts(session: AsyncSession) -> dict[str, Attempt]:
    """Returns the attempts (runs of jobs on Ray) that have not ended, by job id. A job has at most one such attempt."""
    return {row.job_id: row for row in await session.scalars(select(Attempt).where(Attempt.state != "ended"))}


@dataclass(frozen=True)
class History:
    """The number of a job's attempts (its runs on Ray), the number of failed attempts since the last new checkpoint,
    and the seconds since the last of these failures.
    """

    total: int
    failures: int  # attempts that died by themselves, since the last attempt that left a new checkpoint
    rested_seconds: float  # seconds since the last failure, by the database's clock; 0 if there was no failure


NO_ATTEMPTS = History(total=0, failures=0, rested_seconds=0.0)


async def history(session: AsyncSession, job_id: str) -> History:
    """Returns how many attempts (runs on Ray) a job has had, how many failed since the last new checkpoint, and the
    seconds since the last of these failures.
    """
    of_job = Attempt.job_id == job_id
    saved = select(func.max(Checkpoint.created_at)).where(Checkpoint.job_id == job_id).scalar_subquery()
    progressed = select(func.max(Attempt.number)).where(of_job, Attempt.created_at <= saved).scalar_subquery()
    failed = Attempt.failed & (Attempt.number >= func.coalesce(progressed, 0))
    rested = func.extract("epoch", func.clock_timestamp() - func.max(Attempt.ended_at).filter(failed))
    row = (await session.execute(select(func.count(), func.count().filter(failed), rested).where(of_job))).one()
    return History(row[0], row[1], float(row[2] or 0))


@dataclass(frozen=True)
class Census:
    """Numbers over all projects for Prometheus:

    - the number of jobs in each state
    - the number of webhook messages that wait to be sent
    - the age of the oldest of these messages in seconds
    - the seconds until the lease expires that gives one control plane the right to handle jobs; NaN if no control plane
      ever had it
    """

    jobs: Mapping[str, int]  # by state
    lease_seconds: float  # seconds until the lease ends by which one control plane handles jobs; NaN: never held
    outbox: int  # webhook messages that wait to be sent
    outbox_seconds: float  # seconds since the oldest waiting message was written


async def census(session: AsyncSession) -> Census:
    """Returns the current numbers of jobs and of waiting webhook messages over all projects, for Prometheus."""
    counts = select(Job.observed, func.count().label("number")).where(Job.deleted_at.is_(None))
    by_state = (await session.execute(counts.group_by(Job.observed))).all()
    left = func.extract("epoch", Lease.expires_at - func.clock_timestamp())
    lease = await session.scalar(select(left).where(Lease.name == "reconciler"))
    age = func.extract("epoch", func.now() - func.min(Outbound.created_at))
    waiting, oldest = (await session.execute(select(func.count(), age).where(Outbound.due_at.is_not(None)))).one()
    jobs = dict.fromkeys(JOB_STATES, 0) | {row.observed: row.number for row in by_state}
    return Census(jobs, float("nan") if lease is None else float(lease), waiting, float(oldest or 0))


async def hold_lease(session: AsyncSession, name: str, holder: str, *, seconds: float) -> bool:
    """Takes or renews the lease `name` for `holder`, until `seconds` from now by the database's clock.

    A lease is the right of one process to do something that only one process may do. Returns True if `holder` now has
    the lease, and False if another holder has it.
    """
    until = func.clock_timestamp() + timedelta(seconds=seconds)
    statement = insert(Lease).values(name=name, holder=holder, expires_at=until)
    free = or_(Lease.holder == holder, Lease.expires_at < func.clock_timestamp())
    statement = statement.on_conflict_do_update(
        index_elements=[Lease.name], set_={"holder": holder, "expires_at": until}, where=free
    )
    return (await session.execute(statement.returning(Lease.name))).first() is not None


async def release_lease(session: AsyncSession, name: str, holder: str) -> None:
    """Gives up the lease `name` (the right of one process to do some work), if `holder` has it.

    Another process can then take the lease now, and need not wait until it expires.
    """
    await session.execute(delete(Lease).where(Lease.name == name, Lease.holder == holder))
