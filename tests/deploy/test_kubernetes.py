"""deploy/kubernetes: rendered by kubectl, judged by its schemas and by what the programs do."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from gateway.config import Settings, load_settings
from launcher.config import LauncherSettings
from tests.deploy.expressions import RULES
from tests.deploy.manifests import (
    COMPONENTS,
    FOLDER,
    NEWEST,
    OLDEST,
    OVERLAYS,
    ROOT,
    Manifest,
    PodTemplate,
    check_manifest,
    list_templates,
    render,
    render_component,
    selects,
)
from tests.deploy.promtool import run_promtool

pytestmark = pytest.mark.slow  # kubectl and schemas judge, not Python

PRODUCTION = "overlays/production"
SEVERAL_HOSTS = "overlays/several-hosts"


def find(overlay: str, kind: str, name: str) -> Manifest:
    (one,) = [
        one
        for one in render(FOLDER / overlay)
        if (one["kind"], one["metadata"]["name"]) == (kind, name)
    ]
    return one


def list_pods(overlay: str) -> list[PodTemplate]:
    return list_templates(list(render(FOLDER / overlay)))


def find_pods(overlay: str, name: str) -> PodTemplate:
    (one,) = [one for one in list_pods(overlay) if one.name == name]
    return one


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_manifests_are_what_kubernetes_knows(overlay: str) -> None:
    manifests = render(FOLDER / overlay)

    assert len(manifests) > 10
    for manifest in manifests:
        check_manifest(manifest, NEWEST)


def test_base_is_what_the_oldest_kubernetes_knows() -> None:
    for manifest in render(FOLDER / "base"):
        check_manifest(manifest, OLDEST)


@pytest.mark.parametrize("name", COMPONENTS)
def test_component_alone_is_what_kubernetes_knows(name: str, tmp_path: Path) -> None:
    manifests = render_component(name, tmp_path)

    base = render(FOLDER / "base")
    added = [one for one in manifests if one not in base]
    assert added
    for manifest in added:
        check_manifest(manifest, NEWEST)


@pytest.mark.parametrize("field", ["spec.replica", "spec.template.spec.containers.0.envfrom"])
def test_field_that_kubernetes_does_not_know_is_found(field: str) -> None:
    """Else the checks above would say nothing."""
    wrong: Any = copy.deepcopy(find("base", "Deployment", "gateway"))
    *way, last = field.split(".")
    place = wrong
    for step in way:
        place = place[int(step) if step.isdigit() else step]
    place[last] = 1

    with pytest.raises(kubernetes_validate.ValidationError, match=last):
        check_manifest(wrong, NEWEST)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_have_no_more_rights_than_the_restricted_standard_allows(overlay: str) -> None:
    namespace = find(overlay, "Namespace", "vllm-gateway")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for pods in list_pods(overlay):
        of_pod, of_container = pods.spec["securityContext"], pods.container["securityContext"]
        assert of_pod["runAsNonRoot"] is True, pods.name
        assert of_pod["runAsUser"] == 10001, pods.name
        assert of_pod["seccompProfile"] == {"type": "RuntimeDefault"}, pods.name
        assert of_container["allowPrivilegeEscalation"] is False, pods.name
        assert of_container["capabilities"] == {"drop": ["ALL"]}, pods.name
        assert not of_container.get("privileged"), pods.name
        for row in pods.spec["volumes"]:
            assert row.keys() - {"name"} <= {"emptyDir", "persistentVolumeClaim", "secret"}
        assert not pods.spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}, pods.name
        # A Service `gateway` would set GATEWAY_PORT to an address, and the gateway would not start.
        assert pods.spec["enableServiceLinks"] is False, pods.name
        has_role = any(one["kind"] == "Role" for one in render(FOLDER / overlay))
        wanted = has_role and pods.name == "gateway"
        assert pods.spec["automountServiceAccountToken"] is wanted, pods.name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_stop_has_time_for_both_drains(overlay: str) -> None:
    """The gateway's calls, and those of an engine, end before the kubelet kills what runs them."""
    gateway, engine = find_pods(overlay, "gateway"), find_pods(overlay, "engine")

    drain_s = float(gateway.environment["GATEWAY_DRAIN_TIMEOUT_S"])
    quiet_s = gateway.container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert gateway.spec["terminationGracePeriodSeconds"] >= quiet_s + drain_s + 10

    drain_s = float(engine.environment["LAUNCHER_DRAIN_TIMEOUT_S"])
    kill_s = float(engine.environment["LAUNCHER_KILL_TIMEOUT_S"])
    quiet_s = engine.container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert engine.spec["terminationGracePeriodSeconds"] >= quiet_s + drain_s + kill_s + 10
    # CoreDNS tells an address for up to 30 s after it has gone, and the gateway asks every few.
    assert quiet_s >= 35


