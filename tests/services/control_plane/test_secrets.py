"""Tests that no secret appears where it does not belong.

A job runs while everything on its way fails, and then the database, storage, logs and answers are searched.
"""

import asyncio
import logging
from collections.abc import Iterator

import httpx
import openai
import psycopg
import pytest
from psycopg import sql
from pyarrow import fs
from pydantic import ValidationError

from services.contract import OWN_TOKEN_HEADER
from services.control_plane.attempts import attempts
from services.control_plane.auth.keys import digest
from services.control_plane.core.errors import Fenced
from services.control_plane.core.store import Store
from services.control_plane.core.tables import Base
from services.control_plane.settings import Settings
from tests.services.control_plane.attempts.test_reconciler import reports, spool, ticks
from tests.services.control_plane.conftest import API_KEY, EVERY_SCOPE, FakeRay, api_of, new_key, pairs

NO_RECEIVER = "http://127.0.0.1:9/"
RAY_TOKEN = "canary-of-ray-0123456789"
# Where a secret is kept so that it can be used. Keys are kept as digests only.
KEPT = {"webhook_endpoints": {"secret", "old_secret"}}


@pytest.fixture(scope="module")
def settings(offline: Settings, fake_ray: FakeRay) -> Settings:
    changes = {"ray_url": f"http://127.0.0.1:{fake_ray.server.server_port}", "ray_token": RAY_TOKEN}
    return Settings(**{**offline.model_dump(), **changes, "webhook_urls": [NO_RECEIVER]})


def rows_of(database_url: str) -> Iterator[str]:
    """Yields everything in the database as text, except the columns in KEPT."""
    with psycopg.connect(database_url) as connection:
        for table in Base.metadata.sorted_tables:
            names = [column.name for column in table.columns if column.name not in KEPT.get(table.name, ())]
            columns = sql.SQL(", ").join(map(sql.Identifier, names))
            query = sql.SQL("SELECT {} FROM {}").format(columns, sql.Identifier(table.name))
            for row in connection.execute(query):
                yield f"{table.name} {row}"


def stored(settings: Settings) -> Iterator[str]:
    filesystem, root = fs.FileSystem.from_uri(settings.storage_url)
    for info in filesystem.get_file_info(fs.FileSelector(root, recursive=True)):
        if info.is_file:
            yield f"{info.path} {filesystem.open_input_file(info.path).read().decode(errors='replace')}"


@pytest.mark.slow
def test_no_secret_is_told(
    base_url: str, settings: Settings, fake_ray: FakeRay, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    answers: list[str] = []

    def remember(response: httpx.Response) -> None:
        response.read()
        answers.append(f"{response.request.url} {response.headers} {response.text}")

    with api_of(base_url, API_KEY) as api:
        made = new_key(api, scopes=EVERY_SCOPE)["value"]
    with api_of(base_url, made) as own:
        own.event_hooks = {"response": [remember]}
        hook = {"name": "a", "url": NO_RECEIVER, "event_types": ["fine_tuning.job.succeeded"]}
        endpoint = own.post("/webhook_endpoints", json=hook).json()
        answers.clear()  # there, and only there, the signing secret is told
        file = own.post("/files", files={"file": ("pairs.jsonl", pairs())}, data={"purpose": "fine-tune"}).json()
        job = own.post(
            "/fine_tuning/jobs", json={"model": "tiny", "training_file": file["id"], "method": {"type": "dpo"}}
        ).json()
        # The launch fails, is tried again, dies, is launched anew, and is finished.
        fake_ray.lose_answers = True
        ticks(settings, 1)
        fake_ray.lose_answers = False
        ticks(settings, 1)
        fake_ray.jobs[f"{job['id']}-1"] = "FAILED"
        ticks(settings, 3)
        tokens = [each["runtime_env"]["env_vars"]["RAYDPO_ATTEMPT_TOKEN"] for each in fake_ray.submissions]
        assert len(set(tokens)) == 2
        wrong = f"{base_url}/internal/attempts/{job['id']}/1/events"
        for token in (made, *tokens):
            remember(httpx.post(wrong, json={"events": []}, headers={"Authorization": f"Bearer {token}"}))
        spool(settings, job["id"], 2, reports(settings, job["id"]))
        fake_ray.jobs[f"{job['id']}-2"] = "SUCCEEDED"
        ticks(settings, 2)
        done = own.get(f"/fine_tuning/jobs/{job['id']}").json()
        assert done["status"] == "succeeded"
        for path in own.get(f"{base_url}/openapi.json").json()["paths"]:
            ids = {
                "endpoint_id": endpoint["id"],
                "job_id": job["id"],
                "file_id": file["id"],
                "model_id": done["fine_tuned_model"],
            }
            if all(name in ids for name in _parameters(path)):
                own.get(f"{base_url}{path.format(**ids)}")
        own.post("/chat/completions", json={"model": "none", "messages": []})
        own.post("/fine_tuning/jobs", content=b"{", headers={"content-type": "application/json"})
        own.get("/nowhere")
    with api_of(base_url, f"{made}x") as nearly:
        remember(nearly.get("/files"))

    places = {
        "answers": answers,
        "log": [caplog.text],
        "database": list(rows_of(settings.database_url)),
        "storage": list(stored(settings)),
    }
    assert all(places.values())
    assert f"Job {job['id']}: finish" in caplog.text
    for secret in (made, API_KEY, RAY_TOKEN, *tokens):
        for name, texts in places.items():
            assert not [text for text in texts if secret in text], f"a secret is in the {name}"
    # The answer that told the signing secret is kept for a retry, as the endpoint itself is.
    kept = [text for texts in places.values() for text in texts if endpoint["signing_secret"] in text]
    assert {text.split()[0] for text in kept} == {"answers"}


def _parameters(path: str) -> list[str]:
    return [part[1:-1] for part in path.split("/") if part.startswith("{")]


def test_the_secret_that_ray_shows_is_good_until_the_attempt_has_one_of_its_own(
    client: openai.OpenAI, settings: Settings, fake_ray: FakeRay, base_url: str
) -> None:
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    job_id = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method={"type": "dpo"}).id
    ticks(settings, 1)
    (submission,) = (each for each in fake_ray.submissions if each["submission_id"] == f"{job_id}-1")
    shown, own, strangers = submission["runtime_env"]["env_vars"]["RAYDPO_ATTEMPT_TOKEN"], "o" * 43, "s" * 43

    def post(token: str, **headers: str) -> int:
        url = f"{base_url}/internal/attempts/{job_id}/1/events"
        return httpx.post(url, json={"events": []}, headers={"Authorization": f"Bearer {token}", **headers}).status_code

    assert post(shown) == 200  # a driver of the release before has no other
    assert post(shown, **{OWN_TOKEN_HEADER: "short"}) == 400
    assert post(own) == 409
    assert post(shown, **{OWN_TOKEN_HEADER: own}) == 200
    assert [post(shown), post(shown, **{OWN_TOKEN_HEADER: strangers}), post(strangers)] == [409, 409, 409]
    assert [post(own), post(own)] == [200, 200]
    client.fine_tuning.jobs.cancel(job_id)
    ticks(settings, 3)
    assert post(own) == 409


