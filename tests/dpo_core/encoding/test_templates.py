"""Tests chat templates of every published behaviour.

Either everything that a row says is in the text that the model sees, or the row is refused. The templates are written
by hand after published ones.
"""

import json
import re
from dataclasses import replace
from datetime import date, timedelta
from functools import reduce
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dpo_core.data.feedback import read_records
from dpo_core.data.formats.formats import FORMATS
from dpo_core.data.groups import Group
from dpo_core.data.jsonl import InvalidRow
from dpo_core.data.messages import Message, Text
from dpo_core.encoding import templates
from dpo_core.encoding.encode import EncodedGroup, encode_group, encode_groups
from dpo_core.encoding.templates import prefill
from tests.dpo_core.data.formats.test_formats import ASK, BAD, GOOD, LONGER, PAIR, PROMPT, PUBLISHED, lines

EACH = "{% for m in messages %}"
ASKS = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
ENDS = "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
PLAIN = EACH + "<|{{ m.role }}|>{{ m.content }}" + ENDS + ASKS
TEMPLATES = {
    "plain": PLAIN,
    "begins with BOS": "{{ bos_token }}" + PLAIN,
    "strips": EACH + "<|{{ m.role }}|>\n{{ m.content | trim }}\n" + ENDS + ASKS,
    "strips answers only": EACH
    + "<|{{ m.role }}|>{{ m.content | trim if m.role == 'assistant' else m.content }}"
    + ENDS
    + ASKS,
    "ends every turn": EACH + "<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}" + ASKS,
    "ends no answer": EACH + "<|{{ m.role }}|>{{ m.content }}{% endfor %}" + ASKS,
    "drops the system prompt": EACH
    + "{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}{% endif %}"
    + ENDS
    + ASKS,
    "refuses the system prompt": EACH
    + "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + "<|{{ m.role }}|>{{ m.content }}"
    + ENDS
    + ASKS,
    "folds the system prompt into the first question": (
        "{% set first = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
        + EACH
        + "{% if m.role == 'user' %}<|user|>{{ first if loop.index0 <= 1 else '' }}{{ m.content }}"
        "{% elif m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}{% endif %}" + ENDS + ASKS
    ),
    "folds the system prompt into the last question": (
        "{% set first = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
        + EACH
        + "{% if m.role == 'user' %}<|user|>{{ first if loop.last else '' }}{{ m.content }}"
        "{% elif m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}{% endif %}" + ENDS + ASKS
    ),
    "wants turns to alternate": EACH
    + "{% if loop.index0 and m.role == messages[loop.index0 - 1].role %}{{ raise_exception('Alternate!') }}{% endif %}"
    + "<|{{ m.role }}|>{{ m.content }}"
    + ENDS
    + ASKS,
    "drops thoughts": EACH + "<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}" + ENDS + ASKS,
    "drops earlier thoughts": EACH
    + "<|{{ m.role }}|>{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
    + ENDS
    + ASKS,
    "begins answers with a thought": PLAIN.replace(
        ASKS, "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    ),
    "writes thoughts of their own field": EACH
    + "<|{{ m.role }}|>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    + ENDS
    + ASKS,
    "writes gpt-oss's field": EACH
    + "<|{{ m.role }}|>{% if m.thinking %}[{{ m.thinking }}]{% endif %}{{ m.content }}"
    + ENDS
    + ASKS,
    "takes parts": EACH
    + "<|{{ m.role }}|>{% for part in m['content'] %}"
    + "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    + ENDS
    + ASKS,
    "counts the messages": "{{ messages | length }}" + PLAIN,
    "drops the last word": EACH + "<|{{ m.role }}|>{{ m.content.split(' ')[:-1] | join(' ') }}" + ENDS + ASKS,
    "writes capitals": EACH + "<|{{ m.role }}|>{{ m.content | upper }}" + ENDS + ASKS,
    "writes nothing": "x",
    "joins words with one space": EACH + "<|{{ m.role }}|>{{ m.content.split() | join(' ') }}" + ENDS + ASKS,
    "writes small letters": EACH + "<|{{ m.role }}|>{{ m.content | lower }}" + ENDS + ASKS,
    "writes roles in capitals": PLAIN.replace("m.role }}", "m.role | upper }}").replace(
        "<|assistant|>", "<|ASSISTANT|>"
    ),
    "numbers rounds": EACH
    + "[Round {{ loop.index0 // 2 }}]<|{{ m.role }}|>{{ m.content }}"
    + ENDS
    + "{% if add_generation_prompt %}[Round {{ (messages | length) // 2 }}]<|assistant|>{% endif %}",
    "numbers rounds from the end": PLAIN.replace("<|{{", "[{{ loop.revindex }}]<|{{"),
    "writes tools into the first question": EACH
    + "<|{{ m.role }}|>{% if loop.first and tools %}{{ tools | tojson }}\n{% endif %}{{ m.content }}"
    + "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    + ENDS
    + ASKS,
    "writes the names of tools": "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}" + PLAIN,
    "writes texts of calls": EACH
    + "<|{{ m.role }}|>{{ m.content }}{% for call in m.tool_calls or [] %}[{{ call.function.name }}"
    + "{% for key, value in call.function.arguments.items() %} {{ key }}{{ value if value is string }}{% endfor %}]"
    + "{% endfor %}"
    + ENDS
    + ASKS,
    "writes the names of calls": "{{ tools | tojson if tools else '' }}"
    + EACH
    + "<|{{ m.role }}|>{{ m.content }}{% for call in m.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}"
    + ENDS
    + ASKS,
    "takes one system prompt": EACH
    + "{% if m.role == 'system' and loop.index0 %}{{ raise_exception('Only one system message') }}{% endif %}"
    + "<|{{ m.role }}|>{{ m.content }}"
    + ENDS
    + ASKS,
    "writes ChatML without line feeds": EACH
    + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "marks what is generated": EACH
    + "<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    + "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    + ASKS,
    "drops the last answer": "{% set messages = messages[:-1] if messages[-1].role == 'assistant' else messages %}"
    + PLAIN,
    "adds a system prompt": "{% if messages[0].role != 'system' %}<|system|>Be kind.{% endif %}" + PLAIN,
    "writes its own system prompt": "<|system|>Be kind."
    + PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),
    "writes the system prompt twice": "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    + PLAIN,
    "writes contents as JSON": PLAIN.replace("m.content }}", "m.content | tojson }}"),
    "escapes HTML": PLAIN.replace("m.content }}", "m.content | e }}"),
    "renames the tags of thoughts": PLAIN.replace(
        "m.content }}", "m.content | replace('<think>', '[THINK]') | replace('</think>', '[/THINK]') }}"
    ),
    "keeps the last question": "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    "<|user|>{{ asked[-1].content }}{% if messages[-1].role == 'assistant' %}<|assistant|>{{ messages[-1].content }}"
    "{{ eos_token }}{% endif %}" + ASKS,
    "needs a BOS": "{{ bos_token + '' }}" + PLAIN,
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Answer in Dutch."}
QUESTION = user("the quick brown fox?")


@pytest.fixture
def templated(tokenizer: PreTrainedTokenizerFast) -> Any:
    """Returns a function that returns the tokenizer with the named template."""
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )

    def with_template(name: str) -> PreTrainedTokenizerFast:
        own.chat_template = TEMPLATES[name]
        own.__dict__["_name"] = name
        return own

    return with_template


