"""Adds times to jobs, sweeps and rounds: since when the cluster is too small for them, and when this was last seen

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
COLUMNS = ("misfit_since", "misfit_seen_at")


def upgrade() -> None:
    for table in TABLES:
        for column in COLUMNS:
            op.add_column(table, sa.Column(column, sa.DateTime(timezone=True)))


def downgrade() -> None:
    for table in TABLES:
        for column in COLUMNS:
            op.drop_column(table, column)
