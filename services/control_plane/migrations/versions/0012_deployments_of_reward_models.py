"""Adds the number of outputs of a requested model, without which the service could not deploy reward models"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("deployments", sa.Column("num_outputs", sa.Integer(), server_default="0", nullable=False))


def downgrade() -> None:
    op.drop_column("deployments", "num_outputs")
