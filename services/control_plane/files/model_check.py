"""Describes checks of a training file with a model, which find out how training would encode the file's rows.

Such a check runs as a side job: a short Ray job beside training.
"""

import hashlib
import json
from functools import partial

from dpo_core.config import TrainConfig
from services import storage
from services.contract import CheckRequest, Recipe
from services.control_plane.core.tables import File, reading_of
from services.control_plane.models.models import NamedModel
from services.control_plane.settings import Settings
from services.control_plane.side_jobs import SideJob

CHECKING = 1  # the version of the check; raise the version when the same content gives another result


def check_of(file: File, model: NamedModel, config: TrainConfig, settings: Settings, instance: str) -> SideJob:
    """Returns the description of the side job (a short Ray job) that checks the file with the model.

    The same bytes, model and options (`config`) give the same side job, so that its result can be used again. Projects
    do not share checks, so that no project learns which files another project has checked. Services on one cluster do
    not share checks either; `instance` is the id of this service.
    """
    reading, project = reading_of(file), file.project_id
    content = [
        CHECKING,
        instance,
        project,
        file.sha256,
        model.source,
        config.max_length,
        config.truncation,
        reading.model_dump(),
    ]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
    recipe = Recipe(
        training_uri=file.uri,
        model_source=model.source,
        max_length=config.max_length,
        truncation=config.truncation,
        **dict(reading),
    )
    place = storage.join(settings.storage_url, "checks", key)
    return SideJob("check", key, place, "services.training.check_program", partial(_request, recipe))


def _request(recipe: Recipe, folder_uri: str) -> CheckRequest:
    return CheckRequest(recipe=recipe, folder_uri=folder_uri)
