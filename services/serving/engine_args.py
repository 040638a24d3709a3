"""Translates a deployment (how a model is served) to arguments of vLLM's engine."""

from typing import Any

from services.contract import Deployment
from services.deployment_settings import EngineSettings

# Most tokens of one request in one step. Scoring holds the logits of these tokens in float32, 2 GB with a vocabulary of
# 128k, which vLLM's memory profile does not count.
MOST_SCORED_TOKENS = 2048
MEMORY_SHARE = 0.85  # of a GPU; the rest is for those logits


def engine_args(deployment: Deployment, *, on_cpus: bool) -> dict[str, Any]:
    """Returns the arguments for vLLM's engine and for its HTTP server, by name. `on_cpus` says whether the engine runs
    on CPUs and not on GPUs.

    An engine that answers users has vLLM's own batch sizes. An engine that only computes log-probabilities of given
    texts takes at most MOST_SCORED_TOKENS tokens in a step. Such an engine has no prefix cache, because vLLM does not
    use the cache when it computes log-probabilities of a prompt.
    """
    only_scores, engine = deployment.purpose == "scores", deployment.engine
    return {
        "dtype": deployment.dtype,
        "max_model_len": deployment.max_model_len or -1,  # -1: the limit of the model or the cache
        "enable_prefix_caching": engine.prefix_caching and not only_scores,
        "load_format": "safetensors",
        **({"max_num_batched_tokens": MOST_SCORED_TOKENS} if only_scores else {}),
        **({"quantization": engine.quantization} if engine.quantization else {}),
        **({"reasoning_parser": engine.reasoning_parser} if engine.reasoning_parser else {}),
        **(_tools(engine.tool_call_parser) if engine.tool_call_parser else {}),
        **(_lora(engine) if engine.max_lora_rank else {}),
        **(_cpus() if on_cpus else _gpus(deployment)),
    }


def _tools(parser: str) -> dict[str, Any]:
    return {"enable_auto_tool_choice": True, "tool_call_parser": parser}


def _lora(engine: EngineSettings) -> dict[str, Any]:
    names = ("max_lora_rank", "max_loras", "max_cpu_loras")
    return {"enable_lora": True, **{name: getattr(engine, name) for name in names}}


def _cpus() -> dict[str, Any]:
    return {"enforce_eager": True, "max_num_seqs": 64, "kv_cache_memory_bytes": 1 << 30}


def _gpus(deployment: Deployment) -> dict[str, Any]:
    """Returns those arguments of the vLLM engine that say how it uses the GPUs of `deployment`: with one worker for
    each GPU, or with one worker on a share of a GPU."""
    memory = deployment.engine.gpu_memory_utilization or MEMORY_SHARE
    return {
        "tensor_parallel_size": max(1, int(deployment.num_gpus)),
        "gpu_memory_utilization": memory * min(deployment.num_gpus, 1),
    }
