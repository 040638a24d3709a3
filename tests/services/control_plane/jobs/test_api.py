"""Tests which requests /v1/fine_tuning/jobs accepts and how it refuses others. There is no cluster: jobs stay
queued."""

import gzip
import json
from typing import Any

import httpx
import openai
import psycopg
import pytest
from openai.types.fine_tuning import FineTuningJobWandbIntegrationObject
from pydantic import ValidationError

from services.contract import Integrations, JobSpec
from services.control_plane.settings import Settings
from tests.services.control_plane.conftest import API_KEY, pairs


@pytest.fixture(scope="module")
def training_file(client: openai.OpenAI) -> str:
    return client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune").id


def dpo(**hyperparameters: Any) -> Any:
    return {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}


def create(client: openai.OpenAI, file_id: str, **changes: Any) -> Any:
    body = {"model": "tiny", "training_file": file_id, "method": dpo(beta=0.2)} | changes
    return client.fine_tuning.jobs.create(**body)


def test_a_job_is_queued_and_echoes_what_was_asked(client: openai.OpenAI, training_file: str) -> None:
    job = create(
        client, training_file, method=dpo(beta=0.2, n_epochs="auto"), suffix="nice", seed=7, metadata={"team": "a"}
    )
    assert (job.status, job.error, job.fine_tuned_model, job.seed) == ("queued", None, None, 7)
    assert job.method.dpo.hyperparameters.beta == 0.2
    assert job.method.dpo.hyperparameters.n_epochs == "auto"
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
    assert messages[-1] == f"Created fine-tuning job: {job.id}"  # newest first


