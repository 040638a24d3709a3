"""Encodes a training file as groups of token ids, in parallel. A group is a prompt with its completions.

The file is divided into pieces, each a range of lines. Ray tasks encode the pieces. The tasks read the pieces
themselves, so the job's driver (its main program) never holds the text of the file.
"""

import functools
import hashlib
import io
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_core.data.feedback import Record, are_one_group, is_tied, read_records
from dpo_core.data.groups import Group
from dpo_core.data.jsonl import InvalidRow, read_lines
from dpo_core.data.messages import Text
from dpo_core.encoding.encode import EncodedGroup, encode_groups
from dpo_core.encoding.templates import UnusableTemplate, prefill
from dpo_core.encoding.truncation import truncate
from dpo_core.encoding.unread import unread
from dpo_core.options import InvalidOption
from dpo_core.plan.positions import check_max_length, positions_in
from services import storage
from services.contract import AttemptSpec, Contract, Failed, Message, Recipe, Report
from services.training import policies
from services.training.data.dataset import Dataset, Part, write_part
from services.training.data.file_report import (
    IDENTICAL,
    TIED,
    TOO_LONG,
    EncodingReport,
    Tally,
    left_out,
    lengths_in_words,
    marked,
    merge,
    num_invalid,
)
from services.training.data.garbage import without_full_collections
from services.training.reports.reporting import JobFailed, invalid_file, progress

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

EMPTY = "The file has no rows; write at least one row, a JSON object, into the file."
NUM_FIRST = 1000  # rows that are searched for a usable row, which determines the format
NUM_LAST = 3  # last tokens, which must have the end token: some templates write a line feed after it
RARE = "ʘ東𓀀🫠\u2062\n\tAé"  # a tokenizer that knows these knows all characters, as byte-level tokenizers do
ROWS_PER_PIECE = 5000
BYTES_PER_PIECE = 8 * 2**20
MOST_PIECES = 20_000  # about the most pieces of a file; larger files have larger pieces


class Piece(Contract):
    """Describes a piece: a range of whole lines of a file, from byte `start` on, `size` bytes long. `num_rows` is the
    number of its lines that are not blank, at least 1."""

    number: int
    first_line: int  # from 1
    num_rows: int
    start: int  # byte of the file where the piece begins
    size: int  # bytes of the piece


class Encoded(Contract):
    """Holds the result of encoding one piece, a range of lines of a file: the files of groups that were written, to
    train on (`training`) and for validation (`held_out`), and counts of rows and tokens for the user (`report`). A
    group is a prompt with its completions. `refused` is the reason why the piece cannot be used, None if it can be
    used."""

    piece: int
    report: EncodingReport
    limit: int = 0  # most tokens of a group: max_length, or the model's positions if they are fewer
    training: Part | None = None  # None: the piece was refused, or nothing is written
    held_out: Part | None = None  # None: no groups are held out
    refused: tuple[int, Failed] | None = None  # the line that cannot be used, and the reason


class Encoding(Contract):
    """Holds the result of encoding a whole file: the groups to train on (`training`), the groups held out for
    validation (`held_out`), and counts of rows and tokens for the user (`report`). A group is a prompt with its
    completions. `limit` is the most tokens of a group, `format` the format of the rows, and `kind` their kind of
    feedback, such as pairs."""

    training: Dataset
    held_out: Dataset
    report: EncodingReport
    limit: int
    kind: str
    format: str


def recipe_of(spec: AttemptSpec) -> Recipe:
    return Recipe(
        training_uri=spec.training_uri,
        model_source=spec.model_source,
        max_length=spec.config.max_length,
        truncation=spec.config.truncation,
        validation_share=spec.validation_share,
        invalid_rows=spec.invalid_rows,
        columns=spec.columns,
        today=spec.today,
        other_prompts=spec.config.objective.traits.needs_other_prompts,
    )


