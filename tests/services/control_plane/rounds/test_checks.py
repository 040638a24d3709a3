"""Tests which rounds are refused before anything is created, by the field that is wrong."""

from typing import Any

import httpx
import pytest

from tests.services.control_plane.evaluations.conftest import REWARD_MODEL, chats
from tests.services.control_plane.rounds.conftest import ROUNDS, created, reached

pytestmark = pytest.mark.usefixtures("policy")
FAIR = {"type": "model", "model": "fair"}
IMPLICIT = {"type": "implicit"}


@pytest.mark.parametrize(
    ("more", "param", "code", "said"),
    [
        ({"model": "nobody"}, "model", "model_not_found", "does not exist"),
        ({"model": REWARD_MODEL}, "model", "invalid_value", "cannot write answers"),
        ({"rows": None, "file": "file-none"}, "file", "file_not_found", "No such File"),
        ({"rows": [*chats(1), {"prompt": "A text"}]}, "rows", "invalid_value", "Some prompts are texts"),
        ({"rows": [{"prompt": 7}]}, "rows.0.prompt", "invalid_value", "rows.0.prompt"),
        ({"judge": {"type": "exact"}}, "rows", "invalid_value", "no completion for the rule 'exact'"),
        ({"judge": {"type": "model", "model": "nobody"}}, "judge.model", "model_not_found", "does not exist"),
        ({"judge": FAIR, "selection": {"type": "rso"}}, "selection.type", "invalid_value", "only compares answers"),
        ({"judge": FAIR, "num_samples": 9}, "num_samples", "invalid_value", "compares each two answers"),
        ({"judge": IMPLICIT}, "evaluation.judge", "invalid_value", "cannot be compared"),
        (
            {"evaluation": {"rows": [{"prompt": 7}]}},
            "evaluation.rows.0.prompt",
            "invalid_value",
            "rows.0.prompt",
        ),
        ({"evaluation": {"file": "file-none"}}, "evaluation.file", "file_not_found", "No such File"),
        (
            {"evaluation": {"judge": {"type": "model", "model": "nobody"}}},
            "evaluation.judge.model",
            "model_not_found",
            "does not exist",
        ),
        ({"job": {"method": {"type": "guess"}}}, "job.method.type", "unsupported_value", "guess"),
        (
            {"job": {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": -1}}}}},
            "job.method.dpo.hyperparameters.beta",
            "invalid_value",
            "greater than 0",
        ),
        ({"job": {"x_raydpo": {"colour": 1}}}, "job.x_raydpo.colour", "unknown_parameter", "colour"),
        ({"job": {"validation_file": "file-none"}}, "job.validation_file", "file_not_found", "No such File"),
        ({"job": {"method": {"type": "supervised"}}}, "selection.type", "invalid_value", "learns from demonstrations"),
        (
            {"job": {"method": {"type": "simpo"}}, "selection": {"type": "ranking"}},
            "selection.type",
            "invalid_value",
            "makes ratings",
        ),
        (
            {"rows": chats(30), "num_samples": 64, "selection": {"type": "all_pairs"}},
            "num_samples",
            "invalid_value",
            "could make 60480 rows, 2016 of each of 30 prompts, but it can make at most 50000",
        ),
        ({"evaluation": {"judge": {"type": "exact"}}}, "rows", "invalid_value", "no completion for the rule 'exact'"),
        ({"job": {"validation_file": "held.jsonl"}}, "job.validation_file", "invalid_value", "id of an uploaded file"),
        (
            {"job": {"x_raydpo": {"columns": {"prompt": "question"}}}},
            "job.x_raydpo.columns",
            "invalid_value",
            "only with x_raydpo.dataset",
        ),
        (
            {"job": {"x_raydpo": {"dataset": "s3://rows/a.jsonl"}}},
            "job.x_raydpo.dataset",
            "invalid_value",
            "leave x_raydpo.dataset out",
        ),
        (
            {"judge": IMPLICIT, "evaluation": {"judge": FAIR}, "job": {"method": {"type": "simpo"}}},
            "judge.reference",
            "missing_required_parameter",
            "was trained by simpo",
        ),
        (
            {"job": {"method": {"type": "reward_bradley_terry"}}},
            "job.method.type",
            "invalid_value",
            "trains a reward model",
        ),
    ],
)
def test_rounds_that_cannot_work_are_refused_by_their_field(
    api: httpx.Client, more: dict[str, Any], param: str, code: str, said: str
) -> None:
    answer = api.post("/x/rounds", json=ROUNDS | more)
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error
    assert said in error["message"]
    assert api.get("/x/rounds").json()["data"] == []


def test_implicit_rewards_of_one_policy_may_judge_all_rounds(api: httpx.Client) -> None:
    for more in ({"judge": IMPLICIT | {"model": ROUNDS["model"]}}, {"judge": IMPLICIT, "evaluation": {"judge": FAIR}}):
        made = api.post("/x/rounds", json=ROUNDS | more)
        assert made.status_code == 200, made.text
        api.post(f"/x/rounds/{made.json()['id']}/cancel")
        api.delete(f"/x/rounds/{made.json()['id']}")


def test_an_evaluation_on_the_prompts_of_the_rounds_takes_as_many_as_it_says(api: httpx.Client) -> None:
    made = created(api, evaluation={"max_items": 5})
    quality = reached(api, made["id"], 0, "evaluations")["quality"]
    assert api.get(f"/x/evaluations/{quality}").json()["num_items"] == 5
    api.post(f"/x/rounds/{made['id']}/cancel")
