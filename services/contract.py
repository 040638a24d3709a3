"""Defines the Pydantic models that the service's processes exchange: jobs, attempts, reports, checkpoints, deployments.

A group is a prompt with its completions. An attempt is one run of a job on Ray. Its driver is the program that Ray
starts; the driver sends reports, such as metrics, to the control plane. Sender and receiver share these classes, so
each field is defined once. Times are Unix seconds (float, UTC); URIs are `file://`, `s3://` or `gs://`.

Sender and receiver may be of different releases, because attempts of the previous release still run while an operator
installs the next one. A receiver therefore ignores unknown keys, and replaces a report of an unknown type by a message
to the user. A new field needs a default. If older receivers must not ignore the new field, increase the version number
WIRE.
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
from services.deployment_settings import Dtype, EngineSettings

WIRE = 3
"""The version of the class AttemptSpec. A driver (a job's main program) refuses settings of a newer version than its
own, and reports the reason.

Version 2 added `Weights`, a choice of the reference model, early stops, and the best checkpoint as the policy. Version
3 added references that are adapters on the engine of their base.
"""

OWN_TOKEN_HEADER = "x-raydpo-own-token"
"""The HTTP header in which an attempt (one run of a job) offers the control plane a new token.

The first posts of the attempt use the token of its launch, which others can see. Once the control plane has the new
token, the attempt uses only this one.
"""

LONGEST_TEXT = 10_000  # most characters of a sentence or name in a report


class Contract(BaseModel):
    """Base class of the data models (Pydantic) that processes exchange. Instances are frozen, and parsing ignores
    unknown keys."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class UserInput(Contract):
    """Base class of the data models (Pydantic) that describe what users write in requests. Parsing refuses unknown
    keys."""

    model_config = ConfigDict(extra="forbid")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _tolerant(kind: Any) -> BeforeValidator:
    """Returns a validator that parses values of the type `kind` and ignores unknown keys at every depth. This also
    holds for types that refuse unknown keys when they occur in users' requests."""
    return BeforeValidator(lambda value: _adapter(kind).validate_python(value, extra="ignore"))


def storable(text: str) -> str:
    """Returns the text in a form that PostgreSQL can store.

    NUL becomes U+FFFD, and an unpaired surrogate becomes `?`. A text of more than LONGEST_TEXT characters is shortened
    to this length and ends with `…`.
    """
    clean = text.encode(errors="replace").decode().replace("\0", "\ufffd")
    return clean if len(clean) <= LONGEST_TEXT else f"{clean[: LONGEST_TEXT - 1]}…"


Text = Annotated[str, BeforeValidator(lambda value: storable(value) if isinstance(value, str) else value)]
Step = Annotated[int, Field(ge=0, lt=2**31)]


# --- a model that Ray Serve runs ---------------------------------------------------------


Purpose = Literal["answers", "scores", "both"]
"""What the engine of a deployment does: it answers users' requests, computes the log-probabilities of a reference model
(`scores`), or does both."""


class Deployment(Contract):
    """Describes a model that is to run as one Ray Serve application: where the model's weights are, and how to serve
    them. The function `services.serving.app:build` makes the application from these fields."""

    app_name: str  # names the application and its route `/<app_name>`; letters, digits and dashes
    model_id: str  # the `model` of clients' requests, such as `tiny`, or `ft:tiny:org::` and digits
    source: str  # storage URI, local folder or hub id of the weights
    dtype: Dtype
    max_model_len: int | None = None  # None: the model's own limit
    num_gpus: float = 0  # of each replica; 0: the model runs on CPUs, with vLLM's CPU build
    engine: Annotated[EngineSettings, _tolerant(EngineSettings)] = EngineSettings()
    purpose: Purpose = "both"
    num_outputs: int = 0  # outputs of a reward model's head; 0: the model is no reward model

    @property
    def most_gpus(self) -> float:
        """Returns the number of GPUs that all replicas need together, at the maximum number of replicas."""
        return self.num_gpus * self.engine.replicas.max


class Adapter(Contract):
    """Names a LoRA adapter by its public id, and says where its files are. The vLLM engine of its base model attaches
    the adapter when a request first needs it."""

    id: str  # the public id of the model, which no other model ever has
    source: str  # storage URI or local folder in PEFT's format


class CannotAttach(Exception):
    """Raised if training asks a model's deployment to compute with a LoRA adapter that the deployment can never
    attach."""


ADAPTER_HEADER = "x-raydpo-adapter"
ADAPTER_SOURCE_HEADER = "x-raydpo-adapter-source"
"""The HTTP headers by which the control plane names an adapter to the engine of its base model: the adapter's id, and
the source of its files. The values are percent-encoded."""

LOAD_ROUTE = "/load"
"""The HTTP path, below the route of a model's application, at which a replica tells its load, such as the number of
its requests."""


Spans = Sequence[tuple[int, int]]
"""Ranges [start, stop) of a completion's tokens that the model did not write, such as a tool's results."""


class Score(NamedTuple):
    """Holds the log-probability of one completion under the reference model (`logp`), and the number of tokens that it
    covers (`num_tokens`).

    The class is a tuple, because one call returns thousands of scores.
    """

    logp: float  # sum over the completion's tokens, in nats
    num_tokens: int


class TextGroup(Contract):
    """Holds a prompt and its completions, which a model is to score. The sender has checked their content.

    The prompt and the completions are either all texts, or all lists of chat messages. `tools` and `template_arguments`
    are for the chat template.
    """

    prompt: Any
    completions: tuple[Any, ...]
    tools: list[dict[str, Any]] | None = None
    template_arguments: dict[str, Any] | None = None


class TextsToScore(Contract):
    """The body of a POST request to the path SCORE_TEXTS, which asks a model to encode and score texts.

    `groups` are the prompts and completions, as texts or messages. `today` is the date for chat templates that write a
    date.
    """

    groups: list[TextGroup]
    today: date | None = None  # for chat templates that write the date; None: the current date


class TokenGroup(Contract):
    """Holds the token ids of a prompt and of its completions. The tokenizer of the policy (the trained model) made the
    ids.
    """

    prompt_ids: list[int]
    completion_ids: tuple[list[int], ...]
    others: tuple[tuple[tuple[int, int], ...], ...] | None = None  # the Spans of each completion; None: all are empty


class TokensToScore(Contract):
    """The body of a POST request to the path SCORE_TOKENS: token ids that the model is to score, and a digest of the
    vocabulary that the ids belong to. A model with another vocabulary refuses the request."""

    groups: list[TokenGroup]
    vocabulary: str  # digest of the vocabulary that the ids belong to


class Scored(Contract):
    """The response to a request to score completions (TextsToScore or TokensToScore).

    `groups` has the token ids of the prompts and completions. `outputs` has, for each completion, its log-probability
    or a reward model's outputs. `num_tokens` has, for each completion, the number of its tokens that count as written
    by the assistant, without messages of tools and users.
    """

    groups: list[TokenGroup]
    vocabulary: str
    outputs: list[list[list[float]]]  # by group and completion: the log-probability, or a reward model's outputs
    num_tokens: list[list[int]]  # by group and completion: the tokens that the model wrote
    usage: dict[str, int] = Field(default_factory=dict)  # prompt_tokens: all that the model read, as vLLM tells it


SCORE_TEXTS, SCORE_TOKENS = "score/texts", "score/tokens"
"""The HTTP paths, below `/v1/` of a model's application, at which the control plane asks the model to score
completions."""


# --- where a job's metrics go ------------------------------------------------------------

Line = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")]


class Wandb(UserInput):
    """Names the run in Weights & Biases that receives a job's metrics: its project, name, entity (a user or a team) and
    tags. The cluster's settings hold the host and key of W&B."""

    project: Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^/\\#?%:\x00-\x1f\x7f]+$")]
    name: Line | None = None  # None: the job's id
    entity: Annotated[str, StringConstraints(max_length=128, pattern=r"^[A-Za-z0-9_-]+$")] | None = None
    tags: Annotated[tuple[Annotated[Line, StringConstraints(max_length=64)], ...], Field(max_length=64)] | None = None


class WandbIntegration(UserInput):
    """An entry for Weights & Biases in the list `integrations` of a request for a fine-tuning job, in OpenAI's
    format."""

    type: Literal["wandb"]
    wandb: Wandb


class Mlflow(UserInput):
    """Names the run in MLflow that receives a job's metrics: its experiment and its name. The tracking server is a
    setting of the cluster."""

    experiment: Line
    run_name: Line | None = None  # None: the job's id


class Integrations(Contract):
    """Names the runs in W&B and MLflow that receive a job's metrics, and says whether metrics are written for
    TensorBoard. The job's own events have the metrics in any case.
    """

    wandb: Annotated[tuple[WandbIntegration, ...], Field(max_length=5)] = ()
    mlflow: Mlflow | None = None
    tensorboard: bool = False


# --- a job, as the driver sees it --------------------------------------------------------

ReferenceSource = Literal["auto", "serve", "trainer"]
"""What computes the log-probabilities of the reference model: its deployment in vLLM (serve), the trainer's own forward
pass (trainer), or the faster of the two (auto)."""


USED = "used"  # file in a folder of prepared data; it is written anew whenever a job begins to use the data
MIN_EXAMPLES = 10  # least number of rows in a training file


class InvalidRows(UserInput):
    """Says what happens to rows of a data file that cannot be used.

    With `refuse`, one such row is enough to refuse the file. With `drop`, such rows are left out, but the file is
    refused if they are more than the share `max_share` of all rows.
    """

    how: Literal["refuse", "drop"] = "refuse"
    max_share: float = Field(default=0.01, gt=0, le=0.5)  # largest share of rows that may be left out


ReadConfig = Annotated[TrainConfig, _tolerant(TrainConfig)]
ReadInvalidRows = Annotated[InvalidRows, _tolerant(InvalidRows)]
ReadIntegrations = Annotated[Integrations, _tolerant(Integrations)]


class Reading(Contract):
    """Holds the settings for reading the rows of a data file: `columns` maps standard names of columns, such as prompt,
    to the names in the file. `invalid_rows` says what happens to rows that cannot be used."""

    invalid_rows: ReadInvalidRows = InvalidRows()
    columns: dict[str, str] = Field(default_factory=dict)  # role, such as prompt → name of the file's column


Precision = Literal["float32", "bfloat16"]


class Weights(Contract):
    """Says which weights a job trains: all weights of the model, or a LoRA adapter with the options `adapter`. Also
    says in which number type it trains (`precision`), and whether the base model under the adapter is quantized."""

    adapter: Annotated[Lora, _tolerant(Lora)] | None = None  # None: all weights
    precision: Precision = "float32"  # with both values, trained weights have float32 masters
    quantization: Quantization | None = None  # of the frozen base model of an adapter
    on_experts: bool = False  # whether the adapter is on the experts of a mixture of experts


Policy = Literal["last", "best"]
"""The checkpoint that becomes a job's policy: the last one, or the one with the best value of `best_metric`."""


class JobSpec(Contract):
    """Holds a user's request for a job, after all checks: the model to start from, the data, all options of training,
    and what happens to the results. The request is stored with the job and never changes.
    """

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
    keep_checkpoints: Annotated[int, Field(ge=1)] | Literal["all"] = "all"  # newest checkpoints, besides the best
    policy: Policy = "last"
    num_workers: int = Field(default=1, ge=1, le=1024)
    reference_source: ReferenceSource = "auto"
    reference_model: str | None = None  # a base model's name or an `ft:` id; None: the model that the job starts from
    integrations: ReadIntegrations = Integrations()
    priority: int = Field(default=0, ge=-10, le=10)  # jobs of a higher priority start first
    evaluations: dict[str, dict[str, Any]] = Field(default_factory=dict)  # of the job's models, by names that it chose

    @property
    def validates(self) -> bool:
        """Whether the job evaluates its checkpoints on held-out rows."""
        return bool(self.validation_file or self.validation_share)

    @property
    def may_be_served(self) -> bool:
        """Whether vLLM may compute the reference model's log-probabilities of the job's rows.

        The result is False if the objective needs no reference model, or if the user chose that the trainer computes
        the log-probabilities. The result is also False if the base model is quantized to NF4, which this service's vLLM
        engines cannot serve.
        """
        by_trainer = self.reference_source == "trainer" or self.weights.quantization is not None
        return self.config.objective.traits.needs_reference and not by_trainer

    @property
    def is_at_uri(self) -> bool:
        """Whether `training_file` is the user's own URI, and not the id of an uploaded file."""
        return "://" in self.training_file


class AttemptAddress(Contract):
    """Says where an attempt (one run of a job on Ray) sends its reports: to the HTTP address `events_url`, and to files
    in the folder `run_uri`.

    These are the first fields of `AttemptSpec`. The attempt's driver (the program that Ray starts) can read them even
    if the driver and the control plane are of different releases.
    """

    # The value 1 is not written: the first release does not know this field and refuses unknown fields.
    wire: int = Field(default=1, exclude_if=lambda wire: wire == 1)
    attempt: int  # from 1; once a later attempt exists, reports of earlier ones are refused
    run_uri: str  # the folder of spool/, prepared/ and checkpoints/, shared by all attempts of the job
    events_url: str  # the driver posts batches of events here, with the attempt's token
    traceparent: str | None = None  # traceparent of the attempt's span; None: the job is not traced


class AttemptSpec(AttemptAddress):
    """Holds all settings of one attempt (one run of a job on Ray): where its data and models are, the options of
    training, the number of workers, and where it stores and reports its results.

    The attempt's driver, its main program, reads them from `<run_uri>/attempts/<attempt>.json`.
    """

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
    reference_model_source: str | None = None  # location of the reference; None: the model of model_source
    reference: str | None = None  # app_name of the reference's deployment; None: it has none
    reference_adapter: Adapter | None = None  # the adapter with which that deployment scores; None: without one
    reference_source: ReferenceSource = "auto"
    reference_dtype: str = "float32"  # in which the reference's deployment computes
    cache_uri: str  # folder of prepared data, shared by a project's jobs; may be deleted at any time
    integrations: ReadIntegrations = Integrations()
    fine_tuned_model: str | None = None  # the name that the trained model will have

    @property
    def reference_model(self) -> str:
        """The source of the reference model's weights: a storage URI, a local folder or a hub id."""
        return self.reference_model_source or self.model_source


class Recipe(Contract):
    """Holds everything that determines how a training file becomes token ids: the file (`training_uri`), the model
    whose tokenizer encodes it (`model_source`), and options such as `max_length`."""

    training_uri: str
    model_source: str
    max_length: int  # most tokens of a prompt and one completion
    truncation: Truncation
    validation_share: float = 0.0
    invalid_rows: ReadInvalidRows = InvalidRows()
    columns: dict[str, str] = Field(default_factory=dict)  # role, such as prompt → name of the training file's column
    today: date | None = None  # for chat templates that write the date; None: the current date
    other_prompts: bool = False  # whether each group gets an answer to another prompt, which some objectives need


class CheckRequest(Contract):
    """The input of the program `services.training.check_program`. `recipe` names the data file to check, and the model
    and options with which a job would read the file.

    The program writes its result, a SideJobResult, to `<folder_uri>/report.json`.
    """

    recipe: Recipe
    folder_uri: str


class MergeRequest(Contract):
    """The input of the program `services.training.merge_program`: the adapter to merge into its base model
    (`adapter_uri`), and the folder for the result (`folder_uri`).

    The program writes its result, a SideJobResult, to `<folder_uri>/report.json`.
    """

    adapter_uri: str
    folder_uri: str  # the merged model is written to `<folder_uri>/model`


class MergeReport(Contract):
    """Says where a merged model is (`model_uri`), and the largest difference between its outputs and those of the base
    model with the adapter (`largest_difference`)."""

    model_uri: str
    largest_difference: float  # between the outputs of the merged model and of the base with its adapter attached
    difference_of: Literal["logprobs", "rewards"]  # the outputs that were compared
    num_tokens: int  # how many tokens, drawn at random, both models have read


# --- what an attempt reports -------------------------------------------------------------


class Message(Contract):
    """A report of an attempt (one run of a job): a sentence for the user (`message`), and its level, such as a
    warning.
    """

    kind: Literal["message"] = "message"
    level: Literal["info", "warn", "error"] = "info"
    message: Text


Stage = Literal[
    "downloading",
    "encoding",
    "loading reference",
    "scoring",
    "waiting for workers",
    "loading policy",
    "training",
    "exporting",
]


class Progress(Contract):
    """A report of an attempt (one run of a job): how far the current stage, such as downloading or training, has come.

    `done` and `total` are bytes while files are downloaded, and rows while they are encoded or scored. The stages
    `loading reference`, `waiting for workers` and `loading policy` have no count.
    """

    kind: Literal["progress"] = "progress"
    stage: str  # a Stage; other releases may have other stages
    done: int
    total: int  # 0: the total is unknown


class ReferenceWanted(Contract):
    """A report of an attempt (one run of a job): from now on, the attempt needs the deployment of its reference model.

    The attempt waits until the deployment is loaded. `app_name` is the deployment's name in the settings with which the
    attempt was started. The control plane must use this name, because its own settings may have changed since then.
    """

    kind: Literal["reference wanted"] = "reference wanted"
    app_name: str | None = None  # None: of an older release, which knows only the model's own engine


class ReferenceReleased(Contract):
    """A report of an attempt (one run of a job): the attempt no longer needs the deployment of its reference model."""

    kind: Literal["reference released"] = "reference released"


class Started(Contract):
    """A report of an attempt (one run of a job): the data are ready and training begins.

    Every option of `config` has its final value. The report also has the number of groups (prompts with their
    completions) to train on, the number of steps, and the step from which the job is resumed (0 for a fresh start).
    """

    kind: Literal["started"] = "started"
    config: ReadConfig
    num_groups: int
    total_steps: Step
    resumed_from: Step = 0  # the checkpoint's step; 0 for a fresh start


class StepMetrics(Contract):
    """A report of an attempt (one run of a job): the metrics of the optimizer step `step`, under the keys that TRL
    logs."""

    kind: Literal["metrics"] = "metrics"
    step: Step  # from 1
    total_steps: Step
    metrics: dict[str, float]


class CheckpointSaved(Contract):
    """A report of an attempt (one run of a job): the complete checkpoint of the step `step` is at `uri`.

    The folder `<uri>/model` has Hugging Face's format.
    """

    kind: Literal["checkpoint"] = "checkpoint"
    step: Step
    uri: str
    metrics: dict[str, float]


class Succeeded(Contract):
    """The last report of an attempt (one run of a job) that succeeded. The trained model is at `model_uri`, and
    `trained_tokens` is the number of tokens that the job has trained on."""

    kind: Literal["succeeded"] = "succeeded"
    model_uri: str
    trained_tokens: Annotated[int, Field(ge=0, lt=2**63)]


class Failed(Contract):
    """The last report of an attempt (one run of a job) that failed for a reason that another attempt cannot fix. `code`
    identifies the kind of error, `message` is for the user, and `param` names the invalid field of the job, if any."""

    kind: Literal["failed"] = "failed"
    code: Text
    message: Text
    param: Text | None = None


class Paused(Contract):
    """The last report of an attempt (one run of a job) that stopped because the user paused the job, or because Ray
    asked its process to end. `step` is the attempt's last optimizer step; 0 means that it took none.

    The next attempt resumes from the last checkpoint.
    """

    kind: Literal["paused"] = "paused"
    step: Step  # the attempt's last optimizer step; 0: none


class Died(Contract):
    """The last report of an attempt (one run of a job) that ended because of an error. `cause` names the error in
    words.

    Another attempt may resume from the last checkpoint.
    """

    kind: Literal["died"] = "died"
    cause: Text  # shown to the user; lower case, without a full stop


class Alive(Contract):
    """A heartbeat, which an attempt (one run of a job) writes to storage if its posts do not reach the control
    plane."""

    kind: Literal["alive"] = "alive"


class SideJobResult(Contract):
    """The result of a program that ran as a Ray job beside training (a check of a file, or a merge of an adapter).

    The program writes this result to the folder that its request names. Either `report` (on success) or `error` is set.
    """

    finished_at: float
    report: dict[str, Any] | None = (
        None  # of a check: the fields of a `check_program.Check`; of a merge: of a MergeReport
    )
    error: Failed | None = None


def _or_message(value: Any, read: Callable[[Any], Any]) -> Any:
    """Parses a report from training with `read`, and returns a Message to the user instead if this release cannot parse
    the report.

    A report of a newer release therefore does not stop the reading of the reports that follow it.
    """
    try:
        return read(value)
    except ValidationError as error:
        if not (isinstance(value, dict) and isinstance(kind := value.get("kind"), str)):
            raise
        why = first_error(error)
        return Message(
            level="warn",
            message=(
                f"This release of the service cannot read a report of the kind '{kind:.80}' from training, "
                f"and skips it: {why}"
            ),
        )


def first_error(error: ValidationError) -> str:
    """Returns the first error of a failed validation as one line: the path of the field and the reason."""
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
    """A report of an attempt (one run of a job), with the report's number in the attempt (`seq`).

    Job, attempt and `seq` together identify an event, so a receiver recognizes an event that is sent twice.
    """

    seq: Annotated[int, Field(ge=0, lt=2**62)]  # number of the event in the attempt: from 0, without gaps
    created_at: float
    report: Report


class EventBatch(Contract):
    """A list of events (numbered reports) of an attempt, which is one run of a job. An attempt posts such lists to its
    `events_url`. It also writes them to files in storage, which together are called its spool.

    A post without events is a heartbeat.
    """

    events: list[JobEvent]


Desired = Literal["run", "pause", "cancel"]


def _or_run(value: Any, read: Callable[[Any], Any]) -> Any:
    """Parses the state that the user wants for a job (the field `desired`) with `read`. Returns "run" if this release
    does not know the state."""
    try:
        return read(value)
    except ValidationError:
        return "run"


class Wish(Contract):
    """The control plane's response when an attempt (one run of a job) posts its events: the state that the user now
    wants for the job (`desired`), such as run, pause or cancel."""

    desired: Annotated[Desired, WrapValidator(_or_run)]
