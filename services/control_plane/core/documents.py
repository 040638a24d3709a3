"""Describes the JSON of responses in the OpenAPI document, from which clients can generate types.

The descriptions are only documentation: at run time, no response is checked against them.
"""

from typing import Any, Generic, TypeVar

from typing_extensions import TypedDict

Item = TypeVar("Item")


class Page(TypedDict, Generic[Item]):
    """The JSON object of one page of a list that the API returns: the items (`data`), the ids of the first and the last
    item, and whether more items follow (`has_more`)."""

    object: str
    data: list[Item]
    has_more: bool
    first_id: str | None
    last_id: str | None


def answers(kind: Any) -> dict[int | str, dict[str, Any]]:
    """Returns the option `responses` of a FastAPI route that answers 200 with a JSON object of the type `kind`."""
    return {200: {"model": kind}}