def encode(
    spec: AttemptSpec,
    folder_uri: str,
    encode_pieces: Callable[[Sequence[Piece]], Iterable[Encoded]],
    report: Callable[[Report], None],
) -> Encoding:
    """Encodes the training file of `spec` as groups (prompts with their completions) of token ids, and writes them to
    the folder `folder_uri`.

    `encode_pieces` must call the function `encode_piece` on each piece (a range of the file's lines), in any process
    and order. Raises JobFailed if the file cannot be used.
    """
    format, kind = _look_at_first_row(spec)
    _check_kind(spec, kind, format)
    pieces = list(split(spec.training_uri, spec.columns))
    done = progress(report, "encoding", sum(piece.num_rows for piece in pieces))
    results: list[Encoded] = []
    num_rows = 0
    for result in raise_refusals(encode_pieces(pieces)):
        _refuse_margins(spec, result.report, kind)  # this comes before a worker reads the groups
        results.append(result)
        num_rows += result.report.num_rows
        done(num_rows)
    file_report = merge(result.report for result in results)
    _refuse_many_invalid(recipe_of(spec), file_report)
    return Encoding(
        training=_dataset(folder_uri, (result.training for result in results)),
        held_out=_dataset(folder_uri, (result.held_out for result in results)),
        report=file_report,
        limit=results[0].limit,
        kind=kind,
        format=format,
    )


def _refuse_many_invalid(recipe: Recipe, file_report: EncodingReport) -> None:
    count, share = num_invalid(file_report), recipe.invalid_rows.max_share
    if count > share * file_report.num_rows:
        first = min(file_report.invalid.values(), key=lambda reason: reason.first)
        limit = f"{count} of {file_report.num_rows} rows cannot be used, and at most {share:.2%} may be left out"
        raise JobFailed(invalid_file(f"{limit}; correct them, or raise max_invalid_share. {first.sentence}"))


def raise_refusals(results: Iterable[Encoded]) -> Iterator[Encoded]:
    """Yields the results of the encoded pieces (ranges of lines of a file) that can be used. Raises JobFailed if a
    piece cannot be used.

    If the model cannot be used, JobFailed is raised immediately. If a line of the file cannot be used, JobFailed is
    raised after the last result; the error names the first such line of the file.
    """
    refusals: list[tuple[int, Failed]] = []
    for result in results:
        if result.refused is None:
            yield result
        elif result.refused[1].param == "model":
            raise JobFailed(result.refused[1])
        else:
            refusals.append(result.refused)
    if refusals:
        raise JobFailed(min(refusals, key=lambda refusal: refusal[0])[1])


def report_contents(spec: AttemptSpec, encoding: Encoding, purpose: str, report: Callable[[Report], None]) -> None:
    """Tells the user what an encoded file contains, and how many of its rows were left out, cut to the maximum length,
    or held out for validation. `encoding` is the result of encoding the file. `purpose` is the word for the file in
    these messages: "Training" makes "Training file has 100 pairs"."""
    contents, config = encoding.report, spec.config
    report(Message(message=f"{purpose} file has {contents.num_groups} {encoding.kind} ({encoding.format} format)."))
    report(Message(message=lengths_in_words(contents, encoding.limit, config.truncation)))
    warnings = left_out(contents, encoding.kind, encoding.limit, _remedy(spec, encoding))
    for sentence in warnings + marked(contents, encoding.kind):
        report(Message(level="warn", message=sentence))
    if spec.validation_share:
        kind = encoding.kind
        held_out = f"Held out {contents.num_held_out} {kind} for validation."
        report(Message(message=f"{held_out} Rows with the same prompt are either all held out or all trained on."))


def _look_at_first_row(spec: AttemptSpec) -> tuple[str, str]:
    """Returns the name of the training file's format, and the kind of feedback in its rows, such as pairs. The first
    row decides both. Raises JobFailed if the first row cannot be used.

    If the job leaves out rows that cannot be used, the first usable row decides. In this case, JobFailed is raised if
    none of the first NUM_FIRST rows can be used.
    """
    drops = spec.invalid_rows.how == "drop"
    with storage.open_input(spec.training_uri) as file:
        records = islice(read_records(read_lines(file), columns=spec.columns), NUM_FIRST if drops else 1)
        first = next((record for record in records if not (drops and record.problem)), None)
    if first is None:
        unusable = f"None of the file's first {NUM_FIRST} rows can be used; check the file's format."
        raise JobFailed(invalid_file(unusable if drops else EMPTY))
    if first.problem or first.format is None:
        raise JobFailed(invalid_file(str(first.problem)))
    return first.format.name, first.format.kind


