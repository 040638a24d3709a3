"""Creates sets of rounds, and changes the state of a set when a user pauses, resumes or cancels it.

A set of rounds improves a policy by repeated training on its own scored answers. The state of a set is `running` or
`paused`, and at the end `succeeded`, `failed` or `cancelled`. If a job or evaluations of a set are under way when the
set is paused, resumed or cancelled, the service also pauses, resumes or cancels this job or these evaluations.
"""

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

from sqlalchemy import and_, func, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from services.contract import storable
from services.control_plane.core.errors import ApiError, Forbidden, InvalidRequest, NotFound, OverQuota
from services.control_plane.core.leases import next_in_turn, take
from services.control_plane.core.store import now, project_of
from services.control_plane.core.tables import EVALUATION_ENDS, TERMINAL, Evaluation, Job, Rounds
from services.control_plane.evaluations import evaluations
from services.control_plane.jobs import jobs
from services.control_plane.rounds.requests import RoundsSpec
from services.control_plane.tenants import projects

MOST_LIVE = 20  # the most rounds of a project that have not ended
LEASE = "rounds "  # the name of the lease of rounds is this text and their id
LIVE = text(f"state NOT IN {EVALUATION_ENDS}")  # as in the index
CLAIMS = func.pg_try_advisory_xact_lock(func.hashtextextended("claims of rounds", 0))

Row = dict[str, Any]


# --- requests --------------------------------------------------------------------------------


async def create(
    session: AsyncSession, spec: RoundsSpec, sampled: Sequence[Row], held_out: Sequence[Row], key_id: str
) -> Rounds:
    """Adds the row of a new set of rounds (repeated training of a policy on its own answers) to the database, and
    returns the row.

    `spec` is the set's description. `sampled` are the prompts to which the policies write answers, and `held_out` the
    prompts on which the policies are evaluated. `key_id` is the id of the API key to which the usage of models is
    charged. Raises OverQuota if the project has too many sets that have not ended, and Forbidden if the project is
    archived.
    """
    project = await projects.lock(session, project_of(session))  # so that simultaneous requests are counted
    if project.archived_at is not None:
        message = f"The project {project.id} of your key is archived; use a key of another project."
        raise Forbidden(message, code="project_archived")
    live = await session.scalar(select(func.count()).select_from(Rounds).where(LIVE)) or 0
    if live >= MOST_LIVE:
        raise OverQuota(
            f"The project has {live} sets of rounds that have not ended, and may have {MOST_LIVE}; "
            "wait until one ends, or cancel one."
        )
    rounds = Rounds(
        id=f"rounds-{secrets.token_hex(12)}",
        created_at=await now(session),
        key_id=key_id,
        spec=spec.model_dump(mode="json"),
        prompts={"sampled": list(sampled), "held_out": list(held_out)},
        history=[{"number": 0, "model": spec.model}],
    )
    session.add(rounds)
    await session.flush()
    return rounds


async def find(session: AsyncSession, rounds_id: str, *, lock: bool = False) -> Rounds:
    """Returns the set of rounds (repeated training of a policy on its own answers) with this id. If `lock` is true,
    nobody else can change the set until the transaction ends.

    Raises NotFound if the project has no such set.
    """
    rounds = await session.get(Rounds, rounds_id, populate_existing=True, with_for_update=True if lock else None)
    if rounds is None:
        message = f"There are no rounds '{rounds_id}'; list the project's rounds for their ids."
        raise NotFound(message, param="rounds_id", code="rounds_not_found")
    return rounds


async def pause(session: AsyncSession, rounds_id: str, actor: str) -> Rounds:
    """Pauses the set of rounds (repeated training of a policy on its own answers) with this id, and returns the set. If
    a job or evaluations of the set are under way, pauses them, too.

    `actor` is the id of the API key that sent the request. Raises InvalidRequest if the set has ended.
    """
    rounds = await _live(session, rounds_id, "paused")
    async for child in _under_way(session, rounds):
        with suppress(InvalidRequest):  # it has just ended
            if isinstance(child, Evaluation):
                await evaluations.pause(session, child.id)
            elif child.desired == "run":
                await jobs.pause(session, child.id, actor)
    rounds.state, rounds.waits_for, rounds.misfit_since = "paused", None, None
    return rounds


