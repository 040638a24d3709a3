"""Runs evaluations of models in the background. Every control plane does so.

To work on an evaluation, a control plane takes its lease, a row in the database that expires if it is not renewed. So
no two control planes work on an evaluation at the same time. If a control plane dies, another one goes on with the
items (prompts) that are left.
"""

import asyncio
import logging
from functools import partial

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from services.control_plane.core.errors import ApiError
from services.control_plane.core.store import ProjectStore, Store, hold_lease, release_lease
from services.control_plane.core.tables import Evaluation, Key
from services.control_plane.evaluations import evaluations
from services.control_plane.evaluations.evaluations import Ended, lease_of
from services.control_plane.evaluations.kinds.asking import Models
from services.control_plane.evaluations.requests import Spec
from services.control_plane.evaluations.work import Work, kind_of
from services.control_plane.http.limits.rate_limit import RateLimits
from services.control_plane.inference.inference import Inference
from services.control_plane.inference.metering import Meter
from services.control_plane.rewards.scoring import Scoring
from services.control_plane.settings import Settings
from services.control_plane.tenants.usage import UsageRecorder

log = logging.getLogger(__name__)

AT_ONCE = 8  # the most evaluations that one control plane works on at the same time
TICK_SECONDS = 1.0
BEAT_SECONDS = 2.0
LEASE_SECONDS = 15.0
RETRY_SECONDS = 30.0  # after an error that nobody expected


class EvaluationRunner:
    """The background task that works on evaluations of models. Every control plane runs one."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        inference: Inference,
        scoring: Scoring,
        usage: UsageRecorder,
        token_limits: RateLimits,
        *,
        holder: str,
    ) -> None:
        self._store, self._settings, self._holder = store, settings, holder
        self._inference, self._scoring = inference, scoring
        self._usage, self._token_limits = usage, token_limits
        self._running: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Looks for evaluations every second and works on them, until cancelled."""
        try:
            while True:
                try:
                    await self._start()
                except (SQLAlchemyError, OSError) as error:
                    log.warning("The database does not answer, so evaluations wait: %s", error)
                await asyncio.sleep(TICK_SECONDS)
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    async def _start(self) -> None:
        most = self._settings.max_running_evaluations
        while len(self._running) < AT_ONCE:
            async with self._store.begin() as session:
                evaluation = await evaluations.claim(session, self._holder, most=most, seconds=LEASE_SECONDS)
            if evaluation is None:
                return
            task = asyncio.create_task(self._hold(evaluation), name=evaluation.id)
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _hold(self, evaluation: Evaluation) -> None:
        """Works on the evaluation while this control plane holds its lease (the right to do so), and gives the lease up
        afterwards.
        """
        failed = False
        work, beat = asyncio.create_task(self._work(evaluation)), asyncio.create_task(self._beat(evaluation))
        try:
            await asyncio.wait((work, beat), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        except Ended:
            pass
        except Exception as error:  # an error with one evaluation must not stop the others
            log.warning(
                "The evaluation %s was interrupted and continues in %d s: %r", evaluation.id, RETRY_SECONDS, error
            )
            failed = True
        finally:
            work.cancel()
            beat.cancel()
            await asyncio.gather(work, beat, return_exceptions=True)
            await self._give_up(evaluation, failed)

    async def _give_up(self, evaluation: Evaluation, failed: bool) -> None:
        """Gives up this control plane's lease of the evaluation (its right to work on it), so that any control plane
        can go on.

        `failed` says whether the work ended with an error. If it did, control planes can go on only after
        RETRY_SECONDS.
        """
        name = lease_of(evaluation.id)
        try:
            async with self._store.begin() as session:
                await release_lease(session, name, self._holder)
                if failed:
                    await hold_lease(session, name, "nobody", seconds=RETRY_SECONDS)
        except (SQLAlchemyError, OSError) as error:
            log.warning(
                "The lease of the evaluation %s could not be given up and ends by itself: %s", evaluation.id, error
            )

    async def _beat(self, evaluation: Evaluation) -> None:
        """Renews the lease of the evaluation, the right to work on it, every few seconds.

        Returns when the lease was lost or the evaluation no longer runs.
        """
        is_held = True
        while is_held:
            await asyncio.sleep(BEAT_SECONDS)
            try:
                async with self._store.begin() as session:
                    held = await hold_lease(session, lease_of(evaluation.id), self._holder, seconds=LEASE_SECONDS)
                    is_held = held and await evaluations.is_running(session, evaluation.id)
            except (SQLAlchemyError, OSError) as error:
                log.warning("The lease of the evaluation %s could not be renewed: %s", evaluation.id, error)

    async def _work(self, evaluation: Evaluation) -> None:
        store = ProjectStore(self._store, evaluation.project_id)
        spec = Spec.model_validate(evaluation.spec, extra="ignore")
        try:
            async with store.look() as session:
                kind = await kind_of(session, self._settings, spec)
            limit = await self._tokens_per_minute(evaluation.key_id)
            models = Models(self._inference, self._scoring, partial(self._meter, evaluation, limit))
            await Work(self._store, evaluation, kind, models, partial(self._admit, evaluation, limit)).run()
        except ApiError as error:  # of one of its models, which was deleted
            async with self._store.begin() as session:
                await evaluations.fail(session, evaluation.id, error)

    async def _tokens_per_minute(self, key_id: str) -> int | None:
        async with self._store.begin() as session:
            own = await session.scalar(select(Key.tokens_per_minute).where(Key.id == key_id))
        return own or self._settings.tokens_per_minute

    def _admit(self, evaluation: Evaluation, limit: int | None) -> None:
        if limit:
            self._token_limits.look(evaluation.key_id, limit)

    def _meter(self, evaluation: Evaluation, limit: int | None, model_id: str) -> Meter:
        def note(prompt_tokens: int, completion_tokens: int, accelerator_seconds: float) -> None:
            if limit:
                self._token_limits.count(evaluation.key_id, limit, prompt_tokens + completion_tokens)
            self._usage.add(
                evaluation.project_id,
                evaluation.key_id,
                model_id,
                prompt_tokens=prompt_tokens,
                completion_tokens=completion_tokens,
                accelerator_seconds=accelerator_seconds,
            )

        return Meter(note, shows_usage=True)
