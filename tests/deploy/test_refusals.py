"""Tests that the chart refuses, by name, what Kubernetes or KubeRay would refuse silently or never carry out."""

import copy
import re
from collections.abc import Callable
from typing import Any

import helm_python
import pytest

from tests.deploy.manifests import Manifest
from tests.deploy.variants import MINIMAL, group

Render = Callable[..., list[Manifest]]

EMPTY = {"name": "data", "emptyDir": {}}

SENTENCES = {
    "workers below their minimum": (
        {"cpuWorkers": {"minReplicas": 5}},
        "the group cpu has minReplicas 5 above maxReplicas 4, which KubeRay refuses; lower minReplicas",
    ),
    "GPU workers below their minimum": (
        {"gpuWorkers": [group("h100", minReplicas=9)]},
        "the group h100 has minReplicas 9 above maxReplicas 4, which KubeRay refuses; lower minReplicas",
    ),
    "two groups of one name": (
        {"gpuWorkers": [group("a"), group("a")]},
        "two groups have the name a; give each a name of its own",
    ),
    "a GPU group with the name of the CPU group": (
        {"gpuWorkers": [group("cpu")]},
        "two groups have the name cpu; give each a name of its own",
    ),
    "a GPU group with the name of KubeRay's group of the head": (
        {"gpuWorkers": [group("headgroup")]},
        "two groups have the name headgroup; give each a name of its own",
    ),
    "a worker that fits into no pod": (
        {"settings": {"num_gpus_per_worker": 2}},
        "settings.num_gpus_per_worker is 2, but no pod of gpuWorkers may have so many GPUs; lower it, or raise gpus",
    ),
    "a model without GPUs": (
        {"settings": {"num_gpus_per_model": 1}, "gpuWorkers": []},
        "settings.num_gpus_per_model is 1, but no pod of gpuWorkers may have so many GPUs",
    ),
    "Redis without an address": (
        {"gcs": {"backend": "redis"}},
        "gcs.redisAddress must be Redis' host:port, because gcs.backend is redis",
    ),
    "an address of Redis that nobody uses": (
        {"gcs": {"redisAddress": "redis:6379"}},
        "gcs.redisAddress is set, but gcs.backend is not redis; set it to redis",
    ),
    "a user of Redis without a Secret": (
        {"gcs": {"backend": "redis", "redisAddress": "redis:6379", "redisUser": True}},
        "gcs.redisSecret must name the Secret that holds redis-username",
    ),
    "warming up without a claim": (
        {"hub": {"warmUp": True}},
        "hub.cacheClaim must name the claim that hub.warmUp is to fill",
    ),
    "restricted egress without the database": (
        {"egress": {"restricted": True}},
        "egress.allowTo must lead to the database and to Kubernetes' API",
    ),
    "a mount of no volume": (
        {"head": {"pod": {"extraVolumeMounts": [{"name": "data", "mountPath": "/data"}]}}},
        "extraVolumeMounts: there is no volume data; add it to extraVolumes of the same pod",
    ),
    "two mounts at one place": (
        {"head": {"pod": {"extraVolumes": [EMPTY], "extraVolumeMounts": [{"name": "data", "mountPath": "/tmp/ray/"}]}}},
        "extraVolumeMounts: something is mounted at /tmp/ray already; choose another mountPath",
    ),
    "a mount over the cache of models": (
        {
            "hub": {"cacheClaim": "models"},
            "pods": {"extraVolumes": [EMPTY], "extraVolumeMounts": [{"name": "data", "mountPath": "/models"}]},
        },
        "extraVolumeMounts: something is mounted at /models already; choose another mountPath",
    ),
    "a volume with the name of the chart's": (
        {"pods": {"extraVolumes": [{"name": "scratch", "emptyDir": {}}]}},
        "extraVolumes: the name scratch is the chart's own; give the volume another one",
    ),
    "a model that fits into no pod": (
        {"models": {"big": {"source": "org/big", "deployment": {"num_gpus": 8}}}},
        "models.big.deployment.num_gpus is 8, but no pod of gpuWorkers may have so many GPUs",
    ),
    "alerts without what they read": (
        {"observability": {"alerts": True}},
        "observability.serviceMonitor must be true, because observability.alerts reads what it scrapes",
    ),
    "a Redis that KubeRay is not told of": (
        {"head": {"pod": {"extraEnv": {"RAY_REDIS_ADDRESS": "redis:6379"}}}},
        "extraEnv: KubeRay refuses a cluster with RAY_REDIS_ADDRESS; use gcs.redisAddress and gcs.redisSecret",
    ),
    "another autoscaler": (
        {"head": {"pod": {"extraEnv": {"RAY_enable_autoscaler_v2": "1"}}}},
        "extraEnv: the chart sets RAY_enable_autoscaler_v2 itself; leave it out",
    ),
    "an annotation that KubeRay refuses": (
        {"ray": {"annotations": {"ray.io/ft-enabled": "true"}}},
        "ray.annotations: KubeRay refuses ray.io/ft-enabled beside what the chart sets; use gcs.backend",
    ),
    "a variable that the chart sets": (
        {"ray": {"pod": {"extraEnv": {"HOME": "/root"}}}},
        "extraEnv: the chart sets HOME itself; leave it out",
    ),
}


