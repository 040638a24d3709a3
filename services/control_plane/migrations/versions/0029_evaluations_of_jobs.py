"""Adds the table of the evaluations that jobs have asked for

Revision ID: 0029 Revises: 0028
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0029"
down_revision = "0028"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    moment = sa.DateTime(timezone=True)
    op.create_table(
        "job_evaluations",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("created_at", moment, server_default=sa.func.now(), nullable=False),
        sa.Column("job_id", sa.String(), sa.ForeignKey("jobs.id"), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("state", sa.String(), server_default="waiting", nullable=False),
        sa.Column("evaluation_id", sa.String()),
        sa.Column("waits_for", sa.String()),
        sa.Column("troubled_at", moment),
        sa.Column("error", JSONB()),
        sa.Column("project_id", sa.String(), sa.ForeignKey("projects.id"), nullable=False),
        sa.UniqueConstraint("job_id", "name", "model_id"),
        sa.CheckConstraint("state IN ('waiting', 'evaluating', 'succeeded', 'failed', 'cancelled')"),
        sa.CheckConstraint("state NOT IN ('evaluating', 'succeeded') OR evaluation_id IS NOT NULL"),
        sa.CheckConstraint("(state = 'failed') = (error IS NOT NULL)"),
    )
    live = sa.text("state IN ('waiting', 'evaluating')")
    op.create_index("job_evaluations_live", "job_evaluations", ["created_at"], postgresql_where=live)


def downgrade() -> None:
    op.drop_table("job_evaluations")
