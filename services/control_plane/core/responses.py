"""Builds the parts of JSON responses that many routes share.

Times are integers in Unix seconds. Fields that OpenAI's API lacks are in `x_raydpo`.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any


def seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())


def listing(data: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """Returns the JSON object of one page of a list. `data` are the page's objects, and `has_more` says whether more
    follow.

    The client asks for the next page with `after` set to this page's `last_id`.
    """
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {"object": "list", "data": list(data), "has_more": has_more, **ends}


def deleted(kind: str, name: str) -> dict[str, Any]:
    return {"id": name, "object": kind, "deleted": True}
