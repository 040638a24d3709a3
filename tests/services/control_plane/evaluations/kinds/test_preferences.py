"""Tests people's preferences against the rewards that clients ask for, from models that were really trained."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from services.control_plane.core import leases
from services.control_plane.evaluations import work
from services.control_plane.evaluations.kinds.preferences import ranked
from tests.services.control_plane.evaluations.conftest import results
from tests.services.control_plane.rewards.conftest import BETA, models, rows, settings  # noqa: F401  # fixtures

POLICY, REWARD_MODEL = "ft:tiny:raydpo::dpo", "ft:tiny:raydpo::reward"
ROWS = [
    {"prompt": "the quick", "completions": [" brown fox", " lazy dog"]},
    {"prompt": "the quick", "completions": [" lazy dog", " brown fox"]},
    {"prompt": "the lazy", "completions": [" dog", " fox jumps over the quick brown dog"]},
    {"prompt": "over", "completions": [" the quick brown fox", " dog", " fox"]},
]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("rows", "quick")]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leases, "TICK_SECONDS", 0.05)
        patch.setattr(work, "LOOK_SECONDS", 0.05)
        yield


@pytest.fixture(autouse=True)
def calm() -> None:
    """Takes the place of the fixture that needs the stand-in of the other tests."""


@pytest.mark.parametrize("model", [POLICY, REWARD_MODEL])
def test_its_rewards_are_those_that_clients_get(api: httpx.Client, model: str) -> None:
    asked = api.post("/x/rewards", json={"model": model, "rows": ROWS}).json()["data"]
    found = results(api, kind="preferences", model=model, rows=ROWS)
    evaluation = api.get("/x/evaluations").json()["data"][0]
    items = api.get(f"/x/evaluations/{evaluation['id']}/items").json()["data"]
    rewards = [[each["reward"] for each in row["completions"]] for row in asked]
    assert [{name: item[name] for name in ("prompt", "completions")} for item in items] == ROWS
    assert [item["found"]["rewards"] for item in items] == [pytest.approx(row, abs=1e-6) for row in rewards]
    assert found["accuracy"]["value"] == sum(row[0] > max(row[1:]) for row in rewards) / 4
    margins = [row[0] - sum(row[1:]) / len(row[1:]) for row in rewards]
    assert found["margin"]["value"] == pytest.approx(sum(margins) / 4, abs=1e-6)
    assert sum(part["num_items"] for part in found["better_is"].values()) == 4
    assert found["better_is"]["shorter"]["num_items"] >= 1
    assert all("scored" not in item["found"] for item in items)
    if model == POLICY:
        assert (evaluation["request"]["reference"], evaluation["request"]["beta"]) == ("tiny", BETA)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "tiny"}, "beta"),
        ({"model": "ft:tiny:raydpo::simpo"}, "beta"),
        ({"model": REWARD_MODEL, "beta": 1.0}, "beta"),
        ({"rows": [{"prompt": "the", "completions": [" fox"]}]}, "rows.0.completions"),
        ({"rows": [{"prompt": "the"}]}, "rows.0.completions"),
        ({"judge": {"type": "length"}}, "judge"),
    ],
)
def test_what_cannot_be_compared_is_refused(api: httpx.Client, body: dict[str, Any], param: str) -> None:
    answer = api.post("/x/evaluations", json={"kind": "preferences", "model": POLICY, "rows": ROWS} | body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_rows_of_a_file_in_which_nothing_is_preferred_are_left_out(
    api: httpx.Client, upload: Callable[[list[dict[str, Any]]], str]
) -> None:
    ranked_row = {"prompt": "the quick", "completions": [" brown fox", " lazy dog"], "scores": [2, 1]}
    tied = {"prompt": "the quick", "completions": [" brown fox", " lazy dog"], "scores": [1, 1]}
    found = results(api, kind="preferences", model=POLICY, file=upload([tied] * 5 + [ranked_row]))
    assert found["accuracy"]["value"] == 1
    assert api.get("/x/evaluations").json()["data"][0]["num_items"] == 1
    refused = api.post("/x/evaluations", json={"kind": "preferences", "model": POLICY, "file": upload([tied])})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "file")


@pytest.mark.parametrize(
    ("rewards", "lengths", "ratings", "is_right", "margin", "better_is"),
    [
        ([2.0, 1.0], [3, 3], None, True, 1, "similar"),
        ([1.0, 2.0], [9, 3], None, False, -1, "longer"),
        ([1.0, 1.0], [3, 9], None, False, 0, "shorter"),
        ([4.0, 2.0, 1.0], [1, 1, 1], [5, 5, 1], True, 2, "similar"),
        ([4.0, 0.0, 1.0], [1, 1, 1], [5, 5, 1], False, 1, "similar"),
    ],
)
def test_the_best_ones_must_all_have_higher_rewards_than_the_others(
    rewards: list[float],
    lengths: list[int],
    ratings: list[float] | None,
    is_right: bool,
    margin: float,
    better_is: str,
) -> None:
    found = ranked(rewards, lengths, ratings)
    assert (found["is_right"], found["margin"], found["better_is"]) == (is_right, margin, better_is)
