"""Tests the body of a new job: the spec that it becomes, and which field is named if it is wrong."""

from typing import Any

import pytest

from dpo_core.config import Lora
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.jobs.requests import CreateJob, ValidateJob, is_local

BODY = {"model": "tiny", "training_file": "file-1"}
DATASET = "hf://datasets/a/b/train.parquet"


def extended(**fields: Any) -> dict[str, Any]:
    return {**BODY, "x_raydpo": fields}


def method(kind: str, **hyperparameters: Any) -> dict[str, Any]:
    return {**BODY, "method": {"type": kind, kind: {"hyperparameters": hyperparameters}}}


def test_fields_become_the_spec_and_auto_means_the_default() -> None:
    body = CreateJob(
        **method("dpo", beta=0.3, n_epochs="auto", batch_size=8),
        seed=7,
        x_raydpo={"max_length": 256, "num_workers": 2, "keep_checkpoints": "all", "weight_decay": 0.5},
    )
    spec, default = body.spec(), CreateJob(**method("dpo"), seed=7).spec()
    assert (spec.config.objective.type, spec.config.objective.beta) == ("dpo", 0.3)  # type: ignore[union-attr]
    assert (spec.config.batch_size, spec.config.n_epochs) == (8, default.config.n_epochs)
    assert (spec.config.max_length, spec.config.optim.weight_decay, spec.config.seed) == (256, 0.5, 7)
    assert (spec.num_workers, spec.keep_checkpoints) == (2, "all")
    assert (default.num_workers, default.keep_checkpoints, default.validation_share) == (1, 2, 0.0)


def test_a_job_without_a_method_is_supervised_and_takes_the_older_place_of_hyperparameters() -> None:
    spec = CreateJob(**BODY, hyperparameters={"n_epochs": 5}).spec()
    assert (spec.config.objective.type, spec.config.n_epochs) == ("supervised", 5)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({**BODY, "validation_file": "file-1"}, "validation_file"),
        ({**BODY, "method": {"type": "dop"}}, "method.type"),
        ({**method("dpo"), "hyperparameters": {}} | {"hyperparameters": {"n_epochs": 1}}, "hyperparameters"),
        (method("dpo", betta=1), "method.dpo.hyperparameters.betta"),
        (method("dpo", beta=-1), "method.dpo.hyperparameters.beta"),
        (extended(max_lenght=1), "x_raydpo.max_lenght"),
        (extended(max_length=-1), "x_raydpo.max_length"),
        (extended(num_workers=0), "x_raydpo.num_workers"),
        (extended(priority=11), "x_raydpo.priority"),
        (extended(validation_share=0.6), "x_raydpo.validation_share"),
        (extended(keep_checkpoints=0), "x_raydpo.keep_checkpoints"),
        (extended(policy="first"), "x_raydpo.policy"),
        (extended(reference={"modle": "m"}), "x_raydpo.reference.modle"),
        (extended(columns={"prompt": "q"}), "x_raydpo.columns"),
        (extended(dataset="rows.jsonl"), "x_raydpo.dataset"),
        (extended(dataset=DATASET), "training_file"),
        ({"model": "tiny"}, "training_file"),
        ({"model": "tiny", "training_file": DATASET}, "training_file"),
    ],
)
def test_a_wrong_field_is_refused_by_its_path(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        CreateJob(**body).spec()
    assert raised.value.param == param


def test_a_dataset_may_be_named_once_or_twice_and_its_rows_read_by_options() -> None:
    extension = {"dataset": DATASET, "columns": {"prompt": "q"}}
    for training_file in (None, DATASET):
        spec = CreateJob(model="tiny", training_file=training_file, x_raydpo=extension).spec()
        assert (spec.training_file, spec.is_at_uri, spec.columns) == (DATASET, True, {"prompt": "q"})


@pytest.mark.parametrize(
    ("given", "adapter"),
    [
        ({}, "auto"),
        ({"adapter": "none"}, "none"),
        ({"adapter": {"type": "lora", "r": 4}}, Lora(r=4)),
        ({"adapter": {"r": 8, "use_dora": True}}, Lora(r=8, use_dora=True)),
    ],
)
def test_choices_that_are_left_to_the_service_are_told_apart(given: dict[str, Any], adapter: Any) -> None:
    asked = CreateJob(**extended(**given)).asked()
    assert (asked.adapter, asked.precision, asked.quantization) == (adapter, "auto", None)


def test_fields_that_compare_checkpoints_count_only_if_they_choose_something() -> None:
    given = {"best_metric": "eval/loss", "early_stop": None, "policy": "last"}
    assert CreateJob(**extended(**given)).asked().comparing == {"best_metric"}
    assert CreateJob(**extended(policy="best", best_metric="auto")).asked().comparing == {"policy"}


@pytest.mark.parametrize(
    ("adapter", "param"),
    [("some", "x_raydpo.adapter"), ({"type": "ia3"}, "x_raydpo.adapter.type"), ({"rank": 4}, "x_raydpo.adapter.rank")],
)
def test_a_wrong_adapter_is_refused_by_its_path(adapter: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        CreateJob(**extended(adapter=adapter)).asked()
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("file", "local"), [("rows.jsonl", True), ("/data/rows", True), ("file-1", False), ("s3://b/r", False), ("", True)]
)
def test_a_local_file_is_neither_an_id_nor_a_uri(file: str, local: bool) -> None:
    assert is_local(file) is local


def test_a_body_that_is_only_checked_may_say_how_a_local_file_is_read() -> None:
    body = {"model": "tiny", "training_file": "rows.jsonl", "x_raydpo": {"columns": {"prompt": "q"}}}
    assert ValidateJob(**body).spec().columns == {"prompt": "q"}
    with pytest.raises(InvalidRequest, match=r"only with x_raydpo\.dataset"):
        ValidateJob(**body | {"training_file": "file-1"}).spec()
