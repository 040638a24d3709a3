"""Tests that the JSON of deployments is what the OpenAPI document describes."""

from dataclasses import replace

from services.control_plane.models.deployments.documents import DeploymentDocument
from services.control_plane.models.deployments.responses import deployment_object
from services.control_plane.ray_api import Load
from tests.services.control_plane.documented import check
from tests.services.control_plane.models.deployments.test_responses import STATUS


def test_a_deployment_is_as_described_with_and_without_a_load() -> None:
    check(DeploymentDocument, deployment_object(STATUS, None))
    load = Load(requests_in_flight=2, tokens_per_second=1.5, time_to_first_token=None, num_replicas=1)
    check(DeploymentDocument, deployment_object(STATUS, load))


def test_one_that_waits_or_failed_says_why_and_an_adapter_names_its_base() -> None:
    waiting = replace(STATUS, state="waiting", waits_for="a place", num_ready=0, attached_to="tiny")
    failed = replace(STATUS, state="failed", error="out of memory")
    for status in (waiting, failed):
        check(DeploymentDocument, deployment_object(status, None))
