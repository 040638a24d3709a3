"""Tests how `raydpo jobs create` makes the body of its request, and what it checks before it uploads a file."""

import gzip
import json

import httpx
import pytest
from openai import OpenAI

from services.cli.jobs.request import plan_unsent
from tests.services.headers import SMALL, write_model

PAIR = {"prompt": "Do you have a red saw?", "chosen": "Yes, gladly!", "rejected": "Aisle 3."}
YAML = """
model: tiny
training_file: rows/pairs.jsonl
validation_file: rows/held.jsonl
suffix: first
seed: 3
metadata: {team: a, release: "7"}
method:
  type: simpo
  simpo: {hyperparameters: {gamma_beta_ratio: 0.3, learning_rate: 1e-5, n_epochs: 2}}
integrations: [{type: wandb, wandb: {project: answers, tags: [a]}}]
x_raydpo:
  max_length: 256
  activation_checkpointing: on
"""
TOML = """
model = "tiny"
training_file = "rows/pairs.jsonl"
validation_file = "rows/held.jsonl"
suffix = "first"
seed = 3
metadata = {team = "a", release = "7"}
integrations = [{type = "wandb", wandb = {project = "answers", tags = ["a"]}}]
[method]
type = "simpo"
simpo.hyperparameters = {gamma_beta_ratio = 0.3, learning_rate = 1e-5, n_epochs = 2}
[x_raydpo]
max_length = 256
activation_checkpointing = "on"
"""
BODY = {
    "model": "tiny",
    "training_file": "rows/pairs.jsonl",
    "validation_file": "rows/held.jsonl",
    "suffix": "first",
    "seed": 3,
    "metadata": {"team": "a", "release": "7"},
    "method": {
        "type": "simpo",
        "simpo": {"hyperparameters": {"gamma_beta_ratio": 0.3, "learning_rate": 1e-5, "n_epochs": 2}},
    },
    "integrations": [{"type": "wandb", "wandb": {"project": "answers", "tags": ["a"]}}],
    "x_raydpo": {"max_length": 256, "activation_checkpointing": "on"},
}
FORMS = {"job.yaml": YAML, "job.toml": TOML, "job.json": json.dumps(BODY, indent="\t")}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "pairs.jsonl").write_text((json.dumps(PAIR) + "\n") * 20)
    (tmp_path / "rows" / "held.jsonl").write_text(json.dumps(PAIR | {"prompt": "And a blue one?"}) + "\n")
    for name, text in FORMS.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def pairs(folder):
    return folder / "rows" / "pairs.jsonl"


@pytest.fixture
def planned(raydpo):
    """Returns a function that returns the request and the job of a dry run."""

    def plan(*options):
        found = raydpo("jobs", "create", *options, "--dry-run")
        assert found.exit_code == 0, found.output
        told = json.loads(found.stdout)
        return told["request"], told["job"]

    return plan


@pytest.fixture
def created(raydpo):
    """Returns a function that creates a job, and returns it as the service shows it. Jobs are cancelled at the end."""
    made = []

    def create(*options):
        found = raydpo("jobs", "create", *options)
        assert found.exit_code == 0, found.output
        made.append(found.stdout.strip())
        return json.loads(raydpo("jobs", "show", made[-1]).stdout)

    yield create
    for job_id in made:
        raydpo("jobs", "cancel", job_id)


def test_a_dry_run_plans_the_memory_of_the_job_before_its_files_are_uploaded(raydpo, folder, base_model):
    before = files_of(raydpo)
    write_model(base_model, SMALL)
    told = json.loads(raydpo("jobs", "create", "--config", folder / "job.yaml", "--dry-run").stdout)
    assert told["plan"]["object"] == "plan"
    assert told["plan"]["needed_bytes"] > 0
    assert "the file was not read" in told["plan"]["notes"][0]
    assert files_of(raydpo) == before


def test_a_dry_run_says_why_there_is_no_plan(capsys):
    error = {"message": "config.json has no num_attention_heads", "code": "model_unplannable", "param": "model"}
    answer = httpx.MockTransport(lambda _: httpx.Response(400, json={"error": error}))
    with OpenAI(api_key="rd", base_url="http://127.0.0.1:9", http_client=httpx.Client(transport=answer)) as client:
        assert plan_unsent(client, {"model": "tiny"}, {}) is None
    assert "config.json has no num_attention_heads" in capsys.readouterr().err


