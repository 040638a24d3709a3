"""Provides an S3 server for all tests of the services."""

from collections.abc import Iterator

import pytest

from tests.services.s3 import S3, running_s3


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    with running_s3() as s3:
        yield s3


@pytest.fixture
def s3(s3_server: S3) -> Iterator[S3]:
    """Returns the S3 server. Clients reach it through a proxy, which passes everything on unless a test changes
    this."""
    yield s3_server
    s3_server.proxy.pass_on()