def _check_kind(spec: AttemptSpec, kind: str, format: str) -> None:
    objective = spec.config.objective
    if kind not in objective.traits.learns_from:
        needed = " or ".join(objective.traits.learns_from)
        raise JobFailed(
            invalid_file(
                f"The file holds {kind} ({format} format), but the method {objective.type} learns from {needed}; "
                "use another method or another file."
            )
        )


def refuse_unusable(spec: AttemptSpec, encoding: Encoding) -> None:
    """Raises JobFailed if the objective of the job cannot learn from the encoded file, or if no group (a prompt with
    its completions) is left to train on. `encoding` is the result of encoding the file."""
    contents, kind, limit = encoding.report, encoding.kind, encoding.limit
    _check_kind(spec, kind, encoding.format)
    _refuse_margins(spec, contents, kind)
    if contents.num_kept:
        return
    long = contents.dropped.get(TOO_LONG)
    if long and long.count == contents.num_groups:
        shortest = f"(the shortest one has {contents.shortest_too_long} tokens)"
        remedy = _remedy(spec, encoding)
        raise JobFailed(invalid_file(f"All {long.count} {kind} are longer than {limit} tokens {shortest}; {remedy}."))
    reasons = " ".join(left_out(contents, kind, limit, _remedy(spec, encoding)))
    raise JobFailed(invalid_file(f"None of the file's {contents.num_groups} {kind} is left to train on. {reasons}"))


def _refuse_margins(spec: AttemptSpec, contents: EncodingReport, kind: str) -> None:
    if contents.margins.count and not spec.config.objective.traits.takes_margins:
        margins = f"{contents.margins.count} {kind} have a margin ({contents.margins})"
        sentence = f"{margins}, which the method '{spec.config.objective.type}' cannot use; remove them, or use dpo."
        raise JobFailed(invalid_file(sentence))


def _remedy(spec: AttemptSpec, encoding: Encoding) -> str:
    if encoding.limit < spec.config.max_length:
        return "the model can read no longer texts, so shorten the rows"
    return "raise max_length, choose another truncation, or shorten the rows"


def _dataset(uri: str, parts: Iterable[Part | None]) -> Dataset:
    return Dataset(
        uri=uri, parts=tuple(sorted((part for part in parts if part), key=lambda part: (len(part.name), part.name)))
    )


def split(uri: str, columns: Mapping[str, str] | None = None) -> Iterator[Piece]:
    """Divides the file at `uri` into pieces, each a range of whole lines, and yields the pieces.

    Rows of one group (a prompt with its completions) are always in one piece. Files above 160 GB have larger pieces,
    not more pieces. `columns` maps standard names of columns to the file's own, such as {"prompt": "question"}; None
    means that the file has the standard names.
    """
    with storage.open_input(uri) as file:
        scale = max(1.0, file.seek(0, io.SEEK_END) / (MOST_PIECES * BYTES_PER_PIECE))
        file.seek(0)
        number = start = rows = size = 0
        first_line, last = 1, b""
        for line_number, line in enumerate(read_lines(file), 1):
            if line.strip():
                is_full = rows >= ROWS_PER_PIECE * scale or (rows and size >= BYTES_PER_PIECE * scale)
                if is_full and not are_one_group(last, line, columns=columns):
                    yield Piece(number=number, first_line=first_line, num_rows=rows, start=start, size=size)
                    number, first_line, start, rows, size = number + 1, line_number, start + size, 0, 0
                rows, last = rows + 1, line
            size += len(line)
    if rows:
        yield Piece(number=number, first_line=first_line, num_rows=rows, start=start, size=size)


