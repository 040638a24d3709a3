"""Data on the way: workers train on the first window of the order while the rest is encoded.

Parts are told to an actor on the driver's node, which lives and dies with the driver; workers ask it for those of
their next window, and wait there until all of them are encoded.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray

from services.contract import AttemptSpec, Message, Report
from services.training.data.dataset import Dataset, Part
from services.training.data.encoding import Encoded, Piece, unrefused
from services.training.data.row_order import windows
from services.training.node import local_actor

MOST_WAITING = 10_000  # calls at once: every worker's, and those of workers that died waiting


@dataclass(frozen=True)
class Stream:
    """The training data, and later the held-out ones. Reads as a Dataset does, and travels to workers."""

    uri: str
    num_rows: tuple[int, ...]  # of each piece
    arrivals: Any
    scores_uri: str | None = None  # there are none

    def take(self, pieces: Sequence[int]) -> list[Part]:
        """Waits until they are encoded."""
        parts: list[Part] = ray.get(self.arrivals.take.remote(pieces))
        return parts

    def held_out(self) -> Dataset | None:
        """Waits until all is prepared."""
        found: Dataset | None = ray.get(self.arrivals.held_out.remote())
        return found

    def finish(self, held_out: Dataset | None) -> None:
        ray.get(self.arrivals.finish.remote(held_out))


class EncodePieces(Protocol):
    """Encodes them and yields the results, in any order."""

    def __call__(self, pieces: Sequence[Piece], *, beside: int = 0) -> Iterable[Encoded]:
        """`beside`: workers that train meanwhile; pieces are begun in their order then."""


def streamed(
    spec: AttemptSpec,
    uri: str,
    encode_pieces: EncodePieces,
    begin: Callable[[Stream], None],
    report: Callable[[Report], None],
) -> Callable[[Sequence[Piece]], Iterator[Encoded]]:
    """Encodes pieces in the order of training, and calls `begin` when the first window is done and others are left.

    From then on a line that cannot be used raises JobFailed at once.
    """

    def encode_in_order(pieces: Sequence[Piece]) -> Iterator[Encoded]:
        num_rows = tuple(piece.num_rows for piece in pieces)
        first, *others = ([pieces[n] for n in numbers] for _, numbers in windows(num_rows, spec.config.seed, epoch=0))
        rest = [piece for window in others for piece in window]
        done = []
        for result in unrefused(encode_pieces(first)):
            yield result
            done.append(result)
        parts = {result.piece: result.training for result in done if result.training}
        if not rest or not any(part.num_groups for part in parts.values()):
            yield from encode_pieces(rest)
            return
        arrivals = local_actor(Arrivals, max_concurrency=MOST_WAITING).remote(parts)
        stream = Stream(uri, num_rows, arrivals)
        rows = sum(piece.num_rows for piece in first)
        report(Message(message=f"Training begins with {rows} of {sum(num_rows)} rows, while the others are encoded."))
        begin(stream)
        for result in encode_pieces(rest, beside=spec.num_workers):
            yield from unrefused([result])
            stream.arrivals.add.remote(result.piece, result.training)

    return encode_in_order


class Arrivals:
    """Which parts are there."""

    def __init__(self, parts: dict[int, Part]) -> None:
        self._parts = parts
        self._held_out: Dataset | None = None
        self._finished = False
        self._changed = asyncio.Condition()

    async def add(self, piece: int, part: Part) -> None:
        async with self._changed:
            self._parts[piece] = part
            self._changed.notify_all()

    async def finish(self, held_out: Dataset | None) -> None:
        async with self._changed:
            self._held_out, self._finished = held_out, True
            self._changed.notify_all()

    async def take(self, pieces: Sequence[int]) -> list[Part]:
        async with self._changed:
            await self._changed.wait_for(lambda: all(piece in self._parts for piece in pieces))
            return [self._parts[piece] for piece in pieces]

    async def held_out(self) -> Dataset | None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._finished)
            return self._held_out
