"""Defines the database's tables. They hold all state of jobs.

Constraints in the database enforce the guarantees that the documentation gives.
"""

from datetime import date, datetime
from functools import cache
from typing import Any, ClassVar

from sqlalchemy import (
    ARRAY,
    BigInteger,
    CheckConstraint,
    ColumnElement,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    LargeBinary,
    Text,
    UniqueConstraint,
    cast,
    extract,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import INT8MULTIRANGE, JSONB, Range
from sqlalchemy.orm import DeclarativeBase, Mapped, column_property, mapped_column

from services.contract import Reading

JOB_STATES = ("queued", "running", "paused", "succeeded", "failed", "cancelled")
TERMINAL = ("succeeded", "failed", "cancelled")
# The SQL condition that the rows of a training file are still to be checked.
UNCHECKED = "purpose = 'fine-tune' AND report IS NULL AND refusal IS NULL AND deleted_at IS NULL"
EVALUATION_ENDS = ("succeeded", "failed", "cancelled")
TRIAL_ENDS = ("succeeded", "failed", "stopped", "cancelled")
DEFAULT_PROJECT = "proj_default"  # the project of the API key in the settings


class Base(DeclarativeBase):
    """The base class of all tables. Columns of type datetime are timestamptz, and columns of type dict are jsonb."""

    type_annotation_map: ClassVar = {
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB(none_as_null=True),
        dict[str, str]: JSONB(none_as_null=True),
        list[str]: ARRAY(Text()),
    }


class Project(Base):
    """A project, the owner of files, jobs, models and API keys. None in a column `max_…` means no limit."""

    __tablename__ = "projects"
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    name: Mapped[str] = mapped_column(unique=True)
    archived_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]  # when an admin deleted the archived project; the cleanup then erases it
    erased_at: Mapped[datetime | None]  # when everything that the deleted project owned was gone
    weight: Mapped[float] = mapped_column(server_default="1")  # share of the cluster, relative to other weights
    max_running_jobs: Mapped[int | None]
    max_queued_jobs: Mapped[int | None]
    max_bytes: Mapped[int | None] = mapped_column(BigInteger)  # the most bytes of the project's files
    max_accelerator_hours: Mapped[float | None]
    accelerator_hours: Mapped[float] = mapped_column(server_default="0")  # of the attempts that have ended
    __table_args__ = (CheckConstraint("deleted_at IS NULL OR archived_at IS NOT NULL", name="projects_deleted_check"),)


class Owned:
    """The base class of tables whose rows belong to a project.

    A session for one project sees and writes only the rows of that project.
    """

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))


class Key(Base):
    """An API key. The table holds the SHA-256 of the key's text, not the text."""

    __tablename__ = "keys"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    name: Mapped[str]
    sha256: Mapped[str] = mapped_column(unique=True)
    hint: Mapped[str]  # the last four characters of the key's text
    scopes: Mapped[list[str]]
    requests_per_minute: Mapped[int | None]
    tokens_per_minute: Mapped[int | None]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]


class Answer(Owned, Base):
    """The stored response to a request that changed data. A retry of the request gets this response.

    The transaction that makes the change writes the row, so that the request acts only once.
    """

    __tablename__ = "answers"
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    idempotency_key: Mapped[str | None]
    request: Mapped[str]  # sha256 of key id, method and path
    content: Mapped[str]  # sha256 of the body
    retry_count: Mapped[int]  # 0: the client's first send
    object_id: Mapped[str | None]  # the object that was changed; None: the request created one
    body: Mapped[dict[str, Any]]
    __table_args__ = (
        UniqueConstraint("project_id", "idempotency_key"),
        Index("answers_by_content", "content", "created_at"),
        Index("answers_by_time", "created_at"),
        Index("answers_by_object", "object_id", "id", postgresql_where=text("object_id IS NOT NULL")),
    )


