"""Tests the route /v1/x/plans."""

import pytest

from tests.services.control_plane.jobs.plans import test_plans as plans_tests
from tests.services.control_plane.jobs.plans.test_plans import GB

settings, machines, training_file, ask = (
    plans_tests.settings,
    plans_tests.machines,
    plans_tests.training_file,
    plans_tests.ask,
)  # fixtures


def test_whether_it_fits_is_not_known_where_ray_does_not_say(ask, machines, fake_ray):
    machines()
    fake_ray.down = True
    found = ask("small")
    assert found["fits"] is None
    assert found["notes"][-1] == (
        "Ray does not report how much memory its workers have, so whether the job fits is not known."
    )


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [
        ("away", "model_unreadable", "organization/away is not a folder on the service's machine"),
        ("quantized", "model_unreadable", "a quantized model (gptq)"),
        ("recurrent", "model_unplannable", "config.json has no num_attention_heads"),
    ],
)
def test_a_model_that_cannot_be_planned_is_refused_in_words(ask, machines, model, code, words):
    machines(GB)
    error = ask(model)["error"]
    assert (error["code"], error["param"]) == (code, "model")
    assert words in error["message"]


def test_the_body_is_that_of_a_job(ask):
    assert ask("small", num_wrkers=2)["error"]["param"] == "x_raydpo.num_wrkers"
    assert ask("none")["error"]["code"] == "model_not_found"
