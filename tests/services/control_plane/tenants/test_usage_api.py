"""Tests the route that lists usage, by project, key, model and day."""

from datetime import UTC, datetime, timedelta

import httpx
import psycopg
import pytest

from services.control_plane.core.store import migrate
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import EVERY_SCOPE, api_of, new_key, new_project

SUMS = ("num_requests", "prompt_tokens", "completion_tokens", "accelerator_seconds")


@pytest.fixture
def empty(settings: Settings) -> None:
    migrate(settings.database_url)
    with psycopg.connect(settings.database_url) as rows:
        rows.execute("DELETE FROM usage")
        rows.execute("DELETE FROM usage_writers")


@pytest.fixture
def rows(empty: None, base_url: str, api: httpx.Client, settings: Settings) -> str:
    """Adds three days of usage of two projects, and returns the id of the second."""
    project = new_project(api, f"other {datetime.now(UTC).timestamp()}")
    today = datetime.now(UTC).date()
    with psycopg.connect(settings.database_url) as connection:
        for owner, key, model, age in (
            ("proj_default", "key_1", "tiny", 0),
            ("proj_default", "key_1", "ft:a", 1),
            ("proj_default", "key_2", "tiny", 1),
            (project, "key_3", "tiny", 40),
            (project, "key_3", "tiny", 0),
        ):
            columns = f"project_id, key_id, model_id, day, {', '.join(SUMS)}"
            row = (owner, key, model, today - timedelta(days=age), 1, 10, 2, 0.25)
            connection.execute(f"INSERT INTO usage ({columns}) VALUES (%s, %s, %s, %s, %s, %s, %s, %s)", row)
    return project


def sums(answer: httpx.Response) -> dict[str, tuple[float, ...]]:
    assert answer.status_code == 200, answer.text
    return {each["id"]: tuple(each[name] for name in SUMS) for each in answer.json()["data"]}


def test_usage_is_told_by_what_is_asked_for(rows: str, api: httpx.Client) -> None:
    today = datetime.now(UTC).date()
    yesterday = str(today - timedelta(days=1))
    assert sums(api.get("/x/usage?group_by=day")) == {yesterday: (2, 20, 4, 0.5), str(today): (2, 20, 4, 0.5)}
    assert sums(api.get("/x/usage?group_by=model")) == {"ft:a": (1, 10, 2, 0.25), "tiny": (3, 30, 6, 0.75)}
    assert sums(api.get("/x/usage?group_by=key"))["key_1"] == (2, 20, 4, 0.5)
    assert sums(api.get("/x/usage"))[rows] == (1, 10, 2, 0.25)
    long_ago = today - timedelta(days=60)
    assert sums(api.get(f"/x/usage?group_by=project&from={long_ago}&to={today}"))[rows] == (2, 20, 4, 0.5)
    assert sums(api.get(f"/x/usage?group_by=key&project_id={rows}")) == {"key_3": (1, 10, 2, 0.25)}
    assert sums(api.get(f"/x/usage?group_by=day&to={yesterday}")) == {yesterday: (2, 20, 4, 0.5)}


def test_usage_is_paged(rows: str, api: httpx.Client) -> None:
    first = api.get("/x/usage?group_by=key&limit=2").json()
    assert ([each["id"] for each in first["data"]], first["has_more"]) == (["key_1", "key_2"], True)
    rest = api.get(f"/x/usage?group_by=key&limit=2&after={first['last_id']}").json()
    assert ([each["id"] for each in rest["data"]], rest["has_more"]) == (["key_3"], False)
    assert api.get("/x/usage?group_by=key&after=key_0").json()["error"]["param"] == "after"


def test_an_admin_of_a_project_sees_its_own_usage_and_others_see_none(
    rows: str, api: httpx.Client, base_url: str
) -> None:
    with api_of(base_url, new_key(api, project_id=rows, scopes=EVERY_SCOPE)["value"]) as theirs:
        assert set(sums(theirs.get("/x/usage?group_by=project"))) == {rows}
        assert sums(theirs.get("/x/usage?project_id=proj_default")) == {}
    with api_of(base_url, new_key(api, scopes=["read", "write", "inference"])["value"]) as own:
        assert own.get("/x/usage").json()["error"]["code"] == "missing_scope"


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("from=2026-02-02&to=2026-02-01", "from"),
        ("from=yesterday", "from"),
        ("group_by=hour", "group_by"),
        ("a=1", "a"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(api: httpx.Client, query: str, param: str) -> None:
    answer = api.get(f"/x/usage?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_the_first_days_of_the_calendar_can_be_asked_for(api: httpx.Client) -> None:
    assert api.get("/x/usage?to=0001-01-05").json()["data"] == []
