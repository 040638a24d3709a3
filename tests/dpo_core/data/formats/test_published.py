"""Tests the readers of public sets that have columns of their own."""

import pytest

from dpo_core.data.feedback import read_groups
from dpo_core.data.groups import Group
from dpo_core.data.survey import survey
from tests.dpo_core.data.formats.test_formats import ASK, BAD, GOOD, PAIR, PROMPT, PUBLISHED, assistant, lines, user


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_public_set_is_read_in_its_own_columns(name):
    row, kind, ratings = PUBLISHED[name]
    report = survey(lines(row))
    assert (report.format, report.kind, report.refusal) == (name, kind, None)
    assert list(read_groups(lines(row))) == [Group(PROMPT, PAIR, 1, ratings)]


def test_summaries_are_asked_for_as_their_models_were():
    info = {"subreddit": "fruit", "title": "Red", "post": "A long one."}
    row = {"info": info, "summaries": [{"text": BAD}, {"text": GOOD}], "choice": 1}
    (group,) = read_groups(lines(row))
    asked = "SUBREDDIT: r/fruit\n\nTITLE: Red\n\nPOST: A long one.\n\nTL;DR:"
    assert group == Group([user(asked)], PAIR, 1, (1.0, 0.0))


@pytest.mark.parametrize(
    "row",
    [
        {**PUBLISHED["HelpSteer2 preference"][0], "preference_strength": 0},
        {**PUBLISHED["Chatbot Arena"][0], "winner": "tie (bothbad)"},
    ],
)
def test_a_preference_for_neither_is_a_tie(row):
    assert survey(lines(row)).num_tied == 1


def test_an_input_is_written_below_its_instruction():
    row = {"instruction": "Translate.", "input": "Kers", "chosen": "Cherry", "rejected": "Banana"}
    (group,) = read_groups(lines(row))
    assert group.prompt == [user("Translate.\nKers")]


@pytest.mark.parametrize(
    ("winner", "ratings"), [("A", (1.0, 0.0)), ("response_b", (1.0, 0.0)), ("model_a", (1.0, 0.0)), ("tie", (0.0, 0.0))]
)
def test_two_answers_have_a_winner(winner, ratings):
    row = {"prompt": ASK, "response_a": GOOD, "response_b": BAD, "winner": winner}
    (group,) = read_groups(lines(row))
    best = BAD if winner == "response_b" else GOOD
    assert (group.completions[0], group.ratings) == ([assistant(best)], ratings)
    assert survey(lines({**row, "winner": "both"})).problems[0].code == "unknown_choice"


def test_the_input_of_alpaca_farm_is_written_below_its_instruction():
    row = {"instruction": "Translate.", "input": "Kers", "output_1": BAD, "output_2": GOOD, "preference": 2}
    assert list(read_groups(lines(row))) == [Group([user("Translate.\nKers")], PAIR, 1, (1.0, 0.0))]


def test_a_choice_that_a_table_made_a_float_of_is_the_same():
    row = PUBLISHED["PKU-SafeRLHF"][0]
    assert list(read_groups(lines({**row, "better_response_id": 1.0}))) == list(read_groups(lines(row)))
