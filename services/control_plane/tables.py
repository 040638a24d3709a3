"""The database's tables. PostgreSQL is the only truth about jobs; constraints hold what the prose promises."""

from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import BigInteger, CheckConstraint, DateTime, ForeignKey, Identity, Index, UniqueConstraint, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

JOB_STATES = ("queued", "running", "succeeded", "failed", "cancelled")
TERMINAL = ("succeeded", "failed", "cancelled")


class Base(DeclarativeBase):
    """Every time is timestamptz, every dict is jsonb."""

    type_annotation_map: ClassVar = {
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB(none_as_null=True),
        dict[str, str]: JSONB(none_as_null=True),
    }


class File(Base):
    """An uploaded or produced file. `deleted_at` keeps the row so that jobs still name it."""

    __tablename__ = "files"
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    filename: Mapped[str]
    purpose: Mapped[str]
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    uri: Mapped[str]
    report: Mapped[dict[str, Any] | None]  # FeedbackReport of a training file
    deleted_at: Mapped[datetime | None]
    __table_args__ = (Index("files_by_time", "created_at", "id"),)


class Job(Base):
    """One fine-tuning job. `desired` is the user's wish, `observed` what is; every move raises `version`."""

    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    spec: Mapped[dict[str, Any]]  # JobSpec
    model_source: Mapped[str]  # pinned at submission, with the base it descends from
    model_root: Mapped[str]
    desired: Mapped[str] = mapped_column(default="run")
    observed: Mapped[str] = mapped_column(default="queued")
    version: Mapped[int] = mapped_column(default=1)
    training: Mapped[dict[str, Any] | None]  # Started, once known: the resolved config, steps
    progress: Mapped[dict[str, Any] | None]  # {stage, done, total, started_at}: where the running attempt is
    error: Mapped[dict[str, Any] | None]  # {code, message, param}
    finished_at: Mapped[datetime | None]
    fine_tuned_model: Mapped[str | None]
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    result_file: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    __table_args__ = (
        CheckConstraint("desired IN ('run', 'cancel')"),
        CheckConstraint(f"observed IN {JOB_STATES}"),
        CheckConstraint(f"(observed IN {TERMINAL}) = (finished_at IS NOT NULL)"),
        CheckConstraint("(observed = 'succeeded') = (fine_tuned_model IS NOT NULL)"),
        CheckConstraint("(observed = 'failed') = (error IS NOT NULL)"),
        Index("jobs_by_time", "created_at", "id"),
        Index("jobs_live", "created_at", postgresql_where=text(f"observed NOT IN {TERMINAL}")),
    )


class Attempt(Base):
    """One launch of a job on the cluster. Written before launching; at most one of a job is open."""

    __tablename__ = "attempts"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    state: Mapped[str] = mapped_column(default="launching")
    token: Mapped[str]  # the attempt's own secret: it may only report on itself
    next_seq: Mapped[int] = mapped_column(BigInteger, default=0)  # every report below is recorded
    reference: Mapped[str | None]  # app_name that must be served until its scores are in
    outcome: Mapped[dict[str, Any] | None]  # its Succeeded or Failed report
    reported_at: Mapped[datetime] = mapped_column(server_default=func.now())
    ended_at: Mapped[datetime | None]
    failed: Mapped[bool] = mapped_column(default=False)  # died by itself: counts towards max_attempts
    reason: Mapped[str | None]  # why it ended, in words
    __table_args__ = (
        CheckConstraint("state IN ('launching', 'running', 'ended')"),
        CheckConstraint("(state = 'ended') = (ended_at IS NOT NULL)"),
        Index("attempts_one_open", "job_id", unique=True, postgresql_where=text("state <> 'ended'")),
    )


class Event(Base):
    """What a user sees of a job. (job, attempt, seq) is unique, so an attempt may send twice; attempt 0 is ours."""

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


class Model(Base):
    """A trained policy, by the name that clients use. Base models live in the settings."""

    __tablename__ = "models"
    id: Mapped[str] = mapped_column(primary_key=True)  # ft:base:org:suffix:xxxxxxxx[:ckpt-step-n]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    source: Mapped[str]  # storage URI of a Hugging Face folder
    root: Mapped[str]  # base model's name
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    deleted_at: Mapped[datetime | None]


class Deployment(Base):
    """A model that should be served: asked for by a request or by a job that needs its scores."""

    __tablename__ = "deployments"
    app_name: Mapped[str] = mapped_column(primary_key=True)
    model_id: Mapped[str]
    source: Mapped[str]
    last_used_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Lease(Base):
    """Who acts. Times are the database's own."""

    __tablename__ = "leases"
    name: Mapped[str] = mapped_column(primary_key=True)
    holder: Mapped[str]
    expires_at: Mapped[datetime]
