from hypothesis import given
from hypothesis import strategies as st

from dpo_core.data.duplicates import Named, find_duplicates
from dpo_core.data.groups import Group


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.sampled_from("xyz")), max_size=30))
def test_duplicates_are_those_that_a_plain_search_finds(rows):
    groups = [Group(prompt, (best, worst), line) for line, (prompt, best, worst) in enumerate(rows, 1)]
    prompts = [i for i, row in enumerate(rows, 1) if row[0] in [r[0] for r in rows[: i - 1]]]
    again = [i for i, row in enumerate(rows, 1) if row in rows[: i - 1]]
    first: dict[tuple[str, frozenset[str]], str] = {}
    turned = []
    for i, (prompt, best, worst) in enumerate(rows, 1):
        if best != worst and first.setdefault((prompt, frozenset((best, worst))), best) != best:
            turned.append(i)
    found = find_duplicates(iter(groups))
    for named, expected in zip(
        (found.prompts, found.groups, found.contradictions), (prompts, again, turned), strict=True
    ):
        assert named == Named(len(expected), tuple(expected[:10]))


def test_groups_are_equal_only_if_completions_ratings_and_their_order_are():
    texts = ("a", "b", "c")
    groups = [Group("?", texts, 1), Group("?", texts, 2, (2.0, 1.0, 0.0)), Group("?", ("a", "c", "b"), 3)]
    assert find_duplicates(groups).groups == Named(0, ())
    again = Group("?", texts, 4, (2.0, 1.0, 0.0), weight=0.5, margin=1.0)  # the weight and the margin do not count
    assert find_duplicates([*groups, again]).groups == Named(1, (4,))


def test_a_ranking_contradicts_one_whose_best_and_worst_completion_are_exchanged():
    groups = [Group("?", ("a", "b", "c"), 1), Group("?", ("c", "b", "a"), 2), Group("?", ("b", "a", "c"), 3)]
    assert find_duplicates(groups).contradictions == Named(1, (2,))


def test_lines_are_named_in_a_sentence():
    assert str(Named(2, (3, 7))) == "line 3, 7"
    assert str(Named(12, (1, 2))) == "line 1, 2 and 10 more"
