"""Forwards requests for completions to the models on Ray Serve.

If a request's model is not loaded, the control plane has Ray Serve load it, and the request waits. If a model fails or
refuses a request, the client gets an error in OpenAI's JSON form.

While a control plane has unanswered requests to a model, the database holds a record of this, called a mark. A model
with a mark is not unloaded. Marks expire, so each control plane renews its own marks.

Each control plane also ends its own answers of models that were deleted. Ray Serve tells a deletion to one replica
after the other, and not to replicas that are about to end.
"""

import asyncio
import json
import logging
import secrets
import time
from dataclasses import dataclass
from typing import Any

import httpx
from fastapi import Response
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.errors import ApiError, InvalidRequest, NotFound, ReplicaDied, TooLarge, Unavailable
from services.control_plane.core.log_setup import Trouble
from services.control_plane.core.store import ProjectStore, Store
from services.control_plane.inference.metering import Meter
from services.control_plane.inference.streaming import Stream
from services.control_plane.inference.upstream import Answer, Broken, Busy, Upstream
from services.control_plane.models import models
from services.control_plane.models.deployments import deployments
from services.control_plane.models.deployments import settings as deployment_settings
from services.control_plane.models.deployments.engines import Engine, engine_of
from services.control_plane.models.deployments.recent import Found, RecentModels
from services.control_plane.models.models import NamedModel
from services.control_plane.ray_api import RayApi, ServeView
from services.control_plane.settings import Settings

log = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 15
ANSWER_SECONDS = 600  # the longest silence of a model before its request fails
POOL_SECONDS = 5  # the longest wait for one of the `max_requests` connections
LOOK_SECONDS = 0.5  # how often a waiting request checks whether its model runs
ASK_SECONDS = 2.0  # how often all requests that wait for a model write its row in `deployments`
STAY_SECONDS = 10.0  # how often the mark of a model in use is renewed; a mark expires after MARK_SECONDS
LOOP_SECONDS = 0.5  # how often marks are looked at, and answers of deleted models are ended
LEAVE_SECONDS = 1.0  # a mark stays this long after the last request, because the next request often follows soon
VIEW_SECONDS = 2.0  # a request uses the last known state of Ray Serve if it is at most this old
OF_A_REPLICA = "x-request-id"  # Ray Serve's proxy adds this header to a replica's answers, not to its own status 500
REFUSALS: dict[int, type[InvalidRequest | NotFound | TooLarge]] = {400: InvalidRequest, 404: NotFound, 413: TooLarge}


@dataclass
class _Use:
    """What this control plane remembers about its own requests to one model. Times are seconds of the monotonic clock.

    The object holds how many requests are in flight and whether the model accepts more requests. `share` adds up the
    model's time that one request gets if all in flight share it. `is_marked` says whether the database knows that this
    control plane uses the model, so that the model stays loaded.
    """

    in_flight: int = 0
    asked_at: float = float("-inf")
    is_marked: bool = False  # whether the database holds this control plane's mark
    is_open: bool = False  # whether the model accepted new requests when the database was last read
    told_at: float = float("-inf")  # when the database was last read
    left_at: float = 0.0  # when the last request ended
    share: float = 0.0  # seconds that one request would have had of the model, had it always been in flight
    shared_at: float = 0.0  # when `share` was brought up to date

    def must_ask(self) -> bool:
        """Whether this control plane must read the model's row in the table `deployments` again before it sends the
        model another request.
        """
        return time.monotonic() - self.told_at >= (STAY_SECONDS if self.is_open else LOOK_SECONDS)

    def change(self, in_flight: int, now: float) -> None:
        """Adds `in_flight` to the number of this control plane's requests to the model in flight. A negative
        `in_flight` means that requests have ended.

        `now` is the current time. First brings `share` up to date, the seconds of the model's time that one request
        would have had if it had always been in flight: adds the time since the last change, divided by the number of
        requests that were in flight. So the requests in flight share the model's time evenly.
        """
        if self.in_flight:
            self.share += (now - self.shared_at) / self.in_flight
        self.in_flight, self.shared_at = self.in_flight + in_flight, now


