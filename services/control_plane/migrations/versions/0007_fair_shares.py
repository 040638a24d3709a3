"""Adds the weights of projects, and the columns that decide which project's job starts next"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("projects", sa.Column("weight", sa.Double(), server_default="1", nullable=False))
    op.create_index("attempts_by_end", "attempts", ["ended_at"])
    op.add_column("webhook_endpoints", sa.Column("num_failures", sa.Integer(), server_default="0", nullable=False))
    op.add_column("webhook_endpoints", sa.Column("retry_at", sa.DateTime(timezone=True)))
    _index_outbox("endpoint_id", "due_at", "id")
    op.create_table(
        "checks",
        sa.Column("submission_id", sa.String(), primary_key=True),
        sa.Column("project_id", sa.String(), sa.ForeignKey("projects.id"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.Column("folder", sa.String(), nullable=False),
    )
    op.execute("UPDATE attempts SET token = encode(sha256(convert_to(token, 'UTF8')), 'hex')")
    op.create_index("models_by_time", "models", ["project_id", "created_at", "id"])
    op.create_index("checks_by_end", "checks", ["ended_at", "project_id"])


def _index_outbox(*columns: str) -> None:
    op.drop_index("outbox_due", table_name="outbox")
    op.create_index("outbox_due", "outbox", columns, postgresql_where=sa.text("due_at IS NOT NULL"))


def downgrade() -> None:
    op.drop_table("checks")
    op.drop_index("models_by_time", table_name="models")
    _index_outbox("due_at")
    for column in ("retry_at", "num_failures"):
        op.drop_column("webhook_endpoints", column)
    op.drop_index("attempts_by_end", table_name="attempts")
    op.drop_column("projects", "weight")
