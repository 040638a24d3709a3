"""Tests a database that hangs, moves and disappears: the service works again, or reports that it is not ready."""

import asyncio
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import openai
import psutil
import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import InternalError

from services.control_plane.core import store
from services.control_plane.core.store import NoDatabase, Store, check, migrate, wait_long
from services.control_plane.settings import Settings
from services.local.postgres import start_postgres, stop_postgres
from tests.services.control_plane.conftest import API_KEY, answering, api_of, free_port, pair, pairs
from tests.services.proxy import Proxy


def works(base_url: str) -> bool:
    """Whether the service is ready and accepts a change. If it refuses the change, the answer must be the right
    error."""
    ready = httpx.get(f"{base_url}/readyz", timeout=60)
    with api_of(base_url, API_KEY) as api:
        answer = api.post("/uploads", json={"filename": "a", "purpose": "fine-tune", "bytes": 2, "mime_type": "text/x"})
    if not answer.is_success:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_unavailable")
    return ready.is_success and answer.is_success


def leads(database_url: str) -> bool:
    """Whether a reconciler holds the lease, and so acts."""
    lease = "SELECT expires_at > clock_timestamp() FROM leases WHERE name = 'reconciler'"
    with psycopg.connect(database_url) as connection:
        return connection.execute(lease).fetchone() == (True,)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def socket_of(url: str) -> str:
    return f"{make_url(url).query['host']}/.s.PGSQL.5432"


@pytest.fixture
def proxy(database_url: str) -> Iterator[Proxy]:
    proxy = Proxy(socket_of(database_url))
    yield proxy
    proxy.close()


@pytest.fixture
def distant(offline: Settings, proxy: Proxy) -> Settings:
    """Returns settings with which the service reaches the database through the proxy."""
    url = f"postgresql://postgres@127.0.0.1:{proxy.port}/{make_url(offline.database_url).database}"
    return offline.model_copy(update={"database_url": url})


