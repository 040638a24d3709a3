"""Reads checkpoints of training runs. A checkpoint is a folder with the files below. Its manifest is written last, with
the size and sha256 of each other file.

    manifest.json                           step, counters, metrics, evaluations, config, files
    model/                                  a Hugging Face folder: config, safetensors, tokenizer; or an adapter's
                                            folder with base_model.json, which identifies the adapter's base, and
                                            effect.json, which holds a few training rows and the adapter's effect on
                                            their log-probabilities
    optimizer-00001-of-00002.safetensors    one rank's part of AdamW's state, by parameter name, and of the float32
                                            masters of weights in half precision

An older checkpoint may be kept without the optimizer's files; its manifest then names none of them.

No file is a pickle. To repeat a run, a resumed run needs only the weights, AdamW's moments and the number of the step.
This number decides the learning rate, and seeds an adapter's dropout, the only random numbers of a step. The results
are equal bit by bit on CPUs; on GPUs some sums of the backward pass have no fixed order. A run may resume on another
number of ranks (processes).
"""

import hashlib
import json
import logging
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, PreTrainedModel

from dpo_core.checkpoint_selection import Evaluation
from dpo_core.config import TrainConfig
from dpo_core.models.adapter import put_weights
from dpo_core.models.model import has_adapter
from dpo_core.training.weights import Weights

MANIFEST = "manifest.json"
MOMENTS, STEP = ("exp_avg", "exp_avg_sq"), "step"  # AdamW's names for its state
MASTER = "master"  # the float32 master of a weight in half precision
logger = logging.getLogger(__name__)


class DamagedCheckpoint(ValueError):
    """Raised if a file of a checkpoint is missing, or does not have the size or digest that the checkpoint's manifest
    names. `file` is the file's path within the checkpoint."""

    def __init__(self, file: str, message: str) -> None:
        super().__init__(file, message)
        self.file = file

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True)
class FileDigest:
    """The size in bytes and the sha256 (hexadecimal) of a file of a checkpoint. A reader of the checkpoint compares the
    file with these values."""

    size: int  # bytes
    sha256: str  # hexadecimal


@dataclass(frozen=True)
class Manifest:
    """The state of a training run at a checkpoint, such as its step, config and metrics, and the sizes and digests of
    the checkpoint's files. The checkpoint's file manifest.json holds these fields."""

    step: int
    total_steps: int
    num_updates: int  # steps so far that had groups
    num_tokens: int  # tokens trained on up to and including this step, over all ranks
    metrics: dict[str, float]  # the metrics of this step
    statistics: dict[str, float]  # the fields of the objective's `Statistics`
    config: dict[str, Any]  # the TrainConfig
    files: dict[str, FileDigest]  # by path in the checkpoint
    dtype: str | None = None  # the policy's dtype, and its base's if different; None: an older release
    base: str | None = None  # `fingerprint` of the adapter's base; None: no adapter, or an older release
    evaluations: tuple[Evaluation, ...] = ()  # the run's values of best_metric so far

    @property
    def has_optimizer(self) -> bool:
        """Whether the checkpoint has the optimizer's state, so that a run can continue from it. A checkpoint without
        this state is only a model."""
        return any(is_optimizer(name) for name in self.files)

    def without_optimizer(self) -> "Manifest":
        """Returns a copy of the manifest that does not list the optimizer's files. The caller writes this copy before
        it deletes these files from the checkpoint."""
        return replace(self, files={name: digest for name, digest in self.files.items() if not is_optimizer(name)})

    def to_json(self) -> bytes:
        """Returns the manifest as the bytes of its file, manifest.json."""
        return json.dumps(asdict(self), indent=1).encode()


def is_optimizer(name: str) -> bool:
    """Whether the file `name` of a checkpoint holds a part of the optimizer's state."""
    return name.startswith("optimizer-")


def latest_checkpoint(folder: Path | str) -> Path | None:
    """Returns the newest undamaged checkpoint in `folder` that a run can resume from; None if there is none. Logs a
    warning for each damaged checkpoint."""
    for candidate in sorted(Path(folder).glob("step-*"), key=lambda path: (len(path.name), path.name), reverse=True):
        try:
            if not verify(candidate).has_optimizer:
                continue
        except DamagedCheckpoint as error:
            logger.warning("A damaged checkpoint is skipped; an older one is tried: %s", error)
        else:
            return candidate
    return None


def read_manifest(folder: Path) -> Manifest:
    """Returns the manifest of the checkpoint in `folder`. Raises DamagedCheckpoint if the manifest is missing or
    unreadable."""
    try:
        return parse_manifest((folder / MANIFEST).read_bytes(), str(folder / MANIFEST))
    except FileNotFoundError:
        raise DamagedCheckpoint(
            MANIFEST, f"The checkpoint's file {folder / MANIFEST} is missing; use an earlier checkpoint."
        ) from None


