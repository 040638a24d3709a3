"""The database's tables. PostgreSQL is the only truth about jobs; constraints hold what the prose promises."""

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
UNCHECKED = "purpose = 'fine-tune' AND report IS NULL AND refusal IS NULL AND deleted_at IS NULL"  # of files
DEFAULT_PROJECT = "proj_default"  # of the configured API key, and of all that was there before projects


class Base(DeclarativeBase):
    """Every time is timestamptz, every dict is jsonb."""

    type_annotation_map: ClassVar = {
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB(none_as_null=True),
        dict[str, str]: JSONB(none_as_null=True),
        list[str]: ARRAY(Text()),
    }


class Project(Base):
    """Who owns what. A quota of None is no quota."""

    __tablename__ = "projects"
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    name: Mapped[str] = mapped_column(unique=True)
    archived_at: Mapped[datetime | None]
    weight: Mapped[float] = mapped_column(server_default="1")  # how much of the cluster it may have beside others
    max_running_jobs: Mapped[int | None]
    max_queued_jobs: Mapped[int | None]
    max_bytes: Mapped[int | None] = mapped_column(BigInteger)  # of its files
    max_accelerator_hours: Mapped[float | None]


class Owned:
    """What belongs to a project: a store that is opened for a project sees and writes its own only."""

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))


class Key(Base):
    """An API key. Of its text only the digest is kept."""

    __tablename__ = "keys"
    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    name: Mapped[str]
    sha256: Mapped[str] = mapped_column(unique=True)
    hint: Mapped[str]  # its last four characters
    scopes: Mapped[list[str]]
    requests_per_minute: Mapped[int | None]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]


class Answer(Owned, Base):
    """The answer to a request that changed something, written in its transaction, so that a retry acts once."""

    __tablename__ = "answers"
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    idempotency_key: Mapped[str | None]
    request: Mapped[str]  # sha256 of key id, method and path
    content: Mapped[str]  # sha256 of what was sent
    retry_count: Mapped[int]  # 0: the client's first send
    object_id: Mapped[str | None]  # of what was changed; None: something was made
    body: Mapped[dict[str, Any]]
    __table_args__ = (
        UniqueConstraint("project_id", "idempotency_key"),
        Index("answers_by_content", "content", "created_at"),
        Index("answers_by_time", "created_at"),
        Index("answers_by_object", "object_id", "id", postgresql_where=text("object_id IS NOT NULL")),
    )


class File(Owned, Base):
    """An uploaded or produced file. `deleted_at` keeps the row so that jobs still name it."""

    __tablename__ = "files"
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    filename: Mapped[str]
    purpose: Mapped[str]
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    uri: Mapped[str]
    report: Mapped[dict[str, Any] | None]  # FeedbackReport of a training file, once its rows are checked
    refusal: Mapped[str | None]  # why it cannot be used, in words
    reading: Mapped[dict[str, Any] | None]  # Reading, where whoever sent it said how; of a training file
    num_checked: Mapped[int | None] = mapped_column(BigInteger)  # bytes that a check in the background has read
    expires_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]
    __table_args__ = (
        Index("files_by_time", "project_id", "created_at", "id"),
        Index("files_unchecked", "created_at", postgresql_where=text(UNCHECKED)),
    )

    @classmethod
    @cache
    def alive(cls) -> ColumnElement[bool]:
        """What callers see: an expired file is gone at once, by the database's clock."""
        return cls.deleted_at.is_(None) & (cls.expires_at.is_(None) | (cls.expires_at > func.clock_timestamp()))


class DatasetCheck(Owned, Base):
    """A Ray job that checks a training file with a model."""

    __tablename__ = "checks"
    submission_id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    ended_at: Mapped[datetime | None]  # when that was noticed
    folder: Mapped[str]  # URI of what it leaves
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
    file_seconds: Mapped[int | None]  # how long the file shall live
    reading: Mapped[dict[str, Any] | None]  # of the file
    state: Mapped[str] = mapped_column(default="pending")
    file_id: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    __table_args__ = (
        CheckConstraint("state IN ('pending', 'completed', 'cancelled', 'expired')"),
        CheckConstraint("(state = 'completed') = (file_id IS NOT NULL)"),
    )


def reading_of(row: File | Upload) -> Reading:
    """How the rows of the file are read."""
    return Reading.model_validate(row.reading or {})