@pytest.mark.parametrize(
    ("changes", "error", "param", "code"),
    [
        ({"model": "unknown"}, openai.NotFoundError, "model", "model_not_found"),
        ({"training_file": "file-none"}, openai.NotFoundError, "training_file", "file_not_found"),
        ({"method": dpo(beta=-1)}, openai.BadRequestError, "method.dpo.hyperparameters.beta", "invalid_value"),
        ({"method": dpo(beta="much")}, openai.BadRequestError, "method.dpo.hyperparameters.beta", "invalid_value"),
        ({"method": dpo(betta=1)}, openai.BadRequestError, "method.dpo.hyperparameters.betta", "unknown_parameter"),
        ({"method": dpo(n_epochs=51)}, openai.BadRequestError, "method.dpo.hyperparameters.n_epochs", "invalid_value"),
        (
            {"method": {"type": "mpo", "mpo": {"hyperparameters": {"objectives": [{"type": "sft"}], "weights": [1]}}}},
            openai.BadRequestError,
            "method.mpo.hyperparameters.objectives.0.type",
            "unsupported_value",
        ),
        (
            {"method": {"type": "mpo", "mpo": {"hyperparameters": {"objectives": [{"type": "dpo", "beta": 7}]}}}},
            openai.BadRequestError,
            "method.mpo.hyperparameters.objectives.0.beta",
            "invalid_value",
        ),
        ({"method": {"type": "dpo", "kto": {}}}, openai.BadRequestError, "method.kto", "unknown_parameter"),
        ({"method": {"type": "supervised"}}, openai.BadRequestError, "training_file", "invalid_training_file"),
        ({"validation_file": "file-none"}, openai.NotFoundError, "validation_file", "file_not_found"),
        ({"suffix": "a b"}, openai.BadRequestError, "suffix", "invalid_value"),
        ({"seed": -1}, openai.BadRequestError, "seed", "invalid_value"),
        ({"extra_body": {"betta": 1}}, openai.BadRequestError, "betta", "unknown_parameter"),
        ({"extra_body": {"x_raydpo": {"lora": 8}}}, openai.BadRequestError, "x_raydpo.lora", "unknown_parameter"),
        (
            {"extra_body": {"x_raydpo": {"reference": {"source": "teacher"}}}},
            openai.BadRequestError,
            "x_raydpo.reference.source",
            "invalid_value",
        ),
        (
            {"extra_body": {"x_raydpo": {"reference": {"by": "serve"}}}},
            openai.BadRequestError,
            "x_raydpo.reference.by",
            "unknown_parameter",
        ),
        (
            {"extra_body": {"x_raydpo": {"truncation": "middle"}}},
            openai.BadRequestError,
            "x_raydpo.truncation",
            "invalid_value",
        ),
        (
            {"extra_body": {"x_raydpo": {"sharding": "half"}}},
            openai.BadRequestError,
            "x_raydpo.sharding",
            "invalid_value",
        ),
        (
            {"extra_body": {"x_raydpo": {"max_tokens_per_pack": 100}}},
            openai.BadRequestError,
            "x_raydpo.max_tokens_per_pack",
            "invalid_value",
        ),
        (
            {"extra_body": {"x_raydpo": {"num_workers": 0}}},
            openai.BadRequestError,
            "x_raydpo.num_workers",
            "invalid_value",
        ),
        (
            {"validation_file": "file-x", "extra_body": {"x_raydpo": {"validation_share": 0.1}}},
            openai.BadRequestError,
            "x_raydpo.validation_share",
            "invalid_value",
        ),
        (
            {"extra_body": {"x_raydpo": {"invalid_rows": "drop"}}},  # an upload has none
            openai.BadRequestError,
            "x_raydpo.invalid_rows",
            "invalid_value",
        ),
        (
            {"extra_body": {"x_raydpo": {"columns": {"prompt": "question"}}}},
            openai.BadRequestError,
            "x_raydpo.columns",
            "invalid_value",
        ),
        (
            {
                "extra_body": {"x_raydpo": {"columns": {"answer": "x"}, "dataset": "file:///x"}},
                "training_file": "file:///x",
            },
            openai.BadRequestError,
            "x_raydpo.columns.answer",
            "unknown_parameter",
        ),
        (
            {
                "extra_body": {"x_raydpo": {"invalid_rows": "ignore", "dataset": "file:///x"}},
                "training_file": "file:///x",
            },
            openai.BadRequestError,
            "x_raydpo.invalid_rows",
            "invalid_value",
        ),
        (
            {"extra_body": {"x_raydpo": {"max_invalid_share": 0.9}}},
            openai.BadRequestError,
            "x_raydpo.max_invalid_share",
            "invalid_value",
        ),
        (
            {"method": dpo(learning_rate=1e-5, learning_rate_multiplier=2)},
            openai.BadRequestError,
            "method.dpo.hyperparameters.learning_rate_multiplier",
            "invalid_value",
        ),
    ],
)
def test_bad_requests_are_refused_by_name(
    client: openai.OpenAI,
    training_file: str,
    changes: dict[str, Any],
    error: type[openai.APIStatusError],
    param: str,
    code: str,
) -> None:
    with pytest.raises(error) as refused:
        create(client, training_file, **changes)
    assert (refused.value.param, refused.value.code, refused.value.type) == (param, code, "invalid_request_error")


WANDB = {"project": "my project", "name": "first", "entity": "team_1", "tags": ["a", "b"]}


def wandb(**changes: Any) -> list[dict[str, Any]]:
    return [{"type": "wandb", "wandb": {"project": "p"} | changes}]


def followed(**extension: Any) -> dict[str, Any]:
    return {"extra_body": {"x_raydpo": extension}}


def test_where_a_job_is_followed_is_echoed_as_asked(client: openai.OpenAI, training_file: str) -> None:
    asked = [{"type": "wandb", "wandb": WANDB}, *wandb(name=None)]
    mlflow = {"experiment": "préférences / dpo", "run_name": "first"}
    job = create(client, training_file, integrations=asked, **followed(tensorboard=True, mlflow=mlflow))
    for found in (job, client.fine_tuning.jobs.cancel(job.id)):
        for integration in found.integrations:
            FineTuningJobWandbIntegrationObject.model_validate(integration.to_dict(), strict=True)
        assert [each.to_dict() for each in found.integrations] == [{"type": "wandb", "wandb": WANDB}, *wandb()]
        assert found.to_dict()["x_raydpo"] | {"tensorboard": True, "mlflow": mlflow} == found.to_dict()["x_raydpo"]
    job = create(client, training_file, integrations=None)
    assert client.fine_tuning.jobs.cancel(job.id).integrations == []


