"""Every type that crosses a process: jobs, attempts, events, checkpoints, deployments.

Pydantic models and nothing else. Both ends of every wire read these, so a field is
spelled once. Times are Unix seconds (float, UTC); URIs are `file://`, `s3://` or `gs://`.

The two ends may be of two releases: a release is rolled out while attempts of the last one run. So a reader ignores
keys that it does not know, and a report that it cannot read becomes a message. A field that is added has a default.
Where to ignore it would be wrong, WIRE is raised.
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

from dpo_core.config import Lora, TrainConfig, Truncation

WIRE = 2
"""The version of what an attempt is told. An older driver refuses a newer one in words.

2 adds `Weights`, another reference, an early stop, and the best checkpoint as the policy.
"""

OWN_TOKEN_HEADER = "x-raydpo-own-token"
"""In a post with the token of a launch: what the attempt reports with from there on."""

LONGEST_TEXT = 10_000  # characters of a sentence or name that an attempt reports


class Contract(BaseModel):
    """A value that crosses a process: frozen, and unknown keys are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Asked(Contract):
    """A value that a user writes, too: unknown keys are refused there."""

    model_config = ConfigDict(extra="forbid")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _tolerant(kind: Any) -> BeforeValidator:
    """Ignores unknown keys in all depths, also of what refuses them where a user writes it."""
    return BeforeValidator(lambda value: _adapter(kind).validate_python(value, extra="ignore"))


def storable(text: str) -> str:
    """The text as a database keeps it: U+FFFD for NUL, `?` for half a character, and no end where it is very long."""
    kept = text.encode(errors="replace").decode().replace("\0", "\ufffd")
    return kept if len(kept) <= LONGEST_TEXT else f"{kept[: LONGEST_TEXT - 1]}…"


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
"""[start, stop) of a completion's tokens that others wrote."""


class Score(NamedTuple):
    """What the reference says of one completion. A tuple: thousands of them cross in one call."""

    logp: float  # sum over the completion's tokens, in nats
    num_tokens: int


# --- where else a job is followed --------------------------------------------------------

Line = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")]


class Wandb(Asked):
    """A run in Weights & Biases. Host and key are the cluster's own."""

    project: Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^/\\#?%:\x00-\x1f\x7f]+$")]
    name: Line | None = None  # None: the job's id
    entity: Annotated[str, StringConstraints(max_length=128, pattern=r"^[A-Za-z0-9_-]+$")] | None = None
    tags: Annotated[tuple[Annotated[Line, StringConstraints(max_length=64)], ...], Field(max_length=64)] | None = None


class WandbIntegration(Asked):
    """As OpenAI spells it."""

    type: Literal["wandb"]
    wandb: Wandb


class Mlflow(Asked):
    """A run in MLflow. Its tracking server is the cluster's own."""

    experiment: Line
    run_name: Line | None = None  # None: the job's id


class Integrations(Contract):
    """Where a job's metrics are told beside its events."""

    wandb: Annotated[tuple[WandbIntegration, ...], Field(max_length=5)] = ()
    mlflow: Mlflow | None = None
    tensorboard: bool = False


# --- a job, as the driver sees it --------------------------------------------------------

ReferenceSource = Literal["auto", "serve", "trainer"]
"""Who scores the reference: its deployment, the trainer's own forward, or (auto) whichever of the two ends sooner."""


MIN_EXAMPLES = 10  # rows of a training file


class InvalidRows(Asked):
    """What becomes of rows that cannot be used: they refuse the file, or up to a share of it they are left out."""

    how: Literal["refuse", "drop"] = "refuse"
    max_share: float = Field(default=0.01, gt=0, le=0.5)  # of the rows; beyond it the file is refused


ReadConfig = Annotated[TrainConfig, _tolerant(TrainConfig)]
ReadInvalidRows = Annotated[InvalidRows, _tolerant(InvalidRows)]
ReadIntegrations = Annotated[Integrations, _tolerant(Integrations)]


class Reading(Contract):
    """How the rows of a file are read."""

    invalid_rows: ReadInvalidRows = InvalidRows()
    columns: dict[str, str] = Field(default_factory=dict)  # the file's column of a role, such as prompt


Precision = Literal["float32", "bfloat16"]


class Weights(Contract):
    """Which weights a job trains, and what it computes in."""

    adapter: Annotated[Lora, _tolerant(Lora)] | None = None  # None: all weights
    precision: Precision = "float32"  # what is trained has float32 masters in both


Policy = Literal["last", "best"]
"""Which checkpoint becomes the policy of a job: the last one, or the best by the metric of its evaluations."""


class JobSpec(Contract):
    """What a user asked for, checked. Stored with the job; never changes."""

    model: str  # a base model's name or an `ft:` id
    training_file: str  # an uploaded file's id, or the URI of x_raydpo.dataset
    validation_file: str | None = None
    validation_share: float = Field(default=0.0, ge=0, le=0.5)  # of the training file's groups, held out
    invalid_rows: ReadInvalidRows = InvalidRows()
    columns: dict[str, str] = Field(default_factory=dict)  # the training file's column of a role, such as prompt
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
        """Whether the training file is the user's own, and was not uploaded."""
        return "://" in self.training_file


class AttemptAddress(Contract):
    """Where an attempt reports. A driver of any release reads this much of its spec."""

    # Not written while it is 1: the first release wrote none, and refuses what it does not know.
    wire: int = Field(default=1, exclude_if=lambda wire: wire == 1)
    attempt: int  # rises from 1; a later attempt fences the earlier ones
    run_uri: str  # spool/, prepared/, checkpoints/, shared by all attempts of the job
    events_url: str  # POST batches of events here with the attempt's token
    traceparent: str | None = None  # of the attempt's span, where its job is traced


