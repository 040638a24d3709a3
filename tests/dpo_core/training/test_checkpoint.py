import errno
import hashlib
import json
import logging
import pickle
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from dpo_core.config import Lora, Optim, TrainConfig
from dpo_core.models.model import load_policy
from dpo_core.options import Dpo
from dpo_core.training.checkpoint import (
    DamagedCheckpoint,
    Manifest,
    _load_model,
    latest_checkpoint,
    read_manifest,
    verify,
)
from dpo_core.training.checkpoint_writer import Writer
from dpo_core.training.optim import make_optimizer
from dpo_core.training.trainer import train
from dpo_core.training.weights import Weights
from tests.dpo_core.conftest import SIZES

CONFIG = TrainConfig(optim=Optim(learning_rate=1e-3), batch_size=8, n_epochs=1, checkpoint_steps=1)
OPTIMIZER = "optimizer-00001-of-00001.safetensors"


def run(config, policy, tokenizer, groups, folder, **kwargs):
    return list(train(config, policy, tokenizer, [groups] * 3, total_steps=3, checkpoint_dir=folder, **kwargs))


@pytest.fixture
def checkpoint(policy, tokenizer, pairs, tmp_path) -> Path:
    run(CONFIG, policy, tokenizer, pairs, tmp_path)
    return tmp_path / "step-000001"


def test_the_manifest_holds_the_step_the_config_and_every_file(checkpoint):
    manifest = verify(checkpoint)
    assert (manifest.step, manifest.total_steps) == (1, 3)
    assert manifest.config["objective"] == {"type": "dpo", "beta": 0.1, "mean_over_choices": False}
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert files - {"manifest.json"} == set(manifest.files)
    assert {OPTIMIZER, "model/config.json", "model/model.safetensors"} <= files


def test_a_checkpoint_holds_nothing_that_runs_code(checkpoint):
    assert {path.suffix for path in checkpoint.rglob("*") if path.is_file()} == {".json", ".safetensors", ".jinja"}


def test_no_partly_written_checkpoint_remains(checkpoint):
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
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json cannot be read"):
        verify(checkpoint)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path):
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json is missing"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        replace(CONFIG, objective=Dpo(beta=0.2)),
        replace(CONFIG, optim=Optim(learning_rate=2e-3)),
        replace(CONFIG, batch_size=16),
        replace(CONFIG, max_length=CONFIG.max_length // 2),
        replace(CONFIG, truncation="keep_end"),
        replace(CONFIG, seed=1),
    ],
    ids=["objective", "optim", "batch_size", "max_length", "truncation", "seed"],
)
def test_resuming_another_run_is_refused(checkpoint, policy, tokenizer, pairs, changed):
    with pytest.raises(ValueError, match="resume with the same config"):
        run(changed, policy, tokenizer, pairs, checkpoint.parent, resume=checkpoint)


def test_resuming_a_run_of_another_length_is_refused(checkpoint, policy, tokenizer, pairs):
    with pytest.raises(ValueError, match="3 steps, but this run has 5"):
        list(train(CONFIG, policy, tokenizer, [pairs] * 5, total_steps=5, checkpoint_dir=Path("/"), resume=checkpoint))


def test_resuming_with_another_adapter_is_refused(checkpoint, policy, tokenizer, pairs, tmp_path):
    policy.save_pretrained(tmp_path / "model")
    adapted = load_policy(tmp_path / "model", adapter=Lora(r=2))
    with pytest.raises(
        ValueError, match=r"names of the weights trained in the checkpoint .* differ from those of this run"
    ):
        run(CONFIG, adapted, tokenizer, pairs, checkpoint.parent, resume=checkpoint)


@pytest.mark.parametrize(
    ("kind", "other", "difference"),
    [
        (MistralForCausalLM, MistralConfig(**SIZES), "model_type llama, but the policy has mistral"),
        (LlamaForCausalLM, LlamaConfig(**SIZES, rms_norm_eps=0.1), "rms_norm_eps 1e-06, but the policy has 0.1"),
        (
            LlamaForCausalLM,
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
            "rope_parameters .*10000.*, but the policy has .*500000",
        ),
    ],
    ids=["another architecture", "other norms", "other positions"],
)
def test_the_same_weights_are_not_resumed_as_another_model(kind, other, difference, checkpoint, tokenizer, pairs):
    policy = kind(other).eval()
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    with pytest.raises(ValueError, match=f"step-000001 has a model with {difference}.*; resume with the same model"):
        run(CONFIG, policy, tokenizer, pairs, checkpoint.parent, resume=checkpoint)
    assert all(torch.equal(weight, before[name]) for name, weight in policy.named_parameters())


