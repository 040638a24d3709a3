"""Writes the spool of a job (the reports in storage) as the job's attempts would have written it."""

import time
from collections.abc import Callable
from typing import Any

from services import spool
from services.contract import AttemptSpec, EventBatch, JobEvent, Report, Started, StepMetrics

STARTED_AT = 1_700_000_000.0


class Spool:
    """Writes reports in files of four. The time of a report is STARTED_AT plus its number in seconds."""

    def __init__(self, spec: AttemptSpec) -> None:
        self.spec = spec
        self.next_seq: dict[int, int] = {}

    def add(self, *reports: Report, attempt: int = 1) -> None:
        for start in range(0, len(reports), 4):
            first = self.next_seq.get(attempt, 0)
            events = [
                JobEvent(seq=first + place, created_at=STARTED_AT + first + place, report=report)
                for place, report in enumerate(reports[start : start + 4])
            ]
            self.next_seq[attempt] = first + len(events)
            body = EventBatch(events=events).model_dump_json().encode()
            spool.write(spool.segment_uri(self.spec.run_uri, attempt, first), body)

    def add_steps(self, first: int, last: int, *, attempt: int = 1) -> None:
        """Adds the report that training has started, and the metrics of the steps from `first` to `last`."""
        started = Started(config=self.spec.config, num_groups=24, total_steps=9, resumed_from=first - 1)
        self.add(started, *(step(number) for number in range(first, last + 1)), attempt=attempt)


def step(number: int) -> StepMetrics:
    held_out = {"eval/loss": 2 / number} if number % 3 == 0 else {}
    metrics = {"loss": 1 / number, "rewards/margins": number / 8, **held_out}
    return StepMetrics(step=number, total_steps=9, metrics=metrics)


def until(condition: Callable[[], Any], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
