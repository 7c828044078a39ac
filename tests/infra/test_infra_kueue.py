"""Kueue: which flavour each group of pods comes to, by the rules by which it assigns them; quotas that hold them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.infra.infra_files import PLACES, Manifest, named, of_kind, ray_job_specs, ray_templates, render

pytestmark = pytest.mark.integration

QUEUED = [p for p in PLACES if "kueue" in p.name]
UNITS = {"m": 1e-3, "Mi": 2.0**20, "Gi": 2.0**30}


def quantity(text: str | int) -> float:
    """A quantity of Kubernetes as a number."""
    for unit, factor in UNITS.items():
        if str(text).endswith(unit):
            return float(str(text).removesuffix(unit)) * factor
    return float(text)


def groups(spec: Manifest) -> dict[str, tuple[int, Manifest]]:
    """(pods, pod specification) of each group that Kueue counts, by name."""
    counts = {g["groupName"]: g["replicas"] for g in spec["rayClusterSpec"].get("workerGroupSpecs", [])}
    return {name: (counts.get(name, 1), t["spec"]) for name, t in ray_templates(spec).items()}


def demand(pods: int, pod: Manifest) -> dict[str, float]:
    """What a group asks for: its containers together, or an init container where that is more."""
    wanted: dict[str, float] = {}
    beside = [c for c in pod.get("initContainers", []) if c.get("restartPolicy") == "Always"]
    for container in [*pod["containers"], *beside]:
        for name, value in container["resources"]["requests"].items():
            wanted[name] = wanted.get(name, 0.0) + quantity(value)
    for container in pod.get("initContainers", []):
        for name, value in container["resources"]["requests"].items():
            wanted[name] = max(wanted.get(name, 0.0), quantity(value))
    return {name: pods * value for name, value in wanted.items()}


def tolerated(taint: Manifest, pod: Manifest) -> bool:
    return any(
        t["key"] == taint["key"] and (t["operator"] == "Exists" or t["value"] == taint["value"])
        for t in pod.get("tolerations", [])
    )


def assigned(manifests: list[Manifest], spec: Manifest) -> dict[str, str]:
    """The flavour of each group on an empty cluster: the first that it tolerates, selects and fits; "" for none."""
    (group,) = named(manifests, "ClusterQueue", "latentloom")["spec"]["resourceGroups"]
    flavors = {m["metadata"]["name"]: m["spec"] for m in of_kind(manifests, "ResourceFlavor")}
    keys = {key for f in flavors.values() for key in f.get("nodeLabels", {})}
    left = {f["name"]: {r["name"]: quantity(r["nominalQuota"]) for r in f["resources"]} for f in group["flavors"]}
    found = {}
    for name, (pods, pod) in groups(spec).items():
        wanted, selector = demand(pods, pod), {k: v for k, v in pod.get("nodeSelector", {}).items() if k in keys}
        assert set(wanted) <= set(group["coveredResources"]), "a resource that no queue covers is never admitted"
        found[name] = ""
        for flavor, quota in left.items():
            fits = all(quota[resource] >= value for resource, value in wanted.items())
            selected = selector.items() <= flavors[flavor].get("nodeLabels", {}).items()
            if fits and selected and all(tolerated(t, pod) for t in flavors[flavor].get("nodeTaints", [])):
                found[name] = flavor
                for resource, value in wanted.items():
                    quota[resource] -= value
                break
    return found


@pytest.mark.parametrize("place", QUEUED, ids=lambda p: p.name)
def test_every_job_fits_into_the_quotas(place: Path) -> None:
    manifests = render(place)
    for job, spec in ray_job_specs(manifests).items():
        assert "" not in assigned(manifests, spec).values(), job


@pytest.mark.parametrize("place", [p for p in QUEUED if "spot" in p.name], ids=lambda p: p.name)
def test_spot_for_who_can_lose_it_and_nodes_that_stay_for_the_others(place: Path) -> None:
    manifests = render(place)
    for job, spec in ray_job_specs(manifests).items():
        for group, flavor in assigned(manifests, spec).items():
            _, pod = groups(spec)[group]
            spot = group in ("decode", "gpu-spot")
            gpu = "nvidia.com/gpu" in pod["containers"][0]["resources"]["requests"]
            assert flavor == f"{'spot' if spot else 'on-demand'}-{'gpu' if gpu else 'cpu'}", (job, group)


@pytest.mark.parametrize("place", QUEUED, ids=lambda p: p.name)
def test_the_queue_tries_spot_first_and_names_flavours_that_exist(place: Path) -> None:
    manifests = render(place)
    (group,) = named(manifests, "ClusterQueue", "latentloom")["spec"]["resourceGroups"]
    names = [f["name"] for f in group["flavors"]]
    assert names == ["spot-cpu", "spot-gpu", "on-demand-cpu", "on-demand-gpu"]
    assert set(names) == {m["metadata"]["name"] for m in of_kind(manifests, "ResourceFlavor")}
    for flavor in group["flavors"]:
        assert [r["name"] for r in flavor["resources"]] == group["coveredResources"], "Kueue wants them in one order"
