"""Tests API keys: what each may do, for how long, and what the service records about its use."""

import asyncio
import time
from typing import Any

import httpx
import openai
import psycopg
import pytest

from services.control_plane.auth import keys
from services.control_plane.auth.authentication import KNOWN_SECONDS, Authentication
from services.control_plane.auth.keys import CONFIGURED, SCOPES, Caller
from services.control_plane.core.errors import InvalidRequest, Unauthorized
from services.control_plane.core.store import Store
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import API_KEY, answering, api_of, new_key, new_project, pairs

BUSY_SECONDS = 5.0


def refusal(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def within(seconds: float, wanted: int, ask: Any) -> httpx.Response:
    """Repeats the request until its answer has the status `wanted`, and returns this answer.

    On a busy machine, this may take longer than `seconds`.
    """
    deadline = time.monotonic() + seconds + BUSY_SECONDS
    while (answer := ask()).status_code != wanted:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.05)
    return answer


def test_a_key_is_told_once_and_works_at_once(api: httpx.Client, base_url: str) -> None:
    made = new_key(api, name="ci", scopes=["write", "read", "read"])
    key = made.pop("value")
    assert key.startswith("rd-")
    assert len(key) > 40
    assert made["redacted_value"] == f"rd-…{key[-4:]}"
    assert (made["object"], made["project_id"], made["scopes"]) == ("key", "proj_default", ["read", "write"])
    assert api.get(f"/x/keys/{made['id']}").json() == made
    assert made in api.get("/x/keys").json()["data"]
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key=key, max_retries=0) as client:
        file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
        assert client.files.retrieve(file.id).id == file.id


def test_a_repeated_creation_makes_one_key_and_never_tells_it_again(api: httpx.Client, settings: Settings) -> None:
    def create() -> httpx.Response:
        return api.post("/x/keys", json={"name": "twice"}, headers={"Idempotency-Key": "a-key"})

    first, again = create().json(), create()
    assert again.json() == {**first, "value": None}
    assert again.headers["idempotent-replayed"] == "true"
    with psycopg.connect(settings.database_url) as connection:
        assert first["value"] not in str(connection.execute("SELECT * FROM answers").fetchall())


@pytest.mark.parametrize("scope", SCOPES)
def test_a_key_does_what_its_scope_names_and_nothing_else(api: httpx.Client, base_url: str, scope: str) -> None:
    requests = {
        "read": ("GET", "/files", None),
        "write": ("POST", "/fine_tuning/jobs/ftjob-none/cancel", None),
        "inference": ("POST", "/chat/completions", {"model": "none", "messages": []}),
        "admin": ("GET", "/x/keys", None),
    }
    with api_of(base_url, new_key(api, scopes=[scope])["value"]) as own:
        for needed, (method, path, body) in requests.items():
            answer = own.request(method, path, json=body)
            if needed == scope:
                assert answer.status_code in (200, 404), answer.text
            else:
                assert refusal(answer) == (403, "missing_scope")
                assert answer.json()["error"]["type"] == "permission_error"
                assert (
                    f"needs a key with the scope '{needed}', but your key has the scopes {scope}; "
                    "ask an admin for a key."
                ) in answer.text


def test_a_revoked_key_stops_within_its_second_also_where_it_is_known(api: httpx.Client, base_url: str) -> None:
    made = new_key(api)
    with api_of(base_url, made["value"]) as own:
        assert own.get("/files").status_code == 200
        revoked = api.post(f"/x/keys/{made['id']}/revoke").json()
        assert revoked["revoked_at"] is not None
        answer = within(KNOWN_SECONDS + 0.5, 401, lambda: own.get("/files"))
    assert refusal(answer) == (401, "invalid_api_key")
    assert made["value"] not in answer.text
    assert api.post(f"/x/keys/{made['id']}/revoke").json() == revoked


@pytest.mark.slow
def test_an_expired_key_stops(api: httpx.Client, base_url: str) -> None:
    made = new_key(api, expires_at=int(time.time()) + 2)
    with api_of(base_url, made["value"]) as own:
        assert own.get("/files").status_code == 200
        within(3 + KNOWN_SECONDS, 401, lambda: own.get("/files"))


def test_the_last_use_is_noted_apart_from_the_requests(api: httpx.Client, settings: Settings) -> None:
    made = new_key(api)

    def last_used_at() -> int | None:
        return api.get(f"/x/keys/{made['id']}").json()["last_used_at"]  # type: ignore[no-any-return]

    async def use() -> None:
        store = Store(settings.database_url)
        authentication = Authentication(store, settings)
        for _ in range(3):
            assert (await authentication.caller(made["value"])).key_id == made["id"]
        assert last_used_at() is None
        await authentication.note_uses()
        await store.close()

    asyncio.run(use())
    assert (last_used_at() or 0) >= made["created_at"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"name": ""}, "name"),
        ({"name": "a\0b"}, "name"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["read", "root"]}, "scopes.1"),
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"expires_at": 1}, "expires_at"),
        ({"expires": 1}, "expires"),
        ({"project_id": "proj_none"}, "project_id"),
    ],
)
def test_a_wrong_creation_is_refused_by_name(api: httpx.Client, changes: dict[str, Any], param: str) -> None:
    answer = api.post("/x/keys", json={"name": "wrong", **changes})
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


