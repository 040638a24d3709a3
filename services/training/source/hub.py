"""Datasets on the Hugging Face hub: `hf://datasets/<organization>/<name>[@<revision>]/<path>`.

HF_ENDPOINT says which hub. It is asked without a token, as anybody may ask: with HF_TOKEN every user would read what
that token's owner may read. Where one of `dataset_uris` names the organization, it is asked with HF_TOKEN. The files
are those of one commit, whatever happens to the revision meanwhile; pyarrow's own `hf://` asks for it anew with each
request.
"""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import httpx
import httpx2
from huggingface_hub import DatasetInfo, HfApi, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HfUriError
from huggingface_hub.utils import build_hf_headers, parse_hf_uri

from services.training.source.download import PASSING, PAUSES_SECONDS, Remote
from services.uri import InvalidUri, is_folder, matches, names_organization

TIMEOUT_SECONDS = 60.0

Answer = TypeVar("Answer")


def client(uri: str, prefixes: Sequence[str]) -> httpx.Client:
    """The hub's addresses are the operator's choice: nothing of its answers is refused."""
    return httpx.Client(headers=build_hf_headers(token=_token(uri, prefixes)), timeout=TIMEOUT_SECONDS)


def _token(uri: str, prefixes: Sequence[str]) -> bool | None:
    """As the hub's client takes it. None: HF_TOKEN, if there is one. False: none."""
    return None if names_organization(uri, prefixes) else False


def find(uri: str, prefixes: Sequence[str]) -> list[Remote]:
    """The files that `uri` means, in order of name. Raises InvalidUri where the hub has none, or lets us have none."""
    try:
        place = parse_hf_uri(uri)
    except HfUriError as error:
        raise InvalidUri(str(error)) from None
    info = _ask(uri, lambda: _info(place.id, place.revision, _token(uri, prefixes)))
    path = f"{place.path_in_repo}/" if uri.endswith("/") and place.path_in_repo else place.path_in_repo
    folder, slash, pattern = path.rpartition("/")
    found = [
        Remote(name, file.size or 0, hf_hub_url(place.id, name, repo_type="dataset", revision=info.sha))
        for file in info.siblings or []
        if (name := file.rfilename).startswith(folder + slash)
        and (matches(pattern, name[len(folder + slash) :]) if is_folder(uri) else name == path)
    ]
    if not found:
        raise InvalidUri(f"{uri} holds no files.")
    return sorted(found)


def _info(name: str, revision: str | None, token: bool | None) -> DatasetInfo:
    return HfApi(token=token).dataset_info(name, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS)


def _ask(uri: str, question: Callable[[], Answer]) -> Answer:
    for pause in PAUSES_SECONDS:
        try:
            return question()
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status < 500 and status not in PASSING:
                said = error.server_message or error.response.reason_phrase
                needs = "needs the service's HF_TOKEN, and a prefix in dataset_uris that names its organization"
                message = f"{uri}: the hub answers {status} {said}; a private dataset {needs}."
                raise InvalidUri(message) from None
        except httpx2.TransportError:
            pass  # as the hub's own 5xx: the next try may do better
        time.sleep(pause)
    return question()
