"""Every file under infra/ by the validator of its kind; what a validator does not know is checked here."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.storage.root import Root
from tests.infra.infra_files import INFRA, REPOSITORY, Manifest, named, of_kind, pod_specs, read, render
from tests.support.rows import claim, committer, latent_rows, planned_root, rejected_rows

pytestmark = pytest.mark.integration

DOCKER, MONITORING, TERRAFORM = INFRA / "docker", INFRA / "monitoring", INFRA / "terraform"
DOCKERFILES = sorted(p for p in DOCKER.glob("Dockerfile*") if p.suffix != ".dockerignore")
YAML = sorted(p for p in INFRA.rglob("*.yaml"))


def program(name: str) -> str:
    """A program on the path or beside this Python; skips when it is on neither."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if not found:
        pytest.skip(f"{name} is not installed")
    return found


def call(*command: str, cwd: Path = REPOSITORY) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_yamllint() -> None:
    assert len(YAML) > 25
    call(program("yamllint"), "--strict", "-c", "infra/.yamllint.yaml", "infra")


def test_nothing_names_this_place() -> None:
    for path in INFRA.rglob("*"):
        if path.is_file() and path.suffix != ".lock" and "__pycache__" not in path.parts:
            text = path.read_text()
            assert not re.search(r"/work/|/opt/wheels|--(extra-)?index-url [^\"$<]*//", text), path


