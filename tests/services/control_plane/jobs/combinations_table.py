"""Prints a table of which options of a job can be combined, and which rule of the service refuses the other pairs.

python -m tests.services.control_plane.jobs.combinations_table > docs/use/combinations.md
"""

import sys
from collections.abc import Mapping
from copy import deepcopy
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, get_args, get_type_hints

from dpo_core.config import Lora
from dpo_core.options import OBJECTIVES, Kind, Limit
from services.control_plane.jobs.combinations import RULES, Combination
from services.control_plane.jobs.requests import CreateJob
from services.control_plane.jobs.weights import decide
from services.control_plane.models.deployments.engines import why_merged
from services.control_plane.models.models import STARTED_AT, NamedModel
from services.control_plane.settings import Settings
from services.deployment_settings import DeploymentSettings

Body = dict[str, Any]
PAGE = Path(__file__).parents[4] / "docs" / "use" / "combinations.md"
KINDS: tuple[Kind, ...] = get_args(Kind)


def trained(kind: str, **fields: Any) -> NamedModel:
    return NamedModel(f"ft:tiny:raydpo::{kind}", f"/runs/{kind}", "tiny", STARTED_AT, "ftjob-1", **fields)


ADAPTED: dict[str, Any] = {"base_source": "/nowhere/tiny", "adapter": Lora(r=8, alpha=16)}
MODELS = {
    "base": NamedModel("tiny", "/nowhere/tiny", "tiny", STARTED_AT),
    "mixture": NamedModel("mixture", "/nowhere/mixture", "mixture", STARTED_AT),
    "whole": trained("whole"),
    "adapter": trained("adapter", **ADAPTED),
    "nf4-adapter": trained("nf4-adapter", **ADAPTED, quantization="nf4"),
    "reward": trained("reward", num_outputs=1),
    "reward-adapter": trained("reward-adapter", num_outputs=1, **ADAPTED),
}


class Choice(NamedTuple):
    """A value of a job's option. `context` has other fields that the value needs, unless the other choice sets them."""

    option: str  # two values of one option are in no job
    words: str
    body: Body
    context: Mapping[str, Any] = MappingProxyType({})


def _start(words: str, model: str, **context: Any) -> Choice:
    return Choice("start", words, {"model": MODELS[model].id}, context)


def _x(option: str, words: str, value: Any, **context: Any) -> Choice:
    return Choice(option, words, {"x_raydpo": {option: value}}, {"x_raydpo": context})


def _objective(kind: str, words: str) -> Choice:
    return Choice("objective", words, {"method": {"type": kind}})


def _reference(option: str, words: str, value: str) -> Choice:
    return Choice(f"reference.{option}", words, {"x_raydpo": {"reference": {option: value}}})


ALL_WEIGHTS = {"adapter": "none"}
OF_REWARDS = {"method": {"type": "reward_bradley_terry"}}
EVALUATED = {"validation_share": 0.1}
CHOICES = (
    _start("from a base model", "base"),
    _start("from a mixture of experts", "mixture"),
    _start("from a policy of all weights", "whole"),
    _start("from an adapter", "adapter"),
    _start("from an adapter on a base in NF4", "nf4-adapter"),
    Choice(
        "start",
        "from an adapter, with `adapter: none`",
        {"model": MODELS["adapter"].id, "x_raydpo": {"adapter": "none"}},
    ),
    _start("from a reward model", "reward", **OF_REWARDS),
    _start("from a reward model's adapter", "reward-adapter", **OF_REWARDS),
    _objective("supervised", "`supervised`"),
    _objective("dpo", "`dpo`, and what else has a reference"),
    _objective("simpo", "`simpo`, and what else has none"),
    _objective("reward_bradley_terry", "`reward_bradley_terry`"),
    _objective("reward_gaussian", "`reward_gaussian`"),
    _x("adapter", "a new LoRA", {"r": 4}),
    _x("adapter", "a new LoRA with dropout", {"r": 4, "dropout": 0.1}),
    _x("adapter", "a new DoRA", {"r": 4, "use_dora": True}),
    _x("adapter", "`adapter: none`", "none"),
    _x("precision", "`float32`", "float32"),
    _x("precision", "`bfloat16`", "bfloat16"),
    _x("quantization", "`nf4`", "nf4"),
    _reference("model", "another policy as the reference", MODELS["whole"].id),
    _reference("model", "a reward model as the reference", MODELS["reward"].id),
    _reference("source", "`reference.source: serve`", "serve"),
    _reference("source", "`reference.source: trainer`", "trainer"),
    _x("num_workers", "several workers", 2),
    _x("sharding", "`sharding: replicated`", "replicated"),
    _x("sharding", "`sharding: full`", "full"),
    _x("sharding", "`sharding: hybrid`", "hybrid"),
    _x("best_metric", "`best_metric`", "eval/loss", **EVALUATED),
    _x("early_stop", "`early_stop`", {"patience": 2}, **EVALUATED),
    _x("policy", "`policy: best`", "best", **EVALUATED),
    _x("validation_share", "no rows held out", None),
    _x("validation_share", "`validation_share`", 0.1),
    Choice(
        "validation_file", "`validation_file`", {"validation_file": "file-2"}, {"x_raydpo": {"validation_share": None}}
    ),
)


