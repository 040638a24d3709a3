"""Work on the pieces of a job's file: one by a task, many by Ray Data."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import ray

from services.contract import Contract

TASKS_PER_PROCESS = 20  # at most: fewer end further apart, and between two a process waits 0.2 seconds
MOST_BESIDE = 32  # each holds a tokenizer and its piece of the file

Item = TypeVar("Item", bound=Contract)
Result = TypeVar("Result", bound=Contract)


def in_tasks(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    result: type[Result],
    *,
    num_gpus: float = 0,
    beside: int = 0,
) -> Iterator[Result]:
    """The results, in the order in which they get done.

    `beside` workers train meanwhile and wait for the results: so many cores are left to them, and the items are begun
    in their order.
    """
    if not items:
        return
    if len(items) == 1:
        # Ray Data would start two actors first. A process that did one task does the next, with what it has loaded.
        yield ray.get(ray.remote(_in_one_core).options(num_cpus=1, num_gpus=num_gpus or None).remote(work, items[0]))
        return
    from ray.data import DataContext, TaskPoolStrategy, from_items

    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    # Not by Ray's logical CPUs: each process loads a tokenizer or a model, and more of them than real cores only wait.
    size = min(len(items), num_processes(ray.nodes(), os.cpu_count() or 1, beside=beside))
    options = _beside_training() if beside else {"num_gpus": num_gpus or None}
    kind = type(items[0])

    def work_on(row: dict[str, str]) -> dict[str, str]:
        return {"result": _in_one_core(work, kind.model_validate_json(row["item"])).model_dump_json()}

    # Beside training each is a task of its own: one that holds many in a row would keep the next of them waiting.
    num_tasks = len(items) if beside else min(len(items), TASKS_PER_PROCESS * size)
    rows = from_items([{"item": item.model_dump_json()} for item in items], override_num_blocks=num_tasks)
    rows.context.target_max_block_size = 1  # byte: a task hands out each result as soon as it has it
    tasks = rows.map(work_on, compute=TaskPoolStrategy(size=size), **options)
    for row in tasks.iter_rows():
        yield result.model_validate_json(row["result"])


def num_processes(nodes: Sequence[Mapping[str, Any]], cores: int, *, beside: int) -> int:
    """How many work at once: one for each core of a node like this one, and none on a node that lends Ray no CPU.

    Beside training at most MOST_BESIDE, as they claim nothing of Ray's, which would bound them.
    """
    lent = (node["Resources"].get("CPU", 0) for node in nodes if node["Alive"])
    usable = sum(cores for each in lent if each) or cores
    return max(1, min(usable - beside, MOST_BESIDE) if beside else usable)


def _in_one_core(work: Callable[[Item], Result], item: Item) -> Result:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return work(item)


def _beside_training() -> dict[str, Any]:
    """Without a claim to Ray's CPUs: workers could hold the last one and wait for what waits for it.

    While there are others, not on a node that is to do no work, as a head often is.
    """
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if not nodes:
        return {"num_cpus": 0}
    anywhere: list[dict[str, Any]] = [{"label_selector": {}}]
    here = {"ray.io/node-id": f"in({','.join(nodes)})"}
    return {"num_cpus": 0, "label_selector": here, "fallback_strategy": anywhere}
