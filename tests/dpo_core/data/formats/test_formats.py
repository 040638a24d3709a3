"""Tests rows in the shapes in which datasets publish them, and the groups that they become."""

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_core.data.feedback import read_groups, read_records
from dpo_core.data.formats.formats import table
from dpo_core.data.groups import Group
from dpo_core.data.jsonl import InvalidRow, read_lines
from dpo_core.data.survey import survey

SHARED_DATA = Path(__file__).parents[5] / "shared" / "data"


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


BEGINNING = "\n\nHuman: What is a pangolin?\n\nAssistant: An animal.\n\nHuman: Does it bite?\n\nAssistant:"
HH = {"chosen": f"{BEGINNING} No.", "rejected": f"{BEGINNING} Why, yes."}
ULTRAFEEDBACK_BINARIZED = {
    "prompt": "Name a red fruit.",
    "prompt_id": "5f1c",
    "chosen": [user("Name a red fruit."), assistant("The strawberry.")],
    "rejected": [user("Name a red fruit."), assistant("The banana.")],
    "messages": [user("Name a red fruit."), assistant("The strawberry.")],
    "score_chosen": 8.5,
    "score_rejected": 3.0,
}
ULTRAFEEDBACK = {
    "source": "sharegpt",
    "instruction": "Name a red fruit.",
    "models": ["a", "b", "c"],
    "completions": [
        {"model": "a", "response": "The banana.", "overall_score": 3.0, "annotations": {}},
        {"model": "b", "response": "The strawberry.", "overall_score": 8.5, "annotations": {}},
        {"model": "c", "response": "The lemon.", "overall_score": 3, "annotations": {}},
    ],
    "correct_answers": ["None"],
}
NECTAR = {
    "prompt": "\n\nHuman: Name a red fruit.\n\nAssistant: ",
    "answers": [
        {"answer": "The banana.", "model": "a", "rank": 2.0},
        {"answer": "The strawberry.", "model": "b", "rank": 1.0},
        {"answer": "The lemon.", "model": "c", "rank": 3.0},
    ],
    "turns": 1,
    "num_responses": 3,
    "source": ["lmsys-chat-1m"],
    "good_natured": True,
}
IMPLICIT_TEXTS = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
IMPLICIT_CONVERSATIONS = {
    "chosen": [user("What colour is the sky?"), assistant("Blue.")],
    "rejected": [user("What colour is the sky?"), assistant("Green.")],
}
KTO = {"prompt": [user("What colour is the sky?")], "completion": [assistant("Green.")], "label": False}
RANKED = {"prompt": "The sky is", "completions": [" green.", " blue.", " grey."], "ranks": [2, 1, 1]}
SCORED = {"prompt": [user("Sky?")], "completions": [[assistant("Green.")], [assistant("Blue.")]], "scores": [1, 4.5]}

ASKED = [user("What is a pangolin?"), assistant("An animal."), user("Does it bite?")]
FRUIT = [user("Name a red fruit.")]
STRAWBERRY, BANANA, LEMON = ([assistant(f"The {fruit}.")] for fruit in ("strawberry", "banana", "lemon"))

CASES = {
    "HH-RLHF dialogues": (HH, "pairs", Group(ASKED, ([assistant("No.")], [assistant("Why, yes.")]), 1)),
    "chosen/rejected conversations that hold their prompt": (
        IMPLICIT_CONVERSATIONS,
        "pairs",
        Group([user("What colour is the sky?")], ([assistant("Blue.")], [assistant("Green.")]), 1),
    ),
    "chosen/rejected texts that hold their prompt": (
        IMPLICIT_TEXTS,
        "pairs",
        Group("The sky is", (" blue.", " green."), 1),
    ),
    "UltraFeedback": (
        ULTRAFEEDBACK,
        "ratings",
        Group(FRUIT, (STRAWBERRY, BANANA, LEMON), 1, (8.5, 3.0, 3.0)),
    ),
    "Nectar": (NECTAR, "rankings", Group(FRUIT, (STRAWBERRY, BANANA, LEMON), 1, (-1.0, -2.0, -3.0))),
    "prompt/completion/label": (
        KTO,
        "unpaired",
        Group([user("What colour is the sky?")], ([assistant("Green.")],), 1, (0.0,)),
    ),
    "prompt/completions/ranks": (
        RANKED,
        "rankings",
        Group("The sky is", (" blue.", " grey.", " green."), 1, (-1.0, -1.0, -2.0)),
    ),
    "prompt/completions/scores": (
        SCORED,
        "ratings",
        Group([user("Sky?")], ([assistant("Blue.")], [assistant("Green.")]), 1, (4.5, 1.0)),
    ),
}


def lines(*rows: object) -> list[bytes]:
    return [json.dumps(row).encode() + b"\n" for row in rows]


@pytest.mark.parametrize("name", CASES)
def test_a_row_as_its_source_publishes_it_is_read(name):
    row, kind, group = CASES[name]
    report = survey(lines(row))
    assert (report.format, report.kind) == (name, kind)
    assert list(read_groups(lines(row))) == [group]


def test_binarized_ultrafeedback_is_pairs_whose_conversations_hold_the_prompt():
    report = survey(lines(ULTRAFEEDBACK_BINARIZED))
    assert report.kind == "pairs"
    assert report.ignored_keys == ("messages", "prompt_id", "score_chosen", "score_rejected")
    assert list(read_groups(lines(ULTRAFEEDBACK_BINARIZED))) == [Group(FRUIT, (STRAWBERRY, BANANA), 1)]


