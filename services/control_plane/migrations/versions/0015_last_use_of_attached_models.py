"""Adds the time at which an adapter was last used on the engine (model server) of its base model.

Revision ID: 0015 Revises: 0014
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("models", sa.Column("attached_at", sa.DateTime(timezone=True)))


def downgrade() -> None:
    op.drop_column("models", "attached_at")
