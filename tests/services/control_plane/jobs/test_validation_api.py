"""Tests /v1/x/jobs/validate, /v1/x/methods, and the request that a job shows of itself. Nothing is trained."""

import json
from dataclasses import astuple
from typing import Any

import httpx
import openai
import pytest

from services.control_plane.jobs.requests import EXTENSIONS, CreateJob
from tests.services.control_plane.conftest import pairs

URI = "hf://datasets/org/name/rows.jsonl"
EVERY_EXTENSION: dict[str, Any] = {
    "num_workers": 2,
    "priority": 3,
    "max_length": 512,
    "truncation": "keep_start",
    "adapter": {"type": "lora", "r": 8, "alpha": 16.0, "target_modules": ["q_proj"]},
    "precision": "bfloat16",
    "reference": {"source": "trainer"},
    "max_tokens_per_pack": 4096,
    "activation_checkpointing": "on",
    "sharding": "full",
    "checkpoint_steps": 7,
    "keep_checkpoints": 3,
    "best_metric": "eval/rewards/accuracies",
    "early_stop": {"patience": 2, "min_gain": 0.01},
    "policy": "best",
    "validation_share": 0.1,
    "evaluations": {"words": {"kind": "score", "judge": {"type": "length"}, "file": "held out", "of": "checkpoints"}},
    "tensorboard": True,
    "mlflow": {"experiment": "answers"},
    "warmup_ratio": 0.2,
    "schedule": "cosine",
    "weight_decay": 0.01,
    "max_grad_norm": 2.0,
}
QUANTIZED = {"quantization": "nf4", "sharding": "replicated"}
OF_A_URI = {"dataset": URI, "columns": {"prompt": "ask"}, "invalid_rows": "drop", "max_invalid_share": 0.2}
SIMPO = {"type": "simpo", "simpo": {"hyperparameters": {"gamma_beta_ratio": 0.3, "learning_rate_multiplier": 2.0}}}
IPO = {"type": "ipo", "ipo": {"hyperparameters": {"length_average": False, "learning_rate_multiplier": 2.0}}}
MPO = {"objectives": [{"type": "dpo", "beta": 0.2}, {"type": "kto"}], "weights": [1.0, 0.5], "n_epochs": 2}


@pytest.fixture(scope="module")
def file_id(client: openai.OpenAI) -> str:
    return client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune").id


@pytest.fixture(scope="module")
def held_out(client: openai.OpenAI) -> str:
    return client.files.create(file=("held.jsonl", pairs(13)), purpose="fine-tune").id


def test_every_option_that_a_job_can_be_given_is_tried_here() -> None:
    assert EVERY_EXTENSION.keys() | OF_A_URI.keys() | QUANTIZED.keys() == EXTENSIONS


@pytest.mark.parametrize(
    "body",
    [
        {"method": IPO, "x_raydpo": EVERY_EXTENSION, "suffix": "nice", "metadata": {"team": "a"}, "seed": 7},
        {"method": SIMPO},
        {
            "method": {"type": "mpo", "mpo": {"hyperparameters": MPO}},
            "validation_file": "held out",
            "x_raydpo": {"reference": {"model": "tiny"}, "adapter": "none"},
        },
        {
            "training_file": URI,
            "x_raydpo": OF_A_URI,
            "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3}}},
        },
        {"integrations": [{"type": "wandb", "wandb": {"project": "p", "tags": ["a"]}}], "method": {"type": "f_dpo"}},
        {"x_raydpo": QUANTIZED, "method": {"type": "dpo"}},
        {"hyperparameters": {"n_epochs": 2, "learning_rate": 1e-5}, "training_file": URI, "x_raydpo": {"dataset": URI}},
    ],
    ids=["every option", "without a reference", "a sum", "a URI", "followed", "quantized", "the older spelling"],
)
def test_the_request_in_a_job_asks_for_the_same_job(
    api: httpx.Client, file_id: str, held_out: str, body: dict[str, Any]
) -> None:
    body = {"model": "tiny", "training_file": file_id} | json.loads(json.dumps(body).replace("held out", held_out))
    job = api.post("/fine_tuning/jobs", json=body).json()
    request = job["x_raydpo"]["request"]
    asked, again = (CreateJob.model_validate(each) for each in (body | {"seed": job["seed"]}, request))
    assert again.spec() == asked.spec()
    (*wishes, comparing), (*wishes_again, comparing_again) = (astuple(each.asked()) for each in (asked, again))
    for wanted, given in zip(wishes, wishes_again, strict=True):
        assert wanted in (given, "auto")  # which the service decided then
    assert comparing <= comparing_again
    answer = api.post("/fine_tuning/jobs", json=request)
    assert answer.status_code == 200, answer.text
    assert answer.json()["x_raydpo"]["request"] == request
    for each in (job, answer.json()):
        api.post(f"/fine_tuning/jobs/{each['id']}/cancel")


