"""Creates evaluations, and makes all changes of evaluations and of their items.

An item is one prompt of an evaluation. Every item passes through the same stages, such as an answer and its score. The
state of an evaluation is first `queued`, then `running`, and at the end `succeeded`, `failed` or `cancelled`. Before
the end, an evaluation can be paused; when it is resumed, it is queued again.

The results of an item's stage, and the counts of the evaluation, change in one transaction, and only if the item still
is at that stage and the evaluation has not ended. So nothing counts twice, even if two control planes work on the
evaluation at the same time.
"""

import secrets
from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    TextClause,
    and_,
    case,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession

from services.contract import storable
from services.control_plane.core.errors import ApiError, Forbidden, InvalidRequest, NotFound, OverQuota
from services.control_plane.core.leases import next_in_turn, take
from services.control_plane.core.store import now, project_of
from services.control_plane.core.tables import EVALUATION_ENDS, Evaluation, EvaluationItem, Rounds
from services.control_plane.evaluations.requests import Spec
from services.control_plane.tenants import projects
from services.control_plane.webhooks import webhooks

MOST_LIVE = 100  # the most evaluations of a project that have not ended
MOST_FAILED = 0.1  # the share of an evaluation's items without which rounds and sweeps still trust its results
LEASE = "evaluation "  # the name of an evaluation's lease is this text and the evaluation's id
LIVE = text(f"state NOT IN {EVALUATION_ENDS}")  # as in the index
ACTIVE = and_(LIVE, Evaluation.state != "paused")
CLAIMS = func.pg_try_advisory_xact_lock(func.hashtextextended("claims of evaluations", 0))


class Ended(Exception):
    """Raised if there is no more work to do, because the evaluation has ended or was paused, or another control plane
    has done the same work.
    """


# --- requests --------------------------------------------------------------------------------


async def create(
    session: AsyncSession, spec: Spec, rows: Sequence[dict[str, Any]], num_stages: int, key_id: str
) -> Evaluation:
    """Adds an evaluation with an item for each row (prompt), and returns the evaluation.

    `spec` is the evaluation's description. `num_stages` is the number of stages (such as answering and judging) of each
    item. `key_id` is the id of the API key to which the usage of models is charged. Raises OverQuota if the project has
    too many evaluations that have not ended, and Forbidden if the project is archived.
    """
    project = await projects.lock(session, project_of(session))  # so that simultaneous requests are counted
    if project.archived_at is not None:
        message = f"The project {project.id} of your key is archived; use a key of another project."
        raise Forbidden(message, code="project_archived")
    await check_room(session)
    evaluation = Evaluation(
        id=f"evaluation-{secrets.token_hex(12)}",
        created_at=await now(session),
        key_id=key_id,
        spec=spec.model_dump(mode="json"),
        num_items=len(rows),
        num_stages=num_stages,
    )
    session.add(evaluation)
    await session.flush()
    items = [{"evaluation_id": evaluation.id, "number": number, "row": row} for number, row in enumerate(rows)]
    await session.execute(insert(EvaluationItem), items)
    return evaluation


async def check_room(session: AsyncSession, num_more: int = 1) -> None:
    """Raises OverQuota if the project cannot create `num_more` evaluations now, because it would have more evaluations
    that have not ended than it may have.
    """
    live = await session.scalar(select(func.count()).select_from(Evaluation).where(LIVE)) or 0
    if live + num_more > MOST_LIVE:
        message = (
            f"The project has {live} evaluations that have not ended, of at most {MOST_LIVE}; wait, or cancel one."
        )
        raise OverQuota(message)


async def find(session: AsyncSession, evaluation_id: str) -> Evaluation:
    row = await session.get(Evaluation, evaluation_id, populate_existing=True)
    if row is None:
        message = f"There is no evaluation '{evaluation_id}'; list the project's evaluations for their ids."
        raise NotFound(message, param="evaluation_id", code="evaluation_not_found")
    return row


async def cancel(session: AsyncSession, evaluation_id: str) -> Evaluation:
    """Ends the evaluation as cancelled, and returns it. The results so far are kept.

    Raises InvalidRequest if the evaluation has ended.
    """
    evaluation = await find(session, evaluation_id)
    if not await _end(session, evaluation_id, "cancelled"):
        evaluation = await find(session, evaluation_id)
        raise InvalidRequest(f"The evaluation {evaluation_id} has ended ({evaluation.state}); it cannot be cancelled.")
    return await find(session, evaluation_id)


