"""Adds a column that marks models that only jobs have requested, so that they are unloaded when no job needs them

Revision ID: 0023 Revises: 0022
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("deployments", sa.Column("for_jobs", sa.Boolean(), server_default="false", nullable=False))


def downgrade() -> None:
    op.drop_column("deployments", "for_jobs")
