"""raydpo files: training data and results."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.client import api_command, err, out, send_file
from services.cli.lists import date, list_command
from services.cli.reading import Columns, MaxInvalidShare, reading

if TYPE_CHECKING:
    from openai import OpenAI

app = typer.Typer(no_args_is_help=True, help="Training data and results.")

FileId = Annotated[str, typer.Argument(metavar="ID")]


@api_command(app)
def upload(
    client: "OpenAI",
    path: Annotated[Path, typer.Argument(help="JSONL of pairs or demonstrations.", exists=True)],
    columns: Columns = None,
    max_invalid_share: MaxInvalidShare = None,
) -> None:
    """Check and store a file of rows; prints its id."""
    stored = send_file(client, path, reading(columns, max_invalid_share))
    err.print(f"{stored.filename}: {stored.bytes} bytes")
    out.print(stored.id)


list_command(
    app,
    "/files",
    "Files, newest first.",
    {"id": "id", "name": "filename", "purpose": "purpose", "bytes": "bytes", "created": date("created_at")},
)


@api_command(app)
def show(client: "OpenAI", file_id: FileId) -> None:
    """What is known of a file, with the report of its check."""
    out.print_json(client.files.retrieve(file_id).model_dump_json())


@api_command(app)
def content(client: "OpenAI", file_id: FileId) -> None:
    """The file itself, to standard output."""
    import sys

    with client.files.with_streaming_response.content(file_id) as response:
        for chunk in response.iter_bytes():
            sys.stdout.buffer.write(chunk)


@api_command(app)
def delete(client: "OpenAI", file_id: FileId) -> None:
    """Remove a file."""
    client.files.delete(file_id)
    out.print(f"deleted {file_id}")
