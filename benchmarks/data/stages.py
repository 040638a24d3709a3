"""Runs the stages of a job's data one after the other, from the check of the file to the batches, and measures each
stage.

`data_plane.py` explains the stages.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.cluster import start_ray
from benchmarks.memory import Watch, forget_peak, peak
from dpo_core.data.survey import survey
from services.containers import json_lines

BATCH_SIZE = 64
TASKS = ("ray::", "multiprocessing.spawn")  # texts in the command lines of the processes that encode rows
Figures = dict[str, float]

Result = TypeVar("Result")


def stages(file: Path, model: Path, folder: Path, *, in_process: bool) -> dict[str, Figures]:
    """Runs all stages of a job's data, from the check of the file to the batches. Returns the speed and memory of each
    stage by its name, in the order in which a job has them. With `in_process`, Ray is not used, and the stages that
    need it are left out."""
    by_stage: dict[str, Figures] = {}
    # The survey runs before Ray is imported, because the control plane does not import Ray.
    report, by_stage["survey"] = _measured(lambda: _survey(file))
    if report.refusal:
        raise SystemExit(report.refusal)
    if not in_process:
        start_ray(object_store_memory=2**29)
    with Watch(*TASKS) as tasks:
        encode = _encode_in_pool if in_process else _prepare
        dataset, by_stage["encode"] = _measured(lambda: encode(file, model, folder, "first"))
    by_stage["encode"]["bytes_on_disk"] = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
    if not in_process:
        again, by_stage["cache"] = _measured(lambda: _prepare(file, model, folder, "second"))
        assert again == dataset
        first, by_stage["streamed"] = _measured(lambda: _stream(file, model, folder / "streamed"))
        by_stage["streamed"] |= first
    by_stage |= _train(dataset)
    num_tokens = sum(part.num_tokens for part in dataset.parts)
    for figures in by_stage.values():
        rows = figures.setdefault("rows", dataset.num_groups)
        figures["rows_per_second"] = rows / figures["seconds"]
        figures["tokens_per_second"] = figures["rows_per_second"] * num_tokens / dataset.num_groups
    by_stage["encode"] |= {"task_peak_bytes": tasks.largest, "tokens": num_tokens}
    return by_stage


def _measured(work: Callable[[], Result]) -> tuple[Result, Figures]:
    forget_peak()
    started = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    return result, {"seconds": seconds, "driver_peak_bytes": peak()}


def _survey(file: Path) -> Any:
    with file.open("rb") as source:
        return survey(json_lines(source))


def _spec(file: Path, model: Path, folder: Path, job: str) -> Any:
    """Returns the settings of a job's first attempt (its first run on Ray), as the control plane would give them to the
    driver, the attempt's main program.

    The job's objective needs no reference model, so that no rows are scored.
    """
    from dpo_core.options import Simpo
    from services.contract import AttemptSpec

    return AttemptSpec(
        job_id=job,
        attempt=1,
        config=_config(objective=Simpo()),
        num_workers=1,
        training_uri=str(file),
        model_source=str(model),
        run_uri=str(folder / job),
        cache_uri=str(folder / "cache"),
        events_url="",
    )


def _config(**fields: Any) -> Any:
    from dpo_core.config import TrainConfig

    return TrainConfig(batch_size=BATCH_SIZE, n_epochs=1, **fields)


def _prepare(file: Path, model: Path, folder: Path, job: str) -> Any:
    """Prepares the data of the job `job` in Ray tasks, as the main program of a real job does, and returns the encoded
    dataset.

    A second job with the same file finds the dataset in the cache.
    """
    from services.training.preparation import prepare

    return prepare(_spec(file, model, folder, job), lambda report: None).training


def _stream(file: Path, model: Path, folder: Path) -> Figures:
    """Encodes a file, and reads the first batch of training as soon as its rows are encoded. Returns the seconds from
    the start until the batch was read."""
    from services.training.data.row_order import global_batches
    from services.training.preparation import prepare

    started, figures = time.perf_counter(), Figures()

    def read(stream: Any) -> None:
        next(global_batches(stream, _config(), after_step=0))
        figures["first_batch_seconds"] = time.perf_counter() - started

    def begin(stream: Any) -> None:
        threading.Thread(target=read, args=(stream,)).start()

    prepare(_spec(file, model, folder, "third"), lambda report: None, begin)
    return figures


def _encode_in_pool(file: Path, model: Path, folder: Path, job: str) -> Any:
    """Encodes the file in one process per core, without Ray, and returns the encoded dataset."""
    from services.training.data.encoding import Encoded, Piece, encode, encode_piece, recipe_of

    spec, uri = _spec(file, model, folder, job), str(folder / "cache")
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:

        def encode_pieces(pieces: list[Piece]) -> Iterator[Encoded]:
            return pool.map(partial(encode_piece, recipe_of(spec), uri), pieces)

        return encode(spec, uri, encode_pieces, lambda report: None).training


def _train(dataset: Any) -> dict[str, Figures]:
    """Reads the batches of an epoch as a trainer does, but without training: once from the start, once from the middle.

    Returns the speed and memory of each of the two readings, by name.
    """
    from services.training.data.row_order import global_batches, num_steps

    config = _config()
    middle = num_steps(dataset.num_groups, config) // 2

    def read(after_step: int) -> int:
        return sum(len(batch) for batch in global_batches(dataset, config, after_step=after_step))

    rows, epoch = _measured(lambda: read(0))
    assert rows == dataset.num_groups
    rows, resumed = _measured(lambda: read(middle))
    assert rows == dataset.num_groups - middle * BATCH_SIZE
    resumed["rows"] = rows
    for figures, step in ((epoch, 0), (resumed, middle)):
        _, first = _measured(lambda after=step: next(global_batches(dataset, config, after_step=after)))
        figures["first_batch_seconds"] = first["seconds"]
    return {"epoch": epoch, "resumed epoch": resumed}
