"""Tests which weights are updated, which stay unchanged, and into how many parts they are split."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, Gemma3Config

from dpo_core.config import Lora, Optim, TrainConfig
from dpo_core.models.model import load_policy
from dpo_core.policy.scorer import Scorer
from dpo_core.training import weights
from dpo_core.training.optim import make_optimizer
from dpo_core.training.trainer import train

DECAYING = TrainConfig(
    optim=Optim(learning_rate=1e-2, weight_decay=0.1), batch_size=8, n_epochs=1, checkpoint_steps=2, max_length=64
)
TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip


def model_with_a_tower(sizes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Gemma3Config(text_config=sizes, vision_config=TOWER)).eval()


def of_the_tower(policy):
    return {name: p.detach().clone() for name, p in policy.named_parameters() if "vision" in name}


def test_weights_that_no_gradient_reaches_stay_as_they_are_and_have_no_moments(
    sizes, tokenizer, pairs, scored, tmp_path
):
    policy = model_with_a_tower(sizes)
    before = of_the_tower(policy)
    list(train(DECAYING, policy, tokenizer, [scored(pairs, policy)] * 4, total_steps=4, checkpoint_dir=tmp_path))
    assert before
    torch.testing.assert_close(of_the_tower(policy), before, rtol=0, atol=0)
    state = load_file(tmp_path / "step-000004" / "optimizer-00001-of-00001.safetensors")
    assert {state[key].item() for key in state if key.endswith(".step") and "vision" in key} == {0}
    assert not [key for key in state if key.endswith("exp_avg") and "vision" in key]
    assert [key for key in state if key.endswith("exp_avg") and "vision" not in key]


def test_a_weight_that_the_first_step_did_not_reach_goes_on_bit_for_bit(make_policy, tokenizer, pairs, tmp_path):
    """AdamW counts the updates of each weight separately."""
    config, policy = replace(DECAYING, checkpoint_steps=1), make_policy()
    forgotten = policy.lm_head.weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    steps = train(config, policy, tokenizer, [pairs] * 3, total_steps=3, checkpoint_dir=tmp_path / "straight")
    next(steps)
    forgotten.remove()
    list(steps)
    saved, resumed = tmp_path / "straight" / "step-000001", make_policy(7)
    list(train(config, resumed, tokenizer, [pairs] * 3, total_steps=3, checkpoint_dir=tmp_path / "again", resume=saved))
    torch.testing.assert_close(dict(resumed.named_parameters()), dict(policy.named_parameters()), rtol=0, atol=0)
    state = load_file(tmp_path / "again" / "step-000003" / "optimizer-00001-of-00001.safetensors")
    assert (state["lm_head.weight.step"], state["model.norm.weight.step"]) == (2, 3)


GB = 2**30


@pytest.mark.parametrize(
    ("choices", "gigabytes", "shards"),
    [
        ((1, 8, 64), 40, 1),  # half of 80
        ((1, 8, 64), 41, 8),
        ((8, 8, 64), 1, 8),
        ((8, 8, 64), 321, 64),
        ((1, 1, 8), 40, 1),
        ((1, 1, 8), 41, 8),
        ((1, 1, 8), 1000, 8),
    ],
)
def test_auto_takes_the_fewest_parts_that_fit_into_half_of_a_gpu(choices, gigabytes, shards):
    assert weights.fewest_shards(choices, lambda shards: gigabytes * GB // shards, 80 * GB) == shards


def gpu(monkeypatch, *, ranks, local_ranks, gigabytes):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
    monkeypatch.setattr(weights, "num_ranks", lambda: ranks)
    monkeypatch.setattr(weights, "all_reduce_min", lambda value, device: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, gigabytes * GB))


class OnGpu(nn.Module):
    """A model of a billion weights in bfloat16. Training needs 18 GB, or 2 GB with an adapter."""

    device, dtype, _no_split_modules = torch.device("cuda"), torch.bfloat16, ("Linear",)

    def __init__(self, *, adapter: bool = False):
        super().__init__()
        with torch.device("meta"):
            self.layers = nn.ModuleList(nn.Linear(2**15, 2**10, bias=False, dtype=self.dtype) for _ in range(32))
        self.requires_grad_(not adapter)
        self._hf_peft_config_loaded = adapter


@pytest.mark.parametrize("sharding", ["replicated", "hybrid", "full"])
def test_a_sharding_that_the_user_set_is_used(sharding, monkeypatch):
    gpu(monkeypatch, ranks=8, local_ranks=4, gigabytes=0)
    scorer = SimpleNamespace(model=OnGpu(), takes_batches=True)
    assert weights.num_shards(scorer, sharding) == {"replicated": 1, "hybrid": 4, "full": 8}[sharding]


@pytest.mark.parametrize(
    ("local_ranks", "adapter", "gigabytes", "shards"),
    [
        (4, False, 80, 4),  # whole weights are split within a node
        (4, False, 7, 8),
        (1, False, 80, 1),  # and not between nodes, unless they have to
        (1, False, 20, 8),
        (4, True, 80, 1),  # an adapter's base is copied where it fits
        (4, True, 3, 4),
        (1, True, 3, 8),
    ],
)
def test_auto_depends_on_the_nodes_and_their_memory(local_ranks, adapter, gigabytes, shards, monkeypatch):
    gpu(monkeypatch, ranks=8, local_ranks=local_ranks, gigabytes=gigabytes)
    scorer = SimpleNamespace(model=OnGpu(adapter=adapter), takes_batches=True)
    assert weights.num_shards(scorer, "auto") == shards


def test_auto_copies_models_that_cannot_be_split(monkeypatch):
    gpu(monkeypatch, ranks=8, local_ranks=4, gigabytes=1)
    assert weights.num_shards(SimpleNamespace(model=OnGpu(), takes_batches=False), "auto") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("adapter", [None, Lora(r=2)], ids=["whole", "adapter"])
def test_the_state_of_a_run_is_counted_to_the_byte(dtype, adapter, policy, tmp_path):
    policy.save_pretrained(tmp_path)
    loaded = load_policy(tmp_path, dtype=dtype, adapter=adapter)
    own = weights.Weights(loaded)
    optimizer = make_optimizer(own.stepped.values(), Optim())
    for parameter in own.stepped.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    tensors = [*loaded.parameters(), *own.masters.values(), *(p.grad for p in own.stepped.values()), *moments]
    assert weights.state_bytes(loaded, 1) == sum(tensor.nbytes for tensor in tensors)


def test_the_state_of_shards_includes_two_whole_layers_and_all_outside_of_them(make_policy):
    policy = make_policy(num_hidden_layers=4).to(torch.bfloat16)
    layer = sum(weight.numel() for weight in policy.model.layers[0].parameters())
    num_weights = sum(weight.numel() for weight in policy.parameters())
    gathered = 2 * 2 * (num_weights - 4 * layer + 2 * layer)  # in bfloat16, and as many gradients
    assert weights.state_bytes(policy, 4) == 16 * num_weights // 4 + gathered
    assert weights.state_bytes(policy.requires_grad_(False), 4) == 2 * num_weights // 4 + gathered // 2  # no gradients


@pytest.fixture
def eight_ranks(monkeypatch):
    """Makes this process the first of eight ranks on two nodes of four GPUs. Messages that it sends arrive nowhere."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("adapter", [None, Lora(r=3), Lora(r=3, use_dora=True)], ids=["whole", "lora", "dora"])
