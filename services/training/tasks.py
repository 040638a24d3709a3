"""Work on many items, by Ray Data: what a job does with the pieces of its file."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import ray
import ray.data

from services.contract import Contract

TASKS_PER_PROCESS = 20  # at most: fewer end further apart, and between two a process waits 0.2 seconds

Item = TypeVar("Item", bound=Contract)
Result = TypeVar("Result", bound=Contract)


def in_tasks(
    work: Callable[[Item], Result], items: Sequence[Item], result: type[Result], *, num_gpus: float = 0
) -> Iterator[Result]:
    """The results, in the order in which they get done."""
    if not items:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    # Not by Ray's logical CPUs: each process loads a tokenizer or a model, and more of them than real cores only wait.
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    size = min(len(items), num_nodes * (os.cpu_count() or 1))
    kind = type(items[0])

    def work_on(row: dict[str, str]) -> dict[str, str]:
        return {"result": work(kind.model_validate_json(row["item"])).model_dump_json()}

    num_tasks = min(len(items), TASKS_PER_PROCESS * size)
    rows = ray.data.from_items([{"item": item.model_dump_json()} for item in items], override_num_blocks=num_tasks)
    rows.context.target_max_block_size = 1  # byte: a task hands out each result as soon as it has it
    tasks = rows.map(work_on, compute=ray.data.TaskPoolStrategy(size=size), num_gpus=num_gpus or None)
    for row in tasks.iter_rows():
        yield result.model_validate_json(row["result"])
