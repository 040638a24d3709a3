"""Runs sets of rounds (repeated training of a policy on its own answers) in the background, in every control plane.

To work on a set, a control plane takes the set's lease, which is the right to work on the set. If a control plane dies,
another one continues with the stage that the set has reached.
"""

from sqlalchemy.ext.asyncio import AsyncSession

from services.control_plane.core.errors import ApiError, NotFound
from services.control_plane.core.leases import Later, Rests, lasts_too_long, told
from services.control_plane.core.store import ProjectStore, Store
from services.control_plane.core.tables import Rounds
from services.control_plane.ray_api import RayApi
from services.control_plane.rounds import rounds as changes
from services.control_plane.rounds.stages import Ended, Refused, Stages
from services.control_plane.settings import Settings

LOOK_SECONDS = 2.0  # how often rounds look whether their job or evaluation has ended


class RoundsRunner:
    """The background work on sets of rounds. A set of rounds improves a policy by repeated training on its own scored
    answers. The work comes in pieces: in one piece, a control plane does all stages of one set that can be done now."""

    at_once = 16  # while rounds wait, others take their place

    def __init__(self, store: Store, settings: Settings, ray_api: RayApi) -> None:
        self._store, self._settings, self._ray_api = store, settings, ray_api
        self._rests = Rests(LOOK_SECONDS)  # after refusals such as those of a quota, by the ids of rounds

    def lease_of(self, rounds: Rounds) -> str:
        return changes.lease_of(rounds)

    async def claim(self, session: AsyncSession, holder: str) -> Rounds | None:
        return await changes.claim(session, holder)

    async def goes_on(self, session: AsyncSession, rounds: Rounds) -> bool:
        return await changes.is_running(session, rounds)

    async def interrupted(self, session: AsyncSession, rounds: Rounds, error: Exception) -> None:
        """Stores the reason, for the user to read, why the set of rounds makes no progress: an unexpected error. If
        such errors repeat for a day without progress, ends the set as failed."""
        self._rests.forget(rounds.id)
        rounds = await changes.find(session, rounds.id, lock=True)
        if rounds.state == "running" and await lasts_too_long(session, rounds, error):
            await changes.fail(session, rounds, ApiError(f"{told(error)}; ask the operator.", code="rounds_stalled"))

    async def work(self, rounds: Rounds) -> None:
        stages = Stages(ProjectStore(self._store, rounds.project_id), rounds.id, self._settings, self._ray_api)
        try:
            while await stages.step():
                self._rests.forget(rounds.id)
        except Refused:
            raise Later(self._rests.after_refusal(rounds.id)) from None
        except (Ended, NotFound):  # rounds that have ended may be deleted at once
            self._rests.forget(rounds.id)
            return
        self._rests.forget(rounds.id)
        raise Later(LOOK_SECONDS)
