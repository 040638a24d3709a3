import copy
import json
from pathlib import Path

import pytest

from dpo_core.data.feedback import read_groups
from dpo_core.data.groups import Group
from dpo_core.data.jsonl import InvalidRow
from dpo_core.encoding.encode import EncodedGroup, Outline, encode_group, encode_groups

SHARED_DATA = Path(__file__).parents[4] / "shared" / "data"

USER = {"role": "user", "content": "the quick fox"}
GOOD = {"role": "assistant", "content": "jumps"}
BAD = {"role": "assistant", "content": "is lazy"}
PAIR = Group([USER], ([GOOD], [BAD]), 3)


@pytest.fixture
def own_tokenizer(tokenizer):
    """Returns a copy of the tokenizer, which a test may change."""
    return copy.deepcopy(tokenizer)


def test_a_chat_is_the_templates_rendering_cut_after_the_prompt(tokenizer):
    encoded = encode_group(PAIR, tokenizer)
    assert tokenizer.decode(encoded.prompt_ids) == "<s><|user|>\nthe quick fox\n<|assistant|>\n"
    assert [tokenizer.decode(ids) for ids in encoded.completion_ids] == ["jumps</s>\n", "is lazy</s>\n"]
    assert (encoded.ref_logps, encoded.line) == (None, 3)


def test_the_prompts_ids_are_what_a_server_gives_the_policy(tokenizer):
    served = tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    assert encode_group(PAIR, tokenizer).prompt_ids == served


def test_bos_and_eos_are_written_once(tokenizer):
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
def test_texts_begin_with_one_bos_if_the_tokenizer_wants_one(own_tokenizer, prompt):
    from tokenizers.processors import TemplateProcessing

    own_tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    encoded = encode_group(Group(prompt, ("jumps", "sleeps"), 1), own_tokenizer)
    assert own_tokenizer.decode(encoded.prompt_ids) == "<s>the fox "


def test_texts_get_no_bos_if_the_tokenizer_wants_none(tokenizer):
    assert tokenizer.decode(encode_group(Group("the fox ", ("jumps",), 1), tokenizer).prompt_ids) == "the fox "


def test_a_token_across_the_border_leaves_the_prompts_ids_whole(tokenizer):
    whole = tokenizer("fox\n\n", add_special_tokens=False).input_ids
    prompt = tokenizer("fox\n", add_special_tokens=False).input_ids
    assert whole[: len(prompt)] != prompt  # two line feeds are one token
    encoded = encode_group(Group("fox\n", ("\njumps",), 1), tokenizer)
    assert encoded.prompt_ids == prompt
    assert tokenizer.decode([*encoded.prompt_ids, *encoded.completion_ids[0]]) == "fox\n\njumps</s>"


HERMES_TEMPLATE = (
    "{% if tools %}<|system|>\nTools:{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}</s>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}<|user|>{% endif %}"
    "{{ '\n' }}<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}</s>\n{% endif %}"
    "{% else %}<|{{ m.role }}|>\n{{ m.content }}{% for call in m.tool_calls %}{{ '\n' }}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}</s>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "jump", "parameters": {"type": "object", "properties": {}}}}]


def calls(*arguments: str) -> dict[str, object]:
    made = [
        {"id": f"call_{i}", "type": "function", "function": {"name": "jump", "arguments": text}}
        for i, text in enumerate(arguments)
    ]
    return {"role": "assistant", "content": None, "tool_calls": made}


def answer(id: str) -> dict[str, str]:
    return {"role": "tool", "tool_call_id": id, "content": "over the dog"}


def test_prompt_and_completion_are_the_templates_rendering_of_the_whole_conversation_with_tools(own_tokenizer):
    own_tokenizer.chat_template = HERMES_TEMPLATE
    asked = [USER, calls('{"over": "dog"}', '{"über": ["ü", 1.5, null]}'), answer("call_0"), answer("call_1")]
    row = {
        "input": {"messages": asked, "tools": TOOLS},
        "preferred_output": [GOOD],
        "non_preferred_output": [calls('{"over": "fox", "by": {"foot": true}}')],
    }
    (group,) = read_groups([json.dumps(row).encode()])
    encoded = encode_group(group, own_tokenizer)
    for ids, completion in zip(encoded.completion_ids, group.completions, strict=True):
        whole = own_tokenizer.apply_chat_template([*group.prompt, *completion], tools=TOOLS, return_dict=False)
        assert [*encoded.prompt_ids, *ids] == whole
    prompt, rejected = own_tokenizer.decode(encoded.prompt_ids), own_tokenizer.decode(encoded.completion_ids[1])
    assert prompt.startswith(f"<|system|>\nTools:\n{json.dumps(TOOLS[0])}</s>\n<|user|>\nthe quick fox</s>\n")
    assert '{"name": "jump", "arguments": {"über": ["ü", 1.5, null]}}' in prompt
    assert prompt.endswith("<tool_response>\nover the dog\n</tool_response></s>\n<|assistant|>\n")
    assert rejected == (
        '\n<tool_call>\n{"name": "jump", "arguments": {"over": "fox", "by": {"foot": true}}}\n</tool_call></s>\n'
    )


def test_only_the_assistants_messages_of_a_completion_are_learned(own_tokenizer):
    own_tokenizer.chat_template = HERMES_TEMPLATE
    both = [calls('{"over": "dog"}', '{"under": "fox"}'), answer("call_0"), answer("call_1"), GOOD, USER, BAD]
    row = {"input": {"messages": [USER], "tools": TOOLS}, "preferred_output": both, "non_preferred_output": [BAD]}
    (group,) = read_groups([json.dumps(row).encode()])
    encoded = encode_group(group, own_tokenizer)
    whole = own_tokenizer.apply_chat_template([USER, *group.completions[0]], tools=TOOLS, return_dict=False)
    ids = encoded.completion_ids[0]
    assert [*encoded.prompt_ids, *ids] == whole
    spans = encoded.others[0]
    said = "\n<tool_response>\nover the dog\n</tool_response>"
    assert [own_tokenizer.decode(ids[start:stop]) for start, stop in spans] == [
        f"<|user|>{said * 2}</s>\n<|assistant|>\n",
        "<|user|>\nthe quick fox</s>\n<|assistant|>\n",
    ]
    learned = own_tokenizer.decode([ids[i] for i in encoded.learned(0)])
    assert learned.endswith("\n</tool_call></s>\njumps</s>\nis lazy</s>\n")
    assert (encoded.others[1], encoded.num_learned[1]) == ((), len(encoded.completion_ids[1]))


def test_a_template_that_rewrites_an_answer_once_others_follow_is_refused_by_line(own_tokenizer):
    own_tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content if loop.last or m.role == 'user' else m.content | upper }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    group = Group([USER], ([GOOD, USER, BAD], [BAD]), 3)
    with pytest.raises(InvalidRow, match="Line 3: the chat template changes the text of an answer"):
        encode_group(group, own_tokenizer)