@without_full_collections()
def encode_piece(recipe: Recipe, folder_uri: str | None, piece: Piece) -> Encoded:
    """Encodes the rows of one piece (a range of lines of the file). Returns counts of rows and tokens, and the files
    that were written. `recipe` names the file, the model and the options.

    The groups (prompts with their completions) of token ids are written to the folder `folder_uri`; if `folder_uri` is
    None, they are not written. If the model or a line cannot be used, the result names the reason, and no files are
    written.
    """
    tally = Tally(piece.num_rows)
    try:
        model = load(recipe.model_source)
        limit = min(recipe.max_length, model.positions)
        check_max_length(recipe.max_length, model.positions)
        groups = list(_without_ties(_usable(recipe, piece, tally), tally))
        training, held_out = _encode(groups, model, recipe, limit, tally)
    except InvalidRow as error:
        return Encoded(piece=piece.number, report=tally.report(), refused=(error.line, invalid_file(str(error))))
    except InvalidOption as error:
        failed = Failed(code="invalid_value", message=str(error), param=f"x_raydpo.{error.field}")
        return Encoded(piece=piece.number, report=tally.report(), refused=(piece.first_line, failed))
    except UnusableTemplate as error:
        failed = Failed(code="invalid_model", message=str(error), param="model")
        return Encoded(piece=piece.number, report=tally.report(), refused=(piece.first_line, failed))
    except JobFailed as error:
        return Encoded(piece=piece.number, report=tally.report(), refused=(piece.first_line, error.report))
    return Encoded(
        piece=piece.number,
        report=tally.report(),
        limit=limit,
        training=_write(folder_uri, piece, ".parquet", training),
        held_out=_write(folder_uri, piece, ".held-out.parquet", held_out) if held_out else None,
    )


def _write(folder_uri: str | None, piece: Piece, suffix: str, groups: Sequence[EncodedGroup]) -> Part | None:
    if folder_uri is None:
        return None
    return write_part(folder_uri, f"{piece.number:05d}{suffix}", groups, num_rows=piece.num_rows)


def read_piece(recipe: Recipe, piece: Piece) -> Iterator[Record]:
    with storage.open_input(recipe.training_uri) as file:
        file.seek(piece.start)
        lines = read_lines(io.BytesIO(file.read(piece.size)))
    return read_records(lines, first_line=piece.first_line, columns=recipe.columns)


def _usable(recipe: Recipe, piece: Piece, tally: Tally) -> Iterator[Group]:
    """Yields the groups (prompts with completions) of the usable rows in a piece, a range of lines of the file.

    What happens to a row that cannot be used depends on `recipe`: either it raises InvalidRow, or it is left out and
    counted in `tally`.
    """
    for record in read_piece(recipe, piece):
        if record.problem and recipe.invalid_rows.how == "refuse":
            raise record.problem
        if record.problem:
            tally.leave_out(record.problem)
        yield from record.groups


def _without_ties(groups: Iterable[Group], tally: Tally) -> Iterator[Group]:
    for group in groups:
        if is_tied(group):
            tally.drop(TIED, group.line)
        else:
            yield group


