"""A checkpoint is a folder; its manifest is written last and names every file with size and sha256.

    manifest.json                           step, counters, metrics, evaluations, config, files
    model/                                  a Hugging Face folder: config, safetensors, tokenizer; or an adapter's, and
                                            base_model.json, by which it knows its base
    optimizer-00001-of-00002.safetensors    one rank's part of AdamW's state, by parameter name, and of the trained
                                            weights in float32, where the model has fewer bits

An older checkpoint may be kept as a model alone: its manifest names no optimizer file then.

No pickles. Nothing in a step draws random numbers and the learning rate is a function of the step,
so weights, moments and the step are all that resuming needs to repeat a run: on CPUs bit for bit; on GPUs
some sums of backward have no fixed order. A run may go on with another number of ranks than it was saved with.
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

from dpo_core.config import TrainConfig
from dpo_core.models.adapter import put_weights
from dpo_core.models.model import has_adapter
from dpo_core.selection import Evaluation
from dpo_core.training.weights import Weights

MANIFEST = "manifest.json"
MOMENTS, STEP = ("exp_avg", "exp_avg_sq"), "step"  # AdamW's names for its state
MASTER = "master"  # a weight in float32 of which the model has fewer bits
logger = logging.getLogger(__name__)


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
    num_updates: int  # steps so far that had groups
    num_tokens: int  # trained on up to and with this step, over all ranks
    metrics: dict[str, float]  # of this step
    statistics: dict[str, float]  # of the objective
    config: dict[str, Any]  # the TrainConfig
    files: dict[str, FileDigest]  # by path in the checkpoint
    dtype: str | None = None  # that the policy computes in; None: the release that wrote it did not say
    base: str | None = None  # `adapter.fingerprint` of what the adapter was put on; None: all weights, or as above
    evaluations: tuple[Evaluation, ...] = ()  # of the run so far, by its best_metric

    @property
    def has_optimizer(self) -> bool:
        """Whether a run can go on from it; what it lost its optimizer's state of is a model and no more."""
        return any(is_optimizer(name) for name in self.files)

    def without_optimizer(self) -> "Manifest":
        """The same checkpoint, kept as a model."""
        return replace(self, files={name: digest for name, digest in self.files.items() if not is_optimizer(name)})

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()


def is_optimizer(name: str) -> bool:
    """Whether a checkpoint's file is a part of its optimizer's state."""
    return name.startswith("optimizer-")


def latest_checkpoint(folder: Path | str) -> Path | None:
    """The newest undamaged checkpoint in a folder of them that a run can go on from. A damaged one is named in a
    warning and passed over."""
    for candidate in sorted(Path(folder).glob("step-*"), key=lambda path: (len(path.name), path.name), reverse=True):
        try:
            if not verify(candidate).has_optimizer:
                continue
        except DamagedCheckpoint as error:
            logger.warning("A checkpoint is damaged and passed over: %s", error)
        else:
            return candidate
    return None


def read_manifest(folder: Path) -> Manifest:
    try:
        return parse_manifest((folder / MANIFEST).read_bytes(), str(folder / MANIFEST))
    except FileNotFoundError:
        raise DamagedCheckpoint(MANIFEST, f"{folder / MANIFEST} is missing; use an earlier checkpoint.") from None


def parse_manifest(written: bytes, where: str) -> Manifest:
    """Raises DamagedCheckpoint, which names where it was read."""
    try:
        fields = json.loads(written)
        fields["files"] = {name: FileDigest(**digest) for name, digest in fields["files"].items()}
        fields["evaluations"] = tuple(Evaluation(*each) for each in fields.get("evaluations", ()))
        return Manifest(**fields)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(MANIFEST, f"{where} is unreadable ({error}); use an earlier checkpoint.") from None


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
        if sha256_of(path) != expected.sha256:
            raise DamagedCheckpoint(name, f"{path} has another sha256 than its manifest says; use an earlier one.")
    return manifest


def resumable(
    folder: Path, *, config: TrainConfig, total_steps: int, dtype: torch.dtype
) -> tuple[Manifest, TrainConfig]:
    """The manifest of a checkpoint that this run can go on from, and `config` with what that run had decided."""
    manifest = verify(folder)
    if not manifest.has_optimizer:
        raise ValueError(f"{folder} was kept without its optimizer's state; resume from a newer one, or start from it.")
    if manifest.total_steps != total_steps:
        raise ValueError(f"{folder} is of a run of {manifest.total_steps} steps, this one has {total_steps}.")
    if manifest.dtype not in (None, name_of(dtype)):
        raise ValueError(f"{folder} was trained in {manifest.dtype}; load the policy in it, not in {name_of(dtype)}.")
    wanted = asdict(config)
    # Releases that did not evaluate towards an end wrote neither of the last two.
    settled = ("objective", "optim", "n_epochs", "batch_size", "max_length", "truncation", "seed")
    for key in (*settled, *manifest.config.keys() & {"best_metric", "early_stop"}):
        before = manifest.config[key]
        if before != json.loads(json.dumps(wanted[key])):
            message = f"{folder} was trained with {key} {before}, this run has {wanted[key]}; use the same config."
            raise ValueError(message)
    decided = {
        key: manifest.config[key]
        for key, open_value in (("max_tokens_per_pack", None), ("activation_checkpointing", "auto"))
        if wanted[key] == open_value
    }
    return manifest, replace(config, **decided)


