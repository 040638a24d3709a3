"""Reads the peak memory of processes in bytes, which Linux reports as `VmHWM` for each process."""

import resource
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

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


class OwnMemory:
    """Records the largest memory of this process without the pages of mapped files, which the kernel can drop at any
    time and which processes share. A thread reads it every millisecond, because Linux keeps no peak of it."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.before = self.largest = _own()  # bytes

    def __enter__(self) -> "OwnMemory":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.001):
            self.largest = max(self.largest, _own())


def _own() -> int:
    _, resident, of_files, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - of_files) * resource.getpagesize()


class Watch:
    """Records the largest peak memory of this process's descendants whose command line contains one of `titles`.

    A thread reads the peaks every WATCH_SECONDS, because the processes may end before the `with` block does.
    """

    def __init__(self, *titles: str) -> None:
        self._titles = titles
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.largest = 0  # the largest peak memory of a single process

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(WATCH_SECONDS):
            self.largest = max(self.largest, *map(peak, below(*self._titles)), 0)
