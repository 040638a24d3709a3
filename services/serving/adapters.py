"""Attaches LoRA adapters to the running vLLM engine of their base model, and detaches them again.

The first request for an adapter attaches the adapter. Other requests for the same adapter wait for that one attachment.
vLLM's own detaching removes only an adapter's name; `Adapters` also removes the weights from the engine, and the local
copy of the files. Each attachment has a new integer id in vLLM, and each adapter has a public id that no other adapter
ever gets. Therefore no cache can mix up two adapters.
"""

import asyncio
import atexit
import json
import logging
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import vllm
from packaging.version import Version
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM

from dpo_core.models.adapter import has_learned, saved_base
from dpo_core.models.adapter_folder import CONFIG, WEIGHTS, is_adapter
from dpo_core.models.architecture import UnusableModel
from dpo_core.models.model import fingerprint_of
from dpo_core.policy.adapter_effect import Effect, read_effect
from services import storage
from services.contract import Adapter
from services.serving.reference import Reference

logger = logging.getLogger("ray.serve")  # other loggers of a replica write nowhere

LEAST_VLLM = "0.29"  # older ones answered requests in flight with another adapter (vllm#47724)
ABORT_SECONDS = 0.02  # how often the requests of a deleted adapter are aborted until all of them have ended
REMEDY = "set the mode of its deployment to 'merged'"
UNUSED = ("modules_to_save", "use_dora", "target_parameters", "rank_pattern", "alpha_pattern")  # vLLM ignores these


def check_version(installed: str = vllm.__version__) -> None:
    """Raises RuntimeError if the release `installed` of vLLM is older than LEAST_VLLM.

    Such a release may answer a request for one adapter with another adapter.
    """
    if Version(installed) < Version(LEAST_VLLM):
        raise RuntimeError(
            f"vLLM {installed} may answer requests for one adapter with another; "
            f"install vLLM {LEAST_VLLM} or newer, or set max_lora_rank to 0."
        )


class AdapterRefused(Exception):
    """Raised if the vLLM engine cannot answer with a LoRA adapter. `status` and `code` are the HTTP status and the
    error code of the response to the client."""

    status, code = 503, "model_unavailable"


class AdapterDeleted(AdapterRefused):
    """Raised for a request to an adapter that was deleted."""

    status, code = 404, "model_not_found"

    def __init__(self, adapter_id: str) -> None:
        super().__init__(f"The model '{adapter_id}' was deleted.")


class AdapterUnusable(AdapterRefused):
    """Raised for a LoRA adapter that this vLLM engine cannot attach (load beside its model), now or later."""

    status, code = 409, "adapter_unusable"


class Base:
    """Checks whether LoRA adapters were trained on the weights of the model that a vLLM engine has loaded."""

    def __init__(self, source: str) -> None:
        """Takes `source`, which says where the engine's model is: a URI, a local folder or a hub id."""
        self._source = source
        self._fingerprint: str | None = None  # computed for the first adapter that tells its base's
        self._computing = threading.Lock()

    def check(self, adapter: Adapter, folder: Path) -> None:
        """Compares the base model on which the adapter in `folder` was trained with the engine's model. Raises
        AdapterUnusable if their weights differ. Raises AdapterRefused if the engine's model must be fetched for this
        comparison and cannot be fetched now.

        An adapter that this service trained records a fingerprint of its base model's weights. An adapter without a
        fingerprint is accepted. The first comparison reads all weights of the engine's model, and fetches them again if
        the node's copy is gone.
        """
        saved = saved_base(folder)
        if saved and saved != self._computed(adapter):
            what = f"it was trained on a base whose weights differ from those of {self._source}"
            remedy = "restore the base's earlier weights, or train a new adapter"
            raise AdapterUnusable(f"The engine cannot attach the adapter '{adapter.id}': {what}; {remedy}.")

    def _computed(self, adapter: Adapter) -> str:
        with self._computing:
            try:
                self._fingerprint = self._fingerprint or fingerprint_of(storage.fetch(self._source))
            except (OSError, ValueError) as error:
                what = f"its base {self._source} cannot be read to check that the adapter was trained on it"
                passes = storage.is_away(error) or storage.is_full(error)
                refused = AdapterRefused if passes else AdapterUnusable
                raise refused(f"The engine cannot attach the adapter '{adapter.id}': {what} ({error}).") from error
            return self._fingerprint


@dataclass(eq=False)
class Attachment:
    """A LoRA adapter that the vLLM engine has attached (loaded beside its model) or is loading, and the number of
    requests that use it.
    """

    folder: Path  # of the local copy, if the source is remote
    loading: "asyncio.Task[LoRARequest]"
    num_uses: int = 0
    is_deleted: bool = False  # requests in flight must get no more of its answer


