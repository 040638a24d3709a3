"""Tests how large packs (the rows of one forward pass) may be for the memory that is free.

The bytes are counted exactly, as torch's allocator reports them to its profiler.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, MixtralConfig

from benchmarks import memory
from dpo_core.config import Lora, Optim, TrainConfig
from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.model import load_policy
from dpo_core.options import Kto
from dpo_core.plan import rules
from dpo_core.policy.scorer import Scorer
from dpo_core.training import pack_size
from dpo_core.training.checkpoint import read_manifest
from dpo_core.training.trainer import train
from tests.dpo_core import conftest

MB, GB = 2**20, 2**30
CONFIG = TrainConfig(optim=Optim(learning_rate=1e-3), batch_size=8, n_epochs=1, checkpoint_steps=4, max_length=256)


def changes(work: Callable[[], object]) -> list[int]:
    """Returns the bytes of every allocation by `work`, and the negative bytes of every release, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = work()  # what it returns lives until here
    del kept
    return memory.changes(profiled)


def groups_of(num_tokens: int) -> list[EncodedGroup]:
    ids = list(range(5, 69))
    return [EncodedGroup(ids, (ids, ids), None, line) for line in range(num_tokens // (3 * len(ids)))]


@pytest.fixture
def free(monkeypatch):
    def pretend(num_bytes: int | None) -> None:
        monkeypatch.setattr(pack_size, "_free_bytes", lambda device: num_bytes)

    return pretend


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_options_that_the_user_set_are_kept(policy, free, checkpointing):
    free(0)
    asked = replace(CONFIG, max_tokens_per_pack=777, activation_checkpointing=checkpointing)
    assert pack_size.plan_memory(asked, Scorer(policy)) == asked
    assert (
        pack_size.plan_memory(replace(asked, activation_checkpointing="auto"), Scorer(policy)).max_tokens_per_pack
        == 777
    )
    fitted = pack_size.plan_memory(replace(asked, max_tokens_per_pack=None), Scorer(policy))
    assert fitted.activation_checkpointing == checkpointing


@pytest.mark.parametrize("num_bytes", [64 * GB, None], ids=["plenty", "unknown"])
def test_with_plenty_of_or_unknown_memory_a_pack_has_the_most_tokens_and_nothing_is_recomputed(policy, free, num_bytes):
    free(num_bytes)
    fitted = pack_size.plan_memory(CONFIG, Scorer(policy))
    assert (fitted.max_tokens_per_pack, fitted.activation_checkpointing) == (rules.MOST_TOKENS["cpu"], "off")
    whole = pack_size.plan_memory(replace(CONFIG, objective=Kto()), Scorer(policy))
    assert whole.max_tokens_per_pack == rules.MOST_TOKENS_AT_ONCE["cpu"]  # several packs would compute all twice


@pytest.fixture
def tiles_only(monkeypatch):
    """Keeps no logits for the backward pass, so that only one tile of them is in memory."""
    monkeypatch.setattr(rules, "KEPT_LOGITS", {})


@pytest.fixture
def large_packs(monkeypatch):
    """Lets packs grow with the memory up to the size that they have on no CPU by themselves."""
    monkeypatch.setitem(rules.MOST_TOKENS, "cpu", 8192)


def test_less_memory_gives_fewer_tokens_and_finally_recomputed_activations(
    policy, free, caplog, tiles_only, large_packs
):
    choices = []
    for megabytes in (512, 64, 32, 16, 8, 4, 2):
        free(megabytes * MB)
        fitted = pack_size.plan_memory(CONFIG, Scorer(policy))
        choices.append((fitted.max_tokens_per_pack, fitted.activation_checkpointing))
    kept = [tokens for tokens, checkpointing in choices if checkpointing == "off"]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) > 3
    assert [checkpointing for _, checkpointing in choices] == sorted(c for _, c in choices)
    assert choices[-1][1] == "on"
    assert all(
        CONFIG.max_length <= tokens <= rules.MOST_TOKENS["cpu"] and tokens.bit_count() == 1 for tokens, _ in choices
    )
    assert not caplog.records


def test_a_max_length_that_does_not_fit_is_warned_of(policy, free, caplog):
    free(MB // 4)
    with caplog.at_level(logging.WARNING, "dpo_core.training.pack_size"):
        fitted = pack_size.plan_memory(CONFIG, Scorer(policy))
    assert (fitted.max_tokens_per_pack, fitted.activation_checkpointing) == (CONFIG.max_length, "on")
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("A row of max_length (256 tokens) may not fit into memory, which has room for about ")


@pytest.mark.parametrize(("kept_rows", "held_rows"), [(0, 256), (255, 256), (300, 300), (9000, 1000)])
def test_memory_for_the_optimizer_and_for_logits_is_reserved(
    kept_rows, held_rows, policy, make_policy, free, monkeypatch
):
    """A float32 weight needs 12 more bytes. A weight in half precision also has a float32 master. A pack has at most
    1,000 tokens, and logits are kept for at most `kept_rows` tokens."""
    monkeypatch.setattr(rules, "KEPT_LOGITS", {"cpu": kept_rows * conftest.VOCABULARY})
    num_weights = sum(p.numel() for p in policy.parameters())
    budgets = []
    for dtype, state in ((torch.float32, 12), (torch.bfloat16, 16)):
        rounded = 0 if dtype == torch.float32 else 256 * 2
        logits = conftest.VOCABULARY * (held_rows * 4 + rounded)
        free(state * num_weights + logits + 10 * MB)
        budgets.append(pack_size._budget(Scorer(make_policy().to(dtype)), "auto", 1000))
    assert budgets == [int(pack_size.PACK_SHARE * 10 * MB)] * 2


@pytest.mark.parametrize("megabytes", [64, 40, 8, 4, 2])
def test_a_pack_takes_no_more_than_free_memory(make_policy, free, megabytes, tiles_only, large_packs):
    """It also takes at least a fifth of this memory: a part is held back, and powers of two may halve the rest."""
    free(megabytes * MB)
    scorer = Scorer(make_policy(num_hidden_layers=4))
    fitted = pack_size.plan_memory(CONFIG, scorer)
    if fitted.activation_checkpointing == "on":
        pack_size.checkpoint_activations(scorer)
    batch = scorer.collate(groups_of(fitted.max_tokens_per_pack))
    peak = max(accumulate(changes(lambda: scorer(batch).sum().backward())))
    assert megabytes * MB / 5 < peak <= megabytes * MB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recomputed_layers_whose_experts_are_balanced_take_the_memory_of_their_inputs_and_routers(make_mixture, dtype):
    scorer = Scorer(make_mixture(num_hidden_layers=32, num_experts=64).to(dtype), balances=True)
    assert scorer.experts
    scorer.requires_grad_(False).model.get_input_embeddings().requires_grad_()  # gradients of weights do not count
    pack_size.checkpoint_activations(scorer)
    batches = [scorer.collate(groups_of(tokens)) for tokens in (192, 384)]
    peaks = [max(accumulate(changes(lambda batch=batch: scorer(batch).sum().backward()))) for batch in batches]
    added = (peaks[1] - peaks[0]) / (len(batches[1].input_ids) - len(batches[0].input_ids))
    assert 32 * pack_size._border_bytes(scorer) == pytest.approx(added, rel=0.15)


def of_shape(prompt: int, *completions: int, line: int = 1) -> EncodedGroup:
    ids = [5 + i % 300 for i in range(max(prompt, *completions))]
    return EncodedGroup(ids[:prompt], tuple(ids[:length] for length in completions), None, line)


# A prompt's keys are kept once for each completion: with as many heads of keys as of queries they are much of it.
SHAPES = {"pairs": (48, 32, 32), "many short completions": (128, *[4] * 32), "a ranking": (20, *[40] * 8)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("megabytes", [40, 22])
def test_a_pack_of_groups_of_any_shape_fits(shape, megabytes, make_policy, free):
    free(megabytes * MB)
    scorer = Scorer(make_policy(num_hidden_layers=4, num_key_value_heads=4))
    groups = [of_shape(*SHAPES[shape], line=line) for line in range(64)]
    fitted = pack_size.plan_memory(replace(CONFIG, activation_checkpointing="off"), scorer, groups[:4])
    pack = groups[: max(1, fitted.max_tokens_per_pack // groups[0].num_tokens)]
    batch = scorer.collate(pack)
    assert max(accumulate(changes(lambda: scorer(batch).sum().backward()))) <= megabytes * MB


@pytest.mark.parametrize("shape", [(512, *[8] * 16), (256, 256, 256), (100, 3), (9, 500, 500)], ids=str)
def test_an_example_in_the_shape_of_the_groups_shows_the_memory_of_a_token(shape, make_policy):
    scorer, group = Scorer(make_policy(num_key_value_heads=4, num_hidden_layers=4)), of_shape(*shape)
    found = pack_size._kept_bytes(scorer, group) / scorer.count_tokens(group)
    assert pack_size._bytes_per_token(scorer, [group]) == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize("shape", [(63, 1), (1, 63, 63), (2, *[3] * 40), (30, 34, 1)], ids=str)
def test_the_example_keeps_within_the_positions_of_the_model(shape):
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    scorer = Scorer(AutoModelForCausalLM.from_config(config).eval())
    pack_size.plan_memory(replace(CONFIG, max_length=64), scorer, [of_shape(*shape)])


def test_training_sizes_packs_by_its_first_batch(make_policy, tokenizer, scored, free, tmp_path):
    free(24 * MB)
    tokens = {}
    for name, shape in SHAPES.items():
        policy = make_policy(num_hidden_layers=4, num_key_value_heads=4)
        groups = scored([of_shape(*shape, line=line) for line in range(8)], policy)
        folder = tmp_path / name
        list(
            train(
                CONFIG, policy, tokenizer, lambda _, groups=groups: iter([groups]), total_steps=1, checkpoint_dir=folder
            )
        )
        tokens[name] = read_manifest(folder / "step-000001").config["max_tokens_per_pack"]
    assert tokens["many short completions"] < tokens["pairs"]


@pytest.mark.parametrize(
    ("limit", "free_bytes"), [("max", 8 * GB), (str(6 * GB), 3 * GB)], ids=["a machine", "a container"]
)
def test_ranks_divide_the_free_memory_of_their_machine_or_container(policy, tmp_path, monkeypatch, limit, free_bytes):
    """Cached files in a container's memory count as free: of 6 GB, 5 GB are used, of which 2 GB are files, so 3 GB are
    free."""
    files = {
        "meminfo": f"MemTotal: {16 * GB // 1024} kB\nMemAvailable: {8 * GB // 1024} kB\nHugePages_Total: 0\n",
        "memory.max": limit,
        "memory.current": f"{5 * GB}\n",
        "memory.stat": f"anon {3 * GB}\ninactive_file {2 * GB}\nactive_file 0\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(pack_size, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(pack_size, "CGROUP", tmp_path)
    assert pack_size._free_bytes(policy.device) == free_bytes
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert pack_size._free_bytes(policy.device) == free_bytes // 4


def test_memory_that_the_gpus_allocator_holds_unused_counts_as_free(monkeypatch):
    for name, value in (("mem_get_info", (10 * GB, 80 * GB)), ("memory_reserved", 60 * GB), ("memory_allocated", GB)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert pack_size._free_bytes(torch.device("cuda")) == 69 * GB


SIZES = conftest.SIZES | {"num_hidden_layers": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def with_adapter(make_policy, folder):
    make_policy(num_hidden_layers=4).save_pretrained(folder)
    policy = load_policy(folder, adapter=Lora(r=4))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:  # 0 at first, and then the other half has no gradient
            torch.nn.init.normal_(parameter)
    return policy


MODELS = {
    "dense": lambda make_policy, _: make_policy(num_hidden_layers=4),
    "with an adapter": with_adapter,
    "a mixture of experts": lambda *_: AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_local_experts=4)),
    "without sharing": lambda *_: AutoModelForCausalLM.from_config(Gemma2Config(**SIZES)),
}


@pytest.mark.parametrize("name", MODELS)
def test_recomputed_activations_take_less_memory_and_change_no_bit(name, make_policy, tmp_path):
    scorer = Scorer(MODELS[name](make_policy, tmp_path).eval())
    batch = scorer.collate(groups_of(2048))
    trained = [parameter for parameter in scorer.parameters() if parameter.requires_grad]

    def step() -> tuple[int, list[torch.Tensor]]:
        found = []

        def work() -> None:
            measured = scorer(batch)
            weights = torch.linspace(-1, 1, measured.numel()).view_as(measured)
            found.extend([measured.detach(), *torch.autograd.grad(measured, trained, weights)])

        return max(accumulate(changes(work))), found

    peak, kept = step()
    pack_size.checkpoint_activations(scorer)
    lower_peak, again = step()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(kept, again, strict=True))
    assert lower_peak < 0.6 * peak


def peak_of_a_step(policy, tokenizer, groups, folder) -> int:
    """Returns the most bytes that the second step allocates, with AdamW's moments in memory already.

    Tensors of the size of the embeddings are not counted: the embeddings and the head have a gradient each.
    """
    config = replace(CONFIG, batch_size=len(groups))
    steps = train(config, policy, tokenizer, [groups] * 3, total_steps=3, checkpoint_dir=folder)
    next(steps)
    found = changes(lambda: next(steps))
    steps.close()
    weight = policy.lm_head.weight.nbytes
    assert max(accumulate(change for change in found if abs(change) == weight)) == 2 * weight
    return max(accumulate(change for change in found if abs(change) != weight))


@pytest.mark.slow
def test_a_vocabulary_four_times_as_large_takes_no_more_memory_but_for_its_weights(
    make_policy, make_groups, scored, tokenizer, tmp_path, tiles_only, large_packs
):
    sizes = {"hidden_size": 96, "intermediate_size": 192}
    small, large = (make_policy(vocab_size=size, **sizes) for size in (32768, 131072))
    groups = scored(make_groups(48, 2), small)
    expected = peak_of_a_step(small, tokenizer, groups, tmp_path)
    found = peak_of_a_step(large, tokenizer, groups, tmp_path)
    assert found == pytest.approx(expected, rel=0.1)
