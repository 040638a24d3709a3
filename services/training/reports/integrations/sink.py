"""What an integration must be able to do."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from services.contract import Started

Status = Literal["succeeded", "failed"]


class Step(NamedTuple):
    """One optimizer step."""

    number: int  # from 1
    at: float  # Unix seconds
    metrics: dict[str, float]  # as Hugging Face's trainers name them: `train/loss`, `eval/loss`


class Sink(Protocol):
    """A job's run in one place; made, it is found or begun there.

    Any call may raise, and may take its time. A sink is then dropped, and another one made.
    """

    last_step: int  # that the run has; 0: none
    where: str  # it is to be seen: a clause for the user

    def begin(self, started: Started) -> None:
        """The resolved config. May be repeated."""

    def write(self, steps: Sequence[Step]) -> None:
        """Steps after `last_step`, in order; none is sent twice."""

    def close(self, status: Status | None) -> None:
        """None: another attempt may continue the run."""