class File(Owned, Base):
    """A file that a user uploaded or a job produced. A deleted file keeps its row, because jobs still name the file."""

    __tablename__ = "files"
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    filename: Mapped[str]
    purpose: Mapped[str]
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    uri: Mapped[str]
    report: Mapped[dict[str, Any] | None]  # FeedbackReport of a training file, once its rows are checked
    refusal: Mapped[str | None]  # why the file cannot be used
    reading: Mapped[dict[str, Any] | None]  # Reading: options for reading the rows, if the request gave any
    num_checked: Mapped[int | None] = mapped_column(BigInteger)  # bytes that a background check has read
    expires_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]
    __table_args__ = (
        Index("files_by_time", "project_id", "created_at", "id"),
        Index("files_unchecked", "created_at", postgresql_where=text(UNCHECKED)),
    )

    @classmethod
    @cache
    def alive(cls) -> ColumnElement[bool]:
        """Returns the SQL condition that a file is neither deleted nor expired, by the database's clock."""
        return cls.deleted_at.is_(None) & (cls.expires_at.is_(None) | (cls.expires_at > func.clock_timestamp()))


class Feedback(Owned, Base):
    """A user's vote on completions of a prompt, stored as a row of training data."""

    __tablename__ = "feedback"
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    vote: Mapped[str]  # choice, thumb, ratings or edit
    kind: Mapped[str]  # the kind of training data that the row is: pairs, unpaired or ratings
    form: Mapped[str]  # whether the prompt is messages or text; a file has rows of one form
    row: Mapped[dict[str, Any]]
    num_bytes: Mapped[int] = mapped_column(BigInteger)  # of the row in a file
    __table_args__ = (
        Index("feedback_by_time", "project_id", "created_at", "id"),
        Index("feedback_by_kind", "project_id", "kind", "form", "created_at", "id"),
    )


class SideJobAttempt(Owned, Base):
    """A run of a side job, which is a short Ray job beside training.

    A side job checks a training file with a model, or merges an adapter into its base model.
    """

    __tablename__ = "checks"
    submission_id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    ended_at: Mapped[datetime | None]  # when the service noticed the Ray job's end
    folder: Mapped[str]  # URI of the results
    __table_args__ = (Index("checks_by_end", "ended_at", "project_id"),)


class Upload(Owned, Base):
    """An upload: a file whose bytes arrive in several parts. The row has what the client said about the file, and the
    state of the upload.
    """

    __tablename__ = "uploads"
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime]
    filename: Mapped[str]
    purpose: Mapped[str]
    mime_type: Mapped[str]
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    file_seconds: Mapped[int | None]  # seconds from the upload's completion until the file expires
    reading: Mapped[dict[str, Any] | None]  # Reading of the file
    state: Mapped[str] = mapped_column(default="pending")
    file_id: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    __table_args__ = (
        CheckConstraint("state IN ('pending', 'completed', 'cancelled', 'expired')"),
        CheckConstraint("(state = 'completed') = (file_id IS NOT NULL)"),
    )


def reading_of(row: File | Upload) -> Reading:
    """Returns the options for reading the data of a file or an upload, as its database row stores them.

    Returns the default options if the row stores none.
    """
    return Reading.model_validate(row.reading or {})