# -- images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_hadolint(path: Path) -> None:
    call(program("hadolint"), "--failure-threshold", "style", str(path))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_images_are_pinned_and_run_as_a_number(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    (base,) = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+[\w.-]*", base)
    user = [line.split()[1] for line in lines if line.startswith("USER ")][-1]
    assert re.fullmatch(r"[1-9]\d*:\d+", user)
    installs = [line for line in lines if "pip install" in line]
    assert installs
    for line in installs:
        assert "--no-deps" in line
        assert "--require-hashes" in line or line.rstrip(" \\").endswith(" .")
    for source in re.findall(r"^COPY (.+) \S+$", path.read_text(), re.MULTILINE):
        for each in source.split():
            assert (REPOSITORY / each).exists(), f"{each} is not there to be copied"
    assert path.with_name(path.name + ".dockerignore").is_file()


def locked(kind: str) -> dict[str, str]:
    text = (DOCKER / f"requirements-{kind}.lock").read_text()
    return {m[1].lower().replace("_", "-"): m[2] for m in re.finditer(r"^([\w.-]+)==(\S+) \\$", text, re.MULTILINE)}


def constraints() -> dict[str, str]:
    text = (REPOSITORY / "constraints.txt").read_text()
    return {m[1].lower().replace("_", "-"): m[2] for m in re.finditer(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}


@pytest.mark.parametrize("kind", ["gpu", "cpu", "mlflow"])
def test_locks_hold_hashes_for_everything(kind: str) -> None:
    text = (DOCKER / f"requirements-{kind}.lock").read_text()
    pins = len(re.findall(r"^[\w.-]+(\[[\w,-]+\])?==", text, re.MULTILINE))
    blocks = re.findall(
        r"^[\w.-]+(?:\[[\w,-]+\])?==\S+ \\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n?)+", text, re.MULTILINE
    )
    assert pins == len(blocks) > 50
    assert "://" not in text
    assert "index" not in re.sub(r"^[\w.-]+==.*$", "", text, flags=re.MULTILINE).replace("--index", "index")


@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_locks_are_what_is_tested_here(kind: str) -> None:
    ours, tested = locked(kind), constraints()
    assert {n: v for n, v in ours.items() if n in tested and v.partition("+")[0] != tested[n]} == {}
    project = (REPOSITORY / "pyproject.toml").read_text()
    direct = re.search(r"^dependencies = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert direct is not None
    for name in re.findall(r'^  "([\w-]+)', direct[1], re.MULTILINE):
        assert name.lower() in ours, f"{name} is not in the lock: run infra/docker/lock.sh"


# The oldest driver series for a CUDA major version: "Minor Version Compatibility" of NVIDIA's CUDA Compatibility.
OLDEST_DRIVER = {12: 525, 13: 580}


def test_the_gpu_image_holds_one_cuda_and_every_file_names_its_driver() -> None:
    names = [name for name in locked("gpu") if name.startswith(("nvidia-", "cuda-"))]
    majors = {m[1] for name in names if (m := re.search(r"-cu(\d+)$", name))}
    majors |= {locked("gpu")["cuda-toolkit"].split(".")[0]}
    assert len(majors) == 1, "torch's libraries are of one CUDA"
    dockerfile = (DOCKER / "Dockerfile").read_text()
    (base,) = re.findall(r"^FROM (\S+)$", dockerfile, re.MULTILINE)
    assert base.endswith("-cpu"), "a base with CUDA would bring another one"
    assert re.search(r"apt-get install .*g\+\+", dockerfile), "Triton builds its launchers"
    driver = OLDEST_DRIVER[int(majors.pop())]
    for path in (DOCKER / "Dockerfile", INFRA / "ray" / "aws.yaml", INFRA / "ray" / "gcp.yaml", INFRA / "RUNBOOK.md"):
        assert re.search(rf"\b{driver}\s+(#\s+)?series", path.read_text()), path
    (gcp,) = read(INFRA / "ray" / "gcp.yaml")
    (image,) = {
        d["initializeParams"]["sourceImage"] for d in gcp["available_node_types"]["gpu"]["node_config"]["disks"]
    }
    assert int(image.rpartition("-")[2]) >= driver


def test_machines_on_ec2_have_an_image_of_their_own_choice() -> None:
    (config,) = read(INFRA / "ray" / "aws.yaml")
    images = {kind["node_config"].get("ImageId") for kind in config["available_node_types"].values()}
    (image,) = images
    assert re.fullmatch(
        r"resolve:ssm:/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-[\w./-]+/ami-id", image
    )


def test_the_mlflow_server_is_of_the_clients_version() -> None:
    version = constraints()["mlflow"]
    assert locked("mlflow")["mlflow"] == version
    for path in (INFRA / "mlflow" / "server.yaml", INFRA / "mlflow" / "gc.yaml", INFRA / "compose" / "compose.yaml"):
        assert set(re.findall(r"latentloom-mlflow:(\S+)", path.read_text())) == {version}


# -- compose ---------------------------------------------------------------------------------------------------


def compose() -> Manifest:
    (value,) = read(INFRA / "compose" / "compose.yaml")
    return value


def test_compose_by_its_specification() -> None:
    path = "infra/compose/compose.yaml"
    call(program("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", path)


def test_compose_services_files_and_variables() -> None:
    value = compose()
    services = value["services"]
    assert {"head", "worker", "postgres", "s3", "mlflow", "prometheus", "grafana"} <= set(services)
    text = (INFRA / "compose" / "compose.yaml").read_text()
    known = set(re.findall(r"^(\w+)=", (INFRA / "compose" / "env.example").read_text(), re.MULTILINE))
    assert set(re.findall(r"\$\{(\w+)", text)) == known
    for name, service in services.items():
        assert not service["image"].endswith(":latest"), name
        assert ":" in service["image"], name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} is published to the network"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (INFRA / "compose" / source).exists(), volume
            else:
                assert source in value["volumes"], volume
        for other in service.get("depends_on", {}):
            assert other in services
        if "build" in service:
            assert (INFRA / "compose" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


# -- MLflow ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mlflow() -> list[Manifest]:
    return render(INFRA / "mlflow")


def test_mlflow_objects_are_valid(mlflow: list[Manifest]) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for manifest in mlflow:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    assert named(mlflow, "ServiceAccount", "mlflow")["automountServiceAccountToken"] is False


def test_mlflow_upgrades_before_it_serves(mlflow: list[Manifest]) -> None:
    deployment = named(mlflow, "Deployment", "mlflow")["spec"]
    assert deployment["strategy"] == {"type": "Recreate"}
    pod = deployment["template"]["spec"]
    assert ["db upgrade" in " ".join(c["command"]) for c in pod["initContainers"]] == [True, True]
    assert "--app-name=basic-auth" in pod["containers"][0]["command"]
    for manifest in mlflow:
        for spec in pod_specs(manifest).values():
            assert spec["securityContext"]["runAsNonRoot"] is True
            for container in spec["containers"] + spec.get("initContainers", []):
                assert container["securityContext"]["readOnlyRootFilesystem"] is True
                assert container["resources"]["limits"]["memory"]
    assert not of_kind(mlflow, "Secret")


# -- Ray without Kubernetes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_ray_up_files_by_rays_own_schema(cloud: str) -> None:
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    (config,) = read(INFRA / "ray" / f"{cloud}.yaml")
    filled = fillout_defaults(config)
    validate_config(filled)
    types = config["available_node_types"]
    assert set(filled["available_node_types"]) == set(types) == {"head", "decode", "gpu"}
    assert types["gpu"]["resources"]["GPU"] == 1
    assert types["gpu"]["min_workers"] == types["decode"]["min_workers"] == 0
    assert "spot" in json.dumps(types["gpu"]).lower()
    assert any("RAY_AUTH_MODE=token" in o for o in config["docker"]["run_options"])
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
    assert not config["setup_commands"], "nothing is installed on a machine"
    config["available_node_typos"] = {}
    with pytest.raises(Exception, match="available_node_typos"):
        validate_config(fillout_defaults(config))


# -- Terraform -------------------------------------------------------------------------------------------------


def terraform() -> dict[str, Any]:
    """All blocks of all files: {"resource": [...], "data": [...], ...}, strings without their quotes."""
    hcl2 = pytest.importorskip("hcl2", reason="pip install python-hcl2")
    blocks: dict[str, Any] = {}
    for path in sorted(TERRAFORM.glob("*.tf")):
        for kind, values in hcl2.loads(path.read_text()).items():
            blocks.setdefault(kind, []).extend(values)
    return json.loads(re.sub(r'\\"', "", json.dumps(blocks)))  # type: ignore[no-any-return]


def test_terraform_is_formatted() -> None:
    call(program("terraform"), "fmt", "-check", "-recursive", cwd=TERRAFORM)


def test_terraform_bucket() -> None:
    blocks = terraform()
    kinds = {kind for block in blocks["resource"] for kind in block if not kind.startswith("__")}
    assert {
        "aws_s3_bucket",
        "aws_s3_bucket_versioning",
        "aws_s3_bucket_public_access_block",
        "aws_s3_bucket_lifecycle_configuration",
        "aws_s3_bucket_policy",
        "aws_iam_role",
    } <= kinds
    text = (TERRAFORM / "main.tf").read_text()
    assert "abort_incomplete_multipart_upload" in text
    assert "s3:if-none-match" in text
    declared = {name for block in blocks["variable"] for name in block if not name.startswith("__")}
    assert set(re.findall(r"\bvar\.(\w+)", text)) == declared


def test_the_gateway_endpoint_is_made_where_route_tables_are_given() -> None:
    (endpoint,) = [r["aws_vpc_endpoint"]["store"] for r in terraform()["resource"] if "aws_vpc_endpoint" in r]
    assert endpoint["vpc_endpoint_type"] == "Gateway"
    assert endpoint["service_name"].endswith(".s3")
    assert "var.route_table_ids" in endpoint["route_table_ids"]
    assert "length(var.route_table_ids) > 0" in endpoint["count"], "who gives none gets none"


def test_roles_write_no_source_and_workers_delete_checkpoints_alone() -> None:
    defaults = {name: body.get("default") for v in terraform()["variable"] for name, body in v.items()}
    assert set(defaults["service_accounts"]) == set(defaults["deletable_patterns"]) == {"head", "worker"}
    assert defaults["deletable_patterns"]["worker"] == ["*/checkpoints/*"]
    (access,) = [d["aws_iam_policy_document"]["access"] for d in terraform()["data"] if "access" in str(d)[:60]]
    statements = {s["sid"]: s for s in access["statement"]}
    assert (statements["SourcesStay"]["effect"], "var.source_prefixes" in str(statements["SourcesStay"])) == (
        "Deny",
        True,
    )
    assert set(statements["SourcesStay"]["actions"]) == {"s3:PutObject", "s3:DeleteObject"}
    allowed = [
        a for s in statements.values() if s["effect"] == "Allow" and s["sid"] != "Delete" for a in s["actions"]
    ]
    assert not [action for action in allowed if "Delete" in action]
    # What the base reads without writing it lies below those prefixes.
    entrypoints = " ".join(p.read_text() for p in (REPOSITORY / "infra" / "kuberay" / "base").glob("*.yaml"))
    read = re.findall(
        r"(?:source\.uri|reference\.uri|codec\.path|model\.codec|requests\.uri)=\$\{LATENTLOOM_STORE\}/(\w+)",
        entrypoints,
    )
    assert read
    assert set(read) <= set(defaults["source_prefixes"])


def test_the_bucket_policy_asks_for_conditions_exactly_where_the_store_sets_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The ledger's names are all covered, and nothing that is written without a condition is."""
    (patterns,) = [v["ledger_patterns"]["default"] for v in terraform()["variable"] if "ledger_patterns" in v]
    conditional, plain = set(), set()
    put, put_if_absent = Root.put, Root.put_if_absent

    def note(names: set[str], method: Any) -> Any:
        def call(self: Root, key: str, data: bytes) -> Any:
            names.add(f"{self.uri.rpartition('/')[2]}/{key}")
            return method(self, key, data)

        return call

    monkeypatch.setattr(Root, "put", note(plain, put))
    monkeypatch.setattr(Root, "put_if_absent", note(conditional, put_if_absent))
    root = planned_root("memory://infra-policy/set", units=2, rows=3)
    generation = claim(root)
    committer(root, generation).commit(latent_rows([(0, 0), (0, 1)]), rejected_rows([(0, 2)], "truncated"), {})
    generation.close({"status": "done"})
    claim(root).close({"status": "done"})

    def covered(key: str) -> bool:
        return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)

    assert [key for key in plain if covered(key)] == []
    records = {k for k in conditional if re.search(r"/(ledger/|dataset\.json|generations/|plan/v)", k)}
    assert len(records) >= 5
    assert [key for key in records if not covered(key)] == []
    assert covered("model/generations/00000001/open.json")
    assert not covered("model/control/stop-000001")


# -- monitoring ------------------------------------------------------------------------------------------------


def rules() -> list[Manifest]:
    return [r for group in read(MONITORING / "alerts.yaml")[0]["groups"] for r in group["rules"]]


def test_promtool() -> None:
    promtool = program("promtool")
    call(promtool, "check", "rules", str(MONITORING / "alerts.yaml"))
    call(promtool, "test", "rules", str(MONITORING / "alerts.test.yaml"))


@pytest.mark.parametrize("path", [INFRA / "compose" / "prometheus.yaml", MONITORING / "prometheus-kubernetes.yaml"])
def test_prometheus_configurations(path: Path, tmp_path: Path) -> None:
    promtool = program("promtool")
    (config,) = read(path)
    config["rule_files"] = [str(MONITORING / Path(f).name) for f in config["rule_files"]]
    for scrape in config["scrape_configs"]:
        # Some builds of promtool are without the discovery of Kubernetes; everything else is checked as it is.
        for discovery in scrape.pop("kubernetes_sd_configs", []):
            assert discovery["role"] == "pod"
        if "basic_auth" in scrape:
            password = tmp_path / "password"
            password.write_text("x")
            scrape["basic_auth"]["password_file"] = str(password)
    written = tmp_path / "prometheus.yaml"
    written.write_text(yaml.safe_dump(config))
    call(promtool, "check", "config", str(written))


def test_every_alert_is_tested_and_explained() -> None:
    alerts = {r["alert"]: r for r in rules() if "alert" in r}
    tests = read(MONITORING / "alerts.test.yaml")[0]["tests"]
    fired = {t["alertname"] for test in tests for t in test.get("alert_rule_test", []) if t["exp_alerts"]}
    assert fired == set(alerts)
    headings = re.findall(r"^### (\w+)$", (INFRA / "RUNBOOK.md").read_text(), re.MULTILINE)
    assert set(alerts) <= set(headings)
    for name, alert in alerts.items():
        assert alert["annotations"]["runbook"] == f"infra/RUNBOOK.md#{name.lower()}"


def metric_names() -> set[str]:
    """The project's metrics that rules and dashboard ask for, as Ray is given them."""
    text = (MONITORING / "alerts.yaml").read_text() + (MONITORING / "dashboard.json").read_text()
    names = {n for n in re.findall(r"\bray_(latentloom_[a-z]+_\w+)", text) if not n.endswith("_")}
    return {n.removesuffix("_total") for n in names}


def test_metrics_asked_for_are_metrics_the_product_has() -> None:
    """Each name, or its last part, stands in the code that reports it; the topology test sees Ray export it."""
    sources = {
        "encode": ["pipeline/encode/stages.py", "pipeline/encode/passes.py", "pipeline/dataflow/monitor.py"],
        "sample": ["pipeline/sample/stages.py", "pipeline/dataflow/monitor.py"],
        "train": ["pipeline/train/loop.py", "pipeline/train/loop.py", "pipeline/train/worker.py"],
    }
    found = metric_names()
    assert len(found) >= 10
    for name in found:
        _, job, figure = name.split("_", 2)
        text = "".join((REPOSITORY / p).read_text() for p in sources[job])
        assert f'"{figure}"' in text or f'"{name}"' in text, f"nothing reports {name}"


def test_dashboard() -> None:
    board = json.loads((MONITORING / "dashboard.json").read_text())
    ids = [p["id"] for p in board["panels"]]
    assert len(ids) == len(set(ids))
    known = {r["record"] for r in rules() if "record" in r}
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            assert target["datasource"] == {"type": "prometheus", "uid": "prometheus"}
            assert set(re.findall(r"latentloom:\w+:\w+", target["expr"])) <= known
    provisioned = read(INFRA / "compose" / "grafana" / "provisioning" / "datasources" / "prometheus.yaml")[0]
    assert provisioned["datasources"][0]["uid"] == "prometheus"
