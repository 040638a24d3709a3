import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from dpo_core.encoding.encode import EncodedGroup, Outline
from dpo_core.training.load_ahead import AHEAD, Groups, LoadIds, load_ahead, load_groups

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


def test_however_slow_the_caller_is_only_a_few_batches_are_read_ahead_and_a_call_loads_a_few() -> None:
    sizes, num_read = list[int](), 0

    def counted() -> Iterator[list[Outline]]:
        nonlocal num_read
        for batch in batches():
            num_read += 1
            yield batch

    def counting(outlines: Sequence[Outline]) -> list[EncodedGroup]:
        sizes.append(len(outlines))
        return load(outlines)

    for done, _ in enumerate(load_ahead(counted(), counting, own), 1):
        seen: tuple[int, int] | None = None
        while seen != (seen := (num_read, len(sizes))):  # until the threads do nothing more
            time.sleep(0.003)
        assert num_read < done + 3 * AHEAD
    assert sum(sizes) == 2 * NUM_BATCHES
    assert max(sizes) <= 2 * AHEAD


def fail(*_: object) -> list[int]:
    raise OSError("away")


@pytest.mark.parametrize("place", ["batches", "own"])
def test_an_error_is_raised_when_the_batches_before_it_are_done(place: str) -> None:
    def broken() -> Iterator[list[Outline]]:
        yield from batches()
        if place == "own":
            yield []
        fail()

    found = load_ahead(broken(), load, lambda groups: own(groups) if groups else fail())
    assert len([next(found) for _ in range(NUM_BATCHES)]) == NUM_BATCHES
    with pytest.raises(OSError, match="away"):
        next(found)


def test_a_call_that_fails_is_raised_before_its_own_first_batch_and_after_all_earlier_ones() -> None:
    bad = 3 * (NUM_BATCHES - 1)

    def load_most(outlines: Sequence[Outline]) -> list[EncodedGroup]:
        return fail() if bad in (outline.line for outline in outlines) else load(outlines)  # type: ignore[return-value]

    done: list[Groups] = []
    with pytest.raises(OSError, match="away"):
        done.extend(load_ahead(batches(), load_most, own))
    assert NUM_BATCHES - AHEAD <= len(done) < NUM_BATCHES


def wrong_line(outlines: Sequence[Outline]) -> list[EncodedGroup]:
    return [replace(group, line=group.line + 1) for group in load(outlines)]


def wrong_length(outlines: Sequence[Outline]) -> list[EncodedGroup]:
    return [replace(group, prompt_ids=[1]) for group in load(outlines)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda outlines: load(outlines)[1:], "returned 1 groups for 2 outlines"),
        (lambda outlines: load(outlines) * 2, "returned 4 groups for 2 outlines"),
        (wrong_line, r"returned line 2 with \[2, 1, 3\] tokens for the outline of line 1 "),
        (lambda outlines: load(outlines)[::-1], "returned line 2"),
        (wrong_length, r"returned line 1 with \[1, 1, 3\] tokens"),
    ],
)
def test_other_groups_than_were_asked_for_are_refused(wrong: LoadIds, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_groups([outline(1), outline(2)], [0, 1], wrong)


BLOCKED = """
import threading
from dpo_core.encoding.encode import Outline
from dpo_core.training.load_ahead import load_ahead

is_loading = threading.Event()

def load(outlines):
    is_loading.set()
    threading.Event().wait()

def batches():
    yield []
    yield [Outline(range(1), (range(1),), None, 1)]

found = load_ahead(batches(), load, lambda groups: list(range(len(groups))))
next(found)
if not is_loading.is_set():
    threading.Thread(target=lambda: next(found, None), daemon=True).start()
assert is_loading.wait(60)
"""


def test_a_call_that_never_returns_does_not_keep_the_process_from_ending() -> None:
    subprocess.run([sys.executable, "-c", BLOCKED], check=True, timeout=120)


def test_what_has_ids_is_not_loaded_again() -> None:
    groups = [*load([outline(1)]), outline(2)]
    assert load_groups(groups, [0], lambda outlines: pytest.fail("loaded again")) == groups
    assert load_groups(groups, [0, 1], load) == load([outline(1), outline(2)])