def test_weights_and_margins_of_rows_are_kept():
    row = {"prompt": "Hi", "chosen": "Hello!", "rejected": "No.", "weight": 0.5, "margin": 2}
    assert list(read_groups(lines(row))) == [Group("Hi", ("Hello!", "No."), 1, weight=0.5, margin=2.0)]
    report = survey(lines(row, {**row, "margin": None}))
    assert (report.num_margins, report.ignored_keys) == (1, ())
    assert survey(lines({**KTO, "margin": 1})).ignored_keys == ("margin",)


def test_the_report_counts_rankings_that_are_all_ties():
    assert survey(lines(RANKED, {**RANKED, "ranks": [1, 1, 1]})).num_tied == 1


@pytest.mark.parametrize(
    ("row", "pointer", "code"),
    [
        ({**HH, "rejected": "\n\nHuman: Hello?\n\nAssistant: Yes."}, "/rejected", "different_prompts"),
        ({**HH, "rejected": BEGINNING.replace("bite", "fly") + " No."}, "/rejected", "different_prompts"),
        ({**HH, "rejected": BEGINNING[: -len("\n\nAssistant:")]}, "/rejected", "different_prompts"),
        ({**HH, "chosen": HH["chosen"][: -len("No.")]}, "/chosen/3/content", "empty_completion"),
        ({**HH, "chosen": HH["chosen"] + "\n\nHuman: Ok."}, "/chosen/4", "invalid_completion"),
        ({**HH, "chosen": HH["chosen"] + "\n\nAssistant: Ok."}, "/chosen/4", "invalid_order"),
        (
            {"chosen": "\n\nHuman: A\n\nHuman: B", "rejected": "\n\nHuman: A\n\nHuman: C"},
            "/rejected",
            "different_prompts",
        ),
        (
            {
                **IMPLICIT_CONVERSATIONS,
                "rejected": [*IMPLICIT_CONVERSATIONS["chosen"], user("Sure?"), assistant("Yes.")],
            },
            "/rejected",
            "different_prompts",
        ),
        ({**IMPLICIT_TEXTS, "rejected": "Green."}, "", "empty_prompt"),
        ({**IMPLICIT_TEXTS, "rejected": IMPLICIT_TEXTS["chosen"]}, "/chosen", "empty_completion"),
        ({**IMPLICIT_CONVERSATIONS, "rejected": [assistant("Green.")]}, "/rejected", "different_prompts"),
        ({"chosen": [assistant("Blue.")], "rejected": [assistant("Green.")]}, "/rejected", "different_prompts"),
        ({**ULTRAFEEDBACK_BINARIZED, "prompt": "Name a fruit."}, "/prompt", "different_prompts"),
        ({**ULTRAFEEDBACK, "completions": [{"response": "Yes."}]}, "/completions/0", "wrong_type"),
        ({**ULTRAFEEDBACK, "completions": ULTRAFEEDBACK["completions"][:1]}, "", "too_few_completions"),
        ({**ULTRAFEEDBACK, "instruction": ["x"]}, "/instruction", "wrong_type"),
        (
            {**ULTRAFEEDBACK, "completions": [{"response": "", "overall_score": 1}]},
            "/completions/0/response",
            "empty_completion",
        ),
        ({**NECTAR, "prompt": "\n\nHuman: Name a red fruit."}, "/prompt", "invalid_order"),
        ({**NECTAR, "prompt": "Name a red fruit."}, "/prompt", "wrong_type"),
        ({**NECTAR, "answers": [{"answer": "A", "rank": "1"}]}, "/answers/0/rank", "wrong_type"),
        ({**KTO, "label": "good"}, "/label", "wrong_type"),
        ({**KTO, "label": 1}, "/label", "wrong_type"),
        ({**KTO, "completion": "Green."}, "/completion", "wrong_type"),
        ({**KTO, "weight": 0}, "/weight", "invalid_number"),
        ({**HH, "margin": "large"}, "/margin", "wrong_type"),
        ({**RANKED, "ranks": [1, 2]}, "/ranks", "wrong_type"),
        ({**RANKED, "ranks": [1, 2, True]}, "/ranks/2", "wrong_type"),
        ({**RANKED, "scores": [1, 2, 3]}, "/scores", "duplicate_key"),
        ({**SCORED, "scores": [1, 1e300]}, "/scores/1", "invalid_number"),
        ({**SCORED, "completions": []}, "/completions", "wrong_type"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_by_pointer(row, pointer, code):
    with pytest.raises(InvalidRow) as caught:
        list(read_groups(lines(row)))
    assert (caught.value.line, caught.value.pointer, caught.value.code) == (1, pointer, code)


# --- public sets, in the columns that they are published with ---

ASK, GOOD, BAD = "Name a red fruit.", "The strawberry.", "The banana."
PROMPT = [user(ASK)]
PAIR = ([assistant(GOOD)], [assistant(BAD)])


def in_parts(role: str, text: str) -> dict[str, object]:
    return {"role": role, "parts": [{"text": text}]}


# Name of the format: a row, its kind, and the ratings of the better and the worse answer.
PUBLISHED = {
    "question/chosen/rejected": ({"question": ASK, "chosen": GOOD, "rejected": BAD}, "pairs", None),
    "instruction/chosen/rejected": ({"instruction": ASK, "input": "", "chosen": GOOD, "rejected": BAD}, "pairs", None),
    "input/chosen/rejected": ({"input": ASK, "chosen": GOOD, "rejected": BAD, "rating": [9, 3]}, "pairs", None),
    "prompt/chosen_response/rejected_response": (
        {"prompt": ASK, "chosen_response": GOOD, "rejected_response": BAD},
        "pairs",
        None,
    ),
    "instruction/chosen_response/rejected_response": (
        {"instruction": ASK, "chosen_response": GOOD, "rejected_response": BAD, "chosen_avg_rating": 4.5},
        "pairs",
        None,
    ),
    "question/response_j/response_k": ({"question": ASK, "response_j": GOOD, "response_k": BAD}, "pairs", None),
    "HelpSteer2 preference": (
        {"prompt": ASK, "response_1": BAD, "response_2": GOOD, "preference_strength": 2},
        "pairs",
        (2.0, 0.0),
    ),
    "HelpSteer3 preference": (
        {"context": PROMPT, "response1": GOOD, "response2": BAD, "overall_preference": -3},
        "pairs",
        (3.0, 0.0),
    ),
    "AlpacaFarm": (
        {"instruction": ASK, "input": "", "output_1": BAD, "output_2": GOOD, "preference": 2},
        "pairs",
        (1.0, 0.0),
    ),
    "A or B": ({"prompt": ASK, "response_a": BAD, "response_b": GOOD, "winner": "B"}, "pairs", (1.0, 0.0)),
    "PKU-SafeRLHF": (
        {"prompt": ASK, "response_0": BAD, "response_1": GOOD, "better_response_id": 1, "safer_response_id": 0},
        "pairs",
        (1.0, 0.0),
    ),
    "Chatbot Arena": (
        {"conversation_a": [*PROMPT, *PAIR[1]], "conversation_b": [*PROMPT, *PAIR[0]], "winner": "model_b"},
        "pairs",
        (1.0, 0.0),
    ),
    "SHP": ({"history": ASK, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1}, "pairs", (1.0, 0.0)),
    "WebGPT comparisons": (
        {"question": ASK, "answer_0": BAD, "answer_1": GOOD, "score_0": -0.5, "score_1": 0.5},
        "pairs",
        (1.0, 0.0),
    ),
    "NeMo RL preference": (
        {"context": PROMPT, "completions": [{"rank": 1, "completion": PAIR[1]}, {"rank": 0, "completion": PAIR[0]}]},
        "rankings",
        (0.0, -1.0),
    ),
    "Vertex AI preference": (
        {
            "contents": [in_parts("user", ASK)],
            "completions": [
                {"score": 0.0, "completion": in_parts("model", BAD)},
                {"score": 1.0, "completion": in_parts("model", GOOD)},
            ],
        },
        "ratings",
        (1.0, 0.0),
    ),
    "messages with chosen and rejected": (
        {"conversations": [{"from": "human", "value": ASK}], "chosen": {"from": "gpt", "value": GOOD}, "rejected": BAD},
        "pairs",
        None,
    ),
    "messages with rejected_response": ({"messages": [*PROMPT, *PAIR[0]], "rejected_response": BAD}, "pairs", None),
    "messages with rejected_messages": (
        {"messages": [*PROMPT, *PAIR[0]], "rejected_messages": [*PROMPT, *PAIR[1]]},
        "pairs",
        None,
    ),
}


def rated(response: str, helpfulness: float, prompt: str = ASK) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, "correctness": 4, "verbosity": 2}


def test_rows_that_rate_an_answer_each_are_one_group_of_their_prompt():
    rows = [rated(BAD, 1), rated(GOOD, 4), rated("It is.", 2), rated("Yes.", 3, "Is it?"), rated("No.", 3, "Is it?")]
    first, second = read_groups(lines(*rows))
    assert (first.line, first.ratings) == (1, (4.0, 2.0, 1.0))
    assert first.completions == ([assistant(GOOD)], [assistant("It is.")], [assistant(BAD)])
    assert (second.line, second.prompt, second.ratings) == (4, [user("Is it?")], (3.0, 3.0))
    report = survey(lines(*rows))
    assert (report.format, report.kind, report.num_rows, report.num_groups) == ("HelpSteer ratings", "ratings", 5, 2)
    assert (report.num_tied, report.ignored_keys) == (1, ("correctness", "verbosity"))


def test_a_single_rated_answer_and_a_bad_row_between_are_refused_by_line():
    rows = [
        rated(GOOD, 4),
        rated(BAD, 1),
        rated("Yes.", 3, "Is it?"),
        rated(GOOD, 4),
        {**rated(BAD, 1), "helpfulness": "x"},
    ]
    problems = survey(lines(*rows)).problems
    assert [(problem.code, problem.rows.lines) for problem in problems] == [
        ("too_few_completions", (3, 4)),
        ("wrong_type", (5,)),
    ]
    assert (
        "Line 3: only one row has this row's prompt here; put 2 to 1000 rows with the same prompt"
        in problems[0].message
    )


def test_every_row_of_a_prompt_with_too_many_answers_is_refused():
    rows = [rated(f"{number}.", number) for number in range(1002)]
    (problem,) = survey(lines(*rows)).problems
    assert (problem.code, problem.rows.count) == ("too_few_completions", 1002)
    assert (
        "Line 1: more than 1000 rows have this row's prompt here; put 2 to 1000 rows with the same prompt"
    ) in problem.message


SURE = user("Sure?")
LONGER = (
    {
        "conversation_a": [*PROMPT, *PAIR[1], SURE, *PAIR[0]],
        "conversation_b": [*PROMPT, *PAIR[0], SURE, *PAIR[1]],
        "winner": "model_b",
    },
    {"chosen": [*PROMPT, *PAIR[0], SURE, *PAIR[1]], "rejected": [*PROMPT, *PAIR[1], SURE, *PAIR[0]]},
    {"prompt": PROMPT, "chosen": [*PAIR[0], SURE, *PAIR[1]], "rejected": [*PAIR[1], SURE, *PAIR[0]]},
    {
        "messages": [*PROMPT, *PAIR[0], SURE, *PAIR[1]],
        "rejected_messages": [*PROMPT, *PAIR[1], SURE, *PAIR[0]],
    },
    {
        "input": {"messages": PROMPT},
        "preferred_output": [*PAIR[0], SURE, *PAIR[1]],
        "non_preferred_output": [*PAIR[1], SURE, *PAIR[0]],
    },
)


# --- what says something is read, or refused by name ---

SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
        {"prompt": PROMPT, "chosen": PAIR[0], "rejected": PAIR[1]},
        {"prompt": ASK, "completion": GOOD, "label": True},
        {"prompt": ASK, "completions": [GOOD, BAD], "ranks": [1, 2]},
        {"prompt": ASK, "completions": [GOOD, BAD], "scores": [2, 1]},
        IMPLICIT_CONVERSATIONS,
        HH,
        {"messages": [*PROMPT, *PAIR[0]]},
        *(row for row, _, _ in PUBLISHED.values()),
    ],
)
@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_prompt_is_put_before_the_prompt_in_any_format(row, key):
    (group,) = read_groups(lines({**row, key: "Be brief."}))
    assert group.prompt[0] == SYSTEM
    assert all(isinstance(completion, list) for completion in group.completions)
    (without,) = read_groups(lines({**row, key: None}))
    assert group.prompt[1:] == without.prompt
    assert group.completions == without.completions


