import json
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpo_core.methods import METHODS
from services.cli.app import app

PAGE = Path(__file__).parents[4] / "docs" / "use" / "objectives.md"


def run(*arguments):
    found = CliRunner().invoke(app, [str(each) for each in arguments])
    assert found.exit_code == 0, found.output
    return found.stdout


def test_the_table_of_the_documentation_is_the_one_that_is_printed():
    assert f"\n\n{run('methods', '--markdown')}\n" in PAGE.read_text()


def test_methods_are_listed_with_their_options_and_papers():
    rows = {line.split("\t")[0]: line.split("\t")[1:] for line in run("methods").splitlines()}
    assert list(rows) == METHODS
    assert rows["simpo"] == ["pairs", "beta=2.5 gamma_beta_ratio=0.5", "https://arxiv.org/abs/2405.14734"]
    assert rows["cdpo"][2] == "https://ericmitchell.ai/cdpo.pdf"
    assert [each["id"] for each in json.loads(run("methods", "--json"))] == METHODS


def test_one_method_is_shown_in_full():
    shown = run("methods", "f_dpo")
    assert "https://arxiv.org/abs/2309.16240" in shown
    assert (
        "divergence\tjensen_shannon\tforward_kl, jensen_shannon, alpha\tThe f-divergence that measures how far" in shown
    )
    assert "n_epochs\t1\tfrom 1 to 50\tThe number of passes over the training data.\n" in shown
    assert "learning_rate\t1e-06 (1e-05 of an adapter)\tgreater than 0 and at most 1\tThe highest" in shown


@pytest.mark.parametrize("kind", METHODS)
def test_every_method_says_what_it_is_and_every_option_what_it_may_be(kind):
    (method,) = json.loads(run("methods", kind, "--json"))
    assert method["description"]
    options = method["hyperparameters"] | method["common_hyperparameters"]
    assert all(option["range"] or name in ("objectives", "weights") for name, option in options.items())


def test_an_unknown_method_is_refused_with_those_that_there_are():
    refused = CliRunner().invoke(app, ["methods", "ppo"])
    assert refused.exit_code == 1
    assert "Choose one of supervised, dpo," in refused.stderr


def test_the_version_is_printed():
    assert run("--version") == f"raydpo {version('raydpo')}\n"
