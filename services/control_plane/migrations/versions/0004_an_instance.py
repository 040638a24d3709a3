"""Adds the id of the service, by which it recognizes its own applications on a shared cluster"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.create_table("instance", sa.Column("id", sa.String(), nullable=False), sa.PrimaryKeyConstraint("id"))
    op.execute("INSERT INTO instance VALUES (left(gen_random_uuid()::text, 8))")


def downgrade() -> None:
    op.drop_table("instance")
