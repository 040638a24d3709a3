"""What the reference says of the completions: waiting for its deployment, and many calls in flight to it."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Protocol

from ray import serve
from ray.exceptions import RayActorError

from dpo_core.encode import EncodedGroup
from services.contract import Message, Progress, Report, Score
from services.training.dataset import Dataset, Part, read_groups, write_part
from services.training.reporting import progress

logger = logging.getLogger(__name__)

GROUPS_PER_CALL = 16
CALLS_IN_FLIGHT = 32
SENDS = 5  # of one call, when replicas die under it
LOADING_SECONDS = 3600.0  # a large model on a cluster that has to grow first
REPORT_SECONDS = 5.0


class Answer(Protocol):
    """A call in flight."""

    def result(self) -> list[Score]: ...


# Prompts' and completions' ids, row by row; what comes back has their order.
Ask = Callable[[list[list[int]], list[list[int]]], Answer]


def await_reference(app_name: str, report: Callable[[Report], None]) -> Ask:
    """Returns when the deployment answers. Raises RuntimeError if it cannot be loaded, or not in time."""
    deadline = time.monotonic() + LOADING_SECONDS
    next_report = 0.0
    while True:
        application = serve.status().applications.get(app_name)
        status = application.status if application else None
        if status == "RUNNING":
            ask: Ask = serve.get_app_handle(app_name).score.remote
            return ask
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


def score(encoded: Dataset, uri: str, connect: Callable[[], Ask], report: Callable[[Report], None]) -> Dataset:
    """Copies the data to the folder `uri`, with `ref_logps`."""
    ask = connect()
    done = progress(report, "scoring", encoded.num_groups)
    scored = _ask_all(read_groups(encoded), ask, connect)
    parts: list[Part] = []
    count = 0
    for part in encoded.parts:
        groups = []
        for group in islice(scored, part.num_groups):
            groups.append(group)
            count += 1
            done(count)
        parts.append(write_part(uri, part.name, groups))
    return Dataset(uri=uri, parts=tuple(parts))


def _ask_all(groups: Iterator[EncodedGroup], ask: Ask, connect: Callable[[], Ask]) -> Iterator[EncodedGroup]:
    in_flight: deque[tuple[list[EncodedGroup], Answer]] = deque()
    while chunk := list(islice(groups, GROUPS_PER_CALL)):
        if len(in_flight) == CALLS_IN_FLIGHT:
            yield from _answered(*in_flight.popleft(), connect)
        in_flight.append((chunk, _send(ask, chunk)))
    while in_flight:
        yield from _answered(*in_flight.popleft(), connect)


def _send(ask: Ask, groups: list[EncodedGroup]) -> Answer:
    rows = [(list(group.prompt_ids), list(ids)) for group in groups for ids in group.completion_ids]
    return ask([prompt for prompt, _ in rows], [completion for _, completion in rows])


def _answered(groups: list[EncodedGroup], answer: Answer, connect: Callable[[], Ask]) -> Iterator[EncodedGroup]:
    for sends in range(1, SENDS + 1):
        try:
            scores = iter(answer.result())
            break
        except RayActorError as error:  # a replica died; Serve starts another
            if sends == SENDS:
                raise
            logger.warning("A call to the reference is sent again: %r", error)
            answer = _send(connect(), groups)
    for group in groups:
        own = [next(scores) for _ in group.completion_ids]
        assert [score.num_tokens for score in own] == [len(ids) for ids in group.completion_ids]
        yield replace(group, ref_logps=tuple(score.logp for score in own))
