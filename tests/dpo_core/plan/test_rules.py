"""Tests the rules for the number of shards and the size of packs, which training and plans share.

A pack is the rows of one forward pass.
"""

import pytest

from dpo_core.plan import rules
from dpo_core.plan.rules import STATE_SHARE, choose_pack, fewest_shards, logits_bytes, most_logits_bytes


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


@pytest.mark.parametrize(
    ("device", "rows", "vocabulary", "itemsize", "capped", "expected"),
    [
        ("cpu", 300, 1000, 4, False, 4 * 300 * 1000),
        ("cpu", 301, 1000, 4, False, 4 * 256 * 1000),
        ("cpu", 300, 1000, 2, False, 4 * 300 * 1000 + 2 * 256 * 1000),
        ("cpu", 300, 1000, 4, True, 12 * 256 * 1000),
        ("cpu", 100, 100_000, 4, False, 4 * 100 * 32768),
        ("cuda", 300, 1000, 4, False, 4 * 300 * 1000),
        ("cuda", 2000, 1000, 2, False, 6 * 1024 * 1000),
    ],
    ids=["kept", "too many to keep", "half precision", "capped", "a part of the vocabulary", "GPU", "GPU, many rows"],
)
def test_all_logits_are_held_if_they_are_kept_and_else_a_tile(
    device, rows, vocabulary, itemsize, capped, expected, monkeypatch
):
    monkeypatch.setattr(rules, "KEPT_LOGITS", {"cpu": 300_000})
    assert logits_bytes(device, rows, vocabulary, itemsize, capped=capped) == expected
    assert max(
        logits_bytes(device, fewer, vocabulary, itemsize, capped=capped) for fewer in range(rows + 1)
    ) == most_logits_bytes(device, rows, vocabulary, itemsize, capped=capped)
