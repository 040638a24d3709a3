"""Makes a request that changes data act only once, however often the client sends it.

The change, the response and the audit entry are written in one transaction. A retry (a repeated send of the same
request) gets the stored response. The service recognizes a retry by the header `Idempotency-Key`, or by
`x-stainless-retry-count`, which OpenAI's clients send when they resend a request by themselves.
"""

import json
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from sqlalchemy import Interval, bindparam, delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.auth.keys import Caller, digest
from services.control_plane.core.errors import InFlight, InvalidRequest
from services.control_plane.core.store import ProjectStore, append
from services.control_plane.core.tables import Answer, AuditEntry, Project

KEPT = timedelta(hours=24)
RESENT_WITHIN = timedelta(minutes=15)  # OpenAI's clients resend after ten minutes without an answer, and a pause
LONGEST_KEY = 255

# The statements are built once, because building one takes as long as running it.
NAME = func.hashtextextended(bindparam("name"), 0)
TURN, SHARED_TURN = (
    select(Project, func.now().label("now"), take(NAME)).where(Project.id == bindparam("project_id"))
    for take in (func.pg_advisory_xact_lock, func.pg_advisory_xact_lock_shared)
)
# This query looks at responses of all projects, because admins of several projects may change one object.
NEWEST_ABOUT = (
    select(Answer.__table__)
    .where(Answer.__table__.c.object_id == bindparam("object_id"))
    .order_by(Answer.__table__.c.id.desc())
    .limit(1)
    .subquery()
)
NEWEST_OF_SAME, STILL_THE_NEWEST = (
    select(answers.c.body)
    .where(answers.c.project_id == bindparam("project_id"), answers.c.request == bindparam("request"))
    .where(answers.c.content == bindparam("content"))
    .where(answers.c.retry_count != bindparam("retry_count"))
    .where(answers.c.created_at > func.clock_timestamp() - bindparam("within", type_=Interval))
    .order_by(answers.c.id.desc())
    .limit(1)
    for answers in (Answer.__table__, NEWEST_ABOUT)
)


