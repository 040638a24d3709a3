"""Reads the peak memory of processes in bytes, which Linux reports as `VmHWM` for each process."""

import resource
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

WATCH_SECONDS = 0.5


def peak(pid: int | None = None) -> int:
    """Returns the peak memory of the process `pid`, or of this process; 0 if the process has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid or 'self'}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0


def forget_peak() -> None:
    """Resets this process's peak memory to the memory that this process uses now."""
    Path("/proc/self/clear_refs").write_text("5")


def family_peak(pid: int | None = None) -> int:
    """Returns the sum of the peak memory of a process and its descendants. Shared memory counts once per process."""
    with suppress(psutil.NoSuchProcess):
        return peak(pid) + sum(peak(child.pid) for child in psutil.Process(pid).children(recursive=True))
    return 0


def below(*titles: str) -> Iterator[int]:
    """Yields the ids of this process's descendants whose command line contains one of `titles`."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if any(title in " ".join(process.cmdline()) for title in titles):
                yield process.pid


class _Sampler:
    """Records the largest memory that `_sample` returns while the `with` block runs. A thread calls it repeatedly."""

    def __init__(self, seconds: float) -> None:
        """`seconds` is the time between two samples."""
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
    """Records the largest memory of this process without the pages of mapped files, which the kernel can drop at any
    time and which processes share. It is read every millisecond, because Linux keeps no peak of it."""

    def __init__(self) -> None:
        super().__init__(0.001)
        self.before = self.largest = self._sample()

    def _sample(self) -> int:
        _, resident, of_files, *_ = map(int, Path("/proc/self/statm").read_text().split())
        return (resident - of_files) * resource.getpagesize()


class Watch(_Sampler):
    """Records the largest peak memory of a descendant of this process whose command line contains one of `titles`.

    The peaks are read every WATCH_SECONDS, because the processes may end before the `with` block does.
    """

    def __init__(self, *titles: str) -> None:
        super().__init__(WATCH_SECONDS)
        self._titles = titles

    def _sample(self) -> int:
        return max(map(peak, below(*self._titles)), default=0)
