"""Prints the OpenAPI document of the service, from which the page's types are made."""

import json
import sys

from services.control_plane.app import create_app
from services.control_plane.settings import Settings

nowhere = dict.fromkeys(("DATABASE_URL", "storage_url", "advertised_url", "ray_url", "api_key"), "http://nowhere")
json.dump(create_app(Settings(**nowhere)).openapi(), sys.stdout)
