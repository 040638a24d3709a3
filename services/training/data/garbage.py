"""Keeps Python's garbage collector from searching the same large data again and again. The search finds only objects
that refer to each other in a cycle, and these data have no such cycles."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_full_collections() -> Iterator[None]:
    """Makes Python's garbage collector search only new objects while the `with` block runs.

    Full searches would find nothing, and would take a tenth of the time in which rows are encoded.
    """
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, 2**31 - 1)
    try:
        yield
    finally:
        gc.set_threshold(young, middle, old)
