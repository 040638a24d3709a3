"""Sends webhook messages from the outbox, a table with one row for each message to one endpoint (a user's URL).

A sender runs in every control plane. A sender claims a row before it sends the message: it sets the time from which the
row is due again. No other sender takes the row before this time. If the sender dies before it has stored the result,
the message is sent again, with the same webhook-id. Receivers should ignore messages with an id that they have already
received.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from operator import itemgetter
from typing import Any, NamedTuple

import httpx
from sqlalchemy import ColumnElement, Interval, Select, bindparam, case, cast, func, or_, select, true, update
from sqlalchemy.ext.asyncio import AsyncSession

from services import outbound
from services.contract import storable
from services.control_plane.core.log_setup import Trouble
from services.control_plane.core.store import Store
from services.control_plane.core.tables import Outbound, WebhookEndpoint
from services.control_plane.core.telemetry import WEBHOOK_SENDS
from services.control_plane.settings import Settings
from services.control_plane.webhooks import webhooks
from services.uri import InvalidUri

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
SEND_SECONDS = 15.0  # from the DNS look-up to the answer's headers
LEASE_SECONDS = 60.0  # how long a claimed row is not due; longer than a send takes
AT_ONCE, AT_ONCE_TO_ONE = 64, 4  # sends under way in one control plane, and to one endpoint
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5.0, 6 * 3600.0
LONGEST_CLOSED_SECONDS = 900.0  # the longest pause after which a failing endpoint is tried again
TRIED_FOR = timedelta(hours=72)  # after this time a message is given up


class Unreachable(Exception):
    """Raised if the endpoint did not answer. The message gives the reason, for the endpoint's owner."""


class Claim(NamedTuple):
    """A row of the outbox, the table of webhook messages. This process has claimed the row, so that no other process
    sends the message.
    """

    id: int
    body: dict[str, Any]
    num_sends: int  # including this send
    endpoint: WebhookEndpoint

    @property
    def place(self) -> tuple[str, str]:
        """Returns the ids of the message's project and endpoint. The number of sends under way is limited for each such
        pair.
        """
        return self.endpoint.project_id, self.endpoint.id


class End(NamedTuple):
    """The result of one send of a webhook message to an endpoint: a text for the endpoint's owner, and whether the
    message is sent again later.
    """

    claim: Claim
    outcome: str  # as text, for the endpoint's owner
    again: bool  # whether the message is sent again later


# With a `pause` of None, the message is not sent again, and the endpoint counts as working.
_PAUSE = cast(bindparam("pause"), Interval)
_THEN = func.clock_timestamp() + _PAUSE
NOTE_MESSAGE = (
    update(Outbound)
    .where(Outbound.id == bindparam("message"))
    # A send that took longer than its lease stores no failure, because another sender may have claimed the row.
    .where(or_(Outbound.num_sends == bindparam("sends"), _PAUSE.is_(None)))
    .values(due_at=case((Outbound.created_at + TRIED_FOR > _THEN, _THEN)), outcome=bindparam("text"))
)
NOTE_ENDPOINT = (
    update(WebhookEndpoint)
    .where(WebhookEndpoint.id == bindparam("endpoint"))
    .values(num_failures=bindparam("failures"), retry_at=_THEN)
)