async def pause(session: AsyncSession, evaluation_id: str) -> Evaluation:
    """Pauses the evaluation, and returns it. The results so far are kept.

    Pausing a paused evaluation changes nothing. Raises InvalidRequest if the evaluation has ended.
    """
    evaluation = await find(session, evaluation_id)
    values = {"state": "paused", "waits_for": None}
    if not await _set(session, evaluation_id, LIVE, values):
        evaluation = await find(session, evaluation_id)
        raise InvalidRequest(f"The evaluation {evaluation_id} has ended ({evaluation.state}); it cannot be paused.")
    return await find(session, evaluation_id)


async def resume(session: AsyncSession, evaluation_id: str) -> Evaluation:
    """Queues the paused evaluation again, and returns the evaluation. Raises InvalidRequest if the evaluation is not
    paused.
    """
    evaluation = await find(session, evaluation_id)
    since = case((Evaluation.progressed_at.is_not(None), func.clock_timestamp()))  # a pause is no standstill
    values = {"state": "queued", "progressed_at": since}
    if not await _set(session, evaluation_id, Evaluation.state == "paused", values):
        message = f"The evaluation {evaluation_id} is {evaluation.state}; only a paused evaluation can be resumed."
        raise InvalidRequest(message)
    return await find(session, evaluation_id)


async def remove(session: AsyncSession, evaluation_id: str) -> None:
    """Deletes the evaluation and its items (prompts with results).

    Raises InvalidRequest if the evaluation has not ended, or if a set of rounds (repeated training of a policy) that
    has not ended needs the evaluation.
    """
    evaluation = await find(session, evaluation_id)
    if evaluation.state not in EVALUATION_ENDS:
        message = f"The evaluation {evaluation_id} is {evaluation.state}; cancel it before you delete it."
        raise InvalidRequest(message)
    parts = [{"samples": evaluation_id}, *({"evaluations": {name: evaluation_id}} for name in ("quality", "drift"))]
    needing = select(Rounds.id).where(LIVE, or_(*(Rounds.history.contains([part]) for part in parts)))
    if (rounds_id := await session.scalar(needing.limit(1))) is not None:
        message = f"The evaluation {evaluation_id} is needed by the rounds {rounds_id}; cancel the rounds first."
        raise InvalidRequest(message)
    await session.execute(delete(EvaluationItem).where(EvaluationItem.evaluation_id == evaluation_id))
    await session.execute(delete(Evaluation).where(Evaluation.id == evaluation_id))


# --- the background --------------------------------------------------------------------------


async def claim(session: AsyncSession, holder: str, *, most: int) -> Evaluation | None:
    """Takes the lease of the next evaluation for `holder`, a control plane, and returns the evaluation.

    A lease is the right to work on the evaluation. In each project, only the `most` oldest evaluations that are neither
    paused nor ended may run. Projects take turns. Returns None if there is no evaluation to take.
    """
    if not await session.scalar(select(CLAIMS)):
        return None
    row: Evaluation | None = await session.scalar(next_in_turn(Evaluation, ACTIVE, LEASE, most=most))
    if row is None or not await take(session, lease_of(row.id), holder):
        return None
    begun = func.coalesce(Evaluation.started_at, func.clock_timestamp())
    values = {
        "state": "running",
        "started_at": begun,
        "progressed_at": func.coalesce(Evaluation.progressed_at, func.clock_timestamp()),
    }
    started = update(Evaluation).where(Evaluation.id == row.id, ACTIVE).values(**values).returning(Evaluation.id)
    if await session.scalar(started) is None:
        return None
    return await find(session, row.id)


def lease_of(evaluation_id: str) -> str:
    return f"{LEASE}{evaluation_id}"


async def is_running(session: AsyncSession, evaluation_id: str) -> bool:
    return await session.scalar(select(Evaluation.state).where(Evaluation.id == evaluation_id)) == "running"


