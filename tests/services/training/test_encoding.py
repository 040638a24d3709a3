import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_core.config import TrainConfig
from dpo_core.encode import EncodedGroup, encode_group
from dpo_core.feedback import read_groups
from dpo_core.model import load_tokenizer
from dpo_core.options import Supervised
from services import storage
from services.contract import AttemptSpec, Message, Progress, Report
from services.training import dataset, encoding
from services.training.encoding import Encoded, Piece, encode, encode_piece, split
from services.training.reporting import JobFailed

MakeSpec = Callable[..., AttemptSpec]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "ROWS_PER_PIECE", 7)


@pytest.fixture
def run(tmp_path: Path) -> Callable[[AttemptSpec], tuple[list[EncodedGroup], list[Report]]]:
    """Encodes in this process, the last piece first: a cluster keeps no order either."""

    def run(spec: AttemptSpec) -> tuple[list[EncodedGroup], list[Report]]:
        reports: list[Report] = []
        uri = (tmp_path / "encoded").as_uri()

        def encode_pieces(pieces: list[Piece]) -> Iterator[Encoded]:
            return (encode_piece(spec, uri, piece) for piece in reversed(pieces))

        made = encode(spec, uri, encode_pieces, reports.append)
        return list(dataset.read_groups(made)), reports

    return run


def test_pieces_are_whole_lines_and_cover_the_file(tmp_path: Path) -> None:
    rows = [b'{"a": 1}\n', b"\r\n", b"\n", *(b'{"a": %d}\r\n' % n for n in range(20)), b"\n", b'{"last": 1}']
    data = b"\xef\xbb\xbf" + b"".join(rows)
    (tmp_path / "f").write_bytes(data)
    pieces = list(split(str(tmp_path / "f")))
    assert b"".join(data[piece.start : piece.start + piece.size] for piece in pieces) == data
    assert [piece.num_rows for piece in pieces] == [7, 7, 7, 1]
    assert [piece.first_line for piece in pieces] == [1, 10, 17, 24]
    assert [piece.number for piece in pieces] == [0, 1, 2, 3]


def test_an_empty_tail_makes_no_piece(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b'{"a": 1}\n' * 7 + b"\n\n")
    assert len(list(split(str(tmp_path / "f")))) == 1


def test_groups_come_in_the_order_of_the_file_with_their_lines(make_spec: MakeSpec, pairs: str, run: Any) -> None:
    groups, reports = run(make_spec())
    tokenizer = load_tokenizer(make_spec().model_source)
    with storage.open_input(pairs) as file:
        assert groups == [encode_group(group, tokenizer) for group in read_groups(file)]
    assert reports[-1] == Message(message="Training file has 24 pairs (OpenAI preference format).")
    progress = [report for report in reports if isinstance(report, Progress)]
    assert (progress[0].done, progress[-1].done, progress[-1].total) == (0, 24, 24)


def test_long_groups_are_left_out_and_named(make_spec: MakeSpec, run: Any) -> None:
    tokens = {group.line: len(group.prompt_ids) + max(map(len, group.completion_ids)) for group in run(make_spec())[0]}
    limit = sorted(tokens.values())[5]
    long = [line for line, length in tokens.items() if length > limit]
    groups, reports = run(make_spec(config=TrainConfig(max_length=limit)))
    assert [group.line for group in groups] == [line for line in tokens if line not in long]
    assert len(long) > 10
    lines = ", ".join(map(str, long[:10]))
    assert reports[-1] == Message(
        level="warn",
        message=f"Left out {len(long)} of 24 pairs, longer than {limit} tokens "
        f"(line {lines} and {len(long) - 10} more); raise max_length or shorten them.",
    )


