"""Starts the vLLM engine of a served model on CPUs or GPUs. Only replicas of Ray Serve import this module."""

import os
from typing import Any

import ray
from fastapi import FastAPI
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer

from services.contract import Deployment
from services.forkserver.client import spawn_forks
from services.serving.executor import ExecutorOnCpus
from services.serving.reference import Reference

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models")

# Most tokens of one engine step. Scoring holds the logits of these tokens in float32, 2 GB with a vocabulary of 128k,
# which vLLM's memory profile does not count.
MAX_NUM_BATCHED_TOKENS = 2048


class PolicyServer(LLMServer):  # type: ignore[misc]
    """Ray's LLM server with one vLLM engine, which generates text and scores completions."""

    reference: Reference

    async def _start_engine(self) -> None:
        """Starts only the engine. The base class also starts an actor of 400 MB for Ray's usage statistics."""
        await self.engine.start()
        self.reference = Reference(self.engine._engine_client, max_tokens_in_flight=2 * MAX_NUM_BATCHED_TOKENS)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Returns vLLM's HTTP server with the paths in ROUTES only, without the paths that control the engine."""
        app: FastAPI = await super().__serve_build_asgi_app__()
        app.router.routes[:] = [route for route in app.routes if getattr(route, "path", None) in ROUTES]
        return app


class EngineOnCpus(VLLMEngine):  # type: ignore[misc]
    """A vLLM engine that runs in `ExecutorOnCpus`.

    LLMServer accepts an engine class, but Ray has no public name for the base of such classes.
    """

    def _start_async_llm_engine(self, vllm_engine_args: Any, vllm_engine_config: Any, placement_group: Any) -> Any:
        vllm_engine_config.parallel_config.distributed_executor_backend = ExecutorOnCpus
        return super()._start_async_llm_engine(vllm_engine_args, vllm_engine_config, placement_group)


async def start(deployment: Deployment, source: str) -> PolicyServer:
    """Starts the server of the deployment. `source` is a local folder or a hub id."""
    on_cpus = deployment.num_gpus == 0
    hardware, engine_kwargs = _cpus() if on_cpus else _gpus(deployment.num_gpus)
    config = LLMConfig(
        model_loading_config={"model_id": deployment.model_id, "model_source": source},
        engine_kwargs={
            "dtype": deployment.dtype,
            "max_model_len": deployment.max_model_len or -1,  # -1: the limit of the model or the cache
            "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
            "enable_prefix_caching": False,
            "load_format": "safetensors",
            **engine_kwargs,
        },
        **hardware,
    )
    config.get_or_create_callback().ctx.run_init_node = False  # no download: the files are on this node
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    spawn_forks()
    server: PolicyServer = PolicyServer.sync_init(config, engine_cls=EngineOnCpus if on_cpus else VLLMEngine)
    await server.start()
    return server


def _cpus() -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the settings of LLMConfig and of vLLM for CPUs.

    Sets the environment variables that the engine's process inherits.
    """
    node_id = ray.get_runtime_context().get_node_id()
    reserved = next(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["NodeID"] == node_id)
    # Ray gives an actor one thread for each CPU that it reserves, here one. Waiting threads must not spin while other
    # processes train.
    os.environ["OMP_NUM_THREADS"] = str(max(1, min(os.cpu_count() or 1, int(reserved))))
    os.environ["OMP_WAIT_POLICY"] = "passive"
    engine_kwargs = {"enforce_eager": True, "max_num_seqs": 64, "kv_cache_memory_bytes": 1 << 30}
    return {"accelerator_config": {"kind": "cpu"}}, engine_kwargs


def _gpus(num_gpus: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the settings of LLMConfig and of vLLM for GPUs: one worker per GPU, or one worker on a share of a GPU."""
    share = min(num_gpus, 1)
    engine_kwargs = {
        "tensor_parallel_size": max(1, int(num_gpus)),
        "gpu_memory_utilization": 0.85 * share,  # the rest is for the logits of scoring
    }
    return {"placement_group_config": {"bundle_per_worker": {"GPU": share}}}, engine_kwargs
