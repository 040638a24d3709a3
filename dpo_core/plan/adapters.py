"""Tells which weights of a model an adapter is put on, judging by the names and shapes of the weights alone. Uses only
the standard library."""

from collections.abc import Collection

from dpo_core.plan.inputs import Shapes, in_layer

ROUTERS = frozenset({"gate", "shared_expert_gate"})  # names of routers, besides those that contain "router"
# Types of models whose experts PEFT can adapt. A test compares them with the installed PEFT.
# fmt: off
WITH_ADAPTABLE_EXPERTS = frozenset({
    "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum",
    "minimax", "minimax_m2", "mixtral", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_thinker",
    "solar_open",
})
# fmt: on
# In memory, the weights of all experts of a layer are one weight. The keys are the names of its parts in the files.
STACKED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "w1": "gate_up_proj", "w3": "gate_up_proj"}
STACKED |= {"down_proj": "down_proj", "w2": "down_proj"}


def adapted_weights(model: Shapes, targets: Collection[str] | None) -> list[str]:
    """Returns the names of the weights that an adapter with these target modules is put on. `targets` is None for all
    linear layers but the head."""
    linear = [name for name, shape in model.weights.items() if len(shape) == 2 and in_layer(name)]
    chosen = [name for name in linear if not _is_router(name) and (not in_experts(name) or _can_adapt_experts(model))]
    return [name for name in chosen if targets is None or _is_target(name.removesuffix(".weight"), targets)]


def adapts_experts(model: Shapes, targets: Collection[str] | None) -> bool:
    """Whether an adapter with these target modules is put on the experts of a mixture of experts. `targets` is None for
    all linear layers but the head."""
    return any(map(in_experts, adapted_weights(model, targets)))


def in_experts(name: str) -> bool:
    """Whether the weight called `name` belongs to one of the experts of a mixture of experts."""
    return ".experts." in name


def _can_adapt_experts(model: Shapes) -> bool:
    return model.text.get("model_type") in WITH_ADAPTABLE_EXPERTS


def _is_router(name: str) -> bool:
    return "router" in name or name.removesuffix(".weight").rpartition(".")[2] in ROUTERS


def _is_target(module: str, targets: Collection[str]) -> bool:
    """Whether one of the target modules means the module `module`: the whole path of the module, or the last parts of
    the path. Experts can also be meant by the name of their stacked weight, such as gate_up_proj."""
    names = [module]
    if in_experts(module):
        parent, _, last = module.rpartition(".")
        names.append(f"{parent}.{STACKED.get(last, last)}")
    return any(f".{name}".endswith(f".{target}") for name in names for target in targets)