def _waiting(evaluation: Evaluation) -> ColumnElement[bool]:
    """Returns the SQL condition for the items (prompts) of the evaluation that still have stages (such as answering or
    judging) to pass through, and have not failed.
    """
    of = EvaluationItem.evaluation_id == evaluation.id
    return and_(of, EvaluationItem.stage < evaluation.num_stages, EvaluationItem.error.is_(None))


async def next_items(
    session: AsyncSession, evaluation: Evaluation, busy: Collection[int], most: int
) -> list[EvaluationItem]:
    """Returns at most `most` items (prompts) of the evaluation to work on next. Items at an earlier stage (such as
    answering, before judging) come first.

    Leaves out the items whose numbers are in `busy`, and items that are to be tried again later.
    """
    due = or_(EvaluationItem.due_at.is_(None), EvaluationItem.due_at <= func.clock_timestamp())
    query = select(EvaluationItem).where(_waiting(evaluation), due, EvaluationItem.number.not_in(busy))
    query = query.order_by(EvaluationItem.stage, EvaluationItem.due_at.nulls_first(), EvaluationItem.number)
    return list(await session.scalars(query.limit(most)))


async def num_waiting(session: AsyncSession, evaluation: Evaluation) -> int:
    """Returns how many items (prompts) of the evaluation still have stages (such as answering or judging) to pass
    through, and have not failed.
    """
    query = select(func.count()).select_from(EvaluationItem).where(_waiting(evaluation))
    return await session.scalar(query) or 0


async def stalled_seconds(session: AsyncSession, evaluation: Evaluation) -> float:
    """Returns how many seconds ago an item (prompt) of the evaluation last finished a stage (such as answering), or
    failed.

    If no item has done so yet, returns how many seconds ago the evaluation began.
    """
    since = func.extract("epoch", func.clock_timestamp() - Evaluation.progressed_at)
    return float(await session.scalar(select(since).where(Evaluation.id == evaluation.id)) or 0)


async def store_stage(
    session: AsyncSession, evaluation: Evaluation, item: EvaluationItem, found: dict[str, Any]
) -> None:
    """Stores that the item (a prompt) has finished its next stage, such as answering or judging. `found` holds the
    results of this stage.

    Raises Ended if the evaluation has ended, or another control plane has changed the item.
    """
    values = {
        "stage": item.stage + 1,
        "found": EvaluationItem.found.op("||")(literal(found, JSONB)),
        "num_tries": 0,
        "due_at": None,
    }
    await _change(session, item, values)
    is_last = item.stage + 1 == evaluation.num_stages
    await _count(session, evaluation, num_stages_done=1, num_completed=int(is_last))


async def store_failure(
    session: AsyncSession, evaluation: Evaluation, item: EvaluationItem, code: str | None, message: str
) -> None:
    """Stores that the item (a prompt of the evaluation) has failed for good, with the error's code and message.

    Raises Ended if the evaluation has ended, or another control plane has changed the item.
    """
    error = {"code": code, "message": storable(message)}
    await _change(session, item, {"error": error, "num_tries": item.num_tries + 1, "due_at": None})
    await _count(session, evaluation, num_stages_done=evaluation.num_stages - item.stage, num_failed=1)


async def put_off(session: AsyncSession, item: EvaluationItem, seconds: float, *, num_tries: int) -> None:
    """Stores that the next stage of the item (a prompt) is tried again after `seconds`. `num_tries` is the number of
    tries of this stage that failed so far.

    Raises Ended if another control plane has changed the item.
    """
    due_at = func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, seconds)
    await _change(session, item, {"due_at": due_at, "num_tries": num_tries})


async def wait_for(session: AsyncSession, evaluation: Evaluation, what: str) -> None:
    """Stores in the evaluation the reason `what` why none of its items (prompts) can be worked on at the moment."""
    running = and_(Evaluation.id == evaluation.id, Evaluation.state == "running")
    await session.execute(update(Evaluation).where(running).values(waits_for=storable(what)))


async def _change(session: AsyncSession, item: EvaluationItem, values: dict[str, Any]) -> None:
    """Sets the columns that `values` names in the row of the item (a prompt of an evaluation).

    Raises Ended, and changes nothing, if the item has failed or reached a later stage (such as judging) since it was
    read.
    """
    table = EvaluationItem
    same = (table.evaluation_id == item.evaluation_id, table.number == item.number, table.stage == item.stage)
    changed = update(table).where(*same, table.error.is_(None)).values(**values).returning(table.number)
    if await session.scalar(changed.execution_options(synchronize_session=False)) is None:
        raise Ended