def _encode(
    groups: Sequence[Group], model: "Model", recipe: Recipe, limit: int, tally: Tally
) -> tuple[list[EncodedGroup], list[EncodedGroup]]:
    """Encodes groups (prompts with their completions) as token ids. A group with more than `limit` tokens is cut or
    left out, as `recipe` says.

    Returns two lists: the groups to train on, and the groups that are held out for validation. Counts in `tally` what
    happened to each group.
    """
    tokenizer = model.tokenizer
    training: list[EncodedGroup] = []
    held_out: list[EncodedGroup] = []
    special_tokens = _any_of(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    may_lack_some = not _knows_all(RARE, tokenizer)
    for group in groups:
        texts = _texts(group, tokenizer)
        if any(map(special_tokens.search, texts)):
            tally.mark_special(group.line)
        if may_lack_some and not all(_knows_all(text, tokenizer) for text in texts):
            tally.mark_unknown(group.line)
    for group, encoded in zip(groups, encode_groups(groups, tokenizer, today=recipe.today), strict=True):
        if isinstance(encoded, InvalidRow):
            tally.drop(encoded.code, encoded.line, encoded.message)
            continue
        tally.see(encoded)
        cut = truncate(encoded, limit, recipe.truncation)
        if cut is None:
            tokens = len(encoded.prompt_ids) + max(map(len, encoded.completion_ids))
            tally.drop(TOO_LONG, encoded.line, tokens=tokens)
            continue
        if len(cut.completion_ids) > 1 and len(set(map(tuple, cut.completion_ids))) == 1:
            tally.drop(IDENTICAL, cut.line)
            continue
        if isinstance(group.prompt, list) and not _is_asked(encoded, tokenizer):
            tally.mark_unasked(encoded.line)
        if not all(_is_ended(ids, model) for ids in encoded.completion_ids):
            tally.mark_unended(encoded.line)
        for what in unread(group, tokenizer, today=recipe.today):
            tally.mark_unread(what, encoded.line)
        is_held_out = _is_held_out(encoded.prompt_ids, recipe.validation_share)
        tally.keep(encoded, cut, held_out=is_held_out)
        (held_out if is_held_out else training).append(cut)
    if recipe.other_prompts:
        return _with_others(training, limit), _with_others(held_out, limit)
    return training, held_out


def _with_others(groups: Sequence[EncodedGroup], limit: int) -> list[EncodedGroup]:
    """Adds to each group (a prompt with its completions) an answer to another prompt. The prompt of the group and this
    answer together have at most `limit` tokens, because the answer is cut.

    The answer is the best completion of the next group with another prompt. Its rating is nan, which marks it as an
    answer to another prompt. If all groups have the same prompt, nothing is added. From the added answers, KTO
    estimates how far the policy is from its reference (arXiv 2402.01306, section 4.1).
    """
    reversed_groups: list[EncodedGroup] = []
    other = next((group for group in groups if _prompt(group) != _prompt(groups[-1])), None)
    if other is None:
        return list(groups)  # all groups have the same prompt
    following = other
    for group in reversed(groups):
        if _prompt(following) != _prompt(group):
            other = following
        reversed_groups.append(_with_another(group, other, limit))
        following = group
    return reversed_groups[::-1]


def _prompt(group: EncodedGroup) -> list[int]:
    return list(group.prompt_ids)


def _with_another(group: EncodedGroup, other: EncodedGroup, limit: int) -> EncodedGroup:
    best, spans = other.completion_ids[:1], other.others and other.others[:1]
    answer = truncate(EncodedGroup(group.prompt_ids, best, None, group.line, others=spans), limit, "keep_start")
    assert answer is not None  # the group's own completions fit after the prompt, so a cut answer fits
    none = ((),) * len(group.completion_ids)
    others = (*(group.others or none), *(answer.others or ((),))) if group.others or answer.others else None
    return replace(
        group,
        completion_ids=(*group.completion_ids, *answer.completion_ids),
        ratings=(*group.ranked(), math.nan),
        others=others,
    )


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, words)) or r"\Z\A.")  # without words, the pattern matches nothing


