"""Connects the command line to the service: sends requests, uploads and downloads files, and prints errors and
tables."""

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
    from openai import APIStatusError, OpenAI
    from openai.types import FileObject

ONE_REQUEST_BYTES = 512 * 2**20  # the largest file that a service accepts in one request by default
PART_BYTES = 64 * 2**20  # size of one part of a larger file

# Markup is off, because names and messages may contain square brackets.
out = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
err = Console(markup=False, highlight=False, emoji=False, soft_wrap=True, stderr=True)

Url = Annotated[
    str | None,
    typer.Option(
        help="Base URL of the API, such as https://host/v1. Default: the URL in RAYDPO_URL, else the URL of the "
        "service that `raydpo up` last started on this machine."
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        help="File that holds the API key. Default: the key in RAYDPO_API_KEY, else the file api.key in the service's "
        "folder (RAYDPO_HOME, else ~/.raydpo)."
    ),
]
CONNECTION = [
    inspect.Parameter("url", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Url),
    inspect.Parameter("key_file", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=KeyFile),
]


def _not_empty(text: str) -> str:
    """Returns the text of a command's argument unchanged. Raises BadParameter if the text is empty, for example because
    a shell variable is not set."""
    if not text:
        raise typer.BadParameter("the id must not be empty")
    return text


def id_argument(what: str, metavar: str = "ID") -> Any:
    """Returns a typer argument that takes the id or name of an object of the service.

    `what` is the argument's help text, and `metavar` the word that stands for the argument there.
    """
    return typer.Argument(metavar=metavar, parser=_not_empty, help=what)


def default_home() -> Path:
    return Path(os.environ.get("RAYDPO_HOME", "~/.raydpo")).expanduser()


def connect(url: str | None, key_file: Path | None) -> "OpenAI":
    """Returns a client of the service's API.

    The URL comes from the option `url`, else from the variable RAYDPO_URL, else from the file `url` in the home folder
    of `raydpo up`. If none of them has a URL, it is http://127.0.0.1:8000/v1. The key comes from the option `key_file`,
    else from the variable RAYDPO_API_KEY, else from the file `api.key` in the home folder. Exits with an error if there
    is no key.
    """
    from openai import OpenAI

    home = default_home()
    url = url or os.environ.get("RAYDPO_URL")
    if url is None:
        noted = home / "url"  # `raydpo up` writes this file
        url = noted.read_text() if noted.exists() else "http://127.0.0.1:8000/v1"
    key = None if key_file else os.environ.get("RAYDPO_API_KEY")
    if key is None:
        try:
            key = (key_file or home / "api.key").expanduser().read_text().strip()
        except OSError as error:
            fail(f"no API key was found: {error}. Set RAYDPO_API_KEY or --key-file.")
    return OpenAI(base_url=url, api_key=key)


def api_command(app: typer.Typer, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Returns a decorator that registers a function as a command of `app`.

    The function's first argument is a client of the API. The command also gets the options --url and --key-file, and
    prints an error of the API in one line.
    """

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
    """Uploads a file of rows, in parts if the file is large, and waits until the service has checked the rows.

    `reading` holds the options for reading the rows; it is sent as the upload request's field `x_raydpo`. Exits with an
    error if the service refuses the rows.
    """
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
    err.print(f"{path.name} is uploaded as {sent.id}; the service is checking the file's rows")
    checked = client.files.wait_for_processing(sent.id, max_wait_seconds=24 * 3600)
    if checked.status == "error":
        fail(str(checked.status_details))
    return checked


def write_content(client: "OpenAI", file_id: str) -> None:
    """Downloads the file with the id `file_id` from the service, and writes its bytes to standard output."""
    with client.files.with_streaming_response.content(file_id) as response:
        for chunk in response.iter_bytes():
            sys.stdout.buffer.write(chunk)


@contextmanager
def one_line_errors(client: "OpenAI") -> Iterator[None]:
    """Runs a `with` block. If the API, the connection or a local file fails in the block, prints the error as one line
    and exits with status 1."""
    from openai import APIConnectionError, APIStatusError

    try:
        yield
    except APIStatusError as error:
        fail(message_of(error))
    except APIConnectionError:
        fail(f"nothing answers at {client.base_url}; start the service with `raydpo up`, or set --url.")
    except BrokenPipeError:
        raise  # the program at the other end of the pipe has ended; click then exits without a message
    except OSError as error:
        fail(str(error))


def message_of(error: "APIStatusError") -> str:
    """Returns the service's own message about a request that it refused, if its answer has one."""
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or error.message)


def fail(message: str) -> NoReturn:
    err.print(f"error: {safe(message)}", style="red")
    raise typer.Exit(1)


def safe(text: str) -> str:
    """Makes text safe to print on a terminal, and returns it.

    Tabs are expanded, and every other control character but newline is replaced by U+FFFD. A message may quote an
    uploaded file, and control characters in that file must not reach the terminal.
    """
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text.expandtabs())


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints rows as a table with headings on a terminal, or as tab-separated lines without headings in a pipe."""
    cells = [[safe(str(cell)).replace("\n", " ") for cell in row] for row in rows]
    if not out.is_terminal:
        for row in cells:
            typer.echo("\t".join(row))
        return
    table = Table(*columns, box=None)
    for row in cells:
        table.add_row(*map(Text, row))
    out.print(table)