class Adapters:
    """Attaches adapters to one vLLM engine, and detaches them.

    At most `max_cpu_loras` adapters (a setting of the engine) stay attached. If there are more, the least recently used
    ones are detached as soon as no request uses them.
    """

    def __init__(self, engine: AsyncLLM, models: OpenAIServingModels, reference: Reference, source: str) -> None:
        """Takes a vLLM engine, and three things that belong to it:

        - `models` is the list of models that the engine's HTTP server keeps.
        - `reference` scores texts with the engine.
        - `source` is the URI, local folder or hub id of the engine's model.
        """
        self._engine, self._models, self._reference = engine, models, reference
        self._base = Base(source)
        config = engine.vllm_config.lora_config
        self._most: int = config.max_cpu_loras if config else 0  # 0: the engine attaches none
        self._attached: dict[str, Attachment] = {}  # least recently used first
        self._deleted: frozenset[str] = frozenset()
        self._detaching: set[asyncio.Task[None]] = set()
        self._folder = Path(tempfile.mkdtemp(prefix="raydpo-adapters-"))
        atexit.register(shutil.rmtree, self._folder, ignore_errors=True)

    @asynccontextmanager
    async def using(self, adapter: Adapter) -> AsyncIterator[tuple[Attachment, LoRARequest]]:
        """Attaches a LoRA adapter to the vLLM engine unless it is attached already, and keeps it attached until the end
        of the `with` block.

        The block gets the attachment, and the value that selects the adapter in a request to vLLM. Raises
        AdapterRefused if the engine cannot answer with the adapter.
        """
        if adapter.id in self._deleted:
            raise AdapterDeleted(adapter.id)
        if not self._most:
            raise AdapterUnusable(
                f"The engine cannot attach the adapter '{adapter.id}', because max_lora_rank is 0 or the model "
                f"takes no adapters; {REMEDY}."
            )
        attachment = self._attached.pop(adapter.id, None) or self._begin(adapter)
        self._attached[adapter.id] = attachment  # now the most recently used one
        attachment.num_uses += 1
        try:
            request = await asyncio.shield(attachment.loading)  # a client that leaves does not stop the loading
            if attachment.is_deleted:
                raise AdapterDeleted(adapter.id)
            yield attachment, request
        finally:
            attachment.num_uses -= 1
            self._shrink()

    def forget_deleted(self, deleted: Collection[str]) -> None:
        """Stops answering with the LoRA adapters whose ids are in `deleted`. The caller always passes the ids of all
        adapters that were deleted recently.

        Detaches those that are attached, aborts the requests that use them, and refuses later requests for them.
        """
        self._deleted = frozenset(deleted)
        for adapter_id in self._deleted & self._attached.keys():
            self._attached[adapter_id].is_deleted = True
            self._detach(adapter_id)

    def _begin(self, adapter: Adapter) -> Attachment:
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        attachment = Attachment(folder, asyncio.create_task(self._load(adapter, folder)))
        attachment.loading.add_done_callback(lambda loading: self._note(adapter.id, attachment, loading))
        return attachment

    def _note(self, adapter_id: str, attachment: Attachment, loading: "asyncio.Task[LoRARequest]") -> None:
        """Cleans up after the task `loading`, which loads the adapter with the id `adapter_id` for `attachment`. Called
        when the task has ended, with or without success.

        If the loading failed, forgets the adapter, so that the next request for it loads it again. In either case, if
        more adapters are attached than the engine may hold, detaches the least recently used ones that no request uses.
        """
        if (loading.cancelled() or loading.exception()) and self._attached.get(adapter_id) is attachment:
            self._detach(adapter_id)
        self._shrink()

    async def _load(self, adapter: Adapter, folder: Path) -> LoRARequest:
        local = await asyncio.to_thread(_fetch, adapter, folder)
        await asyncio.to_thread(self._base.check, adapter, local)
        effect = await asyncio.to_thread(_effect, adapter, local)
        request = LoadLoRAAdapterRequest(lora_name=adapter.id, lora_path=str(local))
        answer = await self._models.load_lora_adapter(request)
        if isinstance(answer, ErrorResponse):
            refused = AdapterRefused if self._engine.errored else AdapterUnusable
            raise refused(f"The engine cannot attach the adapter '{adapter.id}' ({answer.error.message}); {REMEDY}.")
        attached = self._models.lora_requests[adapter.id]
        try:
            await self._check_effect(adapter, effect, attached)
        except BaseException:
            if not self._engine.errored:
                await self._engine.remove_lora(attached.lora_int_id)
            raise
        return attached

    async def _check_effect(self, adapter: Adapter, effect: Effect | None, attached: LoRARequest) -> None:
        """Compares how the attached adapter changes the log-probabilities of some of its training rows with how it
        changed them in training. Raises AdapterUnusable if the two differ, and AdapterRefused if the engine has died.

        The check is needed because vLLM may ignore an adapter, or a part of it, without an error. An adapter is not
        checked if nothing was measured in training (`effect` is None), or if all measured rows are longer than the
        engine's max_model_len.
        """
        most = self._engine.model_config.max_model_len
        rows = [row for row in effect.rows if len(row.prompt_ids) + len(row.completion_ids) <= most] if effect else []
        if not rows:
            logger.info(
                "The effect of the adapter '%s' is not checked: no measured row fits max_model_len.", adapter.id
            )
            return
        effect = Effect(rows)
        ids = [row.prompt_ids for row in effect.rows], [row.completion_ids for row in effect.rows]
        try:
            policy = await self._reference.score(*ids, adapter=attached)
            base = await self._reference.score(*ids)
        except ConnectionError as error:
            raise AdapterRefused(str(error)) from None
        if fault := effect.fault([score.logp for score in policy], [score.logp for score in base]):
            raise AdapterUnusable(f"The engine does not compute with the adapter '{adapter.id}': {fault}; {REMEDY}.")

    def _shrink(self) -> None:
        # An adapter that is loading stays until it is loaded, because vLLM would enter its name after the removal.
        idle = [name for name, each in self._attached.items() if not each.num_uses and each.loading.done()]
        for name in idle[: max(0, len(self._attached) - self._most)]:
            self._detach(name)

    def _detach(self, adapter_id: str) -> None:
        """Takes the adapter with the id `adapter_id` out of the list of attached adapters now, and out of the vLLM
        engine when all requests that use the adapter have ended."""
        attachment = self._attached.pop(adapter_id)
        self._models.lora_requests.pop(adapter_id, None)  # now, because the next request may attach it again
        self._models.lora_resolver_lock.pop(adapter_id, None)
        task = asyncio.create_task(self._remove(adapter_id, attachment))
        self._detaching.add(task)
        task.add_done_callback(self._detaching.discard)

    async def _remove(self, adapter_id: str, attachment: Attachment) -> None:
        try:
            await asyncio.wait({attachment.loading})
            while attachment.num_uses:
                await self._abort(adapter_id)
                await asyncio.sleep(ABORT_SECONDS)
            if attachment.is_deleted:
                self._models.lora_requests.pop(adapter_id, None)  # it was loading when it was deleted
            if attachment.loading.exception() is None:
                await self._engine.remove_lora(attachment.loading.result().lora_int_id)
        finally:
            shutil.rmtree(attachment.folder, ignore_errors=True)

    async def _abort(self, adapter_id: str) -> None:
        states = self._engine.output_processor.request_states
        names = [name for name, state in states.items() if state.lora_name == adapter_id]
        await self._engine.abort(names, internal=True)


