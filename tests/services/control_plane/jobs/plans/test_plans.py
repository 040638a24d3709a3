"""Tests /v1/x/plans and the memory checks of new jobs. A stand-in for Ray reports machines of any size."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from dpo_core.config import Lora
from dpo_core.plan.inputs import Shapes
from dpo_core.plan.sizes import llama
from services.contract import JobSpec, SideJobResult
from services.control_plane.jobs.plans import plans
from services.control_plane.models.models import STARTED_AT, NamedModel
from services.control_plane.ray_api import Node
from services.control_plane.settings import BaseModel, Settings
from tests.services.control_plane.conftest import FakeRay, pairs
from tests.services.headers import LARGE, SMALL, write_model

GB = 10**9
START = NamedModel("large", "/nowhere", "large", STARTED_AT)


@pytest.fixture(scope="module")
def settings(offline: Settings, fake_ray: FakeRay, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    home = tmp_path_factory.mktemp("models")
    models = {
        "small": str(write_model(home / "small", SMALL)),
        "large": write_model(home / "large", LARGE).as_uri(),
        "towered": str(write_model(home / "towered", LARGE, text_config={"hidden_size": 64})),
        "recurrent": str(write_model(home / "recurrent", SMALL, num_attention_heads=None)),
        "quantized": str(write_model(home / "quantized", SMALL, quantization_config={"quant_method": "gptq"})),
        "short": str(write_model(home / "short", SMALL, max_position_embeddings=512)),
        "mixture": str(write_model(home / "mixture", SMALL, experts=64)),
        "away": "organization/away",
    }
    named = {name: BaseModel(source=source) for name, source in models.items()}
    ray_url = f"http://127.0.0.1:{fake_ray.server.server_port}"
    return offline.model_copy(update={"models": named, "ray_url": ray_url})


@pytest.fixture
def machines(fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Returns a function that sets the machines of the cluster, each by its memory in bytes."""
    monkeypatch.setattr("services.control_plane.ray_api.NODES_SECONDS", -1)

    def have(*sizes: int) -> None:
        fake_ray.machines = [{"mem": [size, size, 0.0, 0], "gpus": []} for size in sizes]

    yield have
    fake_ray.machines, fake_ray.down = [], False


@pytest.fixture(scope="module")
def training_file(client: openai.OpenAI) -> str:
    return client.files.create(file=("pairs.jsonl", pairs(20)), purpose="fine-tune").id


@pytest.fixture
def ask(api: httpx.Client, training_file: str) -> Callable[..., Any]:
    def ask(model: str, path: str = "/x/plans", **extension: Any) -> Any:
        extension = {"adapter": "none"} | extension
        body = {"model": model, "training_file": training_file, "method": {"type": "dpo"}, "x_raydpo": extension}
        return api.post(path, json=body).json()

    return ask


def test_a_plan_tells_what_a_worker_would_hold_and_that_it_fits(ask, machines):
    machines(GB, 8 * GB)
    found = ask("small", max_length=512)
    numbers = llama(SMALL).numbers
    parts = found["parts"]
    assert (parts["weights"], parts["gradients"], parts["moments"]) == (4 * numbers, 4 * numbers, 8 * numbers)
    assert (found["object"], found["fits"], found["worker_bytes"], found["device"]) == ("plan", True, 8 * GB, "cpu")
    assert found["rows"]["groups"] == 20
    assert (found["steps"], found["checkpoint_bytes"]) == (3, 12 * numbers)  # of eight pairs each
    assert found["needed_bytes"] > sum(parts[name] for name in ("weights", "gradients", "moments"))
    assert "estimated from" in found["notes"][0]


@pytest.mark.parametrize("path", ["/x/plans", "/x/jobs/validate", "/fine_tuning/jobs"])
def test_a_max_length_beyond_the_models_positions_is_refused(path, ask, machines):
    machines(GB, 8 * GB)
    refused = ask("short", path, max_length=513)["error"]
    assert (refused["param"], refused["code"]) == ("x_raydpo.max_length", "invalid_value")
    assert refused["message"] == (
        "max_length is 513, but the model has only 512 positions; set max_length to 512 or less, or leave it out."
    )


@pytest.mark.parametrize("path", ["/x/plans", "/x/jobs/validate", "/fine_tuning/jobs"])
def test_a_base_whose_experts_cannot_be_quantized_is_refused(path, ask, machines):
    machines(GB, 8 * GB)
    refused = ask("mixture", path, adapter={"r": 4}, quantization="nf4")["error"]
    assert (refused["param"], refused["code"]) == ("x_raydpo.quantization", "invalid_value")
    assert "which leaves stacked experts as they are: it would compress only" in refused["message"]
    assert refused["message"].endswith("; leave 'quantization' out.")


