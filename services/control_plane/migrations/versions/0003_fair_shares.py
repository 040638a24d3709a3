"""Fair shares: weights of projects, and what is looked at to find whose turn it is"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("projects", sa.Column("weight", sa.Double(), server_default="1", nullable=False))
    op.create_index("attempts_by_end", "attempts", ["ended_at"])


def downgrade() -> None:
    op.drop_index("attempts_by_end", table_name="attempts")
    op.drop_column("projects", "weight")
