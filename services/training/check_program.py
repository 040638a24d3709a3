"""Checks how a user's data file would be encoded as token ids, without training: `python -m
services.training.check_program <request uri>`.

The program runs as a Ray job and writes its result to storage. The command `raydpo data check` makes the same check
without a cluster.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol, TypeVar

from dpo_core.config import Truncation
from services import storage
from services.contract import CheckRequest, Contract, Recipe, SideJobResult
from services.training.data.encoding import Encoded, Piece, encode_piece, load, raise_refusals, split, unusable
from services.training.data.file_report import EncodingReport, merge
from services.training.data.preview import Preview, preview, sample
from services.training.reports.reporting import JobFailed
from services.training.source.source import unpacked

logger = logging.getLogger(__name__)

NUM_PREVIEWS = 10

Item = TypeVar("Item", bound=Contract)
Result = TypeVar("Result", bound=Contract)


class Tokens(EncodingReport):
    """Describes a checked data file in tokens: the counts of its rows and tokens (fields of EncodingReport), the most
    tokens of a row (`limit`), and what was to happen to longer rows (`truncation`)."""

    limit: int  # most tokens of a group: max_length, or the model's positions if they are fewer
    truncation: Truncation


class Check(Contract):
    """Holds the result of checking a training file: counts in tokens, and some rows as the model would see them."""

    tokens: Tokens
    preview: tuple[Preview, ...]  # some rows, spread over the file


class CallEach(Protocol):
    """The type of a function that calls `work` on each item and yields the results.

    The function may make the calls in other processes, and may yield the results in another order than the items.
    """

    def __call__(
        self, work: Callable[[Item], Result], items: Sequence[Item], result: type[Result]
    ) -> Iterator[Result]: ...


def in_turn(work: Callable[[Item], Result], items: Sequence[Item], result: type[Result]) -> Iterator[Result]:
    """Calls `work` on each item in this process, one after the other, and yields the results.

    `result` is the type of the results. It is not used here: it is a parameter because other functions of the type
    CallEach, which call `work` in other processes, need it.
    """
    return map(work, items)


def check(recipe: Recipe, folder_uri: str, each: CallEach) -> Check:
    """Encodes a training file without storing the token ids. Returns counts of its rows and tokens, and some rows as
    the model would see them.

    `recipe` names the file and all settings of the encoding. If the file is compressed, its unpacked lines are kept in
    the folder `folder_uri` until the check ends. `each` is a function that calls another function on each of several
    items, here the parts of the file. Raises JobFailed for a file or model that cannot be used.
    """
    uri = unpacked(recipe.training_uri, storage.join(folder_uri, "training.jsonl"))
    try:
        return _check(recipe.model_copy(update={"training_uri": uri}), each)
    finally:
        if uri != recipe.training_uri:
            storage.delete(uri)


def _check(plain: Recipe, each: CallEach) -> Check:
    pieces = list(split(plain.training_uri, plain.columns))
    results = list(raise_refusals(each(partial(_encode, plain), pieces, Encoded)))
    report = merge(result.report for result in results)
    rows = list(sample(plain.training_uri, report.num_rows, NUM_PREVIEWS, plain.columns))
    previews = sorted(each(partial(preview, plain), rows, Preview), key=lambda preview: preview.line)
    tokens = Tokens(**dict(report), limit=results[0].limit, truncation=plain.truncation)
    return Check(tokens=tokens, preview=tuple(previews))


def _encode(recipe: Recipe, piece: Piece) -> Encoded:
    try:
        load(recipe.model_source)
    except Exception as error:  # the user sees every error of the model
        return Encoded(piece=piece.number, report=EncodingReport(), refused=(piece.first_line, unusable(error)))
    return encode_piece(recipe, None, piece)


def main(request_uri: str) -> None:
    import ray  # not at the top, because `raydpo data check` works without Ray

    from services.training.data.tasks import in_tasks

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    request = CheckRequest.model_validate_json(storage.read_bytes(request_uri))
    ray.init(address="auto", logging_level=logging.WARNING)
    result = answer(request, in_tasks)
    storage.write_bytes(storage.join(request.folder_uri, "report.json"), result.model_dump_json().encode())


def answer(request: CheckRequest, each: CallEach) -> SideJobResult:
    """Checks the data file that `request` names, and returns the result. `each` is a function that calls another
    function on each of several items, here the parts of the file.

    If the file or the model cannot be used, the result has an error in place of the report.
    """
    try:
        report = check(request.recipe, request.folder_uri, each).model_dump(mode="json")
        return SideJobResult(finished_at=time.time(), report=report)
    except JobFailed as failure:
        logger.error("%s", failure)
        return SideJobResult(finished_at=time.time(), error=failure.report)


if __name__ == "__main__":
    main(sys.argv[1])
