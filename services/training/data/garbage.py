"""Python's collector of cycles, while much data is held that has none."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def only_young() -> Iterator[None]:
    """Only new objects are looked through. To look through all that is held, and imported, takes a tenth of the time
    of a piece and finds nothing."""
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, 2**31 - 1)
    try:
        yield
    finally:
        gc.set_threshold(young, middle, old)
