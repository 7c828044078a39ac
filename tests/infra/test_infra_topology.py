"""What compose.yaml describes, natively: Ray head and worker, PostgreSQL, MLflow with users, S3; and the whole chain
through `ray job submit`, as somebody who has only the cluster's address and token."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.infra.infra_files import INFRA, REPOSITORY
from tests.infra.infra_night import launcher
from tests.infra.infra_ray_cluster import RayCluster
from tests.infra.test_infra_valid import metric_names
from tests.support.images import make_codec, make_images
from tests.support.mlflow_server import MlflowServer
from tests.support.radosgw import Radosgw

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.s3, pytest.mark.timeout(1800)]

IMAGES = 24


class Site:
    """The cluster, the store and the tracking server, and a way to submit jobs to them."""

    def __init__(self, cluster: RayCluster, bucket: str, mlflow: MlflowServer) -> None:
        self.cluster, self.store, self.mlflow = cluster, f"s3://{bucket}", mlflow
        self.exported: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._scrape, daemon=True)
        self._thread.start()

    def submit(self, job: str, *arguments: str) -> tuple[bool, dict[str, Any], str]:
        """(succeeded, the answer line, all output) of `ray job submit -- python -m jobs.<job> ...`."""
        command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", self.cluster.dashboard]
        words = [f"{REPOSITORY}/{a}" if a.startswith("configs/") else a for a in arguments]
        if job not in ("verify",):
            words += [f"tracking.uri={self.mlflow.uri}", f"tracking.journal_dir={self.cluster.folder}/journal"]
        done = subprocess.run(
            [*command, "--", "python", "-m", f"jobs.{job}", *words],
            env=self.cluster.environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        output = done.stdout + done.stderr
        answers = [line for line in output.splitlines() if line.startswith('{"')]
        print(f"$ ray job submit -- python -m jobs.{job} {' '.join(arguments)}\n{answers[-1] if answers else output}")
        return done.returncode == 0, json.loads(answers[-1]) if answers else {}, output

    def succeed(self, job: str, *arguments: str) -> dict[str, Any]:
        good, answer, output = self.submit(job, *arguments)
        assert good, output[-6000:]
        return answer

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _scrape(self) -> None:
        while not self._stop.wait(1.0):
            self.exported |= set(re.findall(r"^(ray_latentloom_\w+)", self.cluster.metrics(), re.MULTILINE))


@pytest.fixture(scope="module")
def site(radosgw: Radosgw, mlflow_stack: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    bucket = radosgw.make_bucket()
    local = tmp_path_factory.mktemp("topology")
    make_images(local / "images", IMAGES, broken=1)
    make_codec(local / "codec")
    client = radosgw.client()
    for path in local.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), bucket, str(path.relative_to(local)))
    assert mlflow_stack.auth is not None
    cluster = RayCluster(
        {
            **radosgw.environment(),
            **mlflow_stack.auth.environment(),
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
        }
    )
    cluster.start_head()
    cluster.start_worker(num_cpus=3)
    site = Site(cluster, bucket, mlflow_stack)
    yield site
    site.close()
    cluster.stop()


def test_the_cluster_asks_for_its_token(site: Site) -> None:
    assert site.cluster.status_of("/api/gcs_healthz", None) == 200, "probes have no token"
    assert site.cluster.status_of("/api/jobs/", None) == 401
    assert site.cluster.status_of("/api/jobs/", "wrong-" + "0" * 40) == 403
    assert site.cluster.status_of("/api/jobs/", site.cluster.token) == 200


def test_the_chain_through_ray_job_submit(site: Site) -> None:
    store = site.store
    size = ["image.resolution=32", "image.multiple_of=4"]
    encode = [
        "configs/encode/photos_256.yaml",
        f"source.uri={store}/images",
        *size,
        f"codec.path={store}/codec",
        f"output.uri={store}/latents",
        "encode.unit_rows=8",
        "encode.actors=1",
    ]
    encoded = site.succeed("encode", *encode)
    assert encoded["counts"]["latents"] == IMAGES
    assert encoded["counts"]["rejected"] == 1
    again = site.succeed("encode", *encode)
    assert again["counts"]["source_new"] == 0, "the same command has nothing left to do"

    verified = site.succeed("verify", f"data.uri={store}/latents", f"report={store}/reports/verify.json")
    assert verified["status"] == "done"

    trained = site.succeed(
        "train",
        "configs/train/photos_256.yaml",
        f"data.uri={store}/latents",
        f"output.uri={store}/models/first",
        "model.hidden=32",
        "model.depth=1",
        "model.heads=2",
        "train.images=64",
        "train.log_images=16",
        "train.warmup_images=16",
        "checkpoint.every_images=32",
        "stream.holdout=0",  # of so few images none may be held out
        "validation.images=0",
    )
    assert trained["counts"]["images"] == 64

    sampled = site.succeed(
        "sample",
        "configs/sample/photos_256.yaml",
        f"model.uri={store}/models/first/model",
        f"output.uri={store}/samples/first",
        "requests.count=1",
        "requests.steps=2",
        "denoise.actors=1",
    )
    assert sampled["counts"]["images"] == 4

    evaluated = site.succeed(
        "evaluate",
        "reference.kind=folder",
        f"reference.uri={store}/images",
        "reference.name=pictures",
        *size,
        f"samples.uri={store}/samples/first",
        f"codec.path={store}/codec",
        f"output.uri={store}/reports/first",
        "classifier.steps=5",
    )
    assert evaluated["figures"]

    runs = {a["mlflow_run_id"] for a in (encoded, trained, sampled, evaluated)}
    assert None not in runs
    assert len(runs) == 4


def test_ray_exported_the_metrics_that_rules_and_dashboard_ask_for(site: Site) -> None:
    """After the chain: what Prometheus would have seen of its jobs."""
    missing = {n for n in metric_names() if not {f"ray_{n}", f"ray_{n}_total"} & site.exported}
    assert missing == set(), f"Ray exported {sorted(site.exported)}"
    for name in re.findall(r"ray_latentloom_\w+_total", (INFRA / "monitoring" / "alerts.yaml").read_text()):
        assert name in site.exported


def test_a_head_that_goes_lets_training_write_its_checkpoint(site: Site, radosgw: Radosgw) -> None:
    """What the head pod's preStop hook does, on a training that would go on for hours."""
    arguments = [
        f"{REPOSITORY}/configs/train/photos_256.yaml",
        f"data.uri={site.store}/latents",
        f"output.uri={site.store}/models/stopped",
        "model.hidden=32",
        "model.depth=1",
        "model.heads=2",
        "train.images=100000000",
        "train.log_images=16",
        "checkpoint.every_images=100000000",
        "stream.holdout=0",
        "validation.images=0",
        "grid.every_images=null",
        "tracking.enabled=false",
    ]
    ray = [str(Path(sys.executable).parent / "ray"), "job"]
    address = ["--address", site.cluster.dashboard]
    submit = [*ray, "submit", *address, "--no-wait", "--submission-id", "stop-me", "--", "python", "-m", "jobs.train"]
    subprocess.run([*submit, *arguments], env=site.cluster.environment, check=True, capture_output=True, timeout=120)
    client, bucket = radosgw.client(), site.store.removeprefix("s3://")

    def keys() -> list[str]:
        listed = client.list_objects_v2(Bucket=bucket, Prefix="models/stopped/")
        return [entry["Key"] for entry in listed.get("Contents", [])]

    # Its workers have begun; no checkpoint is due for days.
    wait_for(lambda: any("/starts/" in k for k in keys()), 600)
    time.sleep(20)
    assert not any(k.endswith("/COMPLETE.json") for k in keys())
    hook = [sys.executable, str(INFRA / "docker" / "stop_jobs.py"), site.cluster.dashboard]
    subprocess.run(hook, env=site.cluster.environment, check=True, capture_output=True, timeout=360)
    assert any(k.endswith("/COMPLETE.json") for k in keys())
    logs = subprocess.run(
        [*ray, "logs", *address, "stop-me"], env=site.cluster.environment, capture_output=True, text=True, check=False
    )
    (answer,) = [json.loads(line) for line in logs.stdout.splitlines() if line.startswith('{"')]
    assert (answer["status"], answer["exit_code"]) == ("stopped", 75)


def wait_for(what: Callable[[], bool], patience_s: float) -> None:
    give_up = time.monotonic() + patience_s
    while not what():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(1)


def test_exit_codes_reach_whoever_submitted(site: Site) -> None:
    """The launcher reads the job's code from Ray's message, as KubeRay hands it on."""
    launch = launcher()
    for expected, arguments in (
        (2, ["configs/encode/photos_256.yaml", "encode.actorz=1"]),
        (3, ["configs/encode/photos_256.yaml", f"source.uri={site.store}/nothing", f"output.uri={site.store}/none"]),
    ):
        good, answer, output = site.submit("encode", *arguments)
        assert not good
        assert answer["exit_code"] == expected
        message = re.findall(r"(Job entrypoint command failed with exit code \d+)", output)
        assert message, output[-3000:]
        status = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": message[-1]}
        assert launch.exit_code({"status": status}) == expected