def _fetch(adapter: Adapter, cache: Path) -> Path:
    """Returns the local folder of the adapter, and downloads the adapter to `cache` if its source is remote.

    Raises AdapterUnusable if vLLM would ignore the adapter or a part of it, and AdapterRefused if its files cannot be
    read.
    """
    try:
        folder = storage.fetch(adapter.source, cache=cache)
    except OSError as error:
        raise AdapterRefused(f"The files of the adapter '{adapter.id}' cannot be read: {error}") from error
    if not is_adapter(folder):
        raise AdapterRefused(
            f"The files of the adapter '{adapter.id}' are missing: the folder {adapter.source} has no {CONFIG}; "
            "restore the folder from a backup."
        )
    config = json.loads((folder / CONFIG).read_text())
    if unused := [name for name in UNUSED if config.get(name)]:
        raise AdapterUnusable(
            f"The engine cannot attach the adapter '{adapter.id}', because its config sets {', '.join(unused)}, "
            f"which vLLM does not support; {REMEDY}."
        )
    _check_numbers(adapter, folder)
    return folder


def _effect(adapter: Adapter, folder: Path) -> Effect | None:
    """Returns the effect of the adapter in `folder`, as training measured it: by how much the adapter changes the
    log-probabilities of some training rows. Returns None if training measured no effect. Raises AdapterUnusable if the
    file of the measurement is damaged."""
    try:
        return read_effect(folder)
    except ValueError as error:
        remedy = "restore that file from a backup, or delete it to serve the adapter without the comparison"
        raise AdapterUnusable(
            f"The engine cannot compare the adapter '{adapter.id}' with what training measured: {error}; {remedy}."
        ) from None


def _check_numbers(adapter: Adapter, folder: Path) -> None:
    """Raises AdapterUnusable if a weight of the adapter is not a finite number.

    Logs a warning if the adapter has no effect on its base model, judging by its weights.
    """
    if not (folder / WEIGHTS).is_file():
        return  # vLLM reads or refuses other files
    try:
        if not has_learned(folder):
            logger.warning("The adapter '%s' has learned nothing: it answers as its base model does.", adapter.id)
    except UnusableModel as error:
        raise AdapterUnusable(f"The engine cannot attach the adapter '{adapter.id}': {error}") from None