def test_rows_with_a_column_of_system_prompts_are_of_one_form():
    row = {"prompt": ASK, "chosen": GOOD, "rejected": BAD}
    (problem,) = survey(lines({**row, "system": ""}, row)).problems
    assert problem.code == "mixed_formats"


@pytest.mark.parametrize(
    ("row", "pointer", "code"),
    [
        ({**KTO, "images": ["cat.png"]}, "/images", "unsupported"),
        ({**HH, "image": {"path": "cat.png"}}, "/image", "unsupported"),
        ({"messages": [*PROMPT, *PAIR[0]], "videos": ["x"]}, "/videos", "unsupported"),
        ({"messages": [*PROMPT, *PAIR[0]], "documents": ["x"]}, "/documents", "unread_column"),
        ({"prompt": ASK, "chosen": GOOD, "rejected": BAD, "context": "Fruit is red."}, "/context", "unread_column"),
        ({"prompt": ASK, "chosen": GOOD, "rejected": BAD, "history": [["Hi", "Hello"]]}, "/history", "unread_column"),
        ({"prompt": ASK, "chosen": GOOD, "rejected": BAD, "label": True}, "/label", "unread_column"),
        *(
            ({"prompt": ASK, "chosen": GOOD, "rejected": BAD, key: value}, f"/{key}", "unread_column")
            for key, value in {
                "sample_weight": 0.5,
                "loss_weight": 2,
                "chosen_thoughts": "So.",
                "reasoning_rejected": "So.",
                "instructions": "Answer in rhyme.",
                "retrieved_docs": ["Fruit is red."],
                "prefill": "Well,",
            }.items()
        ),
        ({"messages": [*PROMPT, *PAIR[0]], "loss_mask": [0, 1]}, "/loss_mask", "unread_column"),
        ({**HH, "system": "x", "system_prompt": "y"}, "/system_prompt", "duplicate_key"),
        (
            {"prompt": [SYSTEM, *PROMPT], "chosen": PAIR[0], "rejected": PAIR[1], "system": "y"},
            "/system",
            "duplicate_key",
        ),
        ({"prompt": ASK, "chosen": GOOD, "rejected": BAD, "chat_template_kwargs": {"a": 1}}, None, "unsupported"),
        ({**KTO, "chat_template_kwargs": {"tokenize": True}}, "/chat_template_kwargs/tokenize", "unknown_key"),
        *(
            ({**KTO, "chat_template_kwargs": {key: "</s>"}}, f"/chat_template_kwargs/{key}", "unknown_key")
            for key in ("eos_token", "bos_token", "strftime_now", "max_length", "return_dict", "conversations")
        ),
        *(
            ({**KTO, "chat_template_kwargs": {"thinks": text}}, "/chat_template_kwargs/thinks", "wrong_type")
            for text in ("false", "False", "true", "TRUE")
        ),
        ({**KTO, "chat_template_kwargs": {"at": [math.nan]}}, "/chat_template_kwargs", "invalid_number"),
        ({**KTO, "chat_template_kwargs": '{"at": 1e999}'}, "/chat_template_kwargs", "invalid_number"),
        ({**KTO, "chat_template_kwargs": "x"}, "/chat_template_kwargs", "invalid_json"),
        ({**PUBLISHED["Chatbot Arena"][0], "winner": "me"}, "/winner", "unknown_choice"),
        ({**PUBLISHED["PKU-SafeRLHF"][0], "better_response_id": True}, "/better_response_id", "unknown_choice"),
    ],
)
def test_a_column_that_says_something_and_is_not_read_is_refused_by_name(row, pointer, code):
    with pytest.raises(InvalidRow) as caught:
        list(read_groups(lines(row)))
    assert caught.value.code == code
    assert caught.value.pointer == (pointer or "/chat_template_kwargs")


