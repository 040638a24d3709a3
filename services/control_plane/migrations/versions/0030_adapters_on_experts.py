"""Adds a column that marks adapters on the experts of a mixture, which vLLM cannot attach

Revision ID: 0030 Revises: 0029
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision = "0030"
down_revision = "0029"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("models", sa.Column("on_experts", sa.Boolean(), server_default="false", nullable=False))


def downgrade() -> None:
    op.drop_column("models", "on_experts")
