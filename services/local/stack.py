"""Runs a database and a Ray cluster for the control plane on one machine, in one home folder."""

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
    """The addresses of the database and the cluster. Parts that the caller provides are neither started nor stopped."""

    database_url: str
    ray_url: str
    ray_token_file: Path | None  # None: the caller provides the cluster
    serve_url: str | None  # None: the caller's cluster reports it


@contextmanager
def running_stack(
    home: Path,
    *,
    ray_address: str | None = None,
    database_url: str | None = None,
    say: Callable[[str], None] = print,
) -> Iterator[Stack]:
    """Starts the stack of `home`, or adopts the parts that a killed process left running. Stops all of it at the end.

    `ray_address` (the dashboard of a running cluster) and `database_url` replace the embedded parts.
    """
    home = home.expanduser().resolve()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(home), ExitStack() as stops:
        # Imported only if they are started: the control plane's image has neither.
        if database_url is None:
            from services.local.postgres import start_postgres, stop_postgres

            stops.callback(stop_postgres, home / "postgres")
            database_url = start_postgres(home / "postgres")
        if ray_address is not None:
            yield Stack(database_url=database_url, ray_url=ray_address, ray_token_file=None, serve_url=None)
            return
        from services.local.ray_head import start_ray, stop_ray

        token_file = write_secret(home / "ray.token", secrets.token_hex(32))
        stops.callback(stop_ray, home)  # before the start, which may be interrupted halfway
        head = start_ray(home, token_file, say=say)
        serve_url = f"http://127.0.0.1:{head.serve_port}"
        yield Stack(database_url=database_url, ray_url=head.url, ray_token_file=token_file, serve_url=serve_url)


def write_secret(file: Path, secret: str) -> Path:
    """Writes `secret` to `file`, which only its owner can read. An existing file stays as it is."""
    beside = file.with_name(f".{file.name}")
    beside.unlink(missing_ok=True)
    if not file.exists():
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as target:
            target.write(secret)
        beside.rename(file)
    return file


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    with (home / "lock").open("a+") as lock:  # the kernel releases it with the process, however that ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read()
            raise StackError(
                f"{home} is used by process {owner}; stop that process, or choose another --home."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