class IdempotentRequest:
    """A request that changes data. Its method `act` makes the change, or answers a retry with the stored response."""

    def __init__(self, request: Request, store: ProjectStore, caller: Caller) -> None:
        self._request, self._store, self._caller = request, store, caller
        self._began = time.monotonic()
        self._what = digest(f"{caller.key_id} {request.method} {request.url.path}")
        self._retry_count = _retry_count(request)

    async def act(
        self,
        work: Callable[[AsyncSession], Awaitable[dict[str, Any]]],
        *,
        changes: str | None = None,
        content: str | None = None,
        secret: str | None = None,
    ) -> JSONResponse:
        """Runs `work`, which makes the change, and returns its result as the response. For a retry, returns the stored
        response.

        - `work` must not commit. If `work` raises an error, nothing is stored.
        - `changes` is the id of the object that `work` changes, None if `work` creates an object. If another request
          has changed the object since the first send, a retry without an Idempotency-Key runs `work` again.
        - `content` is a text that identifies the body, if the body is not JSON. None means a JSON body.
        - `secret` is the name of a field of the response that is not stored. A retry gets null in this field.
        """
        key = self._key()
        sent = digest(content if content is not None else await self._body())
        async with self._store.begin() as session:
            if key is not None:
                await self._take_key(session, key)
                answer = await self._answer_of(session, key, sent)
                earlier = answer.body if answer else None
            else:
                await self._take_turn(session, sent)
                earlier = await self._earlier(session, sent, changes)
            if earlier is not None:
                header = "x-raydpo-deduplicated" if key is None else "idempotent-replayed"
                return JSONResponse(earlier, headers={header: "true"})
            body = await work(session)
            row = Answer(idempotency_key=key, request=self._what, content=sent, retry_count=self._retry_count)
            row.object_id = changes
            row.body = body if secret is None else {**body, secret: None}
            append(session, row)
            append(session, self._audit_entry(body))
        return JSONResponse(body)

    def _audit_entry(self, body: dict[str, Any]) -> AuditEntry:
        """Returns the entry of this request for the audit log. `body` is the response.

        The entry names one object: the one whose id is in the response, or else the last id in the request's path.
        """
        request = self._request
        named = body.get("id") or next(reversed(request.path_params.values()), None)
        return AuditEntry(
            project_id=self._caller.project_id,
            key_id=self._caller.key_id,
            request_id=request.state.request_id,
            action=f"{request.method} {request.scope['route'].path}",
            object_id=named,
            status=200,
        )

    async def _body(self) -> str:
        """Returns the JSON body as text with sorted keys and uniform spaces, so that equal bodies give equal texts."""
        raw = await self._request.body()
        return json.dumps(json.loads(raw), sort_keys=True) if raw else ""

    # --- Idempotency-Key ---------------------------------------------------------------------------

    def _key(self) -> str | None:
        key = self._request.headers.get("idempotency-key")
        if key is not None and not 0 < len(key) <= LONGEST_KEY:
            message = f"The header Idempotency-Key has {len(key)} characters; it must have 1 to {LONGEST_KEY}."
            raise InvalidRequest(message, param="Idempotency-Key")
        return key

    async def _take_key(self, session: AsyncSession, key: str) -> None:
        """Locks the Idempotency-Key until the transaction ends. Raises InFlight if another request with this key holds
        the lock."""
        name = func.hashtextextended(f"{self._store.project_id} {key}", 0)
        if not await session.scalar(select(func.pg_try_advisory_xact_lock(name))):
            raise InFlight(
                "Another request with this Idempotency-Key is still being answered; "
                "wait a moment and send this request again."
            )

    async def _answer_of(self, session: AsyncSession, key: str, sent: str) -> Answer | None:
        """Returns the stored response for this Idempotency-Key. Returns None if no response is stored. Deletes a stored
        response that is more than a day old, and returns None.

        `sent` is the digest of the body. Raises InvalidRequest if the key was sent before with another request.
        """
        query = select(Answer, Answer.created_at > func.now() - KEPT).where(Answer.idempotency_key == key)
        if (row := (await session.execute(query)).first()) is None:
            return None
        answer, in_force = row
        if not in_force:
            await session.execute(delete(Answer).where(Answer.id == answer.id))
            return None
        if (answer.request, answer.content) != (self._what, sent):
            message = (
                f"Idempotency-Key '{key}' was sent before with another request; use a new key for each new request."
            )
            raise InvalidRequest(message, param="Idempotency-Key", code="idempotency_key_in_use")
        return answer

    # --- silent resends ----------------------------------------------------------------------------

    async def _take_turn(self, session: AsyncSession, sent: str) -> None:
        """Takes a lock for requests with the same content, whose digest is `sent`, until the transaction ends.

        The lock is shared for a first send and exclusive for a retry. So first sends do not wait for each other, but a
        retry waits until the first send has ended. The SQL statement that takes the lock also reads the project and the
        current time, which are stored in `session.info`.
        """
        values = {"name": f"{self._what} {sent}", "project_id": self._store.project_id}
        turn = (await session.execute(TURN if self._retry_count else SHARED_TURN, values)).one()
        session.info.update(project=turn.Project, now=turn.now)

    async def _earlier(self, session: AsyncSession, sent: str, changes: str | None) -> dict[str, Any] | None:
        """Returns the stored response to another send of the same request. Returns None if there is none, or if the
        request must act again.

        `sent` is the digest of the body. `changes` is the id of the object that the request changes, None if it creates
        one. A retry finds the responses of the last 15 minutes. A first send finds only the response to a retry that
        overtook it: the retry's transaction began after the first send had arrived. If another request has changed the
        object meanwhile, a change acts again; a deletion does not.
        """
        arrived = timedelta(seconds=time.monotonic() - self._began)
        values: dict[str, Any] = {
            "project_id": self._store.project_id,
            "request": self._what,
            "content": sent,
            "retry_count": self._retry_count,
            "within": RESENT_WITHIN if self._retry_count else arrived,
            "object_id": changes,
        }
        final = changes is None or self._request.method == "DELETE"  # no other request undoes a creation or a deletion
        return await session.scalar(NEWEST_OF_SAME if final else STILL_THE_NEWEST, values)


def _retry_count(request: Request) -> int:
    """Returns which retry of a request this is, from the header `x-stainless-retry-count` of OpenAI's clients.

    Returns 0 for the first send, and for clients that do not send the header.
    """
    given = request.headers.get("x-stainless-retry-count", "")
    return int(given) if given.isascii() and given.isdigit() and len(given) < 4 else 0


async def forget_old(session: AsyncSession) -> None:
    """Deletes the stored responses that are more than a day old."""
    await session.execute(delete(Answer).where(Answer.created_at < func.now() - KEPT))
