"""Defines the interface of a sink: an object that writes a job's metrics to another service, such as MLflow."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from services.contract import Started

Status = Literal["succeeded", "failed"]


class Step(NamedTuple):
    """Holds the metrics of one optimizer step: its number, its time `at` in Unix seconds, and the metrics by name."""

    number: int  # from 1
    at: float  # Unix seconds
    metrics: dict[str, float]  # with the names of Hugging Face's trainers: `train/loss`, `eval/loss`


class Sink(Protocol):
    """Writes a job's metrics to a run in another service, such as MLflow. The constructor finds or creates this run.
    `last_step` is the last step that the run has, and `where` tells the user where the run is.

    Any call may raise an error, and any call may take long. After an error the caller must drop the sink and make
    another one.
    """

    last_step: int  # the last step that the run has; 0: none
    where: str  # where the user can see the run, as a part of a sentence

    def begin(self, started: Started) -> None:
        """Writes the job's config, which the report `started` holds with a final value for every option, to the run in
        the service. The method may be called again for the same run."""

    def write(self, steps: Sequence[Step]) -> None:
        """Writes the metrics of `steps`, in order, to the run in the service. All of these steps must come after
        `last_step`, the last step that the run has."""

    def close(self, status: Status | None) -> None:
        """Ends the run in the service. `status` is how the job ended; it is None if another attempt (run of the job on
        Ray) may continue the run."""