def load(
    folder: Path, manifest: Manifest, *, policy: PreTrainedModel, weights: Weights, optimizer: torch.optim.AdamW
) -> None:
    """Put a checkpoint's weights and AdamW's state into place."""
    saved = _Saved(folder)
    saved.check(weights)
    if manifest.dtype is None:
        saved.check_precision(weights)
    if has_adapter(policy):
        _check_adapter(folder, policy)
    else:
        _check_config(folder, policy)
    _load_model(folder / "model", policy)
    for name, parameter in weights.stepped.items():
        if saved.has(name, MASTER):
            parameter.data.copy_(saved.like(parameter, name, MASTER))
        if saved.has(name, MOMENTS[0]):
            moments = {moment: saved.like(parameter, name, moment) for moment in MOMENTS}
            # Releases that did not save the step of each weight stepped all of them at every update.
            counted = saved.has(name, STEP)
            step = saved.first(name, STEP) if counted else torch.tensor(float(manifest.num_updates))
            optimizer.state[parameter] = moments | {STEP: step.to(parameter.device)}


class _Saved:
    """What the optimizer's files of a checkpoint hold. Each has some rows of every tensor."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parts: list[Any] = [safe_open(path, "pt") for path in sorted(folder.glob("optimizer-*.safetensors"))]
        self._names = set(self._parts[0].keys())

    def has(self, name: str, kind: str) -> bool:
        return f"{name}.{kind}" in self._names

    def first(self, name: str, kind: str) -> Tensor:
        found: Tensor = self._parts[0].get_tensor(f"{name}.{kind}")
        return found

    def like(self, parameter: Tensor, name: str, kind: str) -> Tensor:
        """On the parameter's device, and split as it is."""
        whole = torch.cat([part.get_tensor(f"{name}.{kind}") for part in self._parts]).to(parameter.device)
        if not isinstance(parameter, DTensor):
            return whole
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)

    def check(self, weights: Weights) -> None:
        """Raises ValueError where these are not the weights that are trained here."""
        remedy = "give train the same model and adapter"
        if {name.rpartition(".")[0] for name in self._names} != weights.stepped.keys():
            raise ValueError(f"{self._folder} is of other weights than are trained here; {remedy}.")
        for name, parameter in weights.stepped.items():
            if self.has(name, MOMENTS[0]) and (shape := self._shape(name)) != (*parameter.shape,):
                what = f"{self._folder} has {name} of shape {shape}, here it has {(*parameter.shape,)}"
                raise ValueError(f"{what}; {remedy}.")

    def check_precision(self, weights: Weights) -> None:
        """Raises ValueError where the model had more or fewer bits than it has here."""
        halves = {name for name in weights.stepped if self.has(name, MASTER)}
        if halves != weights.in_float32.keys():
            what = f"{self._folder} has {len(halves)} weights in float32 beside the model"
            remedy = "load the policy in the dtype of that run, or start a new run from its model"
            raise ValueError(f"{what}, this run {len(weights.in_float32)}; {remedy}.")

    def _shape(self, name: str) -> tuple[int, ...]:
        shapes = [part.get_slice(f"{name}.{MOMENTS[0]}").get_shape() for part in self._parts]
        return sum(shape[0] for shape in shapes), *shapes[0][1:]


def _check_adapter(folder: Path, policy: Any) -> None:
    """Raises ValueError where the same weights of an adapter would count for more or less than they did."""
    from peft import PeftConfig

    (own,), before = policy.peft_config.values(), PeftConfig.from_pretrained(folder / "model")
    for key in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"):
        values = [getattr(config, key, None) for config in (before, own)]
        if values[0] != values[1]:
            what = f"{folder} was trained with an adapter whose {key} is {values[0]}, here it is {values[1]}"
            raise ValueError(f"{what}; load the policy with the same Lora.")


# What a config says of files, and of how the model is begun, loaded and asked, but not of what it computes.
_ASIDE = re.compile(
    r"_name_or_path|architectures|dtype|transformers_version|use_cache|quantization_config|(pad|bos|eos)_token_id"
    r"|.*(initializer|dropout|pdrop|aux_loss).*|output_router_logits"
)


def _check_config(folder: Path, policy: PreTrainedModel) -> None:
    """Raises ValueError where the same weights would be of another model than they were."""
    before, own = (
        _computed(config.to_dict()) for config in (AutoConfig.from_pretrained(folder / "model"), policy.config)
    )
    for key in ("model_type", *sorted(before.keys() | own.keys())):
        if before.get(key) != own.get(key):
            what = f"{folder} is of a model whose {key} is {before.get(key)}, here it is {own.get(key)}"
            raise ValueError(f"{what}; give train the same model.")


def _computed(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _computed(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not _ASIDE.fullmatch(str(key))
    }


def _load_model(folder: Path, policy: PreTrainedModel) -> None:
    if has_adapter(policy):
        put_weights(policy, folder)
    else:
        whole = type(policy).from_pretrained(folder, dtype="auto", use_safetensors=True)
        set_model_state_dict(policy, whole.state_dict(), options=StateDictOptions(full_state_dict=True))


def name_of(dtype: torch.dtype) -> str:
    """As config.json has it."""
    return str(dtype).removeprefix("torch.")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
