"""Adds the options for reading a file's rows: the columns that hold prompts and completions, and the treatment of bad
rows
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    for table in ("files", "uploads"):
        op.add_column(table, sa.Column("reading", postgresql.JSONB(none_as_null=True, astext_type=sa.Text())))


def downgrade() -> None:
    for table in ("files", "uploads"):
        op.drop_column(table, "reading")
