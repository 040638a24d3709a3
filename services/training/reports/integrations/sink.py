"""The interface of an integration: a sink for the metrics of a job's steps."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from services.contract import Started

Status = Literal["succeeded", "failed"]


class Step(NamedTuple):
    """One optimizer step."""

    number: int  # from 1
    at: float  # Unix seconds
    metrics: dict[str, float]  # with the names of Hugging Face's trainers: `train/loss`, `eval/loss`


class Sink(Protocol):
    """A job's run in one service. The constructor finds or begins the run there.

    Any call may raise, and may take long. A sink that raised is dropped, and another one is made.
    """

    last_step: int  # the last step that the run has; 0: none
    where: str  # the user can see the run: part of a sentence

    def begin(self, started: Started) -> None:
        """Writes the resolved config. May be called again."""

    def write(self, steps: Sequence[Step]) -> None:
        """Writes steps after `last_step`, in order. No step is sent twice."""

    def close(self, status: Status | None) -> None:
        """Ends the run. `status` None: another attempt may continue it."""
