"""Tests what a plan counts beside memory, and what it suggests if a job does not fit."""

from dataclasses import replace
from pathlib import Path

import pytest

from dpo_core.config import TrainConfig
from dpo_core.plan.inputs import Rows, Run, Shapes
from dpo_core.plan.memory import settle
from dpo_core.plan.plan import CHANGES, FILLED, in_gb, plan
from dpo_core.plan.sizes import NAMES, SIZES, llama
from dpo_core.training.trainer import train

ROOT = Path(__file__).parents[3]
GB = 10**9
MODEL = llama(dict(zip(NAMES, SIZES["8B"], strict=True)))
ROWS = Rows(groups=1001, prompt=600, completion=300)
RUN = Run(precision="bfloat16", batch_size=64, device="cuda")


def test_steps_and_tokens_are_those_of_all_epochs():
    found = plan(MODEL, replace(RUN, n_epochs=3), ROWS)
    assert (found.steps, found.tokens) == (3 * 16, 3 * 1001 * 1200)
    assert found.fits is None


BY_EIGHT = {"num_workers": 8, "max_tokens_per_pack": 8192, "activation_checkpointing": "off"}
IN_FLOAT32 = {"precision": "float32", "sharding": "replicated", "num_workers": 8}


@pytest.mark.parametrize(
    ("change", "room", "fields"),
    [
        ({"num_workers": 8}, 80, []),
        (BY_EIGHT, 50, ["activation_checkpointing"]),
        ({"precision": "float32", "adapter": 32}, 40, ["max_tokens_per_pack"]),
        ({"precision": "float32", "adapter": 32}, 36, ["precision"]),
        ({"sharding": "replicated", "num_workers": 8}, 80, ["sharding"]),
        ({}, 80, ["adapter"]),
        ({}, 20, ["num_workers"]),
        ({"sharding": "replicated"}, 20, ["adapter", "quantization"]),
        ({"adapter": 32}, 20, ["quantization"]),
        ({"adapter": 32, "sharding": "full"}, 20, ["num_workers"]),
        (IN_FLOAT32, 32, ["precision", "sharding"]),
        ({}, 3, []),
    ],
)
def test_the_first_change_that_makes_a_run_fit_is_offered(change, room, fields):
    run = replace(RUN, **change)
    found = plan(MODEL, run, ROWS, room * GB)
    assert [offer.field for offer in found.changes] == fields
    if fields:
        values = {offer.field: offer.value["r"] if offer.field == "adapter" else offer.value for offer in found.changes}
        values |= {"quantized": True} if values.pop("quantization", None) else {}
        after = plan(MODEL, replace(run, **values), ROWS, room * GB)
        assert (found.fits, after.fits) == (False, True)
        assert after.memory.total <= FILLED * room * GB
        for left_out in values:  # none is offered in vain
            fewer = {name: value for name, value in values.items() if name != left_out}
            assert not plan(MODEL, replace(run, **fewer), ROWS, room * GB).fits


def test_only_fields_that_may_be_set_are_offered():
    found = plan(MODEL, RUN, ROWS, 80 * GB, [name for name in CHANGES if name != "adapter"])
    assert [(offer.field, offer.value) for offer in found.changes] == [("num_workers", 4)]
    assert found.changes[0].message.startswith("Set num_workers to 4; each worker then needs ")


def test_a_run_that_merges_an_adapter_is_offered_to_train_this_adapter():
    found = plan(MODEL, RUN, ROWS, 80 * GB, merged_rank=8)
    assert [(offer.field, offer.value) for offer in found.changes] == [("adapter", "auto")]
    needed = in_gb(plan(MODEL, replace(RUN, adapter=8), ROWS, 80 * GB).memory.total)
    assert found.changes[0].message.startswith(f'Set adapter to "auto"; each worker then needs at most {needed} of')


def test_a_base_in_nf4_is_not_split_over_workers():
    alone = plan(MODEL, replace(RUN, adapter=32, quantized=True), ROWS, 80 * GB)
    several = plan(MODEL, replace(RUN, adapter=32, quantized=True, num_workers=8), ROWS, 8 * GB)
    assert several.shards == 1
    assert several.memory.weights == alone.memory.weights
    assert not {"sharding", "quantization"} & {offer.field for offer in several.changes}


