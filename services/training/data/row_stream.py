"""Lets workers train on the first rows of a file while the other rows are still being encoded.

The file is encoded in pieces (ranges of lines). A part is the file of groups (prompts with their completions) that
comes from one piece. The job's driver (its main program) tells an actor on its node about each finished part; the actor
ends with the driver. Workers read eight pieces, a window, at a time. They ask the actor for the parts of their next
window, and wait until all of these are encoded.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray

from services.contract import AttemptSpec, Message, Report
from services.training.data.dataset import Dataset, Part
from services.training.data.encoding import Encoded, Piece, raise_refusals
from services.training.data.row_order import windows
from services.training.node import local_actor

MOST_WAITING = 10_000  # most waiting calls: one of every worker, and those of workers that died during a call


@dataclass(frozen=True)
class Stream:
    """Describes training data that are still being encoded. The actor `arrivals` knows which parts (files of encoded
    groups) are finished.

    Workers read a Stream like a Dataset. They can read the groups that are held out for validation only when all rows
    are encoded.
    """

    uri: str
    num_rows: tuple[int, ...]  # rows of each piece
    arrivals: Any  # handle of the actor Arrivals
    scores_uri: str | None = None  # data that need scores are not streamed

    def take(self, pieces: Sequence[int]) -> list[Part]:
        """Returns the parts (files of groups) of the given pieces (ranges of lines of the file). Waits until all these
        pieces are encoded."""
        parts: list[Part] = ray.get(self.arrivals.take.remote(pieces))
        return parts

    def held_out(self) -> Dataset | None:
        """Returns the groups (prompts with their completions) that are held out for validation, or None if there are
        none. Waits until all rows of the file are encoded."""
        dataset: Dataset | None = ray.get(self.arrivals.held_out.remote())
        return dataset

    def finish(self, held_out: Dataset | None) -> None:
        ray.get(self.arrivals.finish.remote(held_out))


class EncodePieces(Protocol):
    """The type of a function that encodes pieces (ranges of lines) of a file and yields the results, in any order."""

    def __call__(self, pieces: Sequence[Piece], *, beside: int = 0) -> Iterable[Encoded]:
        """Encodes pieces (ranges of lines of a file) and yields the results. `beside` is the number of training workers
        that run at the same time.

        If there are such workers, the encoding of pieces begins in the order of `pieces`.
        """


def stream_encoder(
    spec: AttemptSpec,
    uri: str,
    encode_pieces: EncodePieces,
    begin: Callable[[Stream], None],
    report: Callable[[Report], None],
) -> Callable[[Sequence[Piece]], Iterator[Encoded]]:
    """Returns a function that encodes a file's pieces (ranges of lines) in training order with `encode_pieces`, and
    yields the results.

    The first eight pieces are the first window. When they are encoded and more pieces follow, the function calls
    `begin` with a Stream, so that training can begin. Workers read from this Stream while the other pieces are being
    encoded. From then on, a line that cannot be used raises JobFailed immediately. `uri` is the folder of the encoded
    groups (prompts with their completions).
    """

    def encode_in_order(pieces: Sequence[Piece]) -> Iterator[Encoded]:
        num_rows = tuple(piece.num_rows for piece in pieces)
        first, *others = ([pieces[n] for n in numbers] for _, numbers in windows(num_rows, spec.config.seed, epoch=0))
        rest = [piece for window in others for piece in window]
        done = []
        for result in raise_refusals(encode_pieces(first)):
            yield result
            done.append(result)
        parts = {result.piece: result.training for result in done if result.training}
        if not rest or not any(part.num_groups for part in parts.values()):
            yield from encode_pieces(rest)
            return
        arrivals = local_actor(Arrivals, max_concurrency=MOST_WAITING).remote(parts)
        stream = Stream(uri, num_rows, arrivals)
        rows = sum(piece.num_rows for piece in first)
        report(
            Message(
                message=(
                    f"Training begins with {rows} of {sum(num_rows)} rows, "
                    "while the other rows are still being turned into tokens."
                )
            )
        )
        begin(stream)
        for result in encode_pieces(rest, beside=spec.num_workers):
            yield from raise_refusals([result])
            stream.arrivals.add.remote(result.piece, result.training)

    return encode_in_order


class Arrivals:
    """A Ray actor that knows which parts are finished. A part is a file with encoded groups: prompts with their
    completions, as token ids. Its callers can wait until more parts are finished."""

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
