"""Provides an S3 server behind a proxy that can refuse, delay and cut connections."""

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from moto.server import ThreadedMotoServer

from tests.services.proxy import Proxy

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class S3:
    """The S3 server as tests see it. `options` is the query that every URI of a file there must end with, and
    `environment` has the variables of programs that use the server."""

    def __init__(self, proxy: Proxy, direct_url: str) -> None:
        self.proxy, self._direct_url = proxy, direct_url
        self.options = f"?scheme=http&region=us-east-1&endpoint_override={proxy.host}%3A{proxy.port}"
        self.environment = dict(ENVIRONMENT)

    def new_folder(self) -> str:
        """Creates a bucket, and returns the URI of an empty folder in it, which ends with a slash before the
        options."""
        bucket = f"bucket-{secrets.token_hex(4)}"
        httpx.put(f"{self._direct_url}/{bucket}", trust_env=False).raise_for_status()
        return f"s3://{bucket}/raydpo/{self.options}"


@contextmanager
def running_s3(host: str = "127.0.0.1") -> Iterator[S3]:
    """Runs an S3 server, which clients reach at the address `host` of this machine."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it has a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address, port = server.get_host_and_port()
    proxy = Proxy((address, port), host=host)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in ENVIRONMENT.items():
                patch.setenv(name, value)
            yield S3(proxy, f"http://{address}:{port}")
    finally:
        proxy.close()
        server.stop()
