"""The types that processes exchange: jobs, attempts, events, checkpoints, deployments.

It holds Pydantic models only. Sender and receiver share these classes, so each field is
spelled once. Times are Unix seconds (float, UTC); URIs are `file://`, `s3://` or `gs://`.

Sender and receiver may be of different releases, because a release is rolled out while attempts of the previous one
run. So a reader ignores unknown keys, and turns a report that it cannot read into a message. A new field needs a
default. If older readers must not ignore the field, raise WIRE.
"""

from collections.abc import Callable, Sequence
from datetime import date
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    WrapValidator,
)

from dpo_core.config import Lora, Quantization, TrainConfig, Truncation

WIRE = 2
"""The version of AttemptSpec. A driver refuses a newer version than its own, and says why.

2 adds `Weights`, another reference, an early stop, and the best checkpoint as the policy.
"""

OWN_TOKEN_HEADER = "x-raydpo-own-token"
"""The header that holds the token with which an attempt reports from then on, in a post with the launch's token."""

LONGEST_TEXT = 10_000  # characters of a sentence or name that an attempt reports


class Contract(BaseModel):
    """A value that processes exchange: frozen, and unknown keys are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class UserInput(Contract):
    """A value that users write, too: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _tolerant(kind: Any) -> BeforeValidator:
    """Returns a validator that ignores unknown keys at every depth, even in types that refuse them from users."""
    return BeforeValidator(lambda value: _adapter(kind).validate_python(value, extra="ignore"))


def storable(text: str) -> str:
    """Returns the text as a database can store it: U+FFFD for NUL, `?` for half a character, cut to LONGEST_TEXT."""
    clean = text.encode(errors="replace").decode().replace("\0", "\ufffd")
    return clean if len(clean) <= LONGEST_TEXT else f"{clean[: LONGEST_TEXT - 1]}…"


Text = Annotated[str, BeforeValidator(lambda value: storable(value) if isinstance(value, str) else value)]
Step = Annotated[int, Field(ge=0, lt=2**31)]


# --- a model that Ray Serve runs ---------------------------------------------------------


class Deployment(Contract):
    """One Serve application: the argument of `services.serving.app:build`."""

    app_name: str  # letters, digits and dashes: the application and its route `/<app_name>`
    model_id: str  # what clients call it: `tiny`, `ft:tiny:org::` and digits
    source: str  # storage URI, local folder, or hub id
    dtype: Literal["float32", "bfloat16", "auto"]
    max_model_len: int | None = None  # None: the model's own limit
    num_gpus: float = 0  # 0: vLLM's CPU build


Spans = Sequence[tuple[int, int]]
"""Ranges [start, stop) of a completion's tokens that the model did not write, such as a tool's results."""


class Score(NamedTuple):
    """The reference's log-probability of one completion. A tuple, because one call returns thousands."""

    logp: float  # sum over the completion's tokens, in nats
    num_tokens: int


# --- where a job's metrics go ------------------------------------------------------------

Line = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")]


class Wandb(UserInput):
    """A run in Weights & Biases. Its host and key are settings of the cluster."""

    project: Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^/\\#?%:\x00-\x1f\x7f]+$")]
    name: Line | None = None  # None: the job's id
    entity: Annotated[str, StringConstraints(max_length=128, pattern=r"^[A-Za-z0-9_-]+$")] | None = None
    tags: Annotated[tuple[Annotated[Line, StringConstraints(max_length=64)], ...], Field(max_length=64)] | None = None


class WandbIntegration(UserInput):
    """The entry for Weights & Biases in OpenAI's list of integrations."""

    type: Literal["wandb"]
    wandb: Wandb


class Mlflow(UserInput):
    """A run in MLflow. Its tracking server is a setting of the cluster."""

    experiment: Line
    run_name: Line | None = None  # None: the job's id


class Integrations(Contract):
    """The services that receive a job's metrics, besides its own events."""

    wandb: Annotated[tuple[WandbIntegration, ...], Field(max_length=5)] = ()
    mlflow: Mlflow | None = None
    tensorboard: bool = False


# --- a job, as the driver sees it --------------------------------------------------------

ReferenceSource = Literal["auto", "serve", "trainer"]
"""What scores the reference: its deployment, the trainer's own forward, or (auto) whichever of the two ends sooner."""


MIN_EXAMPLES = 10  # rows that a training file must have


class InvalidRows(UserInput):
    """What happens if rows cannot be used: the file is refused, or up to `max_share` of its rows are left out."""

    how: Literal["refuse", "drop"] = "refuse"
    max_share: float = Field(default=0.01, gt=0, le=0.5)  # of the rows; beyond it the file is refused


ReadConfig = Annotated[TrainConfig, _tolerant(TrainConfig)]
ReadInvalidRows = Annotated[InvalidRows, _tolerant(InvalidRows)]
ReadIntegrations = Annotated[Integrations, _tolerant(Integrations)]


