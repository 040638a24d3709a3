"""Tests that the HTTP clients for users' hosts reach no private address, in whatever spelling.

Loopback stands for private addresses, so that no request leaves the machine.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from services import outbound
from services.outbound import check_literal, is_public
from services.uri import InvalidUri
from tests.services.web import Web, running_web

EVERYWHERE = ["https://", "http://"]
PRIVATE = [
    *["0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/29"],
    *["192.0.2.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4"],
    "240.0.0.0/4",
]
PRIVATE_V6 = ["::/128", "::1/128", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8", "2001:db8::/32", "2001::/32"]
LOOPBACK = [  # this machine, one way or another
    *["127.0.0.1", "127.1", "127.8.8.8", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "0"],
    *["127.0.0.01", "0.0.0.0", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]"],
    *["[0:0:0:0:0:0:0:1]", "[64:ff9b::127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[64:ff9b:1::1]"],
]
NAMES = ["localhost", "LOCALHOST"]


@pytest.fixture
def web() -> Iterator[Web]:
    with running_web() as web:
        web.files["/rows.jsonl"] = b"{}\n"
        yield web


def addresses_in(network: str) -> st.SearchStrategy[Any]:
    return st.ip_addresses(network=network)


private_v4 = st.one_of([addresses_in(network) for network in PRIVATE])


@given(private_v4)
def test_no_private_ipv4_address_is_public_nor_one_of_ipv6_that_means_it(address: ipaddress.IPv4Address) -> None:
    assert not is_public(address)
    for start, shift in [("::", 0), ("::ffff:0:0", 0), ("64:ff9b::", 0), ("2002::", 80), ("64:ff9b:1::", 0)]:
        hidden = ipaddress.IPv6Address(int(ipaddress.IPv6Address(start)) | int(address) << shift)
        assert not is_public(hidden), hidden


@given(st.one_of([addresses_in(network) for network in PRIVATE_V6]))
def test_no_private_ipv6_address_is_public(address: ipaddress.IPv6Address) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"])
def test_the_open_internet_is_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@given(private_v4, st.sampled_from(["{}", "{:#x}", "0{:o}", "dotted hex", "dotted octal"]))
def test_a_private_address_is_refused_in_every_spelling(address: ipaddress.IPv4Address, form: str) -> None:
    part = {"dotted hex": "{:#x}", "dotted octal": "0{:o}"}.get(form)
    host = ".".join(map(part.format, address.packed)) if part else form.format(int(address))
    with pytest.raises(InvalidUri, match="not public"):
        check_literal(f"https://{host}/", EVERYWHERE)


@pytest.mark.parametrize("host", LOOPBACK)
def test_an_address_is_refused_at_the_door(host: str) -> None:
    with pytest.raises(InvalidUri, match="not public"):
        check_literal(f"http://{host}/rows.jsonl", EVERYWHERE)


@pytest.mark.parametrize("host", [*LOOPBACK, *NAMES])
def test_nothing_of_our_own_is_connected_to(web: Web, host: str) -> None:
    with outbound.client(EVERYWHERE) as client, pytest.raises((InvalidUri, httpx.InvalidURL)):
        client.get(f"http://{host}:{web.port}/rows.jsonl")
    assert not web.requests


@pytest.mark.parametrize("host", [*LOOPBACK[1:], *NAMES])
def test_no_redirect_leads_to_our_own(web: Web, host: str) -> None:
    start = f"http://127.0.0.1:{web.port}/away"
    web.redirects["/away"] = f"http://{host}:{web.port}/rows.jsonl"
    with outbound.client([start, "http://"]) as client, pytest.raises((InvalidUri, httpx.RemoteProtocolError)):
        client.get(start, follow_redirects=True)
    assert len(web.requests) == 1


def test_a_redirect_must_be_admitted_as_the_uri_was(web: Web) -> None:
    start = f"{web.url}/away"
    web.redirects["/away"] = "/rows.jsonl"
    with outbound.client([start]) as client, pytest.raises(InvalidUri, match="is not allowed"):
        client.get(start, follow_redirects=True)


def test_a_prefix_that_names_host_and_port_reaches_them_and_no_other_port(web: Web) -> None:
    with outbound.client([f"http://localhost:{web.port}/"]) as client:
        assert client.get(f"http://localhost:{web.port}/rows.jsonl").content == b"{}\n"
        assert web.requests[0][1]["host"] == f"localhost:{web.port}"
    with outbound.client(["http://localhost:1/", "http://"]) as client, pytest.raises(InvalidUri, match="not public"):
        client.get(f"http://localhost:{web.port}/rows.jsonl")


def test_the_connection_goes_to_the_address_that_was_checked(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [["8.8.8.8", "9.9.9.9"], ["127.0.0.1"], ["127.0.0.1"]]  # a name server that changes its mind
    connected: list[Any] = []

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers.pop(0)]

    def connect(address: Any, *_: Any, **__: Any) -> None:
        connected.append(address)
        raise ConnectionRefusedError

    with outbound.client(EVERYWHERE) as client, monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", resolve)
        patch.setattr(socket, "create_connection", connect)
        with pytest.raises(httpx.ConnectError):
            client.get("http://rebinding.example/rows.jsonl")
    assert connected == [("8.8.8.8", 80), ("9.9.9.9", 80)]
    assert len(answers) == 2


async def asked(urls: list[str], prefixes: list[str]) -> list[Any]:
    """Requests each URL with the asynchronous client, and returns the statuses of the answers, or the errors."""
    async with outbound.async_client(prefixes, "webhook_urls", max_lookups=4) as client:
        return [await _asked(client, url) for url in urls]


async def _asked(client: httpx.AsyncClient, url: str) -> Any:
    try:
        return (await client.get(url)).status_code
    except (InvalidUri, httpx.HTTPError, httpx.InvalidURL) as error:
        return error


def test_an_asynchronous_client_connects_to_nothing_of_our_own_either(web: Web) -> None:
    urls = [f"http://{host}:{web.port}/rows.jsonl" for host in [*LOOPBACK, *NAMES]]
    answers = asyncio.run(asked(urls, EVERYWHERE))
    assert all(isinstance(answer, InvalidUri | httpx.InvalidURL) for answer in answers)
    assert all(
        "to the setting webhook_urls" in str(a) for a in answers if isinstance(a, InvalidUri) and "public" in str(a)
    )
    assert not web.requests


def test_an_asynchronous_client_reaches_what_is_named_follows_nothing_and_keeps_to_its_prefixes(web: Web) -> None:
    web.redirects["/away"] = "/rows.jsonl"
    url = f"http://localhost:{web.port}"
    paths = [f"{url}/rows.jsonl", f"{url}/away", f"http://127.0.0.1:{web.port}/rows.jsonl"]
    found, away, other = asyncio.run(asked(paths, [url]))
    assert (found, away) == (200, 302)
    assert "setting webhook_urls allows" in str(other)
    assert [path for path, _ in web.requests] == ["/rows.jsonl", "/away"]
    assert web.requests[0][1]["host"] == f"localhost:{web.port}"


def test_an_asynchronous_client_connects_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [["8.8.8.8", "9.9.9.9"], ["127.0.0.1"], ["127.0.0.1"]]  # a name server that changes its mind
    connected: list[Any] = []

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers.pop(0)]

    async def connect(remote_host: str, remote_port: int, **_: Any) -> None:
        connected.append((remote_host, remote_port))
        raise OSError("refused")

    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", resolve)
        patch.setattr(anyio, "connect_tcp", connect)
        (error,) = asyncio.run(asked(["http://rebinding.example/rows.jsonl"], EVERYWHERE))
    assert isinstance(error, httpx.ConnectError)
    assert connected == [("8.8.8.8", 80), ("9.9.9.9", 80)]
    assert len(answers) == 2


def test_one_private_address_among_public_ones_is_enough_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("8.8.8.8", "10.0.0.1")]
    with outbound.client(EVERYWHERE) as client, monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        with pytest.raises(InvalidUri, match=r"has the address 10\.0\.0\.1, which is not public"):
            client.get("http://example.com/rows.jsonl")


def test_a_host_that_does_not_exist_is_the_users_to_mend() -> None:
    with outbound.client(EVERYWHERE) as client, pytest.raises(InvalidUri, match="is not a valid host name"):
        client.get(f"https://{'a' * 64}.invalid/rows.jsonl")


def certificate(folder: Path, name: str) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    subject, now = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]), datetime.now(UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain)
    (folder / f"{name}.pem").write_bytes(private + built.public_bytes(encoding))
    return folder / f"{name}.pem"


@pytest.mark.parametrize("name", ["localhost", "another.example"])
def test_certificates_are_checked_against_the_name_though_the_address_is_pinned(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file = certificate(tmp_path, name)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    web.socket = context.wrap_socket(web.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    url = f"https://localhost:{web.port}"
    with outbound.client([url]) as client:
        if name == "localhost":
            assert client.get(f"{url}/rows.jsonl").content == b"{}\n"
        else:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                client.get(f"{url}/rows.jsonl")
    (answer,) = asyncio.run(asked([f"{url}/rows.jsonl"], [url]))
    assert answer == 200 if name == "localhost" else "CERTIFICATE_VERIFY_FAILED" in str(answer)
