"""Tests commands that list items, over several pages, as a table or as JSON, and commands that show a job's metrics."""

import json

import pytest

CSV = "step,train_loss\n1,0.69\n2,0.5\n"


@pytest.fixture
def job_id(raydpo):
    made = raydpo("jobs", "create", "--model", "tiny", "--file", "hf://datasets/org/name/[/red]/a.jsonl").stdout.strip()
    yield made
    raydpo("jobs", "cancel", made)


@pytest.fixture
def trained(raydpo, database, job_id, tmp_path):
    """Adds to a job what its training would have reported: two steps, a checkpoint, and a result file."""
    metrics = {1: {"train_loss": 0.69, "learning_rate": 1e-6}, 2: {"train_loss": 0.5, "train_reward_accuracy": 0.75}}
    for step, told in metrics.items():
        event = (f"ftevent-{job_id}-{step}", job_id, step, step, f"Step {step}/2", json.dumps(told | {"step": step}))
        columns = "public_id, job_id, attempt, seq, step, level, type, message, data"
        database.execute(f"INSERT INTO events ({columns}) VALUES (%s, %s, 1, %s, %s, 'info', 'metrics', %s, %s)", event)
    saved = (f"ftckpt-{job_id}", job_id, "file:///nowhere", f"ft:tiny:raydpo::{job_id[6:]}", json.dumps({"loss": 0.5}))
    columns = "id, job_id, step, uri, model_id, metrics"
    database.execute(f"INSERT INTO checkpoints ({columns}) VALUES (%s, %s, 2, %s, %s, %s)", saved)
    model = (saved[3], saved[2], job_id)
    columns = "id, source, root, project_id, job_id"
    database.execute(f"INSERT INTO models ({columns}) VALUES (%s, %s, 'tiny', 'proj_default', %s)", model)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    result = raydpo("files", "upload", rows).stdout.strip()
    database.execute("UPDATE jobs SET result_file = %s WHERE id = %s", (result, job_id))
    database.commit()
    return job_id, saved[3]


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


def test_a_job_without_results_says_where_to_look(raydpo, job_id):
    refused = raydpo("jobs", "results", job_id)
    assert refused.exit_code == 1
    assert f"{job_id} is queued and has no result file; `raydpo jobs metrics {job_id}` shows" in refused.stderr


def test_a_policy_is_shared_with_projects_and_no_longer(raydpo, trained):
    _, policy = trained
    projects = [raydpo("projects", "create", name).stdout.strip() for name in ("b", "c")]
    shared = raydpo("models", "share", policy, *projects)
    assert shared.exit_code == 0, shared.output
    assert {line.split("\t")[0] for line in shared.stdout.splitlines()} == set(projects)
    assert raydpo("models", "unshare", policy, projects[0]).stdout == f"no longer shared with {projects[0]}\n"
    (left,) = json.loads(raydpo("models", "share", policy, "--json").stdout)
    assert left["project_id"] == projects[1]
    refused = raydpo("models", "unshare", policy, projects[0])
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    for project in projects:
        raydpo("projects", "archive", project)


def test_lists_go_beyond_their_first_page(raydpo, database):
    named = [f"we_{number:03}" for number in range(101)]
    for name in named:
        row = (name, "https://localhost/", ["fine_tuning.job.failed"])
        columns = "id, project_id, name, url, event_types, secret"
        database.execute(
            f"INSERT INTO webhook_endpoints ({columns}) VALUES (%s, 'proj_default', 'many', %s, %s, 'whsec_a')", row
        )
    database.commit()
    try:
        assert {line.split("\t")[0] for line in raydpo("webhooks", "list", "--limit", 200).stdout.splitlines()} == set(
            named
        )
        assert {each["id"] for each in json.loads(raydpo("webhooks", "list", "--limit", 200, "--json").stdout)} == set(
            named
        )
    finally:
        database.execute("DELETE FROM webhook_endpoints WHERE name = 'many'")
        database.commit()


@pytest.mark.parametrize(
    "command",
    [
        ("files", "list"),
        ("jobs", "list"),
        ("models", "list"),
        ("keys", "list"),
        ("projects", "list"),
        ("webhooks", "list"),
        ("audit",),
    ],
)
def test_every_list_is_json_on_demand(raydpo, job_id, command):
    listed = json.loads(raydpo(*command, "--json").stdout)
    assert isinstance(listed, list)
    if listed:
        assert listed[0]["id"] in {each["id"] for each in listed}
        assert len(listed) == len(raydpo(*command).stdout.splitlines())


def test_brackets_in_names_and_messages_are_no_markup(raydpo, job_id):
    assert "hf://datasets/org/name/[/red]/a.jsonl" in raydpo("jobs", "events", job_id).stdout
    raydpo("jobs", "cancel", job_id)
    watched = raydpo("jobs", "watch", job_id)
    assert "hf://datasets/org/name/[/red]/a.jsonl" in watched.stdout
    assert "cancelled" in watched.stderr


@pytest.mark.parametrize("command", [("jobs", "show"), ("files", "content"), ("models", "delete"), ("keys", "revoke")])
def test_an_id_that_is_empty_is_refused_as_such(raydpo, command):
    refused = raydpo(*command, "")
    assert refused.exit_code == 2
    assert "Invalid value for 'ID': the id must not be empty" in refused.stderr