async def _count(session: AsyncSession, evaluation: Evaluation, **more: int) -> None:
    values = {name: getattr(Evaluation, name) + number for name, number in more.items()}
    counted = update(Evaluation).where(Evaluation.id == evaluation.id, LIVE)
    counted = counted.values(**values, progressed_at=func.clock_timestamp(), waits_for=None).returning(Evaluation.id)
    if await session.scalar(counted.execution_options(synchronize_session=False)) is None:
        raise Ended


async def fail_waiting(session: AsyncSession, evaluation: Evaluation, code: str, message: str) -> None:
    """Stores that all unfinished items (prompts) of the evaluation have failed for good, with this error code and
    message.

    Raises Ended if the evaluation has ended, or another control plane has changed an item.
    """
    for item in await session.scalars(select(EvaluationItem).where(_waiting(evaluation))):
        await store_failure(session, evaluation, item, code, message)


async def findings(session: AsyncSession, evaluation: Evaluation) -> list[dict[str, Any]]:
    """Returns the results of all finished items (prompts) of the evaluation, in the order of the items' numbers."""
    query = select(EvaluationItem.found).where(
        EvaluationItem.evaluation_id == evaluation.id, EvaluationItem.stage == evaluation.num_stages
    )
    return list(await session.scalars(query.order_by(EvaluationItem.number)))


async def first_error(session: AsyncSession, evaluation: Evaluation) -> dict[str, Any]:
    """Returns the error of the failed item (prompt) of the evaluation with the lowest number. At least one item must
    have failed.
    """
    query = select(EvaluationItem.error).where(
        EvaluationItem.evaluation_id == evaluation.id, EvaluationItem.error.is_not(None)
    )
    error: dict[str, Any] | None = await session.scalar(query.order_by(EvaluationItem.number).limit(1))
    assert error is not None
    return error


async def refuse_incomplete(session: AsyncSession, evaluation: Evaluation) -> None:
    """Raises ApiError if more than the share MOST_FAILED of the evaluation's items (prompts) failed, because the
    results of the other items then say too little about all of them.
    """
    if evaluation.num_failed <= MOST_FAILED * evaluation.num_items:
        return
    first = await first_error(session, evaluation)
    message = (
        f"the evaluation {evaluation.id} has results of too few items: {evaluation.num_failed} of "
        f"{evaluation.num_items} failed, and at most {MOST_FAILED:.0%} may. The first one: {first['message']}"
    )
    raise ApiError(message, code="evaluation_incomplete")


async def succeed(session: AsyncSession, evaluation: Evaluation, results: dict[str, Any]) -> None:
    await _end(session, evaluation.id, "succeeded", results=results)


async def fail(session: AsyncSession, evaluation_id: str, error: ApiError) -> None:
    told = {"code": error.code, "message": storable(error.message), "param": error.param}
    await _end(session, evaluation_id, "failed", error=told)


async def _end(session: AsyncSession, evaluation_id: str, state: str, **values: Any) -> bool:
    """Ends the evaluation in the state `state`, and sets the columns that `values` names. Also adds messages for the
    webhooks of its project. Returns True if this call ended the evaluation.

    Returns False, and changes nothing, if the evaluation had ended already.
    """
    ending = {"state": state, "finished_at": func.clock_timestamp(), "waits_for": None}
    project_id = await _set(session, evaluation_id, LIVE, ending | values)
    if project_id is None:
        return False
    await webhooks.announce(session, project_id, webhooks.EVALUATION_EVENTS[state], evaluation_id)
    return True


async def _set(
    session: AsyncSession, evaluation_id: str, condition: ColumnElement[bool] | TextClause, values: dict[str, Any]
) -> str | None:
    """Sets the columns that `values` names in the evaluation's row, if `condition` holds for the row. Returns the
    id of the evaluation's project, or None if the condition does not hold.
    """
    changed = update(Evaluation).where(Evaluation.id == evaluation_id, condition).values(**values)
    project_id: str | None = await session.scalar(
        changed.returning(Evaluation.project_id).execution_options(synchronize_session=False)
    )
    return project_id
