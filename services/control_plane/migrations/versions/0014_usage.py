"""Adds the table of usage, which counts the use of models by API keys, and the keys' limits of tokens per minute"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("keys", sa.Column("tokens_per_minute", sa.Integer()))
    op.create_table(
        "usage",
        sa.Column("project_id", sa.String(), primary_key=True),
        sa.Column("key_id", sa.String(), primary_key=True),
        sa.Column("model_id", sa.String(), primary_key=True),
        sa.Column("day", sa.Date(), primary_key=True),
        sa.Column("num_requests", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("accelerator_seconds", sa.Double(), nullable=False),
    )
    op.create_index("usage_by_day", "usage", ["day"])
    op.create_table(
        "usage_writers",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("batch", sa.BigInteger(), nullable=False),
        sa.Column("written_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("usage_writers")
    op.drop_table("usage")
    op.drop_column("keys", "tokens_per_minute")
