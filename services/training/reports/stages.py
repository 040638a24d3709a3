"""An attempt's time as spans of a trace: one for each stage, and of training one for every hundred steps or minute."""

from services import tracing
from services.contract import Progress, Report, StepMetrics

STEPS = 100
SECONDS = 60.0


class Stretches:
    """Fed with each report; writes a stretch when it is over."""

    def __init__(self, traceparent: str | None) -> None:
        self._parent = traceparent
        self._name: str | None = None
        self._began = self._seen = 0.0  # Unix seconds
        self._first = self._last = 0  # of what the stage counts: steps, rows, bytes

    def see(self, report: Report, at: float) -> None:
        if isinstance(report, StepMetrics):
            name, done = "training", report.step
        elif isinstance(report, Progress):
            name, done = report.stage, report.done
        else:
            return
        if name != self._name:
            began = self._seen if self._name else at
            self.end()
            self._name, self._began, self._first = name, began, done
        self._seen, self._last = at, done
        if name == "training" and (done - self._first + 1 >= STEPS or at - self._began >= SECONDS):
            self.end()
            self._name, self._began, self._first = name, at, done + 1

    def end(self) -> None:
        if self._name and self._last >= self._first:
            tracing.record(
                self._name,
                parent=self._parent,
                key=f"{self._parent} {self._name} {self._began}",
                start=self._began,
                end=self._seen,
                attributes={"raydpo.first": self._first, "raydpo.last": self._last},
            )
        self._name = None
