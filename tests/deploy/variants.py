"""The sets of values with which the chart is rendered for every test of what always holds."""

from typing import Any

Values = dict[str, Any]

MINIMAL: Values = {
    "database": {"existingSecret": "postgres"},
    "storage": {"url": "s3://bucket/raydpo"},
    "api": {"existingSecret": "api-key"},
}
FULL: Values = {
    "database": {"existingSecret": "postgres", "key": "url", "directKey": "direct-url"},
    "storage": {
        "url": "gs://bucket/raydpo",
        "existingSecret": "bucket",
        "serviceAccountAnnotations": {"iam.gke.io/gcp-service-account": "raydpo@example.iam.gserviceaccount.com"},
    },
    "hub": {"existingSecret": "hub"},
    "integrations": {"existingSecret": "followed"},
    "api": {
        "existingSecret": "api-key",
        "key": "bearer",
        "allowFrom": [{"podSelector": {"matchLabels": {"app": "web"}}}],
    },
    "models": {"tiny": "gs://bucket/models/tiny", "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct"},
    "settings": {
        "dtype": "bfloat16",
        "num_gpus_per_worker": 1,
        "num_gpus_per_model": 0.5,
        "dataset_uris": ["https://", "gs://bucket/rows/"],
        "webhook_urls": ["https://", "http://hooks.example.svc:8080/"],
        "max_upload_bytes": 2**34,
        "judges": {"gpt-5.1": {"url": "https://api.example.com/v1", "model": "gpt-5.1"}},
        "project_deployments": {"max_replicas": 4, "max_gpus": 2.5, "pinned": True},
        "oidc_issuer": "https://login.example.com",
        "oidc_audience": "raydpo",
        "oidc_roles_claim": "groups",
        "oidc_roles": [{"value": "ml", "project": "ml", "scopes": ["read", "write"]}],
    },
    "observability": {
        "serviceMonitor": True,
        "serviceMonitorLabels": {"release": "prometheus"},
        "scrapeInterval": "15s",
        "scrapeAnnotations": True,
        "scrapeFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
        "otlpEndpoint": "http://collector.observability:4318",
    },
    "images": {
        "controlPlane": "registry.example/raydpo-control-plane@sha256:" + "0" * 64,
        "pullPolicy": "Always",
        "pullSecrets": [{"name": "registry"}],
    },
    "controlPlane": {
        "replicas": 3,
        "serviceType": "LoadBalancer",
        "serviceAnnotations": {"example.com/internal": "true"},
        "pod": {"nodeSelector": {"pool": "web"}},
    },
    "ray": {"existingSecret": "ray-token", "idleTimeoutSeconds": 60},
    "head": {"memory": "16Gi", "pod": {"tolerations": [{"operator": "Exists"}]}},
    "cpuWorkers": {"minReplicas": 2, "maxReplicas": 20, "pod": {"nodeSelector": {"pool": "cpu"}}},
    "gpuWorkers": [
        {
            "name": "gpu",
            "minReplicas": 1,
            "maxReplicas": 8,
            "gpus": 8,
            "gpuResource": "nvidia.com/gpu",
            "cpu": "64",
            "memory": "512Gi",
            "scratch": "1Ti",
        }
    ],
}


def group(name: str, **values: Any) -> Values:
    """Returns a group of GPU workers."""
    return {
        "name": name,
        "minReplicas": 0,
        "maxReplicas": 4,
        "gpus": 8,
        "gpuResource": "nvidia.com/gpu",
        "cpu": "32",
        "memory": "256Gi",
        "scratch": "500Gi",
        **values,
    }


AFFINITY = {
    "nodeAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a", "b"]}]}]
        }
    },
    "podAntiAffinity": {
        "preferredDuringSchedulingIgnoredDuringExecution": [
            {
                "weight": 100,
                "podAffinityTerm": {
                    "topologyKey": "kubernetes.io/hostname",
                    "labelSelector": {"matchExpressions": [{"key": "app", "operator": "Exists"}]},
                },
            }
        ]
    },
}
NCCL = {"NCCL_SOCKET_IFNAME": "eth0", "FI_PROVIDER": "efa", "NCCL_DEBUG": "WARN"}

