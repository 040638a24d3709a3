"""How a command reaches the service, and how it says what went wrong."""

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types import FileObject

ONE_REQUEST_BYTES = 512 * 2**20  # what a service takes in one request, if it was not told otherwise
PART_BYTES = 64 * 2**20  # of an upload in parts

# Without markup: names and messages may have brackets of their own.
out = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
err = Console(markup=False, highlight=False, emoji=False, soft_wrap=True, stderr=True)

Url = Annotated[
    str | None,
    typer.Option(help="Base URL of the API, https://…/v1. Default: RAYDPO_URL, else the service started here last."),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(help="File with the API key. Default: the key in RAYDPO_API_KEY, else api.key in RAYDPO_HOME."),
]
CONNECTION = [
    inspect.Parameter("url", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Url),
    inspect.Parameter("key_file", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=KeyFile),
]


def _not_empty(text: str) -> str:
    """As the value of an unset variable of a shell is."""
    if not text:
        raise typer.BadParameter("it is empty")
    return text


def id_argument(metavar: str = "ID") -> Any:
    return typer.Argument(metavar=metavar, parser=_not_empty)


def default_home() -> Path:
    return Path(os.environ.get("RAYDPO_HOME", "~/.raydpo")).expanduser()


def connect(url: str | None, key_file: Path | None) -> "OpenAI":
    """A client for what the options or the environment name, else for the service of the default home."""
    from openai import OpenAI

    home = default_home()
    url = url or os.environ.get("RAYDPO_URL")
    if url is None:
        noted = home / "url"  # `up` writes it
        url = noted.read_text() if noted.exists() else "http://127.0.0.1:8000/v1"
    key = None if key_file else os.environ.get("RAYDPO_API_KEY")
    if key is None:
        try:
            key = (key_file or home / "api.key").expanduser().read_text().strip()
        except OSError as error:
            fail(f"no API key: {error}. Set RAYDPO_API_KEY or --key-file.")
    return OpenAI(base_url=url, api_key=key)


def api_command(app: typer.Typer, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make `function(client, …)` a command of `app` that takes --url and --key-file too and fails in one line."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function).parameters.values())[1:]

        def run(*, url: str | None = None, key_file: Path | None = None, **options: Any) -> None:
            with connect(url, key_file) as client, one_line_errors(client):
                function(client, **options)

        run.__signature__ = inspect.Signature([*own, *CONNECTION])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *CONNECTION]}
        app.command(name or function.__name__, help=function.__doc__)(run)
        return run

    return register


def send_file(client: "OpenAI", path: Path, reading: Mapping[str, Any]) -> "FileObject":
    """Upload rows, in parts if they are many, and wait until they are checked. `reading` is x_raydpo's of a file."""
    said = {"x_raydpo": reading} if reading else {}
    num_bytes = path.stat().st_size
    if num_bytes <= ONE_REQUEST_BYTES:
        with path.open("rb") as file:
            return client.files.create(file=file, purpose="fine-tune", extra_body=said)
    upload = client.uploads.create(
        bytes=num_bytes, filename=path.name, mime_type="application/jsonl", purpose="fine-tune", extra_body=said
    )
    with path.open("rb") as file:
        parts = [
            client.uploads.parts.create(upload.id, data=part).id for part in iter(lambda: file.read(PART_BYTES), b"")
        ]
    sent = client.uploads.complete(upload.id, part_ids=parts).file
    assert sent is not None
    err.print(f"{path.name} is sent as {sent.id}; its rows are being checked")
    checked = client.files.wait_for_processing(sent.id, max_wait_seconds=24 * 3600)
    if checked.status == "error":
        fail(str(checked.status_details))
    return checked


def write_content(client: "OpenAI", file_id: str) -> None:
    """Write the file's bytes to standard output."""
    with client.files.with_streaming_response.content(file_id) as response:
        for chunk in response.iter_bytes():
            sys.stdout.buffer.write(chunk)


@contextmanager
def one_line_errors(client: "OpenAI") -> Iterator[None]:
    """The API's message, not the client's traceback."""
    from openai import APIConnectionError, APIStatusError

    try:
        yield
    except APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        fail(str(body.get("message") or error.message))
    except APIConnectionError:
        fail(f"nothing answers at {client.base_url}; start the service with `raydpo up`, or set --url.")
    except BrokenPipeError:
        raise  # the reader has seen enough; click ends quietly
    except OSError as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    err.print(f"error: {safe(message)}", style="red")
    raise typer.Exit(1)


def safe(text: str) -> str:
    """Without characters that a terminal obeys: a message may quote what a stranger's file holds."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text.expandtabs())


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on a terminal, tab-separated lines in a pipe."""
    cells = [[safe(str(cell)).replace("\n", " ") for cell in row] for row in rows]
    if not out.is_terminal:
        for row in cells:
            typer.echo("\t".join(row))
        return
    table = Table(*columns, box=None)
    for row in cells:
        table.add_row(*map(Text, row))
    out.print(table)
