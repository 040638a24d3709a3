import copy
from pathlib import Path

import pytest

from dpo_core.encode import encode_group
from dpo_core.feedback import read_groups
from dpo_core.formats import Group
from dpo_core.jsonl import InvalidRow

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"

USER = {"role": "user", "content": "the quick fox"}
GOOD = {"role": "assistant", "content": "jumps"}
BAD = {"role": "assistant", "content": "is lazy"}
PAIR = Group([USER], ([GOOD], [BAD]), 3)


@pytest.fixture
def own_tokenizer(tokenizer):
    """One that a test may change."""
    return copy.deepcopy(tokenizer)


def test_a_chat_is_the_templates_rendering_cut_after_the_prompt(tokenizer):
    encoded = encode_group(PAIR, tokenizer)
    assert tokenizer.decode(encoded.prompt_ids) == "<s><|user|>\nthe quick fox\n<|assistant|>\n"
    assert [tokenizer.decode(ids) for ids in encoded.completion_ids] == ["jumps</s>\n", "is lazy</s>\n"]
    assert (encoded.ref_logps, encoded.line) == (None, 3)


def test_the_prompts_ids_are_what_a_server_gives_the_policy(tokenizer):
    served = tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    assert encode_group(PAIR, tokenizer).prompt_ids == served


def test_bos_and_eos_stand_once(tokenizer):
    encoded = encode_group(PAIR, tokenizer)
    for completion in encoded.completion_ids:
        whole = [*encoded.prompt_ids, *completion]
        assert whole.count(tokenizer.bos_token_id) == 1
        assert whole.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("chosen", ["jumps", "jumps</s>"])
def test_texts_end_with_one_eos(tokenizer, chosen):
    encoded = encode_group(Group("the fox ", (chosen, "sleeps"), 1), tokenizer)
    assert [tokenizer.decode(ids) for ids in encoded.completion_ids] == ["jumps</s>", "sleeps</s>"]


@pytest.mark.parametrize("prompt", ["the fox ", "<s>the fox "])
def test_texts_begin_with_one_bos_where_the_tokenizer_wants_one(own_tokenizer, prompt):
    from tokenizers.processors import TemplateProcessing

    own_tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    encoded = encode_group(Group(prompt, ("jumps", "sleeps"), 1), own_tokenizer)
    assert own_tokenizer.decode(encoded.prompt_ids) == "<s>the fox "


def test_texts_get_no_bos_where_the_tokenizer_wants_none(tokenizer):
    assert tokenizer.decode(encode_group(Group("the fox ", ("jumps",), 1), tokenizer).prompt_ids) == "the fox "


def test_a_token_across_the_border_leaves_the_prompts_ids_whole(tokenizer):
    whole = tokenizer("fox\n\n", add_special_tokens=False).input_ids
    prompt = tokenizer("fox\n", add_special_tokens=False).input_ids
    assert whole[: len(prompt)] != prompt  # two line feeds are one token
    encoded = encode_group(Group("fox\n", ("\njumps",), 1), tokenizer)
    assert encoded.prompt_ids == prompt
    assert tokenizer.decode([*encoded.prompt_ids, *encoded.completion_ids[0]]) == "fox\n\njumps</s>"


def test_a_template_that_rewrites_the_prompt_is_refused_by_line(own_tokenizer):
    own_tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(InvalidRow, match="Line 3: the chat template renders the prompt differently"):
        encode_group(PAIR, own_tokenizer)


def test_a_template_that_refuses_the_messages_is_quoted_by_line(own_tokenizer):
    own_tokenizer.chat_template = "{{ raise_exception('Roles must alternate') }}"
    with pytest.raises(InvalidRow, match="Line 3: the chat template refuses the messages: Roles must alternate"):
        encode_group(PAIR, own_tokenizer)


def test_a_template_that_reaches_out_of_its_sandbox_is_refused(own_tokenizer):
    own_tokenizer.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(InvalidRow) as refused:
        encode_group(PAIR, own_tokenizer)
    assert refused.value.code == "template_refused"


def test_a_tokenizer_without_a_template_takes_no_chats(own_tokenizer):
    own_tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encode_group(PAIR, own_tokenizer)


def test_a_prompt_without_tokens_is_refused(tokenizer):
    with pytest.raises(InvalidRow, match="Line 4: the prompt has no tokens"):
        encode_group(Group("", ("jumps", "sleeps"), 4), tokenizer)


def test_tokens_are_counted_with_the_prompt_once(tokenizer):
    encoded = encode_group(PAIR, tokenizer)
    assert encoded.num_tokens == len(encoded.prompt_ids) + sum(map(len, encoded.completion_ids))


def test_real_pairs_survive_encoding(tokenizer):
    if not SHARED_DATA.exists():
        pytest.skip(f"{SHARED_DATA} does not exist")
    with (SHARED_DATA / "pairs.openai.jsonl").open("rb") as file:
        groups = [group for group, _ in zip(read_groups(file), range(50), strict=False)]
    for group in groups:
        encoded = encode_group(group, tokenizer)
        for ids, completion in zip(encoded.completion_ids, group.completions, strict=True):
            rendered = tokenizer.apply_chat_template([*group.prompt, *completion], tokenize=False)
            assert tokenizer.decode([*encoded.prompt_ids, *ids]) == rendered