def test_keys_of_a_config_that_compute_nothing_may_change(checkpoint, make_policy, tokenizer, pairs):
    policy = make_policy(attention_dropout=0.1, initializer_range=0.5, use_cache=False, pad_token_id=3)
    assert [step.step for step in run(CONFIG, policy, tokenizer, pairs, checkpoint.parent, resume=checkpoint)] == [2, 3]


def test_resuming_with_a_model_of_other_sizes_is_refused_before_a_weight_is_changed(
    checkpoint, make_policy, tokenizer, pairs
):
    wider, before = (make_policy(vocab_size=384) for _ in range(2))
    sentence = (
        r"model\.embed_tokens\.weight has the shape \(320, 32\), but in this run \(384, 32\); resume with the same"
    )
    with pytest.raises(ValueError, match=sentence):
        run(CONFIG, wider, tokenizer, pairs, checkpoint.parent, resume=checkpoint)
    torch.testing.assert_close(dict(wider.named_parameters()), dict(before.named_parameters()), rtol=0, atol=0)


def keep_as_a_model(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_bytes(read_manifest(checkpoint).without_optimizer().to_json())
    (checkpoint / OPTIMIZER).unlink()


def test_a_checkpoint_without_its_optimizers_state_is_whole_and_nothing_goes_on_from_it(
    checkpoint, policy, tokenizer, pairs
):
    newest = checkpoint.with_name("step-000003")
    before = read_manifest(newest)
    keep_as_a_model(newest)
    manifest = verify(newest)
    assert not manifest.has_optimizer
    assert replace(manifest, files=before.files) == before
    assert set(before.files) - set(manifest.files) == {OPTIMIZER}
    assert latest_checkpoint(newest.parent) == newest.with_name("step-000002")
    with pytest.raises(ValueError, match="has no optimizer state any more; resume from a newer one"):
        run(CONFIG, policy, tokenizer, pairs, newest.parent, resume=newest)


def test_a_manifest_without_evaluations_is_of_an_earlier_release(checkpoint):
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["evaluations"], manifest["config"]["best_metric"], manifest["config"]["early_stop"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert read_manifest(checkpoint).evaluations == ()


def as_an_earlier_release_wrote_it(checkpoint: Path) -> Path:
    """Removes the policy's dtype and the number of updates of each weight from the checkpoint, and returns it."""
    file, manifest = checkpoint / OPTIMIZER, json.loads((checkpoint / "manifest.json").read_text())
    save_file({name: tensor for name, tensor in load_file(file).items() if not name.endswith(".step")}, file)
    manifest["files"][OPTIMIZER] = {
        "size": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    del manifest["dtype"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    return checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_of_an_earlier_release_goes_on_bit_for_bit(dtype, make_policy, tokenizer, pairs, tmp_path):
    batches, policies = [pairs, [], pairs, pairs], [make_policy(seed).to(dtype) for seed in (0, 7)]
    straight, resumed = (
        train(CONFIG, policy, tokenizer, batches, total_steps=4, checkpoint_dir=tmp_path / name, resume=resume)
        for policy, name, resume in zip(policies, "ab", (None, tmp_path / "a" / "step-000003"), strict=True)
    )
    assert len(list(straight)) == 4
    as_an_earlier_release_wrote_it(tmp_path / "a" / "step-000003")
    assert [result.step for result in resumed] == [4]
    ours, theirs = (dict(policy.named_parameters()) for policy in policies)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    first, second = (load_file(tmp_path / name / "step-000004" / OPTIMIZER) for name in "ab")
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize(("saved_in", "num_before", "num_now"), [("bfloat16", 21, 0), ("float32", 0, 21)])
def test_a_checkpoint_of_an_earlier_release_in_another_precision_is_refused(
    saved_in, num_before, num_now, make_policy, tokenizer, pairs, tmp_path
):
    saved_in = getattr(torch, saved_in)
    (other,) = {torch.bfloat16, torch.float32} - {saved_in}
    run(CONFIG, make_policy().to(saved_in), tokenizer, pairs, tmp_path)
    before = as_an_earlier_release_wrote_it(tmp_path / "step-000001")
    sentence = f"has {num_before} weights in half precision, but this run has {num_now}; load the policy in the dtype"
    with pytest.raises(ValueError, match=sentence):
        run(CONFIG, make_policy().to(other), tokenizer, pairs, tmp_path, resume=before)


def test_weights_of_an_adapter_that_have_no_place_are_refused(make_policy, tokenizer, tmp_path):
    base = tmp_path / "base"
    make_policy().save_pretrained(base)
    tokenizer.save_pretrained(base)
    policy = load_policy(base, adapter=Lora(r=2))
    policy.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    saved = load_file(file)
    moved = next(iter(saved))
    saved[moved.replace("self_attn", "other").replace("mlp", "other")] = saved.pop(moved)
    save_file(saved, file)
    with pytest.raises(
        ValueError, match=r"does not fit the model: 2 weights, such as .*model.layers.0.*, exist only in"
    ):
        _load_model(tmp_path / "adapter", policy)


def test_resuming_a_finished_run_has_nothing_left_to_do(checkpoint, policy, tokenizer, pairs):
    last = checkpoint.with_name("step-000003")
    assert run(CONFIG, policy, tokenizer, pairs, checkpoint.parent, resume=last) == []


def test_the_manifest_is_plain_json(checkpoint):
    digest = json.loads((checkpoint / "manifest.json").read_text())["files"][OPTIMIZER]
    assert digest.keys() == {"size", "sha256"}


def test_damage_survives_pickling():
    again = pickle.loads(pickle.dumps(DamagedCheckpoint("a", "a is missing.")))
    assert (again.file, str(again)) == ("a", "a is missing.")


def test_the_newest_checkpoint_is_the_latest(checkpoint):
    assert latest_checkpoint(checkpoint.parent) == checkpoint.with_name("step-000003")
    checkpoint.with_name("step-000002").rename(checkpoint.with_name("step-999999"))
    checkpoint.rename(checkpoint.with_name("step-1000000"))
    assert latest_checkpoint(checkpoint.parent) == checkpoint.with_name("step-1000000")


@pytest.mark.parametrize("file", ["model/model.safetensors", OPTIMIZER, "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_the_latest(checkpoint, file, caplog):
    truncate(checkpoint.with_name("step-000003") / file)
    with caplog.at_level(logging.WARNING, "dpo_core.training.checkpoint"):
        assert latest_checkpoint(checkpoint.parent) == checkpoint.with_name("step-000002")
    (said,) = [record.getMessage() for record in caplog.records]
    assert (
        f"skipped; an older one is tried: The checkpoint's file {checkpoint.with_name('step-000003') / file} " in said
    )


def test_an_unfinished_checkpoint_is_none(checkpoint, caplog):
    for step in (1, 2, 3):
        whole = checkpoint.with_name(f"step-00000{step}")
        whole.rename(whole.with_name(f".{whole.name}.partial"))
    assert latest_checkpoint(checkpoint.parent) is None
    assert latest_checkpoint(checkpoint.parent / "never made") is None
    assert not caplog.records


def test_steps_go_on_while_a_checkpoint_is_published_until_the_next_one_is_due(policy, tokenizer, pairs, tmp_path):
    """Only one checkpoint is published at a time: steps 3 and 4 run while step 2's is published, but step 5 waits."""
    came, released, published = Event(), Event(), []

    def publish(step: int, folder: Path) -> None:
        assert released.wait(300)
        published.append((step, folder.name, came.wait(0.3 if step == 2 else 0)))

    config = replace(CONFIG, checkpoint_steps=2)
    steps = train(config, policy, tokenizer, [pairs] * 6, total_steps=6, checkpoint_dir=tmp_path, publish=publish)
    assert [next(steps).step for _ in range(4)] == [1, 2, 3, 4]
    assert not published
    released.set()
    assert next(steps).step == 5
    came.set()
    assert published[0] == (2, "step-000002", False)
    assert [step.step for step in steps] == [6]
    assert [name for _, name, _ in published] == ["step-000002", "step-000004", "step-000006"]


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_checkpoint_that_could_not_be_published_ends_the_run(failing, policy, tokenizer, pairs, tmp_path):
    def publish(step: int, folder: Path) -> None:
        if step == failing:
            raise OSError(f"no room for {folder.name}")

    with pytest.raises(OSError, match=f"no room for step-00000{failing}"):
        run(CONFIG, policy, tokenizer, pairs, tmp_path, publish=publish)
    assert not (tmp_path / f"step-00000{failing + 1}").exists()


def test_a_failure_is_not_kept_until_the_next_checkpoint(policy, tokenizer, pairs, tmp_path):
    failed, came = Event(), []

    def publish(step: int, folder: Path) -> None:
        failed.set()
        raise OSError("no room")

    def batches():
        yield from [pairs] * 10
        assert failed.wait(300)
        yield from [pairs] * 6

    config = replace(CONFIG, checkpoint_steps=8)
    steps = train(
        config, policy, tokenizer, lambda _: batches(), total_steps=16, checkpoint_dir=tmp_path, publish=publish
    )
    with pytest.raises(OSError, match="no room"):
        came.extend(step.step for step in steps)
    assert 8 <= came[-1] < 16


def test_a_checkpoint_that_could_not_be_written_ends_the_run(policy, tokenizer, pairs, tmp_path):
    (tmp_path / "a file").touch()
    with pytest.raises(NotADirectoryError):
        run(CONFIG, policy, tokenizer, pairs, tmp_path / "a file")


class InUse(dict):
    """A dictionary that another thread is changing: iterating over it raises RuntimeError."""

    def items(self):
        raise RuntimeError("dictionary changed size during iteration")


@pytest.mark.parametrize("adapter", [None, Lora(r=2)], ids=["whole", "adapter"])
def test_a_checkpoint_is_written_without_looking_at_the_policy(
    adapter, policy, tokenizer, pairs, tmp_path, monkeypatch
):
    """If several experts share one weight, PEFT changes the model in every forward pass. The writer's thread must not
    see this."""
    policy.save_pretrained(tmp_path / "base")
    policy, looked_away = load_policy(tmp_path / "base", adapter=adapter), Event()
    weights, layer = Weights(policy), policy.model.layers[0]

    def save_late(tensors, path):
        assert looked_away.wait(300)
        save_file(tensors, path)

    monkeypatch.setattr("dpo_core.training.checkpoint_writer.save_file", save_late)
    manifest = Manifest(1, 1, 1, 1, {}, {}, asdict(CONFIG), {}, "float32")
    with Writer(tmp_path / "run", policy, tokenizer, weights) as writer:
        writer.save(manifest, make_optimizer(weights.stepped.values(), CONFIG.optim), {})
        modules, vars(layer)["_modules"] = layer._modules, InUse(layer._modules)
        looked_away.set()
        writer.wait()
        vars(layer)["_modules"] = modules
    saved = load_file(next((tmp_path / "run" / "step-000001" / "model").glob("*model.safetensors")))
    assert {tuple(tensor.shape) for tensor in saved.values()} == {tuple(p.shape) for p in weights.trained.values()}


@contextmanager
def room_for_files_of(num_bytes: int) -> Iterator[None]:
    """Makes the system refuse files of more than `num_bytes` in the block, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("num_bytes", [1_000, 200_000], ids=["nothing", "a part"])
def test_a_checkpoint_without_room_is_refused_by_step_and_folder_and_leaves_nothing(
    num_bytes, checkpoint, policy, tokenizer, pairs
):
    folder = checkpoint.parent
    for step in (2, 3):
        shutil.rmtree(folder / f"step-00000{step}")
    sentence = f"The checkpoint of step 2 could not be written to {folder} .*; free some space, and resume"
    with room_for_files_of(num_bytes), pytest.raises(OSError, match=sentence) as refused:
        run(CONFIG, policy, tokenizer, pairs, folder, resume=checkpoint)
    assert refused.value.errno == errno.EFBIG
    assert [path.name for path in folder.iterdir()] == ["step-000001"]
    assert latest_checkpoint(folder) == checkpoint


def test_a_checkpoint_is_of_its_step_though_training_went_on(make_policy, tokenizer, pairs, tmp_path, monkeypatch):
    """The checkpoint of step 2 is written only after step 4. It must equal that of a run of two steps."""
    config = replace(CONFIG, optim=Optim(learning_rate=1e-2, schedule="constant", warmup_ratio=0.0), checkpoint_steps=2)
    stopped = train(config, make_policy(), tokenizer, [pairs] * 2, total_steps=2, checkpoint_dir=tmp_path / "stopped")
    assert len(list(stopped)) == 2
    went_on = Event()

    def save_late(tensors, path):
        assert went_on.wait(300)
        save_file(tensors, path)

    monkeypatch.setattr("dpo_core.training.checkpoint_writer.save_file", save_late)
    steps = train(config, make_policy(), tokenizer, [pairs] * 4, total_steps=4, checkpoint_dir=tmp_path / "went on")
    assert [next(steps).step for _ in range(4)] == [1, 2, 3, 4]
    went_on.set()
    steps.close()
    for name in ("model/model.safetensors", OPTIMIZER):
        ours, theirs = (tmp_path / folder / "step-000002" / name for folder in ("went on", "stopped"))
        assert ours.read_bytes() == theirs.read_bytes()
