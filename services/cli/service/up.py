"""Runs the service for `raydpo up`: PostgreSQL, Ray and the control plane, with all their data in one home folder."""

import asyncio
import gc
import os
import secrets
import signal
import socket
import tomllib
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from pydantic import ValidationError

from services import storage
from services.cli.client import out
from services.cli.service.settings import misspelled
from services.control_plane.app import create_app
from services.control_plane.core import log_setup
from services.control_plane.core.store import NoDatabase, migrate
from services.control_plane.http.server import Server
from services.control_plane.settings import Settings
from services.local import gpus
from services.local.errors import StackError
from services.local.stack import Stack, running_stack, write_secret


class Refused(Exception):
    """Raised if the service cannot run as the user asked. The message names the reason and the remedy."""


def serve(
    home: Path, *, host: str, port: int, ray_address: str | None, models: Sequence[str], opens: bool = False
) -> None:
    """Runs the service until SIGINT or SIGTERM, then stops every process that this call started.

    - `home` is the folder for the service's files, and `host` and `port` the address at which the API listens.
    - `ray_address` is the URL of a Ray cluster. If it is None, the call starts Ray on this machine.
    - `models` are the base models to offer, as texts of the form NAME=SOURCE.
    - `opens` says whether to open the service's web page in the user's browser when the service is ready.

    Raises Refused if the service cannot start.
    """
    home = home.expanduser().resolve()
    sources = dict(_model(argument) for argument in models)
    listening = _listen(host, port)
    url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{listening.getsockname()[1]}"
    os.umask(0o077)  # only the owner may read files, models and keys
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt_once)
    database_url = _configured(home, "database_url")
    try:
        with running_stack(home, ray_address=ray_address, database_url=database_url, say=out.print) as stack:
            settings = _settings(home, stack, sources, url)
            for line in misspelled():
                out.print(line)
            log_setup.configure(settings.log_format, home / "raydpo.log")
            migrate(settings.database_direct_url or settings.database_url)
            server = Server(create_app(settings), log_config=None, access_log=False, timeout_graceful_shutdown=5)
            gc.freeze()  # loaded objects live until the process ends; collecting garbage among them delays requests
            with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
                runner.run(_serve(server, settings, listening, url, opens))
    except (StackError, NoDatabase) as error:
        raise Refused(str(error)) from error
    except KeyboardInterrupt:
        out.print("stopped")
    finally:
        listening.close()


async def _serve(server: Server, settings: Settings, listening: socket.socket, url: str, opens: bool) -> None:
    announcing = asyncio.create_task(_announce(settings, url, opens))
    try:
        await server.serve(sockets=[listening])
    finally:
        announcing.cancel()
    if not server.started:
        raise Refused(f"the service did not start; {settings.home / 'raydpo.log'} says why.")


async def _announce(settings: Settings, url: str, opens: bool) -> None:
    """Waits until the service answers, then prints the URLs of the API and of the web page, the file of the API key and
    the base models. Opens the page if `opens` is true.
    """
    # The requests go to this process, so no certificates are needed, which take long to load.
    async with httpx.AsyncClient(base_url=url, trust_env=False, verify=False) as client:
        while True:
            if await _is_ready(client):
                break
            await asyncio.sleep(0.02)
    (settings.home / "url").write_text(f"{url}/v1")
    out.print(f"ready {url}/v1")
    key_file = settings.home / "api.key"
    configured = _configured(settings.home, "api_key")
    out.print(f"page: {url}/ (to sign in, paste {'your API key' if configured else f'what `cat {key_file}` prints'})")
    out.print(f"api key: {'as configured' if configured else key_file}")
    out.print("base models: " + (", ".join(settings.models) or "none; start with --model NAME=SOURCE"))
    if opens and not await asyncio.to_thread(_open, f"{url}/"):
        out.print(f"no browser could be opened here; open {url}/ in yours")


