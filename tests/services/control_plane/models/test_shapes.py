"""Tests the shapes of weights, with files that safetensors itself has written as the oracle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dpo_core.plan.sizes import llama
from services import storage
from services.control_plane.models.shapes import NoShapes, shapes_of
from tests.services.headers import SMALL, write_model

WEIGHTS = {"embed": (7, 4), "norm": (4,), "head.weight": (7, 4)}


def folder(path: Path, config: dict[str, Any], files: dict[str, list[str]]) -> str:
    """Writes a model's folder: its config, and these weights in these files. Returns the folder."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    for file, names in files.items():
        save_file({name: np.zeros(WEIGHTS[name], np.float16) for name in names}, path / file, {"format": "pt"})
    return str(path)


def test_the_shapes_of_one_file_are_read_with_the_config(tmp_path: Path) -> None:
    found = shapes_of(folder(tmp_path / "m", {"hidden_size": 4}, {"model.safetensors": list(WEIGHTS)}))
    assert (dict(found.weights), found.config) == (WEIGHTS, {"hidden_size": 4})


def test_the_shapes_of_several_files_are_found_by_their_index(tmp_path: Path) -> None:
    files = {"a.safetensors": ["embed", "norm"], "b.safetensors": ["head.weight"]}
    model = folder(tmp_path / "m", {}, files)
    index = {"weight_map": {name: file for file, names in files.items() for name in names}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert dict(shapes_of(Path(model).as_uri()).weights) == WEIGHTS


def test_mxfp4_counts_two_numbers_in_a_byte_and_no_scales(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    stored = {"up_blocks": np.zeros((3, 8), np.uint8), "up_scales": np.zeros((3, 1), np.uint8)}
    save_file(stored, tmp_path / "m" / "model.safetensors")
    assert dict(shapes_of(str(tmp_path / "m")).weights) == {"up_blocks": (3, 16)}


def test_a_model_that_cannot_be_read_or_trained_is_refused_with_the_reason(tmp_path: Path) -> None:
    quantized = folder(tmp_path / "q", {"quantization_config": {"quant_method": "gptq"}}, {"model.safetensors": []})
    with pytest.raises(NoShapes, match=r"is a quantized model \(gptq\), which cannot be trained"):
        shapes_of(quantized)
    with pytest.raises(NoShapes, match=r"has no config.json and \*.safetensors files that the service can read"):
        shapes_of(folder(tmp_path / "e", {}, {}))
    (tmp_path / "e" / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(NoShapes, match="is not a safetensors file"):
        shapes_of(str(tmp_path / "e"))


def test_a_hub_id_is_read_from_this_machines_cache_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NoShapes, match="its cache of the Hugging Face hub does not have it"):
        shapes_of("someone/absent")
    snapshots = tmp_path / "models--someone--tiny" / "snapshots"
    (snapshots.parent / "refs").mkdir(parents=True)
    (snapshots.parent / "refs" / "main").write_text("abc\n")
    snapshots.mkdir()
    folder(snapshots / "abc", {}, {"model.safetensors": list(WEIGHTS)})
    assert dict(shapes_of("someone/tiny").weights) == WEIGHTS


def test_shapes_are_read_from_one_file_a_storage_uri_and_the_cache_of_the_hub(tmp_path, monkeypatch):
    local = write_model(tmp_path / "hub" / "models--a--b" / "snapshots" / "abc", SMALL)
    (local.parents[1] / "refs").mkdir()
    (local.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    whole = shapes_of(str(local))
    assert {name: tuple(shape) for name, shape in whole.weights.items()} == llama(SMALL).weights
    assert shapes_of("a/b").weights == whole.weights == shapes_of(local.as_uri()).weights
    (local / "model.safetensors.index.json").unlink()
    (local / "a.safetensors").rename(local / "model.safetensors")
    shapes_of.cache_clear()
    assert set(shapes_of("a/b").weights) == set(list(llama(SMALL).weights)[::2])


@pytest.mark.parametrize("damage", [b"", b"\xff" * 8, (9).to_bytes(8, "little") + b'{"a": {}}'])
def test_damaged_headers_are_told(tmp_path, damage):
    folder = tmp_path / "damaged"
    storage.write_bytes(str(folder / "config.json"), b"{}")
    storage.write_bytes(str(folder / "model.safetensors"), damage)
    with pytest.raises(NoShapes, match="that the service can read"):
        shapes_of(str(folder))


def test_of_a_model_in_mxfp4_a_byte_holds_two_weights_and_scales_are_none(tmp_path):
    folder = tmp_path / "expanded"
    told = {"x_blocks": {"shape": [4, 8, 2, 16]}, "x_scales": {"shape": [4, 8, 2]}, "x.weight": {"shape": [3]}}
    text = json.dumps(told).encode()
    storage.write_bytes(str(folder / "config.json"), b'{"quantization_config": {"quant_method": "mxfp4"}}')
    storage.write_bytes(str(folder / "model.safetensors"), len(text).to_bytes(8, "little") + text)
    assert shapes_of(str(folder)).weights == {"x_blocks": (4, 8, 2, 32), "x.weight": (3,)}
