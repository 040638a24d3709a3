"""Reads the shapes of a model's weights from config.json and the headers of its safetensors files, without reading the
weights."""

import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import anyio.to_thread

from dpo_core.plan.inputs import Shapes
from services import storage
from services.control_plane.models.models import NamedModel

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
MOST_HEADER_BYTES = 100_000_000  # the limit of safetensors itself


class NoShapes(ValueError):
    """Raised if the shapes of the model's weights cannot be read on this machine. The message gives the reason."""


async def model_shapes(model: NamedModel) -> Shapes:
    """Returns the shapes of the model's weights, for an adapter those of its base model.

    Raises NoShapes if the model's files cannot be read.
    """
    return await anyio.to_thread.run_sync(shapes_of, model.base_source or model.source)


@lru_cache(maxsize=64)
def shapes_of(source: str) -> Shapes:
    """Returns the shapes of the weights of the model at `source`. Raises NoShapes if they cannot be read.

    `source` is a local folder, a storage URI, or a hub id that is in this machine's cache.
    """
    folder = _folder(source)
    try:
        config = json.loads(storage.read_bytes(storage.join(folder, "config.json")))
        weights = dict(_weights(folder))
    except (OSError, ValueError, KeyError) as error:
        raise NoShapes(
            f"{source} has no config.json and *.safetensors files that the service can read: {error}"
        ) from None
    if (method := (config.get("quantization_config") or {}).get("quant_method")) not in (None, "mxfp4"):
        raise NoShapes(f"{source} is a quantized model ({method}), which cannot be trained.")
    return Shapes(config, weights)


def _folder(source: str) -> str:
    if "://" in source or Path(source).is_dir():
        return source
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()
    model = cache / f"models--{source.replace('/', '--')}"
    try:
        return str(model / "snapshots" / (model / "refs" / "main").read_text().strip())
    except OSError:
        raise NoShapes(
            f"{source} is not a folder on the service's machine, "
            "and its cache of the Hugging Face hub does not have it."
        ) from None


def _weights(folder: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    names = [WHOLE]
    if storage.exists(storage.join(folder, INDEX)):
        index = json.loads(storage.read_bytes(storage.join(folder, INDEX)))
        names = sorted(set(index["weight_map"].values()))
    for name in names:
        for weight, told in _header(storage.join(folder, name)).items():
            shape = tuple(told["shape"])
            if weight.endswith("_blocks"):  # MXFP4 stores two numbers in a byte
                shape = (*shape[:-1], 2 * shape[-1])
            if not weight.endswith("_scales"):
                yield weight, shape


def _header(uri: str) -> dict[str, Any]:
    with storage.open_input(uri) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MOST_HEADER_BYTES:
            raise ValueError(f"{uri} is not a safetensors file")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header
