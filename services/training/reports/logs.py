"""Keeps what driver and workers print: `python -m services.training.reports.logs <folder uri> <pid> <file>…`.

Ray sends standard output and standard error of its processes to files on their node, which go with the node. A
process of its own reads along there and copies to `<folder>/<first byte>.log`, whole lines, secrets blanked; the
last segment is written again until it is full. It ends with the process that prints, and outlives it long enough to
keep the last words, of a kill as well. Of a very long log the beginning and the end are kept.
"""

import logging
import os
import re
import select
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from services import storage

logger = logging.getLogger(__name__)

PERIOD_SECONDS = 2.0
SEGMENT_BYTES = 256 * 2**10
FIRST_BYTES, LAST_BYTES = 8 * 2**20, 24 * 2**20  # of a longer log, the rest is left out
LINE_BYTES = 64 * 2**10  # a longer line is broken
READ_BYTES = 2**20

SECRET_NAMES = re.compile(r"(TOKEN|SECRET|KEY|PASSWORD|CREDENTIAL)S?$", re.IGNORECASE)
SHORTEST = 8  # a value that is kept secret
LOOKS = (
    (rb"\x1b\[[0-9;]*m", b""),  # colours are no secret, and no help
    (rb"(https?://[^\s?#'\"<>]*)\?[^\s'\"<>]*", rb"\1?***"),  # where signatures stand
    (rb"(\w://)[^\s/@'\"]+@", rb"\1***@"),
    (rb"(?i)\b(bearer)\s+[\w.~+/=-]+", rb"\1 ***"),
    (rb"\b(?:rd-|sk-|hf_)[\w-]{16,}", rb"***"),
)
LEFT_OUT = (b":job_id:", b":actor_name:", b":task_name:", b"(ServeReplica:")  # Ray's marks, and served models' lines


def keep_logs(run_uri: str, attempt: int, source: str) -> None:
    """Keep what this process prints, from its start to its end."""
    links = [os.readlink(f"/proc/self/fd/{number}") for number in (1, 2)]
    files = [link for link in dict.fromkeys(links) if Path(link).is_file()]
    if not files:
        logger.warning("The output of %s goes to %s, which are no files: no log of it is kept.", source, links)
        return
    uri = storage.join(run_uri, "logs", str(attempt), source)
    command = [sys.executable, "-m", "services.forkserver.client", "--wait", "-m", "services.training.reports.logs"]
    command += [uri, str(os.getpid()), *files]
    # The shell leaves it behind in a session of its own: Ray kills the children of a process that ends.
    subprocess.run(
        ["sh", "-c", '"$@" &', "sh", *command],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # its complaints go where those of this process go
        check=True,
    )


def main(folder_uri: str, pid: int, files: Sequence[str]) -> None:
    log, patterns = Log(folder_uri), patterns_of(os.environ)
    with ExitStack() as opened:
        tails = [Tail(opened.enter_context(open(file, "rb"))) for file in files]
        ended = False
        while not ended:
            ended = _ends_within(pid, PERIOD_SECONDS)
            for tail in tails:
                log.skip(tail.catch_up())
                for line in tail.lines(to_the_end=ended):
                    line = blank(line, patterns)
                    if not line.startswith(LEFT_OUT):
                        log.add(line)
            log.store()


def patterns_of(environment: Mapping[str, str]) -> list[tuple[re.Pattern[bytes], bytes]]:
    """What to blank: values of the environment, by their names, and what looks like a secret."""
    values = {value for name, value in environment.items() if SECRET_NAMES.search(name)}
    known = [re.escape(value.encode()) for value in sorted(values, key=len, reverse=True) if len(value) >= SHORTEST]
    return [(re.compile(pattern), instead) for pattern, instead in (*((value, b"***") for value in known), *LOOKS)]


def blank(line: bytes, patterns: Sequence[tuple[re.Pattern[bytes], bytes]]) -> bytes:
    for pattern, instead in patterns:
        line = pattern.sub(instead, line)
    return line


class Tail:
    """The lines of a file that another process writes, each with its end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._rest = file, b""

    def catch_up(self) -> int:
        """Leaves out what would be left out later; returns how many bytes."""
        behind = os.fstat(self._file.fileno()).st_size - self._file.tell() - LAST_BYTES
        if behind <= 0:
            return 0
        self._file.seek(behind, os.SEEK_CUR)
        self._rest = b""
        return behind + len(self._file.readline())

    def lines(self, *, to_the_end: bool) -> Iterator[bytes]:
        """What was written since. `to_the_end`: also a line that has none yet, for it never will."""
        while data := self._file.read(READ_BYTES):
            *whole, self._rest = re.split(rb"\r?\n|\r", self._rest + data)
            yield from (line + b"\n" for line in whole)
            if len(self._rest) > LINE_BYTES:
                yield self._rest + b"\n"
                self._rest = b""
        if to_the_end and self._rest:
            yield self._rest + b"\n"


class Log:
    """Segments `<first byte>.log` of a folder, each of whole lines. The first byte of each rises, with gaps."""

    def __init__(self, folder_uri: str) -> None:
        self._folder_uri = folder_uri
        self._first, self._lines, self._size = _end_of(folder_uri), list[bytes](), 0  # the last segment
        self._stored = 0  # bytes of it
        self._later: deque[str] = deque()  # what may be left out one day

    def add(self, line: bytes) -> None:
        if self._size + len(line) > SEGMENT_BYTES:
            self._begin(self._first + self._size)
        self._lines.append(line)
        self._size += len(line)

    def skip(self, num_bytes: int) -> None:
        if num_bytes:
            self._begin(self._first + self._size + num_bytes)

    def store(self) -> None:
        """Writes the last segment as it is now. If that fails, it is tried again while the segment is the last."""
        if self._size == self._stored:
            return
        try:
            storage.write_bytes(self._uri(), b"".join(self._lines))
            self._stored = self._size
            if len(self._later) > LAST_BYTES // SEGMENT_BYTES:
                storage.delete(self._later.popleft())
        except OSError as error:
            logger.warning("%s cannot be written now: %s", self._uri(), error)

    def _begin(self, first: int) -> None:
        self.store()
        if self._first >= FIRST_BYTES:
            self._later.append(self._uri())
        self._first, self._lines, self._size, self._stored = first, [], 0, 0

    def _uri(self) -> str:
        return storage.join(self._folder_uri, f"{self._first:012d}.log")


def _end_of(folder_uri: str) -> int:
    """Where to go on: a worker that Ray started again has printed before."""
    names = storage.list_files(folder_uri)
    if not names:
        return 0
    return int(names[-1].removesuffix(".log")) + len(storage.read_bytes(storage.join(folder_uri, names[-1])))


def _ends_within(pid: int, seconds: float) -> bool:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], seconds)[0])
    finally:
        os.close(process)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
