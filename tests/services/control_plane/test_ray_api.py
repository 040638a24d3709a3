"""Tests how the service reads Ray's answers."""

import pytest

from services.contract import Deployment
from services.control_plane.ray_api import Load, _application, _config, _submission, _sum
from tests.services.test_deaths import LOST_NODE

TRACEBACK = """The deployment failed to start 1 times in a row.
Traceback (most recent call last):
  File "app.py", line 57, in __serve_build_asgi_app__
FileNotFoundError: /models/tiny holds no config.json; give the folder of a Hugging Face model."""


@pytest.mark.parametrize(
    ("status", "state"),
    [("RUNNING", "running"), ("DEPLOY_FAILED", "failed"), ("DELETING", "stopping"), ("DEPLOYING", "loading")],
)
def test_serve_status_is_read_as_ours(status: str, state: str) -> None:
    assert _application({"status": status}).state == state


def test_of_a_traceback_only_the_error_is_told() -> None:
    told = _application({"status": "DEPLOY_FAILED", "deployments": {"policy": {"message": TRACEBACK}}}).message
    assert told == "FileNotFoundError: /models/tiny holds no config.json; give the folder of a Hugging Face model."


def test_what_an_application_was_deployed_with_is_read_under_our_own_name_for_it() -> None:
    deployment = Deployment(app_name="tiny", model_id="tiny", source="/m", dtype="float32", num_gpus=1)
    app = {"status": "RUNNING", "deployed_app_config": _config(deployment, "raydpo-1-", [])}
    assert _application(app, "raydpo-1-").deployment == deployment
    assert _application({"status": "RUNNING", "deployed_app_config": {"args": {}}}).deployment is None


def test_the_load_of_replicas_is_summed_up_and_the_first_token_is_a_mean_over_all_answers() -> None:
    one = {"requests_running": 2, "requests_waiting": 1, "seconds": 60.0, "tokens": 120}
    busy, idle = one | {"first_tokens": 3, "first_token_seconds": 0.6}, dict.fromkeys(one, 0)
    told = _sum([busy, busy | {"first_tokens": 1, "first_token_seconds": 0.2, "seconds": 30.0}])
    assert told == Load(2, 6, 6.0, pytest.approx(0.2))
    assert _sum([idle | {"first_tokens": 0, "first_token_seconds": 0.0}]) == Load(1, 0, 0.0, None)


def test_replicas_that_answer_are_counted() -> None:
    replicas = [{"state": "RUNNING"}, {"state": "STARTING"}]
    told = _application({"status": "DEPLOYING", "deployments": {"policy": {"replicas": replicas}}})
    assert (told.num_ready, told.num_replicas) == (1, 2)


@pytest.mark.parametrize(
    ("told", "cause"),
    [
        ({"driver_exit_code": -9}, "the signal SIGKILL killed its process (the system sends it when memory runs out)"),
        ({"driver_exit_code": 139, "message": "KeyError: 1 was logged"}, "the signal SIGSEGV killed its process"),
        ({"driver_exit_code": -9, "message": LOST_NODE}, "a node that it ran on was lost"),
        ({"driver_exit_code": 1}, "its process ended with exit status 1"),
        ({"driver_exit_code": 1, "message": "ValueError: no config.json"}, "ValueError: no config.json"),
        ({}, "its process ended before it was finished"),
        (
            {"error_type": "RUNTIME_ENV_SETUP_FAILURE", "message": "runtime_env setup failed: no conda"},
            "Ray could not start its process: runtime_env setup failed: no conda",
        ),
        (
            {"error_type": "JOB_SUPERVISOR_ACTOR_START_TIMEOUT", "message": "Job supervisor actor failed to start"},
            "Ray could not start its process: Job supervisor actor failed to start",
        ),
        (
            {
                "error_type": "JOB_SUPERVISOR_ACTOR_DIED",
                "message": "Job supervisor actor died: The actor died because its node has died. Node Id: 7",
            },
            "a node that it ran on was lost",
        ),
    ],
)
def test_why_an_attempt_ended_is_read_from_what_ray_says_of_its_job(told: dict[str, object], cause: str) -> None:
    assert _submission({"status": "FAILED", **told}).cause() == cause