class UploadPart(Base):
    """A part of an upload's bytes: its size, and where the bytes are (`uri`). The request that completes the upload
    gives the order of the parts.
    """

    __tablename__ = "upload_parts"
    id: Mapped[str] = mapped_column(primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id"), index=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    uri: Mapped[str]


class Job(Owned, Base):
    """A fine-tuning job.

    `desired` is the state that the user wants, and `observed` is the state that the job is in. A change of either adds
    one to `version`.
    """

    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    spec: Mapped[dict[str, Any]]  # JobSpec
    model_source: Mapped[str]  # source of the model that the job trains; fixed at submission
    model_root: Mapped[str]
    base_source: Mapped[str | None]  # source of the base model, if model_source is an adapter
    reference_source: Mapped[str | None]  # source of the reference model, if it is not model_source
    priority: Mapped[int] = mapped_column(default=0)  # higher goes first
    desired: Mapped[str] = mapped_column(default="run")
    observed: Mapped[str] = mapped_column(default="queued")
    version: Mapped[int] = mapped_column(default=1)
    traceparent: Mapped[str | None]  # of the request that submitted the job, if it was traced
    waits_for: Mapped[str | None]  # why the job, or its next attempt, does not start yet, as text for the user
    misfit_since: Mapped[datetime | None]  # since when the cluster is too small for the job that waits, None if not
    misfit_seen_at: Mapped[datetime | None]  # when it was last found too small; noted once a minute
    training: Mapped[dict[str, Any] | None]  # an attempt's Started report: the resolved config, and the number of steps
    progress: Mapped[dict[str, Any] | None]  # stage and progress of the running attempt
    error: Mapped[dict[str, Any] | None]  # {code, message, param}
    finished_at: Mapped[datetime | None]
    fine_tuned_model: Mapped[str | None]
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    result_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    steps_packed: Mapped[bool] = mapped_column(server_default="false")  # it has ended, and all its steps are in blocks
    deleted_at: Mapped[datetime | None]  # when a user deleted the ended job; only the cleanup sees it from then on
    cleared_at: Mapped[datetime | None]  # when its files that nobody needs any more were removed from storage
    __table_args__ = (
        CheckConstraint("desired IN ('run', 'pause', 'cancel')"),
        CheckConstraint(f"observed IN {JOB_STATES}"),
        CheckConstraint(f"(observed IN {TERMINAL}) = (finished_at IS NOT NULL)"),
        CheckConstraint("(observed = 'succeeded') = (fine_tuned_model IS NOT NULL)"),
        CheckConstraint("(observed = 'failed') = (error IS NOT NULL)"),
        CheckConstraint("deleted_at IS NULL OR finished_at IS NOT NULL", name="jobs_deleted_check"),
        Index("jobs_by_time", "project_id", "created_at", "id"),
        Index("jobs_live", "created_at", postgresql_where=text(f"observed NOT IN {TERMINAL}")),
        Index("jobs_to_pack", "finished_at", postgresql_where=text("finished_at IS NOT NULL AND NOT steps_packed")),
        Index("jobs_by_deletion", "deleted_at", postgresql_where=text("deleted_at IS NOT NULL")),
        Index("jobs_to_clear", "finished_at", postgresql_where=text("finished_at IS NOT NULL AND cleared_at IS NULL")),
    )


class Transition(Base):
    """A change of a job's desired or observed state.

    Rows never change, and are deleted only together with their job. Applied in order, the rows of a job give the job's
    current state.
    """

    __tablename__ = "transitions"
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    version: Mapped[int]  # of the job after the change
    desired: Mapped[str]
    observed: Mapped[str]
    actor: Mapped[str]  # key id, or the control plane's name
    reason: Mapped[str]
    __table_args__ = (UniqueConstraint("job_id", "version"),)


class Attempt(Base):
    """An attempt: one run of a job on the Ray cluster.

    The row is written before Ray starts the attempt. An attempt is open until it has ended; a job has at most one open
    attempt.
    """

    __tablename__ = "attempts"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    state: Mapped[str] = mapped_column(default="launching")
    token: Mapped[str]  # digests of the last two launches' tokens; later of the token that the attempt made
    next_seq: Mapped[int] = mapped_column(BigInteger, default=0)  # all reports with smaller numbers are recorded
    reference: Mapped[str | None]  # app_name of the reference model that must be served for the attempt
    outcome: Mapped[dict[str, Any] | None]  # the attempt's Succeeded, Failed or Paused report
    reported_at: Mapped[datetime] = mapped_column(server_default=func.now())
    silent_seconds: Mapped[float] = column_property(  # from the attempt's last sign of life until the row was read
        cast(extract("epoch", func.clock_timestamp() - reported_at), Double)
    )
    num_accelerators: Mapped[float] = mapped_column(default=0)
    ended_at: Mapped[datetime | None]
    failed: Mapped[bool] = mapped_column(default=False)  # the attempt died by itself, which counts towards max_attempts
    reason: Mapped[str | None]  # why the attempt ended or is being stopped
    __table_args__ = (
        CheckConstraint("state IN ('launching', 'running', 'ended')"),
        CheckConstraint("(state = 'ended') = (ended_at IS NOT NULL)"),
        Index("attempts_one_open", "job_id", unique=True, postgresql_where=text("state <> 'ended'")),
        Index("attempts_by_end", "ended_at"),
    )

    @property
    def submission_id(self) -> str:
        """Returns the id under which the attempt (run of a job) is submitted to Ray."""
        return f"{self.job_id}-{self.number}"


class Event(Base):
    """An event in a job's history, which the job's user can read.

    An event comes from a report of an attempt (a run of the job on Ray) or, with attempt 0, from the control plane
    itself. `seq` is the report's number within the attempt. An attempt may send a report twice: the columns (job_id,
    attempt, seq) are together unique, so the report gives only one event. A trigger makes the ids of one job's events
    rise in the order in which the events become visible to readers.
    """

    __tablename__ = "events"
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    public_id: Mapped[str] = mapped_column(unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    attempt: Mapped[int] = mapped_column(default=0)
    seq: Mapped[int | None]  # None for the service's own events
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    level: Mapped[str] = mapped_column(default="info")
    type: Mapped[str] = mapped_column(default="message")
    message: Mapped[str]
    data: Mapped[dict[str, Any] | None]
    step: Mapped[int | None]  # step of a metrics event; unique, because a resumed attempt repeats some steps
    __table_args__ = (
        UniqueConstraint("job_id", "attempt", "seq"),
        UniqueConstraint("job_id", "step"),
        Index("events_by_job", "job_id", "id"),
    )


class StepBlock(Base):
    """A block: the metrics of up to 1,000 consecutive training steps of a job, in a compact form.

    At first, each training step is a row of the table `events`: an event that shows the step's metrics to the user. A
    block replaces the rows of its steps. It keeps everything that is needed to show the same events again.

    `jobs.events.blocks` writes and reads the two columns of bytes. Later releases must be able to read their format,
    because blocks stay for years.
    """

    __tablename__ = "step_blocks"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)  # from 0; block 0 has the steps 1 to 1,000
    first_event: Mapped[int] = mapped_column(BigInteger)  # least id of the events
    last_event: Mapped[int] = mapped_column(BigInteger)  # greatest id of the events
    steps: Mapped[list[Range[int]]] = mapped_column(INT8MULTIRANGE)
    metrics: Mapped[list[str]]  # names of the metrics
    parquet: Mapped[bytes] = mapped_column(LargeBinary)  # a Parquet file: a row for each step
    sums: Mapped[bytes] = mapped_column(LargeBinary)  # an Arrow stream: sums over each 100 steps
    __table_args__ = (Index("step_blocks_by_event", "job_id", "last_event"),)


class Checkpoint(Base):
    """A checkpoint of a job, all of whose files are in storage: its step, its metrics, its files (`uri`) and its model
    (`model_id`).
    """

    __tablename__ = "checkpoints"
    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    step: Mapped[int]
    uri: Mapped[str]
    model_id: Mapped[str]  # the checkpoint is a model under this name
    metrics: Mapped[dict[str, Any]]
    __table_args__ = (UniqueConstraint("job_id", "step"),)


class Model(Owned, Base):
    """A trained model under the name that clients use. Base models are not in this table but in the settings."""

    __tablename__ = "models"
    id: Mapped[str] = mapped_column(primary_key=True)  # ft:base:org:suffix:job's digits[:ckpt-step-n]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    source: Mapped[str]  # storage URI of a Hugging Face folder, or of an adapter's folder
    root: Mapped[str]  # base model's name
    base_source: Mapped[str | None]  # source of an adapter's base model; None: the model holds all weights
    adapter: Mapped[dict[str, Any] | None]  # an adapter's options
    on_experts: Mapped[bool] = mapped_column(
        server_default="false"
    )  # whether the adapter is on the experts of a mixture of experts
    num_outputs: Mapped[int] = mapped_column(
        server_default="0"
    )  # outputs of a reward model's head; 0: the model is no reward model
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    attached_at: Mapped[datetime | None]  # when an adapter was last recorded in use on the engine of its base model
    deleted_at: Mapped[datetime | None]
    removed_at: Mapped[datetime | None]  # when the deleted model's files were removed from storage
    __table_args__ = (
        Index("models_by_time", "project_id", "created_at", "id"),
        Index("models_by_source", "source"),
        Index("models_by_base", "base_source"),
        Index("models_by_job", "job_id"),
        Index("models_by_deletion", "deleted_at", postgresql_where=text("deleted_at IS NOT NULL")),
        Index("models_to_remove", "deleted_at", postgresql_where=text("deleted_at IS NOT NULL AND removed_at IS NULL")),
    )


class CheckpointPermission(Base):
    """A permission for the project `project_id` to use the trained model `model_id`, which belongs to another
    project.
    """

    __tablename__ = "checkpoint_permissions"
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))  # the project that may use the model
    __table_args__ = (UniqueConstraint("model_id", "project_id"),)