def test_a_job_of_an_older_release_is_followed_nowhere(
    client: openai.OpenAI, training_file: str, settings: Settings
) -> None:
    job = create(client, training_file, integrations=wandb(), **followed(tensorboard=True))
    with psycopg.connect(settings.database_url) as connection:
        connection.execute("UPDATE jobs SET spec = spec - 'integrations' WHERE id = %s", [job.id])
        (spec,) = connection.execute("SELECT spec FROM jobs WHERE id = %s", [job.id]).fetchone() or ()
    assert JobSpec.model_validate(spec).integrations == Integrations()
    found = client.fine_tuning.jobs.cancel(job.id)
    assert (found.integrations, found.to_dict()["x_raydpo"]["tensorboard"]) == ([], False)


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"integrations": wandb() * 6}, "integrations", "invalid_value"),
        ({"integrations": [{"type": "neptune"}]}, "integrations.0.type", "invalid_value"),
        ({"integrations": [{"type": "wandb"}]}, "integrations.0.wandb", "missing_required_parameter"),
        (
            {"integrations": [{"type": "wandb", "wandb": {}}]},
            "integrations.0.wandb.project",
            "missing_required_parameter",
        ),
        ({"integrations": [*wandb(), *wandb(project="a/b")]}, "integrations.1.wandb.project", "invalid_value"),
        ({"integrations": wandb(project="p" * 129)}, "integrations.0.wandb.project", "invalid_value"),
        ({"integrations": wandb(entity="../team")}, "integrations.0.wandb.entity", "invalid_value"),
        ({"integrations": wandb(name="a\x00b")}, "integrations.0.wandb.name", "invalid_value"),
        ({"integrations": wandb(tags=["a", "b" * 65])}, "integrations.0.wandb.tags.1", "invalid_value"),
        ({"integrations": wandb(tags=["a"] * 65)}, "integrations.0.wandb.tags", "invalid_value"),
        ({"integrations": wandb(tags="ab")}, "integrations.0.wandb.tags", "invalid_value"),
        ({"integrations": wandb(base_url="http://10.0.0.1")}, "integrations.0.wandb.base_url", "unknown_parameter"),
        (followed(tensorboard={}), "x_raydpo.tensorboard", "invalid_value"),
        (followed(mlflow={}), "x_raydpo.mlflow.experiment", "missing_required_parameter"),
        (followed(mlflow={"experiment": ""}), "x_raydpo.mlflow.experiment", "invalid_value"),
        (
            followed(mlflow={"experiment": "e", "tracking_uri": "http://10.0.0.1"}),
            "x_raydpo.mlflow.tracking_uri",
            "unknown_parameter",
        ),
    ],
)
def test_where_a_job_may_not_be_followed_is_refused_by_name(
    client: openai.OpenAI, training_file: str, changes: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, training_file, **changes)
    assert (refused.value.param, refused.value.code) == (param, code)


def test_other_objectives_are_taken_with_their_own_options_and_echoed(
    client: openai.OpenAI, training_file: str
) -> None:
    method = {"type": "simpo", "simpo": {"hyperparameters": {"gamma_beta_ratio": 0.3}}}
    job = create(client, training_file, method=method)
    echoed = job.method.to_dict()
    assert echoed["type"] == "simpo"
    assert (
        echoed["simpo"]["hyperparameters"] | {"beta": 2.5, "gamma_beta_ratio": 0.3}
        == echoed["simpo"]["hyperparameters"]
    )
    client.fine_tuning.jobs.cancel(job.id)


