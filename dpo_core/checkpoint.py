"""A checkpoint is a folder; its manifest is written last and names every file with size and sha256.

    manifest.json            step, counters, config, files
    model/                   a Hugging Face folder: config, safetensors, tokenizer
    optimizer.safetensors    AdamW's moments by parameter name

No pickles. Nothing in a step draws random numbers and the learning rate is a function of the step,
so weights, moments and the step are all that resuming needs to repeat a run bit for bit.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dpo_core.config import TrainConfig

MANIFEST = "manifest.json"


class DamagedCheckpoint(ValueError):
    """A file of a checkpoint is not what the manifest says. `file` is relative to the checkpoint."""

    def __init__(self, file: str, message: str) -> None:
        super().__init__(file, message)
        self.file = file

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True)
class FileDigest:
    size: int  # bytes
    sha256: str  # hexadecimal


@dataclass(frozen=True)
class Manifest:
    step: int
    total_steps: int
    num_tokens: int  # trained on up to and with this step, over all ranks
    config: dict[str, Any]  # the TrainConfig
    files: dict[str, FileDigest]  # by path in the checkpoint
    statistics: dict[str, float]  # of the objective


def save_checkpoint(
    folder: Path,
    *,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.AdamW,
    config: TrainConfig,
    step: int,
    total_steps: int,
    num_tokens: int,
    statistics: Mapping[str, float],
) -> None:
    """Write beside `folder`, then rename, so that a folder of that name is always whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    policy.save_pretrained(partial / "model")
    tokenizer.save_pretrained(partial / "model")
    save_file(_moments(policy, optimizer), partial / "optimizer.safetensors")
    paths = sorted(path for path in partial.rglob("*") if path.is_file())
    files = {str(path.relative_to(partial)): FileDigest(path.stat().st_size, _sha256(path)) for path in paths}
    manifest = Manifest(step, total_steps, num_tokens, asdict(config), files, dict(statistics))
    (partial / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1))
    shutil.rmtree(folder, ignore_errors=True)  # an earlier attempt's
    os.rename(partial, folder)


def read_manifest(folder: Path) -> Manifest:
    try:
        fields = json.loads((folder / MANIFEST).read_bytes())
        fields["files"] = {name: FileDigest(**digest) for name, digest in fields["files"].items()}
        return Manifest(**fields)
    except FileNotFoundError:
        raise DamagedCheckpoint(MANIFEST, f"{folder / MANIFEST} is missing; use an earlier checkpoint.") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        message = f"{folder / MANIFEST} is unreadable ({error}); use an earlier checkpoint."
        raise DamagedCheckpoint(MANIFEST, message) from None


def verify(folder: Path) -> Manifest:
    """The manifest, after every file was found as it says. Raises DamagedCheckpoint naming the first that was not."""
    manifest = read_manifest(folder)
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint(name, f"{path} is missing; use an earlier checkpoint.")
        size = path.stat().st_size
        if size != expected.size:
            what = f"{path} has {size} bytes, its manifest says {expected.size}"
            raise DamagedCheckpoint(name, f"{what}; use an earlier checkpoint.")
        if _sha256(path) != expected.sha256:
            raise DamagedCheckpoint(name, f"{path} has another sha256 than its manifest says; use an earlier one.")
    return manifest


def restore(
    folder: Path, *, policy: PreTrainedModel, optimizer: torch.optim.AdamW, config: TrainConfig, total_steps: int
) -> Manifest:
    """Put a checkpoint's weights and moments into `policy` and `optimizer`."""
    manifest = verify(folder)
    if manifest.total_steps != total_steps:
        raise ValueError(f"{folder} is of a run of {manifest.total_steps} steps, this one has {total_steps}.")
    for key in ("objective", "optim", "n_epochs", "batch_size", "seed"):
        before, now = manifest.config[key], asdict(config)[key]
        if before != now:
            raise ValueError(f"{folder} was trained with {key} {before}, this run has {now}; use the same config.")
    saved = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=policy.dtype, use_safetensors=True)
    policy.load_state_dict(saved.state_dict())
    moments = load_file(folder / "optimizer.safetensors")
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(manifest.step), device=parameter.device),
                "exp_avg": moments[f"{name}.exp_avg"].to(parameter.device),
                "exp_avg_sq": moments[f"{name}.exp_avg_sq"].to(parameter.device),
            }
    return manifest


def _moments(policy: PreTrainedModel, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment].cpu().contiguous()
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad
        for moment in ("exp_avg", "exp_avg_sq")
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
