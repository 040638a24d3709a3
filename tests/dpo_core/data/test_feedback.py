import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_core.data.feedback import read_groups, read_records
from dpo_core.data.groups import Group
from dpo_core.data.jsonl import MAX_LINE_BYTES, InvalidRow, read_lines
from dpo_core.data.survey import survey

SHARED_DATA = Path(__file__).parents[4] / "shared" / "data"

USER = {"role": "user", "content": "Hi"}
GOOD = {"role": "assistant", "content": "Hello!"}
BAD = {"role": "assistant", "content": "Go away."}
PREFERENCE = {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]}
CHAT = {"messages": [USER, GOOD, USER, BAD]}
CONVERSATIONS = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
TEXTS = {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."}


def lines(*rows: object) -> list[bytes]:
    return [json.dumps(row).encode() + b"\n" for row in rows]


def groups(*rows: object) -> list[Group]:
    return list(read_groups(lines(*rows)))


def refusal(*given: bytes) -> InvalidRow:
    with pytest.raises(InvalidRow) as caught:
        list(read_groups(given))
    return caught.value


# --- formats ---


@pytest.mark.parametrize("row", [PREFERENCE, CONVERSATIONS], ids=["OpenAI preference", "conversations"])
def test_a_pair_of_messages_is_a_group_with_chosen_first(row):
    assert groups(row) == [Group([USER], ([GOOD], [BAD]), 1)]


def test_a_pair_of_texts_is_a_group_of_texts():
    assert groups(TEXTS) == [Group("Hi", ("Hello!", "Go away."), 1)]


def test_the_older_names_of_the_outputs_are_aliases():
    row = {
        "input": PREFERENCE["input"],
        "preferred_completion": PREFERENCE["preferred_output"],
        "non_preferred_completion": PREFERENCE["non_preferred_output"],
    }
    assert groups(row) == groups(PREFERENCE)


def test_every_assistant_message_of_a_chat_is_a_demonstration_for_the_messages_before_it():
    assert groups(CHAT) == [Group([USER], ([GOOD],), 1), Group([USER, GOOD, USER], ([BAD],), 1)]


def test_an_assistant_message_of_weight_0_is_only_read():
    silenced = {"messages": [USER, {**GOOD, "weight": 0}, USER, {**BAD, "weight": 1}]}
    assert groups(silenced) == [Group([USER, GOOD, USER], ([BAD],), 1)]


def test_byte_order_mark_crlf_and_blank_lines_are_harmless():
    given = [b"\xef\xbb\xbf" + lines(TEXTS)[0], b"\r\n", lines(TEXTS)[0].replace(b"\n", b"\r\n"), b" \n"]
    assert [group.line for group in read_groups(given)] == [1, 3]


def test_lines_of_a_part_are_numbered_from_where_it_begins():
    assert [group.line for group in read_groups(lines(TEXTS), first_line=7)] == [7]


@pytest.mark.parametrize("name", ["pairs.openai.jsonl", "pairs.trl.jsonl"])
def test_real_pairs_are_read(name):
    if not SHARED_DATA.exists():
        pytest.skip(f"{SHARED_DATA} does not exist")
    with (SHARED_DATA / name).open("rb") as file:
        report = survey(read_lines(file))
    assert (report.kind, report.num_rows, report.num_groups) == ("pairs", 300, 300)


def test_the_same_pairs_in_two_formats_are_the_same_groups():
    if not SHARED_DATA.exists():
        pytest.skip(f"{SHARED_DATA} does not exist")
    with (SHARED_DATA / "pairs.openai.jsonl").open("rb") as openai, (SHARED_DATA / "pairs.trl.jsonl").open("rb") as trl:
        assert list(read_groups(openai)) == list(read_groups(trl))


ESCAPES = (r"\u00e9", r"\u0000", r"\uD800", r"\udc00", r"\ud83d\ude00", r"\\u0000", "\x01", "\0", '"')
texts = st.sampled_from([f'"{text}"' for text in ("a b", "é", *ESCAPES)])
values = st.recursive(
    texts | st.sampled_from(["1", "null", "NaN", "-Infinity", "9" * 5000, "\ufeff"]),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: "[" + ",".join(items) + "]")
        | st.lists(st.tuples(texts, inner), max_size=3).map(lambda items: "{" + ",".join(map(":".join, items)) + "}")
    ),
    max_leaves=3,
)
keys = st.sampled_from(['"one"', '"two"', '"margin"']) | texts