def _can_meet(a: Choice, b: Choice) -> bool:
    return set(a.option.split(" and ")).isdisjoint(b.option.split(" and "))


PAIRS = [(a, b) for a, b in combinations(range(len(CHOICES)), 2) if _can_meet(CHOICES[a], CHOICES[b])]


def body_of(a: Choice, b: Choice) -> Body:
    body: Body = {"model": "tiny", "training_file": "file-1", "method": {"type": "dpo"}, "x_raydpo": {}}
    for part in (a.context, b.context, a.body, b.body):
        body = _merged(body, part)
    return body


def _merged(body: Body, part: Mapping[str, Any]) -> Body:
    merged = deepcopy(body)
    for name, value in part.items():
        below = merged.get(name)
        nested = isinstance(value, dict) and isinstance(below, dict) and name in ("x_raydpo", "reference")
        merged[name] = _merged(below, value) if nested else value
    return merged


def broken(body: Body, settings: Settings) -> int | None:
    """Returns the index of the first rule that refuses the body, or None if no rule does."""
    request = CreateJob.model_validate(body)
    asked, start, spec = request.asked(), _named(body["model"]), request.spec()
    needs_reference = spec.config.objective.traits.needs_reference
    reference = _named(spec.reference_model or body["model"]) if needs_reference else None
    weights = decide(asked, start, settings)
    on_experts = weights.adapter is not None and start == MODELS["mixture"]
    spec = spec.model_copy(update={"weights": weights.model_copy(update={"on_experts": on_experts})})
    given = Combination(spec, asked, start, reference)
    return next((number for number, rule in enumerate(RULES) if rule.is_broken(given)), None)


def _named(model_id: str) -> NamedModel:
    return next(model for model in MODELS.values() if model.id == model_id)


def page(settings: Settings) -> str:
    parts = [
        HEAD,
        *_rules(),
        MATRIX,
        *_matrix(settings),
        DATA,
        *_data(),
        LIMITS,
        *_limits(),
        UNATTACHED,
        *_unattached(),
    ]
    return "\n".join(parts) + "\n"


