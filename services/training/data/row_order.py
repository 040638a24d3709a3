"""Decides on which groups each training step trains. A group is a prompt with its completions.

The file is encoded in pieces (ranges of lines). An epoch shuffles the pieces, and takes eight of them at a time (a
window). The groups of a window are shuffled, too. This order depends only on the seed and on the number of rows in each
piece. Therefore:

- The first window is known before any piece is encoded, and workers can train on it while later pieces are encoded.
- Every worker reads all groups in the same order, so global batches do not depend on the number of workers.
- A resumed job continues the same order at a later step.

The number of steps must be known before the first step, but the exact number of groups is known only when all rows are
encoded. It is therefore estimated: the groups per row of the first window, times the rows of the file. The epoch gets
as many places as this estimate says; a place is a position for about one group. A step trains on the groups at its
`batch_size` places. Each window gets a share of the places that is proportional to its rows, and spreads its groups
evenly over these places, so a place may have no group or several. If the file has only one window, the estimate is
exact, and every place has one group.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from dpo_core.config import TrainConfig
from dpo_core.encoding.encode import EncodedGroup
from services.training.data.dataset import Data, Dataset, Part, read_numbered

Read = Callable[[Data, Sequence[Part], Sequence[int]], Iterable[EncodedGroup]]  # as `dataset.read_numbered`
PIECES_PER_WINDOW = 8  # a window's ids are in memory: with common text, 15 million ids or 60 MB


def num_places(data: Data, seed: int) -> int:
    """Returns the number of places in an epoch over `data`. A place is a position for about one group (a prompt with
    its completions).

    The number is an estimate: the groups per row of the first window, times the rows of the file. The first window is
    the first eight pieces (ranges of lines) in the order that `seed` decides. If it has no groups, further windows are
    added until one has groups. If the file has only one window, the number is exactly that of its groups. The function
    waits until the windows that it needs are encoded.
    """
    num_rows, rows, groups = data.num_rows, 0, 0
    for _, pieces in windows(num_rows, seed, epoch=0):
        rows += sum(num_rows[piece] for piece in pieces)
        groups += sum(part.num_groups for part in data.take(pieces))
        if groups:
            break
    return -(-groups * sum(num_rows) // rows)


def num_steps(num_places: int, config: TrainConfig) -> int:
    """Returns the number of optimizer steps in all epochs. `num_places` is the number of places in an epoch: positions,
    each for about one group (a prompt with its completions). The last batch of an epoch may be smaller than the
    others."""
    n_epochs, batch_size = _decided(config)
    return n_epochs * -(-num_places // batch_size)


def global_batches(
    data: Data, config: TrainConfig, *, after_step: int, read: Read = read_numbered
) -> Iterator[list[EncodedGroup]]:
    """Yields one batch of groups (prompts with completions) for each optimizer step, beginning with the step after
    `after_step` (0 for all steps). `read` reads the groups, or only their outlines (the groups without their token
    ids).

    If the file has more than eight pieces (ranges of lines), the number of its groups is only estimated. A batch may
    then have a few more groups than `batch_size`, or fewer, or none.
    """
    n_epochs, batch_size = _decided(config)
    places = num_places(data, config.seed)
    steps = num_steps(places, config) // n_epochs
    first_epoch, first_step = divmod(after_step, steps)
    for epoch in range(first_epoch, n_epochs):
        groups = _epoch(data, config.seed, epoch, places, first_step * batch_size, read)
        yield from _batches(groups, batch_size, range(first_step, steps))
        first_step = 0


def batched(groups: Iterator[EncodedGroup], batch_size: int) -> Iterator[list[EncodedGroup]]:
    """Collects groups (prompts with their completions) into lists of `batch_size` groups, and yields the lists. The
    last list may be shorter."""
    while batch := list(islice(groups, batch_size)):
        yield batch


def read_in_order(dataset: Dataset, read: Read) -> Iterator[EncodedGroup]:
    """Yields all groups (prompts with their completions) of the dataset in order. `read` is called for eight parts
    (files of groups) at a time. It returns their groups, or only the outlines (the groups without their token ids)."""
    for start in range(0, len(dataset.parts), PIECES_PER_WINDOW):
        parts = dataset.parts[start : start + PIECES_PER_WINDOW]
        yield from read(dataset, parts, range(sum(part.num_groups for part in parts)))


def windows(num_rows: Sequence[int], seed: int, epoch: int) -> Iterator[tuple[int, list[int]]]:
    """Shuffles the pieces (ranges of lines) of a file for an epoch, and yields them in windows of eight pieces. The
    order depends only on `seed` and on `epoch`, the number of the epoch. `num_rows` has the number of rows of each
    piece.

    Yields two values for each window: the number of rows in all earlier windows, and the list of the window's pieces,
    as indices into `num_rows`.
    """
    pieces = list(range(len(num_rows)))
    random.Random(f"{seed} {epoch}").shuffle(pieces)  # a seed that is a text gives the same order on every machine
    before = 0
    for start in range(0, len(pieces), PIECES_PER_WINDOW):
        window = pieces[start : start + PIECES_PER_WINDOW]
        yield before, window
        before += sum(num_rows[piece] for piece in window)


def _decided(config: TrainConfig) -> tuple[int, int]:
    if config.n_epochs is None or config.batch_size is None:
        raise ValueError("n_epochs or batch_size is not decided yet; call resolved() on the config first.")
    return config.n_epochs, config.batch_size


def _epoch(
    data: Data, seed: int, epoch: int, places: int, first: int, read: Read
) -> Iterator[tuple[int, EncodedGroup | None]]:
    """Yields the groups (prompts with their completions) of epoch number `epoch`, in the order that `seed` decides, as
    pairs (place, group). `read` reads the groups.

    A place is a position in the epoch, from 0 to `places` - 1. Groups at places before `first` are left out.

    After the groups of each window (eight ranges of lines of the file), also yields a pair (place, None), with the
    first place of the next window. This pair tells the caller that no later group is at an earlier place.
    """
    num_rows = data.num_rows
    all_rows = sum(num_rows)
    for before, pieces in windows(num_rows, seed, epoch):
        after = before + sum(num_rows[piece] for piece in pieces)
        if after * places <= first * all_rows:
            continue  # the window is not read, because all its places are before `first`
        parts = data.take(pieces)
        count = sum(part.num_groups for part in parts)
        numbers = list(range(count))
        random.Random(f"{seed} {epoch} {before}").shuffle(numbers)
        window_places = [(before * count + n * (after - before)) * places // (all_rows * count) for n in range(count)]
        skipped = sum(place < first for place in window_places)
        yield from zip(window_places[skipped:], read(data, parts, numbers[skipped:]), strict=True)
        yield after * places // all_rows, None


def _batches(
    groups: Iterator[tuple[int, EncodedGroup | None]], batch_size: int, steps: range
) -> Iterator[list[EncodedGroup]]:
    """Yields, for each step in `steps`, the list of the groups (prompts with completions) on which the step trains.

    `groups` yields pairs (place, group). A place is a position in the epoch; step n has the `batch_size` places that
    begin at place n · `batch_size`. A pair (place, None) means that all groups at earlier places have been yielded.
    """
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