@pytest.mark.parametrize(("sharding", "parts"), [("full", 8), ("hybrid", 4)])
def test_eight_ranks_hold_parts_that_compute_in_bfloat16_and_train_in_float32(
    sharding, parts, adapter, policy, pairs, eight_ranks, tmp_path
):
    policy.save_pretrained(tmp_path)
    loaded = load_policy(tmp_path, dtype=torch.bfloat16, adapter=adapter)
    shapes, dtypes = {name: p.shape for name, p in loaded.named_parameters()}, weights.dtypes_of(loaded)
    scorer = Scorer(loaded)
    weights.shard(scorer, sharding)
    for name, own in loaded.named_parameters():
        assert own.shape == shapes[name]
        assert own.to_local().shape[0] <= -(-shapes[name][0] // parts)
        assert own.dtype == (torch.float32 if own.requires_grad else torch.bfloat16)
    scorer(scorer.collate(pairs))[:, 0].sum().backward()
    own = weights.Weights(loaded, dtypes)
    assert own.is_sharded
    assert own.in_float32.keys() == own.trained.keys() == own.stepped.keys()
    for name, p in own.trained.items():
        assert (p.grad.shape, p.grad.dtype, p.grad.placements) == (p.shape, torch.float32, p.placements), name
    assert own.collect_gradients(1.0).shape == ()
