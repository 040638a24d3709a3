"""Tests how a job without `x_raydpo` is trained if workers have GPUs, and what users are told. There is no cluster."""

from typing import Any

import openai
import pytest

from dpo_core.config import Lora
from services.control_plane.settings import BaseModel, Settings
from tests.services.control_plane.conftest import pairs

LORA = {"type": "lora", "r": 32, "alpha": 64.0, "dropout": 0.0, "use_rslora": False, "use_dora": False}
ALL_LINEAR = LORA | {"target_modules": "all-linear"}


@pytest.fixture(scope="module")
def settings(offline: Settings) -> Settings:
    models = {
        "plain": BaseModel(source="/nowhere/plain"),
        "whole": BaseModel(source="/nowhere/whole", adapter="none"),
        "small": BaseModel(source="/nowhere/small", adapter=Lora(r=8, target_modules=("q_proj",))),
    }
    return offline.model_copy(update={"models": models, "num_gpus_per_worker": 1.0})


NEW = "Training a new adapter of rank"


@pytest.mark.parametrize(
    ("model", "method", "adapter", "rate", "told"),
    [
        (
            "plain",
            "dpo",
            ALL_LINEAR,
            1e-5,
            f"{NEW} 32 on all linear layers of plain in bfloat16",
        ),
        (
            "plain",
            "orpo",
            ALL_LINEAR,
            8e-5,
            f"{NEW} 32 on all linear layers of plain in bfloat16",
        ),
        ("whole", "dpo", "none", 1e-6, "Training all weights of whole in bfloat16"),
        (
            "small",
            "dpo",
            LORA | {"r": 8, "target_modules": ["q_proj"]},
            1e-5,
            f"{NEW} 8 on q_proj of small in bfloat16",
        ),
    ],
)
def test_a_job_says_what_was_decided(
    client: openai.OpenAI, model: str, method: Any, adapter: Any, rate: float, told: str
) -> None:
    file = client.files.create(file=("pairs.jsonl", pairs()), purpose="fine-tune")
    body: dict[str, Any] = {"model": model, "training_file": file.id, "method": {"type": method}}
    planned: Any = client.post("/x/jobs/validate", body=body, cast_to=object)
    assert planned["method"][method]["hyperparameters"]["learning_rate"] == rate
    job = client.fine_tuning.jobs.create(**body)
    for shown in (planned["x_raydpo"], job.to_dict()["x_raydpo"]):
        assert (shown["adapter"], shown["precision"], shown["quantization"]) == (adapter, "bfloat16", None)
    assert client.fine_tuning.jobs.list_events(job.id).data[0].message.startswith(told)
    client.fine_tuning.jobs.cancel(job.id)
