"""Manages a project's webhook endpoints (URLs of users), and writes and signs the messages which say that a job or an
evaluation of the project has ended.

The transaction that ends it writes the messages to the table `outbox`, so a message is sent if and only if the job or
the evaluation ended. The module `outbox` sends the messages.
"""

import base64
import json
import secrets
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import Select, any_, func, insert, literal, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession
from standardwebhooks import Webhook

from services import outbound
from services.control_plane.core.errors import InvalidRequest, NotFound
from services.control_plane.core.store import now, project_of
from services.control_plane.core.tables import EVALUATION_ENDS, TERMINAL, Outbound, WebhookEndpoint
from services.control_plane.settings import Settings
from services.control_plane.tenants import projects
from services.uri import InvalidUri, check

SETTING = "webhook_urls"
JOB_EVENTS = {state: f"fine_tuning.job.{state}" for state in TERMINAL}
EVALUATION_EVENTS = {state: f"eval.run.{state}" for state in EVALUATION_ENDS} | {"cancelled": "eval.run.canceled"}
"""The types of messages, as OpenAI names them, by the state in which a job or an evaluation ends."""
EVENT_TYPES = (*JOB_EVENTS.values(), *EVALUATION_EVENTS.values())
MAX_ENDPOINTS = 100  # the most endpoints of a project; the end of a job or an evaluation writes a row for each
OLD_SECRET_KEPT = timedelta(hours=24)


# --- endpoints ---------------------------------------------------------------------------------


def listed() -> Select[WebhookEndpoint]:
    return select(WebhookEndpoint).where(WebhookEndpoint.deleted_at.is_(None))


async def create(session: AsyncSession, values: Mapping[str, Any]) -> WebhookEndpoint:
    await projects.lock(session, project_of(session))  # so that endpoints that are created at the same time are counted
    existing = await session.scalar(select(func.count()).select_from(listed().subquery())) or 0
    if existing >= MAX_ENDPOINTS:
        raise InvalidRequest(
            f"The project has {existing} webhook endpoints, which is the limit; delete an endpoint first."
        )
    endpoint = WebhookEndpoint(id=f"we_{secrets.token_hex(12)}", secret=_new_secret(), **values)
    session.add(endpoint)
    await session.flush()
    await session.refresh(endpoint)
    return endpoint


async def find(session: AsyncSession, endpoint_id: str, *, lock: bool = False) -> WebhookEndpoint:
    query = listed().where(WebhookEndpoint.id == endpoint_id)
    endpoint = await session.scalar(query.with_for_update() if lock else query)
    if endpoint is None:
        raise NotFound(
            f"There is no webhook endpoint with the id '{endpoint_id}'; list the endpoints for their ids.",
            param="webhook_endpoint_id",
        )
    return endpoint


async def change(session: AsyncSession, endpoint_id: str, values: Mapping[str, Any]) -> WebhookEndpoint:
    """Sets columns of the endpoint to `values`, and returns the endpoint. If `values` has a URL, even the same one, a
    disabled endpoint is enabled.

    Raises NotFound if the project has no such endpoint.
    """
    endpoint = await find(session, endpoint_id, lock=True)
    anew = {"disabled_at": None, "num_failures": 0, "retry_at": None}
    wanted = {**values, **(anew if "url" in values else {})}
    differing = {name: value for name, value in wanted.items() if getattr(endpoint, name) != value}
    for name, value in differing.items():
        setattr(endpoint, name, value)
    if differing:
        endpoint.updated_at = await now(session)
    return endpoint


async def rotate_secret(session: AsyncSession, endpoint_id: str, *, keep_old: bool) -> WebhookEndpoint:
    """Gives the endpoint a new secret for signing, and returns the endpoint. Raises NotFound if there is no such
    endpoint.

    If `keep_old` is true, messages are signed with both the old and the new secret for 24 hours.
    """
    endpoint, at = await find(session, endpoint_id, lock=True), await now(session)
    endpoint.old_secret, endpoint.old_secret_until = (
        (endpoint.secret, at + OLD_SECRET_KEPT) if keep_old else (None, None)
    )
    endpoint.secret, endpoint.updated_at = _new_secret(), at
    return endpoint


async def remove(session: AsyncSession, endpoint_id: str) -> None:
    (await find(session, endpoint_id, lock=True)).deleted_at = datetime.now(UTC)


def check_url(url: str, settings: Settings) -> None:
    """Raises InvalidRequest if the service may not send webhooks to the URL: the setting `webhook_urls` does not allow
    it, it has no host, or its host is a private IP address that the setting does not name. Makes no connection.
    """
    try:
        check(url, settings.webhook_urls, SETTING)
        if not urlsplit(url).hostname:
            raise InvalidUri(f"The URL {url} has no host; write the host after https://.")
        outbound.check_literal(url, settings.webhook_urls, SETTING)
    except InvalidUri as error:
        raise InvalidRequest(str(error), param="url") from None


def _new_secret() -> str:
    return f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"


# --- messages ------------------------------------------------------------------------------


async def announce(session: AsyncSession, project_id: str, event_type: str, of: str) -> None:
    """Writes messages which say that a job or an evaluation has ended. `event_type` says how it ended, and `of` is its
    id. Each of the project's endpoints (users' URLs) that wants messages of this type gets one.

    The messages go into the outbox, the table of messages to send.
    """
    body = event(event_type, of)
    message = (WebhookEndpoint.id, literal(body["id"]), literal(body, JSONB), literal(0))
    messages = select(*message).where(
        WebhookEndpoint.project_id == project_id,
        WebhookEndpoint.deleted_at.is_(None),
        WebhookEndpoint.disabled_at.is_(None),
        literal(event_type) == any_(WebhookEndpoint.event_types),
    )
    columns = ["endpoint_id", "event_id", "body", "num_sends"]
    await session.execute(insert(Outbound).from_select(columns, messages))


def event(event_type: str, of: str) -> dict[str, Any]:
    """Returns the body of a webhook message, with a new id and the current time. `event_type` is, for example,
    `fine_tuning.job.succeeded`, and `of` the id of the job or the evaluation.
    """
    return {
        "id": f"evt_{secrets.token_hex(12)}",
        "object": "event",
        "created_at": int(time.time()),
        "type": event_type,
        "data": {"id": of},
    }


def sample_id(event_type: str) -> str:
    """Returns the id that a test message of this type names. Nothing has this id."""
    return "ftjob-test" if event_type in JOB_EVENTS.values() else "eval-test"


def signed(endpoint: WebhookEndpoint, body: Mapping[str, Any]) -> tuple[bytes, dict[str, str]]:
    """Returns the bytes to send for a message, and the HTTP headers with their signature.

    While the endpoint's old secret is active, the headers have a second signature.
    """
    at, content = datetime.now(UTC), json.dumps(body, separators=(",", ":"))
    keys = [endpoint.secret]
    if endpoint.old_secret and endpoint.old_secret_counts:
        keys.append(endpoint.old_secret)
    return content.encode(), {
        "content-type": "application/json",
        "user-agent": "raydpo-webhooks",
        "webhook-id": body["id"],
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": " ".join(Webhook(key).sign(body["id"], at, content) for key in keys),
    }