HEAD = """\
# What combines with what

The service refuses a job whose options do not go together before it writes the job. The error names the field, says
what does not go together, and gives the remedy. These are all rules. The error names the first one:

| | field | what a job cannot have | remedy |
|---|---|---|---|"""
MATRIX = """
`x_raydpo.quantization` is also refused for a base model of which NF4 would compress less than half of the weights in
the layers, such as a mixture of experts: transformers stacks its experts, and NF4 compresses only linear layers.

## Options with options

Each cell has two options, that of its row and that of its column. A number is the rule above that refuses both
together; an empty cell means that a job can have both; `·` marks two values of one option. All other options are left
out, with two exceptions: a job that compares checkpoints holds rows out, and a job that starts from a reward model
trains one.
"""
DATA = """
## Objectives with data

`yes` means that the objective learns from such rows. An upload tells what a file holds. The service refuses a job whose
file holds other rows, with the code `invalid_training_file` or `invalid_validation_file`. The last column has the
objectives that take rows with margins.
"""
LIMITS = """
## An adapter's numbers

A job whose adapter has other numbers is refused with the code `invalid_value`:

| field | it must be |
|---|---|"""
UNATTACHED = """
## Adapters that are not attached

vLLM can attach most adapters to the engine of their base. The others are not refused: their policy is
[merged into its base](deployments.md) and has an engine of its own, and an event of the job says why.

| adapter | what the event says |
|---|---|"""


def _rules() -> list[str]:
    return [f"| {n} | `{rule.param}` | {rule.what} | {rule.remedy} |" for n, rule in enumerate(RULES, 1)]


def _matrix(settings: Settings) -> list[str]:
    letters = [chr(ord("a") + n) if n < 26 else "a" + chr(ord("a") + n - 26) for n in range(len(CHOICES))]
    cells = {pair: broken(body_of(*(CHOICES[each] for each in pair)), settings) for pair in PAIRS}

    def cell(row: int, column: int) -> str:
        pair = (min(row, column), max(row, column))
        if pair not in cells:
            return "·"
        number = cells[pair]
        return "" if number is None else str(number + 1)

    lines = [f"| | | {' | '.join(letters)} |", "|---|---|" + "---|" * len(letters)]
    for row, choice in enumerate(CHOICES):
        found = " | ".join(cell(row, column) for column in range(len(CHOICES)))
        lines.append(f"| {letters[row]} | {choice.words} | {found} |")
    return lines


def _data() -> list[str]:
    lines = [f"| | {' | '.join(KINDS)} | margins |", "|---|" + "---|" * (len(KINDS) + 1)]
    for kind, cls in OBJECTIVES.items():
        traits = cls().traits
        learns = [kind in traits.learns_from for kind in KINDS]
        cells = " | ".join("yes" if each else "" for each in (*learns, traits.takes_margins))
        lines.append(f"| `{kind}` | {cells} |")
    return lines


def _limits() -> list[str]:
    lines = []
    for name, hint in get_type_hints(Lora, include_extras=True).items():
        words = [each.words for each in _metadata(hint) if isinstance(each, Limit)]
        lines += [f"| `x_raydpo.adapter.{name}` | {each} |" for each in words]
    return lines


def _metadata(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__metadata__", ())


ON_EXPERTS = "on the experts of a mixture, as by default"


def _unattached() -> list[str]:
    base = DeploymentSettings()
    cases = {
        "DoRA": (Lora(use_dora=True), None, base),
        "on a base in NF4": (Lora(), "nf4", base),
        ON_EXPERTS: (Lora(), None, base),
        f"of a rank above `max_lora_rank`, which is {base.max_lora_rank}": (Lora(r=base.max_lora_rank + 1), None, base),
        "on a base with `max_lora_rank` 0": (Lora(), None, DeploymentSettings(max_lora_rank=0)),
        "on a base with the mode `merged`": (Lora(), None, DeploymentSettings(mode="merged")),
    }
    reasons = {
        words: why_merged(lora, bits, own.mode, own, on_experts=words == ON_EXPERTS)
        for words, (lora, bits, own) in cases.items()
    }
    return [f"| {words} | {reason} |" for words, reason in reasons.items()]


def plain_settings() -> Settings:
    return Settings(
        DATABASE_URL="postgresql://nowhere/none",
        storage_url="file:///nowhere",
        api_key="rd-a-key-for-tests",
        advertised_url="http://127.0.0.1:9",
        ray_url="http://127.0.0.1:9",
        models={"tiny": "/nowhere/tiny"},  # type: ignore[dict-item]  # a source alone is a model
    )


if __name__ == "__main__":
    sys.stdout.write(page(plain_settings()))
