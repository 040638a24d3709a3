"""The folder of a saved adapter, as PEFT writes it. Standard library only."""

import json
from pathlib import Path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def base_of(folder: Path) -> str:
    """The storage URI, folder or hub id of the base, as the adapter's config says. Raises ValueError if it does not."""
    config = json.loads((folder / CONFIG).read_text())
    source, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not source:
        raise ValueError(
            f"{folder / CONFIG} has no base_model_name_or_path; say there which model it is an adapter of."
        )
    if revision not in (None, "main"):
        what = f"{folder} is of the revision {revision} of {source}; load that into a folder"
        raise ValueError(f"{what}, and name it as base_model_name_or_path in {CONFIG}, without a revision.")
    return str(source)
