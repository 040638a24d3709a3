"""What encoding would do with a training file: `python -m services.training.check_program <request uri>`.

The command `raydpo data check` does the same without a cluster.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol, TypeVar

from dpo_core.config import Truncation
from services import storage
from services.contract import CheckRequest, CheckResult, Contract, Failed, Recipe
from services.training.data.encoding import Encoded, Piece, encode_piece, load, split, unrefused
from services.training.data.file_report import EncodingReport, merge
from services.training.data.preview import Preview, preview, sample
from services.training.reports.reporting import JobFailed
from services.training.source.source import unpacked

logger = logging.getLogger(__name__)

NUM_PREVIEWS = 10

Item = TypeVar("Item", bound=Contract)
Result = TypeVar("Result", bound=Contract)


class Tokens(EncodingReport):
    """What encoding finds in a file, and under which limit."""

    limit: int  # tokens that a group may have: max_length, or what the model has positions for
    truncation: Truncation


class Check(Contract):
    tokens: Tokens
    preview: tuple[Preview, ...]  # rows spread over the file


class Each(Protocol):
    """Does work on each item, somewhere and in any order."""

    def __call__(
        self, work: Callable[[Item], Result], items: Sequence[Item], result: type[Result]
    ) -> Iterator[Result]: ...


def in_turn(work: Callable[[Item], Result], items: Sequence[Item], result: type[Result]) -> Iterator[Result]:
    """Here, one after the other."""
    return map(work, items)


def check(recipe: Recipe, folder_uri: str, each: Each) -> Check:
    """`folder_uri` takes the plain lines of a packed file. Raises JobFailed for a file or model that is no use."""
    uri = unpacked(recipe.training_uri, storage.join(folder_uri, "training.jsonl"))
    try:
        return _check(recipe.model_copy(update={"training_uri": uri}), each)
    finally:
        if uri != recipe.training_uri:
            storage.delete(uri)


def _check(plain: Recipe, each: Each) -> Check:
    results = list(unrefused(each(partial(_encode, plain), list(split(plain.training_uri, plain.columns)), Encoded)))
    found = merge(result.report for result in results)
    rows = list(sample(plain.training_uri, found.num_rows, NUM_PREVIEWS, plain.columns))
    previews = sorted(each(partial(preview, plain), rows, Preview), key=lambda preview: preview.line)
    tokens = Tokens(**dict(found), limit=results[0].limit, truncation=plain.truncation)
    return Check(tokens=tokens, preview=tuple(previews))


def _encode(recipe: Recipe, piece: Piece) -> Encoded:
    try:
        load(recipe.model_source)
    except Exception as error:  # whatever stands there, the user sees why it is no model
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        failed = Failed(code="invalid_model", message=f"The model cannot be used: {reason}", param="model")
        return Encoded(piece=piece.number, report=EncodingReport(), refused=(piece.first_line, failed))
    return encode_piece(recipe, None, piece)


def main(request_uri: str) -> None:
    import ray  # which the command does without

    from services.training.data.tasks import in_tasks

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    request = CheckRequest.model_validate_json(storage.read_bytes(request_uri))
    ray.init(address="auto", logging_level=logging.WARNING)
    result = answer(request, in_tasks)
    storage.write_bytes(storage.join(request.folder_uri, "report.json"), result.model_dump_json().encode())


def answer(request: CheckRequest, each: Each) -> CheckResult:
    try:
        report = check(request.recipe, request.folder_uri, each).model_dump(mode="json")
        return CheckResult(finished_at=time.time(), report=report)
    except JobFailed as failure:
        logger.error("%s", failure)
        return CheckResult(finished_at=time.time(), error=failure.report)


if __name__ == "__main__":
    main(sys.argv[1])