def files_of(raydpo):
    return raydpo("files", "list").stdout


@pytest.mark.parametrize("name", FORMS)
def test_a_config_file_is_the_body_and_its_files_lie_beside_it(planned, folder, name):
    request, job = planned("--config", folder / name)
    files = {field: str(folder / BODY[field]) for field in ("training_file", "validation_file")}
    assert request == BODY | files
    assert job["method"]["simpo"]["hyperparameters"]["beta"] == 2.5
    assert (job["id"], job["training_file"]) == (None, files["training_file"])


def test_the_files_of_a_config_file_are_uploaded_with_what_it_says_of_their_rows(raydpo, created, folder, pairs):
    rows = [json.dumps({"ask": f"{i}?", "chosen": "Yes.", "rejected": "No."}) for i in range(20)]
    pairs.write_text("\n".join([*rows, "{}"]))
    (folder / "rows" / "held.jsonl").write_text("\n".join(rows))
    reading = ["--columns", "prompt=ask", "--max-invalid-share", 0.2]
    job = created("--config", folder / "job.yaml", *reading)
    assert job["x_raydpo"]["request"]["x_raydpo"].items() >= BODY["x_raydpo"].items()
    for field in ("training_file", "validation_file"):
        file = json.loads(raydpo("files", "show", job[field]).stdout)
        assert (file["filename"], file["x_raydpo"]["columns"]) == (BODY[field].rpartition("/")[2], {"prompt": "ask"})
    assert job["metadata"] == BODY["metadata"]
    assert job["integrations"][0]["wandb"]["project"] == "answers"


def test_the_files_of_evaluations_are_uploaded_as_well(raydpo, created, planned, folder):
    score = {"kind": "score", "judge": {"type": "length"}}
    asked = {"words": score | {"file": "rows/held.jsonl"}}
    config = {"model": "tiny", "training_file": "rows/pairs.jsonl", "method": {"type": "dpo"}}
    config["x_raydpo"] = {"evaluations": asked}
    (folder / "evaluated.json").write_text(json.dumps(config))
    local = str(folder / "rows" / "held.jsonl")
    request, _ = planned("--config", folder / "evaluated.json")
    assert request["x_raydpo"]["evaluations"]["words"]["file"] == local
    job = created("--config", folder / "evaluated.json", "--set", f"x_raydpo.evaluations.more.file={local}",
                  "--set", "x_raydpo.evaluations.more.kind=drift")  # fmt: skip
    found = job["x_raydpo"]["request"]["x_raydpo"]["evaluations"]
    assert {name: each["kind"] for name, each in found.items()} == {"words": "score", "more": "drift"}
    for each in found.values():
        assert json.loads(raydpo("files", "show", each["file"]).stdout)["filename"] == "held.jsonl"


def test_set_wins_over_options_and_options_over_the_config_file(planned, folder):
    options = ["--config", folder / "job.yaml", "--seed", 4, "--epochs", 3, "--suffix", "second"]
    sets = [
        "seed=5",
        "method.simpo.gamma_beta_ratio=0.5",
        "x_raydpo.mlflow={experiment: e}",
        "metadata.a.b=1e3",
        "metadata.team=null",
    ]
    sets += [
        "method.simpo.hyperparameters.learning_rate=1e-6",
        "x_raydpo.activation_checkpointing=off",
        "validation_file=null",
    ]
    request, job = planned(*options, *(word for each in sets for word in ("--set", each)))
    assert (request["seed"], request["suffix"], "validation_file" in request) == (5, "second", False)
    simpo = {"gamma_beta_ratio": 0.5, "learning_rate": 1e-6, "n_epochs": 3}
    assert request["method"]["simpo"]["hyperparameters"] == simpo
    assert request["metadata"] == {"release": "7", "a.b": "1e3"}
    extension = {"max_length": 256, "activation_checkpointing": "off", "mlflow": {"experiment": "e"}}
    assert request["x_raydpo"] == extension
    assert job["x_raydpo"]["request"]["x_raydpo"].items() >= extension.items()


