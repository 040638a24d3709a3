"""Tests which answers become rows, and that rejection sampling has the distribution that RSO promises."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

from dpo_core.data.groups import Group
from services.control_plane.rounds.selection import Answer, Selection, reject, rows_of

TEXT, CHAT = Group("Why?", (), 1), Group([{"role": "user", "content": "Why?"}], (), 2)


def found(*answers: tuple[str, float], unfinished: int = 0) -> dict[str, Any]:
    texts = [{"text": text, "is_finished": i >= unfinished} for i, (text, _) in enumerate(answers)]
    return {"answers": texts, "scores": [score for _, score in answers]}


def pairs(selection: Selection, *answers: tuple[str, float]) -> list[tuple[str, str]]:
    rows, _ = rows_of(selection, [(TEXT, found(*answers))], "seed")
    return [(row["chosen"], row["rejected"]) for row in rows]


FOUR = (("a", 1.0), ("b", 3.0), ("c", 2.0), ("d", 3.0))


def test_the_best_and_the_worst_answer_are_a_pair() -> None:
    assert pairs(Selection("best_worst"), *FOUR) == [("b", "a")]


def test_all_pairs_leave_ties_out() -> None:
    found_pairs = pairs(Selection("all_pairs"), *FOUR)
    assert set(found_pairs) == {("b", "c"), ("b", "a"), ("d", "c"), ("d", "a"), ("c", "a")}
    assert len(found_pairs) == 5


def test_a_ranking_has_all_answers_with_their_scores_best_first() -> None:
    (row,), _ = rows_of(Selection("ranking"), [(CHAT, found(*FOUR))], "seed")
    assert [each[0]["content"] for each in row["completions"]] == ["b", "d", "c", "a"]
    assert row["scores"] == [3, 3, 2, 1]
    assert row["prompt"] == CHAT.prompt


@pytest.mark.parametrize("kind", ["best_worst", "all_pairs", "ranking"])
def test_answers_that_are_equal_but_for_case_and_punctuation_are_one(kind: Any) -> None:
    samples = [(TEXT, found(("Yes, it is.", 1.0), ("yes it is", 0.0), ("No.", 1.0)))]
    rows, counts = rows_of(Selection(kind), samples, "seed")
    assert (rows, counts["num_duplicates"], counts["num_ties"]) == ([], 1, 1)


def test_answers_without_words_are_told_apart_by_their_characters() -> None:
    assert pairs(Selection("best_worst"), ("🙂", 1.0), ("🙁", 0.0)) == [("🙂", "🙁")]


def test_what_was_cut_off_is_left_out_and_counted() -> None:
    rows, counts = rows_of(Selection("best_worst"), [(TEXT, found(("a", 9.0), *FOUR, unfinished=1))], "seed")
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("b", "a")]
    assert (counts["num_prompts"], counts["num_answers"], counts["num_unfinished"], counts["num_rows"]) == (1, 5, 1, 1)


def test_a_row_that_repeats_is_kept_once() -> None:
    rows, counts = rows_of(Selection("best_worst"), [(TEXT, found(*FOUR)), (TEXT, found(*FOUR))], "seed")
    assert (len(rows), counts["num_repeated_rows"], counts["num_rows"]) == (1, 1, 1)


def test_a_row_keeps_the_tools_and_the_template_arguments_of_its_prompt() -> None:
    tools: Any = [{"type": "function", "function": {"name": "find"}}]
    group = Group(CHAT.prompt, (), 1, tools=tools, template_arguments={"enable_thinking": False})
    (row,), _ = rows_of(Selection("best_worst"), [(group, found(*FOUR))], "seed")
    assert (row["tools"], row["chat_template_kwargs"]) == (tools, {"enable_thinking": False})
    assert (row["score_chosen"], row["score_rejected"]) == (3, 1)


@pytest.mark.parametrize(
    ("selection", "most"),
    [
        (Selection("best_worst"), 1),
        (Selection("ranking"), 1),
        (Selection("all_pairs"), 6),
        (Selection("rso", 1000.0, 4), 2),
    ],
)
def test_no_prompt_makes_more_rows_than_its_selection_says(selection: Selection, most: int) -> None:
    rows, _ = rows_of(selection, [(TEXT, found(("a", 1.0), ("b", 3.0), ("c", 2.0), ("d", 4.0)))], "seed")
    assert len(rows) == selection.most_rows(4) == most


def test_each_two_accepted_answers_are_a_pair_that_the_score_orders() -> None:
    answers = [(f"answer {i}", float(i % 4)) for i in range(32)]
    rows, counts = rows_of(Selection("rso", 5.0, 8), [(TEXT, found(*answers))], "seed")
    assert counts["num_accepted"] == 8
    assert counts["num_tried"] >= 8
    assert len(rows) + counts["num_ties"] == 4
    assert all(row["score_chosen"] > row["score_rejected"] for row in rows)
    assert rows_of(Selection("rso", 5.0, 8), [(TEXT, found(*answers))], "seed")[0] == rows
    assert rows_of(Selection("rso", 5.0, 8), [(TEXT, found(*answers))], "another")[0] != rows


def test_no_answer_is_accepted_twice_and_none_more_than_there_are() -> None:
    answers = [Answer(str(i), float(i)) for i in range(5)]
    accepted = reject(answers, 0.1, 9, random.Random(0))
    assert sorted(answer.text for answer in accepted.answers) == list("01234")


POLICY = {"a": (0.4, 0.0), "b": (0.3, 0.5), "c": (0.2, 1.0), "d": (0.1, 1.2)}  # probability and score of each answer


def chi_square(observed: Sequence[float], expected: list[float]) -> float:
    """Returns the p-value of Pearson's chi-square test."""
    statistic = math.fsum((seen - wanted) ** 2 / wanted for seen, wanted in zip(observed, expected, strict=True))
    halves = [torch.tensor(value / 2, dtype=torch.float64) for value in (len(observed) - 1, statistic)]
    return float(torch.special.gammaincc(*halves))


