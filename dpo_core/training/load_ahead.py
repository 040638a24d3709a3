"""Loads the token ids of the groups (prompts with their completions) that this rank computes, while it still computes
earlier steps. A rank is a process of the run."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain

from dpo_core.encoding.encode import EncodedGroup, Outline

AHEAD = 8  # batches that are read, or loaded in one call, before they are needed

Groups = Sequence[EncodedGroup]
LoadIds = Callable[[Sequence[Outline]], Groups]


def load_ahead(batches: Iterable[Groups], load_ids: LoadIds, own: Callable[[Groups], list[int]]) -> Iterator[Groups]:
    """Yields the global batches in `batches`. In each batch, the groups (prompts with their completions) that this rank
    computes have been replaced by those that `load_ids` returns for them. `own` returns which groups of a batch these
    are, as indices.

    One thread reads coming batches and another one loads groups. A call of `load_ids` has the groups of all batches, at
    most AHEAD, that were read while the previous call ran. So no batch waits for a later one, which `batches` may have
    to wait for. Errors of `batches`, `own` and `load_ids` are raised for the caller.
    """
    with_own = ((batch, own(batch)) for batch in batches)
    reader, loader = ThreadPoolExecutor(1, "read-ahead"), ThreadPoolExecutor(1, "load-ahead")
    read = deque[Future[tuple[Groups, list[int]] | None]]()
    loading: Future[list[Groups | None]] | None = None
    loaded = deque[Groups | None]()
    try:
        while True:
            while len(read) < AHEAD:
                read.append(reader.submit(next, with_own, None))
            if loading is None or loading.done() or not loaded:
                if loading is not None:
                    loaded.extend(loading.result())
                ready = [read.popleft()]
                while read and read[0].done():
                    ready.append(read.popleft())
                loading = loader.submit(_load, ready, load_ids)
            if not loaded:
                continue
            batch = loaded.popleft()
            if batch is None:
                return
            yield batch
    finally:
        for threads in (reader, loader):
            threads.shutdown(wait=False, cancel_futures=True)


def with_ids(groups: Groups, own: Sequence[int], load_ids: LoadIds) -> Groups:
    """Returns the batch `groups` with the token ids of those groups (prompts with their completions) whose indices are
    in `own`. Calls `load_ids` only if some of them are not loaded yet."""
    return _with_ids([(groups, own)], load_ids)[0]


def _load(read: Sequence[Future[tuple[Groups, list[int]] | None]], load_ids: LoadIds) -> list[Groups | None]:
    """Waits until the batches `read` are there, and returns them with the token ids of this rank's groups. None stands
    for the end of the batches."""
    found = [future.result() for future in read]
    batches = [batch for batch in found if batch is not None]
    ends: list[Groups | None] = [None] * (len(found) - len(batches))
    return [*_with_ids(batches, load_ids), *ends]


def _with_ids(batches: Sequence[tuple[Groups, Sequence[int]]], load_ids: LoadIds) -> list[Groups]:
    missing = [[(i, group) for i in own if isinstance(group := groups[i], Outline)] for groups, own in batches]
    outlines = [group for _, group in chain(*missing)]
    loaded = iter(load_ids(outlines) if outlines else ())
    result: list[Groups] = []
    for (groups, _), places in zip(batches, missing, strict=True):
        whole = list(groups)
        for i, _ in places:
            whole[i] = next(loaded)
        result.append(whole)
    return result
