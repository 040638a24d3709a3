"""The order of training: which groups a step has, known from the seed and the rows of each piece alone.

An epoch shuffles the pieces of the file, and the groups of eight pieces at a time, a window. So the first window is
known before any piece is encoded, and trained on while later ones are. Every worker reads all of the order:
global batches do not depend on the number of workers, and resuming is starting at a later step.

The number of steps is told at the first, and how many groups are left of all rows is known only when all are encoded.
So the first window says how many groups a row gives, and an epoch has so many places. The groups of each window lie
evenly on its share of them, and a step has those on its `batch_size` places. Of a single window every place has one.
"""

import random
from collections.abc import Iterator, Sequence
from itertools import islice

from dpo_core.config import TrainConfig
from dpo_core.encoding.encode import EncodedGroup
from services.training.data.dataset import Data, read_some

PIECES_PER_WINDOW = 8  # their ids are in memory: of common text 15 million of them, 60 MB


def num_places(data: Data, seed: int) -> int:
    """Of an epoch: about as many as there are groups, and exactly as many in a single window. Waits for the first."""
    num_rows, rows, groups = data.num_rows, 0, 0
    for _, pieces in windows(num_rows, seed, epoch=0):
        rows += sum(num_rows[piece] for piece in pieces)
        groups += sum(part.num_groups for part in data.take(pieces))
        if groups:
            break
    return -(-groups * sum(num_rows) // rows)


def num_steps(num_places: int, config: TrainConfig) -> int:
    """Of the whole run. The last batch of an epoch may be smaller."""
    n_epochs, batch_size = _decided(config)
    return n_epochs * -(-num_places // batch_size)


def global_batches(data: Data, config: TrainConfig, *, after_step: int) -> Iterator[list[EncodedGroup]]:
    """The groups of each optimizer step, beginning with the one after `after_step`.

    Of several windows a batch may have a few more groups than `batch_size`, or less; or none.
    """
    n_epochs, batch_size = _decided(config)
    places = num_places(data, config.seed)
    steps = num_steps(places, config) // n_epochs
    first_epoch, first_step = divmod(after_step, steps)
    for epoch in range(first_epoch, n_epochs):
        groups = _epoch(data, config.seed, epoch, places, first_step * batch_size)
        yield from _batches(groups, batch_size, range(first_step, steps))
        first_step = 0


def batched(groups: Iterator[EncodedGroup], batch_size: int) -> Iterator[list[EncodedGroup]]:
    """The last batch may be smaller."""
    while batch := list(islice(groups, batch_size)):
        yield batch


def windows(num_rows: Sequence[int], seed: int, epoch: int) -> Iterator[tuple[int, list[int]]]:
    """Each with the rows before it, and the numbers of its pieces."""
    pieces = list(range(len(num_rows)))
    random.Random(f"{seed} {epoch}").shuffle(pieces)  # a text is hashed alike everywhere
    before = 0
    for start in range(0, len(pieces), PIECES_PER_WINDOW):
        window = pieces[start : start + PIECES_PER_WINDOW]
        yield before, window
        before += sum(num_rows[piece] for piece in window)


def _decided(config: TrainConfig) -> tuple[int, int]:
    if config.n_epochs is None or config.batch_size is None:
        raise ValueError("n_epochs and batch_size are not decided yet; resolve the config.")
    return config.n_epochs, config.batch_size


def _epoch(data: Data, seed: int, epoch: int, places: int, first: int) -> Iterator[tuple[int, EncodedGroup | None]]:
    """Every group with its place, from the place `first` on; behind each window where the next begins."""
    num_rows = data.num_rows
    all_rows = sum(num_rows)
    for before, pieces in windows(num_rows, seed, epoch):
        after = before + sum(num_rows[piece] for piece in pieces)
        if after * places <= first * all_rows:
            continue  # and is not read
        parts = data.take(pieces)
        count = sum(part.num_groups for part in parts)
        numbers = list(range(count))
        random.Random(f"{seed} {epoch} {before}").shuffle(numbers)
        own = [(before * count + n * (after - before)) * places // (all_rows * count) for n in range(count)]
        skipped = sum(place < first for place in own)
        yield from zip(own[skipped:], read_some(data, parts, numbers[skipped:]), strict=True)
        yield after * places // all_rows, None


def _batches(
    groups: Iterator[tuple[int, EncodedGroup | None]], batch_size: int, steps: range
) -> Iterator[list[EncodedGroup]]:
    """The groups of each step's places."""
    step, batch = steps.start, list[EncodedGroup]()
    for place, group in groups:
        while step < place // batch_size:
            yield batch
            step, batch = step + 1, []
        if group:
            batch.append(group)
    for _ in range(step, steps.stop):
        yield batch
        batch = []