def test_the_chi_square_test_rejects_at_its_critical_value() -> None:
    """7.815 is the value of the chi-square distribution with three degrees of freedom that tables give for 0.05."""
    side = math.sqrt(7.815 * 100 / 2)
    assert chi_square([100 + side, 100 - side, 100, 100], [100.0] * 4) == pytest.approx(0.05, abs=1e-4)


@pytest.mark.parametrize("beta", [0.25, 0.5, 2.0])
def test_accepted_samples_follow_the_target_distribution(beta: float) -> None:
    """A chi-square test against pi(y) exp(r(y) / beta), normalized (equation 5 of RSO)."""
    draw, trials, each = random.Random(1), 3000, 2
    texts, chances = list(POLICY), [chance for chance, _ in POLICY.values()]
    counts = Counter[str]()
    for _ in range(trials):
        candidates = [Answer(text, POLICY[text][1]) for text in draw.choices(texts, chances, k=200)]
        counts.update(answer.text for answer in reject(candidates, beta, each, draw).answers)
    weights = {text: chance * math.exp(score / beta) for text, (chance, score) in POLICY.items()}
    expected = [trials * each * weights[text] / math.fsum(weights.values()) for text in texts]
    assert chi_square([counts[text] for text in texts], expected) > 0.01
    untilted = [trials * each * chance for chance in chances]
    assert chi_square([counts[text] for text in texts], untilted) < 1e-6


def test_the_share_of_accepted_candidates_is_the_one_that_the_scores_give() -> None:
    draw = random.Random(2)
    texts, chances = list(POLICY), [chance for chance, _ in POLICY.values()]
    candidates = [Answer(text, POLICY[text][1]) for text in draw.choices(texts, chances, k=20_000)]
    accepted = reject(candidates, 0.5, 2000, draw)
    highest = max(score for _, score in POLICY.values())
    expected = math.fsum(chance * math.exp((score - highest) / 0.5) for chance, score in POLICY.values())
    assert len(accepted.answers) / accepted.num_tried == pytest.approx(expected, abs=0.02)


def test_a_lower_temperature_accepts_higher_scores() -> None:
    def mean_score(beta: float) -> float:
        draw = random.Random(3)
        candidates = [Answer(str(i), draw.random()) for i in range(2000)]
        scores = [answer.score for answer in reject(candidates, beta, 100, draw).answers]
        return sum(scores) / len(scores)

    means = [mean_score(beta) for beta in (10.0, 0.5, 0.1)]
    assert all(one < other for one, other in pairwise(means))
