"""The JSON objects of jobs, events, checkpoints, metrics, methods and plans, as the OpenAPI document describes them.

docs/wire/objects.md says what the fields mean.
"""

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

Status = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]


class ErrorDocument(TypedDict):
    code: str
    message: str
    param: str | None


class Encoding(TypedDict):
    done: int
    total: int


class ProgressDocument(TypedDict):
    stage: str
    done: int
    total: int
    encoding: Encoding | None
    eta_seconds: float | None


class ReferenceDocument(TypedDict):
    source: str
    model: str


class JobEvaluationDocument(TypedDict):
    """An evaluation that a job has asked for, of one of its checkpoints or of its policy."""

    id: str | None
    name: str
    model: str
    status: Literal["waiting", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    waits_for: str | None
    error: ErrorDocument | None


class ExtensionDocument(TypedDict):
    num_workers: int
    adapter: dict[str, Any] | Literal["none"]
    precision: str
    quantization: str | None
    priority: int
    validation_share: float | None
    keep_checkpoints: int | Literal["all"]
    best_metric: str | None
    early_stop: dict[str, Any] | None
    policy: str
    tensorboard: bool
    mlflow: dict[str, Any] | None
    columns: dict[str, str] | None
    invalid_rows: str
    max_invalid_share: float | None
    reference: ReferenceDocument
    evaluations: list[JobEvaluationDocument]
    waits_for: str | None
    progress: ProgressDocument | None
    request: dict[str, Any]


class JobDocument(TypedDict):
    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    error: ErrorDocument | None
    estimated_finish: int | None
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: dict[str, Any]
    integrations: list[dict[str, Any]]
    metadata: dict[str, str] | None
    method: dict[str, Any]
    model: str
    organization_id: str
    result_files: list[str]
    seed: int
    status: Status
    trained_tokens: int | None
    training_file: str
    user_provided_suffix: str | None
    validation_file: str | None
    x_raydpo: ExtensionDocument


class DraftDocument(JobDocument):
    """The JSON object of a job that the service only checked, and did not create. `id` and `created_at` are therefore
    null.
    """

    id: None  # type: ignore[misc]
    created_at: None  # type: ignore[misc]


class EventDocument(TypedDict):
    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class CheckpointDocument(TypedDict):
    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float]


class DeletedJobDocument(TypedDict):
    """The response to a request that deletes a job. `models` are the ids of the job's models that stay."""

    id: str
    object: Literal["fine_tuning.job"]
    deleted: Literal[True]
    models: list[str]


class Column(TypedDict):
    """The statistics of one metric of training. Each list has one value for each bucket (a range of steps)."""

    mean: list[float | None]
    min: list[float | None]
    max: list[float | None]
    last: list[float | None]


class MetricsDocument(TypedDict):
    object: Literal["fine_tuning.job.metrics"]
    job_id: str
    bucket_steps: int
    steps: list[int]
    metrics: dict[str, Column]


class LogDocument(TypedDict):
    object: Literal["job.logs"]
    attempt: int
    attempts: list[int]
    source: str
    sources: list[str]
    data: list[str]
    next: int
    has_more: bool


class OptionDocument(TypedDict):
    default: Any
    range: str
    description: str
    choices: NotRequired[list[Any]]
    default_of_adapters: NotRequired[float]


class ExtensionOptionDocument(OptionDocument):
    """The description of an option that a job can have in the request's field `x_raydpo`."""

    id: str
    object: Literal["option"]


class MethodDocument(TypedDict):
    id: str
    object: Literal["method"]
    description: str
    papers: list[str]
    learns_from: list[str]
    needs_reference: bool
    takes_margins: bool
    hyperparameters: dict[str, OptionDocument]
    common_hyperparameters: dict[str, OptionDocument]


class Change(TypedDict):
    field: str
    value: Any
    message: str


class PlanDocument(TypedDict):
    object: Literal["plan"]
    model: str
    fits: bool | None
    num_workers: int
    device: Literal["gpu", "cpu"]
    worker_bytes: int | None
    needed_bytes: int
    parts: dict[str, int]
    shards: int
    max_tokens_per_pack: int
    activation_checkpointing: str
    rows: dict[str, Any]
    steps: int | None
    tokens: int | None
    checkpoint_bytes: int
    changes: list[Change]
    notes: list[str]