NAMING = {"prompt": ASK, "response_a": GOOD, "response_b": BAD}


@pytest.mark.parametrize(
    "row",
    [
        {**NAMING, "chosen": "A", "rejected": "B"},
        {**NAMING, "chosen": "response_b", "rejected": "response_a"},
        {
            **NAMING,
            "chosen": [{"role": "assistant", "content": "A"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        },
        {"prompt": ASK, "1": GOOD, "2": BAD, "chosen": "1", "rejected": "2"},
        {"prompt": ASK, "responses": [GOOD, BAD], "chosen": "0", "rejected": "1"},
        {"prompt": ASK, "Answer 1": GOOD, "Answer 2": BAD, "completions": ["1", "2"], "ranks": [2, 1]},
    ],
    ids=["letters", "names", "messages", "numbers", "places in a list", "a ranking"],
)
def test_answers_that_only_name_columns_are_refused(row):
    with pytest.raises(InvalidRow, match="hold the answers, but the row's format reads only their names") as caught:
        list(read_groups(lines(row)))
    assert caught.value.code == "unread_column"


@pytest.mark.parametrize(
    "row",
    [
        {
            **NAMING,
            "prompt": f"A: {GOOD}\nB: {BAD}",
            "chosen": "A",
            "rejected": "B",
        },  # a choice, and the letter is meant
        {"prompt": ASK, "chosen": "A", "rejected": "B", "score_a": 1, "score_b": 2},
        {**NAMING, "chosen": GOOD, "rejected": BAD},
        {"prompt": ASK, "chosen": "4", "rejected": "5", "num_responses": 9, "tags": ["sums", "short"]},
        {"prompt": ASK, "chosen": "4", "rejected": "5", "choices": ["4", "5", "6"]},
        {"prompt": ASK, "chosen": "4", "rejected": "5", "choices": [4, 5, 6]},
        {"prompt": f"1: {GOOD}, 2: {BAD}", "choices": [GOOD, BAD], "chosen": "1", "rejected": "2"},
    ],
    ids=["a choice", "scores", "the answers", "tags", "texts of numbers", "numbers", "a choice by number"],
)
def test_short_answers_beside_columns_of_other_meaning_are_read(row):
    (group,) = read_groups(lines(row))
    assert group.completions == (row["chosen"], row["rejected"])


@pytest.mark.parametrize("nothing", [None, "", [], {}, math.nan])
def test_a_column_that_says_nothing_is_ignored(nothing):
    row = {"prompt": ASK, "chosen": GOOD, "rejected": BAD, "images": nothing, "context": nothing, "margin": nothing}
    assert survey(lines(row)).refusal is None


def test_a_column_that_repeats_what_is_read_is_ignored():
    row = {"prompt": ASK, "chosen": GOOD, "rejected": BAD, "messages": [*PROMPT, *PAIR[0]], "instruction": ASK}
    assert survey(lines(row)).refusal is None


def test_template_arguments_of_a_row_are_kept():
    row = {**KTO, "chat_template_kwargs": {"enable_thinking": False, "xml_tools": None}}
    for given in (row, {**row, "chat_template_kwargs": json.dumps(row["chat_template_kwargs"])}):
        (group,) = read_groups(lines(given))
        assert group.template_arguments == {"enable_thinking": False}


def test_conversations_may_be_texts_of_json():
    row = {side: json.dumps(IMPLICIT_CONVERSATIONS[side]) for side in ("chosen", "rejected")}
    assert list(read_groups(lines(row))) == list(read_groups(lines(IMPLICIT_CONVERSATIONS)))
    text = {"prompt": "[{", "chosen": '[{"a": 1}]', "rejected": "[{no json"}
    assert list(read_groups(lines(text))) == [Group("[{", ('[{"a": 1}]', "[{no json"), 1)]


def test_a_margin_of_zero_means_no_margin():
    (group,) = read_groups(lines({"prompt": ASK, "chosen": GOOD, "rejected": BAD, "margin": 0}))
    assert group.margin is None


# --- tools, as OpenAI and TRL publish them ---

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_current_weather",
        "description": "Get the current weather",
        "parameters": {
            "type": "object",
            "properties": {
                "location": {"type": "string", "description": "The city and country, e.g. San Francisco, USA"},
                "format": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["location", "format"],
        },
    },
}


def weather_call(id: str, arguments: object) -> dict[str, object]:
    return {"id": id, "type": "function", "function": {"name": "get_current_weather", "arguments": arguments}}


def calling(*calls: dict[str, object], content: str = "") -> dict[str, object]:
    """Returns an assistant message with these tool calls, as groups hold it."""
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


PARIS = {"location": "Paris, France", "format": "celsius"}
OPENAI_CHAT = {
    "messages": [
        user("How warm is Paris?"),
        {"role": "assistant", "tool_calls": [weather_call("call_1", json.dumps(PARIS))]},
        {"role": "tool", "tool_call_id": "call_1", "content": "21"},
        assistant("21 degrees."),
    ],
    "parallel_tool_calls": False,
    "tools": [WEATHER],
}
OPENAI_PREFERENCE = {
    "input": {"messages": [user("How warm is Paris?")], "tools": [WEATHER], "parallel_tool_calls": True},
    "preferred_output": [{"role": "assistant", "content": None, "tool_calls": [weather_call("a", json.dumps(PARIS))]}],
    "non_preferred_output": [assistant("I cannot know.")],
}
LIGHT = {  # as transformers.utils.get_json_schema writes it
    "type": "function",
    "function": {
        "name": "control_light",
        "description": "Controls the lights in a room.",
        "parameters": {
            "type": "object",
            "properties": {"room": {"type": "string", "description": "The name of the room."}},
            "required": ["room"],
        },
        "return": {"type": "string", "description": "A message."},
    },
}
LIT = {"type": "function", "function": {"name": "control_light", "arguments": {"room": "living room"}}}
DIMMED = {"type": "function", "function": {"name": "dim", "arguments": {"by": 0.5}}}
TRL_PROMPT = [
    user("Turn on the living room lights."),
    {"role": "assistant", "tool_calls": [LIT, DIMMED]},
    {"role": "tool", "name": "dim", "content": "Dimmed."},
    {"role": "tool", "name": "control_light", "content": "The lights are on."},
]
TRL = {"prompt": TRL_PROMPT, "chosen": [assistant("Done!")], "rejected": [assistant("No.")], "tools": [LIGHT]}
TRL_IMPLICIT = {
    "chosen": [*TRL_PROMPT, assistant("Done!")],
    "rejected": [*TRL_PROMPT, {"role": "assistant", "content": "Again.", "tool_calls": [DIMMED]}],
    "tools": [LIGHT],
}
TOOL_ROWS = [OPENAI_CHAT, OPENAI_PREFERENCE, TRL, TRL_IMPLICIT]


def test_openai_chats_teach_the_call_and_the_answer_after_it():
    asked, _, answer, said = OPENAI_CHAT["messages"]
    call = calling(weather_call("call_1", PARIS))
    assert list(read_groups(lines(OPENAI_CHAT))) == [
        Group([asked], ([call],), 1, tools=[WEATHER]),
        Group([asked, call, answer], ([said],), 1, tools=[WEATHER]),
    ]


def test_openai_preferences_hold_tools_and_calls():
    assert list(read_groups(lines(OPENAI_PREFERENCE))) == [
        Group(
            [user("How warm is Paris?")],
            ([calling(weather_call("a", PARIS))], [assistant("I cannot know.")]),
            1,
            tools=[WEATHER],
        )
    ]


def test_calls_of_trl_rows_have_no_ids_and_are_answered_by_name():
    prompt = [TRL_PROMPT[0], calling(LIT, DIMMED), *TRL_PROMPT[2:]]
    assert list(read_groups(lines(TRL))) == [
        Group(prompt, ([assistant("Done!")], [assistant("No.")]), 1, tools=[LIGHT])
    ]
    assert list(read_groups(lines(TRL_IMPLICIT))) == [
        Group(prompt, ([assistant("Done!")], [calling(DIMMED, content="Again.")]), 1, tools=[LIGHT])
    ]


RANKED_CHATS = {"prompt": SCORED["prompt"], "completions": SCORED["completions"], "ranks": [2, 1]}


@pytest.mark.parametrize("row", [KTO, SCORED, RANKED_CHATS], ids=["KTO", "scored", "ranked"])
def test_unpaired_and_ranked_rows_have_tools_too(row):
    (group,) = read_groups(lines({**row, "tools": [LIGHT]}))
    assert group.tools == [LIGHT]
    assert survey(lines({**row, "tools": [LIGHT]})).ignored_keys == ()


def test_keys_that_columnar_files_fill_with_null_are_absent():
    nulls = {"name": None, "tool_calls": None, "tool_call_id": None, "function_call": None, "refusal": None}
    filled = {side: [nulls | message for message in TRL[side]] for side in ("prompt", "chosen", "rejected")}
    assert list(read_groups(lines({**TRL, **filled}))) == list(read_groups(lines(TRL)))


def test_a_message_with_calls_needs_no_text():
    row = {**OPENAI_PREFERENCE, "non_preferred_output": [{**calling(LIT), "content": " "}]}
    assert survey(lines(row)).num_groups == 1


def variations(value: object) -> Iterator[object]:
    """Yields copies of the value in which one part after the other is replaced by something that is wrong there."""
    yield from (None, True, 3, 0.5, "", "x", [], ["x"], [[]], {}, {"role": "user"}, {"type": "text"})
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        for other in variations(part):
            changed = copy.copy(value)
            changed[key] = other
            yield changed


PREFERENCE = {"input": {"messages": FRUIT}, "preferred_output": STRAWBERRY, "non_preferred_output": BANANA}
CHAT = {"messages": [*FRUIT, *STRAWBERRY, *FRUIT, *BANANA]}
CONVERSATIONS = {"prompt": FRUIT, "chosen": STRAWBERRY, "rejected": BANANA}
TEXTS = {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."}
ROWS = [
    PREFERENCE,
    CHAT,
    CONVERSATIONS,
    TEXTS,
    ULTRAFEEDBACK_BINARIZED,
    *(row for row, _, _ in CASES.values()),
    *(row for row, _, _ in PUBLISHED.values()),
    *TOOL_ROWS,
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: ",".join(row)[:40])
def test_any_row_is_read_or_refused(row):
    for varied in variations(row):
        refused = refusal_of(varied)
        assert refused is None or (refused.line == 1 and refused.code)


def refusal_of(row: object) -> InvalidRow | None:
    try:
        list(read_groups(lines(row)))
    except InvalidRow as refused:
        return refused
    return None


def test_a_row_of_no_known_format_is_refused_with_its_keys_and_a_remedy():
    with pytest.raises(
        InvalidRow,
        match=(
            r"has columns \(question\) of no known format; "
            r".* say with the option `columns` which column is the prompt"
        ),
    ):
        list(read_groups(lines({"question": "Why?"})))


def test_real_unpaired_feedback_is_read_whole():
    if not SHARED_DATA.exists():
        pytest.skip(f"{SHARED_DATA} does not exist")
    with (SHARED_DATA / "feedback.kto.jsonl").open("rb") as file:
        report = survey(read_lines(file))
    assert (report.kind, report.num_rows, report.num_groups) == ("unpaired", 300, 300)


def test_a_role_is_read_from_the_column_that_is_named_for_it():
    columns = {"prompt": "ask/it", "chosen": "good", "rejected": "bad"}
    row = {"ask/it": ASK, "good": GOOD, "bad": BAD, "id": 7}
    (record,) = read_records(lines(row), columns=columns)
    assert list(record.groups) == [Group(ASK, (GOOD, BAD), 1)]
    assert record.ignored_keys == {"id"}
    for changed, pointer, code in (
        ({**row, "good": 7}, "/good", "wrong_type"),
        ({**row, "ask/it": 7}, "/ask~1it", "wrong_type"),
        ({"ask/it": ASK, "good": GOOD}, "", "missing_column"),
        ({**row, "prompt": "Else?"}, "/prompt", "duplicate_key"),
    ):
        (record,) = read_records(lines(changed), columns=columns)
        assert (record.problem.pointer, record.problem.code) == (pointer, code)


def test_columns_may_swap_their_names():
    row = {"prompt": ASK, "chosen": BAD, "rejected": GOOD}
    (record,) = read_records(lines(row), columns={"chosen": "rejected", "rejected": "chosen"})
    assert list(record.groups) == [Group(ASK, (GOOD, BAD), 1)]


def test_the_documents_have_the_table_of_formats():
    assert table() in (Path(__file__).parents[4] / "docs" / "use" / "data.md").read_text()


# --- rows as people have them ---

TEXTS_OF_ASK = {"prompt": ASK, "chosen": GOOD, "rejected": BAD}
CHATS = {"chosen": [*PROMPT, *PAIR[0]], "rejected": [*PROMPT, *PAIR[1]]}
SHAREGPT = [{"from": "human", "value": ASK}, {"from": "gpt", "value": GOOD}]
HUMAN = f"\n\nHuman: {ASK}\n\nAssistant:"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASK, "chosen": PAIR[0], "rejected": PAIR[1]},
        {"prompt": ASK, "chosen": PAIR[0][0], "rejected": PAIR[1][0]},
        {"prompt": PROMPT[0], "chosen": PAIR[0][0], "rejected": PAIR[1][0]},
        {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD},
        {"prompt": PROMPT[0], "chosen": GOOD, "rejected": BAD},
        {"prompt": ASK, "chosen": json.dumps(PAIR[0][0]), "rejected": json.dumps(PAIR[1][0])},
        {**CHATS, "prompt": PROMPT},
        {side: "\n" + json.dumps(chat, indent=2) for side, chat in CHATS.items()},
        {"prompt": HUMAN, "chosen": f"{HUMAN} {GOOD}", "rejected": f"{HUMAN} {BAD}"},
        {"prompt": ASK, "chosen": f"{HUMAN} {GOOD}", "rejected": f"{HUMAN} {BAD}"},
    ],
)
def test_a_pair_is_the_same_whether_its_parts_are_texts_or_messages(row):
    assert list(read_groups(lines(row))) == [Group(PROMPT, PAIR, 1)]