def test_the_secrets_of_an_attempts_last_two_launches_are_good(client: openai.OpenAI, settings: Settings) -> None:
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method={"type": "dpo"})

    async def work() -> None:
        store = Store(settings.database_url)
        async with store.begin() as session:
            attempt = await attempts.begin(session, job.id, 7, None, num_accelerators=0)
            given = [await attempts.give_token(session, attempt) for _ in range(3)]
        for token in given[1:]:
            async with store.begin() as session:
                await attempts.authorize(session, job.id, 7, token)
        for token in (given[0], "", digest(given[1])):
            async with store.begin() as session:
                with pytest.raises(Fenced):
                    await attempts.authorize(session, job.id, 7, token)
        await store.close()

    asyncio.run(work())


@pytest.mark.parametrize("where", ["storage_url", "models"])
def test_a_place_in_storage_holds_no_key_and_its_refusal_does_not_tell_it(offline: Settings, where: str) -> None:
    """Ray shows the URI of an attempt's settings, and Serve the URI of a model."""
    place = "s3://AKIAEXAMPLE:hush-hush@bucket/raydpo"
    given = {"storage_url": place} if where == "storage_url" else {"models": {"tiny": place}}
    with pytest.raises(ValidationError, match="the URI contains credentials before its '@'; remove them") as refusal:
        Settings(**{**offline.model_dump(), **given})
    assert "hush-hush" not in str(refusal.value)
    Settings(**{**offline.model_dump(), "storage_url": "s3://bucket/raydpo?region=eu-west-1"})


def test_of_two_that_exchange_a_secret_at_the_same_moment_one_has_it(client: openai.OpenAI, settings: Settings) -> None:
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method={"type": "dpo"})

    async def work() -> None:
        store = Store(settings.database_url)
        async with store.begin() as session:
            attempt = await attempts.begin(session, job.id, 1, None, num_accelerators=0)
            given = await attempts.give_token(session, attempt)

        async def exchange(own: str) -> str | None:
            try:
                async with store.begin() as session:
                    await attempts.authorize(session, job.id, 1, given, own)
                    await asyncio.sleep(0.1)
            except Fenced:
                return None
            return own

        (taken,) = {await each for each in asyncio.as_completed([exchange("a"), exchange("b")])} - {None}
        assert taken is not None
        async with store.begin() as session:
            await attempts.authorize(session, job.id, 1, taken)
        await store.close()

    asyncio.run(work())
