"""The `raydpo files` commands: upload training data, and list, read and delete the service's files."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.client import api_command, err, id_argument, out, send_file, write_content
from services.cli.lists import date, list_command
from services.cli.reading import Columns, MaxInvalidShare, reading

if TYPE_CHECKING:
    from openai import OpenAI

app = typer.Typer(no_args_is_help=True, help="Upload training data, and list, read and delete files.")

FileId = Annotated[str, id_argument("Id of the file, such as file-1a2b….")]


@api_command(app)
def upload(
    client: "OpenAI",
    path: Annotated[
        Path,
        typer.Argument(
            help="Training file to upload, with rows in JSON Lines (plain, gzip or zstd), Parquet or Arrow.",
            exists=True,
            dir_okay=False,
        ),
    ],
    columns: Columns = None,
    max_invalid_share: MaxInvalidShare = None,
) -> None:
    """Upload a file of rows, wait until the service has checked the rows, and print the file's id."""
    stored = send_file(client, path, reading(columns, max_invalid_share))
    err.print(f"{stored.filename}: {stored.bytes} bytes")
    out.print(stored.id)


list_command(
    app,
    "/files",
    "List all files, newest first.",
    {"id": "id", "name": "filename", "purpose": "purpose", "bytes": "bytes", "created": date("created_at")},
)


@api_command(app)
def show(client: "OpenAI", file_id: FileId) -> None:
    """Show all fields of a file as JSON, with the service's report on the file's rows."""
    out.print_json(client.files.retrieve(file_id).model_dump_json())


@api_command(app)
def content(client: "OpenAI", file_id: FileId) -> None:
    """Write the bytes of a file to standard output."""
    write_content(client, file_id)


@api_command(app)
def delete(client: "OpenAI", file_id: FileId) -> None:
    """Delete a file from the service."""
    client.files.delete(file_id)
    out.print(f"deleted {file_id}")
