"""Trains a model with raydpo or with TRL. Each function trains in one way and returns the figures for one column in the
table of `vs_trl.py`."""

import json
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.rows import as_pairs, encode

RATE, BETA, MAX_LENGTH = 1e-6, 0.1, 1024  # tokens of a prompt with one completion; random rows have fewer
Figures = dict[str, float]
OURS, BEST = "raydpo", "TRL at its best"


def columns(args: Namespace) -> dict[str, Callable[[Namespace], Figures]]:
    """Returns the ways to train, by the name of each way's column in the table of results.

    A way is a function. It takes the command's arguments, trains, writes the trained weights to `args.weights` if that
    is set, and returns the figures (seconds, memory and others) of the training.
    """
    off = {"gradient_checkpointing": False}
    by_name: dict[str, Callable[[Namespace], Figures]] = {
        "TRL as it comes": partial(run_trl, options={}),
        "TRL, checkpointing off": partial(run_trl, options=off),
        BEST: partial(run_trl, options=off | {"precompute_ref_log_probs": True}),
        OURS: run_ours,
    }
    if args.dtype != "float32":
        by_name["raydpo in float32"] = partial(run_ours, dtype="float32")
    if find_spec("ray"):
        by_name["raydpo in Ray Train"] = run_in_ray
    if args.ablate:
        by_name |= {f"raydpo without {part}": partial(run_ours, without=part) for part in ABLATIONS}
    return by_name


# --- raydpo --------------------------------------------------------------------------------


def run_ours(args: Namespace, *, dtype: str | None = None, without: str | None = None) -> Figures:
    """Trains with dpo_core, and returns the figures (seconds, memory and others) of the training. `without` names a
    part of dpo_core to leave out (ABLATIONS lists the parts); None leaves out nothing."""
    from dpo_core import (
        Lora,
        Optim,
        TrainConfig,
        load_policy,
        load_tokenizer,
        score_reference,
        train,
    )
    from dpo_core.policy.flops import Flops, matmul_rate
    from dpo_core.policy.scorer import Scorer

    def in_batches(groups: list[Any]) -> Iterator[list[Any]]:
        return (groups[i : i + args.batch_size] for i in range(0, len(groups), args.batch_size))

    rows = [json.loads(line) for line in args.data.open()]
    tokenizer = load_tokenizer(args.model)
    load = partial(load_policy, args.model, device=device(), dtype=getattr(torch, dtype or args.dtype))
    if rank := args.adapter_rank:
        policy = reference = load(adapter=Lora(r=rank, alpha=2 * rank))
    else:
        policy = load()
        reference = load() if without == "cache" else policy  # which scores before it is trained
    groups = encode(rows, tokenizer)
    batches = list(in_batches(groups))
    most = {"cpu": 1024, "cuda": 16384}[device()]
    optim = Optim(learning_rate=RATE, warmup_ratio=0.0)
    config = TrainConfig(
        optim=optim,
        batch_size=args.batch_size,
        max_length=MAX_LENGTH,
        max_tokens_per_pack=most,
        checkpoint_steps=len(batches),
    )
    with tempfile.TemporaryDirectory() as folder, ABLATIONS.get(without, nullcontext)():
        started = time.perf_counter()
        if without == "cache":
            scored = (score_reference(reference, batch, max_tokens_per_pack=most) for batch in batches)
        else:
            scored = in_batches(score_reference(reference, groups, max_tokens_per_pack=most))
        begun = time.perf_counter()
        resolved = config.resolved(len(groups))
        steps = train(
            resolved, policy, tokenizer, lambda _: scored, total_steps=len(batches), checkpoint_dir=Path(folder)
        )
        for _ in batches:
            next(steps)  # a further next() would write the last step's checkpoint, and TRL writes no checkpoint
        synchronize()
        ended = time.perf_counter()
    if args.weights:
        keep_weights(policy, args.weights)
    scorer, flops = Scorer(policy), Flops(policy)
    per_second = sum(flops.count(scorer.collate(batch)) for batch in batches) / (ended - begun)
    tokens = sum(len(g.prompt_ids) * len(g.completion_ids) + sum(map(len, g.completion_ids)) for g in groups)
    return figures(begun - started, ended - begun, len(rows)) | {
        "tokens": tokens,
        "matmul_share": per_second / matmul_rate(policy.dtype, policy.device),
    }


