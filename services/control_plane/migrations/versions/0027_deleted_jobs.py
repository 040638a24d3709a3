"""Adds the times at which a job was deleted, and its unneeded files were removed. Allows to delete its transitions, too

Revision ID: 0027 Revises: 0026
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision = "0027"
down_revision = "0026"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

INDEXES = {
    "jobs_by_deletion": ("deleted_at", "deleted_at IS NOT NULL"),
    "jobs_to_clear": ("finished_at", "finished_at IS NOT NULL AND cleared_at IS NULL"),
}


def upgrade() -> None:
    for name in ("deleted_at", "cleared_at"):
        op.add_column("jobs", sa.Column(name, sa.DateTime(timezone=True)))
    op.create_check_constraint("jobs_deleted_check", "jobs", "deleted_at IS NULL OR finished_at IS NOT NULL")
    for name, (column, condition) in INDEXES.items():
        op.create_index(name, "jobs", [column], postgresql_where=sa.text(condition))
    op.create_index("models_by_job", "models", ["job_id"])
    op.execute("DROP TRIGGER append_only ON transitions")
    _refuse("UPDATE OR TRUNCATE")
    op.execute(
        "CREATE FUNCTION refuse_deletion() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF EXISTS (SELECT FROM jobs WHERE id = OLD.job_id AND deleted_at IS NOT NULL) THEN RETURN OLD; END IF;"
        " RAISE EXCEPTION '% is append-only while its job exists', TG_TABLE_NAME; END $$"
    )
    op.execute(
        "CREATE TRIGGER deleted_with_job BEFORE DELETE ON transitions FOR EACH ROW EXECUTE FUNCTION refuse_deletion()"
    )


def downgrade() -> None:
    """Removes what this migration added. Jobs that were deleted are shown again, without their events."""
    op.execute("DROP TRIGGER deleted_with_job ON transitions")
    op.execute("DROP TRIGGER append_only ON transitions")
    _refuse("UPDATE OR DELETE OR TRUNCATE")
    op.execute("DROP FUNCTION refuse_deletion")
    op.drop_index("models_by_job", "models")
    for name in INDEXES:
        op.drop_index(name, "jobs")
    op.drop_constraint("jobs_deleted_check", "jobs")
    for name in ("deleted_at", "cleared_at"):
        op.drop_column("jobs", name)


def _refuse(changes: str) -> None:
    op.execute(
        f"CREATE TRIGGER append_only BEFORE {changes} ON transitions"
        " FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
    )
