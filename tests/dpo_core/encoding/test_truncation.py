import copy
from dataclasses import replace

import pytest

from dpo_core.data.groups import Group
from dpo_core.encoding.encode import EncodedGroup, encode_group
from dpo_core.encoding.truncation import truncate

GROUP = EncodedGroup([1, 2, 3, 4], ([5, 6, 7], [8]), None, 1)


@pytest.mark.parametrize("how", ["drop", "keep_start", "keep_end"])
def test_a_group_that_fits_is_left_alone(how):
    assert truncate(GROUP, 7, how) is GROUP


@pytest.mark.parametrize(
    ("how", "limit", "prompt", "completions"),
    [
        ("keep_start", 6, [1, 2, 3, 4], ([5, 6], [8])),
        ("keep_start", 5, [1, 2, 3, 4], ([5], [8])),
        ("keep_end", 6, [2, 3, 4], ([5, 6, 7], [8])),
        ("keep_end", 4, [4], ([5, 6, 7], [8])),
    ],
)
def test_a_side_is_cut(how, limit, prompt, completions):
    cut = truncate(GROUP, limit, how)
    assert (cut.prompt_ids, cut.completion_ids, cut.line) == (prompt, completions, 1)
    assert len(cut.prompt_ids) + max(map(len, cut.completion_ids)) <= limit


@pytest.mark.parametrize(("limit", "prompt"), [(6, [1, 3, 4]), (5, [1, 4]), (4, [4])])
def test_a_prompt_keeps_its_bos_where_there_is_room_for_another(limit, prompt):
    assert truncate(replace(GROUP, has_bos=True), limit, "keep_end").prompt_ids == prompt
    assert truncate(GROUP, limit, "keep_end").prompt_ids == [1, 2, 3, 4][3 - limit :]


def test_the_bos_that_a_template_or_the_tokenizer_writes_is_kept(tokenizer):
    question, yes, no = ({"role": role, "content": "yes " * n} for role, n in (("user", 50), *[("assistant", 1)] * 2))
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template.replace("{{ bos_token }}", "")
    group = encode_group(Group([question], ([yes], [no]), 1), tokenizer)
    cut = truncate(group, 40, "keep_end").prompt_ids
    assert cut == [tokenizer.bos_token_id, *group.prompt_ids[1 - len(cut) :]]


@pytest.mark.parametrize(("how", "limit"), [("drop", 6), ("keep_start", 4), ("keep_end", 3)])
def test_no_side_is_left_without_tokens(how, limit):
    assert truncate(GROUP, limit, how) is None


def test_the_ranges_of_others_are_cut_with_their_completion():
    group = EncodedGroup([1, 2], ([3, 4, 5, 6, 7], [8, 9, 10]), None, 1, others=(((1, 2), (3, 4)), ((1, 2),)))
    assert truncate(group, 6, "keep_start").others == (((1, 2), (3, 4)), ((1, 2),))
    assert truncate(group, 5, "keep_start").others == (((1, 2),), ((1, 2),))
    assert truncate(group, 3, "keep_start").others == ((), ())