def parse_manifest(written: bytes, where: str) -> Manifest:
    """Returns the manifest of a checkpoint from `written`, the bytes of the manifest's file. Raises DamagedCheckpoint
    if the bytes are unreadable. `where` is the path or URI of the file, which the error names."""
    try:
        fields = json.loads(written)
        fields["files"] = {name: FileDigest(**digest) for name, digest in fields["files"].items()}
        fields["evaluations"] = tuple(Evaluation(*each) for each in fields.get("evaluations", ()))
        return Manifest(**fields)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(
            MANIFEST, f"The checkpoint's file {where} cannot be read ({error}); use an earlier checkpoint."
        ) from None


def verify(folder: Path) -> Manifest:
    """Returns the manifest of the checkpoint in `folder` if all its files have the sizes and digests that the manifest
    names. Raises DamagedCheckpoint for the first file that differs or is missing."""
    manifest = read_manifest(folder)
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint(name, f"The checkpoint's file {path} is missing; use an earlier checkpoint.")
        size = path.stat().st_size
        if size != expected.size:
            what = f"The checkpoint's file {path} is damaged: it has {size} bytes instead of {expected.size}"
            raise DamagedCheckpoint(name, f"{what}; use an earlier checkpoint.")
        if sha256_of(path) != expected.sha256:
            what = f"The checkpoint's file {path} is damaged: its sha256 is not the one in the checkpoint's manifest"
            raise DamagedCheckpoint(name, f"{what}; use an earlier checkpoint.")
    return manifest


def resumable(folder: Path, *, config: TrainConfig, total_steps: int, precision: str) -> tuple[Manifest, TrainConfig]:
    """Checks that a training run can continue from the checkpoint in `folder`. Returns two values: the checkpoint's
    manifest, and the config for the run. `total_steps` is the run's number of optimizer steps, and `precision` the
    policy's dtype, such as "bfloat16" or "bfloat16 over nf4".

    The returned config is `config` with two more options decided, unless the user has set them: the number of tokens in
    one forward pass and the recomputation of activations, as the checkpoint's run chose them. Raises DamagedCheckpoint
    for a damaged checkpoint. Raises ValueError if the checkpoint has no optimizer state, or if its run had another
    number of steps, another precision, or other options that change the results.
    """
    manifest = verify(folder)
    if not manifest.has_optimizer:
        raise ValueError(
            f"The checkpoint {folder} has no optimizer state any more; "
            "resume from a newer one, or start a run from its model."
        )
    if manifest.total_steps != total_steps:
        what = f"The checkpoint {folder} is from a run of {manifest.total_steps} steps, but this run has {total_steps}"
        raise ValueError(f"{what}; resume with the same data and config.")
    if manifest.dtype not in (None, precision):
        what = f"The checkpoint {folder} was trained in {manifest.dtype}, but the policy is in {precision}"
        raise ValueError(f"{what}; load the policy in {manifest.dtype}.")
    wanted = asdict(config)
    # Releases without early stopping did not write best_metric and early_stop.
    settled = ("objective", "optim", "n_epochs", "batch_size", "max_length", "truncation", "seed")
    for key in (*settled, *manifest.config.keys() & {"best_metric", "early_stop"}):
        before = manifest.config[key]
        if before != json.loads(json.dumps(wanted[key])):
            what = f"The checkpoint {folder} was trained with {key} {before}, but this run has {wanted[key]}"
            raise ValueError(f"{what}; resume with the same config.")
    decided = {
        key: manifest.config[key]
        for key, open_value in (("max_tokens_per_pack", None), ("activation_checkpointing", "auto"))
        if wanted[key] == open_value
    }
    return manifest, replace(config, **decided)


def load(
    folder: Path,
    manifest: Manifest,
    *,
    policy: PreTrainedModel,
    weights: Weights,
    optimizer: torch.optim.AdamW,
    has_weights: bool = False,
) -> None:
    """Loads the state of the optimizer (AdamW) from the checkpoint in `folder`, and the checkpoint's weights into the
    policy. `manifest` is the checkpoint's manifest. With `has_weights`, the policy has been read from this checkpoint
    already, and only the optimizer's state is loaded. Raises ValueError if the checkpoint does not fit the policy."""
    saved = _Saved(folder)
    saved.check(weights)
    if manifest.dtype is None:
        saved.check_precision(weights)
    if has_adapter(policy):
        _check_adapter(folder, policy)
    else:
        _check_config(folder, policy)
    if not has_weights:
        _load_model(folder / "model", policy)
    for name, parameter in weights.stepped.items():
        if saved.has(name, MASTER):
            parameter.data.copy_(saved.like(parameter, name, MASTER))
        if saved.has(name, MOMENTS[0]):
            moments = {moment: saved.like(parameter, name, moment) for moment in MOMENTS}
            # Older releases did not save the step of each weight: they stepped all weights at every update.
            has_step = saved.has(name, STEP)
            step = saved.first(name, STEP) if has_step else torch.tensor(float(manifest.num_updates))
            optimizer.state[parameter] = moments | {STEP: step.to(parameter.device)}


