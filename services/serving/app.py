"""Defines the Ray Serve application of one model: the resources of a replica, and the requests that a replica answers.

Serve builds an application in a separate process before a replica starts. Importing vLLM takes ten seconds and 700 MB.
Therefore this module does not import vLLM; a replica does when it starts.
"""

import asyncio
import atexit
import importlib
import logging
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from safetensors import SafetensorError, safe_open

from dpo_core.models.adapter_folder import base_of, is_adapter
from services import storage
from services.contract import Adapter, CannotAttach, Deployment, Score, Spans
from services.deployment_settings import Replicas
from services.forkserver.client import preload

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = logging.getLogger("ray.serve")  # other loggers of a replica write nowhere

IMPORT_TRIES = 3
POLICY, REWARD_MODEL = "services.serving.policy", "services.serving.reward_model"
IMPORTS = (POLICY, "vllm.v1.engine.core", "vllm.entrypoints.openai.api_server", "vllm.v1.worker.cpu_worker")


def build(args: dict[str, Any]) -> Application:
    """Returns the Ray Serve application of a model.

    Serve calls this function by its import path. `args` are the fields of a `Deployment`, which says how a model is
    served.
    """
    deployment = Deployment.model_validate(args)
    replica, imports = (RewardModel, (REWARD_MODEL,)) if deployment.num_outputs else (Policy, IMPORTS)
    preload(ray.get_runtime_context().get_job_id(), imports, wait=True)  # the replica and its engine need them
    options = {
        "name": "policy",
        # The workers of an engine are actors that take the GPUs; a reward model's replica computes itself.
        "ray_actor_options": {"num_cpus": 1, "num_gpus": deployment.num_gpus if deployment.num_outputs else 0},
        "placement_group_bundles": _bundles(deployment.num_gpus),
        # All bundles are on one node: the replica fetches the weights, and the workers on the GPUs read them.
        "placement_group_strategy": "STRICT_PACK",
        "max_ongoing_requests": 256,  # the engine has its own queue
        "health_check_period_s": 3,  # after three failures a dead engine is replaced
        "max_constructor_retry_count": 1,  # a model that cannot be loaded is reported, not loaded again and again
        "graceful_shutdown_timeout_s": 600,  # a replica that is replaced ends its answers first
        **_scale(deployment.engine.replicas),
    }
    return serve.deployment(replica).options(**options).bind(deployment)


def _scale(replicas: Replicas) -> dict[str, Any]:
    if replicas.min == replicas.max:
        return {"num_replicas": replicas.min}
    limits = {"min_replicas": replicas.min, "max_replicas": replicas.max, "initial_replicas": replicas.min}
    return {"autoscaling_config": {**limits, "target_ongoing_requests": replicas.target_ongoing_requests}}


def _bundles(num_gpus: float) -> list[dict[str, float]]:
    """Returns the resources that a replica of a model reserves, as the bundles of a Ray placement group.

    The first bundle has the replica's CPU. If `num_gpus` is 1 or more, each worker of the engine has one GPU; if it is
    below 1, the only worker has this share of a GPU. Raises ValueError if `num_gpus` is above 1 and not a whole number.
    """
    if num_gpus == 0:
        return [{"CPU": 1}]
    if num_gpus > 1 and num_gpus % 1:
        raise ValueError(f"num_gpus is {num_gpus}; it must be a share below 1 or a whole number.")
    return [{"CPU": 1, "GPU": min(num_gpus, 1)}] + [{"GPU": 1}] * (int(num_gpus) - 1)


