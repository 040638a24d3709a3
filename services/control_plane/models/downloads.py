"""Makes the weights of trained models downloadable as tars of Hugging Face folders.

An adapter is downloaded as it is, or merged into its base model.
"""

import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

from dpo_core.models.adapter_folder import CONFIG, EFFECT
from services import storage
from services.contract import MergeReport, MergeRequest
from services.control_plane import side_jobs
from services.control_plane.core.errors import InvalidRequest, Unavailable
from services.control_plane.core.store import ProjectStore
from services.control_plane.http.content import Content
from services.control_plane.models.folder_tar import FolderTar, Member
from services.control_plane.models.models import NamedModel
from services.control_plane.ray_api import RayApi
from services.control_plane.settings import Settings
from services.control_plane.side_jobs import SideJob

Format = Literal["adapter", "merged"]

ABOUT = "raydpo.json"  # the file in each tar that says what the tar holds
RETRY_AFTER_SECONDS = 5


def format_of(model: NamedModel, wanted: Format | None) -> Format:
    """Returns the format of a download, `adapter` or `merged`: the `wanted` one, or else the format in which the model
    is stored.

    Raises InvalidRequest if the user wants the adapter of a model that has none.
    """
    if wanted == "adapter" and model.adapter is None:
        message = (
            f"The model '{model.id}' has no adapter, because its job trained all weights; "
            "leave format out, or send 'merged'."
        )
        raise InvalidRequest(message, param="format", code="invalid_value")
    return wanted or ("adapter" if model.adapter else "merged")


def content_of(model: NamedModel, base: str | None, merged: MergeReport | None) -> Content:
    """Returns the tar for a download of the model.

    If `merged` is given, it reports a merge of the adapter into its base, and the tar holds the merged folder. If
    `merged` is None, the tar holds the model's own folder. `base` is the name of an adapter's base model, which the tar
    states. The names and sizes of the files are read from storage now, the bytes later. Raises Unavailable if the
    folder is gone.
    """
    folder = merged.model_uri if merged else model.source
    files = storage.list_tree(folder)
    if not files:
        raise Unavailable(
            f"The files of the model '{model.id}' are not in storage any more; "
            "the operator can restore them from a backup.",
            retry_after=60,
            code="model_unavailable",
        )
    members = [
        Member(name, size, storage.join(folder, *name.split("/")), mtime)
        for name, size, mtime in files
        if name != EFFECT  # it holds training rows
    ]
    if model.adapter and not merged:
        members = [_with_base(member, base) if member.name == CONFIG else member for member in members]
    tar = FolderTar([*members, Member.of_bytes(ABOUT, _about(model, base, merged))])
    name = f"{model.id}{'-merged' if merged else ''}.tar"
    return Content(tar.num_bytes, tar.etag, name, "application/x-tar", tar.read)


def _with_base(config: Member, base: str | None) -> Member:
    """Returns `config`, an adapter's file adapter_config.json, with a name of the base model that is useful outside the
    service.

    If the base model is a folder in storage, the name is `base`, its name in the service. A base model on the hub keeps
    its hub id.
    """
    fields = json.loads(storage.read_bytes(str(config.source)))
    place = str(fields.get("base_model_name_or_path"))
    if "://" in place or place.startswith("/"):
        fields["base_model_name_or_path"] = base
    return Member.of_bytes(config.name, json.dumps(fields, indent=2).encode())


def _about(model: NamedModel, base: str | None, merged: MergeReport | None) -> bytes:
    about: dict[str, Any] = {
        "model": model.id,
        "format": "adapter" if model.adapter and not merged else "merged",
        "kind": "reward" if model.num_outputs else "policy",
        "root": model.root,
        "base": base,
        "adapter": model.adapter and asdict(model.adapter),
        "quantization": model.quantization,
        "merge": merged and {"dtype": "float32", **merged.model_dump(exclude={"model_uri"})},
    }
    return json.dumps(about, indent=2).encode()


# --- merging ----------------------------------------------------------------------------------


def merged_folder(model: NamedModel, settings: Settings) -> str:
    """Returns the storage URI of the folder that holds a merged copy of the model (its adapter merged into its
    base)."""
    key = hashlib.sha256(f"{model.id}\n{model.source}".encode()).hexdigest()[:32]
    return storage.join(settings.storage_url, "merged", key)


async def merged(
    model: NamedModel,
    store: ProjectStore,
    ray_api: RayApi,
    settings: Settings,
    is_disconnected: Callable[[], Awaitable[bool]],
) -> MergeReport:
    """Merges the model's adapter into its base model with a side job (a short Ray job), unless it is merged already.

    Returns the report of the merge. Raises Unavailable while the merge runs, and InvalidRequest if adapter and base
    cannot be merged. Stops waiting when `is_disconnected` says that the client has disconnected.
    """
    job = _merge_of(model, settings, await store.store.instance())
    result = await side_jobs.result_of(job, store, ray_api, settings.max_running_checks, is_disconnected)
    if result is None:
        seconds = await side_jobs.seconds_running(job, store)
        message = f"The adapter of '{model.id}' is being merged into its base model, for {seconds:.0f} seconds so far"
        message = f"{message}; send the request again in {RETRY_AFTER_SECONDS} seconds."
        raise Unavailable(message, retry_after=RETRY_AFTER_SECONDS, code="model_merging")
    if result.error and result.error.code == "merge_lost":
        raise Unavailable(result.error.message, retry_after=RETRY_AFTER_SECONDS, code=result.error.code)
    if result.error:
        raise InvalidRequest(result.error.message, param="format", code=result.error.code)
    return MergeReport.model_validate(result.report)


def _merge_of(model: NamedModel, settings: Settings, instance: str) -> SideJob:
    place = merged_folder(model, settings)
    key = hashlib.sha256(f"{instance}\n{place}".encode()).hexdigest()[:32]  # several services may share the cluster
    return SideJob("merge", key, place, "services.training.merge_program", partial(_request, model.source))


def _request(adapter_uri: str, folder_uri: str) -> MergeRequest:
    return MergeRequest(adapter_uri=adapter_uri, folder_uri=folder_uri)
