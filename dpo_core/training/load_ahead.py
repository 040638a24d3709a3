"""Loads the token ids of the groups (prompts with their completions) that this rank will compute in coming steps, while
the rank still computes earlier steps. A rank is a process of the run.

Until its ids are loaded, a group is an outline, which has everything of the group but its token ids.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import chain
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from dpo_core.encoding.encode import EncodedGroup, Outline

AHEAD = 8  # most batches that wait to be loaded, and most in one call; no call begins while so many are loaded

Groups = Sequence[EncodedGroup]
LoadIds = Callable[[Sequence[Outline]], Groups]
Result = TypeVar("Result")


def load_ahead(batches: Iterable[Groups], load_ids: LoadIds, own: Callable[[Groups], list[int]]) -> Iterator[Groups]:
    """Yields the global batches in `batches`, in order, with the token ids of this rank's groups. A group is a prompt
    with its completions. A rank is a process of the run.

    `batches` may have outlines, which are groups without their token ids. `load_ids` returns, for a list of outlines,
    the groups with their ids. `own` returns the indices of those groups of a batch that this rank computes; only these
    groups are loaded. Other outlines stay as they are.

    Two threads work ahead of the caller:

    - One thread reads batches, up to AHEAD of them while a call of `load_ids` runs.
    - The other thread calls `load_ids`, each time for all batches that have been read by then. It does not wait for
      further batches, because these may take long to come.

    At any time, fewer than 3 · AHEAD batches have been read and not yet yielded. An error of `batches` or `own` is
    raised after all batches before it were yielded. An error of `load_ids` is raised before the first batch of its call
    is yielded.
    """
    with_own = ((batch, own(batch)) for batch in batches)
    reader, loader = _Calls("read-ahead"), _Calls("load-ahead")
    read = deque[Future[tuple[Groups, list[int]] | None]]()
    loading: Future[list[Groups | BaseException | None]] | None = None
    loaded = deque[Groups | BaseException | None]()
    try:
        while True:
            while len(read) < AHEAD:
                read.append(reader.submit(lambda: next(with_own, None)))
            if loading is None or not loaded or (len(loaded) < AHEAD and loading.done()):
                if loading is not None:
                    loaded.extend(loading.result())
                ready = [read.popleft()]
                while read and read[0].done():
                    ready.append(read.popleft())
                loading = loader.submit(partial(_load, ready, load_ids))
            if not loaded:
                continue
            batch = loaded.popleft()
            if batch is None:
                return
            if isinstance(batch, BaseException):
                raise batch
            yield batch
    finally:
        reader.end()
        loader.end()


def load_groups(groups: Groups, own: Sequence[int], load_ids: LoadIds) -> Groups:
    """Returns the batch `groups`, in which the groups (prompts with their completions) whose indices are in `own` have
    their token ids.

    Calls `load_ids` for the outlines (groups without their token ids) among these groups. If there are no outlines,
    does not call `load_ids`. Raises ValueError if `load_ids` returns other groups than it was asked for.
    """
    return _load_together([(groups, own)], load_ids)[0]


def _load(
    read: Sequence[Future[tuple[Groups, list[int]] | None]], load_ids: LoadIds
) -> list[Groups | BaseException | None]:
    """Waits until the batches in `read` have been read, loads the token ids of this rank's groups, and returns the
    batches with these ids. A group is a prompt with its completions. A rank is a process of the run.

    Each future in `read` gives a pair: a batch, and the indices of this rank's groups. At the end of the batches, the
    future gives None. `load_ids` returns, for a list of outlines (groups without their token ids), the groups with
    their ids. In three cases, the result has another item than a batch:

    - At the end of the batches, the last item is None.
    - If a batch could not be read, the last item is the error, and later batches are left out.
    - If `load_ids` fails, the only item is its error.
    """
    batches: list[tuple[Groups, list[int]]] = []
    rest: list[BaseException | None] = []
    for future in read:
        error = future.exception()
        batch = None if error else future.result()
        if batch is None:
            rest = [error]
            break
        batches.append(batch)
    try:
        return [*_load_together(batches, load_ids), *rest]
    except BaseException as error:
        return [error]


def _load_together(batches: Sequence[tuple[Groups, Sequence[int]]], load_ids: LoadIds) -> list[Groups]:
    missing = [[(i, group) for i in own if isinstance(group := groups[i], Outline)] for groups, own in batches]
    outlines = [group for _, group in chain(*missing)]
    found = load_ids(outlines) if outlines else ()
    _check(found, outlines)
    loaded = iter(found)
    result: list[Groups] = []
    for (groups, _), places in zip(batches, missing, strict=True):
        whole = list(groups)
        for i, _ in places:
            whole[i] = next(loaded)
        result.append(whole)
    return result


def _check(found: Groups, outlines: Sequence[Outline]) -> None:
    """Raises ValueError if `found`, which `load_ids` returned, are not the groups of the outlines in their order."""
    if len(found) != len(outlines):
        raise ValueError(
            f"'load_ids' returned {len(found)} groups for {len(outlines)} outlines; return one for each, in order."
        )
    for group, outline in zip(found, outlines, strict=True):
        if (group.line, _lengths(group)) != (outline.line, _lengths(outline)):
            what = f"'load_ids' returned line {group.line} with {_lengths(group)} tokens"
            asked = f"the outline of line {outline.line} with {_lengths(outline)} tokens"
            raise ValueError(f"{what} for {asked}; return the group of each outline, in order.")


def _lengths(group: EncodedGroup) -> list[int]:
    return [len(ids) for ids in (group.prompt_ids, *group.completion_ids)]


class _Calls:
    """Calls functions one after another in a thread of its own. The thread is a daemon, so a call that never returns
    does not keep the process from ending. A call in a ThreadPoolExecutor would."""

    def __init__(self, name: str) -> None:
        self._calls = SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]()
        self._has_ended = False
        Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        future = Future[Result]()
        self._calls.put((future, work))
        return future

    def end(self) -> None:
        """Ends the thread once the call that runs returns. Calls that have not begun are cancelled."""
        self._has_ended = True
        self._calls.put(None)

    def _run(self) -> None:
        while call := self._calls.get():
            future, work = call
            if self._has_ended:
                future.cancel()
                continue
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
