"""What operators expect: who stays and who yields, disks that are bounded, ends that are waited for, alerts."""

from __future__ import annotations

import importlib.util
import re

import pytest
import yaml

from tests.infra.infra_files import (
    BASE,
    INFRA,
    PLACES,
    Manifest,
    named,
    of_kind,
    pod_specs,
    ray_job_specs,
    ray_templates,
    read,
    render,
)
from tests.infra.infra_kustomize import apply_operation
from tests.infra.infra_night import settings

pytestmark = pytest.mark.integration

STAY = {"karpenter.sh/do-not-disrupt": "true", "cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}


@pytest.fixture(params=PLACES, ids=[p.name for p in PLACES], scope="module")
def rendered(request: pytest.FixtureRequest) -> list[Manifest]:
    return render(request.param)


def stays(job: str, group: str) -> bool:
    """Whether losing such a pod costs more than the work that it had in hand."""
    return group == "head" or (job == "train" and group != "submitter")


def test_nodes_of_heads_and_trainings_are_left_alone(rendered: list[Manifest]) -> None:
    for job, spec in ray_job_specs(rendered).items():
        for group, template in ray_templates(spec).items():
            annotations = template["metadata"].get("annotations", {})
            assert annotations == (STAY if stays(job, group) else {}), (job, group)


def test_who_yields_to_whom(rendered: list[Manifest]) -> None:
    classes = {m["metadata"]["name"]: m for m in of_kind(rendered, "PriorityClass")}
    assert classes["latentloom-stay"]["value"] > classes["latentloom-yield"]["value"]
    assert classes["latentloom-yield"]["preemptionPolicy"] == "Never"
    assert all("namespace" not in m["metadata"] for m in classes.values()), "they are the cluster's"
    for job, spec in ray_job_specs(rendered).items():
        for group, template in ray_templates(spec).items():
            wanted = "stay" if group == "submitter" or stays(job, group) else "yield"
            assert template["spec"]["priorityClassName"] == f"latentloom-{wanted}", (job, group)


def test_budgets_cover_heads_and_trainings_and_nobody_else(rendered: list[Manifest]) -> None:
    budgets = of_kind(rendered, "PodDisruptionBudget")
    assert {m["metadata"]["name"] for m in budgets} == {"heads", "training"}
    assert all(m["spec"]["minAvailable"] == 1000 for m in budgets)
    for job, spec in ray_job_specs(rendered).items():
        for group, template in ray_templates(spec).items():
            # What KubeRay adds to the pods of a cluster; the submitter is a Job's and has none of it.
            kind = {} if group == "submitter" else {"ray.io/node-type": "head" if group == "head" else "worker"}
            labels = {**template["metadata"]["labels"], **kind}
            covering = [m for m in budgets if m["spec"]["selector"]["matchLabels"].items() <= labels.items()]
            assert len(covering) == (1 if stays(job, group) else 0), (job, group)


def test_encoders_are_spread_over_zones(rendered: list[Manifest]) -> None:
    for job in ("encode", "backfill"):
        spec = ray_job_specs(rendered)[job]
        for group in ("decode", "gpu-spot"):
            template = ray_templates(spec)[group]
            (spread,) = template["spec"]["topologySpreadConstraints"]
            assert spread["topologyKey"] == "topology.kubernetes.io/zone"
            assert spread["whenUnsatisfiable"] == "ScheduleAnyway", "one zone alone is better than none"
            wanted = dict(spread["labelSelector"]["matchLabels"])
            assert wanted.pop("ray.io/node-type") == "worker"
            assert wanted.items() <= template["metadata"]["labels"].items()


def gibibytes(text: str) -> int:
    assert text.endswith("Gi"), text
    return int(text.removesuffix("Gi"))


def test_disks_are_bounded_and_asked_for(rendered: list[Manifest]) -> None:
    for manifest in of_kind(rendered, "RayJob", "RayCronJob"):
        for place, pod in pod_specs(manifest).items():
            sizes = {v["name"]: gibibytes(v["emptyDir"]["sizeLimit"]) for v in pod["volumes"] if "emptyDir" in v}
            assert {"tmp", "home"} <= set(sizes), place
            asked = pod["containers"][0]["resources"]["requests"].get("ephemeral-storage")
            # The one machine of the local overlay has what it has.
            if asked is not None:
                assert gibibytes(asked) >= sum(sizes.values()), place
            else:
                assert any("persistentVolumeClaim" in v for v in pod["volumes"]), place


def test_pods_get_longer_than_their_pre_stop_hook(rendered: list[Manifest]) -> None:
    stop = float(settings(rendered)["RAY_JOB_STOP_WAIT_TIME_S"])
    for job, spec in ray_job_specs(rendered).items():
        for group, template in ray_templates(spec).items():
            if "lifecycle" in template["spec"]["containers"][0]:
                assert template["spec"]["terminationGracePeriodSeconds"] >= stop + 60, (job, group)


def test_a_store_on_another_port_is_the_line_that_its_file_says() -> None:
    text = (BASE / "network.yaml").read_text()
    (patch,) = re.findall(r"patch: '(\[.*\])'", text)
    policy = named(render(BASE), "NetworkPolicy", "store")
    for operation in yaml.safe_load(patch):
        apply_operation(policy, operation)
    assert policy["spec"]["egress"][0]["ports"] == [{"protocol": "TCP", "port": 9000}]


def test_names_are_resolved_with_and_without_a_cache_on_the_node() -> None:
    (dns,) = [
        rule
        for rule in named(render(BASE), "NetworkPolicy", "ray")["spec"]["egress"]
        if {"protocol": "UDP", "port": 53} in rule.get("ports", [])
    ]
    system = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}
    assert dns["to"] == [system, {"ipBlock": {"cidr": "169.254.20.10/32"}}]


# -- the Prometheus operator -----------------------------------------------------------------------------------

MONITORING = INFRA / "monitoring"


def test_the_operators_rules_are_those_that_promtool_tested() -> None:
    spec = importlib.util.spec_from_file_location("make_rules", MONITORING / "operator" / "make_rules.py")
    assert spec is not None
    assert spec.loader is not None
    make_rules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_rules)
    made = (MONITORING / "operator" / "rules.yaml").read_text()
    assert made == make_rules.rules(), "run infra/monitoring/operator/make_rules.py"
    (rule,) = of_kind(render(MONITORING / "operator"), "PrometheusRule")
    assert [rule["spec"]] == read(MONITORING / "alerts.yaml")


def test_the_operator_scrapes_what_a_prometheus_without_it_scrapes() -> None:
    (monitor,) = of_kind(render(MONITORING / "operator"), "PodMonitor")
    (scrape, _) = read(MONITORING / "prometheus-kubernetes.yaml")[0]["scrape_configs"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    keep, *labels = scrape["relabel_configs"]
    assert endpoint["port"] == keep["regex"]
    assert [(r["sourceLabels"], r["targetLabel"]) for r in endpoint["relabelings"]] == [
        (r["source_labels"], r["target_label"]) for r in labels
    ]
    selector = monitor["spec"]["selector"]["matchLabels"]
    for spec in ray_job_specs(render(BASE)).values():
        for group, template in ray_templates(spec).items():
            ports = [p["name"] for c in template["spec"]["containers"] for p in c.get("ports", [])]
            assert (endpoint["port"] in ports) == (group != "submitter")
            assert selector.items() <= template["metadata"]["labels"].items()
