"""Checks a request for a set of rounds (repeated training of a policy on its own answers) before anything is created:
the prompts, the judges, and the job of a round."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from dpo_core.data.groups import Group
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.core.store import ProjectStore
from services.control_plane.evaluations import of_jobs, rows
from services.control_plane.evaluations.kinds import drift, samples
from services.control_plane.evaluations.kinds.judging import grader_of
from services.control_plane.evaluations.requests import EvaluationRow, Judge
from services.control_plane.http.validation import within
from services.control_plane.jobs import admission
from services.control_plane.jobs.plans import plans
from services.control_plane.jobs.requests import CreateJob, is_local
from services.control_plane.ray_api import RayApi
from services.control_plane.rewards.judges import check_implicit
from services.control_plane.rounds.requests import LOCAL_ROWS, MOST_ROWS, CreateRounds, RoundsSpec
from services.control_plane.settings import Settings


async def prompts_of(store: ProjectStore, body: CreateRounds) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns two lists of prompts, as JSON objects: those to which the policies write answers, and those on which the
    policies are evaluated. If the request has no prompts for evaluations, both lists are the same.

    Raises InvalidRequest if there are no prompts, if the prompts are too large together, if some are texts and others
    messages, or if a round could make more than MOST_ROWS rows of them.
    """
    sampled = await _read(store, body.rows, body.file, body.max_items, body.judge)
    if len({isinstance(group.prompt, str) for group in sampled}) > 1:
        message = "Some prompts are texts and others are messages; send only texts or only messages."
        raise InvalidRequest(message, param="rows")
    _check_number(body, len(sampled))
    held_out = body.evaluation
    if held_out.rows is None and held_out.file is None:
        given = sampled[: held_out.max_items]
        rows.check_expected(given, body.evaluating_judge, "rows" if body.rows is not None else "file")
    else:
        with within("evaluation"):
            given = await _read(store, held_out.rows, held_out.file, held_out.max_items, body.evaluating_judge)
    return rows.to_json(sampled), rows.to_json(given)


def _check_number(body: CreateRounds, num_sampled: int) -> None:
    of_each = body.selection.resolved(body.num_samples).most_rows(body.num_samples)
    num_prompts = body.num_prompts(num_sampled)
    if num_prompts * of_each > MOST_ROWS:
        message = (
            f"A round could make {num_prompts * of_each} rows, {of_each} of each of {num_prompts} prompts, but it can "
            f"make at most {MOST_ROWS}; lower prompts_per_round or num_samples, or choose another selection."
        )
        raise InvalidRequest(message, param="num_samples")


async def _read(
    store: ProjectStore, given: Sequence[EvaluationRow] | None, file: str | None, most: int, judge: Judge
) -> list[Group]:
    groups = await rows.read(store, given, file, most)
    rows.check_expected(groups, judge, "rows" if given is not None else "file")
    return groups


async def check(session: AsyncSession, settings: Settings, ray_api: RayApi, spec: RoundsSpec) -> None:
    """Checks that the first round can be done as `spec` describes it. Raises ApiError, which names the invalid field,
    if the round cannot be done.
    """
    sampling = await samples.of(session, settings, spec.samples_of(spec.model, 1))
    if sampling.grader.is_asked and spec.selection.type == "rso":
        message = (
            f"The judge '{spec.judge.model}' only compares answers, but the selection 'rso' needs scores; take a "
            "reward model, an implicit reward or a rule."
        )
        raise InvalidRequest(message, param="selection.type")
    await _check_evaluation(session, settings, spec)
    await _check_job(session, settings, ray_api, spec)


async def _check_evaluation(session: AsyncSession, settings: Settings, spec: RoundsSpec) -> None:
    if spec.evaluating_judge.type == "implicit" and spec.evaluating_judge.model is None:
        message = (
            "Implicit rewards of different policies cannot be compared; name a judge for the evaluations in "
            "'evaluation.judge', or one policy for all rounds in 'judge.model'."
        )
        raise InvalidRequest(message, param="evaluation.judge")
    if spec.evaluation.judge is not None:
        with within("evaluation"):
            await grader_of(session, settings, spec.evaluation.judge, of=spec.model)
    with within("evaluation"):
        await drift.of(session, settings, spec.drift_of(spec.model))


async def check_rows(store: ProjectStore, spec: RoundsSpec) -> None:
    """Raises InvalidRequest if the rows of a file do not suit the evaluation of the jobs that names the file."""
    with within("job"):
        await of_jobs.check_rows(store, _first_job(spec).spec(), local_files=True)


def _first_job(spec: RoundsSpec) -> CreateJob:
    return spec.job_of("rounds-" + "0" * 24, 1, spec.model, LOCAL_ROWS)


async def _check_job(session: AsyncSession, settings: Settings, ray_api: RayApi, spec: RoundsSpec) -> None:
    with within("job"):
        asked = _first_job(spec)
        job = asked.spec()
        if job.validation_file is not None and is_local(job.validation_file):
            message = f"validation_file is '{job.validation_file:.80}', but it must be the id of an uploaded file."
            raise InvalidRequest(message, param="validation_file")
        admitted = await admission.admit(session, settings, job, asked.asked(), local_files=True)
        await of_jobs.check(session, settings, job)  # their files must be uploaded
        await plans.refuse_hopeless(admitted.spec, admitted.model, settings, ray_api)
    traits = job.config.objective.traits
    made = "ratings" if spec.selection.type == "ranking" else "pairs"
    if made not in traits.learns_from:
        kinds = " or ".join(traits.learns_from)
        message = (
            f"The selection '{spec.selection.type}' makes {made}, but the method '{job.config.objective.type}' learns "
            f"from {kinds}; choose another selection or another method."
        )
        raise InvalidRequest(message, param="selection.type")
    if traits.num_outputs:
        method = job.config.objective.type
        message = f"The method '{method}' trains a reward model, which writes no answers; choose another method."
        raise InvalidRequest(message, param="job.method.type")
    judge = spec.judge
    if spec.num_rounds > 1 and judge.type == "implicit" and judge.model is None:
        with within("judge"):
            check_implicit("the policy of a round", job.config.objective, reference=judge.reference, beta=judge.beta)
