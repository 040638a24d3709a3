"""Adds the state `paused` to the states that an evaluation may have

Revision ID: 0020 Revises: 0019
"""

from collections.abc import Sequence

from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

CHECK, TABLE = "evaluations_state_check", "evaluations"


def upgrade() -> None:
    _allow("queued", "running", "paused", "succeeded", "failed", "cancelled")


def downgrade() -> None:
    op.execute("UPDATE evaluations SET state = 'queued' WHERE state = 'paused'")
    _allow("queued", "running", "succeeded", "failed", "cancelled")


def _allow(*states: str) -> None:
    op.drop_constraint(CHECK, TABLE)
    op.create_check_constraint(CHECK, TABLE, f"state IN {states}")
