"""Tests that the JSON of rewards is what the OpenAPI document describes."""

import json
from datetime import UTC, datetime
from typing import Any

from services.control_plane.models.models import NamedModel
from services.control_plane.rewards.api import _response
from services.control_plane.rewards.documents import RewardsList
from services.control_plane.rewards.judges import Judge
from services.control_plane.rewards.preferences import explicit, implicit
from services.control_plane.rewards.scoring import Judgement
from tests.services.control_plane.documented import check

POLICY, BASE = (NamedModel(name, f"/models/{name}", name, datetime(2026, 1, 1, tzinfo=UTC)) for name in ("p", "b"))


def told(judge: Judge, judgement: Judgement) -> Any:
    return json.loads(bytes(_response(judge, judgement).body))


def test_implicit_rewards_and_those_of_reward_models_are_as_described() -> None:
    rows = [[implicit(0.1, -3.0, -4.0, 5), implicit(0.1, -2.0, -1.0, 4)], [implicit(0.1, -3.0, -4.0, 5)]]
    document = told(Judge(POLICY, BASE, 0.1), Judgement(rows, 42))
    check(RewardsList, document)
    assert [row["winner"] for row in document["data"]] == [0, 0]
    document = told(Judge(POLICY), Judgement([[explicit((0.5, -1.0), 5), explicit((0.7, -1.0), 4)]], 21))
    check(RewardsList, document)
    assert (document["reference"], document["data"][0]["winner"]) == (None, 1)
