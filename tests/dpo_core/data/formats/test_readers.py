"""Tests the readers of common formats."""

import pytest

from dpo_core.data.feedback import read_groups
from dpo_core.data.groups import Group
from dpo_core.data.survey import survey
from tests.dpo_core.data.formats.test_formats import (
    ASK,
    BAD,
    CHATS,
    GOOD,
    HUMAN,
    LONGER,
    PAIR,
    PROMPT,
    SURE,
    assistant,
    lines,
    user,
)


def test_a_prompt_and_completion_may_be_texts_with_a_label():
    (group,) = read_groups(lines({"prompt": "The sky is", "completion": " blue.", "label": True}))
    assert group == Group("The sky is", (" blue.",), 1, (1.0,))


@pytest.mark.parametrize("row", LONGER)
def test_conversations_that_part_early_are_completions_of_several_messages(row):
    (group,) = read_groups(lines(row))
    assert group.prompt == PROMPT
    assert group.completions == ([*PAIR[0], SURE, *PAIR[1]], [*PAIR[1], SURE, *PAIR[0]])


def test_labels_beside_messages_are_of_the_last_answer():
    row = {"messages": [user("2 + 2?"), assistant("22.")], "label": False}
    for given in (row, {"conversations": row["messages"], "kto_tag": False}):
        assert survey(lines(given)).kind == "unpaired"
        assert list(read_groups(lines(given))) == [Group([user("2 + 2?")], ([assistant("22.")],), 1, (0.0,))]


def test_the_worse_answer_may_be_empty_and_the_better_may_not():
    for row in (
        {"prompt": ASK, "chosen": GOOD, "rejected": ""},
        {"chosen": [*PROMPT, *PAIR[0]], "rejected": [*PROMPT, assistant("")]},
    ):
        assert survey(lines(row)).refusal is None
        swapped = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
        assert survey(lines(swapped)).problems[0].code == "empty_completion"


def test_a_text_prompt_may_be_any_message_before_the_answers():
    turns = [user("Hello."), assistant("Hello!"), user(ASK)]
    row = {"prompt": "Hello.", "chosen": [*turns, *PAIR[0]], "rejected": [*turns, *PAIR[1]]}
    assert list(read_groups(lines(row))) == [Group(turns, PAIR, 1)]


def test_dialogues_whose_prompt_is_another_are_refused():
    row = {"prompt": HUMAN.replace("red", "blue"), "chosen": f"{HUMAN} {GOOD}", "rejected": f"{HUMAN} {BAD}"}
    assert survey(lines(row)).problems[0].code == "different_prompts"
    assert survey(lines({**CHATS, "prompt": [user("Else?")]})).problems[0].code == "different_prompts"


def test_an_unanswered_question_in_a_dialogue_is_said_again():
    asked = f"\n\nHuman: Hi.\n\nAssistant:{HUMAN}"
    row = {"prompt": asked, "chosen": f"{asked} {GOOD}", "rejected": f"{asked} {BAD}"}
    (group,) = read_groups(lines(row))
    assert group.prompt == [user("Hi."), assistant(""), *PROMPT]