@given(st.lists(st.tuples(keys, values), max_size=2))
def test_the_fast_and_the_careful_parser_read_a_row_the_same_way(items):
    """A row with many brackets is read by the careful parser, even if the brackets are inside a text."""
    sides = ['"prompt": "a"', '"chosen": "b"', '"rejected": "c"']
    items = [f"{key}: {value}" for key, value in items]
    line, brackets = ("{" + ",".join([*sides, *items, f'"brackets": "{text}"']) + "}" for text in ("", "[" * 64))
    swift, close = (next(read_records([text.encode()])) for text in (line, brackets))
    assert (swift.format, swift.groups, swift.ignored_keys) == (close.format, close.groups, close.ignored_keys)
    assert str(swift.problem) == str(close.problem)


# --- report ---


def test_the_report_counts_rows_groups_and_identical_pairs():
    report = survey(lines(TEXTS, {**TEXTS, "rejected": TEXTS["chosen"]}))
    assert (report.format, report.kind) == ("prompt/chosen/rejected texts", "pairs")
    assert (report.num_rows, report.num_groups, report.num_identical) == (2, 2, 1)


def test_the_report_of_chats_counts_demonstrations():
    report = survey(lines(CHAT))
    assert (report.kind, report.num_rows, report.num_groups, report.num_identical) == ("demonstrations", 1, 2, 0)


def test_the_report_names_columns_that_nothing_reads():
    assert survey(lines(TEXTS, {**TEXTS, "score": 3})).ignored_keys == ("score",)


# --- refusals of bytes ---