def run_in_ray(args: Namespace) -> Figures:
    """Trains with dpo_core in a Ray Train worker, and returns the figures (seconds, memory and others) of the
    training."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    def work() -> None:
        import ray.train

        torch.set_num_threads(num_threads)
        Path(folder, "figures.json").write_text(json.dumps(run_ours(args)))
        ray.train.report({})

    num_threads = torch.get_num_threads()
    # Waiting threads must not spin, because Ray's processes need the cores too. The service sets OMP_WAIT_POLICY too.
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_WAIT_POLICY": "PASSIVE"}
    ray.init(include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
    scaling = ScalingConfig(num_workers=1, use_gpu=device() == "cuda", resources_per_worker={"CPU": num_threads})
    with tempfile.TemporaryDirectory() as folder:
        TorchTrainer(work, scaling_config=scaling, run_config=RunConfig(storage_path=folder)).fit()
        found: Figures = json.loads(Path(folder, "figures.json").read_text())
    ray.shutdown()
    return found


# --- raydpo without one of its parts --------------------------------------------------------


def _without_sharing() -> Any:
    """Returns a patch (of `unittest.mock`) under which dpo_core gives each completion its own copy of the prompt in a
    forward pass."""
    from dpo_core.policy import batch, scorer

    def count_tokens(self: Any, group: Any) -> int:
        return len(group.completion_ids) * len(group.prompt_ids) + sum(map(len, group.completion_ids))

    def collate(self: Any, groups: Any) -> Any:
        return batch.collate(groups, share_prompts=False).to(self.model.device)

    return patch.multiple(scorer.Scorer, count_tokens=count_tokens, collate=collate)


def _without_packing() -> Any:
    """Returns a patch (of `unittest.mock`) under which dpo_core runs one forward pass for each group (a prompt and its
    completions)."""
    from dpo_core.policy import scorer

    def plan(self: Any, groups: Any, **kwargs: Any) -> list[list[list[int]]]:
        return [[[i] for i in range(len(groups))]]

    return patch.object(scorer.Scorer, "plan", plan)


def _without_tiles() -> Any:
    """Returns a patch (of `unittest.mock`) under which dpo_core computes the logits of all completion tokens at once,
    instead of tile by tile. PyTorch then computes their gradient."""
    from dpo_core.policy import forward

    def token_logps(hidden: Any, weight: Any, bias: Any, targets: Any, *, soft_cap: Any) -> Any:
        logits = torch.nn.functional.linear(hidden, weight, bias).float()
        return logits.log_softmax(1).gather(1, targets[:, None])[:, 0], logits.argmax(1) == targets

    return patch.object(forward, "token_logps", token_logps)


ABLATIONS: dict[str | None, Callable[[], Any]] = {
    "sharing": _without_sharing,
    "packing": _without_packing,
    "tiles": _without_tiles,
    "cache": nullcontext,  # a second copy of the weights scores the reference, step by step
}

# --- TRL -----------------------------------------------------------------------------------


def run_trl(args: Namespace, *, options: dict[str, Any]) -> Figures:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Trainer(DPOTrainer):
        reference_seconds = 0.0

        def _precompute_ref_logps(self, *args: Any) -> Any:  # DPOTrainer's constructor calls this method
            started = time.perf_counter()
            logps = super()._precompute_ref_logps(*args)
            self.reference_seconds = time.perf_counter() - started
            return logps

    rows = [json.loads(line) for line in args.data.open()]
    pairs = [pair for row in rows for pair in as_pairs(row)]
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            beta=BETA,
            learning_rate=RATE,
            num_train_epochs=1,
            per_device_train_batch_size=args.batch_size * len(pairs) // len(rows),
            max_length=MAX_LENGTH,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            bf16=args.dtype == "bfloat16",
            use_cpu=device() == "cpu",
            disable_tqdm=True,
            train_sampling_strategy="sequential",  # TRL 1.16 cannot group by length, for want of a length column
            **options,
        )
        rank = args.adapter_rank
        adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype if rank else "float32")
        trainer = Trainer(
            policy,
            None,
            config,
            train_dataset=Dataset.from_list(pairs),
            processing_class=AutoTokenizer.from_pretrained(args.model),
            peft_config=adapter if rank else None,
        )
        trainer.train()
        synchronize()
    if args.weights:
        keep_weights(policy, args.weights)
    (seconds,) = [entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry]
    return figures(trainer.reference_seconds, seconds, len(rows))


# --- figures of every column -----------------------------------------------------------------


def figures(reference_seconds: float, train_seconds: float, num_rows: int) -> Figures:
    return {
        "reference_seconds": reference_seconds,
        "train_seconds": train_seconds,
        "rows_per_second": num_rows / train_seconds,
        "rows_per_second_with_reference": num_rows / (reference_seconds + train_seconds),
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _peak_bytes(),
    }


def _peak_bytes() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def keep_weights(policy: torch.nn.Module, path: Path) -> None:
    torch.save(torch.cat([p.detach().float().flatten().cpu() for p in policy.parameters()]), path)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
