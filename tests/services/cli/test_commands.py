import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import typer

from services.cli.client import fail, print_rows
from services.cli.lists import _items

PAIR = {"prompt": "Do you have a red saw?", "chosen": "Yes, gladly!", "rejected": "Aisle 3."}


@pytest.fixture
def pairs(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text((json.dumps(PAIR) + "\n") * 20)
    return file


@pytest.mark.slow
def test_files_are_uploaded_listed_shown_read_and_deleted(raydpo, pairs):
    stored = raydpo("files", "upload", pairs)
    assert stored.exit_code == 0, stored.output
    file_id = stored.stdout.strip()
    assert file_id in raydpo("files", "list").stdout
    assert json.loads(raydpo("files", "show", file_id).stdout)["filename"] == "pairs.jsonl"
    assert raydpo("files", "content", file_id).stdout == pairs.read_text()
    assert raydpo("files", "delete", file_id).exit_code == 0
    assert file_id not in raydpo("files", "list").stdout


def test_broken_row_is_refused_with_its_line_in_one_line(raydpo, pairs):
    lines = pairs.read_text().splitlines()
    pairs.write_text("\n".join([*lines[:6], "{", *lines[7:]]))
    refused = raydpo("files", "upload", pairs)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: ")
    assert "Line 7" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_how_the_rows_of_a_file_are_read_is_said_with_it(raydpo, pairs):
    rows = [json.dumps({"ask": f"{i}?", "good": "Yes.", "bad": "No."}) for i in range(19)]
    pairs.write_text("\n".join([*rows, "{}"]))
    roles = [word for role in ("prompt=ask", "chosen=good", "rejected=bad") for word in ("--columns", role)]
    options = [*roles, "--max-invalid-share", 0.05]
    stored = raydpo("files", "upload", pairs, *options)
    assert stored.exit_code == 0, stored.output
    shown = json.loads(raydpo("files", "show", stored.stdout.strip()).stdout)["x_raydpo"]
    assert (shown["columns"]["prompt"], shown["invalid_rows"], shown["max_invalid_share"]) == ("ask", "drop", 0.05)
    created = raydpo("jobs", "create", "--model", "tiny", "--file", pairs, *options)
    assert created.exit_code == 0, created.output
    assert json.loads(raydpo("jobs", "show", created.stdout.strip()).stdout)["x_raydpo"]["columns"]["prompt"] == "ask"
    raydpo("jobs", "cancel", created.stdout.strip())
    refused = raydpo("jobs", "create", "--model", "tiny", "--file", stored.stdout.strip(), *options)
    assert "can be given for a job only with x_raydpo.dataset" in refused.stderr


def test_job_is_created_from_a_local_file_listed_shown_cancelled_and_watched_to_its_end(raydpo, pairs):
    options = ["--beta", 0.2, "--epochs", 2, "--batch-size", 4, "--learning-rate", 1e-4, "--seed", 7, "--workers", 2]
    created = raydpo("jobs", "create", "--model", "tiny", "--file", pairs, "--suffix", "polite", *options)
    assert created.exit_code == 0, created.output
    job_id = created.stdout.strip()
    job = json.loads(raydpo("jobs", "show", job_id).stdout)
    given = {"beta": 0.2, "n_epochs": 2, "batch_size": 4, "learning_rate": 1e-4}
    assert job["method"]["dpo"]["hyperparameters"].items() >= given.items()
    assert (job["seed"], job["user_provided_suffix"], job["x_raydpo"]["num_workers"]) == (7, "polite", 2)
    assert [job_id, "dpo", "tiny"] == [raydpo("jobs", "list").stdout.split("\t")[each] for each in (0, 2, 3)]
    assert raydpo("jobs", "cancel", job_id).stdout.startswith(f"{job_id} ")
    watched = raydpo("jobs", "watch", job_id)
    assert "Created fine-tuning job" in watched.stdout
    assert watched.exit_code == 1
    assert "cancelled" in watched.stderr


@pytest.mark.slow
def test_a_job_is_paused_and_resumed_and_its_logs_are_printed_and_followed(raydpo, pairs, service):
    job_id = raydpo("jobs", "create", "--model", "tiny", "--file", pairs).stdout.strip()
    assert raydpo("jobs", "pause", job_id).stdout == f"{job_id} paused\n"
    assert raydpo("jobs", "resume", job_id).stdout == f"{job_id} queued\n"
    refused = raydpo("jobs", "resume", job_id)
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert "attempt 1 has no logs of driver; sources that have logs: none" in raydpo("jobs", "logs", job_id).stderr
    logs = service.home / "storage" / "runs" / job_id / "logs"
    for place, text in {"1/driver": "first [bold]\n", "1/worker-0": "step\n", "2/driver": "second\n"}.items():
        (logs / place).mkdir(parents=True)
        (logs / place / "000000000000.log").write_text(text)
    assert raydpo("jobs", "logs", job_id).stdout == "second\n"
    assert raydpo("jobs", "logs", job_id, "--attempt", 1).stdout == "first [bold]\n"
    assert raydpo("jobs", "logs", job_id, "--attempt", 1, "--source", "worker-0").stdout == "step\n"
    assert (
        "attempt 2 has no logs of worker-0; sources that have logs: driver"
        in raydpo("jobs", "logs", job_id, "--source", "worker-0").stderr
    )
    assert "Invalid value for 'source'" in raydpo("jobs", "logs", job_id, "--source", "../driver").stderr
    raydpo("jobs", "cancel", job_id)
    assert raydpo("jobs", "logs", job_id, "--follow").stdout == "second\n"


def test_file_option_is_a_local_file_or_an_id(raydpo):
    refused = raydpo("jobs", "create", "--model", "tiny", "--file", "nowhere.jsonl")
    assert refused.exit_code == 1
    assert "nowhere.jsonl is neither a local file, nor the id of an uploaded file" in refused.stderr


def test_file_option_takes_a_uri_too(raydpo):
    created = raydpo("jobs", "create", "--model", "tiny", "--file", "hf://datasets/org/name/rows.jsonl")
    assert created.exit_code == 0, created.output
    job = json.loads(raydpo("jobs", "show", created.stdout.strip()).stdout)
    assert job["training_file"] == "hf://datasets/org/name/rows.jsonl"
    raydpo("jobs", "cancel", job["id"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["files", "jobs", "webhooks", "keys", "projects", "models"])
def test_a_list_shows_twenty_or_so_many_as_are_asked_for_and_says_that_more_follow(raydpo, pairs, kind):
    files = [raydpo("files", "upload", pairs).stdout.strip() for _ in range(2)] if kind in ("files", "jobs") else []
    make = {
        "jobs": ("create", "--model", "tiny", "--file", *files[:1]),
        "webhooks": ("create", "https://example.com/hook"),
        "keys": ("create", "listed"),
        "projects": ("create", "listed"),
    }
    for number in range(2 if kind in make else 0):
        words = [f"listed-{number}" if word == "listed" else word for word in make[kind]]
        assert raydpo(kind, *words).exit_code == 0
    shown = raydpo(kind, "list", "--limit", 1)
    assert len(shown.stdout.splitlines()) == 1
    more = "The list has more items than --limit 1; raise --limit to show more.\n"
    assert shown.stderr == ("" if kind == "models" else more)
    (first,) = json.loads(raydpo(kind, "list", "--limit", 1, "--json").stdout)
    assert first["id"] == shown.stdout.split("\t")[0]
    assert raydpo(kind, "list", "--limit", 0).exit_code == 2
    if kind == "webhooks":
        for line in raydpo(kind, "list").stdout.splitlines():
            raydpo(kind, "delete", line.split("\t")[0])


def test_what_a_stranger_s_file_holds_does_not_reach_the_terminal(capsys):
    with pytest.raises(typer.Exit):
        fail("its keys are \x1b]0;owned\x07 and [/b]")
    assert capsys.readouterr().err == "error: its keys are \ufffd]0;owned\ufffd and [/b]\n"
    print_rows(["a", "b"], [["\x1b[2J[red]", "two\tcells\nof one"]])
    first, second = capsys.readouterr().out.rstrip("\n").split("\t")
    assert (first, second.split()) == ("\ufffd[2J[red]", ["two", "cells", "of", "one"])


def test_a_list_asks_for_no_more_pages_than_it_shows():
    asked = []

    class Pages:
        def get(self, path, *, cast_to, options):
            asked.append(dict(options["params"]))
            return {"data": [{"id": len(asked)}] * options["params"]["limit"], "has_more": True, "last_id": len(asked)}

    assert len(list(islice(_items(Pages(), "/files", 21, {}), 21))) == 21
    assert asked == [{"limit": 21}]
    assert len(list(islice(_items(Pages(), "/files", 150, {}), 150))) == 150
    assert asked[1:] == [{"limit": 100}, {"limit": 100, "after": 2}]


def test_models_lists_by_itself(raydpo):
    assert raydpo("models").stdout == raydpo("models", "list").stdout
    assert json.loads(raydpo("models", "show", "tiny").stdout)["id"] == "tiny"
    refused = raydpo("models", "delete", "tiny")
    assert refused.exit_code == 1
    assert refused.stderr.count("\n") == 1


def test_webhooks_are_created_listed_tested_and_deleted(raydpo):
    created = raydpo("webhooks", "create", "https://127.0.0.1:9/")
    assert created.exit_code == 1
    assert "127.0.0.1, which is not public" in created.stderr
    created = raydpo("webhooks", "create", "https://localhost:9/", "--name", "ours")
    assert created.stderr.startswith("signing secret: whsec_")
    endpoint_id = created.stdout.strip()
    (row,) = raydpo("webhooks", "list").stdout.splitlines()
    kinds = " ".join(f"fine_tuning.job.{state}" for state in ("cancelled", "failed", "succeeded"))
    assert row.split("\t") == [endpoint_id, "ours", "https://localhost:9/", kinds, "enabled"]
    refused = raydpo("webhooks", "test", endpoint_id)
    assert refused.exit_code == 1
    assert "could not be reached" in refused.stderr
    assert raydpo("webhooks", "delete", endpoint_id).exit_code == 0
    assert raydpo("webhooks", "list").stdout == ""


def test_chat_with_an_unknown_model_says_so(raydpo):
    refused = raydpo("chat", "nobody", "Hello?")
    assert refused.exit_code == 1
    assert "nobody" in refused.stderr


def test_service_that_does_not_answer_and_wrong_key_are_told(raydpo, tmp_path):
    assert "nothing answers at http://127.0.0.1:9" in raydpo("models", "list", "--url", "http://127.0.0.1:9/v1").stderr
    wrong = tmp_path / "key"
    wrong.write_text("rd-wrong")
    assert raydpo("models", "list", "--key-file", wrong).exit_code == 1
    assert "no API key" in raydpo("models", "list", "--key-file", tmp_path / "none").stderr


def test_help_loads_nothing_heavy():
    script = "import sys; from services.cli.app import app; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()
    assert not {"openai", "fastapi", "sqlalchemy", "pyarrow", "ray", "torch"} & set(loaded)
    assert Path(sys.executable).with_name("raydpo").exists()


def test_what_looks_like_markup_is_printed_as_it_is(raydpo):
    refused = raydpo("jobs", "create", "--model", "tiny", "--file", "[/red].jsonl")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: [/red].jsonl is neither")


def test_migrate_says_in_one_line_that_the_url_is_not_postgresql_s():
    environment = {"PATH": "", "DATABASE_URL": "mysql://user:hidden@host/name"}
    migrate = [sys.executable, "-c", "from services.cli.app import app; app()", "migrate"]
    ended = subprocess.run(migrate, env=environment, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: the database's URL begins with mysql://, which is not PostgreSQL;")
    assert "Traceback" not in ended.stderr
    assert "hidden" not in ended.stderr