class Reading(Contract):
    """Settings for reading the rows of a file."""

    invalid_rows: ReadInvalidRows = InvalidRows()
    columns: dict[str, str] = Field(default_factory=dict)  # role, such as prompt → name of the file's column


Precision = Literal["float32", "bfloat16"]


class Weights(Contract):
    """Which weights a job trains, and what it computes in."""

    adapter: Annotated[Lora, _tolerant(Lora)] | None = None  # None: all weights
    precision: Precision = "float32"  # what is trained has float32 masters in both
    quantization: Quantization | None = None  # of the frozen base of an adapter


Policy = Literal["last", "best"]
"""Which checkpoint becomes the policy of a job: the last one, or the best by the metric of its evaluations."""


class JobSpec(Contract):
    """A user's checked request for a job. It is stored with the job and never changes."""

    model: str  # a base model's name or an `ft:` id
    training_file: str  # an uploaded file's id, or the URI of x_raydpo.dataset
    validation_file: str | None = None
    validation_share: float = Field(default=0.0, ge=0, le=0.5)  # of the training file's groups, held out
    invalid_rows: ReadInvalidRows = InvalidRows()
    columns: dict[str, str] = Field(default_factory=dict)  # role, such as prompt → name of the training file's column
    suffix: str | None = None
    metadata: dict[str, str] | None = None
    config: ReadConfig
    weights: Weights = Weights()
    keep_checkpoints: Annotated[int, Field(ge=1)] | Literal["all"] = "all"  # so many of the last, and the best
    policy: Policy = "last"
    num_workers: int = Field(default=1, ge=1, le=1024)
    reference_source: ReferenceSource = "auto"
    reference_model: str | None = None  # a base model's name or an `ft:` id; None: the model that the job starts from
    integrations: ReadIntegrations = Integrations()
    priority: int = Field(default=0, ge=-10, le=10)  # higher starts first

    @property
    def validates(self) -> bool:
        """Whether its checkpoints are evaluated on held-out rows."""
        return bool(self.validation_file or self.validation_share)

    @property
    def is_at_uri(self) -> bool:
        """Whether the training file is at the user's own URI and was not uploaded."""
        return "://" in self.training_file


class AttemptAddress(Contract):
    """Where an attempt reports. A driver of any release can read this part of its spec."""

    # Not written while it is 1: the first release does not know this field and refuses unknown ones.
    wire: int = Field(default=1, exclude_if=lambda wire: wire == 1)
    attempt: int  # rises from 1; a later attempt fences the earlier ones
    run_uri: str  # spool/, prepared/, checkpoints/, shared by all attempts of the job
    events_url: str  # POST batches of events here with the attempt's token
    traceparent: str | None = None  # of the attempt's span; None: the job is not traced


class AttemptSpec(AttemptAddress):
    """Everything a driver needs for one attempt. The driver reads it from `run_uri/attempts/<attempt>.json`."""

    job_id: str
    config: ReadConfig
    num_workers: int
    num_gpus_per_worker: float = 0
    training_uri: str  # the uploaded file, or the user's own URI
    today: date | None = None  # the day on which the job was created, for chat templates that write the date
    dataset_uris: tuple[str, ...] | None = None  # prefixes that admit the user's URI; None: the file was uploaded
    validation_uri: str | None = None  # an uploaded file
    validation_reading: Reading = Reading()
    validation_share: float = Field(default=0.0, ge=0, le=0.5)  # of the training file's groups, held out
    invalid_rows: ReadInvalidRows = InvalidRows()
    columns: dict[str, str] = Field(default_factory=dict)  # role, such as prompt → name of the training file's column
    model_source: str  # storage URI, local folder or hub id of the model, or the adapter, that the job starts from
    weights: Weights = Weights()
    policy: Policy = "last"
    reference_model_source: str | None = None  # the same for the reference; None: the start is the reference
    reference: str | None = None  # app_name of the deployment that may score; None: there is none
    reference_source: ReferenceSource = "auto"
    reference_dtype: str = "float32"  # in which the deployment computes
    cache_uri: str  # prepared data, shared by the jobs of a project; may be deleted at any time
    integrations: ReadIntegrations = Integrations()
    fine_tuned_model: str | None = None  # the name that the policy will have

    @property
    def reference_model(self) -> str:
        """Where the reference's weights are."""
        return self.reference_model_source or self.model_source


class Recipe(Contract):
    """How a training file is encoded as token ids."""

    training_uri: str
    model_source: str
    max_length: int  # tokens of a prompt and one completion
    truncation: Truncation
    validation_share: float = 0.0
    invalid_rows: ReadInvalidRows = InvalidRows()
    columns: dict[str, str] = Field(default_factory=dict)  # role, such as prompt → name of the training file's column
    today: date | None = None  # for chat templates that write the date; None: the current date
    other_prompts: bool = False  # whether each group gets an answer to another prompt, which some objectives need


