"""Records the stages of an attempt (one run of a job), such as encoding and training, as spans of an OpenTelemetry
trace.

A stage has one span. The stage of training has several: a span ends after a hundred steps or after a minute, whichever
comes first.
"""

from services import tracing
from services.contract import Progress, Report, StepMetrics

STEPS = 100
SECONDS = 60.0


class StageSpans:
    """Turns the reports of an attempt (one run of a job) into spans of an OpenTelemetry trace. Each stage has one span,
    except training, which has several: a span of training ends after a hundred steps or after a minute, whichever comes
    first."""

    def __init__(self, traceparent: str | None) -> None:
        self._parent = traceparent
        self._name: str | None = None
        self._began = self._last_report = 0.0  # in Unix seconds
        self._first = self._last = 0  # first and last number of the span's steps, rows or bytes

    def add(self, report: Report, at: float) -> None:
        """Takes the next report of an attempt (one run of a job). If this report ends a stage or a part of training,
        writes the span of this stage or part.

        `at` is the report's time in Unix seconds.
        """
        if isinstance(report, StepMetrics):
            name, done = "training", report.step
        elif isinstance(report, Progress):
            name, done = report.stage, report.done
        else:
            return
        if name != self._name:
            began = self._last_report if self._name else at
            self.end()
            self._name, self._began, self._first = name, began, done
        self._last_report, self._last = at, done
        if name == "training" and (done - self._first + 1 >= STEPS or at - self._began >= SECONDS):
            self.end()
            self._name, self._began, self._first = name, at, done + 1

    def end(self) -> None:
        """Ends the current span of the trace, and writes it. Does nothing if no span has begun."""
        if self._name and self._last >= self._first:
            tracing.record(
                self._name,
                parent=self._parent,
                key=f"{self._parent} {self._name} {self._began}",
                start=self._began,
                end=self._last_report,
                attributes={"raydpo.first": self._first, "raydpo.last": self._last},
            )
        self._name = None
