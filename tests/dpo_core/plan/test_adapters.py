"""Tests that a plan knows, from the shapes of a model's weights, on which of them an adapter is put in training."""

import pytest
from peft.utils import transformers_weight_conversion as of_peft

from dpo_core.config import Lora
from dpo_core.models.model import load_policy
from dpo_core.plan.adapters import WITH_ADAPTABLE_EXPERTS, adapted_weights, adapts_experts
from dpo_core.plan.inputs import Shapes
from tests.dpo_core.models.families import FAMILIES, save_tiny

OFTEN = {"llama", "mixtral", "qwen3_moe", "phimoe", "gpt_oss"}


def of_mixture(kind: str) -> Shapes:
    names = ["self_attn.q_proj", "mlp.gate", "mlp.experts.0.gate_proj", "mlp.experts.0.down_proj"]
    return Shapes({"model_type": kind}, {f"model.layers.0.{name}.weight": (4, 4) for name in names})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of architectures that transformers no longer tends
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.long) for name in FAMILIES]
)
def test_it_is_known_of_a_family_whether_its_experts_are_adapted(family, tmp_path):
    shapes = save_tiny(family, tmp_path)
    adapted = [name for name, _ in load_policy(tmp_path, adapter=Lora(r=2)).named_parameters() if ".lora_A." in name]
    assert adapts_experts(shapes, None) == any(".experts." in name for name in adapted)


def test_the_types_with_adaptable_experts_are_those_of_the_installed_peft():
    known = of_peft._MOE_TARGET_MODULE_MAPPING
    assert {kind for kind, like in of_peft._MODEL_TO_CONVERSION_PATTERN.items() if like in known} == (
        WITH_ADAPTABLE_EXPERTS
    )


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (None, ["self_attn.q_proj", "mlp.experts.0.gate_proj", "mlp.experts.0.down_proj"]),
        (["q_proj"], ["self_attn.q_proj"]),
        (["self_attn.q_proj", "k_proj"], ["self_attn.q_proj"]),
        (["model.layers.0.self_attn.q_proj"], ["self_attn.q_proj"]),
        (["proj"], []),
        (["gate_up_proj"], ["mlp.experts.0.gate_proj"]),
        (["down_proj"], ["mlp.experts.0.down_proj"]),
    ],
)
def test_targets_are_paths_of_modules_or_their_ends(targets, found):
    names = adapted_weights(of_mixture("qwen3_moe"), targets)
    assert names == [f"model.layers.0.{name}.weight" for name in found]
    assert adapts_experts(of_mixture("qwen3_moe"), targets) == any("experts" in name for name in found)
    assert not adapts_experts(of_mixture("phimoe"), targets)
