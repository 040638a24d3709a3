"""Remembers for a second what the database says about models, so that most completions need not read it."""

from dataclasses import dataclass
from typing import Annotated, cast

from cachetools import TTLCache
from fastapi import Depends, Request

from services.control_plane.models.deployments.engines import Engine
from services.control_plane.models.models import NamedModel

SECONDS = 1.0  # for how long another control plane's change or deletion of a model may go unnoticed
MOST = 10_000


@dataclass(frozen=True)
class Found:
    """A model that a request names, as the database describes it, with the engine (model server) that answers for the
    model and the number of GPUs of this engine.
    """

    model: NamedModel
    engine: Engine
    num_gpus: float  # of the engine


class RecentModels:
    """The models that requests for completions named in the last second, by project and by the name in the request."""

    def __init__(self) -> None:
        self._found: TTLCache[tuple[str, str], Found] = TTLCache(MOST, SECONDS)

    def get(self, project_id: str, name: str) -> Found | None:
        return self._found.get((project_id, name))

    def keep(self, project_id: str, name: str, found: Found) -> None:
        self._found[project_id, name] = found

    def forget(self) -> None:
        """Forgets all models. Every request that changes which model a name stands for, or how the model is served,
        calls this method, so that the client sees the change in its next request.
        """
        self._found.clear()


async def _recent(request: Request) -> RecentModels:
    return cast(RecentModels, request.app.state.recent_models)


RecentPart = Annotated[RecentModels, Depends(_recent)]
