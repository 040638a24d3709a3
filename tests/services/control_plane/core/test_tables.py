"""Tests that the migrations lead to the tables that the code declares."""

import subprocess
import sys
from itertools import pairwise

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
from tests.conftest import new_database


def test_the_migrated_database_is_what_the_tables_declare(database_url: str) -> None:
    migrate(database_url)
    engine = create_engine(database_url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    engine.dispose()


def test_migrating_again_changes_nothing(database_url: str) -> None:
    migrate(database_url)


def test_a_database_of_the_first_schema_keeps_its_jobs(database_url: str) -> None:
    """After the migration, they belong to the default project, and have a first transition."""
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


def test_accelerator_hours_of_earlier_releases_count(database_url: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(store.MIGRATIONS))
    config.attributes["database_url"] = database_url.replace("postgresql://", "postgresql+psycopg://")
    migrate(database_url)
    command.downgrade(config, "0018")
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "INSERT INTO jobs (id, project_id, spec, model_source, model_root, priority, desired, observed, version)"
            " VALUES ('ftjob-ran', 'proj_default', '{}', '/m', 'm', 0, 'run', 'queued', 1)"
        )
        connection.execute(
            "INSERT INTO attempts (job_id, number, state, token, next_seq, num_accelerators, failed,"
            " created_at, ended_at)"
            " VALUES ('ftjob-ran', 1, 'ended', '', 0, 2, false, now() - interval '3 hours', now()),"
            " ('ftjob-ran', 2, 'running', '', 0, 2, false, now() - interval '3 hours', NULL)"
        )
    migrate(database_url)
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT accelerator_hours FROM projects").fetchall() == [(6.0,)]
        connection.execute("DELETE FROM attempts WHERE job_id = 'ftjob-ran'")
        connection.execute("DELETE FROM jobs WHERE id = 'ftjob-ran'")


def schema(database_url: str) -> dict[tuple[str, str], tuple[str, bool]]:
    """Returns the type of each column, and whether a row may be inserted without it, by table and column."""
    query = (
        "SELECT table_name, column_name, data_type, is_nullable = 'YES' OR column_default IS NOT NULL OR"
        " is_generated = 'ALWAYS' OR is_identity = 'YES' FROM information_schema.columns WHERE table_schema = 'public'"
    )
    with psycopg.connect(database_url) as connection:
        return {(table, name): (kind, optional) for table, name, kind, optional in connection.execute(query)}


def test_each_schema_serves_the_release_before_it(database_url: str) -> None:
    """While both releases run, statements of the older one must find their columns and may leave out the new ones."""
    migrate(database_url)
    newest = int(store._version(database_url))
    config = Config()
    config.set_main_option("script_location", str(store.MIGRATIONS))
    config.attributes["database_url"] = database_url.replace("postgresql://", "postgresql+psycopg://")
    schemas = [schema(database_url)]
    for _ in range(2, newest):  # 0002 changed 0001 in other ways
        command.downgrade(config, "-1")
        schemas.insert(0, schema(database_url))
    assert store._version(database_url) == "0002"
    for before, after in pairwise(schemas):
        assert before.keys() <= after.keys()
        for place in before:
            assert after[place][0] == before[place][0], place
            assert after[place][1] or not before[place][1], place
        tables = {table for table, _ in before}
        assert all(after[place][1] for place in after.keys() - before.keys() if place[0] in tables)
    migrate(database_url)


def test_a_control_plane_that_restarts_after_the_next_releases_migration_leaves_the_schema_as_it_is(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    migrate(database_url)
    with psycopg.connect(database_url, autocommit=True) as connection:
        before = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        migrate(database_url)
        assert "The database has schema 9999 of a newer release" in caplog.text
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == ("9999",)
        connection.execute("UPDATE alembic_version SET version_num = %s", before)


@pytest.mark.slow
def test_replicas_that_start_together_migrate_once(postgres_url: str) -> None:
    url = new_database(postgres_url)
    program = "import sys; from services.control_plane.core.store import migrate; migrate(sys.argv[1])"
    replicas = [subprocess.Popen([sys.executable, "-c", program, url]) for _ in range(3)]
    assert [replica.wait(300) for replica in replicas] == [0, 0, 0]
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT count(*) FROM alembic_version").fetchone() == (1,)
        assert connection.execute("SELECT count(*) FROM projects").fetchone() == (1,)
