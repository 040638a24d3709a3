"""Describes answers in the OpenAPI document, so that clients can make types of them. Nothing is checked at run time."""

from typing import Any, Generic, TypeVar

from typing_extensions import TypedDict

Item = TypeVar("Item")


class Page(TypedDict, Generic[Item]):
    """One page of a list."""

    object: str
    data: list[Item]
    has_more: bool
    first_id: str | None
    last_id: str | None


def answers(kind: Any) -> dict[int | str, dict[str, Any]]:
    """Returns the option `responses` of a route that answers 200 with an object of this type."""
    return {200: {"model": kind}}
