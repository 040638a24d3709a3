"""Tests how a policy and its reference are asked for scores, with a stand-in for the served models."""

import asyncio
import json
from datetime import date
from typing import Any

import pytest

from dpo_core.data.groups import Group
from services.contract import SCORE_TEXTS, SCORE_TOKENS
from services.control_plane.core.errors import ApiError
from services.control_plane.models.models import NamedModel
from services.control_plane.rewards.judges import Judge
from services.control_plane.rewards.scoring import Judgement, Scoring

POLICY, REFERENCE = (NamedModel(name, f"/{name}", "tiny", None) for name in ("ft:a", "tiny"))  # type: ignore[arg-type]
GROUPS = [Group("Why?", ("So.", "No."), 1), Group("Who?", ("Me.",), 2)]
IDS = [{"prompt_ids": [1], "completion_ids": [[2, 3], [4]], "others": None}]
IDS.append({"prompt_ids": [5], "completion_ids": [[6]], "others": None})
LOGPS = {"ft:a": [[[-1.0], [-4.0]], [[-2.0]]], "tiny": [[[-3.0], [-3.5]], [[-2.0]]]}


class Served:
    """Answers in the place of the models. `failing` names models that are not loaded yet."""

    def __init__(self, outputs: dict[str, Any] = LOGPS) -> None:
        self.outputs, self.failing = outputs, set[str]()
        self.wanted: list[str] = []
        self.asked: list[tuple[str, str, dict[str, Any]]] = []

    async def want(self, model: NamedModel) -> None:
        self.wanted.append(model.id)

    async def ask(self, model: NamedModel, path: str, body: bytes, meter: Any) -> bytes:
        assert meter == f"meter of {model.id}"
        self.asked.append((model.id, path, json.loads(body)))
        if model.id in self.failing:
            raise ApiError("it loads", code="model_loading")
        scored = {"groups": IDS, "vocabulary": "digest", "num_tokens": [[2, 1], [1]], "usage": {"prompt_tokens": 9}}
        return json.dumps(scored | {"outputs": self.outputs[model.id]}).encode()


def judged(scoring: Scoring, judge: Judge) -> Judgement:
    return asyncio.run(scoring.judge(judge, GROUPS, lambda name: f"meter of {name}"))  # type: ignore[arg-type, return-value]


def scoring_by(served: Served) -> Scoring:
    return Scoring(served)  # type: ignore[arg-type]


def test_a_policys_reward_is_beta_times_its_log_ratio_on_the_token_ids_that_it_returned() -> None:
    served = Served()
    found = judged(scoring_by(served), Judge(POLICY, REFERENCE, beta=0.5, today=date(2026, 1, 2)))
    rewards = [[each.reward for each in row] for row in found.groups]
    assert rewards == [[pytest.approx(1.0), pytest.approx(-0.25)], [pytest.approx(0.0)]]
    assert [[each.num_tokens for each in row] for row in found.groups] == [[2, 1], [1]]
    assert found.num_tokens == 18
    assert served.wanted == ["tiny"]
    (policy, texts, sent), (reference, tokens, ids) = served.asked
    assert (policy, texts, reference, tokens) == ("ft:a", SCORE_TEXTS, "tiny", SCORE_TOKENS)
    assert [row["completions"] for row in sent["groups"]] == [["So.", "No."], ["Me."]]
    assert sent["today"] == "2026-01-02"
    assert ids == {"groups": IDS, "vocabulary": "digest"}


def test_a_repeated_request_asks_only_the_reference_that_was_not_loaded() -> None:
    served = Served()
    served.failing.add("tiny")
    scoring, judge = scoring_by(served), Judge(POLICY, REFERENCE, beta=0.5)
    with pytest.raises(ApiError, match="it loads"):
        judged(scoring, judge)
    served.failing.clear()
    assert judged(scoring, judge).groups[0][0].reward == pytest.approx(1.0)
    assert [name for name, _, _ in served.asked] == ["ft:a", "tiny", "tiny"]
    judged(scoring, judge)  # the scores were kept only until both had answered
    assert [name for name, _, _ in served.asked[3:]] == ["ft:a", "tiny"]


def test_a_reward_model_is_asked_alone_and_its_first_output_is_the_reward() -> None:
    served = Served({"ft:a": [[[0.5, 7.0], [1.5, 7.0]], [[-1.0, 7.0]]]})
    found = judged(scoring_by(served), Judge(POLICY))
    assert [[each.reward for each in row] for row in found.groups] == [[0.5, 1.5], [-1.0]]
    assert (served.wanted, [name for name, _, _ in served.asked]) == ([], ["ft:a"])


def test_scores_that_are_no_numbers_are_an_error_of_the_model() -> None:
    # A model's application writes NaN as null, because JSON has no NaN.
    with pytest.raises(ApiError, match="'ft:a' returned scores that are not finite numbers"):
        judged(scoring_by(Served({"ft:a": [[[None], [0.0]], [[0.0]]]})), Judge(POLICY))
