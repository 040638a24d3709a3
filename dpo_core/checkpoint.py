"""A checkpoint is a folder; its manifest is written last and names every file with size and sha256.

    manifest.json                           step, counters, metrics, config, files
    model/                                  a Hugging Face folder: config, safetensors, tokenizer; or an adapter's
    optimizer-00001-of-00002.safetensors    one rank's part of AdamW's state, by parameter name, and of the trained
                                            weights in float32, where the model has fewer bits

No pickles. Nothing in a step draws random numbers and the learning rate is a function of the step,
so weights, moments and the step are all that resuming needs to repeat a run: on CPUs bit for bit; on GPUs
some sums of backward have no fixed order. A run may go on with another number of ranks than it was saved with.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_core.config import TrainConfig
from dpo_core.folder import processors_of, save_model, skeleton
from dpo_core.model import agree_on_padding, has_adapter
from dpo_core.ranks import num_ranks, rank, together
from dpo_core.weights import Weights

MANIFEST = "manifest.json"
MOMENTS, STEP = ("exp_avg", "exp_avg_sq"), "step"  # AdamW's names for its state
MASTER = "master"  # a weight in float32 of which the model has fewer bits
Publish = Callable[[int, Path], None]  # step and folder
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


class Writer:
    """Writes checkpoints `folder/step-000012` while training goes on, one at a time, each whole or not at all.

    A save waits for the one before it. What fails in the background is raised by the next call.
    Every rank that holds a part writes it, to a `folder` that is shared or its own. `publish` is called
    on each of them with the checkpoint's folder once its part is written; on rank 0 last, and with the
    manifest. As a context manager: leaves when all is written.
    """

    def __init__(
        self,
        folder: Path,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        weights: Weights,
        publish: Publish | None = None,
    ) -> None:
        self._folder, self._policy, self._weights = folder, policy, weights
        self._skeleton = skeleton(policy)
        self._tokenizer = agree_on_padding(self._skeleton, tokenizer)
        self._files = {} if has_adapter(policy) else processors_of(policy)
        self._publish = publish or (lambda step, folder: None)
        self._part, self._num_parts = _part(weights)
        self._others = dist.new_group(backend="gloo") if self._num_parts > 1 else None
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def save(self, manifest: Manifest, optimizer: torch.optim.AdamW) -> None:
        """Copy what the checkpoint holds, and return. `manifest` lacks its files."""
        self.wait()
        model = _model_state(self._policy, self._weights)
        if self._part is not None or self._others:
            state = _optimizer_state(self._weights, optimizer)
            self._pending = self._pool.submit(self._write, manifest, model, state)

    def check(self) -> None:
        """Raises what a write has failed with."""
        if self._pending is not None and self._pending.done():
            self._pending.result()

    def wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _write(self, manifest: Manifest, model: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        whole = self._folder / f"step-{manifest.step:06d}"
        partial = whole.with_name(f".{whole.name}.partial")
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        if self._others:
            dist.barrier(self._others)
        try:
            files = self._gather(lambda: self._write_part(partial, manifest, model, state))
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)  # half a checkpoint would keep a full disk full
            if isinstance(error, SafetensorError):
                what = f"The checkpoint of step {manifest.step} could not be written to {self._folder} ({error})"
                raise OSError(f"{what}; make room, and resume from the one before.") from error
            raise
        if rank() == 0:
            (partial / MANIFEST).write_text(json.dumps(asdict(replace(manifest, files=files)), indent=1))
            shutil.rmtree(whole, ignore_errors=True)  # an earlier attempt's
            os.rename(partial, whole)
            self._publish(manifest.step, whole)

    def _write_part(
        self, partial: Path, manifest: Manifest, model: dict[str, Tensor], state: dict[str, Tensor]
    ) -> dict[str, FileDigest]:
        """This rank's files; those of others than rank 0 are published."""
        partial.mkdir(parents=True, exist_ok=True)
        paths = []
        if self._part is not None:
            paths = [partial / f"optimizer-{self._part + 1:05d}-of-{self._num_parts:05d}.safetensors"]
            save_file(state, paths[0])
        if rank() == 0:
            save_model(self._skeleton, partial / "model", self._tokenizer, self._files, state_dict=model)
            if not has_adapter(self._skeleton):  # of a sharded policy transformers writes down the shards' precision
                self._skeleton.config.dtype = manifest.dtype
                self._skeleton.config.save_pretrained(partial / "model")
            paths += sorted(path for path in (partial / "model").rglob("*") if path.is_file())
        files = {str(path.relative_to(partial)): FileDigest(path.stat().st_size, _sha256(path)) for path in paths}
        if paths and rank() > 0:
            self._publish(manifest.step, partial)
        return files

    def _gather(self, write: Callable[[], dict[str, FileDigest]]) -> dict[str, FileDigest]:
        """What all ranks write; on rank 0."""
        if self._others is None:
            return write()
        files = together(write, torch.device("cpu"), self._others)
        parts: list[Any] = [None] * num_ranks()
        dist.gather_object(files, parts if rank() == 0 else None, group=self._others)
        return {name: digest for part in parts for name, digest in (part or {}).items()}


