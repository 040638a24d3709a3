"""Runs work in the background that only one control plane may do at a time.

To do a piece of work, such as a check of a file, a control plane takes the lease of this piece: a row in the database
that expires if it is not renewed. If a control plane dies, its leases expire, and another control plane repeats or
continues the work.
"""

import asyncio
import logging
from datetime import timedelta
from typing import Any, Generic, Protocol, TypeVar

from sqlalchemy import ColumnElement, Select, exists, func, literal, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.log_setup import Trouble
from services.control_plane.core.store import Store, hold_lease, release_lease
from services.control_plane.core.tables import Lease

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0  # how often a control plane looks for work
BEAT_SECONDS = 2.0  # how often it renews its leases
LEASE_SECONDS = 15.0
RETRY_SECONDS = 30.0  # after an error that nobody expected
GIVEN_UP_AFTER = timedelta(days=1)  # of such errors without progress in between
NOBODY = "nobody"  # holds the lease of work that is tried again later

Piece = TypeVar("Piece")


class Later(Exception):
    """Raised by background work on a piece, such as a file to check, if the work has to wait. The control plane then
    gives up the piece, which can be taken again after `seconds`.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class LeasedWork(Protocol[Piece]):
    """A kind of background work that comes in pieces, such as files to check.

    Each piece has a lease, a row in the database that gives one control plane the right to work on the piece.
    """

    @property
    def at_once(self) -> int:
        """Returns the largest number of pieces of work that one control plane does at the same time."""

    def lease_of(self, piece: Piece) -> str:
        """Returns the name of the piece's lease (the right of one control plane to work on the piece)."""

    async def claim(self, session: AsyncSession, holder: str) -> Piece | None:
        """Takes the lease of the next piece of work (the right to work on it) for the control plane `holder`, with the
        function `take`, and returns the piece. Returns None if there is nothing to do.
        """

    async def work(self, piece: Piece) -> None:
        """Does the work on the piece, such as checking a file. If an earlier try was interrupted, does only what that
        try left undone. The call may be cancelled at any time.

        Raises Later if the work has to wait, so that meanwhile other pieces can be worked on.
        """

    async def goes_on(self, session: AsyncSession, piece: Piece) -> bool:
        """Whether the work on the piece, such as a file to check, should go on. Called every few seconds while the work
        is under way.
        """

    async def interrupted(self, session: AsyncSession, piece: Piece, error: Exception) -> None:
        """Records that the work on the piece, such as a file to check, failed with the unexpected error `error`. The
        work is tried again after RETRY_SECONDS.

        To delay the next try, an implementation gives the piece's lease (the right to work on it) to NOBODY, a holder
        that does no work, for a longer time.
        """


class Troubled(Protocol):
    """A row of the database for which work is done in the background. `troubled_at` is the time of the first unexpected
    error since the work last made progress; None if there was none. `waits_for` is the reason why the work waits, as a
    text for the user.
    """

    troubled_at: Any  # when the first unexpected error since the last progress was, None if there was none
    waits_for: Any  # why the work waits, as text for the user


class Rests:
    """Computes how long a piece of work rests after it was refused, for example by a quota. The class remembers the
    last rest of each piece.

    The first rest of a piece is `first` seconds long. Each further one is twice as long, up to `longest` seconds.
    """

    def __init__(self, first: float, longest: float = 60.0) -> None:
        self._first, self._longest = first, longest
        self._seconds: dict[str, float] = {}

    def after_refusal(self, name: str) -> float:
        """Counts one more refusal of the piece of work `name`, and returns how many seconds this piece rests now."""
        last = self._seconds.get(name, self._first / 2)
        self._seconds[name] = min(2 * last, self._longest)
        return self._seconds[name]

    def forget(self, name: str) -> None:
        """Forgets the refusals of the piece of work `name`. After its next refusal, the piece rests for `first` seconds
        again.
        """
        self._seconds.pop(name, None)


def told(error: Exception) -> str:
    """Returns a sentence for the user, without a full stop: the service cannot go on because of the unexpected error
    `error`.
    """
    return f"The service cannot go on because of an error of its own ({type(error).__name__}), which its log explains"


async def lasts_too_long(session: AsyncSession, row: Troubled, error: Exception) -> bool:
    """Stores in `row`, for the user, that its work waits after an unexpected error. Returns True if such errors have
    gone on for a day without progress, so that the caller should give the work up.
    """
    now = await session.scalar(select(func.clock_timestamp()))
    assert now is not None
    row.troubled_at = row.troubled_at or now
    row.waits_for = f"{told(error)}; it tries again every {RETRY_SECONDS:g} s."
    return bool(now - row.troubled_at > GIVEN_UP_AFTER)


