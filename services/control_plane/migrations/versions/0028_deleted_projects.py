"""Adds when a project was deleted, and when everything that it owned was gone

Revision ID: 0028 Revises: 0027
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision = "0028"
down_revision = "0027"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    for name in ("deleted_at", "erased_at"):
        op.add_column("projects", sa.Column(name, sa.DateTime(timezone=True)))
    op.create_check_constraint("projects_deleted_check", "projects", "deleted_at IS NULL OR archived_at IS NOT NULL")


def downgrade() -> None:
    """Removes what this migration added. Deleted projects are shown again, as archived ones."""
    op.drop_constraint("projects_deleted_check", "projects")
    for name in ("deleted_at", "erased_at"):
        op.drop_column("projects", name)
