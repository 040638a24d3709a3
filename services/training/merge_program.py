"""Merges a LoRA adapter into its base model, so that a user can download one model: `python -m
services.training.merge_program <request uri>`.

The program runs as a Ray job and writes its result to storage.
"""

import logging
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from services import storage
from services.contract import Failed, MergeReport, MergeRequest, SideJobResult
from services.training import policies

logger = logging.getLogger(__name__)


def main(request_uri: str) -> None:
    import ray

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    request = MergeRequest.model_validate_json(storage.read_bytes(request_uri))
    ray.init(address="auto", logging_level=logging.WARNING)
    # In a task, because the head, where this program runs, often has little memory.
    result: SideJobResult = ray.get(ray.remote(answer).options(num_cpus=1, max_retries=0).remote(request))
    storage.write_bytes(storage.join(request.folder_uri, "report.json"), result.model_dump_json().encode())


def answer(request: MergeRequest) -> SideJobResult:
    """Merges the LoRA adapter that `request` names into its base model, and returns the result. If the adapter cannot
    be merged, the result has an error in place of the report."""
    try:
        return SideJobResult(finished_at=time.time(), report=merge(request).model_dump(mode="json"))
    except (ValueError, FileNotFoundError) as error:
        logger.error("%s", error)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        failed = Failed(code="unmergeable", message=f"The adapter cannot be merged: {reason}", param="format")
        return SideJobResult(finished_at=time.time(), error=failed)


def merge(request: MergeRequest) -> MergeReport:
    """Merges the LoRA adapter that `request` names into its base model, and writes the merged model to storage. Also
    measures how much the outputs of the merged model differ from those of the base model with the adapter.

    Raises ValueError if the folder holds no adapter, if adapter and base do not fit each other, or if an output of the
    merged model is NaN or infinite.
    """
    from dpo_core.models.merging import merge_and_compare

    adapter, base = policies.fetch(request.adapter_uri)
    if base is None:
        raise ValueError(f"The folder {request.adapter_uri} holds no adapter.")
    uri = storage.join(request.folder_uri, "model")
    with tempfile.TemporaryDirectory(prefix="raydpo-merge-") as folder:
        found = merge_and_compare(adapter, Path(folder), base=base)
        storage.publish(Path(folder), uri)
    return MergeReport(model_uri=uri, **asdict(found))


if __name__ == "__main__":
    main(sys.argv[1])
