"""Finds the files of a dataset on the Hugging Face hub: `hf://datasets/<organization>/<name>[@<revision>]/<path>`.

The environment variable HF_ENDPOINT sets the address of the hub. The token in the environment variable HF_TOKEN is sent
only for organizations that a prefix in the setting `dataset_uris` names. If it were sent for all, every user could read
all data that the token's owner may read. All files come from one commit, even if a revision such as a branch moves
during the download. pyarrow's own `hf://` is not used, because it resolves the revision again with each request.
"""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import httpx
import httpx2
from huggingface_hub import DatasetInfo, HfApi, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HfUriError
from huggingface_hub.utils import build_hf_headers, parse_hf_uri

from services.contract import Message, Report
from services.training.source.download import PAUSES_SECONDS, RETRIED_STATUSES, Remote
from services.uri import InvalidUri, is_folder, matches, names_organization

TIMEOUT_SECONDS = 60.0

Answer = TypeVar("Answer")


def client(uri: str, prefixes: Sequence[str]) -> httpx.Client:
    """Returns an HTTP client that downloads files from the Hugging Face hub. It sends the token in HF_TOKEN if one of
    `prefixes`, the setting `dataset_uris`, names the organization in `uri`.

    The client may connect to every address, also to private ones, because the operator and not the user chose the hub.
    """
    return httpx.Client(headers=build_hf_headers(token=_token(uri, prefixes)), timeout=TIMEOUT_SECONDS)


def _token(uri: str, prefixes: Sequence[str]) -> bool | None:
    """Returns the argument `token` for the hub's Python client. If one of `prefixes` names the organization in `uri`,
    the result is None, with which the client sends the token in HF_TOKEN (if it is set). If no prefix names the
    organization, the result is False, with which the client sends no token."""
    return None if names_organization(uri, prefixes) else False


def find(uri: str, prefixes: Sequence[str], report: Callable[[Report], None]) -> list[Remote]:
    """Returns the files that the hub URI `uri` names, sorted by name: one file, or several files of a folder.

    Raises InvalidUri if there are no such files, or if the hub refuses access. `prefixes` is the setting
    `dataset_uris`, which decides whether the token in HF_TOKEN may be sent. `report` tells the user if the hub does not
    answer at once.
    """
    try:
        place = parse_hf_uri(uri)
    except HfUriError as error:
        raise InvalidUri(str(error)) from None
    info = _with_retries(uri, lambda: _info(place.id, place.revision, _token(uri, prefixes)), report)
    path = f"{place.path_in_repo}/" if uri.endswith("/") and place.path_in_repo else place.path_in_repo
    folder, slash, pattern = path.rpartition("/")
    files = [
        Remote(name, file.size or 0, hf_hub_url(place.id, name, repo_type="dataset", revision=info.sha))
        for file in info.siblings or []
        if (name := file.rfilename).startswith(folder + slash)
        and (matches(pattern, name[len(folder + slash) :]) if is_folder(uri) else name == path)
    ]
    if not files:
        raise InvalidUri(f"{uri} names no file of the dataset; check the path.")
    return sorted(files)


def _info(name: str, revision: str | None, token: bool | None) -> DatasetInfo:
    return HfApi(token=token).dataset_info(name, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS)


def _with_retries(uri: str, ask: Callable[[], Answer], report: Callable[[Report], None]) -> Answer:
    """Calls `ask`, a function that asks the hub, and returns its result. After a temporary error of the hub, tells the
    user about the error, and calls `ask` again, up to a few times.

    Raises InvalidUri for errors that are not temporary.
    """
    for number, pause in enumerate(PAUSES_SECONDS):
        try:
            return ask()
        except HfHubHTTPError as error:
            reason = f"answers {error.response.status_code}"
            status = error.response.status_code
            if status < 500 and status not in RETRIED_STATUSES:
                answer = error.server_message or error.response.reason_phrase
                remedy = (
                    "If the dataset is private, the operator must set HF_TOKEN for the service and list the dataset's "
                    "organization as a prefix in the setting dataset_uris."
                )
                message = f"The Hugging Face hub answers {status} {answer} for {uri}. {remedy}"
                raise InvalidUri(message) from None
        except httpx2.TransportError as error:
            reason = f"cannot be reached: {error or type(error).__name__}"
        if number == 0:
            what = f"The Hugging Face hub {reason}. It is asked for {uri} again"
            report(Message(level="warn", message=f"{what}, up to {len(PAUSES_SECONDS)} times."))
        time.sleep(pause)
    return ask()
