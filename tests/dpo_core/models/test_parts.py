"""Tests models of which each of three ranks reads only a part of the weights, against the same models loaded whole."""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.multiprocessing import start_processes
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from dpo_core.config import Lora
from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.adapter import check_base, fingerprint
from dpo_core.models.architecture import UNREAD, UnusableModel
from dpo_core.models.model import load_policy, load_reward_model
from dpo_core.models.parts import is_unread, read_parts
from dpo_core.policy.scorer import Scorer
from dpo_core.training.ranks import together
from dpo_core.training.weights import shard
from tests.dpo_core.conftest import SIZES

ROOT = Path(__file__).parents[3]
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES),  # its head is its embeddings
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, eos_token_id=2),  # the third rank has no expert
    "qwen3 moe": Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=5),  # its file has each expert apart
}
LORA = Lora(r=4)
GROUP = EncodedGroup([5, 6, 7], ([8, 9], [10, 11, 12]), None, 1)


def compare(load: Any, folder: Path, **options: Any) -> list[str]:
    """Loads a model whole, and in parts: each rank reads a part of the weights. Returns the names of all that differs.

    The weights and the results of both are compared.
    """
    whole, policy = load(folder, **options), load(folder, in_parts=True, **options)
    assert is_unread(policy), "it was loaded whole"
    expected = Scorer(whole)
    scorer = Scorer(policy)
    shard(scorer, "full")
    if adapter := together(lambda: read_parts(policy), torch.device("cpu")):
        check_base(adapter, policy)
    own, theirs = (dict(model.named_parameters(remove_duplicate=False)) for model in (policy, whole))
    assert own.keys() == theirs.keys()
    different = [
        name
        for name, weight in theirs.items()
        if not torch.equal(own[name].full_tensor().to(weight.dtype), weight)
        or own[name].requires_grad != weight.requires_grad
        or own[name].to_local().shape[0] > -(-weight.shape[0] // dist.get_world_size())
    ]
    buffers = dict(policy.named_buffers())
    different += [name for name, buffer in whole.named_buffers() if not torch.equal(buffers[name], buffer)]
    batch = scorer.collate([GROUP])
    if not torch.equal(scorer(batch), expected(batch)):
        different.append("the answers")
    if options.get("adapter") and fingerprint(policy) != fingerprint(whole):
        different.append("the fingerprint")
    whole_config, config = (
        {key: value for key, value in model.config.to_dict().items() if key != "dtype"} for model in (whole, policy)
    )
    if config != whole_config or policy.name_or_path != whole.name_or_path:
        different.append("the config")
    if whole.can_generate() and policy.generation_config.to_dict() != whole.generation_config.to_dict():
        different.append("the generation config")
    return different


def run_rank(rank: int, num_ranks: int, home: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{home}/rendezvous", rank=rank, world_size=num_ranks)
    found = {}
    for name in FAMILIES:
        found[name] = compare(load_policy, home / name)
        found[f"{name}, adapter in bfloat16"] = compare(load_policy, home / name, adapter=LORA, dtype=torch.bfloat16)
    found["bfloat16"] = compare(load_policy, home / "llama", dtype=torch.bfloat16)
    found["trained adapter"] = compare(load_policy, home / "llama", adapter=home / "adapter")
    for name, folder in {"new head": "llama", "head": "rewards"}.items():
        found[name] = compare(load_reward_model, home / folder, seed=3)
        found[f"{name}, adapter"] = compare(load_reward_model, home / folder, seed=3, adapter=Lora(r=4))
    for name, adapter, why in (
        ("broken", None, "NaN or infinity|Another rank"),
        ("llama", home / "other", "whose weights differ"),
    ):
        with pytest.raises((UnusableModel, RuntimeError), match=why):
            compare(load_policy, home / name, adapter=adapter)
    policy = load_policy(home / "llama", adapter=home / "other", in_parts=True)
    shard(Scorer(policy), "full")
    if rank == num_ranks - 1:  # its node lacks the files; the other ranks must not wait for it to compare the base
        unread = getattr(policy, UNREAD)
        setattr(policy, UNREAD, replace(unread, found=replace(unread.found, source=home / "missing")))
    with pytest.raises((OSError, RuntimeError), match=r"missing|Another rank failed"):
        together(lambda: read_parts(policy), torch.device("cpu"))
    (home / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def prepare(home: Path) -> None:
    torch.manual_seed(0)
    for name, config in FAMILIES.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(home / name, max_shard_size="50KB")
    load_reward_model(home / "llama", seed=1).save_pretrained(home / "rewards")
    adapted = load_policy(home / "llama", adapter=Lora(r=4), seed=5)
    adapted.save_pretrained(home / "adapter")
    adapted.save_pretrained(home / "other")
    (home / "other" / "base_model.json").write_text(json.dumps({"sha256_of_samples": "of another base"}))
    AutoModelForCausalLM.from_config(FAMILIES["llama"]).save_pretrained(home / "broken")
    weights = load_file(home / "broken" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][-1] = torch.inf  # in the last rank's part
    save_file(weights, home / "broken" / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def found() -> list[dict[str, list[str]]]:
    """Runs all cases on three ranks, and returns what each rank found to differ, by case."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-m", "tests.dpo_core.models.test_parts", folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank*.json"))]


@pytest.mark.slow
def test_each_rank_reads_its_parts_of_the_weights_with_every_bit(found):
    assert len(found) == 3
    assert len(found[0]) == 2 * len(FAMILIES) + 6
    assert {name for rank in found for name, different in rank.items() if different} == set()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"adapter": Lora(use_dora=True)}, "DoRA computes its first magnitudes from the weights"),
        ({"adapter": Lora(), "quantization": "nf4"}, "rounded to nf4"),
    ],
)
def test_a_model_that_needs_its_weights_at_once_is_loaded_whole_and_says_why(
    options, why, make_policy, tmp_path, caplog
):
    make_policy().save_pretrained(tmp_path)
    policy = load_policy(tmp_path, in_parts=True, **options)
    assert not is_unread(policy)
    assert f"{tmp_path} is loaded whole on every rank: " in caplog.text
    assert why in caplog.text
    expected = load_policy(tmp_path, **options)
    torch.testing.assert_close(policy.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_a_new_head_is_on_the_models_device_before_the_weights_are_read(make_policy, tmp_path):
    """Ranks exchange new weights by NCCL, which accepts no tensors on the CPU. The meta device takes the place of a
    GPU."""
    make_policy().save_pretrained(tmp_path)
    policy = load_reward_model(tmp_path, in_parts=True, device="meta")
    assert policy.score.weight.device.type == "meta"
    assert load_reward_model(tmp_path, in_parts=True).score.weight.device.type == "cpu"


def test_a_folder_with_both_of_two_tied_weights_is_loaded_whole(make_policy, tmp_path, caplog):
    make_policy().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not is_unread(load_policy(tmp_path, in_parts=True))
    assert "holds weights that its config ties to others" in caplog.text


def main(home: Path) -> None:
    import_module("peft")  # else each rank imports it for itself
    prepare(home)
    start_processes(run_rank, (3, home), nprocs=3, daemon=True, start_method="fork")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
