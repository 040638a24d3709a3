"""The database's tables. PostgreSQL is the only truth about jobs; constraints keep what the docs promise."""

from datetime import datetime
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
    Text,
    UniqueConstraint,
    cast,
    extract,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, column_property, mapped_column

from services.contract import Reading

JOB_STATES = ("queued", "running", "paused", "succeeded", "failed", "cancelled")
TERMINAL = ("succeeded", "failed", "cancelled")
# The condition that a file is still to be checked.
UNCHECKED = "purpose = 'fine-tune' AND report IS NULL AND refusal IS NULL AND deleted_at IS NULL"
DEFAULT_PROJECT = "proj_default"  # the configured API key belongs to it


class Base(DeclarativeBase):
    """The base of all tables. Every time is timestamptz, every dict is jsonb."""

    type_annotation_map: ClassVar = {
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB(none_as_null=True),
        dict[str, str]: JSONB(none_as_null=True),
        list[str]: ARRAY(Text()),
    }


class Project(Base):
    """Owns files, jobs, models and keys. A limit of None is no limit."""

    __tablename__ = "projects"
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    name: Mapped[str] = mapped_column(unique=True)
    archived_at: Mapped[datetime | None]
    weight: Mapped[float] = mapped_column(server_default="1")  # its share of the cluster, relative to other projects
    max_running_jobs: Mapped[int | None]
    max_queued_jobs: Mapped[int | None]
    max_bytes: Mapped[int | None] = mapped_column(BigInteger)  # of its files
    max_accelerator_hours: Mapped[float | None]


class Owned:
    """The base of tables whose rows belong to a project. A session for one project sees and writes its rows only."""

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))


class Key(Base):
    """An API key. The database keeps a digest of its text, not the text."""

    __tablename__ = "keys"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    name: Mapped[str]
    sha256: Mapped[str] = mapped_column(unique=True)
    hint: Mapped[str]  # the last four characters of its text
    scopes: Mapped[list[str]]
    requests_per_minute: Mapped[int | None]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]


class Answer(Owned, Base):
    """The answer to a request that changed something. It is written in that transaction, so that a retry acts once."""

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
    """An uploaded or produced file. A deleted file keeps its row, because jobs still name it."""

    __tablename__ = "files"
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    filename: Mapped[str]
    purpose: Mapped[str]
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    uri: Mapped[str]
    report: Mapped[dict[str, Any] | None]  # FeedbackReport of a training file, once its rows are checked
    refusal: Mapped[str | None]  # why it cannot be used
    reading: Mapped[dict[str, Any] | None]  # Reading: how its rows are read, if the request said so
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
        """The condition that a file is neither deleted nor expired, by the database's clock."""
        return cls.deleted_at.is_(None) & (cls.expires_at.is_(None) | (cls.expires_at > func.clock_timestamp()))


class DatasetCheck(Owned, Base):
    """A Ray job that checks a training file with a model."""

    __tablename__ = "checks"
    submission_id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    ended_at: Mapped[datetime | None]  # when the service noticed its end
    folder: Mapped[str]  # URI of its results
    __table_args__ = (Index("checks_by_end", "ended_at", "project_id"),)


class Upload(Owned, Base):
    """A file that arrives in parts."""

    __tablename__ = "uploads"
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime]
    filename: Mapped[str]
    purpose: Mapped[str]
    mime_type: Mapped[str]
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    file_seconds: Mapped[int | None]  # the file's life, from when it is completed
    reading: Mapped[dict[str, Any] | None]  # Reading of the file
    state: Mapped[str] = mapped_column(default="pending")
    file_id: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    __table_args__ = (
        CheckConstraint("state IN ('pending', 'completed', 'cancelled', 'expired')"),
        CheckConstraint("(state = 'completed') = (file_id IS NOT NULL)"),
    )


def reading_of(row: File | Upload) -> Reading:
    """Returns how the rows of the file are read."""
    return Reading.model_validate(row.reading or {})