async def resume(session: AsyncSession, rounds_id: str, actor: str) -> Rounds:
    """Resumes the paused set of rounds (repeated training of a policy on its own answers) with this id, and returns the
    set. Also resumes the set's job or evaluations that were paused with it.

    `actor` is the id of the API key that sent the request. Raises InvalidRequest if the set is not paused, and
    OverQuota if the project may not queue the paused job.
    """
    rounds = await find(session, rounds_id, lock=True)
    if rounds.state != "paused":
        raise InvalidRequest(f"The rounds {rounds_id} are {rounds.state}; only paused rounds can be resumed.")
    async for child in _under_way(session, rounds):
        if isinstance(child, Evaluation):
            if child.state == "paused":
                await evaluations.resume(session, child.id)
        elif child.desired == "pause":
            await jobs.resume(session, child.id, actor)
    rounds.state, rounds.troubled_at = "running", None
    return rounds


async def cancel(session: AsyncSession, rounds_id: str, actor: str) -> Rounds:
    """Cancels the set of rounds (repeated training of a policy on its own answers) with this id, and returns the set.
    If a job or evaluations of the set are under way, cancels them, too.

    The files, jobs, models and results so far are kept. `actor` is the id of the API key that sent the request. Raises
    InvalidRequest if the set has ended.
    """
    rounds = await _live(session, rounds_id, "cancelled")
    async for child in _under_way(session, rounds):
        with suppress(InvalidRequest):  # it has just ended
            if isinstance(child, Evaluation):
                await evaluations.cancel(session, child.id)
            else:
                await jobs.cancel(session, child.id, actor)
    await end(session, rounds, "cancelled")
    return rounds


async def remove(session: AsyncSession, rounds_id: str) -> None:
    """Deletes the row of the set of rounds (repeated training of a policy on its own answers). The files, jobs, models
    and evaluations that the set has made stay.

    Raises InvalidRequest if the set has not ended.
    """
    rounds = await find(session, rounds_id, lock=True)
    if rounds.state not in EVALUATION_ENDS:
        raise InvalidRequest(f"The rounds {rounds_id} are {rounds.state}; cancel them before you delete them.")
    await session.delete(rounds)


async def _live(session: AsyncSession, rounds_id: str, wish: str) -> Rounds:
    rounds = await find(session, rounds_id, lock=True)
    if rounds.state in EVALUATION_ENDS:
        raise InvalidRequest(f"The rounds {rounds_id} have ended ({rounds.state}); they cannot be {wish}.")
    return rounds


async def _under_way(session: AsyncSession, rounds: Rounds) -> AsyncIterator[Evaluation | Job]:
    """Yields the evaluations and the job of the set's newest round, if they still exist and have not ended."""
    entry = rounds.history[-1]
    for evaluation_id in (entry.get("samples"), *(entry.get("evaluations") or {}).values()):
        evaluation = await session.get(Evaluation, evaluation_id) if evaluation_id else None
        if evaluation is not None and evaluation.state not in EVALUATION_ENDS:
            yield evaluation
    job = await session.get(Job, entry["job"]) if entry.get("job") else None
    if job is not None and job.observed not in TERMINAL:
        yield job


# --- the background --------------------------------------------------------------------------


async def end(session: AsyncSession, rounds: Rounds, state: str, **values: Any) -> None:
    """Ends the set of rounds in the state `state`, such as `succeeded`, and sets the columns in `values`. The caller
    must hold the lock of the set's row in the database."""
    finished_at = await session.scalar(select(func.clock_timestamp()))
    ending = {"state": state, "waits_for": None, "finished_at": finished_at}
    for name, value in (ending | values).items():  # all in one UPDATE, as the table's constraints require
        setattr(rounds, name, value)


async def fail(session: AsyncSession, rounds: Rounds, error: ApiError) -> None:
    """Ends the set of rounds as failed with this error. The caller must hold the lock of the set's database row."""
    told = {"code": error.code, "message": storable(error.message), "param": error.param}
    await end(session, rounds, "failed", error=told)


async def claim(session: AsyncSession, holder: str) -> Rounds | None:
    """Takes the lease of the next running set of rounds (the right to work on the set) for the control plane `holder`,
    and returns the set. Returns None if no set is running, or if other control planes work on all running sets.

    Projects take turns.
    """
    if not await session.scalar(select(CLAIMS)):
        return None
    row: Rounds | None = await session.scalar(next_in_turn(Rounds, and_(LIVE, Rounds.state == "running"), LEASE))
    return row if row is not None and await take(session, lease_of(row), holder) else None


def lease_of(rounds: Rounds) -> str:
    return f"{LEASE}{rounds.id}"


async def is_running(session: AsyncSession, rounds: Rounds) -> bool:
    return await session.scalar(select(Rounds.state).where(Rounds.id == rounds.id)) == "running"
