from pathlib import Path

import pytest

from dpo_core.encoding.encode import EncodedGroup
from services.training.data import dataset
from services.training.data.dataset import DamagedPart, Dataset, check, find_scores, write_part, write_scores


def group(number: int) -> EncodedGroup:
    return EncodedGroup([number, 1], ([2, 3], [4]), (-0.1 * number, -1 / 3), number)


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    """Returns a dataset of 23 scored groups in three files of 5, 10 and 8 groups."""
    uri, scores_uri = (tmp_path / "ids").as_uri(), (tmp_path / "scores").as_uri()
    parts = []
    for i, numbers in enumerate([range(5), range(5, 15), range(15, 23)]):
        groups = [group(n) for n in numbers]
        parts.append(write_scores(scores_uri, write_part(uri, f"{i}.parquet", groups), groups))
    return Dataset(uri=uri, parts=tuple(parts), scores_uri=scores_uri)


def test_what_is_written_is_read_again(data: Dataset) -> None:
    assert list(dataset.read_groups(data)) == [group(n) for n in range(23)]
    assert data.num_groups == 23
    assert [part.num_tokens for part in data.parts] == [25, 50, 40]


def test_groups_without_reference_stay_without(tmp_path: Path) -> None:
    part = write_part(str(tmp_path), "0.parquet", [EncodedGroup([1], ([2],), None, 1)])
    assert list(dataset.read_groups(Dataset(uri=str(tmp_path), parts=(part,)))) == [EncodedGroup([1], ([2],), None, 1)]


def test_a_piece_of_which_nothing_is_left_has_a_part_too(data: Dataset, tmp_path: Path) -> None:
    empty = write_scores(data.scores_uri or "", write_part(data.uri, "3.parquet", [], num_rows=7), [])
    assert (empty.num_rows, empty.num_groups, empty.num_tokens) == (7, 0, 0)
    more = data.model_copy(update={"parts": (empty, *data.parts)})
    check(more)
    assert list(dataset.read_groups(more)) == list(dataset.read_groups(data))
    assert (more.num_rows, more.take([1])) == ([7, 5, 10, 8], [data.parts[0]])


def test_all_that_people_said_is_kept(tmp_path: Path) -> None:
    groups = [
        EncodedGroup([1, 2], ([3], [4, 5], [6]), None, 7, ratings=(2.0, 1.0, float(1)), weight=0.5),
        EncodedGroup([1], ([2], [3]), None, 9, margin=0.25),
        EncodedGroup([1], ([2, 3, 4, 5], [3]), None, 10, others=(((1, 2), (3, 4)), ())),
    ]
    part = write_part(str(tmp_path), "0.parquet", groups)
    assert list(dataset.read_groups(Dataset(uri=str(tmp_path), parts=(part,)))) == groups


@pytest.mark.parametrize("folder", ["ids", "scores"])
def test_a_damaged_part_is_refused_by_name(data: Dataset, tmp_path: Path, folder: str) -> None:
    path = tmp_path / folder / "1.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DamagedPart, match=rf"{folder}/1\.parquet with prepared data does not have its recorded sha256"):
        check(data)
    path.unlink()
    with pytest.raises(DamagedPart, match=rf"{folder}/1\.parquet with prepared data is missing"):
        check(data)


def test_scores_that_are_there_are_found(data: Dataset, tmp_path: Path) -> None:
    bare = data.parts[1].model_copy(update={"scores_sha256": None})
    assert data.scores_uri
    assert find_scores(data.scores_uri, bare) == data.parts[1]
    assert find_scores((tmp_path / "elsewhere").as_uri(), bare) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1.parquet", "1.parquet.sha256"])
def test_scores_are_found_only_while_they_are_what_was_written(data: Dataset, tmp_path: Path, name: str) -> None:
    bare, path = data.parts[1].model_copy(update={"scores_sha256": None}), tmp_path / "scores" / name
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert find_scores(str(path.parent), bare) is None
    path.unlink()
    assert find_scores(str(path.parent), bare) is None