class UploadPart(Base):
    """Some bytes of an upload. The request that completes the upload gives the order of its parts."""

    __tablename__ = "upload_parts"
    id: Mapped[str] = mapped_column(primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id"), index=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    uri: Mapped[str]


class Job(Owned, Base):
    """A fine-tuning job. `desired` is what the user wants, `observed` what is; a change of either raises `version`."""

    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    spec: Mapped[dict[str, Any]]  # JobSpec
    model_source: Mapped[str]  # where the model is; fixed at submission, as is its base
    model_root: Mapped[str]
    base_source: Mapped[str | None]  # where the base of model_source is, if that is an adapter
    reference_source: Mapped[str | None]  # where the reference is, if it is not the model that the job starts from
    priority: Mapped[int] = mapped_column(default=0)  # higher goes first
    desired: Mapped[str] = mapped_column(default="run")
    observed: Mapped[str] = mapped_column(default="queued")
    version: Mapped[int] = mapped_column(default=1)
    traceparent: Mapped[str | None]  # of the request that submitted it, if that was traced
    waits_for: Mapped[str | None]  # what keeps the job, or its next attempt, from starting, in words
    training: Mapped[
        dict[str, Any] | None
    ]  # the attempt's Started report, once it came: the resolved config, and the number of steps
    progress: Mapped[dict[str, Any] | None]  # where the running attempt is; attempts.py writes it
    error: Mapped[dict[str, Any] | None]  # {code, message, param}
    finished_at: Mapped[datetime | None]
    fine_tuned_model: Mapped[str | None]
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    result_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    __table_args__ = (
        CheckConstraint("desired IN ('run', 'pause', 'cancel')"),
        CheckConstraint(f"observed IN {JOB_STATES}"),
        CheckConstraint(f"(observed IN {TERMINAL}) = (finished_at IS NOT NULL)"),
        CheckConstraint("(observed = 'succeeded') = (fine_tuned_model IS NOT NULL)"),
        CheckConstraint("(observed = 'failed') = (error IS NOT NULL)"),
        Index("jobs_by_time", "project_id", "created_at", "id"),
        Index("jobs_live", "created_at", postgresql_where=text(f"observed NOT IN {TERMINAL}")),
    )


class Transition(Base):
    """A change of a job's desired or observed state. Rows never change; replayed in order they give the job's state."""

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
    """One run of a job on the cluster. It is written before it is launched; a job has at most one that is open."""

    __tablename__ = "attempts"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    state: Mapped[str] = mapped_column(default="launching")
    token: Mapped[str]  # digests of the last two launches' tokens; then of the one that the attempt made itself
    next_seq: Mapped[int] = mapped_column(BigInteger, default=0)  # all reports with smaller numbers are recorded
    reference: Mapped[str | None]  # app_name of the model that must be served while the attempt asks it for scores
    outcome: Mapped[dict[str, Any] | None]  # the attempt's Succeeded, Failed or Paused report
    reported_at: Mapped[datetime] = mapped_column(server_default=func.now())
    silent_seconds: Mapped[float] = column_property(  # from its last sign of life until the row was read
        cast(extract("epoch", func.clock_timestamp() - reported_at), Double)
    )
    num_accelerators: Mapped[float] = mapped_column(default=0)
    ended_at: Mapped[datetime | None]
    failed: Mapped[bool] = mapped_column(default=False)  # it died by itself, which counts towards max_attempts
    reason: Mapped[str | None]  # why it ended or is being stopped
    __table_args__ = (
        CheckConstraint("state IN ('launching', 'running', 'ended')"),
        CheckConstraint("(state = 'ended') = (ended_at IS NOT NULL)"),
        Index("attempts_one_open", "job_id", unique=True, postgresql_where=text("state <> 'ended'")),
        Index("attempts_by_end", "ended_at"),
    )

    @property
    def submission_id(self) -> str:
        """The id of the attempt's job in Ray."""
        return f"{self.job_id}-{self.number}"


class Event(Base):
    """A line of a job's history for its user.

    (job, attempt, seq) is unique, so an attempt may send a report twice. Events with attempt 0 are the service's own.
    A trigger makes the ids of one job's events rise in the order in which they become visible.
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
    step: Mapped[int | None]  # of a metrics event; unique, because a resumed attempt computes some steps again
    __table_args__ = (
        UniqueConstraint("job_id", "attempt", "seq"),
        UniqueConstraint("job_id", "step"),
        Index("events_by_job", "job_id", "id"),
    )


class Checkpoint(Base):
    """A complete checkpoint of a job."""

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
    """A trained policy under the name that clients use. Base models are not here; the settings name them."""

    __tablename__ = "models"
    id: Mapped[str] = mapped_column(primary_key=True)  # ft:base:org:suffix:job's digits[:ckpt-step-n]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    source: Mapped[str]  # storage URI of a Hugging Face folder, or of an adapter's folder
    root: Mapped[str]  # base model's name
    base_source: Mapped[str | None]  # where an adapter's base is; None: the model holds all weights
    adapter: Mapped[dict[str, Any] | None]  # an adapter's options
    num_outputs: Mapped[int] = mapped_column(
        server_default="0"
    )  # outputs of a reward model's head; 0: it is no reward model
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    deleted_at: Mapped[datetime | None]
    removed_at: Mapped[datetime | None]  # when its bytes were removed, after its deletion
    __table_args__ = (
        Index("models_by_time", "project_id", "created_at", "id"),
        Index("models_to_remove", "deleted_at", postgresql_where=text("deleted_at IS NOT NULL AND removed_at IS NULL")),
    )


class CheckpointPermission(Base):
    """Allows another project to use a model: a trained policy or a checkpoint."""

    __tablename__ = "checkpoint_permissions"
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))  # the project that may use it
    __table_args__ = (UniqueConstraint("model_id", "project_id"),)


class WebhookEndpoint(Owned, Base):
    """A URL to which a project wants webhooks about its jobs."""

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
    )  # when the row was read
    num_failures: Mapped[int] = mapped_column(server_default="0")  # sends that failed in a row
    retry_at: Mapped[datetime | None]  # nothing is sent before this time, because sends failed
    disabled_at: Mapped[datetime | None]  # when it answered 410 Gone
    deleted_at: Mapped[datetime | None]
    __table_args__ = (Index("webhook_endpoints_by_time", "project_id", "created_at", "id"),)


class Outbound(Base):
    """A webhook that waits to be sent to one endpoint. It is written in the transaction that causes it."""

    __tablename__ = "outbox"
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("webhook_endpoints.id"))
    event_id: Mapped[str]  # evt_…, the same for all endpoints
    body: Mapped[dict[str, Any]]
    num_sends: Mapped[int] = mapped_column(default=0)
    due_at: Mapped[datetime | None] = mapped_column(server_default=func.now())  # None: delivered or given up
    outcome: Mapped[str | None]  # what came of the last send
    __table_args__ = (Index("outbox_due", "endpoint_id", "due_at", "id", postgresql_where=text("due_at IS NOT NULL")),)


class AuditEntry(Base):
    """A change through the API or a refusal, and the key that asked. Rows are never changed."""

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
    """A model that should be served, because a request or a job that needs its scores asked for it."""

    __tablename__ = "deployments"
    app_name: Mapped[str] = mapped_column(primary_key=True)
    model_id: Mapped[str]
    source: Mapped[str]
    last_used_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Instance(Base):
    """Its only row is the service's id. The service's names on a shared Ray cluster begin with it."""

    __tablename__ = "instance"
    id: Mapped[str] = mapped_column(primary_key=True)


class Lease(Base):
    """Who may do a piece of work now, such as the reconciler's. Times are by the database's clock."""

    __tablename__ = "leases"
    name: Mapped[str] = mapped_column(primary_key=True)
    holder: Mapped[str]
    expires_at: Mapped[datetime]
