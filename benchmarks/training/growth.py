"""Measures how the time and the memory of training grow with rows, completions, lengths, vocabulary and workers, and
compares both with theory.

    python benchmarks/training/growth.py --repeats 3

The base is a step of eight pairs on a random Llama of 7M weights, in float32 on one thread. Each line changes one size
and is measured in processes of its own, one for each worker. *CPU s* are the CPU seconds of all workers, for a step or,
if rows grow, for an epoch of steps with eight rows each; the first step is left out. The theory of time is the count of
floating-point operations in matrix products (`dpo_core.policy.flops`). *MB* are the most bytes that PyTorch had
allocated in a worker at the same time, the median of three runs. The theory of memory is the plan that `raydpo` shows
before a job (`dpo_core.plan`), without a checkpoint. Factors are relative to the first line of their group.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).parents[2]))

MAX_TOKENS_PER_PACK = 2048
MB = 1e6


@dataclass(frozen=True)
class Case:
    """The sizes of a training run. A prompt and each of its completions have `length` tokens."""

    rows: int = 8  # of an epoch
    completions: int = 2  # of a prompt
    length: int = 64
    vocabulary: int = 4096
    workers: int = 1
    batch_size: int = 8


CASES = {
    "rows": [Case(rows=rows) for rows in (8, 16, 32, 64)],
    "completions": [Case(completions=number) for number in (2, 4, 8, 16)],
    "length": [Case(length=length) for length in (64, 128, 256, 512)],
    "vocabulary": [Case(vocabulary=size) for size in (4096, 8192, 16384, 32768)],
    "workers": [Case(workers=number) for number in (1, 2, 4)],
}
Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=CASES, default=list(CASES), help="Sizes that grow. Default: all.")
    parser.add_argument("--repeats", type=int, default=3, help="Number of timed steps or epochs. Default: %(default)s.")
    parser.add_argument("--json", type=Path, help="JSON file for all figures. Default: no file is written.")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        rank, folder, case = args.measure
        print("RESULT " + json.dumps(_work(Case(**json.loads(case)), int(rank), Path(folder), args.repeats)))
        return
    found = {size: [measure(case, args.repeats) for case in CASES[size]] for size in args.sizes}
    print("| | | CPU s | grows | in theory | MB | grows | in theory | theory, MB |\n" + "|---" * 9 + "|")
    for size, lines in found.items():
        for case, line in zip(CASES[size], lines, strict=True):
            grown = {name: line[name] / lines[0][name] for name in line}
            times = f"{line['cpu_seconds']:.2f} | {grown['cpu_seconds']:.2f} | {grown['operations']:.2f}"
            memory = f"{line['bytes'] / MB:.0f} | {grown['bytes']:.2f} | {grown['planned_bytes']:.2f}"
            print(f"| {size} | {getattr(case, size)} | {times} | {memory} | {line['planned_bytes'] / MB:.0f} |")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


def measure(case: Case, repeats: int) -> Figures:
    """Trains a model of the sizes in `case` in one process for each worker. Returns the CPU seconds of all workers, the
    memory of the worker that needs the most, and what theory says of both."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", __file__, f"--repeats={repeats}", "--measure"]
        arguments = [[str(rank), folder, json.dumps(asdict(case))] for rank in range(case.workers)]
        workers = [subprocess.Popen([*command, *own], stdout=subprocess.PIPE, text=True) for own in arguments]
        outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit(f"A worker of {case} failed.")
    figures = [json.loads(output.rpartition("RESULT ")[2]) for output in outputs]
    total = {name: sum(own[name] for own in figures) for name in ("cpu_seconds", "operations")}
    return total | {"bytes": max(own["bytes"] for own in figures), "planned_bytes": figures[0]["planned_bytes"]}


def _work(case: Case, rank: int, folder: Path, repeats: int) -> Figures:
    """Trains as the worker `rank`, and returns its figures."""
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.memory import most_allocated

    if case.workers > 1:
        dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=case.workers)
    seconds, operations = _train(case, repeats)
    peaks = []
    for _ in range(3):  # on a loaded machine about one measurement in forty is off, by up to a copy of the weights
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            _train(replace(case, rows=case.batch_size), repeats=1)
        peaks.append(most_allocated(profiled))
    return {
        "cpu_seconds": statistics.median(seconds),
        "operations": operations,
        "bytes": statistics.median(peaks),
        "planned_bytes": _planned_bytes(case),
    }


def _train(case: Case, repeats: int) -> tuple[list[float], int]:
    """Trains `repeats` epochs after a first step. Returns the CPU seconds of each epoch, and the floating-point
    operations of the matrix products that this worker computes in an epoch."""
    import torch

    from dpo_core import EncodedGroup, Optim, TrainConfig, train
    from dpo_core.policy.flops import Flops
    from dpo_core.policy.scorer import Scorer
    from dpo_core.training.gradients import make_packs

    torch.manual_seed(0)
    policy, ids = _policy(case), [5 + i % 100 for i in range(case.length)]
    group = EncodedGroup(ids, (ids,) * case.completions, (-1.0,) * case.completions, 1)
    batch, num_steps = [group] * case.batch_size, case.rows // case.batch_size
    config = TrainConfig(
        optim=Optim(learning_rate=1e-5),
        n_epochs=1,
        batch_size=case.batch_size,
        max_length=2 * case.length,
        max_tokens_per_pack=MAX_TOKENS_PER_PACK,
        activation_checkpointing="off",
        sharding="replicated",
        checkpoint_steps=1000,
    )
    total_steps, seconds = 2 + repeats * num_steps, []  # the last step, which would write a checkpoint, is not taken
    with tempfile.TemporaryDirectory() as checkpoints:
        tokenizer = _tokenizer()
        batches = [batch] * total_steps
        steps = train(config, policy, tokenizer, batches, total_steps=total_steps, checkpoint_dir=checkpoints)
        next(steps)
        for _ in range(repeats):
            started = time.process_time()
            for _ in range(num_steps):
                next(steps)
            seconds.append(time.process_time() - started)
        steps.close()
    flops = Flops(policy)
    packs = make_packs(Scorer(policy), batch, max_tokens_per_pack=MAX_TOKENS_PER_PACK)
    return seconds, num_steps * sum(flops.count(pack.batch) for pack in packs)


def _policy(case: Case) -> "PreTrainedModel":
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=case.vocabulary,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
        )
    )


def _tokenizer() -> "PreTrainedTokenizerBase":
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<|end|>": 0}, "<|end|>")))


def _planned_bytes(case: Case) -> int:
    """Returns the memory that a plan says each worker needs, without the copy for a checkpoint."""
    import torch

    from dpo_core.plan.inputs import Rows, Run, Shapes
    from dpo_core.plan.plan import plan

    with torch.device("meta"):
        policy = _policy(case)
    shapes = Shapes(policy.config.to_dict(), {name: tuple(w.shape) for name, w in policy.named_parameters()})
    run = Run(
        num_workers=case.workers,
        batch_size=case.batch_size,
        sharding="replicated",
        activation_checkpointing="off",
        max_tokens_per_pack=MAX_TOKENS_PER_PACK,
    )
    rows = Rows(groups=case.rows, prompt=case.length, completion=case.length, completions=case.completions)
    memory = plan(shapes, run, rows).memory
    return memory.total - memory.checkpoint


if __name__ == "__main__":
    main()
