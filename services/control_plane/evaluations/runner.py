"""Runs evaluations of models in the background. Every control plane works on them.

To work on an evaluation, a control plane takes the evaluation's lease, which is the right to work on it. If a control
plane dies, another one continues with the items (prompts) that are left.
"""

from functools import partial

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.errors import ApiError
from services.control_plane.core.leases import RETRY_SECONDS, told
from services.control_plane.core.store import ProjectStore, Store
from services.control_plane.core.tables import Evaluation, Key
from services.control_plane.evaluations import evaluations, work
from services.control_plane.evaluations.evaluations import Ended, lease_of
from services.control_plane.evaluations.kinds import addresses
from services.control_plane.evaluations.kinds.asking import Models
from services.control_plane.evaluations.requests import Spec
from services.control_plane.evaluations.work import Work, kind_of
from services.control_plane.http.limits.rate_limit import RateLimits
from services.control_plane.inference.inference import Inference
from services.control_plane.inference.metering import Meter
from services.control_plane.rewards.scoring import Scoring
from services.control_plane.settings import Settings
from services.control_plane.tenants.usage import UsageRecorder


class EvaluationRunner:
    """The background work on evaluations of models. The work comes in pieces: a piece is one evaluation, with those of
    its items (prompts) that are left.
    """

    at_once = 8

    def __init__(
        self,
        store: Store,
        settings: Settings,
        inference: Inference,
        scoring: Scoring,
        usage: UsageRecorder,
        token_limits: RateLimits,
    ) -> None:
        self._store, self._settings = store, settings
        self._inference, self._scoring = inference, scoring
        self._usage, self._token_limits = usage, token_limits
        self._http = addresses.client()

    async def close(self) -> None:
        await self._http.aclose()

    def lease_of(self, evaluation: Evaluation) -> str:
        return lease_of(evaluation.id)

    async def claim(self, session: AsyncSession, holder: str) -> Evaluation | None:
        return await evaluations.claim(session, holder, most=self._settings.max_running_evaluations)

    async def goes_on(self, session: AsyncSession, evaluation: Evaluation) -> bool:
        return await evaluations.is_running(session, evaluation.id)

    async def interrupted(self, session: AsyncSession, evaluation: Evaluation, error: Exception) -> None:
        """Stores for the user that the evaluation waits after an unexpected error. If no stage of an item (prompt) was
        finished for a day, the evaluation fails.
        """
        what = told(error)
        if await evaluations.stalled_seconds(session, evaluation) > work.STALLED_SECONDS:
            hours = f"Nothing was finished for {work.STALLED_SECONDS / 3600:g} hours"
            stalled = ApiError(f"{hours}: {what}; ask the operator.", code="evaluation_stalled")
            await evaluations.fail(session, evaluation.id, stalled)
        else:
            await evaluations.wait_for(session, evaluation, f"{what}; it tries again every {RETRY_SECONDS:g} s.")

    async def work(self, evaluation: Evaluation) -> None:
        store = ProjectStore(self._store, evaluation.project_id)
        try:
            spec = Spec.model_validate(evaluation.spec, extra="ignore")
            async with store.look() as session:
                kind = await kind_of(session, self._settings, spec)
            limit = await self._tokens_per_minute(evaluation.key_id)
            models = Models(self._inference, self._scoring, self._http, partial(self._meter, evaluation, limit))
            await Work(self._store, evaluation, kind, models, partial(self._admit, evaluation, limit)).run()
        except Ended:
            pass
        except ApiError as error:  # for example, one of the evaluation's models was deleted
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
