"""The uploaded file becomes encoded groups, piece by piece in tasks: text never passes through the driver."""

import functools
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from dpo_core.encode import NoChatTemplate, encode_group
from dpo_core.feedback import FeedbackReport, check, is_tied, read_groups
from dpo_core.jsonl import InvalidRow, read_lines
from services import storage
from services.contract import AttemptSpec, Contract, Failed, Message, Report
from services.training.dataset import Dataset, Part, write_part
from services.training.reporting import JobFailed, progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_PER_PIECE = 1000
BYTES_PER_PIECE = 8 * 2**20
LINES_NAMED = 10


class Piece(Contract):
    """Whole lines of a file; `num_rows` of them, at least one, are not blank."""

    number: int
    first_line: int  # from 1
    num_rows: int
    start: int  # bytes
    size: int  # bytes


class Encoded(Contract):
    """What became of a piece."""

    num_rows: int
    part: Part | None = None  # None: none of its groups could be used
    too_long: tuple[tuple[int, int], ...] = ()  # line, and tokens of the prompt and the longest completion
    tied: tuple[int, ...] = ()  # lines that rate all their completions alike
    limit: int = 0  # tokens that a group may have: max_length, or what the model has positions for
    refused: tuple[int, Failed] | None = None  # the line that cannot be used


def encode(
    spec: AttemptSpec,
    folder_uri: str,
    encode_pieces: Callable[[list[Piece]], Iterable[Encoded]],
    report: Callable[[Report], None],
) -> Dataset:
    """Writes the groups of the training file to `folder_uri`, and says what the file holds.

    `encode_pieces` calls `encode_piece` on each, somewhere and in any order. Raises JobFailed for a
    file that cannot be used.
    """
    found = _check_first_row(spec)
    pieces = list(split(spec.training_uri))
    done = progress(report, "encoding", sum(piece.num_rows for piece in pieces))
    results: list[Encoded] = []
    for result in encode_pieces(pieces):
        results.append(result)
        done(sum(result.num_rows for result in results))
    if refusals := [result.refused for result in results if result.refused]:
        raise JobFailed(min(refusals, key=lambda refusal: refusal[0])[1])
    parts = sorted((result.part for result in results if result.part), key=lambda part: part.name)
    _report_counts(spec, found, results, report)
    return Dataset(uri=folder_uri, parts=tuple(parts))


def _check_first_row(spec: AttemptSpec) -> FeedbackReport:
    with storage.open_input(spec.training_uri) as file:
        lines: list[bytes] = []
        for line in read_lines(file):
            lines.append(line)
            if line.strip():
                break
    try:
        found = check(lines)
    except InvalidRow as error:
        raise _invalid_file(str(error)) from None
    objective = spec.config.objective
    if found.kind not in objective.traits.learns_from:
        held = f"{found.kind} ({found.format} format)"
        raise _invalid_file(
            f"The file holds {held}; method {objective.type} needs {' or '.join(objective.traits.learns_from)}."
        )
    return found


def _report_counts(
    spec: AttemptSpec, found: FeedbackReport, results: list[Encoded], report: Callable[[Report], None]
) -> None:
    too_long = sorted(row for result in results for row in result.too_long)
    tied = sorted(line for result in results for line in result.tied)
    kept = sum(result.part.num_groups for result in results if result.part)
    count = kept + len(too_long) + len(tied)
    limit = results[0].limit
    remedy = "raise max_length or shorten them" if limit == spec.config.max_length else "the model takes no more"
    if len(too_long) == count:
        shortest = min(length for _, length in too_long)
        raise _invalid_file(
            f"All {count} {found.kind} are longer than {limit} tokens, the shortest has {shortest}; {remedy}."
        )
    alike = "rate all their completions alike, which says nothing of an order"
    if not kept:
        longer = f"{len(too_long)} are longer than {limit} tokens"
        raise _invalid_file(f"Of {count} {found.kind} {longer} and {len(tied)} {alike}: none is left.")
    report(Message(message=f"Training file has {count} {found.kind} ({found.format} format)."))
    if too_long:
        left_out = f"Left out {len(too_long)} of {count} {found.kind}, longer than {limit} tokens"
        where = _named([line for line, _ in too_long])
        report(Message(level="warn", message=f"{left_out} ({where}); {remedy}."))
    if tied:
        left_out = f"Left out {len(tied)} of {count} {found.kind} that {alike} ({_named(tied)})."
        report(Message(level="warn", message=left_out))


def _named(lines: Sequence[int]) -> str:
    more = f" and {len(lines) - LINES_NAMED} more" if len(lines) > LINES_NAMED else ""
    return f"line {', '.join(map(str, lines[:LINES_NAMED]))}{more}"


def _invalid_file(message: str) -> JobFailed:
    return JobFailed(Failed(code="invalid_training_file", message=message, param="training_file"))


def split(uri: str) -> Iterator[Piece]:
    piece = Piece(number=0, first_line=1, num_rows=0, start=0, size=0)
    with storage.open_input(uri) as file:
        for number, line in enumerate(read_lines(file), 1):
            rows, size = piece.num_rows + bool(line.strip()), piece.size + len(line)
            piece = piece.model_copy(update={"num_rows": rows, "size": size})
            if rows == ROWS_PER_PIECE or (rows and size >= BYTES_PER_PIECE):
                yield piece
                start = piece.start + piece.size
                piece = Piece(number=piece.number + 1, first_line=number + 1, num_rows=0, start=start, size=0)
    if piece.num_rows:
        yield piece


def encode_piece(spec: AttemptSpec, folder_uri: str, piece: Piece) -> Encoded:
    tokenizer, positions = _load(spec.model_source)
    limit = min(spec.config.max_length, positions)
    with storage.open_input(spec.training_uri) as file:
        file.seek(piece.start)
        lines = read_lines(io.BytesIO(file.read(piece.size)))
    kept, too_long, tied = [], [], []
    try:
        for group in read_groups(lines, first_line=piece.first_line):
            if is_tied(group):
                tied.append(group.line)
                continue
            encoded = encode_group(group, tokenizer)
            length = len(encoded.prompt_ids) + max(map(len, encoded.completion_ids))
            if length > limit:
                too_long.append((group.line, length))
            else:
                kept.append(encoded)
    except InvalidRow as error:
        failed = Failed(code="invalid_training_file", message=str(error), param="training_file")
        return Encoded(num_rows=piece.num_rows, refused=(error.line, failed))
    except NoChatTemplate as error:
        failed = Failed(code="invalid_model", message=str(error), param="model")
        return Encoded(num_rows=piece.num_rows, refused=(piece.first_line, failed))
    return Encoded(
        num_rows=piece.num_rows,
        part=write_part(folder_uri, f"{piece.number:05d}.parquet", kept) if kept else None,
        too_long=tuple(too_long),
        tied=tuple(tied),
        limit=limit,
    )


@functools.cache
def _load(model_source: str) -> "tuple[PreTrainedTokenizerBase, int]":
    """Once per process: the tokenizer, and how many tokens the model has positions for."""
    # Imported here because it takes eight seconds of a core, and the driver does without.
    from transformers import AutoConfig

    from dpo_core.model import load_tokenizer

    folder = storage.fetch(model_source)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    return load_tokenizer(folder), getattr(config, "max_position_embeddings", None) or 2**31