def next_in_turn(table: Any, is_live: ColumnElement[bool], lease: str, *, most: int | None = None) -> Select[Any]:
    """Returns the query for the next row of `table` to work on. Projects take turns; of one project's rows, the oldest
    comes first.

    The row meets the condition `is_live`, and nobody holds its lease (the right to work on it). The lease's name is the
    text `lease` followed by the row's id. `most` is the number of a project's rows that may be worked on at the same
    time: the query considers only this many of each project's oldest rows that meet the condition. None means no limit.
    """
    place = func.row_number().over(partition_by=table.project_id, order_by=(table.created_at, table.id))
    live = select(table.id, place.label("place")).where(is_live).subquery()
    leased = exists().where(Lease.name == literal(lease) + table.id, Lease.expires_at > func.clock_timestamp())
    query = select(table).join(live, live.c.id == table.id).where(~leased)
    if most is not None:
        query = query.where(live.c.place <= most)
    return query.order_by(live.c.place, table.created_at, table.id).limit(1)


async def take(session: AsyncSession, name: str, holder: str) -> bool:
    """Takes or renews the lease `name` (the right to do some work) for `holder`, the name of a control plane. Returns
    whether `holder` has the lease now.
    """
    return await hold_lease(session, name, holder, seconds=LEASE_SECONDS)


class Leaseholder(Generic[Piece]):
    """Does one kind of background work, such as checking files, in the control plane called `holder`. Before it works
    on a piece (such as a file), it takes the piece's lease, which is the right to work on the piece, so that no other
    control plane works on the same piece.
    """

    def __init__(self, store: Store, kind: LeasedWork[Piece], *, holder: str) -> None:
        self._store, self._kind, self._holder = store, kind, holder
        self._running: set[asyncio.Task[None]] = set()
        self._trouble = Trouble(log, type(kind).__name__)

    async def run(self) -> None:
        """Looks every second for pieces of work, such as files to check, and works on them, until cancelled."""
        try:
            while True:
                try:
                    while len(self._running) < self._kind.at_once and (piece := await self._claim()) is not None:
                        task = asyncio.create_task(self._hold(piece), name=self._kind.lease_of(piece))
                        self._running.add(task)
                        task.add_done_callback(self._running.discard)
                    self._trouble.passed()
                except (SQLAlchemyError, OSError) as error:
                    self._trouble.failed("The database does not answer, so work in the background waits: %s", error)
                await asyncio.sleep(TICK_SECONDS)
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    async def run_once(self) -> None:
        """Does one piece of work, such as checking a file, and returns when it is done. Does nothing if there is no
        work.
        """
        if (piece := await self._claim()) is not None:
            await self._hold(piece)

    async def _claim(self) -> Piece | None:
        async with self._store.begin() as session:
            return await self._kind.claim(session, self._holder)

    async def _hold(self, piece: Piece) -> None:
        """Works on the piece while this control plane holds the piece's lease (the right to work on it). Gives the
        lease up afterwards.
        """
        failure: Exception | None = None
        rest = 0.0
        work, beat = asyncio.create_task(self._kind.work(piece)), asyncio.create_task(self._beat(piece))
        try:
            await asyncio.wait((work, beat), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        except Later as later:
            rest = later.seconds
        except Exception as error:  # an error with one piece must not stop the others
            what = self._kind.lease_of(piece)
            log.warning("The work '%s' failed and is tried again later", what, exc_info=error)
            failure, rest = error, RETRY_SECONDS
        finally:
            work.cancel()
            beat.cancel()
            await asyncio.gather(work, beat, return_exceptions=True)
            await self._give_up(piece, failure, rest)

    async def _beat(self, piece: Piece) -> None:
        """Renews the lease of the piece (the right to work on it) every few seconds. Returns when the lease was lost,
        or when the work on the piece should not go on.
        """
        is_held, name = True, self._kind.lease_of(piece)
        while is_held:
            await asyncio.sleep(BEAT_SECONDS)
            try:
                async with self._store.begin() as session:
                    is_held = await take(session, name, self._holder) and await self._kind.goes_on(session, piece)
            except (SQLAlchemyError, OSError) as error:
                log.warning("The lease '%s' could not be renewed: %s", name, error)

    async def _give_up(self, piece: Piece, failure: Exception | None, rest: float) -> None:
        """Gives up the lease of the piece (the right to work on it), so that any control plane can take the lease when
        `rest` seconds have passed.

        `failure` is the unexpected error with which the work ended, if there was one.
        """
        name = self._kind.lease_of(piece)
        try:
            async with self._store.begin() as session:
                await release_lease(session, name, self._holder)
                if rest:
                    await hold_lease(session, name, NOBODY, seconds=rest)
            if failure is not None:
                async with self._store.begin() as session:
                    await self._kind.interrupted(session, piece, failure)
        except (SQLAlchemyError, OSError) as error:
            log.warning("The lease '%s' could not be given up and ends by itself: %s", name, error)
