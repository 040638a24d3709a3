"""Stores data that a job has prepared, so that later jobs with the same file, model and settings use the same data.

An entry of this cache is a folder in storage. Its name is a digest of everything on which its content depends. Its
manifest is written last. Entries may be deleted at any time: a job that needs a deleted entry makes it again. The
control plane deletes entries that no job has used for long.
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
from services.contract import USED, Contract, Message, Report
from services.training import policies
from services.training.data.dataset import DamagedPart

WAIT_SECONDS = 1.0
WEIGHTS = ("*.safetensors",)

Entry = TypeVar("Entry", bound=Contract)


def key(**made_from: Any) -> str:
    """Returns the name of a cache entry: a digest of `made_from`, all the values on which the entry's content
    depends."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]


def digest(uri: str) -> str:
    """Returns the sha256, in hexadecimal, of the bytes of the file at `uri`."""
    with storage.open_input(uri) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_digest(source: str, *, weights: bool) -> str:
    """Returns a digest of a model's files, so that prepared data are used again only with the same model.

    With `weights`, the digest covers the weights and the model's config, because log-probabilities depend on these
    files. Without `weights`, it covers the tokenizer, chat template and config, because token ids depend on these. For
    an adapter, the digest also covers the base model (the model under the adapter).

    With `weights`, the weights are downloaded to this node.
    """
    folder = _folder(source, weights=weights)
    base = policies.base_of(source)
    patterns = (*WEIGHTS, "config.json") if weights else storage.WORDS
    files = {file.relative_to(folder).as_posix(): file for pattern in patterns for file in folder.rglob(pattern)}
    digests = {name: digest(str(file)) for name, file in files.items()}
    return key(**digests, **({} if base == source else {"base": model_digest(base, weights=weights)}))


def writes_the_date(source: str) -> bool:
    """Whether the model's chat template asks for the current date."""
    files = [_folder(source, weights=False) / name for name in ("chat_template.jinja", "tokenizer_config.json")]
    return any(b"strftime_now" in file.read_bytes() for file in files if file.is_file())


def _folder(source: str, *, weights: bool) -> Path:
    """Returns the local folder of a model, with its weights only if `weights` is true. A model in a bucket or on the
    Hugging Face hub is downloaded first."""
    folder = storage.fetch(source) if weights else policies.fetch_words(source)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    patterns = [*WEIGHTS, *storage.WORDS] if weights else list(storage.WORDS)
    return Path(snapshot_download(source, allow_patterns=patterns))


def find_or_make(
    uri: str,
    entry: type[Entry],
    make: Callable[[], Entry],
    check: Callable[[Entry], None],
    report: Callable[[Report], None],
) -> tuple[Entry, bool]:
    """Returns the cache entry at `uri`, and whether the entry existed before.

    If the entry is missing, the function calls `make`, which makes it. If several jobs need the same entry at the same
    time, one of them makes it and the others wait. `entry` is the type of the entry's manifest. `check` must raise
    DamagedPart for a damaged entry, which is then made again. `report` tells the user about a damaged entry, and about
    waiting.
    """
    waiting = False
    while True:
        if cached := find(uri, entry, check, report):
            return cached, True
        if claim := _claim(uri):
            break
        if not waiting:
            report(
                Message(
                    message=("Another job is preparing the same data; this job waits for it and then uses the result.")
                )
            )
        waiting = True
        time.sleep(WAIT_SECONDS)
    try:
        if cached := find(uri, entry, check, lambda _: None):  # another job made it just before the claim
            return cached, True
        made = make()
        save(uri, made)
        return made, False
    finally:
        ray.kill(claim)


def find(
    uri: str, entry: type[Entry], check: Callable[[Entry], None], report: Callable[[Report], None]
) -> Entry | None:
    """Returns the cache entry at `uri`, or None if the entry is missing, incomplete or damaged.

    `entry` is the type of the entry's manifest. `check` must raise DamagedPart for a damaged entry. `report` tells the
    user about a damaged entry.
    """
    manifest = storage.join(uri, storage.MANIFEST)
    if not storage.exists(manifest):
        return None
    try:
        cached = entry.model_validate_json(storage.read_bytes(manifest))
        check(cached)
    except (DamagedPart, ValidationError) as error:
        report(
            Message(
                level="warn",
                message=(
                    "The stored result of an earlier preparation of the data is damaged, "
                    f"so the data are prepared again: {error}"
                ),
            )
        )
        return None
    return cached


def note_use(uri: str) -> None:
    """Notes that a job uses the cache entry at `uri` from now on, so that the control plane does not delete the entry
    as an old one. The time of the note is that of a file in the entry's folder."""
    storage.write_bytes(storage.join(uri, USED), b"")


def save(uri: str, entry: Contract) -> None:
    storage.write_bytes(storage.join(uri, storage.MANIFEST), entry.model_dump_json().encode())


class _Claim:
    """A Ray actor whose existence means that one driver (a job's main program) is making a certain cache entry. The
    actor is named after the entry. Ray lets only one living actor have this name, so only one driver at a time can make
    the entry. The actor has no methods.

    The actor ends with the driver that started it.
    """


def _claim(uri: str) -> Any:
    """Claims the right to make the cache entry at `uri`, so that no other job makes it at the same time.

    Returns the actor that holds the claim, or None if another driver (a job's main program) of the cluster has claimed
    the entry already.
    """
    name = f"prepare {key(uri=uri)}"
    try:
        # The actor holds the name when this call returns, before the actor's process has started.
        return ray.remote(_Claim).options(name=name, namespace="raydpo", num_cpus=0).remote()
    except ValueError:
        return None
