"""Adds the id of the changed object to stored responses, to distinguish a resent request from a new change"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("answers", sa.Column("object_id", sa.String(), nullable=True))
    where = sa.text("object_id IS NOT NULL")
    op.create_index("answers_by_object", "answers", ["object_id", "id"], postgresql_where=where)


def downgrade() -> None:
    op.drop_index("answers_by_object", "answers")
    op.drop_column("answers", "object_id")
