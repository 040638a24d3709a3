"""Adds the tables of evaluations and of their items (prompts)

Revision ID: 0018 Revises: 0017
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0018"
down_revision = "0017"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

ENDS = "('succeeded', 'failed', 'cancelled')"


def upgrade() -> None:
    moment = sa.DateTime(timezone=True)
    op.create_table(
        "evaluations",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("created_at", moment, server_default=sa.func.now(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("spec", JSONB(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        *(
            sa.Column(name, sa.Integer(), nullable=False)
            for name in ("num_items", "num_stages", "num_stages_done", "num_completed", "num_failed")
        ),
        *(sa.Column(name, moment) for name in ("started_at", "progressed_at", "finished_at")),
        sa.Column("waits_for", sa.String()),
        sa.Column("results", JSONB()),
        sa.Column("error", JSONB()),
        sa.Column("project_id", sa.String(), sa.ForeignKey("projects.id"), nullable=False),
        sa.CheckConstraint("state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')"),
        sa.CheckConstraint(f"(state IN {ENDS}) = (finished_at IS NOT NULL)"),
        sa.CheckConstraint("(state = 'succeeded') = (results IS NOT NULL)"),
        sa.CheckConstraint("(state = 'failed') = (error IS NOT NULL)"),
    )
    op.create_index("evaluations_by_time", "evaluations", ["project_id", "created_at", "id"])
    live = sa.text(f"state NOT IN {ENDS}")
    op.create_index("evaluations_live", "evaluations", ["created_at"], postgresql_where=live)
    op.create_table(
        "evaluation_items",
        sa.Column("evaluation_id", sa.String(), sa.ForeignKey("evaluations.id"), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("row", JSONB(), nullable=False),
        sa.Column("stage", sa.Integer(), nullable=False),
        sa.Column("found", JSONB(), server_default="{}", nullable=False),
        sa.Column("num_tries", sa.Integer(), nullable=False),
        sa.Column("due_at", moment),
        sa.Column("error", JSONB()),
    )


def downgrade() -> None:
    op.drop_table("evaluation_items")
    op.drop_table("evaluations")
