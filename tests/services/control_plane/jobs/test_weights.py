"""Tests which weights a job trains and against which reference: the decision, its display, and refusals.

There is no cluster.
"""

import asyncio
from dataclasses import replace
from typing import Any

import openai
import pytest

from dpo_core.config import Lora
from services.contract import Weights
from services.control_plane.jobs.combinations import Asked
from services.control_plane.jobs.weights import decide, placed
from services.control_plane.models.models import STARTED_AT, NamedModel
from services.control_plane.settings import BaseModel, Settings
from tests.services.headers import SMALL, write_model

LORA = {"type": "lora", "r": 32, "alpha": 64.0, "dropout": 0.0, "target_modules": "all-linear"}
PLAIN = {"use_rslora": False, "use_dora": False}
DPO, SIMPO = ({"type": kind} for kind in ("dpo", "simpo"))
MERGED = (
    "; the policy will be merged into its base and answer from an engine of its own: "
    "it is on the experts of a mixture of experts"
)


@pytest.fixture(scope="module")
def settings(offline: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Returns settings with two names for another base model: a mixture of experts, whose weights can be read."""
    source = str(write_model(tmp_path_factory.mktemp("models") / "mixture", SMALL, experts=4, model_type="mixtral"))
    models = {
        "mixture": BaseModel(source=source),
        "dropping": BaseModel(source=source, adapter=Lora(dropout=0.1)),
    }
    return offline.model_copy(update={"models": offline.models | models})


@pytest.fixture(scope="module")
def trained(insert_models: Any) -> dict[str, str]:
    """Adds models to the database, and returns their names by kind.

    The kinds are: all weights, an adapter on them, two adapters on the base model, and two reward models.
    """
    adapted: dict[str, Any] = {"adapter": Lora(r=8, alpha=16)}
    kinds: dict[str, dict[str, Any]] = {
        "whole": {},
        "on-whole": {"base_source": "/runs/whole", **adapted},
        "adapter": {"base_source": "/nowhere/tiny", **adapted},
        "of-queries": {"base_source": "/nowhere/tiny", "adapter": Lora(target_modules=("q_proj",))},
        "reward": {"num_outputs": 1},
        "gaussian": {"num_outputs": 2},
    }
    models = {
        kind: NamedModel(f"ft:tiny:raydpo::{kind}", f"/runs/{kind}", "tiny", STARTED_AT, **fields)
        for kind, fields in kinds.items()
    }
    insert_models(*models.values())
    return {kind: model.id for kind, model in models.items()}


def create(client: openai.OpenAI, file: str, model: str = "tiny", method: Any = DPO, **extension: Any) -> Any:
    return client.fine_tuning.jobs.create(
        model=model, training_file=file, method=method, extra_body={"x_raydpo": extension}
    )


def copied(job: Any) -> dict[str, Any]:
    """Returns the arguments of the client that create the job again."""
    request = job.to_dict()["x_raydpo"]["request"]
    extension = request.pop("x_raydpo")
    return {**request, "extra_body": {"x_raydpo": extension}}


def told(client: openai.OpenAI, job_id: str) -> str:
    """Returns the message of the job's last event."""
    return client.fine_tuning.jobs.list_events(job_id).data[0].message


@pytest.mark.parametrize(
    ("extension", "adapter", "precision", "event"),
    [
        ({}, LORA | PLAIN, "float32", "Training a new adapter of rank 32 on all linear layers of tiny in float32"),
        ({"adapter": "none"}, "none", "float32", "Training all weights of tiny in float32"),
        (
            {"adapter": {"type": "lora", "r": 4, "target_modules": ["q_proj"]}, "precision": "bfloat16"},
            LORA | PLAIN | {"r": 4, "target_modules": ["q_proj"]},
            "bfloat16",
            "Training a new adapter of rank 4 on q_proj of tiny in bfloat16",
        ),
    ],
    ids=["default", "all weights", "chosen"],
)
def test_what_is_trained_is_shown_and_told(
    client: openai.OpenAI, training_file: str, extension: Any, adapter: Any, precision: str, event: str
) -> None:
    job = create(client, training_file, **extension)
    shown = job.to_dict()["x_raydpo"]
    assert (shown["adapter"], shown["precision"]) == (adapter, precision)
    assert shown["reference"] == {"source": "auto", "model": "tiny"}
    assert told(client, job.id) == f"{event}; the reference model is tiny as it is before the first step"
    client.fine_tuning.jobs.cancel(job.id)


def test_a_job_tells_that_vllm_cannot_attach_its_adapter_on_experts(client: openai.OpenAI, training_file: str) -> None:
    for extension, is_merged in (({}, True), ({"adapter": {"target_modules": ["q_proj"]}}, False)):
        job = create(client, training_file, "mixture", **extension)
        assert told(client, job.id).endswith(MERGED) == is_merged
        client.fine_tuning.jobs.cancel(job.id)


def test_a_remedy_helps_also_if_the_settings_of_the_base_say_dropout(client: openai.OpenAI, training_file: str) -> None:
    with pytest.raises(openai.BadRequestError, match=r"; send 0 as x_raydpo\.adapter\.dropout, or send target_modules"):
        create(client, training_file, "dropping")
    for adapter in ({"dropout": 0}, {"dropout": 0.1, "target_modules": ["q_proj"]}):
        client.fine_tuning.jobs.cancel(create(client, training_file, "dropping", adapter=adapter).id)


@pytest.mark.parametrize(
    ("weights", "start", "on_experts"),
    [
        (Weights(adapter=Lora()), "mixture", True),
        (Weights(adapter=Lora(target_modules=("down_proj",))), "mixture", False),
        (Weights(adapter=Lora(target_modules=("up_proj",))), "mixture", True),
        (Weights(), "mixture", False),
        (Weights(adapter=Lora()), "unreadable", False),
        (Weights(adapter=Lora()), "unreadable, on experts", True),
    ],
)
def test_whether_an_adapter_is_on_experts_is_known_from_the_files_of_its_base(
    settings: Settings, weights: Weights, start: str, on_experts: bool
) -> None:
    mixture = NamedModel("mixture", settings.models["mixture"].source, "mixture", STARTED_AT)
    unreadable = NamedModel("away", "/nowhere", "away", STARTED_AT)
    starts = {
        "mixture": mixture,
        "unreadable": unreadable,
        "unreadable, on experts": replace(unreadable, on_experts=True),
    }
    assert asyncio.run(placed(weights, starts[start])) == weights.model_copy(update={"on_experts": on_experts})


def test_a_job_without_a_reference_names_none(client: openai.OpenAI, training_file: str) -> None:
    job = create(client, training_file, method=SIMPO)
    assert told(client, job.id) == "Training a new adapter of rank 32 on all linear layers of tiny in float32"
    client.fine_tuning.jobs.cancel(job.id)


def test_a_job_goes_on_with_the_adapter_that_it_starts_from(
    client: openai.OpenAI, training_file: str, trained: dict[str, str]
) -> None:
    start = trained["adapter"]
    job = create(client, training_file, model=start)
    assert job.to_dict()["x_raydpo"]["adapter"]["r"] == 8
    assert told(client, job.id).startswith(
        f"Training the adapter of {start}, of rank 8, further in float32; the reference"
    )
    client.fine_tuning.jobs.cancel(job.id)
    merged = create(client, training_file, model=start, adapter="none")
    assert told(client, merged.id).startswith(
        f"Training all weights of {start} (its adapter is merged into the base first) in"
    )
    client.fine_tuning.jobs.cancel(merged.id)


def test_a_base_may_be_quantized(client: openai.OpenAI, training_file: str) -> None:
    job = create(client, training_file, quantization="nf4", precision="bfloat16")
    assert job.to_dict()["x_raydpo"]["quantization"] == "nf4"
    event = told(client, job.id)
    assert "of tiny in bfloat16, on a base quantized to NF4; the reference model is tiny" in event
    assert event.endswith("and answer from an engine of its own: its base model is in NF4")
    client.fine_tuning.jobs.cancel(job.id)


def test_another_model_is_the_reference(client: openai.OpenAI, training_file: str, trained: dict[str, str]) -> None:
    job = create(client, training_file, model=trained["adapter"], reference={"model": trained["whole"]})
    assert job.to_dict()["x_raydpo"]["reference"]["model"] == trained["whole"]
    assert told(client, job.id).endswith(f"the reference model is {trained['whole']}")
    with pytest.raises(openai.BadRequestError, match="is used by the job"):
        client.models.delete(trained["whole"])
    client.fine_tuning.jobs.cancel(job.id)


@pytest.mark.parametrize("start", ["adapter", "of-queries"])
def test_a_job_that_goes_on_with_an_adapter_is_created_again_from_its_request(
    client: openai.OpenAI, training_file: str, trained: dict[str, str], start: str
) -> None:
    job = create(client, training_file, model=trained[start])
    again = client.fine_tuning.jobs.create(**copied(job))
    assert again.to_dict()["x_raydpo"]["adapter"] == job.to_dict()["x_raydpo"]["adapter"]
    for each in (job, again):
        client.fine_tuning.jobs.cancel(each.id)


@pytest.mark.parametrize(
    ("model", "method", "extension", "param", "words"),
    [
        (
            "adapter",
            DPO,
            {"adapter": {"r": 4}},
            "adapter",
            "or send 'none' to merge that adapter into its base",
        ),
        ("tiny", DPO, {"adapter": {"type": "ia3"}}, "adapter.type", "only 'lora' is supported"),
        ("tiny", DPO, {"adapter": {"r": 5000}}, "adapter.r", "from 1 to 1024"),
        ("tiny", DPO, {"adapter": {"rank": 4}}, "adapter.rank", "Unknown parameter"),
        ("tiny", DPO, {"adapter": {"target_modules": []}}, "adapter.target_modules", "names of modules"),
        ("tiny", DPO, {"adapter": 7}, "adapter", "dictionary"),
        ("tiny", DPO, {"precision": "float16"}, "precision", "'float32' or 'bfloat16'"),
        ("tiny", DPO, {"reference": {"model": "none"}}, "reference.model", "does not exist"),
        (
            "tiny",
            SIMPO,
            {"reference": {"model": "tiny"}},
            "reference.model",
            "a reference model if the method uses none",
        ),
        ("tiny", DPO, {"reference": {"model": "reward"}}, "reference.model", "a reward model as its reference model"),
    ],
)
def test_what_does_not_go_together_is_refused_by_field(
    client: openai.OpenAI,
    training_file: str,
    trained: dict[str, str],
    model: str,
    method: Any,
    extension: Any,
    param: str,
    words: str,
) -> None:
    if extension.get("reference", {}).get("model") == "reward":
        extension = {"reference": {"model": trained["reward"]}}
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as refused:
        create(client, training_file, trained.get(model, model), method, **extension)
    assert refused.value.param == f"x_raydpo.{param}"
    assert words in refused.value.message


@pytest.mark.parametrize(
    ("start", "method"), [("reward", "dpo"), ("gaussian", "reward_bradley_terry"), ("reward", "reward_gaussian")]
)
def test_a_reward_model_is_no_start_for_what_trains_another_kind(
    client: openai.OpenAI, training_file: str, trained: dict[str, str], start: str, method: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=r"reward model in the field 'model' .*; name the base") as refused:
        create(client, training_file, trained[start], {"type": method})
    assert refused.value.param == "model"


def test_a_reward_model_is_trained_on_is_listed_as_one_and_does_not_chat(
    client: openai.OpenAI, training_file: str, trained: dict[str, str]
) -> None:
    job = create(client, training_file, trained["reward"], {"type": "reward_bradley_terry"})
    assert "reference" not in told(client, job.id)
    client.fine_tuning.jobs.cancel(job.id)
    kinds = {model.id: model.to_dict()["x_raydpo"]["kind"] for model in client.models.list()}
    assert (kinds[trained["reward"]], kinds[trained["whole"]], kinds["tiny"]) == ("reward", "policy", "policy")
    with pytest.raises(
        openai.BadRequestError, match=("is a reward model, which scores texts and cannot write any")
    ) as refused:
        client.chat.completions.create(model=trained["reward"], messages=[{"role": "user", "content": "Hi"}])
    assert refused.value.param == "model"


def test_what_an_adapter_stands_on_is_deleted_after_it(client: openai.OpenAI, trained: dict[str, str]) -> None:
    with pytest.raises(openai.BadRequestError, match=f"is the base of the adapter '{trained['on-whole']}'"):
        client.models.delete(trained["whole"])
    client.models.delete(trained["on-whole"])
    client.models.delete(trained["whole"])


def test_settings_say_what_is_trained_by_default(settings: Settings) -> None:
    models = {"all": BaseModel(source="/m", adapter="none"), "small": BaseModel(source="/m", adapter=Lora(r=2))}
    given = settings.model_copy(update={"models": models, "num_gpus_per_worker": 1.0})

    def start(name: str, **fields: Any) -> NamedModel:
        return NamedModel(name, "/m", name, STARTED_AT, **fields)

    assert decide(Asked(), start("all"), given) == Weights(adapter=None, precision="bfloat16")
    assert decide(Asked(), start("small"), given).adapter == Lora(r=2)
    assert decide(Asked(adapter=Lora(r=3)), start("all"), given).adapter == Lora(r=3)
    assert decide(Asked(precision="float32"), start("all"), given).precision == "float32"
    assert decide(Asked(), start("gone"), given).adapter == Lora()
    quantized = start("small", adapter=Lora(r=3), quantization="nf4")
    assert decide(Asked(), quantized, given).quantization == "nf4"
    assert decide(Asked(adapter="none"), quantized, given).quantization is None
