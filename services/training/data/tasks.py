"""Runs a function on many items, such as the pieces of a data file, in parallel on a Ray cluster.

A single item is given to a plain Ray task, several items to Ray Data.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import ray

from services.contract import Contract

TASKS_PER_PROCESS = 20  # most tasks: with fewer, processes end at different times; with more, pauses of 0.2 s add up
MOST_BESIDE = 32  # most processes while workers train; each holds a tokenizer and its piece of the file

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
    """Calls `work` on each item in Ray, and yields each result as soon as it is done. `result` is the type of the
    results.

    `beside` is the number of training workers that run at the same time and wait for the results. If there are such
    workers, one core is left to each of them, and the work on the items begins in the order of `items`. If there are
    none, each call reserves `num_gpus` GPUs.
    """
    if not items:
        return
    if len(items) == 1:
        # Ray Data would start two actors first. A plain task can reuse a process that has loaded the tokenizer.
        yield ray.get(ray.remote(_in_one_core).options(num_cpus=1, num_gpus=num_gpus or None).remote(work, items[0]))
        return
    from ray.data import DataContext, TaskPoolStrategy, from_items

    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.raise_original_map_exception = True  # a caller may have to tell a full disk from other errors
    # Real cores count, not Ray's logical CPUs: each process loads a tokenizer or model, and further ones would wait.
    size = min(len(items), num_processes(ray.nodes(), os.cpu_count() or 1, beside=beside))
    options = beside_training() if beside else {"num_gpus": num_gpus or None}
    kind = type(items[0])

    def work_on(row: dict[str, str]) -> dict[str, str]:
        return {"result": _in_one_core(work, kind.model_validate_json(row["item"])).model_dump_json()}

    # While workers train, each item is its own task: in a task with many, a worker's next item could wait for others.
    num_tasks = len(items) if beside else min(len(items), TASKS_PER_PROCESS * size)
    rows = from_items([{"item": item.model_dump_json()} for item in items], override_num_blocks=num_tasks)
    rows.context.target_max_block_size = 1  # byte: so a task yields each result at once
    tasks = rows.map(work_on, compute=TaskPoolStrategy(size=size), **options)
    for row in tasks.iter_rows():
        yield result.model_validate_json(row["result"])


def num_processes(nodes: Sequence[Mapping[str, Any]], cores: int, *, beside: int) -> int:
    """Returns how many processes work on items at the same time: one for each CPU core of the nodes that give Ray CPUs.
    `nodes` are Ray's descriptions of the nodes, and `cores` is the number of cores that each node is assumed to have.

    `beside` is the number of training workers that run at the same time. If there are any, one core is left to each of
    them, and the result is at most MOST_BESIDE. This limit is needed because processes beside training reserve no CPUs
    in Ray.
    """
    lent = (node["Resources"].get("CPU", 0) for node in nodes if node["Alive"])
    usable = sum(cores for each in lent if each) or cores
    return max(1, min(usable - beside, MOST_BESIDE) if beside else usable)


def _in_one_core(work: Callable[[Item], Result], item: Item) -> Result:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return work(item)


def beside_training() -> dict[str, Any]:
    """Returns the options for Ray tasks and actors that run at the same time as training workers.

    With these options, a task or actor reserves none of Ray's CPUs, because workers may hold the last CPU and wait for
    the task. If possible, it runs on a node that gives Ray CPUs; the head node often gives none.
    """
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if not nodes:
        return {"num_cpus": 0}
    anywhere: list[dict[str, Any]] = [{"label_selector": {}}]
    here = {"ray.io/node-id": f"in({','.join(nodes)})"}
    return {"num_cpus": 0, "label_selector": here, "fallback_strategy": anywhere}
