"""Tests the rules for the number of shards and the size of packs, which training and plans share.

A pack is the rows of one forward pass.
"""

import pytest

from dpo_core.plan.rules import STATE_SHARE, choose_pack, fewest_shards


def test_a_state_is_split_no_further_than_it_must_be():
    state = 800
    assert fewest_shards((1, 2, 8), lambda shards: state // shards, state / STATE_SHARE) == 1
    assert fewest_shards((1, 2, 8), lambda shards: state // shards, 0.5 * state / STATE_SHARE) == 2
    assert fewest_shards((1, 2, 8), lambda shards: state // shards, 1) == 8


@pytest.mark.parametrize(
    ("budget", "given", "wanted", "expected"),
    [
        (None, None, "auto", (4096, "off", 4096)),
        (1000 * 100, None, "auto", (512, "off", 1000)),
        (100 * 100, None, "auto", (512, "on", 1000)),
        (100 * 100, None, "off", (256, "off", 100)),
        (1000 * 100, 700, "on", (700, "on", 4096)),
    ],
    ids=["memory is unknown", "fits", "fits if layers are recomputed", "does not fit", "chosen by the user"],
)
def test_a_pack_is_as_large_as_memory_allows(budget, given, wanted, expected):
    assert choose_pack(budget, 100, 10, given=given, wanted=wanted, least=256, most=4096) == expected
