import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from dpo_core.checkpoint import DamagedCheckpoint, read_manifest, verify
from dpo_core.config import Optim, TrainConfig
from dpo_core.options import Dpo
from dpo_core.trainer import train

CONFIG = TrainConfig(optim=Optim(learning_rate=1e-3), batch_size=8, n_epochs=1, checkpoint_steps=1)
OPTIMIZER = "optimizer-00001-of-00001.safetensors"


def run(config, policy, tokenizer, groups, folder, **kwargs):
    return list(train(config, policy, tokenizer, [groups] * 3, total_steps=3, checkpoint_dir=folder, **kwargs))


@pytest.fixture
def checkpoint(policy, tokenizer, pairs, tmp_path) -> Path:
    run(CONFIG, policy, tokenizer, pairs, tmp_path)
    return tmp_path / "step-000001"


def test_the_manifest_tells_the_step_the_config_and_every_file(checkpoint):
    manifest = verify(checkpoint)
    assert (manifest.step, manifest.total_steps) == (1, 3)
    assert manifest.config["objective"] == {"type": "dpo", "beta": 0.1, "mean_over_choices": False}
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert files - {"manifest.json"} == set(manifest.files)
    assert {OPTIMIZER, "model/config.json", "model/model.safetensors"} <= files


def test_a_checkpoint_holds_nothing_that_runs_code(checkpoint):
    assert {path.suffix for path in checkpoint.rglob("*") if path.is_file()} == {".json", ".safetensors", ".jinja"}


def test_nothing_half_written_stands_beside(checkpoint):
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["step-000001", "step-000002", "step-000003"]


def test_a_checkpoint_of_the_same_name_is_replaced(checkpoint, policy, tokenizer, pairs):
    (checkpoint / "old").touch()
    run(CONFIG, policy, tokenizer, pairs, checkpoint.parent)
    assert not (checkpoint / "old").exists()
    verify(checkpoint)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink], ids=["flipped", "truncated", "missing"])
@pytest.mark.parametrize("file", ["model/model.safetensors", "model/config.json", OPTIMIZER])
def test_a_damaged_file_is_refused_by_name(checkpoint, policy, tokenizer, pairs, file, damage):
    damage(checkpoint / file)
    with pytest.raises(DamagedCheckpoint, match=file) as refused:
        run(CONFIG, policy, tokenizer, pairs, checkpoint.parent, resume=checkpoint)
    assert refused.value.file == file


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": {"a": 1}}'])
def test_a_damaged_manifest_is_refused_by_name(checkpoint, text):
    (checkpoint / "manifest.json").write_text(text)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json is unreadable"):
        verify(checkpoint)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path):
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json is missing"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        replace(CONFIG, objective=Dpo(beta=0.2)),
        replace(CONFIG, optim=Optim(learning_rate=2e-3)),
        replace(CONFIG, batch_size=4),
        replace(CONFIG, seed=1),
    ],
    ids=["objective", "optim", "batch_size", "seed"],
)
def test_resuming_another_run_is_refused(checkpoint, policy, tokenizer, pairs, changed):
    with pytest.raises(ValueError, match="use the same config"):
        run(changed, policy, tokenizer, pairs, checkpoint.parent, resume=checkpoint)


def test_resuming_a_run_of_another_length_is_refused(checkpoint, policy, tokenizer, pairs):
    with pytest.raises(ValueError, match="3 steps, this one has 5"):
        list(train(CONFIG, policy, tokenizer, [pairs], total_steps=5, checkpoint_dir=Path("/"), resume=checkpoint))


def test_resuming_a_finished_run_has_nothing_left_to_do(checkpoint, policy, tokenizer, pairs):
    last = checkpoint.with_name("step-000003")
    assert run(CONFIG, policy, tokenizer, pairs, checkpoint.parent, resume=last) == []


def test_the_manifest_is_plain_json(checkpoint):
    digest = json.loads((checkpoint / "manifest.json").read_text())["files"][OPTIMIZER]
    assert digest.keys() == {"size", "sha256"}


def test_damage_survives_pickling():
    again = pickle.loads(pickle.dumps(DamagedCheckpoint("a", "a is missing.")))
    assert (again.file, str(again)) == ("a", "a is missing.")
