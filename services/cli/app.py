"""The command's parts, wired together. What is heavy is imported by the command that needs it."""

import gc
import os
from pathlib import Path
from typing import Annotated

import typer

from services.cli import audit, chat, data, files, jobs, keys, models, projects, webhooks
from services.cli.client import default_home, fail

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Preference optimization behind OpenAI's fine-tuning API.",
)
app.add_typer(data.app, name="data")
app.add_typer(files.app, name="files")
app.add_typer(jobs.app, name="jobs")
app.add_typer(models.app, name="models")
app.add_typer(keys.app, name="keys")
app.add_typer(projects.app, name="projects")
app.add_typer(webhooks.app, name="webhooks")
chat.register(app)
audit.register(app)


@app.command()
def migrate() -> None:
    """Bring the database that DATABASE_URL names, or DATABASE_DIRECT_URL beside a PgBouncer, to the newest schema."""
    from services.control_plane.core.store import PoolerUrl, migrate

    if not (database_url := os.environ.get("DATABASE_DIRECT_URL") or os.environ.get("DATABASE_URL")):
        fail("DATABASE_URL is not set; it names the database, postgresql://user:password@host/name.")
    try:
        migrate(database_url)
    except PoolerUrl as error:
        fail(str(error))


@app.command()
def up(
    home: Annotated[Path | None, typer.Option(help="Its state; RAYDPO_HOME, or ~/.raydpo.")] = None,
    host: Annotated[str, typer.Option(help="Where the API listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free port.", min=0, max=65535)] = 8000,
    ray_address: Annotated[
        str | None, typer.Option(help="Dashboard of a running Ray, http://host:8265; without it one is started here.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(metavar="NAME=SOURCE", help="A base model: a local folder or a hub id. Repeat.")
    ] = None,
) -> None:
    """Run the service in the foreground, with PostgreSQL and Ray, until Ctrl-C."""
    gc.disable()  # meanwhile: all that is imported stays, and walking it is a tenth of a start
    from services.cli.up import Refused, serve

    gc.enable()
    try:
        serve(home or default_home(), host=host, port=port, ray_address=ray_address, models=model or [])
    except Refused as error:
        fail(str(error))
