"""Does the stages of a round: samples with scores, a file of rows, a job, and evaluations of the job's policy.

Each stage makes an evaluation, a file or a job. One transaction stores this object, and adds its id to the database row
of the set of rounds. So a stage that is interrupted has either left nothing behind, or is done.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from tempfile import TemporaryFile
from typing import Any

import anyio.to_thread
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from services.contract import MIN_EXAMPLES, Reading
from services.control_plane.core.errors import ApiError, OverQuota, RateLimited, Unavailable
from services.control_plane.core.store import ProjectStore
from services.control_plane.core.tables import TERMINAL, Evaluation, EvaluationItem, Rounds
from services.control_plane.evaluations import evaluations
from services.control_plane.evaluations.kinds.judging import grader_of
from services.control_plane.evaluations.requests import Spec
from services.control_plane.evaluations.rows import group_of
from services.control_plane.evaluations.work import kind_of
from services.control_plane.files import files, row_check
from services.control_plane.http.validation import within
from services.control_plane.jobs import admission, jobs
from services.control_plane.jobs.plans import plans
from services.control_plane.jobs.plans.plans import DOES_NOT_FIT
from services.control_plane.models import models
from services.control_plane.ray_api import RayApi
from services.control_plane.rounds import rounds as changes
from services.control_plane.rounds.requests import RoundsSpec
from services.control_plane.rounds.selection import Sample, write_rows
from services.control_plane.settings import Settings

STAGES = ("samples", "file", "job", "model", "evaluations", "results")  # each adds its name to the round's entry
OF_FIRST_POLICY = ("evaluations", "results")
READ_AT_ONCE = 100  # items of an evaluation

Entry = dict[str, Any]
Act = Callable[[AsyncSession, Rounds], Awaitable[bool]]
"""Changes the rounds, whose row is locked. Returns False if the stage must wait; `waits_for` then holds the reason."""


class Refused(Exception):
    """Raised if the project or the service may not do the next stage of a set of rounds now. The set's column
    `waits_for` then says why."""


class Ended(Exception):
    """Raised if there is no more work to do on a set of rounds, because the set has ended or is paused."""


def stage_of(entry: Entry) -> str:
    """Returns the name of the next stage of a round, such as `samples`. Returns `next` if all stages of the round are
    done. `entry` is the round's object in the column `history` of the set of rounds.
    """
    stages = STAGES if entry["number"] else OF_FIRST_POLICY
    return next((name for name in stages if name not in entry), "next")


class Stages:
    """Does the stages of a set of rounds (repeated training of a policy on its own answers), one after the other:
    sampling answers, making a training file, training, and evaluating. `rounds_id` is the id of the set."""

    def __init__(self, store: ProjectStore, rounds_id: str, settings: Settings, ray_api: RayApi) -> None:
        self._store, self._id, self._settings, self._ray_api = store, rounds_id, settings, ray_api

    async def step(self) -> bool:
        """Does the next stage of the set of rounds, unless the stage must wait, for example for a job to end. Returns
        whether the stage was done.

        Raises Refused if the stage may not be done now, and Ended if the set is paused or has ended.
        """
        acts: dict[str, Act] = {
            "samples": self._sample,
            "job": self._train,
            "model": self._take_policy,
            "evaluations": self._evaluate,
            "results": self._conclude,
            "next": self._go_on,
        }
        async with self._store.look() as session:
            rounds = await changes.find(session, self._id)
        if rounds.state != "running":
            raise Ended
        stage = stage_of(rounds.history[-1])
        try:
            return await (self._make_file(rounds) if stage == "file" else self._change(rounds, acts[stage]))
        except ApiError as error:  # for example, a model was deleted, or the job cannot learn from the rows
            is_misfit = error.code == DOES_NOT_FIT
            waits = isinstance(error, OverQuota | RateLimited | Unavailable) or is_misfit
            if waits and await self._wait(error.message, is_misfit=is_misfit):
                raise Refused from None
            message = f"Round {rounds.history[-1]['number']}, stage {stage}: {error.message}"
            await self._fail(ApiError(message, code=error.code, param=error.param))
            raise Ended from None

    async def _change(self, seen: Rounds, act: Act) -> bool:
        """Does one stage of a round, such as sampling answers or starting a job. Calls `act` in a transaction that
        locks the database row of the set of rounds. Returns whether the stage is done.

        `seen` is the row as it was read before. If another control plane has done the stage since then, returns True
        without calling `act`. Raises Ended if the set is paused or has ended.
        """
        async with self._store.begin() as session:
            rounds = await changes.find(session, self._id, lock=True)
            if rounds.state != "running":
                raise Ended
            if rounds.history != seen.history:
                return True
            done = await act(session, rounds)
            rounds.misfit_since = None
            if done:
                rounds.waits_for = None
            if not done or rounds.history != seen.history:  # the stage is done, or waits without an error
                rounds.troubled_at = None
            return done

    async def _wait(self, what: str, *, is_misfit: bool) -> bool:
        """Stores the text `what`, which tells the user why the set of rounds waits. `is_misfit` says whether the reason
        is that the cluster is too small for the job.

        Returns False, and stores nothing, if the cluster has been too small for a week, so that the set should fail.
        """
        async with self._store.begin() as session:
            rounds = await changes.find(session, self._id, lock=True)
            if is_misfit and await plans.misfits_for_too_long(session, rounds):
                return False
            if is_misfit:
                what = f"{what} After {plans.MISFIT_AFTER.days} days of this, the rounds fail."
            else:
                rounds.misfit_since = None
            if rounds.state == "running":
                rounds.waits_for, rounds.troubled_at = what, None
            return True

    async def _fail(self, error: ApiError) -> None:
        async with self._store.begin() as session:
            rounds = await changes.find(session, self._id, lock=True)
            if rounds.state == "running":
                await changes.fail(session, rounds, error)

    # --- samples and their rows --------------------------------------------------------------

    async def _sample(self, session: AsyncSession, rounds: Rounds) -> bool:
        spec, number = _spec(rounds), rounds.history[-1]["number"]
        prompts = (await self._prompts(session))["sampled"]
        count = spec.num_prompts(len(prompts))
        first = (number - 1) * count
        chosen = [prompts[i % len(prompts)] for i in range(first, first + count)]
        samples = await self._create(session, rounds, spec.samples_of(_newest(rounds), number), chosen)
        return _add(rounds, samples=samples)

    async def _prompts(self, session: AsyncSession) -> dict[str, Any]:
        found: dict[str, Any] | None = await session.scalar(select(Rounds.prompts).where(Rounds.id == self._id))
        assert found is not None  # the row is locked
        return found

    async def _create(self, session: AsyncSession, rounds: Rounds, spec: Spec, rows: list[Entry]) -> str:
        """Creates the evaluation that `spec` describes, on the prompts `rows`, for the set of rounds. Returns the
        evaluation's id."""
        kind = await kind_of(session, self._settings, spec)
        whole = Spec.model_validate(spec.model_dump() | kind.resolved)
        await models.hold(session, self._settings, whole.models)
        return (await evaluations.create(session, whole, rows, kind.num_stages, rounds.key_id)).id

    async def _make_file(self, rounds: Rounds) -> bool:
        """Makes a training file from the round's scored answers. Returns False, and makes no file, until the answers
        are scored. Returns True if the stage is done.

        If the answers give too few rows for a job, ends the set of rounds instead.
        """
        if not await self._change(rounds, self._have_samples_and_room):
            return False
        spec, number = _spec(rounds), rounds.history[-1]["number"]
        evaluation, samples = await self._samples(rounds.history[-1]["samples"])
        selection = spec.selection.resolved(spec.num_samples)
        with TemporaryFile() as file:
            write = partial(write_rows, file, selection, samples, f"{rounds.id} {number}")
            counts = {"num_failed": evaluation.num_failed, **await anyio.to_thread.run_sync(write)}
            if counts["num_rows"] < MIN_EXAMPLES:
                return await self._change(rounds, partial(_end_without_rows, counts=counts))
            stored = await files.store_file(file, self._settings)
        async with files.removed_unless_named(stored):
            report = await row_check.report_of(stored, Reading(), param="file", project_id=rounds.project_id)

            async def keep(session: AsyncSession, rounds: Rounds) -> bool:
                await files.reserve(session, rounds.project_id, stored.num_bytes, param="file")
                row = await files.add(
                    session,
                    stored,
                    filename=f"{rounds.id}-{number}.jsonl",
                    purpose=files.TRAINING,
                    project_id=rounds.project_id,
                    report=report,
                )
                return _add(rounds, rows=counts, file=row.id)

            try:
                return await self._change(rounds, keep)
            except OverQuota:
                await self._change(rounds, partial(_note_bytes, num_bytes=stored.num_bytes))
                raise

    async def _have_samples_and_room(self, session: AsyncSession, rounds: Rounds) -> bool:
        """Whether the round's sampled answers are all scored. Raises OverQuota if they are all scored, but the project
        has too little space left for the training file that is made from them."""
        entry = rounds.history[-1]
        if await self._waits_for(session, rounds, [entry["samples"]]):
            return False
        await files.reserve(session, rounds.project_id, entry.get("num_bytes", 1), param="file")
        return True

    async def _samples(self, evaluation_id: str) -> tuple[Evaluation, list[Sample]]:
        """Returns two values: the evaluation with the id `evaluation_id`, and its samples. A sample is a prompt whose
        answers are scored, with the answers and their scores."""
        samples = list[Sample]()
        async with self._store.look() as session:
            evaluation = await evaluations.find(session, evaluation_id)
        for first in range(0, evaluation.num_items, READ_AT_ONCE):
            numbers = EvaluationItem.number.between(first, first + READ_AT_ONCE - 1)
            done = EvaluationItem.stage == evaluation.num_stages
            query = select(EvaluationItem).where(EvaluationItem.evaluation_id == evaluation.id, numbers, done)
            async with self._store.look() as session:
                items = list(await session.scalars(query.order_by(EvaluationItem.number)))
            samples += [(group_of(item.row), item.found) for item in items]
        return evaluation, samples

    async def _waits_for(self, session: AsyncSession, rounds: Rounds, evaluation_ids: Iterable[str]) -> bool:
        """Returns whether at least one of the evaluations has not ended. Stores what such an evaluation waits for in
        the column `waits_for` of the set of rounds.

        Raises ApiError if one of the evaluations failed, was cancelled or deleted, or lacks the results of too many of
        its prompts.
        """
        found = [await evaluations.find(session, evaluation_id) for evaluation_id in evaluation_ids]
        for evaluation in found:
            if evaluation.state in ("failed", "cancelled"):
                error = evaluation.error or {"code": "evaluation_cancelled", "message": "it was cancelled"}
                message = f"the evaluation {evaluation.id} did not succeed: {error['message']}"
                raise ApiError(message, code=error["code"])
            if evaluation.state == "succeeded":
                await evaluations.refuse_incomplete(session, evaluation)
        waiting = [evaluation for evaluation in found if evaluation.state != "succeeded"]
        reasons = [
            f"the evaluation {evaluation.id}, which is paused" if evaluation.state == "paused" else evaluation.waits_for
            for evaluation in waiting
        ]
        rounds.waits_for = next(filter(None, reasons), None)
        return bool(waiting)

    # --- the job -------------------------------------------------------------------------------

    async def _train(self, session: AsyncSession, rounds: Rounds) -> bool:
        spec, entry = _spec(rounds), rounds.history[-1]
        with within("job"):
            asked = spec.job_of(rounds.id, entry["number"], _newest(rounds), entry["file"])
            admitted = await admission.admit(session, self._settings, asked.spec(), asked.asked())
            await plans.refuse_hopeless(admitted.spec, admitted.model, self._settings, self._ray_api)
        job = await jobs.submit(session, *admitted[:3], rounds.key_id, self._settings, are_checked=admitted.are_checked)
        return _add(rounds, job=job.id)

    async def _take_policy(self, session: AsyncSession, rounds: Rounds) -> bool:
        job = await jobs.find(session, rounds.history[-1]["job"])
        if job.observed == "succeeded":
            return _add(rounds, model=job.fine_tuned_model)
        if job.observed in TERMINAL:
            error = job.error or {"code": "job_cancelled", "message": "it was cancelled"}
            raise ApiError(f"the job {job.id} did not succeed: {error['message']}", code=error["code"])
        is_paused = job.observed == "paused"
        rounds.waits_for = f"the job {job.id}, which is paused" if is_paused else job.waits_for
        return False

    # --- evaluations of its policy -------------------------------------------------------------

    async def _evaluate(self, session: AsyncSession, rounds: Rounds) -> bool:
        spec, entry = _spec(rounds), rounds.history[-1]
        prompts = (await self._prompts(session))["held_out"]
        before = rounds.history[-2]["model"] if entry["number"] else None
        grader = await grader_of(session, self._settings, spec.evaluating_judge, of=entry["model"])
        wanted = {"quality": spec.quality_of(entry["model"], before, is_asked=grader.is_asked)}
        if entry["number"]:
            wanted["drift"] = spec.drift_of(entry["model"])
        made = {
            name: await self._create(session, rounds, each, prompts)
            for name, each in wanted.items()
            if each is not None
        }
        return _add(rounds, evaluations=made)

    async def _conclude(self, session: AsyncSession, rounds: Rounds) -> bool:
        """Stores the results of the round's evaluations in the round. Returns False, and stores no results, until all
        evaluations have ended.
        """
        ids: dict[str, str] = rounds.history[-1]["evaluations"]
        if await self._waits_for(session, rounds, ids.values()):
            return False
        found = {name: await evaluations.find(session, each) for name, each in ids.items()}
        told = {name: each.results or {} for name, each in found.items()}
        quality = told.get("quality", {})
        results = {
            "score": quality.get("score"),
            "win_rate": quality.get("win_rate"),
            "kl": told.get("drift", {}).get("kl_per_sequence"),
            "num_failed": sum(each.num_failed for each in found.values()),
        }
        return _add(rounds, results=results)

    async def _go_on(self, session: AsyncSession, rounds: Rounds) -> bool:
        """Begins the next round of the set of rounds. Ends the set instead after its last round. If the request asks
        for it, also ends the set after a round whose policy is not the best so far. Returns True: the stage is done.
        """
        spec, number = _spec(rounds), rounds.history[-1]["number"]
        if number == spec.num_rounds:
            await changes.end(session, rounds, "succeeded", end_reason="num_rounds")
        elif spec.stop_if_not_better and number and best_of(rounds.history)["number"] != number:
            await changes.end(session, rounds, "succeeded", end_reason="not_better")
        else:
            rounds.history = [*rounds.history, {"number": number + 1}]
        return True


