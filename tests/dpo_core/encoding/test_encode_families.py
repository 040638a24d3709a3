"""Tests the encoding of prompt and completion, for several families of tokenizers.

Both together must equal the whole conversation encoded at once.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dpo_core.data.groups import Group
from dpo_core.encoding.encode import encode_groups

TEXT = "the quick brown fox jumps over the lazy dog\n\nand says: «hello», 1234 times.\n\tNot  once!" * 3
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "<s>{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def sentence_piece(scheme: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL + bytes_, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


FAMILIES = {
    "byte-level": byte_level,
    "Metaspace, first": lambda: sentence_piece("first"),
    "Metaspace, always": lambda: sentence_piece("always"),
    "Metaspace, never": lambda: sentence_piece("never"),
    "unigram": unigram,
}


@pytest.fixture(scope="module", params=FAMILIES)
def backend(request: pytest.FixtureRequest) -> Tokenizer:
    return FAMILIES[request.param]()


@pytest.fixture(scope="module", params=[CHATML, LLAMA_2, LLAMA_3], ids=["ChatML", "Llama 2", "Llama 3"])
def tokenizer(backend: Tokenizer, request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    eos = "<|im_end|>" if request.param == CHATML else "</s>"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token=eos,
        unk_token="<unk>",
        chat_template=request.param,
        additional_special_tokens=SPECIAL,
    )


words = st.text(st.sampled_from(" \n\tabcdefgh.,!1«é語<|s>"), max_size=12)
contents = words.filter(str.strip)


@given(st.lists(st.tuples(words, contents, contents), min_size=1, max_size=4))
def test_ids_are_those_of_the_whole_conversation(tokenizer: PreTrainedTokenizerFast, rows: list[tuple[str, ...]]):
    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    groups = [
        Group([{"role": "user", "content": prompt}], tuple([{"role": "assistant", "content": c}] for c in both), line)
        for line, (prompt, *both) in enumerate(rows, 1)
    ]
    for group, encoded in zip(groups, encode_groups(groups, tokenizer), strict=True):
        prompt = tokenizer.apply_chat_template(group.prompt, tokenize=False, add_generation_prompt=True)
        assert encoded.prompt_ids == ids(prompt), "what a server gives the policy"
        for completion, completion_ids in zip(group.completions, encoded.completion_ids, strict=True):
            whole = tokenizer.apply_chat_template([*group.prompt, *completion], tokenize=False)
            if ids(whole)[: len(encoded.prompt_ids)] == encoded.prompt_ids:
                assert [*encoded.prompt_ids, *completion_ids] == ids(whole)
            else:  # a token would span the border
                assert completion_ids == ids(whole[len(prompt) :])
            assert completion_ids.count(tokenizer.eos_token_id) == 1