def toleration(**given: Any) -> dict[str, Any]:
    return {"cpuWorkers": {"pod": {"tolerations": [given]}}}


def affinity(**expression: Any) -> dict[str, Any]:
    terms = {"nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", **expression}]}]}
    required = {"requiredDuringSchedulingIgnoredDuringExecution": terms}
    return {"head": {"pod": {"affinity": {"nodeAffinity": required}}}}


SCHEMA = {
    "an operator of tolerations": (toleration(key="a", operator="Exits"), "tolerations/0/operator"),
    "a value beside Exists": (toleration(key="a", operator="Exists", value="b"), "tolerations/0"),
    "a toleration of nothing": (toleration(value="b"), "tolerations/0"),
    "an effect": (toleration(key="a", operator="Exists", effect="NoSchedul"), "tolerations/0/effect"),
    "seconds without NoExecute": (toleration(key="a", value="b", tolerationSeconds=3), "tolerations/0"),
    "a mistyped field of a toleration": (toleration(keys="a", operator="Exists"), "tolerations/0"),
    "a label's value": ({"cpuWorkers": {"pod": {"nodeSelector": {"zone": "eu west"}}}}, "nodeSelector/zone"),
    "a label's key": ({"cpuWorkers": {"pod": {"nodeSelector": {"a zone": "x"}}}}, "'a zone'"),
    "a label that is a number": ({"cpuWorkers": {"pod": {"nodeSelector": {"gen": 5}}}}, "nodeSelector/gen"),
    "a label of the chart's own": ({"pods": {"labels": {"app.kubernetes.io/name": "x"}}}, "'app.kubernetes.io/name'"),
    "an operator of affinity": (affinity(operator="Is", values=["a"]), "matchExpressions/0/operator"),
    "affinity without values": (affinity(operator="In"), "matchExpressions/0"),
    "affinity with values too many": (affinity(operator="Exists", values=["a"]), "matchExpressions/0"),
    "a spread": ({"pods": {"topologySpreadConstraints": [{"maxSkew": 1}]}}, "topologySpreadConstraints/0"),
    "a priority class": ({"pods": {"priorityClassName": "Very High"}}, "priorityClassName"),
    "a variable's name": ({"pods": {"extraEnv": {"NCCL-DEBUG": "INFO"}}}, "'NCCL-DEBUG'"),
    "a variable that is a number": ({"pods": {"extraEnv": {"NCCL_IB_TIMEOUT": 22}}}, "extraEnv/NCCL_IB_TIMEOUT"),
    "a volume of two kinds": ({"pods": {"extraVolumes": [{"name": "a", "emptyDir": {}, "nfs": {}}]}}, "extraVolumes/0"),
    "a peer": ({"api": {"allowFrom": [{"podSelectors": {}}]}}, "allowFrom/0"),
    "a peer's selector": ({"api": {"allowFrom": [{"podSelector": {"app": "web"}}]}}, "allowFrom/0/podSelector"),
    "a pull secret": ({"images": {"pullSecrets": [{"named": "x"}]}}, "pullSecrets/0"),
    "a quantity": ({"head": {"memory": "8 GB"}}, "head/memory"),
    "a GPU that Ray does not know": ({"gpuWorkers": [group("a", gpuResource="google.com/tpu")]}, "gpuResource"),
    "half a device": (
        {"gpuWorkers": [group("a", resources={"vpc.amazonaws.com/efa": "500m"})]},
        "resources/vpc.amazonaws.com~1efa",
    ),
    "a resource that Kubernetes does not know": ({"head": {"resources": {"disk": "5Gi"}}}, "'disk'"),
    "GPUs beside the group's": ({"gpuWorkers": [group("a", resources={"nvidia.com/gpu": 1})]}, "'nvidia.com/gpu'"),
    "GPUs of the head": ({"head": {"resources": {"nvidia.com/gpu": 1}}}, "'nvidia.com/gpu'"),
    "a group's name": ({"gpuWorkers": [group("H100_big")]}, "gpuWorkers/0/name"),
    "a group without a size": ({"gpuWorkers": [{"name": "a"}]}, "gpuWorkers/0"),
    "GPU workers as one table": ({"gpuWorkers": {"gpus": 8}}, "gpuWorkers"),
    "a label of KubeRay's own": ({"ray": {"labels": {"ray.io/cluster": "x"}}}, "'ray.io/cluster'"),
    "no jobs at all": ({"settings": {"max_running_jobs": 0}}, "settings/max_running_jobs"),
    "a GPU and a half": ({"settings": {"num_gpus_per_model": 1.5}}, "settings/num_gpus_per_model"),
    "a number type": ({"settings": {"dtype": "fp8"}}, "settings/dtype"),
    "an issuer without an audience": ({"settings": {"oidc_issuer": "https://issuer.example"}}, "/settings"),
    "a judge's key outside of a Secret": (
        {"settings": {"judges": {"j": {"url": "https://host/v1", "model": "m", "api_key": "sk-1"}}}},
        "settings/judges/j/api_key",
    ),
    "a judge's address with a query": (
        {"settings": {"judges": {"j": {"url": "https://host/v1?key=1", "model": "m"}}}},
        "settings/judges/j/url",
    ),
    "roles without an issuer": ({"settings": {"oidc_roles": []}}, "oidc_issuer"),
    "a field of a deployment": (
        {"models": {"a": {"source": "org/a", "deployment": {"gpus": 2}}}},
        "'gpus'",
    ),
    "an adapter": ({"models": {"a": {"source": "org/a", "adapter": "lora"}}}, "models/a"),
    "a backend of the head's state": ({"gcs": {"backend": "etcd"}}, "gcs/backend"),
}


def given(values: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(MINIMAL) | values


@pytest.mark.parametrize(("values", "sentence"), SENTENCES.values(), ids=SENTENCES)
def test_what_could_never_run_is_refused_in_a_sentence(render: Render, values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(helm_python.HelmRenderError, match=re.escape(sentence)):
        render(given(values))


@pytest.mark.parametrize(("values", "place"), SCHEMA.values(), ids=SCHEMA)
def test_what_kubernetes_would_not_take_is_refused_by_its_place(
    render: Render, values: dict[str, Any], place: str
) -> None:
    with pytest.raises(helm_python.HelmValuesError, match=re.escape(place)):
        render(given(values))
