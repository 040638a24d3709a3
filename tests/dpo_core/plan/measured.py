"""Measures the memory that training needs, with torch's profiler in one process and with the kernel on several
ranks."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.memory import most_allocated
from dpo_core.config import Lora, Optim, TrainConfig
from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.adapter import attach
from dpo_core.plan.inputs import Rows, Run, Shapes
from dpo_core.training.trainer import train
from tests.dpo_core.conftest import build_tokenizer

MODEL = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
PAIR = Rows(groups=1, prompt=64, completion=64)


@dataclass(frozen=True)
class Case:
    run: Run
    rows: Rows = PAIR
    model: dict[str, Any] = field(default_factory=lambda: MODEL)

    @classmethod
    def read(cls, text: str) -> "Case":
        parts = json.loads(text)
        return cls(Run(**parts["run"]), Rows(**parts["rows"]), parts["model"])

    def shapes(self) -> Shapes:
        with torch.device("meta"):
            policy = AutoModelForCausalLM.from_config(AutoConfig.for_model(**self.model))
        weights = {name: tuple(weight.shape) for name, weight in policy.named_parameters()}
        return Shapes(self.model, dict(part for weight in weights.items() for part in as_in_files(*weight)))


def as_in_files(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the weights, by name, that a model's files have for one of its parameters. Experts are stacked only in the
    model."""
    if len(shape) != 3:
        yield name, shape
        return
    prefix, _, part = name.rpartition(".")
    parts = ["gate_proj", "up_proj"] if part == "gate_up_proj" else [part]
    for number in range(shape[0]):
        for each in parts:
            yield f"{prefix}.{number}.{each}.weight", (shape[1] // len(parts), shape[2])


def train_twice(case: Case, folder: Path) -> None:
    """Trains two steps without a checkpoint."""
    run, rows = case.run, case.rows
    torch.manual_seed(0)
    attention = "eager" if case.model.get("attn_logit_softcapping") else None  # as `load_policy` chooses
    policy = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**case.model), dtype=getattr(torch, run.precision), attn_implementation=attention
    )
    if run.adapter:
        attach(policy, Lora(r=run.adapter, dropout=run.dropout), task_type="CAUSAL_LM")
    ids = [5 + i % 100 for i in range(rows.prompt + rows.completion)]
    prompt, completion = ids[: rows.prompt], ids[rows.prompt :]
    group = EncodedGroup(prompt, (completion,) * rows.completions, (-1.0,) * rows.completions, 1)
    config = TrainConfig(
        optim=Optim(learning_rate=1e-5),
        n_epochs=1,
        batch_size=run.batch_size,
        max_length=rows.prompt + rows.completion,
        max_tokens_per_pack=run.max_tokens_per_pack,
        activation_checkpointing=run.activation_checkpointing,
        sharding=run.sharding,
        checkpoint_steps=1000,
    )
    batches = [[group] * run.batch_size] * 3
    steps = train(config, policy, build_tokenizer(), batches, total_steps=3, checkpoint_dir=folder)
    next(steps), next(steps)
    steps.close()


def allocated(case: Case, folder: Path) -> int:
    """Returns the most bytes that torch had allocated at the same time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        train_twice(case, folder)
    return most_allocated(profiled)


def _measure(rank: int, case: Case, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/ranks", rank=rank, world_size=case.run.num_workers)
    # What the first run of all loads and keeps is there before anything counts.
    small = case.model | {"hidden_size": 4 * case.model["num_attention_heads"], "vocab_size": 128}
    train_twice(Case(case.run, Rows(groups=1, prompt=2, completion=2), small), Path(folder))
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # from here on the kernel looks for the peak
    train_twice(case, Path(folder))
    Path(folder, f"peak-{rank}").write_text(str(_status("VmHWM") - before))
    os._exit(0)  # gloo's threads would be waited for


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main() -> None:
    """Prints, for each given case, the peak resident memory of a rank in bytes, beyond that of a small run."""
    torch.set_num_threads(1)
    peaks = []
    for case in map(Case.read, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as folder:
            start_processes(_measure, (case, folder), nprocs=case.run.num_workers, start_method="fork")
            peaks.append(max(int(path.read_text()) for path in Path(folder).glob("peak-*")))
    sys.stdout.write(json.dumps(peaks))


def as_argument(case: Case) -> str:
    return json.dumps(asdict(case))


if __name__ == "__main__":
    main()
