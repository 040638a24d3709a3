"""Records the processes whose command line or environment names a folder: their times, CPU seconds and peak memory."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread

import psutil

PERIOD_SECONDS = 0.1
TICKS = os.sysconf("SC_CLK_TCK")
IDLE_NAMES = ("python", "ray::IDLE", "bash", "sh")  # names of processes that have not begun their work


@dataclass
class Life:
    """The life of a process: its start and end, the times in between at which it had loaded its libraries (`imported`)
    and began to do useful work (`useful`), its CPU seconds and its peak memory.

    Times are Unix seconds. The method `since` returns a copy whose times count from another moment.
    """

    pid: int
    name: str
    began: float
    cpu_seconds: float  # CPU seconds that the process used during the recording
    peak_bytes: int
    imported: float | None = None  # when the process loaded its last library
    useful: float | None = None  # when the process's name first was none of IDLE_NAMES
    ended: float | None = None

    def since(self, moment: float) -> "Life":
        def shifted(at: float | None) -> float | None:
            return None if at is None else at - moment

        times = {"imported": shifted(self.imported), "useful": shifted(self.useful), "ended": shifted(self.ended)}
        return replace(self, began=self.began - moment, **times)


def machine_cpu_seconds() -> float:
    """Returns the CPU seconds that all cores have spent since the machine started, in user and kernel mode."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + irq + softirq) / TICKS


def family_cpu_seconds() -> float:
    """Returns the CPU seconds that this process and its living descendants have used, in user and kernel mode."""
    process, seconds = psutil.Process(), 0.0
    for member in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = member.cpu_times()
            seconds += times.user + times.system
    return seconds


class Recorder:
    """Records every process whose command line or environment contains the path `folder`."""

    def __init__(self, folder: str) -> None:
        self._folder = folder.encode()
        self._lives: dict[int, Life] = {}
        self._before: dict[int, float] = {}  # process id -> CPU seconds used before the recording
        self._libraries: dict[int, int] = {}
        self._strangers: set[int] = set()

    @contextmanager
    def recording(self) -> Iterator[list[Life]]:
        """Records the processes that name the recorder's folder, while the `with` block runs. Yields a list that is
        empty at first, and holds the processes when the block has ended."""
        for seen in (self._lives, self._before, self._libraries, self._strangers):
            seen.clear()
        stopped, lives = Event(), list[Life]()

        def watch() -> None:
            while not stopped.wait(PERIOD_SECONDS):
                self._look()

        self._look(first=True)
        thread = Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield lives
        finally:
            stopped.set()
            thread.join()
            lives.extend(self._lives.values())

    def _look(self, *, first: bool = False) -> None:
        running = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        for pid in running - self._strangers:
            try:
                self._see(pid, first=first)
            except (OSError, IndexError, ValueError):  # the process has just ended
                continue
        for pid, life in self._lives.items():
            if pid not in running and life.ended is None:
                life.ended = time.time()

    def _see(self, pid: int, *, first: bool) -> None:
        process, now = Path("/proc", str(pid)), time.time()
        if pid not in self._lives and not self._is_ours(pid, process):
            return
        stat = (process / "stat").read_text().rpartition(")")[2].split()
        cpu = (int(stat[11]) + int(stat[12])) / TICKS
        if pid not in self._lives:
            self._before[pid] = cpu if first else 0.0
            began = now - (float(Path("/proc/uptime").read_text().split()[0]) - int(stat[19]) / TICKS)
            self._lives[pid] = Life(pid, "", began, 0.0, 0)
        life = self._lives[pid]
        life.cpu_seconds = cpu - self._before[pid]
        status = (process / "status").read_text()
        if "VmHWM:" in status:
            life.peak_bytes = 1024 * int(status.split("VmHWM:")[1].split()[0])
        name = _name(process)
        if name and name != life.name:
            life.name = name
            if life.useful is None and not name.startswith(IDLE_NAMES):
                life.useful = now
        if not first and now - life.began < 120:
            loaded = (process / "maps").read_bytes().count(b" r-xp ")
            if loaded > self._libraries.get(pid, 0):
                self._libraries[pid], life.imported = loaded, now

    def _is_ours(self, pid: int, process: Path) -> bool:
        command, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        if pid != os.getpid() and self._folder in command + environment:
            return True
        if command:  # the process has its final command line
            self._strangers.add(pid)
        return False


def _name(process: Path) -> str:
    """Returns the process's name: Ray's title, the module after `-m`, the script's name, or the program's name."""
    words = (process / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    if words[0].startswith("ray::"):
        return words[0].strip()
    if "-m" in words:
        return words[words.index("-m") + 1]
    telling = [word for word in words if word.endswith(".py")] or words[:1]
    return Path(telling[-1]).name[:60]