def test_a_base_whose_weights_the_service_cannot_read_may_be_quantized(ask, machines):
    machines(GB, 8 * GB)
    for name in ("small", "away"):
        found = ask(name, "/x/jobs/validate", adapter={"r": 4}, quantization="nf4")
        assert found["x_raydpo"]["request"]["x_raydpo"]["quantization"] == "nf4"


def test_a_chosen_max_length_is_refused_even_if_it_equals_the_default(ask, machines):
    machines(GB, 8 * GB)
    refused = ask("short", "/x/jobs/validate", max_length=2048)["error"]
    assert (refused["param"], refused["code"]) == ("x_raydpo.max_length", "invalid_value")
    assert ask("short", "/x/jobs/validate", max_length="auto")["x_raydpo"]["request"]["x_raydpo"]["max_length"] == 512


def test_the_default_max_length_is_no_more_than_the_models_positions(ask, machines):
    machines(GB, 8 * GB)
    lengths = {
        name: ask(name, "/x/jobs/validate")["x_raydpo"]["request"]["x_raydpo"]["max_length"]
        for name in ("short", "small", "away")
    }
    assert lengths == {"short": 512, "small": 2048, "away": 2048}


def test_max_length_is_within_the_positions_of_the_reference_too(ask, machines):
    machines(GB, 8 * GB)
    reference = {"model": "short"}
    refused = ask("small", "/fine_tuning/jobs", reference=reference, max_length=513)["error"]
    assert (refused["param"], refused["code"]) == ("x_raydpo.max_length", "invalid_value")
    assert refused["message"] == (
        "max_length is 513, but the reference model has only 512 positions; "
        "set max_length to 512 or less, or leave it out."
    )
    for start in ("small", "away"):
        asked = ask(start, "/x/jobs/validate", reference=reference)["x_raydpo"]["request"]["x_raydpo"]
        assert asked["max_length"] == 512


def test_an_adapter_trains_few_weights_of_a_base_that_stays(ask, machines):
    machines(GB)
    parts = ask("small", adapter={"r": 4}, precision="bfloat16")["parts"]
    own = 4 * 2 * (4 * (64 + 64) + 3 * (64 + 128))
    assert parts["gradients"] == parts["masters"] == 4 * own
    assert parts["weights"] == 2 * (llama(SMALL).numbers + own)
    chosen = ask("small", adapter={"r": 4, "target_modules": ["q_proj"]})["parts"]
    assert chosen["gradients"] == 4 * 4 * 2 * (64 + 64)


def test_what_does_not_fit_is_told_with_what_makes_it_fit(ask, machines):
    machines(60 * GB)
    found = ask("large", num_workers=2)
    assert found["fits"] is False
    assert found["worker_bytes"] == 30 * GB  # two workers of one machine
    assert [(change["field"], change["value"]) for change in found["changes"]] == [("x_raydpo.sharding", "full")]
    assert found["changes"][0]["message"] in found["notes"][-1]


def test_a_job_that_cannot_fit_is_refused_with_the_figures_and_the_remedy(ask, machines):
    machines(18 * GB, 4 * GB)
    error = ask("large", "/fine_tuning/jobs", num_workers=8)["error"]
    assert (error["code"], error["param"]) == ("does_not_fit", "x_raydpo.adapter")
    parts = "(weights 4.94 GB, gradients 4.94 GB, moments 9.89 GB)"
    assert error["message"].startswith(
        f"The job cannot fit: each worker needs at least 19.8 GB of memory {parts}, but the largest "
    )
    assert (
        'machine of the cluster has 18 GB. Set adapter to {"r": 32}; each worker then needs at most '
        in error["message"]
    )
    assert ask("large", "/x/jobs/validate", num_workers=8)["error"] == error
    machines(2 * GB)
    hopeless = ask("large", "/fine_tuning/jobs", num_workers=8)["error"]
    assert hopeless["param"] == "model"
    assert hopeless["message"].endswith(
        "No setting makes the job fit; choose a smaller model, or ask the operator for workers with more memory."
    )


@pytest.mark.parametrize(
    ("model", "size"),
    [("large", 21 * GB), ("towered", GB), ("away", 1), ("recurrent", 1), ("small", None)],
    ids=["what may fit", "of which a part is loaded", "not here", "not known", "no machine is known"],
)
def test_only_what_is_certain_is_refused(ask, machines, model, size):
    machines(*([size] if size else []))
    assert ask(model, "/fine_tuning/jobs")["object"] == "fine_tuning.job"


def test_nothing_is_refused_where_the_cluster_may_grow(settings):
    nodes = [Node(GB, (8 * GB, 80 * GB)), Node(2 * GB, ())]
    on_gpus = settings.model_copy(update={"num_gpus_per_worker": 1})
    assert plans.most_of(nodes, settings) == 2 * GB
    assert plans.most_of(nodes, on_gpus) == 80 * GB
    assert plans.room_of(nodes, on_gpus, 4) == 8 * GB
    assert plans.most_of(nodes, settings.model_copy(update={"max_cluster": {"GPU": 8}})) is None


