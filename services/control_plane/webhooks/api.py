"""The routes for webhook endpoints, the URLs to which the service sends messages about jobs and evaluations.

Only the responses of create and rotate_secret contain the secret with which messages are signed.
"""

from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Depends, Request, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationInfo
from sqlalchemy.ext.asyncio import AsyncSession
from typing_extensions import TypedDict

from services.control_plane.core.documents import Page, answers
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.core.responses import deleted, listing, seconds
from services.control_plane.core.store import page
from services.control_plane.core.tables import WebhookEndpoint
from services.control_plane.http.dependencies import IdempotentPart, Limit, SettingsPart, StorePart
from services.control_plane.http.validation import Text
from services.control_plane.webhooks import webhooks
from services.control_plane.webhooks.outbox import Sender, Unreachable

router = APIRouter()


async def _sender(request: Request) -> Sender:
    return cast(Sender, request.app.state.sender)


SenderPart = Annotated[Sender, Depends(_sender)]


def _event_type(name: str, info: ValidationInfo) -> str:
    if name not in webhooks.EVENT_TYPES:
        message = f"The event type '{name:.80}' does not exist; choose from {', '.join(webhooks.EVENT_TYPES)}."
        raise InvalidRequest(message, param=info.field_name, code="unsupported_value")
    return name


Name = Annotated[str, StringConstraints(min_length=1, max_length=64)]
EventType = Annotated[str, AfterValidator(_event_type)]
EventTypes = Annotated[list[EventType], Field(min_length=1), AfterValidator(lambda given: sorted(set(given)))]


class CreateWebhook(BaseModel):
    """The JSON body of POST /v1/webhook_endpoints, which registers a URL for messages about jobs and evaluations: a
    name, the URL, and the types of messages.
    """

    model_config = ConfigDict(extra="forbid")
    name: Name
    url: Text
    event_types: EventTypes


class UpdateWebhook(BaseModel):
    """The JSON body of POST /v1/webhook_endpoints/{id}, which changes an endpoint. Fields that are left out stay as
    they are."""

    model_config = ConfigDict(extra="forbid")
    name: Name = ""
    url: Text = ""
    event_types: EventTypes = []


class RotateSecret(BaseModel):
    """The JSON body of POST /v1/webhook_endpoints/{id}/rotate_secret, which replaces the secret that signs messages."""

    model_config = ConfigDict(extra="forbid")
    keep_old_secret_active_for_24_hours: bool = False


class SendTest(BaseModel):
    """The JSON body of POST /v1/webhook_endpoints/{id}/test, which sends a test message of the type `event_type`."""

    model_config = ConfigDict(extra="forbid")
    event_type: EventType


class StateDocument(TypedDict):
    """What raydpo adds to the JSON object of a webhook endpoint: when an answer 410 disabled it, in Unix seconds."""

    disabled_at: int | None


class WebhookDocument(TypedDict):
    """The JSON object of a webhook endpoint."""

    id: str
    object: Literal["webhook_endpoint"]
    created_at: int
    updated_at: int
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str
    x_raydpo: StateDocument


class NewWebhookDocument(WebhookDocument):
    """The JSON object of a webhook endpoint that is new, or whose secret is, with the secret that signs messages."""

    signing_secret: str


class EventTypesDocument(TypedDict):
    """The list of the types of messages."""

    object: Literal["list"]
    data: list[str]


class TestDocument(TypedDict):
    """The result of a test message: the HTTP status with which the endpoint answered."""

    object: Literal["webhook_endpoint.test"]
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: Literal[True]


class DeletedWebhookDocument(TypedDict):
    """The response to a request that deletes a webhook endpoint."""

    id: str
    object: Literal["webhook_endpoint.deleted"]
    deleted: Literal[True]


@router.get("/webhook_event_types", responses=answers(EventTypesDocument))
async def event_types() -> dict[str, Any]:
    return {"object": "list", "data": webhooks.EVENT_TYPES}