def test_a_sum_of_objectives_is_echoed_with_its_parts(client: openai.OpenAI, training_file: str) -> None:
    given = {"objectives": [{"type": "dpo", "beta": 0.2}, {"type": "kto"}], "weights": [1.0, 0.5]}
    job = create(client, training_file, method={"type": "mpo", "mpo": {"hyperparameters": given}})
    told = job.method.to_dict()["mpo"]["hyperparameters"]
    assert [(part["type"], part["beta"]) for part in told["objectives"]] == [("dpo", 0.2), ("kto", 0.1)]
    assert told["weights"] == [1.0, 0.5]
    client.fine_tuning.jobs.cancel(job.id)


def upload(client: openai.OpenAI, row: dict[str, Any]) -> str:
    packed = gzip.compress(b"\n".join([json.dumps(row).encode()] * 10))
    return client.files.create(file=("rows.jsonl.gz", packed), purpose="fine-tune").id


def test_a_validation_file_is_echoed_and_must_not_be_the_training_file(
    client: openai.OpenAI, training_file: str
) -> None:
    held_out = client.files.create(file=("held_out.jsonl", pairs(1)), purpose="fine-tune").id
    job = create(client, training_file, validation_file=held_out)
    assert client.fine_tuning.jobs.cancel(job.id).validation_file == held_out
    with pytest.raises(openai.BadRequestError, match=f"and training_file are both {training_file}") as refused:
        create(client, training_file, validation_file=training_file)
    assert (refused.value.param, refused.value.code) == ("validation_file", "invalid_validation_file")


def test_a_share_to_hold_out_is_echoed_and_refused_beyond_its_limits(client: openai.OpenAI, training_file: str) -> None:
    job = create(client, training_file, extra_body={"x_raydpo": {"validation_share": 0.5}})
    assert client.fine_tuning.jobs.cancel(job.id).to_dict()["x_raydpo"]["validation_share"] == 0.5
    for share, limit in ((0, "greater than 0"), (0.51, "less than or equal to 0.5")):
        with pytest.raises(openai.BadRequestError, match=f"{limit}, but it is {share}") as refused:
            create(client, training_file, extra_body={"x_raydpo": {"validation_share": share}})
        assert (refused.value.param, refused.value.code) == ("x_raydpo.validation_share", "invalid_value")


CHOICE = ("keep_checkpoints", "best_metric", "early_stop", "policy")


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ({}, {"keep_checkpoints": 2, "best_metric": None, "early_stop": None, "policy": "last"}),
        (
            {"validation_share": 0.25},
            {"keep_checkpoints": 2, "best_metric": "eval/loss", "early_stop": None, "policy": "last"},
        ),
        (
            {
                "validation_share": 0.25,
                "keep_checkpoints": "all",
                "best_metric": "eval/rewards/margins",
                "early_stop": {"patience": 3},
                "policy": "best",
            },
            {
                "keep_checkpoints": "all",
                "best_metric": "eval/rewards/margins",
                "early_stop": {"patience": 3, "min_gain": 0.0},
                "policy": "best",
            },
        ),
        (
            {"keep_checkpoints": 1, "early_stop": None, "policy": "last", "best_metric": "auto"},
            {"keep_checkpoints": 1, "best_metric": None, "early_stop": None, "policy": "last"},
        ),
    ],
    ids=["nothing", "validation", "all", "what is nothing"],
)
def test_which_checkpoints_are_worth_keeping_is_shown_as_it_was_decided(
    client: openai.OpenAI, training_file: str, asked: dict[str, Any], shown: dict[str, Any]
) -> None:
    job = create(client, training_file, extra_body={"x_raydpo": asked})
    found = client.fine_tuning.jobs.cancel(job.id).to_dict()["x_raydpo"]
    assert {name: found[name] for name in CHOICE} == shown