def encoded(group: Group, tokenizer: PreTrainedTokenizerFast) -> EncodedGroup | InvalidRow:
    (found,) = encode_groups([group], _fresh(tokenizer))
    return found


def _fresh(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Returns a copy of the tokenizer, for which nothing is cached yet."""
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    own.chat_template = tokenizer.chat_template
    return own


def seen(group: Group, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Returns the prompt and the completions as text that the model sees."""
    found = encode_group(group, _fresh(tokenizer))
    return [tokenizer.decode(ids) for ids in (found.prompt_ids, *found.completion_ids)]


CHOSEN, REJECTED = [assistant("jumps over the dog")], [assistant("sleeps")]
PAIRED = Group([QUESTION], (CHOSEN, REJECTED), 7)
WITH_SYSTEM = Group([SYSTEM, QUESTION], (CHOSEN, REJECTED), 7)
FIND = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "find", "arguments": {"city": "Zürich", "near": ['a "b"']}}}
DESCRIBED = {"type": "function", "function": {"name": "find", "description": 'Finds "x".'}}
WITH_CITY = {"type": "function", "function": {"name": "find", "parameters": {"properties": {"city": {}}}}}
WITH_TOOLS = Group([QUESTION], (CHOSEN, REJECTED), 7, tools=[FIND])
CALLING = Group([QUESTION], ([{**assistant(""), "tool_calls": [CALL]}], REJECTED), 7, tools=[FIND])
COUNT = {"type": "function", "function": {"name": "find", "arguments": {"n": 573}}}
CALLING_WITH_NUMBER = Group([QUESTION], ([{**assistant(""), "tool_calls": [COUNT]}], REJECTED), 7)
AGAIN = [user("jumps"), assistant("jumps"), user("jumps")]
MARKUP = Group([user("What is <b>?")], ([assistant('Bold & "strong".')], REJECTED), 7)