@pytest.mark.parametrize("speaker", ["gpt", "chatgpt", "bot", "model", "assistant"])
def test_conversations_of_sharegpt_are_demonstrations(speaker):
    left_out = {"from": speaker, "value": BAD, "weight": 0}
    row = {"conversations": [SHAREGPT[0], left_out, SHAREGPT[0], {"from": speaker, "value": GOOD}]}
    assert list(read_groups(lines(row))) == [Group([*PROMPT, *PAIR[1], *PROMPT], (PAIR[0],), 1)]


@pytest.mark.parametrize("key", ["systemInstruction", "system_instruction"])
def test_the_system_instruction_of_vertex_ai_is_put_before_its_contents(key):
    row = {**PUBLISHED["Vertex AI preference"][0], key: {"parts": [{"text": "Be brief."}]}}
    (group,) = read_groups(lines(row))
    assert group.prompt == [SYSTEM, *PROMPT]


@pytest.mark.parametrize(
    "key",
    ["System", "system message", "sys_prompt", "systemInstruction", "custom_system_prompt"],
)
def test_a_system_prompt_by_another_name_is_refused_with_the_columns_that_help(key):
    row = {**TEXTS_OF_ASK, key: "Be brief."}
    (problem,) = survey(lines(row)).problems
    assert (problem.code, problem.pointer) == ("unread_column", f"/{key}")
    assert (
        f"say with the option `columns` which column has which role: system={key}, or remove the column"
        in problem.message
    )
    (record,) = read_records(lines(row), columns={"system": key})
    assert record.groups[0].prompt == [SYSTEM, *PROMPT]