class _Saved:
    """Reads the tensors in the optimizer's files of a checkpoint. Each file holds one shard (some rows) of every
    tensor."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parts: list[Any] = [safe_open(path, "pt") for path in sorted(folder.glob("optimizer-*.safetensors"))]
        self._names = set(self._parts[0].keys())

    def has(self, name: str, kind: str) -> bool:
        return f"{name}.{kind}" in self._names

    def first(self, name: str, kind: str) -> Tensor:
        tensor: Tensor = self._parts[0].get_tensor(f"{name}.{kind}")
        return tensor

    def like(self, parameter: Tensor, name: str, kind: str) -> Tensor:
        """Returns a tensor that the checkpoint holds for the parameter called `name`. The result is on the device of
        `parameter` and sharded in the same way. `kind` says which of the parameter's tensors it is, such as `exp_avg`.
        """
        whole = torch.cat([part.get_tensor(f"{name}.{kind}") for part in self._parts]).to(parameter.device)
        if not isinstance(parameter, DTensor):
            return whole
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)

    def check(self, weights: Weights) -> None:
        """Raises ValueError unless the checkpoint's optimizer state is for the same weights that this run trains: their
        names and shapes must be equal."""
        remedy = "resume with the same model and adapter"
        if {name.rpartition(".")[0] for name in self._names} != weights.stepped.keys():
            raise ValueError(
                f"The names of the weights trained in the checkpoint {self._folder} differ from those of this run; "
                f"{remedy}."
            )
        for name, parameter in weights.stepped.items():
            if self.has(name, MOMENTS[0]) and (shape := self._shape(name)) != (*parameter.shape,):
                what = (
                    f"In the checkpoint {self._folder} {name} has the shape {shape}, "
                    f"but in this run {(*parameter.shape,)}"
                )
                raise ValueError(f"{what}; {remedy}.")

    def check_precision(self, weights: Weights) -> None:
        """Raises ValueError if the weights that this run trains in half precision are not the same ones that the
        checkpoint's run trained in half precision."""
        halves = {name for name in weights.stepped if self.has(name, MASTER)}
        if halves != weights.in_float32.keys():
            what = f"The checkpoint {self._folder} has {len(halves)} weights in half precision"
            remedy = "load the policy in the dtype of the checkpoint's run, or start a new run from its model"
            raise ValueError(f"{what}, but this run has {len(weights.in_float32)}; {remedy}.")

    def _shape(self, name: str) -> tuple[int, ...]:
        shapes = [part.get_slice(f"{name}.{MOMENTS[0]}").get_shape() for part in self._parts]
        return sum(shape[0] for shape in shapes), *shapes[0][1:]


def _check_adapter(folder: Path, policy: Any) -> None:
    """Raises ValueError if the adapter in the checkpoint `folder` has other options than the policy's adapter. With
    other options the same weights would have another effect."""
    from peft import PeftConfig

    (current,), before = policy.peft_config.values(), PeftConfig.from_pretrained(folder / "model")
    for key in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"):
        values = [getattr(config, key, None) for config in (before, current)]
        if values[0] != values[1]:
            what = f"The checkpoint {folder} has an adapter with {key} {values[0]}, but the policy's has {values[1]}"
            raise ValueError(f"{what}; load the policy with the same Lora options.")


# The keys of a config that do not affect what the model computes, such as its folder and its initialization.
_IRRELEVANT = re.compile(
    r"_name_or_path|architectures|dtype|transformers_version|use_cache|quantization_config|(pad|bos|eos)_token_id"
    r"|.*(initializer|dropout|pdrop).*|output_router_logits"
)


def _check_config(folder: Path, policy: PreTrainedModel) -> None:
    """Raises ValueError if the config of the model in the checkpoint `folder` differs from the policy's config. Entries
    that do not affect what the model computes may differ."""
    before, current = (
        _computed(config.to_dict()) for config in (AutoConfig.from_pretrained(folder / "model"), policy.config)
    )
    for key in ("model_type", *sorted(before.keys() | current.keys())):
        if before.get(key) != current.get(key):
            what = f"The checkpoint {folder} has a model with {key} {before.get(key)}, but the policy has"
            raise ValueError(f"{what} {current.get(key)}; resume with the same model.")


def _computed(config: dict[str, Any]) -> dict[str, Any]:
    """Returns only the entries of a model's config that affect what the model computes."""
    return {
        key: _computed(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not _IRRELEVANT.fullmatch(str(key))
    }


def _load_model(folder: Path, policy: PreTrainedModel) -> None:
    if has_adapter(policy):
        put_weights(policy, folder)
    else:
        whole = type(policy).from_pretrained(folder, dtype="auto", use_safetensors=True)
        set_model_state_dict(policy, whole.state_dict(), options=StateDictOptions(full_state_dict=True))


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
