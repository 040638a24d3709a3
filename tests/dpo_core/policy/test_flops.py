"""Tests that the reported FLOPs are those of the operations that ran."""

import logging

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from dpo_core.config import Lora, Optim, TrainConfig
from dpo_core.models.model import load_policy
from dpo_core.plan import rules
from dpo_core.policy.batch import Batch, collate
from dpo_core.policy.flops import Flops
from dpo_core.policy.scorer import Scorer
from dpo_core.training.pack_size import checkpoint_activations
from dpo_core.training.trainer import train
from tests.dpo_core import conftest

SIZES = conftest.SIZES | {"bos_token_id": 1, "eos_token_id": 2}
EAGER = {"experts_implementation": "eager"}  # products that the counter knows
SMALL = {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
MODELS = {
    "dense": LlamaConfig(**SIZES),
    "gpt2, whose weights lie the other way": GPT2Config(
        vocab_size=320, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    ),
    "a mixture of experts": MixtralConfig(**SIZES, **EAGER, num_local_experts=4),
    "a mixture of small experts": Qwen3MoeConfig(**SIZES, **EAGER, **SMALL),
}
# Operations that the counter has no formula of.
aten = torch.ops.aten
FORMULAS = {
    aten.addmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * right[1],
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *x, **__: sdpa_backward_flop_count(*x[:4]),
}


def counted(policy: PreTrainedModel, batch: Batch) -> int:
    scorer = Scorer(policy)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        scorer(batch).sum().backward()
    return counter.get_total_flops()


def unseen(batch: Batch) -> int:
    """Returns the number of pairs of tokens that causal attention leaves out, and torch's counter counts."""
    lengths = [stop - start for _, _, start, stop in batch.segments]
    return sum(length * (length - 1) // 2 for length in lengths)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("with_ends", [False, True], ids=["", "with the last tokens"])
@pytest.mark.parametrize("keeps", [False, True], ids=["", "with kept logits"])
def test_a_forward_and_backward_take_the_counted_operations(name, with_ends, keeps, make_groups, monkeypatch):
    """Both counts are equal. Both count attention's scores twice, and the head's tiles too if logits are not kept."""
    if not keeps:
        monkeypatch.setattr(rules, "KEPT_LOGITS", {})
    policy = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    batch, flops = collate(make_groups(6, 4), with_ends=with_ends), Flops(policy)
    assert flops.count(batch) + flops.per_seen_token * unseen(batch) == counted(policy, batch)


def test_recomputed_activations_count_twice(policy, make_groups):
    """Each layer's last product is not recomputed, because the backward pass does not need it."""
    batch, flops = collate(make_groups(6, 4)), Flops(policy, recomputed=True)
    checkpoint_activations(Scorer(policy))
    last = sum(2 * layer.mlp.down_proj.weight.numel() for layer in policy.model.layers)
    told = flops.count(batch) + flops.per_seen_token * unseen(batch) - last * len(batch.input_ids)
    assert told == counted(policy, batch)


def test_frozen_weights_count_less(policy, make_groups, tmp_path):
    """Gradients below the lowest adapter are counted, although they are not computed. So the count is up to a tenth too
    high."""
    policy.save_pretrained(tmp_path)
    batch = collate(make_groups(6, 4))
    adapted = load_policy(tmp_path, adapter=Lora(r=1))
    told = Flops(adapted).count(batch)
    found = counted(adapted, batch) - Flops(adapted).per_seen_token * unseen(batch)
    assert found < told < 1.1 * found
    assert told < 0.8 * Flops(policy).count(batch)


def test_a_shared_prompt_counts_once(policy, make_groups):
    groups, flops = make_groups(6, 4), Flops(policy)
    shared, copied = (collate(groups, share_prompts=share) for share in (True, False))
    lengths = [len(group.prompt_ids) for group in groups for _ in group.completion_ids[1:]]
    copies = flops.per_token * sum(lengths) + flops.per_seen_token * sum(n * (n + 1) // 2 for n in lengths)
    assert flops.count(shared) == flops.count(copied) - copies


def test_a_state_space_model_trains_without_sharing_and_counts_its_flops(tokenizer, pairs, tmp_path, caplog):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=320, **sizes))
    config = TrainConfig(optim=Optim(learning_rate=1e-2), batch_size=8, n_epochs=1, checkpoint_steps=3)
    with caplog.at_level(logging.WARNING, "dpo_core"):
        steps = list(train(config, policy, tokenizer, [pairs] * 3, total_steps=3, checkpoint_dir=tmp_path))
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("dpo_core")]
    assert "MambaForCausalLM cannot compute a prompt once" in said
    assert steps[-1].metrics["loss"] < steps[0].metrics["loss"]
    assert steps[0].metrics["tokens/shared"] == 0
    assert steps[0].metrics["hfu"] > 0
