"""Caches prepared data by content, so that jobs with the same file, model and settings prepare them once.

An entry is a folder named by the digest of everything it was made from. Its manifest is written last. Entries may be
deleted at any time: a job that misses one makes it again.
"""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import ray
from pydantic import ValidationError

from services import storage
from services.contract import Contract, Message, Report
from services.training import policies
from services.training.data.dataset import DamagedPart

WAIT_SECONDS = 1.0
WEIGHTS = ("*.safetensors",)
TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")  # tokenizer, chat template and config

Entry = TypeVar("Entry", bound=Contract)


def key(**made_from: Any) -> str:
    """Returns the name of the entry that is made from these values."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]


def digest(uri: str) -> str:
    """Returns the sha256 of a file's bytes."""
    with storage.open_input(uri) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_digest(source: str, *, weights: bool) -> str:
    """Returns the digest of a model's weights, or else of its tokenizer and chat template. Both include its config."""
    folder = _folder(source)
    base = policies.base_of(source)
    patterns = (*WEIGHTS, "config.json") if weights else TEXT_FILES
    files = {file.relative_to(folder).as_posix(): file for pattern in patterns for file in folder.rglob(pattern)}
    digests = {name: digest(str(file)) for name, file in files.items()}
    return key(**digests, **({} if base == source else {"base": model_digest(base, weights=weights)}))


def writes_the_date(source: str) -> bool:
    """Whether the model's chat template asks for the current date."""
    files = [_folder(source) / name for name in ("chat_template.jinja", "tokenizer_config.json")]
    return any(b"strftime_now" in file.read_bytes() for file in files if file.is_file())


def _folder(source: str) -> Path:
    """Returns a local folder of the model: its own, or a snapshot from the hub."""
    folder = storage.fetch(source)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=[*WEIGHTS, *TEXT_FILES]))


def find_or_make(
    uri: str,
    entry: type[Entry],
    make: Callable[[], Entry],
    check: Callable[[Entry], None],
    report: Callable[[Report], None],
) -> tuple[Entry, bool]:
    """Returns the entry at `uri`, and whether it was there. If several jobs want it, one makes it and the others wait.

    `check` raises DamagedPart for an entry that must be made again.
    """
    waiting = False
    while True:
        if cached := find(uri, entry, check, report):
            return cached, True
        if claim := _claim(uri):
            break
        if not waiting:
            report(Message(message="Another job is preparing the same data; this one waits for it."))
        waiting = True
        time.sleep(WAIT_SECONDS)
    try:
        if cached := find(uri, entry, check, lambda _: None):  # made after the first look, before the claim
            return cached, True
        made = make()
        save(uri, made)
        return made, False
    finally:
        ray.kill(claim)


def find(
    uri: str, entry: type[Entry], check: Callable[[Entry], None], report: Callable[[Report], None]
) -> Entry | None:
    """Returns the complete, undamaged entry at `uri`. None: there is none."""
    manifest = storage.join(uri, storage.MANIFEST)
    if not storage.exists(manifest):
        return None
    try:
        cached = entry.model_validate_json(storage.read_bytes(manifest))
        check(cached)
    except (DamagedPart, ValidationError) as error:
        report(Message(level="warn", message=f"Prepared data are damaged, so they are made again: {error}"))
        return None
    return cached


def save(uri: str, entry: Contract) -> None:
    storage.write_bytes(storage.join(uri, storage.MANIFEST), entry.model_dump_json().encode())


class _Claim:
    """An actor that holds its name while it lives. It ends with its driver."""


def _claim(uri: str) -> Any:
    """Claims the making of an entry. None: another driver of the cluster has claimed it."""
    name = f"prepare {key(uri=uri)}"
    try:
        # The actor holds the name when this returns, before its process has started.
        return ray.remote(_Claim).options(name=name, namespace="raydpo", num_cpus=0).remote()
    except ValueError:
        return None
