"""A run's checkpoints in storage: where they are, and which of them keep their optimizer's state."""

from collections.abc import Iterator
from contextlib import suppress
from itertools import islice, takewhile

from dpo_core.training.checkpoint import Manifest, is_optimizer, parse_manifest
from services import storage

RESUMABLE = 2  # checkpoints that keep their optimizer's state: the newest, and one more in case that it is damaged


def checkpoint_uri(run_uri: str, step: int) -> str:
    return storage.join(run_uri, "checkpoints", f"step-{step:06d}")


def complete(run_uri: str) -> Iterator[tuple[int, str]]:
    """Step and URI of each checkpoint that was published as a whole, the newest first."""
    folder = storage.join(run_uri, "checkpoints")
    steps = {int(name.removeprefix("step-")): name for name in storage.list_folders(folder)}
    for step in sorted(steps, reverse=True):
        uri = storage.join(folder, steps[step])
        if storage.exists(storage.join(uri, storage.MANIFEST)):
            yield step, uri


def manifest_of(uri: str) -> Manifest:
    """Without fetching the checkpoint. Raises DamagedCheckpoint."""
    place = storage.join(uri, storage.MANIFEST)
    return parse_manifest(storage.read_bytes(place), place)


def drop_optimizers(run_uri: str, *, published: int) -> None:
    """Checkpoints older than the published one and the one before it lose their optimizer's state.

    What resumes needs only those two. A checkpoint without the state is still whole: first its manifest stops naming
    the files, then they go. The oldest loses it first, so that those that have it are the newest at any moment, and
    what a process leaves undone that dies in between is done after the next checkpoint.
    """
    older = (uri for step, uri in complete(run_uri) if step < published)
    having = takewhile(_optimizer_files, islice(older, RESUMABLE - 1, None))
    for uri in reversed(list(having)):
        with suppress(FileNotFoundError):  # a user deletes the checkpoint just now
            manifest = manifest_of(uri).without_optimizer()
            storage.write_bytes(storage.join(uri, storage.MANIFEST), manifest.to_json())
        for name in _optimizer_files(uri):
            storage.delete(storage.join(uri, name))


def _optimizer_files(uri: str) -> list[str]:
    return [name for name in storage.list_files(uri) if is_optimizer(name)]
