import json

import pytest

from tests.services.headers import SMALL, write_model

PAIR = {"prompt": "Do you have a red saw?", "chosen": "Yes, gladly!", "rejected": "Aisle 3."}


@pytest.fixture
def options(base_model, tmp_path):
    """Returns the options of a plan with a model whose files have the shapes of weights."""
    write_model(base_model, SMALL)
    file = tmp_path / "pairs.jsonl"
    file.write_text((json.dumps(PAIR) + "\n") * 20)
    return ["plan", "--model", "tiny", "--file", file]


def test_a_plan_is_printed_for_people_and_as_json(raydpo, options):
    found = raydpo(*options, "--set", "x_raydpo.adapter=none", "--set", "method.dpo.n_epochs=2")
    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    assert "weights\t0.001 GB" in lines
    assert "steps\t6" in lines
    assert "Whether the job fits is not known." in lines  # no Ray answers
    told = json.loads(raydpo(*options, "--json", "--set", "x_raydpo.num_workers=4").stdout)
    assert (told["object"], told["num_workers"], told["fits"]) == ("plan", 4, None)


def test_what_the_service_refuses_is_told_in_a_line(raydpo, options):
    refused = raydpo(*options, "--set", "x_raydpo.num_wrkers=4")
    assert refused.exit_code == 1
    assert "num_wrkers" in refused.stderr
    assert "write KEY=VALUE" in raydpo(*options, "--set", "num_workers").stderr