def _open(url: str) -> bool:
    """Opens the URL in the user's browser. Returns False if no browser can be opened.

    The URL does not contain the API key, because browsers keep URLs, and every user of the machine can see the
    arguments of a command.
    """
    try:
        browser = webbrowser.get()
    except webbrowser.Error:
        return False
    if type(browser) is webbrowser.GenericBrowser and "BROWSER" not in os.environ:
        return False  # a text browser, which would take this terminal, and runs no scripts
    return browser.open(url)


async def _is_ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/readyz")).is_success
    except httpx.HTTPError:
        return False


def _settings(home: Path, stack: Stack, sources: dict[str, str], url: str) -> Settings:
    """Returns the settings of the service, which is to run with the PostgreSQL server and the Ray cluster of `stack`.

    The addresses in `stack` and the models in `sources` override the environment. The environment overrides the
    settings file, which overrides the defaults.
    """
    given: dict[str, Any] = {
        "home": home,
        "database_url": stack.database_url,
        "ray_url": stack.ray_url,
        "models": sources,
    }
    if _configured(home, "api_key") is None:
        given["api_key"] = write_secret(home / "api.key", f"rd-{secrets.token_urlsafe(32)}").read_text()
    if stack.ray_token_file is not None:
        given |= {"ray_token": stack.ray_token_file.read_text(), "serve_url": stack.serve_url}
        chosen, words = gpus.defaults([name for name in gpus.NAMES if _configured(home, name) is not None])
        given |= chosen
        if words:
            out.print(words)
    defaults = {"storage_url": (home / "storage").as_uri(), "advertised_url": url}
    given |= {name: value for name, value in defaults.items() if _configured(home, name) is None}
    try:
        settings = Settings(**given)
        storage.check_bucket(settings.storage_url)
    except ValidationError as error:
        first = error.errors()[0]
        raise Refused(f"setting {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except storage.MissingBucketError as error:
        raise Refused(f"setting storage_url: {error}") from None
    return settings


def _configured(home: Path, name: str) -> str | None:
    """Returns the value of the setting `name` from the environment or the settings file, or None if neither has it.

    Unlike `Settings`, this works while other settings still lack values.
    """
    in_environment = os.environ.get("DATABASE_URL" if name == "database_url" else f"RAYDPO_{name.upper()}")
    file = Path(os.environ.get("RAYDPO_SETTINGS_FILE", home / "raydpo.toml"))
    if in_environment is not None or not file.is_file():
        return in_environment
    try:
        value = tomllib.loads(file.read_text()).get(name)
    except tomllib.TOMLDecodeError as error:
        raise Refused(f"{file} is not valid TOML: {error}") from None
    return None if value is None else str(value)


def _model(argument: str) -> tuple[str, str]:
    name, _, source = argument.partition("=")
    if not name or not source:
        raise Refused(f"--model {argument} must be NAME=SOURCE, for example tiny=./tiny or qwen=Qwen/Qwen3-0.6B.")
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise Refused(f"{folder} holds no config.json; set --model to the folder of a Hugging Face model.")
        return name, str(folder.resolve())
    if source.startswith((".", "/", "~")):
        raise Refused(
            f"the source {source} of model {name!r} is not a folder; give an existing folder or an id on the "
            "Hugging Face hub."
        )
    return name, source


def _listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens at `host` and `port`. Raises Refused if the address cannot be used.

    Call this before the slow parts of the start, so that the user learns immediately that a port is in use.
    """
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise Refused(
            f"cannot listen at {host}:{port}: {os.strerror(error.errno or 0)}; choose another --port."
        ) from None
    # A response is sent in two writes. Without TCP_NODELAY, the second waits 40 ms for the client's delayed ACK.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
    return listening


def _interrupt_once(number: int, frame: FrameType | None) -> None:
    """Handles SIGINT and SIGTERM: the first signal stops the service.

    Later signals are ignored, because they would interrupt the shutdown.
    """
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt
