"""Decides whether the service may read a URI that a user names.

The service may read more than its users may. Therefore a user's URI must begin with a prefix that the operator lists in
a setting: `dataset_uris` for training files, another setting for webhooks. The prefix `https://` admits every host;
`services.outbound` decides to which IP addresses a request may go.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

PORTS = {"http": 80, "https": 443}
SCHEMES = ("https", "http", "hf", "s3", "gs", "file")
HUB_PATH = re.compile(r"/[\w.-]+/[\w.-]+(@[^/]+)?(/.*)?")
DATASETS = "dataset_uris"  # the setting that lists the prefixes, unless a caller names another one
MAX_LENGTH = 8192  # characters; servers may redirect to signed URLs, which are long


class InvalidUri(ValueError):
    """Raised for a URI that cannot be read, or that the settings do not allow. The message names the reason and the
    remedy."""


class _Place(NamedTuple):
    """Holds a user's URI, or a URI prefix of the settings, in a normalized form: its path with scheme and host, and its
    options. In this form the two can be compared.
    """

    path: str  # begins with the scheme and host
    options: list[tuple[str, str]]  # options of Arrow's filesystem in the query, such as endpoint_override


def check_prefix(prefix: str) -> str:
    """Returns the URI prefix `prefix`, which a setting lists. Raises InvalidUri if the prefix is not valid."""
    _place(prefix)
    return prefix


def admitted(uri: str, prefixes: Sequence[str]) -> str:
    """Returns `uri` if it lies under one of `prefixes` and has a valid form. Raises InvalidUri if it does not.

    The URI may name one file or all files of a folder. In the returned `file://` URI, `..` and symlinks are resolved.
    """
    check(uri, prefixes)
    split = urlsplit(uri)
    if split.scheme != "file" and not split.hostname:
        name = "host" if split.scheme in PORTS else "bucket"
        raise InvalidUri(f"The URI {uri} names no {name}; write the {name} after '{split.scheme}://'.")
    if split.scheme in PORTS and is_folder(uri):
        raise InvalidUri(
            f"The URI {uri} names a folder, but folders cannot be listed over {split.scheme}; give the URI of a file."
        )
    if split.scheme == "hf" and not (split.netloc == "datasets" and HUB_PATH.fullmatch(split.path)):
        raise InvalidUri(f"The URI {uri} must have the form hf://datasets/<organization>/<name>[@<revision>]/<path>.")
    return _place(uri).path if split.scheme == "file" else uri


def check(uri: str, prefixes: Sequence[str], setting: str = DATASETS) -> None:
    """Raises InvalidUri if `uri` does not begin with one of `prefixes`. The message names `setting`, the setting that
    lists the prefixes."""
    place = _place(uri)
    if not any(_is_under(place, _place(prefix)) for prefix in prefixes):
        listed = f"allows {', '.join(prefixes)}" if prefixes else "allows none"
        raise InvalidUri(
            f"The URI {uri} is not allowed: the setting {setting} {listed}. Give another URI, or ask the operator to "
            "add a prefix of this URI to the setting."
        )


def is_folder(uri: str) -> bool:
    """Whether `uri` names several files of a folder: all (`folder/`) or those that match a pattern (`folder/*.txt`)."""
    name = urlsplit(uri).path.rpartition("/")[2]
    return not name or "*" in name


def matches(pattern: str, name: str) -> bool:
    """Whether the file `name` matches `pattern`, the last path segment of a URI.

    A `*` stands for any text, and an empty pattern matches every name. Names that begin with . or _ never match.
    """
    expression = ".*".join(re.escape(part) for part in (pattern or "*").split("*"))
    return "/" not in name and not name.startswith((".", "_")) and bool(re.fullmatch(expression, name))


def named_hosts(prefixes: Sequence[str]) -> set[tuple[str, int]]:
    """Returns the host and port of each http or https prefix that names a host, such as `https://data.example/`.

    Requests to these hosts may go to private addresses.
    """
    splits = [urlsplit(prefix) for prefix in prefixes]
    return {(s.hostname, s.port or PORTS[s.scheme]) for s in splits if s.scheme in PORTS and s.hostname}


def names_organization(uri: str, prefixes: Sequence[str]) -> bool:
    """Whether one of `prefixes` names the organization of the Hugging Face dataset `uri`. The prefix
    `hf://datasets/ORG/` names the organization ORG; the prefix `hf://datasets/` names none.

    By such a prefix the operator has chosen whose datasets may be read.
    """
    with_organization = [prefix for prefix in prefixes if re.match("hf://datasets/[^/]+(/|$)", prefix)]
    return any(_is_under(_place(uri), _place(prefix)) for prefix in with_organization)


def _is_under(place: _Place, prefix: _Place) -> bool:
    if place.options != prefix.options or not place.path.startswith(prefix.path):
        return False
    rest = place.path[len(prefix.path) :]
    return not rest or prefix.path.endswith("/") or rest[0] == "/" or (rest[0] == "@" and prefix.path.startswith("hf:"))


def _place(uri: str) -> _Place:
    split = _split(uri)
    path = unquote(split.path)
    if "\0" in path:
        raise InvalidUri(f"The URI {uri!r:.200} has a NUL character in its path; remove the character.")
    if split.scheme == "file":
        if split.netloc or split.query:
            raise InvalidUri(f"The URI {uri} must have the form file:///<path>, without a host or a query.")
        return _Place(Path(path or "/").resolve().as_uri(), [])
    if {".", ".."} & set(path.split("/")):
        raise InvalidUri(f"The URI {uri} has '.' or '..' in its path; write the full path.")
    if split.scheme in PORTS:
        port = "" if split.port in (None, PORTS[split.scheme]) else f":{split.port}"
        host = split.hostname or ""
        return _Place(f"{split.scheme}://{f'[{host}]' if ':' in host else host}{port}{split.path}", [])
    if split.scheme == "hf":
        if split.query:
            raise InvalidUri(
                f"The URI {uri} has a query, which hf:// does not allow; remove everything from the '?' on."
            )
        return _Place(f"hf://{split.netloc}{split.path}", [])
    return _Place(f"{split.scheme}://{split.netloc}{path}", sorted(parse_qsl(split.query, keep_blank_values=True)))


def _split(uri: str) -> SplitResult:
    """Parses a URI, and checks the rules that hold for URIs of every scheme.

    Raises InvalidUri for characters that two parsers might read differently. Also raises InvalidUri for credentials in
    the URI, because everybody who sees a job sees its URI.
    """
    if len(uri) > MAX_LENGTH:
        raise InvalidUri(f"The URI has {len(uri)} characters; the limit is {MAX_LENGTH}. Shorten it.")
    if not uri.isprintable() or "\\" in uri or "#" in uri:
        raise InvalidUri(
            f"The URI {uri!r:.200} has a backslash, a '#' or a control character; percent-encode the character."
        )
    try:
        split = urlsplit(uri)
        split.port  # noqa: B018 - a bad port raises ValueError
    except ValueError as error:
        raise InvalidUri(f"{uri!r:.200} is not a valid URI: {error}.") from None
    if split.scheme not in SCHEMES or "://" not in uri:
        raise InvalidUri(f"The URI {uri!r:.200} must begin with one of {', '.join(f'{s}://' for s in SCHEMES)}.")
    if "@" in split.netloc:
        raise InvalidUri(
            f"The URI with the host {split.hostname} contains credentials, which are not allowed; remove them."
        )
    if not re.fullmatch(r"[A-Za-z0-9._:\[\]-]*", split.netloc):
        raise InvalidUri(f"{split.netloc!r} is not a valid host name; write the host in ASCII letters.")
    return split