@pytest.mark.parametrize(
    ("name", "group", "code", "said"),
    [
        (
            "drops the system prompt",
            WITH_SYSTEM,
            "template_drops_text",
            "message 1 of the prompt, by system: 'Answer in",
        ),
        ("refuses the system prompt", WITH_SYSTEM, "template_refused", "System role not supported"),
        (
            "drops thoughts",
            Group([QUESTION], ([assistant("<think>Two.</think>4")], [assistant("<think>No.</think>4")]), 7),
            "template_drops_text",
            "of a completion: 'Two.'",
        ),
        (
            "plain",
            Group([QUESTION], ([assistant("4", reasoning_content="Two and two.")], REJECTED), 7),
            "template_drops_thoughts",
            "of a completion: 'Two and two.'",
        ),
        ("drops the last word", PAIRED, "template_drops_text", "message 1 of the prompt, by user"),
        ("writes nothing", PAIRED, "template_drops_text", "message 1 of the prompt, by user"),
        ("writes small letters", WITH_SYSTEM, "template_drops_text", "leaves out or changes text of message 1"),
        ("writes its own system prompt", WITH_SYSTEM, "template_drops_text", "by system: 'Answer in Dutch.'"),
        ("drops the last answer", PAIRED, "template_drops_text", "of a completion: 'jumps over the dog'"),
        ("writes contents as JSON", MARKUP, "template_drops_text", "of a completion: 'Bold"),
        ("escapes HTML", MARKUP, "template_drops_text", "message 1 of the prompt, by user: 'What is <b>?'"),
        (
            "keeps the last question",
            Group(AGAIN, (CHOSEN, REJECTED), 7),
            "template_drops_text",
            "message 1 of the prompt",
        ),
        (
            "keeps the last question",
            Group([user("dog"), assistant("fox"), user("a dog or a fox?")], (CHOSEN, REJECTED), 7),
            "template_drops_text",
            "message 1 of the prompt, by user: 'dog'",
        ),
        (
            "plain",
            WITH_TOOLS,
            "template_drops_tools",
            "the tool 'find' or a part of it; use a chat template that writes tools",
        ),
        (
            "plain",
            replace(WITH_TOOLS, prompt=[user("find the fox")]),
            "template_drops_tools",
            "leaves out the tool 'find'",
        ),
        ("writes the names of tools", replace(WITH_TOOLS, tools=[DESCRIBED]), "template_drops_tools", "a part of it"),
        ("writes the names of tools", replace(WITH_TOOLS, tools=[WITH_CITY]), "template_drops_tools", "a part of it"),
        (
            "writes texts of calls",
            CALLING_WITH_NUMBER,
            "template_drops_calls",
            "leaves out tool calls, or a part of them",
        ),
        ("writes the names of calls", CALLING, "template_drops_calls", "leaves out tool calls, or a part of them"),
        (
            "takes one system prompt",
            Group([SYSTEM, SYSTEM, QUESTION], (CHOSEN, REJECTED), 7),
            "template_refused",
            "Only one system message",
        ),
        ("numbers rounds from the end", PAIRED, "template_not_prefix", "'1]<|user|>the quick"),
    ],
)
def test_a_row_that_the_template_does_not_write_whole_is_refused_by_line(templated, name, group, code, said):
    found = encoded(group, templated(name))
    assert isinstance(found, InvalidRow)
    assert (found.line, found.code) == (7, code)
    assert said in found.message


