"""deploy/kubernetes as kubectl renders it, and what can be judged of it without a cluster."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jsonschema
import kubernetes_validate
import pytest
import yaml

Manifest = dict[str, Any]

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
OVERLAYS = ["base", *sorted(f"overlays/{one.name}" for one in (FOLDER / "overlays").iterdir())]
COMPONENTS = sorted(one.name for one in (FOLDER / "components").iterdir())
# The oldest Kubernetes with `preStop.sleep` on, and the newest whose schemas are here.
OLDEST, NEWEST = "1.30", "1.37"
_OPEN = {"type": "object"}
_TEXT = {"type": "string"}
_NUMBER = {"type": "integer", "minimum": 0}


def _closed(required: tuple[str, ...] = (), **fields: Mapping[str, Any]) -> Manifest:
    return {
        "type": "object",
        "properties": fields,
        "required": list(required),
        "additionalProperties": False,
    }


def _list_of(item: Mapping[str, Any]) -> Manifest:
    return {"type": "array", "items": item, "minItems": 1}


_TARGET = _closed(("kind", "name"), apiVersion=_TEXT, kind=_TEXT, name=_TEXT)
_TRIGGER = _closed(
    ("type", "metadata"),
    type={"enum": ["cpu", "prometheus"]},
    metricType={"enum": ["AverageValue", "Utilization"]},
    metadata={"type": "object", "additionalProperties": _TEXT},
)
_RELABELING = _closed(
    ("targetLabel", "action"),
    sourceLabels=_list_of(_TEXT),
    targetLabel=_TEXT,
    replacement=_TEXT,
    action={"const": "replace"},
)
# What is no part of Kubernetes has no schema in the validator: of these kinds the fields that are
# used here, by their documentation, and no other.
_SPECS = {
    "LeaderWorkerSet": _closed(
        ("leaderWorkerTemplate",),
        replicas=_NUMBER,
        rolloutStrategy=_closed(
            type={"const": "RollingUpdate"},
            rollingUpdateConfiguration=_closed(maxUnavailable=_NUMBER, maxSurge=_NUMBER),
        ),
        leaderWorkerTemplate=_closed(
            ("workerTemplate", "size"),
            size=_NUMBER,
            restartPolicy={"const": "RecreateGroupOnPodRestart"},
            leaderTemplate=_OPEN,
            workerTemplate=_OPEN,
        ),
    ),
    "ServiceMonitor": _closed(
        ("selector", "endpoints"),
        selector=_closed(matchLabels=_OPEN),
        endpoints=_list_of(
            _closed(("port",), port=_TEXT, interval=_TEXT, relabelings=_list_of(_RELABELING))
        ),
    ),
    "PrometheusRule": _closed(("groups",), groups=_list_of(_OPEN)),
    "ScaledObject": _closed(
        ("scaleTargetRef", "triggers"),
        scaleTargetRef=_TARGET,
        minReplicaCount=_NUMBER,
        maxReplicaCount=_NUMBER,
        pollingInterval=_NUMBER,
        fallback=_closed(
            ("failureThreshold", "replicas"),
            failureThreshold=_NUMBER,
            replicas=_NUMBER,
            behavior={"const": "currentReplicas"},
        ),
        advanced=_closed(horizontalPodAutoscalerConfig=_closed(behavior=_OPEN)),
        triggers=_list_of(_TRIGGER),
    ),
}


@dataclass(frozen=True)
class PodTemplate:
    """What some manifest makes pods of."""

    name: str
    labels: Mapping[str, str]
    spec: Manifest

    @property
    def container(self) -> Manifest:
        (only,) = self.spec["containers"]
        return cast("Manifest", only)

    @property
    def environment(self) -> dict[str, str]:
        """Values as they are written; empty for those from elsewhere."""
        return {row["name"]: row.get("value", "") for row in self.container.get("env", ())}

    @property
    def ports(self) -> dict[str, int]:
        return {row["name"]: row["containerPort"] for row in self.container.get("ports", ())}


@functools.cache
def render(folder: Path) -> tuple[Manifest, ...]:
    """By kubectl's own kustomize, as `kubectl apply -k` would."""
    program = shutil.which("kubectl")
    if program is None:
        pytest.skip("no kubectl here; `scripts/system.sh kubernetes` gets it")
    done = subprocess.run(
        [program, "kustomize", folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "kustomize warns"
    return tuple(yaml.safe_load_all(done.stdout))


def render_component(name: str, folder: Path) -> tuple[Manifest, ...]:
    """The base with one component alone, in a copy: kustomize wants all paths below one folder."""
    shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
    overlay = folder / "overlays" / "alone"
    overlay.mkdir()
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "vllm-gateway",
        "resources": ["../../base"],
        "components": [f"../../components/{name}"],
    }
    (overlay / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), encoding="utf-8")
    return render(overlay)


def check_manifest(manifest: Manifest, version: str) -> None:
    """Kubernetes' own schema, no field beyond it; raises what is wrong."""
    _check_text(json.dumps(manifest), version)


@functools.cache  # what several overlays have in common is judged once
def _check_text(text: str, version: str) -> None:
    manifest = json.loads(text)
    spec = _SPECS.get(manifest["kind"])
    if spec is None:
        kubernetes_validate.validate(manifest, version, strict=True)
        return
    outer = _closed(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion=_TEXT,
        kind=_TEXT,
        metadata=_OPEN,
        spec=spec,
    )
    jsonschema.validate(manifest, outer)
    for template in list_templates([manifest]):
        pods = {"metadata": {"labels": dict(template.labels)}, "spec": template.spec}
        wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "template": pods}
        kubernetes_validate.validate(wrapped, version, strict=True)


def list_templates(manifests: Iterator[Manifest] | list[Manifest]) -> list[PodTemplate]:
    found = []
    for one in manifests:
        spec, name = one.get("spec") or {}, one["metadata"]["name"]
        if one["kind"] == "LeaderWorkerSet":
            templates = spec["leaderWorkerTemplate"]
            rows = [(name, templates["leaderTemplate"])]
            rows.append((f"{name}-worker", templates["workerTemplate"]))
        elif one["kind"] in {"Deployment", "StatefulSet", "Job"}:
            rows = [(name, spec["template"])]
        else:
            rows = []
        found += [PodTemplate(n, t["metadata"]["labels"], t["spec"]) for n, t in rows]
    return found


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    wanted = selector.get("matchLabels") or {}
    if any(labels.get(name) != value for name, value in wanted.items()):
        return False
    for row in selector.get("matchExpressions") or ():
        assert row["operator"] == "In"
        if labels.get(row["key"]) not in row["values"]:
            return False
    return True