def _texts(group: Group, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Returns the texts that the user wrote in the group (a prompt with its completions): the prompt, the tools and the
    completions.

    A BOS token at the start of the prompt is removed, and so is an EOS token at the end of a completion.
    """
    texts = [_words(group.prompt).removeprefix(tokenizer.bos_token or ""), repr(group.tools or "")]
    texts += [_words(completion).removesuffix(tokenizer.eos_token or "") for completion in group.completions]
    return texts


def _knows_all(text: str, tokenizer: "PreTrainedTokenizerBase") -> bool:
    return all(_knows(character, tokenizer) for character in set(text))


@functools.cache
def _knows(character: str, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer can encode the character in such a way that decoding gives exactly this character again.

    For some tokenizers, decoding gives the unknown token, a small letter in place of a capital one, or a space in place
    of a line feed. Such a tokenizer does not know the character.
    """
    ids = tokenizer(f"a{character}b", add_special_tokens=False).input_ids
    if character.isspace() and character not in "\n\t":
        return True
    kept = unicodedata.normalize("NFKD", tokenizer.decode(ids))
    return tokenizer.unk_token_id not in ids and unicodedata.normalize("NFKD", character) in kept


def _is_asked(group: EncodedGroup, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the prompt of the group (a prompt with its completions) ends with the words with which the chat template
    begins an answer, such as <think>."""
    words = prefill(tokenizer).strip()
    return not words or tokenizer.decode(group.prompt_ids[-len(words) - 1 :]).rstrip().endswith(words)


def _is_ended(ids: Sequence[int], model: "Model") -> bool:
    """Whether the completion with the token `ids` ends with an end token of the model. White space may follow the end
    token."""
    last = ids[-NUM_LAST:]
    behind = next((i for i, number in enumerate(reversed(last)) if number in model.ends), None)
    return behind is not None and _is_blank(tuple(last[len(last) - behind :]), model.tokenizer)


@functools.lru_cache(maxsize=1024)
def _is_blank(ids: tuple[int, ...], tokenizer: "PreTrainedTokenizerBase") -> bool:
    return not ids or not tokenizer.decode(ids).strip()


def _words(text: Text) -> str:
    if isinstance(text, str):
        return text
    return "\n".join(f"{message['content']}{message.get('tool_calls', '')}" for message in text)


def _is_held_out(prompt_ids: Sequence[int], share: float) -> bool:
    """Whether groups with this prompt are held out for validation. A group is a prompt with its completions. `share`,
    from 0 to 1, is the share of all groups to hold out; about this share is held out.

    The prompt alone decides, so that no prompt is in both the training and the validation data.
    """
    if not share:
        return False
    digest = hashlib.blake2b(repr(list(prompt_ids)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


@dataclass(frozen=True)
class Model:
    """Holds what encoding needs to know of a model: its tokenizer, the most tokens of one text (`positions`), and the
    ids of its end tokens (`ends`)."""

    tokenizer: "PreTrainedTokenizerBase"
    positions: int  # the most tokens that the model takes
    ends: frozenset[int]  # ids of tokens after which the model stops


@functools.cache
def load(model_source: str) -> Model:
    """Returns the tokenizer, the maximum length and the end tokens of a model. Each process loads the same model only
    once. `model_source` is a storage URI, a local folder or a hub id.

    Raises JobFailed for a folder whose tokenizer or config is missing or damaged.
    """
    # The import is here, because it takes eight CPU seconds and the driver does not need it.
    from transformers import AutoConfig

    from dpo_core.models.model import load_tokenizer

    folder = policies.fetch_words(model_source)
    base = policies.fetch_words(policies.base_of(model_source))
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False).get_text_config()
        tokenizer = load_tokenizer(folder)
        return Model(tokenizer, positions_in(config) or 2**31, _ends(base, config, tokenizer))
    except Exception as error:  # transformers and tokenizers raise errors of all types for damaged files
        of_machine = isinstance(error, MemoryError) or getattr(error, "errno", None) is not None
        if of_machine or not (folder.is_absolute() and base.is_absolute()):  # or the hub does not answer
            raise
        raise JobFailed(unusable(error)) from error


def unusable(error: Exception) -> Failed:
    """Returns the report that a model cannot be used. `error` was raised when its tokenizer or config was loaded."""
    if isinstance(error, JobFailed):
        return error.report
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return Failed(code="invalid_model", message=f"The model cannot be used: {reason}", param="model")


def _ends(folder: Path, config: "PreTrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Returns the ids of the model's end tokens: those of the tokenizer, the config, and the generation config."""
    file = folder / "generation_config.json"
    of_generation = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    sources = [tokenizer.eos_token_id, getattr(config, "eos_token_id", None), of_generation]
    return frozenset(
        number for ids in sources for number in (ids if isinstance(ids, list) else [ids]) if number is not None
    )
