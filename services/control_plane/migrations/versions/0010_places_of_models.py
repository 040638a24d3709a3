"""Adds the columns that say which models are loaded, which control planes use them, and what other models wait for"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0010"
down_revision = "0009"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

TIMES = ("placed_at", "ready_at", "answered_at")


def upgrade() -> None:
    """Adds columns to the table `deployments`: which models are loaded, which control planes use them, and what other
    models wait for. The columns have defaults, because the previous release still writes rows without them.
    """
    op.add_column(
        "deployments",
        sa.Column("asked_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
    )
    for name in TIMES:
        op.add_column("deployments", sa.Column(name, sa.DateTime(timezone=True)))
    op.add_column("deployments", sa.Column("answering", JSONB(), server_default="{}", nullable=False))
    op.add_column("deployments", sa.Column("waits_for", sa.String()))


def downgrade() -> None:
    for column in ("waits_for", "answering", *TIMES, "asked_at"):
        op.drop_column("deployments", column)
