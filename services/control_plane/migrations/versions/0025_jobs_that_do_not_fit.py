"""Adds the time since which the cluster is too small for a job, or for the next job of a sweep or of a set of rounds

Revision ID: 0025 Revises: 0024
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

TABLES = ("jobs", "sweeps", "rounds")


def upgrade() -> None:
    for table in TABLES:
        op.add_column(table, sa.Column("misfit_since", sa.DateTime(timezone=True)))


def downgrade() -> None:
    for table in TABLES:
        op.drop_column(table, "misfit_since")