class CheckRequest(Contract):
    """Everything `services.training.check_program` needs. It writes a CheckResult to `folder_uri/report.json`."""

    recipe: Recipe
    folder_uri: str


# --- what an attempt reports -------------------------------------------------------------


class Message(Contract):
    """A sentence for the user."""

    kind: Literal["message"] = "message"
    level: Literal["info", "warn", "error"] = "info"
    message: Text


Stage = Literal["downloading", "encoding", "loading reference", "scoring", "training", "exporting"]


class Progress(Contract):
    """A stage's progress. Downloading counts bytes, encoding and scoring count rows, loading counts nothing."""

    kind: Literal["progress"] = "progress"
    stage: str  # a Stage; another release may have others
    done: int
    total: int  # 0: unknown


class ReferenceWanted(Contract):
    """The attempt needs the deployment of its reference from now on, and waits until it is loaded."""

    kind: Literal["reference wanted"] = "reference wanted"


class ReferenceReleased(Contract):
    """The attempt no longer needs the deployment of its reference."""

    kind: Literal["reference released"] = "reference released"


class Started(Contract):
    """Data is ready and training begins. `config` is resolved."""

    kind: Literal["started"] = "started"
    config: ReadConfig
    num_groups: int
    total_steps: Step
    resumed_from: Step = 0  # the checkpoint's step; 0 for a fresh start


class StepMetrics(Contract):
    """One optimizer step, with metric keys as TRL logs them."""

    kind: Literal["metrics"] = "metrics"
    step: Step  # from 1
    total_steps: Step
    metrics: dict[str, float]


class CheckpointSaved(Contract):
    """A complete checkpoint is at `uri`; `uri/model` is a Hugging Face folder."""

    kind: Literal["checkpoint"] = "checkpoint"
    step: Step
    uri: str
    metrics: dict[str, float]


class Succeeded(Contract):
    """The last event of an attempt that finished. The trained policy is at `model_uri`."""

    kind: Literal["succeeded"] = "succeeded"
    model_uri: str
    trained_tokens: Annotated[int, Field(ge=0, lt=2**63)]


class Failed(Contract):
    """The last event of an attempt that failed for a reason that another attempt cannot fix."""

    kind: Literal["failed"] = "failed"
    code: Text
    message: Text
    param: Text | None = None


class Paused(Contract):
    """The last event of an attempt that was asked to stop. The next attempt resumes from its last checkpoint."""

    kind: Literal["paused"] = "paused"
    step: Step  # the last step that it took; 0: none


class Died(Contract):
    """The last event of an attempt that could not go on. Another attempt may resume from the last checkpoint."""

    kind: Literal["died"] = "died"
    cause: Text  # for the user: lower case, without a full stop


class Alive(Contract):
    """A heartbeat in the spool, from an attempt whose posts do not reach the control plane."""

    kind: Literal["alive"] = "alive"


class CheckResult(Contract):
    """The result of a check, written beside its request. Either `report` or `error` is set."""

    finished_at: float
    report: dict[str, Any] | None = None  # a `check_program.Check`: tokens and preview
    error: Failed | None = None


def _or_message(value: Any, read: Callable[[Any], Any]) -> Any:
    """Turns a report that this release cannot read into a message, so that later reports are still read."""
    try:
        return read(value)
    except ValidationError as error:
        if not (isinstance(value, dict) and isinstance(kind := value.get("kind"), str)):
            raise
        why = first_error(error)
        return Message(level="warn", message=f"This release cannot read a report '{kind:.80}' of the attempt: {why}")


def first_error(error: ValidationError) -> str:
    """Describes the first error in one line: the path of the field and the reason."""
    first = error.errors(include_input=False, include_url=False)[0]
    return ": ".join([*([where] if (where := ".".join(map(str, first["loc"]))) else []), first["msg"]])


Report = Annotated[
    Message
    | Progress
    | ReferenceWanted
    | ReferenceReleased
    | Started
    | StepMetrics
    | CheckpointSaved
    | Succeeded
    | Failed
    | Paused
    | Died
    | Alive,
    Field(discriminator="kind"),
    WrapValidator(_or_message),
]


class JobEvent(Contract):
    """A report with its number. (job, attempt, seq) is unique, so an event may be delivered twice."""

    seq: Annotated[int, Field(ge=0, lt=2**62)]  # from 0, without gaps, per attempt
    created_at: float
    report: Report


class EventBatch(Contract):
    """One segment of the spool, or the body of a post to `events_url`. A post without events is a heartbeat."""

    events: list[JobEvent]


Desired = Literal["run", "pause", "cancel"]


def _or_run(value: Any, read: Callable[[Any], Any]) -> Any:
    """Reads a wish; one that this release does not know counts as "run"."""
    try:
        return read(value)
    except ValidationError:
        return "run"


class Wish(Contract):
    """The answer to a post of events: what the user wants the job to do now."""

    desired: Annotated[Desired, WrapValidator(_or_run)]