class AttemptSpec(AttemptAddress):
    """All that a driver needs for one attempt. Written to `run_uri/attempts/<attempt>.json` before launching."""

    job_id: str
    config: ReadConfig
    num_workers: int
    num_gpus_per_worker: float = 0
    training_uri: str  # the uploaded file, or what the user named
    today: date | None = None  # the day on which the job was created, for chat templates that write the date
    dataset_uris: tuple[str, ...] | None = None  # prefixes that a URI of the user's must keep to; None: it is an upload
    validation_uri: str | None = None  # an uploaded file
    validation_reading: Reading = Reading()
    validation_share: float = Field(default=0.0, ge=0, le=0.5)  # of the training file's groups, held out
    invalid_rows: ReadInvalidRows = InvalidRows()
    columns: dict[str, str] = Field(default_factory=dict)  # the training file's column of a role, such as prompt
    model_source: str  # where the start is: storage URI, local folder or hub id; of a model, or of an adapter
    weights: Weights = Weights()
    policy: Policy = "last"
    reference_model_source: str | None = None  # in the same way; None: the start is the reference
    reference: str | None = None  # app_name of the deployment that scores, or may; None: none does
    reference_source: ReferenceSource = "auto"
    reference_dtype: str = "float32"  # that its deployment computes in
    cache_uri: str  # prepared data, shared by the jobs of a project; may be deleted at any time
    integrations: ReadIntegrations = Integrations()
    fine_tuned_model: str | None = None  # the name that the policy will have

    @property
    def reference_model(self) -> str:
        """Where the reference's weights are."""
        return self.reference_model_source or self.model_source


class Recipe(Contract):
    """How a training file becomes ids."""

    training_uri: str
    model_source: str
    max_length: int  # tokens of a prompt and one completion
    truncation: Truncation
    validation_share: float = 0.0
    invalid_rows: ReadInvalidRows = InvalidRows()
    columns: dict[str, str] = Field(default_factory=dict)  # the training file's column of a role, such as prompt
    today: date | None = None  # that a chat template writes which writes the date; None: that of the day
    other_prompts: bool = False  # whether each group also has an answer to another prompt, for objectives that need it


class CheckRequest(Contract):
    """All that `services.training.check_program` needs. It writes a CheckResult to `folder_uri/report.json`."""

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
    """How far a stage is: downloading counts bytes, encoding and scoring rows, loading nothing. Total 0: not known."""

    kind: Literal["progress"] = "progress"
    stage: str  # a Stage; another release may have others
    done: int
    total: int


class ReferenceWanted(Contract):
    """The attempt needs the deployment of its reference from now on, and waits until it is loaded."""

    kind: Literal["reference wanted"] = "reference wanted"


class ReferenceReleased(Contract):
    """The attempt needs the deployment of its reference no more."""

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
    """A complete checkpoint stands at `uri`; `uri/model` is a Hugging Face folder."""

    kind: Literal["checkpoint"] = "checkpoint"
    step: Step
    uri: str
    metrics: dict[str, float]


class Succeeded(Contract):
    """The last event of an attempt that finished: the trained policy stands at `model_uri`."""

    kind: Literal["succeeded"] = "succeeded"
    model_uri: str
    trained_tokens: Annotated[int, Field(ge=0, lt=2**63)]


class Failed(Contract):
    """The last event of an attempt that cannot be mended by another attempt."""

    kind: Literal["failed"] = "failed"
    code: Text
    message: Text
    param: Text | None = None


class Paused(Contract):
    """The last event of an attempt that was asked to stop: another goes on from its last checkpoint."""

    kind: Literal["paused"] = "paused"
    step: Step  # the last that it took; 0: it took none


class Died(Contract):
    """The last event of an attempt that could not go on. Another may, from the last checkpoint."""

    kind: Literal["died"] = "died"
    cause: Text  # for the user: lower case, without a full stop


class Alive(Contract):
    """Nothing new, from an attempt whose posts do not arrive: the heartbeat that its spool keeps."""

    kind: Literal["alive"] = "alive"


class CheckResult(Contract):
    """What a check leaves beside its request. One of `report` and `error` is there."""

    finished_at: float
    report: dict[str, Any] | None = None  # its tokens and its preview
    error: Failed | None = None


def _or_message(value: Any, read: Callable[[Any], Any]) -> Any:
    """A report that this release cannot read becomes a sentence, so that those behind it are read."""
    try:
        return read(value)
    except ValidationError as error:
        if not (isinstance(value, dict) and isinstance(kind := value.get("kind"), str)):
            raise
        why = first_error(error)
        return Message(level="warn", message=f"A report '{kind:.80}' of the attempt cannot be read here: {why}")


def first_error(error: ValidationError) -> str:
    """In one line: where the value is not what it should be, and why."""
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
    """A report with its place: (job, attempt, seq) is unique, so delivery may repeat."""

    seq: Annotated[int, Field(ge=0, lt=2**62)]  # from 0, without gaps, per attempt
    created_at: float
    report: Report


class EventBatch(Contract):
    """One segment of the spool, and the body of a post to `events_url`. Without events, that is a heartbeat."""

    events: list[JobEvent]


Desired = Literal["run", "pause", "cancel"]


def _or_run(value: Any, read: Callable[[Any], Any]) -> Any:
    """A wish of another release that this one does not know changes nothing."""
    try:
        return read(value)
    except ValidationError:
        return "run"


class Wish(Contract):
    """The answer to a post of events: what the user wants of the job now."""

    desired: Annotated[Desired, WrapValidator(_or_run)]
