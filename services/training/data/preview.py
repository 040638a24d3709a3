"""Shows some rows of a data file as the model will see them: in the form of the chat template, and cut to the limit of
tokens."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from dpo_core.data.feedback import are_one_group, is_tied
from dpo_core.data.jsonl import InvalidRow, read_lines
from dpo_core.encoding.encode import EncodedGroup, encode_groups
from dpo_core.encoding.truncation import truncate
from services import storage
from services.contract import Contract, Recipe
from services.training.data.encoding import Piece, load, read_piece
from services.training.data.file_report import TIED, TOO_LONG

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_CHARACTERS = 2000  # most characters of a prompt or completion; a longer text loses its middle


class Preview(Contract):
    """Shows the first group (a prompt with its completions) of a row as the text that the model sees: the prompt, the
    best completion (`chosen`) and the worst (`rejected`). If the group is left out of the training data, `dropped` is
    the code of the reason. The texts are then empty, unless the group is left out because it is too long.

    In training, only the tokens of the completions count in the loss.
    """

    line: int
    dropped: str | None = None  # code of the reason why the group is left out; None: it is kept
    prompt: str = ""
    chosen: str = ""  # the best completion
    rejected: str | None = None  # the worst completion; None: the group has only one


def sample(uri: str, num_rows: int, count: int, columns: Mapping[str, str] | None = None) -> Iterator[Piece]:
    """Chooses `count` rows, spread evenly over the `num_rows` rows of a file, and yields where these rows are in the
    file.

    Each row is yielded as a piece (a range of lines). If several rows form one group (a prompt with its completions),
    the piece has all of them. `columns` maps standard names of columns to the file's own, such as {"prompt":
    "question"}; None means that the file has the standard names.
    """
    wanted = {place * num_rows // min(count, num_rows) for place in range(min(count, num_rows))}
    place = start = 0
    is_due, piece, last = False, None, b""
    with storage.open_input(uri) as file:
        for number, line in enumerate(read_lines(file), 1):
            if line.strip():
                is_due = is_due or place in wanted
                if (piece or is_due) and not are_one_group(last, line, columns=columns):
                    if piece:
                        yield piece
                    piece = Piece(number=place, first_line=number, num_rows=0, start=start, size=0) if is_due else None
                    is_due = False
                if piece:
                    size = start + len(line) - piece.start
                    piece = piece.model_copy(update={"num_rows": piece.num_rows + 1, "size": size})
                place, last = place + 1, line
            start += len(line)
    if piece:
        yield piece


def preview(recipe: Recipe, row: Piece) -> Preview:
    """Returns the first group (a prompt with its completions) of a row as text, or the reason why the group is left
    out.

    `recipe` names the file, the model and the options of the encoding. The group is encoded and cut as in training, and
    then decoded. Raises UnusableTemplate if the chat template cannot be used.
    """
    model = load(recipe.model_source)
    tokenizer = model.tokenizer
    record = next(read_piece(recipe, row))
    if record.problem:
        return Preview(line=record.line, dropped=record.problem.code)
    group = record.groups[0]
    if is_tied(group):
        return Preview(line=group.line, dropped=TIED)
    (encoded,) = encode_groups([group], tokenizer, today=recipe.today)
    if isinstance(encoded, InvalidRow):
        return Preview(line=group.line, dropped=encoded.code)
    limit = min(recipe.max_length, model.positions)
    cut = truncate(encoded, limit, recipe.truncation)
    return _written(cut or encoded, tokenizer, dropped=None if cut else TOO_LONG)


def _written(group: EncodedGroup, tokenizer: "PreTrainedTokenizerBase", *, dropped: str | None) -> Preview:
    def words(ids: Sequence[int]) -> str:
        text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        half = MOST_CHARACTERS // 2
        return text if len(text) <= MOST_CHARACTERS else f"{text[:half]} […] {text[-half:]}"

    best, *others = group.completion_ids
    rejected = words(others[-1]) if others else None
    return Preview(
        line=group.line, dropped=dropped, prompt=words(group.prompt_ids), chosen=words(best), rejected=rejected
    )
