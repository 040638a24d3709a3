"""Tests the divergence of a policy from its reference, from a stand-in for the served models."""

from typing import Any

import httpx
import pytest

from tests.services.control_plane.evaluations.conftest import LOGP, POLICY, REWARD_MODEL, Engines, chats, results

pytestmark = pytest.mark.usefixtures("policy")


def log_ratio(ids: list[int]) -> float:
    return sum(LOGP["policy"](token) - LOGP["reference"](token) for token in ids)


def test_the_divergence_is_that_of_the_sampled_token_ids(api: httpx.Client, engines: Engines) -> None:
    rows = [*chats(5), {"prompt": "no chat 5"}]
    found = results(api, kind="drift", model=POLICY, rows=rows, sampling={"max_tokens": 3})
    sampled = [engines.ids(f"good answer {number}") for number in range(6)]
    ratios = [log_ratio(ids) for ids in sampled]
    assert found["kl_per_sequence"]["value"] == pytest.approx(sum(ratios) / 6)
    assert found["kl_per_token"]["value"] == pytest.approx(sum(ratios) / sum(map(len, sampled)))
    assert found["kl_per_sequence"]["low"] < found["kl_per_sequence"]["value"] < found["kl_per_sequence"]["high"]
    assert found["kl_estimator"].startswith("k1: ")
    assert found["answers"]["model"]["unfinished"] == 1
    evaluation = api.get("/x/evaluations").json()["data"][0]
    assert evaluation["request"]["reference"] == "tiny"
    item = api.get(f"/x/evaluations/{evaluation['id']}/items").json()["data"][0]["found"]
    assert item["log_ratio"] == pytest.approx(ratios[0])
    assert set(item) == {"answer", "num_tokens", "logp", "reference_logp", "log_ratio"}


def test_samples_are_those_of_the_policys_whole_distribution(api: httpx.Client, engines: Engines) -> None:
    results(api, kind="drift", model=POLICY, rows=chats(2))
    for _, body in engines.asked:
        assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"]) == (1, 1, 0, 0)
        assert body["repetition_penalty"] == 1


def test_a_model_has_not_drifted_from_itself(api: httpx.Client) -> None:
    found = results(api, kind="drift", model="tiny", reference="fair", rows=chats(3))
    assert found["kl_per_sequence"] == found["kl_per_token"] == {"value": 0, "low": 0, "high": 0}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "tiny"}, "reference"),
        ({"model": REWARD_MODEL}, "model"),
        ({"reference": REWARD_MODEL}, "reference"),
        ({"sampling": {"temperature": 0.5}}, "sampling"),
        ({"sampling": {"top_p": 0.5}}, "sampling"),
        ({"beta": 0.5}, "beta"),
    ],
)
def test_what_has_no_divergence_is_refused(api: httpx.Client, body: dict[str, Any], param: str) -> None:
    answer = api.post("/x/evaluations", json={"kind": "drift", "model": POLICY, "rows": chats(1)} | body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
