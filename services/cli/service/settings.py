"""The `raydpo settings` command: list the settings that `raydpo up` would use, and the source of each value."""

import json
import os
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from services.cli.client import default_home, err, fail
from services.cli.lists import AsJson, Columns, print_items
from services.local import gpus

BY_UP = ("database_url", "storage_url", "api_key", "advertised_url", "ray_url")  # `raydpo up` sets these if you do not


def register(app: typer.Typer) -> None:
    app.command()(settings)


def settings(
    home: Annotated[
        Path | None,
        typer.Option(
            help="Folder in which the service keeps its files and keys, and which may hold the settings file "
            "raydpo.toml. Default: the folder in RAYDPO_HOME, else ~/.raydpo."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the value of every setting that `raydpo up` would use, and the source of each value. Starts nothing."""
    for line in misspelled():
        err.print(line)
    columns: Columns = {"name": "name", "value": _shown, "from": "source"}
    print_items(_settings((home or default_home()).expanduser(), home), columns, as_json)


def _shown(item: dict[str, Any]) -> str:
    value = item["value"]
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _settings(home: Path, named: Path | None) -> list[dict[str, Any]]:
    from pydantic import ValidationError
    from pydantic_settings import EnvSettingsSource, InitSettingsSource

    from services.control_plane.settings import Settings

    given = InitSettingsSource(Settings, {"home": home})
    try:
        sources = Settings.settings_customise_sources(Settings, given, EnvSettingsSource(Settings), given, given)
        _, environment, file = (source() for source in sources)
        said = environment | file
        missing = [name for name in BY_UP if not {name, Settings.variable(name)} & said.keys()]
        configured = [name for name in gpus.NAMES if {name, Settings.variable(name)} & said.keys()]
        chosen, _ = gpus.defaults(configured)  # a Ray that is started here
        given_by_up: dict[str, Any] = dict.fromkeys(missing, "-") | chosen
        known = Settings(home=home, **given_by_up).model_dump(mode="json")
    except ValidationError as error:
        first = error.errors()[0]
        fail(f"setting {'.'.join(map(str, first['loc']))}: {first['msg']}")
    except (OSError, ValueError) as error:
        fail(str(error))
    path = os.environ.get("RAYDPO_SETTINGS_FILE", home / "raydpo.toml")
    items = []
    for name, field in Settings.model_fields.items():
        names = {name, Settings.variable(name)}
        if name == "home" and named:
            source = "--home"
        elif names & environment.keys():
            source = Settings.variable(name)
        else:
            source = str(path) if names & file.keys() else "raydpo up" if name in given_by_up else "default"
        value = None if name in missing else _without_password(name, known[name])
        items.append({"name": name, "value": value, "source": source, "description": field.description})
    return items


def _without_password(name: str, value: Any) -> Any:
    if value is None or not name.startswith("database_") or not isinstance(value, str):
        return value
    url = urlsplit(value)
    return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"


def misspelled() -> Iterator[str]:
    """Yields a warning for each environment variable that is probably a misspelled setting of the service.

    These are the variables that begin with RAYDPO_, name no setting, and resemble the name of a setting.
    """
    from services.control_plane.settings import Settings

    known = [Settings.variable(name) for name in Settings.model_fields]
    for variable in os.environ:
        close = get_close_matches(variable, known, n=1, cutoff=0.85)
        if variable.startswith("RAYDPO_") and variable not in known and close:
            yield f"{variable} is not a setting and has no effect; did you mean {close[0]}?"