class Sender:
    """Sends the webhook messages whose time has come, to many endpoints (URLs of users) at the same time. The messages
    are in the outbox, a table of the database.

    A slow or dead endpoint delays only the messages of its own project.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._client = outbound.async_client(settings.webhook_urls, webhooks.SETTING, max_lookups=AT_ONCE)
        self._under_way: Counter[tuple[str, str]] = Counter()  # sends under way, by project and endpoint
        self._ends: list[End] = []  # the results that are not stored yet; their sends count as under way
        self._send_ended = asyncio.Event()
        self._trouble = Trouble(log, "Sender")

    async def close(self) -> None:
        await self._client.aclose()

    async def run(self) -> None:
        """Sends messages whose time has come, until cancelled. If a send is interrupted, the message is sent again
        after LEASE_SECONDS, perhaps by another process.
        """
        async with asyncio.TaskGroup() as sends:
            while True:
                self._send_ended.clear()
                try:
                    await self._note_ends()
                    while claims := await self._claim():
                        for claim in claims:
                            sends.create_task(self._deliver(claim))
                    self._trouble.passed()
                except Exception as error:  # nobody watches this task, so it goes on after any error
                    message = "The webhook messages to send could not be read; this is tried again, and they wait"
                    self._trouble.failed(message, exc_info=error)
                    await asyncio.sleep(TICK_SECONDS)
                await _until(self._send_ended, TICK_SECONDS)

    async def send(self, endpoint: WebhookEndpoint, body: Mapping[str, Any]) -> int:
        """Signs a message and sends it to the endpoint. Returns the HTTP status of the answer.

        Raises Unreachable if no answer comes.
        """
        content, headers = webhooks.signed(endpoint, body)
        try:
            async with (
                asyncio.timeout(SEND_SECONDS),
                self._client.stream("POST", endpoint.url, content=content, headers=headers) as answer,
            ):
                return answer.status_code  # the body is not read, because it may have any size
        except TimeoutError:
            raise Unreachable(f"it did not answer within {SEND_SECONDS:.0f} seconds") from None
        except (InvalidUri, httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unreachable(str(error) or type(error).__name__) from error

    async def _claim(self) -> list[Claim]:
        """Claims the rows of the outbox (the table of messages) to send now: the oldest due row of each endpoint, until
        AT_ONCE sends are under way.

        A row is due if the time to send its message has come. Projects take turns. A claimed row is not due for other
        senders until LEASE_SECONDS have passed.
        """
        if self._under_way.total() >= AT_ONCE:
            return []
        async with self._store.begin() as session:
            rows = await session.execute(self._oldest_due())
            if not (claims := self._with_places(Claim(*row) for row in rows)):
                return []
            leased = {"due_at": _in_seconds(LEASE_SECONDS), "num_sends": Outbound.num_sends + 1}
            await session.execute(update(Outbound).where(Outbound.id.in_([c.id for c in claims])).values(leased))
            failing = [claim.endpoint.id for claim in claims if claim.endpoint.num_failures]
            await _close(session, failing, LEASE_SECONDS)  # a failing endpoint gets one message at a time
        return claims

    def _oldest_due(self) -> Select[Any]:
        """Returns the SQL query for the oldest row of each endpoint among the rows whose time to send has come.

        The query uses an index, so its cost does not depend on the number of rows that wait.
        """
        due, of = Outbound.due_at <= func.now(), WebhookEndpoint
        waiting = select(Outbound.id, Outbound.due_at).where(Outbound.endpoint_id == of.id, due)
        oldest = waiting.order_by(Outbound.due_at, Outbound.id).limit(1).lateral("oldest")
        turn = func.row_number().over(partition_by=of.project_id, order_by=oldest.c.due_at).label("turn")
        turns = select(oldest.c.id, turn).select_from(of).join(oldest, true())
        turns = turns.where(or_(of.retry_at.is_(None), of.retry_at <= func.now()), of.id.not_in(self._full()))
        first = turns.order_by(turn, oldest.c.due_at).limit(AT_ONCE).subquery()
        query = select(Outbound.id, Outbound.body, Outbound.num_sends + 1, of).join(of)
        query = query.join(first, first.c.id == Outbound.id).where(due).order_by(first.c.turn, Outbound.due_at)
        return query.with_for_update(of=Outbound, skip_locked=True)

    def _full(self) -> list[str]:
        """Returns the ids of the endpoints (users' URLs) to which AT_ONCE_TO_ONE messages, the most allowed, are being
        sent now."""
        return [endpoint for (_, endpoint), count in self._under_way.items() if count >= AT_ONCE_TO_ONE]

    def _with_places(self, claims: Iterable[Claim]) -> list[Claim]:
        """Returns those claims (rows of messages to send) that may be sent now, and counts them as under way.

        At most AT_ONCE sends are under way. A project may begin another send only while it has fewer sends under way
        than AT_ONCE still leaves free. So a project with slow endpoints takes at most half of AT_ONCE, and two such
        projects leave a third free.
        """
        sent, per_project = [], Counter[str]()
        for (project, _), count in self._under_way.items():
            per_project[project] += count
        for claim in claims:
            if per_project[claim.endpoint.project_id] < AT_ONCE - per_project.total():
                per_project[claim.endpoint.project_id] += 1
                self._under_way[claim.place] += 1
                sent.append(claim)
        return sent

    async def _deliver(self, claim: Claim) -> None:
        """Sends the message of the claimed row. Keeps the result until `_note_ends` stores it. Logs any error."""
        try:
            end = End(claim, *await self._try(claim))
            self._ends.append(end)
        except Exception:  # one row's error must not end the sender; the row is due again when its lease ends
            log.exception("The webhook message %s to endpoint %s was not sent", claim.body["id"], claim.endpoint.id)
            self._under_way -= Counter([claim.place])
        self._send_ended.set()

    async def _try(self, claim: Claim) -> tuple[str, bool]:
        """Sends the message of the claimed row. Returns the result as text, and whether to send the message again."""
        endpoint = claim.endpoint
        if endpoint.deleted_at or endpoint.disabled_at:
            return "not sent: the endpoint is disabled or deleted", False
        try:
            status = await self.send(endpoint, claim.body)
        except Unreachable as error:
            WEBHOOK_SENDS.labels("unreachable").inc()
            return f"not reached: {error}", True
        WEBHOOK_SENDS.labels(f"{status // 100}xx").inc()
        if status == httpx.codes.GONE:
            await self._disable(endpoint)
        return f"answered {status}", not (200 <= status < 300 or status == httpx.codes.GONE)

    async def _disable(self, endpoint: WebhookEndpoint) -> None:
        """Disables an endpoint that answered 410 Gone, unless its URL was changed meanwhile."""
        there = update(WebhookEndpoint).where(WebhookEndpoint.id == endpoint.id, WebhookEndpoint.url == endpoint.url)
        async with self._store.begin() as session:
            await session.execute(there.values(disabled_at=func.now()))

    async def _note_ends(self) -> None:
        """Stores the results of the sends that have ended, in one transaction for all of them.

        Many sends to slow endpoints end in the same moment, and one transaction for each would take all connections to
        the database. If the transaction fails, the results are lost, and the messages are sent again when LEASE_SECONDS
        have passed since the messages were claimed.
        """
        ends, self._ends = self._ends, []
        if not ends:
            return
        try:
            async with self._store.begin() as session:
                connection = await session.connection()
                # All senders lock the rows in this order, so they do not wait for each other in a circle.
                messages, endpoints = map(_message_values, ends), filter(None, map(_endpoint_values, ends))
                await connection.execute(NOTE_MESSAGE, sorted(messages, key=itemgetter("message")))
                if by_endpoint := sorted(endpoints, key=itemgetter("endpoint")):
                    await connection.execute(NOTE_ENDPOINT, by_endpoint)
        finally:
            self._under_way -= Counter(end.claim.place for end in ends)
        for claim, outcome, _ in ends:
            message = "Webhook message %s to endpoint %s, try %d: %s"
            shown = outcome.partition(":")[0]  # the rest may quote the URL, which may hold a secret of its owner
            log.info(message, claim.body["id"], claim.endpoint.id, claim.num_sends, shown)


def _message_values(end: End) -> dict[str, Any]:
    """Returns the parameters of the SQL statement NOTE_MESSAGE, which stores the result of a send in the row of the
    message.
    """
    pause = timedelta(seconds=pause_seconds(end.claim.num_sends)) if end.again else None
    text = storable(end.outcome)[:500]
    return {"message": end.claim.id, "sends": end.claim.num_sends, "pause": pause, "text": text}


def _endpoint_values(end: End) -> dict[str, Any] | None:
    """Returns the parameters of the SQL statement NOTE_ENDPOINT, which stores the result of a send in the endpoint's
    row.

    After a failure, nothing is sent to the endpoint for a while. Returns None if there is nothing to store, because the
    endpoint answered this message and the one before.
    """
    endpoint = end.claim.endpoint
    if not end.again:
        return {"endpoint": endpoint.id, "failures": 0, "pause": None} if endpoint.num_failures else None
    failures = endpoint.num_failures + 1  # sends that fail at the same time count once
    pause = timedelta(seconds=min(pause_seconds(failures), LONGEST_CLOSED_SECONDS))
    return {"endpoint": endpoint.id, "failures": failures, "pause": pause}


async def _close(session: AsyncSession, endpoint_ids: Sequence[str], seconds: float) -> None:
    """Stores that no waiting message is sent to the endpoints `endpoint_ids` for the next `seconds`."""
    if endpoint_ids:
        closed = update(WebhookEndpoint).where(WebhookEndpoint.id.in_(endpoint_ids))
        await session.execute(closed.values(retry_at=_in_seconds(seconds)))


async def give_up_old(session: AsyncSession) -> None:
    """Gives up webhook messages that have waited for 72 hours, because their endpoints (users' URLs) fail. These
    messages are never sent.
    """
    failing = select(WebhookEndpoint.id).where(WebhookEndpoint.num_failures > 0)
    old = update(Outbound).where(Outbound.due_at.is_not(None), Outbound.created_at < func.now() - TRIED_FOR)
    outcome = func.coalesce(Outbound.outcome, "not sent: the endpoint did not answer for 72 hours")
    await session.execute(old.where(Outbound.endpoint_id.in_(failing)).values(due_at=None, outcome=outcome))


def pause_seconds(num_sends: int) -> float:
    """Returns how many seconds to wait before the next send of a message that failed `num_sends` times.

    The number doubles with each failure, up to a limit. A random change of up to 20% spreads the sends of many
    messages.
    """
    pause: float = min(FIRST_PAUSE_SECONDS * 2 ** min(num_sends - 1, 30), LONGEST_PAUSE_SECONDS)
    return pause * random.uniform(0.8, 1.2)


def _in_seconds(seconds: float) -> ColumnElement[datetime]:
    """Returns the SQL expression for the time that is `seconds` after now, by the database's clock."""
    return func.clock_timestamp() + timedelta(seconds=seconds)


async def _until(event: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return