def best_of(history: Sequence[Entry]) -> Entry:
    """Returns the round with the best policy so far. Each round trains the policy of the round before once more.
    `history` holds the rounds that have begun, in order; the first policy counts as round 0.

    If the judge gives scores, the best round is the first one with the highest mean score. If the judge compares each
    policy with that of the round before, rounds are followed as long as the new policy wins more than half of the
    comparisons: the best round is the last one that won.
    """
    done = [entry for entry in history if "results" in entry]
    scored = [entry for entry in done if entry["results"]["score"]]
    if scored:
        return max(scored, key=lambda entry: (entry["results"]["score"]["value"], -entry["number"]))
    compared = [entry for entry in done if entry["number"]]
    won = list(takewhile(lambda entry: entry["results"]["win_rate"]["value"] > 0.5, compared))
    return won[-1] if won else history[0]


async def _end_without_rows(session: AsyncSession, rounds: Rounds, *, counts: Mapping[str, int]) -> bool:
    """Ends the set of rounds, because the answers of the newest round make too few rows for a job. Returns True: the
    stage is done. `counts` are the counts that `rows_of` returned, such as `num_rows` and `num_ties`.

    In the first round, the set ends as failed. In a later round, it ends as succeeded: too few rows then mean that the
    judge no longer finds differences between the policy's answers.
    """
    number = rounds.history[-1]["number"]
    _add(rounds, rows=counts)
    if number > 1:
        await changes.end(session, rounds, "succeeded", end_reason="too_few_rows")
    else:
        left_out = ", ".join(f"{value} {name.removeprefix('num_')}" for name, value in counts.items() if value)
        message = (
            f"The samples of the first round make {counts['num_rows']} rows, but a job needs {MIN_EXAMPLES} "
            f"({left_out}); take more prompts or samples, a higher temperature, or another judge."
        )
        await changes.fail(session, rounds, ApiError(message, code="too_few_rows"))
    return True


async def _note_bytes(session: AsyncSession, rounds: Rounds, *, num_bytes: int) -> bool:
    """Stores `num_bytes`, the size of the round's training file, because the project has too little space left for the
    file. The file is made again only when the project has this space. Returns True.
    """
    return _add(rounds, num_bytes=num_bytes)


def _add(rounds: Rounds, **more: Any) -> bool:
    rounds.history = [*rounds.history[:-1], rounds.history[-1] | more]  # the session notices only a new list
    return True


def _newest(rounds: Rounds) -> str:
    """Returns the name of the newest policy of the set of rounds: the policy of the last round whose job has trained
    one."""
    return str(next(entry["model"] for entry in reversed(rounds.history) if "model" in entry))


def _spec(rounds: Rounds) -> RoundsSpec:
    return RoundsSpec.model_validate(rounds.spec, extra="ignore")