@pytest.mark.parametrize(
    ("asked", "param", "why"),
    [
        ({"keep_checkpoints": 0}, "keep_checkpoints", "greater than or equal to 1"),
        ({"keep_checkpoints": "some"}, "keep_checkpoints", "'some'"),
        ({"keep_checkpoints": True}, "keep_checkpoints", "True"),
        ({"policy": "newest"}, "policy", "'last' or 'best'"),
        ({"validation_share": 0.1, "best_metric": "loss"}, "best_metric", "'eval/loss', 'eval/mean_token_accuracy'"),
        (
            {"validation_share": 0.1, "best_metric": "eval/mean_token_accuracy"},
            "best_metric",
            "one of eval/loss, eval/rewards/accuracies, eval/rewards/margins",
        ),
        ({"validation_share": 0.1, "early_stop": {"patience": 0}}, "early_stop.patience", "0; it must be at least 1"),
        ({"validation_share": 0.1, "early_stop": {}}, "early_stop.patience", "Missing required parameter"),
        (
            {"validation_share": 0.1, "early_stop": {"patience": 1, "min_gain": -1}},
            "early_stop.min_gain",
            "-1.0; it must be 0 or more and finite",
        ),
        (
            {"validation_share": 0.1, "early_stop": {"patience": 1, "patiense": 1}},
            "early_stop.patiense",
            "Unknown parameter",
        ),
        ({"best_metric": "eval/loss"}, "best_metric", "send a validation_file or"),
        ({"early_stop": {"patience": 1}}, "early_stop", "send a validation_file or"),
        ({"policy": "best"}, "policy", "send a validation_file or"),
    ],
)
def test_a_choice_of_checkpoints_that_cannot_be_made_is_refused_with_the_remedy(
    client: openai.OpenAI, training_file: str, asked: dict[str, Any], param: str, why: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, training_file, extra_body={"x_raydpo": asked})
    assert refused.value.param == f"x_raydpo.{param}"
    assert why in refused.value.message


def create_at(client: openai.OpenAI, uri: Any, **changes: Any) -> Any:
    return create(client, uri, extra_body={"x_raydpo": {"dataset": uri}}, **changes)


@pytest.mark.parametrize(
    "uri",
    [
        "https://example.com/rows.jsonl?token=x",
        "hf://datasets/org/name@v1/data/*.parquet",
        "s3://bucket/rows/a.jsonl",
        "s3://bucket/rows/",
    ],
)
def test_a_job_trains_on_a_uri_and_echoes_it(client: openai.OpenAI, uri: str) -> None:
    job = create_at(client, uri)
    assert (job.status, job.training_file) == ("queued", uri)
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
    assert messages[1] == f"Files are validated when the job runs, moving job to queued state: {uri}"
    client.fine_tuning.jobs.cancel(job.id)


def test_over_plain_http_training_file_may_be_left_out_but_not_both(base_url: str) -> None:
    body = {"model": "tiny", "method": dpo(), "x_raydpo": {"dataset": "https://example.com/rows.jsonl"}}
    with httpx.Client(base_url=f"{base_url}/v1", headers={"Authorization": f"Bearer {API_KEY}"}) as http:
        job = http.post("/fine_tuning/jobs", json=body).json()
        assert job["training_file"] == "https://example.com/rows.jsonl"
        assert http.post(f"/fine_tuning/jobs/{job['id']}/cancel").is_success
        refused = http.post("/fine_tuning/jobs", json={"model": "tiny", "method": dpo()})
    assert refused.json()["error"]["code"] == "missing_required_parameter"
    assert refused.json()["error"]["param"] == "training_file"


@pytest.mark.parametrize(
    ("training_file", "dataset", "param"),
    [
        ("file-x", "https://example.com/rows.jsonl", "training_file"),
        ("https://example.com/a.jsonl", "https://example.com/b.jsonl", "training_file"),
        ("https://example.com/a.jsonl", None, "training_file"),
        ("file-x", "file-x", "x_raydpo.dataset"),
        ("file-x", "", "x_raydpo.dataset"),
        ("file-x", 7, "x_raydpo.dataset"),
    ],
)
def test_a_file_and_a_uri_exclude_each_other(
    client: openai.OpenAI, training_file: str, dataset: Any, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, training_file, extra_body={"x_raydpo": {"dataset": dataset}})
    assert refused.value.param == param