@pytest.mark.parametrize(
    ("line", "pointer", "code"),
    [
        (b"[1, 2]", "", "invalid_jsonl"),
        (b'"text"', "", "invalid_jsonl"),
        (b'{"prompt": ', "", "invalid_jsonl"),
        (b'{"prompt": "a\0b"}', "", "invalid_jsonl"),
        (b"{} {}", "", "invalid_jsonl"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "", "invalid_jsonl"),
        (b'{"prompt": "\xff"}', "", "invalid_utf8"),
        (json.dumps(TEXTS).encode("utf-16"), "", "invalid_utf8"),
        (b'{"prompt": "a", "prompt": "b"}', "/prompt", "duplicate_key"),
        (b'{"prompt": [{"a/b": 1, "a/b": 2}]}', "/prompt/0/a~1b", "duplicate_key"),
        (b'{"prompt": [0, Infinity]}', "/prompt/1", "invalid_number"),
        (b'{"prompt": -Infinity}', "/prompt", "invalid_number"),
        (b"Infinity", "", "invalid_number"),
        (b'{"prompt": "half \\ud83d"}', "/prompt", "invalid_text"),
        (b'{"\\ud83d": 1}', "", "invalid_text"),
        (b'{"prompt": "a\\u0000b"}', "/prompt", "invalid_text"),
        (b'{"prompt": ' + b"[" * 70 + b"]" * 70 + b"}", "", "too_deep"),
        (b'{"prompt": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "", "too_deep"),
        (b" " * (MAX_LINE_BYTES + 1) + b"{}", "", "line_too_long"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value,
)
def test_a_hostile_line_is_refused_by_number_and_pointer(line, pointer, code):
    found = refusal(lines(TEXTS)[0], line)
    assert (found.line, found.pointer, found.code) == (2, pointer, code)
    assert "Line 2" in str(found)
    assert len(str(found)) < 300
    str(found).encode()


def test_a_line_that_is_not_jsonl_is_refused_in_openais_words():
    assert str(refusal(b"[1]")) == (
        "Expected file to have JSONL format, where every line is a JSON dictionary. "
        'Line 1 is not a dictionary (HINT: line starts with: "[1]").'
    )


def test_a_line_longer_than_the_limit_is_never_held_whole():
    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:
            buffer[:] = b"x" * len(buffer)
            return len(buffer)

    assert refusal(next(read_lines(io.BufferedReader(Endless())))).code == "line_too_long"


def test_lines_behind_one_that_is_too_long_keep_their_numbers():
    pair = lines(TEXTS)[0].strip() + b"\n"
    file = io.BytesIO(pair + b"x" * (2 * MAX_LINE_BYTES + 9) + b"\n" + pair + b"[1]\n")
    found = [(record.line, record.problem and record.problem.code) for record in read_records(read_lines(file))]
    assert found == [(1, None), (2, "line_too_long"), (3, None), (4, "invalid_jsonl")]


# --- refusals of rows ---

IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com"}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ANSWER = {"role": "tool", "tool_call_id": "a", "content": "Nothing."}


@pytest.mark.parametrize(
    ("row", "pointer", "code"),
    [
        ({}, "", "unknown_format"),
        ({"prompt": "a", "chosen": "b"}, "", "unknown_format"),
        ({**PREFERENCE, "input": [USER]}, "/input", "wrong_type"),
        ({**PREFERENCE, "input": {"messages": []}}, "/input/messages", "wrong_type"),
        ({**PREFERENCE, "input": {"messages": [USER], "tool": 1}}, "/input/tool", "unknown_key"),
        (
            {**PREFERENCE, "input": {"messages": [USER], "tools": [{"type": "retrieval"}]}},
            "/input/tools/0/type",
            "unsupported",
        ),
        ({**PREFERENCE, "input": {"messages": [USER], "functions": [{}]}}, "/input/functions", "unsupported"),
        ({**PREFERENCE, "input": {"messages": [USER, GOOD]}}, "/input/messages/1", "invalid_order"),
        ({**PREFERENCE, "preferred_completion": [GOOD]}, "/preferred_completion", "duplicate_key"),
        ({"input": {"messages": [USER]}, "preferred_output": [GOOD]}, "/non_preferred_output", "missing_key"),
        ({**PREFERENCE, "preferred_output": "Hello!"}, "/preferred_output", "wrong_type"),
        ({**PREFERENCE, "preferred_output": [GOOD, GOOD]}, "/preferred_output/1", "invalid_order"),
        ({**PREFERENCE, "preferred_output": [USER]}, "/preferred_output/0", "invalid_completion"),
        ({**PREFERENCE, "preferred_output": [GOOD, USER]}, "/preferred_output/1", "invalid_completion"),
        (
            {**PREFERENCE, "preferred_output": [GOOD, {**USER, "role": "system"}, GOOD]},
            "/preferred_output/1",
            "invalid_completion",
        ),
        (
            {**PREFERENCE, "preferred_output": [{**GOOD, "content": " "}]},
            "/preferred_output/0/content",
            "empty_completion",
        ),
        ({**CONVERSATIONS, "prompt": ["Hi"]}, "/prompt/0", "wrong_type"),
        ({**CONVERSATIONS, "prompt": [{"content": "Hi"}]}, "/prompt/0/role", "unknown_role"),
        ({**CONVERSATIONS, "prompt": [{**USER, "role": "owner"}]}, "/prompt/0/role", "unknown_role"),
        ({**CONVERSATIONS, "prompt": [{**USER, "role": ["user"]}]}, "/prompt/0/role", "unknown_role"),
        ({**CONVERSATIONS, "prompt": [{**USER, "role": "tool"}]}, "/prompt/0/tool_call_id", "unknown_tool_call"),
        ({**CONVERSATIONS, "prompt": [{**USER, "role": "function"}]}, "/prompt/0/role", "unsupported"),
        ({**CONVERSATIONS, "prompt": [{**USER, "tone": "warm"}]}, "/prompt/0/tone", "unknown_key"),
        ({**CONVERSATIONS, "prompt": [{**USER, "tool_calls": [{}]}]}, "/prompt/0/tool_calls", "unknown_key"),
        ({**CONVERSATIONS, "prompt": [{**USER, "tool_call_id": "a"}]}, "/prompt/0/tool_call_id", "unknown_key"),
        (
            {**CONVERSATIONS, "chosen": [{**GOOD, "function_call": {"name": "look"}}]},
            "/chosen/0/function_call",
            "unsupported",
        ),
        ({**CONVERSATIONS, "chosen": [{**GOOD, "refusal": "No."}]}, "/chosen/0/refusal", "unsupported"),
        ({**CONVERSATIONS, "chosen": [{**GOOD, "audio": {"id": "a"}}]}, "/chosen/0/audio", "unsupported"),
        ({**CONVERSATIONS, "prompt": [{**USER, "weight": 1}]}, "/prompt/0/weight", "invalid_weight"),
        ({**CONVERSATIONS, "prompt": [{**USER, "name": 3}]}, "/prompt/0/name", "wrong_type"),
        ({**CONVERSATIONS, "prompt": [{"role": "user"}]}, "/prompt/0/content", "wrong_type"),
        ({**CONVERSATIONS, "prompt": [{**USER, "content": [IMAGE]}]}, "/prompt/0/content/0", "unsupported"),
        ({**CONVERSATIONS, "chosen": [{**GOOD, "weight": 2}]}, "/chosen/0/weight", "invalid_weight"),
        ({**CONVERSATIONS, "chosen": 7}, "/chosen", "wrong_type"),
        ({**TEXTS, "chosen": ""}, "/chosen", "empty_completion"),
        ({**TEXTS, "rejected": None}, "/rejected", "wrong_type"),
        ({**TEXTS, "prompt": 3}, "/prompt", "wrong_type"),
        ({**TEXTS, "tools": [TOOL]}, "/tools", "unsupported"),
        ({**CHAT, "parallel_tool_calls": 1}, "/parallel_tool_calls", "wrong_type"),
        ({"messages": [USER]}, "/messages", "nothing_to_train"),
        ({"messages": [GOOD]}, "/messages/0", "empty_prompt"),
        ({"messages": [USER, GOOD, BAD]}, "/messages/2", "invalid_order"),
        ({"messages": [USER, {**GOOD, "content": ""}]}, "/messages/1/content", "empty_completion"),
        ({"messages": [USER, GOOD], "functions": [{}]}, "/functions", "unsupported"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_by_pointer(row, pointer, code):
    found = refusal(*lines(row))
    assert (found.line, found.pointer, found.code) == (1, pointer, code)
    assert str(found).startswith(f"Line 1: the field {pointer} " if pointer else "Line 1: ")


def test_a_row_of_another_format_than_the_first_is_refused():
    found = refusal(*lines(TEXTS, CONVERSATIONS))
    assert (found.line, found.code) == (2, "mixed_formats")


def test_rows_before_the_bad_one_have_been_read():
    reader = read_groups(lines(TEXTS, {"prompt": 3}))
    assert next(reader).line == 1
    with pytest.raises(InvalidRow):
        next(reader)


@given(st.lists(st.binary(max_size=50), max_size=3))
def test_any_bytes_are_read_or_refused(given):
    refused = refusal_of(given)
    assert refused is None or 1 <= refused.line <= len(given)


def refusal_of(given: list[bytes]) -> InvalidRow | None:
    try:
        list(read_groups(given))
    except InvalidRow as refused:
        return refused
    return None


def test_a_refusal_survives_pickling():
    found = refusal(b"[1]")
    again = pickle.loads(pickle.dumps(found))
    assert (again.line, again.pointer, again.code, str(again)) == (found.line, found.pointer, found.code, str(found))


def test_reading_feedback_loads_nothing_heavy():
    heavy = {"torch", "transformers", "numpy", "pydantic"}
    code = f"import dpo_core.data.feedback, dpo_core.config, sys; sys.exit(bool({heavy!r} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- bounds ---


@pytest.mark.parametrize(
    "row",
    [
        {**PREFERENCE, "input": {"messages": [USER], "k" * 10**6: 1}},
        {"prompt": "a", "k" * 10**6: 1},
        {"prompt": "a", "completions": ["b", "c"], "scores": [int("9" * 4000), 1]},
        {**TEXTS, "chosen": {"k" * 10**6: 1}},
        {**CONVERSATIONS, "prompt": [{**USER, "k" * 10**6: 1}]},
    ],
    ids=["pointer", "keys", "number", "value", "message"],
)
def test_a_refusal_is_short_however_long_the_row_is(row):
    assert len(str(refusal(*lines(row)))) < 1300


# A program that looks at a hostile file, and prints the first refusal and the megabytes and seconds that it cost.
BOUNDED = """
import resource, sys, time
from dpo_core.data.survey import survey
def megabytes(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
pair = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\\n'
before, start = megabytes(), time.process_time()
report = survey(LINES)
print(report.problems[0].code if report.problems else None, report.problems[0].rows.lines if report.problems else None)
print(megabytes() - before, time.process_time() - start)
"""
HOSTILE = {  # its lines, the refusal, megabytes
    "a line of 100 MB": ("read_lines(io.BytesIO(pair + b'x' * 10**8))", "line_too_long (2,)", 250),
    "a line of 9 MB, of lists": ("[pair, b'{\"a\": [' + b'[],' * 3 * 10**6 + b'1]}']", "unknown_format (2,)", 600),
    "nesting, over and over": ("(b'{\"a\": ' + b'[' * 10**5 + b'\\n' for _ in range(200))", "too_deep", 30),
    "other keys in every row": (
        '(b\'{"k%d": 1, "prompt": "a", "chosen": "b", "rejected": "c"}\' % n for n in range(50000))',
        "None",
        60,
    ),
    "a key of 30 MB": ("[pair.replace(b'{', b'{\"' + b'k' * (30 * 2**20) + b'\": 1, ')]", "None", 400),
    "nothing but breaks": ("(b'\\n' for _ in range(10**6))", "empty_file (1,)", 20),
    "NUL": ("[pair, b'\\0' * 10**7]", "invalid_jsonl (2,)", 120),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_costs_bounded_memory_and_time(name):
    source, code, most = HOSTILE[name]
    program = "import io\nfrom dpo_core.data.jsonl import read_lines\n" + BOUNDED.replace("LINES", source)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=500)
    said, costs = done.stdout.splitlines()
    megabytes, seconds = map(float, costs.split())
    assert said.startswith(code)
    assert megabytes < most
    assert seconds < 30
