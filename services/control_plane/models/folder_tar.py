"""Presents a folder in storage as a tar file. Any range of the tar can be read without reading the bytes before the
range."""

import hashlib
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from services.control_plane.http.content import read_file

BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Member:
    """A file in a tar: its name, its size, and its source, which is the content or the URI of a file in storage."""

    name: str
    num_bytes: int
    source: str | bytes  # a URI, or the content
    mtime_ns: int = 0  # of the file at the URI

    @staticmethod
    def of_bytes(name: str, content: bytes) -> "Member":
        return Member(name, len(content), content)


class FolderTar:
    """A tar of files, sorted by name. The bytes of the tar are made only when they are read. The same files always give
    the same bytes.

    `num_bytes` is the size of the tar. `etag` is a digest of the tar's version: of the contents of files held in
    memory, and of the names, sizes and modification times of all other files.
    """

    def __init__(self, members: Iterable[Member]) -> None:
        self._parts: list[tuple[str | bytes, int]] = []  # contents, or URIs of files; each with its size
        digest = hashlib.sha256()
        for member in sorted(members, key=lambda member: member.name):
            header, padding = _header(member), bytes(-member.num_bytes % BLOCK)
            self._parts += [(header, len(header)), (member.source, member.num_bytes), (padding, len(padding))]
            digest.update(header)
            digest.update(member.source if isinstance(member.source, bytes) else str(member.mtime_ns).encode())
        self._parts.append((bytes(2 * BLOCK), 2 * BLOCK))
        self.num_bytes = sum(size for _, size in self._parts)
        self.etag = digest.hexdigest()[:32]

    def read(self, span: range) -> Iterator[bytes]:
        """Yields the bytes of the tar whose positions are in `span`. Raises OSError if a file has become shorter."""
        begin = 0
        for source, size in self._parts:
            inside = range(max(span.start - begin, 0), min(span.stop - begin, size))
            if inside:
                yield from (
                    [source[inside.start : inside.stop]] if isinstance(source, bytes) else read_file(source, inside)
                )
            begin += size


def _header(member: Member) -> bytes:
    info = tarfile.TarInfo(member.name)
    info.size, info.mode = member.num_bytes, 0o644
    return info.tobuf(tarfile.GNU_FORMAT)  # the format writes files of more than 8 GiB, too