class Inference:
    """Forwards requests for completions to the Ray Serve applications of models. Keeps a model loaded while it has
    unanswered requests."""

    def __init__(self, store: Store, ray_api: RayApi, settings: Settings, recent: RecentModels) -> None:
        self._store, self._ray_api, self._settings, self._recent = store, ray_api, settings, recent
        self._upstream = Upstream(
            connections=settings.max_requests, silence_seconds=ANSWER_SECONDS, wait_seconds=POOL_SECONDS
        )
        self._replica = secrets.token_hex(4)  # the name of this control plane in its marks
        self._marking, self._trouble = asyncio.Lock(), Trouble(log, "Inference")
        self._uses: dict[str, _Use] = {}  # by application name; `run` drops the unused ones

    async def run(self) -> None:
        """Calls `end_deleted` and `mark` every LOOP_SECONDS, until cancelled. `mark` renews the records in the database
        by which a model stays loaded while it has requests in flight."""
        while True:
            try:
                await self.end_deleted()
                await self.mark()
                self._trouble.passed()
            except (SQLAlchemyError, OSError) as error:
                message = "The database could not be told which models are in use; this is tried again soon: %s"
                self._trouble.failed(message, error)
            await asyncio.sleep(LOOP_SECONDS)

    async def end_deleted(self) -> None:
        """Ends the answers under way of all models that were deleted. Their clients get an error 404, or an event with
        this error at the end of a stream."""
        if not (model_ids := self._upstream.model_ids):
            return
        async with self._store.begin() as session:
            deleted = await models.deleted_among(session, model_ids)
        for model_id in deleted:
            self._recent.forget()
            error = NotFound(f"The model '{model_id}' was deleted.", param="model", code="model_not_found")
            self._upstream.end(model_id, error)

    async def mark(self) -> None:
        """Renews the records in the database that say to which models this control plane has requests in flight.

        Such a record (a mark) keeps a model loaded. Marks are renewed only every STAY_SECONDS. Removes the marks of
        models that have had no request for LEAVE_SECONDS.
        """
        async with self._marking:
            now, marked = time.monotonic(), {name: use for name, use in self._uses.items() if use.is_marked}
            stay = {name for name, use in marked.items() if use.in_flight and now - use.told_at >= STAY_SECONDS}
            leave = {name for name, use in marked.items() if not use.in_flight and now - use.left_at >= LEAVE_SECONDS}
            if stay or leave:
                async with self._store.begin() as session:
                    is_open = await deployments.stay(session, stay, self._replica)
                    await deployments.leave(session, leave, self._replica)
            for name in stay:
                marked[name].told_at, marked[name].is_open = now, name in is_open
            for name in leave:
                marked[name].is_marked = marked[name].is_open = False
            kept = {name: use for name, use in self._uses.items() if use.is_marked or use.in_flight}
            self._uses = kept | {name: use for name, use in self._uses.items() if now - use.asked_at < ASK_SECONDS}

    async def forward(
        self, caller: ProjectStore, path: str, name: str, body: bytes, meter: Meter, *, streams: bool
    ) -> Response:
        """Sends a client's request `POST /v1/<path>` to the model called `name`, and returns the model's response.

        `body` is the request's JSON, and `meter` counts the tokens of the answer. If `streams` is true, the response
        passes the answer on in pieces, as it arrives. Raises NotFound for an unknown model, InvalidRequest for a reward
        model, and Unavailable if the model is not ready in time.
        """
        found = self._recent.get(caller.project_id, name)
        if found is None:
            async with caller.look() as session:
                found = await self._look_up(session, await models.find(session, self._settings, name))
            await self._note_use(found)
            self._recent.keep(caller.project_id, name, found)
        if found.model.num_outputs:
            message = (
                f"The model '{name}' is a reward model, which scores texts and cannot write any; "
                "send texts to POST /v1/x/rewards."
            )
            raise InvalidRequest(message, param="model", code="invalid_value")
        return await self._forwarded(found, path, body, meter, streams=streams)

    async def want(self, model: NamedModel) -> None:
        """Requests that the model's engine (server on Ray Serve) is loaded, and returns without waiting until it is."""
        async with self._store.begin() as session:
            engine = await engine_of(session, self._settings, model)
        await self._ask(engine)

    async def ask(self, model: NamedModel, path: str, body: bytes, meter: Meter) -> bytes:
        """Sends the service's own request `POST /v1/<path>` to the engine (server) of the model, and returns the body
        of the engine's answer.

        Waits until the model is loaded. `path` may be an internal path, which no client of the API can reach. `meter`
        counts the answer's tokens.
        """
        async with self._store.begin() as session:
            found = await self._look_up(session, model)
        await self._note_use(found)
        return bytes((await self._forwarded(found, path, body, meter, streams=False)).body)

    async def _look_up(self, session: AsyncSession, model: NamedModel) -> Found:
        engine = await engine_of(session, self._settings, model)
        own = (await deployment_settings.of(session, self._settings, {engine.loaded.id}))[engine.loaded.id]
        num_gpus = self._settings.num_gpus_of(own)
        return Found(model, engine, min(num_gpus, 1) if model.num_outputs else num_gpus)

    async def _note_use(self, found: Found) -> None:
        """Records in the database that `found`, the model that a request names, is used now. Does so at most once every
        few minutes for each model.

        Only adapters that share the engine (model server) of their base model are recorded, because the engine's row in
        `deployments` names only the base model.
        """
        if found.engine.adapter and models.must_note_use(found.model):
            async with self._store.begin() as session:
                await models.note_use(session, found.model)

    async def _forwarded(self, found: Found, path: str, body: bytes, meter: Meter, *, streams: bool) -> Response:
        engine, meter.num_gpus = found.engine, found.num_gpus
        base_url = await self._wait_until_served(engine)
        share = self._uses[engine.app_name].share
        answer: Answer | None = None
        stays = False
        try:
            url = f"{base_url}/{await self._ray_api.own_name(engine.app_name)}/v1/{path}"
            answer = await self._upstream.post(url, body, engine.headers, model_id=engine.id)
            if answer.status == 200 and streams:
                stays = True
                return Stream(answer, meter, lambda: self._end(engine, answer, meter, share))
            content = await answer.body()
            if answer.status == 500 and OF_A_REPLICA not in answer.headers:
                log.warning("The replica of the model %s died while it answered", engine.id)
                raise self._unavailable(engine, "stopped while it answered, because its replica died", ReplicaDied)
            if answer.status != 200:
                raise self._refusal(engine, answer.status, content)
            meter.whole(content)
            return Response(content, media_type="application/json")
        except Busy:
            busy = f"cannot be asked now, because models are already answering {self._settings.max_requests} requests"
            raise self._unavailable(engine, busy) from None
        except Broken as error:
            when = "did not answer" if answer is None else "stopped while it answered"
            log.warning("The model %s %s: %s", engine.id, when, error)
            raise self._unavailable(engine, when) from None
        finally:
            if not stays:
                self._end(engine, answer, meter, share)

    def _end(self, engine: Engine, answer: Answer | None, meter: Meter, share: float) -> None:
        """Counts a request to `engine` (a model server) as ended and closes the model's answer, if there is one. Tells
        `meter` how many seconds the request used.

        The meter then records the tokens and the seconds. `share` is the value of the model's `_Use.share` when the
        request began; its increase since then is the number of seconds.
        """
        use = self._uses[engine.app_name]
        use.left_at = time.monotonic()
        use.change(-1, use.left_at)
        if answer is not None:
            answer.close()
        meter.end(use.share - share)

    async def _wait_until_served(self, engine: Engine) -> str:
        """Waits until the model of `engine` (a model server on Ray Serve) is loaded, and counts the request as in
        flight. Returns the URL of Ray Serve's proxy.

        Raises Unavailable after `model_wait_seconds`, or if the model cannot be loaded.
        """
        last = self._ray_api.last_view(VIEW_SECONDS)
        if last and await self._enters(engine, last):
            return str(last.base_url)
        deadline = time.monotonic() + self._settings.model_wait_seconds
        while time.monotonic() < deadline:
            try:
                view = await self._ray_api.look()
            except httpx.HTTPError:
                raise self._unavailable(engine, "cannot be reached, because the Ray cluster does not answer") from None
            app = view.applications.get(engine.app_name)
            if app and app.state == "failed":
                async with self._store.begin() as session:
                    await deployments.forget(session, engine.app_name)  # so that the next request loads it again
                raise self._unavailable(engine, f"could not be loaded: {app.message}")
            if await self._enters(engine, view):
                return str(view.base_url)
            await self._ask(engine)
            await asyncio.sleep(LOOK_SECONDS)
        async with self._store.begin() as session:
            trouble = await deployments.waits_for(session, engine.app_name)
        most = f"a request waits for the model at most {self._settings.model_wait_seconds:g} seconds"
        raise self._unavailable(engine, f"{trouble or 'finished loading only now'}; {most}")

    async def _ask(self, engine: Engine) -> None:
        """Requests that the model of `engine` (a model server) is loaded, at most once in ASK_SECONDS for all requests
        that wait for the model.
        """
        use = self._uses.setdefault(engine.app_name, _Use())
        if time.monotonic() - use.asked_at >= ASK_SECONDS:
            use.asked_at = time.monotonic()
            async with self._store.begin() as session:
                await deployments.use(session, engine.loaded)

    async def _enters(self, engine: Engine, view: ServeView) -> bool:
        """Counts one more request to the engine (model server) as in flight, if the engine runs and accepts new
        requests.

        Returns whether the request was counted. `view` is the state of Ray Serve.
        """
        app = view.applications.get(engine.app_name)
        return bool(app and app.state == "running" and view.base_url) and await self._enter(engine)

    async def _enter(self, engine: Engine) -> bool:
        """Counts one more request to the engine (model server) as in flight. Returns whether the request was counted.

        Returns False, and counts nothing, if the database says that the engine accepts no new requests.
        """
        use = self._uses.setdefault(engine.app_name, _Use())
        use.change(1, time.monotonic())
        entered = False
        try:
            async with self._marking:
                if use.must_ask():
                    async with self._store.begin() as session:
                        use.is_open = await deployments.enter(session, engine.app_name, self._replica)
                    use.is_marked, use.told_at = use.is_marked or use.is_open, time.monotonic()
            entered = use.is_open
        finally:
            if not entered:
                use.change(-1, time.monotonic())
        return entered

    def _unavailable(self, engine: Engine, trouble: str, kind: type[Unavailable] = Unavailable) -> Unavailable:
        return kind(
            f"The model '{engine.id}' {trouble}. Try again in {RETRY_AFTER_SECONDS} seconds.",
            retry_after=RETRY_AFTER_SECONDS,
            code="model_unavailable",
        )

    def _refusal(self, engine: Engine, status: int, content: bytes) -> ApiError:
        """Returns an error in OpenAI's JSON form for an answer of the engine (model server) that has an error status.

        `content` is the body of that answer, in any form. The message and the field in the body are kept if they can be
        read.
        """
        try:
            said = json.loads(content)
        except (ValueError, RecursionError):
            said = None
        error: Any = said.get("error", said) if isinstance(said, dict) else {}
        error = error if isinstance(error, dict) else {"message": error}
        message = str(error.get("message") or content.decode(errors="replace")[:500] or "no reason given")
        param = error.get("param") if isinstance(error.get("param"), str) else None
        if error.get("code") == "model_not_found":
            return NotFound(message, param="model", code="model_not_found")  # deleted while the request was on its way
        if error.get("code") == "adapter_unusable":  # the engine of the adapter's base can never load it
            return InvalidRequest(message, param="model", code="adapter_unusable")
        if refusal := REFUSALS.get(status):
            return refusal(message, param=param, code="invalid_value")
        if status in (429, 503):
            kind = ReplicaDied if error.get("type") == "engine_died" else Unavailable
            return self._unavailable(engine, f"cannot answer now: {message.removesuffix('.')}", kind)
        return ApiError(f"The model '{engine.id}' failed: {message}", code="model_error")
