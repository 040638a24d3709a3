"""Adds the base model and the options of trained adapters, and the reference model that a user chose"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0008"
down_revision = "0007"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("models", sa.Column("base_source", sa.String()))
    op.add_column("models", sa.Column("adapter", JSONB()))
    op.add_column("models", sa.Column("num_outputs", sa.Integer(), server_default="0", nullable=False))
    op.add_column("jobs", sa.Column("base_source", sa.String()))
    op.add_column("jobs", sa.Column("reference_source", sa.String()))


def downgrade() -> None:
    for column in ("reference_source", "base_source"):
        op.drop_column("jobs", column)
    for column in ("num_outputs", "adapter", "base_source"):
        op.drop_column("models", column)
