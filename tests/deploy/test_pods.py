"""Tests what the chart gives its pods: Pod Security `restricted`, places, priorities, volumes and their ends."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.deploy.manifests import (
    COMPONENT,
    Manifest,
    container,
    labels,
    one,
    plain_environment,
    pod_templates,
    ray_groups,
    violations,
)
from tests.deploy.variants import AFFINITY, NCCL, VARIANTS, group

Render = Callable[..., list[Manifest]]


def test_every_pod_is_restricted(manifests: list[Manifest]) -> None:
    autoscaler = one(manifests, "RayCluster")["spec"]["autoscalerOptions"]
    for name, template in pod_templates(manifests).items():
        assert violations(template, *([autoscaler] if name == "head" else [])) == []


def test_fetched_models_leave_room_on_each_of_rays_pods(render: Render, minimal: dict[str, Any]) -> None:
    minimal["cpuWorkers"] = {"scratch": "10Gi"}
    groups = ray_groups(render(minimal))
    assert plain_environment(groups["cpu"]["template"])["RAYDPO_COPIES_BYTES"] == str(6 * 2**30)
    assert all("RAYDPO_COPIES_BYTES" in plain_environment(group["template"]) for group in groups.values())


def test_a_volume_of_the_host_is_a_violation(render: Render, minimal: dict[str, Any]) -> None:
    minimal["pods"] = {"extraVolumes": [{"name": "host", "hostPath": {"path": "/"}}]}
    assert all(violations(template) for template in pod_templates(render(minimal)).values())


def test_no_service_of_the_namespace_sets_variables(manifests: list[Manifest]) -> None:
    assert all(template["spec"]["enableServiceLinks"] is False for template in pod_templates(manifests).values())


def test_what_all_pods_have_every_pod_has(render: Render) -> None:
    for name, template in pod_templates(render(VARIANTS["pods with everything"])).items():
        spec, run = template["spec"], container(template)
        assert labels(template)["team"] == "ml"
        assert template["metadata"]["annotations"]["example.com/owner"] == "ml"
        assert spec["nodeSelector"] == {"disk": "ssd"}
        assert spec["tolerations"][0]["key"] == ("nvidia.com/gpu" if name == "gpu" else "dedicated")
        assert spec["affinity"] == AFFINITY
        assert (spec["priorityClassName"], spec["runtimeClassName"], spec["schedulerName"]) == (
            "high",
            "gvisor",
            "volcano",
        )
        assert spec["terminationGracePeriodSeconds"] == (80 if name == "control-plane" else 60)
        assert plain_environment(template)["HTTPS_PROXY"] == "http://proxy:3128"
        assert {"name": "certificates", "mountPath": "/etc/certificates", "readOnly": True} in run["volumeMounts"]
        assert {"name": "certificates", "configMap": {"name": "certificates"}} in spec["volumes"]


def test_a_kind_of_pod_adds_to_tables_and_replaces_the_rest(render: Render, minimal: dict[str, Any]) -> None:
    minimal["pods"] = {"nodeSelector": {"disk": "ssd"}, "priorityClassName": "low", "extraEnv": {"A": "1"}}
    minimal["ray"] = {"pod": {"priorityClassName": "middle", "extraEnv": {"B": "2"}}}
    minimal["head"] = {"pod": {"nodeSelector": {"pool": "head"}, "priorityClassName": "high", "extraEnv": {"A": "3"}}}
    pods = pod_templates(render(minimal))
    classes = {name: pods[name]["spec"]["priorityClassName"] for name in pods}
    assert classes == {"control-plane": "low", "migration": "low", "head": "high", "cpu": "middle", "gpu": "middle"}
    assert pods["head"]["spec"]["nodeSelector"] == {"disk": "ssd", "pool": "head"}
    environments = {name: plain_environment(pods[name]) for name in pods}
    assert (environments["head"]["A"], environments["head"]["B"], environments["cpu"]["A"]) == ("3", "2", "1")


def test_control_planes_spread_over_nodes_by_their_own_labels(render: Render, minimal: dict[str, Any]) -> None:
    template = pod_templates(render(minimal))["control-plane"]
    (spread,) = template["spec"]["topologySpreadConstraints"]
    assert spread["topologyKey"] == "kubernetes.io/hostname"
    assert spread["labelSelector"]["matchLabels"] == labels(template)


def test_no_autoscaler_of_nodes_moves_ray(render: Render, minimal: dict[str, Any]) -> None:
    for name, each in ray_groups(render(minimal)).items():
        assert each["template"]["metadata"]["annotations"] == {
            "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
            "karpenter.sh/do-not-disrupt": "true",
        }, name


def test_each_group_has_its_own_gpus_place_and_environment(render: Render) -> None:
    groups = ray_groups(render(VARIANTS["several GPU groups"]))
    assert list(groups) == ["head", "cpu", "h100", "a100-spot", "mig"]
    h100, spot, mig = (groups[name] for name in ("h100", "a100-spot", "mig"))
    for kind in ("requests", "limits"):
        resources = container(h100["template"])["resources"][kind]
        assert resources["nvidia.com/gpu"] == 8
        assert (resources["vpc.amazonaws.com/efa"], resources["hugepages-2Mi"]) == ("4", "5120Mi")
        assert container(mig["template"])["resources"][kind]["nvidia.com/mig-3g.40gb"] == 2
    assert [group["rayStartParams"]["num-gpus"] for group in (h100, spot, mig)] == ["8", "4", "2"]
    assert (h100["priority"], spot.get("priority")) == (10, None)
    assert (h100["idleTimeoutSeconds"], spot.get("idleTimeoutSeconds")) == (1800, None)
    assert h100["template"]["spec"]["nodeSelector"] == {"gpu": "h100"}
    assert spot["template"]["spec"]["tolerations"] == [{"key": "spot", "operator": "Exists"}]
    assert NCCL.items() <= plain_environment(h100["template"]).items()
    assert not NCCL.keys() & plain_environment(spot["template"]).keys()


def test_a_group_without_an_idle_time_of_its_own_has_that_of_the_cluster(
    render: Render, minimal: dict[str, Any]
) -> None:
    spec = one(render(minimal | {"ray": {"idleTimeoutSeconds": 3600}}), "RayCluster")["spec"]
    assert spec["autoscalerOptions"]["idleTimeoutSeconds"] == 3600
    assert not [group for group in spec["workerGroupSpecs"] if "idleTimeoutSeconds" in group]


def test_kueue_finds_its_queue_on_the_cluster(render: Render) -> None:
    metadata = one(render(VARIANTS["queued by Kueue"]), "RayCluster")["metadata"]
    assert metadata["labels"]["kueue.x-k8s.io/queue-name"] == "ml"
    assert metadata["annotations"] == {"kueue.x-k8s.io/elastic-job": "true"}


def test_volcano_finds_its_queue_and_priority_on_the_cluster(render: Render) -> None:
    found = labels(one(render(VARIANTS["a gang of Volcano's"]), "RayCluster"))
    assert (found["volcano.sh/queue-name"], found["ray.io/priority-class-name"]) == ("ml", "high")


def test_the_autoscaler_has_the_size_that_the_values_say(render: Render, minimal: dict[str, Any]) -> None:
    minimal["ray"] = {"autoscalerMemory": "2Gi"}
    resources = one(render(minimal), "RayCluster")["spec"]["autoscalerOptions"]["resources"]
    assert resources["requests"] == resources["limits"] == {"cpu": "500m", "memory": "2Gi"}


def test_what_ray_s_head_writes_is_limited(manifests: list[Manifest]) -> None:
    """KubeRay adds a volume without a limit to a container in which nothing is mounted at exactly /tmp/ray."""
    autoscaler = one(manifests, "RayCluster")["spec"]["autoscalerOptions"]
    for each in (container(pod_templates(manifests)["head"]), autoscaler):
        assert {"name": "scratch", "mountPath": "/tmp/ray", "subPath": "ray"} in each["volumeMounts"]


def test_ray_keeps_its_state_where_the_values_say(render: Render, minimal: dict[str, Any]) -> None:
    def state(values: dict[str, Any]) -> Any:
        return one(render(values), "RayCluster")["spec"].get("gcsFaultToleranceOptions")

    assert state(minimal) is None
    redis = state(VARIANTS["state in Redis"])
    assert redis["redisAddress"] == "rediss://redis:6379"
    assert redis["redisPassword"] == {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "redis-password"}}}
    assert redis["redisUsername"] == {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "redis-username"}}}
    assert state(VARIANTS["state in RocksDB"]) == {
        "backend": "rocksdb",
        "storage": {"size": "20Gi", "storageClassName": "fast"},
    }


def test_models_are_fetched_once_into_the_claim_that_all_of_ray_mounts(render: Render) -> None:
    manifests = render(VARIANTS["a warm cache"])
    pods = pod_templates(manifests)
    for name in ("head", "cpu", "gpu", "warm-up"):
        assert {"name": "hub", "mountPath": "/models"} in container(pods[name])["volumeMounts"]
        assert plain_environment(pods[name])["HF_HOME"] == "/models"
        assert pods[name]["spec"]["securityContext"]["fsGroup"] == 1000
        assert {"name": "hub", "persistentVolumeClaim": {"claimName": "models"}} in pods[name]["spec"]["volumes"]
    assert sorted(container(pods["warm-up"])["args"]) == ["Qwen/Qwen3-0.6B", "openai/gpt"]
    plain = pod_templates(render(VARIANTS["minimal"]))
    assert not any("HF_HOME" in plain_environment(pod) for pod in plain.values())


def test_another_job_warms_other_models(render: Render) -> None:
    def name(**changes: Any) -> str:
        return str(one(render(VARIANTS["a warm cache"] | changes), "Job", "warm-up")["metadata"]["name"])

    assert name() == name()
    assert len({name(), name(models={"a": "Qwen/Other"}), name(images={"ray": "another"})}) == 3
    assert all(re.fullmatch("raydpo-prod-warm-up-[0-9a-f]{8}", each) for each in (name(), name(models={"a": "b"})))


def test_a_control_plane_that_ends_answers_on_while_others_take_over(render: Render, full: dict[str, Any]) -> None:
    full["controlPlane"] |= {"drainSeconds": 45}
    template = pod_templates(render(full))["control-plane"]
    assert container(template)["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "45"]
    assert template["spec"]["terminationGracePeriodSeconds"] == 75


def test_a_control_plane_that_starts_slowly_or_answers_late_is_left_alone(manifests: list[Manifest]) -> None:
    run = container(pod_templates(manifests)["control-plane"])
    startup, liveness = run["startupProbe"], run["livenessProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 300
    assert startup["httpGet"] == liveness["httpGet"]
    assert liveness["timeoutSeconds"] >= 10


def test_a_budget_holds_the_pods_of_its_group_however_many_there_are(render: Render) -> None:
    manifests = render(VARIANTS["guarded and scaled"])
    of_ray = [each for each in manifests if each["kind"] == "PodDisruptionBudget" and labels(each)[COMPONENT] == "ray"]
    held = {each["metadata"]["name"]: each["spec"] for each in of_ray}
    assert {name: budget["minAvailable"] for name, budget in held.items()} == {
        "raydpo-prod-ray-head": 1,
        "raydpo-prod-ray-h100": 4,  # as many as there may be
    }
    # KubeRay labels its pods so.
    assert held["raydpo-prod-ray-head"]["selector"]["matchLabels"]["ray.io/node-type"] == "head"
    assert held["raydpo-prod-ray-h100"]["selector"]["matchLabels"]["ray.io/group"] == "h100"


def test_tmp_is_on_a_volume_of_its_own_where_the_values_say(render: Render, minimal: dict[str, Any]) -> None:
    minimal["gpuWorkers"] = [group("h100", pod={"scratchStorageClass": "fast"})]
    pods = pod_templates(render(minimal))
    (scratch,) = [volume for volume in pods["h100"]["spec"]["volumes"] if volume["name"] == "scratch"]
    claim = scratch["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert (claim["storageClassName"], claim["resources"]["requests"]["storage"]) == ("fast", "500Gi")
    assert {"name": "scratch", "emptyDir": {"sizeLimit": "50Gi"}} in pods["cpu"]["spec"]["volumes"]


def test_an_autoscaler_alone_says_how_many_control_planes_there_are(render: Render, full: dict[str, Any]) -> None:
    manifests = render(VARIANTS["guarded and scaled"])
    scaler = one(manifests, "HorizontalPodAutoscaler")["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 6)
    assert scaler["scaleTargetRef"]["name"] == one(manifests, "Deployment")["metadata"]["name"]
    assert "replicas" not in one(manifests, "Deployment")["spec"]
    assert one(render(full), "Deployment")["spec"]["replicas"] == 3
    assert "HorizontalPodAutoscaler" not in {manifest["kind"] for manifest in render(full)}


@pytest.mark.parametrize("policy", ["Always", "Never"])
def test_the_autoscaler_is_pulled_as_ray_is(render: Render, minimal: dict[str, Any], policy: str) -> None:
    options = one(render(minimal | {"images": {"pullPolicy": policy}}), "RayCluster")["spec"]["autoscalerOptions"]
    assert options["imagePullPolicy"] == policy
    assert {"name": "HOME", "value": "/tmp"} in options["env"]