class WebhookEndpoint(Owned, Base):
    """A URL to which the service sends webhooks about a project's jobs. The row also has the types of events to send,
    the secrets that sign them, and recent failures.
    """

    __tablename__ = "webhook_endpoints"
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    updated_at: Mapped[datetime | None]
    name: Mapped[str]
    url: Mapped[str]
    event_types: Mapped[list[str]]
    secret: Mapped[str]
    old_secret: Mapped[str | None]
    old_secret_until: Mapped[datetime | None] = mapped_column()
    old_secret_counts: Mapped[bool | None] = column_property(
        old_secret_until > func.clock_timestamp()
    )  # whether the old secret was valid when the row was read
    num_failures: Mapped[int] = mapped_column(server_default="0")  # sends that failed in a row
    retry_at: Mapped[datetime | None]  # nothing is sent before this time, because sends failed
    disabled_at: Mapped[datetime | None]  # when the endpoint answered 410 Gone
    deleted_at: Mapped[datetime | None]
    __table_args__ = (Index("webhook_endpoints_by_time", "project_id", "created_at", "id"),)


class Outbound(Base):
    """A webhook message about a job to one URL, sent or still to be sent. The transaction that ends the job writes the
    row.
    """

    __tablename__ = "outbox"
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("webhook_endpoints.id"))
    event_id: Mapped[str]  # evt_…, the same for all endpoints
    body: Mapped[dict[str, Any]]
    num_sends: Mapped[int] = mapped_column(default=0)
    due_at: Mapped[datetime | None] = mapped_column(server_default=func.now())  # None: delivered or given up
    outcome: Mapped[str | None]  # result of the last send, as text
    __table_args__ = (Index("outbox_due", "endpoint_id", "due_at", "id", postgresql_where=text("due_at IS NOT NULL")),)