def test_a_valid_job_is_answered_as_it_would_be_and_not_written(api: httpx.Client, file_id: str) -> None:
    written = [api.get(path).json()["first_id"] for path in ("/fine_tuning/jobs", "/x/audit")]
    body = {"model": "tiny", "training_file": file_id, "method": SIMPO, "seed": 3, "x_raydpo": {"num_workers": 2}}
    answer = api.post("/x/jobs/validate", json=body)
    assert answer.status_code == 200, answer.text
    assert [api.get(path).json()["first_id"] for path in ("/fine_tuning/jobs", "/x/audit")] == written
    job = answer.json()
    assert (job["id"], job["status"], job["seed"], job["x_raydpo"]["num_workers"]) == (None, "queued", 3, 2)
    options = job["method"]["simpo"]["hyperparameters"]
    assert options["learning_rate"] == pytest.approx(2e-5)  # of an adapter
    assert (options["n_epochs"], options["batch_size"], options["beta"]) == (1, "auto", 2.5)
    created = api.post("/fine_tuning/jobs", json=body).json()
    assert created["x_raydpo"]["request"] == job["x_raydpo"]["request"]
    api.post(f"/fine_tuning/jobs/{created['id']}/cancel")


def test_files_that_are_not_uploaded_yet_are_named_as_they_are_called(api: httpx.Client) -> None:
    columns = {"columns": {"prompt": "ask"}, "invalid_rows": "drop"}
    body = {"model": "tiny", "training_file": "data/pairs.jsonl", "validation_file": "held.jsonl", "x_raydpo": columns}
    job = api.post("/x/jobs/validate", json=body).json()
    assert (job["training_file"], job["validation_file"]) == ("data/pairs.jsonl", "held.jsonl")
    assert job["x_raydpo"]["columns"] == {"prompt": "ask"}
    assert api.post("/fine_tuning/jobs", json=body).json()["error"]["param"] == "x_raydpo.columns"


@pytest.mark.parametrize(("changes", "param"), [
    ({"model": "unknown"}, "model"),
    ({"training_file": "file-none"}, "training_file"),
    ({"training_file": None}, "training_file"),
    ({"validation_file": "a.jsonl", "x_raydpo": {"validation_share": 0.1}}, "x_raydpo.validation_share"),
    ({"validation_file": "file-none"}, "validation_file"),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"betta": 1}}}}, "method.dpo.hyperparameters.betta"),
    ({"x_raydpo": {"columns": {"answer": "a"}}}, "x_raydpo.columns.answer"),
    ({"training_file": "file-none", "x_raydpo": {"columns": {"prompt": "a"}}}, "x_raydpo.columns"),
    ({"colour": "red"}, "colour"),
])  # fmt: skip
def test_what_a_job_is_refused_for_is_refused_before_its_files_are_sent(
    api: httpx.Client, changes: dict[str, Any], param: str
) -> None:
    answer = api.post("/x/jobs/validate", json={"model": "tiny", "training_file": "pairs.jsonl"} | changes)
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["param"] == param


def test_a_multiplier_that_makes_the_learning_rate_more_than_1_is_refused_at_once(
    api: httpx.Client, file_id: str
) -> None:
    for path, multiplier in (("/fine_tuning/jobs", 2e6), ("/x/jobs/validate", 1e300)):
        options = {"learning_rate_multiplier": multiplier}
        method = {"type": "dpo", "dpo": {"hyperparameters": options}}
        error = api.post(path, json={"model": "tiny", "training_file": file_id, "method": method}).json()["error"]
        assert error["param"] == "method.dpo.hyperparameters.learning_rate_multiplier"
        assert "at most 100000." in error["message"]


def test_methods_are_listed_with_defaults_ranges_and_papers(api: httpx.Client) -> None:
    found = {each["id"]: each for each in api.get("/x/methods").json()["data"]}
    assert found["dpo"]["papers"][0] == "https://arxiv.org/abs/2305.18290"
    assert found["dpo"]["hyperparameters"]["beta"] == {
        "default": 0.1,
        "range": "greater than 0 and at most 2",
        "description": "A higher value keeps the policy closer to its reference.",
    }
    assert found["dpo"]["common_hyperparameters"]["n_epochs"] == {
        "default": 1,
        "range": "from 1 to 50",
        "description": "The number of passes over the training data.",
    }
    assert found["mpo"]["hyperparameters"]["objectives"]["default"][1] == {"type": "bco", "beta": 0.1}
    assert found["dpo"]["common_hyperparameters"]["learning_rate"] == {
        "default": 1e-6,
        "default_of_adapters": 1e-5,
        "range": "greater than 0 and at most 1",
        "description": "The highest learning rate, after the warm-up.",
    }


def test_every_option_of_every_method_is_described(api: httpx.Client) -> None:
    for method in api.get("/x/methods").json()["data"]:
        for option in (method["hyperparameters"] | method["common_hyperparameters"]).values():
            assert option["description"].endswith(".")
            assert "choices" not in option or option["default"] in option["choices"]


def test_every_option_of_the_extension_is_described(api: httpx.Client) -> None:
    options = {each["id"]: each for each in api.get("/x/options").json()["data"]}
    assert {name.partition(".")[0] for name in options} == EXTENSIONS
    assert all(option["description"].endswith(".") for option in options.values())
    assert options["schedule"]["choices"] == ["linear", "cosine", "constant"]
    assert options["adapter.r"]["default"] == 32
