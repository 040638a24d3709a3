"""Downloads the weights of a trained policy into a folder, and uploads them to the Hugging Face hub."""

import base64
import hashlib
import json
import re
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from services.cli.client import err, fail, safe

if TYPE_CHECKING:
    from openai import OpenAI

SILENCE_SECONDS = 120.0  # a request waits for a merge for a minute before the service answers
DIGEST_SECONDS = 3600.0  # the service may read all weights for their digest
RESUME_SECONDS = 2.0
MOST_TRIES = 10  # tries in a row that bring no byte
WORTH_WAITING = ("model_merging", "rate_limit_exceeded")  # error codes whose cause ends without the user's help
Value = TypeVar("Value")

HUB = re.compile(r"hf://([\w.-]+/[\w.-]+)")


class Download:
    """Downloads a model's weights into a folder, and continues if an earlier download was interrupted.

    The bytes received so far are kept in a file beside the folder.
    """

    def __init__(self, client: "OpenAI", model_id: str, format: str | None, folder: Path) -> None:
        self._url = f"{client.base_url}models/{model_id}/content"
        self._params = {"format": format} if format else {}
        self._key = {"Authorization": f"Bearer {client.api_key}"}
        self._folder = folder.resolve()
        self._received = 0  # bytes

    def run(self) -> dict[str, Any]:
        """Downloads, verifies and unpacks the model. Returns the content of the model's file raydpo.json."""
        if self._folder.exists() and (not self._folder.is_dir() or any(self._folder.iterdir())):
            fail(f"{self._folder} is not an empty folder; choose another folder.")
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        with _bar() as bar:
            part = self._try(lambda: self._fetch(bar))
        expected = self._try(self._digest)
        with part.open("rb") as file:
            found = base64.b64encode(hashlib.file_digest(file, "sha256").digest()).decode()
        if expected != f"sha-256=:{found}:":
            part.unlink()
            fail("the download was damaged on its way and was deleted; run the command again.")
        _unpack(part, self._folder)
        part.unlink()
        about: dict[str, Any] = json.loads((self._folder / "raydpo.json").read_text())
        return about

    def _try(self, step: Callable[[], Value]) -> Value:
        """Calls `step` until it succeeds, and returns its result.

        If the connection breaks, or the service asks the client to try again later, `step` is called again. After
        MOST_TRIES tries in a row that received no byte, the command exits with an error.
        """
        tries, received, told = 0, self._received, ""
        while tries < MOST_TRIES:
            try:
                return step()
            except httpx.TransportError as error:
                later = _TryLater(f"The connection broke: {error or type(error).__name__}.", None, RESUME_SECONDS)
            except _TryLater as error:
                later = error
            if later.message != told:
                err.print(safe(later.message))
            told = later.message
            tries = 0 if later.code in WORTH_WAITING or self._received > received else tries + 1
            received = self._received
            time.sleep(later.seconds)
        return fail(f"the download was not complete after {MOST_TRIES} tries; run the command again to continue it.")

    def _fetch(self, bar: Progress) -> Path:
        """Downloads the rest of the model's tar file, appends it to the bytes received so far, and returns the file's
        path. Shows the progress in `bar`.

        Starts from the beginning if the service now has another tar file, which the HTTP header ETag shows.
        """
        part, headers = self._part(), dict(self._key)
        if part and (size := part.stat().st_size):
            headers |= {"Range": f"bytes={size}-", "If-Range": f'"{part.suffixes[-2][1:]}"'}
        with httpx.stream("GET", self._url, params=self._params, headers=headers, timeout=SILENCE_SECONDS) as answer:
            if answer.status_code == 416 and part:  # the whole file had arrived
                return part
            if answer.is_error:
                answer.read()
                raise _refusal(answer)
            if answer.status_code == 200:
                if part:
                    part.unlink()
                etag = answer.headers["etag"].strip('"')
                part = self._folder.with_name(f".{self._folder.name}.{etag}.part")
            assert part
            self._append(answer, part, bar)
            return part

    def _part(self) -> Path | None:
        """Returns the path of the file that holds the bytes received so far, or None if no download has begun.

        The file's name contains the ETag of the tar file in the service.
        """
        name = re.compile(rf"\.{re.escape(self._folder.name)}\.[^.]+\.part")
        return next((path for path in self._folder.parent.glob(".*.part") if name.fullmatch(path.name)), None)

    def _append(self, answer: httpx.Response, part: Path, bar: Progress) -> None:
        begun = part.stat().st_size if part.exists() else 0
        total = begun + int(answer.headers["content-length"])
        task = bar.add_task(self._folder.name, total=total, completed=begun)
        try:
            with part.open("ab") as file:
                for chunk in answer.iter_raw(1 << 20):
                    file.write(chunk)
                    self._received += len(chunk)
                    bar.advance(task, len(chunk))
        finally:
            bar.remove_task(task)

    def _digest(self) -> str:
        """Asks the service for the SHA-256 of the whole tar file. Returns the value of the HTTP header Repr-Digest."""
        asked = self._key | {"Want-Repr-Digest": "sha-256=1", "Range": "bytes=0-0"}
        answer = httpx.get(self._url, params=self._params, headers=asked, timeout=DIGEST_SECONDS)
        if answer.is_error:
            raise _refusal(answer)
        return answer.headers["repr-digest"]