class AuditEntry(Base):
    """An entry of the audit log: a request that changed data or was refused, and the key that sent it. Entries never
    change."""

    __tablename__ = "audit_log"
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    key_id: Mapped[str]
    request_id: Mapped[str]
    action: Mapped[str]  # method and route
    object_id: Mapped[str | None]
    status: Mapped[int]
    code: Mapped[str | None]  # error code of a refusal
    num_requests: Mapped[int] = mapped_column(default=1)  # how many refusals of the same kind the entry stands for
    __table_args__ = (Index("audit_log_by_project", "project_id", "id"),)


class Deployment(Base):
    """A model that Ray Serve should run, because a request needs it, or a job needs it as its reference model. The row
    also says when the model was requested, used and loaded, and what it waits for.
    """

    __tablename__ = "deployments"
    app_name: Mapped[str] = mapped_column(primary_key=True)
    model_id: Mapped[str]
    source: Mapped[str]
    num_outputs: Mapped[int] = mapped_column(server_default="0")  # of a reward model's head; 0: no reward model
    scores: Mapped[bool] = mapped_column(server_default="false")  # the application only computes log-probabilities
    for_jobs: Mapped[bool] = mapped_column(server_default="false")  # no client has requested the model, only jobs
    asked_at: Mapped[datetime] = mapped_column(server_default=func.now())  # of the first request; gives the turns
    last_used_at: Mapped[datetime] = mapped_column(server_default=func.now())
    placed_at: Mapped[datetime | None]  # when Ray Serve was told to load the model; None: the model waits
    ready_at: Mapped[datetime | None]  # when the model was first seen running, since placed_at
    answered_at: Mapped[datetime | None]  # when a request, or a job that needs the model, was last seen since placed_at
    answering: Mapped[dict[str, Any]] = mapped_column(
        server_default="{}"
    )  # control planes with requests to the model in flight, each with the Unix time until which this counts
    waits_for: Mapped[str | None]  # what the model waits for, in words; if placed, it gets no new requests