def test_the_method_is_the_one_named_last(planned, folder, pairs):
    kind = lambda *options: planned("--model", "tiny", "--file", pairs, *options)[0]["method"]  # noqa: E731
    assert kind() == {"type": "dpo", "dpo": {"hyperparameters": {}}}
    assert kind("--set", "method.simpo.beta=2")["simpo"] == {"hyperparameters": {"beta": 2}}
    assert kind("--method", "ipo", "--set", "method.type=orpo", "--epochs", 2) == {
        "type": "orpo",
        "orpo": {"hyperparameters": {"n_epochs": 2}},
    }
    assert kind("--beta", 1, "--set", "method={type: ipo}")["ipo"] == {"hyperparameters": {"beta": 1}}
    request, _ = planned("--config", folder / "job.yaml", "--method", "ipo", "--beta", 0.2)
    options = {"learning_rate": 1e-5, "n_epochs": 2, "beta": 0.2}
    assert request["method"] == {"type": "ipo", "ipo": {"hyperparameters": options}}


def test_what_a_change_of_method_leaves_out_is_said(raydpo, folder, base_model):
    write_model(base_model, SMALL)
    changed = raydpo("jobs", "create", "--config", folder / "job.yaml", "--method", "ipo", "--dry-run")
    dropped = "The method changes from simpo to ipo; these options of simpo are dropped: gamma_beta_ratio.\n"
    assert changed.stderr == dropped


def test_a_config_file_without_a_method_is_what_the_api_makes_of_it(planned, folder):
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}] * 10
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "old.json").write_text(json.dumps({"model": "tiny", "hyperparameters": {"n_epochs": 2}}))
    request, job = planned("--config", folder / "old.json", "--file", folder / "chat.jsonl", "--batch-size", 4)
    assert request["hyperparameters"] == {"n_epochs": 2, "batch_size": 4}
    assert job["method"]["type"] == "supervised"


def test_a_job_is_repeated_with_changes(created, planned, folder):
    first = created("--config", folder / "job.yaml", "--set", "seed=null")
    again, _ = planned("--again", first["id"], "--set", "x_raydpo.max_length=128", "--beta", 3)
    expected = first["x_raydpo"]["request"]
    expected["x_raydpo"]["max_length"] = 128
    expected["method"]["simpo"]["hyperparameters"]["beta"] = 3
    assert again == expected
    assert again["seed"] == first["seed"]
    exact = created("--again", first["id"])
    assert {key: exact[key] for key in ("method", "training_file", "seed", "metadata")} == {
        key: first[key] for key in ("method", "training_file", "seed", "metadata")
    }


def test_a_job_on_a_uri_is_repeated_on_a_file(created, planned, pairs):
    uri = "hf://datasets/org/name/rows.jsonl"
    first = created("--model", "tiny", "--set", f"training_file={uri}")
    assert first["x_raydpo"]["request"]["x_raydpo"]["dataset"] == uri
    request, job = planned("--again", first["id"], "--file", pairs)
    assert ("dataset" in request["x_raydpo"], job["training_file"]) == (False, str(pairs))


