"""Copies a process's output to storage: `python -m services.training.reports.logs <folder uri> <pid> <file>…`.

Ray writes the output of a job's driver (its main program) and of its workers to files on their node, which are lost
with the node. This program follows such files and copies whole lines, without secrets, to files `<folder uri>/<number
of first byte>.log`, called segments. It writes the last segment again until the segment is full. The program ends when
the process `pid` has ended, even if that process was killed. Before it ends, it copies the last lines. Of a very long
log, only the beginning and the end are kept.
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
FIRST_BYTES, LAST_BYTES = 8 * 2**20, 24 * 2**20  # first and last bytes that are kept of a longer log
LINE_BYTES = 64 * 2**10  # a longer line is split
READ_BYTES = 2**20

SECRET_NAMES = re.compile(r"(TOKEN|SECRET|KEY|PASSWORD|CREDENTIAL)S?$", re.IGNORECASE)
SHORTEST_SECRET = 8  # characters
REPLACEMENTS = (
    (rb"\x1b\[[0-9;]*m", b""),  # colours: not secret, but of no use
    (rb"(https?://[^\s?#'\"<>]*)\?[^\s'\"<>]*", rb"\1?***"),  # a query may hold a signature
    (rb"(\w://)[^\s/@'\"]+@", rb"\1***@"),
    (rb"(?i)\b(bearer)\s+[\w.~+/=-]+", rb"\1 ***"),
    (rb"\b(?:rd-|sk-|hf_)[\w-]{16,}", rb"***"),
)
# Lines that begin with these are not copied: Ray's marks, and lines of served models.
LEFT_OUT = (b":job_id:", b":actor_name:", b":task_name:", b"(ServeReplica:")


def keep_logs(run_uri: str, attempt: int, source: str) -> None:
    """Starts a process that copies all output of this process to the folder `<run_uri>/logs/<attempt>/<source>` in
    storage. `attempt` is the number of this run of the job. `source` is the name of the log, such as `driver`."""
    links = [os.readlink(f"/proc/self/fd/{number}") for number in (1, 2)]
    files = [link for link in dict.fromkeys(links) if Path(link).is_file()]
    if not files:
        logger.warning("The output of %s goes to %s, which are not files, so no log of it is stored.", source, links)
        return
    uri = storage.join(run_uri, "logs", str(attempt), source)
    command = [sys.executable, "-m", "services.forkserver.client", "--wait", "-m", "services.training.reports.logs"]
    command += [uri, str(os.getpid()), *files]
    # A shell starts the process in a session of its own and ends. Otherwise Ray would kill it together with its parent.
    subprocess.run(
        ["sh", "-c", '"$@" &', "sh", *command],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # it shares the standard error of this process
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
    """Returns patterns that find secrets in a log, each with the text that replaces the secret.

    The patterns match two kinds of text: the values of those environment variables (in `environment`) whose names
    suggest a secret, and text that looks like a secret.
    """
    values = {value for name, value in environment.items() if SECRET_NAMES.search(name)}
    secrets = [value.encode() for value in sorted(values, key=len, reverse=True) if len(value) >= SHORTEST_SECRET]
    replacements = (*((re.escape(secret), b"***") for secret in secrets), *REPLACEMENTS)
    return [(re.compile(pattern), instead) for pattern, instead in replacements]


def blank(line: bytes, patterns: Sequence[tuple[re.Pattern[bytes], bytes]]) -> bytes:
    """Returns the line without secrets. `patterns` are pairs of a pattern that finds secrets and the text that replaces
    every match of it.
    """
    for pattern, instead in patterns:
        line = pattern.sub(instead, line)
    return line


class Tail:
    """Reads the new lines of a file to which another process is still writing."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._rest = file, b""

    def catch_up(self) -> int:
        """Skips all unread bytes of the file except the last LAST_BYTES, and returns the number of skipped bytes.

        The stored log would not keep the skipped bytes anyway, because only the beginning and the end of a very long
        log are kept.
        """
        behind = os.fstat(self._file.fileno()).st_size - self._file.tell() - LAST_BYTES
        if behind <= 0:
            return 0
        self._file.seek(behind, os.SEEK_CUR)
        self._rest = b""
        return behind + len(self._file.readline())

    def lines(self, *, to_the_end: bool) -> Iterator[bytes]:
        """Yields the lines that were written since the last call.

        With `to_the_end`, an incomplete last line is included.
        """
        while data := self._file.read(READ_BYTES):
            *lines, self._rest = re.split(rb"\r?\n|\r", self._rest + data)
            yield from (line + b"\n" for line in lines)
            if len(self._rest) > LINE_BYTES:
                yield self._rest + b"\n"
                self._rest = b""
        if to_the_end and self._rest:
            yield self._rest + b"\n"


class Log:
    """Writes the lines of a log to storage, in files `<number of first byte>.log` of one folder, called segments.

    If bytes of the log are skipped, the numbers in the names have a gap.
    """

    def __init__(self, folder_uri: str) -> None:
        self._folder_uri = folder_uri
        self._first, self._lines, self._size = _end_of(folder_uri), list[bytes](), 0  # of the last segment
        self._stored = 0  # bytes of the last segment that are in storage
        self._failures = 0  # in a row
        self._later: deque[str] = deque()  # segments after FIRST_BYTES; the oldest may be deleted

    def add(self, line: bytes) -> None:
        if self._size + len(line) > SEGMENT_BYTES:
            self._begin(self._first + self._size)
        self._lines.append(line)
        self._size += len(line)

    def skip(self, num_bytes: int) -> None:
        if num_bytes:
            self._begin(self._first + self._size + num_bytes)

    def store(self) -> None:
        """Writes the last segment (the newest file of the log) to storage, if it has changed.

        If writing fails, the method raises no error, but logs the 1st, 2nd, 4th, 8th and so on failure in a row. The
        next call tries again, unless a newer segment has begun.
        """
        if self._size == self._stored:
            return
        try:
            storage.write_bytes(self._uri(), b"".join(self._lines))
            self._stored, self._failures = self._size, 0
            if len(self._later) > LAST_BYTES // SEGMENT_BYTES:
                storage.delete(self._later.popleft())
        except OSError as error:
            self._failures += 1
            if self._failures.bit_count() == 1:
                logger.warning("The log %s could not be written to storage: %s", self._uri(), error)

    def _begin(self, first: int) -> None:
        self.store()
        if self._first >= FIRST_BYTES:
            self._later.append(self._uri())
        self._first, self._lines, self._size, self._stored = first, [], 0, 0

    def _uri(self) -> str:
        return storage.join(self._folder_uri, f"{self._first:012d}.log")


def _end_of(folder_uri: str) -> int:
    """Returns how many bytes of a worker's log an earlier process of the same worker has logged, judging by the log's
    files in the folder `folder_uri`. Returns 0 if there are no files. There are files if Ray has restarted the worker.

    The number includes bytes that were left out of the files because the log was very long.
    """
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