def test_headers_that_name_another_organization_or_project_are_refused(base_url: str) -> None:
    def ask(**named: str) -> None:
        with openai.OpenAI(base_url=f"{base_url}/v1", api_key=API_KEY, max_retries=0, **named) as client:
            client.files.list()

    ask(organization="raydpo", project="proj_default")
    for named in ({"organization": "other"}, {"project": "proj_other"}):
        with pytest.raises(openai.AuthenticationError) as refused:
            ask(**named)
        assert refused.value.code == f"mismatched_{next(iter(named))}"


def test_an_admin_of_another_project_manages_its_own_keys_only(api: httpx.Client, base_url: str) -> None:
    ours = new_key(api)
    project = new_project(api, "keys of their own")
    admin = new_key(api, project_id=project, scopes=["admin"])
    with api_of(base_url, admin["value"]) as theirs:
        made = new_key(theirs)
        assert made["project_id"] == project
        assert [key["id"] for key in theirs.get("/x/keys").json()["data"]] == [made["id"], admin["id"]]
        for path in (f"/x/keys/{ours['id']}", f"/x/keys/{ours['id']}/revoke"):
            assert theirs.request("GET" if path.endswith(ours["id"]) else "POST", path).status_code == 404
        assert theirs.post("/x/keys", json={"name": "x", "project_id": "proj_default"}).status_code == 404
        assert theirs.get("/x/keys", params={"project_id": "proj_default"}).json()["data"] == []
    assert api.post(f"/x/keys/{made['id']}/revoke").status_code == 200


def test_changes_are_told_to_admins_with_who_made_them(api: httpx.Client, base_url: str) -> None:
    project = new_project(api, "audited")
    admin = new_key(api, project_id=project, scopes=["admin", "write"])
    with api_of(base_url, admin["value"]) as theirs:
        revoked = theirs.post(f"/x/keys/{new_key(theirs)['id']}/revoke")
        entries = theirs.get("/x/audit").json()["data"]
    assert [entry["action"] for entry in entries] == ["POST /v1/x/keys/{key_id}/revoke", "POST /v1/x/keys"]
    assert {(entry["key_id"], entry["project_id"], entry["status"]) for entry in entries} == {
        (admin["id"], project, 200)
    }
    assert entries[0]["object_id"] == revoked.json()["id"]
    assert entries[0]["request_id"] == revoked.headers["x-request-id"]
    everything = api.get("/x/audit", params={"limit": 100}).json()["data"]
    assert entries == [entry for entry in everything if entry["project_id"] == project]
    first = api.get("/x/audit", params={"limit": 1}).json()
    second = api.get("/x/audit", params={"limit": 1, "after": first["last_id"]}).json()
    assert [*first["data"], *second["data"]] == everything[:2]


def audit_of(api: httpx.Client, key: dict[str, Any]) -> list[dict[str, Any]]:
    entries = api.get("/x/audit", params={"limit": 100, "project_id": key["project_id"]}).json()["data"]
    return [entry for entry in entries if entry["key_id"] == key["id"]]


def test_what_a_key_is_refused_is_in_the_audit(api: httpx.Client, base_url: str) -> None:
    project = new_project(api, "refused", max_queued_jobs=0)
    key, theirs_elsewhere = new_key(api, project_id=project, scopes=["read", "write"]), new_key(api)
    with api_of(base_url, key["value"]) as theirs:
        file = theirs.post("/files", files={"file": ("pairs.jsonl", pairs())}, data={"purpose": "fine-tune"}).json()
        refused = [
            theirs.get("/x/keys"),
            theirs.post("/x/keys", json={"name": "more", "scopes": ["admin"]}),
            theirs.delete(f"/files/{stranger_file(api)}"),
            theirs.post("/fine_tuning/jobs/ftjob-none/cancel"),
            theirs.post(f"/x/keys/{theirs_elsewhere['id']}/revoke"),
            theirs.post("/fine_tuning/jobs", json={"model": "tiny", "training_file": stranger_file(api)}),
            theirs.post(
                "/fine_tuning/jobs", json={"model": "tiny", "training_file": file["id"], "method": {"type": "dpo"}}
            ),
            theirs.get("/files", headers={"OpenAI-Project": "proj_default"}),
        ]
        # Everyday mistakes, and what tells nothing of who may do what.
        for answer in (theirs.get("/files/file-none"), theirs.post("/fine_tuning/jobs", json={}), theirs.get("/none")):
            assert answer.status_code in (400, 404)
    with api_of(base_url, key["value"] + "x") as nobody:
        assert nobody.delete(f"/files/{file['id']}").status_code == 401
    told = [entry for entry in reversed(audit_of(api, key)) if entry["status"] != 200]
    assert [(entry["status"], entry["code"]) for entry in told] == [
        (403, "missing_scope"),
        (403, "missing_scope"),
        (404, "file_not_found"),
        (404, "fine_tune_not_found"),
        (403, "missing_scope"),
        (404, "file_not_found"),
        (429, "exceeded_quota"),
        (401, "mismatched_project"),
    ]
    assert [entry["request_id"] for entry in told] == [answer.headers["x-request-id"] for answer in refused]
    assert [entry["action"] for entry in told[2:5]] == [
        "DELETE /v1/files/{file_id}",
        "POST /v1/fine_tuning/jobs/{job_id}/cancel",
        "POST /v1/x/keys/{key_id}/revoke",
    ]
    assert told[3]["object_id"] == "ftjob-none"
    assert {entry["num_requests"] for entry in told} == {1}


