"""Writes checkpoints of a policy and its optimizer in the background while training continues."""

import errno
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_core.models.adapter import BASE, base_file, whole
from dpo_core.models.folder import processors_of, save_model, skeleton
from dpo_core.models.model import agree_on_padding, has_adapter
from dpo_core.training.checkpoint import MANIFEST, MASTER, STEP, FileDigest, Manifest, sha256_of
from dpo_core.training.ranks import num_ranks, rank, together
from dpo_core.training.weights import Weights

Publish = Callable[[int, Path], None]  # called with a checkpoint's step and folder


class Writer:
    """Writes checkpoints into folders `folder/step-000012` in the background, one at a time, each completely or not at
    all.

    A save waits until the previous checkpoint is written. If writing fails in the background, the next call of a method
    raises the error. The end of a `with` block waits until the last checkpoint is written.

    Every rank (process of the run) that holds a part of the optimizer's state writes this part. `folder` may be shared
    by the ranks, or each rank may have its own. Each rank that has written files calls the function `publish` with the
    step and the checkpoint's folder. Rank 0 calls `publish` last, after it has written the manifest.
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
        self._shard, self._num_shards = _shard_index(weights)
        self._others = dist.new_group(backend="gloo") if self._num_shards > 1 else None
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def save(self, manifest: Manifest, optimizer: torch.optim.AdamW, files: dict[str, bytes]) -> None:
        """Copies the weights and the optimizer's state to the CPU, and starts to write them as a checkpoint in the
        background. `manifest.files` must be empty; the writer adds the files that it writes. `files` maps the names of
        more files in the model's folder to their contents."""
        self.wait()
        model = _model_state(self._policy, self._weights)
        if self._shard is not None or self._others:
            state = _optimizer_state(self._weights, optimizer)
            self._pending = self._pool.submit(self._write, manifest, model, state, files)

    def check(self) -> None:
        """Raises an error if writing the last checkpoint has already failed. Does not wait for a checkpoint that is
        still being written."""
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

    def _write(
        self, manifest: Manifest, model: dict[str, Tensor], state: dict[str, Tensor], more: dict[str, bytes]
    ) -> None:
        folder = self._folder / f"step-{manifest.step:06d}"
        partial = folder.with_name(f".{folder.name}.partial")
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        if self._others:
            dist.barrier(self._others)
        try:
            files = self._gather(lambda: self._write_part(partial, manifest, model, state, more))
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)  # frees space on a disk that may be full
            if isinstance(error, SafetensorError):
                what = f"The checkpoint of step {manifest.step} could not be written to {self._folder} ({error})"
                sentence = f"{what}; free some space, and resume from the previous checkpoint."
                raise OSError(_errno_of(error), sentence) from error
            raise
        if rank() == 0:
            (partial / MANIFEST).write_bytes(replace(manifest, files=files).to_json())
            shutil.rmtree(folder, ignore_errors=True)  # removes the checkpoint of an earlier attempt
            os.rename(partial, folder)
            self._publish(manifest.step, folder)

    def _write_part(
        self,
        partial: Path,
        manifest: Manifest,
        model: dict[str, Tensor],
        state: dict[str, Tensor],
        more: dict[str, bytes],
    ) -> dict[str, FileDigest]:
        """Writes the files of this rank (process of the run) into the folder `partial`, and returns their digests by
        path. `model` has the weights to write, `state` this rank's part of the optimizer's state, and `more` further
        files of the model's folder. Ranks other than rank 0 also publish their files; rank 0 publishes its files later,
        after the manifest is written."""
        partial.mkdir(parents=True, exist_ok=True)
        paths = []
        if self._shard is not None:
            paths = [partial / f"optimizer-{self._shard + 1:05d}-of-{self._num_shards:05d}.safetensors"]
            save_file(state, paths[0])
        if rank() == 0:
            files = {BASE: base_file(manifest.base, self._policy)} if manifest.base else self._files
            save_model(self._skeleton, partial / "model", self._tokenizer, files | more, state_dict=model)
            if not has_adapter(self._skeleton):  # transformers would write the dtype of a sharded policy's shards
                self._skeleton.config.dtype = manifest.dtype
                self._skeleton.config.save_pretrained(partial / "model")
            paths += sorted(path for path in (partial / "model").rglob("*") if path.is_file())
        digests = {str(path.relative_to(partial)): FileDigest(path.stat().st_size, sha256_of(path)) for path in paths}
        if paths and rank() > 0:
            self._publish(manifest.step, partial)
        return digests

    def _gather(self, write: Callable[[], dict[str, FileDigest]]) -> dict[str, FileDigest]:
        """Calls `write`, which writes a rank's files, on all ranks (processes of the run). Returns the digests of all
        ranks' files on rank 0, and an empty dictionary on the other ranks."""
        if self._others is None:
            return write()
        files = together(write, torch.device("cpu"), self._others)
        parts: list[Any] = [None] * num_ranks()
        dist.gather_object(files, parts if rank() == 0 else None, group=self._others)
        return {name: digest for part in parts for name, digest in (part or {}).items()}


def _shard_index(weights: Weights) -> tuple[int | None, int]:
    """Returns two numbers: the index (from 0) of the shard of the optimizer's state that this rank (process of the run)
    writes, and the number of shards. The index is None if this rank writes nothing, because another rank holds the same
    shard and writes it."""
    first = next(iter(weights.stepped.values()))
    if not isinstance(first, DTensor):
        return (0 if rank() == 0 else None), 1
    place = first.device_mesh.get_coordinate()
    assert place is not None
    (dimension,) = [i for i, placement in enumerate(first.placements) if isinstance(placement, Shard)]
    is_first = all(at == 0 for i, at in enumerate(place) if i != dimension)
    return (place[dimension] if is_first else None), first.device_mesh.size(dimension)


def _model_state(policy: PreTrainedModel, weights: Weights) -> dict[str, Tensor]:
    """Returns copies of the policy's weights on the CPU, as whole tensors in the policy's own dtypes. Returns an empty
    dictionary on ranks (processes of the run) other than rank 0.

    Tied weights are included once. If the policy has an adapter, only the adapter's weights are included. One weight at
    a time is gathered and converted, so that a model in half precision is never held in float32.
    """
    saved = weights.trained if has_adapter(policy) else policy.state_dict()
    state: dict[str, Tensor] = {}
    for name, tensor in saved.items():
        if name not in policy.all_tied_weights_keys and (weights.is_sharded or rank() == 0):
            gathered = whole(tensor)  # all ranks take part
            if rank() == 0:
                state[name] = gathered.to("cpu", weights.dtypes.get(name, tensor.dtype), copy=True).contiguous()
    return state


def _optimizer_state(weights: Weights, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Returns copies, on the CPU, of the part of AdamW's state that this rank (process of the run) holds. For weights
    in half precision, also returns copies of their masters, the float32 weights that the optimizer updates.

    A parameter that never had a gradient has step 0 and no moments.
    """
    state = {f"{name}.{MASTER}": _copy(parameter) for name, parameter in weights.in_float32.items()}
    for name, parameter in weights.stepped.items():
        moments = optimizer.state.get(parameter, {STEP: torch.tensor(0.0)})
        state |= {f"{name}.{key}": _copy(tensor) for key, tensor in moments.items()}
    return state


def _copy(tensor: Tensor) -> Tensor:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().to("cpu", copy=True).contiguous()


def _errno_of(error: SafetensorError) -> int:
    """Returns the errno that ends the error's text, such as 28 in "No space left on device (os error 28)", or EIO if
    the text has none. By this number, callers recognize that storage is full, and then wait until there is room."""
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else errno.EIO
