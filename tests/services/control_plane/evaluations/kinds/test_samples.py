"""Tests several answers to each prompt, and the score of each by every type of judge."""

from typing import Any

import httpx
import pytest

from tests.services.control_plane.evaluations.conftest import (
    LOGP,
    POLICY,
    REWARD_MODEL,
    Engines,
    chats,
    created,
    ended,
)

SAMPLES = {"kind": "samples", "model": POLICY, "num_samples": 3, "rows": chats(4)}
pytestmark = pytest.mark.usefixtures("policy")


def sampled(api: httpx.Client, **body: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Runs an evaluation, and returns its results and what was found for each item."""
    found = ended(api, created(api, **SAMPLES | body)["id"])
    assert found["status"] == "succeeded", found
    items = api.get(f"/x/evaluations/{found['id']}/items").json()["data"]
    return found["results"], [item["found"] for item in items]


def test_a_rule_scores_each_of_the_answers(api: httpx.Client, engines: Engines) -> None:
    results, items = sampled(api, judge={"type": "length"})
    assert [item["scores"] for item in items] == [[3, 4, 5]] * 4
    assert [answer["text"] for answer in items[1]["answers"]] == [f"good answer 1{' very' * i}" for i in range(3)]
    assert [answer["num_tokens"] for answer in items[1]["answers"]] == [4, 5, 6]  # the end is a token
    assert [results[name]["value"] for name in ("score", "best", "worst")] == [4, 5, 3]
    assert (results["ties"], results["distinct"]) == (0, 3)
    assert engines.counts() == {POLICY: 4}  # one request a prompt


def test_a_judge_that_is_asked_compares_each_two_answers_in_both_orders(api: httpx.Client, engines: Engines) -> None:
    results, items = sampled(api, judge={"type": "model", "model": "long"})
    assert [item["scores"] for item in items] == [[0, 0.5, 1]] * 4
    assert "score" not in results
    assert engines.counts() == {POLICY: 4, "long": 4 * 3 * 2}


def test_a_judge_that_prefers_the_first_answer_finds_only_ties(api: httpx.Client) -> None:
    results, items = sampled(api, judge={"type": "model", "model": "first"})
    assert [item["scores"] for item in items] == [[0.5, 0.5, 0.5]] * 4
    assert results["ties"] == 1


def test_a_reward_model_scores_each_of_the_answers(api: httpx.Client) -> None:
    _, items = sampled(api, judge={"type": "model", "model": REWARD_MODEL})
    assert [item["scores"] for item in items] == [[0.5 * n for n in (4, 5, 6)]] * 4


def test_the_implicit_reward_is_that_of_the_policy_and_its_reference(api: httpx.Client, engines: Engines) -> None:
    _, items = sampled(api, judge={"type": "implicit"})
    for item in items:
        for answer, score in zip(item["answers"], item["scores"], strict=True):
            ids = engines.ids(answer["text"])
            ratio = sum(LOGP["policy"](token) - LOGP["reference"](token) for token in ids)
            assert score == pytest.approx(0.1 * ratio)
        assert "scored" not in item


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"num_samples": 9, "judge": {"type": "model", "model": "fair"}}, "num_samples", "compares each two answers"),
        ({"num_samples": 1, "judge": {"type": "length"}}, "num_samples", "greater than or equal to 2"),
        ({"model": "tiny", "judge": {"type": "implicit"}}, "judge.beta", "'tiny' is a base model"),
        ({"judge": {"type": "implicit", "model": REWARD_MODEL}}, "judge.type", "has no implicit reward"),
        ({"judge": {"type": "implicit", "reference": "nobody"}}, "judge.reference", "does not exist"),
    ],
)
def test_what_cannot_be_sampled_or_scored_is_refused(
    api: httpx.Client, body: dict[str, Any], param: str, said: str
) -> None:
    error = api.post("/x/evaluations", json=SAMPLES | body).json()["error"]
    assert error["param"] == param, error
    assert said in error["message"]
