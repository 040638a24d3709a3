"""Adds the tables of sweeps, of their evaluations and of their trials (jobs with chosen values)

Revision ID: 0021 Revises: 0020
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0021"
down_revision = "0020"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    moment = sa.DateTime(timezone=True)
    op.create_table(
        "sweeps",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("created_at", moment, server_default=sa.func.now(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("spec", JSONB(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("num_trials", sa.Integer(), nullable=False),
        sa.Column("waits_for", sa.String()),
        sa.Column("error", JSONB()),
        sa.Column("finished_at", moment),
        sa.Column("project_id", sa.String(), sa.ForeignKey("projects.id"), nullable=False),
        sa.CheckConstraint("state IN ('running', 'succeeded', 'failed', 'cancelled')"),
        sa.CheckConstraint("(state = 'running') = (finished_at IS NULL)"),
        sa.CheckConstraint("(state = 'failed') = (error IS NOT NULL)"),
    )
    op.create_index("sweeps_by_time", "sweeps", ["project_id", "created_at", "id"])
    op.create_index("sweeps_live", "sweeps", ["created_at"], postgresql_where=sa.text("state = 'running'"))
    op.create_table(
        "sweep_evaluations",
        sa.Column("sweep_id", sa.String(), sa.ForeignKey("sweeps.id"), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("spec", JSONB(), nullable=False),
        sa.Column("rows", JSONB(), nullable=False),
    )
    op.create_table(
        "sweep_trials",
        sa.Column("sweep_id", sa.String(), sa.ForeignKey("sweeps.id"), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("created_at", moment, server_default=sa.func.now(), nullable=False),
        sa.Column("parameters", JSONB(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("job_id", sa.String(), sa.ForeignKey("jobs.id"), unique=True),
        sa.Column("evaluations", JSONB(), nullable=False),
        sa.Column("results", JSONB(), nullable=False),
        sa.Column("value", sa.Float()),
        sa.Column("error", JSONB()),
        sa.CheckConstraint(
            "state IN ('training', 'evaluating', 'succeeded', 'failed', 'stopped', 'cancelled')",
        ),
    )


def downgrade() -> None:
    op.drop_table("sweep_trials")
    op.drop_table("sweep_evaluations")
    op.drop_table("sweeps")