def test_rankings_of_real_shape_keep_their_ratings_and_those_without_an_order_are_left_out(
    make_spec: MakeSpec, run: Any, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "Sky?", "completions": [" Green.", " Blue."], "ranks": [2, 1], "weight": 0.5},
        {"prompt": "Sun?", "completions": [" Green.", " Blue."], "ranks": [1, 1]},
        {"prompt": "Sea?", "completions": [" Red.", " Blue.", " Blue!"], "ranks": [2, 1, 1]},
    ]
    (tmp_path / "ranked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    groups, reports = run(make_spec(training_uri=str(tmp_path / "ranked.jsonl")))
    found = [(group.line, group.ratings, group.weight) for group in groups]
    assert found == [(1, (-1.0, -2.0), 0.5), (3, (-1.0, -1.0, -2.0), 1.0)]
    assert reports[-2].message == "Training file has 3 rankings (prompt/completions/ranks format)."
    assert reports[-1].message == (
        "Left out 1 of 3 rankings that rate all their completions alike, which says nothing of an order (line 2)."
    )
    (tmp_path / "tied.jsonl").write_text(json.dumps(rows[1]))
    with pytest.raises(JobFailed, match=r"0 are longer than .* and 1 rate all .* none is left"):
        run(make_spec(training_uri=str(tmp_path / "tied.jsonl")))


def test_nothing_short_enough_is_the_users_to_mend(make_spec: MakeSpec, run: Any) -> None:
    with pytest.raises(JobFailed) as failure:
        run(make_spec(config=TrainConfig(max_length=8)))
    assert failure.value.report.code == "invalid_training_file"
    assert failure.value.report.message.startswith("All 24 pairs are longer than 8 tokens, the shortest has ")
    assert failure.value.report.message.endswith("; raise max_length or shorten them.")


def test_the_models_positions_are_a_limit_too(make_spec: MakeSpec, run: Any, make_pair: Any, tmp_path: Path) -> None:
    rows = [make_pair(1), make_pair(2)]
    rows[1]["preferred_output"][0]["content"] = "x" * 128
    (tmp_path / "two.jsonl").write_text("\n".join(map(json.dumps, rows)))
    groups, reports = run(make_spec(training_uri=str(tmp_path / "two.jsonl")))
    assert [group.line for group in groups] == [1]
    assert reports[-1].message == "Left out 1 of 2 pairs, longer than 128 tokens (line 2); the model takes no more."


def test_the_first_unusable_line_is_named(make_spec: MakeSpec, run: Any, pairs: str, tmp_path: Path) -> None:
    lines = storage.read_bytes(pairs).splitlines(keepends=True)
    lines[9], lines[19] = b"{}\n", b"neither\n"
    (tmp_path / "broken.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(JobFailed, match="Line 10") as failure:
        run(make_spec(training_uri=str(tmp_path / "broken.jsonl")))
    assert (failure.value.report.code, failure.value.report.param) == ("invalid_training_file", "training_file")


@pytest.mark.parametrize("content", ["", "\n\n", "neither", '{"messages": []}'])
def test_a_file_without_a_usable_row_is_refused(make_spec: MakeSpec, run: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "useless.jsonl").write_text(content)
    with pytest.raises(JobFailed) as failure:
        run(make_spec(training_uri=str(tmp_path / "useless.jsonl")))
    assert failure.value.report.code == "invalid_training_file"


def test_the_method_must_fit_the_rows(make_spec: MakeSpec, run: Any) -> None:
    with pytest.raises(JobFailed, match=r"holds pairs .* method supervised needs demonstrations"):
        run(make_spec(config=TrainConfig(objective=Supervised())))


def test_a_model_without_chat_template_is_refused(
    make_spec: MakeSpec, run: Any, model_source: str, tmp_path: Path
) -> None:
    shutil.copytree(model_source, tmp_path / "mute")
    (tmp_path / "mute/chat_template.jinja").unlink()
    with pytest.raises(JobFailed, match="no chat template") as failure:
        run(make_spec(model_source=str(tmp_path / "mute")))
    assert (failure.value.report.code, failure.value.report.param) == ("invalid_model", "model")
