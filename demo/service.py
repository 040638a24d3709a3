"""Starts and stops `raydpo up` as a child process."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

START_SECONDS = 180
STOP_SECONDS = 120


class Service:
    """A child process that runs `raydpo up`.

    The child has its own session, so that Ctrl-C in the terminal interrupts only the demo.
    """

    def __init__(self, home: Path, *, models: dict[str, str], console: Console) -> None:
        self.home, self._console = home, console
        self._log = home / "up.log"
        command = [str(Path(sys.executable).parent / "raydpo"), "up", "--home", str(home), "--port", "0"]
        command += [f"--model={name}={source}" for name, source in models.items()]
        with self._log.open("wb") as output:
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    def wait_until_ready(self) -> str:
        """Prints the service's output until the service is ready. Returns the base URL of the API."""
        deadline, shown = time.monotonic() + START_SECONDS, 0
        while True:
            lines = self._log.read_text().splitlines()
            for line in lines[shown:]:
                self._console.print(f"  {line}", style="dim")
            shown = len(lines)
            if ready := re.search(r"^ready (\S+)$", "\n".join(lines), re.MULTILINE):
                return ready[1]
            if self._child.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"`raydpo up` did not become ready; read {self._log} for the reason.")
            time.sleep(0.2)

    def stop(self) -> None:
        self._child.send_signal(signal.SIGTERM)
        self._child.wait(STOP_SECONDS)

    def leave(self) -> None:
        """Keeps the service running after the demo, without Popen's warning about a running child process."""
        self._child.returncode = 0
