"""Defines the options that say how the rows of a file are read: --columns and --max-invalid-share."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from dpo_core.data.formats.formats import ROLES
from services.cli.client import fail

Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        metavar="ROLE=COLUMN",
        help="Column to read as the prompt, as the chosen answer and so on: prompt=question reads the prompt from the "
        "column `question`. Repeatable. Default: columns are recognized by their names.",
    ),
]
MaxInvalidShare = Annotated[
    float | None,
    typer.Option(
        "--max-invalid-share",
        min=0,
        max=0.5,
        help="Leave out rows that cannot be used, up to this share of all rows, such as 0.01. "
        "Default: refuse a file with any such row.",
    ),
]


def roles_of(columns: Sequence[str] | None) -> dict[str, str]:
    """Parses the values of --columns, texts of the form ROLE=COLUMN, and returns the column of each role.

    A role says what a column holds, such as `prompt`. Exits with an error if a text names an unknown role or no column.
    """
    roles = {}
    for given in columns or ():
        role, _, column = given.partition("=")
        if role not in ROLES or not column:
            fail(f"--columns {given}: write ROLE=COLUMN, where ROLE is one of {', '.join(sorted(ROLES))}.")
        roles[role] = column
    return roles


def reading(columns: Sequence[str] | None, max_invalid_share: float | None) -> dict[str, Any]:
    """Returns the values of the options --columns and --max-invalid-share, as fields of the object `x_raydpo` in a
    request."""
    drop = {"invalid_rows": "drop", "max_invalid_share": max_invalid_share} if max_invalid_share else {}
    roles = roles_of(columns)
    return ({"columns": roles} if roles else {}) | drop
