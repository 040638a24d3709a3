"""Tests which names `from dpo_core import …` provides, and the README's example that uses them."""

import re
import subprocess
import sys
from pathlib import Path

import dpo_core

README = Path(__file__).parents[2] / "README.md"


def test_the_public_names_are_these():
    assert sorted(dpo_core.__all__) == [
        "EarlyStop",
        "EncodedGroup",
        "Group",
        "Lora",
        "Optim",
        "StepResult",
        "TrainConfig",
        "encode_group",
        "latest_checkpoint",
        "load_policy",
        "load_reward_model",
        "load_tokenizer",
        "merge_adapter",
        "read_groups",
        "score_reference",
        "train",
    ]
    assert all(getattr(dpo_core, name).__name__ == name for name in dpo_core.__all__)


def test_importing_the_package_loads_no_torch():
    code = "import sys; from dpo_core import TrainConfig, Group, read_groups; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=README.parent).returncode == 0


def test_the_readme_example_trains_and_leaves_a_model(policy, tokenizer, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (example,) = [block for block in blocks if "from dpo_core import" in block]
    policy.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    exec(example.replace("Qwen/Qwen3-0.6B", str(tmp_path / "model")), {})
    steps = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [step for step, *_ in steps] == ["1", "2", "3", "4"]
    assert float(steps[0][1]) > float(steps[-1][1])
    assert (tmp_path / "checkpoints" / "step-000004" / "model" / "config.json").exists()