def test_workers_for_which_there_are_no_gpus_do_not_fit_and_are_not_advised(settings):
    on_gpus = settings.model_copy(update={"num_gpus_per_worker": 1})
    spec = JobSpec.model_validate({"model": "large", "training_file": "file-1", "config": {}, "num_workers": 2})
    shapes = Shapes(LARGE, llama(LARGE).weights)

    def plan(num_gpus: int, size: int, settings: Settings, num_workers: int = 2) -> dict[str, Any]:
        nodes = [Node(64 * GB, (size,) * num_gpus)]
        asked = spec.model_copy(update={"num_workers": num_workers})
        return plans.plan_object(asked, START, shapes, None, None, nodes, settings)

    assert plan(2, 80 * GB, on_gpus)["fits"] is True
    alone = plan(1, 80 * GB, on_gpus)
    assert (alone["fits"], alone["changes"]) == (False, [])
    assert alone["notes"][-1] == (
        "The job asks for 2 workers, but the cluster has GPUs for 1, so the job would wait; set num_workers to 1 or "
        "less, or ask the operator for more GPUs."
    )
    growing = on_gpus.model_copy(update={"max_cluster": {"GPU": 8}})
    assert plan(1, 80 * GB, growing)["fits"] is True
    assert "num_workers" not in str(plan(1, 5 * GB, on_gpus, num_workers=1)["changes"])


def test_a_job_that_merges_its_adapter_is_advised_to_train_it_and_not_a_new_one(settings):
    on_gpus = settings.model_copy(update={"num_gpus_per_worker": 1})
    spec = JobSpec.model_validate({"model": "ft:large", "training_file": "file-1", "config": {}})
    start = replace(START, base_source="/nowhere", adapter=Lora(r=8))
    nodes = [Node(64 * GB, (12 * GB,))]
    for model, value in ((START, {"r": 32}), (start, "auto")):
        found = plans.plan_object(spec, model, Shapes(LARGE, llama(LARGE).weights), None, None, nodes, on_gpus)
        assert ("x_raydpo.adapter", value) in [(each["field"], each["value"]) for each in found["changes"]]


@pytest.mark.parametrize(("source", "is_advised"), [("auto", True), ("trainer", True), ("serve", False)])
def test_nf4_is_not_advised_where_vllm_is_to_score_the_reference(settings, source, is_advised):
    on_gpus = settings.model_copy(update={"num_gpus_per_worker": 1})
    asked = {"weights": {"adapter": {}, "precision": "bfloat16"}, "reference_source": source}
    spec = JobSpec.model_validate({"model": "large", "training_file": "file-1", "config": {}, **asked})
    shapes, nodes = Shapes(LARGE, llama(LARGE).weights), [Node(64 * GB, (int(3.6 * GB),))]
    found = plans.plan_object(spec, START, shapes, None, None, nodes, on_gpus)
    assert found["fits"] is False
    assert ("x_raydpo.quantization" in [each["field"] for each in found["changes"]]) == is_advised


@pytest.mark.parametrize(
    ("gpus", "needed", "has"), [(0, 1, "no GPU"), (1, 2, "1 of the 2 GPUs that each worker needs")]
)
def test_a_cluster_without_gpus_for_one_worker_is_no_advice_to_ask_for_fewer_workers(settings, gpus, needed, has):
    on_gpus = settings.model_copy(update={"num_gpus_per_worker": needed})
    spec = JobSpec.model_validate({"model": "large", "training_file": "file-1", "config": {}})
    nodes = [Node(64 * GB, (80 * GB,) * gpus)]
    found = plans.plan_object(spec, START, Shapes(LARGE, llama(LARGE).weights), None, None, nodes, on_gpus)
    assert (found["fits"], found["changes"]) == (False, [])
    assert found["notes"][-1] == f"The cluster now has {has}, so the job would wait; ask the operator for more GPUs."
    assert "Ray does not report" not in str(found["notes"])


def test_tokens_that_a_check_has_counted_are_taken(settings, training_file, api, client):
    lengths = {"prompt": (200, 30), "chosen": (400, 70), "rejected": (300, 40)}
    tokens = {
        "lengths": {
            side: {"total": total, "longest": longest, "histogram": {"32": 6, "64": 4}}
            for side, (total, longest) in lengths.items()
        }
    }
    body = {"model": "small", "training_file": training_file, "config": {}}
    spec = JobSpec.model_validate(body)
    file: Any = type("File", (), {"report": {"num_groups": 10, "kind": "pairs"}, "num_bytes": 9999})()
    rows, how = plans.rows_of(file, SideJobResult(finished_at=0, report={"tokens": tokens}), spec)
    assert (rows.groups, rows.prompt, rows.completion, rows.longest) == (10, 20, 35, 140)
    assert how == "token counts come from a check of the file with this model"