def latest_checkpoint(folder: Path | str) -> Path | None:
    """The newest undamaged checkpoint in a folder of them; a damaged one is named in a warning and passed over."""
    for candidate in sorted(Path(folder).glob("step-*"), key=lambda path: (len(path.name), path.name), reverse=True):
        try:
            verify(candidate)
        except DamagedCheckpoint as error:
            logger.warning("A checkpoint is damaged and passed over: %s", error)
        else:
            return candidate
    return None


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


def resumable(
    folder: Path, *, config: TrainConfig, total_steps: int, dtype: torch.dtype
) -> tuple[Manifest, TrainConfig]:
    """The manifest of a checkpoint that this run can go on from, and `config` with what that run had decided."""
    manifest = verify(folder)
    if manifest.total_steps != total_steps:
        raise ValueError(f"{folder} is of a run of {manifest.total_steps} steps, this one has {total_steps}.")
    if manifest.dtype not in (None, name_of(dtype)):
        raise ValueError(f"{folder} was trained in {manifest.dtype}; load the policy in it, not in {name_of(dtype)}.")
    wanted = asdict(config)
    for key in ("objective", "optim", "n_epochs", "batch_size", "max_length", "truncation", "seed"):
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
    for key in ("r", "lora_alpha", "use_rslora", "use_dora"):
        values = [getattr(config, key, None) for config in (before, own)]
        if values[0] != values[1]:
            what = f"{folder} was trained with an adapter whose {key} is {values[0]}, here it is {values[1]}"
            raise ValueError(f"{what}; load the policy with the same Lora.")


def _load_model(folder: Path, policy: PreTrainedModel) -> None:
    if has_adapter(policy):
        from peft import set_peft_model_state_dict

        saved = load_file(folder / "adapter_model.safetensors")  # named as within a PeftModel
        own = {name.removeprefix("base_model.model."): saved[name] for name in saved}
        if strangers := set_peft_model_state_dict(policy, own).unexpected_keys:
            what = f"The adapter of {folder} has {strangers[0]}, which has no place in this model"
            raise ValueError(f"{what} ({len(strangers)} such weights); start a new run from the base.")
    else:
        whole = type(policy).from_pretrained(folder, dtype="auto", use_safetensors=True)
        set_model_state_dict(policy, whole.state_dict(), options=StateDictOptions(full_state_dict=True))


def name_of(dtype: torch.dtype) -> str:
    """As config.json has it."""
    return str(dtype).removeprefix("torch.")


def _part(weights: Weights) -> tuple[int | None, int]:
    """Which part of the optimizer's state this rank writes, and how many there are. Of copies, the first is written."""
    first = next(iter(weights.stepped.values()))
    if not isinstance(first, DTensor):
        return (0 if rank() == 0 else None), 1
    place = first.device_mesh.get_coordinate()
    assert place is not None
    (dimension,) = [i for i, placement in enumerate(first.placements) if isinstance(placement, Shard)]
    is_first = all(at == 0 for i, at in enumerate(place) if i != dimension)
    return (place[dimension] if is_first else None), first.device_mesh.size(dimension)


def _model_state(policy: PreTrainedModel, weights: Weights) -> dict[str, Tensor]:
    """Copies of the trained weights on the CPU, whole, tied ones once; of an adapter alone, if there is one.

    In the policy's own precision. Empty on other ranks.
    """
    if weights.is_sharded:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=has_adapter(policy))
        state = cast(dict[str, Tensor], get_model_state_dict(policy, options=options))
    else:
        kept = weights.trained if has_adapter(policy) else policy.state_dict()
        state = {name: _copy(tensor) for name, tensor in kept.items()} if rank() == 0 else {}
    dtypes = weights.dtypes
    return {
        name: tensor.to(dtypes.get(name, tensor.dtype))
        for name, tensor in state.items()
        if name not in policy.all_tied_weights_keys
    }


def _optimizer_state(weights: Weights, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Copies of this rank's part of AdamW's state and of float32 weights, on the CPU. A parameter that never had a
    gradient has taken no step and has no moments."""
    state = {f"{name}.{MASTER}": _copy(parameter) for name, parameter in weights.in_float32.items()}
    for name, parameter in weights.stepped.items():
        own = optimizer.state.get(parameter, {STEP: torch.tensor(0.0)})
        state |= {f"{name}.{key}": _copy(tensor) for key, tensor in own.items()}
    return state


def _copy(tensor: Tensor) -> Tensor:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().to("cpu", copy=True).contiguous()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