class _TryLater(Exception):
    """Raised if the service asks the client to send the request again later."""

    def __init__(self, message: str, code: str | None, seconds: float) -> None:
        super().__init__(message)
        self.message, self.code, self.seconds = message, code, seconds


def _refusal(answer: httpx.Response) -> _TryLater:
    """Returns the exception for a refused request, if the same request may succeed later. Exits with the service's
    error message if another try would not help."""
    try:
        error = answer.json()["error"]
    except (ValueError, LookupError, TypeError):
        error = {"message": f"the service answered {answer.status_code}: {answer.text[:200]}", "code": None}
    if answer.status_code not in (429, 503) or answer.headers.get("x-should-retry") == "false":
        fail(error["message"])
    return _TryLater(error["message"], error["code"], float(answer.headers.get("retry-after", RESUME_SECONDS)))


@contextmanager
def _bar() -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err, disable=not err.is_terminal, transient=True) as bar:
        yield bar


def _unpack(tar: Path, folder: Path) -> None:
    """Unpacks a tar of plain files into a folder.

    If a file's path leads outside the folder, the command fails and leaves no files behind.
    """
    beside = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with tarfile.open(tar, "r:") as opened:
            for member in opened:
                name = PurePosixPath(member.name)
                if not member.isreg() or name.is_absolute() or ".." in name.parts:
                    what = (
                        f"the downloaded tar file contains {member.name!r}, which is not a plain file inside its folder"
                    )
                    fail(f"{what}; nothing was unpacked. Tell the operator of the service.")
                opened.extract(member, beside, filter="data")
        if folder.exists():
            folder.rmdir()
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


# --- the hub -----------------------------------------------------------------------------------


def push(folder: Path, target: str, *, public: bool, summary: str) -> str:
    """Uploads a folder to the repository `target` on the Hugging Face hub, with the user's own token.

    If the repository does not exist, creates it: as a public one if `public`, else as a private one. `summary` is the
    message of the commit. Returns the commit's URL.
    """
    name = hub_name(target)
    try:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError:
        fail("raydpo models push needs the package huggingface-hub; install it with `pip install huggingface-hub`.")
    if get_token() is None:
        fail(
            "there is no token for the Hugging Face hub; set HF_TOKEN to a token with write access, or run `hf "
            "auth login`."
        )
    api = HfApi()
    try:
        api.create_repo(name, private=not public, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=summary))
    except HFValidationError as error:
        fail(f"'{target}' is not a valid repository name on the Hugging Face hub: {error}")
    except HfHubHTTPError as error:
        status = error.response.status_code
        needs = "; your token needs the right to write to this repository" if status in (401, 403, 404) else ""
        fail(
            f"the Hugging Face hub refuses the repository {name} with status {status}: "
            f"{error.server_message or error}{needs}."
        )
    except httpx.HTTPError as error:
        fail(f"the Hugging Face hub at {api.endpoint} does not answer ({error}); run the command again later.")


def hub_name(target: str) -> str:
    """Returns the repository's name, `organization/name`, from text such as `hf://organization/name`.

    Exits with an error if the text has another form.
    """
    if not (found := HUB.fullmatch(target)):
        fail(f"'{target}' must be hf://organization/name, such as hf://my-team/my-policy.")
    return found[1]