class UploadPart(Base):
    """Some bytes of an upload. Their order is told when it is completed."""

    __tablename__ = "upload_parts"
    id: Mapped[str] = mapped_column(primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id"), index=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    uri: Mapped[str]


class Job(Owned, Base):
    """One fine-tuning job. `desired` is the user's wish, `observed` what is; every move raises `version`."""

    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    spec: Mapped[dict[str, Any]]  # JobSpec
    model_source: Mapped[str]  # pinned at submission, with the base it descends from
    model_root: Mapped[str]
    base_source: Mapped[str | None]  # of the base that model_source, an adapter, stands on
    reference_source: Mapped[str | None]  # of the reference, if it is not the model that the job starts from
    priority: Mapped[int] = mapped_column(default=0)  # higher goes first
    desired: Mapped[str] = mapped_column(default="run")
    observed: Mapped[str] = mapped_column(default="queued")
    version: Mapped[int] = mapped_column(default=1)
    traceparent: Mapped[str | None]  # of the request that submitted it, where that was traced
    waits_for: Mapped[str | None]  # what keeps a queued job, or the next attempt, from starting, in words
    training: Mapped[dict[str, Any] | None]  # Started, once known: the resolved config, steps
    progress: Mapped[dict[str, Any] | None]  # {stage, done, total, started_at}: where the running attempt is
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
    """One move or wish of a job, never changed: replayed in order they give its state."""

    __tablename__ = "transitions"
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    version: Mapped[int]  # of the job, after it
    desired: Mapped[str]
    observed: Mapped[str]
    actor: Mapped[str]  # key id, or the control plane's name
    reason: Mapped[str]
    __table_args__ = (UniqueConstraint("job_id", "version"),)


class Attempt(Base):
    """One launch of a job on the cluster. Written before launching; at most one of a job is open."""

    __tablename__ = "attempts"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    state: Mapped[str] = mapped_column(default="launching")
    token: Mapped[
        str
    ]  # digests of what it may report with: its last two launches' secrets, then its own in their place
    next_seq: Mapped[int] = mapped_column(BigInteger, default=0)  # every report below is recorded
    reference: Mapped[str | None]  # app_name that must be served until its scores are in
    outcome: Mapped[dict[str, Any] | None]  # its Succeeded, Failed or Paused report
    reported_at: Mapped[datetime] = mapped_column(server_default=func.now())
    silent_seconds: Mapped[float] = column_property(  # when it was read, since its last sign of life
        cast(extract("epoch", func.clock_timestamp() - reported_at), Double)
    )
    num_accelerators: Mapped[float] = mapped_column(default=0)
    ended_at: Mapped[datetime | None]
    failed: Mapped[bool] = mapped_column(default=False)  # died by itself: may count towards max_attempts
    reason: Mapped[str | None]  # why it ended, or is being stopped, in words
    __table_args__ = (
        CheckConstraint("state IN ('launching', 'running', 'ended')"),
        CheckConstraint("(state = 'ended') = (ended_at IS NOT NULL)"),
        Index("attempts_one_open", "job_id", unique=True, postgresql_where=text("state <> 'ended'")),
        Index("attempts_by_end", "ended_at"),
    )

    @property
    def submission_id(self) -> str:
        """Of its job in Ray."""
        return f"{self.job_id}-{self.number}"


class Event(Base):
    """What a user sees of a job. (job, attempt, seq) is unique, so an attempt may send twice; attempt 0 is ours.

    Ids of one job's events rise in the order in which they become visible: a trigger sees to it.
    """

    __tablename__ = "events"
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    public_id: Mapped[str] = mapped_column(unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    attempt: Mapped[int] = mapped_column(default=0)
    seq: Mapped[int | None]  # None for our own
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    level: Mapped[str] = mapped_column(default="info")
    type: Mapped[str] = mapped_column(default="message")
    message: Mapped[str]
    data: Mapped[dict[str, Any] | None]
    step: Mapped[int | None]  # of metrics: a resumed attempt computes some steps again, and they are told once
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
    model_id: Mapped[str]  # a checkpoint is a model that can be queried
    metrics: Mapped[dict[str, Any]]
    __table_args__ = (UniqueConstraint("job_id", "step"),)


class Model(Owned, Base):
    """A trained policy, by the name that clients use. Base models live in the settings."""

    __tablename__ = "models"
    id: Mapped[str] = mapped_column(primary_key=True)  # ft:base:org:suffix:job's digits[:ckpt-step-n]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    source: Mapped[str]  # storage URI of a Hugging Face folder, or of an adapter's
    root: Mapped[str]  # base model's name
    base_source: Mapped[str | None]  # of what an adapter stands on; None: it holds all weights
    adapter: Mapped[dict[str, Any] | None]  # its options
    num_outputs: Mapped[int] = mapped_column(server_default="0")  # of a reward model's head; 0: it is no reward model
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    deleted_at: Mapped[datetime | None]
    removed_at: Mapped[datetime | None]  # its bytes, after it was deleted
    __table_args__ = (
        Index("models_by_time", "project_id", "created_at", "id"),
        Index("models_to_remove", "deleted_at", postgresql_where=text("deleted_at IS NOT NULL AND removed_at IS NULL")),
    )


class CheckpointPermission(Base):
    """Another project may use a model: a checkpoint, or a trained policy."""

    __tablename__ = "checkpoint_permissions"
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))  # which may
    __table_args__ = (UniqueConstraint("model_id", "project_id"),)


