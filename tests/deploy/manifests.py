"""Finds objects in what the chart renders, and what Kubernetes would make of them."""

from typing import Any

import yaml

Manifest = dict[str, Any]
COMPONENT = "app.kubernetes.io/component"
# https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def objects(files: dict[str, str]) -> list[Manifest]:
    """Returns the objects in what Helm rendered, by path."""
    texts = [text for path, text in files.items() if path.endswith(".yaml")]
    return [each for text in texts for each in yaml.safe_load_all(text) if each]


def one(manifests: list[Manifest], kind: str, component: str = "") -> Manifest:
    """Returns the only object of this kind, or the only one of this component."""
    of_kind = [manifest for manifest in manifests if manifest["kind"] == kind]
    (found,) = [manifest for manifest in of_kind if not component or labels(manifest)[COMPONENT] == component]
    return found


def labels(manifest: Manifest) -> dict[str, str]:
    return dict(manifest["metadata"]["labels"])


def ray_groups(manifests: list[Manifest]) -> dict[str, Manifest]:
    spec = one(manifests, "RayCluster")["spec"]
    return {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def pod_templates(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Returns the template of every pod: those of jobs and the control plane by component, Ray's by group."""
    ray = {name: group["template"] for name, group in ray_groups(manifests).items()}
    jobs = {labels(job)[COMPONENT]: job["spec"]["template"] for job in manifests if job["kind"] == "Job"}
    return {"control-plane": one(manifests, "Deployment")["spec"]["template"], **jobs, **ray}


def container(template: Manifest) -> Manifest:
    (only,) = template["spec"]["containers"]
    return dict(only)


def environment(template: Manifest) -> dict[str, Any]:
    return {entry["name"]: entry for entry in container(template)["env"]}


def plain_environment(template: Manifest) -> dict[str, str]:
    return {name: entry["value"] for name, entry in environment(template).items() if "value" in entry}


def violations(template: Manifest, *others: Manifest) -> list[str]:
    """Returns what the standard `restricted` forbids in a pod, with containers that the operator adds."""
    spec = template["spec"]
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)]
    found += [str(volume) for volume in spec.get("volumes", []) if not set(volume) & VOLUMES]
    of_pod = spec.get("securityContext", {})
    for each in [*spec["containers"], *spec.get("initContainers", []), *others]:
        context = {**of_pod, **each.get("securityContext", {})}
        allowed = (
            context.get("runAsNonRoot") is True
            and context.get("runAsUser") != 0
            and context.get("allowPrivilegeEscalation") is False
            and not context.get("privileged")
            and context.get("capabilities", {}).get("drop") == ["ALL"]
            and set(context["capabilities"].get("add", [])) <= {"NET_BIND_SERVICE"}
            and context.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost")
        )
        found += [] if allowed else [f"security context {context}"]
        found += ["host port"] * any(port.get("hostPort") for port in each.get("ports", []))
    return found
