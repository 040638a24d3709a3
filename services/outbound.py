"""Makes HTTP clients for hosts that users name, such as those of webhooks and training files.

The clients connect to public IP addresses only, unless one of the URL prefixes in the service's settings names the
host. A host name may resolve to another address each time. Therefore each request resolves its host once, checks the
addresses, and connects to one of the checked addresses.
"""

import ipaddress
import socket
from collections.abc import Sequence
from http.cookiejar import CookieJar, DefaultCookiePolicy
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import httpx

from services.uri import DATASETS, PORTS, InvalidUri, check, named_hosts

CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0
UNICAST = ipaddress.IPv6Network("2000::/3")
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # the last four bytes of a NAT64 address are an IPv4 address
# Connections are not kept open: httpx would reuse them by address, and two hosts must not share a connection.
LIMITS = httpx.Limits(max_keepalive_connections=0)


def client(prefixes: Sequence[str]) -> httpx.Client:
    """Returns an HTTP client that requests only URLs under `prefixes`, also after redirects.

    The client connects to public IP addresses only. There is one exception: it may connect to a private address if the
    URL's prefix names the host, as `https://data.example/` does and `https://` does not. The client ignores the
    environment's proxies.
    """

    def check_request(request: httpx.Request) -> None:
        check(str(request.url), prefixes)

    return httpx.Client(
        transport=_Transport(named_hosts(prefixes)),
        event_hooks={"request": [check_request]},
        timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
        trust_env=False,
    )


def async_client(prefixes: Sequence[str], setting: str, *, max_lookups: int) -> httpx.AsyncClient:
    """Returns an asyncio HTTP client that requests only URLs under `prefixes`, also after redirects. Errors name
    `setting`, the setting that lists the prefixes.

    The client connects to public IP addresses only. There is one exception: it may connect to a private address if the
    URL's prefix names the host, as `https://data.example/` does and `https://` does not. At most `max_lookups` requests
    wait for a name server at the same time. The client keeps no cookies and ignores the environment's proxies.
    """

    async def check_request(request: httpx.Request) -> None:
        check(str(request.url), prefixes, setting)

    return httpx.AsyncClient(
        transport=_AsyncTransport(named_hosts(prefixes), setting, max_lookups),
        event_hooks={"request": [check_request]},
        timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
        trust_env=False,
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
    )


def check_literal(url: str, prefixes: Sequence[str], setting: str = DATASETS) -> None:
    """Raises InvalidUri if the host of `url` is a private IP address, in any notation, unless one of `prefixes` names
    this host. The message names `setting`, the setting that lists the prefixes.

    A host that is a name, not an address, is accepted without asking a name server.
    """
    split = urlsplit(url)
    host, port = split.hostname or "", split.port or PORTS[split.scheme]
    try:
        entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return  # the host is a name
    if (host, port) not in named_hosts(prefixes):
        _refuse_private(host, port, [str(entry[4][0]) for entry in entries], setting)


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether the address belongs to a single host on the public internet.

    For a NAT64 address, the IPv4 address inside decides. 6to4 and Teredo addresses are not public.
    """
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_multicast
    if address in NAT64:
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return address in UNICAST and address.is_global and not (address.sixtofour or address.teredo)


class _Transport(httpx.BaseTransport):
    def __init__(self, named: set[tuple[str, int]]) -> None:
        self._named = named
        self._inner = httpx.HTTPTransport(limits=LIMITS)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        *others, last = _addresses(request, self._named, DATASETS)
        for address in others:
            try:
                return self._inner.handle_request(_pinned(request, address))
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
        return self._inner.handle_request(_pinned(request, last))

    def close(self) -> None:
        self._inner.close()


class _AsyncTransport(httpx.AsyncBaseTransport):
    def __init__(self, named: set[tuple[str, int]], setting: str, max_lookups: int) -> None:
        self._named, self._setting = named, setting
        self._lookups = anyio.CapacityLimiter(max_lookups)
        self._inner = httpx.AsyncHTTPTransport(limits=LIMITS)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        *others, last = await anyio.to_thread.run_sync(
            _addresses, request, self._named, self._setting, abandon_on_cancel=True, limiter=self._lookups
        )
        for address in others:
            try:
                return await self._inner.handle_async_request(_pinned(request, address))
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
        return await self._inner.handle_async_request(_pinned(request, last))

    async def aclose(self) -> None:
        await self._inner.aclose()


def _addresses(request: httpx.Request, named: set[tuple[str, int]], setting: str) -> list[str]:
    """Resolves the request's host, and returns the host's IP addresses.

    Raises InvalidUri if an address is private, unless `named` contains the request's host and port. The message names
    `setting`, the setting that can allow the host.
    """
    host, port = request.url.raw_host.decode(), request.url.port or PORTS[request.url.scheme]
    addresses = _resolve(host, port)
    if (host, port) not in named:
        _refuse_private(host, port, addresses, setting)
    return addresses


def _pinned(request: httpx.Request, address: str) -> httpx.Request:
    """Returns a copy of the request that connects to the IP address `address`.

    The Host header and the check of the certificate still use the name of the host.
    """
    return httpx.Request(
        request.method,
        request.url.copy_with(host=address),
        headers=request.headers,
        stream=request.stream,
        extensions=request.extensions | {"sni_hostname": request.url.raw_host.decode()},
    )


def _resolve(host: str, port: int) -> list[str]:
    try:
        entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise InvalidUri(f"{host!r:.200} is not a valid host name; correct the URL.") from None
    except socket.gaierror as error:
        if error.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
            raise InvalidUri(f"The host {host} does not exist; check the host name in the URL.") from None
        raise httpx.ConnectError(f"{host}: {error}") from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in entries))


def _refuse_private(host: str, port: int, addresses: Sequence[str], setting: str) -> None:
    for address in addresses:
        if not is_public(ipaddress.ip_address(address.partition("%")[0])):
            raise InvalidUri(
                f"The host {host} has the address {address}, which is not public; use a public host, or ask the "
                f"operator to add a prefix with {host} and port {port} to the setting {setting}."
            )
