"""Deletes files and folders from storage, and logs deletions that fail."""

import logging

import anyio.to_thread

from services import storage

log = logging.getLogger(__name__)


async def remove_bytes(uri: str) -> bool:
    """Deletes a file or folder in storage. Returns False if this fails; the regular cleanup then tries again later."""
    try:
        await anyio.to_thread.run_sync(storage.delete, uri)
    except (OSError, ValueError) as error:  # ValueError: a URI of a storage that the service no longer knows
        log.warning("%s could not be deleted from storage and is tried again later: %s", uri, error)
        return False
    return True
