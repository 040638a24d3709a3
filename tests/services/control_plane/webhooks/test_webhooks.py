"""Tests whose webhook endpoints there are, how many, and where they may lead."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import psycopg
import pytest

from services.control_plane.auth.keys import digest
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import FAILED
from tests.services.control_plane.webhooks import test_api as api_tests
from tests.services.receiver import Receiver

settings, strict = api_tests.settings, api_tests.strict  # fixtures


@pytest.fixture(scope="module")
def stranger(base_url: str, settings: Settings) -> Iterator[openai.OpenAI]:
    """Returns a client of another project."""
    with psycopg.connect(settings.database_url) as connection:
        connection.execute("INSERT INTO projects (id, name) VALUES ('proj_other', 'other')")
        key = ("key_other", "proj_other", "other", digest("rd-other"), "ther", ["read", "write", "inference", "admin"])
        columns = "id, project_id, name, sha256, hint, scopes"
        connection.execute(f"INSERT INTO keys ({columns}) VALUES (%s, %s, %s, %s, %s, %s)", key)
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="rd-other", max_retries=0) as client:
        yield client


def test_a_name_of_our_own_is_found_out_when_it_is_connected_to(strict: openai.OpenAI, receiver: Receiver) -> None:
    port = receiver.server_address[1]
    made = strict.webhooks.create(name="n", url=f"https://localhost:{port}/", event_types=[FAILED])
    before = len(receiver.received)
    with pytest.raises(
        openai.BadRequestError, match=("not public; use a public host, or ask the operator to add a prefix with")
    ):
        strict.webhooks.test(made.id, event_type=FAILED)
    assert len(receiver.received) == before


def test_a_project_has_no_part_in_the_endpoints_of_another(strict: openai.OpenAI, stranger: openai.OpenAI) -> None:
    made = strict.webhooks.create(name="n", url="https://example.com/", event_types=[FAILED])
    assert list(stranger.webhooks.list()) == []
    calls = [
        lambda: stranger.webhooks.retrieve(made.id),
        lambda: stranger.webhooks.update(made.id, name="x"),
        lambda: stranger.webhooks.rotate_secret(made.id),
        lambda: stranger.webhooks.test(made.id, event_type=FAILED),
        lambda: stranger.webhooks.delete(made.id),
    ]
    for call in calls:
        with pytest.raises(openai.NotFoundError):
            call()
    assert strict.webhooks.retrieve(made.id).name == "n"


def test_a_project_has_so_many_endpoints_and_no_more_however_many_come_at_once(
    strict: openai.OpenAI, settings: Settings
) -> None:
    with psycopg.connect(settings.database_url) as connection:
        columns = "id, project_id, name, url, event_types, secret"
        row = "'we_' || n, 'proj_default', 'n', 'https://example.com/', '{}', 'whsec_'"
        connection.execute(f"INSERT INTO webhook_endpoints ({columns}) SELECT {row} FROM generate_series(1, 98) n")

    def create(number: int) -> str:
        try:
            return strict.webhooks.create(name=str(number), url="https://example.com/", event_types=[FAILED]).object
        except openai.BadRequestError as refused:
            return refused.message

    with ThreadPoolExecutor(8) as threads:
        answers = sorted(threads.map(create, range(8)))
    assert answers[-2:] == ["webhook_endpoint"] * 2
    assert all("100 webhook endpoints, which is the limit" in answer for answer in answers[:-2])


@pytest.mark.parametrize("prefix", ["http://", "s3://bucket/", "example.com"])
def test_a_prefix_must_be_of_the_web_and_http_name_its_host(settings: Settings, prefix: str) -> None:
    with pytest.raises(ValueError, match="webhook_urls"):
        Settings.model_validate(settings.model_dump() | {"webhook_urls": [prefix]})