VARIANTS: dict[str, Values] = {
    "minimal": MINIMAL,
    "full": FULL,
    "several GPU groups": MINIMAL
    | {
        "settings": {"num_gpus_per_worker": 1, "num_gpus_per_model": 2},
        "gpuWorkers": [
            group(
                "h100",
                priority=10,
                idleTimeoutSeconds=1800,
                resources={"vpc.amazonaws.com/efa": 4, "hugepages-2Mi": "5120Mi"},
                pod={"nodeSelector": {"gpu": "h100"}, "extraEnv": NCCL, "runtimeClassName": "nvidia"},
            ),
            group("a100-spot", gpus=4, pod={"tolerations": [{"key": "spot", "operator": "Exists"}]}),
            group("mig", gpus=2, gpuResource="nvidia.com/mig-3g.40gb"),
        ],
    },
    "no GPUs": MINIMAL | {"gpuWorkers": [], "cpuWorkers": {"resources": {"ephemeral-storage": "60Gi"}}},
    "pods with everything": MINIMAL
    | {
        "pods": {
            "labels": {"team": "ml"},
            "annotations": {"example.com/owner": "ml"},
            "nodeSelector": {"disk": "ssd"},
            "tolerations": [{"key": "dedicated", "operator": "Equal", "value": "ml", "effect": "NoSchedule"}],
            "affinity": AFFINITY,
            "topologySpreadConstraints": [
                {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway"}
            ],
            "priorityClassName": "high",
            "runtimeClassName": "gvisor",
            "schedulerName": "volcano",
            "terminationGracePeriodSeconds": 60,
            "extraEnv": {
                "HTTPS_PROXY": "http://proxy:3128",
                "LICENSE": {"secretKeyRef": {"name": "license", "key": "text"}},
            },
            "extraVolumes": [{"name": "certificates", "configMap": {"name": "certificates"}}],
            "extraVolumeMounts": [{"name": "certificates", "mountPath": "/etc/certificates", "readOnly": True}],
            "scratchStorageClass": "fast",
        }
    },
    "queued by Kueue": MINIMAL
    | {
        "ray": {
            "labels": {"kueue.x-k8s.io/queue-name": "ml"},
            "annotations": {"kueue.x-k8s.io/elastic-job": "true"},
        }
    },
    "a gang of Volcano's": MINIMAL
    | {"ray": {"labels": {"volcano.sh/queue-name": "ml", "ray.io/priority-class-name": "high"}}},
    "observed": MINIMAL
    | {
        "observability": {
            "serviceMonitor": True,
            "serviceMonitorLabels": {"release": "prometheus"},
            "alerts": True,
            "dashboard": True,
        }
    },
    "state in Redis": MINIMAL
    | {"gcs": {"backend": "redis", "redisAddress": "rediss://redis:6379", "redisSecret": "redis", "redisUser": True}},
    "state in RocksDB": MINIMAL | {"gcs": {"backend": "rocksdb", "size": "20Gi", "storageClass": "fast"}},
    "a warm cache": MINIMAL
    | {
        "hub": {"existingSecret": "hub", "cacheClaim": "models", "warmUp": True},
        "models": {"qwen": "Qwen/Qwen3-0.6B", "own": {"source": "s3://bucket/own"}, "gpt": {"source": "openai/gpt"}},
    },
    "restricted egress": MINIMAL
    | {
        "egress": {
            "restricted": True,
            "allowTo": [{"to": [{"ipBlock": {"cidr": "10.0.0.5/32"}}], "ports": [{"port": 5432}]}],
        }
    },
    "guarded and scaled": MINIMAL
    | {
        "head": {"blockEviction": True},
        "gpuWorkers": [group("h100", blockEviction=True), group("spot")],
        "controlPlane": {"replicas": 2, "maxReplicas": 6},
    },
}