@pytest.mark.parametrize(
    "key",
    [
        "Context",
        "passage",
        "chat_history",
        "trajectory",
        "rejected_output",
        "chosen_reasoning",
        "negative_messages",
        "winner",
        "preference",
        "thumbs_up",
        "Label",
        "is_tie",
        "available_tools",
        "\ufeffprompt",
    ],
)
def test_a_column_that_says_something_is_refused_under_any_spelling(key):
    for row in (TEXTS_OF_ASK, {"messages": [*PROMPT, *PAIR[0]]}):
        (problem,) = survey(lines({**row, key: "Else."})).problems
        assert (problem.code, problem.pointer) == ("unread_column", f"/{key}")


@pytest.mark.parametrize("key", ["image_path", "imageUrl", "rejected_images", "img", "image_1", "Audio", "video_file"])
def test_images_are_refused_under_any_spelling(key):
    (problem,) = survey(lines({**TEXTS_OF_ASK, key: "x.png"})).problems
    assert (problem.code, problem.pointer) == ("unsupported", f"/{key}")


def test_a_label_by_another_name_is_refused_with_the_column_that_helps():
    row = {"messages": [*PROMPT, *PAIR[0]], "thumbs_up": False}
    (problem,) = survey(lines(row)).problems
    assert "say with the option `columns` which column has which role: label=thumbs_up" in problem.message
    (record,) = read_records(lines(row), columns={"label": "thumbs_up"})
    assert record.groups[0].ratings == (0.0,)


