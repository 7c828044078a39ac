"""Where the files under infra/ are, and how the tests render and read them."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from tests.infra.infra_kustomize import render_here

REPOSITORY = Path(__file__).parents[2]
INFRA = REPOSITORY / "infra"
BASE = INFRA / "kuberay" / "base"
OVERLAYS = sorted(p.parent for p in (INFRA / "kuberay" / "overlays").glob("*/kustomization.yaml"))
COMPONENTS = sorted(p.parent for p in INFRA.rglob("kustomization.yaml") if "kind: Component" in p.read_text())
KUSTOMIZATIONS = sorted({p.parent for p in INFRA.rglob("kustomization.yaml")} - set(COMPONENTS))

Manifest = dict[str, Any]


@lru_cache
def combined(*names: str) -> Path:
    """A folder that puts components on an overlay, in this order, as the runbook says to do it."""
    overlay, *components = names
    folder = Path(_COMBINED.name) / "+".join(names)
    folder.mkdir()

    def way(target: Path) -> str:
        return os.path.relpath(target, folder.resolve())

    wanted = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [way(INFRA / "kuberay" / "overlays" / overlay)],
        "components": [way(next(c for c in COMPONENTS if c.name == name)) for name in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(wanted))
    return folder


_COMBINED = tempfile.TemporaryDirectory(prefix="latentloom-overlays-")
# Every pair that makes sense, and logs with one of each: kueue wants a cluster that can hold its gangs, raycronjob
# and kueue exclude each other.
PAIRS = [
    combined("eks-spot", "kueue-eks"),
    combined("eks-spot", "raycronjob"),
    combined("gke-spot", "kueue-gke"),
    combined("gke-spot", "raycronjob"),
    combined("local", "raycronjob"),
    combined("local", "logs"),
    combined("eks-spot", "logs", "kueue-eks"),
    combined("gke-spot", "logs", "raycronjob"),
]
PLACES = [BASE, *OVERLAYS, *PAIRS]
SITE = INFRA / "site"


def render(folder: Path) -> list[Manifest]:
    """Every object of a kustomization: by kubectl or kustomize where installed, else by the tests' own hand."""
    return copy.deepcopy(_rendered(folder))


@lru_cache
def _rendered(folder: Path) -> list[Manifest]:
    return render_by_tool(folder) if tool() else render_here(folder)


def tool() -> list[str] | None:
    """The command that renders, None when neither program is installed."""
    if shutil.which("kubectl"):
        return ["kubectl", "kustomize"]
    return ["kustomize", "build"] if shutil.which("kustomize") else None


def render_by_tool(folder: Path) -> list[Manifest]:
    """The same by the real program."""
    command = tool()
    assert command is not None
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [m for m in yaml.safe_load_all(done.stdout) if m]


def read(path: Path) -> list[Manifest]:
    """Every document of a YAML file."""
    return [m for m in yaml.safe_load_all(path.read_text()) if m]


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    """Those of some kinds."""
    return [m for m in manifests if m["kind"] in kinds]


def named(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    """The one object of a kind and name."""
    (found,) = (m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == name)
    return found


def ray_job_specs(manifests: list[Manifest]) -> dict[str, Manifest]:
    """The RayJob specification of every RayJob and RayCronJob, by name."""
    specs = {m["metadata"]["name"]: m["spec"] for m in of_kind(manifests, "RayJob")}
    crons = {m["metadata"]["name"]: m["spec"]["jobTemplate"] for m in of_kind(manifests, "RayCronJob")}
    return specs | crons


def ray_templates(spec: Manifest) -> dict[str, Manifest]:
    """The pod templates of a RayJob, by group: "submitter", "head" and each worker group."""
    cluster = spec["rayClusterSpec"]
    groups = {g["groupName"]: g["template"] for g in cluster.get("workerGroupSpecs", [])}
    return {"submitter": spec["submitterPodTemplate"], "head": cluster["headGroupSpec"]["template"], **groups}


def pod_specs(manifest: Manifest) -> dict[str, Manifest]:
    """Every pod specification inside an object, by a name of its place."""
    found: dict[str, Manifest] = {}

    def walk(node: Any, place: str) -> None:
        if isinstance(node, dict):
            if "containers" in node:
                found[place] = node
                return
            for key, value in node.items():
                walk(value, f"{place}/{key}")
        elif isinstance(node, list):
            for i, value in enumerate(node):
                walk(value, f"{place}/{i}")

    walk(manifest, manifest["metadata"]["name"])
    return found
