"""Scores a dataset with the reference model. A score is the log-probability of a completion, in nats.

The dataset consists of parts, each a file of encoded groups (prompts with completions). The scores of each part are
written to one file. A part whose file of scores exists is not scored again. `score` writes the files; it is given a
function that computes the scores. `by_deployment` returns such a function, which makes many calls at the same time to
the reference's deployment in Ray Serve.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Protocol

from ray.exceptions import RayActorError

from dpo_core.encoding.encode import EncodedGroup
from services.contract import Adapter, Message, Progress, Report, Score, Spans
from services.training.data.dataset import Dataset, Part, find_scores, read_part, write_scores
from services.training.reports.reporting import progress

logger = logging.getLogger(__name__)

GROUPS_PER_CALL = 16
CALLS_IN_FLIGHT = 32
PAUSES_SECONDS = (0.0, 2.0, 10.0, 30.0)  # before a call is sent again because a replica died; then the attempt ends
LOADING_SECONDS = 3600.0  # enough for a large model on a cluster that has to grow first
REPORT_SECONDS = 5.0


class Answer(Protocol):
    """The type of the result of a call to the reference model's deployment. The call may not have ended yet; the method
    `result` waits for its end."""

    def result(self) -> Any: ...


class Ask(Protocol):
    """The type of a function that sends rows (a prompt and a completion each) to the reference model's deployment, and
    returns an answer.

    The answer has one element for each row, in the order of the rows.
    """

    def __call__(
        self, prompt_ids: list[list[int]], completion_ids: list[list[int]], others: Sequence[Spans] = ()
    ) -> Answer:
        """Sends rows (a prompt and a completion each) to the reference model's deployment. Entry i of `prompt_ids`,
        `completion_ids` and `others` belongs to row i. An entry of `others` holds the ranges of the completion's tokens
        that do not count in the loss."""


@dataclass(frozen=True)
class Reference:
    """Holds two functions that call the reference model's deployment: `score` scores whole completions, and
    `token_logps` returns the log-probability of each token."""

    score: Ask  # answers with a Score for each row
    token_logps: Ask  # answers with a list of log-probs for each row


Connect = Callable[[], Reference]
ScoreParts = Callable[[Dataset, str, Sequence[Part], Callable[[int], None]], Iterator[Part]]
"""A function that scores parts (files of groups) of a dataset, and writes the scores to a folder. It yields each part
when this part is scored, and calls its last argument with the number of groups that were scored since the last call."""


def score(encoded: Dataset, uri: str, score_parts: ScoreParts, report: Callable[[Report], None]) -> Dataset:
    """Scores the groups (prompts with their completions) of the dataset `encoded` with the function `score_parts`.
    Returns the dataset with the files of the scores.

    The files are written to the folder `uri`. Parts (files of groups) whose scores are there already are not scored
    again. The progress is reported with `report`.
    """
    if not encoded.parts:
        return encoded
    scored = {part.name: part for part in (find_scores(uri, part) for part in encoded.parts) if part}
    unscored = [part for part in encoded.parts if part.name not in scored]
    count = encoded.num_groups - sum(part.num_groups for part in unscored)
    done = progress(report, "scoring", encoded.num_groups, start=count)

    def add(groups: int) -> None:
        nonlocal count
        count += groups
        done(count)

    scored |= {part.name: part for part in score_parts(encoded, uri, unscored, add)}
    return encoded.model_copy(update={"scores_uri": uri, "parts": tuple(scored[part.name] for part in encoded.parts)})


# --- by a deployment ---------------------------------------------------------------------------------


def await_reference(app_name: str, report: Callable[[Report], None], adapter: Adapter | None = None) -> Reference:
    """Waits until the reference model's deployment, called `app_name`, is ready, and returns the functions that call
    it. `report` tells the user about the progress.

    The functions score with `adapter`, if one is given. Raises RuntimeError if the deployment cannot be loaded, or if
    loading takes longer than LOADING_SECONDS.
    """
    from ray import serve  # importing Serve takes more than a second, and most jobs do not need Serve

    deadline = time.monotonic() + LOADING_SECONDS
    next_report = 0.0
    while True:
        application = serve.status().applications.get(app_name)
        status = application.status if application else None
        if status == "RUNNING":
            handle = serve.get_app_handle(app_name)
            named = {"adapter": adapter} if adapter else {}
            return Reference(partial(handle.score.remote, **named), partial(handle.token_logps.remote, **named))
        if application and status == "DEPLOY_FAILED":
            sentence = f"Ray Serve could not load the reference model {app_name}: {application.message}"
            report(Message(level="error", message=sentence))
            raise RuntimeError(sentence)
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"The reference model {app_name} is not ready after {LOADING_SECONDS:.0f} s (its status is {status}); "
                "see the logs of Ray Serve."
            )
        if time.monotonic() >= next_report:
            report(Progress(stage="loading reference", done=0, total=0))
            next_report = time.monotonic() + REPORT_SECONDS
        time.sleep(0.5)


def by_deployment(connect: Connect, report: Callable[[Report], None], *, heads: bool = False) -> ScoreParts:
    """Returns a function that scores parts (files of groups) by calls to the reference model's deployment.

    `connect` is a function that returns the functions that call the deployment. If a replica dies during a call,
    `connect` is called again, and the call is repeated a few times; `report` tells the user so once. With `heads`, each
    completion also gets the log-probability of its head: its first tokens that count in the loss, as many as the
    group's shortest completion has. Without `heads`, the deployment returns only the log-probability of the whole
    completion.
    """
    score_groups = _scored_with_heads if heads else _scored

    def score_parts(dataset: Dataset, uri: str, parts: Sequence[Part], done: Callable[[int], None]) -> Iterator[Part]:
        scored = score_groups((group for part in parts for group in read_part(dataset, part)), connect, report)
        for part in parts:
            groups = []
            for group in islice(scored, part.num_groups):
                groups.append(group)
                done(1)
            yield write_scores(uri, part, groups, heads=heads)

    return score_parts


def _scored(
    groups: Iterator[EncodedGroup], connect: Connect, report: Callable[[Report], None]
) -> Iterator[EncodedGroup]:
    for group, scores in _ask_all(groups, connect, lambda reference: reference.score, report):
        sums: list[Score] = [Score(*score) for score in scores]
        assert [score.num_tokens for score in sums] == group.num_learned
        yield replace(group, ref_logps=tuple(score.logp for score in sums))


def _scored_with_heads(
    groups: Iterator[EncodedGroup], connect: Connect, report: Callable[[Report], None]
) -> Iterator[EncodedGroup]:
    for group, rows in _ask_all(groups, connect, lambda reference: reference.token_logps, report):
        logps, heads = (tuple(math.fsum(row[:end]) for row in rows) for end in (None, group.head_length))
        yield replace(group, ref_logps=logps, ref_head_logps=heads)


def served_token_logps(
    groups: Iterable[EncodedGroup], connect: Connect, report: Callable[[Report], None]
) -> list[list[list[float]]]:
    """Asks the reference model's deployment for the log-probability, in nats, of each token that counts in the loss.
    `[group][completion]` of the result is a list of these log-probabilities; a group is a prompt with its completions.
    `connect` is a function that returns the functions that call the deployment. `report` tells the user if calls have
    to be repeated."""
    return [answers for _, answers in _ask_all(iter(groups), connect, lambda reference: reference.token_logps, report)]


def _ask_all(
    groups: Iterator[EncodedGroup],
    connect: Connect,
    call_of: Callable[[Reference], Ask],
    report: Callable[[Report], None],
) -> Iterator[tuple[EncodedGroup, list[Any]]]:
    """Sends all groups (prompts with their completions) to the reference model's deployment, with several calls at the
    same time. Yields two values for each group: the group, and the list of its answers, one for each of its
    completions.

    `connect` is a function that returns the functions that call the deployment, and `call_of` chooses one of them.
    `report` tells the user about the first call that has to be repeated.
    """
    ask, is_told = call_of(connect()), False

    def again() -> Ask:
        nonlocal is_told
        if not is_told:
            is_told = True
            what = "A replica of the reference model died while it scored; its rows are sent to another replica"
            report(Message(level="warn", message=f"{what}, up to {len(PAUSES_SECONDS)} times."))
        return call_of(connect())

    in_flight: deque[tuple[list[EncodedGroup], Answer]] = deque()
    while chunk := list(islice(groups, GROUPS_PER_CALL)):
        if len(in_flight) == CALLS_IN_FLIGHT:
            yield from _answered(*in_flight.popleft(), again)
        in_flight.append((chunk, _send(ask, chunk)))
    while in_flight:
        yield from _answered(*in_flight.popleft(), again)


def _send(ask: Ask, groups: list[EncodedGroup]) -> Answer:
    prompts = [list(group.prompt_ids) for group in groups for _ in group.completion_ids]
    completions = [list(ids) for group in groups for ids in group.completion_ids]
    if not any(group.others for group in groups):
        return ask(prompt_ids=prompts, completion_ids=completions)
    others = [spans for group in groups for spans in group.others or [()] * len(group.completion_ids)]
    return ask(prompt_ids=prompts, completion_ids=completions, others=others)


def _answered(
    groups: list[EncodedGroup], answer: Answer, again: Callable[[], Ask]
) -> Iterator[tuple[EncodedGroup, list[Any]]]:
    for pause in (*PAUSES_SECONDS, None):
        try:
            answers = iter(answer.result())
            break
        except RayActorError as error:  # a replica died; Serve starts another
            if pause is None:
                raise
            logger.warning("A request to the served reference model failed and is sent again: %r", error)
            time.sleep(pause)
            answer = _send(again(), groups)
    for group in groups:
        yield group, [next(answers) for _ in group.completion_ids]
