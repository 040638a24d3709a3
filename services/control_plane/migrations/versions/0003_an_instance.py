"""The id by which a service knows what is its own on a shared cluster"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.create_table("instance", sa.Column("id", sa.String(), nullable=False), sa.PrimaryKeyConstraint("id"))
    op.execute("INSERT INTO instance VALUES (left(gen_random_uuid()::text, 8))")


def downgrade() -> None:
    op.drop_table("instance")
