"""Defines commands that list items of the service, as a table or as JSON."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.client import api_command, err, out, print_rows

if TYPE_CHECKING:
    from openai import OpenAI

Item = dict[str, Any]
Columns = Mapping[str, str | Callable[[Item], object]]
"""Maps each column's heading to the name of the item's field to show, or to a function that returns the cell."""

PAGE = 100  # the largest number of items that the service returns in one page
Limit = Annotated[int, typer.Option(min=1, help="Maximum number of items to show.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON with every field, instead of a table.")]


def show_list(
    client: "OpenAI", path: str, columns: Columns, limit: int, as_json: bool, query: Mapping[str, str] | None = None
) -> None:
    """Requests the list at the API's `path`, and prints its first `limit` items as a table with `columns`, or as JSON
    if `as_json`. If the list has more items, prints a note about this.

    `query` holds query parameters of the request, None if there are none.
    """
    found = list(islice(_items(client, path, limit + 1, query or {}), limit + 1))
    if len(found) > limit:
        err.print(f"The list has more items than --limit {limit}; raise --limit to show more.")
    print_items(found[:limit], columns, as_json)


def print_items(items: Sequence[Item], columns: Columns, as_json: bool) -> None:
    if as_json:
        out.print_json(data=items)
    else:
        print_rows(list(columns), [[_cell(item, of) for of in columns.values()] for item in items])


def list_command(
    app: typer.Typer, path: str, what: str, columns: Columns, *, name: str = "list"
) -> Callable[..., None]:
    """Adds a command to `app` that lists the items at the API's `path` as a table with `columns`, or as JSON. `what` is
    the command's help text."""

    def list_items(client: "OpenAI", limit: Limit = 20, as_json: AsJson = False) -> None:
        show_list(client, path, columns, limit, as_json)

    list_items.__doc__ = what
    return api_command(app, name)(list_items)


def date(field: str) -> Callable[[Item], datetime]:
    """Returns a function that reads the time in the field `field` of an item, and converts Unix seconds to local
    time."""
    return lambda item: datetime.fromtimestamp(item[field])


def _cell(item: Item, of: str | Callable[[Item], object]) -> object:
    return item[of] if isinstance(of, str) else of(item)


def _items(client: "OpenAI", path: str, most: int, query: Mapping[str, str]) -> Iterator[Item]:
    """Yields the items of the list at the API's `path`, page by page.

    The next page is requested only when the caller needs an item of that page. A page has at most `most` items.
    """
    params: dict[str, object] = {**query, "limit": min(most, PAGE)}
    while True:
        page: Any = client.get(path, cast_to=object, options={"params": params})
        yield from page["data"]
        if not page["has_more"]:
            return
        params["after"] = page["last_id"]
