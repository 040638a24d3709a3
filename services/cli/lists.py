"""Commands that list items, as a table or as JSON."""

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
"""By heading: the field to show, or a function of the item."""

PAGE = 100  # items: no list of the service gives more at once
Limit = Annotated[int, typer.Option(min=1, help="How many to show at most.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON with every field, instead of a table.")]


def show_list(client: "OpenAI", path: str, columns: Columns, limit: int, as_json: bool) -> None:
    """Print the first `limit` items at `path`, and say where more follow."""
    found = list(islice(_items(client, path, limit + 1), limit + 1))
    if len(found) > limit:
        err.print(f"These are the first {limit}, and more follow: --limit N shows N.")
    print_items(found[:limit], columns, as_json)


def print_items(items: Sequence[Item], columns: Columns, as_json: bool) -> None:
    if as_json:
        out.print_json(data=items)
    else:
        print_rows(list(columns), [[_cell(item, of) for of in columns.values()] for item in items])


def list_command(
    app: typer.Typer, path: str, what: str, columns: Columns, *, name: str = "list"
) -> Callable[..., None]:
    """Add a command to `app` that lists the items at `path`. `what` says what they are, for its help."""

    def list_items(client: "OpenAI", limit: Limit = 20, as_json: AsJson = False) -> None:
        show_list(client, path, columns, limit, as_json)

    list_items.__doc__ = what
    return api_command(app, name)(list_items)


def date(field: str) -> Callable[[Item], datetime]:
    """A column that shows a field of Unix seconds in local time."""
    return lambda item: datetime.fromtimestamp(item[field])


def _cell(item: Item, of: str | Callable[[Item], object]) -> object:
    return item[of] if isinstance(of, str) else of(item)


def _items(client: "OpenAI", path: str, most: int) -> Iterator[Item]:
    """Page by page, as they are needed."""
    params: dict[str, object] = {"limit": min(most, PAGE)}
    while True:
        page: Any = client.get(path, cast_to=object, options={"params": params})
        yield from page["data"]
        if not page["has_more"]:
            return
        params["after"] = page["last_id"]
