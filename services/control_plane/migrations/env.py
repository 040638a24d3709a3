"""Runs the migrations for Alembic. A lock in the database makes control planes that start together migrate only
once."""

from alembic import context
from sqlalchemy import create_engine, text

from services.control_plane.core.tables import Base

MIGRATION_LOCK = 0x7261_7964_706F  # "raydpo"

engine = create_engine(context.config.attributes["database_url"])
with engine.begin() as connection:
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
    context.configure(connection=connection, target_metadata=Base.metadata)
    context.run_migrations()
engine.dispose()
