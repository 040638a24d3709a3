"""Tests commands that list items, over several pages, as a table or as JSON."""

import json
from itertools import islice

import pytest

from services.cli.lists import _items


def test_lists_go_beyond_their_first_page(raydpo, database):
    named = [f"we_{number:03}" for number in range(101)]
    for name in named:
        row = (name, "https://localhost/", ["fine_tuning.job.failed"])
        columns = "id, project_id, name, url, event_types, secret"
        database.execute(
            f"INSERT INTO webhook_endpoints ({columns}) VALUES (%s, 'proj_default', 'many', %s, %s, 'whsec_a')", row
        )
    database.commit()
    try:
        assert {line.split("\t")[0] for line in raydpo("webhooks", "list", "--limit", 200).stdout.splitlines()} == set(
            named
        )
        assert {each["id"] for each in json.loads(raydpo("webhooks", "list", "--limit", 200, "--json").stdout)} == set(
            named
        )
    finally:
        database.execute("DELETE FROM webhook_endpoints WHERE name = 'many'")
        database.commit()


@pytest.mark.parametrize(
    "command",
    [
        ("files", "list"),
        ("jobs", "list"),
        ("models", "list"),
        ("keys", "list"),
        ("projects", "list"),
        ("webhooks", "list"),
        ("audit",),
    ],
)
def test_every_list_is_json_on_demand(raydpo, job_id, command):
    listed = json.loads(raydpo(*command, "--json").stdout)
    assert isinstance(listed, list)
    if listed:
        assert listed[0]["id"] in {each["id"] for each in listed}
        assert len(listed) == len(raydpo(*command).stdout.splitlines())


def test_brackets_in_names_and_messages_are_no_markup(raydpo, job_id):
    assert "hf://datasets/org/name/[/red]/a.jsonl" in raydpo("jobs", "events", job_id).stdout
    raydpo("jobs", "cancel", job_id)
    watched = raydpo("jobs", "watch", job_id)
    assert "hf://datasets/org/name/[/red]/a.jsonl" in watched.stdout
    assert "cancelled" in watched.stderr


@pytest.mark.parametrize("command", [("jobs", "show"), ("files", "content"), ("models", "delete"), ("keys", "revoke")])
def test_an_id_that_is_empty_is_refused_as_such(raydpo, command):
    refused = raydpo(*command, "")
    assert refused.exit_code == 2
    assert "Invalid value for 'ID': the id must not be empty" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["files", "jobs", "webhooks", "keys", "projects", "models"])
def test_a_list_shows_twenty_or_so_many_as_are_asked_for_and_says_that_more_follow(raydpo, pairs, kind):
    files = [raydpo("files", "upload", pairs).stdout.strip() for _ in range(2)] if kind in ("files", "jobs") else []
    make = {
        "jobs": ("create", "--model", "tiny", "--file", *files[:1]),
        "webhooks": ("create", "https://example.com/hook"),
        "keys": ("create", "listed"),
        "projects": ("create", "listed"),
    }
    for number in range(2 if kind in make else 0):
        words = [f"listed-{number}" if word == "listed" else word for word in make[kind]]
        assert raydpo(kind, *words).exit_code == 0
    shown = raydpo(kind, "list", "--limit", 1)
    assert len(shown.stdout.splitlines()) == 1
    more = "The list has more items than --limit 1; raise --limit to show more.\n"
    assert shown.stderr == ("" if kind == "models" else more)
    (first,) = json.loads(raydpo(kind, "list", "--limit", 1, "--json").stdout)
    assert first["id"] == shown.stdout.split("\t")[0]
    assert raydpo(kind, "list", "--limit", 0).exit_code == 2
    if kind == "webhooks":
        for line in raydpo(kind, "list").stdout.splitlines():
            raydpo(kind, "delete", line.split("\t")[0])


def test_a_list_asks_for_no_more_pages_than_it_shows():
    asked = []

    class Pages:
        def get(self, path, *, cast_to, options):
            asked.append(dict(options["params"]))
            return {"data": [{"id": len(asked)}] * options["params"]["limit"], "has_more": True, "last_id": len(asked)}

    assert len(list(islice(_items(Pages(), "/files", 21, {}), 21))) == 21
    assert asked == [{"limit": 21}]
    assert len(list(islice(_items(Pages(), "/files", 150, {}), 150))) == 150
    assert asked[1:] == [{"limit": 100}, {"limit": 100, "after": 2}]
