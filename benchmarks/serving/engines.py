"""Scores rows with raydpo's deployment, with raydpo's trainer or with vLLM. Each function uses one engine and returns
the figures for one line in the table of `scoring.py`.

All engines compute in the same dtype. Those of vLLM have 1 GiB for keys and values.
"""

import json
import os
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.cluster import start_ray
from benchmarks.memory import below, family_peak
from benchmarks.processes import family_cpu_seconds
from dpo_core.encoding.encode import EncodedGroup
from services.contract import Deployment, Report
from services.training.data.dataset import Dataset, read_groups
from services.training.reference.trainer_scores import LEAST_TOKENS_PER_PACK

if TYPE_CHECKING:
    from transformers import PreTrainedModel

APP = "reference"
OURS = "raydpo, Ray Serve"
REPLICA = "ServeReplica"  # in the title of the replica's process, which is the parent of the engine's processes
Figures = dict[str, float]
Row = tuple[list[int], list[int]]  # a prompt and one completion

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
    "raydpo, trainer": lambda args: run_trainer(args, _score_groups),
    "trainer, no sharing": lambda args: run_trainer(args, _score_rows),
    "and head on prompts": lambda args: run_trainer(args, _score_all_tokens),
}


@contextmanager
def _measured() -> Iterator[Figures]:
    """Yields figures, and adds the seconds and the CPU seconds of the `with` block to them when it ends."""
    figures: Figures = {}
    started, used = time.perf_counter(), family_cpu_seconds()
    yield figures
    figures |= {"seconds": time.perf_counter() - started, "cpu_seconds": family_cpu_seconds() - used}


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
        by_reference = by_deployment(partial(await_reference, APP, report), report)
        with tempfile.TemporaryDirectory() as folder:
            score(_read(args, "warm"), f"{folder}/warm", by_reference, report)
            loaded = sum(map(family_peak, below(REPLICA)))
            with _measured() as figures:
                scored = score(_read(args, "rows"), f"{folder}/rows", by_reference, report)
            peak = sum(map(family_peak, below(REPLICA)))
            _keep_sums(args, [logp for group in read_groups(scored) for logp in group.ref_logps or ()])
        return figures | {"loaded_bytes": loaded, "peak_bytes": peak}
    finally:
        serve.shutdown()
        ray.shutdown()


def run_offline(args: Namespace, engine: dict[str, Any], answers: dict[str, Any]) -> Figures:
    """Scores the rows with one call of vLLM's `LLM.generate`, and returns the speed and memory. `engine` holds options
    of `LLM`, `answers` options of its `SamplingParams`.

    The time excludes reading the rows and adding up the log-probabilities of tokens.
    """
    from vllm import LLM, SamplingParams

    def rows(name: str) -> list[Row]:
        return _rows(read_groups(_read(args, name)))

    def generate(rows: list[Row]) -> list[Any]:
        prompts = [{"prompt_token_ids": prompt + completion} for prompt, completion in rows]
        return llm.generate(prompts, params, use_tqdm=False)

    llm = LLM(str(args.model), dtype=args.dtype, kv_cache_memory_bytes=1 << 30, **engine)
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, **answers)
    generate(rows("warm"))
    loaded = family_peak()
    scored_rows = rows("rows")
    with _measured() as figures:
        outputs = generate(scored_rows)
    used = family_peak()
    _keep_sums(args, [_sum(answer, len(row[1])) for answer, row in zip(outputs, scored_rows, strict=True)])
    return figures | {"loaded_bytes": loaded, "peak_bytes": used}


def run_trainer(args: Namespace, score: "Callable[[PreTrainedModel, list[EncodedGroup]], list[float]]") -> Figures:
    """Scores the rows with the trainer's own forward pass on all cores, and returns the speed and memory. `score` is a
    function that takes the model and groups (a prompt and its completions), and returns the log-probabilities of all
    completions."""
    import torch

    from dpo_core import load_policy

    torch.set_num_threads(os.cpu_count() or 1)
    reference = load_policy(args.model, dtype=getattr(torch, args.dtype))
    score(reference, list(read_groups(_read(args, "warm"))))
    loaded = family_peak()
    groups = list(read_groups(_read(args, "rows")))
    with _measured() as figures:
        sums = score(reference, groups)
    _keep_sums(args, sums)
    return figures | {"loaded_bytes": loaded, "peak_bytes": family_peak()}


def _score_groups(reference: "PreTrainedModel", groups: list[EncodedGroup]) -> list[float]:
    """Scores groups (a prompt and its completions) as a job does: completions share their prompt."""
    from dpo_core import score_reference

    scored = score_reference(reference, groups, max_tokens_per_pack=LEAST_TOKENS_PER_PACK)
    return [logp for group in scored for logp in group.ref_logps or ()]


def _score_rows(reference: "PreTrainedModel", groups: list[EncodedGroup]) -> list[float]:
    """Scores each completion of the groups with its own copy of the prompt."""
    alone = [EncodedGroup(prompt, (ids,), None, line) for line, (prompt, ids) in enumerate(_rows(groups), 1)]
    return _score_groups(reference, alone)


def _score_all_tokens(reference: "PreTrainedModel", groups: list[EncodedGroup]) -> list[float]:
    """Scores each completion of the groups with its own copy of the prompt, and computes log-probabilities of the
    prompt's tokens too, as vLLM does."""
    from dpo_core.policy.scorer import reference_token_logps

    rows = _rows(groups)
    whole = [EncodedGroup(prompt[:1], (prompt[1:] + ids,), None, line) for line, (prompt, ids) in enumerate(rows, 1)]
    logps = reference_token_logps(reference, whole, max_tokens_per_pack=LEAST_TOKENS_PER_PACK)
    return [sum(found[-len(ids) :]) for (found,), (_, ids) in zip(logps, rows, strict=True)]


def _rows(groups: Iterable[EncodedGroup]) -> list[Row]:
    return [(list(group.prompt_ids), list(ids)) for group in groups for ids in group.completion_ids]


def _sum(answer: Any, num_tokens: int) -> float:
    """Returns the log-probability of a completion from `answer`, vLLM's output for one request. The completion is the
    last `num_tokens` tokens of the request's prompt."""
    ids, logprobs = answer.prompt_token_ids, answer.prompt_logprobs
    return sum(logprobs[place][ids[place]].logprob for place in range(len(ids) - num_tokens, len(ids)))


def _read(args: Namespace, name: str) -> Dataset:
    return Dataset.model_validate_json((args.folder / f"{name}.json").read_bytes())


def _keep_sums(args: Namespace, sums: list[float]) -> None:
    (args.folder / f"{args.column}.sums.json").write_text(json.dumps(sums))
