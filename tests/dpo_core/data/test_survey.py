import json
import random

from dpo_core.data.duplicates import Named
from dpo_core.data.feedback import read_groups
from dpo_core.data.survey import survey

PAIR = {"prompt": "Sky?", "chosen": " Blue.", "rejected": " Green, I think."}


def lines(*rows: object) -> list[bytes]:
    return [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]


def test_every_problem_is_counted_with_its_first_row():
    bad = {**PAIR, "chosen": 7}
    report = survey(lines(PAIR, bad, b"{", {**PAIR, "chosen": " "}, {"text": "x"}, bad, b"[]"))
    assert (report.format, report.num_rows, report.num_groups) == ("prompt/chosen/rejected texts", 7, 1)
    found = [(problem.code, problem.pointer, problem.rows) for problem in report.problems]
    assert found == [
        ("wrong_type", "/chosen", Named(2, (2, 6))),
        ("invalid_jsonl", "", Named(2, (3, 7))),
        ("empty_completion", "/chosen", Named(1, (4,))),
        ("unknown_format", "", Named(1, (5,))),
    ]
    assert report.refusal.startswith(
        "Line 2: the field /chosen is 7; it must be a string. In all, 6 rows cannot be used: 2 with wrong"
    )


def test_a_good_file_is_not_refused():
    assert survey(lines(PAIR)).refusal is None


def test_a_single_bad_row_is_reported_in_one_sentence():
    assert survey(lines(PAIR, {**PAIR, "chosen": 7})).refusal == "Line 2: the field /chosen is 7; it must be a string."


def test_no_more_than_ten_lines_are_named():
    (problem,) = survey(lines(PAIR, *[b"{"] * 25)).problems
    assert problem.rows == Named(25, tuple(range(2, 12)))


def test_an_empty_file_is_a_problem_of_its_own():
    for content in ([], [b"\n", b"  \n"], [b"\xef\xbb\xbf"]):
        assert [problem.code for problem in survey(content).problems] == ["empty_file"]


def test_the_longer_side_is_counted():
    report = survey(
        lines(PAIR, {**PAIR, "chosen": PAIR["rejected"], "rejected": " No"}, {**PAIR, "rejected": " Red.."})
    )
    assert (report.num_chosen_longer, report.num_rejected_longer) == (1, 1)


def test_duplicates_and_contradictions_are_named_by_line():
    turned = {**PAIR, "chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    report = survey(lines(PAIR, {**PAIR, "prompt": "Sea?"}, PAIR, turned, {**PAIR, "chosen": " Grey."}))
    assert report.duplicates.prompts == Named(3, (3, 4, 5))
    assert report.duplicates.groups == Named(1, (3,))
    assert report.duplicates.contradictions == Named(1, (4,))


def test_labels_contradict_each_other():
    row = {"prompt": "Sky?", "completion": " Blue.", "label": True}
    duplicates = survey(lines(row, row, {**row, "label": False}, {**row, "completion": " No."})).duplicates
    assert duplicates.contradictions == Named(1, (3,))
    assert duplicates.groups == Named(1, (2,))


def test_ignored_keys_of_a_hostile_file_are_bounded():
    report = survey(lines(*({**PAIR, f"key{n}": 1} for n in range(500))))
    assert 100 <= len(report.ignored_keys) <= 101


def test_the_report_agrees_with_the_reader():
    generator = random.Random(0)
    rows = [{**PAIR, "prompt": str(generator.randrange(50))} for _ in range(200)]
    report = survey(lines(*rows))
    assert report.num_groups == len(list(read_groups(lines(*rows)))) == 200
    assert report.duplicates.prompts.count == 200 - len({row["prompt"] for row in rows})


def test_pairs_whose_own_scores_say_the_opposite_are_counted():
    pairs = [
        {**PAIR, "score_chosen": 3, "score_rejected": 9},
        {**PAIR, "score_chosen": 9, "score_rejected": 3.5},
        {**PAIR, "rejected_rating": 5.0, "chosen_rating": 4},
        {**PAIR, "score_chosen": 3, "score_rejected": 3},
        {**PAIR, "score_chosen": "3", "score_rejected": 9},
        {**PAIR, "score_chosen": 3},
        {**PAIR, "chosen_score": 3, "rejected_score": 9, "chosen_rating": 9, "rejected_rating": 3},
    ]
    assert survey(lines(*pairs)).contrary == Named(2, (1, 3))
    of_messages = {"question": "Sky?", "chosen": "Blue.", "rejected": "Green.", "RewardChosen": 1, "RewardRejected": 2}
    assert survey(lines(of_messages)).contrary == Named(1, (1,))


def test_long_ignored_keys_are_shortened():
    (key,) = survey(lines({**PAIR, "k" * 10**6: 1})).ignored_keys
    assert key == "k" * 100


def test_completions_that_begin_with_their_prompt_are_counted():
    twice = {"prompt": "Name a fruit.", "chosen": "Name a fruit. Cherry", "rejected": "Name a fruit. Stone"}
    assert survey(lines(twice, {**twice, "rejected": "Stone"}, PAIR)).num_repeating == 1
    of_messages = {"question": twice["prompt"], "chosen": twice["chosen"], "rejected": twice["rejected"]}
    assert survey(lines(of_messages)).num_repeating == 1
    assert survey(lines({**twice, "prompt": " "})).num_repeating == 0
