"""Tests what the Helm chart promises: its values, names and security, and that its parts find each other."""

import re
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import helm_python
import pytest
import typer
import yaml

from dpo_core.config import Lora
from services.cli.app import app
from services.control_plane.http import health, metrics
from services.control_plane.settings import BaseModel, Settings
from services.deployment_settings import DeploymentSettings
from tests.deploy.manifests import (
    Manifest,
    container,
    environment,
    labels,
    one,
    pod_templates,
    ray_groups,
)
from tests.deploy.variants import VARIANTS

CHART = Path(__file__).parents[2] / "deploy" / "chart"
PYPROJECT = tomllib.loads((CHART.parents[1] / "pyproject.toml").read_text())

Render = Callable[..., list[Manifest]]

EXTRA = set(VARIANTS["pods with everything"]["pods"]["extraEnv"])


def test_helm_lint_finds_only_that_there_is_no_icon(values: dict[str, Any]) -> None:
    report = helm_python.lint(CHART, values, strict=True)
    assert report["errors"] == []
    assert [message["error"] for message in report["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize("missing", ["database.existingSecret", "storage.url", "api.existingSecret"])
def test_a_missing_value_is_named_in_a_sentence(render: Render, minimal: dict[str, Any], missing: str) -> None:
    group, name = missing.split(".")
    del minimal[group][name]
    with pytest.raises(helm_python.HelmRenderError, match=rf"{re.escape(missing)} must "):
        render(minimal)


def test_an_unknown_value_is_refused_by_name(chart: helm_python.Chart, render: Render, minimal: dict[str, Any]) -> None:
    for group in [None, *chart.values]:
        if group in ("models", "gpuWorkers"):  # names of models are the user's; groups are a list
            continue
        given = {name: dict(value) for name, value in minimal.items()}
        (given.setdefault(group, {}) if group else given)["mistyped"] = 1
        with pytest.raises(helm_python.HelmValuesError, match="'mistyped' not allowed"):
            render(given)


@pytest.mark.parametrize("url", ["/tmp/raydpo", "file:///raydpo", "s3://key:secret@bucket/raydpo"])
def test_storage_is_a_bucket_without_credentials_in_its_url(render: Render, minimal: dict[str, Any], url: str) -> None:
    minimal["storage"]["url"] = url
    with pytest.raises(helm_python.HelmValuesError, match="/storage/url"):
        render(minimal)


def test_no_value_is_missing_from_the_values_file(chart: helm_python.Chart) -> None:
    schema = chart.schema
    assert schema is not None
    assert set(schema["properties"]) == set(chart.values)
    for group in set(chart.values) - {"models", "settings", "pods", "gpuWorkers"}:
        assert set(schema["properties"][group]["properties"]) == set(chart.values[group])
    assert set(schema["definitions"]["pod"]["properties"]) == set(chart.values["pods"])
    (gpu,) = chart.values["gpuWorkers"]
    assert set(schema["properties"]["gpuWorkers"]["items"]["properties"]) == set(gpu)


def test_the_control_plane_reads_every_variable_and_the_file(
    manifests: list[Manifest], values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    template = pod_templates(manifests)["control-plane"]
    file = tmp_path / "raydpo.toml"
    file.write_text(one(manifests, "ConfigMap", "control-plane")["data"]["raydpo.toml"])
    own = {name: entry for name, entry in environment(template).items() if name not in EXTRA}
    for name, entry in own.items():
        monkeypatch.setenv(name, entry.get("value", "secret"))
    monkeypatch.setenv("RAYDPO_SETTINGS_FILE", str(file))

    settings = Settings(ray_url="http://head:8265")

    known = {field.validation_alias or f"RAYDPO_{name.upper()}" for name, field in Settings.model_fields.items()}
    assert set(own) <= known | {"OTEL_EXPORTER_OTLP_ENDPOINT"}
    assert settings.log_format == "json"
    sources = values.get("models", {}).items()
    given = {name: {"source": each} if isinstance(each, str) else each for name, each in sources}
    assert {name: model.model_dump(exclude_unset=True) for name, model in settings.models.items()} == given
    chosen, read = values.get("settings", {}), settings.model_dump(mode="json", exclude_unset=True)
    assert {name: read[name] for name in chosen} == chosen
    assert settings.storage_url == values["storage"]["url"]
    groups = one(manifests, "RayCluster")["spec"]["workerGroupSpecs"]
    cpus = [float(container(group["template"])["resources"]["limits"]["cpu"]) for group in groups]
    gpus = [float(group["rayStartParams"].get("num-gpus", 0)) for group in groups]
    most = [group["maxReplicas"] for group in groups]
    assert settings.max_cluster == {
        "CPU": sum(count * each for count, each in zip(most, cpus, strict=True)),
        "GPU": sum(count * each for count, each in zip(most, gpus, strict=True)),
    }


@pytest.mark.parametrize(
    ("values", "jobs", "models"),
    [
        ({}, 4, 4),  # a CPU pod for each
        ({"head": {"memory": "4Gi"}}, 2, 4),  # what the head carries
        ({"head": {"memory": "1500Mi"}, "cpuWorkers": {"maxReplicas": 1}}, 1, 2),
        ({"settings": {"num_gpus_per_worker": 1, "num_gpus_per_model": 0.5}}, 4, 8),
        (VARIANTS["several GPU groups"], 6, 4 * 4 + 4 * 2 + 4 * 1),
        ({"settings": {"num_gpus_per_worker": 1, "max_running_jobs": 50, "max_loaded_models": 3}}, 50, 3),
    ],
)
def test_as_many_jobs_and_models_as_fit_run_at_a_time(
    render: Render, minimal: dict[str, Any], values: dict[str, Any], jobs: int, models: int
) -> None:
    settings = tomllib.loads(one(render(minimal | values), "ConfigMap", "control-plane")["data"]["raydpo.toml"])
    assert (settings["max_running_jobs"], settings["max_loaded_models"]) == (jobs, models)
    assert settings["model_idle_seconds"] == 1800  # otherwise a model that nobody asks would keep its GPUs


@pytest.mark.parametrize(("memory", "warns"), [("8Gi", True), ("64Gi", False)])
def test_the_notes_say_if_the_head_is_too_small_for_the_jobs(
    chart: helm_python.Chart, minimal: dict[str, Any], memory: str, warns: bool
) -> None:
    values = minimal | {"settings": {"max_running_jobs": 50}, "head": {"memory": memory}}
    notes = chart.render(values, name="prod", namespace="ml")["raydpo/templates/NOTES.txt"]
    assert "At most 50 jobs run" in notes
    assert ("The head has memory for 6 of them" in notes) is warns


def test_the_chart_takes_the_settings_that_it_does_not_make_itself(chart: helm_python.Chart) -> None:
    schema = chart.schema
    assert schema is not None
    made = {
        "home",
        "settings_file",
        "database_url",
        "database_direct_url",
        "storage_url",
        "api_key",
        "advertised_url",
        "models",
        "max_cluster",
        "oidc_client_secret",  # a Secret that `pod.extraEnv` names
    }
    found = {"ray_url", "ray_token", "serve_url"}
    assert set(schema["properties"]["settings"]["properties"]) == set(Settings.model_fields) - made - found


def without_prose(schema: Any, definitions: dict[str, Any]) -> Any:
    """Returns what a JSON schema of pydantic demands: references resolved, without titles, defaults and None."""
    if isinstance(schema, list):
        return [without_prose(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return without_prose(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in schema:
        (schema,) = [kind for kind in schema["anyOf"] if kind != {"type": "null"}]
    prose = ("title", "description", "default")
    return {key: without_prose(value, definitions) for key, value in schema.items() if key not in prose}


def is_as_strict(schema: Any, other: Any) -> bool:
    """Whether a schema demands all that another one does. The schema `false` refuses everything, such as a key that
    must be in a Secret.
    """
    if schema is False:
        return True
    if isinstance(other, dict):
        return all(key in schema and is_as_strict(schema[key], value) for key, value in other.items())
    return bool(schema == other)


def test_a_setting_that_the_service_would_not_start_with_is_refused(chart: helm_python.Chart) -> None:
    schema, service = chart.schema, Settings.model_json_schema()
    assert schema is not None
    for name, ours in schema["properties"]["settings"]["properties"].items():
        theirs = without_prose(service["properties"][name], service["$defs"])
        assert is_as_strict(ours, theirs), f"settings.{name} must demand {theirs}"


def test_a_model_has_the_fields_that_the_service_knows(chart: helm_python.Chart) -> None:
    schema = chart.schema
    assert schema is not None
    model = schema["properties"]["models"]["additionalProperties"]["properties"]
    assert set(model) == set(BaseModel.model_fields)
    assert set(model["deployment"]["propertyNames"]["enum"]) == set(DeploymentSettings.model_fields)
    assert set(model["adapter"]["else"]["propertyNames"]["enum"]) == {field.name for field in fields(Lora)}


def test_prometheus_finds_the_control_plane_and_traces_go_where_they_shall(
    render: Render, full: dict[str, Any], minimal: dict[str, Any]
) -> None:
    manifests = render(full)
    monitor, service = one(manifests, "ServiceMonitor"), one(manifests, "Service")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels(service).items()
    assert labels(monitor)["release"] == "prometheus"
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint == {"port": "http", "path": metrics.router.routes[0].path, "interval": "15s"}  # type: ignore[attr-defined]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    templates = pod_templates(manifests)
    scraped = templates["control-plane"]["metadata"]["annotations"]
    assert scraped["prometheus.io/port"] == str(container(templates["control-plane"])["ports"][0]["containerPort"])
    traced = {name for name, each in templates.items() if "OTEL_EXPORTER_OTLP_ENDPOINT" in environment(each)}
    assert traced >= {"control-plane", "head"}
    assert traced | {"migration"} == set(templates)
    (of_ray,) = one(manifests, "PodMonitor")["spec"]["podMetricsEndpoints"]
    for name in ("head", "cpu", "gpu"):
        assert (
            one(manifests, "PodMonitor")["spec"]["selector"]["matchLabels"].items() <= labels(templates[name]).items()
        )
        assert {"name": of_ray["port"], "containerPort": 8080} in container(templates[name])["ports"]
    plain = render(minimal)
    assert "ServiceMonitor" not in {manifest["kind"] for manifest in plain}
    assert not any("OTEL_EXPORTER_OTLP_ENDPOINT" in environment(each) for each in pod_templates(plain).values())


def test_every_container_is_confined(manifests: list[Manifest]) -> None:
    autoscaler = one(manifests, "RayCluster")["spec"]["autoscalerOptions"]
    for template in pod_templates(manifests).values():
        pod = template["spec"]["securityContext"]
        assert pod["runAsNonRoot"] is True
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        for confined in (container(template), autoscaler):
            context = confined["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert "/tmp" in {mount["mountPath"] for mount in confined["volumeMounts"]}


def test_every_container_is_limited(manifests: list[Manifest]) -> None:
    for template in pod_templates(manifests).values():
        resources = container(template)["resources"]
        assert resources["requests"].keys() == resources["limits"].keys() >= {"cpu", "memory"}
        assert all(volume["emptyDir"]["sizeLimit"] for volume in template["spec"]["volumes"] if "emptyDir" in volume)


def test_only_the_head_may_speak_to_kubernetes(manifests: list[Manifest]) -> None:
    templates = pod_templates(manifests)
    assert [name for name in templates if templates[name]["spec"]["automountServiceAccountToken"]] == ["head"]


def test_secrets_are_references(manifests: list[Manifest]) -> None:
    assert "Secret" not in {manifest["kind"] for manifest in manifests}
    for template in pod_templates(manifests).values():
        for name, entry in environment(template).items():
            if re.search("DATABASE_URL|KEY|TOKEN|SECRET|PASSWORD|LICENSE", name):
                assert set(entry) == {"name", "valueFrom"}, name
                assert set(entry["valueFrom"]) == {"secretKeyRef"}, name


def test_storage_credentials_reach_whoever_touches_storage(render: Render, full: dict[str, Any]) -> None:
    templates = pod_templates(render(full))
    given = {
        name for name in templates if {"secretRef": {"name": "bucket"}} in container(templates[name]).get("envFrom", [])
    }
    assert given == {"control-plane", "head", "cpu", "gpu"}


def test_the_hub_s_token_reaches_ray_and_not_the_control_plane(render: Render) -> None:
    templates = pod_templates(render(VARIANTS["a warm cache"]))
    given = {
        name for name in templates if {"secretRef": {"name": "hub"}} in container(templates[name]).get("envFrom", [])
    }
    assert given == {"head", "cpu", "gpu", "warm-up"}


def test_keys_of_integrations_reach_the_head_alone(render: Render, minimal: dict[str, Any]) -> None:
    minimal["integrations"] = {"existingSecret": "followed"}
    templates = pod_templates(render(minimal))
    given = {name: container(templates[name]).get("envFrom", []) for name in templates}
    assert {name: sources for name, sources in given.items() if sources} == {
        "head": [{"secretRef": {"name": "followed"}}]
    }


def test_the_control_plane_finds_ray_and_holds_its_token(manifests: list[Manifest]) -> None:
    cluster = one(manifests, "RayCluster")
    name, auth = cluster["metadata"]["name"], cluster["spec"]["authOptions"]
    control_plane = pod_templates(manifests)["control-plane"]
    assert container(control_plane)["args"][-2:] == ["--ray-address", f"http://{name}-head-svc:8265"]
    assert auth["mode"] == "token"
    token = environment(control_plane)["RAYDPO_RAY_TOKEN"]["valueFrom"]["secretKeyRef"]
    # KubeRay names a Secret that it makes after the cluster, and the key is always this one.
    assert token == {"name": auth.get("secretName", name), "key": "auth_token"}


def test_training_finds_the_control_plane(manifests: list[Manifest]) -> None:
    service, template = one(manifests, "Service"), pod_templates(manifests)["control-plane"]
    (port,) = service["spec"]["ports"]
    advertised = environment(template)["RAYDPO_ADVERTISED_URL"]["value"]
    assert advertised == f"http://{service['metadata']['name']}.ml.svc:{port['port']}"
    assert service["spec"]["selector"].items() <= labels(template).items()
    (http,) = container(template)["ports"]
    assert (http["name"], str(http["containerPort"])) == (port["targetPort"], container(template)["args"][4])


def test_probes_ask_routes_that_the_control_plane_has(manifests: list[Manifest]) -> None:
    probed = container(pod_templates(manifests)["control-plane"])
    liveness, readiness = probed["livenessProbe"]["httpGet"]["path"], probed["readinessProbe"]["httpGet"]["path"]
    assert liveness != readiness  # a database that is away must not restart the pods
    assert {liveness, readiness} <= {route.path for route in health.router.routes}  # type: ignore[attr-defined]


def test_containers_run_commands_that_raydpo_has(manifests: list[Manifest]) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for component in ("control-plane", "migration"):
        run = container(pod_templates(manifests)[component])
        name, *options = run["args"]
        assert run["command"] == ["raydpo"]
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert {option for option in options if option.startswith("--")} <= known


def test_the_migration_needs_nothing_of_the_release(manifests: list[Manifest]) -> None:
    job = one(manifests, "Job", "migration")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    spec = job["spec"]["template"]["spec"]
    assert "serviceAccountName" not in spec
    assert {volume["name"] for volume in spec["volumes"]} <= {"scratch", "certificates"}
    assert set(environment(job["spec"]["template"])) - {"DATABASE_DIRECT_URL"} - EXTRA == {"DATABASE_URL"}


def test_a_database_behind_a_pooler_is_migrated_and_listened_to_directly(
    render: Render, minimal: dict[str, Any], full: dict[str, Any]
) -> None:
    for template in (
        one(render(full), "Job", "migration")["spec"]["template"],
        pod_templates(render(full))["control-plane"],
    ):
        direct = environment(template)["DATABASE_DIRECT_URL"]
        assert direct["valueFrom"]["secretKeyRef"] == {"name": "postgres", "key": "direct-url"}
    assert "DATABASE_DIRECT_URL" not in environment(pod_templates(render(minimal))["control-plane"])


def test_settings_that_change_restart_the_control_plane(render: Render, minimal: dict[str, Any]) -> None:
    before = pod_templates(render(minimal))["control-plane"]
    after = pod_templates(render(minimal | {"models": {"tiny": "s3://bucket/tiny"}}))["control-plane"]
    assert before["metadata"]["annotations"] != after["metadata"]["annotations"]


def test_one_replica_can_be_evicted_and_of_several_one_at_a_time(
    render: Render, minimal: dict[str, Any], full: dict[str, Any]
) -> None:
    assert "PodDisruptionBudget" not in {manifest["kind"] for manifest in render(minimal)}
    budget = one(render(full), "PodDisruptionBudget", "control-plane")["spec"]
    assert budget["maxUnavailable"] == 1
    assert budget["selector"]["matchLabels"].items() <= labels(pod_templates(render(full))["control-plane"]).items()


def test_gpus_are_asked_for_by_the_gpu_group_alone(render: Render, full: dict[str, Any]) -> None:
    groups = ray_groups(render(full))
    gpus = {
        name: container(group["template"])["resources"]["limits"].get("nvidia.com/gpu")
        for name, group in groups.items()
    }
    assert gpus == {"head": None, "cpu": None, "gpu": 8}
    assert container(groups["gpu"]["template"])["image"].endswith("-gpu")


def test_workers_come_and_go_between_their_bounds(render: Render, full: dict[str, Any]) -> None:
    manifests = render(full)
    groups = ray_groups(manifests)
    assert one(manifests, "RayCluster")["spec"]["enableInTreeAutoscaling"] is True
    bounds = {name: (groups[name]["minReplicas"], groups[name]["maxReplicas"]) for name in ("cpu", "gpu")}
    assert bounds == {"cpu": (2, 20), "gpu": (1, 8)}
    assert not any("replicas" in group for group in groups.values())  # nothing runs yet


@pytest.mark.parametrize("release", ["raydpo", "1st", "123", "a.b", "r" * 53, "raydpo-" + "x" * 46])
def test_names_are_dns_labels_that_kuberay_does_not_cut(render: Render, minimal: dict[str, Any], release: str) -> None:
    manifests = render(VARIANTS["a warm cache"] | VARIANTS["guarded and scaled"], release)
    names = [manifest["metadata"]["name"] for manifest in manifests]
    assert all(re.fullmatch("[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name) for name in names)
    assert len(one(manifests, "RayCluster")["metadata"]["name"] + "-head-svc") <= 50
    assert {labels(manifest)["app.kubernetes.io/instance"] for manifest in manifests} == {release}


def test_everything_is_labelled(manifests: list[Manifest]) -> None:
    common = {f"app.kubernetes.io/{name}" for name in ("name", "instance", "component")}
    release = common | {f"app.kubernetes.io/{name}" for name in ("version", "part-of", "managed-by")}
    assert all(labels(manifest).keys() >= release for manifest in manifests)
    assert all(labels(template).keys() >= common for template in pod_templates(manifests).values())


def test_versions_are_those_of_the_project(chart: helm_python.Chart, manifests: list[Manifest]) -> None:
    version = PYPROJECT["project"]["version"]
    assert chart.metadata["appVersion"] == version
    defaults = chart.values["images"]
    assert [defaults[name].split(":")[1] for name in ("controlPlane", "ray", "rayGpu")] == [
        version,
        f"{version}-cpu",
        f"{version}-gpu",
    ]
    pins = " ".join(PYPROJECT["project"]["optional-dependencies"]["cluster"])
    assert f"=={one(manifests, 'RayCluster')['spec']['rayVersion']} " in re.search(r"ray\[.*?\]\S+ ", pins)[0]  # type: ignore[index]


def test_the_values_of_the_guide_render(render: Render) -> None:
    guide = (CHART.parents[1] / "docs" / "operate" / "kubernetes.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)
    assert render(yaml.safe_load(example))
