"""Tests comparisons of two models, from a stand-in for the served models."""

import json
from typing import Any

import httpx
import pytest

from tests.services.control_plane.evaluations.conftest import POLICY, REWARD_MODEL, Engines, chats, results

FAIR = {"type": "model", "model": "fair"}
pytestmark = pytest.mark.usefixtures("policy")


def comparison(**more: Any) -> dict[str, Any]:
    return {"kind": "compare", "model": POLICY, "judge": FAIR, "rows": chats(12), **more}


def test_a_better_model_wins_every_comparison_in_both_orders(api: httpx.Client, engines: Engines) -> None:
    found = results(api, **comparison())
    assert (found["num_wins"], found["num_losses"], found["num_ties"]) == (12, 0, 0)
    assert found["win_rate"] == {"value": 1, "low": 1, "high": 1}
    assert found["length_controlled_win_rate"]["value"] > 0.95
    assert found["order_disagreement"] == 0
    assert (found["agreement"], found["num_labelled"]) == (None, 0)
    assert found["answers"]["model"]["mean_tokens"] == 3
    assert found["answers"]["baseline"]["mean_tokens"] == 5
    assert engines.counts() == {POLICY: 12, "tiny": 12, "fair": 24}


def test_swapping_the_models_mirrors_the_rates(api: httpx.Client) -> None:
    rows = chats(6) + [{"prompt": f"no chat {number}"} for number in range(6)]
    there = results(api, **comparison(rows=rows))
    back = results(api, **comparison(rows=rows, model="tiny", baseline=POLICY))
    for rate in ("win_rate", "length_controlled_win_rate"):
        assert back[rate]["value"] == pytest.approx(1 - there[rate]["value"], abs=1e-12)
        assert back[rate]["low"] == pytest.approx(1 - there[rate]["high"], abs=1e-12)
    assert (back["num_wins"], back["num_losses"]) == (there["num_losses"], there["num_wins"])
    assert back["answers"]["model"] == there["answers"]["baseline"]


def test_a_judge_that_always_prefers_the_first_answer_finds_only_ties(api: httpx.Client) -> None:
    found = results(api, **comparison(judge={"type": "model", "model": "first"}))
    assert (found["num_wins"], found["num_losses"], found["num_ties"]) == (0, 0, 12)
    assert found["win_rate"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert found["order_disagreement"] == 1


def test_a_rule_judges_without_a_model(api: httpx.Client, engines: Engines) -> None:
    found = results(api, **comparison(judge={"type": "length"}))
    assert (found["num_losses"], found["order_disagreement"]) == (12, None)
    assert set(engines.counts()) == {POLICY, "tiny"}


def test_a_reward_model_judges_by_its_rewards(api: httpx.Client, engines: Engines) -> None:
    found = results(api, **comparison(judge={"type": "model", "model": REWARD_MODEL}))
    assert (found["num_losses"], found["order_disagreement"]) == (12, None)  # it rewards length
    scored = results(api, kind="score", model=POLICY, judge={"type": "model", "model": REWARD_MODEL}, rows=chats(3))
    assert scored["score"] == {"value": 2, "low": 2, "high": 2}  # three words and the end


def test_the_judge_reads_the_conversation_the_criteria_and_both_answers_at_temperature_0(
    api: httpx.Client, engines: Engines
) -> None:
    judge = {**FAIR, "criteria": "Prefer {brevity}."}
    rows = [{"prompt": "Where is the saw 7?", "completions": ["Here."], "system": "You sell tools."}]
    results(api, **comparison(judge=judge, rows=rows))
    there, back = (body for model, body in engines.asked if model == "fair")
    question = there["messages"][0]["content"]
    assert there["temperature"] == 0
    assert there["structured_outputs"] == {"choice": ["A", "B", "C"]}
    for part in (
        "Prefer {brevity}.",
        "system: You sell tools.",
        "user: Where is the saw 7?",
        "good answer",
        "bad answer",
    ):
        assert part in question
    first = question.index("good answer") < question.index("bad answer")
    other = back["messages"][0]["content"]
    assert (other.index("good answer") < other.index("bad answer")) != first


def test_both_models_sample_with_the_same_seed_for_a_prompt_and_another_for_the_next(
    api: httpx.Client, engines: Engines
) -> None:
    results(api, **comparison(rows=chats(3), sampling={"seed": 5, "max_tokens": 7, "temperature": 0.5}))
    sampled = [(model, body) for model, body in engines.asked if "structured_outputs" not in body]
    assert {body["seed"] for model, body in sampled if model == POLICY} == {5, 6, 7}
    assert {body["seed"] for model, body in sampled if model == "tiny"} == {5, 6, 7}
    assert {(body["max_tokens"], body["temperature"]) for _, body in sampled} == {(7, 0.5)}


def test_the_judge_is_compared_with_people_where_rows_are_labelled(api: httpx.Client) -> None:
    pairs = [("a good saw", "a bad saw"), ("a bad saw", "a good saw"), ("a good saw", "no saw"), ("one saw", "no saw")]
    rows = [{"prompt": f"Saw {i}", "completions": list(pair)} for i, pair in enumerate(pairs)] + chats(2)
    body = "\n".join(json.dumps({"prompt": f"Saw {i}", "chosen": c, "rejected": r}) for i, (c, r) in enumerate(pairs))
    file = api.post("/files", files={"file": ("pairs.jsonl", body.encode())}, data={"purpose": "fine-tune"}).json()
    inline, from_file = results(api, **comparison(rows=rows)), results(api, **comparison(rows=None, file=file["id"]))
    assert (inline["num_labelled"], inline["agreement"]["value"]) == (4, 0.5)  # one says the opposite, one is a tie
    assert (from_file["num_labelled"], from_file["agreement"]["value"]) == (4, 0.5)
    assert from_file["num_wins"] == 4