def test_a_group_without_tools_is_rendered_without_them(own_tokenizer):
    own_tokenizer.chat_template = HERMES_TEMPLATE
    assert "Tools:" not in own_tokenizer.decode(encode_group(PAIR, own_tokenizer).prompt_ids)


def test_a_template_that_rewrites_the_prompt_is_refused_by_line(own_tokenizer):
    own_tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ messages | length }}{% endfor %}"
    with pytest.raises(InvalidRow, match=r"Line 3: the chat template changes the text of the prompt .* '1' becomes '2"):
        encode_group(PAIR, own_tokenizer)


def test_a_template_that_refuses_the_messages_is_quoted_by_line(own_tokenizer):
    own_tokenizer.chat_template = "{{ raise_exception('Roles must alternate') }}"
    with pytest.raises(InvalidRow, match=r"Line 3: the chat template refuses the messages \(Roles must alternate\)"):
        encode_group(PAIR, own_tokenizer)


def test_groups_together_become_what_each_becomes_alone(own_tokenizer):
    own_tokenizer.chat_template = (
        "{% for m in messages %}{% if 'is lazy' in m.content %}{{ raise_exception('No.') }}{% endif %}"
        "{{ tools and tools | tojson }}{{ m.content }}{{ '#' if 'sleeps' in messages[-1].content }}{{ eos_token }}"
        "{% endfor %}"
    )
    well, rewritten, refused = ([GOOD], [GOOD]), ([{**GOOD, "content": "sleeps"}], [GOOD]), ([GOOD], [BAD])
    kinds = [
        Group([USER], well, 1),
        Group([USER], rewritten, 1),
        Group("the dog", ("jumps", "sleeps"), 1),
        Group([USER], well, 1, tools=TOOLS),
        Group([USER], ([GOOD],), 1),
    ]
    for some in (kinds * 50, [*kinds, Group([USER], refused, 1), *kinds]):
        together = [str(found) for found in encode_groups(some, own_tokenizer)]
        alone = {id(group): str(next(encode_groups([group], own_tokenizer))) for group in some}
        assert together == [alone[id(group)] for group in some]
        assert sum("changes the text of the prompt" in found for found in together) == some.count(kinds[1])
        assert sum("refuses the messages (No" in found for found in together) == len(some) % 5


def test_a_tokenizer_that_was_asked_to_cut_and_to_pad_encodes_whole_texts(tokenizer, own_tokenizer):
    own_tokenizer("the quick fox", max_length=2, truncation=True, padding="max_length")
    assert encode_group(PAIR, own_tokenizer) == encode_group(PAIR, tokenizer)


def test_a_tokenizer_with_a_call_of_its_own_is_called(own_tokenizer):
    class Own(type(own_tokenizer)):
        def _encode_plus(self, text, **options):
            return super()._encode_plus([one.replace("fox", "dog") for one in text], **options)

    own_tokenizer.__class__ = Own
    assert "the quick dog" in own_tokenizer.decode(encode_group(PAIR, own_tokenizer).prompt_ids)


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


def test_an_outline_has_all_but_the_ids_of_its_group_and_makes_the_group_again():
    group = EncodedGroup([7, 8], ([5], [6, 5, 4]), (-1.0, -2.5), 3, weight=0.5, others=((), ((0, 1),)))
    outline = Outline.of(group, place="here")
    assert (outline.prompt_ids, outline.completion_ids, outline.place) == (range(2), (range(1), range(3)), "here")
    assert (outline.num_tokens, outline.num_learned, outline.head_length) == (6, [1, 2], 1)
    assert outline.with_ids(group.prompt_ids, group.completion_ids) == group
    assert Outline.of(outline) == Outline.of(group)
