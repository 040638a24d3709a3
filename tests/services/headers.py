"""Writes models without weights: a config, and safetensors files that have only their headers."""

import json
from pathlib import Path
from typing import Any

from dpo_core.plan.sizes import NAMES, SIZES, llama

SMALL = dict(zip(NAMES, (64, 128, 2, 4, 4, 1000, False), strict=True))
LARGE = dict(zip(NAMES, SIZES["1B"], strict=True))


def write_model(folder: Path, sizes: dict[str, int], **changes: Any) -> Path:
    """Writes a model of the given sizes, with two files of weights that have only headers, and returns its folder.

    `changes` replace values of its config.
    """
    shapes = llama(sizes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**shapes.config, **changes}))
    names = list(shapes.weights)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in files.items():
        header = {name: {"dtype": "F32", "shape": shapes.weights[name], "data_offsets": [0, 0]} for name in own}
        text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
    index = {"weight_map": {name: file for file, own in files.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
