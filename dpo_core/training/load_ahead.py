"""Loads the token ids of the groups (prompts with their completions) that this rank will compute in coming steps, while
the rank still computes earlier steps. A rank is a process of the run.

Until its ids are loaded, a group is an outline, which has everything of the group but its token ids.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain

from dpo_core.encoding.encode import EncodedGroup, Outline

AHEAD = 8  # batches that are read, or loaded in one call, before they are needed

Groups = Sequence[EncodedGroup]
LoadIds = Callable[[Sequence[Outline]], Groups]


def load_ahead(batches: Iterable[Groups], load_ids: LoadIds, own: Callable[[Groups], list[int]]) -> Iterator[Groups]:
    """Yields the global batches in `batches`, in order, with the token ids of this rank's groups. A group is a prompt
    with its completions. A rank is a process of the run.

    `batches` may have outlines, which are groups without their token ids. `load_ids` returns, for a list of outlines,
    the groups with their ids. `own` returns the indices of those groups of a batch that this rank computes; only these
    groups are loaded. Other outlines stay as they are.

    One thread reads coming batches, and another thread loads groups. While a call of `load_ids` runs, up to AHEAD more
    batches are read. The next call of `load_ids` loads the groups of all batches that have been read by then. This call
    does not wait for further batches, because these may take long to come. Errors of `batches`, `own` and `load_ids`
    are raised for the caller.
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
    """Returns the batch `groups`, in which the groups (prompts with their completions) whose indices are in `own` have
    their token ids.

    Calls `load_ids` for the outlines (groups without their token ids) among these groups. If there are no outlines,
    does not call `load_ids`.
    """
    return _with_ids([(groups, own)], load_ids)[0]


def _load(read: Sequence[Future[tuple[Groups, list[int]] | None]], load_ids: LoadIds) -> list[Groups | None]:
    """Waits until the batches in `read` have been read, and returns them. In the returned batches, the groups (prompts
    with their completions) that this rank (process of the run) computes have their token ids.

    Each future in `read` gives a pair: a batch, and the indices of this rank's groups. A future that gives None marks
    the end of the batches; the result has None in its place. `load_ids` returns the groups of outlines (groups without
    their token ids) with their ids.
    """
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