def test_nf4_is_not_advised_for_stacked_experts():
    experts = {name.replace("mlp.", "mlp.experts.0."): shape for name, shape in MODEL.weights.items()}
    mixture = Shapes({**MODEL.config, "num_experts_per_tok": 1}, experts)
    run = replace(RUN, adapter=32)
    assert [offer.field for offer in plan(MODEL, run, ROWS, 20 * GB).changes] == ["quantization"]
    assert "quantization" not in [offer.field for offer in plan(mixture, run, ROWS, 20 * GB).changes]
    whole, rounded = (plan(mixture, replace(run, quantized=flag), ROWS).memory.weights for flag in (False, True))
    assert rounded > 0.8 * whole  # only attention is compressed


def test_no_more_workers_are_advised_than_there_are_devices():
    run = replace(RUN, sharding="full", adapter=32)
    assert [offer.value for offer in plan(MODEL, run, ROWS, 20 * GB, most_workers=8).changes] == [2]
    assert plan(MODEL, run, ROWS, 20 * GB, most_workers=1).changes == ()


def test_a_worker_loads_its_part_of_the_model_and_no_more():
    run = replace(RUN, num_workers=64, adapter=32, sharding="full")
    assert plan(MODEL, run, ROWS, 16 * GB).memory.loading == 2 * MODEL.numbers // 64
    assert plan(MODEL, run, ROWS, 16 * GB).fits
    quantized = replace(run, device="cpu", quantized=True, sharding="replicated", precision="float32")
    held = plan(MODEL, quantized, ROWS).memory
    assert held.least == held.loading == 4 * MODEL.numbers  # it is rounded after it was loaded


@pytest.mark.parametrize("name", ["num_attention_heads", "vocab_size", "num_hidden_layers"])
def test_a_model_that_no_formula_fits_is_refused(name):
    config = {key: value for key, value in MODEL.config.items() if key != name}
    with pytest.raises(ValueError, match=f"config.json has no {name}"):
        plan(replace(MODEL, config=config), RUN, ROWS)


def test_a_multimodal_model_is_planned_by_its_text_config():
    own = replace(MODEL, config={**MODEL.config, "head_dim": 64})
    within = replace(MODEL, config={"model_type": "both", "text_config": own.config})
    assert plan(within, RUN, ROWS).memory == plan(own, RUN, ROWS).memory != plan(MODEL, RUN, ROWS).memory


def test_a_token_keeps_activations_of_its_own_experts_only():
    def activations(experts: int, adapter: int | None) -> int:
        names = [f"model.layers.0.mlp.experts.{number}.up_proj.weight" for number in range(experts)]
        weights = {**MODEL.weights, **dict.fromkeys(names, (64, 4096))}
        mixture = {"model_type": "mixtral", "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        mixed = Shapes({**MODEL.config, **mixture}, weights)
        return plan(
            mixed, replace(RUN, adapter=adapter, num_workers=8, activation_checkpointing="off"), ROWS
        ).memory.activations

    assert activations(4, adapter=None) == activations(64, adapter=None)
    sums = 60 * 64 * 4096 * RUN.itemsize  # of the base's and the adapter's weights of the other 60
    assert activations(64, adapter=8) == activations(4, adapter=8) + sums


@pytest.mark.parametrize("sharding", ["auto", "replicated"])
def test_the_bytes_of_a_checkpoint_are_those_of_its_files(sharding, make_policy, tokenizer, tmp_path, pairs):
    policy = make_policy()
    sizes = {name: policy.config.to_dict()[name] for name in NAMES}
    config = TrainConfig(batch_size=8, n_epochs=1, checkpoint_steps=1, sharding=sharding).resolved(8)
    list(train(config, policy, tokenizer, [pairs], total_steps=1, checkpoint_dir=tmp_path))
    files = list(tmp_path.rglob("*.safetensors"))
    found = plan(llama(sizes), Run(sharding=sharding), ROWS)
    headers = 120 * 4 * len(list(policy.parameters()))
    assert found.checkpoint_bytes <= sum(path.stat().st_size for path in files) <= found.checkpoint_bytes + headers


def test_the_logits_of_a_given_pack_count_when_activations_are_chosen():
    """A pack of 4,096 tokens leaves the same room for activations as a row of 4,096 tokens."""
    model = llama(dict(zip(NAMES, (256, 704, 6, 8, 4, 4096, False), strict=True)))
    run = Run(batch_size=1, max_length=4096)
    given = replace(run, max_length=256, max_tokens_per_pack=4096)
    rooms = range(0, 4 * GB, GB // 100)
    chosen = [[settle(model, each, ROWS, room)[0].activation_checkpointing for room in rooms] for each in (run, given)]
    assert chosen[0] == chosen[1]
    assert {"on", "off"} == set(chosen[0])
