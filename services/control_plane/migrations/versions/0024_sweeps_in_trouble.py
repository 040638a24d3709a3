"""Adds the time since which a sweep cannot go on because of unexpected errors, so that it is not tried forever

Revision ID: 0024 Revises: 0023
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("sweeps", sa.Column("troubled_at", sa.DateTime(timezone=True)))


def downgrade() -> None:
    op.drop_column("sweeps", "troubled_at")
