"""OpenAI's published clients, each installed once into a folder of its own, outside of the tree."""

import shutil
import subprocess
import sys
from pathlib import Path

CACHE = Path.home() / ".cache" / "raydpo-tests"
PYTHON = ["1.109.1", "2.54.0", "3.54.0"]  # the last of each major
NODE = "7.57.0"


def python(version: str) -> Path:
    """The interpreter that has this version of `openai`."""
    folder = CACHE / f"openai-{version}"
    interpreter = folder / "bin" / "python"
    if not _is_whole(folder):
        _run("uv", "venv", "--quiet", "--clear", "--python", sys.executable, str(folder))
        _run("uv", "pip", "install", "--quiet", "--python", str(interpreter), f"openai=={version}")
        _mark(folder)
    return interpreter


def node_modules(version: str) -> Path:
    """The folder in which Node finds this version of `openai`."""
    folder = CACHE / f"node-openai-{version}"
    if not _is_whole(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _run("npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder), f"openai@{version}")
        _mark(folder)
    return folder


def _is_whole(folder: Path) -> bool:
    return (folder / ".whole").exists()


def _mark(folder: Path) -> None:
    (folder / ".whole").touch()


def _run(program: str, *arguments: str) -> None:
    beside = Path(sys.executable).with_name(program)
    subprocess.run([beside if beside.exists() else shutil.which(program) or program, *arguments], check=True)
