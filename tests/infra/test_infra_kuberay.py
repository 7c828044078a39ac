"""The KubeRay files: rendered, valid by the operator's definitions, nothing lost by a patch, commands that parse."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import yaml

from tests.infra import infra_schemas
from tests.infra.infra_files import (
    BASE,
    COMPONENTS,
    INFRA,
    KUSTOMIZATIONS,
    OVERLAYS,
    PAIRS,
    PLACES,
    REPOSITORY,
    Manifest,
    combined,
    named,
    of_kind,
    pod_specs,
    ray_job_specs,
    ray_templates,
    render,
    tool,
)
from tests.infra.infra_kustomize import render_here
from tests.infra.infra_night import JOB_OF, configurations, misfits, parsed, settings

pytestmark = pytest.mark.integration

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")

RAY_KINDS = ("RayJob", "RayCronJob")
KUEUE_KINDS = ("ResourceFlavor", "ClusterQueue", "LocalQueue")
NIGHT = ("encode", "embed-text", "compact", "train", "sample", "evaluate", "promote", "verify")
JOBS = {*NIGHT, "backfill", "gc"}


@pytest.fixture(params=PLACES, ids=[p.name for p in PLACES], scope="module")
def rendered(request: pytest.FixtureRequest) -> list[Manifest]:
    return render(request.param)


@pytest.fixture(scope="module")
def base() -> list[Manifest]:
    return render(BASE)


@pytest.fixture(scope="module")
def definitions(shared_data: Path) -> Path:
    folder = shared_data / "kuberay-crds"
    if not folder.is_dir():
        pytest.skip(f"no KubeRay definitions at {folder}")
    return folder


def test_the_overlays_are_those_announced() -> None:
    assert {p.name for p in OVERLAYS} == {"local", "eks-spot", "gke-spot", "kueue", "raycronjob"}


# Named without the temporary folder: processes that share a suite have to collect the same names.
@pytest.mark.parametrize(
    "folder",
    KUSTOMIZATIONS + PAIRS,
    ids=[str(p.relative_to(INFRA)) for p in KUSTOMIZATIONS] + [p.name for p in PAIRS],
)
def test_our_renderer_and_the_real_one_agree(folder: Path) -> None:
    if tool() is None:
        pytest.skip("neither kubectl nor kustomize is installed: the tests render with their own hand")

    def sort(manifests: list[Manifest]) -> list[str]:
        return sorted(yaml.safe_dump(m) for m in manifests)

    assert sort(render_here(folder)) == sort(render(folder))


def test_the_components_are_those_announced() -> None:
    assert {p.name for p in COMPONENTS} == {"images", "kueue", "kueue-eks", "kueue-gke", "logs", "raycronjob"}


@pytest.mark.parametrize("folder", PLACES + COMPONENTS, ids=[p.name for p in PLACES + COMPONENTS])
def test_only_json6902_patches(folder: Path) -> None:
    wanted = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert not {"patchesStrategicMerge", "patchesJson6902", "commonLabels"} & set(wanted)
    for patch in wanted.get("patches", []):
        operations = yaml.safe_load(patch["patch"])
        assert all({"op", "path"} <= set(o) for o in operations), patch


# -- valid -----------------------------------------------------------------------------------------------------


def test_ray_objects_are_valid_by_the_operators_definitions(rendered: list[Manifest], definitions: Path) -> None:
    found = of_kind(rendered, *RAY_KINDS)
    assert {m["metadata"]["name"] for m in found} == JOBS
    for manifest in found:
        assert infra_schemas.problems(manifest, definitions) == []


def test_the_definitions_are_strict(base: list[Manifest], definitions: Path) -> None:
    job = copy.deepcopy(named(base, "RayJob", "encode"))
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    job["spec"]["backofLimit"] = 3
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplicas"] = "none"
    assert len(infra_schemas.problems(job, definitions)) == 3


def test_pods_and_core_objects_are_valid(rendered: list[Manifest]) -> None:
    version = kubernetes_validate.latest_version()
    for manifest in rendered:
        if manifest["kind"] not in RAY_KINDS + KUEUE_KINDS:
            kubernetes_validate.validate(manifest, version, strict=True)
        for place, spec in pod_specs(manifest).items():
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec}
            try:
                kubernetes_validate.validate(pod, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                pytest.fail(f"{place}: {error}")


def test_every_template_of_a_ray_job_is_found(rendered: list[Manifest]) -> None:
    groups = {name: set(ray_templates(spec)) for name, spec in ray_job_specs(rendered).items()}
    assert groups["encode"] == groups["backfill"] == {"submitter", "head", "decode", "gpu-spot"}
    assert groups["train"] == {"submitter", "head", "gpu"}
    assert groups["sample"] == {"submitter", "head", "gpu-spot"}
    for name in ("embed-text", "compact", "evaluate", "promote", "verify", "gc"):
        assert groups[name] == {"submitter", "head"}, name


# -- nothing lost by a patch -----------------------------------------------------------------------------------

_KEPT = (
    "name",
    "envFrom",
    "ports",
    "securityContext",
    "startupProbe",
    "readinessProbe",
    "livenessProbe",
    "lifecycle",
)


def losses(before: Manifest, after: Manifest) -> list[str]:
    """What a pod template has in `before` and lacks in `after`, or has changed though no overlay may."""
    lost = []
    old, new = before["spec"], after.get("spec", {})
    kinds = {"containers", "initContainers"}
    for key in set(old) - kinds - {"volumes", "tolerations", "terminationGracePeriodSeconds"}:
        if new.get(key) != old[key]:
            lost.append(key)
    for key in ("volumes", "tolerations"):
        lost += [f"{key}: {each}" for each in old.get(key, []) if each not in new.get(key, [])]
    if ("terminationGracePeriodSeconds" in old) != ("terminationGracePeriodSeconds" in new):
        lost.append("terminationGracePeriodSeconds")
    if before.get("metadata") != after.get("metadata"):
        lost.append("metadata")
    containers = {c["name"]: c for kind in kinds for c in new.get(kind, [])}
    for container in (c for kind in kinds for c in old.get(kind, [])):
        found = containers.get(container["name"], {})
        lost += [f"{container['name']}.{k}" for k in _KEPT if found.get(k) != container.get(k)]
        lost += [f"{container['name']}.{k}" for k in ("image", "resources") if not found.get(k)]
        mounts = found.get("volumeMounts", [])
        lost += [f"{container['name']}: {m}" for m in container.get("volumeMounts", []) if m not in mounts]
    return lost


def test_no_patch_loses_a_pod_template(base: list[Manifest], rendered: list[Manifest]) -> None:
    ours = ray_job_specs(rendered)
    for name, spec in ray_job_specs(base).items():
        templates = ray_templates(ours[name])
        for group, template in ray_templates(spec).items():
            assert losses(template, templates[group]) == [], (name, group)


def test_a_merge_patch_would_be_noticed(base: list[Manifest]) -> None:
    """What a strategic merge does to a list without a merge key: the whole list is replaced."""
    spec = copy.deepcopy(ray_job_specs(base)["encode"])
    spec["rayClusterSpec"]["workerGroupSpecs"] = [{"groupName": "decode", "replicas": 3, "template": {}}]
    templates = ray_templates(spec)
    assert "gpu-spot" not in templates
    assert losses(ray_templates(ray_job_specs(base)["encode"])["decode"], templates["decode"])


# -- what a cluster relies on ----------------------------------------------------------------------------------


def test_jobs_end_retry_and_clean_up(rendered: list[Manifest]) -> None:
    for name, spec in ray_job_specs(rendered).items():
        assert spec["submissionMode"] == "K8sJobMode", name
        assert spec["backoffLimit"] >= 1, name
        assert spec["activeDeadlineSeconds"] >= 3600, name
        # Time for a node and its image; a cluster that never comes up must not take the night.
        assert 900 <= spec["preRunningDeadlineSeconds"] <= (21600 if name == "train" else 1800), name
        assert spec["shutdownAfterJobFinishes"] is True, name
        assert spec["ttlSecondsAfterFinished"] > 0, name
        assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}, name
        # An operator that gets this object twice must not run it twice: names are short enough for what is appended.
        assert len(name) <= 30


def test_encode_scales_from_and_to_zero_and_train_is_a_gang(base: list[Manifest]) -> None:
    encode = ray_job_specs(base)["encode"]["rayClusterSpec"]
    assert encode["enableInTreeAutoscaling"] is True
    for group in encode["workerGroupSpecs"]:
        assert (group["replicas"], group["minReplicas"]) == (0, 0)
        assert group["maxReplicas"] > 0
    (gang,) = ray_job_specs(base)["train"]["rayClusterSpec"]["workerGroupSpecs"]
    assert gang["replicas"] == gang["minReplicas"] == gang["maxReplicas"]


def test_a_training_pod_is_a_whole_node_and_has_a_gpu_and_cpus_for_each_worker(base: list[Manifest]) -> None:
    spec = ray_job_specs(base)["train"]
    (gang,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    limits = gang["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus, train = int(limits["nvidia.com/gpu"]), parsed(spec["entrypoint"], settings(base))[1].train
    assert gpus == 8, "NCCL takes pods for hosts"
    assert gang["replicas"] * gpus == train.num_workers
    assert float(limits["cpu"]) >= gpus * train.num_cpus


def test_requests_of_the_encode_job_fit_its_groups(rendered: list[Manifest]) -> None:
    """What the entrypoint asks the autoscaler for must be within what the groups may grow to."""
    for name in ("encode", "backfill"):
        fits(ray_job_specs(rendered)[name], settings(rendered))


def fits(spec: Manifest, values: dict[str, str]) -> None:
    limits = {"cpu": 0.0, "nvidia.com/gpu": 0.0}
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        resources = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        for key in limits:
            limits[key] += group["maxReplicas"] * float(resources.get(key, 0))
    config = parsed(spec["entrypoint"], values)[1]
    assert (config.cluster.request_cpus or 0) <= limits["cpu"]
    assert (config.cluster.request_gpus or 0) <= limits["nvidia.com/gpu"]


def test_training_gets_the_time_of_a_checkpoint(base: list[Manifest]) -> None:
    templates = ray_templates(ray_job_specs(base)["train"])
    stop = float(settings(base)["RAY_JOB_STOP_WAIT_TIME_S"])
    assert stop >= 600
    assert templates["head"]["spec"]["terminationGracePeriodSeconds"] >= stop + 60
    for spec in ray_job_specs(base).values():
        (head,) = ray_templates(spec)["head"]["spec"]["containers"]
        assert head["lifecycle"]["preStop"]["exec"]["command"] == ["python", "/opt/latentloom/stop_jobs.py"]
    assert templates["gpu"]["spec"]["terminationGracePeriodSeconds"] >= 600


def test_pods_run_unprivileged_with_probes_and_limits(rendered: list[Manifest]) -> None:
    for name, spec in ray_job_specs(rendered).items():
        for group, template in ray_templates(spec).items():
            pod, (container,) = template["spec"], template["spec"]["containers"]
            where = f"{name}/{group}"
            assert pod["restartPolicy"] == "Never", where
            user = pod["securityContext"]
            assert user["runAsNonRoot"] is True, where
            assert user["runAsUser"] > 0, where
            assert user["seccompProfile"] == {"type": "RuntimeDefault"}, where
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, where
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, where
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, where
            assert "memory" in container["resources"]["limits"], where
            for other in pod.get("initContainers", []):
                assert other["securityContext"] == container["securityContext"], where
                assert "memory" in other["resources"]["limits"], where
            if group != "submitter":
                assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container), where
                assert container["resources"]["limits"]["cpu"], where


def test_every_part_of_a_cluster_has_an_account_of_its_own_and_no_token(rendered: list[Manifest]) -> None:
    for account in of_kind(rendered, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False, account["metadata"]["name"]
    for name, spec in ray_job_specs(rendered).items():
        for group, template in ray_templates(spec).items():
            pod, part = template["spec"], group if group in ("submitter", "head") else "worker"
            assert pod["serviceAccountName"] == f"latentloom-{part}", (name, group)
            assert pod["automountServiceAccountToken"] is False, (name, group)
            mounts = [m["mountPath"] for c in pod["containers"] for m in c["volumeMounts"]]
            assert not [m for m in mounts if m.startswith("/var/run/secrets/kubernetes.io")], (name, group)


def test_the_autoscaler_alone_speaks_to_the_kubernetes_api(base: list[Manifest]) -> None:
    for name, spec in ray_job_specs(base).items():
        cluster, head = spec["rayClusterSpec"], ray_templates(spec)["head"]["spec"]
        holding = [v["name"] for v in head["volumes"] if "serviceAccountToken" in yaml.safe_dump(v)]
        assert holding == (["kubernetes-api"] if cluster.get("enableInTreeAutoscaling") else []), name
    options = ray_job_specs(base)["encode"]["rayClusterSpec"]["autoscalerOptions"]
    assert options["securityContext"]["readOnlyRootFilesystem"] is True
    assert {m["name"]: m["mountPath"] for m in options["volumeMounts"]} == {
        "tmp": "/tmp",
        "home": settings(base)["HOME"],
        "kubernetes-api": "/var/run/secrets/kubernetes.io/serviceaccount",
    }


def test_what_is_written_to_a_pod_is_a_volume_of_its_own(rendered: list[Manifest]) -> None:
    home = settings(rendered)["HOME"]
    for name, spec in ray_job_specs(rendered).items():
        for group, template in ray_templates(spec).items():
            pod = template["spec"]
            volumes = {v["name"]: v for v in pod["volumes"]}
            places = {m["mountPath"]: volumes[m["name"]] for m in pod["containers"][0]["volumeMounts"]}
            journal = set() if group == "submitter" else {"/var/lib/latentloom/journal"}
            assert {"/tmp", home} | journal <= {p for p, v in places.items() if "emptyDir" in v}, (name, group)


def test_credentials_of_the_tracker_are_where_it_is_spoken_to(rendered: list[Manifest]) -> None:
    for name, spec in ray_job_specs(rendered).items():
        holding = {
            group
            for group, template in ray_templates(spec).items()
            if any("secretRef" in source for source in template["spec"]["containers"][0]["envFrom"])
        }
        assert holding == ({"head", "gpu"} if name == "train" else {"head"}), name


def test_no_keys_anywhere(rendered: list[Manifest]) -> None:
    text = yaml.safe_dump_all(rendered)
    assert not of_kind(rendered, "Secret")
    assert not re.search(r"(?i)access_key|secret_key|AKIA|password|private_key", text)


def test_every_pod_is_covered_by_the_network_policies(rendered: list[Manifest]) -> None:
    deny = named(rendered, "NetworkPolicy", "deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    selector = named(rendered, "NetworkPolicy", "ray")["spec"]["podSelector"]["matchLabels"]
    for spec in ray_job_specs(rendered).values():
        for template in ray_templates(spec).values():
            assert selector.items() <= template["metadata"]["labels"].items()


def test_service_accounts_and_settings_exist(rendered: list[Manifest]) -> None:
    accounts = {m["metadata"]["name"] for m in of_kind(rendered, "ServiceAccount")}
    maps = {m["metadata"]["name"] for m in of_kind(rendered, "ConfigMap")}
    for spec in ray_job_specs(rendered).values():
        for template in ray_templates(spec).values():
            assert template["spec"]["serviceAccountName"] in accounts
            for source in template["spec"]["containers"][0]["envFrom"]:
                assert "secretRef" in source or source["configMapRef"]["name"] in maps


def test_workload_identity(base: list[Manifest]) -> None:
    eks = render(next(p for p in OVERLAYS if p.name == "eks-spot"))
    for part in ("head", "worker"):
        role = named(eks, "ServiceAccount", f"latentloom-{part}")["metadata"]["annotations"][
            "eks.amazonaws.com/role-arn"
        ]
        assert role.endswith(f":role/latentloom-{part}")
    assert "annotations" not in named(eks, "ServiceAccount", "latentloom-submitter")["metadata"]
    gke = render(next(p for p in OVERLAYS if p.name == "gke-spot"))
    token = settings(gke)["AWS_WEB_IDENTITY_TOKEN_FILE"]
    for name, spec in ray_job_specs(gke).items():
        for group, template in ray_templates(spec).items():
            if group != "submitter":
                mounts = template["spec"]["containers"][0]["volumeMounts"]
                assert any(token.startswith(m["mountPath"] + "/") for m in mounts), (name, group)
                (role,) = [
                    e["value"] for e in template["spec"]["containers"][0]["env"] if e["name"] == "AWS_ROLE_ARN"
                ]
                assert role.endswith("-head" if group == "head" else "-worker"), (name, group)


def test_versions_are_one() -> None:
    (ray,) = re.findall(r"^ray==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    for spec in ray_job_specs(render(BASE)).values():
        assert spec["rayClusterSpec"]["rayVersion"] == ray
    for name in ("Dockerfile", "Dockerfile.cpu"):
        assert f"rayproject/ray:{ray}-py311" in (REPOSITORY / "infra" / "docker" / name).read_text()


@pytest.mark.parametrize("place", [p for p in PLACES if "kueue" in p.name], ids=lambda p: p.name)
def test_kueue_owns_every_job(place: Path) -> None:
    kueue = render(place)
    queue = named(kueue, "LocalQueue", "latentloom")["metadata"]
    for job in of_kind(kueue, "RayJob"):
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue["name"]
        assert job["metadata"]["namespace"] == queue["namespace"]
        assert job["spec"]["suspend"] is True, "the queue starts it"
        assert not job["spec"]["rayClusterSpec"].get("enableInTreeAutoscaling")


@pytest.mark.parametrize("place", [p for p in PLACES if "raycronjob" in p.name], ids=lambda p: p.name)
def test_the_cron_job_holds_the_whole_encode_job(place: Path) -> None:
    *others, _ = place.name.split("+")
    without = combined(*others) if others else BASE
    (cron,) = of_kind(render(place), "RayCronJob")
    expected = named(render(without), "RayJob", "encode")["spec"]
    assert expected.pop("suspend") is True
    assert cron["spec"]["jobTemplate"] == expected


# -- the commands ----------------------------------------------------------------------------------------------


def test_every_entrypoint_is_a_valid_command(rendered: list[Manifest]) -> None:
    for name, spec in ray_job_specs(rendered).items():
        job, config = parsed(spec["entrypoint"], settings(rendered))
        assert job == JOB_OF.get(name, name)
        if hasattr(config, "tracking"):
            assert config.tracking.uri == settings(rendered)["LATENTLOOM_TRACKING"]
            journal = config.tracking.journal_dir
            head = ray_templates(spec)["head"]["spec"]["containers"][0]
            assert journal in [m["mountPath"] for m in head["volumeMounts"]], "records must outlive the container"


def test_the_steps_of_a_night_fit_each_other(rendered: list[Manifest]) -> None:
    assert misfits(configurations(rendered)) == []


def test_steps_that_do_not_fit_would_be_noticed(base: list[Manifest]) -> None:
    """The night as it once was: images without labels, samples by class, and a judge that learns from labels."""
    broken = copy.deepcopy(base)
    for name, old, new in (
        ("sample", "sample/prompts.yaml", "sample/photos_256.yaml"),
        ("sample", "requests.uri=${LATENTLOOM_STORE}/prompts/night.jsonl", "requests.classes=all"),
        ("evaluate", "classifier.enabled=false", "classifier.enabled=true"),
        ("train", "latents-512/text/clip-l", "latents-512/text/t5"),
    ):
        job = named(broken, "RayJob", name)["spec"]
        assert old in job["entrypoint"]
        job["entrypoint"] = job["entrypoint"].replace(old, new)
    assert misfits(configurations(broken)) == [
        "train reads texts that embed-text does not make",
        "sample asks for classes that encode does not keep",
        "evaluate fits a classifier to labels that there are not",
    ]


def test_networks_are_fetched_for_whoever_reads_them(rendered: list[Manifest]) -> None:
    """Text encoders and judges: on the volume of every pod that computes with them, and of no other."""
    place = "/var/lib/latentloom/networks"
    for name, spec in ray_job_specs(rendered).items():
        for group, template in ray_templates(spec).items():
            pod, wanted = template["spec"], name in ("embed-text", "sample", "evaluate") and group != "submitter"
            fetching = [c for c in pod.get("initContainers", []) if c.get("restartPolicy") != "Always"]
            assert [c["name"] for c in fetching] == (["networks"] if wanted else []), name
            mounts = {m["mountPath"]: m for m in pod["containers"][0]["volumeMounts"]}
            assert (place in mounts) == wanted, (name, group)
            if wanted:
                (init,) = fetching
                assert place in [m["mountPath"] for m in init["volumeMounts"]]
                assert mounts[place]["readOnly"] is True
                assert init["securityContext"] == pod["containers"][0]["securityContext"]
                # It reads the store as the container does: the same settings, the same identity, the same volumes.
                assert init.get("env") == pod["containers"][0].get("env")
                theirs = {m["mountPath"] for m in init["volumeMounts"]}
                assert set(mounts) - theirs <= {"/var/lib/latentloom/journal"}, (name, group)


def test_copies_of_a_template_differ_only_where_they_say(base: list[Manifest]) -> None:
    """gc and compact are verify's pods, backfill is encode on more of them: files apart, kept the same by this."""
    specs = ray_job_specs(base)

    def cluster(name: str) -> str:
        spec = copy.deepcopy(specs[name]["rayClusterSpec"])
        for group in spec.get("workerGroupSpecs", []):
            group["maxReplicas"] = 0
        return yaml.safe_dump(spec).replace(f"component: {name}", "component: x")

    assert cluster("gc") == cluster("compact") == cluster("verify")
    assert cluster("backfill") == cluster("encode")
    for more, fewer in zip(
        *(specs[n]["rayClusterSpec"]["workerGroupSpecs"] for n in ("backfill", "encode")), strict=True
    ):
        assert more["maxReplicas"] > fewer["maxReplicas"]


def test_a_wrong_key_would_be_noticed(base: list[Manifest]) -> None:
    entrypoint = ray_job_specs(base)["encode"]["entrypoint"] + " encode.actorz=2"
    with pytest.raises(Exception, match="actorz"):
        parsed(entrypoint, settings(base))
