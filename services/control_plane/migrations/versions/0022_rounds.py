"""Adds the table of sets of rounds (repeated training of a policy on its own scored answers)

Revision ID: 0022 Revises: 0021
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0022"
down_revision = "0021"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

ENDS = "('succeeded', 'failed', 'cancelled')"


def upgrade() -> None:
    moment = sa.DateTime(timezone=True)
    op.create_table(
        "rounds",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("created_at", moment, server_default=sa.func.now(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("spec", JSONB(), nullable=False),
        sa.Column("prompts", JSONB(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("history", JSONB(), nullable=False),
        sa.Column("waits_for", sa.String()),
        sa.Column("troubled_at", moment),
        sa.Column("end_reason", sa.String()),
        sa.Column("error", JSONB()),
        sa.Column("finished_at", moment),
        sa.Column("project_id", sa.String(), sa.ForeignKey("projects.id"), nullable=False),
        sa.CheckConstraint("state IN ('running', 'paused', 'succeeded', 'failed', 'cancelled')"),
        sa.CheckConstraint(f"(state IN {ENDS}) = (finished_at IS NOT NULL)"),
        sa.CheckConstraint("(state = 'succeeded') = (end_reason IS NOT NULL)"),
        sa.CheckConstraint("(state = 'failed') = (error IS NOT NULL)"),
    )
    op.create_index("rounds_by_time", "rounds", ["project_id", "created_at", "id"])
    live = sa.text(f"state NOT IN {ENDS}")
    op.create_index("rounds_live", "rounds", ["created_at"], postgresql_where=live)


def downgrade() -> None:
    op.drop_table("rounds")
