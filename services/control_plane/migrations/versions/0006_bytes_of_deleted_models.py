"""Adds a column that marks deleted models whose files are still in storage"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("models", sa.Column("removed_at", sa.DateTime(timezone=True)))
    where = sa.text("deleted_at IS NOT NULL AND removed_at IS NULL")
    op.create_index("models_to_remove", "models", ["deleted_at"], postgresql_where=where)


def downgrade() -> None:
    op.drop_index("models_to_remove", table_name="models")
    op.drop_column("models", "removed_at")
