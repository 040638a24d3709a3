"""Adds the tables of projects, API keys, uploads in parts, job transitions and webhooks"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

OWNED = ("files", "jobs", "models")  # the tables that are older than projects
APPEND_ONLY = ("transitions", "audit_log")


def upgrade() -> None:
    op.create_table(
        "projects",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("archived_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("max_running_jobs", sa.Integer(), nullable=True),
        sa.Column("max_queued_jobs", sa.Integer(), nullable=True),
        sa.Column("max_bytes", sa.BigInteger(), nullable=True),
        sa.Column("max_accelerator_hours", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name"),
    )
    op.create_table(
        "answers",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("idempotency_key", sa.String(), nullable=True),
        sa.Column("request", sa.String(), nullable=False),
        sa.Column("content", sa.String(), nullable=False),
        sa.Column("retry_count", sa.Integer(), nullable=False),
        sa.Column("body", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["project_id"],
            ["projects.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("project_id", "idempotency_key"),
    )
    op.create_index("answers_by_content", "answers", ["content", "created_at"], unique=False)
    op.create_index("answers_by_time", "answers", ["created_at"], unique=False)
    op.create_table(
        "audit_log",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("request_id", sa.String(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("object_id", sa.String(), nullable=True),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["project_id"],
            ["projects.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("audit_log_by_project", "audit_log", ["project_id", "id"], unique=False)
    op.create_table(
        "keys",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("hint", sa.String(), nullable=False),
        sa.Column("scopes", sa.ARRAY(sa.Text()), nullable=False),
        sa.Column("requests_per_minute", sa.Integer(), nullable=True),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["project_id"],
            ["projects.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("sha256"),
    )
    op.create_table(
        "webhook_endpoints",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("url", sa.String(), nullable=False),
        sa.Column("event_types", sa.ARRAY(sa.Text()), nullable=False),
        sa.Column("secret", sa.String(), nullable=False),
        sa.Column("old_secret", sa.String(), nullable=True),
        sa.Column("old_secret_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("disabled_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["project_id"],
            ["projects.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("webhook_endpoints_by_time", "webhook_endpoints", ["project_id", "created_at", "id"], unique=False)
    op.create_table(
        "outbox",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("endpoint_id", sa.String(), nullable=False),
        sa.Column("event_id", sa.String(), nullable=False),
        sa.Column("body", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=False),
        sa.Column("num_sends", sa.Integer(), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=True),
        sa.Column("outcome", sa.String(), nullable=True),
        sa.ForeignKeyConstraint(
            ["endpoint_id"],
            ["webhook_endpoints.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("outbox_due", "outbox", ["due_at"], unique=False, postgresql_where=sa.text("due_at IS NOT NULL"))
    op.create_table(
        "uploads",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("filename", sa.String(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("mime_type", sa.String(), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("file_seconds", sa.Integer(), nullable=True),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("file_id", sa.String(), nullable=True),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.CheckConstraint("(state = 'completed') = (file_id IS NOT NULL)"),
        sa.CheckConstraint("state IN ('pending', 'completed', 'cancelled', 'expired')"),
        sa.ForeignKeyConstraint(
            ["file_id"],
            ["files.id"],
        ),
        sa.ForeignKeyConstraint(
            ["project_id"],
            ["projects.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "transitions",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("desired", sa.String(), nullable=False),
        sa.Column("observed", sa.String(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"],
            ["jobs.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("job_id", "version"),
    )
    op.create_index("ix_transitions_job_id", "transitions", ["job_id"], unique=False)
    op.create_table(
        "upload_parts",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("upload_id", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("uri", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["upload_id"],
            ["uploads.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_upload_parts_upload_id", "upload_parts", ["upload_id"], unique=False)
    op.create_table(
        "checkpoint_permissions",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("project_id", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["model_id"],
            ["models.id"],
        ),
        sa.ForeignKeyConstraint(
            ["project_id"],
            ["projects.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("model_id", "project_id"),
    )
    op.execute("INSERT INTO projects (id, name) VALUES ('proj_default', 'default')")
    for table in OWNED:
        owner = sa.Column("project_id", sa.String(), sa.ForeignKey("projects.id"), server_default="proj_default")
        op.add_column(table, owner)
        op.alter_column(table, "project_id", nullable=False, server_default=None)
    for table in ("files", "jobs"):
        op.drop_index(f"{table}_by_time", table_name=table)
        op.create_index(f"{table}_by_time", table, ["project_id", "created_at", "id"])
    op.add_column("files", sa.Column("expires_at", sa.DateTime(timezone=True)))
    op.add_column("files", sa.Column("refusal", sa.String()))
    op.add_column("files", sa.Column("num_checked", sa.BigInteger()))
    unchecked = sa.text("purpose = 'fine-tune' AND report IS NULL AND refusal IS NULL AND deleted_at IS NULL")
    op.create_index("files_unchecked", "files", ["created_at"], postgresql_where=unchecked)
    op.add_column("jobs", sa.Column("waits_for", sa.String()))
    op.add_column("jobs", sa.Column("traceparent", sa.String()))
    for table, column in (
        ("attempts", sa.Column("num_accelerators", sa.Double(), server_default="0", nullable=False)),
        ("jobs", sa.Column("priority", sa.Integer(), server_default="0", nullable=False)),
    ):
        op.add_column(table, column)
        op.alter_column(table, column.name, server_default=None)
    _allow("desired", "run", "pause", "cancel")
    _allow("observed", "queued", "running", "paused", "succeeded", "failed", "cancelled")
    op.execute(
        "INSERT INTO transitions (job_id, version, desired, observed, actor, reason)"
        " SELECT id, version, desired, observed, 'migration', 'as it was found' FROM jobs"
    )
    op.execute(
        "CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION '% is append-only', TG_TABLE_NAME; END $$"
    )
    for table in APPEND_ONLY:
        op.execute(
            f"CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table}"
            " FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
        )
    _tell_of_jobs()


def _tell_of_jobs() -> None:
    """Creates triggers that send the id of every changed job, and of every job with new events, to the channel `jobs`.

    The events of a job get their ids while the job's row is locked, so they become visible in the order of their ids. A
    reader that asks for events after the last id that it has seen therefore misses none.
    """
    op.execute(
        "CREATE FUNCTION order_event() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " PERFORM FROM jobs WHERE id = NEW.job_id FOR NO KEY UPDATE;"
        " NEW.id := nextval(pg_get_serial_sequence('events', 'id'));"
        " PERFORM pg_notify('jobs', NEW.job_id);"
        " RETURN NEW; END $$"
    )
    op.execute("CREATE TRIGGER in_order BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION order_event()")
    op.execute(
        "CREATE FUNCTION tell_of_job() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_notify('jobs', NEW.id); RETURN NULL; END $$"
    )
    op.execute("CREATE TRIGGER told AFTER UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION tell_of_job()")


def _allow(column: str, *values: str) -> None:
    name = f"jobs_{column}_check"
    op.drop_constraint(name, "jobs", type_="check")
    op.create_check_constraint(name, "jobs", sa.column(column).in_(values))


def downgrade() -> None:
    """Removes what this migration added. Jobs that are paused, or that users want to pause, must end first."""
    op.execute("DROP TRIGGER told ON jobs")
    op.execute("DROP TRIGGER in_order ON events")
    op.execute("DROP FUNCTION tell_of_job, order_event")
    _allow("desired", "run", "cancel")
    _allow("observed", "queued", "running", "succeeded", "failed", "cancelled")
    op.drop_column("attempts", "num_accelerators")
    op.drop_column("jobs", "priority")
    op.drop_column("jobs", "waits_for")
    op.drop_column("jobs", "traceparent")
    op.drop_index("files_unchecked", table_name="files")
    for column in ("expires_at", "refusal", "num_checked"):
        op.drop_column("files", column)
    for table in ("checkpoint_permissions", "upload_parts", "uploads", "outbox", "webhook_endpoints", "transitions"):
        op.drop_table(table)
    for table in OWNED:
        op.drop_column(table, "project_id")
    for table in ("files", "jobs"):
        op.create_index(f"{table}_by_time", table, ["created_at", "id"])
    for table in ("keys", "audit_log", "answers", "projects"):
        op.drop_table(table)
    op.execute("DROP FUNCTION refuse_change")