def test_worker_host_outlives_its_leaders_drain() -> None:
    leader, worker = (find_pods(SEVERAL_HOSTS, name) for name in ("engine", "engine-worker"))
    drain_s = float(leader.environment["LAUNCHER_DRAIN_TIMEOUT_S"])
    leader_s = leader.container["lifecycle"]["preStop"]["sleep"]["seconds"] + drain_s

    assert worker.container["lifecycle"]["preStop"]["sleep"]["seconds"] >= leader_s
    assert worker.spec["terminationGracePeriodSeconds"] > leader_s


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_ask_what_each_is_for(overlay: str) -> None:
    gateway, engine = find_pods(overlay, "gateway"), find_pods(overlay, "engine")
    asked = {
        (pods.name, kind): (
            pods.ports[pods.container[f"{kind}Probe"]["httpGet"]["port"]],
            pods.container[f"{kind}Probe"]["httpGet"]["path"],
        )
        for pods in (gateway, engine)
        for kind in ("startup", "liveness", "readiness")
    }

    assert asked == {
        ("gateway", "startup"): (8000, "/healthz"),
        ("gateway", "liveness"): (8000, "/healthz"),
        ("gateway", "readiness"): (8000, "/readyz"),
        ("engine", "startup"): (8002, "/status"),
        ("engine", "liveness"): (8002, "/status"),
        ("engine", "readiness"): (8002, "/readyz"),
    }
    # A gateway that holds requests for an engine that restarts must go on getting them.
    probe = gateway.container["readinessProbe"]
    hold_s = float(gateway.environment["GATEWAY_RESTART_HOLD_S"])
    assert probe["periodSeconds"] * probe["failureThreshold"] > hold_s


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_whatever_selects_pods_finds_some(overlay: str) -> None:
    pods = list_pods(overlay)
    for one in render(FOLDER / overlay):
        spec, name = one.get("spec") or {}, one["metadata"]["name"]
        selector = {
            "Service": {"matchLabels": spec.get("selector")},
            "PodDisruptionBudget": spec.get("selector"),
            "NetworkPolicy": spec.get("podSelector"),
        }.get(one["kind"])
        if selector is None:
            continue
        found = [row for row in pods if selects(selector, row.labels)]
        assert found, f"{one['kind']} {name}"
        if one["kind"] == "Service":
            for port in spec["ports"]:
                assert all(
                    row.ports[port["targetPort"]] == port["port"] or name == "gateway"
                    for row in found
                )


def list_callers(overlay: str, pods: PodTemplate, port: str) -> list[Any]:
    """Whom the policies let in, on a port by its name; `nobody` shuts all others out."""
    callers: list[Any] = []
    for one in render(FOLDER / overlay):
        if one["kind"] == "NetworkPolicy" and selects(one["spec"]["podSelector"], pods.labels):
            for rule in one["spec"].get("ingress", ()):
                ports = [row["port"] for row in rule.get("ports", ())]
                if not ports or port in ports or pods.ports.get(port) in ports:
                    callers += rule.get("from", ["anybody"])
    return callers


def test_engine_is_reached_by_the_gateway_alone() -> None:
    shut = find("base", "NetworkPolicy", "nobody")["spec"]
    engine, gateway = find_pods("base", "engine"), find_pods("base", "gateway")
    only_gateway = [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "gateway"}}}]

    assert shut == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert list_callers("base", engine, "http") == only_gateway
    assert list_callers("base", engine, "status") == only_gateway
    assert list_callers("base", gateway, "http") == ["anybody"]
    assert list_callers("base", gateway, "metrics") == []  # it tells the keys' names
    reached = [
        one
        for one in render(FOLDER / "base")
        if one["kind"] == "NetworkPolicy"
        and one["spec"].get("egress")
        and selects(one["spec"]["podSelector"], engine.labels)
    ]
    assert reached == []


