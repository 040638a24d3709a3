"""Reads the folder of a saved adapter in PEFT's format. Uses only the standard library."""

import json
from pathlib import Path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EFFECT = "effect.json"  # what the adapter does to some of its training rows, whose tokens the file holds


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def base_of(folder: Path) -> str:
    """Returns where the base (the model under a saved adapter) is: a storage URI, a folder or a hub id. The adapter's
    config in `folder` says this. Raises ValueError if the config names no base, or another revision of the base than
    main."""
    config = json.loads((folder / CONFIG).read_text())
    source, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not source:
        raise ValueError(
            f"{folder / CONFIG} has no base_model_name_or_path; "
            "add this key with the model that the adapter was trained on."
        )
    if revision not in (None, "main"):
        what = (
            f"The adapter in {folder} belongs to revision {revision} of {source}; download that revision into a folder"
        )
        raise ValueError(f"{what}, and give the folder as base_model_name_or_path in {CONFIG}, without a revision.")
    return str(source)