class ModelSettings(Base):
    """The settings of a model's deployment (how the model is served) that a client chose through the API."""

    __tablename__ = "model_settings"
    model_id: Mapped[str] = mapped_column(primary_key=True)
    values: Mapped[dict[str, Any]]  # the fields of DeploymentSettings that the request had
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Evaluation(Owned, Base):
    """An evaluation of a policy, which the control plane works on in the background.

    Each of its items (prompts) passes through the same stages, such as answering and judging, one after the other. The
    numbers of finished stages and items change in the transactions that store the items' results.
    """

    __tablename__ = "evaluations"
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    key_id: Mapped[str]  # of the API key that created the evaluation; its usage counts as the key's
    spec: Mapped[dict[str, Any]]  # evaluations.requests.Spec
    state: Mapped[str] = mapped_column(default="queued")
    num_items: Mapped[int]
    num_stages: Mapped[int]  # of each item
    num_stages_done: Mapped[int] = mapped_column(default=0)  # of all items together
    num_completed: Mapped[int] = mapped_column(default=0)  # items
    num_failed: Mapped[int] = mapped_column(default=0)  # items
    started_at: Mapped[datetime | None]
    progressed_at: Mapped[datetime | None]  # when an item last finished a stage, or failed
    finished_at: Mapped[datetime | None]
    waits_for: Mapped[str | None]  # why no item can be worked on at the moment, as text for the user
    results: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]  # {code, message, param}
    __table_args__ = (
        CheckConstraint(f"state IN {('queued', 'running', 'paused', *EVALUATION_ENDS)}"),
        CheckConstraint(f"(state IN {EVALUATION_ENDS}) = (finished_at IS NOT NULL)"),
        CheckConstraint("(state = 'succeeded') = (results IS NOT NULL)"),
        CheckConstraint("(state = 'failed') = (error IS NOT NULL)"),
        Index("evaluations_by_time", "project_id", "created_at", "id"),
        Index("evaluations_live", "created_at", postgresql_where=text(f"state NOT IN {EVALUATION_ENDS}")),
    )


