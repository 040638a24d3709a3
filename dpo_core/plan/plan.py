"""Answers whether a run fits into memory and, if it does not, which changes make it fit."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from dpo_core.plan.inputs import FLOAT32, Rows, Run, Shapes
from dpo_core.plan.memory import Memory, count_trained, settle

FILLED = 0.9  # of a device's memory that a plan may fill: its figures are good to a tenth
CHANGES: dict[str, Sequence[Any]] = {  # what may make a run fit, in the order in which it is tried
    "activation_checkpointing": ["on"],
    "max_tokens_per_pack": ["max_length"],
    "precision": ["bfloat16"],
    "sharding": ["full"],
    "adapter": [32],
    "num_workers": [2**power for power in range(1, 11)],
}


@dataclass(frozen=True)
class Change:
    """A field of a job, the value that helps the run to fit, and a sentence about it."""

    field: str
    value: Any
    message: str


@dataclass(frozen=True)
class Plan:
    """What a run needs, whether it fits, and what makes it fit."""

    run: Run  # with its packs decided
    shards: int
    memory: Memory
    checkpoint_bytes: int  # on disk
    steps: int
    tokens: int
    fits: bool | None  # None: the memory of a device is not known
    changes: tuple[Change, ...]  # together they make it fit; empty if it fits already, or if nothing helps


def plan(
    model: Shapes, run: Run, rows: Rows, room: int | None = None, settable: Collection[str] = tuple(CHANGES)
) -> Plan:
    """Plans a run. `room` is the bytes of a worker's device; `settable` are the fields that `changes` may name."""
    settled, shards, held = settle(model, run, rows, room)
    saved = count_trained(model, run) * (run.itemsize + FLOAT32 * (2 if run.itemsize == FLOAT32 else 3))
    steps = run.n_epochs * ceil(rows.groups / run.batch_size)
    fits = None if room is None else held.total <= FILLED * room
    changes = () if room is None or fits else _changes(model, run, rows, room, settable)
    return Plan(settled, shards, held, saved, steps, run.n_epochs * rows.groups * rows.tokens, fits, changes)


def _changes(model: Shapes, run: Run, rows: Rows, room: int, settable: Collection[str]) -> tuple[Change, ...]:
    """Returns the first change that makes the run fit; else the first ones that do together, without needless ones."""

    def total(values: Mapping[str, Any]) -> int:
        return settle(model, replace(run, **values), rows, room)[2].total

    def fits(values: Mapping[str, Any]) -> bool:
        return total(values) <= FILLED * room

    offered = [(name, value) for name in CHANGES if name in settable for value in CHANGES[name]]
    offered = [(name, run.max_length if value == "max_length" else value) for name, value in offered]
    offered = [(name, value) for name, value in offered if name != "num_workers" or value > run.num_workers]
    offered = [(name, value) for name, value in offered if name != "adapter" or run.adapter is None]
    found: dict[str, Any] = next(({name: value} for name, value in offered if fits({name: value})), {})
    if not found:
        together = (dict(offered[:number]) for number in range(2, len(offered) + 1))
        found = next((values for values in together if fits(values)), {})
        for name in list(found):
            fewer = {key: value for key, value in found.items() if key != name}
            found = fewer if fits(fewer) else found
    end = f"a worker then holds {in_gb(total(found))} at most, not {in_gb(total({}))}"
    given = {name: {"r": value} if name == "adapter" else value for name, value in found.items()}
    return tuple(Change(name, value, f"Set {name} to {json.dumps(value)}; {end}.") for name, value in given.items())


def in_gb(num_bytes: int) -> str:
    """Returns a number of bytes in GB, with its unit."""
    gigabytes = num_bytes / 1e9
    return f"{gigabytes:.0f} GB" if gigabytes >= 100 else f"{gigabytes:.3g} GB"
