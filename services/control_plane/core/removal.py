"""Deletes files and folders from storage, and logs deletions that fail."""

import logging
from collections.abc import Collection
from functools import partial

import anyio.to_thread

from services import storage

log = logging.getLogger(__name__)


async def remove_bytes(uri: str, *, but: Collection[str] = ()) -> bool:
    """Deletes a file or folder in storage, except the files and folders inside it whose URIs are in `but`. Returns
    False if this fails; the regular cleanup then tries again later.

    Options in the URIs, such as `?region=eu`, do not count: an operator may change them in `storage_url` at any time.
    """
    try:
        await anyio.to_thread.run_sync(partial(_delete, uri, [without_options(kept) for kept in but]))
    except (OSError, ValueError) as error:  # ValueError: a URI of a storage that the service no longer knows
        log.warning("%s could not be deleted from storage and is tried again later: %s", uri, error)
        return False
    return True


def without_options(uri: str) -> str:
    """Returns the URI without the options of Arrow's filesystem, such as `?region=eu`."""
    return uri.partition("?")[0]


def _delete(uri: str, but: Collection[str]) -> None:
    if without_options(uri) in but:
        return
    inside = [kept for kept in but if kept.startswith(without_options(uri) + "/")]
    if not inside:
        storage.delete(uri)
        return
    for name in (*storage.list_files(uri), *storage.list_folders(uri)):
        _delete(storage.join(uri, name), inside)
