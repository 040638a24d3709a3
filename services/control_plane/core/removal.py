"""Removes bytes from storage."""

import logging

import anyio.to_thread

from services import storage

log = logging.getLogger(__name__)


async def remove_bytes(uri: str) -> bool:
    """Whether they are gone. If not, the sweeper removes them later."""
    try:
        await anyio.to_thread.run_sync(storage.delete, uri)
    except OSError as error:
        log.warning("What is deleted still lies at %s: %s", uri, error)
        return False
    return True
