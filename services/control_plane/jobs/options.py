"""Describes the options in the field `x_raydpo` of a job, so that clients can offer and explain them."""

from dataclasses import asdict
from typing import Any, get_args

from dpo_core.config import Lora, Optim, Quantization, TrainConfig
from dpo_core.methods import described_options
from services.contract import Policy, Precision, ReferenceSource
from services.control_plane.jobs.requests import EXTENSIONS, KEPT


def _option(default: object, values: str, description: str) -> dict[str, Any]:
    return {"default": default, "range": values, "description": description}


def _choice(default: object, choices: tuple[Any, ...], description: str) -> dict[str, Any]:
    return _option(default, ", ".join(map(str, choices)), description) | {"choices": list(choices)}


# The options that the classes of dpo_core do not have.
OWN = {
    "dataset": _option(
        None,
        "a URI",
        "The URI of the training data, such as https://host/pairs.jsonl, in place of an uploaded training file.",
    ),
    "columns": _option(
        None,
        "an object",
        'Only with dataset: the column of each role, such as {"prompt": "question"}, if the columns have other names '
        "than the roles.",
    ),
    "invalid_rows": _choice(
        "refuse",
        ("refuse", "drop"),
        "Only with dataset: whether one unusable row fails the job (refuse), or unusable rows are left out (drop).",
    ),
    "max_invalid_share": _option(
        0.01, "from 0 to 0.5", "With invalid_rows drop: the largest share of rows that may be left out."
    ),
    "validation_share": _option(
        None,
        "greater than 0 and at most 0.5",
        "The share of the training file that is held out for validation, if there is no validation file.",
    ),
    "num_workers": _option(
        1, "from 1 to 1024", "Number of processes that share the training. The result does not depend on it."
    ),
    "priority": _option(
        0, "from -10 to 10", "Of a project's waiting jobs, the one with the highest priority starts first."
    ),
    "adapter": _choice(
        "auto",
        ("auto", "none"),
        "What is trained: an adapter (LoRA) on a frozen base model, or all weights (none). "
        "With auto, the settings of the base model decide; usually they say an adapter.",
    ),
    "precision": _choice(
        "auto",
        ("auto", *get_args(Precision)),
        "Number type in which the job computes. With auto: bfloat16 on GPUs and float32 on CPUs.",
    ),
    "quantization": _choice(
        None,
        get_args(Quantization),
        "Number type of an adapter's frozen base model; nf4 has 4.1 bits per weight (arXiv 2305.14314).",
    ),
    "reference.source": _choice(
        "auto",
        get_args(ReferenceSource),
        "What computes the reference model's log-probabilities: vLLM, which serves the model (serve), the job's own "
        "workers (trainer), or the faster of the two (auto).",
    ),
    "reference.model": _option(
        None, "a base model or a policy", "The reference model, if it is not the model that the job starts from."
    ),
    "keep_checkpoints": _option(
        KEPT, "at least 1, or all", "How many of the newest checkpoints stay, besides the best one."
    ),
    "policy": _choice(
        "last",
        get_args(Policy),
        "The checkpoint that becomes the trained model: the last one (last), or the one with the best value of "
        "best_metric (best). best needs validation data.",
    ),
    "evaluations": _option(
        None,
        "an object of at most 8 evaluations",
        "Evaluations of the job's models, by names of your choice. Each is a body of POST /v1/x/evaluations without "
        "model and rows, with the field of: policy (the default) or checkpoints.",
    ),
    "tensorboard": _choice(False, (True, False), "Whether the job writes its metrics for TensorBoard."),
    "mlflow": _option(None, "an object", 'The run in MLflow that receives the metrics, such as {"experiment": "one"}.'),
}


def described() -> list[dict[str, Any]]:
    """Returns the descriptions of all options that a job can have in `x_raydpo`, as the API shows them.

    The id of an option inside another one is a path, such as `adapter.r`.
    """
    config = TrainConfig()
    defaults = asdict(config) | asdict(config.optim)
    trained = {name: defaults[name] for name in sorted(EXTENSIONS & defaults.keys())}
    options = OWN | described_options(trained, TrainConfig, Optim)
    of_adapter = described_options(asdict(Lora()), Lora)
    options |= {f"adapter.{name}": option for name, option in of_adapter.items()}
    return [{"id": name, "object": "option", **option} for name, option in options.items()]