@serve.ingress()
class Policy:
    """A replica of a model that runs in vLLM.

    The replica answers the routes of OpenAI's API over HTTP. Training calls its methods `score` and `token_logps`
    through a Ray Serve deployment handle.
    """

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Starts the vLLM engine and returns the engine's HTTP server.

        The replica is ready when this method returns.
        """
        _import_policy()
        local, deployment = await asyncio.to_thread(_local, self._deployment)
        from services.serving import policy

        self._server = await policy.start(deployment, local)
        return await self._server.__serve_build_asgi_app__()

    async def check_health(self) -> None:
        await self._server.check_health()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Stops answering with the LoRA adapters that were deleted.

        Serve calls this method when the replica starts, and whenever the list of deleted adapters changes.
        `user_config["deleted_adapters"]` has the ids of this model's adapters that were deleted recently.
        """
        self._server.adapters.forget_deleted(user_config["deleted_adapters"])

    async def score(
        self,
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        others: Sequence[Spans] = (),
        adapter: Adapter | None = None,
    ) -> list[Score]:
        """Returns for each completion its log-probability given its prompt, summed over the completion's tokens, and
        the number of these tokens.

        Entry i of `prompt_ids`, `completion_ids` and `others` belongs to completion i. An entry of `others` holds
        ranges [start, stop) of the completion's tokens that are neither summed nor counted. If `adapter` is given, the
        model computes with this adapter.
        """
        async with self._attached(adapter) as request:
            return await self._server.reference.score(prompt_ids, completion_ids, others, request)

    async def token_logps(
        self,
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        others: Sequence[Spans] = (),
        adapter: Adapter | None = None,
    ) -> list[list[float]]:
        """Returns for each completion the log-probabilities of its tokens, in nats, given the completion's prompt.

        Entry i of `prompt_ids`, `completion_ids` and `others` belongs to completion i. An entry of `others` holds
        ranges [start, stop) of the completion's tokens that the result leaves out. If `adapter` is given, the model
        computes with this adapter.
        """
        async with self._attached(adapter) as request:
            return await self._server.reference.token_logps(prompt_ids, completion_ids, others, request)

    @asynccontextmanager
    async def _attached(self, adapter: Adapter | None) -> "AsyncIterator[LoRARequest | None]":
        """Attaches the LoRA adapter to the engine while a `with` block runs.

        The block gets the value that selects the adapter in a request to vLLM, or None if `adapter` is None. Raises
        CannotAttach if the engine can never attach the adapter, and ValueError if the engine cannot attach it now.
        """
        if adapter is None:
            yield None
            return
        from services.serving.adapters import AdapterRefused, AdapterUnusable

        try:
            async with self._server.adapters.using(adapter) as (_, request):
                yield request
        except AdapterRefused as refusal:  # replaced, because the driver would have to import vLLM to receive it
            kind = CannotAttach if isinstance(refusal, AdapterUnusable) else ValueError
            raise kind(str(refusal)) from None


@serve.ingress()
class RewardModel:
    """A replica of a reward model (a language model whose head returns numbers instead of text).

    It answers only the control plane's requests to score completions.
    """

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Loads the model and returns its HTTP server. The replica is ready when this method returns."""
        folder, deployment = await asyncio.to_thread(_local, self._deployment)
        reward_model = importlib.import_module(REWARD_MODEL)
        app: FastAPI = await asyncio.to_thread(reward_model.start, deployment, folder)
        return app

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Does nothing, because a reward model has no adapters. Serve requires the method."""


def _import_policy() -> None:
    """Imports the module that starts vLLM, and tries again if the import fails, at most IMPORT_TRIES times in all.

    On import, Ray registers its connectors for key-value caches in the whole cluster. If two replicas import the module
    at the same time, one import fails. At the next try, the connectors are registered already.
    """
    for tries_left in reversed(range(IMPORT_TRIES)):
        try:
            importlib.import_module(POLICY)
            return
        except ValueError as error:
            if not tries_left:
                raise
            logger.warning("The import of vLLM failed and is tried again: %s", error)


def _local(deployment: Deployment) -> tuple[str, Deployment]:
    """Makes the model's weights available on this node. Returns their local folder, and the deployment with which the
    model is to be started.

    If the weights are named by a hub id, this id is returned in place of the folder. If the weights are an adapter, the
    adapter is merged into its base model; the returned deployment has the merged model's folder as its source, and
    attaches no adapters. When vLLM has loaded the weights, the node may remove its copy of a remote source to make
    room. So code that reads the model later must fetch the deployment's source again.

    Raises FileNotFoundError or ValueError for missing or damaged files. Ray Serve's status shows these errors; it would
    not show why vLLM failed to load the files.
    """
    source = deployment.source
    folder = storage.fetch(source)
    if not folder.is_absolute():
        return source, deployment
    if is_adapter(folder):
        engine = deployment.engine.model_copy(update={"max_lora_rank": 0})
        merged = str(_merged(folder, deployment.dtype))
        return merged, deployment.model_copy(update={"engine": engine, "source": merged})
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"The model folder {source} lacks config.json or *.safetensors; give the folder of a Hugging Face model."
        )
    for file in files:
        try:
            with safe_open(file, framework="numpy"):
                continue
        except SafetensorError as error:
            raise ValueError(
                f"The file {file.name} of the model in {source} is damaged ({error}); store the model again."
            ) from error
    return str(folder), deployment


def _merged(adapter: Path, dtype: str) -> Path:
    """Merges the adapter into its base model, and returns the folder of the merged model.

    The folder is deleted when this process ends.
    """
    from dpo_core.models.model import merge_adapter

    base = storage.fetch(base_of(adapter))
    folder = Path(tempfile.mkdtemp(prefix="raydpo-merged-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    merge_adapter(adapter, folder, base=base, dtype=dtype)
    return folder