@pytest.mark.parametrize(
    ("name", "group", "words"),
    [
        (
            "begins answers with a thought",
            PAIRED,
            ["<|user|>the quick brown fox?<|assistant|>", "jumps over the dog</s>", "sleeps</s>"],
        ),
        (
            "begins answers with a thought",
            Group([QUESTION], ([assistant("<think>\nTwo.</think>4")], [assistant("<think>\nNo.</think>5")]), 7),
            ["<|user|>the quick brown fox?<|assistant|><think>\n", "Two.</think>4</s>", "No.</think>5</s>"],
        ),
        (
            "begins answers with a thought",
            Group([QUESTION], ([assistant("<b>4</b>")], [assistant("<i>5</i>")]), 7),
            ["<|user|>the quick brown fox?<|assistant|>", "<b>4</b></s>", "<i>5</i></s>"],
        ),
        (
            "folds the system prompt into the last question",
            WITH_SYSTEM,
            ["<|user|>Answer in Dutch.\n\nthe quick brown fox?<|assistant|>", "jumps over the dog</s>", "sleeps</s>"],
        ),
        ("takes parts", PAIRED, ["<|user|>the quick brown fox?<|assistant|>", "jumps over the dog</s>", "sleeps</s>"]),
        (
            "writes gpt-oss's field",
            Group([QUESTION], ([assistant("4", reasoning_content="Two.")], REJECTED), 7),
            ["<|user|>the quick brown fox?<|assistant|>", "[Two.]4</s>", "sleeps</s>"],
        ),
        (
            "drops earlier thoughts",
            Group([user("a"), assistant("<think>Two.</think>4"), user("b")], (CHOSEN, REJECTED), 7),
            ["<|user|>a<|assistant|>4</s><|user|>b<|assistant|>", "jumps over the dog</s>", "sleeps</s>"],
        ),
        (
            "joins words with one space",
            Group([user("the  quick\nfox?")], (CHOSEN, REJECTED), 7),
            ["<|user|>the quick fox?<|assistant|>", "jumps over the dog</s>", "sleeps</s>"],
        ),
        (
            "writes roles in capitals",
            PAIRED,
            ["<|USER|>the quick brown fox?<|ASSISTANT|>", "jumps over the dog</s>", "sleeps</s>"],
        ),
        (
            "numbers rounds",
            Group(AGAIN, (CHOSEN, REJECTED), 7),
            [
                "[Round 0]<|user|>jumps[Round 0]<|assistant|>jumps</s>[Round 1]<|user|>jumps[Round 1]<|assistant|>",
                "jumps over the dog</s>",
                "sleeps</s>",
            ],
        ),
        (
            "writes ChatML without line feeds",
            PAIRED,
            [
                "<|im_start|>user\nthe quick brown fox?<|im_end|><|im_start|>assistant\n",
                "jumps over the dog<|im_end|>",
                "sleeps<|im_end|>",
            ],
        ),
        (
            "marks what is generated",
            PAIRED,
            ["<|user|>the quick brown fox?<|assistant|>", "jumps over the dog</s>", "sleeps</s>"],
        ),
        (
            "adds a system prompt",
            PAIRED,
            ["<|system|>Be kind.<|user|>the quick brown fox?<|assistant|>", "jumps over the dog</s>", "sleeps</s>"],
        ),
        (
            "writes the system prompt twice",
            WITH_SYSTEM,
            [
                "Answer in Dutch.<|system|>Answer in Dutch.<|user|>the quick brown fox?<|assistant|>",
                "jumps over the dog</s>",
                "sleeps</s>",
            ],
        ),
        (
            "renames the tags of thoughts",
            Group([QUESTION], ([assistant("<think>Two.</think>4")], REJECTED), 7),
            ["<|user|>the quick brown fox?<|assistant|>", "[THINK]Two.[/THINK]4</s>", "sleeps</s>"],
        ),
        (
            "counts the messages",
            PAIRED,
            ["1<|user|>the quick brown fox?<|assistant|>", "jumps over the dog</s>", "sleeps</s>"],
        ),
    ],
)
def test_a_row_is_learned_as_the_policy_will_be_asked(templated, name, group, words):
    assert seen(group, templated(name)) == words


