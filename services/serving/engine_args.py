"""Turns a deployment into the arguments of its vLLM engine."""

from typing import Any

from services.contract import Deployment

# Most tokens of one step of an engine that scores. Scoring holds the logits of these tokens in float32, 2 GB with a
# vocabulary of 128k, which vLLM's memory profile does not count.
MAX_NUM_BATCHED_TOKENS = 2048
MEMORY_SHARE = {"answers": 0.9, "scores": 0.85, "both": 0.85}  # of a GPU; the rest of a scorer's is for those logits


def engine_args(deployment: Deployment, *, on_cpus: bool) -> dict[str, Any]:
    """Returns the arguments for vLLM's engine and for its HTTP server.

    An engine that only answers has vLLM's own batch sizes. One that only scores keeps no prefixes, because vLLM
    computes the log-probabilities of prompts without them.
    """
    scores, engine = deployment.purpose != "answers", deployment.engine
    return {
        "dtype": deployment.dtype,
        "max_model_len": deployment.max_model_len or -1,  # -1: the limit of the model or the cache
        "enable_prefix_caching": engine.prefix_caching and deployment.purpose != "scores",
        "load_format": "safetensors",
        **({"max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS} if scores else {}),
        **({"quantization": engine.quantization} if engine.quantization else {}),
        **({"reasoning_parser": engine.reasoning_parser} if engine.reasoning_parser else {}),
        **(_tools(engine.tool_call_parser) if engine.tool_call_parser else {}),
        **(_cpus() if on_cpus else _gpus(deployment)),
    }


def _tools(parser: str) -> dict[str, Any]:
    return {"enable_auto_tool_choice": True, "tool_call_parser": parser}


def _cpus() -> dict[str, Any]:
    return {"enforce_eager": True, "max_num_seqs": 64, "kv_cache_memory_bytes": 1 << 30}


def _gpus(deployment: Deployment) -> dict[str, Any]:
    """One worker for each GPU, or one worker on a share of a GPU."""
    memory = deployment.engine.gpu_memory_utilization or MEMORY_SHARE[deployment.purpose]
    return {
        "tensor_parallel_size": max(1, int(deployment.num_gpus)),
        "gpu_memory_utilization": memory * min(deployment.num_gpus, 1),
    }
