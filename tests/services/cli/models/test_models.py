"""Tests the commands of models."""

import json


def test_models_lists_by_itself(raydpo):
    assert raydpo("models").stdout == raydpo("models", "list").stdout
    assert json.loads(raydpo("models", "show", "tiny").stdout)["id"] == "tiny"
    refused = raydpo("models", "delete", "tiny")
    assert refused.exit_code == 1
    assert refused.stderr.count("\n") == 1


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