@pytest.mark.parametrize(("name", "words"), [("begins answers with a thought", "<think>\n"), ("plain", "")])
def test_the_words_that_begin_every_answer_are_found(templated, name, words):
    assert prefill(templated(name)) == words


def test_tools_and_calls_are_seen_whole(templated):
    prompt, call, _ = seen(CALLING, templated("writes tools into the first question"))
    assert prompt.endswith('"properties": {}}}}]\nthe quick brown fox?<|assistant|>')
    assert json.loads(call.removesuffix("</s>")) == [CALL]


def test_a_template_that_asks_for_a_bos_sees_that_the_tokenizer_has_none(tokenizer):
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", pad_token="</s>")
    own.chat_template = TEMPLATES["needs a BOS"]
    (found,) = encode_groups([PAIRED], own)
    assert (found.line, found.code) == (7, "template_refused")
    assert "'bos_token' is undefined" in found.message


def test_arguments_of_a_row_are_given_to_the_template(templated, tokenizer):
    own = _fresh(tokenizer)
    own.chat_template = PLAIN.replace(
        "<|assistant|>{% endif %}", "<|assistant|>{{ '' if thinks else '<think></think>' }}{% endif %}"
    )
    group = Group([QUESTION], (CHOSEN, REJECTED), 7, template_arguments={"thinks": True})
    assert seen(group, own)[0].endswith("<|assistant|>")


WRITES_NAMES = EACH + "<|{{ m.role }}|>{{ m.name + ': ' if m.name else '' }}{{ m.content }}" + ENDS + ASKS
NAMED = Group([user("fox?") | {"name": "Ann"}], (CHOSEN, REJECTED), 7)
ANSWERED_BY_NAME = Group([QUESTION], ([assistant("4", name="Bob")], REJECTED), 7)
CALLED = [{**assistant(""), "tool_calls": [CALL]}, {"role": "tool", "content": "dog", "name": "find"}]
ASKED_TWICE = [{**CALL, "id": "a"}, {**CALL, "id": "b"}]


THINKING = {"enable_thinking": False, "reasoning_effort": "low"}


def test_a_template_that_writes_the_date_writes_one_day_beyond_midnight(tokenizer, monkeypatch):
    class Tomorrow(date):
        @classmethod
        def today(cls):
            return date.today() + timedelta(days=1)

    own = _fresh(tokenizer)
    own.chat_template = "Today: {{ strftime_now('%d %b %Y') }}" + PLAIN
    before = encode_group(PAIRED, own)
    monkeypatch.setattr(templates, "date", Tomorrow)
    assert encode_group(PAIRED, own) == before


def test_a_template_that_writes_the_date_writes_the_given_day(tokenizer):
    own = _fresh(tokenizer)
    own.chat_template = "Today: {{ strftime_now('%d %b %Y') }}" + PLAIN
    (first,) = encode_groups([PAIRED], own, today=date(2026, 11, 29))
    (second,) = encode_groups([PAIRED], own, today=date(2026, 11, 30))
    assert tokenizer.decode(first.prompt_ids).startswith("Today: 29 Nov 2026<|user|>")
    assert tokenizer.decode(second.prompt_ids).startswith("Today: 30 Nov 2026<|user|>")