def stranger_file(api: httpx.Client) -> str:
    sent = api.post("/files", files={"file": ("pairs.jsonl", pairs())}, data={"purpose": "fine-tune"})
    return str(sent.json()["id"])


def test_a_completion_of_a_policy_that_is_another_s_is_refused_in_the_audit(api: httpx.Client, base_url: str) -> None:
    key = new_key(api, project_id=new_project(api, "asking"), scopes=["inference"])
    with api_of(base_url, key["value"]) as theirs:
        assert theirs.post("/chat/completions", json={"model": "ft:none", "messages": []}).status_code == 404
    (entry,) = audit_of(api, key)
    assert (entry["action"], entry["code"]) == ("POST /v1/chat/completions", "model_not_found")


def test_a_key_that_is_refused_all_the_time_leaves_ten_lines_a_minute_and_one_that_counts_the_rest(
    api: httpx.Client, settings: Settings
) -> None:
    first, second = new_key(api, scopes=["read", "write"]), new_key(api, scopes=["read", "write"])
    long = "/fine_tuning/jobs/" + "x" * 5000 + "/pause"
    with answering(settings) as url, api_of(url, first["value"]) as theirs, api_of(url, second["value"]) as others:
        for number in range(14):
            assert theirs.post(f"/fine_tuning/jobs/ftjob-{number}/cancel").status_code == 404
        assert theirs.post(long).status_code == 404
        assert others.post(long).status_code == 404
        assert len(audit_of(api, first)) == 10
        assert [entry["object_id"] for entry in audit_of(api, second)] == ["x" * 100]
    told = audit_of(api, first)  # the end of the service is that of its minute, too
    assert [(entry["num_requests"], entry["object_id"]) for entry in told[:3]] == [
        (1, None),
        (4, None),
        (1, "ftjob-9"),
    ]
    assert {entry["code"] for entry in told} == {"fine_tune_not_found"}
    assert len(told) == 12


@pytest.mark.usefixtures("base_url")
def test_unknown_keys_that_come_together_share_a_look_up_and_none_is_looked_up_twice(settings: Settings) -> None:
    class Counted(Store):
        transactions = 0

        def begin(self) -> Any:
            self.transactions += 1
            return super().begin()

    async def work() -> None:
        store = Counted(settings.database_url)
        authentication = Authentication(store, settings)
        for _ in range(2):
            asked = (authentication.caller(f"rd-nobodys-{number}") for number in range(200))
            refused = await asyncio.gather(*asked, return_exceptions=True)
            assert {type(error) for error in refused} == {Unauthorized}
        assert 1 <= store.transactions <= 2  # the first one's, and that of all who came meanwhile
        await store.close()

    asyncio.run(work())


def test_a_projects_admin_makes_no_key_beyond_what_is_usual(
    api: httpx.Client, base_url: str, settings: Settings
) -> None:
    project = new_project(api, "many-keys")

    async def check(caller: Caller, asked: int | None, name: str = "requests_per_minute") -> None:
        store = Store(settings.database_url)
        try:
            async with store.begin() as session:
                wanted = {"requests_per_minute": None, "tokens_per_minute": None} | {name: asked}
                await keys.check(session, caller, wanted, {"requests_per_minute": 60, "tokens_per_minute": 60})
        finally:
            await store.close()

    own = Caller("key_1", project, frozenset(SCOPES))
    asyncio.run(check(own, 60))
    asyncio.run(check(own, None))
    asyncio.run(check(CONFIGURED, 1_000_000))
    with pytest.raises(InvalidRequest, match="requests_per_minute is 61, but a key may have at most 60"):
        asyncio.run(check(own, 61))
    with pytest.raises(InvalidRequest, match="tokens_per_minute is 61, but a key may have at most 60"):
        asyncio.run(check(own, 61, "tokens_per_minute"))
    with psycopg.connect(settings.database_url) as connection:
        columns = "id, project_id, name, sha256, hint, scopes"
        connection.execute(
            f"INSERT INTO keys ({columns}) SELECT 'key_' || n, %s, 'k', 'sha' || n, '', '{{}}' FROM"
            " generate_series(1, 99) n",
            [project],
        )
    with api_of(base_url, new_key(api, project_id=project, scopes=["admin"])["value"]) as admin:
        refused = admin.post("/x/keys", json={"name": "one more"})
        assert refused.status_code == 400
        assert "The project has 100 keys, and the limit is 100; revoke a key first." in refused.text
    assert new_key(api, project_id=project)