@pytest.mark.parametrize("prefix", ["ftp://", "rows/", "https://user:secret@example.com/", "s3://bucket/../other/"])
def test_a_prefix_that_admits_nothing_is_refused_at_the_start(settings: Settings, prefix: str) -> None:
    with pytest.raises(ValidationError, match="dataset_uris"):
        Settings.model_validate(settings.model_dump() | {"dataset_uris": [prefix]})


def test_a_queued_job_is_cancelled_at_once_and_only_once(client: openai.OpenAI, training_file: str) -> None:
    job = create(client, training_file)
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match=r"has ended \(cancelled\)"):
        client.fine_tuning.jobs.cancel(job.id)


def test_jobs_page_and_filter_by_metadata(client: openai.OpenAI, training_file: str) -> None:
    made = [create(client, training_file, metadata={"of": "paging"}).id for _ in range(5)]
    found = [job.id for job in client.fine_tuning.jobs.list(limit=2, metadata={"of": "paging"})]
    assert found == made[::-1]


def test_every_error_has_the_envelope(base_url: str) -> None:
    with httpx.Client(base_url=base_url, headers={"Authorization": f"Bearer {API_KEY}"}) as http:
        answers = [
            http.get("/v1/nothing"),
            http.put("/v1/files"),
            http.post("/v1/fine_tuning/jobs", content=b"{"),
            http.post("/v1/fine_tuning/jobs", json={}),
            http.get("/v1/files", params={"limit": 0}),
            http.post("/v1/fine_tuning/jobs/ftjob-none/cancel"),
            http.get("/v1/files/a%00b"),
            http.get("/v1/fine_tuning/jobs", params={"after": "\0"}),
        ]
    assert [answer.status_code for answer in answers] == [404, 405, 400, 400, 400, 404, 400, 400]
    for answer in answers:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.headers["x-request-id"].startswith("req_")
    assert answers[3].json()["error"]["code"] == "missing_required_parameter"


def test_what_is_not_offered_is_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.alpha.graders.validate(grader={"type": "multi"})  # type: ignore[typeddict-item]
    assert (refused.value.param, refused.value.code) == ("fine_tuning/alpha", "unsupported_value")
    with pytest.raises(openai.BadRequestError, match="the service does not store chat completions"):
        client.chat.completions.list()


def test_a_parameter_that_a_route_does_not_read_is_refused_by_name(client: openai.OpenAI) -> None:
    for path in ("/files", "/models/tiny", "/fine_tuning/jobs", "/webhook_endpoints"):
        with pytest.raises(openai.BadRequestError) as refused:
            client.get(f"{path}?limt=1", cast_to=object)
        assert (refused.value.param, refused.value.code) == ("limt", "unknown_parameter")


def test_a_wrong_key_and_no_key_are_refused(base_url: str) -> None:
    wrong = openai.OpenAI(base_url=f"{base_url}/v1", api_key="rd-wrong", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError) as refused:
        wrong.models.list()
    assert refused.value.code == "invalid_api_key"
    assert httpx.get(f"{base_url}/v1/models").status_code == 401
    assert httpx.get(f"{base_url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{base_url}/readyz").json() == {"status": "ready"}


def test_a_list_of_jobs_may_have_one_status(client: openai.OpenAI, api: httpx.Client, training_file: str) -> None:
    queued, cancelled = (create(client, training_file).id for _ in range(2))
    client.fine_tuning.jobs.cancel(cancelled)
    newest = api.get("/fine_tuning/jobs", params={"status": "cancelled", "limit": 1}).json()
    assert [job["id"] for job in newest["data"]] == [cancelled]
    assert queued in [job["id"] for job in api.get("/fine_tuning/jobs?status=queued&limit=100").json()["data"]]
    answer = api.get("/fine_tuning/jobs?status=done")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "status")
