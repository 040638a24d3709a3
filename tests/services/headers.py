"""Writes models without weights: a config, and safetensors files that have only their headers."""

import json
from pathlib import Path
from typing import Any

from dpo_core.plan.inputs import Shapes
from dpo_core.plan.sizes import NAMES, SIZES, llama

SMALL = dict(zip(NAMES, (64, 128, 2, 4, 4, 1000, False), strict=True))
LARGE = dict(zip(NAMES, SIZES["1B"], strict=True))


def write_model(folder: Path, sizes: dict[str, int], *, experts: int = 0, **changes: Any) -> Path:
    """Writes a model of the given sizes, with two files of weights that have only headers, and returns its folder.

    `experts` is a number of experts to add to its first layer, and `changes` replace values of its config.
    """
    shapes, shape = llama(sizes), (sizes["intermediate_size"], sizes["hidden_size"])
    shapes = Shapes(
        shapes.config,
        {**shapes.weights, **{f"model.layers.0.mlp.experts.{each}.up_proj.weight": shape for each in range(experts)}},
    )
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
