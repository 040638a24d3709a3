"""The engine against TRL: the same rows in the same order, the same AdamW, one process per run, medians.

    python benchmarks/vs_trl.py --pairs 64 --batch-size 8 --repeats 3 --json results.json

It needs torch, transformers and trl, and neither Ray nor the service. Columns run interleaved, forth and
back. `reference` is the time that scoring takes where it is apart, `train` that of the steps; set-up
is in neither. Memory is the process's peak: VmHWM, or what CUDA allocated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

RATE, BETA = 1e-6, 0.1
TRL = {
    "TRL as it comes": {},
    "TRL, checkpointing off": {"gradient_checkpointing": False},
    "TRL at its best": {
        "gradient_checkpointing": False,
        "precompute_ref_log_probs": True,
    },
}
COLUMNS = [*TRL, "raydpo"]


def main() -> None:
    args = _arguments()
    if args.column:
        print("RESULT " + json.dumps(_run_column(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        _prepare(args, Path(folder))
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in COLUMNS}
        for repeat in range(args.repeats):
            for name in COLUMNS if repeat % 2 == 0 else COLUMNS[::-1]:
                runs[name].append(_in_its_own_process(args, name))
                print(f"{name}: {runs[name][-1]}", flush=True)
    medians = {
        name: {key: statistics.median(r[key] for r in found) for key in found[0]} for name, found in runs.items()
    }
    _print_table(medians)
    if args.json:
        args.json.write_text(
            json.dumps({"arguments": vars(args) | {"json": None}, "medians": medians, "runs": runs}, default=str)
        )


def _median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="prompt/chosen/rejected messages, JSON Lines; else made up")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; else a random Llama of 40M parameters")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write every figure")
    parser.add_argument("--column", choices=COLUMNS, help=argparse.SUPPRESS)
    return parser.parse_args()


def _prepare(args: argparse.Namespace, folder: Path) -> None:
    from benchmarks.rows import dialogue_pairs, save_model

    rows = [json.loads(line) for line in args.data.open()] if args.data else dialogue_pairs(args.pairs)
    if len(rows) < args.pairs:
        raise SystemExit(f"{args.data} has {len(rows)} rows; --pairs asks for {args.pairs}.")
    args.data = folder / "rows.jsonl"
    args.data.write_text("".join(json.dumps(row) + "\n" for row in rows[: args.pairs]))
    if args.model is None:
        args.model = folder / "model"
        save_model(args.model, rows)


def _in_its_own_process(args: argparse.Namespace, column: str) -> dict[str, float]:
    given = ["--data", args.data, "--model", args.model, "--pairs", args.pairs, "--batch-size", args.batch_size]
    command = [sys.executable, __file__, *map(str, given), "--column", column]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{column} failed:\n{run.stderr}")
    found: dict[str, float] = json.loads(run.stdout.rpartition("RESULT ")[2])
    return found


def _run_column(args: argparse.Namespace) -> dict[str, float]:
    import torch

    torch.manual_seed(0)
    run = _run_ours if args.column == "raydpo" else _run_trl
    reference, train = run(args)
    return {
        "reference_seconds": reference,
        "train_seconds": train,
        "pairs_per_second": args.pairs / train,
        "pairs_per_second_with_reference": args.pairs / (reference + train),
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _peak_bytes(),
    }


def _peak_bytes() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def _run_ours(args: argparse.Namespace) -> tuple[float, float]:
    from dpo_core import Optim, TrainConfig, encode_group, load_policy, load_tokenizer, read_groups, score_reference

    tokenizer, policy = load_tokenizer(args.model), load_policy(args.model, device=_device())
    groups = [encode_group(group, tokenizer) for group in read_groups(args.data.open("rb"))]
    started = time.perf_counter()
    groups = score_reference(policy, groups, max_tokens_per_pack=4096)
    scored = time.perf_counter()
    batches = [groups[i : i + args.batch_size] for i in range(0, len(groups), args.batch_size)]
    optim = Optim(learning_rate=RATE, warmup_ratio=0.0)
    config = TrainConfig(optim=optim, batch_size=args.batch_size, max_tokens_per_pack=4096, max_length=2048)
    config = config.resolved(len(groups))
    with tempfile.TemporaryDirectory() as folder:
        elapsed = _time_steps(config, policy, tokenizer, batches, Path(folder))
    return scored - started, elapsed


def _time_steps(config: Any, policy: Any, tokenizer: Any, batches: list[Any], folder: Path) -> float:
    """Seconds of all steps without the last checkpoint: one more step is announced than is taken."""
    from dataclasses import replace

    from dpo_core import train

    config = replace(config, checkpoint_steps=len(batches) + 1)
    started = time.perf_counter()
    steps: Iterator[Any] = train(
        config, policy, tokenizer, batches, total_steps=len(batches) + 1, checkpoint_dir=folder
    )
    for _ in batches:
        next(steps)
    return time.perf_counter() - started


def _run_trl(args: argparse.Namespace) -> tuple[float, float]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    options: dict[str, Any] = dict(TRL[args.column])
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            beta=BETA,
            learning_rate=RATE,
            num_train_epochs=1,
            per_device_train_batch_size=args.batch_size,
            max_length=2048,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            bf16=False,
            use_cpu=_device() == "cpu",
            disable_tqdm=True,
            train_sampling_strategy="sequential",  # TRL 1.16 cannot group by length: its columns hold no lengths
            **options,
        )
        rows = Dataset.from_list([json.loads(line) for line in args.data.open()])
        policy = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        trainer = DPOTrainer(policy, None, config, train_dataset=rows, processing_class=tokenizer)
        started = time.perf_counter()
        trainer.get_train_dataloader()  # scores the reference, where that is done before training
        scored = time.perf_counter()
        trainer.train()
        return scored - started, trainer.state.log_history[-1]["train_runtime"]


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _print_table(medians: dict[str, dict[str, float]]) -> None:
    print(f"\n{'':24}{'pairs/s':>10}{'with reference':>16}{'peak GB':>10}{'ours, with reference':>22}{'memory':>8}")
    ours = medians["raydpo"]
    for name, found in medians.items():
        ratio = ours["pairs_per_second_with_reference"] / found["pairs_per_second_with_reference"]
        memory = ours["peak_bytes"] / found["peak_bytes"]
        print(
            f"{name:24}{found['pairs_per_second']:10.2f}{found['pairs_per_second_with_reference']:16.2f}"
            f"{found['peak_bytes'] / 1e9:10.2f}{ratio:20.2f} x{memory:8.2f}"
        )
    best = ours["pairs_per_second"] / medians["TRL at its best"]["pairs_per_second"]
    print(f"Training alone, against TRL at its best: {best:.2f} x")


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
