"""Tests the whole engine on a GPU: it trains as on a CPU, and resumes from its own checkpoint."""

import pytest
import torch

from dpo_core.config import Lora, Optim, TrainConfig
from dpo_core.models.model import load_policy
from dpo_core.policy.scorer import score_reference
from dpo_core.training.trainer import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda"
CONFIG = TrainConfig(
    optim=Optim(learning_rate=1e-3), batch_size=8, n_epochs=1, max_length=64, checkpoint_steps=1
)  # max_tokens_per_pack: what memory holds
POLICIES = {
    "whole": {},
    "an adapter": {"adapter": Lora(r=4)},
    "an adapter over nf4": {"adapter": Lora(r=4), "quantization": "nf4"},
}


@pytest.fixture
def base(make_policy, tmp_path):
    folder = tmp_path / "base"
    make_policy(hidden_size=128, intermediate_size=256, head_dim=32, initializer_range=0.05).save_pretrained(folder)
    return folder


def metrics_of(policy, tokenizer, pairs, folder, **options):
    groups = score_reference(policy, pairs, max_tokens_per_pack=8192)
    batches = [groups] * 3
    steps = train(CONFIG, policy, tokenizer, batches, total_steps=3, checkpoint_dir=folder, **options)
    return [{key: step.metrics[key] for key in ("loss", "grad_norm", "logps/chosen")} for step in steps]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", POLICIES)
def test_it_trains_as_on_a_cpu_and_goes_on_from_its_checkpoint(kind, dtype, base, tokenizer, pairs, tmp_path):
    policies = [load_policy(base, device=device, dtype=dtype, **POLICIES[kind]) for device in ("cpu", DEVICE, DEVICE)]
    expected, found = (
        metrics_of(policy, tokenizer, pairs, tmp_path / str(place)) for place, policy in enumerate(policies[:2])
    )
    tolerance = 1e-2 if dtype == torch.float32 else 0.1
    assert found == [pytest.approx(metrics, rel=tolerance, abs=tolerance) for metrics in expected]
    resumed = metrics_of(policies[2], tokenizer, pairs, tmp_path / "again", resume=tmp_path / "1" / "step-000001")
    assert resumed == [pytest.approx(metrics, rel=tolerance, abs=tolerance) for metrics in found[1:]]
    assert {weight.device.type for weight in policies[2].parameters()} == {DEVICE}
