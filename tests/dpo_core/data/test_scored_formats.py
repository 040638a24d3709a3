"""Tests formats of rows that are only scored: completions without an order, and RewardBench 2."""

import json

import pytest

from dpo_core.data.feedback import read_records
from dpo_core.data.formats.formats import FORMATS
from dpo_core.data.groups import Group
from dpo_core.data.jsonl import InvalidRow
from dpo_core.data.scored_formats import BEST_OF, SCORED_FORMATS, in_request, read_in_request

USER = {"role": "user", "content": "What is 3 plus 4?"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
BENCH = {
    "id": "7",
    "prompt": "What is 3 plus 4?",
    "chosen": ["7", "seven"],
    "rejected": ["8", "9"],
    "num_correct": 2,
    "num_incorrect": 2,
    "total_completions": 4,
    "models": ["one", "two"],
    "subset": "Ties",
    "additional_metadata": None,
}


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def records(*rows: object):
    return list(read_records([json.dumps(row).encode() for row in rows], formats=SCORED_FORMATS))


def test_completions_stay_in_their_order_and_may_be_empty():
    assert read_in_request(3, {"prompt": "Hi", "completions": ["b", "", "a"]}) == Group("Hi", ("b", "", "a"), 3)


def test_a_row_of_messages_has_tools_arguments_and_a_system_prompt():
    row = {"prompt": [USER], "completions": [said("7")], "tools": [TOOL], "chat_template_kwargs": {"think": False}}
    group = read_in_request(1, row | {"system": "Be brief."})
    assert group == Group([SYSTEM, USER], (said("7"),), 1, tools=[TOOL], template_arguments={"think": False})


def test_a_system_prompt_makes_messages_of_texts():
    row = {"prompt": "What is 3 plus 4?", "completions": ["7"], "system": "Be brief."}
    assert read_in_request(1, row) == Group([SYSTEM, USER], (said("7"),), 1)


@pytest.mark.parametrize(
    ("row", "path", "what"),
    [
        ({"prompt": 5, "completions": ["a"]}, "rows.1.prompt", "is 5; it must be a string."),
        ({"prompt": "a", "completions": []}, "rows.1.completions", "must be a list of at least one completion."),
        ({"prompt": "a", "completions": ["b", 1]}, "rows.1.completions.1", "is 1; it must be a string."),
        ({"prompt": [USER], "completions": ["b"]}, "rows.1.completions.0", "must be a list of at least one message."),
        (
            {"prompt": "a\0", "completions": ["b"]},
            "rows.1.prompt",
            "contains a NUL character",
        ),
        (
            {"prompt": "a\ud800", "completions": ["b"]},
            "rows.1.prompt",
            "contains half of a surrogate pair",
        ),
    ],
)
def test_a_wrong_value_is_named_by_its_path_in_the_request(row, path, what):
    with pytest.raises(InvalidRow) as caught:
        read_in_request(2, row)
    found, message = in_request(caught.value)
    assert (found, message.startswith(f"{path} {what}")) == (path, True)


def test_a_row_of_rewardbench_2_is_a_rated_group_of_messages_in_its_subset():
    (record,) = records(BENCH)
    assert (record.format, record.problem, record.subset) == (BEST_OF, None, "Ties")
    completions = tuple(map(said, ("7", "seven", "8", "9")))
    assert record.groups == [Group([USER], completions, 1, (1.0, 1.0, 0.0, 0.0))]


def test_rows_of_training_are_read_as_in_training():
    rows = [
        {"prompt": "Hi", "chosen": "a", "rejected": "b", "subset": "Chat"},
        {"chosen": [USER, *said("7")], "rejected": [USER, *said("8")]},
        {"prompt": "Hi", "completions": ["a", "b"], "ranks": [2, 1]},
    ]
    for row in rows:
        (record,) = records(row)
        (same,) = read_records([json.dumps(row).encode()])
        assert record == same
        assert record.format in FORMATS
    assert records(rows[0])[0].subset == "Chat"
