"""What is read from Ray's answers."""

import pytest

from services.control_plane.launcher import _application

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
