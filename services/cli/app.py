"""Builds the `raydpo` command from the modules of its subcommands.

A subcommand imports slow packages only when it runs.
"""

import gc
import os
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from services.cli.client import default_home, fail
from services.cli.files import data, feedback, files
from services.cli.jobs import jobs, methods, plan, sweeps
from services.cli.models import chat, deployments, evaluations, lm_eval, models, rewards, rounds
from services.cli.service import settings
from services.cli.tenants import audit, keys, projects, usage, webhooks

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(data.app, name="data")
app.add_typer(files.app, name="files")
app.add_typer(feedback.app, name="feedback")
app.add_typer(jobs.app, name="jobs")
app.add_typer(sweeps.app, name="sweeps")
app.add_typer(models.app, name="models")
app.add_typer(deployments.app, name="deployments")
app.add_typer(evaluations.app, name="evaluations")
app.add_typer(rounds.app, name="rounds")
app.add_typer(keys.app, name="keys")
app.add_typer(projects.app, name="projects")
app.add_typer(webhooks.app, name="webhooks")
chat.register(app)
lm_eval.register(evaluations.app)
rewards.register(app)
methods.register(app)
settings.register(app)
audit.register(app)
usage.register(app)
plan.register(app)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"raydpo {version('raydpo')}")
        raise typer.Exit


@app.callback()
def raydpo(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print raydpo's version and exit.")
    ] = False,
) -> None:
    """Train and query policies through a raydpo service, or run a service with `raydpo up`."""


@app.command()
def migrate() -> None:
    """Upgrade the schema of the database at DATABASE_URL to this release's version.

    If DATABASE_URL leads to PgBouncer, set DATABASE_DIRECT_URL to the URL of the database itself.
    """
    from services.control_plane.core.store import NoDatabase, migrate

    if not (database_url := os.environ.get("DATABASE_DIRECT_URL") or os.environ.get("DATABASE_URL")):
        fail("DATABASE_URL is not set; set DATABASE_URL to the database, such as postgresql://user:password@host/name.")
    try:
        migrate(database_url)
    except NoDatabase as error:
        fail(str(error))


@app.command()
def up(
    home: Annotated[
        Path | None,
        typer.Option(
            help="Folder in which the service keeps its files and keys, and which may hold the settings file "
            "raydpo.toml. Default: the folder in RAYDPO_HOME, else ~/.raydpo."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="IP address or host name that the API listens on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="TCP port that the API listens on; 0 chooses any free port.", min=0, max=65535)
    ] = 8000,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="URL of the dashboard of a running Ray cluster to use, such as http://host:8265. Default: start a Ray "
            "cluster on this machine."
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SOURCE",
            help="Base model to offer: NAME is the model's name in the API, SOURCE is a local folder or an id on the "
            "Hugging Face hub. Repeatable.",
        ),
    ] = None,
    opens: Annotated[
        bool, typer.Option("--open", help="Open the service's web page in your browser when the service is ready.")
    ] = False,
) -> None:
    """Run the service in the foreground until Ctrl-C.

    The command also starts PostgreSQL, unless DATABASE_URL is set, and Ray, unless --ray-address is given. `raydpo
    settings` lists all settings of the service; docs/operate/settings.md explains each setting.
    """
    # Imported objects live until the process ends. Collecting garbage among them takes a tenth of the start.
    gc.disable()
    from services.cli.service.up import Refused, serve

    gc.enable()
    try:
        serve(home or default_home(), host=host, port=port, ray_address=ray_address, models=model or [], opens=opens)
    except Refused as error:
        fail(str(error))
