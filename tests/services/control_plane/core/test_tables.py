"""The migrations lead to the tables as they are declared."""

import subprocess
import sys

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import create_engine

from services.control_plane.core import store
from services.control_plane.core.store import migrate
from services.control_plane.core.tables import Base


def test_the_migrated_database_is_what_the_tables_declare(database_url: str) -> None:
    migrate(database_url)
    engine = create_engine(database_url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    engine.dispose()


def test_migrating_again_changes_nothing(database_url: str) -> None:
    migrate(database_url)


def test_a_database_of_the_first_schema_keeps_its_jobs(database_url: str) -> None:
    """They belong to the default project then, and have a transition to start from."""
    config = Config()
    config.set_main_option("script_location", str(store.MIGRATIONS))
    config.attributes["database_url"] = database_url.replace("postgresql://", "postgresql+psycopg://")
    command.downgrade(config, "0001")
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "INSERT INTO jobs (id, spec, model_source, model_root, desired, observed, version)"
            " VALUES ('ftjob-old', '{}', '/m', 'm', 'run', 'queued', 3)"
        )
    migrate(database_url)
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT project_id, priority FROM jobs").fetchall() == [("proj_default", 0)]
        moves = connection.execute("SELECT job_id, version, desired, observed FROM transitions").fetchall()
        assert moves == [("ftjob-old", 3, "run", "queued")]
        with pytest.raises(psycopg.errors.RaiseException, match="append-only"):
            connection.execute("DELETE FROM transitions")


@pytest.mark.slow
def test_replicas_that_start_together_migrate_once(postgres_url: str) -> None:
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("CREATE DATABASE started_together")
        url = postgres_url.replace("/postgres?", "/started_together?")
        program = "import sys; from services.control_plane.core.store import migrate; migrate(sys.argv[1])"
        replicas = [subprocess.Popen([sys.executable, "-c", program, url]) for _ in range(3)]
        assert [replica.wait(300) for replica in replicas] == [0, 0, 0]
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT count(*) FROM alembic_version").fetchone() == (1,)
        assert connection.execute("SELECT count(*) FROM projects").fetchone() == (1,)
