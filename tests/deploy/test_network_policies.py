"""Evaluates the chart's NetworkPolicies as a network plugin would: who reaches which port of which pod."""

import ipaddress
from collections.abc import Callable
from typing import Any

import pytest

from tests.deploy.manifests import Manifest, container, labels, pod_templates
from tests.deploy.variants import VARIANTS

Render = Callable[..., list[Manifest]]
MONITORING = {"kubernetes.io/metadata.name": "monitoring"}


def matches(selector: Manifest, chosen: dict[str, str]) -> bool:
    return dict(selector.get("matchLabels", {})).items() <= chosen.items()


def is_peer(peer: Manifest, other: dict[str, str], namespace: dict[str, str] | None) -> bool:
    """Whether a peer of a policy is a pod with these labels. `namespace` has its namespace's labels, None for ours."""
    if "namespaceSelector" in peer:
        inside = namespace is not None and matches(peer["namespaceSelector"], namespace)
    else:
        inside = namespace is None
    return "ipBlock" not in peer and inside and matches(peer.get("podSelector", {}), other)


def admitted(
    manifests: list[Manifest], pod: Manifest, port: int, peer: dict[str, str], namespace: dict[str, str] | None = None
) -> bool:
    """Whether the policies let pods with the labels `peer` reach this port of `pod`."""
    names = {entry["containerPort"]: entry["name"] for entry in container(pod).get("ports", [])}

    def allows(rule: Manifest) -> bool:
        ports = {entry["port"] for entry in rule.get("ports", [{"port": port}])}
        peers = rule.get("from", [])
        return bool(ports & {port, names.get(port)}) and (
            not peers or any(is_peer(each, peer, namespace) for each in peers)
        )

    bound = policies(manifests, pod, "Ingress")
    return not bound or any(allows(rule) for policy in bound for rule in policy["ingress"])


def connects(manifests: list[Manifest], pod: Manifest, address: str, port: int) -> bool:
    """Whether the policies let `pod` connect to this port of an address outside of the release."""

    def holds(block: Manifest) -> bool:
        place = ipaddress.ip_address(address)
        excepted = [ipaddress.ip_network(each) for each in block.get("except", [])]
        return place in ipaddress.ip_network(block["cidr"]) and not any(place in each for each in excepted)

    def allows(rule: Manifest) -> bool:
        blocks = [peer["ipBlock"] for peer in rule.get("to", []) if "ipBlock" in peer]
        anywhere = "to" not in rule
        ports = {entry["port"] for entry in rule.get("ports", [{"port": port}])}
        return port in ports and (anywhere or any(holds(block) for block in blocks))

    bound = policies(manifests, pod, "Egress")
    return not bound or any(allows(rule) for policy in bound for rule in policy["egress"])


def policies(manifests: list[Manifest], pod: Manifest, direction: str) -> list[Manifest]:
    found = [manifest["spec"] for manifest in manifests if manifest["kind"] == "NetworkPolicy"]
    return [each for each in found if direction in each["policyTypes"] and matches(each["podSelector"], labels(pod))]


def test_strangers_reach_the_api_and_nothing_else(manifests: list[Manifest], values: dict[str, Any]) -> None:
    pods, stranger = pod_templates(manifests), {"app": "stranger"}
    assert admitted(manifests, pods["control-plane"], 8000, stranger) != bool(values["api"].get("allowFrom"))
    assert not admitted(manifests, pods["control-plane"], 9999, stranger)
    for name in set(pods) - {"control-plane", "migration", "warm-up"}:
        assert not any(
            admitted(manifests, pods[name], port, stranger) for port in (6379, 8000, 8080, 8265, 10001, 52365)
        )


def test_the_control_plane_reaches_the_dashboard_and_the_serve_proxy_only(manifests: list[Manifest]) -> None:
    pods = pod_templates(manifests)
    reached = {
        port
        for port in (6379, 8000, 8080, 8265, 10001)
        if admitted(manifests, pods["head"], port, labels(pods["control-plane"]))
    }
    assert reached == {8000, 8265}


def test_ray_reaches_ray_and_posts_events(manifests: list[Manifest]) -> None:
    pods = pod_templates(manifests)
    for worker in set(pods) - {"control-plane", "migration", "warm-up", "head"}:
        assert admitted(manifests, pods["head"], 6379, labels(pods[worker]))
        assert admitted(manifests, pods[worker], 40000, labels(pods["head"]))
        assert admitted(manifests, pods["control-plane"], 8000, labels(pods[worker]))


def test_callers_can_be_named(render: Render, full: dict[str, Any]) -> None:
    manifests = render(full)
    control_plane = pod_templates(manifests)["control-plane"]
    assert admitted(manifests, control_plane, 8000, {"app": "web"})
    assert not admitted(manifests, control_plane, 8000, {"app": "stranger"})


def test_prometheus_reaches_the_metrics_of_ray_and_no_other_port(render: Render, full: dict[str, Any]) -> None:
    manifests = render(full)
    pods, prometheus = pod_templates(manifests), {"app": "prometheus"}
    for name in ("head", "cpu", "gpu"):
        assert admitted(manifests, pods[name], 8080, prometheus, MONITORING)
        assert not admitted(manifests, pods[name], 8080, prometheus, {"kubernetes.io/metadata.name": "other"})
        assert not any(admitted(manifests, pods[name], port, prometheus, MONITORING) for port in (6379, 8000, 8265))
    assert admitted(manifests, pods["control-plane"], 8000, prometheus, MONITORING)


@pytest.mark.parametrize(
    ("address", "port", "reached"),
    [
        ("8.8.8.8", 443, True),  # the hub, a bucket, a webhook
        ("2001:4860::1", 443, True),
        ("8.8.8.8", 22, False),
        ("10.0.0.53", 53, True),  # DNS
        ("10.0.0.5", 5432, True),  # the database, from allowTo
        ("10.0.0.5", 443, False),
        ("169.254.169.254", 443, False),  # the cloud's metadata
        ("169.254.169.254", 80, False),
        ("192.168.1.1", 443, False),
        ("fd00::1", 443, False),
    ],
)
def test_pods_connect_to_what_they_need_only(render: Render, address: str, port: int, reached: bool) -> None:
    manifests = render(VARIANTS["restricted egress"])
    for pod in pod_templates(manifests).values():
        assert connects(manifests, pod, address, port) is reached


def test_without_restriction_pods_connect_anywhere(render: Render, minimal: dict[str, Any]) -> None:
    manifests = render(minimal)
    assert all(connects(manifests, pod, "192.168.1.1", 22) for pod in pod_templates(manifests).values())


def test_the_pods_of_a_release_reach_each_other_however_restricted(render: Render) -> None:
    manifests = render(VARIANTS["restricted egress"])
    pods = pod_templates(manifests)
    for pod in pods.values():
        (policy,) = policies(manifests, pod, "Egress")
        peers = [peer for rule in policy["egress"] for peer in rule.get("to", []) if "podSelector" in peer]
        assert all(any(is_peer(peer, labels(other), None) for peer in peers) for other in pods.values())
