"""Tests adapters on mixtures of experts from the plan to the served policy."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, Qwen3MoeConfig

from tests.e2e.conftest import Service, running_service, tiny_model
from tests.e2e.test_adapters import RATE, engine_logps, ids_of, plain_logps, steps_of, submit, succeeded
from tests.e2e.test_service import messages

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(1800)]

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 1 / 12,
    "max_position_embeddings": 2048,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=128, norm_topk_prob=True),
}
ON_EXPERTS = (
    "; the policy will be merged into its base and answer from an engine of its own: "
    "it is on the experts of a mixture of experts"
)


def make_models(folder: Path) -> dict[str, Path]:
    """Writes mixtures of experts with random weights, and returns their folders by name."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(folder / "llama"))
    for name, config in CONFIGS.items():
        config.update({"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id})
        config.update({"pad_token_id": tokenizer.pad_token_id})
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in CONFIGS}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(make_models) as service:
        yield service


# PEFT doubles the rank of experts by a name pattern, and then warns that nothing matches the pattern.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("family", CONFIGS)
def test_an_adapter_on_experts_is_planned_trained_merged_and_gone_on_with(
    service: Service, client: openai.OpenAI, family: str
) -> None:
    given: dict[str, Any] = {"hyperparameters": {"batch_size": 8, "n_epochs": 2, "learning_rate": RATE}}
    rows = ids_of(AutoTokenizer.from_pretrained(service.models[family]))
    base = AutoModelForCausalLM.from_pretrained(service.models[family], dtype=torch.float32).eval()
    prompt, (answer, _) = rows[0]
    plain = plain_logps(base, prompt, answer)
    torch.testing.assert_close(engine_logps(service, family, prompt, answer), plain, rtol=0, atol=1e-4)

    with pytest.raises(openai.BadRequestError, match=r"dropout in an adapter on the experts .* outside the experts"):
        submit(client, family, adapter={"dropout": 0.1}, **given)
    job = succeeded(client, submit(client, family, **given))
    assert any(message.endswith(ON_EXPERTS) for message in messages(client, job.id))
    curve = [float(step["train_loss"]) for step in steps_of(client, job)]
    assert curve[0] == pytest.approx(math.log(2), abs=1e-6)
    assert curve[-1] < 0.65

    plan: Any = client.post("/x/plans", body=job.to_dict()["x_raydpo"]["request"], cast_to=object)
    assert plan["fits"] is True
    (folder,) = (service.home / "storage" / "runs" / job.id / "export").rglob("adapter_config.json")
    policy = AutoPeftModelForCausalLM.from_pretrained(folder.parent, dtype=torch.float32).eval()
    adapter = {name: weight for name, weight in policy.named_parameters() if ".lora_" in name}
    assert plan["parts"]["gradients"] == 4 * sum(weight.numel() for weight in adapter.values())
    assert any(".experts." in name for name in adapter)
    for prompt, answers in rows[:4]:
        for answer in answers:
            plain = plain_logps(policy, prompt, answer)
            served = engine_logps(service, job.fine_tuned_model, prompt, answer)
            torch.testing.assert_close(served, plain, rtol=0, atol=1e-4)
            assert (plain - plain_logps(base, prompt, answer)).abs().max() > 0.01

    further = succeeded(client, submit(client, job.fine_tuned_model, **given))
    assert float(steps_of(client, further)[0]["train_loss"]) == pytest.approx(math.log(2), abs=1e-6)
    assert any(message.endswith(ON_EXPERTS) for message in messages(client, further.id))
