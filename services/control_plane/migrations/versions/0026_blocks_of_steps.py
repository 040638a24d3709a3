"""Adds the table of blocks, which hold the metrics of many training steps in little space

Revision ID: 0026 Revises: 0025
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0026"
down_revision = "0025"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "step_blocks",
        sa.Column("job_id", sa.String(), sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True),
        sa.Column("first_event", sa.BigInteger(), nullable=False),
        sa.Column("last_event", sa.BigInteger(), nullable=False),
        sa.Column("steps", postgresql.INT8MULTIRANGE(), nullable=False),
        sa.Column("metrics", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("parquet", sa.LargeBinary(), nullable=False),
        sa.Column("sums", sa.LargeBinary(), nullable=False),
    )
    for column in ("parquet", "sums"):  # they are compressed already
        op.execute(f"ALTER TABLE step_blocks ALTER COLUMN {column} SET STORAGE EXTERNAL")
    op.create_index("step_blocks_by_event", "step_blocks", ["job_id", "last_event"])
    op.add_column("jobs", sa.Column("steps_packed", sa.Boolean(), server_default="false", nullable=False))
    to_pack = sa.text("finished_at IS NOT NULL AND NOT steps_packed")
    op.create_index("jobs_to_pack", "jobs", ["finished_at"], postgresql_where=to_pack)


def downgrade() -> None:
    """Removes the table of blocks. The metrics and events of training steps in the blocks are lost."""
    op.drop_index("jobs_to_pack", "jobs")
    op.drop_column("jobs", "steps_packed")
    op.drop_table("step_blocks")
