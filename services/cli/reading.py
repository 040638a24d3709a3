"""Options that say how the rows of a file are read."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from dpo_core.data.formats import ROLES
from services.cli.client import fail

Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        metavar="ROLE=COLUMN",
        help="The column of your file that holds a role, such as prompt=question. Repeatable.",
    ),
]
MaxInvalidShare = Annotated[
    float | None,
    typer.Option(
        "--max-invalid-share",
        min=0,
        max=0.5,
        help="Leave out rows that cannot be used, up to this share of all rows, such as 0.01. Default: none.",
    ),
]


def roles_of(columns: Sequence[str] | None) -> dict[str, str]:
    """The column of each role. Fails for what names none."""
    roles = {}
    for given in columns or ():
        role, _, column = given.partition("=")
        if role not in ROLES or not column:
            fail(f"--columns {given}: send ROLE=COLUMN, where ROLE is one of {', '.join(sorted(ROLES))}.")
        roles[role] = column
    return roles


def reading(columns: Sequence[str] | None, max_invalid_share: float | None) -> dict[str, Any]:
    """What these options are in x_raydpo."""
    drop = {"invalid_rows": "drop", "max_invalid_share": max_invalid_share} if max_invalid_share else {}
    roles = roles_of(columns)
    return ({"columns": roles} if roles else {}) | drop