class EvaluationItem(Base):
    """An item of an evaluation: a prompt, with everything that was found out about it so far.

    An item passes through several stages, such as answering and judging. The transaction that stores the results of a
    stage adds one to the column `stage`, so no stage counts twice.
    """

    __tablename__ = "evaluation_items"
    evaluation_id: Mapped[str] = mapped_column(ForeignKey("evaluations.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)  # from 0
    row: Mapped[dict[str, Any]]  # written by evaluations.rows.to_json
    stage: Mapped[int] = mapped_column(default=0)  # how many stages are finished
    found: Mapped[dict[str, Any]] = mapped_column(server_default="{}")  # what these stages found
    num_tries: Mapped[int] = mapped_column(default=0)  # failed tries of the next stage
    due_at: Mapped[datetime | None]  # the time of the next try; None: at any time
    error: Mapped[dict[str, Any] | None]  # {code, message}: why the item failed for good


class JobEvaluation(Owned, Base):
    """An evaluation that a job asks for, of one of the job's models: of a checkpoint, or of its policy.

    The transaction that adds the model writes the row. The transaction that creates the evaluation adds the id of the
    evaluation, so that no model is evaluated twice.
    """

    __tablename__ = "job_evaluations"
    id: Mapped[str] = mapped_column(primary_key=True)  # model_id and name
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    name: Mapped[str]  # key in the field `evaluations` of the job's spec
    model_id: Mapped[str]
    state: Mapped[str] = mapped_column(server_default="waiting")
    evaluation_id: Mapped[str | None]  # None: the evaluation is not created yet, or was refused
    waits_for: Mapped[str | None]  # why the evaluation cannot be created at the moment, as text for the user
    troubled_at: Mapped[datetime | None]  # of the first of the unexpected errors in a row
    error: Mapped[dict[str, Any] | None]  # {code, message, param}
    __table_args__ = (
        UniqueConstraint("job_id", "name", "model_id"),
        CheckConstraint(f"state IN {('waiting', 'evaluating', *EVALUATION_ENDS)}"),
        CheckConstraint("state NOT IN ('evaluating', 'succeeded') OR evaluation_id IS NOT NULL"),
        CheckConstraint("(state = 'failed') = (error IS NOT NULL)"),
        Index("job_evaluations_live", "created_at", postgresql_where=text("state IN ('waiting', 'evaluating')")),
    )


class Sweep(Owned, Base):
    """A sweep: a number of jobs that differ in chosen options, which the control plane submits and compares. The row
    has the request (`spec`), the state, and what the sweep waits for.
    """

    __tablename__ = "sweeps"
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    key_id: Mapped[str]  # of the API key that created it, and with which it creates jobs and evaluations
    spec: Mapped[dict[str, Any]]  # sweeps.requests.CreateSweep, its evaluations without rows
    state: Mapped[str] = mapped_column(default="running")
    num_trials: Mapped[int]  # in all, submitted or not
    waits_for: Mapped[str | None]  # why it does not go on at the moment, as text for the user
    troubled_at: Mapped[datetime | None]  # of the first of the unexpected errors since it last went on
    misfit_since: Mapped[datetime | None]  # since when the cluster is too small for the next job, None if it is not
    misfit_seen_at: Mapped[datetime | None]  # when it was last found too small
    error: Mapped[dict[str, Any] | None]  # {code, message, param}
    finished_at: Mapped[datetime | None]
    __table_args__ = (
        CheckConstraint(f"state IN {('running', *EVALUATION_ENDS)}"),
        CheckConstraint("(state = 'running') = (finished_at IS NULL)"),
        CheckConstraint("(state = 'failed') = (error IS NOT NULL)"),
        Index("sweeps_by_time", "project_id", "created_at", "id"),
        Index("sweeps_live", "created_at", postgresql_where=text("state = 'running'")),
    )


class SweepEvaluation(Base):
    """The description (`spec`) and the prompts (`rows`) of an evaluation that a sweep creates for the policy of each of
    its trials (jobs).
    """

    __tablename__ = "sweep_evaluations"
    sweep_id: Mapped[str] = mapped_column(ForeignKey("sweeps.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)  # from 0
    name: Mapped[str]
    spec: Mapped[dict[str, Any]]  # evaluations.requests.Spec without the model
    rows: Mapped[dict[str, Any]]  # {rows: what evaluations.rows.to_json returned}


class SweepTrial(Base):
    """A trial of a sweep: one of the sweep's jobs, with the values that the sweep chose for it, and the results of its
    evaluations.

    The transaction that submits the job writes the row, so that no trial has two jobs.
    """

    __tablename__ = "sweep_trials"
    sweep_id: Mapped[str] = mapped_column(ForeignKey("sweeps.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)  # from 0
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    parameters: Mapped[dict[str, Any]]  # the chosen values, by the paths of the job's fields
    state: Mapped[str] = mapped_column(default="training")
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"), unique=True)  # None: the job was refused
    evaluations: Mapped[dict[str, Any]]  # ids by the names of the sweep's evaluations
    results: Mapped[dict[str, Any]]  # of these evaluations, by their names
    value: Mapped[float | None]  # of the sweep's metric
    error: Mapped[dict[str, Any] | None]  # {code, message, param}
    __table_args__ = (CheckConstraint(f"state IN {('training', 'evaluating', *TRIAL_ENDS)}"),)


class Rounds(Owned, Base):
    """A set of rounds that improve a policy. In each round the newest policy writes answers, which are scored and
    become rows of training data. A job trains the next policy on these rows, and evaluations judge the new policy.

    `history` is a list of objects: number 0 for the first policy, then one for each round so far. Each object names the
    round's evaluations, file and job. The transaction that creates an evaluation, a file or a job also adds its id to
    `history`, so that nothing is created twice.
    """

    __tablename__ = "rounds"
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    key_id: Mapped[str]  # of the API key that created the rounds; their usage counts as the key's
    spec: Mapped[dict[str, Any]]  # rounds.requests.RoundsSpec
    prompts: Mapped[dict[str, Any]] = mapped_column(deferred=True)  # rows: `sampled` and `held_out` prompts
    state: Mapped[str] = mapped_column(default="running")
    history: Mapped[list[dict[str, Any]]] = mapped_column(JSONB)
    waits_for: Mapped[str | None]  # why the rounds make no progress at the moment, as text for the user
    troubled_at: Mapped[datetime | None]  # of the first unexpected error since the last progress
    misfit_since: Mapped[datetime | None]  # since when the cluster is too small for the next job, None if it is not
    misfit_seen_at: Mapped[datetime | None]  # when it was last found too small
    end_reason: Mapped[str | None]  # why the rounds succeeded: num_rounds, not_better or too_few_rows
    error: Mapped[dict[str, Any] | None]  # {code, message, param}
    finished_at: Mapped[datetime | None]
    __table_args__ = (
        CheckConstraint(f"state IN {('running', 'paused', *EVALUATION_ENDS)}"),
        CheckConstraint(f"(state IN {EVALUATION_ENDS}) = (finished_at IS NOT NULL)"),
        CheckConstraint("(state = 'succeeded') = (end_reason IS NOT NULL)"),
        CheckConstraint("(state = 'failed') = (error IS NOT NULL)"),
        Index("rounds_by_time", "project_id", "created_at", "id"),
        Index("rounds_live", "created_at", postgresql_where=text(f"state NOT IN {EVALUATION_ENDS}")),
    )


class UsageRow(Base):
    """The usage of one model with one API key on one day (in UTC): requests, tokens and accelerator seconds."""

    __tablename__ = "usage"
    project_id: Mapped[str] = mapped_column(primary_key=True)
    key_id: Mapped[str] = mapped_column(primary_key=True)
    model_id: Mapped[str] = mapped_column(primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    num_requests: Mapped[int] = mapped_column(BigInteger)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    completion_tokens: Mapped[int] = mapped_column(BigInteger)
    accelerator_seconds: Mapped[float]
    __table_args__ = (Index("usage_by_day", "day"),)


class UsageWriter(Base):
    """The number of the last batch of usage counts that a control plane has added to the table `usage`, so that no
    batch is added twice.
    """

    __tablename__ = "usage_writers"
    id: Mapped[str] = mapped_column(primary_key=True)
    batch: Mapped[int] = mapped_column(BigInteger)
    written_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Instance(Base):
    """The id of this service, in a table with one row.

    The names of the service's applications in Ray contain the id, so that services can share a cluster.
    """

    __tablename__ = "instance"
    id: Mapped[str] = mapped_column(primary_key=True)


class Lease(Base):
    """A lease: the right of one process, until `expires_at`, to do work that only one process may do.

    For example, only one control plane at a time starts and ends jobs. All times are by the database's clock.
    """

    __tablename__ = "leases"
    name: Mapped[str] = mapped_column(primary_key=True)
    holder: Mapped[str]
    expires_at: Mapped[datetime]
