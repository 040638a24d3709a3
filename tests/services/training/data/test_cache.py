import os
import shutil
import tempfile
from pathlib import Path

import pytest

from services import storage
from services.contract import USED, Contract, Message, Report
from services.training.data import cache, encoding
from services.training.data.dataset import DamagedPart
from tests.services.s3 import S3


class Entry(Contract):
    words: str


def test_a_key_is_of_all_that_something_is_made_from() -> None:
    assert cache.key(a=1, b="x") == cache.key(b="x", a=1)
    assert len({cache.key(a=1), cache.key(a=2), cache.key(b=1), cache.key(a="1")}) == 4


def test_a_changed_byte_of_weights_is_another_model(model_source: str, tmp_path: Path) -> None:
    copy = shutil.copytree(model_source, tmp_path / "copy")
    both = [cache.model_digest(str(copy), weights=weights) for weights in (True, False)]
    assert both == [cache.model_digest(model_source, weights=weights) for weights in (True, False)], "wherever it lies"
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert cache.model_digest(str(copy), weights=True) != both[0]
    assert cache.model_digest(str(copy), weights=False) == both[1]
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert cache.model_digest(str(copy), weights=False) != both[1]


def test_a_model_in_a_bucket_is_known_by_its_words_without_its_weights(
    s3: S3, model_source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where models are downloaded to
    uri = storage.join(s3.new_folder(), "model")
    storage.publish(Path(model_source), uri)
    assert cache.model_digest(uri, weights=False) == cache.model_digest(model_source, weights=False)
    assert cache.writes_the_date(uri) == cache.writes_the_date(model_source)
    assert encoding.load(uri).positions == encoding.load(model_source).positions
    assert not list(tmp_path.rglob("*.safetensors"))
    assert cache.model_digest(uri, weights=True) == cache.model_digest(model_source, weights=True)


def test_what_is_saved_is_found_unless_it_is_damaged(tmp_path: Path) -> None:
    reports: list[Report] = []

    def refuse(entry: Entry) -> None:
        raise DamagedPart(f"{entry.words} is missing")

    assert cache.find(str(tmp_path), Entry, refuse, reports.append) is None
    cache.save(str(tmp_path), Entry(words="all of it"))
    assert cache.find(str(tmp_path), Entry, lambda entry: None, reports.append) == Entry(words="all of it")
    assert not reports
    assert cache.find(str(tmp_path), Entry, refuse, reports.append) is None
    sentence = (
        "The stored result of an earlier preparation of the data is damaged, "
        "so the data are prepared again: all of it is missing"
    )
    assert reports == [Message(level="warn", message=sentence)]


def test_each_use_is_noted_with_its_time(tmp_path: Path) -> None:
    cache.note_use(tmp_path.as_uri())
    os.utime(tmp_path / USED, (0, 0))
    cache.note_use(tmp_path.as_uri())
    ((name, seconds),) = storage.list_ages(tmp_path.as_uri())
    assert name == USED
    assert seconds < 3600


@pytest.mark.parametrize("text", ["{", '{"words": 1}', "\0"])
def test_a_manifest_that_is_none_is_made_again(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert cache.find(str(tmp_path), Entry, lambda entry: None, lambda report: None) is None