@router.post("/webhook_endpoints", responses=answers(NewWebhookDocument))
async def create(idempotent: IdempotentPart, settings: SettingsPart, body: CreateWebhook) -> Response:
    webhooks.check_url(body.url, settings)

    async def add(session: AsyncSession) -> dict[str, Any]:
        return _webhook_object(await webhooks.create(session, body.model_dump()), with_secret=True)

    return await idempotent.act(add)


@router.get("/webhook_endpoints", responses=answers(Page[WebhookDocument]))
async def list_endpoints(store: StorePart, after: str | None = None, limit: Limit = 20) -> dict[str, Any]:
    """Lists the project's webhook endpoints, newest first."""
    async with store.look() as session:
        keys = [WebhookEndpoint.created_at, WebhookEndpoint.id]
        rows, more = await page(session, webhooks.listed(), keys, after=after, limit=limit)
    return listing([_webhook_object(row) for row in rows], more)


@router.get("/webhook_endpoints/{endpoint_id}", responses=answers(WebhookDocument))
async def retrieve(store: StorePart, endpoint_id: str) -> dict[str, Any]:
    async with store.look() as session:
        return _webhook_object(await webhooks.find(session, endpoint_id))


@router.post("/webhook_endpoints/{endpoint_id}", responses=answers(WebhookDocument))
async def update(idempotent: IdempotentPart, settings: SettingsPart, endpoint_id: str, body: UpdateWebhook) -> Response:
    values = body.model_dump(exclude_unset=True)
    if "url" in values:
        webhooks.check_url(body.url, settings)

    async def change(session: AsyncSession) -> dict[str, Any]:
        return _webhook_object(await webhooks.change(session, endpoint_id, values))

    return await idempotent.act(change, changes=endpoint_id)


@router.delete("/webhook_endpoints/{endpoint_id}", responses=answers(DeletedWebhookDocument))
async def delete(idempotent: IdempotentPart, endpoint_id: str) -> Response:
    async def remove(session: AsyncSession) -> dict[str, Any]:
        await webhooks.remove(session, endpoint_id)
        return deleted("webhook_endpoint.deleted", endpoint_id)

    return await idempotent.act(remove, changes=endpoint_id)


@router.post("/webhook_endpoints/{endpoint_id}/rotate_secret", responses=answers(NewWebhookDocument))
async def rotate_secret(idempotent: IdempotentPart, endpoint_id: str, body: RotateSecret | None = None) -> Response:
    keep_old = body is not None and body.keep_old_secret_active_for_24_hours

    async def rotate(session: AsyncSession) -> dict[str, Any]:
        return _webhook_object(await webhooks.rotate_secret(session, endpoint_id, keep_old=keep_old), with_secret=True)

    return await idempotent.act(rotate, changes=endpoint_id)


@router.post("/webhook_endpoints/{endpoint_id}/test", responses=answers(TestDocument))
async def test(store: StorePart, sender: SenderPart, endpoint_id: str, body: SendTest) -> dict[str, Any]:
    """Sends a test message to the endpoint now. A resent request sends the message again."""
    async with store.begin() as session:
        endpoint = await webhooks.find(session, endpoint_id)
    try:
        status = await sender.send(endpoint, webhooks.event(body.event_type, webhooks.sample_id(body.event_type)))
    except Unreachable as error:
        raise InvalidRequest(
            f"The webhook endpoint could not be reached: {error}; check its URL and its server.",
            code="webhook_unreachable",
        ) from None
    return {
        "object": "webhook_endpoint.test",
        "webhook_endpoint_id": endpoint_id,
        "event_type": body.event_type,
        "status_code": status,
        "success": True,
    }


def _webhook_object(row: WebhookEndpoint, *, with_secret: bool = False) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "webhook_endpoint",
        "created_at": seconds(row.created_at),
        "updated_at": seconds(row.updated_at or row.created_at),
        "name": row.name,
        "url": row.url,
        "event_types": row.event_types,
        "signing_secret_hint": f"whsec_…{row.secret[-4:]}",
        **({"signing_secret": row.secret} if with_secret else {}),
        "x_raydpo": {"disabled_at": seconds(row.disabled_at)},
    }
