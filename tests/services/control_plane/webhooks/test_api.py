"""Tests the routes of webhook endpoints with OpenAI's client, against the client's own types."""

import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import API_KEY, CANCELLED, FAILED, SUCCEEDED
from tests.services.receiver import Behaviour, Receiver
from tests.services.test_outbound import LOOPBACK


@pytest.fixture(scope="module")
def settings(offline: Settings, receiver: Receiver) -> Settings:
    return offline.model_copy(update={"webhook_urls": ["https://", receiver.url, "http://localhost:1/"]})


@pytest.fixture
def strict(base_url: str) -> Iterator[openai.OpenAI]:
    url = f"{base_url}/v1"
    with openai.OpenAI(base_url=url, api_key=API_KEY, max_retries=0, _strict_response_validation=True) as client:
        yield client
        for endpoint in list(client.webhooks.list()):
            client.webhooks.delete(endpoint.id)


@pytest.mark.slow
def test_the_life_of_an_endpoint(strict: openai.OpenAI, receiver: Receiver) -> None:
    of_evaluations = ["eval.run.succeeded", "eval.run.failed", "eval.run.canceled"]
    assert strict.webhooks.event_types.list().data == [SUCCEEDED, FAILED, CANCELLED, *of_evaluations]
    made = strict.webhooks.create(name="ours", url=f"{receiver.url}/ours", event_types=[FAILED, SUCCEEDED, FAILED])
    assert made.signing_secret.startswith("whsec_")
    assert made.signing_secret_hint == f"whsec_…{made.signing_secret[-4:]}"
    assert made.created_at == made.updated_at
    assert made.event_types == [FAILED, SUCCEEDED]

    found = strict.webhooks.retrieve(made.id)
    assert found.to_dict() == {k: v for k, v in made.to_dict().items() if k != "signing_secret"}
    assert strict.webhooks.update(made.id, name="ours").updated_at == made.updated_at
    changed = strict.webhooks.update(made.id, name="theirs", event_types=[CANCELLED])
    assert (changed.name, changed.url, changed.event_types) == ("theirs", made.url, [CANCELLED])
    rotated = strict.webhooks.rotate_secret(made.id)
    assert rotated.signing_secret != made.signing_secret

    assert strict.webhooks.delete(made.id).deleted
    assert list(strict.webhooks.list()) == []
    for call in (strict.webhooks.retrieve, strict.webhooks.delete, strict.webhooks.rotate_secret):
        with pytest.raises(openai.NotFoundError, match=made.id):
            call(made.id)


def test_a_test_tells_what_the_endpoint_answers(strict: openai.OpenAI, receiver: Receiver) -> None:
    receiver.paths["/tested"] = Behaviour(statuses=[200, 302, 410, 500], location=f"{receiver.url}/elsewhere")
    made = strict.webhooks.create(name="t", url=f"{receiver.url}/tested", event_types=[FAILED])
    statuses = [strict.webhooks.test(made.id, event_type=FAILED).status_code for _ in range(4)]
    assert statuses == [200, 302, 410, 500]
    sent = receiver.at("/tested")
    assert len({message.headers["webhook-id"] for message in sent}) == 4
    event = strict.webhooks.unwrap(sent[0].body, sent[0].headers, secret=made.signing_secret)
    assert (event.type, event.object, event.data.id) == (FAILED, "event", "ftjob-test")
    assert not receiver.at("/elsewhere")  # a redirect is not followed
    assert not any("cookie" in message.headers for message in sent)
    assert strict.webhooks.retrieve(made.id).to_dict()["x_raydpo"] == {"disabled_at": None}


def test_a_test_of_what_does_not_answer_says_so(strict: openai.OpenAI) -> None:
    made = strict.webhooks.create(name="t", url="http://localhost:1/", event_types=[FAILED])
    with pytest.raises(openai.BadRequestError, match="could not be reached") as refused:
        strict.webhooks.test(made.id, event_type=FAILED)
    assert refused.value.code == "webhook_unreachable"


@pytest.mark.parametrize(
    ("body", "param", "code", "words"),
    [
        ({"event_types": ["batch.completed"]}, "event_types", "unsupported_value", "fine_tuning.job.failed"),
        ({"event_types": []}, "event_types", "invalid_value", "at least 1"),
        ({"name": ""}, "name", "invalid_value", "at least 1"),
        ({"name": "a\0b"}, None, "invalid_value", "NUL"),
        ({"url": "ftp://example.com/"}, "url", "invalid_value", "must begin with"),
        ({"url": "http://example.com/"}, "url", "invalid_value", "setting webhook_urls allows https://"),
        ({"url": "https://user:word@example.com/"}, "url", "invalid_value", "credentials"),
        ({"url": "https:///hook"}, "url", "invalid_value", "has no host"),
        ({"url": "https://exa mple.com"}, "url", "invalid_value", "is not a valid host name"),
        ({"secret": "mine"}, "secret", "unknown_parameter", "secret"),
        *(({"url": f"https://{host}/"}, "url", "invalid_value", "not public") for host in LOOPBACK),
        ({"url": "https://169.254.169.254/latest"}, "url", "invalid_value", "not public"),
    ],
)
def test_what_is_wrong_is_refused_by_name(
    strict: openai.OpenAI, body: dict[str, Any], param: str | None, code: str, words: str
) -> None:
    good = {"name": "n", "url": "https://example.com/", "event_types": [FAILED]}
    made = strict.webhooks.create(**good)  # type: ignore[arg-type]
    for path, sent in (("/webhook_endpoints", good | body), (f"/webhook_endpoints/{made.id}", body)):
        with pytest.raises(openai.BadRequestError) as refused:
            strict.post(path, body=sent, cast_to=object)
        assert (refused.value.param, refused.value.code) == (param, code)
        assert words in str(refused.value)


def test_a_resend_makes_one_endpoint_with_one_secret_and_deletes_it_once(strict: openai.OpenAI) -> None:
    def create() -> Any:
        return strict.webhooks.create(
            name="once", url="https://example.com/", event_types=[FAILED], extra_headers={"Idempotency-Key": "hook"}
        )

    made = create()
    assert create() == made
    assert len(list(strict.webhooks.list())) == 1
    headers = [{"x-stainless-retry-count": count} for count in "01"]
    assert all(strict.webhooks.delete(made.id, extra_headers=each).deleted for each in headers)


def test_pages_neither_repeat_nor_loop_while_endpoints_come(strict: openai.OpenAI) -> None:
    def create(name: str) -> str:
        return strict.webhooks.create(name=name, url="https://example.com/", event_types=[FAILED]).id

    there = [create(str(number)) for number in range(7)]
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            create("new")
            done.wait(0.05)

    writer = threading.Thread(target=write)
    writer.start()
    seen = [endpoint.id for endpoint in strict.webhooks.list(limit=2)]
    done.set()
    writer.join()
    assert len(set(seen)) == len(seen)
    assert [name for name in seen if name in there] == there[::-1]
    with pytest.raises(openai.BadRequestError) as refused:
        strict.webhooks.list(after="we_none")
    assert refused.value.param == "after"
