"""Tests that full searches of the garbage collector stop during the block, and come back after it in every case."""

import gc

import pytest

from services.training.data.garbage import without_full_collections


def test_only_full_collections_rest_and_only_within_the_block() -> None:
    before = gc.get_threshold()

    def fail() -> None:
        with without_full_collections():
            assert gc.get_threshold()[:2] == before[:2]
            assert gc.get_threshold()[2] > before[2]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert gc.get_threshold() == before
