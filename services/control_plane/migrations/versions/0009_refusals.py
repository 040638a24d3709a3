"""Adds the columns of the audit log that describe refused requests"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("audit_log", sa.Column("code", sa.String()))
    op.add_column(
        "audit_log", sa.Column("num_requests", sa.Integer(), server_default="1", nullable=False)
    )  # the previous release writes rows without this column


def downgrade() -> None:
    for column in ("num_requests", "code"):
        op.drop_column("audit_log", column)
