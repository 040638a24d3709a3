"""Tests which checkpoints of a job keep their optimizer's state, on a disk and on S3."""

from pathlib import Path

import pytest

from dpo_core.training.checkpoint import FileDigest, Manifest, sha256_of, verify
from services import storage
from services.contract import Report
from services.training.run.stored_checkpoints import checkpoint_uri, drop_optimizers
from services.training.run.worker import newest_checkpoint
from tests.services.s3 import S3

PARTS = [f"optimizer-0000{part}-of-00002.safetensors" for part in (1, 2)]
MODEL = "model/model.safetensors"


@pytest.fixture(params=["disk", "S3"])
def run_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Writes complete checkpoints of the steps 10, 20 and 30, and returns the URI of the job's folder."""
    if request.param == "disk":
        uri = (tmp_path / "run").as_uri()
    else:
        s3: S3 = request.getfixturevalue("s3_server")
        uri = storage.join(s3.new_folder(), "run")
    for step in (10, 20, 30):
        publish(uri, step, tmp_path / f"{step}")
    return uri


def publish(run_uri: str, step: int, folder: Path) -> None:
    (folder / "model").mkdir(parents=True)
    for name in (*PARTS, MODEL):
        (folder / name).write_text(f"{name} of {step}")
    files = {name: FileDigest((folder / name).stat().st_size, sha256_of(folder / name)) for name in (*PARTS, MODEL)}
    (folder / "manifest.json").write_bytes(Manifest(step, 30, step, step, {}, {}, {}, files).to_json())
    storage.publish(folder, checkpoint_uri(run_uri, step))


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns an empty folder for downloads."""
    return tmp_path_factory.mktemp("cache")


def states(run_uri: str, cache: Path, *steps: int) -> list[bool]:
    """Returns for each step whether its checkpoint has its optimizer's state, by its manifest and by its files.

    Asserts that both agree, and that the checkpoints are undamaged.
    """
    found = []
    for step in steps:
        uri = checkpoint_uri(run_uri, step)
        found.append(verify(storage.fetch(uri, cache / "states")).has_optimizer)
        assert storage.list_files(uri) == ["manifest.json", *(PARTS if found[-1] else [])]
    return found


def test_the_two_newest_checkpoints_keep_it(run_uri: str, cache: Path) -> None:
    drop_optimizers(run_uri, published=10)
    drop_optimizers(run_uri, published=20)
    drop_optimizers(run_uri, published=30)
    assert states(run_uri, cache, 10, 20, 30) == [False, True, True]
    assert storage.read_bytes(storage.join(checkpoint_uri(run_uri, 10), "model", "model.safetensors"))


def test_nothing_is_dropped_of_two(run_uri: str, cache: Path) -> None:
    drop_optimizers(run_uri, published=20)
    assert states(run_uri, cache, 10, 20, 30) == [True, True, True]


def test_what_is_kept_as_a_model_is_not_resumed_and_no_damaged_one(run_uri: str, cache: Path) -> None:
    reports: list[Report] = []
    drop_optimizers(run_uri, published=30)
    assert newest_checkpoint(run_uri, cache, reports.append) == checkpoint_uri(run_uri, 30)
    for step in (20, 30):
        storage.delete(checkpoint_uri(run_uri, step))
    assert newest_checkpoint(run_uri, cache, reports.append) is None
    assert reports == []


def test_a_checkpoint_that_is_not_complete_counts_for_nothing(run_uri: str, cache: Path) -> None:
    storage.delete(storage.join(checkpoint_uri(run_uri, 20), storage.MANIFEST))
    drop_optimizers(run_uri, published=30)
    assert states(run_uri, cache, 10, 30) == [True, True]


def test_what_lies_ahead_of_a_run_that_began_again_counts_for_nothing(run_uri: str, cache: Path) -> None:
    """Newer checkpoints are there but damaged, so the run resumed from an older one. It counts only what it publishes
    now."""
    drop_optimizers(run_uri, published=10)
    assert states(run_uri, cache, 10) == [True]


def test_a_folder_that_is_removed_meanwhile_is_no_failure(run_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def removed(uri: str) -> bytes:
        storage.delete(uri)
        raise FileNotFoundError(uri)

    monkeypatch.setattr(storage, "read_bytes", removed)
    drop_optimizers(run_uri, published=30)
    assert storage.list_files(checkpoint_uri(run_uri, 10)) == []


@pytest.mark.parametrize("broken_off", ["write_bytes", "delete"])
def test_a_drop_that_breaks_off_loses_nothing_and_the_next_one_finishes_it(
    run_uri: str, cache: Path, monkeypatch: pytest.MonkeyPatch, broken_off: str
) -> None:
    def die(*_: object) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(storage, broken_off, die)
        with pytest.raises(OSError, match="killed"):
            drop_optimizers(run_uri, published=30)
    verify(storage.fetch(checkpoint_uri(run_uri, 10), cache / "broken off"))
    assert newest_checkpoint(run_uri, cache, lambda report: None) == checkpoint_uri(run_uri, 30)
    drop_optimizers(run_uri, published=30)
    assert states(run_uri, cache, 10, 20, 30) == [False, True, True]