def test_columns_without_a_known_meaning_or_a_tie_are_ignored():
    row = {**TEXTS_OF_ASK, "score_chosen": 3, "chosen_model": "x", "image_id": 7, "is_tie": False, "Unnamed: 0": 1}
    assert survey(lines(row)).ignored_keys == ("Unnamed: 0", "chosen_model", "image_id", "is_tie", "score_chosen")


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (
            {"Prompt": ASK, "Chosen": GOOD, "Rejected": BAD},
            {"prompt": "Prompt", "chosen": "Chosen", "rejected": "Rejected"},
        ),
        ({"prompt": ASK, "accepted": GOOD, "rejected": BAD}, {"chosen": "accepted"}),
        ({"prompt": ASK, "preferred": GOOD, "dispreferred": BAD}, {"chosen": "preferred", "rejected": "dispreferred"}),
        (
            {"input": ASK, "response": GOOD, "thumbs_up": True},
            {"completion": "response", "label": "thumbs_up", "prompt": "input"},
        ),
        (
            {"prompt": ASK, "responses": [GOOD, BAD], "ratings": [2, 1]},
            {"completions": "responses", "scores": "ratings"},
        ),
    ],
)
def test_a_row_of_unknown_columns_is_refused_with_the_columns_to_name(row, columns):
    (problem,) = survey(lines(row)).problems
    told = problem.message.partition("say with the option `columns` which column has which role: ")[2].removesuffix(".")
    assert dict(part.split("=") for part in told.split(", ")) == columns
    assert survey(lines(row), columns=columns).refusal is None


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": ASK, "input": "x", "output": GOOD, "kto_tag": True},
        {"frage": ASK},
        {"prompt": 7, "Chosen": GOOD},
    ],
)
def test_columns_that_would_not_help_are_not_suggested(row):
    assert "say with the option `columns` which column is the prompt" in survey(lines(row)).problems[0].message