def test_prometheus_is_let_in_and_nobody_beside_it() -> None:
    prometheus = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}},
    }
    engine, gateway = find_pods(PRODUCTION, "engine"), find_pods(PRODUCTION, "gateway")

    assert list_callers(PRODUCTION, gateway, "metrics") == [prometheus]
    assert prometheus in list_callers(PRODUCTION, engine, "status")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_variables_are_settings(overlay: str) -> None:
    """One that no program knows would stop its start."""
    gateway, launcher = Settings.list_names(), LauncherSettings.list_names()
    for pods in list_pods(overlay):
        names = set(pods.environment)
        for row in pods.container.get("envFrom", ()):
            names |= find(overlay, "ConfigMap", row["configMapRef"]["name"])["data"].keys()
        assert {one for one in names if one.startswith("GATEWAY_")} <= {
            f"GATEWAY_{one.upper()}" for one in gateway
        }, pods.name
        assert {one for one in names if one.startswith("LAUNCHER_")} <= {
            f"LAUNCHER_{one.upper()}" for one in launcher
        }, pods.name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_values_are_what_the_gateway_takes(
    overlay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in find_pods(overlay, "gateway").environment.items():
        if name.startswith("GATEWAY_") and value:
            monkeypatch.setenv(name, value)
    keys = tmp_path / "keys.toml"
    keys.touch()
    # What the pod has mounted.
    monkeypatch.setenv("GATEWAY_TOKENIZER", str(ROOT / "demo" / "model"))
    monkeypatch.setenv("GATEWAY_KEYS_FILE", str(keys))

    (engines,) = load_settings([]).engines

    assert engines.partition("+")[2] == "http://engine:8001"


def test_leader_and_worker_tell_vllm_the_same() -> None:
    """But their rank, and that a worker answers nobody."""
    config = find(SEVERAL_HOSTS, "ConfigMap", find_layout())["data"]
    # The demo model has four heads.
    layout = config["layout"].replace("tensor-parallel-size=8", "tensor-parallel-size=4")
    group = {"LWS_GROUP_SIZE": "2", "LWS_LEADER_ADDRESS": "engine-0.engine", "LAYOUT": layout}
    spoken = {
        name: explain(find_pods(SEVERAL_HOSTS, name), group | {"LWS_WORKER_INDEX": rank})
        for name, rank in (("engine", "0"), ("engine-worker", "1"))
    }
    leader, worker = spoken["engine"], spoken["engine-worker"]

    assert leader[leader.index("--node-rank") + 1] == "0"
    assert worker[worker.index("--node-rank") + 1] == "1"
    worker.remove("--headless")
    worker[worker.index("--node-rank") + 1] = "0"
    assert worker == leader
    assert leader[leader.index("--nnodes") + 1] == "2"


def find_layout() -> str:
    rows = find_pods(SEVERAL_HOSTS, "engine").container["env"]
    (row,) = [row for row in rows if row["name"] == "LAYOUT"]
    return str(row["valueFrom"]["configMapKeyRef"]["name"])


def explain(pods: PodTemplate, variables: dict[str, str]) -> list[str]:
    text = pods.environment["LAUNCHER_SET"]
    for name, value in variables.items():
        text = text.replace(f"$({name})", value)
    environment = {
        **os.environ,
        "LAUNCHER_GPU": "8x H200",
        "LAUNCHER_MODEL": str(ROOT / "demo" / "model"),
        "LAUNCHER_SET": text,
    }
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "explain", "--json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    argv: list[str] = json.loads(done.stdout)["argv"]
    return argv


def test_rules_are_those_of_the_stack(tmp_path: Path) -> None:
    spec = find(PRODUCTION, "PrometheusRule", "vllm-gateway")["spec"]
    stack = [
        group
        for path in sorted(RULES.glob("*.yml"))
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    ]
    assert spec["groups"] == stack

    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    assert "rules found" in run_promtool("check", "rules", path)


def test_monitors_find_their_services_and_ports() -> None:
    services = [one for one in render(FOLDER / PRODUCTION) if one["kind"] == "Service"]
    jobs = set()
    for monitor in (one for one in render(FOLDER / PRODUCTION) if one["kind"] == "ServiceMonitor"):
        (service,) = [
            one
            for one in services
            if selects(monitor["spec"]["selector"], one["metadata"]["labels"])
        ]
        ports = {port["name"] for port in service["spec"]["ports"]}
        for endpoint in monitor["spec"]["endpoints"]:
            assert endpoint["port"] in ports
            jobs |= {
                row["replacement"] for row in endpoint["relabelings"] if row["targetLabel"] == "job"
            }

    assert jobs == {"gateway", "engine", "launcher"}  # as prometheus.yml and the rules have them


def test_page_names_every_component_and_overlay() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")

    for name in [*COMPONENTS, *(one.rpartition("/")[2] for one in OVERLAYS)]:
        assert f"`{name}`" in page, name
