"""Decides whether the service may read a URI that a user names.

The service has more rights than a user. So a URI must be under one of the prefixes that a setting lists:
`dataset_uris`, or the one for webhooks. `https://` alone admits every host; `services.outbound` decides
which addresses are reached.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

PORTS = {"http": 80, "https": 443}
SCHEMES = ("https", "http", "hf", "s3", "gs", "file")
HUB_PATH = re.compile(r"/[\w.-]+/[\w.-]+(@[^/]+)?(/.*)?")
DATASETS = "dataset_uris"  # the setting that lists prefixes, unless another is named
MAX_LENGTH = 8192  # signed URLs, to which servers redirect, are long


class InvalidUri(ValueError):
    """A URI cannot or must not be read. The message says why, and what to do."""


class _Place(NamedTuple):
    """The parts of a URI that are compared with those of a prefix."""

    path: str  # with scheme and host
    options: list[tuple[str, str]]  # of the filesystem, such as endpoint_override


def check_prefix(prefix: str) -> str:
    """Returns `prefix`. Raises InvalidUri if it is not a valid prefix."""
    _place(prefix)
    return prefix


def admitted(uri: str, prefixes: Sequence[str]) -> str:
    """Returns `uri`, of one file or many; in a local one, `..` and symlinks are resolved. Raises InvalidUri."""
    check(uri, prefixes)
    split = urlsplit(uri)
    if split.scheme != "file" and not split.hostname:
        name = "host" if split.scheme in PORTS else "bucket"
        raise InvalidUri(f"{uri} names no {name}; write it after '{split.scheme}://'.")
    if split.scheme in PORTS and is_folder(uri):
        raise InvalidUri(f"{uri} names a folder, which cannot be listed over {split.scheme}; name a file.")
    if split.scheme == "hf" and not (split.netloc == "datasets" and HUB_PATH.fullmatch(split.path)):
        raise InvalidUri(f"{uri} must be hf://datasets/<organization>/<name>[@<revision>]/<path>.")
    return _place(uri).path if split.scheme == "file" else uri


def check(uri: str, prefixes: Sequence[str], setting: str = DATASETS) -> None:
    """Raises InvalidUri if no prefix admits `uri`. The message names `setting` as the source of the prefixes."""
    place = _place(uri)
    if not any(_is_under(place, _place(prefix)) for prefix in prefixes):
        listed = f"admits {', '.join(prefixes)}" if prefixes else "admits none"
        raise InvalidUri(
            f"{uri} is not admitted: the setting {setting} {listed}; name another URI, or have its prefix added."
        )


def is_folder(uri: str) -> bool:
    """Whether `uri` means all files of a folder, or those that a `*` in its last part matches."""
    name = urlsplit(uri).path.rpartition("/")[2]
    return not name or "*" in name


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern`, the last part of a folder's URI, matches the file `name`. A leading . or _ does not match."""
    expression = ".*".join(re.escape(part) for part in (pattern or "*").split("*"))
    return "/" not in name and not name.startswith((".", "_")) and bool(re.fullmatch(expression, name))


def named_hosts(prefixes: Sequence[str]) -> set[tuple[str, int]]:
    """Returns the hosts and ports that web prefixes name. They may be reached at private addresses, too."""
    splits = [urlsplit(prefix) for prefix in prefixes]
    return {(s.hostname, s.port or PORTS[s.scheme]) for s in splits if s.scheme in PORTS and s.hostname}


def names_organization(uri: str, prefixes: Sequence[str]) -> bool:
    """Whether a prefix that admits the hub's dataset names its organization, so that the operator chose its owner."""
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
        raise InvalidUri(f"{uri!r:.200} has a NUL character in its path.")
    if split.scheme == "file":
        if split.netloc or split.query:
            raise InvalidUri(f"{uri} must be file:///<path>.")
        return _Place(Path(path or "/").resolve().as_uri(), [])
    if {".", ".."} & set(path.split("/")):
        raise InvalidUri(f"{uri} has '.' or '..' in its path; spell the path out.")
    if split.scheme in PORTS:
        port = "" if split.port in (None, PORTS[split.scheme]) else f":{split.port}"
        host = split.hostname or ""
        return _Place(f"{split.scheme}://{f'[{host}]' if ':' in host else host}{port}{split.path}", [])
    if split.scheme == "hf":
        if split.query:
            raise InvalidUri(f"{uri} has a query, which hf:// does not take; remove everything from the '?' on.")
        return _Place(f"hf://{split.netloc}{split.path}", [])
    return _Place(f"{split.scheme}://{split.netloc}{path}", sorted(parse_qsl(split.query, keep_blank_values=True)))


def _split(uri: str) -> SplitResult:
    """Refuses what two parsers might read differently, and credentials, because a job shows its URI."""
    if len(uri) > MAX_LENGTH:
        raise InvalidUri(f"The URI has {len(uri)} characters; the limit is {MAX_LENGTH}. Shorten it.")
    if not uri.isprintable() or "\\" in uri or "#" in uri:
        raise InvalidUri(f"{uri!r:.200} has a backslash, a '#' or a control character; percent-encode it.")
    try:
        split = urlsplit(uri)
        split.port  # noqa: B018 - it raises
    except ValueError as error:
        raise InvalidUri(f"{uri!r:.200} is not a URI: {error}.") from None
    if split.scheme not in SCHEMES or "://" not in uri:
        raise InvalidUri(f"{uri!r:.200} must begin with one of {', '.join(f'{s}://' for s in SCHEMES)}.")
    if "@" in split.netloc:
        raise InvalidUri(f"A URI must contain no credentials, but that of host {split.hostname} does; remove them.")
    if not re.fullmatch(r"[A-Za-z0-9._:\[\]-]*", split.netloc):
        raise InvalidUri(f"{split.netloc!r} is not a host name; write it in ASCII.")
    return split