class WebhookEndpoint(Owned, Base):
    """Where a project wants to be told of its jobs."""

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
    old_secret_counts: Mapped[bool | None] = column_property(old_secret_until > func.clock_timestamp())  # when read
    num_failures: Mapped[int] = mapped_column(server_default="0")  # sends that failed, one after the other
    retry_at: Mapped[datetime | None]  # nothing is sent before, as it failed
    disabled_at: Mapped[datetime | None]  # it answered that it is gone
    deleted_at: Mapped[datetime | None]
    __table_args__ = (Index("webhook_endpoints_by_time", "project_id", "created_at", "id"),)


class Outbound(Base):
    """An effect outside the database, written in the transaction that causes it: one webhook to one endpoint."""

    __tablename__ = "outbox"
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("webhook_endpoints.id"))
    event_id: Mapped[str]  # evt_…, the same for all endpoints
    body: Mapped[dict[str, Any]]
    num_sends: Mapped[int] = mapped_column(default=0)
    due_at: Mapped[datetime | None] = mapped_column(server_default=func.now())  # None: delivered or given up
    outcome: Mapped[str | None]  # of the last send, in words
    __table_args__ = (Index("outbox_due", "endpoint_id", "due_at", "id", postgresql_where=text("due_at IS NOT NULL")),)


class AuditEntry(Base):
    """Who did what, and who was refused. Never changed."""

    __tablename__ = "audit_log"
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    key_id: Mapped[str]
    request_id: Mapped[str]
    action: Mapped[str]  # method and route
    object_id: Mapped[str | None]
    status: Mapped[int]
    code: Mapped[str | None]  # of a refusal
    num_requests: Mapped[int] = mapped_column(default=1)  # above 1: as many refusals, of which this is the first
    __table_args__ = (Index("audit_log_by_project", "project_id", "id"),)


class Deployment(Base):
    """A model that should be served: asked for by a request or by a job that needs its scores."""

    __tablename__ = "deployments"
    app_name: Mapped[str] = mapped_column(primary_key=True)
    model_id: Mapped[str]
    source: Mapped[str]
    asked_at: Mapped[datetime] = mapped_column(server_default=func.now())  # first; models that wait take turns by it
    last_used_at: Mapped[datetime] = mapped_column(server_default=func.now())
    placed_at: Mapped[datetime | None]  # since when it loads or runs
    ready_at: Mapped[datetime | None]  # since when it runs
    answered_at: Mapped[datetime | None]  # when a request, or an attempt that needs it, was last seen since then
    answering: Mapped[dict[str, Any]] = mapped_column(
        server_default="{}"
    )  # control planes that have requests of it in flight, each with the time in epoch seconds until which that counts
    waits_for: Mapped[str | None]  # what it waits for, in words; one that is placed gets no new requests then


class Instance(Base):
    """The one row is the service's identity: what it names on a shared Ray cluster begins with it."""

    __tablename__ = "instance"
    id: Mapped[str] = mapped_column(primary_key=True)


class Lease(Base):
    """Who acts. Times are the database's own."""

    __tablename__ = "leases"
    name: Mapped[str] = mapped_column(primary_key=True)
    holder: Mapped[str]
    expires_at: Mapped[datetime]