def test_a_job_whose_file_was_deleted_is_repeated_on_another(raydpo, created, planned, pairs):
    first = created("--model", "tiny", "--file", pairs)
    raydpo("jobs", "cancel", first["id"])
    assert raydpo("files", "delete", first["training_file"]).exit_code == 0
    refused = raydpo("jobs", "create", "--again", first["id"])
    assert refused.exit_code == 1
    assert refused.stderr == (
        f"error: There is no file {first['training_file']}. It may have been deleted; choose another one with --file.\n"
    )
    request, _ = planned("--again", first["id"], "--file", pairs)
    assert request["training_file"] == str(pairs)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--set", "method.dpo.betta=1"], "parameter: 'method.dpo.hyperparameters.betta'. Did you mean 'beta'?"),
        (["--set", "x_raydpo.max_lenght=1"], "x_raydpo.max_lenght'. Did you mean 'max_length'? x_raydpo can have: "),
        (["--set", "modle=x"], "Unknown parameter: 'modle'. Did you mean 'model'? The request can have: "),
        (["--set", "x_raydpo.adapter.rank=4"], "x_raydpo.adapter.rank'. x_raydpo.adapter can have: alpha, "),
        (["--set", "x_raydpo.early_stop={patience: 2, min_gan: 1}"], "early_stop.min_gan'. Did you mean 'min_gain'?"),
        (["--set", "x_raydpo.reference.modl=tiny"], "reference.modl'. Did you mean 'model'?"),
        (["--set", "colour=red"], "Unknown parameter: 'colour'."),
        (["--method", "simplo"], "'simplo' is not supported. Did you mean 'simpo'? It must be one of supervised, dpo,"),
        (["--method", "kto", "--set", "method.kto.beta=-1"], "method.kto.hyperparameters.beta"),
        (["--model", "nobody"], "The model 'nobody' does not exist."),
        (["--method", "supervised"], "holds pairs; method 'supervised' learns from demonstrations."),
        (["--set", "x_raydpo.validation_share=0.1", "--validation-file", "FILE"], "send only one of the two"),
        (
            ["--method", "kto", "--validation-file", "FILE", "--set", "validation_file=nowhere"],
            "nowhere is neither a local",
        ),
        (["--set", "x_raydpo.columns={answer: a}"], "names the role 'answer', which does not exist"),
    ],
)
def test_what_would_be_refused_is_refused_before_anything_is_uploaded(raydpo, folder, pairs, options, says):
    before = files_of(raydpo)
    options = [folder / "rows" / "held.jsonl" if option == "FILE" else option for option in options]
    refused = raydpo("jobs", "create", "--model", "tiny", "--file", pairs, *options)
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert says in refused.stderr
    assert files_of(raydpo) == before


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_the_first_rows_are_looked_into_before_they_are_uploaded(raydpo, pairs, pack):
    before = files_of(raydpo)
    lines = pairs.read_bytes().splitlines()
    for broken, says in (
        ([*lines[:6], b"{", *lines[7:]], "Line 7"),
        ([json.dumps(PAIR | {"margin": 2}).encode()] * 20, "has margins; method 'ipo' takes none"),
    ):
        pairs.write_bytes(pack(b"\n".join(broken)))
        refused = raydpo("jobs", "create", "--model", "tiny", "--file", pairs, "--method", "ipo")
        assert refused.exit_code == 1
        assert says in refused.stderr
    assert files_of(raydpo) == before


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("job.yaml", "model: tiny\nmodel: other", "line 1: the key 'model' is given twice"),
        ("job.yaml", "model: {", "line 1: expected the node content"),
        ("job.yaml", "- tiny", "holds no fields"),
        ("job.yaml", "? [a]\n: b", "cannot be read"),
        ("job.json", '{"model": "a", "model": "b"}', "the key 'model' is given twice"),
        ("job.json", '{"seed": NaN}', "cannot be written as JSON"),
        ("job.toml", "model = ", "cannot be read"),
        ("job.toml", "[metadata]\nday = 2026-01-01", "Put dates in quotes"),
        ("job.txt", "", "give a file whose name ends with .yaml, .yml, .toml, .json"),
        ("job.json", "\xff", "cannot be read"),
    ],
)
def test_a_config_file_that_cannot_be_used_is_refused_in_one_line(raydpo, tmp_path, name, text, says):
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    refused = raydpo("jobs", "create", "--config", tmp_path / name)
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1), refused.output
    assert says in refused.stderr


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("max_length", "write KEY=VALUE"),
        ("x_raydpo..a=1", "write KEY=VALUE"),
        ("suffix=[", "put a value that is a string in quotes"),
        ("seed.a=1", "seed.a cannot be set, because seed is 3; set seed as a whole."),
        ("integrations.0=1", "set integrations as a whole"),
        ("x_raydpo.max_length=.inf", "x_raydpo.max_length"),
        ("method.type=[a]", "method.type"),
        ("training_file=7", "training_file"),
        ("x_raydpo=7", "x_raydpo"),
    ],
)
def test_a_value_that_cannot_be_set_is_refused_in_one_line(raydpo, folder, given, says):
    refused = raydpo("jobs", "create", "--config", folder / "job.yaml", "--set", given)
    assert (refused.exit_code, refused.stderr.count("error: ")) == (1, 1), refused.output
    assert says in refused.stderr


def test_a_file_and_a_uri_that_are_both_given_are_refused(raydpo, pairs):
    sets = ["--set", "x_raydpo.dataset=hf://datasets/org/name/rows.jsonl"]
    refused = raydpo("jobs", "create", "--model", "tiny", "--file", pairs, *sets)
    assert "training_file and x_raydpo.dataset name different data" in refused.stderr


def test_a_config_file_and_a_job_to_repeat_exclude_each_other(raydpo, folder):
    refused = raydpo("jobs", "create", "--config", folder / "job.yaml", "--again", "ftjob-1")
    assert refused.stderr.startswith("error: --config and --again each give a whole request; give one of them")