WORDS = st.text("abc <>\n/|{}'\"éß", max_size=12)
DIALOGUE = f"\n\nHuman: {ASK}\n\nAssistant: "
ROWS = [
    *(row for row, _, _ in PUBLISHED.values()),
    *LONGER,
    {"messages": [*PROMPT, *PAIR[0]]},
    {"messages": [*PROMPT, *PAIR[0]], "label": False},
    {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
    {"prompt": ASK, "completion": GOOD, "label": True},
    {"prompt": PROMPT, "completion": PAIR[0], "label": False},
    {"prompt": ASK, "completions": [GOOD, BAD], "ranks": [1, 2]},
    {"prompt": PROMPT, "completions": [PAIR[1], PAIR[0]], "scores": [1, 2]},
    {"chosen": DIALOGUE + GOOD, "rejected": DIALOGUE + BAD},
    {"chosen": ASK + GOOD, "rejected": ASK + BAD},
    {"prompt": DIALOGUE, "answers": [{"answer": GOOD, "rank": 1}, {"answer": BAD, "rank": 2}]},
    {
        "instruction": ASK,
        "completions": [{"response": GOOD, "overall_score": 9}, {"response": BAD, "overall_score": 2}],
    },
    {"prompt": ASK, "response": GOOD, "helpfulness": 4},
    {"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": GOOD}]},
    {"info": {"post": ASK}, "summaries": [{"text": BAD}, {"text": GOOD}], "choice": 1},
]


def test_every_format_is_among_the_rows():
    seen = {
        record.format
        for row in (*ROWS, *({**row, "system": "Be brief."} for row in ROWS))
        for record in read_records(lines(row))
    }
    assert seen == {*FORMATS}


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    """Returns a row of a published shape with other words in it, and sometimes with a system prompt."""
    row = draw(st.sampled_from(ROWS))
    words = {ASK: "q" + draw(WORDS), GOOD: draw(WORDS) + "x", BAD: draw(WORDS)}

    def changed(value: Any) -> Any:
        if isinstance(value, str):
            return reduce(lambda text, word: text.replace(word, words[word]), words, value)
        if isinstance(value, list):
            return [changed(item) for item in value]
        return {key: changed(item) for key, item in value.items()} if isinstance(value, dict) else value

    system = draw(st.none() | st.just("").map(lambda _: "s" + draw(WORDS)))
    return {**changed(row), **({"system": system} if draw(st.booleans()) else {})}


def messages(text: Text, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def holds(text: str, said: str) -> bool:
    """Whether `text` contains what `said` says, apart from spaces, which templates change."""
    parts = re.split("</?think>", said.removesuffix("</s>"))
    return all(" ".join(part.split()) in " ".join(text.split()) for part in parts)


def check(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    (record,) = read_records(lines(row))
    if record.problem:
        assert record.problem.line == 1
        return
    (group,) = record.groups
    (found,) = encode_groups([group], _fresh(tokenizer))
    if isinstance(found, InvalidRow):
        assert found.line == 1
        return
    prompt = tokenizer.decode(found.prompt_ids)
    assert all(holds(prompt, message["content"]) for message in messages(group.prompt, "user"))
    for j, completion in enumerate(group.completions):
        ids = found.completion_ids[j]
        learned = tokenizer.decode([ids[i] for i in found.learned(j)])
        for message in messages(completion, "assistant"):
            assert holds(tokenizer.decode(ids), message["content"])
            assert holds(learned, message["content"]) == (message["role"] == "assistant")


@given(row=rows(), name=st.sampled_from(sorted(TEMPLATES)))
def test_the_model_sees_all_that_a_row_says_or_the_row_is_refused(tokenizer, row, name):
    own = _fresh(tokenizer)
    own.chat_template = TEMPLATES[name]
    check(row, own)


@pytest.mark.long
@settings(max_examples=100_000)
@given(row=rows(), name=st.sampled_from(sorted(TEMPLATES)))
def test_the_model_sees_all_that_a_hundred_thousand_rows_say(tokenizer, row, name):
    own = _fresh(tokenizer)
    own.chat_template = TEMPLATES[name]
    check(row, own)
