"""Tests which files are beside the weights in a folder that training writes."""

import json
import logging
import shutil

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

from dpo_core.config import Lora, Optim, TrainConfig
from dpo_core.models.folder import skeleton
from dpo_core.models.model import load_policy, merge_adapter
from dpo_core.training.trainer import train

CONFIG = TrainConfig(optim=Optim(learning_rate=1e-3), batch_size=8, n_epochs=1, checkpoint_steps=1, max_length=64)
LOOSE = [{"temperature": 0.6, "top_p": 0.9}, {"do_sample": False, "top_k": 20, "eos_token_id": [1, 2]}]
PROCESSORS = {
    "preprocessor_config.json": b'{"image_processor_type": "Gemma3ImageProcessor"}',
    "processor_config.json": b'{"processor_class": "Gemma3Processor"}\n',
}


@pytest.fixture
def model(policy, tokenizer, tmp_path):
    policy.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def trained(model, tokenizer, pairs, folder, adapter=None):
    """Trains the model for one step, and returns its folder. An adapter is merged first."""
    policy = load_policy(model, adapter=adapter)
    list(train(CONFIG, policy, tokenizer, [pairs], total_steps=1, checkpoint_dir=folder))
    saved = folder / "step-000001" / "model"
    if adapter is not None:
        merge_adapter(saved, folder / "merged")
    return folder / "merged" if adapter else saved


@pytest.mark.parametrize("adapter", [None, Lora(r=2)], ids=["whole", "merged"])
@pytest.mark.parametrize("loose", LOOSE, ids=["no do_sample", "do_sample is false"])
def test_a_generation_config_that_transformers_would_not_save_is_saved_as_loaded(
    loose, adapter, model, tokenizer, pairs, tmp_path
):
    (model / "generation_config.json").write_text(json.dumps(loose))
    saved = trained(model, tokenizer, pairs, tmp_path, adapter)
    for folder in (saved, tmp_path / "step-000001" / "model"):  # the second is the adapter, if one was trained
        written = json.loads((folder / "generation_config.json").read_text())
        assert loose.items() <= written.items()
        assert written.keys() - loose.keys() <= {"_from_model_config", "transformers_version"}
    assert AutoModelForCausalLM.from_pretrained(saved).generation_config.to_diff_dict() == {
        **GenerationConfig.from_pretrained(model).to_diff_dict(),
        "transformers_version": written["transformers_version"],
    }


@pytest.mark.parametrize("adapter", [None, Lora(r=2)], ids=["whole", "merged"])
def test_files_of_processors_are_copied(adapter, model, tokenizer, pairs, tmp_path):
    for name, content in PROCESSORS.items():
        (model / name).write_bytes(content)
    saved = trained(model, tokenizer, pairs, tmp_path, adapter)
    assert {name: (saved / name).read_bytes() for name in PROCESSORS} == PROCESSORS


def test_a_missing_folder_of_the_model_is_warned_of(model, tokenizer, pairs, tmp_path, caplog):
    policy = load_policy(model)
    shutil.rmtree(model)
    with caplog.at_level(logging.WARNING, "dpo_core.models.folder"):
        list(train(CONFIG, policy, tokenizer, [pairs], total_steps=1, checkpoint_dir=tmp_path))
    assert "The model's files for images and sound, if it has any, were not found" in caplog.text


def test_saving_a_copy_calls_no_hook_of_the_model_that_is_in_use(policy):
    """FSDP's hooks would split the weights, while another thread computes with them."""
    called = []
    for module in policy.modules():
        module.register_state_dict_pre_hook(lambda *_: called.append(1))
    twin = skeleton(policy)
    names = twin.state_dict().keys()
    assert called == []
    assert names == policy.state_dict().keys()
    assert called
