"""Tests that a plan knows, from the shapes of a model's weights, which of them NF4 compresses in training."""

from math import prod

import pytest

from dpo_core.config import Lora
from dpo_core.models.model import load_policy
from dpo_core.models.quantization import shape_of
from dpo_core.options import InvalidOption
from dpo_core.plan.inputs import Shapes
from dpo_core.plan.quantization import check_quantization, quantized_weights
from tests.dpo_core.models.families import FAMILIES, save_tiny

OFTEN = {"llama", "mixtral", "qwen3_moe", "gpt_oss", "gpt2", "mamba", "deepseek_v3", "phi3"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of architectures that transformers no longer tends
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.long) for name in FAMILIES]
)
def test_a_family_is_refused_by_its_shapes_as_by_training(family, tmp_path):
    shapes = save_tiny(family, tmp_path)
    try:
        policy = load_policy(tmp_path, adapter=Lora(r=2), quantization="nf4")
    except InvalidOption:
        with pytest.raises(InvalidOption) as refused:
            check_quantization(shapes)
        assert refused.value.field == "quantization"
        return
    check_quantization(shapes)
    numbers = sum(shape_of(weight).numel() for weight in policy.parameters() if getattr(weight, "quant_state", None))
    assert sum(prod(shapes.weights[name]) for name in quantized_weights(shapes)) == numbers


def test_a_refusal_names_the_share_and_the_remedy():
    experts = {f"model.layers.0.mlp.experts.{i}.up_proj.weight": (8, 4) for i in range(4)}
    shapes = Shapes({"model_type": "mixtral"}, {"model.layers.0.self_attn.q_proj.weight": (4, 4), **experts})
    assert quantized_weights(shapes) == ["model.layers.0.self_attn.q_proj.weight"]
    told = "only 16 of the 144 weights in the layers of this model; leave 'quantization' out"
    with pytest.raises(InvalidOption, match=told):
        check_quantization(shapes)
