import threading
from collections.abc import Iterator, Sequence

import pytest

from dpo_core.encoding.encode import EncodedGroup, Outline
from dpo_core.training.load_ahead import AHEAD, load_ahead, with_ids

NUM_BATCHES = 5 * AHEAD


def outline(line: int) -> Outline:
    return Outline(range(2), (range(1), range(3)), None, line)


def load(outlines: Sequence[Outline]) -> list[EncodedGroup]:
    return [each.with_ids([each.line, 1], ([2], [3, 4, 5])) for each in outlines]


def batches(count: int = NUM_BATCHES) -> Iterator[list[Outline]]:
    return ([outline(3 * n + i) for i in range(3)] for n in range(count))


def own(groups: Sequence[EncodedGroup]) -> list[int]:
    return [0, 2]


def test_each_batch_has_the_ids_of_the_ranks_own_groups_and_only_those() -> None:
    found = list(load_ahead(batches(), load, own))
    assert [[group.line for group in batch] for batch in found] == [[3 * n + i for i in range(3)] for n in range(40)]
    for first, second, third in found:
        assert isinstance(second, Outline)
        assert [first, third] == load([outline(first.line), outline(third.line)])


def test_a_batch_waits_for_no_later_one() -> None:
    gate = threading.Event()

    def slow() -> Iterator[list[Outline]]:
        yield from batches(1)
        gate.wait()
        yield from batches(1)

    found = load_ahead(slow(), load, own)
    next(found)  # would wait for ever
    gate.set()
    assert len(list(found)) == 1


def test_a_call_loads_what_was_read_meanwhile_and_no_more_than_a_few_batches_are_read_ahead() -> None:
    sizes, num_read, all_read = list[int](), 0, threading.Event()

    def counted() -> Iterator[list[Outline]]:
        nonlocal num_read
        for batch in batches():
            num_read += 1
            yield batch
        all_read.set()

    def counting(outlines: Sequence[Outline]) -> list[EncodedGroup]:
        sizes.append(len(outlines))
        return load(outlines)

    for done, _ in enumerate(load_ahead(counted(), counting, own), 1):
        assert num_read <= done + 3 * AHEAD
    assert all_read.is_set()
    assert sum(sizes) == 2 * NUM_BATCHES
    assert max(sizes) <= 2 * AHEAD


@pytest.mark.parametrize("place", ["batches", "load", "own"])
def test_an_error_is_raised_for_the_caller(place: str) -> None:
    def fail(*_: object) -> list[int]:
        raise OSError("away")

    def broken() -> Iterator[list[Outline]]:
        yield from batches(2)
        fail()

    found = load_ahead(
        broken() if place == "batches" else batches(),
        fail if place == "load" else load,  # type: ignore[arg-type]
        fail if place == "own" else own,
    )
    with pytest.raises(OSError, match="away"):
        list(found)


def test_what_has_ids_is_not_loaded_again() -> None:
    groups = [*load([outline(1)]), outline(2)]
    assert with_ids(groups, [0], lambda outlines: pytest.fail("loaded again")) == groups
    assert with_ids(groups, [0, 1], load) == load([outline(1), outline(2)])
