"""Adds indexes for finding models by their weights, by their base model, and by the time of their deletion.

Revision ID: 0016 Revises: 0015
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.create_index("models_by_source", "models", ["source"])
    op.create_index("models_by_base", "models", ["base_source"])
    lately = sa.text("deleted_at IS NOT NULL")
    op.create_index("models_by_deletion", "models", ["deleted_at"], postgresql_where=lately)


def downgrade() -> None:
    for name in ("models_by_deletion", "models_by_base", "models_by_source"):
        op.drop_index(name, "models")
