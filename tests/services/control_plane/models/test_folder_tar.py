"""Tests tars of folders in storage, with Python's own tarfile as the oracle."""

import io
import tarfile
from pathlib import Path

import pytest

from services.control_plane.models.folder_tar import FolderTar, Member

FILES = {"config.json": b"{}", "model-00001.safetensors": bytes(range(256)) * 30, "empty": b"", "sub/tokens.txt": b"a"}


@pytest.fixture
def members(tmp_path: Path) -> list[Member]:
    found = []
    for number, (name, content) in enumerate(FILES.items()):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        found.append(Member(name, len(content), file.as_uri(), 1000 + number))
    return [*found, Member.of_bytes("about.json", b'{"model": "m"}')]


def whole(tar: FolderTar) -> bytes:
    return b"".join(tar.read(range(tar.num_bytes)))


def test_tar_programs_read_the_files_in_the_order_of_their_names(members: list[Member]) -> None:
    tar = FolderTar(members)
    content = whole(tar)
    assert len(content) == tar.num_bytes
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        read = {each.name: archive.extractfile(each).read() for each in archive}  # type: ignore[union-attr]
        assert archive.getnames() == sorted([*FILES, "about.json"])
    assert read == {**FILES, "about.json": b'{"model": "m"}'}


def test_the_order_of_the_members_does_not_matter(members: list[Member]) -> None:
    tars = FolderTar(members), FolderTar(members[::-1])
    assert whole(tars[0]) == whole(tars[1])
    assert tars[0].etag == tars[1].etag


@pytest.mark.parametrize("start", [0, 1, 511, 512, 1000, 5000])
@pytest.mark.parametrize("size", [0, 1, 512, 3000, 10**6])
def test_a_range_is_the_slice(members: list[Member], start: int, size: int) -> None:
    tar = FolderTar(members)
    assert b"".join(tar.read(range(start, start + size))) == whole(tar)[start : start + size]


def test_files_outside_a_range_are_not_opened(members: list[Member], tmp_path: Path) -> None:
    tar = FolderTar(members)
    content = whole(tar)
    (tmp_path / "model-00001.safetensors").unlink()
    begin = content.index(FILES["model-00001.safetensors"][:200])
    assert b"".join(tar.read(range(begin))) == content[:begin]
    with pytest.raises(OSError, match="model-00001"):
        list(tar.read(range(begin + 1)))


@pytest.mark.parametrize(
    "changed",
    [
        Member("model-00001.safetensors", 7680, "file:///x", 7),
        Member("model-00001.safetensors", 7679, "file:///x", 1001),
        Member("model-00002.safetensors", 7680, "file:///x", 1001),
        Member.of_bytes("about.json", b'{"model": "n"}'),
    ],
)
def test_the_etag_changes_with_names_sizes_times_and_contents_in_memory(members: list[Member], changed: Member) -> None:
    rest = [each for each in members if each.name[:8] != changed.name[:8]]
    assert FolderTar([*rest, changed]).etag != FolderTar(members).etag
