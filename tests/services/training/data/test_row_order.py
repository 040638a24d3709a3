import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, chain, islice, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_core.config import TrainConfig
from dpo_core.encoding.encode import EncodedGroup
from dpo_core.policy.batch import plan
from services.training.data import dataset, row_order
from services.training.data.dataset import Dataset, Part, write_part
from services.training.data.row_order import batched, global_batches, num_places, num_steps, windows

Pieces = list[tuple[int, int]]  # rows, and groups that are left of them


def write(folder: str | Path, pieces: Pieces) -> Dataset:
    """Writes a dataset with one file for each (rows, groups) in `pieces`. The groups are numbered through by their
    lines."""
    parts = []
    for i, numbers in enumerate(pairwise(accumulate((groups for _, groups in pieces), initial=0))):
        groups = [EncodedGroup([n + 1] * (1 + n % 3), ([2],), None, n) for n in range(*numbers)]
        parts.append(write_part(str(folder), f"{i}.parquet", groups, num_rows=pieces[i][0]))
    return Dataset(uri=str(folder), parts=tuple(parts))


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    """Returns a dataset of 23 groups and as many rows, in pieces (ranges of lines) of 5, 10 and 8 rows."""
    return write(tmp_path, [(5, 5), (10, 10), (8, 8)])


def lines(batches: Sequence[Sequence[EncodedGroup]]) -> list[int]:
    return [group.line for group in chain(*batches)]


def config_for(data: Dataset, *, batch_size: int, n_epochs: int, seed: int = 0) -> TrainConfig:
    config = TrainConfig(batch_size=batch_size, n_epochs=n_epochs, seed=seed)
    return config.resolved(num_places(data, seed))


@pytest.mark.parametrize("pieces_per_window", [1, 2, 8])
def test_an_epoch_has_every_group_once_in_an_order_of_seed_and_epoch(
    data: Dataset, pieces_per_window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_order, "PIECES_PER_WINDOW", pieces_per_window)
    orders = []
    for seed in (0, 1):
        batches = list(global_batches(data, config_for(data, batch_size=23, n_epochs=2, seed=seed), after_step=0))
        assert lines(batches) == lines(
            list(global_batches(data, config_for(data, batch_size=23, n_epochs=2, seed=seed), after_step=0))
        )
        orders += [lines([batch]) for batch in batches]
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    assert list(range(23)) not in orders


def test_a_window_has_few_pieces_each_is_in_one_and_no_row_is_read_to_know_it() -> None:
    num_rows = list(range(1, 21))
    found = list(windows(num_rows, seed=3, epoch=1))
    assert [len(pieces) for _, pieces in found] == [8, 8, 4]
    assert sorted(chain(*(pieces for _, pieces in found))) == list(range(20))
    assert [before for before, _ in found] == list(
        accumulate((sum(num_rows[n] for n in pieces) for _, pieces in found[:2]), initial=0)
    )


def test_groups_are_read_in_order_in_batches(data: Dataset) -> None:
    batches = list(batched(dataset.read_groups(data), 10))
    assert [[group.line for group in batch] for batch in batches] == [[*range(10)], [*range(10, 20)], [20, 21, 22]]


@pytest.mark.parametrize("pieces_per_window", [1, 2, 8])
def test_batches_after_any_step_are_the_rest_of_the_run(
    data: Dataset, pieces_per_window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_order, "PIECES_PER_WINDOW", pieces_per_window)
    config = config_for(data, batch_size=4, n_epochs=3)
    batches = list(global_batches(data, config, after_step=0))
    assert len(batches) == num_steps(num_places(data, config.seed), config) == 18
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 3] * 3
    assert Counter(lines(batches)) == dict.fromkeys(range(23), 3)
    for step in range(19):
        assert list(global_batches(data, config, after_step=step)) == batches[step:]


def test_rows_of_which_nothing_is_left_make_batches_of_one_window_no_smaller(tmp_path: Path) -> None:
    data = write(tmp_path, [(30, 11), (20, 0), (40, 13)])
    config = config_for(data, batch_size=8, n_epochs=1)
    assert [len(batch) for batch in global_batches(data, config, after_step=0)] == [8, 8, 8]


