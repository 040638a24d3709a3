"""Installs OpenAI's published clients and lm_eval, each once, into a folder outside of the repository."""

import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE = Path.home() / ".cache" / "raydpo-tests"
PYTHON = ["1.109.1", "2.54.0", "3.54.0"]  # the last of each major
NODE = "7.57.0"


def python(version: str) -> Path:
    """Installs this version of the package `openai`, if it is missing, and returns the Python interpreter that has
    it."""
    folder = CACHE / f"openai-{version}"
    interpreter = folder / "bin" / "python"
    with _lacking(folder) as lacking:
        if lacking:
            _run("uv", "venv", "--quiet", "--clear", "--python", sys.executable, str(folder))
            _run("uv", "pip", "install", "--quiet", "--python", str(interpreter), f"openai=={version}")
    return interpreter


def lm_eval() -> Path:
    """Installs the pinned set `requirements/lm-eval.txt`, if it is missing, and returns the folder of its programs."""
    pins = Path(__file__).parents[2] / "requirements" / "lm-eval.txt"
    folder = CACHE / f"lm-eval-{hashlib.sha256(pins.read_bytes()).hexdigest()[:12]}"
    with _lacking(folder) as lacking:
        if lacking:
            python = str(folder / "bin" / "python")
            _run("uv", "venv", "--quiet", "--clear", "--python", sys.executable, str(folder))
            _run("uv", "pip", "install", "--quiet", "--no-deps", "--python", python, "--requirement", str(pins))
    return folder / "bin"


def node_modules(version: str) -> Path:
    """Installs this version of `openai` for Node, if it is missing, and returns the folder in which Node finds it."""
    folder = CACHE / f"node-openai-{version}"
    with _lacking(folder) as lacking:
        if lacking:
            folder.mkdir(parents=True, exist_ok=True)
            _run("npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder), f"openai@{version}")
    return folder


@contextmanager
def _lacking(folder: Path) -> Iterator[bool]:
    """Yields whether the folder must still be filled. Only one process fills it; others wait for the lock meanwhile."""
    CACHE.mkdir(parents=True, exist_ok=True)
    whole = folder / ".whole"
    with Path(f"{folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not whole.exists()
        whole.touch()


def _run(program: str, *arguments: str) -> None:
    beside = Path(sys.executable).with_name(program)
    subprocess.run([beside if beside.exists() else shutil.which(program) or program, *arguments], check=True)
