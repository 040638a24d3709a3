"""Scores rows with raydpo's deployment or with vLLM. Each function uses one engine and returns the figures for one
column in the table of `scoring.py`.

All engines compute in the same dtype and have 1 GiB for keys and values.
"""

import json
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.cluster import start_ray
from benchmarks.memory import below, family_peak
from services.contract import Deployment, Report
from services.training.data.dataset import Dataset, read_groups

APP = "reference"
OURS = "raydpo, Ray Serve"
REPLICA = "ServeReplica"  # in the title of the replica's process, which is the parent of the engine's processes
Figures = dict[str, float]

# BEST_ENGINE has the settings of the replica's engine (services/serving/policy.py). BEST_ANSWERS makes vLLM return
# log-probabilities without texts and dictionaries.
BEST_ENGINE = {
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 64,
}
BEST_ANSWERS = {"flat_logprobs": True, "detokenize": False}

COLUMNS: dict[str, Callable[[Namespace], Figures]] = {
    "vLLM as it comes": lambda args: run_offline(args, {}, {}),
    "vLLM at its best": lambda args: run_offline(args, BEST_ENGINE, BEST_ANSWERS),
    OURS: lambda args: run_served(args),
}


def run_served(args: Namespace) -> Figures:
    """Scores the rows as a job does, with concurrent calls of a Serve application's handle. Returns the speed and
    memory."""
    import ray
    from ray import serve

    from services.serving.app import build
    from services.training.reference.served_scores import await_reference, by_deployment, score

    def report(report: Report) -> None:
        pass

    start_ray(object_store_memory=2**28)
    try:
        serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
        deployment = Deployment(app_name=APP, model_id=APP, source=str(args.model), dtype=args.dtype)
        serve.run(build(deployment.model_dump()), name=APP, route_prefix=None)
        by_reference = by_deployment(partial(await_reference, APP, report))
        with tempfile.TemporaryDirectory() as folder:
            score(_read(args, "warm"), f"{folder}/warm", by_reference, report)
            loaded = sum(map(family_peak, below(REPLICA)))
            started = time.perf_counter()
            scored = score(_read(args, "rows"), f"{folder}/rows", by_reference, report)
            seconds = time.perf_counter() - started
            peak = sum(map(family_peak, below(REPLICA)))
            _keep_sums(args, [logp for group in read_groups(scored) for logp in group.ref_logps or ()])
        return {"seconds": seconds, "loaded_bytes": loaded, "peak_bytes": peak}
    finally:
        serve.shutdown()
        ray.shutdown()


def run_offline(args: Namespace, engine: dict[str, Any], answers: dict[str, Any]) -> Figures:
    """Scores the rows with one call of vLLM's `LLM.generate`, and returns the speed and memory. `engine` holds options
    of `LLM`, `answers` options of its `SamplingParams`.

    The time excludes reading the rows and adding up the log-probabilities of tokens.
    """
    from vllm import LLM, SamplingParams

    def rows(name: str) -> list[tuple[list[int], list[int]]]:
        return [
            (list(group.prompt_ids), list(ids))
            for group in read_groups(_read(args, name))
            for ids in group.completion_ids
        ]

    def generate(rows: list[tuple[list[int], list[int]]]) -> list[Any]:
        prompts = [{"prompt_token_ids": prompt + completion} for prompt, completion in rows]
        return llm.generate(prompts, params, use_tqdm=False)

    llm = LLM(str(args.model), dtype=args.dtype, kv_cache_memory_bytes=1 << 30, **engine)
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, **answers)
    generate(rows("warm"))
    loaded = family_peak()
    scored_rows = rows("rows")
    started = time.perf_counter()
    outputs = generate(scored_rows)
    seconds = time.perf_counter() - started
    used = family_peak()
    _keep_sums(args, [_sum(answer, len(row[1])) for answer, row in zip(outputs, scored_rows, strict=True)])
    return {"seconds": seconds, "loaded_bytes": loaded, "peak_bytes": used}


def _sum(answer: Any, num_tokens: int) -> float:
    """Returns the log-probability of a completion from `answer`, vLLM's output for one request. The completion is the
    last `num_tokens` tokens of the request's prompt."""
    ids, logprobs = answer.prompt_token_ids, answer.prompt_logprobs
    return sum(logprobs[place][ids[place]].logprob for place in range(len(ids) - num_tokens, len(ids)))


def _read(args: Namespace, name: str) -> Dataset:
    return Dataset.model_validate_json((args.folder / f"{name}.json").read_bytes())


def _keep_sums(args: Namespace, sums: list[float]) -> None:
    (args.folder / f"{args.column}.sums.json").write_text(json.dumps(sums))