def test_the_first_window_says_how_many_groups_a_row_gives_and_batches_stay_about_as_large(tmp_path: Path) -> None:
    left = [70, 66, 72, 68, 71, 69, 74, 70, 73, 67] * 4
    data = write(tmp_path, [(100, groups) for groups in left])
    config = config_for(data, batch_size=16, n_epochs=2)
    sizes = [len(batch) for batch in global_batches(data, config, after_step=0)]
    assert sum(sizes) == 2 * sum(left)
    assert len(sizes) == num_steps(num_places(data, 0), config)
    assert num_places(data, 0) == pytest.approx(sum(left), rel=0.02)
    whole = len(sizes) // 2 - 1  # the last of an epoch may be smaller
    assert all(15 <= size <= 17 for size in sizes[:whole] + sizes[whole + 1 : -1])


def test_a_row_may_give_several_groups(tmp_path: Path) -> None:
    data = write(tmp_path, [(10, 35)] * 16)
    batches = list(global_batches(data, config_for(data, batch_size=8, n_epochs=1), after_step=0))
    assert {len(batch) for batch in batches} == {8}
    assert len(batches) == 70


class Arriving:
    """A Dataset that records, in order, for which pieces (ranges of lines) a reader waits."""

    def __init__(self, whole: Dataset) -> None:
        self.uri, self.scores_uri, self.num_rows = whole.uri, whole.scores_uri, whole.num_rows
        self._whole = whole
        self.asked: list[int] = []

    def take(self, pieces: Sequence[int]) -> list[Part]:
        self.asked += [piece for piece in pieces if piece not in self.asked]
        return self._whole.take(pieces)


def test_a_step_waits_for_no_later_window_than_its_own(tmp_path: Path) -> None:
    data = Arriving(write(tmp_path, [(8, 8)] * 40))
    config = TrainConfig(batch_size=8, n_epochs=1).resolved(num_places(data, 0))
    in_order = list(chain(*(pieces for _, pieces in windows(data.num_rows, 0, epoch=0))))
    for step, batch in enumerate(global_batches(data, config, after_step=0), 1):
        assert len(batch) == 8
        assert data.asked == in_order[: -(-step // 8) * 8]


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    pieces=st.lists(
        st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, 2 * n))), min_size=1, max_size=7
    ).filter(lambda pieces: any(groups for _, groups in pieces)),
    batch_size=st.integers(1, 9),
    pieces_per_window=st.integers(1, 8),
    seed=st.integers(0, 2**31 - 1),
    num_ranks=st.integers(1, 5),
    data=st.data(),
)
def test_no_group_is_lost_or_doubled_whatever_is_left_of_the_rows_workers_seeds_and_kills(
    pieces: Pieces, batch_size: int, pieces_per_window: int, seed: int, num_ranks: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_order, "PIECES_PER_WINDOW", pieces_per_window)
        made = write(folder, pieces)
        config = config_for(made, batch_size=batch_size, n_epochs=2, seed=seed)
        steps = num_steps(num_places(made, seed), config)
        killed_after = data.draw(st.integers(0, steps), "killed_after")
        before = list(islice(global_batches(Arriving(made), config, after_step=0), killed_after))
        after = list(global_batches(made, config, after_step=killed_after))
    count = made.num_groups
    found = [group.line for batch in before + after if batch for group in computed_by(num_ranks, batch)]
    assert len(before) == killed_after
    assert len(after) == steps - killed_after
    assert sorted(found[:count]) == sorted(found[count:]) == list(range(count))
    if len(pieces) <= pieces_per_window:
        assert config.batch_size is not None
        assert all(len(batch) == config.batch_size for batch in (before + after)[: count // config.batch_size])


def computed_by(num_ranks: int, batch: list[EncodedGroup]) -> list[EncodedGroup]:
    """Returns the groups of the batch that all ranks together compute, in the order of ranks."""
    ranks = plan([group.num_tokens for group in batch], num_ranks=num_ranks, max_tokens_per_pack=8)
    assert len(ranks) == num_ranks
    return [batch[i] for packs in ranks for pack in packs for i in pack]
