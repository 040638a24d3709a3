"""What the reference says of the completions: by its deployment, with many calls in flight, or by the trainer.

A part's scores are one file, and a part that has them is not scored again.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

from ray.exceptions import RayActorError

from dpo_core.encoding.encode import EncodedGroup
from services.contract import Message, Progress, Report, Score
from services.training.data.dataset import Dataset, Part, find_scores, read_part, write_scores
from services.training.reports.reporting import progress

logger = logging.getLogger(__name__)

GROUPS_PER_CALL = 16
CALLS_IN_FLIGHT = 32
SENDS = 5  # of one call, when replicas die under it
LOADING_SECONDS = 3600.0  # a large model on a cluster that has to grow first
REPORT_SECONDS = 5.0


class Answer(Protocol):
    """A call in flight."""

    def result(self) -> Any: ...


# Prompts' and completions' ids, row by row, and the spans of these that are not learned, if there are any;
# what comes back has their order.
Ask = Callable[..., Answer]


@dataclass(frozen=True)
class Reference:
    """A deployment that answers."""

    score: Ask  # with a Score for each row
    token_logps: Ask  # with a list for each row


Connect = Callable[[], Reference]
ScoreParts = Callable[[Dataset, str, Sequence[Part], Callable[[int], None]], Iterator[Part]]
"""Writes the scores of parts to a folder, yields each part once it is there, and is told how many groups are done."""


def score(encoded: Dataset, uri: str, score_parts: ScoreParts, report: Callable[[Report], None]) -> Dataset:
    """The data with scores, which stand in the folder `uri`; those that stand there already are used."""
    if not encoded.parts:
        return encoded
    found = [find_scores(uri, part) for part in encoded.parts]
    scored = {part.name: part for part in found if part}
    left = [part for part in encoded.parts if part.name not in scored]
    count = encoded.num_groups - sum(part.num_groups for part in left)
    done = progress(report, "scoring", encoded.num_groups, start=count)

    def add(groups: int) -> None:
        nonlocal count
        count += groups
        done(count)

    scored |= {part.name: part for part in score_parts(encoded, uri, left, add)}
    return encoded.model_copy(update={"scores_uri": uri, "parts": tuple(scored[part.name] for part in encoded.parts)})


# --- by a deployment ---------------------------------------------------------------------------------


def await_reference(app_name: str, report: Callable[[Report], None]) -> Reference:
    """Returns when the deployment answers. Raises RuntimeError if it cannot be loaded, or not in time."""
    from ray import serve  # its import takes more than a second, and most jobs do without

    deadline = time.monotonic() + LOADING_SECONDS
    next_report = 0.0
    while True:
        application = serve.status().applications.get(app_name)
        status = application.status if application else None
        if status == "RUNNING":
            handle = serve.get_app_handle(app_name)
            return Reference(handle.score.remote, handle.token_logps.remote)
        if application and status == "DEPLOY_FAILED":
            sentence = f"The reference {app_name} could not be loaded: {application.message}"
            report(Message(level="error", message=sentence))
            raise RuntimeError(sentence)
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"The reference {app_name} is {status} after {LOADING_SECONDS:.0f} s; see its deployment."
            )
        if time.monotonic() >= next_report:
            report(Progress(stage="loading reference", done=0, total=0))
            next_report = time.monotonic() + REPORT_SECONDS
        time.sleep(0.5)


def by_deployment(connect: Connect, *, heads: bool = False) -> ScoreParts:
    """Sums are taken in the replica, but for those of `heads`; a call whose replica dies is sent again."""
    score_groups = _scored_with_heads if heads else _scored

    def score_parts(dataset: Dataset, uri: str, parts: Sequence[Part], done: Callable[[int], None]) -> Iterator[Part]:
        scored = score_groups((group for part in parts for group in read_part(dataset, part)), connect)
        for part in parts:
            groups = []
            for group in islice(scored, part.num_groups):
                groups.append(group)
                done(1)
            yield write_scores(uri, part, groups, heads=heads)

    return score_parts


def _scored(groups: Iterator[EncodedGroup], connect: Connect) -> Iterator[EncodedGroup]:
    for group, scores in _ask_all(groups, connect, lambda reference: reference.score):
        own: list[Score] = [Score(*score) for score in scores]
        assert [score.num_tokens for score in own] == group.num_learned
        yield replace(group, ref_logps=tuple(score.logp for score in own))


def _scored_with_heads(groups: Iterator[EncodedGroup], connect: Connect) -> Iterator[EncodedGroup]:
    for group, rows in _ask_all(groups, connect, lambda reference: reference.token_logps):
        logps, heads = (tuple(math.fsum(row[:end]) for row in rows) for end in (None, group.head_length))
        yield replace(group, ref_logps=logps, ref_head_logps=heads)


def served_token_logps(groups: Iterable[EncodedGroup], connect: Connect) -> list[list[list[float]]]:
    """Of each group, completion and learned token, in nats."""
    return [answers for _, answers in _ask_all(iter(groups), connect, lambda reference: reference.token_logps)]


def _ask_all(
    groups: Iterator[EncodedGroup], connect: Connect, which: Callable[[Reference], Ask]
) -> Iterator[tuple[EncodedGroup, list[Any]]]:
    """Each group with the answers on its completions."""
    ask = which(connect())
    in_flight: deque[tuple[list[EncodedGroup], Answer]] = deque()
    while chunk := list(islice(groups, GROUPS_PER_CALL)):
        if len(in_flight) == CALLS_IN_FLIGHT:
            yield from _answered(*in_flight.popleft(), lambda: which(connect()))
        in_flight.append((chunk, _send(ask, chunk)))
    while in_flight:
        yield from _answered(*in_flight.popleft(), lambda: which(connect()))


def _send(ask: Ask, groups: list[EncodedGroup]) -> Answer:
    prompts = [list(group.prompt_ids) for group in groups for _ in group.completion_ids]
    completions = [list(ids) for group in groups for ids in group.completion_ids]
    if not any(group.others for group in groups):
        return ask(prompts, completions)
    others = [spans for group in groups for spans in group.others or [()] * len(group.completion_ids)]
    return ask(prompts, completions, others)


def _answered(
    groups: list[EncodedGroup], answer: Answer, connect: Callable[[], Ask]
) -> Iterator[tuple[EncodedGroup, list[Any]]]:
    for sends in range(1, SENDS + 1):
        try:
            answers = iter(answer.result())
            break
        except RayActorError as error:  # a replica died; Serve starts another
            if sends == SENDS:
                raise
            logger.warning("A call to the reference is sent again: %r", error)
            answer = _send(connect(), groups)
    for group in groups:
        yield group, [next(answers) for _ in group.completion_ids]
