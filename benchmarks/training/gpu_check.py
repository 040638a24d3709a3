"""Checks that dpo_core works on this machine's GPU and compares its speed with TRL's, in at most eight minutes.

    make gpu-check
    python benchmarks/training/gpu_check.py --device cpu --size tiny     # the same check for a machine without a GPU

Each part of the check runs in its own process. `tests` runs the tests marked `gpu`. `parity` compares bfloat16 forward
passes in which completions share prompts with plain forward passes (each completion alone). Then raydpo and TRL train a
model of 1B weights, and an adapter of rank 32 on a model of 8B weights. All weights are random. A part that exceeds its
time is "not done" in the table. The results are a JSON file and a Markdown table. Exits with status 1 if `tests` or
`parity` does not pass.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from benchmarks.rows import dialogues
from benchmarks.training.columns import BEST, OURS

ROOT = Path(__file__).parents[2]
Found = dict[str, Any]
ALIKE = 1.5  # the largest allowed ratio of a pack's error to the error of a plain forward pass in bfloat16


@dataclass(frozen=True)
class Race:
    """A comparison of raydpo with TRL on one model: the sizes of the model (a Llama), the training options, and the
    columns of the table of results."""

    sizes: dict[str, int]
    rows: int
    batch_size: int
    adapter_rank: int = 0
    columns: tuple[str, ...] = (OURS, BEST, "TRL as it comes")


def _sizes(hidden: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocabulary,
    }


TINY = _sizes(64, 128, 2, 4, 2, 1024)
RACES = {
    "full": {
        "1B, all weights": Race(_sizes(2048, 8192, 16, 32, 8, 128_256), 256, 32),
        "8B, LoRA of rank 32": Race(_sizes(4096, 14336, 32, 32, 8, 128_256), 128, 16, adapter_rank=32),
    },
    "tiny": {
        "all weights": Race(TINY, 4, 2, columns=(OURS, BEST)),
        "LoRA of rank 32": Race(TINY, 4, 2, adapter_rank=32, columns=(OURS, BEST)),
    },
}
SHARES = {"tests": 0.25, "parity": 0.3}  # shares of the time left when the part begins; columns share the rest equally


def main() -> None:
    args = _arguments()
    if args.part:
        print("RESULT " + json.dumps(PARTS[args.part](args)))
        return
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --device cpu --size tiny runs the check without a GPU.")
    started = time.monotonic()
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    report: Found = {"device": device, "torch": torch.__version__, "size": args.size}
    for name, share in SHARES.items():
        report[name] = _run(_part(args, name), share * _left(args, started))
        print(f"{name}: {report[name]}", flush=True)
    report["races"] = _race_all(args, started)
    report["seconds"] = round(time.monotonic() - started)
    args.json.write_text(json.dumps(report, indent=1))
    args.markdown.write_text(table := _table(report))
    print(table)
    sys.exit(not (report["tests"].get("passed") and report["parity"].get("passed")))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device, size = (
        "Device to check. Default: %(default)s.",
        "Size of the models: full for a GPU, tiny for a CPU. Default: %(default)s.",
    )
    json_file = "JSON file for all figures. Default: %(default)s."
    markdown = "Markdown file for the table. Default: %(default)s."
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help=device)
    parser.add_argument("--size", choices=RACES, default="full", help=size)
    parser.add_argument("--seconds", type=float, default=470, help="Time limit of the check. Default: %(default)s.")
    parser.add_argument("--json", type=Path, default=Path("gpu-check.json"), help=json_file)
    parser.add_argument("--markdown", type=Path, default=Path("gpu-check.md"), help=markdown)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--race", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _left(args: argparse.Namespace, started: float) -> float:
    return max(0.0, args.seconds - (time.monotonic() - started))


def _part(args: argparse.Namespace, name: str, *more: str) -> list[str]:
    return [__file__, f"--device={args.device}", f"--size={args.size}", f"--part={name}", *more]


def _run(arguments: list[str], seconds: float) -> Found:
    """Runs a Python program for at most `seconds`.

    Returns the JSON object that the program prints, and the seconds that the program took. If the program fails or
    does not end in time, returns the reason as `not_done` instead.
    """
    started = time.monotonic()
    try:
        run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return {"seconds": round(seconds, 1), "not_done": f"it had {seconds:.0f} seconds"}
    took = {"seconds": round(time.monotonic() - started, 1)}
    if run.returncode:
        last_line = (run.stderr.strip() or run.stdout.strip()).rpartition("\n")[2]
        return took | {"not_done": last_line[:300].replace("|", "/")}
    found: Found = json.loads(run.stdout.rpartition("RESULT ")[2].partition("\n")[0])
    return took | found


def _race_all(args: argparse.Namespace, started: float) -> dict[str, dict[str, Found]]:
    """Runs every comparison with TRL. Returns the figures by the name of the comparison, and then by the way of
    training (a column of the table). `started` is the time at which the check began.

    Each way of training may take an equal share of the time that is left, and making a model may take two shares.
    """
    races = RACES[args.size]
    parts_left = sum(2 + len(race.columns) for race in races.values())
    found: dict[str, dict[str, Found]] = {}
    for name, race in races.items():
        found[name] = {}
        with tempfile.TemporaryDirectory() as folder:
            seconds = 2 * _left(args, started) / parts_left
            made = _run(_part(args, "model", f"--race={name}", f"--folder={folder}"), seconds)
            parts_left -= 2
            for column in race.columns:
                seconds = _left(args, started) / parts_left
                given = _column(race, column, Path(folder), args.device)
                found[name][column] = made if "not_done" in made else _run(given, seconds)
                parts_left -= 1
                print(f"{name}, {column}: {found[name][column]}", flush=True)
    return found


def _column(race: Race, column: str, folder: Path, device: str) -> list[str]:
    options = {
        "data": folder / "rows.jsonl",
        "model": folder / "model",
        "dtype": "bfloat16" if device == "cuda" else "float32",
        "batch-size": race.batch_size,
        "adapter-rank": race.adapter_rank,
        "column": column,
    }
    return [str(ROOT / "benchmarks/training/vs_trl.py"), *(f"--{name}={value}" for name, value in options.items())]


def _table(report: Found) -> str:
    title = f"{report['device']}, torch {report['torch']}, size {report['size']}, {report['seconds']} seconds"
    lines = [f"# GPU check: {title}", "", "| part | | seconds |", "|---|---|---|"]
    for part in SHARES:
        found = report[part]
        told = f"**not done**: {found['not_done']}" if "not_done" in found else found["told"]
        lines.append(f"| {part} | {told} | {found['seconds']} |")
    for race, columns in report["races"].items():
        lines += [
            "",
            f"| {race} | tokens/s | peak GB | hfu | ratio to TRL at its best, scoring included |",
            "|---|---|---|---|---|",
        ]
        lines += [f"| {name} | {_cells(name, columns)} |" for name in columns]
    return "\n".join(lines) + "\n"


def _cells(name: str, columns: dict[str, Found]) -> str:
    """Returns the figures of one way of training (`name`), as the cells of a line in the Markdown table.

    Tokens per second are the tokens as raydpo counts them, with a prompt for each completion, divided by the seconds
    that this way of training took.
    """
    found, ours, best = columns[name], columns[OURS], columns[BEST]
    if "not_done" in found:
        return f"**not done**: {found['not_done']} | | | "
    per_second = f"{ours['tokens'] / found['train_seconds']:.0f}" if "tokens" in ours else ""
    hfu = f"{found['matmul_share']:.1%}" if "matmul_share" in found else ""
    rate = "rows_per_second_with_reference"
    ratio = f"{found[rate] / best[rate]:.2f}" if rate in best else ""
    return f"{per_second} | {found['peak_bytes'] / 1e9:.2f} | {hfu} | {ratio}"


# --- the parts, each in its own process ------------------------------------------------------


def tests(args: argparse.Namespace) -> Found:
    """Runs the tests marked `gpu`, and returns how many passed, failed or were skipped.

    On a GPU, the part passes only if no test is skipped.
    """
    import pytest

    outcomes: dict[str, int] = {}

    class Count:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                outcomes[report.outcome] = outcomes.get(report.outcome, 0) + 1

    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    status = pytest.main(["-m", "gpu", "-q", "-p", "no:cacheprovider", *files], plugins=[Count()])
    passed = status == 0 and (args.device == "cpu" or outcomes.keys() == {"passed"})
    told = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
    return {"passed": passed, "told": told or f"pytest ended with {status}"}


def parity(args: argparse.Namespace) -> Found:
    """Compares the log-probabilities of forward passes in which completions share prompts with those of plain forward
    passes (each completion alone). Returns the errors of each family of models.

    The models are small, but their attention heads are as wide as those of models that people use.
    """
    errors = {family: _errors(config, args.device) for family, config in _families(args.size).items()}
    told = "; ".join(f"{family}: {ours:.1e}, plain {plain:.1e}" for family, (ours, plain) in errors.items())
    passed = all(ours <= ALIKE * plain for ours, plain in errors.values())
    return {"passed": passed, "errors": errors, "told": f"{'passed' if passed else '**FAILED**'}: {told}"}


def _families(size: str) -> dict[str, Any]:
    from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config

    wide = {"num_hidden_layers": 4, "vocab_size": 64, "intermediate_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 1024 if size == "full" else 64}
    width = 128 if size == "full" else 16
    return {
        "Llama": LlamaConfig(**wide, **heads, head_dim=width),
        "Qwen3": Qwen3Config(**wide, **heads, head_dim=width),
        "Gemma3, with windows": Gemma3TextConfig(
            **wide, **heads, head_dim=2 * width, layer_types=["sliding_attention", "full_attention"] * 2
        ),
    }


def _errors(config: Any, device: str) -> tuple[float, float]:
    """Computes log-probabilities in bfloat16 in two ways: in a forward pass in which completions share prompts, and in
    plain forward passes (each completion alone). Returns the relative error of each.

    Exact values are the log-probabilities of plain forward passes in float32.
    """
    from transformers import AutoModelForCausalLM

    from dpo_core.encoding.encode import EncodedGroup
    from dpo_core.models.miniature import miniature
    from dpo_core.policy.batch import collate
    from dpo_core.policy.forward import packed_logps, plain_logps, readings

    model = miniature(AutoModelForCausalLM.from_config(config).to(device), narrow=False)
    g = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(64, (length,), generator=g).tolist()

    groups = [EncodedGroup(ids(30 * n), tuple(ids(10 * n + i) for i in range(n)), None, n) for n in range(1, 5)]
    shared, alone = (collate(groups, share_prompts=share).to(model.device) for share in (True, False))
    with torch.no_grad():
        exact = plain_logps(model, alone)[0]
        model.bfloat16()
        ours = packed_logps(model, shared, readings(model.config)[0], shared=True)[0]
        plain = plain_logps(model, alone)[0]
    return tuple(((found - exact).norm() / exact.norm()).item() for found in (ours, plain))


def model(args: argparse.Namespace) -> Found:
    """Writes the rows and the model of one comparison with TRL. The model's random weights are drawn on
    `args.device`."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from demo.base_model import make_base_model

    race = RACES[args.size][args.race]
    rows = dialogues(race.rows, num_completions=2)
    (args.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [m["content"] for row in rows for message in (row["prompt"], *row["completions"]) for m in message]
    make_base_model(args.folder / "model", texts, hidden_size=64, num_layers=1, vocabulary=race.sizes["vocab_size"])
    config = LlamaConfig.from_pretrained(args.folder / "model")
    config.update(race.sizes | {"initializer_range": race.sizes["hidden_size"] ** -0.5})
    with torch.device(args.device):
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(args.folder / "model")
    return {"weights": made.num_parameters()}


PARTS: dict[str, Callable[[argparse.Namespace], Found]] = {
    "tests": tests,
    "parity": parity,
    "model": model,
}

if __name__ == "__main__":
    main()
