"""Runs what the control plane needs on one machine: PostgreSQL and a Ray cluster, with all data in one folder."""

import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from services.local.errors import StackError


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Holds the addresses of the control plane's database and Ray cluster.

    A database or cluster that the caller provides is neither started nor stopped. `ray_token_file` and `serve_url` are
    None if the caller provides the cluster.
    """

    database_url: str
    ray_url: str
    ray_token_file: Path | None  # None: the caller provides the cluster
    serve_url: str | None  # None: the caller's cluster reports the URL


@contextmanager
def running_stack(
    home: Path,
    *,
    ray_address: str | None = None,
    database_url: str | None = None,
    say: Callable[[str], None] = print,
) -> Iterator[Stack]:
    """Starts PostgreSQL and Ray with their data in the folder `home`, and stops both at the end of the block.

    If a killed process has left a server running in this folder, this server is used. `database_url` names a running
    database, so that PostgreSQL is not started. `ray_address`, the URL of a running cluster's dashboard, means that Ray
    is not started. `say` prints what happens. Raises StackError if another process uses the folder.
    """
    home = home.expanduser().resolve()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(home), ExitStack() as stops:
        # Imported only if needed, because the control plane's image has neither PostgreSQL nor Ray.
        if database_url is None:
            from services.local.postgres import start_postgres, stop_postgres

            stops.callback(stop_postgres, home / "postgres")
            database_url = start_postgres(home / "postgres")
        if ray_address is not None:
            yield Stack(database_url=database_url, ray_url=ray_address, ray_token_file=None, serve_url=None)
            return
        from services.local.ray_head import start_ray, stop_ray

        token_file = write_secret(home / "ray.token", secrets.token_hex(32))
        stops.callback(stop_ray, home)  # registered before the start, because the start may be interrupted
        head = start_ray(home, token_file, say=say)
        serve_url = f"http://127.0.0.1:{head.serve_port}"
        yield Stack(database_url=database_url, ray_url=head.url, ray_token_file=token_file, serve_url=serve_url)


def write_secret(file: Path, secret: str) -> Path:
    """Writes `secret` to `file`, which only the file's owner can read, and returns `file`. Does not change an existing
    file."""
    beside = file.with_name(f".{file.name}")
    beside.unlink(missing_ok=True)
    if not file.exists():
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as target:
            target.write(secret)
        beside.rename(file)
    return file


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    with (home / "lock").open("a+") as lock:  # the kernel releases the lock when the process ends in any way
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read()
            raise StackError(
                f"The folder {home} is used by process {owner}; stop that process, or choose another --home."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
