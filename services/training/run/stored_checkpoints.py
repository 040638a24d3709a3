"""Finds a job's checkpoints in storage, and removes the optimizer's state from older checkpoints."""

from collections.abc import Iterator
from contextlib import suppress
from itertools import islice, takewhile

from dpo_core.training.checkpoint import Manifest, is_optimizer, parse_manifest
from services import storage

RESUMABLE = 2  # checkpoints that keep their optimizer's state: the newest, and one more in case the newest is damaged


def checkpoint_uri(run_uri: str, step: int) -> str:
    return storage.join(run_uri, "checkpoints", f"step-{step:06d}")


def complete(run_uri: str) -> Iterator[tuple[int, str]]:
    """Yields two values for each complete checkpoint of a job, the newest first: its step and its URI. A checkpoint is
    complete if it has a manifest. `run_uri` is the job's folder in storage."""
    folder = storage.join(run_uri, "checkpoints")
    steps = {int(name.removeprefix("step-")): name for name in storage.list_folders(folder)}
    for step in sorted(steps, reverse=True):
        uri = storage.join(folder, steps[step])
        if storage.exists(storage.join(uri, storage.MANIFEST)):
            yield step, uri


def manifest_of(uri: str) -> Manifest:
    """Reads the manifest of the checkpoint at `uri` from storage, without downloading the checkpoint.

    Raises DamagedCheckpoint if the manifest is damaged.
    """
    place = storage.join(uri, storage.MANIFEST)
    return parse_manifest(storage.read_bytes(place), place)


def drop_optimizers(run_uri: str, *, published: int) -> None:
    """Removes the optimizer's state from older checkpoints of a job. The two newest checkpoints keep this state,
    because a job resumes only from a checkpoint with it.

    `run_uri` is the job's folder in storage, and `published` the step of the newest checkpoint. First the manifest of a
    checkpoint is written again without the state's files, then these files are deleted, so the checkpoint is valid at
    any time. The oldest checkpoint loses its state first. If this process dies before the end, the call after the next
    checkpoint removes what is left.
    """
    older = (uri for step, uri in complete(run_uri) if step < published)
    having = takewhile(_optimizer_files, islice(older, RESUMABLE - 1, None))
    for uri in reversed(list(having)):
        with suppress(FileNotFoundError):  # a user deletes the checkpoint at the same time
            manifest = manifest_of(uri).without_optimizer()
            storage.write_bytes(storage.join(uri, storage.MANIFEST), manifest.to_json())
        for name in _optimizer_files(uri):
            storage.delete(storage.join(uri, name))


def _optimizer_files(uri: str) -> list[str]:
    return [name for name in storage.list_files(uri) if is_optimizer(name)]
