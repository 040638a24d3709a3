"""Reads the peak memory of processes in bytes, which Linux reports as `VmHWM` for each process, and the memory that
PyTorch's profiler recorded."""

import resource
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

WATCH_SECONDS = 0.5


def peak(pid: int | None = None) -> int:
    """Returns the peak memory in bytes of the process `pid`, or of this process if `pid` is None. Returns 0 if the
    process has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid or 'self'}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0


def forget_peak() -> None:
    """Resets this process's peak memory to the memory that this process uses now."""
    Path("/proc/self/clear_refs").write_text("5")


def family_peak(pid: int | None = None) -> int:
    """Returns the sum of the peak memory of a process and its descendants, in bytes. `pid` is the id of the process;
    None means this process.

    Memory that several processes share counts once for each of them.
    """
    with suppress(psutil.NoSuchProcess):
        return peak(pid) + sum(peak(child.pid) for child in psutil.Process(pid).children(recursive=True))
    return 0


def below(*titles: str) -> Iterator[int]:
    """Yields the ids of this process's descendants whose command line contains one of `titles`."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if any(title in " ".join(process.cmdline()) for title in titles):
                yield process.pid


def changes(profiled: Any) -> list[int]:
    """Returns the bytes of every allocation, and the negative bytes of every release, in order. `profiled` is a profile
    that torch.profiler recorded with `profile_memory`."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def most_allocated(profiled: Any) -> int:
    """Returns the most bytes that PyTorch had allocated at the same time while `profiled` was recorded."""
    return max(accumulate(changes(profiled)))


class _Sampler:
    """Measures memory again and again while a `with` block runs, and keeps the largest value.

    A thread calls the method `_sample`, which subclasses define.
    """

    def __init__(self, seconds: float) -> None:
        """Takes the number of seconds between two measurements."""
        self._seconds = seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.largest = 0  # bytes

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(self._seconds):
            self.largest = max(self.largest, self._sample())

    def _sample(self) -> int:
        raise NotImplementedError


class OwnMemory(_Sampler):
    """Records the largest memory of this process while a `with` block runs, without the pages of mapped files.

    Processes share such pages, and the kernel can drop them at any time. The memory is read every millisecond, because
    Linux records no peak without these pages.
    """

    def __init__(self) -> None:
        super().__init__(0.001)
        self.before = self.largest = self._sample()

    def _sample(self) -> int:
        _, resident, of_files, *_ = map(int, Path("/proc/self/statm").read_text().split())
        return (resident - of_files) * resource.getpagesize()


class Watch(_Sampler):
    """Records the largest peak memory among descendants of this process, while a `with` block runs.

    Only descendants count whose command line contains one of `titles`. Their peaks are read every WATCH_SECONDS,
    because a process may end before the block does.
    """

    def __init__(self, *titles: str) -> None:
        super().__init__(WATCH_SECONDS)
        self._titles = titles

    def _sample(self) -> int:
        return max(map(peak, below(*self._titles)), default=0)
