"""Works on one evaluation until all its items (prompts) have passed through all stages, such as answering and judging.
Then summarizes the results of all items.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.errors import ApiError, NotFound, RateLimited, ReplicaDied, Unavailable
from services.control_plane.core.store import Store
from services.control_plane.core.tables import Evaluation, EvaluationItem
from services.control_plane.evaluations import evaluations
from services.control_plane.evaluations.evaluations import Ended
from services.control_plane.evaluations.kinds import compare, drift, preferences, samples, score
from services.control_plane.evaluations.kinds.asking import Models
from services.control_plane.evaluations.kinds.kind import Kind
from services.control_plane.evaluations.requests import Spec
from services.control_plane.evaluations.rows import group_of
from services.control_plane.settings import Settings

log = logging.getLogger(__name__)

ITEMS_AT_ONCE = 8  # of one evaluation
MOST_TRIES = 5  # the most tries of one stage of an item; a wait for a model does not count as a try
MOST_DEATHS = 10  # the most tries of one stage of an item if each ends with the death of a model's replica or engine
RETRY_SECONDS = 2.0  # after the first failed try; doubles with each further one
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 15.0, 600.0  # after a model was not available; doubles while none is
LOOK_SECONDS = 1.0  # how often an evaluation looks for items that are due, if none is being worked on
STALLED_SECONDS = 24 * 3600.0  # items fail if no stage of the evaluation was finished for so long

OF_KIND: dict[str, Callable[[AsyncSession, Settings, Spec], Awaitable[Kind]]] = {
    "compare": compare.of,
    "score": score.of,
    "samples": samples.of,
    "preferences": preferences.of,
    "drift": drift.of,
}


async def kind_of(session: AsyncSession, settings: Settings, spec: Spec) -> Kind:
    """Returns the object of the class for `spec.kind` that runs the evaluation `spec`. The object holds the
    evaluation's models.

    Raises NotFound if a model does not exist, and InvalidRequest if a model cannot be used.
    """
    return await OF_KIND[spec.kind](session, settings, spec)


class Work:
    """The work on one evaluation.

    `admit` is a function that raises RateLimited while the API key of the evaluation may use no more tokens.
    """

    def __init__(
        self, store: Store, evaluation: Evaluation, kind: Kind, models: Models, admit: Callable[[], None]
    ) -> None:
        self._store, self._evaluation, self._kind, self._models = store, evaluation, kind, models
        self._admit = admit
        self._num_pauses = 0  # in a row
        self._pause = 0.0
        self._at_once = ITEMS_AT_ONCE  # 1 after a replica died, so that one item does not use up the tries of others

    async def run(self) -> None:
        """Works on the items (prompts) of the evaluation until each has failed or passed through all stages, and ends
        the evaluation.

        Raises Ended if the evaluation was paused, or ended elsewhere, for example cancelled. Raises NotFound if one of
        its models was deleted.
        """
        busy: dict[int, asyncio.Task[None]] = {}
        try:
            while await self._take(busy):
                if not busy:
                    await asyncio.sleep(LOOK_SECONDS)
                    continue
                done, _ = await asyncio.wait(busy.values(), timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                for number in [number for number, task in busy.items() if task in done]:
                    busy.pop(number).result()
        finally:
            for task in busy.values():
                task.cancel()
            await asyncio.gather(*busy.values(), return_exceptions=True)
        await self._conclude()

    async def _take(self, busy: dict[int, asyncio.Task[None]]) -> bool:
        """Begins to work on further items (prompts) of the evaluation, until ITEMS_AT_ONCE are in `busy`, or only
        one after a model's replica died. Returns False if no item is left.

        `busy` holds the tasks of items under way, by item number. While the work waits for a model, begins nothing
        until the items in `busy` are done and the wait is over. Raises Ended if the user has paused the evaluation and
        nothing is under way.
        """
        if self._pause and not busy:
            await asyncio.sleep(self._pause)
            self._pause = 0.0
        if self._pause or len(busy) >= self._at_once:
            return True
        async with self._store.begin() as session:
            if not await evaluations.is_running(session, self._evaluation.id):
                if not busy:
                    raise Ended
                return True
            room = max(0, self._at_once - len(busy))  # a replica may have died since the look above
            items = await evaluations.next_items(session, self._evaluation, list(busy), room)
            is_left = bool(items or busy) or await evaluations.num_waiting(session, self._evaluation) > 0
        for item in items:
            busy[item.number] = asyncio.create_task(self._advance(item))
        return is_left

    async def _advance(self, item: EvaluationItem) -> None:
        """Does the next stage (such as answering or judging) of the item (a prompt of the evaluation), and stores the
        results or the failure.
        """
        try:
            self._admit()
            found = await self._kind.work(item.stage, item.number, group_of(item.row), item.found, self._models)
        except ReplicaDied as error:
            self._at_once = 1
            if item.num_tries + 1 >= MOST_DEATHS:
                await self._fail(item, error)
            else:
                await self._wait(item, error, num_tries=item.num_tries + 1)
        except (Unavailable, RateLimited) as error:
            await self._wait(item, error, num_tries=item.num_tries)
        except (NotFound, SQLAlchemyError):  # a model was deleted; the database does not answer
            raise
        except Exception as error:  # an error with one item must not stop the others
            if not isinstance(error, ApiError):
                log.warning("The item %d of the evaluation %s failed: %r", item.number, self._evaluation.id, error)
            await self._retry(item, error)
        else:
            async with self._store.begin() as session:
                await evaluations.store_stage(session, self._evaluation, item, found)
            self._num_pauses, self._at_once = 0, ITEMS_AT_ONCE

    async def _wait(self, item: EvaluationItem, error: Unavailable | RateLimited, *, num_tries: int) -> None:
        """Makes the evaluation wait, because a model is not available, or because the evaluation's API key may use no
        more tokens in this minute. `item` is the item (prompt) whose work failed with `error`, and `num_tries` the
        number of tries of its stage (such as answering) that count as failed so far.

        If no item has made progress for STALLED_SECONDS, all unfinished items fail.
        """
        if not self._pause:  # the first of several items that wait for the same model
            self._pause = min(LONGEST_PAUSE_SECONDS, PAUSE_SECONDS * 2**self._num_pauses)
            self._num_pauses += 1
        async with self._store.begin() as session:
            if await evaluations.stalled_seconds(session, self._evaluation) > STALLED_SECONDS:
                message = f"Nothing was finished for {STALLED_SECONDS / 3600:g} hours: {error.message}"
                await evaluations.fail_waiting(session, self._evaluation, "evaluation_stalled", message)
                return
            await evaluations.wait_for(session, self._evaluation, error.message)
            await evaluations.put_off(session, item, self._pause, num_tries=num_tries)

    async def _retry(self, item: EvaluationItem, error: Exception) -> None:
        """Marks the item (a prompt) as failed after an error, or plans another try of its stage (such as answering).

        The item fails at once if a model refused the request. After any other error, it fails only after MOST_TRIES
        tries.
        """
        is_refused = isinstance(error, ApiError) and error.status < 500
        if is_refused or item.num_tries + 1 >= MOST_TRIES:
            await self._fail(item, error)
            return
        async with self._store.begin() as session:
            seconds = RETRY_SECONDS * 2**item.num_tries
            await evaluations.put_off(session, item, seconds, num_tries=item.num_tries + 1)

    async def _fail(self, item: EvaluationItem, error: Exception) -> None:
        code = error.code if isinstance(error, ApiError) else None
        async with self._store.begin() as session:
            await evaluations.store_failure(session, self._evaluation, item, code, str(error))

    async def _conclude(self) -> None:
        async with self._store.begin() as session:
            found = await evaluations.findings(session, self._evaluation)
            if not found:
                first = await evaluations.first_error(session, self._evaluation)
                message = f"All items failed. The first one: {first['message']}"
                await evaluations.fail(session, self._evaluation.id, ApiError(message, code="evaluation_failed"))
                return
        results: dict[str, Any] = await asyncio.to_thread(self._kind.summarize, found)
        async with self._store.begin() as session:
            await evaluations.succeed(session, self._evaluation, results)
