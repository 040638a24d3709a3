"""Prepared data by their content: what was made once, from the same bytes in the same way, is not made again.

An entry is a folder named by the digest of all that it was made from. Its manifest is written last. Entries may be
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
WORDS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")  # what tells text from ids, and the config

Entry = TypeVar("Entry", bound=Contract)


def key(**made_from: Any) -> str:
    """The name of what is made from these values."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]


def digest(uri: str) -> str:
    """Of a file's bytes."""
    with storage.open_input(uri) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_digest(source: str, *, weights: bool) -> str:
    """Of a model's weights, or of what it reads and writes text with. Both include its config."""
    folder = _folder(source)
    base = policies.base_of(source)
    patterns = (*WEIGHTS, "config.json") if weights else WORDS
    files = {file.relative_to(folder).as_posix(): file for pattern in patterns for file in folder.rglob(pattern)}
    digests = {name: digest(str(file)) for name, file in files.items()}
    return key(**digests, **({} if base == source else {"base": model_digest(base, weights=weights)}))


def writes_the_date(source: str) -> bool:
    """Whether the model's chat template asks which day it is."""
    files = [_folder(source) / name for name in ("chat_template.jinja", "tokenizer_config.json")]
    return any(b"strftime_now" in file.read_bytes() for file in files if file.is_file())


def _folder(source: str) -> Path:
    """A local folder of the model: its own, or a snapshot of the hub's."""
    folder = storage.fetch(source)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=[*WEIGHTS, *WORDS]))


def once(
    uri: str,
    entry: type[Entry],
    make: Callable[[], Entry],
    check: Callable[[Entry], None],
    report: Callable[[Report], None],
) -> tuple[Entry, bool]:
    """The entry at `uri`, and whether it was there. Of all jobs that want it at once, one makes it, the others wait.

    `check` raises DamagedPart for an entry that is to be made again.
    """
    waiting = False
    while True:
        if found := find(uri, entry, check, report):
            return found, True
        if claim := _claim(uri):
            break
        if not waiting:
            report(Message(message="Another job prepares the same data; waiting for it."))
        waiting = True
        time.sleep(WAIT_SECONDS)
    try:
        if found := find(uri, entry, check, lambda _: None):  # made between the look and the claim
            return found, True
        made = make()
        save(uri, made)
        return made, False
    finally:
        ray.kill(claim)


def find(
    uri: str, entry: type[Entry], check: Callable[[Entry], None], report: Callable[[Report], None]
) -> Entry | None:
    """What stands whole at `uri`."""
    manifest = storage.join(uri, storage.MANIFEST)
    if not storage.exists(manifest):
        return None
    try:
        found = entry.model_validate_json(storage.read_bytes(manifest))
        check(found)
    except (DamagedPart, ValidationError) as error:
        report(Message(level="warn", message=f"Prepared data are damaged and made again: {error}"))
        return None
    return found


def save(uri: str, entry: Contract) -> None:
    storage.write_bytes(storage.join(uri, storage.MANIFEST), entry.model_dump_json().encode())


class _Claim:
    """An actor whose name is taken while it lives. It dies with its driver."""


def _claim(uri: str) -> Any:
    """None if another driver of the cluster has it."""
    name = f"prepare {key(uri=uri)}"
    try:
        # The name is taken when this returns; nobody waits for the process.
        return ray.remote(_Claim).options(name=name, namespace="raydpo", num_cpus=0).remote()
    except ValueError:
        return None