@pytest.fixture
def folder() -> Iterator[Path]:
    """Returns a folder that the database server's user may enter."""
    with TemporaryDirectory(prefix="raydpo-tests-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        yield Path(folder).resolve()


# --- it hangs, or vanishes -------------------------------------------------------------------


def test_connections_that_hang_are_replaced(distant: Settings, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ANSWER_SECONDS", 1.0)
    with answering(distant) as url:
        assert works(url)
        proxy.swallow()  # what is new is passed on
        wait_until(lambda: works(url))


def test_a_database_that_does_not_answer_is_not_ready(
    distant: Settings, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.control_plane.http.health.READY_SECONDS", 0.5)
    with answering(distant) as url:
        proxy.refusing = True
        proxy.swallow()
        assert httpx.get(f"{url}/readyz", timeout=60).status_code == 503
        assert httpx.get(f"{url}/healthz").status_code == 200
        proxy.pass_on()
        wait_until(lambda: works(url))


VANISHES = """
import os, subprocess, sys, time
from pathlib import Path
from services.control_plane.attempts.reconciler import LEASE_SECONDS
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import API_KEY, answering
from tests.services.control_plane.core.test_database import leads, wait_until, works
from tests.services.proxy import Proxy

for words in ("link set lo up", "addr add 10.9.0.1/32 dev lo", "addr add 10.9.0.2/32 dev lo"):
    subprocess.run(["ip", *words.split()], check=True)
socket, name, storage_url, home = sys.argv[1:]
port = Proxy(socket, host="0.0.0.0").port
settings = Settings(
    home=Path(home), storage_url=storage_url, api_key=API_KEY,
    advertised_url="http://127.0.0.1:9", ray_url="http://127.0.0.1:9",
    DATABASE_URL=f"postgresql://postgres@/{name}?host=10.9.0.1,10.9.0.2&port={port},{port}",
)
with answering(settings) as url:
    assert works(url)
    subprocess.run(["ip", "addr", "del", "10.9.0.1/32", "dev", "lo"], check=True)
    time.sleep(LEASE_SECONDS + 2)  # what the reconciler held by a lost connection is over
    wait_until(lambda: works(url) and leads(settings.database_url))
    print("works", flush=True)
    os._exit(0)
"""


@pytest.mark.long
@pytest.mark.slow
def test_a_server_that_vanishes_without_a_word_is_left_for_another(offline: Settings, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        pytest.skip("no network of a test's own can be made here")
    migrate(offline.database_url)
    name = make_url(offline.database_url).database
    arguments = [socket_of(offline.database_url), str(name), offline.storage_url, str(tmp_path)]
    command = ["unshare", "--net", sys.executable, "-c", VANISHES, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert run.stdout == "works\n", run.stderr[-2000:]


# --- it moves --------------------------------------------------------------------------------


@pytest.mark.slow
def test_while_a_server_takes_no_writes_the_service_is_not_ready(folder: Path, offline: Settings) -> None:
    url = start_postgres(folder / "data")
    with answering(offline.model_copy(update={"database_url": url})) as base_url, psycopg.connect(url) as operator:
        operator.autocommit = True
        operator.execute("SET default_transaction_read_only = off")
        assert works(base_url)
        operator.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        operator.execute("SELECT pg_reload_conf()")
        wait_until(lambda: not works(base_url))
        assert httpx.get(f"{base_url}/readyz").status_code == 503
        operator.execute("ALTER SYSTEM RESET default_transaction_read_only")
        operator.execute("SELECT pg_reload_conf()")
        wait_until(lambda: works(base_url))
    stop_postgres(folder / "data")


@pytest.mark.slow
def test_the_service_follows_its_database_to_the_standby(folder: Path, offline: Settings) -> None:
    first, second = folder / "first", folder / "second"
    host = make_url(start_postgres(first)).query["host"]
    copy_to(str(host), first, second)
    start_postgres(second)  # it follows the first, and takes no writes
    url = f"postgresql://postgres@/postgres?host={second},{first}"
    with answering(offline.model_copy(update={"database_url": url})) as base_url:
        assert works(base_url)
        stop_postgres(first)
        assert not works(base_url)
        with psycopg.connect(f"postgresql://postgres@/postgres?host={second}", autocommit=True) as standby:
            standby.execute("SELECT pg_promote()")
        wait_until(lambda: works(base_url))
    stop_postgres(second)


def copy_to(host: str, first: Path, second: Path) -> None:
    """Copies the data of the server at `host` to the folder `second`, for a standby."""
    running = psutil.Process(int((first / "postmaster.pid").read_text().split()[0]))
    program = Path(running.exe()).with_name("pg_basebackup")
    command = [program, "-h", host, "-U", "postgres", "-D", second]
    subprocess.run([*command, "--write-recovery-conf", "--checkpoint=fast"], check=True, capture_output=True)
    (second / ".s.PGSQL.5432.lock").unlink()
    owner = first.stat()
    for path in (second, *second.rglob("*")):
        shutil.chown(path, owner.st_uid, owner.st_gid)


# --- a pooler stands between -----------------------------------------------------------------


@pytest.fixture
def pgbouncer(folder: Path, database_url: str) -> Iterator[str]:
    """Runs a PgBouncer with two connections for all clients, and yields the database's URL through it."""
    program = shutil.which("pgbouncer")
    if program is None:
        pytest.skip("no pgbouncer is installed here")
    database, port, file = make_url(database_url), free_port(), folder / "pgbouncer.ini"
    file.write_text(
        f"""
[databases]
{database.database} = host={database.query["host"]} user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 2
"""
    )
    file.chmod(0o644)
    as_other = ["-u", "pgserver"] if Path.home() == Path("/root") else []  # it refuses to be root
    process = subprocess.Popen([program, "-q", *as_other, str(file)])
    url = f"postgresql://postgres@127.0.0.1:{port}/{database.database}"
    wait_until(lambda: answers(url))
    yield url
    process.terminate()
    process.wait(60)


def answers(url: str) -> bool:
    try:
        psycopg.connect(url).close()
    except psycopg.OperationalError:
        return False
    return True


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://user:hidden@host/name", "begins with mysql://, which is not PostgreSQL; set DATABASE_URL to"),
        ("sqlite:///name.db", "begins with sqlite://, which is not PostgreSQL; set DATABASE_URL to"),
        ("user:hidden@host/name", "is not a URL; set DATABASE_URL to"),
        ("postgresql://user:hidden@host:port/name", "is not a URL; set DATABASE_URL to"),
        ("postgresql://user:hidden@127.0.0.1:9/name", "takes no connection: .*127.0.0.1.*Connection refused"),
    ],
)
def test_a_url_that_leads_to_no_postgresql_is_refused_without_its_password(url: str, said: str) -> None:
    with pytest.raises(NoDatabase, match=said) as refusal:
        migrate(url)
    assert "hidden" not in str(refusal.value)


def test_behind_a_pgbouncer_all_works(pgbouncer: str, offline: Settings) -> None:
    with pytest.raises(NoDatabase, match="set DATABASE_DIRECT_URL"):
        migrate(pgbouncer)
    settings = {"database_url": pgbouncer, "database_direct_url": offline.database_url}
    migrate(offline.database_url)
    with (
        answering(offline.model_copy(update=settings)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=API_KEY, max_retries=0) as client,
    ):
        for number in range(20):  # a statement is prepared when it comes for the fifth time
            file = client.files.create(file=("a.jsonl", pairs() + pair(number)), purpose="fine-tune")
            job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method={"type": "dpo"})
            client.fine_tuning.jobs.cancel(job.id)
            assert client.fine_tuning.jobs.retrieve(job.id).status == "cancelled"
        assert works(url)
        with psycopg.connect(offline.database_url) as connection:
            listening = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'raydpo jobs'"
            assert connection.execute(listening).fetchone() == (1,)


# --- limits ----------------------------------------------------------------------------------


def ask(store: Store, *statements: str) -> list[Any]:
    """Runs the queries in one transaction, and returns their answers."""

    async def run() -> list[Any]:
        async with store.begin() as session:
            found = [await session.scalar(text(statement)) for statement in statements]
        await store.close()
        return found

    return asyncio.run(run())


def test_what_the_url_says_goes_before_what_is_usual(database_url: str) -> None:
    statements = ["SHOW statement_timeout", "SHOW idle_in_transaction_session_timeout"]
    assert ask(Store(database_url), *statements) == ["30s", "1min"]
    assert ask(Store(f"{database_url}&options=-c%20statement_timeout%3D5s"), *statements) == ["5s", "1min"]


def test_behind_a_pooler_no_statement_is_prepared_and_no_option_is_sent(database_url: str) -> None:
    prepared = ["SELECT count(*) FROM pg_prepared_statements"] * 8
    assert ask(Store(database_url), *prepared)[-1] > 0
    pooled = Store(database_url, direct_url=database_url)
    assert ask(pooled, *prepared, "SHOW statement_timeout")[-2:] == [0, "0"]


def test_a_transaction_in_which_nothing_happens_is_ended_unless_it_has_said_so(database_url: str) -> None:
    migrate(database_url)
    store = Store(f"{database_url}&options=-c%20idle_in_transaction_session_timeout%3D100")

    async def idle(*, said: bool) -> None:
        async with store.begin() as session:
            await (wait_long if said else check)(session)
            await asyncio.sleep(0.4)
            await session.execute(text("SELECT 1"))

    async def run() -> None:
        await idle(said=True)
        with pytest.raises(InternalError, match="idle-in-transaction"):
            await idle(said=False)
        await idle(said=True)
        await store.close()

    asyncio.run(run())


def test_who_waits_too_long_for_another_is_told_so(offline: Settings) -> None:
    url = f"{offline.database_url}&options=-c%20statement_timeout%3D300"
    with answering(offline.model_copy(update={"database_url": url})) as base_url, api_of(base_url, API_KEY) as api:
        upload = api.post("/uploads", json={"filename": "a", "purpose": "fine-tune", "bytes": 2, "mime_type": "text/x"})
        with psycopg.connect(offline.database_url) as other:
            other.execute("SELECT FROM uploads FOR UPDATE")
            answer = api.post(f"/uploads/{upload.json()['id']}/cancel")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_unavailable")
    assert "waited too long" in answer.json()["error"]["message"]
