"""Tests how items are tried again, how an evaluation waits for models, and what becomes of items that fail."""

import httpx
import pytest

from services.control_plane.evaluations import work
from tests.services.control_plane.evaluations.conftest import POLICY, Engines, chats, created, ended, until

COMPARE = {"kind": "compare", "model": POLICY, "judge": {"type": "model", "model": "fair"}, "rows": chats(6)}
SCORE = {"kind": "score", "model": "tiny", "judge": {"type": "length"}, "rows": chats(3)}
pytestmark = pytest.mark.usefixtures("policy")


def test_a_model_that_fails_is_asked_again_and_the_evaluation_succeeds(api: httpx.Client, engines: Engines) -> None:
    engines.failing[POLICY] = 8
    found = ended(api, created(api, **COMPARE)["id"])
    assert (found["status"], found["num_completed"], found["num_failed"]) == ("succeeded", 6, 0)
    assert engines.counts()[POLICY] == 6 + 8


def test_an_item_that_is_refused_fails_at_once_and_is_left_out_of_the_results(
    api: httpx.Client, engines: Engines
) -> None:
    engines.refusing.add("Question 2")
    found = ended(api, created(api, **COMPARE)["id"])
    assert (found["status"], found["num_completed"], found["num_failed"]) == ("succeeded", 5, 1)
    assert (found["progress"], found["results"]["num_wins"]) == (1, 5)
    items = api.get(f"/x/evaluations/{found['id']}/items").json()["data"]
    assert [item["status"] for item in items] == ["completed"] * 2 + ["failed"] + ["completed"] * 3
    assert items[2]["error"] == {"code": "invalid_value", "message": "I do not take this."}
    assert engines.counts()[POLICY] == 6


def test_an_evaluation_whose_items_all_fail_says_why(api: httpx.Client, engines: Engines) -> None:
    engines.failing["tiny"] = 1000
    found = ended(api, created(api, **SCORE)["id"])
    assert (found["status"], found["num_failed"], found["results"]) == ("failed", 3, None)
    assert found["error"]["code"] == "evaluation_failed"
    assert found["error"]["message"] == "All items failed. The first one: The model 'tiny' failed: out of luck"
    assert engines.counts()["tiny"] == 3 * work.MOST_TRIES


def test_it_waits_for_models_as_long_as_it_takes_and_says_so(api: httpx.Client, engines: Engines) -> None:
    engines.is_away = True
    made = created(api, **COMPARE)
    until(lambda: len(engines.asked) > 3 * work.MOST_TRIES)
    told = api.get(f"/x/evaluations/{made['id']}").json()
    assert "The engine has died" in told["waits_for"]
    assert (told["status"], told["num_failed"]) == ("running", 0)
    engines.is_away = False
    found = ended(api, made["id"])
    assert (found["status"], found["num_completed"], found["waits_for"]) == ("succeeded", 6, None)


@pytest.mark.parametrize(("ends_engines", "told"), [(False, "because its replica died"), (True, "Dead")])
def test_an_item_that_kills_replicas_fails_after_ten_and_fails_no_other(
    api: httpx.Client, engines: Engines, ends_engines: bool, told: str
) -> None:
    engines.killing.add("Question 2")
    engines.ends_engines = ends_engines
    found = ended(api, created(api, **COMPARE)["id"])
    assert (found["status"], found["num_completed"], found["num_failed"]) == ("succeeded", 5, 1)
    items = api.get(f"/x/evaluations/{found['id']}/items").json()["data"]
    assert items[2]["error"]["code"] == "model_unavailable"
    assert told in items[2]["error"]["message"]
    assert engines.counts()[POLICY] == 5 + work.MOST_DEATHS


def test_after_a_death_items_are_tried_one_at_a_time(
    api: httpx.Client, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "MOST_DEATHS", 3)
    engines.killing.add("Question")
    found = ended(api, created(api, **SCORE)["id"])
    assert (found["status"], found["num_failed"]) == ("failed", 3)
    assert engines.beside[3:] == [1] * 6


def test_items_fail_if_nothing_was_finished_for_a_day(
    api: httpx.Client, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "STALLED_SECONDS", 0.3)
    engines.is_away = True
    found = ended(api, created(api, **SCORE)["id"])
    assert (found["status"], found["num_failed"]) == ("failed", 3)
    assert "The engine has died" in found["error"]["message"]
    items = api.get(f"/x/evaluations/{found['id']}/items").json()["data"]
    assert {item["error"]["code"] for item in items} == {"evaluation_stalled"}
