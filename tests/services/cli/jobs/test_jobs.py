"""Tests the commands that submit, list and show jobs."""

import json


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


def test_a_job_s_events_checkpoints_metrics_and_results_are_shown(raydpo, trained):
    job_id, policy = trained
    told = [line.split("\t") for line in raydpo("jobs", "events", job_id).stdout.splitlines()]
    assert told[-1][1:] == ["info", f"Created fine-tuning job: {job_id}"]
    assert [message for _, _, message in told if message.startswith("Step")] == ["Step 2/2", "Step 1/2"]
    assert len(raydpo("jobs", "events", job_id, "--limit", 2).stdout.splitlines()) == 2
    steps = [
        each for each in json.loads(raydpo("jobs", "events", job_id, "--json").stdout) if each["type"] == "metrics"
    ]
    assert steps[0]["data"]["train_loss"] == 0.5
    (checkpoint,) = raydpo("jobs", "checkpoints", job_id).stdout.splitlines()
    assert checkpoint.split("\t")[1:3] == ["2", policy]
    assert checkpoint.endswith("\tloss 0.5000")
    assert json.loads(raydpo("jobs", "checkpoints", job_id, "--json").stdout)[0]["step_number"] == 2
    shown = raydpo("jobs", "metrics", job_id).stdout
    assert shown == "step 1  loss 0.6900\nstep 2  loss 0.5000  accuracy 75%\n"
    assert raydpo("jobs", "metrics", job_id, "--points", 1).stdout == "step 2  loss 0.5950  accuracy 75%\n"
    assert json.loads(raydpo("jobs", "metrics", job_id, "--json").stdout)["metrics"]["learning_rate"]["mean"][0] == 1e-6
    assert raydpo("jobs", "results", job_id).stdout.startswith('{"prompt"')


def test_a_job_is_deleted_and_its_models_stay_unless_they_are_to_go(raydpo, trained, database):
    job_id, policy = trained
    refused = raydpo("jobs", "delete", job_id)
    assert refused.exit_code == 1
    assert "cancel it before you delete it" in refused.stderr
    raydpo("jobs", "cancel", job_id)
    deleted = raydpo("jobs", "delete", job_id)
    assert deleted.stdout == f"deleted {job_id}\n"
    assert f"Its models stay: {policy}." in deleted.stderr
    assert job_id not in raydpo("jobs", "list").stdout
    assert "Could not find fine tune" in raydpo("jobs", "show", job_id).stderr
    other = raydpo("jobs", "create", "--model", "tiny", "--file", "hf://datasets/org/name/a.jsonl").stdout.strip()
    raydpo("jobs", "cancel", other)
    database.execute("UPDATE models SET job_id = %s", (other,))
    database.commit()
    gone = raydpo("jobs", "delete", other, "--models")
    assert (gone.stdout, gone.stderr) == (f"deleted {other}\n", "")
    assert policy not in raydpo("models", "list").stdout


def test_a_job_without_results_says_where_to_look(raydpo, job_id):
    refused = raydpo("jobs", "results", job_id)
    assert refused.exit_code == 1
    assert f"{job_id} is queued and has no result file; `raydpo jobs metrics {job_id}` shows" in refused.stderr
