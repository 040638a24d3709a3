"""Provides a small random policy, a tokenizer that is trained when tests start, and groups to train on.

A group is a prompt with its completions.
"""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from dpo_core.encoding.encode import EncodedGroup
from dpo_core.policy.scorer import score_reference

VOCABULARY = 320
SIZES = {  # of small models of any architecture
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

torch.set_num_threads(1)
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def build_tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["the quick brown fox jumps over the lazy dog\n\n"] * 4, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    made.chat_template = CHAT_TEMPLATE
    return made


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def build_policy(seed: int = 0, **overrides: object) -> PreTrainedModel:
    """Returns a random two-layer Llama. Its weights are large, so that a wrong mask or position shows."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | {"initializer_range": 0.3} | overrides))).eval()


def build_mixture(kind: str = "mixtral", seed: int = 0, **overrides: object) -> PreTrainedModel:
    """Returns a random mixture of four experts, of which each token is sent to two. The load-balancing loss counts more
    than by default, so that a wrong one shows."""
    counts = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    more = {"sliding_window": None, "router_aux_loss_coef": 0.1, "initializer_range": 0.3}
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | counts | more | overrides))).eval()


@pytest.fixture(scope="session")
def make_mixture() -> Callable[..., PreTrainedModel]:
    return build_mixture


@pytest.fixture(scope="session")
def sizes() -> dict[str, int]:
    return SIZES


@pytest.fixture(scope="session")
def make_policy() -> Callable[..., PreTrainedModel]:
    return build_policy


@pytest.fixture
def policy() -> PreTrainedModel:
    return build_policy()


def build_groups(num_groups: int, num_completions: int, *, seed: int = 0) -> list[EncodedGroup]:
    """Returns groups of random token ids with different lengths. Every completion of the first group has one token."""
    rng = random.Random(seed)

    def ids(most: int) -> list[int]:
        return [rng.randrange(5, VOCABULARY) for _ in range(rng.randint(1, most))]

    groups = [
        EncodedGroup(ids(20), tuple(ids(12) for _ in range(num_completions)), None, line + 1)
        for line in range(num_groups)
    ]
    return [replace(groups[0], completion_ids=tuple(c[:1] for c in groups[0].completion_ids)), *groups[1:]]


def score(groups: list[EncodedGroup], reference: PreTrainedModel) -> list[EncodedGroup]:
    return score_reference(reference, groups, max_tokens_per_pack=8192)


@pytest.fixture(scope="session")
def make_groups() -> Callable[..., list[EncodedGroup]]:
    return build_groups


@pytest.fixture(scope="session")
def scored() -> Callable[[list[EncodedGroup], PreTrainedModel], list[EncodedGroup]]:
    return score


@pytest.fixture(scope="session")
def pairs() -> list[EncodedGroup]:
    """Returns eight pairs with the log-probabilities of a reference that differs from the policy."""
    return score(build_groups(8, 2), build_policy(1))


@pytest.fixture(scope="session")
def demonstrations() -> list[EncodedGroup]:
    return build_groups(8, 1)


@pytest.fixture(scope="session")
def plain_token_logps() -> Callable[[PreTrainedModel, EncodedGroup], list[torch.Tensor]]:
    """Returns a function that computes token log-probabilities with transformers alone.

    It runs one forward pass for each full sequence, and computes all its logits.
    """

    def logps(policy: PreTrainedModel, group: EncodedGroup) -> list[torch.Tensor]:
        found = []
        for completion in group.completion_ids:
            whole = torch.tensor([[*group.prompt_ids, *completion]])
            logps = policy(input_ids=whole).logits[0, :-1].log_softmax(-1).gather(1, whole[0, 1:, None])[:, 0]
            found.append(logps[len(group.prompt_ids) - 1 :])
        return found

    return logps
