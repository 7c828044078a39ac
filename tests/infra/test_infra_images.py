"""Images: one place names them, a digest there reaches every pod of a cluster, and a script writes it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.infra_files import BASE, INFRA, OVERLAYS, PAIRS, SITE, Manifest, render, render_by_tool, tool
from tests.infra.infra_kustomize import render_here

pytestmark = pytest.mark.integration

PIN = INFRA / "docker" / "pin.py"
NAMES = ("latentloom-cpu", "latentloom-gpu", "latentloom-mlflow")
REFERENCES = [f"store.example:5000/team/{name}@sha256:{i:x}{'0' * 63}" for i, name in enumerate(NAMES)]


def images(node: Any) -> set[str]:
    """Every image that an object names, wherever it stands."""
    if isinstance(node, list):
        return {i for each in node for i in images(each)}
    if not isinstance(node, dict):
        return set()
    own = {node["image"]} if isinstance(node.get("image"), str) else set()
    return own | {i for each in node.values() for i in images(each)}


@pytest.fixture
def pinned(tmp_path: Path) -> Path:
    """A copy of infra/ after pin.py, with a site of each cloud, and one whose schedule is Argo's."""
    infra = tmp_path / "infra"
    shutil.copytree(INFRA, infra, ignore=shutil.ignore_patterns("*.lock", "*.json"))
    subprocess.run([sys.executable, str(infra / "docker" / "pin.py"), *REFERENCES], check=True)
    site = (infra / "site" / "kustomization.yaml").read_text()
    for name, old, new in (("gke", "eks-spot", "gke-spot"), ("argo", "schedules/cronjob", "schedules/argo")):
        assert old in site
        (infra / name).mkdir()
        (infra / name / "kustomization.yaml").write_text(site.replace(old, new))
    return infra


@pytest.mark.parametrize("site", ["site", "gke", "argo"])
def test_digests_reach_every_pod_and_no_tag_is_left(pinned: Path, site: str) -> None:
    by_hand = render_here(pinned / site)
    for manifests in (by_hand, render_by_tool(pinned / site)) if tool() else (by_hand,):
        assert images(manifests) == set(REFERENCES)
        scheduled = [m for m in manifests if m["kind"] in ("CronJob", "CronWorkflow")]
        assert {m["metadata"]["name"] for m in scheduled} >= {"nightly", "weekly-gc"}


def test_the_site_holds_what_its_parts_hold() -> None:
    def keys(manifests: list[Manifest]) -> set[tuple[str, str]]:
        return {(m["kind"], m["metadata"]["name"]) for m in manifests}

    parts = (INFRA / "mlflow", INFRA / "kuberay" / "overlays" / "eks-spot", INFRA / "schedules" / "cronjob")
    assert keys(render(SITE)) == {key for part in parts for key in keys(render(part))}


def test_nothing_in_a_cloud_comes_from_nowhere() -> None:
    for place in [SITE, *OVERLAYS, *PAIRS]:
        if place == SITE or "spot" in place.name:
            assert all(image.startswith("registry.example/") for image in images(render(place))), place.name
    wanted = yaml.safe_load((INFRA / "kuberay" / "components" / "images" / "kustomization.yaml").read_text())
    bare = images(render(BASE)) | images(render(INFRA / "mlflow")) | images(render(INFRA / "schedules" / "cronjob"))
    assert {f"{i['name']}:{i['newTag']}" for i in wanted["images"]} == bare


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("registry.example/latentloom-cpu:0.1.0", "is not REGISTRY/NAME@sha256:DIGEST"),
        ("registry.example/latentloom-cpu@sha256:12", "is not REGISTRY/NAME@sha256:DIGEST"),
        (f"registry.example/other@sha256:{'0' * 64}", "has no image other"),
    ],
)
def test_pinning_refuses_what_is_no_image_of_ours(reference: str, problem: str) -> None:
    spec = importlib.util.spec_from_file_location("pin", PIN)
    assert spec is not None
    assert spec.loader is not None
    pin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pin)
    with pytest.raises(ValueError, match=re.escape(problem)):
        pin.pinned(pin.FILE.read_text(), reference)
