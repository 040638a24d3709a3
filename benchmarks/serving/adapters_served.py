"""Measures how one engine serves many adapters of one base model: whether each adapter answers with its own weights,
the time of its first answer, and memory.

    python benchmarks/serving/adapters_served.py --adapters 40

The base is a Llama with random weights, and each adapter has random weights of its own. The engine attaches all of them
one after the other, each at the adapter's first request; then each adapter is asked a second time. Each answer's
log-probability is compared with that of PEFT on the same weights. The times are those of whole HTTP requests for one
token at Ray Serve's proxy. Memory is the proportional set size (PSS) of the replica and of its engine's processes. The
benchmark runs on CPUs.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
sys.path.insert(0, str(Path(__file__).parents[2]))

import httpx
import psutil
import torch
from peft import AutoPeftModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from benchmarks.cluster import start_ray
from benchmarks.memory import below
from demo.base_model import make_base_model
from dpo_core.config import Lora
from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.adapter import BASE as BASE_FILE
from dpo_core.models.adapter import base_file, fingerprint
from dpo_core.models.adapter_folder import EFFECT
from dpo_core.models.model import load_policy
from dpo_core.policy.adapter_effect import NUM_ROWS, SIDE_TOKENS, measure_effect
from dpo_core.policy.scorer import Scorer
from services.contract import ADAPTER_HEADER, ADAPTER_SOURCE_HEADER, Deployment
from services.deployment_settings import EngineSettings
from tests.services.control_plane.conftest import free_port

APP = "base"
PROMPT = [5, 9, 200, 31, 77]
TEXT = ["the quick brown fox jumps over the lazy dog and runs away from it into the dark wood " * 4]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=40, help="Number of adapters. Default: %(default)s.")
    parser.add_argument("--rank", type=int, default=8, help="Rank of the adapters. Default: %(default)s.")
    parser.add_argument("--hidden-size", type=int, default=512, help="Width of the base. Default: %(default)s.")
    parser.add_argument("--layers", type=int, default=8, help="Layers of the base. Default: %(default)s.")
    args = parser.parse_args()
    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="raydpo-bench-") as home:
        base = Path(home) / "base"
        num_weights = make_base_model(base, TEXT, hidden_size=args.hidden_size, num_layers=args.layers, vocabulary=8192)
        folders = list(_make_adapters(base, args))
        expected = [_forward(folder) for folder in folders]
        print(f"{num_weights / 1e6:.1f}M weights, {len(folders)} adapters of rank {args.rank}", flush=True)
        _measure(_serve(base, args), folders, expected)


def _make_adapters(base: Path, args: argparse.Namespace) -> Iterator[Path]:
    """Yields the folders of random adapters. Each folder records the fingerprint of the base model's weights, as the
    folders of adapters that jobs trained do. Every other folder has the adapter's effect on rows of the largest size
    that is measured, which the engine repeats when it attaches the adapter."""
    policy = load_policy(base, adapter=Lora(r=args.rank))
    scorer, ids = Scorer(policy), range(5, 5 + SIDE_TOKENS)
    rows = [EncodedGroup(ids, (ids[::-1],), None, line) for line in range(NUM_ROWS)]
    told = base_file(fingerprint(policy), policy)
    for seed in range(args.adapters):
        torch.manual_seed(seed)
        for name, weight in policy.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.05)
        folder = base.with_name(f"adapter-{seed}")
        policy.save_pretrained(folder)
        (folder / BASE_FILE).write_bytes(told)
        if seed % 2:
            effect = measure_effect(scorer, rows, max_tokens_per_pack=4096)
            (folder / EFFECT).write_bytes(effect.to_json())
        yield folder


@torch.inference_mode()
def _forward(folder: Path) -> float:
    """Returns the log-probability of the likeliest token after the prompt PROMPT, computed by PEFT with the adapter in
    `folder`."""
    logits = AutoPeftModelForCausalLM.from_pretrained(folder)(input_ids=torch.tensor([PROMPT])).logits
    return float(logits[0, -1].log_softmax(-1).max())


def _serve(base: Path, args: argparse.Namespace) -> str:
    """Serves the base on one engine in Ray Serve, and returns the URL for completions."""
    from ray import serve

    from services.serving.app import build

    start_ray(object_store_memory=2**28)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "ERROR"})
    engine = EngineSettings(max_lora_rank=args.rank, max_loras=min(4, args.adapters), max_cpu_loras=args.adapters)
    deployment = Deployment(app_name=APP, model_id=APP, source=str(base), dtype="float32", engine=engine)
    serve.run(build(deployment.model_dump()), name=APP, route_prefix=f"/{APP}")
    return f"http://127.0.0.1:{port}/{APP}/v1/completions"


def _measure(url: str, folders: list[Path], expected: list[float]) -> None:
    ask(url, None)  # warms the engine up
    start = _memory()
    firsts, found = _ask_all(url, folders)
    held = _memory()
    again, found_again = _ask_all(url, folders)
    difference = max(abs(a - b) for a, b in zip(found + found_again, expected * 2, strict=True))
    closest = min(b - a for a, b in zip(sorted(expected), sorted(expected)[1:], strict=False))
    print("| | |\n|---|---|")
    print(f"| answers | {len(found)} of {len(folders)}, each twice |")
    print(f"| largest difference from PEFT's log-probabilities | {difference:.1e} |")
    print(f"| smallest difference between two adapters | {closest:.1e} |")
    print(f"| first answer of the first adapter, which reads the base for its fingerprint | {1e3 * firsts[0]:.0f} ms |")
    print(f"| first answer of another adapter, median and longest | {_times(firsts[2::2])} |")
    print(f"| the same, if the engine repeats the adapter's effect on rows | {_times(firsts[1::2])} |")
    print(f"| later answer, median and longest | {_times(again)} |")
    print(f"| memory before, MB | {start / 1e6:.0f} |")
    print(f"| memory for each adapter, MB | {(held - start) / len(folders) / 1e6:.2f} |")
    print(f"| file of an adapter, MB | {(folders[0] / 'adapter_model.safetensors').stat().st_size / 1e6:.2f} |")
    print(f"| load of the machine at the end, and its cores | {os.getloadavg()[0]:.1f}, {os.cpu_count()} |")


def _times(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.0f} ms, {1e3 * max(seconds):.0f} ms"


def _ask_all(url: str, folders: list[Path]) -> tuple[list[float], list[float]]:
    """Asks the engine once with each adapter. Returns the seconds that each answer took, and the log-probability of its
    token."""
    seconds, found = [], []
    for folder in folders:
        began = time.perf_counter()
        found.append(ask(url, folder))
        seconds.append(time.perf_counter() - began)
    return seconds, found


def ask(url: str, folder: Path | None) -> float:
    """Asks the engine for the token that follows the prompt PROMPT, and returns the log-probability of the likeliest
    token.

    The engine computes with the adapter in `folder`, or with the base model alone if `folder` is None.
    """
    name = f"ft:{folder.name}" if folder else APP
    headers = {ADAPTER_HEADER: quote(name), ADAPTER_SOURCE_HEADER: quote(folder.as_uri())} if folder else {}
    body = {"model": name, "prompt": PROMPT, "max_tokens": 1, "logprobs": 1, "temperature": 0}
    answer = httpx.post(url, json=body, headers=headers, timeout=120).raise_for_status()
    (found,) = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
    return float(found)


def _memory() -> int:
    """Returns the memory (PSS) in bytes of the replica and of the processes that the replica started."""
    replicas = [psutil.Process(pid) for pid in below("ServeReplica")]
    processes = {each.pid for replica in replicas for each in [replica, *replica.children(recursive=True)]}
    return sum(psutil.Process(pid).memory_full_info().pss for pid in processes)


if __name__ == "__main__":
    main()
