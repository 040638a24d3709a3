"""Adds the column that marks engines (model servers) that only compute log-probabilities with reference models"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("deployments", sa.Column("scores", sa.Boolean(), server_default="false", nullable=False))


def downgrade() -> None:
    op.drop_column("deployments", "scores")
