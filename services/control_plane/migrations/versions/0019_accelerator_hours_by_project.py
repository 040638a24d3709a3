"""Adds a column to each project: the sum of the accelerator hours of its ended attempts (runs of jobs on Ray).

Before, this sum was computed anew every second.

Revision ID: 0019 Revises: 0018
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("projects", sa.Column("accelerator_hours", sa.Float, nullable=False, server_default="0"))
    op.execute("""
        UPDATE projects SET accelerator_hours = ended.hours FROM (
            SELECT jobs.project_id, sum(
                attempts.num_accelerators * extract(epoch FROM attempts.ended_at - attempts.created_at) / 3600
            ) AS hours
            FROM attempts JOIN jobs ON jobs.id = attempts.job_id WHERE attempts.ended_at IS NOT NULL
            GROUP BY jobs.project_id
        ) AS ended WHERE ended.project_id = projects.id
    """)


def downgrade() -> None:
    op.drop_column("projects", "accelerator_hours")
