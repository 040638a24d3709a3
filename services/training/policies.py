"""Loads the model that a job trains (the policy), and the frozen model that it is compared with (the reference).

If a model cannot be used, the job fails with a message for the user.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_core.models import adapter_folder
from dpo_core.options import InvalidOption
from services import storage
from services.contract import AttemptSpec, Failed, Precision, Weights
from services.training.reports.reporting import JobFailed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# The paths in a job's request of the options that only a loaded model can refuse; others are in `x_raydpo`.
FIELDS = {"objective": "method.type", "target_modules": "x_raydpo.adapter.target_modules"}


# Loading raises these for a model that cannot be used; a quantized model may need a library that is not installed.
LOADING = (ValueError, ImportError)
REFERENCE = "The reference model cannot be used"


def load_policy(spec: AttemptSpec, device: "torch.device") -> "PreTrainedModel":
    """Loads the model that the job starts from, ready to train.

    Depending on the spec, the job trains all weights, a new adapter, or the adapter that it starts from. If each worker
    is to hold only a part of the weights, the returned model has no weights until `train` has split it over the
    workers. Raises JobFailed for a model that transformers does not know or that cannot be trained.
    """
    # The imports of models are in functions, because they take eight CPU seconds and the driver works without them.
    from dpo_core.models.model import load_merged

    adapter, dtype = spec.weights.adapter, _dtype(spec.weights.precision)
    start, base = fetch(spec.model_source)
    with unusable_models_fail_the_job(also=LOADING):
        if base is None:
            return _named(_load(spec, start, device, adapter=adapter), spec.model_source)
        if adapter is None:
            return load_merged(start, base=base, dtype=dtype, device=device)
        return _named(_load(spec, base, device, adapter=start), base_of(spec.model_source))


def load_reference(source: str, weights: Weights, device: "torch.device") -> "PreTrainedModel":
    """Loads the reference model, with which a job compares the trained model. The reference is a full model, or an
    adapter on its base model; all its weights are frozen.

    `source` says where the model is (a storage URI, a local folder or a hub id). `weights` says in which precision the
    job trains, and whether the base is quantized. Raises JobFailed for a model that cannot be used.
    """
    from dpo_core.models import model
    from dpo_core.models.adapter import quantization_of

    folder, base = fetch(source)
    dtype = _dtype(weights.precision)
    with unusable_models_fail_the_job(REFERENCE, also=LOADING):
        if base and not weights.quantization and quantization_of(folder):
            # The adapter was trained on a rounded base, and merging rounds the base again.
            reference = model.load_merged(folder, base=base, dtype=dtype, device=device)
        else:
            # A new adapter changes no output, but a base model is quantized only beneath an adapter.
            adapter = folder if base else weights.adapter if weights.quantization else None
            reference = model.load_policy(
                base or folder, dtype=dtype, device=device, adapter=adapter, quantization=weights.quantization
            )
    return reference.requires_grad_(False)


def fetch(source: str) -> tuple[Path, Path | None]:
    """Returns two local folders: that of a model, and that of its base model. The second is None if the model is not an
    adapter.

    If a model is named by a hub id, this id is returned in place of its folder.
    """
    folder = storage.fetch(source)
    base = _base_in(folder)
    return folder, storage.fetch(base) if base else None


def fetch_words(source: str) -> Path:
    """Returns a local folder with a model's tokenizer, chat templates and configs, but not its weights, which may be
    large. If the model is named by a hub id, returns this id."""
    return storage.fetch(source, only=storage.WORDS)


def base_of(source: str) -> str:
    """Returns where the base model of an adapter is. If `source` is not an adapter, returns `source` itself.

    A source is a storage URI, a local folder or a hub id.
    """
    return _base_in(fetch_words(source)) or source


def _base_in(folder: Path) -> str | None:
    return adapter_folder.base_of(folder) if adapter_folder.is_adapter(folder) else None


@contextmanager
def unusable_models_fail_the_job(
    what: str = "The model cannot be trained", *, also: Sequence[type[Exception]] = ()
) -> Iterator[None]:
    """Turns errors about a model, raised in the `with` block, into JobFailed. The message for the user is `what`,
    followed by the error's message: "The model cannot be trained: …".

    The errors are UnusableModel, InvalidOption, and the types in `also`. Such errors may occur while a model is loaded,
    in its first forward pass, and while its weights are divided among workers.
    """
    from dpo_core.models.architecture import UnusableModel

    errors: tuple[type[Exception], ...] = (UnusableModel, InvalidOption, *also)
    try:
        yield
    except errors as error:
        param = FIELDS.get(error.field, f"x_raydpo.{error.field}") if isinstance(error, InvalidOption) else "model"
        raise JobFailed(Failed(code="invalid_model", message=f"{what}: {error}", param=param)) from error


def _load(spec: AttemptSpec, source: Path, device: "torch.device", **options: Any) -> "PreTrainedModel":
    from dpo_core.models import model

    num_outputs = spec.config.objective.traits.num_outputs
    load = functools.partial(model.load_reward_model, num_outputs=num_outputs) if num_outputs else model.load_policy
    return load(
        source,
        dtype=_dtype(spec.weights.precision),
        device=device,
        seed=spec.config.seed,
        quantization=spec.weights.quantization,
        in_parts=_may_split(spec, device),
        **options,
    )


def _may_split(spec: AttemptSpec, device: "torch.device") -> bool:
    sharding = spec.config.sharding
    splits = sharding in ("full", "hybrid") or (sharding == "auto" and device.type == "cuda")
    return splits and spec.num_workers > 1 and spec.weights.quantization is None


def _named(policy: "PreTrainedModel", source: str) -> "PreTrainedModel":
    """Sets the name of the base model in the config of the policy's adapter to `source`, and returns the policy.

    Without this change, the name would be the path of this node's copy of the base model, which does not exist on other
    nodes.
    """
    for config in getattr(policy, "peft_config", {}).values():
        config.base_model_name_or_path = source
    return policy


def _dtype(precision: Precision) -> "torch.dtype":
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
