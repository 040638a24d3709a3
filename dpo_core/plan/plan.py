"""Computes whether a training run fits into the memory of its devices. If it does not fit, finds changes of the run's
options that make it fit."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from typing import Any

from dpo_core.config import Lora
from dpo_core.plan.inputs import FLOAT32, Rows, Run, Shapes
from dpo_core.plan.memory import Memory, count_trained, settle
from dpo_core.plan.quantization import is_quantizable

FILLED = 0.9  # share of a device's memory that a plan may fill, because its figures are accurate to a tenth
CHANGES: dict[str, Sequence[Any]] = {  # options that may make a run fit, in the order in which they are tried
    "activation_checkpointing": ["on"],
    "max_tokens_per_pack": ["max_length"],
    "precision": ["bfloat16"],
    "sharding": ["full"],
    "adapter": [Lora().r],
    "quantization": ["nf4"],
    "num_workers": [2**power for power in range(1, 11)],
}


@dataclass(frozen=True)
class Change:
    """A change of one option of a job that helps the training run to fit into memory: the field, its new value, and a
    sentence that advises the user to set it."""

    field: str
    value: Any
    message: str


@dataclass(frozen=True)
class Plan:
    """The plan of a training run: the memory, disk space and optimizer steps that the run needs, whether it fits into
    memory (`fits`), and the changes of options that make it fit (`changes`)."""

    run: Run  # the run, with the size of its packs decided
    shards: int
    memory: Memory
    checkpoint_bytes: int  # on disk
    steps: int
    tokens: int
    fits: bool | None  # None: the memory of the device is unknown
    changes: tuple[Change, ...]  # changes that together make the run fit; empty if it fits already or nothing helps


def plan(
    model: Shapes,
    run: Run,
    rows: Rows,
    room: int | None = None,
    settable: Collection[str] = tuple(CHANGES),
    most_workers: float = inf,
    merged_rank: int | None = None,
) -> Plan:
    """Returns the plan of a training run: its memory, disk space and steps, whether it fits into memory, and what would
    make it fit.

    `model`, `run` and `rows` describe the model, the options, and the size of the training data. `room` is the memory
    of a worker's device in bytes, None if unknown. `settable` names the options that the plan may propose to change.
    `most_workers` is the number of workers for which there are devices. `merged_rank` is the rank of the adapter that
    the run starts from and merges into its base, None if there is none; the plan may propose to train this adapter, but
    not a new one.
    """
    settled, shards, held = settle(model, run, rows, room)
    saved = count_trained(model, run) * (run.itemsize + FLOAT32 * (2 if run.itemsize == FLOAT32 else 3))
    steps = run.n_epochs * ceil(rows.groups / run.batch_size)
    fits = None if room is None else held.total <= FILLED * room
    changes: tuple[Change, ...] = ()
    if room is not None and not fits:
        offered = _offered(model, run, settable, most_workers)
        if merged_rank:
            offered = [(name, merged_rank if name == "adapter" else value) for name, value in offered]
        changes = _changes(model, run, rows, room, offered, keeps_adapter=merged_rank is not None)
    return Plan(settled, shards, held, saved, steps, run.n_epochs * rows.groups * rows.tokens, fits, changes)


def _offered(model: Shapes, run: Run, settable: Collection[str], most_workers: float) -> list[tuple[str, Any]]:
    """Returns the changes that the plan may try, in the order in which it tries them. A change is a pair: the name of
    an option, and its new value. Only options in `settable` change, and changes that would have no effect on this run
    are left out. `most_workers` is the number of workers for which there are devices."""
    useless = {
        "sharding": run.quantized,  # a base in NF4 is never split
        "adapter": run.adapter is not None,
        "quantization": run.quantized or run.sharding in ("full", "hybrid") or not is_quantizable(model),
    }
    names = [name for name in CHANGES if name in settable and not useless.get(name)]
    offered = [(name, run.max_length if value == "max_length" else value) for name in names for value in CHANGES[name]]
    return [each for each in offered if each[0] != "num_workers" or run.num_workers < each[1] <= most_workers]


def _changes(
    model: Shapes, run: Run, rows: Rows, room: int, offered: Sequence[tuple[str, Any]], *, keeps_adapter: bool
) -> tuple[Change, ...]:
    """Returns changes of the run's options, taken from `offered`, that make the run fit into `room` bytes per worker.
    `rows` has the size of the training data. `keeps_adapter` says that an adapter in `offered` is not a new one, but
    the one from which the run starts.

    If one change is enough, returns the first such change. If it takes several, returns a set of changes of which none
    is superfluous. Returns an empty tuple if even all changes together are not enough.
    """

    def changed(values: Mapping[str, Any]) -> Run:
        others = {name: value for name, value in values.items() if name != "quantization"}
        return replace(run, **others, quantized=run.quantized or "quantization" in values)

    def total(values: Mapping[str, Any]) -> int:
        return settle(model, changed(values), rows, room)[2].total

    def fits(values: Mapping[str, Any]) -> bool:
        # Only the base of an adapter can be quantized.
        is_possible = changed(values).adapter is not None or "quantization" not in values
        return is_possible and total(values) <= FILLED * room

    found: dict[str, Any] = next(({name: value} for name, value in offered if fits({name: value})), {})
    if not found:
        found = next((values for values in _together(offered) if fits(values)), {})
        for name in list(found):
            fewer = {key: value for key, value in found.items() if key != name}
            found = fewer if fits(fewer) else found
    end = f"each worker then needs at most {in_gb(total(found))} of memory instead of {in_gb(total({}))}"
    given = {name: _as_given(name, value, keeps_adapter=keeps_adapter) for name, value in found.items()}
    return tuple(Change(name, value, f"Set {name} to {json.dumps(value)}; {end}.") for name, value in given.items())


def _as_given(name: str, value: Any, *, keeps_adapter: bool) -> Any:
    """Returns the value of a change in the form in which the user gives it. `name` is the option that changes."""
    if name != "adapter":
        return value
    return "auto" if keeps_adapter else {"r": value}


def _together(offered: Sequence[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields sets of changes, taken from `offered`, smaller sets first. A set is a dictionary from the options' names
    to their new values. No set has both sharding and quantization, because a base in NF4 is never split."""
    alternatives = [[each for each in offered if each[0] != name] for name in ("quantization", "sharding")]
    for number in range(2, len(offered) + 1):
        for alternative in alternatives:
            yield dict(alternative[:number])


def in_gb(num_bytes: int) -> str:
    """Returns a number of bytes as a text in GB, such as `12.3 GB`."""
    gigabytes = num_bytes / 1e9
    return f"{gigabytes:.0f} GB" if gigabytes >= 100 else f"{gigabytes:.3g} GB"
