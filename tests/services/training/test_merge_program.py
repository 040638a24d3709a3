"""Tests the program that a Ray job runs to merge an adapter for download."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_core.config import Lora
from dpo_core.models.model import load_policy, load_tokenizer
from services import storage
from services.contract import MergeReport, MergeRequest, SideJobResult
from services.training.merge_program import answer


@pytest.fixture(scope="module")
def adapter(model_source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a random adapter that changes the outputs of its base model."""
    folder = tmp_path_factory.mktemp("adapter")
    policy = load_policy(model_source, adapter=Lora(r=4))
    torch.manual_seed(1)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    policy.save_pretrained(folder)
    load_tokenizer(model_source).save_pretrained(folder)
    return folder


# What a user runs: transformers and peft, without this project. It prints the greedy tokens of each.
ELSEWHERE = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, merged = sys.argv[1:]
load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
messages = [{"role": "user", "content": "What is 1 and 2?"}]
models = {base: load(base), adapter: PeftModel.from_pretrained(load(base), adapter), merged: load(merged)}
for folder, model in models.items():
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**ids, max_new_tokens=16, do_sample=False)
    print(json.dumps(tokens[0, ids["input_ids"].shape[1]:].tolist()))
assert not {"services", "dpo_core"} & sys.modules.keys()
"""


def elsewhere(base: str, adapter: Path, merged: Path) -> list[list[int]]:
    """Returns the greedy answers of the models in three folders, computed in a separate process without this
    project."""
    command = [sys.executable, "-I", "-c", ELSEWHERE, base, str(adapter), str(merged)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()[-3:]]


@pytest.mark.slow
def test_a_merge_leaves_a_model_that_answers_as_the_adapter_does(
    adapter: Path, model_source: str, tmp_path: Path
) -> None:
    result = answer(MergeRequest(adapter_uri=str(adapter), folder_uri=tmp_path.as_uri()))
    assert result.error is None
    report = MergeReport.model_validate(result.report)
    assert report.largest_difference < 1e-4
    plain, attached, merged = elsewhere(model_source, adapter, storage.fetch(report.model_uri))
    assert merged == attached != plain


def test_an_adapter_whose_base_is_gone_is_refused_with_the_reason(adapter: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (moved / "adapter_config.json").write_text(json.dumps(config))
    result = answer(MergeRequest(adapter_uri=str(moved), folder_uri=str(tmp_path / "out")))
    assert result.error
    assert result.error.code == "unmergeable"
    assert "but that folder does not exist; restore the folder" in result.error.message
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
def test_on_a_cluster_a_merge_leaves_its_report_beside_the_request(
    adapter: Path, tmp_path: Path, ray_environment: dict[str, Any]
) -> None:
    request = MergeRequest(adapter_uri=str(adapter), folder_uri=tmp_path.as_uri())
    uri = storage.join(tmp_path.as_uri(), "request.json")
    storage.write_bytes(uri, request.model_dump_json().encode())
    command = [sys.executable, "-m", "services.training.merge_program", uri]
    subprocess.run(command, env=ray_environment, check=True, timeout=200)
    result = SideJobResult.model_validate_json((tmp_path / "report.json").read_bytes())
    assert MergeReport.model_validate(result.report).model_uri == f"{tmp_path.as_uri()}/model"
    assert (tmp_path / "model" / "model.safetensors").is_file()
