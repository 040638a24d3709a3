"""The command's parts, wired together. What is heavy is imported by the command that needs it."""

import gc
import os
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from services.cli import audit, chat, data, files, jobs, keys, methods, models, plan, projects, settings, webhooks
from services.cli.client import default_home, fail

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(data.app, name="data")
app.add_typer(files.app, name="files")
app.add_typer(jobs.app, name="jobs")
app.add_typer(models.app, name="models")
app.add_typer(keys.app, name="keys")
app.add_typer(projects.app, name="projects")
app.add_typer(webhooks.app, name="webhooks")
chat.register(app)
methods.register(app)
settings.register(app)
audit.register(app)
plan.register(app)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"raydpo {version('raydpo')}")
        raise typer.Exit


@app.callback()
def raydpo(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train and query policies through a raydpo service, or run one with `raydpo up`."""


@app.command()
def migrate() -> None:
    """Upgrade the database at DATABASE_URL to the newest schema. Beside a PgBouncer, set DATABASE_DIRECT_URL."""
    from services.control_plane.core.store import PoolerUrl, migrate

    if not (database_url := os.environ.get("DATABASE_DIRECT_URL") or os.environ.get("DATABASE_URL")):
        fail("DATABASE_URL is not set; it names the database, postgresql://user:password@host/name.")
    try:
        migrate(database_url)
    except PoolerUrl as error:
        fail(str(error))


@app.command()
def up(
    home: Annotated[
        Path | None, typer.Option(help="Folder of the service's state. Default: RAYDPO_HOME, else ~/.raydpo.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address at which the API listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the API; 0 takes any free one.", min=0, max=65535)] = 8000,
    ray_address: Annotated[
        str | None,
        typer.Option(help="Dashboard of a running Ray, such as http://host:8265. Default: a Ray is started here."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SOURCE", help="A base model: its name, and a local folder or a hub id. Repeatable."),
    ] = None,
) -> None:
    """Run the service in the foreground, with PostgreSQL and Ray, until Ctrl-C.

    `raydpo settings` lists all its settings; docs/operate/settings.md says what each is for.
    """
    gc.disable()  # meanwhile: all that is imported stays, and walking it is a tenth of a start
    from services.cli.up import Refused, serve

    gc.enable()
    try:
        serve(home or default_home(), host=host, port=port, ray_address=ray_address, models=model or [])
    except Refused as error:
        fail(str(error))
