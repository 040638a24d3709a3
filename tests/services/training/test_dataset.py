import tempfile
from collections import Counter
from itertools import accumulate, chain, islice, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_core.batch import plan
from dpo_core.config import TrainConfig
from dpo_core.encode import EncodedGroup
from services.training import dataset
from services.training.dataset import (
    DamagedPart,
    Dataset,
    batched,
    check,
    find_scores,
    global_batches,
    num_steps,
    windows,
    write_part,
    write_scores,
)


def group(number: int) -> EncodedGroup:
    return EncodedGroup([number, 1], ([2, 3], [4]), (-0.1 * number, -1 / 3), number)


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    """23 scored groups in parts of 5, 10 and 8."""
    uri, scores_uri = (tmp_path / "ids").as_uri(), (tmp_path / "scores").as_uri()
    parts = []
    for i, numbers in enumerate([range(5), range(5, 15), range(15, 23)]):
        groups = [group(n) for n in numbers]
        parts.append(write_scores(scores_uri, write_part(uri, f"{i}.parquet", groups), groups))
    return Dataset(uri=uri, parts=tuple(parts), scores_uri=scores_uri)


def epoch(data: Dataset, seed: int, number: int) -> list[int]:
    return [group.line for group in dataset._epoch(data, seed, number, skip=0)]


def test_what_is_written_is_read_again(data: Dataset) -> None:
    assert list(dataset.read_groups(data)) == [group(n) for n in range(23)]
    assert data.num_groups == 23
    assert [part.num_tokens for part in data.parts] == [25, 50, 40]


def test_groups_without_reference_stay_without(tmp_path: Path) -> None:
    part = write_part(str(tmp_path), "0.parquet", [EncodedGroup([1], ([2],), None, 1)])
    assert list(dataset.read_groups(Dataset(uri=str(tmp_path), parts=(part,)))) == [EncodedGroup([1], ([2],), None, 1)]


def test_all_that_people_said_is_kept(tmp_path: Path) -> None:
    groups = [
        EncodedGroup([1, 2], ([3], [4, 5], [6]), None, 7, ratings=(2.0, 1.0, float(1)), weight=0.5),
        EncodedGroup([1], ([2], [3]), None, 9, margin=0.25),
    ]
    part = write_part(str(tmp_path), "0.parquet", groups)
    assert list(dataset.read_groups(Dataset(uri=str(tmp_path), parts=(part,)))) == groups


@pytest.mark.parametrize("folder", ["ids", "scores"])
def test_a_damaged_part_is_refused_by_name(data: Dataset, tmp_path: Path, folder: str) -> None:
    path = tmp_path / folder / "1.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DamagedPart, match=rf"{folder}/1\.parquet has another sha256"):
        check(data)
    path.unlink()
    with pytest.raises(DamagedPart, match=rf"{folder}/1\.parquet is missing"):
        check(data)


def test_scores_that_are_there_are_found(data: Dataset, tmp_path: Path) -> None:
    bare = data.parts[1].model_copy(update={"scores_sha256": None})
    assert data.scores_uri
    assert find_scores(data.scores_uri, bare) == data.parts[1]
    assert find_scores((tmp_path / "elsewhere").as_uri(), bare) is None


@pytest.mark.parametrize("window_tokens", [1, 80, 2**26])
def test_an_epoch_has_every_row_once_in_an_order_of_seed_and_epoch(
    data: Dataset, window_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "WINDOW_TOKENS", window_tokens)
    orders = [epoch(data, seed, number) for seed in (0, 1) for number in (0, 1)]
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert epoch(data, 0, 1) == orders[1]
    assert list(range(23)) not in orders


def test_memory_is_bounded_by_windows(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "WINDOW_TOKENS", 80)
    for parts, rows in windows(data.parts, seed=0, epoch=0):
        assert sum(part.num_tokens for part in parts) <= 80
        assert sorted(rows) == list(range(sum(part.num_groups for part in parts)))


def test_groups_are_read_in_order_in_batches(data: Dataset) -> None:
    batches = list(batched(dataset.read_groups(data), 10))
    assert [[group.line for group in batch] for batch in batches] == [[*range(10)], [*range(10, 20)], [20, 21, 22]]


def test_batches_after_any_step_are_the_rest_of_the_run(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "WINDOW_TOKENS", 80)
    config = TrainConfig(batch_size=4, n_epochs=3).resolved(data.num_groups)
    batches = list(global_batches(data, config, after_step=0))
    assert len(batches) == num_steps(data.num_groups, config) == 18
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 3] * 3
    assert Counter(group.line for group in chain(*batches)) == dict.fromkeys(range(23), 3)
    for step in range(19):
        assert list(global_batches(data, config, after_step=step)) == batches[step:]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    batch_size=st.integers(1, 9),
    window=st.integers(1, 120),
    seed=st.integers(0, 2**31 - 1),
    num_ranks=st.integers(1, 5),
    data=st.data(),
)
def test_no_row_is_lost_or_doubled_whatever_the_sizes_workers_seeds_and_kills(
    sizes: list[int], batch_size: int, window: int, seed: int, num_ranks: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "WINDOW_TOKENS", window)
        ends = list(accumulate(sizes, initial=0))
        parts = [
            write_part(
                folder, f"{i}.parquet", [EncodedGroup([n + 1] * (1 + n % 3), ([2],), None, n) for n in range(*both)]
            )
            for i, both in enumerate(pairwise(ends))
        ]
        made = Dataset(uri=folder, parts=tuple(parts))
        config = TrainConfig(batch_size=min(batch_size, ends[-1]), n_epochs=2, seed=seed).resolved(ends[-1])
        killed_after = data.draw(st.integers(0, num_steps(ends[-1], config)), "killed_after")
        before = list(islice(global_batches(made, config, after_step=0), killed_after))
        batches = [*before, *global_batches(made, config, after_step=killed_after)]
    lines = [group.line for batch in batches for group in computed_by(num_ranks, batch)]
    assert sorted(lines[: ends[-1]]) == sorted(lines[ends[-1] :]) == list(range(ends[-1]))


def computed_by(num_ranks: int, batch: list[EncodedGroup]) -> list[EncodedGroup]:
    """What the ranks compute of a batch, together."""
    ranks = plan([group.num_tokens for group in batch], num_ranks=num_ranks, max_tokens_per_pack=8)
    assert len(ranks) == num_ranks
    return [batch[i] for packs in ranks for pack in packs for i in pack]