@pytest.mark.parametrize(
    "row",
    [
        {**CHATS, "rejected": [*PROMPT, {**PAIR[1][0], "weight": 0}]},
        {"prompt": PROMPT, "chosen": [{**PAIR[0][0], "weight": 0}, user("Sure?"), *PAIR[0]], "rejected": PAIR[1]},
        {"messages": [*PROMPT, {**PAIR[0][0], "weight": 0}], "label": True},
    ],
)
def test_an_answer_with_weight_0_is_refused_if_answers_are_compared(row):
    (problem,) = survey(lines(row)).problems
    assert problem.code == "invalid_weight"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*PROMPT, *PAIR[0]], "conversations": SHAREGPT, "label": True},
        {"messages": [*PROMPT, *PAIR[0]], "kto_tag": False, "label": True},
        {"messages": PROMPT, "conversations": SHAREGPT[:1], "chosen": PAIR[0][0], "rejected": PAIR[1][0]},
    ],
)
def test_two_columns_that_mean_the_same_are_refused(row):
    assert survey(lines(row)).problems[0].code == "duplicate_key"


@pytest.mark.parametrize(
    ("key", "value"), [("history", [["Na", "Str"]]), ("conversation", [{"input": "Hello!", "output": "Hi."}])]
)
def test_a_column_repeats_what_is_read_only_with_whole_words_and_all_its_texts(key, value):
    (problem,) = survey(lines({"messages": [*PROMPT, *PAIR[0]], key: value})).problems
    assert problem.code == "unread_column"
    again = [{"input": ASK, "output": GOOD}]
    assert survey(lines({"messages": [*PROMPT, *PAIR[0]], key: again})).refusal is None


def test_a_number_that_is_no_text_is_shown():
    assert (
        survey(lines({**TEXTS_OF_ASK, "prompt": 7})).refusal == "Line 1: the field /prompt is 7; it must be a string."
    )
    assert survey(lines({**KTO, "label": 1})).refusal == "Line 1: the field /label is 1; it must be true or false."
    assert "missing or null" in survey(lines({**TEXTS_OF_ASK, "rejected": math.nan})).refusal


def test_a_weight_that_is_not_used_is_refused():
    row = {"messages": [*PROMPT, *PAIR[0]], "weight": 0.5}
    (problem,) = survey(lines(row)).problems
    assert (problem.code, problem.pointer) == ("unread_column", "/weight")


@pytest.mark.parametrize(
    "text",
    [
        '{"role": "admin"}',
        '{"role": ["user"], "content": 1}',
        '{"role": "user"}',
        "{'role': 'admin'}",
        "[{'name': 1}]",
        '{"a": "b"}',
    ],
)
def test_answers_in_json_are_texts(text):
    row = {**TEXTS_OF_ASK, "chosen": text}
    assert list(read_groups(lines(row))) == [Group(ASK, (text, BAD), 1)]
